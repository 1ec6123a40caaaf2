"""Two ways side by side: what they say is what `generate` says alone, and each clock counts its own time."""

import threading
import time

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lossless_models import add_random_adapter

from cllm_hf.blocks.parting import describe_parting, find_parting
from cllm_hf.show.race import Pieces, Race, Snapshot, Way


PROMPT = [5, 9, 12, 7]
GREEDY = {"do_sample": False, "max_new_tokens": 24}
AUTOREGRESSIVE = {"decoding": "autoregressive", **GREEDY}
JACOBI = {"decoding": "jacobi", "jacobi_block_size": 5, **GREEDY}


def run(ways, tokenizer):
    return list(Race(ways, PROMPT, tokenizer).watch(0.01))


def alone(model, options):
    ids = torch.tensor([PROMPT])
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()


def snapshot(name="side", token_ids=(), seconds=1.0, num_forwards=1, is_done=True, problem=None, is_stopped=False):
    return Snapshot(name, [], list(token_ids), num_forwards, seconds, [], 0, is_done, problem, is_stopped)


@pytest.mark.parametrize("is_lossless", [False, True])
def test_both_sides_say_what_they_say_alone(tokenizer, is_lossless):
    model = make_model("llama")
    second = JACOBI
    if is_lossless:
        model, second = add_random_adapter(model), {**JACOBI, "decoding": "lossless"}
    expected = alone(model, AUTOREGRESSIVE)
    left, right = run([Way("generate()", model, AUTOREGRESSIVE), Way("other", model, second)], tokenizer)[-1]
    assert left.is_done and right.is_done and left.problem is right.problem is None
    assert left.token_ids == right.token_ids == expected
    assert left.num_forwards == len(expected)
    assert (
        right.num_forwards == len(expected) if is_lossless else 1 < right.num_forwards < len(expected)
    )  # a random adapter
    for side in (left, right):
        assert sum(gain for _, gain in side.pieces) == len(expected)
        assert "".join(text for text, _ in side.pieces) == tokenizer.decode(expected, skip_special_tokens=True)
        assert side.seconds > 0
    assert len(right.block) <= 4 and right.num_accepted <= len(right.block)
    assert alone(model, AUTOREGRESSIVE) == expected  # nothing is left of the race in the model


def test_sides_take_turns_and_the_one_behind_goes_first(tokenizer, monkeypatch):
    model = make_model("llama")
    active, most = [], []
    original = type(model).forward

    def forward(self, *args, **kwargs):
        active.append(threading.get_ident())
        most.append(len(active))
        time.sleep(0.002)
        try:
            return original(self, *args, **kwargs)
        finally:
            active.remove(threading.get_ident())

    monkeypatch.setattr(type(model), "forward", forward)
    gaps = []
    for left, right in run([Way("a", model, AUTOREGRESSIVE), Way("b", model, AUTOREGRESSIVE)], tokenizer):
        gaps.append(abs(left.num_forwards - right.num_forwards))
    assert set(most) == {1} and left.token_ids == right.token_ids
    assert max(gaps) < len(left.token_ids) / 2  # neither has run through while the other waited


def test_a_stopped_race_keeps_what_it_has(tokenizer):
    model = make_model("llama")
    long = {**AUTOREGRESSIVE, "max_new_tokens": 200}
    race = Race([Way("a", model, long), Way("b", model, long)], PROMPT, tokenizer)
    for left, right in race.watch(0.001):
        if min(left.num_forwards, right.num_forwards) > 3:
            race.stop()
    assert 0 < len(left.token_ids) < 200 and left.is_done and right.is_done
    assert left.problem is right.problem is None and left.is_stopped and right.is_stopped
    same = min(len(left.token_ids), len(right.token_ids))
    assert race.compare(left, right)[1] == f"Stopped. Up to here: The texts are equal: {same} of {same} tokens."


def test_a_watcher_that_leaves_ends_the_race(tokenizer):
    before = threading.active_count()
    watching = Race([Way("a", make_model("llama"), AUTOREGRESSIVE)], PROMPT, tokenizer).watch(0.001)
    next(watching)
    watching.close()
    assert threading.active_count() == before


