"""The command line's commands. They translate options; what they do is done elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from fastddim import (
    DDIM,
    __version__,
    checkpoints,
    embedded,
    evaluate,
    generate,
    images,
    profile,
    reconstruction,
)
from fastddim.check import whole
from fastddim.embedded import distance
from fastddim.folder import FORMATS, Folder, Seeds, holding
from fastddim.generate import Worker
from fastddim.predict import Model
from fastddim.timesteps import SPACINGS

MOST_IMAGES = 10_000
"""What one picture holds: beyond it nobody sees one, and a 256x256 grid outgrows memory."""

DRAWN = DDIM()
"""How ``reconstruct`` draws the images it is not given: as ``sample`` does by default."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Markdown, so that the help's paragraphs are filled to the terminal's width.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def integer(text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be an integer, got {text!r}") from None


def seeds_option(what: str, such_as: str = "7, 0-63 or 0-9,20,30-39") -> Any:
    return typer.Option(
        metavar="SEEDS",
        help=f"{what}: {such_as}, in this order. A seed is an integer from 0 to 2^63-1; at most "
        f"{MOST_IMAGES} of them.",
    )


def columns_option(what: str, **rest: Any) -> Any:
    return typer.Option(metavar="N", help=what, parser=integer, **rest)


Steps = Annotated[
    int,
    typer.Option(
        metavar="S",
        help="The number of model calls per image, from 1 to the T of the model's noise, which is "
        "1000 for most.",
        parser=integer,
    ),
]
Eta = Annotated[
    str,
    typer.Option(
        metavar="NUMBER|hat",
        help="How much noise each step adds: 0 none (DDIM), 1 as DDPM does, other numbers "
        ">= 0 between and somewhat beyond; hat is DDPM's larger variance.",
    ),
]
Spacing = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"How the timesteps are chosen: {', '.join(SPACINGS)}."),
]
BatchSize = Annotated[
    int,
    typer.Option(
        metavar="N",
        help=f"Images per model call, 1 to {images.LARGEST_BATCH}. Batches are always full, "
        "the last one padded.",
        parser=integer,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Where to sample: cpu, cuda, cuda:1, mps, ...",
        show_default="cuda if there is one, else cpu",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="The model: a folder with a diffusers UNet2DModel (or with one in unet/), or a file "
        "with the weights of ermongroup/ddim (of a whole checkpoint the EMA), guided-diffusion or "
        "garments, as safetensors or as torch.save writes them. The kind is found out from the "
        "content and said on stderr. No code in a file is run, and nothing is fetched.",
        show_default="the garment model that ships",
    ),
]
Network = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Or your own model: package.module:factory, in the current folder or anywhere on "
        "Python's path. The factory takes no arguments and returns a model, called as model(x, t), "
        "or (model, (channels, height, width)), or a fastddim.checkpoints.Loaded.",
        show_default="none",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.json",
        help=f"What the checkpoint's tensors do not tell: {', '.join(checkpoints.CONFIGS)} for "
        "ermongroup/ddim's; for guided-diffusion's a file of its scripts' flags, such as "
        '{"image_size": 64, "num_heads": 4, "noise_schedule": "cosine"}, in which its own defaults '
        "may be left out; for diffusers weights their config.json.",
        show_default="what is beside the weights, or as published",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="C,H,W",
        help="Channels, height and width of an image, such as 3,32,32, where neither model nor "
        "config says it, or another size.",
        show_default="the model's own",
    ),
]
Out = Annotated[
    Path,
    typer.Option(metavar="FILE.png", help="The PNG to write or replace, in a folder that exists."),
]


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
    seeds: Annotated[str, seeds_option("The images to make")] = "0-63",
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    device: Device = None,
    checkpoint: Checkpoint = None,
    model: Network = None,
    config: Config = None,
    shape: Size = None,
    out: Out = Path("garments.png"),
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
    png = images.check_png(out)
    loaded, where = load(checkpoint, model, config, shape, device)
    images.check_channels(loaded.shape[0])
    ddim = loaded.ddim(steps, eta=number_or_name(eta), spacing=spacing)
    timed = images.Timed(loaded.model, where)
    images.warm_up(ddim, timed, loaded.shape, batch_size, where)
    with bar("sampling", calls(ddim, len(wanted), batch_size)) as progress:
        timed.start()
        samples = images.by_seed(
            ddim, timed, wanted, loaded.shape, batch_size, device=where, progress=progress
        )
        pictures, odd = images.drawn(samples)
        summary = timed.summary(len(wanted))
    images.save_png(images.grid(pictures), png)
    print(f"{png}: {summary}")
    say_not_finite([wanted[place] for place in odd])


