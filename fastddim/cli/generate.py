"""The command that makes any number of images: generate."""

import sys
from pathlib import Path
from typing import Annotated, Any

from fastddim.check import whole
from fastddim.cli import bars, options
from fastddim.cli.draw import say_not_finite
from fastddim.cli.options import (
    BatchSize,
    Eta,
    Machine,
    Network,
    Spacing,
    Steps,
    counted,
    for_all,
    number,
    option,
)
from fastddim.tools.pace import There


def generate(
    machine: Machine,
    network: Network,
    seeds: Annotated[
        str | None,
        option(
            "--seeds",
            "SEEDS",
            "The images to make: 0-49999, or 0-9,20,30-39, each seed once. A seed is an "
            "integer from 0 to 2^63-1.",
            show_default="needed",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "DIR",
            "The folder to fill, made if it does not exist. One that the same command has "
            "begun goes on, with more seeds after those it has too; one with another recipe is "
            "refused.",
            show_default="needed",
        ),
    ] = None,
    steps: Steps = 50,
    eta: Eta = "0",
    spacing: Spacing = "uniform",
    batch_size: BatchSize = 64,
    format: Annotated[
        str,
        option(
            "--format",
            "npy|png|npz",
            "npy: files 00000.npy, ... of uint8 (images, H, W, C). npz: the same as arr_0 of "
            "00000.npz, ..., in three channels, as guided-diffusion has it; with --shard-size of "
            "all seeds, one file. png: 000/000123.png for seed 123, in EDM's manner.",
        ),
    ] = "npy",
    shard_size: Annotated[
        int | None,
        number(
            "--shard-size",
            "N",
            "Images in a shard: one file, or so many PNGs. What a kill can lose.",
            show_default="256, or the next multiple of the batch size",
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        option(
            "--verify",
            "DIR",
            "Make nothing, but read every byte of DIR. The exit status is 0 only if all its "
            "images are there, each once and as it was made, and none holds NaN or infinity.",
        ),
    ] = None,
) -> None:
    """Make any number of images by seed, in any number of processes: exactly those, each once.

    It may be killed at any moment. The same command goes on with what is not there yet, and in
    several processes each takes its share:

    torchrun --nproc-per-node 8 --max-restarts 3 -m fastddim generate --seeds 0-49999 --out DIR

    on one machine, or with --nnodes on several that share DIR; srun does as well. When all have
    ended, fastddim generate --verify DIR says whether all is there, which no exit status of a
    launcher does. Where stderr is no terminal, a line a minute says how far it is.

    An image depends on its seed and on the recipe in DIR/manifest.json: not a byte on how many
    processes there were, which of them made it, or how often they were killed. The recipe has
    the kind of machine and on a CPU the number of threads (--threads), since networks round
    differently on another.

    The exit status is 3 where images hold NaN or infinity, whose seeds are said and kept in the
    manifest; under torchrun it is 0, which would start everything again otherwise.

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
        ranges = options.parse_ranges(seeds)
        noise = options.parse_eta(eta)
        options.check_common(batch_size, spacing)
        if shard_size is not None:
            whole("shard-size", shard_size, low=1)
        options.one_of("format", format, options.FORMATS)
    with bars.spinner("loading", machine.quiet), for_all():
        import torch

        from fastddim.cli.network import prepare
        from fastddim.tools import images
        from fastddim.tools.folder import Folder, Seeds
        from fastddim.tools.shards import Worker
        from fastddim.tools.shards import generate as generated

        wanted = Seeds(ranges)
        worker = Worker.here()
        worker.end_with_launcher()
        one = Machine(machine.device, machine.threads, machine.quiet or worker.rank > 0)
        share = str(worker.device()) if machine.device in (None, "cuda") else machine.device
        asked = prepare(Machine(share, one.threads, one.quiet), network)
        images.check_channels(asked.shape[0])
        ddim = asked.ddim(steps, eta=noise, spacing=spacing)
    there = [0]
    finished: list[Folder] = []
    total = len(wanted)
    with bars.bar_of_images(total, one.quiet) as progress:

        def tell(n: There) -> None:
            there[0] = n
            progress(n)

        complete = generated(
            ddim,
            asked.model,
            asked.shape,
            wanted,
            out,
            batch_size,
            format=format,
            shard_size=shard_size,
            progress=tell,
            summary=finished.append,
            device=asked.device,
            dtype=asked.dtype or torch.float32,
            **conditions(asked),
        )
    for folder in finished:  # in one process of several, the one that has finished it
        if not machine.quiet:
            print(f"{out}: {counted(total, 'image')}")
        say_not_finite(folder.not_finite, worker.retried)
    if not complete and not one.quiet:
        print(
            f"{out}: {there[0]} of {counted(total, 'image')}; other processes are still at the "
            f"rest, and fastddim generate --verify {out} says when all are there",
            file=sys.stderr,
        )


def conditions(asked: Any) -> dict[str, Any]:
    """The class as ``fastddim.generate`` takes it: functions of a batch's seeds."""
    from functools import partial

    told: dict[str, Any] = {}
    if asked.label is not None:
        told["cond"] = partial(labels, label=asked.label, device=str(asked.device))
    if asked.guidance is not None:
        told["uncond"] = partial(labels, label=asked.no_class, device=str(asked.device))
        told["guidance"] = asked.guidance
    return told


def labels(seeds: list[int], *, label: int, device: str) -> dict[str, Any]:
    """The keyword argument of a network that is told a class, the same for each seed."""
    import torch

    return {"class_labels": torch.full((len(seeds),), label, device=device)}
