"""plumbing/grading/compare.py - the structure of an answer: names, lists, tuples, sets, matrices, relations.

`is_same` takes the trees of two answers apart, as far as they have parts, and compares the parts as formulas
(formula.py). It runs in a worker only (workers.py). Both answers come in one spelling (spelling.py).

- The list 1, 2 and the set {1,2} are not told apart, and their order does not matter. For tuples, brackets
  and order matter.
- A name may be missing on one side: x = 5 is 5. Two different names are different answers.
- Inequalities, intervals and unions are sets of numbers, and are compared as sets.
- An equation says that the difference of its sides is 0. Two equations are the same if these differences are
  the same function, up to a constant factor.
"""

import ast
import re

from plumbing.grading.formula import Calculator, is_same_function, leaves, letters_of, parse

NUMBERS = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)
# The kind of an interval -> the sign between its lower end and x, and that between x and its upper end.
INTERVALS = {"Tuple": (ast.Lt, ast.Lt), "List": (ast.LtE, ast.LtE), "right_closed": (ast.Lt, ast.LtE),
             "left_closed": (ast.LtE, ast.Lt)}
TURNED = {ast.Gt: ast.Lt, ast.GtE: ast.LtE}
INEQUALITIES = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.NotEq)


def is_same(answer, gold):
    """Whether two spelled answers are equal. ValueError for what is not understood."""
    bases = in_base(re.sub(r"^[a-zA-Z] ?= ?", "", answer)), in_base(gold)
    if any(bases):
        return bases[0] == bases[1]
    return is_same_list(read(answer), read(gold))


def in_base(text):
    """204_5, (204)_{five}, 204 base 5 -> ("", "204", "5"): sign, digits, base. None without a base."""
    match = re.fullmatch(r"(-?)[({]?([0-9a-zA-Z.]+)[)}]? ?(?:_ ?\{? ?\(?(?:base ?)?|\(?base ?)"
                         r"(\d+|[a-z]+)\)? ?\}?", text)
    if not match or not (match[2][0].isdigit() or match[2].isupper() and match[2][1:]):
        return None
    return match[1], match[2].upper(), str(NUMBERS.get(match[3], match[3]))


def read(text):
    """The trees of an answer's parts. `1 \\pm x` and `{1,2}` give two each.

    `(p,q) = (3,2)` gives the tree of `p = 3` and that of `q = 2`.
    """
    # (x,y) = (1,2), (2,1) is a list of tuples.
    names = "x, ?y(?:, ?z)?|a, ?b(?:, ?c)?|m, ?n|p, ?q|u, ?v"
    text = re.sub(rf"^(\((?:{names})\)) ?(?:=|\\in) ?(?!.*\1)(?=.*\).*\()", "", text)
    if re.search(r"\\pm[^,]*\\pm|\(.*\\pm.*\\pm", text):
        raise ValueError("a \\pm b \\pm c: these may be two values or four")
    if "\\pm" not in text:
        return [part for tree in parse(text) for part in parts_of(tree)]
    texts = text.replace("\\pm", "+").replace("\\mp", "-"), text.replace("\\pm", "-").replace("\\mp", "+")
    return list({ast.dump(part): part for text in texts for part in read(text)}.values())


def parts_of(tree):
    """The parts of one item of a list: {1,2} and `1 or 2` have two, most have only themselves."""
    match tree:
        case ast.Set(elts=parts) if "\\emptyset" not in leaves(tree):
            return parts
        case ast.BoolOp(values=parts) if not any(isinstance(node, INEQUALITIES) for node in ast.walk(tree)):
            return parts
        case ast.Compare(left=ast.Tuple(elts=names), ops=[ast.Eq()], comparators=[ast.Tuple(elts=values)]):
            return [ast.Compare(name, tree.ops, [value]) for name, value in zip(names, values, strict=True)]
    return [tree]


