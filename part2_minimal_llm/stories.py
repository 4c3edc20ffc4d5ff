"""A small world of children's stories and sums: the text that every part of this tutorial trains on.

A story is a row of events; an event has several wordings; a wording is a sentence with named slots such as {hero} or
{place}. A plot lists its events in order. To write a story we settle every slot once, from the brief (what is asked
for) and by chance (the rest), and then pick one wording for each event. Since every fact stands in a slot, and every
slot has a short list of possible values, the tables can be read in both directions: turned into regular expressions,
the same wordings recognise a story and give its facts back. Later parts use that to check what a model has written.

    python part2_minimal_llm/stories.py --count 3 --seed 0     # prints three documents, and how many briefs there are

Training and held-out text are split by a hash of what is asked for (hero, thing and place; or the sum), so a model that
does well on held-out text has learned how stories go, and has not met these stories before. The idea of a small
world of simple stories for small models is from Eldan and Li 2023, "TinyStories", sections 1 and 2.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import tyro

# --- the lexicon: who, what and where ---------------------------------------------------------------------------------

GIRLS = "Anna Clara Ella Emma Grace Hannah Ida Ivy Julia Lily Lucy Mia Molly Nora Rosa Ruby Sara Zoe".split()
BOYS = "Adam Ben David Felix Finn Hugo Jack Leo Luke Max Noah Oscar Paul Peter Sam Simon Toby Tom".split()
PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}  # subject, object, possessive


class Thing(NamedTuple):
    """What a story can be about: its fitting adjectives, and a `part` and a `stuff` whose meaning depends on the kind."""

    adjectives: tuple[str, ...]
    part: str
    stuff: str


def read_things(table: str) -> dict[str, Thing]:
    """Read entries "noun adjective,adjective part stuff; ..." (an underscore stands for a space, a dash for nothing)."""
    rows = [entry.replace("\n", " ").split() for entry in table.split(";")]
    return {noun: Thing(tuple(adjs.split(",")), part, stuff.replace("_", " ")) for noun, adjs, part, stuff in rows}


# Things that a child can carry. The part is what may come off; the stuff is what a child can make such a thing of.
TREASURES = read_things("""
    kite red,blue,long tail paper;            doll little,pretty,old arm cloth;       drum small,round,loud strap -;
    lantern red,round,yellow handle paper;    scarf warm,soft,striped tassel wool;    hat green,funny,blue ribbon straw;
    basket small,brown,round handle straw;    boat white,little,wooden sail wood;     train long,red,wooden wheel wood;
    cart small,green,wooden wheel wood;       puppet funny,little,old string cloth;   whistle silver,loud,tiny ring -;
    book thick,old,green cover -;             box small,blue,wooden lid wood;         bag brown,striped,new strap cloth;
    mask funny,green,golden string paper;     crown golden,shiny,yellow star paper;   cup yellow,small,white handle clay;
    bell silver,little,old ribbon -;          horn golden,old,shiny strap -;          clock old,small,round hand -;
    compass shiny,old,golden lid -;           purse red,tiny,pretty button cloth;     fan pretty,white,silver ribbon paper;
    cushion soft,orange,round button cloth;   necklace green,long,pretty clasp beads; bracelet blue,thin,pretty clasp beads;
    flag orange,striped,white ribbon cloth;   windmill blue,tiny,yellow wing paper;   sword short,wooden,silver handle wood;
    bear brown,fat,soft ear wool;             robot shiny,grey,square arm -;          camera black,small,new strap -;
    bucket red,new,yellow handle -;           spade short,orange,new handle -;        brush thick,soft,new handle -;
    car fast,red,blue wheel wood;             bird white,wooden,tiny wing wood;       star shiny,silver,big ribbon straw;
    mirror round,golden,tiny handle -;        flute thin,silver,wooden ring -;        torch black,new,yellow switch -;
    plane white,fast,wooden wing wood;        dragon green,long,funny tail paper""")
# Animals: the stuff is what each likes to eat.
ANIMALS = read_things("""
    kitten grey,tiny,white - some_milk;       puppy brown,little,black - a_bone;      duckling yellow,tiny,wet - some_bread;
    rabbit white,brown,young - a_carrot;      lamb white,young,little - some_clover;  goat grey,old,black - some_cabbage;
    donkey old,grey,thin - an_apple;          pony brown,young,little - a_turnip;     hen red,fat,old - some_seeds;
    goose white,big,angry - some_corn;        calf brown,young,little - some_hay;     piglet pink,fat,tiny - a_potato""")
# Dishes: the stuff is what there is too little of.
DISHES = read_things("""
    cake round,big,sweet - eggs;              pie big,sweet,golden - apples;          soup hot,thick,red - tomatoes;
    tart sweet,golden,fine - plums;           stew hot,thick,brown - carrots;         pudding sweet,soft,big - lemons;
    bread soft,dark,round - nuts;             omelet big,yellow,thick - eggs;         crumble hot,sweet,golden - pears""")
PLANTS = read_things("""
    sunflower tall,yellow,bright - -;         pumpkin round,orange,big - -;           melon green,sweet,round - -;
    poppy red,tall,bright - -;                tomato red,round,sweet - -;             cucumber long,green,thin - -;
    marigold orange,bright,small - -;         cornflower blue,tall,small - -;         daisy white,small,tall - -""")
THINGS = {
    "treasure": TREASURES,
    "handmade": {noun: thing for noun, thing in TREASURES.items() if thing.stuff != "-"},
    "animal": ANIMALS,
    "dish": DISHES,
    "plant": PLANTS,
}
EVERYTHING = TREASURES | ANIMALS | DISHES | PLANTS  # noun -> Thing; no noun occurs twice


def read_list(table: str) -> tuple[str, ...]:
    """Read phrases separated by commas."""
    return tuple(phrase.strip() for phrase in table.split(","))


# A place comes with its preposition and says where something is, never where somebody goes.
YARD = read_list("""behind the barn, beside the well, by the garden gate, behind the shed, under the kitchen window,
    by the stone wall, behind the school, next to the greenhouse, beside the beehives""")
VILLAGE = read_list("""in front of the library, near the bakery, by the fountain, behind the church, on the playground,
    beside the market hall, near the station""")
WILD = read_list("""under the bridge, under the old oak, by the pond, in the tall grass, on the hill, near the mill,
    at the edge of the wood, by the river, among the birches, beside the haystack, under the willow, in the meadow,
    near the waterfall, by the big rock""")
HOUSE = read_list("""under the bed, behind the sofa, in the wardrobe, on the top shelf, under the stairs, in the attic,
    behind the curtain, under the table, behind the stove, in the laundry basket""")
PLACES = {"outdoors": YARD + VILLAGE + WILD, "wild": WILD, "yard": YARD, "indoors": HOUSE}

NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty""".split()
RELATIVES = read_list("mother, father, grandmother, grandfather, aunt, uncle")
FINDS = read_list("""an old shoe, a fat snail, a grey feather, a brown frog, an empty nest, a rusty nail, a blue button,
    a broken pot, an orange leaf, a sleeping cat""")
