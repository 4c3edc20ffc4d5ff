"""PPO: a policy writes, a reward model judges, and what was judged better than expected becomes likelier.

Each iteration is a small training of its own: draw prompts, answer them, judge the answers, give every token its share
of the praise, and take a few steps that stay near the policy that wrote them. What part 7 had as data is made here.

    python part8_ppo/train.py                                # 3 minutes on two CPU cores
    python part8_ppo/train.py --beta 0 --out runs/part8_ppo/unleashed
    python part8_ppo/train.py --critic --out runs/part8_ppo/critic
    python part8_ppo/train.py --base BASE.pt --reward REWARD.pt --data hf:hh-rlhf
    torchrun --nproc_per_node=2 -- part8_ppo/train.py --rollouts 128

You should see the reward rise, and the rule score with it, which nobody learns from; the KL to the reference, which
beta keeps short, rises too. It leaves latest.pt, best.pt, learning_curve.png, metrics.json and the logs in
runs/part8_ppo/. best.pt is the policy after the last iteration, for there is no held-out loss to pick one by: to pick
by the reward would pick the policy that cheats best, and the rule score is not for training.

With experts, nothing balances their load here, and nothing is dropped: routers learn from the same loss as all else.

References: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", section 5; Ziegler et al. 2019,
"Fine-Tuning Language Models from Human Preferences", section 2; Ouyang et al. 2022, "Training language models to follow
instructions", section 3.5; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
"""

import copy
import math
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from tqdm import tqdm

from checkpoint import StopRequest, collect, keep_copy, open_checkpoint, refuse_differences, restore, write_checkpoint
from data import UserError
from devices import Processes, autocast, from_main, make_scaler, pick_dtype, processes, spread
from environment import DRAWS, HELD_OUT_SEED, ORDER, Asked, Environment, calibrate, prepare, refit, refresh, seed_of
from experience import Experience, PPOConfig, make_experience, minibatch_order, score_pieces, split_rows
from generate import BASE, REWARD, RUNS
from optim import accumulate_gradients, count_skipped, learning_rate_factor, make_optimizers, set_learning_rate, update
from policy import Policy
from ppo import AdaptiveKL, kl_estimate, masked_mean, ppo_policy_loss, value_loss
from rollout import score_tokens
from tokenizer import describe_tokenizer
from tracker import Tracker
from watch import Tally, bootstrap_interval, describe_answers, describe_iteration, gold_loss, show_answers, write_curves


