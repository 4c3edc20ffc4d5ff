"""Lesson 3.3: SwiGLU, an MLP whose hidden units are products.

A unit of a plain MLP takes one projection of the input and bends it: gelu(w . x), or relu(w . x)^2. A unit of a gated
MLP takes two projections, bends one and multiplies it by the other: silu(w . x) * (v . x). The bent one opens and
closes a gate for the straight one. That costs a third matrix, so for a fair comparison the gated MLP must be narrower:
2/3 as many units, 8/3 C instead of 4 C.

    python part3_arch_improvements/lesson3_swiglu.py              # 50 seconds; three tables, a figure
    python part3_arch_improvements/lesson3_swiglu.py --lr 1e-3    # is the order the same at another learning rate?

You should see SwiGLU by hand equal model.MLP, what one unit of each kind computes, and four small language models with
exactly equal parameters: their held-out loss in three seeds, their speed, and how many of their units rest.

References: Shazeer 2020, "GLU Variants Improve Transformer", sections 2 and 3; Dauphin et al. 2017, "Language Modeling
with Gated Convolutional Networks", section 2 (the gate); So et al. 2021, "Primer", section 3 (ReLU^2); Hendrycks &
Gimpel 2016, "Gaussian Error Linear Units", section 2.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

import train
from data import load_tokens
from model import GPT, MLP, GPTConfig, init_weights
from race import race, spread
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Compare four MLPs of equal size by hand and in training."""

    steps: int = 300
    """Training steps of each run."""
    lr: float = 3e-3
    """Highest learning rate, the same for all."""
    n_seeds: int = 3
    """Runs of each model, with seeds seed, seed + 1, ..."""
    seed: int = 0
    """First seed of weights and data."""
    out: Path = RUNS / "lesson3_swiglu"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- four kinds of units ---


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2: zero on the left, and growing without a corner at zero (So et al. 2021, section 3)."""
    return F.relu(x).square()


KINDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "GELU": (F.gelu, False),
    "ReLU^2": (relu_squared, False),
    "GeGLU": (F.gelu, True),
    "SwiGLU": (F.silu, True),
}
"""What bends a projection, and whether another projection is multiplied by the result."""
COLOURS = dict(zip(KINDS, ("C1", "C2", "C4", "C0"), strict=True))


class AnyMLP(nn.Module):
    """An MLP of one of the four kinds, (B, T, C) -> (B, T, F) -> (B, T, C).

    Args:
        kind: a name of KINDS.
        n_embd: C, a multiple of 3. F is what costs 8 C^2 parameters: 4 C without a gate, 8/3 C with one.
    """

    def __init__(self, kind: str, n_embd: int) -> None:
        super().__init__()
        self.bend, self.gated = KINDS[kind]
        hidden = 8 * n_embd // 3 if self.gated else 4 * n_embd
        self.fc = nn.Linear(n_embd, (2 if self.gated else 1) * hidden, bias=False)
        self.proj = nn.Linear(hidden, n_embd, bias=False)

    def units(self, x: torch.Tensor) -> torch.Tensor:
        """What the hidden units say, (..., C) -> (..., F)."""
        if not self.gated:
            return self.bend(self.fc(x))
        gate, up = self.fc(x).chunk(2, dim=-1)  # (..., F) each
        return self.bend(gate) * up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position by the same network, (B, T, C) -> (B, T, C)."""
        return self.proj(self.units(x))


