"""The page of `cllm compare --web`: both texts as they come, colored by the forward pass that brought them."""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import gradio

from .race import MODES, Question, Race, Session, Snapshot


_DEFAULT_MODE = "as the model is"
_SECONDS_A_PICTURE = 0.25  # making and sending them takes time from the decoding
_CSS = """
.cllm-text {white-space: pre-wrap; line-height: 1.7; min-height: 14em; padding: .6em; overflow-wrap: anywhere}
.cllm-text span, .cllm-block span {color: #111; border-radius: 3px; padding: 1px 0}
.cllm-block {min-height: 4.6em; padding: 0 .6em; font-family: monospace; font-size: .85em; overflow-wrap: anywhere}
.cllm-block span {display: inline-block; padding: 1px 4px; margin: 2px; white-space: pre}
.cllm-right {background: #a7e3b4} .cllm-wrong {background: #ddd; text-decoration: line-through}
.cllm-figures {padding: .6em; font-variant-numeric: tabular-nums} .cllm-figures b {font-size: 1.3em}
.cllm-problem {color: #b00020; padding: .6em}
"""


def make_page(races: Races, question: Question, model: str, target: str | None = None) -> Any:
    """
    Make the page, a `gradio.Blocks` for `launch_page`.

    `question`, `model` and `target` (of the left side; by default the same) are what it shows at first.
    """
    with gradio.Blocks(title="cllm compare", analytics_enabled=False) as page:
        gradio.Markdown(
            "## Decoding side by side\nEach color is one forward pass. The sides take turns on the device, and each "
            "clock counts its own time alone."
        )
        inputs = _make_choices(question, model, target)
        prompt_box = gradio.Textbox(question.prompt, label="Prompt", lines=3, elem_id="prompt")
        with gradio.Row():
            run_button = gradio.Button("Run", variant="primary", elem_id="run")
            stop_button = gradio.Button("Stop", variant="stop", elem_id="stop")
        verdict_box = gradio.HTML("", elem_id="verdict")
        with gradio.Row():
            left_box = gradio.HTML(_waiting("generate()"), elem_id="left")
            right_box = gradio.HTML(_waiting("Jacobi decoding"), elem_id="right")
        gradio.on(
            [run_button.click, prompt_box.submit],
            races.run,
            [prompt_box, *inputs],
            [left_box, right_box, verdict_box],
            show_progress="hidden",
            concurrency_limit=None,  # who waits can thus be told so, and stop
        )
        stop_button.click(races.stop, None, None, queue=False)
        page.unload(races.stop)
    return page


def _make_choices(question: Question, model: str, target: str | None) -> list[Any]:
    mode, temperature, tokens = question.mode or _DEFAULT_MODE, question.temperature, question.max_new_tokens
    with gradio.Row():
        model_box = gradio.Textbox(model, label="Model", info="folder or Hub id; an adapter too")
        target_box = gradio.Textbox(target or "", label="Model on the left", info="empty for the same one")
        mode_box = gradio.Dropdown([_DEFAULT_MODE, *MODES], value=mode, label="Mode")
        size_box = gradio.Textbox(str(question.block_size), label="Block size", info="a number, or auto")
        candidates_box = gradio.Number(
            question.candidates, label="Candidates", info="further guesses; 0 for none", minimum=0, precision=0
        )
    with gradio.Row():
        temperature_box = gradio.Slider(
            0, max(2, temperature), temperature, step=0.1, label="Temperature", info="0 is greedy"
        )
        tokens_box = gradio.Slider(1, max(1024, tokens), tokens, step=1, label="Longest response, in tokens")
        chat_box = gradio.Checkbox(
            question.is_chat is not False, label="Chat", info="where the tokenizer has a chat template"
        )
    return [model_box, target_box, mode_box, size_box, candidates_box, temperature_box, tokens_box, chat_box]


@dataclass
class _Visit:
    """What a visitor has started: it waits for its turn, then models are loaded, then there is a race."""

    race: Race | None = None
    is_stopped: bool = False
    is_idle: threading.Event = field(default_factory=threading.Event)  # nothing is loaded or warmed up for it

    def __post_init__(self) -> None:
        self.is_idle.set()

    def stop(self) -> None:
        self.is_stopped = True
        if self.race is not None:
            self.race.stop()

    def end(self) -> None:
        """Stop it, and wait until nothing of it runs any more."""
        self.stop()
        self.is_idle.wait()
        if self.race is not None:
            self.race.end()


