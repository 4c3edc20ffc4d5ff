"""A small world of children's stories and sums: the text that part 2 and all later parts train on.

A story is a row of events; an event has several wordings; a wording is a sentence with named slots such as {hero} or
{place}. To write a story we settle every slot once, from the brief (what is asked for) and at random (the rest), and
then pick one wording for each event of its plot. Since every fact stands in a slot, and a slot has a short list of
values, the tables can be read in both directions: turned into regular expressions, the same wordings recognise a story
and give its facts back. Training and held-out text are split by a hash of what is asked for: hero, thing and place.

    python part2_minimal_llm/stories.py --count 3 --seed 0     # prints three documents and counts the briefs; 1 second

Eldan and Li 2023, "TinyStories", sections 1 and 2: small models learn to write from simple stories with few words.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import tyro

# --- the lexicon: who, what and where ---------------------------------------------------------------------------------


class Thing(NamedTuple):
    """What a story can be about: its fitting adjectives, and two more words that each table explains."""

    adjectives: tuple[str, ...]
    part: str
    stuff: str


def read_list(table: str) -> tuple[str, ...]:
    """Read phrases separated by commas."""
    return tuple(" ".join(phrase.split()) for phrase in table.split(","))


def read_things(table: str) -> dict[str, Thing]:
    """Read entries "noun adjective,adjective part stuff;" (an underscore stands for a space, a dash for nothing)."""
    rows = [entry.split() for entry in table.split(";")]
    return {noun: Thing(read_list(adjs), part, stuff.replace("_", " ")) for noun, adjs, part, stuff in rows}


GIRLS = read_list("Anna, Clara, Ella, Emma, Grace, Hannah, Ida, Ivy, Julia, Lily, Lucy, Mia, Nora, Rosa, Ruby, Zoe")
BOYS = read_list("Adam, Ben, David, Felix, Finn, Hugo, Jack, Leo, Luke, Max, Noah, Oscar, Paul, Peter, Sam, Tom")
PRONOUNS = ("she", "her", "her", "he", "him", "his")  # subject, object, possessive
RELATIVES = read_list("mother, father, grandmother, grandfather, aunt, uncle")
# Things that a child can carry, with the part that may come off, and what a child can make such a thing of.
TREASURES = read_things("""
    kite red,blue,long tail paper;         doll little,pretty,old arm cloth;      drum small,round,loud strap -;
    lantern red,round,yellow handle paper; scarf warm,soft,striped tassel wool;   hat green,funny,blue ribbon straw;
    basket small,brown,round handle straw; boat white,little,wooden sail wood;    train long,red,wooden wheel wood;
    cart small,green,wooden wheel wood;    puppet funny,little,old string cloth;  whistle silver,loud,tiny ring -;
    book thick,old,green cover -;          box small,blue,wooden lid wood;        bag brown,striped,new strap cloth;
    mask funny,green,golden string paper;  crown golden,shiny,yellow star paper;  cup yellow,small,white handle clay;
    bell silver,little,old ribbon -;       fan white,pretty,silver ribbon paper;  car fast,red,blue wheel wood;
    compass shiny,old,golden lid -;        purse red,tiny,pretty button cloth;    flag orange,big,white ribbon cloth;
    necklace green,long,pretty clasp -;    windmill blue,tiny,yellow wing paper;  sword short,wooden,silver handle wood;
    robot shiny,grey,square arm -;         camera black,small,new strap -;        teddy brown,fat,soft ear wool;
    plane white,fast,wooden wing wood;     rocket tall,orange,white tip paper;    watch silver,new,tiny strap -""")
# Animals, with what they like to eat. Dishes, with what there is too little of. Plants.
ANIMALS = read_things("""
    kitten grey,tiny,white - some_milk;    puppy brown,little,black - a_bone;     duckling yellow,tiny,wet - some_bread;
    rabbit white,brown,young - a_carrot;   lamb white,young,little - some_clover; goat grey,old,black - some_cabbage;
    donkey old,grey,thin - an_apple;       pony brown,young,little - a_turnip;    hen red,fat,old - some_corn""")
DISHES = read_things("""
    cake round,big,sweet - eggs;           pie big,sweet,golden - apples;         soup hot,thick,red - tomatoes;
    tart sweet,golden,round - plums;       stew hot,thick,brown - carrots;        pudding sweet,soft,big - lemons;
    loaf soft,dark,round - nuts;           trifle big,yellow,sweet - cherries;    crumble hot,sweet,golden - pears""")
PLANTS = read_things("""
    sunflower tall,yellow,bright - -;      pumpkin round,orange,big - -;          melon green,sweet,round - -;
    poppy red,tall,bright - -;             tomato red,round,sweet - -;            cucumber long,green,thin - -;
    marigold orange,bright,small - -;      cornflower blue,tall,small - -;        daisy white,small,tall - -""")
HANDMADE = {noun: thing for noun, thing in TREASURES.items() if thing.stuff != "-"}
THINGS = {"treasure": TREASURES, "handmade": HANDMADE, "animal": ANIMALS, "dish": DISHES, "plant": PLANTS}
# A place comes with its preposition and says where something is, never where somebody goes.
YARD = read_list("""behind the barn, beside the well, by the garden gate, behind the shed, under the kitchen window,
    by the stone wall, behind the school, next to the greenhouse, beside the beehives""")
VILLAGE = read_list("in front of the library, by the fountain, behind the church, on the playground, near the station")
WILD = read_list("""under the bridge, under the old oak, by the pond, in the tall grass, on the hill, near the mill,
    at the edge of the wood, by the river, among the birches, beside the haystack, under the willow, in the meadow""")
PLACES = {"outdoors": YARD + VILLAGE + WILD, "wild": WILD, "yard": YARD}
FINDS = read_list("an old shoe, a fat snail, a grey feather, a brown frog, an empty nest, a rusty nail, a button")
NUMBERS = read_list("""zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
    fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty""")
# The slots that a story settles at random.
CHANCE = {
    "time": read_list("One day, One morning, One day in May, On Monday, On Tuesday, On Thursday, On Friday, On Sunday"),
    "sad": read_list("sad, unhappy, upset, gloomy"),
    "glad": read_list("happy, glad, pleased, delighted"),
    "scared": read_list("scared, afraid, frightened, worried"),
    "hour": read_list("two, three, four, five"),
    "game": read_list("playing ball, playing tag, flying kites, picking berries, climbing trees, skipping, swimming"),
    "scare": read_list("a big dog, a loud cart, a black crow, a passing train, a fox"),
    "sight": read_list("a yellow butterfly, a red squirrel, a white bird, a young hare, a green dragonfly"),
    "stone": read_list("a stone, a root, a branch, a step"),
    "treats": read_list("biscuits, plums, cherries, nuts, pears, apples"),
}

# --- the plots --------------------------------------------------------------------------------------------------------
# A plot begins with its name and the kinds of things and places that suit it. Then there is a line for each event: its
# name, and its wordings between bars. A question mark after the name: the event may be left out. A slash begins a new
# paragraph. A wording is one sentence. It is written as if the hero were a girl and the friend a boy: {she},
# {her_obj} and {her} are the hero's pronouns, {he}, {him} and {his} the friend's. (The two are never both girls or both
# boys, so it is always clear who "she" is.) A slot with a capital, {She}, begins a sentence.


class Event(NamedTuple):
    """Something that happens in a story, and the sentences that can say so."""

    name: str
    optional: bool
    wordings: tuple[str, ...]


class Plot(NamedTuple):
    """The kinds of things and places that suit a plot, and its paragraphs of events, in order."""

    things: str
    places: str
    paragraphs: list[list[Event]]


def read_plots(table: str) -> dict[str, Plot]:
    """Read plots from a table as described above; a line that begins with a bar continues the line before it."""
    plots = {}
    for text in table.replace("\n    |", " |").split("\n== ")[1:]:
        heading, _, body = text.strip().partition("\n")
        name, things, places = heading.split(", ")
        lines = [[line.split(": ", 1) for line in paragraph.split("\n")] for paragraph in body.split("\n/ ")]
        events = [[Event(n.rstrip("?"), n.endswith("?"), tuple(w.split(" | "))) for n, w in pairs] for pairs in lines]
        plots[name] = Plot(things, places, events)
    return plots


PLOTS = read_plots("""
== lost, treasure, outdoors
open: {time}, {hero} took {her} {adj} {thing} out to play. | {time}, {hero} went out with {her} {adj} {thing}.
leave: {She} sat down {place} and laid the {thing} beside {her_obj}. | {She} played with it {place} for a while.
forget: Then {her} {parent} called, and {she} forgot it. | Then it began to rain, and {she} ran home without it.
sad: At home {she} was {sad}, because the {thing} was gone. | Later {hero} missed the {thing} and was {sad}.
/ help: "I will help you look," said {friend} from next door. | "Do not cry. I will help you," said {friend}.
first: First they looked {place2}, but found only {find2}. | They searched {place2}, but there was only {find2}.
next: Then they looked {place3}, but saw only {find3}. | Next they tried {place3}, but there was just {find3}.
remember: "Now I remember, I had it {place}," said {hero}. | {hero} thought hard and said, "I was {place}."
found: They ran back, and there lay the {thing}. | They hurried there, and the {thing} was still {place}.
end: {hero} was so {glad} that {she} hugged {friend}. | {hero} was {glad}, because the {thing} was safe.
== promise, treasure, outdoors
open: {time}, {friend} asked {hero} about {her} {adj} {thing}. | {friend} wanted to see {hero}'s {adj} {thing}.
promise: "I promise to bring it at {hour} o'clock," said {hero}. | "I promise to show it to you," said {hero}.
where: "I will wait for you {place}," said {friend}. | "Then let us meet {place}," said {friend}.
go: After lunch {hero} took the {thing} and set out. | Soon {hero} was on {her} way with the {thing} in {her} hand.
weather?: It was a warm day. | The sun was shining, and the birds were singing. | A soft wind was blowing.
/ meet: On the way {she} met some children who were {game}. | Halfway there, {she} saw children who were {game}.
invite: "Come and join us," they called. | "Stay here with us," said one of them.
want: {hero} wanted to stay, because it looked like fun. | {hero} stopped, for {she} would have liked to join them.
refuse: But {she} thought of {friend} and ran on. | "I cannot stay, because {friend} is waiting," {she} said.
wait: {friend} was standing {place}, looking down the road. | There was {friend}, waiting {place}.
end: {hero} gave {him} the {thing}, and {he} was {glad}. | {He} was {glad}, because {she} had kept {her} promise.
== gift, handmade, outdoors
open: {friend} was ill and had to stay in bed. | {time}, {hero} heard that {friend} was ill.
sad: {hero} was {sad}, because {she} could not play with {him}. | {hero} missed {him} and was {sad}.
idea: "I will make {him} {a} {adj} {thing}," {she} thought. | {She} wanted to make {him} {a} {adj} {thing}.
stuff: {Her} {parent} gave {her_obj} some {stuff} for it. | {She} asked {her} {parent} for some {stuff}.
work: {She} sat down {place} and began to work. | Then {she} sat {place} and worked all afternoon.
count?: {She} used {n} small pieces and {m} big ones, so the {thing} had {total} pieces in all.
    | {She} had {total} pieces and used {m} of them, so {n} were left.
