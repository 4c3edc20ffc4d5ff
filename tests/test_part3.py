"""Part 3: the architecture of the Llama family, and a cache that gives what the full pass gives.

The chain of proof: the full pass equals a computation by hand, in which a score depends on a distance and nothing is
shared with the model but its weights; every cache, however it is fed, equals the full pass; and the whole equals
transformers' Llama on random weights. The last section gives every script the wrong things that users give them.
"""

import io
import itertools
import json
import math
import random
import runpy
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from conftest import load, part, run_script

PART = part(3)
model, rope, generate, train, evaluate, data, tokenizer, load_hf = (
    load(3, name) for name in ("model", "rope", "generate", "train", "evaluate", "data", "tokenizer", "load_hf")
)
GPT, GPTConfig, UserError = model.GPT, model.GPTConfig, data.UserError
ablation, race = load(3, "ablation"), load(3, "race")
KVCache, RollingKVCache = load(3, "cache").KVCache, load(3, "cache").RollingKVCache

# The ways to attend: window and n_sink. 0: all before; 1: nobody but itself; 40: more than there are tokens.
MODES = [(0, 0), (1, 0), (5, 0), (5, 1), (3, 4), (40, 0)]


def small(**settings: object) -> GPTConfig:
    """A small shape, with some settings of its own; what follows from others is worked out anew."""
    return GPTConfig(**({"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32} | settings))


def make_model(seed: int = 0, **settings: object) -> GPT:
    """A model in which everything matters: no norm is the identity, and attention is far from uniform."""
    torch.manual_seed(seed)
    gpt = GPT(small(**settings)).eval()
    for name, parameter in gpt.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.15)
    return gpt


def tiny_run(out: Path, **settings: object) -> train.Config:
    """A whole training run of a fraction of a second: six steps, evaluated at 0, 3 and 6."""
    tiny = {"steps": 6, "batch_size": 2, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_stories": 40}
    tiny |= {"window": 8, "warmup_steps": 2, "eval_every": 3, "eval_tokens": 200, "device": "cpu"}
    return train.Config(out=out, **(tiny | settings))


def start(script: str, *args: object) -> subprocess.CompletedProcess:
    """Run `python script args` from its first line to its exit status, but inside this process: torch is loaded."""
    # Unlike io.StringIO, these encode what is written, as a terminal does.
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    argv = sys.argv
    sys.argv = [script, *map(str, args)]
    status = 0
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            runpy.run_path(str(PART / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    texts = (stream.buffer.getvalue().decode() for stream in (stdout, stderr))
    return subprocess.CompletedProcess(script, status, *texts)


def check_refusal(outcome: subprocess.CompletedProcess) -> str:
    """Status 2, and one line on stderr that begins with `error:`, which is returned."""
    assert outcome.returncode == 2, outcome.stderr[-2000:]
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def refused(script: str, *args: object) -> str:
    """Run a script that must refuse its arguments; returns what it says."""
    return check_refusal(start(script, *args))


# --- who sees whom ---


def test_visible_by_hand() -> None:
    """The table that one would draw on paper, for a window of 3 and 2 sinks."""
    positions = torch.arange(7)[None]
    table = [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",  # 0 and 1 are sinks, 1 2 3 the window
        "xxxxx..",
        "xx.xxx.",  # 2 is in neither
        "xx..xxx",
    ]
    expected = torch.tensor([[cell == "x" for cell in row] for row in table])
    see = model.visible(positions, positions, 3, 2)
    assert see.shape == (1, 1, 7, 7)
    assert torch.equal(see[0, 0], expected)
    assert torch.equal(model.visible(positions, positions, 0, 0)[0, 0], torch.ones(7, 7).tril().bool())
    # The rule is about positions: keys in another order are seen by the same queries, and so is one query alone.
    order = torch.tensor([3, 0, 6, 5, 1, 4, 2])
    shuffled = model.visible(positions, positions[:, order], 3, 2)
    assert torch.equal(shuffled[0, 0], expected[:, order])
    assert torch.equal(model.visible(positions[:, 5:6], positions, 3, 2)[0, 0], expected[5:6])


@pytest.mark.parametrize(("window", "n_sink"), MODES)
def test_padding_is_seen_by_nobody(window: int, n_sink: int) -> None:
    """No token sees a negative position; a padded place sees itself, so that its softmax is over something."""
    positions = torch.stack([torch.arange(8), torch.arange(8) - 3])  # the second row has 3 places of padding
    see = model.visible(positions, positions, window, n_sink)
    assert not see[1, 0, 3:, :3].any()
    assert see[1, 0].diagonal().all()
    assert torch.equal(see[1, 0, 3:, 3:], see[0, 0, :5, :5])
    assert not see[1, 0].triu(1).any()


@torch.no_grad()
@pytest.mark.parametrize(("window", "n_sink"), MODES)
def test_causality(window: int, n_sink: int) -> None:
    """A later token changes no earlier logit, to the last bit, and does change its own; so for the last one."""
    gpt = make_model(block_size=96, window=window, n_sink=n_sink, n_kv_head=2)
    idx = torch.randint(257, (3, 96))
    logits, _ = gpt(idx)
    for t in (1, 31, 64, 95):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 257
        other, _ = gpt(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert ((other[:, t] - logits[:, t]).abs().amax(dim=-1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize(("window", "n_sink"), MODES)
def test_training_mask_is_causal_and_banded(window: int, n_sink: int, n_layer: int) -> None:
    """Which token changes which logit in training, by trying all: one layer sees the band, L layers L bands.

    So a token that is farther away than n_layer * (window - 1) changes nothing, unless it is a sink.
    """
    T = 24
    gpt = make_model(n_layer=n_layer, window=window, n_sink=n_sink).double().train()
    idx = torch.randint(256, (1, T)).repeat(T + 1, 1)
    idx[range(T), range(T)] += 1  # row s differs from the last row in token s alone
    logits, loss = gpt(idx, idx)
    assert loss is not None
    changed = (logits[:T] - logits[T]).abs().amax(dim=-1) > 0  # (changed token s, position t)

    band = [[s <= t and (not window or t - s < window or s < n_sink) for s in range(T)] for t in range(T)]
    reach = torch.linalg.matrix_power(torch.tensor(band, dtype=torch.float64), n_layer) > 0  # (t, s)
    assert torch.equal(changed.T, reach)
    if window and not n_sink:
        distance = torch.arange(T)[:, None] - torch.arange(T)
        assert torch.equal(changed.T, (distance >= 0) & (distance <= n_layer * (window - 1)))


# --- the full pass equals a computation by hand ---


def seen_distance(window: int, n_sink: int, in_cache: bool = False) -> Callable[[int, int], float]:
    """How far away a query at position q sees the key at position k; NaN where it does not see it."""

    def distance(q: int, k: int) -> float:
        if k > q or (window and q - k >= window and k >= n_sink):
            return math.nan
        if in_cache and q - k >= window:  # a sink: the cache is n_sink + window long, and the query its last entry
            return min(q, n_sink + window - 1) - k
        return q - k

    return distance


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm as Zhang & Sennrich write it."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


@torch.no_grad()
def by_hand(gpt: GPT, ids: list[int], distance: Callable[[int, int], float]) -> torch.Tensor:
    """Logits (T, V) of one row in double precision, head by head, from the weights and a table of distances."""
    config = gpt.config
    w = {name: tensor.double() for name, tensor in gpt.state_dict().items()}
    D, G = config.head_dim, config.n_kv_head
    far = torch.tensor([[distance(q, k) for k in range(len(ids))] for q in range(len(ids))], dtype=torch.float64)
    # A pair of channels is a complex number, and a distance turns it.
    turn = torch.exp(1j * far.nan_to_num()[..., None] * gpt.frequency.double())  # (T, T, D/2)
    x = w["wte.weight"][ids]
    for layer in range(config.n_layer):
        at = f"blocks.{layer}."
        h = normed(x, w[at + "norm1.weight"], config.norm_eps)
        q, k, v = (h @ w[at + "attn.qkv.weight"].T).split([config.n_head * D, G * D, G * D], dim=-1)
        heads = []
        for head in range(config.n_head):
            group = head // (config.n_head // G)  # neighbouring query heads share a key/value head
            q_head, k_head, v_head = (
                matrix[:, i * D : (i + 1) * D] for matrix, i in ((q, head), (k, group), (v, group))
            )
            q_complex, k_complex = (torch.complex(*matrix.chunk(2, dim=-1)) for matrix in (q_head, k_head))
            scores = torch.einsum("qi,ki,qki->qk", q_complex, k_complex.conj(), turn).real / D**0.5
            heads.append(scores.masked_fill(far.isnan(), -torch.inf).softmax(dim=-1) @ v_head)
        x = x + torch.cat(heads, dim=-1) @ w[at + "attn.proj.weight"].T
        h = normed(x, w[at + "norm2.weight"], config.norm_eps)
        gate, up = (h @ w[at + "mlp.fc.weight"].T).split(config.mlp_hidden, dim=-1)
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[at + "mlp.proj.weight"].T
    return normed(x, w["norm.weight"], config.norm_eps) @ w["lm_head.weight"].T


SHAPES = [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "head_dim": 12}, {"tie_weights": False, "mlp_hidden": 40}]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "n_sink"), MODES)
def test_full_pass_by_hand(window: int, n_sink: int, shape: dict[str, object]) -> None:
    """RMSNorm, turned pairs, shared heads, the gate, the final norm: each as its paper writes it, head by head."""
    gpt = make_model(window=window, n_sink=n_sink, **shape)
    idx = torch.randint(257, (2, 30))
    expected = torch.stack([by_hand(gpt, row, seen_distance(window, n_sink)) for row in idx.tolist()])
    assert expected.std() > 0.5
    assert (gpt(idx)[0] - expected).abs().max() < 2e-5 * expected.abs().max()
    torch.testing.assert_close(gpt.double()(idx)[0], expected, atol=1e-6, rtol=0)


def test_rms_norm() -> None:
    """Equal to transformers' and to the formula, with its epsilon, and no LayerNorm: the mean stays."""
    ours, theirs = model.RMSNorm(24, 1e-3), LlamaRMSNorm(24, 1e-3)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    for scale in (0.01, 1.0, 100.0):  # at 0.01 the epsilon is ten times the mean square
        x = scale * (torch.randn(3, 5, 24) + 2)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours(x), normed(x, ours.weight, 1e-3))
    assert not torch.allclose(ours(x), F.layer_norm(x, (24,), ours.weight), atol=0.1)


# --- rotary positions ---


def test_rope_by_hand() -> None:
    """In two dimensions a quarter turn; in more, each pair (i, i + D/2) by its own angle, and no length changes."""
    quarter = rope.rope_angles(torch.tensor([[1]]), torch.tensor([math.pi / 2]))
    torch.testing.assert_close(rope.rope(torch.tensor([[[[3.0, 1.0]]]]), *quarter), torch.tensor([[[[-1.0, 3.0]]]]))

    frequency = rope.rope_frequencies(8, 100.0)
    assert frequency.tolist() == pytest.approx([1, 100**-0.25, 0.1, 100**-0.75])
    x = torch.randn(2, 3, 5, 8)
    turned = rope.rope(x, *rope.rope_angles(torch.arange(5)[None], frequency))
    for t, i in itertools.product(range(5), range(4)):
        angle = t * 100 ** (-2 * i / 8)
        a, b = x[:, :, t, i], x[:, :, t, i + 4]
        torch.testing.assert_close(turned[:, :, t, i], a * math.cos(angle) - b * math.sin(angle))
        torch.testing.assert_close(turned[:, :, t, i + 4], a * math.sin(angle) + b * math.cos(angle))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rope_is_relative_only() -> None:
    """q at m against k at n: the score is the one at m + 1000 and n + 1000, and another one at another distance."""
    frequency = rope.rope_frequencies(16).double()
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(m: int, n: int) -> float:
        turned = (rope.rope(x, *rope.rope_angles(torch.tensor([[at]]), frequency)) for x, at in ((q, m), (k, n)))
        return torch.mul(*turned).sum().item()

    for distance in (0, 1, 7, 30):
        assert score(distance, 0) == pytest.approx(score(distance + 1000, 1000), abs=1e-9)
        assert abs(score(distance, 0) - score(distance + 3, 0)) > 1e-3


ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", ROPES, ids=lambda scaling: scaling["rope_type"])
def test_rope_is_that_of_transformers(scaling: dict[str, float | str], base: float) -> None:
    """Frequencies of each rope_type, and the turned queries and keys, pair for pair."""
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": base, **scaling},
    )
    theirs = LlamaRotaryEmbedding(config)
    ours = rope.rope_frequencies(32, base, None if scaling["rope_type"] == "default" else scaling)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-5, atol=0)
    positions = torch.arange(0, 512, 7)[None]
    q, k = torch.randn(2, 1, 4, positions.shape[1], 32)
    expected = apply_rotary_pos_emb(q, k, *theirs(q, positions))
    for x, turned in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rope.rope(x, *rope.rope_angles(positions, ours)), turned, atol=2e-4, rtol=0)


def test_llama3_scaling_has_three_zones() -> None:
    """Fast pairs are left alone, slow ones slowed down by the factor, and the ramp between them uses both."""
    plain, scaled = rope.rope_frequencies(32), rope.rope_frequencies(32, scaling=ROPES[2])
    turns = 64 * plain / (2 * math.pi)  # in the trained context
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    ramp = (turns > 1) & (turns < 4)
    assert ramp.any()
    assert ((scaled[ramp] < plain[ramp]) & (scaled[ramp] > plain[ramp] / 8)).all()
    with pytest.raises(ValueError, match="'yarn' is not implemented"):
        rope.rope_frequencies(32, scaling={"rope_type": "yarn", "factor": 2.0})


# --- the rest of the model ---


def test_initialisation() -> None:
    """0.02 sqrt(768 / C) for matrices and embeddings, less by depth for what adds to the residual stream."""
    gpt = GPT(GPTConfig(n_layer=8, n_embd=192, tie_weights=False))  # 0.02 at C = 768, so 0.04 at 192
    for name, parameter in gpt.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.04 / 4 if name.endswith("proj.weight") else 0.04  # 2 x 8 projections, sqrt(16) = 4
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < std / 20, name
    assert not [name for name, _ in gpt.named_parameters() if "bias" in name]


def test_loss_starts_at_ln_v() -> None:
    """A fresh model knows nothing: ln V, and half the variance 768 * 0.02^2 of its scores."""
    gpt = GPT(small(n_layer=4, n_embd=64))
    idx = torch.randint(257, (8, 33))
    _, loss = gpt(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(257) + 768 * 0.02**2 / 2, abs=0.08)


def test_tied_and_untied() -> None:
    """Tied by default: one matrix, counted once, that stays one when weights are loaded; untied there are two."""
    tied, untied = GPT(small()), GPT(small(tie_weights=False))
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert not torch.equal(untied.lm_head.weight, untied.wte.weight)
    assert untied.num_parameters() - tied.num_parameters() == 257 * 32
    C, F_, G, D = 32, 88, 4, 8  # 8/3 of 32 is 85.3: 88
    block = C * (4 + 2 * G) * D + 4 * D * C + C * 2 * F_ + F_ * C + 2 * C
    assert tied.num_parameters() == 257 * C + 2 * block + C
    for gpt in (tied, untied):
        _, loss = gpt(torch.tensor([[5, 6]]), torch.tensor([[7, 8]]))
        loss.backward()
    assert tied.wte.weight.grad[200].any(), "a token that was no input is moved as an output"
    assert not untied.wte.weight.grad[200].any()
    restored = GPT(small())
    restored.load_state_dict(tied.state_dict())
    assert restored.lm_head.weight is restored.wte.weight


def test_as_many_parameters_as_part_2() -> None:
    """Within 3% at the benchmark's shape: what part 3 gains there, it does not gain by size."""
    shape = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
    with torch.device("meta"):
        old = load(2, "model").GPT(load(2, "model").GPTConfig(vocab_size=257, **shape))
        new = GPT(GPTConfig(vocab_size=257, **shape))
    assert new.num_parameters() == pytest.approx(old.num_parameters(), rel=0.03)


def test_loss_is_the_mean_over_what_is_asked_for() -> None:
    """-ln p(target), averaged over the targets that are not -100; the others teach nothing."""
    gpt = make_model(window=5)
    x, y = torch.randint(257, (2, 2, 8))
    masked = y.clone()
    masked[0, :5] = masked[1, 3:] = -100
    logits, loss = gpt(x, masked)
    logits.retain_grad()
    loss.backward()
    kept = masked != -100
    by_hand_loss = -logits.log_softmax(dim=-1)[kept].gather(-1, y[kept][:, None]).mean()
    assert loss.item() == pytest.approx(by_hand_loss.item(), rel=1e-5)
    assert logits.grad[~kept].abs().max() == 0
    assert (logits.grad[kept].abs().amax(dim=-1) > 0).all()
    assert gpt(x)[1] is None


@pytest.mark.parametrize("place", ["dropout", "attn.dropout", "attn.proj_dropout", "mlp.dropout"])
def test_dropout_is_for_training_only(place: str) -> None:
    """Each of the four places alone makes two passes differ in training; none does in evaluation."""
    gpt = make_model(dropout=0.2, window=5)
    places = {"dropout": [gpt.dropout]}
    for name in ("attn.proj_dropout", "mlp.dropout"):
        places[name] = [block.get_submodule(name) for block in gpt.blocks]
    assert {module.p for modules in places.values() for module in modules} == {0.2}
    assert {block.attn.dropout for block in gpt.blocks} == {0.2}
    for name, modules in places.items():
        for module in modules:
            module.p = 0.2 * (name == place)
    for block in gpt.blocks:
        block.attn.dropout = 0.2 * (place == "attn.dropout")
    idx = torch.randint(257, (2, 16))
    assert torch.equal(gpt(idx)[0], gpt(idx)[0])
    gpt.train()
    assert not torch.allclose(gpt(idx)[0], gpt(idx)[0])
    plain = make_model().train()
    assert torch.equal(plain(idx)[0], plain(idx)[0])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_kv_head": 3}, "n_kv_head = 3"),
        ({"n_kv_head": 8}, "n_kv_head = 8"),
        ({"n_kv_head": -2}, "n_kv_head = -2"),
        ({"n_head": 5}, "n_head = 5"),
        ({"n_head": 32}, "head_dim = 1"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"n_sink": 2}, "n_sink = 2"),
        ({"window": 4, "n_sink": -1}, "n_sink = -1"),
        ({"window": -4}, "window = -4"),
    ],
    ids=str,
)
def test_impossible_shapes(settings: dict[str, int], named: str) -> None:
    """Refused when the config is made, by name and value."""
    with pytest.raises(ValueError, match=named):
        small(**settings)


