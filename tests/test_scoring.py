"""Answers in texts: which number is taken, and which answers are the same."""

from fractions import Fraction

import pytest

from fsdp_utils.inference.scoring import NEXT_PROMPTS, compare, cut_at, extract, plain, show
from fsdp_utils.training.scores import wilson_interval

EXTRACTED = [
    ("99 - 55 = 44, 44 + 7 = 51. The answer is 51.", 51),
    ("no number at all", None),
    ("", None),
    ("It costs $1,234.50 in total.", Fraction("1234.5")),
    ("€2.00", 2),
    ("USD 15", 15),
    ("USD15", 15),
    ("Rs.50", 50),
    ("R$ 50", 50),
    ("₹1,00,000", 100_000),
    ("1,234,567 people", 1_234_567),
    ("1{,}234", 1234),
    ("1\u202f234", 1234),
    ("the set 1, 2, 3", 3),
    ("(3,4)", 4),
    ("-5", -5),
    ("\u22125 degrees", -5),
    ("x = -5", -5),
    ("-$5", -5),
    ("$-5", -5),
    ("10-5", 5),
    ("a loss of - 5", 5),
    (".5", Fraction(1, 2)),
    ("0.50", Fraction(1, 2)),
    ("007", 7),
    ("1.5e3", 1500),
    ("3/4", Fraction(3, 4)),
    ("6/8 of it", Fraction(3, 4)),
    ("12 / 4", 3),
    ("1 1/2 cups", Fraction(3, 2)),
    ("-1 1/2", Fraction(-3, 2)),
    ("2½", Fraction(5, 2)),
    ("½", Fraction(1, 2)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"$2\frac{1}{2}$", Fraction(5, 2)),
    (r"-\frac{1}{2}", Fraction(-1, 2)),
    (r"\boxed{42}", 42),
    ("1/0", "1/0"),
    ("25%", 25),
    ("25 percent", 25),
    ("the ratio is 3:4", (3, 4)),
    ("6 : 8", (3, 4)),
    ("1.5:2", (3, 4)),
    ("2:4:6", (1, 2, 3)),
    ("10:00", (1, 0)),
    ("25 cm2", 25),
    ("25 cm^2", 25),
    ("25 m²", 25),
    ("x^{2} = 9", 9),
    ("**42**", 42),
    ("**Answer:** 42", 42),
    ("Answer:42", 42),
    ("#7", 7),
    ("version 1.2.3", Fraction("1.2")),
    ("No.5", 5),
    ("is ...52", 52),
    ("- 5 apples", 5),
    ("12345678901234567890", 12345678901234567890),
    ("2 ½ cups", Fraction(5, 2)),
    ("1 ⅓", Fraction(4, 3)),
    ("-½", Fraction(-1, 2)),
    (r"\frac{-1}{2}", Fraction(-1, 2)),
    (r"\frac{3.5}{2}", Fraction(7, 4)),
    (r"\frac{1,000}{3}", Fraction(1000, 3)),
    (r"\frac78", Fraction(7, 8)),
    ("1.5/2", Fraction(3, 4)),
    ("1,234 1/2", Fraction(2469, 2)),
    ("2,000/5", 400),
    ("10 000 people", 10_000),
    ("5 100", 100),
    ("\u20135", -5),
    ("5\u201310", 10),
    ("10^{-3}", 10),
    ("6.02e23", 602 * 10**21),
    ("1e5000", "1e5000"),
    ("5e99999999", "5e99999999"),
    ("9" * 5000, "9" * 5000),
]


@pytest.mark.parametrize(("text", "expected"), EXTRACTED)
def test_extract(text, expected):
    """The last number of a text, however it is written."""
    assert extract(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "correct"),
    [
        ("so 51.0", "The answer is 51.", True),
        ("so 52", "The answer is 51.", False),
        ("nothing", "51", False),
        ("$1,000", "1000 dollars", True),
        ("0.75", "3/4", True),
        ("3:4", "6:8", True),
        ("3:4", "4:3", False),
        ("3:4", "0.75", False),
        ("25%", "25", True),
        ("Paris.", "paris", True),
        ("in Paris", "Paris", False),
        ("0.333", "1/3", False),
    ],
)
def test_compare(prediction, answer, correct):
    """Answers are the same after normalisation, and only then."""
    assert compare(prediction, answer)[2] is correct


def test_compare_shows_what_was_compared():
    """The extracted pair is readable."""
    assert compare("x", "12 : 8")[:2] == (None, "3:2")
    assert [show(extract(t)) for t in ("1.50", "1/3", "5.0", "12/8")] == ["1.5", "1/3", "5", "1.5"]
    assert show(extract("1" * 310 + ".5")) == "1" * 310 + ".5"  # more than a float holds
    assert plain("  Two\n Words. ") == "two words"


def test_cut_at():
    """A question that the model asks itself is no part of its answer."""
    assert cut_at(NEXT_PROMPTS, "It is 5.\n###Question:\nWhat is 6?\n###Answer:\n6") == "It is 5."
    assert cut_at(NEXT_PROMPTS, "It is 5. ### Instruction 2 ###Context 3") == "It is 5."
    assert cut_at(NEXT_PROMPTS, "It is #5. ### 6") == "It is #5. ### 6"
    assert cut_at((), " ###Question ") == "###Question"


def test_wilson_interval():
    """Against tabulated values, and within 0 and 1 at the ends."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
