"""Lesson 8.1: the policy gradient on a bandit, and what baseline, ratio and clip each do to it.

A bandit is the smallest thing that PPO can be used on: K arms, a policy that is a softmax over them, one draw, one
noisy reward. A response is a draw too, out of very many arms. Here there are so few that every expectation is a sum
over all of them, so that bias and variance are exact and not a matter of opinion.

    python part8_ppo/lesson1_policy_gradient.py     # 10 seconds on two CPU cores; five sections, and a figure

You should see draws find the gradient that nobody could compute otherwise; a baseline that changes nothing but the
spread; a ratio that makes old draws usable, until the policies are too far apart; a surrogate that promises more the
longer one climbs it while the true reward falls; and a clip that ends the climb in time.

References: Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
section 4 (REINFORCE); Greensmith et al. 2004, "Variance Reduction Techniques for Gradient Estimates in Reinforcement
Learning" (baselines); Schulman et al. 2017, "Proximal Policy Optimization Algorithms", sections 2 and 3.
"""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro

from ppo import masked_mean, ppo_policy_loss

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Take the policy gradient of a bandit apart."""

    n_arms: int = 8
    """K, arms; their mean rewards lie evenly in [0, 1]."""
    noise: float = 2.0
    """Standard deviation of a reward around its arm's mean."""
    n_draws: int = 32
    """Draws in a batch."""
    lr: float = 0.5
    """Length of a gradient step on the logits, in sections 4 and 5."""
    clip: float = 0.2
    """How far the ratio may go from 1."""
    n_runs: int = 300
    """Repetitions, side by side."""
    iterations: int = 40
    """Batches in section 5."""
    seed: int = 0
    """Seed of draws and noise."""
    out: Path = RUNS / "lesson1_policy_gradient"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


class Bandit(NamedTuple):
    """K arms, and the policy that the sections begin with."""

    means: torch.Tensor
    """(K,) mean reward of each arm."""
    noise: float
    """Standard deviation around it."""
    logits: torch.Tensor
    """(K,) of the policy."""


def make_bandit(n_arms: int, noise: float) -> Bandit:
    """A bandit, and a policy that is good already: it likes good arms, and bad ones are rare."""
    means = torch.linspace(0, 1, n_arms)
    return Bandit(means, noise, 5 * means + torch.cos(3.0 * torch.arange(n_arms)))


