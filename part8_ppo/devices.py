"""Where to compute, in which precision, and together with whom.

The same script runs on a laptop's CPU, on one GPU and on many of them. What differs is collected here: which device,
which number format for the matrix products, and, if `torchrun` started several processes, which of them this one is.

    python part4_scaling/lesson7_devices.py                            # what each of them costs and gains
    torchrun --nproc_per_node=2 -- part5_moe/train.py              # two processes, with batches of their own

References: Micikevicius et al. 2018, "Mixed Precision Training", section 3; Li et al. 2020, "PyTorch Distributed",
section 3 (DDP); Zhao et al. 2023, "PyTorch FSDP", section 3 (sharding).
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from data import UserError

# --- one device ---


def pick_device(name: str) -> torch.device:
    """Choose where to compute: "auto" takes CUDA, then MPS (Apple), then the CPU.

    Raises:
        UserError: the device that was asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there.get(name.split(":")[0], False):
        raise UserError(f"--device {name}: not on this machine; it has {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of the matrix products: bf16 where a GPU has it, fp16 where it has not, else fp32.

    bf16 has the range of fp32, so gradients need no care. fp16 has not: it needs a loss scaler (make_scaler).
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute matrix products in `dtype`, and what needs range or precision (the loss; on CUDA norms too) in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """A scaler that keeps small gradients representable; it does nothing unless the precision is fp16."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# Dense peak of one chip in FLOP/s, without sparsity, from the makers' data sheets: half precision, and fp32 (TF32).
PEAKS = {
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "A10": (125e12, 62e12),
    "T4": (65e12, 8e12),
    "V100": (125e12, 16e12),
    "RTX 4090": (165e12, 83e12),
    "RTX 3090": (71e12, 36e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What the device can do at most, in FLOP/s: from a table for GPUs, measured for everything else.

    A product of two 1024 x 1024 matrices is about the best that a CPU gets out of torch, so utilisation is measured
    against that.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, full) in PEAKS.items():
            if re.search(rf"\b{known}\b", name):  # an L40 is no L4, an A10G no A10
                return full if dtype == torch.float32 else half
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 8) -> float:
    """The best rate of `repeats` products of two (size, size) matrices, in FLOP/s."""
    a = torch.ones(size, size, device=device, dtype=dtype)  # drawing numbers would disturb the run's own draws
    best = float("inf")
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- many processes ---


@dataclass(frozen=True)
class Processes:
    """Which of several processes this one is; alone if torchrun has not started it."""

    rank: int = 0
    """Number of this process among all, from 0."""
    local_rank: int = 0
    """Number of this process on its machine: the number of its GPU."""
    count: int = 1
    """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and logs, and speaks."""
        return self.rank == 0


@contextmanager
def processes(device_name: str) -> Iterator[tuple[Processes, torch.device]]:
    """Join the others, if torchrun started several, until the end of the `with` block; gives this process's device.

    Raises:
        UserError: more processes on this machine than it has GPUs, or a device that is not there.
    """
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 products as TF32, where the GPU has it
    if "RANK" not in os.environ:
        yield Processes(), device
        return
    here = Processes(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if device.type == "cuda":
        if here.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {here.local_rank + 1} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; give torchrun --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    # The others wait while the main process encodes a large text; ten minutes, the usual limit, may be too few.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield here, device
    finally:
        dist.destroy_process_group()


def main_first(here: Processes, make: Callable[[], Any]) -> Any:
    """Call `make` in the main process, then in the others, which find its files. All get what it returns there."""
    made = make() if here.is_main else None
    if dist.is_initialized():
        dist.barrier()
    return made if here.is_main else make()


def from_main(value: Any) -> Any:
    """The main process's value, in all processes; plain values only."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over all processes; each gets the sum. Alone, the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def spread(model: nn.Module, blocks: nn.ModuleList, device: torch.device, shard: bool, dtype: torch.dtype) -> nn.Module:
    """Let all processes train one model.

    DDP keeps a whole copy in each process and averages the gradients. Sharding (FSDP2) gives each process a part of
    every parameter, its gradient and its optimizer state, and collects a block's parameters when it is their turn: for
    models that do not fit.

    Args:
        model: the model, on its device, equal in all processes.
        blocks: its layers, which are sharded one by one.
        device: this process's.
        shard: FSDP2 instead of DDP.
        dtype: precision of the products, which sharding sends parameters in.
    """
    if not dist.is_initialized():
        return model
    if shard:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def synchronize(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass exchanges gradients between processes; in between there is no need."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
