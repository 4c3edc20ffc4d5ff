"""Part 7: preferences, a model that judges by them, and checks of what it has learned.

The chain of proof: a pair's ids equal those written by hand, and sampled ones are those that were drawn; every layout
gives what it says, through `datasets` too; what is cut, is cut from prompts, and no two answers become equal; labels
come as often as the judge's formula says, and the best guess reaches the ceiling and no more. A reward equals loops
over one row, with and without the causal mask, and padding changes nothing; the losses equal the published formulas. A
batch of pairs that is cut, or in which answers are read once, has the loss and the gradients of all its rows; a run
that is resumed, or shared by two processes, is the run of one; accuracy, calibration and the best of n are those of a
sum over all cases; and the checks tell a model that knows nothing from one that has learned.
"""

import copy
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from conftest import QUIET, ROOT, load, run_script

data, model, tokenizer, stories = (load(7, name) for name in ("data", "model", "tokenizer", "stories"))
instructions, rules, rope, generate = (load(7, name) for name in ("instructions", "rules", "rope", "generate"))
checkpoint, devices, optim, train = (load(7, name) for name in ("checkpoint", "devices", "optim", "train"))
preferences, reward, losses, pairs = (load(7, name) for name in ("preferences", "reward", "losses", "pairs"))
checks, check_reward = load(7, "checks"), load(7, "check_reward")
lesson1, lesson2 = load(7, "lesson1_preferences"), load(7, "lesson2_encoder")
lesson3 = load(7, "lesson3_losses")
Pair, UserError, Response, RewardModel = data.Pair, data.UserError, generate.Response, reward.RewardModel
GPT, GPTConfig, BPETokenizer = model.GPT, model.GPTConfig, tokenizer.BPETokenizer

CPU = torch.device("cpu")
FLOAT = torch.float32


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    """A small vocabulary learned from stories."""
    return BPETokenizer.train(stories.documents(200, 0, held_out=False), 400)


def small_model(bpe: BPETokenizer, **settings: object) -> GPT:
    """A model that has learned nothing."""
    torch.manual_seed(0)
    shape = {"vocab_size": bpe.vocab_size, "block_size": 80, "n_layer": 1, "n_head": 2, "n_embd": 16} | settings
    return GPT(GPTConfig(**shape))


def save(path: Path, some: torch.nn.Module, made_by: object, **config: object) -> Path:
    """A checkpoint as train.py leaves it."""
    optimizers = optim.make_optimizers(some, "adamw", 1e-3, 0.02, 0.1, (0.9, 0.99))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    saved = tokenizer.describe_tokenizer(made_by)
    checkpoint.write_checkpoint(
        path, checkpoint.collect(some, optimizers, scaler, some.config, config, saved, {"step": 0})
    )
    return path


@pytest.fixture(scope="module")
def writer(bpe: BPETokenizer) -> GPT:
    """A small model that has learned nothing."""
    return small_model(bpe)


def special(bpe: BPETokenizer) -> tuple[int, ...]:
    """Ids of <|endoftext|>, <|user|>, <|assistant|>, <|end|> and <|pad|>, by their names."""
    names = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
    return tuple(bpe.special_tokens[name] for name in names)


def write_lines(path: Path, records: list) -> Path:
    """A .jsonl file of these records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# === pairs as ids ===


def test_pair_by_hand(bpe: BPETokenizer) -> None:
    """The ids of one turn and of several, written out."""
    eot, user, assistant, end, _ = special(bpe)
    e = bpe.encode
    pair = data.encode_pair(("Who came?",), "Ida came.", "Nobody.", 0.5, bpe, 64)
    assert pair[:3] == ([eot, user, *e("Who came?"), assistant], [*e("Ida came."), end], [*e("Nobody."), end])
    assert pair[3:] == (0.5, math.nan, "Who came?")
    pair = data.encode_pair(("Who came?", "Ida.", "Why?"), "", "It was warm.", 0.0, bpe, 64)
    said = [eot, user, *e("Who came?"), assistant, *e("Ida."), end, user, *e("Why?"), assistant]
    assert pair[:4] == (said, [end], [*e("It was warm."), end], 0.0)
    assert pair.text == "Who came?\n\nIda.\n\nWhy?"
    assert pair.prompt == data.encode_prompt(("Who came?", "Ida.", "Why?"), bpe, 64)


def test_nobody_can_type_a_special_token_into_a_pair(bpe: BPETokenizer) -> None:
    """Neither in the prompt nor in an answer, in whatever layout."""
    typed = "".join(bpe.special_tokens)
    transcripts = [f"\n\nHuman: {typed}\n\nAssistant: {typed}{i}" for i in range(2)]
    for record in (
        {"prompt": typed, "chosen": f"{typed}0", "rejected": f"{typed}1"},
        {"chosen": transcripts[0], "rejected": transcripts[1]},
    ):
        pair = data.encode_pair(*data.read_pair(record), bpe, 10_000)
        eot, user, assistant, end, _ = special(bpe)
        found = Counter(i for i in pair.prompt + pair.chosen + pair.rejected if i in bpe.special_tokens.values())
        assert found == {eot: 1, user: 1, assistant: 1, end: 2}
        assert bpe.decode(pair.chosen) == f"{typed}0"


def test_collate_by_hand() -> None:
    """Chosen rows first, then the rejected ones in that order; the mask is true on answers only, drawn padding too."""
    pairs = [Pair([1, 2, 3], [4, 9], [5]), Pair([6], [0, 9], [7, 8, 8, 9])]
    idx, mask = data.collate(pairs, 0)
    assert idx.tolist() == [[1, 2, 3, 4, 9], [6, 0, 9, 0, 0], [1, 2, 3, 5, 0], [6, 7, 8, 8, 9]]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 1, 1, 1, 1]]
    assert (idx.dtype, mask.dtype) == (torch.int64, torch.bool)
    alone, alone_mask = data.collate_responses([[6]], [[7, 8, 8, 9]], 0)
    assert alone.tolist() == [[6, 7, 8, 8, 9]] and alone_mask.tolist() == [[False] + [True] * 4]
    with pytest.raises(ValueError, match="zip"):
        data.collate_responses([[1]], [], 0)


def test_processes_share_a_step_of_pairs() -> None:
    """Two processes with a batch of 3 take what one with a batch of 6 takes, step by step."""
    pairs = [Pair([i], [i], [i]) for i in range(20)]
    order = np.random.default_rng(0).permutation(20)
    for step in range(3):
        whole = data.get_batch(pairs, order, 6, step)
        assert [pair.prompt[0] for pair in whole] == order[6 * step : 6 * step + 6].tolist()
        shares = [data.get_batch(pairs, order, 3, step, rank, 2) for rank in (0, 1)]
        assert shares[0] + shares[1] == whole


# === records ===

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi."), ("assistant", "A."), ("assistant", "B."))
)
AGAIN = {"role": "user", "content": "So?"}
SYSTEM = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Hi.\n\nAssistant: A.\n\nHuman: So?\n\nAssistant:"
LAYOUTS = {
    "strings": ({"prompt": "Hi.", "chosen": "A.", "rejected": "B."}, (("Hi.",), "A.", "B.", 0.0)),
    "scores": (
        {"prompt": "Hi.", "chosen": "A.", "rejected": "B.", "score_chosen": 6.5, "score_rejected": 8.0},
        (("Hi.",), "A.", "B.", -1.5),
    ),
    "no score": (
        {"prompt": "Hi.", "chosen": "A.", "rejected": "B.", "score_chosen": 6.5, "score_rejected": None},
        (("Hi.",), "A.", "B.", 0.0),
    ),
    "messages": ({"prompt": "Hi.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (("Hi.",), "A.", "B.", 0.0)),
    "messages alone": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (("Hi.",), "A.", "B.", 0.0)),
    "prompt of messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (("Hi.",), "A.", "B.", 0.0)),
    "several turns": (
        {"chosen": [SYSTEM, USER, GOOD, AGAIN, GOOD], "rejected": [SYSTEM, USER, GOOD, AGAIN, BAD]},
        (("Be brief.\n\nHi.", "A.", "So?"), "A.", "B.", 0.0),
    ),
    "transcript": (
        {"chosen": f"{HH} You can, you know.", "rejected": f"{HH} You cannot."},
        (("Hi.", "A.", "So?"), "You can, you know.", "You cannot.", 0.0),
    ),
    "transcript with an empty answer": (
        {"prompt": None, "chosen": f"{HH} ", "rejected": f"{HH} No.\n"},
        (("Hi.", "A.", "So?"), "", "No.", 0.0),
    ),
    "twice in a row": (
        {"chosen": f"{HH} No.\n\nAssistant: Not today.", "rejected": f"{HH} No.\n\nAssistant: Never."},
        (("Hi.", "A.", "So?"), "No.\n\nNot today.", "No.\n\nNever.", 0.0),
    ),
    "names within a line": (
        {"chosen": f"{HH} He is Human: yes.\nHuman: x", "rejected": f"{HH} No."},
        (("Hi.", "A.", "So?"), "He is Human: yes.\nHuman: x", "No.", 0.0),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pair_layouts(name: str) -> None:
    """Each layout gives the turns of the prompt, both answers and the margin."""
    record, expected = LAYOUTS[name]
    assert data.read_pair(record) == expected


DROPPED = {
    "equal": {"prompt": "Hi.", "chosen": "A.", "rejected": "A."},
    "equal but for blanks": {"chosen": f"{HH} No.", "rejected": f"{HH}  No.\n"},
    "equal messages": {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
    "two answers differ": {"chosen": [USER, GOOD, AGAIN, GOOD], "rejected": [USER, BAD, AGAIN, BAD]},
    "goes on": {"chosen": f"{HH} No.\n\nHuman: Oh.\n\nAssistant: Sorry.", "rejected": f"{HH} Yes."},
    "the other one goes on": {"chosen": f"{HH} Yes.", "rejected": f"{HH} No.\n\nHuman: Oh.\n\nAssistant: Sorry."},
    "other prompts": {"chosen": f"{HH} No.", "rejected": "\n\nHuman: Ho.\n\nAssistant: No."},
    "nobody answers": {"chosen": "\n\nHuman: Hi.", "rejected": "\n\nHuman: Hi."},
    "one is the other's beginning": {"chosen": f"{HH} No.", "rejected": "\n\nHuman: Hi.\n\nAssistant: A."},
}


@pytest.mark.parametrize("name", DROPPED)
def test_pairs_without_a_comparison_are_dropped_and_counted(tmp_path: Path, bpe: BPETokenizer, name: str) -> None:
    """Equal, or different in more than one answer: no error, no pair, and one more in the count."""
    assert data.read_pair(DROPPED[name]) is None
    good = [{"prompt": f"p{i}", "chosen": "A.", "rejected": "B."} for i in range(3)]
    path = write_lines(tmp_path / "pairs.jsonl", [good[0], DROPPED[name], *good[1:]])
    training, held_out, dropped = data.load_pairs(str(path), bpe, 64, 10)
    assert (len(training) + len(held_out), dropped) == (3, 1)


MALFORMED = {
    "a list": (["a"], "it is no record"),
    "no pair": ({"prompt": "a", "response": "b"}, "of no layout known here; its columns are prompt, response"),
    "empty": ({}, "its columns are none"),
    "mixed": ({"prompt": "a", "chosen": "b", "rejected": [GOOD]}, "of no layout known here"),
    "no rejected": ({"prompt": "a", "chosen": "b", "rejected": None}, "of no layout known here"),
    "plain strings without a prompt": ({"chosen": "Yes.", "rejected": "No."}, "'Yes.' does not begin with 'Human:'"),
    "assistant first": (
        {"chosen": "\n\nAssistant: a", "rejected": HH},
        "message 1 is again, or too early, of the assi",
    ),
    "two users": ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "message 2 is again, or too early, of the user"),
    "a tool": ({"chosen": [USER, {"role": "tool", "content": "x"}], "rejected": [USER, BAD]}, "message 2 is of 'tool'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pairs(tmp_path: Path, bpe: BPETokenizer, name: str) -> None:
    """The error names the file, the record's number and what is wrong, read plainly or through `datasets`."""
    record, problem = MALFORMED[name]
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, record])
    with pytest.raises(UserError, match=problem) as error:
        data.load_pairs(str(path), bpe, 64, 10)
    assert str(error.value).startswith(f"--data {path}: record 2: ")
    assert str(error.value).endswith("; see read_pair in data.py")
    if isinstance(record, dict) and record:
        path = write_lines(tmp_path / "alone.jsonl", [record])
        with pytest.raises(UserError, match=problem.split(";")[0]):
            data.load_pairs(f"hf:{path}", bpe, 64, 10)


