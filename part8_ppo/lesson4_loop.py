"""Lesson 8.4: the loop on paper, one small rollout followed from the prompt to the gradient.

A turn of PPO has six stations: draw answers, look back at every token of them with the policy, the critic and the
reference, judge the whole answers, share the scores out as a reward for each token, make advantages of those, and take
a few steps. The lesson stops at each of them, says which tensors there are and of what shape, and computes them a
second time in the most naive way: one row at a time, without padding, cache or mask. The model has a vocabulary of 16
words, and everything in it is random, the judge's taste too. The loop raises whatever the judge likes; so what is seen
here is the machine, not its use. Last the drawing is timed, for most of a turn is spent on it.

    python part8_ppo/lesson4_loop.py     # 15 seconds on two CPU cores; eight sections, and a figure

You should see every station equal to its naive version; a first ratio of exactly 1, at which clipping does nothing; a
gradient at the scores of a token that is -A (1 - p) for its word and A p for all others; a score that rises over the
turns, at the price of a KL; and rollouts six times as fast as one answer at a time, or more.

References: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2; Stiennon et al. 2020,
"Learning to summarize from human feedback", section 3.4; Schulman et al. 2017, "Proximal Policy Optimization
Algorithms", section 3 and algorithm 1; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", section 7.
"""

import copy
import json
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from model import GPT, GPTConfig
from policy import Policy
from ppo import explained_variance, gae, kl_estimate, masked_mean, ppo_policy_loss, shape_rewards, value_loss, whiten
from reward import RewardModel
from rollout import Rollout, Scores, judge, roll_out, score_tokens

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name
WORDS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "Ida", "Tom", "the", "a", "red", "old", "lamp", "boat"]
WORDS += ["found", "lost", "here", "."]  # V = 16
PAD, END = 0, 1
PROMPTS = ("Ida found a lamp", "the boat", "Tom lost the old red boat", "a lamp")
COPIES, EPOCHS = 16, 2  # answers to each prompt in a turn; how often a turn goes through them, in two minibatches
MAX_NEW_TOKENS, TEMPERATURE, LR = 10, 0.8, 1e-3
GAMMA, LAM, CLIP, VALUE_WEIGHT = 1.0, 0.95, 0.2, 0.5
PENALTY = 1.0  # taken off the score of an answer without an end


@dataclass
class Config:
    """Follow a rollout, and turn the loop."""

    turns: int = 40
    """Turns of the loop. The rollout that is followed is drawn after a fifth of them."""
    beta: float = 0.05
    """Weight of the KL penalty in the reward of a token."""
    seed: int = 0
    """Seed of all weights and draws."""
    out: Path = RUNS / "lesson4_loop"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


class Players(NamedTuple):
    """Who takes part. mean and std are of the judge's scores of the reference's answers to training prompts."""

    policy: Policy
    reference: Policy
    judge: RewardModel
    mean: float
    std: float


class Turn(NamedTuple):
    """What is known of B answers of T tokens before the first step; old is of the policy that drew them."""

    rollout: Rollout
    old: Scores
    ref_logp: torch.Tensor  # (B, T)
    scores: torch.Tensor  # (B,) of the judge, normalised, with the penalty
    rewards: torch.Tensor  # (B, T)
    advantages: torch.Tensor  # (B, T), whitened
    returns: torch.Tensor  # (B, T), what the critic should have said


# --- the loop ---


def make_players(config: Config) -> Players:
    """A random policy, a copy of it as the reference, and a random judge with the statistics of its scores."""
    torch.manual_seed(config.seed)
    shape = GPTConfig(vocab_size=len(WORDS), block_size=24, n_layer=2, n_head=2, n_embd=32)
    policy = Policy(GPT(shape)).eval()  # evaluation mode for good: there is no dropout in this loop
    reference = copy.deepcopy(policy).requires_grad_(False)
    judges = RewardModel(GPT(shape), PAD).eval()
    found = judge(judges, draw_answers(policy, torch.Generator().manual_seed(config.seed)))
    return Players(policy, reference, judges, found.mean().item(), found.std().item())


def draw_answers(policy: Policy, generator: torch.Generator, copies: int = COPIES) -> Rollout:
    """Answer each of the prompts so many times, in one batch."""
    texts = [f"<|user|> {text} <|assistant|>" for text in PROMPTS] * copies
    prompts = [[WORDS.index(word) for word in text.split()] for text in texts]
    return roll_out(policy, prompts, PAD, END, TEMPERATURE, MAX_NEW_TOKENS, generator, len(prompts))


