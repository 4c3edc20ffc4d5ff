"""Part 2: the language model, its data, its training, its sampling, and GPT-2's own weights.

transformers is the independent reference for everything that has one: logits, greedy tokens, the tokenizer, top-k and
top-p. What has none is worked out by hand in the test. The last section gives every script the wrong things that users
give them.
"""

import io
import itertools
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conftest import load, part, run_script

PART = part(2)
model, tokenizer, data, generate, train, evaluate, load_hf = (
    load(2, name) for name in ("model", "tokenizer", "data", "generate", "train", "evaluate", "load_hf")
)
GPT, GPTConfig, UserError, filter_logits = model.GPT, model.GPTConfig, data.UserError, generate.filter_logits

SMALL = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32)


def make_model(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """A model in which everything matters: no bias is zero, no norm the identity, and attention is far from uniform."""
    torch.manual_seed(seed)
    gpt = GPT(config).eval()
    for name, parameter in gpt.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.25)
    return gpt


# What tokenizers stumble over, and the oldest table of characters that Python has: newer ones are letters to one
# library and unknown to another.
AWKWARD = [
    *("'s", "'LLAMA", " don't", " 20262026", "  ", "\n\n", "\t", " 12", "3٣"),
    *("é", "e\u0301", "\U0001f600", "中文", "<|endoftext|>"),
]
ASSIGNED = [chr(i) for i in range(0xD800) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]


def random_text(rng: random.Random, length: int) -> str:
    """A text from all over Unicode, half of it awkward."""
    return "".join(rng.choice(AWKWARD if rng.random() < 0.5 else ASSIGNED) for _ in range(length))


def tiny_run(out: Path, **settings: object) -> train.Config:
    """A whole training run of a fraction of a second: six steps, evaluated at 0, 3 and 6."""
    tiny = {"steps": 6, "batch_size": 2, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_stories": 40}
    tiny |= {"warmup_steps": 2, "eval_every": 3, "eval_tokens": 200, "device": "cpu"}
    return train.Config(out=out, **(tiny | settings))


class Terminal(io.TextIOWrapper):
    """A standard output that can be read back; it encodes as a real one does, which io.StringIO does not."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def getvalue(self) -> str:
        """Everything that was written."""
        return self.buffer.getvalue().decode()


@dataclass
class Outcome:
    """What a program leaves on the terminal."""

    status: int
    """Exit status."""
    stdout: str
    """Standard output."""
    stderr: str
    """Standard error."""


def start(script: str, *args: object) -> Outcome:
    """Run `python script args` from its first line to its exit status, but inside this process: torch is loaded."""
    stdout, stderr, argv = Terminal(), Terminal(), sys.argv
    sys.argv = [script, *map(str, args)]
    status = 0
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            runpy.run_path(str(PART / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    return Outcome(status, stdout.getvalue(), stderr.getvalue())


def check_refusal(outcome: Outcome | subprocess.CompletedProcess) -> str:
    """Status 2, and one line on stderr that begins with `error:`, which is returned."""
    status = outcome.status if isinstance(outcome, Outcome) else outcome.returncode
    assert status == 2, outcome.stderr[-2000:]
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr[-2000:]
    assert lines[0].startswith("error: ")
    return lines[0]


def refused(script: str, *args: object) -> str:
    """Run a script that must refuse its arguments; returns what it says."""
    return check_refusal(start(script, *args))


# --- the model ---


@torch.no_grad()
def test_causality() -> None:
    """A later token changes no earlier logit, to the last bit, and does change its own and the later ones."""
    gpt = make_model(replace(SMALL, block_size=96))
    idx = torch.randint(257, (3, 96))
    logits, _ = gpt(idx)
    for t in (1, 31, 64, 95):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 257
        other, _ = gpt(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert ((other[:, t:] - logits[:, t:]).abs().amax(dim=-1) > 0).all()


@torch.no_grad()
def test_rows_of_a_batch_are_independent() -> None:
    """Each row is scored as if it were alone, and a short row as if it were the beginning of a long one."""
    gpt = make_model()
    idx = torch.randint(257, (3, 32))
    logits, _ = gpt(idx)
    torch.testing.assert_close(gpt(idx[1:2])[0], logits[1:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(gpt(idx[:, :7])[0], logits[:, :7], atol=1e-5, rtol=0)


def test_too_long_a_sequence_is_refused() -> None:
    """There are block_size learned positions and no more."""
    gpt = make_model()
    with pytest.raises(ValueError, match="33 tokens is longer than block_size = 32"):
        gpt(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("n_embd", [64, 128])
def test_loss_starts_at_ln_v(n_embd: int) -> None:
    """A fresh model knows nothing: its loss is that of a guess among V tokens, and a little for its scores' spread.

    Scores are sums of C products of a normalised entry and one of standard deviation 0.02 sqrt(768 / C): their variance
    s^2 is 768 * 0.02^2, and the mean of exp(score) is exp(s^2 / 2).
    """
    gpt = GPT(replace(SMALL, n_embd=n_embd, n_layer=4))
    idx = torch.randint(257, (8, 33))
    _, loss = gpt(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(257) + 768 * 0.02**2 / 2, abs=0.08)


def test_initialisation() -> None:
    """0.02 sqrt(768 / C) for matrices and embeddings, less for what adds to the residual stream, zero for biases."""
    gpt = GPT(GPTConfig(n_layer=8, n_embd=192))  # 0.02 at C = 768, so 0.04 at 192
    for name, parameter in gpt.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if "norm" in name and "weight" in name else 0.0)).all(), name
        else:
            std = 0.04 / 4 if name.endswith("proj.weight") else 0.04  # 2 x 8 projections, sqrt(16) = 4
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < std / 20, name


def test_loss_is_the_mean_cross_entropy() -> None:
    """-ln p(target) with p from a softmax over the logits, averaged over B * T positions."""
    gpt = make_model()
    idx = torch.randint(257, (2, 33))
    x, y = idx[:, :-1], idx[:, 1:]
    with torch.no_grad():
        logits, loss = gpt(x, y)
    probs = logits.double().exp() / logits.double().exp().sum(dim=-1, keepdim=True)  # (B, T, V)
    by_hand = sum(-math.log(probs[b, t, y[b, t]]) for b in range(2) for t in range(32)) / 64
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert gpt(x)[1] is None


def test_ignore_index() -> None:
    """A target of -100 counts neither in the sum nor in the number it is divided by, and teaches nothing."""
    gpt = make_model()
    x, y = torch.randint(257, (2, 8)), torch.randint(257, (2, 8))
    masked = y.clone()
    masked[0, :5] = masked[1, 3:] = -100  # left: three positions of the first row, three of the second
    logits, loss = gpt(x, masked)
    logits.retain_grad()
    loss.backward()
    kept = masked != -100
    by_hand = -logits.log_softmax(dim=-1)[kept].gather(-1, y[kept][:, None]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert logits.grad[~kept].abs().max() == 0
    assert (logits.grad[kept].abs().amax(dim=-1) > 0).all()


def test_weights_are_tied() -> None:
    """The embedding and the output layer are one matrix: counted once, and moved by the gradient of both uses."""
    gpt = GPT(SMALL)
    assert gpt.lm_head.weight is gpt.wte.weight
    C, V, T = 32, 257, 32
    block = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 2 * 2 * C
    assert gpt.num_parameters() == V * C + T * C + 2 * block + 2 * C
    _, loss = gpt(torch.tensor([[5, 6]]), torch.tensor([[7, 8]]))
    loss.backward()
    rows = gpt.wte.weight.grad.abs().sum(dim=1)
    assert rows[200] > 0, "a token that was no input is moved as an output"
    restored = GPT(SMALL)
    restored.load_state_dict(gpt.state_dict())
    assert restored.lm_head.weight is restored.wte.weight


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2_sizes(n_layer: int, n_head: int, n_embd: int, parameters: int) -> None:
    """The four published shapes have the published number of parameters (counted without holding them in memory)."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig(50257, 1024, n_layer, n_head, n_embd))
    assert gpt.num_parameters() == parameters


def test_dropout_is_for_training_only() -> None:
    """Two passes differ in training and agree in evaluation; without dropout they always agree."""
    idx = torch.randint(257, (2, 16))
    gpt = make_model(replace(SMALL, dropout=0.2))
    assert torch.equal(gpt(idx)[0], gpt(idx)[0])
    gpt.train()
    assert not torch.allclose(gpt(idx)[0], gpt(idx)[0])
    for module in ("dropout", "blocks.0.attn.proj_dropout", "blocks.0.mlp.dropout"):
        assert gpt.get_submodule(module).p == 0.2
    plain = make_model().train()
    assert torch.equal(plain(idx)[0], plain(idx)[0])


# --- the tokenizer ---


def test_round_trip_any_bytes(tmp_path: Path) -> None:
    """Every text comes back, and every file comes back byte for byte, whether or not it is UTF-8."""
    byte = tokenizer.ByteTokenizer()
    rng = random.Random(0)
    for length in range(60):
        text = random_text(rng, length) + chr(rng.randrange(0x10000, 0x110000))
        ids = byte.encode(text)
        assert byte.decode(ids) == text
        assert ids == list(text.encode())
    file = tmp_path / "any"
    for _ in range(60):
        raw = rng.randbytes(rng.randrange(1, 200)) + rng.choice([b"", b"\r\n", b"\x00", "é".encode()[:1]])
        file.write_bytes(raw)
        ids = byte.encode(data.read_file(file))
        assert byte.decode_bytes(ids) == raw
        assert len(ids) == len(raw) == sum(byte.byte_lengths()[i] for i in ids)


def test_end_token_is_no_byte() -> None:
    """256 is told apart from all bytes, is never what a text is encoded to, and stands for no text."""
    byte = tokenizer.ByteTokenizer()
    assert byte.eot == 256
    assert byte.vocab_size == len(byte.byte_lengths()) == 257
    assert byte.eot not in byte.encode("<|endoftext|>" + "".join(map(chr, range(300))))
    assert byte.decode([104, 256, 105, 256]) == "hi"
    assert byte.byte_lengths() == [1] * 256 + [0]
    assert byte.decode([0xC3]) == "\ufffd"


# --- the data ---


def test_targets_are_shifted_by_one() -> None:
    """In a text that counts, the target is always one more than the input, and every window can be drawn."""
    tokens = torch.arange(50)
    generator = torch.Generator().manual_seed(0)
    x, y = data.get_batch(tokens, 2000, 8, generator)
    assert x.shape == y.shape == (2000, 8)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(8))
    assert set(x[:, 0].tolist()) == set(range(42))  # the last window is 41..48 with the answers 42..49
    again, _ = data.get_batch(tokens, 2000, 8, torch.Generator().manual_seed(0))
    other, _ = data.get_batch(tokens, 2000, 8, torch.Generator().manual_seed(1))
    assert torch.equal(again, x)
    assert not torch.equal(other, x)


