"""Experience: what a policy learns from in one iteration.

PPO makes its own data. Each iteration lets the policy answer prompts, has the answers judged, and turns what came out
into an advantage and a return for every token. From these the policy learns for a few steps; then they are thrown
away, for they say how good this policy's choices were, and nothing about the next one's.

    score_pieces    -> log-probabilities and values as they are now, the "old" ones of the ratio
    make_experience -> rewards, advantages and returns of all tokens
    minibatch_order -> in which order they are learned from

    python part8_ppo/lesson4_loop.py     # these stations with tensors and shapes

Shapes: B rows of this process, T tokens of the longest answer.

References: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 5; Stiennon et al. 2020, "Learning
to summarize from human feedback", section 3.4; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"
(the usual values of most settings, and a penalty for not ending).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import UserError
from devices import sum_over_processes
from policy import Policy, encode
from ppo import gae, kl_estimate, shape_rewards
from rollout import Rollout, places_of, score_tokens


@dataclass
class PPOConfig:
    """Settings of PPO, for the command line of train.py."""

    critic: bool = False
    """Give the values a trunk of their own, instead of a head on the policy's."""
    surprise: bool = True
    """Tell the value head how surprising an answer has been so far, see policy.surprise_so_far."""
    fit_values: bool = True
    """Fit the value head to the last answers by least squares, before each iteration; if not, it begins at 0."""
    rollouts: int = 256
    """B, prompts that a process answers in an iteration."""
    minibatches: int = 1
    """Optimizer steps that they are shared out over, in each epoch."""
    accumulate: int = 4
    """Pieces of a minibatch whose gradients are added up for one step."""
    epochs: int = 3
    """How often an iteration goes through its answers."""
    temperature: float = 1.0
    """At which answers are drawn and all probabilities are taken. 1: what the model believes."""
    max_new_tokens: int = 192
    """Tokens of an answer at most."""
    norm_prompts: int = 256
    """Training prompts that the base answers first, so that its rewards have mean 0 and variance 1."""
    gamma: float = 1.0
    """Discount per token. 1: the end counts as much for the first token as for the last."""
    lam: float = 0.9
    """Lambda of the advantages. 0 trusts the values, 1 trusts what came in the end."""
    ratio_clip: float = 0.2
    """How far the ratio of a token's probabilities is pushed away from 1. inf: as far as it goes."""
    value_clip: float = 0.2
    """How far a value is pushed in an iteration. 0: as far as it goes."""
    value_weight: float = 0.1
    """Of the value loss."""
    entropy_weight: float = 0.0
    """Of the entropy, which is then kept up."""
    beta: float = 0.1
    """Weight of the KL to the reference in the reward: so many standard deviations of the reward does a nat cost."""
    kl_target: float = 0.0
    """Nats per answer that beta is adapted to. 0: beta stays as it is."""
    kl_horizon: float = 10_000.0
    """In about how many answers it is adapted."""
    stop_kl: float = 0.1
    """KL to the policy that wrote the answers, nats per token, above which an iteration ends before the next step."""
    answer_kl: float = math.inf
    """Nats away from the reference after which the rest of an answer is not learned from, see cut_answers."""
    reward_clip: float = 3.0
    """Standard deviations that a reward counts at most, up or down. inf: whatever it is."""
    end_penalty: float = 1.0
    """Taken from the reward of an answer that has no end, in standard deviations."""

    def check(self) -> None:
        """Refuse settings with which no training is possible.

        Raises:
            UserError: it names the flag, its value and what to give instead.
        """
        counts = ("rollouts", "minibatches", "accumulate", "epochs", "max_new_tokens", "norm_prompts")
        weights = ("value_clip", "value_weight", "entropy_weight", "beta", "kl_target", "end_penalty")
        for name, least in (dict.fromkeys(counts, 1) | dict.fromkeys(weights, 0)).items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)} is not {least} or more; give {least} or more")
        for name in ("temperature", "ratio_clip", "reward_clip", "kl_horizon", "stop_kl", "answer_kl"):
            if not getattr(self, name) > 0 or (name == "temperature" and self.temperature == math.inf):
                raise UserError(f"--{name} {getattr(self, name)} is not above 0; leave it out for the usual value")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)} is outside [0, 1]; 1 discounts nothing")
        pieces = self.minibatches * self.accumulate
        if self.rollouts % pieces:
            raise UserError(
                f"--rollouts {self.rollouts} cannot be shared out over {self.minibatches} minibatches of "
                f"{self.accumulate} pieces; give a multiple of {pieces}"
            )
        if self.kl_target and not self.beta:
            raise UserError(f"--kl_target {self.kl_target} with --beta 0: 0 can only be multiplied to 0; give a --beta")