@app.command()
def interpolate(
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
    device: Device = None,
    checkpoint: Checkpoint = None,
    model: Network = None,
    config: Config = None,
    shape: Size = None,
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
    wanted = parse_seeds(seeds)
    images.check_pairs(wanted)
    whole("columns", columns, low=2)
    check_cells("pairs of seeds x columns", len(wanted) // 2, columns)
    whole("batch-size", batch_size, low=1, high=images.LARGEST_BATCH)
    png = images.check_png(out)
    loaded, where = load(checkpoint, model, config, shape, device)
    images.check_channels(loaded.shape[0])
    ddim = loaded.ddim(steps, spacing=spacing)
    rows = len(wanted) // 2
    with bar("interpolating", calls(ddim, rows * columns, batch_size)) as progress:
        between = images.interpolations(
            ddim,
            loaded.model,
            wanted,
            loaded.shape,
            batch_size,
            columns,
            device=where,
            progress=progress,
        )
    pictures = images.to_uint8(between.flatten(0, 1))
    images.save_png(images.grid(pictures, columns=columns), png)
    print(f"{png}: {counted(rows, 'row')} of {columns} images")


@app.command()
def sequence(
    seeds: Annotated[str, seeds_option("The images to follow, one row each")] = "0-7",
    columns: Annotated[
        int | None,
        columns_option(
            "How many steps to show, 1 to S, evenly chosen, the last always among them.",
            show_default="10, or S where that is less",
        ),
    ] = None,
    state: Annotated[
        bool,
        typer.Option("--state", help="Show x_t, the noisy image itself, instead of x0."),
    ] = False,
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    device: Device = None,
    checkpoint: Checkpoint = None,
    model: Network = None,
    config: Config = None,
    shape: Size = None,
    out: Out = Path("sequence.png"),
) -> None:
    """Draw how images come about: the x0 predicted along the way, one row a seed, in a PNG.

    At each step the model's answer implies a clean image, x0, blurred at first. The last column
    is the image that fastddim sample draws with the same options, bit for bit.

    The last line names the timestep t of each column.

    For example: fastddim sequence --seeds 0-3 --columns 5 --steps 20 --eta 1
    """
    wanted = parse_seeds(seeds)
    whole("batch-size", batch_size, low=1, high=images.LARGEST_BATCH)
    png = images.check_png(out)
    loaded, where = load(checkpoint, model, config, shape, device)
    images.check_channels(loaded.shape[0])
    ddim = loaded.ddim(steps, eta=number_or_name(eta), spacing=spacing)
    n = min(10, len(ddim.pairs)) if columns is None else columns
    kept = [ddim.pairs[row] for row in images.kept_rows(ddim, n)]
    check_cells("seeds x columns", len(wanted), n)
    with bar("sampling", calls(ddim, len(wanted), batch_size)) as progress:
        batches = images.sequences(
            ddim,
            loaded.model,
            wanted,
            loaded.shape,
            batch_size,
            n,
            state=state,
            device=where,
            progress=progress,
        )
        pictures = torch.cat([images.to_uint8(x.flatten(0, 1)) for x in batches])
    images.save_png(images.grid(pictures, columns=n), png)
    if state:
        levels = [f"t = {s}" if s >= 0 else "the image" for _, s in kept]
        shown = "x_t at " + ", ".join(levels)
    else:
        shown = "x0 predicted at t = " + ", ".join(str(t) for t, _ in kept)
    print(f"{png}: {shown}")


@app.command()
def reconstruct(
    file: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="FILE",
            help=f"The images to encode: {images.FILES}. They must have the model's size and "
            "channels.",
            show_default="drawn by the model itself",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"How many images of FILE, the first so many; at most {MOST_IMAGES}.",
            show_default="16, or all where there are fewer",
            parser=integer,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="SEEDS",
            help="Without --images: the images that fastddim sample draws for these seeds, in "
            f"{DRAWN.steps} steps. Written as there.",
            show_default="0-15",
        ),
    ] = None,
    steps: Annotated[
        str,
        typer.Option(
            metavar="S,S,...",
            help="Each S to try, as in fastddim sample. The paper's table goes on with 500,1000.",
        ),
    ] = "10,20,50,100,200",
    refine: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Fixed-point iterations in each step of the encoding, >= 0. A step back needs "
            "the model's answer at the point it goes to, and takes the one at the point it comes "
            "from; each iteration asks again at the point found. It costs one more model call a "
            "step, S*(2+N) in all, and the error falls with each, the faster the more steps "
            "there are. 0 is the paper's.",
            parser=integer,
        ),
    ] = 0,
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    device: Device = None,
    checkpoint: Checkpoint = None,
    model: Network = None,
    config: Config = None,
    shape: Size = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="A PNG to write or replace, in a folder that exists: the images in the first "
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
    numbers = parse_steps(steps)
    whole("refine", refine, low=0)
    whole("batch-size", batch_size, low=1, high=images.LARGEST_BATCH)
    if count is not None:
        whole("count", count, low=1, high=MOST_IMAGES)
    wanted = parse_seeds("0-15" if seeds is None else seeds)
    png = None if out is None else images.check_png(out)
    loaded, where = load(checkpoint, model, config, shape, device)
    ddims = [loaded.ddim(S, spacing=spacing) for S in numbers]
    drawn = loaded.ddim(DRAWN.steps)
    if png is not None:
        images.check_channels(loaded.shape[0])
    given = None
    if file is not None:
        given = images.from_uint8(images.read(file, loaded.shape, count)[: count or 16])
    n = len(wanted) if given is None else len(given)
    if png is not None:
        check_cells("(1 + steps) x images", 1 + len(ddims), n)
    # The first calls prepare and compile, which no row's seconds should hold.
    list(
        reconstruction.errors(
            [loaded.ddim(1)],
            loaded.model,
            torch.zeros(1, *loaded.shape, device=where),
            batch_size=batch_size,
        )
    )
    total = reconstruction.model_calls(ddims, n, batch_size, refine)
    total += 0 if given is not None else calls(drawn, n, batch_size)
    done: list[reconstruction.Reconstruction] = []
    try:
        with bar("reconstructing", total) as progress:
            if given is None:
                samples = images.by_seed(
                    drawn,
                    loaded.model,
                    wanted,
                    loaded.shape,
                    batch_size,
                    device=where,
                    progress=progress,
                )
                given = torch.cat(list(samples))
            x0 = given.to(where)
            for row in reconstruction.errors(
                ddims, loaded.model, x0, refine=refine, batch_size=batch_size, progress=progress
            ):
                # extend need not have kept any when Ctrl-C comes
                done.append(row)  # noqa: PERF402
    finally:  # Ctrl-C too
        if done:
            what = (
                f"{counted(n, 'image')} drawn by the model, seeds {seeds or '0-15'}"
                if file is None
                else f"The first {counted(n, 'image')} of {file}"
            )
            print_table(done, f"{what}, refine {refine}, {spacing} spacing")
    if png is not None:
        sheet = torch.cat([x.cpu() for x in (given, *(row.images for row in done))])
        images.save_png(images.grid(images.to_uint8(sheet), columns=n), png)
        print(f"{png}: the images, then S = {steps}")


