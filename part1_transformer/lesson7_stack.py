"""The block and the stack: everything of this part in one model, taken apart again.

A block is attention plus MLP on a residual stream; the transformer is a table of positions, L blocks and a final norm.
This lesson writes the whole forward pass as plain functions on named tensors, shows it equal to model.py's Transformer,
counts its parameters by a formula, measures what GPT-2's initialisation is for, and proves which inputs reach which
outputs.

    python part1_transformer/lesson7_stack.py

You see the formula give GPT-2's well-known sizes, the stream's growth over depth with and without the factor 1 /
sqrt(2L), and a map of who depends on whom. It takes 5 seconds and saves a figure.

References: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), sections 2.3 and table
2; Vaswani et al. 2017, "Attention Is All You Need", section 3.1.
"""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
import tyro
from torch import nn

from lesson5_feedforward import gelu_tanh
from lesson6_residuals import layer_norm
from model import GPTConfig, Transformer, init_weights

matplotlib.use("Agg")  # figures go to files, no window is opened
RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
GPT2 = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280), "xl": (48, 1600)}  # (L, C)


@dataclass
class Config:
    """The whole transformer by hand, counted, initialised, and shown to be causal."""

    n_embd: int = 128
    """C of the stacks whose stream is measured."""
    seed: int = 0
    """Seed of weights and inputs."""
    out: Path = RUNS / "lesson7_stack"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- the forward pass, on a page ---


def attention(x: torch.Tensor, p: dict[str, torch.Tensor], n_head: int) -> torch.Tensor:
    """Lessons 2 to 4 with the tensors `p` of one CausalSelfAttention: (B, T, C) -> (B, T, C)."""
    _, T, C = x.shape
    D = C // n_head
    q, k, v = (x @ p["qkv.weight"].T + p["qkv.bias"]).split(C, dim=-1)
    out = torch.empty_like(x)
    for h in range(n_head):
        own = slice(h * D, (h + 1) * D)  # head h lives in channels h D .. (h + 1) D - 1
        scores = q[..., own] @ k[..., own].transpose(-2, -1) / math.sqrt(D)  # (B, T, T)
        future = torch.ones(T, T).triu(diagonal=1).bool()
        out[..., own] = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v[..., own]
    return out @ p["proj.weight"].T + p["proj.bias"]


