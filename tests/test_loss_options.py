"""Each option that changes the loss reaches a run's loss, its gradient and its evaluations, by values from a loop."""

import math
from statistics import fmean

import pytest
import torch
from datasets import Dataset

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from test_trainer import logged, trainer

ROWS = reward_rows(4, [4, 2, 3], seed=8)
BASE = {
    "alpha": 0.5, "beta": 0.1, "loss_type": ["nca"], "loss_weights": None, "negative_weight": 1.0,
    "max_prompt_length": None, "max_length": 256, "reference_seed": 5,
}  # fmt: skip
# Options, of which each gives another loss than BASE
CHANGED = {
    "alpha": {"alpha": 2.0},
    "beta": {"beta": 0.4},
    "negative_weight": {"negative_weight": 0.25},
    "no negative term": {"negative_weight": 0.0},
    "loss_type": {"loss_type": ["infonca"]},
    "sft": {"loss_type": ["sft"]},
    "two losses": {"loss_type": ["nca", "sft"]},
    "loss_weights": {"loss_type": ["nca", "sft", "infonca"], "loss_weights": [0.5, 2.0, 3.0], "negative_weight": 3.0},
    "max_prompt_length": {"max_prompt_length": 6},
    "max_length": {"max_length": 40},
    "both lengths": {"max_length": 30, "max_prompt_length": 20},
    "ref_model": {"reference_seed": 6},
    "no ref_model": {"reference_seed": None},
}
# Options that change how it is computed, and not what it is
UNCHANGED = {
    "padded": {"layout": "padded"},
    "tokens_per_forward": {"tokens_per_forward": 40},
    "cached reference": {"precompute_ref_log_probs": True},
    "one batch": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def softmax(values: list[float]) -> list[float]:
    shares = [math.exp(value - max(values)) for value in values]
    return [share / sum(shares) for share in shares]


def completion_logps(model, row: dict, max_prompt_length: int | None, max_length: int) -> list[tuple[float, int]]:
    """(log-probability, tokens) of each completion, a conversation at a time, a prompt's end and what fits after it."""
    tokenizer, found = build_tokenizer(), []
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    start = prompt[-(max_prompt_length or max_length // 2) :]
    for completion in row["completions"]:
        whole = tokenizer.apply_chat_template(row["prompt"] + completion, return_dict=True)["input_ids"]
        ids = (start + whole[len(prompt) :])[:max_length]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append((sum(logps[t - 1, ids[t]].item() for t in range(len(start), len(ids))), len(ids) - len(start)))
    return found


def expected_loss(options: dict) -> float:
    """The mean over prompts (sft: over the tokens of the best completions), from the formulas in `losses`."""
    cut = options["max_prompt_length"], options["max_length"]
    policy, seed = build_model(build_tokenizer()), options["reference_seed"]
    reference = policy if seed is None else build_model(build_tokenizer(), seed=seed)
    values: dict[str, list[float]] = {"nca": [], "infonca": []}
    best_logps, best_tokens = 0.0, 0
    for row in ROWS:
        own, ref = (completion_logps(model, row, *cut) for model in (policy, reference))
        implicit = [options["beta"] * (a - b) for (a, _), (b, _) in zip(own, ref, strict=True)]
        targets = softmax([reward / options["alpha"] for reward in row["rewards"]])
        positive = sum(w * log_sigmoid(r) for w, r in zip(targets, implicit, strict=True))
        values["nca"].append(-positive - options["negative_weight"] * fmean(log_sigmoid(-r) for r in implicit))
        logs = map(math.log, softmax(implicit))
        values["infonca"].append(-sum(w * log for w, log in zip(targets, logs, strict=True)))
        logps, tokens = own[row["rewards"].index(max(row["rewards"]))]
        best_logps, best_tokens = best_logps + logps, best_tokens + tokens
    means = {name: fmean(own) for name, own in values.items()} | {"sft": -best_logps / best_tokens}
    weights = options["loss_weights"] or [1.0] * len(options["loss_type"])
    return sum(weight * means[name] for name, weight in zip(options["loss_type"], weights, strict=True))


def run(tmp_path, options: dict, how: dict) -> NCATrainer:
    given = dict(options)
    seed = given.pop("reference_seed")
    reference = {} if seed is None else {"ref_model": build_model(build_tokenizer(), seed=seed)}
    own = {"gradient_accumulation_steps": 2, "max_steps": 1, "per_device_eval_batch_size": 3, "eval_on_start": True,
           "eval_strategy": "steps", "optim": "sgd", "learning_rate": 2e-4, "max_grad_norm": 0.0}  # fmt: skip
    nca = trainer(tmp_path, rows=ROWS, eval_rows=ROWS, **reference, **(own | given | how))
    nca.train()
    return nca


@pytest.fixture(scope="module")
def base_loss() -> float:
    return expected_loss(BASE)


@pytest.mark.parametrize("name", [*CHANGED, *UNCHANGED])
def test_a_runs_loss_and_its_evaluations_are_what_a_loop_gives(name, base_loss, tmp_path):
    options = BASE | CHANGED.get(name, {})
    expected = expected_loss(options) if name in CHANGED else base_loss
    assert name in UNCHANGED or abs(expected - base_loss) > 1e-3, "the option changes nothing here"
    nca = run(tmp_path, options, UNCHANGED.get(name, {}))
    assert logged(nca)[0] == pytest.approx(expected, rel=1e-5)
    before, after = logged(nca, "eval_loss")
    assert before == pytest.approx(expected, rel=1e-5)
    # a step of SGD against a gradient of norm g lowers the loss by rate · g², up to the curvature
    assert (before - after) / (2e-4 * logged(nca, "grad_norm")[0] ** 2) == pytest.approx(1, rel=0.2)


def test_without_arguments_it_trains_the_papers_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nca = NCATrainer(
        build_model(build_tokenizer()), train_dataset=Dataset.from_list(ROWS), processing_class=build_tokenizer()
    )
    assert isinstance(nca.args, NCAConfig)
    args = nca.args
    assert (args.alpha, args.beta, args.loss_type, args.negative_weight) == (0.01, 0.01, ["nca"], 1.0)
    assert (args.max_length, args.max_prompt_length, args.output_dir) == (1024, 512, "LlamaForCausalLM-NCA")
    assert nca.data_collator.layout == "prefix_shared"
    batch = nca.data_collator([nca.train_dataset[i] for i in range(4)])
    with torch.no_grad(), nca.accelerator.autocast():
        loss = nca.compute_loss(nca.model, batch)
    assert loss.item() == pytest.approx(2 * math.log(2), abs=1e-5)  # the policy is its reference yet


@pytest.mark.parametrize("name", ["org/name", "runs/name", "runs/name/"])
def test_a_run_without_arguments_is_named_after_its_model(name):
    assert NCAConfig.of(None, name).output_dir == "name-NCA"
