"""Finds the answer in a text, and says whether two answers are the same."""

import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

SPACES = ",\u00a0\u2009\u202f"  # between thousands: comma, no-break, thin and narrow no-break space
CURRENCY = r"(?:US|R|A|C)?[$€£¥₹₩¢]|USD|EUR|GBP|INR|Rs\.?"
MINUS = "-\u2212\u2013"  # hyphen, minus, en dash
LONGEST = 100  # characters of a number; a longer one is text, since a model may write digits without end
GROUPED = rf"\d{{1,3}}(?:[{SPACES}]\d{{2,3}})*[{SPACES}]\d{{3}}(?!\d)"  # 1,234, but also 1,00,000
THOUSANDS = rf"(?:{GROUPED}|\d{{1,3}}(?:\ \d{{3}})*\ 000(?!\d))(?:\.\d+)?"  # an ordinary space only before 000
TERM = rf"(?:{GROUPED}|\d+)(?:\.\d+)?"
PLAIN = rf"{THOUSANDS}|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<![\w.])\.\d+"
# 3:4, 1 1/2, 3/4, 1,234.5 and the like. Not the 2 of cm2, cm^2, x^{2} or x^{-2}, and no minus in 10-5
NUMBER = re.compile(
    rf"""
    (?<![\w^])(?<!\d\.)(?<!\^\{{)(?<!\^[{MINUS}])(?<!\^\{{[{MINUS}])
    (?P<sign>(?<![\w)\]}}])[{MINUS}+])?
    (?:(?:{CURRENCY})\ ?)?
    (?P<inner>[{MINUS}])?
    (?:
        (?P<ratio>\d+(?:\.\d+)?(?:\ ?:\ ?\d+(?:\.\d+)?)+)
        | (?:(?P<whole>{TERM})\ (?:and\ )?)?(?P<top>{TERM})\ ?/\ ?(?P<bottom>{TERM})(?![\d/])
        | (?P<plain>{PLAIN})
    )
    """,
    re.VERBOSE,
)
LATEX_FRACTION = re.compile(rf"\\[dt]?frac\s*(?:\{{\s*([{MINUS}]?{TERM})\s*\}}|(\d))\s*(?:\{{\s*({TERM})\s*\}}|(\d))")
NEXT_PROMPTS = tuple(f"###{space}{word}" for word in ("Question", "Context", "Instruction") for space in ("", " "))

Answer = Fraction | tuple | str


def cut_at(stops: Sequence[str], text: str) -> str:
    """What stands before the first of these texts: a model that was not taught to stop goes on with a next prompt."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text).strip()


def _readable(text: str) -> str:
    """LaTeX and Unicode fractions as `a/b`, LaTeX's thousands separators as commas."""
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)  # 2\frac{1}{2} is a mixed number
    text = LATEX_FRACTION.sub(r"\1\2/\3\4", text.replace("{,}", ",").replace("\\,", ""))
    vulgar = {c for c in text if unicodedata.decomposition(c).startswith("<fraction>")}
    for character in vulgar:
        fraction = unicodedata.normalize("NFKC", character).replace("\u2044", "/")
        text = re.sub(rf"(?<=\d)\s*{character}", f" {fraction}", text).replace(character, fraction)
    return text


def extract(text: str) -> Answer | None:
    """The last number of a text: an exact fraction, or of a ratio its terms; None where there is no number.

    Currency and percent signs, thousands separators and trailing zeros do not matter. `6:8` is `3:4`, but a ratio is
    never the same as a number. A division by zero, and a number too long to be meant, is text.
    """
    last = None
    for last in NUMBER.finditer(_readable(text)):  # noqa: B007
        pass
    return _value(last) if last else None


def _value(match: re.Match) -> Answer:
    negative = (match["sign"] or "+") in MINUS or match["inner"] is not None
    exponent = re.search(r"[eE][-+]?0*(\d+)$", match["plain"] or "")
    if len(match[0]) > LONGEST or (exponent and len(exponent[1]) > 2):
        return match[0].strip()
    if match["ratio"]:
        return _lowest_terms([Fraction(term.strip()) for term in match["ratio"].split(":")])
    if match["plain"]:
        value = _fraction(match["plain"])
    elif _fraction(match["bottom"]) == 0:
        return match[0].strip()
    else:
        value = _fraction(match["whole"] or "0") + _fraction(match["top"]) / _fraction(match["bottom"])
    return -value if negative else value


def _fraction(text: str) -> Fraction:
    """A number with or without thousands separators."""
    return Fraction(re.sub(f"[{SPACES} ]", "", text))


def _lowest_terms(terms: list[Fraction]) -> tuple[int, ...]:
    scale = math.lcm(*(term.denominator for term in terms))
    whole = [int(term * scale) for term in terms]
    divisor = reduce(math.gcd, whole) or 1
    return tuple(term // divisor for term in whole)


def plain(text: str) -> str:
    """A text without what does not make another answer: case, spacing, final punctuation."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".!")


def compare(prediction: str, answer: str) -> tuple[str | None, str, bool]:
    """What was found in the prediction, what in the answer, and whether they are the same.

    An answer without any number is compared as text.
    """
    expected = extract(answer)
    if expected is None:
        found, expected = plain(prediction), plain(answer)
    else:
        found = extract(prediction)
    return show(found), show(expected), found == expected


def show(answer: Answer | None) -> str | None:
    """An extracted answer as text: `51`, `1.5`, `1/3`, `3:4`."""
    if isinstance(answer, tuple):
        return ":".join(map(str, answer))
    if isinstance(answer, Fraction) and 10**12 % answer.denominator == 0 and answer.denominator > 1:
        return str(float(answer))
    return None if answer is None else str(answer)
