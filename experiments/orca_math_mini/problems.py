"""Arithmetic word problems with worked answers, and the other kind of text that the base model is pre-trained on.

    python experiments/orca_math_mini/problems.py

prints a few of each. Everything is a pure function of a seed.
"""

import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import make_demo

LARGEST = 1000
OPERATIONS = {**make_demo.OPERATIONS, "/": lambda a, b: a / b}
STEP = re.compile(r"\{(\w+) ([-+*/]) (\w+) = (\w+)\}")  # {a * b = c}: c is worked out and shown with its equation
DISTRACTOR_SHARE = 0.4


class Number(NamedTuple):
    """How one number of a story is drawn: one of `low`, `low + step`, … `high`."""

    low: float
    high: float
    step: str = "1"
    money: bool = False

    def draw(self, rng: random.Random) -> Fraction:
        return Fraction(self.draw_hundredths(rng), 100)

    def draw_hundredths(self, rng: random.Random) -> int:
        step, first, last = _choices(self)
        return step * rng.randint(first, last)


@cache
def _choices(number: Number) -> tuple[int, int, int]:
    """The step in hundredths, and the first and the last of its multiples."""
    step = Fraction(number.step)
    return int(100 * step), math.ceil(number.low / step), math.floor(number.high / step)


def money(low, high, step):
    return Number(low, high, step, money=True)


def tenths(low, high):
    return Number(low, high, "0.1")


@dataclass(frozen=True)
class Template:
    """One kind of problem.

    Args:
        story, ask: the question; a distractor may stand between them.
        solution: the worked answer, its equations as `{a * b = c}`.
        numbers: those that the story names.
        derived: further values of the solution that the story does not name.
        answer: what follows "The answer is"; x is the last result.
    """

    story: str
    ask: str
    solution: str
    numbers: dict[str, Number]
    derived: Callable[[dict], dict] = lambda values: {}
    answer: str = "{x}"

    @property
    def places(self) -> int:
        """Decimals that results may have: none where only whole things are counted."""
        parts = "percent" in self.story or any(n.money or n.step != "1" for n in self.numbers.values())
        return 2 if parts else 0


