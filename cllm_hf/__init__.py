"""
Consistency LLMs for transformers: decode several tokens per forward pass, and train models for it.

Importing this package adds `decoding="jacobi"` to `generate` of every transformers model; `unregister` takes it back.
What needs `datasets`, `evaluate`, `trl` or `peft` is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .integration import register, set_jacobi_defaults, unregister


if TYPE_CHECKING:
    from .decoding.outputs import JacobiOutput, JacobiStats
    from .decoding.strategy import Proposal, Room, Row, Strategy, register_strategy
    from .evaluation.metrics import DecodingSpeed
    from .export import export_custom_generate
    from .loading import load_cllm
    from .show.picture import TrajectoryPicture, draw_trajectories
    from .training.callbacks import CollapseCallback
    from .training.config import CLLMConfig
    from .training.trainer import CLLMTrainer
    from .trajectories.builder import TrajectoryBuilder
    from .trajectories.hub import push_trajectories
    from .trajectories.loading import load_trajectories
    from .trajectories.options import CleaningRules
    from .trajectories.schema import FEATURES
    from .trajectories.statistics import TrajectoryStatistics, measure_trajectories

__all__ = [
    "CLLMConfig",
    "CLLMTrainer",
    "CleaningRules",
    "CollapseCallback",
    "DecodingSpeed",
    "FEATURES",
    "JacobiOutput",
    "JacobiStats",
    "Proposal",
    "Room",
    "Row",
    "Strategy",
    "TrajectoryBuilder",
    "TrajectoryPicture",
    "TrajectoryStatistics",
    "draw_trajectories",
    "export_custom_generate",
    "load_cllm",
    "load_trajectories",
    "measure_trajectories",
    "push_trajectories",
    "register",
    "register_strategy",
    "set_jacobi_defaults",
    "unregister",
]
_LAZY = {
    "CLLMConfig": ".training.config",
    "CLLMTrainer": ".training.trainer",
    "CleaningRules": ".trajectories.options",
    "CollapseCallback": ".training.callbacks",
    "DecodingSpeed": ".evaluation.metrics",
    "FEATURES": ".trajectories.schema",
    "JacobiOutput": ".decoding.outputs",
    "JacobiStats": ".decoding.outputs",
    "Proposal": ".decoding.strategy",
    "Room": ".decoding.strategy",
    "Row": ".decoding.strategy",
    "Strategy": ".decoding.strategy",
    "register_strategy": ".decoding.strategy",
    "TrajectoryBuilder": ".trajectories.builder",
    "TrajectoryPicture": ".show.picture",
    "TrajectoryStatistics": ".trajectories.statistics",
    "draw_trajectories": ".show.picture",
    "export_custom_generate": ".export",
    "load_cllm": ".loading",
    "load_trajectories": ".trajectories.loading",
    "measure_trajectories": ".trajectories.statistics",
    "push_trajectories": ".trajectories.hub",
}


# Of version 0.1, in the repository beside the package now.
_MOVED = {
    "GSM8KAccuracy": "examples/metrics/gsm8k_accuracy",
    "SpiderAccuracy": "examples/metrics/spider_accuracy",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in _MOVED:  # an AttributeError would lose its text in `from cllm_hf import ...`
        raise ImportError(f"`{name}` has moved out of the package. Call `evaluate.load({_MOVED[name]!r})` instead.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