# --- cached equals uncached ---

CHUNKS = [[1], [2], [7], [26], [17, 1], [3, 11, 1, 5]]
"""How many tokens are given at a time, over and over."""
WINDOWS = [(0, 0), *itertools.product((1, 2, 3, 5, 8, 13, 40), (0, 1, 4))]


def give(gpt: GPT, idx: torch.Tensor, cache: KVCache, sizes: list[int]) -> torch.Tensor:
    """Logits (B, T, V) of a sequence that is given to a cache in pieces."""
    pieces, start_ = [], 0
    for size in itertools.cycle(sizes):
        if start_ >= idx.shape[1]:
            return torch.cat(pieces, dim=1)
        pieces.append(gpt(idx[:, start_ : start_ + size], cache=cache)[0])
        start_ += size


@torch.no_grad()
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize(("window", "n_sink"), WINDOWS)
def test_cached_equals_uncached(window: int, n_sink: int, n_kv_head: int) -> None:
    """Any chunks, one row or several, of equal or unequal length, in a plain and in a rolling cache: to 1e-5.

    The reference is a full pass over each row alone. A rolling cache of 1 + 0 slots wraps 25 times in it.
    """
    gpt = make_model(window=window, n_sink=n_sink, n_kv_head=n_kv_head)
    rows = [torch.randint(257, (length,)).tolist() for length in (26, 25, 14, 3)]
    full = [gpt(torch.tensor([row]))[0][0] for row in rows]
    assert full[0].std() > 0.5, "scores that are all alike would prove nothing"
    for sizes, n_rows, rolling in itertools.product(CHUNKS, (1, 4), {False, window > 0}):
        idx, n_pad = generate.pad_left(rows[:n_rows], 99)
        cache = gpt.make_cache(n_rows, 26, n_pad if n_rows > 1 else None, rolling)
        assert isinstance(cache, RollingKVCache) == rolling
        logits = give(gpt, idx, cache, sizes)
        for row, pad in enumerate(n_pad.tolist()):
            difference = (logits[row, pad:] - full[row]).abs().max()
            assert difference < 1e-5, f"chunks {sizes}, row {row} of {n_rows}, rolling {rolling}"