# --- in pieces ---


def split_rows(n: int, minibatches: int, accumulate: int, device: torch.device) -> list[torch.Tensor]:
    """Share n rows out over minibatches, (minibatches, n / minibatches): the m-th gets rows m, m + minibatches, ...

    In this order, the m-th minibatches of all processes are together the m-th one of a process that has all their rows.
    Each minibatch is later cut into `accumulate` pieces, in which the gradients are added up.
    """
    if n % (minibatches * accumulate):
        raise ValueError(f"{n} rows cannot be shared out over {minibatches} minibatches of {accumulate} pieces")
    return list(torch.arange(n, device=device).view(-1, minibatches).T.contiguous())


@torch.no_grad()
def score_pieces(
    model: nn.Module, rollout: Rollout, pieces: Sequence[torch.Tensor], temperature: float, with_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score a rollout piece by piece, without gradients.

    A product of matrices of another shape may add up in another order. So for the ratio to be exactly 1, the old
    log-probabilities are taken in the very pieces in which the policy will learn.

    Args:
        model: a Policy, or what wraps one. It is left in the mode, training or evaluation, that it was in.
        rollout: B rows.
        pieces: numbers of rows, each row in one of them.
        temperature: at which they were drawn.
        with_entropy: whether somebody looks at the entropy.

    Returns:
        Log-probabilities, values and entropies, (B, T) each; 0 where nobody looks.
    """
    training = model.training
    model.eval()
    found = [torch.zeros(rollout.mask.shape, device=rollout.mask.device) for _ in range(3)]
    for rows in pieces:
        scores = score_tokens(model, rollout.rows(rows), temperature, with_entropy)
        for whole, part in zip(found, scores[: 2 + with_entropy], strict=False):
            whole[rows] = part
    model.train(training)
    return found[0], found[1], found[2]


@torch.no_grad()
def fit_values(
    policy: Policy, rollout: Rollout, wanted: torch.Tensor, batch_size: int, shared: bool, ridge: float = 10.0
) -> None:
    """Let the value head say what came of the states of some answers, as well as a line can: least squares.

    A value head of zeros explains nothing, so each token of an answer is praised or blamed for the whole of it; and one
    that lags behind a policy that has become better praises the last tokens of every answer. What answers have to say
    of values is free, for they had to be drawn anyway, and exact at once, while gradients would need many iterations,
    in which the policy learns from noise. These are never the answers whose advantages are computed with the values:
    they would seem better explained than they are. Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT?",
    pretrain the critic for the same reason, by gradients.

    Args:
        policy: its value head is set.
        rollout: B answers.
        wanted: (B, T) what came after each state.
        batch_size: rows at a time.
        shared: all processes call this, each with its own answers, and get the same head.
        ridge: added to the diagonal of X^T X, so that few answers do not lead to large weights.
    """
    C, exact = policy.value_head.in_features, torch.float if wanted.device.type == "mps" else torch.double
    products, sums = wanted.new_zeros(C + 1, C + 1, dtype=exact), wanted.new_zeros(C + 1, dtype=exact)
    for rows in torch.arange(len(wanted), device=wanted.device).split(batch_size):
        some = rollout.rows(rows)
        where, path = places_of(some)
        x = policy.states(encode(policy.critic or policy.trunk, some.idx[:, :-1], some.n_pad), where, path).to(exact)
        x = F.pad(x, (0, 1), value=1.0)  # (N, C + 1): a constant for the bias
        products, sums = products + x.T @ x, sums + x.T @ wanted[rows][some.mask].to(exact)
    if shared:
        products, sums = sum_over_processes(products), sum_over_processes(sums)
    solved = torch.linalg.solve(products + ridge * torch.eye(C + 1, device=wanted.device), sums).float()
    policy.value_head.weight.copy_(solved[None, :-1])
    policy.value_head.bias.copy_(solved[-1:])


# --- from answers to advantages ---


def cut_answers(mask: torch.Tensor, logp: torch.Tensor, ref_logp: torch.Tensor, limit: float) -> torch.Tensor:
    """Leave out what an answer says after it has gone too far from the reference, (B, T) -> (B, T).

    Where the log-ratio logp - ref_logp (k1), added up from the first token on, exceeds the limit, the answer is cut for
    learning. The token that made it exceed is the last one that stays: it gets the score, and it is what has to be
    paid for. What follows is written in a place where neither the reference nor the reward model has ever been.

    Args:
        mask: (B, T), True on the tokens that were drawn.
        logp, ref_logp: (B, T) of policy and reference.
        limit: in nats; inf cuts nothing.
    """
    spent = torch.where(mask, kl_estimate(logp, ref_logp, "k1"), 0.0).cumsum(dim=1)  # (B, T)
    before = F.pad(spent, (1, -1))  # what had been spent when the token was drawn; 0 for the first
    return mask & (before.cummax(dim=1).values <= limit)


def whiten_all(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ppo.whiten over the tokens of all processes together, (B, T) -> (B, T): they share one gradient."""
    n = sum_over_processes(mask.sum())
    mean = sum_over_processes(torch.where(mask, x, 0.0).sum()) / n
    away = torch.where(mask, x - mean, 0.0)
    return away * torch.rsqrt(sum_over_processes(away.square().sum()) / n + 1e-8)


def score_answers(rewards: torch.Tensor, ended: torch.Tensor, settings: PPOConfig) -> torch.Tensor:
    """What answers are worth to the policy, (B,): clipped rewards, and a penalty for those that have no end.

    An answer that derails may be ten standard deviations below the others. Unclipped, one such answer has more to say
    in a batch than a hundred that differ in what we care for.
    """
    return rewards.clamp(-settings.reward_clip, settings.reward_clip) - settings.end_penalty * ~ended


class Experience(NamedTuple):
    """What B answers have to teach. Numbers where mask is False mean nothing."""

    rollout: Rollout
    """The answers."""
    rewards: torch.Tensor
    """(B,) of the reward model, normalised."""
    mask: torch.Tensor
    """(B, T) the tokens that are learned from, see cut_answers."""
    logp: torch.Tensor
    """(B, T) log-probabilities when the iteration began."""
    ref_logp: torch.Tensor
    """(B, T) of the reference."""
    entropy: torch.Tensor
    """(B, T) when the iteration began."""
    values: torch.Tensor
    """(B, T) when the iteration began."""
    advantages: torch.Tensor
    """(B, T) how much better than expected each choice was; mean 0 and variance 1 over all processes."""
    returns: torch.Tensor
    """(B, T) what the values are to become."""
    outcome: torch.Tensor
    """(B, T) what came in the end, from each token on: the returns of a lambda of 1."""

    def rows(self, where: torch.Tensor) -> "Experience":
        """Some rows, in this order, at the same width."""
        return Experience(self.rollout.rows(where), *(some[where] for some in self[1:]))

    def targets(self, where: torch.Tensor) -> torch.Tensor:
        """Ids of some rows' answers, (b, T), and -100 where nothing is learned: by these, tokens are counted."""
        return self.rollout.response[where].masked_fill(~self.mask[where], -100)


def make_experience(
    model: nn.Module,
    rollout: Rollout,
    rewards: torch.Tensor,
    ref_logp: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    beta: float,
    settings: PPOConfig,
) -> Experience:
    """Turn answers and what they are worth into advantages and returns of tokens.

    Args:
        model: the policy as it is now, or what wraps it; it is to compute as it will when it learns.
        rollout: B answers.
        rewards: (B,) of the reward model, normalised.
        ref_logp: (B, T) of the reference.
        pieces: the rows that will go through the model together.
        beta: weight of the KL in the reward, see ppo.shape_rewards.
        settings: reward_clip, end_penalty, answer_kl, gamma, lam and temperature are read.
    """
    logp, values, entropy = score_pieces(model, rollout, pieces, settings.temperature)
    mask = cut_answers(rollout.mask, logp, ref_logp, settings.answer_kl)
    shaped = shape_rewards(score_answers(rewards, rollout.ended, settings), logp, ref_logp, mask, beta)  # (B, T)
    advantages, returns = gae(shaped, values, mask, settings.gamma, settings.lam)
    outcome = gae(shaped, torch.zeros_like(shaped), mask, settings.gamma, 1.0)[1]
    advantages = whiten_all(advantages, mask)
    return Experience(rollout, rewards, mask, logp, ref_logp, entropy, values, advantages, returns, outcome)


def minibatch_order(epochs: int, minibatches: int, seed: int) -> Iterator[int]:
    """Number of each minibatch of an iteration in turn: in order at first, then shuffled anew in every epoch.

    Which rows share a minibatch stays as it is, so that it does not depend on how many processes share the rows.
    """
    rng = np.random.default_rng(seed)
    yield from range(minibatches)
    for _ in range(epochs - 1):
        yield from rng.permutation(minibatches).tolist()
