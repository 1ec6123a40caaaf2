"""
One prompt decoded in two ways at once, each timed as if it were alone: a `Session` loads the models, and sets up a
`Race` for each `Question`.

The sides take turns, a forward pass at a time: while one runs, the other waits, and its clock stands. Whoever is
behind by its own clock goes on. What is seen is thus a race at true relative speed, on a device that never does two
things at once.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .._host import base_model_of, input_device
from ..blocks.drafter import find_drafter
from ..blocks.limits import check_room
from ..blocks.parting import describe_parting, find_parting
from ..loading import check_same_tokenizer, load_tokenizer
from ..names import Name
from ..options import AUTOREGRESSIVE, JACOBI, LOSSLESS, JacobiOptions, check_block_size
from ..process import quiet_hosts


MODES = (JACOBI, LOSSLESS)
DEFAULT_TOKENS = 160
_WARM_UP_TOKENS = 24
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a character whose last bytes are missing


@dataclass(frozen=True)
class Way:
    """A side of a race: a model, and the options of `generate` that it decodes with."""

    name: str
    model: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What is to be seen of a side."""

    name: str
    pieces: list[tuple[str, int]]  # text that each forward pass has brought, and how many tokens that is
    token_ids: list[int]
    num_forwards: int
    seconds: float
    block: list[str]  # draft that the last forward pass has checked, token by token
    num_accepted: int  # leading tokens of it that were right
    is_done: bool
    problem: str | None = None  # why it could not go on
    is_stopped: bool = False  # whether it has ended before its text did

    @property
    def tokens_per_forward(self) -> float:
        return len(self.token_ids) / self.num_forwards if self.num_forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0


class _Stopped(Exception):
    """Ends a call of `generate` from inside."""


