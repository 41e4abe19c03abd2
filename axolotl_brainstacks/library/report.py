"""Draws a library's report: charts, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from axolotl_brainstacks.guarded import parse_json, printable
from axolotl_brainstacks.library.entries import DomainName
from axolotl_brainstacks.library.library import Library
from axolotl_brainstacks.library.records import FORGETTING, ROUTER_CHART, SAMPLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = logging.getLogger(__name__)

ROUNDS_CHART = "report/rounds.png"
FORGETTING_CHART = "report/forgetting.png"
# What `axolotl brainstacks-router` prints at its end.
ROUTER_TABLES = "report/router.txt"
PAGE = "report/report.html"
# Most rows and most columns in the chart of forgetting, and most domains in that of rounds, to keep them readable; the page's
# table and the JSON file have all of them.
_MOST_CELLS = 40
_PNG = b"\x89PNG\r\n\x1a\n"

# Okabe and Ito's palette, which colour-blind readers can tell apart, also in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")

_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ manifest.base.title }}: brainstacks</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } img { max-width: 100% }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } pre { white-space: pre-wrap; margin: 0 }
pre.tables { white-space: pre; overflow-x: auto; font-size: .8rem; line-height: 1.3 }
</style>
<h1>Brainstacks on {{ manifest.base.title }}</h1>
<p>{{ manifest.domains | length }} domains, {{ manifest.stacks | length }} frozen stacks. Losses are means per answer
token on each domain's validation examples, in nats.</p>
<table><tr><th>domain<th>base<th>round<th>before<th>after<th>steps<th>ended<th>kept<th>null space</tr>
{% for domain in manifest.domains %}{% for round in domain.rounds %}
<tr><td>{{ domain.name }}<td class="n">{{ "%.4f" | format(domain.base_loss) }}<td class="n">{{ round.round }}
{% if round.rl %}({{ round.rl }}{% if round.objective_after is not none %}, held-out objective
{{ "%.4f" | format(round.objective_before) }} to {{ "%.4f" | format(round.objective_after) }}{% endif %}){% endif %}
<td class="n">{{ "%.4f" | format(round.loss_before) }}<td class="n">{{ "%.4f" | format(round.loss_after) }}
<td class="n">{{ round.steps }}<td>{{ round.stop_reason }}
<td>{{ "yes" if round.kept else "no: " ~ (round.dropped or "it did not help") }}
<td>{% set held = domain.constraint or domain.nullspace %}{% if held %}{{ held.columns }} columns hold
{{ "%.2f" | format(100 * held.energy) }} % of other domains' output energy,
{{ "%.0f" | format(100 * held.capacity_left) }} % is left{% endif %}</tr>
{% endfor %}{% endfor %}</table>
{% for title, image in charts %}<h2>{{ title }}</h2><img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}
{% if router %}<h2>The router in figures</h2><pre class="tables">{{ router }}</pre>{% endif %}
{% if samples %}<h2>Answers to validation prompts after each round</h2>
<table><tr><th>domain<th>round<th>prompt<th>answer<th>reference</tr>
{% for s in samples %}<tr><td>{{ s.domain }}<td class="n">{{ s.round }}<td><pre>{{ s.prompt }}</pre>
<td><pre>{{ s.answer }}</pre><td><pre>{{ s.reference }}</pre></tr>
{% endfor %}</table>{% endif %}
</html>
"""


