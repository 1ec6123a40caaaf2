"""What decoding a few prompts says about a model in training: how fast it is, and how much of its quality is left."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .._host import base_model_of, count_embeddings, input_device
from ..blocks.forward import forward_clean
from ..blocks.rules import judge_greedy
from ..options import JACOBI, LOSSLESS
from ..trajectories.collector import Request, collect_trajectories
from ..trajectories.responding import find_stop_ids, split_batches, without_generation_defaults
from ..trajectories.statistics import measure_trajectories


logger = logging.get_logger(__name__)
NGRAM_LENGTH = 4
_SEED = 0  # of first drafts, so that two evaluations differ by the model alone


@dataclass(frozen=True)
class DecodingMeasures:
    """
    What was counted while some responses were decoded by Jacobi.

    These are sums only, so that those of several processes can be added before anything is divided.

    Attributes:
        num_responses (`int`): decoded responses.
        num_tokens (`int`): their tokens.
        num_forwards (`int`): forward passes that each response took part in, prefill included, summed.
        num_blocks (`int`): blocks of the decoded responses that have a trajectory of their own.
        num_fast_forwarded (`int`): fast-forwarded tokens of those blocks.
        num_stationary (`int`): stationary tokens of those blocks.
        num_compared (`int`): tokens of the target model's greedy responses.
        num_agreed (`int`): of those, the ones that the model says too, given the ones before.
        num_near_ties (`int`): of the others, the ones that it says but for rounding; see `blocks.rules`.
        num_ngrams (`int`): n-grams of 4 tokens in the decoded responses.
        num_repeated (`int`): of those, the ones that stood earlier in the same response.
        num_target_tokens (`int`): tokens of the dataset's responses, cut to as many as may be decoded.
        num_target_ngrams (`int`): n-grams of 4 tokens in those.
        num_target_repeated (`int`): of those, the ones that stood earlier in the same response.
    """

    num_responses: int = 0
    num_tokens: int = 0
    num_forwards: int = 0
    num_blocks: int = 0
    num_fast_forwarded: int = 0
    num_stationary: int = 0
    num_compared: int = 0
    num_agreed: int = 0
    num_near_ties: int = 0
    num_ngrams: int = 0
    num_repeated: int = 0
    num_target_tokens: int = 0
    num_target_ngrams: int = 0
    num_target_repeated: int = 0

    def __add__(self, other: object) -> DecodingMeasures:
        """
        Add the counts of other responses.

        Args:
            other (`DecodingMeasures`): of the same model.

        Returns:
            `DecodingMeasures`.
        """
        if not isinstance(other, DecodingMeasures):
            return NotImplemented
        return DecodingMeasures(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other))))

    def to_metrics(self, prefix: str = "eval") -> dict[str, float]:
        """
        Divide.

        Args:
            prefix (`str`): stands before each name, with an underscore.

        Returns:
            `dict[str, float]`: `tokens_per_forward`, `fast_forwarded` and `stationary` (tokens a block), `agreement`,
            `near_ties`, `repetition` and `target_repetition` (shares from 0 to 1), `response_tokens` and
            `target_response_tokens` (tokens a response). What nothing was counted for is left out.
        """
        fractions = {
            "tokens_per_forward": (self.num_tokens, self.num_forwards),
            "fast_forwarded": (self.num_fast_forwarded, self.num_blocks),
            "stationary": (self.num_stationary, self.num_blocks),
            "agreement": (self.num_agreed, self.num_compared),
            "near_ties": (self.num_near_ties, self.num_compared),
            "repetition": (self.num_repeated, self.num_ngrams),
            "target_repetition": (self.num_target_repeated, self.num_target_ngrams),
            "response_tokens": (self.num_tokens, self.num_responses),
            "target_response_tokens": (self.num_target_tokens, self.num_responses if self.num_target_tokens else 0),
        }
        return {f"{prefix}_{name}": part / whole for name, (part, whole) in fractions.items() if whole}


def measure_decoding(
    model: Any,
    records: Sequence[Mapping[str, Any]],
    block_size: int,
    pad_id: int = 0,
    stop_ids: Collection[int] = (),
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    decoding: str = JACOBI,
) -> DecodingMeasures:
    """
    Decode the prompts of some records by Jacobi, and compare with the target model's responses; or with a lossless
    adapter, whose text is the target model's own, so that there is nothing to compare.

    The model's text is the plain argmax, without the processors of its generation config. The same weights give the
    same counts, whatever was drawn at random before, and nothing is drawn from the global generators. The model and
    its modes are left as they were.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the model, with all its weights on this process.
        records (`Sequence[Mapping]`): trajectory records of the target model.
        block_size (`int`): tokens of a block.
        pad_id (`int`): for padding.
        stop_ids (`Collection[int]`): tokens that end a response.
        max_new_tokens (`int`, *optional*): longest response to decode; by default the longest of the records.
        batch_size (`int`): prompts that are decoded together. Random tokens of first drafts are drawn for a batch as a
            whole, so that `num_forwards` changes a little with it, and nothing else does.
        decoding (`str`): `"jacobi"` or `"lossless"`.

    Returns:
        `DecodingMeasures`: all zero without records.
    """
    if not records:
        return DecodingMeasures()
    model = base_model_of(model)  # with the layers of an adapter in it
    limit = max_new_tokens or max(len(record["response_ids"]) for record in records)
    measures = DecodingMeasures()
    with torch.no_grad(), _evaluation_mode(model):
        for batch in split_batches(records, batch_size):
            measures += _measure_batch(model, batch, block_size, pad_id, list(stop_ids), limit, decoding)
    return measures


def count_repeated(token_ids: Sequence[int], length: int = NGRAM_LENGTH) -> tuple[int, int]:
    """
    Count the n-grams that stood earlier in the same text.

    Args:
        token_ids (`Sequence[int]`): tokens of the text.
        length (`int`): tokens of an n-gram.

    Returns:
        `tuple[int, int]`: how many did, and how many n-grams there are. 0 of 0 for a text that is too short.
    """
    ngrams = list(zip(*(token_ids[start:] for start in range(length))))
    return len(ngrams) - len(set(ngrams)), len(ngrams)


def decoding_metrics(trainer: Any, dataloader: DataLoader, prefix: str) -> dict[str, float]:
    """
    Measure decoding in an evaluation of `CLLMTrainer`; every process calls it and gets the metrics of all.

    Args:
        trainer (`CLLMTrainer`): its model is decoded with.
        dataloader (`torch.utils.data.DataLoader`): of the evaluation; its first records are taken.
        prefix (`str`): of the names.

    Returns:
        `dict[str, float]`: see `DecodingMeasures.to_metrics`. Empty with `num_monitored_prompts=0`, and for a model
        whose weights are spread over processes.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if not args.num_monitored_prompts:
        return {}
    if _is_spread(trainer):
        # Processes with different texts would wait for each other's forward passes for ever.
        logger.warning_once(
            "Prompts are not decoded in evaluation: the weights of the model are spread over processes (FSDP, "
            "DeepSpeed ZeRO-3 or tensor parallelism). Measure the saved model with `cllm benchmark decode`, or set "
            "`num_monitored_prompts=0`."
        )
        return {}
    records = _first_records(dataloader, args.num_monitored_prompts)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    # The same for every process, so that the measures do not depend on their number.
    limit = args.monitored_max_new_tokens or max((len(record["response_ids"]) for record in records), default=0)
    model = base_model_of(trainer.model)
    stop_ids, pad_id = find_stop_ids(model, tokenizer), tokenizer.pad_token_id
    if pad_id is None or pad_id >= count_embeddings(model):  # added without resizing the model
        pad_id = (stop_ids or [0])[0]
    share = records[accelerator.process_index :: accelerator.num_processes]
    decoding = LOSSLESS if args.lossless else JACOBI
    with accelerator.autocast():
        measures = measure_decoding(
            model, share, trainer.block_size, pad_id, stop_ids, limit, args.per_device_eval_batch_size, decoding
        )
    if accelerator.num_processes > 1:
        counts = torch.tensor(astuple(measures), device=accelerator.device)
        measures = DecodingMeasures(*accelerator.reduce(counts, reduction="sum").tolist())
    return measures.to_metrics(prefix)


