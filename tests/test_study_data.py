"""The data of the study on SmolLM2."""

import json
from pathlib import Path

from nca_align.scorers import within_words

FOLDER = Path(__file__).resolve().parents[1] / "data/study/words"
SPLITS = {"train": 112, "validation": 32, "test": 64}  # prompts, at the least


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def test_prompts_are_enough_and_in_one_split_each():
    prompts = {split: [row["prompt"][-1]["content"] for row in rows(split)] for split in SPLITS}
    everything = [prompt for own in prompts.values() for prompt in own]
    assert len(everything) == len(set(everything))
    assert all(len(prompts[split]) >= least for split, least in SPLITS.items())


def test_every_prompt_has_eight_completions_with_the_rewards_that_the_scorer_gives():
    for split in SPLITS:
        for row in rows(split):
            count = len(row["completions"])
            assert 7 <= count == len(row["rewards"]) <= 8  # an empty one is left out
            assert within_words(prompts=[row["prompt"]] * count, completions=row["completions"]) == row["rewards"]


def test_rewards_say_something():
    unequal = [len(set(row["rewards"])) > 1 for row in rows("train")]
    assert sum(unequal) > 0.9 * len(unequal)
