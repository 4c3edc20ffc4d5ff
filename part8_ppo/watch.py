"""What there is to watch while a policy learns: numbers of its answers, what it forgets, and a picture of both.

A policy has no loss that tells how good it is: its own falls and rises with the advantages, which have a mean of zero.
So the answers are looked at, those that it learns from in every iteration, and those to held-out prompts now and then:
what the reward model says, what the rules say, which it never sees, and how far it has gone from the reference. The
healthy range of each number is in README.md.

Shapes: B rows, T tokens of the longest answer.

References: Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization" (reward and truth against the KL);
Schulman 2020, "Approximating KL Divergence" (k3); Efron 1979, "Bootstrap Methods" (intervals).
"""

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from data import chat_tokens, collate_responses
from devices import sum_over_processes
from environment import Asked, Environment
from experience import Experience
from generate import printable
from policy import Policy
from ppo import explained_variance, kl_estimate
from rollout import Rollout
from rules import score
from tokenizer import BPETokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

PANELS = {
    "reward": "reward of the model (0: the reference)",
    "rule_score": "rule score, which nobody learns from",
    "kl_to_reference": "KL to the reference (nats per answer)",
    "entropy": "entropy (nats per token)",
    "explained_variance": "variance of returns that values explain",
    "clip_fraction": "share of clipped tokens",
}
"""The six panels of learning_curve.png: name in the log -> title."""


# --- of answers ---


def describe_answers(
    rollout: Rollout,
    rewards: torch.Tensor,
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
    entropy: torch.Tensor,
    asked: list[Asked],
    tokenizer: BPETokenizer,
) -> dict[str, torch.Tensor]:
    """What there is to say of each answer, (B,) each; the rules are only watched, nobody learns from them.

    Args:
        rollout: B answers.
        rewards: (B,) of the reward model, normalised.
        logp, ref_logp, entropy: (B, T) of policy, reference, policy.
        asked: what they answer.
        tokenizer: decodes them for the rules.

    Returns:
        reward, as given; kl_to_reference: nats of the whole answer, by k3, so never negative; entropy: mean over its
        tokens, in nats; response_length in tokens; ended: 1 or 0; and rule_score in [0, 1], of stories.
    """
    length = rollout.mask.sum(dim=1)
    found = {
        "reward": rewards,
        "kl_to_reference": torch.where(rollout.mask, kl_estimate(logp, ref_logp, "k3"), 0.0).sum(dim=1),
        "entropy": torch.where(rollout.mask, entropy, 0.0).sum(dim=1) / length,
        "response_length": length.float(),
        "ended": rollout.ended.float(),
    }
    if asked[0].instruction:
        texts = [tokenizer.decode(ids) for ids in rollout.responses]
        judged = zip(asked, texts, rollout.ended.tolist(), strict=True)
        totals = [score(some.instruction, text, ended).total for some, text, ended in judged]
        found["rule_score"] = torch.tensor(totals, device=length.device)
    return found