@app.command("generate")
def generate_images(
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="SEEDS",
            help="The images to make: 0-49999, or 0-9,20,30-39, each seed once. A seed is an "
            "integer from 0 to 2^63-1.",
            show_default="needed",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder to fill, made if it does not exist. One that the same command has "
            "begun goes on; one with another recipe is refused.",
            show_default="needed",
        ),
    ] = None,
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 64,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"What the model computes in: {', '.join(DTYPES)}. The samples stay float32 "
            "between its calls.",
        ),
    ] = "float32",
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Where to sample: cpu, cuda, cuda:1, mps, ...",
            show_default="this process's share of the GPUs, or cpu where there is none",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Threads of each process on a CPU: part of the recipe, since sums round "
            "differently on another number. torchrun gives each of several processes one.",
            show_default="PyTorch's",
            parser=integer,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    model: Network = None,
    config: Config = None,
    shape: Size = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="npy|png|npz",
            help="npy: files 00000.npy, ... of uint8 (images, H, W, C). npz: the same as arr_0 of "
            "00000.npz, ..., in three channels, as guided-diffusion has it; with --shard-size of "
            "all seeds, one file. png: 000/000123.png for seed 123, in EDM's manner.",
        ),
    ] = "npy",
    shard_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images in a shard: one file, or so many PNGs. What a kill can lose.",
            show_default="256, or the next multiple of the batch size",
            parser=integer,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but what is wrong.")] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Make nothing, but read every byte of DIR. The exit status is 0 only if all its "
            "images are there, each once and as it was made.",
        ),
    ] = None,
) -> None:
    """Make any number of images by seed, in any number of processes: exactly those, each once.

    It may be killed at any moment. The same command goes on with what is not there yet, and in
    several processes each takes its share:

    torchrun --nproc-per-node 8 --max-restarts 3 -m fastddim generate --seeds 0-49999 --out DIR

    on one machine, or with --nnodes on several that share DIR; srun does as well. When all have
    ended, fastddim generate --verify DIR says whether all is there, which no exit status of a
    launcher does.

    An image depends on its seed and on the recipe in DIR/manifest.json: not a byte on how many
    processes there were, which of them made it, or how often they were killed. The recipe has
    the kind of machine and on a CPU the number of threads (--threads), since networks round
    differently on another.

    For example: fastddim generate --seeds 0-999 --steps 20 --out garments
    """
    if verify is not None:
        if seeds is not None or out is not None:
            raise ValueError("verify must be given alone, without seeds and out")
        folder = Folder.read(verify)
        folder.verify()
        if not quiet:
            print(f"{verify}: {counted(len(folder.seeds), 'image')}, each as it was made")
        say_not_finite(folder.not_finite)
        return
    if seeds is None or out is None:
        raise ValueError(f"{'seeds' if seeds is None else 'out'} must be given, or verify")
    wanted = Seeds(parse_ranges(seeds))
    whole("batch-size", batch_size, low=1, high=images.LARGEST_BATCH)
    if shard_size is not None:
        whole("shard-size", shard_size, low=1)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if threads is not None:
        torch.set_num_threads(whole("threads", threads, low=1))
    worker = Worker.here()
    worker.end_with_launcher()
    silent, quiet = quiet, quiet or worker.rank > 0
    share = str(worker.device()) if device in (None, "cuda") else device
    loaded, where = load(checkpoint, model, config, shape, share, quiet=quiet)
    images.check_channels(loaded.shape[0])
    ddim = loaded.ddim(steps, eta=number_or_name(eta), spacing=spacing)
    if isinstance(loaded.model, nn.Module):
        loaded.model.to(DTYPES[dtype])
    finished: list[Folder] = []
    with bar_of_images(len(wanted), quiet) as progress:
        generate(
            ddim,
            loaded.model,
            loaded.shape,
            wanted,
            out,
            batch_size,
            format=format,
            shard_size=shard_size,
            progress=progress,
            summary=finished.append,
            device=where,
            dtype=DTYPES[dtype],
        )
    for folder in finished:
        if not silent:
            print(f"{out}: {counted(len(wanted), 'image')}")
        say_not_finite(folder.not_finite, worker.retried)


