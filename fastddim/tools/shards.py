"""N images from any number of processes, which may be killed at any moment: exactly N, once each.

The seeds are cut into shards, shard k being ``seeds[k·S:(k+1)·S]`` whatever the number of
processes, and process r of W makes the shards r, r + W, r + 2W, ... that are not there yet. They
share a folder and nothing else: no process group, no lock.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastddim.check import kind, whole
from fastddim.loop.model import Cond, Model
from fastddim.loop.options import DownOptions, PrecisionOptions, option_names
from fastddim.loop.sampler import DDIM
from fastddim.step import backends
from fastddim.tools import draw, images, provenance
from fastddim.tools.folder import FORMATS, Folder, holding
from fastddim.tools.launch import PARENT
from fastddim.tools.pace import Pace, There
from fastddim.tools.seeds import Seeds

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array: TypeAlias = npt.NDArray[Any]
Given: TypeAlias = Callable[[list[int]], Cond]
Postprocess: TypeAlias = Callable[[Tensor], "Tensor | Array"]


class ConditionsOfSeeds(TypedDict, total=False):
    """The functions that make the model's keyword arguments of a batch's seeds."""

    cond: Given | None
    uncond: Given | None


class Options(ConditionsOfSeeds, DownOptions, PrecisionOptions, total=False):
    """What ``generate`` and ``shard`` take beside the images they are asked for."""

    postprocess: Postprocess


SAMPLER = (
    "steps",
    "eta",
    "spacing",
    "pairs",
    "prediction",
    "clip",
    "final_alpha_cumprod",
    "temperature",
)
"""What a recipe says of a ``DDIM``, beside its schedule."""

OPTIONS = tuple(name for name in option_names(Options) if name not in ("postprocess", "device"))
"""What it says of a call, beside ``postprocess``."""

SMALLEST_SHARD = 256
"""Images in a shard at the least, where none is asked for: what a kill can lose, and one file."""


def generate(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    seeds: Sequence[int],
    out: Path | str,
    batch_size: int,
    *,
    format: str = "npy",
    shard_size: int | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: Callable[[There], None] | None = None,
    summary: Callable[[Folder], None] | None = None,
    **options: Unpack[Options],
) -> bool:
    """Makes the images of ``seeds`` in the folder ``out``, or those of them not there yet.

    In each of several processes (``Worker.here`` says which this is) it makes that process's
    shards. It may be killed at any moment, and called again with the same arguments, in as many
    processes as one likes: on the same architecture, backend and batch size, which are in the
    manifest, no byte of the images depends on that. A process that a launcher has started ends
    with it.

    Args:
        ddim, model, shape, batch_size, options: as in ``shard``.
        seeds: an integer in [0, 2⁶³) for each image, none of them twice.
        out: a folder, new or empty or with a manifest of the same recipe, in one that exists. The
            recipe may have been that of the first of ``seeds`` alone: then what is there stays,
            and the rest is made.
        format: ``"npy"``: shards 00000.npy, ... of what ``shard`` returns. ``"npz"``: the same as
            ``arr_0`` of 00000.npz, ..., which guided-diffusion's scripts read. ``"png"``: the
            image of seed 123 as 000/000123.png, as EDM's scripts have it.
        shard_size: S, by default the least multiple of ``batch_size`` that is ≥ 256. Others may
            end in a batch that is padded.
        notes: what else the recipe holds: plain values, such as where prompts come from.
        progress: called in the process of rank 0, at first and after each step of each batch,
            with the number of images that are there, of all processes, an int that also knows
            the pace.
        summary: called with the finished folder, in one process alone: in the one that finishes
            it, whichever that is, or in that of rank 0 where there was nothing left to do.

    Returns:
        Whether all images are there. Other processes may still be at theirs. The finished
        folder's ``warning`` names the seeds of samples that hold NaN or infinity, as its manifest
        does.

    Raises:
        TypeError, ValueError: before any work; or for a recipe that is not the folder's, naming
            the differences.
        OSError: ``out`` cannot be written to. The shards that are there remain whole.
    """
    worker = Worker.here()
    worker.end_with_launcher()
    recipe = _recipe(ddim, model, shape, seeds, batch_size, format, shard_size, notes, options)
    tell = progress if progress is not None and worker.rank == 0 else None
    folder = Folder.begin(Path(out), recipe, worker.rank)
    folder.clear(worker.rank, worker.world)
    was_finished = bool(folder.checksums)
    share = folder.missing(worker.rank, worker.world)
    pace = Pace(len(folder.seeds), share, folder.count, tell)
    for k in range(worker.rank, len(folder), worker.world):
        if folder.has(k):
            continue
        pace.shard()
        arrays: list[Array] = []
        odd: list[int] = []
        for array, not_finite in _arrays(
            ddim, model, shape, folder.seeds_of(k), batch_size, options, pace.step
        ):
            arrays.append(array)
            odd += not_finite
            pace.batch(len(array))
        folder.write(k, np.concatenate(arrays), odd)
    complete = folder.finish()
    pace.shard()
    if summary and (folder.finished_here or (complete and was_finished and worker.rank == 0)):
        summary(folder)
    return complete


def shard(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    seeds: Sequence[int],
    batch_size: int,
    **options: Unpack[Options],
) -> Array:
    """The images of ``seeds`` as one array: a pure function, for engines that have workers.

    For example::

        make = functools.partial(shard, ddim, model, (1, 28, 28), batch_size=64)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            arrays = pool.map(make, [range(0, 256), range(256, 512)])

    and with Ray Data ``from_items([{"seeds": ...}, ...]).map(lambda row: {"images":
    make(row["seeds"])})``. Where the workers are processes, the model must pickle.

    Args:
        ddim, model: as in ``DDIM.sample``; the model is on the device already.
        shape: of one sample, without the batch.
        seeds: an integer in [0, 2⁶³) for each sample. A sample depends on its seed alone.
        batch_size: what every call of the model gets, the last batch being padded.
        cond, uncond: functions of a batch's seeds that give the model's keyword arguments.
        postprocess: what becomes of the samples of a full batch, such as a decoder: a function
            that gives a tensor or an array with a row for each. ``pictures`` by default.
        device, dtype, autocast, guidance, cond_fn, self_condition: as in ``DDIM.sample``.

    Returns:
        What ``postprocess`` gives, a row for each seed: by default uint8 (N, H, W, C).

    Warns:
        RuntimeWarning: samples hold NaN or infinity; it names their seeds.
    """
    made = list(_arrays(ddim, model, shape, seeds, batch_size, options))
    if said := holding([seed for _, not_finite in made for seed in not_finite]):
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    return np.concatenate([array for array, _ in made])


def pictures(x: Tensor) -> Tensor:
    """Samples (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C), rounded to the nearest."""
    return images.to_uint8(x).movedim(1, -1).contiguous()


def _arrays(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    seeds: Sequence[int],
    batch_size: int,
    options: Options,
    begun: Callable[[float], None] | None = None,
) -> Iterator[tuple[Array, list[int]]]:
    """A batch at a time, the padding left out last: a decoder, too, sees full batches.

    With each batch come the seeds of those of its samples, or of the rows that ``postprocess``
    has made of them, that hold NaN or infinity. ``begun`` is called after each step with how many
    images the steps that are done amount to.
    """
    given: dict[str, Any] = {**options}
    conds = {name: given.pop(name, None) for name in ("cond", "uncond")}
    postprocess = given.pop("postprocess", pictures)
    for batch, n in draw.full_batches(seeds, batch_size):
        asked: dict[str, Any] = {name: f(batch) if f else None for name, f in conds.items()}

        def steps(rows: Iterable[Any], n: int = n) -> Iterator[Any]:
            for done, row in enumerate(rows):
                if begun and done:
                    begun(n * done / len(ddim.pairs))
                yield row

        x = ddim.sample(
            model, shape=(batch_size, *shape), seeds=batch, progress=steps, **asked, **given
        )
        made = postprocess(x)
        array = made.detach().cpu().numpy() if isinstance(made, Tensor) else np.asarray(made)
        if array.ndim == 0 or len(array) != batch_size:
            raise ValueError(
                f"postprocess must give a row for each of {batch_size} samples, got shape "
                f"{array.shape}"
            )
        odd = set(images.not_finite(x[:n]))
        if array.dtype.kind in "fc":  # a decoder may overflow where x does not
            odd.update(np.flatnonzero(~np.isfinite(array[:n]).reshape(n, -1).all(1)).tolist())
        yield array[:n], [batch[i] for i in sorted(odd)]


class Worker(NamedTuple):
    """Which of the processes this is: ``rank`` of ``world``, the ``local``-th of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    launched: bool = False
    retried: bool = False
    """Whether its launcher, torchrun, starts all processes again where one ends with a status."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Worker:
        """As torchrun says, or else Slurm's srun; alone where neither does."""
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            # Not SLURM_NTASKS: a batch script has that too, where no one else is at work.
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ):
            said = [environment.get(name) for name in names]
            said[2] = said[2] or "0"  # a launcher of one process a machine may not say
            if None not in said:
                numbers = (_natural(name, text) for name, text in zip(names, said, strict=True))
                rank, world, local = numbers
                whole(names[0], rank, low=0, high=world - 1)
                torchrun = names[0] == "RANK" and "TORCHELASTIC_RUN_ID" in environment
                return cls(rank, world, local, launched=True, retried=torchrun)
        return cls()

    def end_with_launcher(self) -> None:
        """From now on this process ends once a launcher that started it is gone.

        Killed alone, torchrun leaves its workers behind, beside those of its next start.
        """
        if self.launched:
            _end_with_parent()

    def device(self) -> torch.device:
        """Its share of the machine's GPUs; the CPU where there is none.

        Slurm may show each process its own GPU alone, hence the remainder.
        """
        if n := torch.cuda.device_count():
            return torch.device("cuda", self.local % n)
        return torch.device("cpu")


