"""What this machine is, what it can do in a second, and what a training step will ask of it.

Does a model fit into memory, how long does a step take, and is the machine or the program the limit? A pencil answers
that from two numbers, the rate of matrix products and the bandwidth of memory. This script measures both, predicts the
memory and the arithmetic of one training step from a config, and lays the measured values beside the predicted ones.

    python part0_foundations/lesson2_environment.py      # about 10 seconds on two CPU cores; also on CUDA and MPS

You should see five tables (the machine, its rates, a step predicted and measured, the operations of a step, what
numbers below 1e-38 cost), a figure, and a trace for chrome://tracing.

References: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1 (6ND); Korthikanti et al. 2022,
"Reducing Activation Recomputation", section 4.1; Micikevicius et al. 2018, "Mixed Precision Training", section 3 (loss
scaling); Williams et al. 2009, "Roofline".
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch: its profiler reports each start and stop at level 5

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Measure the machine, then predict and measure one training step of a small GPT-like stack."""

    batch_size: int = 12
    """B, sequences in a batch."""
    block_size: int = 64
    """T, tokens in a sequence."""
    vocab_size: int = 256
    """V, kinds of tokens."""
    n_layer: int = 4
    """L, blocks."""
    n_head: int = 4
    """H, attention heads."""
    n_embd: int = 128
    """C, channels."""
    budget: float = 0.05
    """Seconds that one repetition of a measurement may take; sizes are chosen by it."""
    device: str = "auto"
    """Where to measure: auto (cuda, then mps, then cpu), cuda, mps or cpu."""
    seed: int = 0
    """Seed of the weights and the tokens; timings differ from run to run all the same."""
    out: Path = RUNS / "lesson2_environment"
    """Folder for the figure, the trace and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


def pick_device(wanted: str = "auto") -> str:
    """The device that our scripts choose: cuda, then mps, then cpu. Exits with status 2 if the wanted one is absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [name for name, available in present.items() if available]
    if wanted not in ("auto", *there):
        print(f"error: --device {wanted} is not available here; there is: auto, {', '.join(there)}", file=sys.stderr)
        raise SystemExit(2)
    return there[0] if wanted == "auto" else wanted


def pick_precision(device: str) -> str:
    """What our scripts would train in on a device, and why."""
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16 autocast: tensor cores multiply it at full speed, and its range is that of fp32, so no scaler"
    if device == "cuda":
        return "fp16 autocast with GradScaler: no bf16 units, and gradients below 6e-8 would vanish unless scaled up"
    return f"fp32: right on every {device}; bf16 pays only where the table below shows it faster"


def describe(device: str) -> dict[str, str]:
    """What a bug report should begin with."""
    chip = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": f"{torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}",
        "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "our device": f"{device} ({chip}): cuda before mps before cpu",
        "our precision": pick_precision(device),
    }


# --- rates: how many operations and how many bytes in a second -------------------------------------------------------
def seconds_of(action: Callable[[], object], device: str, repetitions: int = 7) -> float:
    """Median seconds of one call, after one call to warm up. The median ignores the call that was interrupted."""
    times = []
    for _ in range(repetitions + 1):
        getattr(torch, device).synchronize()  # a GPU works on while Python has gone ahead; torch.cpu has a dummy
        start = time.perf_counter()
        action()
        getattr(torch, device).synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_rate(device: str, dtype: torch.dtype, budget: float) -> tuple[int, float]:
    """GFLOP/s of an n x n matrix product, with the largest n (a power of two) that stays within the budget.

    A product of (n, n) by (n, n) takes n multiplications and n additions for each of n^2 results: 2 n^3 operations.
    Returns n and 1e9 operations a second; (0, 0.0) where the device cannot do it in this precision.
    """
    n, best, seconds = 256, (0, 0.0), 0.0
    while n <= 16384 and 8 * seconds <= budget:  # twice the side, eight times the work
        try:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # each (n, n)
            seconds = seconds_of(lambda a=a, b=b: a @ b, device)
        except (RuntimeError, TypeError):  # no fp64 on MPS, for one
            break
        best = (n, 2 * n**3 / seconds / 1e9)
        n *= 2
    return best


