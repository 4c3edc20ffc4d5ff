"""Pretraining: teach a transformer to predict the next byte, and watch it learn to write.

Take a batch of windows, ask for the next token at every position, measure the surprise (cross-entropy), follow its
gradient a little way down, and repeat. Every later stage of this repository is this loop with another loss.

    python part3_arch_improvements/train.py                          # stories; about 2.5 minutes on two CPU cores
    python part3_arch_improvements/train.py --data pydoc             # the reference of the Python language
    python part3_arch_improvements/train.py --data my_book.txt       # any text

You should see the loss start near ln 257 = 5.55 and fall below 0.25 nats per byte, and samples that go from noise to
words to whole sentences. It leaves best.pt, latest.pt, learning_curve.png and metrics.json in
runs/part3_arch_improvements/.

References: Radford et al. 2019 (GPT-2), section 2; Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
algorithm 2 (AdamW); Pascanu et al. 2013, "On the Difficulty of Training Recurrent Neural Networks", section 3.2
(clipping).
"""

import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import torch
import tyro
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import UserError, get_batch, load_tokens
from generate import RUNS, generate, pick_device, printable
from model import GPT, GPTConfig
from tokenizer import ByteTokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there


@dataclass
class Config:
    """Train a language model from nothing."""

    data: str = "stories"
    """stories, pydoc, or the path of a text file."""
    n_stories: int = 10_000
    """Documents to generate for --data stories; a twentieth as many are held out."""
    out: Path = RUNS
    """Folder for the checkpoints, the learning curve and metrics.json."""
    steps: int = 6000
    """Optimizer steps."""
    batch_size: int = 2
    """B, windows in a batch."""
    block_size: int = 256
    """T, tokens in a sequence, and the longest one that the model can take if it has no window."""
    n_layer: int = 2
    """Blocks in the stack."""
    n_head: int = 4
    """H, attention heads."""
    n_embd: int = 128
    """C, channels."""
    n_kv_head: int = 0
    """Key/value heads, a divisor of n_head. 0: as many as n_head."""
    window: int = 128
    """How many tokens a token sees, itself included. 0: all before it."""
    n_sink: int = 0
    """First tokens that stay visible although they are outside the window."""
    dropout: float = 0.0
    """Share of activations set to zero; worth raising when a small text is seen many times."""
    lr: float = 2e-3
    """Highest learning rate."""
    warmup_steps: int = 200
    """Steps in which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Share of lr by which matrices shrink in a step. Biases and norms do not."""
    clip: float = 1.0
    """Longest gradient: a longer one is scaled down to this norm."""
    eval_every: int = 500
    """Steps between two evaluations."""
    eval_tokens: int = 20_000
    """Held-out tokens to evaluate on at most."""
    seed: int = 0
    """Seed of the initial weights, the batches and the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of them that is there."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products; weights stay in float32."""
    compile: bool = False
    """Compile the model: a minute at the start for faster steps, worth it on a GPU."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- evaluation ---


@torch.no_grad()
def evaluate(model: GPT, tokens: torch.Tensor, tokenizer: ByteTokenizer, batch_size: int = 32) -> dict[str, float]:
    """Measure how well the model predicts a row of tokens that it was not trained on.

    The row is cut into windows of block_size that do not overlap, so every token but the first is predicted once; the
    rest that fills no window is left out.

    Args:
        model: its device is used.
        tokens: (N,) ids, N > block_size.
        tokenizer: says how many bytes each token stands for.
        batch_size: windows at a time.

    Returns:
        val_loss in nats per token, perplexity = exp(val_loss), and bits_per_byte, which compares across tokenizers.
    """
    model.eval()
    device = model.wte.weight.device
    T = model.config.block_size
    n_targets = (len(tokens) - 1) // T * T
    inputs = tokens[:n_targets].view(-1, T)  # (W, T), W windows
    targets = tokens[1 : n_targets + 1].view(-1, T)
    nats = 0.0
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        _, loss = model(x.to(device), y.to(device))
        nats += loss.item() * y.numel()  # the last batch may be smaller: sum now, divide once
    model.train()
    n_bytes = torch.tensor(tokenizer.byte_lengths())[targets].sum().item()
    return {
        "val_loss": nats / n_targets,
        "perplexity": math.exp(min(nats / n_targets, 700.0)),  # exp(710) is more than a float holds
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }


# --- one step ---


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings and leaves vectors (biases, norms) alone.

    Decay keeps matrices from growing without need. A bias or a norm's scale has nothing to gain from being near zero.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Rise linearly for warmup_steps, then fall along half a cosine to a tenth of lr at the last step."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = step / config.steps  # in [0, 1)
    return config.lr * warmup * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_loss(model: GPT, x: torch.Tensor, y: torch.Tensor, config: Config) -> torch.Tensor:
    """Mean cross-entropy of one batch, in nats per token.

    Args:
        model: the language model.
        x, y: (B, T) tokens and the tokens that follow them.
        config: its dtype is the precision of the matrix products.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        _, loss = model(x, y)
    return loss


