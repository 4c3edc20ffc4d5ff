"""The feed-forward network: what a position does with what attention brought it, and why it is four times wider inside.

Attention moves information between positions but only mixes it: its output is a weighted sum. The MLP works on each
position alone, by two matrices with a bend between them. The bend is GELU, x times the probability that a standard
normal number is below x; GPT-2 computes it by a tanh formula that was faster once, so we do too.

    python part1_transformer/lesson5_feedforward.py

You see how far the two GELUs are apart, that without a bend two layers are one, which share of the parameters the MLP
has, and the loss of a small regression against the inner width. It takes 10 seconds and saves a figure.

References: Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2; Vaswani et al. 2017, "Attention Is All
You Need", section 3.3, for the network and its factor 4.
"""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from model import MLP, Block, GPTConfig

matplotlib.use("Agg")  # figures go to files, no window is opened
RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """GELU, the MLP, and how wide it should be."""

    steps: int = 600
    """Training steps of each regression."""
    n_seeds: int = 3
    """Regressions for each width, with seeds seed, seed + 1, ..."""
    seed: int = 0
    """First seed of weights and data."""
    out: Path = RUNS / "lesson5_feedforward"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- the bend ---


def gelu_exact(x: torch.Tensor) -> torch.Tensor:
    """x times P(N(0, 1) < x), any shape: large x pass, very negative x become 0, and the turn between is smooth."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The same with the normal distribution replaced by a tanh, any shape; GPT-2's choice."""
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# --- the network ---


