"""Losses against the definitions in float64, their limits, and their gradients against finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import slow_divergence

from cllm_hf.training.losses import (
    DIVERGENCES,
    acceptance_hybrid,
    ar_cross_entropy,
    forward_kl,
    jensen_shannon,
    negative_log_acceptance,
    reverse_kl,
    total_variation,
)


INF = math.inf
by_name = pytest.mark.parametrize("name", DIVERGENCES)
logit_rows = st.integers(2, 7).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-30, 30, width=32), min_size=size, max_size=size)] * 2)
)


def softmax(logits, temperature=1.0):
    weights = [math.exp(float(logit) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def reference(name, logits, target_logits, temperature=1.0, frozen_logits=None):
    """What takes no gradient is computed of `frozen_logits` in place of `logits`, if they are given."""
    p, q = softmax(target_logits, temperature), softmax(logits, temperature)
    frozen = None if frozen_logits is None else (p, softmax(frozen_logits, temperature))
    return temperature**2 * slow_divergence(name, p, q, frozen)


def make_logits(num_positions=6, vocab_size=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, num_positions, vocab_size, generator=generator)).unbind()


@by_name
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_values_are_those_of_the_definition(name, temperature):
    logits, target = make_logits()
    expected = [reference(name, *rows, temperature) for rows in zip(logits.tolist(), target.tolist())]
    torch.testing.assert_close(DIVERGENCES[name](logits, target, temperature), torch.tensor(expected))


@by_name
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradients_are_the_differences_of_the_definition(name, temperature):
    """Central differences in float64: those of the function itself, in float32, would be mostly rounding."""
    logits, target = make_logits(num_positions=3, vocab_size=6)
    logits.requires_grad_()
    DIVERGENCES[name](logits, target, temperature).sum().backward()
    step = 1e-5
    for row in range(len(logits)):
        for token in range(logits.shape[1]):
            up, down = logits[row].tolist(), logits[row].tolist()
            up[token], down[token] = up[token] + step, down[token] - step
            rows = target[row].tolist(), temperature, logits[row].tolist()
            sides = [reference(name, side, *rows) for side in (up, down)]
            assert logits.grad[row, token].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-5)


@by_name
def test_the_target_takes_no_gradient(name):
    logits, target = make_logits()
    logits.requires_grad_(), target.requires_grad_()
    DIVERGENCES[name](logits, target).sum().backward()
    assert target.grad is None and logits.grad.abs().sum() > 0


@by_name
def test_equal_distributions_are_at_distance_0_without_gradient(name):
    logits, _ = make_logits()
    logits.requires_grad_()
    loss = DIVERGENCES[name](logits, logits.detach() + 5.0, temperature=2.0)  # a shift of all logits changes nothing
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros(6), atol=1e-5, rtol=0)
    # Of what is made of `|p - q|` or `min(p, q)` the gradient is not continuous here; rounding decides on each term.
    if name not in ("total_variation", "negative_log_acceptance", "acceptance_hybrid"):
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("off", [-200.0, -INF])
@pytest.mark.parametrize(("name", "bound"), [("jensen_shannon", math.log(2)), ("total_variation", 1.0)])
def test_bounded_distances_reach_their_bound_where_no_token_is_common(name, bound, off):
    logits = torch.tensor([[0.0, 1.0, off, off]], requires_grad=True)
    target = torch.tensor([[off, off, 2.0, 0.0]])
    loss = DIVERGENCES[name](logits, target, temperature=2.0)
    torch.testing.assert_close(loss, torch.tensor([4 * bound]))
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_certain_distributions_leave_the_log_probability_of_one_token():
    uncertain, certain = torch.tensor([[1.0, 0.0, -2.0]], requires_grad=True), torch.tensor([[-INF, 0.0, -INF]])
    expected = -uncertain.log_softmax(-1)[:, 1]
    torch.testing.assert_close(forward_kl(uncertain, certain), expected)
    (gradient,) = torch.autograd.grad(forward_kl(uncertain, certain).sum(), uncertain)
    torch.testing.assert_close(gradient, uncertain.softmax(-1) - torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(reverse_kl(certain, uncertain.detach()), expected)


def test_what_a_model_rules_out_and_its_target_has_is_infinitely_far():
    some, others = torch.tensor([[0.0, -INF, 0.0]]), torch.zeros(1, 3)
    assert forward_kl(some, others).item() == INF and reverse_kl(others, some).item() == INF
    assert forward_kl(others, some).isfinite().all() and reverse_kl(some, others).isfinite().all()
    assert acceptance_hybrid(some, others).item() == INF and acceptance_hybrid(others, some).isfinite().all()
    # Of three tokens that are all as likely, two are left.
    for pair in ((some, others), (others, some)):
        torch.testing.assert_close(negative_log_acceptance(*pair), torch.tensor([math.log(3 / 2)]))


def test_nothing_is_accepted_where_no_token_is_common():
    """That position is infinitely far, and the others keep their gradients."""
    logits = torch.tensor([[0.0, 1.0, -INF, -INF], [0.0, 1.0, 2.0, -INF]], requires_grad=True)
    target = torch.tensor([[-INF, -INF, 2.0, 0.0], [2.0, 1.0, 0.0, -INF]])
    loss = negative_log_acceptance(logits, target)
    loss.sum().backward()
    assert loss[0].item() == INF and loss[1].isfinite()
    alone = logits[1:].detach().requires_grad_()
    negative_log_acceptance(alone, target[1:]).sum().backward()
    torch.testing.assert_close(logits.grad, torch.cat([torch.zeros(1, 4), alone.grad]))


@pytest.mark.parametrize("off", [-30.0, -200.0, -2000.0])
def test_the_logarithm_of_acceptance_keeps_its_gradient_where_probabilities_round_to_0(off):
    logits = torch.tensor([[0.0, 1.0, off, off]], requires_grad=True)
    target = torch.tensor([[off, off, 1.0, 0.0]])
    for divergence, is_alive in ((negative_log_acceptance, True), (total_variation, off > -100)):
        (gradient,) = torch.autograd.grad(divergence(logits, target).sum(), logits)
        assert (gradient.abs().sum().item() > 1e-20) == is_alive
    assert negative_log_acceptance(logits, target).item() == pytest.approx(-off, abs=2)


@by_name
def test_tokens_that_both_rule_out_do_not_count(name):
    """Models that pad their vocabulary give `-inf` there."""
    logits, target = make_logits(num_positions=4, vocab_size=6)
    padding = torch.full((4, 3), -INF)
    narrow, wide = logits.clone().requires_grad_(), torch.cat([logits, padding], dim=1).requires_grad_()
    expected = DIVERGENCES[name](narrow, target)
    loss = DIVERGENCES[name](wide, torch.cat([target, padding], dim=1))
    torch.testing.assert_close(loss, expected)
    expected.sum().backward()
    loss.sum().backward()
    torch.testing.assert_close(wide.grad, torch.cat([narrow.grad, torch.zeros_like(padding)], dim=1))


@by_name
def test_extreme_logits_give_finite_gradients(name):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    loss = DIVERGENCES[name](logits, logits.detach().flip(0))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


@by_name
def test_temperature_leads_to_the_spread_of_the_logits(name):
    """
    With `d` the difference of the logits, `T^2` times the divergence goes to `var(d) / 2`, an eighth of it for
    Jensen-Shannon, over tokens that all count the same; the total variation times `T` to `mean |d - mean d| / 2`.
    """
    logits, target = make_logits()
    difference, temperature = logits - target, 300.0
    variance = difference.var(-1, correction=0)
    spread = temperature * (difference - difference.mean(-1, keepdim=True)).abs().mean(-1) / 2
    expected = {
        "forward_kl": variance / 2,
        "reverse_kl": variance / 2,
        "jensen_shannon": variance / 8,
        "total_variation": spread,
        "negative_log_acceptance": spread,  # `-log(1 - x)` is `x` for small ones
        "acceptance_hybrid": math.exp(-3) * variance / 2 + (1 - math.exp(-3)) * spread,
    }[name]
    torch.testing.assert_close(DIVERGENCES[name](logits, target, temperature), expected, rtol=0.05, atol=0.05)


@by_name
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows=logit_rows)
def test_divergences_are_no_less_than_0_and_within_their_bounds(name, rows):
    logits, target = (torch.tensor([row]) for row in rows)
    value = DIVERGENCES[name](logits, target).item()
    bound = {"jensen_shannon": math.log(2), "total_variation": 1.0}.get(name, INF)
    assert -1e-5 <= value <= bound + 1e-5
    assert value == pytest.approx(reference(name, logits[0].tolist(), target[0].tolist()), abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("name", ["jensen_shannon", "total_variation"])
def test_symmetric_distances(name):
    logits, target = make_logits()
    torch.testing.assert_close(DIVERGENCES[name](logits, target), DIVERGENCES[name](target, logits))
    assert (forward_kl(logits, target) - forward_kl(target, logits)).abs().max() > 0.1
    torch.testing.assert_close(forward_kl(logits, target), reverse_kl(target, logits))


@by_name
def test_half_precision_is_computed_in_float32(name):
    logits, target = (rows.bfloat16() for rows in make_logits())
    loss = DIVERGENCES[name](logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, DIVERGENCES[name](logits.float(), target.float()))
    assert ar_cross_entropy(logits, torch.zeros(6, dtype=torch.long)).dtype == torch.float32


@by_name
def test_no_positions_give_no_losses(name):
    nothing = torch.zeros(0, 9, requires_grad=True)
    loss = DIVERGENCES[name](nothing, nothing)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert ar_cross_entropy(nothing, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_ar_cross_entropy_is_the_formula(smoothing):
    logits, _ = make_logits(num_positions=5, vocab_size=7)
    tokens = torch.tensor([0, 6, 3, 3, 1])
    expected = []
    for row, token in zip(logits.tolist(), tokens.tolist()):
        q = softmax(row)
        target = [smoothing / len(q) + (1 - smoothing) * (v == token) for v in range(len(q))]
        expected.append(-sum(share * math.log(probability) for share, probability in zip(target, q)))
    torch.testing.assert_close(ar_cross_entropy(logits, tokens, smoothing), torch.tensor(expected))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_acceptance_is_what_total_variation_leaves(temperature):
    logits, target = make_logits(num_positions=50)
    distance = total_variation(logits, target, temperature) / temperature**2
    logarithm = negative_log_acceptance(logits, target, temperature) / temperature**2
    torch.testing.assert_close(distance, -torch.expm1(-logarithm))
    hybrid = acceptance_hybrid(logits, target, temperature) / temperature**2
    divergence = forward_kl(logits, target, temperature) / temperature**2
    weight = (hybrid - distance) / (divergence - distance)
    torch.testing.assert_close(weight, torch.exp(-3 * torch.exp(-logarithm)), atol=1e-3, rtol=1e-3)


def test_jensen_shannon_lies_between_its_bounds_by_total_variation():
    """Pinsker's inequality and its reverse, `TV^2 / 2 <= JS <= TV log 2`: two functions that share no code path."""
    logits, target = make_logits(num_positions=50)
    distance = DIVERGENCES["total_variation"](logits, target)
    divergence = jensen_shannon(logits, target)
    assert (distance**2 / 2 <= divergence + 1e-6).all() and (divergence <= distance * math.log(2) + 1e-6).all()
