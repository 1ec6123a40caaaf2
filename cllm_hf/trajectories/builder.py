"""`TrajectoryBuilder`: from prompts to a dataset of trajectories."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .._host import base_model_of
from ..decoding.options import check_block_size
from ..packing import check_packable
from .collector import collect_states, draw_first_states
from .schema import FEATURES, end_points


logger = logging.getLogger(__name__)
Prompt = str | Sequence[dict[str, str]]


class TrajectoryBuilder:
    """
    Records how blocks of a model's own greedy responses converge under Jacobi iteration (CLLM, arXiv 2403.00835).

    The responses are decoded first, in batches. Then all blocks of a batch of responses iterate together in one packed
    forward an iteration, from first drafts drawn at random from the prompt's tokens.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): the target model.
        processing_class (`transformers.PreTrainedTokenizerBase`): its tokenizer.
        block_size (`int`): tokens of a block.
        max_new_tokens (`int`): longest response, in tokens; longer ones are cut there.
        seed (`int`): of the first drafts.
        batch_size (`int`): responses decoded and iterated together.
        show_progress (`bool`): whether to draw progress bars.

    Attributes:
        counts (`collections.Counter`): of the last `build`: `"kept"`, and dropped records by reason: `"mismatch"`
            counts responses whose blocks do not end in the response, as near ties of the two best logits can cause.

    Raises:
        ValueError: for a block size or number of tokens below 1, or a model whose blocks cannot be packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        block_size: int = 16,
        max_new_tokens: int = 512,
        seed: int = 0,
        batch_size: int = 32,
        show_progress: bool = True,
    ):
        self.block_size = check_block_size(block_size, "block_size")
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        # The layers of an adapter live in its base model; the wrapper has nothing else that is needed here.
        self.model: Any = base_model_of(model)
        check_packable(self.model)
        self.processing_class = processing_class
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.batch_size = batch_size
        self.show_progress = show_progress
        self.counts: Counter[str] = Counter()
        self._eos_ids = _eos_ids(self.model, processing_class)
        self._pad_id = processing_class.pad_token_id
        if self._pad_id is None:
            self._pad_id = self._eos_ids[0] if self._eos_ids else 0

    def build(self, prompts: Iterable[Prompt]) -> Dataset:
        """
        Decode a response to every prompt and record the trajectories of its blocks.

        Args:
            prompts (`Iterable[str | Sequence[dict]]`): texts, or chat messages (`{"role": .., "content": ..}`), which
                the tokenizer's chat template turns into text.

        Returns:
            `datasets.Dataset`: one record a response, in the order of the prompts, with `cllm_hf.FEATURES`.

        Raises:
            ValueError: if there are no prompts, a prompt has no tokens, prompt and response do not fit into the
                model's positions, or no record is left.
        """
        if isinstance(prompts, str):
            raise ValueError(f"`prompts` must be a list of prompts, got the text {prompts[:60]!r}. Pass it in a list.")
        texts, prompt_ids = self._tokenize(list(prompts))
        self.counts = Counter()
        # Prompts of similar length share a batch, so that little padding is computed.
        order = sorted(range(len(texts)), key=lambda index: len(prompt_ids[index]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        records: dict[int, dict[str, Any]] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=len(texts), desc="Collecting", unit="response", disable=not self.show_progress) as bar:
                for batch in batches:
                    records.update(self._collect(batch, texts, prompt_ids))
                    bar.update(len(batch))
                    bar.set_postfix(dropped=self.counts["mismatch"])
        finally:
            self.model.train(was_training)
        if not records:
            raise ValueError(
                f"None of the {len(texts)} responses gave a trajectory that ends in it. Collect in float32 "
                "(`model.float()`), or check that the model is not one that cannot be packed."
            )
        if self.counts["mismatch"]:
            logger.warning(
                "Dropped %d of %d responses that their blocks do not end in.", self.counts["mismatch"], len(texts)
            )
        return Dataset.from_list([records[index] for index in sorted(records)], features=FEATURES)

    def _collect(
        self, batch: list[int], texts: list[str], all_prompt_ids: list[list[int]]
    ) -> dict[int, dict[str, Any]]:
        prompts = [all_prompt_ids[index] for index in batch]
        responses = self._respond(prompts)
        drafts = [
            draw_first_states(prompt, len(response), self.block_size, self._pad_id, (self.seed, index))
            for index, prompt, response in zip(batch, prompts, responses)
        ]
        records = {}
        trajectories = collect_states(self.model, prompts, responses, drafts, self._pad_id)
        for index, prompt, response, states in zip(batch, prompts, responses, trajectories):
            if end_points(states, len(response)) != response:
                self.counts["mismatch"] += 1
                continue
            self.counts["kept"] += 1
            records[index] = {
                "data_id": str(index),
                "prompt": texts[index],
                "response": self.processing_class.decode(response, skip_special_tokens=True),
                "prompt_ids": prompt,
                "response_ids": response,
                "states": states,
            }
        return records

    def _tokenize(self, prompts: list[Prompt]) -> tuple[list[str], list[list[int]]]:
        if not prompts:
            raise ValueError("`prompts` must hold at least one prompt, got none.")
        texts, ids = [], []
        for prompt in prompts:
            if isinstance(prompt, str):
                texts.append(prompt)
                ids.append(list(self.processing_class(prompt)["input_ids"]))
            elif not isinstance(prompt, Sequence) or not all(isinstance(message, dict) for message in prompt):
                raise ValueError(
                    "A prompt must be a text or a list of chat messages, got "
                    f"{prompt!r}. Pass a column of a dataset, such as `dataset['question']`."
                )
            else:
                messages: Any = list(prompt)
                text = self.processing_class.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                # The template already holds the special tokens.
                texts.append(str(text))
                ids.append(list(self.processing_class(str(text), add_special_tokens=False)["input_ids"]))
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for text, token_ids in zip(texts, ids):
            if not token_ids:
                raise ValueError(f"Every prompt must have at least one token, got {text!r}.")
            if limit is not None and len(token_ids) + self.max_new_tokens > limit:
                raise ValueError(
                    f"A prompt of {len(token_ids)} tokens and `max_new_tokens={self.max_new_tokens}` do not fit into "
                    f"the model's {limit} positions: {text[:60]!r}. Drop such prompts or lower `max_new_tokens`."
                )
        return texts, ids

    def _respond(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy responses, each up to its stop token."""
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[self._pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._eos_ids or None,
            pad_token_id=self._pad_id,
        )
        device = self.model.device
        with _without_defaults(self.model):
            output = self.model.generate(
                input_ids.to(device), attention_mask=mask.to(device), generation_config=options
            )
        responses = output[:, longest:].tolist()
        return [_until_stop(response, self._eos_ids) for response in responses]


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Leave out the model's own generation defaults: a fixed point is the plain argmax, without any processor."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _eos_ids(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> list[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = processing_class.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _until_stop(response: list[int], eos_ids: list[int]) -> list[int]:
    stops = [position for position, token in enumerate(response) if token in eos_ids]
    return response[: stops[0] + 1] if stops else response
