"""Lesson 6.2: learn the answers only, and count every token of them once.

Fine-tuning is pretraining in which most targets are missing: those of the prompts and of the padding are -100, and the
loss leaves them out. Then rows have unequal numbers of targets, and three things go wrong easily: a mean of means
counts some tokens more than others, a row without a target is 0 / 0, and a cut in the wrong place takes the answer. The
lesson shows each beside what data.py and optim.py do. Then it packs several conversations in one row, proves that to be
the same as padding each, takes away the mask between them, and the positions that begin anew, and measures the speed.

    python part6_sft/lesson2_masking.py     # half a minute on two CPU cores; eight sections, and a figure

You should see the loss of a loop over tokens equal the model's; a mean of means that goes elsewhere; packed rows with
equal gradients and less waste, the less the longer they are; one conversation leaking into the next without the mask;
and that positions that do not begin anew change nothing, because rotary ones are distances, unless there are sinks. Two
short trainings at the end show what a model learns with the mask and without it.

References: Ouyang et al. 2022, "Training language models to follow instructions", section 3; Krell et al. 2021,
"Efficient Sequence Packing without Cross-contamination", sections 3 and 4.1.
"""

import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from data import IGNORED, Conversation, Example, UserError, chat_tokens, collate, encode_conversation
from data import encode_conversations as encode_all
from devices import make_scaler
from instructions import make_instructions
from lesson1_formatting import in_two_colors, spell, use_colors
from model import GPT, GPTConfig, visible
from optim import accumulate_gradients
from rope import count_from_start, rope_angles
from stories import documents
from tokenizer import BPETokenizer

matplotlib.use("Agg")  # figures go to files; a screen may not be there

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name

SCALER = make_scaler(torch.device("cpu"), torch.float32)  # does nothing in float32


@dataclass
class Config:
    """Compute the loss of answers in several ways, pack conversations, compare, and time."""

    n_instructions: int = 1024
    """Conversations that are packed."""
    batch_size: int = 32
    """B, conversations in a timed batch."""
    n_embd: int = 128
    """C of the timed model, which has two layers. A multiple of 8."""
    rounds: int = 8
    """How often both layouts are timed, in turns; the fastest counts."""
    steps: int = 120
    """Steps of the two short trainings."""
    seed: int = 0
    """Seed of weights and instructions."""
    out: Path = RUNS / "lesson2_masking"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


def make_model(vocab_size: int, seed: int, **settings: int) -> GPT:
    """A model in which attention matters: its weights are larger than at the beginning of a training."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab_size, **({"block_size": 256, "n_layer": 2, "n_embd": 64} | settings)))
    for name, parameter in model.named_parameters():
        if "blocks" in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return model


def gradient(model: GPT, loss: torch.Tensor) -> torch.Tensor:
    """All gradients of a loss in one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of a - b, in lengths of b."""
    return ((a - b).norm() / b.norm()).item()


# --- the loss ---


def loss_by_hand(logits: torch.Tensor, ids: list[list[int]], learned: list[list[bool]]) -> tuple[float, int]:
    """Mean of -log p of the learned tokens, a token at a time: (nats per token, how many)."""
    total, count = 0.0, 0
    for row, (tokens, mask) in enumerate(zip(ids, learned, strict=True)):
        for t in range(1, len(tokens)):
            if mask[t]:  # what is at place t is said by the scores at the place before
                scores = logits[row, t - 1]  # (V,)
                total += (scores.logsumexp(dim=0) - scores[tokens[t]]).item()
                count += 1
    return total / count, count


def compare_losses(examples: list[Example], tokenizer: BPETokenizer, seed: int) -> dict[str, float]:
    """The loop against GPT.forward with -100."""
    model, pad = make_model(tokenizer.vocab_size, seed), chat_tokens(tokenizer)[3]
    x, y = collate(examples, pad)
    with torch.no_grad():
        logits, loss = model(x, y)
        _, everything = model(x, torch.cat([x[:, 1:], torch.full_like(x[:, :1], IGNORED)], dim=1))
    by_hand, count = loss_by_hand(logits, *zip(*[(e.ids.tolist(), e.learned.tolist()) for e in examples], strict=True))
    prompts = sum(len(e.ids) - 1 for e in examples) - count
    print(f"1. {len(examples)} conversations, {x.numel()} places: {count} targets, {prompts} of prompts, ", end="")
    print(f"{x.numel() - count - prompts} of padding")
    print(f"   mean over the learned tokens, in a loop      {by_hand:.6f} nats")
    print(f"   GPT.forward with -100 for all others         {loss.item():.6f}")
    print(f"   with prompts and padding as targets          {everything.item():.6f}")
    assert abs(by_hand - loss.item()) < 1e-4
    return {"loss_by_hand": by_hand, "loss_masked": loss.item(), "loss_unmasked": everything.item()}


def plain_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean cross-entropy over the targets, as accumulate_gradients wants it."""
    return model(x, y)[1]


