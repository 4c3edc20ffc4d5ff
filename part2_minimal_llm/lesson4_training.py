"""Lesson 2.4: one step of training, taken apart.

A step is: cut a batch, compute the loss, compute its gradient, shorten the gradient if it is too long, and let AdamW
move every parameter a little. AdamW divides each gradient by its own recent size, so every parameter moves by about
the learning rate whatever the scale of its gradient, and it shrinks matrices by a small share on top (weight decay).

    python part2_minimal_llm/lesson4_training.py     # 6 seconds; two tables of numbers, a figure

You should see AdamW and clipping in plain Python agree with torch's to the last digits, decay touch the matrix and not
the bias, the schedule of the learning rate, and where the time of a step of train.py goes: nearly all of it into
forward, backward and the optimizer.

References: Kingma & Ba 2015, "Adam", algorithm 1; Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
algorithm 2; Pascanu et al. 2013, "On the Difficulty of Training Recurrent Neural Networks", section 3.2 (clipping);
Loshchilov & Hutter 2017, "SGDR", section 3 (the cosine).
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import matplotlib
import matplotlib.pyplot as plt
import torch
import tyro
from torch import nn
from torch.nn.utils import clip_grad_norm_

import train
from data import get_batch, load_tokens
from model import GPT, GPTConfig
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Do by hand what an optimizer does, and time a step."""

    steps: int = 5
    """Steps of AdamW to compare."""
    timed_steps: int = 30
    """Steps of train.py to time."""
    seed: int = 0
    """Seed of weights and data."""
    out: Path = RUNS / "lesson4_training"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- by hand ---


def clip_by_hand(gradient: list[float], longest: float) -> tuple[list[float], float]:
    """Scale a gradient down to a length, if it is longer: (gradient, its length before). Its direction stays."""
    length = math.sqrt(sum(g * g for g in gradient))
    factor = min(1.0, longest / (length + 1e-6))  # torch adds the 1e-6 so that nothing is divided by zero
    return [factor * g for g in gradient], length


class AdamWByHand:
    """AdamW for a list of numbers; Loshchilov & Hutter 2019, algorithm 2, in its symbols.

    Args:
        n: how many numbers.
        decay: lambda, share of the learning rate by which they shrink in a step.
    """

    def __init__(self, n: int, decay: float) -> None:
        self.m = [0.0] * n  # running mean of the gradient: which way
        self.v = [0.0] * n  # running mean of its square: how large it usually is
        self.t = 0
        self.decay = decay

    def step(self, theta: list[float], gradient: list[float], lr: float) -> list[float]:
        """Return the parameters after one step."""
        beta1, beta2, eps = 0.9, 0.99, 1e-8
        self.t += 1
        moved = []
        for i, (value, g) in enumerate(zip(theta, gradient, strict=True)):
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g * g
            # Both means began at zero, so early ones are too small; dividing by their total weight mends that.
            m_hat = self.m[i] / (1 - beta1**self.t)
            v_hat = self.v[i] / (1 - beta2**self.t)
            # Decoupled: the decay stands beside the gradient's step, and is not divided by sqrt(v) with it.
            moved.append(value - lr * self.decay * value - lr * m_hat / (math.sqrt(v_hat) + eps))
        return moved


def compare(config: Config) -> tuple[float, float]:
    """Train a linear layer by train.make_optimizer and by hand: largest difference of (parameters, clipped lengths)."""
    torch.manual_seed(config.seed)
    settings = train.Config(lr=0.1, weight_decay=0.1, clip=1.0)
    layer = nn.Linear(3, 2).double()  # a matrix (2, 3) and a vector (2,); in double precision rounding is 1e-16
    optimizer = train.make_optimizer(layer, settings)
    # By hand the parameters are plain lists: six numbers that decay, two that do not.
    weight, bias = layer.weight.flatten().tolist(), layer.bias.tolist()
    by_hand = AdamWByHand(6, settings.weight_decay), AdamWByHand(2, 0.0)
    print("step  gradient's length  clipped   weight[0, 0]  by hand       bias[0]       by hand")
    apart, apart_clip = 0.0, 0.0
    for step in range(config.steps):
        loss = (layer(3 * torch.randn(16, 3).double()) - 1).square().mean()
        loss.backward()
        gradient = layer.weight.grad.flatten().tolist() + layer.bias.grad.tolist()
        clipped, length = clip_by_hand(gradient, settings.clip)
        apart_clip = max(apart_clip, abs(length - clip_grad_norm_(layer.parameters(), settings.clip).item()))
        weight = by_hand[0].step(weight, clipped[:6], settings.lr)
        bias = by_hand[1].step(bias, clipped[6:], settings.lr)
        optimizer.step()
        optimizer.zero_grad()
        theirs = layer.weight.flatten().tolist() + layer.bias.tolist()
        apart = max(apart, *(abs(a - b) for a, b in zip(theirs, weight + bias, strict=True)))
        print(
            f"{step:4d}  {length:17.4f}  {math.hypot(*clipped):7.4f}  {theirs[0]:13.9f}  {weight[0]:12.9f}"
            f"  {theirs[6]:12.9f}  {bias[0]:12.9f}"
        )
    return apart, apart_clip


