"""The command ``tune``, which searches timesteps for a model."""

from pathlib import Path
from typing import Annotated

from fastddim.check import whole
from fastddim.cli import bars, values
from fastddim.cli.draw import written
from fastddim.cli.options import BatchSize, Machine, Network, Order, number, option, seeds_option
from fastddim.cli.values import counted

MEMORY = ".search"
"""The suffix of the file beside ``--out`` that keeps the distances of an unfinished search."""


def tune(
    machine: Machine,
    network: Network,
    steps: Annotated[
        str,
        option(
            "--steps", "S,S,...", "The numbers of steps to search timesteps for, each 2 or more."
        ),
    ] = "6,8,10",
    order: Order = 2,
    seeds: Annotated[
        str, seeds_option("The images to compare, 8 or more; judge the result on other seeds")
    ] = "0-127",
    fine: Annotated[
        int,
        number("--fine", "N", "The number of steps of the images to come close to."),
    ] = 100,
    batch_size: BatchSize = 64,
    out: Annotated[
        Path,
        option("--out", "FILE.json", "The file to write or replace, in a folder that exists."),
    ] = Path("tau.json"),
) -> None:
    """Search the timesteps with which few steps come closest to many, without training.

    For each number of steps the search begins at the best of the named spacings, and moves one
    timestep at a time while a distance falls. For images of 1x28x28 it is FD-clf, the distance to
    real garments that fastddim profile measures. For others it is the Frechet distance to the
    images that --fine steps draw for the same seeds, in the first principal components of their
    pixels. The first timestep stays at the noisiest level.

    Every command that draws takes the result: --spacing tau.json. It warns where the model, its
    noise schedule or the order is another than in the search.

    The command first says how long it takes at most. The search is deterministic. After Ctrl-C
    FILE.json.search keeps the distances that are measured, and the same command goes on.

    For example: fastddim tune --steps 8 --seeds 0-127 --out tau.json
    """
    numbers = values.parse_steps(steps)
    wanted = values.parse_seeds(seeds)
    values.check_common(batch_size, "uniform", order)
    whole("fine", fine, low=3)
    with bars.spinner("loading", machine.quiet):
        from fastddim import embedded
        from fastddim.cli.network import prepare
        from fastddim.files import check_out
        from fastddim.tools import distance, tuning

        path = check_out(out, ".json")
        prepared = prepare(machine, network)
        ddim = prepared.ddim(order=order)
        real = distance.load() if prepared.shape == embedded.SHAPE else None
        model_options = prepared.options(batch_size)
        search = tuning.Search(
            ddim,
            prepared.model,
            prepared.shape,
            numbers,
            seeds=wanted,
            batch_size=batch_size,
            fine=fine,
            features=real.of if real else None,
            real=real.moments if real else None,
            memory=path.with_name(path.name + MEMORY),
            device=prepared.device,
            **model_options,
        )
        seconds = search.seconds()
    if not machine.quiet:
        print(
            f"{search.model_calls():,} model calls of {batch_size} images at most, about "
            f"{max(1, round(seconds / 60))} min",
            flush=True,
        )
    with bars.bar("tuning", search.model_calls(), machine.quiet) as progress:
        tuned = search.run(progress)
    replaced = path.exists()
    tuned.write(path)
    search.memory.remove()
    judged = "FD-clf" if real else "distance"
    bars.print_table(
        f"Order {order}, {counted(len(wanted), 'image')}. The {judged} of the best name, and of "
        f"the timesteps found:",
        ("S", "spacing", judged, "found", "timesteps"),
        [
            (S, f.start, f"{f.before:.3f}", f"{f.distance:.3f}", " ".join(map(str, f.tau)))
            for S, f in search.found.items()
        ],
    )
    if not machine.quiet:
        print(written(path, replaced))