def compare_means(examples: list[Example], tokenizer: BPETokenizer, seed: int) -> dict[str, float]:
    """Four short answers and four long ones, one micro-batch each: three ways to a gradient."""
    by_length = sorted(examples, key=lambda e: int(e.learned.sum()))
    rows = by_length[:4] + by_length[-4:]
    short, long = (sum(int(e.learned.sum()) for e in some) for some in (rows[:4], rows[4:]))
    model, pad = make_model(tokenizer.vocab_size, seed), chat_tokens(tokenizer)[3]
    x, y = collate(rows, pad)
    loss = model(x, y)[1]
    whole = gradient(model, loss)
    means = torch.stack([model(some_x, some_y)[1] for some_x, some_y in zip(x.chunk(2), y.chunk(2), strict=True)])
    of_means = gradient(model, means.mean())
    model.zero_grad()
    added_loss = accumulate_gradients(model, plain_loss, x, y, 2, torch.float32, SCALER)
    added = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    print(f"\n2. four answers of {short} tokens in all and four of {long}, in two micro-batches")
    print("                                     loss   gradient, off by   a short answer's token counts")
    print(f"   one batch of eight            {loss.item():8.4f}                                     1.0 times")
    angle = difference(of_means, whole)
    print(f"   mean of the two means         {means.mean().item():8.4f}   {angle:15.0%}   {long / short:26.1f} times")
    exact = difference(added, whole)
    print(
        f"   optim.accumulate_gradients    {added_loss.item():8.4f}   {exact:15.0e}                          1.0 times"
    )
    return {"mean_of_means_off": angle, "accumulated_off": exact, "weight_of_short": long / short}


def show_nothing_to_learn(tokenizer: BPETokenizer, seed: int) -> dict[str, float]:
    """A conversation without an answer: NaN, or dropped and counted."""
    spoken = [Conversation(("What is one plus one?", text)) for text in ("1 + 1 = 2.", "")]
    kept, dropped = encode_all(spoken, tokenizer, 256)
    model = make_model(tokenizer.vocab_size, seed)
    x, y = collate([*kept, kept[0]], chat_tokens(tokenizer)[3])
    y[1] = IGNORED  # what a row without an answer looks like
    naive = torch.stack([model(x[[row]], y[[row]])[1] for row in (0, 1)]).detach()
    added = accumulate_gradients(model, plain_loss, x, y, 2, torch.float32, SCALER).item()
    print("\n3. a row with nothing to learn")
    print(f"   losses of two rows, naively {naive.tolist()}, and their mean {naive.mean().item()}")
    print(f"   accumulate_gradients on them {added:.4f}; encode_conversations keeps {len(kept)} and drops {dropped}")
    return {"naive_nan": float(math.isnan(naive.mean())), "dropped": dropped}