class _ForgettingRow(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    after: DomainName
    own_stacks: dict[DomainName, float]
    all_stacks: dict[DomainName, float]


class _Sample(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    domain: str
    round: int
    prompt: str
    answer: str
    reference: str


_RECORDS: dict[str, TypeAdapter[Any]] = {
    FORGETTING: TypeAdapter(list[_ForgettingRow]),
    SAMPLES: TypeAdapter(list[_Sample]),
}


def write_report(library: Library) -> None:
    """Draw the charts and the page of `report/` from the library's records. To be called inside `library.writing()`."""
    from jinja2 import Environment

    charts = {}
    if any(domain.rounds for domain in library.manifest.domains):
        charts[ROUNDS_CHART] = _picture(ROUNDS_CHART, lambda: _rounds(library))
    if rows := read_records(library, FORGETTING):
        charts[FORGETTING_CHART] = _picture(FORGETTING_CHART, lambda: _forgetting(rows))
    for file, picture in charts.items():
        if picture:
            library.write_file(file, picture)
    titles = {
        ROUNDS_CHART: "Residual boosting: the validation loss after every round",
        FORGETTING_CHART: "Forgetting: every domain's loss after each later domain was trained",
        ROUTER_CHART: "The router on unseen prompts",
    }
    found = {file: charts[file] if file in charts else _chart(library, file) for file in titles}
    present = [(title, data) for file, title in titles.items() if (data := found[file])]
    tables = _drawn(library, ROUTER_TABLES)
    page = Environment(autoescape=True).from_string(_TEMPLATE)
    html = page.render(
        manifest=library.manifest,
        charts=[(title, base64.b64encode(data).decode()) for title, data in present],
        router=tables.decode(errors="replace") if tables else "",
        samples=read_records(library, SAMPLES),
    )
    library.write_file(PAGE, html.encode())


def _picture(file: str, draw: Callable[[], Figure]) -> bytes | None:
    """The chart `file` as a PNG; None, with a warning, if it cannot be drawn: a report must not stop a training run."""
    import numpy as np

    try:
        with np.errstate(all="ignore"):
            return png(draw())
    except Exception as error:  # numbers that do not fit a chart, such as 1e308, raise errors of several types
        reason = printable(f"{type(error).__name__}: {error}")
        LOG.warning("%s cannot be drawn (%s): left out of the report", file, reason)
        return None


def _chart(library: Library, file: str) -> bytes | None:
    """A chart that was drawn earlier, or None. Only a PNG will do: whoever publishes the page publishes what it embeds."""
    data = _drawn(library, file)
    return data if data and data.startswith(_PNG) else None


def _drawn(library: Library, file: str) -> bytes | None:
    """A part of the report that was made earlier; None, with a warning, if it cannot be read."""
    try:
        return library.read_file(file)
    except (ValueError, OSError) as error:
        LOG.warning("%s: left out of the report", error)
        return None


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def _rounds(library: Library) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = [domain for domain in library.manifest.domains if domain.rounds][-_MOST_CELLS:]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, domain in enumerate(trained):
        colour, rounds = COLOURS[number % len(COLOURS)], domain.rounds
        kept = [r for r in rounds if r.kept and math.isfinite(r.loss_after)]
        xs, ys = [0, *(r.round for r in kept)], [rounds[0].loss_before, *(r.loss_after for r in kept)]
        axes.plot(xs, ys, marker="o", color=colour, label=domain.name)
        dropped = [r for r in rounds if not r.kept and math.isfinite(r.loss_after)]
        axes.plot([r.round for r in dropped], [r.loss_after for r in dropped], "x", color=colour)
        axes.plot(-0.15, domain.base_loss, marker="_", markersize=12, color=colour, clip_on=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_xlabel("round (0: with the stacks of earlier domains; the dash beside it: base alone; x: dropped)")
    axes.set_ylabel("validation loss per answer token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=1 + len(trained) // 10)
    return figure


def _forgetting(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    rows = rows[-_MOST_CELLS:]
    names = list(dict.fromkeys(name for row in rows for name in row["own_stacks"]))[-_MOST_CELLS:]
    figure = Figure(figsize=(2 + 2.4 * len(names), 1.2 + 0.6 * len(rows)), layout="constrained")
    kinds = {"own_stacks": "with the stacks it was trained with", "all_stacks": "with all stacks on"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, squeeze=False)[0], kinds.items(), strict=True):
        first = {name: next((row[kind][name] for row in rows if name in row[kind]), math.nan) for name in names}
        change = [[row[kind].get(name, math.nan) - first[name] for name in names] for row in rows]
        most = max((abs(value) for line in change for value in line if math.isfinite(value)), default=0) or 1.0
        axes.imshow(change, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        for y, row in enumerate(rows):
            for x, name in enumerate(names):
                if name in row[kind]:
                    axes.text(x, y, f"{row[kind][name]:.3f}", ha="center", va="center")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(rows)), [f"after {row['after']}" for row in rows])
        axes.set_title(title, fontsize="medium")
    return figure


def read_records(library: Library, file: str) -> list[dict[str, Any]]:
    """The records of a JSON or JSON Lines file of the report; [] if there is no such file.

    To be called inside `library.writing()`. A file that cannot be read is renamed to `<file>.broken` with a warning, because
    a broken report must not stop a training run.
    """
    try:
        data = library.read_file(file)
        if data is None:
            return []
        parts = data.splitlines() if file == SAMPLES else [data]
        values = [parse_json(part, non_finite=True) for part in parts]
        records = _RECORDS[file].validate_python(values if file == SAMPLES else values[0])
    except (ValueError, OSError) as error:
        reason = (
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error
        )
        path, aside = library.path / file, library.set_aside(file)
        LOG.warning("%s cannot be read (%s); it is now %s, and a new one is begun", path, printable(reason), aside)
        return []
    return [record.model_dump() for record in records]
