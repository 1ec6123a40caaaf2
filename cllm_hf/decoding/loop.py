"""
The decoding loop, a `custom_generate` callable of `GenerationMixin.generate`.

transformers prepares everything (ids, masks, cache, processors, stopping criteria) and calls `decode`, which then
repeats: a strategy proposes tokens after the anchor, the model is run over them, the verifier accepts what the model
confirms plus a bonus token, the cache forgets the rest. The prefill is the first iteration: its anchor is the last
prompt token. Nothing here knows where a proposal comes from, or that most are chains.

Sources: Jacobi decoding (arXiv 2305.10427), CLLM (arXiv 2403.00835).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ..options import JacobiOptions
from .block_size import Pace, make_pace
from .feeding import Feed
from .output import JacobiOutput, JacobiStats
from .registry import make_strategy
from .rows import Row
from .sampling import GumbelNoise
from .stepwise import StepwiseVerifier, depends_on_call_order
from .strategy import Proposal, Room, Strategy, check_proposals, is_drafting, level
from .verify import Verifier, takes_all_at_once


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    options: JacobiOptions,
    strategy_name: str = "jacobi",
    context_ids: torch.Tensor | None = None,
    streamer: BaseStreamer | None = None,
    num_given: int | None = None,
    is_user_cache: bool = False,
    **model_kwargs: Any,
) -> JacobiOutput | torch.Tensor:
    """Decode several tokens a forward pass, and return exactly the tokens of decoding one at a time."""
    batch_size, prompt_length = input_ids.shape
    strategy = make_strategy(strategy_name, options, model)
    largest = strategy.largest_block_size if is_drafting(strategy) else None
    pace = make_pace(model, options.block_size, (strategy_name, options.candidates), largest)
    max_length = length_limit(stopping_criteria, prompt_length)
    feed = Feed(
        model,
        input_ids,
        model_kwargs,
        max_block_size=pace.max_block_size,
        num_new_tokens=max_length - prompt_length,
        needs_tree=strategy.needs_tree,
        keeps_branches=strategy.keeps_branches if is_drafting(strategy) else strategy.needs_tree,
        drafts_in_prefill=is_drafting(strategy),
        num_drafting=strategy.count_drafting(pace.max_block_size) if is_drafting(strategy) else 0,
        compile_options=generation_config if options.compile else None,
        context_ids=context_ids,
        num_given=num_given,
        is_user_cache=is_user_cache,
    )
    verifier = make_verifier(
        input_ids,
        logits_processor,
        stopping_criteria,
        pad_id=generation_config.pad_token_id,
        max_length=max_length,
        streamer=streamer,
        same_length=feed.same_length,
        has_fixed_shape=feed.memory.fixed_shape,
        noise=_noise(generation_config, batch_size, options.seed),
    )
    all_rows, num_forwards = list(feed.rows), 0
    try:
        with strategy.running() if is_drafting(strategy) else nullcontext():
            while feed.rows:
                _iterate(feed, strategy, verifier, pace)
                num_forwards += 1
        feed.memory.close()
        if streamer is not None:
            streamer.end()
        sequences = lay_out_sequences(input_ids, all_rows, verifier.pad_id)
        if not generation_config.return_dict_in_generate:
            return sequences
        # A recurrent state may lag behind the text, and the cache of a batch has lost the rows that finished.
        cache = feed.memory.cache if batch_size == 1 and not feed.memory.replays else None
        stats = JacobiStats(num_forwards, [row.gains for row in all_rows])
        return JacobiOutput(sequences=cast(torch.LongTensor, sequences), past_key_values=cache, jacobi_stats=stats)
    except BaseException:  # Ctrl-C too
        feed.memory.abandon()
        raise


def _iterate(feed: Feed, strategy: Strategy, verifier: Verifier, pace: Pace) -> None:
    """One forward pass, and what came of it."""
    rows = feed.rows
    # No row may look beyond the last position, so the foremost row sets how far a draft reaches.
    limit = verifier.max_length - max(row.length for row in rows)
    if feed.memory.fixed_shape:
        limit = pace.max_block_size
    room = feed.room(pace.block_size(len(rows), limit))
    proposals = _propose(strategy, rows, room, verifier, must_fill=feed.memory.fixed_shape)
    num_drafting = strategy.begin(proposals) if is_drafting(strategy) else 0
    logits = feed.forward(proposals)
    num_verified = logits.shape[1] - num_drafting
    verdicts = verifier.verify(rows, proposals, logits[:, :num_verified])
    for row, verdict in zip(rows, verdicts):
        row.commit(verdict)
    if is_drafting(strategy):
        strategy.draft(rows, verdicts, logits[:, num_verified:], verifier.guess)
    del logits  # large in the prefill
    feed.advance(verdicts, verifier.finished(rows))
    pace.record(room.depth + 1, [len(verdict.token_ids) for verdict in verdicts])
    left = {row.index for row in feed.rows}
    for row, verdict in zip(rows, verdicts):
        if row.index in left and not verifier.takes_padding(row):
            strategy.observe(row, verdict.path, verdict.predictions)


def _propose(strategy: Strategy, rows: list[Row], room: Room, verifier: Verifier, must_fill: bool) -> list[Proposal]:
    if room.depth == 0:
        return [Proposal(row.pending.ids[-1:] or [0]) for row in rows]  # a prompt of embeddings has no ids
    going = [row for row in rows if not verifier.takes_padding(row)]
    proposals = strategy.propose(going, room)
    check_proposals(proposals, [row.anchor for row in going], room, strategy)
    if len(going) < len(rows):
        # Rows that have ended get what they will take, so as not to hold back the others.
        longest = max(proposals, key=lambda proposal: max(proposal.depths()))
        shape = longest if is_drafting(strategy) else Proposal([0] * (1 + max(longest.depths())))
        padding = [verifier.pad_id] * (len(shape.token_ids) - 1)
        by_index = {row.index: proposal for row, proposal in zip(going, proposals)}
        proposals = [by_index.get(row.index) or replace(shape, token_ids=[row.anchor, *padding]) for row in rows]
    return level(proposals, room.depth + 1 if must_fill else 0)


def make_verifier(
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    *,
    pad_id: int | None,
    max_length: int,
    streamer: BaseStreamer | None,
    same_length: bool,
    has_fixed_shape: bool,
    noise: GumbelNoise | None,
) -> Verifier:
    """Choose how forward passes are verified: all places at once, or one position after the other."""
    batch_size, stop_ids = len(input_ids), find_stop_ids(stopping_criteria)
    has_other_rules = {type(criterion) for criterion in stopping_criteria} != {MaxLengthCriteria}
    # Rows that have ended stay in the batch, as in transformers, where a processor or criterion may notice, and where
    # they go on in the end: without a stop token transformers does not pad them.
    leave_together = batch_size > 1 and (
        has_fixed_shape
        or (not stop_ids and has_other_rules)
        or depends_on_call_order(logits_processor, stopping_criteria)
    )
    options: dict[str, Any] = {
        "max_length": max_length,
        "stop_ids": stop_ids,
        "pad_id": (stop_ids or [0])[0] if pad_id is None else pad_id,
        "logits_processor": logits_processor,
        "streamer": streamer,
        "same_length": batch_size > 1 and (same_length or streamer is not None),
        "leave_together": leave_together,
        "noise": noise,
    }
    if takes_all_at_once(logits_processor, stopping_criteria, streamer, batch_size):
        return Verifier(**options)
    return StepwiseVerifier(input_ids, stopping_criteria, **options)


def lay_out_sequences(input_ids: torch.Tensor, rows: list[Row], pad_id: int) -> torch.Tensor:
    """Lay out prompts and committed tokens as transformers does."""
    prompt_length = input_ids.shape[1]
    sequences = input_ids.new_full((len(rows), max(row.length for row in rows)), pad_id)
    sequences[:, :prompt_length] = input_ids
    for number, row in enumerate(rows):
        num_committed = row.length - prompt_length
        committed = row.text[len(row.text) - num_committed :]
        sequences[number, prompt_length : row.length] = torch.tensor(committed, dtype=sequences.dtype)
    return sequences


def length_limit(stopping_criteria: StoppingCriteriaList, prompt_length: int) -> int:
    """Length at which every row ends."""
    limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
    return max(math.ceil(min(limits)), prompt_length + 1)  # the limit may be no integer


def find_stop_ids(stopping_criteria: StoppingCriteriaList) -> list[int]:
    """Stop tokens of all criteria: empty if there are none."""
    criteria = [criterion for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    return [token for criterion in criteria for token in criterion.eos_token_id.flatten().tolist()]


def _noise(generation_config: GenerationConfig, batch_size: int, seed: int | None) -> GumbelNoise | None:
    if not generation_config.do_sample:
        return None
    return GumbelNoise(int(torch.randint(2**62, ())) if seed is None else seed, batch_size)