@torch.no_grad()
@pytest.mark.parametrize(("window", "n_sink"), [(1, 0), (4, 1), (7, 3)])
def test_rolling_cache_wrapped_many_times(window: int, n_sink: int) -> None:
    """600 tokens, far past block_size, through a few slots: as the full pass, and the memory stays where it is."""
    gpt = make_model(window=window, n_sink=n_sink, n_kv_head=2)
    idx = torch.randint(257, (2, 600))
    full, _ = gpt(idx)
    for sizes in ([1], [5], [64, 1, 1]):
        cache = gpt.make_cache(2, 0, rolling=True)
        slots = (cache.k.data_ptr(), cache.v.data_ptr(), cache.held.data_ptr())
        assert cache.k.shape == cache.v.shape == (2, 2, 2, window + n_sink, 8)  # layers, B, n_kv_head, S, D
        assert (give(gpt, idx, cache, sizes) - full).abs().max() < 1e-5
        assert (cache.k.data_ptr(), cache.v.data_ptr(), cache.held.data_ptr()) == slots
        assert cache.k.shape[3] == window + n_sink
        assert cache.length == 600


def test_slots_of_a_rolling_cache() -> None:
    """Sinks stay, and each later token takes the place of the one a window before it."""
    shape = (1, 2, 1, 6, 4)  # S = 2 sinks + a window of 4
    cache = RollingKVCache(shape, torch.zeros(()), n_sink=2, n_pad=torch.tensor([0, 3]))
    empty = torch.iinfo(torch.long).max
    expected = {
        1: [[0, empty, empty, empty, empty, empty], [empty, empty, empty, empty, empty, -3]],
        5: [[0, 1, 2, 3, 4, empty], [0, 1, -2, -1, empty, -3]],  # -3 in slot 2 + (-3 - 2) mod 4
        11: [[0, 1, 10, 7, 8, 9], [0, 1, 6, 7, 4, 5]],
    }
    for t in range(11):
        # A key says at which place of the input it stood, so that it can be found again.
        keys, values = cache.update(0, *torch.full((2, 2, 1, 1, 4), float(t)))
        assert keys.shape == values.shape == (2, 1, 7, 4)  # the slots and the new token
        cache.advance(1)
        if t + 1 in expected:
            assert cache.held.tolist() == expected[t + 1]
            for row, pad in ((0, 0), (1, 3)):
                slots = [slot for slot, position in enumerate(expected[t + 1][row]) if position != empty]
                stood = [expected[t + 1][row][slot] + pad for slot in slots]
                assert cache.k[0, row, 0, slots, 0].tolist() == cache.v[0, row, 0, slots, 0].tolist() == stood


def test_memory_of_the_caches() -> None:
    """2 * n_layer * B * n_kv_head * S * D numbers, S being what was asked for, or the window and its sinks."""
    gpt = make_model(window=6, n_sink=2, n_kv_head=2)
    plain, rolling = gpt.make_cache(3, 100), gpt.make_cache(3, 100, rolling=True)
    for cache, slots in ((plain, 100), (rolling, 8)):
        assert cache.k.nbytes + cache.v.nbytes == 4 * 2 * 2 * 3 * 2 * slots * 8
    shared = make_model(n_kv_head=1).make_cache(3, 100)
    assert shared.k.nbytes == plain.k.nbytes / 2


@torch.no_grad()
def test_a_full_cache_says_so() -> None:
    """It neither forgets nor writes over anything: the pass is refused, and the cache is as it was."""
    gpt = make_model()
    cache = gpt.make_cache(1, 4)
    idx = torch.randint(257, (1, 5))
    gpt(idx[:, :3], cache=cache)
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4 slots"):
        gpt(idx[:, 3:], cache=cache)
    assert cache.length == 3
    assert (gpt(idx[:, 3:4], cache=cache)[0] - gpt(idx[:, :4])[0][:, -1:]).abs().max() < 1e-5


