"""Lesson 3.5: a window of recent tokens, and attention sinks.

A token that sees all before it costs more the longer the text is, and past the trained context it looks farther than it
ever did. A sliding window shows it the last W tokens only: the cost stays, and no distance is new. What is W - 1 tokens
back can still pass on what *it* saw, one layer below, so L layers reach L (W - 1) tokens back. But the first tokens of
a text leave the window, and large models keep much of their attention on those, whatever they say: such tokens are
attention sinks, and the remedy is to keep a few of them for ever.

    python part3_arch_improvements/lesson5_window.py     # 70 seconds, nearly all of it small models; a figure

You should see three masks, the rule written as a loop equal to `visible` and attention written as a loop equal to
model.py, gradients that end exactly where the formula says, and the held-out perplexity of small models at up to 16
times their context: with full attention, with a window, and with a window and sinks, with the spread over three models.

References: Beltagy et al. 2020, "Longformer", section 3.1 (the window and its reach); Jiang et al. 2023, "Mistral 7B",
section 2; Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", sections 3.1 and 3.2.
"""

import json
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import train
from data import UserError, load_tokens
from model import GPT, CausalSelfAttention, GPTConfig, visible
from race import race, spread
from rope import rope
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
CONTEXT, N_MODELS = 64, 3  # of the small models: T in training, and how many there are
MASKS = {"all before": (0, 0), "window 4": (4, 0), "window 4, 2 sinks": (4, 2)}  # name -> window, n_sink
# What a stream is read with: name -> window, n_sink. Each keeps as many tokens as its name says, the sinks included.
KEPT_64 = {"64, no sink": (64, 0), "64, 1 sink": (63, 1), "64, 4 sinks": (60, 4)}
KEPT_32 = {"32, no sink": (32, 0), "32, 1 sink": (31, 1), "32, 4 sinks": (28, 4)}


@dataclass
class Config:
    """Draw masks, follow gradients through windows, and read far past the training context."""

    train_steps: int = 500
    """Steps of each small model."""
    n_streams: int = 24
    """B, held-out streams to read."""
    length: int = 1024
    """N, tokens of a stream, more than the 64 of the context."""
    seed: int = 0
    """Seed of weights and tokens, and of the first small model; the next ones count on from it."""
    out: Path = RUNS / "lesson5_window"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- by hand ---


def sees(query: int, key: int, window: int, n_sink: int) -> bool:
    """May the token at position `query` look at the one at position `key`?"""
    if key > query:  # the future
        return False
    return window == 0 or query - key < window or key < n_sink


def mask_by_hand(T: int, window: int, n_sink: int) -> torch.Tensor:
    """The rule for all pairs, (T, T) booleans: row t tells what token t sees."""
    return torch.tensor([[sees(q, k, window, n_sink) for k in range(T)] for q in range(T)])


