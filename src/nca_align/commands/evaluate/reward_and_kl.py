"""Mean reward and KL of policies by samples that are scored already."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isnan
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...batching.rendering import prompt_ids
from ...data.cleaning import text_of
from ...data.prompts import load_raw
from ...errors import UserError
from ...evaluation.evaluator import (
    GenerationMetrics,
    estimates,
    generation_metrics,
    over_common_prompts,
    rewards_by_prompt,
    win_rate,
)
from ...evaluation.intervals import UNKNOWN, Estimate
from ...models.loading import ModelSource, model_fingerprint
from ...models.logprobs import completion_logps, differences
from ...models.sampling import end_tokens
from ...options import Dtype, dtype_option, option, require_at_least_1
from ...pages.terminal import print_rows
from ...store.fingerprints import data_fingerprint
from ...store.provenance import read_provenance
from .kept_results import KeptResults
from .references import check_vocabulary


@dataclass
class EvaluateOptions:
    """Options of `nca-align evaluate`."""

    dataset_name: list[str] = option("a file of samples that `nca-align score` wrote; may repeat", action="extend")
    model_name_or_path: list[str] = option(
        "the policy that was sampled for each file: a model, or an adapter's folder; may repeat", action="extend"
    )
    reference: str = option("the model that the KL is measured from")
    output: str | None = option("JSON file of the table; lines that it has already are not computed again", None)
    dtype: Dtype = dtype_option()
    trust_remote_code: bool = option("run code that comes with a model", False)
    batch_size: int = option("completions a batch", 16)

    def __post_init__(self):
        if len(self.dataset_name) != len(self.model_name_or_path):
            raise UserError(
                f"`dataset_name` is given {len(self.dataset_name)} times and `model_name_or_path` "
                f"{len(self.model_name_or_path)} times; name the policy of each file"
            )
        if not self.dataset_name:
            raise UserError("`dataset_name` is missing; give a file of samples that `nca-align score` wrote")
        require_at_least_1(self, "batch_size")


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
                f"{config['top_p']:g}. A policy's KL needs samples of the policy itself: draw them at 1 and 1."
            )
        for option, plain in (("stop", []), ("duplicates", "keep")):
            if config.get(option, plain) != plain:
                raise UserError(
                    f"`dataset_name` {name} was sampled with `{option}` {config[option]!r}. A policy's KL needs its "
                    "samples as it drew them: up to its own end, and each as often as it came. Sample without it."
                )
        weights = config["adapter"] or config["model"]
        if weights != model_fingerprint(policy) and config["engine"] != "server":
            raise UserError(
                f"`dataset_name` {name} was sampled from {made['about']['adapter'] or made['about']['model']}, whose "
                f"weights are not those of `model_name_or_path` {policy}. A policy's KL needs samples of the policy "
                "itself. Name the model that they were sampled from, or sample anew."
            )
    return dataset


def end_token(model, tokenizer, chat: bool) -> int:
    """The token by which the policy ends a completion: sampling stops at those of its generation config.

    There may be several: Gemma's are the end of the text and the end of a turn. In a chat it is then the last that the
    chat template writes after an assistant's turn. Otherwise it is the tokenizer's EOS, or the first of them.
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


@dataclass(frozen=True, kw_only=True)
class PolicyMetrics(GenerationMetrics):
    """One line of the table: the policy's name, and its metrics."""

    policy: str


def evaluate_samples(dataset: Dataset, policy: str, reference: str, options: EvaluateOptions) -> PolicyMetrics:
    """Mean reward of a policy's samples, and from the same samples how far it went from the reference.

        KL(π ‖ π_ref) ≈ mean of log π(y|x) − log π_ref(y|x),   y sampled from π at temperature 1 and top-p 1

    Without bias, but noisy: a single sample's difference may well be negative.

    Args:
        dataset: `prompt`, `completions`, `rewards`, and `truncated` where `nca-align sample` wrote it.
        policy, reference: models or adapters.
        options: for `batch_size`, `dtype`, `trust_remote_code`.
    """
    sampled = ModelSource.of(policy, trust_remote_code=options.trust_remote_code)
    before = ModelSource.of(reference, key="reference", trust_remote_code=options.trust_remote_code)
    check_vocabulary(sampled, before)
    tokenizer, model = sampled.load_tokenizer(), sampled.load_policy(options.dtype)
    end = end_token(model, tokenizer, chat=not isinstance(dataset[0]["prompt"], str))
    rows = [sampled_ids(tokenizer, row, end) for row in dataset]
    ref_logps = logps = completion_logps(model, rows, options.batch_size)
    if reference != policy:
        del model  # one at a time: two large models may not fit
        ref_logps = completion_logps(before.load_policy(options.dtype), rows, options.batch_size)
    answers = [
        {
            "rewards": row["rewards"],
            "kl": nats,
            "tokens": [len(ids) for ids in tokens["completion_ids"]],
            "texts": list(map(text_of, row["completions"])),
            "cut": row.get("truncated") or [False],
        }
        for row, tokens, nats in zip(dataset, rows, differences(logps, ref_logps), strict=True)
    ]
    return PolicyMetrics(policy=Path(policy).name, **generation_metrics(answers), win_rate=UNKNOWN)


def _is_line(entry: Any) -> bool:
    return isinstance(entry, dict) and set(entry) == {each.name for each in fields(PolicyMetrics)}


def evaluate(options: EvaluateOptions) -> list[PolicyMetrics]:
    """The table's lines, in the order of `dataset_name`; those that `output` holds already are taken from it.

    Wins are over the reference's own samples, where one of the files holds them.
    """
    known = KeptResults(options.output, _is_line)
    reference = model_fingerprint(options.reference)
    given = list(zip(options.dataset_name, options.model_name_or_path, strict=True))
    weights = {policy: model_fingerprint(policy) for _, policy in given}
    datasets = [load_samples(name, policy) for name, policy in given]
    rewards = [rewards_by_prompt(dataset) for dataset in datasets]
    of_reference = next(
        (own for own, (_, policy) in zip(rewards, given, strict=True) if weights[policy] == reference), {}
    )
    lines = []
    for (_, policy), dataset, own in zip(given, datasets, rewards, strict=True):
        key = " ".join((data_fingerprint(dataset), str(weights[policy]), str(reference), options.dtype))
        if key in known:
            before = known[key]
            line = PolicyMetrics(**{**before, **{name: Estimate(*before[name]) for name in estimates(PolicyMetrics)}})
        else:
            known.check_writable()
            line = evaluate_samples(dataset, policy, options.reference, options)
        lines.append(replace(line, win_rate=over_common_prompts(win_rate, own, of_reference)[0]))
        known[key] = asdict(lines[-1])
    return lines


def print_policies(lines: Sequence[PolicyMetrics]) -> None:
    """The table, for a terminal of 80 columns, and how many answers it is of."""
    rows = []
    for line in lines:
        wins = "–" if isnan(line.win_rate.mean) else line.win_rate.text(".0%").replace("%", "")
        metrics = f"{line.tokens.mean:.0f}", line.reward.text(), line.kl.text(".2f"), wins, f"{line.distinct_2:.2f}"
        rows.append((line.policy, *metrics))
    print_rows(("policy", "tokens", "mean reward", "KL, nats", "wins, %", "distinct-2"), rows)
    counts = {line.policy: f"{line.completions} answers to {line.prompts} prompts" for line in lines}
    alike = len({*counts.values()}) == 1
    for text in [next(iter(counts.values()))] if alike else [f"{policy}: {n}" for policy, n in counts.items()]:
        print(text)
