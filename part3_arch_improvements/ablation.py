"""The ladder from part 2's model to part 3's, one change at a time: what each one brings, and what it costs.

Every rung keeps the changes below it and adds one. All rungs have the same number of parameters (what a change frees
or needs is given to, or taken from, the width of the MLP), see the same batches in the same order, and are trained in
several seeds. So a difference between two rungs is the change itself, or noise, and the spread over the seeds says
which.

    python part3_arch_improvements/ablation.py                  # 7 rungs, 3 seeds; about 10 minutes on two CPU cores
    python part3_arch_improvements/ablation.py --alone          # each change alone on part 2's model, then all of them
    python part3_arch_improvements/ablation.py --data pydoc     # on other text; also the path of a file

You should see a table with the held-out loss, speed, gradient norm and cache size of each rung, and a figure with error
bars. The last rung is `GPT` of model.py: the script copies its weights over and compares the logits.

References: Zhang & Sennrich 2019 (RMSNorm); Su et al. 2021 (RoPE); Shazeer 2020 (SwiGLU); Ainslie et al. 2023 (GQA);
Jiang et al. 2023, section 2 (window). Narang et al. 2021, "Do Transformer Modifications Transfer Across Implementations
and Applications?", section 3: the same question at a larger size, with few changes that help.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, median

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

import train
from data import UserError, load_tokens
from generate import RUNS, pick_device
from model import GPT, GPTConfig, RMSNorm, init_weights, visible
from race import race, spread
from rope import rope, rope_angles, rope_frequencies
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

MEASURED = ("val_loss", "tokens_per_second", "gradient")  # of each rung, see there


@dataclass
class Config:
    """Train every rung of the ladder from nothing."""

    data: str = "stories"
    """stories, pydoc, or the path of a text file."""
    n_stories: int = 5000
    """Documents to generate for --data stories; a twentieth as many are held out."""
    alone: bool = False
    """Compare each change alone with part 2's model, instead of one on top of the other."""
    steps: int = 1200
    """Optimizer steps of each run."""
    batch_size: int = 2
    """B, windows in a batch."""
    block_size: int = 256
    """T, tokens in a window."""
    n_layer: int = 2
    """Blocks in the stack."""
    n_head: int = 4
    """H, attention heads."""
    n_embd: int = 128
    """C, channels."""
    n_kv_head: int = 2
    """Key/value heads of the rung GQA."""
    window: int = 128
    """Tokens that a token sees in the rung window."""
    lr: float = 2e-3
    """Highest learning rate, the same for all rungs."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from zero."""
    eval_tokens: int = 20_000
    """Held-out tokens to evaluate on at most."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of them that is there."""
    n_seeds: int = 3
    """Runs of each rung, with seeds seed, seed + 1, ..."""
    seed: int = 0
    """First seed of weights and batches."""
    out: Path = RUNS / "ablation"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- a model with switches ---


@dataclass(frozen=True)
class Switches:
    """Which pieces are part 3's. The rest of the shape (window, heads, widths) is said by GPTConfig."""

    rms_norm: bool = False
    """RMSNorm instead of LayerNorm."""
    rope: bool = False
    """Rotary positions instead of a learned vector for each position."""
    swiglu: bool = False
    """A gated MLP instead of a GELU between two matrices."""
    bias: bool = True
    """Biases in linear layers, and in LayerNorm."""


def make_norm(config: GPTConfig, switches: Switches) -> nn.Module:
    """The norm of part 2 or of part 3."""
    if switches.rms_norm:
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=switches.bias)


