"""A policy's loop as one CUDA graph, whose inputs are renewed at each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastddim.dropins.policies.steps import Known, Steps
from fastddim.loop.graph import WHOLE as WHOLE
from fastddim.loop.held import weights_of
from fastddim.loop.own_graphs import own_graphs_off
from fastddim.loop.recording import Memory, capture, lasting
from fastddim.loop.streams import Streams


class _UnfitError(Exception):
    """The fused step cannot take the network's output."""


class Captured:
    """One loop in a graph, for inputs of fixed shapes. One call at a time.

    The graph reads the weights at their addresses, so weights that change in place take effect.
    ``current`` notices weights at other addresses and other submodules.
    """

    def __init__(
        self,
        steps: Steps,
        model: nn.Module,
        x: Tensor,
        cond: dict[str, Any],
        known: Known | None,
    ) -> None:
        self._steps, self._streams = steps, Streams(x.device)
        self._streams.join()
        with lasting():
            self._x_T = torch.zeros_like(x, memory_format=torch.contiguous_format)
            noisy = sum(noisy for _, noisy in steps.rows)
            self._noise = x.new_zeros((noisy, *x.shape))
            self._normals = list(self._noise.unbind())
            self._cond = {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in cond.items()
            }
            self._known = None if known is None else Known(*(part.clone() for part in known))
        self._model = model

    def try_capture(self) -> bool:
        """Captures the graph; returns False where a graph would not repeat the network.

        Such a network draws random numbers, writes to the timesteps, or returns other dtypes or
        shapes than the state's.

        Raises:
            RuntimeError: the network cannot be captured, for the reason in the message.
        """
        # Do not capture self: the cycle would delay freeing the graph's memory.
        steps, model, x_T, cond = self._steps, self._model, self._x_T, self._cond
        known, normals = self._known, _by_step(self._normals, self._steps.rows)

        def body() -> Tensor:
            return steps.run(model, x_T, cond, known, lambda i, x: normals[i], _unfit)

        device = x_T.device
        state = _state(device)
        try:
            with torch.no_grad():
                body()
        except _UnfitError:
            _restore(state, device)
            return False
        if not torch.equal(state, _state(device)) or not steps.current:
            _restore(state, device)
            return False
        with own_graphs_off(self, "_model"):
            self._replay = capture(body, device)
        # Read the weights after the capture, because the first call makes lazy ones.
        self._weights, self._places = weights_of(model), _places(model)
        return True

    @property
    def current(self) -> bool:
        """Whether the network's parts and weights are those that the graph reads."""
        return all(
            _mark(held.get(name)) == mark  # A name that has been removed has another mark.
            for held, name, mark in self._places
        )

    def __call__(
        self,
        x_T: Tensor,
        cond: dict[str, Any],
        known: Known | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Replays the loop once. Draws the steps' normals in the order of the original loop."""
        self._streams.join()
        self._x_T.copy_(x_T)
        for z in self._normals:
            z.normal_(generator=generator)
        for name, value in cond.items():
            if isinstance(value, Tensor):
                self._cond[name].copy_(value)
        if known is not None and self._known is not None:
            self._known.data.copy_(known.data)
            self._known.mask.copy_(known.mask)
        found: Tensor = self._replay().clone()
        return found


def has_graphs(device: torch.device) -> bool:
    """Tells whether loops on this device can be captured."""
    return Memory.on(device) is not None


def _by_step(normals: list[Tensor], rows: list[tuple[int, bool]]) -> dict[int, Tensor]:
    """Returns the normals by the number of their step."""
    noisy = [i for i, (_, noisy) in enumerate(rows) if noisy]
    return dict(zip(noisy, normals, strict=True))


def _unfit(i: int, output: Tensor, x: Tensor) -> Tensor:
    raise _UnfitError


def _state(device: torch.device) -> Tensor:
    """Returns the state of the device's default generator, which is in the host's memory."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _places(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Returns where each part and each weight of a network is."""
    return [
        (held, name, _mark(value))
        for module in model.modules()
        for held in (module._parameters, module._buffers, module._modules)
        for name, value in held.items()
    ]


def _mark(value: Any) -> Any:
    """Returns a weight's address, or the module itself, because a later module may get its id."""
    return value.data_ptr() if isinstance(value, Tensor) else value
