"""Lesson 3.7: grouped-query attention, several queries on one key.

While a model writes, it reads the keys and values of all tokens before, for every token anew: the cache is what fills
the memory and what takes the time. In multi-head attention (MHA) each query head has a key and a value head of its own.
In grouped-query attention (GQA) a group of query heads shares one, in multi-query attention (MQA) all do. The cache
shrinks by the size of a group; the queries, and so the places that a token can look at, stay as many.

    python part3_arch_improvements/lesson7_gqa.py     # about a minute; four tables, a figure

You should see attention with repeated heads equal model.CausalSelfAttention, GQA as the MHA whose keys and values are
alike within a group, the size of a cache by formula and as allocated, the time of one token's attention computed in
three ways, and the loss of small models with equal parameters beside the size of their cache: with shared heads, and
with the obvious other way to save, fewer heads.

References: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
section 2; Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need", section 3; Touvron et al. 2023,
"Llama 2", table 1 (which sizes share heads); Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 3.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import train
from data import load_tokens
from model import GPT, CausalSelfAttention, GPTConfig
from race import race, spread
from rope import rope, rope_angles, rope_frequencies
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
# Name: layers, H, Hkv, D, context. From the released configurations.
KNOWN = {
    "Llama 2 7B": (32, 32, 32, 128, 4096),
    "Llama 2 70B": (80, 64, 8, 128, 4096),
    "Llama 3 8B": (32, 32, 8, 128, 8192),
}
# Name: query heads, key/value heads of the small models. Two ways from four key/value heads down to one.
SHARED = {"MHA": (4, 4), "GQA, 2": (4, 2), "MQA": (4, 1)}
FEWER = {"2 heads": (2, 2), "1 head": (1, 1)}


@dataclass
class Config:
    """Share keys and values by hand, against the clock and in training."""

    steps: int = 300
    """Training steps of each run."""
    n_seeds: int = 3
    """Runs of each model, with seeds seed, seed + 1, ..."""
    n_slots: int = 4096
    """Tokens in the cache that is timed."""
    repeats: int = 30
    """How often each computation is timed."""
    seed: int = 0
    """First seed of weights and data."""
    out: Path = RUNS / "lesson7_gqa"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- by hand ---


def repeat_heads(x: torch.Tensor, n_head: int) -> torch.Tensor:
    """Copy each key/value head for every query head of its group, (B, Hkv, S, D) -> (B, H, S, D).

    Neighbours share: with H = 4 and Hkv = 2, query heads 0 1 2 3 read key/value heads 0 0 1 1.
    """
    return x.repeat_interleave(n_head // x.shape[1], dim=1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v with a causal mask, each (B, H, T, D)."""
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / D**0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


@torch.no_grad()
def compare_by_hand(n_kv_head: int) -> dict[str, float]:
    """Largest differences to model.CausalSelfAttention with H = 4 of: repeated heads, tiled heads, and an MHA."""
    config = GPTConfig(n_embd=64, n_head=4, n_kv_head=n_kv_head)  # D = 16
    ours, mha = CausalSelfAttention(config, 0), CausalSelfAttention(GPTConfig(n_embd=64, n_head=4), 0)
    x = torch.randn(2, 10, 64)  # (B, T, C)
    cos, sin = rope_angles(torch.arange(10)[None], rope_frequencies(config.head_dim))
    q, k, v = (h.unflatten(-1, (-1, 16)).transpose(1, 2) for h in ours.qkv(x).split([64, *[16 * n_kv_head] * 2], -1))
    q, k = rope(q, cos, sin), rope(k, cos, sin)

    def finish(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ours.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H * D) -> (B, T, C)

    # The same group in other words: an MHA whose rows for keys and values are copies within a group.
    wq, wk, wv = ours.qkv.weight.split([64, *[16 * n_kv_head] * 2])
    copied = [repeat_heads(w.view(1, n_kv_head, 16, 64), 4).reshape(64, 64) for w in (wk, wv)]
    mha.load_state_dict({"qkv.weight": torch.cat([wq, *copied]), "proj.weight": ours.proj.weight})
    tile = 4 // n_kv_head
    results = {
        "repeated": finish(repeat_heads(k, 4), repeat_heads(v, 4)),
        "as_mha": mha(x, cos, sin, None, None),
        "tiled": finish(k.repeat(1, tile, 1, 1), v.repeat(1, tile, 1, 1)),  # 0 1 0 1: another model
    }
    expected = ours(x, cos, sin, None, None)
    return {name: (result - expected).abs().max().item() for name, result in results.items()}


# --- memory and time ---


def cache_bytes(n_layer: int, n_kv_head: int, head_dim: int, n_slots: int, width: int) -> int:
    """2 * n_layer * Hkv * S * D numbers of `width` bytes each, for one sequence."""
    return 2 * n_layer * n_kv_head * n_slots * head_dim * width


