"""Lossless adapters for tests: random ones, whose drafts are hardly ever right, and one that is trained to."""

import copy
import random
from contextlib import contextmanager

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training_runs import DEFAULTS
from transformers import LlamaConfig, LlamaForCausalLM

from cllm_hf import CLLMConfig, CLLMTrainer
from cllm_hf.blocks.drafter import find_drafter
from cllm_hf.decoding.lossless import Draft, LosslessStrategy, Notes
from cllm_hf.demo.problems import make_tokenizer
from cllm_hf.training.inputs import make_lossless_config, prepare_drafter


NUM_MASKS = 6
CYCLE = 16
ATTENTION = r".*(attn|attention)\.(q_proj|k_proj|v_proj|o_proj|c_attn|query_key_value|dense)"


def add_random_adapter(base, num_masks=NUM_MASKS, markov_rank=4, seed=0, size=1.0, target_modules=None, dropout=0.0):
    """
    Put an untrained lossless adapter with large weights on a copy of a model: what the drafter's rows say has nothing
    to do with what the base model says.

    Args:
        base (`transformers.PreTrainedModel`): it is left as it is.
        num_masks (`int`): most tokens that are drafted.
        markov_rank (`int`): of the Markov head.
        seed (`int`): of the weights.
        size (`float`): their standard deviation.
        target_modules (`str` or `list[str]`, *optional*): by default all linear layers.
        dropout (`float`): of the adapter.

    Returns:
        `peft.PeftModel`, in eval mode.
    """
    config = LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, lora_dropout=dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), make_lossless_config(config))
        prepare_drafter(model, num_masks, markov_rank)
        drafter = find_drafter(model.get_base_model())
        for name, weight in model.named_parameters():
            if "lora_B" in name or "following" in name or "masks" in name:
                torch.nn.init.normal_(weight, std=size)
    drafter.to(base.dtype)
    return model.eval()


def make_cycle_model():
    """
    A tiny Llama that has learnt, in seconds, to count round and round: after token `t` of 16 comes the next one.

    Returns:
        `transformers.LlamaForCausalLM`, in eval mode.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = cycle_text(torch.randint(CYCLE, (8, 1)), 48)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def cycle_text(starts, length):
    """Texts that count from given numbers on: `[..., 1]` to `[..., length]`."""
    return 3 + (starts + torch.arange(length)) % CYCLE


def train_adapter(base, folder, max_steps=60, block_size=7):
    """
    Train a lossless adapter on the texts of `make_cycle_model`, which takes some 3 seconds.

    Args:
        base (`transformers.PreTrainedModel`): it is left as it is.
        folder (`pathlib.Path`): where the adapter is saved.
        max_steps (`int`): optimizer steps.
        block_size (`int`): one more than it drafts.

    Returns:
        `CLLMTrainer`.
    """
    texts = [cycle_text(torch.tensor([number % CYCLE]), 56).tolist() for number in range(64)]
    lengths = [3 + number % 5 for number in range(64)]
    records = [
        {"data_id": str(number), "prompt": "", "response": "", "prompt_ids": text[:size], "response_ids": text[size:]}
        for number, (text, size) in enumerate(zip(texts, lengths))
    ]
    options = {
        "lossless": True,
        "block_size": block_size,
        "max_steps": max_steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "drafts_per_response": 10,
        "markov_rank": 4,
        "plot_run": False,
    }
    trainer = CLLMTrainer(
        copy.deepcopy(base),
        args=CLLMConfig(output_dir=str(folder), **{**DEFAULTS, "lr_scheduler_type": "linear", **options}),
        train_dataset=Dataset.from_list(records),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=16, lora_alpha=32),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


def make_tree(known, size, generator):
    """A draft of this many guesses in which the first known tokens are right and stand anywhere, among wrong ones."""
    draft, right, num_right = Draft(), 0, generator.randrange(len(known) + 1)
    while len(draft.token_ids) < size:
        taken = {place: set() for place in range(len(draft.token_ids) + 1)}
        for token, parent in zip(draft.token_ids, draft.parents):
            taken[parent].add(token)
        if num_right and generator.random() < 0.4:
            parent, token = right, known[0]
            known, num_right, right = known[1:], num_right - 1, len(draft.token_ids) + 1
        else:
            parent = generator.randrange(len(draft.token_ids) + 1)
            free = [token for token in range(3, 30) if token not in taken[parent] and token not in known[:1]]
            token = generator.choice(free)
        draft.token_ids.append(token)
        draft.parents.append(parent)
        draft.reached.append(generator.random() / 9)
    return draft


@contextmanager
def knowing(sequences, seed=0, error=0.2, num_candidates=0):
    """
    Have the drafter say what is known to come, with errors here and there: acceptance ends now at one place, now at
    another, which with a random adapter it never does.

    Args:
        sequences (`list[list[int]]`): for each row, its prompt and text as `generate` returns them.
        seed (`int`): of the errors.
        error (`float`): chance of a token to be what the adapter drafts.
        num_candidates (`int`): with them drafts are trees, in which what is right stands anywhere.
    """
    own, generator = LosslessStrategy.draft, random.Random(seed)

    def draft(self, rows, verdicts, logits, guess):
        own(self, rows, verdicts, logits, guess)
        for row in rows:
            if row.notes is not None:
                known = sequences[row.index][row.length :]
                tokens = list(row.notes.draft.token_ids)
                if num_candidates:
                    row.notes = Notes(make_tree(known, len(tokens), generator))
                    continue
                for place, token in enumerate(known[: len(tokens)]):
                    tokens[place] = tokens[place] if generator.random() < error else token
                row.notes = Notes(Draft.chain(tokens, [generator.random() for _ in tokens]))

    LosslessStrategy.draft = draft
    try:
        yield
    finally:
        LosslessStrategy.draft = own