# of two factors one is at most 12 or a round number: the model has no paper to multiply on
SMALL, ROUND, MIDDLE, LARGE = Number(2, 12), Number(10, 90, "10"), Number(2, 99), Number(2, 999)
TEMPLATES = {
    "change": Template(
        "{name} buys {n} {item} at {p} each and pays with {m}.",
        "How much change does {name} get?",
        "The {item} cost {n * p = c}. The change is {m - c = x}.",
        dict(n=SMALL, p=money(0.5, 30, "0.25"), m=money(20, 200, "10")),
    ),
    "two_prices": Template(
        "{name} buys {a} {item} at {p} each and {b} {items} at {q} each.",
        "How much does {name} pay?",
        "The {item} cost {a * p = s}. The {items} cost {b * q = t}. Together that is {s + t = x}.",
        dict(a=SMALL, p=money(0.5, 20, "0.25"), b=SMALL, q=money(0.5, 20, "0.25")),
    ),
    "discount": Template(
        "A {thing} costs {p}. In the sale it is {r} percent cheaper.",
        "What does the {thing} cost in the sale?",
        "One percent is {p / 100 = u}. The discount is {u * r = d}. The sale price is {p - d = x}.",
        dict(p=money(20, 900, "5"), r=ROUND),
    ),
    "ratio_share": Template(
        "The ratio of {item} to {items} in a box is {p}:{q}. Together there are {n}.",
        "How many {item} are in the box?",
        "There are {p + q = k} parts. One part is {n / k = e}. The {item} are {e * p = x}.",
        dict(p=Number(1, 9), q=Number(1, 9), n=LARGE),
    ),
    "lowest_ratio": Template(
        "There are {a} {item} and {b} {items} in a shop.",
        "What is the ratio of {item} to {items} in lowest terms?",
        "Both can be divided by {g}. The {item} give {a / g = u}, the {items} {b / g = x}.",
        dict(a=Number(4, 400), b=Number(4, 400)),
        derived=lambda values: {"g": Fraction(math.gcd(int(values["a"]), int(values["b"])))},
        answer="{u}:{x}",
    ),
    "average": Template(
        "On three days {name} read {a}, {b} and {c} pages.",
        "How many pages a day is that on average?",
        "The first two days make {a + b = s}. All three make {s + c = t}. The average is {t / 3 = x}.",
        dict(a=MIDDLE, b=MIDDLE, c=MIDDLE),
    ),
    "journey": Template(
        "A train goes {v} km an hour for {h} hours, and then {d} km more.",
        "How many km does it go?",
        "In {h} hours it goes {v * h = s}. With the rest it is {s + d = x}.",
        dict(v=Number(20, 160, "10"), h=Number(0.5, 9, "0.5"), d=MIDDLE),
    ),
    "at_first": Template(
        "{name} gave {a} {item} to {other} and then bought {b}. Now {name} has {c} {item}.",
        "How many {item} did {name} have at first?",
        "Before buying it was {c - b = s}. Before giving it was {s + a = x}.",
        dict(a=LARGE, b=LARGE, c=LARGE),
    ),
    "boxes_left": Template(
        "{name} packs {n} {item} into boxes of {k} and gives {b} boxes away.",
        "How many {item} are left?",
        "There are {n / k = s} boxes. Then there are {s - b = t}. They hold {t * k = x}.",
        dict(n=LARGE, k=SMALL, b=Number(1, 60)),
    ),
    "three_people": Template(
        "{name} has {a} {item}. {other} has {k} times as many. {third} has {b} fewer than {other}.",
        "How many {item} do the three have together?",
        "{other} has {a * k = s}. {third} has {s - b = t}. The first two have {a + s = u}, all three {u + t = x}.",
        dict(a=MIDDLE, k=Number(2, 6), b=MIDDLE),
    ),
    "wages": Template(
        "{name} earns {p} an hour, works {a} hours on Monday and {b} on Tuesday, and spends {m}.",
        "How much money is left?",
        "That is {a + b = h} hours. They bring {h * p = e}. What is left is {e - m = x}.",
        dict(p=money(8, 40, "0.5"), a=Number(2, 6), b=Number(2, 6), m=money(2, 99, "0.5")),
    ),
    "seats": Template(
        "A hall has {a} rows of {b} seats. {c} seats are taken and {d} are broken.",
        "How many seats are free?",
        "There are {a * b = s} seats. Without the taken ones there are {s - c = t}. Free are {t - d = x}.",
        dict(a=SMALL, b=Number(3, 80), c=LARGE, d=Number(2, 40)),
    ),
    "shared_bill": Template(
        "{k} friends share a bill of {p} and a tip of {q} equally.",
        "How much does each of them pay?",
        "Together it is {p + q = s}. Each pays {s / k = x}.",
        dict(k=SMALL, p=money(10, 300, "0.25"), q=money(1, 40, "0.25")),
    ),
    "weight": Template(
        "An empty box weighs {w} kg. {name} puts in {n} {item} of {u} kg each.",
        "How many kg does the full box weigh?",
        "The {item} weigh {n * u = s}. With the box it is {s + w = x}.",
        dict(w=tenths(0.2, 9), n=SMALL, u=tenths(0.1, 9)),
    ),
    "rope": Template(
        "A rope is {a} m long. {name} cuts off {n} pieces of {u} m each.",
        "How many m of rope are left?",
        "The pieces make {n * u = s}. What is left is {a - s = x}.",
        dict(a=tenths(5, 300), n=SMALL, u=tenths(0.2, 12)),
    ),
    "saving": Template(
        "{name} wants a {thing} for {p}. So far {name} has {m}, and saves {s} a week.",
        "How many weeks of saving does the {thing} still take?",
        "Still missing is {p - m = d}. That takes {d / s = x} weeks.",
        dict(p=money(20, 999, "1"), m=money(2, 500, "1"), s=money(2, 12, "1")),
    ),
    "recipe": Template(
        "A recipe for {k} people needs {g} grams of flour.",
        "How many grams are needed for {n} people?",
        "One person needs {g / k = e} grams. All of them need {e * n = x}.",
        dict(k=SMALL, g=LARGE, n=SMALL),
    ),
    "percent_sold": Template(
        "A shop has {n} {item}. It sells {r} percent of them on Monday and {b} on Tuesday.",
        "How many {item} are left?",
        "One percent is {n / 100 = u}. Monday's are {u * r = d}. Then {n - d = s} are there. Left are {s - b = x}.",
        dict(n=Number(20, 1000, "20"), r=ROUND, b=MIDDLE),
    ),
    "for_every": Template(
        "For every {p} {item} that {name} sells, {other} sells {q}. {name} sold {n} {item}.",
        "How many did {other} sell?",
        "{name} sold {n / p = e} times {p}. So {other} sold {e * q = x}.",
        dict(p=Number(2, 9), q=SMALL, n=LARGE),
    ),
    "bus": Template(
        "{a} people are on a bus. At the first stop {b} get off and {c} get on. At the next stop {d} get off.",
        "How many people are on the bus now?",
        "First there are {a - b = s}. Then there are {s + c = t}. In the end there are {t - d = x}.",
        dict(a=MIDDLE, b=MIDDLE, c=MIDDLE, d=MIDDLE),
    ),
    "fence": Template(
        "A garden is {a} m long and {b} m wide. A fence costs {p} for every m.",
        "What does a fence around the garden cost?",
        "Two sides make {a + b = h}. All four make {h * 2 = u}. The fence costs {u * p = x}.",
        dict(a=MIDDLE, b=MIDDLE, p=money(2, 12, "1")),
    ),
    "profit": Template(
        "{name} buys {n} {item} at {p} each and sells all of them at {q} each.",
        "How much money does {name} gain?",
        "Each one brings {q - p = g}. All of them bring {g * n = x}.",
        dict(n=SMALL, p=money(0.5, 20, "0.25"), q=money(0.5, 30, "0.25")),
    ),
    "minutes": Template(
        "{name} needs {a} minutes to paint one {thing}. {name} paints {n} and rests for {b} minutes in between.",
        "How many minutes does that take?",
        "Painting takes {a * n = s}. With the rest it is {s + b = x}.",
        dict(a=MIDDLE, n=SMALL, b=MIDDLE),
    ),
    "half_spent": Template(
        "{name} has {p}, spends half of it on {item} and {q} on a {thing}.",
        "How much money is left?",
        "Half of it is {p / 2 = h}. What is left is {h - q = x}.",
        dict(p=money(4, 999, "0.5"), q=money(1, 400, "0.25")),
    ),
}
THINGS = ["lamp", "bicycle", "jacket", "tent", "radio", "chair", "drum", "kettle"]
DISTRACTORS = [
    "{fourth} is {z} years old.",
    "The house next door has {z} windows.",
    "It is {z} degrees outside.",
    "{fourth} lives {z} km away.",
    "{fourth} has {z} brothers and sisters, and a dog.",
    "The shop opened {z} years ago.",
]


