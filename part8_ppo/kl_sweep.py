"""How reward hacking looks: the same training with a shorter and a longer leash, and none.

The reward model was learned from pairs of answers that the reference wrote. Near the reference it knows what it talks
about; further away it guesses, and PPO looks for the places where it guesses too high. So there are two curves over the
distance from the reference: what the reward model says, which rises and rises, and the rule score, which nobody learns
from: it rises, and with too long a leash it falls again. What writes the highest rewards is then no good story.

The distance is the KL to the reference in nats per answer. Beside the runs stands the best of n answers of the
reference, picked by the same reward model: no training at all, and a KL of log n - (n - 1) / n.

    python part8_ppo/kl_sweep.py                             # 12 runs: more than an hour on two CPU cores
    python part8_ppo/kl_sweep.py --betas 0 0.1 --seeds 0     # two of them

A run that is there already is not repeated, and one that was stopped goes on: start the same command again. You should
see a table with a line for each beta, and what the most hacked policy writes. It leaves a folder for each run,
kl_sweep.png and metrics.json in runs/part8_ppo/kl_sweep/.

References: Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization", sections 2 and 3 (both curves, the best
of n and its KL); Stiennon et al. 2020, "Learning to summarize from human feedback", section 4.3.
"""

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro

from checkpoint import read_checkpoint
from data import UserError
from devices import Processes, pick_device
from environment import Environment, Prompts, prepare, seed_of
from experience import PPOConfig
from generate import BASE, REWARD, RUNS, load_checkpoint
from policy import Policy
from rollout import Rollout
from rules import score
from train import Config as RunConfig
from train import train
from watch import show_answers

matplotlib.use("Agg")  # figures go to files; a screen may not be there

SHOWN = 3
"""Prompts to which the most hacked policy's answers are printed."""