@torch.no_grad()
def compare_by_hand() -> dict[str, float]:
    """Largest differences of SwiGLU with loops over units, and of AnyMLP, to model.MLP with the same weights."""
    theirs = MLP(GPTConfig(n_embd=24, mlp_hidden=64))
    ours = AnyMLP("SwiGLU", 24)
    ours.load_state_dict(theirs.state_dict())  # refuses a name or a shape that does not fit
    x = torch.randn(2, 5, 24)  # (B, T, C)
    W, V = theirs.fc.weight.chunk(2)  # (F, C) each: one row for each unit
    y = torch.zeros_like(x)
    for w, v, out in zip(W, V, theirs.proj.weight.T, strict=True):
        gate, up = x @ w, x @ v  # (B, T) each: two projections of each position
        unit = gate * torch.sigmoid(gate) * up  # silu(z) = z sigmoid(z)
        y += unit[..., None] * out  # the unit adds its own vector (C,) to the stream, as often as it says
    pairs = {"by_hand_to_model": (y, theirs(x)), "any_mlp_to_model": (ours(x), theirs(x))}
    return {f"difference_{name}": (a - b).abs().max().item() for name, (a, b) in pairs.items()}


# --- in training ---


def make_model(kind: str, seed: int, n_embd: int) -> GPT:
    """A small GPT whose MLPs are of one kind. Everything else starts from the same weights for all kinds."""
    config = GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=n_embd)
    torch.manual_seed(seed)
    model = GPT(config)
    for block in model.blocks:
        block.mlp = AnyMLP(kind, n_embd)
        init_weights(block.mlp, config.n_layer, n_embd)
    return model


