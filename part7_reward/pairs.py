"""The pairs of a run: made once, kept in files, put in order, put in batches.

Sampling takes a good part of a whole run, and another device draws other answers. So the main process makes the pairs
and leaves them in files, from which all processes read; a run that is resumed finds them there, and another run, or
check_reward.py, can be given the folder.

    folder/train.jsonl, folder/held_out.jsonl     # a line a pair: ids, margin, certainty, see preferences.save_pairs

Reference: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5: all
pairs of a prompt in one batch, so that each answer goes through the model once, and not in several batches of an epoch.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from data import Pair, UserError, collate, load_pairs
from model import GPT, GPTConfig
from preferences import read_pairs, sample_pairs, save_pairs, story_prompts
from reward import RewardModel, rewards
from tokenizer import BPETokenizer
from tracker import plot_load

matplotlib.use("Agg")  # figures go to files; a screen may not be there

FILES = ("train.jsonl", "held_out.jsonl")
"""Names of the two files of a folder of pairs."""


# --- made once ---


def make_pairs(
    folder: Path,
    data: str,
    model: GPT,
    tokenizer: BPETokenizer,
    n_prompts: int,
    n_held_out: int,
    temperatures: tuple[float, ...],
    per_temperature: int,
    sharpness: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Sample pairs, or read them, and leave them in a folder.

    Args:
        folder: where to leave them.
        data: "stories" to sample answers to embedded instructions; the folder of another run's pairs, for all of
            these; the path of a .jsonl file; or hf:<name>[:split].
        model: which answers.
        tokenizer: its own.
        n_prompts: instructions to train on; of a data set, pairs at most.
        n_held_out: held-out instructions; of a data set, pairs at most.
        temperatures, per_temperature, sharpness: of answers and judge, see sample_pairs.
        seed: of answers and judge, and of the training instructions. The held-out instructions are always the same.
        say: where to report.

    Raises:
        UserError: the data cannot be had, or no prompt has two different answers.
    """
    if Path(data).is_dir():
        training, held_out, _ = read_folder(Path(data), model.config)
    elif data == "stories":
        how = (temperatures, per_temperature, sharpness)
        training, sampled = sample_pairs(model, tokenizer, story_prompts(n_prompts, seed, False), *how, seed)
        # Many prompts say more than many answers to few: one at each temperature, two if there is only one.
        how = (temperatures, 2 if len(temperatures) == 1 else 1, sharpness)
        held_out, _ = sample_pairs(model, tokenizer, story_prompts(n_held_out, 0, True), *how, seed + 1)
        drawn_at = np.array(sampled.temperatures)
        means = {hot: sampled.scores[:, drawn_at == hot].mean() for hot in sorted(set(sampled.temperatures))}
        say(
            "rule score of the sampled answers: "
            + ", ".join(f"{mean:.3f} at temperature {temperature:g}" for temperature, mean in means.items())
            + f"; {sampled.equal} pairs of equal answers skipped"
        )
    else:
        training, held_out, dropped = load_pairs(data, tokenizer, model.config.block_size, n_prompts)
        held_out = held_out[:n_held_out]
        say(f"{dropped} pairs dropped: equal answers, or such as do not fit into the context")
    if not training or not held_out:
        raise UserError(f"--data {data}: no prompt has two different answers; give more prompts, or --temperatures")
    for file, pairs in zip(FILES, (training, held_out), strict=True):
        save_pairs(folder / file, pairs)


def read_folder(folder: Path, config: GPTConfig) -> tuple[list[Pair], list[Pair], str]:
    """Read the pairs of a folder.

    Args:
        folder: where make_pairs left them.
        config: of the model that is to read them.

    Returns:
        (training, held out, twelve letters that are others if the pairs are).

    Raises:
        UserError: one of the files is not there, is empty, or holds something else; or pairs that the model cannot
            read.
    """
    training, held_out = (read_pairs(folder / file) for file in FILES)
    if not training or not held_out:
        raise UserError(f"{folder}: no pairs in {FILES[0]} or {FILES[1]}; give the folder pairs of a whole run")
    for pair in training + held_out:
        for answer in (pair.chosen, pair.rejected):
            n = len(pair.prompt) + len(answer)
            if n > config.block_size and not config.window:
                raise UserError(f"{folder}: a pair of {n} tokens, and the context of --base is {config.block_size}")
            if not 0 <= min(pair.prompt + answer) <= max(pair.prompt + answer) < config.vocab_size:
                raise UserError(f"{folder}: tokens that --base does not know; give the model that they were made with")
    content = b"".join((folder / file).read_bytes() for file in FILES)
    return training, held_out, hashlib.sha256(content).hexdigest()[:12]