class Problem(NamedTuple):
    """A question and its worked answer.

    Args:
        template: key of TEMPLATES.
        numbers: the values of the story's numbers, by name, without a distractor's.
    """

    template: str
    numbers: dict[str, Fraction]
    question: str
    answer: str

    @property
    def row(self) -> dict[str, str]:
        """What is written to a file."""
        return {"question": self.question, "answer": self.answer}


def show(value: Fraction) -> str:
    """A number as it stands in an equation: `12`, `3.5`. None has more than two decimals."""
    return show_hundredths(int(100 * value))


def show_hundredths(value: int) -> str:
    """`show` of `value / 100`."""
    return str(value // 100) if value % 100 == 0 else f"{value / 100:.2f}".rstrip("0")


def show_money(value: Fraction) -> str:
    """`$12`, `$3.50`."""
    return f"${value.numerator}" if value.denominator == 1 else f"${float(value):.2f}"


def solve(template: Template, numbers: dict[str, Fraction]) -> dict[str, Fraction] | None:
    """Every value of the solution by name; None where one is not from 1/100 to LARGEST or has too many places."""
    values = numbers | template.derived(numbers)
    if any(value == 1 for name, value in values.items() if name not in numbers):
        return None  # a ratio that is in lowest terms already
    unit = 10**template.places
    for left, op, right, result in STEP.findall(template.solution):
        value = Fraction(OPERATIONS[op](*(values[w] if w in values else Fraction(w) for w in (left, right))))
        if not 0 < value <= LARGEST or (value * unit).denominator > 1:
            return None
        values[result] = value
    return values


def draw(template: Template, rng: random.Random) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
    """Numbers of a story that has a solution, and every value of that solution."""
    while True:
        numbers = {name: number.draw(rng) for name, number in template.numbers.items()}
        values = solve(template, numbers)
        if values:
            return numbers, values


def write(name: str, numbers: dict[str, Fraction], values: dict[str, Fraction], rng: random.Random) -> Problem:
    """Puts names, things and numbers into a template's words."""
    template = TEMPLATES[name]
    words = dict(zip(("name", "other", "third", "fourth"), rng.sample(make_demo.NAMES, 4), strict=True))
    words |= dict(zip(("item", "items"), rng.sample(make_demo.ITEMS, 2), strict=True), thing=rng.choice(THINGS))
    told = {n: (show_money if template.numbers[n].money else show)(value) for n, value in numbers.items()}
    extra = [rng.choice(DISTRACTORS)] if rng.random() < DISTRACTOR_SHARE else []
    question = " ".join([template.story, *extra, template.ask]).format(**words, **told, z=rng.randint(2, 99))
    shown = {n: show(value) for n, value in values.items()}
    equation = lambda m: " ".join(shown.get(w, w) if i % 2 == 0 else w for i, w in enumerate(m[0][1:-1].split()))
    worked = STEP.sub(equation, template.solution).format(**words, **shown)
    return Problem(name, numbers, question, f"{worked} The answer is {template.answer.format(**shown)}.")


def problems(*, seed) -> Iterator[Problem]:
    """An endless stream in which no two share both their template and their numbers."""
    rng, seen, names = random.Random(seed), set(), list(TEMPLATES)
    while True:
        name = rng.choice(names)
        numbers, values = draw(TEMPLATES[name], rng)
        key = (name, *numbers.values())
        if key not in seen:
            seen.add(key)
            yield write(name, numbers, values, rng)


def splits(*, seed, test: int, validation: int, train: int) -> dict[str, list[Problem]]:
    """Three sets that share no template with the same numbers; the size of train changes nothing in the others."""
    stream = problems(seed=seed)
    sizes = dict(test=test, validation=validation, train=train)
    return {name: list(islice(stream, size)) for name, size in sizes.items()}


SUBJECTS = ["The shop", "The old train", "A friend", "The teacher", "My sister", "The cook", "A bus", "The garden"]
VERBS = ["waits near", "is older than", "looks like", "stands behind", "belongs to", "came from", "is next to"]
OBJECTS = ["the river", "a small box", "the hall", "a rope", "the market", "the next stop", "the school", "a fence"]
ENDINGS = ["in the morning", "on Monday", "every week", "after the rain", "in the sale", "for many hours", "at first"]


def sentences(rng: random.Random) -> str:
    """Two or three sentences about nothing that can be counted."""
    subject = lambda: rng.choice([*SUBJECTS, rng.choice(make_demo.NAMES)])
    return " ".join(
        f"{subject()} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(ENDINGS)}."
        for _ in range(rng.randint(2, 3))
    )


SIZES = [SMALL, MIDDLE, LARGE, tenths(0.1, 300), Number(0.25, 99, "0.25"), Number(0.01, 9, "0.01")]


HUNDREDTHS = {
    "+": lambda a, b: (a + b, 1),
    "-": lambda a, b: (a - b, 1),
    "*": lambda a, b: (a * b, 100),
    "/": lambda a, b: (100 * a, b),
}  # numerator and denominator of the result


def bare_arithmetic(rng: random.Random) -> str:
    """One true equation between numbers from 0.01 to LARGEST; of two factors, one is small or round.

    In hundredths, as whole numbers: fractions would take most of the time that pre-training has to wait for its text.
    """
    while True:
        op, a, b = rng.choice("+-*/"), rng.choice(SIZES).draw_hundredths(rng), rng.choice(SIZES).draw_hundredths(rng)
        if op in "*/":
            b = rng.choice((SMALL, ROUND)).draw_hundredths(rng)
        if op == "*" and rng.random() < 0.5:
            a, b = b, a
        if op == "/":
            a, uneven = divmod(a * b, 100)  # drawn at random, few divisions would come out even
            b = rng.choice([b, b, b, 10_000])
            if uneven:
                continue
        over, under = HUNDREDTHS[op](a, b)
        result, uneven = divmod(over, under)
        if not uneven and all(0 < v <= 100 * LARGEST for v in (a, b, result)):
            return f"{show_hundredths(a)} {op} {show_hundredths(b)} = {show_hundredths(result)}."


def pretraining_texts(*, seed) -> Iterator[str]:
    """An endless stream of plain sentences, bare arithmetic and the demo's one- and two-step stories.

    None of them is a question, and none says which number is the answer.
    """
    rng, stories = random.Random(seed), make_demo.pretraining_texts(seed=seed)
    makers = [sentences, bare_arithmetic, lambda rng: next(stories)]
    while True:
        yield rng.choices(makers, weights=(1, 16, 3))[0](rng)


def main() -> None:
    for problem in islice(problems(seed=0), 12):
        print(f"[{problem.template}] {problem.question}\n    {problem.answer}")
    print(*islice(pretraining_texts(seed=0), 12), sep="\n")


if __name__ == "__main__":
    main()
