"""What check_reward.py computes: each function is one question to a reward model, or to numbers that it gave.

Shapes: N pairs; P prompts with M answers each.

References: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2 (expected calibration error); Nakano
et al. 2021, "WebGPT", appendix I (best of n from one pool of answers); Gao et al. 2022, "Scaling Laws for Reward Model
Overoptimization" (what becomes of it as n grows); Singhal et al. 2023, "A Long Way to Go" (length).
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from data import Pair, chat_tokens
from instructions import Instruction, write_prompt
from pairs import pair_rewards
from preferences import ceiling
from reward import RewardModel, rewards
from tokenizer import BPETokenizer


class Check(NamedTuple):
    """A number, and the range outside of which it is alarming."""

    key: str
    """Its name in metrics.json."""
    name: str
    """What it is, for the table."""
    value: float
    least: float = -math.inf
    most: float = math.inf

    def alarming(self) -> str:
        """When to be alarmed, in words."""
        if self.most == math.inf:
            return f"below {self.least:.3f}"
        return f"above {self.most:.3f}" if self.least == -math.inf else f"outside {self.least:.3f} to {self.most:.3f}"

    def verdict(self) -> str:
        """ok or ALARM; what is no number is alarming too."""
        return "ok" if self.least <= self.value <= self.most else "ALARM"


# --- of pairs ---


def surprise_alone(model: RewardModel) -> RewardModel:
    """A copy whose rewards are what surprise costs, without what the head makes of the trunk."""
    alone = copy.deepcopy(model)
    nn.init.zeros_(alone.head.weight)
    return alone


def accuracy(difference: np.ndarray) -> float:
    """Share of the pairs whose chosen answer gets more, from (N,) chosen - rejected; equal counts half."""
    return float((1 + np.sign(difference)).mean() / 2)


def shuffle_labels(pairs: list[Pair], seed: int) -> list[Pair]:
    """Exchange chosen and rejected in half of the pairs, by chance: labels that say nothing."""
    swapped = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return [
        pair._replace(chosen=pair.rejected, rejected=pair.chosen, margin=-pair.margin) if swap else pair
        for pair, swap in zip(pairs, swapped, strict=True)
    ]


def exchange_prompts(pairs: list[Pair], room: int, seed: int) -> list[Pair]:
    """Give every pair the prompt of another one, so that what is asked for says nothing about the answers.

    Args:
        pairs: of two prompts at least; pairs that have a prompt in common have one afterwards too.
        room: tokens of prompt and answer at most; a prompt that is too long for its new answers loses its beginning.
        seed: which prompt goes where.
    """
    prompts = list(dict.fromkeys(tuple(pair.prompt) for pair in pairs))
    order = np.random.default_rng(seed).permutation(len(prompts))
    other = {prompts[i]: prompts[j] for i, j in zip(order, np.roll(order, 1), strict=True)}  # none keeps its own
    found = []
    for pair in pairs:
        longest = max(len(pair.chosen), len(pair.rejected))
        found.append(pair._replace(prompt=list(other[tuple(pair.prompt)])[-max(room - longest, 1) :]))
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two differences within pairs, each with a mean of zero, for either answer may stand first.

    sum a b / sqrt(sum a^2 sum b^2), in [-1, 1]; 0 if one of them never differs.
    """
    size = math.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / size) if size else 0.0


def of_equal_length(pairs: list[Pair], tolerance: float = 0.05, least: int = 30) -> np.ndarray:
    """Places of the pairs whose answers are equally long, or nearly: among these, length cannot be what decides.

    Args:
        pairs: N of them.
        tolerance: largest difference, as a share of the longer answer.
        least: if there are fewer such pairs, that many of the least different are taken.
    """
    lengths = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    apart = np.abs(lengths[:, 0] - lengths[:, 1]) / lengths.max(axis=1)
    return np.flatnonzero(apart <= max(tolerance, np.sort(apart)[min(least, len(pairs)) - 1]))