# The slots that a story settles by chance alone.
CHANCE = {
    "time": read_list("""One day, One morning, One Sunday, One day in May, One day in June, On Monday, On Tuesday,
        On Wednesday, On Thursday, On Friday, On Saturday, One fine day, Early one morning, Last summer"""),
    "fine": read_list("sunny, warm, bright, mild, clear"),
    "sad": read_list("sad, unhappy, upset, gloomy, disappointed"),
    "glad": read_list("happy, glad, cheerful, pleased, joyful"),
    "scared": read_list("scared, afraid, frightened, worried"),
    "hour": read_list("two, three, four, five"),
    "game": read_list("playing ball, playing tag, flying kites, picking berries, climbing trees, skipping, swimming"),
    "scare": read_list("a big dog, a loud cart, the thunder, a passing train, a fox"),
    "sight": read_list("a yellow butterfly, a red squirrel, a white bird, a young hare, a green dragonfly"),
    "stone": read_list("a stone, a root, a branch, a step"),
    "drink": read_list("hot cocoa, warm milk, hot soup, sweet tea"),
    "treats": read_list("biscuits, plums, cherries, nuts, pears, apples"),
}

# --- the plots --------------------------------------------------------------------------------------------------------
# One line an event: its name, and its wordings between bars. A question mark after the name: the event may be left out.
# A blank line is a new paragraph. A name without wordings is found in SHARED. The wordings are written as if the hero
# were a girl and the friend a boy (they are never of the same sex, so it is clear who "she" is): {she}, {her_obj} and
# {her} are the hero's pronouns, {he}, {him} and {his} the friend's. A slot with a capital, {She}, begins a sentence.
# After a closing quotation mark a sentence goes on with a small letter, or ends.


class Event(NamedTuple):
    """Something that happens in a story, and the sentences that can say so."""

    name: str
    optional: bool
    wordings: tuple[str, ...]


class Plot(NamedTuple):
    """Which things and places suit a plot, and its paragraphs of events, in order."""

    things: str
    places: str
    paragraphs: tuple[tuple[Event, ...], ...]


def read_event(line: str) -> Event:
    """Read one line "name?: wording | wording" of a plot."""
    name, _, wordings = line.partition(":")
    return Event(name.rstrip("? "), "?" in name, tuple(w.strip() for w in wordings.split(" | ")) if wordings else ())


def read_plot(things: str, places: str, table: str) -> Plot:
    """Read a plot from a table as described above; a line that begins with a bar belongs to the line before it."""
    lines = [line.strip() for line in table.strip().splitlines()]
    paragraphs = "\n".join(lines).replace("\n|", " |").split("\n\n")
    events = [[read_event(line) for line in paragraph.split("\n")] for paragraph in paragraphs]
    shared = [tuple(e if e.wordings else e._replace(wordings=SHARED[e.name]) for e in paragraph) for paragraph in events]
    return Plot(things, places, tuple(shared))