class AnyBlock(nn.Module):
    """The pre-norm block of both parts, attention and MLP written out in one: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, switches: Switches) -> None:
        super().__init__()
        C, F_, bias = config.n_embd, config.mlp_hidden, switches.bias
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.gated = switches.swiglu
        self.norm1 = make_norm(config, switches)
        qkv = nn.Linear(C, sum(self.heads) * config.head_dim, bias)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": nn.Linear(C, C, bias)})
        self.norm2 = make_norm(config, switches)
        self.mlp = nn.ModuleDict({"fc": nn.Linear(C, (1 + self.gated) * F_, bias), "proj": nn.Linear(F_, C, bias)})

    def forward(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """One step along the residual stream; angles of rope or None, mask (1, 1, T, T) or None for causal."""
        B, T, C = x.shape
        # (B, T, C) -> (B, T, H + 2 Hkv, D) -> (B, H + 2 Hkv, T, D) -> q (B, H, T, D), k and v (B, Hkv, T, D)
        qkv = self.attn["qkv"](self.norm1(x)).view(B, T, sum(self.heads), -1).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.attn["proj"](out.transpose(1, 2).reshape(B, T, C))

        hidden = self.mlp["fc"](self.norm2(x))  # (B, T, F), gated (B, T, 2 F)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return x + self.mlp["proj"](hidden)


class AnyGPT(nn.Module):
    """Part 2's GPT, part 3's, and what lies between. Its parameters have the names that they have there."""

    def __init__(self, config: GPTConfig, switches: Switches) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if switches.rope else nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList([AnyBlock(config, switches) for _ in range(config.n_layer)])
        self.norm = make_norm(config, switches)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("frequency", rope_frequencies(config.head_dim, config.rope_base), persistent=False)
        self.lm_head.weight = self.wte.weight
        init_weights(self, config.n_layer, config.n_embd)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T) ids, T <= block_size -> logits (B, T, V), and the loss if there are targets (B, T)."""
        T, window = idx.shape[1], self.config.window
        positions = torch.arange(T, device=idx.device)[None]  # (1, T)
        mask = visible(positions, positions, window, n_sink=0) if window else None
        x, angles = self.wte(idx), None  # (B, T) -> (B, T, C)
        if self.wpe is None:
            angles = rope_angles(positions, self.frequency)
        else:
            x = x + self.wpe.weight[:T]
        for block in self.blocks:
            x = block(x, angles, mask)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --- the ladder ---


@dataclass
class Rung:
    """One model of the comparison, and what was measured of it: one number for each seed."""

    name: str
    shape: GPTConfig
    switches: Switches
    below: "Rung | None" = None
    """The rung that differs from this one by a single change."""
    val_loss: list[float] = field(default_factory=list)
    """Nats per token, held out, after the last step."""
    tokens_per_second: list[float] = field(default_factory=list)
    """In training, from the median step."""
    gradient: list[float] = field(default_factory=list)
    """Mean length of the gradient before clipping, after the warm-up."""

    def change(self) -> list[float]:
        """Held-out loss minus that of the rung below, seed by seed: both saw the same batches."""
        return [mine - theirs for mine, theirs in zip(self.val_loss, self.below.val_loss, strict=True)]


def count(shape: GPTConfig, switches: Switches) -> int:
    """Parameters of a model, found without memory or random numbers."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AnyGPT(shape, switches).parameters())


def fit_width(shape: GPTConfig, switches: Switches, target: int) -> GPTConfig:
    """The same shape with the MLP's width, a multiple of 8, that brings the parameters nearest to a target."""
    base, more = (count(replace(shape, mlp_hidden=width), switches) for width in (8, 16))
    return replace(shape, mlp_hidden=max(8, 8 + 8 * round((target - base) / (more - base))))


def make_ladder(config: Config) -> list[Rung]:
    """The rungs from part 2's model to part 3's. With config.alone, each change stands on part 2's model."""
    names = ("block_size", "n_layer", "n_head", "n_embd")
    shape = GPTConfig(mlp_hidden=4 * config.n_embd, **{name: getattr(config, name) for name in names})
    ladder = [Rung("part 2", shape, Switches())]
    target = count(shape, Switches())
    changes: list[tuple[str, dict, dict]] = [
        ("RMSNorm", {}, {"rms_norm": True}),
        ("RoPE", {}, {"rope": True}),
        ("SwiGLU", {}, {"swiglu": True}),
        ("no biases", {}, {"bias": False}),
        ("window", {"window": config.window}, {}),
        ("GQA", {"n_kv_head": config.n_kv_head}, {}),
    ]
    if config.alone:
        everything = [{k: v for change in changes for k, v in change[i].items()} for i in (1, 2)]
        changes.append(("all of them", *everything))
    for name, in_shape, in_switches in changes:
        below = ladder[0] if config.alone else ladder[-1]
        switches = replace(below.switches, **in_switches)
        ladder.append(Rung(name, fit_width(replace(below.shape, **in_shape), switches, target), switches, below))
    return ladder


