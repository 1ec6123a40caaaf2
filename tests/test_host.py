"""Facts about the host libraries that this project relies on. After an upgrade, these fail first."""

import inspect
import re

import click
import pytest
import torch
from architectures import make_architecture
from conftest import make_model, make_prompts
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CsmForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.cli.serve import Serve
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager
from transformers.cli.transformers import app as transformers_commands
from transformers.masking_utils import create_causal_mask
from trl import SFTTrainer

from cllm_hf._host import (
    CACHE_NAME,
    adapter_layers,
    attention_implementation,
    compiles_whole,
    has_own_loop,
    input_device,
    mark_as_edited,
    mixes_adapters,
    without_alora_hooks,
)
from cllm_hf.blocks.drafter import NEVER_INVOKED
from cllm_hf.blocks.forward import forward_clean, packed_attention_mask
from cllm_hf.blocks.layout import Packed


def test_extras_of_a_derived_generation_config_are_lost_unless_marked(llama, tmp_path):
    for mark, expected in ((False, None), (True, "jacobi")):
        config = GenerationConfig.from_model_config(llama.config)
        assert config._from_model_config is True
        config.decoding = "jacobi"
        if mark:
            mark_as_edited(config)
        llama.generation_config = config
        llama.save_pretrained(tmp_path / str(mark))
        loaded = type(llama).from_pretrained(tmp_path / str(mark))
        assert getattr(loaded.generation_config, "decoding", None) == expected


def test_attention_implementation(llama):
    assert attention_implementation(llama.config) == "sdpa"
    llama.set_attn_implementation("eager")
    assert attention_implementation(llama.config) == "eager"


def test_what_the_host_says_of_a_model(llama):
    assert compiles_whole(llama) and not compiles_whole(make_architecture("mamba"))
    assert not has_own_loop(llama)
    assert has_own_loop(CsmForConditionalGeneration.__new__(CsmForConditionalGeneration))


def test_custom_generate_gets_prepared_inputs_and_loses_the_streamer(llama):
    seen = {}

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen.update(model_kwargs, processors=logits_processor, max_length=generation_config.max_length)
        return input_ids

    class Streamer:
        def put(self, value):
            seen["streamed"] = value

    ids, mask = make_prompts(2)
    llama.generate(ids, attention_mask=mask, max_new_tokens=5, custom_generate=loop, streamer=Streamer())
    assert isinstance(seen[CACHE_NAME], DynamicCache) and seen[CACHE_NAME].get_seq_length() == 0
    assert seen["logits_to_keep"] == 1 and seen["use_cache"] is True and seen["max_length"] == 14
    assert torch.equal(seen["attention_mask"], mask) and seen["position_ids"].shape == ids.shape
    assert torch.equal(seen["streamed"], ids) and "streamer" not in seen


def test_names_of_generate():
    parameters = inspect.signature(GenerationMixin.generate).parameters
    names = ("generation_config", "stopping_criteria", "synced_gpus", "assistant_model", "streamer", "custom_generate")
    assert list(parameters)[0] == "self" and set(names) <= set(parameters)


def test_cache_layers():
    config = LlamaConfig(num_hidden_layers=1)
    cache = DynamicCache(config=config)
    assert type(cache.layers[0]) is DynamicLayer and cache.is_croppable
    keys = torch.arange(6.0).view(1, 1, 6, 1)
    sliding = DynamicSlidingWindowLayer(sliding_window=4)
    sliding.activate_past_recording()
    sliding.update(keys, keys)
    assert sliding.keys.shape[-2] == 6 and sliding.cumulative_length == 6
    sliding.crop(-1)
    # It keeps one token less than the window, and counts all that it has seen.
    assert sliding.keys.flatten().tolist() == [2, 3, 4] and sliding.get_seq_length() == 5


def test_sft_trainer_has_what_cllm_trainer_overrides():
    assert {"compute_loss", "evaluation_loop", "get_batch_samples", "log", "save_model"} <= set(dir(SFTTrainer))
    assert SFTTrainer.loss_is_scaled_for_ga is None


def test_when_the_trainer_writes_cards_and_pushes(llama, tmp_path):
    """`cllm_hf.training.saving` stands on these."""
    assert {"create_model_card", "push_to_hub", "save_model", "init_hf_repo"} <= set(dir(SFTTrainer))
    assert list(inspect.signature(SFTTrainer.save_model).parameters) == ["self", "output_dir", "_internal_call"]
    names = ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"]
    assert list(inspect.signature(SFTTrainer.push_to_hub).parameters) == names
    names = ["self", "model_name", "dataset_name", "tags"]
    assert list(inspect.signature(SFTTrainer.create_model_card).parameters) == names
    # PEFT writes a card whenever an adapter is saved, into one that is there.
    model = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM"))
    (tmp_path / "README.md").write_text("Mine.\n")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Mine." in text and "library_name: peft" in text
    assert model.active_peft_config.peft_type.value == "LORA"


def test_adapters_given_to_each_row_show_as_hooks(llama):
    model = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM")).eval()
    seen = []

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen.append(mixes_adapters(model))
        return input_ids

    ids, _ = make_prompts(2, padding=False)
    for options in ({}, {"adapter_names": ["__base__", "default"]}, {}):
        model.generate(input_ids=ids, max_new_tokens=2, custom_generate=loop, **options)
    assert seen == [False, True, False]


