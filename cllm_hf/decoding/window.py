"""The model's side of the loop: what is fed in each forward, and the mask and positions that go with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from ..blocks.rules import draw_context_tokens, next_draft
from ..blocks.support import check_embeds, check_model, check_model_inputs, check_positions, needs_same_length
from . import caches
from .memory import choose_memory
from .static import make_static_memory


# The output does not depend on the first guess, only the number of forwards does: keep that repeatable.
_DRAFT_SEED = 0
# Attributes with one column a token that is fed next.
_FED_COLUMNS = ("_ids", "_positions", "_token_types")


class Window:
    """
    The sliding window: for each row the committed tokens that the model does not remember, and the draft behind them.

    Args:
        model (`transformers.PreTrainedModel`): the model to call.
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): prompts, padded on the left.
        model_kwargs (`dict`): model inputs as the host prepared them.
        max_block_size (`int`): most positions checked in a forward.
        num_new_tokens (`int`): longest response.
        compile_options (`transformers.GenerationConfig`, *optional*): has forwards run as a compiled graph of fixed
            shape, where the model can.
        context_ids (`torch.LongTensor` of shape `(batch_size, context_length)`, *optional*): tokens to draw the first
            draft from; by default the prompts.
        num_given (`int`, *optional*): length of the prompt with its cached part, where `input_ids` holds only the
            part that is new.
        is_user_cache (`bool`): whether `past_key_values` comes from the user.

    Attributes:
        rows (`list[int]`): rows of the batch that are still decoded.
        memory (`Memory`): what the model remembers; another one may show in the prefill.
        same_length (`bool`): whether all rows must commit equally many tokens.

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
        compile_options: GenerationConfig | None = None,
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
        if compile_options is not None:
            max_columns = num_prompt + num_new_tokens + max_block_size
            static = make_static_memory(
                model, model_kwargs, len(self.rows), max_columns, is_user_cache, compile_options
            )
        self.memory = static or choose_memory(model, model_kwargs, len(self.rows), is_user_cache)
        self.same_length = self.memory.same_length or needs_same_length(model)
        self._is_ragged = len(self.rows) > 1 and not self.same_length
        check_model_inputs(model, inputs, model_kwargs)
        check_embeds(model, embeds, self.memory.cache is not None)
        self._kwargs = model_kwargs

        num_cached = self.memory.num_cached
        num_new = num_prompt - num_cached if num_given in (None, num_prompt) else num_prompt
        if num_new < 1:
            raise ValueError(
                f"`past_key_values` already hold {num_cached} tokens and the prompt has {num_prompt}: nothing is left "
                "to feed. Pass at least one token that is not in the cache, or crop the cache."
            )
        # What is fed next, one column a token that the model does not remember; at last the anchor. As lists, since
        # drafts are compared and cut token by token, and a device is slow at that.
        self._device = input_ids.device
        self._ids: list[list[int]] = input_ids[:, -num_new:].tolist()
        self._positions = _last_columns(inputs[self._prefix + "position_ids"], num_new, len(self.rows))
        # A fixed shape reaches behind it, where nothing is committed and there may be no position.
        self._last_position = num_cached + num_new - 1 + num_new_tokens
        if self._positions is not None:
            self._last_position = max(row[-1] for row in self._positions) + num_new_tokens
        check_positions(model, self._last_position + 1)
        self._token_types = _last_columns(inputs["token_type_ids"], num_new, len(self.rows))
        self._embeds = None if embeds is None else embeds[:, -num_new:]
        # Of remembered and new columns; `None` while there is no padding.
        self._mask = inputs[self._prefix + "attention_mask"]
        # For each row, its first columns that are padding, without those that all rows begin with.
        self._num_padding = [0] * len(self.rows)
        if self._mask is not None:
            padding = (self._mask.cumsum(-1) == 0).sum(-1)
            self._num_padding = (padding - padding.min()).tolist()
        self._draft_length = 0  # of the last forward
        self._is_prefill = True

        self._max_draft_length = max_block_size - 1
        # What was predicted behind the committed tokens, and what tops it up.
        self._rests: list[list[int]] = [[] for _ in self.rows]
        self._fillers: list[list[int]] = [[] for _ in self.rows]
        # Token ids cannot follow a prompt of embeddings.
        self._can_draft = embeds is None and self.memory.drafts_in_prefill
        if context_ids is not None:
            # A decoder may know fewer tokens than its encoder, and any guess will do.
            self._draw_fillers(context_ids % model.config.get_text_config(decoder=True).vocab_size, None)
        elif embeds is None:
            self._draw_fillers(input_ids, None if self._mask is None else self._mask[:, -num_prompt:])

    def draft(self, length: int) -> list[list[int]]:
        """
        The current guess of what follows.

        Args:
            length (`int`): most tokens that are wanted of it.

        Returns:
            `list[list[int]]`: for each row, equally many tokens; none where a draft would cost more than it brings.
        """
        is_overdue = self.memory.replays and len(self._ids[0]) > length + 1
        length = min(length, self._max_draft_length) if self._can_draft and not is_overdue else 0
        return [next_draft(rest, filler[:length]) for rest, filler in zip(self._rests, self._fillers)]

    def forward(self, drafts: list[list[int]]) -> torch.Tensor:
        """
        Run the model over what it does not remember and a draft.

        Args:
            drafts (`list[list[int]]`): a return value of `draft`.

        Returns:
            `torch.Tensor` of shape `(num_rows, draft_length + 1, vocab_size)`: logits from the anchor on.
        """
        draft_length = self._draft_length = len(drafts[0])
        if draft_length:
            self._feed(drafts)
        self.memory.begin(draft_length)
        kwargs = {**self._kwargs, **self.memory.model_inputs}
        if self._positions is not None:
            kwargs[self._prefix + "position_ids"] = self._to_tensor(self._positions)
        if self._token_types is not None:
            kwargs["token_type_ids"] = self._to_tensor(self._token_types)
        if self._mask is not None:
            kwargs[self._prefix + "attention_mask"] = self._mask
        if self._embeds is not None:
            kwargs["inputs_embeds"] = self._embeds
        inputs = self.model.prepare_inputs_for_generation(
            self._to_tensor(self._ids), is_first_iteration=self._is_prefill, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = draft_length + 1  # some models put their own default here
        return self.memory.call(self.model, **inputs, return_dict=True).logits[:, -(draft_length + 1) :]

    def advance(self, predicted: list[list[int]], counts: list[int], finished: list[bool]) -> None:
        """
        Slide each row's window behind its committed tokens, let go of rejected tokens and of finished rows.

        Args:
            predicted (`list[list[int]]`): tokens of the last forward, for each row.
            counts (`list[int]`): how many of them were committed in each row.
            finished (`list[bool]`): which of the rows take no more tokens.
        """
        if self._is_prefill:
            self.memory = self.memory.after_prefill()
            check_embeds(self.model, self._embeds, self.memory.cache is not None)
        left = [index for index, is_finished in enumerate(finished) if not is_finished]
        # A row that leaves must not keep the others' columns from going.
        most = max(counts[index] for index in left or range(len(counts)))
        kept = [most if left and finished[index] else count for index, count in enumerate(counts)]
        is_remembered = self._forget([self._draft_length + 1 - count for count in kept])
        if not left:
            self.rows = []
            return
        if len(left) < len(self.rows):
            self._select(left)
            predicted, counts = [predicted[index] for index in left], [counts[index] for index in left]
        self._drop_leading()
        self._feed([[tokens[count - 1]] for tokens, count in zip(predicted, counts)])
        if is_remembered:
            for name in _FED_COLUMNS:
                self._change(name, lambda row: row[-1:])
        if self._embeds is not None:
            self._embeds = None
            self._draw_fillers(self._to_tensor(predicted), None)
        self._rests = [tokens[count:] for tokens, count in zip(predicted, counts)]
        self._can_draft = True
        self._is_prefill = False

    def _feed(self, ids: list[list[int]]) -> None:
        """Have these tokens, equally many in each row, fed too."""
        ahead = range(1, len(ids[0]) + 1)
        self._ids = [row + new for row, new in zip(self._ids, ids)]
        self._change("_positions", lambda row: row + [min(row[-1] + step, self._last_position) for step in ahead])
        self._change("_token_types", lambda row: row + [row[-1] for _ in ahead])
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones((len(ids), len(ahead)))], dim=1)

    def _forget(self, num_rejected: list[int]) -> bool:
        """Take the rejected tokens out; says whether the model remembers the others."""
        fewest, most = min(num_rejected), max(num_rejected)
        if self._mask is None and fewest < most:
            num_columns = self.memory.num_cached if self.memory.cache is not None else len(self._ids[0])
            self._mask = torch.ones((len(num_rejected), num_columns), dtype=torch.long, device=self._device)
        if self._mask is not None:
            self._mask = caches.roll_back_columns(self._mask, num_rejected, fill=0)
        self._num_padding = [padding + count - fewest for padding, count in zip(self._num_padding, num_rejected)]
        if most:
            # Rows stay aligned on the right. Nothing is ever rejected of a prompt of embeddings, which has no ids.
            for name in _FED_COLUMNS:
                rows = getattr(self, name)
                if rows is not None:
                    kept = (row[: len(row) - count] for row, count in zip(rows, num_rejected))
                    setattr(self, name, [[0] * (count - fewest) + row for row, count in zip(kept, num_rejected)])
        return self.memory.settle(num_rejected)

    def _change(self, name: str, change: Callable[[list[int]], list[int]]) -> None:
        rows = getattr(self, name)
        if rows is not None:
            setattr(self, name, [change(row) for row in rows])

    def _select(self, left: list[int]) -> None:
        indices = torch.tensor(left, device=self._device)
        self.memory.select(indices)
        for name in ("rows", *_FED_COLUMNS, "_fillers", "_num_padding"):
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, [rows[index] for index in left])
        self._mask = _rows_of(self._mask, indices)
        self._kwargs = {name: _rows_of(value, indices) for name, value in self._kwargs.items()}

    def _drop_leading(self) -> None:
        """Let go of columns that are padding in all rows."""
        count = min(self._num_padding)
        if count == 0 or self._mask is None or not self._is_ragged:
            return
        self._num_padding = [number - count for number in self._num_padding]
        self._mask = self._mask[:, count:]
        self.memory.drop_leading(count)
        surplus = max(len(self._ids[0]) - self._mask.shape[1], 0)
        for name in _FED_COLUMNS:
            self._change(name, lambda row: row[surplus:])

    def _draw_fillers(self, context_ids: torch.Tensor, context_mask: torch.Tensor | None) -> None:
        if context_mask is None:
            context_mask = torch.ones_like(context_ids)
        # A row that is all padding has no context to draw from, but any guess will do.
        context_mask = torch.where(context_mask.any(-1, keepdim=True), context_mask, 1)
        generator = torch.Generator().manual_seed(_DRAFT_SEED)
        drawn = draw_context_tokens(context_ids, context_mask, self._max_draft_length, generator)
        self._fillers = drawn.tolist()

    def _to_tensor(self, rows: list[list[int]]) -> torch.Tensor:
        # Without waiting for the device: an iteration has one sync, when its tokens are read.
        return torch.tensor(rows, dtype=torch.long).to(self._device, non_blocking=True)


def _last_columns(values: torch.Tensor | None, length: int, batch_size: int) -> list[list[int]] | None:
    return None if values is None else values[:, -length:].expand(batch_size, -1).tolist()


def _rows_of(value: Any, indices: torch.Tensor) -> Any:
    """Rows of a model input that is the same in every forward: what the encoder has said, and its mask."""
    if isinstance(value, torch.Tensor):
        return value[indices.to(value.device)]
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _rows_of(part, indices) for name, part in value.items()})
    return value
