"""
A tiny model for every architecture that the host can load as a causal language model.

`make_architecture("qwen3_next")` builds one from a shrunk config, with random weights and without the network. One
table says which value a config attribute gets, whatever the config; `CHANGES` holds what is particular to a type.
"""

import copy
import dataclasses
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D


MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB_SIZE = 60
NUM_LAYERS = 4
# Windows and chunks are shorter than a prompt, so that a text of 60 tokens leaves them several times.
WINDOW = 8

CANNOT_BUILD: dict[str, str] = {
    "gemma3n": "its vision tower needs the packages timm and pillow; `gemma3n_text` is its text part",
    "musicgen": "predicts several codebooks of audio a step: its input has a row for each codebook",
    "musicgen_melody": "predicts several codebooks of audio a step: its input has a row for each codebook",
    "gemma4_assistant": "a drafter that has no cache of its own: its forward needs another model's `shared_kv_states`",
    "gemma4_unified_assistant": "a drafter that has no cache of its own: its forward needs another model's "
    "`shared_kv_states`",
}


class CannotBuild(Exception):
    """The architecture has no small text-only causal model on a CPU; the message says why."""


# Value, and the attributes that get it in every config and sub-config that has them.
_SMALL: list[tuple[Any, str]] = [
    (None, "eos_token_id forced_eos_token_id forced_bos_token_id"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id n_group topk_group num_expert_group n_shared_experts num_shared_experts"),
    (1.0, "logit_scale logits_mup_width_multiplier"),
    (1, "moe_num_shared_experts first_k_dense_replace num_dense_layers"),
    (2, "sep_token_id depth num_key_value_heads kv_n_heads swa_num_key_value_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts"),
    (2, "mamba_n_groups n_groups mamba_ngroups linear_num_key_heads num_global_layers num_random_blocks"),
    (NUM_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"),
    # As many as decoder layers: the host takes this number for the cache of a decoder without its encoder.
    (NUM_LAYERS, "encoder_layers num_encoder_layers"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (4, "linear_num_value_heads linear_num_heads index_topk mamba_n_heads mamba_num_heads"),
    # Scores of an indexer are sums of ReLUs over its heads: with few heads many are equal, at zero, and so arbitrary.
    (16, "index_n_heads"),
    (8, "head_dim rotary_dim dim_head d_head attention_head_size swa_head_dim index_head_dim kv_channels patch_size"),
    (8, "v_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (
        8,
        "time_step_rank mamba_dt_rank state_size mamba_d_state ssm_state_size laurel_rank hidden_size_per_layer_input",
    ),
    (WINDOW, "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size"),
    (WINDOW, "local_attention local_attention_window_len keep_window_size chunk_size mamba_chunk_size"),
    (16, "rel_extent log_scaling_n_floor"),
    (16, "kv_lora_rank q_lora_rank qk_head_dim o_lora_rank mamba_d_head mamba_head_dim"),
    (32, "hidden_size d_model n_embd embedding_size emb_dim embedding_dim word_embed_proj_dim out_hidden_size"),
    (32, "adapter_out_dim adapter_input_size"),
    (32, "input_embedding_size output_embedding_size hidden_size_global lru_width pronunciation_embed_dim"),
    (32, "shape_embed_dim moe_intermediate_size expert_ffn_hidden_size image_size"),
    (64, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner dff dim_ff ffn_hidden_size mamba_d_ssm"),
    (64, "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size d_inner"),
    (64, "intermediate_size_mlp moe_shared_expert_intermediate_size dense_intermediate_size feed_forward_size"),
    (64, "prefix_dense_intermediate_size mlp_dim"),
    (VOCAB_SIZE, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    # Without it BERT and its kin see both directions. (Decoders of encoder-decoder models set both themselves.)
    (True, "is_decoder"),
    (False, "is_encoder_decoder"),
    # A residual stream that is dominated by the last token would repeat it.
    (False, "tie_word_embeddings"),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
]
SMALL: dict[str, Any] = {name: value for value, names in _SMALL for name in names.split()}


# One of each kind whose attention, cache, masks or positions are its own, where a test of all would take minutes.
KINDS = (
    "llama gpt2 gptj gpt_neox falcon opt xglm biogpt codegen phi3 qwen2 qwen3 mistral starcoder2 gemma2 gemma3n_text "
    "gemma4_text cohere2 gpt_oss deepseek_v3 minicpm3 olmo3 mixtral modernbert-decoder smollm3 diffllama mllama"
).split()


def _cycle(*kinds: str) -> list[str]:
    return (list(kinds) * NUM_LAYERS)[: max(NUM_LAYERS, len(kinds))]


_FULL_AND_SLIDING = {"layer_types": _cycle("sliding_attention", "full_attention")}
_QWEN2 = {"use_sliding_window": True, "max_window_layers": 2, **_FULL_AND_SLIDING}
_GEMMA3N = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "altup_num_inputs": 2}
_GEMMA4 = {
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    # Embeddings of n-grams, in the first layer. They ask for an end token, which no text reaches.
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "eos_token_id": 2,
}
_LLAMA4 = {"interleave_moe_layer_step": 2, "floor_scale": WINDOW, "no_rope_layers": [1, 0, 1, 0]}

# What else a type needs. Attributes of a sub-config stand under its name.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    # The host asks the whole config for the number of layers when it makes a cache, and it has none by default.
    "blt": {"num_hidden_layers": NUM_LAYERS, "encoder_hash_byte_group_vocab": 100, "patching_threshold": 3.0},
    "cohere_compass_text": {
        **_FULL_AND_SLIDING,
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},  # read by the model, without a default
    "deepseek_v4": {
        "layer_types": _cycle("heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"),
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots1": _FULL_AND_SLIDING,
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"adapter_in_dim": 32}},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "got_ocr2": {"text_config": _QWEN2, "vision_config": {"output_channels": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": _cycle("linear_attention", "full_attention")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _FULL_AND_SLIDING,
    "lfm2": {"layer_types": _cycle("conv", "full_attention")},
    "lfm2_moe": {"layer_types": _cycle("conv", "full_attention")},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "mellum": {**_FULL_AND_SLIDING, "mlp_layer_types": _cycle("dense", "sparse")},
    "minimax_m3_vl_text": {
        "layer_types": _cycle("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": _cycle("dense", "sparse"),
        "index_n_heads": 4,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": _FULL_AND_SLIDING,
    "moss_transcribe_diarize": {"text_config": _QWEN2},
    # No window within the texts of tests: the host cuts its cache to the window, but masks as if there were none.
    "moshi": {"sliding_window": 256},
    "nemotron_h": {"time_step_min": 1e-6},
    "qwen2": _QWEN2,
    "qwen2_moe": {**_QWEN2, "mlp_only_layers": [0]},
    "qwen3": _QWEN2,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": WINDOW,
        "lsh_attn_chunk_length": WINDOW,
        "attn_layers": _cycle("local", "lsh"),
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {"shape_vocab_size": VOCAB_SIZE, "pronunciation_vocab_size": VOCAB_SIZE},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0], "layer_types": None},
    # Without `causal` it sees both directions. Its generate appends the mask token, by default the padding one.
    "xlm": {"causal": True, "mask_token_id": 5},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "autocast_kernel_dtype": "float32"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    # In the host a step of one token leaves out the lower limit of the time step that a step of several applies.
    "zamba2": {"time_step_min": 1e-6},
    "zaya": {"num_experts_per_tok": 1, "layer_types": _cycle("hybrid", "hybrid_sliding"), "router_hidden_size": 16},
}


def small_config(default: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """The config with small values in place of its default ones, and then with the changes."""
    fields = {field.name for field in dataclasses.fields(default)}
    values = {name: value for name, value in SMALL.items() if name in fields}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = small_config(value, changes.pop(name, {}))
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types") and value:
            values[name] = _cycle(*dict.fromkeys(value))
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no groups
    return type(default)(**{**values, **changes})


def make_config(model_type: str) -> PreTrainedConfig:
    """The shrunk config of a model type: of its decoder or text part, where the model class is for that part."""
    config_class = CONFIG_MAPPING[model_type]
    config = small_config(config_class(), copy.deepcopy(CHANGES.get(model_type, {})))
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING[config_class].config_class
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    return next((part for part in parts if isinstance(part, wanted)), config)


# How much a layer changes its input. Layers with a norm after the residual sum need more of it to look at the context;
# recurrence over depth or time needs less, or rounding errors grow to the size of the logits.
GAIN = 3.0
GAINS = {
    "hrm_text": 1.5,
    **dict.fromkeys(("olmo3", "zamba2"), 2.0),
    **dict.fromkeys("beam big_bird blenderbot-small data2vec-text rembert roberta roc_bert".split(), 3.5),
    **dict.fromkeys("bert bloom camembert ctrl electra ernie".split(), 4.0),
    **dict.fromkeys("plbart xglm xlm xlm-roberta".split(), 4.0),
}


@torch.no_grad()
def randomize(model: PreTrainedModel, gain: float) -> None:
    """
    Weights large enough that the greedy text depends on its context: the host's own initial values are so small that
    a tiny model repeats one token, and many of them (biases, decays, convolutions) are constant.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    words = id(model.get_input_embeddings().weight)
    for name, parameter in model.named_parameters():
        if parameter.squeeze().dim() <= 1 or "A_log" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        elif id(parameter) in embeddings:
            parameter.normal_(std=1.0 if id(parameter) == words else 0.5)
        elif parameter.dim() > 2:
            parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
        else:
            inputs = 0 if id(parameter) in transposed else 1
            parameter.normal_(std=gain / parameter.shape[inputs] ** 0.5)
            # Activations with a mean above zero (GELU, ReLU) would add the same vector everywhere.
            parameter.sub_(parameter.mean(dim=inputs, keepdim=True))
    for name, buffer in model.named_buffers():
        if name.endswith(("bias", "biases")) and buffer.is_floating_point() and not buffer.any():
            buffer.add_(torch.randn_like(buffer), alpha=0.2)  # of a router
        elif name.endswith("tid2eid"):
            buffer.random_(0, model.config.n_routed_experts)  # the experts of each token


def make_architecture(model_type: str, seed: int = 0) -> PreTrainedModel:
    """
    A tiny random model of the given type, in float32 and in eval mode.

    Raises:
        CannotBuild: if `CANNOT_BUILD` gives a reason.
    """
    if model_type in CANNOT_BUILD:
        raise CannotBuild(CANNOT_BUILD[model_type])
    config = make_config(model_type)
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]](config).float().eval()
    randomize(model, GAINS.get(model_type, GAIN))
    # Nothing stops a text early, suppresses a token or forces one.
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model
