"""
Per-position losses, as pure functions. Which positions count and how they are summed is decided by the caller.

Each divergence takes the model's `logits` at a state and the target's `target_logits` at the fixed point, both of
shape `(num_positions, vocab_size)`, and gives a float32 tensor of shape `(num_positions,)`. `p` is the target's
distribution at a position, and takes no gradient; `q` is the model's. Every divergence is 0 where both agree. Both
logits are divided by `temperature`, and the divergence is multiplied by its square, which keeps the size of the
gradient (arXiv 1503.02531, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def forward_kl(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Forward Kullback-Leibler divergence from the target's distribution, `sum_v p(v) (log p(v) - log q(v))`, in nats.

    It is `-log q(v)` where `p` is sure of `v`, and grows without bound where `q` misses what `p` has. The global
    consistency loss of CLLM (arXiv 2403.00835, section 3.2) takes `p` at the fixed point and `q` at a state of the
    trajectory.
    """
    log_p, log_q = _log_probabilities(logits, target_logits, temperature)
    return temperature**2 * _sum_where(log_p, log_p, log_q)


def reverse_kl(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Reverse Kullback-Leibler divergence, `sum_v q(v) (log q(v) - log p(v))`, in nats.

    It is small where `q` holds to one of several tokens that `p` likes; `q` is punished without bound for what `p`
    rules out.
    """
    log_p, log_q = _log_probabilities(logits, target_logits, temperature)
    return temperature**2 * _sum_where(log_q, log_q, log_p)


def jensen_shannon(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Jensen-Shannon divergence, `KL(p || m) / 2 + KL(q || m) / 2` with `m = (p + q) / 2`, in nats.

    It is `log 2` where both have no token in common; it is symmetric, and bounded (arXiv 2306.13649, section 2, with
    its beta at one half).
    """
    log_p, log_q = _log_probabilities(logits, target_logits, temperature)
    # Where both are 0, `logaddexp` has no gradient, not even one that a factor of 0 takes away.
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_m = torch.logaddexp(log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)) - math.log(2)
    return temperature**2 * (_sum_where(log_p, log_p, log_m) + _sum_where(log_q, log_q, log_m)) / 2


def total_variation(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Total variation distance, `sum_v |p(v) - q(v)| / 2`, between 0 and 1 at temperature 1.

    It is 1 where both have no token in common. One minus it is the chance that a sample of `q` can pass for one of
    `p`: the rate of acceptance of speculative sampling (arXiv 2211.17192, section 3.2). Its gradient is small where
    `q` is far off.
    """
    log_p, log_q = _log_probabilities(logits, target_logits, temperature)
    return temperature**2 * (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def negative_log_acceptance(
    logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """
    Negative logarithm of the rate of acceptance, `-log sum_v min(p(v), q(v))`, in nats.

    It grows where both have less in common. The rate is that of speculative sampling (arXiv 2211.17192, section 3.2);
    its logarithm keeps the gradient of `total_variation` alive where `q` is far off.
    """
    log_p, log_q = _log_probabilities(logits, target_logits, temperature)
    smaller = torch.minimum(log_p, log_q)
    # Where no token is common to both, `logsumexp` has no gradient.
    nothing = smaller.detach().amax(-1, keepdim=True) == -math.inf
    # As a sum of logarithms, which is finite where each of the probabilities rounds to 0.
    log_rate = torch.logsumexp(smaller.masked_fill(nothing, 0), dim=-1)
    return -(temperature**2) * log_rate.masked_fill(nothing[..., 0], -math.inf)


def acceptance_hybrid(logits: torch.Tensor, target_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Forward KL where little is accepted, total variation where much is: `w KL + (1 - w) TV`, `w = exp(-3 a)`.

    `a` is the rate of acceptance, `1 - TV`, without gradient.
    """
    log_p, log_q = _log_probabilities(logits, target_logits, temperature)
    distance = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    weight = torch.exp(-3 * (1 - distance.detach()))
    return temperature**2 * (weight * _sum_where(log_p, log_p, log_q) + (1 - weight) * distance)


DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "acceptance_hybrid": acceptance_hybrid,
}


def ar_cross_entropy(logits: torch.Tensor, token_ids: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """
    Cross entropy of next tokens, `-log q(token)`: the autoregressive (AR) loss that keeps the model's quality.

    With label smoothing `e` the target is `(1 - e)` on the token and `e / vocab_size` on every token.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): the model's.
        token_ids (`torch.LongTensor` of shape `(num_positions,)`): the tokens that follow.
        label_smoothing (`float`): between 0 and 1.

    Returns:
        `torch.Tensor` of shape `(num_positions,)`, float32, in nats.
    """
    return F.cross_entropy(logits.float(), token_ids, reduction="none", label_smoothing=label_smoothing)


def _log_probabilities(
    logits: torch.Tensor, target_logits: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the target, without gradient, and of the model."""
    target_logits, logits = target_logits.detach().float(), logits.float()
    if temperature != 1:  # a large vocabulary makes a division worth leaving out
        target_logits, logits = target_logits / temperature, logits / temperature
    return F.log_softmax(target_logits, dim=-1), F.log_softmax(logits, dim=-1)


def _sum_where(log_weights: torch.Tensor, log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """`sum_v w(v) (log a(v) - log b(v))`, where tokens that `w` rules out add nothing: `0 log 0 = 0`."""
    impossible = log_weights == -math.inf
    difference = log_a.masked_fill(impossible, 0) - log_b.masked_fill(impossible, 0)
    return (log_weights.exp() * difference).sum(-1)
