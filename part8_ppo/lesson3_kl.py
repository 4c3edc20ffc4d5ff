"""Lesson 8.3: three estimators of a KL divergence, and what gradient each one gives, exactly.

A policy that is trained against a judge is kept near a reference by the divergence from it, and that has to be
estimated from the tokens that were drawn. There are three usual estimators, k1, k2 and k3, and three places for them:
in the reward; in the loss; in the loss, weighted by the ratio. As estimates of a small divergence all are fine. Their
gradients are another matter, for a gradient is taken of the numbers, and not of the chance with which they were drawn.

The model here is the GPT of model.py, with four tokens and responses of three: 64 responses in all, so that every mean
is a sum over all of them, and nothing is due to chance.

    python part8_ppo/lesson3_kl.py     # 10 seconds on two CPU cores; five sections, and a figure

You should see k2 with a bias, k1 with the largest spread as long as the policies are near; a table whose five
zeros say which one has the gradient of what; seven policies that end in five places, of which one was wanted; and a
controller that finds the weight of the penalty by itself.

References: Schulman 2020, "Approximating KL Divergence" (a note); Ziegler et al. 2019, "Fine-Tuning Language Models
from Human Preferences", section 2.2; Shao et al. 2024, "DeepSeekMath", section 4.1 (k3 in the loss); Tang & Munos 2025,
"On a few pitfalls in KL divergence gradient estimation for RL" (both pitfalls: the loss, and tokens to come).
"""

import copy
import itertools
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

from model import GPT, GPTConfig
from ppo import KINDS, AdaptiveKL, kl_estimate, shape_rewards

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
PLACES = ("in the reward", "in the loss", "in the loss, times ratio")
TARGETS = ("reverse KL", "reverse, contexts fixed", "forward, contexts fixed")


@dataclass
class Config:
    """Enumerate all responses of a small model, and compare estimators and their gradients."""

    n_vocab: int = 4
    """V, tokens of the model."""
    length: int = 3
    """T, tokens of a response; there are V^T of them."""
    beta: float = 0.5
    """Weight of the penalty in section 4."""
    steps: int = 2000
    """Steps of gradient descent in section 4."""
    seed: int = 0
    """Seed of the models' weights."""
    out: Path = RUNS / "lesson3_kl"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


def key_of(name: str) -> str:
    """A name as part of a metric's."""
    return name.replace(", ", "_").replace(" ", "_")


# --- a model of which everything is known ---


class Everything(NamedTuple):
    """All N = V^T responses of a policy."""

    logp: torch.Tensor
    """(N, T) log-probability of each token of each response, with a gradient."""
    ref_logp: torch.Tensor
    """(N, T) by the reference, without."""
    all_logp: torch.Tensor
    """(N, T, V) of every token that might have been drawn in its place."""
    all_ref_logp: torch.Tensor
    """(N, T, V) by the reference."""

    def chance(self) -> torch.Tensor:
        """How likely each response is to be drawn, (N,), without a gradient: a sampler has none."""
        return self.logp.detach().sum(dim=1).exp()


def make_models(config: Config) -> tuple[GPT, GPT]:
    """A reference, and another model far from it; float64, with weights so large that what was drawn matters."""
    models = []
    for seed in (config.seed, config.seed + 1):
        torch.manual_seed(seed)
        shape = {"vocab_size": config.n_vocab, "block_size": config.length, "n_layer": 1, "n_head": 2, "n_embd": 8}
        model = GPT(GPTConfig(**shape)).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        models.append(model)
    return models[0], models[1]


def between(reference: GPT, other: GPT, share: float) -> GPT:
    """A policy on the straight line between two models' weights: 0 is the reference, 1 the other."""
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, share)
    return policy


def enumerate_all(policy: GPT, reference: GPT, T: int) -> Everything:
    """Every response of T tokens after token 0, by both models."""
    V = policy.config.vocab_size
    responses = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (N, T)
    idx = F.pad(responses[:, :-1], (1, 0))  # what stands before each token: 0 is the prompt
    all_logp = F.log_softmax(policy(idx)[0], dim=-1)  # (N, T, V)
    with torch.no_grad():
        all_ref_logp = F.log_softmax(reference(idx)[0], dim=-1)
    drawn = responses[..., None]
    logp, ref_logp = (some.gather(2, drawn)[..., 0] for some in (all_logp, all_ref_logp))
    return Everything(logp, ref_logp, all_logp, all_ref_logp)


def divergence(every: Everything) -> torch.Tensor:
    """KL(policy || reference) of whole responses, in nats: sum of pi(y) log(pi(y) / ref(y)), with its gradient."""
    logp, ref_logp = every.logp.sum(dim=1), every.ref_logp.sum(dim=1)  # (N,)
    return (logp.exp() * (logp - ref_logp)).sum()


