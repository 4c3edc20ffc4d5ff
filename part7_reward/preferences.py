"""Preferences: pairs of answers of one model to one prompt, and a noisy judge who says which one is better.

People who compare two answers err, the more often the less the answers differ. Bradley and Terry's model says how
often: every answer has a score s, and the first one is preferred with probability

    p = sigmoid(sharpness * (s_first - s_second))

Here the score is the rule score (rules.py), of which a model sees nothing but such labels. So we know what is known of
no real data set: how certain each label is, and by that, how often the best possible reward model agrees with labels
it has not seen. Such a model says of every pair which answer is better, and is right max(p, 1 - p) of the time; the
mean of that over all pairs is the ceiling. Nobody gets above it but by luck, and a reward model is to be compared with
it, not with 1.

Answers are drawn at several temperatures, so that a prompt has better and worse ones. Every two different answers to a
prompt are a pair with a label of its own: three labels may well go round in a circle, as people's do.

    python part7_reward/lesson1_preferences.py     # shows all of this on answers of the model of part 6

References: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs"; Ouyang et al. 2022, "Training language
models to follow instructions with human feedback", sections 3.4 (how often people agree) and 3.5 (all pairs of a
prompt's answers).
"""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import Pair, UserError, encode_prompt, read_jsonl
from generate import Response, respond
from instructions import Instruction, make_instructions
from model import GPT
from rules import score
from tokenizer import BPETokenizer

TEMPERATURES = (0.5, 0.8, 1.0, 1.3)
"""At which answers are drawn: from where part 6 writes good grammar to where every third sentence is bad."""
SHARPNESS = 8.0
"""Of the judge: of answers whose scores are 0.1 apart he prefers the better one in 69% of cases, 0.3 apart in 92%.

The ceiling is then between 0.8 and 0.9: noise that is seen, and not so much of it that a few thousand pairs are too few
to learn from. People are noisier: those who labeled for InstructGPT agreed with each other on 73% of pairs.
"""


class Sampled(NamedTuple):
    """What a model answered, and what the rules say of it: N prompts, D answers to each."""

    temperatures: list[float]
    """(D,) at which each of the answers was drawn."""
    responses: list[list[Response]]
    """(N, D) the answers."""
    scores: np.ndarray
    """(N, D) their rule scores, in [0, 1]."""
    equal: int
    """Pairs of equal answers, which were skipped."""


# --- prompts ---


def story_prompts(n: int, seed: int, held_out: bool) -> list[Instruction]:
    """Make n story instructions of one side of the split, by other seeds than the model of part 6 learned from."""
    return make_instructions(n, seed + 1000, held_out, kinds=("story",))


# --- the judge ---


def judge_probability(better: float, worse: float, sharpness: float) -> float:
    """Probability with which the judge prefers an answer of one score to another one's: above 1/2 if it is better.

    Args:
        better, worse: rule scores of the two answers, in any order.
        sharpness: 0: he throws a coin; the larger, the less he errs.
    """
    # sigmoid(x) = (1 + tanh(x / 2)) / 2, which overflows for no x.
    return 0.5 + 0.5 * math.tanh(sharpness * (better - worse) / 2)


def ceiling(pairs: list[Pair]) -> float:
    """The best possible accuracy against the judge's labels: the mean of max(p, 1 - p). nan for pairs of a data set."""
    return float(np.mean([pair.certainty for pair in pairs]))


def label_pairs(
    prompt: list[int],
    text: str,
    responses: list[Response],
    scores: list[float],
    sharpness: float,
    rng: np.random.Generator,
) -> list[Pair]:
    """Let the judge compare every two different answers to one prompt.

    Args:
        prompt: its ids, as the model saw them.
        text: the same as text.
        responses: D answers.
        scores: D rule scores.
        sharpness: of the judge.
        rng: his errors; one number is drawn for each pair.

    Returns:
        At most D (D - 1) / 2 pairs. Two answers are equal if their texts are and both ended, or neither.
    """
    pairs = []
    for i, j in combinations(range(len(responses)), 2):
        if (responses[i].text, responses[i].ended) == (responses[j].text, responses[j].ended):
            continue
        p = judge_probability(scores[i], scores[j], sharpness)
        if rng.random() >= p:
            i, j = j, i
        margin, certainty = float(scores[i] - scores[j]), max(p, 1 - p)
        pairs.append(Pair(prompt, responses[i].ids, responses[j].ids, margin, certainty, text))
    return pairs