def count_tokens(pairs: list[Pair]) -> int:
    """Tokens of all answers and their prompts, without padding; an answer that is in several pairs counts once."""
    answers = {(tuple(pair.prompt), tuple(answer)) for pair in pairs for answer in (pair.chosen, pair.rejected)}
    return sum(len(prompt) + len(answer) for prompt, answer in answers)


# --- order and batches ---


def order_pairs(pairs: list[Pair], n: int, seed: int) -> np.ndarray:
    """Put pairs into the order in which a run is to learn them: prompts are shuffled, the pairs of one stay together.

    Args:
        pairs: at least one.
        n: how many the run takes, those that come several times counted each time.
        seed: another seed, another order.

    Returns:
        (n,) places in `pairs`.
    """
    rng = np.random.default_rng([seed % 2**64, 7])  # another row of numbers than any other use of this seed
    places: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        places.setdefault(tuple(pair.prompt), []).append(i)
    groups = list(places.values())
    epochs = [rng.permutation(len(groups)) for _ in range(-(-n // len(pairs)))]
    return np.array([i for epoch in epochs for g in epoch for i in groups[g]][:n], dtype=np.int64)


def to_batch(pairs: list[Pair], pad: int, margin: float, score_margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Make tensors of B pairs, which can be cut into micro-batches along their first dimension.

    Args:
        pairs: B of them.
        pad: id of <|pad|>.
        margin: by how much each chosen answer is to get more.
        score_margin: that much more for each point by which its score is higher. A pair whose label the scores
            speak against gets none.

    Returns:
        x (B, 2, 2, T): of each pair the chosen and the rejected answer, of each answer ids and mask; and the margins,
        y (B,).
    """
    idx, mask = collate(pairs, pad)  # (2B, T) each, chosen first
    x = torch.stack([idx, mask.long()], dim=1).unflatten(0, (2, len(pairs)))  # (2B, 2, T) -> (2, B, 2, T)
    y = torch.tensor([margin + score_margin * max(pair.margin, 0.0) for pair in pairs])
    return x.transpose(0, 1), y


def answers_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the answers out of a batch of pairs, each once: an answer that is in three pairs is read once.

    Args:
        x: (B, 2, 2, T), see to_batch.

    Returns:
        idx and mask, (N, T), N <= 2B; and the place (2B,) among them of each chosen, then of each rejected answer.
    """
    answers = x.transpose(0, 1).flatten(0, 1)  # (B, 2, 2, T) -> (2, B, 2, T) -> (2B, 2, T)
    answers, place = answers.unique(dim=0, return_inverse=True)
    return answers[:, 0], answers[:, 1].bool(), place


# --- what a model thinks of them ---


def pair_rewards(model: RewardModel, pairs: list[Pair], batch_size: int = 64) -> np.ndarray:
    """Rewards of the chosen and of the rejected answers, (2, N); an answer that is in several pairs is read once."""
    answers = [(tuple(pair.prompt), tuple(pair.chosen)) for pair in pairs]
    answers += [(tuple(pair.prompt), tuple(pair.rejected)) for pair in pairs]
    place = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
    found = rewards(model, *([list(ids) for ids in column] for column in zip(*place, strict=True)), batch_size)
    return found[[place[answer] for answer in answers]].reshape(2, -1)


# --- what a run leaves ---


def write_curves(out: Path, metrics: dict[str, float], progress: dict[str, Any]) -> None:
    """Leave metrics.json, learning_curve.png and, with experts, load.png in a folder.

    Args:
        out: the folder.
        metrics: all numbers; "ceiling" is drawn if it is among them.
        progress: its train_losses, one a step, and val_losses and accuracies, pairs (step, value).
    """
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_load(out / "load.png", progress["loads"])
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    axes[0].plot(progress["train_losses"], color="tab:blue", alpha=0.4, linewidth=0.8, label="training batch")
    held_out = {"color": "tab:red", "marker": "o", "markersize": 4, "label": "held out"}
    axes[0].plot(*zip(*progress["val_losses"], strict=True), **held_out)
    axes[0].axhline(math.log(2), color="gray", linestyle=":", label="ln 2: guesses")
    axes[0].set(ylabel="loss (nats per pair)", ylim=(0, None), title="Learning curve")
    axes[1].plot(*zip(*progress["accuracies"], strict=True), **held_out)
    axes[1].axhline(0.5, color="gray", linestyle=":", label="guesses")
    if "ceiling" in metrics:
        axes[1].axhline(metrics["ceiling"], color="tab:green", linestyle="--", label="ceiling: the judge errs")
    axes[1].set(ylabel="share of pairs", ylim=(0.4, 1), title="Agreement with the judge")
    for ax in axes:
        ax.set_xlabel("step")
        ax.legend()
    fig.savefig(out / "learning_curve.png", dpi=120)
    plt.close(fig)
