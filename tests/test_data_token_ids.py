"""Rows of token ids: under each name that TRL and verl have for them, with their masks, refused by row and field."""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset, IterableDataset

from conftest import build_model, build_tokenizer
from nca_align import NCATrainer, load_reward_dataset
from nca_align.batching.tokenization import tokenize_dataset
from nca_align.commands.inspect.command import main
from nca_align.commands.inspect.inspection import inspect
from nca_align.commands.inspect.options import InspectOptions
from nca_align.data import DataOptions, to_reward_dataset
from nca_align.data.strategies import select_completions, to_preference_pairs, to_unpaired
from nca_align.errors import UserError
from test_masks import config

PROMPT, FIRST, SECOND = [5, 6, 7], [10, 11, 12, 13], [20, 21]
MASKS = [[1, 0, 0, 1], [1, 1]]
OWN = {"prompt": PROMPT, "completions": [FIRST, SECOND], "rewards": [1.0, 0.0], "completion_mask": MASKS}
ROW = {"prompt_ids": PROMPT, "completion_ids": [FIRST, SECOND], "rewards": [1.0, 0.0], "completion_mask": MASKS}


def flat(prompt: str, completion: str, mask: str, score: str, /, **more) -> list[dict]:
    """A row a completion."""
    return [
        {prompt: PROMPT, completion: FIRST, mask: MASKS[0], score: 1.0, **more},
        {prompt: PROMPT, completion: SECOND, mask: MASKS[1], score: 0.0, **more},
    ]


LAYOUTS = {
    "ours": [ROW],
    "ours, as the columns of text are called": [OWN],
    "TRL's rollouts, text beside them": flat("prompt_ids", "completion_ids", "env_mask", "reward", prompt="What?"),
    "TRL's batches": flat("prompt_ids", "completion_ids", "tool_mask", "reward"),
    "TRL's batches, padded": [
        {
            "prompt_ids": [0, 0, *PROMPT], "prompt_mask": [0, 0, 1, 1, 1], "completion_ids": [*ids, 0, 0],
            "completion_mask": [*([1] * len(ids)), 0, 0], "tool_mask": [*mask, 1, 1], "reward": score,
        }
        for ids, mask, score in [(FIRST, MASKS[0], 1.0), (SECOND, MASKS[1], 0.0)]
    ],
    "K of TRL's batches": [
        ROW | {"prompt_ids": [0, *PROMPT], "prompt_mask": [0, 1, 1, 1], "completion_mask": [[1] * 4, [1] * 2],
               "tool_mask": MASKS}
    ],
    "a mask beside another that is all ones": [ROW | {"response_mask": [[1] * 4, [1] * 2]}],
    "verl's agent loop": flat("prompt_ids", "response_ids", "response_mask", "reward_score"),
    "verl's batches, padded": [
        {
            "prompts": [0, 0, *PROMPT], "responses": [*ids, 0], "response_mask": [*mask, 0],
            "token_level_scores": scores, "attention_mask": [0, 0, 1, 1, 1, *([1] * len(ids)), 0],
        }
        for ids, mask, scores in [(FIRST, MASKS[0], [0.0, 0.25, 0.0, 0.75, 0.0]), (SECOND, MASKS[1], [0.0, 0.0, 0.0])]
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_name_gives_the_same_row(kind):
    (row,) = to_reward_dataset(Dataset.from_list(LAYOUTS[kind]))
    assert {name: row[name] for name in OWN} == OWN


def test_trl_still_has_these_names():
    code = (Path(trl.__file__).parent / "trainer" / "grpo_trainer.py").read_text()
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "env_mask")
    assert [name for name in names if f'"{name}"' not in code] == []


@pytest.mark.parametrize(("more", "said"), [
    ({"attention_mask": [1] * 4}, "`attention_mask` has 4 values for 7 tokens of prompt and completion; give one each"),
    ({"prompt_mask": [0, 1]}, "`prompt_mask` has 2 values for 3 tokens of prompt; give one each"),
    ({"tool_mask": [1]}, r"`completion_mask` has 1 values for 4 tokens of the completion; give one each"),
])  # fmt: skip
def test_a_mask_of_padding_or_a_second_mask_has_a_value_for_each_token(more, said):
    row = {"prompt_ids": PROMPT, "completion_ids": FIRST, "completion_mask": [1] * 4, "reward": 1.0}
    with pytest.raises(UserError, match=f"`train`, row 0: {said}".replace("mask` has 1", r"mask\[0\]` has 1")):
        to_reward_dataset(Dataset.from_list([row | more, row | more]))


def test_padding_that_nothing_tells_of_is_said(caplog, recwarn):
    rows = [{"prompts": [0, 0, 0, 5], "responses": [9, 8, 0, 0, 0], "reward_score": 1.0},
            {"prompts": [4, 3, 2, 5], "responses": [9, 8, 7, 6, 5], "reward_score": 0.0}]  # fmt: skip
    told = [f"`{field}` looks padded by the id 0" for field in ("prompts", "responses")]
    for data, expected in ((rows, told), ([row | {"attention_mask": [1] * 9} for row in rows], [])):
        caplog.clear()
        recwarn.clear()
        to_reward_dataset(Dataset.from_list([*data, *[row | {"reward_score": 0.5} for row in data]]))
        said = caplog.text + "".join(str(own.message) for own in recwarn)
        assert [text for text in told if text in said] == expected


def test_a_file_a_stream_and_the_trainer_read_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROW | {"prompt_ids": [5, 6, n]}) + "\n" for n in range(40)))
    read = load_reward_dataset(str(path), validation_fraction=0.25)
    assert (len(read["train"]), len(read["validation"])) == (30, 10)
    streamed = load_reward_dataset(str(path), split="train", streaming=True)
    assert next(iter(streamed))["completion_mask"] == MASKS
    tokenizer = build_tokenizer()
    nca = NCATrainer(
        build_model(tokenizer), args=config(tmp_path, max_length=6), train_dataset=read["train"],
        eval_dataset=read["validation"], processing_class=tokenizer,
    )  # fmt: skip
    row = nca.train_dataset[0]
    assert row["completion_ids"] == [FIRST[:3], SECOND]  # cut as any other
    assert row["completion_mask"] == [[1, 0, 0], [1, 1]]
    nca.train()
    assert "eval_loss" in nca.evaluate()
    direct = NCATrainer(
        build_model(tokenizer), args=config(tmp_path), train_dataset=Dataset.from_list([ROW] * 2),
        processing_class=tokenizer,
    )  # fmt: skip
    assert next(iter(direct.get_train_dataloader()))["lengths"].tolist() == [[2, 2]] * 2


