"""Mixture of experts: many feed-forward networks, of which each token uses a few.

A router scores the experts for every token, the best K of them compute, and their outputs are added up, weighted by
their scores. So a layer can have many times the parameters at the same arithmetic per token.

    probs = softmax(x W_router)                      over all E experts
    y = sum over the K chosen e of g_e expert_e(x)   g: their probs, divided by their sum

To compute it, the N K pairs of a token and an expert are sorted by expert: then the tokens of an expert lie one below
the other, and all experts are one grouped product of matrices, whatever the number of tokens each of them has.

    python part5_moe/lesson2_dispatch.py     # the loops that say the same, the proof that it is the same, and the speed

Shapes: B batch, T time (tokens), C channels, N = B T, E experts, K chosen experts, F hidden width of an expert.

References: Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1 (noisy top-k); Fedus et al. 2022,
"Switch Transformers", section 2.2 (capacity, load-balancing loss); Zoph et al. 2022, "ST-MoE", section 3.3 (router
z-loss); Gale et al. 2023, "MegaBlocks", section 4 (no dropping); Dai et al. 2024, "DeepSeekMoE", section 3 (many
small experts, shared experts); Jiang et al. 2024, "Mixtral of Experts", section 2.1; DeepSeek-AI 2024, "DeepSeek-V3",
section 2.1.2 (balancing by a bias).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from devices import sum_over_processes

if TYPE_CHECKING:
    from model import GPT, GPTConfig


@dataclass
class MixtureConfig:
    """Settings of the experts, for the command line of a training script."""

    n_expert: int = 8
    """E, experts in a mixture. 0: every block has an MLP, as in part 4."""
    n_expert_active: int = 2
    """K, how many of them each token uses."""
    n_shared_expert: int = 0
    """Further experts, which every token uses."""
    moe_every: int = 1
    """Every how many-th block has a mixture; the others have an MLP."""
    n_dense_first: int = 0
    """First blocks that have an MLP in any case."""
    capacity_factor: float = 0.0
    """In training, choices that an expert takes, in multiples of its even share; the rest is dropped. 0: takes all."""
    router_noise: float = 0.0
    """Standard deviation of the noise on the router's scores in training."""
    normalize_gates: bool = True
    """Divide the gates of the K chosen experts by their sum; not with K = 1, which would make every gate 1."""
    bias_rate: float = 1e-3
    """How far the bias that balances the load moves in a step. 0: not at all."""
    balance_weight: float = 0.0
    """Weight of the load-balancing loss; 0.01 is usual where it is used."""
    z_weight: float = 1e-3
    """Weight of the router z-loss, which keeps scores small."""

    def shape(self) -> dict[str, Any]:
        """Those that are fields of GPTConfig.

        Raises:
            ValueError: gates that are always 1, from which the router would learn nothing; a rate or weight below 0.
        """
        for name in ("bias_rate", "balance_weight", "z_weight", "router_noise", "capacity_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} is no number from 0 on; 0 switches it off")
        if self.n_expert > 1 and self.n_expert_active == 1 and self.normalize_gates:
            raise ValueError("n_expert_active = 1 needs --no-normalize_gates: else each gate is 1 and no router learns")
        return {name: v for name, v in vars(self).items() if name not in ("bias_rate", "balance_weight", "z_weight")}


def check_mixture(config: "GPTConfig") -> None:
    """Refuse a model whose experts do not fit together.

    Raises:
        ValueError: it names the field and its value.
    """
    least = {"n_expert": 0, "n_shared_expert": 0, "expert_hidden": 0, "moe_every": 1, "n_dense_first": 0}
    for name, value in (least | {"capacity_factor": 0, "router_noise": 0}).items():
        if getattr(config, name) < value:
            raise ValueError(f"{name} = {getattr(config, name)} is below {value}")
    if not config.n_expert:
        return
    if not 1 <= config.n_expert_active <= config.n_expert:
        raise ValueError(f"n_expert_active = {config.n_expert_active} is not in 1 .. n_expert = {config.n_expert}")
    for name in ("expert_hidden", "n_embd"):
        if getattr(config, name) % 8:
            raise ValueError(f"{name} = {getattr(config, name)} is no multiple of 8, as experts need it")


