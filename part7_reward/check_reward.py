"""Is the reward model worth anything? Sanity checks, each with the value that would be alarming.

Whatever a reward model gets wrong, training against it will find. So before anybody does, we ask: does it agree with
the judge on pairs that it has not seen; does it read the prompt; does it just measure length; does a number mean what
it should; does picking by it give better answers, by the rules, of which it saw noisy comparisons only; and which
nonsense does it like?

    python part7_reward/check_reward.py                           # 2.5 minutes on two CPU cores
    python part7_reward/check_reward.py --checkpoint runs/part7_reward/causal/best.pt
    python part7_reward/check_reward.py --data hf:ultrafeedback   # pairs of a data set: without the checks by rules

You should see a table with a line for each check that ends in ok or ALARM, the best of n answers for several n, and the
nonsense. Without a checkpoint it trains one first. It leaves checks.png and metrics.json in
runs/part7_reward/check_reward/.

References: checks.py names them.
"""

import json
import math
import sys
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from tqdm import tqdm

from checkpoint import read_checkpoint
from checks import (
    Calibration,
    Check,
    accuracy,
    best_of_n,
    bootstrap_interval,
    check_pairs,
    correlation,
    find_gibberish,
    known_stories,
    reword,
    same_order,
    surprise_alone,
)
from data import Pair, UserError, collate_responses, encode_prompt, load_pairs
from devices import pick_device
from generate import BASE, RUNS, find_checkpoint, load_checkpoint, printable, respond
from instructions import Instruction
from model import GPT
from pairs import pair_rewards, read_folder
from preferences import ceiling, story_prompts
from reward import RewardModel, load_reward_model, rewards
from rules import score
from tokenizer import BPETokenizer, describe_tokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

NS = (1, 4, 16, 64)
"""For which n the best of n answers is looked at."""
REWORDED = 8
"""Answers to each prompt that are judged a second time, under another wording of it."""
SEARCHES = 4
"""Prompts for which nonsense is searched for."""
SURPRISING = 3.0
"""Nats from which on a token is shown with its surprise."""


