"""The commands ``sample``, ``interpolate`` and ``sequence``, each of which draws one picture."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastddim.check import whole
from fastddim.cli import bars, values
from fastddim.cli.options import (
    BatchSize,
    Eta,
    Labels,
    Machine,
    Network,
    Order,
    Out,
    Spacing,
    Steps,
    columns_option,
    flag,
    seeds_option,
)
from fastddim.cli.values import counted
from fastddim.tools.seeds import check_pairs

if TYPE_CHECKING:
    from fastddim.cli.network import Prepared
    from fastddim.loop.sampler import DDIM

# Modules that import torch are imported inside the commands: ``--help`` must not wait for torch.


def sample(
    machine: Machine,
    network: Network,
    seeds: Annotated[str, seeds_option("The images to make")] = "0-63",
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    order: Order = 1,
    batch_size: BatchSize = 16,
    labels: Labels = False,
    out: Out = Path("garments.png"),
) -> None:
    """Draw images by seed, as one grid in a PNG.

    With the same model, steps, eta, spacing, order, batch size and device, a seed gives the same
    image bit for bit, whatever the other seeds. The PNG's metadata holds all of these settings.

    The last line gives the images per second and the share of the time spent outside the model.

    For example: fastddim sample --seeds 0-15 --steps 20 --eta 1 --out sixteen.png
    """
    wanted = values.parse_seeds(seeds)
    noise = values.parse_eta(eta)
    values.check_common(batch_size, spacing, order)
    with bars.spinner("loading", machine.quiet):
        from fastddim.cli.network import prepare
        from fastddim.tools import draw, images, sheet, timing

        png = images.check_png(out)
        prepared = prepare(machine, network)
        images.check_channels(prepared.shape[0])
        ddim = prepared.ddim(steps, eta=noise, spacing=spacing, order=order)
        timed = timing.Timed(prepared.model, prepared.device)
        model_options = prepared.options(batch_size)
        total = draw.model_calls([ddim], len(wanted), batch_size)
        timing.warm_up(
            ddim,
            timed,
            prepared.shape,
            batch_size,
            prepared.device,
            calls=total,
            **model_options,
        )
    with bars.bar("sampling", total, machine.quiet) as progress:
        timed.start()
        samples = draw.by_seed(
            ddim,
            timed,
            wanted,
            prepared.shape,
            batch_size,
            device=prepared.device,
            progress=progress,
            **model_options,
        )
        pictures, odd = images.drawn(samples)
        summary = timed.summary(len(wanted))
    replaced = sheet.save(
        pictures,
        png,
        recipe=recipe("sample", ddim, prepared, network, seeds, batch_size),
        captions=[str(seed) for seed in wanted] if labels else (),
    )
    if not machine.quiet:
        print(f"{written(png, replaced)}: {summary}")
    say_not_finite([wanted[place] for place in odd])


def written(path: Path, replaced: bool) -> str:
    """Returns ``path`` as text, with a note if the file replaced another."""
    return f"{path} (replaced)" if replaced else f"{path}"


def say_not_finite(seeds: Sequence[int], retried: bool = False) -> None:
    """Names the images that hold NaN or infinity on stderr, and exits with status 3 if any do.

    Args:
        seeds: the seed of each such image; a seed may repeat.
        retried: the launcher would start the command again for a status other than 0, in vain.
            The status is then 0.
    """
    from fastddim.tools.folder import holding

    if warning := holding(seeds):
        print(f"fastddim: {warning}", file=sys.stderr)
        if not retried:
            raise typer.Exit(3)


def interpolate(
    machine: Machine,
    network: Network,
    seeds: Annotated[
        str,
        seeds_option(
            "The two ends of each row",
            "0-7 for the rows 0 to 1, 2 to 3, 4 to 5 and 6 to 7; or 5,9,20-29",
        ),
    ] = "0-7",
    columns: Annotated[
        int, columns_option("The number of images in a row, both ends included; at least 2.")
    ] = 11,
    steps: Steps = 50,
    spacing: Spacing = "uniform",
    order: Order = 1,
    batch_size: BatchSize = 16,
    labels: Labels = False,
    out: Out = Path("interpolation.png"),
) -> None:
    """Interpolate between the images of two seeds, one row for each pair, in a PNG.

    As in figure 6 of the DDIM paper (Song et al. 2021), the noise x_T is interpolated and not the
    images: column i of n starts from the spherical interpolation (slerp) of the two seeds' noise
    at i/(n-1). The first and the last image of a row equal, bit for bit, the images that fastddim
    sample draws for these seeds with the same options.

    The command has no --eta and uses eta = 0: only then does x_T alone determine the image. Noise
    added at each step would make neighbours differ by more than their place in the row.

    For example: fastddim interpolate --seeds 3,8,5,5 --columns 7 --steps 20
    """
    wanted = values.parse_seeds(seeds)
    check_pairs(wanted)
    whole("columns", columns, low=2)
    rows = len(wanted) // 2
    values.check_cells("pairs of seeds x columns", rows, columns)
    values.check_common(batch_size, spacing, order)
    with bars.spinner("loading", machine.quiet):
        from fastddim.cli.network import prepare
        from fastddim.tools import draw, images, sheet

        png = images.check_png(out)
        prepared = prepare(machine, network)
        images.check_channels(prepared.shape[0])
        ddim = prepared.ddim(steps, spacing=spacing, order=order)
    total = draw.model_calls([ddim], rows * columns, batch_size)
    with bars.bar("interpolating", total, machine.quiet) as progress:
        between = draw.interpolations(
            ddim,
            prepared.model,
            wanted,
            prepared.shape,
            batch_size,
            columns,
            device=prepared.device,
            progress=progress,
            **prepared.options(rows * columns),
        )
    ends = zip(wanted[0::2], wanted[1::2], strict=True)
    pictures, odd = images.drawn([between.flatten(0, 1)])
    replaced = sheet.save(
        pictures,
        png,
        columns=columns,
        recipe=recipe("interpolate", ddim, prepared, network, seeds, batch_size, columns=columns),
        rows=[f"{a}-{b}" for a, b in ends] if labels else (),
        heads=[f"{i / (columns - 1):.2g}" for i in range(columns)] if labels else (),
    )
    if not machine.quiet:
        print(f"{written(png, replaced)}: {counted(rows, 'row')} of {columns} images")
    say_not_finite(draw.nearer_seeds(wanted, columns, odd))


def sequence(
    machine: Machine,
    network: Network,
    seeds: Annotated[str, seeds_option("The images to follow, one row each")] = "0-7",
    columns: Annotated[
        int | None,
        columns_option(
            "The number of steps to show, from 1 to S, evenly spaced; the last is always shown.",
            show_default="10, or S if that is less",
        ),
    ] = None,
    state: Annotated[
        bool, flag("--state", "Show the noisy state x_t instead of the predicted x0.")
    ] = False,
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    order: Order = 1,
    batch_size: BatchSize = 16,
    labels: Labels = False,
    out: Out = Path("sequence.png"),
) -> None:
    """Draw how images form: the x0 predicted at each step, one row for each seed, in a PNG.

    At each step the model's output implies a clean image x0, which is blurred at first. The last
    column equals, bit for bit, the image that fastddim sample draws with the same options.

    The last line gives the timestep t of each column.

    For example: fastddim sequence --seeds 0-3 --columns 5 --steps 20 --eta 1
    """
    wanted = values.parse_seeds(seeds)
    noise = values.parse_eta(eta)
    values.check_common(batch_size, spacing, order)
    with bars.spinner("loading", machine.quiet):
        from fastddim.cli.network import prepare
        from fastddim.tools import draw, images, sheet

        png = images.check_png(out)
        prepared = prepare(machine, network)
        images.check_channels(prepared.shape[0])
        ddim = prepared.ddim(steps, eta=noise, spacing=spacing, order=order)
        n = min(10, len(ddim.pairs)) if columns is None else columns
        kept = [ddim.pairs[row] for row in draw.kept_rows(ddim, n)]
        values.check_cells("seeds x columns", len(wanted), n)
    total = draw.model_calls([ddim], len(wanted), batch_size)
    with bars.bar("sampling", total, machine.quiet) as progress:
        batches = draw.sequences(
            ddim,
            prepared.model,
            wanted,
            prepared.shape,
            batch_size,
            n,
            state=state,
            device=prepared.device,
            progress=progress,
            **prepared.options(batch_size),
        )
        pictures, odd = images.drawn(x.flatten(0, 1) for x in batches)
    levels = [s for _, s in kept] if state else [t for t, _ in kept]
    replaced = sheet.save(
        pictures,
        png,
        columns=n,
        recipe=recipe(
            "sequence", ddim, prepared, network, seeds, batch_size, columns=n, state=state
        ),
        rows=[str(seed) for seed in wanted] if labels else (),
        heads=[str(level) if level >= 0 else "" for level in levels] if labels else (),
    )
    if state:
        names = [f"t = {level}" if level >= 0 else "the image" for level in levels]
        shown = "x_t at " + ", ".join(names)
    else:
        shown = "x0 predicted at t = " + ", ".join(map(str, levels))
    if not machine.quiet:
        print(f"{written(png, replaced)}: {shown}")
    say_not_finite([wanted[place // n] for place in odd])


def timesteps(ddim: "DDIM") -> dict[str, list[int]]:
    """Returns τ for a recipe where the spacing's name does not determine it."""
    return {} if isinstance(ddim.spacing, str) else {"timesteps": [t for t, _ in ddim.pairs]}


def recipe(
    command: str,
    ddim: "DDIM",
    prepared: "Prepared",
    network: Network,
    seeds: str,
    batch_size: int,
    **rest: Any,
) -> dict[str, Any]:
    """Returns all that determines a picture, as plain values for its metadata."""
    from fastddim import __version__
    from fastddim.tools import provenance

    return {
        "command": command,
        "seeds": "".join(seeds.split()),
        "steps": len(ddim.pairs),
        "eta": ddim.eta,
        "spacing": str(ddim.spacing),
        **timesteps(ddim),
        "order": ddim.order,
        "batch_size": batch_size,
        **rest,
        "model": {name: str(value) for name, value in network.given.items()},
        "prediction": ddim.prediction,
        "schedule": f"{ddim.schedule.name}, T = {len(ddim.schedule)}",
        "device": provenance.machine(prepared.device),
        "versions": {"fastddim": __version__, **provenance.versions("torch", "triton", "numba")},
    }
