"""The gate of a lossless adapter: the rows before the drafter's are those of the base model, to the last bit."""

import pytest
import torch
from architectures import make_architecture
from conftest import CONFIGS, make_model, make_prompts
from lossless_models import ATTENTION, add_random_adapter
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from cllm_hf.blocks.drafter import AdapterGate, adapter_layers, find_drafter, is_switched_off, without_adapters


COUNT = 5
INTERRUPTED = ["processor", "criterion", "streamer", "module"]


def make_pair(name, **options):
    base = make_model(name) if name in CONFIGS else make_architecture(name)
    model = add_random_adapter(base, **options).get_base_model()
    return base, model, AdapterGate(model, find_drafter(model))


def run(model, ids):
    cache = DynamicCache(config=model.config)
    return model(input_ids=ids, past_key_values=cache).logits, cache


def compare_rows(base, model, gate, is_training=False):
    """Logits of a causal pass whose last rows are the drafter's, and of the same pass by the base model."""
    ids, _ = make_prompts(3, 12, padding=False)
    base.train(is_training), model.train(is_training)
    with gate.installed():
        gate.open(list(range(COUNT)))
        found, cache = run(model, ids)
    expected, base_cache = run(base, ids)
    alone, _ = run(base, ids[:, :-COUNT])
    torch.testing.assert_close(found[:, :-COUNT], alone, atol=1e-5, rtol=1e-5)
    assert (found[:, -COUNT:] - expected[:, -COUNT:]).abs().amax(-1).min() > 0.01  # and each of the drafter's differs
    for ours, theirs in zip(cache.layers, base_cache.layers):
        # Sliding layers have dropped columns from the front.
        assert ours.keys.shape == theirs.keys.shape
    return found, expected, cache, base_cache


@pytest.mark.parametrize(("with_gradient", "is_training"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "phi3"])
def test_base_rows_are_bit_identical(name, with_gradient, is_training):
    base, model, gate = make_pair(name, dropout=0.5)
    for module in [*base.modules(), *model.modules()]:
        if isinstance(module, torch.nn.Dropout) and module.p != 0.5:
            module.p = 0.0  # the base model's own would draw other numbers in a longer pass
        for attribute in ("attention_dropout", "dropout_prob"):
            if hasattr(module, attribute) and isinstance(getattr(module, attribute), float):
                setattr(module, attribute, 0.0)
    with torch.set_grad_enabled(with_gradient):
        found, expected, cache, base_cache = compare_rows(base, model, gate, is_training)
    assert torch.equal(found[:, :-COUNT], expected[:, :-COUNT])
    for ours, theirs in zip(cache.layers, base_cache.layers):
        assert torch.equal(ours.keys[:, :, :-COUNT], theirs.keys[:, :, :-COUNT])
        assert torch.equal(ours.values[:, :, :-COUNT], theirs.values[:, :, :-COUNT])


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_base_rows_of_experts_are_equal_up_to_rounding(name):
    """How many tokens an expert multiplies at once is not the same."""
    found, expected, _, _ = compare_rows(*make_pair(name, target_modules=ATTENTION))
    torch.testing.assert_close(found[:, :-COUNT], expected[:, :-COUNT], atol=1e-5, rtol=1e-5)


def test_layers_are_called_without_hooks_of_peft_while_it_decodes():
    """`PeftModel.generate` puts one on each layer for an activated LoRA, which costs time in each forward pass."""
    model = add_random_adapter(make_model("llama"))
    layers = [layer for _, layer in adapter_layers(model.get_base_model())]
    embeddings, seen = model.get_base_model().get_input_embeddings(), []
    embeddings.register_forward_pre_hook(lambda *_: seen.append(sum(len(one._forward_pre_hooks) for one in layers)))
    found = {}
    for decoding in ("autoregressive", "lossless"):
        model.generate(input_ids=make_prompts(1)[0], decoding=decoding, do_sample=False, max_new_tokens=4)
        found[decoding] = set(seen)
        seen.clear()
    assert found == {"autoregressive": {len(layers)}, "lossless": {0}}


@torch.no_grad()
def test_a_closed_gate_and_no_adapters_are_the_base_model():
    base, model, gate = make_pair("llama")
    ids, _ = make_prompts(2, padding=False)
    expected = run(base, ids)[0]
    with gate.installed():
        assert torch.equal(run(model, ids)[0], expected)
    with without_adapters(model):
        assert torch.equal(run(model, ids)[0], expected)
    assert not is_switched_off(model) and not is_switched_off(base)


@torch.no_grad()
def test_the_drafters_rows_are_those_of_an_adapter_that_acts_everywhere():
    """Where all rows are the drafter's, PEFT's own forward pass over the masks' embeddings is the same."""
    base, model, gate = make_pair("llama")
    numbers = [0, 1, 2, 0, 1]
    plain = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    plain.get_base_model().load_state_dict(model.state_dict(), strict=False)
    masks = find_drafter(model).masks[numbers].expand(2, -1, -1)
    with gate.installed():
        gate.open(numbers)
        found = run(model, torch.zeros(2, len(numbers), dtype=torch.long))[0]
    expected = plain.get_base_model()(inputs_embeds=masks).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_dropout_of_the_adapter_is_switched_by_itself():
    _, model, gate = make_pair("llama", dropout=0.5)
    ids, _ = make_prompts(2, padding=False)
    for is_on in (True, False):
        gate.train_dropout(is_on)
        with gate.installed():
            gate.open(list(range(COUNT)))
            first, second = (run(model, ids)[0] for _ in range(2))
        assert torch.equal(first[:, :-COUNT], second[:, :-COUNT])
        assert torch.equal(first[:, -COUNT:], second[:, -COUNT:]) != is_on


