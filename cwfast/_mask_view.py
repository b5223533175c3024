"""What a set of selected weights looks like by part of the model: counts, a text table, a picture."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 60  # bars that a picture of legible size holds


class Count(NamedTuple):
    """Selected weights, and how many there are to select from."""

    selected: int
    numel: int


def counts_by(group: str, counts: Mapping[str, int], numel: Mapping[str, int]) -> dict[str, Count]:
    """See ``MaskSet.counts_by``."""
    if group not in ("layer", "kind"):
        raise ValueError(f"group must be 'layer' or 'kind'; got {group!r}")
    found: dict[str, Count] = {}
    for name, entries in numel.items():
        key = layer_of(name) if group == "layer" else _kind_of(name)
        before = found.get(key, Count(0, 0))
        found[key] = Count(before.selected + counts[name], before.numel + entries)
    return found


def summary(group: str, parts: Mapping[str, Count], zero_score_selected: int) -> str:
    """See ``MaskSet.summary``."""
    whole = _whole(parts)
    rows = [*parts.items(), ("all", whole)]
    width = max(len(group), *(len(key) for key, _ in rows))
    lines = [f"{group:<{width}}  {'selected':>15}  {'weights':>17}  {'share':>9}  {'to all':>7}"]
    for key, count in rows:
        relative = f"{_share(count) / _share(whole):.2f}" if whole.selected else "-"
        lines.append(f"{key:<{width}}  {count.selected:>15,}  {count.numel:>17,}  {_share(count):>9.4%}  {relative:>7}")
    if zero_score_selected:
        lines.append(f"{zero_score_selected:,} of the selected weights had score 0")
    return "\n".join(lines)


def plot(group: str, parts: Mapping[str, Count], path: str | os.PathLike[str] | None) -> "Figure":
    """See ``MaskSet.plot``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"MaskSet.plot needs matplotlib (pip install matplotlib); {error}") from error
    whole, shown = _whole(parts), list(parts.items())
    if len(shown) > _ROWS:  # those that hold the most, in the order of the model
        most = sorted(shown, key=lambda item: -item[1].selected)[:_ROWS]
        shown = [item for item in shown if item in most]
    figure = Figure(figsize=(8, 1.4 + 0.25 * max(len(shown), 1)), layout="constrained")
    axes = figure.add_subplot()
    shares = [100 * _share(count) for _, count in shown]
    axes.barh(range(len(shown)), shares, color="#0072B2", height=0.7)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
    axes.invert_yaxis()
    label: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
    label["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the dashed line does not cross it
    for row, (share, (_, count)) in enumerate(zip(shares, shown, strict=True)):
        axes.annotate(f"{count.selected:,}", (share, row), (4, 0), **label)
    axes.axvline(100 * _share(whole), color="#D55E00", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.15 * max([100 * _share(whole), *shares, 1e-9]))
    left_out = f" (the {_ROWS} with the most, of {len(parts)})" if len(parts) > _ROWS else ""
    axes.set_xlabel(f"selected, % of the weights of each {group}{left_out}")
    axes.set_title(f"{whole.selected:,} of {whole.numel:,} weights; dashed: {_share(whole):.3%}, all", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _whole(parts: Mapping[str, Count]) -> Count:
    return Count(sum(count.selected for count in parts.values()), sum(count.numel for count in parts.values()))


def _share(count: Count) -> float:
    return count.selected / count.numel if count.numel else 0.0


def layer_of(name: str) -> str:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1]) or name


def _kind_of(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
