"""Several rewards a completion: every form of them, their sum, GRPO's scaling, gaps, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from trl import ScriptArguments
from trl.trainer.utils import nanstd

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.collator import objective_tensors
from nca_align.commands.compare.grid import EvaluationSettings
from nca_align.commands.compare.splits import read_splits
from nca_align.commands.inspect.objectives import read_objectives
from nca_align.data import DataOptions, load_reward_dataset, to_reward_dataset
from nca_align.errors import UserError
from nca_align.reward_tensors import targets
from nca_align.training.metrics import row_metrics
from nca_align.training.objective_metrics import objective_metrics
from test_trainer import trainer

HELP, SHORT = [4.0, 1.0, 3.0], [0.5, 2.0, 1.0]
WEIGHTS = {"help": 0.7, "short": -0.1}
SUM = [0.7 * h - 0.1 * s for h, s in zip(HELP, SHORT, strict=True)]
TEXTS = {"prompt": "Why?", "completions": ["one", "two", "three"]}
BY_NAME = {"help": HELP, "short": SHORT}
BY_COMPLETION = [{"help": h, "short": s} for h, s in zip(HELP, SHORT, strict=True)]


def flat(**columns):
    return [
        {"prompt": "Why?", "response": text, **{name: values[k] for name, values in columns.items()}}
        for k, text in enumerate(TEXTS["completions"])
    ]


def ultrafeedback(overall=(1.0, 2.0, 3.0), help=HELP, short=SHORT):
    completions = [
        {"response": text, "overall_score": overall[k],
         "annotations": {"help": {"Rating": str(help[k])}, "short": {"Rating": str(short[k])}}}
        for k, text in enumerate(TEXTS["completions"])
    ]  # fmt: skip
    return [{"instruction": "Why?", "completions": completions}]


def convert(rows, **options):
    return to_reward_dataset(Dataset.from_list(rows), DataOptions(**options))


def rewards(rows, **options):
    stream = not rows[0].keys() & {"response", "completion"} and options.keys().isdisjoint(
        ("scale_rewards", "multi_objective_aggregation")
    )
    dataset = Dataset.from_list(rows)
    found = to_reward_dataset(dataset.to_iterable_dataset() if stream else dataset, DataOptions(**options))
    return [row["rewards"] for row in found]


FORMS = {
    "by name": [TEXTS | {"rewards": BY_NAME}],
    "by completion": [TEXTS | {"rewards": BY_COMPLETION}],
    "as JSON text": [TEXTS | {"rewards": json.dumps(BY_NAME)}],
    "as JSON text by completion": [TEXTS | {"rewards": json.dumps(BY_COMPLETION)}],
    "columns": [TEXTS | BY_NAME],
    "columns of nca-align score": [TEXTS | {"rewards": [0.0] * 3, "score_help": HELP, "score_short": SHORT}],
    "flat": flat(**BY_NAME),
    "flat with a score": flat(**BY_NAME, score=[9, 9, 9]),
    "UltraFeedback": ultrafeedback(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_combined_and_its_objectives_are_kept(form):
    (row,) = convert(FORMS[form], reward_weights=WEIGHTS)
    assert row["rewards"] == pytest.approx(SUM, abs=1e-15)
    assert (row["score_help"], row["score_short"]) == (HELP, SHORT)
    assert rewards(FORMS[form], reward_weights=WEIGHTS) == [row["rewards"]]  # also of a stream


@pytest.mark.parametrize("form", FORMS)
def test_one_weight_of_1_is_that_score(form):
    for name in WEIGHTS:
        assert rewards(FORMS[form], reward_weights={name: 1}) == rewards(FORMS[form], score=name)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "flat with a score"])
def test_a_list_of_weights_is_in_the_order_of_the_data(form):
    assert rewards(FORMS[form], reward_weights="[0.7, -0.1]") == rewards(FORMS[form], reward_weights=WEIGHTS)


def test_the_combination_is_linear_and_alpha_is_in_its_unit():
    rows = [TEXTS | {"rewards": BY_NAME}]

    def combined(help, short):
        return torch.tensor(rewards(rows, reward_weights={"help": help, "short": short}), dtype=torch.float64)

    a, b = combined(0.7, -0.1), combined(-0.3, 2)
    torch.testing.assert_close(combined(2 * 0.7 - 0.3, 2 * -0.1 + 2), 2 * a + b)
    torch.testing.assert_close(targets(3 * a, 3 * 0.2), targets(a, 0.2))
    torch.testing.assert_close(targets(combined(2.1, -0.3), 3 * 0.2), targets(a, 0.2))


def test_rows_with_their_own_sum_read_it_as_a_reward():
    rows = [TEXTS | {"rewards": [1.0, 2.0, 3.0], "lengths": [10, 20, 30]}]
    assert rewards(rows) == [[1.0, 2.0, 3.0]]
    assert rewards(rows, reward_weights={"rewards": 1, "lengths": -0.01})[0] == pytest.approx([0.9, 1.8, 2.7])


def test_rows_of_token_ids_and_of_one_completion_have_several_too():
    ids = {"prompt_ids": [1, 2, 3], "completion_ids": [[4], [5, 6], [7]], "completion_mask": [[1], [1, 0], [1]]}
    (row,) = convert([ids | {"rewards": BY_NAME}], reward_weights=WEIGHTS)
    assert (row["rewards"], row["completion_mask"]) == (pytest.approx(SUM), ids["completion_mask"])
    with pytest.raises(ValueError, match="doesn't have several rewards"):
        convert([ids | {"rewards": HELP}], reward_weights={"prompt": 1})
    one = [{"prompt": "Why?", "completions": ["a"], "rewards": {"help": [0.5], "short": [1.0]}}]
    assert convert(one, reward_weights=WEIGHTS, min_completions=1)["rewards"][0] == pytest.approx([0.25])
    assert convert(one, score="help", scale_rewards="group", min_completions=1)["rewards"][0] == [0.0]


def test_a_list_of_weights_for_trls_log_is_that_of_its_reward_functions():
    log = [own | {"step": 1, "completion": own.pop("response"), "advantage": 0.1} for own in flat(**BY_NAME)]
    assert (
        rewards(log, reward_weights=[0.7, -0.1]) == rewards(log, reward_weights=WEIGHTS) != rewards(log, score="help")
    )


def grpo(values, weights, scale_rewards, aggregation):
    """Advantages as `GRPOTrainer` computes them. values: (B, K, J)."""
    functions = values.flatten(0, 1)
    if aggregation == "sum_then_normalize":
        total = (functions * weights).nansum(1)
        grouped = total.view(values.shape[:2])
        spread = nanstd(total) if scale_rewards == "batch" else nanstd(grouped, dim=1)[:, None]
        return (grouped - grouped.nanmean(1, keepdim=True)) / (spread + 1e-4)
    scaled = (values - values.nanmean(1, keepdim=True)) / (nanstd(values, dim=1, keepdim=True) + 1e-4)
    total = (scaled.flatten(0, 1) * weights).nansum(1)
    return ((total - total.nanmean()) / (nanstd(total) + 1e-4)).view(values.shape[:2])


@pytest.mark.parametrize(
    ("scale_rewards", "aggregation"),
    [("group", "sum_then_normalize"), ("batch", "sum_then_normalize"), ("none", "normalize_then_sum")],
)
def test_scaling_is_that_of_grpo_with_the_split_as_its_batch(scale_rewards, aggregation):
    values = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    values[1] = values[1, :1]  # no spread
    values[2, :, 0] = 0.1
    rows = [
        {"prompt": f"{b}?", "completions": list("abcd"), "rewards": dict(zip(WEIGHTS, own.T.tolist(), strict=True))}
        for b, own in enumerate(values)
    ]
    given = {"reward_weights": WEIGHTS, "scale_rewards": scale_rewards, "multi_objective_aggregation": aggregation}
    found = torch.tensor(rewards(rows, **given), dtype=torch.float64)
    expected = grpo(values, torch.tensor(list(WEIGHTS.values())), scale_rewards, aggregation)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-9)
    assert (found[1] == 0).all()
    assert (found[0] != 0).all()
    assert found[2].argmax() == (-values[2, :, 1]).argmax()


def test_a_split_of_one_completion_has_no_spread(recwarn):
    rows = [{"prompt": "q", "completions": ["a"], "rewards": [3.0]}]
    assert rewards(rows, scale_rewards="batch", min_completions=1) == [[0.0]]
    assert not [own for own in recwarn if issubclass(own.category, RuntimeWarning)]


def test_one_reward_is_scaled_too():
    rows = [TEXTS | {"rewards": HELP}]
    spread = torch.tensor(HELP).std().item() + 1e-4
    assert rewards(rows, scale_rewards="group")[0] == pytest.approx([(h - 8 / 3) / spread for h in HELP])
    assert rewards(rows, scale_rewards="none") == [HELP]


GAPS = {
    "by name": [TEXTS | {"rewards": {"help": HELP, "short": [0.5, None, 1.0]}}],
    "by completion": [TEXTS | {"rewards": [BY_COMPLETION[0], {"help": 1.0}, BY_COMPLETION[2]]}],
    "columns": [TEXTS | {"help": HELP, "score_short": [0.5, float("nan"), 1.0]}],
    "flat": flat(help=HELP, short=[0.5, None, 1.0]),
    "UltraFeedback": ultrafeedback(short=[0.5, "N/A", 1.0]),
}  # fmt: skip
FIELDS = {
    "by name": "`rewards.short[1]`", "by completion": "`rewards[1].short`", "columns": "`score_short[1]`",
    "flat": "`short`", "UltraFeedback": "`completions[1].annotations.short.Rating`",
}  # fmt: skip


@pytest.mark.parametrize("form", GAPS)
def test_a_missing_value_is_refused_or_its_objective_left_out_of_the_row(form, caplog):
    whole = {"prompt": "Whole?", "completions": ["a", "b"], "rewards": {"help": [1.0, 2.0], "short": [3.0, 4.0]}}
    rows = [whole, *GAPS[form]] if form == "by name" else GAPS[form]
    place = len(rows) - 1 if form != "flat" else 1
    with pytest.raises(ValueError) as caught:
        convert(rows, reward_weights=WEIGHTS)
    for part in (f"row {place}:", FIELDS[form], "a missing score", "`on_missing: leave_out`"):
        assert part in str(caught.value)
    left = convert(rows, reward_weights=WEIGHTS, on_missing="leave_out")[-1]
    assert left["rewards"] == [0.7 * h for h in HELP]
    assert left["score_short"] == [0.5, None, 1.0]
    assert "prompts with a reward left out: 1 short" in caplog.text
    assert "completions left out" not in caplog.text
    if form == "by name":  # the other rows keep it
        first = convert(rows, reward_weights=WEIGHTS, on_missing="leave_out")[0]
        assert first["rewards"] == pytest.approx([0.7 * 1 - 0.3, 0.7 * 2 - 0.4])


def test_a_row_is_invalid_that_no_objective_is_whole_in():
    rows = [TEXTS | {"rewards": {"help": [None, 1.0, 2.0], "short": [1.0, None, 2.0]}}]
    with pytest.raises(ValueError, match=r"row 0: `rewards` lacks a value of every objective"):
        convert(rows, reward_weights=WEIGHTS, on_missing="leave_out")


def test_ultrafeedbacks_wrong_tens_are_repaired_within_a_sum():
    rows = ultrafeedback(overall=(10.0, 2.0, 3.0))
    for own in rows[0]["completions"]:
        own["annotations"]["honesty"] = {"Rating": "1"}
    assert rewards(rows, reward_weights={"overall_score": 2, "help": 1}) == [[6.0, 5.0, 9.0]]
    dropped = convert(rows, reward_weights={"overall_score": 2, "help": 1}, score_bug="drop")[0]
    assert (dropped["rewards"], dropped["score_help"]) == ([5.0, 9.0], [1.0, 3.0])


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (FORMS["by name"], {}, r"row 0: `rewards` holds help, short; say what each weighs by `reward_weights`"),
        (FORMS["by completion"], {}, r"row 0: `rewards` holds help, short; .*, or take one by `score`"),
        (FORMS["by name"], {"reward_weights": {"hlp": 1}}, r"`reward_weights` holds `hlp`.*did you mean `help`.*short"),
        (FORMS["flat"], {"reward_weights": {"help": 1, "kind": 1}}, r"holds `kind`, which `train` \(flat scored row"),
        (FORMS["UltraFeedback"], {"reward_weights": [1, 2, 3]}, r"3 values, but .* has 2 objectives \(help, short\)"),
        ([TEXTS | {"rewards": HELP}], {"reward_weights": [1]}, r"doesn't have several rewards a completion"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"reward_weights": [1]}, r"doesn't have several"),
        (FORMS["by name"], {"reward_weights": WEIGHTS, "score": "help"}, r"`score` is 'help' and `reward_weights` is"),
        (FORMS["by name"], {"reward_weights": {"help": float("nan")}}, r"it must be finite numbers, not all 0"),
        (FORMS["by name"], {"reward_weights": "help=1"}, r"`reward_weights` is 'help=1'; it must be finite numbers"),
        (FORMS["by name"], {"multi_objective_aggregation": "normalize_then_sum"}, r"which needs `reward_weights`"),
        (FORMS["by name"], {"scale_rewards": "group", "reward_weights": WEIGHTS,
                            "multi_objective_aggregation": "normalize_then_sum"}, r"`scale_rewards` is group, which"),
        ([TEXTS | {"rewards": {"help": HELP, "short": [1.0]}}], {"reward_weights": WEIGHTS},
         r"row 0: `rewards.short` has 1 values for 3 completions"),
        ([TEXTS | {"rewards": {"help": HELP, "short": [1.0, "x", 2.0]}}], {"reward_weights": WEIGHTS}, r"short\[1\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused_in_one_sentence(rows, options, said):
    with pytest.raises(ValueError, match=said):
        convert([{**rows[0], "rewards": json.dumps(rows[0]["rewards"])}] if "x" in str(rows) else rows, **options)


@pytest.mark.parametrize("form", ["by name", "by completion"])
def test_rewards_with_names_and_columns_beside_them_are_weighed_together(form):
    rows = [FORMS[form][0] | {"length": [3, 5, 7], "score_judge": [0.0, 1.0, 2.0]}]
    expected = [h + n / 2 + 2 * j for h, n, j in zip(HELP, (3, 5, 7), (0, 1, 2), strict=True)]
    assert rewards(rows, reward_weights={"help": 1.0, "length": 0.5, "score_judge": 2.0})[0] == pytest.approx(expected)
    assert rewards(rows, score="length") == [[3.0, 5.0, 7.0]]


def write_split(path, split: str, scale: float, prompts: int = 6) -> None:
    rows = [TEXTS | {"prompt": f"{split} {i}?", "rewards": [scale * (i + own) for own in HELP]} for i in range(prompts)]
    (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_all_splits_are_scaled_by_the_training_splits_spread(tmp_path):
    """So that `batch` is another α, also of the held-out loss, and whichever split is read."""
    for split, scale in (("train", 1.0), ("test", 10.0)):
        write_split(tmp_path, split, scale)
    plain = load_reward_dataset(str(tmp_path))
    scaled = load_reward_dataset(str(tmp_path), scale_rewards="batch")
    assert [*scaled] == [*plain] == ["train", "test"]
    spread = np.std(plain["train"]["rewards"][:], ddof=1) + 1e-4
    for split, rows in plain.items():
        expected = [(np.array(own) - np.mean(own)) / spread for own in rows["rewards"]]
        np.testing.assert_allclose(scaled[split]["rewards"][:], expected)
        alone = load_reward_dataset(str(tmp_path), split=split, scale_rewards="batch")
        assert alone["rewards"][:] == scaled[split]["rewards"][:]
    write_split(tmp_path, "train", 5.0)  # what is cached is of the old spread
    anew = load_reward_dataset(str(tmp_path), split="test", scale_rewards="batch")
    np.testing.assert_allclose(np.array(anew["rewards"][:]) * 5, scaled["test"]["rewards"][:], rtol=1e-4)


def test_the_training_split_may_have_any_name(tmp_path, recwarn, caplog):
    """It is the one that the caller names, in commands `dataset_train_split`; nothing is scaled by a guess."""
    rows = {
        split: [TEXTS | {"prompt": f"{split} {i}?", "rewards": [scale * (i + own) for own in HELP]} for i in range(6)]
        for split, scale in (("rollouts", 1.0), ("others", 3.0), ("test", 10.0))
    }
    both = DatasetDict({split: Dataset.from_list(own) for split, own in rows.items()})
    both.save_to_disk(tmp_path / "data")
    path = str(tmp_path / "data")
    spread = {split: np.std([own["rewards"] for own in rows[split]], ddof=1) + 1e-4 for split in rows}

    def unit(data, split: str) -> float:
        first = rows[split][0]["rewards"]
        return (max(first) - min(first)) / (max(data["rewards"][0]) - min(data["rewards"][0]))

    for training in ("rollouts", "others"):
        read = load_reward_dataset(path, scale_rewards="batch", train_split=training)
        for split, data in read.items():
            assert unit(data, split) == pytest.approx(spread[training])
        alone = load_reward_dataset(path, split="test", scale_rewards="batch", train_split=training)
        assert unit(alone, "test") == pytest.approx(spread[training])
    with pytest.raises(
        UserError, match=r"the splits rollouts, others, test, and none is called train. .* `train_split`"
    ):
        load_reward_dataset(path, split="test", scale_rewards="batch")
    with pytest.raises(UserError, match="the split `rollout` is not in the data set"):
        load_reward_dataset(path, scale_rewards="batch", train_split="rollout")
    assert unit(load_reward_dataset(path, split="test"), "test") == 1  # unscaled, no split need be named

    script = ScriptArguments(dataset_name=path, dataset_train_split="others")
    args = NCAConfig(str(tmp_path), use_cpu=True, bf16=False)
    evaluation = EvaluationSettings(["length"], validation="test", test="test")
    options = DataOptions(scale_rewards="batch", validation_fraction=0.5)
    compared = dict(zip(("others", "test"), read_splits(script, options, args, evaluation), strict=True))
    compared["test"] = compared["test"]["test"]
    for split, data in compared.items():
        assert unit(data, split) == pytest.approx(spread["others"])

    DatasetDict(train=both["others"], rollouts=both["rollouts"]).save_to_disk(tmp_path / "beside")
    own = load_reward_dataset(str(tmp_path / "beside"), split="rollouts", scale_rewards="batch")
    assert unit(own, "rollouts") == pytest.approx(spread["others"])
    assert "give `train_split='rollouts'`" in caplog.text + "".join(str(warning.message) for warning in recwarn)


def test_a_stream_has_no_spread_over_the_split():
    stream = Dataset.from_list(FORMS["by name"]).to_iterable_dataset()
    with pytest.raises(NotImplementedError, match=r"`train` is a stream, but batch .* `scale_rewards: group`"):
        to_reward_dataset(stream, DataOptions(reward_weights=WEIGHTS, scale_rewards="batch"))


def test_files_are_read_anew_with_other_weights(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(FORMS["by name"][0]) + "\n")
    for weights in (WEIGHTS, {"help": 1.0}, WEIGHTS):
        (row,) = load_reward_dataset(str(file), split="train", reward_weights=weights, validation_fraction=0)
        assert row["rewards"] == pytest.approx(SUM if weights is WEIGHTS else HELP)


def test_metrics_of_each_reward_are_those_of_a_loop_over_completions():
    draw = torch.Generator().manual_seed(0)
    logps, ref_logps, help = (torch.randn(8, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    short = torch.randint(0, 3, (8, 5), generator=draw).float()  # with ties
    short[0, 1], short[1] = torch.nan, 2.0  # a gap, and a prompt without a spread
    valid = torch.arange(5) < torch.tensor([5, 5, 2, 3, 4, 5, 2, 3]).unsqueeze(1)
    lengths = torch.randint(1, 30, (8, 5), generator=draw) * valid
    batch = {"objectives": {"help": help, "short": short}, "valid": valid, "lengths": lengths}
    found = objective_metrics(logps, ref_logps, batch, 0.1, correlations=True)
    value, weight = row_metrics(logps, ref_logps, help, valid, 1.0, 0.1)["rewards/accuracies"]
    torch.testing.assert_close(found["objectives/help/accuracies"], (value, weight))
    assert found["objectives/short/accuracies"][1].tolist()[:2] == [1, 0]
    places = [k for k in range(5) if valid[0, k] and k != 1]  # without the gap
    pairs = [(i, j) for i in places for j in places if short[0, i] > short[0, j]]
    right = [(logps - ref_logps)[0, i] > (logps - ref_logps)[0, j] for i, j in pairs]
    assert found["objectives/short/accuracies"][0][0] == pytest.approx(np.mean(right))
    names = {"help": help, "short": short, "length": lengths}
    for name, other in (("help", "length"), ("help", "short"), ("short", "length")):
        values, weights = found[f"objectives/{name}/corr_{other}"]
        for b in range(8):
            x, y = (names[own][b][valid[b]].double() for own in (name, other))
            there = x.isfinite() & y.isfinite()
            x, y = x[there].numpy(), y[there].numpy()
            defined = np.ptp(x) > 0 and np.ptp(y) > 0
            assert bool(weights[b]) == defined
            assert values[b].item() == pytest.approx(np.corrcoef(x, y)[0, 1] if defined else 0.0, abs=1e-5)
    assert not objective_metrics(logps, ref_logps, batch | {"objectives": {"help": help}}, 0.1, True)


def test_a_row_without_one_of_the_rewards_is_a_gap_wherever_it_stands():
    rows = [{"rewards": [1.0, 0.0], "score_help": own, "score_short": [2.0, 3.0]} for own in (None, [4.0, None])]
    found = read_objectives(Dataset.from_list(rows))
    assert found["score_short"].tolist() == [2, 3, 2, 3]
    assert np.array_equal(found["score_help"], [math.nan, math.nan, 4, math.nan], equal_nan=True)
    assert [*objective_tensors(rows)] == ["help", "short"]
    assert torch.equal(objective_tensors(rows)["help"].isnan(), torch.tensor([[True, True], [False, True]]))


def run(rows, folder, alpha=0.5, resume=None, save="no", **options):
    tokenizer = build_tokenizer()
    data = to_reward_dataset(Dataset.from_list(rows), DataOptions(**options))
    args = NCAConfig(
        output_dir=str(folder), alpha=alpha, beta=0.1, use_cpu=True, bf16=False, max_steps=2, logging_steps=1,
        learning_rate=1e-3, save_strategy=save, save_steps=1, report_to="none", per_device_train_batch_size=3,
        disable_tqdm=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = NCATrainer(
        build_model(tokenizer), args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history


def test_a_run_by_weights_is_that_of_the_column_and_logs_each_reward(tmp_path):
    rows = reward_rows(6, [4, 2, 3])
    for row in rows:
        row["rewards"] = {"help": row["rewards"], "short": [float(i % 2) for i in range(len(row["rewards"]))]}
    weighed = run(rows, tmp_path, reward_weights={"help": 1, "short": 0})
    column = run(rows, tmp_path, score="help")
    thrice = run(rows, tmp_path, alpha=1.5, reward_weights={"help": 3})

    def logged(history, name):
        return [line[name] for line in history if name in line]

    assert logged(weighed, "loss") == logged(column, "loss")
    assert logged(weighed, "grad_norm") == logged(column, "grad_norm")
    assert logged(thrice, "loss") == pytest.approx(logged(column, "loss"), rel=1e-5)
    for prefix in ("", "eval_"):
        name = f"{prefix}objectives/help/accuracies"
        assert logged(weighed, name) == logged(weighed, f"{prefix}rewards/accuracies")
        assert len(logged(weighed, f"{prefix}objectives/short/accuracies")) == (1 if prefix else 2)
        assert not logged(column, name)
    (found,) = logged(weighed, "eval_objectives/help/corr_short")
    expected = [np.corrcoef(*row["rewards"].values())[0, 1] for row in rows]
    assert found == pytest.approx(math.fsum(expected) / len(rows), abs=1e-5)
    assert not logged(weighed, "objectives/help/corr_short")


def test_the_card_and_the_record_of_a_run_say_what_its_rewards_are(tmp_path):
    nca = trainer(tmp_path, rows=reward_rows(2, 2))
    nca.reward_options = DataOptions(reward_weights={"help": 1, "short": -0.5}, scale_rewards="group").combination
    nca.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| `reward_weights` | help 1.0, short -0.5 |\n| `scale_rewards` | group |" in card
    assert "2412.01981" not in card
    assert nca._resume.run_identity()["scale_rewards"] == "group"
    assert DataOptions(score="honesty").combination == {}


def test_a_run_is_not_continued_with_other_weights(tmp_path):
    rows = [row | {"rewards": {"help": row["rewards"], "short": row["rewards"][::-1]}} for row in reward_rows(6, 2)]
    first = run(rows, tmp_path, save="steps", reward_weights={"help": 1, "short": 0.5})
    (tmp_path / "checkpoint-2").rename(tmp_path / "last")
    step = str(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-1 belongs to another run.*`data`"):
        run(rows, tmp_path, resume=step, reward_weights={"help": 1, "short": 0.6})
    again = run(rows, tmp_path, resume=step, reward_weights={"help": 2 / 2, "short": 1 / 2})
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in first if "loss" in line]
