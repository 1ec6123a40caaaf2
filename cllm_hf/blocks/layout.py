"""
One layout for a clean sequence and many draft blocks, in one forward pass: `[clean sequence | block 0 | ..]`.

Each block repeats its anchor, has the positions it would have in the sequence, and sees the clean tokens before its
anchor and itself causally, and no other block. One forward pass thus gives the autoregressive logits of the clean
sequence and the logits of every draft state. The trajectory collector and the trainer share it; the forward passes are
in `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


CLEAN_SEGMENT, PADDING_SEGMENT = 0, -1


def num_blocks(response_length: Any, block_size: int) -> Any:
    """Number of blocks that cover a response."""
    return -(-response_length // block_size)


@dataclass
class Packed:
    """Clean sequences and draft tokens after them. The tensors are `[batch_size, packed_length]`."""

    input_ids: torch.Tensor  # clean tokens, then draft tokens
    position_ids: torch.Tensor  # positions in the clean sequence
    segment_ids: torch.Tensor  # 0 for clean tokens, a number from 1 on for tokens of the same block, -1 for padding
    # For a token of a block the position of its anchor, from which on it sees the block instead of the clean sequence;
    # 0 elsewhere.
    anchor_positions: torch.Tensor
    clean_length: int  # columns of the clean sequence
    # For rows that hold several clean sequences with their drafts, which of them a token belongs to.
    sequence_ids: torch.Tensor | None = None


@dataclass
class Drafts:
    """Draft states of equally many tokens, each after an anchor in its clean sequence."""

    states: torch.Tensor  # [batch_size, num_blocks, block_size]
    anchors: torch.Tensor  # [batch_size, num_blocks]: position of the token before each block
    mask: torch.Tensor  # [batch_size, num_blocks]: non-zero where there is a block
    # [batch_size]: where a sequence ends. What of its blocks lies beyond means nothing, and is put there, so that no
    # position is needed that the sequence itself does not have. By default blocks go on as far as they go.
    last_positions: torch.Tensor | None = None


@dataclass(kw_only=True)
class PackedBatch(Packed):
    """
    Clean sequences and groups of draft blocks: `clean_length` columns, then `num_blocks * block_size` a group.

    A block takes `block_size` columns: its anchor and all but the last token of its state. Blocks are segments 1, 2
    and so on, through all groups.
    """

    group_shapes: list[tuple[int, int]]  # number of blocks and block size of each group

    def columns(self, group: int = 0) -> torch.Tensor:
        """Columns of a group's blocks, `[num_blocks, block_size]`; column `i` of a block predicts token `i` of it."""
        start = self.clean_length + sum(blocks * size for blocks, size in self.group_shapes[:group])
        blocks, size = self.group_shapes[group]
        return torch.arange(start, start + blocks * size, device=self.input_ids.device).view(blocks, size)


def pack(clean_ids: torch.Tensor, clean_mask: torch.Tensor, *groups: Drafts) -> PackedBatch:
    """Lay out clean sequences, `[batch_size, clean_length]` and padded on the right, and groups of draft blocks."""
    columns: list[tuple[torch.Tensor, ...]] = [(clean_ids[:, :0],) * 4]
    first_segment = 1
    for drafts in groups:
        columns.append(_columns_of(drafts, clean_ids, first_segment))
        first_segment += drafts.states.shape[1]
    packed = append_drafts(clean_ids, clean_mask, *(torch.cat(parts, dim=1) for parts in zip(*columns)))
    shapes = [(drafts.states.shape[1], drafts.states.shape[2]) for drafts in groups]
    return PackedBatch(**vars(packed), group_shapes=shapes)


