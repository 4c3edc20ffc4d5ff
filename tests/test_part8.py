"""Part 8: the formulas of PPO, the policy and its rollouts, and the loop that learns.

The chain of proof. Advantages equal the definition written with two loops, row by row; both losses equal loops over
tokens in plain Python, in value and in gradient; estimators of the KL equal their formulas, and their expected
gradients, summed over all outcomes, are those that the lesson says; and no function reads what stands after the end. A
policy's scores are its trunk's, and its values a linear function of what it is told; a row of a padded batch gets what
it gets alone, with windows, experts and caches too. A rollout is what a loop without cache and batch draws with the
same random numbers; looking back gives the log-probabilities of a pass for each token alone, and itself bit for bit;
the judge reads the ids that were drawn. Training prompts are never held-out ones; what is cut, shaped and whitened
equals loops over tokens; the first ratio of every iteration is 1 bit for bit; an iteration that has gone too far takes
no step more; a run that is killed and goes on, or is shared by two processes, is the run of one; and it learns.
"""

import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from conftest import QUIET, ROOT, load, run_script

data, model, tokenizer, stories = (load(8, name) for name in ("data", "model", "tokenizer", "stories"))
instructions, rules, generate, reward = (load(8, name) for name in ("instructions", "rules", "generate", "reward"))
checkpoint, devices, optim, train = (load(8, name) for name in ("checkpoint", "devices", "optim", "train"))
ppo, policy, rollout, watch = (load(8, name) for name in ("ppo", "policy", "rollout", "watch"))
environment, experience, kl_sweep = load(8, "environment"), load(8, "experience"), load(8, "kl_sweep")
lesson1, lesson2 = load(8, "lesson1_policy_gradient"), load(8, "lesson2_gae")
lesson3, lesson4 = load(8, "lesson3_kl"), load(8, "lesson4_loop")
UserError, PPOConfig, RewardModel = data.UserError, experience.PPOConfig, reward.RewardModel
GPT, GPTConfig, BPETokenizer, Policy = model.GPT, model.GPTConfig, tokenizer.BPETokenizer, policy.Policy

LENGTHS = (5, 1, 3, 5, 2)
B, T = len(LENGTHS), max(LENGTHS)
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]  # (B, T)
DRAWN = [(b, t) for b in range(B) for t in range(LENGTHS[b])]
CLIP = 0.2


def numbers(seed: int, scale: float = 1.0) -> torch.Tensor:
    """(B, T) random float64, the same for the same seed."""
    return scale * torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spoiled(x: torch.Tensor, with_what: float) -> torch.Tensor:
    """The same, with something else after the end."""
    return torch.where(MASK, x, with_what)


# === means ===


def test_masked_mean_and_whiten_by_hand() -> None:
    """Over drawn tokens, all alike; without the shift the mean stays and the variance is 1 as well."""
    x = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert ppo.masked_mean(x, mask).item() == 3.0
    scale = math.sqrt((4 + 1 + 9) / 3)
    expected = torch.tensor([[-2 / scale, -1 / scale, 0.0], [3 / scale, 0.0, 0.0]])
    torch.testing.assert_close(ppo.whiten(x, mask), expected)
    torch.testing.assert_close(ppo.whiten(x, mask, shift_mean=False), torch.where(mask, expected + 3, 0.0))
    many = numbers(0, 7.0) + 4
    white, kept = ppo.whiten(many, MASK)[MASK], ppo.whiten(many, MASK, shift_mean=False)[MASK]
    assert white.mean().item() == pytest.approx(0, abs=1e-9)
    assert white.var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert kept.mean().item() == pytest.approx(many[MASK].mean().item())
    assert kept.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_whiten_of_one_token_and_of_equal_ones() -> None:
    """0, and no nan."""
    one = torch.zeros(B, T, dtype=torch.bool)
    one[2, 0] = True
    for mask, value in itertools.product((one, MASK), (2.5, 0.1, 0.3, 0.7, 1.1)):  # whose mean is not always exact
        assert ppo.whiten(torch.full((B, T), value), mask).abs().max().item() < 1e-2


def test_wrong_masks_and_shapes_are_refused() -> None:
    """What could be spread to another shape is not; a mask is of booleans, and not empty where a mean is taken."""
    x, none = torch.zeros(B, T), torch.zeros(B, T, dtype=torch.bool)
    row = torch.zeros(1, T)
    for call in (
        lambda mask, x, y: ppo.masked_mean(y, mask),
        lambda mask, x, y: ppo.whiten(y, mask),
        lambda mask, x, y: ppo.gae(x, y, mask, 1.0, 0.9),
        lambda mask, x, y: ppo.gae(y, x, mask, 1.0, 0.9),
        lambda mask, x, y: ppo.ppo_policy_loss(x, y, x, mask, CLIP),
        lambda mask, x, y: ppo.ppo_policy_loss(x, x, y, mask, CLIP),
        lambda mask, x, y: ppo.value_loss(x, y, x, mask, CLIP),
        lambda mask, x, y: ppo.value_loss(x, x, y, mask, CLIP),
        lambda mask, x, y: ppo.explained_variance(x, y, mask),
        lambda mask, x, y: ppo.shape_rewards(torch.zeros(B), x, y, mask, 0.1),
    ):
        with pytest.raises(ValueError, match="shapes"):
            call(MASK, x, row)
        with pytest.raises(ValueError, match="booleans"):
            call(MASK.long(), x, x)
    for call in (
        lambda: ppo.masked_mean(x, none),
        lambda: ppo.whiten(x, none),
        lambda: ppo.ppo_policy_loss(x, x, x, none, CLIP),
        lambda: ppo.value_loss(x, x, x, none, CLIP),
        lambda: ppo.explained_variance(x, x, none),
    ):
        with pytest.raises(ValueError, match="False everywhere"):
            call()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_nobody_reads_what_stands_after_the_end(junk: float) -> None:
    """Neither values nor gradients change, and none becomes nan."""
    a, b, c = numbers(1), numbers(2), numbers(3)
    for call in (
        lambda a, b, c: ppo.ppo_policy_loss(a, b, c, MASK, CLIP)[0],
        lambda a, b, c: ppo.value_loss(a, b, c, MASK, CLIP)[0],
        lambda a, b, c: ppo.whiten(a, MASK).square().sum() + ppo.masked_mean(a * a, MASK),
    ):
        found = []
        for x, y, z in ((a, b, c), (spoiled(a, junk), spoiled(b, junk), spoiled(c, junk))):
            x = x.clone().requires_grad_(True)
            loss = call(x, y, z)
            found.append((loss.detach(), torch.autograd.grad(loss, x)[0][MASK]))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    for loss in (ppo.ppo_policy_loss, ppo.value_loss):
        x = spoiled(a, junk).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(x, b, c, MASK, CLIP)[0], x)
        assert (gradient[~MASK] == 0).all()
    scores = torch.ones(B, dtype=torch.float64)
    pairs = [
        (ppo.gae(x, y, MASK, 0.9, 0.8), ppo.shape_rewards(scores, x, y, MASK, 0.1), ppo.explained_variance(x, y, MASK))
        for x, y in ((a, b), (spoiled(a, junk), spoiled(b, junk)))
    ]
    (advantages, returns), rewards, share = pairs[1]
    for found, expected in zip((advantages, returns, rewards), (*pairs[0][0], pairs[0][1]), strict=True):
        assert torch.equal(found, expected) and (found[~MASK] == 0).all()
    assert share == pairs[0][2]


# === rewards and advantages ===


def test_shape_rewards_by_hand() -> None:
    """The penalty at each token, the score at each row's last one, also where the penalty is 0."""
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -9.0, -9.0]])
    ref_logp = torch.tensor([[-2.0, -1.0, -3.0], [-1.5, -1.0, -1.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = ppo.shape_rewards(torch.tensor([5.0, -1.0]), logp, ref_logp, mask, 0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.1, 0.1, 5.0], [-1.1, 0.0, 0.0]]))
    assert ppo.shape_rewards(torch.tensor([5.0, -1.0]), logp, ref_logp, mask, 0.0).tolist() == [[0, 0, 5], [-1, 0, 0]]
    whole = ppo.shape_rewards(torch.ones(B), numbers(0), numbers(1), MASK, 0.3).sum(dim=1)
    torch.testing.assert_close(whole, 1 - 0.3 * torch.where(MASK, numbers(0) - numbers(1), 0.0).sum(dim=1))


