"""Residual connections and LayerNorm: what keeps a deep stack alive.

Four ways to join the same 48 layers (24 blocks of attention and MLP):

    plain      x = f(x)               each layer sees only what the one before left of the input
    residual   x = x + f(x)           each layer adds to a stream that runs past it
    post-norm  x = norm(x + f(x))     the first transformer: the stream itself is normalised after each addition
    pre-norm   x = x + f(norm(x))     GPT-2 and model.py: only the copy that goes into a layer is normalised

    python part1_transformer/lesson6_residuals.py

You see LayerNorm by hand, what becomes of activations, gradients and the input over depth for each way, and which learn
a small task in 80 steps, in three seeds. It takes 30 seconds and saves a figure.

References: He et al. 2016, "Deep Residual Learning", section 3.1; Ba et al. 2016, "Layer Normalization", section 3;
Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", section 3, on post- against pre-norm.
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

from model import MLP, Block, CausalSelfAttention, GPTConfig

matplotlib.use("Agg")  # figures go to files, no window is opened
RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
KINDS = ["plain", "residual", "post-norm", "pre-norm"]
SYMBOLS = 16
BACK = 3  # the task of lesson 1: name the symbol that stood three positions ago


@dataclass
class Config:
    """Four ways to stack, measured at the start and trained."""

    depth: int = 24
    """Blocks in the stack."""
    steps: int = 80
    """Training steps of each run."""
    lr: float = 3e-3
    """Learning rate, constant from the first step: no warm-up."""
    n_seeds: int = 3
    """Training runs for each way, with seeds seed, seed + 1, ..."""
    seed: int = 0
    """First seed of weights and data."""
    out: Path = RUNS / "lesson6_residuals"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- LayerNorm ---


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Each vector gets mean 0 and variance 1 over its own channels, then a learned scale and shift; (..., C)."""
    mean = x.mean(dim=-1, keepdim=True)  # (B, T, C) -> (B, T, 1): no other position or row is involved
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)  # divided by C, not by C - 1
    return (x - mean) / (variance + eps).sqrt() * weight + bias


# --- four ways to stack the same layers ---


class AnyBlock(nn.Module):
    """The parts of model.py's Block, joined in one of four ways: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block's step, (B, T, C) -> (B, T, C)."""
        for norm, layer in ((self.norm1, self.attn), (self.norm2, self.mlp)):
            if self.kind == "plain":
                x = layer(x)
            elif self.kind == "residual":
                x = x + layer(x)
            elif self.kind == "post-norm":
                x = norm(x + layer(x))
            else:
                x = x + layer(norm(x))
        return x


def make_stack(kind: str, depth: int, C: int) -> nn.ModuleList:
    """`depth` blocks of 4 heads and C channels.

    Matrices are N(0, 1 / inputs), so that each product keeps the size of what it gets. The plain stack has its best
    chance this way: under the smaller ones of init_weights it fades faster.
    """
    blocks = nn.ModuleList([AnyBlock(GPTConfig(n_head=4, n_embd=C), kind) for _ in range(depth)])
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return blocks


def look_inside(kind: str, depth: int, seed: int, C: int = 32) -> dict[str, list[float]]:
    """What the stream and the gradient are like after each block, before any training.

    Args:
        kind: one of KINDS.
        depth: blocks.
        seed: seed of weights and input.
        C: channels.

    Returns:
        One number for each of blocks 1..depth: `activation`, the root mean square of the stream; `gradient`, that of
        the gradient that arrives there when it has size 1 at the end of the stack; `input`, the mean cosine between
        the stream and what came into the stack: 1 is all of it, 0 nothing left.
    """
    torch.manual_seed(seed)
    # float64, because the residual stack without norms reaches numbers whose attention scores float32 cannot resolve.
    blocks = make_stack(kind, depth, C).double()
    start = torch.randn(8, 16, C, dtype=torch.float64, requires_grad=True)
    x, streams = start, []
    for block in blocks:
        x = block(x)
        x.retain_grad()
        streams.append(x)
    x.backward(torch.randn_like(x))

    def rms(a: torch.Tensor) -> float:
        return a.detach().square().mean().sqrt().item()

    return {
        "activation": [rms(a) for a in streams],
        "gradient": [rms(a.grad) for a in streams],
        "input": [F.cosine_similarity(start, a, dim=-1).mean().item() for a in streams],
    }


# --- does it learn? ---