hard: It was not easy, but {she} did not give up. | Twice it came apart, but {she} began again.
/ done: When the {thing} was ready, {she} took it to {friend}. | At last {she} took the {thing} to {friend}'s house.
give: "This is for you. I made it myself," said {hero}. | "Look what I made for you," said {hero}.
glad: {friend} was {glad}, because {hero} had thought of {him}. | {friend} was so {glad} that {he} sat up and laughed.
end: A week later {he} was well, and they sat {place} with the {thing}. | Soon {he} was well and met {hero} {place}.
== quarrel, treasure, outdoors
open: {time}, {hero} and {friend} bought {a} {adj} {thing}. | {hero} and {friend} shared {a} {adj} {thing}.
play: They played with it {place}, and at first all went well. | They took it with them and played {place}.
mine: "Now it is my turn," said {hero}. | "You have had it long enough," said {hero}. | "Give it to me," said {hero}.
no: "No, I want it now," cried {friend}. | "No, you had it first," said {friend}.
apart: They pulled at it until {friend} had it, and {hero} ran home. | {friend} kept the {thing}, and {hero} went home.
/ sad: {hero} was {sad}, because {she} had lost a friend. | {hero} was {sad}, for {she} had nobody to play with.
advice: "A friend is worth more than a {thing}," said {her} {parent}. | "Go back to {friend}," said {her} {parent}.
back: {hero} went back and found {friend} {place}. | {hero} ran back, and {friend} was still {place}.
sorry: "I am sorry. I should not have shouted," said {hero}. | "I am sorry that I was angry," said {hero}.
too: "I am sorry too," said {friend}, and {he} gave {her_obj} the {thing}. | {friend} held out the {thing} and smiled.
end: After that they took turns, and both were {glad}. | They were {glad}, because they were friends again.
== coax, animal, outdoors
open: {time}, {hero} heard a small sound {place}. | {time}, {hero} saw something hiding {place}.
see: It was {a} {adj} {thing}, and it was shaking. | {A} {adj} {thing} stood there and did not dare to move.
why: {Scare} had frightened it. | It was {scared}, because {scare} had come too close.
calm: "I will not hurt you," said {hero} softly. | "You need not be afraid," said {hero} in a low voice.
/ fetch: Then {friend} came by, saw the {thing} and got {stuff}. | {friend} saw them from afar and brought {stuff}.
put: {hero} put the food on the ground and waited. | "It must be hungry," said {hero} and put the food down.
count?: The {thing} took {n} small steps and then {m} more, {total} steps in all.
come: Slowly the {thing} came closer and began to eat. | Then the {thing} came right up to {her_obj} and ate.
stroke: At last {hero} could stroke its head. | Then it let {hero} stroke its back.
glad: {hero} was {glad}, because the {thing} was not afraid now. | {hero} was {glad}, for the {thing} trusted {her_obj}.
end: In the evening they took the {thing} back to its farm. | The farmer it belonged to thanked {hero} and {friend}.
== bake, dish, outdoors
open: {time}, {hero} wanted to make {a} {adj} {thing}. | {time}, {hero} and {her} {parent} wanted {a} {adj} {thing}.
party: It was for the party {place}. | In the evening there was to be a party {place}.
missing: The {thing} needed {total} {stuff}, but there were only {n}, so {m} were missing.
    | The {thing} needed {total} {stuff}, and {hero} had {n}, so {she} had to find {m} more.
