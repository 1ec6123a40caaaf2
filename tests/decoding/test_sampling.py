"""Sampling by Jacobi decoding: exact samples of the model, the same for every block size."""

import pytest
import torch
from conftest import make_model, make_prompts

import cllm_hf
from cllm_hf.decoding.sampling import GumbelNoise


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1, "temperature": 1.5},
    {"typical_p": 0.9},
    {"repetition_penalty": 1.3, "temperature": 0.8},
    {"no_repeat_ngram_size": 2},
]


def one_at_a_time(model, input_ids, mask, seed, num_tokens, **options):
    """Slow reference: plain forward passes over the whole text, and the host's own processors of these options."""
    from transformers import GenerationConfig

    processors = model._get_logits_processor(
        GenerationConfig(do_sample=True, num_beams=1, **{"top_k": 0, **options}), input_ids.shape[1], input_ids, None
    )
    noise = GumbelNoise(seed, input_ids.shape[0])
    for _ in range(num_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()
        scores = processors(input_ids, logits)
        tokens = (scores + noise.at(input_ids.shape[1], scores)).argmax(-1)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(tokens)[:, None]], dim=1)
    return input_ids


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equal_to_one_at_a_time_for_every_block_size(options, batch_size):
    model = make_model("llama", scale=2.0)
    input_ids, mask = make_prompts(batch_size)
    expected = one_at_a_time(model, input_ids, mask, 11, 20, **options)
    for block_size in (1, 2, 5, 16, "auto"):
        output = model.generate(
            input_ids,
            attention_mask=mask,
            do_sample=True,
            max_new_tokens=20,
            jacobi_block_size=block_size,
            jacobi_seed=11,
            return_dict_in_generate=True,
            **{"top_k": 0, **options},  # the host's default is 50
        )
        assert output.sequences.tolist() == expected.tolist()
        assert output.jacobi_stats.num_forwards <= 20


def test_seeds():
    model = make_model("llama", scale=1.0)
    input_ids, _ = make_prompts(1)

    def sample(**options):
        options = {"do_sample": True, "max_new_tokens": 20, "decoding": "jacobi", **options}
        return model.generate(input_ids, **options).tolist()

    assert sample(jacobi_seed=1) == sample(jacobi_seed=1) != sample(jacobi_seed=2)
    torch.manual_seed(5)
    first = sample()
    assert first != sample()
    torch.manual_seed(5)
    assert first == sample()
    with pytest.raises(ValueError, match="`jacobi_seed`"):
        sample(do_sample=False, jacobi_seed=1)
    for seed in (-1, 1.5, True, 2**63):
        with pytest.raises(ValueError, match="`jacobi_seed`"):
            sample(jacobi_seed=seed)


def test_return_sequences_are_different_samples():
    model = make_model("llama", scale=1.0)
    input_ids, mask = make_prompts(2)
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3, "jacobi_seed": 3}
    outputs = [
        model.generate(input_ids, attention_mask=mask, jacobi_block_size=block_size, **options).tolist()
        for block_size in (1, 7)
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == len({tuple(row) for row in outputs[0]}) == 6


def test_finished_rows_leave_and_the_others_stay_the_same():
    model = make_model("llama", scale=1.0)
    input_ids, mask = make_prompts(4)
    options = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 30, "jacobi_seed": 3}
    sequences = [
        model.generate(input_ids, **options, jacobi_block_size=block_size, eos_token_id=list(range(10, 14)))
        for block_size in (1, 3, 16)
    ]
    assert sequences[0].tolist() == sequences[1].tolist() == sequences[2].tolist()
    unstopped = model.generate(input_ids, **options, jacobi_block_size=4)
    for row in range(4):
        stop = next((i for i in range(9, 39) if unstopped[row, i] in range(10, 14)), 38)
        assert sequences[0][row, : stop + 1].tolist() == unstopped[row, : stop + 1].tolist()


