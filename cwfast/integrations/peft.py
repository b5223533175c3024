"""Adapters of PEFT: what they were before training, under the names by which cwfast scores and rewinds them."""

import os
from typing import Any

from torch import Tensor

from cwfast._parameters import initial_values, trainable
from cwfast.checkpoint import Checkpoint

FILE = "adapter_model.safetensors"
ZERO = (".lora_B.", ".lora_embedding_A.")  # at the start, unless init_lora_weights says otherwise


def initial_adapters(model: Any, saved: str | os.PathLike[str] | None = None) -> dict[str, Tensor]:
    """The adapters' initial values (of LoRA: A_0 and B_0), by parameter name.

    They are the ``initial`` of ``rewind_``, of ``freeze``, of scoring and of ``CWRFCallback`` for a model of PEFT.
    A_0 is random: it must be kept when training begins, by this function or by ``model.save_pretrained(folder)``.

    Args:
        model: of PEFT, or a model of transformers with adapters; what requires a gradient are its adapters (with
            DoRA's magnitudes, and layers of ``modules_to_save``).
        saved: the folder of ``model.save_pretrained`` at the start; None: ``model`` has not been trained yet.

    Returns:
        Copies, on the CPU.

    Raises:
        TypeError: ``model`` has no adapters.
        ValueError: without ``saved``, the model has been trained: a B that starts as zeros is not zero. With it,
            something is missing in the folder, or has another shape.
    """
    config = getattr(model, "peft_config", None)
    if not isinstance(config, dict):
        raise TypeError(f"model must have adapters of PEFT; got {type(model).__name__}")
    parameters = trainable(model)
    if not parameters:
        raise ValueError("model must have an adapter that requires a gradient (is_trainable=True); it has none")
    if saved is not None:
        return _read(model, config, parameters, saved)
    for name, parameter in parameters.items():
        if any(part in name for part in ZERO) and _starts_at_zero(name, config) and bool(parameter.any()):
            raise ValueError(
                f"initial values must be taken before training, when {name!r} is all zeros; it is not: give the folder "
                "that was saved at the start"
            )
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


def _starts_at_zero(name: str, configs: dict[str, Any]) -> bool:
    """Whether the adapter that a parameter belongs to is of LoRA, with an initialisation that makes no change."""
    from peft import LoraConfig

    parts = name.split(".")
    config = next((configs[adapter] for adapter in configs if adapter in parts), None)
    return isinstance(config, LoraConfig) and config.init_lora_weights in (True, "gaussian")


def _read(
    model: Any, configs: dict[str, Any], parameters: dict[str, Any], saved: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """PEFT's files leave out the adapter's name; which of its entries is which parameter, their memory tells."""
    from peft import get_peft_model_state_dict

    path = os.path.join(saved, FILE)
    source = Checkpoint(path)
    names: dict[int, str] = {}
    for adapter in configs:
        found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        names |= {tensor.data_ptr(): name for name, tensor in found.items() if name in source}
    stored = {name: names.get(parameter.data_ptr()) for name, parameter in parameters.items()}
    values = {name: source.tensor(entry) for name, entry in stored.items() if entry is not None}
    return initial_values(values, parameters, what=os.fspath(saved))
