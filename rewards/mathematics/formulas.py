r"""A formula, in LaTeX or as it is typed, becomes a tree.

sum     = product (("+" | "-") product)*
product = unary (("*" | "/") unary | power)*        two factors side by side are multiplied, two numbers never
power   = primary ("!" | "°" | "%" | "^" exponent)*
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

MAX_DIGITS = 5000
"""An answer that has more digits, written out, is not computed."""
MAX_NESTING = 40

Tree = tuple[Any, ...]
"""``(operation, *operands)``; leaves are ``("number", Fraction)``, ``("name", str)`` and ``("value", Value)``."""

TOKEN = re.compile(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|\\[A-Za-z]+|\\.|[A-Za-z]+|\S)")
PLAIN_FRACTION = re.compile(r"\\[dt]?frac(?:\{\d+\}|\d)(?:\{\d+\}|\d)")
"""After a whole number it makes a mixed number."""
FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh",
    "cosh", "tanh", "ln", "log", "lg", "exp", "sqrt", "abs",
))  # fmt: skip
TRIGONOMETRIC = frozenset(["sin", "cos", "tan", "cot", "sec", "csc"])
INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
GREEK = frozenset((
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota",
    "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi",
    "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega", "ell", "hbar",
))  # fmt: skip
TIMES = frozenset((r"\cdot", r"\times", "*", r"\ast"))
DIVIDED = frozenset((r"\div", "/"))
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
ENDS = frozenset((")", "]", "}", "|", r"\}", r"\rfloor", r"\rceil", "+", "-", ",", ""))


class Unreadable(ValueError):
    """The text is no formula of this grammar."""


class TooLarge(ArithmeticError):
    """The value has more than `MAX_DIGITS` digits."""


def parse_formula(text: str) -> Tree:
    """Reads one formula.

    Raises:
        Unreadable: It is none, or is nested deeper than `MAX_NESTING`.
    """
    parser = _Parser([match[1] for match in TOKEN.finditer(text)])
    tree = parser.sum()
    if parser.next:
        raise Unreadable(f"{parser.next!r} was not expected")
    return tree


def names(tree: Tree) -> frozenset[str]:
    """Returns the variables of a formula."""
    if tree[0] == "name":
        return frozenset((tree[1],))
    if tree[0] in ("number", "value"):
        return frozenset()
    return frozenset().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens[::-1]
        self.depth = 0
        self.in_angle = False

    @property
    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, wanted: str | None = None) -> str:
        if not self.tokens or (wanted is not None and self.tokens[-1] != wanted):
            raise Unreadable(f"{wanted or 'more'} is missing at {self.next!r}")
        return self.tokens.pop()

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise Unreadable("it is nested too deeply")
        tree = self.product()
        while self.next in ("+", "-"):
            tree = ("+" if self.take() == "+" else "-", tree, self.product())
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        tree = self.unary()
        while True:
            if self.next in TIMES or (self.next == "*" and self.tokens[-2:-1] == ["*"]):
                self.take()
                tree = ("*", tree, self.unary())
            elif self.next in DIVIDED:
                self.take()
                tree = ("/", tree, self.unary())
            elif self.starts_factor():
                if self.next[0].isdigit() or self.next[0] == ".":
                    raise Unreadable("two numbers stand side by side")
                tree = ("*", tree, self.power())
            else:
                return tree

    def starts_factor(self) -> bool:
        token = self.next
        return token not in ENDS and (
            token[0].isalnum() or token in CLOSING or (token[0] == "\\" and token[1:].isalpha())
        )

    def unary(self) -> Tree:
        if self.next in ("+", "-"):
            self.depth += 1
            if self.depth > MAX_NESTING:
                raise Unreadable("it has too many signs")
            sign = self.take()
            tree = self.unary()
            self.depth -= 1
            return ("negative", tree) if sign == "-" else tree
        return self.power()

    def power(self) -> Tree:
        tree = self.primary()
        while True:
            if self.next == "!":
                self.take()
                tree = ("!", tree)
            elif self.next == "%":
                self.take()
                tree = ("/", tree, ("number", Fraction(100)))
            elif self.next == "°":
                self.take()
                tree = ("*", tree, ("degree",)) if self.in_angle else tree
            elif self.next == "^":
                self.take()
                tree = ("^", tree, self.exponent())
            else:
                return tree

    def exponent(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise Unreadable("it has too many exponents")
        if self.next in ("+", "-"):
            sign = self.take()
            tree = self.exponent()
            tree = ("negative", tree) if sign == "-" else tree
        else:
            tree = self.primary()
            if self.next == "^":
                self.take()
                tree = ("^", tree, self.exponent())
            elif self.next == "!":
                self.take()
                tree = ("!", tree)
        self.depth -= 1
        return tree

    def primary(self) -> Tree:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token in CLOSING:
            tree = self.sum()
            self.take(CLOSING[token])
            operation = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceiling"}.get(token)
            return (operation, tree) if operation else tree
        if token[0] == "\\":
            return self.command(token[1:])
        if token.isalpha():
            return self.letters(token)
        raise Unreadable(f"{token!r} was not expected")

    def number(self, token: str) -> Tree:
        mantissa, _, exponent = token.lower().partition("e")
        if len(mantissa) > MAX_DIGITS or len(exponent) > 6 or abs(int(exponent or 0)) > MAX_DIGITS:
            raise TooLarge
        whole: Tree = ("number", Fraction(token.rstrip(".")))
        if token.isdigit() and PLAIN_FRACTION.match("".join(self.tokens[:-9:-1])):
            return ("+", whole, self.primary())
        return whole

    def command(self, name: str) -> Tree:
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return ("/", self.argument(), self.argument())
        if name in ("binom", "dbinom", "tbinom"):
            return ("binomial", self.argument(), self.argument())
        if name == "sqrt":
            degree: Tree = ("number", Fraction(2))
            if self.next == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return ("root", self.argument(), degree)
        if name in ("pi", "infty") or name in GREEK:
            return self.named(name)
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable(f"the command {name!r} is not known")

    def argument(self) -> Tree:
        r"""Reads what follows ``\frac`` or ``\sqrt``: a group, or a single digit or letter."""
        token = self.next
        if token[:1].isalnum() and len(token) > 1:
            self.tokens[-1:] = [token[1:], token[0]]
            return self.primary() if token[0].isalpha() else ("number", Fraction(self.take()))
        if token[:1].isdigit():
            return ("number", Fraction(self.take()))
        return self.primary()

    def letters(self, run: str) -> Tree:
        if run in FUNCTIONS:
            return self.function(run)
        if run in ("pi", "infinity", "inf", "oo") or run in GREEK:
            return self.named({"pi": "pi"}.get(run, run if run in GREEK else "infty"))
        if len(run) > 1:
            known = next((word for word in (*sorted(FUNCTIONS, key=len, reverse=True), "pi") if run.endswith(word)), "")
            rest = [known] if known and len(known) < len(run) else []
            self.tokens += rest + list(run[: len(run) - len(rest[0]) if rest else None][:0:-1])
        return self.named(run[0])

    def named(self, name: str) -> Tree:
        if self.next == "_":
            self.take()
            if self.next == "{":
                self.take()
                index = ""
                while self.next != "}":
                    index += self.take()
                self.take("}")
            else:
                index = self.take()
            return ("name", f"{name}_{index}")
        if name in ("pi", "infty") or name in ("e", "i"):
            return (name,)
        return ("name", name)

    def function(self, name: str) -> Tree:
        if name == "sqrt":
            return ("root", self.argument() if self.next in CLOSING else self.power(), ("number", Fraction(2)))
        base: Tree | None = None
        exponent: Tree | None = None
        while self.next in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                exponent = self.exponent()
        if exponent == ("negative", ("number", Fraction(1))) and name in INVERSES:
            name, exponent = INVERSES[name], None
        outside, self.in_angle = self.in_angle, name in TRIGONOMETRIC
        argument = self.function_argument()
        self.in_angle = outside
        tree: Tree = (name, argument) if base is None else ("log_of_base", argument, base)
        return tree if exponent is None else ("^", tree, exponent)

    def function_argument(self) -> Tree:
        r"""Reads ``(x)``, or the factors up to the next sign or function: ``\sin 2x \cos x``."""
        if self.next in ("(", "{", "["):
            return self.power()
        tree = self.unary()
        while self.starts_factor() and self.next.lstrip("\\") not in FUNCTIONS and self.next not in CLOSING:
            tree = ("*", tree, self.power())
        return tree
