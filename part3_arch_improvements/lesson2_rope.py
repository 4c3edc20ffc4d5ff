"""Lesson 3.2: rotary positions (RoPE), and how to stretch them past the trained context.

Turn a query by an angle that grows with its position, a key by one that grows with its own, and their dot product
depends on the difference of the two angles: on how far apart they are, and on nothing else about where they stand. In
D dimensions D/2 pairs of channels turn at D/2 speeds, from a radian a token down to a turn in tens of thousands of
tokens. The slow ones have not finished a turn when training ends; a longer text turns them to where they never were.

    python part3_arch_improvements/lesson2_rope.py     # 50 seconds, nearly all of it small models; a figure

You should see a rotation in two dimensions with every number, the same loop in D dimensions equal rope.py, scores that
stay when everything moves by 1,000 places, a checkpoint spoiled by another layout of the pairs and repaired by sorting
its rows, and the held-out loss of small models at two and four times their context, stretched in several ways.

References: Su et al. 2021, "RoFormer", sections 3.2 and 3.4; Chen et al. 2023, "Extending Context Window of Large
Language Models via Positional Interpolation", section 2.3 (linear); Peng et al. 2023, "YaRN: Efficient Context Window
Extension of Large Language Models", section 3; Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.2
(base 500,000), and Llama 3.1's released code.
"""

import json
import math
import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import model as model_file
import train
from data import load_tokens
from model import GPT, GPTConfig
from race import race, spread
from rope import rope, rope_angles, rope_frequencies
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
BASE = 10000.0
CONTEXT, N_MODELS = 64, 3  # of the small models: T in training, and how many there are
LLAMA2 = {"head_dim": 128, "base": BASE, "factor": 4.0, "original": 4096}  # from 4,096 tokens to 16,384


@dataclass
class Config:
    """Turn vectors by hand, and stretch the context of small models."""

    train_steps: int = 500
    """Steps of each small model."""
    more_steps: int = 50
    """Further steps at four times the context, once it is stretched."""
    seed: int = 0
    """Seed of the random vectors, and of the first small model; the next ones count on from it."""
    out: Path = RUNS / "lesson2_rope"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- by hand ---


def rotate(x: float, y: float, angle: float) -> tuple[float, float]:
    """Turn the point (x, y) about the origin by an angle in radians."""
    return x * math.cos(angle) - y * math.sin(angle), y * math.cos(angle) + x * math.sin(angle)


def rope_by_hand(vector: list[float], position: int) -> list[float]:
    """RoPE of one vector of D numbers: channels i and i + D/2 are a point, turned by position * base^(-2i/D)."""
    D = len(vector)
    turned = list(vector)
    for i in range(D // 2):
        angle = position * BASE ** (-2 * i / D)
        turned[i], turned[i + D // 2] = rotate(vector[i], vector[i + D // 2], angle)
    return turned


def turn(x: torch.Tensor, position: int) -> torch.Tensor:
    """RoPE of one vector by rope.py, in the vector's precision, (D,) -> (D,)."""
    cos, sin = rope_angles(torch.tensor([[position]]), rope_frequencies(len(x)).to(x.dtype))
    return rope(x.view(1, 1, 1, -1), cos, sin).flatten()


# --- who makes a pair ---


def rope_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """rope.rope with the pairs of the paper and of Llama's own files, channels 2i and 2i + 1; same shapes."""
    a, b = x[..., 0::2], x[..., 1::2]  # (B, heads, T, D/2) each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def sort_rows(weight: torch.Tensor, n_heads: int, head_dim: int) -> torch.Tensor:
    """Rewrite the matrix that makes half-split queries and keys so that it makes interleaved ones.

    A score is a sum over channels and does not ask for their order: channels may be renamed, as long as queries and
    keys agree. Row i of each head goes to 2i and row i + D/2 to 2i + 1; the other way without the argsort.

    Args:
        weight: (n_heads * D + any, C), query and key heads first; the rows below them (the values) stay.
        n_heads: how many heads turn: query heads and key heads together.
        head_dim: D.
    """
    order = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)]).argsort()  # (D,): 0 D/2 1 ...
    rows = (torch.arange(n_heads)[:, None] * head_dim + order).flatten()  # (n_heads, 1) + (D,) -> (n_heads * D,)
    return torch.cat([weight[rows], weight[len(rows) :]])


# --- stretching the context ---