def _measure_batch(
    model: PreTrainedModel,
    records: list[Mapping[str, Any]],
    block_size: int,
    pad_id: int,
    stop_ids: list[int],
    limit: int,
    decoding: str,
) -> DecodingMeasures:
    prompts = [list(map(int, record["prompt_ids"])) for record in records]
    targets = [list(map(int, record["response_ids"])) for record in records]
    responses, num_forwards = _decode(model, prompts, block_size, pad_id, stop_ids, limit, decoding)
    if decoding == LOSSLESS:
        return DecodingMeasures(
            num_responses=len(responses), num_tokens=sum(map(len, responses)), num_forwards=num_forwards
        )
    requests = [Request(prompt, response, (_SEED, 0)) for prompt, response in zip(prompts, responses)]
    # Blocks in which a response is not what one forward pass over all of it says, near ties apart, are not counted.
    trajectories = collect_trajectories(model, requests, block_size, pad_id, stop_ids, keep_not_greedy=True)
    statistics = measure_trajectories(
        [
            {
                "prompt_ids": prompt,
                "response_ids": trajectory.response_ids,
                "states": trajectory.states,
                "is_greedy": trajectory.is_greedy,
            }
            for prompt, trajectory in zip(prompts, trajectories)
        ],
        block_size,
    )
    greedy = [row for row, record in enumerate(records) if record.get("is_greedy") in (None, True)]
    num_repeated, num_ngrams = _add_up(map(count_repeated, responses))
    cut = [target[:limit] for target in targets]
    num_target_repeated, num_target_ngrams = _add_up(map(count_repeated, cut))
    num_agreed, num_near_ties = _add_up(_compare_with(model, prompts[row], targets[row]) for row in greedy)
    return DecodingMeasures(
        num_responses=len(responses),
        num_tokens=sum(map(len, responses)),
        num_forwards=num_forwards,
        num_blocks=statistics.num_blocks,
        num_fast_forwarded=_total(statistics.fast_forwarded),
        num_stationary=_total(statistics.stationary),
        num_compared=sum(len(targets[row]) for row in greedy),
        num_agreed=num_agreed,
        num_near_ties=num_near_ties,
        num_ngrams=num_ngrams,
        num_repeated=num_repeated,
        num_target_tokens=sum(map(len, cut)),
        num_target_ngrams=num_target_ngrams,
        num_target_repeated=num_target_repeated,
    )


