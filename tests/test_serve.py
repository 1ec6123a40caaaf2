"""`cllm serve`: the host's server, asked by the client of OpenAI, answers by Jacobi decoding with the greedy text."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest
from conftest import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

import cllm_hf
from cllm_hf import serving
from cllm_hf.cli import main
from cllm_hf.serving import jacobi_models


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
    """What plain greedy decoding says, and how many forwards it takes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": LENGTH, "decoding": "autoregressive", **options}
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


class Server:
    """The host's server in a thread, the models that it has loaded, and their forwards."""

    def __init__(self, folder, block_size=None):
        self.folder, self.models, self.num_forwards = folder, [], 0
        port = free_port()
        with jacobi_models(block_size, self.watch):
            self.serve = Serve(force_model=folder, host="127.0.0.1", port=port, device="cpu", non_blocking=True)
        wait_for(port)
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
        """The text of each way to ask, and its forwards."""
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


def test_models_without_defaults_are_served_as_by_the_host(folders):
    server = Server(folders["plain"])
    try:
        assert server.answers() == expected_answers(folders["plain"])
    finally:
        server.stop()


def test_the_host_is_left_as_it_was(folders):
    from transformers.cli.serving import model_manager

    with pytest.raises(KeyError), jacobi_models(4):
        assert model_manager.ModelManager is not ModelManager
        raise KeyError
    assert model_manager.ModelManager is ModelManager


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
    assert "--block-size N" in out and "--continuous-batching" in out


def test_command_serves_until_it_is_interrupted(folders):
    port = free_port()
    command = [sys.executable, "-m", "cllm_hf", "serve", folders["plain"], "--block-size", "12", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(port, lambda: process.poll() is None)
        with make_client(port) as client:
            answer = client.chat.completions.create(model=folders["plain"], messages=MESSAGES, max_tokens=LENGTH)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert answer.choices[0].message.content == expected_answers(folders["plain"])["chat"][0]
    assert f"{folders['plain']} decodes by Jacobi, with block size 12." in log
    assert process.returncode == 130
    assert "the server has been stopped" in log and "Traceback" not in log
