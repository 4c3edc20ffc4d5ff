"""Lesson 3.4: the key/value cache: every token goes through the model once.

A model writes one token at a time, and each new token looks at all before it. Without a cache the whole text goes
through the model again for every token: 1 + 2 + ... + N = N (N + 1) / 2 tokens for a text of N. But no token looks at a
later one, so what attention needs of it, a key and a value in each layer, never changes. Keep both, and a text of N
costs N passes of one token.

    python part3_arch_improvements/lesson4_kv_cache.py     # 40 seconds; five tables, a figure
    python part3_arch_improvements/lesson4_kv_cache.py --in_full 1024 --compare_transformers     # 3 minutes

You should see the memory of a cache, by formula and as the system counts it; the most naive cache, tensors that are
glued together, and cache.KVCache give the numbers of the full pass; the time of a token with and without them as the
text grows; and what a batch gains, and how near a step comes to the speed of the memory.

References: Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need", sections 2.4 (token by token) and
3; Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 2 (what a step reads, and what it computes).
"""

import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib
import matplotlib.pyplot as plt
import torch
import tyro
from tqdm import tqdm

from cache import KVCache
from data import UserError
from generate import generate, pad_left
from load_hf import OPTIONAL, SHAPE, load_weights, read_config
from model import GPT, GPTConfig

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
HEADS = {4: "MHA", 2: "GQA", 1: "MQA"}  # key/value heads, for 4 query heads (lesson 7)
LLAMAS = {"Llama 2 7B (32 heads)": (32, 1, 32, 4096, 128), "Llama 3 8B (8 heads)": (32, 1, 8, 8192, 128)}


@dataclass
class Config:
    """Measure what a cache gives and what it takes."""

    tokens: int = 1024
    """Longest text that is timed."""
    in_full: int = 256
    """Tokens that are really written with and without cache. The loop without is quadratic: 1024 take two minutes."""
    rounds: int = 5
    """How often everything is timed, in turns; the medians count."""
    compare_transformers: bool = False
    """Write the same text with transformers.generate as well, on the same weights. Needs the library."""
    seed: int = 0
    """Seed of the weights and the tokens."""
    out: Path = RUNS / "lesson4_kv_cache"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- the cache in its most naive form ---


class GluedCache:
    """One tensor of keys and one of values for each layer, to whose ends the new ones are glued.

    Each step copies all that is there into a tensor one token longer. GPT calls the same methods as of KVCache.

    Args:
        shape: (n_layer, B, n_kv_head, S, D); S is 0 for an empty one.
        like: a tensor with the device and the dtype of the cache.
    """

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor) -> None:
        self.k, self.v = list(like.new_zeros(shape)), list(like.new_zeros(shape))
        self.n_pad = None
        self.length = 0

    def positions(self, T: int) -> torch.Tensor:
        """Positions of the next T tokens, (1, T)."""
        return torch.arange(self.length, self.length + T)[None]

    def key_positions(self, T: int) -> torch.Tensor:
        """Positions of all keys once T more are there, (1, S + T)."""
        return torch.arange(self.length + T)[None]

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Glue (B, n_kv_head, T, D) to the (B, n_kv_head, S, D) of that layer, and return both, S + T long."""
        self.k[layer] = torch.cat([self.k[layer][:, :, : self.length], k], dim=2)
        self.v[layer] = torch.cat([self.v[layer][:, :, : self.length], v], dim=2)
        return self.k[layer], self.v[layer]

    def advance(self, T: int) -> None:
        """Count T tokens as stored, once every layer has stored them."""
        self.length += T


def cache_shape(config: GPTConfig, B: int, S: int) -> tuple[int, ...]:
    """(n_layer, B, n_kv_head, S, D) of a cache for B rows of S tokens."""
    return (config.n_layer, B, config.n_kv_head, S, config.head_dim)


# --- it changes nothing ---


@torch.no_grad()
def show_exactness(model: GPT, seed: int) -> dict[str, float]:
    """Print how far the logits of each way to read a text are from those of the full pass."""
    generator = torch.Generator().manual_seed(seed)
    B, T = 2, 96
    idx = torch.randint(model.config.vocab_size, (B, T), generator=generator)
    full, _ = model(idx)  # (B, T, V)

    def read(tokens: torch.Tensor, cache: KVCache | GluedCache, size: int) -> torch.Tensor:
        return torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(size, dim=1)], dim=1)

    ways = {
        "glued tensors, token by token": read(idx, GluedCache(cache_shape(model.config, B, 0), model.wte.weight), 1),
        "KVCache, token by token": read(idx, model.make_cache(B, T), 1),
        "KVCache, in pieces of 7": read(idx, model.make_cache(B, T), 7),
        "KVCache, all at once": read(idx, model.make_cache(B, T), T),
    }
    apart = {name: (logits - full).abs().max().item() for name, logits in ways.items()}
    # Rows of unequal length: the shorter one is padded on the left, and must come out as it does alone.
    short = 60
    padded, n_pad = pad_left([idx[0].tolist(), idx[1, :short].tolist()], pad=0)  # (2, T), (2,)
    logits = read(padded, model.make_cache(B, T, n_pad), 7)
    alone, _ = model(idx[1:, :short])  # (1, short, V)
    longer, shorter = logits[0] - full[0], logits[1, T - short :] - alone[0]
    apart[f"KVCache, with a row of {short} padded"] = max(longer.abs().max().item(), shorter.abs().max().item())
    print(f"\nlargest difference to the full pass, in logits up to {full.abs().max():.1f}; {B} rows of {T} tokens")
    for name, difference in apart.items():
        print(f"  {name:32s}  {difference:.0e}")
    return {"cache_difference": max(apart.values())}


# --- memory ---


def cache_bytes(shape: tuple[int, ...], bytes_each: int) -> int:
    """2 * n_layer * B * n_kv_head * S * D numbers of so many bytes: keys and values."""
    return 2 * math.prod(shape) * bytes_each


def resident() -> float:
    """Bytes of memory that the system has given to this process; nan where it does not say so (not Linux)."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else float("nan")


