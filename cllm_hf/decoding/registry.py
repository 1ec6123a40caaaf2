"""The strategies that `generate(decoding=...)` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..options import AUTOREGRESSIVE, JACOBI, LOSSLESS, JacobiOptions
from .candidates import CandidateStrategy
from .jacobi import JacobiStrategy
from .lossless import make_lossless
from .strategy import Strategy


def make_jacobi(options: JacobiOptions) -> Strategy:
    """Make the strategy of `decoding="jacobi"`."""
    return CandidateStrategy(options.candidates) if options.candidates else JacobiStrategy()


_FACTORIES: dict[str, Callable[[JacobiOptions], Strategy]] = {JACOBI: make_jacobi}


def register_strategy(name: str, factory: Callable[[JacobiOptions], Strategy]) -> None:
    """
    Have `model.generate(decoding=name)` decode by a strategy of your own.

    Args:
        name (`str`): value of `decoding`. Registering a name again replaces its strategy.
        factory (`Callable[[JacobiOptions], Strategy]`): called once for every call of `generate`, with its
            `jacobi_` options.

    Raises:
        ValueError: for the names of this package.
    """
    if name in (AUTOREGRESSIVE, JACOBI, LOSSLESS):
        raise ValueError(f"`name` must be new, got {name!r}, which is built in. Choose another one.")
    _FACTORIES[name] = factory


def decodings() -> tuple[str, ...]:
    """List the values of `decoding`."""
    return (JACOBI, LOSSLESS, *(name for name in _FACTORIES if name != JACOBI), AUTOREGRESSIVE)


def make_strategy(name: str, options: JacobiOptions, model: Any) -> Strategy:
    """Make a registered strategy."""
    if name == LOSSLESS:
        return make_lossless(model, options)
    return _FACTORIES[name](options)