def test_a_row_number_of_the_users_spares_no_check(tmp_path):
    tokenizer = build_tokenizer()
    row = ROW | {"row_number": 7}
    nca = NCATrainer(
        build_model(tokenizer), args=config(tmp_path, max_length=6), train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
    )  # fmt: skip
    own = nca.train_dataset
    assert own[1]["completion_ids"] == [FIRST[:3], SECOND]
    assert nca._prepare_dataset(own, tokenizer, nca.args, "eval") is own
    with pytest.raises(UserError, match=r"`train`, row 0: `completion_mask\[0\]` has 2 values for 4 tokens"):
        NCATrainer(
            "no such model", args=config(tmp_path), processing_class=tokenizer,
            train_dataset=Dataset.from_list([row | {"completion_mask": [[1, 1], [1, 1]]}] * 2),
        )  # fmt: skip


@pytest.mark.parametrize("rows", [
    [ROW | {"completion_mask": [MASKS[0], None]}],
    [ROW | {"completion_mask": [[1] * 4, None], "tool_mask": MASKS}],
    [own | {"env_mask": mask} for own, mask in zip(
        flat("prompt_ids", "completion_ids", "env_mask", "reward"), [MASKS[0], None], strict=True
    )],
])  # fmt: skip
def test_a_null_mask_is_of_a_completion_that_the_model_wrote_all_of(rows):
    read = to_reward_dataset(Dataset.from_list(rows))
    found, _ = tokenize_dataset(read, build_tokenizer(), None, None)
    assert (found[0]["completion_mask"], found[0]["completion_ids"]) == (MASKS, [FIRST, SECOND])
    taken, _ = tokenize_dataset(select_completions(read, "first_2"), build_tokenizer(), None, None)
    assert taken[0]["completion_mask"] == MASKS


