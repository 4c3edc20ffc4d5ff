"""Lesson 2.2: from documents to batches, and the shift by one.

A language model is trained on one question: which token comes next? A text of N tokens holds N - 1 such questions with
their answers, and nobody has to write the answers down, because they are the text itself, shifted by one. All documents
are laid end to end in one row, and a batch is B windows cut from random places of it.

    python part2_minimal_llm/lesson2_batches.py     # 3 seconds; two aligned rows, a batch, and a figure

You should see each input token stand above its target, a batch built by a plain loop that equals data.get_batch, where
windows begin, and what a target of -100 does.

References: Radford et al. 2019 (GPT-2), section 2; Brown et al. 2020 (GPT-3), section 2.3 and appendix B, for several
documents in one window with an end token between them.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from matplotlib.colors import ListedColormap

from data import encode_documents, get_batch, load_tokens
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
DOCUMENTS = ["The cat sat.", "A dog ran.", "2 + 3 = 5."]


@dataclass
class Config:
    """Cut batches out of a row of tokens, twice."""

    n_stories: int = 1000
    """Stories to cut batches from."""
    batch_size: int = 12
    """B, windows in a batch."""
    block_size: int = 256
    """T, tokens in a window."""
    n_batches: int = 100
    """How many batches to build in both ways."""
    seed: int = 0
    """Seed of the places where windows begin."""
    out: Path = RUNS / "lesson2_batches"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


def naive_batch(
    tokens: list[int], batch_size: int, block_size: int, generator: torch.Generator
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Cut B windows with plain slices.

    Args:
        tokens: all N ids.
        batch_size: B.
        block_size: T.
        generator: decides where the windows start, with the same draws as data.get_batch.

    Returns:
        x and y, B lists of T ids each, and the B starts.
    """
    # The last start leaves room for T inputs and the one token more that answers the last of them.
    starts = torch.randint(len(tokens) - block_size, (batch_size,), generator=generator).tolist()
    x = [tokens[start : start + block_size] for start in starts]
    y = [tokens[start + 1 : start + block_size + 1] for start in starts]  # the same slice, one further
    return x, y, starts


def show(ids: torch.Tensor) -> list[str]:
    """Make ids readable, each in one column of four: a space becomes _, the end token <e>, and -100 a dash."""
    names = {32: "_", ByteTokenizer.eot: "<e>", -100: "-"}
    return [f"{names.get(i) or chr(i):>4s}" for i in ids.tolist()]


