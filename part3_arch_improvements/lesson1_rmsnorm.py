"""Lesson 3.1: RMSNorm, LayerNorm without what it does not need.

LayerNorm takes the mean off a vector, divides by the standard deviation, then scales and shifts each channel. RMSNorm
only divides by the root mean square and scales: one statistic instead of two, one parameter a channel instead of two.
What both give to training is the same: the size of what enters a layer no longer depends on the size of the stream,
and the gradient never asks the stream to grow or shrink.

    python part3_arch_improvements/lesson1_rmsnorm.py     # 30 seconds; four tables, a figure

You should see the norm and its gradient by hand agree with model.RMSNorm, what each norm does not notice, how large the
mean is that LayerNorm removes, what both do to training in three seeds, and whether fewer operations take less time.

References: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", sections 3 and 4; Ba et al. 2016, "Layer
Normalization", section 3; Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", section 3.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
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
from data import load_tokens
from model import GPT, GPTConfig, RMSNorm, init_weights
from race import race, spread
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
COLOURS = {"LayerNorm": "C1", "RMSNorm": "C0", "RMSNorm by hand": "C2"}
C = 64  # channels, wherever no other number is said


@dataclass
class Config:
    """Compare the two norms by hand, in training and against the clock."""

    steps: int = 300
    """Training steps of each run."""
    n_seeds: int = 3
    """Runs of each model, with seeds seed, seed + 1, ..."""
    repeats: int = 50
    """How often each norm is timed."""
    seed: int = 0
    """First seed of weights and data."""
    out: Path = RUNS / "lesson1_rmsnorm"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- by hand ---


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, (..., C) -> (..., C); Zhang & Sennrich, section 4."""
    mean_square = x.square().mean(dim=-1, keepdim=True)  # (..., C) -> (..., 1): no other position is involved
    return x / (mean_square + eps).sqrt() * weight