def _columns_of(drafts: Drafts, clean_ids: torch.Tensor, first_segment: int) -> tuple[torch.Tensor, ...]:
    """Draft tokens of all blocks, with their positions, segments and positions of anchors: `[batch_size, columns]`."""
    count, block_size = drafts.states.shape[1:]
    is_block = drafts.mask.bool()[..., None].expand_as(drafts.states)
    anchors = drafts.anchors[..., None]
    anchor_ids = clean_ids.gather(1, drafts.anchors.clamp(0, clean_ids.shape[1] - 1))  # missing ones may lie outside
    ids = torch.cat([anchor_ids[..., None], drafts.states[..., :-1]], dim=-1)
    positions = anchors + torch.arange(block_size, device=clean_ids.device)
    if drafts.last_positions is not None:
        positions = torch.minimum(positions, drafts.last_positions[:, None, None])
    segments = first_segment + torch.arange(count, device=clean_ids.device)[None, :, None]
    segments = torch.where(is_block, segments, PADDING_SEGMENT)
    return tuple(part.flatten(1) for part in (ids * is_block, positions * is_block, segments, anchors * is_block))


def append_drafts(
    clean_ids: torch.Tensor,
    clean_mask: torch.Tensor,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    anchor_positions: torch.Tensor,
) -> Packed:
    """
    Lay out clean sequences and draft tokens of any number of blocks, and of any number of each, in columns after them:
    `[batch_size, clean_length]` and `[batch_size, num_columns]`, those of a block in order.
    """
    is_clean = clean_mask.bool()
    clean_positions = torch.arange(clean_ids.shape[1], device=clean_ids.device) * is_clean
    clean_segments = torch.where(is_clean, CLEAN_SEGMENT, PADDING_SEGMENT)
    return Packed(
        input_ids=torch.cat([clean_ids * is_clean, input_ids], dim=1),
        position_ids=torch.cat([clean_positions, position_ids], dim=1),
        segment_ids=torch.cat([clean_segments, segment_ids], dim=1),
        anchor_positions=torch.cat([torch.zeros_like(clean_ids), anchor_positions], dim=1),
        clean_length=clean_ids.shape[1],
    )


def fill_rows(packed: Packed) -> tuple[Packed, torch.Tensor]:
    """
    Lay short sequences and their drafts after others in the same row, so that there is little padding.

    Rows are as long as the longest sequence with its drafts, and filled by first fit, the longest first.
    """
    is_token = packed.segment_ids != PADDING_SEGMENT
    counts = is_token.sum(-1).tolist()
    row_of, start_of, num_rows = _first_fit(counts)
    length, device = max(counts), packed.input_ids.device
    if num_rows * length >= packed.input_ids.numel():
        return packed, torch.arange(packed.input_ids.numel(), device=device)
    starts = torch.tensor(row_of, device=device) * length + torch.tensor(start_of, device=device)
    # A token's new place: where its sequence begins, and how many tokens of it are before.
    places = (starts[:, None] + is_token.long().cumsum(-1) - 1).flatten()
    tokens = is_token.flatten().nonzero()[:, 0]  # once: a device waits for their number
    taken = places[tokens]

    def move(values: torch.Tensor, fill: int) -> torch.Tensor:
        moved = values.new_full((num_rows * length,), fill)
        moved[taken] = values.flatten()[tokens]
        return moved.view(num_rows, length)

    sequences = torch.arange(len(counts), device=device)[:, None].expand_as(packed.input_ids)
    filled = Packed(
        input_ids=move(packed.input_ids, 0),
        position_ids=move(packed.position_ids, 0),
        segment_ids=move(packed.segment_ids, PADDING_SEGMENT),
        anchor_positions=move(packed.anchor_positions, 0),
        clean_length=0,
        sequence_ids=move(sequences, -1),
    )
    return filled, places


def _first_fit(counts: list[int]) -> tuple[list[int], list[int], int]:
    """For each sequence its row and the column that it begins at, and how many rows there are."""
    capacity = max(counts)
    used: list[int] = []
    row_of, start_of = [0] * len(counts), [0] * len(counts)
    for number in sorted(range(len(counts)), key=lambda number: -counts[number]):
        row = next((row for row, length in enumerate(used) if length + counts[number] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        row_of[number], start_of[number] = row, used[row]
        used[row] += counts[number]
    return row_of, start_of, len(used)
