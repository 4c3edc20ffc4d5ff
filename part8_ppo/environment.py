"""The environment: what stands outside of the policy and does not learn. Who asks, who judges, and what to stay near.

    Prompts      -> what is asked, in training and of the held-out kind
    Environment  -> answers of a policy, their rewards, and what the reference thinks of them

Prompts and random numbers follow from the seed and the number of the iteration alone. So a run that goes on asks what
it would have asked; and several processes, which share the rows of an iteration, ask what one would.

Shapes: B rows of this process, T tokens of the longest answer.

References: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2; Huang et al. 2024,
"The N+ Implementation Details of RLHF with PPO" (rewards normalised by those of the reference, dropout off).
"""

import copy
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data import UserError, chat_tokens, encode_prompt, load_prompts
from devices import Processes, from_main
from experience import Experience, PPOConfig, fit_values, score_answers, score_pieces
from generate import find_checkpoint, load_checkpoint
from instructions import Instruction, make_instructions
from model import CausalSelfAttention, GPTConfig
from moe import MoE
from optim import placed_like
from policy import Policy
from reward import RewardModel, load_reward_model
from rollout import Rollout, judge, roll_out
from tokenizer import BPETokenizer, describe_tokenizer

HELD_OUT_SEED = 5000
"""Which held-out instructions a policy is measured on: none by which part 6 or part 7 picks a checkpoint."""
LEAST_PROMPT = 16
"""Room that --max_new_tokens has to leave to a prompt, in ids."""
MOST_PROMPTS = 50_000
"""Of read data, prompts to train on, at most."""
PROMPTS, DRAWS, ORDER = 0, 1, 2
"""What the seed of a run is used for, see seed_of."""


# --- what is asked ---


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers, such that no two uses of a run's seed ever draw the same random numbers."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])


class Asked(NamedTuple):
    """A prompt."""

    ids: list[int]
    """As data.encode_prompt gives it."""
    instruction: Instruction | None = None
    """Where rules can judge the answer."""


class Prompts:
    """Where prompts come from: an endless source of training prompts, and some that are held out."""

    def __init__(self, data: str, tokenizer: BPETokenizer, room: int, seed: int) -> None:
        """Open it.

        Args:
            data: "stories" for instructions to write one; the path of a .jsonl file; or hf:<name>[:split].
            tokenizer: with the special tokens of a chat.
            room: ids of a prompt at most.
            seed: which prompts are drawn.

        Raises:
            UserError: the data cannot be had.
        """
        self.tokenizer, self.room, self.seed = tokenizer, room, seed
        self.pool: list[Asked] = []  # of read data; stories are made when they are needed, each for the first time
        self.kept: list[Asked] = []
        if data != "stories":
            read = load_prompts(data, tokenizer, room, MOST_PROMPTS)
            self.pool, self.kept = ([Asked(ids) for ids in side] for side in read)

    def draw(self, n: int, iteration: int) -> list[Asked]:
        """Draw the n training prompts of an iteration; -1 is the one before the first."""
        seed = seed_of(self.seed, PROMPTS, iteration)
        if not self.pool:
            return self._ask(make_instructions(n, seed, False, kinds=("story",)))
        places = np.random.default_rng(seed).choice(len(self.pool), n, replace=n > len(self.pool))
        return [self.pool[i] for i in places]

    def held_out(self, n: int) -> list[Asked]:
        """The first n held-out prompts, always the same; of read data, as many as there are."""
        if self.pool:
            return self.kept[:n]
        return self._ask(make_instructions(n, HELD_OUT_SEED, True, kinds=("story",)))

    def gold(self, n: int) -> list[tuple[list[int], list[int]]]:
        """Ids of n held-out prompts of all kinds, not stories alone, with gold answers; none of read data."""
        if self.pool:
            return []
        end = chat_tokens(self.tokenizer)[2]
        asked = make_instructions(n, HELD_OUT_SEED + 1, True)
        return [
            (ask.ids, [*self.tokenizer.encode(instruction.response), end])
            for ask, instruction in zip(self._ask(asked), asked, strict=True)
        ]

    def _ask(self, instructions: list[Instruction]) -> list[Asked]:
        return [Asked(encode_prompt((made.prompt,), self.tokenizer, self.room), made) for made in instructions]


# --- who judges ---