# --- 1. values ---


def one_by_hand(p: float, q: float, kind: str) -> float:
    """What a token says that the policy draws with probability p, and the reference with q, in plain Python."""
    ratio = q / p
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": ratio - 1 - math.log(ratio)}[kind]


@torch.no_grad()
def compare_values(models: tuple[GPT, GPT], config: Config) -> tuple[dict[str, float], dict[str, list]]:
    """Bias and spread of a response's sum of each estimator, at several distances."""
    reference, other = models
    shares = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
    print("1. a response's KL as the sum of its tokens'; bias and spread (one response) in parts of the exact KL")
    print("   exact KL     k1: bias  spread  below 0      k2: bias  spread      k3: bias  spread")
    metrics, curves, off = {}, {"kl": []} | {kind: [] for kind in KINDS}, 0.0
    for share in shares:
        every = enumerate_all(between(reference, other, share), reference, config.length)
        chance, exact, line = every.chance(), divergence(every).item(), []
        for kind in KINDS:
            tokens = kl_estimate(every.logp, every.ref_logp, kind)  # (N, T)
            hand = [one_by_hand(p, q, kind) for p, q in zip(every.logp.exp()[0], every.ref_logp.exp()[0], strict=True)]
            off = max(off, (tokens[0] - torch.tensor(hand)).abs().max().item())
            total = tokens.sum(dim=1)  # (N,)
            mean = (chance * total).sum().item()
            spread = (chance * (total - mean).square()).sum().sqrt().item()
            line += [mean / exact - 1, spread / exact] + ([chance[total < 0].sum().item()] if kind == "k1" else [])
            curves[kind].append(spread / exact)
            metrics |= {f"bias_{kind}_{share:g}": mean / exact - 1, f"spread_{kind}_{share:g}": spread / exact}
        curves["kl"].append(exact)
        metrics[f"kl_{share:g}"] = exact
        # + 0.0, for a rounding error below zero is printed as -0%
        line = [round(x, 4) + 0.0 for x in line]
        print("   {:8.4f} {:12.0%}{:8.2f}{:9.0%} {:13.0%}{:8.2f} {:13.0%}{:8.2f}".format(exact, *line))
    scores, mask = torch.ones(len(every.logp)), torch.ones_like(every.logp, dtype=torch.bool)
    rewards = shape_rewards(scores, every.logp, every.ref_logp, mask, 0.1)  # (N, T)
    objective = 1 - 0.1 * (every.logp - every.ref_logp).sum(dim=1)  # score - beta log(pi(y) / ref(y))
    off = max(off, (rewards.sum(dim=1) - objective).abs().max().item())
    print(f"   by hand and by ppo.py, shape_rewards too: largest difference {off:.0e}")
    assert off < 1e-6
    return metrics | {"value_difference": off}, curves


def show_rounding() -> dict[str, float]:
    """k3 of two nearly equal probabilities in float32: by the formula as it stands, and by kl_estimate."""
    generator = torch.Generator().manual_seed(0)
    d = 1e-4 * torch.randn(10_000, generator=generator)
    naive, stable = d.exp() - 1 - d, kl_estimate(torch.zeros_like(d), d, "k3")
    exact = torch.expm1(d.double()) - d.double()
    print("\n2. k3 in float32 where log-probabilities differ by 0.0001: share below 0, mean by the exact one")
    metrics = {}
    for name, some in (("exp(d) - 1 - d", naive), ("kl_estimate", stable)):
        below, mean = (some < 0).float().mean().item(), (some.double().mean() / exact.mean()).item()
        print(f"   {name:16s}{below:6.0%}   {mean:8.3f}")
        key = "naive" if some is naive else "stable"
        metrics |= {f"k3_below_0_{key}": below, f"k3_mean_{key}": mean}
    return metrics


# --- 3. gradients ---


def surrogate(logp: torch.Tensor, ref_logp: torch.Tensor, kind: str, place: str) -> torch.Tensor:
    """What is differentiated for each response, a loss that pulls towards the reference, or should: (N, T) -> (N,)."""
    k = kl_estimate(logp, ref_logp, kind)  # (N, T)
    if place == "in the reward":
        to_come = k.detach().flip(1).cumsum(dim=1).flip(1)  # (N, T): a token answers for itself and all after it
        return (logp * to_come).sum(dim=1)  # REINFORCE, of a reward of -k
    if place == "in the loss, times ratio":
        k = (logp - logp.detach()).exp() * k  # the ratio is 1; its gradient is not 0
    return k.sum(dim=1)