def test_no_mask_means_that_the_model_wrote_all():
    plain = {name: value for name, value in ROW.items() if name != "completion_mask"}
    tokenised, _ = tokenize_dataset(to_reward_dataset(Dataset.from_list([plain])), build_tokenizer(), None, None)
    assert "completion_mask" not in tokenised.column_names
    assert (tokenised[0]["prompt_ids"], tokenised[0]["completion_ids"]) == (PROMPT, [FIRST, SECOND])


@pytest.mark.parametrize("number", [int, bool, float])
@pytest.mark.parametrize("kind", ["flat", "K", "stream"])
def test_a_mask_by_another_name_is_refused_and_read_where_it_is_mapped(number, kind):
    values = [list(map(number, mask)) for mask in MASKS]
    rows = flat("prompt_ids", "response_ids", "loss_mask", "reward")
    rows = [row | {"loss_mask": own} for row, own in zip(rows, values, strict=True)]
    if kind != "flat":
        rows = [{name: value for name, value in ROW.items() if name != "completion_mask"} | {"loss_mask": values}]
    data = IterableDataset.from_generator(lambda: iter(rows)) if kind == "stream" else Dataset.from_list(rows)
    with pytest.raises(UserError, match="`train`: `loss_mask` looks like a mask of the tokens of the completion, but"):
        to_reward_dataset(data)
    (row,) = to_reward_dataset(data, DataOptions(columns={"completion_mask": "loss_mask"}))
    assert row["completion_mask"] == MASKS


UNMASKED = {name: value for name, value in ROW.items() if name != "completion_mask"}


