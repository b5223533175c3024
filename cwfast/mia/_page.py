"""The report of an audit as one HTML page that needs nothing else: no script, no network, the picture within."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_WIDTH, _HEIGHT, _MARGIN = 560, 420, 60
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}caption{text-align:left;font-weight:600}.note{color:#555}"""


def render(report: Mapping[str, Any]) -> str:
    """The page; every text of the report is escaped."""
    rows = report["attacks"]
    about = (
        f"{report['targets']} of {report['models']} models attacked on {report['samples']} samples, of which "
        f"{report['members']['fewest']} to {report['members']['most']} were trained on."
    )
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Membership audit</title>",
        f"<style>{_STYLE}</style><h1>Membership audit</h1><p>{html.escape(about)}</p>",
        "<p>An AUC of 0.5 is a coin toss; far below it, a score with the wrong sign leaks just as well. Intervals are "
        "over samples. “Shadow” columns use thresholds from the other models, as an attacker would have to.</p>",
        _results(rows),
        _curves(rows),
        *(_exposed(name, row) for name, row in rows.items()),
        _facts(report),
    ]
    return "\n".join(parts) + "</html>\n"


def _table(caption: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(line(cells, "td") for cells in body)
    return f"<table><caption>{html.escape(caption)}</caption>{line(head, 'th')}{rows}</table>"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _results(rows: Mapping[str, Any]) -> str:
    first = next(iter(rows.values()))
    head = ["attack", "variant", "AUC", "interval", "over models", "balanced accuracy"]
    for point in first["tpr_at_fpr"]:
        rate = f"{100 * point['fpr']:g}%"
        head += [f"TPR at {rate} FPR", "interval", f"shadow TPR at {rate}", "its FPR"]
    body, notes = [], []
    for name, row in rows.items():
        shadow = row["shadow_calibrated"]
        variant = ", ".join(f"{key} {value}" for key, value in row["options"].items())
        cells = [name, f"{row['function']}({row['signal']}) {variant}", _number(row["auc"])]
        cells += [_span(row, "auc_low", "auc_high"), _span(row, "auc_models_low", "auc_models_high")]
        cells += [_number(row["balanced_accuracy"])]
        for i, point in enumerate(row["tpr_at_fpr"]):
            carried = shadow["tpr_at_fpr"][i] if shadow else {"tpr": None, "realised_fpr": None}
            star = "*" if point["warning"] else ""
            cells += [_number(point["tpr"]) + star, _span(point, "low", "high")]
            cells += [_number(carried["tpr"]), _number(carried["realised_fpr"])]
            notes += [point["warning"]] if point["warning"] else []
        body.append(cells)
    warnings = "".join(f"<p class='note'>* {html.escape(note)}</p>" for note in dict.fromkeys(notes))
    return _table("Attacks", head, body) + warnings


def _span(row: Mapping[str, Any], low: str, high: str) -> str:
    return "-" if row[low] is None else f"{row[low]:.4f} to {row[high]:.4f}"


def _curves(rows: Mapping[str, Any]) -> str:
    """ROC curves as SVG, both axes logarithmic, with the interval of each as a band."""
    lowest = min(point["fpr"] for row in rows.values() for point in row["roc"] if point["fpr"] > 0)
    decades = max(1, math.ceil(-math.log10(lowest)))

    def x(value: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * (1 + math.log10(max(value, 10.0**-decades)) / decades)

    def y(value: float) -> float:
        return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (1 + math.log10(max(value, 10.0**-decades)) / decades)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' role='img' aria-label='ROC curves'>"]
    for power in range(-decades, 1):
        at, label = 10.0**power, f"{100 * 10.0**power:g}%"
        parts.append(f"<path d='M{x(at):.1f} {y(1):.1f}V{y(0):.1f}M{x(0):.1f} {y(at):.1f}H{x(1):.1f}' stroke='#ddd'/>")
        parts.append(f"<text x='{x(at):.1f}' y='{y(0) + 18:.1f}' font-size='12' text-anchor='middle'>{label}</text>")
        parts.append(f"<text x='{x(0) - 6:.1f}' y='{y(at) + 4:.1f}' font-size='12' text-anchor='end'>{label}</text>")
    parts.append(f"<path d='M{x(0):.1f} {y(0):.1f}L{x(1):.1f} {y(1):.1f}' stroke='#999' stroke-dasharray='4 4'/>")
    for i, (name, row) in enumerate(rows.items()):
        colour, points = _COLOURS[i % len(_COLOURS)], [point for point in row["roc"] if point["fpr"] > 0]
        if all(point["low"] is not None for point in points):
            edge = [(p["fpr"], p["high"]) for p in points] + [(p["fpr"], p["low"]) for p in reversed(points)]
            band = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in edge)
            parts.append(f"<polygon points='{band}' fill='{colour}' opacity='0.12'/>")
        line = " ".join(f"{x(p['fpr']):.1f},{y(p['tpr']):.1f}" for p in points)
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>")
        height = 20 + 16 * i
        parts.append(f"<text x='{x(0) + 8:.1f}' y='{_MARGIN + height - 20}' font-size='12' fill='{colour}'>")
        parts.append(f"{html.escape(name)}</text>")
    middle = _WIDTH / 2
    parts.append(f"<text x='{middle}' y='{_HEIGHT - 12}' font-size='13' text-anchor='middle'>false positives</text>")
    return "".join(parts) + "<text x='8' y='24' font-size='13'>true positives</text></svg>"


def _exposed(name: str, row: Mapping[str, Any]) -> str:
    head = ["sample", "found in", "of models trained on it", "mean rank"]
    body = [
        [str(one["id"]), f"{100 * one['found_in']:.0f}%", str(one["models"]), _number(one["mean_rank"], 3)]
        for one in row["most_exposed"]
    ]
    return f"<details><summary>Most exposed samples, {html.escape(name)}</summary>{_table('', head, body)}</details>"


def _facts(report: Mapping[str, Any]) -> str:
    facts = {**report["manifest"], "signals (SHA-256)": report["signals_sha256"], "seed": report["seed"]}
    return _table("What was attacked", ["", ""], [[str(key), str(value)] for key, value in facts.items()])