def test_documents_end_with_the_end_token() -> None:
    """Each document is followed by its end, the last one too."""
    tokens = data.encode_documents(["ab", "", "é"], tokenizer.ByteTokenizer())
    assert tokens.tolist() == [97, 98, 256, 256, 0xC3, 0xA9, 256]
    assert tokens.dtype == torch.int64


def test_held_out_is_never_trained_on_stories() -> None:
    """No story is on both sides, and both sides are what was asked for."""
    training, held_out = data.load_documents("stories", 400)
    assert len(training) == 400
    assert len(held_out) == 20
    assert not set(training) & set(held_out)
    assert data.load_documents("stories", 400) == (training, held_out)


def test_held_out_is_never_trained_on_pydoc() -> None:
    """No paragraph of ten words is on both sides, however it is wrapped, and little of the text is lost."""
    (training,), (held_out,) = data.load_documents("pydoc", 0)
    known = {" ".join(paragraph.split()) for paragraph in training.split("\n\n")}
    asked = {" ".join(paragraph.split()) for paragraph in held_out.split("\n\n")}
    assert not [paragraph for paragraph in known & asked if len(paragraph.split()) >= 10]
    assert len(held_out) == pytest.approx(len(training) / 9, rel=0.001)
    assert len(training) + len(held_out) > 300_000


