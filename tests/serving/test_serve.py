"""`cllm serve`: the host's server, asked by the client of OpenAI, answers by Jacobi decoding with the greedy text."""

import copy
import itertools
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from conftest import make_model
from lossless_adapters import save_base, save_lossless_adapter
from processes import cllm_process
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.cli.serve import Serve

import cllm_hf
from cllm_hf import serving
from cllm_hf.cli import _report_model, main
from cllm_hf.decoding.block_size import _SIZES
from cllm_hf.serving import ServingLimits, _prepare, jacobi_models
from cllm_hf.serving.requests import _LARGEST_AUTO, _WatchedStreamer


LENGTH = 40
MESSAGES = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_tokenizer):
    """A model with Jacobi defaults and one without. They know printable ASCII only, so that all they say is text."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}|{% endfor %}assistant:"
    path = tmp_path_factory.mktemp("serve")
    model = make_model("llama", vocab_size=96, eos_token_id=tokenizer.eos_token_id)
    for name in ("plain", "cllm"):
        if name == "cllm":
            cllm_hf.set_jacobi_defaults(model, block_size=8)
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return {"plain": str(path / "plain"), "cllm": str(path / "cllm")}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, is_alive=lambda: True):
    end = time.monotonic() + 60
    while time.monotonic() < end and is_alive():
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError


def make_client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def greedy_text(folder, prompt, **options):
    """What plain greedy decoding says, and how many forward passes it takes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": LENGTH, "decoding": "autoregressive", **options}
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


class Server:
    """The host's server in a thread, the models that it has loaded, and their forward passes."""

    def __init__(self, folder, block_size=None, limits=None, **options):
        self.folder, self.models, self.num_forwards = folder, [], 0
        port = free_port()
        options = {"force_model": folder, "device": "cpu", **options}
        with jacobi_models(block_size, self.watch, limits):
            self.serve = Serve(host="127.0.0.1", port=port, non_blocking=True, **options)
        wait_for(port)
        self.port = port
        self.client = make_client(port)

    def watch(self, model):
        self.models.append(model)
        model.register_forward_hook(self.count)

    def count(self, *_):
        self.num_forwards += 1

    def stop(self):
        self.client.close()
        self.serve.kill_server()

    def answers(self, **options):
        """The text of each way to ask, and its forward passes."""
        asked = {"model": self.folder, "max_tokens": LENGTH, **options}
        chat, completions = self.client.chat.completions, self.client.completions
        ways = {
            "chat": lambda: chat.create(messages=MESSAGES, **asked).choices[0].message.content,
            "chat stream": lambda: "".join(
                chunk.choices[0].delta.content or "" for chunk in chat.create(messages=MESSAGES, stream=True, **asked)
            ),
            "completion": lambda: completions.create(prompt="Hello.", **asked).choices[0].text,
            "completion stream": lambda: "".join(
                chunk.choices[0].text for chunk in completions.create(prompt="Hello.", stream=True, **asked)
            ),
        }
        answers = {}
        for name, ask in ways.items():
            self.num_forwards = 0
            answers[name] = (ask(), self.num_forwards)
        return answers


@pytest.fixture(params=["cllm", "plain"])
def server(folders, request):
    """A server of a model that has Jacobi defaults, or of one that gets them from `--block-size`."""
    server = Server(folders[request.param], block_size={"cllm": None, "plain": 12}[request.param])
    yield server
    server.stop()


def expected_answers(folder, **options):
    chat = greedy_text(folder, "user:Hello.|assistant:", **options)
    completion = greedy_text(folder, "Hello.", **options)
    return {"chat": chat, "chat stream": chat, "completion": completion, "completion stream": completion}


def assert_fewer_forwards(answers, expected):
    assert {name: text for name, (text, _) in answers.items()} == {name: text for name, (text, _) in expected.items()}
    for name, (_, num_forwards) in answers.items():
        assert 0 < num_forwards < expected[name][1], name