sad: {hero} was {sad}, because now {she} could not go on. | "Then we cannot make it," said {hero}, and {she} was {sad}.
advice: "Perhaps {friend} can help us," said {her} {parent}. | "Go and ask {friend}," said {her} {parent}.
/ ask: {hero} ran to {friend} and asked for {m} {stuff}. | "Can you lend us {m} {stuff}?" {she} asked {friend}.
give: {friend} looked in {his} kitchen and found {m}. | "Of course," said {friend} and gave {her_obj} {m}.
smell: Soon the {thing} was ready, and it smelled very good. | Before long the whole house smelled of {thing}.
carry: In the evening {she} put the {thing} on a table {place}. | {hero} took the {thing} to the guests {place}.
eat: Everybody liked it, and soon nothing was left. | "This is the best {thing} of all," said the guests.
end: {hero} was {glad}, because {friend} had helped {her_obj}. | {friend} got the biggest helping, and {he} was {glad}.
== race, treasure, outdoors
open: {time}, there was a race for all the children. | {time}, all the children of the village ran a race.
start: The children stood in a row {place}. | Everybody came to the start {place}.
prize: The prize was {a} {adj} {thing}. | The winner was to get {a} {adj} {thing}.
run: {hero} ran fast, with {friend} right behind {her_obj}. | {hero} was first, but {friend} came closer.
fall: Then {she} tripped over {stone}, and {he} ran past. | Near the end {she} grew tired, and {he} ran past {her_obj}.
/ get: So {friend} won, and the teacher gave {him} the {thing}. | {friend} won the {thing}, and everybody clapped.
sad: {hero} was {sad}, because {she} had almost won. | {hero} looked at the ground and was {sad}, for {she} had lost.
praise: But {she} shook {his} hand and said, "Well done." | "You ran very well," {she} said all the same.
share: "We can share the {thing}," said {friend}. | "Come, we will try the {thing} together," said {friend}.
treats?: {hero} had {n} {treats} and {friend} gave {her_obj} {m} more, so now {she} had {total}.
    | They had {total} {treats} in a bag, and after they had eaten {m}, there were {n} left.
