"""`scripts/train.py` from YAML and flags, in this process where it can be, and what it leaves in the run's folder."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from conftest import SOURCES_REAL_SLOW, build_tokenizer, pair_rows, reward_rows, scored_rows
from nca_align.commands.train.command import main
from nca_align.training.stopping import follow_launcher

ROOT = Path(__file__).resolve().parents[1]
FAST = {
    "bf16": "false", "use_cpu": "true", "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2,
    "learning_rate": "1e-3", "save_strategy": "no", "report_to": "none", "gradient_checkpointing": "false",
    "max_length": 128, "beta": 0.1, "alpha": 0.5,
}  # fmt: skip


def flags(**options) -> list[str]:
    return [part for name, value in (FAST | options).items() for part in (f"--{name}", str(value))]


@pytest.fixture
def data_file(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, reward_rows(24, [4, 2, 3]))))
    return str(path)


@pytest.mark.slow
def test_a_run_leaves_everything_that_people_look_for(model_dir, data_file, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = flags(
        model_name_or_path=model_dir, dataset_name=data_file, output_dir=output, eval_strategy="steps", eval_steps=1,
        eval_on_start="true", validation_fraction=0.25, use_peft="true", lora_target_modules="q_proj", show_answers=1,
        save_strategy="steps", save_steps=2, eval_scorer="test_generation:length_of", eval_completions=2,
        eval_new_tokens=4, eval_prompts=2,
    )  # fmt: skip
    assert main(arguments) == 0
    names = {path.name for path in output.iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "train_results.json",
        "eval_results.json", "README.md", "curves.png", "validation_indices.json", "checkpoint-2", "tokenizer.json",
    } <= names  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())
    assert [line["loss"] for line in state["log_history"] if "loss" in line]
    generated = [line for line in state["log_history"] if "eval_generation/win_rate" in line]
    assert [line["step"] for line in generated] == [0, 1, 2]
    assert generated[0]["eval_generation/kl"] == generated[0]["eval_generation/gain"] == 0  # the reference's answers
    assert {line["eval_generation/reference_reward"] for line in generated} == {generated[0]["eval_generation/reward"]}
    assert len(json.loads((output / "validation_indices.json").read_text())) == 6
    assert "eval_rewards/accuracies" in json.loads((output / "eval_results.json").read_text())
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for part in (
        "own answers", "mean reward", "Their length:", "The best completion", "Pairs that it orders",
        "A held-out prompt:", "before:", "after:", f"The adapter is in {output}", "curves.png",
        f"nca-align export --model_name_or_path {output} --output {output}-model", f"transformers chat {output}-model",
    ):  # fmt: skip
        assert part in said

    # the folder now holds a run
    assert main(arguments) == 2
    assert "holds checkpoints of an earlier run (checkpoint-2)" in capsys.readouterr().err
    (output / "checkpoint-9").mkdir()  # what a kill in the middle of a save leaves
    (output / "checkpoint-9" / "adapter_model.safetensors").touch()
    longer = [*arguments, "--resume_from_checkpoint", "true", "--max_steps", "3"]
    assert main(longer) == 2  # the schedule of the learning rate is another one
    assert "checkpoint-2 belongs to another run: `max_steps` 2 → 3;" in capsys.readouterr().err
    assert main([*longer, "--resume_changed", "max_steps"]) == 0
    state = json.loads((output / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [1, 2, 3]
    # the resumed run has the same answers from before
    before = [line["eval_generation/reference_reward"] for line in state["log_history"] if "eval_generation/kl" in line]
    assert before == [generated[0]["eval_generation/reward"]] * 4
    assert before[0] > 0
    assert "from step 0 to 3:" in capsys.readouterr().out

    # and its adapter can be trained on
    again = flags(model_name_or_path=output, dataset_name=data_file, output_dir=tmp_path / "on")
    assert main([*again, "--model_init_kwargs", '{"revision": "main"}']) == 0
    state = json.loads((tmp_path / "on" / "trainer_state.json").read_text())
    assert state["log_history"][0]["rewards/best"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("source", SOURCES_REAL_SLOW)
@pytest.mark.parametrize(("rows_of", "k"), [(scored_rows, 4), (pair_rows, 2)])
def test_ultrafeedbacks_layouts_train_without_preparation(rows_of, k, source, model_dir, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(source)))
    run = tmp_path / "run"
    arguments = flags(model_name_or_path=model_dir, dataset_name=tmp_path / "rows.jsonl", output_dir=run)
    if (source, k) == ("real", 4):  # its answers are all longer
        assert main(arguments) == 2
        assert "`max_length` is 128, which cuts every completion of `train`" in capsys.readouterr().err
    assert main([*arguments, "--max_length", "512"]) == 0
    state = json.loads((run / "trainer_state.json").read_text())
    first = state["log_history"][0]
    assert first["loss"] == pytest.approx(1.3863, abs=1e-3)  # 2 ln 2: nothing has moved
    assert ("rewards/rank_4" in first) == (k == 4)


MISTAKES = {
    "unknown flag": (["--learning_rat", "1"], "`--learning_rat` (did you mean `--learning_rate`?)"),
    "alpha": (["--alpha", "0"], "`alpha` is 0.0, but must be a finite number above 0"),
    "beta": (["--beta", "-1"], "`beta` is -1.0, but must be a finite number above 0"),
    "room": (["--max_prompt_length", "128"], "leaves no room for completions within `max_length` 128"),
    "ignored": (["--label_smoothing", "0.1"], "`label_smoothing` is 0.1, but no loss here reads it"),
    "loss": (["--loss_type", "infoncaa"], "did you mean 'infonca'?"),
    "trl's loss": (["--loss_type", "sigmoid"], "use `infonca`"),
    "layout": (["--layout", "packed"], "invalid choice: 'packed'"),
    "batch": (["--per_device_train_batch_size", "0"], "`per_device_train_batch_size` is 0, but must be at least 1"),
    "rate": (["--learning_rate", "-1"], "`learning_rate` is -1.0, but must be a finite number"),
    "negative term": (["--loss_type", "infonca", "--negative_weight", "0.5"], "only nca has a negative term"),
    "loss twice": (["--loss_type", "nca", "nca"], "must name at least one loss, and each once"),
    "quantised, all of it": (["--load_in_4bit", "true"], "leave no weight that can be trained; add `use_peft: true`"),
    "rank": (["--use_peft", "true", "--lora_r", "0"], "`lora_r` is 0, but must be at least 1"),
    "endless": (["--dataset_streaming", "true", "--max_steps", "-1"], "a stream has no known end; set `max_steps`"),
    "metric": (
        [
            "--load_best_model_at_end",
            "true",
            "--eval_strategy",
            "steps",
            "--save_strategy",
            "steps",
            "--save_steps",
            "1",
            "--eval_steps",
            "1",
            "--metric_for_best_model",
            "bleu",
        ],
        "`metric_for_best_model` is bleu, which no evaluation gives",
    ),
    "no prompts": (["--eval_prompts", "0"], "`eval_prompts` is 0, but must be at least 1"),
    "answers": (
        ["--eval_scorer", "nca_align.scorers:vader", "--eval_strategy", "no"],
        "`eval_scorer` is set, but nothing is evaluated",
    ),
    "metric of answers": (
        [
            *("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1"),
            *("--save_strategy", "steps", "--save_steps", "1", "--metric_for_best_model", "generation/reward"),
        ],
        "`metric_for_best_model` is generation/reward, which no evaluation gives",
    ),
    "a file for a folder": (["--output_dir", __file__], "is a file; give a folder"),
    "modules": (["--use_peft", "true", "--lora_target_modules", "foo"], "setting up the training failed: "),
    "tracker": (["--report_to", "foo"], "foo"),
    "schedule": (["--lr_scheduler_type", "cosine_with_min_lr"], "the first step failed: "),
    "data": (["--dataset_name", "no/such-data"], "no/such-data"),
    "model": (["--model_name_or_path", "no/such-model"], "`model_name_or_path` also takes a local path"),
    "split": (["--dataset_train_split", "trian"], "train"),
    "checkpoint": (["--resume_from_checkpoint", "/nowhere"], "`resume_from_checkpoint` is /nowhere"),
}


def test_a_row_that_is_refused_as_it_becomes_tokens_is_named_by_its_row_of_the_file(model_dir, tmp_path, capsys):
    rows = reward_rows(40)
    rows[39]["completions"][0] = [{"role": "user", "content": "hm"}]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    given = flags(model_name_or_path=model_dir, dataset_name=tmp_path / "rows.jsonl", output_dir=tmp_path / "run")
    assert main([*given, "--validation_fraction", "0.2"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"Row [1-7] of `eval`: `completions\[0\]` has no turn.*\(row 39 of the data before rows", error)


@pytest.mark.parametrize("what", MISTAKES)
def test_a_users_mistake_is_one_sentence(what, model_dir, data_file, tmp_path, capsys):
    arguments, expected = MISTAKES[what]
    given = flags(model_name_or_path=model_dir, dataset_name=data_file, output_dir=tmp_path / "run")
    assert main([*given, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nca-align train: error: ")
    assert expected in error
    assert len(error) < 600


def test_missing_names_and_bad_rows_are_one_sentence(model_dir, tmp_path, capsys, caplog):
    assert main(flags(model_name_or_path=model_dir, output_dir=tmp_path)) == 2
    assert "`dataset_name` is missing" in capsys.readouterr().err
    assert main(flags(dataset_name="x", output_dir=tmp_path)) == 2
    assert "`model_name_or_path` is missing" in capsys.readouterr().err
    rows = reward_rows(4)
    rows[2]["rewards"][1] = None
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(flags(model_name_or_path=model_dir, dataset_name=path, output_dir=tmp_path)) == 2
    error = capsys.readouterr().err
    assert "ow 2" in error
    assert "`rewards" in error
    rows[3]["completions"][0] = [{"role": "tool", "content": "4"}]  # is refused as it becomes tokens
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(flags(model_name_or_path=model_dir, dataset_name=path, output_dir=tmp_path, on_invalid="drop")) == 0
    assert "2 of 3 rows kept as they became tokens; dropped: 1 nothing to train on" in caplog.text


def test_a_scorer_under_a_sharded_launch_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    own = {"model_name_or_path": "no/such", "dataset_name": "no/such", "eval_scorer": "nca_align.scorers:length"}
    assert main(flags(output_dir=tmp_path, **own)) == 2
    assert "`eval_scorer` is set, but FSDP and DeepSpeed shard the model" in capsys.readouterr().err


def test_a_system_prompt_needs_a_template_that_has_one(model_dir, tmp_path, capsys):
    tokenizer = build_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    silent = build_tokenizer("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}")
    rows = reward_rows(3)
    rows[1]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    path = tmp_path / "system.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for i, (own, expected) in enumerate(
        [(tokenizer, "System role not supported"), (silent, "leaves out the system prompt")]
    ):
        folder = tmp_path / f"model{i}"
        import shutil

        shutil.copytree(model_dir, folder)
        own.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(own.chat_template)
        assert main(flags(model_name_or_path=folder, dataset_name=path, output_dir=tmp_path / f"run{i}")) == 2
        error = capsys.readouterr().err
        assert "Row 1" in error
        assert expected in error


@pytest.mark.slow
def test_the_literal_command_and_two_processes(model_dir, data_file, tmp_path):
    """`accelerate launch scripts/train.py --config …`, and the same by torchrun on two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    config = tmp_path / "config.yaml"
    options = {
        "model_name_or_path": model_dir, "dataset_name": data_file, "eval_strategy": "steps", "eval_steps": 2,
        "validation_fraction": 0.2, "precompute_ref_log_probs": "true", "per_device_train_batch_size": 2,
    }  # fmt: skip
    config.write_text("\n".join(f"{name}: {value}" for name, value in (FAST | options).items()))
    launchers = {
        "one": (
            ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
            ["--gradient_accumulation_steps", "4"],
        ),
        "two": (["torch.distributed.run", "--nproc_per_node", "2"], ["--gradient_accumulation_steps", "2"]),
    }
    losses = {}
    for name, (launcher, extra) in launchers.items():
        output = tmp_path / name
        run = subprocess.run(
            [sys.executable, "-m", *launcher, "scripts/train.py", "--config", str(config), "--output_dir", str(output),
             "--learning_rate", "2e-3", *extra],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("What moved") == 1
        state = json.loads((output / "trainer_state.json").read_text())
        losses[name] = [line[key] for line in state["log_history"] for key in ("loss", "eval_loss") if key in line]
        assert any(line.get("learning_rate") == 2e-3 for line in state["log_history"])
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5)