def mlp_by_hand(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    """The MLP of model.py one position at a time, (B, T, C) -> (B, T, C): positions do not meet here."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            hidden = mlp.fc.weight @ x[b, t] + mlp.fc.bias  # (4C, C) @ (C,) -> (4C,)
            out[b, t] = mlp.proj.weight @ gelu_tanh(hidden) + mlp.proj.bias  # (C, 4C) @ (4C,) -> (C,)
    return out


def collapse(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """The single layer that computes second(first(x)): W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)."""
    single = nn.Linear(first.in_features, second.out_features)
    with torch.no_grad():
        single.weight.copy_(second.weight @ first.weight)  # (C, 4C) @ (4C, C) -> (C, C)
        single.bias.copy_(second.weight @ first.bias + second.bias)
    return single


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- how wide? ---


def regression_loss(width: int, steps: int, seed: int, C: int = 16) -> float:
    """Fit C -> width -> C to a fixed random function, and return the mean squared error on fresh points.

    The function is a sum of 16 sine waves in random directions, which no width fits exactly. Its outputs have variance
    of about 1: a network that always answers 0 has a loss of about 1.

    Args:
        width: inner width, the 4C of the MLP; 0 for a single linear layer instead.
        steps: training steps of 256 fresh points.
        seed: seed of the function, the weights and the points.
        C: channels at both ends.
    """
    torch.manual_seed(seed)
    w_in, w_out = torch.randn(C, 16) * 0.3, torch.randn(16, C) / 8**0.5  # sin^2 averages to about 1/2: 8 of 16
    net: nn.Module = nn.Linear(C, C)
    if width:
        net = nn.Sequential(nn.Linear(C, width), nn.GELU(approximate="tanh"), nn.Linear(width, C))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    # The step shrinks to zero in a straight line, or the noise of the last steps would hide small differences.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        x = torch.randn(256, C)
        loss = F.mse_loss(net(x), (x @ w_in).sin() @ w_out)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x = torch.randn(10_000, C)
        return F.mse_loss(net(x), (x @ w_in).sin() @ w_out).item()


def draw(losses: dict[int, list[float]], path: Path) -> None:
    """Save GELU beside ReLU, the difference of its two forms, and the losses: expansion -> one for each seed."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    axes[0].plot(x, gelu_exact(x), label="GELU")
    axes[0].plot(x, F.relu(x), "--", label="ReLU")
    axes[0].set(title="the bend", xlabel="x", xlim=(-4, 3), ylim=(-0.5, 3))
    axes[0].legend()
    axes[1].plot(x, gelu_tanh(x) - gelu_exact(x), color="C3")
    axes[1].set(title="GELU, tanh form minus exact", xlabel="x")
    axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    means = {expansion: sum(values) / len(values) for expansion, values in losses.items()}
    axes[2].axhline(means.pop(0), color="C7", linestyle="--", label="one linear layer")
    for expansion in means:
        axes[2].plot([expansion] * len(losses[expansion]), losses[expansion], "o", color="C0", alpha=0.4)
    axes[2].plot(list(means), list(means.values()), color="C0", label="mean")
    axes[2].set(title="regression loss by inner width", xlabel="inner width / C", ylabel="mean squared error", ylim=0)
    axes[2].set(xscale="log", xticks=list(means), xticklabels=list(means))
    axes[2].legend()
    axes[2].minorticks_off()
    for ax in axes:
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Compare the GELUs, take the MLP apart, and vary its width."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), steps=20, n_seeds=1)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)
    metrics = {}

    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    gap = (gelu_tanh(x) - gelu_exact(x)).abs()
    metrics["difference_gelu_exact"] = (gelu_exact(x) - F.gelu(x)).abs().max().item()
    metrics["difference_gelu_tanh"] = (gelu_tanh(x) - F.gelu(x, approximate="tanh")).abs().max().item()
    metrics["gelu_tanh_against_exact"] = gap.max().item()
    print("1. GELU by hand against F.gelu")
    print(f"   exact {metrics['difference_gelu_exact']:.1e}, tanh form {metrics['difference_gelu_tanh']:.1e}")
    print(f"   tanh form against exact: at most {gap.max():.1e}, at x = +-{x[gap.argmax()].abs():.2f}")
    print(f"   GELU(-3, -1, 0, 1, 3) = {[round(v, 3) for v in gelu_exact(torch.tensor([-3.0, -1, 0, 1, 3])).tolist()]}")

    C = 32
    net, x = MLP(GPTConfig(n_embd=C)), torch.randn(2, 8, C)
    single = collapse(net.fc, net.proj)
    with torch.no_grad():
        metrics["difference_by_hand"] = (mlp_by_hand(net, x) - net(x)).abs().max().item()
        metrics["difference_collapsed"] = (single(x) - net.proj(net.fc(x))).abs().max().item()
    print(f"\n2. the MLP, (2, 8, {C}) -> (2, 8, {4 * C}) -> (2, 8, {C})")
    print(f"   position by position against MLP: largest difference {metrics['difference_by_hand']:.1e}")
    print(f"   without GELU its {count(net):,} parameters do what one layer of {count(single):,} does: ", end="")
    print(f"difference {metrics['difference_collapsed']:.1e}")
    assert max(value for name, value in metrics.items() if name.startswith("difference")) < 1e-6

    print("\n3. where the parameters of a block are: attention 4 C^2, MLP 8 C^2, and a few vectors")
    for C in (32, 128, 768):
        with torch.device("meta"):  # shapes only, no memory and no random numbers
            block = Block(GPTConfig(n_embd=C))
        attention, mlp, whole = count(block.attn), count(block.mlp), count(block)
        metrics[f"mlp_share_{C}"] = mlp / whole
        print(f"   C = {C:3d}: attention {attention:9,}, MLP {mlp:9,} = {mlp / whole:.1%} of {whole:,}")

    C = 16
    print(f"\n4. a regression {C} -> width -> {C}: mean squared error on fresh points, {config.n_seeds} seeds")
    print("   width/C  width  parameters    mean   of each seed")
    losses = {}
    expansions = (0, 1, 2, 4, 8, 16)
    seeds = range(config.seed, config.seed + config.n_seeds)
    bar = tqdm([(e, s) for e in expansions for s in seeds], desc="regressions", leave=False)
    for expansion, seed in bar:
        losses.setdefault(expansion, []).append(regression_loss(expansion * C, config.steps, seed, C))
    for expansion, values in losses.items():
        width, mean = expansion * C, sum(values) / len(values)
        metrics[f"loss_{expansion}x"] = mean
        listed = "  ".join(f"{value:.3f}" for value in values)
        parameters = 2 * C * width + width + C if width else C * C + C
        name = f"{expansion}x" if width else "linear"
        print(f"   {name:>7} {width:6d} {parameters:11,} {mean:7.3f}   {listed}")

    draw(losses, config.out / "feedforward.png")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"\nwritten: {config.out / 'feedforward.png'}, {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
