"""An audit of a language model as a table of text and as one HTML page; every text is escaped by jinja2."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from cwfast.report.table import interval, number, percent

if TYPE_CHECKING:
    from jinja2 import Environment

    from cwfast.llm.storage import TokenRecords

SHOWN = 10  # texts as heat maps
_STRONG = 4.0  # nats of gain at which the colour is full


def environment() -> "Environment":
    """With autoescaping, and an error for whatever the report lacks.

    Raises:
        ImportError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        message = 'a report needs jinja2, which cannot be imported here; pip install "cwfast[llm]" brings it'
        raise ImportError(message, name="jinja2") from error
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for filter_ in (number, percent, interval):
        made.filters[filter_.__name__] = filter_
    return made


def render(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page.

    Args:
        report: of schema ``cwfast-audit-llm/1``.
        shown: of ``heat``; none: the page holds no text.

    Raises:
        ImportError: jinja2 is missing.
        jinja2.UndefinedError: the report lacks a key that the page shows.
    """
    template = environment().from_string(files("cwfast.report").joinpath("llm.html").read_text(encoding="utf-8"))
    return template.render(report=report, shown=shown, lead=lead(report), notes=notes(report), tested=tested(report))


def heat(tokenizer: Any, records: "TokenRecords", exposed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The most exposed texts, token by token, with a strength in [0, 1] each.

    The strength is log p - log p of the reference over 4 nats, without a reference e^(log p): what the model knows.

    Args:
        tokenizer: of the model.
        records: of members and non-members.
        exposed: of the report.
    """
    strength = np.exp(records["logprob"])
    if "reference.logprob" in records.values:
        strength = ((records["logprob"] - records["reference.logprob"]) / _STRONG).clip(0, 1)
    shown = []
    for one in exposed["texts"][:SHOWN]:
        start, end = records.offsets[one["member"] : one["member"] + 2].tolist()
        ids = records.tokens[start:end].tolist()
        tokens = [
            {"text": tokenizer.decode([token]), "strength": round(float(strength[start + i]), 3)}
            for i, token in enumerate(ids)
        ]
        shown.append({**one, "tokens": tokens})
    return shown


def lead(report: Mapping[str, Any]) -> list[str]:
    """Sentences for those who read no further."""
    rows, name, highest = report["attacks"], report["headline"], report["highest"]
    sentences = [f"AUC {interval(rows[name])} by {name}, an attack chosen before any score was seen."]
    for point in rows[name]["tpr_at_fpr"]:
        found = percent(point["tpr"])
        sentences.append(f"At most {percent(point['fpr'])} false alarms: {found} of the members found by it.")
    if len(rows) > 1:
        sentences.append(
            f"The highest AUC of {len(rows)} attacks is {interval(highest)} by {highest['attack']}; its interval is "
            "wider, for so many to choose from."
        )
    texts = report["texts"]
    sentences.append(f"{texts['members']:,} members and {texts['nonmembers']:,} non-members.")
    return sentences


def tested(report: Mapping[str, Any]) -> str:
    """Which controls are away from 0.5, all of them tested together."""
    rows = report["controls"]
    away = [name for name, row in rows.items() if not row["auc_low"] <= 0.5 <= row["auc_high"]]
    each = percent(next(iter(rows.values()))["confidence"])
    return (
        f"{len(away)} of {len(rows)} controls differ from 0.5{': ' * bool(away)}{', '.join(away)} (intervals at {each} "
        "each, Bonferroni, so that all hold together at 95%)."
    )


def notes(report: Mapping[str, Any]) -> list[str]:
    """What stands below the table."""
    rows = report["attacks"].values()
    found = list(dict.fromkeys(p["warning"] for row in rows for p in row["tpr_at_fpr"] if p["warning"]))
    found = [note.replace(" and its interval lies too high", "") for note in found]  # that is the bootstrap's
    return [*found, *(f"Not run: {name}, it {lack}." for name, lack in report["left_out"].items())]


def table(report: Mapping[str, Any]) -> str:
    """The report as plain text: warnings first, then a line per attack and control."""
    rows = report["attacks"]
    points = next(iter(rows.values()))["tpr_at_fpr"]
    head = ["attack", "AUC [low, high]", "bal. acc", *(f"TPR@{percent(p['fpr'])} [low, high]" for p in points)]
    body = [head, *([name, *_cells(row)] for name, row in rows.items())]
    body += [[f"({name})", interval(one), *[""] * (len(head) - 2)] for name, one in report["controls"].items()]
    widths = [max(len(line[i]) for line in body) for i in range(len(head))]
    lines = [f"WARNING: {warning}" for warning in report["warnings"]]
    lines += lead(report)
    lines += [""] + [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in body
    ]
    lines += ["In brackets below the attacks: controls that need no such model. " + tested(report)]
    return "\n".join([*lines, *_as_a_set(report), *(f"* {note}" for note in notes(report))])


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of the report as Markdown; no text is in it."""
    rows = report["attacks"]
    points = next(iter(rows.values()))["tpr_at_fpr"]
    head = ["attack", "AUC", "balanced accuracy", *(f"TPR at {percent(p['fpr'])} FPR" for p in points)]
    lines = [*(f"**Warning:** {warning}\n" for warning in report["warnings"]), " ".join(lead(report)), ""]
    lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += [f"| `{name}` | " + " | ".join(_cells(row)) + " |" for name, row in rows.items()]
    lines += ["", *(f"\\* {note}\n" for note in notes(report)), "| control | AUC |", "|---|---:|"]
    lines += [f"| `{name}` | {interval(row)} |" for name, row in report["controls"].items()]
    return "\n".join([*lines, "", tested(report), *_as_a_set(report)]) + "\n"


def _as_a_set(report: Mapping[str, Any]) -> list[str]:
    test = report["dataset_inference"]
    if test is None:
        return []
    return [f"As a set: t = {test['t']:.2f}, p = {test['p_value']:.2g} that members score no higher than the others."]


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        interval(row),
        number(row["balanced_accuracy"]),
        *(
            f"{number(p['tpr'])}{'*' * bool(p['warning'])} [{number(p['low'])}, {number(p['high'])}]"
            for p in row["tpr_at_fpr"]
        ),
    ]
