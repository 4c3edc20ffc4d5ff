"""Lesson 2.5: choosing a token from a distribution.

The model gives probabilities; something has to pick. Always taking the likeliest token (greedy) writes the same text
every time, and where the model is unsure it walks in circles. Drawing from all tokens now and then takes one that the
model itself thinks wrong, and there are hundreds of those. Temperature, top-k and top-p are three ways to draw, but
less often from the tail.

    python part2_minimal_llm/lesson5_sampling.py     # 20 seconds at most; a distribution six ways, six texts, a figure

You should see a filter written as a plain loop agree with generate.filter_logits, how many tokens each setting keeps,
and how much each one repeats itself. It uses the model of train.py, or trains a small one first if there is none.

References: Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.1 (top-k); Holtzman et al. 2020, "The
Curious Case of Neural Text Degeneration", sections 3.1 (top-p) and 4.
"""

import json
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import tyro

import train
from data import UserError
from generate import filter_logits, generate, load_checkpoint, printable
from model import GPT
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
# name -> temperature, top_k, top_p
SETTINGS = {
    "temperature 1": (1.0, 0, 1.0),
    "temperature 0.5": (0.5, 0, 1.0),
    "temperature 2": (2.0, 0, 1.0),
    "greedy": (0.0, 0, 1.0),
    "top-k 5": (1.0, 5, 1.0),
    "top-p 0.8": (1.0, 0, 0.8),
}


@dataclass
class Config:
    """Look at one distribution under every way to sample from it."""

    checkpoint: Path = RUNS / "best.pt"
    """Model to sample from. If train.py has not left its own, a small one is trained for some seconds."""
    prompt: str = "One day, "
    """Text whose next token is looked at."""
    texts: int = 3
    """B, texts to write with each setting."""
    length: int = 160
    """Tokens to write in each."""
    train_steps: int = 400
    """Steps of the small model."""
    seed: int = 0
    """Seed of the draws."""
    out: Path = RUNS / "lesson5_sampling"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


def load_model(config: Config) -> tuple[GPT, ByteTokenizer]:
    """Load the checkpoint; if train.py has left none, train a model that is small enough for a lesson."""
    path = config.checkpoint
    if config.smoke or (path == Config.checkpoint and not path.is_file()):
        print(f"no {path.name} of train.py: training a small model for {config.train_steps} steps")
        size = {"n_stories": 1000, "batch_size": 12, "block_size": 64, "n_layer": 2, "n_head": 8, "n_embd": 96}
        pace = {"steps": config.train_steps, "lr": 4e-3, "warmup_steps": 30, "eval_every": 400, "eval_tokens": 20_000}
        train.train(train.Config(**size, **pace, out=config.out / "model", device="cpu"))
        path = config.out / "model" / "best.pt"
    return load_checkpoint(path, torch.device("cpu"))


