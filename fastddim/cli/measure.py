"""The commands ``reconstruct`` and ``evaluate``, each of which measures images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastddim.check import whole
from fastddim.cli import bars, values
from fastddim.cli.draw import recipe, say_not_finite, written
from fastddim.cli.options import BatchSize, Labels, Machine, Network, Spacing, number, option
from fastddim.cli.values import MOST_IMAGES, counted

if TYPE_CHECKING:
    from fastddim.tools.reconstruction import Reconstruction

DRAWN = 50
"""The number of steps with which ``reconstruct`` draws its images: the default of ``sample``."""


def reconstruct(
    machine: Machine,
    network: Network,
    file: Annotated[
        Path | None,
        option(
            "--images",
            "PATH",
            "The images to encode: a folder that fastddim generate has filled, a folder of PNGs, "
            "a .png, a .npy or .npz of uint8 (N, H, W) or (N, H, W, C), or an idx file of bytes, "
            "gzipped or not. They must have the model's size and channels.",
            show_default="drawn by the model",
        ),
    ] = None,
    count: Annotated[
        int | None,
        number(
            "--count",
            "N",
            f"With --images: encode the first N of them, at most {MOST_IMAGES}.",
            show_default="16, or all if there are fewer",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        option(
            "--seeds",
            "SEEDS",
            "Without --images: encode the images that fastddim sample draws for these seeds, such "
            f"as 0-9,20, with {DRAWN} steps.",
            show_default="0-15",
        ),
    ] = None,
    steps: Annotated[
        str,
        option(
            "--steps",
            "S,S,...",
            "The numbers of steps to compare. The paper's table also has 500 and 1000.",
        ),
    ] = "10,20,50,100,200",
    refine: Annotated[
        int,
        number(
            "--refine",
            "N",
            "Fixed-point iterations in each step of the encoding, >= 0. An exact step back needs "
            "the model's output at the state that it leads to. The first estimate of this state "
            "uses the output at the state before, and each iteration the output at the latest "
            "estimate. With N iterations an image takes S*(2+N) model calls, and the error is "
            "smaller, most of all with many steps. The paper has N = 0.",
        ),
    ] = 0,
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    labels: Labels = False,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "FILE.png",
            "A PNG to write or replace, in a folder that exists: the images in the first "
            "row, and below it their reconstructions, one row for each S.",
            show_default="no picture",
        ),
    ] = None,
) -> None:
    """Measure the error of images that are encoded as noise and decoded again.

    This measures table 2 of the DDIM paper (Song et al. 2021, section 5.4). DDIM with eta = 0
    integrates an ordinary differential equation: backwards in S steps it encodes an image as
    noise, and forwards in the same S steps it decodes the noise. The command prints for each S
    the mean squared error per pixel, with images scaled to [0, 1], the model calls for each image
    and the seconds for all images.

    After Ctrl-C it prints the rows that are finished, and writes no picture.

    For example: fastddim reconstruct --images t10k-images-idx3-ubyte.gz --count 16 --refine 2
    """
    if file is not None and seeds is not None:
        raise ValueError(f"seeds must be left out with images, got {seeds!r}")
    if file is None and count is not None:
        raise ValueError(f"count must be left out without images, got {count}")
    numbers = values.parse_steps(steps)
    whole("refine", refine, low=0)
    values.check_common(batch_size, spacing)
    if count is not None:
        whole("count", count, low=1, high=MOST_IMAGES)
    wanted = values.parse_seeds("0-15" if seeds is None else seeds)
    with bars.spinner("loading", machine.quiet):
        import torch

        from fastddim.cli.network import prepare
        from fastddim.tools import draw, images, reconstruction, sheet, sources

        png = None if out is None else images.check_png(out)
        prepared = prepare(machine, network)
        # A step that clips cannot be inverted.
        ddims = [prepared.ddim(S, spacing=spacing, clip=None) for S in numbers]
        drawn = prepared.ddim(DRAWN)
        model_options = prepared.options(batch_size)
        if png is not None:
            images.check_channels(prepared.shape[0])
        given = None
        if file is not None:
            source = sources.opened(file, prepared.shape)
            given = images.from_uint8(source.first(count or min(16, source.count)))
        n = len(wanted) if given is None else len(given)
        if png is not None:
            values.check_cells("(1 + steps) x images", 1 + len(ddims), n)
        first = prepared.ddim(1, spacing="trailing", clip=None)
        reconstruction.warm_up(
            first, prepared.model, prepared.shape, batch_size, prepared.device, **model_options
        )
    total = reconstruction.model_calls(ddims, n, batch_size, refine)
    total += 0 if given is not None else draw.model_calls([drawn], n, batch_size)
    done: list[Reconstruction] = []
    try:
        with bars.bar("reconstructing", total, machine.quiet) as progress:
            if given is None:
                samples = draw.by_seed(
                    drawn,
                    prepared.model,
                    wanted,
                    prepared.shape,
                    batch_size,
                    device=prepared.device,
                    progress=progress,
                    **model_options,
                )
                given = torch.cat(list(samples))
            rows = reconstruction.errors(
                ddims,
                prepared.model,
                given.to(prepared.device),
                refine=refine,
                batch_size=batch_size,
                progress=progress,
                **model_options,
            )
            for row in rows:
                # With extend, Ctrl-C could lose finished rows.
                done.append(row)  # noqa: PERF402
    finally:  # Ctrl-C too
        if done:
            encoded = (
                f"{counted(n, 'image')} drawn by the model, seeds {seeds or '0-15'}"
                if file is None
                else f"The first {counted(n, 'image')} of {file}"
            )
            bars.print_table(
                f"{encoded}, refine {refine}, {spacing} spacing. The mean squared error per pixel "
                f"in [0, 1]:",
                ("S", "calls", "error", "seconds"),
                [(r.ddim.steps, r.calls, f"{r.error:.2e}", f"{r.seconds:.1f}") for r in done],
            )
    if png is not None:
        pictures = torch.cat([x.cpu() for x in (given, *(row.images for row in done))])
        made = recipe(
            "reconstruct",
            ddims[-1],
            prepared,
            network,
            "0-15" if seeds is None else seeds,
            batch_size,
            refine=refine,
            images=None if file is None else str(file),
        )
        replaced = sheet.save(
            images.to_uint8(pictures),
            png,
            columns=n,
            recipe=made | {"steps": numbers},
            rows=["given", *(f"S={S}" for S in numbers)] if labels else (),
        )
        if not machine.quiet:
            print(f"{written(png, replaced)}: the images, then S = {steps}")


def evaluate(
    machine: Machine,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="The images: a folder that fastddim generate has filled, a folder of pictures, or "
            "a .png, .npy, .npz or idx file.",
        ),
    ],
    reference: Annotated[
        Path | None,
        option(
            "--fid",
            "IMAGES",
            "Measure FID too, to these images: a folder of pictures, or one that fastddim "
            "generate has filled.",
            show_default="no FID",
        ),
    ] = None,
    inception: Annotated[
        Path | None,
        option(
            "--inception",
            "FILE.pth",
            "torch-fidelity's weights of Inception v3. The command does not download them.",
            show_default="where torch-fidelity keeps them",
        ),
    ] = None,
) -> None:
    """Measure how far images are from real images.

    Images of 1x28x28 are compared with real garments by FD-clf: the Frechet distance between the
    features of a small classifier for these images and for Fashion-MNIST's test set. The
    command also prints the FD-clf of as many real garments, as mean ± standard deviation over
    draws; some draws of real garments score less. The classifier and the features ship with the
    package. FD-clf is not FID: compare it with FD-clf only.

    torch-fidelity (pip install 'fastddim[fid]') computes FID with its own weights. Compare FID
    only between sets of the same size; 50,000 images are usual.

    For example: fastddim evaluate garments
    """
    if inception is not None and reference is None:
        raise ValueError(f"inception must be left out without fid, got {str(inception)!r}")
    with bars.spinner("reading", machine.quiet):
        from fastddim import embedded
        from fastddim.cli.network import usable
        from fastddim.tools import distance, sources
        from fastddim.tools import evaluate as judges

        where = usable(machine)
        made = sources.opened(folder)
    n = counted(made.count, "image")
    if made.shape == embedded.SHAPE or reference is None:
        with bars.spinner("measuring FD-clf", machine.quiet):
            judged = judges.garments(made)
        most = distance.SIZES[-1]
        real = "as many" if made.count <= most else f"{most:,}"
        print(
            f"FD-clf {judged.distance:.4f} of {n}; {real} real garments {judged.floor:.4f} "
            f"± {judged.spread:.4f}"
        )
    if reference is not None:
        with bars.spinner("measuring FID", machine.quiet):
            found = judges.fid(made, reference, inception, where)
        print(f"FID {found:.4f} of {n} to {reference}")
    say_not_finite(made.not_finite)