def draw_batch(
    logits: torch.Tensor, bandit: Bandit, n: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n arms from each of R policies, (R, K) -> arms (R, n) and rewards (R, n)."""
    arms = torch.multinomial(logits.softmax(dim=-1), n, replacement=True, generator=generator)
    return arms, bandit.means[arms] + bandit.noise * torch.randn(arms.shape, generator=generator)


def score_functions(logits: torch.Tensor) -> torch.Tensor:
    """Gradient of log pi(a) for the logits, for each arm a in a row: onehot(a) - pi, (K,) -> (K, K)."""
    return torch.eye(len(logits)) - logits.softmax(dim=0)


def true_gradient(logits: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Gradient of the expected reward J = sum over a of pi(a) means(a), by autograd, (K,) -> (K,)."""
    logits = logits.clone().requires_grad_(True)
    return torch.autograd.grad((logits.softmax(dim=0) * means).sum(), logits)[0]


# --- 1. the gradient out of draws ---


def show_gradient(bandit: Bandit, generator: torch.Generator) -> dict[str, float]:
    """The gradient from a sum over all arms, and from draws; and that of ppo_policy_loss where the ratio is 1."""
    pi, exact = bandit.logits.softmax(dim=0), true_gradient(bandit.logits, bandit.means)
    value = (pi * bandit.means).sum()
    by_hand = torch.tensor([p * (mean - value) for p, mean in zip(pi, bandit.means, strict=True)])  # pi (r - J)
    enumerated = (pi * bandit.means) @ score_functions(bandit.logits)  # E[r d log pi], (K,) @ (K, K) -> (K,)
    errors, columns = [], []
    for n in (100, 100_000):
        arms, rewards = draw_batch(bandit.logits[None], bandit, n, generator)
        logits = bandit.logits.clone().requires_grad_(True)
        logp = F.log_softmax(logits, dim=0)[arms]  # (1, n)
        (naive,) = torch.autograd.grad(-(rewards * logp).mean(), logits, retain_graph=True)  # REINFORCE
        loss, _ = ppo_policy_loss(logp, logp.detach(), rewards, torch.ones_like(arms, dtype=torch.bool), 0.2)
        (gradient,) = torch.autograd.grad(loss, logits)
        errors.append((naive - gradient).abs().max().item())
        columns.append(-gradient)
    assert max(errors) < 1e-6 and torch.allclose(by_hand, exact, atol=1e-6)
    assert torch.allclose(enumerated, exact, atol=1e-6)
    print(f"1. {len(pi)} arms, expected reward {value:.3f}: d J / d logit, exact, as a sum over arms, and from draws")
    print("   " + "".join(f"{name:>13s}" for name in ("pi", "mean reward", "exact", "sum", "100 draws", "100,000")))
    for row in zip(pi, bandit.means, exact, enumerated, *columns, strict=True):
        print("   " + "".join(f"{number:13.3f}" for number in row))
    print(f"   ppo_policy_loss, where every ratio is 1, has REINFORCE's gradient: largest difference {max(errors):.0e}")
    return {"expected_reward": value.item(), "gradient_length": exact.norm().item()} | {
        f"gradient_error_{n}": (column - exact).norm().item() for n, column in zip((100, 100_000), columns, strict=True)
    }


# --- 2. the baseline ---


def moments(bandit: Bandit, means: torch.Tensor, baseline: torch.Tensor | float) -> tuple[float, float]:
    """Bias and spread of one draw's (r - b) d log pi, by enumeration.

    Args:
        bandit: the policy and the noise.
        means: (K,) mean rewards.
        baseline: b, one number, or (K,) for one that looks at the arm that was drawn.

    Returns:
        Distance of its mean from the true gradient, and the square root of the sum of its variances.
    """
    pi, scores = bandit.logits.softmax(dim=0), score_functions(bandit.logits)  # (K,), (K, K)
    mean = (pi * (means - baseline)) @ scores  # (K,)
    square = (pi * ((means - baseline).square() + bandit.noise**2) * scores.square().sum(dim=1)).sum()
    bias = (mean - true_gradient(bandit.logits, means)).norm()
    return bias.item(), (square - mean.square().sum()).sqrt().item()


def compare_baselines(bandit: Bandit) -> dict[str, float]:
    """Constants that leave the mean alone, and one that is no constant and does not."""
    pi, size = bandit.logits.softmax(dim=0), score_functions(bandit.logits).square().sum(dim=1)  # |d log pi|^2, (K,)
    length = true_gradient(bandit.logits, bandit.means).norm()
    print(f"\n2. bias and spread of one draw's gradient, by baseline; the true one has the length {length:.3f}")
    print("                           rewards as they are        all 10 higher")
    print("                              bias   spread          bias   spread")
    metrics = {}
    for name in ("none", "expected reward", "best constant", "mean of the arm drawn"):
        line = []
        for means in (bandit.means, bandit.means + 10):
            best = (pi * means * size).sum() / (pi * size).sum()  # where d spread / d b = 0
            baselines = {"none": 0.0, "expected reward": (pi * means).sum(), "best constant": best}
            line += moments(bandit, means, baselines.get(name, means))
        print(f"   {name:22s}" + "{:9.3f}{:9.3f}     {:9.3f}{:9.3f}".format(*line))
        key = name.replace(" ", "_")
        metrics |= {f"bias_{key}": line[0], f"spread_{key}": line[1], f"spread_{key}_plus_10": line[3]}
    return metrics


# --- 3. the ratio ---


def reuse_draws(bandit: Bandit) -> dict[str, float]:
    """The gradient of a policy that has moved on, from draws of the old one: without and with the ratio, exactly."""
    old, metrics = bandit.logits.softmax(dim=0), {}
    rare = torch.zeros_like(bandit.means).index_fill(0, old.argmin(), 1.0)
    print("\n3. a policy that likes its rarest arm more by d, estimated from draws of the old one")
    print("                           bias, share of the length     spread     draws")
    print("        d     KL(new||old)   no ratio   with ratio      with ratio   worth")
    for distance in (0.0, 0.5, 1.0, 2.0, 4.0):
        logits = bandit.logits + distance * rare
        pi, exact, scores = logits.softmax(dim=0), true_gradient(logits, bandit.means), score_functions(logits)
        ratio, advantage = pi / old, bandit.means - (pi * bandit.means).sum()
        kl = (pi * ratio.log()).sum().item()
        without, weighted = (old * advantage) @ scores, (old * ratio * advantage) @ scores  # (K,) @ (K, K) -> (K,)
        bias = [((some - exact).norm() / exact.norm()).item() for some in (without, weighted)]
        second = ratio.square() * (advantage.square() + bandit.noise**2) * scores.square().sum(dim=1)
        spread = ((old * second).sum() - exact.square().sum()).sqrt().item()
        worth = 1 / (old * ratio.square()).sum().item()  # effective sample size of N draws, over N
        print(f"   {distance:6.1f} {kl:13.3f} {bias[0]:12.2f} {bias[1]:12.2f} {spread:14.2f} {worth:10.0%}")
        metrics |= {
            f"bias_no_ratio_{distance:g}": bias[0],
            f"bias_ratio_{distance:g}": bias[1],
            f"spread_ratio_{distance:g}": spread,
            f"worth_{distance:g}": worth,
        }
    return metrics


# --- 4. the clip ---


def loss_by_hand(ratio: float, advantage: float, clip: float) -> tuple[float, float]:
    """The clipped loss of one draw in plain Python, and its derivative for log pi, which is minus A r or 0."""
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    cut = -advantage * clipped > -advantage * ratio
    return (-advantage * clipped, 0.0) if cut else (-advantage * ratio, -advantage * ratio)


def show_clip(clip: float) -> dict[str, float]:
    """Ratio by advantage: where the clip cuts the gradient off."""
    print(f"\n4. one draw: loss and its derivative for log pi, clip {clip:g}; what ppo.py says is the same")
    print("     ratio    A = +1: loss  derivative      A = -1: loss  derivative")
    difference = 0.0
    for ratio in (0.5, 0.9, 1.0, 1.1, 1.5):
        line = []
        for advantage in (1.0, -1.0):
            expected = loss_by_hand(ratio, advantage, clip)
            logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
            mask = torch.ones(1, 1, dtype=torch.bool)
            loss, _ = ppo_policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip)
            found = loss.item(), torch.autograd.grad(loss, logp)[0].item()
            difference = max(difference, *(abs(a - b) for a, b in zip(expected, found, strict=True)))
            line += expected
        print("   {:7.1f} {:13.2f} {:11.2f} {:17.2f} {:11.2f}".format(ratio, *(number + 0.0 for number in line)))
    print(f"   largest difference to ppo_policy_loss: {difference:.0e}")
    assert difference < 1e-6
    return {"clip_difference": difference}


