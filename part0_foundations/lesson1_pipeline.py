"""The whole story in one file: pretraining, instructions, a reward model and a policy gradient, on a table of numbers.

A *bigram* model knows one word of context: row i of a V x V table holds the logits of the word that follows word i.
That is too little to write well and enough to show, in its smallest true form, every idea of the later parts:

    1. pretraining        cross-entropy starts at ln V and falls to a limit that we can count      (parts 1 to 5)
    2. instruction tuning the same loss with the prompt masked; the model starts to obey and to stop (part 6)
    3. reward model       preferences of a noisy reader become a number, by Bradley-Terry          (part 7)
    4. policy gradient    the number goes up, on a KL leash; and what happens when the leash is cut (parts 8 and 9)

    python part0_foundations/lesson1_pipeline.py      # about 15 seconds, three seeds

You should see samples of each stage, its numbers before and after it, in three seeds, and a figure.

References: Bengio et al. 2003, "A Neural Probabilistic Language Model" (section 1); Ouyang et al. 2022, InstructGPT
(section 3: the four stages); Bradley and Terry 1952; Williams 1992 (REINFORCE); Gao et al. 2023, "Scaling Laws for
Reward Model Overoptimization" (section 3).
"""

import json
import math
import random
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

    steps: int = 200
    """Optimizer steps of every stage."""
    beta: float = 0.7
    """The leash: what one nat of distance from the fine-tuned table costs, in units of reward."""
    seed: int = 0
    """The first of three seeds: the whole story is told three times."""
    out: Path = RUNS / "lesson1_pipeline"
    """Folder for the figure and metrics.json."""
    smoke: bool = False
    """A real but tiny run, in a temporary folder."""


# --- words: the tokenizer, 30 tokens (part 2 uses bytes, part 4 learns its own) ---

PRONOUN = {"mia": "she", "ada": "she", "tom": "he", "ben": "he"}
NAMES, VERBS, ARTICLES = list(PRONOUN), ["saw", "found", "liked", "hugged"], ["the", "a"]
ADJECTIVES, NOUNS = ["happy", "small", "red", "old"], ["dog", "cat", "kite", "ball"]
OTHERS = ["MIA", "ADA", "TOM", "BEN", "and", "she", "he", "was", ".", "tell", "about", "<end>"]
VOCAB = [*NAMES, *VERBS, *ARTICLES, *ADJECTIVES, *NOUNS, *OTHERS]  # MIA in a prompt asks for a sentence about mia
V, ID = len(VOCAB), {word: i for i, word in enumerate(VOCAB)}
END, MAX_NEW, IGNORE = ID["<end>"], 16, -100


def write_sentence(rng: random.Random, name: str) -> list[str]:
    """One sentence about somebody, drawn at random: all the text in this file is made of such sentences."""
    adjectives = rng.choices(ADJECTIVES, k=rng.choice([0, 1, 2]))
    words = [name, rng.choice(VERBS), rng.choice(ARTICLES), *adjectives, rng.choice(NOUNS)]
    if rng.random() < 0.5:  # whom "she" means, only attention can see (part 1)
        words += ["and", PRONOUN[name], "was", rng.choice(ADJECTIVES)]
    return [*words, "."]


# --- the model, a table, and how it is pretrained (parts 1 to 5) ---


