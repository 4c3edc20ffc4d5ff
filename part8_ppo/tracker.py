"""Logging: numbers, histograms and texts of a run, to look at while it trains and to compare with other runs.

TensorBoard writes files that a local page shows; Weights & Biases (wandb) sends them to its service, or, offline and
without an account, keeps them in a folder that can be sent later. Both get the same under the same names.

    python part5_moe/train.py --log tensorboard     # then: tensorboard --logdir runs/part5_moe
    python part5_moe/train.py --log wandb           # offline: WANDB_MODE=offline
    python part4_scaling/lesson5_logging.py             # what is logged, and how to read it

References: Chowdhery et al. 2022, "PaLM", section 4.1 and appendix B (model FLOPs utilisation).
"""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

from data import UserError
from model import GPT

matplotlib.use("Agg")  # figures go to files; a screen may not be there


class Tracker:
    """Where a run's numbers go: nowhere, TensorBoard, wandb, or both. Only the main process should write.

    Args:
        log: none, tensorboard, wandb or both.
        folder: TensorBoard's files and wandb's offline runs go here.
        config: the run's settings, shown beside its curves.
        run_id: wandb's name of the run, so that a resumed run goes on in the same curves; "" for a new one.
        first_step: where the run begins or goes on. TensorBoard drops what an earlier run logged from there on.

    Raises:
        UserError: wandb has neither an account here nor been told to stay offline.
    """

    def __init__(self, log: str, folder: Path, config: dict[str, Any], run_id: str = "", first_step: int = 0) -> None:
        board = log in ("tensorboard", "both")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step, flush_secs=20) if board else None
        self.run = start_wandb(folder, config, run_id) if log in ("wandb", "both") else None
        self.run_id = self.run.id if self.run else ""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Log some numbers of one step, each under its own name."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.run:
            self.run.log(values, step=step)

    def histograms(self, step: int, model: nn.Module, scale: float = 1.0) -> None:
        """Log how the entries of each weight, and of its gradient if there is one, are distributed.

        What is sharded over processes is not put together: only one process is here. Its share is shown. Gradients are
        divided by `scale`, which a loss scaler has multiplied them by.
        """
        if not (self.board or self.run):
            return
        for name, parameter in model.named_parameters():
            for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
                if values is None:
                    continue
                mine = values.to_local() if isinstance(values, DTensor) else values
                flat = mine.detach().float().flatten().cpu() / (scale if kind == "gradients" else 1.0)
                if not len(flat) or not torch.isfinite(flat).all():
                    continue
                if self.board:
                    self.board.add_histogram(f"{kind}/{name}", flat, step)
                if self.run:
                    import wandb

                    self.run.log({f"{kind}/{name}": wandb.Histogram(flat.numpy())}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Log a sample."""
        if self.board:
            self.board.add_text(name, text.replace("\n", "  \n"), step)  # Markdown: two spaces end a line
        if self.run:
            import wandb

            self.run.log({name: wandb.Html(f"<pre>{text.replace('&', '&amp;').replace('<', '&lt;')}</pre>")}, step=step)

    def close(self) -> None:
        """Write what is still waiting."""
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()


def start_wandb(folder: Path, config: dict[str, Any], run_id: str) -> Any:
    """Begin a run, or go on with one.

    Raises:
        UserError: no account, and not told to stay offline.
    """
    import wandb  # takes a second to import, so only those who use it wait for it

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project="llm-from-scratch",
            dir=str(folder),
            config=config,
            id=run_id or None,
            resume="allow" if run_id else None,
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        raise UserError(
            f"--log wandb: {str(error).splitlines()[0][:120]}; set WANDB_MODE=offline, or log in with `wandb login`"
        ) from error


def model_flops(n_parameters: int, n_embedding: int, n_layer: int, attended: int, width: int) -> float:
    """FLOPs that one token costs in training, by the usual count: 6 a parameter, and 12 a channel that is attended to.

    Two for every multiplication with a weight, forward; twice that backward. Attention multiplies without weights:
    scores and their sums over the values, 2 * 2 * attended * width forward in each layer. What is computed again
    (activation checkpointing) does not count: it is the model's need, not the machine's effort (PaLM, appendix B).

    Args:
        n_parameters: all trainable numbers.
        n_embedding: those that are looked up and multiply nothing; with tied weights they multiply as output: 0.
        n_layer: blocks.
        attended: tokens that a token looks at: the context, or the window. Causality is not subtracted, by convention.
        width: n_head * head_dim.
    """
    return 6 * (n_parameters - n_embedding) + 12 * n_layer * attended * width


def describe_run(metrics: dict[str, float]) -> str:
    """Say in one line what a run came to, from the metrics that it leaves."""
    return (
        f"best held-out loss {metrics['val_loss']:.4f} nats per token, {metrics['bits_per_byte']:.3f} bits per byte; "
        f"{metrics['seconds']:.0f} seconds, {metrics['tokens_per_second']:,.0f} tokens a second, "
        f"{metrics['flops_utilisation']:.0%} of the device's peak"
    )


def plot_learning_curve(path: Path, progress: dict[str, Any], vocab_size: int) -> None:
    """Draw the loss of every batch and the held-out loss over the steps.

    Args:
        path: of the PNG.
        progress: its train_losses, one a step, and val_losses, pairs (step, loss).
        vocab_size: V; whoever knows nothing has a loss of ln V.
    """
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.plot(progress["train_losses"], color="tab:blue", alpha=0.4, linewidth=0.8, label="training batch")
    ax.plot(*zip(*progress["val_losses"], strict=True), color="tab:red", marker="o", markersize=4, label="held out")
    ax.axhline(math.log(vocab_size), color="gray", linestyle=":", label="ln V: knows nothing")
    ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None), title="Learning curve")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


# --- what a run tells about its experts ---


def describe_load(model: GPT, progress: dict[str, Any]) -> dict[str, float]:
    """Numbers for the log of what was counted since the last call, which begins the count anew.

    Returns:
        load_cv: standard deviation of the experts' loads over their mean, averaged over layers; 0 is even, and
        sqrt(E / K - 1) means that K experts get everything. router_entropy in nats, ln E for a router that knows
        nothing. dropped: share of the choices. balance_loss and z_loss. And each expert's share of each layer's load.
        All are empty before the first step, or without experts.
    """
    counts, progress["load"] = progress["load"], None
    if counts is None:
        return {}
    load, dropped = counts[:, :-1].double(), counts[:, -1]
    shares = load / load.sum(dim=1, keepdim=True)  # (L, E)
    layers = model.moe_layers()
    numbers = {
        "load_cv": (load.std(dim=1, correction=0) / load.mean(dim=1)).mean().item(),
        "dropped": (dropped.sum() / load.sum()).item(),
    }
    for name in ("entropy", "balance_loss", "z_loss"):  # of the last pass; a run that has just been resumed has none
        if hasattr(layers[0], name):
            numbers[f"router_{name}"] = sum(getattr(moe, name).item() for moe in layers) / len(layers)
    for layer, row in enumerate(shares.tolist()):
        numbers |= {f"load/layer_{layer}/expert_{e}": share for e, share in enumerate(row)}
    return numbers


def write_results(out: Path, metrics: dict[str, float], progress: dict[str, Any], vocab_size: int) -> None:
    """Leave metrics.json, learning_curve.png and, with experts, load.png in a folder."""
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_learning_curve(out / "learning_curve.png", progress, vocab_size)
    plot_load(out / "load.png", progress["loads"])


def plot_load(path: Path, loads: list[tuple[int, list[list[float]]]]) -> None:
    """Draw each expert's share of the load over the steps, one panel a layer; nothing without experts.

    Args:
        path: of the PNG.
        loads: pairs (step, shares (L, E)), as balance_experts leaves them in progress.
    """
    if not loads:
        return
    steps, shares = [step for step, _ in loads], torch.tensor([share for _, share in loads])  # (S, L, E)
    n_layer, n_expert = shares.shape[1:]
    fig, axes = plt.subplots(1, n_layer, figsize=(4 * n_layer, 3.5), squeeze=False, sharey=True, layout="constrained")
    for layer, ax in enumerate(axes[0]):
        ax.stackplot(steps, shares[:, layer].T, colors=plt.cm.tab20.colors)
        for e in range(1, n_expert):
            ax.axhline(e / n_expert, color="black", linewidth=0.4, linestyle=":")
        ax.set(title=f"mixture {layer + 1}", xlabel="step", ylim=(0, 1))
    axes[0, 0].set_ylabel("share of the load, expert by expert")
    fig.savefig(path, dpi=120)
    plt.close(fig)
