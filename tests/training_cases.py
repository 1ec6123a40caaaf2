"""Records made by hand, batches of them, and the training losses by plain, unpacked forward passes."""

import math

import numpy as np
import torch
from conftest import VOCAB_SIZE

from cllm_hf import CLLMConfig
from cllm_hf.training.batch import make_collator
from cllm_hf.training.objective import ConsistencyObjective


BLOCK_SIZE = 5


def make_record(prompt_length, response_length, seed=0, num_states=4, block_size=BLOCK_SIZE, pad=0):
    """A trajectory in which a draft of random tokens gets right from the front, with chance hits after."""
    rng = np.random.default_rng([seed, prompt_length, response_length])

    def tokens(length):
        return rng.integers(3, VOCAB_SIZE, length).tolist()

    response, states = tokens(response_length), []
    for start in range(0, response_length, block_size):
        fixed_point = response[start : start + block_size]
        length = len(fixed_point)
        num_right = sorted(rng.integers(0, block_size, num_states - 1).tolist())
        block = []
        for count in num_right:
            state = fixed_point[:count] + tokens(max(length - count, 0))
            state = [right if rng.random() < 0.3 else token for token, right in zip(state, fixed_point)]
            block.append(state + [pad] * (block_size - length))
        states.append([*block, fixed_point + [pad] * (block_size - length)])
    return {
        "data_id": str(seed),
        "prompt_ids": tokens(prompt_length),
        "response_ids": response,
        "states": states,
        "label_ids": tokens(int(rng.integers(1, 9))),
    }


def make_records(block_size=BLOCK_SIZE):
    """Responses of one token, of one block and a bit, and of two whole blocks and a bit."""
    return [make_record(prompt, response, block_size=block_size) for prompt, response in ((6, 7), (3, 1), (4, 13))]


def make_config(**options):
    return CLLMConfig(output_dir="unused", bf16=False, use_cpu=True, **options)


def prepare(model, records, update=1, progress=0.0, base_model=None, block_size=BLOCK_SIZE, **options):
    """What an optimizer step with these options trains on, and its objective."""
    config = make_config(**options)
    batch = make_collator(config, block_size).collate(records)
    objective = ConsistencyObjective(config, block_size)
    return objective.prepare(model, base_model or model, batch, update, progress), objective


def slow_divergence(name, p, q, frozen=None):
    """
    By the definitions, over Python floats. The weight of the hybrid, which takes no gradient, is that of the pair
    `frozen` of distributions, by default of `p` and `q`.
    """

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jensen_shannon":
        middle = [(x + y) / 2 for x, y in zip(p, q)]
        return (kl(p, middle) + kl(q, middle)) / 2
    if name == "negative_log_acceptance":
        return -math.log(sum(map(min, p, q)))
    if name == "acceptance_hybrid":
        weight = math.exp(-3 * sum(map(min, *(frozen or (p, q)))))
        return weight * kl(p, q) + (1 - weight) * slow_divergence("total_variation", p, q)
    assert name == "total_variation"
    return sum(abs(x - y) for x, y in zip(p, q)) / 2


def torch_divergence(name, target_logits, logits, temperature):
    """The same with a gradient, for distributions without zeros."""
    p, q = (target_logits.detach() / temperature).softmax(-1), (logits / temperature).softmax(-1)
    middle = (p + q) / 2
    accepted = torch.minimum(p, q).sum()
    weight = (-3 * accepted.detach()).exp()
    return (
        temperature**2
        * {
            "negative_log_acceptance": lambda: -accepted.log(),
            "acceptance_hybrid": lambda: weight * (p * (p / q).log()).sum() + (1 - weight) * (p - q).abs().sum() / 2,
            "forward_kl": lambda: (p * (p / q).log()).sum(),
            "reverse_kl": lambda: (q * (q / p).log()).sum(),
            "jensen_shannon": lambda: ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
            "total_variation": lambda: (p - q).abs().sum() / 2,
        }[name]()
    )


def reference_losses(model, prepared, objective):
    """
    One plain forward pass for every sequence, answer and block, batch size 1, and Python loops over positions.

    Returns sums of both losses, the sum of the consistency weights and the number of AR positions.
    """
    batch, blocks, config = prepared.batch, prepared.blocks, objective.config
    consistency, ar, weight_sum, num_ar = 0.0, 0.0, 0.0, 0

    def logits_of(ids):
        return model(ids[None]).logits[0]

    for row in range(len(batch.clean_ids)):
        sequence = batch.clean_ids[row, : int(batch.clean_mask[row].sum())]
        start = int(batch.prompt_lengths[row])
        clean, answer, answer_logits = logits_of(sequence), sequence[start:], None
        if batch.label_ids is not None:
            answer = batch.label_ids[row, : int(batch.label_lengths[row])]
            answer_logits = logits_of(torch.cat([sequence[:start], answer]))
        for i, token in enumerate(answer):
            log_q = (clean if answer_logits is None else answer_logits)[start - 1 + i].log_softmax(-1)
            ar = ar - (1 - config.ar_label_smoothing) * log_q[token] - config.ar_label_smoothing * log_q.mean()
            num_ar += 1
        for block in blocks.mask[row].nonzero()[:, 0].tolist():
            first = start + int(blocks.offsets[row, block])
            state = blocks.states[row, block]
            logits = logits_of(torch.cat([sequence[:first], state[:-1]]))[first - 1 :]
            targets, right = clean[first - 1 :], sequence[first : first + len(state)].tolist()
            if blocks.successors is not None:
                successor = blocks.successors[row, block]
                targets = logits_of(torch.cat([sequence[:first], successor[:-1]]))[first - 1 :]
                right = successor[: len(right)].tolist()
            place = 0
            for i in range(1, len(right)):
                if state[:i].tolist() != right[:i]:
                    weight = 1.0 if config.position_decay is None else math.exp(-place / config.position_decay)
                    distance = torch_divergence(
                        config.divergence, targets[i], logits[i], config.divergence_temperature
                    )
                    consistency, weight_sum, place = consistency + weight * distance, weight_sum + weight, place + 1
    return consistency, ar, weight_sum, num_ar


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
