"""Example scorers for `nca-align score --scorer nca_align.scorers:NAME`, each a reward function as TRL takes them."""

import re
from functools import cache

from .data.cleaning import text_of
from .errors import UserError


def vader(completions: list, **kwargs) -> list[float]:
    """VADER's compound sentiment of each completion: −1 is the most negative, 1 the most positive.

    Args:
        completions: texts, or lists of messages.
        **kwargs: prompts and other columns, which don't count.

    Returns:
        One float in [−1, 1] a completion.

    Source:
        Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
    """
    return [_analyzer().polarity_scores(text_of(completion))["compound"] for completion in completions]


def within_words(prompts: list, completions: list, **kwargs) -> list[float | None]:
    """Whether an answer keeps to the "at most N words" that its prompt asks for, graded, so that it can be checked.

        1 for 3 to N words; (words)/3 below, max(0, 1 − (words − N)/N) above

    Args:
        prompts, completions: texts, or lists of messages, whose last one asks.
        **kwargs: other columns, which don't count.

    Returns:
        One float in [0, 1] a completion, None where its prompt asks for no number of words.
    """
    rewards: list[float | None] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = _AT_MOST.search(text_of(prompt))
        if asked is None:
            rewards.append(None)
            continue
        limit, words = int(asked[1]), len(text_of(completion).split())
        rewards.append(max(0.0, min(words / _FEWEST, 1.0, 1 - (words - limit) / limit)))
    return rewards


_AT_MOST = re.compile(r"at most (\d+) words")
_FEWEST = 3


@cache
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "`scorer` nca_align.scorers:vader needs the package vaderSentiment: pip install vaderSentiment"
        ) from error
    return SentimentIntensityAnalyzer()
