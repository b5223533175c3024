"""The rows of the demo: a model each, what it says of each text, and how that is judged."""

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cwfast.checkpoint.files import atomic_folder, atomic_write
from cwfast.demo_llm.models import Models
from cwfast.demo_llm.sizes import FIXED, Material, Sizes
from cwfast.errors import CheckpointError
from cwfast.llm import measuring
from cwfast.llm.shadows import halves
from cwfast.llm.storage import TokenRecords
from cwfast.llm.training import fine_tune
from cwfast.report import llm_defense, llm_reading
from cwfast.report.provenance import backends, machine, versions
from cwfast.report.table import percent

SCHEMA = "cwfast-demo-llm/1"
_FOLDERS = ("rows", "records", "work")
PACKAGES = ("cwfast", "torch", "transformers", "tokenizers", "peft", "numpy")


class Rows:
    """Makes, keeps and judges all models of a run.

    Args:
        out: folder of the run.
        material: the model before fine-tuning, and its texts.
        sizes: of everything.
        seed: of orders, random masks and bootstrap.
        report_only: make nothing.

    Raises:
        CheckpointError: the folder holds another run.
    """

    def __init__(self, out: Path, material: Material, sizes: Sizes, seed: int, report_only: bool) -> None:
        self.out, self.material, self.sizes, self.seed, self.report_only = out, material, sizes, seed, report_only
        self.missing: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.models = Models(out, material, sizes, seed)
        self._sides = [material.ids[name] for name in ("members", "nonmembers", "heldout")]
        self._meters: dict[int | None, measuring.Meter] = {}
        self._bar = tqdm(desc="cwfast demo-llm", unit="model", file=sys.stderr, disable=None)
        self._key = self._check_run()
        for name in _FOLDERS:
            (out / name).mkdir(exist_ok=True)

    def run(self) -> None:
        """Every row, in the order of the report."""
        s = self.sizes
        self._row("base", "base", "Before fine-tuning", lambda: self.models.put(self.models.initial), epochs=None)
        for epochs in s.starts:
            self._start(epochs)
        self._bar.close()

    def report(self, command: str) -> dict[str, Any]:
        """JSON-able, from the rows."""
        if not self.report_only:
            self._keep({**self._key, "added": {"rates": self.sizes.rates, "shadows": self.sizes.shadows}})
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
        per_epoch = -(-len(self.models.members) // s.batch)
        row = functools.partial(self._row, epochs=epochs, start=start)

        def name(text: str) -> str:
            return f"{epochs}-{text}"

        row(name("undefended"), "undefended", f"Fine-tuned for {start}, undefended", lambda: self.models.target(epochs))
        for criterion in s.criteria:
            for rate in s.rates:
                key, label = name(f"{criterion}-{rate}"), f"CWRF {criterion} {percent(rate)}"
                more: dict[str, Any] = {"criterion": criterion, "rate": rate}
                make = functools.partial(self.models.rewound, epochs, criterion, rate)
                if s.rewound_only:
                    curve = f"CWRF {criterion}, rewound only"
                    row(f"{key}-only", "cwrf", f"{label}, rewound only", make, curve=curve, **more)
                make = functools.partial(self.models.rewound, epochs, criterion, rate, steps=s.steps)
                curve = f"CWRF {criterion}, then fine-tuned"
                row(key, "cwrf", f"{label} + {s.steps} steps", make, curve=curve, steps=s.steps, **more)
        alphas = {one["rate"]: one["alpha"] for one in self.rows if one["id"] in {name(f"gap-{r}") for r in s.rates}}
        for rate in s.random_rates:
            alpha = alphas.get(rate)
            make = functools.partial(self.models.rewound, epochs, "gap", rate, steps=s.steps, alpha=alpha, random=True)
            label = f"Random weights, {percent(rate)} + {s.steps} steps"
            curve = "random weights rewound, then fine-tuned"
            row(name(f"random-{rate}"), "control", label, make, curve=curve, steps=s.steps, rate=rate)
        for tau in s.tuned_taus:
            make = functools.partial(self.models.interpolated, epochs, tau, steps=s.steps)
            label, curve = f"Interpolated, tau {tau} + {s.steps} steps", "interpolation, then fine-tuned"
            row(name(f"tau-{tau}-tuned"), "control", label, make, curve=curve, steps=s.steps, tau=tau)
        make = functools.partial(self.models.not_rewound, epochs)
        curve = "fine-tuned without rewinding"
        row(name("not-rewound"), "control", f"Not rewound + {s.steps} steps", make, curve=curve, steps=s.steps)
        half: dict[str, Any] = {"steps": max(1, epochs * per_epoch // 2), "lr": s.lr}
        label, curve = f"Early stopping: half of {start}", "trained less"
        row(name("half"), "baseline", label, functools.partial(self.models.trained, **half), curve=curve)
        make = functools.partial(self.models.trained, then=s.steps, **half)
        curve = "trained less, then fine-tuned"
        row(name("half-tuned"), "control", f"{label} + {s.steps} steps", make, curve=curve, steps=s.steps)
        if s.low_lr:
            make = functools.partial(self.models.trained, epochs=epochs, lr=s.lr / 4)
            row(name("low-lr"), "baseline", f"{start} at lr {s.lr / 4:g}", make, curve="trained less")
        for lr in s.lora:
            make = functools.partial(self.models.lora, epochs, lr)
            row(name(f"lora-{lr:g}"), "baseline", f"LoRA (rank 16) for {start} at lr {lr:g}", make, curve="LoRA")
        for tau in s.taus:
            make = functools.partial(self.models.interpolated, epochs, tau)
            row(name(f"tau-{tau}"), "control", f"Interpolated, tau {tau}", make, curve="interpolation", tau=tau)

    def _row(
        self,
        key: str,
        group: str,
        label: str,
        make: Callable[[], Any],
        *,
        epochs: int | None,
        curve: str | None = None,
        **settings: Any,
    ) -> None:
        """Make a model and what it says of each text, or read what an earlier run kept; and judge it.

        ``make`` leaves the model in ``self.models.model``, or returns another under "model", with further settings.
        """
        file = self.out / "rows" / f"{key.replace(' ', '_')}.json"
        self._bar.set_postfix_str(label[:40])
        if not file.exists() and self.report_only:
            self.missing.append(label)
            return
        if not file.exists():
            begin, spent = time.perf_counter(), time.process_time()
            found: dict[str, Any] = make() or {}
            self._record(file.stem, found.pop("model", self.models.model))
            row: dict[str, Any] = {"id": key, "group": group, "label": label, "curve": curve or group}
            row |= {**llm_defense.NO_SETTINGS, **settings, **found}
            row |= {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - spent}
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(row, allow_nan=False) + "\n", encoding="utf-8")
        row = json.loads(file.read_text(encoding="utf-8"))
        self.rows.append(row | self._meter(epochs)(self._recorded(file.stem)))
        self._bar.update()

    def _record(self, name: str, model: Any) -> None:
        """Keep what a model says of each text."""
        folder = self.out / "records" / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before it wrote the row
        with atomic_folder(folder) as partial:
            measuring.read(model, *self._sides).save(partial)

    def _recorded(self, name: str) -> TokenRecords:
        return TokenRecords.load(self.out / "records" / name)

    # -- bookkeeping

    def _meter(self, epochs: int | None) -> measuring.Meter:
        """It judges what begins with, or stands beside, a model fine-tuned for so many epochs: its shadows were trained
        as that was. None: the base, which no shadow is like.
        """
        if epochs not in self._meters:
            s, shadows = self.sizes, [] if epochs is None else self._shadows(epochs)
            self._meters[epochs] = measuring.Meter(
                self._recorded("base"), *self._sides, shadows=shadows, fprs=s.fprs, bootstrap=s.bootstrap,
                seed=self.seed,
            )  # fmt: skip
        return self._meters[epochs]

    def _shadows(self, epochs: int) -> list[tuple[TokenRecords, Any]]:
        """Records of each, and which of the audited texts it was trained on; all of them, or none."""
        s, audited, found = self.sizes, [*self.models.members, *self.material.ids["nonmembers"]], []
        for i, mine in enumerate(halves(len(audited), s.shadows, self.seed) if s.shadows else ()):
            name = f"{epochs}-shadow-{i}"
            self._bar.set_postfix_str(f"shadow {i + 1} of {s.shadows}")
            if not (self.out / "records" / name).exists():
                if self.report_only:
                    self.missing.append(f"shadows for RMIA, {epochs} epoch{'s' * (epochs > 1)}")
                    return []
                self.models.put(self.models.initial)
                own = [text for text, member in zip(audited, mine, strict=True) if member]
                fine_tune(self.models.model, own, epochs=epochs, lr=s.lr, batch=s.batch, seed=self.seed + 1 + i)
                self._record(name, self.models.model)
            found.append((self._recorded(name), mine))
        return found

    def _check_run(self) -> dict[str, Any]:
        """One folder, one run: finished rows are read again only if nothing that they depend on has changed.

        Returns:
            What may not change.
        """
        digest = hashlib.sha256(json.dumps(self.material.ids, sort_keys=True).encode())
        for name, value in self.models.initial.items():
            digest.update(name.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
        key = {
            "schema": SCHEMA,
            "sizes": {name: getattr(self.sizes, name) for name in FIXED},
            "seed": self.seed,
            "model_and_texts_sha256": digest.hexdigest(),
            "versions": versions(("cwfast", "torch", "transformers")),
        }
        file = self.out / "run.json"
        if not file.exists():
            others = [name for name in _FOLDERS if (self.out / name).exists()]
            if others:
                raise CheckpointError(f"{self.out} must hold a run, or no {others[0]}: give a new folder")
            self._keep(key)
            return key
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in key if found.get(name) != key[name]]
        if changed:
            raise CheckpointError(
                f"{self.out} must hold a run with the same {changed[0]}; it holds another: give a new folder"
            )
        asked = found.get("added", {"rates": [], "shadows": 0})  # by earlier runs that came to their end
        shadows = max(self.sizes.shadows, asked["shadows"])
        self.sizes = replace(self.sizes.with_rates(asked["rates"]), shadows=shadows)
        return key

    def _keep(self, key: Mapping[str, Any]) -> None:
        with atomic_write(self.out / "run.json") as temporary:
            temporary.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        s = self.sizes
        shadowed = any(name in row["attacks"] for row in self.rows for name in measuring.WITH_SHADOWS)
        own = f"{s.shadows} for each start, trained like its undefended model on random halves of the audited texts"
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
            **({"shadows, for RMIA": own} if shadowed else {}),
            "intervals": f"95%, {s.bootstrap} resamples of the texts; the same for all models, so that differences are "
            "of pairs",
            "weights": f"{sum(p.numel() for p in self.models.parameters.values()):,}",
            "time": f"{spent[0]:.0f} s, {spent[1]:.0f} s of processor time, in {len(self.rows)} models, shadows not "
            f"counted ({os.cpu_count()} cores)",
        }