@torch.no_grad()
def difference_to_gpt(rung: Rung) -> float:
    """Largest difference between the logits of a rung with all switches on and those of model.GPT, same weights."""
    ours, theirs = AnyGPT(rung.shape, rung.switches), GPT(rung.shape)
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # the norms' scales are no longer all 1
    theirs.load_state_dict(ours.state_dict())  # refuses a name or a shape that does not fit
    idx = torch.randint(rung.shape.vocab_size, (2, rung.shape.block_size))
    return (ours(idx)[0] - theirs(idx)[0]).abs().max().item()


# --- what comes out ---


def cache_kib(shape: GPTConfig, n_tokens: int) -> float:
    """Memory of keys and values for n_tokens of one sequence in float32, in KiB; a window forgets the rest."""
    slots = min(n_tokens, shape.window or n_tokens)
    return 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * slots * 4 / 1024


def print_table(ladder: list[Rung], n_cache: int) -> None:
    """One line a rung: mean and standard deviation over the seeds."""
    other = "against part 2" if ladder[-1].below is ladder[0] else "against the line above"
    print(f"{'':11s} parameters  MLP  held-out loss       {other:26s} tokens/s         gradient           cache")
    for rung in ladder:
        change = ""
        if rung.below:
            fell = sum(value < 0 for value in rung.change())
            change = f"{mean(rung.change()):+.4f} +- {spread(rung.change()):.4f}  {fell}/{len(rung.val_loss)}"
        print(
            f"{rung.name:11s} {count(rung.shape, rung.switches):10,}  {rung.shape.mlp_hidden:3d}  "
            f"{mean(rung.val_loss):.4f} +- {spread(rung.val_loss):.4f}  {change:24s}   "
            f"{mean(rung.tokens_per_second):6,.0f} +- {spread(rung.tokens_per_second):4,.0f}  "
            f"{mean(rung.gradient):.3f} +- {spread(rung.gradient):.3f}  {cache_kib(rung.shape, n_cache):5,.0f} KiB"
        )
    print(
        "  +- standard deviation over the seeds; n/m: the loss fell in n of m seeds; gradient: its mean length before"
    )
    print(f"  clipping, after the warm-up; cache: keys and values of {n_cache:,} tokens in float32")
    for word, wanted in (("fell", len(ladder[0].val_loss)), ("rose", 0)):
        names = [rung.name for rung in ladder[1:] if sum(value < 0 for value in rung.change()) == wanted]
        print(f"  the loss {word} in every seed with: {', '.join(names) or 'nothing'}")


