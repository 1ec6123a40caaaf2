"""A shard: from its prompts to its records, what is kept of an unfinished one, and its file."""

from __future__ import annotations

import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._host import count_embeddings
from ..journal import Journal
from .collector import Request, Trajectory, augment_states, collect_trajectories
from .continuous import ContinuousBatch, count_rows
from .options import CleaningRules, CollectionOptions
from .prompts import PromptRow
from .responding import Fitting, batch_by_tokens, find_stop_ids, split_batches
from .schema import features
from .statistics import TrajectoryStatistics


logger = logging.getLogger(__name__)
ADVICE = {
    "not_greedy": "For `not_greedy` pass responses of this model as token ids, or keep them by `not_greedy`.",
    "long_prompt": "For `long_prompt` lower `max_new_tokens`, or raise `max_prompt_tokens`.",
    "empty": "For `empty`: an instruct model may wait for its chat template. Pass chat messages, or `--chat`.",
    "long_response": "For `long_response` raise `max_new_tokens`.",
}
# What is counted of kept prompts; the other counts are those of dropped ones.
_OF_KEPT = ("kept", "kept_not_greedy", "kept_near_ties", "near_ties")
_NOTES = "cllm_hf"  # key of what a shard says of itself, beside the keys of `datasets`
_ROWS_AT_ONCE = 500  # responses alone
# Prompts whose responses are decoded in one go, and kept. While the last of them end, rows stand empty.
_PROMPTS_AT_ONCE = 512
_COMPRESSION = 9  # of zstd: 3 to 6% smaller than its default


class Progress:
    """A bar of the prompts of this process, with the rate of response tokens and the number of dropped prompts."""

    def __init__(self, total: int, done: int = 0, show: bool = True):
        # Without the rate of prompts, which jumps from batch to batch.
        layout = "{desc}: {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(total=total, initial=done, desc="Collecting", bar_format=layout, disable=not show)
        self._start = time.perf_counter()
        self._num_tokens = self._num_dropped = 0
        self._doing = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._doing = "done" if self._bar.n >= self._bar.total else "stopped"
        self._draw()
        self._bar.close()

    def say(self, doing: str) -> None:
        """Say in a few words what is being computed."""
        self._doing = doing
        self._draw()

    def advance(self, num_tokens: int = 0, dropped: bool = False) -> None:
        """Count a prompt as done, by the tokens of its response, or as dropped."""
        self._num_tokens += num_tokens
        self._num_dropped += dropped
        self._draw(refresh=False)
        self._bar.update()

    def _draw(self, refresh: bool = True) -> None:
        rate = self._num_tokens / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s, {self._num_dropped} dropped, {self._doing}", refresh)


