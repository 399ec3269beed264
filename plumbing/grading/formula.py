"""plumbing/grading/formula.py - reads answers in LaTeX, and says whether two formulas are the same function.

The spelled answer is translated, token by token, into an expression in Python's syntax. Python's parser then
makes a tree of it, and nothing is ever executed. All leaves are texts: 2x^2 becomes "2"@"x"**"2". (An @ is a
product without a sign. The tree has * in its place.) An unknown token is refused, since a formula that is
read wrongly may reward a wrong answer.

Nothing is simplified. Two trees are compared by their values at many points, with enough digits to tell
different values apart. Every operation has a bound on the size of its result, so a usual formula takes
milliseconds. For others the worker has a limit of time (see workers.py).
"""

import ast
import operator
import random
import re
from fractions import Fraction

FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|exp|ln|lg|log"
LETTERS = ("alpha|beta|gamma|delta|varepsilon|epsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|"
           "sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|"
           "ell|pi|infty|emptyset|Reals|Integers|Naturals|Rationals|Complexes")
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
MATRIX = r" ?\{(?:[pbB]?matrix|smallmatrix|array)\}"
TOKEN = re.compile("|".join((
    r"(?P<number>\d+\.?\d*|\.\d+)",
    rf"(?P<function>\\({FUNCTIONS})(?![a-zA-Z])"
    rf"(?: ?_ ?(?P<base>\w|{GROUP}))?(?: ?\^ ?(?P<power>\w|{GROUP}))?)",
    r"\\(?P<braced>frac|binom|root|sqrt|abs|floor|ceil)(?![a-zA-Z])",
    r"(?P<word>(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))",
    rf"(?P<letter>(?:\\(?:{LETTERS})(?![a-zA-Z])|[a-zA-Z])'*(?: ?_ ?(?:\w|\{{[^{{}}]*\}}))?'*)",
    r"(?P<middle>\} ?\{)", r"(?P<opening>\\\{|[(\[{])", r"(?P<closing>\\\}|[)\]}])",
    rf"(?P<matrix>\\begin{MATRIX}(?: ?\{{[clr|]*\}})?)", rf"(?P<end>\\end{MATRIX})",
    r"(?P<mark>!|\\degree)", r"(?P<sign>\\[a-z]+|\\\\|[-+*/^<>=,;:&])", r"(?P<unknown>\S)")))
TWO_WAYS = re.compile(rf"(?:\^ ?(?:\w|{GROUP})|!) ?\^|\^ ?(?:\w|{GROUP}) ?!")
SIGNS = {sign: sign for sign in "+-*/<>,:"} | {
    "\\cdot": "*", "\\times": "*", "\\div": "/", "^": "**", "\\le": "<=", "\\ge": ">=", "\\ne": "!=",
    "=": "==", "\\in": " in ", "\\cup": "|", "\\cap": "&", "\\setminus": "-", ";": ",", "\\\\": "),(",
    "&": ",", "and": " and ", "or": " or ", "!": "**'!'", "\\degree": "**'degree'"}
