"""The garment model that ships with the package; loading it touches no network."""

from __future__ import annotations

import json
from pathlib import Path

from fastddim.embedded.model import SHAPE as SHAPE
from fastddim.embedded.model import GarmentModel as GarmentModel

WEIGHTS = Path(__file__).with_name("garments.safetensors")


def load(path: Path | str = WEIGHTS) -> GarmentModel:
    """The garment model in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError, ValueError: ``path`` is missing, or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            unet = json.loads((file.metadata() or {})["unet"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no file of garment weights: {error}") from None
    model = GarmentModel(unet)
    model.unet.load_state_dict(weights)
    return model.eval().requires_grad_(False)
