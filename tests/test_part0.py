"""Part 0: the story of lesson 1 in numbers, predictions of lesson 2 against torch's counters, comparing parts."""

import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from conftest import load, run_script

pipeline = load(0, "lesson1_pipeline")
environment = load(0, "lesson2_environment")
compare_parts = load(0, "compare_parts")

SCRIPT = "part0_foundations/compare_parts.py"


# --- lesson 1: the pipeline ---


@pytest.fixture(scope="module")
def stories() -> list[dict[str, float]]:
    """The numbers of three seeds, at the lesson's own settings: about 15 seconds."""
    return [pipeline.story(pipeline.Config(), seed)[0] for seed in range(3)]


def test_pretraining_reaches_the_counted_optimum(stories: list[dict[str, float]]) -> None:
    """The first loss is ln V, the last that of the counted table."""
    for story in stories:
        assert story["pretrain_loss_before"] == pytest.approx(math.log(pipeline.V), abs=1e-5)
        assert story["pretrain_loss_after"] == pytest.approx(story["pretrain_loss_counted"], abs=0.003)
        assert story["pretrain_loss_counted"] < 1.4


def test_counted_loss_is_the_entropy_of_the_grammar(stories: list[dict[str, float]]) -> None:
    """A sentence's choices, but for the pronoun, are all that a table must pay for; it loses by what it forgets."""
    # ln of the number of ways: name, verb, article, 0 to 2 adjectives, noun, clause or not, adjective of the clause
    nats = 3 * math.log(4) + math.log(2) + math.log(3) + math.log(4) + math.log(2) + 0.5 * math.log(4)
    words = 1 + 1 + 1 + 1 + 1 + 0.5 * 4 + 1
    for story in stories:
        assert nats / words + 0.1 < story["pretrain_loss_counted"] < nats / words + 0.3


def test_instructions_are_learned_and_the_mask_helps(stories: list[dict[str, float]]) -> None:
    """After tuning the model obeys; without the mask it obeys less, and its responses are worse."""
    for story in stories:
        assert story["sft_obeys_before"] < 0.05
        assert story["sft_obeys_after"] > 0.85
        assert story["sft_obeys_without_mask"] < story["sft_obeys_after"] - 0.15
        assert story["sft_loss_after"] < story["sft_loss_without_mask"] - 0.05 < story["sft_loss_before"]


def test_reward_model_learns_below_the_ceiling(stories: list[dict[str, float]]) -> None:
    """Half right before; after, better, and not better than the reader's own score, but for chance."""
    for story in stories:
        assert story["reward_accuracy_before"] == 0.5
        assert 0.6 < story["reward_accuracy_after"] < story["reward_accuracy_ceiling"] + 0.01
        assert 0.64 < story["reward_accuracy_ceiling"] < 0.7


def test_policy_gradient_raises_both_scores_on_the_leash(stories: list[dict[str, float]]) -> None:
    """What the leash costs is earned back, the true score rises too, and the model stays near."""
    beta = pipeline.Config().beta
    for story in stories:
        assert story["rl_kl_before"] == 0
        assert 0.2 < story["rl_kl_after"] < 1
        assert story["rl_reward_after"] - beta * story["rl_kl_after"] > story["rl_reward_before"] + 0.15
        assert story["rl_true_after"] > story["rl_true_before"] + 0.15


def test_cutting_the_leash_hacks_the_reward(stories: list[dict[str, float]]) -> None:
    """The reward model is delighted, and the reader is not."""
    for story in stories:
        assert story["rl_kl_cut"] > story["rl_kl_after"] + 10
        assert story["rl_reward_cut"] > story["rl_reward_after"] + 3
        assert story["rl_true_cut"] < story["rl_true_before"] - 5


def words_to_ids(text: str) -> torch.Tensor:
    """Words -> (T,)."""
    return torch.tensor([pipeline.ID[word] for word in text.split()])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("mia saw the happy dog .", 4),
        ("mia saw the dog .", 2),
        ("tom hugged a happy old cat and he was happy .", 3),
        ("mia saw the dog . tom saw the dog .", 0),
        ("mia . saw the happy dog", 2),
        ("happy happy happy", 0),
        ("mia saw the dog", 0),
        ("", 0),
    ],
)
def test_true_score_by_hand(text: str, score: float) -> None:
    """Two for one sentence that ends, two for one happy word, one less for each further; rows do not mix."""
    ids = words_to_ids(text + " <end>" * (16 - len(text.split())))
    other = words_to_ids("happy " * 16)
    assert pipeline.true_score(torch.stack([ids, other])).tolist() == [score, 2 - 15]