@dataclass
class Config:
    """Let a language model learn from a reward model, or go on with it."""

    base: Path = BASE
    """Checkpoint of the fine-tuned model: the policy begins as it, and the reference stays it. Trained if not there."""
    reward: Path = REWARD
    """Checkpoint of the reward model, of the same tokenizer. Trained if not there."""
    data: str = "stories"
    """Where prompts come from: stories, a .jsonl file, or hf:<name>[:split]. Rules can judge stories alone."""
    out: Path = RUNS
    """Folder for checkpoints, logs, the learning curve and metrics.json."""
    steps: int = 10
    """Iterations: rollouts, and what is learned from them."""
    ppo: tyro.conf.OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)
    """Of PPO, see experience.py."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    lr: float = 6e-4
    """Highest learning rate of AdamW."""
    muon_lr: float = 0.02
    """Highest learning rate of Muon."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 3
    """Iterations in which the learning rate rises from zero."""
    final_lr: float = 0.3
    """Share of the highest learning rate at the end."""
    betas: tuple[float, float] = (0.9, 0.99)
    """How much AdamW keeps of its two running means at each step."""
    weight_decay: float = 0.0
    """Share of lr by which matrices shrink in a step. Biases and norms do not."""
    clip: float = 1.0
    """Longest gradient: a longer one is scaled down to this norm."""
    eval_every: int = 5
    """Iterations between two evaluations."""
    eval_prompts: int = 64
    """Held-out prompts to answer in them."""
    test_prompts: int = 256
    """Held-out prompts to answer before the first iteration and after the last."""
    save_every: int = 5
    """Iterations between two checkpoints latest.pt."""
    keep: int = 0
    """How many of the last checkpoints to keep as step_*.pt too, beside latest.pt and best.pt."""
    resume: str = ""
    """auto: go on from latest.pt in --out, if it is there; or the path of a checkpoint."""
    log: Literal["none", "tensorboard", "wandb", "both"] = "tensorboard"
    """Where to log."""
    histogram_every: int = 0
    """Steps between two histograms of weights and gradients. 0: none."""
    seed: int = 0
    """Seed of the prompts, the answers and the minibatches."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of them that is there."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; weights stay in float32. auto: bfloat16 or float16 on CUDA, else float32."""
    compile: bool = False
    """Compile the model: a minute at the start for faster steps."""
    shard: bool = False
    """With several processes: share out parameters and optimizer states (FSDP2) instead of copying them (DDP)."""
    recompute: bool = False
    """Keep only each block's input and compute the block again backward: less memory, a third more arithmetic."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- evaluation ---


@torch.no_grad()
def evaluate(
    policy: Policy, environment: Environment, asked: list[Asked], gold: list[tuple[list[int], list[int]]]
) -> dict[str, float]:
    """Let the policy answer prompts that it is not trained on, always with the same random numbers.

    Args:
        policy: whole, not sharded.
        environment: judges its answers.
        asked: at least one prompt.
        gold: see watch.gold_loss.

    Returns:
        Means over the answers of what describe_answers gives; rule_score_low and rule_score_high, a 95% interval of
        that score; and val_loss and bits_per_byte of the gold answers. What needs stories is left out without them.
    """
    rollout = environment.answer(policy, asked, HELD_OUT_SEED)
    rows = torch.arange(len(asked), device=rollout.idx.device).split(environment.batch_size)
    logp, _, entropy = score_pieces(policy, rollout, rows, environment.temperature)
    judged = (environment.judge(rollout), logp, environment.reference_logp(rollout), entropy)
    found = describe_answers(rollout, *judged, asked, environment.tokenizer)
    numbers = {name: values.mean().item() for name, values in found.items()}
    if "rule_score" in found:
        ends = bootstrap_interval(found["rule_score"].tolist())
        numbers |= dict(zip(("rule_score_low", "rule_score_high"), ends, strict=True))
    return numbers | gold_loss(policy, gold, environment.tokenizer, environment.batch_size)


# --- the loss ---


def batch_loss(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    dtype: torch.dtype,
    settings: PPOConfig,
    experience: Experience,
    seen: Tally,
) -> torch.Tensor:
    """Loss of some answers, the mean over their tokens.

    Args:
        model: the policy.
        x, y: (b,) their row numbers in the experience, and (b, T) their ids, -100 where nothing is learned.
        dtype: the precision of the matrix products.
        settings: temperature, clips and weights are read.
        experience: of this iteration.
        seen: gets policy_loss, value_loss, approx_kl (k3, nats per token), clip_fraction and value_clip_fraction.
    """
    some = experience.rows(x)
    with autocast(x.device, dtype):
        now = score_tokens(model, some.rollout, settings.temperature, settings.entropy_weight > 0)  # (b, T) each
    policy, clipped = ppo_policy_loss(now.logp, some.logp, some.advantages, some.mask, settings.ratio_clip)
    value, value_clipped = value_loss(now.values, some.values, some.returns, some.mask, settings.value_clip)
    entropy = masked_mean(now.entropy, some.mask) if settings.entropy_weight else 0.0
    approx_kl = masked_mean(kl_estimate(some.logp, now.logp, "k3"), some.mask)  # tokens were drawn by the old policy
    numbers = {"policy_loss": policy, "value_loss": value, "approx_kl": approx_kl, "clip_fraction": clipped}
    seen.add(int((y != -100).sum()), **numbers, value_clip_fraction=value_clipped)
    return policy + settings.value_weight * value - settings.entropy_weight * entropy


# --- the loop ---


def check_settings(config: Config) -> None:
    """Refuse settings with which no training is possible.

    Raises:
        UserError: it names the flag, its value and what to give instead.
    """
    above_0, from_0 = ("eval_every", "eval_prompts", "test_prompts", "save_every"), ("steps", "warmup_steps", "keep")
    for name, value in (dict.fromkeys(above_0, 1) | dict.fromkeys((*from_0, "histogram_every"), 0)).items():
        if not value <= getattr(config, name) < math.inf:
            raise UserError(f"--{name} {getattr(config, name)} is not {value} or more; give {value} or more")
    config.ppo.check()
    if not config.clip > 0:
        raise UserError(f"--clip {config.clip} is not above 0; 1 is usual, inf clips nothing")
    learning_rate_factor(0, config.steps, config.warmup_steps, config.schedule, config.final_lr)
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} is a file; give a folder")


def train(config: Config, here: Processes, device: torch.device) -> dict[str, float]:
    """Train a policy and leave checkpoints, logs, a learning curve and metrics in config.out.

    Args:
        config: the settings.
        here: which of the processes this one is.
        device: this process's.

    Returns:
        The metrics that are also written to metrics.json; without scores if it was stopped before the end.

    Raises:
        UserError: a setting with which no training is possible, or ten losses in a row that are no number.
    """
    check_settings(config)
    torch.set_flush_denormal(True)  # on CPUs, numbers near zero are otherwise slow
    dtype, ppo = pick_dtype(config.dtype, device), config.ppo
    config.out.mkdir(parents=True, exist_ok=True)
    say = tqdm.write if here.is_main else lambda text: None

    # 1. Who writes, who judges, and what is asked.
    policy, environment, prompts, settings = prepare(config, here, device)
    tokenizer, trunk, n_parameters = environment.tokenizer, policy.trunk, policy.num_parameters()
    checkpoint = open_checkpoint(config.resume, settings, say)
    torch.manual_seed(config.seed)
    yardstick = None
    if not checkpoint:
        if here.is_main:
            with autocast(device, dtype):
                asked = prompts.draw(ppo.norm_prompts, -1)
                yardstick = calibrate(policy, environment, asked, seed_of(config.seed, DRAWS, -1), ppo)
        *yardstick, head = from_main(yardstick)
        policy.value_head.load_state_dict({"weight": torch.tensor([head[:-1]]), "bias": torch.tensor(head[-1:])})
    # A sharded model cannot draw: its parts are put together for each pass, in all processes at once, and rows end
    # earlier in one than in another. So a whole copy draws, and is given the new weights in each iteration.
    writer = copy.deepcopy(policy) if config.shard and here.count > 1 else policy
    trunk.recompute = config.recompute
    blocks = [*trunk.blocks, *(policy.critic.blocks if policy.critic is not None else [])]
    parallel = spread(policy, nn.ModuleList(blocks), device, config.shard, dtype)
    run_model = torch.compile(parallel) if config.compile else parallel  # the same weights, other code
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.muon_lr, config.weight_decay, config.betas)
    scaler = make_scaler(device, dtype)
    minibatches = split_rows(ppo.rollouts, ppo.minibatches, ppo.accumulate, device)
    pieces = [piece for rows in minibatches for piece in rows.chunk(ppo.accumulate)]

    # 2. Where it stands.
    progress = {"step": 0, "skipped": 0, "in_a_row": 0, "seconds": 0.0, "run_id": "", "best": {}, "val_losses": []}
    progress |= {"history": [], "tokens": 0, "rollout_seconds": 0.0, "before": {}, "beta": ppo.beta}
    progress["yardstick"] = yardstick
    if checkpoint:
        same = ("critic", "surprise")
        refuse_differences({name: checkpoint["config"].get(name) for name in same}, {n: settings[n] for n in same})
        progress |= restore(checkpoint, policy, optimizers, scaler, policy.config) | {"best": {}}  # it has not ended
    environment.mean, environment.std = progress["yardstick"]
    progress["beta"] = progress["beta"] if ppo.kl_target else ppo.beta
    leash = AdaptiveKL(progress["beta"], ppo.kl_target, ppo.kl_horizon) if ppo.kl_target else None
    held_out, gold = prompts.held_out(config.test_prompts), prompts.gold(config.test_prompts)
    n_rows, skip = ppo.rollouts * here.count, ppo.rollouts * here.rank
    say(f"{n_parameters:,} parameters, on {here.count} x {device.type}, {str(dtype)[6:]}")
    say(f"{config.steps} iterations of {n_rows} answers and {ppo.epochs * ppo.minibatches} optimizer steps")
    say(f"rewards of the reference: {environment.mean:.3f} on average, standard deviation {environment.std:.3f}")

    def save(name: str) -> None:
        state = collect(parallel, optimizers, scaler, policy.config, settings, describe_tokenizer(tokenizer), progress)
        if here.is_main:
            write_checkpoint(config.out / name, state)

    # 3. The loop. It ends after the last iteration, or after the one in which it was asked to stop.
    first = progress["step"]
    tracker = Tracker(config.log if here.is_main else "none", config.out, settings, progress["run_id"], first)
    progress["run_id"] = tracker.run_id
    stop = StopRequest()
    with closing(tracker), closing(stop):
        bar = tqdm(range(first, config.steps + 1), desc="training", disable=None if here.is_main else True)
        for step in bar:
            # A checkpoint is taken before anything else happens at its step, so a run that goes on repeats nothing.
            progress["step"] = step
            stopped = stop.asked(device)
            if step == config.steps or stopped or (step % config.save_every == 0 and step > first):
                save("latest.pt")
                if config.keep and here.is_main:
                    keep_copy(config.out, step, config.keep)
            if stopped:
                say(f"stopped at step {step}; --resume auto goes on from {config.out / 'latest.pt'}")
                break
            if writer is not policy:
                refresh(writer, policy)
            if step % config.eval_every == 0 or step == config.steps:
                n = config.test_prompts if step in (0, config.steps) else config.eval_prompts
                with autocast(device, dtype):
                    scores = evaluate(writer, environment, held_out[:n], gold[:n])
                progress["val_losses"].append((step, scores))
                progress["before"] = progress["before"] or {f"{name}_before": value for name, value in scores.items()}
                tracker.numbers(step, {f"held_out/{name}": value for name, value in scores.items()})
                shown = ("reward", "rule_score", "kl_to_reference", "entropy", "response_length", "ended")
                say(f"step {step:4d}: " + ", ".join(f"{name} {scores[name]:.3f}" for name in shown if name in scores))
            if step == config.steps:
                progress["best"] = scores
                save("best.pt")
                break

            # Answers, and what they are worth.
            started = time.perf_counter()
            factor = learning_rate_factor(step, config.steps, config.warmup_steps, config.schedule, config.final_lr)
            set_learning_rate(optimizers, factor)
            asked = prompts.draw(n_rows, step)[skip : skip + ppo.rollouts]
            with autocast(device, dtype):
                rollout = environment.answer(writer, asked, seed_of(config.seed, DRAWS, step), skip)
                progress["rollout_seconds"] += time.perf_counter() - started
                judged = environment.judge(rollout), environment.reference_logp(rollout)  # (B,), (B, T)
                experience = make_experience(run_model, rollout, *judged, pieces, progress["beta"], ppo)

            # A few steps, as long as the policy is near the one that wrote the answers.
            seen, norms = [], []
            for m in minibatch_order(ppo.epochs, ppo.minibatches, seed_of(config.seed, ORDER, step)):
                x, tally = minibatches[m], Tally()
                loss_of = partial(batch_loss, settings=ppo, experience=experience, seen=tally)
                y = experience.targets(x)
                loss = accumulate_gradients(run_model, loss_of, x, y, ppo.accumulate, dtype, scaler).item()
                seen.append(tally.means())
                if seen[-1]["approx_kl"] > ppo.stop_kl:
                    for optimizer in optimizers:
                        optimizer.zero_grad()  # this gradient belongs to another policy's answers
                    break
                if config.histogram_every and step % config.histogram_every == 0 and not norms:
                    tracker.histograms(step, policy, scaler.get_scale())
                norms.append(update(policy, optimizers, scaler, config.clip))
                count_skipped(progress, loss, norms[-1], scaler.is_enabled(), say, config.out / "latest.pt")

            if ppo.fit_values:
                with autocast(device, dtype):
                    refit(policy, writer, experience, environment.batch_size)

            seconds = time.perf_counter() - started
            numbers = describe_iteration(experience, asked, tokenizer, seen, norms) | {"beta": progress["beta"]}
            n_tokens = round(numbers["response_length"] * n_rows)
            progress["seconds"] += seconds
            progress["tokens"] += n_tokens
            progress["history"].append(numbers)
            if leash:
                progress["beta"] = leash.update(numbers["kl_to_reference"], n_rows)
            rates = {"tokens_per_second": n_tokens / seconds, "learning_rate": config.lr * factor}
            tracker.numbers(step, numbers | rates)
            bar.set_postfix(reward=f"{numbers['reward']:.3f}", refresh=False)

    # 4. What came out.
    metrics = {"tokens_per_second": progress["tokens"] / max(progress["seconds"], 1e-9)}
    metrics["rollout_tokens_per_second"] = progress["tokens"] / max(progress["rollout_seconds"], 1e-9)
    metrics |= {"seconds": progress["seconds"], "skipped_steps": progress["skipped"], "parameters": n_parameters}
    last = progress["history"][-1] if progress["history"] else {}
    seen = ("explained_variance", "value_loss", "approx_kl", "clip_fraction", "gradient_norm", "optimizer_steps")
    metrics |= {name: last[name] for name in seen if name in last}  # of the last iteration
    metrics |= progress["before"] | {f"{name}_after": value for name, value in progress["best"].items()}
    metrics |= progress["best"]
    if progress["best"] and here.is_main:
        write_curves(config.out, metrics, progress)
        show_answers(environment, {"reference": environment.reference, "policy": writer}, held_out[:1], HELD_OUT_SEED)
    return metrics


def main(config: Config) -> None:
    """Train, and say what came out and where it lies."""
    with processes(config.device) as (here, device):
        if config.smoke:
            out = from_main(tempfile.mkdtemp() if here.is_main else "") if config.out == RUNS else config.out
            tiny = replace(config.ppo, rollouts=8, minibatches=2, accumulate=1, max_new_tokens=48, norm_prompts=16)
            config = replace(config, out=Path(out), ppo=tiny, steps=3, eval_prompts=4, test_prompts=8)
            config = replace(config, warmup_steps=1, eval_every=2, save_every=2)
        metrics = train(config, here, device)
    if here.is_main and "reward_after" in metrics:
        shown = [name for name in ("reward", "rule_score", "val_loss") if f"{name}_after" in metrics]
        print(
            ", ".join(f"{name} {metrics[f'{name}_before']:.3f} -> {metrics[f'{name}_after']:.3f}" for name in shown)
            + f", KL to the reference {metrics['kl_to_reference']:.2f} nats per answer; "
            f"{metrics['seconds']:.0f} seconds, {metrics['tokens_per_second']:,.0f} tokens a second"
        )
        print(f"wrote best.pt, latest.pt, learning_curve.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (UserError, OSError) as error:  # OSError: a disk that is full, a folder that cannot be made
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the checkpoints that were saved before are whole", file=sys.stderr)
        sys.exit(130)
