"""Labels: a loss of outcomes, one completion a prompt and more, its means and its figures, by values from loops."""

import json
import math
import re
from itertools import chain, product
from statistics import fmean

import pytest
import torch
from datasets import Dataset, IterableDataset

from conftest import build_model, build_tokenizer, labelled_rows
from nca_align import NCAConfig, NCATrainer, load_reward_dataset, write_report
from nca_align.batching.collator import RewardCollator
from nca_align.commands.compare.grid import expand
from nca_align.commands.compare.methods import build_trainer
from nca_align.commands.inspect.command import main as inspect_main
from nca_align.commands.inspect.tables import percent
from nca_align.commands.train.command import main as train_main
from nca_align.data import DataOptions, to_reward_dataset
from nca_align.errors import UserError
from nca_align.training.best_metric import check_best_metric, evaluated_names
from nca_align.training.objective import Objective
from nca_align.training.outcomes import Outcomes, outcome_figures
from test_loss_options import completion_logps, log_sigmoid
from test_trainer import logged, trainer

OF_LABELS = {"loss_type": "outcome", "alpha": None}
# five rows in steps of four: the last step of a pass has one
SINGLE, RAGGED = labelled_rows(5, 1, seed=3), labelled_rows(5, [1, 3, 2], seed=4)
HOW = {
    "padded": {"layout": "padded"},
    "tokens_per_forward": {"tokens_per_forward": 40},
    "cached reference": {"precompute_ref_log_probs": True},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


def implicit_rewards(rows, beta=0.1, seed=6):
    """Of each row's completions, from each model's own logits."""
    models = build_model(build_tokenizer()), build_model(build_tokenizer(), seed=seed)
    pi, ref = ([completion_logps(model, row, None, 256) for row in rows] for model in models)
    return [[beta * (a - b) for (a, _), (b, _) in zip(*pair, strict=True)] for pair in zip(pi, ref, strict=True)]


def cross_entropy(rows, implicit, completion_mean):
    terms = [
        [-y * log_sigmoid(r) - (1 - y) * log_sigmoid(-r) for y, r in zip(row["rewards"], own, strict=True)]
        for row, own in zip(rows, implicit, strict=True)
    ]
    return fmean(chain(*terms)) if completion_mean else fmean(map(fmean, terms))


@pytest.fixture(scope="module")
def expected():
    """The losses and figures of rows that a run has before its first step."""
    found = {}
    for name, rows in (("single", SINGLE), ("ragged", RAGGED)):
        implicit = implicit_rewards(rows)
        found[name] = {mean: cross_entropy(rows, implicit, mean) for mean in (False, True)}
        found[name]["figures"] = [*chain(*implicit)], [y for row in rows for y in row["rewards"]]
    return found


@pytest.mark.parametrize(
    ("rows", "completion_mean", "how"),
    [("ragged", mean, how) for mean in (False, True) for how in HOW] + [("single", True, how) for how in HOW],
)
def test_a_runs_loss_and_figures_are_what_a_loop_gives(rows, completion_mean, how, expected, tmp_path):
    given, found = {"single": SINGLE, "ragged": RAGGED}[rows], expected[rows]
    assert rows == "single" or abs(found[True] - found[False]) > 1e-3, "the mean changes nothing here"
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | HOW[how]
    nca = trainer(
        tmp_path, rows=given, eval_rows=given, ref_model=build_model(build_tokenizer(), seed=6),
        completion_mean=completion_mean, max_steps=2, learning_rate=0.0, per_device_eval_batch_size=2,
        eval_strategy="steps", eval_steps=2, **OF_LABELS, **batches,
    )  # fmt: skip
    assert nca.args.alpha is None
    nca.train()
    weights = [4, 1] if rows == "single" or not completion_mean else None
    losses = logged(nca)
    if weights:  # of the steps' rows, each once
        assert sum(w * loss for w, loss in zip(weights, losses, strict=True)) / 5 == pytest.approx(
            found[completion_mean], rel=1e-5
        )
    assert logged(nca, "eval_loss")[0] == pytest.approx(found[completion_mean], rel=1e-5)
    for name, value in figures_by_loops(*found["figures"]).items():
        assert logged(nca, f"eval_outcome/{name}")[0] == pytest.approx(value, rel=1e-5), name
    names = {name for line in nca.state.log_history for name in line}
    assert {"logratios/right", "logratios/wrong", "rewards/right"} <= names
    assert not any(name.split("/")[0] in ("eval_target", "eval_kl", "eval_calibration") for name in names)
    compared = {name for name in names if re.search("best|worst|rank_|accuracies|margins|top1|tau|chosen", name)}
    assert bool(compared) == (rows == "ragged")


@pytest.mark.parametrize("labels", [[[0.0, 0.3], [0.0, 1.0], [0.6, 0.0]], [[0.0, 0.0], [0.5, 0.5], [0.3, 0.0]]])
def test_sft_beside_labels_leaves_out_prompts_without_a_right_completion(labels):
    given, lengths = torch.tensor(labels), torch.tensor([[3, 4], [5, 6], [7, 8]])
    logps = (-lengths * torch.tensor([[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]])).requires_grad_()
    batch = {"rewards": given, "given_rewards": given, "valid": torch.ones_like(given, dtype=torch.bool),
             "lengths": lengths, "weights": torch.ones(3)}  # fmt: skip
    right = [(i, row.index(max(row))) for i, row in enumerate(labels) if max(row) > 0.5]
    tokens = sum(int(lengths[at]) for at in right)
    expected = sum(-logps[at].item() for at in right) / tokens if right else 0.0
    objective = Objective(["outcome", "sft"], [0.0, 1.0], None, 0.1)
    counts = objective.count_prompts(batch)
    assert counts.tolist() == [3, tokens, 6]
    for window in (counts, None):
        loss = objective.loss_share(logps, None, torch.zeros(3, 2), batch, window)
        assert loss.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert {tuple(at) for at in gradient.nonzero().tolist()} == {*right}
    assert Objective(["nca", "sft"], [1, 1], 0.1, 0.1).count_prompts(batch)[1] > tokens


def test_a_step_goes_down_the_gradient_of_the_completion_mean(tmp_path):
    """Whatever the micro-batches: a step of SGD moves the weights alike, and lowers the loss by rate · g²."""
    moved = []
    for batches in ((5, 1), (1, 5), (2, 3)):
        nca = trainer(
            tmp_path, rows=RAGGED, eval_rows=RAGGED, ref_model=build_model(build_tokenizer(), seed=6),
            completion_mean=True, max_steps=1, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0,
            eval_on_start=True, eval_strategy="steps", per_device_train_batch_size=batches[0],
            gradient_accumulation_steps=batches[1], **OF_LABELS,
        )  # fmt: skip
        nca.train()
        before, after = logged(nca, "eval_loss")
        assert logged(nca)[0] == pytest.approx(before, rel=1e-5)
        assert (before - after) / (1e-3 * logged(nca, "grad_norm")[0] ** 2) == pytest.approx(1, rel=0.2)
        moved.append(nca.model.lm_head.weight.detach().clone())
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-5, atol=1e-7)


