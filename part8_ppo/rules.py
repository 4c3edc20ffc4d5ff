"""The rule score: a judge that is no model. It parses a story and says how good it is, from 0 to 1, and why.

Every wording of stories.py becomes a regular expression with a named group for each slot, so the tables that write the
stories also read them. The judge cuts a text into sentences, looks each one up, and compares what they say:

    asked     share of the facts asked for that the story has, in their roles: an asked-for friend is no hero
    grammar   share of the sentences that are known, paragraphs in their place
    facts     share of the plot that is told, times FAULT for each disagreement: a name that changes, a pronoun that
              does not fit, a wrong total, a sentence told twice, in the wrong place or out of another plot
    ended     whether the ending is the last sentence, and whether the writer stopped there
    total     the product of the four: a perfect story has 1, and each fault lowers it a little

The *chain* of a story is its longest row of sentences that tell the events of its plot in order.

    python part6_sft/rules.py     # judges one perfect and five damaged stories, with reasons; 1 second

You should see 1.000 for the first, and less for the others, each with a line per deduction. No model is trained on
these rules before part 9, so they can tell whether training made the answers better or only better liked.

Skalse et al. 2022, "Defining and Characterizing Reward Hacking", section 3: why one wants to measure what is meant.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import tyro

from instructions import Instruction, given_text, make_instructions
from stories import BOYS, CHANCE, FINDS, GIRLS, NUMBERS, PLACES, PLOTS, PRONOUNS, RELATIVES, THINGS

FAULT = 0.85
"""What each disagreement leaves of the score for facts."""
NO_ENDING, NO_STOP = 0.3, 0.2
"""What is taken from `ended` if the ending is not the last sentence, and if the writer did not stop by itself."""
UNKNOWN_LENGTH = 80
"""An unknown stretch of text counts as one sentence for each so many characters, or part of them."""

# --- the tables, read backwards ---------------------------------------------------------------------------------------

NAMES = GIRLS + BOYS
DETAILS = [thing for kind in THINGS.values() for thing in kind.values()]
VALUES = {
    **CHANCE,
    **dict.fromkeys(("hero", "friend"), NAMES),
    **dict.fromkeys(("she", "he"), ("she", "he")),
    **dict.fromkeys(("her_obj", "him"), ("her", "him")),
    **dict.fromkeys(("her", "his"), ("her", "his")),
    **dict.fromkeys(("place", "place2", "place3"), PLACES["outdoors"]),  # the other lists are parts of it
    **dict.fromkeys(("find2", "find3"), FINDS),
    **dict.fromkeys(("parent", "giver"), RELATIVES),
    **dict.fromkeys(("n", "m", "total"), NUMBERS),
    "thing": [noun for kind in THINGS.values() for noun in kind],
    "adj": [adjective for thing in DETAILS for adjective in thing.adjectives],
    "a": ("a", "an"),
    "part": [thing.part for thing in DETAILS],
    "stuff": [thing.stuff for thing in DETAILS],
}
FREE = {"time", "sad", "glad", "scared"}  # moods may be said in several words, so these need not agree


def to_pattern(wording: str) -> re.Pattern:
    """A wording as a regular expression with a group for each slot; a slot's second time must say the same."""
    pattern, seen = "", set()
    for text, slot in re.findall(r"([^{]*)(?:\{(\w+)\})?", wording):
        pattern += re.escape(text)
        if not slot:
            continue
        values = set(VALUES[slot.lower()]) - {"-"}  # a dash in the tables stands for nothing
        if slot[0].isupper():
            values = {value.capitalize() for value in values}
        longest_first = sorted(map(re.escape, values), key=lambda value: (-len(value), value))
        pattern += f"(?P={slot})" if slot in seen else f"(?P<{slot}>{'|'.join(longest_first)})"
        seen.add(slot)
    return re.compile(pattern)


class Wording(NamedTuple):
    """A wording of one event: the number of the event within its plot, and how to recognise it."""

    plot: str
    event: int
    pattern: re.Pattern
    literal: str  # its longest text outside of slots: the quick test before the pattern


def read_wordings() -> list[Wording]:
    """All wordings of all plots."""
    found = []
    for name, plot in PLOTS.items():
        events = [event for paragraph in plot.paragraphs for event in paragraph]
        for number, event in enumerate(events):
            for wording in event.wordings:
                literal = max(re.split(r"\{\w+\}", wording), key=len)
                found.append(Wording(name, number, to_pattern(wording), literal))
    return found