def test_shape_rewards_loses_no_score() -> None:
    """A row without a token, and scores of another number or shape, are errors."""
    mask = MASK.clone()
    mask[1] = False
    x = torch.zeros(B, T)
    with pytest.raises(ValueError, match="no token"):
        ppo.shape_rewards(torch.ones(B), x, x, mask, 0.1)
    for scores in (torch.ones(1), torch.ones(B, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="one for each row"):
            ppo.shape_rewards(scores, x, x, MASK, 0.1)


def test_gae_by_hand() -> None:
    """Two tokens, worked out on paper."""
    row = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = ppo.gae(*row, 0.5, 0.4)
    # delta = (1 + 0.5 * 3 - 0.5, 2 - 3) = (2, -1); A = (2 + 0.5 * 0.4 * -1, -1)
    torch.testing.assert_close(advantages, torch.tensor([[1.8, -1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.3, 2.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 1.0), (1.0, 0.0), (0.0, 0.9)])
def test_gae_is_its_definition(gamma: float, lam: float) -> None:
    """A sum of later deltas for each token of each row, with the value 0 after the end of the row."""
    rewards, values = numbers(1), numbers(2)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    r, v = rewards.tolist(), values.tolist()
    for b, t in itertools.product(range(B), range(T)):
        expected, end = 0.0, LENGTHS[b]
        for k in range(t, end):
            following = v[b][k + 1] if k + 1 < end else 0.0
            expected += (gamma * lam) ** (k - t) * (r[b][k] + gamma * following - v[b][k])
        assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
        assert returns[b, t].item() == pytest.approx(expected + v[b][t] if t < end else 0.0, abs=1e-12)
        if lam == 1 and t < end:  # all that came: the critic is not asked
            assert returns[b, t].item() == pytest.approx(sum(gamma ** (k - t) * r[b][k] for k in range(t, end)))
        if lam == 0 and t < end - 1:
            assert returns[b, t].item() == pytest.approx(r[b][t] + gamma * v[b][t + 1])


def test_gae_of_a_row_is_that_of_the_row_alone() -> None:
    """Bit for bit, in whatever batch; no gradient; rows and batches without tokens."""
    rewards, values = numbers(1).float(), numbers(2).float().requires_grad_(True)
    advantages, returns = ppo.gae(rewards, values, MASK, 0.99, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    for b, length in enumerate(LENGTHS):
        some = slice(b, b + 1), slice(0, length)
        alone, _ = ppo.gae(rewards[some], values[some], MASK[some], 0.99, 0.95)
        assert torch.equal(alone, advantages[some])
    assert ppo.gae(rewards, values, torch.zeros_like(MASK), 1.0, 1.0)[0].abs().max() == 0
    assert ppo.gae(rewards[:, :0], values[:, :0], MASK[:, :0], 1.0, 1.0)[0].shape == (B, 0)


# === the losses ===


@pytest.mark.parametrize("clip", [0.2, 0.05, math.inf])
def test_policy_loss_and_gradient_are_a_loop(clip: float) -> None:
    """Token by token, from the formula with min of the paper, and its derivative by cases."""
    logp, old, advantages = numbers(1, 0.3).requires_grad_(True), numbers(2, 0.3), numbers(3)
    loss, share = ppo.ppo_policy_loss(logp, old, advantages, MASK, clip)
    (gradient,) = torch.autograd.grad(loss, logp)
    expected, cut, n = 0.0, 0, sum(LENGTHS)
    for b, t in itertools.product(range(B), range(T)):
        if (b, t) not in DRAWN:
            assert gradient[b, t] == 0
            continue
        ratio, a = math.exp(logp[b, t].item() - old[b, t].item()), advantages[b, t].item()
        expected -= min(a * ratio, a * min(max(ratio, 1 - clip), 1 + clip)) / n
        silent = (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)
        cut += silent
        assert gradient[b, t].item() == pytest.approx(0.0 if silent else -a * ratio / n, abs=1e-12)
    assert loss.item() == pytest.approx(expected) and share.item() == pytest.approx(cut / n)
    assert not share.requires_grad and (0 < cut < n) == (clip < 1)


def test_first_step_is_reinforce() -> None:
    """Where nothing has moved, the ratio is exactly 1: no token is cut, and the gradient is -A / N to the bit."""
    logp, advantages = numbers(1).float().requires_grad_(True), numbers(3).float()
    for clip in (0.2, 1e-6):
        loss, share = ppo.ppo_policy_loss(logp, logp.detach().clone(), advantages, MASK, clip)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert share.item() == 0
        torch.testing.assert_close(gradient, torch.where(MASK, -advantages / MASK.sum(), 0.0), rtol=1e-6, atol=0)
        assert loss.item() == pytest.approx(-advantages[MASK].mean().item(), abs=1e-6)


@pytest.mark.parametrize("clip", [0.2, 0.5, 0.0, math.inf])
def test_value_loss_and_gradient_are_a_loop(clip: float) -> None:
    """Half the larger square; the gradient of whichever it is, which is 0 for a value outside its range."""
    values, old, returns = numbers(1).requires_grad_(True), numbers(2, 0.5), numbers(3)
    loss, share = ppo.value_loss(values, old, returns, MASK, clip)
    (gradient,) = torch.autograd.grad(loss, values)
    expected, cut, n, reach = 0.0, 0, sum(LENGTHS), clip or math.inf
    for b, t in DRAWN:
        v, o, r = (some[b, t].item() for some in (values, old, returns))
        clipped = min(max(v, o - reach), o + reach)
        expected += 0.5 * max((v - r) ** 2, (clipped - r) ** 2) / n
        silent = (clipped - r) ** 2 > (v - r) ** 2
        cut += silent
        assert gradient[b, t].item() == pytest.approx(0.0 if silent else (v - r) / n, abs=1e-12)
    assert loss.item() == pytest.approx(expected) and share.item() == pytest.approx(cut / n)
    assert (cut > 0) == (0 < clip < 1)


def test_value_loss_before_any_step_is_not_clipped() -> None:
    """Values that have not moved are inside their range, rounding or not."""
    values = numbers(1, 100.0).float()
    for clip in (0.1, 1e-7):
        loss, share = ppo.value_loss(values, values.clone(), numbers(3).float(), MASK, clip)
        assert share.item() == 0
        assert loss.item() == pytest.approx(0.5 * (values - numbers(3).float())[MASK].square().mean().item(), rel=1e-5)


# === how far, how sure, how well ===


def test_kl_estimates_by_hand() -> None:
    """From two probabilities, 0.5 and 0.2, and any shape."""
    logp, ref_logp = torch.full((2, 1, 3), math.log(0.5)), torch.full((2, 1, 3), math.log(0.2))
    for kind, expected in (("k1", math.log(2.5)), ("k2", math.log(2.5) ** 2 / 2), ("k3", 0.4 - 1 + math.log(2.5))):
        found = ppo.kl_estimate(logp, ref_logp, kind)
        assert found.shape == (2, 1, 3)
        torch.testing.assert_close(found, torch.full((2, 1, 3), expected))
    for kind in ("k4", "K1", ""):
        with pytest.raises(ValueError, match="k1, k2, k3"):
            ppo.kl_estimate(logp, ref_logp, kind)
    with pytest.raises(ValueError, match="shapes"):
        ppo.kl_estimate(logp, ref_logp[:1], "k1")


def test_k2_and_k3_are_never_negative() -> None:
    """In float32, down to differences of which exp(d) - 1 is nothing but rounding; and k3 is right there."""
    d = torch.logspace(-30, 1.5, 20_001, base=10.0)
    d = torch.cat([d, -d, torch.zeros(1)])
    logp = torch.zeros_like(d)
    assert (ppo.kl_estimate(logp, d, "k2") >= 0).all() and (ppo.kl_estimate(logp, d, "k3") >= 0).all()
    assert (ppo.kl_estimate(logp, d, "k1") < 0).any()
    small = torch.tensor([1e-3, -1e-3, 1e-2])
    exact = torch.expm1(small.double()) - small.double()
    torch.testing.assert_close(ppo.kl_estimate(torch.zeros(3), small, "k3").double(), exact, rtol=1e-3, atol=0)


def softmax_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (with a gradient) of a policy over five tokens, and log-probabilities of a reference."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64).log()


def test_kl_estimates_have_the_right_mean() -> None:
    """Summed over all tokens: k1 and k3 are the KL, k2 is not."""
    logits, ref_logp = softmax_pair()
    logp = F.log_softmax(logits, dim=0)
    exact = F.kl_div(ref_logp, logp, log_target=True, reduction="sum").item()  # of (policy || reference)
    means = [(logp.exp() * ppo.kl_estimate(logp, ref_logp, kind)).sum().item() for kind in ppo.KINDS]
    assert means[0] == pytest.approx(exact) and means[2] == pytest.approx(exact)
    assert abs(means[1] / exact - 1) > 0.02


def test_gradients_of_kl_estimates_in_the_loss() -> None:
    """By enumeration: k1 nothing, k2 and ratio-weighted k3 the reverse KL, k3 the forward KL, by their closed forms."""
    logits, ref_logp = softmax_pair()
    pi, ref = logits.detach().softmax(dim=0), ref_logp.exp()
    away = pi.log() - ref_logp
    reverse, forward = pi * (away - (pi * away).sum()), pi - ref  # derivatives for the logits, worked out on paper
    for kind, weighted, expected in (
        ("k1", False, torch.zeros_like(pi)),
        ("k2", False, reverse),
        ("k3", False, forward),
        ("k1", True, reverse),
        ("k3", True, reverse),
    ):
        logp = F.log_softmax(logits, dim=0)
        ratio = (logp - logp.detach()).exp() if weighted else 1.0
        mean = (pi * ratio * ppo.kl_estimate(logp, ref_logp, kind)).sum()
        (gradient,) = torch.autograd.grad(mean, logits)
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    assert (reverse - forward).norm() > 0.1 * reverse.norm()


def test_entropy_is_torchs_and_knows_impossible_tokens() -> None:
    """Equal to torch.distributions; -inf counts nothing, in the value and in the gradient; ln V for a uniform one."""
    logits = torch.randn(2, 3, 7)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(ppo.entropy_from_logits(logits), expected)
    assert ppo.entropy_from_logits(torch.full((1, 1, 7), 3.0)).item() == pytest.approx(math.log(7), abs=1e-6)
    cut = logits.clone()
    cut[..., 2:5] = -math.inf
    cut.requires_grad_(True)
    entropy = ppo.entropy_from_logits(cut)
    torch.testing.assert_close(entropy, ppo.entropy_from_logits(logits[..., [0, 1, 5, 6]]))
    (gradient,) = torch.autograd.grad(entropy.sum(), cut)
    assert gradient.isfinite().all() and (gradient[..., 2:5] == 0).all() and gradient.abs().max() > 0.01
    certain = torch.full((1, 1, 4), -math.inf).index_fill(2, torch.tensor([1]), 0.0)
    assert ppo.entropy_from_logits(certain).item() == 0
    assert ppo.entropy_from_logits(logits.bfloat16()).dtype == torch.float32


def test_explained_variance() -> None:
    """1 for the truth and a constant, 0 for a constant, below 0 for the opposite; numpy's otherwise."""
    returns, values = numbers(1), numbers(2)
    r, v = returns[MASK].numpy(), values[MASK].numpy()
    assert ppo.explained_variance(values, returns, MASK) == pytest.approx(1 - np.var(r - v) / np.var(r))
    assert ppo.explained_variance(returns + 3, returns, MASK) == pytest.approx(1)
    assert ppo.explained_variance(torch.ones(B, T), returns, MASK) == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert ppo.explained_variance(values.float(), torch.full((B, T), 0.1), MASK) == 0


def test_adaptive_kl_by_hand() -> None:
    """Up above the target, down below it, by a fifth at most; its state is one float."""
    controller = ppo.AdaptiveKL(0.1, 6.0, 1000)
    assert controller.update(6.6, 500) == pytest.approx(0.1 * 1.05)  # error 0.1, half a horizon
    assert controller.update(600.0, 500) == pytest.approx(0.105 * 1.1)  # error clipped to 0.2
    assert controller.update(0.0, 500) == pytest.approx(0.1155 * 0.9)
    assert controller.update(6.0, 500) == pytest.approx(0.10395)
    assert controller.update(0.0, 10**6) == pytest.approx(0.10395 * 0.8)  # never beyond 0
    assert type(controller.value) is float
    resumed = ppo.AdaptiveKL(controller.value, 6.0, 1000)
    assert resumed.update(7.0, 64) == controller.update(7.0, 64)
    assert ppo.AdaptiveKL(0, 6.0, 1000).update(60.0, 1000) == 0
    for wrong in ((-0.1, 6.0, 1000), (0.1, 0.0, 1000), (0.1, 6.0, 0)):
        with pytest.raises(ValueError, match="0 or more"):
            ppo.AdaptiveKL(*wrong)


# === lesson1_policy_gradient.py ===


def test_lesson1_moments_are_those_of_draws() -> None:
    """Bias and spread by enumeration against 100,000 draws; the score functions are autograd's."""
    bandit = lesson1.make_bandit(5, 0.5)
    scores = lesson1.score_functions(bandit.logits)
    for arm in range(5):
        logits = bandit.logits.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(F.log_softmax(logits, dim=0)[arm], logits)
        torch.testing.assert_close(scores[arm], expected)
    arms, rewards = lesson1.draw_batch(bandit.logits[None], bandit, 100_000, torch.Generator().manual_seed(0))
    for baseline in (0.0, 0.6, bandit.means):
        b = baseline[arms[0]] if isinstance(baseline, torch.Tensor) else baseline
        each = (rewards[0] - b)[:, None] * scores[arms[0]]  # (N, K)
        bias, spread = lesson1.moments(bandit, bandit.means, baseline)
        assert each.var(dim=0).sum().sqrt().item() == pytest.approx(spread, rel=0.02)
        drawn_bias = (each.mean(dim=0) - lesson1.true_gradient(bandit.logits, bandit.means)).norm().item()
        assert drawn_bias == pytest.approx(bias, abs=0.01)


def test_lesson1_says_what_it_says() -> None:
    """A constant baseline has no bias, the best the smallest spread; the ratio has no bias, and costs spread."""
    bandit = lesson1.make_bandit(8, 2.0)
    found = lesson1.compare_baselines(bandit) | lesson1.reuse_draws(bandit) | lesson1.show_clip(0.2)
    for key in ("none", "expected_reward", "best_constant"):
        assert found[f"bias_{key}"] == pytest.approx(0, abs=1e-5)
        assert found[f"spread_{key}"] >= found["spread_best_constant"]
    assert found["bias_mean_of_the_arm_drawn"] > 0.05
    assert found["spread_none_plus_10"] > 3 * found["spread_expected_reward_plus_10"]
    assert found["spread_expected_reward_plus_10"] == pytest.approx(found["spread_expected_reward"], rel=1e-3)
    assert found["bias_no_ratio_4"] > 0.2 > 1e-4 > found["bias_ratio_4"]
    assert found["spread_ratio_4"] > 2 * found["spread_ratio_0"] and found["worth_0"] == pytest.approx(1)
    assert found["worth_4"] < 0.5


def test_lesson1_promises_and_clip() -> None:
    """Without the clip the batch promises ever more and the truth gets worse; with it, the policy stays near."""
    config = lesson1.Config(n_runs=200)
    bandit = lesson1.make_bandit(config.n_arms, config.noise)
    found, _ = lesson1.stay_too_long(bandit, config, 64)
    assert found["promised_ratio_64"] > 2 * found["promised_ratio_0"]
    assert found["reward_ratio_64"] < found["reward_ratio_0"] - 0.03
    assert found["reward_ratio_and_clip_64"] > found["reward_ratio_and_clip_0"]
    assert found["kl_ratio_and_clip_64"] < 0.1 < 1 < found["kl_ratio_64"]
    assert 0.1 < found["cut_ratio_and_clip_64"] < 0.5 and found["cut_ratio_and_clip_0"] == 0


def test_lesson1_losses_begin_alike() -> None:
    """The first step of all three is the same one, run by run."""
    config, begin = lesson1.Config(n_runs=3), torch.randn(3, 8)
    bandit = lesson1.make_bandit(8, 1.0)
    ends = [
        lesson1.climb(name, begin, bandit, config, 1, torch.Generator().manual_seed(0))[0] for name in lesson1.LOSSES
    ]
    torch.testing.assert_close(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2]) and not torch.equal(ends[0], begin)


# === lesson2_gae.py ===


def test_lesson2_definitions_agree() -> None:
    """The sum of deltas, the mean of n-step advantages and gae(), on random episodes."""
    for seed, (gamma, lam) in enumerate(((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0))):
        rewards, values = numbers(seed)[0].tolist(), numbers(seed + 9)[0].tolist()
        found = ppo.gae(numbers(seed)[:1], numbers(seed + 9)[:1], MASK[:1], gamma, lam)[0][0].tolist()
        assert lesson2.by_sum(rewards, values, gamma, lam) == pytest.approx(found)
        assert lesson2.by_steps(rewards, values, gamma, lam) == pytest.approx(found)


def test_lesson2_batch_and_reach() -> None:
    """The mask matters at ends; a score reaches back by powers of gamma lambda."""
    found = lesson2.compare_batch(0)
    assert found["difference_batch"] < 1e-5 and found["off_without_mask"] > 0.1
    assert found["whitened_mean"] == pytest.approx(0, abs=1e-5)
    assert found["whitened_variance"] == pytest.approx(1, abs=1e-4)
    assert abs(found["careless_mean"]) > 0.1
    reach, _ = lesson2.show_reach()
    assert reach["reach_20_gamma_1_lambda_0.95"] == pytest.approx(0.95**20, rel=1e-4)
    assert reach["reach_59_gamma_0.9_lambda_1"] == pytest.approx(0.9**59, rel=1e-3)


def test_lesson2_trade() -> None:
    """Signal by its formula; the better the critic, the smaller the best lambda; errors ask for one in between."""
    found, _ = lesson2.trade(lesson2.Config(n_episodes=20_000))
    assert found["signal_off"] < 0.03
    assert found["signal_nothing_0"] == pytest.approx(1 / 20, abs=0.02)
    for key in ("nothing", "half_the_truth", "the_truth"):
        assert found[f"signal_{key}_1"] == pytest.approx(1, abs=0.03)
        assert found[f"spread_{key}_1"] > found[f"spread_{key}_0.5"] > found[f"spread_{key}_0"]
    best = [found[f"best_lambda_{key}"] for key in ("the_truth", "half_the_truth", "nothing")]
    assert best == sorted(best) and best[0] == 0 < best[1] and 0 < found["best_lambda_the_truth_and_errors"] < 1
    assert found["error_the_truth_0"] == pytest.approx(0, abs=1e-3)


def test_lesson2_chance_is_no_bias() -> None:
    """With lambda 1 nothing is missing: a batch's error is its spread, however few episodes that was measured on."""
    ratios = []
    for seed in range(20):
        steps, _, rewards = lesson2.walk(300, 20, torch.Generator().manual_seed(seed))
        _, spread, error = lesson2.measure(steps, rewards, torch.zeros_like(steps), 1.0, 64)
        ratios.append(error / (spread / 8))
    assert np.mean(ratios) == pytest.approx(1, abs=0.04)


# === lesson3_kl.py ===


@pytest.fixture(scope="module")
def models() -> tuple:
    """The lesson's reference and other model."""
    return lesson3.make_models(lesson3.Config())


def test_lesson3_enumerates_everything(models: tuple) -> None:
    """All 64 responses once, with probabilities that add up to 1, by forward passes over one response each."""
    with torch.no_grad():
        every = lesson3.enumerate_all(models[1], models[0], 3)
        assert every.logp.shape == (64, 3) and every.chance().sum().item() == pytest.approx(1)
        assert every.ref_logp.sum(dim=1).exp().sum().item() == pytest.approx(1)
        for n, response in enumerate(itertools.product(range(4), repeat=3)):
            if n % 7 == 0:
                logits = models[1](torch.tensor([[0, *response[:2]]]))[0][0]
                logp = F.log_softmax(logits, dim=-1)[torch.arange(3), list(response)]
                torch.testing.assert_close(every.logp[n], logp)
    near = lesson3.between(*models, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(near.parameters(), models[0].parameters(), strict=True))


def test_lesson3_values(models: tuple) -> None:
    """k1 and k3 have no bias, k2 has; near the reference k1 has by far the largest spread."""
    found, _ = lesson3.compare_values(models, lesson3.Config())
    for share in (0.02, 0.2, 1):
        assert abs(found[f"bias_k1_{share}"]) < 1e-5 and abs(found[f"bias_k3_{share}"]) < 1e-5
    assert found["bias_k2_1"] > 0.1
    assert found["spread_k1_0.02"] > 5 * found["spread_k3_0.02"]
    rounding = lesson3.show_rounding()
    assert rounding["k3_below_0_naive"] > 0.2 and rounding["k3_below_0_stable"] == 0
    assert rounding["k3_mean_stable"] == pytest.approx(1, abs=1e-3)


def test_lesson3_gradients(models: tuple) -> None:
    """Who has the gradient of what, and that nobody else has it."""
    found = lesson3.compare_gradients(models, lesson3.Config(), 0.2)
    full, reverse, forward = "reverse_KL", "reverse_contexts_fixed", "forward_contexts_fixed"
    zeros = {
        ("k1_in_the_reward", full),
        ("k2_in_the_loss", reverse),
        ("k3_in_the_loss", forward),
        ("k1_in_the_loss_times_ratio", reverse),
        ("k3_in_the_loss_times_ratio", reverse),
    }
    for kind, place, target in itertools.product(ppo.KINDS, lesson3.PLACES, (full, reverse, forward)):
        name = f"{kind}_{lesson3.key_of(place)}"
        away = found[f"away_{name}_{target}"]
        assert (away < 1e-9) if (name, target) in zeros else (away > 0.02), (name, target, away)
    assert found["length_k1_in_the_loss"] < 1e-9 and found["k2_and_k3_times_ratio"] < 1e-12


def test_lesson3_full_gradient_is_a_finite_difference(models: tuple) -> None:
    """The KL of whole responses, moved along a random direction of the weights."""
    policy = lesson3.between(*models, 0.3)
    every = lesson3.enumerate_all(policy, models[0], 3)
    gradient = lesson3.gradient_of(lesson3.divergence(every), policy)
    direction, ends, step = torch.randn_like(gradient), [], 1e-5
    start = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * step * direction, policy.parameters())
        ends.append(lesson3.divergence(lesson3.enumerate_all(policy, models[0], 3)).item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradient @ direction).item(), rel=1e-5)