def figures_by_loops(rewards, labels):
    """Each figure by its definition, a completion or a pair of completions at a time."""
    p = [1 / (1 + math.exp(-r)) for r in rewards]
    pairs = [
        (a * (1 - b), (r > s) + 0.5 * (r == s))
        for (r, a), (s, b) in product(zip(rewards, labels, strict=True), repeat=2)
    ]
    bins = [[(q, y) for q, y in zip(p, labels, strict=True) if min(int(q * 10), 9) == b] for b in range(10)]
    return {
        "accuracy": fmean(0.5 if r == 0 else y if r > 0 else 1 - y for r, y in zip(rewards, labels, strict=True)),
        "brier": fmean((q - y) ** 2 for q, y in zip(p, labels, strict=True)),
        "ece": sum(len(b) / len(p) * abs(fmean(q for q, _ in b) - fmean(y for _, y in b)) for b in bins if b),
        "auc": sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs),
    }


def test_figures_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    rewards = (3 * torch.randn(200, generator=generator)).round(decimals=1).tolist()  # with ties, and zeros
    labels = (torch.randint(0, 5, (200,), generator=generator) / 4).tolist()
    assert 0.0 in rewards
    for y in (labels, [float(y > 0.4) for y in labels]):
        found = outcome_figures(rewards, y)
        assert {name.removeprefix("outcome/"): value for name, value in found.items()} == pytest.approx(
            figures_by_loops(rewards, y), rel=1e-12
        )
    assert outcome_figures([40.0, -40.0, 40.0], [1.0, 0.0, 1.0]) == pytest.approx(
        {"outcome/accuracy": 1, "outcome/auc": 1, "outcome/brier": 0, "outcome/ece": 0}, abs=1e-12
    )
    assert "outcome/auc" not in outcome_figures([1.0, -1.0], [1.0, 1.0])


