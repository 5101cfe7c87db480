"""Steps inside torch.compile: tables that are inputs of the graph, and the step as plain maths."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastddim.coefficients import PREDICTIONS, Prediction
from fastddim.dropins._tables import Tables
from fastddim.step.backends import Fixed
from fastddim.step.bound import by_op
from fastddim.step.traced import traced_step

Kind: TypeAlias = float | str
"""η of a table, or the name of a step that differs."""
Key: TypeAlias = "tuple[Kind, str, torch.dtype]"
"""A kind of table, and the samples' device and dtype."""


class Maths:
    """Takes steps as ``Buffers`` does, by operations that torch.compile fuses."""

    def drawn(self, like: Tensor) -> Tensor:
        """Draws normals as ``torch.randn_like`` does."""
        return torch.randn_like(like)

    def stepped(
        self,
        table: Tensor,
        x: Tensor,
        output: Tensor,
        rows: Tensor | int,
        *,
        prediction: Prediction = "epsilon",
        clip: float | None = None,
        rederive: bool = False,
        posterior: bool = False,
        noise_first: bool = False,
        want_x0: bool = True,
        seeds: Tensor | None = None,
        noise: Tensor | None = None,
        threshold: Tensor | None = None,
        next_input: Tensor | None = None,
        history: Tensor | None = None,
        checked: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (x_s, x0). ``rows`` is a tensor of shape (1,) or (batch,)."""
        assert isinstance(rows, Tensor)
        assert next_input is None
        assert checked
        options = PREDICTIONS.index(prediction), noise_first, clip, bool(rederive), posterior
        fixed = Fixed(*options, None if x.dtype is torch.float32 else x.dtype)
        if seeds is None:
            return traced_step(
                fixed, x, output, table, rows, noise, threshold=threshold, history=history
            )
        # The op computes the counter noise inside its pass.
        x_s, x0 = torch.empty_like(x), torch.empty_like(x) if want_x0 else None
        on = rows.to(torch.int32).expand(x.shape[0])
        by_op(fixed, x, output, table, on, seeds, noise, None, threshold, x_s, x0, None, history)
        return x_s, x0


MATHS = Maths()


class Compiled:
    """The tables of a scheduler's compiled steps, and the tensors behind them.

    A graph takes each table as an input and guards only its shape, so ``set_timesteps`` may put
    other tables here without a recompilation.
    """

    def __init__(self) -> None:
        self.sources: tuple[Any, ...] = ()
        self.tables: dict[Key, Tables] = {}

    def make(self, scheduler: Any, key: Key) -> None:
        """Makes and keeps the tables of this key, or drops them where the scheduler has none."""
        sources = scheduler._behind_tables()
        if len(sources) != len(self.sources) or any(map(operator.is_not, sources, self.sources)):
            self.tables.clear()  # The others come from tensors that somebody has replaced.
        self.sources = sources
        kind, device, dtype = key
        # A tensor made in inference mode would have other guards than its successors.
        with torch.inference_mode(False), torch.no_grad():
            try:
                found = scheduler._tables_for(kind, torch.device(device), dtype)
            except ValueError:
                found = None  # The step outside the graph raises the error.
            made = None if found is None else _cloned(found)
        if made is None:
            self.tables.pop(key, None)
        else:
            self.tables[key] = made

    def renew(self, scheduler: Any) -> None:
        """Makes all tables again, for other timesteps."""
        for key in list(self.tables):
            self.make(scheduler, key)


def _cloned(tables: Tables) -> Tables:
    return Tables(*(None if t is None else t.clone() for t in tables))  # type: ignore[arg-type]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _made(scheduler: Any, kind: Kind, device: str, dtype: torch.dtype) -> bool:
    """Makes the tables while torch.compile traces, as Python that it does not trace."""
    compiled = scheduler.__dict__.setdefault("_compiled", Compiled())
    compiled.make(scheduler, (kind, device, dtype))
    return (kind, device, dtype) in compiled.tables


def compiled_tables(scheduler: Any, kind: Kind, sample: Tensor) -> Tables | None:
    """Returns the tables of this kind as inputs of the graph, or None if the scheduler has none."""
    at = sample.device
    key = kind, f"{at.type}:{at.index}" if at.index is not None else at.type, sample.dtype
    if not _made(scheduler, *key):
        return None
    compiled = scheduler._compiled
    # Where somebody replaces one of these tensors, this guard fails and the tables are made again.
    for kept, now in zip(compiled.sources, scheduler._behind_tables(), strict=True):
        if kept is not now:
            return None
    found: Tables = compiled.tables[key]
    return found


def constant(number: float) -> float:
    """Returns the number as a constant of the graph, which is compiled again for another value.

    Otherwise torch.compile makes a variable of a float argument when its value first changes.
    """
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # It imports sympy.

    return float(guard_scalar(number))


def rows_of(timestep: Any, device: torch.device) -> Tensor | None:
    """Returns the timestep as an int64 tensor of shape (1,), or None if it is no timestep."""
    if isinstance(timestep, Tensor):
        if timestep.dim() or timestep.is_floating_point() or timestep.dtype == torch.bool:
            return None
        return timestep.to(device=device, dtype=torch.int64).view(1)
    if isinstance(timestep, bool) or not isinstance(timestep, int):
        return None
    return torch.full((1,), timestep, dtype=torch.int64, device=device)


def places_of(
    timestep: Any, timesteps: Tensor, table: Tensor, kinds: int = 1
) -> tuple[Tensor, int]:
    """Returns the place of ``timestep`` in ``timesteps``, int64 (1,), and the number of steps.

    The table has ``kinds`` rows for each step, and a row of NaN, whose place an unknown timestep
    has.
    """
    steps = (table.shape[0] - 1) // kinds
    found = timesteps.to(table.device) == (
        timestep.to(table.device) if isinstance(timestep, Tensor) else timestep
    )
    place = torch.where(found.any(), found.to(torch.int32).argmax(), steps * kinds)
    return place.view(1), steps