def show_truncation(tokenizer: BPETokenizer) -> dict[str, float]:
    """Let the context shrink."""
    spoken = Conversation(
        ("Who lost a kite?", "Tom lost it.", "Ida saw it in the tree by the mill. Where was it?", "It was in the tree.")
    )
    colors, learned = use_colors(), {}
    legend = in_two_colors(["given", "learned"], [False, True], colors)
    print(f"\n4. a context that shrinks: prompts are cut from the left, the last answer stays; {legend}")
    for T in (60, 40, 26, 16, 8):
        example = encode_conversation(spoken, tokenizer, T)
        pieces = spell(example.ids.tolist(), tokenizer)
        print(f"   T = {T:2d}  {in_two_colors(pieces, example.learned.tolist(), colors)}")
        learned[f"learned_at_{T}"] = int(example.learned.sum())
    return learned


# --- packing ---


def compare_rows(examples: list[Example], tokenizer: BPETokenizer, sizes: tuple[int, ...]) -> dict[str, float]:
    """Rows and wasted places with padding and with packing, by batch size."""
    pad, metrics = chat_tokens(tokenizer)[3], {}
    used = sum(len(example.ids) - 1 for example in examples)
    long = sum(len(example.ids) - 1 > 128 for example in examples)
    print(f"\n5. {len(examples)} conversations of {used / len(examples):.0f} tokens, {long} of them above 128")
    print("   batch size    padded: rows, wasted   packed to 256: rows, wasted   packed to 1024: rows, wasted")
    for size in sizes:
        print(f"   {size:10d}", end="")
        for room, width in ((0, 16), (256, 22), (1024, 23)):
            rows = [collate(examples[i : i + size], pad, room)[0] for i in range(0, len(examples), size)]
            n_rows, wasted = sum(len(x) for x in rows), 1 - used / sum(x.numel() for x in rows)
            print(f"{n_rows:{width}d}{wasted:8.0%}", end="")
            metrics |= {f"rows_{room or 'padded'}_{size}": n_rows, f"wasted_{room or 'padded'}_{size}": wasted}
        print()
    return metrics


def logits_by_hand(model: GPT, x: torch.Tensor, positions: torch.Tensor, see: torch.Tensor) -> torch.Tensor:
    """GPT.forward with positions and mask of one's own choice.

    Args:
        model: a GPT.
        x: (B, T) ids.
        positions: (B, T), where each token stands.
        see: (B, T, T), which tokens (columns) each token (rows) may look at.
    """
    cos, sin = rope_angles(positions, model.frequency)
    h = model.wte(x)  # (B, T) -> (B, T, C)
    for block in model.blocks:
        h = block(h, cos, sin, see[:, None], None)
    return model.lm_head(model.norm(h))  # (B, T, V)


