"""Images by Ray tasks: a killed worker loses one shard, which Ray gives to another.

Each task makes a shard by the pure function ``fastddim.tools.shards.shard``, and this process
writes the shard. The folder equals that of ``fastddim generate`` with the same options, byte for
byte, and ``fastddim generate`` continues it. The script needs the extra ``ray``.

    python examples/generate_ray.py --seeds 512 --out garments
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from fastddim import DDIM, checkpoints
from fastddim.models.loaded import Loaded
from fastddim.tools.shards import begin, shard

OPTIONS: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def made(
    loaded: Loaded,
    ddim: DDIM,
    seeds: Sequence[int],
    batch_size: int,
    threads: int,
    killed: Path | None,
) -> npt.NDArray[Any]:
    """Makes a shard in a worker.

    Args:
        threads: of PyTorch, on which the last bits depend. Ray's own choice is one for each CPU of
            the task.
        killed: a file; the first worker that finds none makes it, and is killed.
    """
    if killed is not None and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # A sample that holds NaN ends the run.
        return shard(ddim, loaded.model, loaded.shape, seeds, batch_size, **OPTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=512, help="number of images")
    parser.add_argument("--steps", type=int, default=20, help="number of model calls per image")
    parser.add_argument("--batch-size", type=int, default=64, help="number of images per call")
    parser.add_argument("--shard-size", type=int, default=256, help="number of images per task")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of each worker")
    parser.add_argument("--out", type=Path, default=Path("garments"), help="the folder to fill")
    parser.add_argument("--kill", action="store_true", help="kill the first worker, to see a retry")
    given = parser.parse_args()

    torch.set_num_threads(given.threads)  # The recipe in the manifest names the threads.
    loaded = checkpoints.load(None)
    ddim = loaded.ddim(given.steps)
    folder = begin(
        ddim,
        loaded.model,
        loaded.shape,
        range(given.seeds),
        given.out,
        given.batch_size,
        shard_size=given.shard_size,
        **OPTIONS,
    )
    missing = [k for k in range(len(folder)) if not folder.has(k)]
    killed = given.out.resolve().with_name(f"{given.out.name}.killed") if given.kill else None

    ray.init(include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=given.threads, max_retries=3)(made)
    model = ray.put(loaded)  # once, and not with every task
    pending = {
        task.remote(model, ddim, folder.seeds_of(k), given.batch_size, given.threads, killed): k
        for k in missing
    }
    while pending:
        [done], _ = ray.wait(list(pending))
        folder.write(pending.pop(done), np.asarray(ray.get(done)))
    ray.shutdown()
    print(f"{given.out}: {given.seeds} images, finished: {folder.finish()}")
    if killed is not None:
        print(f"a worker was killed: {killed.exists()}")
        killed.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
