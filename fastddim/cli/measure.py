"""The commands ``reconstruct``, ``evaluate`` and ``profile``, each of which measures images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastddim.check import whole
from fastddim.cli import bars, options
from fastddim.cli.draw import recipe, say_not_finite, written
from fastddim.cli.options import (
    MOST_IMAGES,
    BatchSize,
    Labels,
    Machine,
    Network,
    Spacing,
    counted,
    flag,
    number,
    option,
    seeds_option,
)

if TYPE_CHECKING:
    from fastddim.tools.profile import Cell, Judge, Settings
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
    numbers = options.parse_steps(steps)
    whole("refine", refine, low=0)
    options.check_common(batch_size, spacing)
    if count is not None:
        whole("count", count, low=1, high=MOST_IMAGES)
    wanted = options.parse_seeds("0-15" if seeds is None else seeds)
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
            options.check_cells("(1 + steps) x images", 1 + len(ddims), n)
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


def profile(
    machine: Machine,
    network: Network,
    steps: Annotated[
        str, option("--steps", "S,S,...", "The numbers of steps to measure, each from 1 to 1000.")
    ] = "10,20,50,100",
    eta: Annotated[
        str,
        option(
            "--eta",
            "ETA,ETA,...",
            "The etas to measure: numbers >= 0, or hat for DDPM's larger variance. 0 is DDIM, and "
            "1 adds as much noise as DDPM.",
        ),
    ] = "0,0.2,0.5,1,hat",
    seeds: Annotated[str, seeds_option("The images to draw in each cell")] = "0-255",
    oracle: Annotated[
        bool,
        flag(
            "--oracle",
            "Use the exact epsilon of a mixture of eight Gaussians in 64 dimensions instead of a "
            "model. FD is then the Frechet distance of the samples to the mixture's exact mean "
            "and covariance, which shows the error of the sampler alone.",
        ),
    ] = False,
    trace: Annotated[
        bool,
        flag(
            "--trace",
            "Also write DIR/trace.json, which ui.perfetto.dev opens: three steps for each "
            'eta, in ranges named "model" and "update".',
        ),
    ] = False,
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    out: Annotated[
        Path,
        option(
            "--out",
            "DIR",
            "The folder for profile.json, profile.csv and profile.png, which is made if it does "
            "not exist. The command continues a profile in it without measuring finished cells "
            "again, and refuses a profile with other settings.",
        ),
    ] = Path("profile"),
) -> None:
    """Measure time, memory and image quality for each number of steps with each eta.

    The grid follows table 1 of the DDIM paper (Song et al. 2021). For each cell the command
    prints the milliseconds that a step of a full batch spends in the update (all work outside the
    model) and in the model, the images per second, and the peak memory of the tensors, weights
    included, in MB.

    Images of 1x28x28 are compared with real garments by FD-clf: the Frechet distance between 64
    features of a small classifier for these images and for Fashion-MNIST's test set (not FID).
    FD-clf falls as the number of images grows, so the last column gives the FD-clf of as many real
    garments, as mean ± standard deviation over draws: some draws of real garments, and also a
    good model, may score less. Classifier and features ship with the package, so no data set is
    needed. Images of other sizes have no distance.

    The default grid takes 15 to 30 minutes on two CPU cores, and about a minute with --oracle.
    After Ctrl-C the finished cells are kept, and the same command measures the others.

    For example: fastddim profile --steps 10,50 --eta 0,1,hat --seeds 0-127 --out table1
    """
    etas = options.parse_etas(eta)
    numbers = options.parse_steps(steps)
    wanted = options.parse_seeds(seeds)
    if len(wanted) < 2:
        raise ValueError(f"seeds must be two or more to measure a distance, got {seeds!r}")
    options.check_common(batch_size, spacing)
    if oracle and network.given:
        name, value = next(iter(network.given.items()))
        raise ValueError(f"{name} must be left out with oracle, got {str(value)!r}")
    with bars.spinner("loading", machine.quiet):
        from fastddim import embedded
        from fastddim.cli.network import prepare, usable
        from fastddim.loop.sampler import DDIM
        from fastddim.tools import profile as measured

        measured.check_folder(out)
        model: Any
        size: Sequence[int]
        make: Callable[..., DDIM] = DDIM
        judge: Judge | None
        model_options: dict[str, Any] = {}
        if oracle:
            where, data = usable(machine), measured.oracle()
            model, size = measured.oracle().to(where), data.means.shape[1:]
            judge = measured.mixture(data)
        else:
            prepared = prepare(machine, network)
            model, size, where, make = (
                prepared.model,
                prepared.shape,
                prepared.device,
                prepared.ddim,
            )
            model_options = prepared.options(batch_size)
            judge = measured.garments() if size == embedded.SHAPE else None
        ddims = measured.grid(numbers, etas, spacing, make)
        text = "".join(seeds.split())
        more = {
            name: getattr(network, field)
            for name, field in (
                ("class", "label"),
                ("guidance", "guidance"),
                ("no_class", "no_class"),
                ("dtype", "dtype"),
            )
        }
        settings = measured.settings(model, ddims[0], text, batch_size, where, judge, **more)
        done = measured.read(out, settings)
        rest = measured.remaining(ddims, done)
        measured.make_folder(out)
        if trace:
            longest = measured.grid([max(numbers)], etas, spacing, make)
            path = out / measured.TRACE
            measured.trace(longest, model, size, batch_size, path, device=where, **model_options)
    total = measured.model_calls(rest, len(wanted), batch_size)
    try:
        with bars.bar("profiling", total, machine.quiet) as progress:
            for cell in measured.cells(
                rest,
                model,
                wanted,
                size,
                batch_size,
                judge=judge,
                device=where,
                progress=progress,
                **model_options,
            ):
                done.append(cell)
                measured.save(out, settings, done)
    finally:  # Ctrl-C too
        if done:
            print_cells(done, settings)
            measured.plot(settings, done, out / measured.PNG)
    if not machine.quiet:
        print(f"{out}: {', '.join(sorted(path.name for path in out.glob('*.*')))}")


def print_cells(done: "list[Cell]", settings: "Settings") -> None:
    from fastddim.tools.profile import label

    judged = settings["distance"]
    names = ["S", "eta", "update ms", "model ms", "images/s", "MB"]
    names += [judged, "real"] if judged else []
    rows = []
    for cell in done:
        memory = "?" if cell.memory_mb is None else f"{cell.memory_mb:.1f}"
        times = f"{cell.update_ms:.3f}", f"{cell.model_ms:.2f}", f"{cell.images_per_second:.1f}"
        quality: tuple[str, ...] = ()
        if judged:
            spread = "" if cell.spread is None else f" ± {cell.spread:.3f}"
            quality = f"{cell.distance:.3f}", f"{cell.floor:.3f}{spread}"
        rows.append((str(cell.steps), label(cell.eta), *times, memory, *quality))
    bars.print_table(
        f"Seeds {settings['seeds']}, {settings['spacing']} spacing, on {settings['device']}, "
        f"steps by {settings['backend']}. "
        f"Milliseconds are for a step of {settings['batch_size']} images:",
        names,
        rows,
    )
    if not judged:
        print("No FD-clf: it compares garments, and these images are not 1x28x28.")
