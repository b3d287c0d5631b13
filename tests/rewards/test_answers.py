"""One answer, unambiguous, or none: what is right, what is refused, and what is never given to math-verify."""

import json
import time
from pathlib import Path

import pytest

from gtpo_megatron.rewards.answers import number, same_answer, stated_answer, too_expensive
from gtpo_megatron.rewards.terms import math_verify_correct, paper_correctness

GSM8K = Path(__file__).parents[1] / "fixtures" / "gsm8k_small.jsonl"


def full(answer: str) -> str:
    return f"<reasoning>\nwork\n</reasoning>\n<answer>\n{answer}\n</answer>"


def rewards(given: str, answer: str, **options: str) -> tuple[float, float]:
    return paper_correctness(full(given), answer, **options), math_verify_correct(
        full(given), answer, **options
    )


NO_ANSWER_18 = """17 or 18|18 or 17|17 18|17 and 18|not 18|no 18|!=18|18!|18j|18i|18x|18 i|[18,18]|(18, 18)|18:00|18;17|17, 18
1,8|1 8|1_8|0x12|-18|±18|\\pm 18|\\neq 18|18 million|18 squared|18 factorial|17=18|x=18 or x=17|18-17|18 17|18?|18|17
<18|>=18|minus 18|$17$ or $18$|$18$ $17$|18\\phantom{x}|०18|１８|17\\ 18|17~18|18^2|180|018x|18\\text{ or }17|"""


@pytest.mark.parametrize(
    "given", [g for line in NO_ANSWER_18.splitlines() for g in line.split("|") if g != "18"]
)
def test_what_is_not_the_one_answer_18(given: str) -> None:
    assert rewards(given, "18") == (0.0, 0.0)


def test_hexadecimal_is_not_zero_and_two_answers_are_none() -> None:
    assert rewards("0x12", "0") == (0.0, 0.0)
    assert not any(rewards(f"{right} or {right - 1}", str(right))[0] for right in range(100, 120))


RIGHT_18 = r"""18|$18|\$18|$\$18$|\(18\)|$18$|$$18$$|18.|18.0|$18.00|+18|18%|18\%|\boxed{18}|$\boxed{18}$|18 dollars|$18 dollars
x = 18|$x=18$|The answer is 18|Answer: 18|18 cm^2|18 \text{ cm}|18^\circ|18°|\frac{36}{2}|\text{18}|18 miles per hour|\left(18\right)"""


@pytest.mark.parametrize("given", [g for line in RIGHT_18.splitlines() for g in line.split("|")])
def test_spellings_of_18(given: str) -> None:
    assert rewards(given, "18") == (10.0, 1.0)


