"""`nca-align train --dry_run`: a plan that needs no weights, refuses what the run refuses, and suggests what fits."""

import importlib
import json
import os
import re
from pathlib import Path

import pandas
import pytest
import yaml
from datasets import Dataset, DatasetDict

import test_recipes as recipes
from conftest import reward_rows, slow_but
from nca_align import NCAConfig
from nca_align.commands.train import command
from nca_align.commands.train.dry_run import _bytes
from nca_align.commands.train.plan_text import Lengths, plan_text, steps_of, verdict
from nca_align.data import DataOptions
from nca_align.data.sample import read_sample
from nca_align.errors import UserError
from nca_align.models.memory import GIB
from nca_align.options import says_true
from nca_align.training.launch import Launch, alone, read_launch
from test_memory_plan import planner, rows, setup

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
main = command.main


def write_rows(folder, number) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(number))))
    return str(folder / "rows.jsonl")


@pytest.fixture
def files(model_dir, tmp_path) -> dict[str, str]:
    return {
        "model_name_or_path": model_dir, "dataset_name": write_rows(tmp_path, 9),
        "output_dir": str(tmp_path / "run"), "dry_run": "true", "validation_fraction": "0",
    }  # fmt: skip


def plan(files, capsys, **own) -> str:
    argv = [part for name, value in {**files, **own}.items() for part in (f"--{name}", str(value))]
    assert main(argv) == 0
    return capsys.readouterr().out


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(importlib.import_module("nca_align.trainer").NCATrainer, "__init__", refuse)


def test_a_plan_reads_no_weights_and_writes_nothing(files, capsys, no_weights, tmp_path):
    before, environment = sorted(tmp_path.rglob("*")), dict(os.environ)
    text = plan(files, capsys, per_device_train_batch_size=2, num_train_epochs=2, use_cpu="true")
    assert sorted(tmp_path.rglob("*")) == before
    assert dict(os.environ) == environment
    for line in (
        "43,168 weights, float32; 43,168 trained.", "9 rows read, K", "Layout: prefix_shared, each shared token once.",
        "Launch: one process.", "Steps: 10 (2 × 9 prompts), 2 prompts each (2 × 1 × 1)", "  weights ", "  gradients ",
        "  optimizer ", "  activations at the longest rows ", "  head: ", "  in all ", "  with a fifth more ",
    ):  # fmt: skip
        assert line in text
    assert text.splitlines()[-1].startswith("Verdict: fits ")


def test_every_true_asks_for_it_and_no_other_word(tmp_path):
    (tmp_path / "o.yaml").write_text("dry_run: true")
    (tmp_path / "t.yaml").write_text("dry_run: 'Yes'")
    (tmp_path / "n.yaml").write_text("dry_run: false")
    (tmp_path / "f.yaml").write_text("dry_run: 'no'")
    with_file, text, false, no = (["--config", str(tmp_path / f"{name}.yaml")] for name in "otnf")
    words = [["--dry_run", word] for word in ("true", "True", "TRUE", "yes", "Yes", "1", "t", "y")]
    for argv in (["--dry_run"], ["--dry-run"], ["--dry_run=True"], ["--dry-run=1"], with_file, text, *words):
        assert says_true(argv, "dry_run"), argv
    words = [["--dry_run", word] for word in ("false", "False", "no", "0", "maybe", "")]
    for argv in ([], ["--beta", "1"], [*with_file, "--dry_run", "False"], false, no, *words):
        assert not says_true(argv, "dry_run"), argv


