"""Streams: each row counts once a pass, whatever is left over, and a stopped run goes on where it was."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from conftest import reward_rows
from nca_align.training.run_identity import at_start, run_identity
from test_resume import At, interrupt, result
from test_trainer import logged, trainer

# Plain descent shows a wrong scale of the gradients, which Adam would hide
OPTIONS = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6, "optim": "sgd",
    "learning_rate": 0.02, "max_grad_norm": 1e6,
}  # fmt: skip


def streamed(rows: list[dict], shards: int = 1):
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


def test_what_is_left_at_the_end_of_a_pass_is_a_step_of_its_own(tmp_path):
    """Two passes of five rows in steps of two: as the same rows, in their order, that are no stream."""
    rows = reward_rows(5, [4, 2, 3])
    whole = trainer(tmp_path, rows=rows, train_sampling_strategy="sequential", **OPTIONS)
    whole.train()
    nca = trainer(tmp_path, rows=streamed(rows), **OPTIONS)
    nca.train()
    assert len({*logged(whole)}) == 6
    assert logged(nca) == pytest.approx(logged(whole), abs=1e-6)
    assert logged(nca, "rewards/best") == pytest.approx(logged(whole, "rewards/best"), abs=1e-6)
    assert logged(nca, "num_tokens") == logged(whole, "num_tokens")
    weights = dict(whole.model.named_parameters())
    for name, value in nca.model.named_parameters():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_stream_goes_on_in_its_pass(step, tmp_path):
    """After the first pass of three steps, and within the second one, which transformers takes for the first."""
    own = OPTIONS | {"rows": streamed(reward_rows(5)), "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    whole = trainer(tmp_path / "whole", **own)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", **own, callbacks=[At("on_save", step, interrupt)]).train()
    resumed = trainer(tmp_path / "cut", **own)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    for name, value in result(whole)[1].items():
        assert torch.equal(result(resumed)[1][name], value), name


def test_a_pass_is_over_where_its_rows_are(tmp_path):
    """transformers would ask for batches until `max_steps`, and the processes would agree on each."""
    nca = trainer(tmp_path, rows=streamed(reward_rows(2)), **OPTIONS | {"max_steps": 4})
    asked, own = [], nca.get_batch_samples
    nca.get_batch_samples = lambda *args: asked.append(1) or own(*args)
    nca.train()
    assert len(asked) == 4 + 3  # a step each, and the end of each pass but the last


def test_what_decides_the_rows_of_a_step_belongs_to_a_run(tmp_path):
    """Shards that are dealt whole, and workers that read them side by side."""
    rows = reward_rows(4)
    found = {}
    for shards, workers in ((1, 2), (2, 0), (3, 2)):
        nca = trainer(tmp_path, rows=streamed(rows, shards), dataloader_num_workers=workers, **OPTIONS)
        found[shards] = run_identity(nca.args, nca.model, nca.train_dataset, processes=2, start=at_start(nca.model))
    assert found[1].keys().isdisjoint({"processes", "dataloader_num_workers"})
    assert found[2]["processes"] == 2
    assert "processes" not in found[3]
    assert found[3]["dataloader_num_workers"] == 2


def test_an_evaluation_of_a_stream_is_that_of_its_rows(tmp_path):
    rows = reward_rows(5, [4, 2, 3], seed=2)
    options = OPTIONS | {"max_steps": 1, "per_device_eval_batch_size": 2}
    whole = trainer(tmp_path, eval_rows=rows, **options)
    nca = trainer(tmp_path, eval_rows=streamed(rows, 2), **options)
    expected, found = whole.evaluate(), nca.evaluate()
    for name in (name for name in expected if "per_second" not in name and "time" not in name):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name


def test_columns_of_several_types_beside_the_rows_are_no_obstacle(tmp_path):
    """Lines of JSON have no types, and what is not trained on may be anything."""
    beside = [{"note": 1}, {"note": {"a": [1]}}, {"note": "x", "number": 1 << 70}, {}]
    rows = [row | beside[i % 4] for i, row in enumerate(reward_rows(8))]
    own = OPTIONS | {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }  # a checkpoint knows the first rows again
    nca = trainer(tmp_path, rows=IterableDataset.from_generator(lambda: iter(rows)), **own)
    nca.train()
    whole = trainer(tmp_path, rows=streamed(reward_rows(8)), **own)
    whole.train()
    assert logged(nca) == logged(whole)
