"""
What a decoding strategy is: it proposes tokens for each row of the batch, the loop verifies them. And which ones
`generate(decoding=...)` knows.

A strategy never sees logits, caches, masks or stopping rules, and hidden states only if it has a method for them. In
every iteration it is asked for a `Proposal` for each row, and told afterwards what the model predicted and which of
its tokens were accepted. Whatever it proposes, the text is that of decoding one token at a time; a good strategy only
needs fewer forward passes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from ..options import AUTOREGRESSIVE, JACOBI, LOSSLESS, JacobiOptions


@dataclass(frozen=True)
class Pending:
    """Tokens to feed, with what the model wants to know of each."""

    ids: list[int]  # token ids; 0 where a column is padding
    positions: list[int] | None = None  # position of each, for models that take positions
    token_types: list[int] | None = None  # type of each, for models that take types

    def map(self, change: Callable[[list[int]], list[int]]) -> Pending:
        """Change all three alike."""
        return Pending(
            change(self.ids),
            None if self.positions is None else change(self.positions),
            None if self.token_types is None else change(self.token_types),
        )

    def then(self, ids: list[int], offsets: list[int], last_position: int) -> Pending:
        """Add tokens."""
        positions, types = self.positions, self.token_types
        if positions is not None:
            last = positions[-1]
            positions = positions + [min(last + offset, last_position) for offset in offsets]
        return Pending(self.ids + ids, positions, None if types is None else types + types[-1:] * len(ids))


@dataclass(frozen=True)
class Verdict:
    """What came of a row in a forward pass."""

    token_ids: list[int]  # tokens that were committed, at least one; with padding after the end of its text
    num_own: int  # how many of them are not such padding
    path: list[int]  # as many places: the anchor and the accepted tokens
    predictions: list[int]  # the model's next token after each place that was fed
    is_stopped: bool  # whether the text has ended


@dataclass
class Row:
    """
    A row of the batch.

    Attributes:
        index (`int`): its place in the batch that was passed to `generate`.
        text (`list[int]`): the prompt without padding, then what was committed; the anchor last.
        context (`list[int]`): tokens to draw a first guess from: the prompt, or what an encoder has read; empty for a
            prompt of embeddings.
        length (`int`): columns of prompt and committed tokens in the sequences that `generate` returns.
        pending (`Pending`): committed tokens that the model does not remember; the anchor last.
        num_padding (`int`): its first columns that are padding, without those that all rows begin with.
        gains (`list[int]`): tokens of each forward pass that it took part in.
        is_stopped (`bool`): whether its text has ended. It may stay in the batch, and takes padding then.
        notes (`Any`): what the strategy keeps of it.
    """

    index: int
    text: list[int]
    context: list[int]
    length: int
    pending: Pending
    num_padding: int = 0
    gains: list[int] = field(default_factory=list)
    is_stopped: bool = False
    notes: Any = None

    @property
    def anchor(self) -> int:
        """`int`: the last committed token, which is fed first. Of a prompt of embeddings it says nothing."""
        return self.pending.ids[-1]

    def commit(self, verdict: Verdict) -> None:
        """Take what came of a forward pass."""
        self.text += verdict.token_ids
        self.length += len(verdict.token_ids)
        if verdict.num_own:
            self.gains.append(verdict.num_own)
        self.is_stopped = verdict.is_stopped


# `(rows, distance, logits) -> scores`: what a token of a draft is chosen by, `distance` tokens after the next one of
# each row; logits and scores are of shape `(num_rows, num_guesses, vocab_size)`.
Guess = Callable[[Sequence[Row], int, Any], Any]


@dataclass(frozen=True)
class Proposal:
    """
    Tokens to feed for a row in the next forward pass. A token's place in `token_ids` names it everywhere.

    Attributes:
        token_ids (`list[int]`): the anchor (`row.anchor`) first, then the draft.
        parents (`list[int]`, *optional*): for each place, the place of the token before it in the text; -1 for the
            anchor. A parent comes before its children, and siblings differ. By default a chain: each token follows
            the one before it.
        is_drafter (`list[bool]`, *optional*): places that are fed for the strategy alone: nothing is accepted there,
            and the model does not remember them. Only such places may follow one. By default none.
    """

    token_ids: list[int]
    parents: list[int] | None = None
    is_drafter: list[bool] | None = None

    @property
    def is_chain(self) -> bool:
        """`bool`: whether each token follows the one before it, and all are verified."""
        return self.parents is None and self.is_drafter is None

    def links(self) -> tuple[list[int], list[bool]]:
        """
        Spell out what is left out where it is the plain case.

        Returns:
            `tuple[list[int], list[bool]]`: for each place, its parent, and whether it is fed for the strategy alone.
        """
        length = len(self.token_ids)
        parents = list(range(-1, length - 1)) if self.parents is None else self.parents
        return parents, [False] * length if self.is_drafter is None else self.is_drafter

    def depths(self) -> list[int]:
        """
        Find how far each token stands from the anchor in its text.

        Returns:
            `list[int]`: 0 for the anchor.
        """
        if self.parents is None:
            return list(range(len(self.token_ids)))
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return depths


@dataclass(frozen=True)
class Room:
    """
    What a proposal may hold.

    Attributes:
        depth (`int`): most tokens after the anchor in any one branch.
        is_tree (`bool`): whether a proposal may be other than a chain. Not in the prefill, which feeds the prompt, but
            for a strategy that drafts there.
        must_fill (`bool`): whether every proposal must have the shape of the one before it, for a compiled graph.
    """

    depth: int
    is_tree: bool = False
    must_fill: bool = False


class Strategy(Protocol):
    """
    What the loop asks of a strategy. Register a function that makes one by `cllm_hf.register_strategy`. If it has a
    further method `read(row, hidden_states)`, that is given the model's last hidden states, before `observe`: of the
    tokens that were fed and accepted, `[num_tokens, hidden_size]`, up to `row.text[-2]`.

    Attributes:
        needs_tree (`bool`): whether proposals are ever other than chains. Models that take no tree mask are then
            refused before anything is decoded.
    """

    needs_tree: bool

    def propose(self, rows: Sequence[Row], room: Room) -> list[Proposal]:
        """
        Propose tokens for the next forward pass. Not called where there is no room for a draft.

        Args:
            rows (`Sequence[Row]`): rows that are still decoded. `row.text` is the text so far, the anchor last;
                `row.notes` belongs to the strategy.
            room (`Room`): what a proposal may hold.

        Returns:
            `list[Proposal]`: one for each row. Shorter ones are filled up to the longest.
        """

    def observe(self, row: Row, path: list[int], predictions: list[int]) -> None:
        """
        Take note of what came of a forward pass, with a proposal or without. `row.text` has its new tokens already.

        Args:
            row (`Row`): a row that is still decoded.
            path (`list[int]`): places of the anchor and of the accepted tokens. As many tokens were committed: the
                accepted ones and the bonus token, `predictions[path[-1]]`.
            predictions (`list[int]`): the model's next token after each place, and after what it was filled up with.
        """


class DraftingStrategy(Strategy, Protocol):
    """A strategy that has the model itself draft, in rows of the same forward pass after those that are verified."""

    largest_block_size: int  # most tokens that it can have verified in a forward pass
    keeps_branches: bool  # whether what is accepted may be other than the first places of a proposal

    def running(self) -> AbstractContextManager[Any]:
        """Prepare the model for a call of `generate`, and put it back."""

    def count_drafting(self, block_size: int) -> int:
        """Count the places that `begin` announces, at most."""

    def begin(self, proposals: Sequence[Proposal]) -> int:
        """Prepare the forward pass over proposals; says how many of its last places are the drafter's alone."""

    def end(self) -> None:
        """The forward pass is over: processors and stopping criteria may run the model too."""

    def draft(self, rows: Sequence[Row], verdicts: Sequence[Verdict], logits: Any, guess: Guess) -> None:
        """Draft what follows the text, now that it is known how far it goes, from the logits of the last places."""


