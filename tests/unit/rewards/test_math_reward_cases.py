"""The math reward on answers as models and data sets write them: what is right, and what only looks so."""

from __future__ import annotations

import pytest

from megatron_vespo.rewards.math import math_reward

THIN, NARROW, MINUS = "\u2009", "\u202f", "\u2212"

DIFFERENT = [
    # tiny values, that an absolute tolerance cannot tell apart
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
    ("2^{-60}", "2^{-61}"),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}"),
    (r"1.6 \times 10^{-19} \text{ C}", r"1.7 \times 10^{-19} \text{ C}"),
    (r"1.6 \times 10^{-19} C", r"1.7 \times 10^{-19} C"),
    (r"1.6 \times 10^{-19}", r"1.7 \times 10^{-19}"),
    (r"\frac{\sqrt{2}}{2006!}", r"\frac{\sqrt{2}}{2004!}"),
    ("2^{-60} x", "2^{-61} x"),
    (r"\{2^{-60}, 1\}", r"\{2^{-61}, 1\}"),
    ("(1.6e-19, 2)", "(1.7e-19, 2)"),
    (r"\pi \cdot 10^{-20}", r"\pi \cdot 10^{-21}"),
    ("0.0000012", "0.0000013"),
    ("10^{-20}", "0"),
    # decimals whose digits differ
    ("0.3", "0.33333333"),
    ("0.33333", r"\frac{1}{3}"),
    ("0.333334", r"\frac{1}{3}"),
    ("1.41", r"\sqrt{2}"),
    ("123456789.5", "123456789"),
    ("1234567890", "1234567891"),
    ("3.14", r"\pi"),
    ("0.1234567", "0.1234568"),
    ("12345e-10", "12346e-10"),
    ("-0.333333", "0.333333"),
    # what math-verify reads in part only
    (r"x \equiv 3 \pmod 7", r"x \equiv 4 \pmod 7"),
    (r"x \equiv 3 \pmod 7", "7"),
    ("4", r"x \equiv 3 \pmod 4"),
    (r"\widehat{A}/2 + 3", r"\widehat{B}/2 + 3"),
    (r"\frac{1}{2} \widehat{A} + 3", r"\frac{1}{2} \widehat{B} + 3"),
    (r"\frac{1}{2} \widehat{A} + 3", "3"),
    ("1,3,5,...,2n-1", "1,2,...,n"),
    (r"1, 3, 5, \ldots, 2n-1", r"1, 2, \ldots, n"),
    ("101_3", "101_2"),
    ("101_{3}", "101_{2}"),
    (r"101_{\text{three}}", r"101_{\text{two}}"),
    ("2516", "2516_8"),
    ("2516_8", "2516"),
    ("1358", "2516_8"),
    ("2024-01-02", "2024-02-01"),
    ("2024/01/02", "2024/02/01"),
    ("1 2", "12"),
    ("1\u00b2", "12"),
    ("6", "7"),
    ("43", "42"),
    ("-42", "42"),
    ("1235", "1,234"),
    (r"\frac{2}{3}", r"\frac{1}{2}"),
    ("x^2-1", "x^2+1"),
    (r"71\%", r"70\%"),
    ("18, 19", "18"),
    ("18 or 19", "18"),
    ("3e7", "3e8"),
    ("4.3e-19", "2.9e-19"),
    (r"4.3 \times 10^{-19}", "2.9e-19"),
    ("(1,2)", "(2,1)"),
]

