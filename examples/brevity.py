"""A scorer of one's own, for `nca-align score --scorer examples.brevity:score`: short answers that come to an end."""


def score(prompts: list, completions: list, **columns: list) -> list[float]:
    """One reward a completion: 1 less a hundredth a word, and half of it where no full stop ends it.

    Args:
        prompts: one for each completion, text or messages.
        completions: texts, or lists of messages.
        **columns: the rows' other columns, which don't count here.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [(1 - len(text.split()) / 100) * (1 if text.rstrip().endswith((".", "!", "?")) else 0.5) for text in texts]
