"""``accelerate`` and ``restore``: recognise a policy, and replace its scheduler and its loop."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, TypeVar

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from fastddim.check import kind, shown
from fastddim.dropins._scheduler import NAMES
from fastddim.dropins.diffusers import FastDDIMScheduler, FastDDPMScheduler
from fastddim.dropins.policies.loops import DiffusionPolicy, LeRobot, Loop, size_of

Policy = TypeVar("Policy")

_FAST: dict[type, Any] = {DDIMScheduler: FastDDIMScheduler, DDPMScheduler: FastDDPMScheduler}


class _Kind(NamedTuple):
    """One system's ``conditional_sample``: its loop here, its arguments, the names in its code."""

    system: str
    loop: type[Loop]
    arguments: tuple[tuple[str, ...], ...]
    used: frozenset[str]
    """The names that the method uses in every version."""
    usable: frozenset[str]
    """Further names, which it uses in some versions."""


_EACH = {
    "torch",
    "randn",
    "shape",
    "noise_scheduler",
    "set_timesteps",
    "num_inference_steps",
    "timesteps",
    "step",
    "prev_sample",
}
_KINDS = (
    _Kind(
        "LeRobot",
        LeRobot,
        (
            ("batch_size", "global_cond", "generator"),
            ("batch_size", "global_cond", "generator", "noise"),
        ),
        frozenset(_EACH | {"unet", "full", "long", "config", "horizon"}),
        frozenset(
            [
                "dtype",
                "device",
                "get_device_from_parameters",
                "get_dtype_from_parameters",
                "action_feature",
                "_action_dim",
                "output_shapes",
            ]
        ),
    ),
    _Kind(
        "diffusion_policy",
        DiffusionPolicy,
        (("condition_data", "condition_mask", "local_cond", "global_cond", "generator", "kwargs"),),
        frozenset(_EACH | {"model", "dtype", "device"}),
        frozenset(),
    ),
)


def accelerate(policy: Policy) -> Policy:
    """Makes the sampling loop of a robot's diffusion policy faster, with the same results.

    The policy's scheduler becomes ``FastDDIMScheduler`` or ``FastDDPMScheduler``, and its
    ``conditional_sample`` a loop that keeps everything that stays the same from call to call. On a
    GPU a loop of up to 100 steps becomes one CUDA graph for each batch size and each shape of the
    conditions; a call copies x_T, the noise and the conditions into the graph's memory and replays
    it. The network's Python then runs only during the capture.

    In float32 on a CPU the results equal those of the policy's own method bit for bit, and the
    generators end in the same states.

    Args:
        policy: LeRobot's ``DiffusionPolicy`` or its ``diffusion``, or a U-Net policy of
            diffusion_policy, with a ``DDIMScheduler`` or ``DDPMScheduler`` of diffusers.

    Returns:
        The same object, changed. A policy that is accelerated already stays as it is.

    Raises:
        TypeError, ValueError: the policy, its scheduler or the scheduler's configuration is
            unknown. The policy is unchanged.

    Example::

        policy = policies.accelerate(DiffusionPolicy.from_pretrained("lerobot/diffusion_pusht"))
        action = policy.select_action(batch)
        policies.restore(policy)

    Source: Chi et al. 2023, "Diffusion Policy", section 3; the loops of
    ``lerobot/policies/diffusion/modeling_diffusion.py`` and
    ``diffusion_policy/policy/diffusion_unet_lowdim_policy.py``.
    """
    inner = _sampling(policy)
    if isinstance(inner.__dict__.get("conditional_sample"), Loop):
        return policy
    found = _kind_of(inner)
    _check_parts(inner, found)
    before = inner.noise_scheduler
    scheduler = _fast(before)
    inner.noise_scheduler = scheduler
    inner.conditional_sample = found.loop(inner, scheduler, before)
    return policy


