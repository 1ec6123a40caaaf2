"""Lossless adapters in folders, untrained: random LoRA weights, and drafts that are always right."""

import torch
from conftest import make_model
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import cllm_hf
from cllm_hf.blocks.drafter import find_drafter
from cllm_hf.integration import set_lossless_defaults
from cllm_hf.training.inputs import make_lossless_config, prepare_drafter


NUM_MASKS = 6


def make_chain_model(**changes):
    """A model whose next token depends on the last one alone, so that a Markov head can draft all of its text."""
    model = make_model("llama", **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    return model


def save_base(folder, tokenizer=None, **changes):
    make_chain_model(**changes).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def save_lossless_adapter(folder, base_folder, tokenizer=None, defaults=True):
    """An adapter whose LoRA weights are large and random, and whose Markov head knows what the base says next."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    vocab_size = base.config.vocab_size
    following = base(torch.arange(vocab_size)[:, None]).logits[:, -1].argmax(-1)
    model = get_peft_model(base, make_lossless_config(None))
    prepare_drafter(model, NUM_MASKS, vocab_size)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    drafter = find_drafter(base)
    drafter.previous.weight.copy_(torch.eye(vocab_size))
    drafter.following.weight.zero_()
    drafter.following.weight[following, torch.arange(vocab_size)] = 1000.0
    model.save_pretrained(folder)
    drafter.save(folder)
    if defaults:
        set_lossless_defaults(model, NUM_MASKS + 1)
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def decode(model, input_ids, **options):
    """The text of `generate`, and its statistics, which plain decoding does not have."""
    options = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True, **options}
    output = model.generate(input_ids=input_ids, **options)
    return output.sequences.tolist(), output.jacobi_stats if isinstance(output, cllm_hf.JacobiOutput) else None
