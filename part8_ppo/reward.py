"""The reward model: a language model's trunk that reads a whole response and says in one number how good it is.

The trunk is the model of part 6 without its lm_head. A language model may not look ahead, because what comes next is
what it is asked for. A reward model is asked for nothing that it sees, so the causal mask goes, and the trunk becomes
an encoder: every token sees every other one, and the mean over the response is what a linear head turns into a score.

    prompt and response -> blocks, nothing hidden but padding -> mean over the response -> head -> reward

With causal = True the mask stays, and the last token, the only one that has seen everything, stands for the response.
With surprise = True a frozen copy of the language model says beside it how little it expected each token.

    python part7_reward/lesson2_encoder.py     # both by hand, and what a token sees in each

Shapes: B rows, T time (tokens of prompt, response and padding), C channels.

References: Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4 and appendix B.1 (a scalar
head on a causal model); Devlin et al. 2019, "BERT", section 3 (encoder); BehnamGhader et al. 2024, "LLM2Vec", section
2.1 (a trained causal model without its mask).
"""

import copy
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoint import read_checkpoint
from data import UserError, chat_tokens, collate_responses
from model import GPT, GPTConfig, visible
from moe import recompute_contexts
from rope import rope_angles
from tokenizer import BPETokenizer, ByteTokenizer, restore_tokenizer

MOST_SURPRISE = 10.0
"""In nats. A token that the language model thinks impossible is no more surprising than one in 22,000."""


def real_positions(real: torch.Tensor) -> torch.Tensor:
    """Count the tokens of each row from 0; padding, on whichever side, gets numbers below 0, each its own.

    [1 1 1 0 0] -> [0 1 2 -2 -1]

    Args:
        real: (B, T), False on padding.

    Returns:
        (B, T) positions, as `visible` wants them.
    """
    T = real.shape[1]
    return torch.where(real, real.cumsum(dim=1) - 1, torch.arange(-T, 0, device=real.device))


def visible_both_ways(positions: torch.Tensor, window: int, n_sink: int) -> torch.Tensor:
    """Which keys a query of an encoder may look at: all, or those less than a window away, before it and after it.

    Args:
        positions: (B, T), below 0 on padding. A token never sees padding, which sees itself at least, so that its
            softmax is over something.
        window: 0 for all.
        n_sink: positions 0 .. n_sink - 1 are seen from everywhere.

    Returns:
        (B, 1, T, T) booleans.
    """
    q, k = positions[:, None, :, None], positions[:, None, None, :]
    see = (k >= 0).expand(-1, -1, q.shape[2], -1)
    if window:
        see = see & (((q - k).abs() < window) | (k < n_sink))
    return see | (q == k)