def test_activated_lora_shows_as_hooks_which_can_be_set_aside(llama):
    model = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=NEVER_INVOKED)).eval()
    layers = [layer for _, layer in adapter_layers(model.get_base_model())]
    handle = layers[0].register_forward_pre_hook(lambda module, inputs: None)
    seen = []

    def hooks():
        return [len(layer._forward_pre_hooks) for layer in layers]

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen.append(hooks())
        with without_alora_hooks(layers):
            seen.append(hooks())
        seen.append(hooks())
        return input_ids

    model.generate(input_ids=make_prompts(2, padding=False)[0], max_new_tokens=2, custom_generate=loop)
    others = [0] * (len(layers) - 1)
    assert seen == [[2, *[1] * len(others)], [1, *others], [2, *[1] * len(others)]]
    assert hooks() == [1, *others]
    handle.remove()


def test_the_server_makes_its_model_manager_by_this_name():
    source = inspect.getsource(Serve.__init__)
    assert "from .serving.model_manager import ModelManager" in source and "ModelManager(" in source
    parameters = inspect.signature(ModelManager.load_model_and_processor).parameters
    assert list(parameters)[:2] == ["self", "model_id_and_revision"]
    assert "self.load_model_and_processor(" in inspect.getsource(ModelManager.__init__)
    assert "self._load_model(" in inspect.getsource(ModelManager.load_model_and_processor)
    assert next(iter(inspect.signature(ModelManager._load_model).parameters.values())).name == "self"
    assert inspect.isasyncgenfunction(ModelManager.load_model_streaming)
    assert isinstance(transformers_commands, click.Group) and "serve" in transformers_commands.commands


def test_the_server_handles_requests_by_these_names():
    source = inspect.getsource(Serve.__init__)
    for module, name in (("server", "build_server"), ("utils", "GenerationState")):
        assert re.search(rf"from \.serving\.{module} import .*{name}", source) and f"{name}(" in source
    handlers = ("chat_handler", "completion_handler", "response_handler")
    assert {*handlers, "generation_state"} <= set(inspect.signature(build_server).parameters)
    for name in handlers:
        assert f"{name}.handle_request(body, request.state.request_id)" in inspect.getsource(build_server)
    for handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler):
        source = inspect.getsource(handler)
        assert "self.generation_state.get_manager(model_id, use_cb=use_cb)" in source
        assert "gen_manager.generate_streaming(" in source and "gen_manager.generate_non_streaming(" in source
    for name in ("generate_streaming", "generate_non_streaming"):
        parameters = list(inspect.signature(getattr(GenerateManager, name)).parameters)
        assert parameters[:5] == ["self", "model", "processor", "inputs", "gen_config"]
    source = inspect.getsource(GenerateManager.generate_streaming)
    assert "model.generate(**gen_kwargs)" in source and '"streamer": streamer' in source
    assert 'data: {{"error": "{text.msg}"}}' in inspect.getsource(CompletionHandler)  # not escaped


def test_remote_generate_is_bound_to_its_model(llama, tmp_path):
    """The model comes by name, and with `custom_generate=` all arguments of `generate` do."""
    llama.save_pretrained(tmp_path)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(*args, model, **kwargs):\n    return args, sorted(kwargs)\n"
    )
    loaded = type(llama).from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.generate(1, max_length=2) == ((1,), ["max_length"])
    args, names = llama.generate(make_prompts(1)[0], custom_generate=str(tmp_path), trust_remote_code=True)
    assert args == () and {"inputs", "generation_config", "streamer"} <= set(names)
    assert not {"custom_generate", "trust_remote_code"} & set(names)


def test_inputs_go_where_the_embeddings_are(llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    assert input_device(llama) == torch.device("cpu")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, "model.rotary_emb": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    assert spread.get_input_embeddings().weight.device.type == "meta"
    assert input_device(spread) == torch.device("cpu")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cached", [False, True])
def test_masks_are_those_of_the_hosts_own_function(attention, cached):
    """The host makes the mask of a pair of columns from a function; `packing` hands over all pairs at once."""
    model = make_model("llama", attention=attention)
    generator = torch.Generator().manual_seed(0)
    segments = torch.randint(-1, 3, (2, 20), generator=generator)
    positions, anchors = (torch.randint(0, 12, (2, 20), generator=generator) for _ in range(2))
    packed = Packed(torch.zeros_like(segments), positions, segments, anchors, clean_length=8)
    cache = None
    if cached:
        _, cache = forward_clean(model, torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), 1)

    def allowed(batch, head, query, key):
        before = (segments[batch, key] == 0) & (positions[batch, key] < anchors[batch, query])
        return (segments[batch, key] == segments[batch, query]) | before

    embeddings = torch.zeros(2, 12 if cached else 20, 0)
    expected = create_causal_mask(model.config, embeddings, None, cache, and_mask_function=allowed)
    assert torch.equal(packed_attention_mask(model.config, packed, torch.float32, cache), expected)


def test_the_cache_has_the_name_that_models_and_outputs_give_it():
    """Version 5.24 of transformers has renamed `past_key_values`."""
    from transformers.generation import GenerateDecoderOnlyOutput

    llama = make_model("llama")
    assert CACHE_NAME in inspect.signature(llama.forward).parameters
    assert CACHE_NAME in inspect.signature(GenerateDecoderOnlyOutput).parameters
    cache = DynamicCache()
    llama(torch.tensor([[5, 6, 7]]), **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 3