def test_bigram_loss_and_probability_by_hand() -> None:
    """log_prob adds what next_token_loss averages, stops at the first <end>, and -100 does not count."""
    table = torch.randn(pipeline.V, pipeline.V)
    ids = words_to_ids("mia saw <end> <end>")[None]  # (1, 4)
    start, mask = words_to_ids("MIA"), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    path = words_to_ids("MIA mia saw <end>").tolist()
    by_hand = sum((table[i].exp()[j] / table[i].exp().sum()).log() for i, j in itertools.pairwise(path))
    assert pipeline.log_prob(table, start, ids, mask).item() == pytest.approx(by_hand.item(), abs=1e-5)
    x, y = torch.tensor([path]), torch.tensor([[*path[1:], pipeline.IGNORE]])
    assert pipeline.next_token_loss(table, x, y).item() == pytest.approx(-by_hand.item() / 3, abs=1e-5)


def test_samples_stop_at_the_first_end() -> None:
    """The mask covers <end> itself and nothing after it, where only <end> stands."""
    ids, mask = pipeline.sample(torch.zeros(pipeline.V, pipeline.V), torch.zeros(500, dtype=torch.long))
    for row, kept in zip(ids.tolist(), mask.sum(dim=1).int().tolist(), strict=True):
        end = row.index(pipeline.END) if pipeline.END in row else len(row) - 1
        assert kept == end + 1
        assert set(row[end + 1 :]) <= {pipeline.END}


def test_samples_follow_the_table() -> None:
    """The second word is drawn from the row of the first: here every word is followed by the next of the vocabulary."""
    table = torch.full((pipeline.V, pipeline.V), -1e9)
    table[torch.arange(pipeline.V - 1), torch.arange(1, pipeline.V)] = 0.0
    ids, mask = pipeline.sample(table, torch.tensor([0, pipeline.V - 4]))
    assert ids[0].tolist() == list(range(1, pipeline.MAX_NEW + 1))
    assert ids[1, :4].tolist() == [pipeline.V - 3, pipeline.V - 2, pipeline.V - 1, pipeline.END]
    assert mask.sum(dim=1).tolist() == [pipeline.MAX_NEW, 3]


def test_instruction_masks_cover_the_prompt_only() -> None:
    """Masked targets are the response with <end>; unmasked ones the whole row, shifted by one."""
    x, y, masked = pipeline.instructions(pipeline.random.Random(0), 20)
    for inputs, targets, answers in zip(x, y, masked, strict=True):
        n = int((targets != pipeline.IGNORE).sum())
        assert torch.equal(inputs[1:n], targets[: n - 1])
        assert (answers[:5] == pipeline.IGNORE).all()  # tell the old dog about MIA: five targets lie in the prompt
        assert torch.equal(answers[5:], targets[5:])
        assert targets[n - 1] == pipeline.END
        assert (targets[n:] == pipeline.IGNORE).all()
        assert pipeline.VOCAB[targets[4]].lower() == pipeline.VOCAB[answers[5]]


def test_preferences_are_bradley_terry() -> None:
    """A gap of g: the better one is chosen with probability sigmoid(g); words and scores have the same sign."""
    torch.manual_seed(0)
    table = torch.full((pipeline.V, pipeline.V), -1e9)
    table[:, pipeline.END] = 0.0
    happy, small = pipeline.ID["happy"], pipeline.ID["small"]
    for start in ("MIA", "ADA", "TOM", "BEN"):  # says one word, happy (+2) or small (0), and ends
        table[pipeline.ID[start]] = -1e9
        table[pipeline.ID[start], [happy, small]] = 0.0
    words, margin = pipeline.preferences(table, 8000)
    differs = margin != 0
    assert torch.equal(margin, 2 * words[:, happy])  # words chosen minus words rejected
    assert torch.equal(words[:, small], -words[:, happy])
    assert differs.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (margin[differs] > 0).float().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    loss = pipeline.reward_loss(torch.zeros(pipeline.V), words).item()
    assert loss == pytest.approx(math.log(2), abs=1e-6)


def test_policy_loss_has_the_gradient_of_the_objective() -> None:
    """One word, happy or not, then the end: the gradient is that of reward - beta KL, which is known in closed form."""
    torch.manual_seed(0)
    happy, small, beta = pipeline.ID["happy"], pipeline.ID["small"], 0.7
    sft = torch.full((pipeline.V, pipeline.V), -1e9)
    sft[:, pipeline.END] = 0.0
    sft[pipeline.ID["MIA"] : pipeline.ID["MIA"] + 4, pipeline.END] = -1e9
    sft[pipeline.ID["MIA"] : pipeline.ID["MIA"] + 4, [happy, small]] = 0.0
    table, weight = sft.clone(), torch.zeros(pipeline.V)
    table[pipeline.ID["MIA"] : pipeline.ID["MIA"] + 4, happy] = 1.0
    weight[happy] = 2.0
    table.requires_grad_()
    got = sum(
        torch.autograd.grad(pipeline.policy_loss(table, sft, weight, beta), table)[0][:, happy].sum()
        for _ in range(400)
    )
    logits = torch.tensor([1.0, 0.0], requires_grad=True)
    p = logits.softmax(dim=0)
    (2.0 * p[0] - beta * (p * (p / 0.5).log()).sum()).backward()
    assert got.item() / 400 == pytest.approx(-logits.grad[0].item(), rel=0.05)


