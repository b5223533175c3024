"""The models of the demo: trained, rewound, moved back otherwise, fine-tuned on; one is in memory at a time."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.files import atomic_write
from cwfast.demo_llm.sizes import CRITERIA, Material, Sizes
from cwfast.llm.defending import hold_, masks_of
from cwfast.llm.scoring import score
from cwfast.llm.training import fine_tune
from cwfast.masks import MaskSet, rewind_


class Models:
    """Each method leaves its model in ``model``, or returns another under "model", with further settings.

    Args:
        out: folder of the run: trained weights and scores are kept in its ``work``.
        material: the model before fine-tuning, and its texts.
        sizes: of everything.
        seed: of orders and random masks.
    """

    def __init__(self, out: Path, material: Material, sizes: Sizes, seed: int) -> None:
        self.out, self.sizes, self.seed, self.ids = out, sizes, seed, material.ids
        self.model = material.model.eval()
        self.members = material.ids["members"]
        self.parameters = dict(self.model.named_parameters())
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}

    def target(self, epochs: int) -> None:
        """The model that is defended: trained once, then read from its file."""
        file = self.out / "work" / f"target-{epochs}.safetensors"
        if not file.exists():
            self.trained(epochs=epochs, lr=self.sizes.lr)
            with atomic_write(file) as temporary:
                save_file({name: p.detach() for name, p in self.parameters.items()}, temporary)
        source = Checkpoint(file)
        self.put({name: source.tensor(name) for name in self.parameters})

    def trained(self, then: int = 0, **how: Any) -> dict[str, Any]:
        """Fine-tuned on the members as ``how`` says (of ``fine_tune``), and held there for ``then`` steps."""
        self.put(self.initial)
        fine_tune(self.model, self.members, batch=self.sizes.batch, seed=self.seed, **how)
        return self._held(then)

    def interpolated(self, epochs: int, tau: float, steps: int = 0) -> dict[str, Any]:
        """All weights moved to the share ``tau`` of their way from the base."""
        self.target(epochs)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.lerp(self.initial[name], parameter, tau))
        return self._held(steps)

    def rewound(
        self, epochs: int, criterion: str, rate: float, steps: int = 0, alpha: float | None = None, random: bool = False
    ) -> dict[str, Any]:
        """CWRF; or as many weights of each tensor at random."""
        masks = self._masks(epochs, criterion, rate)
        masks = masks.random_like(self.seed) if random else masks
        self.target(epochs)
        rewind_(self.model, masks, self.initial)
        return {"rewound": masks.total, **self._held(steps, alpha, masks)}

    def not_rewound(self, epochs: int) -> dict[str, Any]:
        """The same steps from the fine-tuned model itself."""
        self.target(epochs)
        return self._held(self.sizes.steps)

    def _held(self, steps: int, alpha: float | None = None, masks: MaskSet | None = None) -> dict[str, Any]:
        s = self.sizes
        how: dict[str, Any] = {"steps": steps, "lr": s.steps_lr, "batch": s.batch, "seed": self.seed}
        level, losses = hold_(self.model, self.members, alpha=alpha, masks=masks, **how)
        return {"alpha": level, "losses": losses}

    def lora(self, epochs: int, lr: float) -> dict[str, Any]:
        """Adapters of rank 16 trained in place of all weights."""
        from peft import LoraConfig, get_peft_model

        self.put(self.initial)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = get_peft_model(copy.deepcopy(self.model), config)
        fine_tune(model, self.members, epochs=epochs, lr=lr, batch=self.sizes.batch, seed=self.seed)
        return {"model": model}

    def _masks(self, epochs: int, criterion: str, rate: float) -> MaskSet:
        """Scored once for all rates."""
        file = self.out / "work" / f"scores-{epochs}-{criterion.replace(' ', '_')}.safetensors"
        if not file.exists():
            self.target(epochs)
            sides = [[torch.tensor(row) for row in self.ids[name]] for name in ("members", "reference")]
            how = {"batch_size": self.sizes.batch, "autocast": torch.bfloat16, **CRITERIA[criterion]}
            with atomic_write(file) as temporary:
                save_file(score(self.model, self.initial, *sides, **how), temporary)
        return masks_of(load_file(file), rate)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the model."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
