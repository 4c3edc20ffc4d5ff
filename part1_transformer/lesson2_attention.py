"""Self-attention by hand: three words, two channels, every number on the page.

Each word asks a question (its query), shows what it is (its key) and has something to give away (its value). A word
compares its query with all keys it may see, turns the matches into weights that sum to 1, and takes that mixture of the
values. Here that is done twice in numpy, number by number in loops and as matrices, and then compared with torch's
scaled_dot_product_attention and with our CausalSelfAttention.

    python part1_transformer/lesson2_attention.py

You see every intermediate number of "the cat sleeps", three differences below 1e-6, and a figure of the three steps. It
takes 3 seconds.

Reference: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, equation 1.
"""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from model import CausalSelfAttention, GPTConfig

matplotlib.use("Agg")  # figures go to files, no window is opened
RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Attention over three words, every number printed."""

    out: Path = RUNS / "lesson2_attention"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- the example: T = 3 words, C = D = 2 channels ---

WORDS = ["the", "cat", "sleeps"]
# Channel 0 says how much of a noun a word is, channel 1 how much of a verb. A real model learns such channels; ours are
# chosen, so that each number below can be understood.
X = np.array([[0.5, 0.5], [2.0, 0.0], [0.0, 2.0]])  # (T, C)
W_Q = np.array([[0.0, 1.0], [1.0, 0.0]])  # (C, D): swaps the channels, so a verb asks for nouns and a noun for verbs
W_K = np.array([[1.0, 0.0], [0.0, 1.0]])  # (C, D): a word shows what it is
W_V = np.array([[1.0, -1.0], [0.5, 1.0]])  # (C, D): what a word gives away to those who look at it


# --- the same computation, three times ---


def attention_in_loops(x: np.ndarray, w_q: np.ndarray, w_k: np.ndarray, w_v: np.ndarray) -> np.ndarray:
    """Causal self-attention one number at a time; (T, C), three times (C, D) -> (T, D)."""
    q, k, v = x @ w_q, x @ w_k, x @ w_v  # (T, C) @ (C, D) -> (T, D)
    T, D = q.shape
    out = np.zeros((T, D))
    for t in range(T):  # the word that asks
        # It may look at s = 0..t: the loop ends there, and that is all that "causal" means.
        scores = [sum(q[t, d] * k[s, d] for d in range(D)) / math.sqrt(D) for s in range(t + 1)]
        exps = [math.exp(score) for score in scores]
        weights = [e / sum(exps) for e in exps]
        for s in range(t + 1):
            out[t] += weights[s] * v[s]
    return out


def attention_in_matrices(x: np.ndarray, w_q: np.ndarray, w_k: np.ndarray, w_v: np.ndarray) -> dict[str, np.ndarray]:
    """Causal self-attention as matrix products.

    Args:
        x: (T, C), one row a word.
        w_q: (C, D), makes queries; so do w_k for keys and w_v for values.

    Returns:
        Every intermediate result by name: `q`, `k`, `v` (T, D); `scores`, `scaled`, `masked`, `exps`, `weights` (T, T),
        where row t belongs to the word that asks and column s to the word that is looked at; `out` (T, D).
    """
    q, k, v = x @ w_q, x @ w_k, x @ w_v  # (T, C) @ (C, D) -> (T, D)
    T, D = q.shape
    scores = q @ k.T  # (T, D) @ (D, T) -> (T, T)
    scaled = scores / math.sqrt(D)
    future = np.triu(np.ones((T, T), dtype=bool), k=1)  # True where s > t
    # A score of -inf becomes a weight of exp(-inf) = 0, and the rest of the row still sums to 1.
    masked = np.where(future, -np.inf, scaled)
    exps = np.exp(masked)
    weights = exps / exps.sum(axis=1, keepdims=True)
    out = weights @ v  # (T, T) @ (T, D) -> (T, D)
    return {
        "q": q, "k": k, "v": v, "scores": scores, "scaled": scaled,
        "masked": masked, "exps": exps, "weights": weights, "out": out,
    }  # fmt: skip


def attention_in_torch(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The one call that models use; three times (T, D) -> (T, D)."""
    q, k, v = (torch.tensor(a, dtype=torch.float32) for a in (q, k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0].numpy()


def attention_in_model(x: np.ndarray, w_q: np.ndarray, w_k: np.ndarray, w_v: np.ndarray) -> np.ndarray:
    """Our CausalSelfAttention with one head and these weights; needs C = D; (T, C) -> (T, C)."""
    C = x.shape[1]
    attention = CausalSelfAttention(GPTConfig(n_head=1, n_embd=C))
    # nn.Linear keeps its matrix as (out, in) and computes x @ W.T, hence the transpose. Rows: queries, keys, values.
    fused = np.concatenate([w_q, w_k, w_v], axis=1).T  # (C, 3C) -> (3C, C)
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.tensor(fused))
        attention.qkv.bias.zero_()
        # The output projection mixes several heads. With one head we let it pass everything through.
        attention.proj.weight.copy_(torch.eye(C))
        attention.proj.bias.zero_()
        return attention(torch.tensor(x, dtype=torch.float32)[None])[0].numpy()


