"""The most memory that a piece of work takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch


_PROCESS = Path("/proc/self")


class PeakMemory:
    """
    Context manager that finds the most memory taken inside it, above what was taken when it began.

    On a CUDA device that is what torch gives to tensors; on CPU under Linux, what the process has in memory. Memory
    that was set free but not yet given back is given back first where that is possible: work that takes it anew would
    otherwise seem to take none.

    Args:
        device (`torch.device`): where the work is done.

    Attributes:
        num_bytes (`int`, *optional*): the most bytes, once the work is done; `None` where nobody can say: on other
            devices and systems.
    """

    def __init__(self, device: torch.device):
        self.num_bytes: int | None = None
        self._device = device
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu":
            with contextlib.suppress(OSError, AttributeError):  # glibc's own
                ctypes.CDLL(None).malloc_trim(0)
            self._start = _peak_resident_size() if _reset_peak_resident_size() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._start is None:
            return
        is_cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if is_cuda else _peak_resident_size()
        self.num_bytes = None if peak is None else max(peak - self._start, 0)


def _reset_peak_resident_size() -> bool:
    """Let the process's peak begin anew at what it has in memory now, where the system can do that."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident_size() -> int | None:
    """The most bytes that the process has had in memory since the last reset."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