@dataclass
class Config:
    """Check a reward model."""

    checkpoint: Path = RUNS / "best.pt"
    """Checkpoint of the reward model. The default one is trained first if it is not there."""
    base: Path | None = None
    """Checkpoint of the model whose answers are judged. None: the one that the reward model was made of."""
    data: str = ""
    """Held-out pairs: the folder of a run's pairs, a .jsonl file, or hf:<name>[:split]. Empty: those of its own run."""
    prompts: int = 32
    """Held-out prompts to sample answers to."""
    samples: int = 64
    """Answers to each of them: of so many the best can be picked."""
    temperature: float = 1.0
    """At which they are sampled."""
    rounds: int = 40
    """Of the search for nonsense, with 8 candidates each, for each of four prompts."""
    seed: int = 0
    """Seed of the answers and of whatever else is drawn."""
    out: Path = RUNS / "check_reward"
    """Folder for the figure and metrics.json."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of them that is there."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- what is judged ---


def load_held_out(data: str, checkpoint: Path, model: RewardModel, tokenizer: BPETokenizer) -> list[Pair]:
    """Load the held-out pairs of a folder or a data set, or those beside the checkpoint if `data` is empty.

    Raises:
        UserError: there are none, or all have the same prompt.
    """
    folder = Path(data) if data else checkpoint.parent / "pairs"
    if not data and not folder.is_dir():
        raise UserError(f"{checkpoint} has no folder pairs beside it; give --data with some")
    if folder.is_dir():
        pairs = read_folder(folder, model.config)[1]
    else:
        pairs = load_pairs(data, tokenizer, model.config.block_size, 20_000)[1]  # some 400 of them are held out
    if len({tuple(pair.prompt) for pair in pairs}) < 2:
        raise UserError(f"--data {data or folder}: fewer than two held-out prompts; give more, to exchange them")
    return pairs


class Pool(NamedTuple):
    """P prompts with M sampled answers each, and what is known of these."""

    instructions: list[Instruction]
    """(P,) what was asked."""
    prompts: list[list[int]]
    """(P,) the same as ids."""
    answers: list[list[list[int]]]
    """(P, M) ids, exactly as they were drawn."""
    scores: np.ndarray
    """(P, M) rule scores, which the reward model never sees."""
    rewards: np.ndarray
    """(P, M)."""


def encode_prompts(prompts: list[str], tokenizer: BPETokenizer, T: int) -> list[list[int]]:
    """Encode prompts as `respond` does it."""
    return [encode_prompt((prompt,), tokenizer, T - min(T // 4, 64)) for prompt in prompts]


def judge(model: RewardModel, prompts: list[list[int]], answers: list[list[list[int]]]) -> np.ndarray:
    """Rewards of M answers to each of P prompts, (P, M); an answer that does not fit loses its end."""
    asked = [prompt for prompt, row in zip(prompts, answers, strict=True) for _ in row]
    T = model.config.block_size
    given = [ids[: T - len(prompt)] for prompt, row in zip(prompts, answers, strict=True) for ids in row]
    return rewards(model, asked, given).reshape(len(prompts), -1)


def sample_pool(base: GPT, model: RewardModel, tokenizer: BPETokenizer, config: Config) -> Pool:
    """Sample answers to held-out prompts, other ones than those of the pairs; judge them by rules and by rewards."""
    instructions, M = story_prompts(config.prompts, 1, True), config.samples
    answers, scores = [], []
    for n, asked in enumerate(tqdm(instructions, desc="sampling answers", disable=None)):
        seed = 1000 * config.seed + n
        row = respond(base, tokenizer, [asked.prompt] * M, config.temperature, seed, batch_size=M)
        answers.append([response.ids for response in row])
        scores.append([score(asked, response.text, response.ended).total for response in row])
    prompts = encode_prompts([asked.prompt for asked in instructions], tokenizer, model.config.block_size)
    return Pool(instructions, prompts, answers, np.array(scores), judge(model, prompts, answers))


# --- what rules can check ---


def check_pool(
    model: RewardModel, tokenizer: BPETokenizer, pool: Pool, seed: int
) -> tuple[list[Check], dict[str, np.ndarray]]:
    """Do the checks that need many answers to a prompt.

    Returns:
        The checks, and (len(NS), P) rule scores of the best of n: as rewards pick it, as the scores themselves do, and
        as surprise alone does.
    """
    reworded = encode_prompts([reword(asked, seed) for asked in pool.instructions], tokenizer, model.config.block_size)
    again = judge(model, reworded, [row[:REWORDED] for row in pool.answers])
    ns = [n for n in NS if n <= pool.scores.shape[1]]
    by = {"picked by reward": pool.rewards, "ideal: picked by rule score": pool.scores}
    if model.writer is not None:
        by["picked by surprise alone"] = judge(surprise_alone(model), pool.prompts, pool.answers)
    curves = {name: np.stack([best_of_n(values, pool.scores, n) for n in ns]) for name, values in by.items()}
    picked = curves["picked by reward"]  # (n, P)
    at = ns.index(16) if 16 in ns else len(ns) - 1
    gain = picked[at] - picked[0]
    low, high = bootstrap_interval(gain, seed=seed)
    agreement = same_order(pool.rewards[:, :REWORDED], again)
    above = [values - values.mean(axis=1, keepdims=True) for values in (pool.rewards, pool.scores)]
    checks = [
        Check("rewording_agreement", "order of answers when the prompt is reworded", agreement, 0.85),
        Check("score_correlation", "correlation with the rule score, within prompts", correlation(*above), 0.3),
        Check("best_of_n_gain", f"best of {ns[at]} against one [{low:.3f}, {high:.3f}]", gain.mean(), 0.15),
    ]
    if at < len(ns) - 1:
        more = (picked[-1] - picked[at]).mean()
        checks.append(Check("more_is_better", f"best of {ns[-1]} against best of {ns[at]}", more, -0.02))
    return checks, curves


def show_surprise(
    model: RewardModel, tokenizer: BPETokenizer, prompts: list[list[int]], ids: list[int], pairs: list[Pair]
) -> float:
    """Print an answer after its own prompt and after another one, and mark what surprises the writer in it.

    Returns:
        Accuracy on the pairs of surprise alone.
    """
    print(f"\nsurprise: one answer, after its own prompt and after another one; nats above {SURPRISING:g} in brackets")
    ids = ids[: model.config.block_size - max(map(len, prompts))]
    for name, prompt in zip(("its own", "another"), prompts, strict=True):
        idx, mask = collate_responses([prompt], [ids], model.pad)
        idx, mask = (some.to(model.head.weight.device) for some in (idx, mask))
        nats = model.surprise(idx, mask | (idx != model.pad), mask)[mask].tolist()
        said = zip([tokenizer.decode([token]) for token in ids], nats, strict=True)
        text = "".join(token + f"[{s:.1f}]" * (s > SURPRISING) for token, s in said)
        text = textwrap.shorten(printable(text), 340, placeholder=" [...]")
        print(textwrap.fill(f"{name} (mean {np.mean(nats):.2f}): {text}", 110, subsequent_indent="    "))
    chosen, rejected = pair_rewards(surprise_alone(model), pairs)
    found = accuracy(chosen - rejected)
    print(f"surprise alone, without what was learned of pairs: accuracy {found:.3f}")
    return found


def check_gibberish(
    model: RewardModel,
    tokenizer: BPETokenizer,
    prompts: list[list[int]],
    others: dict[str, list[list[int]]],
    config: Config,
) -> list[Check]:
    """Search for nonsense that gets high rewards, and print it beside other answers to the same prompts.

    Args:
        model: the judge.
        tokenizer: its own.
        prompts: P of them; the search is for the first ones.
        others: for each kind of answer one to each prompt, the best kind first.
        config: how long to search.
    """
    kinds = np.stack([judge(model, prompts, [[ids] for ids in some])[:, 0] for some in others.values()])  # (kinds, P)
    some, names = prompts[:SEARCHES], list(others)
    length = min(int(np.median([len(ids) for ids in others[names[0]]])), model.config.block_size - max(map(len, some)))
    found, value = find_gibberish(model, tokenizer, some, length, config.rounds, 8, config.seed)
    best = int((value - kinds[0, : len(some)]).argmax())
    levels = {name: kinds[i, : len(some)].mean() for i, name in enumerate(names)} | {"gibberish": value.mean()}
    print(f"\nmean reward, of {len(some)} prompts: " + ", ".join(f"{name} {v:.2f}" for name, v in levels.items()))
    for name, ids, number in (
        (names[0], others[names[0]][best], kinds[0, best]),
        ("gibberish", found[best], value[best]),
    ):
        text = textwrap.shorten(printable(tokenizer.decode(ids)), 400, placeholder=" [...]")
        print(textwrap.fill(f"{name} ({number:.2f}): {text}", 110, subsequent_indent="    "))
    above = value.mean() - levels[names[0]]
    return [
        Check("known_accuracy", f"{names[0]} answers before {names[1]} ones", accuracy(kinds[0] - kinds[1]), 0.7),
        Check("gibberish_reward", f"reward of gibberish above {names[0]} answers", above, most=0.0),
    ]


# --- what is printed and drawn ---


def draw(
    path: Path,
    pairs: list[Pair],
    found: np.ndarray,
    calibration: Calibration,
    pool: Pool | None,
    curves: dict[str, np.ndarray],
) -> None:
    """Draw calibration and reward against length and, with rules, best of n and reward against the rule score."""
    fig, axes = plt.subplots(2, 2 if pool else 1, figsize=(11 if pool else 6, 8), squeeze=False, layout="constrained")
    ax = axes[0, 0]
    ax.plot([0.5, 1], [0.5, 1], color="gray", linestyle=":", label="calibrated")
    ax.plot(calibration.confidence, calibration.right, color="tab:red", marker="o", label="held-out pairs")
    for x, y, n in zip(*calibration, strict=True):
        ax.annotate(f"{n}", (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7)
    ax.set(xlabel="predicted: sigmoid(|difference of rewards|)", ylabel="share preferred", title="Calibration")
    ax.legend()
    ax = axes[1, 0]
    lengths = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    ax.scatter(lengths, found.flatten(), s=6, alpha=0.4)
    ax.set(xlabel="tokens of the answer", ylabel="reward", title="Reward and length")
    if pool:
        ax, ns = axes[0, 1], NS[: len(next(iter(curves.values())))]
        for (name, curve), color in zip(curves.items(), ("tab:red", "tab:green", "tab:gray"), strict=False):
            low, high = np.array([bootstrap_interval(row) for row in curve]).T
            ax.plot(ns, curve.mean(axis=1), color=color, marker="o", label=name)
            ax.fill_between(ns, low, high, color=color, alpha=0.15)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ns, [str(n) for n in ns])
        ax.set(xlabel="n", ylabel="rule score", ylim=(0, 1), title="Best of n answers, 95% intervals over prompts")
        ax.legend()
        ax = axes[1, 1]
        above = pool.rewards - pool.rewards.mean(axis=1, keepdims=True)
        ax.scatter(pool.scores.flatten(), above.flatten(), s=4, alpha=0.3)
        ax.set(xlabel="rule score", ylabel="reward above the prompt's mean", title="Reward and rule score")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def print_table(checks: list[Check], curves: dict[str, np.ndarray]) -> None:
    """Print a line for each check, and the best of n, if there are any."""
    print(f"\n{'check':62s}{'value':>7s}   {'alarming':27s}")
    for check in checks:
        print(f"{check.name:62s}{check.value:7.3f}   {check.alarming():27s}{check.verdict()}")
    if curves:
        ns = NS[: len(next(iter(curves.values())))]
        print(f"\n{'rule score of the best of n':32s}" + "".join(f"{f'n = {n}':>9s}" for n in ns))
    for name, curve in curves.items():
        print(f"{name:32s}" + "".join(f"{mean:9.3f}" for mean in curve.mean(axis=1)))


def check_settings(config: Config) -> None:
    """Refuse settings with which nothing can be checked.

    Raises:
        UserError: it names the flag, its value and what to give instead.
    """
    for name, least in (("prompts", 2), ("samples", 4), ("rounds", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)} is below {least}; give {least} or more")
    if not 0 <= config.temperature < math.inf:
        raise UserError(f"--temperature {config.temperature} is not 0 or more; 1 is what the model believes")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; give a folder")


def load_base(config: Config, saved: str, tokenizer: BPETokenizer, device: torch.device) -> GPT:
    """Load the model whose answers are judged: --base, or the one that the reward model was made of.

    Raises:
        UserError: it is not there, or has another tokenizer than the reward model.
    """
    path = config.base or (Path(saved) if Path(saved).is_file() else BASE)  # runs may have moved since
    base, its_tokenizer = load_checkpoint(find_checkpoint(path, config.smoke), device)
    if describe_tokenizer(its_tokenizer) != describe_tokenizer(tokenizer):
        raise UserError(f"--base {path}: another tokenizer than the reward model's; give the model that it was made of")
    return base


def main(config: Config) -> None:
    """Do all checks, and print, draw and save what they found."""
    sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), prompts=3, samples=4, rounds=2)
    check_settings(config)
    torch.set_flush_denormal(True)
    device = pick_device(config.device)
    checkpoint = find_checkpoint(config.checkpoint, config.smoke)
    model, tokenizer = load_reward_model(checkpoint, device)
    pairs = load_held_out(config.data, checkpoint, model, tokenizer)
    checks, found, calibration = check_pairs(model, pairs, config.seed)
    pool, curves = None, {}
    if math.isnan(ceiling(pairs)):
        print("these pairs are of a data set: no checks that need rules, and no sampled answers")
        first = list({tuple(pair.prompt): pair for pair in pairs}.values())
        prompts = [pair.prompt for pair in first]
        known = {"chosen": [pair.chosen for pair in first], "rejected": [pair.rejected for pair in first]}
    else:
        base = load_base(config, read_checkpoint(checkpoint)["config"]["base"], tokenizer, device)
        pool = sample_pool(base, model, tokenizer, config)
        more, curves = check_pool(model, tokenizer, pool, config.seed)
        checks += more
        prompts, known = pool.prompts, known_stories(pool.instructions, tokenizer, config.seed)
    alone = {}
    if model.writer is not None:
        alone["surprise_accuracy"] = show_surprise(model, tokenizer, prompts[:2], next(iter(known.values()))[0], pairs)
    checks += check_gibberish(model, tokenizer, prompts, known, config)
    print_table(checks, curves)
    alarms = sum(check.verdict() == "ALARM" for check in checks)
    numbers = {check.key: float(check.value) for check in checks if math.isfinite(check.value)}
    numbers |= {"alarms": alarms, "held_out_pairs": len(pairs)} | ({"ceiling": ceiling(pairs)} if pool else {})
    numbers |= alone
    for key, curve in zip(("best_of", "ideal_best_of", "surprise_best_of"), curves.values(), strict=False):
        numbers |= {f"{key}_{n}": mean for n, mean in zip(NS, curve.mean(axis=1).tolist(), strict=False)}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    draw(config.out / "checks.png", pairs, found, calibration, pool, curves)
    print(f"\n{alarms} of {len(checks)} checks alarm; wrote checks.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
