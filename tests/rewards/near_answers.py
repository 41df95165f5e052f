"""Completions that are the reference but for a brace, a case, a name or a digit; or that choose several letters."""

from __future__ import annotations

from right_answers import boxed

NEAR_ANSWERS: list[tuple[str, object]] = [
    (boxed("2^{n+1}"), "2^{n}+1"),
    (boxed(r"\sqrt{2x+1}"), r"\sqrt{2x}+1"),
    (boxed(r"x^{2 y}"), "x^{2} y"),
    (boxed(r"\frac{m}{M}"), r"\frac{M}{m}"),
    (boxed(r"2^{n+1} \text{ for all } n"), r"2^{n}+1 \text{ for all } n"),
    (boxed("x_1 = 3, x_2 = 5"), "x_1 = 5, x_2 = 3"),
    (boxed(r"\alpha = 3"), r"\beta = 3"),
    (boxed("AB = 3, CD = 5"), "AB = 5, CD = 3"),
    (boxed("A. B"), "A"),
    (boxed("(A) (B) (C) D"), "C"),
    (boxed("(A) B, C or D"), "A"),
    (boxed("(A) or (B)"), "A"),
    (boxed("1000000008.0"), "1000000007"),
    (boxed("2432902008176640001.0"), "2432902008176640000"),
    (boxed("5-x"), "|x-5|"),
    (boxed(r"\lfloor x/4 \rfloor + 2x"), "2x"),
    (boxed("5 squared"), "5"),
    ("It equals the square of 5.", "5"),
    ("It is minus 5", "5"),
    ("It is not equal to 5", "5"),
    ("It is 1 over 5", "5"),
    ("So x <= 5.", "5"),
    (boxed("2.72"), "e"),
    (boxed("x"), "2x - 1"),
    (boxed("2 thirds"), "2"),
    (boxed("10 degrees below zero"), "10"),
    (boxed(r"0.\overline{3}"), "0.3"),
    (boxed(r"\sum_{k=1}^n k $ $6"), "6"),
]
