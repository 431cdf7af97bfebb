"""Options without effect are named, and refused where other weights would be trained than were asked for."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import DPOConfig

from conftest import reward_rows
from nca_align import NCAConfig
from nca_align.commands.compare.grid import expand
from nca_align.commands.train.command import main
from nca_align.commands.train.options import TRAIN_OPTIONS
from nca_align.errors import UserError, notify_once
from nca_align.options import parse
from nca_align.unread import CONFIG_RULES, TRAIN_RULES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "recipes").glob("*.yaml")])
CPU = {"use_cpu": True, "bf16": False}
EFFECT = "Without effect in this run"


@pytest.fixture(autouse=True)
def told_anew():
    notify_once.cache_clear()


def told(caplog) -> list[str]:
    return [line for line in caplog.messages if "effect" in line]


def train(tmp_path, *flags: str, yaml: str = "") -> int:
    """`nca-align train` with a model that isn't there, which is found out after the options."""
    (tmp_path / "o.yaml").write_text(f"use_cpu: true\nbf16: false\n{yaml}")
    words = {"model_name_or_path": tmp_path / "none", "dataset_name": "none.jsonl", "output_dir": tmp_path / "run"}
    return main(["--config", str(tmp_path / "o.yaml"), *(f"--{n}={v}" for n, v in words.items()), *flags])


def test_every_name_of_the_table_is_an_option():
    own = {field.name for field in fields(NCAConfig)}
    others = {field.name for kind in TRAIN_OPTIONS for field in fields(kind)}
    for rules, known in ((CONFIG_RULES, own | {"warmup_ratio"}), (TRAIN_RULES, others)):
        names = [name for rule in rules for name in rule.names.split()]
        assert set(names) <= known
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eval_steps": 5}, "`eval_steps` (needs `eval_strategy: steps`)"),
        ({"save_strategy": "epoch", "save_steps": 5}, "`save_steps` (needs `save_strategy: steps`)"),
        (
            {"alpha": 0.3, "loss_type": "plackett_luce"},
            "`alpha` (needs `loss_type` gvpo, infonca, nca, or a function that reads it)",
        ),
        ({"max_steps": 3, "num_train_epochs": 2}, "`num_train_epochs` (needs `max_steps` left out)"),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, "`warmup_steps` (needs another"),
        ({"precompute_ref_batch_size": 3}, "`precompute_ref_batch_size` (needs"),
        ({"eval_delay": 2}, "`eval_delay` (needs `eval_strategy` steps or epoch)"),
        ({"beta": 0.3, "loss_type": "sft"}, "`beta` (needs another `loss_type` than sft alone)"),
        ({"adam_beta1": 0.8, "optim": "adafactor"}, "`adam_beta1` (needs an `optim` of the Adam or Lion family)"),
        ({"adam_epsilon": 0.1, "optim": "lion_8bit"}, "`adam_epsilon` (needs an `optim` of the Adam family)"),
    ],
)
def test_python_is_told(options, named, caplog):
    NCAConfig("x", **CPU, **options)
    (line,) = told(caplog)
    assert line.startswith(f"{EFFECT}: ")
    assert named in line


@pytest.mark.parametrize(
    "options",
    [
        {}, {"eval_strategy": "steps", "eval_steps": 5}, {"eval_strategy": "epoch", "metric_for_best_model": "loss"},
        {"save_steps": 5, "save_total_limit": 2}, {"alpha": 0.3}, {"alpha": 0.3, "loss_type": ["sft", "nca"]},
        {"adam_beta2": 0.9}, {"adam_beta1": 0.8, "optim": "lion_8bit"}, {"beta": 0.3, "loss_type": ["sft", "nca"]},
        {"eval_strategy": "epoch", "eval_delay": 2}, {"max_steps": 3}, {"num_train_epochs": 2}, {"warmup_steps": 3},
        {"eval_on_start": True},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True},
    ],
)  # fmt: skip
def test_what_is_read_is_not_named(options, caplog):
    NCAConfig("x", **CPU, **options)
    assert told(caplog) == []


def test_a_dpo_config_of_defaults_is_not_named(caplog):
    NCAConfig.of(DPOConfig("x", **CPU), "m")
    assert told(caplog) == []