@torch.no_grad()
def ways_to_attend(n_kv_head: int, n_slots: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Three ways in which one token attends to a cache of S slots, H = 32 and D = 64."""
    q = torch.randn(1, 32, 1, 64)  # (B, H, 1, D)
    k, v = torch.randn(2, 1, n_kv_head, n_slots, 64)  # (B, Hkv, S, D) each
    return {
        "repeat": lambda: F.scaled_dot_product_attention(q, repeat_heads(k, 32), repeat_heads(v, 32)),
        "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        # The queries of a group as rows of one: (B, H, 1, D) -> (B, Hkv, H / Hkv, D). Nothing is copied.
        "fold": lambda: F.scaled_dot_product_attention(q.view(1, n_kv_head, -1, 64), k, v).view(q.shape),
    }


def time_one_token(kv_heads: tuple[int, ...], n_slots: int, repeats: int) -> dict[int, dict[str, float]]:
    """Median microseconds of each way for each number of key/value heads; all take turns, so that noise hits all."""
    ways = {n: ways_to_attend(n, n_slots) for n in kv_heads}
    for some in ways.values():
        results = [way() for way in some.values()]
        assert all(torch.allclose(result, results[0], atol=1e-5) for result in results)
    times: dict[int, dict[str, list[float]]] = {n: {name: [] for name in some} for n, some in ways.items()}
    for _ in range(repeats):
        for n, some in ways.items():
            for name, way in some.items():
                started = time.perf_counter()
                way()
                times[n][name].append(1e6 * (time.perf_counter() - started))
    return {n: {name: median(values) for name, values in some.items()} for n, some in times.items()}


# --- in training ---


def make_model(n_head: int, n_kv_head: int, seed: int) -> GPT:
    """A small GPT with heads of D = 12. Parameters that its attention saves widen its MLP: all are equally large."""
    C, D = 48, 12
    saved = (2 * 4 - 2 * n_head + 2 * 4 - 2 * n_kv_head) * D * C  # four matrices: queries, outputs; keys, values
    torch.manual_seed(seed)
    shape = GPTConfig(block_size=64, n_layer=2, n_embd=C, n_head=n_head, n_kv_head=n_kv_head, head_dim=D)
    return GPT(replace(shape, mlp_hidden=128 + saved // (3 * C)))  # SwiGLU has three matrices


def draw(path: Path, kib: dict[str, float], losses: dict[str, list[float]], times: dict[int, dict[str, float]]) -> None:
    """Draw who shares with whom, the loss over the size of the cache, and the time of one token."""
    fig, (heads, plane, clock) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for row, (name, (n_head, n_kv_head)) in enumerate(SHARED.items()):
        y, group = -2.2 * row, n_head // n_kv_head
        for head in range(n_head):
            x = (head // group + 0.5) * group - 0.5  # a key/value head stands in the middle of its group
            heads.plot([head, x], [y, y - 1], color="gray", linewidth=1, zorder=1)
            heads.scatter([head, x], [y, y - 1], s=130, c=["C0", "C3"], marker="s")
        heads.text(-0.6, y - 0.5, name, ha="right", va="center")
    heads.set(title="blue: query heads, red: key/value heads", xlim=(-2, 3.5), ylim=(-6, 0.6))
    heads.axis("off")

    for label, names, colour in (("heads shared", SHARED, "C0"), ("fewer heads", ["MHA", *FEWER], "C1")):
        x = [kib[name] for name in names]
        y, bars = [mean(losses[name]) for name in names], [spread(losses[name]) for name in names]
        plane.errorbar(x, y, yerr=bars, fmt="o-", color=colour, capsize=4, label=label)
    for name, values in losses.items():
        offset, side = ((-8, -14), "right") if name in SHARED else ((8, 6), "left")
        plane.annotate(name, (kib[name], mean(values)), offset, textcoords="offset points", ha=side)
        plane.plot([kib[name]] * len(values), values, ".", color="gray", alpha=0.5, zorder=0)
    plane.set(
        title="equal parameters, gray: one dot a seed",
        xlabel="cache of 1,024 tokens (KiB)",
        ylabel="held-out loss (nats per token)",
    )
    plane.set(xscale="log", xlim=(min(kib.values()) * 0.7, max(kib.values()) * 1.2))
    plane.set_xticks(sorted(set(kib.values())), [f"{value:g}" for value in sorted(set(kib.values()))])
    plane.minorticks_off()
    for way, colour in (("repeat", "C3"), ("enable_gqa", "C2"), ("fold", "C0")):
        clock.plot(list(times), [found[way] for found in times.values()], "o-", color=colour, label=way)
    clock.set(title="attention of one token", xlabel="key/value heads for 32 query heads", ylabel="microseconds")
    clock.set(xscale="log", yscale="log")
    clock.set_xticks(list(times), [str(n) for n in times])
    clock.minorticks_off()
    for ax, place in ((plane, "upper right"), (clock, "center left")):
        ax.grid(alpha=0.3)
        ax.legend(loc=place)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Share heads by hand, weigh and time the cache, and train small models with each kind."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), steps=6, n_seeds=1, n_slots=256, repeats=3)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)
    metrics: dict[str, float] = {}

    print("1. largest difference to model.CausalSelfAttention, H = 4")
    print("   Hkv  query heads read   heads repeated   an MHA with copied rows   heads tiled (wrong)")
    for n in (4, 2, 1):
        found = compare_by_hand(n)
        read = " ".join(str(head) for head in repeat_heads(torch.arange(n).view(1, n, 1, 1), 4).flatten().tolist())
        print(f"   {n:3d}  {read:16s}   {found['repeated']:14.1e}   {found['as_mha']:23.1e}   {found['tiled']:19.1e}")
        metrics |= {f"difference_{name}_{n}": value for name, value in found.items()}
        assert max(found["repeated"], found["as_mha"]) < 1e-5

    print("\n2. cache of one sequence in 16 bits: 2 * layers * Hkv * tokens * D numbers")
    for name, (n_layer, n_head, n_kv_head, head_dim, context) in KNOWN.items():
        full, real = (cache_bytes(n_layer, n, head_dim, context, 2) / 2**30 for n in (n_head, n_kv_head))
        print(
            f"   {name:11s}  {context:,} tokens, {n_head} query heads, {n_kv_head:2d} key/value heads: {real:5.2f} GiB"
            f"{f' (with {n_head}: {full:.2f})' if full > real else ''}"
        )

    print(f"\n3. attention of one token to {config.n_slots:,}, H = 32, D = 64, float32, median microseconds")
    print("   Hkv    MiB read      repeat  enable_gqa        fold")
    times = time_one_token((32, 8, 4, 1), config.n_slots, config.repeats)
    for n, found in times.items():
        print(
            f"   {n:3d}  {cache_bytes(1, n, 64, config.n_slots, 4) / 2**20:10.1f}"
            + "".join(f"{value:12.0f}" for value in found.values())
        )
        metrics |= {f"us_{name}_{n}": value for name, value in found.items()}

    settings = train.Config(steps=config.steps, batch_size=8, block_size=64, lr=3e-3, warmup_steps=30)
    tokenizer = ByteTokenizer()
    tokens, held_out = load_tokens("stories", 2000, tokenizer, settings.block_size)
    shapes = SHARED | FEWER
    losses: dict[str, list[float]] = {name: [] for name in shapes}
    with tqdm(total=len(shapes) * config.n_seeds * config.steps, desc="training", disable=None) as bar:
        for seed in range(config.seed, config.seed + config.n_seeds):
            models = {name: make_model(*heads, seed) for name, heads in shapes.items()}
            race(models, tokens, settings, seed, bar)
            for name, model in models.items():
                losses[name].append(train.evaluate(model, held_out[:20_000], tokenizer)["val_loss"])
    print(f"\n4. training: 2 layers, 48 channels, D = 12, {config.steps} steps of {8 * 64} tokens, +- over the seeds")
    print("              H  Hkv   MLP  parameters   cache of 1,024   held-out loss       minus MHA, seed by seed")
    kib: dict[str, float] = {}
    for name, (n_head, n_kv_head) in shapes.items():
        cache = models[name].make_cache(1, 1024)
        kib[name] = (cache.k.nbytes + cache.v.nbytes) / 1024  # as allocated
        assert kib[name] * 1024 == cache_bytes(2, n_kv_head, 12, 1024, 4)
        apart = [mine - mha for mine, mha in zip(losses[name], losses["MHA"], strict=True)]
        print(
            f"   {name:8s}  {n_head:2d}  {n_kv_head:3d}  {models[name].config.mlp_hidden:4d}  "
            f"{models[name].num_parameters():10,}   {kib[name]:10.0f} KiB   {mean(losses[name]):.4f} +- "
            f"{spread(losses[name]):.4f}   {'  '.join(f'{value:+.4f}' for value in apart)}"
        )
        key = name.lower().replace(", ", "_").replace(" ", "_")
        metrics |= {f"val_loss_{key}": mean(losses[name]), f"val_loss_std_{key}": spread(losses[name])}
        metrics |= {f"cache_kib_{key}": kib[name], f"parameters_{key}": models[name].num_parameters()}
    assert len({model.num_parameters() for model in models.values()}) == 1  # else the comparison is not fair

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "gqa.png", kib, losses, times)
    print(f"\nwrote gqa.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
