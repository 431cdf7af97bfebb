"""`nca-align evaluate`: how far each policy went, in mean reward and in KL, by its own scored samples."""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from .arguments import parse
from .collator import RewardCollator
from .engines import from_pretrained, hide_loading, prompt_ids
from .errors import UserError, command
from .logprobs import add_token_logps
from .prompts import load_raw, text_of
from .provenance import data_fingerprint, read_provenance, weights_fingerprint
from .smollm2 import resolve_model


@dataclass
class EvaluateOptions:
    """Options of `nca-align evaluate`."""

    dataset_name: list[str] = field(
        metadata={"help": "a file of samples that `nca-align score` wrote; may repeat", "action": "extend"}
    )
    model_name_or_path: list[str] = field(
        metadata={"help": "the policy that was sampled for each file: a model, or an adapter's folder; may repeat",
                  "action": "extend"},
    )  # fmt: skip
    reference: str = field(metadata={"help": "the model that the KL is measured from"})
    output: str | None = field(
        default=None, metadata={"help": "JSON file of the table; lines that it has already are not computed again"}
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU, float32 on a CPU"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})
    batch_size: int = field(default=16, metadata={"help": "completions a batch"})

    def __post_init__(self):
        if len(self.dataset_name) != len(self.model_name_or_path):
            raise ValueError(
                f"`dataset_name` is given {len(self.dataset_name)} times and `model_name_or_path` "
                f"{len(self.model_name_or_path)} times; name the policy of each file"
            )
        if not self.dataset_name:
            raise ValueError("`dataset_name` is missing; give a file of samples that `nca-align score` wrote")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` is {self.batch_size}; it must be at least 1")


class Estimate(NamedTuple):
    """A mean over prompts and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Evaluation:
    """One line of the table.

    Args:
        policy: its name.
        prompts, completions: how many.
        reward: mean reward.
        kl: KL(policy ‖ reference), nats a completion.
        tokens: mean length of a completion.
    """

    policy: str
    prompts: int
    completions: int
    reward: Estimate
    kl: Estimate
    tokens: float


def mean_over_prompts(values: Iterable[Sequence[float]]) -> Estimate:
    """Mean over prompts of each prompt's mean over its completions; prompts are what is independent.

        m_b = mean_k values[b][k],   mean = mean_b m_b,   error = std_b(m_b) / √B

    Args:
        values: B sequences of one or more numbers.

    Returns:
        The mean and its standard error, NaN for a single prompt.
    """
    means = torch.tensor([sum(row) / len(row) for row in values], dtype=torch.float64)
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Estimate(float(means.mean()), error)


def sampled_ids(tokenizer, row: dict[str, Any]) -> dict[str, Any]:
    """Token ids of a row of `nca-align sample`: of the prompt that was continued, and of each completion.

    A completion's ids are those of its text and, unless it was `truncated`, the EOS by which it ended: what the policy
    drew, and nothing that a chat template writes after it.

    Returns:
        `prompt_ids`, `completion_ids`, and `rewards` where the row has them.
    """
    truncated = row.get("truncated") or [False] * len(row["completions"])
    end = [tokenizer.eos_token_id]
    completions = []
    for completion, cut in zip(row["completions"], truncated, strict=True):
        ids = tokenizer(text_of(completion), add_special_tokens=False)["input_ids"]
        completions.append(ids if cut and ids else ids + end)
    return {"prompt_ids": prompt_ids(tokenizer, row), "completion_ids": completions, "rewards": row["rewards"]}


@torch.inference_mode()
def completion_logps(model: torch.nn.Module, rows: Sequence[dict[str, Any]], batch_size: int) -> list[list[float]]:
    """log π(completion | prompt) of every completion, nats, summed over its tokens.

    Args:
        model: a causal language model, in eval mode.
        rows: `prompt_ids`, `completion_ids` (K lists).
        batch_size: completions a batch, of like length.

    Returns:
        For each row a list of K.
    """
    add_token_logps(model)
    device = next(model.parameters()).device
    collator = RewardCollator(pad_token_id=0)
    places = [(b, k) for b, row in enumerate(rows) for k in range(len(row["completion_ids"]))]
    places.sort(key=lambda p: len(rows[p[0]]["prompt_ids"]) + len(rows[p[0]]["completion_ids"][p[1]]))
    logps: list[list[float]] = [[math.nan] * len(row["completion_ids"]) for row in rows]
    for start in range(0, len(places), batch_size):
        picked = places[start : start + batch_size]
        batch = collator(
            [
                {
                    "prompt_ids": rows[b]["prompt_ids"],
                    "completion_ids": [rows[b]["completion_ids"][k]],
                    "rewards": [0.0],
                }
                for b, k in picked
            ]
        )
        (chunk,) = batch["chunks"]
        inputs = {name: value.to(device) for name, value in chunk.items() if name != "completion_index"}
        token_logps = model(**inputs).token_logps.double().cpu()
        sums = torch.zeros(len(picked), dtype=torch.float64).index_add(0, chunk["completion_index"], token_logps)
        for (b, k), value in zip(picked, sums.tolist(), strict=True):
            logps[b][k] = value
    return logps


def load_policy(name: str, dtype: str = "auto", trust_remote_code: bool = False):
    """A model in eval mode on the GPU, if any; of an adapter's folder its base model with the adapter on it.

    Raises:
        UserError: it can't be had.
    """
    from transformers import AutoModelForCausalLM

    hide_loading()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    automatic = torch.bfloat16 if device == "cuda" else torch.float32
    model = from_pretrained(
        AutoModelForCausalLM, name, dtype=automatic if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return model.to(device).eval()


def evaluate_samples(dataset: Dataset, policy: str, reference: str, options: EvaluateOptions) -> Evaluation:
    """Mean reward of a policy's samples, and from the same samples how far it went from the reference.

        KL(π ‖ π_ref) ≈ mean of log π(y|x) − log π_ref(y|x),   y drawn from π at temperature 1 and top-p 1

    Without bias, but noisy: a single sample's difference may well be negative.

    Args:
        dataset: `prompt`, `completions`, `rewards`, and `truncated` where `nca-align sample` wrote it.
        policy, reference: models or adapters.
        options: for `batch_size`, `dtype`, `trust_remote_code`.
    """
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, policy, trust_remote_code=options.trust_remote_code)
    rows = [sampled_ids(tokenizer, row) for row in dataset]
    logps = []
    for name in (policy, reference):  # one at a time: two large models may not fit
        model = load_policy(name, options.dtype, options.trust_remote_code)
        logps.append(completion_logps(model, rows, options.batch_size))
        del model
    differences = [[p - q for p, q in zip(*pair, strict=True)] for pair in zip(*logps, strict=True)]
    lengths = [len(ids) for row in rows for ids in row["completion_ids"]]
    return Evaluation(
        Path(policy).name, len(rows), len(lengths), mean_over_prompts(row["rewards"] for row in rows),
        mean_over_prompts(differences), sum(lengths) / len(lengths),
    )  # fmt: skip


def load_samples(name: str, policy: str) -> Dataset:
    """Scored samples, and a refusal of what a policy's KL can't be estimated from.

    Raises:
        UserError: no `rewards`, or samples that by the file's own record another model drew, or not at temperature 1.
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
        drawn, given = config["adapter"] or config["model"], weights_fingerprint(resolve_model(policy))
        if drawn != given and config["engine"] != "server":
            raise UserError(
                f"`dataset_name` {name} was sampled from {made['about']['adapter'] or made['about']['model']}, whose "
                f"weights are not those of `model_name_or_path` {policy}; a policy's KL needs samples of itself"
            )
    return dataset


def evaluate(options: EvaluateOptions) -> list[Evaluation]:
    """The table's lines, in the order of `dataset_name`; those that `output` holds already are taken from it."""
    path = Path(options.output) if options.output is not None else None
    known: dict[str, dict] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    reference = weights_fingerprint(resolve_model(options.reference))
    lines = []
    for name, policy in zip(options.dataset_name, options.model_name_or_path, strict=True):
        dataset = load_samples(name, policy)
        weights = weights_fingerprint(resolve_model(policy))
        key = " ".join((data_fingerprint(dataset), str(weights), str(reference), options.dtype))
        if key in known:
            line = known[key]
            lines.append(Evaluation(**{**line, "reward": Estimate(*line["reward"]), "kl": Estimate(*line["kl"])}))
            continue
        lines.append(evaluate_samples(dataset, policy, options.reference, options))
        known[key] = asdict(lines[-1])
        if path is not None:  # after each line, and whole: a kill loses the one in work
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(json.dumps(known, indent=1) + "\n")
            os.replace(temporary, path)
    return lines


def print_table(lines: Sequence[Evaluation], console: Console | None = None) -> None:
    """The table, for a terminal of 80 columns."""
    table = Table(box=None, pad_edge=False)
    for name in ("policy", "prompts", "samples", "tokens", "mean reward", "KL, nats"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for line in lines:
        table.add_row(
            line.policy, f"{line.prompts}", f"{line.completions}", f"{line.tokens:.0f}",
            f"{line.reward.mean:.3f} ± {line.reward.error:.3f}", f"{line.kl.mean:.2f} ± {line.kl.error:.2f}",
        )  # fmt: skip
    (console or Console()).print(table)


@command("nca-align evaluate")
def main(argv: list[str] | None = None) -> None:
    """Parse the options, and print the table."""
    (options,) = parse([EvaluateOptions], argv, "nca-align evaluate", "mean reward and KL of policies' own samples")
    print_table(evaluate(options))


if __name__ == "__main__":
    sys.exit(main())
