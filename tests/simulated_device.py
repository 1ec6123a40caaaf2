"""
A device that is not the CPU, made of CPU tensors: what runs on it has put every tensor where it belongs.

Tensors on the device `"sim"` are wrappers of CPU tensors. An operation over tensors of both devices fails, as on a
GPU, and what is read back to the host is counted: each of these would make a GPU wait. A process has the device from
`set_up` on, which must come before its first backward pass, and cannot be rid of it: see `device_checks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


NAME = "sim"
aten = torch.ops.aten
# Their results are on the host, or as large as the values say, so that the host has to know those.
_READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default}
_READS |= {aten._unique2.default, aten.unique_dim.default, aten.masked_select.default}
# What a GPU takes an index for from the host.
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class SimulatedTensor(torch.Tensor):
    """A tensor on the device, which holds its values in a CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> SimulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.held = held
        return tensor

    def __init__(self, held: torch.Tensor):
        pass

    def __repr__(self, *arguments: Any, **options: Any) -> str:
        return f"SimulatedTensor({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch itself refuses it of a class derived from `Tensor`

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {NAME!r} to numpy. Use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(function, arguments, options or {}, Counter())


class SimulatedDevice(TorchDispatchMode):
    """Where the device is there; `reads` counts for each operation how often the host had to wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(function, arguments, options or {}, self.reads)


def _run(function: Any, arguments: Any, options: dict[str, Any], reads: Counter[str]) -> Any:
    """Run an operation by its CPU kernel; its results are where its tensors are, or where it is told to put them."""
    tensors = [value for value in tree_flatten((arguments, options))[0] if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    held, held_options = tree_map(
        lambda value: value.held if isinstance(value, SimulatedTensor) else value, (arguments, options)
    )
    if function == aten.copy_.default:
        if ours and not isinstance(arguments[0], SimulatedTensor):
            reads[str(function)] += 1
        function(*held, **held_options)
        return arguments[0]
    is_here = bool(ours)
    if options.get("device") is not None:
        is_here = torch.device(options["device"]).type == NAME
        held_options["device"] = "cpu"
    if function == aten._to_copy.default:
        is_read = bool(ours) and not is_here
    else:
        is_read = bool(ours) and (function in _READS or (function in _INDEXING and _has_mask(arguments[1])))
        _check(function, arguments, tensors, ours)
    if is_read:
        reads[str(function)] += 1
    known = {id(tensor.held): tensor for tensor in ours}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else SimulatedTensor(value)

    results = function(*held, **held_options)
    return tree_map(wrap, results) if is_here else results


def _has_mask(indices: Any) -> bool:
    """Whether an index is a mask, of which the places that it means have to be found first."""
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _check(function: Any, arguments: Any, tensors: list[torch.Tensor], ours: list[torch.Tensor]) -> None:
    """Refuse tensors of two devices, but for what a GPU takes: numbers, and indices that are on the host."""
    if not ours:
        return
    if function in _INDEXING:
        if not isinstance(arguments[0], SimulatedTensor):
            raise RuntimeError(f"{function}: indices on {NAME!r} for a tensor on the CPU")
    elif any(not isinstance(tensor, SimulatedTensor) and tensor.dim() for tensor in tensors):
        places = [f"{tensor.device.type}{list(tensor.shape)}" for tensor in tensors]
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, got {', '.join(places)}")


def set_up() -> None:
    """Have this process know the device, once and for good."""
    _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """Have tensors on the device, and count what is read back from it."""
    was_set, real_generator = torch._C._only_lift_cpu_tensors(), torch.Generator
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(.., device=)` then goes through the mode
    torch.Generator = lambda device="cpu": real_generator()
    try:
        with SimulatedDevice() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(was_set)
        torch.Generator = real_generator
