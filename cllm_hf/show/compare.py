"""`cllm compare`: the race in a terminal, and the page."""

from __future__ import annotations

import argparse
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ..loading import load_cllm, pick_device
from ..names import Name
from .race import DEFAULT_TOKENS, Question, Session, Snapshot


_COLORS = ("cyan", "magenta", "green", "yellow", "blue")


def run_compare(options: argparse.Namespace) -> str:
    """
    Run `cllm compare`. With `--web` it serves the page until Ctrl-C.

    Args:
        options (`argparse.Namespace`): its options, by their names.

    Returns:
        `str`: what is to be said of both sides, with their texts where no terminal has shown them.

    Raises:
        KeyboardInterrupt: at Ctrl-C, when nothing runs any more.
        OSError: if a model cannot be loaded.
        ValueError: for options that are out of range, or for a page without gradio.
    """
    for option, name in (("--model", options.model), ("--target", options.target or options.model)):
        Name.find(name).check(option, "model")
    device = pick_device(options.device)

    def load(name: str) -> Any:
        model: Any = load_cllm(name, dtype=options.dtype)
        return model.to(device)

    session = Session(load)
    question = Question(
        options.prompt or "",
        options.mode,
        options.block_size,
        options.max_new_tokens or DEFAULT_TOKENS,
        options.temperature,
        False if options.no_chat else None,
        options.candidates,
    )
    if options.web:
        question.check_options()
        page = _import_page()
        races = page.Races(session)
        blocks = page.make_page(races, question, options.model, options.target)
        try:
            page.launch_page(blocks, options.host, options.port)
        finally:
            races.close()
        raise KeyboardInterrupt  # at which gradio closes the page, and goes on
    if options.prompt is None:
        raise ValueError("`--prompt` must hold a text, got none. Write one, or open a page by `--web`.")
    race = session.prepare(question, options.model, options.target)
    console = Console()
    sides: list[Snapshot] = []
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        for sides in race.watch():
            live.update(Columns([_panel(side, console.width // 2 - 1) for side in sides]), refresh=console.is_terminal)
    problems = [f"{side.name}: {side.problem}" for side in sides if side.problem]
    if problems:
        raise ValueError(" ".join(problems))
    texts = [] if console.is_terminal else [_plain(side) for side in sides]
    return "\n\n".join([*texts, "\n".join(race.compare(sides[0], sides[1]))])


def _import_page() -> Any:
    try:
        from . import page
    except ImportError as error:
        raise ValueError(
            f"`--web` needs gradio, which is not installed ({error}). Run `pip install cllm_hf[demo]`, or leave "
            "`--web` out and pass `--prompt`."
        ) from error
    return page


def _title(side: Snapshot) -> str:
    return (
        f"{side.name}: {side.tokens_per_second:.1f} tokens/s, {len(side.token_ids)} tokens in {side.num_forwards} "
        f"forward passes ({side.tokens_per_forward:.2f} each), {side.seconds:.1f} s"
    )


def _plain(side: Snapshot) -> str:
    return f"{_title(side)}\n{''.join(text for text, _ in side.pieces)}"


def _panel(side: Snapshot, width: int) -> Panel:
    text = Text()
    for number, (piece, _) in enumerate(side.pieces):
        text.append(piece, style=_COLORS[number % len(_COLORS)])
    return Panel(Group(Text(_title(side), style="bold"), text), width=width)
