"""The page of `cllm compare --web`: both texts as they come, colored by the forward pass that brought them."""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator
from typing import Any

import gradio

from .race import DEFAULT_TOKENS, MODES, Question, Race, Session, Snapshot, compare


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


def make_page(session: Session, model: str, target: str | None = None, block_size: int | str = "auto") -> Any:
    """
    Make the page, a `gradio.Blocks` for `launch_page`.

    `model`, `target` (of the left side; by default the same) and `block_size` are what is chosen at first.
    """
    races = _Races(session)
    with gradio.Blocks(title="cllm compare", analytics_enabled=False) as page:
        gradio.Markdown(
            "## Decoding side by side\nEach color is one forward pass. The sides take turns on the device, and each "
            "clock counts its own time alone."
        )
        inputs = _make_choices(model, target, block_size)
        prompt_box = gradio.Textbox(label="Prompt", lines=3, elem_id="prompt")
        with gradio.Row():
            run_button = gradio.Button("Run", variant="primary", elem_id="run")
            stop_button = gradio.Button("Stop", variant="stop", elem_id="stop")
        verdict_box = gradio.HTML("", elem_id="verdict")
        with gradio.Row():
            left_box = gradio.HTML(_waiting("generate()"), elem_id="left")
            right_box = gradio.HTML(_waiting("Jacobi decoding"), elem_id="right")
        outputs = [left_box, right_box, verdict_box]
        gradio.on(
            [run_button.click, prompt_box.submit], races.run, [prompt_box, *inputs], outputs, show_progress="hidden"
        )
        stop_button.click(races.stop, None, None, queue=False)
        page.unload(races.stop)
    return page


def _make_choices(model: str, target: str | None, block_size: int | str) -> list[Any]:
    with gradio.Row():
        model_box = gradio.Textbox(model, label="Model", info="folder or Hub id; an adapter too")
        target_box = gradio.Textbox(target or "", label="Model on the left", info="empty for the same one")
        mode_box = gradio.Dropdown([_DEFAULT_MODE, *MODES], value=_DEFAULT_MODE, label="Mode")
        size_box = gradio.Textbox(str(block_size), label="Block size", info="a number, or auto")
    with gradio.Row():
        temperature_box = gradio.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 is greedy")
        tokens_box = gradio.Slider(16, 1024, DEFAULT_TOKENS, step=16, label="Longest response, in tokens")
        chat_box = gradio.Checkbox(True, label="Chat", info="where the tokenizer has a chat template")
    return [model_box, target_box, mode_box, size_box, temperature_box, tokens_box, chat_box]


class _Races:
    """The races of all visitors, one after the other, or the clocks would show each other's work."""

    def __init__(self, session: Session):
        self._session = session
        self._running: dict[str, Race] = {}  # by visitor
        self._one_at_a_time = threading.Lock()

    def run(
        self,
        prompt: str,
        model: str,
        target: str,
        mode: str,
        block_size: Any,
        temperature: float,
        tokens: float,
        chat: bool,
        request: gradio.Request,
    ) -> Iterator[tuple[str, str, str]]:
        """Run a race, and show both sides as they come, as HTML, and in the end what is to be said of them."""
        chosen = None if mode == _DEFAULT_MODE else mode
        size, is_chat = _read_block_size(block_size), None if chat else False
        question = Question(prompt, chosen, size, int(tokens), float(temperature), is_chat)
        with self._one_at_a_time:
            yield _waiting("loading"), _waiting("loading"), ""
            try:
                race = self._session.prepare(question, model.strip(), target.strip() or None)
            except (OSError, ValueError) as error:
                raise gradio.Error(str(error), print_exception=False) from None
            self._running[str(request.session_hash)] = race
            try:
                for left, right in race.watch(_SECONDS_A_PICTURE):
                    said = compare(left, right, question.is_sampled, race.find_parting(left, right))
                    lines = [html.escape(line) for line in said]
                    yield format_side(left), format_side(right), "<br>".join(lines)
            finally:
                self._running.pop(str(request.session_hash), None)

    def stop(self, request: gradio.Request) -> None:
        """Stop what this visitor has started."""
        race = self._running.get(str(request.session_hash))
        if race is not None:
            race.stop()


def launch_page(page: Any, host: str, port: int | None, wait: bool = True) -> str:
    """Serve the page until Ctrl-C, or with `wait=False` in the background, and return its address."""
    theme = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",))  # none from elsewhere
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=not wait, theme=theme, css=_CSS,
        footer_links=[],
    )  # fmt: skip
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
    return int(text) if text.isdigit() else text