class ShardCollector:
    """
    Collects the records of some prompts; within a `with` statement the model is in evaluation mode.

    What it computes depends on the prompts of the shard alone, not on other shards nor on what a journal holds.
    `duplicates` are the `index` of prompts to drop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: CollectionOptions,
        cleaning: CleaningRules,
        duplicates: Collection[int] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.cleaning = cleaning
        self.duplicates = duplicates
        self._schema = features(options.augment, options.responses_only).arrow_schema
        self._stop_ids = find_stop_ids(model, tokenizer)
        pad_id = tokenizer.pad_token_id
        if pad_id is None or pad_id >= count_embeddings(model):  # added without resizing the model
            pad_id = (self._stop_ids or [0])[0]
        self._pad_id: int = pad_id
        config: Any = model.config.get_text_config()
        self._positions: int | None = getattr(config, "max_position_embeddings", None)
        self._decoding, self._iterating = Fitting(), Fitting()

    def __enter__(self) -> ShardCollector:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        return self

    def __exit__(self, *error: object) -> None:
        for module, was_training in self._modes:  # some parts of a model may have been in another mode than others
            module.training = was_training

    def collect(
        self, rows: Sequence[PromptRow], journal: Journal, progress: Progress
    ) -> tuple[pa.Table, Counter[str]]:
        """
        Collect the records of a shard in the order of its prompts, with what the journal has of it already, and count
        kept and dropped prompts by reason; see `TrajectoryBuilder.counts`.
        """
        counts: Counter[str] = Counter()

        def keep(row: PromptRow, reason: str | None) -> bool:
            if reason is not None:
                counts[reason] += 1
                progress.advance(dropped=True)
            return reason is None

        rows = [row for row in rows if keep(row, self._reason_to_drop_prompt(row))]
        responses = self._respond(rows, journal, progress)
        # Whether a text from elsewhere stops is known later.
        rows = [row for row in rows if keep(row, self._reason_to_drop(responses[row.index], may_stop=row.may_stop))]
        places: list[int] = []
        tables = [self._schema.empty_table()]
        has_states = not self.options.responses_only
        found = self._iterate(rows, responses, journal, progress) if has_states else _as_they_are(rows, responses)
        for batch in found:
            records = []
            for row, trajectory in batch:
                # All others were looked at before.
                reason = self._reason_to_drop(trajectory.response_ids) if row.may_stop else None
                if keep(row, reason or ("not_greedy" if has_states and not trajectory.states else None)):
                    counts["kept"] += 1
                    counts["kept_not_greedy"] += not trajectory.is_greedy
                    counts["kept_near_ties"] += trajectory.num_near_ties > 0
                    counts["near_ties"] += trajectory.num_near_ties
                    places.append(row.index)
                    records.append(self._record(row, trajectory))
                    progress.advance(num_tokens=len(trajectory.response_ids))
            # As lists of numbers they would take ten times the memory.
            tables.append(pa.Table.from_pylist(records, self._schema))
        return pa.concat_tables(tables).take(np.argsort(places)).combine_chunks(), +counts

    def _reason_to_drop_prompt(self, row: PromptRow) -> str | None:
        rules, longest = self.cleaning, self.options.max_new_tokens
        if row.index in self.duplicates:
            return "duplicate"
        if not row.prompt_ids:
            return "empty_prompt"
        if row.response_ids is not None:
            longest = len(row.response_ids) + row.may_stop
        too_long = self._positions is not None and len(row.prompt_ids) + longest > self._positions
        if too_long or (rules.max_prompt_tokens is not None and len(row.prompt_ids) > rules.max_prompt_tokens):
            return "long_prompt"
        if row.response_ids is not None and len(row.response_ids) > self.options.max_new_tokens:
            return "long_response"
        return "empty" if row.response_ids == [] else None

    def _reason_to_drop(self, response: list[int], may_stop: bool = False) -> str | None:
        reason = self.cleaning.reason_to_drop(response, self._text(response), self._stop_ids)
        return None if reason == "truncated" and may_stop else reason

    def _respond(self, rows: list[PromptRow], journal: Journal, progress: Progress) -> dict[int, list[int]]:
        """Responses by index: those that are given, and those of the model to the other prompts."""
        responses = {row.index: row.response_ids for row in rows if row.response_ids is not None}
        asked = [row for row in rows if row.response_ids is None]
        for number, group in enumerate(split_batches(asked, _PROMPTS_AT_ONCE)):
            prompts = [row.prompt_ids for row in group]
            say = partial(self._say_responses, progress, len(rows), len(responses))
            say(0)
            decoded = journal.once(f"responses-{number:05d}", prompts, partial(self._decode, prompts, say))
            responses.update((row.index, response) for row, response in zip(group, decoded, strict=True))
        return responses

    @staticmethod
    def _say_responses(progress: Progress, total: int, before: int, ended: int) -> None:
        progress.say(f"responses {before + ended}/{total}")

    def _decode(self, prompts: list[list[int]], say: Callable[[int], None]) -> list[list[int]]:
        options = self.options

        def decode(num_rows: int) -> list[list[int]]:
            batch = ContinuousBatch(
                self.model, options.max_new_tokens, self._stop_ids, num_rows, options.max_tokens_per_batch
            )
            return batch.run(prompts, say)

        return self._decoding.run(decode, count_rows(self.model, max(map(len, prompts)) + options.max_new_tokens))

    def _iterate(
        self, rows: list[PromptRow], responses: Mapping[int, list[int]], journal: Journal, progress: Progress
    ) -> Iterator[list[tuple[PromptRow, Trajectory]]]:
        """Prompts and their trajectories, a batch at a time."""
        longest = self.options.max_new_tokens
        requests = [
            Request(row.prompt_ids, response, (self.options.seed, row.index), row.may_stop and len(response) < longest)
            for row in rows
            for response in [responses[row.index]]
        ]
        sizes = [(len(r.prompt_ids) + len(r.response_ids), len(r.response_ids)) for r in requests]
        done = 0
        for number, batch in enumerate(batch_by_tokens(sizes, self.options.max_tokens_per_batch)):
            progress.say(f"trajectories {done}/{len(rows)}")
            chosen = [requests[place] for place in batch]
            # By name, since earlier versions had another rule for what is greedy.
            key = ["near ties", *(astuple(request) for request in chosen)]
            found = journal.once(f"trajectories-{number:05d}", key, partial(self._collect, chosen))
            yield [(rows[place], Trajectory(**values)) for place, values in zip(batch, found, strict=True)]
            done += len(batch)

    def _collect(self, requests: list[Request]) -> list[dict[str, Any]]:
        def collect(num_rows: int) -> list[dict[str, Any]]:
            found = (
                collect_trajectories(
                    self.model,
                    part,
                    self.options.block_size,
                    self._pad_id,
                    self._stop_ids,
                    keep_not_greedy=self.options.not_greedy == "keep",
                )
                for part in split_batches(requests, num_rows)
            )
            return [vars(trajectory) for part in found for trajectory in part]

        return self._iterating.run(collect, len(requests))

    def _record(self, row: PromptRow, trajectory: Trajectory) -> dict[str, Any]:
        record: dict[str, Any] = {
            "data_id": row.data_id,
            "prompt": row.text,
            "response": self._text_behind(row.prompt_ids, trajectory.response_ids),
            "prompt_ids": row.prompt_ids,
            "response_ids": trajectory.response_ids,
        }
        if not self.options.responses_only:
            record |= {"states": trajectory.states, "is_greedy": trajectory.is_greedy}
        if self.options.augment:
            generator = np.random.default_rng((self.options.seed, row.index, 1))  # apart from the first drafts'
            length, size = len(trajectory.response_ids), self.options.block_size
            record["augmented_states"] = [
                augment_states(states, min(length - start, size), generator)
                for states, start in zip(trajectory.states, range(0, length, size))
            ]
        return record

    def _text_behind(self, prompt: list[int], response: list[int]) -> str:
        """The response as it goes on with the prompt: by itself some tokenizers would drop a space before it."""
        before, whole = self._text(prompt), self._text(prompt + response)
        return whole[len(before) :] if whole.startswith(before) else self._text(response)

    def _text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def _as_they_are(
    rows: list[PromptRow], responses: Mapping[int, list[int]]
) -> Iterator[list[tuple[PromptRow, Trajectory]]]:
    """Prompts and responses without states, a batch at a time."""
    for batch in split_batches(rows, _ROWS_AT_ONCE):
        yield [(row, Trajectory(responses[row.index], is_greedy=True, states=[])) for row in batch]


def to_parquet(table: pa.Table, notes: Mapping[str, Any]) -> bytes:
    """The content of the file of a shard, with what it says of itself: `shard`, `counts` and `statistics`."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", compression_level=_COMPRESSION) as writer:
        if len(table):  # `datasets` cannot read a part without rows, but a file without parts it can
            writer.write_table(table)
        writer.add_key_value_metadata({_NOTES: json.dumps(notes, sort_keys=True)})
    return sink.getvalue()