def test_held_out_is_never_trained_on_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first nine tenths are trained on, the rest is evaluated on, and training itself keeps to that."""
    file = tmp_path / "text.txt"
    file.write_text("a" * 900 + "b" * 100)
    assert data.load_documents(str(file), 0) == (["a" * 900], ["b" * 100])
    batches, evaluated = [], []

    def spy_get_batch(tokens: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = data.get_batch(tokens, *args)
        batches.append(torch.stack([x, y]))
        return x, y

    def spy_evaluate(gpt: GPT, tokens: torch.Tensor, *args: object) -> dict[str, float]:
        evaluated.append(tokens)
        return real_evaluate(gpt, tokens, *args)

    real_evaluate = train.evaluate
    monkeypatch.setattr(train, "get_batch", spy_get_batch)
    monkeypatch.setattr(train, "evaluate", spy_evaluate)
    train.train(tiny_run(tmp_path / "out", data=str(file)))
    assert set(torch.cat(batches).flatten().tolist()) <= {ord("a"), 256}
    assert set(torch.cat(evaluated).tolist()) <= {ord("b"), 256}
    assert len(batches) == 6
    assert len(evaluated) == 3


# --- GPT-2: weights ---


def random_gpt2() -> GPT2LMHeadModel:
    """GPT-2 as transformers has it, small, with random values of a size at which every parameter matters.

    Embeddings are small, so that the epsilon of the norms shows in the result; the last norm makes up for it.
    """
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    gpt2 = GPT2LMHeadModel(config).eval()
    for name, parameter in gpt2.named_parameters():
        norm = "ln_" in name and name.endswith("weight")
        mean = 20.0 if "ln_f.weight" in name else float(norm)
        torch.nn.init.normal_(parameter, mean, std=0.02 if name.startswith("transformer.w") else 0.3)
    return gpt2


@dataclass
class Pretrained:
    """A folder as one downloads it, and the reference for what is in it."""

    folder: Path
    """config.json, model.safetensors, vocab.json."""
    gpt2: GPT2LMHeadModel
    """The model that was saved there."""
    tokenizer: Tokenizer
    """The tokenizer that was saved there: byte-level BPE with 300 tokens."""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A small random GPT-2, saved by transformers, and a tokenizer learned from English, saved by tokenizers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2 = random_gpt2()
    gpt2.save_pretrained(folder)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    # Long numbers and capitals get tokens of their own, so that it matters where a text is cut before the merging.
    bpe.train_from_iterator([data.python_reference()[:50_000], " 20262026 LLAMA" * 3000], trainer)
    bpe.model.save(str(folder))  # vocab.json, merges.txt
    return Pretrained(folder, gpt2, bpe)


def copy_folder(pretrained: Pretrained, folder: Path, **settings: object) -> Path:
    """Copy the folder, with some fields of config.json set anew, to be damaged."""
    folder.mkdir(exist_ok=True)
    for file in pretrained.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_saved(pretrained: Pretrained, folder: Path) -> Path:
    """What this version of transformers writes."""
    return copy_folder(pretrained, folder)


def as_released(pretrained: Pretrained, folder: Path) -> Path:
    """What OpenAI's release looks like on the hub: no common prefix, and the causal mask among the weights."""
    copy_folder(pretrained, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert "wte.weight" in weights
    assert "lm_head.weight" not in weights
    for layer in range(3):
        weights[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors")
    return folder


def as_shards(pretrained: Pretrained, folder: Path) -> Path:
    """Several files, as larger models are stored."""
    copy_folder(pretrained, folder)
    (folder / "model.safetensors").unlink()
    pretrained.gpt2.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def with_output_layer(pretrained: Pretrained, folder: Path) -> Path:
    """The tied matrix written twice, as some tools do."""
    copy_folder(pretrained, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("layout", [as_saved, as_released, as_shards, with_output_layer])
def test_gpt2_parity(layout: Callable[[Pretrained, Path], Path], pretrained: Pretrained, tmp_path: Path) -> None:
    """Our logits are those of transformers, at full context, whatever the files look like."""
    gpt, bpe = load_hf.load_pretrained(layout(pretrained, tmp_path / "gpt2"))
    assert gpt.config == GPTConfig(vocab_size=300, block_size=64, n_layer=3, n_head=4, n_embd=48)
    assert gpt.lm_head.weight is gpt.wte.weight
    assert bpe.vocab_size == 300
    idx = torch.randint(300, (4, 64))
    ours, theirs = gpt.eval()(idx)[0], pretrained.gpt2(idx).logits
    assert theirs.std() > 0.1, "logits that are all alike would prove nothing"
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_gpt2_in_half_precision(pretrained: Pretrained, tmp_path: Path) -> None:
    """Weights stored in bfloat16 are computed with in float32."""
    folder = copy_folder(pretrained, tmp_path / "gpt2")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    gpt, _ = load_hf.load_pretrained(folder)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    idx = torch.randint(300, (2, 64))
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()(idx).logits
    assert (gpt.eval()(idx)[0] - theirs).abs().max() < 1e-4


def test_gpt2_greedy_tokens_match(pretrained: Pretrained) -> None:
    """The likeliest continuation is the one that transformers finds, up to the last position of the context."""
    gpt, _ = load_hf.load_pretrained(pretrained.folder)
    idx = torch.randint(300, (3, 8))
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 56}
    theirs = pretrained.gpt2.generate(idx, attention_mask=torch.ones_like(idx), **settings)[:, 8:]
    ours = torch.stack(list(generate.generate(gpt, idx, 56, temperature=0)), dim=1)
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours.flatten().tolist())) > 5, "one token repeated would prove little"


# --- GPT-2: tokenizer ---


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_gpt2_tokenizer(form: str, pretrained: Pretrained, tmp_path: Path) -> None:
    """The same ids as the tokenizers library, for any text, and the text comes back."""
    if form == "vocab.json":
        (tmp_path / form).write_bytes((pretrained.folder / form).read_bytes())
    else:
        pretrained.tokenizer.save(str(tmp_path / form))
    ours = load_hf.load_tokenizer(tmp_path)
    assert ours.eot == pretrained.tokenizer.token_to_id("<|endoftext|>")
    lengths = ours.byte_lengths()
    rng = random.Random(0)
    english = data.python_reference()
    texts = [random_text(rng, length) for length in range(80)]
    texts += [english[start : start + 500] for start in range(50_000, 90_000, 1000)]
    for text in texts:
        ids = ours.encode(text)
        assert ids == encode_plain(pretrained.tokenizer, text)
        assert ours.decode(ids) == text
        assert sum(lengths[i] for i in ids) == len(text.encode())
        assert ours.decode([*ids, ours.eot]) == text
    assert max(lengths) > 2, "nothing was merged"
    assert lengths[ours.eot] == 0


def encode_plain(bpe: Tokenizer, text: str) -> list[int]:
    """Encode by the tokenizers library, where `<|endoftext|>` in a text is text."""
    bpe.encode_special_tokens = True
    ids = bpe.encode(text, add_special_tokens=False).ids
    bpe.encode_special_tokens = False
    return ids


# --- GPT-2: what is refused ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 100),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
    ],
)
def test_gpt2_refusals(field: str, value: object, pretrained: Pretrained, tmp_path: Path) -> None:
    """A model that differs from GPT-2 is not loaded as if it were one: the field and its value are named."""
    folder = copy_folder(pretrained, tmp_path / "gpt2", **{field: value})
    message = refused("generate.py", "--pretrained", folder)
    assert f"{field} = {value!r}" in message
    assert str(folder) in message


def test_gpt2_missing_files(pretrained: Pretrained, tmp_path: Path) -> None:
    """Each file that a folder needs is asked for by name."""
    assert "config.json" in refused("generate.py", "--pretrained", tmp_path / "nothing")
    assert str(tmp_path / "nothing") in refused("evaluate.py", "--pretrained", tmp_path / "nothing")
    for missing, name in (("model.safetensors", "*.safetensors"), ("vocab.json", "vocab.json"), ("config.json",) * 2):
        folder = copy_folder(pretrained, tmp_path / missing)
        (folder / missing).unlink()
        assert name in refused("generate.py", "--pretrained", folder)


def test_gpt2_weights_that_do_not_fit(pretrained: Pretrained, tmp_path: Path) -> None:
    """More layers than weights, another width, or a parameter that we do not know: refused, and not half loaded."""
    for n, settings in enumerate(({"n_layer": 4}, {"n_layer": 2}, {"n_positions": 32}, {"vocab_size": 301})):
        folder = copy_folder(pretrained, tmp_path / str(n), **settings)
        assert "do not fit its config.json" in refused("generate.py", "--pretrained", folder)


def test_gpt2_damaged_files(pretrained: Pretrained, tmp_path: Path) -> None:
    """A download that broke off, or the pointer that git leaves in place of a large file."""
    for n, contents in enumerate((b"version https://git-lfs.github.com/spec/v1\n", b"")):
        folder = copy_folder(pretrained, tmp_path / str(n))
        (folder / "model.safetensors").write_bytes(contents)
        assert "model.safetensors" in refused("generate.py", "--pretrained", folder)
    folder = copy_folder(pretrained, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused("generate.py", "--pretrained", folder)
    folder = copy_folder(pretrained, tmp_path / "config")
    (folder / "config.json").write_text('{"model_type": "gpt2"')
    assert "config.json" in refused("generate.py", "--pretrained", folder)


# --- sampling ---

# Six tokens in no order: the probabilities are 0.05, 0.4, 0.1, 0.3, 0.03, 0.12.
PROBS = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.03, 0.12]])