@pytest.mark.parametrize("words", [["--dry_run", "True"], ["--dry_run", "yes"], ["--dry_run=1"], "file"])
def test_a_plan_never_trains(files, capsys, words, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_train", lambda *_: pytest.fail("training began"))
    del files["dry_run"]
    (tmp_path / "o.yaml").write_text("dry_run: true")
    words = ["--config", str(tmp_path / "o.yaml")] if words == "file" else words
    argv = [part for name, value in files.items() for part in (f"--{name}", value)] + words
    assert main(argv) == 0
    assert "Verdict: " in capsys.readouterr().out
    monkeypatch.setattr(command, "says_true", lambda *_: False)  # even where it is seen too late
    assert main(argv) == 2
    assert "`dry_run` is True, but no plan was begun" in " ".join(capsys.readouterr().err.split())


RECIPES = {path.stem: path for path in sorted([*CONFIGS.glob("*_mistral7b.yaml"), *CONFIGS.glob("recipes/*.yaml")])}


@pytest.mark.parametrize("name", slow_but(RECIPES, "nca_mistral7b", "nca_qwen3.5-4b_ultrafeedback"))
def test_every_recipe_has_a_plan(name, tmp_path, capsys, monkeypatch):
    """Of the recipe's own class and options, with a config and a tokenizer alone in the model's folder."""
    monkeypatch.setattr(recipes.transformers.PreTrainedModel, "save_pretrained", save_config)
    path = RECIPES[name]
    recipes.save_model(recipes.model_of(path), tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.safetensors"))
    recipe = yaml.safe_load(path.read_text())
    recipes.save_data(recipe["dataset_name"], tmp_path / "data")
    text = plan(
        {"config": path, "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data",
         "output_dir": tmp_path / "run", "dry_run": "true", "launch": CONFIGS / "accelerate" / "fsdp2.yaml",
         "device_memory": "24GB"}, capsys,
    )  # fmt: skip
    layout = re.search(r"^layout: auto +# (\w+)", path.read_text(), re.M)[1]
    assert f"Layout: {layout}, " in text
    assert re.search(rf"K (\d(–| to ))?{recipes.DATA[recipe['dataset_name']][2]}", text)
    assert re.search(rf"\(1 × {recipe['gradient_accumulation_steps']} × 8\)", text)
    assert ("in 4 bits" in text) is recipe.get("load_in_4bit", False)
    assert "Launch: 8 processes, FSDP2." in text
    assert "Verdict: fits 22.4 GiB" in text


def save_config(model, folder):
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def test_the_quickstart_has_a_plan(files, capsys):
    text = plan(files, capsys, config=CONFIGS / "quickstart.yaml", eval_scorer="nca_align.scorers:vader",
                validation_fraction=0.3)  # fmt: skip
    assert "an adapter of" in text


# The launch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one_gpu", Launch(1)),
        ("multi_gpu", Launch(8)),
        ("fsdp2", Launch(8, "FSDP2")),
        ("zero3", Launch(8, "ZeRO-3")),
    ],
)
def test_the_launch_files_are_read(name, expected):
    path = str(CONFIGS / "accelerate" / f"{name}.yaml")
    assert Launch.of(read_launch(path)) == expected
    assert Launch.of(read_launch(path, 16)).processes == 16