def decay_alone() -> tuple[float, float]:
    """Ten steps without any gradient: what share of a matrix and of a bias is left."""
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    optimizer = train.make_optimizer(layer, train.Config(lr=0.1, weight_decay=0.1))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(10):
        optimizer.step()
    return layer.weight.mean().item(), layer.bias.mean().item()


# --- where the time goes ---


def time_steps(config: Config, settings: train.Config) -> dict[str, list[float]]:
    """Time the stages of train.py's loop on a CPU, where no call returns before its work is done.

    Returns:
        Stage -> seconds, one number for each timed step.
    """
    tokenizer = ByteTokenizer()
    tokens, _ = load_tokens("stories", 500, tokenizer, settings.block_size)
    torch.manual_seed(config.seed)
    shape = {name: getattr(settings, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    optimizer = train.make_optimizer(model, settings)
    generator = torch.Generator().manual_seed(config.seed)
    times = {stage: [] for stage in ("learning rate", "batch", "forward", "backward", "clip", "optimizer", "the rest")}
    for step in range(config.timed_steps + 3):
        clock = [time.perf_counter()]
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, settings)
        clock.append(time.perf_counter())
        x, y = get_batch(tokens, settings.batch_size, settings.block_size, generator)
        clock.append(time.perf_counter())
        loss = train.batch_loss(model, x, y, settings)
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        clip_grad_norm_(model.parameters(), settings.clip)
        clock.append(time.perf_counter())
        optimizer.step()
        clock.append(time.perf_counter())
        optimizer.zero_grad()
        loss.item()
        clock.append(time.perf_counter())
        if step >= 3:  # the first steps also allocate memory
            for stage, begin, end in zip(times, clock, clock[1:], strict=False):
                times[stage].append(end - begin)
    return times


def draw(path: Path, settings: train.Config, times: dict[str, float]) -> None:
    """Draw the learning rate, what clipping does to a gradient's length, and the time of a step's stages."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6))
    left.plot([train.learning_rate(step, settings) for step in range(settings.steps)], color="tab:blue")
    left.axvline(settings.warmup_steps, color="gray", linestyle=":", label=f"warm-up: {settings.warmup_steps} steps")
    left.axhline(settings.lr / 10, color="tab:red", linestyle=":", label="a tenth of lr")
    left.set(xlabel="step", ylabel="learning rate", title="Warm-up, then half a cosine", ylim=(0, None))
    left.legend(loc="upper right")
    lengths = [i / 20 for i in range(81)]
    middle.plot(lengths, [math.hypot(*clip_by_hand([length], settings.clip)[0]) for length in lengths])
    middle.plot(lengths, lengths, color="gray", linestyle=":", label="unclipped")
    middle.set(xlabel="gradient's length", ylabel="length after clipping", title=f"Clipping at {settings.clip}")
    middle.legend()
    colors = ["tab:blue" if stage in ("forward", "backward", "optimizer") else "tab:red" for stage in times]
    bars = right.barh(list(times), [1000 * seconds for seconds in times.values()], color=colors)
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.invert_yaxis()
    right.margins(x=0.25)
    right.set(xlabel="milliseconds", title="One step (red: overhead)")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Compare by hand with torch, then measure a step."""
    settings = train.Config()
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), timed_steps=5)
        settings = replace(settings, n_layer=2, n_embd=32, block_size=64)
    torch.set_flush_denormal(True)

    apart, apart_clip = compare(config)
    print(f"largest difference to torch: AdamW {apart:.1e}, gradient's length {apart_clip:.1e}")
    weight_left, bias_left = decay_alone()
    print("\nten steps with a gradient of zero, lr 0.1, decay 0.1: each takes 1% off a matrix, nothing off a bias")
    print(f"  matrix {weight_left:.4f} (0.99^10 = {0.99**10:.4f}), bias {bias_left:.4f}")

    print(f"\nlearning rate of train.py, {settings.steps} steps")
    for step in (0, settings.warmup_steps // 2, settings.warmup_steps - 1, settings.steps // 2, settings.steps - 1):
        print(f"  step {step:5d}: {train.learning_rate(step, settings):.6f}")

    per_step = time_steps(config, settings)
    times = {stage: median(seconds) for stage, seconds in per_step.items()}
    whole = [sum(seconds) for seconds in zip(*per_step.values(), strict=True)]
    compute = [sum(stages) for stages in zip(*(per_step[s] for s in ("forward", "backward", "optimizer")), strict=True)]
    overhead = median(1 - inside / total for inside, total in zip(compute, whole, strict=True))
    print(f"\nwhere a step of {settings.batch_size} x {settings.block_size} tokens goes, median of {len(whole)}")
    for stage, seconds in times.items():
        print(f"  {stage:14s} {1000 * seconds:8.2f} ms  {seconds / median(whole):6.1%}")
    print(f"  outside forward, backward and optimizer: {overhead:.1%} of a step")

    config.out.mkdir(parents=True, exist_ok=True)
    metrics = {"adamw_difference": apart, "clip_difference": apart_clip, "overhead_fraction": overhead}
    metrics |= {f"ms_{stage.replace(' ', '_')}": 1000 * seconds for stage, seconds in times.items()}
    metrics["tokens_per_second"] = settings.batch_size * settings.block_size / median(whole)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "training.png", settings, times)
    print(f"\nwrote training.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