def kept(logits: torch.Tensor) -> list[list[int]]:
    """Which tokens of each row are not cut."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (0.01, [1]),  # one always stays
        (0.39, [1]),
        (0.41, [1, 3]),  # 0.4 is not enough; the token that crosses p stays
        (0.69, [1, 3]),
        (0.71, [1, 3, 5]),
        (0.83, [1, 2, 3, 5]),  # 0.4 + 0.3 + 0.12 = 0.82
        (0.93, [0, 1, 2, 3, 5]),
        (0.98, [0, 1, 2, 3, 4, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_top_p_by_hand(top_p: float, tokens: list[int]) -> None:
    """The fewest tokens whose probabilities reach p, each row on its own, at unchanged scores."""
    logits = PROBS.log() + 3.0
    assert kept(filter_logits(logits, top_p=top_p)) == [tokens]
    assert torch.equal(filter_logits(logits, top_p=top_p)[0, tokens], logits[0, tokens])
    # The second row is nearly certain of token 2 and keeps only that.
    two = torch.cat([logits, torch.tensor([[0.0, 0, 20, 0, 0, 0]])])
    if top_p < 1:
        assert kept(filter_logits(two, top_p=top_p)) == [tokens, [2]]


@pytest.mark.parametrize(
    ("top_k", "tokens"),
    [(1, [1]), (2, [1, 3]), (3, [1, 3, 5]), (5, [0, 1, 2, 3, 5]), (6, range(6)), (7, range(6)), (0, range(6))],
)
def test_top_k_by_hand(top_k: int, tokens: list[int]) -> None:
    """The k likeliest tokens of each row; 0 and more than V keep all."""
    logits = torch.cat([PROBS.log(), PROBS.log().flip(1) - 5])
    filtered = filter_logits(logits, top_k=top_k)
    assert kept(filtered) == [list(tokens), sorted(5 - i for i in tokens)]
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_temperature_by_hand() -> None:
    """p^(1 / temperature), normalised: 2 takes the square root, 0.5 the square; and it comes before top-p."""
    for temperature in (0.5, 1.0, 2.0):
        expected = PROBS ** (1 / temperature) / (PROBS ** (1 / temperature)).sum()
        torch.testing.assert_close(filter_logits(PROBS.log(), temperature).softmax(dim=-1), expected)
    # Squared, the first token has 0.16 of 0.2778, that is 0.576, and the second 0.324: 0.9 together.
    assert kept(filter_logits(PROBS.log(), top_p=0.85)) == [[1, 2, 3, 5]]
    assert kept(filter_logits(PROBS.log(), temperature=0.5, top_p=0.85)) == [[1, 3]]


def test_top_k_comes_before_top_p() -> None:
    """Among the two likeliest the first has 0.4 / 0.7 = 0.571, which reaches 0.5 alone; of all it has 0.4."""
    assert kept(filter_logits(PROBS.log(), top_k=2, top_p=0.5)) == [[1]]
    assert kept(filter_logits(PROBS.log(), top_k=0, top_p=0.5)) == [[1, 3]]


def test_greedy_is_argmax() -> None:
    """Temperature 0 leaves one token, the likeliest, the first of equals, whatever top-k and top-p say."""
    logits = torch.randn(50, 257)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.3}):
        assert kept(filter_logits(logits, temperature=0, **settings)) == [[i] for i in logits.argmax(dim=1).tolist()]
    assert len(kept(filter_logits(torch.zeros(1, 6), temperature=0))[0]) == 1
    gpt, idx = make_model(), torch.randint(257, (2, 5))
    one, two = (
        torch.stack(list(generate.generate(gpt, idx, 20, 0, generator=torch.Generator().manual_seed(seed))))
        for seed in (1, 2)
    )
    assert torch.equal(one, two)


def test_filter_logits_against_transformers() -> None:
    """Temperature, then top-k, then top-p: the same scores as the three warpers of transformers give."""
    rng = random.Random(0)
    for _ in range(200):
        temperature = rng.uniform(0.2, 3)
        top_k, top_p = rng.choice([1, 3, 20, 60, 100]), rng.uniform(0.01, 0.999)
        logits = torch.randn(4, 60, dtype=torch.float64) * rng.choice([0.5, 2, 8])
        theirs = TemperatureLogitsWarper(temperature)(None, logits)
        assert_same_scores(filter_logits(logits, temperature), theirs)
        assert_same_scores(filter_logits(logits, temperature, 0, top_p), TopPLogitsWarper(top_p)(None, theirs))
        theirs = TopKLogitsWarper(top_k)(None, theirs)
        assert_same_scores(filter_logits(logits, temperature, top_k), theirs)
        theirs = TopPLogitsWarper(top_p)(None, theirs)
        assert_same_scores(filter_logits(logits, temperature, top_k, top_p), theirs)


def assert_same_scores(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to rounding, and cut at the same places."""
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [1e-2, 1e-3, 1e-20])
def test_a_low_temperature_is_nearly_greedy(temperature: float) -> None:
    """The closer to 0, the surer of the likeliest token; never NaN."""
    probs = filter_logits(PROBS.log(), temperature).softmax(dim=-1)
    assert probs[0].tolist() == pytest.approx([0, 1, 0, 0, 0, 0])


class Script(torch.nn.Module):
    """A model that is sure of a given continuation: row b says texts[b][t] after t generated tokens."""

    def __init__(self, texts: list[list[int]], prompt: int, V: int = 10) -> None:
        super().__init__()
        self.texts, self.prompt, self.V = texts, prompt, V
        self.config = GPTConfig(block_size=100)

    def forward(self, idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Give (B, T, V) logits of which only the last position's mean something."""
        logits = torch.full((*idx.shape, self.V), -1e9)
        for b, text in enumerate(self.texts):
            logits[b, -1, text[idx.shape[1] - self.prompt]] = 0.0
        return logits, None


def test_ended_row_emits_padding() -> None:
    """After its end token a row repeats it, whatever the model says, and all rows ended is the end."""
    texts = [[1, 9, 3, 4, 5, 6], [1, 2, 3, 9, 5, 6], [9, 9, 1, 9, 9, 9]]
    prompt = torch.tensor([[7, 9], [8, 8], [9, 8]])  # an end token in the prompt ends nothing
    tokens = torch.stack(list(generate.generate(Script(texts, 2), prompt, 6, eot=9)), dim=1)
    assert tokens.tolist() == [[1, 9, 9, 9], [1, 2, 3, 9], [9, 9, 9, 9]]
    # Without an end token they go on to the last step.
    tokens = torch.stack(list(generate.generate(Script(texts, 2), prompt, 6)), dim=1)
    assert tokens.tolist() == texts
    assert len(list(generate.generate(Script(texts, 2), prompt, 2, eot=9))) == 2
    assert list(generate.generate(Script(texts, 2), prompt, 0, eot=9)) == []


def test_samples_follow_the_distribution() -> None:
    """4,000 draws of one token: each within four standard deviations of its probability, and decided by the seed."""
    gpt = make_model()
    idx = torch.randint(257, (1, 5)).expand(4000, 5)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return next(generate.generate(gpt, idx, 1, temperature=1.5, top_k=8, generator=generator))

    logits, _ = gpt(idx[:1])
    probs = (logits[0, -1] / 1.5).softmax(dim=-1)
    likeliest = probs.topk(8).indices
    expected = torch.zeros(257)
    expected[likeliest] = probs[likeliest] / probs[likeliest].sum()
    share = torch.bincount(draw(0), minlength=257) / 4000
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()
    assert expected[likeliest][1] > 0.01, "a distribution on one token would prove nothing"
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@torch.no_grad()
def test_generate_matches_the_full_forward() -> None:
    """Each greedy token is the argmax of one pass over everything before it, while that fits and after."""
    gpt = make_model()
    idx = torch.randint(257, (2, 3))
    for token in generate.generate(gpt, idx, 40, temperature=0):
        logits, _ = gpt(idx[:, -32:])
        assert token.tolist() == logits[:, -1].argmax(dim=-1).tolist()
        idx = torch.cat([idx, token[:, None]], dim=1)


def test_generation_crops_from_the_left() -> None:
    """Of a prompt that is too long, the model sees the end: what stands before it makes no difference."""
    gpt = make_model()
    idx = torch.randint(257, (2, 50))

    def continue_(prompt: torch.Tensor) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.stack(list(generate.generate(gpt, prompt, 10, generator=generator))).tolist()

    assert continue_(idx) == continue_(idx[:, -32:])
    assert continue_(idx) != continue_(idx[:, :32])


# --- training ---


def test_optimizer_decays_matrices_only() -> None:
    """Without a gradient a step shrinks matrices and embeddings by lr * weight_decay and leaves vectors alone."""
    gpt = make_model()
    optimizer = train.make_optimizer(gpt, train.Config(lr=0.01, weight_decay=0.5))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in gpt.parameters())  # each one, once
    before = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in gpt.named_parameters():
        factor = 1 - 0.01 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)
        is_matrix = name.endswith(("qkv.weight", "proj.weight", "fc.weight", "wte.weight", "wpe.weight"))
        assert is_matrix == (parameter.dim() == 2), name