def test_the_environment_of_accelerate_is_read(files, capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere",
                        "MASTER_PORT": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    text = plan(files, capsys)  # waits for no other process
    assert "Launch: 4 processes, FSDP2." in text
    assert re.search(r"\(\d+ × 1 × 4\)", text)
    assert os.environ["WORLD_SIZE"] == "4"
    monkeypatch.setenv("RANK", "1")
    assert plan(files, capsys) == ""


def test_offloading_and_deepspeeds_own_file(tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    (tmp_path / "a.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 2\n"
        f"deepspeed_config: {{deepspeed_config_file: {tmp_path}/ds.json}}"
    )
    assert Launch.of(read_launch(str(tmp_path / "a.yaml"))) == Launch(2, "ZeRO-2", offloads_optimizer=True)
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match=r"can't be read as JSON .*give the path of DeepSpeed's own configuration"):
        Launch.of(read_launch(str(tmp_path / "a.yaml")))
    (tmp_path / "b.yaml").write_text(
        "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_offload_params: true}"
    )
    assert Launch.of(read_launch(str(tmp_path / "b.yaml"))) == Launch(1, "FSDP2", True, True)


def test_alone_sets_back_what_it_took(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with alone({"FSDP_VERSION": "2", "WORLD_SIZE": "9"}):
        assert "RANK" not in os.environ
        assert "WORLD_SIZE" not in os.environ
        assert os.environ["FSDP_VERSION"] == "2"
    assert os.environ["RANK"] == "3"
    assert "FSDP_VERSION" not in os.environ


def test_cards_that_are_not_here_are_planned_in_half_precision(files, capsys):
    on_cards = plan(files, capsys, device_memory="24GB", bf16="true", tf32="true", dtype="bfloat16")
    assert "Verdict: fits 22.4 GiB" in on_cards
    assert "a process" not in on_cards
    assert plan(files, capsys, device_memory="24GB", fp16="true", dtype="bfloat16") == on_cards
    assert plan(files, capsys, device_memory="24GB", dtype="bfloat16") == on_cards
    assert "Memory of this machine" in plan(files, capsys, use_cpu="true")
    assert "it takes cards of" in plan(files, capsys, devices=2)


@pytest.mark.parametrize("bfloat16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("own", [{}, {"bf16": "true"}, {"use_cpu": "false"}, {"fp16": "true", "tf32": "true"}])
def test_a_machine_without_cards_plans_for_cards_where_none_are_named(files, capsys, own, bfloat16, monkeypatch):
    monkeypatch.setattr("nca_align.device.computes_bfloat16", lambda on_cpu: bfloat16)  # whatever its CPU is
    text = plan(files, capsys, dtype="bfloat16", **own)
    assert text == plan(files, capsys, dtype="bfloat16")
    assert "Memory of the card" in text
    assert re.search(r"Verdict: it takes cards of \S+ GiB; `--device_memory 24GB` names one", text.splitlines()[-1])


def test_options_that_need_cards_or_processes_have_a_plan_without(files, capsys, tmp_path):
    config = tmp_path / "o.yaml"
    config.write_text(
        "ddp_backend: nccl\nactivation_offloading: true\ngradient_checkpointing: true\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false, offload: true}\n"
    )
    text = plan(files, capsys, config=config, device_memory="24GB")
    assert "Verdict: fits 22.4 GiB" in text
    assert "  activations " not in text  # they lie in the host's memory
    other = plan(files, capsys, gradient_checkpointing="true", ddp_backend="gloo", device_memory="24GB")
    assert "  activations " in other
    kwargs = '{"use_reentrant": false, "offload": true}'
    flags = {"gradient_checkpointing_kwargs": kwargs, "gradient_checkpointing": "true", "device_memory": "24GB"}
    assert plan(files, capsys, **flags) == other


def test_a_plan_names_what_it_does_not_count(files, capsys):
    plain = plan(files, capsys, per_device_eval_batch_size=3, device_memory="24GB", gradient_checkpointing="false")
    assert "Not counted: evaluation's batches (`per_device_eval_batch_size` 3).\n" in plain
    own = {"launch": CONFIGS / "accelerate" / "fsdp2.yaml", "optim": "adamw_8bit", "per_device_train_batch_size": 2}
    text = plan(files, capsys, device_memory="24GB", precompute_ref_log_probs="true", **own)
    for what in ("the reference's pass (8 prompts", "`every_n_layers`", "`fsdp_reshard_after_forward: false`",
                 "`NO_WRAP` and HSDP", "what `optim: adamw_8bit` of bitsandbytes does under FSDP"):  # fmt: skip
        assert what in text


# What is refused


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"load_in_4bit": "true"}, "leave no weight that can be trained"),
        ({"eval_scorer": "nca_align.scorers:vader", "launch": CONFIGS / "accelerate/fsdp2.yaml"}, "shard the model"),
        ({"max_length": 4, "max_prompt_length": 3}, "which cuts every completion"),
        ({"device_memory": "big"}, "`device_memory` is 'big', but must be a finite number"),
        ({"devices": 0}, "`devices` is 0, but must be at least 1"),
        ({"launch": "no.yaml"}, "`launch` no.yaml can't be read"),
        ({"launch": CONFIGS / "quickstart.yaml"}, "`distributed_type` None"),
        ({"model_name_or_path": "./none"}, "there is no such folder"),
        ({"dataset_train_split": "other"}, "the split `other` is not in the data set"),
        ({"beta": 0}, "`beta` is 0"),
        ({"accelerator_config": '{"split_batches": true}'}, "a batch of prompt trees can't be cut by rows"),
        ({"launch": "fsdp1.yaml"}, "the launch says FSDP 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_run_refuses_is_refused(files, capsys, own, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fsdp1.yaml").write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}")
    argv = [part for name, value in {**files, **own}.items() for part in (f"--{name}", str(value))]
    assert main(argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_it_its_options_are_named_as_idle(files, capsys, caplog):
    argv = [part for name, value in {**files, "dry_run": "false"}.items() for part in (f"--{name}", value)]
    assert main([*argv, "--devices", "2", "--model_name_or_path", "./none"]) == 2
    assert "`devices` (needs `dry_run: true`)" in caplog.text + capsys.readouterr().err


# The verdict


def test_the_verdict_flips_at_the_bound_and_each_line_of_it_fits():
    plan, start = planner(rows=rows(8, completion=200)), setup()
    memory = plan.memory(start)
    assert verdict(plan, start, memory, memory.needed).startswith("Verdict: fits ")
    text = verdict(plan, start, memory, memory.needed - 1)
    assert text.startswith("Verdict: does not fit ")
    assert "`gradient_checkpointing: true`" in text
    assert "`tokens_per_forward: " in text
    assert "`use_peft: true`" in text
    assert verdict(plan, start, memory, 1).endswith("take a larger card or a smaller model.")
    assert "`--device_memory 24GB`" in verdict(plan, start, memory, None)


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_no_rows_within_the_limits_take_more_than_those_at_them(layout):
    read = [*rows(2, 5, 9), *rows(8, 30, 40)]
    start = setup(max_length=200, max_prompt_length=60)
    beyond = planner(rows=read, layout=layout).at_the_limits(start)
    most = beyond.memory(start).total
    taken = [
        planner(rows=rows(8, prompt, 400), layout=layout).memory(start).total for prompt in (5, 6, 20, 40, 59, 60, 90)
    ]
    assert max(taken) == most > 1.05 * min(taken)
    assert max(map(len, beyond.longest_rows(start)[0]["completion_ids"])) == 195


def test_rows_at_the_limits_are_counted_beside_those_that_were_read(tmp_path):
    plan, start = planner(rows=rows(8, completion=40)), setup(max_length=400, max_prompt_length=90)
    beyond = plan.at_the_limits(start)
    ((longest,), memory) = beyond.longest_rows(start), beyond.memory(start)
    assert (len(longest["prompt_ids"]), {*map(len, longest["completion_ids"])}) == (60, {340})
    assert memory.total > 3 * plan.memory(start).total
    size = plan.memory(start).needed
    text = verdict(plan, start, plan.memory(start), size, beyond)
    assert text.startswith("Verdict: fits ")
    assert "Rows at the limits do not fit. " in text
    assert verdict(plan, start, plan.memory(start), memory.needed, beyond).endswith("stay free.")
    assert plan.at_the_limits(setup()) is None
    sample = read_sample(write_rows(tmp_path, 9), "train", 4)
    shown = plan_text(plan, start, sample, Lengths.count(plan.rows, 90, 400), NCAConfig(str(tmp_path)), "m", None)
    assert "fifth: a prompt of 60 tokens with completions up to `max_length` 400, which is the larger of" in shown


def test_units_of_a_card():
    assert _bytes("24GB") == _bytes("24 gb") == _bytes("24") == _bytes(24) == 24e9 < 22.5 * GIB  # an A10 has so much
    assert _bytes("24GiB") == 24 * GIB
    assert (_bytes("512MB"), _bytes("512 MiB")) == (512e6, GIB / 2)
    for text in ("GB", "24TBs", "", "-", "-5GB", "0", "0GB", "nan", "inf", "nanGB", "1.2.3GB", "9" * 400):
        with pytest.raises(UserError, match="must be a finite number above 0 of GB or GiB"):
            _bytes(text)


# The data


def test_steps_are_counted_as_transformers_counts_them(tmp_path):
    def steps(rows, **own):
        given = {"batch_size": 2, "accumulation": 3} | {k: own.pop(k) for k in ("batch_size",) if k in own}
        args = NCAConfig(str(tmp_path), **own)
        return steps_of(rows, setup(Launch(2), **given), args)

    assert steps(25, num_train_epochs=2) == 6  # 7 batches a pass, 3 steps
    assert steps(25, num_train_epochs=2, dataloader_drop_last=True) == 4
    assert steps(1, num_train_epochs=1) == 1
    assert steps(25, max_steps=4) == 4
    assert steps(None) is None


@pytest.mark.slow
def test_a_run_takes_the_steps_of_its_plan(files, capsys):
    options = {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2, "validation_fraction": 0.3}
    steps = int(re.search(r"Steps: (\d+) ", plan(files, capsys, **options))[1])
    argv = [
        part for name, value in {**files, **options, "dry_run": "false"}.items() for part in (f"--{name}", str(value))
    ]
    assert main(argv) == 0
    state = json.loads((Path(files["output_dir"]) / "trainer_state.json").read_text())
    assert state["global_step"] == steps == state["max_steps"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "saved"])