def test_an_unknown_key_in_yaml_names_the_nearest(model_dir, data_file, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"model_name_or_path: {model_dir}\ndataset_name: {data_file}\nlearning_rte: 1\n")
    assert main(["--config", str(config)]) == 2
    assert "`learning_rte`" in (error := capsys.readouterr().err)
    assert "did you mean `learning_rate`?" in error


def test_dataset_rows_that_load_dataset_gives_train_too(model_dir, tmp_path):
    Dataset.from_list(reward_rows(6)).save_to_disk(tmp_path / "saved")
    assert main(flags(model_name_or_path=model_dir, dataset_name=tmp_path / "saved", output_dir=tmp_path / "run")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the end of a parent is a signal on Linux alone")
@pytest.mark.parametrize(("launched", "expected"), [(True, signal.SIGTERM), (False, 0)])
def test_a_run_ends_with_accelerate_launch_and_with_no_shell(launched, expected, monkeypatch):
    """Under nohup it outlives the shell that started it."""
    monkeypatch.delenv("ACCELERATE_DYNAMO_MODE", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    libc, found = ctypes.CDLL(None), ctypes.c_int(-1)
    try:
        follow_launcher()
        assert libc.prctl(2, ctypes.byref(found)) == 0  # PR_GET_PDEATHSIG
    finally:
        libc.prctl(1, 0)
    assert found.value == expected