def targets(every: Everything) -> dict[str, torch.Tensor]:
    """Scalars, whose gradients one may want.

    Both with fixed contexts are the divergence of the next token alone, in contexts as the policy meets them: they do
    not ask what contexts a token leads to.
    """
    chance, p, q = every.chance()[:, None], every.all_logp, every.all_ref_logp
    return {
        "reverse KL": divergence(every),
        "reverse, contexts fixed": (chance * (p.exp() * (p - q)).sum(dim=2)).sum(),
        "forward, contexts fixed": (chance * (q.exp() * (q - p)).sum(dim=2)).sum(),
    }


def gradient_of(loss: torch.Tensor, policy: GPT) -> torch.Tensor:
    """The gradient for all parameters as one vector."""
    found = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    return torch.cat([some.flatten() for some in found])


def compare_gradients(models: tuple[GPT, GPT], config: Config, share: float) -> dict[str, float]:
    """Nine expected gradients, of all parameters, and their distances from three that one may want."""
    policy = between(*models, share)
    every = enumerate_all(policy, models[0], config.length)
    chance, metrics, rows = every.chance(), {}, {}
    wanted = {name: gradient_of(value, policy) for name, value in targets(every).items()}
    unit = wanted["reverse KL"].norm()
    print(
        f"\n3. expected gradients of {len(wanted['reverse KL'])} parameters, KL {divergence(every).item():.3f}", end=""
    )
    print("; length and spread (one response) in lengths of the reverse KL's")
    print(" " * 49 + "distance from the gradient of (0.00: the same; 1.00: as far as none)")
    print(f"{'length':>39s}   spread" + "".join(f"{name:>{len(name) + 3}s}" for name in TARGETS))
    for place, kind in itertools.product(PLACES, KINDS):
        each = surrogate(every.logp, every.ref_logp, kind, place)  # (N,)
        rows[kind, place] = torch.stack([gradient_of(one, policy) for one in each])  # (N, parameters)
        mean = chance @ rows[kind, place]
        spread = (chance @ (rows[kind, place] - mean).square().sum(dim=1)).sqrt()
        away = [((mean - wanted[name]).norm() / wanted[name].norm()).item() for name in TARGETS]
        line = f"   {kind} {place:24s}{mean.norm() / unit:9.2f}{spread / unit:9.2f}"
        print(line + "".join(f"{x:{len(name) + 3}.2f}" for name, x in zip(TARGETS, away, strict=True)))
        key = key_of(f"{kind} {place}")
        metrics |= {f"length_{key}": (mean.norm() / unit).item(), f"spread_gradient_{key}": (spread / unit).item()}
        metrics |= {f"away_{key}_{key_of(name)}": x for name, x in zip(TARGETS, away, strict=True)}
    # k3 + 1 - exp(d) = -d: the ratio adds to k3's own gradient what is missing.
    same = (rows["k2", PLACES[1]] - rows["k3", PLACES[2]]).abs().max().item()
    print(f"   k2 in the loss and k3 times ratio are equal for each single response: largest difference {same:.0e}")
    return metrics | {"k2_and_k3_times_ratio": same}


# --- 4. where they lead ---

CHOICES = (("k1", PLACES[0]), ("k2", PLACES[1]), ("k3", PLACES[2]), ("k3", PLACES[1]))
CHOICES += (("k2", PLACES[0]), ("k3", PLACES[0]), ("k1", PLACES[1]))
"""Seven of the nine. k1 times ratio is like the first three; k2 times ratio nobody uses."""


def bandit_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Six answers: their scores, and the log-probabilities of the reference, (K,) each."""
    scores = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    return scores, torch.tensor([0.3, 0.1, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64).log()


def optima(scores: torch.Tensor, ref_logp: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The policies that maximise score - beta KL, (K,) each: with the reverse KL, and with the forward one.

    The first is ref exp(score / beta), normalised (Ziegler et al. 2019 cite it; Rafailov et al. 2023, "Direct
    Preference Optimization", equation 4). The second is beta ref / (c - score), where c makes the sum 1.
    """
    low, high = scores.max(), scores.max() + beta
    for _ in range(100):  # halving: the sum falls as c rises, from infinity at the largest score to below 1
        c = (low + high) / 2
        low, high = (c, high) if (beta * ref_logp.exp() / (c - scores)).sum() > 1 else (low, c)
    return (ref_logp + scores / beta).softmax(dim=0), beta * ref_logp.exp() / (c - scores)


