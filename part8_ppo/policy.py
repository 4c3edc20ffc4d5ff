"""The policy: a language model that writes, with one more number at each token, how well the answer will end.

In the words of reinforcement learning, a state is a prompt and what has been written of the answer, an action is the
next token, and the policy is the language model. PPO also needs the value of a state: the reward that is to be expected
from there on. A linear head reads it off the last hidden state, the one that the lm_head reads the next token off. Not
off the logits: those are V numbers made to tell tokens apart. The head begins at zero, so that every value does.

    prompt and answer -> blocks -> norm -> lm_head     -> logits, the policy
                                      \\--> value_head  -> value, the critic

The critic may have a trunk of its own: then the two never pull at the same weights, for twice the memory and time.

What a hidden state does not tell is how likely the tokens were that led there: a token's probability is known at the
end of the stack only, one place before. Yet a judge of stories minds slips, and slips are unlikely tokens. So the value
head may be told how surprising the answer has been so far.

    python part8_ppo/lesson4_loop.py     # one batch of answers, followed from the prompt to the gradient

Shapes: B rows, T time (tokens of padding, prompt and answer), C channels, V vocabulary.

References: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.1 (temperature);
Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4 and appendix B.1 (a critic of its own);
Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", sections 4 and 7 (dropout, padding, value head).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cache import KVCache
from model import GPT, visible
from moe import recompute_contexts
from rope import rope_angles

N_PATH = 3
"""Numbers that tell how an answer came to where it is, see surprise_so_far."""


def encode(
    trunk: GPT, idx: torch.Tensor, n_pad: torch.Tensor | None = None, cache: KVCache | None = None
) -> torch.Tensor:
    """Run a trunk with its causal mask, and normalise: what GPT.forward does before its lm_head.

    Padding at the left stands at negative positions, where no token sees it, so a row of a batch gets what it would get
    alone. Padding at the right comes after all that counts. `separator` is not heeded: a row is one conversation.

    Args:
        trunk: its blocks, embedding and norm are used.
        idx: (B, T) ids; with a cache, those that follow the ones it holds.
        n_pad: (B,) how many tokens at the left of each row are padding; None for none. A cache knows it by itself.
        cache: from make_cache, or None.

    Returns:
        (B, T, C). What stands at padding means nothing.

    Raises:
        ValueError: a row grows longer than block_size, padding included, and there is no window; or n_pad is given
            beside a cache.
    """
    T, config = idx.shape[1], trunk.config
    before = cache.length if cache is not None else 0
    if before + T > config.block_size and not config.window:
        raise ValueError(f"rows of {before + T} tokens are longer than block_size = {config.block_size}")
    if cache is None:
        positions = torch.arange(T, device=idx.device)[None]  # (1, T)
        if n_pad is not None:
            positions = positions - n_pad[:, None]  # (1, T) - (B, 1) -> (B, T)
        keys = positions
    elif n_pad is not None:
        raise ValueError("with a cache, n_pad is given to make_cache, not here")
    else:
        positions, keys = cache.positions(T), cache.key_positions(T)  # (1 or B, T), (1 or B, S)
    see = visible(positions, keys, config.window, config.n_sink)  # (1 or B, 1, T, S)
    cos, sin = rope_angles(positions, trunk.frequency)
    x = trunk.dropout(trunk.wte(idx))  # (B, T) -> (B, T, C)
    recompute = trunk.recompute and trunk.training and torch.is_grad_enabled() and cache is None
    for block in trunk.blocks:
        if recompute:
            x = checkpoint(block, x, cos, sin, see, None, use_reentrant=False, context_fn=recompute_contexts)
        else:
            x = block(x, cos, sin, see, cache)
    if cache is not None:
        cache.advance(T)
    return trunk.norm(x)


def surprise_so_far(logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How surprising each answer was up to each state to whoever drew it, (B, T) -> (B, T, N_PATH).

    Args:
        logp: (B, T) log-probability of each token when it was drawn.
        mask: (B, T), True on the tokens that were drawn.

    Returns:
        Of the tokens before t, all in about the same range: their surprise in hundreds of nats; its mean in nats, as if
        ten more tokens without any had gone before; and how many they are, in hundreds.
    """
    spent = F.pad(torch.where(mask, -logp, 0.0), (1, -1)).cumsum(dim=1)  # (B, T): nothing before the first token
    n = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return torch.stack([spent / 100, spent / (n + 10), n / 100], dim=-1)


