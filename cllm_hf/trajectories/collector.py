"""The Jacobi trajectories of given responses: all blocks of a batch of responses iterate together, packed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from .._host import input_device
from ..blocks.forward import copy_clean, forward_clean, packed_forward
from ..blocks.layout import PADDING_SEGMENT, append_drafts, num_blocks
from ..blocks.rules import count_accepted_in_blocks, count_until_stop, judge_greedy
from .schema import piece_starts


# Draft tokens that keep a device busy; more are split so that each forward pass reads fewer columns.
_LEAST_TOKENS = 2048


@dataclass(frozen=True)
class Request:
    """A response whose trajectory is wanted."""

    prompt_ids: list[int]  # at least one, as of the response
    response_ids: list[int]
    seed: tuple[int, int]  # of its first drafts: seed of the run and number of the prompt
    # Whether the model's stop token may be missing after the response, as in text from a serving engine. It is added
    # if that is the model's next token.
    may_stop: bool = False


@dataclass(frozen=True)
class Trajectory:
    """
    The trajectories of the blocks of a response.

    `states` holds for each block its states, from the first draft to the fixed point. A block in which the response
    departs from greedy holds nothing but the response's own tokens. There are none for a response that is not greedy,
    unless those were asked for.
    """

    response_ids: list[int]  # with its stop token if that was missing
    is_greedy: bool  # whether the response is the model's own greedy output, up to near ties; see `blocks.rules`
    states: list[list[list[int]]]
    num_near_ties: int = 0  # tokens of the response that are not the best ones, but count as greedy


def draw_first_states(
    prompt_ids: list[int], response_length: int, block_size: int, pad_id: int, seed: tuple[int, int]
) -> np.ndarray:
    """
    Draw the first draft of every block at random from the prompt's tokens (CLLM, arXiv 2403.00835, section 3.1).

    The seed is that of the run and the number of the prompt, so that a draw does not depend on batches. Returns an
    array of shape `(num_blocks, block_size)`, with `pad_id` after the end of the response.
    """
    blocks = num_blocks(response_length, block_size)
    drawn = np.random.default_rng(seed).choice(np.asarray(prompt_ids, dtype=np.int64), blocks * block_size)
    drawn[response_length:] = pad_id
    return drawn.reshape(blocks, block_size)


@torch.no_grad()
def collect_trajectories(
    model: PreTrainedModel,
    requests: list[Request],
    block_size: int,
    pad_id: int,
    stop_ids: Collection[int] = (),
    keep_not_greedy: bool = False,
) -> list[Trajectory]:
    """
    Iterate all blocks of a batch of responses until every one has reached its fixed point.

    The context of a block is the response itself, so that the blocks of a response converge independently, each in at
    most `block_size` iterations: an iteration makes at least one more leading token right. At a near tie the token of
    the response is right, so that the response is the fixed point. Only what is not settled is computed: the response
    is read once into a cache, the leading tokens of a block that are right already are read from there, and blocks and
    responses that are done leave the forward pass. The model is in evaluation mode; responses that are not its own get
    states only if `keep_not_greedy` says so.
    """
    clean = _read_clean(model, requests, stop_ids)
    kept = [row for row, departures in enumerate(clean.departures) if keep_not_greedy or not departures.any()]
    blocks = _Blocks.of(requests, clean, kept, block_size, pad_id)
    found: list[list[list[int]]] = [[] for _ in blocks.rows]
    for band in _bands(blocks):
        for number, states in zip(band.tolist(), _converge(model, clean.part(blocks, band), blocks.select(band))):
            found[number] = states
    return _assemble(clean, blocks, found)


def _bands(blocks: _Blocks) -> list[np.ndarray]:
    """
    Group blocks that stand equally far after their prompts, so that a forward pass reads no more columns than they
    need. A band has enough tokens to keep the device busy, so few responses are one band.
    """
    wanted = ~blocks.departed
    count = min(int(blocks.lengths[wanted].sum()) // _LEAST_TOKENS, int(blocks.places.max(initial=0)) + 1)
    if count < 2:
        return [np.flatnonzero(wanted)] if wanted.any() else []
    edges = np.linspace(0, blocks.places.max() + 1, count + 1).round()
    bands = [np.flatnonzero(wanted & (blocks.places >= a) & (blocks.places < b)) for a, b in zip(edges, edges[1:])]
    return [band for band in bands if len(band)]


def _converge(model: PreTrainedModel, clean: _Clean, blocks: _Blocks) -> list[list[list[int]]]:
    """The states of each block, from its first draft to the response."""
    settled = blocks.count_settled()
    history = [blocks.states.copy()]
    iterations = np.zeros(len(settled), dtype=np.int64)
    active = settled < blocks.lengths
    while active.any():
        blocks.states[active] = _iterate(model, clean, blocks.select(active), settled[active])
        settled = blocks.count_settled()
        iterations += active
        history.append(blocks.states.copy())
        active = settled < blocks.lengths
    states = np.stack(history, axis=1)
    return [states[number, : count + 1].tolist() for number, count in enumerate(iterations)]


@dataclass
class _Clean:
    """The responses after their prompts, read once; lists have an entry for every request, also for those let go."""

    ids: torch.Tensor  # [R, L]: prompts and responses, padded on the right
    mask: torch.Tensor  # [R, L]: 1 on tokens, 0 on padding
    cache: DynamicCache
    rows: np.ndarray  # [R]: the requests that are still there
    responses: list[list[int]]  # with added stop tokens
    departures: list[np.ndarray]  # for each token of a response, whether the model would have written another one
    num_near_ties: list[int]  # tokens that are not the best ones, but count as greedy

    def part(self, blocks: _Blocks, band: np.ndarray) -> _Clean:
        """What some of the blocks see of it."""
        rows = np.unique(blocks.rows[band])
        columns = int((blocks.starts + blocks.lengths)[band].max())
        kept = torch.from_numpy(rows).to(self.ids.device)
        return replace(
            self,
            ids=self.ids[kept, :columns],
            mask=self.mask[kept, :columns],
            cache=copy_clean(self.cache, kept, columns),
            rows=rows,
        )

    def keep(self, rows: np.ndarray) -> None:
        """Let the other rows go; `rows` is sorted."""
        if len(rows) == len(self.rows):
            return
        kept = torch.from_numpy(np.flatnonzero(np.isin(self.rows, rows))).to(self.ids.device)
        self.ids, self.mask, self.rows = self.ids[kept], self.mask[kept], rows
        self.cache.batch_select_indices(kept)


@dataclass
class _Blocks:
    """B blocks of N tokens of all rows, in the order of the rows."""

    rows: np.ndarray  # [B]: the request that a block belongs to
    places: np.ndarray  # [B]: number of the block in its response
    starts: np.ndarray  # [B]: position of the block's anchor in prompt and response
    lengths: np.ndarray  # [B]: tokens of the response in the block
    targets: np.ndarray  # [B, N]: the response's tokens, padded
    states: np.ndarray  # [B, N]: the current states
    departed: np.ndarray  # [B]: whether the response is not greedy in this block

    @classmethod
    def of(cls, requests: list[Request], clean: _Clean, rows: list[int], block_size: int, pad_id: int) -> _Blocks:
        """The blocks of some rows, with their first drafts."""
        parts: list[tuple[np.ndarray, ...]] = [_no_blocks(block_size)]
        for row in rows:
            request, response = requests[row], np.asarray(clean.responses[row])
            count = num_blocks(len(response), block_size)
            starts = np.arange(count) * block_size
            padded = np.pad(response, (0, count * block_size - len(response)), constant_values=pad_id)
            targets: np.ndarray = padded.reshape(count, block_size)
            departed = np.zeros(count, dtype=bool)
            departed[np.flatnonzero(clean.departures[row]) // block_size] = True
            drafts = draw_first_states(request.prompt_ids, len(response), block_size, pad_id, request.seed)
            parts.append(
                (
                    np.full(count, row),
                    np.arange(count),
                    len(request.prompt_ids) - 1 + starts,
                    np.minimum(len(response) - starts, block_size),
                    targets,
                    np.where(departed[:, None], targets, drafts),
                    departed,
                )
            )
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts)))

    def select(self, which: np.ndarray) -> _Blocks:
        """Some of the blocks, by a mask."""
        values = (self.rows, self.places, self.starts, self.lengths, self.targets, self.states, self.departed)
        return _Blocks(*(value[which] for value in values))

    def count_settled(self) -> np.ndarray:
        """Leading tokens of each state that are those of the response; padding counts too."""
        states, targets = torch.from_numpy(self.states), torch.from_numpy(self.targets)
        return count_accepted_in_blocks(states, targets).numpy().clip(max=self.lengths)


def _no_blocks(block_size: int) -> tuple[np.ndarray, ...]:
    """The arrays of `_Blocks` without a block, for batches in which no response is kept."""
    none = np.zeros(0, dtype=np.int64)
    tokens = np.zeros((0, block_size), dtype=np.int64)
    return none, none, none, none, tokens, tokens, none.astype(bool)


def _read_clean(model: PreTrainedModel, requests: list[Request], stop_ids: Collection[int]) -> _Clean:
    """Read the responses once; what the model would have written instead is in the logits of that forward."""
    device = input_device(model)
    sequences = [torch.tensor(request.prompt_ids + request.response_ids) for request in requests]
    ids = pad_sequence(sequences, batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True).to(device)
    # Of each row, from before the first token of the response to after its last.
    counts = np.array([len(request.response_ids) + 1 for request in requests])
    firsts = [row * ids.shape[1] + len(request.prompt_ids) - 1 for row, request in enumerate(requests)]
    places = np.concatenate([first + np.arange(count) for first, count in zip(firsts, counts)])
    written = np.concatenate([[*request.response_ids, 0] for request in requests])
    is_asked = np.ones(len(places), dtype=bool)
    is_asked[counts.cumsum() - 1] = False
    judged, cache = _judge(model, ids, mask, places, written, is_asked)
    responses, departures, num_near_ties = [], [], []
    for request, best, near in zip(requests, *(np.split(one, counts.cumsum()[:-1]) for one in judged)):
        departs, near = (best[:-1] != request.response_ids) & ~near[:-1], near[:-1]
        # After a stop token the model would have said nothing more.
        departs[count_until_stop(request.response_ids, stop_ids) :] = True
        num_near_ties.append(int((near & ~departs).sum()))
        following = int(best[-1])
        if request.may_stop and following in stop_ids and request.response_ids[-1] not in stop_ids:
            responses.append([*request.response_ids, following])
            departs = np.append(departs, False)
        else:
            responses.append(request.response_ids)
        departures.append(departs)
    return _Clean(ids, mask, cache, np.arange(len(requests)), responses, departures, num_near_ties)


def _judge(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    places: np.ndarray,
    written: np.ndarray,
    is_asked: np.ndarray,
) -> tuple[list[np.ndarray], DynamicCache]:
    """
    Read `ids`: what the model finds best at some places, and which of the tokens `written` there are near ties, where
    that is asked; each array is `[num_places]`.
    """
    device = ids.device
    tokens, asked = (torch.from_numpy(one).to(device) for one in (written, is_asked))

    def judge(logits: torch.Tensor, part: slice) -> list[torch.Tensor]:
        return list(judge_greedy(logits, tokens[part].to(logits.device), model.dtype, asked[part].to(logits.device)))

    judged, cache = forward_clean(model, ids, mask, 0, places=torch.from_numpy(places).to(device), reduce=judge)
    return [one.cpu().numpy() for one in judged], cache


def _iterate(model: PreTrainedModel, clean: _Clean, blocks: _Blocks, settled: np.ndarray) -> np.ndarray:
    """
    One forward pass over what is not settled of some blocks.

    After its leading right tokens a block has a wrong one. What the model says there is known: all before it is as in
    the response, so it is the response's token, also at a near tie. The block is fed from that wrong token on. What
    stands before it, the block would read from its own columns in an unpacked forward; it equals the clean sequence
    and is read from there.
    """
    states = blocks.states.copy()
    everywhere = np.arange(len(states))
    states[everywhere, settled] = blocks.targets[everywhere, settled]
    offsets = np.arange(states.shape[1])
    asked = (offsets > settled[:, None]) & (offsets < blocks.lengths[:, None])
    block, offset = np.nonzero(asked)  # in the order of the rows
    if not len(block):
        return states
    clean.keep(np.unique(blocks.rows[block]))
    row = np.searchsorted(clean.rows, blocks.rows[block])
    counts = np.bincount(row, minlength=len(clean.rows))
    column = np.arange(len(row)) - piece_starts(counts)[row]

    def lay_out(values: np.ndarray, fill: int) -> torch.Tensor:
        out = np.full((len(clean.rows), counts.max()), fill, dtype=np.int64)
        out[row, column] = values
        return torch.from_numpy(out).to(clean.ids.device)

    packed = append_drafts(
        clean.ids,
        clean.mask,
        lay_out(blocks.states[block, offset - 1], 0),
        lay_out(blocks.starts[block] + offset, 0),
        lay_out(block + 1, PADDING_SEGMENT),
        lay_out((blocks.starts + settled + 1)[block], 0),
    )
    places = torch.from_numpy(row * counts.max() + column).to(clean.ids.device)
    (predicted,) = packed_forward(
        model, packed, places=places, clean_cache=clean.cache, reduce=lambda logits, _: [logits.argmax(-1)]
    )
    states[asked] = predicted.cpu().numpy()
    return states


def _assemble(clean: _Clean, blocks: _Blocks, found: list[list[list[int]]]) -> list[Trajectory]:
    """From the states of all blocks to the trajectories of each response."""
    states: list[list[list[list[int]]]] = [[] for _ in clean.responses]
    for row, target, block_states in zip(blocks.rows.tolist(), blocks.targets, found):
        states[row].append(block_states or [target.tolist()])
    return [
        Trajectory(response, not departures.any(), kept, near)
        for response, departures, kept, near in zip(clean.responses, clean.departures, states, clean.num_near_ties)
    ]


def augment_states(trajectory: list[list[int]], length: int, rng: np.random.Generator) -> list[list[int]]:
    """
    Make states with more right tokens after wrong ones than the target model's own states have.

    Let `w_1 < .. < w_m` be the positions where a state differs from the fixed point. Of `w_2 .. w_m`, `floor(m / 2)`
    are drawn, each time from all of them, and get the fixed point's tokens; `w_1` stays wrong, so that no more leading
    tokens are right than before. This is the data augmentation that the code of CLLM (arXiv 2403.00835) has as an
    option. The last two states give none: the fixed point, and the one before it, which is nearly right. Nor does a
    state with one wrong token, and a state that is there already is left out. After the first `length` tokens, which
    lie in the response, padding stays as it is.
    """
    fixed_point = trajectory[-1]
    seen = {tuple(state) for state in trajectory}
    augmented = []
    for state in trajectory[:-2]:
        wrong = [position for position in range(length) if state[position] != fixed_point[position]]
        if len(wrong) < 2:
            continue
        new = list(state)
        for position in rng.choice(wrong[1:], len(wrong) // 2).tolist():
            new[position] = fixed_point[position]
        if tuple(new) not in seen:
            seen.add(tuple(new))
            augmented.append(new)
    return augmented