def draw(path: Path, ladder: list[Rung], alone: bool) -> None:
    """Draw loss, speed and gradient of each rung: a dot for each seed, the mean, and a bar of +- one deviation."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 0.5 * len(ladder) + 1.4), sharey=True, layout="constrained")
    labels = ("held-out loss (nats per token)", "tokens a second in training", "mean length of the gradient")
    rows = range(len(ladder))
    for ax, name, label, colour in zip(axes, MEASURED, labels, ("C0", "C2", "C1"), strict=True):
        values = [getattr(rung, name) for rung in ladder]
        for row, seeds in zip(rows, values, strict=True):
            ax.plot(seeds, [row] * len(seeds), ".", color=colour, alpha=0.5)
            ax.errorbar(mean(seeds), row, xerr=spread(seeds), fmt="o", color=colour, capsize=4)
        if not alone:
            ax.plot([mean(seeds) for seeds in values], rows, color=colour, linewidth=1)
        ax.axvline(mean(values[0]), color="gray", linestyle=":")
        ax.set(xlabel=label)
        if name == "val_loss":
            ax.set_xscale("log")  # one rung is worth more than all others, which are to be seen as well
        ax.grid(alpha=0.3)
    sign = "part 2 + " if alone else "+ "
    axes[0].set(yticks=rows, yticklabels=["part 2", *(sign + rung.name for rung in ladder[1:])])
    axes[0].invert_yaxis()
    fig.suptitle("Mean and standard deviation over the seeds, one dot a seed; dotted: part 2", fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def check_settings(config: Config) -> train.Config:
    """Settings of train.py for all runs.

    Raises:
        UserError: a setting with which no comparison is possible.
    """
    for name in ("n_seeds", "n_kv_head", "window"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is below 1; give at least 1")
    if config.steps <= config.warmup_steps:
        raise UserError(f"--steps {config.steps} ends within --warmup_steps {config.warmup_steps}; give more steps")
    shared = {setting.name for setting in fields(Config)} & {setting.name for setting in fields(train.Config)}
    settings = train.Config(**{name: getattr(config, name) for name in shared})
    train.check_settings(settings)
    return settings


def main(config: Config) -> None:
    """Build the ladder, check its end, train every rung in every seed, and compare."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_stories=60, steps=8, block_size=64, n_layer=2)
        config = replace(config, n_embd=32, window=32, warmup_steps=2, eval_tokens=1000, n_seeds=2)
    settings = check_settings(config)
    torch.set_flush_denormal(True)
    started = time.perf_counter()
    device = pick_device(config.device)
    tokenizer = ByteTokenizer()
    tokens, held_out = load_tokens(config.data, config.n_stories, tokenizer, config.block_size)
    try:
        ladder = make_ladder(config)
    except ValueError as error:
        raise UserError(f"no such model: {error}") from error

    torch.manual_seed(config.seed)
    apart = difference_to_gpt(ladder[-1])
    print(f"the last model against model.GPT with the same weights: logits differ by {apart:.1e} at most")
    assert apart < 1e-4
    per_step = config.batch_size * config.block_size
    print(
        f"{len(ladder)} models x {config.n_seeds} seeds x {config.steps} steps of {per_step:,} tokens of {config.data}"
    )
    print(f"lr {config.lr}, window {config.window}, GQA with {config.n_kv_head} of {config.n_head} key/value heads\n")

    with tqdm(total=config.n_seeds * len(ladder) * config.steps, desc="training", disable=None) as bar:
        for seed in range(config.seed, config.seed + config.n_seeds):
            models = {}
            for rung in ladder:
                torch.manual_seed(seed)
                models[rung.name] = AnyGPT(rung.shape, rung.switches).to(device)
            runs = race(models, tokens, settings, seed, bar)
            for rung in ladder:
                scores = train.evaluate(models[rung.name], held_out[: config.eval_tokens], tokenizer)
                rung.val_loss.append(scores["val_loss"])
                rung.tokens_per_second.append(per_step / median(runs[rung.name]["seconds"]))
                rung.gradient.append(mean(runs[rung.name]["gradient"][config.warmup_steps :]))
    n_cache = 4 * config.block_size
    print_table(ladder, n_cache)

    config.out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {"difference_to_gpt": apart, "seconds": time.perf_counter() - started}
    for rung in ladder:
        key = rung.name.lower().replace(" ", "_")
        metrics[f"parameters_{key}"] = count(rung.shape, rung.switches)
        metrics[f"cache_kib_{key}"] = cache_kib(rung.shape, n_cache)
        measured = {name: getattr(rung, name) for name in MEASURED}
        if rung.below:
            measured["change"] = rung.change()
        for name, values in measured.items():
            metrics |= {f"{name}_{key}": mean(values), f"{name}_std_{key}": spread(values)}
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "ablation.png", ladder, config.alone)
    print(f"\n{metrics['seconds']:.0f} seconds; wrote ablation.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