def is_same_list(answers, golds):
    """Whether the parts of two lists can be put in pairs of equals."""
    if len(answers) != len(golds) or len(golds) > 1:
        unnamed = without_names(answers, golds)
        golds = without_names(golds, answers)
        answers = unnamed
    if len(answers) != len(golds) or len(golds) > 100:
        return False
    left = list(golds)
    for answer in answers:
        match = next((gold for gold in left if is_same_part(answer, gold)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def without_names(parts, others):
    """The values of parts that have names, if `others` have none.

    If all names are the same, the values are a list: x=1, x=2 is 1, 2. If they differ, the values are a tuple
    in the order of the names: y=-4, x=3 is (3,-4). If they come again, each round is a tuple: x=1, y=2, x=3,
    y=4 is (1,2), (3,4). Such rounds lose their names also if `others` have the same ones.
    """
    named = [split_name(part) for part in parts]
    names = [name for name, _ in named]
    has_names = all(names) or names[0] and not any(names[1:])  # x = 1, x = 2; or x = 1, 2
    other_names = {split_name(part)[0] for part in others} - {""}
    are_rounds = len(set(names)) < len(names) and other_names == set(names)
    is_list = len({name.split("_")[0] for name in names if name}) == 1
    if not has_names or other_names and (is_list or not are_rounds):
        return parts
    if is_list:
        return [part for _, value in named for part in parts_of(value)]
    starts = [number for number, name in enumerate(names) if name == names[0]]
    rounds = [named[start:end] for start, end in zip(starts, [*starts[1:], len(named)])]
    if any(sorted(name for name, _ in part) != sorted(set(names)) for part in rounds):
        return parts  # x = 1, x = 2, y = 3
    return [in_order(part, bool(other_names)) for part in rounds]


def in_order(named, is_safe):
    """The tuple of the values of (name, value) pairs, in alphabetical order of the names.

    ValueError for m = 2, b = 3: whoever asks for (m,b) means (2,3). Neighbours such as x and y are safe.
    is_safe: the other answer has names, too. Then every order is safe, and nothing is refused.
    """
    letters = [name.strip("\\") for name, _ in named]
    ordered = sorted(letters)
    are_neighbours = all(len(a) == len(b) == 1 and ord(b) - ord(a) == 1 for a, b in zip(ordered, ordered[1:]))
    if letters != ordered and not are_neighbours and not is_safe:
        raise ValueError("the order of these names is not known")
    return ast.Tuple([value for _, value in sorted(named, key=lambda pair: pair[0].strip("\\"))])


def split_name(tree):
    """x = 5 gives ("x", 5), and AB = 5 gives ("AB", 5). All other trees give ("", tree).

    |AB| = 5, f(2) = 5 and x \\in (0,1) are split in the same way.

    A function is a part of the name: \\tan x = 5 -> "tan x", 5. But a length may be written as AB or |AB|,
    and both have the name AB. A side that must still be solved for its letter is no name: \\sqrt{x} = 5,
    \\frac{x}{2} = 5.
    """
    match tree:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.In()], comparators=[value]):
            letters = leaves(left)
            name = "".join(leaves(left))
            functions = [call.func.id for call in ast.walk(left) if isinstance(call, ast.Call)]
            no_product = (ast.Add, ast.Sub, ast.Div, ast.Pow)
            # The left side of -x = 5 is no name, but that of f(-2) = 5 is one.
            is_product = not isinstance(left, ast.UnaryOp) and not any(
                isinstance(node, no_product) for node in ast.walk(left))
            function = left.func.id if isinstance(left, ast.Call) else ""
            has_number = any(letter[0].isdigit() for letter in letters)
            can_be_solved = has_number and function in ("frac", "binom", "root") or (
                len(letters) == 1 and function in ("sqrt", "ln", "exp"))
            # p(x) = 5 has a name, and xy = 5 has none, though both are products in the tree. In the
            # translated text, 'x'@'y' has one character between its factors, and 'p'@('x') has two. Python's
            # tree keeps their columns.
            has_bracket = isinstance(left, ast.BinOp) and left.right.col_offset > left.left.end_col_offset + 1
            is_short = len(letters) == 2 and name.islower() and not has_bracket  # xy is no name in xy = 5
            numbers_and_letters = [node for node in ast.walk(left) if isinstance(node, ast.Constant)]
            first = min(numbers_and_letters, key=lambda node: node.col_offset).value if letters else ""
            is_multiple = bool(re.fullmatch(r"[\d.]+", first))  # 2AB is no name in 2AB = 30
            if is_product and not is_short and not can_be_solved and not is_multiple:
                return " ".join([*(f for f in functions if f != "abs" or name.islower()), name]), value
    return "", tree