def next_token_loss(table: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of targets y (B, T) after tokens x (B, T); targets of -100 do not count."""
    logits = table[x]  # (B, T) -> (B, T, V): looking up a row *is* the model. Part 1 puts a transformer here
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORE)  # -log softmax(logits)[target]


@torch.no_grad()
def sample(table: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write after the words `start` (B,): ids (B, MAX_NEW), and a mask (B, MAX_NEW), 1 up to the first <end>."""
    probs, token, ids = table.softmax(dim=-1), start, []
    probs[END] = (torch.arange(V) == END).float()  # after <end> stands nothing but <end>, as padding
    for _ in range(MAX_NEW):
        token = torch.multinomial(probs[token], 1)[:, 0]  # (B, V) -> (B,). Temperature, top-k and top-p: part 2
        ids.append(token)
    ids = torch.stack(ids, dim=1)
    ends_before = (ids == END).cumsum(dim=1) - (ids == END).long()  # (B, MAX_NEW): how many stand to the left
    return ids, (ends_before == 0).float()


def answer(table: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n prompts' last words (n,), MIA, ADA, TOM or BEN; a response to each (n, MAX_NEW) and its mask (n, MAX_NEW)."""
    start = torch.randint(len(NAMES), (n,)) + ID["MIA"]
    return start, *sample(table, start)


def fit(start: torch.Tensor, loss_of: Callable, steps: int, lr: float) -> tuple[torch.Tensor, list[float]]:
    """Change a copy of `start` so that a loss falls: all four stages do this. Returns it, and the loss at each step."""
    parameter, losses = start.clone().requires_grad_(), []
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=0.0)  # taken apart in part 2, rebuilt in part 4
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)  # down to zero: schedules are part 4
        loss = loss_of(parameter)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return parameter.detach(), losses


# --- instruction tuning (part 6) ---


