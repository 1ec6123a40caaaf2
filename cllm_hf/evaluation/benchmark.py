"""Tokens per second and per forward pass of several ways to decode, in one run, on the same prompts, in turns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._host import base_model_of
from ..blocks.drafter import find_drafter
from ..blocks.rules import count_until_stop
from ..journal import Journal
from ..options import AUTOREGRESSIVE
from ..trajectories.responding import split_batches
from .progress import Progress, Say


_PROMPT_LOOKUP_TOKENS = 10
_PROCESS = Path("/proc/self")


@dataclass
class DecodingMethod:
    """A way to decode, and how tables call it."""

    name: str
    model: Any  # or an adapter
    options: dict[str, Any]  # of its `generate`, such as `{"decoding": "jacobi"}`
    # Whether the model's forward pass may be compiled. A hook would then become part of the compiled code, so that
    # forward passes are taken from `jacobi_stats`, or else are one a token.
    is_compiled: bool = False

    @property
    def has_candidates(self) -> bool:
        return bool(self.options.get("jacobi_candidates"))

    @property
    def call_options(self) -> dict[str, Any]:
        """Arguments of its `generate`: on a GPU, Jacobi decoding is compiled unless it is told not to be."""
        drafts = self.options.get("decoding", AUTOREGRESSIVE) != AUTOREGRESSIVE
        return {"jacobi_compile": False, **self.options} if drafts and not self.is_compiled else self.options

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end a response: those of its options, otherwise those of the model's generation config."""
        stop = self.options.get("eos_token_id")
        stop = base_model_of(self.model).generation_config.eos_token_id if stop is None else stop
        return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


