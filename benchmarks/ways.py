"""The calls that take a step: ``benchmarks.host`` times the host's part of each.

They use the fastddim package on the path, which may be another checkout's and lack some of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.plain import NUMBERS, TENSORS, numbers, plain, tensors
from benchmarks.timing import WrongResultError, by

SHAPES = ((1, 16, 7), (4, 3, 32, 32))
DRIVERLESS = (4, 4, 8, 8)
STEPS = 50
ADD, LAUNCH, NOISY = "torch.add(out=)", "bound Triton launch, driver replaced", ", η = 1"
TOLERANCE = 2e-3
"""Greatest relative difference of results whose factors are rounded differently."""
Run: TypeAlias = Callable[[], Tensor]


class Way(NamedTuple):
    """``make`` returns the run, or raises where a package is missing; ``want`` the expected one."""

    make: Callable[[], Run]
    want: Callable[[], Run] | None = None
    exact: bool = True


class Ways:
    """Ways to take ``STEPS`` steps of one shape, by the package on the path."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        # By name, because another checkout's types may differ from this one's.
        self.fastddim: Any = importlib.import_module("fastddim")
        made, self.shape = torch.Generator().manual_seed(0), shape
        self.x, self.eps, self.out = (torch.randn(shape, generator=made) for _ in range(3))
        self.quiet, self.noisy = (self.fastddim.DDIM(STEPS, eta=eta) for eta in (0.0, 1.0))
        self.table = torch.tensor(self.quiet.table)

    def model(self, x: Tensor, t: Any, *_: Any, **__: Any) -> Tensor:
        return self.eps

    def stream(self) -> torch.Generator:
        return torch.Generator().manual_seed(1)

    def add(self) -> Tensor:
        for _ in range(STEPS):
            torch.add(self.x, self.eps, out=self.out)
        return self.out

    def plain(self, ddim: Any, form: Callable[[Tensor], Any] = numbers) -> Run:
        rows, noisy = form(torch.tensor(ddim.table)), (ddim.table[:, 5] != 0).tolist()
        levels = [t for t, _ in ddim.pairs]
        return lambda: plain(self.model, self.x, rows, noisy, levels, self.stream())

    def step(self) -> Tensor:
        step, x, eps, table = self.fastddim.ddim_step, self.x, self.eps, self.table
        for row in range(STEPS):
            x, _ = step(x, eps, table, row)
        return x

    def bound(self) -> Run:
        step, eps = self.fastddim.bind(self.table), self.eps

        def run() -> Tensor:
            x = self.x
            for row in range(STEPS):
                x, _ = step(x, eps, row)
            return x

        return run

    def sample(self, ddim: Any) -> Tensor:
        last: Tensor = ddim.sample(self.model, self.x, generator=self.stream())
        return last

    def iterate(self) -> Tensor:
        x = self.x
        for step in self.quiet.iterate(self.model, self.x):
            x = step.x
        return x

    def scheduled(
        self,
        name: str,
        form: Callable[[Tensor], Any] = list,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Run:
        module = "fastddim.dropins.diffusers" if name.startswith("Fast") else "diffusers"
        made = getattr(importlib.import_module(module), name)(clip_sample=False, **options)
        made.set_timesteps(STEPS)
        ts = form(made.timesteps)
        noisy = "DDPM" in name
        x_T, eps = self.x.to(dtype), self.eps.to(dtype)

        def run() -> Tensor:
            x, given = x_T, {"generator": self.stream()} if noisy else {}
            for t in ts:
                x = made.step(eps, t, x, **given).prev_sample
            return x

        return torch.no_grad()(run)  # as in diffusers' pipelines

    def euler(self, name: str) -> Run:
        """The loop of a scheduler along σ, with its scaling of the model's input."""
        module = "fastddim.dropins.diffusers" if name.startswith("Fast") else "diffusers"
        made = getattr(importlib.import_module(module), name)()
        made.set_timesteps(STEPS)
        ts, scale = list(made.timesteps), getattr(made, "scale_model_input", None)

        def run() -> Tensor:
            made._step_index, x, stream = 0, self.x, self.stream()
            for t in ts:
                if scale is not None:
                    scale(x, t)
                x = made.step(self.eps, t, x, generator=stream, return_dict=False)[0]
            return x

        return torch.no_grad()(run)

    def guided(self) -> Run:
        module: Any = importlib.import_module("fastddim.dropins.guided")
        diffusion, given = module.Diffusion(1000, f"ddim{STEPS}"), (self.shape, self.x, False)
        return lambda: module.ddim_sample_loop(diffusion, self.model, *given, device="cpu")

    def compvis(self) -> Run:
        levels = torch.tensor(self.fastddim.NoiseSchedule.linear().alphas_cumprod).float()
        net = SimpleNamespace(num_timesteps=1000, alphas_cumprod=levels, apply_model=self.model)
        net.betas = torch.linspace(1e-4, 0.02, 1000)
        sampler = importlib.import_module("fastddim.dropins.compvis").DDIMSampler(net)
        n, *size = self.shape
        return lambda: sampler.sample(STEPS, n, size, x_T=self.x, verbose=False)[0]

    def driverless(self) -> Run:
        names = "fastddim_kernels.launch", "fastddim.step.backends", "fastddim.step.bound"
        modules: list[Any] = [importlib.import_module(name) for name in names]
        launch, backends, bound = modules
        given: list[Any] = []
        kernel = SimpleNamespace(run=lambda *args: given.extend(args), function=1)
        kernel.packed_metadata = 2

        def bind(fixed: Any, *first: Any) -> Any:
            # An older checkout passes the arguments one by one.
            x, output, table, *others = first[0] if len(first) == 1 else first
            made = launch.BoundStep(x, table, *launch._choices(x, output, table, *others, *fixed))
            made.direct, made._device = True, 0  # as if the tensors were on a GPU
            made.adopt(kernel, x)
            return made

        # Both would call the missing driver; each takes less than 0.1 µs.
        launch._current_device, launch._stream = lambda: 0, lambda device: 0
        x, eps, table, rest = self.x, self.eps, self.table, (*[None] * 4, self.out, None, None)
        step = bound.Bound(backends.Backend("driverless", bind, None), backends.Fixed())
        launched = step.launch(x, eps, table, 0, *rest)
        launched(x, eps, table, 0, *rest)
        if not {t.data_ptr() for t in (x, eps, table, self.out)} <= {*given}:
            raise WrongResultError(f"{LAUNCH}: it does not get the tensors' addresses")
        launched._run = lambda *_: None

        def run() -> Tensor:
            for row in range(STEPS):
                launched(x, eps, table, row, *rest)
            return self.out

        return run

    def every(self) -> dict[str, Way]:
        if self.shape == DRIVERLESS:
            return {ADD: Way(lambda: self.add), LAUNCH: Way(self.driverless)}
        # CompVis' timesteps are one greater than the others', and end at level 0.
        later = self.fastddim.DDIM(spacing=[(t + 1, s + 1) for t, s in self.quiet.pairs])

        def floats() -> Run:
            return self.plain(self.quiet)

        def noisy() -> Run:
            return self.plain(self.noisy)

        def theirs() -> Run:
            return self.scheduled("DDIMScheduler")

        fast, strict = "FastDDIMScheduler", "FastDDIMScheduler(strict=True), timesteps as tensors"
        ways = {
            ADD: Way(lambda: self.add),
            NUMBERS: Way(floats),
            TENSORS: Way(lambda: self.plain(self.quiet, tensors), floats),
            "fastddim.ddim_step": Way(lambda: self.step, floats),
            "fastddim.bind": Way(self.bound, floats),
            "DDIM.sample": Way(lambda: lambda: self.sample(self.quiet), floats),
            "DDIM.iterate": Way(lambda: self.iterate, floats),
            NUMBERS + NOISY: Way(noisy),
            "DDIM.sample" + NOISY: Way(lambda: lambda: self.sample(self.noisy), noisy),
            "diffusers' DDIMScheduler, timesteps as tensors": Way(theirs, floats, exact=False),
            f"{fast}, timesteps as numbers": Way(
                lambda: self.scheduled(fast, Tensor.tolist), theirs
            ),
            f"{fast}, timesteps as tensors": Way(lambda: self.scheduled(fast), theirs),
            strict: Way(lambda: self.scheduled(fast, strict=True), floats, exact=False),
            "FastDDIMInverseScheduler, timesteps as tensors": Way(
                lambda: self.scheduled("FastDDIMInverseScheduler"),
                lambda: self.scheduled("DDIMInverseScheduler"),
            ),
        }
        ddpm = f"DDPMScheduler, timesteps as tensors{NOISY}"
        ways["diffusers' " + ddpm] = Way(lambda: self.scheduled("DDPMScheduler"))
        ways["Fast" + ddpm] = Way(
            lambda: self.scheduled("FastDDPMScheduler"), lambda: self.scheduled("DDPMScheduler")
        )
        for dtype in torch.bfloat16, torch.float16:
            in_half = f"DDIMScheduler, {str(dtype).removeprefix('torch.')}, timesteps as tensors"
            original = partial(self.scheduled, "DDIMScheduler", dtype=dtype)
            ways["diffusers' " + in_half] = Way(original)
            ways["Fast" + in_half] = Way(partial(self.scheduled, fast, dtype=dtype), original)
        for name in "FlowMatchEulerDiscreteScheduler", "EulerAncestralDiscreteScheduler":
            ways[f"diffusers' {name}"] = Way(partial(self.euler, name))
            ways[f"Fast{name}"] = Way(partial(self.euler, f"Fast{name}"), partial(self.euler, name))
        if len(self.shape) == 4:  # these take images
            ways["guided.ddim_sample_loop"] = Way(self.guided, floats, exact=False)
            ways["compvis.DDIMSampler"] = Way(self.compvis, lambda: self.plain(later), exact=False)
        return ways

    def ready(self, ours: bool) -> dict[str, Run]:
        """The ways that this package has, each checked before it is returned."""
        found = {}
        for name, (make, want, exact) in self.every().items():
            try:
                got = (run := make())()
            except (AttributeError, ImportError) as error:
                # A machine may lack diffusers or Triton; another checkout may lack any of these
                # ways.
                if ours and not isinstance(error, ImportError):
                    raise
                continue
            right = got if want is None else want()()
            off = ((got - right).norm() / right.norm()).item()
            if not (torch.equal(got, right) if exact else off <= TOLERANCE):
                raise WrongResultError(f"{name} at {by(self.shape)}: it is {off:.3g} off")
            found[name] = run
        return found
