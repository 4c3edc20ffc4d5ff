"""Real weights: a model of the Llama family, or a Mixtral, in Hugging Face's format becomes our GPT.

Our architecture is theirs, so the weights fit after two changes of form: other names, and matrices that we keep as one
and they as several (queries, keys and values; gate and up; the experts). The folder must be on disk already, of any
model whose config.json says `"model_type": "llama"` (Llama 2 and 3.x, TinyLlama, SmolLM2 and many more) or "mixtral".

    python part5_moe/generate.py --pretrained path/to/SmolLM2-135M --prompt "The capital of France"
    python part5_moe/evaluate.py --pretrained path/to/SmolLM2-135M --data pydoc

References: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models", section 2.2; Grattafiori et al.
2024, "The Llama 3 Herd of Models", section 3.2; Jiang et al. 2024, "Mixtral of Experts", section 2.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from data import UserError
from model import GPT, GPTConfig

# --- Llama's tokenizer ---


def byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's vocabulary file writes bytes with: character -> byte value.

    Bytes that print as themselves in Latin-1 do; the other 68 are shifted to the characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_bytes(name: str, alphabet: dict[str, int] | None) -> bytes:
    """The bytes that a token stands for, from its name in the vocabulary.

    Args:
        name: as in tokenizer.json.
        alphabet: character -> byte, where names are written in it (Llama 3, SmolLM2); None where they are in plain text
            (Llama 2, TinyLlama), in which U+2581 is a space and "<0x0A>" a byte.
    """
    if alphabet is not None:
        return bytes(alphabet[character] for character in name)
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace("\u2581", " ").encode()


class LlamaTokenizer:
    """A tokenizer.json, run by the `tokenizers` library, with the methods of our ByteTokenizer.

    Args:
        file: the tokenizer.json.
        eot: id of the token that ends a text.
        vocab_size: V of the model, which may be more than the tokens that have a name.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, file: Path, eot: int, vocab_size: int) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{file}: not a whole tokenizer.json ({error}); download it again") from error
        self.tokenizer.encode_special_tokens = True  # a special token in the user's text is text like any other
        self.tokenizer.no_truncation()  # some files are set to cut long texts off
        self.tokenizer.no_padding()
        self.eot = eot
        self.vocab_size = vocab_size
        names = self.tokenizer.get_vocab()
        added = self.tokenizer.get_added_tokens_decoder()  # special ones, such as the end, and words in plain text
        alphabet = byte_alphabet() if "ByteLevel" in repr(self.tokenizer.decoder) else None
        self.token_bytes = [b""] * max(vocab_size, 1 + max(names.values()))
        for name, i in names.items():
            if i not in added:
                self.token_bytes[i] = token_bytes(name, alphabet)
            elif not added[i].special:
                self.token_bytes[i] = name.encode()

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, with the token in front that this model's texts begin with, if it has one.

        Bytes that are no UTF-8, which arrive as surrogate escapes, become U+FFFD: the library takes whole characters.
        """
        text = text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
        return self.tokenizer.encode(text).ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Turn ids back into the bytes that they stand for; special tokens stand for none.

        Llama 2 writes a text with a space before its first word, and this gives it back with that space.
        """
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: list[int]) -> str:
        """Turn ids back into text; half a character shows as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for."""
        return [len(token) for token in self.token_bytes]


# --- Llama's config ---

# Our settings and theirs.
SHAPE = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "mlp_hidden": "intermediate_size",
}
# Those that may be missing or null: then they follow from the others.
OPTIONAL = {"n_kv_head": "num_key_value_heads", "head_dim": "head_dim"}
# What a Mixtral has beside them.
EXPERTS = {
    "n_expert": "num_local_experts",
    "n_expert_active": "num_experts_per_tok",
    "expert_hidden": "intermediate_size",
}
MODEL_TYPES = {"llama": {}, "mixtral": EXPERTS}
# What they may set and we do not have, with the value that we do have.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "quantization_config": None,
}
# How its positions may be stretched, and the numbers that go with it.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_json(file: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not even text
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: a {type(content).__name__} where names with values should be; download it again")
    return content


