"""The report of ``cwfast study``: report.json, pictures of each data set, report.html, and Markdown."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cwfast.checkpoint.files import atomic_write
from cwfast.report import plots, prepare, study_tables, table
from cwfast.report.study_plots import rates_figure, tradeoff_figure
from cwfast.report.study_summary import summary
from cwfast.report.table import MAIN_ATTACK, interval, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(report: Mapping[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write report.json, report.html, report.md, summary.md and two pictures of each data set.

    Each appears whole or not at all.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        OSError: ``out`` cannot be made or written.
        ValueError: the report holds NaN or infinity, which JSON cannot.
    """
    made = prepare(out)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    pictures = {
        f"{name}-{kind}": draw(part)
        for name, part in report["data"].items()
        for kind, draw in (("tradeoff", tradeoff_figure), ("rates", rates_figure))
    }
    written = {"report.json": text.encode(), "report.md": markdown(report).encode()}
    written["summary.md"] = "\n".join([*summary(report), *(f"- {line}" for line in missing(report)), ""]).encode()
    written |= {f"{name}.png": plots.png(figure) for name, figure in pictures.items()}
    written["report.html"] = page(report, pictures).encode()
    for name, content in written.items():
        with atomic_write(made / name) as temporary:
            temporary.write_bytes(content)
    return [made / name for name in written]


def page(report: Mapping[str, Any], pictures: Mapping[str, "Figure"]) -> str:
    """Return one HTML page that needs nothing else; every text of the report is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for filter_ in (number, percent, table.count, interval):
        environment.filters[filter_.__name__] = filter_
    read = files("cwfast.report").joinpath
    style = read("page.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    template = environment.from_string(read("study.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        style=style,
        pictures={name: plots.data_uri(figure) for name, figure in pictures.items()},
        head=head(report),
        method=method,
        fleets=fleets,
        cells=cells,
        missing=missing,
        tables=study_tables.tables,
        notes=study_tables.notes,
        main=MAIN_ATTACK,
        attacks=table.ATTACKS,
    )


def head(report: Mapping[str, Any]) -> list[str]:
    """The heads of ``cells``."""
    row = next(row for part in report["data"].values() for row in part["rows"]) if report["data"] else None
    rates = [] if row is None else [f"TPR@{percent(p['fpr'])}" for p in row["attacks"][MAIN_ATTACK]["tpr_at_fpr"]]
    return ["models", "rewound", "reference", "train acc", "test acc", "LiRA AUC [low, high]", "RMIA AUC [low, high]",
            "loss AUC", *rates]  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row's texts."""
    attacks = row["attacks"]
    return [
        row["label"],
        table.count(row["rewound"]),
        row["reference"],
        number(row["train_accuracy"]),
        number(row["test_accuracy"]),
        interval(attacks[MAIN_ATTACK]),
        interval(attacks["rmia"]),
        number(attacks["loss"]["auc"]),
        *(number(point["tpr"]) for point in attacks[MAIN_ATTACK]["tpr_at_fpr"]),
    ]


def counts(report: Mapping[str, Any]) -> str:
    """How many models and samples it rests on, in one sentence."""
    parts = [
        f"{name}: {len(part['seeds'])} {'seed' if len(part['seeds']) == 1 else 'seeds'}, "
        f"{len(part['rows'])} cells of {report['models']} models each, {part['samples']['pool']} samples audited, "
        f"{part['samples']['reference']} for reference, {part['samples']['test']} for accuracy"
        for name, part in report["data"].items()
    ]
    return "; ".join([*parts, f"{fleets(report)}."])


def fleets(report: Mapping[str, Any]) -> str:
    """How many were attacked; snapshots and interpolations of models that others start from are fleets of their own."""
    return f"{report['fleets']} fleets of {report['models']} models attacked"


