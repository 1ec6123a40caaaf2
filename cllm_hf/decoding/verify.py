"""
Which predicted tokens of a forward pass become part of the text, and which rows end with them.

Where processors look at nothing but the scores, and without special stopping rules, all places are compared at once,
with one host sync: that is done here. Otherwise a row is walked one position at a time, see `stepwise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

from ..blocks.rules import accepted_path, count_accepted, count_until_stop
from .rows import Row, Verdict
from .sampling import GumbelNoise
from .strategy import Proposal


# Processors of transformers that treat every row of scores alike, whatever the text before it.
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


class Verifier:
    """Verifies all places of a forward pass at once."""

    def __init__(
        self,
        max_length: int,
        stop_ids: list[int],
        pad_id: int,
        logits_processor: LogitsProcessorList,
        streamer: BaseStreamer | None,
        same_length: bool,
        leave_together: bool,
        noise: GumbelNoise | None,
    ):
        self.max_length = max_length
        self.stop_ids = frozenset(stop_ids)
        self.pad_id = pad_id
        self.logits_processor = logits_processor
        self.streamer = streamer
        self.leave_together = leave_together
        self.same_length = same_length or leave_together
        self.noise = noise

    def verify(self, rows: list[Row], proposals: list[Proposal], logits: torch.Tensor) -> list[Verdict]:
        """Find the longest accepted path of each row, and the bonus token after it."""
        predictions = self.predict(
            rows, proposals, self._process(logits)
        ).tolist()  # the only host sync of an iteration
        paths = [_follow(proposal, tokens) for proposal, tokens in zip(proposals, predictions)]
        verdicts = (self._verify_together if self.leave_together else self._verify_apart)(rows, paths, predictions)
        if self.streamer is not None:
            for token in verdicts[0].token_ids:
                self.streamer.put(torch.tensor([token]))
        return verdicts

    def finished(self, rows: list[Row]) -> list[bool]:
        """Find the rows that take no more tokens."""
        stopped = [row.is_stopped for row in rows]
        return [all(stopped)] * len(rows) if self.leave_together else stopped

    def takes_padding(self, row: Row) -> bool:
        """Whether a row has ended and takes only padding; without stop tokens transformers has it go on instead."""
        return row.is_stopped and bool(self.stop_ids)

    def predict(self, rows: list[Row], proposals: list[Proposal], scores: torch.Tensor) -> torch.Tensor:
        """Choose the model's token after each place, a sample where there is noise."""
        if self.noise is not None:
            count = scores.shape[1]
            positions = [[row.length + depth for depth in one.depths()[:count]] for row, one in zip(rows, proposals)]
            scores = scores + self.noise.at_places([row.index for row in rows], positions, scores)
        return scores.argmax(-1)

    def guess(self, rows: Sequence[Row], distance: int, logits: torch.Tensor) -> torch.Tensor:
        """What a token of a draft is chosen by, as far as it is known before it is verified."""
        scores = self._known_scores(logits)
        if self.noise is None:
            return scores
        positions = [[row.length + distance] for row in rows]
        return scores + self.noise.at_places([row.index for row in rows], positions, scores)

    def _known_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of places whose text may not be decided yet."""
        return self._process(logits)

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        scores = logits.float()  # as transformers has them; an argmax over bfloat16 takes a CPU longer than this
        if not self.logits_processor:
            return scores
        no_text: Any = torch.empty((0, 0), dtype=torch.long, device=logits.device)
        return self.logits_processor(no_text, scores.flatten(0, 1)).view(logits.shape)

    def _verify_apart(self, rows: list[Row], paths: list[list[int]], predictions: list[list[int]]) -> list[Verdict]:
        together = min(map(len, paths)) if self.same_length else self.max_length
        verdicts = []
        for row, path, predicted in zip(rows, paths, predictions):
            tokens = [predicted[place] for place in path]
            until_stop = count_until_stop(tokens, self.stop_ids)
            count = min(len(path), until_stop, self.max_length - row.length, together)
            is_stopped = count == until_stop or row.length + count == self.max_length
            verdicts.append(Verdict(tokens[:count], count, path[:count], predicted, is_stopped))
        return verdicts

    def _verify_together(self, rows: list[Row], paths: list[list[int]], predictions: list[list[int]]) -> list[Verdict]:
        """Commit as many tokens to every row as the slowest one takes; rows that have stopped take padding."""
        texts = [[predicted[place] for place in path] for path, predicted in zip(paths, predictions)]
        until_stop = [0 if row.is_stopped else count_until_stop(text, self.stop_ids) for row, text in zip(rows, texts)]
        count = min(len(path) for row, path in zip(rows, paths) if not row.is_stopped)
        count = min(count, self.max_length - rows[0].length)
        if max(until_stop) <= count:  # the last of them ends the batch
            count = max(until_stop)
        verdicts = []
        for row, path, text, predicted, until in zip(rows, paths, texts, predictions, until_stop):
            num_own = min(count, until)
            tokens = text[:num_own] + [self.pad_id] * (count - num_own)
            is_stopped = num_own == until or row.length + count == self.max_length
            # What the model remembers of a row that has ended does not matter.
            path = path[:count] if num_own == count else list(range(count))
            verdicts.append(Verdict(tokens, num_own, path, predicted, is_stopped))
        return verdicts


def _follow(proposal: Proposal, predicted: list[int]) -> list[int]:
    if proposal.parents is None:
        return list(range(count_accepted(proposal.token_ids[1:], predicted) + 1))
    return accepted_path(proposal.token_ids, proposal.parents, predicted, proposal.is_drafter)


def takes_all_at_once(
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    streamer: BaseStreamer | None,
    batch_size: int,
) -> bool:
    """Whether all places of a forward pass can be verified at once."""
    return (
        {type(processor) for processor in logits_processor} <= _SCORE_PROCESSORS
        and {type(criterion) for criterion in stopping_criteria} <= {EosTokenCriteria, MaxLengthCriteria}
        and (streamer is None or batch_size == 1)
    )