class Race:
    """
    Decodes a prompt in several ways.

    Args:
        ways (`Sequence[Way]`): the sides. Those of one model get the same weights in modules of their own.
        prompt_ids (`Sequence[int]`): tokens of the prompt.
        tokenizer (`transformers.PreTrainedTokenizerBase`): of all models.
    """

    def __init__(self, ways: Sequence[Way], prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase):
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._running: _Side | None = None
        self._is_stopped = False
        models: list[Any] = []
        for way in ways:
            models.append(_twin(way.model) if any(way.model is model for model in models) else way.model)
        self._ways, self._prompt_ids = list(ways), list(prompt_ids)
        self._sides = [
            _Side(self, way, model, list(prompt_ids), tokenizer) for way, model in zip(ways, models, strict=True)
        ]

    def watch(self, interval: float = 0.1) -> Iterator[list[Snapshot]]:
        """Run it, and tell how it stands every so many seconds, and at its end."""
        threads = self._threads = [threading.Thread(target=side.run, daemon=True) for side in self._sides]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                yield [side.snapshot() for side in self._sides]
                threads[0 if threads[0].is_alive() else -1].join(interval)
            yield [side.snapshot() for side in self._sides]
        finally:  # also when nobody watches any more
            self.end()

    def stop(self) -> None:
        """End it at the next forward pass; what has been decoded stays."""
        with self._change:
            self._is_stopped = True
            self._change.notify_all()

    def end(self) -> None:
        """Stop it, and wait until nothing of it runs any more."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def compare(self, first: Snapshot, second: Snapshot) -> list[str]:
        """What is to be said of two sides that have come to their ends; the first is the yardstick."""
        if first.problem or second.problem or not (first.is_done and second.is_done):
            return []
        lines = []
        if first.tokens_per_second and second.tokens_per_second:
            ratio = second.tokens_per_second / first.tokens_per_second
            figures = f"{second.tokens_per_forward:.2f} tokens per forward pass, {ratio:.2f}x as fast."
            lines.append(f"{second.name}: {figures}")
        is_stopped = first.is_stopped or second.is_stopped
        # Of a text that was stopped, nothing is known beyond its end.
        length = min(len(first.token_ids), len(second.token_ids)) if is_stopped else None
        said = self._compare_texts(first.token_ids[:length], second.token_ids[:length])
        return [*lines, f"Stopped. Up to here: {said}" if is_stopped else said]

    def _compare_texts(self, first: list[int], second: list[int]) -> str:
        if first == second:
            return f"The texts are equal: {len(first)} of {len(first)} tokens."
        ours, theirs = self._ways[:2]
        is_one_model = ours.model is theirs.model or theirs.options.get("decoding") == LOSSLESS
        if any(way.options.get("do_sample") for way in (ours, theirs)):
            whose = "of the same distribution" if is_one_model else "of two models"
            return f"Both are samples {whose}, so the texts differ."
        parting = find_parting(ours.model, self._prompt_ids, first, second) if is_one_model else None
        if parting is not None:
            return describe_parting(parting)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))
        return f"The texts differ from token {same + 1} on. They are of two models."

    def take_turn(self, side: _Side) -> None:
        """Wait, before a forward pass, until no other side runs or is behind."""
        with self._change:
            self._pause(side)
            self._change.wait_for(lambda: self._is_stopped or (self._running is None and self._is_behind(side)))
            if self._is_stopped:
                raise _Stopped
            self._running, side.since = side, time.perf_counter()

    def leave(self, side: _Side) -> None:
        """Take a side that has ended out of the race."""
        with self._change:
            self._pause(side)
            side.is_done = True
            self._change.notify_all()

    def _pause(self, side: _Side) -> None:
        if self._running is side:
            side.seconds += time.perf_counter() - side.since
            self._running = None
            self._change.notify_all()

    def _is_behind(self, side: _Side) -> bool:
        return all(side.seconds <= other.seconds for other in self._sides if not other.is_done)


class _Side(BaseStreamer):
    """One side, in a thread of its own; also the streamer that its tokens come to."""

    def __init__(self, race: Race, way: Way, model: Any, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase):
        self._race, self._way, self._model = race, way, model
        self._prompt_ids, self._tokenizer = prompt_ids, tokenizer
        self._gains: list[int] = []  # tokens of each forward pass
        self._token_ids: list[int] = []
        self._fed: list[int] = []
        self._pieces = Pieces(tokenizer)
        self._problem: str | None = None
        self._lock = threading.Lock()
        self.seconds, self.since = 0.0, 0.0
        self.is_done = self.is_stopped = False

    def run(self) -> None:
        base = base_model_of(self._model)
        handle = base.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        ids = torch.tensor([self._prompt_ids], device=input_device(base))
        try:
            self._race.take_turn(self)
            self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=self, **self._way.options
            )
        except _Stopped:
            self.is_stopped = True
        except Exception as error:  # whatever it is, it belongs on the screen
            self._problem = str(error) or type(error).__name__
        finally:
            handle.remove()
            self._race.leave(self)

    def _before_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        self._race.take_turn(self)
        fed = kwargs.get("input_ids")
        with self._lock:
            # The prefill holds the prompt; its draft is nothing but prompt tokens at random.
            self._fed = [] if not self._gains or fed is None else _verified(fed, kwargs.get("position_ids"))
            self._gains.append(0)

    def put(self, value: torch.Tensor) -> None:
        """Take tokens; the first that come are those of the prompt."""
        if not self._gains:
            return
        with self._lock:
            self._token_ids += value.flatten().tolist()
            self._gains[-1] += value.numel()

    def end(self) -> None:
        """Nothing is held back."""

    def snapshot(self) -> Snapshot:
        """What has come so far."""
        with self._lock:
            token_ids, gains, fed, is_done = list(self._token_ids), list(self._gains), self._fed, self.is_done
        accepted = max(gains[-1] - 1, 0) if gains else 0
        return Snapshot(
            name=self._way.name,
            pieces=self._pieces.of(token_ids, gains, is_done),
            token_ids=token_ids,
            num_forwards=len(gains),
            seconds=self.seconds,
            block=[str(self._tokenizer.decode([token])) for token in fed[1:]],
            num_accepted=accepted,
            is_done=is_done,
            problem=self._problem,
            is_stopped=self.is_stopped,
        )


def _verified(fed: torch.Tensor, positions: torch.Tensor | None) -> list[int]:
    """The anchor and the first branch after it: where an adapter drafts on, positions begin again."""
    ids = fed[0].tolist()
    if positions is None:
        return ids
    steps = positions.flatten()[: len(ids)].diff().tolist()
    return ids[: 1 + sum(1 for _ in takewhile(lambda step: step == 1, steps))]


class Pieces:
    """
    A growing text, split into what each forward pass has brought. A character that is not whole waits for its rest.

    What earlier forward passes have brought is not decoded again: that would take time from the decoding itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._settled: list[tuple[str, int]] = []  # text of each forward pass but the last, and its number of tokens
        self._num_tokens = self._num_shown = 0  # in those: tokens, and characters

    def of(self, token_ids: list[int], gains: Sequence[int], is_done: bool) -> list[tuple[str, int]]:
        """The pieces of a text that has grown; of `gains`, the tokens of each forward pass, the last may grow too."""
        for gain in gains[len(self._settled) : -1]:
            self._num_tokens += gain
            text = self._decode(token_ids[: self._num_tokens])
            self._settled.append((text[self._num_shown :], gain))
            self._num_shown = max(self._num_shown, len(text))
        last = self._decode(token_ids, keep_unfinished=is_done)[self._num_shown :]
        return [piece for piece in (*self._settled, *((last, gain) for gain in gains[-1:])) if piece[1]]

    def _decode(self, token_ids: list[int], keep_unfinished: bool = False) -> str:
        text = str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        return text if keep_unfinished else text.rstrip(_UNFINISHED)