@torch.no_grad()
def share_at_rest(model: GPT, idx: torch.Tensor) -> float:
    """Share of hidden units that say less than 1% of what the units of their layer say (root mean square)."""
    shares: list[float] = []

    def look(mlp: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        units = mlp.units(inputs[0])  # (B, T, F)
        shares.append((units.abs() < 0.01 * units.square().mean().sqrt()).float().mean().item())

    hooks = [block.mlp.register_forward_pre_hook(look) for block in model.blocks]
    model(idx)
    for hook in hooks:
        hook.remove()
    return mean(shares)


def draw(path: Path, curves: dict[str, list[dict[str, list[float]]]], losses: dict[str, list[float]]) -> None:
    """Draw one unit of each kind over its two projections, what bends them, and what training made of them."""
    fig, axes = plt.subplots(2, 4, figsize=(14, 7), layout="constrained")
    z = torch.linspace(-3, 3, 121)
    w, v = z[None, :], z[:, None]  # one projection to the right, the other upwards
    for ax, (kind, (bend, gated)) in zip(axes[0], KINDS.items(), strict=True):
        unit = bend(w) * v if gated else bend(w).expand(len(z), -1)  # (121, 121)
        shown = ax.contourf(z, z, unit.clamp(-6, 6), levels=torch.linspace(-6, 6, 25), cmap="RdBu_r")
        ax.set(title=f"one {kind} unit", xlabel="w . x", aspect="equal", xticks=range(-3, 4), yticks=range(-3, 4))
    axes[0, 0].set(ylabel="v . x")
    fig.colorbar(shown, ax=axes[0], ticks=range(-6, 7, 2), label="the unit, cut at 6")

    bends, training, detail, last = axes[1]
    for name, bend in (("GELU", F.gelu), ("SwiGLU", F.silu), ("ReLU^2", relu_squared)):
        label = "SiLU" if bend is F.silu else name
        bends.plot(z, bend(z), color=COLOURS[name], label=label)
    bends.set(title="what bends", xlabel="w . x", ylim=(-0.5, 3))
    smooth = min(20, len(curves["GELU"][0]["loss"]))
    for kind, runs in curves.items():
        line = torch.tensor([run["loss"] for run in runs]).mean(dim=0).unfold(0, smooth, 1).mean(dim=-1)
        steps = torch.arange(len(line)) + smooth // 2
        for ax, start in ((training, 0), (detail, len(line) // 2)):
            ax.plot(steps[start:], line[start:], color=COLOURS[kind], label=kind)
    training.set(title=f"training loss, mean of {smooth} steps", xlabel="step", ylabel="nats per token")
    detail.set(title="the same, second half", xlabel="step")
    for row, (kind, values) in enumerate(losses.items()):
        last.plot(values, [row] * len(values), ".", color=COLOURS[kind], alpha=0.6)
        last.errorbar(mean(values), row, xerr=spread(values), fmt="o", color=COLOURS[kind], capsize=4)
    last.set(title="held-out loss, one dot a seed", xlabel="nats per token", yticks=range(len(losses)))
    last.set(yticklabels=list(losses), ylim=(len(losses) - 0.5, -0.5))
    for ax in axes[1]:
        ax.grid(alpha=0.3)
    bends.legend()
    training.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Compute SwiGLU by hand, look at single units, and train four models of equal size."""
    C = 72  # a multiple of 3, so that 8/3 C is a whole number and the sizes are equal exactly
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), steps=8, n_seeds=1)
        C = 48
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)

    print("1. SwiGLU with a loop over units, against model.MLP")
    metrics = compare_by_hand()
    for name, difference in metrics.items():
        print(f"   {name.replace('_', ' '):32s} {difference:.1e}")
    assert max(metrics.values()) < 1e-5

    print("\n2. one unit, by its projections w . x and v . x")
    places = [(-2.0, 1.0), (-0.5, 1.0), (0.5, 1.0), (2.0, 1.0), (2.0, -1.0), (2.0, 2.0), (4.0, 2.0)]
    print("   w . x, v . x" + "".join(f"{f'{w:g}, {v:g}':>9s}" for w, v in places))
    w, v = torch.tensor(places).T
    for kind, (bend, gated) in KINDS.items():
        unit = bend(w) * v if gated else bend(w)
        print(f"   {kind:12s}" + "".join(f"{value:9.3f}" for value in unit.tolist()))

    settings = train.Config(steps=config.steps, batch_size=8, block_size=64, lr=config.lr, warmup_steps=30)
    tokenizer = ByteTokenizer()
    tokens, held_out = load_tokens("stories", 2000, tokenizer, settings.block_size)
    held_out = held_out[:20_000]
    curves: dict[str, list[dict[str, list[float]]]] = {kind: [] for kind in KINDS}
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    rest: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tqdm(total=len(KINDS) * config.n_seeds * config.steps, desc="training", disable=None) as bar:
        for seed in range(config.seed, config.seed + config.n_seeds):
            models = {kind: make_model(kind, seed, C) for kind in KINDS}
            for kind, run in race(models, tokens, settings, seed, bar).items():
                curves[kind].append(run)
                losses[kind].append(train.evaluate(models[kind], held_out, tokenizer)["val_loss"])
                rest[kind].append(share_at_rest(models[kind], held_out[: 16 * 64].view(16, 64)))
    print(
        f"\n3. training: 2 layers, {C} channels, {config.steps} steps of {8 * 64} tokens, lr {config.lr}, +- over seeds"
    )
    print("           parameters  units   held-out loss        minus GELU, seed by seed    step      units at rest")
    for kind in KINDS:
        units = models[kind].blocks[0].mlp.proj.in_features
        step = 1000 * median([seconds for run in curves[kind] for seconds in run["seconds"]])
        apart = [mine - gelu for mine, gelu in zip(losses[kind], losses["GELU"], strict=True)]
        print(
            f"   {kind:7s} {models[kind].num_parameters():11,} {units:6d}   {mean(losses[kind]):.4f} +- "
            f"{spread(losses[kind]):.4f}   {'  '.join(f'{value:+.4f}' for value in apart):25s}   {step:5.1f} ms  "
            f"{mean(rest[kind]):8.1%}"
        )
        key = kind.lower().replace("^2", "_squared")
        metrics |= {f"val_loss_{key}": mean(losses[kind]), f"val_loss_std_{key}": spread(losses[kind])}
        metrics |= {f"parameters_{key}": models[kind].num_parameters(), f"step_ms_{key}": step}
        metrics |= {f"minus_gelu_{key}": mean(apart), f"at_rest_{key}": mean(rest[kind])}
    assert len({model.num_parameters() for model in models.values()}) == 1  # else the comparison is not fair

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "swiglu.png", curves, losses)
    print(f"\nwrote swiglu.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
