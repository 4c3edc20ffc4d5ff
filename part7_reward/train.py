"""The reward model: from pairs of which one answer was preferred to a number for every answer.

It is fine-tuning of an encoder (see reward.py), with two changes. A head with one output stands where the scores of
1,024 tokens stood, and the loss compares: the preferred answer is to get the higher number. How high is left open.

    python part7_reward/train.py                            # sampled pairs: 2 minutes on two CPU cores, sampling too
    python part7_reward/train.py --causal --data runs/part7_reward/pairs --out runs/part7_reward/causal
    python part7_reward/train.py --loss margin --margin 1 --data runs/part7_reward/pairs --out runs/part7_reward/margin
    python part7_reward/train.py --data hf:ultrafeedback
    torchrun --nproc_per_node=2 -- part7_reward/train.py

You should see the held-out loss fall below ln 2 = 0.693, which guessing costs, and the accuracy on held-out pairs rise
towards its ceiling: the judge errs on purpose, so nobody can agree with him always. It leaves pairs, checkpoints,
learning_curve.png, metrics.json and the logs in runs/part7_reward/.

References: Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4; Ouyang et al. 2022,
"Training language models to follow instructions", section 3.5 (all pairs of a prompt together).
"""

import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from checkpoint import StopRequest, collect, keep_copy, open_checkpoint, refuse_differences, restore, write_checkpoint
from data import Pair, UserError, chat_tokens, get_batch
from devices import Processes, autocast, from_main, main_first, make_scaler, peak_flops, pick_dtype, processes, spread
from generate import BASE, RUNS, find_checkpoint, load_checkpoint
from losses import bradley_terry_loss, margin_ranking_loss
from moe import balance_experts
from optim import accumulate_gradients, count_skipped, learning_rate_factor, make_optimizers, set_learning_rate, update
from pairs import answers_of, count_tokens, make_pairs, order_pairs, pair_rewards, read_folder, to_batch, write_curves
from preferences import SHARPNESS, TEMPERATURES, ceiling
from reward import RewardModel
from tokenizer import describe_tokenizer
from tracker import Tracker, describe_load, model_flops


