"""What single models cannot do is noticed, also where the model is the decoder inside of another one."""

import pytest
import torch
import transformers
from architectures import make_architecture, randomize
from conftest import VOCAB_SIZE, make_model, make_prompts

import cllm_hf
from cllm_hf.blocks.limits import check_packable, count_positions


# Learned tables, with and without an offset, sinusoids in a buffer, rotations in a buffer, types of tokens in one.
WITH_TABLES = ["bart", "biogpt", "ctrl", "gpt2", "gptj", "gpt_neo", "mpt", "openai-gpt", "opt", "roberta", "roformer"]
_BERT_LIKE = ["bert", "camembert", "electra", "roberta", "roformer", "xlm-roberta"]
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE}
_VISION = {**_SIZES, "model_type": "clip_vision_model", "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}


def shortened(name, num_positions):
    """A model with so few positions."""
    config = make_architecture(name).config
    for entry in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if hasattr(config, entry):
            setattr(config, entry, num_positions)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model, 3.0)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize("name", WITH_TABLES)
def test_no_draft_reaches_beyond_the_last_position(name):
    model = shortened(name, 32)
    assert count_positions(model) == 32
    ids, _ = make_prompts(1, 20)
    text = model.generate(ids, max_new_tokens=11, do_sample=False)
    options = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": text[0, -1].item()}
    expected = model.generate(ids, **options)
    for block_size in (8, 16, 64, "auto"):
        assert model.generate(ids, **options, jacobi_block_size=block_size).tolist() == expected.tolist()


def test_a_table_of_positions_is_found_where_the_config_does_not_name_it(monkeypatch):
    model = shortened("gpt2", 32)
    monkeypatch.setattr("cllm_hf.blocks.limits._POSITION_COUNTS", ())
    assert count_positions(model) == 32
    assert count_positions(make_architecture("bloom")) is None


@pytest.mark.parametrize("batch_size", [1, 2])
def test_no_draft_of_an_encoder_decoder_model_reaches_beyond_the_last_position(batch_size):
    from test_encoder_decoder import make_model

    model = make_model("bart")
    model.get_decoder().embed_positions = type(model.get_decoder().embed_positions)(32, 32)
    model.config.max_position_embeddings = 32
    ids, mask = make_prompts(batch_size, 12)
    options = {"attention_mask": mask, "decoder_input_ids": ids[:, :1].expand(-1, 24), "do_sample": False}
    text = model.generate(ids, max_new_tokens=7, **options)
    options.update(eos_token_id=text[:, -1].tolist(), max_new_tokens=50)
    assert model.generate(ids, **options, jacobi_block_size=16).tolist() == model.generate(ids, **options).tolist()


def test_only_a_committed_token_runs_into_the_error_of_transformers():
    model = shortened("gpt2", 32)
    ids, mask = make_prompts(2, 20)
    for options in ({}, {"jacobi_block_size": 16}):
        with pytest.raises(IndexError):
            model.generate(ids, attention_mask=mask, max_new_tokens=50, do_sample=False, **options)
    # A row with padding has positions left where the other has none.
    text = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert model.generate(ids, **options, jacobi_block_size=16).tolist() == text.tolist()


def test_rotary_positions_have_no_end():
    model = make_model("llama", max_position_embeddings=16)
    assert count_positions(model) is None
    ids, _ = make_prompts(1)
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    decoded = model.generate(ids, **options, jacobi_block_size=16)
    assert decoded.sequences.tolist() == model.generate(ids, **options).sequences.tolist()
    assert decoded.jacobi_stats.num_forwards < 30  # drafts go on beyond: of 40 tokens, 7 are before the 16th position


def llava(text_config):
    config = transformers.LlavaConfig(text_config=text_config, vision_config=_VISION, image_token_id=59)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomize(model, 3.0)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize("name", ["jamba", "llama4_text", "llama"])
def test_an_exception_of_the_inner_decoder_is_one_of_the_outer_model(name):
    inner = make_architecture(name)
    model = llava(inner.config)
    for batch_size in (1, 3):
        ids, mask = make_prompts(batch_size, 12)
        options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        expected = model.generate(**options)
        for block_size in (2, 8, 16):
            assert model.generate(**options, jacobi_block_size=block_size).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["nemotron_h", "zamba2", "blt"])
def test_an_inner_decoder_that_is_refused_alone_is_refused_inside(name):
    model = llava(make_model("llama").config)
    model.config.text_config = make_architecture(name).config
    with pytest.raises(ValueError, match="does not support LlavaForConditionalGeneration"):
        model.generate(make_prompts(1)[0], decoding="jacobi", max_new_tokens=3)


def test_the_encoder_of_a_pair_has_no_say():
    decoder = make_architecture("bert").config
    decoder.update({"add_cross_attention": True})
    encoder = transformers.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=32, vocab_size=VOCAB_SIZE)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.EncoderDecoderModel(config).eval()
    options = {"decoder_start_token_id": 1, "pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
    ids, mask = make_prompts(2, padding=False)
    greedy = model.generate(ids, attention_mask=mask, **options)
    assert model.generate(ids, attention_mask=mask, **options, jacobi_block_size=4).tolist() == greedy.tolist()


def exaone():
    """A model whose `forward` takes positions, and which is never given any while it generates."""
    text = {**_SIZES, "model_type": "exaone4", "num_hidden_layers": 2, "num_key_value_heads": 2}
    text.update(max_position_embeddings=128, sliding_window=None, layer_types=["full_attention"] * 2)
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Exaone4_5_Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.Exaone4_5_ForConditionalGeneration(config).eval()
    randomize(model, 3.0)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def test_rows_stay_at_equal_lengths_where_the_model_drops_positions():
    model = exaone()
    for padding in (False, True):
        ids, mask = make_prompts(3, 12, padding=padding)
        options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        expected = model.generate(**options)
        for block_size in (1, 2, 8, 16):
            assert model.generate(**options, jacobi_block_size=block_size).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="by counting columns.*jacobi_candidates"):
        model.generate(ids[:1], decoding="jacobi", jacobi_candidates=2, max_new_tokens=3)


def assert_refused(model, message):
    with pytest.raises(ValueError, match=message):
        model.generate(make_prompts(1)[0], decoding="jacobi", max_new_tokens=3)
    with pytest.raises(ValueError, match=message):
        check_packable(model)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_models_that_read_both_ways_are_refused(name):
    config = make_architecture(name).config
    config.use_bidirectional_attention = True
    assert_refused(transformers.AutoModelForCausalLM.from_config(config), "use_bidirectional_attention")


@pytest.mark.parametrize("name", _BERT_LIKE)
def test_encoders_that_were_not_loaded_as_decoders_are_refused(name):
    model = make_architecture(name)
    model.config.is_decoder = False
    assert_refused(model, "is_decoder=True")


def test_dynamic_quantization_is_refused(llama):
    quantized = torch.ao.quantization.quantize_dynamic(llama, {torch.nn.Linear}, dtype=torch.qint8)
    assert_refused(quantized, "quantized dynamically")


def test_a_second_text_in_the_same_state_is_refused():
    model = make_architecture("recurrent_gemma")
    options = {"do_sample": False, "max_new_tokens": 4, "decoding": "jacobi"}
    with pytest.raises(ValueError, match="`guidance_scale` with RecurrentGemmaForCausalLM"):
        model.generate(make_prompts(1)[0], guidance_scale=1.5, **options)
    model.generate(make_prompts(1)[0], guidance_scale=1.0, **options)
    cllm_hf.set_jacobi_defaults(model)