@dataclass
class DecodingResult:
    """
    What a method did. Prompts are decoded in batches of `batch_size`; a run is one `generate` of one batch, prefill
    included.
    """

    name: str
    responses: list[list[int]] = field(default_factory=list)  # token ids, for each prompt, of the first round
    num_forwards: list[int] = field(default_factory=list)  # calls of the model, for each batch of the first round
    seconds: list[float] = field(default_factory=list)  # of each run: all batches of the first round, then the second
    batch_size: int = 1
    # How many forward passes after the prefill fed how many tokens a row; empty for a compiled method.
    widths: Counter[int] = field(default_factory=Counter)
    peak_memory: int | None = None  # most bytes that tensors took on a CUDA device in a run, weights included
    extra_memory: int | None = None  # the same, less what was taken when the run began
    num_kept_turns: int = 0  # of the runs, those that were timed by an earlier, interrupted benchmark

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a row gains in a forward pass of its batch; in batches of 1, tokens over forward passes."""
        rows = (len(batch) for batch in self._batches())
        num_tokens = sum(map(len, self.responses))
        return num_tokens / sum(forwards * size for forwards, size in zip(self.num_forwards, rows))

    @property
    def tokens_per_second(self) -> float:
        """Of all rows of a batch together; the median over the runs."""
        return statistics.median(self._rates())

    def speedup_over(self, baseline: DecodingResult) -> float:
        """Tokens per second over those of another method of the same call: the median of the ratio in each run."""
        return statistics.median(ours / theirs for ours, theirs in zip(self._rates(), baseline._rates()))

    def num_equal_to(self, baseline: DecodingResult) -> int:
        """Count the prompts whose responses are the same, token for token."""
        return sum(ours == theirs for ours, theirs in zip(self.responses, baseline.responses))

    def _batches(self) -> list[list[list[int]]]:
        return split_batches(self.responses, self.batch_size)

    def _rates(self) -> list[float]:
        tokens = itertools.cycle([sum(map(len, batch)) for batch in self._batches()])
        return [num_tokens / seconds for num_tokens, seconds in zip(tokens, self.seconds)]


def make_methods(
    model: Any,
    block_sizes: Sequence[int | str],
    assistant: Any = None,
    prompt_lookup: bool = True,
    is_compiled: bool = False,
    candidates: Sequence[int] = (),
) -> list[DecodingMethod]:
    """
    List the ways to decode, `generate()` first. A model with a lossless adapter drafts by it in place of Jacobi, in
    blocks of at most as many tokens as it drafts. Each number of `candidates` but 0 adds a method to every block size.
    """
    # Training with gradient checkpointing may have left a model that goes without a cache by default.
    greedy = {"decoding": "autoregressive", "use_cache": True}
    methods = [DecodingMethod("generate()", model, greedy)]
    if prompt_lookup:
        options = {**greedy, "prompt_lookup_num_tokens": _PROMPT_LOOKUP_TOKENS}
        methods.append(DecodingMethod("prompt lookup", model, options))
    if assistant is not None:
        methods.append(DecodingMethod("assisted", model, {**greedy, "assistant_model": assistant}))
    drafter, way = find_drafter(base_model_of(model)), "jacobi"
    if drafter is not None:
        most, way = drafter.num_masks + 1, "lossless"
        block_sizes = list(dict.fromkeys(size if isinstance(size, str) else min(size, most) for size in block_sizes))
    for block_size, count in itertools.product(block_sizes, dict.fromkeys([0, *candidates])):
        more = f", {count} candidate{'s' * (count > 1)}" if count else ""
        # Said without candidates too, as the model's generation config may have some.
        options = {"decoding": way, "jacobi_block_size": block_size, "jacobi_candidates": count}
        methods.append(DecodingMethod(f"{way} {block_size}{more}", model, options))
    if is_compiled:
        for method in list(methods):
            # A compiled forward pass has one width, which that of a tree or of "auto" is not.
            if method.name == "generate()":
                options = {**greedy, "cache_implementation": "static"}
            elif isinstance(method.options.get("jacobi_block_size"), int) and not method.has_candidates:
                options = {**method.options, "jacobi_compile": True}
            else:
                continue
            methods.append(DecodingMethod(f"{method.name}, compiled", model, options, is_compiled=True))
    return methods


def benchmark_decoding(
    methods: Sequence[DecodingMethod],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    show_progress: bool = True,
    batch_size: int = 1,
    repeats: int = 1,
    pad_token_id: int = 0,
    say: Say | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[DecodingResult]:
    """
    Decode the same prompts in several ways, greedily, `repeats` times, in batches padded on the left.

    The methods take turns on every batch, so that a change of the machine's speed meets all of them, and a ratio is
    taken between neighbors. Before the clocks start, each method decodes the first batch once; a compiled one decodes
    a batch of every shape that comes, since each may be compiled anew. All clocks are around the whole `generate`.

    `say` gets lines on how far it is, or `progress` has a stage for it. A turn, one batch decoded by all methods, is
    kept in the journal as a whole and never in part: each ratio is of neighbors in one process, also after an
    interruption.
    """
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    check_counts(batch_size=batch_size, repeats=repeats)
    journal, progress = journal or Journal(), progress or Progress(show_progress, say)
    batches = split_batches(prompts, batch_size)
    results = [DecodingResult(method.name, batch_size=batch_size) for method in methods]
    turns = list(itertools.product(range(repeats), batches))
    ways = [describe_method(method) for method in methods]
    keys = [[ways, turn, batch, max_new_tokens, pad_token_id] for turn, batch in turns]
    are_kept = [journal.has(f"turn-{number:05d}", key) for number, key in enumerate(keys)]
    expected = None  # of an earlier run
    if not all(are_kept):
        seconds = _warm_up(methods, batches, max_new_tokens, pad_token_id, progress)
        expected = seconds * (len(turns) - sum(are_kept))
    unit = "prompts" if batch_size == 1 else "batches"
    with progress.stage(f"Timing {len(methods)} ways to decode, in turns", len(turns), unit, expected) as stage:
        for number, ((turn, batch), key, is_kept) in enumerate(zip(turns, keys, are_kept)):
            take = partial(_take_turn, methods, batch, max_new_tokens, pad_token_id)
            for result, run in zip(results, journal.once(f"turn-{number:05d}", key, take)):
                _add(result, _from_json(run), is_first=turn == 0)
                result.num_kept_turns += is_kept
            stage.advance(is_kept=is_kept)
    return results


def _warm_up(
    methods: Sequence[DecodingMethod],
    batches: list[list[list[int]]],
    max_new_tokens: int,
    pad_token_id: int,
    progress: Progress,
) -> float:
    """Returns about how many seconds a turn takes."""
    seconds = 0.0
    with progress.stage("Warming up", len(methods), "ways to decode") as stage:
        for method in methods:
            for batch in _shapes(batches) if method.is_compiled else batches[:1]:
                run = _run(method, batch, max_new_tokens, pad_token_id)
            seconds += run.seconds[0]
            stage.advance()
    return seconds


def describe_method(method: DecodingMethod) -> dict[str, Any]:
    """What a method does, ready for JSON; a model among its options is put down by name."""
    options = {
        name: getattr(base_model_of(value), "name_or_path", value) if name == "assistant_model" else value
        for name, value in method.options.items()
    }
    return {"name": method.name, "options": options, "is_compiled": method.is_compiled}


def _take_turn(
    methods: Sequence[DecodingMethod], batch: list[list[int]], max_new_tokens: int, pad_token_id: int
) -> list[dict[str, Any]]:
    """One batch by all methods, ready for JSON."""
    runs = [_run(method, batch, max_new_tokens, pad_token_id) for method in methods]
    return [{**vars(run), "widths": list(run.widths.items())} for run in runs]


def _from_json(run: dict[str, Any]) -> DecodingResult:
    return DecodingResult(**{**run, "widths": Counter({width: count for width, count in run["widths"]})})


def _add(result: DecodingResult, run: DecodingResult, is_first: bool) -> None:
    """Add a run to the result of its method; responses and counts are those of the first round."""
    result.seconds += run.seconds
    if run.peak_memory is not None:
        result.peak_memory = max(run.peak_memory, result.peak_memory or 0)
    if run.extra_memory is not None:
        result.extra_memory = max(run.extra_memory, result.extra_memory or 0)
    if is_first:
        result.responses += run.responses
        result.num_forwards += run.num_forwards
        result.widths.update(run.widths)


def decode_all(
    method: DecodingMethod,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 1,
    pad_token_id: int = 0,
    show_progress: bool = True,
) -> list[list[int]]:
    """
    Decode prompts greedily in batches of similar lengths, when the time does not matter. Responses are in the order of
    the prompts, with a stop token if they have one.
    """
    # The longest first, so that memory that does not suffice shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    responses: dict[int, list[int]] = {}
    with tqdm(total=len(prompts), desc=method.name, unit="prompt", disable=not show_progress) as progress:
        for batch in split_batches(order, batch_size):
            run = _run(method, [prompts[index] for index in batch], max_new_tokens, pad_token_id)
            responses.update(zip(batch, run.responses))
            progress.update(len(batch))
    return [responses[index] for index in range(len(prompts))]


def leave_out_refused(
    methods: list[DecodingMethod], prompts: Sequence[list[int]], max_new_tokens: int, pad_token_id: int
) -> tuple[list[DecodingMethod], str | None]:
    """Ways to decode with one model, without candidates if it takes none, and in that case why it does not."""
    method = next((method for method in methods if method.has_candidates), None)  # any tree is refused, or none
    if method is not None:
        try:
            decode_all(method, prompts[:1], max_new_tokens, 1, pad_token_id, show_progress=False)
        except ValueError as error:
            return [method for method in methods if not method.has_candidates], str(error)
    return methods, None


def check_counts(**counts: int) -> None:
    """Refuse numbers, by the names of their options, of which there must be at least one."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _run(method: DecodingMethod, batch: list[list[int]], max_new_tokens: int, pad_token_id: int) -> DecodingResult:
    """One `generate` of one batch."""
    device = method.model.device
    length = max(map(len, batch))
    input_ids = torch.tensor([[pad_token_id] * (length - len(row)) + row for row in batch], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in batch], device=device)
    widths: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        fed = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        widths.append(0 if fed is None else fed.shape[1])

    options = dict(method.call_options)
    if method.is_compiled:
        options.setdefault("return_dict_in_generate", True)
    # The wrapper of an adapter hands `generate` on to its base model, whose calls are those to count.
    base_model = base_model_of(method.model)
    handle = None if method.is_compiled else base_model.register_forward_pre_hook(count, with_kwargs=True)
    is_cuda = device.type == "cuda"
    try:
        if is_cuda:
            gc.collect()  # what a run before has left would seem to be taken already
            torch.cuda.reset_peak_memory_stats(device)
        taken = torch.cuda.memory_allocated(device) if is_cuda else 0
        synchronize(device)
        start = time.perf_counter()
        output = method.model.generate(
            input_ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, **options
        )
        synchronize(device)
        seconds = time.perf_counter() - start
    finally:
        if handle is not None:
            handle.remove()
    peak_memory = torch.cuda.max_memory_allocated(device) if is_cuda else None
    extra_memory = None if peak_memory is None else peak_memory - taken
    responses = getattr(output, "sequences", output)[:, length:].tolist()
    num_forwards = len(widths)
    if method.is_compiled:
        stats = getattr(output, "jacobi_stats", None)
        num_forwards = len(responses[0]) if stats is None else stats.num_forwards
    if len(batch) > 1:  # rows that end early are padded
        stop_ids = method.stop_ids
        responses = [response[: count_until_stop(response, stop_ids)] for response in responses]
    widths_after = Counter(widths[1:])
    return DecodingResult(
        method.name, responses, [num_forwards], [seconds], len(batch), widths_after, peak_memory, extra_memory
    )


