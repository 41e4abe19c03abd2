"""The click commands. Each imports what it needs when it runs, because `axolotl --help` imports this module."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from axolotl_brainstacks.guarded import printable, shortened

if TYPE_CHECKING:
    from axolotl_brainstacks.library import Library


# The most files of a list that are printed.
_SHOWN = 10
_FIT_AGAIN = " Fit the router again: axolotl brainstacks-router CONFIG"


class _OneLineErrors(click.Command):
    """A command that reports a user's mistake without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            # A message may contain text from a library, so control characters are escaped; line breaks are our own.
            raise click.ClickException("\n".join(map(printable, str(error).splitlines()))) from error


class _Commands(_OneLineErrors, click.Group):
    """A group whose commands all report mistakes so."""


def _open(ctx: click.Context) -> "Library":
    from axolotl_brainstacks.library import Library

    return Library.open(ctx.obj)


@click.group(cls=_Commands)
@click.argument("lib", type=click.Path(file_okay=False, path_type=Path))
@click.pass_context
def library(ctx: click.Context, lib: Path) -> None:
    """List, verify or change a library of stacks.

    LIB is its folder, which `brainstacks.library` names.
    """
    ctx.obj = lib


@library.command("list")
@click.pass_context
def list_domains(ctx: click.Context) -> None:
    """List the domains and their state.

    Loss: validation loss of the base model -> after the last round that was kept. Capacity: smallest share of a
    projection's output dimensions that other domains left free when the domain was trained. Also prints the SHA-256 of
    the manifest.
    """
    from rich.console import Console
    from rich.table import Table

    opened = _open(ctx)
    manifest = opened.manifest
    kept = f", stacks in {manifest.frozen_dtype}" if manifest.frozen_dtype else ""
    click.echo(printable(f"{ctx.obj} on {manifest.base.title}{kept}"))
    table = Table(box=None, pad_edge=False)  # without lines, so that the longest row fits into 80 columns
    table.add_column("domain", overflow="fold")
    for heading in ("done", "rounds", "stacks", "loss", "capacity", "MB", "router"):
        table.add_column(heading, justify="right", no_wrap=True)
    # Counted once for all domains, of which a library may have thousands.
    counts = Counter(stack.domain for stack in manifest.stacks)
    sizes = manifest.bytes_by_domain()
    known = set(manifest.router.domains if manifest.router else [])
    for domain in manifest.domains:
        constraint = domain.constraint or domain.nullspace
        table.add_row(
            domain.name,
            "yes" if domain.done else "replacing" if domain.before else "no",
            str(len(domain.rounds)),
            str(counts[domain.name]),
            "imported" if math.isnan(domain.base_loss) else f"{_short(domain.base_loss)} -> {_short(domain.last_loss)}",
            f"{constraint.capacity_left:.0%}" if constraint else "-",
            f"{sizes[domain.name] / 1e6:.1f}",
            ("stale" if manifest.router and manifest.router.stale else "fitted") if domain.name in known else "none",
        )
    Console(markup=False, emoji=False).print(table)
    click.echo(f"SHA-256 of the manifest: {opened.sha256}")


@library.command()
@click.option("--against", metavar="HASH", help="SHA-256 that the manifest must have.")
@click.pass_context
def verify(ctx: click.Context, against: str | None) -> None:
    """Check every file against its SHA-256, and list the files that have none.

    The hashes are in the manifest, whose own SHA-256 is printed: note it where nobody can change it, and give it with
    --against. The exit status is 1 when anything is wrong.
    """
    from axolotl_brainstacks.library import Library

    if against is not None and not re.fullmatch("[0-9a-f]{64}", against):
        raise ValueError(f"--against is {against!r}: give the 64 digits that `list` and `verify` print")
    opened = Library.open(ctx.obj, against)
    problems = opened.verify()
    for line in problems:
        click.echo(printable(line))
    unlisted = opened.unlisted()
    for title, files in (
        ("Not covered, and not read by any command", [file for file in opened.not_covered() if file not in unlisted]),
        ("Not covered in this older library, and listed by the next command that writes", unlisted),
        ("Moved aside by earlier writers, to be deleted by hand", [str(path) for path in opened.leftovers()]),
    ):
        if files:
            more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
            click.echo(f"{title}: {', '.join(map(shortened, files[:_SHOWN]))}{more}")
    pinned = "as required" if against else "not compared with any: see --against"
    click.echo(f"SHA-256 of the manifest: {opened.sha256} ({pinned})")
    if problems:
        click.echo(
            f"{len(problems)} problem{'' if len(problems) == 1 else 's'}: restore the library from a copy, or do what each line "
            "says; then verify again"
        )
        ctx.exit(1)
    click.echo(f"{len(opened.manifest.stacks)} stacks, {len(opened.manifest.covered)} files: clean")


@library.command()
@click.argument("domain")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def remove(ctx: click.Context, domain: str, yes: bool) -> None:
    """Remove DOMAIN and its stacks, after saying what else changes and asking."""
    with _open(ctx).writing() as opened:
        manifest = opened.manifest
        stacks = [stack.name for stack in manifest.stacks_of(domain)]
        click.echo(f"To go: {_counted(stacks)}, {manifest.bytes_of(domain):,} bytes in all", err=True)
        for name in manifest.dependents(domain):
            entry = manifest.domain(name)
            gone = [stack for stack in entry.context if stack in stacks]
            click.echo(
                f"{name} was trained with {', '.join(gone)} on: its loss with its own stacks, {_loss(entry.last_loss)} "
                "until now, will change",
                err=True,
            )
        if refitted := [name for name in manifest.outdated_protections(domain) if name != domain]:
            click.echo(f"The next training run fits the columns again that protect {', '.join(refitted)}", err=True)
        if manifest.router:
            click.echo("The router will be stale", err=True)
        if not yes:
            click.confirm(f"Remove {domain} and its stacks ({', '.join(stacks) or 'none'}) from {ctx.obj}?", abort=True)
        opened.remove_domain(domain)
        stale = opened.manifest.router is not None
    click.echo(f"Removed {domain}." + (_FIT_AGAIN if stale else ""))