def is_same_part(answer, gold):
    """Whether two trees that are no lists are equal."""
    name_a, value_a = split_name(answer)
    name_g, value_g = split_name(gold)
    if name_a and name_a == name_g:
        return is_same_part(value_a, value_g)
    if name_a and name_g and not letters_of(value_a):
        return False
    lacks_gold_name = name_a and not isinstance(gold, (ast.Compare, ast.Dict))
    if lacks_gold_name or name_g and not isinstance(answer, ast.Compare):
        return is_same_list(parts_of(value_a), parts_of(value_g))
    verdict = compare_sets(answer, gold)
    if verdict is not None:
        return verdict
    if isinstance(answer, ast.Compare) or isinstance(gold, ast.Compare):
        return is_same_relation(answer, gold)
    kind_a, parts_a = structure(answer)
    kind_g, parts_g = structure(gold)
    if kind_a == kind_g == "formula":
        return is_same_function(answer, gold)
    return kind_a == kind_g and len(parts_a) == len(parts_g) and all(map(is_same_part, parts_a, parts_g))


def structure(tree):
    """The kind of a tree and its parts."""
    match tree:
        case ast.Tuple(elts=parts):
            return "tuple", parts
        case ast.List(elts=[only]):
            return structure(only)
        case ast.List(elts=parts):
            return "brackets", parts
        case ast.Dict(keys=[key], values=[condition]):
            return "builder", [key, condition]
        case ast.Call(func=ast.Name(id="right_closed" | "left_closed" as name), args=parts):
            return name, parts
        case ast.Call(func=ast.Name(id="matrix"), args=rows):
            rows = [row.elts if isinstance(row, ast.Tuple) else [row] for row in rows]
            return ("matrix", *map(len, rows)), [cell for row in rows for cell in row]
        case ast.UnaryOp(op=sign, operand=operand):
            kind, cells = structure(operand)
            if kind[0] == "matrix":
                return kind, [ast.UnaryOp(sign, cell) for cell in cells]
        case ast.BinOp(op=ast.Mult() | ast.Div(), left=left, right=right):  # a matrix and a factor
            # A matrix may stand behind its factor, but not behind a fraction bar.
            orders = [(left, right), (right, left)] if isinstance(tree.op, ast.Mult) else [(left, right)]
            for matrix, factor in orders:
                kind, cells = structure(matrix)
                if kind[0] == "matrix":
                    return kind, [ast.BinOp(cell, tree.op, factor) for cell in cells]
    return "formula", []


def is_same_relation(answer, gold):
    """Whether two relations say the same.

    Both are first turned, so that a > b becomes b < a. Then their signs must be equal. The differences of
    their sides must be the same function, up to a constant factor. The factor must be positive, except for =
    and \\ne. In a chain, such as a < b < c, the sides are compared instead.
    """
    signs_a, sides_a = turned(answer)
    signs_g, sides_g = turned(gold)
    if not signs_g and set(signs_a) == {ast.Eq}:  # x = 2 + 3 = 5: every value must be right
        values = [side for side in sides_a if not split_name(ast.Compare(side, [ast.Eq()], [gold]))[0]]
        return bool(values) and all(is_same_part(side, gold) for side in values)
    if signs_a != signs_g:
        return False
    if len(signs_a) > 1:
        return all(is_same_part(a, g) for a, g in zip(sides_a, sides_g))
    differences = [ast.BinOp(left, ast.Sub(), right) for left, right in (sides_a, sides_g)]
    if signs_a == [ast.Eq] and is_same_function(ast.Constant("0"), differences[1]):
        # The gold equation holds everywhere, as 2 + 3 = 5 does. So does 0 = 0, which is no answer.
        # So the answer must have the two sides of the gold equation, in either order.
        return sorted(leaves(answer)) == sorted(leaves(gold)) and any(
            all(map(is_same_part, sides, sides_g)) for sides in (sides_a, sides_a[::-1]))
    return is_same_function(*differences, "any" if signs_a[0] in (ast.Eq, ast.NotEq) else "positive")


def turned(tree):
    """The signs and sides of a relation, with < and <= for > and >= if all point that way."""
    if not isinstance(tree, ast.Compare):
        return [], [tree]
    signs = [type(sign) for sign in tree.ops]
    sides = [tree.left, *tree.comparators]
    if all(sign in TURNED for sign in signs):
        return [TURNED[sign] for sign in reversed(signs)], sides[::-1]
    return signs, sides


# -------------------------------------------------------------------------------------------- sets of numbers


