"""A folder of images by seed, which many processes fill and any kill leaves valid.

    manifest.json      the recipe, by which any shard can be made again byte for byte: it is there
                       before any shard, and has the shards' checksums once all are there, with
                       the seeds whose samples held NaN or infinity
    00000.npy, ...     the shards; or 000/000000.png, ...
    .parts-6a1f.../    until all are there: what is being written, and for each shard that is
                       whole its checksum, which is written after it, with the seeds of samples
                       that held NaN or infinity. Only that makes the shard count. The name has
                       the recipe's: what another recipe left behind does not count.

Nothing is locked. What is written has another name until it is whole, and what two processes
write both is the same.
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
from fastddim.tools import images
from fastddim.tools.seeds import Seeds

FORMATS = ("npy", "png", "npz")
MANIFEST = "manifest.json"
DONE = "sha256"
_PATIENCE = 60.0
"""Seconds for which a process waits for that of rank 0, which starts at the same time."""


class Folder:
    """A folder of images: what is to be in it, and what is there.

    Attributes:
        path: where it is.
        recipe: what its manifest says.
        seeds: of the images, in order.
        checksums: SHA-256 of each shard, once all are there: of its file's bytes, or of its
            files', one after the other.
        not_finite: the seeds of samples that held NaN or infinity, in order, once all are there.
        finished_here: whether it was this object's ``finish``, of all processes', that finished it.
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
        known_by = json.dumps(recipe, sort_keys=True).encode()
        self._parts = path / f".parts-{hashlib.sha256(known_by).hexdigest()[:16]}"
        if len(self.seeds) != recipe["images"] or len(checksums) not in (0, len(self)):
            raise ValueError(f"{len(checksums)} checksums of {len(self)}")

    @classmethod
    def begin(cls, path: Path, recipe: Mapping[str, Any], rank: int = 0) -> Folder:
        """The folder for ``recipe``, made if need be.

        One of the same recipe with fewer seeds, the first of these, goes on: what is in it stays.
        Of the processes of one launch that of rank 0 sees to this, and the others wait for it.

        Raises:
            ValueError: it has another recipe, or other files.
            OSError: it cannot be made, or not be written to.
        """
        with _writing(path):
            path.mkdir(exist_ok=True)
        # Listed before the manifest is looked for: whatever another process of this run has made
        # came after its manifest.
        others = [name for name in os.listdir(path) if not name.startswith(".")]
        if not (path / MANIFEST).exists():
            if others:
                raise ValueError(
                    f"out must be a new folder, an empty one or one with a {MANIFEST}, got {path}, "
                    f"which holds {min(others)}"
                )
            with suppress(FileNotFoundError):  # another has made it, and all the rest by now
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
        """The folder at ``path``, by its manifest.

        Raises:
            FileNotFoundError, ValueError: there is no manifest, or what is none.
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
        """How many shards it has."""
        return -(-len(self.seeds) // self._size)

    def seeds_of(self, k: int) -> list[int]:
        return self.seeds[k * self._size : (k + 1) * self._size]

    def files(self, k: int) -> list[Path]:
        """Those of shard ``k``."""
        if self._format != "png":
            return [self.path / f"{k:05d}.{self._format}"]
        return [self.path / f"{s // 1000:03d}" / f"{s:06d}.png" for s in self.seeds_of(k)]

    def has(self, k: int) -> bool:
        """Whether shard ``k`` is there and whole."""
        return self._known(k) is not None and all(file.is_file() for file in self.files(k))

    def count(self) -> int:
        """How many images are in shards that are whole."""
        if self._finished():
            return len(self.seeds)
        return self._images(self._whole())

    def missing(self, rank: int, world: int) -> int:
        """How many images of the shards rank, rank + world, ... are not there yet."""
        if self._finished():
            return 0
        there = {k for k in self._whole() if k % world == rank}
        return self._images(range(rank, len(self), world)) - self._images(there)

    def _images(self, shards: Collection[int]) -> int:
        rest = len(self) * self._size - len(self.seeds)
        return len(shards) * self._size - (rest if len(self) - 1 in shards else 0)

    def pictures(self, k: int) -> Tensor:
        """The images of shard ``k``, uint8 (N, C, H, W).

        Raises:
            ValueError, OSError: they are none, or cannot be read.
        """
        if self._format == "png":
            return torch.stack([_picture(file) for file in self.files(k)])
        found = images.read(self.files(k)[0])
        return found[:, :1] if tuple(self.recipe["shape"])[:1] == (1,) else found

    def clear(self, rank: int, world: int) -> None:
        """Removes what is left of shards rank, rank + world, ... by who was killed at them."""
        with suppress(FileNotFoundError):
            for part in os.listdir(self._parts):
                k, _, end = part.partition(".")
                if end != DONE and k.isdecimal() and int(k) % world == rank:
                    (self._parts / part).unlink(missing_ok=True)

    def write(self, k: int, array: npt.NDArray[Any], not_finite: Sequence[int] = ()) -> None:
        """Writes shard ``k``, and last its checksum.

        Args:
            array: its images, a row for each.
            not_finite: the seeds of those whose samples held NaN or infinity.

        Raises:
            ValueError: no PNG holds ``array``; or the manifest has another checksum of the shard,
                which was lost since and cannot be made again here.
            OSError: it cannot be written.
        """
        if self._finished():
            sha = hashlib.sha256()
            for content in _encoded(array, self._format):
                sha.update(content)
            if sha.hexdigest() != self.checksums[k]:
                raise ValueError(
                    f"{self.files(k)[0]} must be made again as it was, got other bytes: this "
                    f"machine does not compute as the one that made {self.path}"
                )
        sha = hashlib.sha256()
        for file, content in zip(self.files(k), _encoded(array, self._format), strict=True):
            self._put(file, content, k)
            sha.update(content)
        self._note(k, sha.hexdigest(), not_finite)

    def finish(self) -> bool:
        """Whether all shards are there; then their checksums are in the manifest."""
        # The listing first: it is what makes a network file system look anew.
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
            # Another process may do the same, with the same bytes, and clear .parts first.
            with suppress(FileNotFoundError):
                self._put(self.path / MANIFEST, _manifest(self.recipe, checksums, odd), "manifest")
            self._clear_away()
        return True

    def _clear_away(self) -> None:
        """Removes what was needed until all shards were there; one process of several does."""
        gone = self._parts.with_suffix(".gone")
        shutil.rmtree(gone, ignore_errors=True)  # of one who was killed at it
        with suppress(OSError):  # another has taken it, or just put something into it
            os.rename(self._parts, gone)
            # What a late process has made anew to write the same manifest holds no checksums.
            self.finished_here = any(name.endswith(DONE) for name in os.listdir(gone))
        shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(self._parts, ignore_errors=True)

    def warning(self) -> str | None:
        """One line about images that no picture shows as they were, or None where there is none."""
        self._finished()
        return holding(self.not_finite)

    def verify(self) -> None:
        """Reads every byte. What ``warning`` says is no error: the images are as they were made.

        Raises:
            ValueError: an image is missing, changed or there once more.
        """
        if not self._finished():
            raise ValueError(
                f"{self.path} is not finished: it has {self.count()} of {len(self.seeds)} images "
                f"in shards that are whole. The command that began it goes on with the rest"
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
                what = files[0].relative_to(self.path)
                more = f" or one of the {len(files) - 1} after it" if len(files) > 1 else ""
                wrong.append(f"{what}{more} has changed")
        expected = {file for k in range(len(self)) for file in self.files(k)}
        others = sorted(set(self.path.rglob(f"*.{self._format}")) - expected)
        wrong += [f"{file.relative_to(self.path)} is none of its files" for file in others]
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"{self.path} is not as it was made: {', '.join(wrong[:3])}{more}. Remove what has "
                f"changed, and the command that made it makes again what is missing"
            )

    def _whole(self) -> set[int]:
        """The shards whose checksum has been written."""
        try:
            parts = os.listdir(self._parts)
        except FileNotFoundError:
            return set()
        return {int(part.partition(".")[0]) for part in parts if part.endswith(f".{DONE}")}

    def _goes_on(self, recipe: Mapping[str, Any]) -> bool:
        """Whether ``recipe`` is this one with more seeds after these."""
        same = {**recipe, "images": self.recipe["images"], "seeds": self.recipe["seeds"]}
        if recipe["images"] <= same["images"] or same != self.recipe:
            return False
        return Seeds.parse(recipe["seeds"]).begin_with(self.seeds)

    def _extend(self, recipe: Mapping[str, Any]) -> None:
        """Makes this the folder of ``recipe``, which goes on.

        Shards are cut at the same places, so that all are as they were but for a last one that
        was not full; its file is replaced when it is made again.
        """
        longer = Folder(self.path, recipe, [])
        for k in range(len(self.seeds) // self._size):
            if (known := self._known(k)) is not None:
                longer._note(k, *known)
        # From here on the checksums above count, and those of the shorter recipe do not.
        longer._put(self.path / MANIFEST, _manifest(recipe, []), "manifest")
        shutil.rmtree(self._parts, ignore_errors=True)

    def _note(self, k: int, checksum: str, not_finite: Sequence[int]) -> None:
        """Writes what makes shard ``k`` count."""
        odd = f" {Seeds.of(not_finite)}" if not_finite else ""
        self._put(self._parts / f"{k}.{DONE}", f"{checksum}{odd}".encode(), k)

    def _known(self, k: int) -> tuple[str, list[int]] | None:
        """The checksum of shard ``k`` and the seeds of its ``not_finite``, if it is whole."""
        with suppress(FileNotFoundError):
            checksum, *odd = (self._parts / f"{k}.{DONE}").read_text().split()
            return checksum, list(Seeds.parse(odd[0])) if odd else []
        if not self._finished():
            return None
        odd_here = set(self.not_finite)
        return self.checksums[k], [seed for seed in self.seeds_of(k) if seed in odd_here]

    def _finished(self) -> bool:
        """Whether the manifest has the checksums, perhaps by now."""
        if not self.checksums:
            now = Folder.read(self.path)
            self.checksums, self.not_finite = now.checksums, now.not_finite
        return bool(self.checksums)

    def _announce(self) -> None:
        """Writes the manifest, unless there is one."""
        draft = self._parts / f"manifest.{uuid.uuid4().hex}.json"
        self._put(draft, _manifest(self.recipe, []), "manifest")
        with _writing(self.path):
            try:
                # Unlike a rename it never replaces another's, which may be of another recipe.
                os.link(draft, self.path / MANIFEST)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                os.replace(draft, self.path / MANIFEST)
            draft.unlink(missing_ok=True)

    def _put(self, file: Path, content: bytes, label: int | str) -> Path:
        with _writing(self.path):
            for left in (2, 1, 0):
                self._parts.mkdir(exist_ok=True)
                file.parent.mkdir(exist_ok=True)
                # A name of its own: a worker that outlived its launcher may be at the same shard.
                temporary = self._parts / f"{label}.{uuid.uuid4().hex}.tmp"
                try:
                    with images.replacing(file, temporary) as opened:
                        opened.write(content)
                except FileNotFoundError:  # who was launched beside this one has cleared it away
                    if not left:
                        raise
                else:
                    break
        return file


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        there = ". The shards that it has are whole" if (path / MANIFEST).is_file() else ""
        raise type(error)(
            f"out must be a folder that can be written to and has room, got {path}: "
            f"{error.strerror or error}{there}"
        ) from error


def _encoded(array: npt.NDArray[Any], format: str) -> Iterator[bytes]:
    """The content of each of a shard's files: the same bytes for the same array.

    Grey pictures have three channels in npz files: so guided-diffusion's evaluator wants them.
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
    """The picture of a PNG, uint8 (C, H, W)."""
    from PIL import Image

    with Image.open(file) as picture:
        pixels = torch.from_numpy(np.array(picture))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(2, 0)