def draw(path: Path, x: torch.Tensor, y: torch.Tensor, batch: torch.Tensor, starts: list[int]) -> None:
    """Draw one window x, y (T,) as two aligned rows, and the inputs (B, T) of a batch with the documents in them."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5.5), height_ratios=(2, 4))
    for row, ids, color in ((1.2, x, "lightblue"), (0, y, "moccasin")):
        for t, name in enumerate(show(ids)):
            top.add_patch(plt.Rectangle((t, row), 1, 0.7, facecolor=color, edgecolor="black"))
            top.text(t + 0.5, row + 0.35, name.strip(), ha="center", va="center", fontsize=10)
    for t in range(1, len(x)):  # the target of t - 1 is the input at t
        top.annotate("", (t - 0.4, 0.72), (t + 0.4, 1.18), arrowprops={"arrowstyle": "->", "color": "gray"})
    top.text(-0.2, 1.55, "input x", ha="right", va="center")
    top.text(-0.2, 0.35, "target y", ha="right", va="center")
    top.set(xlim=(-2.5, len(x) + 0.1), ylim=(-0.1, 2), title="One window: a target is the input one place to the right")
    top.axis("off")
    end = batch == ByteTokenizer.eot
    document = end.cumsum(dim=1) - end.int()  # (B, T): how many documents of the window have ended before this token
    colors = (document % 2 + 1) * ~end  # 0 on end tokens, else 1 and 2 in turn
    bottom.imshow(colors, aspect="auto", cmap=ListedColormap(["black", "lightblue", "moccasin"]), vmin=0, vmax=2)
    bottom.hlines([b - 0.5 for b in range(1, len(starts))], -0.5, batch.shape[1] - 0.5, color="white", linewidth=1)
    bottom.set_yticks(range(len(starts)), [f"{start:,}" for start in starts])
    bottom.set(xlabel="t, place in the window (black: end token)", ylabel="start of window b")
    bottom.set_title("One batch x: another colour is another document")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Lay documents in a row, cut windows out of it, and look at what they teach."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_stories=60, n_batches=5)
    tokenizer = ByteTokenizer()

    row = encode_documents(DOCUMENTS, tokenizer)
    print(f"{len(DOCUMENTS)} documents in one row of {len(row)} tokens, each closed by the end token <e>:")
    print("  " + "".join(name.strip() for name in show(row)).replace("_", " "))

    T = 14
    window = row[6 : 6 + T + 1]  # T + 1 tokens
    x, y = window[:-1], window[1:]
    print(f"\none window of T + 1 = {T + 1} tokens gives two rows of {T}: all but the last, and all but the first")
    print("  x  " + "".join(show(x)))
    print("  y  " + "".join(show(y)))
    print(f"that is {T} questions at once, because no position of the model sees what stands to its right:")
    for t in (0, 1, 6):
        print(f"  after {''.join(show(x[: t + 1])).replace(' ', '')!r} comes {show(y[t : t + 1])[0].strip()!r}")

    tokens, _ = load_tokens("stories", config.n_stories, tokenizer, config.block_size)
    as_list = tokens.tolist()
    fast, slow = torch.Generator().manual_seed(config.seed), torch.Generator().manual_seed(config.seed)
    unequal, crossing = 0, 0
    for _ in range(config.n_batches):
        x_batch, y_batch = get_batch(tokens, config.batch_size, config.block_size, fast)
        x_naive, y_naive, starts = naive_batch(as_list, config.batch_size, config.block_size, slow)
        unequal += x_batch.tolist() != x_naive or y_batch.tolist() != y_naive
        crossing += (x_batch == tokenizer.eot).any(dim=1).sum().item()
    n_windows = config.n_batches * config.batch_size
    print(f"\na batch is x {tuple(x_batch.shape)} and y {tuple(y_batch.shape)}: (B, T), {x_batch.numel():,} questions")
    print(f"data.get_batch against a loop of slices: {unequal} of {config.n_batches} batches differ")
    print(f"{len(tokens):,} tokens can be cut into windows at {len(tokens) - config.block_size:,} places")
    every = tokens.unfold(0, config.block_size + 1, 1)  # what get_batch picks from: a view, nothing is copied
    same = every.data_ptr() == tokens.data_ptr()
    print(f"all of them as one tensor {tuple(every.shape)}: in the same memory as the row itself: {same}")
    print(f"{crossing} of {n_windows} windows hold an end token: they begin in one document and go on in the next")

    # A target of -100 says "nothing to learn here". Nobody can know how the next document begins, for example.
    masked = y.masked_fill(x == tokenizer.eot, -100)
    print("\n-100 takes a question out of the loss; here the one after the end of a document:")
    print("  x  " + "".join(show(x)))
    print("  y  " + "".join(show(masked)))
    logits = torch.randn(T, tokenizer.vocab_size, generator=torch.Generator().manual_seed(config.seed))  # (T, V)
    kept = masked != -100
    with_mask = F.cross_entropy(logits, masked, ignore_index=-100).item()
    by_hand = F.cross_entropy(logits[kept], y[kept]).item()
    print(f"  loss with -100 {with_mask:.6f}, loss of the other {kept.sum()} questions alone {by_hand:.6f}")

    config.out.mkdir(parents=True, exist_ok=True)
    metrics = {
        "batches_compared": config.n_batches,
        "batches_differing": unequal,
        "share_of_windows_with_end": crossing / n_windows,
        "masked_loss_difference": abs(with_mask - by_hand),
    }
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "batches.png", x, y, x_batch, starts)
    print(f"\nwrote batches.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
