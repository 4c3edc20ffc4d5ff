"""Lesson 8.2: generalised advantage estimation, by hand, against its definition, and what lambda trades.

A response gets one score, at its end, and has fifty tokens. Which of them earned it? The advantage of a token says how
much better things went than the critic had expected before it was drawn. One may ask the critic again after the token,
which is quick to tell and wrong where the critic is; or wait for the score, which is right and full of the luck of all
later tokens. Lambda mixes the two.

    python part8_ppo/lesson2_gae.py     # 10 seconds on two CPU cores; four sections, and a figure

You should see two definitions and gae() agree; rows of a batch that get what they get alone, unless the mask is
forgotten; how far back a score reaches; and the error of a policy gradient by lambda for four critics: the better the
critic, the smaller the best lambda.

References: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
sections 3 (definition) and 4; Sutton & Barto 2018, "Reinforcement Learning", sections 7.1 and 12.1 (n-step returns and
their lambda-weighted mean); Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 5, equation 11.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import tyro

from ppo import gae, whiten

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0)


@dataclass
class Config:
    """Compute advantages in several ways, and measure what lambda does to a gradient."""

    length: int = 20
    """T, steps of an episode in section 4."""
    n_episodes: int = 40_000
    """Episodes that bias and spread are measured on."""
    batch: int = 64
    """Episodes in a batch, whose gradient's error is reported."""
    critic_error: float = 0.5
    """Standard deviation of what the fourth critic of section 4 errs by, in each state."""
    seed: int = 0
    """Seed of episodes and critics."""
    out: Path = RUNS / "lesson2_gae"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- 1. by hand ---


def deltas_by_hand(rewards: list[float], values: list[float], gamma: float) -> list[float]:
    """delta_t = r_t + gamma V_{t+1} - V_t of one episode; the value after its end is 0."""
    following = [*values[1:], 0.0]
    return [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]


def by_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum over l of (gamma lam)^l delta_{t+l}, with a loop in a loop."""
    deltas = deltas_by_hand(rewards, values, gamma)
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def by_steps(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The same as a mean of n-step advantages, of which the n-th has the weight (1 - lam) lam^(n-1).

    A_t^(n) = r_t + gamma r_{t+1} + .. + gamma^n V_{t+n} - V_t asks the critic after n steps. There are only as many
    as tokens are left; the last one, which asks nobody, has all the weight that the infinite sum has beyond it.
    """
    advantages = []
    for t in range(len(rewards)):
        left, total = len(rewards) - t, 0.0
        for n in range(1, left + 1):
            guess = gamma**n * values[t + n] if n < left else 0.0
            one = sum(gamma**i * rewards[t + i] for i in range(n)) + guess - values[t]
            total += ((1 - lam) * lam ** (n - 1) if n < left else lam ** (n - 1)) * one
        advantages.append(total)
    return advantages


def compare_by_hand() -> dict[str, float]:
    """Four tokens, three ways."""
    rewards, values, gamma, lam = [0.0, -0.1, 0.0, 1.0], [0.5, 0.2, 0.6, 0.4], 0.9, 0.8
    mask = torch.ones(1, 4, dtype=torch.bool)
    row = torch.tensor([rewards]), torch.tensor([values]), mask  # (1, 4) each
    found, returns = gae(*row, gamma, lam)
    first, second = by_sum(rewards, values, gamma, lam), by_steps(rewards, values, gamma, lam)
    print(f"1. four tokens, gamma {gamma}, lambda {lam}")
    print("   token   reward   value    delta   A: sum of deltas   A: mean of n steps   A: gae()   return")
    deltas = deltas_by_hand(rewards, values, gamma)
    for t, line in enumerate(zip(rewards, values, deltas, first, second, found[0], returns[0], strict=True), 1):
        print("   {:5d} {:8.2f} {:7.2f} {:8.3f} {:18.4f} {:20.4f} {:10.4f} {:8.4f}".format(t, *line))
    difference = max(abs(a - b) for other in (first, second) for a, b in zip(other, found[0].tolist(), strict=True))
    ends = [gae(*row, gamma, some)[0][0] for some in (0.0, 1.0)]
    all_that_came = [sum(gamma**i * r for i, r in enumerate(rewards[t:])) - values[t] for t in range(4)]
    difference = max(difference, (ends[0] - torch.tensor(deltas)).abs().max().item())
    difference = max(difference, (ends[1] - torch.tensor(all_that_came)).abs().max().item())
    print(f"   lambda 0 gives the deltas, lambda 1 all that came minus the value; largest difference {difference:.0e}")
    assert difference < 1e-6
    return {"difference_by_hand": difference, "advantage_1": first[0]}


# --- 2. a batch ---