def test_a_side_that_cannot_decode_says_why_and_the_other_goes_on(tokenizer):
    model = make_model("llama")
    refused = {**AUTOREGRESSIVE, "decoding": "jacobi", "num_beams": 2}
    race = Race([Way("a", model, AUTOREGRESSIVE), Way("b", model, refused)], PROMPT, tokenizer)
    left, right = list(race.watch(0.01))[-1]
    assert len(left.token_ids) == 24 and left.problem is None
    assert "num_beams" in right.problem and right.is_done and right.token_ids == []
    assert race.compare(left, right) == []


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=20), cuts=st.lists(st.integers(0, 80), max_size=6))
def test_pieces_put_together_are_the_text(byte_tokenizer, text, cuts):
    ids = byte_tokenizer(text)["input_ids"]
    edges = sorted({0, len(ids), *(min(cut, len(ids)) for cut in cuts)})
    gains = [after - before for before, after in zip(edges, edges[1:])]
    growing = Pieces(byte_tokenizer)
    for number in range(1, len(gains)):  # looked at after each forward pass, and while the next one goes on
        seen = growing.of(ids[: sum(gains[:number])], gains[:number], is_done=False)
        assert byte_tokenizer.decode(ids).startswith("".join(piece for piece, _ in seen))
        growing.of(ids[: sum(gains[:number])], [*gains[:number], 0], is_done=False)
    pieces = growing.of(ids, gains, is_done=True)
    assert "".join(piece for piece, _ in pieces) == byte_tokenizer.decode(ids, skip_special_tokens=True)
    assert [gain for _, gain in pieces] == gains
    assert pieces == Pieces(byte_tokenizer).of(ids, gains, is_done=True)


def test_half_a_character_waits_for_its_rest(byte_tokenizer):
    ids = byte_tokenizer("aé")["input_ids"]
    assert len(ids) == 3
    pieces = Pieces(byte_tokenizer)
    assert [text for text, _ in pieces.of(ids[:2], [1, 1], is_done=False)] == ["a", ""]
    assert [text for text, _ in pieces.of(ids, [1, 1, 1], is_done=False)] == ["a", "", "é"]


def test_a_text_is_not_decoded_anew_for_each_look(byte_tokenizer):
    decoded = []

    class Counting:
        def decode(self, ids, **options):
            decoded.append(len(ids))
            return byte_tokenizer.decode(ids, **options)

    pieces, ids = Pieces(Counting()), byte_tokenizer("a" * 50)["input_ids"]
    for end in range(1, 51):
        pieces.of(ids[:end], [1] * end, is_done=False)
    assert len(decoded) == 50 + 49  # the last piece in each look, and every piece once when it is settled


LEFT = snapshot("generate()", [1, 2, 3, 4], seconds=4.0, num_forwards=4)


def compare(models, right, tokenizer, left=LEFT, **options):
    """What a race of two models says of two sides."""
    return Race([Way("a", models[0], {}), Way("b", models[-1], options)], [5, 6], tokenizer).compare(left, right)


def test_what_is_said_of_two_sides(llama, byte_tokenizer):
    other = make_model("llama", seed=1)
    right = snapshot("jacobi", [1, 2, 3, 4], seconds=2.0, num_forwards=2)
    equal = ["jacobi: 2.00 tokens per forward pass, 2.00x as fast.", "The texts are equal: 4 of 4 tokens."]
    assert compare([llama], right, byte_tokenizer) == compare([llama, other], right, byte_tokenizer) == equal
    assert compare([llama], right, byte_tokenizer, do_sample=True) == equal  # samples may be
    assert compare([llama], snapshot(is_done=False), byte_tokenizer) == []
    differs = snapshot("jacobi", [1, 2, 9], seconds=2.0, num_forwards=2)
    of_two = "The texts differ from token 3 on. They are of two models."
    assert compare([llama, other], differs, byte_tokenizer)[1] == of_two
    of_one = describe_parting(find_parting(llama, [5, 6], [1, 2, 3, 4], [1, 2, 9]))
    assert "tie" in of_one and compare([llama], differs, byte_tokenizer)[1] == of_one
    assert compare([llama, other], differs, byte_tokenizer, decoding="lossless")[1] == of_one
    said = "Both are samples of the same distribution, so the texts differ."
    assert compare([llama], differs, byte_tokenizer, do_sample=True)[1] == said
    said = "Both are samples of two models, so the texts differ."
    assert compare([llama, other], differs, byte_tokenizer, do_sample=True)[1] == said


def test_of_a_stopped_text_nothing_is_said_beyond_its_end(llama, byte_tokenizer):
    for texts, said in (
        ([1, 2], "Stopped. Up to here: The texts are equal: 2 of 2 tokens."),
        ([1, 9], "Stopped. Up to here: The texts differ from token 2 on, "),
    ):
        right = snapshot("jacobi", texts, is_stopped=True)
        assert compare([llama], right, byte_tokenizer)[1].startswith(said)
