"""The model as the loop calls it: its condition, guidance and precision, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.check import kind
from fastddim.ops import OUTPUTS

Model: TypeAlias = Callable[..., Any]
Cond: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Predictor:
    """A model and what goes with each of its calls.

    Attributes:
        model: ``model(x, t, **cond)``.
        batch: how many samples there are; a call with guidance has twice as many.
        device, dtype: of the x it is given.
        cond, uncond: its keyword arguments; ``uncond`` is None without guidance.
        cond_fn: the gradient ∇_x ln p(y | x_t) of classifier guidance, ``cond_fn(x, t, **cond)``.
        self_condition: the keyword under which it gets the x0 predicted by the step before.
        autocast: the dtype of ``torch.autocast`` around each call; None for none.
    """

    model: Model
    batch: int
    device: torch.device
    dtype: torch.dtype
    cond: Cond
    uncond: Cond | None
    cond_fn: Model | None
    self_condition: str | None
    autocast: torch.dtype | None
    both: Cond
    """``uncond`` and ``cond`` one after the other along the batch."""

    @classmethod
    def of(
        cls,
        model: Model,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        cond: Cond | None,
        uncond: Cond | None,
        cond_fn: Model | None,
        self_condition: str | None,
        autocast: torch.dtype | bool | None,
    ) -> Predictor:
        """All of it found sound; the halves stacked.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        for name, function in (("model", model), ("cond_fn", cond_fn)):
            if not callable(function) and (name == "model" or function is not None):
                raise TypeError(f"{name} must be callable, got {kind(function)}")
        for name, given in (("cond", cond), ("uncond", uncond)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{name} must map names to values, got {kind(given)}")
        if self_condition is not None and not isinstance(self_condition, str):
            raise TypeError(
                f"self_condition must be the name of the model's keyword, "
                f"got {kind(self_condition)}"
            )
        cond = dict(cond or {})
        if self_condition in cond:
            raise ValueError(f"cond must not hold {self_condition!r}, which is self_condition's")
        both = {} if uncond is None else stacked(uncond, cond, batch)
        return cls(
            model,
            batch,
            device,
            dtype,
            cond,
            uncond,
            cond_fn,
            self_condition,
            _autocast(autocast, device),
            both,
        )

    def part(self, samples: Tensor) -> Predictor:
        """The same for some of the samples."""
        cond = _taken(self.cond, samples, self.batch)
        # Out of the whole, where what has a row for each sample is told from what happens to have
        # as many rows as these.
        both = {} if self.uncond is None else stacked(self.uncond, self.cond, self.batch, samples)
        return replace(self, batch=len(samples), cond=cond, both=both)

    def input(self, x: Tensor, twice: bool) -> Tensor:
        """x as the model is given it, stacked upon itself where it is asked ``twice``."""
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        return torch.cat([x, x]) if twice else x

    @contextmanager
    def one_cast(self) -> Iterator[None]:
        """Inside, autocast keeps the weights it has cast from one call to the next.

        It drops them where its outermost context ends; this one is around the calls' own, and is
        autocast to nothing else.
        """
        if self.autocast is None:
            yield
            return
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    def __call__(self, x_in: Tensor, t: Tensor, x0: Tensor | None) -> Tensor:
        """What the model says of ``x_in`` at ``t``, unpacked and checked."""
        twice = x_in.shape[0] != self.batch
        keywords = self.both if twice else self.cond
        if self.self_condition is not None:
            before = torch.zeros_like(x_in) if x0 is None else self.input(x0, twice)
            keywords = {**keywords, self.self_condition: before}
        if self.autocast is None:
            return unpacked(self.model(x_in, t, **keywords), x_in)
        with torch.autocast(self.device.type, dtype=self.autocast):
            return unpacked(self.model(x_in, t, **keywords), x_in)

    def shifted(self, output: Tensor, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """``output`` moved along the classifier's gradient at x, both halves alike."""
        assert self.cond_fn is not None
        if not len(x):
            return output
        gradient = self.cond_fn(x, t, **self.cond)
        if not isinstance(gradient, Tensor) or gradient.shape != x.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else kind(gradient)
            raise ValueError(
                f"cond_fn must return a tensor of x's shape, {tuple(x.shape)}, got {got}"
            )
        halves = output[:, : x.shape[1]].float().unflatten(0, (len(output) // len(x), len(x)))
        return torch.addcmul(halves, gradient.detach().float(), shift).flatten(0, 1)


def unpacked(output: Any, x_in: Tensor) -> Tensor:
    """The tensor in what a model returned for ``x_in``."""
    if not isinstance(output, Tensor) and hasattr(output, "sample"):
        output = output.sample
    elif isinstance(output, tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, got {kind(output)}")
    if output.dtype not in OUTPUTS:
        raise TypeError(f"model must return float32, bfloat16 or float16, got {output.dtype}")
    if output.device != x_in.device:
        raise ValueError(f"model must return a tensor on {x_in.device}, got {output.device}")
    if output.shape == x_in.shape:
        return output
    allowed, described = shapes(x_in.shape)
    if output.shape not in allowed:
        raise ValueError(f"model must return a tensor of {described}, got {tuple(output.shape)}")
    return output


def shapes(x_in: Sequence[int]) -> tuple[list[tuple[int, ...]], str]:
    """What a model may return for an input of this shape, and how to say so.

    A learned variance follows in as many channels again. Where a sample is a vector, (batch, n),
    there are no channels, and twice as many numbers are an error.
    """
    same = tuple(x_in)
    described = f"x's shape, {same}"
    if len(same) < 3:
        return [same], f"{described} (samples of one dimension have no channels for a variance)"
    both = [same, (same[0], 2 * same[1], *same[2:])]
    return both, f"{described}, or one with twice the channels (a learned variance)"


def stacked(uncond: Cond, cond: Cond, batch: int, samples: Tensor | None = None) -> dict[str, Any]:
    """(uncond, cond) along the batch, value by value; what ``uncond`` lacks is ``cond``'s.

    ``samples``: only the rows of these.
    """
    return _stacked("uncond", uncond, cond, batch, samples)


def _stacked(
    name: str, uncond: Cond, cond: Cond, batch: int, samples: Tensor | None
) -> dict[str, Any]:
    extra = [key for key in uncond if key not in cond]
    if extra:
        raise ValueError(f"{name} must hold nothing that cond lacks, got {extra[0]!r}")
    return {
        key: stack(f"{name}[{key!r}]", uncond.get(key, value), value, batch, samples)
        for key, value in cond.items()
    }


def stack(name: str, u: Any, c: Any, batch: int, samples: Tensor | None = None) -> Any:
    """u and c one after the other along the batch, and so for each of a mapping's or a list's.

    Tensors whose first dimension is the batch belong to samples; the rest to both halves.
    """
    if isinstance(u, Tensor) and isinstance(c, Tensor):
        if u is c and (c.dim() == 0 or len(c) != batch):
            return c
        if u.dim() != c.dim() or u.shape[1:] != c.shape[1:]:
            raise ValueError(
                f"{name} must have the shape it has in cond, {tuple(c.shape)}, got {tuple(u.shape)}"
            )
        if c.dim() == 0 or {len(u), len(c)} - {1, batch}:
            raise ValueError(
                f"{name} must have 1 or {batch} rows, in cond as well, to differ from it, got "
                f"{tuple(u.shape)} and {tuple(c.shape)}"
            )
        halves = [half.expand(batch, *[-1] * (half.dim() - 1)) for half in (u, c)]
        if samples is not None:
            halves = [half[samples.to(half.device)] for half in halves]
        return torch.cat(halves)
    if isinstance(u, Mapping) and isinstance(c, Mapping):
        return _stacked(name, u, c, batch, samples)
    if isinstance(c, (list, tuple)) and type(u) is type(c) and len(u) == len(c):
        pairs = enumerate(zip(u, c, strict=True))
        return type(c)([stack(f"{name}[{i}]", a, b, batch, samples) for i, (a, b) in pairs])
    if same(u, c):
        return c
    raise ValueError(f"{name} must equal cond's where it is no tensor, got {kind(u)}")


def same(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors are one, or equal; arrays are in each element."""
    return a is b or (type(a) is type(b) and np.array_equal(a, b))


def _taken(value: Any, samples: Tensor, batch: int) -> Any:
    """``value`` with the rows of these samples of every tensor that has one for each."""
    if isinstance(value, Tensor):
        return value[samples.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, Mapping):
        return {key: _taken(item, samples, batch) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_taken(item, samples, batch) for item in value])
    return value


def _autocast(given: torch.dtype | bool | None, device: torch.device) -> torch.dtype | None:
    if given is None or given is False:
        return None
    if given is True:
        return torch.get_autocast_dtype(device.type)
    if given not in (torch.bfloat16, torch.float16):
        raise TypeError(f"autocast must be True, bfloat16 or float16, got {given!r}")
    return given