def compare_batch(seed: int) -> dict[str, float]:
    """Rows of unequal length: what each gets alone, what it gets without the mask, and whitening."""
    generator = torch.Generator().manual_seed(seed)
    lengths, T = [12, 3, 7, 1, 9], 12
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]  # (5, 12)
    rewards = 0.1 * torch.randn(5, T, generator=generator)
    values = 1.0 + 0.3 * torch.randn(5, T, generator=generator)  # after the end too: the critic reads padding as well
    found, returns = gae(rewards, values, mask, 1.0, 0.95)
    unmasked, _ = gae(rewards, values, torch.ones_like(mask), 1.0, 0.95)
    wrong, off = 0.0, []
    for b, length in enumerate(lengths):
        alone = torch.tensor(by_sum(rewards[b, :length].tolist(), values[b, :length].tolist(), 1.0, 0.95))
        wrong = max(wrong, (found[b, :length] - alone).abs().max().item())
        off.append((unmasked[b, length - 1] - alone[-1]).abs().item())
    white, careless = whiten(found, mask)[mask], whiten(found, torch.ones_like(mask))[mask]  # (32,) each
    print(f"\n2. rows of {lengths} tokens in one batch of {T} columns, gamma 1, lambda 0.95")
    print(f"   largest difference to each row alone: {wrong:.0e}; outside the mask: {found[~mask].abs().max():g}")
    print("   without the mask the last token's advantage is off by " + ", ".join(f"{x:.2f}" for x in off))
    print(f"   whitened over drawn tokens:   mean {white.mean():+.3f}, variance {white.var(correction=0):.3f}")
    print(f"   whitened over all columns:    mean {careless.mean():+.3f}, variance {careless.var(correction=0):.3f}")
    assert wrong < 1e-5 and torch.allclose(returns, torch.where(mask, found + values, 0.0))
    return {
        "difference_batch": wrong,
        "off_without_mask": max(off),
        "whitened_mean": white.mean().item(),
        "whitened_variance": white.var(correction=0).item(),
        "careless_mean": careless.mean().item(),
        "careless_variance": careless.var(correction=0).item(),
    }


# --- 3. how far back ---


def show_reach(T: int = 60) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """A score of 1 at the last of T tokens, and a critic that says 0: the advantage is (gamma lam)^distance."""
    rewards, mask = torch.zeros(1, T), torch.ones(1, T, dtype=torch.bool)
    rewards[0, -1] = 1.0
    places = (0, 1, 5, 10, 20, 40, 59)
    print(f"\n3. a score of 1 after {T} tokens, a critic that says 0: what a token gets, by its distance from the end")
    print("   gamma   lambda  " + "".join(f"{place:8d}" for place in places))
    metrics, curves = {}, {}
    for gamma, lam in ((1.0, 0.0), (1.0, 0.8), (1.0, 0.95), (1.0, 0.99), (1.0, 1.0), (0.99, 1.0), (0.9, 1.0)):
        reach = gae(rewards, torch.zeros(1, T), mask, gamma, lam)[0][0].flip(0)  # (T,), the last token first
        print(f"   {gamma:5.2f} {lam:8.2f}  " + "".join(f"{reach[place]:8.3f}" for place in places))
        metrics |= {f"reach_{place}_gamma_{gamma:g}_lambda_{lam:g}": reach[place].item() for place in places}
        curves[f"gamma {gamma:g}, lambda {lam:g}"] = reach
    return metrics, curves


# --- 4. what lambda trades ---