def _decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    block_size: int,
    pad_id: int,
    stop_ids: list[int],
    limit: int,
    decoding: str,
) -> tuple[list[list[int]], int]:
    """The responses to a batch of prompts, and the forward passes that they took part in."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Drafts of a batch get shorter when its foremost row comes near the limit. With room after the limit each row
    # takes as many forward passes as it would alone.
    last: Any = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = block_size if last is None else max(min(block_size, last - longest - limit), 0)
    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit + room,
        eos_token_id=stop_ids or None,
        pad_token_id=pad_id,
        return_dict_in_generate=True,
    )
    device = input_device(model)
    generate: Any = model.generate
    with without_generation_defaults(model):
        output = generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=options,
            decoding=decoding,
            jacobi_block_size=block_size,
        )
    responses, num_forwards = [], 0
    for row, committed in zip(output.sequences[:, longest:].tolist(), output.jacobi_stats.num_committed):
        ends = list(itertools.accumulate(committed))
        num_forwards += sum(end - count < limit for end, count in zip(ends, committed))
        responses.append(row[: min(ends[-1], limit)])
    return responses, num_forwards


def _compare_with(model: PreTrainedModel, prompt: list[int], response: list[int]) -> tuple[int, int]:
    """How many tokens of a response the model would write too, given those before; and how many but for rounding."""
    ids = torch.tensor([prompt + response], device=input_device(model))
    logits, _ = forward_clean(model, ids, torch.ones_like(ids), len(response) + 1)
    written = torch.tensor([response], device=logits.device)
    best, near_ties = judge_greedy(logits[:, :-1], written, model.dtype)
    return int((best == written).sum()), int(near_ties.sum())


def _first_records(dataloader: DataLoader, count: int) -> list[Mapping[str, Any]]:
    """The first records of an evaluation, which are the same for every process."""
    dataset: Any = dataloader.dataset
    if isinstance(dataset, Dataset):
        return [dataset[number] for number in range(min(count, len(dataset)))]
    # accelerate hands each process its shard of a stream by a dataset around it.
    return list(itertools.islice(getattr(dataset, "dataset", dataset), count))


def _is_spread(trainer: Any) -> bool:
    is_tensor_parallel = (getattr(trainer.model, "tp_size", None) or 1) > 1
    # The host may also spread a model as it loads it; such parameters can be put together again.
    has_parts = any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    return trainer.is_fsdp_enabled or is_tensor_parallel or has_parts or is_deepspeed_zero3_enabled()


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:  # some parts of a model may have been in another mode than others
            module.training = was_training


def _add_up(pairs: Iterator[tuple[int, int]]) -> tuple[int, int]:
    first, second = zip(*pairs, (0, 0))  # there may be none
    return sum(first), sum(second)


def _total(counter: Mapping[int, int]) -> int:
    return sum(value * number for value, number in counter.items())
