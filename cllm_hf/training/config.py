"""Options of `CLLMTrainer`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..decoding.options import check_block_size


# Options of `SFTConfig` that would have no effect here, or a wrong one: name, values that ask for nothing, reason.
_NO_EFFECT = (
    ("packing", (False,), "a step already packs each response with its draft blocks"),
    ("eval_packing", (None,), "a step already packs each response with its draft blocks"),
    ("padding_free", (False,), "packed batches need their padding"),
    ("assistant_only_loss", (False,), "the AR loss is on the response, which a trajectory record names"),
    ("completion_only_loss", (None,), "the AR loss is on the response, which a trajectory record names"),
    ("loss_type", ("nll",), "the loss is the consistency loss and the AR loss"),
    ("label_smoothing_factor", (0.0,), "it is not implemented"),
    ("use_liger_kernel", (False,), "its fused loss is not the consistency loss"),
    ("router_aux_loss_coef", (None, 0.0), "the load-balancing loss is not part of this objective"),
    ("chat_template_path", (None,), "the dataset already holds token ids"),
    ("pad_to_multiple_of", ("auto", None), "batches are padded to their longest record"),
    ("dataset_kwargs", (None, {"skip_prepare_dataset": True}), "the dataset is taken as it is"),
    ("shuffle_dataset", (False,), "batches are drawn in random order already"),
)


@dataclass
class CLLMConfig(SFTConfig):
    """
    Options of [`CLLMTrainer`]: those of `trl.SFTConfig` and `transformers.TrainingArguments`, and the ones below.

    Args:
        ar_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the AR loss: `loss = consistency_loss + ar_loss_weight * ar_loss`, each a mean over its own
            positions. More keeps more of the model's quality and gains a little less speed.
        block_size (`int`, *optional*):
            Tokens of a block. By default what the dataset has; if set, the dataset must have it.
        max_length (`int`, *optional*):
            Longest prompt and response, in tokens; longer responses lose their last blocks. By default no limit.
        export_custom_generate (`bool`, *optional*, defaults to `False`):
            Whether `save_model` and `push_to_hub` also write Jacobi decoding for people without this package, as
            [`export_custom_generate`] does. Checkpoints go without.

    Raises:
        ValueError: for a negative weight, a block size below 1, or an option of `SFTConfig` that has no effect here.
    """

    ar_loss_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the AR loss: loss = consistency_loss + ar_loss_weight * ar_loss."},
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens of a block. By default what the dataset has."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt and response, in tokens; longer responses lose their last blocks."},
    )
    export_custom_generate: bool = field(
        default=False,
        metadata={"help": "Whether to save and push Jacobi decoding for people without this package, too."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ar_loss_weight < 0:
            raise ValueError(f"`ar_loss_weight` must be at least 0, got {self.ar_loss_weight}. Typical are 1 to 10.")
        if self.block_size is not None:
            check_block_size(self.block_size, "block_size")
        for name, neutral, reason in _NO_EFFECT:
            if getattr(self, name) not in neutral:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no place in consistency training: {reason}. Drop it."
                )
        checkpointing = self.gradient_checkpointing_kwargs
        if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
            raise ValueError("Re-entrant gradient checkpointing is not supported. Drop `use_reentrant=True`.")

    def __getstate__(self) -> dict[str, Any]:
        # The host pickles these options into `training_args.bin`, and pushes that.
        return {**self.__dict__, "hub_token": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> CLLMConfig:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied
