"""The distance of images to real images: FD-clf of garments, and FID by torch-fidelity."""

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
"""torch-fidelity's name of its Inception v3 weights, which ends in the start of their SHA-256."""


class Garments(NamedTuple):
    """FD-clf of drawn garments, and its mean and standard deviation for as many real garments."""

    distance: float
    floor: float
    spread: float


def garments(given: Source | Folder) -> Garments:
    """Returns the FD-clf of garments, which is not FID: see ``fastddim.tools.distance``.

    Args:
        given: images of any source, or a folder that ``generate`` has filled.

    Raises:
        ValueError: the folder is not finished or has changed, or the images are not 1x28x28.
    """
    source = _source(given)
    if source.shape != embedded.SHAPE:
        raise ValueError(
            f"FD-clf compares garments of 1x28x28, got images of "
            f"{'x'.join(map(str, source.shape))} in {source.path}; measure other images with "
            f"FID (--fid)"
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
    """Returns FID (Heusel et al. 2017) as torch-fidelity computes it, with grey images as RGB.

    Args:
        given: images of 1 or 3 channels, as in ``garments``.
        reference: a folder that ``generate`` has filled, or any folder of pictures.
        inception: torch-fidelity's weights, by default in the folder where it keeps them. Their
            checksum is checked, because other features do not give FID.
        device: the device to compute on: a CUDA device, or the CPU.

    Raises:
        ModuleNotFoundError: torch-fidelity is missing.
        FileNotFoundError, ValueError: the weights are missing or are other weights; a folder is
            not finished, has changed, or holds no pictures.
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
    """The images of a source by index, uint8 (3, H, W), for torch-fidelity."""

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