def test_learning_rate_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: up in warmup_steps, half of the way down at half time, a tenth at the end; and training obeys it."""
    config = train.Config(lr=2.0, warmup_steps=10, steps=10_000)
    rates = [train.learning_rate(step, config) for step in range(10_000)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)], rel=1e-4)
    assert rates[2500] == pytest.approx(2.0 * (0.1 + 0.9 * (2 + math.sqrt(2)) / 4))
    assert rates[5000] == pytest.approx(2.0 * 0.55)
    assert rates[-1] == pytest.approx(0.2, rel=1e-4)
    assert max(rates) == pytest.approx(2.0, rel=1e-4)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
    # At a rate of zero nothing is learned.
    monkeypatch.setattr(train, "learning_rate", lambda step, config: 0.0)
    train.train(tiny_run(tmp_path))
    trained = torch.load(tmp_path / "latest.pt")
    torch.manual_seed(0)
    untrained = GPT(GPTConfig(**trained["model_config"])).state_dict()
    assert all(torch.equal(untrained[name], tensor) for name, tensor in trained["model"].items())


def test_no_warmup() -> None:
    """warmup_steps = 0 starts at the highest rate."""
    assert train.learning_rate(0, train.Config(lr=2.0, warmup_steps=0)) == 2.0


def test_bits_per_byte_by_hand() -> None:
    """A model that finds all tokens equally likely: ln 257 nats, perplexity 257, and the end token is no byte."""
    gpt = GPT(replace(SMALL, block_size=4))
    torch.nn.init.zeros_(gpt.wte.weight)  # the output layer as well: all scores are 0
    tokens = torch.tensor([1, 2, 256, 3, 4, 256, 5, 6, 7, 8, 9])  # 10 targets, 8 fill two windows
    scores = train.evaluate(gpt, tokens, tokenizer.ByteTokenizer())
    assert scores["val_loss"] == pytest.approx(math.log(257), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(257, rel=1e-4)
    # The targets 2 256 3 4 | 256 5 6 7 are 6 bytes: 8 surprises of log2(257) bits are spread over them.
    assert scores["bits_per_byte"] == pytest.approx(8 * math.log2(257) / 6, rel=1e-5)


def test_windows_cover_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token but the first is asked for once, after everything before it in its window; batches do not matter."""
    gpt = make_model(replace(SMALL, block_size=8))
    tokens = torch.randint(257, (8 * 13 + 5,))
    seen = []

    class Spy(torch.nn.Module):
        """Passes everything on and remembers what it was asked."""

        config, wte = gpt.config, gpt.wte

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """As GPT.forward."""
            assert not self.training
            assert not torch.is_grad_enabled()
            seen.append((x, y))
            return gpt(x, y)

    scores = train.evaluate(Spy(), tokens, tokenizer.ByteTokenizer(), batch_size=4)
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert x.shape == (13, 8)
    assert torch.equal(x.flatten(), tokens[:104])
    assert torch.equal(y.flatten(), tokens[1:105])
    # 13 windows in batches of 4, 4, 4 and 1: the last one must not count four times as much.
    losses = [gpt(window[None, :-1], window[None, 1:])[1].item() for window in tokens.unfold(0, 9, 8)]
    assert len(losses) == 13
    assert scores["val_loss"] == pytest.approx(sum(losses) / 13, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["val_loss"]))
    # One window exactly, which needs T + 1 tokens.
    train.evaluate(gpt, tokens[:9], tokenizer.ByteTokenizer())


