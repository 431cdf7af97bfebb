"""Which tokens of a completion of several turns the model wrote: its own turns with their ends, and nothing else.

A tool's result, a user's turn and the header of a later assistant's turn are context. Where a turn begins and ends
comes from the `{% generation %}` marks of the chat template, or of the training template that TRL has in its place.
Else it comes from rendering the conversation up to each turn, with and without it, compared where tokens end. White
space that a template writes behind the end token of a turn that others follow is context, too. What follows the last
turn counts, as it does for a completion of one turn.
"""

import itertools
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError
from trl import get_training_chat_template
from trl.data_utils import common_prefix_length

from ..data.cleaning import Prompt, joined_messages
from ..data.messages import CONTEXT
from ..errors import InvalidRowError
from .left_out import THINK_TAG, shared_length
from .rendering import apply_template, text_ids

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


@dataclass(frozen=True)
class TurnTemplate:
    """How a tokenizer's conversations with completions of several turns are rendered.

    Args:
        template: in place of the tokenizer's own; None for that.
        marked: whether it marks the tokens that the model writes.
    """

    template: str | None
    marked: bool


def turn_template(tokenizer) -> TurnTemplate:
    """The tokenizer's own template where it marks its turns, TRL's training template where there is one, else its own.

    A training template renders a turn alike whatever follows, and keeps the reasoning of earlier turns.
    """
    if tokenizer.chat_template is None:
        return TurnTemplate(None, False)
    own = tokenizer.get_chat_template()
    if _MARK.search(own):
        return TurnTemplate(None, tokenizer.is_fast)
    try:
        training = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, TemplateError):  # one that TRL has no training template for
        return TurnTemplate(None, False)
    return TurnTemplate(training, tokenizer.is_fast and training is not None and bool(_MARK.search(training)))


def written_mask(
    tokenizer, turns: TurnTemplate, prompt: Prompt, completion: list, text: str, ids: list[int], boundary: int
) -> list[int]:
    """Of each of `ids` behind the prompt, 1 where the model wrote it, else 0.

    Args:
        turns: `turn_template` of the tokenizer.
        prompt, completion: of messages.
        text, ids: the whole conversation.
        boundary: tokens of the prompt.

    Raises:
        InvalidRowError: the template marks only a part of a turn, or renders a turn in another way once others follow
            it; or no token is the model's.
    """
    messages = joined_messages(prompt, completion)
    first = len(messages) - len(completion)
    conversation = _Conversation(tokenizer, turns.template, prompt, messages, text, ids)
    own = [j for j in range(first, len(messages)) if messages[j].get("role") not in CONTEXT]
    # the prompt ends within the first turn, or the marks tell where that one begins
    opened = prompt.continues or turns.marked
    starts = [boundary if j == first and opened else conversation.header_end(j) for j in own]
    ends = [len(ids) if j == len(messages) - 1 else conversation.turn_end(j) for j in own]
    for j, start, end, before in zip(own, starts, ends, [boundary, *ends], strict=False):
        if start < 0:
            raise InvalidRowError(
                f"turn {j - first} does not follow what the chat template renders before it, with the generation "
                "prompt at its end. So where the model's words begin is unknown. Use a template whose assistant turns "
                "begin with its generation prompt, such as one of TRL's training templates",
                cause="turn that can't be told apart",
            )
        if start < before or (start >= end and not (turns.marked and end == 0)):
            raise InvalidRowError(
                f"turn {j - first} is rendered differently once other turns follow it, so where it begins or ends is "
                "unknown. Use a template that renders each turn alike, such as one of TRL's training templates",
                cause="turn that can't be told apart",
            )
    spans = list(zip(starts, ends, strict=True))
    if turns.marked and spans:
        spans = conversation.marked([j - first for j in own], spans)
    mask = [0] * len(ids)
    for start, end in spans:
        mask[start:end] = [1] * (end - start)
    if not any(mask[boundary:]):
        raise InvalidRowError(
            "has no turn of the assistant, so there is nothing to train on; leave it out",
            cause="nothing to train on",
        )
    return mask[boundary:]