def test_base_rows_give_an_adapter_no_gradient():
    _, model, gate = make_pair("llama")
    ids, _ = make_prompts(2, padding=False)
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
    with gate.installed():
        gate.open(list(range(COUNT)))
        logits = run(model, ids)[0]
    base_rows = torch.autograd.grad(logits[:, :-COUNT].square().sum(), weights, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in base_rows)
    assert all(gradient.any() for gradient in torch.autograd.grad(logits[:, -COUNT:].square().sum(), weights))


class Interrupted:
    """A processor, criterion, streamer or hook that is interrupted at its third call."""

    def __init__(self):
        self.left = 3

    def __call__(self, input_ids, scores=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        if isinstance(input_ids, torch.Tensor) and scores is None:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        return scores

    put = __call__


def state_of(model):
    """What a call may leave after: functions of modules' own, and hooks."""
    return {
        name: (vars(module).get("forward"), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("decoding", ["lossless", "jacobi", "autoregressive"])
@pytest.mark.parametrize("source", INTERRUPTED)
def test_an_interrupted_call_leaves_the_model_as_it_was(source, decoding):
    base, model, _ = make_pair("llama")
    layer = next(layer for _, layer in adapter_layers(model))
    layer.forward = layer.forward  # a function of its own, as of a library that wraps layers
    before, interrupt, options = state_of(model), Interrupted(), {"do_sample": False, "max_new_tokens": 12}
    handle = None
    if source == "processor":
        extra = {"logits_processor": LogitsProcessorList([lambda ids, scores: interrupt(ids, scores)])}
    elif source == "criterion":
        extra = {"stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: interrupt(ids)])}
    elif source == "streamer":
        extra = {"streamer": interrupt}
    else:
        handle, extra = model.model.layers[1].register_forward_pre_hook(lambda *_: interrupt([])), {}
    ids, _ = make_prompts(1)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, decoding=decoding, **options, **extra)
    if handle is not None:
        handle.remove()
    assert state_of(model) == before
    assert model.generate(ids, **options).tolist() == base.generate(ids, **options).tolist()
    assert state_of(model) == before


def test_hooks_of_the_base_layers_are_called():
    _, model, gate = make_pair("llama")
    ids, _ = make_prompts(1)
    calls, (_, layer) = [], next(adapter_layers(model))
    handle = layer.get_base_layer().register_forward_hook(lambda module, args, output: calls.append(1) or 2 * output)
    with gate.installed():
        doubled = run(model, ids)[0]
        assert len(calls) == 1
    handle.remove()
    with gate.installed():
        assert not torch.equal(run(model, ids)[0], doubled) and len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "reshape",
    [
        lambda mlp, x: mlp(x.flatten(0, 1)).view_as(x),
        lambda mlp, x: mlp(x.flatten(0, 1)[None]).view_as(x),
        lambda mlp, x: mlp(x.transpose(0, 1)).transpose(0, 1),
        lambda mlp, x: torch.cat([mlp(x[:, :1]), mlp(x[:, 1:])], dim=1),
        lambda mlp, x: mlp(x[:, None])[:, 0],
    ],
    ids=["tokens of all rows", "in one row", "turned", "in parts", "with a further dimension"],
)
def test_layers_that_see_rows_elsewhere_are_refused(reshape):
    _, model, gate = make_pair("llama")
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: reshape(own, x)
    ids, _ = make_prompts(3, 7, padding=False)
    with gate.installed():
        run(model, ids)  # no drafter's rows, nothing to get wrong
        gate.open([0, 1])
        with pytest.raises(ValueError, match="`target_modules`"):
            run(model, ids)


def test_experts_are_refused_when_they_are_decoded_with():
    with pytest.raises(ValueError, match="`target_modules`"):
        _, model, _ = make_pair("opt")  # its layers after attention see tokens without rows too
        model.generate(make_prompts(1)[0], max_new_tokens=4)


def test_output_embeddings_may_have_an_adapter():
    """They see the last columns alone."""
    base, model, gate = make_pair("llama", target_modules=["q_proj", "lm_head"])
    ids, _ = make_prompts(2, padding=False)
    with gate.installed(), torch.no_grad():
        gate.open([0, 1])
        found = model(ids, logits_to_keep=4).logits
        expected = base(ids, logits_to_keep=4).logits
    assert torch.equal(found[:, :2], expected[:, :2]) and not torch.equal(found[:, 2:], expected[:, 2:])
    assert model.generate(ids, max_new_tokens=9).tolist() == base.generate(ids, max_new_tokens=9).tolist()


def test_other_adapters_are_refused():
    base = make_model("llama")
    drafter = find_drafter(add_random_adapter(base).get_base_model())
    merged = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    merged.merge_adapter()
    several = add_random_adapter(base)
    several.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    several.base_model.set_adapter(["default", "other"])
    scaling = get_peft_model(make_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    for model, message in ((merged, "is merged"), (several, "is one of several"), (scaling, "is of another kind")):
        with pytest.raises(ValueError, match=message):
            AdapterGate(model.get_base_model(), drafter)