end: They sat {place} until sunset and were both {glad}. | {hero} was {glad}, for a friend is better than a prize.
== broken, treasure, outdoors
open: {time}, {friend} lent {hero} {his} {adj} {thing}. | {time}, {hero} borrowed {friend}'s {adj} {thing}.
warn: "Please take good care of it," {he} said. | "Be careful with it," said {friend}, "because I love it."
use: {hero} took it with {her_obj} and played {place}. | {hero} went out and showed it to the children {place}.
trip: Then {she} fell over {stone}, and the {part} came off. | But {she} dropped the {thing}, and its {part} came off.
afraid: {hero} was {scared}, because {friend} would be angry. | Now {she} was {scared}, for {friend} loved the {thing}.
/ tell: {She} went to {her} {parent} and told the whole story. | {She} showed {her} {parent} the {thing} and cried.
mend: Together they put the {part} back on. | With a steady hand, {her} {parent} put the {part} back on.
advice: "Now tell {friend} the truth," said {her} {parent}. | "You must tell {friend}," said {her} {parent}.
truth: {hero} told {friend} that the {thing} had broken {place}. | "I am sorry. It broke {place}," {hero} told {friend}.
forgive: "Thank you for telling me," {he} said. | "It is as good as new, and I am not angry," {he} said.
end: {hero} was {glad}, because {she} had told the truth. | Now {hero} was {glad}, and so was {friend}.
== way_home, treasure, wild
open: {time}, {hero} set out with {a} {adj} {thing} for {her} {giver}.
    | {time}, {hero} was taking {a} {adj} {thing} to {her} {giver}.
