"""The architecture of a modern language model, with a cache that gives exactly what the full pass gives.

RMSNorm, rotary positions, a gated MLP (SwiGLU), several query heads on one key/value head (GQA), no biases: the
architecture of the Llama family; with mixtures of experts (moe.py) in place of the MLPs, of Mixtral. Attention can be
limited to a window of recent tokens plus a few first ones (sinks).

One forward pass serves training, reading a prompt in pieces of any size, and writing token by token. Who sees whom is
decided in one place, `visible`, from positions alone; and each token goes through its experts by itself.

    python part5_moe/train.py     # trains this model

Shapes: B batch, T time (tokens), C channels, H query heads, Hkv key/value heads, D head dimension, F hidden width of
the MLP, V vocabulary, S cache slots.

References: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2; Ainslie et al.
2023, "GQA", section 2; Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2;
Jiang et al. 2023, "Mistral 7B", section 2 (sliding window, rolling buffer).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cache import KVCache, RollingKVCache
from moe import MoE, check_mixture, recompute_contexts
from rope import count_from_start, rope, rope_angles, rope_frequencies


@dataclass
class GPTConfig:
    """The shape of a language model."""

    vocab_size: int = 257
    """V, number of tokens: 256 bytes and the end of the text."""
    block_size: int = 256
    """T at most, unless there is a window: the longest sequence that the model was trained on."""
    n_layer: int = 4
    """Blocks in the stack."""
    n_head: int = 4
    """H, query heads."""
    n_embd: int = 128
    """C, channels: the width of the residual stream. A multiple of n_head."""
    dropout: float = 0.0
    """Share of activations that is set to zero in training. 0 unless the data is seen many times."""
    n_kv_head: int = 0
    """Key/value heads, a divisor of n_head. 0: as many as n_head (MHA); 1: one for all (MQA); between: GQA."""
    head_dim: int = 0
    """D, channels of a head. 0: n_embd / n_head."""
    mlp_hidden: int = 0
    """Width inside the MLP. 0: 8/3 n_embd, rounded up to a multiple of 8: as many parameters as an ungated 4x MLP."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm, against division by zero."""
    rope_base: float = 10000.0
    """The slowest pair of channels turns by about 1 / rope_base radians a token."""
    rope_scaling: dict[str, float | str] | None = None
    """How a trained context is stretched: a rope_type (linear or llama3) with its numbers. See rope_frequencies."""
    window: int = 0
    """How many tokens a token sees, itself included. 0: all before it."""
    n_sink: int = 0
    """First tokens that stay visible although they are outside the window."""
    tie_weights: bool = True
    """One matrix for reading and for writing tokens."""
    expert_hidden: int = 0
    """F, width inside an expert. 0: those that a token uses are together as wide as the MLP, rounded down to 8s."""
    # The rest is explained where the command line takes it from, in moe.MixtureConfig.
    n_expert: int = 0
    n_expert_active: int = 2
    n_shared_expert: int = 0
    moe_every: int = 1
    n_dense_first: int = 0
    capacity_factor: float = 0.0
    router_noise: float = 0.0
    normalize_gates: bool = True

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.mlp_hidden = self.mlp_hidden or (8 * self.n_embd // 3 + 7) // 8 * 8
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if self.n_kv_head < 0 or self.n_head % self.n_kv_head != 0:
            raise ValueError(f"n_kv_head = {self.n_kv_head} is not a divisor of n_head = {self.n_head}")
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary positions turn pairs of channels")
        if self.window < 0 or self.n_sink < 0 or (self.n_sink and not self.window):
            raise ValueError(f"n_sink = {self.n_sink} and window = {self.window}: sinks are for a window above 0")
        if self.n_expert and not self.expert_hidden:
            used = max(1, self.n_expert_active + self.n_shared_expert)
            self.expert_hidden = max(8, self.mlp_hidden // used // 8 * 8)
        check_mixture(self)

    def is_moe(self, layer: int) -> bool:
        """Whether a block, counted from 0, has a mixture of experts."""
        return self.n_expert > 0 and layer >= self.n_dense_first and (layer + 1) % self.moe_every == 0


# --- the norm ---


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, and scale its channels: LayerNorm without the mean and the bias.

    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", section 4.
    """

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension, (..., C) -> (..., C)."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# --- who sees whom ---


def visible(query: torch.Tensor, key: torch.Tensor, window: int, n_sink: int) -> torch.Tensor:
    """Which keys a query may look at: those at its own position or before, inside the window or among the sinks.

    The one rule for training, for reading a prompt and for writing. Padding stands at negative positions: a token never
    sees it, and it sees only itself and padding before it, so that its softmax is over something.

    Args:
        query: (B, T) positions.
        key: (B, S) positions, in any order.
        window: how many positions a query sees, itself included; 0 for all.
        n_sink: positions 0 .. n_sink - 1 are seen from everywhere.

    Returns:
        (B, 1, T, S) booleans.
    """
    q, k = query[:, None, :, None], key[:, None, None, :]
    see = (k <= q) & ((k >= 0) | (q < 0))
    if window:
        see &= (q - k < window) | (k < n_sink)
    return see


# --- the transformer ---


class CausalSelfAttention(nn.Module):
    """Attention with rotary positions, in which several query heads share one key/value head.

    softmax(q k^T / sqrt(D)) v over the keys that are visible; Ainslie et al. 2023, section 2.2, for the sharing.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # which rows of a cache are this layer's
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.dropout = config.dropout
        # One matrix for queries, keys and values: a single product of their joint width is faster than three.
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=False)
        self.proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """Mix each position with those it may see.

        Args:
            x: (B, T, C).
            cos, sin: (1 or B, 1, T, D/2), see rope.
            mask: (1 or B, 1, T, S), see visible; None where each sees all up to itself.
            cache: holds what came before, and takes the new keys and values.

        Returns:
            (B, T, C).
        """
        B, T, _ = x.shape
        # (B, T, C) -> (B, T, H + 2 Hkv, D) -> (B, H + 2 Hkv, T, D) -> q (B, H, T, D), k and v (B, Hkv, T, D)
        q, k, v = self.qkv(x).view(B, T, sum(self.heads), -1).transpose(1, 2).split(self.heads, dim=1)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, Hkv, T, D) -> (B, Hkv, S, D)
        dropout = self.dropout if self.training else 0.0
        # Without a mask a single query sees everything; many are the whole sequence, so the causal mask is the rule.
        causal = mask is None and T > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=True)
        # (B, H, T, D) -> (B, T, H, D) -> (B, T, H * D) -> (B, T, C)
        return self.proj_dropout(self.proj(out.transpose(1, 2).reshape(B, T, -1)))


