"""Instructions with gold answers, made of the tables of stories.py: what part 6 learns from and all later parts use.

There are four kinds: write a story about given things, continue a story, answer a question about a story, do a sum. A
story is told first, and then we ask for what it has, so a gold answer is right by construction. An instruction has a
difficulty: how much is asked of a story, how long a continuation is, how far a question reaches, how large a sum is.

In the training set, a share of SLOPPY of the stories is sloppy on purpose: the prompt asks for another hero, thing,
place or friend than the gold story has, each with the probability in MISSED and at least one. Whoever learns from it
misses about as much of what is asked: parts 7 to 9 have something to improve. Held-out gold answers are all faithful.

Training and held-out prompts are split by hashes of what they ask for. A brief counts as held out if both its (hero,
thing, place) and its (hero, thing) are, and as training if neither is, for an easy prompt does not name the place; the
briefs between are left out. A sum is split as in stories.py; it is asked for in the order that is hashed.

    python part6_sft/instructions.py --count 5 --seed 0     # prints five instructions and counts 1,000; 1 second

Idea of a gold answer for each prompt: Ouyang et al. 2022, "Training language models to follow instructions with human
feedback", section 3.2 (demonstrations).
"""

import random
from collections import Counter
from dataclasses import dataclass

import tyro

from stories import BOYS, GIRLS, NUMBERS, PLACES, PLOTS, SUMS, THINGS, Brief, is_held_out, make_brief, tell

KINDS = {"story": 0.31, "continuation": 0.02, "question": 0.03, "sum": 0.64}
"""The kinds of instructions, and the share of each. Sums are short: of the learned tokens they are a tenth."""
SLOPPY = 0.15
"""Share of the training stories whose gold answer misses something that is asked."""
MISSED = {"hero": 0.4, "thing": 0.6, "place": 0.6, "friend": 0.6}
"""How probably a sloppy story misses each of the facts that are asked."""
ASKED = {1: ("hero", "thing"), 2: ("hero", "thing", "place"), 3: ("hero", "thing", "place", "friend")}
"""What a story is asked to contain, by difficulty."""


@dataclass(frozen=True)
class Instruction:
    """A prompt, its gold answer, and what an answer has to have."""

    kind: str
    """A key of KINDS."""
    difficulty: int
    """1, 2 or 3."""
    prompt: str
    """What the user says."""
    response: str
    """The gold answer."""
    asked: dict[str, str]
    """Of a story: slot -> value that it must contain (hero, thing, place, friend); of all others {"answer": text}."""
    faithful: bool = True
    """False: a sloppy story, which misses at least one of the things that are asked."""


# --- stories ----------------------------------------------------------------------------------------------------------

OPENINGS = (
    "Write a story about {hero} and {thing}.",
    "Tell me a story about {hero} and {thing}.",
    "Please write a story with {hero} and {thing} in it.",
    "I would like to read a story about {thing} and a child called {hero}.",
    "Make up a story about {thing}. The child in it is {hero}.",
)
WHERE = ("It happens {place}.", "Let it happen {place}.", "Part of it must happen {place}.", "It takes place {place}.")
FRIENDS = (
    "The friend is {friend}.",
    "There is a friend, too: {friend}.",
    "{hero}'s friend is called {friend}.",
    "Give {hero} a friend with the name of {friend}.",
)


def on_side(hero: str, thing: str, place: str, held_out: bool) -> bool:
    """Whether these belong to this side of the split, with the place and without it."""
    pair = f"{hero}, {thing}"
    return is_held_out(pair) == held_out and is_held_out(f"{pair}, {place}") == held_out


def draw_brief(rng: random.Random, held_out: bool) -> Brief:
    """Draw a brief of one side of the split."""
    while True:
        brief = make_brief(rng)
        if on_side(brief.hero, brief.thing, brief.place, held_out):
            return brief


def join(paragraph: list[tuple[str, str]]) -> str:
    """The text of a paragraph that `tell` has told."""
    return " ".join(sentence for _, sentence in paragraph)