SHARED = {
    "weather": (
        "It was a {fine} day, and there was not a cloud in the sky.",
        "The sun was shining, and the birds were singing.",
        "The sky was blue, and a soft wind was blowing.",
    ),
    "evening": (
        "That evening {hero} told {her} {parent} all about it.",
        "That night {hero} went to bed tired and {glad}.",
        "It was a day that {hero} and {friend} never forgot.",
    ),
}

PLOTS = {
    "lost": read_plot("treasure", "outdoors", """
        open: {time}, {hero} took {her} {adj} {thing} out to play. | {time}, {hero} went out with {her} {adj} {thing}.
            | {hero} had {a} {adj} {thing} and took it everywhere.
        weather?
        leave: {She} sat down {place} and laid the {thing} beside {her_obj}. | {She} played with it {place} for a long time.
            | {She} stopped {place} to watch the birds and put the {thing} down.
        forget: Then {her} {parent} called, and {she} ran home without it. | When {she} got hungry, {she} ran home and forgot it.
            | Then it was time to eat, and {she} hurried home without it.
        gone: At home {she} saw that {her} hands were empty. | At home {she} wanted to play again, but the {thing} was gone.
            | Only at home did {she} see that the {thing} was missing.
        sad: {She} was {sad}, because the {thing} was a present from {her} {giver}.
            | {hero} felt {sad}, for {her} {giver} had given {her_obj} the {thing}.

        help: "I will help you look," said {friend}, who lived next door. | {She} told {friend}, and {he} said, "Let us look together."
            | {friend} came by and said, "Do not cry. I will help you."
        first: First they looked {place2}, but they found only {find2}. | First they searched {place2}, but there was only {find2}.
        next: Then they looked {place3}, but all they saw was {find3}. | Next they searched {place3} and found nothing but {find3}.
        ask?: "Where did you have it last?" asked {friend}. | "Think hard. Where were you?" asked {friend}.
        remember: "Now I remember," said {hero}. "I had it {place}." | {hero} thought hard and said, "I was {place}."
            | Then {hero} cried, "I must have left it {place}!"
        found: They ran back, and there lay the {thing}, {place}. | They ran to look, and the {thing} was still {place}.
            | They hurried back and found the {thing} {place}.
        glad: {hero} was so {glad} to have it back that {she} hugged {friend}. | {hero} was {glad}, because the {thing} was safe.
            | "Thank you for helping me," said {hero}, and {she} was {glad} again.
        end: After that, {hero} never left the {thing} behind again. | That night the {thing} lay beside {her} bed.
            | From that day on, {hero} always looked twice before {she} went home."""),
    "surprise": read_plot("treasure", "indoors", """
        open: {time}, it was {friend}'s birthday. | {friend} had a birthday, and {hero} wanted to surprise {him}.
            | {time}, {hero} woke up early, because it was {friend}'s birthday.
        buy: {hero} had saved {her} money and bought {him} {a} {adj} {thing}. | {hero} had {a} {adj} {thing} for {him}.
            | {hero} and {her} {parent} had found {a} {adj} {thing} for {him}.
        hide: Before {he} came, {hero} hid the {thing} {place}. | {hero} hid it {place}, where nobody would see it.
            | "I will hide the {thing} {place}," {she} thought, and so {she} did.
        count?: {She} baked {n} small cakes and {her} {parent} baked {m}, so there were {total} for the party.
            | {She} hung up {n} red balloons and {m} blue ones, {total} balloons in all.

        come: In the afternoon {friend} knocked at the door. | After lunch {friend} came in and looked around.
            | At three o'clock {friend} rang the bell.
        tell: "There is a present for you in this house," said {hero}. "You must find it."
            | "Your present is hidden," said {hero}. "Can you find it?"
        first: {friend} looked {place2}, but there was only dust. | First {friend} looked {place2}, but {he} found nothing.
            | {friend} began to search {place2}, but nothing was there.
        next: Then {he} looked {place3}, but it was not there either. | Then {he} tried {place3}, but found only an old sock.
        hint?: "You are getting warmer," said {hero}. | {hero} laughed and said, "Look once more."
        found: At last {he} looked {place} and found the {thing}. | Then {he} saw something {adj} {place}, and it was the {thing}.
            | At last {he} found the {thing} {place}.
        glad: {friend} was very {glad}, because {he} had always wanted {a} {thing}.
            | {He} was so {glad} about the {thing} that {he} jumped up and down.
        thank: "Thank you, {hero}," {he} said. "What a fine surprise!" | "This is my best birthday," said {friend}.
        end: Then they ate cake and played until it was dark. | They played with the {thing} until it was time for bed.
            | {friend} carried the {thing} home and did not let go of it once."""),
    "promise": read_plot("treasure", "outdoors", """
        open: {hero} had {a} {adj} {thing}, and {friend} wanted to see it. | {friend} had heard about {hero}'s {adj} {thing}.
            | {time}, {friend} asked {hero} about {her} {adj} {thing}.
        promise: "I will bring it at {hour} o'clock," said {hero}. "I promise." | "I promise to show it to you at {hour} o'clock," {she} said.
        where: They wanted to meet {place}. | "Good. I will wait for you {place}," said {friend}.
            | "Then let us meet {place}," said {friend}.
        go: After lunch {hero} took the {thing} and set out. | After lunch {hero} put the {thing} under {her} arm and left the house.
        weather?

        meet: On the way {she} met some children, who were {game}. | Halfway there, {she} saw some children who were {game}.
        invite: "Come and join us," they called. | "Stay here with us," said one of them.
        want: {hero} wanted to stay, because it looked like fun. | {hero} stopped, for {she} would have liked to join them.
        refuse: But {she} thought of {friend} and shook {her} head. | But then {she} remembered what {she} had promised {friend}.
        say?: "I cannot stay, because {friend} is waiting," {she} said. | "A promise is a promise," {she} said, and {she} went on.
        arrive: The clock struck {hour} when {she} came running. | {She} ran so fast that {she} was there at {hour} o'clock.
        wait: {friend} was standing {place}, looking down the road. | There was {friend}, waiting {place}.
        doubt: "I was afraid that you would not come," {he} said. | {He} had been {scared}, because {he} thought {she} had forgotten.
        show: {hero} gave {him} the {thing}, and {he} was {glad}. | {She} put the {thing} into {his} hands, and {his} face lit up.
        end: Later they went to the other children and played together. | {friend} knew now that {hero} kept {her} promises.
            | "You are a true friend," said {friend}, and they played until dark."""),
    "storm": read_plot("treasure", "outdoors", """
        open: {time}, {hero} and {friend} met {place} to play. | {time}, {hero} and {friend} were playing {place}.
        bring: {hero} had brought {her} {adj} {thing}. | {hero} had {her} {adj} {thing} with {her_obj}.
            | {hero} showed {friend} {her} {adj} {thing}.
        fun?: They took turns with it and laughed a lot. | They had so much fun that they forgot the time.
        cloud: Soon dark clouds came over the hills. | Suddenly the sky grew dark, and the wind began to blow.
            | They did not see the black clouds in the sky.
        rain: Then it began to rain, and thunder rolled. | Then there was a flash, and the rain came down.
        afraid: {hero} was {scared}, because the thunder was so loud. | The thunder was so loud that {hero} was {scared}.

        wet: "My {thing} will get wet," {she} cried. | "Oh no, the rain will spoil my {thing}," said {hero}.
        umbrella: {friend} opened {his} big umbrella and said, "There is room for two." | "Come under my umbrella," called {friend}.
            | {friend} had an umbrella and held it over them both.
        hide: {hero} put the {thing} under {her} coat to keep it dry. | {hero} held the {thing} under {her} coat, where no rain could reach it.
        walk: Side by side they walked to {friend}'s house. | Close together they ran to {friend}'s house.
        warm: There {his} {parent} gave them {drink}. | {His} {parent} gave them dry socks and {drink}.
        count?: {hero} ate {n} {treats} and {friend} ate {m}, so {total} {treats} were soon gone.
            | There were {total} {treats} on a plate, and when they had eaten {m}, there were {n} left.
        glad: {hero} was {glad}, because the {thing} was dry and {she} was not alone.
            | Now {hero} was {glad}, for {she} and the {thing} were safe and dry.
        end: When the rain stopped, they saw a rainbow. | Soon the sun came back, and they went out to jump in the puddles.
            | "Next time I will bring an umbrella too," said {hero}."""),
    "gift": read_plot("handmade", "outdoors", """
        open: {friend} was ill and had to stay in bed. | {time}, {hero} heard that {friend} was ill.
            | {time}, {friend} did not come to school, because {he} was ill.
        sad: {hero} was {sad}, because {she} could not play with {him}. | {hero} missed {him} and was {sad}.
        idea: "I will make {him} {a} {adj} {thing}," {she} thought. | "{A} {adj} {thing} would make {him} smile," {she} said.
            | {She} wanted to make {a} {adj} {thing} for {him}.
        stuff: {Her} {parent} gave {her_obj} some {stuff} for it. | {She} asked {her} {parent} for some {stuff}.
        work: {She} sat down {place}, where it was quiet, and began to work. | Then {she} sat {place} and worked all afternoon.
        count?: {She} used {n} small pieces and {m} big ones, {total} pieces in all.
            | {She} had {total} pieces and used {m} of them, so {n} were left.
        hard: It was not easy, but {she} did not give up. | Twice it came apart, but {she} began again.

        done: When the {thing} was ready, {she} took it to {friend}'s house. | At last it was done, and {she} carried it to {friend}'s house.
        give: "This {thing} is for you," said {hero}. "I made it myself." | "Look what I made for you," said {hero}.
        smile: {friend} sat up in bed and smiled. | {friend} took the {thing} in both hands and laughed.
        glad: {He} was {glad}, because {hero} had thought of {him}. | {He} was so {glad} that {he} forgot to cough.
        well: A week later {he} was well again. | After a few days {friend} could get up again.
        end: Then they played with the {thing} {place}. | Soon the two friends sat {place} and played with the {thing}."""),
    "quarrel": read_plot("treasure", "outdoors", """
        open: {time}, {hero}'s {giver} gave {hero} and {friend} {a} {adj} {thing}. | {hero} and {friend} had {a} {adj} {thing}, which they shared.
            | {time}, {hero} and {friend} bought {a} {adj} {thing} together.
        play: They played with it {place}, and at first all went well. | They took it with them and played {place}.
        want: But soon both of them wanted to hold it. | But soon each of them wanted it alone.
        mine: "It is my turn," said {hero}. | "Give it to me," said {hero}. | "You have had it long enough," said {hero}.
        no: "No, I want it now," cried {friend}. | "No, you had it first," said {friend}.
        pull?: They pulled at the {thing} until {hero} fell down. | They shouted and pulled at the {thing}.
        apart: {friend} kept the {thing}, and {hero} went home alone. | In the end {friend} held the {thing}, and {hero} walked away.

        sad: At home {hero} was {sad}, because {she} had lost a friend. | {hero} sat in {her} room and was {sad}, for {she} was all alone.
        advice: "A friend is worth more than {a} {thing}," said {her} {parent}. | {Her} {parent} said, "Go and talk to {friend}."
        back: {hero} went back and found {friend} {place}. | {She} ran back, and {friend} was still sitting {place}.
        lonely?: {He} had the {thing}, but it was no fun without {her_obj}. | The {thing} lay beside {him}, but {he} did not play with it.
        sorry: "I am sorry," said {hero}. "I should not have shouted." | "I am sorry that I was so angry," said {hero}.
        too: "I am sorry too," said {friend}, and {he} gave {her_obj} the {thing}. | {friend} held out the {thing} and said, "You can have it now."
        turns: After that they took turns, first {hero} and then {friend}. | So {hero} had the {thing} first, and {friend} had it after {her_obj}.
        end: They were {glad}, because they were friends again. | They never fought over the {thing} again.
            | Playing together made them both {glad}."""),
    "coax": read_plot("animal", "outdoors", """
        open: {time}, {hero} heard a small sound {place}. | {time}, {hero} was walking home when something moved {place}.
            | {time}, {hero} saw that something was hiding {place}.
        see: It was {a} {adj} {thing}, and it was shaking. | {A} {adj} {thing} stood there and did not dare to move.
        why: {Scare} had frightened it. | It was {scared}, because {scare} had come too close.
        try: When {hero} took a step, the {thing} backed away. | {hero} held out {her} hand, but the {thing} did not come.
        calm: "I will not hurt you," {she} said softly. | "You need not be afraid," said {hero} in a low voice.
        friend: Then {friend} came by, and {hero} put a finger to {her} lips. | Just then {friend} came, and {hero} told {him} to be very quiet.
        fetch: {friend} ran home and came back with {food}. | "It must be hungry," said {friend}, and {he} went to get {food}.

        put: {hero} put it on the ground and waited. | {hero} laid it down, sat in the grass and waited.
        count?: The {thing} took {n} small steps and then {m} more, {total} steps in all.
            | It was {total} steps away, and when it had come {m} steps, only {n} were left.
        come: Slowly the {thing} came closer and began to eat. | For a long time nothing happened, but then the {thing} came and ate.
        stroke: At last {hero} could stroke its head. | Then it let {hero} stroke its back.
        glad: {hero} was {glad}, because the {thing} was no longer afraid. | {She} was {glad}, for the {thing} trusted {her_obj}.
        owner: The {thing} belonged to a farmer, who had looked for it everywhere. | In the evening they took the {thing} back to its farm.
        end: "Come and visit it whenever you like," said the farmer. | The farmer thanked {hero} and {friend} with all his heart.
            | After that, {hero} and {friend} visited the {thing} every week."""),
    "bake": read_plot("dish", "outdoors", """
        open: {time}, {hero} and {her} {parent} wanted to make {a} {adj} {thing}. | {time}, {hero} helped {her} {parent} to make {a} {adj} {thing}.
        party: It was for the party {place}. | That evening there was a party {place}. | All the neighbors were going to meet {place} that evening.
        begin: {hero} washed {her} hands and put on an apron. | {hero} got out the big bowl and a wooden spoon.
        missing: They needed {total} {food}, but there were only {n}, so {m} were missing.
            | They needed {total} {food} and had {n}, so they had to find {m} more.
        sad: {hero} was {sad}, because now they could not go on. | "Then we cannot make it," said {hero}, and {she} was {sad}.
        advice?: "Perhaps {friend} can help us," said {her} {parent}. | "Go and ask {friend}," said {her} {parent}.

        ask: {hero} ran next door and asked {friend} for {m} {food}. | "Can you lend us {m} {food}?" {hero} asked {friend}.
        give: {friend} looked in {his} kitchen and gave {her_obj} all {m}. | "Of course," said {friend}, and {he} brought {m} {food}.
        invite: "Come and help us," said {hero}, so {friend} came along. | {He} went back with {her_obj} to help.
        mix: They worked together, and {friend} stirred with the spoon. | {hero} poured, {friend} stirred, and {her} {parent} lit the stove.
        smell: Soon the whole house smelled of {thing}. | Soon the {thing} was ready, and it smelled very good.
        carry: In the evening they put the {thing} on a table {place}. | When the guests were all {place}, {hero} brought the {thing}.
        eat: Everybody liked it, and not a crumb was left. | "This is the best {thing} of all," said the guests.
        end: {hero} was {glad}, because they had made it together. | {hero} thanked {friend}, for without {him} there would have been no {thing}.
            | {hero} gave {friend} the last piece, and {he} was {glad}."""),
    "race": read_plot("treasure", "outdoors", """
        open: {time}, there was a race for all the children. | {time}, all the children of the village ran a race.
        start: The race started {place}. | The children stood in a row {place}. | Everybody came to the start {place}.
        prize: The prize was {a} {adj} {thing}. | The winner was to get {a} {adj} {thing}.
        wish: {hero} wanted to win it, because {she} had never had {a} {thing}. | {hero} had dreamed of such {a} {thing} for a long time.
        weather?
        go: "Ready, steady, go!" called the teacher. | The teacher rang a bell, and off they went.
        run: {hero} ran as fast as {she} could, with {friend} right behind {her_obj}. | {hero} was first for a while, but {friend} came closer.
        fall: Then {she} tripped over {stone}, and {he} ran past {her_obj}. | Near the end {she} grew tired, and {he} ran past {her_obj}.

        win: So {friend} won, and {hero} came second. | {friend} was the winner, and {hero} came in after {him}.
        get: The teacher gave {friend} the {thing}. | {friend} got the {thing}, and everybody clapped.
        sad: {hero} was {sad}, because {she} had almost won. | {hero} was {sad} that {she} had lost, and {she} looked at the ground.
        shake: But then {she} went to {friend} and shook {his} hand. | But {she} smiled at {friend} all the same.
        praise: "You ran very well," {she} said. | "Well done," {she} said. "You were faster than I was."
        share: "We can both play with the {thing}," said {friend}. | "Come, let us try the {thing} together," said {friend}.
        count?: {hero} had {n} {treats} and {friend} gave {her_obj} {m} more, so now {she} had {total}.
            | They had {total} {treats} in a bag, and after they had eaten {m}, there were {n} left.
        end: They sat {place} until sunset and were both {glad}. | Now {hero} was {glad}, because a friend is better than a prize.
            | "Next year I will run even faster," said {hero}, and they laughed."""),
    "broken": read_plot("treasure", "outdoors", """
        open: {time}, {friend} lent {hero} {his} {adj} {thing}. | {friend} had {a} {adj} {thing}, and {he} lent it to {hero}.
            | {time}, {hero} borrowed {friend}'s {adj} {thing}.
        warn: "Please take good care of it," {he} said. | "Be careful with it," said {friend}, "because I love it."
        use: {hero} took it with {her_obj} and played {place}. | {hero} went out and showed it to the children {place}.
        weather?
        trip: There {she} tripped over {stone}, and the {part} of the {thing} came off. | But {she} fell over {stone}, and the {part} came off the {thing}.
            | Then the {thing} slipped from {her} hands, and its {part} came off.
        afraid: {hero} was {scared}, because {friend} would be angry. | Now {she} was {scared} to tell {friend}.
        hide?: For a moment {she} wanted to hide the {thing}. | "Perhaps nobody will see it," {she} thought, but {she} knew that was wrong.

        tell: {She} went to {her} {parent} and told the whole story. | {She} showed {her} {parent} the {thing} and began to cry.
        mend: Together they put the {part} back on. | With a steady hand, {her} {parent} put the {part} back on.
        advice: "Now tell {friend} the truth," said {her} {parent}. | "It is mended, but {friend} must know," said {her} {parent}.
        return: {hero} took the {thing} back to {friend}. | So {hero} went to {friend} with the {thing} in {her} hands.
        truth: "I fell {place}, and the {part} came off," {she} said. "I am sorry." | "The {part} came off {place}, but we mended it," said {hero}.
        look: {friend} looked at the {thing} for a long time. | {friend} turned the {thing} around in {his} hands.
        forgive: "Thank you for telling me," {he} said. | "It is as good as new," {he} said. "I am not angry."
        end: {hero} was {glad}, because {she} had told the truth. | Now {hero} was {glad}, and they were better friends than before.
            | After that, {friend} was always ready to lend {hero} {his} things."""),
    "way_home": read_plot("treasure", "wild", """
        open: {time}, {hero} set out to bring {her} {giver} {a} {adj} {thing}. | {hero} had {a} {adj} {thing} for {her} {giver} and set out to bring it.
            | {time}, {hero} was on {her} way to {her} {giver} with {a} {adj} {thing}.
        weather?
        follow: On the way {she} saw {sight} and ran after it. | {She} saw {sight} and followed it away from the road.
        lost: Soon {she} did not know where {she} was. | When {she} looked around, {she} could not find the road again.
        dark: It was getting dark, and nobody was near. | Then fog came up, and {she} could see only a few steps.
        afraid: {hero} was {scared}, because {she} was all alone. | {She} was {scared}, for every tree looked the same.

        rule: {Her} {parent} had once said, "If you are lost, stay where you are." | "If I am lost, I must stay in one place," {she} thought.
        sit: So {she} sat down {place} and held the {thing} tight. | So {she} stayed {place} with the {thing} in {her} arms.
        call: {She} called for help as loudly as {she} could. | "Is anybody there?" {she} called again and again.
        count?: {She} counted {n} stars in the sky and then {m} more, {total} stars in all.
        hear: After a while {she} heard {friend}'s voice. | At last somebody answered, and it was {friend}.
        found: {friend} and {her} {giver} found {her_obj} {place}. | {He} came with {her} {giver}, and they saw {her_obj} {place}.
        hug: "I am so glad that you are safe," said {her} {giver}. | {Her} {giver} hugged {her_obj} and said, "You did the right thing."
        give: {hero} still had the {thing} and gave it to {her} {giver}. | "This is for you," said {hero}, and {she} held out the {thing}.
        end: Hand in hand they all walked home. | {hero} was {glad}, because {she} was not alone any more.
            | After that, {hero} always stayed on the road."""),
    "seed": read_plot("plant", "yard", """
        open: {time}, {hero}'s {giver} gave {her_obj} a small seed. | {time}, {hero} got a seed from {her} {giver}.
        what: "It will grow into {a} {adj} {thing}," said {her} {giver}. | "If you wait, you will have {a} {adj} {thing}," said {her} {giver}.
        plant: {hero} planted it {place} and gave it some water. | {She} made a hole {place} and put the seed into it.
        look: Every day {she} went to look, but there was only brown earth. | The next morning {she} ran out, but there was nothing to see.
        sad: After two weeks {hero} was {sad}, because nothing had grown. | {hero} waited and waited, and {she} was {sad} that nothing happened.
        doubt: "It will never grow," {she} said to {friend}. | "Perhaps my seed is bad," {she} told {friend}.
        patience: "A seed needs time," said {friend}. | "Do not give up," said {friend}, and {he} brought {her_obj} a can of water.

        water: So {hero} watered it every evening and waited. | So {hero} went on and gave it water every day.
        sprout: One morning a green tip came out of the earth. | Then, after a night of rain, a tiny plant stood {place}.
        count?: First it had {n} leaves and then {m} more, so now there were {total}.
            | It had {total} leaves, but a snail ate {m} of them, so {n} were left.
        grow: The sun shone on it, and it grew and grew. | It grew a little every day, for the sun was warm.
        ready: By the end of summer there was {a} {adj} {thing} {place}. | When summer was over, {a} {adj} {thing} was growing {place}.
        show: {hero} called {friend}, and {he} could hardly believe it. | {hero} showed the {thing} to {friend}, who clapped {his} hands.
        glad: {hero} was {glad}, because {she} had not given up. | {She} was {glad} that {she} had waited so long.
        end: {She} kept its seeds for the next spring. | "Next year we will plant some together," said {hero}."""),
}