def rms_norm_gradient(x: torch.Tensor, weight: torch.Tensor, eps: float, g: torch.Tensor) -> torch.Tensor:
    """Gradient of the loss by x, where g is that by the output; (..., C) like x and g.

    With r = sqrt(mean(x^2) + eps) and n = x / r:  dL/dx = (g w - n mean(g w n)) / r.  The part of g w that points along
    x is taken away, because a longer x gives the same output; the rest is divided by the size of x.
    """
    r = (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()  # (..., 1)
    n = x / r
    along = (g * weight * n).mean(dim=-1, keepdim=True)  # (..., 1)
    return (g * weight - n * along) / r


def compare_by_hand() -> dict[str, float]:
    """Largest differences between the norm by hand and model.RMSNorm, and LayerNorm of the same."""
    x = (torch.randn(4, 16, C) * 3 + 1).requires_grad_()  # (B, T, C)
    g, norm = torch.randn_like(x), RMSNorm(C, eps=1e-5)
    w, eps = nn.init.normal_(norm.weight), norm.eps
    # LayerNorm without its bias is RMSNorm of what is left when the mean has been taken off.
    centred = rms_norm(x - x.mean(dim=-1, keepdim=True), w, eps)
    pairs = {
        "difference_to_model": (rms_norm(x, w, eps), norm(x)),
        "difference_gradient": (rms_norm_gradient(x, w, eps, g), torch.autograd.grad(norm(x), x, g)[0]),
        "difference_centred_to_layer_norm": (centred, F.layer_norm(x, (C,), w, eps=eps)),
    }
    return {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}


def gradient_of(norm: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[float, float, float]:
    """How long dL/dx is, and its cosines with x and with the vector of ones; means over the rows of x, (N, C)."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x), x, g)
    cosines = [F.cosine_similarity(gradient, other, dim=-1).abs().mean().item() for other in (x, torch.ones_like(x))]
    return gradient.norm(dim=-1).mean().item(), *cosines


# --- in training ---


def make_model(norm: str, seed: int) -> GPT:
    """A small GPT, with its RMSNorms replaced by LayerNorms if norm says so."""
    config = GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=C)
    model = GPT(config)
    if norm == "LayerNorm":
        model.norm = nn.LayerNorm(config.n_embd)
        for block in model.blocks:
            block.norm1, block.norm2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
    torch.manual_seed(seed)
    init_weights(model, config.n_layer, config.n_embd)  # neither norm has random values: the same start for both
    return model


@torch.no_grad()
def share_of_mean(model: GPT, idx: torch.Tensor) -> float:
    """Mean^2 over mean square of what enters the norms: the share that taking the mean off would remove."""
    shares: list[float] = []

    def look(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        shares.append((inputs[0].mean(dim=-1).square() / inputs[0].square().mean(dim=-1)).mean().item())

    norms = (module for module in model.modules() if isinstance(module, RMSNorm | nn.LayerNorm))
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    model(idx)
    for hook in hooks:
        hook.remove()
    return mean(shares)


# --- against the clock ---


def time_norms(width: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median microseconds of (forward, backward) on (4, 256, width), the norms in turns."""
    x, g = torch.randn(4, 256, width, requires_grad=True), torch.randn(4, 256, width)
    weight, bias = torch.ones(width, requires_grad=True), torch.zeros(width, requires_grad=True)
    norms = {
        "LayerNorm": lambda: F.layer_norm(x, (width,), weight, bias, 1e-5),
        "RMSNorm": lambda: F.rms_norm(x, (width,), weight, 1e-5),
        "RMSNorm by hand": lambda: rms_norm(x, weight, 1e-5),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in norms}
    for _ in range(repeats + 3):
        for name, norm in norms.items():
            x.grad = weight.grad = bias.grad = None  # else a gradient is added to the last one
            start = time.perf_counter()
            y = norm()
            middle = time.perf_counter()
            y.backward(g)
            times[name].append((middle - start, time.perf_counter() - middle))
    # The first rounds also allocate memory.
    return {name: tuple(1e6 * median(t) for t in zip(*rounds[3:], strict=True)) for name, rounds in times.items()}


def draw(path: Path, curves: dict[str, list[dict]], times: dict[int, dict[str, tuple[float, float]]]) -> None:
    """Draw loss and gradient over the steps, one line a seed, and the times beside LayerNorm's."""
    fig, (loss, gradient, clock) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, runs in curves.items():
        for ax, key in ((loss, "loss"), (gradient, "gradient")):
            lines = torch.tensor([run[key] for run in runs]).unfold(1, 8, 1).mean(dim=-1)  # means of 8 steps
            for seed, line in enumerate(lines.tolist()):
                ax.plot(line, color=COLOURS[name], alpha=0.6, linewidth=1, label=name if seed == 0 else None)
    loss.set(title="training loss, mean of 8 steps", xlabel="step", ylabel="nats per token")
    gradient.set(title="gradient's length before clipping", xlabel="step", ylim=(0, None))
    rows = [(width, name) for width in times for name in times[width]]
    for row, (width, name) in enumerate(rows):
        forward, backward = (t / sum(times[width]["LayerNorm"]) for t in times[width][name])
        clock.barh(row, forward, color=COLOURS[name])
        clock.barh(row, backward, left=forward, color=COLOURS[name], alpha=0.5)
    clock.set(yticks=range(len(rows)), yticklabels=[f"{name}, C = {width}" for width, name in rows])
    clock.set(title="time of one norm (pale: backward)", xlabel="times LayerNorm of that width")
    clock.invert_yaxis()
    for ax in (loss, gradient):
        ax.legend()
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Compute the norm by hand, look at its gradient, train with both, and time them."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), steps=8, n_seeds=1, repeats=3)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)

    print("1. by hand")
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    for what, values in (("x", x), ("10 x", 10 * x), ("x + 10", x + 10)):
        rms = rms_norm(values, torch.ones(4), 0.0)
        layer = F.layer_norm(values, (4,), eps=0.0)
        rows = ["".join(f"{value:7.3f}" for value in row.tolist()) for row in (values, rms, layer)]
        print(f"   {what:7s}{rows[0]}   RMSNorm {rows[1]}   LayerNorm {rows[2]}")
    metrics = compare_by_hand()
    print("\n".join(f"   {name.replace('_', ' '):34s} {value:.1e}" for name, value in metrics.items()))
    assert max(metrics.values()) < 1e-4  # float32 and numbers up to 50

    print(f"\n2. the gradient that a norm passes back, C = {C}, means over 1,000 vectors")
    print("                             length   |cosine| with x   |cosine| with (1, ..., 1)")
    x, g = torch.randn(1000, C), torch.randn(1000, C)
    for norm in (RMSNorm(C, 1e-5), nn.LayerNorm(C)):
        for scale in (0.1, 1.0, 10.0):
            length, with_x, with_ones = gradient_of(norm, scale * x, g)
            name = type(norm).__name__
            print(f"   {name:9s}  x of size {scale:4.1f} {length:9.3f}   {with_x:15.1e}   {with_ones:25.1e}")
            metrics[f"gradient_{name.lower()}_{scale:g}"] = length

    settings = train.Config(steps=config.steps, batch_size=8, block_size=64, lr=3e-3, warmup_steps=30)
    tokenizer = ByteTokenizer()
    tokens, held_out = load_tokens("stories", 2000, tokenizer, settings.block_size)
    curves, losses, shares = ({"LayerNorm": [], "RMSNorm": []} for _ in range(3))
    with tqdm(total=len(curves) * config.n_seeds * config.steps, desc="training", disable=None) as bar:
        for seed in range(config.seed, config.seed + config.n_seeds):
            models = {name: make_model(name, seed) for name in curves}
            for name, run in race(models, tokens, settings, seed, bar).items():
                curves[name].append(run)
                losses[name].append(train.evaluate(models[name], held_out[:20_000], tokenizer)["val_loss"])
                shares[name].append(share_of_mean(models[name], held_out[: 16 * 64].view(16, 64)))
    print(f"\n3. training: 2 layers, {C} channels, {config.steps} steps of {8 * 64} tokens, seeds: {config.n_seeds}")
    print("              parameters  held-out loss      gradient's length   step     share of the mean")
    for name, runs in curves.items():
        lengths = [mean(run["gradient"]) for run in runs]
        step, share = 1000 * median([t for run in runs for t in run["seconds"]]), mean(shares[name])
        print(
            f"   {name:9s}  {models[name].num_parameters():10,}  {mean(losses[name]):.4f} +- {spread(losses[name]):.4f}"
            f"   {mean(lengths):.3f} +- {spread(lengths):.3f}    {step:5.1f} ms  {share:.4f} (1 / C = {1 / C:.4f})"
        )
        key = name.lower()
        metrics |= {f"val_loss_{key}": mean(losses[name]), f"val_loss_std_{key}": spread(losses[name])}
        metrics |= {f"length_{key}": mean(lengths), f"step_ms_{key}": step, f"share_of_mean_{key}": share}
    apart = [rms - layer for rms, layer in zip(losses["RMSNorm"], losses["LayerNorm"], strict=True)]
    print(f"   RMSNorm minus LayerNorm, seed by seed: {'  '.join(f'{value:+.4f}' for value in apart)}")

    print("\n4. one norm of (4, 256, C), median microseconds on this machine")
    print("      C                      forward  backward")
    times = {width: time_norms(width, config.repeats) for width in (128, 1024)}
    for width, found in times.items():
        for name, (forward, backward) in found.items():
            print(f"   {width:4d}   {name:16s}  {forward:8.0f}  {backward:8.0f}")
            key = f"{name.lower().replace(' ', '_')}_{width}"
            metrics |= {f"forward_us_{key}": forward, f"backward_us_{key}": backward}

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "rmsnorm.png", curves, times)
    print(f"\nwrote rmsnorm.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