# --- sampling ---


def sample_pairs(
    model: GPT,
    tokenizer: BPETokenizer,
    instructions: list[Instruction],
    temperatures: tuple[float, ...] = TEMPERATURES,
    per_temperature: int = 1,
    sharpness: float = SHARPNESS,
    seed: int = 0,
) -> tuple[list[Pair], Sampled]:
    """Let a model answer instructions several times, and the judge compare the answers to each.

    Args:
        model: as part 6 trained it; it is left in training mode.
        tokenizer: its own.
        instructions: N of them, which the rules can score.
        temperatures: at which it answers.
        per_temperature: answers at each of them.
        sharpness: of the judge.
        seed: of the answers and of the labels.

    Returns:
        The pairs, those of one prompt next to each other, and what they were made of.

    Raises:
        UserError: fewer than two answers to a prompt, or a temperature or sharpness below 0.
    """
    draws = [temperature for temperature in temperatures for _ in range(per_temperature)]  # (D,)
    if len(draws) < 2:
        raise UserError(f"--temperatures {temperatures}: one answer makes no pair; give two temperatures or more")
    if not all(temperature >= 0 for temperature in temperatures):
        raise UserError(f"--temperatures {temperatures}: one is below 0; 0 always takes the likeliest token")
    if not 0 <= sharpness < math.inf:
        raise UserError(f"--sharpness {sharpness} is no number from 0 on; 0 throws a coin, 100 hardly ever errs")
    prompts = [instruction.prompt for instruction in instructions]
    columns = [
        respond(model, tokenizer, prompts, temperature, 1000 * seed + draw)
        for draw, temperature in enumerate(tqdm(draws, desc="sampling answers"))
    ]
    responses = [list(row) for row in zip(*columns, strict=True)]  # (N, D)
    scores = np.array(
        [
            [score(instruction, response.text, response.ended).total for response in row]
            for instruction, row in zip(instructions, responses, strict=True)
        ]
    )
    rng, T = np.random.default_rng(seed), model.config.block_size
    pairs = []
    for prompt, row, row_scores in zip(prompts, responses, scores.tolist(), strict=True):
        ids = encode_prompt((prompt,), tokenizer, T - min(T // 4, 64))  # exactly what `respond` gave to the model
        pairs += label_pairs(ids, prompt, row, row_scores, sharpness, rng)
    equal = len(responses) * math.comb(len(draws), 2) - len(pairs)
    return pairs, Sampled(draws, responses, scores, equal)


# --- files ---


def save_pairs(path: Path, pairs: list[Pair]) -> None:
    """Write pairs, a line of JSON each, ids as they are. A file is either there and whole, or not there.

    A run that goes on later then learns from the very same pairs, although the device may draw others by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w") as file:
        for pair in pairs:
            record = pair._asdict() | {"certainty": None if math.isnan(pair.certainty) else pair.certainty}
            file.write(json.dumps(record) + "\n")
    unfinished.replace(path)


def read_pairs(path: Path) -> list[Pair]:
    """Read what save_pairs wrote; UserError if it is something else, or not there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of pairs; start anew, so that they are made")
    pairs = []
    for number, record in enumerate(read_jsonl(path), 1):
        if not isinstance(record, dict) or record.keys() != set(Pair._fields):
            raise UserError(f"{path}: line {number} is no pair of ours; delete the file, so that it is made again")
        pairs.append(Pair(**record | {"certainty": math.nan if record["certainty"] is None else record["certainty"]}))
    return pairs
