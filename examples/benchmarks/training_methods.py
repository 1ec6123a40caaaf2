"""The ways to train that `examples/benchmark.py train` compares, and random trajectories for models without a text."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import send_to_device
from datasets import Dataset

from cllm_hf.training.config import CLLMConfig
from cllm_hf.training.trainer import CLLMTrainer

from .published_training import block_length, draw_example, published_step, states_before, trainable_blocks


PUBLISHED, TRAINER = "published procedure", "CLLMTrainer"
PUBLISHED_WITH_GRAPH = f"{PUBLISHED}, target graph kept"
PUBLISHED_ACCUMULATED = f"{PUBLISHED}, accumulated"
# So small that the model stays what it is; what an optimizer step costs does not depend on it.
LEARNING_RATE = 1e-6
# States of a block of random trajectories, before the fixed point.
_NUM_RANDOM_STATES = 4
Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingSetting:
    """
    What is trained.

    Attributes:
        batch_size (`int`): records of an optimizer step of `CLLMTrainer`.
        steps (`int`): its optimizer steps in a round; all methods train on these `batch_size * steps` records.
        rounds (`int`): turns of each method, after a first optimizer step that is left out.
        states_per_block (`int`): states that each block of a record gives an optimizer step of `CLLMTrainer`.
        gradient_checkpointing (`bool`): whether activations are computed anew in the backward, in all methods.
        seed (`int`): of the states that are drawn.
    """

    batch_size: int = 8
    steps: int = 4
    rounds: int = 3
    states_per_block: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass
class TrainingMethod:
    """
    A way to train on some records.

    Attributes:
        name (`str`): how tables call it.
        updates (`list[list[dict]]`): the records of each optimizer step of a round.
        update (`Callable[[list[dict]], tuple[int, int]]`): makes one, from records to weights, which is what is
            clocked; gives the draft tokens that it trained, and the positions with a consistency loss or 0.
        update_largest (`Callable[[], object]`): makes one with the most memory that it can take, on the longest
            records: all blocks of one for the published procedure, as many records as an optimizer step has for the
            trainer.
        count_loss_positions (`Callable[[], int]`, *optional*): positions with a consistency loss since its last
            call, where `update` cannot tell.
    """

    name: str
    updates: list[list[Record]]
    update: Callable[[list[Record]], tuple[int, int]]
    update_largest: Callable[[], object]
    count_loss_positions: Callable[[], int] | None = None


def make_trainer(
    model: Any, processing_class: Any, dataset: Dataset, setting: TrainingSetting, output_dir: str
) -> CLLMTrainer:
    """
    The trainer whose step is measured.

    Args:
        model (`transformers.PreTrainedModel`): the model.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        dataset (`datasets.Dataset`): the records.
        setting (`TrainingSetting`): what is trained.
        output_dir (`str`): an empty folder; nothing is left there.

    Returns:
        `cllm_hf.CLLMTrainer`, with an optimizer.

    Raises:
        ValueError: if `CLLMConfig` has no `states_per_block` and more than one state is asked for, or for what
            `CLLMTrainer` refuses.
    """
    options: dict[str, Any] = {}
    if setting.states_per_block != 1:
        if "states_per_block" not in {field.name for field in dataclasses.fields(CLLMConfig)}:
            raise ValueError(
                f"`CLLMConfig` has no option `states_per_block`, got {setting.states_per_block}. Leave it at 1."
            )
        options["states_per_block"] = setting.states_per_block
    args = CLLMConfig(
        output_dir=output_dir,
        per_device_train_batch_size=setting.batch_size,
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=setting.gradient_checkpointing,
        bf16=False,  # in the dtype of the weights, as the published step
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        report_to=[],
        **options,
    )
    trainer = CLLMTrainer(model, args=args, train_dataset=dataset, processing_class=processing_class)
    trainer.create_optimizer()
    return trainer


def make_methods(trainer: CLLMTrainer, records: Sequence[Record], setting: TrainingSetting) -> list[TrainingMethod]:
    """
    List what to compare, on one model with one optimizer.

    Args:
        trainer (`cllm_hf.CLLMTrainer`): result of `make_trainer`.
        records (`Sequence[dict]`): `setting.batch_size * setting.steps` trajectory records.
        setting (`TrainingSetting`): what is trained.

    Returns:
        `list[TrainingMethod]`: the published procedure, an optimizer step a block; the same with the graph of the
            targets; the
        same accumulated over all blocks of a record; `CLLMTrainer` with one record and with a batch an optimizer step.
    """
    one_by_one = [[record] for record in records]
    few = one_by_one[:: setting.batch_size]  # all their blocks one by one take as long as it does
    starts = range(0, len(records), setting.batch_size)
    batches = [list(records[start : start + setting.batch_size]) for start in starts]
    longest = sorted(records, key=lambda record: len(record["prompt_ids"]) + len(record["response_ids"]), reverse=True)

    def published(
        name: str, updates: list[list[Record]], all_blocks: bool = False, with_graph: bool = False
    ) -> TrainingMethod:
        return TrainingMethod(
            name,
            updates,
            functools.partial(_update_as_published, trainer, all_blocks=all_blocks, keeps_target_graph=with_graph),
            lambda: _update_as_published(trainer, longest[:1], all_blocks=True, keeps_target_graph=with_graph),
        )

    def trainers(updates: list[list[Record]]) -> TrainingMethod:
        update = functools.partial(_update_by_trainer, trainer, setting.states_per_block)
        return TrainingMethod(
            TRAINER,
            updates,
            update,
            lambda: update(longest[: len(updates[0])]),
            lambda: _count_loss_positions(trainer),
        )

    return [
        published(PUBLISHED, one_by_one),
        published(PUBLISHED_WITH_GRAPH, one_by_one, with_graph=True),
        published(PUBLISHED_ACCUMULATED, few, all_blocks=True),
        trainers(one_by_one),
        *([trainers(batches)] if setting.batch_size > 1 else []),
    ]


def _update_as_published(
    trainer: CLLMTrainer, records: list[Record], all_blocks: bool = False, keeps_target_graph: bool = False
) -> tuple[int, int]:
    num_tokens = num_positions = 0
    for record in records:
        blocks: Sequence[int | None] = trainable_blocks(record) if all_blocks else [None]
        for block in blocks:
            example = draw_example(record, block)
            weight, scale = trainer.args.ar_loss_weight, 1 / (len(records) * len(blocks))
            published_step(trainer.model, example, weight, scale, keeps_target_graph)
            num_tokens += len(example.state)
            num_positions += example.num_loss_positions
    _step(trainer)
    return num_tokens, num_positions


def _update_by_trainer(trainer: CLLMTrainer, states_per_block: int, records: list[Record]) -> tuple[int, int]:
    batch = send_to_device(trainer.data_collator(records), trainer.model.device)
    trainer.compute_loss(trainer.model, batch).backward()
    _step(trainer)
    return sum(num_draft_tokens(record, states_per_block) for record in records), 0


def _step(trainer: CLLMTrainer) -> None:
    optimizer: Any = trainer.optimizer
    optimizer.step()
    optimizer.zero_grad()


def _count_loss_positions(trainer: CLLMTrainer) -> int:
    trainer.log({})
    return round(trainer.state.log_history[-1]["consistency_tokens"])


def num_draft_tokens(record: Mapping[str, Any], states_per_block: int = 1) -> int:
    """
    Count the draft tokens of all blocks of a record that have something to learn.

    Padding after the end of the response does not count, nor do blocks whose first draft was the fixed point, nor
    more states than a block has.

    Args:
        record (`Mapping[str, Any]`): a trajectory record.
        states_per_block (`int`): states that each block gives.

    Returns:
        `int`.
    """
    return sum(
        block_length(record, block) * min(states_per_block, len(states_before(record, block)))
        for block in trainable_blocks(record)
    )


def random_trajectories(
    vocab_size: int, count: int, prompt_length: int, response_length: int, block_size: int, seed: int
) -> list[Record]:
    """
    Make trajectory records of random tokens, with every token of a state wrong but by chance.

    Args:
        vocab_size (`int`): number of tokens to draw from.
        count (`int`): number of records.
        prompt_length (`int`): tokens of the longest prompt; the shortest has half as many.
        response_length (`int`): tokens of the longest response; the shortest has half as many.
        block_size (`int`): tokens of a block.
        seed (`int`): of the draw.

    Returns:
        `list[dict]`: records with 5 states a block.
    """
    source = random.Random(seed)

    def draw(length: int) -> list[int]:
        return source.choices(range(vocab_size), k=length)

    records = []
    for number in range(count):
        prompt = draw(source.randint(-(-prompt_length // 2), prompt_length))
        response = draw(source.randint(-(-response_length // 2), response_length))
        states = []
        for start in range(0, len(response), block_size):
            fixed_point = response[start : start + block_size]
            padding = [0] * (block_size - len(fixed_point))
            drafts = [draw(len(fixed_point)) for _ in range(_NUM_RANDOM_STATES)]
            states.append([state + padding for state in (*drafts, fixed_point)])
        names = dict(zip(("prompt", "response"), (" ".join(map(str, ids)) for ids in (prompt, response))))
        ids = {"prompt_ids": prompt, "response_ids": response}
        records.append({"data_id": str(number), **names, **ids, "states": states, "is_greedy": False})
    return records


def usable_records(dataset: Dataset, count: int) -> list[Record]:
    """
    Take the first records that have a state before the fixed point, as the published procedure needs.

    Args:
        dataset (`datasets.Dataset`): trajectories.
        count (`int`): how many.

    Returns:
        `list[dict]`.

    Raises:
        ValueError: if there are fewer.
    """
    records = list(itertools.islice((record for record in dataset if trainable_blocks(record)), count))
    if len(records) < count:
        raise ValueError(
            f"`batch_size` times `steps` takes {count} records with a state before the fixed point, got "
            f"{len(records)}. Lower one of the two, or build a larger dataset."
        )
    return records