def walk(n: int, T: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n episodes of T steps: each adds +1 or -1, by chance; the score at the end is the sum over the root of T.

    Returns:
        steps (n, T); the sum before each step (n, T); rewards (n, T), all but the last 0.
    """
    steps = torch.randint(2, (n, T), generator=generator) * 2.0 - 1
    before = steps.cumsum(dim=1) - steps
    rewards = torch.zeros(n, T)
    rewards[:, -1] = steps.sum(dim=1) / T**0.5
    return steps, before, rewards


def guess(name: str, before: torch.Tensor, error: float, generator: torch.Generator) -> torch.Tensor:
    """What a critic says before each step, (n, T). The truth is: what the sum is worth so far, for the rest is luck."""
    T = before.shape[1]
    truth = before / T**0.5
    if name == "the truth and errors":  # a fixed error for each state, which is a place in time and a sum so far
        errors = error * torch.randn(T, 2 * T + 1, generator=generator)
        return truth + errors[torch.arange(T), before.long() + T]
    return {"nothing": 0.0, "half the truth": 0.5, "the truth": 1.0}[name] * truth


def measure(
    steps: torch.Tensor, rewards: torch.Tensor, values: torch.Tensor, lam: float, batch: int
) -> tuple[float, float, float]:
    """The policy gradient out of these advantages, for one parameter a step: P(+1) = sigmoid(theta_t), at theta = 0.

    An episode's gradient for theta_t is A_t s_t / 2, with s_t = +1 or -1, and the true one 1 / (2 sqrt(T)).

    Args:
        steps: (n, T), what was drawn.
        rewards: (n, T).
        values: (n, T).
        lam: lambda; gamma is 1.
        batch: episodes in a batch.

    Returns:
        Signal: the mean of the gradient over the true one, 1 if nothing is missing. Spread: of one episode's gradient,
        in lengths of the true one. Error: distance from the true one of a batch's gradient (root of its mean square),
        in the same unit.
    """
    T = steps.shape[1]
    advantages, _ = gae(rewards, values, torch.ones_like(steps, dtype=torch.bool), 1.0, lam)
    gradient = advantages * steps / 2 / (0.5 / T**0.5)  # (n, T), in units of the true one, which is all ones
    mean, variance = gradient.mean(dim=0), gradient.var(dim=0)  # (T,)
    # The mean over episodes has an error itself; its square is subtracted, or it would count as bias.
    bias = ((mean - 1).square() - variance / len(steps)).mean().clamp(min=0)
    spread = variance.mean()
    return mean.mean().item(), spread.sqrt().item(), (bias + spread / batch).sqrt().item()


def trade(config: Config) -> tuple[dict[str, float], dict[str, list[tuple[float, float, float]]]]:
    """Signal, spread and error by lambda, for four critics."""
    T, metrics, found = config.length, {}, {}
    generator = torch.Generator().manual_seed(config.seed)
    steps, before, rewards = walk(config.n_episodes, T, generator)
    print(f"\n4. {T} steps of +1 or -1, scored at the end: the policy gradient by lambda, in lengths of the true one")
    print("   the critic knows                           " + "".join(f"{lam:8g}" for lam in LAMBDAS) + "   lambda")
    for name in ("nothing", "half the truth", "the truth", "the truth and errors"):
        values = guess(name, before, config.critic_error, generator)
        lines = found[name] = [measure(steps, rewards, values, lam, config.batch) for lam in LAMBDAS]
        labels = ("signal, mean", "spread, one episode", f"error, {config.batch} episodes")
        for row, label in enumerate(labels):
            print(f"   {name if row == 0 else '':22s}{label:21s}" + "".join(f"{line[row]:8.2f}" for line in lines))
        best = min(range(len(LAMBDAS)), key=lambda i: lines[i][2])
        print(f"{'':25s}smallest error at lambda {LAMBDAS[best]:g}")
        key = name.replace(" ", "_")
        metrics[f"best_lambda_{key}"] = LAMBDAS[best]
        for lam, line in zip(LAMBDAS, lines, strict=True):
            metrics |= {f"{what}_{key}_{lam:g}": x for what, x in zip(("signal", "spread", "error"), line, strict=True)}
    # With c of the truth, the part c of a step's worth shows at once; the rest shows at the end, faded by lambda^rest.
    rest = torch.arange(T - 1, -1, -1)
    expected = {
        c: [(c + (1 - c) * torch.tensor(lam) ** rest).mean().item() for lam in LAMBDAS] for c in (0.0, 0.5, 1.0)
    }
    critics = zip(expected.values(), list(found.values())[:3], strict=True)
    off = max(abs(line[0] - e) for es, lines in critics for line, e in zip(lines, es, strict=True))
    print(f"   signal by the formula c + (1 - c) lambda^(T - t): largest difference {off:.3f}, which is chance")
    return metrics | {"signal_off": off}, found


def draw(path: Path, reach: dict[str, torch.Tensor], found: dict[str, list], batch: int) -> None:
    """Draw how far back a score reaches, signal and spread for one critic, and the error for all."""
    fig, (far, both, error) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for name, curve in reach.items():
        far.plot(curve, "-" if name.startswith("gamma 1,") else "--", label=name)
    far.set(title="what a token gets of a score of 1", xlabel="distance from the end", ylabel="advantage")
    place = range(len(LAMBDAS))  # evenly spaced: what matters is near 1
    for name in ("nothing", "half the truth"):
        both.plot(place, [line[0] for line in found[name]], "o-", label=f"signal, critic knows {name}")
        both.plot(place, [line[1] / 10 for line in found[name]], "s--", label=f"spread / 10, critic knows {name}")
    both.axhline(1, color="gray", linestyle=":")
    both.set(title="what lambda trades", xlabel="lambda", ylabel="in lengths of the true gradient")
    for name, lines in found.items():
        error.plot(place, [line[2] for line in lines], "o-", label=f"critic knows {name}")
    error.set(title=f"error of the gradient of {batch} episodes", xlabel="lambda", ylim=(0, None))
    for ax in (far, both, error):
        if ax is not far:
            ax.set_xticks(place, [f"{lam:g}" for lam in LAMBDAS])
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Four tokens by hand, a batch with padding, the reach of a score, and what lambda trades."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_episodes=1000)
    torch.set_flush_denormal(True)
    metrics = compare_by_hand() | compare_batch(config.seed)
    far, reach = show_reach()
    traded, found = trade(config)
    metrics |= far | traded

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "gae.png", reach, found, config.batch)
    print(f"\nwrote gae.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
