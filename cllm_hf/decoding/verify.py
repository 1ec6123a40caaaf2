"""
Which predicted tokens of a forward pass become part of the text, and which rows end with them.

Where processors look at nothing but the scores, and without special stopping rules, all places are compared at once,
with one host sync: that is what a `Verifier` does. So does a `TextVerifier`, for processors that also look at which
tokens stand in the text. A `StepwiseVerifier` walks a row one position at a time instead: it calls every processor and
stopping criterion with the same arguments, in the same order, as decoding one token at a time would. `make_verifier`
chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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

from ..blocks.forward import ancestors
from ..blocks.rules import accepted_path, confirmed_by, count_accepted, count_until_stop
from .outputs import TokenScores
from .sampling import GumbelNoise
from .strategy import Proposal, Row, Verdict


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
# Processors of transformers that remember earlier calls, or call a function of the user.
_ORDERED_PROCESSORS = (
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
_STATELESS_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


@dataclass(eq=False)
class Verifier:
    """Verifies all places of a forward pass at once."""

    max_length: int  # at which every row ends
    stop_ids: frozenset[int]  # tokens that end a row
    pad_id: int  # fills rows that end early
    logits_processor: LogitsProcessorList  # applied before a token is chosen
    streamer: BaseStreamer | None  # receives every committed token
    same_length: bool  # whether all rows must always have the same length
    leave_together: bool  # whether rows that have ended must stay in the batch until all have
    noise: GumbelNoise | None  # makes the choice a sample; without it the best token is chosen
    kept: TokenScores | None  # where scores are kept, if they are asked for

    def verify(self, rows: list[Row], proposals: list[Proposal], logits: torch.Tensor) -> list[Verdict]:
        """
        Find the longest accepted path of each row, and the bonus token after it. `logits` are those of the places that
        are verified: `[num_rows, num_places, vocab_size]`.
        """
        scores = self._scores(rows, proposals, logits)
        predictions = self._predict(rows, proposals, scores).tolist()  # the only host sync of an iteration
        paths = [_follow(proposal, tokens) for proposal, tokens in zip(proposals, predictions)]
        verdicts = self._judge(rows, paths, predictions)
        if self.kept is not None:
            for number, (row, verdict) in enumerate(zip(rows, verdicts)):
                self.kept.add(row, verdict.path[: verdict.num_own], scores=scores[number], logits=logits[number])
        if self.streamer is not None:
            for token in verdicts[0].token_ids:
                self.streamer.put(torch.tensor([token]))
        return verdicts

    def finished(self, rows: list[Row]) -> list[bool]:
        """Which rows of the batch take no more tokens."""
        stopped = [row.is_stopped for row in rows]
        return [all(stopped)] * len(rows) if self.leave_together else stopped

    def takes_padding(self, row: Row) -> bool:
        """Whether a row has ended and takes only padding; without stop tokens transformers has it go on instead."""
        return row.is_stopped and bool(self.stop_ids)

    def guess(self, rows: Sequence[Row], distance: int, logits: torch.Tensor) -> torch.Tensor:
        """
        What a token of a draft is chosen by, `distance` tokens after the next one of each row, as far as it is known
        before it is verified. Scores and logits are `[num_rows, num_guesses, vocab_size]`.
        """
        scores = self._known_scores(rows, logits)
        if self.noise is None:
            return scores
        positions = [[row.length + distance] for row in rows]
        return scores + self.noise.at_places([row.index for row in rows], positions, scores)

    def _predict(self, rows: list[Row], proposals: list[Proposal], scores: torch.Tensor) -> torch.Tensor:
        """The model's token after each place, a sample where there is noise: `[num_rows, num_places]`."""
        if self.noise is not None:
            count = scores.shape[1]
            positions = [[row.length + depth for depth in one.depths()[:count]] for row, one in zip(rows, proposals)]
            scores = scores + self.noise.at_places([row.index for row in rows], positions, scores)
        return scores.argmax(-1)

    def _scores(self, rows: list[Row], proposals: list[Proposal], logits: torch.Tensor) -> torch.Tensor:
        """What the token after each place is chosen by, if the guesses before it are right."""
        return self._process(logits)

    def _known_scores(self, rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
        """Scores of places whose text may not be decided yet."""
        return self._process(logits)

    def _process(self, logits: torch.Tensor, texts: torch.Tensor | None = None) -> torch.Tensor:
        """Logits as processors make scores of them, after `texts`, `[num_rows, num_places, length]`, or after any."""
        scores = logits.float()  # as transformers has them; an argmax over bfloat16 takes a CPU longer than this
        if not self.logits_processor:
            return scores
        ids: Any = logits.new_empty((0, 0), dtype=torch.long) if texts is None else texts.flatten(0, 1)
        return self.logits_processor(ids, scores.flatten(0, 1)).view(logits.shape)

    def _judge(self, rows: list[Row], paths: list[list[int]], predictions: list[list[int]]) -> list[Verdict]:
        texts = [[predicted[place] for place in path] for path, predicted in zip(paths, predictions)]
        until_stop = [0 if row.is_stopped else count_until_stop(text, self.stop_ids) for row, text in zip(rows, texts)]
        together = None  # what rows that stay at one length take: as many tokens as the slowest of them
        if self.same_length:
            together = min(len(path) for row, path in zip(rows, paths) if not row.is_stopped)
        verdicts = []
        for row, path, text, predicted, until in zip(rows, paths, texts, predictions, until_stop):
            # A row that has ended takes padding where it stays in the batch, until the last one ends.
            end = max(until_stop) if self.leave_together else until
            count = min(together or len(path), end, self.max_length - row.length)
            num_own = min(count, until)
            tokens = text[:num_own] + [self.pad_id] * (count - num_own)
            is_stopped = num_own == until or row.length + count == self.max_length
            # What the model remembers of a row that has ended does not matter.
            path = path[:count] if num_own == count else list(range(count))
            verdicts.append(Verdict(tokens, num_own, path, predicted, is_stopped))
        return verdicts


@dataclass(eq=False)
class TextVerifier(Verifier):
    """
    Verifies all places at once by processors that look at which tokens stand in the text before a place.

    Texts of different lengths are filled up with their own last token, which changes nothing for these processors.
    """

    canvas: Canvas
    num_ignored: torch.Tensor | None  # [batch_size, 1], first columns that processors are not to look at, as padding

    def verify(self, rows: list[Row], proposals: list[Proposal], logits: torch.Tensor) -> list[Verdict]:
        verdicts = super().verify(rows, proposals, logits)
        self.canvas.write(rows, [verdict.token_ids for verdict in verdicts])
        return verdicts

    def _scores(self, rows: list[Row], proposals: list[Proposal], logits: torch.Tensor) -> torch.Tensor:
        count, device = logits.shape[1], logits.device
        texts = self._texts(rows)[:, None].to(device)
        fed = torch.tensor([proposal.token_ids[:count] for proposal in proposals]).to(device, non_blocking=True)
        # Each place follows some of the guesses: `[num_rows, num_places, num_places]`.
        follows = np.stack(
            [np.tri(count, dtype=bool) if one.parents is None else ancestors(one.parents[:count]) for one in proposals]
        )
        guesses = torch.where(torch.from_numpy(follows).to(device, non_blocking=True), fed[:, None], texts[..., -1:])
        return self._process(logits, torch.cat([texts.expand(-1, count, -1), guesses], dim=-1))

    def _known_scores(self, rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
        texts = self._texts(rows)[:, None].to(logits.device)
        return self._process(logits, texts.expand(-1, logits.shape[1], -1))

    def _texts(self, rows: Sequence[Row]) -> torch.Tensor:
        """What is committed of each row, `[num_rows, length]`, the anchor last."""
        canvas = self.canvas.until(max(row.length for row in rows))
        places = torch.tensor([(row.index, row.length) for row in rows]).to(canvas.device, non_blocking=True)
        indices, lengths = places[:, 0], places[:, 1:]
        texts, columns = canvas[indices], torch.arange(canvas.shape[1], device=canvas.device)
        counts = columns < lengths
        if self.num_ignored is not None:
            counts &= columns >= self.num_ignored[indices]
        return torch.where(counts, texts, texts.gather(1, lengths - 1))


def _follow(proposal: Proposal, predicted: list[int]) -> list[int]:
    if proposal.parents is None:
        return list(range(count_accepted(proposal.token_ids[1:], predicted) + 1))
    return accepted_path(proposal.token_ids, proposal.parents, predicted, proposal.is_drafter)


@dataclass(eq=False)
class StepwiseVerifier(Verifier):
    """Verifies one position after the other."""

    canvas: Canvas
    stopping_criteria: StoppingCriteriaList  # asked after every token

    def verify(self, rows: list[Row], proposals: list[Proposal], logits: torch.Tensor) -> list[Verdict]:
        guesses = self._predict(rows, proposals, self._known_scores(rows, logits)).tolist()
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

    def _known_scores(self, rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
        return logits.float()  # what processors make of them depends on the text

    def _step(self, walks: list[_Walk], length: int) -> None:
        """Commit a token to each of these rows, which are all of one length."""
        # Processors and criteria see the whole batch, as from transformers; only these rows are read.
        text: Any = self.canvas.until(length)
        first = walks[0].logits
        scores = torch.zeros((len(text), first.shape[-1]), dtype=torch.float32, device=text.device)
        for walk in walks:
            scores[walk.row.index] = walk.logits[walk.place]
        scores = self.logits_processor(text, scores)
        noise = 0 if self.noise is None else self.noise.at(length, first).to(scores.device)
        tokens = (scores + noise).argmax(-1).tolist()
        longer = self.canvas.until(length + 1)
        for walk in walks:
            is_padding = walk.is_stopped and bool(self.stop_ids)
            token = self.pad_id if is_padding else tokens[walk.row.index]
            if self.kept is not None and not is_padding:
                self.kept.add(walk.row, [0], scores=scores[walk.row.index, None], logits=walk.logits[walk.place, None])
            walk.take(token, is_padding)
            longer[walk.row.index, length] = token
        if self.streamer is not None:
            self.streamer.put(longer[:, length].cpu())
        stopped = self.stopping_criteria(longer, None).tolist()
        for walk in walks:
            walk.is_stopped |= stopped[walk.row.index]


class Canvas:
    """The sequences of all rows as transformers lays them out, in a tensor that grows with the text."""

    def __init__(self, input_ids: torch.Tensor, pad_id: int):
        self._ids, self._pad_id = input_ids, pad_id

    def until(self, length: int) -> torch.Tensor:
        """The first columns: `[batch_size, length]`; padding where nothing is written."""
        missing = length - self._ids.shape[1]
        if missing > 0:
            more = self._ids.new_full((self._ids.shape[0], max(missing, self._ids.shape[1])), self._pad_id)
            self._ids = torch.cat([self._ids, more], dim=1)
        return self._ids[:, :length]

    def write(self, rows: Sequence[Row], texts: list[list[int]]) -> None:
        """Add tokens to rows, after what they have."""
        places = [(row.index, row.length + i, token) for row, text in zip(rows, texts) for i, token in enumerate(text)]
        canvas = self.until(max(column for _, column, _ in places) + 1)
        indices, columns, tokens = torch.tensor(places).T.to(canvas.device, non_blocking=True)
        canvas[indices, columns] = tokens


class _Walk:
    """How far a row has come in a forward pass."""

    def __init__(self, row: Row, proposal: Proposal, predictions: list[int], logits: torch.Tensor):
        self.row, self.length, self.is_stopped = row, row.length, row.is_stopped
        self.logits = logits  # [num_places, vocab_size]
        self.place: int | None = 0  # whose logits stand on the text as it is; none where there are no more of them
        self._predictions, self._num_own = predictions, 0
        self._tokens: list[int] = []
        self._path: list[int] = []
        self._confirmed = confirmed_by(proposal.token_ids, *proposal.links())

    def take(self, token: int, is_padding: bool) -> None:
        """Commit a token of the text, or padding after its end."""
        assert self.place is not None  # nothing is taken where there are no logits
        if not is_padding:
            self._predictions[self.place] = token
            self._num_own += 1
        self._tokens.append(token)
        self._path.append(self.place)
        self.length += 1
        self.place = self._confirmed.get((self.place, token))

    def verdict(self) -> Verdict:
        return Verdict(self._tokens, self._num_own, self._path, self._predictions, self.is_stopped)


def make_verifier(
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    *,
    pad_id: int | None,  # by default the first stop token
    max_length: int,
    streamer: BaseStreamer | None,
    same_length: bool,  # whether the model needs all rows at the same length
    noise: GumbelNoise | None,
    kept: TokenScores | None = None,
) -> Verifier:
    """Choose how forward passes are verified: all places at once, or one position after the other."""
    criteria = {type(criterion) for criterion in stopping_criteria}
    batch_size, stop_ids = len(input_ids), find_stop_ids(stopping_criteria)
    pad_id = (stop_ids or [0])[0] if pad_id is None else pad_id
    # Rows that have ended stay in the batch, as in transformers, where a processor or criterion may notice, and where
    # they go on in the end: without a stop token transformers does not pad them.
    leave_together = batch_size > 1 and (
        (not stop_ids and criteria != {MaxLengthCriteria})
        or _depends_on_call_order(logits_processor, stopping_criteria)
    )
    options: dict[str, Any] = {
        "max_length": max_length,
        "stop_ids": frozenset(stop_ids),
        "pad_id": pad_id,
        "logits_processor": logits_processor,
        "streamer": streamer,
        "same_length": leave_together or (batch_size > 1 and (same_length or streamer is not None)),
        "leave_together": leave_together,
        "noise": noise,
        "kept": kept,
    }
    at_once = criteria <= {EosTokenCriteria, MaxLengthCriteria} and (
        streamer is None or batch_size == 1  # a streamer takes a batch one position at a time
    )
    of_text = [processor for processor in logits_processor if type(processor) not in _SCORE_PROCESSORS]
    if at_once and not of_text:
        return Verifier(**options)
    canvas = Canvas(input_ids, pad_id)
    if at_once and len(of_text) == 1 and _looks_at_tokens_alone(of_text[0], input_ids.shape[1]):
        plain, num_ignored = _without_ignoring(of_text[0])
        processors = [plain if processor is of_text[0] else processor for processor in logits_processor]
        options["logits_processor"] = LogitsProcessorList(processors)
        return TextVerifier(**options, canvas=canvas, num_ignored=num_ignored)
    return StepwiseVerifier(**options, canvas=canvas, stopping_criteria=stopping_criteria)


def _looks_at_tokens_alone(processor: Any, prompt_length: int) -> bool:
    """Whether it does not matter where in the text a token stands, if it is not ignored; the anchor never may be."""
    if type(processor) is not logits_process.RepetitionPenaltyLogitsProcessor or not prompt_length:
        return False
    ignored = processor.prompt_ignore_length
    return ignored is None or (isinstance(ignored, torch.Tensor) and bool((ignored < prompt_length).all()))


def _without_ignoring(processor: Any) -> tuple[Any, torch.Tensor | None]:
    """A repetition penalty for any number of texts, and what its own one ignores of each row."""
    ignored = processor.prompt_ignore_length
    plain = logits_process.RepetitionPenaltyLogitsProcessor(processor.penalty)
    return plain, None if ignored is None else ignored[:, None]


def find_stop_ids(stopping_criteria: StoppingCriteriaList) -> list[int]:
    """Stop tokens of all criteria: empty if there are none."""
    criteria = [criterion for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    return [token for criterion in criteria for token in criterion.eos_token_id.flatten().tolist()]


def _depends_on_call_order(logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList) -> bool:
    """
    Whether a processor or criterion may notice that rows of a batch have different lengths.

    Those of transformers are functions of their arguments, but for some that keep a state. A user's may do anything,
    so they are called just as transformers would: once a length, with all rows at that length.
    """
    return any(
        isinstance(processor, _ORDERED_PROCESSORS) or type(processor).__module__ != logits_process.__name__
        for processor in logits_processor
    ) or any(type(criterion) not in _STATELESS_CRITERIA for criterion in stopping_criteria)
