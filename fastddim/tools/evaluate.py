"""How far images are from real ones: FD-clf of garments, FID by torch-fidelity."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastddim import embedded
from fastddim.tools import distance, images, sources
from fastddim.tools.folder import MANIFEST, Folder
from fastddim.tools.quality import frechet_distance
from fastddim.tools.sources import Source

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's name for its weights of Inception v3, which ends in their SHA-256's start."""


class Garments(NamedTuple):
    """FD-clf of drawn garments, and of as many real ones the mean and deviation over draws."""

    distance: float
    floor: float
    spread: float


def garments(given: Source | Folder) -> Garments:
    """FD-clf of garments, which is no FID: see ``fastddim.tools.distance``.

    Args:
        given: images of any source, or a folder that ``generate`` has filled.

    Raises:
        ValueError: the folder is not finished or not as it was made, or its images are no garments.
    """
    source = _source(given)
    if source.shape != embedded.SHAPE:
        raise ValueError(
            f"FD-clf compares garments of 1x28x28, got images of "
            f"{'x'.join(map(str, source.shape))} in {source.path}; others are measured "
            f"with FID (--fid)"
        )
    source.verify()
    if source.count < 2:
        raise ValueError(f"FD-clf needs two images or more, got 1 in {source.path}")
    real = distance.load()
    parts = (images.from_uint8(source.part(k)) for k in range(len(source)))
    features = torch.cat([distance.features(real.critic, x) for x in parts])
    n = len(features)
    return Garments(frechet_distance(features, real.moments), real.floor(n), real.spread(n))


def _source(given: Source | Folder) -> Source:
    return sources.of(given) if isinstance(given, Folder) else given


def fid(
    given: Source | Folder,
    reference: Path,
    inception: Path | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """FID (Heusel et al. 2017) as torch-fidelity computes it, grey images as RGB.

    Args:
        given: images of 1 or 3 channels, as in ``garments``.
        reference: a folder that ``generate`` has filled, or any folder of pictures.
        inception: torch-fidelity's weights; by default where it keeps them. Other features would
            not make a FID, so their checksum is looked at.
        device: where to compute: a CUDA device, or the CPU.

    Raises:
        ModuleNotFoundError: torch-fidelity is missing.
        FileNotFoundError, ValueError: the weights are missing or others; a folder is not finished,
            not as it was made, or holds no pictures.
    """
    fidelity = importlib.import_module("torch_fidelity")
    path = inception or Path(torch.hub.get_dir(), "checkpoints", INCEPTION)
    if not path.is_file():
        raise FileNotFoundError(
            f"inception must be torch-fidelity's weights, {INCEPTION} of the release v0.2.0 of "
            f"github.com/toshas/torch-fidelity, got no file {path}"
        )
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    if not checksum.startswith(Path(INCEPTION).stem.rpartition("-")[2]):
        raise ValueError(
            f"inception must be torch-fidelity's weights, {INCEPTION}, got {path}, which is "
            f"another file: its features would not make a FID"
        )
    if not reference.is_dir():
        raise FileNotFoundError(f"fid must be a folder of pictures, got {reference}")
    made = (reference / MANIFEST).is_file()
    measured = fidelity.calculate_metrics(
        input1=Pictures(_source(given)),
        input2=Pictures(sources.opened(reference)) if made else str(reference),
        fid=True,
        cuda=torch.device(device).type == "cuda",
        feature_extractor_weights_path=str(path),
        samples_find_deep=True,
        cache=False,
        verbose=False,
    )
    return float(measured["frechet_inception_distance"])


class Pictures(Dataset[Tensor]):
    """The images of a source by their place, as torch-fidelity wants them: uint8 (3, H, W)."""

    def __init__(self, source: Source) -> None:
        source.verify()
        self._source = source
        self._read: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self._source.count

    def __getitem__(self, index: int) -> Tensor:
        k, place = divmod(index, self._source.part_size)
        if self._read is None or self._read[0] != k:
            self._read = k, self._source.part(k)
        return self._read[1][place].expand(3, -1, -1)
