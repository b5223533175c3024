"""The report as one HTML page that needs nothing else: no script, no network, pictures within."""

from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cwfast.report import plots, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(report: Mapping[str, Any], figures: Mapping[str, "Figure"]) -> str:
    """Return the page as HTML; every text of the report is escaped.

    Args:
        report: the report.
        figures: what ``plots.figures`` returned for it.

    Raises:
        jinja2.UndefinedError: the report lacks a key that the page shows.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for filter_ in (table.number, table.percent, table.count, table.interval):
        environment.filters[filter_.__name__] = filter_
    template = environment.from_string(files("cwfast.report").joinpath("page.html").read_text(encoding="utf-8"))
    rows = report["rows"]
    return template.render(
        report=report,
        pictures={name: plots.data_uri(figure) for name, figure in figures.items()},
        groups=list(table.grouped(rows)),
        chosen=list(table.grouped(row for row in rows if row["id"] in report["roc"])),
        columns=table.columns(rows[0]) if rows else [],
        cells={row["id"]: table.cells(row) for row in rows},
        colours=plots.colours(report),
        attacks=table.ATTACKS,
        main=table.MAIN_ATTACK,
        warnings=table.warnings(rows),
    )
