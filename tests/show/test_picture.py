"""`cllm show` draws what plain forward passes give, for one model or two, in a terminal and as PNG."""

import io
import re
import warnings

import matplotlib
import numpy as np
import pytest
import torch
import transformers
from conftest import make_model
from PIL import Image
from rich.cells import cell_len

from cllm_hf import draw_trajectories, set_jacobi_defaults
from cllm_hf.cli import main
from cllm_hf.show.picture import TrajectoryPicture, draw_blocks
from cllm_hf.show.terminal import BlockTrajectory, format_blocks


PROMPT = "Mia has 7 apples . Mia buys 5 more . How many apples does Mia have now ?"
BLOCK_SIZE = 6
# State 1 has a stationary token, state 2 fast-forwards one.
STATES = [[9, 9, 9, 9], [4, 9, 6, 9], [4, 5, 6, 7]]
WORDS = {4: "one", 5: "十分", 6: "\n", 7: "<eos>", 9: "e\u0301"}


@pytest.fixture(scope="module")
def models(tokenizer):
    kinds = {"target": "gpt2", "cllm": "qwen3"}
    models = {name: make_model(kind, vocab_size=len(tokenizer)) for name, kind in kinds.items()}
    set_jacobi_defaults(models["cllm"], BLOCK_SIZE)
    return models


