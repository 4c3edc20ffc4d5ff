"""Rollouts: many prompts answered at once, and everything kept that a training needs to know of the answers.

Answers are drawn token by token, so a rollout is most of the time that PPO takes. Two things make it fast. Many rows go
through the model together, with keys and values in a cache. And a row that has ended leaves: it is taken out of the
batch and out of the cache, so that the last and longest answers do not drag the others along.

    policy -> roll_out -> answers, exactly as drawn -> judge         -> a score for each answer
                                                    -> score_tokens  -> log-probability and value of each token

A row has random numbers of its own, one for each token that it may draw. So an answer depends on its prompt, the
weights and the seed, and neither on what else is in its batch nor on who has left.

    idx      <|pad|> <|pad|> prompt prompt | answer answer <|end|> <|pad|>      (B, P + T)
    mask                                   | True   True   True    False        (B, T)

Shapes: B rows, P tokens of the longest prompt, T of the longest answer, N tokens of all answers, V vocabulary.

    python part8_ppo/lesson4_loop.py     # all of this for four prompts, and how much faster it is

References: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5;
Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", sections 4 and 7.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cache import KVCache, RollingKVCache
from generate import pad_left
from model import GPT
from policy import Policy, log_distribution, logprobs_of, surprise_so_far
from ppo import entropy_from_logits
from reward import RewardModel, rewards


class Rollout(NamedTuple):
    """B prompts with an answer each, as they were drawn. Where mask is False, ids are padding and numbers are 0."""

    idx: torch.Tensor
    """(B, P + T) prompts, padded on the left, and answers, padded on the right."""
    n_pad: torch.Tensor
    """(B,) padding at the left of each row."""
    response: torch.Tensor
    """(B, T) the answers: idx[:, P:]."""
    mask: torch.Tensor
    """(B, T) booleans: True on the tokens that were drawn, the end token among them."""
    logp: torch.Tensor
    """(B, T) log-probability of each token when it was drawn, in nats."""
    ended: torch.Tensor
    """(B,) booleans: whether the answer has an end, instead of being cut off."""
    prompts: list[list[int]]
    """The prompts' ids."""
    responses: list[list[int]]
    """The answers' ids exactly as they were drawn, with the end if there is one."""

    def rows(self, where: list[int] | torch.Tensor) -> "Rollout":
        """Some rows, in this order, at the same width: a minibatch of the same shape computes the same numbers."""
        where = torch.as_tensor(where, device=self.idx.device)
        chosen = where.tolist()
        tensors = [some[where] for some in self[:6]]
        return Rollout(*tensors, [self.prompts[i] for i in chosen], [self.responses[i] for i in chosen])


class Scores(NamedTuple):
    """What a policy says of the tokens of a rollout. The first three are 0 where the rollout's mask is False."""

    logp: torch.Tensor
    """(B, T) log-probability of each token, in nats."""
    values: torch.Tensor
    """(B, T) value of the state in which each token was drawn."""
    entropy: torch.Tensor | None
    """(B, T) of the whole distribution that each token was drawn from, in nats; None if nobody asked."""
    logits: torch.Tensor
    """(N, V) of these states, of the N tokens under the mask row by row; not yet divided by the temperature."""


# --- drawing ---


def keep_rows(cache: KVCache, rows: torch.Tensor) -> None:
    """Take all other rows out of a cache, in place.

    Args:
        cache: of B rows.
        rows: (b,) which stay, in this order.
    """
    cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]  # (n_layer, B, Hkv, S, D) -> (n_layer, b, Hkv, S, D)
    if cache.n_pad is not None:
        cache.n_pad = cache.n_pad[rows]
    if isinstance(cache, RollingKVCache):
        cache.held = cache.held[rows]  # (B, S) -> (b, S)


