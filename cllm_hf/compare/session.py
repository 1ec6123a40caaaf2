"""What `cllm compare` compares: the models that are loaded, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .._host import base_model_of, input_device
from ..blocks.drafter import find_drafter
from ..loading import load_tokenizer
from ..options import AUTOREGRESSIVE, JACOBI, LOSSLESS, check_block_size
from ..process import quiet_hosts
from .arguments import DEFAULT_TOKENS, MODES
from .race import Race, Way


_WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """What is asked: a prompt, and how it is decoded."""

    prompt: str
    mode: str | None = None  # by default lossless with an adapter that drafts, else Jacobi
    block_size: int | str = "auto"
    max_new_tokens: int = DEFAULT_TOKENS
    temperature: float = 0.0  # 0 for greedy
    is_chat: bool | None = None  # whether it goes through the chat template; by default where there is one

    @property
    def is_sampled(self) -> bool:
        return self.temperature > 0

    def check(self) -> None:
        """Raise ValueError for what cannot be asked of any model."""
        if not self.prompt.strip():
            raise ValueError("`prompt` must hold text, got none. Write what the model is to answer or to go on with.")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        check_block_size(self.block_size, "block_size", allows_auto=True)
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}. Typical are 64 to 512.")
        if not 0 <= self.temperature <= 5:
            raise ValueError(f"`temperature` must be from 0 (greedy) to 5, got {self.temperature}.")


@dataclass
class Session:
    """Models by their names, the last one of each side kept, and the races that are run with them."""

    load: Callable[[str], Any]
    _models: dict[str, Any] = field(default_factory=dict)
    _warm: set[tuple[int, str, str]] = field(default_factory=set)

    def prepare(self, question: Question, model: str, target: str | None = None) -> Race:
        """
        Load what is not loaded yet, and set the race up: `generate()` of the target model on the left.

        Raises ValueError for a question that cannot be asked, and OSError if there is no such model.
        """
        question.check()
        with quiet_hosts(keep_bars=True):
            right = self._get(model, keep={model, target})
            left = right if target in (None, "", model) else self._get(str(target), keep={model, target})
            tokenizer = load_tokenizer(model)
        mode = question.mode or (LOSSLESS if find_drafter(base_model_of(right)) is not None else JACOBI)
        shared: dict[str, Any] = {"max_new_tokens": question.max_new_tokens, "do_sample": question.is_sampled}
        if question.is_sampled:
            shared["temperature"] = question.temperature
        ways = [
            Way("generate()", left, {"decoding": AUTOREGRESSIVE, **shared}),
            Way(mode, right, {"decoding": mode, "jacobi_block_size": question.block_size, **shared}),
        ]
        prompt_ids = self._tokenize(question, tokenizer)
        for way in ways:
            self._warm_up(way, prompt_ids)
        return Race(ways, prompt_ids, tokenizer)

    def _get(self, name: str, keep: set[str | None]) -> Any:
        if name not in self._models:
            self._models = {other: model for other, model in self._models.items() if other in keep}
            self._models[name] = self.load(name)
        return self._models[name]

    def _warm_up(self, way: Way, prompt_ids: list[int]) -> None:
        """The first call of a kind takes longer than all others, which belongs to no side's time."""
        key = (id(way.model), str(way.options["decoding"]), str(way.options.get("jacobi_block_size")))
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