def instructions(rng: random.Random, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n prompts with responses: inputs, targets, and targets with the prompt masked, all (n, T)."""
    rows = []
    for name in rng.choices(NAMES, k=n):
        prompt = ["tell", "the", rng.choice(ADJECTIVES), rng.choice(NOUNS), "about", name.upper()]
        rows.append(torch.tensor([ID[word] for word in [*prompt, *write_sentence(rng, name), "<end>"]]))
    ids = pad_sequence(rows, batch_first=True, padding_value=IGNORE)  # (n, T + 1)
    x, y = ids[:, :-1].clamp(min=0), ids[:, 1:]  # padding needs an input too; any will do, its target does not count
    masked = y.clone()
    masked[:, :5] = IGNORE  # targets 0 to 4 lie in the prompt: the model shall learn to answer, not to ask
    return x, y, masked


def obedience(table: torch.Tensor) -> float:
    """Share of 2,000 responses that begin with the name asked for and end by themselves, in [0, 1]."""
    start, ids, _ = answer(table, 2000)
    asked = start - ID["MIA"] + ID["mia"]  # names and the words that ask for them stand in the same order
    return ((ids[:, 0] == asked) & (ids[:, -1] == END)).float().mean().item()


# --- reward model (part 7) ---


def true_score(ids: torch.Tensor) -> torch.Tensor:
    """What the imaginary reader likes, (B, T) -> (B,): one whole sentence (+2) and `happy` (+2), but not again (-1)."""
    stop, happy = ids == ID["."], (ids == ID["happy"]).sum(dim=1)  # no model sees this score, only choices made by it
    whole = (stop.sum(dim=1) == 1) & (stop[:, :-1] & (ids[:, 1:] == END)).any(dim=1)  # one full stop, then <end>
    return 2.0 * whole + 2.0 * (happy > 0) - (happy - 1).clamp(min=0)


def bag(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How often each word stands in each response, (B, T) -> (B, V): all that this reward model looks at."""
    return (F.one_hot(ids, V) * mask[..., None]).sum(dim=1)  # (B, T, V) -> (B, V)


def preferences(table: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n pairs, chosen minus rejected by the reader: counts of words (n, V) and true scores (n,)."""
    start, ids_a, mask_a = answer(table, n)
    ids_b, mask_b = sample(table, start)  # two answers to one prompt
    gap = true_score(ids_a) - true_score(ids_b)
    sign = torch.where(torch.rand(n) < gap.sigmoid(), 1.0, -1.0)  # Bradley-Terry: P(a beats b) = sigmoid(r_a - r_b)
    return (bag(ids_a, mask_a) - bag(ids_b, mask_b)) * sign[:, None], gap * sign


def reward_loss(weight: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """-ln P(the reader's choices), for one weight per word (V,) and words chosen minus rejected (n, V)."""
    small = 0.005 * weight.square().sum()  # a word that was hardly seen is neither good nor bad
    return small - F.logsigmoid(difference @ weight).mean()


# --- policy gradient on a leash (parts 8 and 9) ---


def log_prob(table: torch.Tensor, start: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ln of the probability of each whole response: the sum of its tokens', (B,) and (B, T) -> (B,)."""
    x = torch.cat([start[:, None], ids[:, :-1]], dim=1)  # (B, T): what each token was written after
    return (table.log_softmax(dim=-1)[x, ids] * mask).sum(dim=1)  # (B, T) -> (B,)


def policy_loss(table: torch.Tensor, sft: torch.Tensor, weight: torch.Tensor, beta: float) -> torch.Tensor:
    """REINFORCE: likelier what the reward model likes; each nat of distance from the table `sft` (V, V) costs beta."""
    start, ids, mask = answer(table, 256)
    logp = log_prob(table, start, ids, mask)  # (B,)
    distance = logp.detach() - log_prob(sft, start, ids, mask)  # (B,), its mean is the KL divergence
    reward = bag(ids, mask) @ weight - beta * distance  # (B, V) @ (V,) -> (B,), less the pull of the leash
    advantage = reward - reward.mean()  # the baseline: better or worse than the others. Critic: part 8; groups: part 9
    return -(advantage * logp).mean()


def judge(table: torch.Tensor, sft: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Means over 4,000 fresh responses: the reward model's score, the true score, and the KL from `sft` in nats."""
    start, ids, mask = answer(table, 4000)
    kl = log_prob(table, start, ids, mask) - log_prob(sft, start, ids, mask)  # (B,)
    scores = {"reward": bag(ids, mask) @ weight, "true": true_score(ids), "kl": kl}
    return {name: score.mean().item() for name, score in scores.items()}


# --- the story ---


def story(config: Config, seed: int) -> tuple[dict[str, float], dict[str, list[float]], dict[str, torch.Tensor]]:
    """All four stages for one seed. Returns the numbers, curves for the figure, and the tables that are sampled."""
    torch.manual_seed(seed)
    rng, steps, zeros = random.Random(seed), config.steps, torch.zeros(V, V)
    # 1. pretraining: the targets are the words of the text, one step to the left
    text = torch.tensor([ID[word] for _ in range(2500) for word in write_sentence(rng, rng.choice(NAMES))])  # (N,)
    x, y, x_test, y_test = text[:16000], text[1:16001], text[16000:-1], text[16001:]
    base, base_losses = fit(zeros, lambda table: next_token_loss(table, x, y), steps, lr=0.3)
    # For a table the minimum is known without any gradient: how often j follows i, p(j | i) = n_ij / n_i.
    counts = torch.bincount(x * V + y, minlength=V * V).view(V, V) + 0.01  # so that no pair is impossible
    tables = {"before": zeros, "after": base, "counted": counts.log()}  # zeros: every word as likely as another
    n = {f"pretrain_loss_{k}": next_token_loss(table, x_test, y_test).item() for k, table in tables.items()}

    # 2. instruction tuning: the same loss, on responses only
    x, y, masked = instructions(rng, 400)
    x_test, _, y_test = instructions(rng, 400)  # only the response counts in the test, however we train
    sft, sft_losses = fit(base, lambda table: next_token_loss(table, x, masked), steps, lr=0.2)
    unmasked, _ = fit(base, lambda table: next_token_loss(table, x, y), steps, lr=0.2)
    tables = {"before": base, "after": sft, "without_mask": unmasked}
    n |= {f"sft_loss_{k}": next_token_loss(table, x_test, y_test).item() for k, table in tables.items()}
    n |= {f"sft_obeys_{k}": obedience(table) for k, table in tables.items()}

    # 3. reward model: one weight a word, fitted to 2,000 choices and tried on 2,000 others
    (train, _), (test, true_margin) = preferences(sft, 2000), preferences(sft, 2000)
    weight, _ = fit(torch.zeros(V), lambda weight: reward_loss(weight, train), steps, lr=0.05)
    margins = {"before": test @ zeros[0], "after": test @ weight, "ceiling": true_margin}  # the reader is noisy
    n |= {f"reward_accuracy_{k}": 0.5 + 0.5 * m.sign().mean().item() for k, m in margins.items()}  # a tie: a half

    # 4. policy gradient: the same from the same start, with the leash and without
    leashed, _ = fit(sft, lambda table: policy_loss(table, sft, weight, config.beta), steps, lr=0.2)
    cut, _ = fit(sft, lambda table: policy_loss(table, sft, weight, 0.0), steps, lr=0.2)
    judged = {k: judge(table, sft, weight) for k, table in (("before", sft), ("after", leashed), ("cut", cut))}
    n |= {f"rl_{what}_{k}": judged[k][what] for what in ("reward", "true", "kl") for k in judged}
    tables = {"pretrained": base, "SFT without mask": unmasked, "SFT": sft, "RL": leashed, "RL, leash cut": cut}
    return n, {"pretrain": base_losses, "sft": sft_losses, "weight": weight.tolist()}, tables


def draw_figure(path: Path, numbers: dict[str, float], curves: dict[str, list[float]]) -> None:
    """One panel a stage, of one seed."""
    figure, ((one, two), (three, four)) = plt.subplots(2, 2, figsize=(11, 11), layout="constrained")
    for panel, stage, title in ((one, "pretrain", "1. pretraining"), (two, "sft", "2. instructions")):
        panel.plot(curves[stage], label="training loss")
        panel.axhline(numbers[f"{stage}_loss_after"], ls="--", color="tab:green", label="held out, afterwards")
        panel.set(title=title, xlabel="step", ylabel="nats per word")
    three.barh(VOCAB, curves["weight"])
    three.set(title="3. reward model: what it has learned to like", xlabel="weight of one occurrence")
    for what, label in (("reward", "reward model's score"), ("true", "true score")):
        four.plot([numbers[f"rl_{what}_{k}"] for k in ("before", "after", "cut")], "o-", label=label)
    four.set(title="4. policy gradient", xticks=range(3), xticklabels=["before", "on the leash", "leash cut"])
    for panel in (one, two, four):
        panel.legend()
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    """Tell the story once a seed, then print and draw what changed."""
    if config.smoke:
        config = replace(config, steps=40, out=Path(tempfile.mkdtemp()))
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)  # tensors this small are done before a second thread has woken up
    config.out.mkdir(parents=True, exist_ok=True)
    seeds = range(config.seed, config.seed + 3)
    stories = [story(config, seed) for seed in tqdm(seeds, desc="seeds", leave=False)]
    numbers, curves, tables = stories[0]
    print(f"V = {V} words, ln V = {math.log(V):.3f} nats, {V * V} parameters; samples of seed {config.seed}:")
    for title, table in tables.items():
        for row in sample(table, torch.tensor([ID["MIA"]] * 2))[0]:
            print(f"  {title:17s} MIA ->", *[VOCAB[i] for i in row if i != END])
    print(f"mean of {len(seeds)} seeds (smallest to largest)")
    metrics = {}
    for name in numbers:
        values = [run[name] for run, _, _ in stories]
        metrics[name] = sum(values) / len(values)
        metrics |= {f"{name}_seed{seed}": value for seed, value in zip(seeds, values, strict=True)}
        print(f"  {name:24s}{metrics[name]:8.3f}  ({min(values):.3f} to {max(values):.3f})")
    draw_figure(config.out / "pipeline.png", numbers, curves)
    (config.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {config.out / 'pipeline.png'} and {config.out / 'metrics.json'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