def attention_by_hand(
    attn: CausalSelfAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, window: int, n_sink: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as a loop over queries, each of which collects the keys that it sees; nothing is masked.

    Args:
        attn: gives the weights.
        x: (B, T, C).
        cos, sin: (1, 1, T, D/2), see rope.
        window, n_sink: see sees.

    Returns:
        (B, T, C), and how much each query attends to each key, (B, H, T, T).
    """
    B, T, _ = x.shape
    q, k, v = attn.qkv(x).view(B, T, sum(attn.heads), -1).transpose(1, 2).split(attn.heads, dim=1)  # (B, H, T, D) each
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    out, shares = torch.zeros_like(q), torch.zeros(B, attn.heads[0], T, T)
    for t in range(T):
        seen = [s for s in range(T) if sees(t, s, window, n_sink)]
        scores = (q[:, :, t, None] * k[:, :, seen]).sum(-1) / math.sqrt(q.shape[-1])  # (B, H, keys)
        shares[:, :, t, seen] = scores.softmax(-1)
        out[:, :, t] = (shares[:, :, t, seen, None] * v[:, :, seen]).sum(2)  # (B, H, keys, D) -> (B, H, D)
    return attn.proj(out.transpose(1, 2).reshape(B, T, -1)), shares


def watch_attention(model: GPT, idx: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Run a model on idx (B, T); for each layer, how far by hand is from it, and its attention (B, H, T, T)."""
    found = []

    def compare(attn: CausalSelfAttention, given: tuple, out: torch.Tensor) -> None:
        by_hand, shares = attention_by_hand(attn, *given[:3], model.config.window, model.config.n_sink)
        found.append(((by_hand - out).abs().max().item(), shares))

    hooks = [block.attn.register_forward_hook(compare) for block in model.blocks]
    with torch.no_grad():
        model(idx)
    for hook in hooks:
        hook.remove()
    return found


def show_masks(seed: int) -> dict[str, float]:
    """Print the masks, compare rule and attention by hand with model.py, and return what was measured."""
    T = 12
    print("who sees whom: a row is a token, a column a position; # in the window, s a sink outside it")
    print("   " + "".join(f"{name:20s}" for name in MASKS).rstrip())
    for q in range(T):
        rows = []
        for window, n_sink in MASKS.values():
            marks = [
                "s" if sees(q, k, window, n_sink) > sees(q, k, window, 0) else ".#"[sees(q, k, window, n_sink)]
                for k in range(T)
            ]
            rows.append(f"{''.join(marks):20s}")
        print(f"{q:2d} {''.join(rows)}".rstrip())
    pairs = [mask_by_hand(1024, window, n_sink).sum().item() for window, n_sink in ((0, 0), (64, 0), (60, 4))]
    print(f"pairs in 1,024 tokens: all before {pairs[0]:,}; window 64 {pairs[1]:,}; window 60 and 4 sinks {pairs[2]:,}")

    positions = torch.arange(24)[None]  # (1, T)
    differing, apart, n_masks = 0, 0.0, 0
    for window, n_sink in [(0, 0)] + [(window, n_sink) for window in (1, 2, 5, 23, 30) for n_sink in (0, 1, 4)]:
        ours = visible(positions, positions, window, n_sink)[0, 0]
        differing += (ours != mask_by_hand(24, window, n_sink)).sum().item()
        torch.manual_seed(seed)
        gpt = GPT(GPTConfig(block_size=24, n_layer=2, n_embd=32, n_kv_head=4, window=window, n_sink=n_sink))
        found = watch_attention(gpt, torch.randint(257, (2, 24)))
        apart, n_masks = max(apart, *(difference for difference, _ in found)), n_masks + 1
    print(f"{n_masks} masks of 24 x 24: {differing} entries differ from `visible`; attention is off by {apart:.0e}")
    return {"mask_entries_differing": differing, "attention_difference": apart, "pairs_full": pairs[0]} | {
        "pairs_window": pairs[1],
        "pairs_sinks": pairs[2],
    }


# --- how far a stack of windows reaches ---


def influence(n_layer: int, window: int, n_sink: int, T: int, seed: int) -> tuple[torch.Tensor, GPT, torch.Tensor]:
    """How much the last token's scores depend on each token's vector.

    Returns:
        (T,) the length of the gradient of the last token's scores, added up with random weights, by each token's
        vector; then the untrained model and the tokens (1, T).
    """
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(block_size=T, n_layer=n_layer, n_embd=32, window=window, n_sink=n_sink))
    idx = torch.randint(257, (1, T))
    vectors = []
    hook = gpt.wte.register_forward_hook(lambda module, given, out: vectors.append(out))
    logits, _ = gpt(idx)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, -1] @ torch.randn(257), vectors)  # (1, T, C)
    return gradient[0].norm(dim=-1), gpt, idx


@torch.no_grad()
def change(gpt: GPT, idx: torch.Tensor, distance: int) -> float:
    """Replace the token so many places before the last; return the largest change of the last token's scores."""
    other = idx.clone()
    other[0, -1 - distance] = (other[0, -1 - distance] + 1) % 257
    return (gpt(other)[0][0, -1] - gpt(idx)[0][0, -1]).abs().max().item()