def test_figures_of_parts_are_those_of_the_whole_without_what_is_repeated():
    generator = torch.Generator().manual_seed(1)
    pi, ref = (torch.randn(8, 3, generator=generator) for _ in range(2))
    labels = (torch.rand(8, 3, generator=generator) > 0.5).float()
    mask = torch.arange(3) < torch.tensor([1, 2, 3, 1, 1, 3, 2, 1]).unsqueeze(1)
    parts, whole, counted = Outcomes(), Outcomes(), torch.ones(8, dtype=torch.bool)
    whole.add(pi, ref, labels, mask, 0.5, counted)
    for rows in ([0, 1, 2], [3], [4, 5, 6, 7], [0, 1]):
        own = counted[rows] if len(rows) != 2 else ~counted[rows]  # the last are repeats
        parts.add(pi[rows], ref[rows], labels[rows], mask[rows], 0.5, own)
    assert parts.gather() == pytest.approx(whole.gather())
    assert parts.gather() == {}


# What is refused

REFUSED = {
    "alpha": ({"alpha": 0.01}, "`alpha` is 0.01, but `loss_type` is outcome, which has no targets to soften"),
    "alpha beside sft": (
        {"alpha": 0.5, "loss_type": ["outcome", "sft"]}, "`alpha` is 0.5, but `loss_type` is outcome+sft",
    ),
    "mean": ({"loss_type": "nca", "completion_mean": True}, "`completion_mean` is True, but `loss_type` is nca"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_mean_nothing_are_refused(name):
    own, message = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(message)):
        NCAConfig("x", **{"use_cpu": True} | OF_LABELS | own)


def test_alpha_is_none_where_nothing_reads_it_and_the_papers_elsewhere():
    def alpha(*names):
        return NCAConfig("x", use_cpu=True, bf16=False, loss_type=list(names)).alpha

    assert [alpha("outcome"), alpha("outcome", "sft")] == [None, None]
    assert [alpha("nca"), alpha("sft"), alpha("nca", "outcome"), alpha("all_pairs")] == [0.01] * 4


@pytest.mark.parametrize("tokenised", [False, True])
@pytest.mark.parametrize(("value", "shown"), [(1.5, "1.5"), (-0.5, "-0.5")])
def test_a_label_outside_its_range_is_named_before_the_model_is_read(value, shown, tokenised, tmp_path):
    rows = labelled_rows(4, [1, 2])
    rows[3]["rewards"][1] = value
    if tokenised:
        ids = {"prompt_ids": [5, 6], "completion_ids": [[7], [8]]}
        rows = [ids | {"rewards": row["rewards"], "completion_ids": [[7]] * len(row["rewards"])} for row in rows]
    message = f"`train`, row 3: `rewards[1]` is {shown}; `loss_type` outcome needs labels from 0 (wrong) to 1 (right)"
    with pytest.raises(UserError, match=re.escape(f"{message}: divide ratings by their highest value")):
        trainer(tmp_path, "no such model", rows=rows, **OF_LABELS)


def test_a_label_of_a_stream_is_named_in_its_batch():
    collator = RewardCollator(0, labels=True, min_completions=1)
    row = {"prompt_ids": [5], "completion_ids": [[6], [7]], "rewards": [1.0, 3.0]}
    good, bad = row | {"rewards": [1.0, 0.0], "row_number": 70}, row | {"row_number": 71}
    message = "`rewards[1]` of row 71 is 3; `loss_type` outcome needs labels"
    with pytest.raises(UserError, match=re.escape(message)):
        collator([good, bad])
    with pytest.raises(UserError, match=re.escape("`rewards` of row 71 is [1.0, inf]; each must be finite")):
        RewardCollator(0)([good, bad | {"rewards": [1.0, math.inf]}])
    row = {"prompt_ids": [5], "completion_ids": [[6]], "rewards": [3.0]}
    with pytest.raises(UserError, match="has 1 valid completion"):
        RewardCollator(0)([row])


@pytest.mark.parametrize("loss", [["nca"], ["outcome", "sft"], ["outcome", "nca"]])
def test_every_other_loss_refuses_one_completion(loss, tmp_path):
    message = (
        "`train`, row 0: `completions` has 1; there must be at least two to compare (`loss_type: outcome` trains on "
        "one, read with `min_completions: 1`)"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        trainer(tmp_path, "no such model", rows=SINGLE, loss_type=loss, alpha=None)


SCALING = {
    "scale_rewards": {"scale_rewards": "group"},
    "multi_objective_aggregation": {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1, 2]},
    "on_missing": {"on_missing": "leave_out"},
}


@pytest.mark.parametrize("name", SCALING)
def test_options_that_change_labels_are_refused_before_anything_is_read(name, tmp_path, capsys):
    config, message = tmp_path / "run.yaml", f"`{name}` is {SCALING[name][name]}, but the rewards are labels"
    given = {"dataset_name": "no such data", "model_name_or_path": "no such model", **SCALING[name]}
    config.write_text(json.dumps({**given, "loss_type": "outcome", "output_dir": str(tmp_path), "use_cpu": True}))
    for main in (train_main, inspect_main):
        assert main(["--config", str(config)]) == 2
        assert message in capsys.readouterr().err
    expand({**given, "use_cpu": True}, {"method": ["nca", "infonca"]}, "a.yaml")
    with pytest.raises(UserError, match=re.escape(message)):
        expand({**given, "use_cpu": True}, {"method": ["nca", "outcome"]}, "a.yaml")


def test_labels_that_are_all_alike_are_told(tmp_path, caplog):
    """Scaled beforehand they are 0 wherever a prompt has no spread, and each one a label still."""
    rows, told = tmp_path / "rows.jsonl", "every label is 0, so every completion counts as wrong"
    Dataset.from_list(SINGLE).to_json(rows)
    for scale, said in (("none", False), ("group", True)):
        read = load_reward_dataset(
            str(rows), split="train", min_completions=1, scale_rewards=scale, validation_fraction=0
        )
        trainer(tmp_path, rows=read, **OF_LABELS)
        assert (told in caplog.text) is said


def alike(rows):
    return [row | {"rewards": [1.0] * len(row["rewards"])} for row in rows]


BEST = {
    "single": ("rewards/accuracies", SINGLE, "gives, each of a single completion; use loss, or one of"),
    "spelling": ("rewards/acuracies", RAGGED, "gives (did you mean `rewards/accuracies`?); use loss, or one of"),
    "labels alike": ("eval_outcome/auc", alike(RAGGED), "use loss, or one of"),
    "one of several": ("eval_b_rewards/best", {"a": RAGGED, "b": SINGLE}, ", each of a single completion"),
    "several": ("eval_a_rewards/best", {"a": RAGGED, "b": SINGLE}, None),
    "by a later row": ("rewards/rank_3", [*SINGLE * 60, *RAGGED], None),
    "of labels": ("outcome/auc", SINGLE, None),
    "of one label": ("rewards/wrong", alike(SINGLE), "use loss, or one of"),
    "callback's": ("mine/figure", SINGLE, None),
}


@pytest.mark.parametrize(("own", "told"), [
    ({"load_best_model_at_end": True}, "loss"), ({"metric_for_best_model": "eval_rewards/best"}, "rewards/best"),
])  # fmt: skip
def test_a_best_metric_of_several_evaluation_sets_says_of_which(own, told, tmp_path):
    """Also transformers' default: the run ended at its first evaluation."""
    rows = Dataset.from_list(RAGGED)
    args = NCAConfig(
        str(tmp_path), use_cpu=True, bf16=False, loss_type="outcome", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, **own,
    )  # fmt: skip
    with pytest.raises(UserError, match=f"Give the one of a_{told}, b_{told} that decides"):
        NCATrainer("no such model", args=args, train_dataset=rows, eval_dataset={"a": rows, "b": rows})
    args.metric_for_best_model = f"eval_b_{told}"
    check_best_metric(args, {"a": rows, "b": rows})


@pytest.mark.parametrize("name", BEST)
def test_a_best_metric_that_these_rows_cannot_give_is_refused_before_the_model_is_read(name, tmp_path):
    metric, rows, message = BEST[name]
    several = isinstance(rows, dict)
    rows = {key: Dataset.from_list(own) for key, own in rows.items()} if several else Dataset.from_list(rows)
    own = {"eval_strategy": "steps", "metric_for_best_model": metric, "loss_type": "outcome"}
    args = NCAConfig(str(tmp_path), use_cpu=True, bf16=False, **own)
    if message is None:
        return check_best_metric(args, rows)
    with pytest.raises(UserError, match=re.escape(f"`metric_for_best_model` is {metric}, which no evaluation")) as told:
        NCATrainer("no such model", args=args, train_dataset=Dataset.from_list(SINGLE), eval_dataset=rows)
    assert message in str(told.value)


def test_the_names_that_are_foreseen_are_those_that_an_evaluation_logs(tmp_path):
    nca = trainer(tmp_path, rows=RAGGED, eval_rows=RAGGED, beta=0.1, **OF_LABELS)
    metrics = {name.removeprefix("eval_") for name in nca.evaluate() if "/" in name}
    foreseen = evaluated_names(nca.args, Dataset.from_list(RAGGED), "none")
    assert metrics == foreseen - {"rewards/kendall_tau"}  # not before the first step, where all rewards are equal


def test_a_best_metric_that_an_evaluation_does_not_give_is_one_sentence(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "rewardz/best", "max_steps": 1}
    nca = trainer(tmp_path, rows=RAGGED, eval_rows=RAGGED, **options, **OF_LABELS)
    with pytest.raises(
        UserError, match=r"is rewardz/best, which this evaluation doesn't give \(did you mean `rewards/best"
    ):
        nca.train()


# Data


def test_an_invalid_label_is_named_by_its_row_of_the_file_or_dropped(tmp_path):
    """Whatever rows are held out before it."""
    rows = labelled_rows(40, 1, seed=3)
    rows[39]["rewards"] = [2.0]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    path, options = str(tmp_path / "rows.jsonl"), {"validation_fraction": 0.25, "labels": True, "min_completions": 1}
    with pytest.raises(UserError, match=re.escape("`train`, row 39: `rewards[0]` is 2; `loss_type` outcome needs")):
        load_reward_dataset(path, **options)
    read = load_reward_dataset(path, **options, on_invalid="drop")
    assert sum(map(len, read.values())) == 39
    assert len(read["train"]) < 39
    read = to_reward_dataset(Dataset.from_list(rows), DataOptions(min_completions=1))
    dropped = trainer(tmp_path, rows=read, on_invalid="drop", **OF_LABELS)
    assert len(dropped.train_dataset) == 39


def test_labels_are_read_from_booleans_and_single_completions(tmp_path):
    file = tmp_path / "rows.jsonl"
    Dataset.from_list([row | {"rewards": [bool(y) for y in row["rewards"]]} for row in SINGLE]).to_json(file)
    with pytest.raises(UserError, match="there must be at least two to compare"):
        load_reward_dataset(str(file), split="train", validation_fraction=0)
    read = load_reward_dataset(str(file), split="train", validation_fraction=0, min_completions=1)
    assert read["rewards"][:] == [[float(y > 0)] for row in SINGLE for y in row["rewards"]]
    dropped = load_reward_dataset(str(file), split="train", validation_fraction=0, min_completions=1, on_invalid="drop")
    assert len(dropped) == 5
    with pytest.raises(UserError, match="`min_completions` is 0; it must be at least 1"):
        DataOptions(min_completions=0)
    with pytest.raises(UserError, match="`completions` has 1; there must be at least 3"):
        to_reward_dataset(Dataset.from_list(SINGLE), DataOptions(min_completions=3))


def test_a_stream_of_single_completions_trains(tmp_path):
    stream = Dataset.from_list(SINGLE).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    nca = trainer(
        tmp_path, rows=stream, eval_rows=SINGLE, max_steps=3, eval_strategy="steps", eval_steps=3, **OF_LABELS
    )
    nca.train()
    assert logged(nca)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(nca, "eval_loss")[0] < 0.9 * math.log(2)
    assert 0 <= logged(nca, "eval_outcome/auc")[0] <= 1


def test_in_a_comparison_alpha_belongs_to_the_losses_that_have_one(tmp_path):
    rows = Dataset.from_list(labelled_rows(4, 2))
    for given in ({"alpha": 0.3}, {"loss_type": "outcome", "completion_mean": True}):
        args = NCAConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to="none", **given)
        for method in ("outcome", "nca"):
            model, tokenizer = build_model(build_tokenizer()), build_tokenizer()
            nca = build_trainer(method, model, args, rows, tokenizer)
            assert nca.args.alpha == (None if method == "outcome" else given.get("alpha", 0.01))
            assert nca.args.completion_mean == (method == "outcome" and args.completion_mean)


