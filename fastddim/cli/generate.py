"""The command ``generate``, which makes any number of images in any number of processes."""

import sys
from pathlib import Path
from typing import Annotated, Any

from fastddim.check import whole
from fastddim.cli import bars, values
from fastddim.cli.draw import say_not_finite
from fastddim.cli.options import (
    BatchSize,
    Eta,
    Machine,
    Network,
    Order,
    Spacing,
    Steps,
    for_all,
    number,
    option,
)
from fastddim.cli.values import counted
from fastddim.tools.pace import Count
from fastddim.tools.seeds import Seeds, parse_ranges


def generate(
    machine: Machine,
    network: Network,
    seeds: Annotated[
        str | None,
        option(
            "--seeds",
            "SEEDS",
            "The images to make, for example 0-49999 or 0-9,20,30-39, each seed once. A seed is an "
            "integer from 0 to 2^63-1.",
            show_default="needed",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "DIR",
            "The folder to fill, which is made if it does not exist. The command continues a "
            "folder that it began, also with further seeds after the old ones. It refuses a "
            "folder with another recipe.",
            show_default="needed",
        ),
    ] = None,
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    order: Order = 1,
    batch_size: BatchSize = 64,
    format: Annotated[
        str,
        option(
            "--format",
            "npy|png|npz",
            "npy: files 00000.npy, ... of uint8 (images, H, W, C). npz: files 00000.npz, ... with "
            "the same array as arr_0, in three channels, which guided-diffusion's evaluator "
            "reads; it needs one file, so give --shard-size the number of seeds. png: "
            "000/000123.png for seed 123, the layout of EDM.",
        ),
    ] = "npy",
    shard_size: Annotated[
        int | None,
        number(
            "--shard-size",
            "N",
            "The number of images in a shard, which is one file, or N PNGs. A killed process "
            "loses at most its unfinished shard.",
            show_default="256, or the next multiple of the batch size",
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        option(
            "--verify",
            "DIR",
            "Read every byte of DIR and make no image. The exit status is 0 only if all images "
            "exist once and unchanged, and no sample held NaN or infinity.",
        ),
    ] = None,
) -> None:
    """Make any number of images by seed, in any number of processes, each image exactly once.

    The command may be killed at any moment: the same command then makes the missing images.
    Each of several processes makes its share:

    torchrun --nproc-per-node 8 --max-restarts 3 -m fastddim generate --seeds 0-49999 --out DIR

    This runs on one machine, or with --nnodes on several machines that share DIR. srun works too.
    When all processes have ended, run fastddim generate --verify DIR: a launcher's exit status
    does not tell whether the folder is complete. If stderr is not a terminal, the command prints
    its progress once a minute.

    The bytes of an image depend on its seed and on the recipe in DIR/manifest.json alone, and not
    on the number of processes, on which of them made it, or on kills. The recipe includes the
    kind of machine and, on a CPU, the number of threads (--threads), because networks round
    differently when these change.

    The exit status is 3 if samples hold NaN or infinity; their seeds are printed and kept in the
    manifest. Under torchrun the status is then 0, because torchrun would restart all processes.

    For example: fastddim generate --seeds 0-999 --steps 20 --out garments
    """
    if verify is not None:
        if seeds is not None or out is not None:
            raise ValueError("verify must be given alone, without seeds and out")
        with bars.spinner("reading", machine.quiet):
            from fastddim.tools.folder import Folder

            folder = Folder.read(verify)
            folder.verify()
        if not machine.quiet:
            print(f"{verify}: {counted(len(folder.seeds), 'image')}, each as it was made")
        say_not_finite(folder.not_finite)
        return
    with for_all():
        if seeds is None or out is None:
            raise ValueError(f"{'seeds' if seeds is None else 'out'} must be given, or verify")
        ranges = parse_ranges(seeds)
        noise = values.parse_eta(eta)
        values.check_common(batch_size, spacing, order)
        if shard_size is not None:
            whole("shard-size", shard_size, low=1)
        values.one_of("format", format, values.FORMATS)
    with bars.spinner("loading", machine.quiet), for_all():
        import torch

        from fastddim.cli.network import prepare
        from fastddim.tools import images
        from fastddim.tools.folder import Folder
        from fastddim.tools.shards import Worker
        from fastddim.tools.shards import generate as generated

        wanted = Seeds(ranges)
        worker = Worker.here()
        worker.end_with_launcher()
        one = Machine(machine.device, machine.threads, machine.quiet or worker.rank > 0)
        share = str(worker.device()) if machine.device in (None, "cuda") else machine.device
        prepared = prepare(Machine(share, one.threads, one.quiet), network)
        images.check_channels(prepared.shape[0])
        ddim = prepared.ddim(steps, eta=noise, spacing=spacing, order=order)
    there = [0]
    finished: list[Folder] = []
    total = len(wanted)
    with bars.bar_of_images(total, one.quiet) as progress:

        def tell(n: Count) -> None:
            there[0] = n
            progress(n)

        complete = generated(
            ddim,
            prepared.model,
            prepared.shape,
            wanted,
            out,
            batch_size,
            format=format,
            shard_size=shard_size,
            progress=tell,
            summary=finished.append,
            device=prepared.device,
            dtype=prepared.dtype or torch.float32,
            **conditions(prepared),
        )
    for folder in finished:  # only in the process that finished the folder
        if not machine.quiet:
            print(f"{out}: {counted(total, 'image')}")
        say_not_finite(folder.not_finite, worker.retried)
    if not complete and not one.quiet:
        print(
            f"{out}: {there[0]} of {counted(total, 'image')}; other processes still make the "
            f"rest, and fastddim generate --verify {out} tells when all are finished",
            file=sys.stderr,
        )


def conditions(prepared: Any) -> dict[str, Any]:
    """Returns class and guidance as ``fastddim.generate`` takes them: functions of seeds."""
    from functools import partial

    model_options: dict[str, Any] = {}
    if prepared.label is not None:
        model_options["cond"] = partial(labels, label=prepared.label, device=str(prepared.device))
    if prepared.guidance is not None:
        model_options["uncond"] = partial(
            labels, label=prepared.no_class, device=str(prepared.device)
        )
        model_options["guidance"] = prepared.guidance
    return model_options


def labels(seeds: list[int], *, label: int, device: str) -> dict[str, Any]:
    """Returns the keyword argument of a class-conditional network, the same for each seed.

    Recipes in manifests hold the path of this function: do not rename or move it.
    """
    import torch

    return {"class_labels": torch.full((len(seeds),), label, device=device)}
