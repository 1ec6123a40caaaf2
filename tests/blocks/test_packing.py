"""The packed forward pass says what plain, unpacked forward passes say."""

import pytest
import torch
from architectures import CANNOT_BUILD, MODEL_TYPES, make_architecture
from conftest import CONFIGS, VOCAB_SIZE, make_model

from cllm_hf.blocks import forward
from cllm_hf.blocks.forward import copy_clean, forward_clean, packed_forward
from cllm_hf.blocks.layout import Drafts, Packed, append_drafts, fill_rows, pack
from cllm_hf.blocks.limits import check_packable


BLOCK_SIZE = 5


def make_batch(seed=0):
    """Two sequences of different length with blocks that start anywhere; one block of the second row is missing."""
    generator = torch.Generator().manual_seed(seed)
    clean_ids = torch.randint(1, VOCAB_SIZE, (2, 26), generator=generator)
    clean_mask = torch.ones_like(clean_ids)
    clean_mask[1, 19:] = 0
    states = torch.randint(1, VOCAB_SIZE, (2, 3, BLOCK_SIZE), generator=generator)
    anchors = torch.tensor([[3, 8, 20], [0, 17, 99]])
    block_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return clean_ids, clean_mask, states, anchors, block_mask


@torch.no_grad()
def unpacked_logits(model, clean_ids, clean_mask, states, anchors, block_mask):
    """One plain forward pass for every sequence and for every block, batch size 1, no mask, no cache."""
    clean, blocks = [], {}

    def logits_of(ids):
        return model(ids[None], position_ids=torch.arange(len(ids))[None], use_cache=False).logits[0]

    for row in range(len(clean_ids)):
        sequence = clean_ids[row, : int(clean_mask[row].sum())]
        clean.append(logits_of(sequence))
        for block in block_mask[row].nonzero()[:, 0].tolist():
            prefix = sequence[: anchors[row, block] + 1]
            logits = logits_of(torch.cat([prefix, states[row, block, :-1]]))
            blocks[row, block] = logits[len(prefix) - 1 :]
    return clean, blocks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_unpacked(name, attention):
    model = make_model(name, attention=attention)
    check_packable(model)
    batch = make_batch()
    packed = pack(*batch[:2], Drafts(*batch[2:]))
    with torch.no_grad():
        logits = packed_forward(model, packed, model)
        clean, blocks = logits[:, : packed.clean_length], logits[:, packed.columns()]
        last, cache = forward_clean(model, *batch[:2], num_logits=4)
        cached = packed_forward(model, packed, clean_cache=cache).unflatten(1, (-1, BLOCK_SIZE))
    expected_clean, expected_blocks = unpacked_logits(model, *batch)
    for row, expected in enumerate(expected_clean):
        torch.testing.assert_close(clean[row, : len(expected)], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(last[0], expected_clean[0][-4:], atol=1e-4, rtol=0)
    for (row, block), expected in expected_blocks.items():
        torch.testing.assert_close(blocks[row, block], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(cached[row, block], expected, atol=1e-4, rtol=0)


def test_clean_cache_is_left_as_it_was(llama):
    clean_ids, clean_mask, *rest = make_batch()
    packed = pack(clean_ids, clean_mask, Drafts(*rest))
    with torch.no_grad():
        _, cache = forward_clean(llama, clean_ids, clean_mask, 1)
        first = packed_forward(llama, packed, clean_cache=cache)
        assert cache.get_seq_length() == packed.clean_length
        torch.testing.assert_close(packed_forward(llama, packed, clean_cache=cache), first)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_of_any_length_behind_the_beginning_of_some_sequences(name):
    """What the collector does: a few tokens of a few blocks, after no more of the clean sequence than they see."""
    model = make_model(name)
    clean_ids, clean_mask = make_batch()[:2]
    states = torch.tensor([[7, 8, 9, 10, 11, 12]])
    anchors = [(6, slice(0, 4)), (11, slice(4, 6))]  # the position of each block's anchor, and its columns
    packed = Packed(
        input_ids=torch.cat([clean_ids[1:, :12], states], dim=1),
        position_ids=torch.cat([torch.arange(12), torch.arange(6, 10), torch.arange(11, 13)])[None],
        segment_ids=torch.tensor([[0] * 12 + [1] * 4 + [2] * 2]),
        anchor_positions=torch.tensor([[0] * 12 + [6] * 4 + [11] * 2]),
        clean_length=12,
    )
    with torch.no_grad():
        _, cache = forward_clean(model, clean_ids, clean_mask, 1)
        logits = packed_forward(model, packed, clean_cache=copy_clean(cache, torch.tensor([1]), 12))
        for anchor, columns in anchors:
            alone = model(torch.cat([clean_ids[1:, :anchor], states[:, columns]], dim=1)).logits
            torch.testing.assert_close(logits[:, columns], alone[:, anchor:], atol=1e-4, rtol=0)
    assert cache.get_seq_length() == clean_ids.shape[1]


def test_models_that_cannot_be_packed_are_refused(llama):
    from peft import LoraConfig, get_peft_model
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        GPTNeoConfig,
        GPTNeoForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="finds positions by itself"):
        check_packable(bloom)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="Use a model whose|encoder-decoder"):
        check_packable(t5)
    neo = GPTNeoConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(ValueError, match="local"):
        check_packable(GPTNeoForCausalLM(neo))
    activated = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]))
    with pytest.raises(ValueError, match="activated LoRA"):
        check_packable(activated.get_base_model())
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        check_packable(llama)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_draft_tokens_need_not_be_whole_blocks(name):
    """A block whose first two draft tokens are right may read them, and its anchor, from the clean sequence."""
    model = make_model(name)
    clean_ids, clean_mask, states, anchors, block_mask = make_batch()
    anchor = int(anchors[0, 1])
    states[0, 1, :2] = clean_ids[0, anchor + 1 : anchor + 3]
    whole = pack(clean_ids, clean_mask, Drafts(states, anchors, block_mask))
    _, cache = forward_clean(model, clean_ids, clean_mask, num_logits=1)
    expected = packed_forward(model, whole, clean_cache=cache).unflatten(1, (-1, BLOCK_SIZE))[0, 1, 2:]
    columns = torch.arange(2, BLOCK_SIZE)
    rest = append_drafts(
        clean_ids[:1],
        clean_mask[:1],
        states[:1, 1, 1:-1],
        anchor + columns[None],
        torch.ones(1, len(columns), dtype=torch.long),
        torch.full((1, len(columns)), anchor + 2),
    )
    logits = packed_forward(model, rest, clean_cache=copy_clean(cache, torch.tensor([0]), clean_ids.shape[1]))
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_that_share_a_row_do_not_see_each_other(name, attention):
    model = make_model(name, attention=attention)
    generator = torch.Generator().manual_seed(1)
    lengths, block_counts = [26, 7, 12, 5], [3, 1, 1, 0]
    clean_ids = torch.randint(1, VOCAB_SIZE, (4, 26), generator=generator)
    clean_mask = (torch.arange(26) < torch.tensor(lengths)[:, None]).long()
    states = torch.randint(1, VOCAB_SIZE, (4, 3, BLOCK_SIZE), generator=generator)
    anchors = torch.tensor([[3, 8, 20], [6, 0, 0], [2, 0, 0], [0, 0, 0]])
    block_mask = torch.arange(3) < torch.tensor(block_counts)[:, None]
    packed = pack(clean_ids, clean_mask, Drafts(states, anchors, block_mask))
    filled, places = fill_rows(packed)
    # 41, 12, 17 and 5 tokens in rows of 41.
    assert filled.input_ids.shape == (2, 41)
    is_token = (packed.segment_ids != -1).flatten()
    assert len(set(places[is_token].tolist())) == int(is_token.sum()) == 75
    assert torch.equal(filled.input_ids.flatten()[places[is_token]], packed.input_ids.flatten()[is_token])
    with torch.no_grad():
        expected = packed_forward(model, packed, model).flatten(0, 1)[is_token]
        actual = packed_forward(model, filled, model, places[is_token])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_rows_that_are_full_stay_as_they_are():
    packed = pack(torch.ones(3, 8, dtype=torch.long), torch.ones(3, 8))
    filled, places = fill_rows(packed)
    assert filled is packed and places.tolist() == list(range(24))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_some_places_only(name):
    model = make_model(name)
    batch = make_batch()
    packed = pack(*batch[:2], Drafts(*batch[2:]))
    places = torch.tensor([3, 0, 17, 60, 3])
    rows_seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, _, out: rows_seen.append(out.shape))
    with torch.no_grad():
        some = packed_forward(model, packed, model, places)
        handle.remove()
        everything = packed_forward(model, packed, model).flatten(0, 1)
    assert rows_seen == [(1, len(places), VOCAB_SIZE)]
    torch.testing.assert_close(some, everything[places], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["openai-gpt", "reformer", "xlm", "blt"])
