"""Many heads: the same attention H times side by side, each in its own D = C / H channels.

One head gives one set of weights, so a position can look for one thing at a time. H heads look for H things. Their
outputs are laid side by side (concatenated) and mixed by one more matrix, the output projection. Written as a list of
lesson 3's heads this is obvious and slow; model.py computes all heads in one product, and the two are equal.

    python part1_transformer/lesson4_heads.py

You see the shapes of every step, the equality with a list of heads and with torch's nn.MultiheadAttention, then two
small models that train on puzzles for which we know where attention has to look: the heads divide the work, and an
"induction" pair of layers appears. It takes 20 seconds, and the figure shows a heat map for every head.

References: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2; Olsson et al. 2022, "In-context Learning
and Induction Heads", the part "Key Concepts".
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
from torch import nn
from tqdm import tqdm

from lesson3_head import Head
from model import CausalSelfAttention, GPTConfig, Transformer

matplotlib.use("Agg")  # figures go to files, no window is opened
RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Config:
    """Split into heads, prove it equal, train two small models and look at their heads."""

    steps: int = 400
    """Training steps of each of the two models."""
    seed: int = 0
    """Seed of weights and puzzles."""
    out: Path = RUNS / "lesson4_heads"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- many heads, written as a list ---


class ManyHeads(nn.Module):
    """H heads of lesson 3, concatenated and projected: (B, T, C) -> (B, T, C)."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(n_embd, n_embd // n_head) for _ in range(n_head)])
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each head on its own, then side by side: H x (B, T, D) -> (B, T, H D) = (B, T, C)."""
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


def fuse(many: ManyHeads, n_embd: int, n_head: int) -> CausalSelfAttention:
    """The class of model.py with the weights of a list of heads."""
    attention = CausalSelfAttention(GPTConfig(n_head=n_head, n_embd=n_embd))
    with torch.no_grad():
        for name in ("weight", "bias"):
            # Rows of qkv: the queries of all heads, then all keys, then all values. H x (D, C) -> (C, C); 3 of them.
            rows = [getattr(getattr(head, kind), name) for kind in ("q", "k", "v") for head in many.heads]
            getattr(attention.qkv, name).copy_(torch.cat(rows))
    attention.proj.load_state_dict(many.proj.state_dict())
    return attention


def as_torch(attention: CausalSelfAttention) -> nn.MultiheadAttention:
    """torch's own class with the same weights: its in_proj has our qkv's layout."""
    theirs = nn.MultiheadAttention(attention.proj.in_features, attention.n_head, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.qkv.weight)
        theirs.in_proj_bias.copy_(attention.qkv.bias)
    theirs.out_proj.load_state_dict(attention.proj.state_dict())
    return theirs


def trace_shapes(attention: CausalSelfAttention, x: torch.Tensor) -> None:
    """Print the shape after each step of CausalSelfAttention.forward; x is (B, T, C)."""
    B, T, C = x.shape
    H = attention.n_head
    steps = [("x", "(B, T, C)", x)]
    qkv = attention.qkv(x)
    steps.append(("qkv(x)", "(B, T, 3C)", qkv))
    q, k, v = qkv.split(C, dim=-1)
    steps.append(("split: q, and so k, v", "(B, T, C)", q))
    q, k, v = (a.view(B, T, H, C // H) for a in (q, k, v))
    steps.append(("view: C becomes H x D", "(B, T, H, D)", q))
    # Not view(B, H, T, D) at once: that would cut the row of a position into pieces of other positions.
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    steps.append(("transpose: heads beside batch", "(B, H, T, D)", q))
    steps.append(("q @ k^T", "(B, H, T, T)", q @ k.transpose(-2, -1)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    steps.append(("weights @ v", "(B, H, T, D)", out))
    out = out.transpose(1, 2)
    steps.append(("transpose back", "(B, T, H, D)", out))
    steps.append(("reshape: side by side", "(B, T, C)", out.reshape(B, T, C)))
    steps.append(("proj", "(B, T, C)", attention(x)))
    for what, names, tensor in steps:
        print(f"  {what:30} {names:13} {tuple(tensor.shape)}")


# --- a real model to look at ---


class Puzzler(nn.Module):
    """Letters in, for each job a letter out: the Transformer of model.py between an embedding and a linear layer."""

    def __init__(self, config: GPTConfig, n_jobs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS), config.n_embd)
        nn.init.normal_(self.embed.weight, std=0.2)
        self.body = Transformer(config)
        self.read = nn.Linear(config.n_embd, n_jobs * len(LETTERS))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Letters (B, T) -> logits (B, T, jobs, 26)."""
        B, T = idx.shape
        return self.read(self.body(self.embed(idx))).view(B, T, -1, len(LETTERS))


