"""The loops that are compared: fastddim's and other people's, without a model's time.

Each loop is a call without arguments that goes from the same x_T down the same steps and returns
the last x. The model returns a tensor made beforehand, so that the time is spent between its calls.
Each result is checked before anything is timed (``Peer.check``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

import fastddim
from benchmarks import plain
from benchmarks.timing import WrongResultError, by, first_line
from fastddim.step import backends, reference
from fastddim.step.philox import STEP_STREAM

Run: TypeAlias = Callable[[], Tensor]
Model: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Backend: TypeAlias = Callable[[], contextlib.AbstractContextManager[str]]

T = 1000
TOLERANCE = 2e-3
"""Greatest (root mean square difference) / (root mean square) of results whose float32 factors are
rounded differently: the original loop's factors are up to 1.9e-4 off."""
SIGMAS = 6.0
"""Greatest difference of other noise's mean and deviation from normals', in standard errors."""


class MissingError(Exception):
    """A package or a compiler that a peer needs is missing."""


# The backend of fastddim's steps on a CPU


@contextlib.contextmanager
def pytorch() -> Iterator[str]:
    """Within it, the backend "torch" takes the steps; gives the suffix of the loop's name."""
    with backends.using("torch"):
        yield ", PyTorch"


@contextlib.contextmanager
def numba() -> Iterator[str]:
    """Within it, the backend "numba" takes the steps; gives the suffix of the loop's name."""
    with backends.using("numba"):
        yield ", numba"


def on(path: Backend, run: Run) -> Run:
    """The run with its steps taken by this backend."""

    def there() -> Tensor:
        with path():
            return run()

    return there


# The functions that torch.compile compiles


@functools.cache
def compiler_loaded(device: str) -> None:
    """Compiles a small function, so that no row's limit includes the import of the compiler."""
    with contextlib.suppress(Exception):  # The rows that compile say why they cannot.
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(8, device=device))
        torch.compiler.reset()
        torch.compiler.cudagraph_mark_step_begin()


