"""One attention head as a small class, the causal mask, and why scores are divided by sqrt(D).

Lesson 2 chose its matrices by hand; a head learns them: three linear layers for queries, keys and values, a mask, a
softmax. The class below is written as the formula reads, and equals torch's fused scaled_dot_product_attention, which
never stores the (T, T) weights.

    python part1_transformer/lesson3_head.py

You see the two agree to 1e-6, what a wrong mask does, and a table of scores, weights and gradients by head dimension,
with and without the factor 1/sqrt(D). It takes 3 seconds.

References: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1 and its footnote 4 (the variance of a dot
product); Dao et al. 2022, "FlashAttention", section 3.1, for what the fused kernel does.
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

matplotlib.use("Agg")  # figures go to files, no window is opened
RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """One head: equal to torch, causal, and scaled."""

    n_queries: int = 2000
    """Random queries for each row of the sqrt(D) table."""
    n_keys: int = 64
    """T, keys that each of them looks at."""
    seed: int = 0
    """Seed of weights, queries and keys."""
    out: Path = RUNS / "lesson3_head"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- one head ---


class Head(nn.Module):
    """One causal attention head, (B, T, C) -> (B, T, D): softmax(q k^T / sqrt(D) + mask) v."""

    def __init__(self, n_embd: int, head_dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(n_embd, head_dim)
        self.k = nn.Linear(n_embd, head_dim)
        self.v = nn.Linear(n_embd, head_dim)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Who looks at whom: (B, T, C) -> (B, T, T), rows sum to 1, zero above the diagonal."""
        q, k = self.q(x), self.k(x)  # (B, T, C) -> (B, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, T, D) @ (B, D, T) -> (B, T, T)
        T = x.shape[1]
        # tril is 1 on and below the diagonal: position t may look at 0..t.
        visible = torch.ones(T, T, device=x.device).tril().bool()
        return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mixture of values that each position takes, (B, T, C) -> (B, T, D)."""
        return self.weights(x) @ self.v(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


def leak(weights: torch.Tensor) -> float:
    """Largest weight, (B, T, T), that a position puts on a later one: 0 in a causal head."""
    return weights.triu(diagonal=1).max().item()


def masked_after_softmax(head: Head, x: torch.Tensor) -> torch.Tensor:
    """A common mistake: softmax over all positions first, zeros for the future afterwards; (B, T, C) -> (B, T, T)."""
    q, k = head.q(x), head.k(x)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1).tril()


# --- why sqrt(D) ---


def score_statistics(head_dim: int, n_queries: int, n_keys: int, scale: float) -> dict[str, float]:
    """What the factor before the softmax does to random queries and keys.

    Args:
        head_dim: D; entries of queries and keys are N(0, 1), as they are behind a LayerNorm at the start.
        n_queries: how many queries to average over.
        n_keys: T, keys that each query sees.
        scale: factor on the scores.

    Returns:
        `score_std`; `peak`, mean largest weight, in [1/T, 1]; `stuck`, the share of queries for which the gradient of
        their largest weight with respect to the scores is shorter than 0.01: hardly anything reaches q and k there.
    """
    q, k = torch.randn(n_queries, head_dim), torch.randn(n_keys, head_dim)
    # q . k is a sum of D products with mean 0 and variance 1, so its variance is D.
    scores = (q @ k.T * scale).requires_grad_()  # (N, D) @ (D, T) -> (N, T)
    peak = scores.softmax(dim=-1).max(dim=-1).values  # (N,)
    # Softmax has derivative p_i (1[i = j] - p_j): zero everywhere as soon as one p is 1 and the others are 0.
    (gradient,) = torch.autograd.grad(peak.sum(), scores)  # (N, T)
    return {
        "score_std": scores.std().item(),
        "peak": peak.mean().item(),
        "stuck": (gradient.norm(dim=-1) < 0.01).float().mean().item(),
    }


def draw(weights: torch.Tensor, table: dict[str, list[dict[str, float]]], dims: list[int], path: Path) -> None:
    """Save the weights (T, T) of an untrained head, and the curves of the table over D."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    image = axes[0].imshow(weights, cmap="Blues", vmin=0)
    ticks = range(0, len(weights), 3)
    axes[0].set(
        title="weights of an untrained head", xlabel="s: looked at", ylabel="t: asks", xticks=ticks, yticks=ticks
    )
    fig.colorbar(image, ax=axes[0])
    for label, colour in (("raw", "C3"), ("scaled", "C0")):
        axes[1].plot(dims, [row["peak"] for row in table[label]], "o-", color=colour, label=label)
        axes[2].plot(dims, [row["stuck"] for row in table[label]], "o-", color=colour, label=label)
    axes[1].set(title="largest weight", xlabel="D", ylim=(0, 1), xscale="log", xticks=dims, xticklabels=dims)
    axes[2].set(title="share of queries without gradient", xlabel="D", xscale="log", xticks=dims, xticklabels=dims)
    for ax in axes[1:]:
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Prove the head equal to torch, look at the mask, measure the scale."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_queries=200)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)

    B, T, C, D = 2, 16, 32, 8
    head = Head(C, D)
    x = torch.randn(B, T, C)
    with torch.no_grad():
        fused = F.scaled_dot_product_attention(head.q(x), head.k(x), head.v(x), is_causal=True)
        difference = (head(x) - fused).abs().max().item()
        weights, wrong = head.weights(x), masked_after_softmax(head, x)
    print(f"one head, B = {B}, T = {T}, C = {C}, D = {D}: x {tuple(x.shape)} -> {tuple(fused.shape)}")
    print(f"  largest difference from scaled_dot_product_attention  {difference:.1e}")
    assert difference < 1e-6
    print(f"  largest weight on a later position                    {leak(weights):g}")
    print(f"  row sums, mask before the softmax   {weights[0].sum(-1)[:3].tolist()} ...")
    rounded = [round(total, 3) for total in wrong[0].sum(-1)[:3].tolist()]
    # The leak is subtle: the early rows are too small, by an amount that depends on the scores of the future.
    print(f"  row sums, zeros after the softmax   {rounded} ... the future still decides how much is left")

    dims = [4, 16, 64, 256, 1024]
    table: dict[str, list[dict[str, float]]] = {"raw": [], "scaled": []}
    print(f"\nscores of random queries and keys, T = {config.n_keys} (a uniform weight is {1 / config.n_keys:.3f})")
    print("       ---------- raw ----------  ----- times 1/sqrt(D) -----")
    print("    D   std of  largest     no      std of  largest     no")
    print("        scores   weight  gradient   scores   weight  gradient")
    for D in dims:
        for label, scale in (("raw", 1.0), ("scaled", D**-0.5)):
            table[label].append(score_statistics(D, config.n_queries, config.n_keys, scale))
        both = [table[label][-1] for label in ("raw", "scaled")]
        print(f"{D:5d}" + " ".join(f"{s['score_std']:9.2f}{s['peak']:9.3f}{s['stuck']:9.1%}" for s in both))

    metrics = {"difference_torch": difference}
    for label, rows in table.items():
        for D, row in zip(dims, rows, strict=True):
            metrics |= {f"{name}_{label}_{D}": value for name, value in row.items()}
    draw(weights[0], table, dims, config.out / "head.png")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"\nwritten: {config.out / 'head.png'}, {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
