"""One call of the sampler: its arguments checked and on the device, its two moves, its buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim import noise as counter
from fastddim.buffers import FRESH, Spare, fitting
from fastddim.check import finite, kind, shown, whole
from fastddim.coefficients import PREDICTIONS, Float32, Prediction
from fastddim.layout import input_like
from fastddim.op import OP as STEP
from fastddim.op import initial_noise
from fastddim.predict import Model, Predictor, device_of
from fastddim.step import OUTPUTS, ddim_step
from fastddim.timesteps import Pair

Given: TypeAlias = Sequence[Tensor] | Tensor
Guidance: TypeAlias = (
    float | Sequence[float] | Sequence[Sequence[float]] | Tensor | Callable[[int], Any]
)
Progress: TypeAlias = bool | Callable[[Iterable[Any]], Iterable[Any]]


class Row(NamedTuple):
    """What one step reads. All of it is on the device before the first model call."""

    number: int
    pair: Pair
    """The levels it goes from and to."""
    rows: Tensor
    """The row of the table, int32 (batch,), all alike."""
    t: Tensor
    """The level the model is told, int64 (batch,)."""
    asked: Tensor
    """t once for each sample the model is given: twice the batch with guidance."""
    guidance: Tensor | None
    """w, float32 (batch,), where the model is asked twice."""
    shift: Tensor | None
    """By how much of cond_fn's gradient the model's output moves, float32 ()."""
    noisy: bool
    following: tuple[int, bool] | None
    """How many times the batch the next row's input holds, and whether the step is to write it."""
    by_x0: bool = False
    """Backwards: whether the model's x0 stays and ε follows from x_s, and not the other way."""


@dataclass(frozen=True)
class Noise:
    """Where normals come from: seeds (one for each sample), a generator, or tensors given."""

    size: tuple[int, ...]
    device: torch.device
    seeds: Tensor | None = None
    generator: torch.Generator | None = None
    given: Given | None = None
    _buffer: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        size: tuple[int, ...],
        device: torch.device,
        steps: int,
        seeds: Sequence[int] | Tensor | None,
        generator: torch.Generator | None,
        given: Given | None,
    ) -> Noise:
        """At most one source, checked. With none, seeds from torch's default generator.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        sources = {"seeds": seeds, "generator": generator, "noise": given}
        names = [name for name, source in sources.items() if source is not None]
        if len(names) > 1:
            raise ValueError(f"noise has one source, got {' and '.join(names)}")
        if given is not None:
            _check_given(given, size, device, steps)
            # Here, since taking a row of a tensor is a call of torch's dispatcher.
            given = given.unbind() if isinstance(given, Tensor) else given
        elif generator is not None:
            _check_generator(generator, device)
        else:
            keys = drawn_seeds(size[0]) if seeds is None else checked_seeds(seeds, size[0])
            return cls(size, device, keys.to(device))
        return cls(size, device, None, generator, given)

    def part(self, samples: Tensor) -> Noise:
        """That of some of the samples. A generator's cannot be divided."""
        given = None if self.given is None else [z[samples] for z in self.given]
        seeds = None if self.seeds is None else self.seeds[samples]
        return Noise((len(samples), *self.size[1:]), self.device, seeds, None, given)

    def initial(self) -> Tensor:
        """x_T: stream 1 of the seeds."""
        if self.given is not None:
            raise ValueError("x_T must be given with noise, which holds the steps' only")
        if self.seeds is not None:
            return initial_noise(self.seeds, self.size)
        return self._drawn()

    def step(self, row: Row) -> tuple[Tensor | None, Tensor | None]:
        """(seeds, z) of a step: at most one is a tensor. Drawn only where the step adds noise."""
        if not row.noisy:
            return None, None
        if self.given is not None:
            return None, self.given[row.number]
        if self.generator is not None:
            self._buffer[:] = [self._drawn(*self._buffer)]
            return None, self._buffer[0]
        return self.seeds, None

    def forward(self, rows: Tensor) -> Tensor:
        """The noise put on a known image: stream 2 of the seeds."""
        if self.seeds is None:
            return self._drawn()
        z = torch.empty(self.size, dtype=torch.float32, device=self.device)
        torch.ops.fastddim.normal_(z, self.seeds, rows, counter.FORWARD)
        return z

    def _drawn(self, into: Tensor | None = None) -> Tensor:
        if into is not None:
            return into.normal_(generator=self.generator)  # what randn does with memory of its own
        return torch.randn(
            self.size, generator=self.generator, device=self.device, dtype=torch.float32
        )