def ways_to_see(x: torch.Tensor, eot: int, model: GPT) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Positions (B, T) and masks (B, T, T) of packed rows: right, without blocks, without new beginnings."""
    segments = (x == eot).cumsum(dim=1)  # (B, T): which conversation each token is of
    along = torch.arange(x.shape[1]).expand_as(x)  # (B, T): 0, 1, 2, ... to the end of the row
    anew = count_from_start(segments)
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T): blocks along the diagonal
    shape = model.config.window, model.config.n_sink
    return {
        "blocks, positions begin anew": (anew, visible(anew, anew, *shape)[:, 0] & same),
        "blocks, positions go on": (along, visible(along, along, *shape)[:, 0] & same),
        "no blocks, positions go on": (along, visible(along, along, *shape)[:, 0]),
    }


def compare_packing(examples: list[Example], tokenizer: BPETokenizer, seed: int) -> dict[str, float]:
    """Packed against padded, then packed wrongly, for a plain model and for one with a window and sinks."""
    pad, eot, metrics = chat_tokens(tokenizer)[3], tokenizer.eot, {}
    print(f"\n6. {len(examples)} conversations, packed and padded: the difference")
    for name, shape in (("plain", {}), ("sinks", {"window": 12, "n_sink": 4})):
        model = make_model(tokenizer.vocab_size, seed, **shape)
        x, y = collate(examples, pad)
        packed_x, packed_y = collate(examples, pad, 256)
        loss = model(x, y)[1]
        model.separator = eot  # from here on, the model keeps conversations apart
        packed_loss = model(packed_x, packed_y)[1]
        off = abs(loss.item() - packed_loss.item())
        gradient_off = difference(gradient(model, packed_loss), gradient(model, loss))
        title = "all tokens before are seen" if name == "plain" else "a window of 12 tokens and 4 sinks"
        print(f"   {title}: loss {off:.0e}, gradient {gradient_off:.0e}")
        metrics |= {f"packed_loss_off_{name}": off, f"packed_gradient_off_{name}": gradient_off}
        assert off < 1e-5 and gradient_off < 1e-4
        # The last token of the first conversation of each row is changed: who notices in the others?
        segments = (packed_x == eot).cumsum(dim=1)  # (R, T)
        last = (segments == 1).sum(dim=1, keepdim=True) - 1  # (R, 1)
        other_x = packed_x.scatter(1, last, (packed_x.gather(1, last) + 1) % 256)
        others = (segments > 1) & (packed_x != pad)
        with torch.no_grad():
            right = model(packed_x)[0].log_softmax(dim=-1)
            for way, (positions, see) in ways_to_see(packed_x, eot, model).items():
                scores = logits_by_hand(model, packed_x, positions, see).log_softmax(dim=-1)
                changed = logits_by_hand(model, other_x, positions, see).log_softmax(dim=-1)
                log_p, their = (some.gather(-1, packed_y.clamp(min=0)[..., None])[..., 0] for some in (right, scores))
                far = (log_p - their)[packed_y != IGNORED].abs().mean().item()
                leak = ((changed - scores).abs().amax(dim=-1) > 1e-6)[others].float().mean().item()
                print(f"      {way:30s} log p of a target off by {far:7.1e} nats; {leak:4.0%} of the others notice")
                key = f"{name}_{way.replace(',', '').replace(' ', '_')}"
                metrics |= {f"log_p_off_{key}": far, f"leak_{key}": leak}
    return metrics


def time_packing(examples: list[Example], tokenizer: BPETokenizer, config: Config) -> dict[str, float]:
    """Seconds of forward and backward for the same conversations, padded and packed, in turns."""
    pad, eot = chat_tokens(tokenizer)[3], tokenizer.eot
    model = make_model(tokenizer.vocab_size, config.seed, n_embd=config.n_embd)
    batches = {"padded": collate(examples, pad), "packed": collate(examples, pad, 256)}
    best = dict.fromkeys(batches, math.inf)
    for _ in tqdm(range(config.rounds + 1), desc="timing", disable=None, leave=False):
        for name, (x, y) in batches.items():
            started = time.perf_counter()
            model.separator = eot if name == "packed" else None
            model(x, y)[1].backward()
            best[name] = min(best[name], time.perf_counter() - started)
    print(f"\n7. {len(examples)} conversations, 2 layers, C = {config.n_embd}; ", end="")
    print(f"threads: {torch.get_num_threads()}, fastest of {config.rounds} turns, forward and backward")
    for name, (x, _) in batches.items():
        print(f"   {name}: {tuple(x.shape)} places, {1000 * best[name]:.0f} ms")
    ratio = best["padded"] / best["packed"]
    fewer = 1 - batches["packed"][0].numel() / batches["padded"][0].numel()
    print(f"   {fewer:.0%} fewer places; packed is {ratio:.2f} times as fast")
    return {f"ms_{name}": 1000 * seconds for name, seconds in best.items()} | {"packed_speedup": ratio}


# --- what the model learns ---


def retarget(examples: list[Example], prompts: bool, answers: bool) -> list[Example]:
    """The same conversations with other targets: all of their prompts, or all but them, or everything."""
    found = [np.where(example.learned, answers, prompts) & (np.arange(len(example.ids)) > 0) for example in examples]
    return [example._replace(learned=learned) for example, learned in zip(examples, found, strict=True)]


def train_both(examples: list[Example], held_out: list[Example], tokenizer: BPETokenizer, config: Config) -> dict:
    """Train from random weights, with and without the mask, and measure both on answers and on prompts."""
    pad, metrics = chat_tokens(tokenizer)[3], {}
    print(f"\n8. {config.steps} steps of 16 conversations from random weights; held-out loss, nats per token")
    print("                         of answers   of prompts")
    for name, prompts in (("answers are learned", False), ("all is learned", True)):
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_embd=64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
        generator = torch.Generator().manual_seed(config.seed)
        for _ in tqdm(range(config.steps), desc=name, disable=None, leave=False):
            batch = [examples[i] for i in torch.randint(len(examples), (16,), generator=generator).tolist()]
            _, loss = model(*collate(retarget(batch, prompts, True), pad))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = [model(*collate(retarget(held_out, p, not p), pad))[1].item() for p in (False, True)]
        print(f"   {name:20s}  {found[0]:10.3f}   {found[1]:10.3f}")
        key = name.split()[0]
        metrics |= {f"answer_loss_{key}_learned": found[0], f"prompt_loss_{key}_learned": found[1]}
    return metrics


# --- the figure ---


def draw(path: Path, examples: list[Example], tokenizer: BPETokenizer) -> None:
    """Draw both layouts of a batch: a colour a conversation, light where it is given, dark where it is learned."""
    pad, colors = chat_tokens(tokenizer)[3], torch.tensor(plt.get_cmap("tab20").colors)
    fig, axes = plt.subplots(1, 2, figsize=(12, 4), sharex=True, sharey=True, layout="constrained")
    for ax, room, name in zip(axes, (0, 256), ("padded", "packed"), strict=True):
        x, y = collate(examples, pad, room)
        image = torch.full((len(examples), 256, 3), 1.0)
        image[: len(x), : x.shape[1]] = 0.85  # computed, for nothing
        number = 0
        for row, (tokens, targets) in enumerate(zip(x, y, strict=True)):
            for t, (token, target) in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
                number += token == tokenizer.eot
                if token != pad:
                    image[row, t] = colors[2 * (number % 7) + (target == IGNORED)]
        wasted = (x == pad).float().mean()
        ax.imshow(image, aspect="auto", interpolation="nearest")
        ax.set(title=f"{name}: {len(x)} rows of {x.shape[1]} places, {wasted:.0%} wasted (gray)", xlabel="place")
    axes[0].set_ylabel("row")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    """The loss, means, rows without a target, cuts; then packing: rows, proofs, leaks and time."""
    if config.smoke:
        config = replace(config, out=Path(tempfile.mkdtemp()), n_instructions=64, batch_size=8, n_embd=32)
        config = replace(config, rounds=1, steps=3)
    for name, least in (("n_instructions", 64), ("batch_size", 1), ("n_embd", 8), ("rounds", 1), ("steps", 1)):
        if getattr(config, name) < least or (name == "n_embd" and config.n_embd % least):
            raise UserError(f"--{name} {getattr(config, name)}: give {least} or more, and of n_embd a multiple of 8")
    torch.set_flush_denormal(True)
    tokenizer = BPETokenizer.train(documents(300 if config.smoke else 2000, 0, held_out=False), 1024)
    made = make_instructions(config.n_instructions, config.seed, False), make_instructions(64, 0, True)
    examples, held_out = (
        encode_all([Conversation((i.prompt, i.response)) for i in some], tokenizer, 256)[0] for some in made
    )
    metrics = compare_losses(examples[:16], tokenizer, config.seed)
    metrics |= compare_means(examples[:64], tokenizer, config.seed)
    metrics |= show_nothing_to_learn(tokenizer, config.seed)
    metrics |= show_truncation(tokenizer)
    metrics |= compare_rows(examples, tokenizer, (16, 64, len(examples)))
    metrics |= compare_packing(examples[:16], tokenizer, config.seed)
    metrics |= time_packing(examples[: config.batch_size], tokenizer, config)
    metrics |= train_both(examples, held_out, tokenizer, config)

    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    draw(config.out / "packing.png", examples[:16], tokenizer)
    print(f"\nwrote packing.png and metrics.json to {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