class Tally:
    """Means of numbers that come a few at a time, each time with a weight, in several processes."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, weight: int, **values: torch.Tensor) -> None:
        """Add numbers, scalars, each the mean of `weight` tokens or answers."""
        for name, value in values.items():
            both = torch.stack([weight * value.detach().float(), torch.full((), float(weight), device=value.device)])
            self.sums[name] = self.sums[name] + both if name in self.sums else both

    def means(self) -> dict[str, float]:
        """Means over all that was added, here and in the other processes, which have to call it too."""
        sums, weights = sum_over_processes(torch.stack(list(self.sums.values()))).T.tolist()
        return {name: total / weight for name, total, weight in zip(self.sums, sums, weights, strict=True)}


def describe_iteration(
    experience: Experience,
    asked: list[Asked],
    tokenizer: BPETokenizer,
    steps: list[dict[str, float]],
    norms: list[float],
) -> dict[str, float]:
    """Numbers of one iteration, for the log; all processes must call it.

    Args:
        experience: its answers, of this process.
        asked: what they answer.
        tokenizer: see describe_answers.
        steps: what was seen at each minibatch, in turn.
        norms: of the gradients that were followed.

    Returns:
        Means over the answers of all processes of what describe_answers gives; explained_variance, of this process's
        answers; means over the minibatches of what was seen there, but of approx_kl the last, for it says how far the
        whole iteration went; the mean gradient_norm; and optimizer_steps, fewer than planned if it was ended early.
    """
    some = experience
    found = describe_answers(some.rollout, some.rewards, some.logp, some.ref_logp, some.entropy, asked, tokenizer)
    tally = Tally()
    tally.add(len(asked), **{name: values.mean() for name, values in found.items()})
    numbers = tally.means() | {"explained_variance": explained_variance(some.values, some.outcome, some.mask)}
    numbers |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    norm = sum(norms) / max(len(norms), 1)
    return numbers | {"approx_kl": steps[-1]["approx_kl"], "gradient_norm": norm, "optimizer_steps": len(norms)}


@torch.no_grad()
def gold_loss(
    policy: Policy, gold: list[tuple[list[int], list[int]]], tokenizer: BPETokenizer, batch_size: int = 64
) -> dict[str, float]:
    """How surprising gold answers are to the policy: if that rises, it forgets what it was fine-tuned for.

    Args:
        policy: its device is used; it is left in the mode, training or evaluation, that it was in.
        gold: prompts and answers, ids; an answer is cut where the context ends. None of them: nothing is measured.
        tokenizer: says how many bytes each token stands for, and which one is padding.
        batch_size: rows at a time.

    Returns:
        val_loss in nats per token of the answers, and bits_per_byte of their text. Empty without gold answers.
    """
    if not gold:
        return {}
    training, room, pad = policy.training, policy.config.block_size + 1, chat_tokens(tokenizer)[3]
    policy.eval()
    device, lengths = policy.value_head.weight.device, torch.tensor(tokenizer.byte_lengths())
    nats, n_targets, n_bytes = 0.0, 0, 0
    for first in range(0, len(gold), batch_size):
        prompts, answers = zip(*gold[first : first + batch_size], strict=True)
        answers = [answer[: room - len(prompt)] for prompt, answer in zip(prompts, answers, strict=True)]
        idx, mask = collate_responses(list(prompts), answers, pad)  # (B, T + 1)
        y = idx[:, 1:].masked_fill(~mask[:, 1:], -100)  # (B, T), -100 where nothing is asked
        logits, _ = policy(idx[:, :-1].to(device))  # (B, T, V)
        nats += F.cross_entropy(logits.float().transpose(1, 2), y.to(device), reduction="sum").item()
        learned = y[y != -100]  # (N,)
        n_targets += len(learned)
        n_bytes += lengths[learned].sum().item()
    policy.train(training)
    return {"val_loss": nats / n_targets, "bits_per_byte": nats / math.log(2) / max(n_bytes, 1)}


def show_answers(environment: Environment, writers: dict[str, Policy], asked: list[Asked], seed: int) -> None:
    """Print what each of some policies answers to prompts, and what the reward model and the rules say of it."""
    for some in asked:
        print("\n" + (some.instruction.prompt if some.instruction else environment.tokenizer.decode(some.ids)))
        for name, policy in writers.items():
            rollout = environment.answer(policy, [some], seed)
            text = environment.tokenizer.decode(rollout.responses[0])
            said = f"reward {environment.judge(rollout).item():.2f}"
            if some.instruction:
                said += f", rule score {score(some.instruction, text, bool(rollout.ended)).total:.2f}"
            text = f"{name} ({said}): {' '.join(printable(text).split())}"
            print(textwrap.fill(text, 116, initial_indent="    ", subsequent_indent="    "))


# --- how sure ---


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    n: int = 1000,
    seed: int = 0,
    share: float = 0.95,
    statistic: Callable[[np.ndarray], float] = np.mean,
) -> tuple[float, float]:
    """Interval in which the mean, or another statistic, would lie for other answers of the same kind.

    The answers that we have stand for all that there might be. So as many are drawn from them, each as often as it
    comes, the statistic is taken of what was drawn, and that n times; the interval is what remains of the n if at
    either end (1 - share) / 2 of them are cut off: the percentile bootstrap. Of the values 0 and 1, draws are 00, 01,
    10 or 11, the means 0, 0.5, 0.5 or 1, and the interval is (0, 1).

    Args:
        values: (M,) scores; or (M, K) numbers for each of M answers, if the statistic takes such.
        n: how often to draw.
        seed: of the draws.
        share: of the draws that lie inside.
        statistic: of a corpus; for BLEU `lambda rows: bleu_of(rows.sum(axis=0))` of rows of bleu_statistics.

    Returns:
        Its two ends.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values)
    if len(values) == 0:
        raise ValueError("no values, so there is nothing to draw from")
    rng = np.random.default_rng(seed)
    found = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(n)]
    low, high = np.quantile(found, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


# --- what a run leaves ---


def write_curves(out: Path, metrics: dict[str, float], progress: dict[str, Any]) -> None:
    """Leave metrics.json and learning_curve.png, six panels, in a folder.

    Args:
        out: the folder.
        metrics: all numbers.
        progress: its history, numbers of the answers of each iteration; and val_losses, pairs (step, numbers of
            held-out answers). What has no rule score gets the length of the answers instead.
    """
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    history, held_out = progress["history"], progress["val_losses"]
    panels = dict(PANELS)
    if held_out and "rule_score" not in held_out[0][1]:
        del panels["rule_score"]
        panels["response_length"] = "length of answers (tokens)"
    fig, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for ax, (name, title) in zip(axes.flat, panels.items(), strict=True):
        values = [numbers[name] for numbers in history]
        ax.plot(values, color="tab:blue", alpha=0.5, linewidth=0.9, label="answers it learns from")
        points = [(step, numbers[name]) for step, numbers in held_out if name in numbers]
        if points:
            ax.plot(*zip(*points, strict=True), color="tab:red", marker="o", markersize=4, label="held out")
        ax.set(title=title, xlabel="iteration")
        ax.legend(fontsize="small")
    fig.savefig(out / "learning_curve.png", dpi=120)
    plt.close(fig)