WORDINGS = read_wordings()
EVENTS = {name: [event for paragraph in plot.paragraphs for event in paragraph] for name, plot in PLOTS.items()}
FIRST_PART = {name: len(plot.paragraphs[0]) for name, plot in PLOTS.items()}  # events of the first paragraph


@lru_cache(maxsize=1 << 16)
def readings(sentence: str) -> dict[str, tuple[int, dict[str, str]]]:
    """What a sentence can say: plot -> (number of the event, slot -> value, both in lower case but for names)."""
    found = {}
    for plot, event, pattern, literal in WORDINGS:
        match = pattern.fullmatch(sentence) if literal in sentence else None
        if match:
            slots = match.groupdict().items()
            found[plot] = event, {s.lower(): v if s.islower() else v[0].lower() + v[1:] for s, v in slots}
    return found


# --- from a text to sentences -----------------------------------------------------------------------------------------

# A piece ends at . ? or ! with white space after it (and perhaps a quotation mark before that), or with its paragraph.
PIECE = re.compile(r'\S(?:(?!\n\n).)*?(?:[.?!]"?(?=\s|\Z)|(?=\n\n)|\Z)', re.DOTALL)


class Sentence(NamedTuple):
    """A sentence, the white space before it, and what it can say: nothing, if it is unknown."""

    text: str
    gap: str
    readings: dict[str, tuple[int, dict[str, str]]]


def split(text: str) -> list[Sentence]:
    """Cut a text into sentences: two pieces if they are a wording together, as some quotations are, else one."""
    text = text.strip()
    pieces, found, i, end = list(PIECE.finditer(text)), [], 0, 0
    while i < len(pieces):
        start, last = pieces[i].start(), pieces[i].end()
        known, used = readings(text[start:last]), 1
        if i + 1 < len(pieces) and (longer := readings(text[start : pieces[i + 1].end()])):
            known, used, last = longer, 2, pieces[i + 1].end()
        found.append(Sentence(text[start:last], text[end:start], known))
        i, end = i + used, last
    return found


# --- the judge --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How good an answer is: every number lies in [0, 1], and `total` is the product of the others."""

    total: float
    asked: float
    grammar: float
    facts: float
    ended: float
    reasons: tuple[str, ...]
    """One line for each deduction."""


def longest_in_order(numbers: list[int]) -> list[int]:
    """Positions of the longest strictly increasing row among some numbers; of several, the one that ends first."""
    best: list[list[int]] = []  # best[i]: the longest row that ends with number i
    for i, number in enumerate(numbers):
        before = [row for row, n in zip(best, numbers, strict=False) if n < number]
        best.append([*max(before, key=len, default=[]), i])
    return max(best, key=len, default=[])


def settle_facts(told: list[Sentence], plot: str) -> dict[str, str]:
    """What sentences say of each slot; where they disagree, what most of them say, or else the first."""
    said = defaultdict(Counter)
    for sentence in told:
        for slot, value in sentence.readings[plot][1].items():
            said[slot][value] += 1
    return {slot: counts.most_common(1)[0][0] for slot, counts in said.items()}


def fitting_pronouns(facts: dict[str, str]) -> dict[str, str]:
    """The pronouns that the hero and the friend must have."""
    if "hero" not in facts and "friend" not in facts:
        return {}
    girl = facts["hero"] in GIRLS if "hero" in facts else facts["friend"] in BOYS
    pronouns = PRONOUNS if girl else PRONOUNS[3:] + PRONOUNS[:3]
    return dict(zip(("she", "her_obj", "her", "he", "him", "his"), pronouns, strict=True))


def misfits(facts: dict[str, str], plot: str) -> list[tuple[str, str]]:
    """Facts that agree from sentence to sentence and yet do not suit each other or the plot: (slot, reason)."""
    things, places = THINGS[PLOTS[plot].things], PLACES[PLOTS[plot].places]
    has, found = facts.get, []
    thing = things.get(has("thing"))
    if has("friend") and has("hero") and (has("friend") in GIRLS) == (has("hero") in GIRLS):
        found.append(("friend", f"{has('hero')} and {has('friend')} would have the same pronouns"))
    if has("thing") and not thing:
        found.append(("thing", f"a {has('thing')} does not suit this plot"))
    for slot in ("place", "place2", "place3"):
        if has(slot) and has(slot) not in places:
            found.append((slot, f"{has(slot)} does not suit this plot"))
    if thing and has("adj") and has("adj") not in thing.adjectives:
        found.append(("adj", f"no {has('thing')} is {has('adj')}"))
    for slot in ("part", "stuff"):
        if thing and has(slot) and has(slot) != getattr(thing, slot):
            found.append((slot, f"{has(slot)} does not suit a {has('thing')}"))
    for one, other in (
        *(("place", "place2"), ("place", "place3"), ("place2", "place3")),
        *(("find2", "find3"), ("parent", "giver")),
    ):
        if has(one) and has(one) == has(other):
            found.append((other, f"{has(other)} is told of twice, as if it were another"))
    if {"n", "m", "total"} <= facts.keys():
        n, m, total = (NUMBERS.index(facts[slot]) for slot in ("n", "m", "total"))
        if n + m != total:
            found.append(("total", f"{has('n')} and {has('m')} is not {has('total')}"))
    return found