lost: On the way {she} ran after {sight} and got lost. | {She} followed {sight} until {she} could not see the road.
afraid: Night came, and {hero} was {scared}, because {she} was alone. | {hero} was {scared}, for it was getting dark.
/ rule: "If you are lost, stay where you are," {her} {parent} always said. | "I must stay in one place," {she} thought.
sit: So {she} sat down {place} and held the {thing} tight. | So {she} stayed {place} with the {thing} in {her} arms.
call: {She} called for help as loudly as {she} could. | "Is anybody there?" {she} called again and again.
count?: {She} counted {n} stars in the sky and then {m} more, {total} stars in all.
hear: After a while {she} heard {friend}'s voice. | At last somebody answered, and it was {friend}.
found: {friend} and {her} {giver} found {her_obj} {place}. | {He} and {her} {giver} found {her_obj} {place}.
give: {hero} still had the {thing} and gave it to {her} {giver}. | "The {thing} is for you," {hero} told {her} {giver}.
end: Hand in hand they all walked home. | {hero} was {glad}, because {she} was not alone any more.
== seed, plant, yard
open: {time}, {hero}'s {giver} gave {her_obj} a small seed. | {time}, {hero} got a seed from {her} {giver}.
what: "It will grow into {a} {adj} {thing}," said {her} {giver}. | "It will be {a} {adj} {thing}," said {her} {giver}.
plant: {hero} planted it {place} and gave it some water. | {hero} made a hole {place} and put the seed into it.
sad: {hero} was {sad}, because nothing grew. | {hero} waited and waited, and {she} was {sad} that nothing happened.
doubt: "It will never grow," {she} said to {friend}. | "Perhaps my seed is bad," {she} told {friend}.
patience: "A seed needs time," said {friend}. | "Do not give up," said {friend}, and {he} brought some water.
/ water: So {hero} watered it every evening and waited. | So {hero} went on and gave it water every day.
sprout: One morning a green tip came out of the earth. | Then, after a night of rain, a tiny plant stood {place}.
count?: First the plant had {n} leaves and then {m} more, so now there were {total}.
    | The plant had {total} leaves, but a snail ate {m} of them, so {n} were left.
