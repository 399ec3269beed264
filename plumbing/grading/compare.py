"""plumbing/grading/compare.py - the structure of an answer: names, lists, tuples, intervals, matrices, relations.

`is_same` takes two answers apart, as far as they have parts, and compares the parts as formulas (formula.py).
It runs in a worker only (workers.py). Both answers come in one spelling (spelling.py).

- Lists and sets are one kind, and their order does not matter. Tuples and intervals keep brackets and order.
- A name may be missing on one side: x = 5 is 5. Two different names are different answers.
- Intervals, inequalities and unions are sets of numbers, and are compared as sets.
- Equations are the same if they differ by a factor.
"""

import re

from plumbing.grading.formula import exact, is_same_function, parse, real_number
from plumbing.grading.spelling import closing, spell, split_top, without_commas

RELATION = r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<|>|="
TURNED = {">": "<", "\\ge": "\\le"}
AND, OR = r"\\cap(?![a-z])|(?<![a-zA-Z\\])and(?![a-zA-Z])", r"\\cup(?![a-z])|,? *(?<![a-zA-Z\\])or(?![a-zA-Z])"
MINUS = r"\\setminus(?![a-z])"
LIST = r"[,;] *(?:or|and)(?![a-zA-Z])|,|;|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])"
VARIABLE = r"[a-zA-Z]|\\[a-z]+"
NAME = r"(?:[a-zA-Z]+(?:_\{?\w+\}?)?'?|\\[a-z]+)"
NAMED = re.compile(
    rf"((?:m ?)?\\(?:angle|triangle) ?{NAME}|\\overline ?\{{?{NAME}\}}?|\|{NAME}\||{NAME}|[a-zA-Z]\((?:{NAME}|\d+)\)|"
    rf"\({NAME}(?:, ?{NAME})+\)) ?(?:=|\\in(?![a-z])) ?([^=<>]+)")
MATRIX = re.compile(
    r"(.*?)(?:\\cdot|\*)? ?\\begin ?\{([pbvB]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?(.*)\\end ?\{\2\}", re.DOTALL)
NUMBERS = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)
MAX_PARTS, MAX_DEPTH = 100, 6