def show_memory(model: GPT, tokens: int) -> dict[str, float]:
    """Print the size of caches of 8 rows, by formula and as measured; return MB by key/value heads and tokens."""
    kept, metrics = [], {}
    lengths = (tokens // 4, tokens // 2, tokens)
    print("memory of a cache of 8 rows in float32, MB by formula and (measured)")
    print("  key/value heads" + "".join(f"{f'{S:,} tokens':>18s}" for S in lengths))
    for heads in HEADS:
        line = f"  {heads:15d}"
        for S in lengths:
            shape = cache_shape(replace(model.config, n_kv_head=heads), 8, S)
            before = resident()
            kept.append(KVCache(shape, model.wte.weight))  # all stay, or one would get the memory of the one before
            formula, measured = cache_bytes(shape, 4) / 1e6, (resident() - before) / 1e6
            line += f"{formula:9.2f} ({measured:6.2f})"
            metrics |= {f"formula_mb_kv{heads}_t{S}": formula, f"measured_mb_kv{heads}_t{S}": measured}
        print(line)
    for name, shape in LLAMAS.items():
        print(f"  {name}: one row of {shape[3]:,} tokens, 2 bytes a number, takes {cache_bytes(shape, 2) / 1e9:.2f} GB")
    return metrics


# --- time ---


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Time a piece of work several times, after doing it once without looking."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken[1:]


def one_step(model: GPT, cache: KVCache | GluedCache, B: int, t: int) -> None:
    """Read the t-th token of B rows; the cache is set back, so the same step can be taken again."""
    cache.length = t - 1
    model(torch.zeros(B, 1, dtype=torch.long), cache=cache)


@torch.no_grad()
def show_lengths(model: GPT, config: Config) -> dict[str, list[float]]:
    """Print and return the seconds for the t-th token in three ways: name -> one number for each t."""
    lengths = [max(1, config.tokens * i // 8) for i in range(9)]
    works = []  # (way, what to do, how often in a round)
    for t in lengths:
        glued, cache = (
            GluedCache(cache_shape(model.config, 1, t), model.wte.weight),
            model.make_cache(1, t),
        )  # zeros will do
        works.append(("full pass", partial(model, torch.zeros(1, t, dtype=torch.long)), 1))
        works.append(("glued", partial(one_step, model, glued, 1, t), 5))
        works.append(("KVCache", partial(one_step, model, cache, 1, t), 5))
    times: list[list[float]] = [[] for _ in works]
    for _ in tqdm(range(config.rounds), desc="one more token", disable=None, leave=False):
        for taken, (_, work, repeats) in zip(times, works, strict=True):
            taken += seconds(work, repeats)
    by_way = {name: [] for name, _, _ in works}
    for taken, (name, _, _) in zip(times, works, strict=True):
        by_way[name].append(median(taken))
    print("\nmilliseconds for the t-th token of one sequence, medians")
    print("      t   full pass   glued   KVCache   full pass / KVCache")
    for t, full, glue, kept in zip(lengths, *by_way.values(), strict=True):
        print(f"  {t:5d}   {full * 1e3:9.2f}   {glue * 1e3:5.2f}   {kept * 1e3:7.2f}   {full / kept:19.1f}")
    # A whole text takes the sum over all t: the area under each curve.
    full, glue, kept = (torch.trapezoid(torch.tensor(some), torch.tensor(lengths)) for some in by_way.values())
    print(f"  all together, in seconds: {full:.1f}, {glue:.1f} and {kept:.1f}; {full / kept:.1f} times faster")
    return {"t": lengths, **by_way}


@torch.no_grad()
def write_without_cache(model: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """Append the likeliest token n times, each time reading the whole text again, (B, T) -> (B, T + n)."""
    for _ in tqdm(range(n), desc="without a cache", disable=None, leave=False):
        logits, _ = model(idx)  # (B, T, V), of which only the last row is used
        idx = torch.cat([idx, logits[:, -1:].argmax(dim=-1)], dim=1)
    return idx


def write_with_cache(model: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    """The same by generate.generate, which keeps a KVCache."""
    return torch.cat([idx, torch.stack(list(generate(model, idx, n, temperature=0.0)), dim=1)], dim=1)


def make_llama(config: GPTConfig) -> tuple[Callable[[torch.Tensor, int], torch.Tensor], GPT]:
    """A random Llama of transformers in the shape of a config: its own way to write, and a GPT with its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # to compare with, on demand: no part of us needs it

    settings = {their_name: getattr(config, our_name) for our_name, their_name in (SHAPE | OPTIONAL).items()}
    theirs = LlamaForCausalLM(LlamaConfig(**settings, bos_token_id=0, eos_token_id=0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        shape, _ = read_config(Path(folder))
        ours = GPT(shape).eval()
        ours.load_state_dict(load_weights(Path(folder), shape))
    theirs.generation_config.eos_token_id = None  # go on to the length asked for, as ours does

    def write(idx: torch.Tensor, n: int) -> torch.Tensor:
        mask = torch.ones_like(idx)
        return theirs.generate(idx, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)

    return write, ours


def show_texts(model: GPT, config: Config) -> dict[str, float]:
    """Print how long whole texts take, and how much of them is the same."""
    n = config.in_full - 1
    idx = torch.arange(32)[:, None]  # (B, 1), each row begins with another token
    ways: dict[str, Callable[[], torch.Tensor]] = {}
    if config.compare_transformers:
        write, model = make_llama(model.config)
        ways["transformers.generate"] = partial(write, idx[:1], n)
    ways["KVCache"] = partial(write_with_cache, model, idx[:1], n)
    ways["KVCache, 32 rows"] = partial(write_with_cache, model, idx, n)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, torch.Tensor] = {}
    for _ in tqdm(range(3), desc="whole texts", disable=None, leave=False):
        for name, way in ways.items():
            started = time.perf_counter()
            texts[name] = way()
            taken[name].append(time.perf_counter() - started)
    started = time.perf_counter()
    texts["no cache"] = write_without_cache(model, idx[:1], n)
    taken["no cache"] = [time.perf_counter() - started]

    ours, rate = texts["KVCache"], n / median(taken["KVCache"])
    kinds = len(ours.unique())
    print(f"\nwhole texts of {config.in_full:,} tokens, always the likeliest one; the first has {kinds} different ones")
    print("                          seconds   tokens/s   time per token, KVCache = 1   same tokens")
    metrics = {}
    for name, some in taken.items():
        tokens_per_second = texts[name].shape[0] * n / median(some)
        ratio, same = rate / tokens_per_second, (texts[name][:1] == ours).float().mean().item()
        print(f"  {name:22s}  {median(some):7.2f}   {tokens_per_second:8.0f}   {ratio:27.2f}   {same:11.1%}")
        key = name.replace(", ", "_").replace(" ", "_").replace(".", "_")
        metrics |= {f"text_rate_{key}": tokens_per_second, f"text_ratio_{key}": ratio, f"text_same_{key}": same}
    return metrics


@torch.no_grad()
def show_batches(model: GPT, config: Config) -> list[dict[str, float]]:
    """Print how fast batches are written, and how near a step comes to the speed of the memory; return the table."""
    block = torch.ones(2**20 if config.smoke else 2**26)  # 256 MB, far more than fits into a processor's own memory
    other = torch.empty_like(block)
    setups = []
    for heads in (4, 1):
        gpt = GPT(replace(model.config, n_kv_head=heads)).eval()
        caches = {B: gpt.make_cache(B, config.tokens) for B in (1, 8, 32)}
        lengths = (config.tokens // 8, config.tokens // 2, config.tokens)
        setups += [(gpt, cache, B, t) for t in lengths for B, cache in caches.items()]
    times: list[list[float]] = [[] for _ in setups]
    copies = []
    for _ in tqdm(range(config.rounds), desc="batches", disable=None, leave=False):
        copies += seconds(partial(other.copy_, block), 1)
        for taken, setup in zip(times, setups, strict=True):
            taken += seconds(partial(one_step, *setup), 5)
    bandwidth = 2 * block.nbytes / median(copies)  # each byte is read, and written
    print(f"\na step reads the weights once and the cache of every row; a plain copy moves {bandwidth / 1e9:.1f} GB/s")
    print("  key/value heads      t    B   ms a step   tokens/s   times B = 1   MB read   share of the copy's speed")
    rows: list[dict[str, float]] = []
    for (gpt, _, B, t), taken in zip(setups, times, strict=True):
        step, heads = median(taken), gpt.config.n_kv_head
        # Of the table of token vectors it reads one row a token, of every other matrix all.
        read = 4 * (gpt.num_parameters() - gpt.wte.weight.numel()) + cache_bytes(cache_shape(gpt.config, B, t), 4)
        rows.append({"heads": heads, "t": t, "B": B, "rate": B / step, "share": read / step / bandwidth})
        alone = next(row for row in rows if (row["heads"], row["t"], row["B"]) == (heads, t, 1))
        rows[-1]["gain"] = B / step / alone["rate"]
        print(
            f"  {heads:15d}  {t:5d}   {B:2d}   {step * 1e3:9.2f}   {B / step:8.0f}   {rows[-1]['gain']:11.1f}"
            f"   {read / 1e6:7.1f}   {rows[-1]['share']:25.0%}"
        )
    return rows


def draw(path: Path, by_way: dict[str, list[float]], rows: list[dict[str, float]], metrics: dict[str, float]) -> None:
    """Draw time against length, tokens a second against the batch, and memory against length."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4))
    for name in ("full pass", "glued", "KVCache"):
        left.plot(by_way["t"], [1e3 * s for s in by_way[name]], "o-", markersize=4, label=name)
    left.set(xlabel="t, tokens in the text", ylabel="milliseconds for one more", yscale="log", title="One sequence")
    for heads, style in ((4, "o-"), (1, "s--")):
        for i, t in enumerate(sorted({row["t"] for row in rows})):
            some = [row for row in rows if (row["heads"], row["t"]) == (heads, t)]
            B, gain = [row["B"] for row in some], [row["gain"] for row in some]
            middle.plot(B, gain, style, color=f"C{i}", markersize=4, label=f"{HEADS[heads]}, t = {t}")
    middle.set(xlabel="B, rows in the batch", xticks=[1, 8, 32], ylabel="times the tokens a second of B = 1")
    middle.set_title("Batches")
    lengths = sorted({int(name.rpartition("_t")[2]) for name in metrics if name.startswith("formula_mb")})
    for i, (heads, name) in enumerate(HEADS.items()):
        formula, measured = ([metrics[f"{how}_mb_kv{heads}_t{t}"] for t in lengths] for how in ("formula", "measured"))
        right.plot(
            [0, *lengths], [0, *formula], color=f"C{i}", label=f"{name}: {heads} key/value head{'s'[: heads - 1]}"
        )
        right.plot(lengths, measured, "o", color=f"C{i}")
    right.set(xlabel="tokens", ylabel="MB", title="Cache of 8 rows (dots: measured)")
    for ax in (left, middle, right):
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Weigh, compare, and time."""
    if config.compare_transformers and importlib.util.find_spec("transformers") is None:
        raise UserError("--compare_transformers: the library transformers is not installed; pip install transformers")
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), tokens=64, in_full=min(config.in_full, 32), rounds=1)
    if config.tokens < 8 or config.in_full < 2:
        raise UserError(f"--tokens {config.tokens} --in_full {config.in_full}: at least 8 and 2 are needed")
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    longest = max(config.tokens, config.in_full, 96)
    # Untied, because an untrained model that writes with the matrix that it reads with repeats one token for ever.
    model = GPT(GPTConfig(block_size=longest, n_layer=6, n_head=4, n_embd=256, tie_weights=False)).eval()
    print(f"{model.num_parameters():,} parameters: 6 layers of 256, 4 heads of 64; {torch.get_num_threads()} threads")
    metrics = show_memory(model, config.tokens)  # first, while no freed memory lies about
    metrics |= show_exactness(model, config.seed)
    by_way = show_lengths(model, config)
    metrics |= show_texts(model, config)
    rows = show_batches(model, config)
    for way in ("full pass", "glued", "KVCache"):
        metrics |= {f"ms_{way.replace(' ', '_')}_t{t}": 1e3 * s for t, s in zip(by_way["t"], by_way[way], strict=True)}
    for row in rows:
        name = f"kv{row['heads']}_t{row['t']}_b{row['B']}"
        metrics |= {f"{key}_{name}": row[key] for key in ("rate", "gain", "share")}

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "kv_cache.png", by_way, rows, metrics)
    print(f"\nwrote kv_cache.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