def test_the_command_names_each_option_once(tmp_path, caplog):
    yaml = (
        "bnb_4bit_quant_type: nf4\nanswer_tokens: 9\neval_steps: 4\nsave_only_model: false\nlora_target_modules: null\n"
    )
    flags = ["--hub_model_id", "me/it", "--logging-steps", "3", "--save_strategy", "no", "--save_total_limit", "1"]
    flags += ["--eval_strategy", "no", "--metric_for_best_model", "loss"]
    assert train(tmp_path, *flags, yaml=yaml) == 2
    lines = "\n".join(told(caplog))
    for name in (
        "bnb_4bit_quant_type", "answer_tokens", "eval_steps", "hub_model_id", "save_total_limit",
        "metric_for_best_model",
    ):  # fmt: skip
        assert lines.count(f"`{name}`") == 1
    for name in ("save_only_model", "lora_target_modules", "logging_steps"):
        assert name not in lines


@pytest.mark.parametrize("flags", [["--lora_r", "16"], ["--lora-alpha", "32"], ["--use_dora"], ["--lora_dropout", "0"]])
def test_an_adapters_options_without_one_are_refused(flags, tmp_path, capsys):
    assert train(tmp_path, *flags) == 2
    said = capsys.readouterr().err
    assert f"`{flags[0][2:].replace('-', '_')}` is" in said
    assert "needs `use_peft: true`. Without it all weights of the model would be trained" in said


def test_a_recipe_with_an_adapter_can_be_run_without_it(tmp_path, capsys, caplog):
    assert train(tmp_path, "--use_peft", "false", yaml="use_peft: true\nlora_r: 16\nuse_dora: false") == 2
    assert "there is no such folder" in capsys.readouterr().err  # so the options passed
    (line,) = told(caplog)
    assert "`lora_r` (needs `use_peft: true`)" in line
    assert "use_dora" not in line


class TestAnAdapterThatIsTrainedOn:
    @pytest.fixture
    def adapter(self, tmp_path) -> str:
        own = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj"], task_type="CAUSAL_LM")
        own.base_model_name_or_path = str(tmp_path / "none")
        own.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    @pytest.mark.parametrize(
        ("name", "other", "has"),
        [
            ("lora_r", "4", "8"), ("lora_alpha", "64", "16"), ("lora_dropout", "0.5", "0.0"),
            ("lora_target_modules", "k_proj", "['q_proj']"), ("lora_target_modules", ".*proj", "['q_proj']"),
            ("lora_modules_to_save", "lm_head", "None"), ("use_rslora", "true", "False"), ("use_dora", "true", "False"),
            ("lora_task_type", "SEQ_CLS", "['CAUSAL_LM']"),
        ],
    )  # fmt: skip
    def test_another_one_is_refused(self, name, other, has, adapter, tmp_path, capsys):
        use_peft = ["--use_peft", "true"] if name == "lora_alpha" else []
        assert train(tmp_path, "--model_name_or_path", adapter, f"--{name}", other, *use_peft) == 2
        said = capsys.readouterr().err
        assert f"`{name}` is " in said
        assert (
            f"`model_name_or_path` {adapter} is an adapter already. Its own is {has}, and it is trained as it is"
            in said
        )

    @pytest.mark.parametrize("use_peft", [[], ["--use_peft", "true"]])
    def test_its_own_settings_pass(self, use_peft, adapter, tmp_path, capsys, caplog):
        same = ["--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0", "--lora_target_modules", "q_proj"]
        same += ["--lora_task_type", "CAUSAL_LM", "--use_dora", "false"]
        assert train(tmp_path, "--model_name_or_path", adapter, *same, *use_peft) == 2
        assert "there is no such folder" in capsys.readouterr().err  # of its base, so the options passed
        assert told(caplog) == []

    def test_what_was_not_given_is_not_compared(self, adapter, tmp_path, capsys):
        assert train(tmp_path, "--model_name_or_path", adapter, "--use_peft", "true", "--load_in_8bit", "false") == 2
        assert "there is no such folder" in capsys.readouterr().err

    def test_all_linear_modules_are_told(self, adapter, tmp_path, capsys, caplog):
        """The recipe that made it has the word, and the adapter the modules that it stood for."""
        assert train(tmp_path, "--model_name_or_path", adapter, "--lora_target_modules", "all-linear") == 2
        assert "there is no such folder" in capsys.readouterr().err
        assert f"{adapter} is an adapter already, and keeps its own: ['q_proj']" in caplog.text

    def test_the_whole_model_is_refused(self, adapter, tmp_path, capsys):
        assert train(tmp_path, "--model_name_or_path", adapter, "--use_peft", "false") == 2
        assert "`use_peft` is False, but `model_name_or_path`" in capsys.readouterr().err

    def test_a_quantised_base_has_it_to_train(self, adapter, tmp_path, capsys):
        assert train(tmp_path, "--model_name_or_path", adapter, "--load_in_4bit", "true") == 2
        assert "there is no such folder" in capsys.readouterr().err

    def test_in_a_comparison(self, adapter):
        base = {"model_name_or_path": adapter, "dataset_name": "d", **CPU}
        with pytest.raises(UserError, match="`lora_alpha` is 32, but `model_name_or_path`"):
            expand(base | {"lora_alpha": 32}, {"method": "nca"}, "o.yaml")