def simplified(x: Tensor, eps: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """x_s = (√ᾱ_s/√ᾱ_t)·x + (c2 − √ᾱ_s·√(1−ᾱ_t)/√ᾱ_t)·ε: the step, but rounded differently."""
    return p * x + q * eps


def simplified_noisy(x: Tensor, eps: Tensor, p: Tensor, q: Tensor, c1: Tensor) -> Tensor:
    """``simplified`` with noise: + c1·z."""
    return p * x + q * eps + c1 * torch.randn_like(x)


def same(x: Tensor, eps: Tensor, row: Tensor) -> Tensor:
    """The reference step, in fastddim's order of operations."""
    return reference.ddim_step(x, eps, row)[0]


def same_noisy(x: Tensor, eps: Tensor, row: Tensor) -> Tensor:
    """The reference step with noise."""
    return reference.ddim_step(x, eps, row, torch.randn_like(x))[0]


def simplified_factors(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors (p, q, c1) of rows of a coefficient table."""
    a_t, _, b_t, _, a_s, c1, c2 = table.unbind(-1)
    return a_s / a_t, c2 - a_s * b_t / a_t, c1


def scheduler(name: str, steps: int, device: torch.device | str) -> Any:
    """diffusers' or fastddim's scheduler of this name, on the original loop's schedule."""
    module = "fastddim.dropins.diffusers" if name.startswith("Fast") else "diffusers"
    found = getattr(importlib.import_module(module), name)(
        num_train_timesteps=T,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="leading",
    )
    found.set_timesteps(steps, device=device)
    return found


class Loops:
    """The loops on one x_T. ``model`` is the loops' model; by default it returns a fixed ε."""

    def __init__(
        self,
        shape: tuple[int, ...],
        steps: int,
        eta: float,
        device: str = "cpu",
        model: Model | None = None,
    ) -> None:
        self.shape, self.steps, self.eta, self.device = shape, steps, eta, device
        self.x = torch.randn(shape, generator=self.stream(1), device=device)
        self.eps = torch.randn(shape, generator=self.stream(2), device=device)
        self.betas = torch.linspace(1e-4, 0.02, T, device=device)
        self.seq = range(0, T, T // steps)
        self.ddim = fastddim.DDIM(steps=steps, eta=eta)
        self.table = torch.tensor(self.ddim.table, device=device)
        self.noisy = (self.ddim.table[:, 5] != 0).tolist()
        levels = torch.tensor([t for t, _ in self.ddim.pairs], device=device)
        self.ts = levels[:, None].expand(-1, shape[0]).unbind()
        self.seeds = torch.arange(shape[0], device=device)
        self.model: Model = model or (lambda x, t: self.eps)

    def stream(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    # Other people's loops

    def original(self) -> Tensor:
        """The original loop. Its factors have four dimensions, so x is viewed in four too."""
        x, model = self.x, self.model
        if x.dim() != 4:
            x = x.view(len(x), 1, 1, -1)
            model = lambda x, t: self.model(x, t).view(x.shape)  # noqa: E731
        last = reference.generalized_steps(x, self.seq, model, self.betas, self.eta)[0][-1]
        return last.view(self.shape)

    def scheduled(self, name: str, form: Callable[[Tensor], Any] = Tensor.unbind) -> Run:
        """A scheduler's loop; as in diffusers' pipelines, each t is a tensor on the device.

        ``form`` turns the timesteps into another form: ``Tensor.tolist`` into numbers.
        """
        made = scheduler(name, self.steps, self.device)

        def run() -> Tensor:
            x = self.x
            for t in form(made.timesteps):
                x = made.step(self.model(x, t), t, x, eta=self.eta).prev_sample
            return x

        return run

    def compiled(self) -> Run:
        """The simplified maths by ``torch.compile`` with precomputed factors."""
        maths: Any = simplified_noisy if self.eta else simplified
        fast: Any = torch.compile(maths, dynamic=False)
        p, q, c1 = simplified_factors(self.table)
        factors = list(zip(p.unbind(), q.unbind(), c1.unbind(), strict=True))
        if not self.eta:
            factors = [pair[:2] for pair in factors]  # type: ignore[misc]

        def run() -> Tensor:
            x = self.x
            for of_row, t in zip(factors, self.ts, strict=True):
                x = fast(x, self.model(x, t), *of_row)
            return x

        return run

    def compiled_same(self) -> Run:
        """The reference step by ``torch.compile``, which drops the x0 that no caller reads."""
        maths: Any = same_noisy if self.eta else same
        fast: Any = torch.compile(maths, dynamic=False)
        rows = self.table.unbind()

        def run() -> Tensor:
            x = self.x
            for row, t in zip(rows, self.ts, strict=True):
                x = fast(x, self.model(x, t), row)
            return x

        return run

    def whole(self, name: str) -> Run:
        """A scheduler's loop as one graph of ``torch.compile``, with each t as a number.

        Without a model in between, the steps fuse into one another.
        """
        made = scheduler(name, self.steps, self.device)
        numbers = made.timesteps.tolist()

        def loop(x: Tensor) -> Tensor:
            for t in numbers:
                x = made.step(self.model(x, t), t, x, eta=self.eta).prev_sample
            return x

        fast: Any = torch.compile(loop, fullgraph=True, dynamic=False)
        return lambda: fast(self.x)

    def plain(self, rows: list[plain.Row]) -> Run:
        """The plain loop with these factors."""
        return lambda: plain.plain(self.model, self.x, rows, self.noisy, self.ts, self.stream(3))

    # fastddim's loops

    def drop_in(self) -> Tensor:
        return fastddim.generalized_steps(self.x, self.seq, self.model, self.betas, self.eta)[0][-1]

    def drop_in_last(self) -> Tensor:
        return fastddim.generalized_steps(
            self.x, self.seq, self.model, self.betas, self.eta, keep="last"
        )[0][-1]

    def sample(self) -> Tensor:
        return self.ddim.sample(self.model, self.x, generator=self.stream(3))

    def sample_seeds(self) -> Tensor:
        return self.ddim.sample(self.model, self.x, seeds=range(self.shape[0]))

    # Expected results and checks

    def eager(self, generator: torch.Generator | None) -> Tensor:
        """The reference's steps with noise from ``generator``, or from PyTorch's default one."""
        x = self.x
        for row, draw, t in zip(self.table.unbind(), self.noisy, self.ts, strict=True):
            z = None
            if draw:
                z = torch.randn(self.shape, generator=generator, device=self.device)
            x, _ = reference.ddim_step(x, self.model(x, t), row, z)
        return x

    def eager_seeds(self) -> Tensor:
        """The reference's steps with the counter noise of each seed."""
        x, z = self.x, torch.empty_like(self.x)
        rows = torch.arange(self.steps, dtype=torch.int32, device=self.device)
        for row, t in enumerate(self.ts):
            torch.ops.fastddim.normal_(z, self.seeds, rows[row].expand(self.shape[0]), STEP_STREAM)
            x, _ = reference.ddim_step(x, self.model(x, t), self.table[row], z)
        return x

    def near(self, run: Run, expected: Run | None = None) -> None:
        """Raises unless the run's result is within ``TOLERANCE`` of the reference's.

        ``expected`` replaces the reference, whose noise comes from PyTorch's default generator.
        """
        torch.manual_seed(4)
        want = (self.eager(None) if expected is None else expected()).double()
        torch.manual_seed(4)
        gap = run().to(want.device).double() - want  # the original loop returns x on the CPU
        off = (gap.square().mean() / want.square().mean()).sqrt().item()
        if not off <= TOLERANCE:  # `not <=` also catches NaN
            raise WrongResultError(f"it is {off:.3g} off the reference, allowed: {TOLERANCE:g}")

    def equal(self, run: Run, want: Run) -> None:
        """Raises unless both results are bit-identical, with the same seed of the generator."""
        torch.manual_seed(4)
        expected = want()
        torch.manual_seed(4)
        if not torch.equal(run(), expected):
            raise WrongResultError("it is not equal to the expected result, bit for bit")

    def as_reference(self, run: Run) -> None:
        """Raises unless the run gives the reference's result, with noise from ``stream(3)``.

        On a CPU the results must be bit-identical. A GPU divides by a float through its reciprocal.
        """
        check = self.equal if self.device == "cpu" else self.near
        check(run, lambda: self.eager(self.stream(3)))

    def near_but_for_noise(self, run: Run) -> None:
        """Raises unless the run gives the reference's result, whatever normals its noise is.

        Since ε is the same in all steps, the result is the result without noise plus the noise of
        all steps, which is normal with a known deviation.
        """
        table = self.table.clone()
        table[:, 5] = 0
        quiet, variance = self.x, 0.0
        for row, t in zip(table.unbind(), self.ts, strict=True):
            quiet, _ = reference.ddim_step(quiet, self.model(quiet, t), row)
        for p, _, c1 in torch.stack(simplified_factors(self.table), 1).tolist():
            variance = p**2 * variance + c1**2
        rest = (run().to(quiet.device) - quiet).double() / math.sqrt(variance)
        n = rest.numel()
        mean, deviation = rest.mean().item(), rest.std().item()
        allowed = SIGMAS / math.sqrt(n)
        if not (abs(mean) <= allowed and abs(deviation - 1) <= allowed):
            raise WrongResultError(
                f"its noise has mean {mean:.3g} and deviation {deviation:.3g}, allowed: "
                f"0 and 1 within {allowed:.2g}"
            )


@dataclass(frozen=True)
class Peer:
    """A loop to compare.

    Attributes:
        title: the loop's name in a table.
        make: returns the loop, or raises where something that it needs is missing.
        check: raises unless the loop's result is right.
        noise: source of the loop's noise at η = 1.
        quiet_noise: source of the noise that it draws at η = 0.
        counted: True if PyTorch's dispatcher sees its operations.
        ours: True if a failure is an error rather than a missing peer.
        devices: devices on which ``pytest --benchmark``, limited to sixty rows, has a row of it.
        compiles: True if torch.compile compiles it when it is made.
        small: True if it has rows for small states at η = 0 alone: 1x16x7 and 4x3x32x32.
    """

    title: str
    make: Callable[[Loops], Run]
    check: Callable[[Loops, Run], None]
    noise: str
    quiet_noise: str = "none"
    counted: bool = True
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False
    small: bool = False

    def ready(self, loops: Loops) -> Run:
        """Makes the loop, runs it once (which compiles it), checks its result, and returns it."""
        try:
            run = self.make(loops)
            run()
        except Exception as error:
            if self.ours and not isinstance(error, ImportError):
                raise
            raise MissingError(first_line(error)) from error
        try:
            self.check(loops, run)
        except WrongResultError as error:
            what = f"{self.title} at {by(loops.shape)}, η = {loops.eta:g}"
            raise WrongResultError(f"{what}: {error}") from None
        return run


def by_numba(loops: Loops) -> Run:
    if "numba" not in backends.available("cpu"):
        raise ImportError("numba is not installed")
    return on(numba, loops.sample_seeds)


PEERS = {
    "original": Peer(
        "the original loop",
        lambda loops: loops.original,
        Loops.near,
        "torch.randn_like",
        "torch.randn_like, times 0",
    ),
    "diffusers": Peer(
        "diffusers' DDIMScheduler",
        lambda loops: loops.scheduled("DDIMScheduler"),
        Loops.near,
        "torch.randn",
    ),
    "plain": Peer(
        plain.NUMBERS,
        lambda loops: loops.plain(plain.numbers(loops.table)),
        Loops.as_reference,
        "generator",
    ),
    "tensors": Peer(
        plain.TENSORS,
        lambda loops: loops.plain(plain.tensors(loops.table)),
        Loops.as_reference,
        "generator",
        devices=(),
    ),
    "compile": Peer(
        "torch.compile of the simplified maths",
        Loops.compiled,
        lambda loops, run: loops.near_but_for_noise(run) if loops.eta else loops.near(run),
        "torch.randn_like, compiled",
        counted=False,
        compiles=True,
    ),
    "same": Peer(
        "torch.compile of the reference step",
        Loops.compiled_same,
        lambda loops, run: loops.near_but_for_noise(run) if loops.eta else loops.near(run),
        "torch.randn_like, compiled",
        counted=False,
        compiles=True,
        devices=(),
    ),
    "whole": Peer(
        "torch.compile(whole loop) of diffusers' DDIMScheduler",
        lambda loops: loops.whole("DDIMScheduler"),
        lambda loops, run: loops.near(run, loops.scheduled("DDIMScheduler")),
        "none",
        counted=False,
        compiles=True,
        small=True,
    ),
    "whole fast": Peer(
        "torch.compile(whole loop) of FastDDIMScheduler",
        lambda loops: loops.whole("FastDDIMScheduler"),
        lambda loops, run: (loops.equal if loops.device == "cpu" else loops.near)(
            run, loops.scheduled("DDIMScheduler")
        ),
        "none",
        counted=False,
        compiles=True,
        small=True,
    ),
    "scheduler": Peer(
        "FastDDIMScheduler",
        lambda loops: loops.scheduled("FastDDIMScheduler"),
        lambda loops, run: loops.equal(run, loops.scheduled("DDIMScheduler")),
        "torch.randn",
        ours=True,
    ),
    "pytorch": Peer(
        "DDIM.sample, PyTorch",
        lambda loops: on(pytorch, loops.sample),
        lambda loops, run: loops.equal(run, lambda: loops.eager(loops.stream(3))),
        "generator",
        ours=True,
        devices=("cpu",),
    ),
    "numba": Peer(
        "DDIM.sample, numba",
        by_numba,
        lambda loops, run: loops.equal(run, loops.eager_seeds),
        "counter noise",
        ours=True,
        devices=("cpu",),
    ),
    "triton": Peer(
        "DDIM.sample, Triton",
        lambda loops: loops.sample_seeds,
        lambda loops, run: loops.equal(run, loops.eager_seeds),
        "counter noise",
        ours=True,
        devices=("cuda",),
    ),
}