def measure_rates(config: Config, device: str) -> dict[str, float]:
    """Print the table of precisions and rates; return the numbers."""
    metrics = {}
    print("\nmatrix products, and what the number format can hold")
    print("        bits  exponent  smallest normal  steps at 1    size   GFLOP/s   against fp32")
    kinds = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
    if device == "cuda":
        kinds["tf32"] = torch.float32  # fp32 numbers, multiplied with 10 bits of mantissa
    for name, dtype in kinds.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        n, rate = matmul_rate(device, dtype, config.budget)
        info = torch.finfo(dtype)
        eps = 2.0**-10 if name == "tf32" else info.eps
        exponent = info.bits - 1 + round(math.log2(info.eps))  # what sign and mantissa leave over
        metrics[f"matmul_{name}_gflops"] = rate
        ratio = f"{rate / metrics['matmul_fp32_gflops']:8.2f} x" if rate else "not here"
        print(f"  {name}  {info.bits:4d}  {exponent:8d}  {info.tiny:15.1e}  {eps:10.1e}  {n:6d}  {rate:8.1f}   {ratio}")
    torch.set_float32_matmul_precision("highest")
    source = torch.ones((16 if config.smoke else 256) * 2**20, dtype=torch.uint8, device=device)  # beyond any cache
    target = torch.empty_like(source)
    metrics["bandwidth_gb_s"] = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device) / 1e9
    print(f"memory: {metrics['bandwidth_gb_s']:.1f} GB/s, copied: every byte is read once and written once")
    metrics["balance"] = metrics["matmul_fp32_gflops"] / metrics["bandwidth_gb_s"]
    print(f"balance: below {metrics['balance']:.1f} operations a byte (fp32), memory is the limit; above, arithmetic")
    return metrics


# --- a training step, predicted --------------------------------------------------------------------------------------
class Block(nn.Module):
    """One transformer block, written so that everything it keeps can be counted; explained in part 1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, c = config.n_head, config.n_embd
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.register_buffer("future", torch.ones(config.block_size, config.block_size, dtype=torch.bool).triu(1))

    def forward(self, x: torch.Tensor, fused: bool) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); `fused` computes the same attention without keeping its (T, T) weights."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.n_head, -1))  # (B, T, C) -> (B, T, 3C) -> (B, T, 3H, D)
        q, k, v = parts.transpose(1, 2).chunk(3, dim=1)  # -> (B, 3H, T, D) -> 3 x (B, H, T, D)
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
            y = scores.masked_fill(self.future, -torch.inf).softmax(dim=-1) @ v  # -> (B, H, T, D)
        x = x + self.proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    """Embeddings, L blocks, a head: the shape of a GPT, with nothing shared or left out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.places = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor, fused: bool = False) -> torch.Tensor:
        """Mean cross-entropy in nats of targets (B, T) after tokens idx (B, T)."""
        x = self.tokens(idx) + self.places(torch.arange(idx.shape[1], device=idx.device))  # (B, T) -> (B, T, C)
        for block in self.blocks:
            x = block(x, fused)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())  # (B, T, V) -> (B*T, V)


def predict(config: Config) -> dict[str, int]:
    """Memory in bytes and arithmetic in operations of one fp32 training step, from the config alone."""
    b, t, c, v, layers = config.batch_size, config.block_size, config.n_embd, config.vocab_size, config.n_layer
    matrices = layers * 12 * c * c + c * v  # qkv 3, proj 1, up 4, down 4; and the head: what multiplies a token
    rest = layers * (3 * c + c + 4 * c + c + 4 * c) + 2 * c + (v + t) * c  # biases, norms, embeddings: no products
    tensors = layers * 12 + 2 + 1 + 2  # weights and biases of 4 Linear and 2 LayerNorm a layer; last norm, head, tables
    # What backward will want again, in numbers a token. x, norm(x), q, k, v, the heads' output, the second x and
    # norm(x): 8 C; up and gelu(up): 8 C. The softmax keeps H T weights, each norm its mean and 1/std.
    kept_a_token = layers * (16 * c + config.n_head * t + 4) + 2 * c + 2 + v  # the end: x, norm(x), log-softmax
    whole_numbers = 8 * (2 * b * t + t) + 4  # ids, targets and places (int64); and how many targets count
    return {
        "parameters": 4 * (matrices + rest),
        "gradients": 4 * (matrices + rest),
        "adam": 8 * (matrices + rest) + 4 * tensors,  # m and v, and a step count for every tensor
        # Attention in one piece keeps one number a head (the log of the softmax's sum) instead of T, and no mask.
        "activations": 4 * b * t * kept_a_token + whole_numbers + layers * t * t,
        "activations_fused": 4 * b * t * (kept_a_token - layers * config.n_head * (t - 1)) + whole_numbers,
        "flops": 6 * matrices * b * t + 12 * layers * b * t * t * c,  # 6ND, and q k^T and weights v, there and back
        "flops_6nd": 6 * (matrices + rest) * b * t,
    }