def _shapes(batches: list[list[list[int]]]) -> list[list[list[int]]]:
    """A batch of every shape, the longest first: a cache that is large enough is not made anew."""
    shapes = {(max(map(len, batch)), len(batch)): batch for batch in batches}
    return [shapes[key] for key in sorted(shapes, reverse=True)]


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


class PeakMemory:
    """
    Context manager that finds the most memory taken inside it, above what was taken when it began.

    On a CUDA device that is what torch gives to tensors; on CPU under Linux, what the process has in memory. Memory
    that was set free but not yet given back is given back first where that is possible: work that takes it anew would
    otherwise seem to take none. `num_bytes` stays `None` where nobody can say: on other devices and systems.
    """

    def __init__(self, device: torch.device):
        self.num_bytes: int | None = None
        self._device = device
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu":
            with contextlib.suppress(OSError, AttributeError):  # glibc's own
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # lets the peak begin anew at what the process has in memory now
                (_PROCESS / "clear_refs").write_text("5")
                self._start = _peak_resident_size()
        return self

    def __exit__(self, *_: object) -> None:
        if self._start is not None:
            is_cuda = self._device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self._device) if is_cuda else _peak_resident_size()
            self.num_bytes = None if peak is None else max(peak - self._start, 0)


def _peak_resident_size() -> int | None:
    """The most bytes that the process has had in memory since the last reset."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
