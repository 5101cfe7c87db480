"""Robots' diffusion policies: LeRobot's and diffusion_policy's sampling loops, in one line.

    policy = policies.accelerate(policy)

A policy is Chi et al. 2023, "Diffusion Policy": it denoises a trajectory of actions, given the
observation, by DDPM or DDIM.
"""

from __future__ import annotations

try:
    from fastddim.dropins.policies.replace import accelerate, restore
except ModuleNotFoundError as error:
    from fastddim.extras import explained

    raise explained(error) from None

__all__ = ("accelerate", "restore")
