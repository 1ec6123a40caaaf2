"""Per-position losses, as pure functions. Which positions count and how they are summed is decided by the caller."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward_kl(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """
    Forward Kullback-Leibler divergence from the target's distribution, `sum_v p(v) (log p(v) - log q(v))`.

    `p` is the target's, and takes no gradient; `q` is the model's. It is 0 where both agree, `-log q(v)` where `p` is
    sure of `v`, and grows without bound where `q` misses what `p` has. The global consistency loss of CLLM
    (arXiv 2403.00835, section 3.2) takes `p` at the fixed point and `q` at a state of the trajectory.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): the model's, at a state.
        target_logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): the target's, at the fixed point.

    Returns:
        `torch.Tensor` of shape `(num_positions,)`, float32, in nats.
    """
    log_p = F.log_softmax(target_logits.detach().float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    # Tokens that the target rules out (a logit of minus infinity) add nothing: `0 log 0 = 0`.
    impossible = p == 0
    return (p * (log_p.masked_fill(impossible, 0) - log_q.masked_fill(impossible, 0))).sum(-1)


def ar_cross_entropy(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy of next tokens, `-log q(token)`: the autoregressive (AR) loss that keeps the model's quality.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, vocab_size)`): the model's.
        token_ids (`torch.LongTensor` of shape `(num_positions,)`): the tokens that follow.

    Returns:
        `torch.Tensor` of shape `(num_positions,)`, float32, in nats.
    """
    return F.cross_entropy(logits.float(), token_ids, reduction="none")
