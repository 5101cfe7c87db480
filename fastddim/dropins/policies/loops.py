"""The two loops, as functions that take the place of a policy's ``conditional_sample``."""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.dropins._tables import Chosen
from fastddim.dropins.diffusers import FastDDPMScheduler
from fastddim.dropins.policies.captured import Captured, has_graphs
from fastddim.dropins.policies.steps import Known, Options, Steps, steps_of
from fastddim.loop.devices import check_not_capturing
from fastddim.loop.graph import WHOLE
from fastddim.step.arguments import transformed

_MOST = 16
"""The most loops of different shapes that a policy keeps."""


class _Kept(NamedTuple):
    """The steps, the network and the graph, if there is one, of calls with alike arguments."""

    steps: Steps
    model: Any
    graph: Captured | None


class Loop:
    """The loop of one policy. A call returns what the policy's own method returns.

    Where the fused step would differ from the original's, and where a graph would not repeat the
    network, the call runs the policy's own method: while gradients are recorded, under autocast,
    for other dtypes than float32, for arguments of other types, and for another scheduler than
    ``accelerate`` has put in.

    Copies and pickles hold the policy and both schedulers; they make their steps and graphs anew.
    """

    network: str
    """The name of the policy's attribute that holds the network."""

    def __init__(self, policy: Any, scheduler: Any, before: Any) -> None:
        self.policy, self.scheduler, self.before = policy, scheduler, before
        self._begin()

    def _begin(self) -> None:
        self._kept: dict[Any, _Kept] = {}
        self._set: tuple[int, Any, Chosen] | None = None
        self._turn = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("policy", "scheduler", "before")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def own(self) -> Any:
        """The policy's own method."""
        return type(self.policy).conditional_sample.__get__(self.policy)

    def _fits(self) -> bool:
        """Tells whether the fused loop can run now."""
        return (
            not torch.is_grad_enabled()
            and self.policy.noise_scheduler is self.scheduler
            and not torch.compiler.is_compiling()
            and not transformed()
        )

    def _chosen(self) -> Chosen:
        """Chooses the timesteps as the original loop does, unless they are chosen already."""
        scheduler, n = self.scheduler, self.policy.num_inference_steps
        config, was = scheduler.config, self._set
        if (
            was is None
            or was[0] != n
            or was[1] is not config
            or scheduler.num_inference_steps != n
            or scheduler._read is not was[2]
            or not was[2].source.unchanged(scheduler.timesteps)
        ):
            scheduler.set_timesteps(n)
            was = self._set = n, config, scheduler._chosen()
        return was[2]

    def _kept_for(
        self,
        x: Any,
        size: Any,
        device: torch.device,
        cond: dict[str, Any],
        known: Known | None,
        options: Options,
        batch: int | None,
    ) -> _Kept | None:
        """Returns the steps and the graph for these arguments, or None if the own method must run.

        ``x`` has the state's device and size; the loop has drawn nothing yet.
        """
        if torch.is_autocast_enabled(device.type):
            return None
        for value in cond.values():
            if value is not None and (value.__class__ is not Tensor or value.device != device):
                return None
        check_not_capturing(device)
        with self._turn:
            return self._found(x, size, device, cond, known, options, batch)

    def _found(
        self,
        x: Any,
        size: Any,
        device: torch.device,
        cond: dict[str, Any],
        known: Known | None,
        options: Options,
        batch: int | None,
    ) -> _Kept | None:
        """Returns the kept steps and graph, made anew where something behind them has changed."""
        model = getattr(self.policy, self.network)
        chosen = self._chosen()
        alike = [v if v is None else (v.shape, v.dtype) for v in (*cond.values(), *(known or ()))]
        key = (*alike, size, device, options, id(model), model.training, known is None)
        kept = self._kept.get(key)
        if (
            kept is not None
            and kept.steps.chosen is chosen
            and kept.steps.current
            and (kept.graph is None or kept.graph.current)
        ):
            return kept
        steps = steps_of(self.scheduler, chosen, options, device, batch)
        if steps is None:
            return None
        graph = None
        if _repeats(model) and len(steps.rows) <= WHOLE and has_graphs(device):
            # The former graph's memory can then serve the next.
            self._kept.pop(key, None)
            graph = Captured(steps, model, x(), cond, known)
            if not graph.try_capture():
                # The network may have written to the timesteps.
                graph, steps = None, steps_of(self.scheduler, chosen, options, device, batch)
                assert steps is not None
        if len(self._kept) >= _MOST:
            self._kept.clear()
        kept = self._kept[key] = _Kept(steps, model, graph)
        return kept

    def _run(
        self,
        kept: _Kept,
        x: Tensor,
        cond: dict[str, Any],
        known: Known | None,
        generator: torch.Generator | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Returns the last state of the loop from ``x``."""
        if kept.graph is not None and (generator is None or generator.device.type == x.device.type):
            with self._turn:  # A graph has one memory for its inputs.
                return kept.graph(x, cond, known, generator)
        scheduler, chosen = self.scheduler, kept.steps.chosen
        if known is not None and x.is_cpu and not known.mask.any():
            known = None

        def noise(i: int, x: Tensor) -> Tensor:
            drawn: Tensor = scheduler._drawn(x, generator)
            return drawn

        def unfit(i: int, output: Tensor, x: Tensor) -> Tensor:
            t = chosen.source.tensor[i]
            stepped = scheduler.step(output, t, x, generator=generator, **options)
            found: Tensor = stepped.prev_sample
            return found

        kept.steps.await_tables()
        return kept.steps.run(kept.model, x, cond, known, noise, unfit)


class LeRobot(Loop):
    """The loop of LeRobot's ``DiffusionModel``."""

    network = "unet"

    def __call__(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Returns actions (batch_size, horizon, actions), from ``noise`` or from drawn noise."""
        found = self._sampled(batch_size, global_cond, generator, noise)
        if found is None:
            given = {} if noise is None else {"noise": noise}
            own: Tensor = self.own(batch_size, global_cond, generator, **given)
            return own
        return found

    def _sampled(self, batch: int, global_cond: Any, generator: Any, x: Any) -> Tensor | None:
        """Returns the result of the fused loop, or None if the own method must run."""
        if not self._fits():
            return None
        size: tuple[int, ...]
        if x is None:
            first = next(self.policy.parameters(), None)
            if first is None or first.dtype != torch.float32 or first.__class__ is Tensor:
                return None
            size, device = (batch, *size_of(self.policy.config)), first.device
        elif (
            x.__class__ is Tensor
            and x.dtype == torch.float32
            and x.dim() > 2
            and "noise" in inspect.signature(self.own).parameters
        ):
            size, device = tuple(x.shape), x.device
        else:
            return None
        cond = {"global_cond": global_cond}
        kept = self._kept_for(
            lambda: torch.empty(size, device=device), size, device, cond, None, Options(), size[0]
        )
        if kept is None:
            return None
        if x is None:
            x = torch.randn(size=size, dtype=torch.float32, device=device, generator=generator)
        return self._run(kept, x, cond, None, generator, {})


class DiffusionPolicy(Loop):
    """The loop of diffusion_policy's U-Net policies."""

    network = "model"

    def __call__(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns a trajectory of condition_data's shape, which equals it where the mask is True.

        ``kwargs`` are arguments of ``scheduler.step``, such as ``eta``.
        """
        given = condition_data, condition_mask, local_cond, global_cond, generator
        found = self._sampled(*given, kwargs)
        if found is None:
            own: Tensor = self.own(*given, **kwargs)
            return own
        return found

    def _sampled(
        self, data: Any, mask: Any, local: Any, glob: Any, generator: Any, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Returns the result of the fused loop, or None if the own method must run."""
        options = self._options(kwargs)
        if (
            options is None
            or not self._fits()
            or data.__class__ is not Tensor
            or data.dtype != torch.float32
            or data.dim() < 3
            or mask.__class__ is not Tensor
            or mask.dtype != torch.bool
            or mask.device != data.device
            or mask.shape != data.shape[: mask.dim()]
        ):
            return None
        cond = {"local_cond": local, "global_cond": glob}
        known = Known(data, mask.reshape(*mask.shape, *(1,) * (data.dim() - mask.dim())))
        kept = self._kept_for(lambda: data, data.shape, data.device, cond, known, options, None)
        if kept is None:
            return None
        x = torch.randn(size=data.shape, dtype=data.dtype, device=data.device, generator=generator)
        return self._run(kept, x, cond, known, generator, kwargs)

    def _options(self, kwargs: dict[str, Any]) -> Options | None:
        """Returns the arguments of every step, or None for those that vary or are unknown."""
        if not kwargs:
            return Options()
        eta, rederive = kwargs.get("eta", 0.0), kwargs.get("use_clipped_model_output", False)
        if (
            kwargs.keys() - {"eta", "use_clipped_model_output"}
            or isinstance(self.scheduler, FastDDPMScheduler)
            or type(eta) not in (int, float)
        ):
            return None
        return Options(float(eta), bool(rederive))


def size_of(config: Any) -> tuple[int, int]:
    """Returns (horizon, actions) of LeRobot's configuration, of this and of earlier versions."""
    feature = getattr(config, "action_feature", None)
    if feature is None:
        return config.horizon, config.output_shapes["action"][0]
    return config.horizon, feature.shape[0]


def _repeats(model: Any) -> bool:
    """Tells whether a graph can repeat the network.

    A network in training mode may change its own statistics, and a compiled one may be a graph.
    """
    return not hasattr(model, "_orig_mod") and not any(part.training for part in model.modules())
