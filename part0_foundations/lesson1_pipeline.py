"""The whole story in one file: pretraining, instructions, a reward model and a policy gradient, on a table of numbers.

A *bigram* model knows one word of context: row i of a V x V table holds the logits of the word that follows word i.
That is too little to write well and enough to show, in its smallest true form, every idea of the later parts:

    1. pretraining        cross-entropy starts at ln V and falls to a limit that we can count      (parts 1 to 5)
    2. instruction tuning the same loss with the prompt masked; the model starts to obey and to stop (part 6)
    3. reward model       preferences of a noisy reader become a number, by Bradley-Terry          (part 7)
    4. policy gradient    the number goes up, on a KL leash; and what happens when the leash is cut (parts 8 and 9)

    python part0_foundations/lesson1_pipeline.py      # about 20 seconds, three seeds

You should see each stage's score before and after it, beside the best possible, in three seeds, and a figure.

References: Bengio et al. 2003, "A Neural Probabilistic Language Model" (section 1); Ouyang et al. 2022, "Training
language models to follow instructions with human feedback" (section 3: the four stages); Bradley and Terry 1952;
Williams 1992 (REINFORCE); Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization" (section 3).
"""

import json
import math
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS = Path(__file__).resolve().parent.parent / "runs" / Path(__file__).resolve().parent.name


@dataclass
class Config:
    """Take a bigram table through the four stages of a language model's life."""

    steps: int = 400
    """Optimizer steps of pretraining; the other stages take 200 each."""
    beta: float = 0.7
    """The leash: what one nat of distance from the fine-tuned table costs, in units of reward."""
    seeds: int = 3
    """How many times the whole story is told; every claim below is made for all of them."""
    seed: int = 0
    """The first seed."""
    out: Path = RUNS / "lesson1_pipeline"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- words: the tokenizer, 30 tokens (part 2 uses bytes, part 4 learns its own) --------------------------------------

PRONOUN = {"mia": "she", "ada": "she", "tom": "he", "ben": "he"}
NAMES, VERBS, ARTICLES = list(PRONOUN), ["saw", "found", "liked", "hugged"], ["the", "a"]
ADJECTIVES, NOUNS = ["happy", "small", "red", "old"], ["dog", "cat", "kite", "ball"]
ASKED = [name.upper() for name in NAMES]  # MIA in a prompt asks for a sentence about mia
OTHERS = ["and", "she", "he", "was", ".", "tell", "about", "<end>"]
VOCAB = [*NAMES, *ASKED, *VERBS, *ARTICLES, *ADJECTIVES, *NOUNS, *OTHERS]
V, ID = len(VOCAB), {word: i for i, word in enumerate(VOCAB)}
END, MAX_NEW, IGNORE = ID["<end>"], 16, -100


def encode(words: list[str]) -> torch.Tensor:
    """Token ids of words: a list of T words -> (T,) int64."""
    return torch.tensor([ID[word] for word in words])


def write_sentence(rng: random.Random, name: str | None = None) -> tuple[list[str], float]:
    """One sentence of the toy language, and its surprise: -ln of the probability with which it was written, in nats."""
    nats = 0.0

    def pick(options: list) -> str:
        nonlocal nats
        nats += math.log(len(options))  # uniform choice: -ln(1/n)
        return rng.choice(options)

    name = name or pick(NAMES)
    words = [name, pick(VERBS), pick(ARTICLES), *[pick(ADJECTIVES) for _ in range(pick([0, 1, 2]))], pick(NOUNS)]
    if pick([True, False]):
        words += ["and", PRONOUN[name], "was", pick(ADJECTIVES)]  # whom "she" means, only attention can see (part 1)
    return [*words, "."], nats