def run(
    trunk: GPT, idx: torch.Tensor, positions: torch.Tensor, see: torch.Tensor, extra: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Run a trunk's blocks with any mask, and normalise.

    Args:
        trunk: its embedding, blocks and norm are used.
        idx: (B, T) ids.
        positions: (B, T) of the tokens, for rotary attention.
        see: (B, 1, T, T) booleans: which keys each query may look at.
        extra: (B, T, C), added to the tokens' vectors.

    Returns:
        (B, T, C).
    """
    cos, sin = rope_angles(positions, trunk.frequency)
    x = trunk.dropout(trunk.wte(idx) + extra)  # (B, T) -> (B, T, C)
    recompute = trunk.recompute and trunk.training and torch.is_grad_enabled()
    for block in trunk.blocks:
        if recompute:
            x = checkpoint(block, x, cos, sin, see, None, use_reentrant=False, context_fn=recompute_contexts)
        else:
            x = block(x, cos, sin, see, None)
    return trunk.norm(x)


class RewardModel(nn.Module):
    """A trunk with a linear head: token ids in, a reward for each row out. Higher is better; it has no unit."""

    def __init__(self, trunk: GPT, pad: int, causal: bool = False, surprise: bool = False) -> None:
        """Take a language model over.

        Args:
            trunk: its lm_head is taken away, for nobody asks for a next token any more. Whoever does, gives a copy.
            pad: id of <|pad|>.
            causal: keep the causal mask, and read the reward off the last token.
            surprise: keep a frozen copy of the language model as it is, and tell the trunk how surprised that is.
        """
        super().__init__()
        self.config, self.pad, self.causal = trunk.config, pad, causal
        self.writer = copy.deepcopy(trunk).requires_grad_(False) if surprise else None
        self.trunk = trunk
        self.trunk.lm_head = nn.Identity()
        self.head = nn.Linear(trunk.config.n_embd, 1).to(trunk.wte.weight.device)
        # Rewards begin near N(0, 1) (Stiennon et al. 2020, B.1). No pair of responses teaches the bias anything.
        nn.init.normal_(self.head.weight, std=(trunk.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        if surprise:
            # What a nat of surprise adds to a token's vector, and what a nat on average costs an answer.
            self.surprised = nn.Parameter(torch.randn_like(trunk.wte.weight[0]) * trunk.wte.weight.std() / 2)
            self.price = nn.Parameter(torch.full_like(self.head.bias, 5.0))

    def forward(self, idx: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Judge responses.

        Args:
            idx: (B, T) prompts, each followed by its response; padding, of the id `pad`, on the right or on the left.
            mask: (B, T) booleans, True on the tokens of the response. Those are read whatever their ids: a model may
                draw the id of padding too.

        Returns:
            (B,) rewards in float32.

        Raises:
            ValueError: a row without a token of a response; or T above block_size, without a window.
        """
        mask = mask.bool()
        if not mask.any(dim=1).all():
            raise ValueError("a row has no token of a response in its mask: there is nothing to judge")
        real = (idx != self.pad) | mask
        surprise = self.surprise(idx, real, mask) if self.writer is not None else None  # (B, T)
        x = self.encode(idx, real, surprise)  # (B, T) -> (B, T, C)
        # In float32, whatever the precision around it: what counts is a small difference of two rewards.
        with torch.autocast(x.device.type, enabled=False):
            pooled = self.pool(x.float(), mask)  # (B, T, C) -> (B, C)
            reward = F.linear(pooled, self.head.weight.float(), self.head.bias.float())[:, 0]  # (B, 1) -> (B,)
            if surprise is not None:
                reward = reward - self.price.float() * surprise.sum(dim=1) / mask.sum(dim=1)
            return reward

    @torch.no_grad()
    def surprise(self, idx: torch.Tensor, real: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """How little the language model would have expected each token of the responses, given what stands before it.

        Args:
            idx: (B, T) ids.
            real: (B, T), False on padding.
            mask: (B, T), True on the tokens of the responses.

        Returns:
            (B, T) -log p in nats, at most MOST_SURPRISE; 0 outside of the responses.
        """
        writer, positions = self.writer.eval(), real_positions(real)
        see = visible(positions, positions, self.config.window, self.config.n_sink)
        logp = writer.lm_head(run(writer, idx, positions, see)).float().log_softmax(dim=-1)  # (B, T, V)
        expected = logp[:, :-1].gather(-1, idx[:, 1:, None])[..., 0]  # row t is about token t + 1: (B, T - 1)
        return (-F.pad(expected, (1, 0))).clamp(max=MOST_SURPRISE) * mask

    def encode(self, idx: torch.Tensor, real: torch.Tensor, surprise: torch.Tensor | None = None) -> torch.Tensor:
        """Run the trunk with this model's mask, and normalise: what GPT.forward does before its lm_head.

        Args:
            idx: (B, T) ids.
            real: (B, T), False on padding.
            surprise: (B, T), added to the tokens' vectors; None if nobody asked for it.

        Returns:
            (B, T, C). What stands at padding means nothing.
        """
        config, positions = self.config, real_positions(real)
        if idx.shape[1] > config.block_size and not config.window:
            raise ValueError(f"a row of {idx.shape[1]} tokens is longer than block_size = {config.block_size}")
        if self.causal:
            see = visible(positions, positions, config.window, config.n_sink)
        else:
            see = visible_both_ways(positions, config.window, config.n_sink)
        extra = 0.0 if surprise is None else surprise[..., None] * self.surprised  # (B, T, 1) * (C,) -> (B, T, C)
        return run(self.trunk, idx, positions, see, extra)

    def pool(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One vector for each response, (B, T, C) and (B, T) -> (B, C): the mean over it, or its last token's."""
        if self.causal:
            place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            last = (mask * place).argmax(dim=1)  # (B,)
            return x[torch.arange(len(x), device=x.device), last]
        weights = mask / mask.sum(dim=1, keepdim=True)  # (B, T), 1 / length on the response
        return (weights[:, None] @ x)[:, 0]  # (B, 1, T) @ (B, T, C) -> (B, 1, C) -> (B, C)

    def num_parameters(self) -> int:
        """Number of trainable numbers, those of the head included."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


# --- using one ---


def load_reward_model(path: Path, device: torch.device) -> tuple[RewardModel, ByteTokenizer | BPETokenizer]:
    """Load what train.py saved.

    Returns:
        The model on the device, and its tokenizer.

    Raises:
        UserError: the file is no checkpoint of ours, one of a language model, or of settings unknown here.
    """
    saved = read_checkpoint(path, device)
    unknown = saved["model_config"].keys() - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise UserError(f"{path}: a model of another architecture; it differs in {', '.join(sorted(unknown))}")
    if "head.weight" not in saved["model"]:
        raise UserError(f"{path}: a language model, not a reward model; train one with python part7_reward/train.py")
    tokenizer = restore_tokenizer(saved["tokenizer"])
    trunk = GPT(GPTConfig(**saved["model_config"])).to(device)
    config = saved["config"]
    model = RewardModel(trunk, chat_tokens(tokenizer)[3], config["causal"], config["surprise"])
    model.load_state_dict(saved["model"])
    return model, tokenizer


@torch.no_grad()
def rewards(
    model: RewardModel, prompts: list[list[int]], responses: list[list[int]], batch_size: int = 64
) -> np.ndarray:
    """Judge many responses, those of similar length together, so that little is padding.

    Args:
        model: the judge. It is left in the mode, training or evaluation, that it was in.
        prompts: N lists of ids, as data.encode_prompt gives them.
        responses: N lists of ids exactly as they were drawn: text that is encoded anew may become other ids.
        batch_size: rows at a time.

    Returns:
        (N,) float64, in the order of the responses.
    """
    training, found = model.training, np.zeros(len(responses))
    order = sorted(range(len(responses)), key=lambda i: len(prompts[i]) + len(responses[i]))
    model.eval()
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        batch = collate_responses([prompts[i] for i in some], [responses[i] for i in some], model.pad)
        idx, mask = (tensor.to(model.head.weight.device) for tensor in batch)
        found[some] = model(idx, mask).cpu().numpy()
    model.train(training)
    return found
