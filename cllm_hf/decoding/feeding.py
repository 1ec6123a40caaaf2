"""
The model's side of the loop: what is fed in each forward pass, and the mask and positions that go with it.

A forward pass is over the `pending` tokens of each row, which the model does not remember, the anchor last, and over
the rest of its proposal. Rows of a batch end in the same column: those that are behind have padding on the left, which
the attention mask hides. There is no mask while there is no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..blocks.forward import tree_attention_mask
from ..blocks.limits import (
    check_embeds,
    check_model,
    check_model_inputs,
    check_positions,
    check_trees,
    count_positions,
    needs_same_length,
)
from .caches import roll_back_columns
from .compiled import Compiling, StaticMemory
from .memory_choice import choose_memory
from .reading import Reader
from .strategy import Pending, Proposal, Room, Row, Strategy, Verdict, is_drafting


# Memory follows the text, not a number of the caller: a draft beyond this is at most as long as the text before it.
_LONGEST_DRAFT = 1024
# Of the mask of a prompt with a tree after it, in pairs of tokens: 16 MiB as a mask of truth values.
_LARGEST_PREFILL_MASK = 2**24
# Types of tokens that say only where an image or a sound stands: 0 for text.
_MODAL_TYPES = ("mm_token_type_ids", "moe_mm_token_type_ids")


class Feed:
    """
    Feeds the model what it does not remember of each row, and a proposal after it.

    `rows` are those that are still decoded; `memory` is what the model remembers, and another one may show in the
    prefill; `same_length` says whether all rows must commit equally many tokens.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,  # [batch_size, prompt_length], padded on the left
        model_kwargs: dict[str, Any],  # as transformers prepared them
        strategy: Strategy,
        *,
        max_block_size: int,
        num_new_tokens: int,
        compiling: Compiling | None,  # has forward passes compiled, where the model can
        reader: Reader | None,  # runs the model for a strategy that reads
        encoder_ids: torch.Tensor | None,  # [num_prompts, length]: what an encoder has read
        num_given: int | None,  # length of the prompt with its cached part, where `input_ids` lacks that
        is_user_cache: bool,
    ):
        self.reader = reader
        self.model, self._device, batch_size = model, input_ids.device, input_ids.shape[0]
        self._needs_tree, self._drafts_in_prefill = strategy.needs_tree, is_drafting(strategy)
        self._keeps_branches = strategy.keeps_branches if is_drafting(strategy) else strategy.needs_tree
        self._growing = growing = GrowingInputs.taken_from(model, model_kwargs)
        self._mask, embeds = growing.mask, growing.embeds  # the mask is of remembered and new columns
        check_model(model, batch_size, is_padded=self._mask is not None)

        num_prompt = self._num_prompt = input_ids.shape[1] if embeds is None else embeds.shape[1]
        max_columns = num_prompt + num_new_tokens + max_block_size
        num_drafting = strategy.count_drafting(max_block_size) if is_drafting(strategy) else 0
        self.memory = choose_memory(
            model, model_kwargs, batch_size, is_user_cache, compiling, max_columns, num_drafting
        )
        check_model_inputs(model, model_kwargs)
        check_embeds(model, embeds, self.memory.cache is not None)
        self._kwargs = model_kwargs  # what does not grow

        num_new = _count_new(num_prompt, self.memory.num_cached, num_given)
        self.rows = _make_rows(input_ids, growing, encoder_ids, num_new, model)
        self._embeds = None if embeds is None else embeds[:, -num_new:]
        # A tree's anchor sees itself, which one that is padding does not.
        self._ends_in_padding = self._mask is not None and not bool(self._mask[:, -1].all())
        # A fixed shape reaches beyond the last position, where nothing is committed and there may be none.
        last = [row.pending.positions[-1] for row in self.rows if row.pending.positions is not None]
        self._last_position = num_new_tokens + (max(last) if last else self.memory.num_cached + num_new - 1)
        self._num_positions = count_positions(model)
        check_positions(model, self._last_position + 1)

        self._is_prefill = True
        self._num_fed = 1  # anchor and draft, or tree, of the last forward pass
        counts_columns = needs_same_length(model) or self._drops_positions()
        if self._needs_tree:
            check_trees(model, counts_columns)
            self._check_keeps_places()
        self.same_length = self.memory.same_length or counts_columns
        self._is_ragged = batch_size > 1 and not self.same_length

    def room(self, block_size: int) -> Room:
        """What can be proposed for a forward pass that checks so many positions: nothing where it would not pay."""
        depth = block_size - 1
        # Token ids cannot follow a prompt of embeddings.
        if self._is_prefill and (self._embeds is not None or not self.memory.drafts_in_prefill):
            depth = 0
        elif self.memory.replays and len(self.rows[0].pending.ids) > block_size:
            depth = 0
        if depth > _LONGEST_DRAFT and not self.memory.fixed_shape:
            depth = min(depth, max(_LONGEST_DRAFT, *(len(row.text) for row in self.rows)))
        if self._num_positions is not None:
            pending = [row.pending for row in self.rows]
            first = self.memory.num_cached - 1  # the position before it, where the model is given none
            foremost = max(one.positions[-1] if one.positions else first + len(one.ids) for one in pending)
            # Only a committed token may go beyond the last position, where transformers says what it has to say.
            depth = min(depth, max(self._num_positions - 1 - foremost, 0))
        return Room(depth, self._needs_tree and self._has_room_for_tree(), self.memory.fixed_shape)

    def forward(self, proposals: list[Proposal]) -> torch.Tensor:
        """
        Run the model over pending tokens and proposals, which are equally long. Returns logits from the anchor on:
        `[num_rows, num_places, vocab_size]`.
        """
        num_fed = self._num_fed = len(proposals[0].token_ids)
        last_position = self._last_position
        if self._num_positions is not None:
            last_position = min(last_position, self._num_positions - 1)  # a drafter's places reach beyond the draft
        fed = [
            row.pending.then(proposal.token_ids[1:], proposal.depths()[1:], last_position)
            for row, proposal in zip(self.rows, proposals)
        ]
        if isinstance(self.memory, StaticMemory) and not self._is_prefill:
            return self._forward_in_place(self.memory, fed, proposals)
        if self._mask is not None and num_fed > 1:
            self._mask = torch.cat([self._mask, self._mask.new_ones((len(fed), num_fed - 1))], dim=1)
        self.memory.begin(num_fed - 1)
        inputs = self._prepare(fed)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = num_fed  # some models put their own default here
            if self._is_prefill and self._needs_tree:
                # By their number, the last columns are a view, for which a CPU copies frozen output embeddings; by
                # their places, they are a tensor of their own.
                inputs["logits_to_keep"] = torch.arange(-num_fed, 0, device=self._device)
        if not proposals[0].is_chain:
            inputs["attention_mask"] = self._tree_mask(proposals)
        return self._call(**inputs, return_dict=True).logits[:, -num_fed:]

    def _forward_in_place(self, memory: StaticMemory, fed: list[Pending], proposals: list[Proposal]) -> torch.Tensor:
        """The same where each row has columns of its own, and the mask says which."""
        memory.begin(self._num_fed - 1)
        parents = None if proposals[0].is_chain else [proposal.links()[0] for proposal in proposals]
        mask = memory.mask(self.model.config, self.model.dtype, self._mask, parents, self._num_fed)
        any_mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
        inputs = self._prepare(memory.fill(fed), any_mask)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = self._num_fed
        return self._call(**{**inputs, "attention_mask": mask}, return_dict=True).logits

    def _call(self, **inputs: Any) -> Any:
        return (
            self.memory.call(self.model, **inputs) if self.reader is None else self.reader.call(self.memory, **inputs)
        )

    def advance(self, verdicts: list[Verdict], finished: list[bool]) -> None:
        """Let go of rejected tokens and of finished rows; what was committed comes next."""
        if self._is_prefill:
            self.memory = self.memory.after_prefill()
            check_embeds(self.model, self._embeds, self.memory.cache is not None)
            self._check_keeps_places()
        left = [index for index, is_finished in enumerate(finished) if not is_finished]
        paths = [verdict.path for verdict in verdicts]
        if isinstance(self.memory, StaticMemory):
            self._advance_in_place(self.memory, verdicts, left)
            return
        # A row that leaves a batch must not keep the others' columns from going, nor, where it is among the last to
        # leave, be told apart in a cache whose rows all have one length.
        most = max(len(paths[index]) for index in left or range(len(paths)))
        leaves = [is_finished and len(paths) > 1 for is_finished in finished]
        paths = [list(range(most)) if is_leaving else path for is_leaving, path in zip(leaves, paths)]
        is_remembered = self._forget(paths)
        for row, verdict, path in zip(self.rows, verdicts, paths):
            row.pending = self._next_pending(row, verdict, len(path), None if is_remembered else most)
        if not left:
            self.rows = []
            return
        if len(left) < len(self.rows):
            self._select(left)
        self._drop_leading()
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones((len(self.rows), 1))], dim=1)
        self._embeds = None
        self._is_prefill = False

    def _advance_in_place(self, memory: StaticMemory, verdicts: list[Verdict], left: list[int]) -> None:
        """The same where each row has columns of its own: nothing moves, and a row that leaves lets its place be."""
        memory.settle([verdict.path for verdict in verdicts], self._num_fed)
        if self._mask is not None:
            self._mask = self._mask[:, : self._num_prompt]  # what comes after it is all text
        for row, verdict in zip(self.rows, verdicts):
            row.pending = self._next_pending(row, verdict, len(verdict.path), None)
        self.rows = [self.rows[index] for index in left]
        memory.keep(left)
        self._embeds, self._is_prefill = None, False

    def _drops_positions(self) -> bool:
        """Whether the model finds positions by counting columns, though its `forward` takes positions."""
        pending = [row.pending for row in self.rows]
        if pending[0].positions is None or (len(pending) == 1 and not self._needs_tree):
            return False  # nothing to tell apart
        return self._prepare(pending).get(self._growing.prefix + "position_ids") is None

    def _check_keeps_places(self) -> None:
        if not self._needs_tree or self.memory.keeps_places:
            return
        if self._keeps_branches or not self.memory.hides_places:
            raise ValueError(
                f"A tree of guesses needs a dynamic cache of keys and values, which {type(self.model).__name__} does "
                "not have here. Drop what turns it off (`use_cache=False`, `jacobi_compile=True`, a static cache), or "
                'what asks for trees (`jacobi_candidates`, `decoding="lossless"`). A model in training mode has none '
                "with gradient checkpointing: call `model.eval()` before."
            )

    def _has_room_for_tree(self) -> bool:
        if not self._is_prefill:
            return True
        num_fed = len(self.rows[0].pending.ids)
        is_short = len(self.rows) * num_fed * (self.memory.num_cached + num_fed) <= _LARGEST_PREFILL_MASK
        return self._drafts_in_prefill and is_short and not self._ends_in_padding

    def _prepare(self, fed: list[Pending], mask: torch.Tensor | None = None) -> dict[str, Any]:
        """Inputs of a forward pass; without a mask, that of the columns."""
        growing = self._growing
        kwargs = {**self._kwargs, **self.memory.model_inputs}
        if fed[0].positions is not None:
            positions = self._to_tensor([row.positions for row in fed])
            if growing.num_axes:
                positions = positions.expand(growing.num_axes, -1, -1)
            kwargs[growing.prefix + "position_ids"] = positions
        if fed[0].token_types is not None:
            kwargs["token_type_ids"] = self._to_tensor([row.token_types for row in fed])
        ids = self._to_tensor([row.ids for row in fed])
        kwargs.update(dict.fromkeys(growing.zeros, torch.zeros_like(ids)))
        mask = self._mask if mask is None else mask
        if mask is not None:
            kwargs[growing.prefix + "attention_mask"] = mask
        if self._embeds is not None:
            kwargs["inputs_embeds"] = self._embeds
        return self.model.prepare_inputs_for_generation(ids, is_first_iteration=self._is_prefill, **kwargs)

    def _next_pending(self, row: Row, verdict: Verdict, num_kept: int, width: int | None) -> Pending:
        """What is fed next: the new anchor, and before it what is not remembered, in rows as long as the longest."""
        accepted, anchor = verdict.token_ids[: num_kept - 1], verdict.token_ids[-1:]
        offsets = list(range(1, len(accepted) + 2))
        new = row.pending.then(accepted + anchor, offsets, self._last_position)
        if width is None:
            return new.map(lambda values: values[-1:])
        return new.map(lambda values: [0] * (width - num_kept) + values)

    def _forget(self, paths: list[list[int]]) -> bool:
        """Take the rejected tokens out; says whether the model remembers the others."""
        num_rejected = [self._num_fed - len(path) for path in paths]
        fewest = min(num_rejected)
        if self._mask is None and fewest < max(num_rejected):
            num_columns = len(self.rows[0].pending.ids) + self._num_fed - 1
            if self.memory.cache is not None:
                num_columns = self.memory.num_cached
            self._mask = torch.ones((len(paths), num_columns), dtype=torch.long, device=self._device)
        if self._mask is not None:
            self._mask = roll_back_columns(self._mask, num_rejected, fill=0)
        for row, count in zip(self.rows, num_rejected):
            row.num_padding += count - fewest
        return self.memory.settle(paths, self._num_fed)

    def _tree_mask(self, proposals: list[Proposal]) -> Any:
        num_cached = self.memory.num_cached
        num_columns = num_cached + len(self.rows[0].pending.ids) - 1
        mask = self._mask
        if mask is None:
            mask = torch.ones((len(proposals), num_columns), dtype=torch.long, device=self._device)
        parents = [proposal.links()[0] for proposal in proposals]
        cache: Any = self.memory.cache
        return tree_attention_mask(
            self.model.config, mask[:, :num_columns], parents, self.model.dtype, cache, num_cached
        )

    def _select(self, left: list[int]) -> None:
        indices = torch.tensor(left, device=self._device)
        self.memory.select(indices)
        self.rows = [self.rows[index] for index in left]
        self._mask = _rows_of(self._mask, indices)
        self._kwargs = {name: _rows_of(value, indices) for name, value in self._kwargs.items()}

    def _drop_leading(self) -> None:
        """Let go of columns that are padding in all rows."""
        count = min(row.num_padding for row in self.rows)
        if count == 0 or self._mask is None or not self._is_ragged:
            return
        self._mask = self._mask[:, count:]
        self.memory.drop_leading(count)
        surplus = max(len(self.rows[0].pending.ids) - 1 - self._mask.shape[1], 0)
        for row in self.rows:
            row.num_padding -= count
            row.pending = row.pending.map(lambda values: values[surplus:])

    def _to_tensor(self, rows: Any) -> torch.Tensor:
        # Without waiting for the device: an iteration has one sync, when its tokens are read.
        return torch.tensor(rows, dtype=torch.long).to(self._device, non_blocking=True)