def _twin(model: Any) -> Any:
    """The same weights in modules of their own, since hooks and gates of one side must not be those of the other."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@dataclass(frozen=True)
class Question:
    """What is asked: a prompt, and how it is decoded."""

    prompt: str
    mode: str | None = None  # by default lossless with an adapter that drafts, else Jacobi
    block_size: int | str = "auto"
    max_new_tokens: int = DEFAULT_TOKENS
    temperature: float = 0.0  # 0 for greedy
    is_chat: bool | None = None  # whether it goes through the chat template; by default where there is one
    candidates: int = 0  # further guesses in each forward pass

    @property
    def is_sampled(self) -> bool:
        return self.temperature > 0

    def check(self) -> None:
        """Raise ValueError for what cannot be asked of any model."""
        if not self.prompt.strip():
            raise ValueError("`prompt` must hold text, got none. Write what the model is to answer or to go on with.")
        self.check_options()

    def check_options(self) -> None:
        """The same for all but the prompt."""
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        check_block_size(self.block_size, "block_size", allows_auto=True)
        JacobiOptions(candidates=self.candidates)
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}. Typical are 64 to 512.")
        if not 0 <= self.temperature <= 5:
            raise ValueError(f"`temperature` must be from 0 (greedy) to 5, got {self.temperature}.")


@dataclass
class Session:
    """Models by their names, the last one of each side kept, and the races that are run with them."""

    load: Callable[[str], Any]
    _models: dict[str, Any] = field(default_factory=dict)
    _warm: set[tuple[int, str]] = field(default_factory=set)

    def prepare(self, question: Question, model: str, target: str | None = None) -> Race:
        """
        Load what is not loaded yet, and set the race up: `generate()` of the target model on the left.

        Raises ValueError for a question that cannot be asked, and OSError if there is no such model.
        """
        question.check()
        for option, name in (("model", model), ("target", target or model)):
            Name.find(name).check(option, "model")
        with quiet_hosts(keep_bars=True):
            right = self._get(model, keep={model, target})
            left = right if target in (None, "", model) else self._get(str(target), keep={model, target})
            tokenizer = load_tokenizer(model)
            if left is not right:
                check_same_tokenizer(str(target), tokenizer, question.prompt, "other model")
        mode = question.mode or (LOSSLESS if find_drafter(base_model_of(right)) is not None else JACOBI)
        shared: dict[str, Any] = {"max_new_tokens": question.max_new_tokens, "do_sample": question.is_sampled}
        own = {
            "decoding": mode,
            "jacobi_block_size": question.block_size,
            "jacobi_candidates": question.candidates,
            "jacobi_compile": False,  # as the other side
        }
        if question.is_sampled:
            shared["temperature"] = question.temperature
        ways = [
            Way("generate()", left, {"decoding": AUTOREGRESSIVE, **shared}),
            Way(mode, right, {**own, **shared}),
        ]
        prompt_ids = self._tokenize(question, tokenizer)
        for way in ways:
            check_room(base_model_of(way.model), len(prompt_ids), question.max_new_tokens)
        for way in ways:
            self._warm_up(way, prompt_ids)
        return Race(ways, prompt_ids, tokenizer)

    def _get(self, name: str, keep: set[str | None]) -> Any:
        if name not in self._models:
            self._models = {other: model for other, model in self._models.items() if other in keep}
            self._warm.clear()  # a new model may have the identity of one that was let go
            self._models[name] = self.load(name)
        return self._models[name]

    def _warm_up(self, way: Way, prompt_ids: list[int]) -> None:
        """The first call of a kind takes longer than all others, which belongs to no side's time."""
        kind = [way.options.get(name) for name in ("decoding", "jacobi_block_size", "jacobi_candidates")]
        key = (id(way.model), str(kind))
        if key not in self._warm:
            ids = torch.tensor([prompt_ids], device=input_device(base_model_of(way.model)))
            options = {**way.options, "max_new_tokens": min(_WARM_UP_TOKENS, way.options["max_new_tokens"])}
            with quiet_hosts():
                way.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            self._warm.add(key)

    @staticmethod
    def _tokenize(question: Question, tokenizer: Any) -> list[int]:
        is_chat = bool(tokenizer.chat_template) if question.is_chat is None else question.is_chat
        if not is_chat:
            return list(tokenizer(question.prompt)["input_ids"])
        if not tokenizer.chat_template:
            raise ValueError("A chat needs a tokenizer with a chat template, and this one has none. Ask without it.")
        messages = [{"role": "user", "content": question.prompt}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
