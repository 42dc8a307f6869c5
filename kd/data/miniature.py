"""Grade-school problems in GSM8K's schema from a seeded generator: the data of the miniature run.

A template is a question and one to three steps. A step is "sub-question | sentence", and the sentence holds one
calculation `[x=a+b]`, which becomes "3 + 4 = <<3+4=7>>7" and defines x for the steps after it. A dollar sign goes
before the result, as in GSM8K.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Problem:
    """One problem with its answer in both of GSM8K's styles, each ending in "#### n"."""

    question: str
    main_answer: str
    socratic_answer: str


@dataclass(frozen=True)
class Template:
    """Text with {name}, {other}, {item}, {place} and the numbers that `ranges` draws (inclusive bounds)."""

    ranges: dict[str, tuple[int, int]]
    question: str
    steps: tuple[str, ...]


_NAMES = (
    "Ada Ben Carla Diego Elif Farid Grace Hana Ivan Jonas Keiko Lena Malik Nora Omar Priya Quinn Rosa Samir Tara Uma "
    "Viktor Wendy Yusuf Zoe"
).split()  # fmt: skip
_ITEMS = (
    "apples buttons candles cards coins cookies crayons eggs marbles muffins oranges pencils pens shells stamps "
    "stickers"
).split()
_PLACES = ("at the market", "at school", "in the garden", "at the library", "on the farm", "in the kitchen")

_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_CALCULATION = re.compile(r"(\$?)\[(\w)=(\w+)([-+*/])(\w+)\]")


def problems(count: int, seed: int, steps: Collection[int] = (1, 2, 3)) -> list[Problem]:
    """`count` problems of as many `steps` without a repeated question, the same ones for the same seed on every
    machine."""
    draw = random.Random(seed)
    found: dict[str, Problem] = {}
    # Short problems come more often: a 135M-parameter student solves hardly any of the long ones.
    pool = [template for template in TEMPLATES if len(template.steps) in steps for _ in range(4 - len(template.steps))]
    while len(found) < count:
        for template in draw.sample(pool, len(pool)):
            problem = _problem(template, draw)
            found.setdefault(problem.question, problem)
    return list(found.values())[:count]


def _problem(template: Template, draw: random.Random) -> Problem:
    """Draw words once and numbers until every step comes out as a positive whole number."""
    name, other = draw.sample(_NAMES, 2)
    words = {"name": name, "other": other, "item": draw.choice(_ITEMS), "place": draw.choice(_PLACES)}
    while True:
        numbers = {key: draw.randint(low, high) for key, (low, high) in template.ranges.items()}
        solved = _solve(template.steps, numbers)
        if solved is not None:
            break
    lines, result = solved
    asks = [step.split(" | ")[0] for step in template.steps]
    text = {**words, **numbers}
    main = [line.format(**text) for line in lines]
    socratic = [f"{ask.format(**text)} ** {line}" for ask, line in zip(asks, main, strict=True)]
    end = f"#### {result}"
    return Problem(template.question.format(**text), "\n".join([*main, end]), "\n".join([*socratic, end]))


def _solve(steps: tuple[str, ...], numbers: dict[str, int]) -> tuple[list[str], int] | None:
    """The sentences with their calculations carried out, and the last result; None where one is not positive whole."""
    known = dict(numbers)
    lines = []
    result = 0
    for step in steps:
        sentence = step.split(" | ")[1]
        match = _CALCULATION.search(sentence)
        assert match, sentence
        dollar, variable, left, sign, right = match.groups()
        a, b = (known[side] if side in known else int(side) for side in (left, right))
        value = _OPERATIONS[sign](Fraction(a), Fraction(b))
        if value <= 0 or value.denominator != 1:
            return None
        result = known[variable] = int(value)
        shown = f"{a} {sign} {b} = {dollar}<<{a}{sign}{b}={result}>>{result}"
        lines.append(sentence.replace(match[0], shown))
    return lines, result


def _template(question: str, *steps: str, **ranges: tuple[int, int]) -> Template:
    return Template(ranges, question, steps)