@dataclass
class Config:
    """Train policies with several weights of the KL, and compare what the reward model and the rules say of them."""

    betas: tuple[float, ...] = (0.0, 0.02, 0.1, 0.5)
    """Weights of the KL to the reference in the reward; 0 is no leash at all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs with each of them."""
    base: Path = BASE
    """Checkpoint of the fine-tuned model. Trained if not there."""
    reward: Path = REWARD
    """Checkpoint of the reward model. Trained if not there."""
    steps: int = 30
    """Iterations of a run: enough to go too far."""
    rollouts: int = 128
    """Prompts that are answered in each."""
    lr: float = RunConfig.lr
    """Highest learning rate of AdamW."""
    prompts: int = 48
    """Held-out prompts for the best of n."""
    samples: int = 32
    """Answers to each of them; n goes up to this."""
    out: Path = RUNS / "kl_sweep"
    """Folder for the runs, the figure and metrics.json."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of them that is there."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- the runs ---


class Run(NamedTuple):
    """A run that has ended: its evaluations in turn, (K,) each."""

    beta: float
    seed: int
    folder: Path
    kl: np.ndarray
    """Nats per answer."""
    reward: np.ndarray
    """Of the reward model, in standard deviations from the mean of the reference."""
    rule_score: np.ndarray
    """In [0, 1]."""

    def fall(self) -> float:
        """How far the rule score has fallen from its highest value on the way; 0 if it ends there."""
        return float(self.rule_score.max() - self.rule_score[-1])


def settings_of(config: Config, beta: float, seed: int) -> RunConfig:
    """The settings of one run."""
    out = config.out / f"beta_{beta:g}_seed_{seed}"
    found = RunConfig(base=config.base, reward=config.reward, out=out, steps=config.steps, lr=config.lr, seed=seed)
    found = replace(found, eval_every=3, eval_prompts=128, device=config.device, resume="auto")
    found = replace(found, ppo=PPOConfig(beta=beta, rollouts=config.rollouts))
    if config.smoke:
        tiny = replace(found.ppo, rollouts=4, minibatches=1, accumulate=1, max_new_tokens=48, norm_prompts=8)
        found = replace(found, ppo=tiny, warmup_steps=1, eval_every=1, eval_prompts=4, test_prompts=4, log="none")
    return found


def read_run(settings: RunConfig) -> Run:
    """Read the evaluations of a run that has ended.

    Raises:
        UserError: it was made with other settings, so it belongs to another sweep.
    """
    saved = read_checkpoint(settings.out / "best.pt")
    for name, wanted in (("steps", settings.steps), ("lr", settings.lr), ("rollouts", settings.ppo.rollouts)):
        if saved["config"][name] != wanted:
            raise UserError(f"{settings.out} has a run with --{name} {saved['config'][name]}; give another --out")
    scores = [numbers for _, numbers in saved["progress"]["val_losses"]]
    columns = ([numbers[name] for numbers in scores] for name in ("kl_to_reference", "reward", "rule_score"))
    return Run(settings.ppo.beta, settings.seed, settings.out, *map(np.array, columns))


def make_runs(config: Config) -> list[Run]:
    """Do all runs that have not been done.

    Raises:
        UserError: see train.train and read_run.
        KeyboardInterrupt: a run was asked to stop.
    """
    found = []
    for beta in config.betas:
        for seed in config.seeds:
            settings = settings_of(config, beta, seed)
            if not (settings.out / "metrics.json").is_file():
                print(f"--- beta {beta:g}, seed {seed}", flush=True)
                if "reward_after" not in train(settings, Processes(), pick_device(config.device)):
                    raise KeyboardInterrupt
            found.append(read_run(settings))
    return found


# --- the best of n ---


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


def rule_scores(rollout: Rollout, asked: Sequence[Any], environment: Environment) -> list[float]:
    """The rule score of each answer, in [0, 1]."""
    texts = [environment.tokenizer.decode(ids) for ids in rollout.responses]
    judged = zip(asked, texts, rollout.ended.tolist(), strict=True)
    return [score(some.instruction, text, ended).total for some, text, ended in judged]


def curve_of_best(environment: Environment, prompts: Prompts, n_prompts: int, samples: int) -> np.ndarray:
    """Let the reference answer, and pick the best of n answers by the reward model, for n = 1, 2, 4, ... samples.

    Args:
        environment: with the yardstick of a run, so that rewards have the same unit.
        prompts: held-out ones are taken.
        n_prompts: P.
        samples: M, answers to each.

    Returns:
        (4, K): n, the KL to the reference in nats, the mean reward and the mean rule score.
    """
    asked = prompts.held_out(n_prompts)
    rewards, scores = np.zeros((2, len(asked), samples))
    for i, one in enumerate(asked):
        rollout = environment.answer(environment.reference, [one] * samples, seed_of(i))
        rewards[i] = environment.judge(rollout).cpu().numpy()
        scores[i] = rule_scores(rollout, [one] * samples, environment)
    ns = [2**k for k in range(samples.bit_length()) if 2**k <= samples]
    rows = [
        (n, math.log(n) - (n - 1) / n, best_of_n(rewards, rewards, n).mean(), best_of_n(rewards, scores, n).mean())
        for n in ns
    ]
    return np.array(rows).T


# --- what is printed and drawn ---


def summarise(runs: list[Run]) -> dict[str, float]:
    """Means over the seeds of one beta: how far, and what reward and rules say at the end and at best."""
    return {
        "kl_to_reference": float(np.mean([run.kl[-1] for run in runs])),
        "reward": float(np.mean([run.reward[-1] for run in runs])),
        "rule_score_before": float(np.mean([run.rule_score[0] for run in runs])),
        "rule_score_peak": float(np.mean([run.rule_score.max() for run in runs])),
        "rule_score": float(np.mean([run.rule_score[-1] for run in runs])),
    }


def print_tables(runs: list[Run], best: np.ndarray) -> dict[str, float]:
    """Print a line for each beta, and one for each n of the best of n; returns all numbers under flat names."""
    metrics = {}
    print(f"\n{'beta':>8} {'KL':>8} {'reward':>8} {'rule score: before':>20} {'at best':>9} {'at the end':>11}")
    for beta in sorted({run.beta for run in runs}):
        some = summarise([run for run in runs if run.beta == beta])
        kl, reward, *rules = some.values()
        print(f"{beta:8g} {kl:8.2f} {reward:8.2f} {rules[0]:20.3f} {rules[1]:9.3f} {rules[2]:11.3f}")
        metrics |= {f"{name}_beta_{beta:g}": value for name, value in some.items()}
    print(f"\n{'best of':>8} {'KL':>8} {'reward':>8} {'rule score':>12}")
    for n, kl, reward, rule_score in best.T:
        print(f"{n:8.0f} {kl:8.2f} {reward:8.2f} {rule_score:12.3f}")
        metrics |= {f"reward_best_of_{n:.0f}": float(reward), f"rule_score_best_of_{n:.0f}": float(rule_score)}
    return metrics


def plot_sweep(path: Path, runs: list[Run], best: np.ndarray) -> None:
    """Draw reward and rule score over the distance from the reference; the same colour is the same beta."""
    betas = sorted({run.beta for run in runs})
    colors = dict(zip(betas, plt.cm.viridis(np.linspace(0, 0.9, len(betas))), strict=True))
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for run in runs:
        label = f"beta {run.beta:g}" if run.seed == min(other.seed for other in runs) else None
        style = {"color": colors[run.beta], "marker": "o", "markersize": 3, "linewidth": 1, "label": label}
        axes[0].plot(np.sqrt(run.kl), run.reward, **style)
        axes[1].plot(np.sqrt(run.kl), run.rule_score, **style)
    for ax, values, title in zip(
        axes, best[2:], ("what the reward model says", "what the rules say, which nobody learns from"), strict=True
    ):
        ax.plot(np.sqrt(best[1]), values, color="black", linestyle="--", marker="x", label="best of n, no training")
        ax.set(xlabel="distance: square root of the KL to the reference (nats per answer)", title=title)
        ax.legend()
    axes[0].set_ylabel("reward (standard deviations of the reference's)")
    axes[1].set_ylabel("rule score")
    fig.savefig(path, dpi=120)
    plt.close(fig)


# --- the command line ---


def main(config: Config) -> None:
    """Do the runs, compare them, and show what hacking writes."""
    if not config.betas or not config.seeds:
        raise UserError("--betas and --seeds: one of each at least; leave a flag out for the usual ones")
    if config.prompts < 1 or config.samples < 1:
        raise UserError(f"--prompts {config.prompts} --samples {config.samples}: give 1 or more of both")
    if config.smoke:
        out = Path(tempfile.mkdtemp()) if config.out == RUNS / "kl_sweep" else config.out
        config = replace(config, out=out, betas=config.betas[:2], seeds=config.seeds[:1], steps=2)
        config = replace(config, prompts=2, samples=4)
    device = pick_device(config.device)
    settings = settings_of(config, config.betas[0], config.seeds[0])
    _, environment, prompts, found = prepare(replace(settings, smoke=config.smoke), Processes(), device)
    # What a smoke run has made for itself, all of its runs begin with.
    config = replace(config, base=Path(found["base"]), reward=Path(found["reward"]))
    runs = make_runs(config)
    environment.mean, environment.std = read_checkpoint(runs[0].folder / "best.pt")["progress"]["yardstick"]
    best = curve_of_best(environment, prompts, config.prompts, config.samples)
    metrics = print_tables(runs, best)
    most = max(runs, key=Run.fall)
    print(f"\nthe policy whose rule score fell most: beta {most.beta:g}, seed {most.seed}, by {most.fall():.3f}")
    policy = Policy(load_checkpoint(most.folder / "best.pt", device)[0])
    show_answers(environment, {"policy": policy, "reference": environment.reference}, prompts.held_out(SHOWN), SHOWN)
    plot_sweep(config.out / "kl_sweep.png", runs, best)
    metrics |= {"largest_fall": most.fall(), "runs": len(runs)}
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\nwrote kl_sweep.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