def is_same(answer, gold, depth=0):
    """Whether two spelled answers are equal."""
    if not answer or not gold or depth > MAX_DEPTH:
        return False
    if answer.replace(" ", "") == gold.replace(" ", ""):
        return True
    numbers = exact_or_none(answer), exact_or_none(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    verdict = compare_names(answer, gold, depth)
    if verdict is None:
        verdict = compare_sets(answer, gold)
    if verdict is None:
        verdict = compare_relations(answer, gold, depth)
    if verdict is None:
        verdict = compare_parts(answer, gold, depth)
    return verdict


def exact_or_none(text):
    """The value of rational arithmetic as a Fraction, or None for everything else."""
    try:
        return exact(parse(text))
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------------- names


def strip_name(text):
    """x = 5 -> (x, 5); (p,q) = (3,2) -> (p,q), (3,2); x \\in [0,1] -> x, [0,1]; others -> None, text."""
    match = NAMED.fullmatch(text)
    return (match[1].replace(" ", ""), match[2].strip()) if match else (None, text)


def in_base(text):
    """204_5, (204)_{5}, 204_{five} -> ("", "204", "5"), sign first; None for what has no base."""
    match = re.fullmatch(r"(-?)[({]?([0-9a-zA-Z.]+)[)}]? ?_ ?\{? ?\(?(\d+|[a-z]+)\)? ?\}?", text)
    if not match or not (match[2][0].isdigit() or match[2].isupper() and match[2][1:]):
        return None
    return match[1], match[2].upper(), str(NUMBERS.get(match[3], match[3]))


def compare_names(answer, gold, depth):
    """The verdict on answers of which one has a name or a base, or None if that does not decide."""
    bases = in_base(answer), in_base(gold)
    if any(bases):
        return bases[0] == bases[1]
    (name_a, value_a), (name_g, value_g) = strip_name(answer), strip_name(gold)
    other = gold if name_a else answer
    if name_a and name_a == name_g or bool(name_a) != bool(name_g) and not re.search(RELATION, other):
        return is_same(value_a, value_g, depth + 1)
    if name_a and name_g and exact_or_none(value_a) is not None:
        return False
    if "=" in answer and "=" in gold:
        # (x,y) = (3,-4) is x = 3, y = -4.
        equations = one_by_one(answer), one_by_one(gold)
        return None if equations == (answer, gold) else is_same(*equations, depth + 1)
    if "=" in answer and not re.search(RELATION, gold):
        sides = split_top(answer, RELATION)
        if len(sides) > 1 and len(split_top(answer, LIST)) == 1 and re.findall(RELATION, answer).count("=") == len(sides) - 1:
            # x = 2 + 3 = 5: all that is said to be equal must be.
            values = sides[1:] if re.fullmatch(NAME, sides[0]) else sides
            return len(sides) > 2 and all(is_same(value, gold, depth + 1) for value in values)
        return unnamed(answer) != answer and is_same(unnamed(answer), gold, depth + 1)
    if "=" in gold and not re.search(RELATION, answer) and unnamed(gold) != gold:
        return is_same(answer, unnamed(gold), depth + 1)
    return None


def one_by_one(text):
    """(x,y) = (3,-4) as x = 3, y = -4."""
    name, value = strip_name(text)
    if not name or name[0] != "(" or value[0] != "(":
        return text
    names, values = name[1:-1].split(","), split_top(value[1:-1], ",")
    return ", ".join(map(" = ".join, zip(names, values))) if len(names) == len(values) else text


def unnamed(text):
    """x=1, x=2 as the list 1, 2; and y=-4, x=3 as the pair (3, -4), in the order of the names."""
    named = [strip_name(part) for part in split_top(text, LIST)]
    if len(named) < 2 or any(name is None for name, _ in named):
        return text
    if len({name.split("_")[0] for name, _ in named}) == 1:
        return ", ".join(value for _, value in named)
    named.sort(key=lambda pair: pair[0].strip("\\"))
    return f"({', '.join(value for _, value in named)})"


# --------------------------------------------------------------------------------------------- sets of numbers


def compare_sets(answer, gold):
    """The verdict on two sets of real numbers of which one is surely a set, or None. (1,3) may be a point."""
    try:
        (variable_a, is_sure_a, set_a), (variable_g, is_sure_g, set_g) = read_set(answer), read_set(gold)
    except ValueError:
        return None
    if not is_sure_a and not is_sure_g:
        return None
    if variable_a and variable_g and variable_a != variable_g:
        return False
    # Two sets that agree at all their ends, between them and beyond them are the same.
    ends = sorted(x for x in ends_of(set_a) + ends_of(set_g) if abs(x) < float("inf"))
    middles = [(x + y) / 2 for x, y in zip(ends, ends[1:])]
    tests = [*ends, *middles, ends[0] - 1, ends[-1] + 1] if ends else [0]
    return all(contains(set_a, x) == contains(set_g, x) for x in tests)


def read_set(text, depth=0):
    """A set of numbers as (variable or None, is_sure, tree). ValueError for all else.

    The tree is ("interval", low, has_low, high, has_high), ("points", x, ...), or a union ("or", a, b), an
    intersection ("and", a, b) or a difference ("minus", a, b).
    """
    text = text.strip()
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    for operation, pattern in (("or", OR), ("and", AND), ("minus", MINUS)):
        parts = split_top(text, pattern)
        if len(parts) > 1:
            sets = [read_set(part, depth + 1) for part in parts]
            variables = {variable for variable, _, _ in sets if variable}
            tree = sets[0][2]
            for _, _, right in sets[1:]:
                tree = (operation, tree, right)
            return only(variables), True, tree
    member = re.fullmatch(rf"({VARIABLE}) ?\\in(?![a-z]) ?(.*)", text)
    if member:
        return member[1], True, read_set(member[2], depth + 1)[2]
    builder = re.fullmatch(rf"\\\{{ ?({VARIABLE}) ?(?:\\in ?\\mathbb\{{R\}} ?)?[:|](.*)\\\}}", text)
    if builder:
        variable, _, tree = read_set(builder[2], depth + 1)
        return only({builder[1], variable}), True, tree
    if text in ("\\mathbb{R}", "\\emptyset"):
        infinity = real_number("\\infty")
        return None, True, ("points",) if text == "\\emptyset" else ("interval", -infinity, False, infinity, False)
    if text[:2] == "\\{" and text[-2:] == "\\}":
        return None, False, ("points", *map(real_number, split_top(text[2:-2], ",")))
    ends = split_top(text[1:-1], ",")
    if len(ends) == 2 and text[0] in "([" and text[-1] in ")]":
        low, high = map(real_number, ends)
        is_sure = "\\infty" in text or text[0] + text[-1] in ("(]", "[)")
        return None, is_sure, ("interval", low, text[0] == "[", high, text[-1] == "]")
    return read_inequality(text)


def only(variables):
    """The one variable of a set, or None if it has none. ValueError if it has two."""
    if len(variables - {None}) > 1:
        raise ValueError("two variables")
    return next(iter(variables - {None}), None)


def read_inequality(text):
    """x < 4, 0 < x \\le 5 or x \\ne 2, with the variable alone on its side, as read_set does."""
    sides, signs = split_top(text, RELATION), re.findall(RELATION, text)
    if len(sides) != len(signs) + 1 or len(sides) not in (2, 3):
        raise ValueError("no inequality in one variable")
    place = 1 if len(sides) == 3 or re.fullmatch(VARIABLE, sides[1]) else 0
    if not re.fullmatch(VARIABLE, sides[place]) or len(sides) == 3 and len({TURNED.get(s, s) for s in signs} & {"=", "\\ne"}):
        raise ValueError("no variable alone")
    infinity, tree = real_number("\\infty"), None
    everything = ("interval", -infinity, False, infinity, False)
    for i, sign in enumerate(signs):
        end = real_number(sides[i] if i < place else sides[i + 1])
        is_upper = (TURNED.get(sign, sign) == sign) == (i >= place)  # x < end, and not end < x
        has_end = sign in ("\\le", "\\ge")
        if sign in ("=", "\\ne"):
            part = ("points", end) if sign == "=" else ("minus", everything, ("points", end))
        elif is_upper:
            part = ("interval", -infinity, False, end, has_end)
        else:
            part = ("interval", end, has_end, infinity, False)
        tree = ("and", tree, part) if tree else part
    return sides[place], True, tree


def ends_of(tree):
    """All ends of intervals and all single points of a set."""
    if tree[0] == "interval":
        return [tree[1], tree[3]]
    return list(tree[1:]) if tree[0] == "points" else ends_of(tree[1]) + ends_of(tree[2])


def contains(tree, x):
    """Whether a number is in a set. Ends that differ by rounding alone count as equal."""
    operation, *parts = tree
    tiny = abs(x) * 1e-40 + 1e-60
    if operation == "interval":
        low, has_low, high, has_high = parts
        is_above = has_low if abs(x - low) < tiny else x > low
        is_below = has_high if abs(x - high) < tiny else x < high
        return bool(is_above and is_below)
    if operation == "points":
        return any(abs(x - point) < tiny for point in parts)
    left, right = contains(parts[0], x), contains(parts[1], x)
    return left or right if operation == "or" else left and right if operation == "and" else left and not right


# --------------------------------------------------------------------------------------- relations and structure


def compare_relations(answer, gold, depth):
    """Equations and inequalities: the same signs, turned to point one way, and sides of equal difference.
    None if neither answer is one."""
    if len(split_top(answer, LIST)) > 1 or len(split_top(gold, LIST)) > 1:
        return None
    (signs_a, sides_a), (signs_g, sides_g) = turned(answer), turned(gold)
    if not signs_a and not signs_g:
        return None
    if signs_a != signs_g or len(sides_a) != len(sides_g) or not all(sides_a + sides_g):
        return False
    if all(is_same(a, g, depth + 1) for a, g in zip(sides_a, sides_g)):
        return True
    if len(signs_a) > 1:
        return False
    differences = [f"({right})-({left})" for left, right in (sides_a, sides_g)]
    return is_same_formula(*differences, "any" if signs_a[0] in ("=", "\\ne") else "positive")


def turned(text):
    """The signs and sides of a relation, with < and \\le for > and \\ge."""
    signs, sides = re.findall(RELATION, text), split_top(text, RELATION)
    if signs and all(sign in TURNED for sign in signs):
        return [TURNED[sign] for sign in reversed(signs)], sides[::-1]
    return signs, sides


def parts_of(text):
    """The kind of an answer, ("matrix", rows, columns), ("union",), ("list",), ("(", "]") or ("formula",); and
    its parts."""
    text = re.sub(r"[(\[] ?(\\begin.*\\end ?\{(?:array|matrix)\}) ?[)\]]", r"\1", text, flags=re.DOTALL)
    if (matrix := MATRIX.fullmatch(text)) and "\\begin" not in matrix[3]:
        factor = matrix[1].strip()
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[3].strip().removesuffix("\\\\"))]
        cells = [spell(cell) for row in rows for cell in row]
        if factor:
            cells = [f"({factor + '1' if factor in '+-' else factor})({cell})" for cell in cells]
        return ("matrix", len(rows), len(rows[0])), cells
    if len(parts := split_top(text, r"\\cup(?![a-z])")) > 1:
        return ("union",), parts
    if len(parts := split_top(text, LIST)) > 1 or "\\pm" in text:
        return ("list",), [sign for part in parts for sign in both_signs(part)]
    opened = re.match(r"\\\{|[(\[]", text)
    if opened and closing(text, opened.end() - 1) == len(text) - 1:
        inside = text[opened.end():-1].rstrip("\\").strip()
        separator = r", |; ?" if ", " in inside else r",|;"
        parts = [without_commas(part) for part in split_top(inside, separator)]
        if opened[0] == "\\{":
            return ("list",), [sign for part in parts for sign in both_signs(part)]
        if len(parts) > 1:
            return (opened[0], text[-1]), parts
        if text[0] == "(" and text[-1] == ")":
            return parts_of(inside)
    return ("formula",), [text]


