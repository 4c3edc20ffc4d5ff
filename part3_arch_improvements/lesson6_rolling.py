"""Lesson 3.6: a rolling cache, for text without an end.

With a window, what is W tokens back will never be looked at again, so its slot in the cache can be used again. A ring
of W slots, and a few for the sinks, serve a stream of any length: token p goes to slot (p - n_sink) mod W of the ring,
where it takes the place of token p - W. Attention does not ask for the order of the slots, only for the position that
each of them holds, so no token changes its slot.

    python part3_arch_improvements/lesson6_rolling.py     # 70 seconds; a trace, tables, a figure

You should see the slots as tokens arrive, the rolling cache give the scores of the windowed full pass after wrapping 60
times, 20,000 tokens generated in memory that stays and in time per token that stays, beside a plain cache where both
grow, and what becomes of the loss when sinks are counted as ever farther away, or as standing in the cache.

References: Jiang et al. 2023, "Mistral 7B", section 2 (the rolling buffer); Xiao et al. 2023, "Efficient Streaming
Language Models with Attention Sinks", section 3.2 (positions in the cache).
"""

import gc
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import train
from cache import KVCache, RollingKVCache
from data import UserError, load_tokens
from generate import generate, printable
from model import GPT, GPTConfig
from race import race, spread
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
CONTEXT, WINDOW, N_SINK, N_MODELS = 128, 32, 4, 3  # of the small models: T, W and sinks in training, and how many


@dataclass
class Config:
    """Trace a rolling cache, prove it, and stream through it."""

    new_tokens: int = 20_000
    """Tokens to generate with the rolling cache."""
    early: int = 1000
    """The token that the last one is compared with; at most half of new_tokens and of plain_slots."""
    plain_slots: int = 4096
    """Tokens that fit into the plain cache."""
    train_steps: int = 400
    """Steps of each small model."""
    length: int = 2048
    """N, tokens of a held-out stream, of which 16 are read."""
    seed: int = 0
    """Seed of weights and draws, and of the first small model; the next ones count on from it."""
    out: Path = RUNS / "lesson6_rolling"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- the slots ---


def slot_by_hand(position: int, window: int, n_sink: int) -> int:
    """Where a position is kept: each sink in a slot of its own, the others around the ring."""
    return position if position < n_sink else n_sink + (position - n_sink) % window


def trace(text: str, window: int, n_sink: int) -> int:
    """Print the slots as the characters of a text arrive; return how many entries differ from RollingKVCache's."""
    text = text.replace(" ", "_")
    empty = torch.iinfo(torch.long).max  # what RollingKVCache has for a slot that nothing is in
    slots = [empty] * (n_sink + window)  # the position that each one holds
    cache, differing = RollingKVCache((1, 1, 1, n_sink + window, 2), torch.zeros(1), n_sink), 0
    print(f"window {window}, {n_sink} sinks: {n_sink + window} slots; in brackets the one that is written")
    print("  position  character   sinks" + " " * (4 * n_sink - 4) + "ring" + " " * (4 * window - 3) + "forgotten")
    for position, character in enumerate(text):
        slot = slot_by_hand(position, window, n_sink)
        lost, slots[slot] = slots[slot], position
        shown = [" " if held == empty else text[held] for held in slots]
        cells = [f"[{c}] " if s == slot else f" {c}  " for s, c in enumerate(shown)]
        forgotten = "" if lost == empty else f"{text[lost]}, position {lost}"
        row = f"  {position:8d}  {character:9s}   {''.join(cells[:n_sink])} {''.join(cells[n_sink:])} {forgotten}"
        print(row.rstrip())
        cache.update(0, torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))  # (B, Hkv, T, D)
        cache.advance(1)
        differing += sum(a != b for a, b in zip(cache.held[0].tolist(), slots, strict=True))
    print(f"{differing} entries differ from RollingKVCache")
    return differing


# --- the same by hand, and the proof ---


