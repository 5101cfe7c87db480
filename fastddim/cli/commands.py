"""The commands of ``fastddim`` by name."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastddim.cli import draw, generate, info, measure, profile, serve, tune
from fastddim.cli.options import grouped
from fastddim.cli.values import one_of


class Commands(TyperGroup):
    """The group of commands. An unknown name raises an error that suggests the nearest command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            one_of("command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


# Markdown mode, because it wraps the help's paragraphs at the terminal's width.
app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def fastddim(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """DDIM sampling at the speed of the model."""
    if version:
        from fastddim import __version__

        print(f"fastddim {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")


for command in (
    draw.sample,
    draw.interpolate,
    draw.sequence,
    measure.reconstruct,
    generate.generate,
    measure.evaluate,
    profile.profile,
    tune.tune,
    serve.serve_bench,
    info.info,
):
    app.command(command.__name__.replace("_", "-"))(grouped(command))
