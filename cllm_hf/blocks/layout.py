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
    """Clean sequences and draft tokens after them, `packed_length` columns in all."""

    input_ids: torch.Tensor  # (batch_size, packed_length): clean tokens, then draft tokens
    position_ids: torch.Tensor  # (batch_size, packed_length): positions in the clean sequence
    # (batch_size, packed_length): 0 for clean tokens, a number from 1 on for tokens of the same block, -1 for padding
    segment_ids: torch.Tensor
    # (batch_size, packed_length): for a token of a block the position of its anchor, from which on it sees the block
    # instead of the clean sequence; 0 elsewhere
    anchor_positions: torch.Tensor
    clean_length: int  # columns of the clean sequence
    # (batch_size, packed_length): for rows that hold several clean sequences with their drafts, which of them a token
    # belongs to. By default a row holds one
    sequence_ids: torch.Tensor | None = None


@dataclass
class Drafts:
    """Draft states of equally many tokens, each after an anchor in its clean sequence."""

    states: torch.Tensor  # (batch_size, num_blocks, block_size): a draft state of each block
    anchors: torch.Tensor  # (batch_size, num_blocks): position of the token before each block
    mask: torch.Tensor  # (batch_size, num_blocks): non-zero where there is a block
    # (batch_size,): where a sequence ends. What of its blocks lies beyond means nothing, and is put there, so that no
    # position is needed that the sequence itself does not have. By default blocks go on as far as they go
    last_positions: torch.Tensor | None = None


@dataclass(kw_only=True)
class PackedBatch(Packed):
    """
    Clean sequences and groups of draft blocks: `clean_length` columns, then `num_blocks * block_size` a group.

    A block takes `block_size` columns: its anchor and all but the last token of its state. Blocks are segments 1, 2
    and so on, through all groups. The other attributes are those of `Packed`.
    """

    group_shapes: list[tuple[int, int]]  # number of blocks and block size of each group

    def columns(self, group: int = 0) -> torch.Tensor:
        """Find the columns of a group's blocks."""
        start = self.clean_length + sum(blocks * size for blocks, size in self.group_shapes[:group])
        blocks, size = self.group_shapes[group]
        return torch.arange(start, start + blocks * size, device=self.input_ids.device).view(blocks, size)


def pack(clean_ids: torch.Tensor, clean_mask: torch.Tensor, *groups: Drafts) -> PackedBatch:
    """Lay out clean sequences and draft blocks after them."""
    for drafts in groups:
        _check_shapes(clean_ids, clean_mask, drafts)
    device, clean_length = clean_ids.device, clean_ids.shape[1]
    is_clean = clean_mask.bool()
    positions = torch.arange(clean_length, device=device).expand_as(clean_ids)
    input_ids, position_ids = [clean_ids * is_clean], [positions * is_clean]
    segment_ids = [_clean_segments(clean_mask)]
    anchor_positions = [torch.zeros_like(clean_ids)]
    first_segment = 1
    for drafts in groups:
        count, block_size = drafts.states.shape[1:]
        is_block = drafts.mask.bool()[..., None].expand_as(drafts.states)
        anchor_ids = clean_ids.gather(1, drafts.anchors.clamp(0, clean_length - 1))  # missing blocks may lie outside
        block_ids = torch.cat([anchor_ids[..., None], drafts.states[..., :-1]], dim=-1)
        anchors = drafts.anchors[..., None]
        segments = first_segment + torch.arange(count, device=device)[None, :, None]
        input_ids.append((block_ids * is_block).flatten(1))
        block_positions = anchors + torch.arange(block_size, device=device)
        if drafts.last_positions is not None:
            block_positions = torch.minimum(block_positions, drafts.last_positions[:, None, None])
        position_ids.append((block_positions * is_block).flatten(1))
        segment_ids.append(torch.where(is_block, segments, PADDING_SEGMENT).flatten(1))
        anchor_positions.append((anchors * is_block).flatten(1))
        first_segment += count
    return PackedBatch(
        input_ids=torch.cat(input_ids, dim=1),
        position_ids=torch.cat(position_ids, dim=1),
        segment_ids=torch.cat(segment_ids, dim=1),
        anchor_positions=torch.cat(anchor_positions, dim=1),
        clean_length=clean_length,
        group_shapes=[(drafts.states.shape[1], drafts.states.shape[2]) for drafts in groups],
    )


def append_drafts(
    clean_ids: torch.Tensor,
    clean_mask: torch.Tensor,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    anchor_positions: torch.Tensor,
) -> Packed:
    """
    Lay out clean sequences and draft tokens of any number of blocks, and of any number of each, in columns after them.

    The clean columns are there for the mask: they are meant to be read from a cache.
    """
    clean_positions = torch.arange(clean_ids.shape[1], device=clean_ids.device).expand_as(clean_ids)
    return Packed(
        input_ids=torch.cat([clean_ids, input_ids], dim=1),
        position_ids=torch.cat([clean_positions, position_ids], dim=1),
        segment_ids=torch.cat([_clean_segments(clean_mask), segment_ids], dim=1),
        anchor_positions=torch.cat([torch.zeros_like(clean_ids), anchor_positions], dim=1),
        clean_length=clean_ids.shape[1],
    )


def _clean_segments(clean_mask: torch.Tensor) -> torch.Tensor:
    return torch.where(clean_mask.bool(), CLEAN_SEGMENT, PADDING_SEGMENT)


def _check_shapes(clean_ids: torch.Tensor, clean_mask: torch.Tensor, drafts: Drafts) -> None:
    blocks_fit = drafts.anchors.shape == drafts.mask.shape == drafts.states.shape[:2]
    if clean_ids.shape != clean_mask.shape or len(clean_ids) != len(drafts.states) or not blocks_fit:
        raise ValueError(
            "`clean_ids` and `clean_mask`, and the first two dimensions of `states`, `anchors` and `mask` must agree, "
            f"got {tuple(clean_ids.shape)}, {tuple(clean_mask.shape)}, {tuple(drafts.states.shape)}, "
            f"{tuple(drafts.anchors.shape)} and {tuple(drafts.mask.shape)}."
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
    places = starts[:, None] + is_token.long().cumsum(-1) - 1
    taken = places[is_token]

    def move(values: torch.Tensor, fill: int) -> torch.Tensor:
        moved = values.new_full((num_rows * length,), fill)
        moved[taken] = values[is_token]
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
    return filled, places.flatten()


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