def test_answers_are_greedy_and_take_fewer_forwards(server):
    assert_fewer_forwards(server.answers(), expected_answers(server.folder))
    assert len(server.models) == 1


def test_options_of_a_request(server):
    text = greedy_text(server.folder, "Hello.")[0]
    stop = text[12:14]
    stopped = server.client.completions.create(model=server.folder, prompt="Hello.", max_tokens=LENGTH, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop) + 2]
    # Without `do_sample` in the model's own defaults the host answers greedily, at every temperature.
    for temperature in (0.0, 0.7):
        assert_fewer_forwards(server.answers(temperature=temperature), expected_answers(server.folder))
    penalized = expected_answers(server.folder, repetition_penalty=1.5)
    answers = server.answers(frequency_penalty=0.5)
    assert {name: text for name, (text, _) in answers.items()} == {name: text for name, (text, _) in penalized.items()}
    biased = greedy_text(server.folder, "user:Hello.|assistant:", sequence_bias={(5,): 4.0})[0]
    asked = {"model": server.folder, "messages": MESSAGES, "max_tokens": LENGTH, "logit_bias": {"5": 4.0}}
    assert server.client.chat.completions.create(**asked).choices[0].message.content == biased
    # A generation config in the request comes before the model's.
    config = {"generation_config": json.dumps({"jacobi_block_size": 2})}
    assert_fewer_forwards(server.answers(extra_body=config), expected_answers(server.folder))
    config = {"generation_config": json.dumps({"decoding": "autoregressive"})}
    assert server.answers(extra_body=config) == expected_answers(server.folder)


def test_lossless_adapters_draft_by_default(folders, tmp_path, capfd):
    tokenizer = AutoTokenizer.from_pretrained(folders["plain"])
    base = save_base(tmp_path / "base", tokenizer, vocab_size=96, eos_token_id=tokenizer.eos_token_id)
    folder = str(save_lossless_adapter(tmp_path / "adapter", base, tokenizer))
    expected, autoregressive = expected_answers(folder), {"decoding": "autoregressive"}
    server = Server(folder, limits=ServingLimits(max_block_size=16))
    try:
        answers = server.answers()
        assert_fewer_forwards(answers, expected)
        assert all(num_forwards <= 9 for _, num_forwards in answers.values())  # all drafts are right
        extra = {"generation_config": json.dumps({"jacobi_drafts": 1, "jacobi_block_size": 3})}
        assert_fewer_forwards(server.answers(extra_body=extra), expected)
        assert server.answers(extra_body={"generation_config": json.dumps(autoregressive)}) == expected
        with pytest.raises(openai.BadRequestError, match="`jacobi_drafts` must be an integer of at least 1"):
            ask(server, "completion", False, with_config(jacobi_drafts=0))
    finally:
        server.stop()
    for block_size, expected_size in ((None, 7), (4, 4), ("auto", "auto")):
        _prepare(server.models[0], block_size)
        _report_model(server.models[0])
        text = f"{folder} decodes losslessly: its adapter drafts, with block size {expected_size}."
        assert text in capfd.readouterr().err


def test_models_without_defaults_are_served_as_by_the_host(folders):
    server = Server(folders["plain"])
    try:
        assert server.answers() == expected_answers(folders["plain"])
    finally:
        server.stop()


@pytest.fixture(scope="module")
def limited(folders):
    """A server with limits; every token that its model knows is one of text."""
    server = Server(folders["cllm"], limits=ServingLimits(max_new_tokens=48, max_block_size=16, max_cache_length=64))
    yield server
    server.stop()


def ask(server, endpoint, stream, options):
    """Ask as a client of OpenAI does, to the end of the stream if there is one; returns the text."""
    client, asked = server.client, {"model": server.folder, "stream": stream, **options}
    if endpoint == "chat":
        answer = client.chat.completions.create(messages=MESSAGES, **asked)
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    if endpoint == "completion":
        answer = client.completions.create(**{"prompt": "Hello.", **asked})
        return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    if "max_tokens" in asked:
        asked["max_output_tokens"] = asked.pop("max_tokens")
    answer = client.responses.create(input="Hello.", **asked)
    return "".join(getattr(event, "delta", "") for event in answer) if stream else answer.output_text