@pytest.mark.parametrize(("column", "said"), [
    ({"assistant_masks": [[0, 0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]},
     "`assistant_masks` looks like a mask of the tokens of prompt and completion, .* so give the completion's part"),
    ({"advantages": [[0.0, 0.0, 0.0, 1.0], [0.0, 1.0]]}, None),  # of tokens as well, but no mask
    ({"log_probs": [[-1, -2, 0, 1], [0, 1]]}, None),
    ({"logprobs": [[0, 0, 0, 0], [0, 0]]}, None),
    ({"special_tokens_mask": [[0, 0, 0, 1], [0, 1]]}, None),
    ({"padding_mask": [[0] * 7, [0] * 5]}, None),
    ({"steps": [[0, 1], [1]]}, None),
    ({"seen": [1, 0]}, None),
])  # fmt: skip
def test_other_columns_beside_token_ids_are_no_masks(column, said, caplog, recwarn):
    rows = [UNMASKED | column]
    if said:
        with pytest.raises(UserError, match=said):
            to_reward_dataset(Dataset.from_list(rows))
    else:
        assert len(to_reward_dataset(Dataset.from_list(rows))) == 1
        assert not caplog.records
        assert not recwarn.list


@pytest.mark.parametrize(("name", "part"), [("correct", "the completion"), ("token_type_ids", "prompt and completion")])
def test_a_column_that_may_be_a_mask_is_told_of_but_not_refused(name, part, caplog):
    """Steps that are right or rewards by token have the same form; as a mask they would leave out most tokens."""
    values = MASKS if part == "the completion" else [[0] * len(PROMPT) + mask for mask in MASKS]
    assert len(to_reward_dataset(Dataset.from_list([UNMASKED | {name: values}]))) == 1
    assert f"`train`: `{name}` has 0 or 1 for each token of {part}, and is not read" in caplog.text


@pytest.mark.parametrize("broken", [[[1, 0], [1, 1]], None, [[1, 0, 0, 2], [1, 1]]])
def test_a_broken_row_hides_no_mask(broken):
    rows = [UNMASKED | {"loss_mask": own} for own in (broken, MASKS, MASKS)]
    with pytest.raises(UserError, match="`train`: `loss_mask` looks like a mask of the tokens of the completion"):
        to_reward_dataset(Dataset.from_list(rows))


BROKEN = {
    "a mask of another length": (
        {"completion_mask": [[1, 0], [1, 1]]}, r"`completion_mask\[0\]` has 2 values for 4 tokens of the completion"
    ),
    "too few masks": ({"completion_mask": [[1, 0, 0, 1]]}, "`completion_mask` has 1 values for 2 completions"),
    "nothing to train on": ({"completion_mask": [[1, 1, 1, 1], [0, 0]]}, r"`completion_mask\[1\]` has no 1, so"),
    "no mask": ({"completion_mask": [[1, 2, 0, 1], [1, 1]]}, r"`completion_mask\[0\]` must be a list of 0 and 1"),
    "no token": ({"completion_ids": [[10, -1, 12, 13], SECOND]}, r"`completions\[0\]\[1\]` is -1; it must be a to"),
    "an empty completion": ({"completion_ids": [FIRST, []]}, r"`completions\[1\]` is \[\], an empty completion"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_that_is_wrong_is_refused_by_its_field_or_dropped(kind):
    change, said = BROKEN[kind]
    data = Dataset.from_list([ROW, ROW | change])
    with pytest.raises(UserError, match=rf"`train`, row 1: {said}"):
        to_reward_dataset(data)
    assert len(to_reward_dataset(data, DataOptions(on_invalid="drop"))) == 1
    stream = IterableDataset.from_generator(lambda: iter([ROW, ROW | change]))
    with pytest.raises(UserError, match=rf"`train`, row 1: {said}"):
        list(to_reward_dataset(stream))


def test_a_mask_beside_text_is_refused():
    row = {"prompt": "1 + 1 =", "completions": [" 2", " 3"], "rewards": [1.0, 0.0], "completion_mask": [[1], [1]]}
    with pytest.raises(UserError, match="`completion_mask` stands beside text; it needs `prompt_ids`"):
        to_reward_dataset(Dataset.from_list([row]))


def test_flat_rows_that_are_dropped_take_their_masks_along():
    rows = [*flat("prompt_ids", "completion_ids", "env_mask", "reward")]
    rows.insert(0, rows[0] | {"reward": None})
    (row,) = to_reward_dataset(Dataset.from_list(rows), DataOptions(on_invalid="drop"))
    assert {name: row[name] for name in OWN} == OWN


def test_inspect_counts_what_the_model_wrote(tmp_path, model_dir, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROW | {"prompt_ids": [5, 6, n]}) + "\n" for n in range(4)))
    found = inspect(
        load_reward_dataset(str(path), split="train", validation_fraction=0),
        InspectOptions(dataset_name=str(path)),
        build_tokenizer(),
    )
    assert found.lengths.tolist() == [2, 2] * 4
    assert found.tokens.lengths.tolist() == [4, 2] * 4
    for own in ([], ["--model_name_or_path", model_dir], ["--model_name_or_path", model_dir, "--example", "0"]):
        main(["--dataset_name", str(path), *own])
    said = capsys.readouterr().out
    assert "context 2 of 4" in said
    assert "no token of it is trained on; 2 of the completions' 6 tokens" in " ".join(said.split())
    path.write_text("".join(json.dumps(ROW | {"completion_mask": [[0, 0, n, 1], [1, 1]]}) + "\n" for n in (0, 1)))
    for limit, known in (("4", "leaves only context of 2 completions"), ("5", "leaves only context of 1 completions")):
        main(["--dataset_name", str(path), "--model_name_or_path", model_dir, "--max_length", limit])
        assert f"`max_length` {limit} {known}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("strategy", ["rewards", "first_2", "best_plus_1", "all_pairs"])
def test_what_a_strategy_takes_keeps_its_masks(strategy):
    rows = Dataset.from_list([OWN, OWN | {"completions": [SECOND, FIRST, [30]], "rewards": [0.1, 0.9, 0.5],
                                          "completion_mask": [[1, 1], [1, 0, 0, 1], [1]]}])  # fmt: skip
    taken = select_completions(rows, strategy)
    mask_of = {str(FIRST): MASKS[0], str(SECOND): MASKS[1], "[30]": [1]}
    assert len(taken) >= 2
    for row in taken:
        assert row["completion_mask"] == [mask_of[str(completion)] for completion in row["completions"]]
    for convert in (to_preference_pairs, to_unpaired):
        with pytest.raises(UserError, match="`dataset` holds token ids, but TRL's trainers read text"):
            convert(rows)