# --- what a run leaves behind ---


def save_checkpoint(path: Path, model: GPT, config: Config, step: int, val_loss: float) -> None:
    """Write a checkpoint so that the path always holds a whole one: first beside it, then renamed over it."""
    checkpoint = {
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "step": step,
        "val_loss": val_loss,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(checkpoint, temporary)
    temporary.replace(path)  # a rename happens wholly or not at all, so an interruption leaves the old file


def write_sample(model: GPT, tokenizer: ByteTokenizer, seed: int, length: int) -> str:
    """Let the model write one document from its beginning, `length` tokens at most, and no more than fit."""
    device = model.wte.weight.device
    if not model.config.window:
        length = min(length, model.config.block_size - 1)  # the token that it begins after stands there too
    idx = torch.tensor([[tokenizer.eot]], device=device)  # (1, 1)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = generate(model, idx, length, temperature=0.3, eot=tokenizer.eot, generator=generator)
    text = printable(tokenizer.decode([token.item() for token in tokens]))
    model.train()
    return text


def plot_learning_curve(path: Path, train_losses: list[float], val_losses: list[tuple[int, float]]) -> None:
    """Draw the loss of every batch and the held-out loss over the steps."""
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.plot(train_losses, color="tab:blue", alpha=0.4, linewidth=0.8, label="training batch")
    ax.plot(*zip(*val_losses, strict=True), color="tab:red", marker="o", markersize=4, label="held out")
    ax.axhline(math.log(ByteTokenizer.vocab_size), color="gray", linestyle=":", label="ln V: knows nothing")
    ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None), title="Learning curve")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


# --- the loop ---


def check_settings(config: Config) -> None:
    """Refuse settings with which no training is possible.

    Raises:
        UserError: it names the flag, its value and what to give instead.
    """
    for name in ("n_stories", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "eval_every"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is below 1; give at least 1")
    for name in ("steps", "warmup_steps", "n_kv_head", "window", "n_sink"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)} is below 0; give 0 or more")
    if config.n_embd % config.n_head != 0:
        raise UserError(f"--n_embd {config.n_embd} is not a multiple of --n_head {config.n_head}; give one that is")
    if config.n_embd // config.n_head % 2 != 0:
        raise UserError(
            f"--n_embd {config.n_embd} over --n_head {config.n_head} makes heads of {config.n_embd // config.n_head} "
            "channels; rotary positions turn pairs, so give numbers whose quotient is even"
        )
    if config.n_kv_head and config.n_head % config.n_kv_head != 0:
        raise UserError(f"--n_kv_head {config.n_kv_head} is no divisor of --n_head {config.n_head}; give one that is")
    if config.n_sink and not config.window:
        raise UserError(f"--n_sink {config.n_sink} without a window keeps what is seen anyway; give a --window, or 0")
    if config.eval_tokens <= config.block_size:
        raise UserError(f"--eval_tokens {config.eval_tokens} fills no window; give more than {config.block_size}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"--dropout {config.dropout} is outside [0, 1); 0 drops nothing")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; give a folder")


