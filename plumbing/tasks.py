"""plumbing/tasks.py - the two embedded tasks: three-digit addition worked out on a page, and 4 x 4 Sudoku."""

import functools
import itertools
import random
import zlib


def is_of(split, text):
    """Whether a problem belongs to a split: "train", "dev" or "test"."""
    # A hash of the text deals every problem to one of ten buckets, whatever the seed. So training
    # data never contain a test problem.
    buckets = {"train": range(2, 10), "dev": range(1, 2), "test": range(0, 1)}[split]
    return zlib.crc32(text.encode()) % 10 in buckets


def arithmetic(split, number, seed=0, slip=0.0):
    """`number` distinct problems like 237+682= with solutions 090;111;090;\\boxed{919} -> list of dicts.

    slip: how often the pupil who writes the solutions forgets a carry, and goes on as if there were none. A
    model that imitates this pupil can add, but forgets carries, too. Reinforcement learning can remove this
    bad habit. The `answer` is always the right one.
    """
    rng = random.Random(f"{split} {seed}")
    rows = {}  # by text
    while len(rows) < number:
        a = rng.randint(100, 999)
        b = rng.randint(100, 999)
        text = f"{a}+{b}="
        if is_of(split, text) and text not in rows:
            rows[text] = dict(problem=text, answer=str(a + b), solution=work_out(a, b, slip, rng))
    return list(rows.values())


def work_out(a, b, slip, rng):
    """The pupil's page: for each column, units first, its sum and the carry handed on. Then the answer.

    237 + 682 is 090;111;090;\\boxed{919}. The first column is 7 + 2 = 09, and 0 is handed on. The second one
    is 3 + 8 = 11, and 1 is handed on. A pupil who slips hands on 0 where a carry is due, as in
    090;110;080;\\boxed{819}. The text itself shows the slip: 110 is written, and 111 is right.
    """
    page = ""
    answer = ""  # found from the right
    carry = 0
    columns = list(zip(reversed(str(a)), reversed(str(b)), strict=True))
    for number, (x, y) in enumerate(columns, 1):
        column = int(x) + int(y) + carry
        is_last = number == len(columns)  # it has no next one: both digits of its sum go into the answer
        carry = column // 10 if is_last or rng.random() >= slip else 0
        page += f"{column:02d}{carry};"  # 11 and 1 handed on: "111;"
        answer = f"{column if is_last else column % 10}{answer}"
    return f"{page}\\boxed{{{answer}}}"


@functools.cache
def sudoku_grids():
    """All 288 solved grids of 4 x 4, as strings of 16: each row, column and 2 x 2 box holds 1 2 3 4."""
    rows = list(itertools.permutations("1234"))
    # A band is two rows whose two boxes are right. A grid is two bands whose columns are right.
    bands = [(a, b) for a in rows for b in rows if not {*a[:2]} & {*b[:2]} and not {*a[2:]} & {*b[2:]}]
    return ["".join(map("".join, (*top, *low))) for top in bands for low in bands
            if all(len({*column}) == 4 for column in zip(*top, *low))]


def sudoku(split, number, seed=0, slip=0.0):
    """`number` distinct puzzles like 0030100434000040= (0 is empty) with solutions \\boxed{4231132434122143}.

    Every puzzle has one solution. slip: how often the pupil is hasty in one row. The empty cells of that row
    then get the missing digits in random order, whatever stands in their columns and boxes.
    """
    rng = random.Random(f"sudoku {split} {seed}")
    grids = sudoku_grids()
    rows = {}  # by text
    while len(rows) < number:
        # With fewer clues, few puzzles would have only one solution.
        answer = rng.choice(grids)
        clues = rng.sample(range(16), rng.randint(6, 8))
        text = "".join(answer[i] if i in clues else "0" for i in range(16)) + "="
        if not is_of(split, text) or text in rows:
            continue
        if sum(all(grid[i] == answer[i] for i in clues) for grid in grids) > 1:
            continue  # more than one solution
        page = list(answer)
        row = 4 * rng.randrange(4)
        if rng.random() < slip:
            empty = [i for i in range(row, row + 4) if i not in clues]
            for i, digit in zip(empty, rng.sample([answer[i] for i in empty], len(empty))):
                page[i] = digit
        rows[text] = dict(problem=text, answer=answer, solution=f"\\boxed{{{''.join(page)}}}")
    return list(rows.values())


EMBEDDED = dict(arithmetic=arithmetic, sudoku=sudoku)