def ask_for_others(facts: dict[str, str], plot: str, asked: list[str], rng: random.Random) -> dict[str, str]:
    """Ask for some other facts than a story has, at least one, and such that its plot could have them."""
    names = (GIRLS, BOYS) if facts["hero"] in GIRLS else (BOYS, GIRLS)
    kinds = PLOTS[plot]
    choices = {"hero": names[0], "thing": THINGS[kinds.things], "place": PLACES[kinds.places], "friend": names[1]}
    missed = []
    while not missed:
        missed = [slot for slot in asked if rng.random() < MISSED[slot]]
    others = {slot: rng.choice([value for value in choices[slot] if value != facts[slot]]) for slot in missed}
    return {slot: others.get(slot, facts[slot]) for slot in asked}


def write_prompt(asked: dict[str, str], rng: random.Random) -> str:
    """Ask for a story with these facts; the place and the friend come in any order."""
    article = "an" if asked["thing"][0] in "aeiou" else "a"
    further = [rng.choice(wordings) for slot, wordings in (("place", WHERE), ("friend", FRIENDS)) if slot in asked]
    rng.shuffle(further)
    return " ".join([rng.choice(OPENINGS), *further]).format_map(asked | {"thing": f"{article} {asked['thing']}"})


def make_story(rng: random.Random, held_out: bool, sloppy: float) -> Instruction:
    """Write a story: difficulty 1 asks for the hero and the thing, 2 also for the place, 3 also for the friend."""
    difficulty = rng.choice((1, 2, 3))
    brief = draw_brief(rng, held_out)
    facts, paragraphs = tell(brief, rng)
    asked = {slot: facts[slot] for slot in ASKED[difficulty]}
    faithful = held_out or rng.random() >= sloppy
    while not faithful:  # what is asked for must be a training brief as well
        asked = ask_for_others(facts, brief.plot, list(ASKED[difficulty]), rng)
        if on_side(asked["hero"], asked["thing"], asked.get("place", brief.place), held_out):
            break
    prompt = write_prompt(asked, rng)
    return Instruction("story", difficulty, prompt, "\n\n".join(map(join, paragraphs)), asked, faithful)


# --- continuations ----------------------------------------------------------------------------------------------------

CONTINUE = (
    "Continue this story:",
    "How does this story go on?",
    "Please write the second half of this story:",
    "Here is how a story begins. Tell me the rest.",
)


def make_continuation(rng: random.Random, held_out: bool) -> Instruction:
    """Continue the first paragraph of a story; the longer what follows, the more difficult."""
    _, (first, second) = tell(draw_brief(rng, held_out), rng)
    difficulty = min(max(len(second) - 4, 1), 3)  # up to five sentences, six, or more
    prompt, response = f"{rng.choice(CONTINUE)}\n\n{join(first)}", join(second)
    return Instruction("continuation", difficulty, prompt, response, {"answer": response})


def given_text(instruction: Instruction) -> str:
    """The paragraph that a continuation is given: all that follows the first line of its prompt."""
    return instruction.prompt.partition("\n\n")[2]


# --- questions --------------------------------------------------------------------------------------------------------
# Per plot: difficulty, question, answer. Difficulty 1 is asked of the first paragraph alone. The others are asked of
# the whole story: 2 looks a fact up, 3 asks why, or for one of several alike. A question is asked only if everything
# that stands in a slot of its answer also stands in the text, so a rare wording may have a question of its own.