def with_config(**config):
    return {"max_tokens": 8, "extra_body": {"generation_config": json.dumps(config)}}


REFUSED = {
    "beams": (with_config(num_beams=2), "beam"),
    "attentions": (with_config(output_attentions=True), "output_attentions"),
    "scores": (with_config(output_scores=True, return_dict_in_generate=True), "return_dict_in_generate"),
    "a block without positions": (with_config(jacobi_block_size=0), 'integer of at least 1 or \\"auto\\", got 0'),
    "a large block": (
        with_config(jacobi_block_size=17),
        "at most 16 positions in a forward pass, got a request for 17",
    ),
    "a block of any size": (with_config(jacobi_block_size="auto"), "got a request for 64"),
    "a block that nobody names": (with_config(decoding="jacobi", jacobi_candidates=20), "a request for 8 with"),
    "a cache of a length that is none": (with_config(max_cache_len="long"), "`max_cache_len` must be an integer"),
    "many candidates": (with_config(jacobi_block_size=8, jacobi_candidates=2), "at most 16 positions"),
    "many tokens": ({"max_tokens": 49}, "at most 48 tokens, got a request for 49"),
    "many tokens in a config": ({"extra_body": with_config(max_new_tokens=10**9)["extra_body"]}, "at most 48 tokens"),
    "a large cache": (with_config(cache_implementation="static", max_cache_len=10**9), "static caches of at most 64"),
    "no tokens": ({"max_tokens": 0}, "max_new_tokens"),
    "a config that is none": ({"extra_body": {"generation_config": "[1]"}}, "must be a JSON object in a string"),
    "an unknown option": (with_config(jacobi_block=8), "Unknown options ['jacobi_block']"),
    "a config that is no JSON": ({"extra_body": {"generation_config": "{"}}, "must be a JSON object in a string"),
}


@pytest.mark.parametrize(
    "endpoint", ["completion", *(pytest.param(one, marks=pytest.mark.slow) for one in ("chat", "response"))]
)
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_request_cannot_have_is_refused_before_anything_is_answered(name, endpoint, limited):
    options, message = REFUSED[name]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            ask(limited, endpoint, stream, options)
        assert error.value.status_code == 400 and message in error.value.response.text
        assert error.value.response.json()["error"]["type"] == "invalid_request_error"
    assert ask(limited, endpoint, True, {"max_tokens": 4}) == ask(limited, endpoint, False, {"max_tokens": 4}) != ""


def test_models_that_return_a_dict_by_default(folders, tmp_path):
    folder = shutil.copytree(folders["cllm"], tmp_path / "model")
    config = GenerationConfig.from_pretrained(folder)
    config.update(return_dict_in_generate=True, output_scores=True)
    config.save_pretrained(folder)
    server = Server(str(folder))
    try:
        texts = [ask(server, "completion", stream, {"max_tokens": 8}) for stream in (True, False)]
    finally:
        server.stop()
    assert texts == [greedy_text(folders["plain"], "Hello.", max_new_tokens=8)[0]] * 2


def test_what_is_not_asked_for_is_brought_within_the_limits(limited):
    text = greedy_text(limited.folder, "Hello.", max_new_tokens=48)[0]
    for stream in (False, True):
        assert ask(limited, "completion", stream, {}) == text
        assert ask(limited, "completion", stream, {"prompt": "Hello." * 10}) != ""  # 4 of 64 tokens are left
        for prompt, options in (("Hello." * 11, {}), ("Hello." * 10, {"max_tokens": 5})):
            with pytest.raises(openai.BadRequestError, match="at most 64 tokens of prompt and response together"):
                ask(limited, "completion", stream, {"prompt": prompt, **options})