@app.command("evaluate")
def evaluate_images(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What fastddim generate has filled.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            "--fid",
            metavar="IMAGES",
            help="Measure FID as well, to these: a folder of pictures, or another DIR.",
            show_default="no FID",
        ),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.pth",
            help="torch-fidelity's weights of Inception v3, which are not fetched for you.",
            show_default="where torch-fidelity keeps them",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Measure how far images are from real ones.

    Images of 1x28x28 are compared with garments: FD-clf is the Frechet distance of the features
    of a small classifier to those of the test set, and beside it stands the floor, what as many
    real images score. Both ship. It is no FID and to be compared with FD-clf alone.

    FID is computed by torch-fidelity (pip install 'fastddim[fid]'), with its weights. Compare it
    only between sets of one size: 50,000 images are the custom.

    For example: fastddim evaluate garments
    """
    if inception is not None and reference is None:
        raise ValueError(f"inception must be left out without fid, got {str(inception)!r}")
    made = Folder.read(folder)
    n = counted(len(made.seeds), "image")
    if tuple(made.recipe["shape"]) == embedded.SHAPE or reference is None:
        judged = evaluate.garments(made)
        most = distance.SIZES[-1]
        real = "as many" if len(made.seeds) <= most else f"{most:,}"
        print(f"FD-clf {judged.distance:.4f} of {n}; {real} real garments {judged.floor:.4f}")
    if reference is not None:
        where = images.usable_device(device)
        print(f"FID {evaluate.fid(made, reference, inception, where):.4f} of {n} to {reference}")


@app.command("profile")
def profile_grid(
    steps: Annotated[
        str, typer.Option(metavar="S,S,...", help="The numbers of steps, each 1 to 1000.")
    ] = "10,20,50,100",
    eta: Annotated[
        str,
        typer.Option(
            metavar="ETA,ETA,...",
            help="The etas: numbers >= 0, and hat for DDPM's larger variance. 0 is DDIM, 1 as "
            "DDPM does.",
        ),
    ] = "0,0.2,0.5,1,hat",
    seeds: Annotated[str, seeds_option("The images to draw in each cell")] = "0-255",
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Instead of a model, the exact epsilon of a mixture of eight Gaussians in 64 "
            "dimensions. The distance, FD, is that of the samples themselves to the mixture's "
            "exact mean and covariance, so that what is left is what the sampler gets wrong.",
        ),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Write DIR/trace.json too, to be opened at ui.perfetto.dev: three steps for each "
            'eta, in ranges named "model" and "update".',
        ),
    ] = False,
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 16,
    device: Device = None,
    checkpoint: Checkpoint = None,
    model: Network = None,
    config: Config = None,
    shape: Size = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="The folder for profile.json, profile.csv and profile.png, made if it does not "
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
    number of images, so beside it stands the floor, what as many real images score. Both ship,
    and no data set is needed. Other images are not judged.

    The default grid takes a quarter to half an hour on two CPU cores, with --oracle a minute or so.
    After Ctrl-C what is done is kept, and the same command goes on with the rest.

    For example: fastddim profile --steps 10,50 --eta 0,1,hat --seeds 0-127 --out table1
    """
    etas = [number_or_name(part.strip()) for part in eta.split(",")]
    numbers = parse_steps(steps)
    wanted = parse_seeds(seeds)
    if len(wanted) < 2:
        raise ValueError(f"seeds must be two or more, whose spread can be compared, got {seeds!r}")
    whole("batch-size", batch_size, low=1, high=images.LARGEST_BATCH)
    for name, given in (
        ("checkpoint", checkpoint),
        ("model", model),
        ("config", config),
        ("shape", shape),
    ):
        if oracle and given is not None:
            raise ValueError(f"{name} must be left out with oracle, got {str(given)!r}")
    profile.check_folder(out)
    network: Model
    size: Sequence[int]
    make: Callable[..., DDIM] = DDIM
    judge: profile.Judge | None
    if oracle:
        where, data = images.usable_device(device), profile.oracle()
        network, size = profile.oracle().to(where), data.means.shape[1:]
        judge = profile.mixture(data)
    else:
        loaded, where = load(checkpoint, model, config, shape, device)
        network, size, make = loaded.model, loaded.shape, loaded.ddim
        judge = profile.garments() if size == embedded.SHAPE else None
    ddims = profile.grid(numbers, etas, spacing, make)
    text = "".join(seeds.split())
    settings = profile.settings(network, ddims[0], text, batch_size, where, judge)
    done = profile.read(out, settings)
    finished = {(cell.steps, cell.eta) for cell in done}
    rest = [ddim for ddim in ddims if (len(ddim.pairs), ddim.eta) not in finished]
    profile.make_folder(out)
    if trace:
        longest = profile.grid([max(numbers)], etas, spacing, make)
        path = out / profile.TRACE
        profile.trace(longest, network, size, batch_size, path, device=where)
    try:
        with bar("profiling", profile.model_calls(rest, len(wanted), batch_size)) as progress:
            for cell in profile.cells(
                rest,
                network,
                wanted,
                size,
                batch_size,
                judge=judge,
                device=where,
                progress=progress,
            ):
                done.append(cell)
                profile.save(out, settings, done)
    finally:  # Ctrl-C too
        if done:
            print_cells(done, settings)
            profile.plot(settings, done, out / profile.PNG)
    print(f"{out}: {', '.join(sorted(path.name for path in out.glob('*.*')))}")