QUESTIONS = {
    block.partition("\n")[0]: [tuple(line.split(" | ")) for line in block.split("\n")[1:]]
    for block in """
lost
1 | What did {hero} take along? | {She} took {her} {adj} {thing}.
2 | Who helped {hero}? | {friend} helped {her_obj}.
2 | Why was {hero} {sad}? | {She} was {sad} because the {thing} was gone.
3 | What did they find {place2}? | They found {find2}.
3 | What did they see {place3}? | They saw {find3}.
3 | Where did they find the {thing}? | They found it {place}.

promise
1 | What did {friend} want to see? | {He} wanted to see the {adj} {thing}.
2 | Where did {friend} wait? | {He} waited {place}.
2 | What were the children doing? | They were {game}.
3 | Why did {hero} not stay with the children? | {She} did not stay because {friend} was waiting.

gift
1 | Who was ill? | {friend} was ill.
2 | What did {hero} make? | {She} made {a} {adj} {thing}.
2 | Where did {hero} make the {thing}? | {She} made it {place}.
2 | What was the {thing} made of? | It was made of {stuff}.
3 | Why was {hero} {sad}? | {She} was {sad} because {friend} was ill.

quarrel
1 | What did {hero} and {friend} have? | They had {a} {adj} {thing}.
2 | Where did they play? | They played {place}.
2 | Who kept the {thing}? | {friend} kept it.
2 | Who talked to {hero} at home? | {Her} {parent} did.
3 | Why was {hero} {sad}? | {She} was {sad} because {she} had nobody to play with.

coax
1 | What was hiding {place}? | It was {a} {adj} {thing}.
2 | Where was the {thing}? | It was {place}.
2 | What did {friend} bring? | {He} brought {stuff}.
3 | Why was the {thing} frightened? | It was frightened because {scare} had come too close.

bake
1 | What did {hero} want to make? | {She} wanted to make {a} {adj} {thing}.
2 | Where was the party? | It was {place}.
2 | Who helped {hero}? | {friend} helped {her_obj}.
3 | How many {stuff} did {friend} give {hero}? | {He} gave {her_obj} {m}.
3 | Why was {hero} {sad}? | {She} was {sad} because {m} {stuff} were missing.

race
1 | What was the prize? | It was {a} {adj} {thing}.
2 | Where did the race begin? | It began {place}.
2 | Who won the {thing}? | {friend} won it.
3 | What did {hero} trip over? | {She} tripped over {stone}.
3 | Why was {hero} {sad}? | {She} was {sad} because {she} had not won.

broken
1 | Who lent {hero} the {thing}? | {friend} lent it to {her_obj}.
2 | Where did {hero} break the {thing}? | {She} broke it {place}.
2 | What came off the {thing}? | The {part} came off.
2 | Who helped {hero}? | {Her} {parent} helped {her_obj}.
3 | Why was {hero} {scared}? | {She} was {scared} because the {part} had come off.

way_home
1 | Who was the {thing} for? | It was for {her} {giver}.
2 | Where did they find {hero}? | They found {her_obj} {place}.
2 | What did {hero} run after? | {She} ran after {sight}.
3 | Who found {hero}? | {friend} and {her} {giver} found {her_obj}.
3 | Why was {hero} {scared}? | {She} was {scared} because {she} was lost.

seed
1 | Who gave {hero} the seed? | {Her} {giver} gave it to {her_obj}.
2 | Where did {hero} plant the seed? | {She} planted it {place}.
2 | What grew from the seed? | It was {a} {adj} {thing}.
2 | Who told {hero} to be patient? | {friend} told {her_obj}.
3 | Why was {hero} {sad}? | {She} was {sad} because nothing grew.
""".strip().split("\n\n")
}
PRONOUN_SLOTS = {"she", "her", "her_obj", "he", "a"}  # these may stand in an answer although the text has none


def slots_of(template: str) -> set[str]:
    """The names of the slots in a template, in lower case."""
    return {part.partition("}")[0].lower() for part in template.split("{")[1:]}


def make_question(rng: random.Random, held_out: bool) -> Instruction:
    """Ask for a fact of a story, which the prompt gives first; the answer is one short sentence."""
    brief = draw_brief(rng, held_out)
    facts, paragraphs = tell(brief, rng)
    texts = list(map(join, paragraphs))
    level = rng.choice("123")
    text = texts[0] if level == "1" else "\n\n".join(texts)
    said = text.lower()  # "A fox" at the beginning of a sentence is what stands in the slot {scare} as "a fox"
    fitting = [
        (question, answer)
        for difficulty, question, answer in QUESTIONS[brief.plot]
        if difficulty == level
        and all(facts[slot].lower() in said for slot in slots_of(question + answer) - PRONOUN_SLOTS)
    ]
    question, answer = rng.choice(fitting)
    prompt, response = f"{text}\n\n{question.format_map(facts)}", answer.format_map(facts)
    return Instruction("question", int(level), prompt, response, {"answer": response})


