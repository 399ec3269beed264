"""plumbing/grading/formula.py - reads an answer in LaTeX, and says whether two formulas are the same function.

The spelled answer is translated, token by token, into an expression in Python's syntax. Python's parser then
makes a tree of it, and nothing is ever executed. All leaves are texts: 2x^2 becomes "2"*"x"**"2". An unknown
token is refused, for a misread formula may reward a wrong answer.

Nothing is simplified. Two trees are compared by their values at many points, with so many digits that different
values differ. Every operation has a bound on the size of its result, so no formula takes long.
"""

import ast
import random
import re
from fractions import Fraction

FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|exp|ln|lg|log"
LETTERS = ("alpha|beta|gamma|delta|varepsilon|epsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|"
           "sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell|"
           "pi|infty|emptyset|Reals|Integers")
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
TOKEN = re.compile("|".join((
    r"(?P<number>\d+\.?\d*|\.\d+)",
    rf"\\(?P<function>{FUNCTIONS})(?![a-zA-Z])(?: ?_ ?(?P<base>\w|{GROUP}))?(?: ?\^ ?(?P<power>\w|{GROUP}))?",
    r"\\(?P<braced>frac|binom|root|sqrt|abs|floor|ceil)(?![a-zA-Z])",
    r"(?P<word>and|or)(?![a-zA-Z])",
    rf"(?P<letter>(?:\\(?:{LETTERS})(?![a-zA-Z])|[a-zA-Z])'*(?: ?_ ?(?:\w|\{{[^{{}}]*\}}))?'*)",
    r"(?P<middle>\} ?\{)", r"(?P<opening>\\\{|[(\[{])", r"(?P<closing>\\\}|[)\]}])",
    r"(?P<matrix>\\begin ?\{(?:[pbvB]?matrix|smallmatrix|array)\}(?: ?\{[clr|]*\})?)",
    r"(?P<end>\\end ?\{(?:[pbvB]?matrix|smallmatrix|array)\})",
    r"(?P<mark>!|\\degree)", r"(?P<sign>\\[a-z]+|\\\\|[-+*/^<>=,;:&])", r"(?P<unknown>\S)")))
SIGNS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "^": "**", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "=": "==",
         "\\in": " in ", "\\cup": "|", "\\cap": "&", "\\setminus": "-", ";": ",", "\\\\": "),(", "&": ","}
SIGNS |= {sign: sign for sign in "+-*/<>,:"}
BRACKETS = {"(": "(", "[": "[", "{": "(", "\\{": "{", ")": ")", "]": "]", "}": ")", "\\}": "}"}
PAIRS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
HALF_OPEN = {"(]": "right_closed(", "[)": "left_closed("}
CONSTANTS = {"e", "i", "\\pi"}


def to_python(text):
    """An answer as an expression in Python's syntax. ValueError for what is not understood.

    \\frac{1}{2} becomes frac("1")("2"), \\sin^2 2x becomes (sin("2"*"x")**("2")), and (1,2] becomes
    right_closed("1","2").
    """
    code, opened, suffix, previous = [], [], "", "start"  # opened: (bracket, place in code, what follows it)
    for token in TOKEN.finditer(text):
        kind, symbol = token.lastgroup, token[0]
        kind = "function" if kind in ("base", "power") else kind
        if previous == "function" and (kind != "opening" or symbol == "\\{"):
            opened.append(("", len(code), suffix))  # \sin 2x: its argument ends at a sign or a function
            code.append("(")
        ends_argument = kind in ("function", "closing", "middle", "word", "end") or kind == "sign" and symbol != "^"
        while ends_argument and previous != "function" and opened and not opened[-1][0]:
            code.append(")" + opened.pop()[2])
            previous = "closing"
        begins_factor = kind in ("number", "letter", "function", "braced", "opening", "matrix")
        if previous in ("number", "letter", "closing", "mark", "end"):
            if kind == "number" and previous != "mark" or kind == "mark" and previous == "mark":
                raise ValueError("a number after a factor is a power, an index or a product")
            code.append("*" if begins_factor else "")
        if kind in ("number", "letter"):
            code.append(repr(re.sub("[ {}]", "", symbol)))
        elif kind == "function":
            base = token["base"] or ("10" if token["function"] in ("log", "lg") else "")
            code.append("(ln" if base else "(" + token["function"])
            suffix = f"/ln({to_python(base)})" if base else ""
            suffix = (f"{suffix})**({to_python(token['power'])}" if token["power"] else suffix) + ")"
            code[-1] = "(" * bool(token["power"] and base) + code[-1]
        elif kind == "braced":
            code.append(token["braced"])
        elif kind == "opening":
            opened.append((symbol, len(code), suffix if previous == "function" else ""))
            code.append(BRACKETS[symbol])
        elif kind == "middle":
            code.append(")(")
        elif kind == "closing":
            bracket, place, after = opened.pop() if opened else ("", 0, "")
            if PAIRS.get(bracket) == symbol:
                code.append(BRACKETS[symbol] + after)
            else:
                code[place] = HALF_OPEN[bracket + symbol]
                code.append(")")
        elif kind in ("matrix", "end"):
            code.append("matrix((" if kind == "matrix" else "))")
        elif kind == "mark":
            code.append(f"**{symbol!r}")
        elif kind == "word":
            code.append(f" {symbol} ")
        else:
            code.append(SIGNS[symbol])
        previous = "opening" if kind == "middle" else kind
        if previous == "mark" and text[token.end():].lstrip().startswith("^"):
            raise ValueError("n!^2 can be read in two ways")
    return "".join(code) + "".join(")" + after for _, _, after in reversed(opened))


