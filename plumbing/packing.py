"""plumbing/packing.py - training rows as micro-batches.

`pad` is the definition: every row is padded to the longest. `pack` is its fast twin for a GPU: rows stand end
to end in one long row, and their document numbers keep them apart. With both, the network computes the same
numbers for every target.
"""

import itertools

import torch

from model import Layout, Row, Rows, Targets
from plumbing import parallel


def pad(rows, pad_id, device):
    """Rows as lists -> one micro-batch on a device, each row padded to the longest."""
    longest = max(len(row.tokens) for row in rows)
    starts = [number * longest for number in range(len(rows))]
    return fill(rows, starts, (len(rows), longest), pad_id, device)


def pack(rows, pad_id, device, multiple):
    """Twin of `pad`: all rows stand end to end in one row, which is padded to one of a few lengths.

    Kernels are compiled anew for each length. Short lengths are multiples of `multiple`. If it is 512, the
    first eight are multiples of 512. From there on, four lengths lie in each doubling: 5120, 6144, 7168,
    8192, then 10240 and so on. So if the rows need more than three multiples, at most a quarter is padding.
    """
    *starts, total = itertools.accumulate((len(row.tokens) for row in rows), initial=0)
    size = max(multiple, 1 << max(0, (total - 1).bit_length() - 3))
    return fill(rows, starts, (1, -(-total // size) * size), pad_id, device)


def fill(rows, starts, shape, pad_id, device):
    """A micro-batch of a shape (B, T) in which row n begins at place starts[n] of the B * T tokens."""
    size = shape[0] * shape[1]
    # Padding belongs to document -1. Each padding token has a view of its own, so it sees itself only. If it
    # saw nothing, its output would be NaN.
    columns = dict(tokens=[pad_id] * size, position=[0] * size, document=[-1] * size, block=[0] * size,
                   view=list(range(1, size + 1)))
    targets = []
    for number, (row, start) in enumerate(zip(rows, starts)):
        stop = start + len(row.tokens)
        for name in ("tokens", "position", "block", "view"):
            columns[name][start:stop] = getattr(row, name)
        columns["document"][start:stop] = [number] * len(row.tokens)
        targets += [target._replace(logit_index=start + target.logit_index) for target in row.targets]
    tokens, *layout = (torch.tensor(column, device=device).view(shape) for column in columns.values())
    numbers = zip(*targets) if targets else [()] * len(Targets._fields)
    dtypes = [torch.int64 if name in WHOLE else torch.float32 for name in Targets._fields]
    return Rows(tokens, Layout(*layout), Targets(*(
        torch.tensor(column, dtype=dtype, device=device) for column, dtype in zip(numbers, dtypes))))


# int64 fields of Targets
WHOLE = ("logit_index", "token", "rollout_index", "response_index", "step", "view", "group")


def micro_batches(units, compute, model):
    """Lists of rows -> micro-batches of at most compute.max_tokens tokens, or of one longer row.

    They are on the model's device. units: lists of rows. The rows of one list stay in one micro-batch if they
    fit into it, padding included. A loss may then look at a whole response, or at a whole group.
    """
    pieces = []
    for rows in units:
        longest = max((len(row.tokens) for row in rows), default=1)
        fitting = max(1, compute.max_tokens // longest)  # rows that fit into one micro-batch
        if compute.is_packed and sum(len(row.tokens) for row in rows) <= compute.max_tokens:
            fitting = len(rows) or 1  # all of them: nothing is padded to the longest
        pieces += [rows[start:start + fitting] for start in range(0, len(rows), fitting)]
    sizes = [(max(len(row.tokens) for row in rows), len(rows)) for rows in pieces]
    if compute.is_packed:  # a piece is one long row
        sizes = [(sum(len(row.tokens) for row in rows), 1) for rows in pieces]
    parts = []
    for group in by_length(sizes, compute.max_tokens, compute.is_packed):
        rows = [row for number in group for row in pieces[number]]
        if compute.is_packed:
            multiple = -(-compute.max_tokens // 512) * 128  # a quarter of max_tokens, in whole tiles of 128
            parts.append(pack(rows, model.config.pad_id, model.device, multiple))
        else:
            parts.append(pad(rows, model.config.pad_id, model.device))
    return parts


def by_length(sizes, max_tokens, is_packed=False):
    """Puts items of similar length together, for forwards of at most max_tokens tokens, or of one item.

    sizes: (length of a row, number of rows) of each item -> lists of item numbers, short ones first. Unless
    they are packed, rows are padded to the longest of their list. A list of more than 512 tokens ends early
    if the padding would be more than a thirty-second of its tokens.
    """
    groups = []
    num_rows = 0  # of the group being filled
    num_tokens = 0  # the same, without padding
    for item in sorted(range(len(sizes)), key=lambda item: sizes[item][0]):
        length, count = sizes[item]
        num_rows += count
        num_tokens += count * length
        padded = num_tokens if is_packed else num_rows * length  # this item is the longest so far
        is_wasteful = padded > 512 and padded - num_tokens > num_tokens / 32
        if not groups or padded > max_tokens or is_wasteful:
            groups.append([])
            num_rows = count
            num_tokens = count * length
        groups[-1].append(item)
    return groups


def dealt_batches(units, compute, model):
    """This process's lists of rows -> its micro-batches, and the number of targets on all processes.

    To be called on every process. Sharded layers (FSDP2) gather their weights from all processes, in forward
    and backward. A process that stopped early would leave the others waiting for ever. So a process with
    fewer micro-batches gets dummies: one padding token, no targets, a loss of 0. If no process has any
    row, each gets one dummy.
    """
    parts = micro_batches(units, compute, model)
    num_targets = torch.tensor(sum(len(part.targets.token) for part in parts), device=model.device)
    most = max(1, int(parallel.largest(torch.tensor(len(parts), device=model.device))))
    row = Row(tokens=[model.config.pad_id], position=[0], block=[0], view=[1])
    dummies = [pad([row], model.config.pad_id, model.device) for _ in range(most - len(parts))]
    return parts + dummies, int(parallel.add_up(num_targets))