# --- the model: a table ----------------------------------------------------------------------------------------------
def next_token_loss(table: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of targets y (B, T) after tokens x (B, T); targets of -100 do not count."""
    logits = table[x]  # (B, T) -> (B, T, V): looking up a row *is* the model. Part 1 puts a transformer here
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORE)  # -log softmax(logits)[target]


@torch.no_grad()
def sample(table: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write after the words `start` (B,): ids (B, MAX_NEW), and a mask (B, MAX_NEW), 1 up to the first <end>."""
    probs, token, columns = table.softmax(dim=-1), start, []
    done = torch.zeros_like(start, dtype=torch.bool)
    for _ in range(MAX_NEW):
        token = torch.multinomial(probs[token], 1)[:, 0]  # (B, V) -> (B,). Temperature, top-k and top-p: part 2
        token = torch.where(done, END, token)  # a row that has ended emits padding
        columns.append(token)
        done |= token == END
    ids = torch.stack(columns, dim=1)
    before = (ids == END).cumsum(dim=1) - (ids == END).long()  # how many <end> stand to the left
    return ids, (before == 0).float()


def draw(table: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n prompts' last words (n,), MIA, ADA, TOM or BEN; a response to each (n, MAX_NEW) and its mask (n, MAX_NEW)."""
    start = torch.randint(len(NAMES), (n,)) + ID["MIA"]
    return start, *sample(table, start)


def log_prob(table: torch.Tensor, start: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ln of the probability of each whole response: the sum of its tokens', (B,) and (B, T) -> (B,)."""
    x = torch.cat([start[:, None], ids[:, :-1]], dim=1)  # what each token of the response was written after
    return (table.log_softmax(dim=-1)[x, ids] * mask).sum(dim=1)  # (B, T) -> (B,)


def text_of(ids: torch.Tensor) -> str:
    """One response (T,) as text, up to and without <end>."""
    return " ".join(VOCAB[i] for i in ids.tolist()).split("<end>")[0].strip()


def fit(parameter: torch.Tensor, loss_of: Callable[[], torch.Tensor], steps: int, lr: float) -> list[float]:
    """Change a parameter in place, step by step, so that a loss falls; all four stages do this. Returns every loss."""
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=0.0)  # taken apart in part 2, rebuilt in part 4
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)  # down to zero: schedules are part 4
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- 1. pretraining (parts 1 to 5) -----------------------------------------------------------------------------------
def pretrain(config: Config, rng: random.Random, numbers: dict[str, float]) -> tuple[torch.Tensor, list[float]]:
    """Fit the table to running text. Adds to the numbers; returns the table (V, V) and the loss at every step."""
    pages = [write_sentence(rng) for _ in range(4000)]
    cut = len(pages) * 9 // 10  # a tenth is held out
    train, test = (encode([word for words, _ in part for word in words]) for part in (pages[:cut], pages[cut:]))
    x, y = test[None, :-1], test[None, 1:]  # (1, T)
    table = torch.zeros(V, V, requires_grad=True)  # equal logits: every word as likely as any other, so loss = ln V
    numbers["pretrain_loss_before"] = next_token_loss(table, x, y).item()

    def batch_loss() -> torch.Tensor:
        at = torch.randint(len(train) - 32, (32, 1)) + torch.arange(32)  # (B, T) = (32, 32) windows
        return next_token_loss(table, train[at], train[at + 1])  # the targets are the text, one step to the right

    curve = fit(table, batch_loss, config.steps, lr=0.3)
    # For a table the minimum is known without any gradient: the frequencies of the pairs, p(j | i) = n_ij / n_i.
    counts = torch.full((V, V), 1e-2)  # a little of everything, so that an unseen pair is not impossible
    counts.index_put_((train[:-1], train[1:]), torch.ones(len(train) - 1), accumulate=True)
    numbers["pretrain_loss_after"] = next_token_loss(table, x, y).item()
    numbers["pretrain_loss_counted"] = next_token_loss(counts.log(), x, y).item()
    numbers["pretrain_loss_of_the_text"] = sum(nats for _, nats in pages[cut:]) / len(test)
    return table.detach(), curve


# --- 2. instruction tuning (part 6) ----------------------------------------------------------------------------------
def instructions(rng: random.Random, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n prompts with responses: inputs, targets, and targets with the prompt masked, all (n, T)."""
    rows = []
    for _ in range(n):
        name = rng.choice(NAMES)
        prompt = ["tell", "the", rng.choice(ADJECTIVES), rng.choice(NOUNS), "about", name.upper()]
        ids = encode([*prompt, *write_sentence(rng, name)[0], "<end>"])
        answer = ids[1:].clone()
        answer[: len(prompt) - 1] = IGNORE  # -100 on the prompt: the model shall learn to answer, not to ask
        rows.append((ids[:-1], ids[1:], answer))
    x, y, masked = (pad_sequence(part, batch_first=True, padding_value=IGNORE) for part in zip(*rows, strict=True))
    return x.clamp(min=0), y, masked  # padding needs an input too; any will do, its target does not count


def obedience(table: torch.Tensor, n: int = 2000) -> float:
    """Share of n responses that begin with the name asked for and end by themselves, in [0, 1]."""
    start, ids, _ = draw(table, n)
    asked = start - ID["MIA"] + ID["mia"]  # names and the words that ask for them stand in the same order
    return ((ids[:, 0] == asked) & (ids[:, -1] == END)).float().mean().item()


def fine_tune(base: torch.Tensor, rng: random.Random, steps: int, numbers: dict[str, float]) -> dict[str, tuple]:
    """Fine-tune on 400 instructions, masked and, to see what the mask is for, unmasked: kind -> (table, curve)."""
    x, unmasked, masked = instructions(rng, 400)
    x_test, _, y_test = instructions(rng, 400)  # only the response counts in the test, however we train
    numbers["sft_loss_before"] = next_token_loss(base, x_test, y_test).item()
    numbers["sft_obeys_before"] = obedience(base)
    tuned = {}
    for kind, targets in (("after", masked), ("without_mask", unmasked)):
        table, curve = base.clone().requires_grad_(), []

        def loss_of(table=table, targets=targets, curve=curve) -> torch.Tensor:
            curve.append(next_token_loss(table.detach(), x_test, y_test).item())
            return next_token_loss(table, x, targets)

        fit(table, loss_of, steps, lr=0.2)
        numbers[f"sft_loss_{kind}"] = next_token_loss(table, x_test, y_test).item()
        numbers[f"sft_obeys_{kind}"] = obedience(table)
        tuned[kind] = table.detach(), curve
    return tuned


# --- 3. reward model (part 7) ----------------------------------------------------------------------------------------

SENTENCE = re.compile(  # the grammar above, as a pattern: what a whole, correct sentence looks like
    r"(mia|ada|tom|ben) (saw|found|liked|hugged) (the|a) ((happy|small|red|old) )*(dog|cat|kite|ball)"
    r"( and (she|he) was (happy|small|red|old))? \."
)


def true_score(ids: torch.Tensor) -> float:
    """What the imaginary reader likes, (T,): a whole sentence (+2) with a `happy` (+2); each further one bores (-1)."""
    text = text_of(ids)  # no model ever sees this number, only noisy choices that are made by it
    happy = text.count("happy")
    return 2.0 * bool(SENTENCE.fullmatch(text)) + 2.0 * (happy > 0) - 1.0 * max(0, happy - 1)


def bag(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How often each word stands in each response, (B, T) -> (B, V): all that this reward model looks at."""
    return (F.one_hot(ids, V) * mask[..., None]).sum(dim=1)


def preferences(table: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n pairs, chosen minus rejected by the reader: counts of words (n, V) and true scores (n,)."""
    start, ids_a, mask_a = draw(table, n)
    ids_b, mask_b = sample(table, start)  # two answers to one prompt
    gap = torch.tensor([true_score(a) - true_score(b) for a, b in zip(ids_a, ids_b, strict=True)])
    sign = torch.where(torch.rand(n) < gap.sigmoid(), 1.0, -1.0)  # Bradley-Terry: P(a beats b) = sigmoid(r_a - r_b)
    return (bag(ids_a, mask_a) - bag(ids_b, mask_b)) * sign[:, None], gap * sign


def fit_reward(table: torch.Tensor, steps: int, numbers: dict[str, float]) -> torch.Tensor:
    """One weight per word (V,), fitted to 2,000 choices; its accuracy on 2,000 others goes into the numbers."""
    chosen_minus_rejected, _ = preferences(table, 2000)
    test, true_margin = preferences(table, 2000)
    weight = torch.zeros(V, requires_grad=True)  # all ties: the first loss is ln 2, as the first one above was ln V
    numbers["reward_pair_accuracy_before"] = 0.5 + 0.5 * (test @ weight).sign().mean().item()  # a tie: a half

    def loss_of() -> torch.Tensor:
        small = 0.005 * weight.square().sum()  # a word that was hardly seen is neither good nor bad
        return small - F.logsigmoid(chosen_minus_rejected @ weight).mean()  # -ln P(the reader's choice)

    fit(weight, loss_of, steps, lr=0.05)
    numbers["reward_pair_accuracy_after"] = 0.5 + 0.5 * (test @ weight).sign().mean().item()
    numbers["reward_pair_accuracy_ceiling"] = 0.5 + 0.5 * true_margin.sign().mean().item()  # the reader is noisy
    return weight.detach()


# --- 4. policy gradient on a leash (parts 8 and 9) -------------------------------------------------------------------
def judge(table: torch.Tensor, reference: torch.Tensor, weight: torch.Tensor, n: int = 4000) -> dict[str, float]:
    """Means over n fresh responses: the reward model's score, the true score, and KL(table || reference) in nats."""
    start, ids, mask = draw(table, n)
    per_row = (table.softmax(-1) * (table.log_softmax(-1) - reference.log_softmax(-1))).sum(dim=-1)  # (V, V) -> (V,)
    x = torch.cat([start[:, None], ids[:, :-1]], dim=1)
    kl = (per_row[x] * mask).sum(dim=1).mean().item()  # exact over V, at every word that was visited
    return {
        "reward": (bag(ids, mask) @ weight).mean().item(),
        "true": sum(true_score(row) for row in ids) / n,
        "kl": kl,
    }


def best_objective(reference: torch.Tensor, weight: torch.Tensor, beta: float) -> float:
    """The largest reward - beta * KL that any policy can have, found without any gradient.

    The best policy is the reference times exp(reward / beta), and its objective is beta ln Z. For a reward that is a
    sum over words, Z comes from right to left: U_t(i) = beta ln sum_j p(j|i) exp((w_j + U_t+1(j)) / beta), U_end = 0.
    """
    value = torch.zeros(V)
    for _ in range(MAX_NEW):
        ahead = (weight + value.where(torch.arange(V) != END, 0.0)) / beta  # nothing comes after <end>
        value = beta * torch.logsumexp(reference.log_softmax(dim=-1) + ahead, dim=-1)  # (V, V) -> (V,)
    return value[ID["MIA"] : ID["MIA"] + len(NAMES)].mean().item()


def reinforce(reference: torch.Tensor, weight: torch.Tensor, beta: float, steps: int) -> torch.Tensor:
    """Raise the reward model's score by REINFORCE, at beta a nat of distance. Returns the new table (V, V)."""
    table = reference.clone().requires_grad_()

    def loss_of() -> torch.Tensor:
        start, ids, mask = draw(table, 256)
        logp = log_prob(table, start, ids, mask)  # (B,)
        distance = logp.detach() - log_prob(reference, start, ids, mask)  # its mean is the KL divergence
        reward = bag(ids, mask) @ weight - beta * distance  # (B, V) @ (V,) -> (B,), less the pull of the leash
        advantage = reward - reward.mean()  # the baseline: better or worse than the others. Critic: part 8; groups: 9
        return -(advantage * logp).mean()  # likelier what was better than usual, less likely what was worse

    fit(table, loss_of, steps, lr=0.2)
    return table.detach()


# --- the story -------------------------------------------------------------------------------------------------------
def samples(table: torch.Tensor, title: str, start: str, n: int) -> list[str]:
    """n samples after one word, as lines to print."""
    ids, _ = sample(table, encode([start] * n))
    return [f"  {title:17s} {start} -> {text_of(row)}" for row in ids]


def story(config: Config, seed: int) -> tuple[dict[str, float], dict, list[str]]:
    """All four stages for one seed. Returns the numbers, the curves for the figure, and some samples."""
    torch.manual_seed(seed)
    rng, numbers, steps = random.Random(seed), {}, min(200, config.steps)
    base, curve = pretrain(config, rng, numbers)
    sft = fine_tune(base, rng, steps, numbers)
    tuned = sft["after"][0]
    weight = fit_reward(tuned, steps, numbers)
    lines = samples(base, "pretrained", "mia", 2) + samples(base, "pretrained", "MIA", 1)
    lines += samples(sft["without_mask"][0], "SFT without mask", "MIA", 2) + samples(tuned, "SFT", "MIA", 2)
    numbers |= {f"rl_{key}_before": value for key, value in judge(tuned, tuned, weight).items()}
    for name, factor in LEASHES.items():
        policy = reinforce(tuned, weight, factor * config.beta, steps)
        numbers |= {f"rl_{key}_{name}": value for key, value in judge(policy, tuned, weight).items()}
        lines += samples(policy, f"RL, {name}", "MIA", 2) if name in ("after", "cut") else []
    numbers["rl_objective_before"] = numbers["rl_reward_before"]  # no distance yet, so nothing to pay
    numbers["rl_objective_after"] = numbers["rl_reward_after"] - config.beta * numbers["rl_kl_after"]
    numbers["rl_objective_best"] = best_objective(tuned, weight, config.beta)
    return numbers, {"pretrain": curve, "sft": sft, "weight": weight}, lines


LEASHES = {"tight": 3.0, "after": 1.0, "loose": 0.4, "cut": 0.0}  # what is tried, as multiples of config.beta
TABLE = [  # what is printed: a title, and the numbers that belong beside each other
    ("1. pretraining: held-out loss, nats per word", ["before", "after", "counted", "of_the_text"], "pretrain_loss"),
    ("2. instructions: held-out loss of the response", ["before", "after", "without_mask"], "sft_loss"),
    ("   share of responses that obey and end", ["before", "after", "without_mask"], "sft_obeys"),
    ("3. reward model: held-out pairs ranked right", ["before", "after", "ceiling"], "reward_pair_accuracy"),
    ("4. policy gradient: reward - beta * KL", ["before", "after", "best"], "rl_objective"),
    ("   reward model's score", ["before", "tight", "after", "loose", "cut"], "rl_reward"),
    ("   true score, which no model sees", ["before", "tight", "after", "loose", "cut"], "rl_true"),
    ("   distance from SFT (KL), nats per response", ["before", "tight", "after", "loose", "cut"], "rl_kl"),
]


def draw_figure(path: Path, runs: list[dict[str, float]], curves: dict) -> None:
    """One panel a stage: curves of the first seed, points of all seeds."""
    figure, ((one, two), (three, four)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    one.plot(curves["pretrain"], lw=1, label="training loss")
    for name, color in (("before", "red"), ("counted", "green"), ("of_the_text", "purple")):
        label = f"held out, {name}: {runs[0][f'pretrain_loss_{name}']:.2f}"
        one.axhline(runs[0][f"pretrain_loss_{name}"], ls="--", lw=1, color=f"tab:{color}", label=label)
    one.set(title="1. pretraining", xlabel="step", ylabel="nats per word", ylim=(0.9, 3.6))
    two.plot(curves["sft"]["after"][1], label="prompt masked")
    two.plot(curves["sft"]["without_mask"][1], label="prompt not masked")
    two.set(title="2. instructions", xlabel="step", ylabel="held-out loss of the response, nats per word")
    order = [i for i in curves["weight"].argsort().tolist() if VOCAB[i] not in (*ASKED, "tell", "about")]
    three.barh([VOCAB[i] for i in order], curves["weight"][order], color="tab:green")
    three.set(title="3. reward model: what it has learned to like", xlabel="weight of one occurrence")
    kinds = ["before", *list(LEASHES)[:-1]]  # the cut leash would press all others into one line
    for key, name, color in (("reward", "reward model's score", "green"), ("true", "true score", "purple")):
        for i, run in enumerate(runs):
            x, y = [run[f"rl_kl_{kind}"] for kind in kinds], [run[f"rl_{key}_{kind}"] for kind in kinds]
            four.plot(x, y, "o-", lw=1, ms=4, color=f"tab:{color}", label=name if i == 0 else None)
    four.set_xscale("symlog", linthresh=0.05)
    four.set(title="4. policy gradient, from a tight leash to a loose one", xlabel="KL from SFT, nats a response (log)")
    for panel in (one, two, four):
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    """Tell the story once a seed, then print and draw what changed."""
    if config.smoke:
        config = replace(config, steps=30, seeds=2, out=Path(tempfile.mkdtemp()))
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)  # tensors this small are done before a second thread has woken up
    config.out.mkdir(parents=True, exist_ok=True)
    seeds = range(config.seed, config.seed + config.seeds)
    stories = [story(config, seed) for seed in tqdm(seeds, desc="seeds", leave=False)]
    runs, (_, curves, lines) = [numbers for numbers, _, _ in stories], stories[0]
    print(f"V = {V} words, ln V = {math.log(V):.3f} nats, perplexity {V}; the table has {V * V} parameters")
    print(f"samples of seed {config.seed}:", *lines, sep="\n")
    print(f"\nmean of seeds {seeds[0]} to {seeds[-1]} (smallest to largest)")
    print(
        "the leash costs", ", ".join(f"{factor * config.beta:.2f} a nat ({name})" for name, factor in LEASHES.items())
    )
    metrics = {}
    for title, columns, name in TABLE:
        print(title)
        for column in columns:
            values = [run[f"{name}_{column}"] for run in runs]
            metrics[f"{name}_{column}"] = sum(values) / len(values)
            metrics |= {f"{name}_{column}_seed{seed}": value for seed, value in zip(seeds, values, strict=True)}
            note = f"  perplexity {math.exp(metrics[f'{name}_{column}']):.1f}" if name == "pretrain_loss" else ""
            print(f"  {column:14s}{metrics[f'{name}_{column}']:9.3f}  ({min(values):.3f} to {max(values):.3f}){note}")
    draw_figure(config.out / "pipeline.png", runs, curves)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {config.out / 'pipeline.png'} and {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