def test_the_rows_of_every_kind_of_file_are_counted(kind, tmp_path):
    data = [{"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, data)) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps(data))
    elif kind == "saved":
        DatasetDict({"train": Dataset.from_list(data), "test": Dataset.from_list(data[:3])}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        for name, part in (("train", data), ("test", data[:3])):
            (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    else:
        getattr(pandas.DataFrame(data), f"to_{kind}")(path, index=False)
    few, whole = (read_sample(str(path), "train", most) for most in (10, 100))
    assert (few.read, few.rows, few.is_whole, len(few.dataset)) == (10, 30, False, 10)
    assert (whole.read, whole.rows, whole.is_whole) == (30, 30, True)
    assert set(few.dataset.column_names) >= {"prompt", "completions", "rewards"}
    has_test = kind in ("folder", "saved")
    assert few.training_rows == (30 if has_test else 30 - int(few.held_out * 30))
    assert (few.held_out > 0) is not has_test


def test_what_is_dropped_is_dropped_of_the_rest_too(tmp_path):
    data = [{"prompt": f"p{i}", "completions": ["a", "b"], "rewards": [1, 0], "source": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, data)))
    options = DataOptions(exclude_sources=["b"], validation_fraction=0)
    sample = read_sample(str(tmp_path / "rows.jsonl"), "train", 10, options=options)
    assert (len(sample.dataset), sample.training_rows) == (5, 20)


def test_lengths_count_what_is_cut():
    found = Lengths.count([*rows(2), *rows(3, completion=10)], 50, 80)
    assert (found.completions, found.prompts_cut, found.completions_cut, found.of) == ((2, 3), 2, 2, 5)


def test_a_sample_is_told_as_one(tmp_path):
    sample = read_sample(write_rows(tmp_path, 9), "train", 4)
    plan, args = planner(), NCAConfig(str(tmp_path))
    text = plan_text(plan, setup(), sample, Lengths.count(plan.rows, None, None), args, "m", None)
    assert "4 rows read of 9" in text
    assert "Steps: about 27 (3 × 9 prompts), 1 prompts each (1 × 1 × 1), about " in text
