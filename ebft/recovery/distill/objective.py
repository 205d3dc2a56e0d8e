"""What the whole model is tuned by: the dense model's predictions, and the text itself.

At every place, with p the dense model's probabilities, S its likeliest tokens, q those of the pruned model and y the
token that follows,

    KL  = sum over i in S of p_i log(p_i / q_i)  +  p_rest log(p_rest / q_rest)       (the rest taken as one token)
    CE  = - log q_y
    loss = (1 - share) KL + share CE,      in the mean over places

whose gradient by the logits is  q - (1 - share) p' - share e_y,  where p' is p in S and p_rest q / q_rest elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Losses(NamedTuple):
    """Of every place, (places,), nats."""

    kl: Tensor
    ce: Tensor


@torch.no_grad()
def losses_of(logits: Tensor, tokens: Tensor, logarithms: Tensor, following: Tensor) -> Losses:
    """KL and CE.

    Args:
        logits: (places, vocabulary), float32.
        tokens: (places, k), int64, the dense model's likeliest.
        logarithms: (places, k + 1), float32: its log-probabilities of them, and of the rest.
        following: (places,), int64: the tokens of the text.
    """
    normaliser = logits.logsumexp(-1, keepdim=True)
    return _losses(logits, normaliser, tokens, logarithms, following)


@torch.no_grad()
def losses_and_gradient_(
    logits: Tensor, tokens: Tensor, logarithms: Tensor, following: Tensor, share: float
) -> tuple[Losses, Tensor]:
    """The same, and the gradient of the *sum* of the loss by the logits, which takes their place in memory."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    losses = _losses(logits, normaliser, tokens, logarithms, following)
    inside = (logits.gather(-1, tokens) - normaliser).exp()
    p, rest = logarithms[:, :-1].exp(), logarithms[:, -1:].exp()
    of_rest = (1 - share) * rest / _rest(inside)
    gradient = logits.sub_(normaliser).exp_().mul_(1 - of_rest)
    gradient.scatter_add_(-1, tokens, inside * of_rest - (1 - share) * p)
    gradient.scatter_add_(-1, following[:, None], torch.full_like(normaliser, -share))
    return losses, gradient


def _losses(logits: Tensor, normaliser: Tensor, tokens: Tensor, logarithms: Tensor, following: Tensor) -> Losses:
    inside = logits.gather(-1, tokens) - normaliser
    q = torch.cat([inside, _rest(inside.exp()).log()], -1)
    kl = (logarithms.exp() * (logarithms - q)).sum(-1)
    ce = (normaliser - logits.gather(-1, following[:, None])).squeeze(-1)
    return Losses(kl, ce)


def _rest(inside: Tensor) -> Tensor:
    """1 less the sum of the probabilities (..., k), never quite 0."""
    return (1 - inside.sum(-1, keepdim=True)).clamp(min=1e-6)