@torch.no_grad()
def look_back(players: Players, rollout: Rollout, config: Config) -> Turn:
    """All stations between the draw and the first step."""
    old, mask = score_tokens(players.policy, rollout, TEMPERATURE), rollout.mask
    ref_logp = score_tokens(players.reference, rollout, TEMPERATURE, with_entropy=False).logp
    scores = (judge(players.judge, rollout) - players.mean) / players.std - PENALTY * ~rollout.ended
    rewards = shape_rewards(scores, old.logp, ref_logp, mask, config.beta)
    advantages, returns = gae(rewards, old.values, mask, GAMMA, LAM)
    return Turn(rollout, old, ref_logp, scores, rewards, whiten(advantages, mask), returns)


def losses(policy: Policy, turn: Turn, rows: torch.Tensor) -> tuple[Scores, list[torch.Tensor]]:
    """Score some rows anew: their scores, and [policy loss, its clip fraction, value loss, its clip fraction]."""
    part = turn.rollout.rows(rows)
    now = score_tokens(policy, part, TEMPERATURE, with_entropy=False)
    pi = ppo_policy_loss(now.logp, turn.old.logp[rows], turn.advantages[rows], part.mask, CLIP)
    v = value_loss(now.values, turn.old.values[rows], turn.returns[rows], part.mask, CLIP)
    return now, [*pi, *v]


def improve(policy: Policy, optimizer: torch.optim.Optimizer, turn: Turn) -> float:
    """The steps of a turn; the mean clip fraction."""
    fractions = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(turn.scores)).chunk(2):
            _, (pi, fraction, v, _) = losses(policy, turn, rows)
            optimizer.zero_grad()
            (pi + VALUE_WEIGHT * v).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            fractions.append(fraction.item())
    return sum(fractions) / len(fractions)