def _count_new(num_prompt: int, num_cached: int, num_given: int | None) -> int:
    """Tokens of the prompt that are not in the cache."""
    num_new = num_prompt - num_cached if num_given in (None, num_prompt) else num_prompt
    if num_new < 1 and not num_cached:
        raise ValueError("The prompt must have at least one token, got none. Pass one, such as `bos_token_id`.")
    if num_new < 1:
        raise ValueError(
            f"`past_key_values` already hold {num_cached} tokens and the prompt has {num_prompt}: nothing is left to "
            "feed. Pass at least one token that is not in the cache, or crop the cache."
        )
    return num_new


def _make_rows(
    input_ids: torch.Tensor, growing: GrowingInputs, encoder_ids: torch.Tensor | None, num_new: int, model: Any
) -> list[Row]:
    mask = growing.mask
    batch_size, length = input_ids.shape
    texts = input_ids.tolist()
    num_padding = [0] * batch_size
    if mask is not None:
        padding = (mask.cumsum(-1) == 0).sum(-1)
        num_padding = (padding - padding.min()).tolist()
        kept = mask[:, mask.shape[1] - length :].bool().tolist()
        texts = [[token for token, is_kept in zip(*row) if is_kept] for row in zip(texts, kept)]
    contexts = texts
    if encoder_ids is not None:
        # The decoder's own prompt is too short to draw from. It may know fewer tokens than its encoder, and any guess
        # will do.
        known = encoder_ids % model.config.get_text_config(decoder=True).vocab_size
        contexts = known.repeat_interleave(batch_size // len(known), dim=0).tolist()

    def last_columns(values: torch.Tensor | None) -> list[Any]:
        return [None] * batch_size if values is None else values[:, -num_new:].expand(batch_size, -1).tolist()

    fed = zip(*map(last_columns, (input_ids, growing.positions, growing.token_types)))
    return [
        Row(index, list(texts[index]), contexts[index], length, Pending(*parts), num_padding[index])
        for index, parts in enumerate(fed)
    ]


def _rows_of(value: Any, indices: torch.Tensor) -> Any:
    """Rows of a model input that is the same in every forward pass: what the encoder has said, and its mask."""
    if isinstance(value, torch.Tensor):
        return value[indices.to(value.device)]
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _rows_of(part, indices) for name, part in value.items()})
    return value