def show_reach(seed: int) -> tuple[dict[str, float], dict[int, torch.Tensor]]:
    """Print how far gradients and changes of tokens reach; return what was measured, and n_layer -> influence (T,)."""
    layers, windows, T = (1, 2, 3, 4), (2, 4, 8, 16), 80
    print("\ntokens that the last token's scores depend on, by gradient (in brackets: L (W - 1) + 1)")
    print("  layers" + "".join(f"{f'window {window}':>14s}" for window in windows))
    wrong, inside, outside, curves = 0, math.inf, 0.0, {}
    for n_layer in layers:
        cells = []
        for window in windows:
            found, gpt, idx = influence(n_layer, window, 0, T, seed)
            reach, formula = T - found.nonzero()[0].item(), n_layer * (window - 1) + 1
            cells.append(f"{f'{reach} ({formula})':>14s}")
            wrong += reach != formula
            inside = min(inside, change(gpt, idx, formula - 1))
            outside = max(outside, change(gpt, idx, formula))
            if window == 8:
                curves[n_layer] = found
        print(f"  {n_layer:6d}" + "".join(cells))
    print(f"changing the last token inside changes a score by {inside:.0e} or more, the first one outside by {outside}")
    shares = [(found[-8:].sum() / found.sum()).item() for found in curves.values()]
    print("share of the gradient inside the first window of 8: " + ", ".join(f"{share:.0%}" for share in shares))
    seen = influence(2, 4, 2, 24, seed)[0].nonzero().flatten().tolist()
    print(f"window 4, 2 sinks, 2 layers: token 23 depends on tokens {', '.join(map(str, seen))}")
    metrics = {"reach_wrong": wrong, "change_inside": inside, "change_outside": outside}
    return metrics | {f"near_share_{n}_layers": share for n, share in zip(curves, shares, strict=True)}, curves


# --- reading on, past the trained context ---


def nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss at each place, (B, T, V) and (B, T) -> (T,), the mean over the batch."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=0)


@torch.no_grad()
def read(model: GPT, streams: torch.Tensor, window: int, n_sink: int) -> torch.Tensor:
    """Read streams (B, N + 1) with a model trained on less; return the loss at each place, (N,).

    Without sinks in one pass. With sinks by a rolling cache that counts positions as StreamingLLM does, so that a sink
    is never farther away than the cache is long; that takes one token at a time, once the cache is full.
    """
    x, y = streams[:, :-1], streams[:, 1:]
    model.config = replace(model.config, window=window, n_sink=n_sink, block_size=x.shape[1])
    if n_sink == 0:
        return nats(torch.cat([model(rows)[0] for rows in x.split(8)]), y)
    cache, full = model.make_cache(len(x), 0, rolling=True, in_cache=True), window + n_sink
    pieces = [x[:, :full], *x[:, full:].split(1, dim=1)]
    bar = tqdm(pieces, desc=f"{window} + {n_sink} sinks", disable=None, leave=False)
    return nats(torch.cat([model(piece, cache=cache)[0] for piece in bar], dim=1), y)


@torch.no_grad()
def read_anew(model: GPT, streams: torch.Tensor, places: range) -> torch.Tensor:
    """Predict at some places from the last CONTEXT tokens alone, read anew for each; return the loss, (places,).

    Nothing here is unlike training, and it costs CONTEXT times as much: what a window tries to come close to.
    """
    model.config = replace(model.config, window=0, n_sink=0, block_size=CONTEXT)
    logits = [model(streams[:, t - CONTEXT + 1 : t + 1])[0][:, -1:] for t in places]  # (B, 1, V) each
    return nats(torch.cat(logits, dim=1), streams[:, [t + 1 for t in places]])


