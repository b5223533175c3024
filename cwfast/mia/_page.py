"""The report of an audit as one HTML page that needs nothing else: no script, no network, the pictures within."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cwfast.mia import _curves, _pictures
from cwfast.mia._inputs import Array

_STYLE = """:root{--ink:#1d2430;--soft:#5b6573;--line:#dfe3e8;--wash:#f5f7f9;--accent:#d55e00}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:#fff;font:16px/1.5 system-ui,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.15;margin:0 0 .4em}h2{font-size:1.3rem;margin:2.6rem 0 .5rem}
p{max-width:46rem;margin:.5rem 0}.soft{color:var(--soft);font-weight:400}p.soft{font-size:.92rem}
.lead{border-left:4px solid var(--accent);padding:.1rem 0 .1rem 1.1rem;margin:1.2rem 0}
.lead p:first-child{font-size:1.2rem;font-weight:600;line-height:1.4}
figure{margin:1rem 0}.roc{display:flex;flex-wrap:wrap;gap:1rem 1.5rem;align-items:flex-start}
.roc>svg{flex:1 1 480px;max-width:760px;min-width:0;font-size:12.5px}.roc text{fill:#444c56}
.roc ul{list-style:none;margin:.4rem 0 0;padding:0;font-size:.9rem;line-height:1.75}
.key{width:30px;height:6px;margin-right:.6em;vertical-align:middle}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;line-height:1.35;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .55rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
thead th{vertical-align:bottom;font-weight:600;border-bottom:2px solid #b9c1ca;white-space:normal}
th:first-child,td:first-child{text-align:left;padding-left:0}td small{display:block;color:var(--soft)}
details{border-bottom:1px solid var(--line);padding:.5rem 0}summary{cursor:pointer;font-weight:600}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}.facts td:first-child{color:var(--soft)}
.sample{image-rendering:pixelated;display:block;margin-left:auto}
code{font-family:ui-monospace,"Liberation Mono",Menlo,monospace;font-size:.85em}
@media print{details{break-inside:avoid}tr{break-inside:avoid}}"""


def render(report: Mapping[str, Any], inputs: Array | None = None) -> str:
    """The page; every text of the report is escaped. ``inputs`` [N, ...]: the most exposed samples are shown."""
    rows = report["attacks"]
    first = next(iter(rows.values()))
    rates = [point["fpr"] for point in first["tpr_at_fpr"]]
    at = f", at {_percent(max(rates))} of false alarms" if rates else ""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>Membership audit</title>",
        f"<style>{_STYLE}</style></head><body><main><h1>Membership audit</h1>",
        f"<div class='lead'>{''.join(f'<p>{html.escape(sentence)}</p>' for sentence in lead(report))}</div>",
        "<p>Can an attacker tell which samples a model was trained on? An AUC of 0.5 is a coin toss, 1 is certainty; "
        "far below 0.5, a score with the wrong sign leaks just as well. Brackets hold "
        f"{_percent(first['confidence'])} intervals.</p>",
        "<h2>How many members are found for how many false alarms</h2>",
        "<p class='soft'>Both axes are logarithmic: an attack that is rarely wrong is the one to fear, so look at the "
        "left. Bands are intervals over samples. Curves begin at one false positive.</p>",
        _curves.figure(rows),
        "<h2>Every attack</h2>",
        _results(rows),
        "<h2>The most exposed samples</h2>",
        f"<p class='soft'>Those that the largest share of the models trained on them gives away{at}. Mean rank: where "
        "among all scores of such a model the sample's lies, 1 for the highest.</p>",
        *(_exposed(name, row, inputs, name == _best(rows)) for name, row in rows.items()),
        "<h2>What was attacked, and how</h2>",
        _facts(report),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def lead(report: Mapping[str, Any]) -> list[str]:
    """Sentences for those who read no further."""
    rows = report["attacks"]
    best = _best(rows)
    many = f"the highest of {len(rows)} attacks" if len(rows) > 1 else "the only attack"
    sentences = [f"AUC {rows[best]['auc']:.3f}{_brackets(rows[best], 'auc_low', 'auc_high', 3)} by {best}, {many}."]
    for i, point in enumerate(rows[best]["tpr_at_fpr"]):
        name = max(rows, key=lambda name: rows[name]["tpr_at_fpr"][i]["tpr"])
        tpr = rows[name]["tpr_at_fpr"][i]["tpr"]
        coarse = " (coarse, see below)" if rows[name]["tpr_at_fpr"][i]["warning"] else ""
        sentences.append(
            f"At most {_percent(point['fpr'])} false alarms: {_percent(tpr)} of the members found, by {name}{coarse}."
        )
    few, many_ = report["members"]["fewest"], report["members"]["most"]
    trained = f"{few:,}" if few == many_ else f"{few:,} to {many_:,}"
    return [
        *sentences,
        f"{report['targets']} of {report['models']} models attacked on {report['samples']:,} samples, each trained on "
        f"{trained} of them.",
    ]


def _best(rows: Mapping[str, Any]) -> str:
    return max(rows, key=lambda name: rows[name]["auc"])


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _rate(value: float) -> str:
    return f"{100 * value:.2f}%" if value >= 0.001 or value == 0 else _percent(value)


def _brackets(row: Mapping[str, Any], low: str, high: str, digits: int) -> str:
    return "" if row[low] is None else f" [{row[low]:.{digits}f}, {row[high]:.{digits}f}]"


def _cell(main: str, *below: str) -> str:
    small = "".join(f"<small>{html.escape(line)}</small>" for line in below if line)
    return f"<td>{html.escape(main)}{small}</td>"


def _table(head: Sequence[str], body: Sequence[str], name: str = "") -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join(f"<tr>{row}</tr>" for row in body)
    above = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"<div class='wide'><table class='{name}'>{above}<tbody>{rows}</tbody></table></div>"


def _results(rows: Mapping[str, Any]) -> str:
    first = next(iter(rows.values()))
    shadows = first["shadow_calibrated"] is not None
    head = ["attack", "AUC", "balanced accuracy"]
    head += [f"TPR at {_percent(point['fpr'])} FPR" for point in first["tpr_at_fpr"]]
    body, notes = [], []
    for name, row in rows.items():
        variant = "".join(f", {key} {value}" for key, value in row["options"].items())
        shadow = row["shadow_calibrated"]
        ends = {"samples": ("auc_low", "auc_high"), "models": ("auc_models_low", "auc_models_high")}
        spans = [
            f"{_brackets(row, *keys, 3).strip()} over {what}" for what, keys in ends.items() if row[keys[0]] is not None
        ]
        cells = [
            _cell(name, f"{row['function']} of {row['signal']}{variant}"),
            _cell(f"{row['auc']:.3f}", *spans),
            _cell(f"{row['balanced_accuracy']:.3f}", f"shadow {shadow['balanced_accuracy']:.3f}" if shadow else ""),
        ]
        for i, point in enumerate(row["tpr_at_fpr"]):
            below = [] if point["low"] is None else [f"[{_rate(point['low'])}, {_rate(point['high'])}]"]
            if shadow:
                carried = shadow["tpr_at_fpr"][i]
                below.append(f"shadow {_rate(carried['tpr'])} at {_rate(carried['realised_fpr'])}")
            cells.append(_cell(_rate(point["tpr"]) + "*" * bool(point["warning"]), *below))
            notes += [point["warning"]] if point["warning"] else []
        body.append("".join(cells))
    warnings = "".join(f"<p class='soft'>* {html.escape(note)}</p>" for note in dict.fromkeys(notes))
    shown = "TPR: the share of members found; FPR: of the others, the share called members by mistake. "
    shown += "Shadow: by a threshold from the other models, as an attacker would have to get it." * shadows
    return f"{_table(head, body)}<p class='soft'>{shown}</p>{warnings}"


def _exposed(name: str, row: Mapping[str, Any], inputs: Array | None, first: bool) -> str:
    head = ["sample", "given away by", "mean rank", *(["the sample"] * (inputs is not None))]
    body = []
    for one in row["most_exposed"]:
        models = f"{round(one['found_in'] * one['models'])} of {one['models']}"
        cells = [_cell(str(one["id"])), _cell(models), _cell(f"{one['mean_rank']:.3f}")]
        if inputs is not None:
            cells.append(f"<td>{_pictures.shown(inputs, one['row'])}</td>")
        body.append("".join(cells))
    return f"<details{' open' * first}><summary>{html.escape(name)}</summary>{_table(head, body)}</details>"


def _facts(report: Mapping[str, Any]) -> str:
    facts = {key: one if isinstance(one, str) else json.dumps(one) for key, one in report["manifest"].items()}
    facts |= {key: report[key] for key in ("command", "seed", "device", "machine") if key in report}
    facts |= {f"backend of {op}": backend for op, backend in report.get("backends", {}).items()}
    facts |= {f"version of {package}": version for package, version in report.get("versions", {}).items()}
    facts |= {f"{name}, SHA-256 of {one['file']}": one["sha256"] for name, one in report.get("inputs", {}).items()}
    facts |= {"signals, SHA-256": report["signals_sha256"]}
    return _table([], [_cell(str(key)) + _cell(str(value)) for key, value in facts.items()], "facts")