def markdown(report: Mapping[str, Any]) -> str:
    """Return what was found and all rows as Markdown."""
    lines = [f"# {report['title']}", "", f"`{report['command']}`", "", f"{report['note']} {counts(report)}", ""]
    lines += [line for sentence in missing(report) for line in (sentence, "")]
    lines += [" ".join(method(report)), ""]
    for name, part in report["data"].items():
        lines += [f"## {name}", "", f"{part['network']}; {part['recipe']}. {part['note']}.", ""]
        lines += [f"- {sentence}" for sentence in (*part["verdicts"].values(), *part["reading"])]
        lines += ["", *_table(head(report), [cells(row) for row in part["rows"]])]
        for one in study_tables.tables(part):
            lines += [f"### {one.title}", "", *_table(one.head, one.rows)]
        lines += [line for note in study_tables.notes(part) for line in (note, "")]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[text.replace("|", "/") for text in row] for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(f"| {' | '.join(row)} |" for row in escaped), ""]


def text(report: Mapping[str, Any]) -> str:
    """What the terminal shows."""
    lines = [counts(report), report["note"]]
    for name, part in report["data"].items():
        lines += ["", name, *(f"  {sentence}" for sentence in (*part["verdicts"].values(), *part["reading"]))]
    lines += ["", *missing(report)]
    return "\n".join(lines)


def method(report: Mapping[str, Any]) -> list[str]:
    """How sure the figures are, and what the words say."""
    overlaps = [
        f"{table.percent(part['overlap'])} on {name}"
        for name, part in report["data"].items()
        if part["overlap"] is not None
    ]
    correlated = (
        f" (seeds have samples of one data set in common, {', '.join(overlaps)}, and count as correlated by that share)"
        if overlaps
        else ""
    )
    alone = [name for name, part in report["data"].items() if len(part["seeds"]) == 1]
    two = [name for name, part in report["data"].items() if len(part["seeds"]) == 2]
    of_two = [f"Two seeds ({' and '.join(two)}) say little of it: intervals there are rather too narrow."] * bool(two)
    of_one = (
        [
            f"{' and '.join(alone)} {'has' if len(alone) == 1 else 'have'} one seed: the intervals there say nothing "
            "of how another split or reference set would differ."
        ]
        if alone
        else []
    )
    margin, draws = f"{report['margin']:g}", report["bootstrap"]
    return [
        "Intervals (95%) of an AUC or an accuracy, and of the difference of two in pairs, add two variances: over "
        f"samples, by resampling ({draws} times the audited ones for an AUC, the test set for an accuracy) alike for "
        f"all models and cells of a seed{correlated}; and over models, by each model's own figure, or by the seeds' "
        "means if those differ more (of three seeds or more with Student's t). The models of a fleet are each other's "
        "shadows, and a few seeds tell little of how seeds differ: the intervals are approximate, and none is "
        "corrected for the number of comparisons.",
        *of_one,
        *of_two,
        f"A cell is better than another if its AUC is lower and its accuracy lower by less than {margin} (the whole "
        f"interval), worse if its AUC is higher and its accuracy higher by less than {margin}, a trade if both are "
        "lower or both higher; the accuracy is open where its interval is too wide for any of these; even are cells "
        "whose AUCs are not told apart (with a higher or a lower accuracy, where its whole interval is beyond "
        f"{margin}).",
        "At no less than an accuracy, each curve shows the setting of the lowest AUC among those that reach it by "
        f"point estimate, less {margin}; with several seeds it is chosen on the others and measured on the one left "
        f"out, in turn. A curve that no setting takes there, or that misses it by more than {margin} where it was not "
        "chosen, is not ranked. Settings are held out, curves are not: which curve is the first is seen by looking, "
        "and its interval is not corrected for that.",
        "CWRF and all that is fine-tuned train one and a half times as many epochs as what is trained from scratch. "
        "Random weights are drawn from all, also from those that never moved, such as the ones of pixels that are "
        "always 0: they may rewind less than their number says.",
    ]


def missing(report: Mapping[str, Any]) -> list[str]:
    """What was left out, and what is not done: the rows are then of fewer seeds, or of a part of one."""
    out = [
        f"Left out of {name}: {base} ({why})." for name, part in report["data"].items()
        for base, why in part["left_out"].items()
    ]  # fmt: skip
    for name, seeds in report["missing"].items():
        lacking = [f"{n} cells of seed {seed}" for seed, n in seeds.items() if n]
        if lacking:
            used = report["data"].get(name, {"seeds": []})["seeds"]
            said = f"shown: seed {', '.join(map(str, used))}" if used else "nothing is shown"
            out.append(f"Incomplete: {name} lacks {', '.join(lacking)}; {said}.")
    return out