# --- sums -------------------------------------------------------------------------------------------------------------

SUM_WORDINGS = {
    "+": ("{x} + {y} = {z}. {X} and {y_word} make {z_word}.", "{x} + {y} = {z}. {X} plus {y_word} is {z_word}."),
    "-": ("{x} - {y} = {z}. {X} take away {y_word} leaves {z_word}.", "{x} - {y} = {z}. {X} minus {y_word} is {z_word}."),
}
SUMS = [(a, "+", b) for a in range(21) for b in range(21 - a)] + [(a, "-", b) for a in range(21) for b in range(a + 1)]


def is_held_out(asked: str) -> bool:
    """Whether text that is asked for with these words is kept from training: about one in ten, the same everywhere."""
    return zlib.crc32(asked.encode()) % 10 == 0


def write_sums(rng: random.Random, held_out: bool) -> str:
    """Write a page of five to nine different sums, all of them held out or none."""
    questions = [(a, op, b) for a, op, b in SUMS if is_held_out(f"{a} {op} {b}") == held_out]
    lines = []
    for a, op, b in rng.sample(questions, rng.randrange(5, 10)):
        c = a + b if op == "+" else a - b
        wording = rng.choice(SUM_WORDINGS[op])
        words = {"X": NUMBERS[a].capitalize(), "y_word": NUMBERS[b], "z_word": NUMBERS[c]}
        lines.append(wording.format(x=a, y=b, z=c, **words))
    return "\n".join(lines)


