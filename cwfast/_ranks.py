"""What ranks tell one another besides the tensors themselves: a few numbers, one failure."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist


def gather_rows(rows: Sequence[Sequence[int]], group: dist.ProcessGroup | None, columns: int = 5) -> list[list[int]]:
    """The rows of int64 of all ranks, by rank."""
    device, ranks = device_of(group), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    mine = torch.zeros(longest, columns, dtype=torch.int64, device=device)
    if rows:
        mine[: len(rows)] = torch.tensor(rows, dtype=torch.int64)
    tables = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(tables, mine, group=group)
    return [row for table, size in zip(tables, sizes, strict=True) for row in table[: int(size)].tolist()]


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where this group's messages lie."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def total(count: int, group: dist.ProcessGroup | None) -> int:
    """The sum of all ranks' counts."""
    return sum(row[0] for row in gather_rows([[count]], group, columns=1))


def all_raise(error: Exception | None, what: str, groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Raise on every rank if one has an error; all ranks wait for one another here.

    Args:
        error: this rank's, or None.
        what: who must succeed, for the message on the others.
        groups: of a mesh's dimensions, which together hold all ranks.

    Raises:
        Exception: the rank's own error.
        RuntimeError: another rank has one.
    """
    failed = error is not None
    for group in groups:  # all of them, before anyone leaves
        failed = total(failed, group) > 0
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{what} must succeed on every rank; it failed on another one, whose error says why")
