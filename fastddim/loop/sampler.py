"""``DDIM``: the sampler and its methods, whose docstrings are the manual."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from fastddim.check import kind, truth, whole
from fastddim.coefficients import Float32, Prediction, PredictionSynonym, checked_prediction
from fastddim.coefficients import levels as levels_of
from fastddim.levels import GaussianPath
from fastddim.loop import loops
from fastddim.loop.devices import place_of, usable_device
from fastddim.loop.drive import batches_of, last_of, sampled, steps_of
from fastddim.loop.fields import checked_fields
from fastddim.loop.inversion import reverse_plan
from fastddim.loop.model import Model
from fastddim.loop.normals import Noises
from fastddim.loop.options import (
    CaptureOptions,
    Guidance,
    InvertOptions,
    IterateOptions,
    Options,
    Progress,
    check_backwards,
    check_names,
    checked_noise,
    checked_shape,
    checked_state,
    list_options,
    options_in,
    prepare,
)
from fastddim.loop.plan import Plan, forward_table, gradient_factors, plan_of
from fastddim.loop.trajectory import Callback, Copies, Recorder, Step, Trajectory
from fastddim.schedule import NoiseSchedule
from fastddim.step.backends import backend
from fastddim.step.checked import ddim_step
from fastddim.timesteps import Pair, Spacing
from fastddim.untraced import untraced
from fastddim.variances import Eta

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastddim.loop.graph import Captured


@functools.cache
def _papers_schedule() -> NoiseSchedule:
    return NoiseSchedule.linear()


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021), and DDPM at η = 1.

        x0  = (x_t − √(1−ᾱ_t)·ε(x_t, t)) / √ᾱ_t
        x_s = √ᾱ_s·x0 + c1·z + c2·ε(x_t, t),   c1 = σ_t,   c2 = √(1 − ᾱ_s − σ_t²)

    The constructor checks every argument: a bad value raises ``TypeError`` or ``ValueError``, which
    names the argument, the value and what is allowed. A named spacing whose first level is far
    from noise gives a ``SamplingWarning`` with the level's √ᾱ. Samplers of equal arguments are
    equal and have one hash, after ``pickle`` and ``deepcopy`` too.

    Args:
        steps: S, the number of steps. It is 50 by default, or the length of a list in ``spacing``.
        eta: η ≥ 0 (0 is DDIM, 1 is DDPM on τ), ``"hat"`` for the paper's σ̂, or another rule of
            ``fastddim.variances``.
        schedule: ᾱ, or another path of a ``NoiseSchedule``; linear β with T = 1000 by default.
        spacing: the name of a rule that chooses τ, the timesteps that ``tune`` has found or the
            path of their file, or τ itself: see ``make_pairs``.
        prediction: the model's output: ``"epsilon"``, ``"v"`` or ``"sample"`` (x0), on the path of
            rectified flow ``"flow"`` (ε − x0). Names that other systems use, such as
            ``"v_prediction"`` and ``"x0"``, become one of these.
        clip: the step clamps the predicted x0 to ±clip; None leaves x0 as it is.
        final_alpha_cumprod: ᾱ_s of the step to s = −1. 1 is clean data; Stable Diffusion ends
            at ᾱ_0.
        temperature: a factor ≥ 0 of c1; c2 stays as it is.
        order: 1 is DDIM. 2 extrapolates x0 from the x0 of the step before (Lu et al. 2022,
            DPM-Solver++(2M) at η = 0, its SDE form at η = 1): fewer steps give the same quality.
            Use it with ``spacing="mixed"``: on ``"uniform"`` the last step but one is so long in λ
            that few steps can be worse than those of order 1. A run's first step, the step to
            clean data, and a step after a callback has replaced x are of order 1.

    Attributes:
        pairs: the (t, s) of each step, in the order of the steps.
        table: the coefficients, float32, one row for each step: see ``make_table``. Row 0 is the
            noisiest step.
    """

    steps: int | None = None
    eta: Eta = 0.0
    schedule: GaussianPath = field(default_factory=_papers_schedule)
    spacing: Spacing = "uniform"
    prediction: Prediction | PredictionSynonym = "epsilon"
    clip: float | None = None
    final_alpha_cumprod: float = 1.0
    temperature: float = 1.0
    order: int = 1
    pairs: tuple[Pair, ...] = field(init=False, repr=False)
    table: Float32 = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        derived = checked_fields(
            steps=self.steps,
            eta=self.eta,
            schedule=self.schedule,
            spacing=self.spacing,
            prediction=self.prediction,
            clip=self.clip,
            final_alpha_cumprod=self.final_alpha_cumprod,
            temperature=self.temperature,
            order=self.order,
        )
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the cached plan, which each copy makes again."""
        return {name: value for name, value in self.__dict__.items() if name != "_all_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickle and deepcopy drop an array's write protection.
        state["table"].setflags(write=False)
        self.__dict__.update(state)

    @overload
    def sample(
        self,
        model: Model,
        x_T: Tensor | None = None,
        *,
        trajectory: None = None,
        **options: Unpack[Options],
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        model: Model,
        x_T: Tensor | None = None,
        *,
        trajectory: str | Sequence[str],
        **options: Unpack[Options],
    ) -> tuple[Tensor, Trajectory]: ...

    @untraced
    def sample(
        self,
        model: Model,
        x_T: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Noises | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | bool | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        guidance: Guidance | None = None,
        cond_fn: Model | None = None,
        self_condition: str | None = None,
        start: int = 0,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        batch_size: int | None = None,
        callback: Callback | None = None,
        trajectory: str | Sequence[str] | None = None,
        every: int = 1,
        offload: bool = False,
        progress: Progress = False,
    ) -> Tensor | tuple[Tensor, Trajectory]:
        """Samples: runs the loop from the noisiest level down to clean data.

        Between two model calls the device runs one kernel, without a host sync: everything that
        the steps read is on the device before the first call.

        Args:
            model: called as ``model(x, t, **cond)`` without gradients; t is int64 (batch,), on a
                continuous path float32. The model returns a tensor of x's shape, or one with twice
                the channels (the step ignores a learned variance), or a tuple or an object with
                ``.sample`` that holds the tensor. A network in training mode, where dropout or
                batch norm changes the samples, gets a ``SamplingWarning``, once.
            x_T: the state to begin with, (batch, ...), float32, bfloat16 or float16; never written.
                On the path (1, σ) it is σ_max·ε.
            shape: (batch, ...) instead of x_T, to begin with noise of the first level.
            seeds: an integer in [0, 2⁶³) for each sample. A sample's noise is a function of its
                seed, the row and the element, whatever batch the sample is in. One backend always
                gives the same bits; two backends (a CPU with numba, without numba, a GPU) give
                the same normals up to the rounding of ln, sin and cos, some 1e-5. So a seed's
                image has the same bits in any batch, if the model's output does. A network whose
                kernels round by batch size changes the image by about 1e-6, unless ``batch_size``
                fixes the size.
            generator: instead of seeds, a torch generator of the sampling device. It draws x_T
                first, then z for each step that adds noise.
            noise: instead of seeds, z itself: for each row a float32 tensor of x_T's shape. Without
                seeds, generator and noise, seeds come from torch's default generator, which
                ``torch.manual_seed`` sets.
            device: the device to sample on. The default is x_T's device; without x_T that of the
                parameters, if the model is a network, its method or a partial of one, else
                torch's default device.
            dtype: the dtype of the model's x; x_T's by default. The state stays float32.
                A network with bfloat16 parameters needs ``dtype=torch.bfloat16`` or ``autocast``.
            autocast: a dtype for ``torch.autocast`` around the model, or True for the device's own.
            cond: keyword arguments for the model.
            uncond: the values that replace those of ``cond`` without the condition; at least one
                must differ. Tensors with a row for each sample are stacked once, uncond before
                cond, and the model is called with twice the batch; both halves share the rest.
            guidance: w of classifier-free guidance, u + w·(c − u) (Ho and Salimans 2022, who
                write 1 + w): a number, (batch,) for each sample, (rows, 1) for each step, (rows,
                batch) for both, or a function of t that returns one of the first two. In a row
                where w is 1 throughout, the model is called with cond alone.
            cond_fn: ``cond_fn(x, t, **cond)`` = ∇_x ln p(y | x_t) for classifier guidance: ε
                becomes ε − √(1−ᾱ_t)·∇ (Dhariwal and Nichol 2021, algorithm 2). x is float32, and
                the function enables gradients itself. ``clip`` bounds the resulting x0.
            self_condition: the model's keyword for the x0 that the last step predicted, zeros at
                first (Chen et al. 2023, Analog Bits).
            start: the row to begin with; x_T is then x at that row's t, from ``add_noise``,
                ``invert`` or a ``Step``. Rows and their noise keep their numbers.
            known, mask: for inpainting, an image of x_T's shape and a mask in [0, 1] that
                broadcasts to it. Where the mask is 1, each state is the image, noised to the
                state's level (stream 2 of the seeds).
            batch_size: the number of samples in a model call (twice as many with guidance). The
                last batch is padded with its last sample, so every call has the same shape. A
                sample's bits then do not depend on the place of its seed among the seeds, if the
                model's output for a sample depends on that sample and the shape alone. Another
                ``batch_size`` may round otherwise.
            callback: called with each ``Step``. The step's tensors are copies: writing to them
                does not change the loop. A tensor that the callback returns replaces x, and may
                be ``step.x``; True ends the loop, which then returns x at that level.
            trajectory: ``"x"``, ``"x0"`` or both: the states to keep.
            every: k, to keep every k-th state, and always the last.
            offload: whether to keep the states on the host, copied while the loop goes on.
            progress: True for a bar (needs the ``cli`` extra), or a wrapper such as ``tqdm.tqdm``.

        Returns:
            The last x, in x_T's dtype, float32 by default. With ``trajectory``, (x, Trajectory).

        Raises:
            TypeError, ValueError: before any work, naming the argument, the value and what is
                allowed; or during the loop, if the model returns another kind of output.
            RuntimeError: before any work, while a CUDA graph is being captured.

        Example:
            >>> x = DDIM(steps=10).sample(lambda x, t: 0.1 * x, shape=(4, 3, 8, 8), seeds=range(4))
            >>> x.shape
            torch.Size([4, 3, 8, 8])
        """
        options = options_in(locals())  # Only the arguments are in locals() at this point.
        run = prepare(self._plan(start, cond_fn is not None), model, x_T, options)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {kind(callback)}")
        batches = batches_of(run, batch_size, callback)
        path = None
        if trajectory is not None:
            order = [row.number for row in run.rows]
            size, where = run.noise.size, run.noise.device
            path = Recorder(trajectory, every, offload, order, self.pairs, size, run.dtype, where)
        with run.predictor.one_cast():
            if batches is None:
                out = sampled(run, path, callback)
            else:
                out = run.empty_result()
                for samples, part in batches:
                    state = sampled(part, path, None, samples)
                    out[samples] = state[: samples.stop - samples.start]
        return out if path is None else (out, path.finished())

    @untraced
    def iterate(
        self,
        model: Model,
        x_T: Tensor | None = None,
        *,
        reverse: bool = False,
        until: int | None = None,
        refine: int = 0,
        **options: Unpack[IterateOptions],
    ) -> Iterator[Step]:
        """Runs ``sample``, or with ``reverse`` ``invert``, one step at a time.

        The tensors of a step are copies, which the caller may keep and write to: later steps do
        not write to them, and the loop does not read them. ``sample(callback=...)`` can change
        the loop's state.

        Args:
            model: as in ``sample``.
            x_T: the state to begin with; with ``reverse`` the data, as x0 of ``invert``.
            reverse: whether the loop runs backwards, from data to noise.
            until, refine: with ``reverse``, as in ``invert``.
            options: as in ``sample``. The model's calls: ``cond``, ``uncond``, ``guidance``,
                ``cond_fn``, ``self_condition``, ``dtype``, ``autocast``, ``device``. The first
                state: ``shape``, ``start``. The noise: ``seeds``, ``generator``, ``noise``.
                Inpainting: ``known``, ``mask``. The bar: ``progress``. With ``reverse`` the
                options of ``invert``, and ``device``.

        Returns:
            An iterator over one ``Step`` for each row.

        Raises:
            TypeError, ValueError: as ``sample`` and ``invert`` do, when ``iterate`` is called.
        """
        check_names("DDIM.iterate", options, IterateOptions)
        shifted = options.get("cond_fn") is not None
        if truth("reverse", reverse):
            check_backwards(options)
            refine = whole("refine", refine, low=0)
            plan = self._reverse_plan(until, shifted)
        elif until is not None or refine:
            raise ValueError("until and refine belong to reverse=True")
        else:
            plan = self._plan(options.get("start", 0), shifted)
        run = prepare(plan, model, x_T, options)
        if reverse:
            states = loops.invert(run, refine, wants_x0=True)
        else:
            states = loops.denoise(run, wants_x0=True)
        return steps_of(states, Copies(run.dtype, run.remembers))

    @untraced
    def invert(
        self,
        model: Model,
        x0: Tensor,
        *,
        until: int | None = None,
        refine: int = 0,
        **options: Unpack[InvertOptions],
    ) -> Tensor:
        """Runs the loop backwards, from data to the noise that leads to the data (at η = 0).

            x_t = √ᾱ_t·(x_s − √(1−ᾱ_s)·ε)/√ᾱ_s + √(1−ᾱ_t)·ε,   ε = ε(x_s, t)

        The exact inverse has ε(x_t, t): x_t is the fixed point of x_s = step(x_t), and each of
        ``refine`` iterations brings it closer. ``sample`` takes the fixed point back to x_s. The
        model is called with the target level's t, because clean data has no timestep.

        Where x_t holds almost none of the data (ᾱ_t = 0, or √ᾱ_t·√(1−ᾱ_s) below a tenth of
        √ᾱ_s·√(1−ᾱ_t)), ε is almost x_t itself, and that iteration does not converge. There the
        step keeps the model's x0 and computes ε, which solves the same equation for x0:

            x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·(x_s − √ᾱ_s·x0)/√(1−ᾱ_s),   x0 = x0(x_s, t)

        Args:
            x0: clean data, (batch, ...), float32, bfloat16 or float16; never written.
            until: the row to stop before: the result is x at that row's t, and ``sample(model,
                x, start=until)`` takes it back. 0 by default: the noisiest level.
            refine: the number of further model calls in each step.
            model: as in ``sample``.
            options: as in ``sample``: ``cond``, ``uncond``, ``guidance``, ``cond_fn``, ``dtype``,
                ``autocast``, ``progress``. A guidance for each step has the same rows.

        Returns:
            x at the level of row ``until``, in x0's dtype.

        Raises:
            TypeError, ValueError: as ``sample`` does; η must be 0, clip None, and no step may
                lead from clean data to ᾱ = 0, where x_T is no function of the data.
        """
        check_names("DDIM.invert", options, InvertOptions)
        refine = whole("refine", refine, low=0)
        plan = self._reverse_plan(until, options.get("cond_fn") is not None)
        run = prepare(plan, model, x0, options)
        return last_of(loops.invert(run, refine), run)

    @untraced
    def add_noise(
        self,
        x0: Tensor,
        start: int,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Returns x at row ``start``'s t, for ``sample(..., start=start)``: image to image.

            x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε

        Args:
            x0: clean data, (batch, ...), float32, bfloat16 or float16; never written.
            start: the first row that ``sample`` will take.
            seeds, generator: the source of ε, as ``sample`` draws an x_T (stream 1 of the seeds).
            noise: instead of both, ε itself, float32 of x0's shape.

        Returns:
            x_t in x0's dtype.
        """
        x0 = checked_state("x0", x0, None)
        row = whole("start", start, low=0, high=len(self.pairs) - 1)
        rows = None if noise is None else [noise]
        source = checked_noise(tuple(x0.shape), x0.device, 1, seeds, generator, rows)
        eps = source.initial() if noise is None else noise.detach()
        factors = forward_table(self.schedule, self.pairs)[row : row + 1]
        table = torch.tensor(factors, device=x0.device)
        # The forward process is the step at η = 0 from clean data, with the noise for ε.
        x, _ = ddim_step(x0.to(torch.float32), eps, table, 0, want_x0=False)
        return x.to(x0.dtype)

    @untraced
    def capture(
        self, model: Model, shape: Sequence[int], **options: Unpack[CaptureOptions]
    ) -> Captured:
        """Captures the loop as a CUDA graph to replay: see ``fastddim.loop.graph.Captured``.

        Each call may pass other ``seeds``, another ``x_T``, other tensors of ``cond`` and
        ``uncond``, and another ``guidance``. All other arguments are captured as they are.

        Args:
            model, shape: as in ``sample``.
            options: as in ``sample``: ``cond``, ``uncond``, ``guidance``, ``cond_fn``,
                ``self_condition``, ``dtype``, ``autocast``, ``device``, ``start``.
        """
        from fastddim.loop.graph import Captured

        check_names("DDIM.capture", options, CaptureOptions)
        size, where = checked_shape(shape), place_of(options.get("device"), model)
        plan = self._plan(options.get("start", 0), options.get("cond_fn") is not None)
        return Captured(plan, model, size, where, options)

    def describe(self, device: torch.device | str | None = None) -> None:
        """Prints each step's levels and factors, the number of model calls, and the backend.

        Args:
            device: the device to sample on; torch's default device if left out.

        Raises:
            ValueError, ImportError: torch cannot use the device, or the chosen backend cannot take
                steps there.
        """
        where = usable_device(device)
        eta = f"{self.eta:g}" if isinstance(self.eta, float) else self.eta
        spacing = self.spacing if isinstance(self.spacing, str) else "given"
        order = "" if self.order == 1 else f", order {self.order}"
        print(
            f"DDIM: {self.schedule}, {self.prediction} model, eta = {eta}{order}, {spacing} "
            f"spacing, {len(self.pairs)} model calls, steps on {where} by {backend(where).name}"
        )
        print("\n".join(self._all_rows.lines()))

    @property
    def _prediction(self) -> Prediction:
        """``prediction`` with the type that ``checked_prediction`` gave it at construction."""
        return checked_prediction(self.prediction, self.schedule)

    def _plan(self, start: int, shifted: bool) -> Plan:
        """Returns the table's rows from ``start`` on; ``shifted`` says whether by a cond_fn."""
        first = whole("start", start, low=0, high=len(self.pairs) - 1)
        if not first and not shifted:
            return self._all_rows
        shift = None
        if shifted:
            at, _ = levels_of(self.schedule, self.pairs, self.final_alpha_cumprod)
            shift = gradient_factors(at, self._prediction)
        return replace(self._all_rows, order=range(first, len(self.pairs)), shift=shift)

    @functools.cached_property
    def _all_rows(self) -> Plan:
        return plan_of(
            self.schedule,
            self.pairs,
            self.table,
            self._prediction,
            self.clip,
            order=self.order,
            settings=(self.eta, self.final_alpha_cumprod, self.temperature),
        )

    def _reverse_plan(self, until: int | None, shifted: bool) -> Plan:
        """Returns the same rows, each from its s to its t, from the last to ``until``."""
        return reverse_plan(
            self.schedule,
            self.pairs,
            self.final_alpha_cumprod,
            self._prediction,
            order=self.order,
            eta=self.eta,
            clip=self.clip,
            until=until,
            shifted=shifted,
        )


for _method, _options in (
    (DDIM.iterate, IterateOptions),
    (DDIM.invert, InvertOptions),
    (DDIM.capture, CaptureOptions),
):
    list_options(_method, _options, like=DDIM.sample)