def print_cells(done: list[profile.Cell], settings: profile.Settings) -> None:
    judged = settings["distance"]
    names = ["S", "eta", "update ms", "model ms", "images/s", "MB"]
    names += [judged, "floor"] if judged else []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for cell in done:
        memory = "?" if cell.memory_mb is None else f"{cell.memory_mb:.1f}"
        times = f"{cell.update_ms:.3f}", f"{cell.model_ms:.2f}", f"{cell.images_per_second:.1f}"
        quality = (f"{cell.distance:.3f}", f"{cell.floor:.3f}") if judged else ()
        table.add_row(str(cell.steps), profile.label(cell.eta), *times, memory, *quality)
    console = Console(highlight=False)
    console.print(
        Text(
            f"Seeds {settings['seeds']}, {settings['spacing']} spacing, on {settings['device']}. "
            f"Milliseconds are those of a step of {settings['batch_size']} images:"
        )
    )
    console.print(table)
    if not judged:
        console.print(Text("No FD-clf: it compares garments, and these images are not 1x28x28."))


def print_table(done: list[reconstruction.Reconstruction], what: str) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("S", "calls", "error", "seconds"):
        table.add_column(name, justify="right", overflow="fold")
    for row in done:
        cells = (row.ddim.steps, row.calls, f"{row.error:.2e}", f"{row.seconds:.1f}")
        table.add_row(*(str(cell) for cell in cells))
    console = Console(highlight=False)
    console.print(Text(f"{what}. The mean squared error per pixel in [0, 1]:"))
    console.print(table)