def naive_filter(scores: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The probabilities to draw from, by plain loops: scores of V tokens -> V probabilities, 0 where a token is cut."""
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)  # tokens, the likeliest first
    if temperature == 0:
        order, temperature = order[:1], 1.0
    if top_k > 0:
        order = order[:top_k]
    weights = {i: math.exp((scores[i] - scores[order[0]]) / temperature) for i in order}
    total = sum(weights.values())
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if reached >= top_p:  # the token that crosses p is in
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


def largest_difference(logits: torch.Tensor) -> float:
    """Compare naive_filter with filter_logits on N distributions, (N, V), under many settings."""
    apart = 0.0
    for temperature in (0.0, 0.7, 1.0, 1.5):
        for top_k in (0, 1, 5, 1000):
            for top_p in (0.1, 0.5, 0.9, 1.0):
                fast = filter_logits(logits, temperature, top_k, top_p).softmax(dim=-1)
                slow = torch.tensor([naive_filter(row, temperature, top_k, top_p) for row in logits.tolist()])
                apart = max(apart, (fast - slow).abs().max().item())
    return apart


def readable(tokens: list[int], tokenizer: ByteTokenizer) -> str:
    """Show tokens as text, the end token as <e>."""
    return printable("".join("<e>" if i == tokenizer.eot else tokenizer.decode([i]) for i in tokens))


def repeated(text: str, n: int = 10) -> float:
    """Share of a text's pieces of n characters that stood in it before, in [0, 1]."""
    pieces = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(set(pieces)) / max(len(pieces), 1)


def draw(path: Path, shaped: dict[str, torch.Tensor], tokenizer: ByteTokenizer, prompt: str) -> None:
    """Draw the 24 likeliest tokens under each setting; a token that is cut has no bar."""
    order = shaped["temperature 1"].argsort(descending=True)[:24]
    names = ["end" if i == tokenizer.eot else repr(tokenizer.decode([i]))[1:-1] for i in order.tolist()]
    top = 3 * shaped["temperature 1"].max().item()
    fig, axes = plt.subplots(2, 3, figsize=(13, 5.5), sharey=True)
    for ax, (name, probs) in zip(axes.flat, shaped.items(), strict=True):
        kept = int((probs > 0).sum())
        ax.bar(range(len(order)), shaped["temperature 1"][order], color="lightgray")
        ax.bar(range(len(order)), probs[order], color="tab:blue", width=0.5)
        ax.set_xticks(range(len(order)), names, fontsize=8)
        ax.set_title(f"{name}: {kept} of {len(probs)} tokens can be drawn", fontsize=10)
        if probs.max() > top:  # one token has nearly everything: its bar is cut, so that the others can be compared
            ax.text(int(probs[order].argmax()) + 0.5, top * 0.9, f"{probs.max():.2f}", color="tab:blue")
    axes[0, 0].set_ylim(0, top)  # shared by all panels
    for ax in axes[:, 0]:
        ax.set_ylabel("probability")
    fig.suptitle(f"The token after {prompt!r}: as the model gave it (gray), and what is drawn from (blue)")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Shape one distribution six ways, and write six texts."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), train_steps=20, length=40)
    torch.set_flush_denormal(True)
    config.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(config)
    idx = torch.tensor([tokenizer.encode(config.prompt)])  # (1, T)
    with torch.no_grad():
        logits, _ = model.eval()(idx)  # (1, T, V)

    apart = largest_difference(logits[0])
    print(f"\na plain loop against filter_logits, {len(logits[0])} distributions, 64 settings: differ by {apart:.0e}")

    print(f"\nthe token after {config.prompt!r}")
    print("  setting          tokens kept   entropy (nats)   the likeliest")
    shaped, metrics = {}, {"filter_difference": apart}
    for name, setting in SETTINGS.items():
        probs = filter_logits(logits[:, -1], *setting).softmax(dim=-1)[0]  # (V,)
        entropy = torch.special.entr(probs).sum().item()  # -sum p ln p: how open the choice is
        best = ", ".join(
            f"{chr(i) if i < 256 else 'end'} {p:.2f}" for p, i in zip(*probs.topk(3), strict=True) if p > 0
        )
        print(f"  {name:15s}  {(probs > 0).sum():11d}  {entropy:15.2f}   {best}")
        shaped[name] = probs
        metrics[f"kept_{name.replace(' ', '_')}"] = (probs > 0).sum().item()

    print(f"\n{config.texts} texts of {config.length} tokens each; the first, how many differ, how much repeats itself")
    for name, setting in SETTINGS.items():
        generator = torch.Generator().manual_seed(config.seed)
        rows = generate(model, idx.repeat(config.texts, 1), config.length, *setting, generator=generator)
        tokens = torch.stack(list(rows), dim=1)  # length x (B,) -> (B, length), on past the end of a document
        texts = [readable(row, tokenizer) for row in tokens.tolist()]
        share = sum(repeated(text) for text in texts) / len(texts)
        metrics[f"repeated_{name.replace(' ', '_')}"] = share
        print(f"--- {name}: {len(set(texts))} different, {share:.0%} repeated\n{config.prompt}{texts[0]}")

    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "sampling.png", shaped, tokenizer, config.prompt)
    print(f"\nwrote sampling.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
