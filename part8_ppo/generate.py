"""Sampling: from scores for the next token to text, one token at a time.

The model gives a score for every token of the vocabulary. Temperature sharpens or flattens them, top-k and top-p cut
the tail of unlikely tokens off, a token is drawn from what is left, appended, and the model is asked again.

    python part8_ppo/generate.py --prompt "One morning"
    python part8_ppo/generate.py --temperature 0.7 --top_p 0.95 --samples 3
    python part8_ppo/generate.py --window 128 --n_sink 4 --max_new_tokens 2000
    python part8_ppo/generate.py --pretrained path/to/llama --prompt "The capital of France"

You should see text that grows word by word, some hundred tokens a second on two CPU cores: with the cache
a token costs one pass over one token. Without a checkpoint it trains one first.

References: Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.1 (top-k); Holtzman et al. 2020, "The
Curious Case of Neural Text Degeneration", section 3.1 (top-p).
"""

import codecs
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from cache import KVCache
from checkpoint import read_checkpoint
from data import UserError, chat_tokens, encode_prompt
from devices import pick_device
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, ByteTokenizer, restore_tokenizer

PART = Path(__file__).resolve().parent
RUNS = PART.parent / "runs" / PART.name
BASE = PART.parent / "runs" / "part6_sft" / "best.pt"
REWARD = PART.parent / "runs" / "part7_reward" / "best.pt"
MADE_BY = {BASE: "part6_sft", REWARD: "part7_reward", RUNS / "best.pt": PART.name}
"""Checkpoints that can be made if they are not there, and the part whose train.py does it."""


@dataclass
class Config:
    """Write text with a trained model."""

    checkpoint: Path = RUNS / "best.pt"
    """Checkpoint to load. The default one is trained first if it is not there."""
    pretrained: Path | None = None
    """Folder of a Llama in Hugging Face's format, to use instead of a checkpoint."""
    prompt: str = ""
    """Text to continue. Empty: the model begins a new document."""
    samples: int = 1
    """How many texts to write."""
    max_new_tokens: int = 600
    """Tokens to add at most; a text may end earlier."""
    temperature: float = 0.3
    """Scores are divided by it. 0: always the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens. 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to p, in (0, 1]. 1: from all."""
    seed: int = 0
    """Seed of the draws."""
    window: int | None = None
    """How many tokens a token sees; then the text may grow without end. None: as the model was trained."""
    n_sink: int | None = None
    """First tokens that stay visible outside the window. None: as the model was trained."""
    in_cache: bool = False
    """With a window: count the distance to the sinks inside the cache, as StreamingLLM does."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first of them that is there."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- choosing a token ---


def filter_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Shape the next token's distribution before it is drawn from.

    Args:
        logits: (B, V) scores.
        temperature: divides the scores; 0 leaves only the likeliest token.
        top_k: keep the k highest scores; 0 keeps all.
        top_p: then keep the smallest set of tokens whose probability reaches p, the one that crosses p included.

    Returns:
        (B, V) scores with -inf where a token is cut; at least one token of each row stays.

    Raises:
        UserError: temperature that is not 0 or more, top_k below 0, or top_p outside (0, 1].
    """
    if not temperature >= 0:
        raise UserError(f"--temperature {temperature} is not 0 or more; 0 takes the likeliest token, 1 changes nothing")
    if top_k < 0:
        raise UserError(f"--top_k {top_k} is below 0; 0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p} is outside (0, 1]; 1 keeps all tokens")
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1), the lowest score that stays
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)  # (B, V) each
        probs = ordered.softmax(dim=-1)
        # A token goes if those before it reach p already: the first always stays, and so does the one that crosses p.
        cut = probs.cumsum(dim=-1) - probs >= top_p
        logits = logits.masked_fill(cut.gather(-1, index.argsort(dim=-1)), -torch.inf)
    return logits


@torch.no_grad()
def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eot: int | None = None,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
    chunk: int = 512,
) -> Iterator[torch.Tensor]:
    """Continue B token rows, one token each a step, with keys and values kept in a cache.

    Args:
        model: gives logits (B, T, V) for ids (B, T) and a cache.
        idx: (B, T) prompts, T >= 1; shorter ones are padded on the left and the cache knows by how much.
        max_new_tokens: steps at most.
        temperature, top_k, top_p: see filter_logits.
        eot: id of the end token. A row that has drawn it emits it as padding from then on, and when all rows have, the
            generation ends. None: go on for max_new_tokens.
        generator: random numbers for the draws, on the device of idx.
        cache: an empty one from model.make_cache, to choose its kind; None for a plain one of the right size.
        chunk: prompt tokens that are read at a time, to bound the memory of a long prompt.

    Yields:
        (B,) the next token of each row.

    Raises:
        ValueError: prompt and new tokens are longer than block_size, and the model has no window.
    """
    model.eval()
    B, T = idx.shape
    cache = cache or model.make_cache(B, T + max_new_tokens)
    ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
    for piece in idx.split(chunk, dim=1):
        logits, _ = model(piece, cache=cache)  # (B, chunk, V)
    for step in range(max_new_tokens):
        probs = filter_logits(logits[:, -1].float(), temperature, top_k, top_p).softmax(dim=-1)  # (B, V)
        token = torch.multinomial(probs, 1, generator=generator).squeeze(1)  # (B, 1) -> (B,)
        if eot is not None:
            token = token.masked_fill(ended, eot)
            ended |= token == eot
        yield token
        if ended.all() or step == max_new_tokens - 1:
            return
        logits, _ = model(token[:, None], cache=cache)  # (B, 1) -> (B, 1, V): the rest is in the cache