class ReadingStrategy(Strategy, Protocol):
    """A strategy that drafts from the model's hidden states."""

    def read(self, row: Row, hidden_states: Any) -> None:
        """
        Take the last hidden states of a forward pass, `[num_tokens, hidden_size]`: of the last tokens of
        `row.text[:-1]`, those that were fed; the last one has predicted the anchor. Called before `observe`.
        """


def is_reading(strategy: Strategy) -> TypeGuard[ReadingStrategy]:
    """Whether a strategy wants the model's hidden states."""
    return hasattr(strategy, "read")


def is_drafting(strategy: Strategy) -> TypeGuard[DraftingStrategy]:
    """Whether a strategy has the model itself draft."""
    return hasattr(strategy, "largest_block_size")


def check_proposals(proposals: Sequence[Proposal], anchors: Sequence[int], room: Room, strategy: Strategy) -> None:
    """Check what a strategy proposes."""
    if len(proposals) != len(anchors):
        raise ValueError(f"{type(strategy).__name__} must make {len(anchors)} proposals here, got {len(proposals)}.")
    for proposal, anchor in zip(proposals, anchors):
        problem = _problem(proposal, anchor, room, strategy.needs_tree)
        if problem:
            raise ValueError(f"A proposal of {type(strategy).__name__} {problem}.")


