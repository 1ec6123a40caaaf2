"""Adapters before, during and after a call: threads, other adapters, failing calls, processors that run the model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model, make_prompts
from lossless_models import add_random_adapter
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from cllm_hf._host import adapter_layers


OPTIONS = {"do_sample": False, "max_new_tokens": 24}


def generate(model, prompts, **options):
    return model.generate(input_ids=prompts[0], attention_mask=prompts[1], **{**OPTIONS, **options}).tolist()


def add_task(model, name="task"):
    """Another, plain adapter beside what a model has, which changes its text."""
    model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if f"lora_B.{name}" in parameter:
                weight.normal_(std=0.5)
    return model


def test_threads_take_turns(llama):
    """By every decoding; what the calls put in place of layers is gone afterwards."""
    model = add_random_adapter(llama).get_base_model()
    prompts = [make_prompts(1, seed=seed) for seed in range(6)]
    expected = [generate(llama, one) for one in prompts]
    jobs = [(number, decoding) for number in range(6) for decoding in ("lossless", "autoregressive", "jacobi")]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: generate(model, prompts[job[0]], decoding=job[1]), jobs))
    assert found == [expected[number] for number, _ in jobs]
    assert not any("forward" in vars(layer) for _, layer in adapter_layers(model))


@pytest.mark.parametrize("decoding", [None, "lossless", "jacobi", "autoregressive"])
def test_another_adapter_that_is_not_active(llama, decoding):
    model = add_task(add_random_adapter(llama))
    model.set_adapter("default")
    prompts = make_prompts(2)
    assert generate(model, prompts, decoding=decoding) == generate(llama, prompts)


def test_a_refused_call_changes_nothing(llama):
    """PEFT leaves the hooks of a call that fails, so that its adapters would go on in the next one."""
    model = add_task(get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), "second").eval()
    model.set_adapter("default")
    prompts = make_prompts(3)
    before = generate(model, prompts)
    names = ["second"] * 3
    assert generate(model, prompts, adapter_names=names) != before
    with pytest.raises(ValueError, match="`adapter_names`"):
        generate(model, prompts, adapter_names=names, decoding="jacobi")
    assert generate(model, prompts) == before
    assert generate(model, prompts, decoding="jacobi") == before


@pytest.mark.parametrize("decoding", ["lossless", "jacobi"])
def test_a_call_that_fails_leaves_no_hooks_of_an_activated_adapter(llama, decoding):
    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("stop here")

    model = add_task(add_random_adapter(llama))
    model.set_adapter("default")
    prompts = make_prompts(1)
    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, prompts, decoding=decoding, logits_processor=LogitsProcessorList([Failing()]))
    assert not any(layer._forward_pre_hooks for _, layer in adapter_layers(model.get_base_model()))
    model.set_adapter("task")
    assert generate(model, prompts, decoding="jacobi") == generate(model, prompts, decoding="autoregressive")


class Contrast(LogitsProcessor):
    """Runs the model itself, over more tokens than a block has."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        return scores - 0.5 * self.model(torch.cat([input_ids] * 8, dim=1)).logits[:, -1]


@pytest.mark.parametrize("candidates", [0, 2])
def test_processors_may_run_the_model(llama, candidates):
    model, prompts = add_random_adapter(llama), make_prompts(1)
    expected, found = (
        generate(one, prompts, logits_processor=LogitsProcessorList([Contrast(one)]), **options)
        for one, options in ((llama, {}), (model, {"decoding": "lossless", "jacobi_candidates": candidates}))
    )
    assert found == expected
    assert generate(model, prompts, guidance_scale=1.5) == generate(llama, prompts, guidance_scale=1.5)


@pytest.mark.parametrize("size", [50, 70])
def test_embeddings_that_were_resized(size):
    model = add_random_adapter(make_model("llama"), target_modules=["q_proj", "v_proj"])
    base = model.get_base_model()
    base.resize_token_embeddings(size, mean_resizing=False)
    ids = make_prompts(1)[0] % size
    prompts = ids, torch.ones_like(ids)
    assert generate(model, prompts) == generate(base, prompts, decoding="autoregressive")


def test_a_cache_that_forgets_is_refused(llama):
    """Of a class of the user, nobody knows how a rejected token is taken out of it."""

    class Sink(DynamicCache):
        pass

    prompts = make_prompts(1)
    with pytest.raises(ValueError, match="`past_key_values`.* got Sink"):
        generate(llama, prompts, past_key_values=Sink(), decoding="jacobi")
    cache = DynamicCache(config=llama.config)
    assert generate(llama, prompts, past_key_values=cache, decoding="jacobi") == generate(llama, prompts)