def test_lesson3_leads_where_it_says() -> None:
    """Three penalties end at ref exp(score / beta), one at the best with the forward KL, and the others elsewhere."""
    found, policies = lesson3.follow(lesson3.Config(steps=1000))
    for key in ("k1_in_the_reward", "k2_in_the_loss", "k3_in_the_loss_times_ratio"):
        assert found[f"from_best_{key}"] < 1e-4
    torch.testing.assert_close(policies["k3 in the loss"], policies["best with forward KL"], atol=1e-4, rtol=0)
    for key in ("k3_in_the_loss", "k2_in_the_reward", "k3_in_the_reward", "k1_in_the_loss"):
        assert found[f"from_best_{key}"] > 0.05
    scores, ref_logp = lesson3.bandit_problem()
    best, other = lesson3.optima(scores, ref_logp, 0.5)
    assert best.sum().item() == pytest.approx(1) and other.sum().item() == pytest.approx(1)
    for wanted, objective in (
        (best, lambda pi: (pi * scores).sum() - 0.5 * (pi * (pi.log() - ref_logp)).sum()),
        (other, lambda pi: (pi * scores).sum() - 0.5 * (ref_logp.exp() * (ref_logp - pi.log())).sum()),
    ):
        for seed in range(20):  # no policy nearby is better
            noise = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert objective((wanted.log() + 0.05 * noise).softmax(dim=0)) < objective(wanted)


