"""The router's evaluation for reading: tables on the terminal, a bar chart."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from axolotl_brainstacks.report import png
from axolotl_brainstacks.routing.evaluate import CHOICES

COLOURS = ("#999999", "#d55e00", "#56b4e9", "#0072b2", "#009e73")


def show(evaluation: dict[str, Any], console: Console) -> None:
    """Print the tables of `evaluation.json`; `own` is the domain that the prompt was written for, alone."""
    for name, score in evaluation["score"].items():
        figures = f"accuracy {score['top1']:.1%}, set match {score['set_match']:.1%}, BCE {score['bce']:.3f}"
        console.print(f"Unseen prompts ({name}): {figures}")
    table = Table(title="Mean loss per answer token on unseen prompts", title_justify="left")
    table.add_column("prompts of", overflow="fold", min_width=10)
    for heading in ("n", "base", "all on", "own", "router", "best", "regret", "uncovered"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source, row in evaluation["losses"].items():
        cells = [f"{row[choice]:.3f}" if choice in row else "-" for choice in (*CHOICES, "regret")]
        table.add_row(source, str(row["prompts"]), *cells, str(row["uncovered"]))
    console.print(table)
    table = Table(title="How often which set of domains was best", title_justify="left")
    table.add_column("prompts of", overflow="fold")
    table.add_column("sets, most frequent first", overflow="fold")
    for source, wins in evaluation["winners"].items():
        total = sum(wins.values())
        table.add_row(source, ", ".join(f"{title} {count / total:.0%}" for title, count in wins.items()))
    console.print(table)


def chart(evaluation: dict[str, Any]) -> bytes:
    """A PNG: the losses of every choice, side by side for each source of prompts."""
    from matplotlib.figure import Figure

    losses = evaluation["losses"]
    figure = Figure(figsize=(2.5 + 1.4 * len(losses), 4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(CHOICES)
    for number, (choice, colour) in enumerate(zip(CHOICES, COLOURS, strict=True)):
        offset = (number - (len(CHOICES) - 1) / 2) * width
        bars = [(x + offset, row[choice]) for x, row in enumerate(losses.values()) if choice in row]
        axes.bar([x for x, _ in bars], [y for _, y in bars], width, label=choice.replace("_", " "), color=colour)
    axes.set_xticks(range(len(losses)), [source.removeprefix("_") for source in losses])
    axes.set_ylabel("mean loss per answer token")
    axes.set_title("Unseen prompts: what the router's choice costs", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(CHOICES), frameon=False)
    return png(figure)
