"""Checkpoints: everything that a run needs to go on as if it had never stopped, in a file that is always whole.

A run that stops for any reason (Ctrl-C, a full disk, a power cut, kill -9) loses at most the steps since the last
checkpoint, and what follows after resuming is bit for bit what would have followed. So a checkpoint holds more than
weights: the optimizers' running means, the loss scaler, the state of every random generator, and the step, from which
the schedule and the next batch follow.

    python part4_scaling/lesson4_checkpoints.py       # kills a run again and again, and compares
    python part5_moe/train.py --resume auto       # goes on from the latest checkpoint in --out, if there is one

Reference: Rojas et al. 2020, "A Study of Checkpointing in Large Scale Training of Deep Neural Networks", section 2.
"""

import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from data import UserError
from devices import sum_over_processes

FORMAT = 1
"""Version of what a checkpoint holds; another one is refused, not guessed."""

# --- a file that is always whole ---


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint so that the path holds the old one or the new one, whole, whatever happens meanwhile.

    The new one is written beside it, forced to the disk, and renamed: a rename happens wholly or not at all. Without
    the fsync the rename could reach the disk before the content, and a power cut would leave an empty file.

    Raises:
        UserError: the disk is full or cannot be written; the old checkpoint is as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        old = "the one before is still there" if path.exists() else "there is none before it"
        raise UserError(f"cannot write {path}: {error}; free some space or give another --out; {old}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)  # Ctrl-C in the middle
        raise


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes had begun to write: nobody will finish it, and each is as large as a checkpoint."""
    for unfinished in path.parent.glob(f"{path.name}.*.tmp"):
        pid = unfinished.name.split(".")[-2]
        try:
            os.kill(int(pid), 0)  # signal 0 does nothing, but fails if there is no such process
        except ProcessLookupError:
            unfinished.unlink(missing_ok=True)
        except (OSError, ValueError):  # somebody else's process, or a name that is not ours
            continue


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, refusing what is none of ours. Only tensors and plain values are read, never code.

    Raises:
        UserError: there is no such file, it is damaged, or of another format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off or of another kind
        raise UserError(f"{path} is no checkpoint, or a damaged one; give another, or train again") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format", "none") if isinstance(checkpoint, dict) else "none"
        raise UserError(
            f"{path} has checkpoint format {found}, this script reads {FORMAT}; train again, or use its part"
        )
    return checkpoint


def open_checkpoint(resume: str, settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """Read the checkpoint to go on from, and say in what this run will differ from the one before.

    Args:
        resume: "auto" for latest.pt in the folder settings["out"], if it is there; the path of another; or "".
        settings: of this run, as plain values.
        say: where to report.

    Returns:
        The checkpoint, or None to begin anew.

    Raises:
        UserError: it cannot be read, has taken more steps than this run is to have, or was trained on other ids.
    """
    path = Path(settings["out"]) / "latest.pt" if resume == "auto" else Path(resume)
    if not resume or (resume == "auto" and not path.is_file()):
        if (Path(settings["out"]) / "latest.pt").is_file():
            say(f"beginning anew, and replacing what is in {settings['out']}; --resume auto would go on from it")
        return None
    checkpoint = read_checkpoint(path)
    saved = checkpoint["config"]
    names = ("tokenizer", "vocab_size")
    refuse_differences({name: saved.get(name) for name in names}, {name: settings[name] for name in names})
    progress = checkpoint["progress"]
    if progress["step"] > settings["steps"]:
        raise UserError(f"--steps {settings['steps']}: {path} is of step {progress['step']} already; give more")
    if not (Path(settings["out"]) / "best.pt").is_file():  # it lies in another folder; this one is to get its own
        progress["best"] = {"val_loss": math.inf}
        progress["val_losses"] = [pair for pair in progress["val_losses"] if pair[0] < progress["step"]]
    say(f"going on from {path}, step {progress['step']}")
    for difference in differences(saved, settings | {"resume": saved.get("resume"), "out": saved.get("out")}):
        say(f"    unlike before: {difference}")
    return checkpoint


def keep_copy(folder: Path, step: int, count: int) -> None:
    """Keep latest.pt as step_*.pt too, and delete all but the last `count` of these.

    The copy is a second name of the same file where the file system has such (a hard link): it takes no space of its
    own until latest.pt is replaced.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    path = folder / f"step_{step:07d}.pt"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # not under its name before it is whole
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(folder / "latest.pt")
        except OSError:
            shutil.copyfile(folder / "latest.pt", temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; free some space or give a smaller --keep") from error
    finally:
        temporary.unlink(missing_ok=True)  # a rename of one file to its other name leaves both
    # By age, not by step: an earlier run in this folder may have come further.
    numbered = sorted(folder.glob("step_*.pt"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    for old in numbered[: max(0, len(numbered) - count)]:
        old.unlink()


# --- what a checkpoint holds ---


def random_states() -> dict[str, Any]:
    """The states of all generators that a script may draw from: Python's, numpy's, torch's, and this GPU's.

    With several processes, each draws the same numbers on its own device, so the main process's state is everyone's.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.copy()), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put all generators back to where random_states found them."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy(), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():  # else it goes on on another kind of device
        torch.cuda.set_rng_state(states["cuda"].cpu())


def collect(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    model_config: Any,
    config: dict[str, Any],
    tokenizer: str,
    progress: dict[str, Any],
) -> dict[str, Any]:
    """Everything that a run needs to go on. All processes must call it, since sharded states are gathered here.

    Args:
        model: plain, in DDP, or sharded: the names and shapes are those of the plain model.
        optimizers: as make_optimizers gives them.
        scaler: the loss scaler.
        model_config: the model's GPTConfig.
        config: the settings of the run as plain values.
        tokenizer: what tokenizer.py needs to make the same tokenizer again.
        progress: step, best loss and whatever else the loop counts; plain values.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    unused = [optimizer for optimizer in optimizers if not optimizer.state]
    if unused:
        # To have something to return, torch takes a step without gradients; it must not count as one of the run's.
        get_state_dict(model, optimizers, options=options)
        for state in (state for optimizer in unused for state in optimizer.state.values()):
            for value in state.values():
                value.zero_()
    weights, optimizer_state = get_state_dict(model, optimizers, options=options)
    return {
        "format": FORMAT,
        "model": weights,
        "model_config": asdict(model_config),
        "optimizers": optimizer_state,
        "scaler": scaler.state_dict(),
        "random": random_states(),
        "config": config,
        "tokenizer": tokenizer,
        "progress": progress,
        "torch_version": str(torch.__version__),
        "git_commit": git_commit(),
    }


def restore(
    checkpoint: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    model_config: Any,
) -> dict[str, Any]:
    """Put a run back to where `collect` found it, also on another number of processes.

    Learning rates, decay and betas are not put back: the ones that this run was given hold.

    Returns:
        The progress that was saved.

    Raises:
        UserError: the checkpoint is of another architecture; the fields that differ are listed. Or it has other
            optimizers.
    """
    refuse_differences(checkpoint["model_config"], asdict(model_config))
    settings = [{k: v for k, v in g.items() if k != "params"} for o in optimizers for g in o.param_groups]
    saved = len(checkpoint["optimizers"]["param_groups"])
    if saved != len(settings):
        raise UserError(
            f"the checkpoint has optimizers for {saved} groups of parameters, this run for {len(settings)}; give the "
            "--optimizer it was trained with, or another --out"
        )
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optimizers"],
        options=options,
    )
    for group, own in zip((group for o in optimizers for group in o.param_groups), settings, strict=True):
        group.update(own)
    if checkpoint["scaler"]:  # empty if the run was not in fp16
        scaler.load_state_dict(checkpoint["scaler"])
    set_random_states(checkpoint["random"])
    return checkpoint["progress"]


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What is not the same in two sets of settings, each as its name and both values."""
    missing = "(none)"
    return [
        f"{name} {saved.get(name, missing)} (this run: {wanted.get(name, missing)})"
        for name in sorted(set(saved) | set(wanted))
        if saved.get(name, missing) != wanted.get(name, missing)
    ]


def refuse_differences(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare what has to be the same.

    Raises:
        UserError: it is not; the fields that differ are named with both values.
    """
    different = ", ".join(differences(saved, wanted))
    if different:
        raise UserError(f"the checkpoint is of another model or tokenizer: {different}; give these, or another --out")


def git_commit() -> str:
    """The commit that the repository stands at, or "unknown": to find the code of an old run again."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


# --- being asked to stop ---


class StopRequest:
    """Notes SIGINT (Ctrl-C) and SIGTERM (a scheduler), so that the loop can finish its step, save, and end.

    A second SIGINT ends the script at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def close(self) -> None:
        """Let the signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; all of them get the same answer, so that they stop together."""
        return bool(sum_over_processes(torch.tensor(int(self.signal is not None), device=device)).item())

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
