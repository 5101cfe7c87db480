"""The model as the loop calls it: its condition, guidance and precision, and its output."""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastddim.check import SamplingWarning, kind, shown
from fastddim.step.arguments import OUTPUTS

Model: TypeAlias = Callable[..., Any]
Cond: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Predictor:
    """A model and the arguments of its calls.

    Attributes:
        model: ``model(x, t, **cond)``.
        batch: the number of samples; a call with guidance has twice as many.
        device, dtype: of the model's x.
        cond, uncond: keyword arguments; ``uncond`` is None without guidance.
        cond_fn: the gradient ∇_x ln p(y | x_t) of classifier guidance, ``cond_fn(x, t, **cond)``.
        self_condition: the model's keyword for the x0 that the last step predicted.
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
        """Checks the arguments and stacks ``uncond`` and ``cond``.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed.
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
        if uncond is not None and not differs(uncond, cond):
            raise ValueError(
                f"uncond must replace a value of cond, such as a prompt's embedding by that of an "
                f"empty prompt: {list(uncond) or 'an empty mapping'} leaves all of cond as it is, "
                f"and guidance between two equal outputs changes nothing"
            )
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
        """Returns the predictor for some of the samples."""
        cond = _taken(self.cond, samples, self.batch)
        # Stack the full batch's conditions first: only there is a per-sample tensor recognisable
        # by its length.
        both = {} if self.uncond is None else stacked(self.uncond, self.cond, self.batch, samples)
        return replace(self, batch=len(samples), cond=cond, both=both)

    def input(self, x: Tensor, twice: bool) -> Tensor:
        """Returns x in the model's dtype, stacked ``twice`` for guidance."""
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        return torch.cat([x, x]) if twice else x

    @contextmanager
    def one_cast(self) -> Iterator[None]:
        """Makes autocast keep its cast weights from one call to the next.

        Autocast drops them at the end of its outermost context. This context is around those of
        the calls, and enables autocast for nothing else.
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

    def __call__(self, x_in: Tensor, t: Tensor, x0: Tensor | None, twice: bool) -> Tensor:
        """Returns the model's output for ``x_in`` at ``t``, unpacked and checked.

        ``twice`` says whether ``x_in`` holds the batch twice, for guidance.
        """
        keywords = self.both if twice else self.cond
        if self.self_condition is not None:
            last = torch.zeros_like(x_in) if x0 is None else self.input(x0, twice)
            keywords = {**keywords, self.self_condition: last}
        try:
            before = x_in._version
        except RuntimeError:  # Inference mode does not count writes.
            before = None
        try:
            if self.autocast is None:
                output = self.model(x_in, t, **keywords) if keywords else self.model(x_in, t)
            else:
                with torch.autocast(self.device.type, dtype=self.autocast):
                    output = self.model(x_in, t, **keywords)
        except RuntimeError as error:
            # Compare the dtypes only after a failure, since many networks cast x themselves.
            own = weights_dtype(self.model)
            at_odds = self.autocast is None and own not in (None, x_in.dtype)
            if not at_odds or "type" not in str(error):
                raise
            raise ValueError(
                f"dtype must be {own}, the dtype of the model's parameters, got {x_in.dtype}: pass "
                f"dtype={own} or autocast=True"
            ) from error
        if before is not None and x_in._version != before:
            raise written("model")
        if (
            output.__class__ is Tensor
            and output.dtype in OUTPUTS
            and output.shape == x_in.shape
            and output.device == x_in.device
        ):
            return output
        return unpacked(output, x_in)

    def shifted(self, output: Tensor, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """Returns ``output`` plus ``shift`` times cond_fn's gradient at x, in both halves alike."""
        assert self.cond_fn is not None
        if not len(x):
            return output
        before = 0 if x.is_inference() else x._version
        gradient = self.cond_fn(x, t, **self.cond)
        if before != (0 if x.is_inference() else x._version):
            raise written("cond_fn")
        if not isinstance(gradient, Tensor) or gradient.shape != x.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else kind(gradient)
            raise ValueError(
                f"cond_fn must return a tensor of x's shape, {tuple(x.shape)}, got {got}"
            )
        halves = output[:, : x.shape[1]].float().unflatten(0, (len(output) // len(x), len(x)))
        return torch.addcmul(halves, gradient.detach().float(), shift).flatten(0, 1)


def written(name: str) -> ValueError:
    """Returns the error for a function that has written into its x.

    x is the loop's state or a copy of it, depending on the dtype, so that a write would change the
    samples in one dtype and not in another.
    """
    return ValueError(
        f"{name} must not write into x, which the step reads after the call: clone x first"
    )


def network(model: Model) -> nn.Module | None:
    """Returns the network that ``model`` is, is a method of, or a partial of; None for others."""
    while isinstance(model, functools.partial):
        model = model.func
    owner = getattr(model, "__self__", model)
    return owner if isinstance(owner, nn.Module) else None


def device_of(model: Model) -> torch.device | None:
    """Returns the device of the model's first parameter or buffer, if any."""
    net = network(model)
    if net is None:
        return None
    first = next(itertools.chain(net.parameters(), net.buffers()), None)
    return None if first is None else first.device


def weights_dtype(model: Model) -> torch.dtype | None:
    """Returns the floating point dtype of the model's parameters, if all have the same."""
    net = network(model)
    found = {p.dtype for p in net.parameters() if p.is_floating_point()} if net else set()
    return found.pop() if len(found) == 1 else None


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_training(model: Model, stacklevel: int) -> None:
    """Warns, once for each network, if its training mode changes the samples."""
    net = network(model)
    if net is None or not net.training or net in _warned:
        return
    _warned.add(net)
    active = next((name for m in net.modules() if (name := _training_changes(m))), None)
    if active is not None:
        warnings.warn(
            f"model is in training mode, and its {active} makes samples depend on other random "
            f"numbers or on each other: call model.eval() before sampling",
            SamplingWarning,
            stacklevel=stacklevel + 1,
        )


def _training_changes(module: nn.Module) -> str | None:
    """Returns words for the part of this module that training mode changes, or None."""
    if not module.training:
        return None
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return type(module).__name__ if module.p > 0 else None
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return type(module).__name__ if module.track_running_stats else None
    # Attention and recurrent layers, torch's and others', hold their dropout as a number.
    rate = getattr(module, "dropout", None)
    return f"dropout of {rate:g}" if isinstance(rate, float) and rate > 0 else None


def unpacked(output: Any, x_in: Tensor) -> Tensor:
    """Returns the tensor in the model's output for ``x_in``, checked."""
    if not isinstance(output, Tensor) and hasattr(output, "sample"):
        output = output.sample
    elif isinstance(output, tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, got {kind(output)}")
    tensor: Tensor = output
    if tensor.dtype not in OUTPUTS:
        if tensor.dtype != torch.float64 or x_in.dtype != torch.float64:
            raise TypeError(f"model must return float32, bfloat16 or float16, got {tensor.dtype}")
        tensor = tensor.float()  # The caller chose float64; the step's arithmetic is float32.
    if tensor.device != x_in.device:
        raise ValueError(f"model must return a tensor on {x_in.device}, got {tensor.device}")
    if tensor.shape == x_in.shape:
        return tensor
    allowed, described = shapes(x_in.shape)
    if tensor.shape not in allowed:
        raise ValueError(f"model must return a tensor of {described}, got {tuple(tensor.shape)}")
    return tensor


def shapes(x_in: Sequence[int]) -> tuple[list[tuple[int, ...]], str]:
    """Returns the output shapes allowed for an input of this shape, and their description.

    A learned variance doubles the channels. Samples that are vectors, (batch, n), have no channels,
    and twice as many numbers are an error.
    """
    same = tuple(x_in)
    described = f"x's shape, {same}"
    if len(same) < 3:
        return [same], f"{described} (samples of one dimension have no channels for a variance)"
    both = [same, (same[0], 2 * same[1], *same[2:])]
    return both, f"{described}, or one with twice the channels (a learned variance)"


def stacked(uncond: Cond, cond: Cond, batch: int, samples: Tensor | None = None) -> dict[str, Any]:
    """Stacks ``uncond`` and ``cond`` along the batch; keys that ``uncond`` lacks are ``cond``'s.

    ``samples`` selects some rows of the batch.
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
    """Stacks u and c along the batch, and each item of a mapping or a list likewise.

    Tensors whose first dimension is the batch have a row for each sample; both halves share the
    others.
    """
    if isinstance(u, Tensor) and isinstance(c, Tensor):
        if u is c and (c.dim() == 0 or len(c) != batch):
            return c
        if u.dim() != c.dim() or u.shape[1:] != c.shape[1:]:
            raise ValueError(
                f"{name} must have the shape of cond's, {tuple(c.shape)}, got {tuple(u.shape)}"
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
    raise ValueError(f"{name} must equal cond's unless both are tensors, got {kind(u)}")


def same(a: Any, b: Any) -> bool:
    """Returns whether two values other than tensors are equal; arrays, in each element."""
    return a is b or (type(a) is type(b) and np.array_equal(a, b))


def differs(u: Any, c: Any) -> bool:
    """Returns whether any tensor of ``uncond`` is another object than ``cond``'s.

    ``stack`` has already refused other values that differ.
    """
    if isinstance(u, Tensor):
        return u is not c
    if isinstance(u, Mapping):
        return any(differs(value, c[key]) for key, value in u.items())
    if isinstance(u, (list, tuple)):
        return any(differs(a, b) for a, b in zip(u, c, strict=True))
    return False


def _taken(value: Any, samples: Tensor, batch: int) -> Any:
    """Returns ``value`` with only these samples' rows in each tensor that has a row a sample."""
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
    if not isinstance(given, torch.dtype) or given not in (torch.bfloat16, torch.float16):
        raise TypeError(f"autocast must be True, bfloat16 or float16, got {shown(given)}")
    return given