class Races:
    """The races of all visitors, one after the other, or the clocks would show each other's work."""

    def __init__(self, session: Session):
        self._session = session
        self._visits: dict[str, _Visit] = {}  # by visitor
        self._one_at_a_time = threading.Lock()

    def run(
        self,
        prompt: str,
        model: str,
        target: str,
        mode: str,
        block_size: Any,
        candidates: float | None,
        temperature: float,
        tokens: float,
        chat: bool,
        request: gradio.Request,
    ) -> Iterator[tuple[str, str, str]]:
        """Run a race, and show both sides as they come, as HTML, and in the end what is to be said of them."""
        chosen = None if mode == _DEFAULT_MODE else mode
        size, is_chat = _read_block_size(block_size), None if chat else False
        question = Question(prompt, chosen, size, int(tokens), float(temperature), is_chat, int(candidates or 0))
        visitor, visit = str(request.session_hash), _Visit()
        self._visits[visitor] = visit
        try:
            while not self._one_at_a_time.acquire(timeout=_SECONDS_A_PICTURE):
                yield _waiting("waiting for another visitor"), _waiting("waiting for another visitor"), ""
                if visit.is_stopped:
                    break
            else:
                try:
                    yield from self._run(visit, question, model.strip(), target.strip() or None)
                finally:
                    self._one_at_a_time.release()
            if visit.race is None:
                yield _waiting("stopped"), _waiting("stopped"), ""
        finally:
            if self._visits.get(visitor) is visit:
                del self._visits[visitor]

    def _run(
        self, visit: _Visit, question: Question, model: str, target: str | None
    ) -> Iterator[tuple[str, str, str]]:
        yield _waiting("loading"), _waiting("loading"), ""
        visit.is_idle.clear()
        try:
            if visit.is_stopped:
                return
            race = self._session.prepare(question, model, target)
            if visit.is_stopped:
                return
            visit.race = race
            watching = race.watch(_SECONDS_A_PICTURE)
            first = next(watching)  # now its threads run
        except (OSError, ValueError) as error:
            raise gradio.Error(str(error), print_exception=False) from None
        finally:
            visit.is_idle.set()
        if visit.is_stopped:  # since it was looked at
            race.stop()
        for left, right in chain([first], watching):
            lines = [html.escape(line) for line in race.compare(left, right)]
            yield format_side(left), format_side(right), "<br>".join(lines)

    def stop(self, request: gradio.Request) -> None:
        """Stop what this visitor has started."""
        visit = self._visits.get(str(request.session_hash))
        if visit is not None:
            visit.stop()

    def close(self) -> None:
        """Stop what all visitors have started, and wait until nothing of it runs any more."""
        for visit in list(self._visits.values()):
            visit.end()


def launch_page(page: Any, host: str, port: int | None, wait: bool = True) -> str:
    """Serve the page until Ctrl-C, or with `wait=False` in the background, and return its address."""
    theme = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",))  # none from elsewhere
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, theme=theme, css=_CSS,
        footer_links=[], quiet=True,
    )  # fmt: skip
    if wait:
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        page.block_thread()
    return str(address)


def format_side(side: Snapshot) -> str:
    """A side as HTML: its figures, its text, and the draft that the last forward pass has checked."""
    pieces = "".join(
        f'<span style="background: {_color(number)}" title="forward pass {number + 1}: {count} '
        f'token{"s" * (count > 1)}">{html.escape(text)}</span>'
        for number, (text, count) in enumerate(side.pieces)
    )
    problem = f'<div class="cllm-problem">{html.escape(side.problem)}</div>' if side.problem else ""
    return f'{_figures(side)}{problem}{_block(side)}<div class="cllm-text">{pieces}</div>'


def _figures(side: Snapshot) -> str:
    state = "" if side.is_done else " …"
    return (
        f'<div class="cllm-figures">{html.escape(side.name)}{state}: <b>{side.tokens_per_second:.1f}</b> tokens/s · '
        f"{len(side.token_ids)} tokens · {side.num_forwards} forward passes · {side.tokens_per_forward:.2f} tokens "
        f"per forward pass · {side.seconds:.1f} s</div>"
    )


def _block(side: Snapshot) -> str:
    kinds = ["cllm-right"] * side.num_accepted + ["cllm-wrong"] * len(side.block)
    tokens = "".join(
        f'<span class="{kind}">{html.escape(token) or "&nbsp;"}</span>' for kind, token in zip(kinds, side.block)
    )
    label = "Draft checked last: " if side.block else ""
    return f'<div class="cllm-block">{label}{tokens}</div>'


def _waiting(text: str) -> str:
    return f'<div class="cllm-figures">{html.escape(text)}</div><div class="cllm-text"></div>'


def _color(number: int) -> str:
    return f"hsl({number * 67 % 360} 70% 85%)"


def _read_block_size(value: Any) -> int | str:
    text = str(value).strip()
    return int(text) if text.isdecimal() else text