def run_loop(players: Players, config: Config) -> tuple[list[dict[str, float]], Players]:
    """Turn the loop; what each turn measured, and the players as they were after a fifth of the turns."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    optimizer = torch.optim.Adam(players.policy.parameters(), lr=LR)
    measured, early = [], players
    for step in tqdm(range(config.turns), desc="turning the loop", disable=None, leave=False):
        if step == config.turns // 5:
            early = players._replace(policy=copy.deepcopy(players.policy))
        turn = look_back(players, draw_answers(players.policy, generator), config)
        mask = turn.rollout.mask
        numbers = {
            "score": turn.scores.mean().item(),
            "kl": (kl_estimate(turn.old.logp, turn.ref_logp, "k3") * mask).sum(dim=1).mean().item(),
            "entropy": masked_mean(turn.old.entropy, mask).item(),
            "ended": turn.rollout.ended.float().mean().item(),
            "explained_variance": explained_variance(turn.old.values, turn.returns, mask),
        }
        measured.append(numbers | {"clip_fraction": improve(players.policy, optimizer, turn)})
    return measured, early


# --- stations 1 to 3: from prompts to scores ---


@torch.no_grad()
def draw_by_hand(trunk: GPT, prompt: list[int], chances: list[float]) -> list[int]:
    """Answer one prompt: no cache, no batch; the first word at which the probabilities add up to more than chance."""
    answer: list[int] = []
    for chance in chances:
        logits = trunk(torch.tensor([prompt + answer]))[0][0, -1].double()  # (1, T, V) -> (V,)
        below, word = 0.0, -1
        while below <= chance and word < len(logits) - 1:
            word += 1
            below += torch.softmax(logits / TEMPERATURE, dim=0)[word].item()
        answer.append(word)
        if word == END:
            break
    return answer


def show_rollout(players: Players, config: Config) -> Rollout:
    """Station 1: four prompts, an answer each, and the same answers drawn one at a time."""
    rollout = draw_answers(players.policy, torch.Generator().manual_seed(config.seed + 2), copies=1)
    (B, width), T = rollout.idx.shape, rollout.response.shape[1]
    print(
        f"1. draw: idx ({B}, {width - T} + {T}), of which n_pad {rollout.n_pad.tolist()} is padding on the left;",
        end=" ",
    )
    print(f"mask and logp ({B}, {T}), ended {rollout.ended.int().tolist()}")
    chances = torch.rand(B, MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(config.seed + 2)).tolist()
    for prompt, answer, chance in zip(rollout.prompts, rollout.responses, chances, strict=True):
        print("  ", *(WORDS[i] for i in prompt), "->", *(WORDS[i] for i in answer))
        assert draw_by_hand(players.policy.trunk, prompt, chance) == answer
    print("   one row at a time, without cache and padding: the same words")
    return rollout


@torch.no_grad()
def show_scores(players: Players, turn: Turn) -> dict[str, float]:
    """Stations 2 and 3: log-probabilities, values and scores, against loops over rows and tokens."""
    rollout, (B, T) = turn.rollout, turn.rollout.mask.shape
    logp, values, raw = torch.zeros(B, T), torch.zeros(B, T), torch.zeros(B)
    for row, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        for t, word in enumerate(answer):  # the state in which a word was drawn is all before it
            logits, value = players.policy(torch.tensor([prompt + answer[:t]]))
            logp[row, t] = torch.softmax(logits[0, -1] / TEMPERATURE, dim=0)[word].log()
            values[row, t] = value[0, -1]
        alone = torch.tensor([prompt + answer])
        raw[row] = players.judge(alone, torch.arange(alone.shape[1])[None] >= len(prompt))[0]
    scores = (raw - players.mean) / players.std - PENALTY * (1 - rollout.ended.float())
    again = score_tokens(players.policy, rollout, TEMPERATURE)
    pairs = ((turn.old.logp, logp), (turn.old.values, values), (turn.scores, scores))
    far = [(ours - by_hand).abs().max().item() for ours, by_hand in pairs]
    drift = (turn.old.logp - rollout.logp).abs().max().item()
    print(f"\n2. look back: logp, value, entropy of {int(rollout.mask.sum())} tokens in one pass; reference's logp too")
    print(f"   farthest from a pass for each token alone: logp {far[0]:.1e}, value {far[1]:.1e}")
    print(f"   from the log-probability kept while drawing: {drift:.1e}; from a second pass like this one:", end=" ")
    print(f"{(again.logp - turn.old.logp).abs().max().item()}")
    assert max(far) < 1e-4 and drift < 1e-4 and torch.equal(again.logp, turn.old.logp)
    print(f"\n3. judge: the ids as drawn; then minus {players.mean:.2f}, over {players.std:.2f};", end=" ")
    print(f"{PENALTY:g} off without an end")
    for row in range(B):
        print(f"   {raw[row]:+.2f} -> {turn.scores[row]:+.2f}  ", *(WORDS[i] for i in rollout.responses[row]))
    return {"logp_drift": drift, "logp_error": far[0], "value_error": far[1]}


# --- stations 4 and 5: from scores to advantages ---


def show_advantages(turn: Turn, config: Config) -> None:
    """A reward for each token, and its advantage, by the definitions in loops; then one row as a table."""
    old, mask, all_advantages, row = turn.old, turn.rollout.mask, [], int(turn.rollout.ended.int().argmax())
    for b, answer in enumerate(turn.rollout.responses):
        n = len(answer)
        rewards = [-config.beta * (old.logp[b, t] - turn.ref_logp[b, t]).item() for t in range(n)]
        rewards[-1] += turn.scores[b].item()
        values = [*old.values[b, :n].tolist(), 0.0]  # nothing is expected after the last token
        deltas = [rewards[t] + GAMMA * values[t + 1] - values[t] for t in range(n)]
        advantages = [sum((GAMMA * LAM) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        assert torch.allclose(turn.rewards[b, :n], torch.tensor(rewards), atol=1e-5)
        assert torch.allclose(turn.returns[b, :n] - old.values[b, :n], torch.tensor(advantages), atol=1e-5)
        all_advantages += advantages
    white = (np.array(all_advantages) - np.mean(all_advantages)) / np.std(all_advantages)
    assert np.allclose(turn.advantages[mask], white, atol=1e-3)
    print("\n4. and 5. rewards, advantages, returns, (B, T) each, equal to loops; the first answer that has an end:")
    print("   token              logp   ref logp     reward      value    return   advantage, whitened")
    columns = (old.logp, turn.ref_logp, turn.rewards, old.values, turn.returns, turn.advantages)
    for t, word in enumerate(turn.rollout.responses[row]):
        print(f"   {WORDS[word]:14s}" + "".join(f"{column[row, t]:+10.3f} " for column in columns))


# --- station 6: losses, gradient, steps ---


def losses_by_hand(now: Scores, turn: Turn) -> tuple[float, float]:
    """Policy loss and value loss over all tokens that were drawn, one token at a time."""
    columns = (now.logp, turn.old.logp, turn.advantages, now.values, turn.old.values, turn.returns)
    tokens = list(zip(*(column[turn.rollout.mask].tolist() for column in columns), strict=True))
    pi = v = 0.0
    for logp, old_logp, advantage, value, old_value, target in tokens:
        ratio = math.exp(logp - old_logp)
        pi += max(-advantage * ratio, -advantage * min(max(ratio, 1 - CLIP), 1 + CLIP))
        near = min(max(value, old_value - CLIP), old_value + CLIP)
        v += max((value - target) ** 2, (near - target) ** 2) / 2
    return pi / len(tokens), v / len(tokens)


def show_gradient(players: Players, turn: Turn) -> dict[str, float]:
    """Six steps on all answers: each loss against the loops, and the first one's gradient against its closed form."""
    policy, mask, metrics = copy.deepcopy(players.policy), turn.rollout.mask, {}
    optimizer, words = torch.optim.Adam(policy.parameters(), lr=LR), turn.rollout.response[mask]  # (N,)
    print(f"\n6. steps on all {len(words)} tokens; right: they moved where their advantage says")
    print("   step              ratios   clipped   right   policy loss   value loss")
    for step in range(7):
        now, (pi, fraction, v, _) = losses(policy, turn, torch.arange(len(mask)))
        by_hand = losses_by_hand(now, turn)
        assert abs(by_hand[0] - pi.item()) < 1e-5 and abs(by_hand[1] - v.item()) < 1e-5
        now.logits.retain_grad()
        optimizer.zero_grad()
        (pi + VALUE_WEIGHT * v).backward()
        ratio = (now.logp - turn.old.logp).detach().exp()[mask]  # (N,)
        if step == 0:
            assert bool((ratio == 1).all()) and fraction == 0
            p, drawn = (now.logits / TEMPERATURE).softmax(dim=-1), nn.functional.one_hot(words, len(WORDS))  # (N, V)
            closed = -turn.advantages[mask][:, None] * (drawn - p) / (len(words) * TEMPERATURE)
            metrics["gradient_error"] = (now.logits.grad - closed).abs().max().item()
            assert metrics["gradient_error"] < 1e-6
        optimizer.step()
        right = ((ratio - 1) * turn.advantages[mask] > 0).float().mean().item()
        metrics |= {f"clip_fraction_step{step}": fraction.item(), f"right_step{step}": right}
        print(f"   {step:4d}   {ratio.min():7.3f} .. {ratio.max():.3f} {fraction:9.2f} {right:7.2f}", end="")
        print(f"{pi.item():+14.4f} {v.item():12.4f}")
    print(
        "   both losses equal to loops at every step; at step 0, where every ratio is 1, the gradient at the scores of"
    )
    print(f"   a token is -A (1[drawn] - p) / (N temperature), up to {metrics['gradient_error']:.1e}")
    return metrics


