"""The garment model's own U-Net is diffusers', bit for bit, and needs no diffusers."""

from __future__ import annotations

import pytest
import torch

from fastddim import embedded
from fastddim.embedded.model import UNET
from tests.processes import ran


@pytest.mark.parametrize("batch", [1, 3])
def test_the_unet_equals_diffusers_bit_for_bit(batch: int) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    ours = embedded.load().unet
    theirs = UNet2DModel(**UNET).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(batch, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])[:batch]
    with torch.no_grad():
        assert torch.equal(ours(x, t), theirs(x, t).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_unet_runs_in_other_dtypes(dtype: torch.dtype) -> None:
    net = embedded.load().unet.to(dtype)
    with torch.no_grad():
        assert net(torch.zeros(1, 4, 14, 14, dtype=dtype), torch.tensor([7])).dtype == dtype


def test_loading_imports_no_diffusers() -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'torchvision'): sys.modules[name] = None\n"
        "from fastddim import embedded\n"
        "embedded.load()"
    )
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr
