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
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .._host import CACHE_NAME
from ..options import AUTO, DEFAULT_BLOCK_SIZE, JacobiOptions
from .block_size import Pace, make_pace
from .compiled import Compiling
from .feeding import Feed
from .outputs import JacobiOutput, JacobiStats, TokenScores, lay_out_sequences
from .reading import Reader, make_reader
from .sampling import GumbelNoise
from .strategy import Proposal, Room, Row, Strategy, check_proposals, is_drafting, is_reading, level, make_strategy
from .verify import Verifier, make_verifier


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,  # [batch_size, prompt_length], padded on the left; of length 0 with `inputs_embeds`
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    options: JacobiOptions,
    strategy_name: str,
    streamer: BaseStreamer | None,
    encoder_ids: torch.Tensor | None,  # [num_prompts, length]: what an encoder has read, to draw first drafts from
    num_given: int | None,  # length of the attention mask that the user passed, cached tokens included
    is_user_cache: bool,  # whether `past_key_values` comes from the user
    **model_kwargs: Any,
) -> JacobiOutput | torch.Tensor:
    """
    Decode several tokens a forward pass, and return exactly the tokens of decoding one at a time:
    `[batch_size, sequence_length]`, in a `JacobiOutput` with `return_dict_in_generate`.

    No argument has the name of a model input: transformers would pass it twice.
    """
    batch_size, prompt_length = input_ids.shape
    strategy = make_strategy(strategy_name, options, model)
    reader = make_reader(strategy, model)
    largest = strategy.largest_block_size if is_drafting(strategy) else None
    compiling = _choose_compiling(input_ids.device, options, generation_config, reader)
    # A compiled forward pass has one shape, and on a GPU so many positions cost what one does.
    block_size = DEFAULT_BLOCK_SIZE if compiling is not None and options.block_size == AUTO else options.block_size
    pace = make_pace(model, block_size, (strategy_name, options.candidates), largest)
    max_length = _length_limit(stopping_criteria, prompt_length)
    feed = Feed(
        model,
        input_ids,
        model_kwargs,
        strategy,
        max_block_size=pace.max_block_size,
        num_new_tokens=max_length - prompt_length,
        compiling=compiling,
        reader=reader,
        encoder_ids=encoder_ids,
        num_given=num_given,
        is_user_cache=is_user_cache,
    )
    if not feed.memory.fixed_shape and block_size != options.block_size:
        pace = make_pace(model, options.block_size, (strategy_name, options.candidates), largest)
    kept = TokenScores.asked_for(generation_config, batch_size)
    verifier = make_verifier(
        input_ids,
        logits_processor,
        stopping_criteria,
        pad_id=generation_config.pad_token_id,
        max_length=max_length,
        streamer=streamer,
        same_length=feed.same_length,
        noise=_noise(generation_config, batch_size, options.seed),
        kept=kept,
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
        cache = feed.memory.result() if batch_size == 1 and not feed.memory.replays else None
        stats = JacobiStats(num_forwards, [row.gains for row in all_rows])
        others = {CACHE_NAME: cache, **({} if kept is None else kept.result())}
        return JacobiOutput(sequences=cast(torch.LongTensor, sequences), jacobi_stats=stats, **others)
    except BaseException:  # Ctrl-C too
        feed.memory.abandon()
        raise


def _iterate(feed: Feed, strategy: Strategy, verifier: Verifier, pace: Pace) -> None:
    """One forward pass, and what came of it: propose, run the model, verify, keep."""
    rows = feed.rows
    # No row may look beyond the last position, so the foremost row sets how far a draft reaches.
    limit = verifier.max_length - max(row.length for row in rows)
    room = feed.room(pace.block_size(len(rows), pace.max_block_size if feed.memory.fixed_shape else limit))
    proposals = _propose(strategy, rows, room, verifier)

    num_drafting = strategy.begin(proposals) if is_drafting(strategy) else 0
    logits = feed.forward(proposals)  # [num_rows, num_places, vocab_size]
    num_verified = logits.shape[1] - num_drafting
    if is_drafting(strategy):
        strategy.end()

    verdicts = verifier.verify(rows, proposals, logits[:, :num_verified])
    for row, verdict in zip(rows, verdicts):
        row.commit(verdict)
    if is_drafting(strategy):
        strategy.draft(rows, verdicts, logits[:, num_verified:], verifier.guess)
    del logits  # large in the prefill

    hidden_states = feed.reader.take(rows, verdicts, len(proposals[0].token_ids)) if feed.reader else []
    feed.advance(verdicts, verifier.finished(rows))
    pace.record(room.depth + 1, [len(verdict.token_ids) for verdict in verdicts])
    left = {row.index for row in feed.rows}
    for number, (row, verdict) in enumerate(zip(rows, verdicts)):
        if row.index in left and not verifier.takes_padding(row):
            if is_reading(strategy):
                strategy.read(row, hidden_states[number])
            strategy.observe(row, verdict.path, verdict.predictions)


def _propose(strategy: Strategy, rows: list[Row], room: Room, verifier: Verifier) -> list[Proposal]:
    """Equally long proposals of all rows, whether a strategy is asked for them or not."""
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
    return level(proposals, room.depth + 1 if room.must_fill else 0)


def _choose_compiling(
    device: torch.device, options: JacobiOptions, generation_config: GenerationConfig, reader: Reader | None = None
) -> Compiling | None:
    """Whether forward passes are to be compiled: where that is asked for, and on a GPU if it is left open."""
    compile_call = reader.compiled if reader else None
    if options.compile is None:
        by_default = device.type == "cuda" and not options.candidates and not generation_config.disable_compile
        return Compiling(generation_config, False, compile_call) if by_default else None
    return Compiling(generation_config, True, compile_call) if options.compile else None


def _length_limit(stopping_criteria: StoppingCriteriaList, prompt_length: int) -> int:
    """Length at which every row ends."""
    limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
    return max(math.ceil(min(limits)), prompt_length + 1)  # the limit may be no integer


def _noise(generation_config: GenerationConfig, batch_size: int, seed: int | None) -> GumbelNoise | None:
    if not generation_config.do_sample:
        return None
    return GumbelNoise(int(torch.randint(2**62, ())) if seed is None else seed, batch_size)