def compare_sets(answer, gold):
    """The verdict on two sets of real numbers. None if one is no set, or if both may be points, as (1,3)."""
    sets = RealSet(answer), RealSet(gold)
    if not any(isinstance(tree, (ast.BoolOp, ast.BinOp, ast.Dict, ast.Compare))
               or {"\\infty", "\\Reals"} & set(leaves(tree)) for tree in (answer, gold)):
        return None
    try:
        for real_set in sets:
            real_set.contains(0, real_set.tree)
    except ValueError:
        return None
    # Two sets are the same if they agree at each end, between neighbouring ends, and beyond all ends.
    ends = sorted(sets[0].ends + sets[1].ends) or [0]
    tests = [*ends, *((x + y) / 2 for x, y in zip(ends, ends[1:])), ends[0] - 1, ends[-1] + 1]
    return len(sets[0].variables | sets[1].variables) < 2 and all(
        sets[0].contains(x, answer) == sets[1].contains(x, gold) for x in tests)


class RealSet:
    """A set of real numbers: an interval, an inequality, a union, or {x : x > 3}.

    ends: the ends and single points met so far. variables: the letters that stand for its numbers.
    """

    def __init__(self, tree):
        self.tree = tree
        self.ends = []
        self.variables = set()

    def number(self, tree):
        """The value of an end, which may be infinite."""
        if leaves(tree) == ["\\infty"]:
            num_signs = sum(isinstance(node, ast.USub) for node in ast.walk(tree))  # two minus signs cancel
            return float("-inf") if num_signs == 1 else float("inf")
        self.ends.append(Calculator({}, True, 150).value(tree))
        return self.ends[-1]

    def contains(self, x, tree):
        """Whether the number x is in the set `tree`. ValueError if `tree` is no set of real numbers."""
        match tree:
            case ast.BoolOp(op=op, values=parts):
                results = [self.contains(x, part) for part in parts]
                return all(results) if isinstance(op, ast.And) else any(results)
            case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() as op, right=right):
                left = self.contains(x, left)
                right = self.contains(x, right)
                if isinstance(op, ast.BitOr):
                    return left or right
                return left and right == isinstance(op, ast.BitAnd)  # a difference leaves out the right set
            case (ast.Compare(left=ast.Constant(value=name), ops=[ast.In()], comparators=[inside])
                  | ast.Dict(keys=[ast.Constant(value=name)], values=[inside])) if not name[0].isdigit():
                self.variables.add(name)
                return self.contains(x, inside)
            case ast.Dict(keys=[ast.Compare(ops=[ast.In()]) as key], values=[condition]):
                return self.contains(x, key) & self.contains(x, condition)
            case ast.Compare(left=left, ops=signs, comparators=others):
                sides = [left, *others]
                names = {side.value for side in sides if isinstance(side, ast.Constant) and letters_of(side)}
                if not names or any(isinstance(sign, ast.In) for sign in signs):
                    raise ValueError("1 < 2 and 3 \\in x say nothing of a variable")
                self.variables |= names
                # A side that is just the letter has the value x. A side such as -y or |y|, which holds the
                # letter in another form, cannot be computed: ValueError.
                values = [x if isinstance(side, ast.Constant) and {side.value} == names else self.number(side)
                          for side in sides]
                return all(holds(a, type(sign), b) for a, sign, b in zip(values, signs, values[1:]))
            case ast.Set(elts=parts):
                # A list, so that all parts are computed: `number` keeps each as an end.
                return any([holds(x, ast.Eq, self.number(part)) for part in parts])
            case ast.Constant(value="\\Reals" | "\\emptyset" as name):
                return name == "\\Reals"
            case ast.Tuple(elts=[low, high]) | ast.List(elts=[low, high]) | ast.Call(args=[low, high]):
                kind = tree.func.id if isinstance(tree, ast.Call) else type(tree).__name__
                if kind not in INTERVALS:
                    raise ValueError("a function")
                below, above = INTERVALS[kind]
                ends = [end for sign, end in ((below, low), (above, high)) if sign is ast.LtE]
                if any(leaves(end) == ["\\infty"] for end in ends):
                    raise ValueError("(3,\\infty]: infinity is no number")
                start = self.number(low)
                stop = self.number(high)
                if start > stop or start == stop and len(ends) < 2:
                    raise ValueError("(8,-2) is a point, and no interval")
                return holds(start, below, x) & holds(x, above, stop)
        raise ValueError("no set of real numbers")


def holds(left, sign, right):
    """Whether a relation holds, such as left < right. Numbers that differ only by rounding are equal."""
    if abs(left - right) < abs(right) * 1e-40 + 1e-60:
        return sign in (ast.LtE, ast.GtE, ast.Eq)
    return sign is ast.NotEq or sign in ((ast.Lt, ast.LtE) if left < right else (ast.Gt, ast.GtE))