def test_pairs_that_cannot_be_had(tmp_path: Path, bpe: BPETokenizer) -> None:
    """Damaged lines, other files, names without a network: never something else instead."""
    good = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    path = tmp_path / "pairs.jsonl"
    for damaged in (b"{'prompt': 1}", b'{"prompt": "a"', b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(good + b"\n" + damaged + b"\n" + good)
        with pytest.raises(UserError, match=r"pairs.jsonl: line 3 is no JSON .*; mend or delete it"):
            data.load_pairs(str(path), bpe, 64, 10)
    text = tmp_path / "text.txt"
    text.write_text("text")
    for name, problem in ((tmp_path / "no.jsonl", "no such file"), (text, "no .jsonl file"), (tmp_path, "no .jsonl")):
        with pytest.raises(UserError, match=problem):
            data.load_pairs(str(name), bpe, 64, 10)
    for name in ("hf:ultrafeedback", "hf:hh-rlhf", "hf:no/such-name"):
        with pytest.raises(UserError, match=r"cannot be loaded .*; check the name and the network"):
            data.load_pairs(name, bpe, 64, 10)
    for records, dropped in (([], 0), ([json.loads(good)] * 5, 0), ([json.loads(good), DROPPED["equal"]], 1)):
        with pytest.raises(UserError, match=f"fewer than two prompts, {dropped} others dropped; give more"):
            data.load_pairs(str(write_lines(path, records)), bpe, 64, 10)


# === data sets ===

HF_COLUMNS = {
    "ultrafeedback": lambda i: {
        "prompt": f"p {i}",
        "prompt_id": str(i),
        "chosen": [{"content": f"p {i}", "role": "user"}, {"content": "A.", "role": "assistant"}],
        "rejected": [{"content": f"p {i}", "role": "user"}, {"content": f"B {i}.", "role": "assistant"}],
        "messages": [{"content": f"p {i}", "role": "user"}, {"content": "A.", "role": "assistant"}],
        "score_chosen": 8.5,
        "score_rejected": i / 8,
    },
    "hh-rlhf": lambda i: {
        "chosen": f"\n\nHuman: p {i}" + "\n\nAssistant: x\n\nHuman: y" * (i % 3) + "\n\nAssistant: I am no dog.",
        "rejected": f"\n\nHuman: p {i}" + "\n\nAssistant: x\n\nHuman: y" * (i % 3) + f"\n\nAssistant: I am {i}.",
    },
}


@pytest.mark.parametrize("kind", ["parquet", "json", "arrow"])
@pytest.mark.parametrize("name", HF_COLUMNS)
def test_pairs_by_their_columns(tmp_path: Path, bpe: BPETokenizer, name: str, kind: str) -> None:
    """A local file with the real data set's columns, written and read by `datasets`, gives pairs written by hand."""
    records = [HF_COLUMNS[name](i) for i in range(40)]
    table, path = Dataset.from_list(records), tmp_path / f"records.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "json":
        table.to_json(path)
    else:
        table.save_to_disk(tmp_path / "saved")
        (path,) = (tmp_path / "saved").glob("*.arrow")
    training, held_out, dropped = data.load_pairs(f"hf:{path}", bpe, 128, 1000)
    assert dropped == 0
    expected = {}
    for i in range(40):
        if name == "hh-rlhf":
            turns, answers, margin = (f"p {i}", *("x", "y") * (i % 3)), ("I am no dog.", f"I am {i}."), 0.0
        else:
            turns, answers, margin = (f"p {i}",), ("A.", f"B {i}."), 8.5 - i / 8
        ids = [[*bpe.encode(answer), special(bpe)[3]] for answer in answers]
        expected["\n\n".join(turns)] = (data.encode_prompt(turns, bpe, 128), *ids, margin)
    assert {pair.text: pair[:4] for pair in training + held_out} == expected
    assert all(math.isnan(pair.certainty) for pair in training)
    plain = write_lines(tmp_path / "plain.jsonl", records)
    assert data.load_pairs(str(plain), bpe, 128, 1000) == (training, held_out, 0)


def test_short_names_of_pairs(monkeypatch: pytest.MonkeyPatch, bpe: BPETokenizer) -> None:
    """A short name stands for a full one with its split; a split may follow any name."""
    asked = []

    def load_dataset(**settings: object) -> list[dict]:
        asked.append((settings["path"], settings["name"], settings["split"], settings["streaming"]))
        return [HF_COLUMNS["hh-rlhf"](i) for i in range(3)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in ("hf:UltraFeedback", "hf:hh-rlhf", "hf:hh-rlhf:test"):
        assert len(data.load_pairs(name, bpe, 128, 9)[0]) == 2
    hh = "Anthropic/hh-rlhf"
    assert asked == [
        ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", True),
        *((hh, None, split, True) for split in ("train", "test")),
    ]


def test_half_a_surrogate_pair_in_a_pair(tmp_path: Path, bpe: BPETokenizer) -> None:
    """JSON can spell what no encoding can: it becomes a question mark; answers that become equal so are dropped."""
    records = [{"prompt": f"a\ud83d{i}", "chosen": "\udc80b", "rejected": "c"} for i in range(9)]
    records.append({"prompt": "x", "chosen": "\udc80", "rejected": "\udc81"})
    training, held_out, dropped = data.load_pairs(str(write_lines(tmp_path / "half.jsonl", records)), bpe, 64, 10)
    assert {pair.text for pair in training + held_out} == {f"a?{i}" for i in range(9)} and dropped == 1
    assert {bpe.decode(pair.chosen) for pair in training + held_out} == {"?b"}


# === the split ===


def test_split_of_pairs_is_disjoint_and_stable(tmp_path: Path, bpe: BPETokenizer) -> None:
    """By the first thing that the user says: a conversation's later turns are on the same side, in any order."""
    records = [HF_COLUMNS["hh-rlhf"](i) for i in range(300)]
    deeper = [
        {
            name: said.replace("\n\nAssistant: I", "\n\nAssistant: x\n\nHuman: z\n\nAssistant: I")
            for name, said in r.items()
        }
        for r in records
    ]
    sides = []
    for some in (records + deeper, (deeper + records)[::-1], deeper[:150]):
        training, held_out, _ = data.load_pairs(str(write_lines(tmp_path / "a.jsonl", some)), bpe, 256, 10_000)
        assert len(training) + len(held_out) == len(some)
        sides.append([{pair.text.partition("\n")[0] for pair in side} for side in (training, held_out)])
        assert not sides[-1][0] & sides[-1][1]
    assert sides[0] == sides[1] and all(sides[2][k] <= sides[0][k] for k in (0, 1))
    assert 2 <= len(sides[0][1]) <= 20  # about a fiftieth of 300


def test_number_of_pairs_is_a_limit(tmp_path: Path, bpe: BPETokenizer) -> None:
    """At most n to train on, dropped ones not counted among them; and something is always held out."""
    records = [{"prompt": str(i // 4), "chosen": str(i), "rejected": "b"} for i in range(200)]
    records = [some for record in records for some in (record, DROPPED["equal"])]
    path = str(write_lines(tmp_path / "a.jsonl", records))
    for n in (1, 3, 50, 10_000):
        training, held_out, dropped = data.load_pairs(path, bpe, 64, n)
        assert held_out and not {pair.text for pair in training} & {pair.text for pair in held_out}
        assert len(training) == min(n, 200 - len(held_out))
        assert dropped == 200 if n > 200 else dropped < 200


# === what is too long ===


def test_cuts_of_pairs_are_in_prompts(bpe: BPETokenizer) -> None:
    """Whatever the lengths: answers stay whole, both see one prompt, its end is kept, and it all fits."""
    rng, kept, cut, dropped = random.Random(0), 0, 0, 0
    eot, user, assistant, end, _ = special(bpe)
    words = ("kite", "a", "Ida", "fox", "the", "7", "was", "\n\n")

    def say(n: int) -> str:
        return " ".join(rng.choice(words) for _ in range(n))

    for _ in range(400):
        turns = tuple(say(rng.randrange(1, 40)) for _ in range(rng.choice((1, 1, 3))))
        answers = [say(rng.randrange(40)) for _ in range(2)]
        T = rng.randrange(24, 80)
        pair = data.encode_pair(turns, *answers, 0.0, bpe, T)
        ids = [[*bpe.encode(answer), end] for answer in answers]
        whole = data.encode_prompt(turns, bpe, 10_000)
        room = T - max(map(len, ids))
        if answers[0] == answers[1] or (len(whole) > room and room < 16 and (pair is None or len(turns) == 1)):
            assert pair is None
            dropped += 1
            continue
        assert [pair.chosen, pair.rejected] == ids
        assert pair.prompt[:2] == [eot, user] and pair.prompt[-1] == assistant
        assert pair.prompt[2:] == whole[len(whole) - len(pair.prompt) + 2 :]
        assert len(pair.prompt) == min(len(whole), room) if len(turns) == 1 else len(pair.prompt) <= room
        kept, cut = kept + 1, cut + (len(whole) > room)
        assert data.collate([pair], 0)[0].shape[1] <= T
    assert min(kept - cut, cut, dropped) > 20


def test_answers_never_become_equal(bpe: BPETokenizer) -> None:
    """Two long answers that differ in their last word: as they are, or not at all."""
    prompt, begin = "Tell me of the fox. " * 20, "The fox ran to the river and drank. " * 3
    pairs = [
        data.encode_pair((prompt,), begin + "It was glad.", begin + "It was sad.", 0, bpe, T) for T in range(10, 200)
    ]
    kept = [pair for pair in pairs if pair]
    assert 0 < len(kept) < len(pairs)
    assert all(pair.chosen != pair.rejected and len(pair.prompt) >= 16 for pair in kept)
    assert {bpe.decode(pair.chosen) for pair in kept} == {begin + "It was glad."}


# === the judge ===


def test_judge_by_hand() -> None:
    """sigmoid(8 * 0.25) = sigmoid(2); both orders together are certain; nothing overflows."""
    judge = preferences.judge_probability
    assert judge(0.75, 0.5, 8.0) == pytest.approx(1 / (1 + math.exp(-2)))
    assert judge(0.1, 0.4, 8.0) == pytest.approx(math.exp(-2.4) / (1 + math.exp(-2.4)))
    assert judge(0.3, 0.3, 8.0) == judge(0.9, 0.1, 0.0) == 0.5
    assert (judge(1.0, 0.0, 1e9), judge(0.0, 1.0, 1e9)) == (1.0, 0.0)
    for a, b in ((0.2, 0.7), (1.0, 0.95)):
        assert judge(a, b, 5.0) + judge(b, a, 5.0) == pytest.approx(1)
    # What the docstring of SHARPNESS says.
    assert [round(judge(d, 0, preferences.SHARPNESS), 2) for d in (0.1, 0.3)] == [0.69, 0.92]


def answers(n: int) -> list[Response]:
    """Different answers whose ids say which one it is."""
    return [Response(str(i), [i], True) for i in range(n)]


def test_labels_come_as_often_as_the_judge_says() -> None:
    """Every pair is preferred in its share p of 5,000 labels, with its margin and its certainty."""
    scores, rng, rounds, sharpness = [0.9, 0.2, 0.5, 0.55], np.random.default_rng(0), 5000, 4.0
    wins, total = Counter(), []
    for _ in range(rounds):
        pairs = preferences.label_pairs([7], "q", answers(4), scores, sharpness, rng)
        assert [{*pair.chosen, *pair.rejected} for pair in pairs] == [{i, j} for i, j in combinations(range(4), 2)]
        for pair in pairs:
            i, j = pair.chosen[0], pair.rejected[0]
            wins[i, j] += 1
            p = 1 / (1 + math.exp(-sharpness * (scores[i] - scores[j])))
            assert pair.margin == pytest.approx(scores[i] - scores[j])
            assert pair.certainty == pytest.approx(max(p, 1 - p))
            assert (pair.prompt, pair.text) == ([7], "q")
        total += pairs
    for i, j in combinations(range(4), 2):
        p = 1 / (1 + math.exp(-sharpness * (scores[i] - scores[j])))
        assert wins[i, j] / rounds == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / rounds))


def test_nobody_gets_above_the_ceiling() -> None:
    """Of all 24 orders of four answers, the right one reaches it on drawn labels, and every other one stays below."""
    scores, rng = [0.9, 0.2, 0.5, 0.6], np.random.default_rng(0)
    pairs = [pair for _ in range(4000) for pair in preferences.label_pairs([], "", answers(4), scores, 4.0, rng)]
    found = {}
    for order in permutations(range(4)):  # order[i]: how high a model would rank answer i
        found[order] = np.mean([order[pair.chosen[0]] > order[pair.rejected[0]] for pair in pairs])
    top = preferences.ceiling(pairs)
    assert max(found, key=found.get) == (3, 0, 1, 2)
    assert found.pop((3, 0, 1, 2)) == pytest.approx(top, abs=4 * 0.5 / math.sqrt(len(pairs)))
    assert max(found.values()) < top - 0.01
    # By hand: the six differences 0.7, 0.4, 0.3, 0.3, 0.4, 0.1.
    assert top == pytest.approx(np.mean([1 / (1 + math.exp(-4 * d)) for d in (0.7, 0.4, 0.3, 0.3, 0.4, 0.1)]))
    assert math.isnan(preferences.ceiling([Pair([1], [2], [3])]))


def test_equal_answers_make_no_pair() -> None:
    """Equal in text and end; ids that spell one text in two ways are still one answer."""
    some = [Response("a b", [1, 2], True), Response("a b", [3], True), Response("a b", [1, 2], False)]
    pairs = preferences.label_pairs([], "", some, [0.5, 0.5, 0.4], 8.0, np.random.default_rng(0))
    assert [{tuple(pair.chosen), tuple(pair.rejected)} for pair in pairs] == [{(1, 2)}, {(3,), (1, 2)}]


# === sampling ===


def test_sampled_ids_are_those_that_were_drawn(bpe: BPETokenizer, writer: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are what the model read, answers what came out of `generate`; scores are the rules'; all of it fits."""
    drawn, real, (*_, end, pad) = set(), generate.generate, special(bpe)

    def spy(gpt: GPT, idx: torch.Tensor, *args: object, **settings: object) -> object:
        steps = list(real(gpt, idx, *args, **settings))
        for prompt, ids in zip(idx.tolist(), torch.stack(steps, dim=1).tolist(), strict=True):
            ids = ids[: ids.index(end) + 1] if end in ids else ids
            prompt = prompt[prompt.index(bpe.eot) :]  # the padding stands on the left
            drawn.add((tuple(prompt), tuple(ids)))
        return iter(steps)

    monkeypatch.setattr(generate, "generate", spy)
    some = preferences.story_prompts(5, 0, False)
    # One prompt is too long for the model's 80 tokens, and loses its beginning.
    some[2] = instructions.Instruction("story", 1, "Tell me a story. " * 30, "", some[2].asked)
    pairs, sampled = preferences.sample_pairs(writer, bpe, some, (0.7, 1.2), 2, 8.0, 3)
    assert sampled.temperatures == [0.7, 0.7, 1.2, 1.2] and len(drawn) == 20
    assert {(tuple(p.prompt), tuple(ids)) for p in pairs for ids in (p.chosen, p.rejected)} == drawn
    assert len(pairs) == 5 * 6 - sampled.equal and sampled.equal == 0
    assert data.collate(pairs, pad)[0].shape[1] <= 80 and max(len(pair.prompt) for pair in pairs) == 60
    assert {pair.text for pair in pairs} == {i.prompt for i in some}
    assert all(len(row) == 4 for row in sampled.responses)
    expected = [
        [rules.score(i, r.text, r.ended).total for r in row] for i, row in zip(some, sampled.responses, strict=True)
    ]
    assert sampled.scores.tolist() == expected


def test_equal_arguments_give_equal_pairs(bpe: BPETokenizer, writer: GPT) -> None:
    """Another seed, others; draws at one temperature are not one draw."""
    some = preferences.story_prompts(3, 0, True)
    first, again, other = (preferences.sample_pairs(writer, bpe, some, (1.0,), 2, 8.0, seed)[0] for seed in (0, 0, 1))
    assert first == again and len(first) == 3
    answers = [{tuple(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)} for pairs in (first, other)]
    assert not answers[0] & answers[1]


def test_the_likeliest_answer_twice_is_no_pair(bpe: BPETokenizer, writer: GPT) -> None:
    """At temperature 0 both answers are one; they are skipped and counted."""
    pairs, sampled = preferences.sample_pairs(writer, bpe, preferences.story_prompts(3, 0, True), (0.0,), 2)
    assert (pairs, sampled.equal) == ([], 3)


def good_writer(prompts: list[instructions.Instruction]) -> object:
    """A stand-in for `respond`: gold stories that lose words, the more the higher the temperature; four in five end."""

    def respond(gpt: object, bpe: BPETokenizer, texts: list[str], temperature: float, seed: int) -> list[Response]:
        rng, found = random.Random(seed), []
        for instruction in prompts[: len(texts)]:
            words = [word for word in instruction.response.split(" ") if rng.random() > 0.04 * temperature**3]
            ended = rng.random() < 0.8
            found.append(Response(" ".join(words), [*bpe.encode(" ".join(words)), *special(bpe)[3:4] * ended], ended))
        return found

    return respond


def test_pairs_have_the_scores_of_their_answers(
    bpe: BPETokenizer, writer: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margin, certainty and ceiling follow from the rules' scores of the decoded ids; the judge does err."""
    some = preferences.story_prompts(40, 0, True)
    monkeypatch.setattr(preferences, "respond", good_writer(some))
    pairs, sampled = preferences.sample_pairs(writer, bpe, some)
    by_prompt = {i.prompt: i for i in some}
    for pair in pairs:
        high, low = (
            rules.score(by_prompt[pair.text], bpe.decode(ids), ids[-1] == special(bpe)[3]).total
            for ids in (pair.chosen, pair.rejected)
        )
        assert pair.margin == pytest.approx(high - low)
        assert pair.certainty == pytest.approx(1 / (1 + math.exp(-8 * abs(high - low))))
    errors = np.mean([pair.margin < 0 for pair in pairs])
    assert 0.03 < errors < 0.3 and 0.7 < preferences.ceiling(pairs) < 0.95
    means = sampled.scores.mean(axis=0)
    assert len(pairs) + sampled.equal == 240 and (np.diff(means) < 0).all()


def test_impossible_settings_of_sampling(bpe: BPETokenizer, writer: GPT) -> None:
    """Each names the flag and what to give instead."""
    some = preferences.story_prompts(1, 0, True)
    for settings, problem in (
        (((1.0,), 1, 8.0), "--temperatures .*one answer makes no pair"),
        (((1.0, -0.5), 1, 8.0), "--temperatures .*below 0"),
        (((1.0, 0.5), 1, -1.0), "--sharpness -1.0 is no number from 0 on"),
        (((1.0, 0.5), 1, math.nan), "--sharpness nan"),
        (((1.0, 0.5), 1, math.inf), "--sharpness inf"),
    ):
        with pytest.raises(UserError, match=problem):
            preferences.sample_pairs(writer, bpe, some, *settings)


def test_prompts_are_stories_of_one_side() -> None:
    """Held-out ones ask for nothing that a training one asks for, whatever the seeds."""
    training, held_out = preferences.story_prompts(300, 0, False), preferences.story_prompts(300, 0, True)
    assert {i.kind for i in training + held_out} == {"story"}
    assert training[:10] == preferences.story_prompts(10, 0, False) != preferences.story_prompts(10, 1, False)
    sides = [{(i.asked["hero"], i.asked["thing"]) for i in side} for side in (training, held_out)]
    assert sides[0] and not sides[0] & sides[1]


# === files ===


def test_pairs_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, numbers and text to the last bit, in a folder that was not there; a write that fails leaves the old file."""
    rng = np.random.default_rng(0)
    pairs = [Pair([1, i], [2], [3, i], float(rng.normal()), float(rng.random()), f"a\n\u00e9{i}") for i in range(20)]
    pairs.append(Pair([1], [2], [3]))
    path = tmp_path / "new" / "train.jsonl"
    preferences.save_pairs(path, pairs)
    assert preferences.read_pairs(path) == pairs
    assert [file.name for file in path.parent.iterdir()] == ["train.jsonl"]
    assert "NaN" not in path.read_text()  # which is no JSON
    broken = [*pairs[:3], Pair([1], [2], [object()])]
    with pytest.raises(TypeError):
        preferences.save_pairs(path, broken)
    assert preferences.read_pairs(path) == pairs


def test_files_that_are_no_pairs(tmp_path: Path) -> None:
    """One that is not there, is cut off, or holds something else."""
    path = tmp_path / "train.jsonl"
    with pytest.raises(UserError, match=r"train.jsonl: no such file of pairs"):
        preferences.read_pairs(path)
    preferences.save_pairs(path, [Pair([1], [2], [3])] * 2)
    whole = path.read_text()
    path.write_text(whole[:-9])
    with pytest.raises(UserError, match=r"line 2 is no JSON"):
        preferences.read_pairs(path)
    for other in ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "[1]\n"):
        path.write_text(whole + other)
        with pytest.raises(UserError, match=r"line 3 is no pair of ours; delete the file"):
            preferences.read_pairs(path)


# === lesson1_preferences.py ===


@pytest.fixture(scope="module")
def writer_file(bpe: BPETokenizer, writer: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained writer in a checkpoint."""
    return save(tmp_path_factory.mktemp("writer") / "best.pt", writer, bpe)


def run_lesson(
    base: Path, out: Path, capsys: pytest.CaptureFixture, **settings: object
) -> tuple[str, dict[str, float]]:
    """What the lesson prints, and its metrics."""
    lesson1.main(
        lesson1.Config(**{"base": base, "out": out, "n_prompts": 4, "n_labels": 300, "device": "cpu"} | settings)
    )
    assert [file.name for file in out.glob("*.png")] == ["preferences.png"]
    return capsys.readouterr().out, json.loads((out / "metrics.json").read_text())


def test_lesson_on_preferences_of_a_bad_model(writer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All answers have score 0: every label is a coin's throw, and the ceiling is a half."""
    out, metrics = run_lesson(writer_file, tmp_path, capsys)
    assert metrics["ceiling"] == metrics["ceiling_simulated"] == 0.5 and metrics["equal_scores"] == 1
    assert out.count("a coin was thrown") == 6 and "an error" not in out
    assert all(math.isfinite(value) for value in metrics.values())


def test_lesson_on_preferences_of_a_good_model(
    writer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores fall with the temperature, the ceiling rises with the sharpness and is reached."""
    monkeypatch.setattr(preferences, "respond", good_writer(preferences.story_prompts(40, 0, True)))
    out, metrics = run_lesson(writer_file, tmp_path, capsys, n_prompts=40, n_labels=3000)
    falling = [metrics[f"score_at_{t:g}"] for t in (0.5, 0.8, 1.0, 1.3)]
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1] + 0.3
    assert metrics["ceiling_simulated"] == pytest.approx(metrics["ceiling"], abs=0.03)
    assert metrics["two_judges_agree"] < metrics["ceiling"]
    rows = [line.split() for line in out.split("two judges agree\n")[1].splitlines()[:8]]
    tops = [float(row[1]) for row in rows]
    assert [float(row[0]) for row in rows] == [0.5, 1, 2, 4, 8, 16, 32, 64]
    assert tops == sorted(tops) and 0.5 < tops[0] < 0.6 and tops[-1] > 0.9
    for _, top, found, _, error, agree in rows:
        assert float(found) == pytest.approx(float(top), abs=2.5 * float(error) + 0.001) and float(agree) < float(top)
    six, signs = out.split("that of the other\n")[1].splitlines()[:6], set()
    for line in six:  # the label that is shown is that of the pair
        p, first, sign, second, margin = line.split()[:5]
        signs.add(sign)
        assert first < second and ("error" in line) == ((float(p) > 0.5) == (sign == "<")) == (float(margin) < 0)
    assert signs == {"<", ">"}


def test_lesson_takes_records_apart(writer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What letters give away, how layouts are read, and what becomes of pairs that are too long."""
    out, metrics = run_lesson(writer_file, tmp_path, capsys)
    assert metrics["letters_given_away"] == len("You should ") and metrics["layouts_read"] == 3
    assert "prompt 'Can I keep an owl?' -> 'Where do you live?' -> 'In a flat.'" in out
    assert "two answers that differ:       dropped" in out and "'Hello.': 'Good morning.' > 'What?', margin 5.5" in out
    assert "cut from the right: two equal rows" in out and "Was it warm?'" in out
    assert 16 <= metrics["cut_prompt"] < metrics["whole_prompt"] and 0 < metrics["dropped"] < 8


def test_impossible_settings_of_the_lesson(writer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One line each: nothing to ask, and answers that are all one."""
    for settings, problem in (
        ({"n_prompts": 0}, "--n_prompts 0 is below 1"),
        ({"n_labels": 0}, "--n_labels 0 is below 1"),
        ({"temperatures": (0.0, 0.0)}, "all answers to each prompt are equal"),
        ({"base": tmp_path / "no.pt"}, "no such file"),
    ):
        with pytest.raises(UserError, match=problem):
            run_lesson(**{"base": writer_file, "out": tmp_path, "capsys": capsys} | settings)


# === the reward model ===

PAD = 63
SHAPES = {
    "plain": {},
    "gqa": {"n_kv_head": 1},
    "window": {"window": 5},
    "sinks": {"window": 5, "n_sink": 2},
    "moe": {"n_expert": 4},
}
BOTH = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
EVERY = pytest.mark.parametrize("shape", SHAPES)
PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12, 13], [1, 2, 3, 4]]
RESPONSES = [[20, 21, 22], [23, 24, 25, 26, 27, 28, 29, 30, 31], [32], [20, 21, 33, 34, 35]]


def make_trunk(shape: str = "plain", **settings: int) -> GPT:
    """A small language model in which every weight matters."""
    torch.manual_seed(1)
    settings = {"block_size": 64, "n_layer": 2, "n_embd": 32} | SHAPES[shape] | settings
    trunk = GPT(GPTConfig(vocab_size=64, **settings))
    for parameter in trunk.blocks.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return trunk.eval()


def make_judge(causal: bool, shape: str = "plain", **settings: int) -> RewardModel:
    """A small reward model in which every weight matters."""
    return RewardModel(make_trunk(shape, **settings), PAD, causal).eval()


def states_by_hand(judge: RewardModel, ids: list[int]) -> torch.Tensor:
    """Normed states (T, C) of one row without padding: attention a query and a head at a time, without torch's."""
    trunk, config = judge.trunk, judge.config
    T, D = len(ids), config.head_dim
    n_q, n_kv = config.n_head, config.n_kv_head
    cos, sin = rope.rope_angles(torch.arange(T)[None], trunk.frequency)
    x = trunk.wte.weight[ids]  # (T, C)
    for block in trunk.blocks:
        qkv = (block.norm1(x) @ block.attn.qkv.weight.T).view(T, n_q + 2 * n_kv, D).transpose(0, 1)
        q, k = (rope.rope(some[None], cos, sin)[0] for some in (qkv[:n_q], qkv[n_q : n_q + n_kv]))
        v = qkv[n_q + n_kv :]
        out = torch.zeros(T, n_q, D)
        for t in range(T):
            seen = [
                s
                for s in range(T)
                if (s <= t or not judge.causal)
                and (not config.window or abs(t - s) < config.window or s < config.n_sink)
            ]
            for head in range(n_q):
                shared = head * n_kv // n_q
                weights = (k[shared, seen] @ q[head, t] / math.sqrt(D)).softmax(dim=0)
                out[t, head] = weights @ v[shared, seen]
        x = x + out.flatten(1) @ block.attn.proj.weight.T
        x = x + block.mlp(block.norm2(x)[None])[0]
    return trunk.norm(x)


@EVERY
@BOTH
@torch.no_grad()
def test_reward_by_hand(causal: bool, shape: str) -> None:
    """Each row alone, in plain loops: the mean over the response, or its last token, times the head."""
    judge = make_judge(causal, shape)
    with torch.no_grad():
        judge.head.bias.fill_(0.3)
    found = judge(*data.collate_responses(PROMPTS, RESPONSES, PAD))
    assert found.shape == (4,) and found.dtype == torch.float32
    assert found.std() > 0.1
    for prompt, response, value in zip(PROMPTS, RESPONSES, found, strict=True):
        states = states_by_hand(judge, prompt + response)[len(prompt) :]
        pooled = states[-1] if causal else sum(states) / len(response)
        by_hand = sum(w * s for w, s in zip(judge.head.weight[0], pooled, strict=True)) + 0.3
        assert value.item() == pytest.approx(by_hand.item(), abs=2e-5)


@EVERY
@BOTH
def test_padding_and_batch_mates_change_nothing(causal: bool, shape: str) -> None:
    """Rewards and gradients: alone, beside others, with more padding on the right, on the left, of any kind."""
    judge = make_judge(causal, shape)
    rows = [data.collate_responses([p], [r], PAD) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    alone = torch.cat([judge(*row) for row in rows])
    alone.square().sum().backward()
    gradient = [parameter.grad.clone() for parameter in judge.parameters()]
    assert alone.std() > 0.1
    idx, mask = data.collate_responses(PROMPTS, RESPONSES, PAD)
    assert (idx == PAD).any()
    for left, right in ((0, 0), (0, 1), (0, 30), (9, 0), (4, 11)):
        judge.zero_grad()
        found = judge(F.pad(idx, (left, right), value=PAD), F.pad(mask, (left, right)))
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
        found.square().sum().backward()
        for parameter, expected in zip(judge.parameters(), gradient, strict=True):
            torch.testing.assert_close(parameter.grad, expected, atol=2e-4, rtol=1e-4)
    for mates in ([0, 1], [2, 0], [3, 1, 0]):
        torch.testing.assert_close(judge(idx[mates], mask[mates]), alone[mates], atol=1e-5, rtol=0)


@EVERY
@torch.no_grad()
def test_an_encoder_looks_ahead_and_a_causal_model_does_not(shape: str) -> None:
    """Another last token of the response: earlier states of the encoder change, none of the causal model's."""
    idx, mask = data.collate_responses(PROMPTS[1:2], RESPONSES[1:2], PAD)
    other = idx.clone()
    other[0, -1] = 40
    for causal in (False, True):
        judge = make_judge(causal, shape)
        changed = (judge.encode(idx, mask | True) - judge.encode(other, mask | True)).abs().amax(dim=-1)[0] > 1e-4
        assert changed[-1]
        if causal:
            assert not changed[:-1].any()
        else:
            window = judge.config.window
            near = changed[-window:] if window else changed  # farther ones hear of it in the second block
            assert near.all()
        assert (judge(idx, mask) - judge(other, mask)).abs() > 1e-3


@torch.no_grad()
def test_a_causal_trunk_has_the_states_of_the_language_model() -> None:
    """What the causal judge reads is what the language model computes, and lm_head is gone."""
    judge = make_judge(True)
    idx, mask = data.collate_responses(PROMPTS[1:2], RESPONSES[1:2], PAD)
    states, _ = judge.trunk(idx)  # GPT.forward: lm_head passes on what it gets
    assert states.shape == (1, idx.shape[1], 32)
    torch.testing.assert_close(judge.encode(idx, mask | True), states)
    torch.testing.assert_close(judge(idx, mask), judge.head(states[:, -1])[:, 0])
    assert not any("lm_head" in name for name in judge.state_dict())


@torch.no_grad()
def test_a_window_of_an_encoder_reaches_both_ways() -> None:
    """One block: a token notices another one that is less than the window away, before or after, or is a sink."""
    T, window, n_sink = 20, 4, 2
    judge = make_judge(False, n_layer=1, window=window, n_sink=n_sink)
    idx, everything = torch.arange(T)[None] + 3, torch.ones(1, T, dtype=torch.bool)
    states = judge.encode(idx, everything)
    for place in range(T):
        other = idx.clone()
        other[0, place] = 50
        changed = (judge.encode(other, everything) - states).abs().amax(dim=-1)[0] > 1e-5
        expected = [abs(t - place) < window or place < n_sink for t in range(T)]
        assert changed.tolist() == expected
    by_hand = [[abs(q - k) < window or k < n_sink for k in range(T)] for q in range(T)]
    positions = torch.arange(T)[None]
    assert reward.visible_both_ways(positions, window, n_sink)[0, 0].tolist() == by_hand
    assert reward.visible_both_ways(positions, 0, 0).all()


def test_positions_and_masks_of_padding() -> None:
    """Padding has positions below 0, each its own; nobody sees it but itself; every query sees something."""
    real = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    positions = reward.real_positions(real)
    assert positions.tolist() == [[0, 1, 2, -2, -1], [-5, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    for window in (0, 2):
        see = reward.visible_both_ways(positions, window, 0)[:, 0]
        assert see.shape == (3, 5, 5)
        assert see.any(dim=-1).all()
        for row in range(3):
            for q in range(5):
                for k in range(5):
                    near = not window or abs(positions[row, q] - positions[row, k]) < window
                    assert see[row, q, k] == (q == k or bool(real[row, k] and near))


@BOTH
def test_a_drawn_padding_token_is_part_of_the_response(causal: bool) -> None:
    """A model may draw <|pad|>: the mask says that it is read, so it is as any other token."""
    judge = make_judge(causal)
    found = judge(*data.collate_responses([[1, 2, 3]], [[20, PAD, 22]], PAD))
    judge.pad = 60  # now the same ids hold no padding
    assert found.item() == pytest.approx(judge(*data.collate_responses([[1, 2, 3]], [[20, PAD, 22]], 60)).item())
    judge.pad = PAD
    assert (found - judge(*data.collate_responses([[1, 2, 3]], [[20, 22]], PAD))).abs() > 1e-3


@BOTH
def test_what_cannot_be_judged_is_refused(causal: bool) -> None:
    """A row without a response, and one that is too long for a trunk without a window."""
    judge = make_judge(causal)
    idx, mask = data.collate_responses(PROMPTS, RESPONSES, PAD)
    mask[1] = False
    with pytest.raises(ValueError, match="nothing to judge"):
        judge(idx, mask)
    with pytest.raises(ValueError, match=r"nothing to judge|empty|no token"):
        reward.rewards(judge, [[1, 2]], [[]])
    with pytest.raises(ValueError, match="65 tokens is longer than block_size = 64"):
        judge(torch.ones(1, 65, dtype=torch.long), torch.ones(1, 65, dtype=torch.bool))
    far = make_judge(causal, "window")
    assert far(torch.ones(1, 65, dtype=torch.long), torch.ones(1, 65, dtype=torch.bool)).isfinite()


def test_integer_masks_are_masks() -> None:
    """0 and 1 mean what False and True mean; in particular, `|` on them is no arithmetic."""
    judge = make_judge(False)
    idx, mask = data.collate_responses(PROMPTS, RESPONSES, PAD)
    assert torch.equal(judge(idx, mask), judge(idx, mask.long()))


@BOTH
def test_every_parameter_learns(causal: bool) -> None:
    """Also where lm_head was a matrix of its own: DDP waits for the gradient of each parameter."""
    judge = make_judge(causal, "moe", tie_weights=False).train()
    rewards = judge(*data.collate_responses(PROMPTS, RESPONSES, PAD))
    losses.bradley_terry_loss(*rewards.chunk(2), center=0.01).backward()
    assert all(parameter.grad is not None for parameter in judge.parameters())
    assert judge.trunk.auxiliary_loss(0.01, 0.001) > 0
    assert judge.num_parameters() == sum(p.numel() for p in judge.trunk.parameters()) + 33


@BOTH
def test_recomputing_blocks_and_lower_precision(causal: bool) -> None:
    """Recomputed blocks give the same gradients; under autocast the head and the mean stay in float32."""
    judge = make_judge(causal).train()
    batch = data.collate_responses(PROMPTS, RESPONSES, PAD)
    expected = judge(*batch)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in judge.parameters()]
    judge.zero_grad()
    judge.trunk.recompute, passes = True, []
    judge.trunk.blocks[1].register_forward_pre_hook(lambda module, args: passes.append(1))
    judge(*batch).sum().backward()
    assert len(passes) == 2  # once forward, and once more for the backward pass
    for parameter, gradient in zip(judge.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    seen = []
    judge.trunk.norm.register_forward_hook(lambda module, args, out: seen.append(out.float()))
    with torch.autocast("cpu", torch.bfloat16):
        low = judge(*batch)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, atol=0.1, rtol=0.1)
    exact = F.linear(judge.pool(seen[0], batch[1]), judge.head.weight, judge.head.bias)[:, 0]
    torch.testing.assert_close(low, exact, atol=1e-6, rtol=0)


def test_dropout_is_for_training() -> None:
    """Embeddings are dropped as in GPT.forward; in evaluation nothing is."""
    judge = make_judge(False, n_layer=0, dropout=0.5)
    batch = data.collate_responses(PROMPTS, RESPONSES, PAD)
    assert torch.equal(judge(*batch), judge(*batch))
    judge.train()
    assert not torch.equal(judge(*batch), judge(*batch))


def test_head_begins_as_published() -> None:
    """N(0, 1 / (C + 1)), a bias of 0 (Stiennon et al. 2020, appendix B.1)."""
    judge = make_judge(False, n_embd=2048, n_layer=0, n_head=16)
    assert judge.head.bias.item() == 0
    assert judge.head.weight.std().item() == pytest.approx(2049**-0.5, rel=0.06)


# === many responses, and files ===


@BOTH
def test_rewards_keep_order_and_mode(causal: bool) -> None:
    """Whatever the batch size; with dropout, which evaluation switches off, and without gradients."""
    judge = make_judge(causal, dropout=0.5)
    prompts, responses = PROMPTS * 3, RESPONSES * 2 + RESPONSES[::-1]
    alone = [judge(*data.collate_responses([p], [r], PAD)).item() for p, r in zip(prompts, responses, strict=True)]
    for training in (True, False):
        judge.train(training)
        for batch_size in (1, 5, 64):
            found = reward.rewards(judge, prompts, responses, batch_size)
            assert isinstance(found, np.ndarray) and found.shape == (12,)
            np.testing.assert_allclose(found, alone, atol=1e-5)
        assert judge.training is training
    assert reward.rewards(judge, [], []).shape == (0,)


def test_ids_are_judged_as_they_were_drawn(bpe: BPETokenizer) -> None:
    """A word that was drawn letter by letter is not the token that the text would be encoded as."""
    torch.manual_seed(1)
    judge = RewardModel(GPT(GPTConfig(vocab_size=bpe.vocab_size, n_embd=32, n_layer=2)), data.chat_tokens(bpe)[3])
    text = " The lantern was here."
    drawn = [bpe.ranks[bytes([i])] for i in text.encode()]
    assert bpe.decode(drawn) == text and bpe.encode(text) != drawn
    seen = []
    judge.trunk.wte.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    prompt = data.encode_prompt(("Tell a story.",), bpe, 64)
    found = reward.rewards(judge, [prompt, prompt], [drawn, bpe.encode(text)], 1)
    assert sorted(map(len, (ids[0] for ids in seen))) == sorted(
        [len(prompt) + len(drawn), len(prompt) + len(bpe.encode(text))]
    )
    assert any(ids[0].tolist() == prompt + drawn for ids in seen)
    assert abs(found[0] - found[1]) > 1e-4


@BOTH
def test_load_what_was_saved(causal: bool, tmp_path: Path, bpe: BPETokenizer) -> None:
    """Weights, the kind of mask, the padding and the tokenizer; tied or not, dense or with experts."""
    for settings in ({}, {"n_expert": 2, "tie_weights": False, "window": 20}):
        trunk = GPT(GPTConfig(vocab_size=bpe.vocab_size, n_embd=32, n_layer=2, **settings))
        judge = RewardModel(trunk, data.chat_tokens(bpe)[3], causal, surprise=not causal)
        save(tmp_path / "best.pt", judge, bpe, causal=causal, surprise=not causal)
        loaded, same = reward.load_reward_model(tmp_path / "best.pt", torch.device("cpu"))
        assert loaded.causal is causal and (loaded.writer is None) is causal and loaded.pad == data.chat_tokens(bpe)[3]
        assert asdict(loaded.config) == asdict(judge.config)
        assert same.encode("a kite") == bpe.encode("a kite")
        expected = reward.rewards(judge, PROMPTS, RESPONSES)
        np.testing.assert_array_equal(reward.rewards(loaded, PROMPTS, RESPONSES), expected)


def test_other_files_are_refused(tmp_path: Path, bpe: BPETokenizer) -> None:
    """A language model, another architecture, no file at all."""
    trunk = GPT(GPTConfig(vocab_size=bpe.vocab_size, n_embd=32, n_layer=1))
    save(tmp_path / "lm.pt", trunk, bpe)
    with pytest.raises(UserError, match="not a reward model"):
        reward.load_reward_model(tmp_path / "lm.pt", torch.device("cpu"))
    save(tmp_path / "other.pt", RewardModel(trunk, PAD), bpe, causal=False, surprise=False)
    saved = torch.load(tmp_path / "other.pt")
    saved["model_config"]["n_wings"] = 2
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(UserError, match="n_wings"):
        reward.load_reward_model(tmp_path / "other.pt", torch.device("cpu"))
    with pytest.raises(UserError, match="no such checkpoint"):
        reward.load_reward_model(tmp_path / "none.pt", torch.device("cpu"))


# === the losses ===

CHOSEN, REJECTED = [1.5, -0.25, 3.0, -2.0], [0.5, 0.75, -1.0, -2.0]
MARGINS = [0.5, 0.0, 2.0, -1.0]


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("center", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("margin", [0.0, 0.7, MARGINS], ids=["no margin", "one margin", "a margin each"])
def test_bradley_terry_is_trls_formula(margin: float | list[float], center: float) -> None:
    """-logsigmoid(chosen - rejected - margin).mean() + center * ((chosen + rejected)^2).mean(), and its gradient.

    By hand: d loss / d chosen = (-(1 - sigmoid(chosen - rejected - margin)) + 2 center (chosen + rejected)) / B.
    """
    each = margin if isinstance(margin, list) else [margin] * 4
    chosen, rejected = (torch.tensor(some, requires_grad=True) for some in (CHOSEN, REJECTED))
    given = torch.tensor(margin) if isinstance(margin, list) else margin
    loss = losses.bradley_terry_loss(chosen, rejected, given, center)
    triples = list(zip(CHOSEN, REJECTED, each, strict=True))
    by_hand = sum(math.log(1 + math.exp(-(c - r - m))) for c, r, m in triples) / 4
    by_hand += center * sum((c + r) ** 2 for c, r, _ in triples) / 4
    assert loss.shape == () and loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    pull = [(1 - sigmoid(c - r - m)) / 4 for c, r, m in triples]
    middle = [2 * center * (c + r) / 4 for c, r, _ in triples]
    assert chosen.grad.tolist() == pytest.approx([-p + m for p, m in zip(pull, middle, strict=True)], rel=1e-5)
    assert rejected.grad.tolist() == pytest.approx([p + m for p, m in zip(pull, middle, strict=True)], rel=1e-5)


def test_bradley_terry_in_numbers() -> None:
    """One pair worked out: 1.5 against 0.5, margin 0.5, centring 0.01: log(1 + e^-0.5) + 0.01 * 2^2."""
    loss = losses.bradley_terry_loss(torch.tensor([1.5]), torch.tensor([0.5]), 0.5, 0.01)
    assert loss.item() == pytest.approx(0.474077 + 0.04, abs=1e-6)
    assert losses.bradley_terry_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("margin", [1.0, 0.3, MARGINS], ids=["1", "0.3", "a margin each"])
def test_margin_ranking_by_hand(margin: float | list[float]) -> None:
    """max(0, margin - (chosen - rejected)), with a gradient of -1 / B only for pairs that are not far enough apart."""
    each = margin if isinstance(margin, list) else [margin] * 4
    chosen, rejected = (torch.tensor(some, requires_grad=True) for some in (CHOSEN, REJECTED))
    given = torch.tensor(margin) if isinstance(margin, list) else margin
    loss = losses.margin_ranking_loss(chosen, rejected, given)
    gaps = [m - (c - r) for c, r, m in zip(CHOSEN, REJECTED, each, strict=True)]
    assert loss.item() == pytest.approx(sum(max(0.0, gap) for gap in gaps) / 4)
    if not isinstance(margin, list):
        theirs = F.margin_ranking_loss(torch.tensor(CHOSEN), torch.tensor(REJECTED), torch.ones(4), margin)
        assert loss.item() == pytest.approx(theirs.item())
    loss.backward()
    assert chosen.grad.tolist() == [-0.25 if gap > 0 else 0.0 for gap in gaps]
    assert rejected.grad.tolist() == [0.25 if gap > 0 else 0.0 for gap in gaps]


def test_losses_far_out_and_in_low_precision() -> None:
    """A thousand apart in the wrong order is a loss of a thousand, not infinity; differences are taken in float32."""
    far, near = torch.tensor([500.0], requires_grad=True), torch.tensor([-500.0])
    wrong = losses.bradley_terry_loss(near, far)
    assert wrong.item() == 1000
    wrong.backward()
    assert far.grad.item() == 1
    assert losses.bradley_terry_loss(far, near).item() == 0
    low = [torch.tensor(some, dtype=torch.bfloat16) for some in CHOSEN_AND_REJECTED_LOW]
    for loss in (
        losses.bradley_terry_loss(*low, 0.001, 0.01),
        losses.margin_ranking_loss(*low, 0.001),
    ):
        assert loss.dtype == torch.float32
    exact = losses.margin_ranking_loss(*(some.float() for some in low), 0.001)
    assert losses.margin_ranking_loss(*low, 0.001).item() == exact.item()


CHOSEN_AND_REJECTED_LOW = ([2.015625, 1.0], [2.015625, 1.5])


def test_shapes_that_would_be_spread_are_refused() -> None:
    """(B,) beside (B, 1) would be (B, B): every response against every other one."""
    for chosen, rejected, margin in (
        (torch.zeros(4, 1), torch.zeros(4), 1.0),
        (torch.zeros(4), torch.zeros(4, 1), 1.0),
        (torch.zeros(4, 1), torch.zeros(4, 1), 1.0),
        (torch.zeros(4), torch.zeros(1), 1.0),
        (torch.zeros(4), torch.tensor(0.0), 1.0),
        (torch.zeros(4), torch.zeros(4), torch.zeros(4, 1)),
        (torch.zeros(4), torch.zeros(4), torch.zeros(1)),
        (torch.tensor(0.0), torch.tensor(0.0), 1.0),
    ):
        for loss in (losses.bradley_terry_loss, losses.margin_ranking_loss):
            with pytest.raises(ValueError, match=r"\(B,\)"):
                loss(chosen, rejected, margin)
    scalar = losses.bradley_terry_loss(torch.ones(2), torch.zeros(2), torch.tensor(0.5))
    assert scalar.item() == losses.bradley_terry_loss(torch.ones(2), torch.zeros(2), 0.5).item()


# === lesson2_encoder.py and lesson3_losses.py ===


@BOTH
@torch.no_grad()
def test_lesson2_by_hand_is_by_hand(causal: bool) -> None:
    """Its loops against this file's, and its masks against their definition."""
    judge = make_judge(causal)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        states = states_by_hand(judge, prompt + response)[len(prompt) :]
        expected = judge.head(states[-1] if causal else states.mean(dim=0)).item()
        assert lesson2.reward_by_hand(judge, prompt, response) == pytest.approx(expected, abs=2e-5)
    masks = lesson2.masks_by_hand([True, True, True, False])
    assert masks["encoder"].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert masks["causal"].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_lesson2_damages_one_sentence_and_no_word(bpe: BPETokenizer) -> None:
    """The rejected response has the same words, in one sentence in another order, and the spans say which."""
    for some in lesson2.make_pairs(12, 0, False, bpe):
        right, wrong = (bpe.decode(ids) for ids in (some.pair.chosen, some.pair.rejected))
        assert right != wrong and sorted(right.split()) == sorted(wrong.split())
        assert some.pair.chosen[-1] == some.pair.rejected[-1] == data.chat_tokens(bpe)[2]
        pieces = [bpe.decode(some.pair.rejected[start:end]) for start, end in some.spans]
        assert "".join(pieces) == wrong and len(pieces) == 4
        assert [piece in right for piece in pieces] == [i != some.where for i in range(4)]


@pytest.mark.slow
def test_lesson2_runs(tmp_path: Path) -> None:
    """The whole script; what it says of masks, of changed tokens and of padding holds at any size."""
    result = run_script("part7_reward/lesson2_encoder.py", "--smoke", env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*/metrics.json")
    assert file.with_name("encoder.png").stat().st_size > 10_000
    metrics = json.loads(file.read_text())
    assert metrics["see_all_encoder"] == 14 and metrics["see_all_causal"] == 1
    assert metrics["notice_encoder_prompt"] == metrics["notice_encoder_response"] == 1
    assert metrics["notice_causal_prompt"] == metrics["notice_causal_response"] == 0
    for name in ("encoder", "causal"):
        assert metrics[f"difference_{name}"] < 1e-4
        for side in ("of_the_batch", "64_right", "64_left"):
            assert metrics[f"moved_{name}_right_{side}"] < 1e-4
            assert metrics[f"moved_{name}_all_of_the_row_is_pooled_{side}"] > 0.1
            seen = metrics[f"moved_{name}_padding_is_seen_{side}"]
            assert seen < 1e-4 if name == "causal" and side != "64_left" else seen > 0.1
    assert metrics["moved_by_encoding_anew"] > 0.01


def test_lesson3_recovers_the_ranking() -> None:
    """With each loss; distances with Bradley-Terry alone; the mean where it began, or at 0 with centring."""
    config, truth = lesson3.Config(n_pairs=3000, steps=300, n_seeds=1), torch.linspace(-2, 2, 12)
    metrics, found = lesson3.recover(config, truth)
    for name in lesson3.LOSSES:
        key = lesson3.key_of(name)
        assert found[name].shape == (1, 12)
        if key == "ranking_margin_0":
            assert metrics[f"slope_{key}"] == 0 and (found[name] == 1).all()  # equal scores, and no gradient
            continue
        assert metrics[f"tau_{key}"] > 0.9
        assert metrics[f"mean_{key}"] == pytest.approx(0 if "centred" in key else 1, abs=0.02)
    slopes = {key: metrics[f"slope_{key}"] for key in map(lesson3.key_of, lesson3.LOSSES)}
    assert slopes["bradley_terry"] == pytest.approx(1, abs=0.1)
    assert slopes["margin_difference"] == pytest.approx(slopes["bradley_terry"] + 1, abs=0.02)  # they add up exactly
    assert slopes["margin_1"] > 1.3
    assert slopes["centred_0.1"] < slopes["centred_0.01"] < slopes["bradley_terry"]
    assert slopes["ranking_margin_3"] == pytest.approx(3 * slopes["ranking_margin_1"], rel=0.1)


def test_lesson3_scores_without_noise_grow_only_in_bradley_terry() -> None:
    """The ranking loss stops at its margin: 11 steps of 1 between 12 items; Bradley-Terry never stops."""
    metrics = lesson3.grow(torch.linspace(-2, 2, 12), (200, 2000))
    assert metrics["distance_bradley_terry_2000"] > 1.3 * metrics["distance_bradley_terry_200"]
    for n in (200, 2000):
        assert 10.5 < metrics[f"distance_ranking_margin_1_{n}"] < 13
    assert metrics["distance_centred_0.01_2000"] == pytest.approx(metrics["distance_centred_0.01_200"], rel=0.02)


def test_lesson3_means_by_prompt() -> None:
    """They stay where they began, whatever the truth, and are near 0 with centring."""
    metrics, _ = lesson3.center_groups(lesson3.Config(steps=300))
    for prompt in range(1, 5):
        began, key = metrics[f"mean_where_they_began_prompt{prompt}"], f"prompt{prompt}"
        for loss in ("bradley_terry", "ranking_margin_1"):
            assert metrics[f"mean_{loss}_{key}"] == pytest.approx(began, abs=1e-3)
        assert abs(metrics[f"mean_centred_0.1_{key}"]) < 0.1
        assert abs(metrics[f"mean_truth_{key}"]) >= 1


def test_lesson3_kendall_and_judge() -> None:
    """Tau by hand, and how often the judge prefers the better of two."""
    assert lesson3.kendall(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 4.0, 6.0])) == pytest.approx(1 / 3)
    choices = lesson3.judge(torch.tensor([0.0, 1.0]), 20_000, 0)
    assert (choices.chosen == 1).float().mean().item() == pytest.approx(sigmoid(1), abs=0.01)
    assert torch.equal(choices.margin, choices.chosen.float() - choices.rejected.float())
    grouped = lesson3.judge(torch.zeros(12), 500, 0, groups=3)
    assert torch.equal(grouped.chosen // 4, grouped.rejected // 4) and (grouped.chosen != grouped.rejected).all()


@pytest.mark.slow
def test_lesson3_runs(tmp_path: Path) -> None:
    """The whole script, with its figure and its metrics."""
    result = run_script("part7_reward/lesson3_losses.py", "--smoke", env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("*/metrics.json")
    assert file.with_name("losses.png").stat().st_size > 10_000
    metrics = json.loads(file.read_text())
    assert metrics["loss"] == pytest.approx(metrics["loss_by_hand"])
    assert metrics["pull_bradley_terry_at_0"] == 0.5 and metrics["pull_ranking_margin_1_at_2"] == 0
    assert metrics["pull_bradley_terry_at_20"] == pytest.approx(sigmoid(-20), rel=1e-3)


# === training ===


@pytest.fixture(scope="module")
def base(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model that could answer, with dropout, so that random states matter."""
    return save(tmp_path_factory.mktemp("base") / "best.pt", small_model(bpe, dropout=0.2), bpe)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a data set that can be learned: a sentence, and the same with the letters of each word in disorder."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for text in stories.documents(150, 0, held_out=False):
        words = text.split()[:8]
        worse = ["".join(rng.sample(word, len(word))) for word in words]
        lines.append({"prompt": f"Say {len(lines)}.", "chosen": " ".join(words), "rejected": " ".join(worse)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


TINY = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "eval_every": 4, "save_every": 4, "log": "none"}
TINY |= {"device": "cpu", "dtype": "float32", "n_prompts": 5, "eval_prompts": 3}


def run(out: Path, base: Path, **settings: object) -> dict[str, object]:
    """Train in this process, and return the last checkpoint."""
    train.train(train.Config(out=out, base=base, **(TINY | settings)), devices.Processes(), CPU)
    return checkpoint.read_checkpoint(out / "latest.pt")


def some_pairs(bpe: BPETokenizer, n_prompts: int = 6, n: int = 3) -> list[Pair]:
    """All pairs of n random answers of different lengths to each of some prompts."""
    rng = random.Random(1)
    found = []
    for p in range(n_prompts):
        prompt = data.encode_prompt((f"Prompt {p}.",), bpe, 40)
        answers = [[rng.randrange(3, 300) for _ in range(rng.randint(2, 20))] for _ in range(n)]
        for chosen, rejected in itertools.combinations(answers, 2):
            found.append(Pair(prompt, chosen, rejected, rng.uniform(-1, 1), 0.8, f"Prompt {p}."))
    return found


# === surprise ===


@pytest.mark.parametrize("shape", SHAPES)
def test_surprise_by_hand(shape: str) -> None:
    """It is -log p of each token of a response under the language model alone, row by row; 0 elsewhere."""
    trunk = make_trunk(shape)
    alone = copy.deepcopy(trunk).eval()
    judge = RewardModel(trunk, PAD, surprise=True)
    prompts, responses = [[5, 6, 7], [8]], [[10, 11, 12, 13], [14, 15]]
    idx, mask = data.collate_responses(prompts, responses, PAD)
    found = judge.surprise(idx, (idx != PAD) | mask, mask)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = [*prompt, *response]
        logp = alone(torch.tensor([ids]))[0][0].log_softmax(-1)
        by_hand = [0.0] * len(prompt) + [-logp[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        expected = torch.tensor(by_hand).clamp(max=reward.MOST_SURPRISE)
        torch.testing.assert_close(found[row, : len(ids)], expected, atol=1e-5, rtol=1e-5)
        assert not found[row, len(ids) :].any()


def test_surprise_has_a_limit() -> None:
    """A token that is thought impossible counts MOST_SURPRISE and no more."""
    trunk = make_trunk("plain")
    with torch.no_grad():
        trunk.wte.weight.mul_(100)
    judge = RewardModel(trunk, PAD, surprise=True)
    idx, mask = data.collate_responses([[5, 6]], [[7, 8, 9]], PAD)
    assert judge.surprise(idx, idx != PAD, mask).max() == reward.MOST_SURPRISE


@pytest.mark.parametrize("causal", [False, True])
def test_what_surprise_adds(causal: bool) -> None:
    """The price of its mean, and something to each token's vector; padding on either side changes nothing."""
    torch.manual_seed(0)
    judge = RewardModel(make_trunk("plain"), PAD, causal, surprise=True).eval()
    idx, mask = data.collate_responses([[5, 6, 7], [8]], [[10, 11, 12], [13, 14]], PAD)
    before = judge(idx, mask)
    left = [F.pad(some, (3, 0), value=fill) for some, fill in ((idx, PAD), (mask, False))]
    torch.testing.assert_close(judge(*left), before, atol=1e-5, rtol=1e-5)
    mean = judge.surprise(idx, (idx != PAD) | mask, mask).sum(dim=1) / mask.sum(dim=1)
    with torch.no_grad():
        judge.price.add_(2.0)
        torch.testing.assert_close(judge(idx, mask), before - 2 * mean)
        torch.testing.assert_close(checks.surprise_alone(judge)(idx, mask), judge.head.bias - judge.price * mean)
        judge.price.zero_()
        told, plainly = judge(idx, mask), copy.deepcopy(judge)
        nats, plainly.writer = judge.surprise(idx, (idx != PAD) | mask, mask), None
        add = plainly.trunk.wte.register_forward_hook(lambda *args: args[-1] + nats[..., None] * judge.surprised)
        torch.testing.assert_close(plainly(idx, mask), told)  # what the trunk reads are its vectors and nats times u
        add.remove()
        assert not torch.allclose(plainly(idx, mask), told)
        judge.surprised.zero_()
    judge.writer, plain = None, judge(idx, mask)
    torch.testing.assert_close(judge(idx, mask), plain)  # without both, the model is one that knows of no surprise
    assert not torch.allclose(plain, before)


def test_the_writer_stays_as_it_was(bpe: BPETokenizer) -> None:
    """A frozen copy with its lm_head and without dropout, whatever the trunk learns."""
    judge = RewardModel(small_model(bpe, dropout=0.5), PAD, surprise=True).train()
    kept = copy.deepcopy(judge.writer.state_dict())
    assert not any(parameter.requires_grad for parameter in judge.writer.parameters())
    optimizers = optim.make_optimizers(judge, "adamw", 0.1, 0.02, 0.1, (0.9, 0.99))
    idx, mask = data.collate_responses([[5, 6, 7], [8]], [[10, 11, 12], [13, 14]], PAD)
    judge(idx, mask).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(kept[name].equal(value) for name, value in judge.writer.state_dict().items())
    assert judge.surprised.grad.abs().sum() > 0 and judge.price.grad.abs() > 0
    first, second = (judge.surprise(idx, idx != PAD, mask) for _ in range(2))
    assert first.equal(second)


def test_what_surprises_is_shown(capsys: pytest.CaptureFixture, bpe: BPETokenizer) -> None:
    """Each token above the limit with its nats; and the accuracy of surprise alone."""
    judge = RewardModel(small_model(bpe), bpe.special_tokens["<|pad|>"], surprise=True).eval()
    ids, prompts = bpe.encode("The lamp was red."), [bpe.encode("A lamp."), bpe.encode("A red boat, and more.")]
    some = [Pair(prompts[0], ids, ids[:2]), Pair(prompts[1], ids[:3], ids)]
    found = check_reward.show_surprise(judge, bpe, prompts, ids, some)
    printed = " ".join(capsys.readouterr().out.split())
    idx, mask = data.collate_responses([prompts[1]], [ids], judge.pad)
    nats = judge.surprise(idx, idx != judge.pad, mask)[mask].tolist()
    assert min(nats) > check_reward.SURPRISING  # a model that has learned nothing expects nothing
    text = "".join(f"{bpe.decode([token])}[{s:.1f}]" for token, s in zip(ids, nats, strict=True))
    assert f"another (mean {np.mean(nats):.2f}): {text}" in printed
    rewards = [
        -judge.surprise(*asked_alone(judge, pair.prompt, side)).sum() / len(side) for pair in some for side in pair[1:3]
    ]
    expected = np.mean([(1 + np.sign((a - b).item())) / 2 for a, b in zip(rewards[::2], rewards[1::2], strict=True)])
    assert found == expected and f"surprise alone, without what was learned of pairs: accuracy {found:.3f}" in printed


def asked_alone(
    judge: RewardModel, prompt: list[int], ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What judge.surprise takes, of one answer."""
    idx, mask = data.collate_responses([prompt], [ids], judge.pad)
    return idx, idx != judge.pad, mask


# === batches of pairs ===


def test_batch_by_hand() -> None:
    """Chosen and rejected, ids and mask; margins; and each answer once."""
    same = [4, 5, 6]
    some = [Pair([1, 2], [3], same, 0.5), Pair([1, 2], same, [7], -0.5)]
    x, y = pairs.to_batch(some, 0, 1.0, 2.0)
    assert x[0, 0].tolist() == [[1, 2, 3, 0, 0], [0, 0, 1, 0, 0]]
    assert x[0, 1].tolist() == x[1, 0].tolist() == [[1, 2, 4, 5, 6], [0, 0, 1, 1, 1]]
    assert x[1, 1].tolist() == [[1, 2, 7, 0, 0], [0, 0, 1, 0, 0]]
    assert y.tolist() == [2.0, 1.0]  # the scores speak against the second label, so it has no score margin
    idx, mask, place = pairs.answers_of(x)
    assert len(idx) == 3 and mask.dtype == torch.bool
    assert idx[place].tolist() == [[1, 2, 3, 0, 0], [1, 2, 4, 5, 6], [1, 2, 4, 5, 6], [1, 2, 7, 0, 0]]
    assert mask[place].sum(dim=1).tolist() == [1, 3, 3, 1]
    assert pairs.count_tokens(some) == 3 + 5 + 3


def test_order_of_pairs(bpe: BPETokenizer) -> None:
    """Every epoch has each pair once, those of a prompt together, in an order of its own; a seed decides."""
    some = some_pairs(bpe, 8)
    order = pairs.order_pairs(some, 60, 0)
    assert len(order) == 60
    for epoch in (order[:24], order[24:48]):
        assert sorted(epoch) == list(range(24))
        assert len([p for p, _ in itertools.groupby(epoch, lambda i: some[i].text)]) == 8
    assert order[:24].tolist() != order[24:48].tolist()
    assert pairs.order_pairs(some, 60, 0).tolist() == order.tolist() != pairs.order_pairs(some, 60, 1).tolist()
    assert pairs.order_pairs(some, 20, 0).tolist() == order[:20].tolist()
    assert len(pairs.order_pairs(some, 0, 0)) == 0


@pytest.mark.parametrize("kind", ["bradley_terry", "margin"])
def test_loss_and_gradient_of_a_batch(bpe: BPETokenizer, kind: str) -> None:
    """As if each answer of each pair were alone in a batch; whole, or in three micro-batches."""
    judge = RewardModel(small_model(bpe), 0).train()
    some = some_pairs(bpe)
    margins = [0.3 + 0.5 * max(pair.margin, 0) for pair in some]
    loss, center = {"bradley_terry": (losses.bradley_terry_loss, 0.1), "margin": (losses.margin_ranking_loss, 0)}[kind]
    total = 0.0
    for pair, m in zip(some, margins, strict=True):
        c, r = (judge(*data.collate_responses([pair.prompt], [ids], 0)) for ids in (pair.chosen, pair.rejected))
        by_hand = (1 + torch.exp(-(c - r - m))).log() + center * (c + r) ** 2
        total = total + (by_hand if kind == "bradley_terry" else (m - (c - r)).clamp(min=0))[0] / len(some)
    total.backward()
    expected = [parameter.grad.clone() for parameter in judge.parameters()]
    x, y = pairs.to_batch(some, 0, 0.3, 0.5)
    loss = (lambda *args: losses.bradley_terry_loss(*args, center)) if center else loss
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for n_micro in (1, 3):
        judge.zero_grad()

        def loss_of(*args: object) -> torch.Tensor:
            return train.batch_loss(*args, routers=lambda: torch.zeros(()), loss=loss)

        found = optim.accumulate_gradients(judge, loss_of, x, y, n_micro, FLOAT, scaler)
        assert found.item() == pytest.approx(total.item(), abs=1e-6)
        for parameter, gradient in zip(judge.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_each_answer_is_read_once(bpe: BPETokenizer) -> None:
    """In training and in evaluation; what comes out is the reward of each answer alone."""
    judge, some = RewardModel(small_model(bpe), 0).eval(), some_pairs(bpe)
    rows = []
    judge.register_forward_hook(lambda module, args, result: rows.append(len(args[0])))
    found = pairs.pair_rewards(judge, some, batch_size=5)
    assert sum(rows) == 18 and max(rows) == 5  # 6 prompts, 3 answers, 3 pairs each
    for pair, both in zip(some, found.T, strict=True):
        alone = [judge(*data.collate_responses([pair.prompt], [ids], 0)).item() for ids in (pair.chosen, pair.rejected)]
        assert both.tolist() == pytest.approx(alone, abs=1e-6)
    rows.clear()
    train.batch_loss(judge, *pairs.to_batch(some, 0, 0.0, 0.0), FLOAT, lambda: torch.zeros(()))
    assert rows == [18]


def test_evaluation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, equal and wrong; a loss that would overflow otherwise."""
    found = np.array([[1.0, 0.5, 2.0, -2000.0], [0.0, 0.5, 3.0, 0.0]])
    monkeypatch.setattr(train, "pair_rewards", lambda *args: found)
    scores = train.evaluate(None, [])
    assert scores["pair_accuracy"] == 1.5 / 4
    nats = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(1)), 2000.0]
    assert scores["val_loss"] == pytest.approx(sum(nats) / 4)
    assert scores["reward_margin"] == pytest.approx((1 + 0 - 1 - 2000) / 4)
    assert scores["reward_mean"] == pytest.approx(-1993 / 8)
    assert scores["reward_std"] == pytest.approx(math.sqrt(np.mean((found + 1993 / 8) ** 2)))


# === runs ===


def test_run_learns_and_says_so(tmp_path: Path, base: Path, file: Path) -> None:
    """Held-out accuracy rises; the numbers are those of best.pt on the pairs that lie beside it."""
    settings = {"steps": 60, "batch_size": 16, "lr": 5e-3, "n_prompts": 140, "eval_prompts": 20, "eval_every": 20}
    run(tmp_path, base, data=str(file), **settings)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0.9 < metrics["pair_accuracy_after"] == metrics["pair_accuracy"]
    assert metrics["val_loss"] < 0.3 < metrics["val_loss_before"]
    names = {
        "reward_margin",
        "reward_mean",
        "reward_std",
        "tokens_per_second",
        "seconds",
        "sampling_seconds",
    }
    assert names | {"parameters"} <= metrics.keys() and "ceiling" not in metrics
    judge, _ = reward.load_reward_model(tmp_path / "best.pt", CPU)
    held_out = preferences.read_pairs(tmp_path / "pairs" / "held_out.jsonl")
    assert train.evaluate(judge, held_out)["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def test_sampled_pairs_of_a_run(tmp_path: Path, base: Path) -> None:
    """They lie in files, none of the held-out prompts is trained on, and their ceiling is reported."""
    run(tmp_path, base, steps=1)
    training, held_out = (preferences.read_pairs(tmp_path / "pairs" / name) for name in pairs.FILES)
    texts = [{pair.text for pair in some} for some in (training, held_out)]
    assert [len(some) for some in texts] == [5, 3] and not texts[0] & texts[1]
    assert [max(Counter(pair.text for pair in some).values()) for some in (training, held_out)] == [28, 6]
    assert json.loads((tmp_path / "metrics.json").read_text())["ceiling"] == preferences.ceiling(held_out)
    again = run(tmp_path / "again", base, steps=1, data=str(tmp_path / "pairs"))
    assert preferences.read_pairs(tmp_path / "again" / "pairs" / "train.jsonl") == training
    assert again["config"]["base"] == str(base) and again["config"]["causal"] is False


@pytest.mark.parametrize(
    "loss", [{}, {"loss": "margin", "margin": 1.0}, {"center": 0.1}, {"score_margin": 3.0}, {"causal": True}]
)
def test_settings_of_the_loss_change_the_run(tmp_path: Path, bpe: BPETokenizer, base: Path, loss: dict) -> None:
    """Each flag reaches the loss: the first one is as by hand."""
    pairs_folder = tmp_path / "made"
    for name in pairs.FILES:
        preferences.save_pairs(pairs_folder / name, some_pairs(bpe))
    undropped = save(tmp_path / "base.pt", small_model(bpe), bpe)
    found = run(tmp_path / "run", undropped, steps=1, batch_size=18, data=str(pairs_folder), **loss)
    trunk, _ = generate.load_checkpoint(undropped, CPU)
    torch.manual_seed(0)
    judge = RewardModel(trunk, bpe.special_tokens["<|pad|>"], loss.get("causal", False), surprise=True)
    chosen, rejected = pairs.pair_rewards(judge, some_pairs(bpe))
    margins = np.array([max(pair.margin, 0) for pair in some_pairs(bpe)]) * loss.get("score_margin", 0)
    by_hand = np.log1p(np.exp(-(chosen - rejected - margins))) + loss.get("center", 0) * (chosen + rejected) ** 2
    by_hand = np.maximum(1 - (chosen - rejected), 0) if "loss" in loss else by_hand
    assert found["progress"]["train_losses"][0] == pytest.approx(by_hand.mean(), rel=1e-6, abs=1e-6)


def flat(value: object) -> object:
    """Tensors as bytes, so that == compares them bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: flat(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [flat(v) for v in value]
    return value


def assert_same_run(a: dict[str, object], b: dict[str, object]) -> None:
    """Same losses, weights, optimizer and random state, to the last bit."""
    for name in ("step", "train_losses", "val_losses", "accuracies", "before", "pairs"):
        assert a["progress"][name] == b["progress"][name], name
    for name in ("model", "optimizers"):
        assert flat(a[name]) == flat(b[name]), name
    assert flat(a["random"]["torch"]) == flat(b["random"]["torch"])


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "optimizer": "muon", "causal": True}])
def test_half_and_half_equals_whole(
    tmp_path: Path, base: Path, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N steps, and N/2 of them twice, with dropout: bit for bit, with the pairs that lie there; or sampled anew."""
    whole = run(tmp_path / "whole", base, keep=5, **settings)
    assert len(set(whole["progress"]["train_losses"])) == 8
    half, other = tmp_path / "half", tmp_path / "other"
    shutil.copytree(tmp_path / "whole" / "pairs", half / "pairs")
    shutil.copy(tmp_path / "whole" / "step_0000004.pt", half / "latest.pt")
    torch.manual_seed(99)  # the second process has drawn who knows what
    resumed = run(other, base, resume=str(tmp_path / "whole" / "step_0000004.pt"), **settings)  # no pairs there
    assert_same_run(whole, resumed)
    torch.manual_seed(98)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_pairs", lambda *args: pytest.fail("sampled again"))
        assert_same_run(whole, run(half, base, resume="auto", **settings))


def test_resuming_another_run(tmp_path: Path, bpe: BPETokenizer, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pairs are told of; a causal model cannot go on as an encoder; a new run replaces the pairs."""
    said: list[str] = []
    monkeypatch.setattr(train.tqdm, "write", said.append)
    run(tmp_path, base, steps=4)
    lines = (tmp_path / "pairs" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(lines[:-1]))
    assert "unlike before" not in "".join(said)
    run(tmp_path, base, steps=5, resume="auto")
    assert f"    unlike before: the pairs in {tmp_path / 'pairs'}" in said
    with pytest.raises(UserError, match=r"causal False \(this run: True\)"):
        run(tmp_path, base, steps=6, resume="auto", causal=True)
    run(tmp_path, base, steps=1)
    assert (tmp_path / "pairs" / "train.jsonl").read_text() == "".join(lines)


def torchrun(*args: object, timeout: float = 170) -> subprocess.CompletedProcess:
    """Start a script as two processes; if they do not end in time, torchrun is asked to end them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    with subprocess.Popen(
        [*command, *map(str, args)], env=os.environ | QUIET, stdout=-1, stderr=-1, text=True, cwd=ROOT
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_two_processes_equal_one(tmp_path: Path, bpe: BPETokenizer, file: Path, more: list[str]) -> None:
    """With half the batch each, of unequal lengths: the losses of one process and its weights."""
    undropped = save(tmp_path / "base.pt", small_model(bpe), bpe)
    settings = {"data": str(file), "n_prompts": 100, "steps": 6, "lr": 3e-3}
    alone = run(tmp_path / "one", undropped, batch_size=8, **settings)
    flags = [text for name, value in (TINY | settings).items() for text in (f"--{name}", str(value))]
    done = torchrun(ROOT / "part7_reward/train.py", "--base", undropped, "--out", tmp_path / "two", *flags, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best held-out loss") == 1
    both = checkpoint.read_checkpoint(tmp_path / "two" / "latest.pt")
    assert both["progress"]["pairs"] == alone["progress"]["pairs"]
    for name in ("train_losses", "val_losses"):
        a, b = (np.array(some["progress"][name]) for some in (alone, both))
        assert a.shape == b.shape and np.abs(a - b).max() < 1e-5, name
    assert alone["progress"]["train_losses"][0] - alone["progress"]["train_losses"][-1] > 0.01  # it learns
    for name, weights in alone["model"].items():
        torch.testing.assert_close(both["model"][name], weights, atol=1e-3, rtol=0)


# === what cannot be ===


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"n_prompts": 0}, "--n_prompts 0 is not 1 or more"),
        ({"steps": -1}, "--steps -1 is not 0 or more"),
        ({"margin": -0.5}, "--margin -0.5 is not 0 or more"),
        ({"center": math.nan}, "--center nan is not 0 or more"),
        ({"sharpness": -1.0}, "--sharpness -1.0 is not 0 or more"),
        ({"temperatures": (1.0,), "per_temperature": 1}, "one answer makes no pair"),
        ({"temperatures": (1.0, -1.0)}, "one is not 0 or more"),
        ({"loss": "margin"}, "--loss margin: with a margin of 0"),
        ({"loss": "margin", "margin": 1.0, "center": 0.1}, "--center 0.1 belongs to --loss bradley_terry"),
        ({"clip": 0.0}, "--clip 0.0 is not above 0"),
        ({"final_lr": 2.0}, "--final_lr 2.0"),
        ({"out": Path(__file__)}, "is a file"),
    ],
)
def test_settings_with_which_nothing_can_be_trained(settings: dict, problem: str) -> None:
    """Each is named with its value, before a model is looked for."""
    with pytest.raises(UserError, match=re.escape(problem)):
        train.check_settings(train.Config(**settings))
    train.check_settings(train.Config())
    train.check_settings(train.Config(loss="margin", score_margin=1.0, temperatures=(1.0,), per_temperature=2))


def test_folders_that_hold_no_pairs(tmp_path: Path, bpe: BPETokenizer) -> None:
    """None, an empty one, pairs that are too long or of another vocabulary."""
    config, folder = small_model(bpe).config, tmp_path / "pairs"
    folder.mkdir()
    with pytest.raises(UserError, match="no such file of pairs"):
        pairs.read_folder(folder, config)
    good = some_pairs(bpe)
    for wrong, problem in (
        ([], "no pairs in train.jsonl or held_out.jsonl"),
        ([good[0]._replace(chosen=[5] * 81)], r"a pair of \d+ tokens, and the context of --base is 80"),
        ([good[0]._replace(rejected=[400])], "tokens that --base does not know"),
        ([good[0]._replace(prompt=[-1])], "tokens that --base does not know"),
    ):
        preferences.save_pairs(folder / "train.jsonl", good)
        preferences.save_pairs(folder / "held_out.jsonl", wrong)
        with pytest.raises(UserError, match=problem):
            pairs.read_folder(folder, config)
    preferences.save_pairs(folder / "held_out.jsonl", good[:2])
    first = pairs.read_folder(folder, config)
    assert first[:2] == (good, good[:2])
    preferences.save_pairs(folder / "held_out.jsonl", good[:3])
    assert pairs.read_folder(folder, config)[2] != first[2]


def test_answers_that_are_all_equal(tmp_path: Path, base: Path) -> None:
    """Greedy answers are the same twice: no pair is left, and that is said."""
    with pytest.raises(UserError, match="no prompt has two different answers"):
        run(tmp_path, base, temperatures=(0.0, 0.0))


def test_wrong_base(tmp_path: Path, bpe: BPETokenizer, base: Path) -> None:
    """A reward model writes no text, and a language model judges none; a tokenizer without a chat is refused."""
    judge = save(tmp_path / "judge.pt", RewardModel(small_model(bpe), 0), bpe, causal=False, surprise=False)
    with pytest.raises(UserError, match=r"judge.pt: a reward model, which writes no text; give the model"):
        run(tmp_path / "a", judge)
    torch.manual_seed(0)
    letters = tokenizer.ByteTokenizer()
    plain = save(tmp_path / "bytes.pt", small_model(bpe, vocab_size=letters.vocab_size), letters)
    with pytest.raises(UserError, match=r"tokenizer has no <\|user\|>"):
        run(tmp_path / "b", plain)
    other = BPETokenizer.train(stories.documents(50, 1, held_out=False), 400)
    strange = save(tmp_path / "other.pt", small_model(bpe), other)
    config = check_reward.Config(base=strange)
    with pytest.raises(UserError, match=r"--base .*other.pt: another tokenizer than the reward model's"):
        check_reward.load_base(config, str(base), bpe, CPU)
    assert check_reward.load_base(check_reward.Config(), str(base), bpe, CPU).config.dropout == 0.2


@pytest.mark.slow
def test_mistakes_end_in_one_line(tmp_path: Path, base: Path) -> None:
    """With status 2 and without a traceback."""
    for script, args, problem in (
        ("train.py", ["--base", "no.pt"], "no.pt: no such file; train one with python part7_reward/train.py"),
        ("train.py", ["--base", base, "--data", "no.jsonl", "--out", tmp_path / "a"], "--data no.jsonl: no such file"),
        ("train.py", ["--base", base, "--resume", "no.pt", "--out", tmp_path / "b"], "no.pt: no such checkpoint"),
        ("check_reward.py", ["--samples", "2"], "--samples 2 is below 4; give 4 or more"),
        ("check_reward.py", ["--checkpoint", base], f"{base}: a language model, not a reward model"),
    ):
        found = run_script(f"part7_reward/{script}", *args)
        assert found.returncode == 2 and found.stdout == "", found.stderr
        assert found.stderr.startswith(f"error: {problem}") and found.stderr.count("\n") == 1, found.stderr


def test_base_is_made_by_part_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script is what find_checkpoint starts for the base, and this part's own for a reward model."""
    started: list[list[str]] = []

    def start(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(generate.subprocess, "run", start)
    for path, part in ((generate.BASE, "part6_sft"), (generate.RUNS / "best.pt", "part7_reward")):
        found = generate.find_checkpoint(path, smoke=True)
        assert started[-1][1:] == [str(ROOT / part / "train.py"), "--smoke", "--out", str(found.parent)]
    assert (ROOT / "runs" / "part6_sft" / "best.pt", "part7_reward") == (generate.BASE, generate.RUNS.name)


# === checks by hand ===


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_draws(ties: bool) -> None:
    """Every subset of n of 7 answers, the best of each taken; where several are best, their mean."""
    rng = np.random.default_rng(0)
    by = rng.integers(0, 3, (2, 7)).astype(float) if ties else rng.random((2, 7))
    scores = rng.random((2, 7))
    for n in range(1, 8):
        expected = []
        for row_by, row in zip(by, scores, strict=True):
            best = []
            for drawn in itertools.combinations(range(7), n):
                top = max(row_by[i] for i in drawn)
                # Of equal ones any is taken, and by symmetry each as often: the mean of all that rank there.
                best.append(np.mean([row[i] for i in range(7) if row_by[i] == top]))
            expected.append(np.mean(best))
        assert checks.best_of_n(by, scores, n) == pytest.approx(expected)
    assert checks.best_of_n(by, scores, 1) == pytest.approx(scores.mean(axis=1))
    # In numbers: of 1, 2, 3 by rank two are drawn; the best is 3 in two of three draws, else 2.
    assert checks.best_of_n(np.array([[10.0, 30.0, 20.0]]), np.array([[1.0, 3.0, 2.0]]), 2) == pytest.approx([8 / 3])
    many = rng.random((1, 64))
    assert checks.best_of_n(many, many, 64) == pytest.approx([many.max()])
    assert checks.best_of_n(-many, many, 64) == pytest.approx([many.min()])


def test_verdicts() -> None:
    """Inside, outside, on the border, and no number."""
    for value, least, most, verdict, words in (
        (0.5, 0.4, math.inf, "ok", "below 0.400"),
        (0.4, 0.4, math.inf, "ok", "below 0.400"),
        (0.39, 0.4, math.inf, "ALARM", "below 0.400"),
        (0.2, -math.inf, 0.1, "ALARM", "above 0.100"),
        (0.6, 0.45, 0.55, "ALARM", "outside 0.450 to 0.550"),
        (math.nan, 0.4, math.inf, "ALARM", "below 0.400"),
    ):
        check = checks.Check("key", "name", value, least, most)
        assert (check.verdict(), check.alarming()) == (verdict, words)


def test_what_is_done_to_pairs(bpe: BPETokenizer) -> None:
    """Half of the labels change sides; every prompt moves to other pairs, and is cut where it has to be."""
    some = some_pairs(bpe, 40)
    shuffled = checks.shuffle_labels(some, 0)
    swapped = [a.chosen == b.rejected and a.rejected == b.chosen for a, b in zip(some, shuffled, strict=True)]
    assert 40 < sum(swapped) < 80
    assert all(b == a or swap for a, b, swap in zip(some, shuffled, swapped, strict=True))
    exchanged = checks.exchange_prompts(some, 25, 0)
    moved = {}
    for a, b in zip(some, exchanged, strict=True):
        longest = max(len(b.chosen), len(b.rejected))
        assert (b.chosen, b.rejected) == (a.chosen, a.rejected)
        assert b.prompt != a.prompt and len(b.prompt) + longest <= 25
        moved.setdefault(tuple(a.prompt), set()).add(tuple(b.prompt)[-4:])
    assert all(len(new) == 1 for new in moved.values())  # pairs of one prompt stay together
    assert len(set.union(*moved.values())) == len(moved)
    assert any(tuple(b.prompt) not in moved for b in exchanged)  # some were cut


def test_length_by_hand() -> None:
    """Correlation through the origin, whichever answer stands first; and the pairs that are equally long."""
    a, b = np.array([1.0, -2.0, 3.0]), np.array([2.0, 1.0, 2.0])
    assert checks.correlation(a, b) == pytest.approx((2 - 2 + 6) / math.sqrt(14 * 9))
    signs = np.array([1, -1, -1])
    assert checks.correlation(a * signs, b * signs) == pytest.approx(checks.correlation(a, b))
    assert checks.correlation(a, -a) == pytest.approx(-1) and checks.correlation(a, 0 * a) == 0
    some = [Pair([1], [2] * n, [3] * m) for n, m in ((100, 95), (100, 94), (50, 50), (10, 90), (96, 100))]
    assert checks.of_equal_length(some, least=1).tolist() == [0, 2, 4]
    assert checks.of_equal_length(some, least=4).tolist() == [0, 1, 2, 4]
    assert checks.of_equal_length(some, least=30).tolist() == [0, 1, 2, 3, 4]


def test_calibration_by_hand() -> None:
    """Two bins in numbers; and draws from the model's own probabilities, which it may well exaggerate."""
    difference = np.array([1.0, 1.0, -1.0, 5.0, 0.0])
    sure, very, none = (1 / (1 + math.exp(-d)) for d in (1, 5, 0))
    found = checks.calibrate(difference, 2)
    assert found.confidence == pytest.approx([(3 * sure + none) / 4, very]) and found.count.tolist() == [4, 1]
    assert found.right == pytest.approx([2.5 / 4, 1])
    error = (4 * abs((3 * sure + none) / 4 - 2.5 / 4) + (1 - very)) / 5
    assert found.error() == pytest.approx(error)
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 20_000)
    drawn = true * np.where(rng.random(20_000) < 1 / (1 + np.exp(-true)), 1, -1)  # the first of two, or the second
    assert checks.calibrate(drawn).error() < 0.02 < 0.08 < checks.calibrate(4 * drawn).error()


def test_same_order_by_hand() -> None:
    """Six pairs, of which one is turned round and one is equal."""
    a, b = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1.0, 3.0, 2.0, 3.0]])
    assert checks.same_order(a, b) == 4 / 5
    assert checks.same_order(a, a) == 1 and checks.same_order(a, -a) == 0
    assert math.isnan(checks.same_order(a, 0 * a))


def test_interval_is_that_of_part_6() -> None:
    """Copied to the byte."""
    assert inspect.getsource(checks.bootstrap_interval) == inspect.getsource(load(6, "text_scores").bootstrap_interval)


def test_search_climbs(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge who counts even ids: each round is at least as good, for each prompt, and no word is a special token."""

    def count_even(judge: object, prompts: list[list[int]], answers: list[list[int]]) -> np.ndarray:
        return np.array([sum(i % 2 == 0 for i in answer) for answer in answers])

    monkeypatch.setattr(checks, "rewards", count_even)
    special, end = set(bpe.special_tokens.values()), bpe.special_tokens["<|end|>"]
    before = None
    for rounds in (0, 1, 5, 40, 120, 121, 122, 123):
        found, value = checks.find_gibberish(None, bpe, [[1], [2]], 30, rounds, 8, 0)
        assert [len(answer) for answer in found] == [30, 30] and found[0] != found[1]
        assert all(answer[-1] == end and not special & set(answer[:-1]) for answer in found)
        assert value.tolist() == [sum(i % 2 == 0 for i in answer) for answer in found]
        assert before is None or (value >= before).all()
        before = value
    assert before.min() > 22


# === check_reward.py ===


def answer_of(good: bool, rng: random.Random) -> list[int]:
    """Twelve ids, even ones if it is a good answer, and no special token among them: random weights do not know."""
    return [2 * rng.randrange(150) + (0 if good else 1) for _ in range(12)]


@pytest.fixture(scope="module")
def even_and_odd(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pairs of a good and a bad answer to a story's prompt."""
    folder, rng = tmp_path_factory.mktemp("even"), random.Random(0)
    for file, held_out, n in (("train.jsonl", False, 200), ("held_out.jsonl", True, 100)):
        found = []
        for asked in preferences.story_prompts(n, 0, held_out):
            prompt = data.encode_prompt((asked.prompt,), bpe, 60)
            found.append(Pair(prompt, answer_of(True, rng), answer_of(False, rng), 1.0, 0.99, asked.prompt))
        preferences.save_pairs(folder / file, found)
    return folder


def pretend_to_write(monkeypatch: pytest.MonkeyPatch, bpe: BPETokenizer) -> None:
    """Answer with the gold story and even ids, every second time with its words in disorder and odd ids."""
    gold, rng = {asked.prompt: asked.response for asked in preferences.story_prompts(8, 1, True)}, random.Random(0)

    def respond(base: object, _: object, prompts: list[str], *args: object, **how: object) -> list:
        found = []
        for n, prompt in enumerate(prompts):
            words = gold[prompt].split()
            text = " ".join(rng.sample(words, len(words))) if n % 2 else gold[prompt]
            found.append(generate.Response(text, answer_of(n % 2 == 0, rng), True))
        return found

    monkeypatch.setattr(check_reward, "respond", respond)


def verdicts(printed: str) -> dict[str, str]:
    """The beginning of each check's name -> its verdict."""
    lines = [line for line in printed.splitlines() if line.endswith((" ok", " ALARM"))]
    return {re.split(r"[,\[]", line[:62])[0].strip(): line.split()[-1] for line in lines}


def test_checks_tell_knowledge_from_none(
    tmp_path: Path,
    bpe: BPETokenizer,
    even_and_odd: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A model with random weights sets off the alarms; one that has learned what is good does not."""
    pretend_to_write(monkeypatch, bpe)
    writer = save(tmp_path / "base.pt", small_model(bpe, block_size=128), bpe)
    settings = {"data": str(even_and_odd), "batch_size": 16, "lr": 1e-2, "eval_every": 20}
    found = {}
    for name, steps in (("random", 0), ("trained", 100)):
        run(tmp_path / name, writer, steps=steps, **settings)
        config = check_reward.Config(checkpoint=tmp_path / name / "best.pt", prompts=8, samples=16, rounds=2)
        capsys.readouterr()
        check_reward.main(check_reward.replace(config, out=tmp_path / name / "checks", device="cpu"))
        printed = capsys.readouterr().out
        found[name] = verdicts(printed)
        metrics = json.loads((tmp_path / name / "checks" / "metrics.json").read_text())
        assert all(type(value) in (int, float) and math.isfinite(value) for value in metrics.values())
        assert metrics["alarms"] == list(found[name].values()).count("ALARM")
        assert f"{metrics['alarms']} of {len(found[name])} checks alarm" in printed
        assert metrics["ideal_best_of_16"] == pytest.approx(1) and 0.4 < metrics["best_of_1"] < 0.8
        assert (tmp_path / name / "checks" / "checks.png").stat().st_size > 10_000
    assert len(found["random"]) == len(found["trained"]) >= 11
    for name in ("accuracy on held-out pairs", "best of 16 against one", "correlation with the rule score"):
        assert (found["random"][name], found["trained"][name]) == ("ALARM", "ok"), name
    # Pairs in which only the answer decides do not teach anybody to read the prompt.
    assert found["trained"]["the same with prompts exchanged"] == "ALARM"
    assert metrics["best_of_n_gain"] == pytest.approx(metrics["best_of_16"] - metrics["best_of_1"])


def test_checks_of_a_data_set(tmp_path: Path, base: Path, file: Path, capsys: pytest.CaptureFixture) -> None:
    """Nobody knows the ceiling, and there are no rules: the other checks are done, without the base model."""
    run(tmp_path, base, data=str(file), n_prompts=140, eval_prompts=20, steps=1)
    (tmp_path / "moved").mkdir()
    alone = shutil.copy(tmp_path / "best.pt", tmp_path / "moved")
    with pytest.raises(UserError, match="has no folder pairs beside it; give --data"):
        check_reward.main(check_reward.Config(checkpoint=Path(alone)))
    config = check_reward.Config(checkpoint=Path(alone), data=str(file), rounds=1, out=tmp_path / "checks")
    check_reward.main(config)
    printed = capsys.readouterr().out
    found = verdicts(printed)
    assert {"accuracy on held-out pairs", "chosen answers before rejected ones"} <= found.keys() and len(found) == 8
    assert "no checks that need rules" in printed and "best of" not in printed and "below 0.600" in printed
    assert "ceiling" not in json.loads((tmp_path / "checks" / "metrics.json").read_text())


def test_the_same_asked_in_other_words() -> None:
    """Another prompt with the same facts."""
    for asked in preferences.story_prompts(20, 1, True):
        prompt = checks.reword(asked, 0)
        assert prompt != asked.prompt
        assert all(value in prompt for value in asked.asked.values())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "check_reward.py"])
def test_smoke(script: str, tmp_path: Path) -> None:
    """From nothing, in a temporary folder."""
    done = run_script(f"part7_reward/{script}", "--smoke", env={"TMPDIR": str(tmp_path)}, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    said = {"train.py": "wrote pairs", "check_reward.py": "checks alarm"}
    assert "learning_curve.png" in done.stdout and said[script] in done.stdout


@pytest.mark.slow
def test_the_base_still_writes(base: Path) -> None:
    """generate.py streams text of a language model."""
    done = run_script("part7_reward/generate.py", "--checkpoint", base, "--prompt", "One day", "--max_new_tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("One day"), done.stderr