def both_signs(text):
    """1 \\pm x as 1 + x and 1 - x."""
    if "\\pm" not in text:
        return [text]
    return [text.replace("\\pm", "+").replace("\\mp", "-"), text.replace("\\pm", "-").replace("\\mp", "+")]


def compare_parts(answer, gold, depth):
    """Lists in any order, tuples and matrices part by part, and last two formulas."""
    (kind_a, parts_a), (kind_g, parts_g) = parts_of(answer), parts_of(gold)
    if ("formula",) in (kind_a, kind_g) and ("list",) in (kind_a, kind_g):  # the set {5} is 5
        kind_a = kind_g = ("list",)
    if kind_a != kind_g or len(parts_a) != len(parts_g) or len(parts_g) > MAX_PARTS:
        return False
    if kind_a == ("formula",):
        return is_same_formula(parts_a[0], parts_g[0])
    if kind_a not in (("list",), ("union",)):
        return all(is_same(a, g, depth + 1) for a, g in zip(parts_a, parts_g))
    left = list(parts_g)
    for a in parts_a:
        match = next((g for g in left if is_same(a, g, depth + 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def is_same_formula(answer, gold, factor=None):
    """is_same_function, where text that is no formula differs from all other text."""
    try:
        return is_same_function(answer, gold, factor)
    except ValueError:
        return False