def test_a_tiny_model_overfits_one_batch() -> None:
    """The optimizer, the loss and the model work together: one batch is learned by heart."""
    config = train.Config(lr=1e-2, weight_decay=0.0)
    gpt = GPT(replace(SMALL, block_size=16))
    optimizer = train.make_optimizer(gpt, config)
    x, y = data.get_batch(torch.randint(257, (500,)), 4, 16, torch.Generator().manual_seed(0))
    for _ in range(80):
        loss = train.batch_loss(gpt, x, y, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_bfloat16_is_for_the_products_only() -> None:
    """The loss is nearly that of float32, not equal to it, and the weights stay float32."""
    gpt = make_model()
    x, y = torch.randint(257, (2, 2, 16))
    losses = [train.batch_loss(gpt, x, y, train.Config(dtype=dtype)).item() for dtype in ("float32", "bfloat16")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}


def test_gradients_are_clipped_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step starts without a gradient, and none is longer than config.clip when the weights move."""
    norms, before = [], []

    def spy(gpt: GPT, x: torch.Tensor, y: torch.Tensor, config: train.Config) -> torch.Tensor:
        before.append(all(parameter.grad is None or not parameter.grad.any() for parameter in gpt.parameters()))
        assert gpt.training
        return real(gpt, x, y, config)

    class Optimizer(torch.optim.AdamW):
        """Notes the length of the gradient that it steps along."""

        def step(self, *args: object) -> None:
            """As AdamW.step."""
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            norms.append(math.sqrt(sum(parameter.grad.square().sum().item() for parameter in parameters)))
            super().step(*args)

    real = train.batch_loss
    monkeypatch.setattr(train, "batch_loss", spy)
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    train.train(tiny_run(tmp_path, clip=0.01))
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)
    assert before == [True] * 6


def test_training_learns(tmp_path: Path) -> None:
    """60 steps of a small model on the stories bring the held-out loss from ln 257 far down."""
    settings = {"steps": 60, "batch_size": 8, "block_size": 32, "n_embd": 32, "lr": 1e-2, "eval_every": 30}
    metrics = train.train(tiny_run(tmp_path, n_stories=100, eval_tokens=2000, **settings))
    assert metrics["val_loss"] < 3.2
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_training_is_deterministic(tmp_path: Path) -> None:
    """A seed decides everything but the time, whatever was drawn before and however often one evaluates."""

    def run(name: str, **settings: object) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        torch.rand(len(name))
        metrics = train.train(tiny_run(tmp_path / name, dropout=0.1, **settings))
        times = ("seconds", "tokens_per_second")
        weights = torch.load(tmp_path / name / "latest.pt")["model"]
        return weights, {key: value for key, value in metrics.items() if key not in times}

    weights, metrics = run("a")
    again, same = run("second")
    assert same == metrics
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    other, different = run("b", seed=1)
    assert different["val_loss"] != metrics["val_loss"]
    assert not torch.equal(other["wte.weight"], weights["wte.weight"])
    watched, _ = run("c", eval_every=1)
    assert all(torch.equal(watched[name], tensor) for name, tensor in weights.items())


# --- checkpoints ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a second leaves: context 16, trained on the stories."""
    out = tmp_path_factory.mktemp("run")
    train.train(tiny_run(out))
    return out / "best.pt"


def test_checkpoint_holds_the_model_and_its_config(checkpoint: Path, tmp_path: Path) -> None:
    """Loading gives back the model that was saved, and the file says how it was made."""
    gpt, _ = generate.load_checkpoint(checkpoint, torch.device("cpu"))
    saved = torch.load(checkpoint)
    assert all(torch.equal(gpt.state_dict()[name], tensor) for name, tensor in saved["model"].items())
    assert saved["config"]["n_stories"] == 40
    assert saved["config"].keys() == asdict(train.Config()).keys()
    _, held_out = data.load_tokens("stories", 40, tokenizer.ByteTokenizer(), 16)
    scores = train.evaluate(gpt, held_out[:200], tokenizer.ByteTokenizer())
    assert scores["val_loss"] == pytest.approx(saved["val_loss"], rel=1e-6)


def test_best_checkpoint_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best.pt stays at the lowest held-out loss while latest.pt goes on; metrics.json gives both."""
    losses = iter([5.0, 3.0, 4.0])
    names = ("val_loss", "perplexity", "bits_per_byte")
    monkeypatch.setattr(train, "evaluate", lambda *args: dict.fromkeys(names, next(losses)))
    metrics = train.train(tiny_run(tmp_path))
    best, latest = torch.load(tmp_path / "best.pt"), torch.load(tmp_path / "latest.pt")
    assert (best["step"], best["val_loss"]) == (3, 3.0)
    assert (latest["step"], latest["val_loss"]) == (6, 4.0)
    assert (metrics["val_loss"], metrics["val_loss_last"]) == (3.0, 4.0)


def test_checkpoint_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full half-way leaves the old file as it was."""
    gpt, path, config = make_model(), tmp_path / "best.pt", tiny_run(tmp_path)
    train.save_checkpoint(path, gpt, config, 1, 5.0)
    old = path.read_bytes()

    def fail(checkpoint: dict, file: Path) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        train.save_checkpoint(path, gpt, config, 2, 4.0)
    assert path.read_bytes() == old


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A real training run without end that writes a checkpoint after every step, begun before the test goes on."""
    flags = {"n_stories": 40, "steps": 100_000, "eval_every": 1, "eval_tokens": 100, "batch_size": 1, "block_size": 16}
    flags |= {"n_layer": 1, "n_embd": 128, "out": tmp_path}
    command = [sys.executable, str(PART / "train.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "latest.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process
        process.kill()


def test_killed_run_leaves_a_whole_checkpoint(running: subprocess.Popen, tmp_path: Path) -> None:
    """At whatever moment one looks, the file is whole: so it is whatever moment the power fails at."""
    steps, deadline = set(), time.monotonic() + 120
    while len(steps) < 8 and time.monotonic() < deadline:
        steps.add(torch.load(io.BytesIO((tmp_path / "latest.pt").read_bytes()))["step"])
    assert running.poll() is None
    running.kill()
    running.wait()
    assert len(steps) == 8, "the run stood still"
    for name in ("latest.pt", "best.pt"):
        gpt, _ = generate.load_checkpoint(tmp_path / name, torch.device("cpu"))
        assert gpt.config.n_embd == 128


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
def test_interrupted_run_says_what_it_leaves(running: subprocess.Popen, tmp_path: Path) -> None:
    """Ctrl-C: one line, no traceback, and both checkpoints can be loaded."""
    time.sleep(random.Random(1).uniform(0, 0.3))
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "interrupted: the checkpoints" in stderr
    assert "Traceback" not in stderr
    for name in ("latest.pt", "best.pt"):
        generate.load_checkpoint(tmp_path / name, torch.device("cpu"))


# --- the lessons: what they build by hand is right, and equal to the real thing ---


def test_lesson1_utf8() -> None:
    """The first and the last character of each length, and some others, in Python's own encoding."""
    lesson = load(2, "lesson1_bytes")
    codes = [0, 0x41, 0x7F, 0x80, 0xE9, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x1F600, 0x10FFFF]
    assert [lesson.utf8(code) for code in codes] == [list(chr(code).encode()) for code in codes]
    assert lesson.differing_characters(tokenizer.ByteTokenizer(), 997)[0] == 0


def test_lesson2_batches() -> None:
    """A loop of slices draws the windows that get_batch draws."""
    lesson = load(2, "lesson2_batches")
    tokens = torch.randint(257, (100,))
    x, y, starts = lesson.naive_batch(tokens.tolist(), 6, 9, torch.Generator().manual_seed(3))
    fast_x, fast_y = data.get_batch(tokens, 6, 9, torch.Generator().manual_seed(3))
    assert (fast_x.tolist(), fast_y.tolist()) == (x, y)
    assert [row[0] for row in x] == [tokens[start] for start in starts]
    assert lesson.show(torch.tensor([65, 32, 256, -100])) == ["   A", "   _", " <e>", "   -"]


def test_lesson3_loss() -> None:
    """Cross-entropy by hand is torch's, also for scores that overflow; a first loss is ln V plus what scores add."""
    lesson = load(2, "lesson3_loss")
    logits, targets = 300 * torch.randn(20, 7, dtype=torch.float64), torch.randint(7, (20,))
    targets[3:6] = -100
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100).item()
    assert lesson.cross_entropy(logits.tolist(), targets.tolist()) == pytest.approx(expected, rel=1e-12)
    assert lesson.cross_entropy([[0.0, math.log(3)]], [1]) == pytest.approx(math.log(4 / 3))
    loss, std, _ = lesson.first_loss(1000, 512, 0)
    assert loss == pytest.approx(math.log(1000) + std**2 / 2, abs=0.02)


def test_lesson4_training() -> None:
    """AdamW and clipping by hand are torch's to rounding, and only the matrix decays."""
    lesson = load(2, "lesson4_training")
    assert max(lesson.compare(lesson.Config(steps=5))) < 1e-12
    assert lesson.decay_alone() == pytest.approx((0.99**10, 1.0), rel=1e-5)
    assert lesson.clip_by_hand([3.0, 4.0], 1.0) == (pytest.approx([0.6, 0.8], rel=1e-5), 5.0)
    assert lesson.clip_by_hand([0.3, 0.4], 1.0)[0] == [0.3, 0.4]


def test_lesson5_sampling() -> None:
    """The plain loops choose as worked out by hand, and filter_logits as they do."""
    lesson = load(2, "lesson5_sampling")
    scores = PROBS[0].log().tolist()
    for settings, tokens in (((1, 2, 1), [1, 3]), ((1, 0, 0.71), [1, 3, 5]), ((1, 2, 0.5), [1]), ((0, 0, 1), [1])):
        probs = lesson.naive_filter(scores, *settings)
        total = sum(PROBS[0, tokens].tolist())
        expected = [PROBS[0, i].item() / total if i in tokens else 0.0 for i in range(6)]
        assert probs == pytest.approx(expected)
    assert lesson.naive_filter(scores, 0.5, 0, 1)[1] == pytest.approx(0.16 / 0.2778)
    assert lesson.largest_difference(3 * torch.randn(10, 257)) < 1e-6
    assert lesson.repeated("abcab", 2) == pytest.approx(1 / 4)  # ab bc ca ab


