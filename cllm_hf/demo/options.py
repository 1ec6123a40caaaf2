"""The sizes of the demo."""

from __future__ import annotations

from dataclasses import dataclass


MODES = ("both", "cllm", "lossless")


@dataclass(frozen=True)
class DemoOptions:
    """
    Sizes of the demo.

    Attributes:
        mode (`str`): what is made of the target model: a `"cllm"`, an adapter for `"lossless"` decoding, or `"both"`.
        seed (`int`): of the problems, the weights and the order of the data.
        hidden_size (`int`): width of the model; it has four layers.
        target_updates (`int`): optimizer steps of the target model, on `target_batch_size` new problems each.
        target_batch_size (`int`): problems in an optimizer step of the target model.
        num_trajectories (`int`): problems whose trajectories are collected.
        cllm_updates (`int`): optimizer steps of the CLLM, on `cllm_batch_size` trajectories each.
        cllm_batch_size (`int`): trajectories in an optimizer step of the CLLM.
        cllm_learning_rate (`float`): highest learning rate of the CLLM.
        ar_loss_weight (`float`): weight of the CLLM's AR loss.
        position_decay (`float`, *optional*): see `CLLMConfig`.
        trajectory_source (`str`): `"dataset"` for the states that were collected, `"online"` for those that the model
            makes while it learns.
        lossless_updates (`int`): optimizer steps of the lossless adapter, on `lossless_batch_size` responses each.
        lossless_batch_size (`int`): responses in an optimizer step of the lossless adapter.
        lossless_rank (`int`): rank of the lossless adapter.
        lossless_markov_rank (`int`): see `CLLMConfig`.
        lossless_block_size (`int`): tokens of a block of the lossless adapter.
        num_held_out (`int`): problems for the measurement, in no training data.
        block_size (`int`): tokens of a block of Jacobi decoding.
        max_new_tokens (`int`): longest answer; a worked answer has at most 68 tokens.
    """

    mode: str = "both"
    seed: int = 0
    hidden_size: int = 128
    target_updates: int = 650
    target_batch_size: int = 32
    num_trajectories: int = 2400
    cllm_updates: int = 300
    cllm_batch_size: int = 32
    cllm_learning_rate: float = 1.5e-3
    ar_loss_weight: float = 10.0
    position_decay: float | None = 4.0
    trajectory_source: str = "online"
    lossless_updates: int = 100
    lossless_batch_size: int = 32
    lossless_rank: int = 64
    lossless_markov_rank: int = 16
    lossless_block_size: int = 9
    num_held_out: int = 200
    block_size: int = 16
    max_new_tokens: int = 96

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")

    @property
    def has_cllm(self) -> bool:
        """`bool`: whether a CLLM is made."""
        return self.mode != "lossless"

    @property
    def has_lossless(self) -> bool:
        """`bool`: whether a lossless adapter is made."""
        return self.mode != "cllm"