def show_turns(measured: list[dict[str, float]]) -> dict[str, float]:
    """The turns of the loop as a table; the first and the last as metrics."""
    print(f"\n7. the loop, {len(measured)} turns of {COPIES * len(PROMPTS)} answers")
    print("   turn" + "".join(f"{name.replace('_', ' '):>20s}" for name in measured[0]))
    for step in sorted({*range(0, len(measured), max(1, len(measured) // 5)), len(measured) - 1}):
        print(f"   {step:4d}" + "".join(f"{number:20.3f}" for number in measured[step].values()))
    ends = {"first": measured[0], "last": measured[-1]}
    return {f"{name}_{when}": number for when, numbers in ends.items() for name, number in numbers.items()}


# --- how fast answers are drawn ---


def time_rollouts(config: Config) -> dict[str, float]:
    """Tokens a second, those after an end not counted: one answer at a time, a batch, and a batch that rows leave."""
    torch.manual_seed(config.seed)
    V = 128  # random weights draw the end once in V tokens: answers of about 100
    T, n = (20, 4) if config.smoke else (200, 128)
    trunk = GPT(GPTConfig(vocab_size=V, block_size=256, n_layer=2, n_head=4, n_embd=128)).eval()
    prompts = [torch.randint(2, V, (length,)).tolist() for length in torch.randint(20, 45, (n,)).tolist()]
    ways = {
        "one answer at a time": (prompts[:4], END, 1),
        "a batch, ended rows stay": (prompts, -1, n),  # no id is -1: who has written the end goes on behind it
        "a batch, ended rows leave": (prompts, END, n),
    }
    print(f"\n8. {n} answers of at most {T} tokens, by a model of {trunk.num_parameters():,} parameters")
    rates = {}
    for name, (some, end, batch_size) in ways.items():
        for _ in range(2):  # the first time is slower than all others
            generator, started = torch.Generator().manual_seed(config.seed), time.perf_counter()
            ids = roll_out(trunk, some, PAD, end, 1.0, T, generator, batch_size).response  # (B, T)
            seconds = time.perf_counter() - started
        ends = ids == END
        rates[name] = int((ends.cumsum(dim=1) == ends).sum()) / seconds  # no end before this token
        print(f"   {name:26s}{rates[name]:9,.0f} tokens/s{rates[name] / rates['one answer at a time']:8.1f} times")
    return {f"tokens_per_second_{name.replace(', ', '_').replace(' ', '_')}": rate for name, rate in rates.items()}


# --- the figure ---

STATIONS = (
    "prompts\nB lists of ids|1. draw\nidx (B, P+T)\nmask, logp (B, T)|2. look back\nlogp, values,\nref_logp (B, T)|"
    "3. judge\nscores (B,)|4. rewards\n(B, T)|5. advantages\nreturns (B, T)|6. losses\ngradient\nsome steps"
)


def draw(path: Path, turn: Turn, measured: list[dict[str, float]]) -> None:
    """Draw the stations, one answer's tokens at each of them, and the turns of the loop."""
    layout = {"figsize": (15, 6), "height_ratios": (1, 3), "layout": "constrained"}
    fig, axes = plt.subplot_mosaic([["path"] * 2, ["row", "loop"]], **layout)
    axes["path"].axis("off")
    for i, text in enumerate(STATIONS.split("|")):
        box = {"boxstyle": "round,pad=0.6", "facecolor": f"C{i}", "alpha": 0.3}
        axes["path"].text((i + 0.5) / 7, 0.5, text, ha="center", va="center", bbox=box)
        axes["path"].text(i / 7, 0.5, "\u2192" if i else "", ha="center", va="center", fontsize=16)
    row = int(turn.rollout.ended.int().argmax())
    answer, old = turn.rollout.responses[row], turn.old
    columns = {"logp": old.logp, "ref logp": turn.ref_logp, "reward": turn.rewards, "value": old.values}
    columns |= {"return": turn.returns, "advantage": turn.advantages}
    table = torch.stack([column[row, : len(answer)] for column in columns.values()])  # (6, T)
    axes["row"].imshow(table, cmap="RdBu", vmin=-6, vmax=6, aspect="auto")
    for (y, x), number in zip(torch.cartesian_prod(*map(torch.arange, table.shape)), table.flatten(), strict=True):
        axes["row"].text(x, y, f"{number:.2f}", ha="center", va="center", fontsize=7)
    axes["row"].set_xticks(range(len(answer)), [WORDS[i] for i in answer], rotation=45)
    axes["row"].set_yticks(range(len(columns)), list(columns))
    axes["row"].set_title("one answer, token by token")
    for name in ("score", "kl", "ended", "clip_fraction"):
        axes["loop"].plot([numbers[name] for numbers in measured], label=name)
    axes["loop"].legend(title="turn by turn")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """Turn the loop, follow a rollout of one of its first turns through all stations, and time the drawing."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), turns=5)
    torch.set_flush_denormal(True)
    measured, players = run_loop(make_players(config), config)
    turn = look_back(players, show_rollout(players, config), config)
    metrics = show_scores(players, turn)
    show_advantages(turn, config)
    metrics |= show_gradient(players, turn) | show_turns(measured)
    metrics |= time_rollouts(config)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "loop.png", turn, measured)
    print(f"\nwrote loop.png and metrics.json to {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