class Environment:
    """What stands outside of the policy and does not learn: the judge, and the model that it must not leave."""

    def __init__(
        self,
        reference: Policy,
        reward_model: RewardModel,
        tokenizer: BPETokenizer,
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        """Put it together.

        Args:
            reference: the policy before it learned anything; its value head says nothing.
            reward_model: of the same tokenizer.
            tokenizer: with the special tokens of a chat.
            temperature: at which answers are drawn and all log-probabilities are taken.
            max_new_tokens: of an answer.
            batch_size: rows that are read at a time.
        """
        self.reference, self.reward_model, self.tokenizer = reference.eval(), reward_model.eval(), tokenizer
        self.temperature, self.max_new_tokens, self.batch_size = temperature, max_new_tokens, batch_size
        self.mean, self.std = 0.0, 1.0
        for frozen in (reference, reward_model):
            frozen.requires_grad_(False)

    def answer(self, policy: Policy, asked: list[Asked], seed: int, skip: int = 0) -> Rollout:
        """Let a policy answer, see rollout.roll_out.

        Args:
            policy: as it is now; not sharded, for rows end at different steps, in each process at others.
            asked: B prompts.
            seed: of the random numbers.
            skip: rows of other processes before these; their random numbers are left out.
        """
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw the same numbers
        torch.rand(skip * self.max_new_tokens, generator=generator)
        end, pad = chat_tokens(self.tokenizer)[2:]
        # Drawing reads one token of each row at a time, so twice as many rows go through the model together.
        how = (pad, end, self.temperature, self.max_new_tokens, generator, 2 * self.batch_size)
        return roll_out(policy, [some.ids for some in asked], *how)

    def judge(self, rollout: Rollout) -> torch.Tensor:
        """What the reward model says of each answer, (B,), in standard deviations from the mean of `measure`."""
        return (judge(self.reward_model, rollout, self.batch_size) - self.mean) / self.std

    def measure(self, asked: list[Asked], seed: int) -> tuple[Rollout, torch.Tensor]:
        """Take mean and standard deviation of the rewards of the reference's own answers to training prompts.

        A reward has no unit, and any number could be added to it. After this, 0 is as good as the reference is on
        average, and 1 is better than that by as much as its own answers differ; so beta, the clip of values and the
        penalty mean the same for every reward model. Taken once: a yardstick that moved would hide progress.

        Returns:
            The answers, and their rewards by this yardstick, (B,). If all rewards are equal, 1 is taken for the
            standard deviation.
        """
        self.mean, self.std = 0.0, 1.0
        answers = self.answer(self.reference, asked, seed)
        found = self.judge(answers)
        exact = found.cpu().double()  # MPS has no float64
        self.mean, self.std = exact.mean().item(), exact.std(correction=0).item() or 1.0
        return answers, (found - self.mean) / self.std

    def reference_logp(self, rollout: Rollout) -> torch.Tensor:
        """Log-probabilities of all tokens under the reference, (B, T)."""
        rows = torch.arange(len(rollout.idx), device=rollout.idx.device).split(self.batch_size)
        return score_pieces(self.reference, rollout, rows, self.temperature, with_entropy=False)[0]


# --- what a run begins with ---


def load_models(
    base: Path, judge_path: Path, settings: PPOConfig, device: torch.device
) -> tuple[Policy, Policy, RewardModel, BPETokenizer]:
    """Load what a run begins with; of the settings, critic and surprise are read.

    Returns:
        The policy, the reference with the same weights, the reward model, and the tokenizer of all three.

    Raises:
        UserError: one of the files is something else, or they do not belong together.
    """
    trunk, tokenizer = load_checkpoint(base, device)
    chat_tokens(tokenizer)  # refuses one without
    reward_model, other = load_reward_model(judge_path, device)
    if describe_tokenizer(other) != describe_tokenizer(tokenizer):
        raise UserError(f"--reward {judge_path}: another tokenizer than that of --base {base}; give one made of --base")
    shorter = reward_model.config.block_size < trunk.config.block_size
    if shorter and not reward_model.config.window:
        sizes = f"{reward_model.config.block_size} tokens, and that of --base is {trunk.config.block_size}"
        raise UserError(f"--reward {judge_path}: its context is {sizes}; give a reward model made of --base")
    switch_off_chance(trunk)
    reference = Policy(copy.deepcopy(trunk))
    critic = copy.deepcopy(trunk) if settings.critic else None
    return Policy(trunk, critic, settings.surprise), reference, reward_model, tokenizer


def room_for_prompts(config: GPTConfig, max_new_tokens: int) -> int:
    """How many ids a prompt may have, so that every answer may have max_new_tokens.

    Raises:
        UserError: hardly any.
    """
    room = config.block_size - (0 if config.window else max_new_tokens)
    if room < LEAST_PROMPT:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: in the context of {config.block_size} tokens that leaves {room} to a "
            f"prompt; give {max(config.block_size - LEAST_PROMPT, 0)} or less"
        )
    return room


