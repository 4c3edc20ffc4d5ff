"""Optimizers and schedules: what to do with a gradient, and how far to go at which step.

    optimizers = make_optimizers(model, "muon", lr=3e-3, muon_lr=0.02, weight_decay=0.1, betas=(0.9, 0.99))
    for step in range(steps):
        set_learning_rate(optimizers, learning_rate_factor(step, steps, 100, "cosine", 0.1))
        ...
        for optimizer in optimizers:
            optimizer.step()

AdamW looks at each number by itself. Muon looks at a matrix as a whole: it turns the momentum of a matrix into the
nearest matrix that stretches nothing, so that every direction is learned at the same speed. The schedule is a function
of the step alone, so a run that is resumed needs nothing but the number of the step.

    python part4_scaling/lesson3_schedules.py     # the schedules, and why a run warms up
    python part4_scaling/lesson6_muon.py          # Muon by hand, and AdamW against it

References: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2 (AdamW); Jordan et al. 2024,
"Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is Scalable for LLM Training",
sections 2.2 and 2.3; Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
section 3 (warm-up, stable, decay).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from data import UserError
from devices import sum_over_processes, synchronize

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
NS_STEPS = 5  # steps of Newton-Schulz
WSD_DECAY = 0.2  # share of all steps in which "wsd" decays
STACK = 2**27  # numbers that are orthogonalised at a time: 256 MB in bfloat16, and a few times that for products


# --- Muon ---


def orthogonalize(
    matrices: torch.Tensor,
    coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> torch.Tensor:
    """Push all singular values of each matrix towards 1 and leave its singular vectors, by Newton-Schulz.

    One step is X <- a X + b (X X^T) X + c (X X^T)^2 X, which maps every singular value s to a s + b s^3 + c s^5 and
    needs nothing but matrix products. The usual coefficients are chosen to be fast, not exact: five steps bring
    singular values between 0.003 and 1 to between 0.68 and 1.21 (Jordan et al. 2024).

    Args:
        matrices: (N, rows, columns), rows <= columns, in the precision to compute in.
        coefficients: a, b and c.
        steps: how often.
        eps: the smallest size to divide by.

    Returns:
        (N, rows, columns).
    """
    a, b, c = coefficients
    # The largest singular value is at most the root of the sum of their squares: now all are in [0, 1].
    x = matrices / matrices.flatten(1).norm(dim=1).clamp(min=eps).view(-1, 1, 1)
    for _ in range(steps):
        gram = x @ x.mT  # (N, rows, columns) -> (N, rows, rows): the smaller of the two ways round
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, if it is sharded over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Keep this process's share of a tensor that all have, if the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Muon(torch.optim.Muon):
    """torch.optim.Muon, faster and for joined matrices.

    A group may have a list `rows`, which says for each of its parameters how it is joined: (128, 128, 128) for queries,
    keys and values in one. The parts are orthogonalised each by itself, as if they were parameters of their own. All of
    one shape are then a single batched product, which is what makes it faster: small ones cannot keep a processor busy.
    A parameter of three dimensions is a stack of matrices, the experts of a mixture, each of them joined like that.

    What is sharded over processes (DTensor) is put together first, because half a matrix has other singular vectors.
    """

    def __init__(self, params: Any, *args: Any, **settings: Any) -> None:
        super().__init__([{"params": []}], *args, **settings)  # which would refuse three dimensions
        self.param_groups.clear()
        groups = list(params)
        for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
            self.add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rows = group.get("rows") or [(parameter.shape[-2],) for parameter in group["params"]]
            moving = [(p, r) for p, r in zip(group["params"], rows, strict=True) if p.grad is not None]
            # A stack of matrices, one below the other, is cut after every one of its parts.
            moving = [(p, r * (p.shape[0] if p.dim() == 3 else 1)) for p, r in moving]
            # 1. Momentum, then the parts of each matrix, none of them taller than wide.
            parts = [part for p, r in moving for part in whole(self.momentum(group, p)).flatten(0, -2).split(r)]
            shapes = [part.shape for part in parts]
            wide = [part.mT if part.shape[0] > part.shape[1] else part for part in parts]
            # 2. All of one shape at once.
            done = iter(orthogonalize_all(wide, group["ns_coefficients"], group["ns_steps"], group["eps"]))
            shape = iter(shapes)
            # 3. Back to the shape that they had, and a step in that direction.
            for p, r in moving:
                pieces = []
                for _ in r:
                    n_rows, n_columns = next(shape)
                    piece = next(done).mT if n_rows > n_columns else next(done)
                    pieces.append(piece.to(p.dtype) * shape_factor(group["adjust_lr_fn"], n_rows, n_columns))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(placed_like(p, torch.cat(pieces).view(p.shape)), alpha=-group["lr"])
        return loss

    def momentum(self, group: dict, parameter: nn.Parameter) -> torch.Tensor:
        """Let the gradient into the running mean; return the mean or, with Nesterov, what it would be a step later."""
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        update = parameter.grad.lerp(mean, momentum) if group["nesterov"] else mean
        return update.to(product_dtype(update.device))


def orthogonalize_all(
    matrices: list[torch.Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[torch.Tensor]:
    """Orthogonalise matrices of several shapes, those of one shape together; in the order in which they came."""
    places: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        places.setdefault(matrix.shape, []).append(i)
    done = list(matrices)
    for shape, indices in places.items():
        at_once = max(1, STACK // shape.numel())
        for start in range(0, len(indices), at_once):
            some = indices[start : start + at_once]
            stack = torch.stack([matrices[i] for i in some])
            for i, matrix in zip(some, orthogonalize(stack, coefficients, steps, eps), strict=True):
                done[i] = matrix
    return done


def shape_factor(adjust_lr_fn: str | None, n_rows: int, n_columns: int) -> float:
    """Scale of a step by the shape of the matrix, as torch.optim.Muon has it.

    An orthogonal matrix has entries of size 1 / sqrt(longer side). "match_rms_adamw" multiplies by 0.2 sqrt(longer
    side), so that a step changes entries as much as one of AdamW usually does (Liu et al. 2025, equation 4); otherwise
    a matrix that makes vectors longer may take a longer step, sqrt(rows / columns) (Jordan et al. 2024).
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(n_rows, n_columns) ** 0.5
    return max(1.0, n_rows / n_columns) ** 0.5


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, in which products are faster and precise enough; float32 on CPUs that only mimic it."""
    mimics = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if mimics else torch.bfloat16


# --- which optimizer for what ---


def joined_rows(model: nn.Module, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
    """Rows of each of the matrices that a parameter of a block joins: one number if it is a matrix by itself.

    Of a stack of matrices, all of which are joined alike, those of one.
    """
    n_rows = parameter.shape[-2]
    layer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    if name.endswith(".attn.qkv.weight"):  # queries, keys and values; with fewer heads for the last two in GQA
        return tuple(n * n_rows // sum(layer.heads) for n in layer.heads)
    if name.endswith((".mlp.fc.weight", ".mlp.shared_fc.weight")):  # gate and up
        return (n_rows // 2,) * 2
    return (n_rows,)


def make_optimizers(
    model: nn.Module, optimizer: str, lr: float, muon_lr: float, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a model; each of its parameters that is trained belongs to one of them.

    Matrices and embeddings decay. A bias or a norm's scale has nothing to gain from being near zero, so vectors do not.

    Args:
        model: a GPT, or anything that holds one; the parameters of its blocks have `blocks` in their names.
        optimizer: "adamw" for all; or "muon" for the matrices of the blocks and AdamW for the rest: embeddings and the
            output matrix, in which every row is a token by itself, and vectors.
        lr: highest learning rate of AdamW.
        muon_lr: highest learning rate of Muon.
        weight_decay: share of the learning rate by which matrices shrink in a step.
        betas: how much AdamW keeps of its means of gradient and squared gradient from step to step.

    Returns:
        One optimizer or two. Each group has its highest learning rate as `initial_lr`, see set_learning_rate.

    Raises:
        UserError: an unknown optimizer, or a number with which none can work.
    """
    if optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer {optimizer} is unknown; give one of {', '.join(OPTIMIZERS)}")
    for name, value in (("lr", lr), ("muon_lr", muon_lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} {value} is no number from 0 on; give 0 or more")
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"--betas {' '.join(map(str, betas))}: both have to be in [0, 1); 0.9 0.95 is usual")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    vectors = [parameter for _, parameter in named if parameter.dim() < 2]
    hidden = [(n, p) for n, p in named if optimizer == "muon" and p.dim() >= 2 and "blocks" in n.split(".")]
    by_muon = {parameter for _, parameter in hidden}
    matrices = [parameter for _, parameter in named if parameter.dim() >= 2 and parameter not in by_muon]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
    if hidden:
        group = {"params": [p for _, p in hidden], "rows": [joined_rows(model, n, p) for n, p in hidden]}
        optimizers.append(Muon([group], lr=muon_lr, weight_decay=weight_decay, ns_steps=NS_STEPS))
    for group in (group for made in optimizers for group in made.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


# --- schedules ---


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: str, final: float) -> float:
    """Share of the highest learning rate at a step; a function of the step alone, so nothing has to be saved.

    It rises in a straight line for warmup_steps, then follows the schedule, with p going from 0 to 1 over the rest:

        cosine     final + (1 - final) (1 + cos(pi p)) / 2
        linear     final + (1 - final) (1 - p)
        wsd        1 until the last fifth of all steps, then final + (1 - final) (1 - sqrt(p)), p from 0 to 1 there
        constant   1

    Args:
        step: from 0 on; after `steps` the factor stays as it is at the end.
        steps: all steps of the run.
        warmup_steps: steps until the factor is 1. The first one does not stand still: it has 1 / warmup_steps.
        schedule: one of the above. What "wsd" gives does not depend on `steps` before its last fifth begins.
        final: where cosine, linear and wsd end, in [0, 1].

    Returns:
        A number in [0, 1].

    Raises:
        UserError: an unknown schedule, or a number out of its range.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"--schedule {schedule} is unknown; give one of {', '.join(SCHEDULES)}")
    for name, value in (("step", step), ("steps", steps), ("warmup_steps", warmup_steps)):
        if value < 0:
            raise UserError(f"--{name} {value} is below 0; give 0 or more")
    if not 0 <= final <= 1:
        raise UserError(f"--final_lr {final} is outside [0, 1]; it is a share of the highest learning rate")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    start = max(warmup_steps, steps - int(WSD_DECAY * steps)) if schedule == "wsd" else warmup_steps
    p = min(max(step - start, 0) / max(steps - start, 1), 1.0)
    falling = {"cosine": (1 + math.cos(math.pi * p)) / 2, "linear": 1 - p, "wsd": 1 - p**0.5}[schedule]
    return final + (1 - final) * falling


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Give every group the share `factor` of its own highest learning rate, its `initial_lr`."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["initial_lr"] * factor


# --- one step ---


def accumulate_gradients(
    model: nn.Module,
    batch_loss: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    n_micro: int,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
) -> torch.Tensor:
    """Add up the gradients of one step's batch, a few rows at a time, to the gradient of the mean over all its tokens.

    Every token counts the same, wherever it stands: each micro-batch's sum is divided by the number of targets in the
    whole batch of all processes. A mean of means would count a token more that shares its micro-batch with few.

    Args:
        model: plain, DDP or sharded; those average gradients over processes, on the last micro-batch only.
        batch_loss: (model, x, y, dtype) -> mean loss over the targets that are not -100.
        x, y: (B * n_micro, T) this process's rows.
        n_micro: micro-batches.
        dtype: the precision of the matrix products.
        scaler: scales the loss in fp16.

    Returns:
        The mean loss over all tokens of all processes.
    """
    n_processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    n_targets = sum_over_processes((y != -100).sum())
    total = torch.zeros((), device=x.device)
    for i, (some_x, some_y) in enumerate(zip(x.chunk(n_micro), y.chunk(n_micro), strict=True)):
        synchronize(model, i == n_micro - 1)
        share = (some_y != -100).sum() / n_targets
        loss = batch_loss(model, some_x, some_y, dtype)
        loss = loss * share if share > 0 else loss.nan_to_num() * 0  # a mean over no target at all is NaN
        total += loss.detach()
        scaler.scale(loss * n_processes).backward()  # they will divide by their number
    return sum_over_processes(total)


def update(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, clip: float
) -> float:
    """Clip the gradient and take a step with each optimizer.

    Returns:
        The gradient's length before clipping; not finite if the step was skipped.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = clip_grad_norm_(model.parameters(), clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if torch.isfinite(norm):  # all of them or none: clipping has spread a NaN to every gradient
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()  # in fp16, halves the scale after a gradient that was not finite
    for optimizer in optimizers:
        optimizer.zero_grad()
    return norm.item()


def count_skipped(
    progress: dict[str, Any], loss: float, norm: float, scaled: bool, say: Callable[[str], None], latest: Path
) -> None:
    """Count the steps that `update` skipped because a number was not finite, and stop a run that is beyond help.

    Args:
        progress: its step, skipped and in_a_row are read and counted up.
        loss, norm: of this step.
        scaled: whether a loss scaler is at work: it tries too large a scale now and then, which is no accident.
        say: where to report.
        latest: the last checkpoint, to name it.

    Raises:
        UserError: ten in a row.
    """
    if math.isfinite(loss) and (math.isfinite(norm) or scaled):
        progress["in_a_row"] = 0
        return
    progress["skipped"] += 1
    progress["in_a_row"] += 1
    say(f"step {progress['step']}: loss {loss}, gradient {norm}: skipped, {progress['skipped']} so far")
    if progress["in_a_row"] == 10:
        good = f"go on from the last good checkpoint, {latest}," if latest.is_file() else "begin again"
        raise UserError(f"ten steps in a row without a finite loss or gradient; {good} with a smaller --lr")
