"""A folder of images by seed, which many processes fill and which a kill cannot damage.

    manifest.json      the recipe, which determines every shard byte for byte. It is written before
                       any shard. Once all shards are finished it also has their checksums, and
                       the seeds whose samples held NaN or infinity
    00000.npy, ...     the shards; or 000/000000.png, ...
    .parts-6a1f.../    temporary, until all shards are finished: unfinished files, and for each
                       finished shard its checksum, with the seeds whose samples held NaN or
                       infinity. A shard counts only once its checksum is written. The name holds
                       a hash of the recipe, so that files of another recipe do not count.

There are no locks. A file has a temporary name until it is written in full, and two processes
that write the same file write the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.check import shown
from fastddim.files import replacing
from fastddim.tools import images
from fastddim.tools.seeds import Seeds

FORMATS = ("npy", "png", "npz")
MANIFEST = "manifest.json"
DONE = "sha256"
_PATIENCE = 60.0
"""Seconds that a process waits for the process of rank 0, which starts at the same time."""


class Folder:
    """A folder of images: its recipe, and the shards that are finished.

    Attributes:
        path: the folder.
        recipe: the recipe in its manifest.
        seeds: the seeds of the images, in order.
        checksums: the SHA-256 of each shard's files, one after the other; empty until all shards
            are finished.
        not_finite: the seeds of samples that held NaN or infinity, in order; empty until all
            shards are finished.
        finished_here: whether this object's ``finish``, and no other process's, finished it.
    """

    def __init__(
        self,
        path: Path,
        recipe: Mapping[str, Any],
        checksums: Sequence[str],
        not_finite: Sequence[int] = (),
    ) -> None:
        self.path = path
        self.recipe = recipe
        self.seeds = Seeds.parse(recipe["seeds"])
        self.checksums = checksums
        self.not_finite = not_finite
        self.finished_here = False
        self._size: int = recipe["shard_size"]
        self._format: str = recipe["format"]
        identity = json.dumps(recipe, sort_keys=True).encode()
        self._parts = path / f".parts-{hashlib.sha256(identity).hexdigest()[:16]}"
        if len(self.seeds) != recipe["images"] or len(checksums) not in (0, len(self)):
            raise ValueError(f"{len(checksums)} checksums for {len(self)} shards")

    @classmethod
    def begin(cls, path: Path, recipe: Mapping[str, Any], rank: int = 0) -> Folder:
        """Returns the folder for ``recipe``, which it makes if necessary.

        A folder of the same recipe with the first of these seeds alone is extended and keeps its
        shards. Among the processes of a launch the process of rank 0 extends it, and the others
        wait.

        Raises:
            ValueError: the folder has another recipe, or holds other files.
            OSError: the folder cannot be made, or cannot be written to.
        """
        with _writing(path):
            path.mkdir(exist_ok=True)
        # List before looking for the manifest: another process of this run writes its manifest
        # before its other files, so that files without a manifest belong to somebody else.
        others = [name for name in os.listdir(path) if not name.startswith(".")]
        if not (path / MANIFEST).exists():
            if others:
                raise ValueError(
                    f"out must be a new folder, an empty one or one with a {MANIFEST}, got {path}, "
                    f"which holds {min(others)}"
                )
            with suppress(FileNotFoundError):  # another process has finished the folder meanwhile
                cls(path, recipe, [])._announce()
        folder = cls.read(path)
        if folder._goes_on(recipe):
            if rank == 0:
                folder._extend(recipe)
            end = time.monotonic() + _PATIENCE
            while (folder := cls.read(path))._goes_on(recipe) and time.monotonic() < end:
                time.sleep(0.1)
        if differences := list(_differences(folder.recipe, recipe)):
            few = ", ".join(differences[:4]) + (", ..." if len(differences) > 4 else "")
            raise ValueError(
                f"out must be a new folder or one of the same recipe, got {path}, which differs "
                f"in {few}{_remedy(folder.recipe, recipe)}"
            )
        if not folder._finished():
            folder._put(folder._parts / f"probe.{uuid.uuid4().hex}", b"", "probe").unlink()
        return folder

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Returns the folder at ``path``, as its manifest describes it.

        Raises:
            FileNotFoundError, ValueError: the manifest is missing, or damaged.
        """
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise FileNotFoundError(
                f"a folder must be one that fastddim generate has made, got {path}, which has no "
                f"{MANIFEST}"
            )
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            odd = content.get("not_finite", {"images": 0})
            seeds = list(Seeds.parse(odd["seeds"])) if odd["images"] else []
            return cls(path, content["recipe"], content["checksums"], seeds)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{manifest} is damaged: {error}") from None

    def __len__(self) -> int:
        """The number of shards, finished or not."""
        return -(-len(self.seeds) // self._size)

    def seeds_of(self, k: int) -> list[int]:
        """Returns the seeds of shard ``k``."""
        return self.seeds[k * self._size : (k + 1) * self._size]

    def files(self, k: int) -> list[Path]:
        """Returns the files of shard ``k``."""
        if self._format != "png":
            return [self.path / f"{k:05d}.{self._format}"]
        return [self.path / f"{s // 1000:03d}" / f"{s:06d}.png" for s in self.seeds_of(k)]

    def has(self, k: int) -> bool:
        """Whether shard ``k`` is finished and its files exist."""
        return self._known(k) is not None and all(file.is_file() for file in self.files(k))

    def count(self) -> int:
        """Returns the number of images in finished shards."""
        if self._finished():
            return len(self.seeds)
        return self._images(self._whole())

    def missing(self, rank: int, world: int) -> int:
        """Returns the number of missing images in the shards rank, rank + world, ..."""
        if self._finished():
            return 0
        there = {k for k in self._whole() if k % world == rank}
        return self._images(range(rank, len(self), world)) - self._images(there)

    def _images(self, shards: Collection[int]) -> int:
        rest = len(self) * self._size - len(self.seeds)
        return len(shards) * self._size - (rest if len(self) - 1 in shards else 0)

    def pictures(self, k: int) -> Tensor:
        """Returns the images of shard ``k``, uint8 (N, C, H, W).

        Raises:
            ValueError, OSError: the files hold no images, or cannot be read.
        """
        if self._format == "png":
            return torch.stack([_picture(file) for file in self.files(k)])
        found = images.read(self.files(k)[0])
        return found[:, :1] if tuple(self.recipe["shape"])[:1] == (1,) else found

    def clear(self, rank: int, world: int) -> None:
        """Removes temporary files that killed processes left, of shards rank, rank + world, ..."""
        with suppress(FileNotFoundError):
            for part in os.listdir(self._parts):
                k, _, end = part.partition(".")
                if end != DONE and k.isdecimal() and int(k) % world == rank:
                    (self._parts / part).unlink(missing_ok=True)

    def write(self, k: int, array: npt.NDArray[Any], not_finite: Sequence[int] = ()) -> None:
        """Writes the files of shard ``k``, and then its checksum.

        Args:
            array: the images of the shard, one row for each.
            not_finite: the seeds of its samples that held NaN or infinity.

        Raises:
            ValueError: a PNG cannot hold ``array``; or a lost shard is made again with other
                bytes than its checksum in the manifest has.
            OSError: the files cannot be written.
        """
        if self._finished():
            sha = hashlib.sha256()
            for content in _encoded(array, self._format):
                sha.update(content)
            if sha.hexdigest() != self.checksums[k]:
                raise ValueError(
                    f"{self.files(k)[0]} must be made again with the same bytes, got other bytes: "
                    f"this machine computes differently from the one that made {self.path}"
                )
        sha = hashlib.sha256()
        for file, content in zip(self.files(k), _encoded(array, self._format), strict=True):
            self._put(file, content, k)
            sha.update(content)
        self._note(k, sha.hexdigest(), not_finite)

    def finish(self) -> bool:
        """Returns whether all shards are finished, and if so writes their checksums."""
        # List first: listing makes NFS refresh its cache.
        if len(self._whole()) < len(self) and not self._finished():
            return False
        checksums: list[str] = []
        odd: list[int] = []
        for k in range(len(self)):
            known = self._known(k)
            if known is None or not all(file.is_file() for file in self.files(k)):
                return False
            checksums.append(known[0])
            odd += known[1]
        self.checksums, self.not_finite = checksums, odd
        if self._parts.exists():
            # Another process may write the same bytes, and remove .parts first.
            with suppress(FileNotFoundError):
                self._put(self.path / MANIFEST, _manifest(self.recipe, checksums, odd), "manifest")
            self._clear_away()
        else:  # a process was killed while it removed .parts
            shutil.rmtree(self._gone, ignore_errors=True)
        return True

    def _clear_away(self) -> None:
        """Removes .parts once all shards are finished; only one of several processes succeeds."""
        shutil.rmtree(self._gone, ignore_errors=True)  # of a process that was killed here
        with suppress(OSError):  # another process has moved it, or just wrote to it
            # A late process makes .parts again to write the same manifest: that has no checksums.
            has_checksums = any(name.endswith(DONE) for name in os.listdir(self._parts))
            os.rename(self._parts, self._gone)
            self.finished_here = has_checksums
        shutil.rmtree(self._gone, ignore_errors=True)
        shutil.rmtree(self._parts, ignore_errors=True)

    @property
    def _gone(self) -> Path:
        """The name that .parts has while it is removed."""
        return self._parts.with_suffix(".gone")

    def warning(self) -> str | None:
        """Returns one line about samples that held NaN or infinity, or None if there are none."""
        self._finished()
        return holding(self.not_finite)

    def verify(self) -> None:
        """Reads every byte of the folder, and compares the shards with their checksums.

        Samples that held NaN or infinity are no error here: see ``warning``.

        Raises:
            ValueError: an image is missing or has changed, or a further file is there.
        """
        if not self._finished():
            raise ValueError(
                f"{self.path} is not finished: it has {self.count()} of {len(self.seeds)} images "
                f"in finished shards. The command that began it makes the rest"
            )
        wrong: list[str] = []
        for k in range(len(self)):
            files, sha = self.files(k), hashlib.sha256()
            missing = [file for file in files if not file.is_file()]
            for file in files if not missing else ():
                sha.update(file.read_bytes())
            if missing:
                wrong.append(f"{missing[0].relative_to(self.path)} is missing")
            elif sha.hexdigest() != self.checksums[k]:
                name = files[0].relative_to(self.path)
                more = f" or one of the {len(files) - 1} after it" if len(files) > 1 else ""
                wrong.append(f"{name}{more} has changed")
        expected = {file for k in range(len(self)) for file in self.files(k)}
        others = sorted(set(self.path.rglob(f"*.{self._format}")) - expected)
        wrong += [f"{file.relative_to(self.path)} is none of its files" for file in others]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"{self.path} is not as it was made: {', '.join(wrong[:3])}{more}. Remove the "
                f"changed files, and the command that made it makes missing files again"
            )

    def _whole(self) -> set[int]:
        """Returns the shards whose checksums are in .parts."""
        try:
            parts = os.listdir(self._parts)
        except FileNotFoundError:
            return set()
        return {int(part.partition(".")[0]) for part in parts if part.endswith(f".{DONE}")}

    def _goes_on(self, recipe: Mapping[str, Any]) -> bool:
        """Whether ``recipe`` is this folder's recipe with further seeds after its seeds."""
        same = {**recipe, "images": self.recipe["images"], "seeds": self.recipe["seeds"]}
        if recipe["images"] <= same["images"] or same != self.recipe:
            return False
        return Seeds.parse(recipe["seeds"]).begin_with(self.seeds)

    def _extend(self, recipe: Mapping[str, Any]) -> None:
        """Makes this the folder of ``recipe``, which has further seeds.

        Shards begin at the same seeds as before, so all full shards stay. A last shard that was
        not full is made again and replaced.
        """
        longer = Folder(self.path, recipe, [])
        for k in range(len(self.seeds) // self._size):
            if (known := self._known(k)) is not None:
                longer._note(k, *known)
        # This manifest makes the checksums above count instead of the shorter recipe's.
        longer._put(self.path / MANIFEST, _manifest(recipe, []), "manifest")
        shutil.rmtree(self._parts, ignore_errors=True)

    def _note(self, k: int, checksum: str, not_finite: Sequence[int]) -> None:
        """Writes the checksum that makes shard ``k`` count."""
        odd = f" {Seeds.of(not_finite)}" if not_finite else ""
        self._put(self._parts / f"{k}.{DONE}", f"{checksum}{odd}".encode(), k)

    def _known(self, k: int) -> tuple[str, list[int]] | None:
        """Returns the checksum and the ``not_finite`` seeds of shard ``k``; None if unfinished."""
        with suppress(FileNotFoundError):
            checksum, *odd = (self._parts / f"{k}.{DONE}").read_text().split()
            return checksum, list(Seeds.parse(odd[0])) if odd else []
        if not self._finished():
            return None
        odd_here = set(self.not_finite)
        return self.checksums[k], [seed for seed in self.seeds_of(k) if seed in odd_here]

    def _finished(self) -> bool:
        """Whether the manifest has the checksums; reads it again if it had none before."""
        if not self.checksums:
            now = Folder.read(self.path)
            self.checksums, self.not_finite = now.checksums, now.not_finite
        return bool(self.checksums)

    def _announce(self) -> None:
        """Writes the manifest if there is none."""
        draft = self._parts / f"manifest.{uuid.uuid4().hex}.json"
        self._put(draft, _manifest(self.recipe, []), "manifest")
        with _writing(self.path):
            try:
                # Unlike a rename, a link never replaces a manifest, which may have another recipe.
                os.link(draft, self.path / MANIFEST)
            except FileExistsError:
                pass
            except OSError:  # the file system has no links
                os.replace(draft, self.path / MANIFEST)
            draft.unlink(missing_ok=True)

    def _put(self, file: Path, content: bytes, label: int | str) -> Path:
        """Writes ``content`` to ``file`` by way of a temporary file in .parts."""
        with _writing(self.path):
            for left in (2, 1, 0):
                self._parts.mkdir(exist_ok=True)
                file.parent.mkdir(exist_ok=True)
                # A unique name: a worker that outlived its launcher may write the same shard.
                temporary = self._parts / f"{label}.{uuid.uuid4().hex}.tmp"
                try:
                    with replacing(file, temporary) as opened:
                        opened.write(content)
                except FileNotFoundError:  # another process has removed .parts
                    if not left:
                        raise
                else:
                    break
        return file


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into one that names ``out``."""
    try:
        yield
    except OSError as error:
        finished = ". The shards in it are whole" if (path / MANIFEST).is_file() else ""
        raise type(error)(
            f"out must be a folder that can be written to and has room, got {path}: "
            f"{error.strerror or error}{finished}"
        ) from error


def _encoded(array: npt.NDArray[Any], format: str) -> Iterator[bytes]:
    """Yields the content of each file of a shard: the same bytes for the same array.

    Grey pictures get three channels in npz files, because guided-diffusion's evaluator needs them.
    """
    if format == "npz" and array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 1:
        array = np.repeat(array, 3, axis=3)
    if format == "png" and not (
        array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (1, 3)
    ):
        raise ValueError(
            f"postprocess must give uint8 (N, H, W, C) with 1 or 3 channels for PNG files, "
            f"got {array.dtype} {array.shape}"
        )
    for part in array if format == "png" else [array]:
        file = io.BytesIO()
        if format == "npy":
            np.save(file, part, allow_pickle=False)
        elif format == "npz":
            np.savez(file, part)
        else:
            images.write_png(torch.from_numpy(part).movedim(2, 0), file)
        yield file.getvalue()


def _picture(file: Path) -> Tensor:
    """Returns the picture of a PNG, uint8 (C, H, W)."""
    from PIL import Image

    with Image.open(file) as picture:
        pixels = torch.from_numpy(np.array(picture))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(2, 0)


def holding(not_finite: Sequence[int]) -> str | None:
    """Returns one line about images whose samples hold NaN or infinity, or None if there are none.

    Args:
        not_finite: the seed of each such image; a seed may repeat.
    """
    if not not_finite:
        return None
    n = len(not_finite)
    seeds = str(Seeds.of(sorted(set(not_finite))))
    if len(seeds) > 200:
        seeds = f"{seeds[:200].rpartition(',')[0]},..."
    images_hold = "1 image holds" if n == 1 else f"{n} images hold"
    return (
        f"{images_hold} NaN or infinity, drawn as black or white pixels: "
        f"{'seed' if seeds.isdecimal() else 'seeds'} {seeds}"
    )


def _manifest(
    recipe: Mapping[str, Any], checksums: Sequence[str], not_finite: Sequence[int] = ()
) -> bytes:
    """Returns the manifest's JSON, with one line for each entry of the recipe and each checksum."""
    odd = {"images": len(not_finite), "seeds": str(Seeds.of(not_finite)) if not_finite else ""}
    lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(recipe[name])}" for name in recipe)
    sums = ",\n  ".join(map(json.dumps, checksums))
    content = f' "recipe": {{\n  {lines}\n }},\n "checksums": [\n  {sums}\n ]'
    content += f',\n "not_finite": {json.dumps(odd)}' if checksums else ""
    return f"{{\n{content}\n}}\n".encode()


def _remedy(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Returns advice on a difference in threads, which no argument sets; "" for others."""
    n = there.get("threads")
    if n is None or here.get("threads") in (n, None):
        return ""
    return f". Use the same number of threads: --threads {n}, or torch.set_num_threads({n})"


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], within: str = ""
) -> Iterator[str]:
    """Yields the names of entries that differ, with both values unless they are lists."""
    for name in {**there, **here}:
        a, b = there.get(name), here.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{within}{name}.")
        elif a != b and isinstance(a, list):
            yield f"{within}{name}"
        elif a != b:
            yield f"{within}{name} ({shown(a)} there, {shown(b)} here)"
