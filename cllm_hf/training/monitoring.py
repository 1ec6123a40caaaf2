"""What decoding a few prompts says about a model in training: how fast it is, and how much of its quality is left."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
# Each is a part of a whole, and those of several batches and processes are added before anything is divided.
METRICS = (
    "tokens_per_forward",  # tokens of the responses / forward passes that each took part in, prefill included
    "fast_forwarded",  # fast-forwarded tokens / blocks that have a trajectory of their own
    "stationary",  # stationary tokens / the same blocks
    "agreement",  # tokens that the model says too, given those before / tokens of the target's greedy responses
    "near_ties",  # further tokens that it says but for rounding (see `blocks.rules`) / the same tokens
    "repetition",  # n-grams that stood earlier in the same response / n-grams of the responses
    "target_repetition",  # the same of the dataset's responses, cut to as many tokens as may be decoded
    "response_tokens",  # tokens of the responses / responses
    "target_response_tokens",  # tokens of the dataset's responses, cut so / the same
)
LOSSLESS_METRICS = ("tokens_per_forward", "response_tokens")  # the others compare with the target's text, which it is


def measure_decoding(
    model: Any,
    records: Sequence[Mapping[str, Any]],
    block_size: int,
    pad_id: int = 0,
    stop_ids: Collection[int] = (),
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    decoding: str = JACOBI,
) -> torch.Tensor:
    """
    Decode the prompts of some records by Jacobi, and compare with the target model's responses; or with a lossless
    adapter, whose text is the target model's own, so that there is nothing to compare.

    The model's text is the plain argmax, without the processors of its generation config, and no longer than
    `max_new_tokens`, by default the longest response of the records. The same weights give the same counts, whatever
    was drawn at random before, and nothing is drawn from the global generators; but random tokens of first drafts are
    drawn for a batch as a whole, so that the number of forward passes changes a little with `batch_size`. The model
    and its modes are left as they were.

    Returns:
        `torch.LongTensor` of shape `(len(METRICS), 2)`: parts and wholes.
    """
    measures = torch.zeros(len(METRICS), 2, dtype=torch.long)
    if not records:
        return measures
    model = base_model_of(model)  # with the layers of an adapter in it
    limit = max_new_tokens or max(len(record["response_ids"]) for record in records)
    with torch.no_grad(), _evaluation_mode(model):
        for batch in split_batches(records, batch_size):
            found = _measure_batch(model, batch, block_size, pad_id, list(stop_ids), limit, decoding)
            measures += torch.tensor([found.get(name, (0, 0)) for name in METRICS])
    return measures


def to_metrics(measures: torch.Tensor, prefix: str = "eval") -> dict[str, float]:
    """Divide; what nothing was counted for is left out."""
    return {f"{prefix}_{name}": part / whole for name, (part, whole) in zip(METRICS, measures.tolist()) if whole}


def count_repeated(token_ids: Sequence[int], length: int = NGRAM_LENGTH) -> tuple[int, int]:
    """How many n-grams stood earlier in the same text, and how many n-grams there are."""
    ngrams = list(zip(*(token_ids[start:] for start in range(length))))
    return len(ngrams) - len(set(ngrams)), len(ngrams)


def decoding_metrics(trainer: Any, dataloader: DataLoader, prefix: str) -> dict[str, float]:
    """
    Decode the first prompts of an evaluation of `CLLMTrainer`; every process calls this and gets the metrics of all.
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
        measures = accelerator.reduce(measures.to(accelerator.device), reduction="sum")
    return to_metrics(measures, prefix)


def _measure_batch(
    model: PreTrainedModel,
    records: list[Mapping[str, Any]],
    block_size: int,
    pad_id: int,
    stop_ids: list[int],
    limit: int,
    decoding: str,
) -> dict[str, tuple[int, int]]:
    prompts = [list(map(int, record["prompt_ids"])) for record in records]
    targets = [list(map(int, record["response_ids"])) for record in records]
    responses, num_forwards = _decode(model, prompts, block_size, pad_id, stop_ids, limit, decoding)
    num_tokens = sum(map(len, responses))
    speed = {"tokens_per_forward": (num_tokens, num_forwards), "response_tokens": (num_tokens, len(responses))}
    if decoding == LOSSLESS:
        return speed
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
    num_compared = sum(len(targets[row]) for row in greedy)
    num_agreed, num_near_ties = _add_up(_compare_with(model, prompts[row], targets[row]) for row in greedy)
    cut = [target[:limit] for target in targets]
    return {
        **speed,
        "fast_forwarded": (_total(statistics.fast_forwarded), statistics.num_blocks),
        "stationary": (_total(statistics.stationary), statistics.num_blocks),
        "agreement": (num_agreed, num_compared),
        "near_ties": (num_near_ties, num_compared),
        "repetition": _add_up(map(count_repeated, responses)),
        "target_repetition": _add_up(map(count_repeated, cut)),
        "target_response_tokens": (sum(map(len, cut)), len(responses)),
    }


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
            jacobi_compile=False,  # the weights change, and only a few texts are decoded
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
    # transformers may also spread a model as it loads it; such parameters can be put together again.
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
