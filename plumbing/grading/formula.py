"""plumbing/grading/formula.py - reads one formula in LaTeX, and says whether two formulas are the same function.

A small parser of our own reads the formula into a tree. It refuses what it does not know, for a misread formula
may reward a wrong answer. Nothing is simplified. Two trees are compared by their values at many points, with so
many digits that different values differ. So no text can start a computation without end: every operation has a
bound on the size of its result.

A tree is a tuple of an operation and its operands: "2x^2" is ("*", ("number", "2"), ("^", ("letter", "x"),
("number", "2"))). Every formula is read in one pass, without looking back.
"""

import math
import operator
import random
import re
from fractions import Fraction

TRIGONOMETRIC = "sin cos tan cot sec csc".split()
INVERSE = dict(arcsin="asin", arccos="acos", arctan="atan")
FUNCTIONS = [*TRIGONOMETRIC, *INVERSE, "sinh", "cosh", "tanh", "exp", "ln", "lg", "log"]
GREEK = ("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma "
         "tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar").split()
CONSTANTS = {"e", "i", "\\pi"}
TOKEN = re.compile(r"\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\\.|\S")
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
ENCLOSED = {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}  # brackets that compute something
TIMES = ("*", "\\cdot", "\\times")
OVER = ("/", "\\div")

MAX_DIGITS = 10_000  # of the largest value in a formula over the smallest
MAX_FACTORIAL = 5000
SPARE_DIGITS = 100  # beyond those that the size of the values needs


class Undefined(ValueError):
    """A formula has no value here: a root of a negative number, a division by 0, a value beyond all bounds."""


# ------------------------------------------------------------------------------------------------- the parser


