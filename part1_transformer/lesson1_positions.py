"""Positions: how a transformer knows the order of what it reads, and how far that knowledge reaches.

Attention looks at a set: shuffle what comes in and what comes out is shuffled likewise, nothing else. So a vector is
added to each position. Two ways: a learned table with one row for each position (GPT-2, and model.py), or fixed waves
of many lengths (the sinusoids of the first transformer). Attention itself is the subject of lessons 2 to 4; here it is
used as a closed box.

    python part1_transformer/lesson1_positions.py

You see that without positions order is lost, that a shift of a sinusoid is a rotation, and what happens when a model
that was trained on 32 positions reads 64. It takes 15 seconds and saves a picture of both kinds.

References: Vaswani et al. 2017, "Attention Is All You Need", section 3.5 (sinusoids); Radford et al. 2019 (GPT-2)
learns its table; Press et al. 2022, "Train Short, Test Long", section 2, measures the same failure on language.
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

from model import GPTConfig, Transformer

matplotlib.use("Agg")  # figures go to files, no window is opened
RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
SYMBOLS = 16  # kinds of symbols in the task
BACK = 3  # the task: name the symbol that stood so many positions ago


@dataclass
class Config:
    """Learned and sinusoidal positions: properties, a picture, and a test beyond the trained length."""

    steps: int = 300
    """Training steps of each model."""
    length: int = 32
    """T in training; the test reads twice as far."""
    seed: int = 0
    """Seed of weights and data."""
    out: Path = RUNS / "lesson1_positions"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- sinusoids ---


def sinusoid(t: int, C: int) -> list[float]:
    """The vector of position t, one number at a time: C / 2 pairs (sin, cos), each slower than the one before.

    Pair i turns by the angle w_i = 10000^(-2i / C) at each step: 1 radian for the first pair, close to 1 / 10000 for
    the last, like the second, minute and hour hands of a clock.
    """
    vector = []
    for i in range(C // 2):
        w = 10000.0 ** (-2 * i / C)
        vector += [math.sin(t * w), math.cos(t * w)]
    return vector


def sinusoids(T: int, C: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same for positions 0..T-1 at once, (T, C); C must be even."""
    t = torch.arange(T, dtype=torch.float64)[:, None]  # (T, 1)
    w = 10000.0 ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)  # (C / 2,)
    angle = t * w  # (T, 1) * (C / 2,) -> (T, C / 2)
    # (T, C / 2, 2) -> (T, C): sin and cos of one pair stand side by side
    return torch.stack([angle.sin(), angle.cos()], dim=-1).view(T, C).to(dtype)