BEGINS_FACTOR = ("number", "letter", "function", "braced", "opening", "matrix")
BRACKETS = {"(": "(", "[": "[", "{": "(", "\\{": "{", ")": ")", "]": "]", "}": ")", "\\}": "}"}
PAIRS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
HALF_OPEN = {"(]": "right_closed(", "[)": "left_closed("}
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MARKS = {"!": "factorial", "binom": "binomial", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
ROUNDED = {"sin", "cos", "tan", "cot", "ln"}  # may give 1e-150 instead of 0, as arguments are rounded
CONSTANTS = {"e", "i", "\\pi", "\\infty", "degree"}


def to_python(text):
    """An answer as an expression in Python's syntax. KeyError or ValueError for what is not understood.

    \\frac{1}{2} becomes frac('1','2'), \\sin^2 2x becomes ((sin('2'@'x'))**('2')), and (1,2] becomes
    right_closed('1','2'). The @ is a product that is written without a multiplication sign. `parse` turns it
    into a usual one.
    """
    if TWO_WAYS.search(text):
        raise ValueError("2^3^4, n!^2, 2^n!: these can be read in two ways")
    code = []
    suffix = ""
    previous = "start"
    opened = []  # what is still open: (bracket, its index in code, the text behind its closing bracket)
    for token in TOKEN.finditer(text):
        kind = token.lastgroup
        symbol = token[0]
        if previous == "function" and kind != "opening":
            # Without brackets, as in \sin 2x + 1, the argument ends before the next sign or function.
            opened.append(("", len(code), suffix))
            code.append("(")
        ends_argument = kind in ("function", "closing", "middle", "word", "end", "sign") and symbol != "^"
        while ends_argument and previous != "function" and opened and not opened[-1][0]:
            code.append(")" + opened.pop()[2])
            previous = "closing"
        if previous in ("number", "letter", "closing", "mark", "end", "exponent"):
            # A number may stand behind 5!, and behind an exponent: 2^{10}3. But \sin x^n3 is refused.
            in_function = opened and not opened[-1][0]
            may_follow = previous == "mark" or previous == "exponent" and not in_function
            if kind == "number" and not may_follow or kind == "mark" == previous:
                raise ValueError("x2, n!!: these can be read in two ways")
            if kind == "opening" and in_function:
                raise ValueError("\\sin x(1+y): this can be read in two ways")
            code.append("@" if kind in BEGINS_FACTOR else "")  # a product without a sign, see `parse`
        if kind in ("number", "letter"):
            if kind == "letter" and code and code[-1] == "**":
                kind = "exponent"
            code.append(repr(re.sub("[ {}]", "", symbol)))
        elif kind == "function":
            name = token[3]
            base = token["base"]
            power = token["power"]
            if re.fullmatch(r"\{ ?- ?1 ?\}", power or ""):
                raise ValueError("\\cot^{-1}: this can be read in two ways")
            base = base or ("10" if name in ("log", "lg") else "")
            code.append("((ln" if base else f"(({name}")  # one bracket for the base, one for the power
            suffix = f"/ln({to_python(base)}))" if base else ")"
            suffix += f"**({to_python(power)}))" if power else ")"
        elif kind == "braced":
            code.append(token["braced"])
        elif kind == "opening":
            opened.append((symbol, len(code), suffix if previous == "function" else ""))
            code.append(BRACKETS[symbol])
        elif kind == "closing":
            bracket, place, after = opened.pop() if opened else ("", 0, "")
            if bracket == "{" and place and code[place - 1] == "**":
                kind = "exponent"
            if PAIRS.get(bracket) != symbol:
                code[place] = HALF_OPEN[bracket + symbol]
                symbol = ")"
            code.append(BRACKETS[symbol] + after)
        else:
            code.append({"middle": ",", "matrix": "matrix((", "end": "))"}.get(kind) or SIGNS[symbol])
        previous = kind
    return "".join(code) + "".join(")" + after for bracket, _, after in reversed(opened) if not bracket)


def parse(text):
    """The tree of an answer, as the list of its parts. ValueError for what is not understood."""
    try:
        trees = ast.parse(f"[{to_python(text)}]", mode="eval").body.elts
    except (KeyError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"not understood: {text}") from None
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            node.op = ast.Mult()
            # In 1/2x the product starts in the column in which its left factor 1/2 starts: refused. In (1/2)x
            # it starts one column earlier, at the bracket: allowed.
            begins_alike = node.left.col_offset == node.col_offset
            if begins_alike and isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.Div):
                raise ValueError("1/2x: this can be read in two ways")
    return trees