def yarn(
    head_dim: int, base: float, factor: float, original: int, fast: float = 32.0, slow: float = 1.0
) -> tuple[torch.Tensor, float]:
    """YaRN: fast pairs stay, slow ones are slowed down, and attention is sharpened. Peng et al. 2023, section 3.

    The ramp between runs over the number of the pair, as in the paper's released code and so in everybody's
    checkpoints; the paper's text has it over the number of turns.

    Args:
        head_dim: D.
        base: the trained model's.
        factor: how much longer the context becomes.
        original: tokens in the trained context.
        fast: pairs that make more turns than this in the trained context are left alone.
        slow: those that make fewer than this are slowed down by the factor.

    Returns:
        (D/2,) radians a token, and the number that multiplies queries and keys.
    """
    frequency = rope_frequencies(head_dim, base)
    # Pair i makes n = original * base^(-2i/D) / (2 pi) turns; here is the i that makes n.
    start, end = (head_dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(base)) for n in (fast, slow))
    start, end = max(math.floor(start), 0), math.ceil(end)
    slowed = ((torch.arange(head_dim // 2) - start) / max(end - start, 0.001)).clamp(0, 1)
    return (1 - slowed) * frequency + slowed * frequency / factor, 0.1 * math.log(max(factor, 1.0)) + 1.0


def methods(head_dim: int, base: float, factor: float, original: int) -> dict[str, tuple[torch.Tensor, float]]:
    """Every method by name: frequencies (D/2,), and the number that multiplies queries and keys.

    Linear scaling slows every pair down: as if positions were divided by the factor, so that no angle is new, but
    neighbours are harder to tell apart. NTK-aware scaling takes another base, with which the fastest pair keeps its
    speed and the slowest turns `factor` times slower (Peng et al. 2023, section 3.1). Llama 3's leaves the pairs alone
    that make more than 4 turns in the trained context, slows those down that make less than one, and mixes between.
    """
    linear = {"rope_type": "linear", "factor": factor}
    llama3 = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = original
    return {
        "none": (rope_frequencies(head_dim, base), 1.0),
        "linear": (rope_frequencies(head_dim, base, linear), 1.0),
        "NTK": (rope_frequencies(head_dim, base * factor ** (head_dim / (head_dim - 2))), 1.0),
        "Llama 3": (rope_frequencies(head_dim, base, llama3), 1.0),
        "YaRN": yarn(head_dim, base, factor, original),
    }


# --- small models, past their context ---


def fit(models: dict[str, GPT], tokens: torch.Tensor, steps: int, lr: float, seed: int) -> None:
    """Train models in place, at their block_size, on the same 1,024 tokens a step."""
    T = next(iter(models.values())).config.block_size
    warmup = min(30, steps // 5)
    settings = train.Config(steps=steps, warmup_steps=warmup, lr=lr, batch_size=1024 // T, block_size=T)
    with tqdm(total=steps * len(models), desc=f"training at T = {T}", disable=None, leave=False) as bar:
        race(models, tokens, settings, seed, bar)


@torch.no_grad()
def stretched(model: GPT, length: int, frequency: torch.Tensor, sharpen: float) -> GPT:
    """A copy of a model for sequences of another length, with other frequencies (D/2,) and longer queries and keys."""
    model = deepcopy(model)
    model.config.block_size = length
    model.frequency.copy_(frequency)
    for block in model.blocks:  # a rotation keeps lengths, so the factor may as well stand in the weights
        block.attn.qkv.weight[: sum(block.attn.heads[:2]) * model.config.head_dim] *= sharpen
    return model


@torch.no_grad()
def loss_by_place(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Held-out loss at each place of a window, in nats, (T,): tokens (N,) are cut into windows of block_size."""
    T = model.config.block_size
    x = tokens[: (len(tokens) - 1) // T * T].view(-1, T)  # (N,) -> (W, T)
    y = tokens[1 : x.numel() + 1].view(-1, T)
    nats = [
        F.cross_entropy(model(x_some)[0].transpose(1, 2), y_some, reduction="none")  # (32, V, T), (32, T) -> (32, T)
        for x_some, y_some in zip(x.split(32), y.split(32), strict=True)
    ]
    return torch.cat(nats).mean(dim=0)  # (W, T) -> (T,)


# --- what is printed and drawn ---


def show_rotation(seed: int) -> dict[str, float]:
    """Print a rotation in two dimensions and in D, and what it does to scores; return what was measured."""
    angle, q, k = 0.5, (1.0, 0.0), (0.8, 0.6)
    print(f"two dimensions, {angle} radians a token: q = {q} at position m, k = {k} at position n")
    print("     m     n  m - n   q turned by m       k turned by n       q . k")
    for m, n in ((0, 0), (1, 0), (2, 1), (102, 101), (3, 0), (10, 7), (1003, 1000)):
        (a, b), (c, d) = rotate(*q, m * angle), rotate(*k, n * angle)
        print(f"  {m:4d}  {n:4d}  {m - n:5d}   ({a:6.3f}, {b:6.3f})    ({c:6.3f}, {d:6.3f})    {a * c + b * d:6.3f}")

    torch.manual_seed(seed)
    q, k = torch.randn(2, 64)
    print("\nD = 64: 32 such turns, pair by pair in float64 against rope.py in float32, which rounds the angles")
    metrics = {}
    for position in (1, 100, 10_000, 1_000_000):
        apart = (torch.tensor(rope_by_hand(q.tolist(), position)) - turn(q, position)).abs().max().item()
        metrics[f"rope_difference_{position}"] = apart
        print(f"  position {position:9,d}: largest difference {apart:.0e}")

    q, k = q.double(), k.double()
    shifts, moved = (0, 1, 1000, 1_000_000), 0.0
    print("q . k, with both moved on by so many places, in float64")
    print("  m - n" + "".join(f"{shift:>16,d}" for shift in shifts))
    for distance in (0, 1, 2, 50, 1000):
        row = [(turn(q, distance + shift) @ turn(k, shift)).item() for shift in shifts]
        moved = max(moved, max(row) - min(row))
        print(f"  {distance:5d}" + "".join(f"{score:16.10f}" for score in row))
    print(f"  largest difference in a row: {moved:.0e}")
    return metrics | {"shift_difference": moved}


@torch.no_grad()
def show_layouts(model: GPT, tokens: torch.Tensor) -> dict[str, float]:
    """Print what the layout of the pairs means for the weights of a trained model."""
    repaired = deepcopy(model)
    for block in repaired.blocks:
        weight = block.attn.qkv.weight  # ((H + 2 Hkv) * D, C); the last Hkv * D rows make values, which do not turn
        weight.copy_(sort_rows(weight, sum(block.attn.heads[:2]), model.config.head_dim))
    own, _ = model(tokens[None, :CONTEXT])  # (1, T, V)
    losses = {"trained so": loss_by_place(model, tokens).mean().item()}
    with patch.object(model_file, "rope", rope_interleaved):  # the same GPT, but with interleaved pairs
        for name, other in (("as they are", model), ("rows sorted", repaired)):
            losses[name] = loss_by_place(other, tokens).mean().item()
        apart = (repaired(tokens[None, :CONTEXT])[0] - own).abs().max().item()
    print("\ninterleaved pairs are 2i and 2i + 1 (the paper, Llama's own files), half-split ones i and i + D/2 (ours)")
    print(f"  a small model trained with half-split pairs: held-out loss {losses['trained so']:.4f} nats")
    print(f"  its weights in a GPT with interleaved pairs: {losses['as they are']:.4f}")
    print(f"  with their rows sorted: {losses['rows sorted']:.4f}, no logit off by more than {apart:.0e}")
    metrics = {f"layout_loss_{name.replace(' ', '_')}": loss for name, loss in losses.items()}
    return metrics | {"layout_sorted_difference": apart}


def show_methods() -> dict[str, float]:
    """Print what each method does to the pairs of Llama 2's heads; return how exact linear scaling is."""
    factor, original = LLAMA2["factor"], LLAMA2["original"]
    by_name = {name: frequency for name, (frequency, _) in methods(**LLAMA2).items()}
    frequency = by_name.pop("none")
    print(f"\ntimes that a pair of Llama 2's heads (D = 128) turns slower, for {factor:.0f} times {original:,} tokens")
    print("  pair i   tokens for a turn   turns in training" + "".join(f"{name:>11s}" for name in by_name))
    for i in (0, 16, 24, 32, 40, 44, 48, 63):
        turns = original * frequency[i].item() / (2 * math.pi)
        row = "".join(f"{frequency[i] / other[i]:11.2f}" for other in by_name.values())
        print(f"  {i:6d}  {original / turns:18,.0f}  {turns:18.2f}{row}")
    print(f"  YaRN also multiplies queries and keys by 0.1 ln {factor:.0f} + 1 = {methods(**LLAMA2)['YaRN'][1]:.4f}")
    slowest = 2 * math.pi / rope_frequencies(128, 500_000.0)[-1]
    print(f"  with base 500,000, as in Llama 3, the slowest pair takes {slowest:,.0f} tokens for a turn")
    places = torch.arange(0, original, 4)[None]  # whole numbers once they are divided by the factor
    stretched_angles, angles = rope_angles(places, by_name["linear"]), rope_angles(places / factor, frequency)
    apart = max((a - b).abs().max().item() for a, b in zip(stretched_angles, angles, strict=True))
    print(f"  linear scaling against dividing positions by {factor:.0f}: cosines and sines differ by {apart:.0e}")
    return {"linear_difference": apart}


def draw(path: Path, by_place: dict[str, torch.Tensor]) -> None:
    """Draw wavelengths against the trained context, what each method does to them, and the loss past the context."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4))
    original, frequency = LLAMA2["original"], rope_frequencies(128)
    for name, (slowed, _) in methods(**LLAMA2).items():
        left.plot(2 * math.pi / slowed, label=name)
        middle.plot(frequency / slowed, label=name)
        # (256,) -> (32, 8) -> (32,): single places are noisy
        right.plot(torch.arange(4, 4 * CONTEXT, 8), by_place[name].view(-1, 8).mean(dim=1), label=name)
    left.plot(2 * math.pi / rope_frequencies(128, 500_000.0), "--", color="gray", label="base 500,000")
    left.axhspan(original, 3e6, color="tab:red", alpha=0.08)
    left.text(1, 2 * original, f"no turn in the {original:,}\ntokens of training", color="tab:red", fontsize=9)
    left.set(yscale="log", ylim=(4, 3e6), xlabel="pair i", ylabel="wavelength (tokens for a turn)")
    left.set_title("Llama 2's 64 pairs, stretched 4 times")
    for turns in (32, 4, 1):
        pair = (original * frequency / (2 * math.pi) > turns).sum()
        middle.axvline(pair, color="gray", linestyle=":")
        middle.text(pair, 0.5, f" {turns} turn{'s' if turns > 1 else ''}", fontsize=8, color="gray")
    middle.set(xlabel="pair i", ylabel="times slower", ylim=(0.4, 4.3), title="What each method does to them")
    right.axvline(CONTEXT, color="tab:red", linestyle=":")
    across = right.get_xaxis_transform()  # x in places, y in shares of the height
    right.text(CONTEXT, 0.6, " trained context ends", fontsize=8, color="tab:red", transform=across)
    right.set(xlabel="place in a window", ylabel="held-out loss (nats)", title="Small models, stretched 4 times")
    left.legend(fontsize=8)  # the colours mean the same in all three
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Turn, compare, sort, stretch, and measure."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), train_steps=10, more_steps=2)
    torch.set_flush_denormal(True)
    metrics = show_rotation(config.seed)

    T = CONTEXT
    train_tokens, held_out = load_tokens("stories", 100 if config.smoke else 5000, ByteTokenizer(), 4 * T)
    held_out = held_out[: 2000 if config.smoke else 32_000]
    models = []
    for seed in range(config.seed, config.seed + N_MODELS):
        torch.manual_seed(seed)
        models.append(GPT(GPTConfig(block_size=T, n_layer=2, n_head=2, n_embd=64)))
        fit({"": models[-1]}, train_tokens, config.train_steps, 4e-3, seed)
    metrics |= show_layouts(models[0], held_out)
    metrics |= show_methods()

    print(f"\n{N_MODELS} small models trained at T = {T}: held-out loss in nats, mean +- standard deviation")
    header = (f"windows of {T}", f"of {2 * T}", f"of {4 * T}", f"{config.more_steps} steps later")
    print("           " + "".join(f"{name:>18s}" for name in header))
    by_place, nats, longest = {}, {}, [{} for _ in models]
    for name in methods(**LLAMA2):
        nats[name] = {}
        for length in (T, 2 * T, 4 * T):
            frequency, sharpen = methods(models[0].config.head_dim, BASE, length / T, T)[name]
            for model, longer in zip(models, longest, strict=True):
                longer[name] = stretched(model, length, frequency, sharpen)
            places = torch.stack([loss_by_place(longer[name], held_out) for longer in longest])  # (models, L)
            nats[name][str(length)] = places.mean(dim=1).tolist()
        by_place[name] = places.mean(dim=0)  # of the longest windows
    for i, longer in enumerate(longest):
        fit(longer, train_tokens, config.more_steps, 1e-3, config.seed + i)
    for name, row in nats.items():
        row["later"] = [loss_by_place(longer[name], held_out).mean().item() for longer in longest]
        print(f"  {name:9s}" + "".join(f"{mean(some):10.3f} +- {spread(some):.3f}" for some in row.values()))
        key = name.lower().replace(" ", "")
        metrics |= {f"loss_{key}_{column}": mean(some) for column, some in row.items()}

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "rope.png", by_place)
    print(f"\nwrote rope.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
