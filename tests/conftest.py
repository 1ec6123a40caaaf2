"""Tiny models, made from configs with a fixed seed; nothing here needs the network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
import transformers

from cllm_hf import set_jacobi_defaults
from cllm_hf.evaluation import shapes


# These models are so small that a second thread costs more than it brings.
torch.set_num_threads(1)

VOCAB_SIZE = 60
_COMMON = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA_LIKE),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA_LIKE),
    "gpt2": lambda: transformers.GPT2Config(**_COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **_COMMON, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    # Every third layer is full attention, the others see 8 tokens back.
    "gemma3": lambda: transformers.Gemma3TextConfig(**_LLAMA_LIKE, sliding_window=8, sliding_window_pattern=3),
    # All layers see 8 tokens back.
    "mistral": lambda: transformers.MistralConfig(**_LLAMA_LIKE, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2),
}


def make_model(name: str, scale: float = 4.0, seed: int = 0, attention: str = "sdpa", **config_changes):
    """
    A tiny model with layers scaled up from their initial values, so that its greedy text depends on the context and
    yet repeats itself now and then: some drafts are accepted (1.05 to 3.3 tokens per forward pass), some rejected.
    """
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.update(config_changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in parameter_name and "wte" not in parameter_name:
                parameter.mul_(scale)
    return model.eval()


def make_prompts(batch_size: int, length: int = 9, seed: int = 0, padding: bool = True):
    """Random prompts and their mask; all rows but the first are padded on the left by different amounts."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if padding:
        for row in range(1, batch_size):
            mask[row, : (row * 3) % max(length - 1, 1)] = 0
    return input_ids.masked_fill(mask == 0, 0), mask


@pytest.fixture
def llama():
    return make_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    from cllm_hf.demo.problems import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token a byte, of text without spaces replaced."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_word_model(tokenizer, name: str = "llama"):
    """A random model for the words of the demo's tokenizer. Many tokens stop it, so that some responses end early."""
    return make_model(name, vocab_size=len(tokenizer), eos_token_id=[tokenizer.eos_token_id, *range(40, 50)])


@pytest.fixture
def word_model(tokenizer):
    return make_word_model(tokenizer)


@pytest.fixture
def tiny_shape(monkeypatch):
    """The shape 4m of the benchmarks, made tiny."""
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setitem(shapes.SHAPES, "4m", {**tiny, "vocab_size": VOCAB_SIZE})


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    """A saved model of words, with the defaults of a CLLM."""
    folder = tmp_path / "model"
    model = make_word_model(tokenizer)
    set_jacobi_defaults(model, 8)  # as a CLLM has them
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