@dataclass(frozen=True)
class Known:
    """Inpainting: an image whose masked part each state is given anew, at its own noise level."""

    image: Tensor
    mask: Tensor
    table: Tensor
    """From clean data to the level of each row's x_t, and last to that of the final x_s."""
    rows: tuple[Tensor, ...]
    clean: tuple[bool, ...]

    def put_back(self, x: Tensor, row: int, noise: Noise) -> Tensor:
        """x with the image at the level of ``row`` where the mask is 1."""
        image = self.image
        if not self.clean[row]:
            # Its forward process is the step back from clean data, the noise standing for ε.
            z = noise.forward(self.rows[row])
            image, _ = ddim_step(image, z, self.table, self.rows[row], want_x0=False)
        return torch.lerp(x, image, self.mask)

    def part(self, samples: Tensor) -> Known:
        batch = len(self.image)
        mask = self.mask[samples] if len(self.mask) == batch else self.mask
        rows = tuple(row[:1].expand(len(samples)) for row in self.rows)
        return replace(self, image=self.image[samples], mask=mask, rows=rows)


@dataclass
class Run:
    """A loop's arguments on the device, and its two moves: ``predict`` and ``step``.

    Attributes:
        x: where to begin, until the loop has begun.
        made: whether x is nobody's memory but the loop's.
        predictor: the model and what goes with its calls.
        table: the coefficients.
        rows: the steps to take, in order.
        prediction, clip: as the step's op takes them.
        heard: for a loop that runs backwards, the table by which the step's op turns what the
            model says into ε, or into x0 in rows ``by_x0``, guidance included; None forwards.
        guidance: w, float32 (rows of the table, batch), or None.
        noise: where z comes from.
        known: what is known of the image, for inpainting.
        dtype: of the result.
        wants_x0: whether each step is to give x0.
        reads_x0: whether anything but the caller reads it after the step.
        progress: what the rows are wrapped in.
    """

    x: Tensor | None
    made: bool
    predictor: Predictor
    table: Tensor
    rows: list[Row]
    prediction: Prediction
    clip: float | None
    heard: Tensor | None
    guidance: Tensor | None
    noise: Noise
    known: Known | None
    dtype: torch.dtype
    wants_x0: bool
    progress: Callable[[Iterable[Any]], Iterable[Any]]
    reads_x0: bool = False
    states: Spare = field(default_factory=Spare)
    inputs: dict[int, Spare] = field(default_factory=lambda: {1: Spare(), 2: Spare()})
    x0s: Spare = field(default_factory=Spare)
    held: list[Tensor] = field(default_factory=list)
    """What a graph of this run reads beside what the run names: the model's weights."""
    copies: Spare = field(default_factory=Spare)
    """Of states, for the caller."""
    instead: Tensor | None = None
    """What a callback has put in x's place."""
    _made: Tensor | None = None
    """The latest state, if the loop has made it: nobody's memory but its own."""
    _input: Tensor | None = None
    """``_made`` as the model is given it."""
    _x0: Tensor | None = None

    def begin(self) -> Tensor:
        """The x to begin at, and buffers for the loop.

        On a CPU all that the steps write is there before the first model call.
        """
        x, self.x = self.x, None  # held by the loop alone, which may write it when it is past
        assert x is not None
        made = x if self.made else None
        self.place(made, None, None, Spare(), {1: Spare(), 2: Spare()}, Spare())
        self.instead = None
        if x.device.type == "cpu":
            self.states = Spare(*(torch.empty_like(x) for _ in range(1 if self.made else 2)))
            if self.predictor.self_condition is not None:
                self.x0s = Spare(*(torch.empty_like(x) for _ in range(2)))
            # The first row's input is made for it, and is then the next row's, if of its size.
            sizes = {row.following[0] for row in self.rows if row.following and row.following[1]}
            for copies in sizes - {len(self.rows[0].asked) // max(len(x), 1) or 1}:
                self.inputs[copies] = Spare(input_like(x, self.predictor.dtype, copies))
        return x

    def place(
        self,
        made: Tensor | None,
        x_in: Tensor | None,
        x0: Tensor | None,
        states: Spare,
        inputs: dict[int, Spare],
        x0s: Spare,
    ) -> None:
        """What the next step finds, and the memory it writes."""
        self._made, self._input, self._x0 = made, x_in, x0
        self.states, self.inputs, self.x0s = states, inputs, x0s

    def predict(self, x: Tensor, row: Row) -> Tensor:
        """What the model says of x, as the step reads it."""
        output = self._asked(x, row)
        if row.shift is not None:
            output = self.predictor.shifted(output, x, row.t, row.shift)
        return output

    def _asked(self, x: Tensor, row: Row) -> Tensor:
        x_in, self._input = self._input, None
        if x is not self._made or x_in is None or len(x_in) != len(row.asked):
            x_in = self.predictor.input(x, row.guidance is not None)
        output = self.predictor(x_in, row.asked, self._x0)
        if x_in is not x:
            self.inputs[len(x_in) // max(len(x), 1) or 1].keep(x_in)
        return output

    def eps_or_x0(self, y: Tensor, row: Row) -> Tensor:
        """ε at y, whatever the model returns: the step to 0·x0 + 1·ε. In a row ``by_x0``, x0."""
        output = self.predict(y, row)
        as_is = self.prediction == self._backwards(row) and row.guidance is None
        if self.heard is None or as_is:
            return output
        eps, _ = ddim_step(
            y,
            output,
            self.heard,
            row.rows,
            guidance=row.guidance,
            prediction=self.prediction,
            want_x0=False,
        )
        return eps

    @staticmethod
    def _backwards(row: Row) -> Prediction:
        """What a step up is given."""
        return "sample" if row.by_x0 else "epsilon"

    def step(self, x: Tensor, output: Tensor, row: Row) -> tuple[Tensor, Tensor | None]:
        """(x_s, x0) and, in the same pass over memory, the model's next input."""
        seeds, z = self.noise.step(row)
        into = self._next_input(x, row)
        backwards = self.heard is not None
        x_s, x0 = self.states.take(), None
        if x_s is None:
            x_s = torch.empty_like(x)
        if self.wants_x0:
            x0 = self.x0s.take()
            x0 = torch.empty_like(x) if x0 is None else x0
        # All of it has been looked at: the arguments before the loop, the output by the predictor.
        STEP(
            x,
            output,
            self.table,
            row.rows,
            seeds,
            z,
            None if backwards else row.guidance,
            None,
            PREDICTIONS.index(self._backwards(row) if backwards else self.prediction),
            True,
            self.clip,
            False,
            x_s,
            x0,
            into,
        )
        if x is self._made:
            self.states.keep(x)
        if self._x0 is not None:
            self.x0s.keep(self._x0)
        self._made, self._input = x_s, into
        self._x0 = x0 if self.predictor.self_condition is not None else None
        return x_s, x0

    def copy(self, x: Tensor) -> Tensor:
        """x for the caller, who may write to it: in the result's dtype and never the loop's own."""
        if x.dtype != self.dtype:
            return x.to(self.dtype)
        if not x.is_cpu or x.numel() < FRESH:
            return x.clone()
        own = fitting(self.copies.take(), x)
        own = torch.empty_like(x) if own is None else own
        own.copy_(x)
        self.copies.keep(own)
        return own.detach()  # whatever the caller asks of it, requires_grad say, ``own`` is not it

    def copy_of_x0(self, x0: Tensor) -> Tensor:
        return x0.to(self.dtype, copy=self.reads_x0)

    def _next_input(self, x: Tensor, row: Row) -> Tensor | None:
        """Where the step is to write what the model is given next, if that is not x_s itself."""
        if row.following is None:
            return None
        copies, written = row.following
        if not written:
            return None
        into = self.inputs[copies].take()
        return input_like(x, self.predictor.dtype, copies) if into is None else into

    def known_in(self, x: Tensor, row: int) -> Tensor:
        """x with what is known of the image at the level of ``row``'s t."""
        return x if self.known is None else self.known.put_back(x, row, self.noise)

    def part(self, samples: Tensor) -> Run:
        """The same for some of the samples."""
        n = len(samples)
        some = None if self.guidance is None else self.guidance[:, samples]

        def narrowed(row: Row) -> Row:
            w = None if row.guidance is None or some is None else some[row.number]
            asked = row.t[:1].expand(n if w is None else 2 * n)
            index, t = row.rows[:1].expand(n), row.t[:1].expand(n)
            return row._replace(rows=index, t=t, asked=asked, guidance=w)

        assert self.x is not None
        return replace(
            self,
            x=self.x[samples],
            made=True,
            predictor=self.predictor.part(samples),
            rows=[narrowed(row) for row in self.rows],
            guidance=some,
            noise=self.noise.part(samples),
            known=None if self.known is None else self.known.part(samples),
        )


@dataclass(frozen=True)
class Plan:
    """What a sampler decides before it has seen a tensor: its table, and the order of its rows.

    ``levels`` are those the model is told and ``pairs`` the (from, to) of each row, by the table's
    rows; ``shift`` is the factor of cond_fn's gradient, likewise, where there is one. ``heard``
    and ``by_x0`` are those of a loop that runs backwards.
    """

    table: Float32
    order: range
    levels: tuple[int, ...]
    pairs: tuple[Pair, ...]
    shift: Float32 | None
    prediction: Prediction
    clip: float | None
    heard: Float32 | None = None
    by_x0: tuple[bool, ...] = ()


def rows_of(
    plan: Plan, predictor: Predictor, guidance: Tensor | None, inpainted: bool
) -> list[Row]:
    """The rows of ``plan`` in its order. ``guidance``: w (rows, batch), on the device."""
    batch, device = predictor.batch, predictor.device
    count = len(plan.table)
    index = torch.arange(count, dtype=torch.int32, device=device)[:, None].expand(-1, batch)
    levels = torch.tensor(plan.levels, device=device)[:, None]
    once, indices = levels.expand(-1, batch).unbind(), index.unbind()
    twice = once if guidance is None else levels.expand(-1, 2 * batch).unbind()
    shifts = None if plan.shift is None else torch.tensor(plan.shift, device=device).unbind()
    w = None if guidance is None else guidance.unbind()
    noisy = (plan.table[:, 5] != 0).tolist()
    # Where w is 1 for every sample the condition alone is asked: half the work, and c exactly.
    guided = [False] * count if guidance is None else (guidance != 1).any(1).tolist()
    # With samples taken one after the other, x itself is what a float32 model is given.
    cast, writable = predictor.dtype != torch.float32, predictor.dtype in OUTPUTS
    rows = []
    for i, following in zip(plan.order, [*plan.order[1:], None], strict=True):
        copies = None if following is None else 1 + guided[following]
        rows.append(
            Row(
                i,
                plan.pairs[i],
                indices[i],
                once[i],
                (twice if guided[i] else once)[i],
                w[i] if w is not None and guided[i] else None,
                None if shifts is None else shifts[i],
                noisy[i],
                None
                if copies is None
                else (copies, writable and not inpainted and (cast or copies == 2)),
                bool(plan.by_x0) and plan.by_x0[i],
            )
        )
    return rows


def checked_guidance(
    guidance: Any, uncond: object, batch: int, levels: Sequence[int]
) -> npt.NDArray[np.float32] | None:
    """w of each row and sample, float32 (rows, batch), or None without guidance.

    Raises:
        TypeError, ValueError: naming what was given and what is allowed.
    """
    if guidance is None and uncond is None:
        return None
    if guidance is None:
        raise ValueError("guidance must be given with uncond: a number such as 7.5, got None")
    if uncond is None:
        raise ValueError(
            "uncond must be given with guidance: the model's arguments without the condition"
        )
    steps = len(levels)
    if callable(guidance) and not isinstance(guidance, Tensor):
        rows = [_numbers(f"guidance({t})", guidance(t)) for t in levels]
        for t, row in zip(levels, rows, strict=True):
            if row.shape not in ((), (batch,)):
                raise ValueError(
                    f"guidance({t}) must be a number or one for each of {batch} samples, "
                    f"got shape {row.shape}"
                )
        return np.stack([np.broadcast_to(row, (batch,)) for row in rows]).astype(np.float32)
    values = _numbers("guidance", guidance)
    if values.shape not in ((), (batch,), (steps, 1), (steps, batch)):
        raise ValueError(
            f"guidance must be a number, ({batch},) for each sample, ({steps}, 1) for each row or "
            f"({steps}, {batch}) for both, got shape {values.shape}"
        )
    return np.broadcast_to(values, (steps, batch)).astype(np.float32)


def _numbers(name: str, value: Any) -> npt.NDArray[np.float64]:
    if isinstance(value, Tensor) and not value.is_complex():
        value = value.detach().cpu().double().numpy()
    if value is None or isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number or numbers, got {value!r}")
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or numbers, got {kind(value)}") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got {numbers[~np.isfinite(numbers)].flat[0]}")
    return numbers


def drawn_seeds(batch: int) -> Tensor:
    """A seed for each sample, from the CPU's default generator whatever the default device is."""
    return torch.randint(0, 2**63 - 1, (batch,), device="cpu")


def checked_seeds(seeds: Sequence[int] | Tensor, batch: int) -> Tensor:
    """``seeds`` as int64 (batch,)."""
    if (fast := _int64(seeds)) is not None and fast.shape == (batch,) and (fast >= 0).all():
        return torch.from_numpy(fast)
    values: Any = seeds.tolist() if isinstance(seeds, (Tensor, np.ndarray)) else seeds
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"seeds must be a sequence of integers, got {kind(seeds)}")
    if len(values) != batch:
        raise ValueError(f"seeds must be one for each of {batch} samples, got {len(values)}")
    checked = [whole(f"seeds[{i}]", k, low=0, high=2**63 - 1) for i, k in enumerate(values)]
    return torch.tensor(checked, dtype=torch.int64, device="cpu")