@torch.no_grad()
def test_too_long_a_sequence_needs_a_window() -> None:
    """block_size is the limit without a window, with or without a cache, and the way out is named."""
    gpt = make_model()
    message = "33 tokens is longer than block_size = 32.*--window"
    with pytest.raises(ValueError, match=message):
        gpt(torch.zeros(1, 33, dtype=torch.long))
    cache = gpt.make_cache(1, 50)
    gpt(torch.zeros(1, 32, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match=message):
        gpt(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="--window"):
        gpt.make_cache(1, 0, rolling=True)
    assert make_model(window=4)(torch.zeros(1, 33, dtype=torch.long))[0].shape == (1, 33, 257)


# --- positions in the cache ---


@torch.no_grad()
@pytest.mark.parametrize(("window", "n_sink"), [(1, 1), (4, 1), (3, 4), (4, 0), (40, 2)])
def test_positions_in_the_cache_by_hand(window: int, n_sink: int) -> None:
    """A sink is never farther away than the cache is long, at every step of rows of unequal length."""
    gpt = make_model(window=window, n_sink=n_sink, n_kv_head=2).double()
    rows = [torch.randint(257, (length,)).tolist() for length in (30, 23)]
    idx, n_pad = generate.pad_left(rows, 0)
    logits = give(gpt, idx, gpt.make_cache(2, 0, n_pad, rolling=True, in_cache=True), [1])
    for row, pad in enumerate(n_pad.tolist()):
        expected = by_hand(gpt, rows[row], seen_distance(window, n_sink, in_cache=True))
        assert (logits[row, pad:] - expected).abs().max() < 1e-9


@torch.no_grad()
def test_positions_in_the_cache_matter_once_it_is_full() -> None:
    """While window and sinks hold everything, nothing differs from absolute positions; afterwards everything does."""
    gpt = make_model(window=4, n_sink=2)
    idx = torch.randint(257, (1, 30))
    absolute, in_cache = (give(gpt, idx, gpt.make_cache(1, 0, None, True, flag), [1]) for flag in (False, True))
    difference = (absolute - in_cache).abs().amax(dim=-1)[0]
    assert (difference[:6] < 1e-5).all()
    assert (difference[6:] > 1e-4).all()


@torch.no_grad()
def test_positions_in_the_cache_need_single_tokens() -> None:
    """A prompt may be given at once as long as it fits; later each token has its own distance to the sinks."""
    gpt = make_model(window=4, n_sink=2)
    idx = torch.randint(257, (1, 12))
    one_by_one = give(gpt, idx, gpt.make_cache(1, 0, None, True, True), [1])
    cache = gpt.make_cache(1, 0, None, True, True)
    logits, _ = gpt(idx[:, :6], cache=cache)
    with pytest.raises(ValueError, match="one at a time"):
        gpt(idx[:, 6:8], cache=cache)
    logits = torch.cat([logits, give(gpt, idx[:, 6:], cache, [1])], dim=1)
    assert (logits - one_by_one).abs().max() < 1e-5


# --- generation ---


def collect(steps: Iterator[torch.Tensor]) -> list[list[int]]:
    """What was generated, a list for each row."""
    return torch.stack(list(steps), dim=1).tolist()


@torch.no_grad()
def naive(gpt: GPT, idx: torch.Tensor, n: int, *settings: float, seed: int = 0) -> list[list[int]]:
    """The same, in the plainest way: a full pass over everything for every token."""
    generator, T = torch.Generator().manual_seed(seed), idx.shape[1]
    for _ in range(n):
        logits, _ = gpt(idx)
        probs = generate.filter_logits(logits[:, -1], *settings).softmax(dim=-1)
        idx = torch.cat([idx, torch.multinomial(probs, 1, generator=generator)], dim=1)
    return idx[:, T:].tolist()


@pytest.mark.parametrize("settings", [(0.0,), (1.0,), (0.8, 20), (1.2, 0, 0.9)], ids=str)
@pytest.mark.parametrize(("window", "n_sink"), [(0, 0), (5, 0), (4, 2)])
def test_generate_equals_the_naive_loop(window: int, n_sink: int, settings: tuple[float, ...]) -> None:
    """Greedy and drawn, with every kind of cache, the prompt in chunks; with a window far beyond block_size."""
    gpt = make_model(window=window, n_sink=n_sink, n_kv_head=2)
    idx = torch.randint(257, (3, 9))
    n = 90 if window else 23
    expected = naive(gpt, idx, n, *settings)
    assert len({token for row in expected for token in row}) > 10, "one token repeated would prove little"
    for rolling, chunk in itertools.product({False, window > 0}, (1, 4, 512)):
        cache = gpt.make_cache(3, 9 + n, rolling=rolling)
        generator = torch.Generator().manual_seed(0)
        assert (
            collect(generate.generate(gpt, idx, n, *settings, generator=generator, cache=cache, chunk=chunk))
            == expected
        )
    generator = torch.Generator().manual_seed(0)
    assert collect(generate.generate(gpt, idx, n, *settings, generator=generator)) == expected  # its own cache


@pytest.mark.parametrize(("window", "n_sink", "rolling"), [(0, 0, False), (4, 2, False), (4, 2, True)])
def test_unequal_prompts_in_one_batch(window: int, n_sink: int, rolling: bool) -> None:
    """Each row is continued as if it were alone, whatever the padding is, and read in any chunks."""
    gpt = make_model(window=window, n_sink=n_sink)
    prompts = [torch.randint(257, (length,)).tolist() for length in (12, 1, 7)]
    alone = [collect(generate.generate(gpt, torch.tensor([prompt]), 20, 0.0))[0] for prompt in prompts]
    for pad, chunk in itertools.product((0, 256), (1, 5, 512)):
        idx, n_pad = generate.pad_left(prompts, pad)
        assert idx.shape == (3, 12)
        assert n_pad.tolist() == [0, 11, 5]
        cache = gpt.make_cache(3, 32, n_pad, rolling)
        assert collect(generate.generate(gpt, idx, 20, 0.0, cache=cache, chunk=chunk)) == alone


def test_ended_row_emits_padding_and_influences_nothing() -> None:
    """After its end token a row repeats it; the others are as if they were alone, and as if nobody had ended."""
    gpt = make_model()
    idx = torch.randint(257, (3, 5))

    def write(eot: int | None, rows: list[int], temperature: float) -> list[list[int]]:
        generator = torch.Generator().manual_seed(4)
        return collect(generate.generate(gpt, idx[rows], 25, temperature, eot=eot, generator=generator))

    for temperature in (0.0, 1.0):
        free = write(None, [0, 1, 2], temperature)
        # A token that one row writes and, until much later, no other: the row ends there.
        eot = next(token for token in free[0][2:8] if token not in free[1] + free[2])
        ended = free[0].index(eot)
        tokens = write(eot, [0, 1, 2], temperature)
        assert tokens[0] == free[0][: ended + 1] + [eot] * (24 - ended)
        assert tokens[1:] == free[1:]
        assert free[0] != tokens[0], "the model goes on by itself, so it was silenced"
    assert write(eot, [1], 0.0) == [write(None, [0, 1, 2], 0.0)[1]]


def test_generation_stops_when_all_rows_have_ended() -> None:
    """The last row's end token is the last that is yielded; one in the prompt ends nothing; none is asked for: none."""
    gpt = make_model()
    idx = torch.randint(257, (2, 5))
    free = collect(generate.generate(gpt, idx, 20, 0.0))
    for row in (0, 1):
        eot = free[row][6]
        first = free[row].index(eot)
        tokens = collect(generate.generate(gpt, idx[[row, row]], 20, 0.0, eot=eot))
        assert tokens == [free[row][: first + 1]] * 2
        prompt = torch.cat([torch.tensor([[eot]]), idx[[row]]], dim=1)
        after = collect(generate.generate(gpt, prompt, 10, 0.0))[0]
        if eot not in after:
            assert collect(generate.generate(gpt, prompt, 10, 0.0, eot=eot))[0] == after
    assert list(generate.generate(gpt, idx, 0)) == []
    assert len(list(generate.generate(gpt, idx, 3))) == 3


def test_each_token_is_computed_once() -> None:
    """The prompt in chunks, then one token at a time: what a cache is for."""
    gpt = make_model()
    lengths = []
    gpt.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    list(generate.generate(gpt, torch.zeros(1, 7, dtype=torch.long), 5, chunk=3))
    assert lengths == [3, 3, 1, 1, 1, 1, 1]  # the last token is drawn and not read


def test_set_window() -> None:
    """A trained model gets another window without another weight; what is not given stays."""
    gpt = make_model(window=6, n_sink=1)
    weights = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    idx = torch.randint(257, (1, 20))
    for given, (window, n_sink) in (((None, None), (6, 1)), ((4, None), (4, 1)), ((None, 3), (4, 3)), ((0, 0), (0, 0))):
        generate.set_window(gpt, *given)
        assert (gpt.config.window, gpt.config.n_sink) == (window, n_sink)
        assert torch.equal(gpt(idx)[0], make_model(window=window, n_sink=n_sink)(idx)[0])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in gpt.state_dict().items())
    with pytest.raises(UserError, match="--window 0 --n_sink 2"):
        generate.set_window(gpt, None, 2)


# --- Llama: a folder as one downloads it ---