def load(
    checkpoint: Path | None,
    model: str | None,
    config: str | None,
    shape: str | None,
    device: str | None,
    quiet: bool = False,
) -> tuple[checkpoints.Loaded, torch.device]:
    """What was asked for, on its device, and the device. What it was taken for is said aloud."""
    where = images.usable_device(device)
    size = None if shape is None else parse_shape(shape)
    if model is None:
        loaded = checkpoints.load(checkpoint, config=config, shape=size)
    elif checkpoint is not None or config is not None:
        raise ValueError("model must be given without checkpoint and config")
    else:
        loaded = checkpoints.build(model, size)
    if isinstance(loaded.model, nn.Module):
        loaded.model.to(where)
    if not quiet and (checkpoint is not None or model is not None):
        print(loaded.description, file=sys.stderr)
    return loaded, where


def calls(ddim: DDIM, n: int, batch_size: int) -> int:
    """How often the model is asked for ``n`` samples."""
    return -(-n // batch_size) * len(ddim.pairs)


def say_not_finite(seeds: Sequence[int], retried: bool = False) -> None:
    """Names the images that hold NaN or infinity, and ends with status 3 where there are some.

    ``retried``: unless whoever started this would start it again for that, in vain.
    """
    if said := holding(seeds):
        print(f"fastddim: {said}", file=sys.stderr)
        if not retried:
            raise typer.Exit(3)


def counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def check_cells(what: str, rows: int, columns: int) -> None:
    if rows * columns > MOST_IMAGES:
        raise ValueError(
            f"{what} must be at most {MOST_IMAGES} images for one picture, got {rows} x {columns}"
        )


def parse_steps(text: str) -> list[int]:
    """ "10,20,50" → its numbers; what they may be is the sampler's to say."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,19}\s*", part) for part in parts):
        raise ValueError(f"steps must be such as 50 or 10,20,50, got {text!r}")
    return [int(part) for part in parts]


def parse_shape(text: str) -> tuple[int, ...]:
    """ "3,32,32" → its numbers."""
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9}){2}", text) is None:
        raise ValueError(f"shape must be C,H,W, such as 3,32,32, got {text!r}")
    return tuple(map(int, text.split(",")))


def parse_seeds(text: str) -> list[int]:
    """ "0-9,20,30-39" → its seeds, in order; no more than a picture holds."""
    ranges = parse_ranges(text)
    # Not len(), which ends at 2^63.
    if (count := sum(r.stop - r.start for r in ranges)) > MOST_IMAGES:
        raise ValueError(f"seeds must be at most {MOST_IMAGES}, got {count}")
    return [seed for r in ranges for seed in r]


def parse_ranges(text: str) -> list[range]:
    """ "0-9,20,30-39" → its ranges, in order."""
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
    return ranges


def number_or_name(text: str) -> Any:
    """A number where it is one; what else η may be is not known here."""
    try:
        return float(text)
    except ValueError:
        return text


@contextmanager
def bar_of_images(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr of how many of ``total`` images there are, told the number from outside.

    Where stderr is no terminal, a line a minute.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        first: list[tuple[int, float]] = []
        lines = [time.perf_counter()]

        def there(n: int) -> None:
            now = time.perf_counter()
            first[:] = first or [(n, now)]
            made, seconds = n - first[0][0], now - first[0][1]
            said = ""
            if made > 0:
                left = timedelta(seconds=round(seconds * (total - n) / made))
                said = f"{made / seconds:.1f} images/s, {left} left"
            progress.update(task, completed=n, description=said)
            if not (quiet or console.is_terminal) and now - lines[0] >= 60:
                lines[0] = now
                print(f"{n} of {total} images, {said or 'none new yet'}", file=sys.stderr)

        yield there


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