# --- a training step, measured ---------------------------------------------------------------------------------------
def activation_bytes(model: Stack, idx: torch.Tensor, targets: torch.Tensor, fused: bool) -> int:
    """Bytes that the graph of one forward pass keeps for backward, parameters not counted, a view and its base once."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = model(idx, targets, fused)  # held until we have counted, or its memory would be used again
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}  # distinct pieces
    parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
    del loss
    return sum(size for place, size in memory.items() if place not in parameters)


def measure_step(config: Config, device: str) -> tuple[dict[str, float], Callable[[], None]]:
    """Build the stack, take steps and count. Returns the numbers, and one step as a function to profile."""
    torch.manual_seed(config.seed)
    model = Stack(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    idx, targets = torch.randint(config.vocab_size, (2, config.batch_size, config.block_size), device=device)

    def step() -> None:
        with record_function("# forward"):
            loss = model(idx, targets)
        with record_function("# backward"):
            loss.backward()
        with record_function("# optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    measured = {"activations": activation_bytes(model, idx, targets, fused=False)}
    measured["activations_fused"] = activation_bytes(model, idx, targets, fused=True)
    with FlopCounterMode(display=False) as counter:
        model(idx, targets).backward()
    measured["flops"] = counter.get_total_flops()
    measured["parameters"] = sum(p.numel() * p.element_size() for p in model.parameters())
    measured["gradients"] = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())
    step()
    state = [x for entry in optimizer.state.values() for x in entry.values() if torch.is_tensor(x)]
    measured["adam"] = sum(x.numel() * x.element_size() for x in state)
    measured["step_seconds"] = seconds_of(step, device, repetitions=3 if config.smoke else 15)
    return measured, step


def show_step(config: Config, device: str, rates: dict[str, float]) -> tuple[dict[str, float], Callable[[], None]]:
    """Print what a step was predicted to need beside what it needed; return the numbers, and the step."""
    predicted = predict(config)
    measured, step = measure_step(config, device)
    print(f"\none training step in fp32: B = {config.batch_size}, T = {config.block_size}, C = {config.n_embd}", end="")
    print(f", V = {config.vocab_size}, L = {config.n_layer}, H = {config.n_head}      predicted    measured")
    titles, metrics = {"adam": "AdamW's m and v", "activations_fused": "activations, attention fused"}, {}
    for name in ("parameters", "gradients", "adam", "activations", "activations_fused", "flops"):
        title, unit = (titles.get(name, name) + ", MB", 1e6) if name != "flops" else ("matrix products, GFLOP", 1e9)
        metrics[f"{name}_predicted"], metrics[f"{name}_measured"] = predicted[name], measured[name]
        print(f"  {title:34s}{predicted[name] / unit:12.3f}{measured[name] / unit:12.3f}")
    print(f"  {'the same by 6ND, all parameters':34s}{predicted['flops_6nd'] / 1e9:12.3f}")
    seconds, tokens = measured["step_seconds"], config.batch_size * config.block_size
    floor = predicted["flops"] / (rates["matmul_fp32_gflops"] * 1e9)
    print(f"  {'milliseconds':34s}{1e3 * floor:12.1f}{1e3 * seconds:12.1f}   predicted: nothing but matrix products")
    print(f"  {tokens / seconds:.0f} tokens/s, {100 * floor / seconds:.0f}% of the rate of large products above")
    metrics |= {"step_seconds": seconds, "tokens_per_second": tokens / seconds, "fraction_of_peak": floor / seconds}
    return metrics, step


def profile_step(step: Callable[[], None], device: str, path: Path, rows: int = 8) -> None:
    """Print where the time of one step goes, and write the trace: every operation on a time line."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        step()
        getattr(torch, device).synchronize()
    profiler.export_chrome_trace(str(path))
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"  # self: without what it called
    events = [event for event in profiler.key_averages() if not event.key.startswith(("#", "ProfilerStep"))]
    events.sort(key=lambda event: getattr(event, clock), reverse=True)
    total = sum(getattr(event, clock) for event in events) or 1
    print(f"\none step, profiled: {total / 1e3:.1f} ms in {sum(event.count for event in events)} operations")
    print("  operation                                     calls       ms   share")
    for event, us in [(event, getattr(event, clock)) for event in events[:rows]]:
        print(f"  {event.key[:44]:44s}{event.count:7d}{us / 1e3:9.2f}{100 * us / total:7.1f}%")


# --- denormals, and the figure ---------------------------------------------------------------------------------------

ACTIONS = {  # on a matrix (n, n) and a vector (N,) of such numbers, and an ordinary matrix (n, n)
    "matrix_product": lambda matrix, vector, weights: matrix @ weights,
    "multiply": lambda matrix, vector, weights: vector * 0.5,
    "divide": lambda matrix, vector, weights: vector / 3.0,
    "square_root": lambda matrix, vector, weights: vector.sqrt(),
}