TEXT = " ".join(data.python_reference()[:60_000].split("\n"))
# What tokenizers stumble over, and the oldest table of characters that Python has: newer ones are letters to one
# library and unknown to another.
AWKWARD = ["'s", "'LLAMA", " don't", " 20262026", "  ", "\n\n", "\t", "3٣", "é", "e\u0301", "\U0001f600", "中文", "Ġ"]
AWKWARD += ["<|end_of_text|>", "</s>", "<0x0A>", " added word"]
ASSIGNED = [chr(i) for i in range(0xD800) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
ASSIGNED.remove("\u2581")  # to Llama 2 it is a space


def random_text(rng: random.Random, length: int) -> str:
    """A text from all over Unicode, half of it awkward."""
    return "".join(rng.choice(AWKWARD if rng.random() < 0.5 else ASSIGNED) for _ in range(length))


def byte_level() -> Tokenizer:
    """A tokenizer of Llama 3's kind: byte-level BPE, a token that begins every text, and added tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    bpe.add_tokens([AddedToken(" added word", special=False), AddedToken("\xe9t\xe9", special=False)])
    begin = bpe.token_to_id("<|begin_of_text|>")
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    return bpe


def with_byte_fallback() -> Tokenizer:
    """A tokenizer of Llama 2's kind: characters and words in plain text, U+2581 for a space, and bytes for the rest."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=250, initial_alphabet=["Ġ", "é"], show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    bpe = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return bpe


def random_llama(**settings: object) -> LlamaForCausalLM:
    """Llama as transformers has it, small, with random values of a size at which every parameter matters.

    Embeddings are small, so that the epsilon of the norms shows in the result; the last norm makes up for it.
    """
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-4}
    shape |= {"bos_token_id": 290, "eos_token_id": 291}
    llama = LlamaForCausalLM(LlamaConfig(**(shape | settings))).eval()
    for name, parameter in llama.named_parameters():
        mean = 5.0 if name == "model.norm.weight" and llama.config.tie_word_embeddings else float("norm" in name)
        torch.nn.init.normal_(parameter, mean, std=0.02 if "embed" in name else 0.15)
    return llama


LLAMAS = {
    "Llama 2": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "Llama 3.1": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 500000.0, **ROPES[2]},
        "eos_token_id": [291, 290, 5],
    },
    "SmolLM2": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "stretched, wide heads": {
        "head_dim": 20,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 1000.0, **ROPES[1]},
    },
}
each_llama = pytest.mark.parametrize("name", LLAMAS)


@dataclass
class Pretrained:
    """A folder as one downloads it, and the references for what is in it."""

    folder: Path
    """config.json, model.safetensors, tokenizer.json."""
    llama: LlamaForCausalLM
    """The model that was saved there."""
    tokenizer: Tokenizer
    """The tokenizer that was saved there, of Llama 3's kind, with 294 tokens; the model has 300."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pretrained]:
    """Small random Llamas, saved by transformers, each with a tokenizer, saved by tokenizers; each is made once."""
    bpe = byte_level()
    made = {}

    def get(name: str) -> Pretrained:
        if name not in made:
            made[name] = Pretrained(tmp_path_factory.mktemp("llama"), random_llama(**LLAMAS[name]), bpe)
            made[name].llama.save_pretrained(made[name].folder)
            bpe.save(str(made[name].folder / "tokenizer.json"))
        return made[name]

    return get


@pytest.fixture
def pretrained(saved: Callable[[str], Pretrained]) -> Pretrained:
    """The one of Llama 3.1's kind: grouped heads, untied, llama3 scaling."""
    return saved("Llama 3.1")


def copy_folder(pretrained: Pretrained, folder: Path, **settings: object) -> Path:
    """Copy the folder, with some fields of config.json set anew, to be damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in pretrained.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_saved(pretrained: Pretrained, folder: Path) -> Path:
    """What this version of transformers writes: rope_parameters."""
    copy_folder(pretrained, folder)
    config = json.loads((folder / "config.json").read_text())
    assert "rope_theta" in config["rope_parameters"]
    assert "rope_scaling" not in config
    return folder


def as_released(pretrained: Pretrained, folder: Path) -> Path:
    """What Meta released: rope_theta and rope_scaling, bfloat16 or not, and angles among the weights."""
    copy_folder(pretrained, folder)
    config = json.loads((folder / "config.json").read_text())
    rope_ = config.pop("rope_parameters")
    config["rope_theta"] = rope_.pop("rope_theta")
    config["rope_scaling"] = None if rope_["rope_type"] == "default" else rope_
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(6)
    save_file(weights, folder / "model.safetensors")
    return folder


def as_first_released(pretrained: Pretrained, folder: Path) -> Path:
    """The oldest spelling: "type" for rope_type, and nothing that was added later, where it can be left."""
    as_released(pretrained, folder)
    config = json.loads((folder / "config.json").read_text())
    if config["rope_scaling"]:
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    if config["rope_theta"] == 10000.0:
        del config["rope_theta"], config["rope_scaling"]
    if config["num_key_value_heads"] == config["num_attention_heads"]:
        del config["num_key_value_heads"]
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    for later in ("attention_bias", "mlp_bias", "attention_dropout", "dtype"):
        config.pop(later, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_shards(pretrained: Pretrained, folder: Path) -> Path:
    """Several files with an index, as larger models are stored; and a file that the index does not name."""
    copy_folder(pretrained, folder)
    (folder / "model.safetensors").unlink()
    pretrained.llama.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()
    save_file({"tok_embeddings.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    return folder


def with_more(pretrained: Pretrained, folder: Path) -> Path:
    """The output layer written out although it is tied, and Meta's own file beside."""
    copy_folder(pretrained, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = pretrained.llama.lm_head.weight.detach().clone()
    save_file(weights, folder / "model.safetensors")
    save_file({"tok_embeddings.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    return folder


LAYOUTS = [as_saved, as_released, as_first_released, as_shards, with_more]


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@each_llama
def test_llama_parity(name: str, layout: Callable, saved: Callable[[str], Pretrained], tmp_path: Path) -> None:
    """Our logits are those of transformers, at full context, whatever the files look like."""
    pretrained = saved(name)
    gpt, bpe = load_hf.load_pretrained(layout(pretrained, tmp_path / "llama"))
    theirs = pretrained.llama.config
    assert gpt.config.block_size == 256
    assert (gpt.config.n_kv_head, gpt.config.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (gpt.lm_head.weight is gpt.wte.weight) == theirs.tie_word_embeddings
    assert (bpe.vocab_size, bpe.eot) == (300, 291)
    idx = torch.randint(300, (2, 256))
    ours, expected = gpt.eval()(idx)[0], pretrained.llama(idx).logits
    assert expected.std() > 0.1, "logits that are all alike would prove nothing"
    assert (ours - expected).abs().max() < 1e-4


@each_llama
def test_llama_greedy_tokens_match(name: str, saved: Callable[[str], Pretrained]) -> None:
    """200 tokens through our cache are those that transformers finds through its own."""
    pretrained = saved(name)
    gpt, _ = load_hf.load_pretrained(pretrained.folder)
    idx = torch.randint(300, (2, 8))
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 200}
    theirs = pretrained.llama.generate(idx, attention_mask=torch.ones_like(idx), **settings)[:, 8:]
    ours = collect(generate.generate(gpt, idx, 200, temperature=0))
    assert ours == theirs.tolist()
    assert len({token for row in ours for token in row}) > 20, "one token repeated would prove little"


@torch.no_grad()
def test_llama_in_half_precision(pretrained: Pretrained, tmp_path: Path) -> None:
    """Weights stored in bfloat16 are computed with in float32."""
    folder = copy_folder(pretrained, tmp_path / "llama", dtype="bfloat16")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    gpt, _ = load_hf.load_pretrained(folder)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    idx = torch.randint(300, (2, 64))
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(idx).logits
    assert (gpt.eval()(idx)[0] - theirs).abs().max() < 1e-4


# --- Llama: the tokenizer ---


@pytest.mark.parametrize("kind", [byte_level, with_byte_fallback])
def test_llama_tokenizer(kind: Callable[[], Tokenizer], tmp_path: Path) -> None:
    """The same ids as the tokenizers library, with the token that begins a text; and the bytes of a text come back.

    Llama 2's kind puts a space before the first word, and that comes back as well.
    """
    reference = kind()
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = load_hf.LlamaTokenizer(tmp_path / "tokenizer.json", 2, 600)
    begin = reference.encode("").ids
    assert len(begin) == 1
    space = " " if kind is with_byte_fallback else ""
    rng = random.Random(0)
    texts = [random_text(rng, 1 + length) for length in range(80)] + [TEXT[n : n + 500] for n in range(0, 60_000, 2000)]
    lengths = ours.byte_lengths()
    assert len(lengths) == 600
    for text in texts:
        ids = ours.encode(text)
        assert ids[:1] == begin
        assert not {reference.token_to_id("<|end_of_text|>"), reference.token_to_id("</s>")} & set(ids)
        if not any(special in text for special in ("<|end_of_text|>", "</s>")):
            assert ids == reference.encode(text).ids
        assert ours.decode(ids) == space + text
        assert ours.decode_bytes(ids) == (space + text).encode()
        assert sum(lengths[i] for i in ids) == len((space + text).encode())
    assert max(lengths) > 2, "nothing was merged"
    assert ours.decode([*begin, 599]) == ""  # a special token, and one without a name


def test_llama_tokenizer_reads_whole_texts(tmp_path: Path) -> None:
    """A tokenizer.json that is set to cut off and to fill up does neither here."""
    reference = byte_level()
    reference.enable_truncation(10)
    reference.enable_padding(length=64)
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = load_hf.LlamaTokenizer(tmp_path / "tokenizer.json", 2, 300)
    assert ours.decode(ours.encode(TEXT[:500])) == TEXT[:500]
    assert len(ours.encode("a")) == 2


def test_llama_tokenizer_takes_any_bytes(pretrained: Pretrained) -> None:
    """What is no UTF-8 in a file or on the command line becomes U+FFFD: the library takes whole characters."""
    _, bpe = load_hf.load_pretrained(pretrained.folder)
    assert bpe.decode(bpe.encode("B\udce4r")) == "B\ufffdr"


# --- Llama: what is refused ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "fp8"}),
        ("partial_rotary_factor", 0.5),
        ("num_hidden_layers", None),
        ("hidden_size", "48"),
        ("vocab_size", -1),
        ("num_key_value_heads", 0),
        ("rms_norm_eps", None),
        ("eos_token_id", None),
        ("eos_token_id", 300),
        ("eos_token_id", []),
    ],
)
def test_llama_refusals(field: str, value: object, pretrained: Pretrained, tmp_path: Path) -> None:
    """What we do not have is not loaded as if we had it: the field and its value are named, and the file."""
    folder = copy_folder(pretrained, tmp_path / "llama", **{field: value})
    message = refused("generate.py", "--pretrained", folder)
    assert f"{field} = {value!r}" in message
    assert str(folder) in message


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "longrope", "su"])
def test_llama_refuses_other_positions(field: str, rope_type: str, pretrained: Pretrained, tmp_path: Path) -> None:
    """Another rope_type, in either spelling, and one of ours that lacks its numbers."""
    folder = copy_folder(pretrained, tmp_path / "llama", rope_parameters=None)
    config = json.loads((folder / "config.json").read_text())
    for rope_, named in (
        ({"rope_type": rope_type, "factor": 2.0}, f"rope_type = {rope_type!r} is not implemented"),
        ({"type": rope_type, "factor": 2.0}, f"rope_type = {rope_type!r} is not implemented"),
        ({"rope_type": "linear"}, "factor = None"),
        ({**ROPES[2], "low_freq_factor": "one"}, "low_freq_factor = 'one'"),
        ({"rope_type": "linear", "factor": 0}, "factor = 0"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {field: rope_}))
        assert named in refused("generate.py", "--pretrained", folder)


