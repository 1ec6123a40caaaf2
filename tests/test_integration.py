"""`decoding="jacobi"` in transformers: who gets it, what it refuses, what it saves."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_model, make_prompts
from image_text import make_image_text_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    pipeline,
)

import cllm_hf


@pytest.fixture
def registered():
    yield
    cllm_hf.register()


def greedy(model, input_ids, **options):
    return model.generate(input_ids, do_sample=False, max_new_tokens=20, decoding="autoregressive", **options)


def test_register_twice_and_unregister(llama, registered):
    ids, _ = make_prompts(1)
    once = GenerationMixin.generate
    cllm_hf.register()
    assert GenerationMixin.generate is once
    cllm_hf.unregister()
    cllm_hf.unregister()
    assert GenerationMixin.generate is once.__wrapped__
    with pytest.raises(ValueError, match="not used by the model"):
        llama.generate(ids, decoding="jacobi")
    cllm_hf.register()
    assert llama.generate(ids, max_new_tokens=3, do_sample=False, decoding="jacobi").shape[1] == ids.shape[1] + 3


def test_unregister_leaves_the_wrapper_of_another_library(monkeypatch):
    import functools

    ours = GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin, "generate", functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
    )
    with pytest.raises(RuntimeError, match="`GenerationMixin.generate`"):
        cllm_hf.unregister()


def test_block_size_alone_means_jacobi(llama):
    ids, _ = make_prompts(1)
    output = llama.generate(ids, jacobi_block_size=4, do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
    assert isinstance(output, cllm_hf.JacobiOutput)
    assert output.jacobi_stats.num_iterations == output.jacobi_stats.num_forwards - 1
    assert output.jacobi_stats.num_generated == [8]
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


def test_statistics_agree_with_each_other(llama):
    stats = llama.generate(
        *make_prompts(4)[:1], jacobi_block_size=8, do_sample=False, max_new_tokens=40, return_dict_in_generate=True
    ).jacobi_stats
    assert stats.num_accepted == [[count - 1 for count in row] for row in stats.num_committed]
    assert max(map(len, stats.num_committed)) == stats.num_forwards
    assert stats.tokens_per_forward == sum(stats.num_generated) / sum(map(len, stats.num_committed)) > 1


def test_an_empty_prompt(llama):
    with pytest.raises(ValueError, match="must have at least one token, got none"):
        llama.generate(torch.zeros((1, 0), dtype=torch.long), decoding="jacobi", max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoding": "jacoby"}, "`decoding`"),
        ({"jacobi_block_size": 0}, "`jacobi_block_size`"),
        ({"jacobi_block_size": "16"}, "`jacobi_block_size`"),
        ({"jacobi_block_size": True}, "`jacobi_block_size`"),
        ({"decoding": "autoregressive", "jacobi_block_size": 8}, "`jacobi_block_size`"),
        ({"decoding": "autoregressive", "jacobi_seed": 8}, "`jacobi_seed`"),
        ({"jacobi_compile": 1}, "`jacobi_compile`"),
        ({"decoding": "jacobi", "num_beams": 3}, "num_beams=1"),
        ({"decoding": "jacobi", "prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens`"),
        ({"decoding": "jacobi", "penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha"),
        ({"decoding": "jacobi", "output_attentions": True}, "output_attentions"),
        ({"decoding": "jacobi", "cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"decoding": "jacobi", "prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"decoding": "jacobi", "synced_gpus": True}, "synced_gpus"),
        ({"decoding": "jacobi", "custom_generate": print}, "`custom_generate`"),
        ({"decoding": "jacobi", "stop_strings": ["x"]}, "tokenizer=tokenizer"),
    ],
    ids=str,
)
def test_what_is_refused(llama, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        llama.generate(make_prompts(1)[0], max_new_tokens=4, **options)


def test_an_assistant_model_is_refused_but_may_itself_have_jacobi_defaults(llama):
    ids, _ = make_prompts(1)
    assistant = make_model("llama", seed=1)
    with pytest.raises(ValueError, match="assistant_model"):
        llama.generate(ids, assistant_model=assistant, decoding="jacobi")
    cllm_hf.set_jacobi_defaults(assistant)
    decoded = llama.generate(ids, assistant_model=assistant, do_sample=False, max_new_tokens=20)
    assert decoded.tolist() == greedy(llama, ids).tolist()


def test_model_inputs_that_cannot_be_extended_are_refused(llama):
    ids, _ = make_prompts(1)
    positions = torch.stack([torch.arange(9), torch.arange(9) // 2, torch.arange(9) % 3])[:, None]  # of an image
    with pytest.raises(ValueError, match="positions of text"):
        llama.generate(ids, position_ids=positions, decoding="jacobi", max_new_tokens=3)


def test_cache_that_holds_the_whole_prompt_is_refused(llama):
    from transformers import DynamicCache

    ids, mask = make_prompts(1)
    cache = DynamicCache(config=llama.config)
    llama(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="already hold 9 tokens"):
        llama.generate(ids, attention_mask=mask, past_key_values=cache, decoding="jacobi", max_new_tokens=3)


def test_defaults_are_saved_with_the_model(llama, tmp_path):
    ids, _ = make_prompts(1)
    llama.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    llama.generation_config._from_model_config = True
    cllm_hf.set_jacobi_defaults(llama, block_size=5)
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.generation_config.decoding, loaded.generation_config.jacobi_block_size) == ("jacobi", 5)
    output = loaded.generate(ids, max_new_tokens=20, return_dict_in_generate=True)
    assert max(map(max, output.jacobi_stats.num_committed)) <= 5
    assert output.sequences.tolist() == greedy(llama, ids).tolist()
    config = GenerationConfig(max_new_tokens=20, return_dict_in_generate=True)
    assert isinstance(loaded.generate(ids, generation_config=config), cllm_hf.JacobiOutput)
    assert not isinstance(
        loaded.generate(ids, generation_config=config, decoding="autoregressive"), cllm_hf.JacobiOutput
    )
    with pytest.raises(ValueError, match="`block_size`"):
        cllm_hf.set_jacobi_defaults(llama, block_size=0)


def test_a_default_without_cache_is_overridden(llama):
    ids, _ = make_prompts(1)
    llama.generation_config.use_cache = False
    assert llama.generate(ids, max_new_tokens=20, jacobi_block_size=8).tolist() == greedy(llama, ids).tolist()
    cllm_hf.set_jacobi_defaults(llama)
    assert llama.generation_config.use_cache


def test_options_in_a_generation_config(llama):
    ids, _ = make_prompts(1)
    config = GenerationConfig(decoding="jacobi", jacobi_block_size=6, max_new_tokens=20, do_sample=False)
    assert llama.generate(ids, config).tolist() == greedy(llama, ids).tolist()
    with pytest.raises(ValueError, match="got -1"):
        llama.generate(ids, GenerationConfig(decoding="jacobi", jacobi_block_size=-1))
    config = GenerationConfig(jacobi_block_size=6, max_new_tokens=20, return_dict_in_generate=True)
    assert isinstance(llama.generate(ids, config), cllm_hf.JacobiOutput)
    with pytest.raises(ValueError, match="got 0"):
        llama.generate(ids, GenerationConfig(jacobi_block_size=0))


def test_defaults_of_other_strategies_make_room(llama, tmp_path):
    llama.generation_config.update(do_sample=True, epsilon_cutoff=0.1, num_beams=3)
    cllm_hf.set_jacobi_defaults(llama)
    llama.save_pretrained(tmp_path)
    ids, _ = make_prompts(1)
    assert llama.generate(ids, max_new_tokens=20).tolist() == greedy(llama, ids).tolist()


def test_pipeline(word_model, tokenizer):
    generator = pipeline("text-generation", model=word_model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = generator("Mia has 7 apples .", **options)
    assert generator("Mia has 7 apples .", decoding="jacobi", jacobi_block_size=4, **options) == expected
    texts = ["Mia has 7 apples .", "Ben has 3"]
    assert generator(texts, batch_size=2, jacobi_block_size=4, **options) == generator(texts, batch_size=2, **options)


def test_peft_model(llama):
    from peft import LilyConfig, LoraConfig, PromptTuningConfig, get_peft_model

    ids, mask = make_prompts(3)
    model = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    expected = greedy(model, ids, attention_mask=mask)
    decoded = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=20, jacobi_block_size=8
    )
    assert decoded.tolist() == expected.tolist()
    prompt_tuned = get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt or prefix tuning"):
        prompt_tuned.generate(input_ids=ids, decoding="jacobi", max_new_tokens=3)
    activated = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]))
    with pytest.raises(ValueError, match="activated LoRA"):
        activated.generate(input_ids=ids, decoding="jacobi", max_new_tokens=3)
    lily = get_peft_model(make_model("llama"), LilyConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="mean over all tokens"):
        lily.generate(input_ids=ids, decoding="jacobi", max_new_tokens=3)
    options = {"input_ids": ids, "attention_mask": mask, "adapter_names": ["__base__", "default", "default"]}
    with pytest.raises(ValueError, match="several adapters in a batch"):
        model.generate(**options, decoding="jacobi", max_new_tokens=3)
    assert model.generate(**options, do_sample=False, max_new_tokens=3).shape == (3, 12)


def test_import_is_light():
    """`import cllm_hf` must not pull in what only training and datasets need."""
    code = "import sys, cllm_hf; print(sorted({'trl', 'peft', 'datasets', 'evaluate'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_caches_of_other_kinds_are_refused(llama):
    from architectures import make_architecture
    from transformers import StaticCache

    ids, _ = make_prompts(1)
    options = {"decoding": "jacobi", "max_new_tokens": 3}
    cache = StaticCache(config=llama.config, max_cache_len=32)
    with pytest.raises(ValueError, match="StaticCache"):
        llama.generate(ids, past_key_values=cache, **options)
    for name, message in (("qwen3_next", "such `past_key_values`, to be extended"), ("jamba", "feeds the whole")):
        model = make_architecture(name)
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=message):
            model.generate(ids, past_key_values=cache, **options)
    output = make_architecture("qwen3_next").generate(ids, return_dict_in_generate=True, **options)
    assert output.past_key_values is None


def test_use_cache_false_decodes_the_whole_text_each_time(llama):
    ids, mask = make_prompts(3)
    options = {"attention_mask": mask, "max_new_tokens": 20, "jacobi_block_size": 8}
    assert llama.generate(ids, use_cache=False, **options).tolist() == greedy(llama, ids, attention_mask=mask).tolist()


def padded_row():
    ids = torch.tensor([[0, 0, 0, 5, 9, 33, 21, 8, 40]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next", "lfm2", "mamba2", "openai-gpt"])
def test_one_row_with_padding(name):
    from architectures import make_architecture
    from conftest import CONFIGS

    model = make_model(name) if name in CONFIGS else make_architecture(name)
    expected = greedy(model, **padded_row())
    for block_size in (1, 4, 16):
        decoded = model.generate(**padded_row(), do_sample=False, max_new_tokens=20, jacobi_block_size=block_size)
        assert decoded.tolist() == expected.tolist()


def test_two_turns_of_one_row_with_padding(llama):
    sequences = []
    for extra in ({}, {"jacobi_block_size": 8}):
        inputs, cache = padded_row(), DynamicCache(config=llama.config)
        for _ in range(2):
            ids = llama.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=9, **extra)
            ids = torch.cat([ids, torch.tensor([[7, 11]])], dim=1)
            mask = inputs["attention_mask"]
            inputs = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(mask, (0, 11), value=1)}
        sequences.append(ids.tolist())
    assert sequences[0] == sequences[1]


def test_positions_of_the_user(llama):
    ids, _ = make_prompts(1)
    positions = torch.arange(9)[None] + 50
    options = {"position_ids": positions, "do_sample": False, "max_new_tokens": 20}
    decoded = llama.generate(ids, jacobi_block_size=8, **options)
    assert decoded.tolist() == llama.generate(ids, **options).tolist()


def test_embeddings_that_would_be_forgotten_are_refused():
    from architectures import make_architecture

    model = make_architecture("jamba")
    embeds = model.get_input_embeddings()(make_prompts(1)[0])
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        model.generate(inputs_embeds=embeds, decoding="jacobi", max_new_tokens=3)


def test_what_belongs_to_the_prompt_alone_is_refused(llama):
    from cllm_hf.blocks.limits import check_model_inputs

    check_model_inputs(llama, {"use_cache": True, "mm_encoder_outputs": {}, "output_attentions": None})
    for value in (torch.ones(1), {"image": object()}, [1]):
        with pytest.raises(ValueError, match="model input `pixel_values`"):
            check_model_inputs(llama, {"pixel_values": value})


def test_an_error_leaves_the_cache_of_the_user_as_it_was():
    model = make_model("mistral")  # of which every layer has a window
    ids, mask = make_prompts(1, 20)
    cache = DynamicCache(config=model.config)
    model(ids[:, :15], past_key_values=cache)

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("stop")

    options = {"attention_mask": mask, "past_key_values": cache, "decoding": "jacobi", "max_new_tokens": 5}
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(ids, logits_processor=LogitsProcessorList([Fails()]), jacobi_block_size=8, **options)
    assert cache.get_seq_length() == 15
    assert not any(layer.record_past for layer in cache.layers)
    expected = greedy(model, ids, attention_mask=mask)
    decoded = model.generate(ids, **{**options, "max_new_tokens": 20}, do_sample=False)
    assert decoded.tolist() == expected.tolist()


def test_options_that_are_switched_off_do_not_switch_jacobi_on(llama):
    output = llama.generate(make_prompts(1)[0], max_new_tokens=3, jacobi_compile=False, return_dict_in_generate=True)
    assert not isinstance(output, cllm_hf.JacobiOutput)
    llama.generation_config.use_cache = False
    options = {"max_new_tokens": 4, "decoding": "jacobi", "use_cache": False, "return_dict_in_generate": True}
    assert llama.generate(make_prompts(1)[0], **options).past_key_values is None


def test_models_with_a_loop_of_their_own_are_refused(llama, monkeypatch):
    monkeypatch.setattr(type(llama), "_sample", lambda *args, **kwargs: None, raising=False)
    with pytest.raises(ValueError, match="a decoding loop of their own"):
        llama.generate(make_prompts(1)[0], decoding="jacobi", max_new_tokens=3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_error_in_the_first_forward_is_the_one_that_is_seen(name):
    def fail(*_):
        raise RuntimeError("stop")

    model = make_model(name)
    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(make_prompts(1)[0], decoding="jacobi", max_new_tokens=5)
    handle.remove()


def test_integers_of_numpy(llama):
    ids, _ = make_prompts(1)
    options = {"max_new_tokens": np.int64(6), "do_sample": False}
    decoded = llama.generate(ids, **options, jacobi_block_size=np.arange(4, 9)[0], jacobi_candidates=np.int32(1))
    assert decoded.tolist() == llama.generate(ids, **options).tolist()
    sampled = {"max_new_tokens": 6, "do_sample": True, "jacobi_block_size": np.uint8(4)}
    texts = [llama.generate(ids, **sampled, jacobi_seed=seed).tolist() for seed in (3, np.int64(3))]
    assert texts[0] == texts[1]
    cllm_hf.set_jacobi_defaults(llama, block_size=np.int64(4))
    assert type(llama.generation_config.jacobi_block_size) is int
    for name, value in (("jacobi_block_size", np.float64(4)), ("jacobi_block_size", True), ("jacobi_seed", "3")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            llama.generate(ids, do_sample=True, max_new_tokens=3, **{"decoding": "jacobi", name: value})


@pytest.mark.parametrize("limit", [9.0, 8.5])
def test_a_limit_that_is_no_integer(llama, limit):
    ids, _ = make_prompts(1)
    options = {"max_new_tokens": limit, "do_sample": False}
    decoded = llama.generate(ids, **options, jacobi_block_size=4)
    assert decoded.tolist() == llama.generate(ids, **options).tolist()


def test_stats_are_an_attribute_and_no_item(llama):
    options = {"max_new_tokens": 5, "decoding": "jacobi", "return_dict_in_generate": True}
    output = llama.generate(make_prompts(1)[0], **options)
    assert "jacobi_stats" not in list(output) and output["jacobi_stats"] is output.jacobi_stats
    assert copy.deepcopy(output).jacobi_stats == pickle.loads(pickle.dumps(output)).jacobi_stats == output.jacobi_stats


def test_an_image_is_named_as_the_caller_does(llama):
    with pytest.raises(ValueError, match="the model input `pixel_values`"):
        llama.generate(make_prompts(1)[0], pixel_values=torch.randn(1, 3, 8, 8), decoding="jacobi", max_new_tokens=3)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "gemma4"])
def test_text_alone_for_a_model_that_reads_images_too(name):
    model = make_image_text_model(name)
    ids, mask = make_prompts(3, 12)
    for rows in (1, 3):
        inputs = {"input_ids": ids[:rows], "attention_mask": mask[:rows]}
        options = {"max_new_tokens": 20, "do_sample": False, "mm_token_type_ids": torch.zeros_like(ids[:rows])}
        expected = model.generate(**inputs, **options)
        assert model.generate(**inputs, **options, jacobi_block_size=5).tolist() == expected.tolist()
    types = torch.ones_like(ids)
    with pytest.raises(ValueError, match="the model input `mm_token_type_ids`"):
        model.generate(ids, attention_mask=mask, mm_token_type_ids=types, decoding="jacobi", max_new_tokens=3)
