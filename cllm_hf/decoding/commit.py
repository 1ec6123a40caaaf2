"""
Which predicted tokens of a forward become part of the sequence, and which rows are finished by them.

There are two ways to find out. Where processors look at nothing but the scores, and without special stopping rules,
the whole block is compared at once, with one host sync. Otherwise the block is walked one position at a time, calling
every processor and stopping criterion with the same arguments, in the same order, as decoding one token at a time
would.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

from ..blocks.rules import count_accepted, count_until_stop
from .sampling import GumbelNoise


# Processors of the host that remember earlier calls, or call a function of the user.
_ORDERED_PROCESSORS = (
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
# Processors of the host that treat every row of scores alike, whatever the text before it.
_SCORE_PROCESSORS = {
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
}


class Committer:
    """
    Holds the sequences and commits tokens to them.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): prompts, padded on the left.
        logits_processor (`transformers.LogitsProcessorList`): applied before a token is chosen.
        stopping_criteria (`transformers.StoppingCriteriaList`): asked after every token; one of them must be a
            `MaxLengthCriteria`.
        pad_id (`int` or `None`): fills rows that end early; `None` for the first stop token.
        streamer (`transformers.generation.streamers.BaseStreamer`, *optional*): receives every committed token.
        same_length (`bool`): whether all rows must always have the same length.
        leave_together (`bool`): whether finished rows must stay in the batch until all are.
        noise (`GumbelNoise`, *optional*): makes the choice a sample; without it the best token is chosen.

    Attributes:
        canvas (`torch.LongTensor` of shape `(batch_size, max_length)`): the sequences as the host lays them out; what
            whole blocks have committed is on it only after `sequences`.
        lengths (`list[int]`): length of each row in the canvas.
        finished (`list[bool]`): rows that take no more tokens.
        num_generated (`list[int]`): tokens generated in each row, without the padding behind its end.
        max_length (`int`): length at which every row ends.
    """

    def __init__(
        self,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        pad_id: int | None,
        streamer: BaseStreamer | None = None,
        same_length: bool = False,
        leave_together: bool = False,
        noise: GumbelNoise | None = None,
    ):
        batch_size, prompt_length = input_ids.shape
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.streamer = streamer
        self._noise = noise
        self.max_length = length_limit(stopping_criteria, prompt_length)
        stop_ids = _stop_ids(stopping_criteria)
        self._stop_ids = frozenset(stop_ids)
        if pad_id is None:
            pad_id = stop_ids[0] if stop_ids else 0
        self._pad_id = pad_id
        self.canvas = input_ids.new_full((batch_size, self.max_length), pad_id)
        self.canvas[:, :prompt_length] = input_ids
        self.lengths = [prompt_length] * batch_size
        self.num_generated = [0] * batch_size
        self.finished = [False] * batch_size
        self._stopped = [False] * batch_size
        # Tokens that were committed by whole blocks, and are yet to be written to the canvas.
        self._whole_tokens: list[list[int]] = [[] for _ in range(batch_size)]

        kinds = {type(criterion) for criterion in stopping_criteria}
        self._whole_blocks = (
            {type(processor) for processor in logits_processor} <= _SCORE_PROCESSORS
            and kinds <= {EosTokenCriteria, MaxLengthCriteria}
            and (streamer is None or batch_size == 1)
        )
        # Stopped rows stay in the batch, as in the host, where a processor or criterion may notice, and where they go
        # on in the end: without a stop token the host does not pad them.
        self._leave_together = batch_size > 1 and (
            leave_together
            or (not stop_ids and kinds != {MaxLengthCriteria})
            or _depends_on_call_order(logits_processor, stopping_criteria)
        )
        self._same_length = self._leave_together or (batch_size > 1 and (same_length or streamer is not None))

    def commit(
        self, rows: list[int], drafts: list[list[int]], logits: torch.Tensor
    ) -> tuple[list[list[int]], list[int]]:
        """
        Commit the accepted draft tokens and the bonus token of each row.

        Args:
            rows (`list[int]`): canvas rows that took part in the forward.
            drafts (`list[list[int]]`): for each of them, what was fed after the anchor.
            logits (`torch.Tensor` of shape `(num_rows, draft_length + 1, vocab_size)`): what the model said.

        Returns:
            `tuple`: for each row the predicted tokens (`list[list[int]]`, one more than the draft has), and how many
            of them were committed (`list[int]`, each at least 1).
        """
        predicted = self._predict(rows, logits).tolist()  # the only host sync of an iteration, for whole blocks
        if not self._whole_blocks:
            counts = self._commit_stepwise(rows, drafts, predicted, logits)
        elif self._leave_together:
            counts = self._commit_together(rows, drafts, predicted)
        else:
            counts = self._commit_whole(rows, drafts, predicted)
        return predicted, counts

    def sequences(self) -> torch.Tensor:
        """
        The text of all rows.

        Returns:
            `torch.LongTensor` of shape `(batch_size, longest)`: with padding behind rows that ended early.
        """
        for row, tokens in enumerate(self._whole_tokens):
            start = self.lengths[row] - len(tokens)
            self.canvas[row, start : self.lengths[row]] = torch.tensor(tokens, dtype=self.canvas.dtype)
        return self.canvas[:, : max(self.lengths)]

    def _predict(self, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        """The token of each position, or a guess of it where it takes processors that look at the text."""
        scores = logits.float()  # as the host has them; an argmax over bfloat16 takes a CPU longer than this
        if self._whole_blocks and self.logits_processor:
            no_text = self.canvas[:0]
            scores = self.logits_processor(no_text, scores.flatten(0, 1)).view(logits.shape)
        if self._noise is not None:
            scores = scores + self._noise.of_blocks(rows, [self.lengths[row] for row in rows], scores)
        return scores.argmax(-1)

    def _commit_whole(self, rows: list[int], drafts: list[list[int]], predicted: list[list[int]]) -> list[int]:
        accepted = [count_accepted(draft, tokens) for draft, tokens in zip(drafts, predicted)]
        together = 1 + min(accepted) if self._same_length else self.max_length
        counts = []
        for row, tokens, num_accepted in zip(rows, predicted, accepted):
            until_stop = count_until_stop(tokens, self._stop_ids)
            count = min(num_accepted + 1, until_stop, self.max_length - self.lengths[row], together)
            self._add(row, tokens[:count], count)
            self.finished[row] = count == until_stop or self.lengths[row] == self.max_length
            counts.append(count)
        if self.streamer is not None:
            for token in predicted[0][: counts[0]]:
                self.streamer.put(torch.tensor([token]))
        return counts

    def _commit_together(self, rows: list[int], drafts: list[list[int]], predicted: list[list[int]]) -> list[int]:
        """Commit as many tokens to every row as the slowest one takes; rows that have stopped take padding."""
        going = [index for index, row in enumerate(rows) if not self._stopped[row]]
        until_stop = {index: count_until_stop(predicted[index], self._stop_ids) for index in going}
        accepted = [count_accepted(drafts[index], predicted[index]) for index in going]
        count = min(min(accepted) + 1, self.max_length - self.lengths[rows[0]])
        if max(until_stop.values()) <= count:  # the last of them ends the batch
            count = max(until_stop.values())
        for index, row in enumerate(rows):
            num_own = min(count, until_stop.get(index, 0))
            predicted[index][num_own:count] = [self._pad_id] * (count - num_own)
            self._add(row, predicted[index][:count], num_own)
            self._stopped[row] |= num_own == until_stop.get(index) or self.lengths[row] == self.max_length
        self._mark_finished()
        return [count] * len(rows)

    def _add(self, row: int, tokens: list[int], num_own: int) -> None:
        self._whole_tokens[row] += tokens
        self.lengths[row] += len(tokens)
        self.num_generated[row] += num_own

    def _commit_stepwise(
        self, rows: list[int], drafts: list[list[int]], predicted: list[list[int]], logits: torch.Tensor
    ) -> list[int]:
        counts = [0] * len(rows)
        walking = set(range(len(rows)))
        scores_shape = (len(self.finished), logits.shape[-1])
        for length in range(min(self.lengths[row] for row in rows), self.max_length):
            here = [index for index in sorted(walking) if self.lengths[rows[index]] == length]
            if not here:
                continue
            # Processors and criteria see the whole batch, as from the host; only the rows at this length are read.
            scores = torch.zeros(scores_shape, dtype=torch.float32, device=self.canvas.device)
            for index in here:
                scores[rows[index]] = logits[index, counts[index]]
            scores = self.logits_processor(self.canvas[:, :length], scores)
            if self._noise is not None:
                scores = scores + self._noise.at(length, logits).to(scores.device)
            tokens = scores.argmax(-1).tolist()
            for index in here:
                row = rows[index]
                if self._stopped[row] and self._stop_ids:
                    predicted[index][counts[index] :] = [self._pad_id] * (len(predicted[index]) - counts[index])
                else:
                    predicted[index][counts[index]] = tokens[row]
                    self.num_generated[row] += 1
                self.canvas[row, length] = predicted[index][counts[index]]
                self.lengths[row] += 1
                counts[index] += 1
            if self.streamer is not None:
                self.streamer.put(self.canvas[:, length].cpu())
            stopped = self.stopping_criteria(self.canvas[:, : length + 1], None).tolist()
            for index in here:
                self._stopped[rows[index]] |= stopped[rows[index]]
            self._mark_finished()
            walking -= {index for index in here if not self._goes_on(rows, index, counts, drafts, predicted)}
            if not walking or (
                self._same_length and any(not self.finished[rows[i]] and i not in walking for i in here)
            ):
                break
        return counts

    def _mark_finished(self) -> None:
        self.finished = [all(self._stopped)] * len(self._stopped) if self._leave_together else list(self._stopped)

    def _goes_on(
        self,
        rows: list[int],
        index: int,
        counts: list[int],
        drafts: list[list[int]],
        predicted: list[list[int]],
    ) -> bool:
        """Whether the next logits of this row stand on the right context."""
        last = counts[index] - 1
        if self.finished[rows[index]] or last == len(drafts[index]):
            return False
        return drafts[index][last] == predicted[index][last]


def length_limit(stopping_criteria: StoppingCriteriaList, prompt_length: int) -> int:
    """
    Length at which every row ends.

    Args:
        stopping_criteria (`transformers.StoppingCriteriaList`): one of them must be a `MaxLengthCriteria`.
        prompt_length (`int`): length of the prompts.

    Returns:
        `int`: at least one more than the prompt has, since criteria are first asked after one token.
    """
    limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
    return max(min(limits), prompt_length + 1)


def _depends_on_call_order(logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList) -> bool:
    """
    Whether a processor or criterion may notice that rows of a batch have different lengths.

    The host's own are functions of their arguments, but for those that keep a state. A user's may do anything, so they
    are called just as the host would: once a length, with all rows at that length.
    """
    stateless_criteria = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
    return any(
        isinstance(processor, _ORDERED_PROCESSORS) or type(processor).__module__ != logits_process.__name__
        for processor in logits_processor
    ) or any(type(criterion) not in stateless_criteria for criterion in stopping_criteria)


def _stop_ids(stopping_criteria: StoppingCriteriaList) -> list[int]:
    criteria = [criterion for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    return [token for criterion in criteria for token in criterion.eos_token_id.flatten().tolist()]
