"""Token lengths of real prompts and completions, as a table without text.

    python benchmarks/lengths.py ultrafeedback=PAIRS.jsonl vicuna=SCORED.jsonl

writes `benchmarks/lengths.csv`, a row per prompt: its source, the tokens of the prompt, and those of each completion in
the order of the data, with SmolLM2's tokenizer and chat template, nothing cut. The files may be in any format that
`load_reward_dataset` knows. The table in the repository is from 300 rows of UltraFeedback's preference pairs and 60
prompts with four responses each of prometheus-eval's `vicuna_eval`.
"""

import csv
import sys
from pathlib import Path

TABLE = Path(__file__).parent / "lengths.csv"
COLUMNS = ("source", "prompt_tokens", "completion_tokens")


def read_lengths(source: str, table: Path = TABLE) -> list[tuple[int, list[int]]]:
    """(prompt tokens, tokens of each completion) of each row of one source."""
    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return [(int(row["prompt_tokens"]), [int(n) for n in row["completion_tokens"].split()]) for row in rows]


def measure(source: str, path: str) -> list[tuple[str, int, str]]:
    """The table's rows of one file."""
    from transformers import AutoTokenizer

    from nca_align.batching.tokenization import tokenize_dataset
    from nca_align.data import load_reward_dataset
    from nca_align.models.smollm2 import smollm2_path

    dataset = load_reward_dataset(path, split="train", validation_fraction=0.0)
    dataset, _ = tokenize_dataset(dataset, AutoTokenizer.from_pretrained(smollm2_path()), None, None)
    return [
        (source, len(row["prompt_ids"]), " ".join(str(len(ids)) for ids in row["completion_ids"])) for row in dataset
    ]


def main(arguments: list[str]) -> None:
    if not arguments or not all("=" in argument for argument in arguments):
        sys.exit(__doc__)
    rows = [row for argument in arguments for row in measure(*argument.split("=", 1))]
    with open(TABLE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    print(f"{TABLE}: {len(rows)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