def leaves(tree):
    """The texts of all numbers and letters in a tree, those near the root first."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def letters_of(tree):
    """The names of the letters in a tree, without CONSTANTS such as e, i and pi."""
    return {leaf for leaf in leaves(tree) if re.match(r"[a-zA-Z\\]", leaf)} - CONSTANTS


class Calculator:
    """Computes values of trees at one point. ValueError for a value that does not exist, or is too large.

    letters: name -> Fraction. is_real: whether a value that is not real counts as missing. digits: decimal
    digits of the computation.
    """

    def __init__(self, letters, is_real, digits):
        import mpmath  # not at the top of the file: plain numbers and texts are graded without it
        self.mp = mpmath.mp
        self.is_real = is_real
        self.mp.dps = digits
        self.sizes = [0]  # of all values so far, as powers of 2
        self.letters = {"e": self.mp.e, "i": self.mp.mpc(0, 1), "\\pi": self.mp.pi}
        for name, value in letters.items():
            self.letters[name] = self.mp.mpf(value.numerator) / value.denominator

    def value(self, tree):
        """The value of a tree, a real or complex number of mpmath."""
        value = self.compute(tree)
        if isinstance(value, self.mp.mpc) and value.imag == 0:
            value = value.real
        if not self.mp.isfinite(value) or self.is_real and isinstance(value, self.mp.mpc):
            raise ValueError("not a real number")
        # Where equal numbers cancel, as in \sqrt{2}^2 - 2 and \sin\pi, rounding may leave a tiny number. It
        # counts as 0. 3.3 is the number of bits per decimal digit. The last 50 digits are not trusted.
        may_cancel = isinstance(tree, ast.BinOp) and type(tree.op) in (ast.Add, ast.Sub) or isinstance(
            tree, ast.Call) and tree.func.id in ROUNDED
        if value and may_cancel and self.mp.mag(value) < max(self.sizes) - 3.3 * (self.mp.dps - 50):
            return self.mp.mpf(0)
        if value:
            self.sizes.append(int(self.mp.mag(value)))
        if self.num_digits() > 10_000:
            raise ValueError("too large")
        return value

    def num_digits(self):
        """How many decimal digits lie between the largest and the smallest value so far."""
        return int((max(self.sizes) - min(self.sizes)) * 0.302)  # sizes are in bits

    def compute(self, tree):
        """One operation on the values of its operands."""
        match tree:
            case ast.Constant(value=text):
                return +self.letters[text] if text in self.letters else self.mp.mpf(text)
            case ast.List(elts=[only]) | ast.UnaryOp(op=ast.UAdd(), operand=only):
                return self.value(only)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value="!" | "degree" as mark)):
                return self.function(mark, self.value(left))
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return self.power(self.value(left), self.value(right))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](self.value(left), self.value(right))
            case ast.Call(func=ast.Name(id=name), args=operands):
                return self.function(name, *map(self.value, operands))
        raise ValueError("no formula")

    def power(self, base, exponent, is_odd_root=False):
        """base ** exponent. ValueError if it is too large. An odd root of a negative base is real."""
        if base and abs(exponent) * abs(self.mp.mag(base)) > 40_000 or not base and exponent.real <= 0:
            raise ValueError("too large, or 0 to a power that is not positive")
        is_negative = is_odd_root and not isinstance(base, self.mp.mpc) and base < 0
        return -((-base) ** exponent) if is_negative else base ** exponent

    def function(self, name, *values):
        """The value of \\sin, \\frac, a factorial or another function."""
        first = values[0]
        last = values[-1]
        if (len(values) == 2) != (name in ("frac", "binom", "root")) or len(values) > 2:
            raise ValueError("not its number of arguments")
        is_small_whole = all(0 <= value.real <= 5000 and value == int(value.real) for value in values)
        if name in ("!", "binom") and not is_small_whole:
            raise ValueError("factorials are of small whole numbers")
        if name in ("exp", "sinh", "cosh", "tanh") and abs(first) > 30_000 or name == "ln" and not first:
            raise ValueError("too large")
        match name:
            case "frac":
                return first / last
            case "root":
                return self.power(last, 1 / first, first % 2 == 1)
            case "degree":
                return first * self.mp.pi / 180
            case "abs":
                return abs(first)
            case "floor" | "ceil":  # \log_2 8 may come out as 2.99999
                near = self.mp.nint(first.real)
                if abs(first - near) < self.mp.mpf(10) ** (50 - self.mp.dps):
                    return near
        return getattr(self.mp, MARKS.get(name, name))(*values)


def values_at(trees, letters, is_real):
    """Computes trees at one point -> their values, and a tolerance: by how much equal values may differ.

    The value of a tree is None if it is undefined there.
    There are enough digits to tell 2^{1000} + 1 from 2^{1000}, and 0.333333 from 1/3. With letters, a point
    that needs more than 1,400 digits counts as undefined.
    """
    num_typed = sum(len(leaf) for tree in trees for leaf in leaves(tree))
    for digits in (150, 1500) if letters else (150, 1500, 11_000):
        values = []
        needed = 0
        for tree in trees:
            calculator = Calculator(letters, is_real, digits + num_typed)
            try:
                values.append(calculator.value(tree))
            except (ValueError, ArithmeticError):
                values.append(None)
            needed = max(needed, calculator.num_digits())
        if needed < digits - 100:
            break
    else:
        values = [None for _ in trees]
    largest = max([1, *(abs(value) for value in values if value is not None)])
    return values, largest * calculator.mp.mpf(10) ** (50 - digits - num_typed)


def points(letters):
    """Random values for letters: small or large, positive or of either sign, fractions or whole numbers."""
    rng = random.Random(0)
    for scale in (1, 3, 10, 30, 200, 10 ** 4, 10 ** 7):
        for signs in ((1,), (1, -1)):
            for unit in (Fraction(1, 997), Fraction(1, 991), 1):
                yield {name: rng.choice(signs) * unit * rng.randint(1, int(scale / unit)) for name in letters}


def is_same_function(answer, gold, factor=None):
    """Whether two trees have the same value wherever both are defined.

    factor: None asks for equal values. For relations, each tree is one side minus the other. "any" then
    allows a constant factor between the two trees, and "positive" a factor above 0. An answer with a letter
    that the gold answer lacks is wrong.
    """
    letters = sorted(letters_of(gold))
    if letters_of(answer) - letters_of(gold):
        return False
    is_real = bool(letters) and "i" not in leaves(answer) + leaves(gold)
    has_bars = "'abs'" in ast.dump(answer) + ast.dump(gold)
    agreed = 0
    ratio = None
    for point in points(letters) if letters else [{}]:
        (x, y), tolerance = values_at((answer, gold), point, is_real)
        if x is None or y is None:
            # Undefined points are left out, so \ln(ab) is \ln a + \ln b. With bars they count: \ln|x| is not
            # \ln x.
            if has_bars and (x is None) != (y is None):
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
    # Equations that hold everywhere or nowhere say nothing: 0 = 0 is not \sin^2 x + \cos^2 x = 1.
    says_nothing = factor and (ratio is None or not letters)
    return agreed >= (3 if letters else 1) and not says_nothing
