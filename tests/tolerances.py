"""The one table of tolerances. In float32 there is none: torch.equal with eager PyTorch."""

from __future__ import annotations

import torch

EAGER_FACTOR = 2.0
"""Half precision: the error against a float64 oracle is at most this times eager's own, and"""
HALF_ATOL = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""this: half a unit in the last place of a value near one."""

NORMAL_ATOL = 1e-5
"""Two ways of drawing one normal (CPU, GPU, float64 oracle) agree to this in all but"""
NORMAL_RARE = 1e-4
"""this part of the values, those near r = 0, where ln u cancels, and to"""
NORMAL_MAX = 1e-3
"""this in all."""

SIGMAS = 5.0
"""A statistic of n draws lies within this many standard errors; seeds are fixed, so it stays."""
P_VALUE = 5.7e-7
"""The same as a probability, for tests that give one."""
