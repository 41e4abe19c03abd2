"""Shows the router's evaluation: tables on the terminal, and a bar chart."""

from __future__ import annotations

import io
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from axolotl_brainstacks.guarded import printable
from axolotl_brainstacks.library.report import png
from axolotl_brainstacks.router_training.evaluate import CHOICES

COLOURS = ("#999999", "#d55e00", "#56b4e9", "#e69f00", "#cc79a7", "#f0e442", "#0072b2", "#009e73")
# Short names of `CHOICES` and the regret, so that the table fits into 80 columns.
HEADINGS = ("base", "all on", "own", "trained", "soft", "hard", "router", "best", "regret")


# Columns of the tables in the report.
_PAGE = 110


class _Score(BaseModel):
    top1: float
    set_match: float
    bce: float


class _Gate(BaseModel):
    weights: str
    gate_threshold: float


class Shown(BaseModel):
    """The keys of `evaluation.json` that `show` reads, and `origin`, which `pipeline.made_before` compares."""

    origin: str
    score: dict[str, _Score]
    gate: _Gate
    settings: _Gate
    calibration: list[Any]
    prompts: dict[str, dict[str, int]]
    losses: dict[str, dict[str, float]]
    winners: dict[str, dict[str, int]]
    found_by: dict[str, dict[str, int]]
    leaves_out_own: dict[str, float]


def show(evaluation: dict[str, Any], console: Console) -> None:
    """Print the tables of an evaluation.

    Args:
        evaluation: content of `evaluation.json`.
        console: without markup, because names in the file are shown as they are.
    """
    evaluation = _printable(evaluation)
    for name, score in evaluation["score"].items():
        figures = f"accuracy {score['top1']:.1%}, set match {score['set_match']:.1%}, BCE {score['bce']:.3f}"
        console.print(f"Unseen prompts ({name}): {figures}")
    gate, prompts = evaluation["gate"], evaluation["prompts"]
    origin = "as configured"
    if evaluation["calibration"]:
        validation = sum(parts.get("validation", 0) for parts in prompts.values())
        configured = (gate["weights"], gate["gate_threshold"]) == ("soft", evaluation["settings"]["gate_threshold"])
        origin = (
            f"{'as configured, none' if configured else 'clearly the best'} of {len(evaluation['calibration'])} on "
            f"{validation} validation prompts{' being clearly better' if configured else ''}"
        )
    console.print(f"Gate: {gate['weights']} weights from probability {gate['gate_threshold']:g} on, {origin}")
    table = Table(
        title="Mean loss per answer token on unseen prompts", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("prompts of", overflow="fold", min_width=10)
    for heading in ("n", *HEADINGS, "unc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for source, row in evaluation["losses"].items():
        cells = [f"{row[choice]:.3f}" if choice in row else "-" for choice in (*CHOICES, "regret")]
        table.add_row(source, str(row.get("prompts", "-")), *cells, str(row.get("uncovered", "-")))
    console.print(table)
    console.print(
        "own: the stacks of the prompt's own domain; trained: those that were on when that was trained; soft, hard: the "
        f"router from {evaluation['settings']['gate_threshold']:g} on; router: with the gate above; best: the best set "
        "found; regret: router - best; unc.: claimed for no domain"
    )
    table = Table(title="Best sets of domains, over all held-out prompts", title_justify="left")
    table.add_column("prompts of", overflow="fold")
    table.add_column("n", justify="right")
    table.add_column("sets, most frequent first", overflow="fold")
    table.add_column("found by", overflow="fold")
    table.add_column("without own domain", justify="right")
    for source, wins in evaluation["winners"].items():
        total = sum(wins.values())
        shares = [
            ", ".join(f"{title} {count / max(total, 1):.0%}" for title, count in counts.items())
            for counts in (wins, evaluation["found_by"].get(source, {}))
        ]
        own = evaluation["leaves_out_own"]
        table.add_row(source, str(total), *shares, f"{own[source]:.0%}" if source in own else "-")
    console.print(table)


def tables(evaluation: dict[str, Any]) -> str:
    """What `show` prints, as text."""
    text = io.StringIO()
    show(evaluation, Console(file=text, width=_PAGE, color_system=None, markup=False, emoji=False))
    return text.getvalue()


def _printable(value: Any) -> Any:
    """`value` with every string in it made `printable`, because a library from elsewhere may hold terminal control codes."""
    if isinstance(value, dict):
        return {printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def chart(evaluation: dict[str, Any]) -> bytes:
    """A bar chart as PNG: for each source of prompts, the losses of all choices side by side."""
    from matplotlib.figure import Figure

    losses = evaluation["losses"]
    figure = Figure(figsize=(2.5 + 1.4 * len(losses), 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(CHOICES)
    for number, (choice, name, colour) in enumerate(zip(CHOICES, HEADINGS[:-1], COLOURS, strict=True)):
        offset = (number - (len(CHOICES) - 1) / 2) * width
        bars = [(x + offset, row[choice]) for x, row in enumerate(losses.values()) if choice in row]
        axes.bar([x for x, _ in bars], [y for _, y in bars], width, label=name, color=colour)
    axes.set_xticks(range(len(losses)), [source.removeprefix("_") for source in losses])
    axes.set_ylabel("mean loss per answer token")
    axes.set_title("Unseen prompts: what the router's choice costs", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return png(figure)