def holding(not_finite: Sequence[int]) -> str | None:
    """One line about images whose samples hold NaN or infinity: the seed of each, perhaps of
    several. None where there is no such image."""
    if not not_finite:
        return None
    n = len(not_finite)
    seeds = str(Seeds.of(sorted(set(not_finite))))
    if len(seeds) > 200:
        seeds = f"{seeds[:200].rpartition(',')[0]},..."
    what = "1 image holds" if n == 1 else f"{n} images hold"
    return (
        f"{what} NaN or infinity, drawn as black or white pixels: "
        f"{'seed' if seeds.isdecimal() else 'seeds'} {seeds}"
    )


def _manifest(
    recipe: Mapping[str, Any], checksums: Sequence[str], not_finite: Sequence[int] = ()
) -> bytes:
    """JSON with a line for each thing that is said."""
    odd = {"images": len(not_finite), "seeds": str(Seeds.of(not_finite)) if not_finite else ""}
    lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(recipe[name])}" for name in recipe)
    sums = ",\n  ".join(map(json.dumps, checksums))
    said = f' "recipe": {{\n  {lines}\n }},\n "checksums": [\n  {sums}\n ]'
    said += f',\n "not_finite": {json.dumps(odd)}' if checksums else ""
    return f"{{\n{said}\n}}\n".encode()


def _remedy(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What to do about a difference that is not of the arguments, where that is known."""
    n = there.get("threads")
    if n is None or here.get("threads") in (n, None):
        return ""
    return f". Go on with as many threads: --threads {n}, or torch.set_num_threads({n})"


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], within: str = ""
) -> Iterator[str]:
    for name in {**there, **here}:
        a, b = there.get(name), here.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{within}{name}.")
        elif a != b and isinstance(a, list):
            yield f"{within}{name}"
        elif a != b:
            yield f"{within}{name} ({shown(a)} there, {shown(b)} here)"