def read_rope(theirs: dict, file: Path) -> tuple[float, dict[str, float | str] | None]:
    """Find the base of the rotary positions and their scaling in a config.json, in either spelling.

    Released models say rope_theta, and rope_scaling or null; transformers 5 says both in rope_parameters.

    Returns:
        The base, and the scaling as rope_frequencies takes it, None for none.

    Raises:
        UserError: a rope_type that we do not have, or one without its numbers.
    """
    rope = {
        "rope_theta": theirs.get("rope_theta"),
        "original_max_position_embeddings": theirs["max_position_embeddings"],
        **(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}),
    }
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise UserError(f"{file}: rope_type = {rope_type!r} is not implemented here, only {', '.join(ROPE_TYPES)}")
    partial = rope.get("partial_rotary_factor") or theirs.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"{file}: partial_rotary_factor = {partial!r} is not implemented here, only 1.0")
    base = rope["rope_theta"] or (1e6 if theirs.get("model_type") == "mixtral" else 10000.0)
    numbers = {name: rope.get(name) for name in ROPE_TYPES[rope_type]}
    for name, value in {"rope_theta": base, **numbers}.items():
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{file}: {name} = {value!r} of rope_type {rope_type!r} is not a number above 0")
    return base, {"rope_type": rope_type, **numbers} if numbers else None