@pytest.mark.parametrize("columns", [("completions", "steps"), ("completions",), ("steps",)])
def test_labelled_rollouts_are_read(columns):
    steps = [["Step 1: a", "Step 2: b"], ["Step 1: c"]]
    row = {"prompt": "p", "steps": steps, "completions": ["Step 1: a\n\nStep 2: b", "Step 1: c"], "dataset": "MATH"}
    row = {name: value for name, value in row.items() if name in ("prompt", "dataset", *columns)}
    rows = Dataset.from_list([row | {"correctness": [True, False, True]}])  # one more than there are
    read = to_reward_dataset(rows)[0]
    assert read["prompt"] == [{"role": "user", "content": "p"}]
    assert [own[0]["content"] for own in read["completions"]] == ["Step 1: a\n\nStep 2: b", "Step 1: c"]
    assert read["rewards"] == [1.0, 0.0]
    assert read.get("steps") == (steps if "steps" in columns else None)
    assert "correctness" not in read
    with pytest.raises(UserError, match=f"row 0: `correctness` has 1 values for 2 {columns[0]}"):
        to_reward_dataset(Dataset.from_list([row | {"correctness": [True]}]))


def test_trls_unpaired_rows_are_labels():
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
    read = to_reward_dataset(Dataset.from_list(rows), DataOptions(min_completions=1))
    assert read["rewards"][:] == [[1.0], [0.0]]