# --- lesson 2: the environment ---


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch_size": 3, "block_size": 32, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 64},
        {"n_head": 8, "n_layer": 1, "n_embd": 32},
    ],
)
def test_predictions_equal_torch_s_counters(sizes: dict[str, int]) -> None:
    """Parameters, gradients, Adam and arithmetic to the byte and the operation; activations within one percent."""
    config = replace(environment.Config(), **sizes, smoke=True)
    predicted, (measured, _) = environment.predict(config), environment.measure_step(config, "cpu")
    for name in ("parameters", "gradients", "adam", "flops"):
        assert predicted[name] == measured[name], name
    for name in ("activations", "activations_fused"):
        assert predicted[name] == pytest.approx(measured[name], rel=0.01), name
    assert measured["step_seconds"] > 0


def test_both_attentions_of_the_stack_agree() -> None:
    """What is compared for memory computes the same."""
    config = replace(environment.Config(), n_layer=2)
    model, idx = environment.Stack(config), torch.randint(256, (2, config.block_size))
    assert model(idx, idx).item() == pytest.approx(model(idx, idx, fused=True).item(), abs=1e-5)


def test_environment_smoke_leaves_its_files(tmp_path: Path) -> None:
    """Figure, trace and numbers are written; every rate is a positive number."""
    result = run_script("part0_foundations/lesson2_environment.py", "--smoke", env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert metrics["matmul_fp32_gflops"] > 0
    assert metrics["bandwidth_gb_s"] > 0
    assert metrics["flops_predicted"] == metrics["flops_measured"]
    assert json.loads(next(tmp_path.rglob("trace.json")).read_text())["traceEvents"]
    assert next(tmp_path.rglob("environment.png")).stat().st_size > 10_000


def test_pipeline_smoke_leaves_its_files(tmp_path: Path) -> None:
    """The whole story in miniature writes a figure and a number for every seed."""
    result = run_script("part0_foundations/lesson1_pipeline.py", "--smoke", env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    metrics = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    assert {"rl_true_after", "rl_true_after_seed0", "rl_true_after_seed2", "sft_obeys_after"} <= metrics.keys()
    assert next(tmp_path.rglob("pipeline.png")).stat().st_size > 10_000


@pytest.mark.parametrize("flags", [["--device", "abacus"], ["--n-head", "5"], ["--no-such-flag"]])
def test_environment_mistakes_are_one_line(flags: list[str], tmp_path: Path) -> None:
    """A device that is not there, heads that do not divide the channels, a flag that does not exist: status 2."""
    result = run_script("part0_foundations/lesson2_environment.py", *flags, "--out", str(tmp_path))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


# --- comparing parts ---

OLD_MODEL = '''"""Model."""

import torch

SIZE = 3


def same(x):
    return x


def grows(x):
    return x + 1


class Gone:
    pass
'''
NEW_MODEL = OLD_MODEL.replace("x + 1", "x + 22 < 3").replace("Gone", "Fresh").replace("import torch", "import numpy")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two small parts: a file that changes, one that stays, one that goes, one that comes, and a lesson each."""
    for folder, files in {
        "part1_a": {"model.py": OLD_MODEL, "data.py": "X = 1\n", "old.py": "OLD = 1\n", "lesson1_x.py": "L = 1\n"},
        "part2_b": {"model.py": NEW_MODEL, "data.py": "X = 1\n", "new.py": "NEW = 1\n", "lesson1_y.py": "L = 2\n"},
    }.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    return tmp_path


def test_compare_by_syntax_tree() -> None:
    """Definitions are told apart by their bytes; imports and docstrings are none."""
    assert compare_parts.compare(OLD_MODEL, NEW_MODEL) == {
        "unchanged": ["SIZE", "same"],
        "changed": ["grows"],
        "new": ["Fresh"],
        "removed": ["Gone"],
    }
    assert compare_parts.compare("A = 1\n", "# why\nA = 1\n")["changed"] == ["A"]
    assert compare_parts.compare("A = 1\n", "# --- rule ---\nA = 1\n")["unchanged"] == ["A"]
    assert compare_parts.compare("@f\ndef g(): pass\n", "@h\ndef g(): pass\n")["changed"] == ["g"]
    assert compare_parts.compare("A, B = 1, 2\n", "A, B = 1, 3\n")["changed"] == ["A", "B"]
    assert compare_parts.compare("x: int = 1\n'''one'''\n", "x: int = 1\n'''two'''\n")["changed"] == ["x"]


def test_compare_prints_table_and_diff(parts: Path) -> None:
    """Piped there is no colour; each file and its state are shown, lines of the changed ones, lessons only by name."""
    result = run_script(SCRIPT, "1", "2", "--root", str(parts))
    assert result.returncode == 0, result.stderr
    assert "\033" not in result.stdout
    for line in ("model.py  changed", "data.py  unchanged", "new.py  new", "old.py  removed"):
        assert line in result.stdout.splitlines()
    assert "-    return x + 1\n+    return x + 22 < 3\n" in result.stdout
    assert "lesson1_x.py" in result.stdout
    assert "L = 1" not in result.stdout
    assert "+NEW = 1" not in result.stdout  # whole files only when asked for, as the last line says
    assert "-OLD = 1" not in result.stdout
    assert result.stdout.splitlines()[-1].endswith("new.py, old.py (to see one: --file new.py)")
    only = run_script(SCRIPT, "1", "2", "--root", str(parts), "--file", "model.py").stdout
    assert "model.py  changed" in only
    assert "new.py" not in only.replace("lessons", "")


def test_compare_prints_whole_files_when_asked(parts: Path) -> None:
    """The headings of a file that is new or removed name /dev/null, as git's do, and nothing is left out."""
    new = run_script(SCRIPT, "1", "2", "--root", str(parts), "--file", "new.py").stdout
    assert "--- /dev/null\n+++ part2_b/new.py\n@@ -0,0 +1 @@\n+NEW = 1\n" in new
    old = run_script(SCRIPT, "1", "2", "--root", str(parts), "--file", "old.py").stdout
    assert "--- part1_a/old.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-OLD = 1\n" in old
    assert "not printed" not in new + old


def test_colours_only_where_wanted() -> None:
    """Added lines are green, removed ones red, the file's name is neither; and plain where colour is off."""
    lines = compare_parts.unified("m.py", ["a", "b"], {"m.py": "x\n--y\n"}, {"m.py": "x\n++z\n"}, color=True)
    assert lines[0].startswith("\033[1m---")
    assert "\033[31m---y\033[0m" in lines
    assert "\033[32m+++z\033[0m" in lines
    assert "\033" not in "".join(compare_parts.unified("m.py", ["a", "b"], {"m.py": "x"}, {"m.py": "y"}, color=False))


@pytest.mark.parametrize(
    ("terminal", "no_color", "painted"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colour_needs_a_terminal_that_wants_it(
    terminal: bool,
    no_color: str,
    painted: bool,
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Colour on a terminal, unless NO_COLOR is set; none in a pipe."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(compare_parts.sys.stdout, "isatty", lambda: terminal)
    compare_parts.run(compare_parts.Config(root=parts))
    assert ("\033" in capsys.readouterr().out) == painted


class Page(HTMLParser):
    """Collects what a page loads or links to, its open tags, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.stack, self.words = [], [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember addresses, and what has to be closed."""
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "col", "!doctype"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Tags close in order."""
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        self.words.append(data)


def test_html_is_self_contained(parts: Path) -> None:
    """One well-formed file that loads nothing, escapes code, follows the reader's dark mode, and shows both sides."""
    result = run_script(SCRIPT, "1", "2", "--root", str(parts), "--html", "--out", str(parts / "out"))
    assert result.returncode == 0, result.stderr
    file = parts / "out" / "compare_1_2.html"
    assert str(file) in result.stdout
    source, page = file.read_text(), Page()
    page.feed(source)
    assert page.stack == []
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|@import|url\(|<script", source)
    assert "prefers-color-scheme: dark" in source
    text = "".join(page.words)
    assert "return x + 1" in text
    assert "return x + 22 < 3" in text
    assert "< 3" not in source  # the sign is escaped
    assert compare_parts.mark("a < b + c", "a < b + d") == ("a &lt; b + <b>c</b>", "a &lt; b + <b>d</b>")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["2", "2"], "both parts are 2"),
        (["1", "7"], "no part 7"),
        (["1", "2", "--file", "gone.py"], "gone.py"),
        (["one", "2"], ""),
    ],
)
def test_compare_mistakes_are_one_line(args: list[str], words: str, parts: Path) -> None:
    """Equal parts, a part or a file that does not exist, no number: status 2, one line, no traceback."""
    result = run_script(SCRIPT, *args, "--root", str(parts))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert words in result.stderr
    if words:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_compare_file_that_is_no_python(parts: Path) -> None:
    """A file with a syntax error is named."""
    (parts / "part2_b" / "model.py").write_text("def (\n")
    result = run_script(SCRIPT, "1", "2", "--root", str(parts))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