def read_config(folder: Path) -> tuple[GPTConfig, int]:
    """Read config.json in either spelling: that of the released models, or that of transformers 5.

    Returns:
        The shape of the model, and the id of the token that ends a text, the first where there are several.

    Raises:
        UserError: there is no config.json, it is damaged, or it asks for something that our architecture does not have.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json in it; give a Llama's or Mixtral's folder in Hugging Face's format")
    theirs = read_json(file)
    model_type = theirs.get("model_type", "llama")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type = {model_type!r} is not implemented here, only {', '.join(MODEL_TYPES)}")
    experts = MODEL_TYPES[model_type]
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise UserError(f"{file}: {name} = {theirs[name]!r} is not implemented here, only {value!r}")
    for name in (*SHAPE.values(), *experts.values(), *OPTIONAL.values()):
        value = theirs.get(name)
        if not (isinstance(value, int) and value > 0) and not (value is None and name in OPTIONAL.values()):
            raise UserError(f"{file}: {name} = {value!r} is no count; give the folder of a Llama")
    if not isinstance(theirs.get("rms_norm_eps"), float):
        raise UserError(f"{file}: rms_norm_eps = {theirs.get('rms_norm_eps')!r} is no number; give a Llama's folder")
    base, scaling = read_rope(theirs, file)
    eot = theirs.get("eos_token_id", 2)
    eot = eot[0] if isinstance(eot, list) and eot else eot
    if not isinstance(eot, int) or not 0 <= eot < theirs["vocab_size"]:
        raise UserError(
            f"{file}: eos_token_id = {eot!r} is none of the {theirs['vocab_size']} tokens; set the right one"
        )
    try:
        config = GPTConfig(
            **{ours: theirs[name] for ours, name in (SHAPE | experts).items()},
            **{ours: theirs.get(name) or 0 for ours, name in OPTIONAL.items()},
            norm_eps=theirs["rms_norm_eps"],
            rope_base=base,
            rope_scaling=scaling,
            tie_weights=theirs.get("tie_word_embeddings", False),
        )
    except ValueError as error:  # numbers that do not go together
        raise UserError(f"{file}: {error}") from error
    return config, eot


# --- Llama's weights ---

# Our names for theirs, in this order; what is not listed is spelled alike.
NAMES = {
    "model.": "",
    "layers.": "blocks.",
    "embed_tokens": "wte",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn.o_proj": "attn.proj",
    "mlp.down_proj": "mlp.proj",
    "block_sparse_moe.gate": "mlp.router",
    "block_sparse_moe.experts": "mlp.experts",
}
# Our matrices that are several of theirs, one below the other.
JOINED = {
    "attn.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.fc.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
# The same of an expert: w1 is its gate, w3 its up, w2 its projection.
JOINED_EXPERT = {"fc.weight": ("w1.weight", "w3.weight"), "proj.weight": ("w2.weight",)}


def our_name(name: str) -> str:
    """Translate a parameter's name: "model.layers.0.self_attn.o_proj.weight" -> "blocks.0.attn.proj.weight"."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def weight_files(folder: Path) -> list[Path]:
    """Find the files that hold a folder's weights: those of its index, or model.safetensors, or all *.safetensors.

    Raises:
        UserError: there is none, the index is damaged, or a file that it names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map in it; download it again")
        files = sorted({folder / str(name) for name in weight_map.values()})
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]  # alone: some folders hold the same weights in other forms as well
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{folder}: {', '.join(missing) or 'no *.safetensors'} not in it; download all of its weights")
    return files


def load_weights(folder: Path, config: GPTConfig) -> dict[str, torch.Tensor]:
    """Read the weights of a Llama's or Mixtral's folder under our names, in float32.

    Raises:
        UserError: a file is missing or damaged, or matrices that we keep as one are missing or do not go together.
    """
    weights = {}
    for file in weight_files(folder):
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from error
        for theirs, tensor in tensors.items():
            if not theirs.endswith("rotary_emb.inv_freq"):  # computed, yet some files carry it along
                weights[our_name(theirs)] = tensor.float()

    def join(prefix: str, theirs: tuple[str, ...]) -> torch.Tensor:
        names = [prefix + name for name in theirs]
        parts = [weights.pop(name) for name in names if name in weights]
        if len(parts) < len(names) or len({part.shape[1:] for part in parts}) > 1:
            raise UserError(f"{folder}: its weights do not fit its config.json; they differ in {', '.join(names)}")
        return torch.cat(parts)

    for layer in range(config.n_layer):
        block = f"blocks.{layer}."
        for ours, theirs in JOINED.items():
            if not (config.n_expert and ours.startswith("mlp.")):
                weights[block + ours] = join(block, theirs)
        for ours, theirs in JOINED_EXPERT.items() if config.n_expert else ():
            experts = [join(f"{block}mlp.experts.{e}.", theirs) for e in range(config.n_expert)]
            if len({expert.shape for expert in experts}) > 1:
                raise UserError(f"{folder}: its weights do not fit its config.json; its experts differ in their shapes")
            weights[f"{block}mlp.{ours}"] = torch.stack(experts)
            weights[f"{block}mlp.balance_bias"] = torch.zeros(config.n_expert)  # balanced by a loss, without a bias
    if config.tie_weights and "wte.weight" in weights:
        weights["lm_head.weight"] = weights["wte.weight"]
    return weights


def load_pretrained(folder: Path) -> tuple[GPT, LlamaTokenizer]:
    """Load a local folder with a model of the Llama family or a Mixtral, in float32 on the CPU.

    Args:
        folder: with config.json, *.safetensors and tokenizer.json.

    Returns:
        The model and its tokenizer.

    Raises:
        UserError: a file is missing or damaged, the architecture is another one, or the weights do not fit the config.
    """
    config, eot = read_config(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; download the tokenizer's files too")
    tokenizer = LlamaTokenizer(folder / "tokenizer.json", eot, config.vocab_size)
    weights = load_weights(folder, config)
    model = GPT(config)
    theirs, ours = ({(name, tensor.shape) for name, tensor in state.items()} for state in (weights, model.state_dict()))
    differing = sorted({name for name, _ in theirs ^ ours})
    if differing:
        raise UserError(f"{folder}: its weights do not fit its config.json; they differ in {', '.join(differing[:3])}")
    model.load_state_dict(weights)
    return model, tokenizer