class Reader(nn.Module):
    """Symbols (B, T) -> logits (B, T, SYMBOLS), through a stack of one kind."""

    def __init__(self, kind: str, depth: int, T: int = 16, C: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, C)
        self.positions = nn.Parameter(torch.randn(T, C))
        self.blocks = make_stack(kind, depth, C)
        # Post-norm ends on a norm already; the others get one, as in model.py, so that all read a stream of size 1.
        self.norm = nn.Identity() if kind == "post-norm" else nn.LayerNorm(C)
        self.read = nn.Linear(C, SYMBOLS)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Symbols (B, T) -> logits (B, T, SYMBOLS)."""
        x = self.embed(idx) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.read(self.norm(x))


def train(kind: str, config: Config, seed: int) -> list[float]:
    """Loss at each step; nan after a step whose gradient is not finite."""
    torch.manual_seed(seed)
    model = Reader(kind, config.depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    losses = []
    for _ in range(config.steps):
        idx = torch.randint(SYMBOLS, (16, 16))
        loss = F.cross_entropy(model(idx)[:, BACK:].flatten(0, 1), idx[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        # Every run gets the same clipping, so that one huge gradient does not dominate AdamW's running means.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        if not torch.isfinite(norm):
            return losses + [math.nan] * (config.steps - len(losses))
        optimizer.step()
    return losses


def draw(inside: dict[str, dict[str, list[float]]], losses: dict[str, list[list[float]]], path: Path) -> None:
    """Save what look_inside found for each kind over depth, and the training curves."""
    fig, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    axes = axes.flatten()
    for (kind, found), colour in zip(inside.items(), ["C7", "C1", "C3", "C0"], strict=True):
        for ax, values in zip(axes, found.values(), strict=False):
            ax.plot(range(1, len(values) + 1), values, color=colour, label=kind)
        overflows = sum(math.isnan(curve[-1]) for curve in losses[kind])
        label = kind + (f" ({overflows} of {len(losses[kind])} overflow)" if overflows else "")
        for curve in losses[kind]:
            axes[3].plot(curve, color=colour, alpha=0.8, label=label)
            label = None  # one entry in the legend for all seeds
    axes[0].set(title="activations (root mean square)", xlabel="after block", yscale="log")
    axes[1].set(title="gradient, 1 at the end of the stack", xlabel="after block", yscale="log")
    axes[2].set(title="what is left of the input (cosine)", xlabel="after block", ylim=(-0.1, 1))
    axes[3].axhline(math.log(SYMBOLS), color="black", linewidth=1, linestyle=":")
    axes[3].text(0, 3.2, "dotted: ln 16, guessing")
    axes[3].set(title="training loss, one line a seed", xlabel="step", ylim=(0, 3.5))
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend()
    axes[3].legend(loc="lower left")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Compute LayerNorm by hand, measure four stacks at the start, and train them."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), steps=3, n_seeds=1)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)
    metrics = {}

    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    print(f"1. LayerNorm of {x.tolist()}: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5")
    print(f"   {[round(v, 3) for v in layer_norm(x, torch.ones(4), torch.zeros(4)).tolist()]}")
    norm, x = nn.LayerNorm(32), torch.randn(2, 8, 32) * 5 + 3
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    block = Block(GPTConfig(n_embd=32))
    ours = AnyBlock(GPTConfig(n_embd=32), "pre-norm")
    ours.load_state_dict(block.state_dict())
    with torch.no_grad():
        metrics["difference_layer_norm"] = (layer_norm(x, norm.weight, norm.bias) - norm(x)).abs().max().item()
        metrics["difference_block"] = (ours(x) - block(x)).abs().max().item()
    print(f"   by hand against nn.LayerNorm:      largest difference {metrics['difference_layer_norm']:.1e}")
    print(f"   pre-norm as below against Block:   largest difference {metrics['difference_block']:.1e}")
    assert max(metrics.values()) < 1e-5  # numbers up to 20 in float32

    shown = sorted({1, config.depth // 4, config.depth // 2, config.depth})
    print(f"\n2. before training, {config.depth} blocks deep")
    inside = {kind: look_inside(kind, config.depth, config.seed) for kind in KINDS}
    titles = ["root mean square of the stream", "gradient, 1 at the end", "what is left of the input (cosine)"]
    for name, title in zip(inside["plain"], titles, strict=True):
        print(f"   {title:35} after block" + "".join(f"{block:9d}" for block in shown))
        for kind in KINDS:
            values = [inside[kind][name][block - 1] for block in shown]
            print(f"      {kind:43}" + "".join(f"{value:9.2g}" for value in values))
            metrics[f"{name}_{kind.replace('-', '_')}"] = values[0] if name == "gradient" else values[-1]

    print(f"\n3. training: loss of the last 10 of {config.steps} steps in each seed; guessing gives ln 16 = 2.773")
    losses: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    runs = [(kind, seed) for kind in KINDS for seed in range(config.seed, config.seed + config.n_seeds)]
    for kind, seed in tqdm(runs, desc="training runs", leave=False):
        losses[kind].append(train(kind, config, seed))
    for kind in KINDS:
        ends = [sum(curve[-10:]) / len(curve[-10:]) for curve in losses[kind]]
        print(f"   {kind:11} " + "  ".join(f"{end:.3f}" for end in ends))
        # A mean over runs of which some overflowed would be nan, which JSON has no name for: those are left out.
        if all(math.isfinite(end) for end in ends):
            metrics[f"loss_{kind.replace('-', '_')}"] = sum(ends) / len(ends)

    draw(inside, losses, config.out / "residuals.png")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"\nwritten: {config.out / 'residuals.png'}, {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
