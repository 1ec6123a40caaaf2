"""Candidates: the same text in fewer forward passes, from n-grams that are found where they stand."""

import random

import pytest
import torch
from architectures import make_architecture
from conftest import CONFIGS, make_model, make_prompts
from transformers import AutoModelForSeq2SeqLM, BartConfig, DynamicCache, TextStreamer

import cllm_hf  # noqa: F401
from cllm_hf.decoding.candidates import NgramIndex, merge_branches, places_after


def generate(model, input_ids, mask=None, **options):
    return model.generate(
        input_ids,
        attention_mask=mask,
        **{"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True, **options},
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_greedy(name, attention):
    model = make_model(name, attention=attention)
    for batch_size in (1, 3):
        for length in (1, 20):
            prompts = make_prompts(batch_size, length)
            greedy = generate(model, *prompts).sequences
            for block_size, candidates in ((2, 1), (5, 2), (16, 4)):
                output = generate(model, *prompts, jacobi_block_size=block_size, jacobi_candidates=candidates)
                assert torch.equal(output.sequences, greedy)


def test_block_sizes_that_leave_no_room_or_are_measured(llama):
    prompts = make_prompts(3)
    greedy = generate(llama, *prompts).sequences
    for block_size in (1, "auto"):
        output = generate(llama, *prompts, jacobi_block_size=block_size, jacobi_candidates=2)
        assert torch.equal(output.sequences, greedy)


def test_candidates_save_forward_passes():
    """Texts of these models repeat themselves, which n-grams find and Jacobi decoding alone does not."""
    plain = found = 0
    for name in CONFIGS:
        model, prompts = make_model(name), make_prompts(3)
        plain += generate(model, *prompts, jacobi_block_size=8).jacobi_stats.num_forwards
        found += generate(model, *prompts, jacobi_block_size=8, jacobi_candidates=4).jacobi_stats.num_forwards
    assert found < 0.9 * plain


@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_do_not_depend_on_candidates(llama, batch_size):
    prompts = make_prompts(batch_size)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "jacobi_seed": 11, "eos_token_id": [20, 33]}
    expected = generate(llama, *prompts, jacobi_block_size=1, **options).sequences
    for candidates in (1, 4):
        output = generate(llama, *prompts, jacobi_block_size=6, jacobi_candidates=candidates, **options)
        assert torch.equal(output.sequences, expected)


def test_streamed_tokens_and_a_cache_that_goes_on(llama, tokenizer):
    input_ids, _ = make_prompts(1)
    greedy = generate(llama, input_ids, max_new_tokens=60).sequences
    received = []

    class Collect(TextStreamer):
        def put(self, value):
            received.extend(value.flatten().tolist())

    options = {"jacobi_block_size": 6, "jacobi_candidates": 3}
    output = generate(llama, input_ids, max_new_tokens=30, streamer=Collect(tokenizer), **options)
    assert received == output.sequences[0].tolist()
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    # The cache holds the text and nothing of the trees.
    more = generate(
        llama, output.sequences, past_key_values=output.past_key_values, max_new_tokens=30, decoding="autoregressive"
    )
    assert torch.equal(more.sequences, greedy)


def test_a_cache_of_the_user_serves_a_batch(llama):
    input_ids, _ = make_prompts(2, padding=False)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids[:, :5], past_key_values=cache)
    keys = cache.layers[0].keys.clone()
    output = generate(llama, input_ids, past_key_values=cache, jacobi_block_size=6, jacobi_candidates=2)
    assert torch.equal(output.sequences, generate(llama, input_ids).sequences)
    assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "mamba", "qwen3_next", "lfm2", "glm_moe_dsa", "openai-gpt"])
def test_models_that_take_no_tree_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="jacobi_candidates"):
        generate(make_architecture(name), *make_prompts(1, padding=False), jacobi_candidates=2)


def test_encoder_decoder_models_are_refused():
    config = BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="jacobi_candidates"):
        generate(AutoModelForSeq2SeqLM.from_config(config).eval(), make_prompts(1)[0], jacobi_candidates=2)


@pytest.mark.parametrize("value", [-1, 1.5, "2", True])
def test_numbers_that_make_no_sense_are_refused(llama, value):
    with pytest.raises(ValueError, match="`jacobi_candidates`"):
        generate(llama, make_prompts(1)[0], jacobi_candidates=value)


def test_candidates_and_what_they_cannot_be_combined_with(llama):
    input_ids, _ = make_prompts(1)
    with pytest.raises(ValueError, match="`jacobi_candidates=2`"):
        generate(llama, input_ids, jacobi_candidates=2, jacobi_compile=True, jacobi_block_size=8)
    with pytest.raises(ValueError, match="`jacobi_candidates`"):
        generate(llama, input_ids, jacobi_candidates=2, decoding="autoregressive")
    # None asked for is no wish for Jacobi decoding.
    assert not hasattr(generate(llama, input_ids, jacobi_candidates=0), "jacobi_stats")


def test_a_default_of_the_model_is_taken(llama, tmp_path):
    cllm_hf.set_jacobi_defaults(llama, block_size=8)
    llama.generation_config.jacobi_candidates = 3
    llama.save_pretrained(tmp_path)
    loaded = type(llama).from_pretrained(tmp_path)
    input_ids, _ = make_prompts(1)
    widths = []
    loaded.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(loaded, input_ids)
    assert max(widths[1:]) > 8


def continuations_slowly(text, length):
    found = []
    for match in (3, 2, 1):
        if len(text) >= match:
            places = [place for place in range(match, len(text)) if text[place - match : place] == text[-match:]]
            for place in places[::-1][:4]:
                following = text[place:]
                found.append([following[offset % len(following)] for offset in range(length)])
    return found


def test_continuations_are_what_followed_before():
    generator = random.Random(0)
    for _ in range(50):
        text, index = [], NgramIndex()
        for _ in range(8):
            text += generator.choices(range(4), k=generator.randrange(1, 6))
            index.extend(text)
            assert list(index.continuations(text, 5)) == continuations_slowly(text, 5)


def test_a_tree_has_just_the_branches_that_it_is_made_of():
    generator = random.Random(0)
    for _ in range(100):
        branches = [generator.choices(range(3), k=generator.randrange(1, 6)) for _ in range(4)]
        proposal = merge_branches(9, branches)
        assert len(set(zip(proposal.parents, proposal.token_ids))) == len(proposal.token_ids)  # siblings differ
        prefixes = {tuple(branch[:end]) for branch in branches for end in range(1, len(branch) + 1)}
        paths = {}
        for place, (parent, token) in enumerate(zip(proposal.parents, proposal.token_ids)):
            paths[place] = () if place == 0 else (*paths[parent], token)
        assert set(paths.values()) == {(), *prefixes}
        assert proposal.token_ids[1 : len(branches[0]) + 1] == branches[0]


def test_places_after_follow_the_first_of_several_branches():
    proposal = merge_branches(9, [[1, 2], [3, 4, 5], [3, 6]])
    assert proposal.token_ids == [9, 1, 2, 3, 4, 5, 6]
    assert places_after(proposal, 3) == [4, 5]
    assert places_after(proposal, 6) == []
    assert places_after(proposal, 0) == [1, 2]