class Parser:
    """Reads a formula by recursive descent: a sum is of terms, a term of factors, a factor has a power."""

    def __init__(self, text):
        self.tokens, self.place, self.num_open_bars = TOKEN.findall(text), 0, 0

    def peek(self):
        """The next token, or "" at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted):
        """The next token, if it is one of those wanted, and goes on; else ""."""
        token = self.peek()
        if not token or wanted and token not in wanted:
            return ""
        self.place += 1
        return token

    def expect(self, wanted):
        """Goes past a token that must come now."""
        if not self.take(wanted):
            raise ValueError(f"{wanted} expected, {self.peek()!r} found")

    def whole(self):
        """The tree of the whole text."""
        tree = self.sum()
        if self.peek():
            raise ValueError(f"{self.peek()!r} is not understood")
        return tree

    def sum(self):
        """a + b - c"""
        tree = self.term()
        while sign := self.take("+", "-"):
            tree = (sign, tree, self.term())
        return tree

    def term(self):
        """a b / c: factors side by side are multiplied, and a division ends at the next factor."""
        tree = self.factor()
        while True:
            if self.take(*TIMES):
                tree = ("*", tree, self.factor())
            elif self.take(*OVER):
                tree = ("/", tree, self.factor())
            elif self.may_multiply():
                tree = ("*", tree, self.factor())
            else:
                return tree

    def may_multiply(self):
        """Whether the next token begins a factor that needs no sign of multiplication. A number needs one:
        "x 2" may be a power, an index or a product."""
        token = self.peek()
        if token == "|":
            return self.num_open_bars == 0
        name = token.removeprefix("\\")
        is_command = token != name and (name in FUNCTIONS or name in GREEK or name in (
            "frac", "sqrt", "binom", "pi", "lfloor", "lceil"))
        return is_command or token in ("(", "[", "{") or bool(re.fullmatch("[a-zA-Z]", token))

    def factor(self):
        """A signed atom, with what stands behind it: factorials, degrees, one power."""
        if sign := self.take("+", "-"):
            return self.factor() if sign == "+" else ("negative", self.factor())
        tree = self.atom()
        while mark := self.take("!", "\\degree"):
            tree = (mark, tree)
        if self.take("^"):
            tree = ("^", tree, self.argument())
        if self.peek() in ("!", "^", "_", "'", "\\degree"):  # x^2^3, x^2!: they can be read in two ways
            raise ValueError("more than one mark")
        return tree

    def argument(self):
        """What an exponent, a \\frac or a \\sqrt applies to: a group, or the next atom, which may be signed."""
        if sign := self.take("+", "-"):
            return self.argument() if sign == "+" else ("negative", self.argument())
        return self.atom()

    def atom(self):
        """A number, a letter, something in brackets, a fraction, a root, a function of something."""
        token = self.take()
        name = token.removeprefix("\\")
        if token in CLOSING:
            return self.group(token)
        if re.fullmatch(r"[\d.]+", token):
            return ("number", token)
        if token == "\\frac":
            return ("/", self.argument(), self.argument())
        if token == "\\binom":
            return ("choose", self.argument(), self.argument())
        if token == "\\sqrt":
            degree = self.group("[") if self.take("[") else ("number", "2")
            return ("root", degree, self.argument())
        if token != name and name in FUNCTIONS:
            return self.function(name)
        if re.fullmatch(r"[a-zA-Z]", token) or token == "\\pi" or token != name and name in GREEK:
            while mark := self.take("'", "_"):
                token += mark if mark == "'" else "_" + self.index()
            return ("letter", token)
        raise ValueError(f"{token!r} is not understood")

    def group(self, opening):
        """What stands in brackets, up to the one that closes."""
        outside, self.num_open_bars = self.num_open_bars, int(opening == "|")
        tree = self.sum()
        if opening == "{" and self.take("\\choose"):
            tree = ("choose", tree, self.sum())
        self.expect(CLOSING[opening])
        self.num_open_bars = outside
        return (ENCLOSED[opening], tree) if opening in ENCLOSED else tree

    def index(self):
        """The index behind _ as text."""
        if not self.take("{"):
            return self.take()
        index = ""
        while not self.take("}"):
            token = self.take()
            if token in ("", "{"):
                raise ValueError("the index does not end")
            index += token
        return index

    def function(self, name):
        """\\sin^2 x, \\log_2 8, \\ln(ab): without brackets, a function takes the factors up to a sign or to
        the next function."""
        base = ("number", "10") if name in ("log", "lg") else None
        power = None
        while mark := self.take("^", "_"):
            if mark == "^":
                power = self.argument()
            else:
                base = self.argument()
        if name in TRIGONOMETRIC and power == ("negative", ("number", "1")):
            name, power = "arc" + name, None
        if self.take("("):
            tree = self.group("(")
        else:
            tree = self.factor()
            while self.may_multiply() and self.peek().removeprefix("\\") not in FUNCTIONS:
                tree = ("*", tree, self.factor())
        if base:
            tree = ("/", ("ln", tree), ("ln", base))
        else:
            tree = (name, tree)
        return ("^", tree, power) if power else tree


def parse(text):
    """The tree of a formula. ValueError for what is not understood, or is nested too deeply."""
    try:
        return Parser(text).whole()
    except RecursionError:
        raise ValueError("nested too deeply") from None


def letters_of(tree):
    """The names of the letters in a tree, with e, i and pi."""
    if tree[0] == "letter":
        return {tree[1]}
    if tree[0] == "number":
        return set()
    return set().union(*map(letters_of, tree[1:]))


# --------------------------------------------------------------------------------------------------- the values


ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
              "negative": operator.neg, "abs": abs}


def exact(tree):
    """The value of a tree of rational numbers as a Fraction. ValueError for what has letters, roots or
    functions, or is too large."""
    operation, *operands = tree
    if operation == "number":
        return Fraction(operands[0])
    values = [exact(operand) for operand in operands] if operation != "letter" else []
    if operation == "^":
        return exact_power(*values)
    if operation in ARITHMETIC:
        try:
            return ARITHMETIC[operation](*values)
        except ZeroDivisionError:
            raise Undefined("division by 0") from None
    return Fraction(whole_function(operation, values))


def exact_power(base, exponent):
    """A bounded power with a whole exponent."""
    num_bits = max(abs(base.numerator), base.denominator).bit_length() * abs(exponent)
    if exponent.denominator != 1 or num_bits > 3.4 * MAX_DIGITS or base == 0 and exponent <= 0:
        raise Undefined("no rational power, or a large one")
    return base ** int(exponent)


def whole_function(operation, values):
    """Factorials and binomial coefficients of whole numbers, and rounding, as an int."""
    if operation in ("floor", "ceil"):
        return getattr(math, operation)(values[0])
    if operation in ("!", "choose") and all(v == int(v) and 0 <= v <= MAX_FACTORIAL for v in values):
        function = math.factorial if operation == "!" else math.comb
        return function(*map(int, values))
    raise Undefined(operation)


class Approximation:
    """The values of trees at one point, to a number of digits. Also notes the range of the values on the way.

    letters: name -> Fraction. is_real: whether a value that is not real counts as undefined.
    """

    def __init__(self, letters, is_real, digits):
        # mpmath comes with math-verify and sympy. It is imported here, so that a project without it can still
        # be imported, and can grade what needs only exact numbers.
        import mpmath
        self.mp, self.is_real = mpmath.mp, is_real
        self.mp.dps = digits
        self.smallest = self.largest = 0  # powers of 2
        self.letters = {"e": self.mp.e, "i": self.mp.mpc(0, 1), "\\pi": self.mp.pi}
        for name, value in letters.items():
            self.letters[name] = self.mp.mpf(value.numerator) / value.denominator

    def value(self, tree):
        """The value of a tree, as mpmath's real or complex number."""
        operation, *operands = tree
        if operation == "letter":
            return +self.letters[operands[0]]
        if operation == "number":
            return self.noted(self.mp.mpf(operands[0]))
        values = [self.value(operand) for operand in operands]
        if operation in ("^", "root"):
            result = self.power(values, operation)
        elif operation in ARITHMETIC:
            if operation == "/" and not values[1]:
                raise Undefined("division by 0")
            result = ARITHMETIC[operation](*values)
        elif operation == "\\degree":
            result = values[0] * self.mp.pi / 180
        elif operation in ("!", "choose", "floor", "ceil"):
            if any(isinstance(value, self.mp.mpc) for value in values):
                raise Undefined(operation)
            result = self.mp.mpf(whole_function(operation, values))
        else:
            result = self.function(INVERSE.get(operation, operation), values[0])
        return self.noted(result)

    def noted(self, value):
        """The value, if it is one, with its size noted."""
        if isinstance(value, self.mp.mpc) and value.imag == 0:
            value = value.real
        if not self.mp.isfinite(value) or self.is_real and isinstance(value, self.mp.mpc):
            raise Undefined("not a real number")
        if value:
            size = int(self.mp.mag(value))
            self.smallest, self.largest = min(self.smallest, size), max(self.largest, size)
        if self.num_digits() > MAX_DIGITS:
            raise Undefined("too large")
        return value

    def num_digits(self):
        """How many decimal digits lie between the largest and the smallest value so far."""
        return int((self.largest - self.smallest) * 0.302)

    def power(self, values, operation):
        """A power, or a root with a real value where there is one."""
        base, exponent = values if operation == "^" else (values[1], 1 / values[0])
        if not base:
            if isinstance(exponent, self.mp.mpc) or exponent <= 0:
                raise Undefined("0 to the power of 0")
            return base
        if abs(exponent) * abs(self.mp.mag(base)) > 4 * MAX_DIGITS:
            raise Undefined("too large")
        is_odd_root = operation == "root" and values[0] == int(values[0]) and int(values[0]) % 2
        if is_odd_root and not isinstance(base, self.mp.mpc) and base < 0:
            return -((-base) ** exponent)
        return base ** exponent

    def function(self, name, value):
        """sin, ln and others."""
        if name in ("exp", "sinh", "cosh", "tanh") and abs(value) > 3 * MAX_DIGITS or name == "ln" and not value:
            raise Undefined(name)
        if not hasattr(self.mp, name):
            raise Undefined(name)
        return getattr(self.mp, name)(value)