def test_lesson6_evaluation() -> None:
    """Counting by hand, two tokens as one, and the loss place by place, whose mean is what train.evaluate gives."""
    lesson = load(2, "lesson6_evaluation")
    tokens = torch.tensor([0, 1, 0, 1, 2, 0])
    assert lesson.unigram(tokens, 3).exp().tolist() == pytest.approx([3.01 / 6.03, 2.01 / 6.03, 1.01 / 6.03])
    assert lesson.bigram(tokens, 3)[1].exp().tolist() == pytest.approx([1.01 / 2.03, 0.01 / 2.03, 1.01 / 2.03])
    assert lesson.bigram(tokens, 3)[0].exp().tolist() == pytest.approx([0.01 / 2.03, 2.01 / 2.03, 0.01 / 2.03])
    merged = lesson.merge(tokens, 2, 3).tolist()
    assert len(merged) == 3
    assert merged[0] == merged[1] != merged[2]
    assert lesson.bits_per_byte(torch.tensor([math.log(2), math.log(8)]), 2) == pytest.approx(2)
    gpt, row = make_model(), torch.randint(257, (32 * 5 + 7,))
    nats, predicted = lesson.nats_by_place(gpt, row)
    assert nats.shape == (5, 32)
    assert predicted.tolist() == [0] + [1] * 160 + [0] * 6
    assert nats.mean().item() == pytest.approx(
        train.evaluate(gpt, row, tokenizer.ByteTokenizer())["val_loss"], rel=1e-5
    )
    stretches = lesson.by_doubling(torch.arange(1.0, 7.0))
    assert stretches == [(1, 1, 1.0), (2, 2, 2.0), (3, 4, 3.5), (5, 6, 5.5)]


# --- the scripts, as a user starts them ---


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        ("train.py", "--data", "nothing.txt"),
        ("generate.py", "--temperature", "-1.5"),
        ("evaluate.py", "--data", "no"),
    ],
)
def test_real_processes_refuse(script: str, flag: str, value: str, tmp_path: Path) -> None:
    """The same from outside, for each script: a status that a shell sees, and no traceback."""
    assert f"{flag} {value}" in check_refusal(run_script(f"{PART.name}/{script}", flag, value, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["train.py", "generate.py", "evaluate.py"])
def test_unknown_flag(script: str) -> None:
    """tyro says which flag, and exits with 2."""
    outcome = start(script, "--no-such-flag", "3")
    assert outcome.status == 2
    assert "--no-such-flag" in outcome.stderr
    assert start(script, "--device", 3, "stray").status == 2


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_bad_file(script: str, tmp_path: Path, checkpoint: Path) -> None:
    """A missing file, a folder, and an empty file: named, with what to give instead."""
    rest = ["--checkpoint", checkpoint] if script == "evaluate.py" else []
    for path, reason in (("nothing.txt", "no such file"), ("folder", "no such file"), ("empty.txt", "empty")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "empty.txt").touch()
        message = refused(script, "--data", tmp_path / path, "--out", tmp_path / "out", *rest)
        assert f"--data {tmp_path / path}" in message
        assert reason in message
        assert "give a" in message
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_short_text(tmp_path: Path, checkpoint: Path) -> None:
    """Both parts of a text must hold a window, and for evaluation the whole: the lengths are said."""
    file = tmp_path / "short.txt"
    file.write_text("x" * 170)  # 153 + 1 and 17 + 1 tokens
    start_training = ("train.py", "--data", file, "--out", tmp_path, "--block_size")
    message = refused(*start_training, 18)
    assert "held-out part has 18 tokens" in message
    assert "--block_size 18" in message
    assert "longer text or a smaller --block_size" in message
    assert "training part has 154 tokens" in refused(*start_training, 154)
    assert start(*start_training, 17, "--steps", 1, "--n_layer", 1, "--n_embd", 16).status == 0
    file.write_text("x" * 15)
    arguments = ("evaluate.py", "--checkpoint", checkpoint, "--out", tmp_path, "--data", file)
    message = refused(*arguments)
    assert "16 tokens" in message
    assert str(file) in message
    file.write_text("x" * 16)
    assert start(*arguments).status == 0


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("temperature", "-0.5", "-0.5 is not 0 or more; 0 takes the likeliest"),
        ("temperature", "nan", "nan"),
        ("top_p", "0", "0.0 is outside (0, 1]; 1 keeps all"),
        ("top_p", "1.5", "1.5 is outside (0, 1]; 1 keeps all"),
        ("top_p", "nan", "nan is outside (0, 1]"),
        ("top_k", "-1", "-1 is below 0; 0 keeps all"),
        ("max_new_tokens", "-1", "-1 is below 0; give 0 or more"),
    ],
)
def test_bad_sampling_settings(flag: str, value: str, shown: str, checkpoint: Path) -> None:
    """Refused at once, before a model is loaded or trained."""
    assert f"--{flag} {shown}" in refused("generate.py", "--checkpoint", checkpoint, f"--{flag}", value)
    assert f"--{flag} {shown}" in refused("generate.py", "--checkpoint", "nothing", f"--{flag}", value)


@pytest.mark.parametrize("script", ["generate.py", "evaluate.py"])
def test_bad_checkpoint(script: str, checkpoint: Path, tmp_path: Path) -> None:
    """Missing, no checkpoint at all, cut off, of a model with other settings, other parameters or other shapes."""
    rest = ["--data", PART / "model.py", "--out", tmp_path / "out"] if script == "evaluate.py" else []
    bad = tmp_path / "bad.pt"
    assert f"--checkpoint {bad}: no such file; train one" in refused(script, "--checkpoint", bad, *rest)
    whole = checkpoint.read_bytes()
    for contents in (b"", b"hello", whole[: len(whole) // 2]):
        bad.write_bytes(contents)
        assert f"{bad}: not a checkpoint" in refused(script, "--checkpoint", bad, *rest)
    for other in ({"weights": 1}, [1, 2]):
        torch.save(other, bad)
        assert f"{bad}: not a checkpoint" in refused(script, "--checkpoint", bad, *rest)

    saved = torch.load(checkpoint)
    settings, weights = saved["model_config"], saved["model"]
    fewer = {name: value for name, value in settings.items() if name != "dropout"}
    short = {name: tensor for name, tensor in weights.items() if name != "norm.bias"}
    narrow = weights | {"blocks.0.mlp.fc.bias": torch.zeros(32)}
    for changes, named in (
        ({"model_config": settings | {"n_kv_head": 2}}, "n_kv_head"),
        ({"model_config": fewer}, "dropout"),
        ({"model": weights | {"blocks.0.attn.gate": torch.zeros(1)}}, "blocks.0.attn.gate"),
        ({"model": short}, "norm.bias"),
        ({"model_config": settings | {"n_layer": 2}}, "blocks.1"),
        ({"model": narrow}, "blocks.0.mlp.fc.bias"),
    ):
        torch.save(saved | changes, bad)
        message = refused(script, "--checkpoint", bad, *rest)
        assert f"{bad}: a model of another architecture" in message
        assert named in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["train.py", "generate.py", "evaluate.py"])
def test_absent_device(script: str, checkpoint: Path, tmp_path: Path) -> None:
    """cuda on a machine without it: what there is instead is said. So is a device that no machine has."""
    rest = ["--out", tmp_path] if script == "train.py" else ["--checkpoint", checkpoint]
    for device in ("cuda", "cuda:1", "abacus"):
        message = refused(script, "--device", device, *rest)
        assert f"--device {device}: not on this machine" in message
        assert "cpu" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [("n_head", 3), ("eval_tokens", 10), ("eval_every", 0), ("block_size", 0), ("batch_size", 0)],
)
def test_bad_training_settings(flag: str, value: int, tmp_path: Path) -> None:
    """Settings with which no training is possible are named, with their value."""
    small = ("--out", tmp_path, "--steps", 1, "--n_layer", 1, "--n_embd", 16, "--block_size", 16, "--n_stories", 20)
    message = refused("train.py", *small, f"--{flag}", value)
    assert flag in message
    assert str(value) in message