def judge_facts(given: list[Sentence], told: list[Sentence], plot: str, chain: list[Sentence]) -> tuple[float, list]:
    """The score for facts, with its reasons: what the chain says, what stands outside of it, and what is missing."""
    reasons, before = [], {sentence.readings[plot][0] for sentence in given}
    facts = settle_facts(chain, plot) | settle_facts(given, plot)  # what is given is so
    expected = facts | fitting_pronouns(facts)
    members, seen = set(map(id, chain)), set(before)
    for sentence in told:
        if plot not in sentence.readings:
            reasons += [f"of another plot: {sentence.text}"] if sentence.readings else []
            continue
        event, slots = sentence.readings[plot]
        if id(sentence) not in members:
            reasons.append(f"{'told twice' if event in seen else 'out of order'}: {sentence.text}")
            seen.add(event)
            continue
        seen.add(event)
        expected["a"] = "an" if slots.get("adj", "x")[0] in "aeiou" else "a"
        wrong = [slot for slot, value in slots.items() if slot not in FREE and value != expected[slot]]
        if wrong:
            reasons.append(f'not "{slots[wrong[0]]}" but "{expected[wrong[0]]}": {sentence.text}')
    for slot, reason in misfits(facts, plot):
        at = next((s.text for s in chain if s.readings[plot][1].get(slot) == facts[slot]), None)
        reasons += [f"{reason}: {at}"] if at else []  # what is wrong in the given text is not the writer's fault
    faults = len(reasons)
    required = {number for number, event in enumerate(EVENTS[plot]) if not event.optional}
    required = {number for number in required if number > max(before, default=-1)}
    missing = sorted(required - seen)
    reasons += [f"not told in this plot, {plot}: {EVENTS[plot][number].wordings[0]}" for number in missing]
    share = 1 - len(missing) / len(required) if required else 1.0
    return share * FAULT**faults, reasons


def judge_grammar(told: list[Sentence], plot: str, chain: list[Sentence]) -> tuple[float, list[str]]:
    """The score for grammar, with its reasons.

    Only sentences of the chain count as good: else whoever cannot write would gain by repeating what he can.
    """
    bad, reasons, members = 0.0, [], set(map(id, chain))
    for i, sentence in enumerate(told):
        if not sentence.readings:
            bad += math.ceil(len(sentence.text) / UNKNOWN_LENGTH)
            reasons.append(f"unknown: {sentence.text}")
        if i == 0:
            continue
        known = [id(s) in members for s in (told[i - 1], sentence)]
        gaps = {" ", "\n\n"}
        if all(known):
            halves = [s.readings[plot][0] < FIRST_PART[plot] for s in (told[i - 1], sentence)]
            gaps = {" "} if halves[0] == halves[1] else {"\n\n"}
        if sentence.gap not in gaps:
            bad += 0.5
            reasons.append(f"a paragraph begins or ends in the wrong place: {sentence.text}")
    return len(chain) / (len(chain) + bad) if chain else 0.0, reasons