LOSSES = ("no ratio", "ratio", "ratio and clip")
"""What can be done with a batch that was drawn a while ago."""


def batch_loss(
    name: str, logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of LOSSES, all (R, n), summed over R runs, each the mean over its draws; and the share of draws cut off."""
    mask = torch.ones_like(logp, dtype=torch.bool)
    if name == "no ratio":
        loss, share = -masked_mean(advantages * logp, mask), torch.zeros(())
    else:
        loss, share = ppo_policy_loss(logp, old, advantages, mask, clip if "clip" in name else math.inf)
    return loss * len(logp), share


def climb(
    name: str, logits: torch.Tensor, bandit: Bandit, config: Config, steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw a batch for each of R runs, and take steps on it.

    Args:
        name: one of LOSSES.
        logits: (R, K), where they begin.
        bandit: what is drawn from.
        config: n_draws, lr and clip.
        steps: on the one batch.
        generator: of draws and noise.

    Returns:
        (R, K) logits, and after 0, 1, .. steps the means over runs of: `promised`, the old draws weighted by the ratio;
        `reward`, which is the true J; `kl` of old and new policy; `cut`, the share of draws with no gradient.
    """
    arms, rewards = draw_batch(logits, bandit, config.n_draws, generator)
    middle = rewards.mean(dim=1, keepdim=True)
    start = F.log_softmax(logits, dim=1)
    old, seen = start.gather(1, arms), {"promised": [], "reward": [], "kl": [], "cut": []}
    for step in range(steps + 1):
        logits = logits.detach().requires_grad_(True)
        all_logp = F.log_softmax(logits, dim=1)  # (R, K)
        logp = all_logp.gather(1, arms)  # (R, n)
        loss, cut = batch_loss(name, logp, old, rewards - middle, config.clip)
        with torch.no_grad():
            promised = middle[:, 0] + ((logp - old).exp() * (rewards - middle)).mean(dim=1)
            kl = (start.exp() * (start - all_logp)).sum(dim=1)
            now = promised.mean(), (all_logp.exp() @ bandit.means).mean(), kl.mean(), cut
            for column, number in zip(seen.values(), now, strict=True):
                column.append(number)
        if step < steps:
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = logits - config.lr * gradient
    return logits.detach(), {key: torch.stack(column) for key, column in seen.items()}


def stay_too_long(bandit: Bandit, config: Config, steps: int) -> tuple[dict[str, float], dict[str, dict]]:
    """Many steps on one batch, with each loss."""
    shown, metrics, curves = [2**i for i in range(0, steps.bit_length(), 2)], {}, {}
    print(f"\n   many steps on one batch of {config.n_draws}; means of {config.n_runs} runs; steps:", end="")
    print(" " * 4 + "".join(f"{step:9d}" for step in [0, *shown]))
    begin = bandit.logits.expand(config.n_runs, -1)
    for name in LOSSES:
        _, seen = climb(name, begin, bandit, config, steps, torch.Generator().manual_seed(config.seed))
        for what, label in (
            ("promised", "what the batch promises"),
            ("reward", "true expected reward"),
            ("kl", "KL(old||new)"),
            ("cut", "clip fraction"),
        ):
            if (what, name) in (("promised", "no ratio"), ("cut", "no ratio"), ("cut", "ratio")):
                continue  # there is none
            line = seen[what][[0, *shown]].tolist()
            print(f"   {name:16s}{label:42s}" + "".join(f"{value:9.3f}" for value in line))
            metrics |= {f"{what}_{name.replace(' ', '_')}_{step}": v for step, v in zip([0, *shown], line, strict=True)}
        curves[name] = seen
    return metrics, curves


# --- 5. learning ---


def learn(bandit: Bandit, config: Config) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Batch after batch, with few steps on each and with many."""
    print(f"\n5. {config.iterations} batches of {config.n_draws} draws from a uniform policy; {config.n_runs} runs")
    print("   loss             steps a batch    reward after 10 batches   at the end   chance of a run's favourite arm")
    metrics, curves = {}, {}
    for name, steps in (("no ratio", 1), *((name, 16) for name in LOSSES)):
        generator = torch.Generator().manual_seed(config.seed)
        logits, rewards = torch.zeros(config.n_runs, len(bandit.means)), []
        for _ in range(config.iterations):
            logits, seen = climb(name, logits, bandit, config, steps, generator)
            rewards.append(seen["reward"][-1])
        curve, sure = torch.stack(rewards), logits.softmax(dim=1).amax(dim=1).mean().item()
        early = curve[min(9, len(curve) - 1)]
        print(f"   {name:16s} {steps:13d} {early:26.3f} {curve[-1]:12.3f} {sure:34.0%}")
        key = f"{name.replace(' ', '_')}_{steps}_steps"
        metrics |= {f"early_{key}": early.item(), f"reward_{key}": curve[-1].item(), f"favourite_{key}": sure}
        curves[f"{name}, {steps} step{'s' * (steps > 1)}"] = curve
    return metrics, curves


def draw(path: Path, bandit: Bandit, climbs: dict[str, dict], curves: dict[str, torch.Tensor]) -> None:
    """Draw the spread by baseline, many steps on one batch, and learning with each loss."""
    fig, (spread, one, many) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for shift in (0, 2):
        b = torch.linspace(-2, 5, 141)
        spread.plot(b, [moments(bandit, bandit.means + shift, x)[1] for x in b.tolist()], label=f"rewards + {shift}")
        expected = (bandit.logits.softmax(dim=0) * bandit.means).sum().item() + shift
        spread.axvline(expected, color="gray", linestyle=":")
    spread.set(title="one draw's gradient; dotted: expected reward", xlabel="baseline", ylabel="spread")
    for i, (name, seen) in enumerate(climbs.items()):
        one.plot(seen["reward"], color=f"C{i}", label=f"{name}: true")
        if name != "no ratio":
            one.plot(seen["promised"].clamp(max=1.5), "--", color=f"C{i}", label=f"{name}: promised")
    one.set(title="many steps on one batch", xlabel="steps", ylabel="reward", xscale="symlog", ylim=(0.6, 1.4))
    for name, curve in curves.items():
        many.plot(range(1, len(curve) + 1), curve, label=name)
    many.set(title="a batch an iteration", xlabel="batches", ylabel="true expected reward")
    for ax in (spread, one, many):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """The gradient out of draws, baselines, old draws, a step that is too long, and learning."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_runs=20, iterations=4)
    torch.set_flush_denormal(True)
    bandit = make_bandit(config.n_arms, config.noise)
    metrics = show_gradient(bandit, torch.Generator().manual_seed(config.seed))
    metrics |= compare_baselines(bandit) | reuse_draws(bandit) | show_clip(config.clip)
    stayed, climbs = stay_too_long(bandit, config, 16 if config.smoke else 256)
    learned, curves = learn(bandit, config)
    metrics |= stayed | learned

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "policy_gradient.png", bandit, climbs, curves)
    print(f"\nwrote policy_gradient.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