def _problem(proposal: Proposal, anchor: int, room: Room, needs_tree: bool) -> str:
    length = len(proposal.token_ids)
    if proposal.token_ids[:1] != [anchor]:
        return f"must begin with the anchor, here [{anchor}], got {proposal.token_ids[:1]}. Put `row.anchor` first"
    if proposal.is_chain:
        too_long = f"must fit `room.depth={room.depth}`, got a draft of {length - 1} tokens. Cut it"
        return too_long if length > room.depth + 1 else ""
    if not (needs_tree and room.is_tree):
        return "must be a chain here, got a tree. Look at `room.is_tree`, and set `needs_tree = True` for trees"
    parents, flags = proposal.links()
    if len(parents) != length or len(flags) != length:
        return f"must have a parent for each of its {length} tokens, and as many values of `is_drafter` if any"
    if parents[0] != -1 or any(not 0 <= parent < place for place, parent in enumerate(parents) if place):
        return f"must name for each token one before it as its parent, and -1 for the anchor, got parents {parents}"
    if flags[0] or any(flags[parent] and not flags[place] for place, parent in enumerate(parents) if place):
        return "must have only places for the drafter after such a place, and the anchor is none, got other flags"
    depth = max(depth for depth, is_drafter in zip(proposal.depths(), flags) if not is_drafter)
    if depth > room.depth:
        return f"must fit `room.depth={room.depth}`, got a branch of {depth} tokens. Cut it"
    return ""


def level(proposals: Sequence[Proposal], length: int = 0) -> list[Proposal]:
    """
    Fill shorter proposals up to the longest, so that they make a batch. Any guess will do: it is verified like others.
    """
    length = max(length, max(len(proposal.token_ids) for proposal in proposals))
    if all(proposal.is_chain for proposal in proposals):
        return [
            proposal
            if len(proposal.token_ids) == length
            else Proposal((proposal.token_ids + proposal.token_ids[-1:] * length)[:length])
            for proposal in proposals
        ]
    return [_fill_tree(proposal, length) for proposal in proposals]


def _fill_tree(proposal: Proposal, length: int) -> Proposal:
    missing = length - len(proposal.token_ids)
    parents, flags = proposal.links()
    return Proposal(
        proposal.token_ids + proposal.token_ids[:1] * missing,
        parents + [0] * missing,
        flags + [True] * missing,  # not verified, since a sibling may have the same token
    )


def _make_jacobi(options: JacobiOptions) -> Strategy:
    # Here, since the strategies import what stands above.
    from .candidates import CandidateStrategy
    from .jacobi import JacobiStrategy

    return CandidateStrategy(options.candidates) if options.candidates else JacobiStrategy()


_FACTORIES: dict[str, Callable[[JacobiOptions], Strategy]] = {JACOBI: _make_jacobi}


def register_strategy(name: str, factory: Callable[[JacobiOptions], Strategy]) -> None:
    """
    Have `model.generate(decoding=name)` decode by a strategy of your own.

    Args:
        name (`str`): value of `decoding`. Registering a name again replaces its strategy.
        factory (`Callable[[JacobiOptions], Strategy]`): called once for every call of `generate`, with its
            `jacobi_` options.

    Raises:
        ValueError: for the names of this package.
    """
    if name in (AUTOREGRESSIVE, JACOBI, LOSSLESS):
        raise ValueError(f"`name` must be new, got {name!r}, which is built in. Choose another one.")
    _FACTORIES[name] = factory


def decodings() -> tuple[str, ...]:
    """The values of `decoding`."""
    return (JACOBI, LOSSLESS, *(name for name in _FACTORIES if name != JACOBI), AUTOREGRESSIVE)


def make_strategy(name: str, options: JacobiOptions, model: Any) -> Strategy:
    """The strategy of one of `decodings()`, for a call of `generate`."""
    from .lossless import make_lossless

    return make_lossless(model, options) if name == LOSSLESS else _FACTORIES[name](options)
