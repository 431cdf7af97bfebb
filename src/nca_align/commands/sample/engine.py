"""What completes prompts: the options and the protocol that engines share, and the loading of what they run.

An engine is a function `(shard, first_row, rows, advance) -> [[Sample, …], …]`, K samples for each row; it calls
`advance(n)` when n more rows are done. It draws its random numbers from the run's seed and the place of the work alone,
so a run that was interrupted gives the same samples. `temperature` and `seed` are read from the options at every call.
"""

from collections.abc import Callable
from typing import NamedTuple

from ...errors import UserError
from ...store.shards import Advance


class RowsFailed(UserError):
    """Rows of a shard can't be completed; the samples of the others are here."""

    def __init__(self, samples: list[list["Sample"]], failed: dict[int, str]):
        row, why = next(iter(failed.items()))
        super().__init__(f"row {row}: {why}")
        self.samples = samples  # one list a row of the shard, empty where it failed
        self.failed = failed  # by the row's number in the data set


class Sample(NamedTuple):
    """One completion's text, and whether it was cut at `max_new_tokens`."""

    text: str
    truncated: bool


Engine = Callable[[int, int, list[dict], Advance], list[list[Sample]]]


def place(
    fit: list[int], done: list[list[Sample]], failed: dict[int, str], first_row: int, n: int
) -> list[list[Sample]]:
    """The samples of a shard's n rows, in order.

    Raises:
        RowsFailed: some rows failed.
    """
    samples: list[list[Sample]] = [[] for _ in range(n)]
    for i, many in zip(fit, done, strict=True):
        samples[i] = many
    if failed:
        raise RowsFailed(samples, {first_row + i: why for i, why in sorted(failed.items())})
    return samples


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
