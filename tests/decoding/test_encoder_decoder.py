"""Encoder-decoder models: Jacobi decoding of the decoder's text equals greedy decoding."""

import pytest
import torch
import transformers
from architectures import randomize
from conftest import VOCAB_SIZE, make_prompts

import cllm_hf


_SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART_LIKE = {
    **_SIZES,
    "vocab_size": VOCAB_SIZE,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
CONFIGS = {
    "t5": lambda: transformers.T5Config(**_T5_LIKE),
    "mt5": lambda: transformers.MT5Config(**_T5_LIKE, feed_forward_proj="gated-gelu"),
    "bart": lambda: transformers.BartConfig(**_BART_LIKE),
    "mbart": lambda: transformers.MBartConfig(**_BART_LIKE),
    "marian": lambda: transformers.MarianConfig(**_BART_LIKE),
    "pegasus": lambda: transformers.PegasusConfig(**_BART_LIKE),
}


def prepared(model):
    """Weights that make the greedy text depend on its context, and no stop token."""
    randomize(model, 3.0)
    model.generation_config.eos_token_id = None
    return model.eval()


def make_model(name, seed=0):
    torch.manual_seed(seed)
    return prepared(transformers.AutoModelForSeq2SeqLM.from_config(CONFIGS[name]()))


def assert_equal_to_greedy(model, block_size, **options):
    options = {"do_sample": False, "max_new_tokens": 24, **options}
    greedy = model.generate(**options)
    decoded = model.generate(**options, decoding="jacobi", jacobi_block_size=block_size, return_dict_in_generate=True)
    assert isinstance(decoded, cllm_hf.JacobiOutput)
    assert decoded.sequences.tolist() == greedy.tolist()
    assert decoded.jacobi_stats.num_forwards <= options["max_new_tokens"]
    return decoded


@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_greedy(name, batch_size, block_size):
    model = make_model(name)
    input_ids, mask = make_prompts(batch_size)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    output = assert_equal_to_greedy(model, block_size, **inputs)
    # Rows that end at different places leave the batch.
    stop = output.sequences[:, 3:9].flatten().unique().tolist()[:3]
    assert_equal_to_greedy(model, block_size, **inputs, eos_token_id=stop)
    assert_equal_to_greedy(model, block_size, **inputs, decoder_input_ids=input_ids[:, -3:], repetition_penalty=1.3)
    assert_equal_to_greedy(model, block_size, **inputs, use_cache=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_these_models_accept_drafts(name):
    input_ids, mask = make_prompts(1)
    output = assert_equal_to_greedy(make_model(name), 8, input_ids=input_ids, attention_mask=mask, max_new_tokens=100)
    assert len(set(output.sequences[0].tolist())) > 3
    assert max(output.jacobi_stats.num_accepted[0]) >= 1


def make_whisper():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **{**_BART_LIKE, "max_position_embeddings": 1},
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = prepared(transformers.WhisperForConditionalGeneration(config))
    model.generation_config.update(no_timestamps_token_id=50, decoder_start_token_id=2, is_multilingual=False)
    return model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_whisper(batch_size):
    """Its `generate` cuts the sound into segments and hands each to the one of transformers."""
    model = make_whisper()
    sound = torch.randn(batch_size, 8, 100)
    for block_size in (2, 8):
        options = {"input_features": sound, "do_sample": False, "max_new_tokens": 24}
        calls: list[int] = []
        handle = model.get_decoder().register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        greedy = model.generate(**options)
        num_greedy = len(calls)
        decoded = model.generate(**options, decoding="jacobi", jacobi_block_size=block_size)
        handle.remove()
        assert decoded.tolist() == greedy.tolist()
        assert len(calls) - num_greedy <= num_greedy


def test_a_decoder_that_knows_fewer_tokens_than_its_encoder():
    sizes = {**_BART_LIKE, "vocab_size": 90, "decoder_vocab_size": 40, "share_encoder_decoder_embeddings": False}
    torch.manual_seed(0)
    model = prepared(transformers.MarianMTModel(transformers.MarianConfig(**sizes)))
    assert_equal_to_greedy(model, 8, input_ids=torch.tensor([[80, 70, 60, 85]]))


def test_a_cache_of_the_user_is_refused():
    model = make_model("t5")
    ids, _ = make_prompts(2, padding=False)
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with pytest.raises(ValueError, match="`past_key_values`"):
        model.generate(ids, past_key_values=cache, decoding="jacobi", max_new_tokens=3)


def test_an_exception_inside_a_forward_pass_keeps_its_type():
    model = make_model("bart")
    input_ids, _ = make_prompts(2, padding=False)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(input_ids, max_new_tokens=20, jacobi_block_size=4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_whisper_splits_outputs_by_rows(batch_size):
    model, sound = make_whisper(), torch.randn(batch_size, 8, 100)
    options = {"max_new_tokens": 10, "return_dict_in_generate": True}
    expected = model.generate(sound, **options)
    decoded = model.generate(sound, **options, jacobi_block_size=4)
    assert decoded["sequences"].tolist() == expected["sequences"].tolist()


def test_whisper_judges_its_text_by_scores():
    """A text that is too unlikely is decoded again at the next temperature."""
    model, sound = make_whisper(), torch.randn(1, 8, 100)
    options = {"max_new_tokens": 12, "temperature": (0.0, 0.2), "return_dict_in_generate": True}
    for threshold in (-100.0, -1e-3):
        calls = []
        handle = model.get_encoder().register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        output = model.generate(sound, **options, logprob_threshold=threshold, jacobi_block_size=4)
        handle.remove()
        assert len(calls) == (1 if threshold == -100.0 else 2)
    expected = model.generate(sound, **options, logprob_threshold=-100.0)
    output = model.generate(sound, **options, logprob_threshold=-100.0, jacobi_block_size=4)
    assert output["sequences"].tolist() == expected["sequences"].tolist()


def test_what_a_model_asks_for_by_itself_is_named_as_such():
    model = make_whisper()
    model.generation_config.alignment_heads = [[0, 0]]
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration.generate"):
        model.generate(torch.randn(1, 8, 100), jacobi_block_size=4, return_token_timestamps=True)


def test_batches_of_images():
    encoder = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=16
    )
    decoder = transformers.TrOCRConfig(
        vocab_size=VOCAB_SIZE, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = prepared(transformers.VisionEncoderDecoderModel(config))
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0)
    images = torch.randn(3, 3, 32, 32)
    output = assert_equal_to_greedy(model, 4, pixel_values=images)
    stop = output.sequences[:, 3:9].flatten().unique().tolist()[:3]
    assert_equal_to_greedy(model, 4, pixel_values=images, eos_token_id=stop)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_that_end_together_by_different_numbers_of_tokens(name):
    model = make_model(name)
    input_ids, mask = make_prompts(2, padding=False)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)[:, 1:].unique().tolist()
    for first in tokens:
        assert_equal_to_greedy(model, 8, **inputs, eos_token_id=[first, *tokens[:3]])