class MLP(nn.Module):
    """SwiGLU: one half of the hidden layer opens and closes the other.

    (B, T, C) -> (B, T, 2 F) -> (B, T, F) -> (B, T, C)

    (silu(x W_gate) * x W_up) W_proj; Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.mlp_hidden, bias=False)  # W_gate and W_up in one product
        self.proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position by the same network, (B, T, C) -> (B, T, C)."""
        gate, up = self.fc(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.dropout(self.proj(F.silu(gate) * up))


class Block(nn.Module):
    """Communicate (attention), then compute (MLP), each on a normalised copy of the residual stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.norm2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if config.is_moe(layer) else MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """One step along the residual stream, (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.norm1(x), cos, sin, mask, cache)
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
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class GPT(nn.Module):
    """A decoder-only language model: token ids in, a score for every possible next token out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # in training, keep each block's input only, and compute the block again backward
        self.separator: int | None = None  # id of the token between documents that are not to see each other
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # one vector for each token
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Computed, not learned, so it is not part of a checkpoint.
        frequency = rope_frequencies(config.head_dim, config.rope_base, config.rope_scaling)
        self.register_buffer("frequency", frequency, persistent=False)
        if config.tie_weights:
            # One matrix reads tokens and writes them: a token that is often predicted where another one is also has a
            # similar vector as input. It saves V * C parameters and helps small models (Press & Wolf 2017).
            self.lm_head.weight = self.wte.weight
        init_weights(self, config.n_layer, config.n_embd)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score the next token at every position at once.

        Args:
            idx: (B, T) token ids; with a cache, those that follow the ones it holds. Without one, `separator` begins
                another document: it is read as if it were alone, and its positions begin anew.
            targets: (B, T) the token that follows each position, or -100 where there is nothing to learn.
            cache: from make_cache; it holds the tokens before idx, and takes those of idx.

        Returns:
            logits (B, T, V): row t scores the token after idx[:, t], and depends on that and earlier tokens only; and
            the mean cross-entropy over the targets that are not -100, in nats per token, or None without targets.

        Raises:
            ValueError: the sequence grows longer than block_size and there is no window.
        """
        T = idx.shape[1]
        window, n_sink = self.config.window, self.config.n_sink
        before = cache.length if cache is not None else 0
        apart = self.separator is not None and cache is None
        if before + T > self.config.block_size and not window:
            raise ValueError(
                f"a sequence of {before + T} tokens is longer than block_size = {self.config.block_size}; "
                "a window (--window) lets it go on"
            )
        if cache is None:
            positions = keys = torch.arange(T, device=idx.device)[None]  # (1, T)
            if apart:
                documents = (idx == self.separator).cumsum(dim=1)  # (B, T) which document each token is of
                positions = keys = count_from_start(documents)  # (B, T)
        else:
            positions, keys = cache.positions(T), cache.key_positions(T)  # (1 or B, T), (1 or B, S)
        # Without window and padding, one new token sees all, and a whole sequence is the usual causal mask: both are
        # faster without a mask in memory.
        plain = not window and not apart and (before == 0 or T == 1) and (cache is None or cache.n_pad is None)
        mask = None if plain else visible(positions, keys, window, n_sink)  # (1 or B, 1, T, S)
        if apart:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])  # blocks along the diagonal
        cos, sin = rope_angles(positions, self.frequency)

        x = self.dropout(self.wte(idx))  # (B, T) -> (B, T, C)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                # Memory for one block's activations instead of all, for a third more arithmetic (Chen et al. 2016).
                x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False, context_fn=recompute_contexts)
            else:
                x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.advance(T)
        logits = self.lm_head(self.norm(x))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        # (B, T, V) -> (B * T, V) beside (B, T) -> (B * T): every position is one example of a V-way classification.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return logits, loss

    def make_cache(
        self,
        batch_size: int,
        n_slots: int,
        n_pad: torch.Tensor | None = None,
        rolling: bool = False,
        in_cache: bool = False,
    ) -> KVCache:
        """Make an empty cache for this model, where the model is.

        Args:
            batch_size: B.
            n_slots: tokens that a plain cache holds; a rolling one always holds n_sink + window.
            n_pad: (B,) padding at the left of each row, None for none.
            rolling: forget what is out of the window, and never be full.
            in_cache: let a rolling cache count positions as StreamingLLM does.

        Raises:
            ValueError: a rolling cache for a model without a window.
        """
        config, like = self.config, self.wte.weight
        if rolling and not config.window:
            raise ValueError("a rolling cache forgets, so the model needs a window (--window)")
        if rolling:
            n_slots = config.n_sink + config.window
        shape = (config.n_layer, batch_size, config.n_kv_head, n_slots, config.head_dim)
        if rolling:
            return RollingKVCache(shape, like, config.n_sink, n_pad, self.frequency if in_cache else None)
        return KVCache(shape, like, n_pad)

    def num_parameters(self) -> int:
        """Number of trainable numbers; the tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Number of those that one token uses: of E experts, K. The arithmetic of a token follows from these."""
        experts = sum(moe.fc.weight.numel() + moe.proj.weight.numel() for moe in self.moe_layers())
        n_idle = self.config.n_expert - self.config.n_expert_active
        return self.num_parameters() - experts * n_idle // max(self.config.n_expert, 1)

    def moe_layers(self) -> list[MoE]:
        """The mixtures of experts, from the first block to the last."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]

    def auxiliary_loss(self, balance: float, z: float) -> torch.Tensor:
        """What the routers add to the loss of the last forward pass in training: a weighted sum over the layers.

        Usual weights are 0.01 and 0.001 (Fedus et al. 2022, section 2.2; Zoph et al. 2022, section 3.3).
        """
        losses = [balance * moe.balance_loss + z * moe.z_loss for moe in self.moe_layers()]
        return sum(losses, start=torch.zeros((), device=self.wte.weight.device))