def read_notes(content: bytes, number: int) -> tuple[int, dict[str, Any]]:
    """
    The number of records in the content of a file, and what was given to `to_parquet`.

    Raises:
        ValueError: if it is not the file of that shard.
    """
    try:
        metadata = pq.read_metadata(io.BytesIO(content))
        notes = json.loads(metadata.metadata[_NOTES.encode()])
        if not all(isinstance(count, int) for count in notes["counts"].values()):
            raise TypeError(f"its counts are {notes['counts']!r}")
        for values in notes["statistics"].values():
            TrajectoryStatistics.from_dict(values)
    except (pa.ArrowException, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if notes.get("shard") != number:
        raise ValueError(f"it is shard {notes.get('shard')!r}")
    return metadata.num_rows, notes


def count_dropped(counts: Mapping[str, int]) -> dict[str, int]:
    """Dropped prompts by reason, out of all counts of a collection; reasons that never were are left out."""
    return {reason: count for reason, count in counts.items() if count and reason not in _OF_KEPT}


def format_near_ties(counts: Mapping[str, int]) -> str:
    """How many tokens of a collection stand at near ties: a sentence after a space, or nothing if there are none."""
    number, responses = counts.get("near_ties", 0), counts.get("kept_near_ties", 0)
    if not number:
        return ""
    noun = "near tie counts" if number == 1 else "near ties count"
    return f" {number:,} {noun} as greedy, in {responses:,} of the responses."


def explain_none_left(num_prompts: int, counts: Mapping[str, int]) -> str:
    """Say why a collection has no records."""
    reasons = ", ".join(f"{count} for `{reason}`" for reason, count in counts.items())
    advice = [text for reason, text in ADVICE.items() if counts.get(reason)]
    advice = advice or ["Loosen the `CleaningRules`, or look at what the model answers."]
    return f"No record is left of {num_prompts} prompts: {reasons} were dropped. {' '.join(advice)}"
