"""Lesson 2.3: the loss, and how to read it.

The model gives each of V tokens a score; softmax turns the scores into probabilities; the loss is -ln of the one
probability that went to the token that really came. A model that knows nothing gives every token 1/V, so its loss is
-ln(1/V) = ln V: the number that each first line of a training log should show.

    python part2_minimal_llm/lesson3_loss.py     # 4 seconds; a table by hand, the first loss for six V, a figure

You should see cross-entropy by hand equal torch's and that of GPT.forward, the first loss of an untrained GPT a little
above ln V, why it is a little above, and what perplexity, bits per byte and -100 do with the same numbers.

References: Shannon 1948, "A Mathematical Theory of Communication", section 6 (entropy); Jelinek et al. 1977,
"Perplexity, a Measure of the Difficulty of Speech Recognition Tasks"; Radford et al. 2019 (GPT-2), section 2.3 (the
initialisation).
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

from model import GPT, GPTConfig

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
VOCABULARIES = (16, 64, 257, 1000, 8000, 50257)  # from hexadecimal digits over our bytes to GPT-2's tokens


@dataclass
class Config:
    """Compute the loss by hand and measure it before any training."""

    tokens: int = 1024
    """Random tokens that an untrained model is asked to predict."""
    seed: int = 0
    """Seed of the weights and of the tokens."""
    out: Path = RUNS / "lesson3_loss"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


def cross_entropy(logits: list[list[float]], targets: list[int]) -> float:
    """Cross-entropy by hand: the mean of -ln p(target) over the targets that are not -100, in nats.

    Args:
        logits: N rows of V scores.
        targets: N ids, or -100 where there is nothing to learn.
    """
    surprises = []
    for row, target in zip(logits, targets, strict=True):
        if target == -100:
            continue
        # p = exp(score) / sum of exp(scores). Taking the largest score from all changes nothing and cannot overflow.
        top = max(row)
        total = sum(math.exp(score - top) for score in row)
        surprises.append(math.log(total) - (row[target] - top))  # -ln p
    return sum(surprises) / len(surprises)


@torch.no_grad()
def first_loss(vocab_size: int, n_tokens: int, seed: int, scale: float = 1.0) -> tuple[float, float, float]:
    """Loss of an untrained GPT on tokens without any pattern.

    Args:
        vocab_size: V.
        n_tokens: tokens to predict, a multiple of 512.
        seed: of the weights and the tokens.
        scale: factor on the token vectors, and so on the logits; 1 leaves the initialisation as it is.

    Returns:
        Mean loss in nats, standard deviation of the logits, mean logit of the token that is the input itself.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=128))
    model.wte.weight.mul_(scale)  # the final norm undoes it for the stream; the scores, x @ wte.T, grow by it
    measured = torch.zeros(3)
    for _ in range(n_tokens // 512):  # 8 rows at a time: for the largest V the logits alone take 100 MB
        x, y = torch.randint(vocab_size, (2, 8, 64))  # (B, T) each
        logits, loss = model(x, y)
        measured += torch.stack([loss, logits.std(), logits.gather(-1, x[..., None]).mean()])
    return tuple((measured / (n_tokens // 512)).tolist())


def draw(path: Path, losses: dict[int, float], scales: dict[float, tuple[float, float]]) -> None:
    """Draw what a probability costs, the first loss over V, and the first loss over the size of the logits."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8))
    p = torch.linspace(0.002, 1, 500)
    left.plot(p, -p.log(), color="tab:blue")
    for chance, name in ((1 / 257, "1 / 257: one byte of 257"), (0.1, "1 / 10"), (0.5, "1 / 2"), (1, "1: certain")):
        left.plot(chance, -math.log(chance), "o", color="tab:red")
        left.annotate(name, (chance, -math.log(chance)), (6, 4), textcoords="offset points", fontsize=8)
    left.set(
        xlabel="probability of the token that came", ylabel="its loss (nats)", title="Loss = -ln p", xlim=(0, 1.25)
    )
    middle.plot(losses.keys(), [math.log(V) for V in losses], color="gray", label="ln V")
    middle.plot(losses.keys(), losses.values(), "o", color="tab:red", label="untrained GPT, measured")
    middle.set(
        xscale="log", xlabel="V, vocabulary", ylabel="loss (nats)", ylim=(0, None), title="The first loss is ln V"
    )
    middle.legend()
    spreads = [spread for spread, _ in scales.values()]
    right.plot(spreads, [loss for _, loss in scales.values()], "o-", color="tab:red", label="measured")
    right.axhline(math.log(257), color="gray", label="ln 257")
    right.set(xlabel="standard deviation of the logits", ylabel="loss (nats)", title="...if it starts without opinions")
    right.set(ylim=(0, None))
    right.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Compute, measure and translate the loss."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), tokens=512)
    torch.manual_seed(config.seed)

    print("three questions, V = 4 tokens: scores, probabilities, and -ln of the one that counts")
    logits, targets = [[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]], [0, 3, 2]
    for row, target in zip(logits, targets, strict=True):
        probs = torch.tensor(row).softmax(dim=-1)
        scores = " ".join(f"{score:4.1f}" for score in row)
        shares = " ".join(f"{p:.3f}" for p in probs.tolist())
        print(f"  [{scores}] -> [{shares}]  token {target} came: {cross_entropy([row], [target]):.3f} nats")
    by_torch = F.cross_entropy(torch.tensor(logits), torch.tensor(targets)).item()
    print(f"  mean by hand {cross_entropy(logits, targets):.6f}, by torch {by_torch:.6f}")

    model = GPT(GPTConfig(block_size=32, n_layer=2, n_embd=64))
    x, y = torch.randint(257, (2, 4, 32))  # (B, T) each
    y[:, ::5] = -100  # every fifth question does not count
    with torch.no_grad():
        logits, loss = model(x, y)  # (B, T, V) and a scalar
    by_hand = cross_entropy(logits.flatten(0, 1).tolist(), y.flatten().tolist())
    difference = abs(by_hand - loss.item())
    print(f"\nGPT.forward's loss {loss.item():.6f}, by hand from its logits {by_hand:.6f}: differ by {difference:.1e}")
    print(f"  {(y != -100).sum()} of {y.numel()} targets count; the mean is over those, so masking does not shrink it")
    nothing = model(x, torch.full_like(y, -100))[1].item()
    print(f"  if every target is -100, the mean over none is {nothing}")

    print("\nan untrained GPT on random tokens")
    print("       V    ln V   first loss   logits' spread   score of the token just read")
    losses = {}
    for V in VOCABULARIES:
        losses[V], spread, own = first_loss(V, config.tokens, config.seed)
        print(f"  {V:6d}  {math.log(V):6.3f}  {losses[V]:11.3f}  {spread:15.3f}  {own:29.2f}")
    print("the same, V = 257, with larger token vectors: opinions without knowledge cost more than none")
    scales = {}
    for scale in (0.25, 1, 4, 16):
        loss, spread, _ = first_loss(257, config.tokens, config.seed, scale)
        scales[scale] = (spread, loss)
        print(f"  {scale:5.2f} times  logits' spread {spread:6.3f}  first loss {loss:7.3f}")

    print("\nthree names for one number: 1000 bytes of text, loss L nats per token")
    print("  tokens         L   perplexity exp(L)   bits per byte L / ln 2 * tokens / bytes")
    for n_tokens, nats in ((1000, math.log(257)), (1000, math.log(2)), (250, 4 * math.log(2))):
        print(f"  {n_tokens:6d}  {nats:8.4f}  {math.exp(nats):18.1f}  {nats / math.log(2) * n_tokens / 1000:18.3f}")
    print("  the last two predict the text equally well; tokens of four bytes only make each one harder")

    config.out.mkdir(parents=True, exist_ok=True)
    metrics = {f"first_loss_{V}": loss for V, loss in losses.items()}
    metrics |= {f"ln_{V}": math.log(V) for V in losses}
    metrics["by_hand_difference"] = difference
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "loss.png", losses, scales)
    print(f"\nwrote loss.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