def make_batch(B: int, T: int, jobs: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random letters that repeat, and what each job has to answer.

    Args:
        B: rows. Each has its own period P between T/4 and T/2: P different letters, over and over.
        T: letters in a row.
        jobs: "1 back" and "3 back" (the letter that many positions ago), "first" (of the row), "next" (what follows).

    Returns:
        letters (B, T), answers (B, T, jobs), where -100 marks what cannot be known and is not graded.
    """
    period = torch.randint(T // 4, T // 2 + 1, (B, 1))
    letters = torch.rand(B, len(LETTERS)).argsort(dim=1)  # a random order of the alphabet for each row
    rows = letters.gather(1, torch.arange(T + 1)[None] % period)  # (B, T + 1)
    idx = rows[:, :T]
    answers = torch.full((B, T, len(jobs)), -100)
    for j, job in enumerate(jobs):
        if job == "first":
            answers[:, :, j] = idx[:, :1]
        elif job == "next":
            known = torch.arange(1, T + 1)[None] > period  # the first round cannot be predicted
            answers[:, :, j] = rows[:, 1:].where(known, -100)
        else:
            back = int(job.split()[0])
            answers[:, back:, j] = idx[:, :-back]
    return idx, answers


def train(n_layer: int, jobs: list[str], steps: int, T: int = 24) -> tuple[Puzzler, float]:
    """Train a Puzzler of 4 heads in 64 channels; returns it with its share of right answers on fresh puzzles."""
    model = Puzzler(GPTConfig(block_size=T, n_layer=n_layer, n_head=4, n_embd=64), len(jobs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), desc=f"{n_layer} block{'s' * (n_layer > 1)}: {', '.join(jobs)}", leave=False):
        idx, answers = make_batch(32, T, jobs)
        loss = F.cross_entropy(model(idx).flatten(0, 2), answers.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        idx, answers = make_batch(256, T, jobs)
        right = (model(idx).argmax(dim=-1) == answers)[answers != -100]
    return model, right.float().mean().item()


@torch.no_grad()
def attention_maps(model: Puzzler, idx: torch.Tensor) -> torch.Tensor:
    """Weights of every head, (B, T) -> (B, layers, H, T, T): the fused call hides them, so they are computed again."""
    x = model.embed(idx) + model.body.wpe.weight[: idx.shape[1]]
    maps = []
    for block in model.body.blocks:
        attention, (B, T, C) = block.attn, x.shape
        q, k, _ = attention.qkv(block.norm1(x)).split(C, dim=-1)
        q, k = (a.view(B, T, attention.n_head, -1).transpose(1, 2) for a in (q, k))  # (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        maps.append(scores.masked_fill(~torch.ones(T, T).tril().bool(), float("-inf")).softmax(dim=-1))
        x = block(x)
    return torch.stack(maps, dim=1)


def targets_of_attention(idx: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where each kind of head would look: name -> (B, T, T), True where row t looks at column s."""
    B, T = idx.shape
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    before = F.pad(idx, (1, 0), value=-1)[:, :T]  # (B, T): the letter before each position
    return {
        "1 back": (s == t - 1).expand(B, T, T),
        "early": ((s == t - 1) & (t < T // 4)).expand(B, T, T),  # 1 back where no letter has come back yet
        "3 back": (s == t - 3).expand(B, T, T),
        "first": ((s == 0) & (t > 3)).expand(B, T, T),  # from t = 4 on it cannot be confused with the others
        # The letter that followed the letter at t when it was seen before: before[s] = idx[t], s <= t.
        "induction": (before[:, None, :] == idx[:, :, None]) & (s <= t),
    }


def head_scores(maps: torch.Tensor, idx: torch.Tensor) -> dict[str, torch.Tensor]:
    """Share of attention on each kind of target, averaged over the rows that have one: name -> (layers, H)."""
    scores = {}
    for name, target in targets_of_attention(idx).items():
        hit = (maps * target[:, None, None]).sum(-1)  # (B, layers, H, T)
        asks = target.any(-1)[:, None, None].float()  # (B, 1, 1, T)
        scores[name] = (hit * asks).sum((0, 3)) / asks.sum()
    return scores


def draw(rows: list[tuple[str, torch.Tensor, dict[str, torch.Tensor]]], letters: str, path: Path) -> None:
    """Save one heat map a head: each row is (title, maps (H, T, T), the layer's scores name -> (H,))."""
    fig, axes = plt.subplots(len(rows), 4, figsize=(13, 3.5 * len(rows)), layout="constrained")
    for row, (title, maps, scores) in zip(axes, rows, strict=True):
        for h, ax in enumerate(row):
            best = max(scores, key=lambda name: scores[name][h].item())
            what = "1 back early" if best == "early" else best
            ax.imshow(maps[h], cmap="Blues", vmin=0, vmax=1)
            ax.set_title(f"{title}, head {h}: {what} {scores[best][h]:.0%}", fontsize=10)
            ax.set_xticks(range(len(letters)), letters, fontsize=7)
            ax.set_yticks(range(len(letters)), letters, fontsize=7)
        row[0].set_ylabel("t: asks")
    for ax in axes[-1]:
        ax.set_xlabel("s: looked at")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Trace the shapes, prove the equalities, train, and look at the heads."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), steps=20)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)

    B, T, C, H = 2, 10, 32, 4
    x = torch.randn(B, T, C)
    many = ManyHeads(C, H)
    ours = fuse(many, C, H)
    theirs = as_torch(ours)
    future = torch.ones(T, T).triu(diagonal=1).bool()  # torch marks what must NOT be seen
    with torch.no_grad():
        print(f"shapes with B = {B}, T = {T}, C = {C}, H = {H}, D = {C // H}")
        trace_shapes(ours, x)
        metrics = {
            "difference_list_of_heads": (many(x) - ours(x)).abs().max().item(),
            "difference_torch": (theirs(x, x, x, attn_mask=future, need_weights=False)[0] - ours(x)).abs().max().item(),
        }
    print("\nlargest difference from CausalSelfAttention with the same weights")
    print(f"  list of heads          {metrics['difference_list_of_heads']:.1e}")
    print(f"  nn.MultiheadAttention  {metrics['difference_torch']:.1e}")
    assert max(metrics.values()) < 1e-6

    print("\nparameters by number of heads, C = 32: ", end="")
    counts = [
        sum(p.numel() for p in CausalSelfAttention(GPTConfig(n_head=h, n_embd=C)).parameters()) for h in (1, 4, 16)
    ]
    print(f"H = 1: {counts[0]:,}, H = 4: {counts[1]:,}, H = 16: {counts[2]:,}. Heads divide channels, they add none.")

    rows = []
    idx, _ = make_batch(256, 24, ["next"])
    for title, n_layer, jobs in (("copy", 1, ["1 back", "3 back", "first"]), ("next", 2, ["next"])):
        model, accuracy = train(n_layer, jobs, config.steps)
        maps = attention_maps(model, idx)
        scores = head_scores(maps, idx)
        print(f"\n{n_layer} block{'s' * (n_layer > 1)}, asked for {', '.join(jobs)}: {accuracy:.1%} right")
        print("  share of attention on    " + "".join(f"{name:>11}" for name in scores))
        metrics[f"accuracy_{title}"] = accuracy
        for layer in range(n_layer):
            for head in range(4):
                shares = [scores[name][layer, head].item() for name in scores]
                print(f"  block {layer}, head {head}          " + "".join(f"{share:11.2f}" for share in shares))
                for name, share in zip(scores, shares, strict=True):
                    metrics[f"{title}_block{layer}_head{head}_{name.replace(' ', '_')}"] = share
            label = f"{title}, block {layer}" if n_layer > 1 else title
            rows.append((label, maps[0, layer], {name: value[layer] for name, value in scores.items()}))

    draw(rows, "".join(LETTERS[i] for i in idx[0].tolist()), config.out / "heads.png")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"\nwritten: {config.out / 'heads.png'}, {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
