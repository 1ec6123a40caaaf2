"""`cllm compare` in a terminal: both texts, what is refused, and that a page needs gradio."""

import sys

import pytest
from conftest import make_model

import cllm_hf.show
from cllm_hf.cli import main
from cllm_hf.loading import load_tokenizer
from cllm_hf.show.race import Question, Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from cllm_hf.demo.problems import make_tokenizer

    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_both_texts_are_printed(folder, capsys):
    options = ["--block-size", "4", "--max-new-tokens", "12", "--device", "cpu"]
    assert main(["compare", "--model", folder, "--prompt", "Mia has 9 books .", *options]) == 0
    out = capsys.readouterr().out
    assert "generate(): " in out and "jacobi: " in out and "The texts are equal: 12 of 12 tokens." in out
    assert "\x1b" not in out  # piped


def test_candidates_are_passed_on(folder):
    question = Question("Mia has 9 books . Mia has 9 books .", block_size=4, candidates=3, max_new_tokens=4)
    race = Session(lambda name: make_model("llama", vocab_size=len(load_tokenizer(name)))).prepare(question, folder)
    assert [way.options.get("jacobi_candidates") for way in race._ways] == [None, 3]
    with pytest.raises(ValueError, match="`jacobi_candidates`"):
        Question("a", candidates=-1).check()


def test_another_target_model_and_sampling(folder, capsys):
    options = ["--target", folder, "--temperature", "0.7", "--max-new-tokens", "8", "--device", "cpu"]
    assert main(["compare", "--model", folder, "--prompt", "Mia has", "--mode", "jacobi", *options]) == 0
    assert "samples of the same distribution" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--prompt"),
        (["--prompt", "  "], "`prompt`"),
        (["--prompt", "a", "--temperature", "-1"], "`temperature`"),
        (["--prompt", "a", "--mode", "lossless", "--device", "cpu"], "adapter"),
        (["--prompt", "Mia has", "--target", "OTHER", "--device", "cpu"], "tokenizer of the other model"),
        (["--web", "--temperature", "9"], "`temperature`"),
        (["--prompt", "a", "--target", "./none"], "`--target` must be a folder"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, tmp_path, byte_tokenizer, capsys, options, named):
    if "OTHER" in options:
        make_model("llama", vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path)
        byte_tokenizer.save_pretrained(tmp_path)
        options = [str(tmp_path) if option == "OTHER" else option for option in options]
    assert main(["compare", "--model", folder, *options]) == 1
    assert named in capsys.readouterr().err


def test_a_missing_model_is_an_error_of_one_line(tmp_path, capsys):
    assert main(["compare", "--model", str(tmp_path / "none"), "--prompt", "a"]) == 1
    assert "`--model` must be a folder, or the id of a model on the Hub" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["99999", "-1", "x", "²"])
def test_a_port_that_there_is_not(folder, capsys, port):
    with pytest.raises(SystemExit):
        main(["compare", "--model", folder, "--web", "--port", port])
    assert "must be a port from 0 to 65535" in capsys.readouterr().err


def test_a_prompt_longer_than_the_positions(tmp_path, tokenizer, capsys):
    make_model("gpt2", vocab_size=len(tokenizer), n_positions=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--device", "cpu", "--max-new-tokens"]
    assert main(["compare", *options, "8", "--prompt", "Mia " * 30]) == 1
    assert "must fit into the 32 positions of the model, got 30 and 8 tokens" in capsys.readouterr().err
    assert main(["compare", *options, "2", "--prompt", "Mia " * 30]) == 0


def test_the_page_needs_gradio(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "cllm_hf.show.page", raising=False)
    monkeypatch.delattr(cllm_hf.show, "page", raising=False)
    assert main(["compare", "--model", folder, "--web"]) == 1
    assert "pip install cllm_hf[demo]" in capsys.readouterr().err


def test_models_that_are_no_longer_asked_for_are_let_go(folder, tmp_path, tokenizer):
    loaded = []

    def load(name):
        loaded.append(name)
        return make_model("llama", vocab_size=len(tokenizer))

    session = Session(load)
    question = Question("Mia has 9 books .", max_new_tokens=4)
    session.prepare(question, folder)
    session.prepare(question, folder)
    assert loaded == [folder] and list(session._models) == [folder]
    with pytest.raises(OSError):
        session.prepare(question, str(tmp_path))
    assert list(session._models) == [str(tmp_path)]


def test_a_chat_goes_through_the_template(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("Mia has 9")["input_ids"]
    assert Session._tokenize(Question("Mia has 9"), tokenizer) == plain
    with pytest.raises(ValueError, match="chat template"):
        Session._tokenize(Question("Mia has 9", is_chat=True), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} books"
    assert Session._tokenize(Question("Mia has 9"), tokenizer) == tokenizer("Mia has 9 books")["input_ids"]
    assert Session._tokenize(Question("Mia has 9", is_chat=False), tokenizer) == plain