def denormal_cost(n: int = 384) -> dict[str, float]:
    """How much longer operations take on numbers of 1e-39 than on numbers of 1, with and without flushing to zero.

    Below 1.2e-38 an fp32 number loses the leading 1 of its mantissa, and many CPUs take such *denormal* numbers through
    a slow path. Gradients get there by themselves: Adam squares them, and 1e-20 squared is 1e-40. The flag makes them
    0. It holds for the thread that sets it, not for workers that already run: it belongs at the top of a script.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds, metrics = {}, {}
    for kind, flush, scale in (("normal", False, 1.0), ("denormal", False, 1e-39), ("flushed", True, 1e-39)):
        torch.set_flush_denormal(flush)
        matrix, weights = torch.rand(n, n) * scale, torch.rand(n, n)  # made under the flag, as gradients would be
        vector = (torch.rand(100_000) + 0.1) * scale
        for name, action in ACTIONS.items():
            seconds[kind, name] = seconds_of(lambda f=action, x=(matrix, vector, weights): f(*x), "cpu")
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
    print("\nnumbers of 1e-39 on this CPU: time as a multiple of the same operation on numbers of 1")
    print("  operation          as they are   with torch.set_flush_denormal(True)")
    for name in ACTIONS:
        slow, fast = (seconds[kind, name] / seconds["normal", name] for kind in ("denormal", "flushed"))
        metrics |= {f"denormal_{name}_ratio": slow, f"flushed_{name}_ratio": fast}
        print(f"  {name:18s}{slow:10.1f} x{fast:12.1f} x{'' if slow > 1.5 else '   hardly a difference here'}")
    return metrics


def draw_pairs(panel: plt.Axes, names: list[str], first: list[float], second: list[float], labels: list[str]) -> None:
    """Two bars beside each other for every name."""
    for shift, heights, label in ((-0.2, first, labels[0]), (0.2, second, labels[1])):
        panel.bar([place + shift for place in range(len(names))], heights, width=0.4, label=label)
    panel.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    panel.legend()


def draw_figure(path: Path, metrics: dict[str, float]) -> None:
    """Rates, the roofline that they make, memory predicted and measured, and denormals."""
    figure, ((one, two), (three, four)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    rates = {name.split("_")[1]: rate for name, rate in metrics.items() if name.startswith("matmul_") and rate}
    one.bar_label(one.bar(list(rates), list(rates.values())), fmt="%.4g")
    one.set(title="matrix products", ylabel="GFLOP/s", ymargin=0.1)  # room for the label of the highest bar
    peak, speed = metrics["matmul_fp32_gflops"], metrics["bandwidth_gb_s"]
    places = sorted([*(2.0**k for k in range(-4, 9)), peak / speed])  # with the corner, which is the balance
    two.loglog(places, [min(peak, speed * x) for x in places], lw=2)
    for x, name in ((1 / 12, "a + b"), (64 / 6, "64 x 64 product"), (1024 / 6, "1024 x 1024 product")):
        two.plot(x, min(peak, x * speed), "o", label=name)  # n x n product: 2 n^3 operations, 12 n^2 bytes
    two.legend()
    two.set(title="roofline (fp32): the most to be had", xlabel="operations a byte", ylabel="GFLOP/s")
    names = ["parameters", "gradients", "adam", "activations", "activations_fused"]
    memory = [[metrics[f"{name}_{kind}"] / 1e6 for name in names] for kind in ("predicted", "measured")]
    draw_pairs(three, names, *memory, ["predicted", "measured"])
    three.set(title="memory of one training step", ylabel="MB")
    ratios = [[metrics[f"{kind}_{name}_ratio"] for name in ACTIONS] for kind in ("denormal", "flushed")]
    draw_pairs(four, list(ACTIONS), *ratios, ["as they are", "flushed to zero"])
    four.set(title="numbers of 1e-39 on the CPU", ylabel="time, as a multiple of normal", yscale="log")
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    """Describe, measure, predict, profile."""
    device = pick_device(config.device)
    if config.n_embd % config.n_head:
        print(f"error: --n-embd {config.n_embd} is no multiple of --n-head {config.n_head}", file=sys.stderr)
        raise SystemExit(2)
    if config.smoke:
        small = {"batch_size": 4, "block_size": 16, "n_layer": 2, "n_embd": 32}
        config = replace(config, **small, budget=0.002, out=Path(tempfile.mkdtemp()))
    config.out.mkdir(parents=True, exist_ok=True)
    print("this machine")
    for name, text in describe(device).items():
        print(f"  {name:14s} {text}")
    metrics = measure_rates(config, device)
    more, step = show_step(config, device, metrics)
    metrics |= more
    profile_step(step, device, config.out / "trace.json")
    metrics |= denormal_cost(64 if config.smoke else 384)
    draw_figure(config.out / "environment.png", metrics)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print("\nwrote", *(config.out / name for name in ("environment.png", "trace.json", "metrics.json")), sep="\n  ")


if __name__ == "__main__":
    main(tyro.cli(Config))