def mlp(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """Lesson 5: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""
    return gelu_tanh(x @ p["fc.weight"].T + p["fc.bias"]) @ p["proj.weight"].T + p["proj.bias"]


def under(p: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in p.items() if name.startswith(prefix)}


def transformer(x: torch.Tensor, p: dict[str, torch.Tensor], config: GPTConfig) -> torch.Tensor:
    """The Transformer of model.py as plain arithmetic on its state_dict `p`: (B, T, C) -> (B, T, C)."""
    x = x + p["wpe.weight"][: x.shape[1]]  # lesson 1
    for i in range(config.n_layer):
        block = under(p, f"blocks.{i}.")
        # Lesson 6: each branch reads a normalised copy and adds to the stream itself.
        x = x + attention(
            layer_norm(x, block["norm1.weight"], block["norm1.bias"]), under(block, "attn."), config.n_head
        )
        x = x + mlp(layer_norm(x, block["norm2.weight"], block["norm2.bias"]), under(block, "mlp."))
    return layer_norm(x, p["norm.weight"], p["norm.bias"])


# --- how many parameters ---


def parameter_count(config: GPTConfig) -> int:
    """Parameters of the Transformer by formula: about 12 C^2 a block, and one vector for each position."""
    C = config.n_embd
    attention = (C * 3 * C + 3 * C) + (C * C + C)  # qkv and proj, each with a bias: 4 C^2 + 4 C
    mlp = (C * 4 * C + 4 * C) + (4 * C * C + C)  # fc and proj: 8 C^2 + 5 C
    norms = 2 * 2 * C  # scale and shift, twice
    return config.n_layer * (attention + mlp + norms) + config.block_size * C + 2 * C


# --- what the initialisation is for ---


@torch.no_grad()
def stream_by_depth(model: Transformer, scaled: bool) -> list[float]:
    """Standard deviation of the residual stream at the start of training, after 0..L blocks.

    Args:
        model: gets fresh weights, so the same one can be asked twice.
        scaled: divide the projections onto the stream by sqrt(2L), as init_weights does; else all matrices start
            alike.
    """
    # The factor is 1/sqrt(2 n_layer), so a "depth" of 1/2 switches it off.
    init_weights(model, model.config.n_layer if scaled else 0.5, model.config.n_embd)
    x = torch.randn(8, model.config.block_size, model.config.n_embd) * model.wpe.weight.std()  # as tokens are at first
    x = x + model.wpe.weight
    stds = [x.std().item()]
    for block in model.blocks:
        x = block(x)
        stds.append(x.std().item())
    return stds


# --- who depends on whom ---


def last_token_effect(model: Transformer, x: torch.Tensor) -> torch.Tensor:
    """How much each output moves when the last input is replaced, (B, T, C) -> (T,): 0 everywhere but at the end."""
    changed = x.clone()
    changed[:, -1] = torch.randn_like(changed[:, -1])
    with torch.no_grad():
        return (model(changed) - model(x)).abs().amax(dim=(0, 2))


def dependence(model: Transformer, T: int) -> torch.Tensor:
    """Size of the derivative of output t with respect to input s, as a (T, T) map."""
    x = torch.randn(1, T, model.config.n_embd, requires_grad=True)
    out = model(x)
    rows = []
    for t in range(T):
        # A random direction, because the sum over a normalised output is constant and has no gradient at all.
        (gradient,) = torch.autograd.grad((out[0, t] * torch.randn(model.config.n_embd)).sum(), x, retain_graph=True)
        rows.append(gradient[0].norm(dim=-1))  # (1, T, C) -> (T,)
    return torch.stack(rows)


def draw(streams: dict[tuple[int, bool], list[float]], depends: torch.Tensor, path: Path) -> None:
    """Save the stream's growth, (L, scaled) -> deviations, and the map of dependence (T, T)."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=[1.4, 1], layout="constrained")
    depths = sorted({depth for depth, _ in streams})
    for (depth, scaled), stds in streams.items():
        colour = f"C{depths.index(depth)}"
        label = f"L = {depth}, {'scaled' if scaled else 'not scaled'}"
        axes[0].plot(stds, "-" if scaled else "--", color=colour, label=label)
    axes[0].set(title="standard deviation of the stream before training", xlabel="after block", ylim=0)
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    # Exact zeros have no logarithm: they stay white, everything else gets a colour.
    image = axes[1].imshow(depends.clamp_min(1e-12).log10().where(depends > 0, torch.nan), cmap="viridis")
    axes[1].set(title="log10 |d out[t] / d in[s]|, white is exactly 0", xlabel="s: input", ylabel="t: output")
    fig.colorbar(image, ax=axes[1])
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Rebuild the transformer by hand, count it, measure its start, and prove it causal."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_embd=32)
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)

    shape = GPTConfig()
    model = Transformer(shape)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # zeros and ones would hide a forgotten bias or norm
    x = torch.randn(2, 48, shape.n_embd)
    with torch.no_grad():
        metrics = {"difference_by_hand": (transformer(x, model.state_dict(), shape) - model(x)).abs().max().item()}
    print(f"1. {shape}")
    print(f"   plain arithmetic against Transformer: largest difference {metrics['difference_by_hand']:.1e}")
    assert metrics["difference_by_hand"] < 1e-4  # sums of hundreds of float32 numbers, through 4 blocks

    print("\n2. parameters: L (12 C^2 + 13 C) + block_size C + 2 C")
    real = sum(parameter.numel() for parameter in model.parameters())
    metrics |= {"parameters": real, "parameters_formula": parameter_count(shape)}
    print(f"   default model: formula {parameter_count(shape):,}, counted {real:,}")
    for name, (L, C) in GPT2.items():
        big = GPTConfig(block_size=1024, n_layer=L, n_head=C // 64, n_embd=C)
        with torch.device("meta"):  # shapes only: no memory, no random numbers
            counted = sum(parameter.numel() for parameter in Transformer(big).parameters())
        assert counted == parameter_count(big)
        tokens = 50257 * C  # GPT-2's table of tokens, which belongs to part 2
        metrics[f"parameters_gpt2_{name}"] = counted + tokens
        print(f"   GPT-2 {name:6} L = {L}, C = {C:4d}: {counted:13,} + tokens {tokens:10,} = {counted + tokens:13,}")

    print(f"\n3. standard deviation of the stream before training, C = {config.n_embd}")
    print("                                   start  half-way      end   growth")
    streams = {}
    for depth in (6, 12, 24):
        deep = Transformer(GPTConfig(n_layer=depth, n_embd=config.n_embd))
        for scaled in (False, True):
            stds = streams[depth, scaled] = stream_by_depth(deep, scaled)
            label = f"L = {depth:2d}, " + (f"branch ends / sqrt({2 * depth})" if scaled else "all matrices alike")
            metrics[f"stream_{depth}_{'scaled' if scaled else 'unscaled'}"] = stds[-1]
            print(f"   {label:30} {stds[0]:6.4f} {stds[depth // 2]:9.4f} {stds[-1]:8.4f} {stds[-1] / stds[0]:6.2f}x")

    init_weights(model, shape.n_layer, shape.n_embd)
    effect = last_token_effect(model, x)
    metrics["last_token_leak"] = effect[:-1].max().item()
    print("\n4. causality: the last of 48 inputs is replaced")
    print(f"   outputs 0..46 move by at most {metrics['last_token_leak']:g}, output 47 by {effect[-1]:.2f}")
    assert metrics["last_token_leak"] == 0

    draw(streams, dependence(model, 24), config.out / "stack.png")
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2))
    print(f"\nwritten: {config.out / 'stack.png'}, {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