class Policy(nn.Module):
    """A language model with a value head: token ids in, scores for the next token and the value of each state out."""

    def __init__(self, trunk: GPT, critic: GPT | None = None, surprise: bool = False) -> None:
        """Take a language model over.

        Args:
            trunk: what writes. It stays whole: its state is what generate.py can load.
            critic: a language model for the values alone, such as copy.deepcopy(trunk). Its lm_head is taken away.
                None: the values are read off the trunk.
            surprise: tell the value head what surprise_so_far says.
        """
        super().__init__()
        self.config, self.trunk, self.critic, self.surprise = trunk.config, trunk, critic, surprise
        if critic is not None:
            critic.lm_head = nn.Identity()
        n_embd = (critic or trunk).config.n_embd
        self.value_head = nn.Linear(n_embd + N_PATH * surprise, 1).to(trunk.wte.weight.device)
        # Values of 0 at first: an advantage is then made of rewards alone, not of what random weights say of a state.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        idx: torch.Tensor,
        cache: KVCache | None = None,
        n_pad: torch.Tensor | None = None,
        where: torch.Tensor | None = None,
        path: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score the next token at every position, and say what every state is worth.

        Args:
            idx: (B, T) ids; with a cache, those that follow the ones it holds.
            cache: from make_cache. A critic of its own would need another one: whoever draws tokens asks for no values.
            n_pad: (B,) padding at the left of each row, None for none; without a cache only.
            where: (B, T) booleans, the N places to score; None for all. Prompts and padding are read, but need no
                scores of V tokens each: that is more than half of the work of a small model.
            path: (B, T, N_PATH), or (N, N_PATH): surprise_so_far at the places to score.

        Returns:
            logits (B, T, V), or (N, V) in the order of the rows; and values (B, T), or (N,), in float32. Those of place
            t are of the state after idx[:, : t + 1], in which the next token is drawn. None for the values with a cache
            and a critic of its own, or if the value head is to be told of a path and is not.

        Raises:
            ValueError: see encode.
        """
        x = encode(self.trunk, idx, n_pad, cache)  # (B, T, C)
        logits = self.trunk.lm_head(x if where is None else x[where])  # (B, T, C) -> (N, C) -> (N, V)
        if (cache is not None and self.critic is not None) or (path is None and self.surprise):
            return logits, None
        x = self.states(x if self.critic is None else encode(self.critic, idx, n_pad), where, path)  # (N, C + N_PATH)
        # In float32, whatever the precision around it: advantages are small differences of values.
        with torch.autocast(x.device.type, enabled=False):
            values = F.linear(x, self.value_head.weight.float(), self.value_head.bias.float())[..., 0]
        return logits, values

    def states(self, x: torch.Tensor, where: torch.Tensor | None, path: torch.Tensor | None) -> torch.Tensor:
        """What the value head reads: hidden states (B, T, C) -> (N, C) or (N, C + N_PATH), see forward."""
        x = (x if where is None else x[where]).float()
        return torch.cat([x, path.float()], dim=-1) if self.surprise else x

    def make_cache(self, batch_size: int, n_slots: int, n_pad: torch.Tensor | None = None) -> KVCache:
        """Make an empty cache for drawing tokens, see GPT.make_cache."""
        return self.trunk.make_cache(batch_size, n_slots, n_pad)

    def num_parameters(self) -> int:
        """Number of trainable numbers, those of the value head and of the critic included."""
        return sum(parameter.numel() for parameter in self.parameters())


def log_distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of all tokens, (..., V) -> (..., V) in float32: log softmax(logits / temperature).

    The one definition of the policy's distribution. Tokens are drawn from it, and the old, the new and the reference
    policy are compared by it; no top-k and no top-p, with which tokens are drawn from another distribution than the one
    that is trained, and the importance ratio is one of two different things.

    Raises:
        ValueError: a temperature that is not above 0: a choice without chance has no log-probability to train.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} is not above 0; a policy is trained on tokens drawn by chance")
    return (logits.float() / temperature).log_softmax(dim=-1)


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability of each token that was drawn, in nats: log_distribution at that token.

    Args:
        logits: (B, T, V), or (N, V), of the states in which the tokens were drawn.
        tokens: (B, T), or (N,), ids.
        temperature: the one at which they were drawn, above 0.

    Returns:
        (B, T), or (N,), float32, at most 0.

    Raises:
        ValueError: see log_distribution.
    """
    return log_distribution(logits, temperature).gather(-1, tokens[..., None])[..., 0]