@pytest.mark.parametrize(
    ("fields", "default", "refusal"),
    [
        ({"jacobi_block_size": 17}, {}, "got a request for 17"),
        ({"jacobi_block_size": "auto"}, {}, "got a request for 64"),
        ({}, {"jacobi_block_size": 64}, None),
        ({"jacobi_block_size": 64}, {"jacobi_block_size": 64}, None),
        ({}, {"jacobi_block_size": "auto"}, None),
        ({"decoding": "jacobi"}, {}, None),
        ({"jacobi_seed": 3}, {}, None),
        ({}, {"decoding": "lossless"}, None),
        ({"jacobi_candidates": 2}, {}, "got a request for 64 with `jacobi_candidates=2`"),
        ({}, {"jacobi_block_size": 16, "jacobi_candidates": 1}, "`jacobi_candidates=1`"),
        ({"max_new_tokens": "5"}, {}, "`max_new_tokens` must be an integer, got '5'"),
        ({}, {"max_new_tokens": 100}, "at most 48 tokens, got a request for 100"),
        ({"max_length": 100}, {}, "got a request for 95"),
    ],
)
def test_limits_hold_for_defaults_of_the_model_too(fields, default, refusal):
    limits = ServingLimits(max_new_tokens=48, max_block_size=16)
    for asks in (True, False):
        config, default_config = GenerationConfig(), GenerationConfig()
        for options, values in ((config, fields), (default_config, default)):
            for name, value in values.items():
                setattr(options, name, value)
        is_length = (
            not any(word in str((fields, default)) for word in ("jacobi", "lossless"))
            and fields.get("max_new_tokens") != "5"
        )
        if refusal and (asks or not is_length):
            with pytest.raises(ValueError, match=refusal):
                limits.apply(config, default_config, 5, asks)
            continue
        limits.apply(config, default_config, 5, asks)
        if is_length:
            assert config.max_new_tokens == 48
        else:
            assert config.jacobi_block_size == 16


def test_the_largest_block_of_auto_is_known():
    assert _LARGEST_AUTO == max(_SIZES)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_block_size", "max_cache_length"])
def test_limits_must_be_positive_integers(name, folders, capfd):
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got {value}"):
            ServingLimits(**{name: value})
    assert main(["serve", folders["cllm"], f"--{name.replace('_', '-')}", "0"]) == 1
    assert f"`{name}` must be an integer of at least 1, got 0" in capfd.readouterr().err


@pytest.mark.parametrize(("limits", "bound"), [(ServingLimits(), 2048), (ServingLimits(max_cache_length=300), 300)])
def test_no_request_makes_the_static_cache_of_others_longer(limits, bound):
    """All are as long; a text that would need a longer one, with a block of 16 after it, is decoded without one."""
    lengths = set()
    for num_new, default in itertools.product((1, 20, bound - 26, bound - 25, bound - 10), (None, "static")):
        config = GenerationConfig(max_new_tokens=num_new, cache_implementation="static", jacobi_compile=True)
        limits.apply(config, GenerationConfig(cache_implementation=default), 10, True)
        if num_new + 10 + 16 <= bound:
            assert (config.cache_implementation, config.jacobi_compile) == ("static", True)
            lengths.add(config.max_cache_len)
        else:
            assert (config.cache_implementation, config.jacobi_compile) == ("dynamic", False)
    assert lengths == {bound}
    plain = GenerationConfig(max_new_tokens=20)
    limits.apply(plain, GenerationConfig(), 10, True)
    assert plain.cache_implementation is None and plain.max_cache_len is None
    if limits.max_cache_length:
        with pytest.raises(ValueError, match="at most 300 tokens"):
            limits.apply(GenerationConfig(max_new_tokens=bound - 9), GenerationConfig(), 10, True)


def test_a_long_text_on_a_server_that_compiles_is_the_greedy_one(folders, monkeypatch):
    monkeypatch.setattr("cllm_hf.serving.requests._STATIC_LENGTH", 32)
    server = Server(folders["cllm"], compile=True)
    try:
        assert ask(server, "completion", False, {"max_tokens": 40}) == greedy_text(folders["cllm"], "Hello.")[0]
    finally:
        server.stop()


