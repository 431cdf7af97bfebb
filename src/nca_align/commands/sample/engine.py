"""What completes prompts: the protocol that the engines on this machine and servers share."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, Protocol

from ...errors import InvalidRowError
from ...store.shards import Advance
from .options import SampleOptions


class Sample(NamedTuple):
    """One completion's text, and whether it was cut at `max_new_tokens`."""

    text: str
    truncated: bool


class Engine(Protocol):
    """Completes prompts with a model that it has loaded."""

    def __call__(
        self, sampling: SampleOptions, shard: int, rows: dict[int, dict], advance: Advance
    ) -> dict[int, list[Sample] | InvalidRowError]:
        """K samples of each row, or why there are none.

        The random numbers come from the seed, the shard and the rows' numbers alone, so that a run that was interrupted
        gives the same samples.

        Args:
            sampling: for K, `temperature`, `top_p`, `max_new_tokens`, `stop` and `seed`, which may differ from call to
                call; what the model was loaded by stays.
            shard: its number.
            rows: by their numbers in the data set.
            advance: called with n when n more rows are done.
        """


def returning_invalid(function: Callable) -> Callable:
    """`function` of a row, which returns an InvalidRowError instead of raising it: the other rows go on."""

    @wraps(function)
    def returning(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except InvalidRowError as error:
            return error

    return returning


def cut_at_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    starts = [start for start in (text.find(string) for string in stop) if start >= 0]
    return (text[: min(starts)], True) if starts else (text, False)