def _natural(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal():
        raise ValueError(f"{name} must be an integer ≥ 0, got {text!r}")
    return int(text)


@functools.cache
def _end_with_parent() -> None:
    def watch() -> None:
        while os.getppid() == PARENT:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _recipe(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    seeds: Sequence[int],
    batch_size: int,
    format: str,
    shard_size: int | None,
    notes: Mapping[str, Any] | None,
    options: Options,
) -> dict[str, Any]:
    """All that the bytes depend on, as plain values; or what is wrong with the arguments."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    size = whole("batch_size", batch_size, low=1, high=draw.LARGEST_BATCH)
    if shard_size is None:
        shard_size = -(-SMALLEST_SHARD // size) * size
    shard_size = whole("shard_size", shard_size, low=1)
    if unknown := options.keys() - set(option_names(Options)):
        raise TypeError(f"{min(unknown)} is none of {', '.join(OPTIONS)}, postprocess and device")
    for name in ("cond", "uncond"):
        if (given := options.get(name)) is not None and not callable(given):
            raise TypeError(f"{name} must be a function of a batch's seeds, got {kind(given)}")
    postprocess = options.get("postprocess", pictures)
    if not callable(postprocess):
        raise TypeError(f"postprocess must be callable, got {kind(postprocess)}")
    sides = [whole(f"shape[{i}]", n, low=1) for i, n in enumerate(shape)]
    if postprocess is pictures and (len(sides) != 3 or sides[0] not in (1, 3)):
        raise ValueError(
            f"postprocess must be given for shape {tuple(sides)}, since pictures have 1 or 3 "
            f"channels, height and width"
        )
    from fastddim import __version__  # not there yet when this module is imported

    keys = Seeds.of(seeds)
    device = torch.device(options.get("device") or torch.get_default_device())
    backend = backends.backend(device).name
    packages = {"torch", "numpy", backend, *(("pillow",) if format == "png" else ())}
    if isinstance(model, nn.Module):
        packages |= provenance.packages(model) - {"fastddim"}
    recipe = {
        "images": len(keys),
        "seeds": str(keys),
        "shape": sides,
        "format": format,
        "shard_size": shard_size,
        "batch_size": size,
        "model": _described(model),
        "schedule": {
            "name": ddim.schedule.name,
            "T": len(ddim.schedule),
            "sha256": hashlib.sha256(ddim.schedule.alphas_cumprod.tobytes()).hexdigest(),
        },
        **{name: getattr(ddim, name) for name in SAMPLER},
        **{name: _plain(options.get(name)) for name in OPTIONS},
        "postprocess": _plain(postprocess),
        "architecture": provenance.architecture(device),
        "threads": provenance.threads(device),
        "backend": f"{device.type}, {backend}",
        "versions": {"fastddim": __version__, **provenance.versions(*sorted(packages))},
        "notes": dict(notes or {}),
    }
    # What is compared is what a file says.
    plain: dict[str, Any] = json.loads(json.dumps(recipe))
    return plain


def _described(model: Model) -> dict[str, Any]:
    """What it is, and of a network its weights and, where it has one, its configuration."""
    if not isinstance(model, nn.Module):
        return {"name": _plain(model)}
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((config for config in configs if isinstance(config, Mapping)), {})
    return {
        "name": _plain(type(model)),
        "weights": provenance.digest(model),
        "config": {name: _plain(config[name]) for name in sorted(config) if name[0] != "_"},
    }


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: a function by its name, tensors and networks by their checksums."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, functools.partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, nn.Module):
        return _described(value)
    if isinstance(owner := getattr(value, "__self__", None), nn.Module):  # a decoder's method
        return {"of": _described(owner), "method": value.__name__}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


class _Called(ModuleType):
    """This module, which can be called as the function of its name.

    ``fastddim.generate(...)`` and ``import fastddim.generate as g; g.shard`` both have to work,
    and one attribute of the package serves both. A function in its place would hide the module.
    """

    __call__ = staticmethod(generate)
    __signature__ = inspect.signature(generate)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Pickles by name, as the function does: pools of processes are handed it."""
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _Called
