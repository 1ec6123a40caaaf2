"""The page in a browser: a prompt is typed, both texts come, a run is stopped, nothing is loaded from elsewhere."""

import shutil
import threading
import time

import pytest
from conftest import make_model

from cllm_hf.show.race import Question, Session, Snapshot


gradio = pytest.importorskip("gradio", reason="the page needs the extra `demo`")


def side(**changes):
    values = {
        "name": "jacobi",
        "pieces": [("<b>", 1), ("two words", 2)],
        "token_ids": [1, 2, 3],
        "num_forwards": 2,
        "seconds": 1.5,
        "block": ["<i>", "wrong"],
        "num_accepted": 1,
        "is_done": True,
    }
    return Snapshot(**{**values, **changes})


def test_a_side_is_shown_with_its_figures_and_what_it_says_as_text():
    from cllm_hf.show.page import format_side

    shown = format_side(side())
    assert "&lt;b&gt;" in shown and "<b>2.0</b> tokens/s" in shown and "<i>" not in shown
    assert "1.50 tokens per forward pass" in shown and 'title="forward pass 2: 2 tokens"' in shown
    assert shown.count("cllm-right") == 1 and shown.count("cllm-wrong") == 1
    assert "&lt;no&gt;" in format_side(side(problem="<no>")) and "…" in format_side(side(is_done=False))


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright and Chromium")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def slow_model(tmp_path, tokenizer):
    """A folder with a tokenizer, and a model slow enough to be stopped, however busy the machine is."""
    tokenizer.save_pretrained(tmp_path)
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(0.03))
    return str(tmp_path), model


@pytest.fixture
def address(slow_model):
    from cllm_hf.show.page import Races, launch_page, make_page

    folder, model = slow_model
    page = make_page(Races(Session(lambda name: model)), Question("Mia has", block_size=4), folder)
    yield launch_page(page, "127.0.0.1", None, wait=False)
    page.close()


class Visitor:
    """As gradio tells visitors apart."""

    def __init__(self, name):
        self.session_hash = name


def run(races, folder, name="first", tokens=1000, **changes):
    choices = {"mode": "as the model is", "block_size": "4", "candidates": 0, "temperature": 0, "tokens": tokens}
    choices["chat"] = True
    return races.run("Mia has", folder, "", **{**choices, **changes}, request=Visitor(name))


def test_what_is_chosen_at_first(slow_model):
    from cllm_hf.show.page import Races, make_page

    question = Question("Mia has", "jacobi", 8, 2000, 2.5, False, 3)
    page = make_page(Races(Session(lambda name: None)), question, "one", "two")
    values = {block.label: block.value for block in page.blocks.values() if getattr(block, "label", None)}
    assert values == {
        **{"Prompt": "Mia has", "Model": "one", "Model on the left": "two", "Mode": "jacobi", "Block size": "8"},
        **{"Candidates": 3, "Temperature": 2.5, "Longest response, in tokens": 2000, "Chat": False},
    }


@pytest.mark.parametrize("stops", ["before it runs", "while it loads", "while it runs"])
def test_a_run_is_stopped_at_any_time(slow_model, stops):
    from cllm_hf.show.page import Races

    folder, model = slow_model

    def load(name):
        if stops == "while it loads":
            races.stop(Visitor("other"))
            races.stop(Visitor("first"))
        return model

    races = Races(Session(load))
    running = run(races, folder)
    seen = [next(running)]
    assert "loading" in seen[0][0]
    if stops == "before it runs":
        races.stop(Visitor("first"))
    for shown in running:
        seen.append(shown)
        if stops == "while it runs" and "cllm-right" in shown[1] or len(seen) > 200:
            races.stop(Visitor("first"))
    assert len(seen) < 200
    assert ("Stopped. Up to here" in seen[-1][2]) == (stops == "while it runs")
    assert ("stopped" in seen[-1][0]) == (stops != "while it runs")
    assert "The texts are equal" in list(run(races, folder, tokens=4))[-1][2]  # the next one is as ever


def test_who_waits_is_told_so_and_may_stop(slow_model):
    from cllm_hf.show.page import Races

    folder, model = slow_model
    races = Races(Session(lambda name: model))
    first = run(races, folder)
    next(first), next(first)
    second = run(races, folder, "second")
    assert "waiting for another visitor" in next(second)[0]
    races.stop(Visitor("second"))
    assert "stopped" in list(second)[-1][0]
    first.close()
    assert "The texts are equal" in list(run(races, folder, "second", tokens=4))[-1][2]


def test_nothing_runs_when_the_page_is_closed(slow_model):
    from cllm_hf.show.page import Races

    folder, model = slow_model
    races, before = Races(Session(lambda name: model)), threading.active_count()
    watched = run(races, folder)
    next(watched), next(watched)
    assert threading.active_count() > before
    races.close()
    assert threading.active_count() == before
    waiting = run(races, folder, "another")
    next(waiting)
    races.close()  # which waits for nothing that will not come
    assert "stopped" in list(waiting)[-1][0]


def start(view):
    """Press Run. gradio passes over a click while it has not seen the end of the run before."""
    is_loading = "document.querySelector('#left .cllm-figures').innerText.startsWith('loading')"
    for _ in range(100):
        view.click("#run")
        try:
            return view.wait_for_function(is_loading, timeout=500)
        except Exception as error:
            if type(error).__name__ != "TimeoutError":
                raise
    raise AssertionError("Run does nothing")


@pytest.mark.slow
def test_the_page_in_a_browser(browser, address):
    view = browser.new_page()
    elsewhere = []

    def note(request):
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    view.on("request", note)
    view.goto(address)
    view.fill("#prompt textarea", "Mia has 9 books . Mia finds 2 more .")
    start(view)
    view.wait_for_selector("#verdict >> text=The texts are equal", timeout=120_000)
    texts = [view.inner_text(f"#{name} .cllm-text") for name in ("left", "right")]
    assert texts[0] == texts[1] != ""
    assert view.locator("#left .cllm-text span").count() > view.locator("#right .cllm-text span").count() > 1
    assert "forward passes" in view.inner_text("#right .cllm-figures")

    view.get_by_label("Block size").fill("3")  # not another number that begins so
    view.locator("input[aria-label^='number input for Longest response']").fill("1024")
    start(view)
    view.wait_for_selector("#left .cllm-text span:nth-child(20)", timeout=120_000)  # it streams
    view.click("#stop")
    view.wait_for_function("!document.querySelector('#left .cllm-figures').innerText.includes('…')", timeout=120_000)
    assert view.locator("#left .cllm-text span").count() < 1024

    view.fill("#prompt textarea", "")
    start(view)
    view.wait_for_selector("text=`prompt` must hold text", timeout=120_000)
    assert elsewhere == []
