"""The page in a browser: a prompt is typed, both texts come, a run is stopped, nothing is loaded from elsewhere."""

import shutil
import time

import pytest
from conftest import make_model

from cllm_hf.show.race import Session, Snapshot


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
def address(tmp_path, tokenizer):
    from cllm_hf.show.page import launch_page, make_page

    tokenizer.save_pretrained(tmp_path)
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    # Slow enough to be stopped, however busy the machine is.
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(0.03))
    page = make_page(Session(lambda name: model), str(tmp_path), block_size=4)
    yield launch_page(page, "127.0.0.1", None, wait=False)
    page.close()


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
