"""What `--scorer` names: a function, a classifier or a reward model."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..models.loading import model_fingerprint
from ..store.fingerprints import source_fingerprint
from .reward_functions import find_function, function_scorer
from .reward_models import Scorer, check_config, model_scorer


@dataclass(frozen=True)
class ScorerSpec:
    """One scorer, as it was named and not yet opened.

    Args:
        kind: a Python function of TRL's reward-function signature, a text classifier, or a reward model.
        name: `module:function`, or the model's folder or id.
        label: of a classifier, whose probability is the score.
        given: the function, where it was handed over itself.
    """

    kind: Literal["function", "classifier", "reward model"]
    name: str
    label: str | None = None
    given: Callable | None = None

    @classmethod
    def parse(cls, scorer: str | Callable) -> "ScorerSpec":
        """From `module:function`, `pipeline:MODEL:LABEL`, a reward model's name, or a function itself."""
        if not isinstance(scorer, str):
            function = getattr(scorer, "func", scorer)  # a partial's own
            name = f"{function.__module__}:{getattr(function, '__qualname__', 'scorer')}"
            return cls("function", name, given=scorer)
        if scorer.startswith("pipeline:"):
            model, _, label = scorer.removeprefix("pipeline:").partition(":")
            return cls("classifier", model, label or None)
        is_function = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", scorer)
        return cls("function" if is_function else "reward model", scorer)

    def function(self) -> Callable:
        """The function itself.

        Raises:
            UserError: it isn't there.
        """
        return self.given or find_function(self.name)

    def identity(self) -> str | None:
        """Its name, with a fingerprint of its weights where it is a model that is here."""
        if self.kind == "function":
            return self.name
        prefix = "pipeline" if self.kind == "classifier" else None
        return ":".join(filter(None, (prefix, model_fingerprint(self.name), self.label)))

    def fingerprint(self) -> str | None:
        """What changes with its weights or, of a function, with the file that it is written in."""
        return source_fingerprint(self.function()) if self.kind == "function" else self.identity()

    def check(self, trust_remote_code: bool = False) -> None:
        """Look for what `open` would open, without opening it, where much is to be computed before it.

        Raises:
            UserError: a function that isn't there, or a model whose configuration isn't there or says other outputs.
        """
        if self.kind == "function":
            self.function()
        else:
            check_config(self.name, self.label, self.kind == "classifier", trust_remote_code)

    def open(self, tokenizer: str | None, batch_size: int, dtype: str, trust_remote_code: bool) -> Scorer:
        """The scorer itself; the arguments are those of `ScoreOptions`.

        Raises:
            UserError: it isn't there, or is no scorer.
        """
        if self.kind == "function":
            return function_scorer(self.function(), self.name, tokenizer)
        return model_scorer(self.name, self.label, self.kind == "classifier", batch_size, dtype, trust_remote_code)


def column_names(specs: Sequence[ScorerSpec]) -> list[str]:
    """`score_NAME` for each scorer: its function, label or model, with a number where two are alike."""
    names: list[str] = []
    for spec in specs:
        last = spec.label or (spec.name.rpartition(":")[2] if spec.kind == "function" else spec.name)
        base = "score_" + re.sub(r"\W+", "_", os.path.basename(last.rstrip("/"))).strip("_")
        count = sum(name == base or re.fullmatch(re.escape(base) + r"_\d+", name) is not None for name in names)
        names.append(f"{base}_{count + 1}" if count else base)
    return names
