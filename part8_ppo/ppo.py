"""The formulas of PPO on text: from the score of a whole response to a loss for each of its tokens.

    score (B,), log-probabilities (B, T)  -> shape_rewards -> rewards (B, T)
    rewards, values (B, T)                -> gae           -> advantages, returns (B, T) -> whiten
    log-probabilities, advantages (B, T)  -> ppo_policy_loss
    values, returns (B, T)                -> value_loss

    python part8_ppo/lesson1_policy_gradient.py     # the ratio and the clip, on a bandit
    python part8_ppo/lesson2_gae.py                 # advantages, against their definition
    python part8_ppo/lesson3_kl.py                  # three estimators of a KL, and what gradient each one gives

Shapes: B rows, T tokens of responses, V vocabulary. `mask` (B, T) is True on the tokens that were drawn, the end token
among them, and False on what stands after them; no function reads what stands there. Log-probabilities are in nats and
in float32 or finer.

References: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Schulman et al. 2016, "High-Dimensional
Continuous Control Using Generalized Advantage Estimation"; Ziegler et al. 2019, "Fine-Tuning Language Models from Human
Preferences", section 2; Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4 and appendix
B.1; Schulman 2020, "Approximating KL Divergence" (a note); Huang et al. 2024, "The N+ Implementation Details of RLHF
with PPO".
"""

import math

import torch
import torch.nn.functional as F

KINDS = ("k1", "k2", "k3")
"""Estimators of a KL divergence, see kl_estimate."""


# --- means over what was drawn ---


def check(mask: torch.Tensor, *others: torch.Tensor) -> None:
    """Compare shapes, for those that can be spread to each other would be, and give a loss of something else.

    Raises:
        ValueError: mask is no (B, T) of booleans, or one of the others has another shape.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is of {mask.dtype}, and should be of booleans: True on the tokens that were drawn")
    shapes = [tuple(some.shape) for some in (mask, *others)]
    if mask.dim() != 2 or len(set(shapes)) > 1:
        raise ValueError(f"the mask and what goes with it have the shapes {shapes}, and should all have (B, T)")


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that were drawn, (B, T) -> scalar: each token counts alike, long rows more than short ones.

    Raises:
        ValueError: shapes, see check; or a mask that is False everywhere.
    """
    check(mask, x)
    if not mask.any():
        raise ValueError("the mask is False everywhere: there is no token to take the mean over")
    return torch.where(mask, x, 0.0).sum() / mask.sum()  # x * mask would let a nan through


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Give the tokens that were drawn the variance 1, and the mean 0.

    Advantages are whitened so that the size of a step does not depend on the unit of the reward.

    Args:
        x: (B, T).
        mask: (B, T).
        shift_mean: False leaves the mean as it is, as Ziegler et al. (2019) treat rewards in their code.

    Returns:
        (B, T), 0 where the mask is False. The variance is the mean square away from the mean, so that a single token
        gives 0 and not nan; equal numbers give (nearly) 0 too.

    Raises:
        ValueError: as masked_mean.
    """
    mean = masked_mean(x, mask)
    away = torch.where(mask, x - mean, 0.0)
    white = away * torch.rsqrt(masked_mean(away.square(), mask) + 1e-8)
    return white if shift_mean else torch.where(mask, white + mean, 0.0)


# --- rewards and advantages ---


@torch.no_grad()
def shape_rewards(
    scores: torch.Tensor, logp: torch.Tensor, ref_logp: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """A reward for each token: -beta (logp - ref_logp), and at the row's last token the score as well.

    The sum over a row is score - beta log(pi(y | x) / ref(y | x)), which is what is to be maximised: Ziegler et al.
    2019, section 2. The penalty is k1, the only estimator whose use as a reward has the gradient of the KL
    (lesson3_kl.py).

    Args:
        scores: (B,), what each response is worth.
        logp: (B, T) of the policy that drew the tokens.
        ref_logp: (B, T) of the reference.
        mask: (B, T), True from each row's first token to its last.
        beta: weight of the penalty, 0 or more.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        ValueError: shapes; or a row without a token, whose score would be lost.
    """
    check(mask, logp, ref_logp)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores of the shape {tuple(scores.shape)} for {len(mask)} rows: there is one for each row")
    if not mask.any(dim=1).all():
        raise ValueError("a row has no token in its mask: there is nothing that its score could be given to")
    rewards = torch.where(mask, -beta * kl_estimate(logp, ref_logp, "k1"), 0.0)
    place = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * place).argmax(dim=1)  # (B,)
    rewards[torch.arange(len(mask), device=mask.device), last] += scores.to(rewards.dtype)
    return rewards


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: how much better than expected things went from a token on.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + (gamma lam) delta_{t+1} + (gamma lam)^2 delta_{t+2} + ...

    Schulman et al. 2016, section 3, equation 16. The value after a row's last token is 0. For a response that ended
    this is so by definition. One that was cut off is treated alike: its score is for what there is, and nothing is
    added for what it might have become.

    Args:
        rewards: (B, T), what came for drawing token t.
        values: (B, T), what the critic expected before token t was drawn.
        mask: (B, T), True from each row's first token to its last.
        gamma: discount per token. 1 for text: there an early token is as much to blame as a late one.
        lam: lambda; 0: what follows is the critic's guess, 1: all that came, minus the critic's guess.

    Returns:
        Advantages and returns, (B, T) each, without a gradient, 0 where the mask is False. Returns are advantages +
        values: what the critic is to learn.

    Raises:
        ValueError: shapes, see check.
    """
    check(mask, rewards, values)
    # With zeros after the end, both V_{t+1} and A_{t+1} are right at the last token without another thought.
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = F.pad(values, (0, 1))[:, 1:]  # (B, T), V_{t+1}
    deltas = rewards + gamma * following - values
    advantages, later = torch.zeros_like(deltas), deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        later = deltas[:, t] + gamma * lam * later  # (B,), A_t out of A_{t+1}
        advantages[:, t] = later
    return advantages, advantages + values


