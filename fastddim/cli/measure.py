"""The commands that measure: reconstruct, evaluate, profile."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastddim.check import whole
from fastddim.cli import bars, options
from fastddim.cli.draw import calls, recipe, say_not_finite, written
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
"""The steps in which ``reconstruct`` draws the images it is not given: those of ``sample``."""


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
            show_default="drawn by the model itself",
        ),
    ] = None,
    count: Annotated[
        int | None,
        number(
            "--count",
            "N",
            f"How many of these images, the first so many; at most {MOST_IMAGES}.",
            show_default="16, or all where there are fewer",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        option(
            "--seeds",
            "SEEDS",
            "Without --images: the images that fastddim sample draws for these seeds, in "
            f"{DRAWN} steps. Written as there.",
            show_default="0-15",
        ),
    ] = None,
    steps: Annotated[
        str,
        option(
            "--steps",
            "S,S,...",
            "Each S to try, as in fastddim sample. The paper's table goes on with 500,1000.",
        ),
    ] = "10,20,50,100,200",
    refine: Annotated[
        int,
        number(
            "--refine",
            "N",
            "Fixed-point iterations in each step of the encoding, >= 0. A step back needs "
            "the model's answer at the point it goes to, and takes the one at the point it comes "
            "from; each iteration asks again at the point found. It costs one more model call a "
            "step, S*(2+N) in all, and the error falls with each, the faster the more steps "
            "there are. 0 is the paper's.",
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
            "row, below it their reconstructions, one row for each S.",
            show_default="no picture",
        ),
    ] = None,
) -> None:
    """Measure what images lose when they are encoded as noise and decoded again.

    Table 2 of the DDIM paper (Song et al. 2021, section 5.4): DDIM with eta = 0 is an ordinary
    differential equation. It is run backwards from an image to its noise in S steps, and forwards
    again in the same S steps. What is printed is the mean squared difference per pixel, images
    scaled to [0, 1], for each S, with the model calls for an image and the seconds for all images.

    After Ctrl-C the rows that are done are printed, and no picture is written.

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
        asked = prepare(machine, network)
        # Nothing that was clipped could be encoded.
        ddims = [asked.ddim(S, spacing=spacing, clip=None) for S in numbers]
        drawn = asked.ddim(DRAWN)
        told = asked.options(batch_size)
        if png is not None:
            images.check_channels(asked.shape[0])
        given = None
        if file is not None:
            source = sources.opened(file, asked.shape)
            given = images.from_uint8(source.first(count or min(16, source.count)))
        n = len(wanted) if given is None else len(given)
        if png is not None:
            options.check_cells("(1 + steps) x images", 1 + len(ddims), n)
        # The first calls prepare and compile, which no row's seconds should hold.
        zeros = torch.zeros(1, *asked.shape, device=asked.device)
        first = asked.ddim(1, spacing="trailing", clip=None)
        list(reconstruction.errors([first], asked.model, zeros, batch_size=batch_size, **told))
    total = reconstruction.model_calls(ddims, n, batch_size, refine)
    total += 0 if given is not None else calls(drawn, n, batch_size)
    done: list[Reconstruction] = []
    try:
        with bars.bar("reconstructing", total, machine.quiet) as progress:
            if given is None:
                samples = draw.by_seed(
                    drawn,
                    asked.model,
                    wanted,
                    asked.shape,
                    batch_size,
                    device=asked.device,
                    progress=progress,
                    **told,
                )
                given = torch.cat(list(samples))
            rows = reconstruction.errors(
                ddims,
                asked.model,
                given.to(asked.device),
                refine=refine,
                batch_size=batch_size,
                progress=progress,
                **told,
            )
            for row in rows:
                # extend need not have kept any when Ctrl-C comes
                done.append(row)  # noqa: PERF402
    finally:  # Ctrl-C too
        if done:
            what = (
                f"{counted(n, 'image')} drawn by the model, seeds {seeds or '0-15'}"
                if file is None
                else f"The first {counted(n, 'image')} of {file}"
            )
            bars.print_table(
                f"{what}, refine {refine}, {spacing} spacing. The mean squared error per pixel "
                f"in [0, 1]:",
                ("S", "calls", "error", "seconds"),
                [(r.ddim.steps, r.calls, f"{r.error:.2e}", f"{r.seconds:.1f}") for r in done],
            )
    if png is not None:
        pictures = torch.cat([x.cpu() for x in (given, *(row.images for row in done))])
        made = recipe(
            "reconstruct",
            ddims[-1],
            asked,
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
            help="A folder that fastddim generate has filled, a folder of pictures, or a file of "
            "images.",
        ),
    ],
    reference: Annotated[
        Path | None,
        option(
            "--fid",
            "IMAGES",
            "Measure FID as well, to these: a folder of pictures, or another DIR.",
            show_default="no FID",
        ),
    ] = None,
    inception: Annotated[
        Path | None,
        option(
            "--inception",
            "FILE.pth",
            "torch-fidelity's weights of Inception v3, which are not fetched for you.",
            show_default="where torch-fidelity keeps them",
        ),
    ] = None,
) -> None:
    """Measure how far images are from real ones.

    Images of 1x28x28 are compared with garments: FD-clf is the Frechet distance of the features
    of a small classifier to those of the test set, and beside it stands what as many real images
    score, as mean ± standard deviation over draws; some draws score less. Both ship. It is no
    FID and to be compared with FD-clf alone.

    FID is computed by torch-fidelity (pip install 'fastddim[fid]'), with its weights. Compare it
    only between sets of one size: 50,000 images are the custom.

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
        str, option("--steps", "S,S,...", "The numbers of steps, each 1 to 1000.")
    ] = "10,20,50,100",
    eta: Annotated[
        str,
        option(
            "--eta",
            "ETA,ETA,...",
            "The etas: numbers >= 0, and hat for DDPM's larger variance. 0 is DDIM, 1 as "
            "DDPM does.",
        ),
    ] = "0,0.2,0.5,1,hat",
    seeds: Annotated[str, seeds_option("The images to draw in each cell")] = "0-255",
    oracle: Annotated[
        bool,
        flag(
            "--oracle",
            "Instead of a model, the exact epsilon of a mixture of eight Gaussians in 64 "
            "dimensions. The distance, FD, is that of the samples themselves to the mixture's "
            "exact mean and covariance, so that what is left is what the sampler gets wrong.",
        ),
    ] = False,
    trace: Annotated[
        bool,
        flag(
            "--trace",
            "Write DIR/trace.json too, to be opened at ui.perfetto.dev: three steps for each "
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
            "The folder for profile.json, profile.csv and profile.png, made if it does not "
            "exist. A profile in it goes on: cells it has are not measured again, and other "
            "settings are refused.",
        ),
    ] = Path("profile"),
) -> None:
    """Measure each number of steps with each eta: time, memory, and how good the images are.

    Table 1 of the DDIM paper (Song et al. 2021). For each cell: the milliseconds of a step that
    are the update's (all that is not the model) and the model's, for a full batch; images a
    second; and the most memory that tensors held at once, weights included, in MB.

    Images of 1x28x28 are compared with garments: FD-clf is the Frechet distance of the features
    of a small classifier, 64 of them, to those of the test set (it is no FID). It falls with the
    number of images, so beside it stands what as many real images score, as mean ± standard
    deviation over draws: some draws of real images score less, and so may a good model. Both
    ship, and no data set is needed. Other images are not judged.

    The default grid takes a quarter to half an hour on two CPU cores, with --oracle a minute or so.
    After Ctrl-C what is done is kept, and the same command goes on with the rest.

    For example: fastddim profile --steps 10,50 --eta 0,1,hat --seeds 0-127 --out table1
    """
    etas = options.parse_etas(eta)
    numbers = options.parse_steps(steps)
    wanted = options.parse_seeds(seeds)
    if len(wanted) < 2:
        raise ValueError(f"seeds must be two or more, whose spread can be compared, got {seeds!r}")
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
        told: dict[str, Any] = {}
        if oracle:
            where, data = usable(machine), measured.oracle()
            model, size = measured.oracle().to(where), data.means.shape[1:]
            judge = measured.mixture(data)
        else:
            asked = prepare(machine, network)
            model, size, where, make = asked.model, asked.shape, asked.device, asked.ddim
            told = asked.options(batch_size)
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
        finished = {(cell.steps, cell.eta) for cell in done}
        rest = [ddim for ddim in ddims if (len(ddim.pairs), ddim.eta) not in finished]
        measured.make_folder(out)
        if trace:
            longest = measured.grid([max(numbers)], etas, spacing, make)
            path = out / measured.TRACE
            measured.trace(longest, model, size, batch_size, path, device=where, **told)
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
                **told,
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
        f"Milliseconds are those of a step of {settings['batch_size']} images:",
        names,
        rows,
    )
    if not judged:
        print("No FD-clf: it compares garments, and these images are not 1x28x28.")
