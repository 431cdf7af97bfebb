"""Nothing that comes from other people runs code here, and nothing secret of the user's goes out with a run."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from browser import browser, open_page
from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCATrainer, load_reward_dataset
from nca_align.commands.inspect.command import main as inspect_main
from nca_align.commands.sample.command import main as sample_main
from nca_align.commands.score import main as score_main
from nca_align.commands.train.command import main as train_main
from nca_align.data import DataOptions
from nca_align.errors import UserError
from nca_align.models.loading import ModelSource, load_adapter
from nca_align.options import parse
from test_scoring import rewards_model

PICKLE = "pytorch_model.bin"
FAST = {
    "use_cpu": "true", "bf16": "false", "max_steps": 1, "logging_steps": 1, "report_to": "none", "max_length": 128,
    "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "validation_fraction": 0.2,
}  # fmt: skip
SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"


class Payload:
    """Unpickled, it leaves a mark, as a stranger's code would."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return exec, (f"open({self.mark!r}, 'w').close()",)


def flags(**options) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def write_rows(folder: Path, rows: list[dict] | None = None) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows or reward_rows(12))))
    return path


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "the-code-ran"


def save_pickled(folder: Path, weights: str, mark: Path) -> str:
    """Weights as a pickle that also runs code when it is loaded the way pickles are."""
    torch.save({"payload": Payload(mark)}, folder / weights)
    torch.load(folder / weights, weights_only=False)
    assert mark.exists()  # the payload works
    mark.unlink()
    return str(folder)


@pytest.fixture
def pickled_model(tmp_path, mark) -> str:
    folder = tmp_path / "pickled"
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return save_pickled(folder, PICKLE, mark)


@pytest.fixture
def pickled_adapter(model_dir, tmp_path, mark) -> str:
    folder = tmp_path / "adapter"
    model = build_model(build_tokenizer())
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": model_dir}))
    (folder / "adapter_model.safetensors").unlink()
    build_tokenizer().save_pretrained(folder)
    return save_pickled(folder, "adapter_model.bin", mark)