def test_lesson3_controller_finds_the_target() -> None:
    """From above and from below, to the same beta."""
    found, _ = lesson3.adapt(400)
    assert found["kl_from_5"] == pytest.approx(0.3, abs=0.02) and found["kl_from_0.02"] == pytest.approx(0.3, abs=0.02)
    assert found["beta_from_5"] == pytest.approx(found["beta_from_0.02"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lesson1_policy_gradient", "lesson2_gae", "lesson3_kl"])
def test_lessons_run(name: str, tmp_path: Path) -> None:
    """The whole script, with its figure and its metrics."""
    result = run_script(f"part8_ppo/{name}.py", "--smoke", env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*/metrics.json")
    (figure,) = file.parent.glob("*.png")
    assert figure.stat().st_size > 10_000
    assert all(math.isfinite(value) for value in json.loads(file.read_text()).values())


V, PAD, END = 16, 0, 1
PROMPTS = [[2, 5, 7], [3], [2, 9, 4, 11, 6], [8, 3], [2, 5, 7], [10, 12, 3, 4]]
KINDS = {
    "plain": {},
    "grouped": {"n_kv_head": 2},
    "window": {"window": 4},
    "sinks": {"window": 3, "n_sink": 1},
    "experts": {"n_expert": 4},
}


def make_policy(separate: bool = False, surprise: bool = False, **settings: object) -> Policy:
    """A policy whose attention matters and whose critic says something, in evaluation mode."""
    torch.manual_seed(1)
    shape = {"vocab_size": V, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32} | settings
    trunk = GPT(GPTConfig(**shape))
    for name, parameter in trunk.named_parameters():
        if "blocks" in name and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    found = Policy(trunk, copy.deepcopy(trunk) if separate else None, surprise)
    torch.nn.init.normal_(found.value_head.weight)
    torch.nn.init.normal_(found.value_head.bias)
    return found.eval()


def answers(some: torch.nn.Module, prompts: list = PROMPTS, **settings: object) -> object:
    """A rollout with usual settings."""
    usual = {"temperature": 0.7, "max_new_tokens": 12, "batch_size": 64, "seed": 3} | settings
    generator = torch.Generator().manual_seed(usual.pop("seed"))
    return rollout.roll_out(some, prompts, PAD, END, generator=generator, **usual)


# === the policy ===


def test_a_policy_is_its_trunk_with_a_head() -> None:
    """Logits are GPT's; values are w . h + b of what the lm_head reads; zero at first; nothing of the trunk is lost."""
    some, idx = make_policy(), torch.randint(V, (3, 9))
    states = []
    handle = some.trunk.lm_head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    logits, values = some(idx)
    handle.remove()
    assert torch.allclose(logits, some.trunk(idx)[0], atol=1e-5) and logits.shape == (3, 9, V)
    by_hand = (states[0] * some.value_head.weight[0]).sum(dim=-1) + some.value_head.bias
    assert torch.allclose(values, by_hand, atol=1e-5) and values.shape == (3, 9)
    fresh = Policy(GPT(some.config))
    assert not fresh(idx)[1].any() and fresh.value_head.weight.shape == (1, 32)
    assert fresh.num_parameters() == fresh.trunk.num_parameters() + 33
    assert fresh.trunk.state_dict().keys() == GPT(some.config).state_dict().keys()


def test_surprise_so_far_by_hand() -> None:
    """Of the tokens before each one: nats in hundreds, their mean with ten quiet ones, how many; not of itself."""
    logp = torch.tensor([[-1.0, -2.0, -4.0, math.nan], [-3.0, math.nan, math.nan, math.nan]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found = policy.surprise_so_far(logp, mask)  # (2, 4, 3)
    assert found.shape == (2, 4, policy.N_PATH)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.0, 0.01, 0.03, 0.07]))
    torch.testing.assert_close(found[0, :, 1], torch.tensor([0.0, 1 / 11, 3 / 12, 7 / 13]))
    torch.testing.assert_close(found[1, :, 2], torch.tensor([0.0, 0.01, 0.02, 0.03]))
    torch.testing.assert_close(found[1, :, 0], torch.tensor([0.0, 0.03, 0.03, 0.03]))


@pytest.mark.parametrize("separate", [False, True])
def test_values_are_told_of_surprise(separate: bool) -> None:
    """They are w . [h, path] + b; without a path there are none, and logits are as they were."""
    some = make_policy(separate, surprise=True)
    idx, path = torch.randint(V, (3, 9)), torch.rand(3, 9, policy.N_PATH)
    logits, values = some(idx, path=path)
    assert some.value_head.weight.shape == (1, 32 + policy.N_PATH) and some(idx)[1] is None
    assert torch.equal(logits, some(idx)[0])
    h = policy.encode(some.critic or some.trunk, idx)
    w, told = some.value_head.weight[0, :32], some.value_head.weight[0, 32:]
    by_hand = (h * w).sum(dim=-1) + (path * told).sum(dim=-1) + some.value_head.bias
    torch.testing.assert_close(values, by_hand, atol=1e-5, rtol=1e-5)
    where = torch.rand(3, 9) < 0.5
    torch.testing.assert_close(some(idx, where=where, path=path[where])[1], values[where])
    drawn = answers(some)  # and looking back tells each token what went before it in its own row
    scored = rollout.score_tokens(some, drawn, 0.7)
    for b, (prompt, response) in enumerate(zip(drawn.prompts, drawn.responses, strict=True)):
        n, row = len(response), torch.tensor([prompt + response])
        alone = policy.surprise_so_far(drawn.logp[b : b + 1, :n], torch.ones(1, n, dtype=torch.bool))
        whole = F.pad(alone, (0, 0, len(prompt) - 1, 0))  # (1, P + T - 1, 3)
        torch.testing.assert_close(scored.values[b, :n], some(row[:, :-1], path=whole)[1][0, -n:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_fit_values_is_least_squares(separate: bool) -> None:
    """Equal to numpy's on the tokens of all answers; piece by piece too; nothing but the head changes."""
    some = make_policy(separate, surprise=True)
    before = {name: value.clone() for name, value in some.state_dict().items() if "value_head" not in name}
    drawn = answers(some, PROMPTS * 4)
    came = torch.randn(drawn.mask.shape)
    experience.fit_values(some, drawn, came, 5, shared=False, ridge=0.5)
    states, wanted = [], []
    for b, (prompt, response) in enumerate(zip(drawn.prompts, drawn.responses, strict=True)):
        h = policy.encode(some.critic or some.trunk, torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        path = policy.surprise_so_far(drawn.logp[b : b + 1], drawn.mask[b : b + 1])[0, : len(response)]
        states.append(torch.cat([h, path, torch.ones(len(response), 1)], dim=1).detach().double().numpy())
        wanted += came[b, : len(response)].tolist()
    x = np.concatenate([*states, np.sqrt(0.5) * np.eye(36)])  # ridge, as rows that want 0
    expected = np.linalg.lstsq(x, np.concatenate([wanted, np.zeros(36)]), rcond=None)[0]
    found = torch.cat([some.value_head.weight[0], some.value_head.bias]).detach()
    torch.testing.assert_close(found.double(), torch.tensor(expected), atol=1e-4, rtol=1e-3)
    assert all(torch.equal(value, some.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_padded_batch_is_that_row_alone(kind: str, separate: bool) -> None:
    """Whatever stands to the left of a prompt, beside it, or after the end."""
    some = make_policy(separate, **KINDS[kind])
    rows, width = [torch.randint(V, (n,)) for n in (9, 4, 1)], 9
    idx = torch.stack([F.pad(row, (width - len(row), 0), value=7) for row in rows])  # (B, T)
    n_pad = torch.tensor([width - len(row) for row in rows])
    idx = torch.cat([idx, torch.randint(V, (3, 2))], dim=1)  # and something after the end
    logits, values = some(idx, n_pad=n_pad)
    for b, row in enumerate(rows):
        alone = some(row[None])
        assert torch.allclose(logits[b, n_pad[b] : width], alone[0][0], atol=1e-4)
        assert torch.allclose(values[b, n_pad[b] : width], alone[1][0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing(kind: str) -> None:
    """Prompts in two pieces, then token by token, with padding: the full pass."""
    some, n_pad = make_policy(**KINDS[kind]), torch.tensor([0, 3])
    idx = torch.randint(V, (2, 10))
    whole = some(idx, n_pad=n_pad)
    cache, pieces = some.make_cache(2, 10, n_pad), []
    for piece in idx.split([4, 3, 1, 1, 1], dim=1):
        pieces.append(some(piece, cache=cache))
    for full, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        parts = torch.cat(parts, dim=1)
        assert torch.allclose(full[0], parts[0], atol=1e-4) and torch.allclose(full[1, 3:], parts[1, 3:], atol=1e-4)


def test_no_token_sees_a_later_one() -> None:
    """Neither for its scores nor for its value, with a critic of its own too."""
    for separate in (False, True):
        some, idx = make_policy(separate), torch.randint(V, (1, 9))
        other = idx.clone()
        other[0, 6] = (other[0, 6] + 1) % V
        for before, after in zip(some(idx), some(other), strict=True):
            assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


def test_a_critic_of_its_own_shares_nothing() -> None:
    """Values then teach the critic alone; without one, they teach the trunk. The critic has no lm_head."""
    some, idx = make_policy(separate=True), torch.randint(V, (2, 5))
    some(idx)[1].sum().backward()
    assert all(parameter.grad is None for parameter in some.trunk.parameters())
    assert all(parameter.grad is not None for parameter in some.critic.parameters())
    assert isinstance(some.critic.lm_head, torch.nn.Identity) and some.trunk.lm_head.weight is some.trunk.wte.weight
    shared = make_policy()
    assert torch.equal(shared(idx)[0], some(idx)[0])
    shared(idx)[1].sum().backward()
    assert shared.trunk.blocks[0].attn.qkv.weight.grad.any()
    logits, values = some(idx, cache=some.make_cache(2, 5))
    assert values is None and torch.allclose(logits, some(idx)[0], atol=1e-5)
    assert some.num_parameters() == 2 * some.trunk.num_parameters() + 33


def test_only_some_places() -> None:
    """`where` gives the rows of the whole result, in order, for a critic of its own too."""
    for separate in (False, True):
        some, idx, where = make_policy(separate), torch.randint(V, (3, 7)), torch.rand(3, 7) < 0.5
        for whole, part in zip(some(idx), some(idx, where=where), strict=True):
            assert torch.allclose(whole[where], part, atol=1e-5) and len(part) == int(where.sum())


def test_recomputing_gives_the_same_gradients() -> None:
    """In training, blocks that are computed again backward change nothing."""
    grads = []
    for recompute in (False, True):
        some, idx = make_policy().train(), torch.arange(8)[None]
        some.trunk.recompute = recompute
        logits, values = some(idx, n_pad=torch.tensor([2]))
        (logits.square().mean() + values.square().mean()).backward()
        grads.append([parameter.grad for parameter in some.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_what_a_policy_refuses() -> None:
    """Rows that are too long, unless there is a window; padding given twice; and a temperature without chance."""
    some = make_policy()
    with pytest.raises(ValueError, match="25 tokens are longer than block_size = 24"):
        some(torch.zeros(1, 25, dtype=torch.long))
    assert make_policy(window=4)(torch.zeros(1, 25, dtype=torch.long))[0].shape == (1, 25, V)
    with pytest.raises(ValueError, match="make_cache"):
        some(torch.zeros(1, 2, dtype=torch.long), cache=some.make_cache(1, 4), n_pad=torch.tensor([1]))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            policy.logprobs_of(torch.zeros(1, 1, V), torch.zeros(1, 1, dtype=torch.long), temperature)


def test_log_probabilities_by_hand() -> None:
    """exp(x / t) over the sum of all of them: nothing is cut, and bfloat16 scores are taken to float32 first."""
    logits, tokens = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 30.0, -30.0]]]), torch.tensor([[2, 0]])
    for t in (0.5, 1.0, 2.0):
        found = policy.logprobs_of(logits, tokens, t)
        for place, (row, token) in enumerate(zip(logits[0].tolist(), (2, 0), strict=True)):
            by_hand = row[token] / t - math.log(sum(math.exp(x / t) for x in row))
            assert math.isclose(found[0, place].item(), by_hand, rel_tol=1e-5)
        assert torch.allclose(policy.log_distribution(logits, t).exp().sum(dim=-1), torch.ones(1, 2))
        low = policy.logprobs_of(logits.bfloat16(), tokens, t)
        assert low.dtype == torch.float32 and torch.equal(low, found)  # these scores are exact in bfloat16
    assert torch.equal(policy.logprobs_of(logits[0], tokens[0], 2.0), policy.logprobs_of(logits, tokens, 2.0)[0])


# === drawing ===


def test_tokens_come_as_often_as_their_probability() -> None:
    """Random numbers on a grid fall into intervals as long as the probabilities; a token with none is never drawn."""
    logits, n = torch.tensor([0.3, -math.inf, 1.5, -1.0, -math.inf]), 10_000
    chance = (torch.arange(n) + 0.5) / n
    for t in (0.5, 1.0, 3.0):
        tokens = rollout.draw(logits.expand(n, -1), t, chance)
        share = torch.bincount(tokens, minlength=5) / n
        assert torch.allclose(share, (logits / t).softmax(dim=0), atol=2 / n) and share[1] == share[4] == 0
    edges = rollout.draw(torch.zeros(2, 4), 1.0, torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [0, 3]
    impossible = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]])
    assert rollout.draw(impossible, 1.0, torch.zeros(1)).tolist() == [1]
    assert rollout.draw(impossible, 1.0, torch.tensor([0.5])).tolist() == [3]
    assert rollout.draw(logits.expand(2, -1), 1.0, torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 3]


def naive_answer(some: Policy, prompt: list[int], chances: torch.Tensor, temperature: float) -> tuple[list, list]:
    """One prompt, no cache, no batch: ids, and their log-probabilities."""
    ids, logp = [], []
    for chance in chances.tolist():
        probs = (some.trunk(torch.tensor([prompt + ids]))[0][0, -1].double() / temperature).softmax(dim=0).tolist()
        reached, token = probs[0], 0
        while reached <= chance:
            token += 1
            reached += probs[token]
        ids.append(token)
        logp.append(math.log(probs[token]))
        if token == END:
            break
    return ids, logp


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_is_what_a_loop_draws(kind: str) -> None:
    """Ids and log-probabilities of each row alone, from the same random numbers; policy and bare trunk draw alike."""
    some = make_policy(**KINDS[kind])
    found = answers(some)
    chance = torch.rand(len(PROMPTS), 12, generator=torch.Generator().manual_seed(3))
    for row, prompt in enumerate(PROMPTS):
        ids, logp = naive_answer(some, prompt, chance[row], 0.7)
        assert found.responses[row] == ids
        assert torch.allclose(found.logp[row, : len(ids)], torch.tensor(logp), atol=1e-4)
    assert len(set(map(len, found.responses))) > 2, "all rows end together: leaving is not tested"
    assert answers(some.trunk).responses == found.responses
    for batch_size in (1, 2, 5):
        other = answers(some, batch_size=batch_size)
        assert other.responses == found.responses and torch.allclose(other.logp, found.logp, atol=1e-5)
        assert torch.equal(other.idx, found.idx)


def test_what_a_rollout_holds() -> None:
    """Ids, masks and flags, put together once more by hand from prompts and answers."""
    found = answers(make_policy())
    P, T = max(map(len, PROMPTS)), max(map(len, found.responses))
    assert found.idx.shape == (6, P + T) and found.prompts == PROMPTS
    for row, (prompt, ids) in enumerate(zip(PROMPTS, found.responses, strict=True)):
        n = len(ids)
        assert found.idx[row].tolist() == [PAD] * (P - len(prompt)) + prompt + ids + [PAD] * (T - n)
        assert found.n_pad[row] == P - len(prompt)
        assert found.mask[row].tolist() == [True] * n + [False] * (T - n)
        assert found.ended[row].item() == (ids[-1] == END) and END not in ids[:-1]
        assert found.ended[row] or n == 12
        assert (found.logp[row, :n] < 0).all() and not found.logp[row, n:].any()
    assert torch.equal(found.response, found.idx[:, P:])
    assert found.ended.any() and not found.ended.all(), "one kind of answer is not tested"
    assert any(PAD in ids for ids in found.responses), "drawn padding is not tested"
    some = found.rows([4, 1])
    assert some.prompts == [PROMPTS[4], PROMPTS[1]] and some.responses == [found.responses[4], found.responses[1]]
    assert all(torch.equal(a, b[[4, 1]]) for a, b in zip(some[:6], found[:6], strict=True))


def test_who_has_ended_is_asked_no_more() -> None:
    """Each token that is drawn has cost one row of one pass, in as many passes as the longest answer has tokens."""
    some, asked = make_policy(), []
    some.register_forward_pre_hook(lambda module, args: asked.append(tuple(args[0].shape)))
    found = answers(some)
    lengths = [len(ids) for ids in found.responses]
    assert asked[0] == (6, 5)  # the prompts
    # A row of n tokens is asked n times: once with its prompt, then once for each token but its last.
    assert [rows for rows, _ in asked] == [sum(n > t for n in lengths) for t in range(max(lengths))]
    assert all(width == 1 for _, width in asked[1:])
    one_by_one = len(asked)
    answers(some, batch_size=1)
    assert len(asked) - one_by_one == sum(lengths) > 2 * one_by_one


@pytest.mark.parametrize("kind", ["plain", "padded", "rolling"])
def test_rows_leave_a_cache(kind: str) -> None:
    """The rows that stay go on as if the others had never been there, in the order that was asked for."""
    some, stay = make_policy(window=4, n_sink=1).trunk, torch.tensor([3, 0])
    idx, n_pad = torch.randint(V, (4, 12)), torch.tensor([0, 3, 1, 2])
    pads = None if kind == "plain" else n_pad
    cache = some.make_cache(4, 12, pads, rolling=kind == "rolling")
    alone = some.make_cache(2, 12, None if pads is None else pads[stay], rolling=kind == "rolling")
    some(idx[:, :9], cache=cache)
    some(idx[stay, :9], cache=alone)
    rollout.keep_rows(cache, stay)
    for t in range(9, 12):
        found, wanted = (some(idx[stay, t : t + 1], cache=which)[0] for which in (cache, alone))
        assert torch.allclose(found, wanted, atol=1e-5)
    assert cache.k.shape[1] == 2


def test_a_seed_decides_and_dropout_does_not() -> None:
    """The same seed, the same answers; another one, others. Dropout is off, the mode stays, and no gradient is kept."""
    some = make_policy(dropout=0.5).train()
    first, again, other = answers(some), answers(some), answers(some, seed=4)
    assert first.responses == again.responses and torch.equal(first.logp, again.logp)
    assert first.responses != other.responses and some.training and not first.logp.requires_grad
    assert first.responses == answers(some.eval()).responses and not some.training


def test_the_edges_of_a_rollout() -> None:
    """One token, an end at once, answers cut by the context, and a context without room."""
    some = make_policy()
    one = answers(some, max_new_tokens=1)
    assert one.response.shape == (6, 1) and one.mask.all() and [len(ids) for ids in one.responses] == [1] * 6
    certain = make_policy()
    certain.trunk.lm_head = torch.nn.Linear(32, V)  # a bias that leaves no choice
    torch.nn.init.constant_(certain.trunk.lm_head.bias, -1e4)
    certain.trunk.lm_head.bias.data[END] = 1e4
    ended = answers(certain)
    assert ended.responses == [[END]] * 6 and ended.ended.all() and ended.logp.abs().max() == 0
    certain.trunk.lm_head.bias.data[END], certain.trunk.lm_head.bias.data[9] = -1e4, 1e4
    cut = answers(certain, max_new_tokens=100)
    assert cut.responses == [[9] * (24 - 5)] * 6 and not cut.ended.any()  # the longest prompt has 5 of 24
    with pytest.raises(ValueError, match=r"a prompt of 24 tokens .* context of 24"):
        answers(some, [[2] * 24, [3]])
    with pytest.raises(ValueError, match="temperature"):
        answers(some, temperature=0.0)
    assert answers(make_policy(window=4), [[2] * 30]).mask.any()  # a window goes on


# === looking back ===


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_looking_back_at_each_token_alone(kind: str, separate: bool) -> None:
    """logp, value and entropy of the state before each token, a pass for each; and the logp kept while drawing."""
    some = make_policy(separate, **KINDS[kind])
    found, t = answers(some), 0.7
    scores = rollout.score_tokens(some, found, t)
    for row, (prompt, ids) in enumerate(zip(PROMPTS, found.responses, strict=True)):
        for place, token in enumerate(ids):
            logits, values = some(torch.tensor([prompt + ids[:place]]))
            p = (logits[0, -1].double() / t).softmax(dim=0)
            wanted = [p[token].log(), values[0, -1], -(p * p.log()).sum()]
            for ours, by_hand in zip(scores[:3], wanted, strict=True):
                assert abs(ours[row, place].item() - by_hand.item()) < 1e-4
    for ours in scores[:3]:
        assert ours.shape == found.mask.shape and not ours[~found.mask].any()
    assert (scores.logp - found.logp).abs().max() < 1e-4
    assert scores.logits.shape == (int(found.mask.sum()), V)
    again = policy.logprobs_of(scores.logits, found.response[found.mask], t)
    assert torch.equal(again, scores.logp[found.mask])


def test_the_first_ratio_is_exactly_one() -> None:
    """With gradients and without, twice, with and without the entropy: the same bits, and so a clip fraction of 0."""
    some = make_policy()
    found = answers(some)
    with torch.no_grad():
        old = rollout.score_tokens(some, found, 0.7)
    now = rollout.score_tokens(some, found, 0.7, with_entropy=False)
    assert now.entropy is None and now.logp.requires_grad and not old.logp.requires_grad
    assert torch.equal(now.logp, old.logp) and torch.equal(now.values, old.values)
    advantages = torch.randn(found.mask.shape)
    loss, fraction = ppo.ppo_policy_loss(now.logp, old.logp, advantages, found.mask, 0.2)
    assert fraction == 0 and torch.isclose(loss, -advantages[found.mask].mean(), atol=1e-6)
    loss.backward()  # at a ratio of 1 the gradient is that of -A log pi
    grads = [parameter.grad.clone() for parameter in some.trunk.parameters()]
    some.zero_grad()
    logp = rollout.score_tokens(some, found, 0.7).logp
    (-(advantages * logp)[found.mask].mean()).backward()
    assert all(torch.allclose(a, b.grad, atol=1e-6) for a, b in zip(grads, some.trunk.parameters(), strict=True))


def test_padding_has_no_gradient() -> None:
    """What stands after an end is read by nobody: other ids there change no score and no gradient."""
    some, results = make_policy(), []
    found = answers(some)
    other = found.idx.clone()
    other[:, 5:][~found.mask] = 13
    for idx in (found.idx, other):
        some.zero_grad()
        scores = rollout.score_tokens(some, found._replace(idx=idx, response=idx[:, 5:]), 0.7)
        (scores.logp + scores.values + scores.entropy).sum().backward()
        results.append([scores.logp.detach(), *(parameter.grad.clone() for parameter in some.parameters())])
    assert (found.idx != other).any()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_the_judge_reads_what_was_drawn() -> None:
    """A score for each answer alone, of its ids as they are, drawn padding among them; the prompts' order is kept."""
    torch.manual_seed(5)
    judges = RewardModel(GPT(make_policy().config), PAD).eval()
    found = answers(make_policy())
    scores = rollout.judge(judges, found, batch_size=4)
    assert scores.shape == (6,) and scores.dtype == torch.float32 and any(PAD in ids for ids in found.responses)
    for row, (prompt, ids) in enumerate(zip(PROMPTS, found.responses, strict=True)):
        alone, mask = torch.tensor([prompt + ids]), torch.tensor([[False] * len(prompt) + [True] * len(ids)])
        assert torch.isclose(scores[row], judges(alone, mask)[0], atol=1e-5)
    assert len(set(scores.tolist())) == 6


# === the lesson ===


def test_the_lesson_turns_the_loop(tmp_path: Path) -> None:
    """Twelve turns of its loop raise the score by more than any turn's noise, and the policy leaves the reference."""
    config = lesson4.Config(turns=12, out=tmp_path)
    measured, early = lesson4.run_loop(lesson4.make_players(config), config)
    first, last = measured[0], measured[-1]
    assert last["score"] > first["score"] + 1 and last["ended"] > first["ended"]
    assert first["kl"] == 0 < last["kl"] and first["explained_variance"] == 0
    assert not torch.equal(early.policy.trunk.wte.weight, early.reference.trunk.wte.weight)


def test_the_lessons_loops_can_disagree() -> None:
    """Its naive losses see another clip and another advantage, so their agreement says something."""
    players = lesson4.make_players(lesson4.Config())
    found = lesson4.draw_answers(players.policy, torch.Generator().manual_seed(0), copies=2)
    turn = lesson4.look_back(players, found, lesson4.Config())
    moved = turn.old._replace(logp=turn.old.logp + 0.5 * found.mask, values=turn.old.values - 0.5)
    losses = lesson4.losses_by_hand(moved, turn)
    pi = ppo.ppo_policy_loss(moved.logp, turn.old.logp, turn.advantages, found.mask, lesson4.CLIP)[0]
    v = ppo.value_loss(moved.values, turn.old.values, turn.returns, found.mask, lesson4.CLIP)[0]
    assert math.isclose(losses[0], pi.item(), abs_tol=1e-5) and math.isclose(losses[1], v.item(), abs_tol=1e-5)
    wrong = ppo.ppo_policy_loss(moved.logp, turn.old.logp, turn.advantages, found.mask, math.inf)[0]
    assert abs(losses[0] - wrong.item()) > 1e-2


@pytest.mark.slow
def test_the_lesson_runs(tmp_path: Path) -> None:
    """As a reader starts it: all asserts of its stations hold, and it leaves numbers and a figure."""
    result = run_script("part8_ppo/lesson4_loop.py", "--smoke")
    assert result.returncode == 0, result.stderr
    out = Path(result.stdout.strip().splitlines()[-1].rpartition(" to ")[2])
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["logp_drift"] < 1e-4 and numbers["clip_fraction_step0"] == 0 and (out / "loop.png").stat().st_size
    assert numbers["tokens_per_second_one_answer_at_a_time"] > 0


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    """A small vocabulary learned from stories."""
    return BPETokenizer.train(stories.documents(200, 0, held_out=False), 400)


def small_model(bpe: BPETokenizer, seed: int = 0, **settings: object) -> GPT:
    """A model that has learned nothing."""
    torch.manual_seed(seed)
    shape = {"vocab_size": bpe.vocab_size, "block_size": 80, "n_layer": 1, "n_head": 2, "n_embd": 16} | settings
    return GPT(GPTConfig(**shape))


def save(path: Path, some: torch.nn.Module, made_by: object, **config: object) -> Path:
    """A checkpoint as train.py leaves it."""
    optimizers = optim.make_optimizers(some, "adamw", 1e-3, 0.02, 0.1, (0.9, 0.99))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    saved = tokenizer.describe_tokenizer(made_by)
    state = checkpoint.collect(some, optimizers, scaler, some.config, config, saved, {"step": 0})
    checkpoint.write_checkpoint(path, state)
    return path


@pytest.fixture(scope="module")
def files(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a model with dropout, and of a reward model of the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    base = save(folder / "base.pt", small_model(bpe, dropout=0.2), bpe)
    pad = bpe.special_tokens["<|pad|>"]
    judge = save(folder / "judge.pt", RewardModel(small_model(bpe, 1), pad), bpe, causal=False, surprise=False)
    return {"base": base, "reward": judge}


TINY = {"steps": 4, "warmup_steps": 1, "eval_every": 2, "save_every": 2, "log": "none", "device": "cpu"}
TINY |= {"dtype": "float32", "eval_prompts": 3, "test_prompts": 5, "lr": 3e-3}
TINY_PPO = {"rollouts": 8, "minibatches": 2, "accumulate": 1, "epochs": 2, "max_new_tokens": 20, "norm_prompts": 6}


def make_config(out: Path, files: dict[str, Path], **settings: object) -> train.Config:
    """Settings of a tiny run; those of PPO by their plain names."""
    of_ppo = {name: value for name, value in settings.items() if hasattr(PPOConfig(), name)}
    others = {name: value for name, value in settings.items() if name not in of_ppo}
    return train.Config(out=out, ppo=PPOConfig(**(TINY_PPO | of_ppo)), **(TINY | files | others))


def run(out: Path, files: dict[str, Path], **settings: object) -> dict[str, object]:
    """Train in this process, and return the last checkpoint."""
    train.train(make_config(out, files, **settings), devices.Processes(), CPU)
    return checkpoint.read_checkpoint(out / "latest.pt")


def write_lines(path: Path, records: list) -> Path:
    """A .jsonl file of these records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# === prompts of data sets ===

SAID = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good morning."}]
SHARE_GPT = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Good morning."}]
LAYOUTS = {
    "text": ({"prompt": "Hello.", "response": "Good morning."}, ("Hello.",)),
    "prompt as messages": ({"prompt": SAID[:1]}, ("Hello.",)),
    "answered": ({"messages": SAID}, ("Hello.",)),
    "asked": ({"messages": [*SAID, {"role": "user", "content": "Why?"}]}, ("Hello.", "Good morning.", "Why?")),
    "ShareGPT": ({"conversations": SHARE_GPT}, ("Hello.",)),
    "system": ({"messages": [{"role": "system", "content": "Be brief."}, *SAID]}, ("Be brief.\n\nHello.",)),
    "UltraFeedback": ({"prompt": "Hello.", "messages": SAID, "chosen": SAID, "rejected": SAID}, ("Hello.",)),
    "Alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ("Add.\n\n1, 2",)),
    "Alpaca without input": ({"instruction": "Add.", "input": "", "output": "3"}, ("Add.",)),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: Hello.\n\nAssistant: Hm.\n\nHuman: Why?\n\nAssistant: So.", "rejected": "x"},
        ("Hello.", "Hm.", "Why?"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompt_layouts(name: str) -> None:
    """Each gives the turns that are to be answered, and leaves answers to the last of them out."""
    record, turns = LAYOUTS[name]
    assert data.read_prompt(record) == turns


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("Hello.", "it is no record"),
        ({"text": "Hello."}, "of no layout known here; its columns are text"),
        ({}, "its columns are none"),
        ({"messages": []}, "of no layout known here"),
        ({"messages": ["Hello."]}, "of no layout known here"),
        ({"messages": SAID[1:]}, "is again, or too early, of the assistant"),
        ({"messages": [SAID[0], SAID[0]]}, "message 2 is again, or too early, of the user"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "of 'robot', who is none of"),
        ({"chosen": "Hello."}, "does not begin with 'Human:'"),
        ({"messages": [{"role": ["user"], "content": "Hello."}]}, "of ['user'], who is none of"),
    ],
)
def test_malformed_prompts(record: object, problem: str, tmp_path: Path, bpe: BPETokenizer) -> None:
    """The number of the record, what is wrong with it, and where to look."""
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "Hello."}, record])
    with pytest.raises(UserError) as caught:
        data.load_prompts(str(file), bpe, 40, 10)
    assert re.search(f"record 2: .*{re.escape(problem)}.*; see read_prompt", str(caught.value))


def test_prompts_are_split_and_encoded(tmp_path: Path, bpe: BPETokenizer) -> None:
    """As encode_prompt does it; no first turn on both sides, in any order; each once; n is a limit."""
    records = [{"prompt": f"Tell me of {i}."} for i in range(300)]
    longer = {"messages": [{"role": "user", "content": "Tell me of 7."}, SAID[1], {"role": "user", "content": "Why?"}]}
    file = write_lines(tmp_path / "a.jsonl", [*records, longer, records[7]])
    training, held_out = data.load_prompts(str(file), bpe, 40, 1000)
    assert len(training) + len(held_out) == 301 and 1 <= len(held_out) <= 20
    assert data.encode_prompt(("Tell me of 8.",), bpe, 40) in training + held_out
    texts = [{bpe.decode(ids).split(".")[0] for ids in side} for side in (training, held_out)]
    assert not texts[0] & texts[1]
    other = write_lines(tmp_path / "b.jsonl", [*records, longer][::-1])
    assert sorted(data.load_prompts(str(other), bpe, 40, 1000)[1]) == sorted(held_out)
    few = data.load_prompts(str(file), bpe, 40, 9)[0]
    assert len(few) in (8, 9) and all(ids in training for ids in few)  # of nine, one may have to be held out
    assert all(len(ids) <= 16 for side in data.load_prompts(str(file), bpe, 16, 1000) for ids in side)
    two = [write_lines(tmp_path / f"{a}.jsonl", [{"prompt": a}, {"prompt": b}]) for a, b in ("xy", "yx")]
    for path in two:  # none falls into the held-out part, so the smaller hash does
        assert [len(side) for side in data.load_prompts(str(path), bpe, 40, 10)] == [1, 1]
    assert data.load_prompts(str(two[0]), bpe, 40, 10) == data.load_prompts(str(two[1]), bpe, 40, 10)


def test_prompts_that_ask_for_nothing_are_left_out(tmp_path: Path, bpe: BPETokenizer) -> None:
    """An empty text, a transcript without an answer to leave out, a conversation that ends in an empty question."""
    empty = [{"prompt": " \n"}, {"chosen": "\n\nHuman: Hello."}, {"messages": [*SAID, SAID[0] | {"content": ""}]}]
    assert [data.read_prompt(record) for record in empty] == [(), (), ()]
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "One."}, *empty, {"prompt": "Two."}])
    assert sum(map(len, data.load_prompts(str(file), bpe, 40, 10))) == 2


def test_prompts_that_cannot_be_had(tmp_path: Path, bpe: BPETokenizer) -> None:
    """One line each, with the way out."""
    (tmp_path / "a.txt").write_text("Hello.")
    (tmp_path / "c.jsonl").write_text('{"prompt": "Hello."}\n{"prompt')
    for name, problem in (
        (tmp_path / "no.jsonl", "no such file; give one, or one of stories, hf:NAME"),
        (tmp_path / "a.txt", "no .jsonl file; give one"),
        (write_lines(tmp_path / "b.jsonl", [{"prompt": "Hello."}] * 3), "fewer than two different prompts; give more"),
        (tmp_path / "c.jsonl", "line 2 is no JSON"),
        (f"hf:{tmp_path / 'nothing'}", "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=re.escape(problem)):
            data.load_prompts(str(name), bpe, 40, 10)


@pytest.mark.parametrize("name", ["text", "asked", "UltraFeedback", "Alpaca", "HH-RLHF"])
def test_prompts_by_their_columns(tmp_path: Path, bpe: BPETokenizer, name: str) -> None:
    """A file with a data set's columns, read by the library `datasets`."""
    record, turns = LAYOUTS[name]
    records = [{"prompt": None} | record, record | {"prompt": "Other."}]  # a column that is empty in the first
    Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    training, held_out = data.load_prompts(f"hf:{tmp_path / 'a.parquet'}", bpe, 60, 10)
    both = [data.encode_prompt(some, bpe, 60) for some in (turns, ("Other.",))]
    assert sorted(training + held_out) == sorted(both)


# === finding models ===


def test_models_are_made_by_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base by part 6, the reward model by part 7, a policy by this part; in a smoke run, out of the given base."""
    started: list[list[str]] = []

    def start(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(generate.subprocess, "run", start)
    parts = {generate.BASE: "part6_sft", generate.REWARD: "part7_reward", generate.RUNS / "best.pt": "part8_ppo"}
    for path, part in parts.items():
        found = generate.find_checkpoint(path, smoke=True)
        assert started[-1][1:] == [str(ROOT / part / "train.py"), "--smoke", "--out", str(found.parent)]
    generate.find_checkpoint(generate.REWARD, True, tmp_path / "base.pt")
    assert started[-1][-2:] == ["--base", str(tmp_path / "base.pt")]
    with pytest.raises(UserError, match="no such file"):
        generate.find_checkpoint(tmp_path / "no.pt", False)


@pytest.mark.parametrize("critic", [False, True])
def test_a_policy_is_a_language_model(tmp_path: Path, bpe: BPETokenizer, critic: bool) -> None:
    """Its checkpoint gives the trunk back, bit for bit; a reward model's is refused."""
    trunk = small_model(bpe)
    saved = save(tmp_path / "policy.pt", Policy(trunk, small_model(bpe, 3) if critic else None), bpe)
    found, made_by = generate.load_checkpoint(saved, CPU)
    idx = torch.randint(0, 300, (2, 9))
    assert torch.equal(found.eval()(idx)[0], trunk.eval()(idx)[0]) and made_by.encode("a") == bpe.encode("a")
    judge = save(tmp_path / "judge.pt", RewardModel(small_model(bpe), 0), bpe, causal=False, surprise=False)
    with pytest.raises(UserError, match="a reward model, which writes no text"):
        generate.load_checkpoint(judge, CPU)


def test_models_that_do_not_belong_together(tmp_path: Path, bpe: BPETokenizer, files: dict[str, Path]) -> None:
    """Another tokenizer, a shorter context, none of a chat, two of one kind: a line each."""
    other = BPETokenizer.train(stories.documents(50, 1, held_out=False), 400)
    judge = save(tmp_path / "other.pt", RewardModel(small_model(other), 0), other, causal=False, surprise=False)
    with pytest.raises(UserError, match="another tokenizer than that of --base"):
        environment.load_models(files["base"], judge, PPOConfig(), CPU)
    judge = save(
        tmp_path / "short.pt", RewardModel(small_model(bpe, block_size=40), 0), bpe, causal=False, surprise=False
    )
    with pytest.raises(UserError, match=r"its context is 40 tokens, and that of --base is 80"):
        environment.load_models(files["base"], judge, PPOConfig(), CPU)
    letters = tokenizer.ByteTokenizer()
    plain = save(tmp_path / "bytes.pt", small_model(bpe, vocab_size=letters.vocab_size), letters)
    with pytest.raises(UserError, match=r"tokenizer has no <\|user\|>"):
        environment.load_models(plain, files["reward"], PPOConfig(), CPU)
    with pytest.raises(UserError, match="a language model, not a reward model"):
        environment.load_models(files["base"], files["base"], PPOConfig(), CPU)


# === what is asked ===


def test_training_prompts_are_never_held_out(bpe: BPETokenizer) -> None:
    """By what is asked for, in every iteration, the one of the yardstick too; and no held-out prompt is trained on."""
    prompts = environment.Prompts("stories", bpe, 60, 0)
    training = [asked for iteration in (-1, 0, 1, 2) for asked in prompts.draw(40, iteration)]
    held_out = prompts.held_out(80)
    for some, side in ((training, False), (held_out, True)):
        for asked in some:
            facts, made = asked.instruction.asked, asked.instruction
            assert made.kind == "story" and stories.is_held_out(f"{facts['hero']}, {facts['thing']}") == side
            assert asked.ids == data.encode_prompt((made.prompt,), bpe, 60)
    assert not {tuple(asked.ids) for asked in training} & {tuple(asked.ids) for asked in held_out}
    # Part 7 picks its reward model by these: it must not have been picked for the prompts that we measure by.
    picked_by = {made.prompt for made in instructions.make_instructions(128, 1000, True, kinds=("story",))}
    assert sum(asked.instruction.prompt in picked_by for asked in held_out) < 8


def test_prompts_follow_from_seed_and_iteration(bpe: BPETokenizer, tmp_path: Path) -> None:
    """The same again, others in another iteration or with another seed; the held-out ones are always the same."""
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": f"Tell me of {i}."} for i in range(120)])
    for source in ("stories", str(file)):
        prompts, again, other = (environment.Prompts(source, bpe, 60, seed) for seed in (0, 0, 1))
        again.draw(7, 5)  # what was drawn before does not matter
        assert prompts.draw(10, 3) == again.draw(10, 3)
        assert prompts.draw(10, 3) != prompts.draw(10, 4) and prompts.draw(10, 3) != other.draw(10, 3)
        assert prompts.held_out(6) == other.held_out(6)
    assert len({tuple(asked.ids) for asked in prompts.draw(100, 0)}) == 100  # none twice, if there are enough
    assert len(prompts.draw(500, 0)) == 500
    kept = {tuple(asked.ids) for asked in prompts.held_out(100)}
    assert 0 < len(kept) < 20 and not kept & {tuple(asked.ids) for asked in prompts.draw(500, 1)}
    assert prompts.gold(5) == [] and prompts.held_out(1)[0].instruction is None
    gold = environment.Prompts("stories", bpe, 60, 0).gold(200)
    assert gold[0][1][-1] == bpe.special_tokens["<|end|>"] and len(gold) == 200
    sums = [answer for _, answer in gold if re.fullmatch(r"\d+ [+-] \d+ = \d+\.", bpe.decode(answer[:-1]))]
    assert 50 < len(sums) < 190  # all kinds: what is forgotten is not only stories


def test_seeds_of_different_uses_differ() -> None:
    """No sum or shift of numbers gives the seed of another use; negative ones are fine."""
    seeds = [environment.seed_of(a, b, c) for a in range(4) for b in range(3) for c in range(-1, 6)]
    assert len(set(seeds)) == len(seeds)
    assert environment.seed_of(1, 2) == environment.seed_of(1, 2)
    torch.Generator().manual_seed(max(seeds))


def test_room_for_prompts() -> None:
    """What answers leave; a window leaves all; too little is refused."""
    config = GPTConfig(vocab_size=300, block_size=80)
    assert environment.room_for_prompts(config, 20) == 60
    assert environment.room_for_prompts(replace(config, window=16), 200) == 80
    with pytest.raises(UserError, match="that leaves 10 to a prompt; give 64 or less"):
        environment.room_for_prompts(config, 70)


# === who judges ===


@pytest.fixture
def world(files: dict[str, Path]) -> tuple[Policy, "environment.Environment", "environment.Prompts"]:
    """A policy, its environment, and prompts."""
    some, reference, judge, made_by = environment.load_models(files["base"], files["reward"], PPOConfig(), CPU)
    return (
        some,
        environment.Environment(reference, judge, made_by, 1.0, 20, 5),
        environment.Prompts("stories", made_by, 60, 0),
    )


def test_yardstick_by_hand(world: tuple) -> None:
    """After it, the same answers have mean 0 and variance 1; the judge sees the ids as drawn; equal rewards are 0."""
    some, env, prompts = world
    asked = prompts.draw(12, -1)
    answered, rewards = env.measure(asked, 3)
    drawn = env.answer(env.reference, asked, 3)
    raw = reward.rewards(env.reward_model, drawn.prompts, drawn.responses)
    assert (env.mean, env.std) == pytest.approx((raw.mean(), raw.std()), rel=1e-5)
    torch.testing.assert_close(env.judge(drawn), torch.tensor((raw - raw.mean()) / raw.std()).float())
    assert torch.equal(answered.idx, drawn.idx) and torch.allclose(rewards, env.judge(drawn))
    env.reward_model.head.weight.zero_()
    env.measure(asked, 3)
    assert env.std == 1.0
    assert not any(p.requires_grad for model in (env.reference, env.reward_model) for p in model.parameters())
    assert all(p.requires_grad for p in some.parameters())


def test_processes_draw_what_one_would(world: tuple) -> None:
    """The second half of the rows, with the random numbers of the first half skipped, gets the same answers."""
    some, env, prompts = world
    asked = prompts.draw(8, 0)
    whole, half = env.answer(some, asked, 5), env.answer(some, asked[4:], 5, skip=4)
    assert half.responses == whole.responses[4:] and len({tuple(ids) for ids in whole.responses}) == 8


def test_chance_is_switched_off(bpe: BPETokenizer) -> None:
    """In training mode, a model with dropout, noise and a capacity computes what it computes in evaluation mode."""
    shape = {"dropout": 0.5, "n_expert": 4, "capacity_factor": 0.5, "router_noise": 1.0, "n_layer": 2}
    some, idx = small_model(bpe, **shape), torch.randint(0, 300, (3, 11))
    expected = some.eval()(idx)[0]
    assert not torch.equal(some.train()(idx)[0], expected)
    environment.switch_off_chance(some)
    assert torch.equal(some.train()(idx)[0], expected)


def test_refresh(bpe: BPETokenizer) -> None:
    """A copy gets all parameters and buffers."""
    source, target = (Policy(small_model(bpe, seed, n_expert=4)) for seed in (0, 1))
    source.trunk.blocks[0].mlp.balance_bias += 1
    environment.refresh(target, source)
    for (name, a), (_, b) in zip(source.state_dict().items(), target.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# === from answers to advantages ===


def test_answers_are_cut_by_hand() -> None:
    """Behind the token at which the added log-ratio exceeds the limit; one that falls again stays cut."""
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True] * 5, [True] + [False] * 4])
    logp = torch.tensor([[1.0, 1, 1, 1, 1], [0.5, 0.5, 0.5, 9, 9], [3, -9, 1, 1, 1], [9, 9, 9, 9, 9]])
    ref = torch.zeros_like(logp)
    kept = experience.cut_answers(mask, logp, ref, 2.0)
    # 1, 2, 3 > 2: the third token exceeds the limit and is the last. 0.5, 1, 1.5: none does. 3 > 2 at once.
    assert kept.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert torch.equal(experience.cut_answers(mask, logp, ref, math.inf), mask)
    assert torch.equal(experience.cut_answers(mask, ref, logp, 2.0)[:2], mask[:2])  # nearer than the reference itself


def test_whitening_alone_is_ppos() -> None:
    """Bit for bit; a token that is masked counts for nothing, whatever stands there."""
    mask = torch.rand(4, 9) < 0.6
    x = torch.randn(4, 9).masked_fill(~mask, math.nan)
    assert torch.equal(experience.whiten_all(x, mask), ppo.whiten(x, mask))


def test_experience_by_hand(world: tuple) -> None:
    """Rewards, cuts, advantages and returns equal loops over tokens."""
    some, env, prompts = world
    torch.nn.init.normal_(some.value_head.weight)
    for parameter in some.trunk.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # away from the reference
    drawn = env.answer(some, prompts.draw(6, 0), 0)
    settings = PPOConfig(gamma=0.9, lam=0.7, answer_kl=0.5, end_penalty=2.0, reward_clip=0.8)
    rewards, ref = torch.randn(6), env.reference_logp(drawn)
    rows = [torch.arange(6)]
    found = experience.make_experience(some, drawn, rewards, ref, rows, 0.3, settings)
    scored = rollout.score_tokens(some, drawn, 1.0)
    expected, cut = [], 0
    for b in range(6):
        n = len(drawn.responses[b])
        k1 = [(scored.logp[b, t] - ref[b, t]).item() for t in range(n)]
        total, last = 0.0, n - 1
        for t in range(n):
            total += k1[t]
            if total > 0.5:
                last = t
                break
        cut += last < n - 1
        r = [-0.3 * k for k in k1[: last + 1]]
        r[last] += min(max(rewards[b].item(), -0.8), 0.8) - (0.0 if drawn.ended[b] else 2.0)
        v = [*scored.values[b, : last + 1].tolist(), 0.0]
        deltas = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(last + 1)]
        row = [sum((0.9 * 0.7) ** (u - t) * deltas[u] for u in range(t, last + 1)) for t in range(last + 1)]
        assert found.mask[b].sum() == last + 1
        returns = [advantage + value for advantage, value in zip(row, v[:-1], strict=True)]
        assert found.returns[b, : last + 1].tolist() == pytest.approx(returns, abs=1e-4)
        outcome = [sum(0.9 ** (u - t) * r[u] for u in range(t, last + 1)) for t in range(last + 1)]
        assert found.outcome[b, : last + 1].tolist() == pytest.approx(outcome, abs=1e-4)
        expected += row
    assert 0 < cut
    expected = np.array(expected)
    whitened = (expected - expected.mean()) / expected.std()
    assert found.advantages[found.mask].tolist() == pytest.approx(whitened.tolist(), abs=1e-3)
    assert torch.equal(found.targets(rows[0]) == -100, ~found.mask)
    assert torch.equal(found.targets(rows[0])[found.mask], drawn.response[found.mask])
    part = found.rows(torch.tensor([4, 1]))
    assert part.rollout.responses == [drawn.responses[4], drawn.responses[1]]
    assert torch.equal(part.returns, found.returns[[4, 1]]) and torch.equal(part.rewards, rewards[[4, 1]])


def test_rows_are_shared_out_alike(world: tuple) -> None:
    """The minibatches of two processes are together those of one that has all rows; every row is in one of them."""
    alone = experience.split_rows(12, 3, 1, CPU)
    halves = experience.split_rows(6, 3, 2, CPU)
    for whole, half in zip(alone, halves, strict=True):
        assert sorted(whole.tolist()) == sorted(half.tolist() + [row + 6 for row in half.tolist()])
    assert sorted(torch.cat(alone).tolist()) == list(range(12))
    with pytest.raises(ValueError, match="7 rows cannot be shared out over 2 minibatches"):
        experience.split_rows(7, 2, 1, CPU)
    order = list(experience.minibatch_order(5, 4, 0))
    assert order[:4] == [0, 1, 2, 3] and all(sorted(order[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 20, 4))
    assert order != [0, 1, 2, 3] * 5 and order == list(experience.minibatch_order(5, 4, 0))


# === numbers ===


def test_numbers_of_answers_by_hand(world: tuple) -> None:
    """Means, sums and scores of each answer alone; the KL is never negative."""
    some, env, prompts = world
    for parameter in some.trunk.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    asked = prompts.held_out(7)
    drawn = env.answer(some, asked, environment.HELD_OUT_SEED)
    scored, ref = rollout.score_tokens(some, drawn, 1.0), env.reference_logp(drawn)
    found = train.evaluate(some, env, asked, [])
    rows = [slice(0, len(ids)) for ids in drawn.responses]
    k3 = [sum(math.exp(d) - 1 - d for d in (ref[b, n] - scored.logp[b, n]).tolist()) for b, n in enumerate(rows)]
    totals = [
        rules.score(a.instruction, env.tokenizer.decode(ids), bool(end)).total
        for a, ids, end in zip(asked, drawn.responses, drawn.ended, strict=True)
    ]
    assert found["kl_to_reference"] == pytest.approx(np.mean(k3), rel=1e-3) and found["kl_to_reference"] > 0
    assert found["rule_score"] == pytest.approx(np.mean(totals))
    assert found["response_length"] == pytest.approx(np.mean([len(ids) for ids in drawn.responses]))
    assert found["ended"] == drawn.ended.float().mean().item()
    assert found["entropy"] == pytest.approx(
        np.mean([scored.entropy[b, n].mean().item() for b, n in enumerate(rows)]), rel=1e-4
    )
    assert found["reward"] == pytest.approx(env.judge(drawn).mean().item(), abs=1e-5)
    assert found["rule_score_low"] <= found["rule_score"] <= found["rule_score_high"]
    assert train.evaluate(some, env, asked, []) == found  # the same random numbers again
    assert train.evaluate(env.reference, env, asked, [])["kl_to_reference"] == 0
    nobody = [environment.Asked(a.ids) for a in asked]
    assert "rule_score" not in train.evaluate(some, env, nobody, [])


def test_gold_loss_is_that_of_each_answer_alone(bpe: BPETokenizer, world: tuple) -> None:
    """In nats per token and bits per byte, in batches of any size, also where an answer is longer than the context."""
    some, _, prompts = world
    gold = prompts.gold(9)
    found = watch.gold_loss(some, gold, bpe, 4)
    nats = n = 0.0
    for prompt, answer in gold:
        answer = answer[: 81 - len(prompt)]
        logp = some.trunk.eval()(torch.tensor([prompt + answer[:-1]]))[0].log_softmax(dim=-1)[0]
        nats -= sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        n += len(answer)
    assert found["val_loss"] == pytest.approx(nats / n, rel=1e-4)
    lengths = bpe.byte_lengths()
    n_bytes = sum(lengths[token] for prompt, answer in gold for token in answer[: 81 - len(prompt)])
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    assert max(len(prompt) + len(answer) for prompt, answer in gold) > 81  # one was cut
    assert watch.gold_loss(some, [], bpe) == {}


def test_tally() -> None:
    """Means weighted by the number of tokens, not means of means."""
    tally = watch.Tally()
    tally.add(1, a=torch.tensor(4.0), b=torch.tensor(0.5))
    tally.add(3, a=torch.tensor(0.0), b=torch.tensor(0.5))
    assert tally.means() == {"a": 1.0, "b": 0.5}


# === the run ===


def test_a_run_leaves_what_it_says(tmp_path: Path, files: dict[str, Path], bpe: BPETokenizer) -> None:
    """Checkpoints, a picture, numbers before and after; the policy's checkpoint writes text."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.tqdm, "write", said.append)
        saved = run(tmp_path / "out", files)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    both = ("reward", "rule_score", "rule_score_low", "rule_score_high", "kl_to_reference", "val_loss", "bits_per_byte")
    names = [f"{name}_{when}" for name in both for when in ("before", "after")]
    names += ["kl_to_reference", "tokens_per_second", "rollout_tokens_per_second", "seconds", "parameters", "val_loss"]
    assert set(names) <= metrics.keys() and all(math.isfinite(value) for value in metrics.values())
    assert metrics["kl_to_reference_before"] == 0 < metrics["kl_to_reference_after"]
    assert metrics["rollout_tokens_per_second"] > metrics["tokens_per_second"] > 0
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 10_000
    history = saved["progress"]["history"]
    watched = ("reward", "rule_score", "kl_to_reference", "approx_kl", "clip_fraction", "entropy", "gradient_norm")
    watched += ("explained_variance", "value_loss", "response_length", "ended", "beta", "optimizer_steps")
    assert len(history) == 4 and all(set(watched) <= numbers.keys() for numbers in history)
    assert history[0]["kl_to_reference"] == 0 != history[0]["explained_variance"]
    assert metrics["explained_variance"] == history[-1]["explained_variance"]
    unfitted = run(tmp_path / "unfitted", files, fit_values=False, steps=1)["progress"]["history"]
    assert unfitted[0]["explained_variance"] == 0  # values of 0
    assert [step for step, _ in saved["progress"]["val_losses"]] == [0, 2]
    best = checkpoint.read_checkpoint(tmp_path / "out" / "best.pt")
    assert [step for step, _ in best["progress"]["val_losses"]] == [0, 2, 4]
    assert sum(line.startswith("step ") for line in said) == 3
    trained, _ = generate.load_checkpoint(tmp_path / "out" / "best.pt", CPU)
    before, _ = generate.load_checkpoint(files["base"], CPU)
    assert (trained.wte.weight - before.wte.weight).abs().max() > 1e-3
    found = run_script("part8_ppo/generate.py", "--checkpoint", tmp_path / "out" / "best.pt", "--max_new_tokens", "5")
    assert found.returncode == 0 and found.stdout.strip(), found.stderr


def test_values_are_fitted_after_each_iteration(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what came of its answers; the head that the next iteration begins with is the fitted one."""
    seen, original = [], experience.fit_values

    def note(some: Policy, drawn: object, wanted: torch.Tensor, batch_size: int, shared: bool) -> None:
        original(some, drawn, wanted, batch_size, shared)
        if shared:  # not the one before the first iteration
            seen.append((drawn, wanted, some.value_head.weight.clone()))

    monkeypatch.setattr(environment, "fit_values", note)
    saved = run(tmp_path / "out", files, end_penalty=3.0, beta=0.0, steps=3)
    assert len(seen) == 3 and torch.equal(saved["model"]["value_head.weight"], seen[-1][2])
    for drawn, wanted, _ in seen:  # without a KL and with gamma 1, all tokens of an answer get its score
        assert all(len(set(row[: len(ids)].tolist())) == 1 for row, ids in zip(wanted, drawn.responses, strict=True))
        assert wanted[~drawn.ended, 0].mean() < -1.5  # about 0 from the judge, and the penalty
    run(tmp_path / "off", files, fit_values=False, steps=1)
    assert len(seen) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "minibatches": 2, "critic": True, "answer_kl": 0.05, "entropy_weight": 0.01},
        {"recompute": True, "temperature": 0.7, "optimizer": "muon"},
        {"experts": True, "minibatches": 4},
    ],
    ids=["plain", "pieces and a critic", "recompute", "experts"],
)
def test_first_ratio_is_exactly_one(
    tmp_path: Path, files: dict[str, Path], bpe: BPETokenizer, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first minibatch of every iteration, before any step: bit for bit, with gradients, whatever the model."""
    if settings.pop("experts", False):
        shape = {"n_expert": 4, "capacity_factor": 0.5, "router_noise": 1.0, "dropout": 0.2, "n_layer": 2}
        files = files | {"base": save(tmp_path / "moe.pt", small_model(bpe, **shape), bpe)}
    original, seen, pieces = train.batch_loss, [], settings.get("accumulate", 1)

    def spy(model: torch.nn.Module, x: torch.Tensor, *args: object, **more: object) -> torch.Tensor:
        loss = original(model, x, *args, **more)
        held = more["experience"]
        if sum(some is held for some, _ in seen) < pieces:  # the first minibatch of an iteration
            now = rollout.score_tokens(model, held.rollout.rows(x), more["settings"].temperature)
            assert torch.equal(now.logp, held.logp[x]) and torch.equal(now.values, held.values[x])
            assert now.logp.requires_grad
            seen.append((held, more["seen"].means()))
        return loss

    monkeypatch.setattr(train, "batch_loss", spy)
    history = run(tmp_path / "out", files, **settings)["progress"]["history"]
    assert len(seen) == 4 * pieces
    for _, numbers in seen:
        assert numbers["approx_kl"] == 0 and numbers["clip_fraction"] == 0 and numbers["value_clip_fraction"] == 0
    assert all(numbers["approx_kl"] > 0 for numbers in history)  # and moves away from 1 afterwards


def test_loss_and_gradient_of_a_minibatch(world: tuple) -> None:
    """Cut into pieces, they are those of all its tokens at once; and those of the formula written out."""
    some, env, prompts = world
    drawn = env.answer(some, prompts.draw(8, 0), 0)
    settings = PPOConfig(rollouts=8, minibatches=1, accumulate=4, entropy_weight=0.1, value_weight=0.3)
    rows = experience.split_rows(8, 1, 4, CPU)
    held = experience.make_experience(some, drawn, torch.randn(8), env.reference_logp(drawn), rows, 0.1, settings)
    torch.nn.init.normal_(some.value_head.weight, std=0.1)
    for parameter in some.trunk.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # ratios away from 1, some clipped
    scaler, gradients = devices.make_scaler(CPU, torch.float32), []
    for pieces in (1, 4):
        some.zero_grad()
        tally = watch.Tally()
        loss_of = partial(train.batch_loss, settings=settings, experience=held, seen=tally)
        batch = rows[0], held.targets(rows[0])
        loss = optim.accumulate_gradients(some, loss_of, *batch, pieces, torch.float32, scaler)
        gradients.append([parameter.grad.clone() for parameter in some.parameters()])
        seen = tally.means()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    some.zero_grad()
    now, m = rollout.score_tokens(some, drawn, 1.0), held.mask
    ratio, A = (now.logp - held.logp)[m].exp(), held.advantages[m]
    clipped = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2))
    near = held.values[m] + (now.values - held.values)[m].clamp(-0.2, 0.2)
    errors = torch.maximum((now.values[m] - held.returns[m]) ** 2, (near - held.returns[m]) ** 2)
    expected = clipped.mean() + 0.3 * 0.5 * errors.mean() - 0.1 * now.entropy[m].mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for parameter, gradient in zip(some.parameters(), gradients[0], strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)
    assert seen["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-3)
    assert 0 < seen["clip_fraction"] < 1


def flat(value: object) -> object:
    """Tensors as bytes, so that == compares them bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: flat(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [flat(v) for v in value]
    return value


def assert_same_run(a: dict[str, object], b: dict[str, object]) -> None:
    """Same numbers, weights, optimizer and random state, to the last bit."""
    for name in ("step", "history", "val_losses", "before", "beta", "yardstick"):
        assert flat(a["progress"][name]) == flat(b["progress"][name]), name
    for name in ("model", "optimizers"):
        assert flat(a[name]) == flat(b[name]), name
    assert flat(a["random"]["torch"]) == flat(b["random"]["torch"])


def test_early_stop_takes_no_stray_step(tmp_path: Path, files: dict[str, Path]) -> None:
    """With a limit that any step exceeds, three epochs are one step: the very run of one epoch, moments included."""
    once = run(tmp_path / "once", files, minibatches=1, epochs=1, stop_kl=math.inf)
    stopped = run(tmp_path / "stopped", files, minibatches=1, epochs=3, stop_kl=1e-12)
    free = run(tmp_path / "free", files, minibatches=1, epochs=3, stop_kl=math.inf)
    assert [numbers["optimizer_steps"] for numbers in stopped["progress"]["history"]] == [1, 1, 1, 1]
    assert [numbers["optimizer_steps"] for numbers in free["progress"]["history"]] == [3, 3, 3, 3]
    assert flat(stopped["model"]) == flat(once["model"]) != flat(free["model"])
    assert flat(stopped["optimizers"]) == flat(once["optimizers"])
    assert all(numbers["approx_kl"] > 1e-12 for numbers in stopped["progress"]["history"])


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2, "critic": True, "optimizer": "muon", "kl_target": 0.01, "kl_horizon": 20, "answer_kl": 0.1}],
    ids=["plain", "everything"],
)
def test_half_and_half_equals_whole(
    tmp_path: Path, files: dict[str, Path], settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four iterations, and two of them twice, killed in between: bit for bit, and the yardstick is not taken again."""
    whole = run(tmp_path / "whole", files, keep=5, **settings)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tmp_path / "whole" / "step_0000002.pt", half / "latest.pt")  # what a killed run leaves
    torch.manual_seed(99)  # the second process has drawn who knows what
    monkeypatch.setattr(environment.Environment, "measure", lambda *args: pytest.fail("measured again"))
    assert_same_run(whole, run(half, files, resume="auto", **settings))
    ends = [checkpoint.read_checkpoint(folder / "best.pt") for folder in (tmp_path / "whole", half)]
    assert_same_run(*ends)
    if settings:
        assert whole["progress"]["beta"] != PPOConfig().beta


def test_resuming_another_run(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another beta is told of and taken; a critic cannot be added; more steps are fine, fewer are not."""
    said: list[str] = []
    monkeypatch.setattr(train.tqdm, "write", said.append)
    run(tmp_path, files, steps=2, beta=0.05)
    found = run(tmp_path, files, steps=3, resume="auto", beta=0.7)
    assert "    unlike before: beta 0.05 (this run: 0.7)" in said
    assert [numbers["beta"] for numbers in found["progress"]["history"]] == [0.05, 0.05, 0.7]
    with pytest.raises(UserError, match=r"critic False \(this run: True\)"):
        run(tmp_path, files, steps=4, resume="auto", critic=True)
    with pytest.raises(UserError, match="is of step 3 already; give more"):
        run(tmp_path, files, steps=1, resume="auto")


def test_a_run_that_is_stopped_has_no_result(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not if it was stopped before: what looks like a result would be taken for one."""
    whole = run(tmp_path / "whole", files)
    for first, last in ((0, 2), (2, 3)):
        steps = iter(range(first, 9))  # it is asked once a step
        with monkeypatch.context() as patch:
            patch.setattr(train.StopRequest, "asked", lambda self, device, steps=steps, last=last: next(steps) == last)
            config = make_config(tmp_path / "half", files, resume="auto")
            metrics = train.train(config, devices.Processes(), CPU)
        assert "reward_after" not in metrics and not (tmp_path / "half" / "metrics.json").exists()
        assert checkpoint.read_checkpoint(tmp_path / "half" / "latest.pt")["progress"]["step"] == last
    assert_same_run(whole, run(tmp_path / "half", files, resume="auto"))
    assert (tmp_path / "half" / "metrics.json").is_file()


def test_prompts_of_a_run(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick and all iterations see training prompts, evaluations held-out ones, and nobody the others."""
    asked: dict[str, list] = {"measure": [], "answer": [], "evaluate": []}
    original = environment.Environment.answer, environment.Environment.measure, train.evaluate
    inside: list[str] = []

    def note(name: str, function: object, place: int) -> object:
        def wrapped(*args: object, **more: object) -> object:
            asked[inside[-1] if inside else name] += args[place]
            inside.append(name)
            try:
                return function(*args, **more)
            finally:
                inside.pop()

        return wrapped

    monkeypatch.setattr(environment.Environment, "answer", note("answer", original[0], 2))
    monkeypatch.setattr(environment.Environment, "measure", note("measure", original[1], 1))
    monkeypatch.setattr(train, "show_answers", lambda *args: None)  # of a held-out prompt, after the end
    monkeypatch.setattr(train, "evaluate", note("evaluate", original[2], 2))
    run(tmp_path, files)
    sides = {
        name: {stories.is_held_out(f"{a.instruction.asked['hero']}, {a.instruction.asked['thing']}") for a in some}
        for name, some in asked.items()
    }
    assert sides == {"measure": {False}, "answer": {False}, "evaluate": {True}}
    assert len(asked["answer"]) == 4 * 8 and len(asked["measure"]) == 2 * 6


def test_data_without_rules(tmp_path: Path, files: dict[str, Path]) -> None:
    """Prompts of a file: no rule score, no gold answers, and a picture all the same."""
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": f"Tell me of {i}."} for i in range(100)])
    found = run(tmp_path / "out", files, data=str(file), steps=2)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "reward_after" in metrics and not {"rule_score", "rule_score_before", "val_loss"} & metrics.keys()
    assert "rule_score" not in found["progress"]["history"][0]
    assert (tmp_path / "out" / "learning_curve.png").is_file()


def test_it_learns(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge who likes a quarter of the tokens gets more of them, and a strong leash prevents it."""

    def share(model: object, drawn: object, batch_size: int) -> torch.Tensor:
        return torch.tensor([sum(i < 100 for i in ids) / len(ids) for ids in drawn.responses])

    monkeypatch.setattr(environment, "judge", share)
    settings = {"steps": 12, "rollouts": 64, "lr": 3e-2, "schedule": "constant", "norm_prompts": 32, "eval_every": 12}
    settings |= {"end_penalty": 0.0, "stop_kl": math.inf, "value_weight": 0.01}
    free = run(tmp_path / "free", files, beta=0.0, **settings)["progress"]["history"]
    leashed = run(tmp_path / "leashed", files, beta=1.0, **settings)["progress"]["history"]
    assert free[-1]["reward"] > free[0]["reward"] + 2
    assert leashed[-1]["kl_to_reference"] < free[-1]["kl_to_reference"] / 3
    assert leashed[-1]["reward"] < free[-1]["reward"] - 1


def torchrun(*args: object, timeout: float = 170) -> subprocess.CompletedProcess:
    """Start a script as two processes; if they do not end in time, torchrun is asked to end them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    with subprocess.Popen(
        [*command, *map(str, args)], env=os.environ | QUIET, stdout=-1, stderr=-1, text=True, cwd=ROOT
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_two_processes_equal_one(tmp_path: Path, files: dict[str, Path], more: list[str]) -> None:
    """With half the rows each: the numbers of one process and its weights; sharded, a whole copy draws."""
    settings = {"kl_target": 0.1, "kl_horizon": 50.0}
    alone = run(tmp_path / "one", files, **settings)
    both = TINY | TINY_PPO | settings | files | {"rollouts": 4}
    flags = [text for name, value in both.items() for text in (f"--{name}", str(value))]
    done = torchrun(ROOT / "part8_ppo/train.py", "--out", tmp_path / "two", *flags, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote best.pt") == 1
    two = checkpoint.read_checkpoint(tmp_path / "two" / "latest.pt")
    for a, b in zip(alone["progress"]["history"], two["progress"]["history"], strict=True):
        for name in a.keys() - {"explained_variance"}:  # that one is of the first process's answers
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    for name, weights in alone["model"].items():
        torch.testing.assert_close(two["model"][name], weights, atol=1e-4, rtol=0)
    assert two["progress"]["yardstick"] == pytest.approx(alone["progress"]["yardstick"], rel=1e-6)


# === what cannot be ===


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rollouts": 0}, "--rollouts 0 is not 1 or more"),
        ({"norm_prompts": 0}, "--norm_prompts 0 is not 1 or more"),
        ({"steps": -1}, "--steps -1 is not 0 or more"),
        ({"eval_prompts": 0}, "--eval_prompts 0 is not 1 or more"),
        ({"beta": -0.1}, "--beta -0.1 is not 0 or more"),
        ({"beta": math.nan}, "--beta nan is not 0 or more"),
        ({"end_penalty": math.inf}, "--end_penalty inf is not 0 or more"),
        ({"temperature": 0.0}, "--temperature 0.0 is not above 0"),
        ({"temperature": math.inf}, "--temperature inf is not above 0"),
        ({"ratio_clip": 0.0}, "--ratio_clip 0.0 is not above 0"),
        ({"stop_kl": 0.0}, "--stop_kl 0.0 is not above 0"),
        ({"answer_kl": math.nan}, "--answer_kl nan is not above 0"),
        ({"gamma": 1.1}, "--gamma 1.1 is outside [0, 1]"),
        ({"lam": -0.1}, "--lam -0.1 is outside [0, 1]"),
        ({"rollouts": 10, "minibatches": 2, "accumulate": 2}, "--rollouts 10 cannot be shared out over 2 minibatches"),
        ({"kl_target": 3.0, "beta": 0.0}, "--kl_target 3.0 with --beta 0"),
        ({"clip": 0.0}, "--clip 0.0 is not above 0"),
        ({"final_lr": 2.0}, "--final_lr 2.0"),
        ({"out": Path(__file__)}, "is a file"),
    ],
)
def test_settings_with_which_nothing_can_be_trained(settings: dict, problem: str) -> None:
    """Each is named with its value, before a model is looked for."""
    of_ppo = {name: value for name, value in settings.items() if hasattr(PPOConfig(), name)}
    others = {name: value for name, value in settings.items() if name not in of_ppo}
    with pytest.raises(UserError, match=re.escape(problem)):
        train.check_settings(train.Config(ppo=PPOConfig(**of_ppo), **others))
    train.check_settings(train.Config())
    train.check_settings(train.Config(ppo=PPOConfig(ratio_clip=math.inf, stop_kl=math.inf, value_clip=0.0, beta=0.0)))


@pytest.mark.slow
def test_mistakes_end_in_one_line(tmp_path: Path, files: dict[str, Path]) -> None:
    """With status 2 and without a traceback."""
    given = ["--base", files["base"], "--reward", files["reward"], "--max_new_tokens", "20", "--out", tmp_path / "a"]
    for args, problem in (
        (["--base", "no.pt"], "no.pt: no such file; train one with python part8_ppo/train.py"),
        ([*given[:2], "--reward", "no.pt"], "no.pt: no such file"),
        ([*given, "--data", "no.jsonl"], "--data no.jsonl: no such file"),
        ([*given, "--resume", "no.pt"], "no.pt: no such checkpoint"),
        (given[:4], "--max_new_tokens 192: in the context of 80 tokens"),
    ):
        found = run_script("part8_ppo/train.py", *args)
        assert found.returncode == 2 and found.stdout == "", found.stderr
        assert found.stderr.startswith(f"error: {problem}") and found.stderr.count("\n") == 1, found.stderr


@pytest.mark.slow
def test_smoke_from_given_models(tmp_path: Path, files: dict[str, Path]) -> None:
    """A tiny run of the whole script leaves what a whole one leaves."""
    args = ("--smoke", "--out", tmp_path, "--base", files["base"], "--reward", files["reward"])
    found = run_script("part8_ppo/train.py", *args)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "wrote best.pt" in found.stdout and (tmp_path / "metrics.json").is_file()


def test_copies_share_nothing(files: dict[str, Path]) -> None:
    """Policy, reference and critic begin equal, and are changed one by one."""
    some, reference, _, _ = environment.load_models(files["base"], files["reward"], PPOConfig(critic=True), CPU)
    before = copy.deepcopy(reference.state_dict())
    for parameter in some.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), reference.state_dict().values(), strict=True))
    assert {id(p) for p in some.trunk.parameters()}.isdisjoint({id(p) for p in some.critic.parameters()})


