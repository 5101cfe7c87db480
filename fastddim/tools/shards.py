"""N images, each exactly once, from any number of processes that may be killed at any moment.

Shard k is ``seeds[k·S:(k+1)·S]``, whatever the number of processes. Process r of W makes the
missing shards among r, r + W, r + 2W, ... The processes share a folder and nothing else: no process
group, no lock.
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
from fastddim.tools.pace import Count, Pace
from fastddim.tools.seeds import Seeds
from fastddim.tuned import Tuned
from fastddim.variances import Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array: TypeAlias = npt.NDArray[Any]
CondOfSeeds: TypeAlias = Callable[[list[int]], Cond]
Postprocess: TypeAlias = Callable[[Tensor], "Tensor | Array"]


class ConditionsOfSeeds(TypedDict, total=False):
    """Functions that return the model's keyword arguments for a batch's seeds."""

    cond: CondOfSeeds | None
    uncond: CondOfSeeds | None


class Options(ConditionsOfSeeds, DownOptions, PrecisionOptions, total=False):
    """The options of ``generate`` and ``shard``."""

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
"""The attributes of ``DDIM`` in a recipe, beside its schedule."""

OPTIONS = tuple(name for name in option_names(Options) if name not in ("postprocess", "device"))
"""The options of a call in a recipe, beside ``postprocess``."""

PICTURES = "fastddim.generate.pictures"
"""The name of ``pictures`` in recipes. It is the path of an earlier version: with another name
the folders that it began would be refused."""

SMALLEST_SHARD = 256
"""The least default ``shard_size``: a shard is one file, and a kill loses at most one shard."""


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
    progress: Callable[[Count], None] | None = None,
    summary: Callable[[Folder], None] | None = None,
    **options: Unpack[Options],
) -> bool:
    """Makes the missing images of ``seeds`` in the folder ``out``.

    In each of several processes (see ``Worker.here``) it makes that process's shards. It may be
    killed at any moment, and called again with the same arguments in any number of processes:
    with the same architecture, backend and batch size, which are in the manifest, no byte of the
    images depends on this. A process that a launcher started ends when the launcher ends.

    Args:
        ddim, model, shape, batch_size, options: as in ``shard``.
        seeds: an integer in [0, 2⁶³) for each image, each seed once.
        out: a folder that is new, empty, or has a manifest of the same recipe, in a folder that
            exists. The manifest may have the first of ``seeds`` alone: then the existing images
            stay, and the others are made.
        format: ``"npy"``: shards 00000.npy, ... as ``shard`` returns them. ``"npz"``: the same as
            ``arr_0`` of 00000.npz, ..., which guided-diffusion's scripts read. ``"png"``: the
            image of seed 123 as 000/000123.png, the layout of EDM's scripts.
        shard_size: S, by default the least multiple of ``batch_size`` that is ≥ 256. With other
            values shards may end in a padded batch.
        notes: further plain values for the recipe, such as the source of prompts.
        progress: receives a ``Count`` of the finished images of all processes, at first and after
            each step of each batch, in the process of rank 0 alone.
        summary: receives the finished folder, in one process alone: the process that finishes it,
            or the process of rank 0 if the folder was finished before.

    Returns:
        Whether all images are finished; if not, other processes still make theirs. The finished
        folder's ``warning`` and its manifest name the seeds of samples that hold NaN or infinity.

    Raises:
        TypeError, ValueError: before any work: an argument is not allowed, or the folder has
            another recipe; the error names the differences.
        OSError: ``out`` cannot be written to. Finished shards stay intact.
    """
    worker = Worker.here()
    worker.end_with_launcher()
    tell = progress if progress is not None and worker.rank == 0 else None
    folder = begin(
        ddim,
        model,
        shape,
        seeds,
        out,
        batch_size,
        format=format,
        shard_size=shard_size,
        notes=notes,
        rank=worker.rank,
        **options,
    )
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


def begin(
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
    rank: int = 0,
    **options: Unpack[Options],
) -> Folder:
    """Returns the folder that ``generate`` fills, for engines whose workers call ``shard``.

    For each k in range(len(folder)) where ``folder.has(k)`` is false, the engine writes
    ``folder.write(k, shard(ddim, model, shape, folder.seeds_of(k), batch_size, **options))``. At
    last ``folder.finish()`` writes the manifest. No byte differs from the folder of ``generate``.

    Args:
        rank: of this process. The process of rank 0 extends a folder of fewer seeds.

    The other arguments and the exceptions are those of ``generate``.
    """
    recipe = _recipe(ddim, model, shape, seeds, batch_size, format, shard_size, notes, options)
    return Folder.begin(Path(out), recipe, rank)


def shard(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    seeds: Sequence[int],
    batch_size: int,
    **options: Unpack[Options],
) -> Array:
    """Returns the images of ``seeds`` as one array: a pure function, for engines with workers.

    For example::

        make = functools.partial(shard, ddim, model, (1, 28, 28), batch_size=64)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            arrays = pool.map(make, [range(0, 256), range(256, 512)])

    and with Ray Data ``from_items([{"seeds": ...}, ...]).map(lambda row: {"images":
    make(row["seeds"])})``. Where the workers are processes, the model must pickle.

    Args:
        ddim, model: as in ``DDIM.sample``; the model is on the device already.
        shape: the shape of one sample, without the batch.
        seeds: an integer in [0, 2⁶³) for each sample. A sample depends on its seed alone.
        batch_size: the number of samples in every call of the model; the last batch is padded.
        cond, uncond: functions that return the model's keyword arguments for a batch's seeds.
        postprocess: a function, such as a decoder, that maps the samples of a full batch to a
            tensor or an array with a row for each. ``pictures`` by default.
        device, dtype, autocast, guidance, cond_fn, self_condition: as in ``DDIM.sample``.

    Returns:
        The rows that ``postprocess`` returns, one for each seed: by default uint8 (N, H, W, C).

    Warns:
        RuntimeWarning: samples hold NaN or infinity; the warning names their seeds.
    """
    made = list(_arrays(ddim, model, shape, seeds, batch_size, options))
    if warning := holding([seed for _, not_finite in made for seed in not_finite]):
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return np.concatenate([array for array, _ in made])


def pictures(x: Tensor) -> Tensor:
    """Returns samples (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C), rounded to the nearest."""
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
    """Yields (rows, seeds of rows that are not finite) a batch at a time.

    The padding is removed after ``postprocess``, so that a decoder also gets full batches. A row
    is not finite if its sample, or its row from ``postprocess``, holds NaN or infinity. ``begun``
    receives after each step the number of images that the finished steps amount to.
    """
    rest: dict[str, Any] = {**options}
    conds = {name: rest.pop(name, None) for name in ("cond", "uncond")}
    postprocess = rest.pop("postprocess", pictures)
    for batch, n in draw.full_batches(seeds, batch_size):
        of_batch: dict[str, Any] = {name: f(batch) if f else None for name, f in conds.items()}

        def steps(rows: Iterable[Any], n: int = n) -> Iterator[Any]:
            for done, row in enumerate(rows):
                if begun and done:
                    begun(n * done / len(ddim.pairs))
                yield row

        x = ddim.sample(
            model, shape=(batch_size, *shape), seeds=batch, progress=steps, **of_batch, **rest
        )
        made = postprocess(x)
        array = made.detach().cpu().numpy() if isinstance(made, Tensor) else np.asarray(made)
        if array.ndim == 0 or len(array) != batch_size:
            raise ValueError(
                f"postprocess must give a row for each of {batch_size} samples, got shape "
                f"{array.shape}"
            )
        odd = set(images.not_finite(x[:n]))
        if array.dtype.kind in "fc":  # a decoder may overflow although x does not
            odd.update(np.flatnonzero(~np.isfinite(array[:n]).reshape(n, -1).all(1)).tolist())
        yield array[:n], [batch[i] for i in sorted(odd)]


class Worker(NamedTuple):
    """This process in its launch: ``rank`` of ``world``, and the ``local``-th of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    launched: bool = False
    retried: bool = False
    """Whether the launcher is torchrun, which restarts all processes if one exits with an error."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Worker:
        """Returns the worker that torchrun, or else Slurm's srun, describes; alone without both."""
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            # Not SLURM_NTASKS: it is also set in a batch script, which runs alone.
            ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ):
            texts = [environment.get(name) for name in names]
            texts[2] = texts[2] or "0"  # a launcher of one process a machine may not set it
            if None not in texts:
                numbers = (_natural(name, text) for name, text in zip(names, texts, strict=True))
                rank, world, local = numbers
                whole(names[0], rank, low=0, high=world - 1)
                torchrun = names[0] == "RANK" and "TORCHELASTIC_RUN_ID" in environment
                return cls(rank, world, local, launched=True, retried=torchrun)
        return cls()

    def end_with_launcher(self) -> None:
        """Makes this process end when the launcher that started it ends.

        Otherwise a torchrun that is killed leaves its workers behind, which then run beside the
        workers of its next start.
        """
        if self.launched:
            _end_with_parent()

    def device(self) -> torch.device:
        """Returns this process's GPU among the machine's; the CPU if there is no GPU.

        The index is taken modulo the number of GPUs, because Slurm may show each process one GPU.
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
    """Checks the arguments, and returns all that the images' bytes depend on, as plain values."""
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
    from fastddim import __version__  # not yet defined when this module is imported

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
            "sha256": ddim.schedule.digest,
        },
        **{name: getattr(ddim, name) for name in SAMPLER},
        **({"eta": str(ddim.eta)} if isinstance(ddim.eta, Rule) else {}),
        **({"spacing": str(ddim.spacing)} if isinstance(ddim.spacing, Tuned) else {}),
        # Recipes of order 1 stay those of versions without orders, so that their folders go on.
        **({} if ddim.order == 1 else {"order": ddim.order}),
        **{name: _plain(options.get(name)) for name in OPTIONS},
        "postprocess": PICTURES if postprocess is pictures else _plain(postprocess),
        "architecture": provenance.architecture(device),
        "threads": provenance.threads(device),
        "backend": f"{device.type}, {backend}",
        "versions": {"fastddim": __version__, **provenance.versions(*sorted(packages))},
        "notes": dict(notes or {}),
    }
    # The manifest is JSON: compare with it after the same conversion.
    plain: dict[str, Any] = json.loads(json.dumps(recipe))
    return plain


def _described(model: Model) -> dict[str, Any]:
    """Returns a model's name, and of a network its weights' hash and its configuration, if any."""
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
    """Returns ``value`` as JSON values: functions by name, tensors and networks by checksum."""
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
    if isinstance(
        owner := getattr(value, "__self__", None), nn.Module
    ):  # a method of a network, such as a decoder's
        return {"of": _described(owner), "method": value.__name__}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


class _Called(ModuleType):
    """The class of this module, which makes the module callable as ``generate``.

    ``fastddim.generate(...)`` and ``import fastddim.generate as g; g.shard`` must both work, and
    both use the same attribute of the package. A function there would hide the module.
    """

    __call__ = staticmethod(generate)
    __signature__ = inspect.signature(generate)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Pickles by name, as a function does, because pools of processes pickle it."""
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _Called