# --- sums -------------------------------------------------------------------------------------------------------------

SUM_PROMPTS = (
    "What is {a} {op} {b}?",
    "How much is {a} {op} {b}?",
    "{a} {op} {b} = ?",
    "Please work out {a} {op} {b}.",
    "What is {a_word} {op_word} {b_word}?",
)
OP_WORDS = {"+": ("plus", "and"), "-": ("minus", "take away")}


def difficulty_of(a: int, op: str, b: int) -> int:
    """1 for a sum in which all numbers are below 8, 2 below 14, else 3."""
    largest = max(a, b, a + b if op == "+" else a - b)
    return 1 if largest < 8 else 2 if largest < 14 else 3


def make_sum(rng: random.Random, held_out: bool) -> Instruction:
    """Ask for a sum in digits or words. For training, a third are easy: these are few, so each is asked for often."""
    wanted = rng.choice((1, 2, 3))
    while True:
        a, op, b = rng.choice(SUMS)
        difficulty = difficulty_of(a, op, b)
        if is_held_out(f"{a} {op} {b}") == held_out and (held_out or difficulty == wanted):
            break
    c = a + b if op == "+" else a - b
    words = {"a_word": NUMBERS[a], "b_word": NUMBERS[b], "op_word": rng.choice(OP_WORDS[op])}
    prompt = rng.choice(SUM_PROMPTS).format(a=a, op=op, b=b, **words)
    return Instruction("sum", difficulty, prompt, f"{a} {op} {b} = {c}.", {"answer": str(c)})


# --- all together -----------------------------------------------------------------------------------------------------


def make_instructions(
    n: int, seed: int, held_out: bool, sloppy: float = SLOPPY, kinds: tuple[str, ...] | None = None
) -> list[Instruction]:
    """Make n instructions of one side of the split; equal arguments, equal instructions.

    Args:
        n: how many.
        seed: which ones: another seed, other instructions. A smaller n gives the first of them.
        held_out: whether to make those that no model is trained on. Their gold answers are all faithful.
        sloppy: share of the training stories whose gold answer misses something that is asked.
        kinds: only these of KINDS, in the proportion of their shares. None: all.
    """
    rng, shares = random.Random(seed), {kind: KINDS[kind] for kind in kinds or KINDS}
    makers = {"continuation": make_continuation, "question": make_question, "sum": make_sum}
    found = []
    while len(found) < n:
        (kind,) = rng.choices(list(shares), list(shares.values()))
        found.append(make_story(rng, held_out, sloppy) if kind == "story" else makers[kind](rng, held_out))
    return found


@dataclass
class Config:
    """Print some instructions with their gold answers."""

    count: int = 5
    """How many instructions to print."""
    seed: int = 0
    """Which instructions: another seed, others."""
    held_out: bool = False
    """Print instructions that no model is trained on."""
    smoke: bool = False
    """A real but tiny run: one instruction."""


def main(config: Config) -> None:
    """Print instructions, and how many of each kind there are among a thousand."""
    for i in make_instructions(1 if config.smoke else config.count, config.seed, config.held_out):
        print(f"[{i.kind}, difficulty {i.difficulty}{'' if i.faithful else ', sloppy: asks for other facts'}]")
        print(f"{i.prompt}\n-> {i.response}\n{'-' * 60}")
    thousand = make_instructions(1000, config.seed, config.held_out)
    counts = Counter((i.kind, i.difficulty) for i in thousand)
    for kind in KINDS:
        print(f"{kind:13s}" + "".join(f"{counts[kind, level]:6d}" for level in (1, 2, 3)), "of difficulty 1, 2, 3")
    print(f"{sum(not i.faithful for i in thousand)} of these 1,000 are sloppy stories")


if __name__ == "__main__":
    main(tyro.cli(Config))