def train(config: Config) -> dict[str, float]:
    """Train a model and leave checkpoints, a learning curve and metrics in config.out.

    Returns:
        The metrics that are also written to metrics.json.

    Raises:
        UserError: a setting with which no training is possible, or a loss that is no number any more.
    """
    check_settings(config)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)  # on CPUs, numbers near zero are otherwise slow
    device = pick_device(config.device)
    config.out.mkdir(parents=True, exist_ok=True)

    tokenizer = ByteTokenizer()
    train_tokens, val_tokens = load_tokens(config.data, config.n_stories, tokenizer, config.block_size)
    val_tokens = val_tokens[: config.eval_tokens]
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "n_kv_head", "window", "n_sink")
    shape = {name: getattr(config, name) for name in names}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape)).to(device)
    run_model = torch.compile(model) if config.compile else model  # the same weights, other code
    optimizer = make_optimizer(model, config)
    generator = torch.Generator().manual_seed(config.seed)  # draws the batches; the model's own draws do not disturb it
    tokens_per_step = config.batch_size * config.block_size
    print(f"{model.num_parameters():,} parameters on {device}, {config.dtype}")
    print(f"{len(train_tokens):,} training tokens, {len(val_tokens):,} held out")
    print(f"{config.steps} steps of {tokens_per_step:,} tokens: {config.steps * tokens_per_step:,} in all")

    started = time.perf_counter()
    train_seconds = 0.0
    train_losses: list[float] = []
    val_losses: list[tuple[int, float]] = []
    best = {"val_loss": math.inf}
    bar = tqdm(range(config.steps + 1), desc="training", disable=None, dynamic_ncols=True)
    for step in bar:
        if step % config.eval_every == 0 or step == config.steps:
            scores = evaluate(model, val_tokens, tokenizer)
            if not math.isfinite(scores["val_loss"]):
                raise UserError(f"the loss is {scores['val_loss']} at step {step}: try an --lr below {config.lr}")
            val_losses.append((step, scores["val_loss"]))
            tqdm.write(
                f"step {step:5d}: held-out loss {scores['val_loss']:.4f} nats per token, "
                f"perplexity {scores['perplexity']:.2f}, {scores['bits_per_byte']:.3f} bits per byte"
            )
            tqdm.write("    " + write_sample(model, tokenizer, config.seed, 300).replace("\n", "\n    "))
            save_checkpoint(config.out / "latest.pt", model, config, step, scores["val_loss"])
            if scores["val_loss"] < best["val_loss"]:
                best = scores
                save_checkpoint(config.out / "best.pt", model, config, step, scores["val_loss"])
        if step == config.steps:
            break
        step_started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        x, y = get_batch(train_tokens, config.batch_size, config.block_size, generator)
        loss = batch_loss(run_model, x.to(device), y.to(device), config)
        loss.backward()
        clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        train_losses.append(loss.item())  # also waits for the device, so that the time below is true
        train_seconds += time.perf_counter() - step_started
        bar.set_postfix(loss=f"{train_losses[-1]:.3f}", refresh=False)

    metrics = {
        **best,
        "val_loss_last": val_losses[-1][1],
        "tokens_per_second": config.steps * tokens_per_step / max(train_seconds, 1e-9),
        "seconds": time.perf_counter() - started,
        "parameters": model.num_parameters(),
    }
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_learning_curve(config.out / "learning_curve.png", train_losses, val_losses)
    return metrics


def main(config: Config) -> None:
    """Train, and say what came out and where it lies."""
    if config.smoke:
        out = Path(tempfile.mkdtemp()) if config.out == RUNS else config.out
        config = replace(config, out=out, n_stories=60, steps=20, batch_size=4, block_size=64, n_layer=2, n_embd=32)
        config = replace(config, eval_every=10, eval_tokens=2000, warmup_steps=5)
    metrics = train(config)
    print(
        f"best held-out loss {metrics['val_loss']:.4f} nats per token, {metrics['bits_per_byte']:.3f} bits per byte; "
        f"{metrics['seconds']:.0f} seconds, {metrics['tokens_per_second']:,.0f} tokens a second"
    )
    print(f"wrote best.pt, latest.pt, learning_curve.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the checkpoints that were saved before are whole", file=sys.stderr)
        sys.exit(130)
