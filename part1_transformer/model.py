"""The transformer: masked self-attention, a feed-forward network, and the block that is stacked from the two.

This file holds the classes that every later part copies forward. It maps vectors to vectors, (B, T, C) -> (B, T, C):
what the vectors stand for (bytes, words, pixels) is not its business, and part 2 adds the language at both ends. Each
class is built by hand in a lesson of this folder first, and shown equal to what stands here.

    python part1_transformer/lesson7_stack.py     # builds the stack below and looks inside

Shapes: B batch, T time (positions in the sequence), C channels, H heads, D = C / H head dimension.

References: Vaswani et al. 2017, "Attention Is All You Need", section 3; Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners" (GPT-2), section 2.3, for pre-norm blocks and the initialisation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class GPTConfig:
    """The shape of a transformer."""

    block_size: int = 64
    """T at most: the longest sequence that the model can see, because each position has a learned vector."""
    n_layer: int = 4
    """Blocks in the stack."""
    n_head: int = 4
    """H, attention heads of a block."""
    n_embd: int = 128
    """C, channels: the width of the residual stream. A multiple of n_head."""
    dropout: float = 0.0
    """Share of activations that is set to zero in training. 0 unless the data is seen many times."""


# --- attention: the only place where positions exchange information ---


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a position sees itself and what came before it, never what comes after.

    softmax(q k^T / sqrt(D) + causal mask) v for each of H heads at once; Vaswani et al. 2017, section 3.2.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd = {config.n_embd} is not a multiple of n_head = {config.n_head}")
        self.n_head = config.n_head
        self.dropout = config.dropout
        # One matrix for queries, keys and values: a single product of three times the width is faster than three.
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix each position with the earlier ones.

        Args:
            x: (B, T, C).

        Returns:
            (B, T, C); row t depends on rows 0..t of x only.
        """
        B, T, C = x.shape
        # (B, T, C) -> (B, T, 3C) -> 3 x (B, T, C)
        q, k, v = self.qkv(x).split(C, dim=-1)
        # (B, T, C) -> (B, T, H, D) -> (B, H, T, D): the head moves beside the batch, and each head works on its own
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        # Computes what lesson 3 computes by hand, without ever holding the (B, H, T, T) weights in memory.
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        # (B, H, T, D) -> (B, T, H, D) -> (B, T, C): the heads' outputs stand side by side again
        out = out.transpose(1, 2).reshape(B, T, C)
        return self.proj_dropout(self.proj(out))


# --- the feed-forward network: each position on its own ---


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times wider inside: (B, T, C) -> (B, T, 4C) -> (B, T, C).

    Vaswani et al. 2017, section 3.3; GELU in its tanh form as in GPT-2 (Hendrycks & Gimpel 2016, section 2).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position by the same network, (B, T, C) -> (B, T, C)."""
        x = F.gelu(self.fc(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.proj(x))


# --- the block and the stack ---


class Block(nn.Module):
    """Communicate (attention), then compute (MLP), each added to the residual stream and fed a normalised copy of it.

    Pre-norm: the norm stands inside the branch, so the stream itself runs from input to output through additions only,
    and gradients reach the first block undiminished (lesson 6; Xiong et al. 2020, section 3).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One step along the residual stream, (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_weights(model: nn.Module, n_layer: int, n_embd: int) -> None:
    """Give every parameter of the model GPT-2's starting value, in place.

    Matrices and embeddings are N(0, std^2), biases zero, norms stay at the identity. std is GPT-2's 0.02 at GPT-2's
    width of 768; a narrower model sums fewer terms, so it needs larger ones for sums of the same size: std = 0.02
    sqrt(768 / C). The 2 * n_layer projections that add to the residual stream are divided by sqrt(2 * n_layer), so
    that what they add up to does not grow with depth (Radford et al. 2019, section 2.3).

    Args:
        model: anything built from the classes above; its residual projections are the parameters named `proj`.
        n_layer: number of blocks.
        n_embd: C.
    """
    std = 0.02 * (768 / n_embd) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.normal_(parameter, std=std / (2 * n_layer) ** 0.5)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class Transformer(nn.Module):
    """Learned positions, a stack of blocks, and a final norm: the body of GPT-2.

    Radford et al. 2019, section 2.3: the final norm is needed because a pre-norm stream is never normalised on its way.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # one vector for each position
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd)
        init_weights(self, config.n_layer, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Contextualise a sequence of vectors.

        Args:
            x: (B, T, C) with T <= block_size.

        Returns:
            (B, T, C), normalised; row t depends on rows 0..t of x only.

        Raises:
            ValueError: T is longer than block_size.
        """
        T = x.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} positions is longer than block_size = {self.config.block_size}")
        x = self.dropout(x + self.wpe.weight[:T])  # (B, T, C) + (T, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