def post(server, path, body):
    """Status and text of an answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "messages",
    [
        *(None, [], "Hello.", ["Hello."], [{"content": "Hello."}]),
        *([{"role": "user", "content": content}] for content in (5, [5], [{}], [{"type": "text"}], {"type": "text"})),
        *([{"role": "assistant", "tool_calls": calls}] for calls in (5, [5], [{"function": {"name": "a"}}])),
    ],
    ids=str,
)
def test_what_is_no_chat_is_refused(messages, limited):
    for stream in (False, True):
        status, text = post(limited, "/v1/chat/completions", {"messages": messages, "stream": stream})
        assert status == 400 and "must be a list of objects with `role` and `content`" in text


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("stop", 5, "a string or a list of strings"),
        ("stop", ["a", 5], "a string or a list of strings"),
        ("max_tokens", "many", "an integer"),
        ("max_tokens", [4], "an integer"),
        ("max_completion_tokens", float("inf"), "an integer"),
        ("seed", "five", "an integer"),
        ("temperature", "warm", "a number"),
        ("top_p", {}, "a number"),
        ("frequency_penalty", [], "a number"),
        ("logit_bias", [5], "an object"),
        ("chat_template_kwargs", 1, "an object"),
        ("tools", {"a": 1}, "a list"),
        ("model", 5, "a string"),
    ],
)
def test_a_field_of_another_type_is_refused(field, value, kind, limited):
    for stream in (False, True):
        body = {"messages": MESSAGES, "stream": stream, "max_tokens": 4, field: value}
        status, text = post(limited, "/v1/chat/completions", body)
        assert status == 400 and f"`{field}` must be {kind}, got " in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop", None), ("stop", "zz"), ("stop", ["zz"]), ("max_tokens", "4"), ("temperature", "0"), ("seed", "3")],
)
def test_a_field_of_a_type_that_the_server_takes_is_taken(field, value, limited):
    body = {"messages": MESSAGES, "max_tokens": 4, field: value}
    status, text = post(limited, "/v1/chat/completions", body)
    assert status == 200, text


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_before_the_first_token_is_said(stream, limited, folders, monkeypatch):
    body = {"prompt": "", "max_tokens": 4, "stream": stream}
    assert post(limited, "/v1/completions", body)[0] == 400  # this tokenizer adds no token of its own
    body = {"prompt": "Hello.", "max_tokens": 4, "stream": stream, "generation_config": '{"eos_token_id": "x"}'}
    status, text = post(limited, "/v1/completions", body)
    error = json.loads(text)["error"]
    assert status == 500 and error["type"] == "server_error" and error["message"].startswith("TypeError: ")
    status, text = post(limited, "/load_model", {"model": 5})
    assert status == 500 and "server_error" in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_positions(stream, byte_tokenizer, tmp_path):
    model = make_model("gpt2", vocab_size=len(byte_tokenizer), n_positions=32)
    for part in (model, byte_tokenizer):
        part.save_pretrained(tmp_path)
    server = Server(str(tmp_path))
    try:
        status, text = post(server, "/v1/completions", {"prompt": "Hello " * 6, "max_tokens": 4, "stream": stream})
        assert status == 400 and "must fit into the 32 positions of the model, got 36 tokens" in text
        assert post(server, "/v1/completions", {"prompt": "Hello", "max_tokens": 4, "stream": stream})[0] == 200
    finally:
        server.stop()


def test_a_server_with_a_model_serves_no_other(limited, folders):
    for path in ("/v1/completions", "/load_model"):
        status, text = post(limited, path, {"model": folders["plain"], "prompt": "Hello.", "max_tokens": 2})
        assert status == 400 and "pinned to" in text
    assert '"ready"' in post(limited, "/load_model", {"model": limited.folder})[1]
    assert len(limited.models) == 1


def test_a_server_without_a_model_loads_any(folders):
    server = Server(folders["cllm"], force_model=None)
    try:
        assert '"ready"' in post(server, "/load_model", {"model": folders["plain"]})[1]
        assert ask(server, "completion", False, {"max_tokens": 3}) != ""
        assert len(server.models) == 2
        for model, reason in ((None, "`model` must name a model"), ("./nothing", "./nothing")):
            for stream in (False, True):
                body = {"model": model, "prompt": "Hello.", "max_tokens": 2, "stream": stream}
                status, text = post(server, "/v1/completions", body)
                assert status == 400 and reason in text and "invalid_request_error" in text
    finally:
        server.stop()


def test_an_error_in_the_midst_of_a_stream_is_valid_json(limited, monkeypatch):
    model = limited.models[0]
    generate = type(model).generate

    def fail_later(self, *args, streamer=None, **kwargs):
        generate(self, *args, streamer=streamer, **kwargs)
        raise ValueError('it "fails"\nlater')

    monkeypatch.setattr(type(model), "generate", fail_later)
    monkeypatch.setattr(_WatchedStreamer, "end", lambda self: None, raising=False)
    status, text = post(limited, "/v1/completions", {"prompt": "Hello.", "max_tokens": 4, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert status == 200 and events[0]["choices"] and events[-1] == {"error": 'it "fails"\nlater'}


def test_the_host_is_left_as_it_was(folders):
    from transformers.cli.serving import model_manager, server, utils

    names = [(model_manager, "ModelManager"), (utils, "GenerationState"), (server, "build_server")]
    before = [getattr(module, name) for module, name in names]
    with pytest.raises(KeyError), jacobi_models(4):
        assert all(getattr(module, name) is not value for (module, name), value in zip(names, before))
        raise KeyError
    assert [getattr(module, name) for module, name in names] == before


def test_two_threads_that_load_one_model_prepare_it_once(folders):
    from transformers.cli.serving import model_manager

    models = []
    with jacobi_models(4, models.append):
        manager = model_manager.ModelManager(device="cpu")
        threads = [
            threading.Thread(target=manager.load_model_and_processor, args=(f"{folders['plain']}@main",))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        manager.shutdown()
    assert [model.generation_config.jacobi_block_size for model in models] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "0"], 'integer of at least 1 or "auto", got 0'),
        (["--block-size", "many"], "got 'many'"),
        (["--block-size=8", "--continuous-batching"], "Drop one of the two"),
        (["--block-size=8", "--max-block-size=4"], "must not go beyond `--max-block-size`, got 8 and 4"),
        (["--dtype", "float17"], "float17"),
    ],
)
def test_what_is_refused(folders, arguments, message, capfd):
    assert main(["serve", folders["cllm"], *arguments]) == 1
    assert message in capfd.readouterr().err


def test_arguments_that_the_host_does_not_know(folders, capfd):
    with pytest.raises(SystemExit) as error:
        main(["serve", folders["cllm"], "--prot", "80"])
    assert error.value.code == 2
    assert "--prot" in capfd.readouterr().err


def test_missing_extra(folders, capfd, monkeypatch):
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert main(["serve", folders["cllm"]]) == 1
    assert 'pip install "cllm_hf[serve]"' in capfd.readouterr().err


def test_help_names_our_option_and_those_of_the_host(capfd):
    assert main(["serve", "--help"]) == 0
    out = capfd.readouterr().out
    assert "--continuous-batching" in out
    for name in ("block-size", "max-new-tokens", "max-block-size", "max-cache-length"):
        assert f"--{name} N" in out


def test_command_serves_until_it_is_interrupted(folders):
    port = free_port()
    arguments = ["serve", folders["plain"], "--block-size", "12", "--device", "cpu"]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    with cllm_process(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        wait_for(port, lambda: process.poll() is None)
        with make_client(port) as client:
            answer = client.chat.completions.create(model=folders["plain"], messages=MESSAGES, max_tokens=LENGTH)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    assert answer.choices[0].message.content == expected_answers(folders["plain"])["chat"][0]
    assert f"{folders['plain']} decodes by Jacobi, with block size 12." in log
    assert process.returncode == 130
    assert "the server has been stopped" in log and "Traceback" not in log
