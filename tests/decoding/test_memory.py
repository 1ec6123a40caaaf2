"""What is fed, remembered and fed again in the three kinds of memory."""

import pytest
import torch
from architectures import make_architecture
from conftest import make_model, make_prompts

import cllm_hf  # noqa: F401
from cllm_hf._host import CACHE_NAME
from cllm_hf.decoding.caches import restore_states, save_states


def watch(model):
    """Shapes of `input_ids` and lengths of the cache after each forward pass."""
    widths, cached = [], []

    def note(module, args, kwargs, output):
        widths.append(tuple(kwargs["input_ids"].shape))
        cache = kwargs.get(CACHE_NAME)
        # Recurrent layers do not say how many tokens they hold.
        is_known = cache is not None and not all(cache.is_linear)
        cached.append(cache.get_seq_length() if is_known else 0)

    model.register_forward_hook(note, with_kwargs=True)
    return widths, cached


def test_a_cropped_cache_stays_within_the_longest_row_and_a_block():
    model = make_model("llama")
    input_ids, mask = make_prompts(4)
    widths, cached = watch(model)
    stops = {"eos_token_id": list(range(30, 33))}
    output = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=60, jacobi_block_size=8, return_dict_in_generate=True, **stops
    )
    lengths, place = [9] * 4, [0] * 4
    for (num_rows, width), columns in zip(widths, cached):
        going = [row for row in range(4) if place[row] < len(output.jacobi_stats.num_committed[row])]
        assert num_rows == len(going)  # finished rows are not fed
        assert columns <= max(lengths[row] for row in going) - 1 + 8
        assert width <= 8 or columns == 9 + 7
        for row in going:
            lengths[row] += output.jacobi_stats.num_committed[row][place[row]]
            place[row] += 1


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "falcon_h1", "kimi_linear"])
def test_a_recurrent_state_is_replayed_within_a_block(name):
    model = make_architecture(name)
    input_ids, _ = make_prompts(1, 12)
    widths, _ = watch(model)
    model.generate(input_ids, max_new_tokens=60, jacobi_block_size=6)
    assert widths[0] == (1, 12)  # the prompt, without a draft
    assert max(width for _, width in widths[1:]) <= 6 + 6 + 5  # what a block at most has left open, and a block
    # Never far after: within a few forward passes the state holds all of the text again.
    assert sum(width <= 6 for _, width in widths[1:]) >= len(widths) / 8


def test_without_memory_the_whole_text_is_fed():
    model = make_architecture("openai-gpt")
    input_ids, _ = make_prompts(1, 12)
    widths, cached = watch(model)
    output = model.generate(input_ids, max_new_tokens=20, jacobi_block_size=4, return_dict_in_generate=True)
    length = 12
    for (_, width), count in zip(widths, output.jacobi_stats.num_committed[0]):
        assert width == length + min(4, 32 - length) - 1
        length += count
    assert set(cached) == {0}


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "zaya"])
def test_saved_states_are_put_back(name):
    model = make_architecture(name)
    input_ids, _ = make_prompts(2, 12, padding=False)
    cache = model(input_ids, use_cache=True).past_key_values
    saved = save_states(cache)
    first = model(input_ids[:, :5], past_key_values=cache).logits
    restore_states(cache, saved)
    again = model(input_ids[:, :5], past_key_values=cache).logits
    assert torch.equal(first, again)
    assert not torch.allclose(model(input_ids[:, :5], past_key_values=cache).logits, again)