# === the sweep ===


def sweep(out: Path, files: dict[str, Path], **settings: object) -> dict[str, float]:
    """A tiny sweep; its numbers."""
    given = {"betas": (0.0, 0.5), "seeds": (0,), "device": "cpu", "smoke": True}
    kl_sweep.main(kl_sweep.Config(out=out, **(given | files | settings)))
    return json.loads((out / "metrics.json").read_text())


def test_sweep(
    tmp_path: Path, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each run once; what is there is not done again; a table, answers and a picture."""
    base = save(tmp_path / "base.pt", small_model(bpe, block_size=128), bpe)
    pad = bpe.special_tokens["<|pad|>"]
    judge = save(
        tmp_path / "judge.pt", RewardModel(small_model(bpe, 1, block_size=128), pad), bpe, causal=False, surprise=False
    )
    files = {"base": base, "reward": judge}
    found = sweep(tmp_path / "a", files)
    runs = sorted(folder.name for folder in (tmp_path / "a").glob("beta_*"))
    assert runs == ["beta_0.5_seed_0", "beta_0_seed_0"] and found["runs"] == 2
    for beta in ("0", "0.5"):
        metrics = json.loads((tmp_path / "a" / f"beta_{beta}_seed_0" / "metrics.json").read_text())
        assert found[f"reward_beta_{beta}"] == metrics["reward"]
        assert found[f"kl_to_reference_beta_{beta}"] == metrics["kl_to_reference"] > 0
        saved = checkpoint.read_checkpoint(tmp_path / "a" / f"beta_{beta}_seed_0" / "best.pt")
        assert saved["progress"]["history"][0]["beta"] == float(beta)
    assert {"reward_best_of_1", "rule_score_best_of_4"} <= found.keys()
    assert found["reward_best_of_1"] <= found["reward_best_of_2"] <= found["reward_best_of_4"]
    assert (tmp_path / "a" / "kl_sweep.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "the policy whose rule score fell most: beta" in printed and printed.count("    policy (reward ") == 2 + 3
    monkeypatch.setattr(kl_sweep, "train", lambda *args: pytest.fail("trained again"))
    assert sweep(tmp_path / "a", files) == found
    settings = kl_sweep.settings_of(kl_sweep.Config(out=tmp_path / "a"), 0.5, 0)
    with pytest.raises(UserError, match="has a run with --steps 2; give another --out"):
        kl_sweep.read_run(settings)
    monkeypatch.setattr(kl_sweep, "train", lambda *args: {})  # what a run returns that was asked to stop
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "b", files)
    for wrong in ({"betas": ()}, {"samples": 0}):
        with pytest.raises(UserError, match=r"give 1 or more|one of each at least"):
            sweep(tmp_path / "c", files, **wrong)


def test_best_of_n_of_the_reference(world: tuple) -> None:
    """One answer is the mean of all; the KL is log n - (n - 1) / n; the best of all is the best."""
    _, env, prompts = world
    found = kl_sweep.curve_of_best(env, prompts, 3, 6)
    assert found[0].tolist() == [1, 2, 4] and found[1].tolist() == pytest.approx(
        [0, math.log(2) - 1 / 2, math.log(4) - 3 / 4]
    )
    means = [
        env.judge(env.answer(env.reference, [asked] * 6, environment.seed_of(i))).mean().item()
        for i, asked in enumerate(prompts.held_out(3))
    ]
    assert found[2, 0] == pytest.approx(np.mean(means), abs=1e-4) and (np.diff(found[2]) > 0).all()


def test_how_far_a_run_falls() -> None:
    """From its highest rule score to its last; means over seeds."""
    runs = [
        kl_sweep.Run(0.1, seed, Path(), np.array([0.0, 2, 4]), np.array([0.0, 1, last]), np.array([0.5, 0.9, end]))
        for seed, last, end in ((0, 2.0, 0.6), (1, 4.0, 0.95))
    ]
    assert [run.fall() for run in runs] == pytest.approx([0.3, 0.0])
    found = kl_sweep.summarise(runs)
    assert found == pytest.approx(
        {"kl_to_reference": 4, "reward": 3, "rule_score_before": 0.5, "rule_score_peak": 0.925, "rule_score": 0.775}
    )
