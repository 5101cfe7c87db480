"""CompVis' samplers of latent-diffusion and stable-diffusion: same calls, fewer passes.

    from fastddim.dropins.compvis import DDIMSampler, PLMSSampler

The samplers use the model's attributes, and import nothing of CompVis'.
"""

from __future__ import annotations

from fastddim.dropins.compvis.base import PREDICTIONS as PREDICTIONS
from fastddim.dropins.compvis.plms import PLMSSampler as PLMSSampler
from fastddim.dropins.compvis.sampler import DDIMSampler as DDIMSampler
