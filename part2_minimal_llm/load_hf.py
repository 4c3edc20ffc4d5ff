"""Real weights: a GPT-2 in Hugging Face's format becomes our GPT.

Our model is GPT-2's architecture to the letter, so its weights fit after three changes of form: other names, matrices
that are stored transposed, and the mask that older files carry along. The folder must be on disk already (any of
gpt2, gpt2-medium, gpt2-large, gpt2-xl): config.json, *.safetensors, and vocab.json or tokenizer.json.

    python part2_minimal_llm/generate.py --pretrained path/to/gpt2 --prompt "The capital of France"
    python part2_minimal_llm/evaluate.py --pretrained path/to/gpt2 --data README.md

Reference: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", sections 2.2 (byte-level BPE),
2.3.
"""

import json
from pathlib import Path

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data import UserError
from model import GPT, GPTConfig

# --- GPT-2's tokenizer ---

# How GPT-2 cuts a text before it merges bytes: contractions, words with the space before them, numbers, the rest.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's vocabulary file writes bytes with: character -> byte value.

    Bytes that print as themselves in Latin-1 do; the other 68 are shifted to the characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, run by tiktoken, with the methods of our ByteTokenizer.

    Args:
        vocabulary: token, written in GPT-2's alphabet -> id. Ids count the merges in their order.
    """

    def __init__(self, vocabulary: dict[str, int]) -> None:
        alphabet = byte_alphabet()
        self.eot = vocabulary["<|endoftext|>"]
        self.ranks = {
            bytes(alphabet[character] for character in token): i for token, i in vocabulary.items() if i != self.eot
        }
        self.vocab_size = len(vocabulary)
        self.encoding = tiktoken.Encoding(
            "gpt2-local",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens={"<|endoftext|>": self.eot},
        )

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids; what looks like a special token in it is text like any other."""
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Turn ids back into the bytes that they stand for; the end token stands for none."""
        return self.encoding.decode_bytes([i for i in ids if i != self.eot])

    def decode(self, ids: list[int]) -> str:
        """Turn ids back into text; half a character shows as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for."""
        lengths = [0] * self.vocab_size
        for token, i in self.ranks.items():
            lengths[i] = len(token)
        return lengths


def load_tokenizer(folder: Path) -> GPT2Tokenizer:
    """Read the vocabulary of a GPT-2 folder.

    Raises:
        UserError: there is neither a vocab.json nor a tokenizer.json.
    """
    if (folder / "vocab.json").is_file():
        return GPT2Tokenizer(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    if (folder / "tokenizer.json").is_file():
        return GPT2Tokenizer(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    raise UserError(f"{folder}: no vocab.json and no tokenizer.json; download the tokenizer's files too")


# --- GPT-2's weights ---

# Our names for theirs, in this order; what is not listed is spelled alike.
NAMES = {
    "transformer.": "",
    "h.": "blocks.",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "ln_f": "norm",
    "c_attn": "qkv",
    "c_proj": "proj",
    "c_fc": "fc",
}
# Our settings and theirs.
SHAPE = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# What a GPT-2 may set and we do not have, with the value that we do have.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def our_name(name: str) -> str:
    """Translate the name of a GPT-2 parameter: "transformer.h.0.attn.c_attn.weight" -> "blocks.0.attn.qkv.weight"."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read all *.safetensors of a GPT-2 folder under our names, matrices the way nn.Linear holds them.

    Raises:
        UserError: the folder holds no *.safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors in it; download the model's weights in that format")
    weights = {}
    for file in files:
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from error
        for theirs, tensor in tensors.items():
            if theirs.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the causal mask, which older files carry; ours is made on the fly
            # GPT-2 was written with x @ W + b, W (in, out); nn.Linear computes x @ W.T + b with W (out, in).
            transposed = theirs.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            weights[our_name(theirs)] = (tensor.T if transposed else tensor).float().contiguous()
    weights.setdefault("lm_head.weight", weights.get("wte.weight"))  # tied, so most files hold it once
    return weights


def load_pretrained(folder: Path) -> tuple[GPT, GPT2Tokenizer]:
    """Load a local GPT-2 folder, in float32 on the CPU.

    Args:
        folder: with config.json, *.safetensors, and vocab.json or tokenizer.json.

    Returns:
        The model and its tokenizer.

    Raises:
        UserError: a file is missing, the model is no GPT-2 as published, or its weights do not fit its config.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json in it; give the folder of a GPT-2 in Hugging Face's format")
    try:
        theirs = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'}: not valid JSON ({error}); download it again") from error
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise UserError(f"{folder}: {name} = {theirs[name]!r} is not implemented here, only {value!r}")
    try:
        config = GPTConfig(**{ours: theirs[name] for ours, name in SHAPE.items()})
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: no {error} in it; give the folder of a GPT-2") from error
    if theirs.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{folder}: n_inner = {theirs['n_inner']} is not implemented here, only 4 * n_embd")
    model = GPT(config)
    try:
        model.load_state_dict(load_weights(folder))
    except RuntimeError as error:
        raise UserError(
            f"{folder}: its weights do not fit its config.json; {str(error).splitlines()[1].strip()}"
        ) from error
    return model, load_tokenizer(folder)