def pad_left(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put prompts of unequal length into one batch.

    Args:
        prompts: B lists of ids.
        pad: any id; it stands left of the shorter prompts and is seen by nobody.

    Returns:
        idx (B, T), T the longest prompt's length, and n_pad (B,), how much of each row is padding: for make_cache.
    """
    T = max(len(prompt) for prompt in prompts)
    rows = [[pad] * (T - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(rows), torch.tensor([T - len(prompt) for prompt in prompts])


def printable(text: str) -> str:
    """Replace control characters, which an untrained model writes and a terminal obeys, by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Response(NamedTuple):
    """What a model answered."""

    text: str
    """Decoded, without the end."""
    ids: list[int]
    """Exactly as they were drawn, with <|end|> if it was."""
    ended: bool
    """Whether the model wrote <|end|>, instead of being cut off."""


def respond(
    model: GPT,
    tokenizer: BPETokenizer,
    prompts: list[str],
    temperature: float = 0.7,
    seed: int = 0,
    max_new_tokens: int = 10_000,
    batch_size: int = 64,
) -> list[Response]:
    """Let a model answer prompts, many at a time.

    Args:
        model: it sees a prompt as it saw those it was trained on, see data.encode_prompt.
        tokenizer: with the special tokens of a chat.
        prompts: what users say; one that is too long loses its beginning.
        temperature: 0 always takes the likeliest token.
        seed: of the draws.
        max_new_tokens: length of an answer at most; it also ends where the context does.
        batch_size: answers at a time. Rows of a batch are padded to one length, so they have prompts of similar length.

    Returns:
        The answers, in the order of the prompts. The model is left in training mode.
    """
    device, T = model.wte.weight.device, model.config.block_size
    end, pad = chat_tokens(tokenizer)[2:]
    generator = torch.Generator(device).manual_seed(seed)
    encoded = [encode_prompt((prompt,), tokenizer, T - min(T // 4, 64)) for prompt in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    found: list[Response | None] = [None] * len(prompts)
    while waiting:
        shortest = len(encoded[waiting[0]])
        batch = [i for i in waiting[:batch_size] if len(encoded[i]) <= shortest + 16]
        waiting = waiting[len(batch) :]
        idx, n_pad = pad_left([encoded[i] for i in batch], pad)  # (B, T)
        length = min(max_new_tokens, T - idx.shape[1])
        cache = model.make_cache(len(batch), idx.shape[1] + length, n_pad.to(device))
        steps = list(generate(model, idx.to(device), length, temperature, eot=end, generator=generator, cache=cache))
        for i, ids in zip(batch, torch.stack(steps, dim=1).tolist(), strict=True):  # (B, T)
            ended = end in ids
            ids = ids[: ids.index(end) + 1] if ended else ids
            found[i] = Response(tokenizer.decode(ids), ids, ended)
    model.train()
    return found


# --- finding a model ---


def find_checkpoint(path: Path, smoke: bool, base: Path | None = None) -> Path:
    """Return the path of a checkpoint that is there, training it first if it is one of MADE_BY.

    Args:
        path: of the checkpoint.
        smoke: train it anew, in a tiny run and in a temporary folder.
        base: of a reward model's smoke run, the model to make it of; else one would be trained for it, too.

    Raises:
        UserError: another path was given and there is no such file.
    """
    part = PART.parent / MADE_BY.get(path, PART.name)
    command = [sys.executable, str(part / "train.py")]
    if smoke and path in MADE_BY:
        path = Path(tempfile.mkdtemp()) / path.name
        command += ["--smoke", "--out", str(path.parent)] + (["--base", str(base)] if base else [])
    elif path not in MADE_BY and not path.is_file():
        raise UserError(f"{path}: no such file; train one with python {part.name}/train.py, or leave the flag out")
    if not path.is_file():
        print(f"{path} not found: training it now with python {part.name}/train.py (about 3 minutes)", flush=True)
        alone = {name: value for name, value in os.environ.items() if name != "RANK"}  # not one of torchrun's processes
        if subprocess.run(command, env=alone).returncode != 0:
            raise UserError(f"training failed; run python {part.name}/train.py to see why")
    return path


def load_checkpoint(path: Path, device: torch.device) -> tuple[GPT, ByteTokenizer | BPETokenizer]:
    """Load what train.py saved.

    Returns:
        The model on the device, and its tokenizer. Of a policy, the language model in it: no value head, no critic.

    Raises:
        UserError: the file is no checkpoint of ours, or one of a reward model, or of a model with settings unknown
            here. One that knows fewer settings is a part 4 model: without experts.
    """
    saved = read_checkpoint(path, device)
    unknown = saved["model_config"].keys() - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise UserError(f"{path}: a model of another architecture; it differs in {', '.join(sorted(unknown))}")
    if "head.weight" in saved["model"]:
        raise UserError(f"{path}: a reward model, which writes no text; give the model that it was made of")
    weights = saved["model"]
    if "value_head.weight" in weights:
        weights = {name.removeprefix("trunk."): some for name, some in weights.items() if name.startswith("trunk.")}
    model = GPT(GPTConfig(**saved["model_config"])).to(device)
    model.load_state_dict(weights)
    return model, restore_tokenizer(saved["tokenizer"])


# --- the command line ---


def set_window(model: GPT, window: int | None, n_sink: int | None) -> None:
    """Give a trained model another window and other sinks, in place; no weight depends on them. None leaves one as is.

    Raises:
        UserError: a negative number, or sinks without a window.
    """
    window = model.config.window if window is None else window
    n_sink = model.config.n_sink if n_sink is None else n_sink
    try:
        model.config = replace(model.config, window=window, n_sink=n_sink)
    except ValueError as error:
        raise UserError(f"--window {window} --n_sink {n_sink}: {error}") from error


def tokens_that_fit(model: GPT, n_prompt: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt: all that were asked for if there is a window, else up to block_size.

    Raises:
        UserError: the prompt alone fills the context.
    """
    room = model.config.block_size - n_prompt
    if model.config.window or max_new_tokens <= room:
        return max_new_tokens
    if room <= 0:
        raise UserError(
            f"the prompt has {n_prompt} tokens and the context {model.config.block_size}; shorten it, or give a "
            "window, such as --window 128 --n_sink 4, for text of any length"
        )
    print(f"stopping after {room} tokens, at the end of the context; --window goes on", file=sys.stderr)
    return room


def main(config: Config) -> None:
    """Load a model and stream its samples to the terminal."""
    sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal cannot show
    device = pick_device(config.device)
    # A wrong setting should not wait for a model to load.
    filter_logits(torch.zeros(1, 2), config.temperature, config.top_k, config.top_p)
    if config.max_new_tokens < 0:
        raise UserError(f"--max_new_tokens {config.max_new_tokens} is below 0; give 0 or more")
    if config.smoke:
        config = replace(config, max_new_tokens=20)
    if config.pretrained:
        from load_hf import load_pretrained  # Llama's tokenizer needs a library, which our own models do not

        model, tokenizer = load_pretrained(config.pretrained)
        model.to(device)
    else:
        model, tokenizer = load_checkpoint(find_checkpoint(config.checkpoint, config.smoke), device)
    set_window(model, config.window, config.n_sink)
    if config.in_cache and not model.config.window:
        raise UserError("--in_cache is for a cache that forgets; give it a window, such as --window 128 --n_sink 4")
    # The end token begins a document as well: in training, the token before every first one was the end of the last.
    prompt = tokenizer.encode(config.prompt) or [tokenizer.eot]
    length = tokens_that_fit(model, len(prompt), config.max_new_tokens)
    generator = torch.Generator(device).manual_seed(config.seed)
    for sample in range(config.samples):
        if sample > 0:
            print("\n---")
        idx = torch.tensor([prompt], device=device)  # (1, T)
        # With a window the cache need not hold more than that, so the text can go on for ever.
        rolling = 0 < model.config.window < len(prompt) + length - model.config.n_sink
        cache = model.make_cache(1, len(prompt) + length, rolling=rolling, in_cache=rolling and config.in_cache)
        tokens = generate(
            model,
            idx,
            length,
            config.temperature,
            config.top_k,
            config.top_p,
            tokenizer.eot,
            generator,
            cache,
            chunk=1 if config.in_cache else 512,
        )
        # A character may be several tokens long: the decoder waits until it is whole.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(config.prompt, end="", flush=True)
        for token in tokens:
            print(printable(decoder.decode(tokenizer.decode_bytes(token.tolist()))), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # how to stop a long text
        print()
        sys.exit(130)