PAIRS = [  # as in MATH: the reference, another spelling of it, another answer
    (r"\frac{14}{3}", r"\dfrac{14}{3}", r"\frac{14}{3} or \frac{3}{14}"),
    (r"\text{Evelyn}", "evelyn", "Evelyn or Navin"),
    (r"\text{(C)}", "C", "D"),
    ("p - q", "-q+p", "q - p"),
    (r"3\sqrt{13}", r"\sqrt{117}", r"3\sqrt{13}, 2"),
    ("6 - 5i", "-5i + 6", "6 + 5i"),
    ("x=5", "5", "y=5"),
    ("1,-2", "-2, 1", "1,-2,3"),
    ("52_8", "52_{8}", "52"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", r"[3,\frac{\pi}{2}]"),
    ("(3,4]", r"\left(3,4\right]", "[3,4]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (4, \infty)"),
    (r"1 \pm \sqrt{19}", r"1\pm\sqrt{19}", r"1 + \sqrt{19}"),
    (r"(2,12) \cup (12,102)", r"(2, 12)\cup(12, 102)", "(2,12)"),
    ("10,\\!080", "10080", "10, 080"),
    (r"\$32,\!348", "32348", "32,34"),
    (r"5.4 \text{ cents}", "5.4", "5.4 million"),
    (r"864 \mbox{ inches}^2", "864", "864!"),
    (r"1\frac{4}{5}", r"\frac{9}{5}", r"\frac{4}{5}"),
    (r"y = 2x + 3", "y=3+2x", "y = 2x - 3"),
    (r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", r"\begin{pmatrix}-2\\-14\end{pmatrix}", "-2, -14"),
    (r"90^\circ", "90 degrees", "90 or 80"),
    ("1250", "1,250", "1,25"),
    ("x^2+1", "1+x**2", "x^2+1 or 2"),
]


@pytest.mark.parametrize(("answer", "other", "wrong"), PAIRS)
def test_answers_that_are_no_numbers(answer: str, other: str, wrong: str) -> None:
    for given in (answer, f"${answer}$", f"\\boxed{{{answer}}}", f"{answer}.", other):
        assert rewards(given, answer) == (10.0, 1.0), given
    assert rewards(wrong, answer) == (0.0, 0.0)


def test_the_references_of_gsm8k_are_right() -> None:
    answers = [
        json.loads(line)["answer"].rpartition("####")[2].strip() for line in GSM8K.read_text().splitlines()
    ]
    assert len(answers) == 20
    for answer in answers:
        for given in (answer, f"${answer}", f"\\boxed{{{answer}}}", f"{answer} apples"):
            assert rewards(given, answer.replace(",", "")) == (10.0, 1.0)


def test_the_looser_rule_is_an_option() -> None:
    assert rewards("17 or 18", "18", rule="last_number") == (10.0, 1.0)
    assert rewards("18 or 17", "18", rule="last_number") == (0.0, 0.0)
    assert rewards(r"\frac{2}{4}", r"\frac12", rule="last_number") == (10.0, 1.0)


@pytest.mark.parametrize(
    ("given", "reference"), [("1e3", "1e3"), ("1/2", "0.5"), ("10-5", "5"), (".5", "0.5")]
)
def test_what_the_strict_rule_accepts_the_looser_one_does_too(given: str, reference: str) -> None:
    assert rewards(given, reference) == rewards(given, reference, rule="last_number") == (10.0, 1.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1,250.50", -1250.5),
        ("1e3", 1000),
        (".5", 0.5),
        ("-$3", -3),
        ("$-3", -3),
        ("--3", None),
        ("1,25", None),
        ("", None),
    ],
)
def test_number(text: str, value: float | None) -> None:
    assert number(text) == value


EXPENSIVE = {
    "9**9**9**9": "tower",
    "9^{9^{9}}": "tower",
    "1000000!": "factorial",
    "5!!": "factorial",
    "(x+1)^{10000}": "power",
    r"((x+1)^{9})^{9}": "power",
    r"(\sqrt{2}+\sqrt{3}+\sqrt{5})^{300}": "power",
    r"\binom{100000}{50000}": "binomial",
    r"\sum_{i=1}^{9} i": "sum",
    "{" * 50 + "1" + "}" * 50: "brackets",
    "(" * 150 + "1" + ")" * 150: "brackets",
    "+".join("1" * 100): "digits",
    "1" * 300 + "x": "digits",
    "1" * 1_000_000: "characters",
}


@pytest.mark.parametrize("text", EXPENSIVE, ids=[text[:30] for text in EXPENSIVE])
def test_expensive_answers_are_refused_before_math_verify(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> bool:
        raise AssertionError("given to math-verify")

    monkeypatch.setattr("gtpo_megatron.rewards.answers._verified", reached)
    assert EXPENSIVE[text] in too_expensive(text)
    assert rewards(text, "18") == rewards(text, "x^2+1") == (0.0, 0.0)
    assert too_expensive("x^8 + x^7") is None and too_expensive("2^{10} + 5!") is None


def test_a_megabyte_of_tags_is_read_in_linear_time() -> None:
    start = time.process_time()
    for text in ("<answer>" * 125_000, full("1" * 1_000_000), "<reasoning>" * 90_000 + "</answer>" * 100):
        assert paper_correctness(text, "18") == math_verify_correct(text, "18") == 0.0
    assert time.process_time() - start < 10  # seconds of CPU; quadratic time would be minutes


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> no <answer> 2 </answer> 3", "2"),
        (r"so \boxed{\frac{1}{2}}, not 3", r"\frac{1}{2}"),
        ("first 17, and in the end 1,250.", "1,250"),
        ("it is not 18", None),
        ("17 or 18", None),
        ("nothing", None),
    ],
)
def test_what_a_completion_states(text: str, answer: str | None) -> None:
    assert stated_answer(text) == answer


def test_an_empty_answer_is_none() -> None:
    assert not same_answer("", "") and not same_answer(" ", "18") and not same_answer("$$", "18")