class Calibration(NamedTuple):
    """How sure a model is, and how often it is right, by bins of the former that have any pair."""

    confidence: np.ndarray
    """(bins,) mean of what it says."""
    right: np.ndarray
    """(bins,) share of the pairs in which it is right."""
    count: np.ndarray
    """(bins,) pairs."""

    def error(self) -> float:
        """Expected calibration error: the mean distance of the two, weighted by the pairs."""
        return float((self.count * np.abs(self.confidence - self.right)).sum() / self.count.sum())


def calibrate(difference: np.ndarray, n_bins: int = 10) -> Calibration:
    """Compare what a model says with what is so.

    By Bradley and Terry it says that the answer with the higher reward is preferred with probability
    sigmoid(|r1 - r2|), which lies in [0.5, 1).

    Args:
        difference: (N,) rewards of chosen - rejected.
        n_bins: of equal width, from 0.5 to 1.
    """
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = (1 + np.sign(difference)) / 2
    place = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    count = np.bincount(place, minlength=n_bins)
    some = count > 0
    sums = [np.bincount(place, values, minlength=n_bins)[some] / count[some] for values in (confidence, right)]
    return Calibration(*sums, count[some])


def check_pairs(model: RewardModel, pairs: list[Pair], seed: int) -> tuple[list[Check], np.ndarray, Calibration]:
    """Do all checks for which held-out pairs are enough.

    Args:
        model: the judge.
        pairs: N of them, of two prompts at least.
        seed: of what is shuffled.

    Returns:
        The checks, the rewards of chosen and rejected answers (2, N), and the calibration.
    """
    found = pair_rewards(model, pairs)
    difference = found[0] - found[1]
    shuffled = np.subtract(*pair_rewards(model, shuffle_labels(pairs, seed)))
    exchanged = np.subtract(*pair_rewards(model, exchange_prompts(pairs, model.config.block_size, seed)))
    longer = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    judged = np.array([pair.margin for pair in pairs])
    judged = judged if judged.any() else np.ones(len(pairs))  # of most data sets, only who was preferred is known
    equal, calibration = of_equal_length(pairs), calibrate(difference)
    right, by_judge = accuracy(difference), correlation(judged, longer)
    # Where nobody knows the ceiling, a model that is worth anything has at least this.
    best, best_equal = ceiling(pairs), ceiling([pairs[i] for i in equal])
    least, least_equal = (0.6 if math.isnan(value) else 0.9 * value for value in (best, best_equal))
    known, known_equal = ("" if math.isnan(value) else f", ceiling {value:.3f}" for value in (best, best_equal))
    apart = max(0.05, 1.3 / math.sqrt(len(pairs)))  # 2.6 standard deviations, where there are few pairs
    by_chance = (accuracy(shuffled), 0.5 - apart, 0.5 + apart)
    by_length = (correlation(difference, longer), by_judge - 0.25, by_judge + 0.25)
    checks = [
        Check("pair_accuracy", f"accuracy on held-out pairs{known}", right, least),
        Check("shuffled_accuracy", "the same with shuffled labels", *by_chance),
        Check("exchanged_accuracy", "the same with prompts exchanged", accuracy(exchanged), most=right - 0.02),
        Check("length_correlation", f"correlation with length, the judge's {by_judge:.3f}", *by_length),
        Check(
            "equal_length_accuracy",
            f"accuracy on {len(equal)} pairs of equal length{known_equal}",
            accuracy(difference[equal]),
            least_equal,
        ),
        Check("calibration_error", "expected calibration error", calibration.error(), most=0.1),
    ]
    return checks, found, calibration


# --- of many answers to a prompt ---