def test_saved_defaults_allow_sampling(llama):
    cllm_hf.set_jacobi_defaults(llama)
    output = llama.generate(make_prompts(1)[0], do_sample=True, max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(output, cllm_hf.JacobiOutput)


def exact_distribution(model, prompt, vocab_size, **options):
    """Probability of every pair of next tokens, from plain forward passes."""
    from transformers import GenerationConfig

    processors = model._get_logits_processor(
        GenerationConfig(do_sample=True, num_beams=1, **options), prompt.shape[1], prompt, None
    )

    def distribution(ids):
        return processors(ids, model(ids).logits[:, -1].float()).double().softmax(-1)

    first = distribution(prompt)[0]
    texts = torch.cat([prompt.expand(vocab_size, -1), torch.arange(vocab_size)[:, None]], dim=1)
    return first[:, None] * distribution(texts)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 5}, {"top_p": 0.8}, {"min_p": 0.15}], ids=str)
def test_chi_square_against_the_exact_distribution(options):
    """120,000 samples of two tokens, against the probabilities of all pairs; fails one time in a million by chance."""
    vocab_size, num_samples = 8, 120_000
    model = make_model("llama", scale=3.0, vocab_size=vocab_size)
    prompt = torch.tensor([[3, 5, 4, 7]])
    expected = exact_distribution(model, prompt, vocab_size, **options).flatten() * num_samples
    counts = torch.zeros(vocab_size**2, dtype=torch.double)
    for seed in range(12):
        sequences = model.generate(
            prompt,
            do_sample=True,
            max_new_tokens=2,
            num_return_sequences=num_samples // 12,
            jacobi_block_size=2,
            jacobi_seed=seed,
            **{"top_k": 0, **options},
        )
        pairs = sequences[:, 4] * vocab_size + sequences[:, 5]
        counts += torch.bincount(pairs, minlength=vocab_size**2)
    assert counts.sum() == num_samples
    assert counts[expected == 0].sum() == 0
    # Pairs that are too rare for the approximation by a chi-square distribution count as one.
    rare = expected < 10
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 5], wanted[wanted > 5]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor(len(wanted) - 1, dtype=torch.double)
    p_value = torch.special.gammaincc(degrees / 2, statistic / 2).item()
    assert len(wanted) > 8
    assert p_value > 1e-6


def test_noise_belongs_to_its_position_in_whatever_order_it_is_drawn(monkeypatch):
    like = torch.zeros(2, 3, 7)
    block = GumbelNoise(4, 5).at_places([1, 3], [[10, 11, 12], [12, 13, 14]], like)
    monkeypatch.setattr("cllm_hf.decoding.sampling._KEPT_BYTES", 0)  # has everything drawn again
    again = GumbelNoise(4, 5)
    for position in reversed(range(10, 15)):
        vector = again.at(position, like[0])
        assert vector.shape == (5, 7)
        if position < 13:
            assert torch.equal(block[0, position - 10], vector[1])
        if position >= 12:
            assert torch.equal(block[1, position - 12], vector[3])


def test_noise_of_different_positions_and_seeds_is_nothing_alike():
    """Neighbors would otherwise be seeded alike, which shows in a generator like Mersenne Twister."""
    vectors = torch.stack(
        [GumbelNoise(seed, 1).at(position, torch.zeros(2000))[0] for seed in range(6) for position in range(6)]
    )
    correlations = torch.corrcoef(vectors) - torch.eye(36)
    assert correlations.abs().max() < 0.12  # 5 standard deviations
    assert vectors.mean().item() == pytest.approx(0.5772, abs=0.03)  # Euler's constant


def test_all_bits_of_a_seed_count():
    """On a CPU too, where torch's own generator reads 32 bits."""
    like = torch.zeros(1, 500)
    noise = GumbelNoise(5, 2)
    found = [GumbelNoise(seed, 1).at(3, like) for seed in (5, 5 + 2**32, 5 + 2**62)]
    assert not any(torch.equal(one, other) for one in found for other in found if one is not other)
    assert torch.equal(found[0], GumbelNoise(5, 1).at(3, like))
    # Positions and rows have noise of their own, of a Gumbel distribution.
    assert not torch.equal(noise.at(3, like), noise.at(4, like)) and not torch.equal(*noise.at(3, like))
    drawn = GumbelNoise(5, 100).at(0, like)
    assert drawn.isfinite().all()
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.02) and drawn.var().item() == pytest.approx(
        1.645, abs=0.05
    )
