"""The click commands. Nothing heavy is imported before a command runs: `axolotl --help` imports this module."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from axolotl_brainstacks.library import Library


class _OneLineErrors(click.Command):
    """Ends user errors with one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error


class _Commands(_OneLineErrors, click.Group):
    """A group whose commands do so."""


def _open(ctx: click.Context) -> "Library":
    from axolotl_brainstacks.library import Library

    return Library.open(ctx.obj)


@click.group(cls=_Commands, short_help="list, verify, prune or extend a library of brainstacks")
@click.argument("lib", type=click.Path(file_okay=False, path_type=Path))
@click.pass_context
def library(ctx: click.Context, lib: Path) -> None:
    """Look after LIB, the folder that `brainstacks.library` names."""
    ctx.obj = lib


@library.command("list")
@click.pass_context
def list_domains(ctx: click.Context) -> None:
    """Show every domain's state.

    Loss: of the base, then after the last kept round. Capacity: the smallest share of output dimensions left.
    """
    from rich.console import Console
    from rich.table import Table

    manifest = _open(ctx).manifest
    kept = f", stacks in {manifest.frozen_dtype}" if manifest.frozen_dtype else ""
    table = Table(title=f"{ctx.obj} on {manifest.base.title}{kept}", title_justify="left", pad_edge=False)
    table.add_column("domain", overflow="fold")
    for heading in ("done", "rounds", "stacks", "loss", "capacity", "MB", "router"):
        table.add_column(heading, justify="right", no_wrap=True)
    for domain in manifest.domains:
        stacks = [stack for stack in manifest.stacks if stack.domain == domain.name]
        records = [record for stack in stacks for record in stack.files.values()]
        if domain.nullspace:
            records.append(domain.nullspace.record)
        routed = manifest.router is not None and domain.name in manifest.router.domains
        table.add_row(
            domain.name,
            "yes" if domain.done else "no",
            str(len(domain.rounds)),
            str(len(stacks)),
            "imported" if math.isnan(domain.base_loss) else f"{domain.base_loss:.3f} -> {domain.last_loss:.3f}",
            f"{domain.nullspace.capacity_left:.0%}" if domain.nullspace else "-",
            f"{sum(record.bytes for record in records) / 1e6:.1f}",
            ("stale" if manifest.router and manifest.router.stale else "fitted") if routed else "none",
        )
    Console().print(table)


@library.command()
@click.pass_context
def verify(ctx: click.Context) -> None:
    """Check every file against its SHA-256.

    Exit status 1 when anything is wrong.
    """
    opened = _open(ctx)
    if problems := opened.verify():
        for problem in problems:
            click.echo(problem)
        ctx.exit(1)
    click.echo(f"{len(opened.manifest.stacks)} stacks, {len(opened.manifest.files)} files: clean")


@library.command()
@click.argument("domain")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def remove(ctx: click.Context, domain: str, yes: bool) -> None:
    """Remove DOMAIN with its stacks and its null space."""
    with _open(ctx).writing() as opened:
        stacks = [stack.name for stack in opened.manifest.stacks if stack.domain == domain]
        if dependents := opened.manifest.dependents(domain):
            click.echo(f"Trained with these stacks on, their losses will change: {', '.join(dependents)}", err=True)
        if not yes:
            click.confirm(f"Remove {domain} and its stacks ({', '.join(stacks) or 'none'}) from {ctx.obj}?", abort=True)
        opened.remove_domain(domain)
        stale = opened.manifest.router is not None
    click.echo(f"Removed {domain}." + (" Fit the router again: axolotl brainstacks-router CONFIG" if stale else ""))


@click.command(
    cls=_OneLineErrors,
    short_help="discover, fit and evaluate the router of a library of brainstacks",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--launcher",
    type=click.Choice(["accelerate", "torchrun", "python"]),
    default="python",
    show_default=True,
    help="What starts the processes; its own arguments follow after `--`.",
)
@click.pass_context
def router(ctx: click.Context, config: str, launcher: str) -> None:
    """Measure which stacks answer which prompts best, and fit the router of the library that CONFIG names."""
    if launcher == "python":
        if ctx.args:
            raise click.UsageError(f"No such option or argument: {' '.join(ctx.args)}; settings belong into {config}")
        from axolotl_brainstacks.routing.command import run

        run(config)
        return
    import subprocess

    from axolotl.cli.main import LAUNCHER_COMMAND_MAPPING

    worker = [*LAUNCHER_COMMAND_MAPPING[launcher], *ctx.args, "-m", "axolotl_brainstacks.routing.command", config]
    ctx.exit(subprocess.run(worker).returncode)


@library.command()
@click.pass_context
def report(ctx: click.Context) -> None:
    """Draw the library's figures anew, into LIB/report."""
    from axolotl_brainstacks.report import PAGE, write_report

    with _open(ctx).writing() as opened:
        write_report(opened)
    click.echo(str(opened.path / PAGE))


@library.command("import")
@click.argument("name")
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base-model", help="Where the adapter's base model is, if not where its adapter_config.json says.")
@click.pass_context
def import_adapter(ctx: click.Context, name: str, adapter: Path, base_model: str | None) -> None:
    """Add the PEFT LoRA in folder ADAPTER as domain NAME.

    Makes the library if there is none. To be routed to, the domain needs `datasets:` in the YAML.
    """
    from axolotl_brainstacks.lora_import import import_lora

    stack = import_lora(ctx.obj, name, adapter, base_model)
    click.echo(f"Imported {adapter} as {stack.name}. Fit the router: axolotl brainstacks-router CONFIG")