# --- stories ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brief:
    """What is asked of a story."""

    hero: str
    """A name out of GIRLS or BOYS."""
    thing: str
    """What the story is about, a noun out of THINGS[plot.things]: "lantern"."""
    place: str
    """Where it happens, out of PLACES[plot.places]: "under the bridge"."""
    plot: str
    """A key of PLOTS."""


def all_briefs() -> Iterator[Brief]:
    """Every brief there is, in a fixed order."""
    for name, plot in PLOTS.items():
        for thing in THINGS[plot.things]:
            for place in PLACES[plot.places]:
                for hero in GIRLS + BOYS:
                    yield Brief(hero, thing, place, name)


def make_brief(rng: random.Random) -> Brief:
    """Draw a brief: first the plot, then a hero, and a thing and a place that suit the plot."""
    name = rng.choice(list(PLOTS))
    things, places = THINGS[PLOTS[name].things], PLACES[PLOTS[name].places]
    return Brief(rng.choice(GIRLS + BOYS), rng.choice(list(things)), rng.choice(places), name)


def asked_for(brief: Brief) -> str:
    """The words that decide on which side of the split a brief is. The plot is left out: held out is held out."""
    return f"{brief.hero}, {brief.thing}, {brief.place}"


def settle(brief: Brief, rng: random.Random) -> dict[str, str]:
    """Settle every fact of a story: slot name -> text, the same from its first sentence to its last."""
    girl = brief.hero in GIRLS
    thing = EVERYTHING[brief.thing]
    slots = {slot: rng.choice(values) for slot, values in CHANCE.items()}
    slots |= {"hero": brief.hero, "thing": brief.thing, "place": brief.place, "part": thing.part}
    slots |= {"stuff": thing.stuff, "food": thing.stuff, "adj": rng.choice(thing.adjectives)}
    slots["a"] = "an" if slots["adj"][0] in "aeiou" else "a"
    slots["friend"] = rng.choice(BOYS if girl else GIRLS)
    slots |= zip(("she", "her_obj", "her"), PRONOUNS["girl" if girl else "boy"], strict=True)
    slots |= zip(("he", "him", "his"), PRONOUNS["boy" if girl else "girl"], strict=True)
    slots["parent"], slots["giver"] = rng.sample(RELATIVES, 2)
    slots["find2"], slots["find3"] = rng.sample(FINDS, 2)
    others = [place for place in PLACES[PLOTS[brief.plot].places] if place != brief.place]
    slots["place2"], slots["place3"] = rng.sample(others, 2)
    while True:  # numbers whose sum, and the differences it answers, are not held out
        n, m = rng.randrange(2, 8), rng.randrange(2, 8)
        if not any(is_held_out(asked) for asked in (f"{n} + {m}", f"{n + m} - {m}", f"{n + m} - {n}")):
            break
    slots |= {"n": NUMBERS[n], "m": NUMBERS[m], "total": NUMBERS[n + m]}
    for slot in ("she", "her", "he", "his", "a", "scare"):
        slots[slot.capitalize()] = slots[slot][0].upper() + slots[slot][1:]
    return slots


def tell(brief: Brief, rng: random.Random) -> tuple[dict[str, str], list[list[tuple[str, str]]]]:
    """Tell a story as data.

    Args:
        brief: what is asked for.
        rng: decides everything else; the same brief and the same state of rng give the same story.

    Returns:
        The facts (slot -> text), and the paragraphs, each a list of (name of the event, its sentence).
    """
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
    """Write n documents of one side of the split: stories, and about one page of sums in twelve.

    Args:
        n: number of documents.
        seed: decides everything; equal arguments give equal documents on every machine.
        held_out: True for what no model is trained on.

    Returns:
        n texts of some hundred ASCII characters each, without a final newline.
    """
    rng = random.Random(seed)
    texts = []
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


def main(config: Config) -> None:
    print(("\n" + "-" * 60 + "\n").join(documents(config.count, config.seed, config.held_out)))
    held_out = [is_held_out(asked_for(brief)) for brief in all_briefs()]
    print(f"\n{len(held_out):,} briefs in {len(PLOTS)} plots, {sum(held_out):,} of them held out")


if __name__ == "__main__":
    main(tyro.cli(Config))