def restore(policy: Policy) -> Policy:
    """Gives an accelerated policy its own loop and scheduler again, and frees the graphs.

    Raises:
        ValueError: the policy is not accelerated.
    """
    inner = _sampling(policy)
    loop = inner.__dict__.get("conditional_sample")
    if not isinstance(loop, Loop):
        raise ValueError(f"policy must be accelerated before, got {kind(inner)} with its own loop")
    if inner.noise_scheduler is loop.scheduler:
        inner.noise_scheduler = loop.before
    del inner.conditional_sample
    return policy


def _sampling(policy: Any) -> Any:
    """Returns the object that has ``conditional_sample``: the policy, or LeRobot's inner model."""
    inner = getattr(policy, "diffusion", policy)
    if not callable(getattr(inner, "conditional_sample", None)):
        raise TypeError(
            f"policy must have the method conditional_sample, as the policies of LeRobot and "
            f"diffusion_policy do, got {kind(policy)}"
        )
    return inner


def _kind_of(policy: Any) -> _Kind:
    """Returns the kind of the policy's own method, whose arguments and names must all be known."""
    name = f"conditional_sample of {kind(policy)}"
    if "conditional_sample" in policy.__dict__:
        raise ValueError(f"{name} must be a method of its class, got one set on the object")
    method = inspect.unwrap(type(policy).conditional_sample)
    if not inspect.isfunction(method):
        raise TypeError(f"{name} must be a Python function, got {kind(method)}")
    arguments = tuple(inspect.signature(method).parameters)[1:]
    for found in _KINDS:
        if arguments in found.arguments:
            names = frozenset(method.__code__.co_names)
            if more := names - found.used - found.usable:
                raise ValueError(
                    f"{name} must be {found.system}'s loop, which does not use "
                    f"{', '.join(sorted(more))}"
                )
            if missing := found.used - names:
                raise ValueError(
                    f"{name} must be {found.system}'s loop, which uses {', '.join(sorted(missing))}"
                )
            return found
    allowed = " or ".join(f"({', '.join(each)})" for k in _KINDS for each in k.arguments)
    raise ValueError(f"{name} must take {allowed}, got ({', '.join(arguments)})")


def _check_parts(policy: Any, found: _Kind) -> None:
    """Refuses a policy without the attributes that the loop reads."""
    network = getattr(policy, found.loop.network, None)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"policy.{found.loop.network} must be a torch.nn.Module, got {kind(network)}"
        )
    steps = getattr(policy, "num_inference_steps", None)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"policy.num_inference_steps must be an integer ≥ 1, got {shown(steps)}")
    if found.loop is LeRobot:
        try:
            size_of(policy.config)
        except (AttributeError, KeyError, TypeError):
            raise ValueError(
                f"policy.config must have horizon and action_feature.shape, or horizon and "
                f'output_shapes["action"], got {kind(getattr(policy, "config", None))}'
            ) from None


def _fast(scheduler: Any) -> Any:
    """Returns the drop-in for a scheduler, with the scheduler's tensors and timesteps."""
    name = "policy.noise_scheduler"
    if type(scheduler) not in (*_FAST, *_FAST.values()):
        raise TypeError(
            f"{name} must be diffusers' DDIMScheduler or DDPMScheduler, got {kind(scheduler)}"
        )
    config = scheduler.config
    if config.prediction_type not in NAMES:
        raise ValueError(
            f"{name} must have a prediction_type in {', '.join(NAMES)}, "
            f"got {config.prediction_type!r}"
        )
    if str(config.get("variance_type", "")).startswith("learned"):
        raise ValueError(f"{name} must have a fixed variance_type, got {config.variance_type!r}")
    if config.clip_sample and not config.clip_sample_range > 0:
        raise ValueError(
            f"{name} must have a clip_sample_range > 0, got {config.clip_sample_range!r}"
        )
    if config.get("strict", False):
        raise ValueError(f"{name} must have strict=False, got strict=True")
    if type(scheduler) not in _FAST:
        return scheduler
    made = _FAST[type(scheduler)].from_config(config)
    # The caller may have set levels, and training moves them to a device.
    vars(made).update((k, v) for k, v in vars(scheduler).items() if not k.startswith("_"))
    return made
