"""Train several models side by side, so that a difference between them is a difference of the models.

All see the same batches in the same order, with train.py's optimizer and schedule, and they take turns of one step:
whatever else the machine does meanwhile, it does to all of them, so their times can be compared as well.

    python part3_arch_improvements/ablation.py      # seven models in three seeds; lessons 1, 3 and 7 use it too
"""

import math
import time
from statistics import stdev

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import train
from data import UserError, get_batch


def race(
    models: dict[str, nn.Module], tokens: torch.Tensor, settings: train.Config, seed: int, bar: tqdm
) -> dict[str, dict[str, list[float]]]:
    """Train several models in place on the same batches, in turns of one step.

    Args:
        models: name -> model that is called as GPT is, all on one device.
        tokens: (N,) ids to train on.
        settings: those of train.py: steps, batch_size, block_size, lr and so on.
        seed: of the batches.
        bar: moves on by one for each step of each model.

    Returns:
        name -> `loss`, `gradient` (its length before clipping) and `seconds`, one number of each for each step.

    Raises:
        UserError: a loss is no number any more.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizers = {name: train.make_optimizer(model, settings) for name, model in models.items()}
    runs: dict[str, dict[str, list[float]]] = {name: {"loss": [], "gradient": [], "seconds": []} for name in models}
    for step in range(settings.steps):
        x, y = get_batch(tokens, settings.batch_size, settings.block_size, generator)
        for name, model in models.items():
            started = time.perf_counter()
            for group in optimizers[name].param_groups:
                group["lr"] = train.learning_rate(step, settings)
            device = model.wte.weight.device
            loss = train.batch_loss(model, x.to(device), y.to(device), settings)
            loss.backward()
            gradient = clip_grad_norm_(model.parameters(), settings.clip)
            optimizers[name].step()
            optimizers[name].zero_grad()
            found = {"loss": loss.item(), "gradient": gradient.item(), "seconds": time.perf_counter() - started}
            for key, value in found.items():
                runs[name][key].append(value)
            if not math.isfinite(found["loss"]):
                raise UserError(
                    f"the loss of {name} is {found['loss']} at step {step}: try an --lr below {settings.lr}"
                )
            bar.update()
    return runs


def spread(values: list[float]) -> float:
    """Standard deviation over the seeds; 0 if there is one."""
    return stdev(values) if len(values) > 1 else 0.0
