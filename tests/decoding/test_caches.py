"""Rolling a cache back equals never having fed the rejected tokens."""

import pytest
import torch
from conftest import make_model, make_prompts
from transformers import DynamicCache

from cllm_hf.decoding.caches import copy_cache, roll_back, roll_back_columns


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("length", [5, 9, 21])
@pytest.mark.parametrize("num_rejected", [[0, 0, 0], [2, 2, 2], [0, 3, 1], [3, 3, 1]])
@torch.no_grad()
def test_rows_go_on_as_if_nothing_had_been_rejected(name, length, num_rejected):
    model = make_model(name)
    ids, _ = make_prompts(3, length, padding=False)
    following, _ = make_prompts(3, 3, seed=1, padding=False)
    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    kept = [ids[row].tolist() for row in range(3)]
    # Two rounds, so that the second starts from rows that are aligned by padding.
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    for _ in range(2):
        roll_back(cache, num_rejected)
        mask = roll_back_columns(mask, num_rejected, fill=0)
        kept = [row[: len(row) - count] for row, count in zip(kept, num_rejected)]
        mask = torch.cat([mask, torch.ones_like(following)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -following.shape[1] :]
        logits = model(following, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        kept = [row + tokens for row, tokens in zip(kept, following.tolist())]
        for row in range(3):
            expected = model(torch.tensor([kept[row]])).logits[0, -following.shape[1] :]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == mask.shape[1]


def test_the_cache_is_as_long_as_the_longest_row(llama):
    ids, _ = make_prompts(2, 10, padding=False)
    cache = DynamicCache(config=llama.config)
    llama(ids, past_key_values=cache)
    roll_back(cache, [4, 1])
    assert cache.get_seq_length() == 9


def test_roll_back_columns_moves_rows_to_the_right():
    columns = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert roll_back_columns(columns, [2, 1], fill=0).tolist() == [[0, 1, 2], [5, 6, 7]]


def test_copied_cache_leaves_the_original(llama):
    ids, _ = make_prompts(2, 10, padding=False)
    cache = DynamicCache(config=llama.config)
    llama(ids, past_key_values=cache)
    keys = cache.layers[0].keys.clone()
    copied = copy_cache(cache)
    llama(ids, past_key_values=copied)
    roll_back(copied, [3, 1])
    assert torch.equal(cache.layers[0].keys, keys)


def test_a_window_stays_small_in_later_uses_of_the_cache():
    model = make_model("mistral")
    cache = DynamicCache(config=model.config)
    ids, _ = make_prompts(1, 20)
    output = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=9, jacobi_block_size=4)
    model.generate(output, past_key_values=cache, do_sample=False, max_new_tokens=30)
    assert cache.layers[0].keys.shape[-2] == 7
