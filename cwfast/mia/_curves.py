"""ROC curves of a report as SVG: both axes logarithmic, the interval of each curve as a band."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
_DASHES = ("", "7 4", "2 3", "9 3 2 3")  # for the next seven, and so on
_WIDTH, _HEIGHT = 640, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 622, 12, 370


def figure(rows: Mapping[str, Any]) -> str:
    """The picture and its legend, the attack of the highest AUC first."""
    points = {name: [p for p in row["roc"] if p["fpr"] > 0] for name, row in rows.items()}
    least = min((p["fpr"] for curve in points.values() for p in curve), default=0.1)
    lowest = math.log10(min(least, 0.1))

    def place(value: float, low: int, high: int) -> float:
        share = 1 - math.log10(max(value, 10**lowest)) / lowest
        return low + (high - low) * share

    def x(value: float) -> float:
        return place(value, _LEFT, _RIGHT)

    def y(value: float) -> float:
        return place(value, _BOTTOM, _TOP)

    label = "ROC curves: share of members found against share of others called members by mistake, logarithmic axes"
    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{label}'>"]
    for value in _ticks(lowest):
        text = f"{100 * value:g}%"
        parts.append(f"<path d='M{x(value):.1f} {_TOP}V{_BOTTOM}M{_LEFT} {y(value):.1f}H{_RIGHT}' stroke='#e4e7eb'/>")
        parts.append(f"<text x='{x(value):.1f}' y='{_BOTTOM + 18}' text-anchor='middle'>{text}</text>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y(value) + 4:.1f}' text-anchor='end'>{text}</text>")
    parts.append(f"<path d='M{_LEFT} {_BOTTOM}L{_RIGHT} {_TOP}' stroke='#8d97a3' stroke-dasharray='2 5'/>")
    parts.append(f"<path d='M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}' stroke='#8d97a3' fill='none'/>")
    names = sorted(rows, key=lambda name: -rows[name]["auc"])
    for place_, name in reversed(list(enumerate(names))):  # the best on top
        parts += _curve(points[name], x, y, _COLOURS[place_ % 7], _DASHES[place_ // 7 % len(_DASHES)])
    middle = (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    parts.append(
        f"<text x='{middle[0]}' y='{_HEIGHT - 8}' text-anchor='middle'>others called members by mistake</text>"
    )
    turned = f"transform='rotate(-90 13 {middle[1]})'"
    parts.append(f"<text x='13' y='{middle[1]}' text-anchor='middle' {turned}>members found</text></svg>")
    return f"<figure><div class='roc'>{''.join(parts)}{_legend(names, rows)}</div></figure>"


def _curve(points: Sequence[Mapping[str, Any]], x: Any, y: Any, colour: str, dash: str) -> list[str]:
    parts = []
    if points and all(p["low"] is not None for p in points):
        edge = [(p["fpr"], p["high"]) for p in points] + [(p["fpr"], p["low"]) for p in reversed(points)]
        band = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in edge)
        parts.append(f"<polygon points='{band}' fill='{colour}' opacity='0.1'/>")
    line = " ".join(f"{x(p['fpr']):.1f},{y(p['tpr']):.1f}" for p in points)
    style = f"stroke='{colour}' stroke-width='2' stroke-dasharray='{dash}'"
    return [*parts, f"<polyline points='{line}' fill='none' {style}/>"]


def _legend(names: Sequence[str], rows: Mapping[str, Any]) -> str:
    lines = []
    for i, name in enumerate(names):
        style = f"stroke='{_COLOURS[i % 7]}' stroke-width='3' stroke-dasharray='{_DASHES[i // 7 % len(_DASHES)]}'"
        stroke = f"<svg class='key' viewBox='0 0 30 6'><path d='M0 3H30' {style}/></svg>"
        lines.append(f"<li>{stroke}{html.escape(name)} <span class='soft'>{rows[name]['auc']:.3f}</span></li>")
    guess = "<svg class='key' viewBox='0 0 30 6'><path d='M0 3H30' stroke='#8d97a3' stroke-dasharray='2 5'/></svg>"
    head = "<li class='soft'>attack, AUC</li>"
    return f"<ul>{head}{''.join(lines)}<li>{guess}guessing <span class='soft'>0.500</span></li></ul>"


def _ticks(lowest: float) -> list[float]:
    """Decades within the axes; 2 and 5 of each as well where there are few."""
    steps = (1.0,) if lowest < -2.5 else (1.0, 2.0, 5.0)
    values = [round(step * 10.0**power, 12) for power in range(math.floor(lowest), 1) for step in steps]
    return [value for value in values if 10**lowest * 0.999 <= value <= 1]
