"""The command line's commands. They translate options; what they do is done elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastddim import DDIM, __version__, checkpoints, images
from fastddim.check import whole
from fastddim.timesteps import SPACINGS

MOST_IMAGES = 10_000
"""What one picture holds: beyond it nobody sees one, and a 256x256 grid outgrows memory."""

# Markdown, so that the help's paragraphs are filled to the terminal's width.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def integer(text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be an integer, got {text!r}") from None


@app.callback(invoke_without_command=True)
def fastddim(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """DDIM sampling at the speed of the model."""
    if version:
        print(f"fastddim {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")


@app.command()
def sample(
    seeds: Annotated[
        str,
        typer.Option(
            metavar="SEEDS",
            help="The images to make: 7, 0-63 or 0-9,20,30-39, in this order. A seed is an "
            f"integer from 0 to 2^63-1; at most {MOST_IMAGES} of them.",
        ),
    ] = "0-63",
    steps: Annotated[
        int,
        typer.Option(
            metavar="S", help="The number of model calls per image, 1 to 1000.", parser=integer
        ),
    ] = 50,
    eta: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|hat",
            help="How much noise each step adds: 0 none (DDIM), 1 as DDPM does, other numbers "
            ">= 0 between and somewhat beyond; hat is DDPM's larger variance.",
        ),
    ] = "0",
    spacing: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"How the timesteps are chosen: {', '.join(SPACINGS)}."),
    ] = "uniform",
    batch_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=f"Images per model call, 1 to {images.LARGEST_BATCH}. Batches are always full, "
            "the last one padded.",
            parser=integer,
        ),
    ] = 16,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Where to sample: cpu, cuda, cuda:1, mps, ...",
            show_default="cuda if there is one, else cpu",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The model: a safetensors file of garment weights, or a folder with a diffusers "
            "UNet2DModel (config.json and diffusion_pytorch_model.safetensors, there or in "
            "unet/). Pickles are refused, and nothing is fetched.",
            show_default="the garment model that ships",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.png", help="The PNG to write or replace, in a folder that exists."
        ),
    ] = Path("garments.png"),
) -> None:
    """Draw images by seed, as one grid in a PNG.

    Image k is the same bit for bit whatever other seeds are asked for, given the same model,
    steps, eta, spacing, batch size and device.

    The last line says how many images a second were made, and what share of the time was spent
    outside the model.

    For example: fastddim sample --seeds 0-15 --steps 20 --eta 1 --out sixteen.png
    """
    wanted = parse_seeds(seeds)
    whole("batch-size", batch_size, low=1, high=images.LARGEST_BATCH)
    ddim = DDIM(steps, eta=number_or_name(eta), spacing=spacing)
    png = images.check_png(out)
    where = images.usable_device(device)
    model, shape = checkpoints.load(checkpoint)
    images.check_channels(shape[0])
    timed = images.Timed(model.to(where), where)
    images.warm_up(ddim, timed, shape, batch_size, where)
    batches = -(-len(wanted) // batch_size)
    with bar("sampling", batches * len(ddim.pairs)) as progress:
        timed.start()
        samples = images.by_seed(
            ddim, timed, wanted, shape, batch_size, device=where, progress=progress
        )
        pictures = torch.cat([images.to_uint8(x) for x in samples])
        summary = timed.summary(len(wanted))
    images.save_png(images.grid(pictures), png)
    print(f"{png}: {summary}")


def parse_seeds(text: str) -> list[int]:
    """ "0-9,20,30-39" → its seeds, in order."""
    allowed = f"such as 7, 0-63 or 0-9,20,30-39, each seed in [0, 2^63-1], got {text!r}"
    ranges: list[range] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})(?:-([0-9]{1,19}))?\s*", part)
        if match is None:
            raise ValueError(f"seeds must be {allowed}")
        first = int(match[1])
        last = int(match[2] or first)
        if last >= 2**63:
            raise ValueError(f"seeds must be {allowed}")
        if last < first:
            raise ValueError(f"seeds must be ranges that go up, {allowed}")
        ranges.append(range(first, last + 1))
    # Not len(), which ends at 2^63.
    if (count := sum(r.stop - r.start for r in ranges)) > MOST_IMAGES:
        raise ValueError(f"seeds must be at most {MOST_IMAGES} for one picture, got {count}")
    return [seed for r in ranges for seed in r]


def number_or_name(text: str) -> Any:
    """A number where it is one; what else η may be is not known here."""
    try:
        return float(text)
    except ValueError:
        return text


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[Iterable[Any]], Iterable[Any]]]:
    """A wrapper of iterables, all counted by one bar on stderr; none where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=total)

        def counted(steps: Iterable[Any]) -> Iterator[Any]:
            for step in steps:
                yield step
                progress.advance(task)

        yield counted
