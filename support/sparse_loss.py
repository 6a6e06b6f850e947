"""The forward KL when all that is left of the teacher is a few tokens drawn from its distribution.

  Draws               what a teacher said of each counted token, in a few numbers
  draw_tokens         K tokens from each distribution, which stand for all of it
  kl_and_gradient_    the derivation: value and gradient of the KL from draws

Say that p = softmax(t / T) is the teacher's distribution, and p^ (p with a hat) the share of each token among
K draws. However small K is, the mean of p^ over all possible draws is p. So whatever is linear in p may take
p^ in its place and is right on average; gradient descent needs no more. The likeliest K tokens, which others
keep, never add up to p, however many steps are made: what is unlikely is lost, and the paper below found that
students of them are too sure of themselves.

Shapes: n counted tokens, K draws, V vocabulary.
Reference: Anshumann et al. 2025, Sparse Logit Sampling (arXiv 2503.16870).
"""
from typing import NamedTuple

import torch


class Draws(NamedTuple):
    """What a teacher said at temperature T: a row for each counted token of a micro-batch, and none for the
    others (whose target is -100), in the order of the tokens."""
    ids: torch.Tensor  # (n, K) int64: the tokens drawn; one that comes twice stands there twice
    weights: torch.Tensor  # (n, K): what each counts; 1 / K for draws
    entropy: torch.Tensor  # (n,): of the teacher's whole distribution at T, in nats
    clm: torch.Tensor  # (n,): -log of what the teacher, at T = 1, gave to the target


def some_rows(answers, rows):
    """Some rows of a teacher's answers, which are logits (n, V), or Draws, or None."""
    if answers is None:
        return None
    if isinstance(answers, Draws):
        return Draws(*(tensor[rows] for tensor in answers))
    return answers[rows]


def draw_tokens(p, offsets, n_draws):
    """Distributions p (n, V), offsets (n, 1) uniform in (0, 1] -> ids (n, K) of K draws from each.

    Say that the probabilities lie side by side and fill the line from 0 to 1. The points u / K, (1 + u) / K,
    (2 + u) / K, ... have one random offset u, and each draws the token on whose piece it lies. For p = 0.5,
    0.3, 0.2, K = 4 and u = 0.1 they are 0.025, 0.275, 0.525 and 0.775, which gives the ids 0, 0, 1, 1.

    A token comes K * p times on average, as if each point were drawn alone. But its count is K * p rounded
    down or up, never further away, so most of the noise that likely tokens would make is gone (systematic
    sampling, Madow and Madow 1944).
    """
    ends = p.cumsum(-1)  # (n, V): where the pieces end; the last one not exactly at 1
    points = (torch.arange(n_draws, device=p.device) + offsets) / n_draws  # (n, K)
    return torch.searchsorted(ends, points * ends[:, -1:])  # the first piece that ends there or later


def kl_and_gradient_(draws, z_s, e_s, sum_s):
    """Draws of n tokens, z_s = s / T (n, V), e_s = exp(z_s), sum_s, its sums (n, 1) -> the KL, a sum, and
    d KL / d z_s (n, V), which is written over e_s: a tensor of that size saved.

    With the student's q = softmax(z_s), and H the entropy of p, for one token

        KL(p || q) = sum p * log(p / q) = -H - sum p * log q

    H is a number on disk; the sum is linear in p, so p^ may stand for p: -sum w_k * log q[id_k], over the
    draws, with weights w_k = 1 / K. Softmax gives d(-log q[v]) / dz = q - onehot(v), and so

        d KL / d z_s = sum w_k * (q - onehot(id_k)) = W * q - p^, where W = sum w_k, for draws 1

    times T in the loss, as in support/chunked_loss.py. The mean over all draws of that is T * (q - p), which
    is the gradient of the whole distribution. The value is right on average, too, and can be below 0.
    """
    log_q = z_s.gather(1, draws.ids) - sum_s.log()  # (n, K)
    kl = -draws.entropy.sum() - (draws.weights * log_q).sum()

    W = draws.weights.sum(-1, keepdim=True)
    return kl, e_s.mul_(W / sum_s).scatter_add_(1, draws.ids, -draws.weights)