def follow(config: Config) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Maximise the score with each penalty, by exact gradients, all seven policies side by side."""
    scores, ref_logp = bandit_problem()
    logits = ref_logp.repeat(len(CHOICES), 1)  # (M, K)
    for _ in range(config.steps):
        logits.requires_grad_(True)
        logp = F.log_softmax(logits, dim=1)
        # An answer is one token here. What each is pulled by, (M, K):
        pulls = [surrogate(one[:, None], ref_logp[:, None], *some) for one, some in zip(logp, CHOICES, strict=True)]
        loss = (logp.detach().exp() * (config.beta * torch.stack(pulls) - scores * logp)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = logits.detach() - gradient
        logits = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=-40)  # where answers die out, ref / pi overflows
    reverse, forward = optima(scores, ref_logp, config.beta)
    found = {"reference": ref_logp.exp(), "best with reverse KL": reverse}
    found |= {f"{kind} {place}": pi for (kind, place), pi in zip(CHOICES, logits.softmax(dim=1), strict=True)}
    found["best with forward KL"] = forward
    print(f"\n4. six answers, scores 0 to 1, beta {config.beta:g}: policies after {config.steps} exact gradient steps")
    print("                                " + "".join(f"   y = {i}" for i in range(1, 7)) + "    score   reverse KL")
    metrics = {}
    for name, pi in found.items():
        kl, score = (torch.special.xlogy(pi, pi) - pi * ref_logp).sum().item(), (pi * scores).sum().item()
        print(f"   {name:29s}" + "".join(f"{x:8.3f}" for x in pi) + f"{score:9.3f} {kl:12.3f}")
        key = key_of(name)
        metrics |= {f"score_{key}": score, f"end_kl_{key}": kl}
        metrics[f"from_best_{key}"] = (pi - reverse).abs().max().item()
    return metrics, found


def adapt(iterations: int) -> tuple[dict[str, float], dict[float, list[float]]]:
    """AdaptiveKL on the same problem, from a beta far too high and one far too low, to a KL of 0.3 nats."""
    scores, ref_logp = bandit_problem()
    shown = [i for i in (0, 25, 50, 100, 200, 400) if i <= iterations]
    print("\n5. AdaptiveKL, target 0.3 nats: beta and KL after so many updates")
    print("   from " + "".join(f"{i:>18d}" for i in shown))
    metrics, curves = {}, {}
    for start in (5.0, 0.02):
        logits, controller, line, curve = ref_logp.clone(), AdaptiveKL(start, 0.3, 1000), [], []
        for i in range(iterations + 1):
            logp = F.log_softmax(logits, dim=0)
            kl = (logp.exp() * (logp - ref_logp)).sum().item()
            curve.append(kl)
            if i in shown:
                line.append(f"{controller.value:11.3f} {kl:6.3f}")
            advantage = scores - controller.value * (logp - ref_logp)  # k1 in the reward
            logits = logits + logp.exp() * (advantage - logp.exp() @ advantage)  # the exact gradient, pi A
            controller.update(kl, 256)
        print(f"   {start:4.2f}" + "".join(line))
        metrics |= {f"beta_from_{start:g}": controller.value, f"kl_from_{start:g}": curve[-1]}
        curves[start] = curve
    return metrics, curves


def draw(path: Path, curves: dict[str, list], found: dict[str, torch.Tensor], adapted: dict) -> None:
    """Draw the estimators' spread, where seven penalties lead, and the controller."""
    fig, (spread, ends, control) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    for kind in KINDS:
        spread.loglog(curves["kl"], curves[kind], "o-", label=kind)
    spread.set(title="spread of one response's estimate", xlabel="exact KL, nats", ylabel="spread / KL")
    for i, (name, pi) in enumerate(found.items()):
        style = {"edgecolor": "black"} if name.startswith("best") else {}
        ends.bar(torch.arange(6) + 0.085 * (i - 4.5) + 1, pi, 0.08, label=name, **style)
    ends.set(title="where each penalty leads", xlabel="answer, by score", ylabel="probability")
    for start, curve in adapted.items():
        control.plot(curve, label=f"beta begins at {start:g}")
    control.axhline(0.3, color="gray", linestyle=":", label="target")
    control.set(title="adaptive weight", xlabel="updates", ylabel="KL, nats")
    for ax in (spread, ends, control):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Values, rounding, gradients, where they lead, and the controller."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), length=2, steps=50)
    torch.set_flush_denormal(True)
    models = make_models(config)
    metrics, curves = compare_values(models, config)
    metrics |= show_rounding()
    metrics |= compare_gradients(models, config, 0.2)
    led, found = follow(config)
    adapted, control = adapt(50 if config.smoke else 400)
    metrics |= led | adapted

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "kl.png", curves, found, control)
    print(f"\nwrote kl.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
