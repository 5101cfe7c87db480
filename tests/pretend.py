"""A fake GPU: its tensors hold their values on the CPU, and it records each wait of the host.

    with Device() as device:
        x = device.put(x)  # x.device is cuda:0
        with device.watch() as waits:
            y = 2 * x[x > 0]
        # waits == ["aten.index.Tensor with a mask (test_it.py:12)"]

On a GPU the host enqueues an operation and goes on. It waits where it reads a value, where values
decide a result's shape, and where it copies between CPU and GPU without ``non_blocking``.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
aten: Any = torch.ops.aten

READS = {
    aten._local_scalar_dense,  # item(), int(t), bool(t), and a[t] for a t of one value
    aten.equal,
    aten.allclose,
}
SHAPES = {
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten.copy_, aten._to_copy}


class There(Tensor):
    """A tensor on the fake GPU; ``here`` holds its values on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device("meta"),  # C++ sees "meta": for CUDA it would need a driver.
        )
        made.here = here
        return made

    device: Any = property(lambda _: CUDA)
    is_cuda: Any = property(lambda _: True)
    is_meta: Any = property(lambda _: False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.untyped_storage:  # Tests tell views from copies by its address.
            return args[0].here.untyped_storage()
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.tolist:
                return args[0].cpu().tolist()
            found = func(*args, **(kwargs or {}))
            # ``_to_copy``, which a mode sees, does not say whether ``to`` must copy.
            if func is Tensor.to and found is args[0] and _must_copy(args, kwargs or {}):
                layout = (kwargs or {}).get("memory_format", torch.preserve_format)
                return found.clone(memory_format=layout)
            return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} outside of the fake GPU's block")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"There({self.here})"


def _must_copy(args: Any, kwargs: Any) -> bool:
    """Returns ``copy`` of ``to(device, dtype)``, ``to(dtype)`` or ``to(other)``."""
    first = args[1] if len(args) > 1 else None
    place = 3 if isinstance(first, (torch.dtype, Tensor)) else 4
    return bool(args[place] if len(args) > place else kwargs.get("copy", False))


def _lies_as(x: Tensor, layout: torch.memory_format | None) -> bool:
    """Returns whether ``to`` leaves a tensor in its layout."""
    return layout in (None, torch.preserve_format, suggest_memory_format(x))


class Generator(torch.Generator):
    """A generator on the fake GPU that draws the CPU generator's numbers."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


class Device(TorchDispatchMode):
    """Makes ``cuda:0`` usable within its block; ``waits`` lists the waits of the host."""

    # While a mode with this key is active, PyTorch does not look for a CUDA driver.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []

    def __enter__(self) -> Device:
        self._lifts = torch._C._only_lift_cpu_tensors()
        # Otherwise torch.tensor(..., device=CUDA) would not dispatch its copy.
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifts)

    def put(self, value: Any) -> Any:
        """``value`` with every tensor in it copied to the fake GPU."""
        with torch._C._DisableTorchDispatch():
            return tree_map(lambda t: There(t.clone()) if isinstance(t, Tensor) else t, value)

    @contextmanager
    def watch(self) -> Iterator[list[str]]:
        """Yields the list of the waits within the block."""
        before, self.waits = self.waits, []
        try:
            yield self.waits
        finally:
            self.waits = before

    def wait(self, what: str) -> None:
        """Records a wait for ``what``, with the repository's line that causes it."""
        ours = [
            frame
            for frame in traceback.extract_stack()
            if frame.filename != __file__ and Path(frame.filename).is_relative_to(ROOT)
        ]
        self.waits.append(f"{what} ({Path(ours[-1].filename).name}:{ours[-1].lineno})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        there = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
        lands = there if packet is not aten.copy_ else isinstance(args[0], There)
        if kwargs.get("device") is not None:
            lands = torch.device(kwargs["device"]).type != "cpu"
            kwargs["device"] = CPU
        if (
            packet is aten._to_copy
            and there
            and lands
            and kwargs.get("dtype") in (None, args[0].dtype)
            and _lies_as(args[0].here, kwargs.get("memory_format"))
        ):
            return args[0]  # Already on the device, which C++ does not know.
        kwargs.pop("pin_memory", None)
        self._note(func, args, kwargs, there, lands)
        here = tree_map(lambda t: t.here if isinstance(t, There) else t, (args, kwargs))
        out = func(*here[0], **here[1])
        if packet is aten.copy_:
            return args[0]
        if lands:
            out = tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, out)
            if there and packet is not aten._to_copy:
                return return_and_correct_aliasing(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, there: bool, lands: bool) -> None:
        """Records the operation's waits, and raises where CUDA would."""
        packet = func.overloadpacket
        if packet in COPIES:
            source = args[packet is aten.copy_]
            at_once = kwargs.get("non_blocking") or args[2:] == (True,)
            if lands and not isinstance(source, There) and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the "
                    "CPU tensor is pinned."
                )
            if isinstance(source, There) != lands and not at_once:
                self.wait(f"{func} from one device to another")
        elif not there:
            return
        elif packet in READS:
            self.wait(f"{func} reads a value")
        elif packet in SHAPES or (func is aten.repeat_interleave.Tensor and not kwargs):
            self.wait(f"{func} has a shape that values decide")
        elif packet in INDEXING:
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{func} with a mask")
                elif isinstance(index, Tensor) and not isinstance(index, There):
                    self.wait(f"{func} with an index on the CPU")
        else:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and not isinstance(leaf, There) and leaf.dim():
                    raise RuntimeError(f"{func}: all tensors must be on one device")