@pytest.mark.parametrize("k", [1, [1, 3, 2]])
def test_single_completions_are_inspected_as_the_file_of_the_training_says(k, model_dir, tmp_path, capsys):
    rows, config = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    Dataset.from_list(labelled_rows(12, k)).to_json(rows)
    model = f"model_name_or_path: {model_dir}"
    config.write_text(f"dataset_name: {rows}\nloss_type: outcome\noutput_dir: {tmp_path}\n{model}\n")
    assert inspect_main(["--config", str(config), "--html", str(tmp_path / "page.html")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    share = 100 if k == 1 else 33
    assert f"{share}% of the prompts have a single completion, on which `loss_type: outcome` alone trains." in text
    right = [[y > 0.5 for y in row["rewards"]] for row in labelled_rows(12, k)]
    known = [percent(sum(map(own, right)) / 12) for own in (lambda row: not any(row), all)]
    assert re.search(rf"labels with a mean of 0.*: {known[0]}.* no right completion, and {known[1]} right ones", text)
    assert "α" not in text
    assert "α" not in re.sub("<style>.*</style>", "", (tmp_path / "page.html").read_text(), flags=re.S)
    assert inspect_main(["--config", str(config), "--example", "0"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"completion 0: label (0|1|0\.\d+) ", text)
    assert "target" not in text
    config.write_text(config.read_text().replace("outcome", "nca"))
    assert inspect_main(["--config", str(config), "--min_completions", "1"]) == 0
    assert "Targets softmax(rewards / α)" in capsys.readouterr().out
    assert inspect_main(["--dataset_name", str(rows)]) == 2
    assert "read with `min_completions: 1`" in capsys.readouterr().err


def test_a_run_of_single_completions_from_the_command_to_its_report(model_dir, tmp_path, capsys):
    """Its log lines, verdict, plot and page say what there is of labels, and nothing of ranks."""
    for name, rows in (("train", labelled_rows(12, 1, seed=5)), ("test", labelled_rows(8, 1, seed=6))):
        rows = [row | {"rewards": {"correct": row["rewards"], "short": row["rewards"]}} for row in rows]
        Dataset.from_list(rows).to_json(tmp_path / f"{name}.jsonl")
    run = tmp_path / "run"
    options = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path, "output_dir": run, "loss_type": "outcome",
        "max_steps": 2, "logging_steps": 1, "beta": 0.1, "learning_rate": 1e-3, "use_cpu": "true",
        "save_strategy": "no", "report_to": "none", "max_length": 128,
        "reward_weights": '{"correct": 0.75, "short": 0.25}',
    }  # fmt: skip
    assert train_main([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 0
    text = capsys.readouterr().out
    assert re.search(r"held-out:  loss 0\.\d+  log-ratio right [+-]\S+  wrong [+-]\S+  right above wrong \d+%", text)
    assert re.search(r"Log-ratio: [+-]\S+ nats of right completions, [+-]\S+ nats of wrong completions", text)
    assert re.search(r"A right completion is above a wrong one, of any prompt, \d+ % of the time \(AUC", text)
    assert "best completion" not in text
    assert (run / "curves.png").exists()
    card = (run / "README.md").read_text()
    for part in (
        "trained on right and wrong completions by", "12 prompts with 1 completion each.", "| `loss_type` | outcome |",
        "| `reward_weights` | correct 0.75, short 0.25 |", "abs/2412.01981", "@article{yuan2024free,",
    ):  # fmt: skip
        assert part in card
    assert not re.search("`alpha`|`negative_weight`|`scale_rewards`|several", card)
    page = write_report([run], tmp_path / "report")[0].read_text()
    assert "Right and wrong completions told apart" in page
    assert "Implicit reward by rank" not in page