class ShiftingCache:
    """A cache of constant size in the most naive form: append, then cut out what no later token can see.

    It has what GPT asks of a cache, see KVCache; `like` is an empty one of the right sizes.
    """

    def __init__(self, like: KVCache, n_sink: int) -> None:
        n_layer, batch_size, n_kv_head, n_slots, head_dim = like.k.shape
        self.n_pad, self.length, self.n_sink, self.window = None, 0, n_sink, n_slots - n_sink
        self.held = torch.zeros(1, 0, dtype=torch.long)  # (1, S) positions, in order
        self.k = list(torch.zeros(n_layer, batch_size, n_kv_head, 0, head_dim))  # grow along dimension 2
        self.v = list(torch.zeros(n_layer, batch_size, n_kv_head, 0, head_dim))

    def positions(self, T: int) -> torch.Tensor:
        """See KVCache."""
        return torch.arange(self.length, self.length + T)[None]  # (1, T)

    def key_positions(self, T: int) -> torch.Tensor:
        """See KVCache."""
        return torch.cat([self.held, self.positions(T)], dim=1)  # (1, S + T)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (B, n_kv_head, T, D) each; return all, and keep what will be seen again."""
        k, v = torch.cat([self.k[layer], k], dim=2), torch.cat([self.v[layer], v], dim=2)
        self.k[layer], self.v[layer] = self._cut(k, 2), self._cut(v, 2)
        return k, v

    def advance(self, T: int) -> None:
        """See KVCache."""
        self.held = self._cut(self.key_positions(T), 1)
        self.length += T

    def _cut(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The sinks and the last `window`, along a dimension."""
        n = x.shape[dim]
        if n <= self.n_sink + self.window:
            return x
        return torch.cat([x.narrow(dim, 0, self.n_sink), x.narrow(dim, n - self.window, self.window)], dim=dim)


@torch.no_grad()
def feed(model: GPT, idx: torch.Tensor, cache: KVCache | ShiftingCache, chunk: int) -> torch.Tensor:
    """Give idx (B, T) to a model in chunks through a cache; return the logits of all, (B, T, V)."""
    return torch.cat([model(piece, cache=cache)[0] for piece in idx.split(chunk, dim=1)], dim=1)


def prove(seed: int) -> float:
    """Print how far both caches are from the windowed full pass, on an untrained model; return the largest distance."""
    T, worst = 480, 0.0
    print(f"\n{T} tokens through a cache, largest distance of a logit from the full pass with a windowed mask")
    print("  window  sinks  tokens at once  times around   by hand   rolling")
    for window, n_sink in ((8, 0), (8, 4), (32, 1)):
        for chunk in (1, 7, 100):
            torch.manual_seed(seed)
            model = GPT(GPTConfig(block_size=T, n_layer=3, n_embd=32, n_kv_head=2, window=window, n_sink=n_sink)).eval()
            idx = torch.randint(257, (2, T))
            with torch.no_grad():
                full, _ = model(idx)
            rolling = model.make_cache(2, 0, rolling=True)
            caches = (ShiftingCache(rolling, n_sink), rolling)
            apart = [(feed(model, idx, cache, chunk) - full).abs().max().item() for cache in caches]
            around = (T - n_sink) // window
            print(f"  {window:6d}  {n_sink:5d}  {chunk:14d}  {around:12d}   {apart[0]:7.0e}   {apart[1]:7.0e}")
            worst = max(worst, *apart)
    return worst


# --- a stream without an end ---


def cache_bytes(cache: KVCache) -> int:
    """Bytes that a cache holds on to."""
    return sum(x.numel() * x.element_size() for x in vars(cache).values() if isinstance(x, torch.Tensor))


def living_bytes() -> int:
    """Bytes of all tensors that live in this process, each storage counted once."""
    storages = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def stream(model: GPT, cache: KVCache, n: int, config: Config) -> tuple[list[int], list[float], dict[int, tuple]]:
    """Generate n tokens through a cache, from the beginning of a document.

    Returns:
        The tokens; seconds for each; and by the number of tokens, `early` and n: the bytes of the cache, and those of
        all tensors alive.
    """
    idx, generator = torch.tensor([[ByteTokenizer.eot]]), torch.Generator().manual_seed(config.seed)
    tokens, seconds, found = [], [], {}
    steps = generate(model, idx, n, 0.6, generator=generator, cache=cache)  # idx is (1, 1)
    started = time.perf_counter()
    for token in tqdm(steps, total=n, desc="generating", disable=None, leave=False):
        seconds.append(time.perf_counter() - started)
        tokens.append(token.item())
        if len(tokens) in (config.early, n):
            found[len(tokens)] = cache_bytes(cache), living_bytes()
        started = time.perf_counter()
    return tokens, seconds, found


@torch.no_grad()
def take_turns(model: GPT, caches: dict[str, KVCache], tokens: list[int]) -> dict[str, float]:
    """Median milliseconds a token, by cache, all of them in turns: what disturbs the machine disturbs all alike."""
    seconds = {name: [] for name in caches}
    for token in tqdm(tokens, desc="timing", disable=None, leave=False):
        for name, cache in caches.items():
            started = time.perf_counter()
            model(torch.tensor([[token]]), cache=cache)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * median(values) for name, values in seconds.items()}


def show_stream(model: GPT, config: Config) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Generate through a rolling and a plain cache, print what a token costs; return metrics, and seconds a token."""
    n, early, slots, near = config.new_tokens, config.early, config.plain_slots, config.early // 2
    rolling, plain = model.make_cache(1, 0, rolling=True, in_cache=True), model.make_cache(1, slots)
    tokens, seconds, found = stream(model, rolling, n, config)
    _, plain_seconds, _ = stream(model, plain, slots, config)
    per_token = cache_bytes(plain) // slots
    print(f"\n{n:,} tokens through a rolling cache of {N_SINK} + {WINDOW} slots, {slots:,} through a plain one")
    print("  cache    token     milliseconds   bytes used by the cache")
    metrics = {}
    for name, end in (("rolling", early), ("rolling", n), ("plain", early), ("plain", slots)):
        ms = 1000 * median({"rolling": seconds, "plain": plain_seconds}[name][end - near : end])
        used = found[end][0] if name == "rolling" else per_token * end
        print(f"  {name:7s}  {end:6,d}  {ms:14.3f}  {used:24,d}")
        when = "early" if end == early else "late"
        metrics |= {f"ms_{name}_{when}": ms, f"bytes_{name}_{when}": used}
    metrics["living_bytes_grown"] = found[n][1] - found[early][1]
    print(f"  times are medians of {near} tokens; the plain cache would use {per_token * n:,} bytes at token {n:,}")
    print(f"  rolling: all tensors alive at token {early:,} take {found[early][1]:,} bytes, at {n:,} {found[n][1]:,}")
    try:
        feed(model, torch.tensor([[0, 0]]), plain, 1)  # the token drawn last fills the last slot
    except ValueError as error:
        print(f"  one token more for the plain cache: {error}")
    for end in (early, n):
        text = printable(ByteTokenizer().decode(tokens[end - 80 : end])).replace("\n", " ")
        print(f"  the 80 characters before {end:6,d}: {text}")

    caches = {}
    pairs = {"rolling": (early, n), "plain": (early, slots - near), "by hand": (early,)}
    for name, end in ((name, end) for name, ends in pairs.items() for end in ends):
        cache = model.make_cache(1, slots, rolling=name != "plain")
        cache = ShiftingCache(cache, N_SINK) if name == "by hand" else cache
        feed(model, torch.tensor([tokens[:end]]), cache, 500)
        caches[f"{name}, token {end:,}"] = cache
    turns = take_turns(model, caches, tokens[:near])
    print(f"with absolute positions, in turns of one token, median of {near}, without drawing: milliseconds a token")
    for name, ms in turns.items():
        print(f"  {name:22s} {ms:7.3f}")
    rolled, grown = (list(turns.values())[i + 1] / list(turns.values())[i] for i in (0, 2))
    as_it_ran = metrics["ms_rolling_late"] / metrics["ms_rolling_early"]
    print(f"  late over early: rolling {rolled:.3f} (as it ran {as_it_ran:.3f}), plain {grown:.3f}")
    metrics |= {"time_ratio": rolled, "time_ratio_plain": grown, "time_ratio_as_it_ran": as_it_ran}
    metrics |= {"ms_by_hand": turns[f"by hand, token {early:,}"], "tokens_per_second": n / sum(seconds)}
    return metrics, {"rolling": seconds, "plain": plain_seconds}


# --- positions: absolute, or in the cache ---


@torch.no_grad()
def read(model: GPT, streams: torch.Tensor, n_sink: int, in_cache: bool) -> torch.Tensor:
    """Read streams (B, N + 1) through a rolling cache; return the loss at each place, (N,), the mean over B."""
    x, y = streams[:, :-1], streams[:, 1:]
    model.config = replace(model.config, n_sink=n_sink)
    cache = model.make_cache(len(x), 0, rolling=True, in_cache=in_cache)
    # In the cache, the distance to the sinks is another one for every token, so that they come one at a time.
    pieces = tqdm(x.split(1 if in_cache else 128, dim=1), desc="reading", disable=None, leave=False)
    nats = [
        F.cross_entropy(model(piece, cache=cache)[0].transpose(1, 2), target, reduction="none").mean(dim=0)
        for piece, target in zip(pieces, y.split(1 if in_cache else 128, dim=1), strict=True)
    ]
    model.config = replace(model.config, n_sink=N_SINK)
    return torch.cat(nats)


def show_positions(models: list[GPT], streams: torch.Tensor) -> tuple[dict[str, float], dict[str, list[torch.Tensor]]]:
    """Print the loss of held-out streams (B, N + 1) by place; return metrics, and losses (N,) by name and model."""
    N, full = streams.shape[1] - 1, N_SINK + WINDOW
    cuts = sorted({0, CONTEXT, min(4 * CONTEXT, N), N})
    places = (10, full - 1, full, CONTEXT, N, 20_000)
    print("\nhow far back the first sink stands, for the token at a position")
    print("  absolute " + "".join(f"{p:>10,d}" for p in places))
    print("  in cache " + "".join(f"{min(p, full - 1):>10,d}" for p in places))
    ways = {"absolute": (N_SINK, False), "in cache": (N_SINK, True), "no sinks": (0, False)}
    losses = {name: [read(model, streams, *way) for model in models] for name, way in ways.items()}
    print(f"held-out loss by place, mean and spread of {len(models)} models trained on {CONTEXT} tokens at a time")
    print("  positions " + "".join(f"{f'{a + 1:,} to {b:,}':>20s}" for a, b in pairwise(cuts)))
    metrics = {}
    for name, by_model in losses.items():
        row = [[loss[a:b].mean().item() for loss in by_model] for a, b in pairwise(cuts)]
        print(f"  {name:10s}" + "".join(f"{f'{mean(v):.4f} +- {spread(v):.4f}':>20s}" for v in row))
        key = f"loss_{name.replace(' ', '_')}"
        metrics |= {f"{key}_start": mean(row[0]), f"{key}_end": mean(row[-1])}
    return metrics, losses


@torch.no_grad()
def show_rounding(model: GPT, idx: torch.Tensor) -> dict[str, float]:
    """Print what float32 makes of large absolute positions, reading idx (1, T + 1) without sinks; return metrics."""
    x, y = idx[:, :-1], idx[:, 1:]
    model.config = replace(model.config, n_sink=0)
    print(f"\n{x.shape[1]} tokens that begin at a later position: the same distances, other absolute positions")
    print("  first position   largest change of a logit   loss")
    metrics, first = {}, None
    for start in (0, 20_000, 1_000_000, 10_000_000, 100_000_000):
        cache = model.make_cache(1, 0, rolling=True)
        cache.length = start  # as if so many tokens had passed and were forgotten
        logits, loss = model(x, y, cache)
        first = logits if first is None else first
        moved = (logits - first).abs().max().item()
        print(f"  {start:14,d}   {moved:25.0e}   {loss:.4f}")
        metrics |= {f"moved_at_{start}": moved, f"loss_at_{start}": loss.item()}
    model.config = replace(model.config, n_sink=N_SINK)
    return metrics


def draw(path: Path, seconds: dict[str, list[float]], metrics: dict[str, float], losses: dict, n_slots: int) -> None:
    """Draw the slots over time, time and memory over the tokens, and the loss over the place in a stream."""
    fig, ((slots, times), (memory, loss)) = plt.subplots(2, 2, figsize=(12, 7.2))
    window, n_sink, T = 8, 2, 40
    held = torch.full((n_sink + window, T), torch.nan)
    for t in range(T):
        held[slot_by_hand(t, window, n_sink), t:] = t  # until another takes its place
    image = slots.imshow(held, aspect="auto", cmap="viridis", interpolation="nearest")
    fig.colorbar(image, ax=slots, label="position held")
    slots.axhline(n_sink - 0.5, color="white", linewidth=2)
    slots.set(xlabel="position that arrives", ylabel="slot", title=f"{n_sink} sinks (on top), a ring of {window}")
    for name, values in seconds.items():
        size = max(len(values) // 80, 1)
        blocks = [1000 * median(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
        times.plot([i * size + size / 2 for i in range(len(blocks))], blocks, linewidth=1.2, label=f"{name} cache")
    times.set(xlabel="tokens generated", ylabel="milliseconds a token", title="Time, as it ran", ylim=(0, None))
    n, plain = len(seconds["rolling"]), metrics["bytes_plain_late"] / 1e6
    memory.plot([0, n], 2 * [metrics["bytes_rolling_late"] / 1e6], label="rolling cache")
    memory.plot([0, n_slots], [0, plain], label="plain cache")
    memory.plot([n_slots, n], [plain, plain * n / n_slots], color="tab:orange", linestyle=":", label="it would go on")
    memory.set(xlabel="tokens generated", ylabel="megabytes used", title="Memory")
    for name, by_model in losses.items():
        blocks = torch.stack([by_place.unfold(0, 64, 64).mean(-1) for by_place in by_model])  # (models, N / 64)
        places = [64 * i + 32 for i in range(blocks.shape[1])]
        loss.plot(places, blocks.mean(0), linewidth=1.2, label=name)
        loss.fill_between(places, blocks.amin(0), blocks.amax(0), alpha=0.2)
    loss.axvline(CONTEXT, color="gray", linestyle=":")
    loss.set(xscale="log", xlabel=f"place (dotted: trained up to {CONTEXT})", ylabel="loss (nats)", title="Positions")
    for panel in (times, memory, loss):
        panel.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Trace the slots, prove the cache, stream through it, and compare ways to count positions."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), new_tokens=300, early=100, plain_slots=200)
        config = replace(config, train_steps=5, length=150)
    if 2 * config.early > min(config.new_tokens, config.plain_slots):
        raise UserError(f"--early {config.early}: above half of --new_tokens or of --plain_slots; give a smaller one")
    torch.set_flush_denormal(True)

    metrics = {"slots_differing": trace("to be or not to be", 4, 2)}
    metrics["largest_difference"] = prove(config.seed)
    tokens, held_out = load_tokens("stories", 2000, ByteTokenizer(), CONTEXT)
    if 16 * (config.length + 1) > len(held_out):
        raise UserError(f"--length {config.length}: 16 of that are more than the {len(held_out):,} held-out tokens")
    streams = held_out[: 16 * (config.length + 1)].view(16, -1)  # (B, N + 1)
    settings = train.Config(steps=config.train_steps, batch_size=8, block_size=CONTEXT, lr=4e-3, warmup_steps=40)
    models = []
    with tqdm(total=N_MODELS * config.train_steps, desc="training", disable=None, leave=False) as bar:
        for seed in range(config.seed, config.seed + N_MODELS):
            torch.manual_seed(seed)
            models.append(GPT(GPTConfig(block_size=CONTEXT, n_layer=2, n_embd=64, window=WINDOW, n_sink=N_SINK)))
            race({"model": models[-1]}, tokens, settings, seed, bar)
            models[-1].eval()

    torch.set_num_threads(1)  # what follows is one token at a time: too little to be shared among threads
    streamed, seconds = show_stream(models[0], config)
    positions, losses = show_positions(models, streams)
    metrics |= streamed | positions | show_rounding(models[0], streams[:1, :513])

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "rolling.png", seconds, metrics, losses, config.plain_slots)
    print(f"\nwrote rolling.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