def best_of_n(by: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Expected score of the best of n answers: n are drawn from M, none twice, and the one with the highest `by` taken.

    Exact, without drawing: of all C(M, n) draws, C(k, n) have none above rank k, so C(k, n) - C(k - 1, n) have rank k
    as their best. Answers of equal rank are taken equally often.

    Args:
        by: (P, M) what decides: rewards, or the scores themselves, for what would be ideal.
        scores: (P, M) what the one that is taken is worth.
        n: 1 to M.

    Returns:
        (P,).
    """
    M = by.shape[1]
    k = np.arange(M + 1)
    none_above = np.prod([(k - j).clip(min=0) / (M - j) for j in range(n)], axis=0)  # C(k, n) / C(M, n), k = 0 .. M
    weight = np.diff(none_above)  # (M,), of ranks 1 to M
    found = []
    for row_by, row_scores in zip(by, scores, strict=True):
        order = np.argsort(row_by, kind="stable")
        _, group, size = np.unique(row_by[order], return_inverse=True, return_counts=True)
        mean = np.bincount(group, row_scores[order]) / size  # of those of equal rank
        found.append((weight * mean[group]).sum())
    return np.array(found)


def reword(instruction: Instruction, seed: int) -> str:
    """Ask for the same story in other words."""
    rng = random.Random(seed)
    while (prompt := write_prompt(instruction.asked, rng)) == instruction.prompt:
        pass
    return prompt


def known_stories(instructions: list[Instruction], tokenizer: BPETokenizer, seed: int) -> dict[str, list[list[int]]]:
    """Three answers to each prompt of which we know what they are worth.

    Returns:
        good: the gold answer. others': the gold answer to the next prompt, a good story that nobody asked for. bad: the
        words of the gold answer in random order.
    """
    rng, end = random.Random(seed), chat_tokens(tokenizer)[2]
    good = [asked.response for asked in instructions]
    bad = [" ".join(rng.sample(text.split(), len(text.split()))) for text in good]
    texts = {"good": good, "others'": good[1:] + good[:1], "bad": bad}
    return {name: [[*tokenizer.encode(text), end] for text in some] for name, some in texts.items()}


def same_order(a: np.ndarray, b: np.ndarray) -> float:
    """Share of all pairs of answers to a prompt that two rewards, (P, M) each, put in the same order.

    Answers that are equal to either are left out; nan if all are.
    """
    i, j = np.triu_indices(a.shape[1], k=1)
    signs = np.sign(a[:, i] - a[:, j]) * np.sign(b[:, i] - b[:, j])  # (P, M (M - 1) / 2): 1, -1, or 0
    return float((signs > 0).sum() / (signs != 0).sum()) if (signs != 0).any() else math.nan


def find_gibberish(
    model: RewardModel,
    tokenizer: BPETokenizer,
    prompts: list[list[int]],
    length: int,
    rounds: int,
    n_candidates: int,
    seed: int,
) -> tuple[list[list[int]], np.ndarray]:
    """Search for answers that get high rewards and mean nothing: hill climbing from random tokens.

    Each round makes candidates of the best answer so far by replacing one to eight of its tokens by random ones, and
    keeps the best of them if it is better. No gradient is needed, nor knowledge of the language.

    Args:
        model: the judge.
        tokenizer: its own.
        prompts: to answer; each is a search by itself.
        length: tokens of an answer, 2 or more; the last is <|end|>.
        rounds: of each search.
        n_candidates: in each round.
        seed: of the tokens.

    Returns:
        The best answers, and their rewards (P,).
    """
    rng = np.random.default_rng(seed)
    special = set(tokenizer.special_tokens.values())
    words = np.array([i for i in range(tokenizer.vocab_size) if i not in special])
    best = rng.choice(words, size=(len(prompts), length))  # (P, T)
    best[:, -1] = tokenizer.special_tokens["<|end|>"]
    value = rewards(model, prompts, best.tolist())
    for _ in range(rounds):
        new = best[:, None].repeat(n_candidates, axis=1)  # (P, candidates, T)
        changed = rng.random(new.shape) < rng.integers(1, 9, size=(*new.shape[:2], 1)) / length
        changed[..., -1] = False  # <|end|> stays
        new[changed] = rng.choice(words, size=changed.sum())
        asked = [prompt for prompt in prompts for _ in range(n_candidates)]
        found = rewards(model, asked, new.reshape(-1, length).tolist()).reshape(len(prompts), -1)
        for p, i in enumerate(found.argmax(axis=1)):
            if found[p, i] > value[p]:
                best[p], value[p] = new[p, i], found[p, i]
    return best.tolist(), value


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