def test_llama_scaling_without_its_trained_context(pretrained: Pretrained, tmp_path: Path) -> None:
    """As in transformers, llama3 scaling that does not say in which context it was trained means the whole one."""
    without = {name: value for name, value in ROPES[2].items() if name != "original_max_position_embeddings"}
    folder = copy_folder(pretrained, tmp_path / "llama", rope_parameters={"rope_theta": 5e5, **without})
    gpt, _ = load_hf.load_pretrained(folder)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(folder))
    torch.testing.assert_close(gpt.frequency, theirs.inv_freq, rtol=1e-5, atol=0)


def test_llama_missing_files(pretrained: Pretrained, tmp_path: Path) -> None:
    """Each file that a folder needs is asked for by name."""
    assert "config.json" in refused("generate.py", "--pretrained", tmp_path / "nothing")
    assert str(tmp_path / "nothing") in refused("evaluate.py", "--pretrained", tmp_path / "nothing")
    for missing, name in (("model.safetensors", "no *.safetensors"), ("tokenizer.json",) * 2, ("config.json",) * 2):
        folder = copy_folder(pretrained, tmp_path / missing)
        (folder / missing).unlink()
        assert name in refused("generate.py", "--pretrained", folder)
    folder = as_shards(pretrained, tmp_path / "shards")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused("generate.py", "--pretrained", folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "do not fit its config.json" in refused("generate.py", "--pretrained", folder)


def test_llama_damaged_files(pretrained: Pretrained, tmp_path: Path) -> None:
    """A download that broke off, an empty file, the pointer that git leaves in place of a large one, another thing."""
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    shards = as_shards(pretrained, tmp_path / "shards")
    for name in ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"):
        source = shards if "index" in name else pretrained.folder
        whole = (source / name).read_bytes()
        contents = [b"", pointer, whole[: len(whole) // 2], b"\xff\xfe\x00"]
        for content in contents + ([b"[1, 2]", b"3", b"null"] if name.endswith("json") else []):
            folder = tmp_path / "damaged"
            folder.mkdir(exist_ok=True)
            for file in source.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            (folder / name).write_bytes(content)
            message = refused("generate.py", "--pretrained", folder)
            assert str(folder / name) in message
            assert "again" in message
            for file in folder.iterdir():
                file.unlink()


def test_llama_damaged_index(pretrained: Pretrained, tmp_path: Path) -> None:
    """An index that is JSON, but does not say where the weights are."""
    folder = as_shards(pretrained, tmp_path / "shards")
    for index in ({}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "index.json: no weight_map" in refused("generate.py", "--pretrained", folder)


def test_llama_missing_keys(pretrained: Pretrained, tmp_path: Path) -> None:
    """Everything that config.json must say, and every weight that it promises, is asked for by name."""
    config = json.loads((pretrained.folder / "config.json").read_text())
    folder = copy_folder(pretrained, tmp_path / "llama")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "rms_norm_eps"):
        (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != name}))
        assert f"{name} = None" in refused("generate.py", "--pretrained", folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name, named in (
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "wte.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "blocks.1.self_attn.k_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", "blocks.2.mlp.up_proj.weight"),
        ("model.layers.0.input_layernorm.weight", "blocks.0.norm1.weight"),
    ):
        save_file({key: tensor for key, tensor in weights.items() if key != name}, folder / "model.safetensors")
        message = refused("generate.py", "--pretrained", folder)
        assert "do not fit its config.json" in message
        assert named in message


def test_llama_weights_that_do_not_fit(pretrained: Pretrained, saved: Callable, tmp_path: Path) -> None:
    """Other numbers of layers, heads and channels, or a parameter that we do not know: refused, and not half loaded."""
    wrong = ({"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"head_dim": 10})
    wrong += ({"intermediate_size": 81}, {"vocab_size": 301}, {"hidden_size": 44}, {"num_attention_heads": 8})
    for n, settings in enumerate(wrong):
        folder = copy_folder(pretrained, tmp_path / str(n), **settings)
        assert "do not fit its config.json" in refused("generate.py", "--pretrained", folder)
    for n, (settings, named) in enumerate(
        (
            ({"num_key_value_heads": 3}, "n_kv_head = 3"),
            ({"num_attention_heads": 5}, "n_head = 5"),
            ({"head_dim": 9}, "head_dim = 9"),
        )
    ):
        folder = copy_folder(pretrained, tmp_path / f"impossible{n}", **settings)
        assert named in refused("generate.py", "--pretrained", folder)
    # A bias that the config does not speak of, and the two halves of a joined matrix that do not go together.
    folder = copy_folder(pretrained, tmp_path / "odd")
    weights = load_file(folder / "model.safetensors")
    gate = "model.layers.0.mlp.gate_proj.weight"
    for extra, named in (
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, "q_proj.bias"),
        ({gate: torch.zeros(80, 40)}, "gate_proj"),
    ):
        save_file(weights | extra, folder / "model.safetensors")
        assert named in refused("generate.py", "--pretrained", folder)
    # Tied by its config, so that its own output layer would be lost without a word, had it another shape.
    tied = copy_folder(saved("SmolLM2"), tmp_path / "tied")
    weights = load_file(tied / "model.safetensors")
    save_file({key: weights[key] for key in weights if "embed" not in key}, tied / "model.safetensors")
    assert "wte.weight" in refused("generate.py", "--pretrained", tied)


# --- Llama: the scripts ---


def continued(pretrained: Pretrained, prompt: str, n: int) -> str:
    """What transformers writes after a prompt, greedily, up to its end token."""
    ids = pretrained.tokenizer.encode(prompt).ids
    idx = torch.tensor([ids])
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 291, "max_new_tokens": n}
    after = pretrained.llama.generate(idx, attention_mask=torch.ones_like(idx), **settings)[0, len(ids) :]
    return generate.printable(pretrained.tokenizer.decode(after.tolist()))


def test_generate_takes_a_llama(pretrained: Pretrained, tmp_path: Path) -> None:
    """The command of the README, as a real process: a folder, a prompt, and what transformers would write."""
    flags = ("--pretrained", pretrained.folder, "--prompt", "The capital", "--max_new_tokens", 12, "--temperature", 0)
    result = run_script(PART / "generate.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The capital" + continued(pretrained, "The capital", 12) + "\n"
    assert result.stderr == ""


def test_generate_goes_beyond_the_context_of_a_llama(pretrained: Pretrained) -> None:
    """280 tokens do not fit into 256: it stops there and says so, and with --window it goes on."""
    flags = ("generate.py", "--pretrained", pretrained.folder, "--prompt", "The", "--max_new_tokens", 280)
    gpt, bpe = load_hf.load_pretrained(pretrained.folder)
    ids = bpe.encode("The")
    for window, n_sink, n in ((0, 0, 256 - len(ids)), (32, 2, 280)):
        generate.set_window(gpt, window, n_sink)
        written = collect(generate.generate(gpt, torch.tensor([ids]), n, 0.0))[0]
        assert 291 not in written, "a text that ends by itself would prove nothing"
        outcome = start(*flags, "--temperature", 0, "--window", window, "--n_sink", n_sink)
        assert outcome.returncode == 0
        assert outcome.stdout == "The" + generate.printable(bpe.decode(written)) + "\n"
        stopped = f"stopping after {n} tokens, at the end of the context; --window goes on\n"
        assert outcome.stderr == ("" if window else stopped)


def test_an_empty_prompt_for_a_llama(pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model begins after the token that begins a text; one that has none begins after an end."""
    prompts = []
    monkeypatch.setattr(
        generate, "generate", lambda gpt, idx, *args, **kwargs: prompts.append(idx.tolist()) or iter([])
    )
    generate.main(generate.Config(pretrained=pretrained.folder))
    monkeypatch.setattr(load_hf.LlamaTokenizer, "encode", lambda self, text: [])
    generate.main(generate.Config(pretrained=pretrained.folder))
    assert prompts == [[[290]], [[291]]]


def test_evaluate_takes_a_llama(pretrained: Pretrained, tmp_path: Path) -> None:
    """Bits per byte of a model with other tokens: all of its surprise over all bytes that its windows ask for."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:2000])
    outcome = start("evaluate.py", "--pretrained", pretrained.folder, "--data", file, "--out", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    scores = json.loads((tmp_path / "metrics.json").read_text())
    ids = torch.tensor([*pretrained.tokenizer.encode(TEXT[:2000]).ids, 291])
    windows = (len(ids) - 1) // 256
    targets = ids[1 : windows * 256 + 1]
    with torch.no_grad():
        logits = pretrained.llama(ids[: windows * 256].view(-1, 256)).logits.flatten(0, 1)
    nats = F.cross_entropy(logits, targets).item()
    n_bytes = len(pretrained.tokenizer.decode(targets.tolist()).encode())
    assert scores["val_loss"] == pytest.approx(nats, rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(nats * len(targets) / math.log(2) / n_bytes, rel=1e-4)


# --- training ---


def test_training_learns(tmp_path: Path) -> None:
    """60 steps of a small model on the stories bring the held-out loss from ln 257 far down."""
    settings = {"steps": 60, "batch_size": 8, "block_size": 32, "n_embd": 32, "lr": 1e-2, "eval_every": 30}
    metrics = train.train(tiny_run(tmp_path, n_stories=100, eval_tokens=2000, n_kv_head=1, n_sink=2, **settings))
    assert metrics["val_loss"] < 3.2
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_settings_reach_the_model_and_its_checkpoint(tmp_path: Path) -> None:
    """What was asked for is trained, saved, and comes back with the same weights and the same logits."""
    settings = {"n_kv_head": 1, "window": 6, "n_sink": 2, "dropout": 0.1}
    train.train(tiny_run(tmp_path, **settings))
    gpt, _ = generate.load_checkpoint(tmp_path / "best.pt", torch.device("cpu"))
    loaded = asdict(gpt.config)
    assert {name: loaded[name] for name in settings} == settings
    assert (gpt.config.n_layer, gpt.config.n_head, gpt.config.n_embd, gpt.config.block_size) == (1, 2, 16, 16)
    _, held_out = data.load_tokens("stories", 40, tokenizer.ByteTokenizer(), 16)
    scores = train.evaluate(gpt, held_out[:200], tokenizer.ByteTokenizer())
    assert scores["val_loss"] == pytest.approx(torch.load(tmp_path / "best.pt")["val_loss"], rel=1e-6)


def test_training_without_a_window(tmp_path: Path) -> None:
    """The samples that training shows end where the context ends."""
    metrics = train.train(tiny_run(tmp_path, window=0))
    assert math.isfinite(metrics["val_loss"])
    gpt, byte = make_model(block_size=16), tokenizer.ByteTokenizer()
    assert len(train.write_sample(gpt, byte, 0, 300)) <= 16
    assert len(train.write_sample(make_model(block_size=16, window=4), byte, 0, 300).encode()) > 16


def test_bfloat16_is_for_the_products_only() -> None:
    """The loss is nearly that of float32, not equal to it, and the weights stay float32; with and without a mask."""
    x, y = torch.randint(257, (2, 2, 16))
    for settings in ({}, {"window": 5, "n_kv_head": 2}):
        gpt = make_model(**settings)
        losses = [train.batch_loss(gpt, x, y, train.Config(dtype=dtype)).item() for dtype in ("float32", "bfloat16")]
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}


# --- the ladder of ablation.py ---


@torch.no_grad()
@pytest.mark.parametrize("alone", [False, True])
def test_ladder(alone: bool) -> None:
    """From part 2's GPT to ours, one change at a time, at equal parameters; with --alone, each change on part 2's."""
    ladder = ablation.make_ladder(ablation.Config(block_size=64, n_layer=2, n_embd=64, window=16, alone=alone))
    first, last = ladder[0], ladder[-1]
    old = load(2, "model").GPT(load(2, "model").GPTConfig(257, 64, 2, 4, 64))
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model_ = ablation.AnyGPT(first.shape, first.switches)
    model_.load_state_dict(old.state_dict())
    idx = torch.randint(257, (2, 65))
    torch.testing.assert_close(model_(idx[:, :-1], idx[:, 1:]), old(idx[:, :-1], idx[:, 1:]))
    assert ablation.difference_to_gpt(last) < 1e-5
    assert (last.shape.n_kv_head, last.shape.window) == (2, 16)

    for rung in ladder[1:]:
        n = ablation.count(rung.shape, rung.switches)
        assert n == sum(parameter.numel() for parameter in ablation.AnyGPT(rung.shape, rung.switches).parameters())
        assert n == pytest.approx(old.num_parameters(), rel=0.01)
        both = [asdict(which.shape) | asdict(which.switches) for which in (rung.below, rung)]
        changed = {name for name in both[0] if both[0][name] != both[1][name]} - {"mlp_hidden"}
        assert len(changed) == (6 if rung.name == "all of them" else 1), rung.name
    below = [first] * 7 if alone else ladder[:-1]
    assert [rung.below for rung in ladder[1:]] == below


def test_race_is_fair() -> None:
    """A model learns the same whoever runs beside it, and that is what a loop of train.py's pieces teaches it."""
    tokens = torch.randint(257, (500,))
    settings = train.Config(steps=5, batch_size=2, block_size=16, warmup_steps=2)
    names = ("a", "b", "c")
    together = {name: make_model(seed=n % 2, block_size=16) for n, name in enumerate(names)}  # a and c are twins
    runs = race.race(together, tokens, settings, 3, tqdm(disable=True))
    assert runs["a"]["loss"] == runs["c"]["loss"] != runs["b"]["loss"]
    assert all(len(values) == 5 for run in runs.values() for values in run.values())

    gpt, generator = make_model(block_size=16), torch.Generator().manual_seed(3)
    optimizer = train.make_optimizer(gpt, settings)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = train.learning_rate(step, settings)
        loss = train.batch_loss(gpt, *data.get_batch(tokens, 2, 16, generator), settings)
        assert loss.item() == pytest.approx(runs["a"]["loss"][step], rel=1e-5)
        loss.backward()
        length = torch.cat([parameter.grad.flatten() for parameter in gpt.parameters()]).norm().item()
        assert length == pytest.approx(runs["a"]["gradient"][step], rel=1e-4)
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()


# --- the scripts, as a user starts them ---

SCRIPTS = sorted(file.name for file in PART.glob("*.py") if '\nif __name__ == "__main__":\n' in file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(script: str, tmp_path: Path) -> None:
    """Every script, from nothing: status 0, no warning, numbers, a figure, and nothing where it was started."""
    temporary, here = tmp_path / "temporary", tmp_path / "here"
    temporary.mkdir()
    here.mkdir()
    result = run_script(PART / script, "--smoke", cwd=here, env={"TMPDIR": str(temporary)})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "Warning" not in result.stderr
    assert result.stdout.strip()
    assert list(here.iterdir()) == []
    metrics = [json.loads(file.read_text()) for file in temporary.rglob("metrics.json")]
    for found in metrics:
        assert found
        assert all(type(value) in (int, float) and math.isfinite(value) for value in found.values()), found
    if script.startswith("lesson") or script in ("train.py", "ablation.py"):
        assert metrics, "no metrics.json"
        assert [file for file in temporary.rglob("*.png") if file.read_bytes().startswith(b"\x89PNG")], "no figure"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 16 and a window of 8, as train.py saves it; random, so that all it sees matters."""
    gpt = make_model(block_size=16, n_layer=1, n_head=2, n_embd=16, window=8)
    gpt.blocks[0].attn.qkv.weight.data.mul_(6)  # so that it matters where a token looks, down to the likeliest token
    path = tmp_path_factory.mktemp("run") / "best.pt"
    train.save_checkpoint(path, gpt, train.Config(), 0, 0.0)
    return path


def greedy_text(gpt: GPT, prompt: str, n: int) -> str:
    """What generate.py must print at temperature 0, from a full pass for every token."""
    byte = tokenizer.ByteTokenizer()
    ids = naive(gpt, torch.tensor([byte.encode(prompt)]), n, 0.0)[0]
    ids = ids[: ids.index(byte.eot)] if byte.eot in ids else ids
    return prompt + generate.printable(byte.decode(ids)) + "\n"


def test_a_prompt_beyond_the_context_needs_a_window(checkpoint: Path, tmp_path: Path) -> None:
    """Without a window it is refused, with both lengths and the flag that allows it; with one it is continued."""
    prompt = "once upon a time there was"
    flags = ("--checkpoint", checkpoint, "--prompt", prompt, "--max_new_tokens", 40, "--temperature", 0)
    message = check_refusal(run_script(PART / "generate.py", *flags, "--window", 0, cwd=tmp_path))
    assert "26 tokens and the context 16" in message
    assert "--window" in message
    gpt, _ = generate.load_checkpoint(checkpoint, torch.device("cpu"))
    for window, n_sink in ((None, None), (4, 0), (3, 2), (50, 0)):
        given = () if window is None else ("--window", window, "--n_sink", n_sink)
        generate.set_window(gpt, window, n_sink)
        outcome = start("generate.py", *flags, *given)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout == greedy_text(gpt, prompt, 40)
        assert outcome.stderr == ""


def test_generation_beyond_the_context(checkpoint: Path) -> None:
    """With a window a text goes on; without one it ends with the context, which is said."""
    flags = ("generate.py", "--checkpoint", checkpoint, "--prompt", "once", "--temperature", 0, "--max_new_tokens")
    gpt, _ = generate.load_checkpoint(checkpoint, torch.device("cpu"))
    outcome = start(*flags, 100)
    assert outcome.stdout == greedy_text(gpt, "once", 100)
    assert outcome.stderr == ""
    generate.set_window(gpt, 0, 0)
    outcome = start(*flags, 100, "--window", 0)
    assert outcome.stdout == greedy_text(gpt, "once", 12)
    assert outcome.stderr == "stopping after 12 tokens, at the end of the context; --window goes on\n"
    outcome = start(*flags, 12, "--window", 0)
    assert outcome.stdout == greedy_text(gpt, "once", 12)
    assert outcome.stderr == ""
    assert start(*flags, 0).stdout == "once\n"


def test_in_cache_flag(checkpoint: Path) -> None:
    """--in_cache writes what the distances in the cache lead to, by hand, for a prompt longer than the cache too."""
    gpt, byte = generate.load_checkpoint(checkpoint, torch.device("cpu"))
    generate.set_window(gpt, 5, 2)
    distance = seen_distance(5, 2, in_cache=True)
    flags = ("--window", 5, "--n_sink", 2, "--in_cache", "--temperature", 0, "--max_new_tokens", 25)
    for prompt in ("o", "once upon a time"):
        ids = byte.encode(prompt)
        for _ in range(25):
            ids.append(by_hand(gpt, ids, distance)[-1].argmax().item())
            if ids[-1] == byte.eot:
                break
        outcome = start("generate.py", "--checkpoint", checkpoint, "--prompt", prompt, *flags)
        assert outcome.stdout == prompt + generate.printable(byte.decode(ids[len(byte.encode(prompt)) :])) + "\n"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--window", "-1"), "--window -1"),
        (("--window", "8", "--n_sink", "-1"), "--n_sink -1"),
        (("--window", "0", "--n_sink", "2"), "--n_sink 2"),
        (("--window", "0", "--in_cache"), "--in_cache"),
        (("--max_new_tokens", "-1", "--prompt", "a"), "--max_new_tokens -1"),
        (("--temperature", "-1"), "--temperature -1"),
    ],
    ids=str,
)
def test_bad_generation_settings(flags: tuple[str, ...], named: str, checkpoint: Path) -> None:
    """What makes no sense is refused by the name of its flag, its value, and what to give instead."""
    message = refused("generate.py", "--checkpoint", checkpoint, *flags)
    assert named in message


def test_a_wide_window_costs_no_memory(checkpoint: Path) -> None:
    """A window that the text never fills needs no slots for what is never written."""
    flags = ("--window", 10**13, "--max_new_tokens", 5, "--temperature", 0, "--prompt", "a")
    outcome = start("generate.py", "--checkpoint", checkpoint, *flags)
    assert outcome.returncode == 0, outcome.stderr
    gpt, _ = generate.load_checkpoint(checkpoint, torch.device("cpu"))
    generate.set_window(gpt, 0, 0)
    assert outcome.stdout == greedy_text(gpt, "a", 5)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--n_kv_head", "3"), "--n_kv_head 3"),
        (("--n_kv_head", "-1"), "--n_kv_head -1"),
        (("--n_head", "3"), "--n_head 3"),
        (("--n_head", "16"), "--n_head 16"),
        (("--window", "-1"), "--window -1"),
        (("--n_sink", "-1"), "--n_sink -1"),
        (("--window", "0", "--n_sink", "2"), "--n_sink 2"),
        (("--block_size", "0"), "--block_size 0"),
    ],
    ids=str,
)
def test_bad_training_settings(flags: tuple[str, ...], named: str, tmp_path: Path) -> None:
    """Settings with which no training is possible are named, with their value, before anything is made."""
    tiny = ("--steps", 1, "--n_layer", 1, "--n_embd", 16, "--block_size", 16, "--n_stories", 20, "--eval_tokens", 100)
    message = refused("train.py", "--out", tmp_path / "out", *tiny, *flags)
    assert named in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["generate.py", "evaluate.py"])
def test_bad_checkpoint(script: str, checkpoint: Path, tmp_path: Path) -> None:
    """No checkpoint, half of one, part 2's, and ones whose settings or weights are not those of this model."""
    rest = ["--data", PART / "model.py", "--out", tmp_path / "out"] if script == "evaluate.py" else []
    bad = tmp_path / "bad.pt"
    assert f"--checkpoint {bad}: no such file; train one" in refused(script, "--checkpoint", bad, *rest)
    bad.write_bytes(checkpoint.read_bytes()[:1000])
    assert f"{bad}: not a checkpoint" in refused(script, "--checkpoint", bad, *rest)
    old_config = load(2, "model").GPTConfig(257, 16, 1, 2, 16)
    part_2 = {"model": load(2, "model").GPT(old_config).state_dict(), "model_config": asdict(old_config)}
    saved_ = torch.load(checkpoint)
    settings, weights = saved_["model_config"], saved_["model"]
    for changes, named in (
        (part_2, "window"),
        ({"model_config": settings | {"n_kv_head": 1}}, "blocks.0.attn.qkv.weight"),
        ({"model_config": settings | {"mlp_hidden": 8}}, "blocks.0.mlp"),
        ({"model_config": settings | {"moe_every": 2}}, "moe_every"),
        ({"model": weights | {"wpe.weight": torch.zeros(1)}}, "wpe.weight"),
    ):
        torch.save(saved_ | changes, bad)
        message = refused(script, "--checkpoint", bad, *rest)
        assert f"{bad}: a model of another architecture" in message
        assert named in message