class TestPickledWeights:
    def test_train_refuses_them(self, pickled_model, mark, tmp_path, capsys):
        arguments = flags(
            model_name_or_path=pickled_model, dataset_name=write_rows(tmp_path), output_dir=tmp_path / "run"
        )
        assert train_main([*arguments, *flags(**FAST)]) == 2
        assert "model.safetensors" in capsys.readouterr().err
        assert not mark.exists()

    def test_the_trainer_refuses_them(self, pickled_model, mark, tmp_path):
        from nca_align import NCAConfig

        with pytest.raises(OSError, match=r"model\.safetensors"):
            NCATrainer(
                pickled_model, args=NCAConfig(str(tmp_path / "run"), use_cpu=True, report_to="none"),
                train_dataset=load_reward_dataset(str(write_rows(tmp_path)), split="train"),
            )  # fmt: skip
        assert not mark.exists()

    @pytest.mark.parametrize("head", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
    def test_policies_and_reward_models_refuse_them(self, head, pickled_model, mark):
        import transformers

        with pytest.raises(UserError, match=r"model\.safetensors"):
            ModelSource(pickled_model).load(getattr(transformers, head), dtype=torch.float32)
        assert not mark.exists()

    def test_sample_refuses_an_adapter_of_them(self, pickled_adapter, model_dir, mark, tmp_path, capsys):
        arguments = flags(model_name_or_path=model_dir, adapter=pickled_adapter, dataset_name=write_rows(tmp_path))
        assert sample_main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 2
        assert "as a pickle (adapter_model.bin), which can hold any code" in capsys.readouterr().err
        assert not mark.exists()

    def test_train_refuses_an_adapter_of_them(self, pickled_adapter, mark, tmp_path, capsys):
        arguments = flags(
            model_name_or_path=pickled_adapter, dataset_name=write_rows(tmp_path), output_dir=tmp_path / "run"
        )
        assert train_main([*arguments, *flags(**FAST)]) == 2
        assert "as a pickle (adapter_model.bin)" in capsys.readouterr().err
        assert not mark.exists()

    def test_an_adapter_in_safetensors_is_loaded(self, model_dir, tmp_path):
        model = build_model(build_tokenizer())
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        assert load_adapter(build_model(build_tokenizer()), str(tmp_path / "adapter")).peft_config


@pytest.fixture
def model_with_code(model_dir, tmp_path, mark) -> str:
    """A model of a class of its own, whose code leaves a mark when it is imported."""
    folder = tmp_path / "own-code"
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_code(folder, mark, "AutoModelForCausalLM", "LlamaForCausalLM")
    return str(folder)


def add_code(folder: Path, mark: Path, auto: str, base: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", auto: "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        f"from transformers import LlamaConfig, {base}\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        f"class OwnModel({base}):\n    config_class = Own\n"
    )


def test_code_beside_a_model_runs_only_where_it_was_asked_for(model_with_code, mark, tmp_path, capsys, monkeypatch):
    data = write_rows(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = flags(model_name_or_path=model_with_code, dataset_name=data, output_dir=tmp_path / "run")
    assert train_main([*arguments, *flags(**FAST)]) == 2
    assert (
        sample_main([*flags(model_name_or_path=model_with_code, dataset_name=data, output=tmp_path / "o.jsonl")]) == 2
    )
    for scorer in (model_with_code, f"pipeline:{model_with_code}:LABEL_0"):
        assert score_main([*flags(scorer=scorer, dataset_name=data, output=tmp_path / "s.jsonl")]) == 2
    assert capsys.readouterr().err.count("error:") == 4
    assert not mark.exists()
    train_main([*arguments, *flags(**FAST, trust_remote_code="true")])
    assert mark.exists()


def test_code_beside_a_classifier_runs_where_it_was_asked_for(mark, tmp_path, monkeypatch):
    name, _, _ = rewards_model(tmp_path, "classifier", num_labels=2)
    add_code(Path(name), mark, "AutoModelForSequenceClassification", "LlamaForSequenceClassification")
    with open(Path(name) / "own.py", "a") as code:  # its base comes from there
        code.write(
            "from transformers import AutoModel, LlamaModel\n"
            "class Base(LlamaModel):\n    config_class = Own\n"
            "AutoModel.register(Own, Base)\n"
        )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = flags(dataset_name=write_rows(tmp_path), output=tmp_path / "s.jsonl")
    assert score_main([*arguments, *flags(scorer=f"pipeline:{name}:LABEL_0", trust_remote_code="true")]) == 0
    assert mark.exists()


def test_code_beside_data_does_not_run(mark, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder)
    (folder / "data.py").write_text(f"open({str(mark)!r}, 'w').close()\n")  # what was a loading script once
    with pytest.raises(ValueError, match=r"Dataset scripts are no longer supported, but found data\.py"):
        load_reward_dataset(str(folder))
    (folder / "data.py").rename(folder / "other.py")
    assert len(load_reward_dataset(str(folder), split="train", validation_fraction=0)) == 12
    assert not mark.exists()


def test_yaml_makes_no_objects(mark, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"score: !!python/object/apply:os.system ['touch {mark}']")
    with pytest.raises(UserError, match="is not valid YAML"):
        parse((DataOptions,), ["--config", str(file)], "train")
    assert not mark.exists()


def test_a_reward_function_is_imported_only_when_it_is_named(mark, tmp_path, monkeypatch):
    (tmp_path / "their_reward.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef score(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    rows = [row | {"scorer": "their_reward:score", "reward_funcs": "their_reward:score"} for row in reward_rows(2)]
    data = write_rows(tmp_path, rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--dataset_name", str(data), "--output", str(tmp_path / "out.jsonl")]
    assert score_main([*arguments, "--scorer", "nca_align.scorers:nothing"]) == 2
    assert not mark.exists()
    assert score_main([*arguments, "--scorer", "their_reward:score"]) == 0
    assert mark.exists()
    sys.modules.pop("their_reward")


@pytest.mark.slow
def test_a_page_shows_what_a_model_wrote_as_text(model_dir, tmp_path):
    rows = reward_rows(12)
    rows[0]["prompt"][0]["content"] = SCRIPT
    for k in range(4):
        rows[0]["completions"][k][0]["content"] = f"{SCRIPT} {k}"
    page_file = tmp_path / "page.html"
    data = write_rows(tmp_path, rows)
    assert inspect_main(["--dataset_name", str(data), "--model_name_or_path", model_dir, "--html", str(page_file)]) == 0
    with browser() as chromium:
        page, problems = open_page(chromium, page_file)
        assert problems == []
        assert page.title() != "taken"
        assert page.inner_text("body").count("<script>document.title = 'taken'</script>") >= 5
        assert page.locator("script, img").count() == 0


SECRETS = {
    "HF_TOKEN": "hf_envSecretTokenAAAA", "HUGGING_FACE_HUB_TOKEN": "hf_envSecretTokenBBBB",
    "OPENAI_API_KEY": "sk-envSecretKeyCCCC", "WANDB_API_KEY": "wandbSecretDDDD", "SOME_PRIVATE_VALUE": "privateEEEE",
}  # fmt: skip


def test_no_secret_is_written_or_printed(model_dir, tmp_path, monkeypatch, capfd, caplog):
    """Of the environment, and the tokens given as options, in all that a run, samples and scores leave behind."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    data, given = write_rows(tmp_path), ["hf_flagSecretTokenFFFF", "hf_loadSecretTokenGGGG"]
    run = flags(
        model_name_or_path=model_dir, dataset_name=data, output_dir=tmp_path / "run", hub_token=given[0],
        model_init_kwargs=json.dumps({"token": given[1]}),
    )  # fmt: skip
    assert train_main([*run, *flags(**FAST, eval_strategy="steps", eval_steps=1)]) == 0, capfd.readouterr().err
    samples = tmp_path / "samples.parquet"
    sampling = flags(model_name_or_path=model_dir, dataset_name=data, num_completions=2, max_new_tokens=2)
    assert sample_main([*sampling, "--output", str(samples)]) == 0
    scoring = flags(dataset_name=samples, scorer="nca_align.scorers:vader", output=tmp_path / "scored.jsonl")
    assert score_main(scoring) == 0

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"README.md", "trainer_state.json", "samples.parquet", "scored.jsonl.meta.json"} <= {f.name for f in files}
    printed = capfd.readouterr()
    said = {"output": printed.out + printed.err, "log": caplog.text}
    written = {str(path): path.read_bytes().decode("latin-1") for path in files}
    for where, text in (written | said).items():
        assert not [name for name, value in SECRETS.items() if value in text], where
        # transformers pickles the arguments whole into training_args.bin, these too: docs/reference/security.md says so
        assert not any(token in text for token in given) or where.endswith("training_args.bin"), where
    assert os.environ["HF_TOKEN"] == SECRETS["HF_TOKEN"]
