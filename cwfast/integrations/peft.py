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
        saved: the folder of ``model.save_pretrained`` at the start (adapters that are not named "default" lie in
            folders of their names in it); None: ``model`` has not been trained yet.

    Returns:
        Copies, on the CPU.

    Raises:
        TypeError: ``model`` has no adapters.
        FileNotFoundError: ``saved`` has no file of an adapter that is trained.
        ValueError: without ``saved``, the model has been trained: a B that starts as zeros is not zero. With it,
            something is missing in the folder, has another shape, or is of two adapters.
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

    config = configs.get(_adapter_of(name, configs) or "")
    return isinstance(config, LoraConfig) and config.init_lora_weights in (True, "gaussian")


def _read(
    model: Any, configs: dict[str, Any], parameters: dict[str, Any], saved: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """PEFT's files leave out the adapter's name; which of its entries is which parameter, their memory tells."""
    from peft import get_peft_model_state_dict

    values: dict[str, Tensor] = {}
    for adapter in configs:
        own = {name: p for name, p in parameters.items() if _adapter_of(name, configs) in (None, adapter)}
        found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        entries = {tensor.data_ptr(): entry for entry, tensor in found.items()}
        stored = {name: entries[p.data_ptr()] for name, p in own.items() if p.data_ptr() in entries}
        if not stored:
            continue
        source = Checkpoint(os.path.join(saved, "" if adapter == "default" else adapter, FILE))
        for name, entry in stored.items():
            if entry not in source:
                continue
            if name in values:
                raise ValueError(f"each parameter must be of one adapter; {name!r} is in the files of two, in {saved}")
            values[name] = source.tensor(entry)
    return initial_values(values, parameters, what=os.fspath(saved))


def _adapter_of(name: str, configs: dict[str, Any]) -> str | None:
    """The adapter in a parameter's name; None: it is of no single one, as a bias of the base."""
    return next((part for part in reversed(name.split(".")) if part in configs), None)