def values_at(trees, letters, is_real):
    """The values of some trees at one point, or None for those that are undefined there; and the tolerance for
    their difference.

    A first pass sees how far apart the sizes of all values are. The second has enough digits for the smallest
    beside the largest: 2^{1000} + 1 is not 2^{1000}.
    """
    digits = SPARE_DIGITS
    for _ in range(2):
        values, needed = [], 0
        for tree in trees:
            approximation = Approximation(letters, is_real, digits)
            try:
                values.append(approximation.value(tree))
            except (Undefined, ZeroDivisionError, OverflowError):
                values.append(None)
            needed = max(needed, approximation.num_digits())
        digits = SPARE_DIGITS + needed
    mp = approximation.mp
    largest = max([1, *(abs(value) for value in values if value is not None)])
    return values, largest * mp.mpf(10) ** (SPARE_DIGITS // 2 - mp.dps)


def points(letters):
    """Random values for the letters: small and large, of either sign or all positive, fractions or whole."""
    rng = random.Random(0)
    for scale in (1, 3, 10, 30, 200, 10 ** 4, 10 ** 7):
        for signs in ((1,), (1, -1)):
            for unit in (Fraction(1, 997), Fraction(1, 991), 1):
                yield {letter: rng.choice(signs) * unit * rng.randint(1, int(scale / unit)) for letter in letters}


def is_same_function(answer, gold, factor=None):
    """Whether two formulas have the same value wherever both are defined.

    factor: for both sides of equations, None asks for equal values, "any" allows a constant factor between
    them, and "positive" one above 0. An answer with a letter that the gold answer lacks is wrong.
    """
    trees = parse(answer), parse(gold)
    names = [letters_of(tree) for tree in trees]
    letters = sorted(names[1] - CONSTANTS)
    if names[0] - names[1] - CONSTANTS:
        return False
    is_real = bool(letters) and "i" not in names[0] | names[1]
    has_bars = "|" in answer + gold
    agreed, ratio = 0, None
    for point in points(letters) if letters else [{}]:
        (x, y), tolerance = values_at(trees, point, is_real)
        if x is None or y is None:
            # \ln(ab) is \ln a + \ln b where both are defined. But \ln|x| is more than \ln x.
            if has_bars and not x is y is None:
                return False
            continue
        if factor and abs(y) > tolerance:
            ratio = x / y if ratio is None else ratio
            if abs(ratio) < tolerance or factor == "positive" and not ratio.real > 0:
                return False
            y *= ratio
            tolerance *= 1 + abs(ratio)
        if abs(x - y) > tolerance:
            return False
        agreed += 1
    return agreed >= (3 if letters else 1)


def real_number(text):
    """The value of a formula without letters, or of an infinity, as mpmath's real number."""
    import mpmath
    if re.fullmatch(r"[+-]? ?\\infty", text):
        return mpmath.mp.ninf if text[0] == "-" else mpmath.mp.inf
    tree = parse(text)
    if letters_of(tree) - {"e", "\\pi"}:
        raise ValueError("not a constant")
    (value,), _ = values_at([tree], {}, True)
    if value is None:
        raise Undefined(text)
    return value