@dataclass
class Config:
    """Teach a language model to judge, or go on with one."""

    base: Path = BASE
    """Checkpoint of the fine-tuned model: it writes the answers, and becomes the judge. Trained first if not there."""
    data: str = "stories"
    """stories (sampled here), the folder of an earlier run's pairs, a .jsonl file, or hf:<name>[:split]."""
    n_prompts: int = 320
    """Prompts to sample answers to; of read data, pairs to train on, at most."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """At which answers are sampled; all pairs of a prompt's answers are compared."""
    per_temperature: int = 2
    """Answers to a prompt at each of them."""
    sharpness: float = SHARPNESS
    """How surely the judge prefers the better answer: sigmoid(sharpness * difference of the rule scores)."""
    out: Path = RUNS
    """Folder for pairs, checkpoints, logs, the learning curve and metrics.json."""
    causal: bool = False
    """Keep the causal mask and read the last token, instead of seeing both ways and reading the mean."""
    surprise: bool = True
    """Tell the model how surprised the base is by each token of an answer, see RewardModel."""
    loss: Literal["bradley_terry", "margin"] = "bradley_terry"
    """What is made small: -log of the probability of the preference, or what is lacking to a margin."""
    margin: float = 0.0
    """By how much the chosen answer is to get more, at least."""
    score_margin: float = 0.0
    """That much more for each point by which the judge's score of the chosen answer is higher."""
    center: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps rewards around zero; 0.01 is usual. Not with the loss margin."""
    steps: int = 213
    """Optimizer steps."""
    batch_size: int = 84
    """B, pairs that a process takes through the model at a time."""
    accumulate: int = 1
    """Such batches whose gradients are added up for one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    lr: float = 4e-4
    """Highest learning rate of AdamW."""
    muon_lr: float = 0.02
    """Highest learning rate of Muon."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 20
    """Steps in which the learning rate rises from zero."""
    final_lr: float = 0.1
    """Share of the highest learning rate at the end."""
    betas: tuple[float, float] = (0.9, 0.99)
    """How much AdamW keeps of its two running means at each step."""
    weight_decay: float = 0.1
    """Share of lr by which matrices shrink in a step. Biases and norms do not."""
    clip: float = 1.0
    """Longest gradient: a longer one is scaled down to this norm."""
    eval_every: int = 71
    """Steps between two evaluations."""
    eval_prompts: int = 128
    """Held-out prompts, with one answer at each temperature; of read data, held-out pairs to evaluate on, at most."""
    save_every: int = 71
    """Steps between two checkpoints latest.pt."""
    keep: int = 0
    """How many of the last checkpoints to keep as step_*.pt too, beside latest.pt and best.pt."""
    resume: str = ""
    """auto: go on from latest.pt in --out, if it is there; or the path of a checkpoint."""
    log: Literal["none", "tensorboard", "wandb", "both"] = "tensorboard"
    """Where to log."""
    histogram_every: int = 0
    """Steps between two histograms of weights and gradients. 0: none."""
    seed: int = 0
    """Seed of the answers, the judge, the head's initial weights and the batches."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of them that is there."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; weights stay in float32. auto: bfloat16 or float16 on CUDA, else float32."""
    compile: bool = False
    """Compile the model: a minute at the start for faster steps."""
    shard: bool = False
    """With several processes: share out parameters and optimizer states (FSDP2) instead of copying them (DDP)."""
    bias_rate: float = 1e-3
    """With experts: how far the bias that balances their load moves in a step. 0: not at all."""
    balance_weight: float = 0.0
    """With experts: weight of the load-balancing loss."""
    z_weight: float = 1e-3
    """With experts: weight of the router z-loss."""
    recompute: bool = False
    """Keep only each block's input and compute the block again backward: less memory, a third more arithmetic."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- evaluation ---


def evaluate(model: RewardModel, pairs: list[Pair], batch_size: int = 64) -> dict[str, float]:
    """Measure how well the model agrees with the judge on pairs that it was not trained on.

    Args:
        model: its device is used.
        pairs: at least one.
        batch_size: answers at a time.

    Returns:
        val_loss: mean of -log sigmoid(chosen - rejected) in nats per pair; pair_accuracy: how often the chosen answer
        gets more, equal counts half; reward_margin: mean of chosen - rejected; reward_mean, reward_std of all answers.
    """
    found = pair_rewards(model, pairs, batch_size)  # (2, N)
    difference = found[0] - found[1]
    return {
        "val_loss": np.logaddexp(0, -difference).mean().item(),  # -log sigmoid(x) = log(1 + exp(-x))
        "pair_accuracy": (1 + np.sign(difference)).mean().item() / 2,
        "reward_margin": difference.mean().item(),
        "reward_mean": found.mean().item(),
        "reward_std": found.std().item(),
    }


# --- the loss ---


def batch_loss(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    dtype: torch.dtype,
    routers: Callable[[], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = bradley_terry_loss,
) -> torch.Tensor:
    """Mean loss of one batch of pairs; its gradient is that of the routers' losses as well.

    Args:
        model: the reward model.
        x, y: (B, 2, 2, T) answers and (B,) margins, see to_batch.
        dtype: the precision of the matrix products.
        routers: gives their losses in the pass before.
        loss: of (B,) rewards of chosen answers, those of rejected ones, and margins.
    """
    idx, mask, place = answers_of(x)
    with autocast(x.device, dtype):
        rewards = model(idx, mask)  # (N, T) -> (N,)
    chosen, rejected = rewards[place].chunk(2)  # (N,) -> (2B,) -> (B,) each
    extra = routers()
    return loss(chosen, rejected, y) + (extra - extra.detach())  # adds zero, but not to the gradient


# --- the loop ---


def check_settings(config: Config) -> None:
    """Refuse settings with which no training is possible.

    Raises:
        UserError: it names the flag, its value and what to give instead.
    """
    above_0 = ("n_prompts", "per_temperature", "batch_size", "accumulate", "eval_every", "eval_prompts", "save_every")
    from_0 = ("steps", "warmup_steps", "keep", "histogram_every")
    least = dict.fromkeys(above_0, 1) | dict.fromkeys((*from_0, "sharpness", "margin", "score_margin", "center"), 0)
    for name, value in least.items():
        if not value <= getattr(config, name) < math.inf:
            raise UserError(f"--{name} {getattr(config, name)} is not {value} or more; give {value} or more")
    if not all(0 <= temperature < math.inf for temperature in config.temperatures):
        raise UserError(f"--temperatures {config.temperatures}: one is not 0 or more; 1 is what the model believes")
    if len(config.temperatures) * config.per_temperature < 2:
        raise UserError(f"--temperatures {config.temperatures}: one answer makes no pair; give two temperatures")
    if config.loss == "margin" and config.margin + config.score_margin == 0:
        raise UserError("--loss margin: with a margin of 0, equal rewards for all would be best; give --margin 1")
    if config.loss == "margin" and config.center:
        raise UserError(f"--center {config.center} belongs to --loss bradley_terry; leave one of them out")
    if not config.clip > 0:
        raise UserError(f"--clip {config.clip} is not above 0; 1 is usual, inf clips nothing")
    learning_rate_factor(0, config.steps, config.warmup_steps, config.schedule, config.final_lr)
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; give a folder")


def train(config: Config, here: Processes, device: torch.device) -> dict[str, float]:
    """Train a model and leave pairs, checkpoints, logs, a learning curve and metrics in config.out.

    Args:
        config: the settings.
        here: which of the processes this one is.
        device: this process's.

    Returns:
        The metrics that are also written to metrics.json; without scores if it was stopped before it had any.

    Raises:
        UserError: a setting with which no training is possible, or ten losses in a row that are no number.
    """
    check_settings(config)
    torch.set_flush_denormal(True)  # on CPUs, numbers near zero are otherwise slow
    dtype = pick_dtype(config.dtype, device)
    config.out.mkdir(parents=True, exist_ok=True)
    say = tqdm.write if here.is_main else lambda text: None

    # 1. What to train, and on what. What lies in files is made by the main process, and read by the others.
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    base = from_main(str(find_checkpoint(config.base, config.smoke)) if here.is_main else "")
    trunk, tokenizer = load_checkpoint(Path(base), device)
    made_by = hashlib.sha256(describe_tokenizer(tokenizer).encode()).hexdigest()[:12]
    settings |= {"base": base, "tokenizer": made_by, "vocab_size": tokenizer.vocab_size}
    checkpoint = open_checkpoint(config.resume, settings, say)
    started = time.perf_counter()
    folder = config.out / "pairs"
    if here.is_main and not (checkpoint and folder.is_dir()):
        names = ("n_prompts", "eval_prompts", "temperatures", "per_temperature", "sharpness", "seed")
        make_pairs(folder, config.data, trunk, tokenizer, *(getattr(config, name) for name in names), say)
    seconds = time.perf_counter() - started
    pairs, held_out, made_of = main_first(here, lambda: read_folder(folder, trunk.config))
    rows = config.batch_size * config.accumulate
    order = order_pairs(pairs, config.steps * rows * here.count, config.seed)
    torch.manual_seed(config.seed)  # whether pairs were made or found, the head is the same
    model = RewardModel(trunk, chat_tokens(tokenizer)[3], config.causal, config.surprise)
    trunk.recompute = config.recompute
    parallel = spread(model, trunk.blocks, device, config.shard, dtype)
    run_model = torch.compile(parallel) if config.compile else parallel  # the same weights, other code
    optimizers = make_optimizers(model, config.optimizer, config.lr, config.muon_lr, config.weight_decay, config.betas)
    scaler = make_scaler(device, dtype)
    routers = partial(trunk.auxiliary_loss, config.balance_weight, config.z_weight)
    losses = {"bradley_terry": partial(bradley_terry_loss, center=config.center), "margin": margin_ranking_loss}
    loss_of = partial(batch_loss, routers=routers, loss=losses[config.loss])

    # 2. Where it stands.
    progress = {"step": 0, "skipped": 0, "in_a_row": 0, "seconds": 0.0, "run_id": ""}
    progress |= {"best": {"val_loss": math.inf}, "train_losses": [], "val_losses": [], "loads": [], "load": None}
    progress |= {"tokens": 0, "before": {}, "accuracies": [], "sampling_seconds": seconds, "pairs": made_of}
    if checkpoint:
        names = ("causal", "surprise")
        before = {name: checkpoint["config"].get(name) for name in names}
        refuse_differences(before, {name: getattr(config, name) for name in names})
        progress |= restore(checkpoint, model, optimizers, scaler, model.config)
        if progress["pairs"] != made_of:
            say(f"    unlike before: the pairs in {folder}")
    n_parameters = model.num_parameters()
    n_active = n_parameters - trunk.num_parameters() + trunk.num_active_parameters()
    length = sum(len(pair.prompt) + len(pair.chosen) for pair in pairs) / len(pairs)
    flops = model_flops(n_active, trunk.wte.weight.numel(), model.config.n_layer, length, model.config.n_embd)
    peak = peak_flops(device, dtype) * here.count
    best_possible = {} if math.isnan(ceiling(held_out)) else {"ceiling": ceiling(held_out)}
    frozen = sum(parameter.numel() for parameter in model.parameters()) - n_parameters  # not counted in flops
    where = f"on {here.count} x {device.type}, {str(dtype)[6:]}"
    say(f"{n_parameters:,} parameters, {n_active:,} at work, {frozen:,} frozen, {where}")
    say(f"{len(pairs):,} pairs to train on, {len(held_out):,} held out, ceiling {ceiling(held_out):.3f}")
    say(f"{config.steps} steps of {rows * here.count} pairs: {len(order) / len(pairs):.2f} times through")

    def save(name: str) -> None:
        state = collect(parallel, optimizers, scaler, model.config, settings, describe_tokenizer(tokenizer), progress)
        if here.is_main:
            write_checkpoint(config.out / name, state)

    # 3. The loop. It ends after the last step, or after the step in which it was asked to stop.
    first = progress["step"]
    tracker = Tracker(config.log if here.is_main else "none", config.out, settings, progress["run_id"], first)
    progress["run_id"] = tracker.run_id
    stop = StopRequest()
    with closing(tracker), closing(stop):
        bar = tqdm(range(first, config.steps + 1), desc="training", disable=None if here.is_main else True)
        for step in bar:
            # A checkpoint is taken before anything else happens at its step, so a run that goes on repeats nothing.
            progress["step"] = step
            stopped = stop.asked(device)
            if step == config.steps or stopped or (step % config.save_every == 0 and step > first):
                save("latest.pt")
                if config.keep and here.is_main:
                    keep_copy(config.out, step, config.keep)
            if stopped:
                say(f"stopped at step {step}; --resume auto goes on from {config.out / 'latest.pt'}")
                break
            evaluated = progress["val_losses"] and progress["val_losses"][-1][0] == step  # best.pt is saved after it
            if (step % config.eval_every == 0 or step == config.steps) and not evaluated:
                with autocast(device, dtype):
                    scores = evaluate(model, held_out)
                progress["val_losses"].append((step, scores["val_loss"]))
                progress["accuracies"].append((step, scores["pair_accuracy"]))
                scores |= describe_load(trunk, progress)
                progress["before"] = progress["before"] or {f"{name}_before": value for name, value in scores.items()}
                tracker.numbers(step, scores | best_possible)
                say(
                    f"step {step:5d}: held-out loss {scores['val_loss']:.4f} nats per pair, "
                    f"accuracy {scores['pair_accuracy']:.3f}, reward margin {scores['reward_margin']:.3f}"
                )
                if scores["val_loss"] < progress["best"]["val_loss"]:
                    progress["best"] = scores
                    save("best.pt")
            if step == config.steps:
                break
            started = time.perf_counter()
            factor = learning_rate_factor(step, config.steps, config.warmup_steps, config.schedule, config.final_lr)
            set_learning_rate(optimizers, factor)
            batch = get_batch(pairs, order, rows, step, here.rank, here.count)
            x, y = (some.to(device) for some in to_batch(batch, model.pad, config.margin, config.score_margin))
            loss = accumulate_gradients(run_model, loss_of, x, y, config.accumulate, dtype, scaler).item()
            if config.histogram_every and step % config.histogram_every == 0:
                tracker.histograms(step, model, scaler.get_scale())
            norm = update(model, optimizers, scaler, config.clip)
            balance_experts(trunk, config.bias_rate, progress)
            n_tokens = count_tokens(batch) * here.count  # about, if there are others
            seconds = time.perf_counter() - started
            progress["seconds"] += seconds
            progress["tokens"] += n_tokens
            progress["train_losses"].append(loss)
            numbers = {"loss": loss, "learning_rate": config.lr * factor, "gradient_norm": norm}
            rate = n_tokens / seconds
            numbers |= {"tokens_per_second": rate, "flops_utilisation": flops * rate / peak}
            tracker.numbers(step, numbers)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            count_skipped(progress, loss, norm, scaler.is_enabled(), say, config.out / "latest.pt")

    # 4. What came out.
    rate = progress["tokens"] / max(progress["seconds"], 1e-9)
    metrics = {"tokens_per_second": rate, "flops_utilisation": flops * rate / peak}
    metrics |= {"seconds": progress["seconds"], "skipped_steps": progress["skipped"], "parameters": n_parameters}
    metrics |= best_possible | {"sampling_seconds": progress["sampling_seconds"]}
    if progress["val_losses"]:
        metrics |= progress["before"] | {f"{name}_after": value for name, value in progress["best"].items()}
        metrics |= {**progress["best"], "val_loss_last": progress["val_losses"][-1][1], "active_parameters": n_active}
        if here.is_main:
            write_curves(config.out, metrics, progress)
    return metrics


def main(config: Config) -> None:
    """Train, and say what came out and where it lies."""
    with processes(config.device) as (here, device):
        if config.smoke:
            out = from_main(tempfile.mkdtemp() if here.is_main else "") if config.out == RUNS else config.out
            config = replace(config, out=Path(out), n_prompts=12, steps=20, batch_size=4, eval_prompts=8)
            config = replace(config, eval_every=10, warmup_steps=5, save_every=10)
        metrics = train(config, here, device)
    if here.is_main and "val_loss" in metrics:
        print(
            f"best held-out loss {metrics['val_loss']:.4f} nats per pair, accuracy {metrics['pair_accuracy']:.3f}, "
            f"ceiling {metrics.get('ceiling', math.nan):.3f}; {metrics['sampling_seconds']:.0f} seconds for the pairs, "
            f"{metrics['seconds']:.0f} for training, {metrics['tokens_per_second']:,.0f} tokens a second"
        )
        print(f"wrote pairs, best.pt, latest.pt, learning_curve.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (UserError, OSError) as error:  # OSError: a disk that is full, a folder that cannot be made
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the checkpoints that were saved before are whole", file=sys.stderr)
        sys.exit(130)