SAME = [
    ("0.3", "0.30000000000000004"),
    ("0.1", "0.10000000149011612"),
    ("0.3333333", "0.33333333"),
    ("3.1415927", "3.14159265"),
    (r"\frac{1}{3}", "0.3333333"),
    ("0.333333", r"\frac{1}{3}"),
    (r"\frac{1}{3}", "0.3333333432674408"),
    ("0.012346", r"\frac{1}{81}"),
    ("1.4142136", r"\sqrt{2}"),
    ("33.333333\\%", r"\frac{1}{3}"),
    ("9", r"9\%"),
    ("0.09", r"9\%"),
    ("-3.1415927", "-3.14159265"),
    (r"\frac{1}{2004!}", r"\frac{2005}{2005!}"),
    ("4^{-30}", "2^{-60}"),
    (r"1.60 \times 10^{-19} \text{ C}", r"1.6 \times 10^{-19} \text{ C}"),
    (r"16 \times 10^{-20}", r"1.6 \times 10^{-19}"),
    (r"\sin^2(1) + \cos^2(1) - 1", "0"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("(0.333333, 2)", r"(\frac{1}{3}, 2)"),
    ("0.5x", r"\frac{x}{2}"),
    # numbers and their spellings
    ("42", "42"),
    (" 42 ", "42"),
    ("1234", "1,234"),
    ("1,234", "1234"),
    ("42.0", "42"),
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac12", r"\frac{1}{2}"),
    ("1+x^2", "x^2+1"),
    (r"70\%", r"70\%"),
    ("0.7", r"70\%"),
    (r"18 \text{ dollars}", "18"),
    (r"\$18", "18"),
    (r"3 \times 10^8", "3e8"),
    ("300000000", "3e8"),
    (".5", "0.5"),
    (r"2.9 \cdot 10^{-19}", "2.9e-19"),
    (r"3 \times 10^{8} m", "3e8"),
    ("10^{2}", "100"),
    ("1.6e-3", "0.0016"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    ("42", r"\boxed{42}"),
    ("42", "$42$"),
    # the same letters
    (r"x\equiv 3\pmod 7", r"x \equiv 3 \pmod  7"),
    (r"\widehat{A}/2+3", r"\widehat{A} / 2 + 3"),
    ("1, 3, 5, ..., 2n-1", "1,3,5,...,2n-1"),
    ("101_{2}", "101_2"),
    ("(101)_2", "101_2"),
    (r"101 \text{ (base 2)}", "101_2"),
    (r"2516_{\text{eight}}", r"2516_{\text{eight}}"),
    ("2024-01-02", "2024-01-02"),
    ("7" * 4400, "7" * 4400),
    # signs in Unicode, spacing of digits
    ("\u221a2", r"\sqrt{2}"),
    ("3\u221a2", r"3\sqrt{2}"),
    ("\u221a(x+1)", r"\sqrt{x+1}"),
    ("90\u00b0", "90"),
    ("90\u00b0", r"90^\circ"),
    ("\u00bd", "0.5"),
    ("3\u00bd", "3.5"),
    ("2\u00b2", "4"),
    ("x\u00b2+1", "x^2+1"),
    ("x\u207b\u00b9", r"\frac{1}{x}"),
    (r"1\,000", "1000"),
    (r"-1\,234\,567", "-1234567"),
    (f"1{THIN}000", "1000"),
    (f"12{NARROW}345", "12,345"),
    ("1\u00a0000", "1000"),
    ("1 000", "1000"),
    (r"1{,}000", "1000"),
    (f"{MINUS}5", "-5"),
    (f"({MINUS}\u221e, 3]", r"(-\infty, 3]"),
    ("3\u00b1\u221a2", r"3 \pm \sqrt{2}"),
    ("2\u00b73", "6"),
    ("\uff14\uff12", "42"),
    ("3 1/2", r"\frac{7}{2}"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"0.1\overline{6}", r"\frac{1}{6}"),
    # what math-verify gets right
    ("18 apples", "18"),
    (r"13 \text{ cm}^2", "13"),
    (r"x = 5", "5"),
    (r"\text{B}", "B"),
    (r"a=1 \text{ or } a=-2", r"\{1, -2\}"),
    (r"4\sqrt(2)", r"4\sqrt{2}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"2\pi r + \pi r", r"3 \pi r"),
]

RESPONSES = [
    (r"\boxed{7} No: \boxed{42}", "42", 1.0),
    (r"\boxed{42} No: \boxed{7}", "42", 0.0),
    (r"\boxed{}", "42", 0.0),
    ("", "42", 0.0),
    ("The answer is 42.", "42", 1.0),
    ("The answer is 43.", "42", 0.0),
    ("I do not know.", "42", 0.0),
    ("The answer is 42. " + "and so on " * 200, "42", 0.0),  # not in the end of the response
    ("and so on " * 200 + "The answer is 42.", "42", 1.0),
    ("1" * 5000, "1", 0.0),
    (r"\boxed{" + "1+" * 600 + "1}", "601", 0.0),  # longer than any final answer
    (r"\boxed{\frac{1}{}", "1", 0.0),
    ("<think>2 + 4</think><answer>6</answer>", "6", 1.0),
    ("<think>2 + 4</think>\n<answer> 7 </answer>", "6", 0.0),
    (r"<think>\boxed{5}</think><answer>6</answer>", "6", 1.0),
    (r"<think>\boxed{6}</think><answer>5</answer>", "6", 0.0),
    (r"<answer>5</answer> No: \boxed{6}", "6", 1.0),
    (r"<answer>\boxed{6}</answer>", "6", 1.0),
    (r"<answer>$\frac{1}{2}$</answer>", "0.5", 1.0),
    ("<answer>The answer is 6.</answer>", "6", 1.0),
    ("<answer>1 or 2</answer>", "2", 0.0),
    ("<answer></answer>", "6", 0.0),
    ("<answer>" * 3 + "6", "7", 0.0),
    ("_73_", "73", 1.0),
    ("The answer is __73__.", "73", 1.0),
    ("`73`", "73", 1.0),
    ("So it is `73`.", "73", 1.0),
    ("**73**", "73", 1.0),
    ("_74_", "73", 0.0),
    (f"The answer is {MINUS}5.", "-5", 1.0),
    (f"The answer is 1{THIN}000.", "1000", 1.0),
    (r"The answer is $x \equiv 3 \pmod 7$.", "7", 0.0),
    (r"The answer is $x \equiv 3 \pmod 7$.", r"x \equiv 3 \pmod 7", 1.0),
    ("The answer is $101_2$.", "101", 0.0),
    ("The answer is $101_2$.", "101_2", 1.0),
    ("It costs $5 and he pays $7.", "7", 1.0),
    (r"Hence $x_1 = 3$ and the answer is $\frac{1}{2}$.", "0.5", 1.0),
    (r"\boxed{2^{-60}} is tiny", "2^{-61}", 0.0),
    ("The answer is $2^{-60}$.", "2^{-61}", 0.0),
]


@pytest.mark.parametrize(("answered", "reference"), DIFFERENT)
def test_different_answers(answered, reference):
    assert math_reward(rf"\boxed{{{answered}}}", reference) == 0.0


@pytest.mark.parametrize(("answered", "reference"), SAME)
def test_same_answers(answered, reference):
    assert math_reward(rf"\boxed{{{answered}}}", reference) == 1.0


@pytest.mark.parametrize("answered", sorted({text for pair in SAME + DIFFERENT for text in pair}))
def test_every_answer_is_its_own_reference(answered):
    assert math_reward(rf"Some thought, then \boxed{{{answered}}}.", answered) == 1.0


@pytest.mark.parametrize(("response", "reference", "reward"), RESPONSES)
def test_where_the_answer_stands(response, reference, reward):
    assert math_reward(response, reference) == reward
