"""Example scorers for `nca-align score --scorer nca_align.scorers:NAME`, each a reward function as TRL takes them."""

from functools import cache

from .errors import UserError
from .prompts import text_of


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


@cache
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "`scorer` nca_align.scorers:vader needs the package vaderSentiment: pip install vaderSentiment"
        ) from error
    return SentimentIntensityAnalyzer()
