"""plumbing/packing.py - training rows as micro-batches: padded on a CPU, packed end to end on a GPU."""

import torch

from model import TARGET_DTYPES, Layout, Row, Rows, Targets
from plumbing import parallel


def by_length(sizes, max_tokens, is_packed=False):
    """Groups items for forwards of at most max_tokens tokens (or one item), like lengths together.

    sizes: (length of a row, number of rows) of each item -> lists of item numbers, short ones first. Unless
    packed, rows are padded to the longest of their group; a group ends early where that would waste a
    thirty-second of it.
    """
    # num_rows, num_tokens: of the group being filled, without padding
    groups, num_rows, num_tokens = [], 0, 0
    for item in sorted(range(len(sizes)), key=lambda item: sizes[item][0]):
        length, count = sizes[item]
        num_rows, num_tokens = num_rows + count, num_tokens + count * length
        padded = num_tokens if is_packed else num_rows * length  # the longest so far is this one
        is_wasteful = padded > 512 and padded - num_tokens > num_tokens / 32
        if not groups or padded > max_tokens or is_wasteful:
            groups.append([])
            num_rows, num_tokens = count, count * length
        groups[-1].append(item)
    return groups


def collate(rows, pad_id, multiple=None):
    """Rows as lists -> tensors (Rows): each row padded to the longest; or, with
    `multiple`, all end to end in one row.

    multiple: the one row is padded to a multiple of so many tokens, so that kernels are compiled for few
    lengths; the texts in it are kept apart by their document numbers. Padding is of document -1, and each
    padding token has a view of its own and sees only itself: a token that sees nothing would be NaN.
    """
    lengths = [len(row.tokens) for row in rows]
    is_packed = multiple is not None
    if is_packed:  # few lengths up to the budget, of which `multiple` is a quarter, and few beyond it
        size = multiple if sum(lengths) <= 4 * multiple else 4 * multiple
    T = -(-sum(lengths) // size) * size if is_packed else max(lengths)
    B, used = (1 if is_packed else len(rows)), 0
    size = B * T
    # Start with padding everywhere, then write each row over it.
    fields = dict(tokens=[pad_id] * size, position=[0] * size, document=[-1] * size, block=[0] * size,
                  view=list(range(1, size + 1)))
    targets = []
    for number, row in enumerate(rows):
        start = used if is_packed else number * T  # where this row begins among all B * T tokens
        stop = start + lengths[number]
        for name in ("tokens", "position", "block", "view"):
            fields[name][start:stop] = getattr(row, name)
        fields["document"][start:stop] = [number] * lengths[number]
        # from a place in the row to a place in the flattened batch
        targets += [(start + logit_index, *rest) for logit_index, *rest in row.targets]
        used = stop  # packed: the next row begins here
    tokens, *layout = (torch.tensor(values).view(B, T) for values in fields.values())
    columns = list(zip(*targets)) or [()] * len(TARGET_DTYPES)
    tensors = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, TARGET_DTYPES)]
    return Rows(tokens, Layout(*layout), Targets(*tensors))


def to_device(rows, device):
    """The same micro-batch on another device."""
    move = lambda tensor: tensor.to(device, non_blocking=True)
    return Rows(move(rows.tokens), Layout(*map(move, rows.layout)), Targets(*map(move, rows.targets)))


def micro_batches(built, max_tokens, pad_id, device, is_packed=None):
    """What build_rows gives -> micro-batches on `device`, of max_tokens tokens at most.

    Rows of one response stay in one micro-batch where they fit, so that a loss may look at whole responses.
    On a GPU rows are packed end to end, since FlexAttention skips what lies between documents.
    """
    is_packed = device.type == "cuda" if is_packed is None else is_packed
    multiple = -(-max_tokens // 512) * 128 if is_packed else None
    # A full-attention response whose rows do not fit together is cut; all others stay whole.
    pieces = []
    for rows in built:
        fitting = max(1, max_tokens // len(rows[0].tokens)) if rows else 1
        pieces += [rows[start:start + fitting] for start in range(0, len(rows), fitting)]
    groups = by_length([(len(rows[0].tokens), len(rows)) for rows in pieces], max_tokens, is_packed)
    parts = [collate([row for item in group for row in pieces[item]], pad_id, multiple) for group in groups]
    return [to_device(part, device) for part in parts]


def count_targets(parts):
    """Targets of this process's micro-batches."""
    return sum(len(rows.targets.token) for rows in parts)


def write_back(rollouts, name, parts, numbers):
    """Gives rollouts their numbers: a list `name` over the response, 0 where a token is no target."""
    for r in rollouts:
        setattr(r, name, [0.0] * len(r.response))
    for rows, column in zip(parts, numbers):
        places = zip(rows.targets.rollout_index.tolist(), rows.targets.response_index.tolist())
        for (i, j), number in zip(places, column.tolist()):
            getattr(rollouts[i], name)[j] = number


def warn_of_cuts(built, max_tokens):
    """Says so where a response's rows (full attention) do not fit into one micro-batch: a loss of the user's
    own might look at whole responses."""
    longest = max((len(rows) * len(rows[0].tokens) for rows in built if rows), default=0)
    if longest > max_tokens and len(max(built, key=len)) > 1:
        parallel.say(f"WARNING: the rows of a response ({longest} tokens) go into several micro-batches: a "
                     f"--loss that looks at whole responses needs --tokens_per_micro_batch {longest}")


def with_dummies(parts, pad_id, device):
    """This process's micro-batches, and dummies, so that every process has as many.

    Sharded layers (FSDP2) gather their weights from all processes, in forward and backward: a process that
    stopped early would leave the others waiting for ever. So one with fewer micro-batches runs dummies: one
    padding token, no targets, a loss of 0 and gradients of 0. To be called on every process.
    """
    # A question to all processes: who has the most?
    most = int(parallel.largest(torch.tensor(len(parts), device=device)))
    dummy = collate([Row(tokens=[pad_id], position=[0], block=[0], view=[1])], pad_id)
    return parts + [to_device(dummy, device) for _ in range(most - len(parts))]
