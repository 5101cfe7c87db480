"""The commands that draw: sample, interpolate, sequence."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastddim.check import whole
from fastddim.cli import bars, options
from fastddim.cli.options import (
    BatchSize,
    Eta,
    Labels,
    Machine,
    Network,
    Out,
    Spacing,
    Steps,
    columns_option,
    counted,
    flag,
    seeds_option,
)

if TYPE_CHECKING:
    from fastddim.cli.network import Asked
    from fastddim.loop.sampler import DDIM

MANY_CALLS = 20
"""From here on the model is prepared by a call of its own, which no rate should hold."""

# What imports torch is imported when a command runs, and not for its help.


def sample(
    machine: Machine,
    network: Network,
    seeds: Annotated[str, seeds_option("The images to make")] = "0-63",
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    labels: Labels = False,
    out: Out = Path("garments.png"),
) -> None:
    """Draw images by seed, as one grid in a PNG.

    Image k is the same bit for bit whatever other seeds are asked for, given the same model,
    steps, eta, spacing, batch size and device. The PNG's metadata holds all of these.

    The last line says how many images a second were made, and what share of the time was spent
    outside the model.

    For example: fastddim sample --seeds 0-15 --steps 20 --eta 1 --out sixteen.png
    """
    wanted = options.parse_seeds(seeds)
    noise = options.parse_eta(eta)
    options.check_common(batch_size, spacing)
    with bars.spinner("loading", machine.quiet):
        import torch

        from fastddim.cli.network import prepare
        from fastddim.tools import draw, images, sheet, timing

        png = images.check_png(out)
        asked = prepare(machine, network)
        images.check_channels(asked.shape[0])
        ddim = asked.ddim(steps, eta=noise, spacing=spacing)
        timed = timing.Timed(asked.model, asked.device)
        told = asked.options(batch_size)
        total = calls(ddim, len(wanted), batch_size)
        # One more call of the model would be a large part of the time of few.
        first = timed if total >= MANY_CALLS else lambda x, t, **_: torch.zeros_like(x)
        timing.warm_up(ddim, first, asked.shape, batch_size, asked.device, **told)
    with bars.bar("sampling", total, machine.quiet) as progress:
        timed.start()
        samples = draw.by_seed(
            ddim,
            timed,
            wanted,
            asked.shape,
            batch_size,
            device=asked.device,
            progress=progress,
            **told,
        )
        pictures, odd = images.drawn(samples)
        summary = timed.summary(len(wanted))
    replaced = sheet.save(
        pictures,
        png,
        recipe=recipe("sample", ddim, asked, network, seeds, batch_size),
        captions=[str(seed) for seed in wanted] if labels else (),
    )
    if not machine.quiet:
        print(f"{written(png, replaced)}: {summary}")
    say_not_finite([wanted[place] for place in odd])


def written(path: Path, replaced: bool) -> str:
    """A file that was written, with a word about another that had its name."""
    return f"{path} (replaced)" if replaced else f"{path}"


def say_not_finite(seeds: Sequence[int], retried: bool = False) -> None:
    """Names the images that hold NaN or infinity, and ends with status 3 where there are some.

    Args:
        seeds: of each image, perhaps of several the same.
        retried: whoever started this would start it again for that, in vain: the status is 0.
    """
    from fastddim.tools.folder import holding

    if said := holding(seeds):
        print(f"fastddim: {said}", file=sys.stderr)
        if not retried:
            raise typer.Exit(3)


def interpolate(
    machine: Machine,
    network: Network,
    seeds: Annotated[
        str,
        seeds_option(
            "The two ends of each row",
            "0-7 for the rows from 0 to 1, 2 to 3, 4 to 5 and 6 to 7; or 5,9,20-29",
        ),
    ] = "0-7",
    columns: Annotated[
        int, columns_option("Images in a row, both ends included; at least 2.")
    ] = 11,
    steps: Steps = 50,
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    labels: Labels = False,
    out: Out = Path("interpolation.png"),
) -> None:
    """Draw the way from one image to another, one row for each pair of seeds, in a PNG.

    As in figure 6 of the DDIM paper (Song et al. 2021), noise is interpolated and not images:
    each column begins with the noise at its share of the way along the sphere between the noises
    of the two seeds. The first and the last image of a row are, bit for bit, those that fastddim
    sample draws for its seeds with the same options.

    There is no eta: only where it is 0 does the noise at the start alone decide the image. Noise
    added on the way would make neighbours differ by more than their place in the row.

    For example: fastddim interpolate --seeds 3,8,5,5 --columns 7 --steps 20
    """
    wanted = options.parse_seeds(seeds)
    if len(wanted) % 2:
        raise ValueError(f"seeds must be pairs, an even number of them, got {len(wanted)}")
    whole("columns", columns, low=2)
    rows = len(wanted) // 2
    options.check_cells("pairs of seeds x columns", rows, columns)
    options.check_common(batch_size, spacing)
    with bars.spinner("loading", machine.quiet):
        from fastddim.cli.network import prepare
        from fastddim.tools import draw, images, sheet

        png = images.check_png(out)
        asked = prepare(machine, network)
        images.check_channels(asked.shape[0])
        ddim = asked.ddim(steps, spacing=spacing)
    total = calls(ddim, rows * columns, batch_size)
    with bars.bar("interpolating", total, machine.quiet) as progress:
        between = draw.interpolations(
            ddim,
            asked.model,
            wanted,
            asked.shape,
            batch_size,
            columns,
            device=asked.device,
            progress=progress,
            **asked.options(rows * columns),
        )
    ends = zip(wanted[0::2], wanted[1::2], strict=True)
    pictures, odd = images.drawn([between.flatten(0, 1)])
    replaced = sheet.save(
        pictures,
        png,
        columns=columns,
        recipe=recipe("interpolate", ddim, asked, network, seeds, batch_size, columns=columns),
        rows=[f"{a}-{b}" for a, b in ends] if labels else (),
        heads=[f"{i / (columns - 1):.2g}" for i in range(columns)] if labels else (),
    )
    if not machine.quiet:
        print(f"{written(png, replaced)}: {counted(rows, 'row')} of {columns} images")
    nearer = [2 * (place // columns) + (2 * (place % columns) >= columns) for place in odd]
    say_not_finite([wanted[place] for place in nearer])


def sequence(
    machine: Machine,
    network: Network,
    seeds: Annotated[str, seeds_option("The images to follow, one row each")] = "0-7",
    columns: Annotated[
        int | None,
        columns_option(
            "How many steps to show, 1 to S, evenly chosen, the last always among them.",
            show_default="10, or S where that is less",
        ),
    ] = None,
    state: Annotated[
        bool, flag("--state", "Show x_t, the noisy image itself, instead of x0.")
    ] = False,
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    labels: Labels = False,
    out: Out = Path("sequence.png"),
) -> None:
    """Draw how images come about: the x0 predicted along the way, one row a seed, in a PNG.

    At each step the model's answer implies a clean image, x0, blurred at first. The last column
    is the image that fastddim sample draws with the same options, bit for bit.

    The last line names the timestep t of each column.

    For example: fastddim sequence --seeds 0-3 --columns 5 --steps 20 --eta 1
    """
    wanted = options.parse_seeds(seeds)
    noise = options.parse_eta(eta)
    options.check_common(batch_size, spacing)
    with bars.spinner("loading", machine.quiet):
        from fastddim.cli.network import prepare
        from fastddim.tools import draw, images, sheet

        png = images.check_png(out)
        asked = prepare(machine, network)
        images.check_channels(asked.shape[0])
        ddim = asked.ddim(steps, eta=noise, spacing=spacing)
        n = min(10, len(ddim.pairs)) if columns is None else columns
        kept = [ddim.pairs[row] for row in draw.kept_rows(ddim, n)]
        options.check_cells("seeds x columns", len(wanted), n)
    with bars.bar("sampling", calls(ddim, len(wanted), batch_size), machine.quiet) as progress:
        batches = draw.sequences(
            ddim,
            asked.model,
            wanted,
            asked.shape,
            batch_size,
            n,
            state=state,
            device=asked.device,
            progress=progress,
            **asked.options(batch_size),
        )
        pictures, odd = images.drawn(x.flatten(0, 1) for x in batches)
    levels = [s for _, s in kept] if state else [t for t, _ in kept]
    replaced = sheet.save(
        pictures,
        png,
        columns=n,
        recipe=recipe("sequence", ddim, asked, network, seeds, batch_size, columns=n, state=state),
        rows=[str(seed) for seed in wanted] if labels else (),
        heads=[str(level) if level >= 0 else "" for level in levels] if labels else (),
    )
    if state:
        said = [f"t = {level}" if level >= 0 else "the image" for level in levels]
        shown = "x_t at " + ", ".join(said)
    else:
        shown = "x0 predicted at t = " + ", ".join(map(str, levels))
    if not machine.quiet:
        print(f"{written(png, replaced)}: {shown}")
    say_not_finite([wanted[place // n] for place in odd])


def calls(ddim: "DDIM", n: int, batch_size: int) -> int:
    """How often the model is asked for ``n`` samples."""
    return -(-n // batch_size) * len(ddim.pairs)


def recipe(
    command: str,
    ddim: "DDIM",
    asked: "Asked",
    network: Network,
    seeds: str,
    batch_size: int,
    **rest: Any,
) -> dict[str, Any]:
    """What a picture was made from, as plain values for its metadata."""
    from fastddim import __version__
    from fastddim.tools import provenance

    return {
        "command": command,
        "seeds": "".join(seeds.split()),
        "steps": len(ddim.pairs),
        "eta": ddim.eta,
        "spacing": str(ddim.spacing),
        "batch_size": batch_size,
        **rest,
        "model": {name: str(value) for name, value in network.given.items()},
        "prediction": ddim.prediction,
        "schedule": f"{ddim.schedule.name}, T = {len(ddim.schedule)}",
        "device": provenance.machine(asked.device),
        "versions": {"fastddim": __version__, **provenance.versions("torch", "triton", "numba")},
    }