def _counted(stacks: list[str]) -> str:
    names = f" ({', '.join(stacks)})" if stacks else ""
    return f"{len(stacks)} stack{'' if len(stacks) == 1 else 's'}{names}"


def _short(loss: float) -> str:
    return f"{loss:.3f}" if abs(loss) < 1e6 else f"{loss:.3g}"


def _loss(loss: float) -> str:
    return "never measured" if math.isnan(loss) else f"{loss:.4f}"


@library.command()
@click.argument("domain")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--undo", is_flag=True, help="Put the domain's old stacks back, without those trained since.")
@click.pass_context
def replace(ctx: click.Context, domain: str, yes: bool, undo: bool) -> None:
    """Let the next `axolotl train` train DOMAIN again, in its place.

    Its old stacks answer until the new ones are complete.
    """
    from axolotl_brainstacks.library import replacement

    with _open(ctx).writing() as opened:
        manifest = opened.manifest
        new = [stack.name for stack in manifest.stacks_of(domain) if stack.name not in manifest.domain(domain).replaced]
        if undo:
            if manifest.domain(domain).before and new and not yes:
                click.confirm(f"Drop the new {_counted(new)} of {domain}?", abort=True)
            opened.undo_replacement(domain)
            click.echo(
                f"{domain} answers as it did. The columns that protect it are fitted again by the next `axolotl train`."
            )
            return
        replacement.check(manifest, domain)
        if dependents := manifest.dependents(domain):
            click.echo(f"Trained on top of its stacks ({', '.join(new)}): {', '.join(dependents)}", err=True)
            click.echo("With the new stacks in their place, the losses of these domains will change", err=True)
        if not yes:
            click.confirm(f"Train {domain} again ({_counted(new)} to be replaced)?", abort=True)
        opened.replace_domain(domain)
    click.echo(f"{domain} is to be trained again: axolotl train CONFIG. Until then its old stacks answer.")


@library.command()
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--domain", "only", multiple=True, metavar="NAME", help="Join this domain alone; may be repeated.")
@click.option("--as", "renamed", multiple=True, metavar="NEW=OLD", help="Join OLD under another name; may be repeated.")
@click.pass_context
def join(ctx: click.Context, other: Path, only: tuple[str, ...], renamed: tuple[str, ...]) -> None:
    """Copy the finished domains of library OTHER, which was trained on the same base model, into LIB.

    A domain that was trained on top of another one's stacks cannot be joined: train with `context: isolated`.
    """
    from axolotl_brainstacks.library import Library
    from axolotl_brainstacks.library.joining import joined_names

    names = {}
    for pair in renamed:
        new, equals, old = pair.partition("=")
        if not (new and equals and old) or old in names:
            raise ValueError(f"--as is {pair!r}: give each OLD name once, as NEW=OLD")
        names[old] = new
    source = Library.open(other, sha256="")  # the pin, if any, is that of LIB
    with _open(ctx).writing() as opened:
        stacks = opened.join(source, joined := joined_names(opened, source, only, names))
        stale = opened.manifest.router is not None
    click.echo(
        f"Joined {', '.join(joined.values())} from {other}: {_counted([stack.name for stack in stacks])}."
        + (_FIT_AGAIN if stale else "")
    )


@click.command(
    cls=_OneLineErrors,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--launcher",
    type=click.Choice(["accelerate", "torchrun", "python"]),
    default="python",
    show_default=True,
    help="Program that starts the processes; its own arguments follow after `--`.",
)
@click.pass_context
def router(ctx: click.Context, config: str, launcher: str) -> None:
    """Make and evaluate the router of a library.

    Measures which domains' stacks help with which held-out prompts; fits, calibrates and evaluates the router of CONFIG's
    library.
    """
    if launcher == "python":
        if ctx.args:
            raise click.UsageError(f"No such option or argument: {' '.join(ctx.args)}; settings belong into {config}")
        from axolotl_brainstacks.router_training.command import run

        run(config)
        return
    # The launcher starts the module in several processes, as Axolotl's own commands do with theirs.
    import subprocess

    from axolotl.cli.main import LAUNCHER_COMMAND_MAPPING

    worker = [
        *LAUNCHER_COMMAND_MAPPING[launcher],
        *ctx.args,
        "-m",
        "axolotl_brainstacks.router_training.command",
        config,
    ]
    ctx.exit(subprocess.run(worker).returncode)


@library.command()
@click.pass_context
def report(ctx: click.Context) -> None:
    """Write the report page and its charts again, into LIB/report."""
    from axolotl_brainstacks.library.report import PAGE, write_report

    with _open(ctx).writing() as opened:
        write_report(opened)
    click.echo(str(opened.path / PAGE))


@library.command("import")
@click.argument("name")
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base-model", help="Folder or name of the base model, if not the one in adapter_config.json.")
@click.pass_context
def import_adapter(ctx: click.Context, name: str, adapter: Path, base_model: str | None) -> None:
    """Add the PEFT LoRA in folder ADAPTER as domain NAME.

    A library that does not exist yet is created. Before the router can choose the domain, it needs `datasets:` in the YAML.
    """
    from axolotl_brainstacks.library.lora_import import import_lora

    stack = import_lora(ctx.obj, name, adapter, base_model)
    click.echo(f"Imported {adapter} as {stack.name}. Fit the router: axolotl brainstacks-router CONFIG")
