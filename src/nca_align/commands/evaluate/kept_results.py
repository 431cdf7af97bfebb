"""What `nca-align evaluate` keeps in `output`, so that a rerun computes nothing twice."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...store.files import check_writable, read_json, require_folder_of, write_json


class KeptResults(dict[str, Any]):
    """Results by what they are of, in a JSON file where `output` names one.

    Args:
        output: the file; None keeps nothing for another run.
        is_result: whether a value of the file is such a result.

    Raises:
        UserError: its folder does not exist, or the file holds something else.
    """

    def __init__(self, output: str | None, is_result: Callable[[Any], bool]):
        self._path = None if output is None else Path(output)
        if output is None or self._path is None:
            return
        require_folder_of(output)
        with suppress(OSError, ValueError, AttributeError):  # no file, a folder, broken JSON, a list
            known = read_json(self._path)
            if all(map(is_result, known.values())):
                self.update(known)
                return
        if self._path.exists():
            raise UserError(
                f"`output` is {output!r}, which holds no table of `nca-align evaluate`; choose another file"
            )

    def __setitem__(self, key: str, result: Any) -> None:
        super().__setitem__(key, result)
        if self._path is not None:  # after each result, and whole: a kill loses the one in work
            write_json(self._path, self)

    def check_writable(self) -> None:
        """Refuse a file that can't be written, before the work that it is for."""
        if self._path is not None:
            check_writable(self._path)