def _int64(numbers: Any) -> npt.NDArray[np.int64] | None:
    """A copy of what is plainly int64 numbers, all at once: 100,000 one by one take 0.1 s."""
    if isinstance(numbers, range):
        numbers = np.arange(numbers.start, numbers.stop, numbers.step)
    elif isinstance(numbers, Tensor) and numbers.dtype == torch.int64:
        numbers = numbers.detach().cpu().numpy()
    elif isinstance(numbers, (list, tuple)) and set(map(type, numbers)) == {int}:
        try:
            numbers = np.array(numbers, dtype=np.int64)
        except OverflowError:
            return None
    if not isinstance(numbers, np.ndarray) or numbers.dtype != np.int64:
        return None
    return numbers.copy()


def checked_state(name: str, x: Any, device: torch.device | str | None) -> Tensor:
    """A state to begin with: (batch, ...), of a floating point type, free of gradients."""
    if not isinstance(x, Tensor):
        if name == "x_T" and isinstance(x, Sequence) and all(isinstance(n, int) for n in x):
            raise TypeError(
                f"x_T must be a tensor, got {shown(x)}: to begin with noise, give "
                f"shape={shown(tuple(x))}"
            )
        raise TypeError(f"{name} must be a tensor, got {kind(x)}")
    if x.dim() < 2:
        raise ValueError(
            f"{name} must have shape (batch, ...) with two dimensions or more, got {tuple(x.shape)}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.requires_grad:
        raise ValueError(
            f"{name} requires grad, which sampling does not carry: pass {name}.detach()"
        )
    if device is not None and usable(device) != x.device:
        raise ValueError(f"device must be {name}'s, {x.device}, or left out, got {str(device)!r}")
    return x


def checked_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of integers, got {kind(shape)}")
    size = tuple(whole(f"shape[{i}]", n, low=0 if i == 0 else 1) for i, n in enumerate(shape))
    if len(size) < 2:
        raise ValueError(f"shape must be (batch, ...) with two dimensions or more, got {size}")
    return size


def place_of(device: torch.device | str | None, model: Model) -> torch.device:
    """Where to sample without an x_T: ``device``, the model's parameters' or torch's default."""
    here = device_of(model) if device is None else None
    return usable(device) if here is None else here


def usable(device: torch.device | str | None) -> torch.device:
    """The device, if a tensor can be made there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def check_not_capturing(device: torch.device) -> None:
    """That no graph of the caller's is being captured where a sampler is to begin.

    Such a graph would hold copies from the host, and the addresses of tables that die with the
    call.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "sampling cannot begin while a CUDA graph is being captured: call DDIM.capture before "
            "it and replay what that returns, or capture steps (fastddim.ddim_step)"
        )


