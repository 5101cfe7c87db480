"""CompVis' ``DDIMSampler`` of latent-diffusion and stable-diffusion: same calls, fewer passes.

    from fastddim.dropins.compvis import DDIMSampler

The sampler uses the model's attributes, and imports nothing of CompVis'.
"""

from __future__ import annotations

from fastddim.dropins.compvis.sampler import PREDICTIONS as PREDICTIONS
from fastddim.dropins.compvis.sampler import DDIMSampler as DDIMSampler