def score_story(text: str, asked: dict[str, str], ended: bool = True, given: str = "") -> Score:
    """Judge a story.

    Args:
        text: the story.
        asked: slot -> value that the story must have: hero, thing, place, friend, or any other slot of stories.py.
        ended: whether the writer stopped by itself (wrote its end token), rather than being cut off.
        given: the beginning of the story that was given to the writer: `text` has to go on from it.
    """
    before, told = split(given), split(text)
    plots = Counter(plot for sentence in before or told for plot in sentence.readings)
    if not plots or not any(sentence.readings for sentence in told):
        return Score(0.0, 0.0, 0.0, 0.0, 0.0, (f"no known sentence: {text[:60]}",))
    # The plot is the one with most different events; in a continuation, the one that is given.
    plot = max(plots, key=lambda name: len({s.readings[name][0] for s in before or told if name in s.readings}))
    before = [sentence for sentence in before if plot in sentence.readings]
    start = max((sentence.readings[plot][0] for sentence in before), default=-1)
    new = [s for s in told if plot in s.readings and s.readings[plot][0] > start]
    chain = [new[i] for i in longest_in_order([sentence.readings[plot][0] for sentence in new])]

    facts = settle_facts(chain, plot) | settle_facts(before, plot)
    lacking = [slot for slot, value in asked.items() if facts.get(slot) != value]
    reasons = [f"asked for the {s} {asked[s]}, told of {facts.get(s, 'none')}" for s in lacking]
    asked_share = 1 - len(lacking) / len(asked) if asked else 1.0
    grammar, grammar_reasons = judge_grammar(told, plot, chain)
    fact_score, fact_reasons = judge_facts(before, told, plot, chain)
    end_last = bool(chain) and chain[-1] is told[-1] and told[-1].readings[plot][0] == len(EVENTS[plot]) - 1
    end_score = 1 - NO_ENDING * (not end_last) - NO_STOP * (not ended)
    reasons += grammar_reasons + fact_reasons
    reasons += [] if end_last else [f"this is no ending: {told[-1].text}"]
    reasons += [] if ended else [f"did not stop after: {told[-1].text}"]
    total = asked_share * grammar * fact_score * end_score
    return Score(total, asked_share, grammar, fact_score, end_score, tuple(reasons))


# --- answers, and one entry for all -----------------------------------------------------------------------------------


def read_number(text: str) -> str | None:
    """The result that a text gives: the number after its first "=", or else its last number, in digits or words."""
    head, equals, tail = text.partition("=")
    words = re.findall(r"-?\d+(?:\.\d+)?|[a-z]+(?:-[a-z]+)*", (tail if equals else head).lower())
    numbers = [str(NUMBERS.index(word)) if word in NUMBERS else word for word in words]
    numbers = [number for number in numbers if not number[0].isalpha()]
    if not numbers:
        return None
    return numbers[0] if equals else numbers[-1]


def score_answer(text: str, instruction: Instruction) -> float:
    """1.0 if a question or a sum is answered right, else 0.0: the very sentence, or the right result."""
    answer = instruction.asked["answer"]
    return float((read_number(text) if instruction.kind == "sum" else " ".join(text.split())) == answer)


def score(instruction: Instruction, text: str, ended: bool = True) -> Score:
    """Judge an answer of any kind; `ended` is whether the writer stopped by itself.

    Of a continuation only what was written is judged, but against what was given: it has to have the same facts.
    """
    if instruction.kind == "story":
        return score_story(text, instruction.asked, ended)
    if instruction.kind == "continuation":
        return score_story(text, {}, ended, given_text(instruction))
    right, end = score_answer(text, instruction), 1 - NO_STOP * (not ended)
    reasons = () if right else (f"not {instruction.response} but {text[:60]}",)
    reasons += () if ended else (f"did not stop after: {text[-60:]}",)
    return Score(right * end, right, 1.0, 1.0, end, reasons)


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Judge a perfect story and five damaged ones."""

    seed: int = 0
    """Which story."""
    smoke: bool = False
    """A real but tiny run: the same, for it takes a second."""


def damage(text: str, hero: str) -> dict[str, str]:
    """Five ways to spoil a story: what was done -> what became of it."""
    sentences = split(text)
    words = sentences[2].text.split(" ")
    other = next(name for name in (GIRLS if hero in GIRLS else BOYS) if name != hero)
    head, _, tail = text.rpartition(hero)
    return {
        "two words exchanged": text.replace(sentences[2].text, " ".join([words[1], words[0], *words[2:]])),
        "another hero in one place": f"{head}{other}{tail}",
        "a sentence told twice": text.replace(sentences[1].text, f"{sentences[1].text} {sentences[1].text}"),
        "the middle left out": f"{sentences[0].text} {sentences[1].text}\n\n{sentences[-1].text}",
        "the ending left out": text.removesuffix(sentences[-1].text).strip(),
    }


def main(config: Config) -> None:
    """Print one perfect story with its score, then damaged ones with theirs and the reasons."""
    stories = make_instructions(50, config.seed, True, kinds=("story",))
    instruction = next(i for i in stories if i.difficulty == 3)
    print(f"{instruction.prompt}\n\n{instruction.response}\n")
    versions = {"as it is": instruction.response} | damage(instruction.response, instruction.asked["hero"])
    for name, text in versions.items():
        result = score(instruction, text)
        parts = ", ".join(f"{part} {getattr(result, part):.3f}" for part in ("asked", "grammar", "facts", "ended"))
        print(f"{name + ':':28s} total {result.total:.3f} = {parts}")
        print("".join(f"    {reason}\n" for reason in result.reasons), end="")


if __name__ == "__main__":
    main(tyro.cli(Config))