def stretches(length: int) -> list[tuple[int, int]]:
    """The context, and then stretches that double: (start, end) of each, the last up to `length`."""
    cuts = [0, CONTEXT]
    while cuts[-1] < length:
        cuts.append(min(2 * cuts[-1], length))
    return list(pairwise(cuts))


def cell(values: list[float], digits: int) -> str:
    """Mean and spread as text."""
    return f"{mean(values):.{digits}f} +- {spread(values):.{digits}f}"


def show_streams(config: Config) -> tuple[dict[str, float], dict[str, list[torch.Tensor]], dict[str, list[float]]]:
    """Train small models and read streams with them.

    Returns:
        What was measured; the loss at each place, (N,), by kind of reading and model; and by how much the loss in the
        last stretch differs from that of a window of 64 without sinks, by kind of reading and model.
    """
    N, B = config.length, config.n_streams
    tokens, held_out = load_tokens("stories", 2000, ByteTokenizer(), CONTEXT)
    if N <= CONTEXT or not 0 < B * (N + 1) <= len(held_out):
        raise UserError(
            f"--length {N} and --n_streams {B}: give more tokens than the context of {CONTEXT}, and at most the "
            f"{len(held_out):,} held-out ones in all"
        )
    streams = held_out[: B * (N + 1)].view(B, N + 1)
    settings = train.Config(steps=config.train_steps, batch_size=16, block_size=CONTEXT, lr=4e-3, warmup_steps=50)
    readings = {"all before": (0, 0), **KEPT_64, **KEPT_32}
    start, end = stretches(N)[-1]
    some = range(start, end, 8)  # places that are read anew
    losses = {name: [] for name in readings}
    anew, on_first = [], []  # for each model, (places,) and (n_layer,)
    with tqdm(total=N_MODELS * config.train_steps, desc="training", disable=None, leave=False) as bar:
        for seed in range(config.seed, config.seed + N_MODELS):
            torch.manual_seed(seed)
            model = GPT(GPTConfig(block_size=CONTEXT, n_layer=2, n_embd=64))
            race({"model": model}, tokens, settings, seed, bar)
            model.eval()
            # How much the tokens of the second half of the context attend to the first token, head by head.
            late = [shares[:, :, CONTEXT // 2 :, 0] for _, shares in watch_attention(model, streams[:, :CONTEXT])]
            on_first.append([share.mean().item() for share in late])
            for name, (window, n_sink) in readings.items():
                losses[name].append(read(model, streams, window, n_sink))
            anew.append(read_anew(model, streams, some))
    base, differences = losses["64, no sink"], {}
    for name in list(readings)[2:]:
        pairs = zip(losses[name], base, strict=True)  # model by model, over the same tokens
        differences[name] = [(loss - other)[start:end].mean().item() for loss, other in pairs]
    differences["read anew"] = [(new - loss[list(some)]).mean().item() for new, loss in zip(anew, base, strict=True)]

    parameters = model.num_parameters()
    print(f"\n{N_MODELS} models of {parameters:,} parameters, trained on {CONTEXT} tokens at a time without a window,")
    print(f"read {B} held-out streams of {N:,} tokens; perplexity by place, mean and spread over the models")
    print("  kept, of it sinks" + "".join(f"{f'{a + 1} to {b}':>18s}" for a, b in stretches(N)))
    metrics = {"parameters": parameters}
    for name, by_model in losses.items():
        row = [[math.exp(loss[a:b].mean()) for loss in by_model] for a, b in stretches(N)]
        print(f"  {name:17s}" + "".join(f"{cell(values, 2):>18s}" for values in row))
        key = name.replace(",", "").replace(" ", "_")
        metrics |= {f"perplexity_{key}_start": mean(row[0]), f"perplexity_{key}_end": mean(row[-1])}

    print(f"\nloss at places {start + 1} to {end} above that of a window of 64 without sinks, in nats, model by model")
    for name, values in differences.items():
        print(f"  {name:12s} {cell(values, 4):>18s}   " + "  ".join(f"{value:+.4f}" for value in values))
        metrics[f"difference_{name.replace(',', '').replace(' ', '_')}"] = mean(values)
    uniform = mean(1 / (t + 1) for t in range(CONTEXT // 2, CONTEXT))
    shares = [[by_layer[layer] for by_layer in on_first] for layer in range(len(on_first[0]))]
    print(f"attention on the first token, of places {CONTEXT // 2 + 1} to {CONTEXT}; {uniform:.3f} if it were even")
    for layer, share in enumerate(shares):
        print(f"  layer {layer + 1}  {cell(share, 3)}")
        metrics[f"attention_on_first_layer_{layer + 1}"] = mean(share)
    return metrics, losses, differences


def draw(
    path: Path,
    curves: dict[int, torch.Tensor],
    losses: dict[str, list[torch.Tensor]],
    differences: dict[str, list[float]],
) -> None:
    """Draw masks, influence over distance, loss over the place in the stream, and the differences of the models."""
    fig = plt.figure(figsize=(12, 7.2))
    grid = fig.add_gridspec(2, 6)
    for i, (name, (window, n_sink)) in enumerate(MASKS.items()):
        panel = fig.add_subplot(grid[0, 2 * i : 2 * i + 2])
        mask = mask_by_hand(12, window, n_sink).int() + mask_by_hand(12, window, 0).int()  # 1: seen only as a sink
        panel.imshow(
            mask, cmap=matplotlib.colors.ListedColormap(["whitesmoke", "tab:orange", "tab:blue"]), vmin=0, vmax=2
        )
        panel.set_xticks([x - 0.5 for x in range(1, 12)], minor=True)
        panel.set_yticks([y - 0.5 for y in range(1, 12)], minor=True)
        panel.grid(which="minor", color="white")
        panel.tick_params(which="minor", length=0)
        panel.set(xlabel="key", ylabel="query", title=name)
    left, middle, right = (fig.add_subplot(grid[1, 2 * i : 2 * i + 2]) for i in range(3))
    for n_layer, found in curves.items():
        near = found.flip(0)[: n_layer * 7 + 1]  # what is farther away is exactly 0, and has no logarithm
        left.plot(range(len(near)), near, "o-", markersize=3, label=f"{n_layer} layer{'s' * (n_layer > 1)}")
    left.set(
        yscale="log", xlabel="tokens back", ylabel="gradient at the last token", title="Window 8: reach and weight"
    )
    left.legend(fontsize=8)
    for name in ("all before", *KEPT_64):
        by_model = torch.stack([loss.unfold(0, 32, 32).mean(-1) for loss in losses[name]])  # (models, N / 32)
        places = [32 * i + 16 for i in range(by_model.shape[1])]
        middle.plot(places, by_model.mean(0), linewidth=1.2, label=name)
        middle.fill_between(places, by_model.amin(0), by_model.amax(0), alpha=0.2)
    middle.axvline(CONTEXT, color="gray", linestyle=":")
    middle.set(xscale="log", xlabel=f"place in the stream (dotted: trained up to {CONTEXT})", ylabel="loss (nats)")
    middle.set(title="Reading on")
    middle.legend(fontsize=8)
    for i, values in enumerate(differences.values()):
        right.plot(values, [i] * len(values), "o", color="tab:blue", alpha=0.6)
    right.axvline(0, color="gray", linestyle=":")
    right.set_yticks(range(len(differences)), list(differences))
    right.invert_yaxis()
    right.set(xlabel="loss minus that of 64, no sink (nats)", title="End of the stream, each model")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Draw the masks, prove them, follow the gradients, and read on."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), train_steps=10, n_streams=2, length=192)
    torch.set_flush_denormal(True)

    metrics = show_masks(config.seed)
    reach, curves = show_reach(config.seed)
    streamed, losses, differences = show_streams(config)

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics | reach | streamed, indent=2) + "\n")
    draw(config.out / "window.png", curves, losses, differences)
    print(f"\nwrote window.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
