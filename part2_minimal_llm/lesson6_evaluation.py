"""Lesson 2.6: how good is a language model?

Ask it for the probability of text that it has not been trained on. This lesson scores several texts by the trained
model and by two models that only count, which tell what a number is worth: bytes by their frequency, and bytes by their
frequency after the byte before. It also shows why bits per byte, and not the loss, compares models whose tokens are of
different sizes, and that a model knows more the more it has read.

    python part2_minimal_llm/lesson6_evaluation.py     # 20 seconds at most; a table of models and texts, a figure

You should see the same order of models on every text of their kind, the order fall apart on text of another kind, a
count of two-byte tokens with a higher loss and fewer bits, and the loss fall along the window. It uses the model of
train.py, or trains a small one first if there is none.

References: Shannon 1951, "Prediction and Entropy of Printed English", section 3; Gao et al. 2020, "The Pile", section
3.1 (bits per byte); Khandelwal et al. 2018, "Sharp Nearby, Fuzzy Far Away", section 4 (what context is worth).
"""

import json
import math
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro

import train
from data import UserError, encode_documents, load_documents
from generate import load_checkpoint
from model import GPT
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Score texts by a trained model and by two that count."""

    checkpoint: Path = RUNS / "best.pt"
    """Model to evaluate. If train.py has not left its own, a small one is trained for some seconds."""
    n_stories: int = 2000
    """Stories that the counting models count."""
    tokens: int = 40_000
    """Tokens of each text that are scored."""
    train_steps: int = 400
    """Steps of the small model."""
    seed: int = 0
    """Seed of the shuffled texts."""
    out: Path = RUNS / "lesson6_evaluation"
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


# --- models that count ---


def unigram(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """ln p(token) by how often each occurs in (N,) tokens, (V,). Counts get 0.01 more: nothing is impossible."""
    counts = torch.bincount(tokens, minlength=vocab_size) + 0.01
    return (counts / counts.sum()).log()


def bigram(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """ln p(token | the token before), (V, V): row i is the distribution after token i."""
    pairs = torch.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2)
    counts = pairs.view(vocab_size, vocab_size) + 0.01
    return (counts / counts.sum(dim=1, keepdim=True)).log()


def merge(tokens: torch.Tensor, size: int, vocab_size: int) -> torch.Tensor:
    """Make one token of every `size` neighbours: (N,) ids below V become (N // size,) ids below V^size."""
    rows = tokens[: len(tokens) // size * size].view(-1, size)
    return (rows * vocab_size ** torch.arange(size)).sum(dim=1)  # the neighbours are the digits of the new id


def bits_per_byte(nats: torch.Tensor, n_bytes: int) -> float:
    """Surprise of all tokens in nats, of any shape, as bits for each byte of text."""
    return nats.sum().item() / math.log(2) / n_bytes


# --- the model, place by place ---


@torch.no_grad()
def nats_by_place(model: GPT, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every token that evaluation predicts, one window at a time.

    Args:
        model: the language model, of context T.
        tokens: (N,) ids.

    Returns:
        (W, T) nats, row w for window w, and (N,) how often each token was predicted.
    """
    model.eval()
    T = model.config.block_size
    predicted = torch.zeros(len(tokens), dtype=torch.int64)
    windows = []
    for start in range(0, len(tokens) - T, T):  # the next window begins with the last token that this one predicts
        x, y = tokens[start : start + T], tokens[start + 1 : start + T + 1]
        logits, _ = model(x[None])  # (1, T, V)
        windows.append(F.cross_entropy(logits[0], y, reduction="none"))  # (T,)
        predicted[start + 1 : start + T + 1] += 1
    return torch.stack(windows), predicted


def by_doubling(by_place: torch.Tensor) -> list[tuple[int, int, float]]:
    """Average (T,) losses over the places 1, 2, 3 to 4, 5 to 8, ...: (first, last, mean) of each stretch."""
    stretches, first, last = [], 1, 1
    while first <= len(by_place):
        stretches.append((first, last, by_place[first - 1 : last].mean().item()))
        first, last = last + 1, min(2 * last, len(by_place))
    return stretches


def draw(path: Path, scores: dict[str, dict[str, float]], by_place: torch.Tensor) -> None:
    """Draw bits per byte by text and model, and the loss by the place in the window."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    models = list(next(iter(scores.values())))
    for m, model in enumerate(models):
        heights = [row[model] for row in scores.values()]
        places = [i + 0.27 * (m - 1) for i in range(len(scores))]
        left.bar_label(left.bar(places, heights, width=0.25, label=model), fmt="%.1f", fontsize=8)
    left.axhline(math.log2(257), color="gray", linestyle=":", label="knows nothing: log2 257")
    left.set_xticks(range(len(scores)), [name.replace(", ", ",\n") for name in scores], fontsize=8)
    left.set(ylabel="bits per byte", title="The same models on several texts")
    left.legend(fontsize=8)
    right.plot(range(1, len(by_place) + 1), by_place, color="tab:green", alpha=0.3, label="each place")
    middles = [math.sqrt(first * last) for first, last, _ in by_doubling(by_place)]
    right.plot(
        middles, [mean for *_, mean in by_doubling(by_place)], "o-", color="tab:green", label="mean of a stretch"
    )
    right.legend()
    right.set(xscale="log", ylim=(0, None), xlabel="tokens that the model has read in the window")
    right.set(ylabel="loss of the next one (nats)", title="The more it has read, the more it knows")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Score texts, compare tokenizers, and look along the window."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_stories=60, tokens=2000, train_steps=20)
    torch.set_flush_denormal(True)
    config.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(config)
    V, T = tokenizer.vocab_size, model.config.block_size

    train_texts, held_out_texts = load_documents("stories", config.n_stories)
    counted = encode_documents(train_texts, tokenizer)
    held_out = encode_documents(held_out_texts, tokenizer)[: config.tokens]
    words = tokenizer.decode(held_out.tolist()).split()
    shuffle = random.Random(config.seed)
    texts = {
        "stories, held out": held_out,
        "stories, trained on": counted[: config.tokens],
        "stories, words shuffled": torch.tensor(tokenizer.encode(" ".join(shuffle.sample(words, len(words))))),
        "stories, bytes shuffled": torch.tensor(shuffle.sample(held_out.tolist(), len(held_out))),
        "Python reference": encode_documents(load_documents("pydoc", 0)[1], tokenizer)[: config.tokens],
    }
    by_frequency, by_pair = unigram(counted, V), bigram(counted, V)
    print("\nbits per byte                  unigram    bigram       GPT   (GPT's loss, perplexity)")
    scores, metrics = {}, {}
    for name, tokens in texts.items():
        n_bytes = (tokens[1:] != tokenizer.eot).sum().item()
        gpt = train.evaluate(model, tokens, tokenizer)
        scores[name] = {
            "unigram": bits_per_byte(-by_frequency[tokens[1:]], n_bytes),
            "bigram": bits_per_byte(-by_pair[tokens[:-1], tokens[1:]], n_bytes),
            "GPT": gpt["bits_per_byte"],
        }
        row = "  ".join(f"{score:8.3f}" for score in scores[name].values())
        print(f"  {name:25s}  {row}   ({gpt['val_loss']:.3f} nats, {gpt['perplexity']:.2f})")
        metrics |= {f"{m.lower()}_{name.replace(', ', '_').replace(' ', '_')}": s for m, s in scores[name].items()}

    print("\nthe held-out stories by two counts: tokens of one byte, and tokens of two")
    print("                loss (nats per token)   perplexity   bits per byte")
    for size in (1, 2):
        nats = -unigram(merge(counted, size, V), V**size)[merge(held_out, size, V)]
        n_bytes = (held_out != tokenizer.eot).sum().item()
        loss, bpb = nats.mean().item(), bits_per_byte(nats, n_bytes)
        print(f"  {'one byte' if size == 1 else 'two bytes':12s}  {loss:21.3f}  {math.exp(loss):11.1f}  {bpb:14.3f}")
        metrics |= {f"loss_tokens_of_{size}": loss, f"bits_per_byte_tokens_of_{size}": bpb}

    nats, predicted = nats_by_place(model, held_out)
    by_hand, loss = nats.mean().item(), train.evaluate(model, held_out, tokenizer)["val_loss"]
    print(f"\n{len(nats)} windows of {T} one after the other: loss by hand {by_hand:.6f}, train.evaluate {loss:.6f}")
    unpredicted = len(held_out) - 1 - nats.numel()
    print(f"  {(predicted == 1).sum()} tokens were predicted once, none twice: {predicted.max() == 1}")
    print(f"  not predicted: the first, and {unpredicted} at the end that fill no window")
    by_place = nats.mean(dim=0)  # (W, T) -> (T,)
    print("  tokens read   loss of the next")
    for first, last, mean in by_doubling(by_place):
        print(f"  {first:4d} to {last:4d}  {mean:16.3f}")
    late = by_place[T // 2 :].mean().item()
    print(f"  over the second half of each window {late:.4f}: what windows that overlap by half would report")

    metrics |= {"by_hand_difference": abs(by_hand - loss), "val_loss": loss, "val_loss_second_half": late}
    metrics |= {"val_loss_first_token": by_place[0].item(), "predicted_more_than_once": (predicted > 1).sum().item()}
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "evaluation.png", scores, by_place)
    print(f"\nwrote evaluation.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