def parse(text):
    """The tree of an answer, as the list of its parts. ValueError for what is not understood."""
    try:
        return ast.parse(f"[{to_python(text)}]", mode="eval").body.elts
    except (KeyError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"not understood: {text}") from None


def leaves(tree):
    """The texts of numbers and letters in a tree, from the left."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def letters_of(tree):
    """The names of the letters in a tree, without e, i and pi."""
    return {leaf for leaf in leaves(tree) if re.match(r"[a-zA-Z\\]", leaf)} - CONSTANTS - {"\\degree", "\\infty"}


class Undefined(ValueError):
    """A formula has no value here: a root of a negative number, a division by 0, a value beyond all bounds."""


class Calculator:
    """Values of trees at one point.

    letters: name -> Fraction. is_real: whether a value that is not real counts as undefined.
    """

    def __init__(self, letters, is_real, digits):
        import mpmath  # here, so that importing the project does not need it: it comes with sympy
        self.mp, self.is_real = mpmath.mp, is_real
        self.mp.dps = digits
        self.sizes = [0]  # of all values so far, as powers of 2
        self.letters = {"e": self.mp.e, "i": self.mp.mpc(0, 1), "\\pi": self.mp.pi, "\\infty": self.mp.inf}
        for name, value in letters.items():
            self.letters[name] = self.mp.mpf(value.numerator) / value.denominator

    def value(self, tree):
        """The value of a tree, a real or complex number of mpmath. Undefined or ValueError where it has none."""
        value = self.compute(tree)
        if isinstance(value, self.mp.mpc) and value.imag == 0:
            value = value.real
        if not self.mp.isfinite(value) or self.is_real and isinstance(value, self.mp.mpc):
            raise Undefined("not a real number")
        if value:
            self.sizes.append(int(self.mp.mag(value)))
        if self.num_digits() > 10_000:
            raise Undefined("too large")
        return value

    def num_digits(self):
        """How many decimal digits lie between the largest and the smallest value so far."""
        return int((max(self.sizes) - min(self.sizes)) * 0.302)

    def compute(self, tree):
        """One operation on the values of its operands."""
        match tree:
            case ast.Constant(value=text):
                return +self.letters[text] if text in self.letters else self.mp.mpf(text)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                return self.value(operand) * (-1 if isinstance(tree.op, ast.USub) else 1)
            case ast.List(elts=[only]):
                return self.value(only)
            case ast.BinOp(op=ast.Pow(), right=ast.Constant(value="!")):
                return self.mp.factorial(self.whole(tree.left))
            case ast.BinOp(op=ast.Pow(), right=ast.Constant(value="\\degree")):
                return self.value(tree.left) * self.mp.pi / 180
            case ast.BinOp(op=ast.Add()):
                return self.value(tree.left) + self.value(tree.right)
            case ast.BinOp(op=ast.Sub()):
                return self.value(tree.left) - self.value(tree.right)
            case ast.BinOp(op=ast.Mult()):
                return self.value(tree.left) * self.value(tree.right)
            case ast.BinOp(op=ast.Div()) | ast.Call(func=ast.Call(func=ast.Name("frac"))):
                above, below = (tree.left, tree.right) if isinstance(tree, ast.BinOp) else arguments(tree)
                return self.value(above) / self.value(below)
            case ast.BinOp(op=ast.Pow()):
                return self.power(self.value(tree.left), self.value(tree.right))
            case ast.Call(func=ast.Call(func=ast.Name("binom"))):
                return self.mp.binomial(*map(self.whole, arguments(tree)))
            case ast.Call(func=ast.Call(func=ast.Name("root"))):
                degree, base = map(self.value, arguments(tree))
                if degree % 2 == 1 and not isinstance(base, self.mp.mpc) and base < 0:
                    return -self.power(-base, 1 / degree)  # the real root
                return self.power(base, 1 / degree)
            case ast.Call(func=ast.Name(name), args=[argument]):
                return self.function(name, self.value(argument))
        raise ValueError("no formula")

    def whole(self, tree):
        """The value of a tree, if it is a small whole number."""
        value = self.value(tree)
        if isinstance(value, self.mp.mpc) or value != int(value) or not 0 <= value <= 5000:
            raise Undefined("factorials are of whole numbers")
        return int(value)

    def power(self, base, exponent):
        """base ** exponent, bounded."""
        if not base and (isinstance(exponent, self.mp.mpc) or exponent <= 0):
            raise Undefined("0 to the power of 0")
        if base and abs(exponent) * abs(self.mp.mag(base)) > 40_000:
            raise Undefined("too large")
        return base ** exponent

    def function(self, name, value):
        """sin, ln, \\sqrt and others."""
        if name in ("exp", "sinh", "cosh", "tanh") and abs(value) > 30_000 or name == "ln" and not value:
            raise Undefined(name)
        return abs(value) if name == "abs" else getattr(self.mp, name.replace("arc", "a"))(value)


def arguments(tree):
    """The two arguments of frac(a)(b)."""
    return [*tree.func.args, *tree.args]


def values_at(trees, letters, is_real, num_digits=0):
    """The values of trees at one point, None for those undefined there; and the tolerance for a difference.

    The digits suffice for the smallest value beside the largest: 2^{1000} + 1 is not 2^{1000}.
    """
    for digits in (150 + num_digits, 1500, 11_000):
        values, needed = [], 0
        for tree in trees:
            calculator = Calculator(letters, is_real, digits)
            try:
                values.append(calculator.value(tree))
            except (Undefined, ArithmeticError):
                values.append(None)
            needed = max(needed, calculator.num_digits())
        if needed < digits - 100 - num_digits:
            break
    largest = max([1, *(abs(value) for value in values if value is not None)])
    return values, largest * calculator.mp.mpf(10) ** (50 - digits)


def points(letters):
    """Random values for letters: small and large, of either sign or all positive, fractions or whole."""
    rng = random.Random(0)
    for scale in (1, 3, 10, 30, 200, 10 ** 4, 10 ** 7):
        for signs in ((1,), (1, -1)):
            for unit in (Fraction(1, 997), Fraction(1, 991), 1):
                yield {name: rng.choice(signs) * unit * rng.randint(1, int(scale / unit)) for name in letters}


def is_same_function(answer, gold, factor=None):
    """Whether two trees have the same value wherever both are defined. ValueError for what is no formula.

    factor: for the sides of equations, None asks for equal values, "any" allows a constant factor between
    them, and "positive" one above 0. An answer with a letter that the gold answer lacks is wrong.
    """
    letters = sorted(letters_of(gold))
    if letters_of(answer) - letters_of(gold):
        return False
    is_real = bool(letters) and "i" not in leaves(answer) + leaves(gold)
    has_bars = "'abs'" in ast.dump(answer) + ast.dump(gold)
    num_digits = sum(map(len, leaves(answer) + leaves(gold)))  # 0.333...3 is not 1/3
    agreed, ratio = 0, None
    for point in points(letters) if letters else [{}]:
        (x, y), tolerance = values_at((answer, gold), point, is_real, num_digits)
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
