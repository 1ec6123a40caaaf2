"""The model's side of the loop: what is fed in each forward, and the mask and positions that go with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import ModelOutput

from . import caches
from .blocks import draw_context_tokens, next_draft
from .memory import choose_memory
from .static import make_static_memory
from .support import check_model, check_model_inputs, check_positions


# The output does not depend on the first guess, only the number of forwards does: keep that repeatable.
_DRAFT_SEED = 0
# Attributes with one column a token that is fed next.
_FED_COLUMNS = ("_new_ids", "_new_positions", "_new_token_types")


class Window:
    """
    The sliding window: for each row the committed tokens that the model does not remember, and the draft behind them.

    Args:
        model (`transformers.PreTrainedModel`): the model to call.
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): prompts, padded on the left.
        model_kwargs (`dict`): model inputs as the host prepared them.
        max_block_size (`int`): most positions checked in a forward.
        num_new_tokens (`int`): longest response.
        compiles (`bool`): whether forwards shall run as a compiled graph of fixed shape, where the model can.
        context_ids (`torch.LongTensor` of shape `(batch_size, context_length)`, *optional*): tokens to draw the first
            draft from; by default the prompts.
        num_given (`int`, *optional*): length of the prompt with its cached part, where `input_ids` holds only the
            part that is new.
        is_user_cache (`bool`): whether `past_key_values` comes from the user.

    Attributes:
        rows (`list[int]`): rows of the batch that are still decoded.
        memory (`Memory`): what the model remembers; another one may show in the prefill.

    Raises:
        ValueError: for a model, a cache or a model input that Jacobi decoding cannot take, or `past_key_values` that
            already hold the whole prompt.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        *,
        max_block_size: int,
        num_new_tokens: int,
        compiles: bool = False,
        context_ids: torch.Tensor | None = None,
        num_given: int | None = None,
        is_user_cache: bool = False,
    ):
        self.model = model
        self.rows = list(range(input_ids.shape[0]))
        self._prefix = "decoder_" if model.config.is_encoder_decoder else ""
        # Inputs that grow with the sequence and are extended here.
        names = [self._prefix + "attention_mask", self._prefix + "position_ids", "token_type_ids", "inputs_embeds"]
        inputs = {name: model_kwargs.pop(name, None) for name in names}
        check_model(model, len(self.rows), is_padded=inputs[names[0]] is not None)
        embeds = inputs["inputs_embeds"]
        num_prompt = input_ids.shape[1] if embeds is None else embeds.shape[1]
        static = None
        if compiles:
            max_columns = num_prompt + num_new_tokens + max_block_size
            static = make_static_memory(model, model_kwargs, len(self.rows), max_columns, is_user_cache)
        self.memory = static or choose_memory(model, model_kwargs, len(self.rows), is_user_cache)
        check_model_inputs(model, inputs, model_kwargs)
        self._kwargs = model_kwargs

        num_cached = self.memory.num_cached
        num_new = num_prompt - num_cached if num_given in (None, num_prompt) else num_prompt
        if num_new < 1:
            raise ValueError(
                f"`past_key_values` already hold {num_cached} tokens and the prompt has {num_prompt}: nothing is left "
                "to feed. Pass at least one token that is not in the cache, or crop the cache."
            )
        self._num_positions = num_cached + num_new + num_new_tokens
        check_positions(model, self._num_positions)
        # What is fed next, one column a token that the model does not remember; at last the anchor.
        self._new_ids = input_ids[:, -num_new:]
        self._new_embeds = None if embeds is None else embeds[:, -num_new:]
        self._new_positions = _last_columns(inputs[self._prefix + "position_ids"], num_new, len(self.rows))
        self._new_token_types = _last_columns(inputs["token_type_ids"], num_new, len(self.rows))
        # Of remembered and new columns; `None` while there is no padding.
        self._mask = inputs[self._prefix + "attention_mask"]
        self._draft_length = 0  # of the last forward
        self._is_prefill = True

        self._max_draft_length = max_block_size - 1
        self._filler_ids = input_ids.new_empty((len(self.rows), 0))
        self._predicted: tuple[torch.Tensor, torch.Tensor] | None = None
        # Token ids cannot follow a prompt of embeddings.
        self._can_draft = embeds is None and self.memory.drafts_in_prefill
        if context_ids is not None:
            self._draw_filler(context_ids, None)
        elif embeds is None:
            self._draw_filler(input_ids, None if self._mask is None else self._mask[:, -num_prompt:])

    def draft(self, length: int) -> torch.Tensor:
        """
        The current guess of what follows.

        Args:
            length (`int`): most tokens that are wanted of it.

        Returns:
            `torch.LongTensor` of shape `(num_rows, draft_length)`: of no tokens where a draft would cost more than it
            brings.
        """
        is_overdue = self.memory.replays and self._new_ids.shape[1] > length + 1
        length = min(length, self._max_draft_length) if self._can_draft and not is_overdue else 0
        if length == 0:
            return self._new_ids.new_empty((len(self.rows), 0))
        if self._predicted is None:
            return self._filler_ids[:, :length]
        return next_draft(*self._predicted, self._filler_ids[:, :length])

    def forward(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """
        Run the model over what it does not remember and a draft.

        Args:
            draft_ids (`torch.LongTensor` of shape `(num_rows, draft_length)`): a return value of `draft`.

        Returns:
            `torch.Tensor` of shape `(num_rows, draft_length + 1, vocab_size)`: logits from the anchor on.
        """
        draft_length = self._draft_length = draft_ids.shape[1]
        if draft_length:
            self._append(draft_ids)
        self.memory.begin(draft_length)
        kwargs = {**self._kwargs, **self.memory.model_inputs}
        if self._new_positions is not None:
            kwargs[self._prefix + "position_ids"] = self._new_positions
        if self._new_token_types is not None:
            kwargs["token_type_ids"] = self._new_token_types
        if self._mask is not None:
            kwargs[self._prefix + "attention_mask"] = self._mask
        if self._new_embeds is not None:
            kwargs["inputs_embeds"] = self._new_embeds
        inputs = self.model.prepare_inputs_for_generation(self._new_ids, is_first_iteration=self._is_prefill, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = draft_length + 1  # some models put their own default here
        return self.memory.call(self.model, **inputs, return_dict=True).logits[:, -(draft_length + 1) :]

    def advance(self, predicted_ids: torch.Tensor, counts: list[int], finished: list[bool]) -> None:
        """
        Slide each row's window behind its committed tokens, let go of rejected tokens and of finished rows.

        Args:
            predicted_ids (`torch.LongTensor` of shape `(num_rows, draft_length + 1)`): tokens of the last forward.
            counts (`list[int]`): how many of them were committed in each row.
            finished (`list[bool]`): which of the rows take no more tokens.
        """
        if self._is_prefill:
            self.memory = self.memory.after_prefill()
        left = [index for index, is_finished in enumerate(finished) if not is_finished]
        # The bonus token was committed but not fed: a row that took all tokens has rejected none. A row that leaves
        # must not keep the others' columns from going.
        most = max(counts[index] for index in left or range(len(counts)))
        is_going_on = [not left or not is_finished for is_finished in finished]
        kept = [count if goes_on else most for count, goes_on in zip(counts, is_going_on)]
        is_remembered = self._forget([self._draft_length + 1 - count for count in kept])
        if not left:
            self.rows = []
            return
        if len(left) < len(self.rows):
            self._select(torch.tensor(left, device=predicted_ids.device), left)
            predicted_ids, counts = predicted_ids[left], [counts[index] for index in left]
        committed = torch.tensor(counts, device=predicted_ids.device)
        self._append(predicted_ids.gather(1, committed[:, None] - 1))
        if is_remembered:
            for name in _FED_COLUMNS:
                self._replace(name, lambda columns: columns[:, -1:])
        if self._new_embeds is not None:
            self._new_embeds = None
            self._draw_filler(predicted_ids, None)
        self._predicted = (predicted_ids, committed)
        self._can_draft = True
        self._is_prefill = False

    def _append(self, ids: torch.Tensor) -> None:
        """Have these tokens fed too."""
        length = ids.shape[1]
        self._new_ids = torch.cat([self._new_ids, ids], dim=1)
        if self._new_positions is not None:
            ahead = torch.arange(1, length + 1, device=self._new_positions.device)
            # Behind the end of the text nothing is committed, but a fixed shape has it fed.
            positions = (self._new_positions[:, -1:] + ahead).clamp(max=self._num_positions - 1)
            self._new_positions = torch.cat([self._new_positions, positions], dim=1)
        if self._new_token_types is not None:
            ahead = self._new_token_types[:, -1:].expand(-1, length)
            self._new_token_types = torch.cat([self._new_token_types, ahead], dim=1)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones((len(self.rows), length))], dim=1)

    def _forget(self, num_rejected: list[int]) -> bool:
        """Take the rejected tokens out; says whether the model remembers the others."""
        if self._mask is None and min(num_rejected) < max(num_rejected):
            num_columns = self.memory.num_cached if self.memory.cache is not None else self._new_ids.shape[1]
            self._mask = self._new_ids.new_ones((len(num_rejected), num_columns))
        for name in ("_mask", *_FED_COLUMNS):
            self._replace(name, lambda columns: caches.roll_back_columns(columns, num_rejected, fill=0))
        return self.memory.settle(num_rejected)

    def _replace(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        value = getattr(self, name)
        if value is not None:
            setattr(self, name, change(value))

    def _select(self, indices: torch.Tensor, left: list[int]) -> None:
        self.rows = [self.rows[index] for index in left]
        self.memory.select(indices)
        for name in ("_mask", *_FED_COLUMNS, "_new_embeds", "_filler_ids"):
            self._replace(name, lambda value: value[indices.to(value.device)])
        self._kwargs = {name: _rows_of(value, indices) for name, value in self._kwargs.items()}

    def _draw_filler(self, context_ids: torch.Tensor, context_mask: torch.Tensor | None) -> None:
        if context_mask is None:
            context_mask = torch.ones_like(context_ids)
        # A row that is all padding has no context to draw from, but any guess will do.
        context_mask = torch.where(context_mask.any(-1, keepdim=True), context_mask, 1)
        generator = torch.Generator().manual_seed(_DRAFT_SEED)
        self._filler_ids = draw_context_tokens(context_ids, context_mask, self._max_draft_length, generator)


def _last_columns(values: torch.Tensor | None, length: int, batch_size: int) -> torch.Tensor | None:
    return None if values is None else values[:, -length:].expand(batch_size, -1)


def _rows_of(value: Any, indices: torch.Tensor) -> Any:
    """Rows of a model input that is the same in every forward: what the encoder has said, and its mask."""
    if isinstance(value, torch.Tensor):
        return value[indices.to(value.device)]
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _rows_of(part, indices) for name, part in value.items()})
    return value
