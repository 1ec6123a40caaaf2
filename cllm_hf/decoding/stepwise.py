"""
Verifying one position at a time: every processor and stopping criterion is called with the same arguments, in the same
order, as decoding one token at a time would call it.
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

from ..blocks.rules import confirmed_by
from .rows import Row, Verdict
from .strategy import Proposal
from .verify import Verifier


# Processors of transformers that remember earlier calls, or call a function of the user.
_ORDERED_PROCESSORS = (
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
_STATELESS_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


class Canvas:
    """The sequences of all rows as transformers lays them out, in a tensor that grows with the text."""

    def __init__(self, input_ids: torch.Tensor, pad_id: int):
        self._ids, self._pad_id = input_ids, pad_id

    def until(self, length: int) -> torch.Tensor:
        """The first columns: `torch.LongTensor` of shape `(batch_size, length)`."""
        missing = length - self._ids.shape[1]
        if missing > 0:
            more = self._ids.new_full((self._ids.shape[0], max(missing, self._ids.shape[1])), self._pad_id)
            self._ids = torch.cat([self._ids, more], dim=1)
        return self._ids[:, :length]


class _Walk:
    """How far a row has come in a forward pass."""

    def __init__(self, row: Row, proposal: Proposal, predictions: list[int], logits: torch.Tensor):
        self.row = row
        self.length = row.length
        self.is_stopped = row.is_stopped
        self.logits = logits  # (num_places, vocab_size)
        self.place: int | None = 0  # whose logits stand on the text as it is; none where there are no more of them
        self._predictions = predictions
        self._tokens: list[int] = []
        self._path: list[int] = []
        self._num_own = 0
        self._confirmed = confirmed_by(proposal.token_ids, *proposal.links())

    def take(self, token: int) -> None:
        """Commit a token of the text."""
        self._predictions[self._path_end()] = token
        self._num_own += 1
        self._append(token)

    def take_padding(self, pad_id: int) -> None:
        """Commit padding after the end of the text."""
        self._append(pad_id)

    def verdict(self) -> Verdict:
        return Verdict(self._tokens, self._num_own, self._path, self._predictions, self.is_stopped)

    def _path_end(self) -> int:
        assert self.place is not None  # nothing is taken where there are no logits
        return self.place

    def _append(self, token: int) -> None:
        place = self._path_end()
        self._tokens.append(token)
        self._path.append(place)
        self.length += 1
        self.place = self._confirmed.get((place, token))


class StepwiseVerifier(Verifier):
    """Verifies one position after the other."""

    def __init__(self, input_ids: torch.Tensor, stopping_criteria: StoppingCriteriaList, **options: Any):
        super().__init__(**options)
        self._stopping_criteria = stopping_criteria
        self._canvas = Canvas(input_ids, self.pad_id)

    def verify(self, rows: list[Row], proposals: list[Proposal], logits: torch.Tensor) -> list[Verdict]:
        guesses = self.predict(rows, proposals, self._known_scores(logits)).tolist()
        walks = [_Walk(*parts) for parts in zip(rows, proposals, guesses, logits)]
        length = min(row.length for row in rows)
        while any(walk.place is not None for walk in walks):
            here = [walk for walk in walks if walk.place is not None and walk.length == length]
            length += 1
            if not here:
                continue
            self._step(here, length - 1)
            all_stopped = all(walk.is_stopped for walk in walks)
            finished = [all_stopped if self.leave_together else walk.is_stopped for walk in here]
            if self.same_length and any(walk.place is None for walk, ends in zip(here, finished) if not ends):
                break
            for walk, ends in zip(here, finished):
                walk.place = None if ends else walk.place
        return [walk.verdict() for walk in walks]

    def _known_scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float()  # what processors make of them depends on the text

    def _step(self, walks: list[_Walk], length: int) -> None:
        """Commit a token to each of these rows, which are all of one length."""
        # Processors and criteria see the whole batch, as from transformers; only these rows are read.
        text: Any = self._canvas.until(length)
        first = walks[0].logits
        scores = torch.zeros((len(text), first.shape[-1]), dtype=torch.float32, device=text.device)
        for walk in walks:
            scores[walk.row.index] = walk.logits[walk.place]
        scores = self.logits_processor(text, scores)
        if self.noise is not None:
            scores = scores + self.noise.at(length, first).to(scores.device)
        tokens = scores.argmax(-1).tolist()
        longer = self._canvas.until(length + 1)
        for walk in walks:
            token = tokens[walk.row.index]
            if walk.is_stopped and self.stop_ids:
                token = self.pad_id
                walk.take_padding(token)
            else:
                walk.take(token)
            longer[walk.row.index, length] = token
        if self.streamer is not None:
            self.streamer.put(longer[:, length].cpu())
        stopped = self._stopping_criteria(longer, None).tolist()
        for walk in walks:
            walk.is_stopped |= stopped[walk.row.index]


def depends_on_call_order(logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList) -> bool:
    """
    Whether a processor or criterion may notice that rows of a batch have different lengths.

    Those of transformers are functions of their arguments, but for some that keep a state. A user's may do anything,
    so they are called just as transformers would: once a length, with all rows at that length.
    """
    return any(
        isinstance(processor, _ORDERED_PROCESSORS) or type(processor).__module__ != logits_process.__name__
        for processor in logits_processor
    ) or any(type(criterion) not in _STATELESS_CRITERIA for criterion in stopping_criteria)