# --- losses of the router ---


def count_choices(chosen: torch.Tensor, n_expert: int) -> torch.Tensor:
    """How often each expert was chosen, (...) -> (E,), without asking the device for anything."""
    return (chosen.flatten()[:, None] == torch.arange(n_expert, device=chosen.device)).sum(dim=0)


def load_balancing_loss(probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e P_e: small where choices are spread evenly; 1 if they are, E if one expert gets everything.

    f_e is the share of all N K choices that went to expert e, and P_e the mean probability that the router gave it. f
    counts, so the gradient comes through P: it lowers the scores of experts in proportion to how often they are chosen.
    Fedus et al. 2022, equations 4 to 6, with f divided by K, so that 1 means even for any K.

    Args:
        probs: (N, E) of the router, over all experts.
        chosen: (N, K) experts.
    """
    n_expert = probs.shape[-1]
    f = count_choices(chosen, n_expert) / chosen.numel()  # (E,)
    return n_expert * (f * probs.mean(dim=0)).sum()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean of log(sum_e exp(logit_e))^2: keeps scores small, (N, E) -> scalar. Zoph et al. 2022, equation 5."""
    return logits.logsumexp(dim=-1).square().mean()


# --- there and back: no row is added to another by an index ---


def to_experts(x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """Copy each token to its K places among the rows sorted by expert, (N, C) -> (N K, C)."""
    return x.index_select(0, order // k)


def to_tokens(y: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
    """Bring the K rows of each token together and add them up, (N K, C) -> (N, C)."""
    return y.index_select(0, inverse).view(-1, k, y.shape[-1]).sum(dim=1)


class ToExperts(torch.autograd.Function):
    """to_experts, whose gradient is to_tokens: each is the other's transpose.

    Autograd's own gradient of index_select adds rows at an index. That is slower, and on a GPU the order of the
    additions, and so the last digits, would change from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
        """(N, C) -> (N K, C)."""
        ctx.save_for_backward(inverse)
        ctx.k = k
        return to_experts(x, order, k)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """(N K, C) -> (N, C)."""
        return to_tokens(gradient, *ctx.saved_tensors, ctx.k), None, None, None


class ToTokens(torch.autograd.Function):
    """to_tokens, whose gradient is to_experts."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
        """(N K, C) -> (N, C)."""
        ctx.save_for_backward(order)
        ctx.k = k
        return to_tokens(y, inverse, k)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """(N, C) -> (N K, C)."""
        return to_experts(gradient, *ctx.saved_tensors, ctx.k), None, None, None


class ExpertLinear(nn.Module):
    """E matrices in one parameter; each row goes through the matrix of its own expert."""

    def __init__(self, n_expert: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_out, n_in))
        nn.init.uniform_(self.weight, -(n_in**-0.5), n_in**-0.5)  # as nn.Linear has it

    def forward(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """All experts in one grouped product, (M, in) -> (M, out).

        In bfloat16, on GPUs from Hopper on, that is one kernel, which reads `ends` itself. Elsewhere torch multiplies
        slice by slice, after it has read all of `ends` back at once: a wait for each product, not for each expert.

        Args:
            rows: (M, in) sorted by expert.
            ends: (E,) int32, the row after the last one of each expert.
        """
        weight = self.weight
        if torch.is_autocast_enabled(rows.device.type):  # which knows F.linear, but not this product
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        product = F.grouped_mm
        if rows.dtype != torch.bfloat16 and torch.compiler.is_compiling():
            product = torch.compiler.disable(product)  # torch.compile knows it in bfloat16 alone
        return product(rows, weight.mT, offs=ends)


def dispatch(
    x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor, fc: ExpertLinear, proj: ExpertLinear
) -> torch.Tensor:
    """Let the chosen experts, SwiGLU networks, work on each token, and add up their weighted outputs.

    Args:
        x: (N, C) tokens.
        chosen: (N, K) experts.
        gates: (N, K) their weights.
        fc: gate and up of every expert, (E, 2 F, C).
        proj: (E, C, F).

    Returns:
        (N, C).
    """
    k = chosen.shape[1]
    experts, order = chosen.flatten().sort(stable=True)  # (N K,): pair i is of token i // K
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    # How far each expert's rows reach: a tensor on the device, where it is needed, and of a size known beforehand.
    ends = torch.searchsorted(experts, torch.arange(len(fc.weight), device=x.device), right=True, out_int32=True)
    rows = ToExperts.apply(x, order, inverse, k)  # (N, C) -> (N K, C), sorted by expert
    gate, up = fc(rows, ends).chunk(2, dim=-1)  # (N K, F) each
    y = proj(F.silu(gate) * up, ends)  # (N K, F) -> (N K, C)
    y = y * gates.flatten()[order, None].to(y.dtype)
    return ToTokens.apply(y, order, inverse, k)


# --- the layer ---

_counting = True  # False while a block is computed a second time, for its backward pass


@contextmanager
def _not_counting() -> Iterator[None]:
    """Inside, layers leave their statistics alone."""
    global _counting
    before, _counting = _counting, False
    try:
        yield
    finally:
        _counting = before


def recompute_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch.utils.checkpoint's context_fn: what is computed twice is counted once."""
    return nullcontext(), _not_counting()


class MoE(nn.Module):
    """A router and E experts, each a SwiGLU network; takes the place of an MLP.

    (B, T, C) -> (B, T, C)

    Every token is computed by itself, so causality holds, and a cache changes nothing. A capacity is for training
    alone: an expert takes ceil(capacity_factor T K / E) choices of each row of the batch, first come, first served by
    position, and drops the rest. A token may then depend on the choices of tokens before it in its own row; never on
    later ones, and never on other rows. In evaluation nothing is dropped.

    After each forward pass in training it holds
        load: (E,) how often each expert was chosen since update_balance_bias was last called,
        dropped: () how many of these choices found no place,
        balance_loss, z_loss: (), with gradients, and entropy: () of the router in nats, without; of the last pass.
    """

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.n_expert, self.n_active = config.n_expert, config.n_expert_active
        self.capacity_factor, self.noise = config.capacity_factor, config.router_noise
        self.normalize = config.normalize_gates
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.fc = ExpertLinear(config.n_expert, config.n_embd, 2 * config.expert_hidden)  # gate and up in one
        self.proj = ExpertLinear(config.n_expert, config.expert_hidden, config.n_embd)
        # Shared experts see every token. Side by side they are one network of their joint width.
        self.shared_width = config.n_shared_expert * config.expert_hidden
        if self.shared_width:
            self.shared_fc = nn.Linear(config.n_embd, 2 * self.shared_width, bias=False)
            self.shared_proj = nn.Linear(self.shared_width, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("balance_bias", torch.zeros(config.n_expert))
        # No buffer: DDP would copy the first process's to the others, and each has counts of its own.
        self.load, self.dropped = torch.zeros(config.n_expert, dtype=torch.long), torch.zeros((), dtype=torch.long)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the layer gets: all but the losses, which hang on a pass of the original."""
        return {name: value for name, value in self.__dict__.items() if name not in ("balance_loss", "z_loss")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Send each token through its experts, (B, T, C) -> (B, T, C)."""
        chosen, gates = self.route(x)  # (B, T, K) each
        flat = x.flatten(0, 1)  # (B, T, C) -> (N, C)
        y = dispatch(flat, chosen.flatten(0, 1), gates.flatten(0, 1), self.fc, self.proj).view(x.shape)
        if self.shared_width:
            gate, up = self.shared_fc(x).chunk(2, dim=-1)
            y = y + self.shared_proj(F.silu(gate) * up)
        return self.dropout(y)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of each token, and weigh them.

        In float32, whatever the precision around it: softmax turns a rounding error of a score into a relative error of
        a probability, and a choice between two experts turns a small error into a large one (Fedus et al. 2022, 2.4).

        Args:
            x: (B, T, C).

        Returns:
            chosen (B, T, K) and gates (B, T, K), float32; a gate of 0 for what is dropped.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.weight.float())  # (B, T, E)
            noisy = logits + self.noise * torch.randn_like(logits) if self.noise and self.training else logits
            probs = noisy.softmax(dim=-1)
            # The bias moves experts up and down the list, but gates are what the router thinks of them.
            chosen = (probs.detach() + self.balance_bias.float()).topk(self.n_active, dim=-1).indices
            # Gates over their sum are the softmax of the chosen scores alone, which never divides zero by zero.
            gates = noisy.gather(-1, chosen).softmax(dim=-1) if self.normalize else probs.gather(-1, chosen)
            kept = None
            if self.capacity_factor and self.training:
                kept = self.within_capacity(chosen)
                gates = gates * kept
            if self.training:
                self.measure(logits.flatten(0, 1), probs.flatten(0, 1), chosen.flatten(0, 1), kept)
        return chosen, gates

    def within_capacity(self, chosen: torch.Tensor) -> torch.Tensor:
        """Whether each choice, (B, T, K), is among the first of its row for its expert.

        First by position, then by rank among the K. To serve all first choices before any second one, as is usual,
        would let a later token take an earlier one's place.
        """
        capacity = math.ceil(self.capacity_factor * chosen[0].numel() / self.n_expert)
        wanted = chosen.flatten(1)[..., None] == torch.arange(self.n_expert, device=chosen.device)  # (B, T K, E)
        place = (wanted.cumsum(dim=1) * wanted).sum(dim=-1)  # (B, T K), from 1 on
        return (place <= capacity).view_as(chosen)

    def measure(
        self, logits: torch.Tensor, probs: torch.Tensor, chosen: torch.Tensor, kept: torch.Tensor | None
    ) -> None:
        """Leave losses and statistics of a forward pass on the layer; logits and probs (N, E), chosen (N, K)."""
        # A pass that is repeated for its gradients must compute the same, but it has been counted.
        balance_loss, z_loss = load_balancing_loss(probs, chosen), router_z_loss(logits)
        if not _counting:
            return
        self.balance_loss, self.z_loss = balance_loss, z_loss
        with torch.no_grad():
            self.entropy = -(probs * probs.clamp(min=1e-30).log()).sum(dim=-1).mean()
            self.load = self.load.to(chosen.device) + count_choices(chosen, self.n_expert)
            self.dropped = self.dropped.to(chosen.device) + (0 if kept is None else (~kept).sum())


@torch.no_grad()
def update_balance_bias(moe: MoE, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Raise the bias of experts that were chosen too rarely, lower it for those chosen too often, and count anew.

    bias_e <- bias_e + rate sign(mean load - load_e), with the loads of all processes: call it in all of them, once a
    step. DeepSeek-AI 2024, section 2.1.2; for them rate is 0.001.

    Args:
        moe: the layer.
        rate: how far; 0 only counts anew.

    Returns:
        load (E,) and dropped (), summed over all processes since the last call.
    """
    counts = sum_over_processes(torch.cat([moe.load, moe.dropped[None]]).to(moe.balance_bias.device))
    load, dropped = counts[:-1], counts[-1]
    moe.balance_bias += rate * (load.float().mean() - load).sign()
    moe.load, moe.dropped = torch.zeros_like(load), torch.zeros_like(dropped)
    return load, dropped


@torch.no_grad()
def balance_experts(model: "GPT", rate: float, progress: dict[str, Any]) -> None:
    """Balance all layers after a step, and add what they counted to progress["load"], (L, E + 1).

    The last column holds what was dropped. Every tenth step's shares of the load go to progress["loads"], pairs
    (step, (L, E)), for the picture. See update_balance_bias; all processes must call it.
    """
    counts = [
        torch.cat([load, dropped[None]])
        for load, dropped in (update_balance_bias(moe, rate) for moe in model.moe_layers())
    ]
    if counts:
        counts = torch.stack(counts).cpu()
        progress["load"] = counts if progress["load"] is None else progress["load"] + counts
        if progress["step"] % 10 == 0:
            load = counts[:, :-1].double()
            progress["loads"].append((progress["step"], (load / load.sum(dim=1, keepdim=True)).tolist()))