TEMPLATES: tuple[Template, ...] = (
    # one step
    _template(
        "{name} has {a} {item}. {other} gives {name} {b} more. How many {item} does {name} have now?",
        "How many {item} does {name} have now? | {name} has [x=a+b] {item} now.",
        a=(2, 8), b=(2, 8),
    ),
    _template(
        "{name} had {a} {item} and gave {b} of them to {other}. How many {item} does {name} have left?",
        "How many {item} does {name} have left? | {name} has [x=a-b] {item} left.",
        a=(3, 9), b=(2, 6),
    ),
    _template(
        "{name} buys {a} boxes of {item} {place}. Each box holds {b} {item}. How many {item} does {name} buy?",
        "How many {item} does {name} buy? | {name} buys [x=a*b] {item}.",
        a=(2, 6), b=(2, 6),
    ),
    _template(
        "{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?",
        "How many {item} does each friend get? | Each friend gets [x=a/b] {item}.",
        a=(4, 12), b=(2, 6),
    ),
    _template(
        "A ticket costs ${a}. {name} buys {b} tickets. How many dollars does {name} pay?",
        "How many dollars does {name} pay? | {name} pays $[x=a*b].",
        a=(2, 6), b=(2, 6),
    ),
    _template(
        "{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {name} read in total?",
        "How many pages did {name} read in total? | {name} read [x=a+b] pages in total.",
        a=(2, 9), b=(2, 9),
    ),
    _template(
        "There are {a} birds in a tree. Then {b} of them fly away. How many birds are still in the tree?",
        "How many birds are still in the tree? | There are [x=a-b] birds still in the tree.",
        a=(3, 9), b=(2, 6),
    ),
    _template(
        "{name} has twice as many {item} as {other}. {other} has {a} {item}. How many {item} does {name} have?",
        "How many {item} does {name} have? | {name} has [x=2*a] {item}.",
        a=(2, 9),
    ),
    _template(
        "{name} walks {a} miles every day. How many miles does {name} walk in {b} days?",
        "How many miles does {name} walk in {b} days? | {name} walks [x=a*b] miles.",
        a=(2, 6), b=(2, 7),
    ),
    _template(
        "A rope of {a} meters is cut into {b} equal pieces. How many meters long is each piece?",
        "How many meters long is each piece? | Each piece is [x=a/b] meters long.",
        a=(4, 20), b=(2, 10),
    ),
    _template(
        "{name} is {a} years old. {other} is {b} years older. How old is {other}?",
        "How old is {other}? | {other} is [x=a+b] years old.",
        a=(2, 9), b=(2, 9),
    ),
    _template(
        "{name} wants a toy that costs ${a} and has ${b}. How many more dollars does {name} need?",
        "How many more dollars does {name} need? | {name} needs $[x=a-b] more.",
        a=(4, 15), b=(2, 9),
    ),
    # two steps
    _template(
        "{name} has {a} {item} and finds {b} more {place}. Then {name} gives {c} to {other}. "
        "How many {item} does {name} have now?",
        "How many {item} does {name} have after finding more? | After finding more, {name} has [x=a+b] {item}.",
        "How many {item} does {name} have now? | After giving some away, {name} has [y=x-c] {item}.",
        a=(3, 25), b=(2, 25), c=(2, 15),
    ),
    _template(
        "{name} buys {a} bags with {b} {item} each and already had {c} {item}. "
        "How many {item} does {name} have in all?",
        "How many {item} are in the bags? | The bags hold [x=a*b] {item}.",
        "How many {item} does {name} have in all? | {name} has [y=x+c] {item} in all.",
        a=(2, 7), b=(2, 9), c=(1, 20),
    ),
    _template(
        "{name} earns ${a} an hour and works {b} hours. {name} then spends ${c}. How many dollars are left?",
        "How many dollars does {name} earn? | {name} earns $[x=a*b].",
        "How many dollars are left? | {name} has $[y=x-c] left.",
        a=(5, 20), b=(2, 8), c=(5, 50),
    ),
    _template(
        "{name} bakes {a} {item} and eats {b}. The rest go on plates of {c}. How many plates does {name} fill?",
        "How many {item} are left? | There are [x=a-b] {item} left.",
        "How many plates does {name} fill? | {name} fills [y=x/c] plates.",
        a=(10, 50), b=(1, 9), c=(2, 6),
    ),
    _template(
        "{name} pays with ${a} for {b} notebooks that cost ${c} each. How many dollars of change does {name} get?",
        "How many dollars do the notebooks cost? | The notebooks cost $[x=b*c].",
        "How many dollars of change does {name} get? | {name} gets $[y=a-x] of change.",
        a=(20, 100), b=(2, 8), c=(2, 9),
    ),
    _template(
        "A class has {a} girls and {b} boys. The teacher puts them in groups of {c}. How many groups are there?",
        "How many children are in the class? | The class has [x=a+b] children.",
        "How many groups are there? | There are [y=x/c] groups.",
        a=(5, 20), b=(5, 20), c=(2, 7),
    ),
    _template(
        "{name} has {a} {item}. {other} has {b} fewer. How many {item} do they have together?",
        "How many {item} does {other} have? | {other} has [x=a-b] {item}.",
        "How many {item} do they have together? | Together they have [y=a+x] {item}.",
        a=(6, 30), b=(2, 15),
    ),
    _template(
        "{name} reads {a} pages a day. After {b} days, {c} pages of the book remain. "
        "How many pages does the book have?",
        "How many pages has {name} read? | {name} has read [x=a*b] pages.",
        "How many pages does the book have? | The book has [y=x+c] pages.",
        a=(5, 30), b=(2, 9), c=(5, 60),
    ),
    _template(
        "A baker sells {a} loaves in the morning and twice as many in the afternoon. "
        "How many loaves does the baker sell?",
        "How many loaves are sold in the afternoon? | In the afternoon, [x=2*a] loaves are sold.",
        "How many loaves does the baker sell? | The baker sells [y=a+x] loaves.",
        a=(3, 40),
    ),
    _template(
        "{name} saves ${a} a week for {b} weeks and splits the money into {c} equal parts. "
        "How many dollars are in each part?",
        "How many dollars does {name} save? | {name} saves $[x=a*b].",
        "How many dollars are in each part? | Each part is $[y=x/c].",
        a=(2, 20), b=(2, 12), c=(2, 6),
    ),
    _template(
        "A farm has {a} cows and {b} goats. Each animal eats {c} buckets of feed. How many buckets do they eat?",
        "How many animals are there? | There are [x=a+b] animals.",
        "How many buckets do they eat? | They eat [y=x*c] buckets.",
        a=(2, 15), b=(2, 15), c=(2, 5),
    ),
    _template(
        "{name} picks {a} {item} {place}, half of which are bad. {other} then brings {b} good ones. "
        "How many good {item} are there?",
        "How many of {name}'s {item} are good? | {name} has [x=a/2] good {item}.",
        "How many good {item} are there? | There are [y=x+b] good {item}.",
        a=(4, 60), b=(2, 20),
    ),
    # three steps
    _template(
        "{name} buys {a} pens at ${b} each and {c} books at ${d} each. How many dollars does {name} spend?",
        "How many dollars do the pens cost? | The pens cost $[x=a*b].",
        "How many dollars do the books cost? | The books cost $[y=c*d].",
        "How many dollars does {name} spend? | {name} spends $[z=x+y].",
        a=(2, 9), b=(1, 5), c=(2, 5), d=(3, 12),
    ),
    _template(
        "{name} has {a} {item}, {other} has {b} more than {name}. They put all of them into {c} equal boxes. "
        "How many {item} are in each box?",
        "How many {item} does {other} have? | {other} has [x=a+b] {item}.",
        "How many {item} do they have together? | Together they have [y=a+x] {item}.",
        "How many {item} are in each box? | Each box holds [z=y/c] {item}.",
        a=(3, 30), b=(1, 20), c=(2, 6),
    ),
    _template(
        "A bus starts with {a} people. At the first stop {b} get off and {c} get on; at the second, half of them get "
        "off. How many people are on the bus?",
        "How many people stay at the first stop? | After {b} get off there are [x=a-b] people.",
        "How many people leave the first stop? | After {c} get on there are [y=x+c] people.",
        "How many people are on the bus? | Half of them get off, so [z=y/2] people are on the bus.",
        a=(10, 50), b=(2, 15), c=(2, 15),
    ),
    _template(
        "{name} runs {a} miles on each of {b} days and {c} miles on the weekend. The goal is {d} miles. "
        "How many miles are missing?",
        "How many miles does {name} run on the days? | On the days {name} runs [x=a*b] miles.",
        "How many miles does {name} run in all? | In all {name} runs [y=x+c] miles.",
        "How many miles are missing? | There are [z=d-y] miles missing.",
        a=(2, 6), b=(2, 5), c=(2, 10), d=(20, 60),
    ),
    _template(
        "{name} sells {a} {item} at ${b} each {place} and pays ${c} for the stand. "
        "The rest is shared with {other}, half each. How many dollars does each get?",
        "How many dollars does {name} take in? | {name} takes in $[x=a*b].",
        "How many dollars are left after the stand? | After the stand, $[y=x-c] are left.",
        "How many dollars does each get? | Each gets $[z=y/2].",
        a=(5, 30), b=(2, 6), c=(4, 20),
    ),
    _template(
        "A shelf holds {a} rows of {b} cans. {c} cans are sold and {d} new ones arrive. "
        "How many cans are on the shelf?",
        "How many cans are there at first? | At first there are [x=a*b] cans.",
        "How many cans remain? | After the sale [y=x-c] cans remain.",
        "How many cans are on the shelf? | With the new ones there are [z=y+d] cans.",
        a=(2, 8), b=(3, 9), c=(2, 20), d=(2, 20),
    ),
    _template(
        "{name} is {a} years old. {other} is three times as old, and {other}'s uncle is {b} years older than {other}. "
        "How many years older than {name} is the uncle?",
        "How old is {other}? | {other} is [x=3*a] years old.",
        "How old is the uncle? | The uncle is [y=x+b] years old.",
        "How many years older than {name} is the uncle? | The uncle is [z=y-a] years older.",
        a=(3, 15), b=(2, 20),
    ),
    _template(
        "{name} fills {a} jars with {b} {item} each and has {c} left over. Next week there are twice as many {item}. "
        "How many {item} are there next week?",
        "How many {item} are in the jars? | The jars hold [x=a*b] {item}.",
        "How many {item} are there this week? | This week there are [y=x+c] {item}.",
        "How many {item} are there next week? | Next week there are [z=2*y] {item}.",
        a=(2, 6), b=(2, 9), c=(1, 8),
    ),
)  # fmt: skip
