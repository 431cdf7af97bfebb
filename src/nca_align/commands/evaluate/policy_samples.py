"""A policy's samples as `nca-align sample` and `score` wrote them: whether they tell its KL, and its token ids."""

from typing import Any

from datasets import Dataset

from ...batching.rendering import prompt_ids
from ...data.prompts import load_raw, text_of
from ...errors import UserError
from ...models.loading import model_fingerprint
from ...models.sampling import end_tokens
from ...store.provenance import read_provenance


def load_samples(name: str, policy: str) -> Dataset:
    """Scored samples, and a refusal of what a policy's KL can't be estimated from.

    Raises:
        UserError: no `rewards`, or samples that by the file's own record another model drew, not at temperature 1, or
            not all of them as they were sampled.
    """
    dataset = load_raw(name)
    for column in ("prompt", "completions", "rewards"):
        if column not in dataset.column_names:
            raise UserError(f"`dataset_name` {name} has no column `{column}`; give what `nca-align score` wrote")
    made = next((step for step in read_provenance(name) if step["command"] == "sample"), None)
    if made is not None:
        config = made["config"]
        if config["temperature"] != 1 or config["top_p"] != 1:
            raise UserError(
                f"`dataset_name` {name} was sampled at `temperature` {config['temperature']:g} and `top_p` "
                f"{config['top_p']:g}; a policy's KL needs samples of itself: draw them at 1 and 1"
            )
        for option, plain in (("stop", []), ("duplicates", "keep")):
            if config.get(option, plain) != plain:
                raise UserError(
                    f"`dataset_name` {name} was sampled with `{option}` {config[option]!r}; a policy's KL needs its "
                    "samples as it drew them, up to its own end and each as often as it came: sample without it"
                )
        weights = config["adapter"] or config["model"]
        if weights != model_fingerprint(policy) and config["engine"] != "server":
            raise UserError(
                f"`dataset_name` {name} was sampled from {made['about']['adapter'] or made['about']['model']}, whose "
                f"weights are not those of `model_name_or_path` {policy}; a policy's KL needs samples of itself"
            )
    return dataset


def end_token(model, tokenizer, chat: bool) -> int:
    """The token by which the policy ends a completion: sampling stops at those of its generation config.

    Of several (Gemma's are the end of the text and the end of a turn) it is, in a chat, the last that the chat template
    writes after an assistant's turn, and otherwise the tokenizer's EOS, or the first where that is none of them.
    """
    ends = end_tokens(model, tokenizer)
    if chat and len(ends) > 1:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        written = tokenizer.apply_chat_template(turns, return_dict=False)
        return next((token for token in reversed(written) if token in ends), ends[0])
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]


def sampled_ids(tokenizer, row: dict[str, Any], end: int) -> dict[str, Any]:
    """Token ids of a row of `nca-align sample`: of the prompt that was continued, and of each completion.

    A completion's ids are those of its text and, unless it was `truncated`, the token `end` by which it ended: what the
    policy drew, and nothing that a chat template writes after it.

    Returns:
        `prompt_ids`, `completion_ids`, and `rewards` where the row has them.
    """
    truncated = row.get("truncated") or [False] * len(row["completions"])
    completions = []
    for completion, cut in zip(row["completions"], truncated, strict=True):
        ids = tokenizer(text_of(completion), add_special_tokens=False)["input_ids"]
        completions.append(ids if cut and ids else [*ids, end])
    return {"prompt_ids": prompt_ids(tokenizer, row), "completion_ids": completions, "rewards": row["rewards"]}
