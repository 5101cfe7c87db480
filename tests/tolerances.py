"""The tolerances of all tests. float32 has none: results are ``torch.equal`` to eager PyTorch's."""

from __future__ import annotations

import torch

EAGER_FACTOR = 2.0
"""Half precision: greatest (error against a float64 oracle) / (error of eager PyTorch)."""
HALF_ATOL = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Half precision: greatest error beside that, half a unit in the last place of a value near 1."""

NORMAL_ATOL = 1e-5
"""Greatest difference between draws of one normal (CPU, GPU, float64 oracle), except for"""
NORMAL_RARE = 1e-4
"""this share of the values, which lie near r = 0, where ln u cancels."""
NORMAL_MAX = 1e-3
"""Greatest difference between draws of any normal."""

SIGMAS = 5.0
"""Allowed distance of a statistic in standard errors; seeds are fixed, so tests are not flaky."""
P_VALUE = 5.7e-7
"""``SIGMAS`` as a two-sided probability, for tests that compute a p-value."""
