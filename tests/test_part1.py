"""Part 1: the transformer's classes against hand-made and foreign implementations, and what its lessons claim.

Tolerances: 1e-6 where a few float32 products are compared, 1e-10 where both sides run in float64, exact equality where
a number must not change at all.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import load

model = load(1, "model")
lesson1 = load(1, "lesson1_positions")
lesson2 = load(1, "lesson2_attention")
lesson3 = load(1, "lesson3_head")
lesson4 = load(1, "lesson4_heads")
lesson5 = load(1, "lesson5_feedforward")
lesson6 = load(1, "lesson6_residuals")
lesson7 = load(1, "lesson7_stack")


def randomise(module: nn.Module, std: float = 0.3) -> nn.Module:
    """The same module with no zero bias and no identity norm, to hide a mistake; in float64, in eval."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module.double().eval()


def small(**changes: float) -> "model.GPTConfig":
    """A config that makes tests quick."""
    return model.GPTConfig(**{"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, **changes})


def vectors(*shape: int) -> torch.Tensor:
    """Random float64 input."""
    return torch.randn(*shape, dtype=torch.float64)


# --- model.py: attention ---


@pytest.mark.parametrize("position", [0, 7, 15])
@torch.no_grad()
def test_causality(position):
    """A changed input moves its own and later outputs, and no earlier one by a single bit."""
    transformer = randomise(model.Transformer(small()))
    x = vectors(2, 16, 32)
    changed = x.clone()
    changed[:, position] = vectors(2, 32)  # not += 1: a constant over channels is what a norm takes away
    moved = (transformer(x) - transformer(changed)).abs().amax(dim=(0, 2))
    assert torch.equal(moved[:position], torch.zeros(position, dtype=torch.float64))
    assert (moved[position:] > 1e-8).all()


@torch.no_grad()
def test_attention_equals_loops():
    """CausalSelfAttention of one head against three nested loops over numbers, with random matrices."""
    x = np.random.default_rng(0).normal(size=(7, 6))
    w_q, w_k, w_v = np.random.default_rng(1).normal(size=(3, 6, 6))
    loops = lesson2.attention_in_loops(x, w_q, w_k, w_v)
    assert np.abs(lesson2.attention_in_model(x, w_q, w_k, w_v) - loops).max() < 1e-5
    assert np.abs(lesson2.attention_in_matrices(x, w_q, w_k, w_v)["out"] - loops).max() < 1e-12


@pytest.mark.parametrize("n_head", [1, 4, 8])
@torch.no_grad()
def test_attention_equals_torch(n_head):
    """CausalSelfAttention against nn.MultiheadAttention with the same weights."""
    ours = randomise(model.CausalSelfAttention(small(n_head=n_head)))
    theirs = lesson4.as_torch(ours).double().eval()
    x, future = vectors(2, 9, 32), torch.ones(9, 9).triu(diagonal=1).bool()
    expected = theirs(x, x, x, attn_mask=future, need_weights=False)[0]
    assert (ours(x) - expected).abs().max() < 1e-10


@torch.no_grad()
def test_scores_are_divided_by_sqrt_of_head_dimension():
    """Weights recovered from the output are softmax of q k / sqrt(D), with the D of a head and not C."""
    attention = randomise(model.CausalSelfAttention(small(n_head=2, n_embd=4)))  # D = 2
    # Values are one channel of each head that tells the two positions apart, and the projection lets all through.
    attention.proj.weight.copy_(torch.eye(4))
    attention.proj.bias.zero_()
    x = vectors(1, 2, 4)
    q, k, v = attention.qkv(x)[0].split(4, dim=-1)  # (T, C)
    for head in (slice(0, 2), slice(2, 4)):
        scores = [(q[1, head] @ k[s, head]).item() / math.sqrt(2) for s in (0, 1)]
        first = math.exp(scores[0]) / (math.exp(scores[0]) + math.exp(scores[1]))
        expected = first * v[0, head] + (1 - first) * v[1, head]
        assert (attention(x)[0, 1, head] - expected).abs().max() < 1e-10


def test_heads_must_divide_channels():
    """Ten channels cannot be split into four heads, and the message says so."""
    with pytest.raises(ValueError, match=r"n_embd = 10 is not a multiple of n_head = 4"):
        model.CausalSelfAttention(small(n_embd=10))


def test_dropout_off_in_eval():
    """In training two passes differ; in eval they are the same, and the same as with no dropout at all."""
    for make in (model.CausalSelfAttention, model.MLP, model.Transformer):
        wet = make(small(dropout=0.5))
        dry = make(small(dropout=0.0))
        dry.load_state_dict(wet.state_dict())
        x = torch.randn(2, 8, 32)
        assert not torch.equal(wet(x), wet(x))
        wet.eval()
        assert torch.equal(wet(x), dry.eval()(x))


@torch.no_grad()
def test_dropout_reaches_the_attention_weights():
    """In training attention drops weights as well as outputs: with the output's dropout off, passes still differ."""
    attention = model.CausalSelfAttention(small(dropout=0.5))
    attention.proj_dropout.eval()
    x = torch.randn(2, 8, 32)
    assert not torch.equal(attention(x), attention(x))


# --- model.py: MLP, block, stack ---


@torch.no_grad()
def test_mlp_uses_tanh_gelu():
    """The MLP against its formula one position at a time; the exact GELU is 1e-4 away and must not pass."""
    mlp, x = randomise(model.MLP(small())), vectors(2, 3, 32)
    assert (mlp(x) - lesson5.mlp_by_hand(mlp, x)).abs().max() < 1e-10
    exact = mlp.proj(F.gelu(mlp.fc(x)))
    assert (mlp(x) - exact).abs().max() > 1e-6


@torch.no_grad()
def test_block_adds_to_the_stream():
    """If both branches give zero, a pre-norm block is the identity: nothing else touches the stream."""
    block, x = randomise(model.Block(small())), 5 * vectors(2, 8, 32)
    for branch in (block.attn, block.mlp):
        branch.proj.weight.zero_()
        branch.proj.bias.zero_()
    assert torch.equal(block(x), x)


@torch.no_grad()
def test_block_normalises_what_its_branches_read():
    """Each branch sees a normalised copy: an input 1,000 times larger adds nearly the same to the stream."""
    block = model.Block(small()).double()
    x = vectors(2, 8, 32)
    attended = block.attn(block.norm1(x))
    expected = x + attended + block.mlp(block.norm2(x + attended))
    assert (block(x) - expected).abs().max() < 1e-10
    added = block(1e6 * x) - 1e6 * x
    # Attention's branch is then negligible beside the stream, so both branches read the direction of x alone.
    assert (added - (attended + block.mlp(block.norm2(x)))).abs().max() < 1e-3


@torch.no_grad()
def test_transformer_equals_plain_arithmetic():
    """The whole stack against lesson 7's functions on its state_dict, with every bias and norm switched on."""
    transformer = randomise(model.Transformer(small()))
    x = vectors(2, 11, 32)
    expected = lesson7.transformer(x, transformer.state_dict(), transformer.config)
    assert (transformer(x) - expected).abs().max() < 1e-10


@torch.no_grad()
def test_final_norm():
    """Outputs have mean 0 and variance 1 over channels at the start, however large the input is."""
    out = model.Transformer(small())(100 * torch.randn(2, 16, 32) + 7)
    assert out.mean(dim=-1).abs().max() < 1e-5
    assert (out.var(dim=-1, unbiased=False) - 1).abs().max() < 1e-3


@torch.no_grad()
def test_positions_are_added():
    """The same vector at every place comes out differently, and swapped inputs do not give swapped outputs."""
    out = model.Transformer(small())(torch.ones(1, 16, 32))[0]
    assert torch.pdist(out).min() > 1e-2


def test_longer_than_block_size_is_an_error():
    """block_size positions pass, one more is refused with both numbers in the message."""
    transformer = model.Transformer(small())
    assert transformer(torch.randn(1, 16, 32)).shape == (1, 16, 32)
    with pytest.raises(ValueError, match="17 positions is longer than block_size = 16"):
        transformer(torch.randn(1, 17, 32))


def test_initialisation():
    """GPT-2's values: 0.02 sqrt(768 / C), divided by sqrt(2L) where a branch ends, biases 0, norms the identity."""
    transformer = model.Transformer(small(n_layer=8, n_embd=192, block_size=256))  # 0.02 at C = 768, so 0.04 at 192
    ends = 0
    for name, parameter in transformer.named_parameters():
        if parameter.dim() == 1:
            is_scale = "norm" in name and name.endswith("weight")
            assert torch.equal(parameter, torch.full_like(parameter, float(is_scale))), name
            continue
        end = name.endswith("proj.weight")
        ends += end
        # At least 16,384 numbers: their standard deviation is known to half a percent.
        assert parameter.std().item() == pytest.approx(0.04 / 4 if end else 0.04, rel=0.03), name
        assert abs(parameter.mean().item()) < 1e-3
    assert ends == 2 * 8


def test_gradients_reach_every_parameter():
    """No layer is left out of the forward pass."""
    transformer = model.Transformer(small(block_size=8))
    (transformer(torch.randn(2, 8, 32)) ** 3).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in transformer.parameters())


# --- lesson 1 ---


def test_sinusoids_by_hand_and_shift():
    """The table equals its loop and a few numbers worked out here; a shift is one orthogonal matrix for all t."""
    table = lesson1.sinusoids(50, 8, torch.float64)
    assert table[0].tolist() == [0, 1] * 4
    # i = 1 of C = 8: w = 10000^(-2/8) = 1/10
    assert table[3, 2:4].tolist() == pytest.approx([math.sin(0.3), math.cos(0.3)], abs=1e-12)
    assert table.flatten().tolist() == pytest.approx([v for t in range(50) for v in lesson1.sinusoid(t, 8)], abs=1e-12)
    for k in (1, 13):
        shift = lesson1.shift_matrix(k, 8)
        assert (table[:-k] @ shift.T - table[k:]).abs().max() < 1e-12
        assert (shift @ shift.T - torch.eye(8)).abs().max() < 1e-12


@torch.no_grad()
def test_order_is_invisible_without_positions():
    """Causal attention over a shuffled past gives the last position the same output; positions change that."""
    rows = torch.tensor([[0, 1, 2, 3], [2, 0, 1, 3]])
    for kind, seen in (("none", False), ("learned", True), ("sinusoidal", True)):
        last = lesson1.Reader(kind, block_size=8)(rows)[:, -1]
        assert ((last[0] - last[1]).abs().max() > 1e-4) == seen, kind


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_neither_kind_reads_positions_it_was_not_trained_on(kind):
    """The lesson's claim, on a shorter table: all right inside, lost beyond."""
    trained = lesson1.train(kind, block_size=32, length=16, steps=250)
    accuracy = lesson1.accuracy_by_position(trained, 32)  # positions 3..31
    assert accuracy[:13].mean() > 0.95
    assert accuracy[14:].mean() < 0.4
    assert (trained.body.wpe.weight.requires_grad) == (kind == "learned")


# --- lessons 2 to 4 ---


def test_attention_numbers_worked_out():
    """The printed example: row "sleeps" of "the cat sleeps", from its scores 1, 4, 0."""
    steps = lesson2.attention_in_matrices(lesson2.X, lesson2.W_Q, lesson2.W_K, lesson2.W_V)
    exps = [math.exp(score / math.sqrt(2)) for score in (1, 4, 0)]
    assert steps["weights"][2].tolist() == pytest.approx([e / sum(exps) for e in exps], abs=1e-12)
    assert steps["out"][2, 0] == pytest.approx((0.75 * exps[0] + 2 * exps[1] + 1 * exps[2]) / sum(exps), abs=1e-12)
    assert steps["weights"][0].tolist() == [1, 0, 0]
    fused = lesson2.attention_in_torch(steps["q"], steps["k"], steps["v"])
    assert np.abs(fused - steps["out"]).max() < 1e-6


@torch.no_grad()
def test_head_equals_torch_and_does_not_leak():
    """One head against the fused call; and masking after the softmax is not the same thing."""
    head, x = lesson3.Head(32, 8), torch.randn(2, 16, 32)
    fused = F.scaled_dot_product_attention(head.q(x), head.k(x), head.v(x), is_causal=True)
    assert (head(x) - fused).abs().max() < 1e-6
    weights = head.weights(x)
    assert lesson3.leak(weights) == 0
    assert lesson3.leak(weights + 0.1) > 0
    assert (weights.sum(dim=-1) - 1).abs().max() < 1e-6
    assert lesson3.masked_after_softmax(head, x).sum(dim=-1)[:, 0].max() < 0.9


def test_scores_grow_with_the_head_dimension():
    """Standard deviation sqrt(D) raw and 1 scaled; raw attention stops learning, scaled does not."""
    raw = {D: lesson3.score_statistics(D, 500, 64, 1.0) for D in (16, 256)}
    scaled = {D: lesson3.score_statistics(D, 500, 64, D**-0.5) for D in (16, 256)}
    for D in (16, 256):
        assert raw[D]["score_std"] == pytest.approx(math.sqrt(D), rel=0.1)
        assert scaled[D]["score_std"] == pytest.approx(1, rel=0.1)
        assert scaled[D]["stuck"] == 0
    assert raw[256]["peak"] > 0.8 > 0.2 > scaled[256]["peak"]
    assert raw[256]["stuck"] > 0.3


@torch.no_grad()
def test_list_of_heads_equals_fused():
    """H separate heads, concatenated and projected, against the class with one matrix for all."""
    many = lesson4.ManyHeads(32, 4)
    x = torch.randn(2, 10, 32)
    assert (many(x) - lesson4.fuse(many, 32, 4)(x)).abs().max() < 1e-6


def test_puzzles_have_right_answers():
    """Each job's answers against a search through the row, and nothing is graded that cannot be known."""
    jobs = ["1 back", "3 back", "first", "next"]
    idx, answers = lesson4.make_batch(20, 24, jobs)
    for row, answer in zip(idx.tolist(), answers.tolist(), strict=True):
        period = next((p for p in range(1, 24) if row[p] == row[0]), 24)
        assert 6 <= period <= 12
        assert len(set(row)) == period
        for t in range(24):
            following = row[t + 1 - period] if t + 1 > period else -100
            if t + 1 < 24 and following != -100:
                assert following == row[t + 1]
            expected = [row[t - 1] if t >= 1 else -100, row[t - 3] if t >= 3 else -100, row[0], following]
            assert answer[t] == expected


@torch.no_grad()
def test_attention_maps_are_the_weights_of_the_model():
    """The maps rebuild the attention output of each block, so the picture shows what the model really does."""
    puzzler = lesson4.Puzzler(small(block_size=12), n_jobs=1)
    randomise(puzzler.body).float()
    idx, _ = lesson4.make_batch(3, 12, ["next"])
    maps = lesson4.attention_maps(puzzler, idx)  # (B, layers, H, T, T)
    x = puzzler.embed(idx) + puzzler.body.wpe.weight[:12]
    for layer, block in enumerate(puzzler.body.blocks):
        values = block.attn.qkv(block.norm1(x))[..., 64:].view(3, 12, 4, 8).transpose(1, 2)
        out = block.attn.proj((maps[:, layer] @ values).transpose(1, 2).reshape(3, 12, 32))
        assert (out - block.attn(block.norm1(x))).abs().max() < 1e-5
        x = block(x)


def test_head_scores_know_an_induction_head():
    """On "a b c a b" a head that looks where the letter came before, and one step on, scores 1; a 1-back head 0."""
    idx = torch.tensor([[0, 1, 2, 0, 1]])
    maps = torch.eye(5).repeat(1, 1, 2, 1, 1)  # (B, layers, H, T, T): everybody looks at himself
    maps[0, 0, 0, 3:] = torch.eye(5)[[1, 2]]  # head 0: the second a looks at the first b, the second b at c
    maps[0, 0, 1, 1:] = torch.eye(5)[[0, 1, 2, 3]]  # head 1: one back
    scores = lesson4.head_scores(maps, idx)
    assert scores["induction"][0].tolist() == [1, 0]
    assert scores["1 back"][0, 1].item() == 1
    assert scores["3 back"][0].tolist() == [0, 0]


# --- lessons 5 to 7 ---


def test_gelu_forms():
    """Both by hand against torch, and at most 5e-4 apart, as the README says."""
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    assert (lesson5.gelu_exact(x) - F.gelu(x)).abs().max() < 1e-12
    assert (lesson5.gelu_tanh(x) - F.gelu(x, approximate="tanh")).abs().max() < 1e-12
    assert 4e-4 < (lesson5.gelu_tanh(x) - lesson5.gelu_exact(x)).abs().max() < 5e-4


@torch.no_grad()
def test_two_linear_layers_are_one():
    """Without a bend between them; with it they are not."""
    mlp, x = model.MLP(small()), torch.randn(2, 8, 32)
    single = lesson5.collapse(mlp.fc, mlp.proj)
    assert (single(x) - mlp.proj(mlp.fc(x))).abs().max() < 1e-6
    assert (single(x) - mlp(x)).abs().max() > 1e-2


def test_a_wider_network_fits_better():
    """Linear, 1x and 8x of the toy regression, in the order the lesson claims."""
    linear, narrow, wide = (lesson5.regression_loss(width, 600, seed=0) for width in (0, 16, 128))
    assert wide < 0.5 * narrow
    assert narrow < linear < 1


@torch.no_grad()
def test_layer_norm_by_hand():
    """Against nn.LayerNorm, with a scale and a shift; and where epsilon matters."""
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm = norm.double()
    for size in (1e-3, 1, 1e3):
        x = size * vectors(2, 5, 6)
        assert (lesson6.layer_norm(x, norm.weight, norm.bias) - norm(x)).abs().max() < 1e-10


@torch.no_grad()
def test_four_kinds_of_block():
    """Each kind against its formula; pre-norm is the Block of model.py."""
    x = vectors(2, 8, 32)
    for kind in lesson6.KINDS:
        block = randomise(lesson6.AnyBlock(small(), kind))
        attn, mlp, norm1, norm2 = block.attn, block.mlp, block.norm1, block.norm2
        expected = x
        for layer, norm in ((attn, norm1), (mlp, norm2)):
            expected = {
                "plain": layer(expected),
                "residual": expected + layer(expected),
                "post-norm": norm(expected + layer(expected)),
                "pre-norm": expected + layer(norm(expected)),
            }[kind]
        assert (block(x) - expected).abs().max() < 1e-10
        if kind == "pre-norm":
            theirs = model.Block(small()).double()
            theirs.load_state_dict(block.state_dict())
            assert torch.equal(theirs(x), block(x))


def test_depth_kills_all_but_pre_norm():
    """What the README says of 24 blocks before training."""
    inside = {kind: lesson6.look_inside(kind, 24, seed=1) for kind in lesson6.KINDS}
    end = {kind: found["activation"][-1] for kind, found in inside.items()}
    start = {kind: found["gradient"][0] for kind, found in inside.items()}
    left = {kind: found["input"][-1] for kind, found in inside.items()}
    assert end["plain"] < 1e-6 < 1e4 < end["residual"]
    assert start["plain"] < 1e-6 < 1e5 < start["residual"]
    for kind in ("pre-norm", "post-norm"):
        assert 0.5 < end[kind] < 10
        assert 0.1 < start[kind] < 10
    assert left["pre-norm"] > 0.1
    assert max(abs(left[kind]) for kind in ("plain", "residual", "post-norm")) < 0.05
    assert all(found["gradient"][-1] == pytest.approx(1, rel=0.05) for found in inside.values())


def test_parameter_count():
    """The formula against counted parameters, and GPT-2 small's well-known 124,439,808."""
    for config in (small(), small(n_layer=1, n_embd=8, n_head=2), model.GPTConfig()):
        counted = sum(parameter.numel() for parameter in model.Transformer(config).parameters())
        assert lesson7.parameter_count(config) == counted
    body = lesson7.parameter_count(model.GPTConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768))
    assert body + 50257 * 768 == 124_439_808


def test_scaled_initialisation_keeps_the_stream():
    """With the factor the stream ends equally large at any depth, without it it grows with depth."""
    ends = {}
    for depth in (4, 16):
        transformer = model.Transformer(small(n_layer=depth, n_embd=64))
        for scaled in (True, False):
            stream = lesson7.stream_by_depth(transformer, scaled)
            assert len(stream) == depth + 1
            ends[depth, scaled] = stream[-1] / stream[0]
    assert ends[16, True] == pytest.approx(ends[4, True], rel=0.1)
    assert ends[16, False] > 1.5 * ends[4, False]


def test_maps_of_dependence():
    """Zero above the diagonal and nowhere else; the last input moves the last output only."""
    transformer = model.Transformer(small())
    map_ = lesson7.dependence(transformer, 10)
    assert torch.equal(map_ > 0, torch.ones(10, 10).tril().bool())
    effect = lesson7.last_token_effect(transformer, torch.randn(2, 10, 32))
    assert effect[:-1].max() == 0
    assert effect[-1] > 0.1