@pytest.fixture(scope="module")
def folders(models, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@torch.no_grad()
def say_next(model, ids):
    """The model's token after every position, by one plain forward pass without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()


def slow_states(model, tokenizer, first, number, size):
    """Greedy decoding token by token up to the end of a block, then that block from its first draft."""
    context, end = tokenizer(PROMPT)["input_ids"], tokenizer.eos_token_id
    response = []
    while len(response) < (number + 1) * size and end not in response:
        response.append(say_next(model, context + response)[-1])
    before, right = context + response[: number * size], response[number * size :]
    states = [first]
    while states[-1] != right:
        states.append(say_next(model, before + states[-1])[len(before) - 1 : -1])
    return states


@pytest.mark.parametrize("block", [0, 1])
def test_states_are_those_of_plain_forwards(models, tokenizer, block):
    picture = draw_trajectories(models, tokenizer, PROMPT, BLOCK_SIZE, block)
    assert [found.name for found in picture.blocks] == ["target", "cllm"] and picture.prompt == PROMPT
    drafts = {tuple(found.states[0]) for found in picture.blocks}
    assert len(drafts) == 1 and set(drafts.pop()) <= set(tokenizer(PROMPT)["input_ids"])
    for found, model in zip(picture.blocks, models.values()):
        assert found.states == slow_states(model, tokenizer, found.states[0], block, BLOCK_SIZE)
        assert found.start == block * BLOCK_SIZE and found.num_iterations > 0


def test_a_longer_response_has_the_same_block(models, tokenizer):
    one, other = (
        draw_trajectories(models, tokenizer, PROMPT, BLOCK_SIZE, max_new_tokens=length) for length in (None, 20)
    )
    assert [block.states for block in one.blocks] == [block.states for block in other.blocks]
    assert one.to_png() == other.to_png() == one._repr_png_()


def test_text_marks_the_tokens_that_differ_from_the_fixed_point(models, tokenizer):
    picture = draw_trajectories(models, tokenizer, PROMPT, BLOCK_SIZE)
    parts = str(picture).split("\n\n")
    assert parts[0] == f"Prompt:\n    {PROMPT}" and parts[1].startswith("Block 0, tokens 0 to 5 of the response.")
    for block in picture.blocks:
        alone = TrajectoryPicture(PROMPT, [block], picture.decode)
        name, counts, *lines = alone.format(color=False, width=1000).split("\n\n")[2].splitlines()
        assert name == block.name and counts.startswith(f"{block.num_iterations} iteration")
        assert len(lines) == block.num_iterations + 1
        for line, state in zip(lines, block.states):
            texts = [picture.decode(token) for token in state]
            cells = [text if a == b else f"[{text}]" for text, a, b in zip(texts, state, block.states[-1])]
            assert line.split()[1:] == cells
        colored = alone.format(width=1000).split("\n\n")[2]
        wrong = sum(map(sum, block.wrong))
        assert colored.count("\033[31m") == wrong
        assert colored.count("\033[34m") == BLOCK_SIZE * len(block.states) - wrong


@pytest.mark.parametrize("color", [True, False])
def test_blocks_stand_side_by_side_where_there_is_room(color):
    short = BlockTrajectory(STATES[1:], name="分")
    long = BlockTrajectory(STATES, name="target model")
    alone = [format_blocks([block], WORDS.__getitem__, color, 200).splitlines() for block in (short, long)]
    both = format_blocks([short, long], WORDS.__getitem__, color, 200).splitlines()
    assert len(both) == 2 + 3
    plain = [[re.sub("\033\\[[0-9]+m", "", line) for line in lines] for lines in (*alone, both)]
    width = max(map(cell_len, plain[0])) + 4
    for number, line in enumerate(plain[2]):
        left = plain[0][number] if number < len(plain[0]) else ""
        assert line == left + " " * (width - cell_len(left)) + plain[1][number]
    room = width + max(map(cell_len, plain[1]))
    assert format_blocks([short, long], WORDS.__getitem__, color, room).splitlines() == both
    below = format_blocks([short, long], WORDS.__getitem__, color, room - 1).splitlines()
    assert below == [*alone[0], "", *alone[1]]


def test_what_is_counted_on_a_block():
    assert BlockTrajectory(STATES).describe() == "2 iterations to converge, 2 fast-forwarded, 1 stationary"
    record = {"response_ids": [4, 5, 6, 7, 4], "states": [STATES, [[9, 0, 0, 0], [4, 0, 0, 0]]]}
    block = BlockTrajectory.of(record, 1)
    assert (block.states, block.start, block.wrong) == ([[9], [4]], 4, [[True], [False]])


def opened(png):
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def reddish(picture):
    return int((picture[..., 0] - picture[..., 2] > 100).sum())


@pytest.mark.parametrize("size", [1, 10])
def test_picture_has_a_cell_a_token(size):
    right = [[token for token in range(size)]] * (size + 1)
    wrong = [[99 for _ in range(size)]] * size + right[:1]
    pictures = [opened(draw_blocks([BlockTrajectory(states, name="a")] * 2, str)) for states in (right, wrong)]
    height, width, _ = pictures[1].shape
    assert pictures[0].shape[0] == height >= (size + 1) * 30 and 200 < width < 3000
    # One corner in the legend, and two more cells for each further wrong token.
    per_cell = (reddish(pictures[1]) - reddish(pictures[0])) / (2 * size * size)
    assert reddish(pictures[0]) > 0 and per_cell > 0.5 * reddish(pictures[0])


def test_blocks_stand_one_below_the_other_in_a_picture_that_would_be_too_wide():
    block = BlockTrajectory([list(range(40))] * 2, name="a")
    one, two = (opened(draw_blocks([block] * number, lambda token: "w" * 12)).shape for number in (1, 2))
    assert one[1] == two[1] and one[0] < two[0]


def test_long_blocks_are_drawn_without_texts():
    block = BlockTrajectory([[0] * number + [1] * (200 - number) for number in range(0, 201, 4)], name="long")
    picture = opened(draw_blocks([block], lambda token: "0" * 10))
    assert max(picture.shape) < 3000 and reddish(picture) > picture.size / 3 / 4


def test_odd_tokens_are_drawn_as_they_are_without_a_word():
    odd = ["$x_1^2$", "\\frac", "$", "十分", "🤗", "\n", "\ud800", "\x1b[31m", " ", "", "e\u0301", "%&#{}"]
    block = BlockTrajectory([list(range(len(odd)))] * 2, name="$model_a^b$\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = draw_blocks([block], odd.__getitem__, "title $ _ ^", "a caption with $ " * 100)
        with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.facecolor": "black"}):
            assert draw_blocks([block], odd.__getitem__, "title $ _ ^", "a caption with $ " * 100) == png
    opened(png)
    formula, text = (draw_blocks([block], lambda token, word=word: word) for word in ("$x_1$", "|x_1|"))
    assert opened(formula).shape == opened(text).shape and formula != text


def test_nothing_to_draw_is_refused(models, tokenizer):
    with pytest.raises(ValueError, match="no blocks"):
        draw_blocks([], str)
    with pytest.raises(ValueError, match="at least one model"):
        draw_trajectories({}, tokenizer, PROMPT)
    for block in (-1, True, 1.5):
        with pytest.raises(ValueError, match="`block` must be an integer of at least 0"):
            draw_trajectories(models, tokenizer, PROMPT, block=block)
    with pytest.raises(ValueError, match="must fit into the positions of the model, got too many for target"):
        draw_trajectories(models, tokenizer, PROMPT, block=100)
    with pytest.raises(ValueError, match="at least one token"):
        draw_trajectories(models, tokenizer, "")


# The command


def show(folders, *arguments, prompt=PROMPT):
    return main(["show", "--model", str(folders / "cllm"), "--prompt", prompt, *arguments])


def test_the_command_shows_both_models(folders, models, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    file = tmp_path / "new" / "picture.png"
    assert show(folders, "--target", str(folders / "target"), "--block", "1", "--output", str(file)) == 0
    named = {"Target model: target": models["target"], "CLLM: cllm": models["cllm"]}
    expected = draw_trajectories(named, tokenizer, PROMPT, BLOCK_SIZE, 1)
    assert capsys.readouterr().out == f"{expected.format(color=False, width=100)}\n\nWritten: {file}\n"
    assert file.read_bytes() == expected.to_png()


def test_prompts_of_a_file_and_a_template(folders, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Ben has 3 pears ."}\n{"question": "Mia has 7 apples ."}\n')
    arguments = ["show", "--model", str(folders / "cllm"), "--prompts", str(file), "--prompt-template", "{prompt} ."]
    assert main([*arguments, "--number", "2"]) == 0
    assert capsys.readouterr().out.startswith("Prompt:\n    Mia has 7 apples . .\n")
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("Prompt:\n    Ben has 3 pears . .\n")
    assert main([*arguments, "--number", "3"]) == 1
    assert "`--number` must be from 1 to 2" in capsys.readouterr().err


def test_without_a_known_target_model_only_the_cllm_is_shown(folders, capsys):
    assert show(folders) == 0
    text = capsys.readouterr().out
    assert "CLLM: cllm" in text and "Target model" not in text
    assert text.endswith("it does not say which model it was made from. Pass its target model as `--target`.\n")
    card = folders / "cllm" / "README.md"
    for tags, reason in (("[cllm]", "user/base, which it was made from, cannot be loaded"), ("[]", "does not say")):
        card.write_text(f"---\nbase_model: user/base\ntags: {tags}\n---\n")
        assert show(folders) == 0
        assert reason in capsys.readouterr().out
    card.unlink()


def test_adapters_know_their_target_model(folders, models, tokenizer, tmp_path, monkeypatch, capsys):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setenv("COLUMNS", "120")
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "target")
    adapter = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    set_jacobi_defaults(adapter, BLOCK_SIZE)
    adapter.generation_config.save_pretrained(tmp_path / "adapter")
    named = {"Target model: target": models["target"], "CLLM: adapter": adapter.eval()}
    expected = draw_trajectories(named, tokenizer, PROMPT, BLOCK_SIZE).format(color=False, width=120)
    assert main(["show", "--model", str(tmp_path / "adapter"), "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "./nowhere"], "got './nowhere', which is not there. Check the name."),
        (["--output", "a.jpg"], "`--output` must be a PNG file, got 'a.jpg'"),
        (["--output", "/proc/a/b.png"], "must be writable"),
        (["--number", "2"], "`--number` chooses a prompt of `--prompts`, got 2"),
        (["--prompt", ""], "`--prompt` must hold text"),
        (["--prompt-template", "x"], "must have {prompt} where the prompt goes, got 'x'"),
        (["--device", "moon"], "`--device` must be a device of this machine"),
        (
            ["--block", "2", "--max-new-tokens", "12"],
            "`block` must be from 0 to 1, the blocks of the response of CLLM",
        ),
        (["--block-size", "300"], "must fit into the positions of the model"),
    ],
)
def test_arguments_that_are_refused(folders, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert show(folders, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("cllm: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_argparse_refuses(folders, capsys):
    for arguments in ([], ["--prompt", "a", "--prompts", "b"], ["--prompt", "a", "--block", "-1"]):
        with pytest.raises(SystemExit) as stop:
            main(["show", "--model", str(folders / "cllm"), *arguments])
        assert stop.value.code == 2
    assert "got '-1'" in capsys.readouterr().err


def test_a_target_model_with_another_tokenizer_is_refused(folders, models, byte_tokenizer, tmp_path, capsys):
    models["target"].save_pretrained(tmp_path / "other")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    assert show(folders, "--target", str(tmp_path / "other")) == 1
    assert "must have the tokenizer of the CLLM" in capsys.readouterr().err
