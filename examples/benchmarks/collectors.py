"""The ways to collect trajectories that `examples/benchmark.py collect` compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from cllm_hf._host import base_model_of
from cllm_hf.trajectories.builder import TrajectoryBuilder
from cllm_hf.trajectories.collector import draw_first_states
from cllm_hf.trajectories.options import DEFAULT_TOKENS_PER_BATCH, CleaningRules
from cllm_hf.trajectories.responding import find_stop_ids
from cllm_hf.trajectories.shard import count_dropped

from .published import collect_one_by_one


PUBLISHED, BUILDER = "published procedure", "TrajectoryBuilder"
Trajectories = dict[int, tuple[list[int], list[list[list[int]]]]]


@dataclass(frozen=True)
class CollectionSetting:
    """
    What is collected.

    Attributes:
        block_size (`int`): tokens of a block.
        max_new_tokens (`int`): longest response.
        seed (`int`): of the first drafts.
        max_tokens_per_batch (`int`): for the builder.
    """

    block_size: int = 16
    max_new_tokens: int = 128
    seed: int = 0
    max_tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH


@dataclass
class CollectionMethod:
    """
    A way to collect the trajectories of some prompts.

    Attributes:
        name (`str`): how tables call it.
        num_prompts (`int`): the first so many of the prompts.
        collect (`Callable[[CollectionSetting], Any]`): does it; this is what is clocked.
        read (`Callable[[Any], tuple[dict, dict]]`): finds in what `collect` gave the response and states for the
            number of each prompt whose trajectory was recorded, and the counts of the others by reason.
    """

    name: str
    num_prompts: int
    collect: Callable[[CollectionSetting], Any]
    read: Callable[[Any], tuple[Trajectories, dict[str, int]]]


def published_method(model: Any, processing_class: Any, prompt_ids: list[list[int]]) -> CollectionMethod:
    """
    The published procedure, from the first drafts that the builder has.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the target model, in evaluation mode.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        prompt_ids (`list[list[int]]`): token ids of each prompt.

    Returns:
        `CollectionMethod`.
    """
    base_model = base_model_of(model)
    stop_ids = find_stop_ids(base_model, processing_class)
    pad_id = processing_class.pad_token_id
    if pad_id is None:
        pad_id = stop_ids[0] if stop_ids else 0

    def collect(setting: CollectionSetting) -> Trajectories:
        trajectories = {}
        for index, ids in enumerate(prompt_ids):
            # The drafts for the longest response begin with those for the response that comes.
            seed = (setting.seed, index)
            drafts = draw_first_states(ids, setting.max_new_tokens, setting.block_size, pad_id, seed)
            trajectories[index] = collect_one_by_one(base_model, ids, drafts, setting.max_new_tokens, stop_ids, pad_id)
        return trajectories

    return CollectionMethod(PUBLISHED, len(prompt_ids), collect, lambda trajectories: (trajectories, {}))


def builder_method(model: Any, processing_class: Any, prompts: Sequence[str]) -> CollectionMethod:
    """
    `cllm_hf.TrajectoryBuilder`, from prompts to a dataset in memory.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the target model.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str]`): texts.

    Returns:
        `CollectionMethod`.
    """

    def collect(setting: CollectionSetting) -> tuple[Dataset, Counter[str]]:
        builder = _make_builder(model, processing_class, setting)
        return builder.build(list(prompts)), builder.counts

    def read(collected: tuple[Dataset, Counter[str]]) -> tuple[Trajectories, dict[str, int]]:
        dataset, counts = collected
        trajectories = {int(row["data_id"]): (row["response_ids"], row["states"]) for row in dataset}
        return trajectories, count_dropped(counts)

    return CollectionMethod(BUILDER, len(prompts), collect, read)


def _make_builder(model: Any, processing_class: Any, setting: CollectionSetting) -> TrajectoryBuilder:
    """A builder that leaves out nothing but what went wrong, since the published procedure leaves out nothing."""
    return TrajectoryBuilder(
        model,
        processing_class,
        block_size=setting.block_size,
        max_new_tokens=setting.max_new_tokens,
        seed=setting.seed,
        max_tokens_per_batch=setting.max_tokens_per_batch,
        cleaning=CleaningRules(max_token_run=None, max_sentence_repeats=None, drop_empty=False),
        drop_duplicates=False,
        show_progress=False,
    )