def test_architectures_that_cannot_be_packed_are_refused_by_name(name):
    model = make_architecture(name)
    with pytest.raises(ValueError, match=f"do not support {type(model).__name__}"):
        check_packable(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODEL_TYPES if name not in CANNOT_BUILD])
@torch.no_grad()
def test_every_architecture_is_packed_right_or_refused(name):
    model = make_architecture(name).eval()
    try:
        check_packable(model)
    except ValueError as error:
        assert type(model).__name__ in str(error)
        return
    batch = make_batch()
    packed = pack(*batch[:2], Drafts(*batch[2:]))
    logits = packed_forward(model, packed, model)
    clean, blocks = logits[:, : packed.clean_length], logits[:, packed.columns()]
    expected_clean, expected_blocks = unpacked_logits(model, *batch)
    for row, expected in enumerate(expected_clean):
        torch.testing.assert_close(clean[row, : len(expected)], expected, atol=1e-3, rtol=1e-4)
    for place, expected in expected_blocks.items():
        torch.testing.assert_close(blocks[place], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere"])
def test_logits_that_are_looked_through_in_parts_say_the_same(model_type, monkeypatch):
    """Gemma 2 caps its logits and Cohere scales them, after the output embeddings."""
    model = make_architecture(model_type).eval()
    if model_type == "cohere":
        model.logit_scale = 0.5
    ids, mask = torch.randint(3, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    places = torch.tensor([0, 3, 4, 11, 17, 26])
    seen = []

    def reduce(logits, part):
        seen.append(len(logits))
        assert len(places[part]) == len(logits)
        return [logits.argmax(-1), logits.amax(-1)]

    with torch.no_grad():
        logits, cache = forward_clean(model, ids, mask, 9)
        expected = logits.flatten(0, 1)[places]
        monkeypatch.setattr(forward, "_MOST_LOGITS", 2 * logits.shape[-1])
        (best, height), other = forward_clean(model, ids, mask, 9, places=places, reduce=reduce)
    assert seen == ([2, 2, 2] if model_type == "llama" else [6])
    torch.testing.assert_close(height, expected.amax(-1))
    assert torch.equal(best, expected.argmax(-1))
    torch.testing.assert_close(other.layers[-1].keys, cache.layers[-1].keys)