# --- the losses ---


def ppo_policy_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of PPO, with the sign of a loss: mean of max(-A r, -A clamp(r, 1 - clip, 1 + clip)).

    r = exp(logp - old_logp) is how much likelier a token has become since it was drawn. Schulman et al. 2017, section
    3, equation 7. Once r has left [1 - clip, 1 + clip] on the side to which A pushes it, the gradient is 0; on the
    other side it is not, so that a step in the wrong direction can be taken back.

    Args:
        logp: (B, T), of the policy as it is now; carries the gradient.
        old_logp: (B, T), of the policy that drew the tokens.
        advantages: (B, T).
        mask: (B, T).
        clip: 0.2 is usual; inf for none.

    Returns:
        The loss, and the share of tokens whose gradient the clip has cut off, without a gradient.

    Raises:
        ValueError: shapes, see check; or a mask that is False everywhere.
    """
    check(mask, logp, old_logp, advantages)
    # Masked before exp: an infinite ratio after the end would make the gradient nan, though its loss counts 0.
    ratio = torch.where(mask, logp - old_logp, 0.0).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(free, clipped), mask)
    return loss, masked_mean((clipped > free).to(loss.dtype), mask)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of the critic, or that of its values clipped to old_values +- clip where it is larger.

    So a value that has moved by more than clip since the rollout, towards its return, is moved no further. Not in the
    paper, but in the code of PPO's authors and most others'; Huang et al. 2024, "The N+ Implementation Details of RLHF
    with PPO".

    Args:
        values: (B, T), of the critic as it is now; carries the gradient.
        old_values: (B, T), at the time of the rollout.
        returns: (B, T), what values should have been, see gae.
        mask: (B, T).
        clip: in the unit of the reward; 0 or inf for none.

    Returns:
        The loss, and the share of tokens for which the clipped value's error was the larger, without a gradient.

    Raises:
        ValueError: shapes, see check; or a mask that is False everywhere.
    """
    check(mask, values, old_values, returns)
    values, clip = torch.where(mask, values, 0.0), clip or math.inf
    error = (values - returns).square()
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(error, clipped), mask)
    return loss, masked_mean((clipped > error).to(loss.dtype), mask)