def test_zero_steps(tmp_path: Path) -> None:
    """--steps 0 saves the model as it was made."""
    metrics = train.train(tiny_run(tmp_path, steps=0))
    assert metrics["val_loss"] == pytest.approx(math.log(257), abs=0.25)
    assert (tmp_path / "best.pt").exists()


# --- what the scripts promise ---


def test_a_prompt_that_is_too_long_is_cropped(checkpoint: Path) -> None:
    """It is shown whole, the rest is said on stderr, and what follows is what follows its last 16 bytes."""
    flags = ("generate.py", "--checkpoint", checkpoint, "--max_new_tokens", 5, "--prompt")
    end = "0123456789abcdef"
    long, short = start(*flags, "once upon a time " + end), start(*flags, end)
    assert long.status == short.status == 0
    assert long.stderr.splitlines() == [
        "the prompt has 33 tokens and the context 16: its first 17 are not seen by the model"
    ]
    assert short.stderr == ""
    assert long.stdout == "once upon a time " + short.stdout


def test_bytes_that_are_no_utf8_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    """A Latin-1 file trains and evaluates as the bytes that it is."""
    file = tmp_path / "latin1.txt"
    file.write_bytes("Fröhliche Bären tanzen über die Brücke. ".encode("latin-1") * 20 + b"\xff\x00\xfe")
    flags = ("--steps", 2, "--n_layer", 1, "--n_embd", 16, "--block_size", 16, "--out", tmp_path / "out")
    outcome = start("train.py", "--data", file, *flags)
    assert outcome.status == 0, outcome.stderr
    assert "723 training tokens, 82 held out" in outcome.stdout  # 803 bytes and two end tokens
    outcome = start("evaluate.py", "--data", file, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.stderr
    assert "804 tokens" in outcome.stdout


def test_any_terminal_will_do(checkpoint: Path) -> None:
    """A prompt of other bytes than UTF-8 is read, and what a terminal cannot show is replaced: no traceback."""
    command = [sys.executable, PART / "generate.py", "--checkpoint", checkpoint, "--max_new_tokens", "9", "--prompt"]
    variables = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    result = subprocess.run([*command, b"B\xe4r"], capture_output=True, timeout=120, check=False, env=variables)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith(b"B")


def test_temperature_zero_is_repeatable(checkpoint: Path) -> None:
    """Greedy: the same text from every seed, and three times the same; at temperature 1 each seed writes another."""
    flags = ("generate.py", "--checkpoint", checkpoint, "--max_new_tokens", 30, "--prompt", "One")

    def write(*more: object) -> str:
        outcome = start(*flags, *more)
        assert outcome.status == 0
        return outcome.stdout

    greedy = write("--temperature", 0)
    assert write("--temperature", 0, "--seed", 7) == greedy
    assert write("--temperature", 0, "--samples", 3) == "\n---\n".join([greedy] * 3)
    assert write("--temperature", 1) == write("--temperature", 1)
    assert write("--temperature", 1) != write("--temperature", 1, "--seed", 7)


def test_an_empty_prompt_begins_a_document(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is asked what follows the end of the text before."""
    prompts = []
    monkeypatch.setattr(generate, "generate", lambda gpt, idx, *args: prompts.append(idx.tolist()) or iter([]))
    for prompt in ("", "ab"):
        generate.main(generate.Config(checkpoint=checkpoint, prompt=prompt))
    assert prompts == [[[256]], [[97, 98]]]


@pytest.mark.parametrize("cut", [0, 1])
def test_streaming_decodes_multibyte_characters(cut: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters of two to four bytes appear whole and as soon as they are; what is cut off at the end is shown."""
    text = "aé中\U0001f600"
    ids = list(text.encode())
    terminal = Terminal()

    def fake(*args: object) -> Iterator[torch.Tensor]:
        shown = []
        for i in ids[: len(ids) - cut]:
            yield torch.tensor([i])
            shown.append(i)
            assert terminal.getvalue() == "p" + bytes(shown).decode(errors="ignore")

    monkeypatch.setattr(generate, "generate", fake)
    with redirect_stdout(terminal):
        generate.main(generate.Config(checkpoint=checkpoint, prompt="p"))
    assert terminal.getvalue() == "p" + bytes(ids[: len(ids) - cut]).decode(errors="replace") + "\n"


def test_evaluate_reads_all_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    """The scores are those of the whole file, and metrics.json has them."""
    outcome = start("evaluate.py", "--checkpoint", checkpoint, "--data", PART / "tokenizer.py", "--out", tmp_path)
    gpt, byte = generate.load_checkpoint(checkpoint, torch.device("cpu"))
    tokens = torch.tensor([*(PART / "tokenizer.py").read_bytes(), 256])
    scores = train.evaluate(gpt, tokens, byte)
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores
    for value in (f"{scores['val_loss']:.4f}", f"{scores['perplexity']:.2f}", f"{scores['bits_per_byte']:.4f}"):
        assert value in outcome.stdout


def test_evaluate_takes_a_gpt2(pretrained: Pretrained, tmp_path: Path) -> None:
    """Bits per byte of a model with other tokens: all of its surprise over all bytes that its windows ask for."""
    file = tmp_path / "text.txt"
    file.write_text(data.python_reference()[:2000])
    outcome = start("evaluate.py", "--pretrained", pretrained.folder, "--data", file, "--out", tmp_path)
    assert outcome.status == 0, outcome.stderr
    scores = json.loads((tmp_path / "metrics.json").read_text())
    ids = torch.tensor([*pretrained.tokenizer.encode(file.read_text()).ids, 0])
    windows = (len(ids) - 1) // 64
    targets = ids[1 : windows * 64 + 1]
    with torch.no_grad():
        logits = pretrained.gpt2(ids[: windows * 64].view(-1, 64)).logits.flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, targets).item()
    n_bytes = len(pretrained.tokenizer.decode(targets.tolist()).encode())
    assert scores["val_loss"] == pytest.approx(nats, rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(nats * len(targets) / math.log(2) / n_bytes, rel=1e-4)


def test_generate_takes_a_gpt2(pretrained: Pretrained) -> None:
    """The command of the README: a folder, a prompt, a text."""
    outcome = start("generate.py", "--pretrained", pretrained.folder, "--prompt", "The capital", "--max_new_tokens", 8)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.startswith("The capital")
