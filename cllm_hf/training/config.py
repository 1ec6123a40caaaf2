"""Options of `CLLMTrainer`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from ..options import as_integer, check_block_size
from .losses import DIVERGENCES


# Options of `SFTConfig` that would have no effect here, or a wrong one: name, values that ask for nothing, reason.
_NO_EFFECT = (
    ("packing", (False,), "a step already packs each response with its draft blocks"),
    ("eval_packing", (None,), "a step already packs each response with its draft blocks"),
    ("padding_free", (False,), "packed batches need their padding"),
    ("assistant_only_loss", (False,), "the AR loss is on the response, which a trajectory record names"),
    ("completion_only_loss", (None,), "the AR loss is on the response, which a trajectory record names"),
    ("loss_type", ("nll",), "the loss is the consistency loss and the AR loss"),
    ("label_smoothing_factor", (0.0,), "the AR loss has `ar_label_smoothing`"),
    ("use_liger_kernel", (False,), "its fused loss is not the consistency loss"),
    ("router_aux_loss_coef", (None, 0.0), "the load-balancing loss is not part of this objective"),
    ("chat_template_path", (None,), "the dataset already holds token ids"),
    ("pad_to_multiple_of", ("auto", None), "batches are padded to their longest record"),
    ("dataset_kwargs", (None, {"skip_prepare_dataset": True}), "the dataset is taken as it is"),
    ("neftune_noise_alpha", (None,), "the noise would be in the targets as well"),
    ("truncation_mode", ("keep_start",), "`max_length` cuts the last blocks of a response"),
    ("dataset_num_proc", (None,), "the dataset is taken as it is"),
    ("shuffle_dataset", (False,), "batches are drawn in random order already"),
    (
        "train_sampling_strategy",
        ("random", "sequential", "group_by_length"),
        "short sequences share the rows of a batch already",
    ),
)
# What numbers must be: the least integer, or a rule; and what is typical.
_INTEGERS = {
    "max_length": (1, "512 to 4096"),
    "states_per_block": (1, "1 to 4"),
    "noise_window": (1, "4 to 16"),
    "online_iterations": (0, "2 to 8"),
    "markov_rank": (0, "64 to 256, or 0 for none"),
    "drafts_per_response": (1, "8 to 32"),
    "num_monitored_prompts": (0, "8, or 0 for none"),
    "monitored_max_new_tokens": (1, "64 to 512"),
}
_NUMBERS: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "ar_loss_weight": ("at least 0", lambda value: value >= 0, "1 to 10"),
    "divergence_temperature": ("greater than 0", lambda value: value > 0, "1.0"),
    "ar_label_smoothing": ("at least 0 and below 1", lambda value: 0 <= value < 1, "0 and 0.1"),
    "position_decay": ("greater than 0", lambda value: value > 0, "4 to 32"),
}
# Options of a consistency loss and an AR loss, which must have their defaults in lossless training.
NOT_LOSSLESS = (
    "ar_loss_weight",
    "consistency",
    "ar_labels",
    "ar_label_smoothing",
    "states_per_block",
    "state_sampling",
    "context",
    "noise_window",
    "online_iterations",
)
# Options that have a place there alone.
LOSSLESS_ALONE = ("markov_rank", "drafts_per_response")


def option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    """A field of a dataclass that a command line and a file can set."""
    return field(default=default, metadata={"help": help, **({"choices": list(choices)} if choices else {})})


@dataclass
class CLLMConfig(SFTConfig):
    """
    Options of [`CLLMTrainer`]: those of `trl.SFTConfig` and `transformers.TrainingArguments`, and the ones below.

    Args:
        ar_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the AR loss: `loss = consistency_loss + ar_loss_weight * ar_loss`, each a mean over its own
            positions. More keeps more of the model's quality and gains a little less speed.
        block_size (`int`, *optional*):
            Tokens of a block. By default what the dataset has, or 16 without states; if set, a dataset of states must
            have it.
        max_length (`int`, *optional*):
            Longest prompt and response, in tokens; longer responses lose their last blocks. By default no limit.
        consistency (`str`, *optional*, defaults to `"global"`):
            Where a state is drawn to: `"global"` to the fixed point, `"local"` to the next state.
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            Distance of the distributions: a name in `cllm_hf.training.losses.DIVERGENCES`.
        divergence_temperature (`float`, *optional*, defaults to `1.0`):
            Both logits are divided by it, and the divergence multiplied by its square.
        ar_labels (`str`, *optional*, defaults to `"response"`):
            Tokens of the AR loss: `"response"`, or `"ground_truth"` for those of the dataset's column `label_ids`.
        ar_label_smoothing (`float`, *optional*, defaults to `0.0`):
            Label smoothing of the AR loss.
        position_decay (`float`, *optional*):
            Tokens over which the weight of a position falls to 1/e, counted from the first trained one of its block.
            By default all weigh the same.
        states_per_block (`int`, *optional*, defaults to `1`):
            States that each block contributes to an optimizer step; they share the forward pass of the clean sequence.
        state_sampling (`str`, *optional*, defaults to `"uniform"`):
            How they are chosen: `"uniform"`, or `"progressive"` for a noise that rises from block to block, in cycles
            of `noise_window` blocks (Jacobi Forcing, arXiv 2512.14681).
        context (`str`, *optional*, defaults to `"clean"`):
            What stands before a block: `"clean"` the response, or `"noisy"` the drafts of the earlier blocks of the
            same `noise_window`, and the response before that.
        noise_window (`int`, *optional*, defaults to `16`):
            Blocks of a cycle of `state_sampling="progressive"` and of a window of `context="noisy"`.
        block_size_schedule (`list[int]`, *optional*):
            Tokens of a block in equal parts of the run, such as `8 16 32`. The last is the default of the saved model.
        trajectory_source (`str`, *optional*, defaults to `"dataset"`):
            Where states are from: `"dataset"`, or `"online"` for those that the model, as it is, would hold while it
            decodes the responses. The dataset then needs no states.
        online_iterations (`int`, *optional*, defaults to `4`):
            Most iterations that the states of an optimizer step are from their first drafts; each optimizer step draws
            a number.
        lossless (`bool`, *optional*, defaults to `False`):
            Whether to train an adapter that drafts for the model instead of one that changes it. The model itself is
            frozen, and decoding with the adapter gives the model's own text. The dataset needs no states.
        markov_rank (`int`, *optional*, defaults to `64`):
            With `lossless`: rank of the term that tells a drafted token which token was drafted before it; 0 for none.
        drafts_per_response (`int`, *optional*, defaults to `12`):
            With `lossless`: places of each response after which a step has tokens drafted.
        export_custom_generate (`bool`, *optional*, defaults to `False`):
            Whether `save_model` and `push_to_hub` also write Jacobi decoding for people without this package, as
            [`export_custom_generate`] does. Checkpoints go without.
        num_monitored_prompts (`int`, *optional*, defaults to 8):
            Prompts of each evaluation dataset, the first ones, that an evaluation decodes by Jacobi to log tokens per
            forward, fast-forwarded and stationary tokens, agreement with the target model and repetition. 0 for none.
        monitored_max_new_tokens (`int`, *optional*):
            Longest response to decode for that, in tokens. By default the longest of those in the dataset.
        on_collapse (`str`, *optional*, defaults to `"warn"`):
            What to do at signs that the model loses its quality: `"warn"`, `"stop"` the training too, or `"ignore"`.
        plot_run (`bool`, *optional*, defaults to `True`):
            Whether to draw losses and tokens per forward pass over optimizer steps into `training.png` in
            `output_dir`.

    Raises:
        ValueError: for a value out of its range, options that exclude each other, or an option of `SFTConfig` that has
            no effect here.
    """

    # What the losses were before the first optimizer step is what later ones are compared with.
    logging_first_step: bool = option(True, "Log the first optimizer step too.")
    ar_loss_weight: float = option(1.0, "Weight of the AR loss: loss = consistency_loss + ar_loss_weight * ar_loss.")
    block_size: int | None = option(
        None, "Tokens of a block. By default that of the dataset's states, or 16 without states."
    )
    max_length: int | None = option(
        None, "Longest prompt and response, in tokens; longer responses lose their last blocks."
    )
    consistency: str = option(
        "global",
        "What a state is trained towards: the fixed point (global) or the next state (local).",
        ("global", "local"),
    )
    divergence: str = option(
        "forward_kl", "Distance between the distributions at a state and at the fixed point.", DIVERGENCES
    )
    divergence_temperature: float = option(1.0, "Temperature of that distance: both logits are divided by it.")
    ar_labels: str = option(
        "response",
        "What the AR loss is on: the dataset's responses, or the tokens of its column label_ids (ground_truth).",
        ("response", "ground_truth"),
    )
    ar_label_smoothing: float = option(0.0, "Label smoothing of the AR loss.")
    position_decay: float | None = option(
        None, "Tokens over which the weight of a position in its block falls to 1/e. By default all weigh the same."
    )
    states_per_block: int = option(1, "States that each block contributes to an optimizer step.")
    state_sampling: str = option(
        "uniform",
        "How states are chosen: any (uniform), or with noise that rises from block to block (progressive).",
        ("uniform", "progressive"),
    )
    context: str = option(
        "clean",
        "What a block sees before it: the response (clean), or drafts of earlier blocks (noisy).",
        ("clean", "noisy"),
    )
    noise_window: int = option(16, "Blocks of a cycle of progressive states and of a window of noisy context.")
    block_size_schedule: list[int] | None = option(
        None, "Tokens of a block in equal parts of the run, such as 8 16 32."
    )
    trajectory_source: str = option(
        "dataset",
        "Where states are from: the dataset, or the model's own decoding while it is trained (online).",
        ("dataset", "online"),
    )
    online_iterations: int = option(4, "With online states: at most so many iterations after the first draft.")
    lossless: bool = option(False, "Train an adapter that drafts for the model, whose text stays its own.")
    markov_rank: int = option(64, "With --lossless: rank of the term for the token drafted before; 0 for none.")
    drafts_per_response: int = option(
        12, "With --lossless: places of each response after which a step has tokens drafted."
    )
    export_custom_generate: bool = option(
        False, "Save and push custom_generate/ too: Jacobi decoding for people without this package."
    )
    num_monitored_prompts: int = option(
        8, "Prompts that an evaluation decodes by Jacobi, to log speed and quality. 0 for none."
    )
    monitored_max_new_tokens: int | None = option(
        None, "Longest response to decode for that, in tokens. By default the longest in the dataset."
    )
    on_collapse: str = option(
        "warn",
        "What to do at signs of collapse, which is a loss of quality: warn, stop the training too, or ignore.",
        ("warn", "stop", "ignore"),
    )
    plot_run: bool = option(
        True, "Draw losses and tokens per forward pass over optimizer steps, into training.png beside the model."
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not is_torch_bf16_gpu_available()):
            self.bf16 = False  # transformers would refuse it, or be slow
        super().__post_init__()
        self._check_values()
        self._check_block_sizes()
        self._check_lossless()
        self._check_combinations()
        for name, neutral, reason in _NO_EFFECT:
            if getattr(self, name) not in neutral:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no place in consistency training: {reason}. Drop it."
                )
        checkpointing = self.gradient_checkpointing_kwargs
        if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
            raise ValueError("Re-entrant gradient checkpointing is not supported. Drop `use_reentrant=True`.")

    def _check_values(self) -> None:
        if self.max_steps == 0:
            raise ValueError(
                "`max_steps` must be at least 1, or -1 for whole epochs, got 0. Pass a number, or drop it."
            )
        for name in CLLMConfig.__annotations__:  # our own
            value, entry = getattr(self, name), CLLMConfig.__dataclass_fields__[name]
            choices = entry.metadata.get("choices")
            if choices and value not in choices:
                allowed = ", ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
            if value is None and entry.default is None:
                continue
            if name in _INTEGERS:
                least, typical = _INTEGERS[name]
                number = as_integer(value)
                if number is None or number < least:
                    raise ValueError(
                        f"`{name}` must be an integer of at least {least}, got {value!r}. Typical: {typical}."
                    )
                setattr(self, name, number)  # as Python's own, ready for JSON
            elif name in _NUMBERS:
                rule, holds, typical = _NUMBERS[name]
                rule = rule if _is_number(value) else f"a number, {rule}"
                if not _is_number(value) or not holds(value):
                    raise ValueError(f"`{name}` must be {rule}, got {value!r}. Typical: {typical}.")

    def _check_block_sizes(self) -> None:
        if self.block_size is not None:
            self.block_size = check_block_size(self.block_size, "block_size")
        if self.block_size_schedule is not None:
            if isinstance(self.block_size_schedule, tuple):
                self.block_size_schedule = list(self.block_size_schedule)
            if not isinstance(self.block_size_schedule, list) or not self.block_size_schedule:
                raise ValueError(
                    "`block_size_schedule` must be a list of at least one block size, got "
                    f"{self.block_size_schedule!r}. Pass one such as [8, 16, 32], or drop it."
                )
            sizes = [check_block_size(size, "block_size_schedule") for size in self.block_size_schedule]
            self.block_size_schedule = sizes

    def _check_lossless(self) -> None:
        if self.lossless:
            reason = (
                "has no place with `lossless=True`, which trains no states and leaves the model as it is. Drop one"
            )
        else:
            reason = "has an effect with `lossless=True` alone, got it without. Pass both, or drop this one"
        for name in NOT_LOSSLESS if self.lossless else LOSSLESS_ALONE:
            if getattr(self, name) != CLLMConfig.__dataclass_fields__[name].default:
                raise ValueError(f"`{name}={getattr(self, name)!r}` {reason}.")
        if not self.lossless:
            return
        smallest = min([*(self.block_size_schedule or []), self.block_size or 2])
        if smallest < 2:
            raise ValueError(
                f"A block must have at least 2 tokens with `lossless=True`, of which the model says the first and the "
                f"adapter drafts the others, got {smallest}. Typical values are 4 to 16."
            )
        self.trajectory_source = "online"  # responses are all that is needed

    def _check_combinations(self) -> None:
        if self.trajectory_source == "online" and self.state_sampling == "progressive":
            raise ValueError(
                '`state_sampling="progressive"` chooses among stored states, and `trajectory_source="online"` has '
                "none: its states are of every noise already. Drop one of the two."
            )
        if self.trajectory_source == "online" and self.context == "noisy":
            raise ValueError(
                '`context="noisy"` joins the drafts of neighboring blocks, and `trajectory_source="online"` makes '
                "those of single windows. Drop one of the two."
            )
        if self.consistency == "local" and self.block_size_schedule is not None:
            raise ValueError(
                '`consistency="local"` takes the next state of a whole block, which `block_size_schedule` would cut. '
                "Drop one of the two."
            )

    def __getstate__(self) -> dict[str, Any]:
        # transformers pickles these options into `training_args.bin`, and pushes that.
        return {**self.__dict__, "hub_token": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> CLLMConfig:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
