"""The columns that a step reads, the rows that samples are on, and the factors in them."""

from __future__ import annotations

import weakref
from typing import TypeAlias

import torch
from torch import Tensor

from fastddim.coefficients import COLUMNS, COLUMNS_2, COLUMNS_OF_MANY, COLUMNS_ROUNDED

Factors: TypeAlias = tuple[Tensor, ...]
"""The table's columns: () where all samples are on one row, else (batch, 1)."""


_READ = tuple(len(names) for names in (COLUMNS, COLUMNS_2, COLUMNS_OF_MANY))
"""The numbers of columns in the tables of a step that does not round. Each of these tables begins
with the columns of the shorter ones, so that a column means the same in all of them."""


def check_columns(name: str, columns: int, history: bool, rounding: torch.dtype | None) -> None:
    """Raises ``ValueError`` where the number of columns is not one that the step reads.

    ``rounding`` alone decides whether a table of nine columns has ``COLUMNS_ROUNDED`` or
    ``COLUMNS_OF_MANY``. Without ``history`` the step does not read κ.
    """
    allowed = _READ[history:] if rounding is None else (len(COLUMNS_ROUNDED),)
    if columns not in allowed:
        whose = "of order 2" if history else "of order 1" if rounding is None else "with rounding"
        numbers = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have {numbers} columns in a step {whose}, got {columns}")


def rows_differ(row: int | Tensor) -> bool:
    """Returns whether samples may be on rows of their own."""
    return isinstance(row, Tensor) and row.stride(0) != 0 and len(row) > 1


def rows_of(row: int | Tensor, batch: int) -> Tensor:
    """Returns ``row`` as int32 (batch,): a number becomes a tensor on the CPU."""
    if isinstance(row, Tensor):
        return row
    return torch.full((1,), row, dtype=torch.int32, device="cpu").expand(batch)


_kept: dict[int, tuple[weakref.ref[Tensor], int, dict[int, Factors]]] = {}
"""The factors of living tables by the tables' ids: (table, its address, factors by row)."""


def factors_of(table: Tensor, row: int | Tensor) -> Factors:
    """Returns the factors of a row, as ``read_factors`` does.

    They are views of the table, so that they follow writes to it. Making them costs as much as two
    operations of a small step, so the factors of an int are kept for as long as the table lives.
    """
    if not isinstance(row, int):
        return read_factors(table, row)
    key = id(table)
    kept = _kept.get(key)
    if kept is None or kept[0]() is not table or kept[1] != table.data_ptr():
        # The callback runs before the table's id can be another's.
        ref = weakref.ref(table, lambda _: _kept.pop(key, None))
        kept = _kept[key] = ref, table.data_ptr(), {}
    found = kept[2].get(row)
    if found is None:
        # A view of the table itself would keep the table, and so its factors, alive for ever.
        apart = torch.empty(0, dtype=table.dtype, device=table.device)
        apart.set_(table.untyped_storage(), table.storage_offset(), table.shape, table.stride())
        found = kept[2][row] = read_factors(apart, row)
    return found


def read_factors(table: Tensor, row: int | Tensor) -> Factors:
    """Returns the table's columns, as ``Factors``, or raises where a row is not in the table."""
    if isinstance(row, int):
        lowest = highest = row
    elif row.stride(0) == 0 or row.shape[0] == 1:
        lowest = highest = int(row[0])
    else:
        lowest, highest = (int(each) for each in torch.aminmax(row))
    if lowest < 0 or highest >= table.shape[0]:
        raise ValueError(f"rows must lie in [0, {len(table)}), got {lowest} to {highest}")
    if lowest == highest:
        return table[lowest].unbind()
    assert isinstance(row, Tensor)
    return torch.embedding(table, row).unsqueeze(-1).unbind(1)