# --- what is printed and drawn ---


def show(title: str, table: np.ndarray, columns: list[str]) -> None:
    """Print a (T, n) table with the three words at the left."""
    print(f"\n{title}")
    print("          " + "".join(f"{column:>8}" for column in columns))
    for word, row in zip(WORDS, table, strict=True):
        print(f"  {word:8}" + "".join(f"{value:8.3f}" for value in row))


def draw(steps: dict[str, np.ndarray], path: Path) -> None:
    """Save the picture of one pass: queries and keys as arrows, scores, weights, and what comes out."""
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.9), width_ratios=[1, 1, 1, 0.8], layout="constrained")
    for t, (word, colour) in enumerate(zip(WORDS, ["C7", "C0", "C3"], strict=True)):
        for name, style, width, shift in (("k", "-", 5, 0.1), ("q", "--", 1.5, -0.22)):
            x, y = steps[name][t]
            arrow = {"arrowstyle": "->", "color": colour, "linestyle": style, "linewidth": width, "alpha": width**-0.5}
            axes[0].annotate("", (x, y), (0, 0), arrowprops=arrow)
            axes[0].text(x + 0.1, y + shift, f"{name}({word})", color=colour)
    axes[0].set(xlim=(-0.3, 3.1), ylim=(-0.5, 2.6), xlabel="noun", ylabel="verb", title="keys (wide), queries (dashed)")
    tables = [("scaled", "1. scores / sqrt(D)"), ("weights", "2. mask and softmax: weights"), ("out", "3. weights @ v")]
    for ax, (name, title) in zip(axes[1:], tables, strict=True):
        table = steps[name]
        limit = table.max() * 1.7  # wide enough that black numbers stay readable
        ax.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for (t, s), value in np.ndenumerate(table):
            future = name == "weights" and s > t
            ax.text(s, t, "masked" if future else f"{value:.3f}", ha="center", va="center")
        columns = ["channel 0", "channel 1"] if name == "out" else WORDS
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(3), WORDS)
        ax.set_title(title)
        if name != "out":
            ax.set(ylabel="t: who asks", xlabel="s: who is looked at")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Print attention step by step, prove it equal to torch and to the model, and draw it."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()))
    config.out.mkdir(parents=True, exist_ok=True)
    steps = attention_in_matrices(X, W_Q, W_K, W_V)
    q, k, v, weights = (steps[name] for name in ("q", "k", "v", "weights"))

    show("x: what comes in (T = 3, C = 2)", X, ["noun", "verb"])
    show("q = x @ W_q: what each word asks for", q, ["noun", "verb"])
    show("k = x @ W_k: what each word shows", k, ["noun", "verb"])
    show("v = x @ W_v: what each word gives away", v, ["0", "1"])
    show("scores = q @ k.T: row asks, column is looked at", steps["scores"], WORDS)
    print(
        f"  sleeps asks, cat answers: {q[2, 0]:g} x {k[1, 0]:g} + {q[2, 1]:g} x {k[1, 1]:g} = {steps['scores'][2, 1]:g}"
    )
    show("scaled = scores / sqrt(2)", steps["scaled"], WORDS)
    show("masked: nobody sees what comes later", steps["masked"], WORDS)
    print("  cat would like to look at its verb (score 4), but it has not been said yet.")
    show("exp(masked)", steps["exps"], WORDS)
    print("  sum of each row: " + ", ".join(f"{total:.3f}" for total in steps["exps"].sum(axis=1)))
    show("weights = exp / sum of its row", weights, WORDS)
    show("out = weights @ v", steps["out"], ["0", "1"])
    terms = " + ".join(f"{weights[2, s]:.3f} x {v[s, 0]:g}" for s in range(3))
    print(f"  channel 0 of sleeps: {terms} = {steps['out'][2, 0]:.3f}")

    # Differences are rounding alone: the loops are float64 like the matrices, torch and the model float32.
    others = {
        "loops": attention_in_loops(X, W_Q, W_K, W_V),
        "torch": attention_in_torch(q, k, v),
        "model": attention_in_model(X, W_Q, W_K, W_V),
    }
    print("\nlargest difference from the matrices above")
    metrics = {}
    for name, out in others.items():
        metrics[f"difference_{name}"] = float(np.abs(out - steps["out"]).max())
        print(f"  {name:6} {metrics[f'difference_{name}']:.1e}")
        assert metrics[f"difference_{name}"] < 1e-6, f"{name} computes something else"

    draw(steps, config.out / "attention.png")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"\nwritten: {config.out / 'attention.png'}, {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