def shift_matrix(k: int, C: int) -> torch.Tensor:
    """The (C, C) matrix that moves any sinusoid k positions on: sinusoid(t + k) = shift_matrix(k) @ sinusoid(t).

    sin(a + b) = sin a cos b + cos a sin b, and likewise cos: a rotation of each pair by k w_i, the same for every t. A
    linear layer can learn such a matrix, so "k back" is easy to ask for wherever the question is put.
    """
    shift = torch.zeros(C, C, dtype=torch.float64)
    for i in range(C // 2):
        b = k * 10000.0 ** (-2 * i / C)
        pair = torch.tensor([[math.cos(b), math.sin(b)], [-math.sin(b), math.cos(b)]], dtype=torch.float64)
        shift[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = pair
    return shift


# --- a small model that needs positions ---


class Reader(nn.Module):
    """Symbols in, symbols out: one block of model.py's Transformer between an embedding and a linear layer."""

    def __init__(self, kind: str, block_size: int, C: int = 64) -> None:
        """Positions of a `kind`: "none", "learned" or "sinusoidal"."""
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, C)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.body = Transformer(GPTConfig(block_size=block_size, n_layer=1, n_embd=C))
        self.read = nn.Linear(C, SYMBOLS)
        if kind == "learned":
            # Training starts from rows as small as the symbols, so that the picture shows what it has made of them.
            nn.init.normal_(self.body.wpe.weight, std=0.02)
        else:
            # The Transformer adds row t of its table wpe. A fixed table is a table that the optimizer may not touch.
            # Waves of size 1 would drown the symbols (N(0, 0.02)), so they are made smaller.
            table = 0.1 * sinusoids(block_size, C) if kind == "sinusoidal" else torch.zeros(block_size, C)
            self.body.wpe.weight = nn.Parameter(table, requires_grad=False)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Symbols (B, T) -> logits (B, T, SYMBOLS)."""
        return self.read(self.body(self.embed(idx)))


def train(kind: str, block_size: int, length: int, steps: int) -> Reader:
    """Teach a Reader to name the symbol BACK positions ago, on rows of `length` random symbols."""
    model = Reader(kind, block_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in tqdm(range(steps), desc=f"{kind}, {block_size} rows", leave=False):
        idx = torch.randint(SYMBOLS, (32, length))
        logits = model(idx)[:, BACK:]  # nothing stands before the first three
        loss = F.cross_entropy(logits.flatten(0, 1), idx[:, :-BACK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy_by_position(model: Reader, length: int) -> torch.Tensor:
    """Share of right answers at positions BACK..length-1 over 512 fresh rows, (length - BACK,)."""
    idx = torch.randint(SYMBOLS, (512, length))
    return (model(idx)[:, BACK:].argmax(dim=-1) == idx[:, :-BACK]).float().mean(dim=0)


# --- what is printed and drawn ---


def similarity(table: torch.Tensor) -> torch.Tensor:
    """Cosine between the vectors of any two positions, (T, C) -> (T, T)."""
    unit = F.normalize(table, dim=-1)
    return unit @ unit.T


def draw(tables: dict[str, torch.Tensor], accuracy: dict[str, torch.Tensor], length: int, path: Path) -> None:
    """Save both tables, their similarities, and accuracy by position."""
    fig = plt.figure(figsize=(13, 7.5), layout="constrained")
    grid = fig.add_gridspec(2, 3, width_ratios=[1, 1, 1.25])
    for row, (name, table) in enumerate(tables.items()):
        ax = fig.add_subplot(grid[row, 0])
        limit = table.abs().max()
        ax.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        ax.set(title=f"{name}: the table", xlabel="channel", ylabel="position")
        ax = fig.add_subplot(grid[row, 1])
        image = ax.imshow(similarity(table), cmap="RdBu", vmin=-1, vmax=1)
        ax.set(title=f"{name}: cosine of two positions", xlabel="position", ylabel="position")
        fig.colorbar(image, ax=ax, shrink=0.8)
    ax = fig.add_subplot(grid[:, 2])
    for (name, values), style in zip(accuracy.items(), [":", "-", "--"], strict=True):
        ax.plot(range(BACK, BACK + len(values)), values, style, label=name)
    ax.axvline(length - 0.5, color="black", linewidth=1)
    ax.text(length - 1.5, 0.5, "trained up to here", rotation=90, ha="right", va="center")
    ax.axhline(1 / SYMBOLS, color="grey", linewidth=1, linestyle="--")
    ax.text(BACK, 1 / SYMBOLS - 0.01, "guessing", color="grey", va="top")
    ax.set(title=f"name the symbol {BACK} back", xlabel="position", ylabel="share of right answers", ylim=(0, 1.03))
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Show what positions are for, what sinusoids can do, and where both kinds end."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), steps=20)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)
    T, C = config.length, 64
    metrics = {}

    print("1. order is invisible without positions: the last of four symbols, after 'abcd' and after 'cabd'")
    for kind in ("none", "learned"):
        model = Reader(kind, block_size=T)
        with torch.no_grad():
            last = model(torch.tensor([[0, 1, 2, 3], [2, 0, 1, 3]]))[:, -1]
        metrics[f"order_difference_{kind}"] = (last[0] - last[1]).abs().max().item()
        print(f"   {kind:8} largest difference of the two outputs {metrics[f'order_difference_{kind}']:.1e}")

    table = sinusoids(2 * T, C, torch.float64)
    by_hand = torch.tensor([sinusoid(t, C) for t in range(2 * T)], dtype=torch.float64)
    metrics["difference_by_hand"] = (table - by_hand).abs().max().item()
    print("\n2. sinusoids: position 5, first two and last pair of C = 64 channels (sin, cos)")
    pairs = [table[5, c : c + 2].tolist() for c in (0, 2, 62)]
    print("   " + ", ".join(f"({sin:.4f}, {cos:.4f})" for sin, cos in pairs))
    print(f"   one number at a time against all at once: largest difference {metrics['difference_by_hand']:.1e}")
    moved = table[:-7] @ shift_matrix(7, C).T  # (T', C) @ (C, C)
    metrics["difference_shift"] = (moved - table[7:]).abs().max().item()
    print(f"   one matrix moves every position by 7:        largest difference {metrics['difference_shift']:.1e}")
    assert max(metrics["difference_by_hand"], metrics["difference_shift"]) < 1e-6

    print(
        f"\n3. trained on {T} positions to name the symbol {BACK} back, read on {2 * T} (guessing: {1 / SYMBOLS:.4f})"
    )
    models = {
        "none": train("none", 2 * T, T, config.steps),
        "learned": train("learned", 2 * T, T, config.steps),
        "sinusoidal": train("sinusoidal", 2 * T, T, config.steps),
    }
    print(f"                positions {BACK}..{T - 1}   position {T}   positions {T + 1}..{2 * T - 1}")
    accuracy = {}
    for kind, model in models.items():
        accuracy[kind] = accuracy_by_position(model, 2 * T)
        inside, edge, beyond = accuracy[kind].split([T - BACK, 1, T - 1])
        for name, part in (("inside", inside), ("edge", edge), ("beyond", beyond)):
            metrics[f"accuracy_{kind}_{name}"] = part.mean().item()
        print(f"   {kind:12} {inside.mean():12.3f} {edge.mean():13.3f} {beyond.mean():17.3f}")

    # The learned model above was given 64 rows of which training touched 32. The usual table ends where training does.
    try:
        accuracy_by_position(Reader("learned", block_size=T), 2 * T)
    except ValueError as error:
        print(f"   a learned table of {T} rows: {error}")

    tables = {"learned": models["learned"].body.wpe.weight.detach(), "sinusoidal": sinusoids(2 * T, C)}
    draw(tables, accuracy, T, config.out / "positions.png")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"\nwritten: {config.out / 'positions.png'}, {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
