"""plumbing/packing.py - training rows as micro-batches.

model.pad is the definition: every row is padded to the longest. `pack` is its fast twin for a GPU: rows stand
end to end in one long row, and their document numbers keep them apart. With both, the network computes the
same numbers for every target.
"""

import itertools

from model import Row, fill_rows, pad
from plumbing import flags, parallel

WARNED = []  # losses of which it was said that they see parts


def pack(rows, pad_id, device, multiple):
    """Twin of model.pad: all rows stand end to end in one row, which is padded to one of a few lengths.

    Kernels are compiled anew for each length, so only a few lengths are used. Short ones are multiples of
    `multiple`. Longer ones are a power of two times 5, 6, 7 or 8. If `multiple` is 512, they are 512, 1024,
    ..., 4096, then 5120, 6144, 7168, 8192, then 10240 and so on. If all rows together have more than
    3 * `multiple` tokens, at most a quarter of the packed row is padding.
    """
    *starts, total = itertools.accumulate((len(row.tokens) for row in rows), initial=0)
    size = max(multiple, 1 << max(0, (total - 1).bit_length() - 3))
    return fill_rows(rows, starts, (1, -(-total // size) * size), pad_id, device)


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
    they are packed, rows are padded to the longest of their list. An item also begins a new list where the
    old one would become wasteful. That means more than 512 tokens, padding included, and more than one
    padding token for 32 others.
    """
    groups = []
    num_rows = 0  # of the group being filled
    num_tokens = 0  # of the group being filled, without padding
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


def dealt_batches(rows_of_each, compute, model, loss=None, size=1):
    """This process's lists of rows -> its micro-batches, and the number of targets on all processes.

    rows_of_each: a list of rows for each response. size: how many neighbouring responses should stay in one
    micro-batch. loss: of the policy.

    To be called on every process. Sharded layers (FSDP2) gather their weights from all processes, in forward
    and backward. A process that stopped early would leave the others waiting for ever. So a process with
    fewer micro-batches gets dummies: one padding token, no targets, a loss of 0. If no process has any row,
    each gets one dummy.
    """
    units = [sum(rows_of_each[start:start + size], []) for start in range(0, len(rows_of_each), size)]
    parts = micro_batches(units, compute, model)
    lengths = [[len(row.tokens) for row in rows] for rows in units if len(rows) > 1]
    sizes = [sum(rows) if compute.is_packed else max(rows) * len(rows) for rows in lengths]  # in tokens
    num_targets = sum(len(part.targets.token) for part in parts)
    counts = parallel.gather([(len(parts), num_targets, max(sizes, default=0))])
    numbers, num_targets, largest = zip(*counts)  # of every process
    needs_whole = loss is not None and any(
        flags.declares(loss, name) for name in ("num_groups", "num_responses"))
    if needs_whole and max(largest) > compute.max_tokens and loss not in WARNED:
        WARNED.append(loss)
        parallel.say(f"WARNING: a response or a group has {max(largest)} tokens, more than a micro-batch. A "
                     "loss that compares its tokens sees parts of it: raise --tokens_per_micro_batch")
    row = Row(tokens=[model.config.pad_id], position=[0], block=[0], view=[1])
    dummies = [pad([row], model.config.pad_id, model.device) for _ in range(max(1, *numbers) - len(parts))]
    return parts + dummies, sum(num_targets)