# --- how far, how sure, how well ---


def kl_estimate(logp: torch.Tensor, ref_logp: torch.Tensor, kind: str) -> torch.Tensor:
    """What one drawn token says of KL(policy || reference), in nats; the mean over many is the estimate.

        d = ref_logp - logp        k1 = -d        k2 = d^2 / 2        k3 = exp(d) - 1 - d

    k1 is right on average, but negative for every token that the reference likes better. k2 and k3 never are; k2 is a
    little off, k3 is right on average. All that holds for their values, and for tokens that were drawn from the policy;
    for their gradients see lesson3_kl.py. Schulman 2020, "Approximating KL Divergence".

    Args:
        logp: any shape, of the policy that drew the tokens.
        ref_logp: of the same shape, of the reference.
        kind: k1, k2 or k3.

    Returns:
        The same shape.

    Raises:
        ValueError: another kind, or two shapes.
    """
    if logp.shape != ref_logp.shape:
        raise ValueError(f"log-probabilities of the shapes {tuple(logp.shape)} and {tuple(ref_logp.shape)}")
    d = ref_logp - logp
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return (torch.expm1(d) - d).clamp(min=0)  # for a small d, exp(d) - 1 - d would be rounding, above or below 0
    raise ValueError(f"kind = {kind!r}: no such estimator; give one of {', '.join(KINDS)}")


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the whole distribution that logits stand for, not of the drawn token: (B, T, V) -> (B, T).

    Args:
        logits: whatever comes before V; divided by the temperature already. -inf is a token that cannot be drawn.

    Returns:
        Between 0 (certain) and ln V (uniform), in float32.
    """
    logp = F.log_softmax(logits.float(), dim=-1)
    # 0 log 0 is 0, but 0 * -inf is nan, and so would be its gradient.
    return -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(dim=-1)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the tokens that were drawn.

    Returns:
        1: the critic knows the returns up to a constant; 0: it knows as much as a constant does; below 0: it misleads.
        0 if all returns are equal, for then there is nothing to explain.

    Raises:
        ValueError: shapes, see check; or a mask that is False everywhere.
    """
    check(mask, values, returns)
    v, r = values[mask].cpu().double(), returns[mask].cpu().double()  # (N,); MPS has no float64
    if len(r) == 0:
        raise ValueError("the mask is False everywhere: there is no token whose return could be explained")
    if r.min() == r.max():
        return 0.0
    return 1.0 - ((r - v).var(correction=0) / r.var(correction=0)).item()


class AdaptiveKL:
    """A weight of the penalty that follows the KL: it rises while the KL is above its target, and falls below it.

    Ziegler et al. 2019, section 2.2:

        e = clip(KL / target - 1, -0.2, 0.2)        beta <- beta (1 + e n / horizon)

    All of its state is the number `value`, which a checkpoint keeps.
    """

    def __init__(self, value: float, target: float, horizon: float) -> None:
        """Begin.

        Args:
            value: the first beta. From 0 it never moves.
            target: in nats per response, or in whatever unit update is told.
            horizon: after about so many responses, beta has changed by its own size times the error e.

        Raises:
            ValueError: a value below 0; a target or a horizon that is not above 0.
        """
        if value < 0 or target <= 0 or horizon <= 0:
            raise ValueError(f"value = {value}, target = {target}, horizon = {horizon}: 0 or more, and twice above 0")
        self.value, self.target, self.horizon = float(value), target, horizon

    def update(self, kl: float, n: int) -> float:
        """Adapt beta to the KL that n responses had on average, and return it. No update is larger than by a fifth."""
        error = max(-0.2, min(0.2, kl / self.target - 1))
        self.value *= 1 + error * min(1.0, n / self.horizon)
        return self.value