@dataclass(frozen=True)
class GrowingInputs:
    """Inputs of a call that grow with the text, as transformers prepared them."""

    prefix: str  # "decoder_" or none: stands before the names of mask and positions
    mask: torch.Tensor | None  # [batch_size, length]
    positions: torch.Tensor | None  # [batch_size or 1, length]
    # Axes that the model counts positions along (time, height and width of an image), where text has the same ones;
    # 0 where positions have no such dimension.
    num_axes: int
    token_types: torch.Tensor | None  # [batch_size, length]
    zeros: tuple[str, ...]  # inputs that are 0 at every token of a text
    embeds: torch.Tensor | None  # [batch_size, length, hidden_size]: the prompt, if not as ids

    @classmethod
    def taken_from(cls, model: PreTrainedModel, model_kwargs: dict[str, Any]) -> GrowingInputs:
        """Those of a call, which are taken out of its inputs; an error where positions are not those of text alone."""
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        names = (prefix + "attention_mask", prefix + "position_ids", "token_type_ids", "inputs_embeds")
        mask, positions, token_types, embeds = (model_kwargs.pop(name, None) for name in names)
        types = {name: model_kwargs.get(name) for name in _MODAL_TYPES}
        zeros = tuple(name for name, value in types.items() if isinstance(value, torch.Tensor) and not value.any())
        for name in zeros:
            del model_kwargs[name]
        num_axes = 0
        if positions is not None and positions.dim() == 3:
            num_axes, positions = len(positions), _on_one_axis(positions, mask)
        return cls(prefix, mask, positions, num_axes, token_types, zeros, embeds)


def _on_one_axis(positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    first = positions[0]
    differs = (positions != first).any(dim=0)
    if mask is not None:
        differs = differs & mask[:, mask.shape[1] - first.shape[1] :].bool()  # padding stands anywhere
    if differs.any():
        raise ValueError(
            f'`decoding="jacobi"` supports positions of text, which are the same along each of {len(positions)} axes, '
            "got others, as an image has them. Leave images and videos out, or pass "
            '`decoding="autoregressive"`.'
        )
    return first