ready: By the end of summer there was {a} {adj} {thing} {place}. | In the end {a} {adj} {thing} was growing {place}.
end: {hero} was {glad}, because {she} had not given up. | {hero} was {glad} and kept its seeds for the next spring.
""")

# --- sums -------------------------------------------------------------------------------------------------------------

SUM_WORDINGS = {
    "+": ("{A} and {b_word} make {c_word}.", "{A} plus {b_word} is {c_word}."),
    "-": ("{A} take away {b_word} leaves {c_word}.", "{A} minus {b_word} is {c_word}."),
}
SUMS = [(a, "+", b) for a in range(21) for b in range(21 - a)] + [(a, "-", b) for a in range(21) for b in range(a + 1)]


def is_held_out(asked: str) -> bool:
    """Whether what these words ask for is kept from training: about one in ten, and the same on every machine."""
    return zlib.crc32(asked.encode()) % 10 == 9


def write_sums(rng: random.Random, held_out: bool) -> str:
    """Write a page of five to nine different sums, one a line: all of them held out, or none."""
    sums = [(a, op, b) for a, op, b in SUMS if is_held_out(f"{a} {op} {b}") == held_out]
    lines = []
    for a, op, b in rng.sample(sums, rng.randrange(5, 10)):
        c = a + b if op == "+" else a - b
        words = {"A": NUMBERS[a].capitalize(), "b_word": NUMBERS[b], "c_word": NUMBERS[c]}
        lines.append(f"{a} {op} {b} = {c}. " + rng.choice(SUM_WORDINGS[op]).format_map(words))
    return "\n".join(lines)


# --- stories ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brief:
    """What is asked of a story."""

    hero: str
    """A name out of GIRLS or BOYS."""
    thing: str
    """What the story is about, a noun of a kind that suits the plot: "lantern"."""
    place: str
    """Where it happens, of a kind that suits the plot: "under the bridge"."""
    plot: str
    """A key of PLOTS."""


def all_briefs() -> Iterator[Brief]:
    """Every brief there is, in a fixed order."""
    for name, plot in PLOTS.items():
        for thing in THINGS[plot.things]:
            for place in PLACES[plot.places]:
                yield from (Brief(hero, thing, place, name) for hero in GIRLS + BOYS)


def make_brief(rng: random.Random) -> Brief:
    """Draw a brief: first the plot, then a hero, and a thing and a place that suit the plot."""
    name = rng.choice(list(PLOTS))
    things, places = THINGS[PLOTS[name].things], PLACES[PLOTS[name].places]
    return Brief(rng.choice(GIRLS + BOYS), rng.choice(list(things)), rng.choice(places), name)


def asked_for(brief: Brief) -> str:
    """The words that decide on which side of the split a brief is: the same for every plot."""
    return f"{brief.hero}, {brief.thing}, {brief.place}"


def settle(brief: Brief, rng: random.Random) -> dict[str, str]:
    """Settle every fact of a story: slot name -> text, the same from its first sentence to its last."""
    plot, girl = PLOTS[brief.plot], brief.hero in GIRLS
    thing = THINGS[plot.things][brief.thing]
    adj = rng.choice(thing.adjectives)
    pronouns = PRONOUNS if girl else PRONOUNS[3:] + PRONOUNS[:3]
    slots = dict(zip(("she", "her_obj", "her", "he", "him", "his"), pronouns, strict=True))
    slots |= {"hero": brief.hero, "thing": brief.thing, "place": brief.place}
    slots["friend"] = rng.choice(BOYS if girl else GIRLS)
    slots |= {"adj": adj, "a": "an" if adj[0] in "aeiou" else "a", "part": thing.part, "stuff": thing.stuff}
    slots |= {slot: rng.choice(values) for slot, values in CHANCE.items()}
    slots["parent"], slots["giver"] = rng.sample(RELATIVES, 2)
    slots["find2"], slots["find3"] = rng.sample(FINDS, 2)
    slots["place2"], slots["place3"] = rng.sample([p for p in PLACES[plot.places] if p != brief.place], 2)
    while True:  # two numbers whose sum is not held out, nor the differences that undo it
        n, m = rng.randrange(2, 8), rng.randrange(2, 8)
        if not any(is_held_out(asked) for asked in (f"{n} + {m}", f"{n + m} - {m}", f"{n + m} - {n}")):
            break
    slots |= {"n": NUMBERS[n], "m": NUMBERS[m], "total": NUMBERS[n + m]}
    return slots | {slot.capitalize(): slots[slot].capitalize() for slot in ("she", "her", "he", "his", "a", "scare")}


def tell(brief: Brief, rng: random.Random) -> tuple[dict[str, str], list[list[tuple[str, str]]]]:
    """Tell a story as data: its facts (slot -> text), and its paragraphs of pairs (name of an event, its sentence)."""
    slots = settle(brief, rng)
    paragraphs = []
    for events in PLOTS[brief.plot].paragraphs:
        told = [event for event in events if not event.optional or rng.random() < 0.5]
        paragraphs.append([(event.name, rng.choice(event.wordings).format_map(slots)) for event in told])
    return slots, paragraphs


def write_story(brief: Brief, rng: random.Random) -> str:
    """Write the story that `tell` tells: sentences joined by spaces, paragraphs by blank lines."""
    _, paragraphs = tell(brief, rng)
    return "\n\n".join(" ".join(sentence for _, sentence in paragraph) for paragraph in paragraphs)


def documents(n: int, seed: int, held_out: bool) -> list[str]:
    """Write n documents of one side of the split, about one in twelve a page of sums; equal arguments, equal text."""
    rng, texts = random.Random(seed), []
    while len(texts) < n:
        if rng.random() < 1 / 12:
            texts.append(write_sums(rng, held_out))
            continue
        brief = make_brief(rng)
        while is_held_out(asked_for(brief)) != held_out:
            brief = make_brief(rng)
        texts.append(write_story(brief, rng))
    return texts


@dataclass
class Config:
    """Print some documents of the embedded text."""

    count: int = 3
    """How many documents to print."""
    seed: int = 0
    """Which documents: another seed, other documents."""
    held_out: bool = False
    """Print documents that no model is trained on."""
    smoke: bool = False
    """A real but tiny run: one document."""


def main(config: Config) -> None:
    """Print documents, and how many different briefs there are."""
    count = 1 if config.smoke else config.count
    print(("\n" + "-" * 60 + "\n").join(documents(count, config.seed, config.held_out)))
    held_out = [is_held_out(asked_for(brief)) for brief in all_briefs()]
    print(f"\n{len(held_out):,} briefs in {len(PLOTS)} plots, {sum(held_out):,} of them held out")


if __name__ == "__main__":
    main(tyro.cli(Config))