def checked_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    return dtype


def checked_known(
    known: Tensor | None,
    mask: Tensor | None,
    x: Tensor,
    table: Callable[[], Float32],
    clean: tuple[bool, ...],
) -> Known | None:
    """``known`` and ``mask``, or None without them; ``table`` leads from data to each level."""
    if known is None and mask is None:
        return None
    known, mask = _beside("known", known, "mask", x), _beside("mask", mask, "known", x)
    if known.shape != x.shape:
        raise ValueError(f"known must have x_T's shape, {tuple(x.shape)}, got {tuple(known.shape)}")
    try:
        fits = mask.dim() == x.dim() and torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask must broadcast to {tuple(x.shape)} with as many dimensions, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.to(torch.float32)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask must lie in [0, 1]: 1 keeps what is known, 0 leaves it to the model")
    factors = torch.tensor(table(), device=x.device)
    rows = torch.arange(len(factors), dtype=torch.int32, device=x.device)
    return Known(
        known.detach().to(torch.float32),
        mask,
        factors,
        rows[:, None].expand(-1, len(x)).unbind(),
        clean,
    )


def _beside(name: str, tensor: Any, other: str, x: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor where {other} is given, got {kind(tensor)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} with x_T, got {tensor.device}")
    return tensor


def _check_generator(generator: torch.Generator, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {kind(generator)}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on {device}, got one on {generator.device}")


def _check_given(noise: Any, size: tuple[int, ...], device: torch.device, steps: int) -> None:
    if not isinstance(noise, (Tensor, Sequence)) or len(noise) != steps:
        got = f"{len(noise)}" if hasattr(noise, "__len__") else kind(noise)
        raise ValueError(f"noise must hold a tensor for each of {steps} rows, got {got}")
    for row, z in enumerate(noise):
        if not isinstance(z, Tensor) or z.shape != size or z.dtype != torch.float32:
            got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else kind(z)
            raise ValueError(f"noise[{row}] must be a float32 tensor of shape {size}, got {got}")
        if z.device != device:
            raise ValueError(f"noise[{row}] must be on {device}, got {z.device}")


def wrapper(progress: Progress) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """What a loop's rows are wrapped in: a bar for True, nothing for False."""
    if callable(progress):
        return progress
    if not progress:
        return iter
    try:
        from rich.progress import track
    except ImportError:
        raise ValueError(
            "progress=True needs rich (pip install 'fastddim[cli]'); a wrapper such as tqdm.tqdm "
            "serves too"
        ) from None
    return lambda steps: track(steps, description="sampling")


def checked_temperature(temperature: Any) -> float:
    value = finite("temperature", temperature)
    if value < 0:
        raise ValueError(f"temperature must be ≥ 0, got {value:g}")
    return value