def test_the_best_model_of_none_is_refused(tmp_path, capsys):
    assert train(tmp_path, "--load_best_model_at_end", "true", "--save_strategy", "no") == 2
    assert "`load_best_model_at_end` is True, which needs `eval_strategy` steps or epoch" in capsys.readouterr().err


def test_a_comparison_is_refused_too(caplog):
    base = {"model_name_or_path": "m", "dataset_name": "d", "save_total_limit": 2, **CPU}
    with pytest.raises(UserError, match="`lora_r` is 8, which needs `use_peft: true`"):
        expand(base | {"lora_r": 8}, {"method": "nca"}, "o.yaml")
    assert len(expand(base | {"hub_model_id": "me/it"}, {"method": ["nca", "dpo"], "seed": [1, 2]}, "o.yaml")) == 4
    (line,) = told(caplog)  # once for all cells
    assert line == f"{EFFECT}: `hub_model_id` (needs `push_to_hub: true`)."


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_without_a_line(path, tmp_path, caplog, capsys):
    flags = ["--config", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    parse(TRAIN_OPTIONS, flags, "x")
    main([*flags, "--model_name_or_path", str(tmp_path / "none")])
    assert "there is no such folder" in capsys.readouterr().err
    assert told(caplog) == []


def test_a_fraction_that_the_data_has_no_use_for(model_dir, tmp_path, caplog):
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, reward_rows(4))))
    flags = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "data", "output_dir": tmp_path / "run",
        "use_cpu": "true", "bf16": "false", "validation_fraction": 0.5, "eval_scorer": "nca_align.scorers:vader",
        "eval_strategy": "no",
    }  # fmt: skip
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 2  # of `eval_scorer`, after the data
    assert "`validation_fraction` has no effect on this data" in caplog.text


def test_what_needs_held_out_rows_where_there_are_none(model_dir, tmp_path, caplog, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(4))))
    flags = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "run",
        "use_cpu": "true", "bf16": "false", "validation_fraction": 0, "per_device_eval_batch_size": 2,
        "show_answers": 1, "eval_scorer": "nca_align.scorers:vader",
    }  # fmt: skip
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 2
    (line,) = told(caplog)
    assert line == f"{EFFECT}: `show_answers`, `per_device_eval_batch_size` (no rows are held out)."
    assert "nothing is evaluated; it needs rows that are held out (`validation_fraction`" in capsys.readouterr().err


# What would train nothing


def test_missing_arguments_are_named_before_the_machine(capsys):
    assert main(["--fp16", "true", "--use_cpu", "true"]) == 2
    assert "`dataset_name` is missing" in capsys.readouterr().err
    assert main(["--fp16", "true", "--use_cpu", "true", "--dataset_name", "x"]) == 2
    assert "`model_name_or_path` is missing" in capsys.readouterr().err
    assert main(["--dataset_nam", "x"]) == 2
    assert "did you mean `--dataset_name`?" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"num_train_epochs": 0}, {"num_train_epochs": -1.0}])
def test_no_step_at_all_is_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=f"`{name}` is .*, but must be "):
        NCAConfig("x", **CPU, **options)
    assert NCAConfig("x", **CPU, max_steps=1, num_train_epochs=0).max_steps == 1


def test_a_learning_rate_of_0_is_told(caplog):
    NCAConfig("x", **CPU, learning_rate=0.0)
    assert "`learning_rate` is 0: no weight moves" in caplog.text