class _Conversation:
    """One conversation as it is rendered and tokenised: `messages`, which are `text`, whose tokens are `ids`."""

    def __init__(self, tokenizer, template: str | None, prompt: Prompt, messages: list, text: str, ids: list[int]):
        self.tokenizer, self.messages, self.text, self.ids = tokenizer, messages, text, ids
        self.render = partial(apply_template, tokenizer, prompt, template=template)
        special = {token: str(about) for token, about in tokenizer.added_tokens_decoder.items() if about.special}
        self.special = set(special)
        self.special_text = re.compile("|".join(map(re.escape, special.values())) or "(?!)")
        # where each token ends in the text: tokenising each beginning would take time by the square of the turns
        self.token_ends: list[int] | None = None
        if tokenizer.is_fast:
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            self.token_ends = [end for _, end in found["offset_mapping"]]

    def _shared(self, j: int, **opening: Any) -> tuple[str, int, str]:
        """The first `j` messages' text, with how many tokens of it the whole begins, and the text behind these."""
        text = self.render(self.messages[:j], **opening)
        if self.token_ends is None:
            (own,) = text_ids(self.tokenizer, [text], [False])
            shared = common_prefix_length(own, self.ids)
            return text, shared, self.tokenizer.decode(own[shared:])
        shared = bisect_right(self.token_ends, shared_length(text, self.text))
        return text, shared, text[self.token_ends[shared - 1] if shared else 0 :]

    def _is_text(self, text: str) -> bool:
        """Whether there is more than special tokens, white space and the tags around a thought."""
        return bool(THINK_TAG.sub("", self.special_text.sub("", text)).strip())

    def _end(self, end: int) -> int:
        """Where what ends at `end` ends without the white space that follows an end token."""
        last = next((i for i in range(end - 1, -1, -1) if self.ids[i] in self.special), None)
        behind = self.ids[end if last is None else last + 1 : end]
        return end if last is None or self._is_text(self.tokenizer.decode(behind)) else last + 1

    def header_end(self, j: int) -> int:
        """Where the header of turn `j` ends and what the model writes begins; -1 where it isn't the prompt's to it."""
        text, shared, rest = self._shared(j, add_generation_prompt=True)
        # a token may hold the header's last letter and the turn's first one
        return shared if self.text.startswith(text) or not self._is_text(rest) else -1

    def turn_end(self, j: int) -> int:
        """Behind the end token of turn `j`, which others follow; 0 where it is rendered otherwise before they do."""
        _, shared, rest = self._shared(j + 1)
        if self._is_text(rest):
            return 0
        end = self._end(shared)
        # a conversation's last turn may end in another token than the others
        swapped = self.special_text.match(rest) and self.ids[end - 1] not in self.special
        return end + 1 if swapped and self.ids[end] in self.special else end

    def marked(self, turns: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The `spans` of the `turns` from where the template marks them; an end of 0 becomes that of the mark.

        Raises:
            InvalidRowError: a turn isn't marked, or not all of it.
        """
        how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self.render(self.messages, **how)
        if found["input_ids"] != self.ids:
            raise InvalidRowError(
                "gives other tokens when its turns are marked; please report this",
                cause="turn that can't be told apart",
            )
        marks = found["assistant_masks"]
        marked = []
        following = [start for start, _ in spans[1:]] + [len(self.ids) + 1]
        for turn, (start, end), limit in zip(turns, spans, following, strict=True):
            end = end or self._mark_end(marks, start, limit)
            begin = next((i for i in range(start, end) if marks[i]), end)
            left_out = [self.ids[i] for i in range(start, end) if not marks[i]]
            if begin == end or self._is_text(self.tokenizer.decode(left_out)):
                raise InvalidRowError(
                    f"turn {turn} is not wholly within the `{{% generation %}}` marks of the chat template. A template "
                    "may mark the content and leave out a call. Put the marks around all that the model writes in a "
                    "turn",
                    cause="turn outside of the marks",
                )
            marked.append((begin, end))
        return marked

    def _mark_end(self, marks: Sequence[int], start: int, limit: int) -> int:
        """Behind the last mark that ends between `start` and `limit`, and its end token; `start` if unclear."""
        edges = (i + 1 for i, (a, b) in enumerate(itertools.pairwise([*marks, 0])) if a and not b)
        end = self._end(max((edge for edge in edges if start < edge < limit), default=start))
        closing = self.ids[self._end(len(self.ids)) - 1]
        if closing not in self.special or self.ids[end - 1] in self.special:
            return max(start, end)
        return end + 1 if self.ids[end : end + 1] == [closing] else start