def switch_off_chance(model: nn.Module) -> None:
    """Make a model compute the same in training as in evaluation: no dropout, no capacity of experts, no router noise.

    A ratio of two probabilities is to say what an optimizer step has changed. With chance in between, it would be away
    from 1 before the first step.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, CausalSelfAttention):
            module.dropout = 0.0
        elif isinstance(module, MoE):
            module.capacity_factor, module.noise = 0.0, 0.0


def calibrate(
    policy: Policy, environment: Environment, asked: list[Asked], seed: int, settings: PPOConfig
) -> tuple[float, float, list[float]]:
    """Let the reference answer before the first iteration: a unit for rewards, and values to begin with.

    Returns:
        Mean and standard deviation, see Environment.measure; and the value head's weights and its bias.
    """
    answers, rewards = environment.measure(asked, seed)
    if settings.fit_values:
        scores = score_answers(rewards, answers.ended, settings)  # (B,); no KL yet
        fit_values(policy, answers, scores[:, None].expand(answers.mask.shape), environment.batch_size, shared=False)
    head = policy.value_head
    return environment.mean, environment.std, [*head.weight[0].tolist(), *head.bias.tolist()]


@torch.no_grad()
def refresh(plain: nn.Module, sharded: nn.Module) -> None:
    """Give a whole copy the weights of a model that is shared out over processes; all of them must call it."""
    sources = [*sharded.parameters(), *sharded.buffers()]
    for target, source in zip([*plain.parameters(), *plain.buffers()], sources, strict=True):
        target.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)


def refit(policy: Policy, writer: Policy, experience: Experience, batch_size: int) -> None:
    """Fit the value head to what came of an iteration's answers, see fit_values; all processes must call it.

    Args:
        policy: gets the head.
        writer: the policy itself, or a whole copy of one that is sharded.
        experience: of the iteration.
        batch_size: rows at a time.
    """
    if writer is not policy:
        refresh(writer, policy)
    learned = experience.rollout._replace(mask=experience.mask)
    fit_values(writer, learned, experience.outcome, batch_size, shared=True)
    for target, source in zip(policy.value_head.parameters(), writer.value_head.parameters(), strict=True):
        target.data.copy_(placed_like(target.data, source.data))


def prepare(config: Any, here: Processes, device: torch.device) -> tuple[Policy, Environment, Prompts, dict[str, Any]]:
    """Find and load all that a run begins with; what has to be trained first is made by the main process.

    Args:
        config: a train.Config.
        here: which of the processes this one is.
        device: this process's.

    Returns:
        The policy, the environment, the prompts, and the settings of the run as plain values.

    Raises:
        UserError: models that are not there or do not belong together, data that cannot be had, too long answers.
    """
    ppo: PPOConfig = config.ppo
    base = Path(from_main(str(find_checkpoint(config.base, config.smoke)) if here.is_main else ""))
    judge_path = Path(from_main(str(find_checkpoint(config.reward, config.smoke, base)) if here.is_main else ""))
    policy, reference, reward_model, tokenizer = load_models(base, judge_path, ppo, device)
    room = room_for_prompts(policy.config, ppo.max_new_tokens)
    prompts = Prompts(config.data, tokenizer, room, config.seed)
    how = (ppo.temperature, ppo.max_new_tokens, ppo.rollouts // (ppo.minibatches * ppo.accumulate))
    environment = Environment(reference, reward_model, tokenizer, *how)
    settings = asdict(config)
    settings |= settings.pop("ppo")
    settings |= {"base": base, "reward": judge_path, "vocab_size": tokenizer.vocab_size}
    settings["tokenizer"] = hashlib.sha256(describe_tokenizer(tokenizer).encode()).hexdigest()[:12]
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return policy, environment, prompts, plain
