"""The garment model that ships with the package; loading it touches no network."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastddim import weights
from fastddim.embedded.model import SHAPE as SHAPE
from fastddim.embedded.model import GarmentModel as GarmentModel
from fastddim.extras import explained

WEIGHTS = Path(__file__).with_name("garments.safetensors")


def load(path: Path | str = WEIGHTS) -> GarmentModel:
    """Returns the garment model in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError, ValueError: ``path`` is missing, or is no file of garment weights.
        ModuleNotFoundError: safetensors is missing; the extra ``cli`` has it.

    >>> import torch
    >>> load()(torch.zeros(1, 1, 28, 28), torch.tensor([999])).shape
    torch.Size([1, 1, 28, 28])
    """
    path = Path(path)
    try:
        tensors, metadata = weights.read(path)
    except ModuleNotFoundError as error:
        raise explained(error) from None
    if "unet" not in metadata:
        raise ValueError(f"{path} is no file of garment weights: its metadata has no 'unet'")
    try:
        with torch.device("cpu"):
            model = GarmentModel(dict(json.loads(metadata["unet"])))
    except Exception as error:  # Each kind of bad configuration raises its own type.
        raise ValueError(f"{path} describes no garment model: {error}") from None
    config = model.unet.config
    if (channels := (config["in_channels"], config["out_channels"])) != (4, 4):
        raise ValueError(
            f"{path} must have 4 channels in and out, got {channels[0]} and {channels[1]}"
        )
    weights.fill(model.unet, tensors, path)
    return model.eval().requires_grad_(False)