def draw(logits: torch.Tensor, temperature: float, chance: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row: the first whose cumulative probability is above the row's random number.

    Args:
        logits: (B, V).
        temperature: see log_distribution.
        chance: (B,) uniform in [0, 1).

    Returns:
        (B,) ids; each with its probability under log_distribution, one of probability 0 never.
    """
    cumulative = log_distribution(logits, temperature).exp().cumsum(dim=-1)  # (B, V)
    # Sums of many small numbers end near 1, not at it. Measured against their own end, nothing falls off it.
    reach = chance[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, reach, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def draw_batch(
    model: Policy | GPT, prompts: list[list[int]], pad: int, end: int, temperature: float, chance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answer the prompts of one batch.

    Args:
        model: in evaluation mode.
        prompts: B lists of ids.
        pad, end, temperature: see roll_out.
        chance: (B, T) uniform in [0, 1): the random number of each token that may be drawn.

    Returns:
        tokens (B, T), log-probabilities (B, T), and mask (B, T): where there is such a token.
    """
    idx, n_pad = (some.to(chance.device) for some in pad_left(prompts, pad))  # (B, P), (B,)
    B, T = chance.shape
    cache = model.make_cache(B, idx.shape[1] + T, n_pad)
    tokens = torch.full((B, T), pad, device=idx.device)
    logp, mask = torch.zeros_like(chance), torch.zeros_like(chance, dtype=torch.bool)
    rows = torch.arange(B, device=idx.device)  # which rows are still there: row i of the cache is rows[i] of the batch
    logits = model(idx, cache=cache)[0]  # (B, P) -> (B, P, V)
    for t in range(T):
        token = draw(logits[:, -1], temperature, chance[rows, t])  # (b,)
        tokens[rows, t], mask[rows, t] = token, True
        logp[rows, t] = logprobs_of(logits[:, -1:], token[:, None], temperature)[:, 0]
        (going_on,) = torch.where(token != end)
        if len(going_on) == 0 or t == T - 1:
            break
        if len(going_on) < len(rows):
            rows, token = rows[going_on], token[going_on]
            keep_rows(cache, going_on)
        logits = model(token[:, None], cache=cache)[0]  # (b, 1) -> (b, 1, V): the rest is in the cache
    return tokens, logp, mask


@torch.no_grad()
def roll_out(
    model: Policy | GPT,
    prompts: list[list[int]],
    pad: int,
    end: int,
    temperature: float,
    max_new_tokens: int,
    generator: torch.Generator,
    batch_size: int,
) -> Rollout:
    """Let a model answer prompts, many at a time, and keep the log-probability of every token.

    Dropout is off: with it every pass would be by another policy, and no ratio of two of them would be 1.

    Args:
        model: a policy, or a language model alone. It is left in the mode, training or evaluation, that it was in.
        prompts: B lists of ids, as data.encode_prompt gives them; at least one.
        pad: id of <|pad|>.
        end: id of <|end|>; whoever draws it has ended.
        temperature: above 0, see log_distribution.
        max_new_tokens: of an answer, at most. All answers are cut where the longest prompt leaves no more room.
        generator: of the random numbers, B * max_new_tokens of them whatever is drawn. It may be of another device.
        batch_size: rows at a time; those with prompts of similar length together.

    Returns:
        The answers, in the order of the prompts, on the model's device.

    Raises:
        ValueError: the longest prompt fills the context, so that no token can be drawn; or see log_distribution.
    """
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    room = max_new_tokens if model.config.window else min(max_new_tokens, model.config.block_size - longest)
    if room < 1:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} leave no token to draw in a context "
            f"of {model.config.block_size}"
        )
    training = model.training
    model.eval()
    chance = torch.rand(len(prompts), max_new_tokens, generator=generator, device=generator.device).to(device)
    tokens = torch.full((len(prompts), room), pad, device=device)
    logp, mask = torch.zeros(tokens.shape, device=device), torch.zeros_like(tokens, dtype=torch.bool)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        found = draw_batch(model, [prompts[i] for i in some], pad, end, temperature, chance[some, :room])
        tokens[some], logp[some], mask[some] = found
    model.train(training)
    return gather(prompts, tokens, logp, mask, pad, end)


def gather(
    prompts: list[list[int]], tokens: torch.Tensor, logp: torch.Tensor, mask: torch.Tensor, pad: int, end: int
) -> Rollout:
    """Put prompts and what was drawn into one batch, no wider than the longest answer; tokens, logp, mask (B, T)."""
    lengths = mask.sum(dim=1)  # (B,)
    T = int(lengths.max())
    tokens, logp, mask = tokens[:, :T], logp[:, :T], mask[:, :T]
    idx, n_pad = (some.to(tokens.device) for some in pad_left(prompts, pad))
    # Only the last token can be the end: what has ended draws no more.
    ended = tokens.gather(1, lengths[:, None] - 1)[:, 0] == end
    responses = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return Rollout(torch.cat([idx, tokens], dim=1), n_pad, tokens, mask, logp, ended, list(prompts), responses)


# --- looking back ---


def places_of(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the N tokens of a rollout were drawn, and how the answers had come there.

    Returns:
        Booleans (B, P + T - 1): True on the states in which a token was drawn, of all tokens but the last, for nothing
        follows that; and (N, N_PATH), surprise_so_far of each of these states, row by row.
    """
    P, mask = rollout.idx.shape[1] - rollout.response.shape[1], rollout.mask
    return F.pad(mask, (P - 1, 0)), surprise_so_far(rollout.logp, mask)[mask]  # the first one: after P tokens


def score_tokens(policy: nn.Module, rollout: Rollout, temperature: float, with_entropy: bool = True) -> Scores:
    """Score what was drawn, all tokens of all rows in one pass: by the policy as it is now, or by the reference.

    It has gradients unless somebody switches them off, and dropout unless the policy is in evaluation mode. Two passes
    over the same rows at the same width are equal bit for bit, so a ratio of them is exactly 1.

    Args:
        policy: a Policy, or what wraps one for several processes. A reference GPT becomes one by Policy(gpt).
        rollout: B rows.
        temperature: the one at which they were drawn.
        with_entropy: whether somebody looks at the entropy, which takes about as long as the log-probabilities.

    Raises:
        ValueError: see policy.encode and log_distribution.
    """
    mask, (where, path) = rollout.mask, places_of(rollout)
    logits, values = policy(rollout.idx[:, :-1], n_pad=rollout.n_pad, where=where, path=path)  # (N, V), (N,)

    def spread_out(some: torch.Tensor) -> torch.Tensor:
        return some.new_zeros(mask.shape).masked_scatter(mask, some)  # (N,) -> (B, T)

    logp = spread_out(logprobs_of(logits, rollout.response[mask], temperature))
    entropy = spread_out(entropy_from_logits(logits.float() / temperature)) if with_entropy else None
    return Scores(logp, spread_out(values), entropy, logits)


def judge(reward_model: RewardModel, rollout: Rollout, batch_size: int = 64) -> torch.Tensor:
    """Let the reward model score the answers, on exactly the ids that were drawn; (B,) float32, where the rollout is.

    Text that is decoded and encoded anew may become other ids, and the policy would be paid for what it did not write.
    """
    scores = rewards(reward_model, rollout.prompts, rollout.responses, batch_size)
    return torch.from_numpy(scores).float().to(rollout.idx.device)
