"""Exports equal the adapter on its base: plain, tied, from 4 bits after a forward, in every dtype; or are refused."""

import json
import os
import re
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from conftest import build_model, record_nf4, scored_rows
from nca_align.commands.export import command as export_command
from nca_align.commands.export import next_steps as next_steps_module
from nca_align.commands.export.command import ExportOptions, export, main
from nca_align.commands.export.merge import logp_difference, merge, merge_check_rows
from nca_align.commands.export.next_steps import next_steps
from nca_align.errors import UserError
from nca_align.models.loading import ModelSource, add_adapter, disable_nf4_repacking
from nca_align.models.logprobs import completion_logps

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def make_base(folder: Path, tokenizer, **overrides) -> str:
    build_model(tokenizer, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_adapter(base: str, folder: Path, std: float = 0.2, **config) -> str:
    """An adapter that changes the model in every weight that it has."""
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | config
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy = get_peft_model(base_model, LoraConfig(**config))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory) -> str:
    return make_adapter(model_dir, tmp_path_factory.mktemp("adapter"))


def logps_of(folder, rows) -> list[list[float]]:
    """By transformers alone, in float32: nothing of an adapter's is left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert not hasattr(model, "peft_config")
    return completion_logps(model, rows, 1)


def test_the_export_is_the_adapter_on_its_base(adapter_dir, model_dir, tokenizer, tmp_path, capsys):
    output = tmp_path / "new" / "aligned"
    assert main(["--model_name_or_path", adapter_dir, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"merged against adapter on its base: 0\.00\d\d nats per sequence at most, 0\.00\d\d on average", text
    )
    assert re.search(r"\(6 sequences, \d{4} tokens\)\nas saved in float32: 0\.00\d\d nats at most", text)
    rows = merge_check_rows(tokenizer)
    expected = completion_logps(ModelSource.of(adapter_dir).load_policy("auto"), rows, 1)
    assert logp_difference(logps_of(output, rows), expected).largest < 0.01
    assert logp_difference(logps_of(model_dir, rows), expected).largest > 1  # the adapter does something
    assert {path.name for path in output.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    assert [path.name for path in output.parent.iterdir()] == ["aligned"]
    assert os.stat(output).st_mode & 0o755 == 0o755


VARIANTS = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "head": {"modules_to_save": ["lm_head"]},
    "input": {"modules_to_save": ["embed_tokens"]},
    "both ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the input": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    "kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


# Where the embeddings are left alone it is the same whether they are tied
PARTED = [(name, True) for name in VARIANTS if name not in ("all-linear", "rslora", "dora", "bias")]


FAST = [*((name, False) for name in VARIANTS), ("head", True), ("kept tied", True)]


@pytest.mark.parametrize(
    ("name", "tied"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in PARTED if case not in FAST)]
)
def test_what_adapters_change(name, tied, tokenizer, tmp_path):
    """Also one of two tied embeddings: they part, and a model that kept them tied would be another."""
    base = make_base(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **VARIANTS[name])
    found = export(ExportOptions(adapter, str(tmp_path / "out")))
    assert found.merged.largest < 0.01
    assert found.saved.largest < 0.01
    rows = merge_check_rows(tokenizer)
    assert (
        logp_difference(
            logps_of(tmp_path / "out", rows), completion_logps(ModelSource.of(adapter).load_policy("auto"), rows, 1)
        ).largest
        < 0.01
    )
    parts = name in ("head", "input", "both ends", "LoRA on the head", "LoRA on the input")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and not parts)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not tied or parts)


def test_dtypes(adapter_dir, model_dir, tokenizer, tmp_path, capsys):
    for dtype in ("bfloat16", "float16", "float32"):
        found = export(ExportOptions(adapter_dir, str(tmp_path / dtype), dtype=dtype))
        weights = load_file(tmp_path / dtype / "model.safetensors").values()
        assert {tensor.dtype for tensor in weights} == {getattr(torch, dtype)}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
        assert found.merged.largest < 0.01  # whatever it is saved in
        warned = "WARNING: rounding the merged weights" in capsys.readouterr().err
        assert warned == (found.saved.largest > 0.05)
        assert (dtype == "bfloat16") <= warned  # this model's weights are large, and so is their rounding
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model_dir).to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    found = export(ExportOptions(adapter_dir, str(tmp_path / "auto"), base=str(half)))
    assert re.search(r"as saved in bfloat16: .*\nmore than 0.05, so it is saved in float32", capsys.readouterr().out)
    assert found.saved.largest < 0.01
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(tmp_path / "auto" / "model.safetensors").values()} == {torch.float32}


def test_the_bases_dtype_is_kept_where_rounding_changes_nothing(model_dir, tokenizer, tmp_path):
    """Weights of an adapter that bfloat16 holds exactly, as the base's."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model_dir).to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    adapter = make_adapter(str(half), tmp_path / "adapter", std=0.0)
    found = export(ExportOptions(adapter, str(tmp_path / "auto")))
    assert found.saved.largest < 0.01
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def wide(tokenizer, tmp_path_factory) -> tuple[str, str]:
    """A base of 64-wide layers, which 4 bits take whole, and an adapter that was made on it."""
    folder = tmp_path_factory.mktemp("wide")
    base = make_base(folder / "base", tokenizer, hidden_size=64, intermediate_size=128, initializer_range=0.06)
    return base, make_adapter(base, folder / "adapter", std=0.1, target_modules="all-linear")


@pytest.mark.parametrize("nested", [False, True])
def test_from_4_bits(wide, nested, tokenizer, tmp_path):
    base, adapter = wide
    rows = merge_check_rows(tokenizer)
    config = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, quantization_config=config), adapter)
    policy = policy.eval()
    assert any(type(module).__name__ == "Params4bit" for module in policy.parameters())  # 4 bits are on
    disable_nf4_repacking(policy)  # nor rounded to bfloat16 in a forward
    trained = completion_logps(policy, rows, 1)
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, quantization_config=config), adapter)
    completion_logps(other.eval(), rows, 1)  # a forward that repacks, in this process
    options = ExportOptions(adapter, str(tmp_path / "out"), load_in_4bit=True, use_bnb_nested_quant=nested)
    found = export(options)
    assert found.merged.largest < 0.02
    assert logp_difference(logps_of(tmp_path / "out", rows), trained).largest < 0.05
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "the base in 4 bits, dequantised, in float32" in (tmp_path / "out" / "README.md").read_text()
    export(ExportOptions(adapter, str(tmp_path / "plain"), load_in_4bit=False))
    assert logp_difference(logps_of(tmp_path / "plain", rows), trained).largest > 0.3  # why the base's 4 bits matter


def test_from_8_bits_by_the_record_is_refused(wide, tmp_path, capsys):
    """bitsandbytes rounds the activations too, which no weights can hold."""
    _, adapter = wide
    shutil.copytree(adapter, tmp_path / "run")
    record_nf4(tmp_path / "run", bits=8)
    with pytest.raises(UserError, match="This adapter can't be merged exactly"):
        export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "out")))
    assert "merged against adapter on its base in 8 bits: " in capsys.readouterr().out


def test_merging_after_a_forward_is_another_model(wide, tokenizer):
    """What loading afresh avoids: bitsandbytes repacks its weights for inference in the first forward on this CPU."""
    base, adapter = wide
    rows = merge_check_rows(tokenizer)
    expected = completion_logps(
        add_adapter(ModelSource(base).load_base(torch.float32, quantization=BitsAndBytesConfig(**NF4)), adapter),
        rows,
        1,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    )
    policy = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        policy(torch.tensor([rows[0]["prompt_ids"]]))
    layer = model.model.layers[0].self_attn.q_proj.base_layer
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack 4-bit weights on this CPU")
    merged = policy.merge_and_unload()
    assert logp_difference(completion_logps(merged, rows, 1), expected).largest > 0.3


def test_the_runs_record_says_that_the_base_was_in_4_bits(wide, tokenizer, tmp_path):
    adapter = wide[1]
    run = tmp_path / "run"
    shutil.copytree(adapter, run)
    record_nf4(run, loss_type=["nca"], beta=0.3)
    export(ExportOptions(str(run), str(tmp_path / "by record")))
    flags = ["--model_name_or_path", adapter, "--output", str(tmp_path / "by option")]
    assert main([*flags, "--load_in_4bit", "true"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("by record", "by option"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    card = (tmp_path / "by record" / "README.md").read_text()
    assert "`base` trained on prompts with several rewarded completions each by nca-align" in card
    assert 'tags: ["nca-align", "nca"]' in card
    assert "| `loss_type` | nca |" in card
    assert "| `beta` | 0.3 |" in card
    export(ExportOptions(str(run), str(tmp_path / "against it"), load_in_4bit=False))
    c = load_file(tmp_path / "against it" / "model.safetensors")
    assert not torch.equal(a["model.layers.0.mlp.up_proj.weight"], c["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.slow
def test_a_qlora_run_is_exported_as_it_was_trained(wide, tokenizer, tmp_path):
    """Trained by NCATrainer: evaluated there, exported from its folder alone, and evaluated again."""
    from datasets import Dataset

    from conftest import reward_rows
    from nca_align import NCAConfig, NCATrainer

    base, _ = wide
    args = NCAConfig(
        str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, save_steps=3, report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = NCATrainer(
        model=base, args=args, train_dataset=Dataset.from_list(reward_rows(8, 3)), processing_class=tokenizer,
        quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    rows = merge_check_rows(tokenizer)
    trained = completion_logps(trainer.model.eval(), rows, 1)
    found = export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "out"), dtype="float32"))
    assert found.merged.largest < 0.02
    assert logp_difference(logps_of(tmp_path / "out", rows), trained).largest < 0.05
    assert logp_difference(logps_of(base, rows), trained).largest > 0.3
    assert "| `learning_rate` | 0.01 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_merge_that_is_off_is_refused(adapter_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_command, "merge", lambda model, adapter: model)  # forgets the adapter
    assert main(["--model_name_or_path", adapter_dir, "--output", str(tmp_path / "out")]) == 2
    assert re.search(r"log-probabilities are up to [\d.]+ nats per sequence from the adapter's, but .* at most 0\.05",
                     capsys.readouterr().err)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_no_numbers_is_refused(model_dir, tmp_path):
    adapter = make_adapter(model_dir, tmp_path / "adapter", std=float("nan"))
    with pytest.raises(UserError, match=r"can't be merged \(NaNs detected.*\); use it unmerged"):
        export(ExportOptions(adapter, str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"the adapter in \S+ can't be merged \(NaNs detected"):
        merge(AutoModelForCausalLM.from_pretrained(model_dir), adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_output_that_exists_is_refused(adapter_dir, tmp_path):
    with pytest.raises(UserError, match=f"`output` {tmp_path} exists already; choose another folder, or remove it"):
        export(ExportOptions(adapter_dir, str(tmp_path)))


def test_an_output_that_another_job_made_while_this_one_waited_for_it_is_refused_before_the_work(
    adapter_dir, tmp_path, monkeypatch
):
    output = tmp_path / "out"

    @contextmanager
    def waited(path):
        output.mkdir()
        yield

    monkeypatch.setattr(export_command, "own_file", waited)
    monkeypatch.setattr(export_command, "_export_adapter", lambda *args: pytest.fail("worked"))
    with pytest.raises(UserError, match=f"`output` {output} exists already"):
        export(ExportOptions(adapter_dir, str(output)))
    assert list(output.iterdir()) == []


def test_what_has_no_weights_to_merge_is_refused(model_dir, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is a PROMPT_TUNING adapter, which adds tokens and changes no weight"):
        export(ExportOptions(str(tmp_path / "adapter"), str(tmp_path / "out")))


def test_a_whole_model_is_copied(model_dir, tokenizer, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    for file in Path(model_dir).iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "README.md", "curves.png"):
        (run / name).write_text("the run's")
    assert export(ExportOptions(str(run), str(tmp_path / "out"))) is None
    assert "is a whole model, no adapter: copied as it is" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in Path(model_dir).iterdir()} | {"README.md"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert "nca-align" in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    export(ExportOptions(str(run), str(tmp_path / "half"), dtype="bfloat16"))
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (tmp_path / "half" / "tokenizer.json").exists()


def test_a_whole_model_without_a_tokenizer_is_refused(tokenizer, tmp_path):
    build_model(tokenizer).save_pretrained(tmp_path / "run")
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(UserError, match=r"^`model_name_or_path` \S+ could not be loaded \(.*tokenizer"):
            export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "out"), dtype=dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_said_of_images_comes_along(tokenizer, tmp_path):
    """vLLM wants it of a model that also reads images, and it is beside the base, not the adapter."""
    base = make_base(tmp_path / "base", tokenizer)
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    for name in names:
        (tmp_path / "base" / name).write_text(f'{{"of": "{name}"}}')
    adapter = make_adapter(base, tmp_path / "adapter", std=0.0)
    for i, settings in enumerate([{}, {"dtype": "float16"}]):
        for source in (base, adapter):
            output = tmp_path / f"{Path(source).name}{i}"
            export(ExportOptions(source, str(output), **settings))
            assert all((output / name).read_text() == f'{{"of": "{name}"}}' for name in names)


def test_the_card_asks_as_the_model_is_asked(model_dir, tmp_path):
    """A model without a chat template refuses messages; each card's own code is run."""
    from transformers import pipeline

    shutil.copytree(model_dir, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    make_adapter(str(tmp_path / "base"), tmp_path / "adapter", std=0.0)
    for name in ("base", "adapter"):
        export(ExportOptions(str(tmp_path / name), str(tmp_path / f"{name}-out")))
    export(ExportOptions(model_dir, str(tmp_path / "chat-out")))
    generator = pipeline("text-generation", model=str(tmp_path / "base-out"))
    for name, kind in (("base", str), ("adapter", str), ("chat", list)):
        card = (tmp_path / f"{name}-out" / "README.md").read_text()
        prompt = re.search(r"^prompt = (.+)$", card, re.M)[1]
        prompt = json.loads(prompt)
        assert isinstance(prompt, kind)
        assert "print(generator(prompt," in card
        if kind is str:
            assert generator(prompt, max_new_tokens=2, return_full_text=False)[0]["generated_text"]


UNREAD = {
    "quant type": (
        {"bnb_4bit_quant_type": "fp4"},
        "`bnb_4bit_quant_type` is 'fp4', which only `load_in_4bit: true` reads",
    ),
    "nested": (
        {"use_bnb_nested_quant": True},
        "`use_bnb_nested_quant` is True, which only `load_in_4bit: true` reads",
    ),
    "not in 4 bits": ({"use_bnb_nested_quant": True, "load_in_4bit": False}, "`use_bnb_nested_quant` is True"),
    "4 bits": ({"load_in_4bit": True}, "`load_in_4bit` is True, but `model_name_or_path` .* is a whole model"),
    "base": ({"base": "nowhere"}, "`base` is 'nowhere', but `model_name_or_path` .* is a whole model, which is taken"),
    "data": ({"dataset_name": "rows.jsonl"}, "`dataset_name` is 'rows.jsonl', but `model_name_or_path` .* is a whole"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_options_that_would_not_be_read_are_refused(name, model_dir, tmp_path):
    settings, message = UNREAD[name]
    with pytest.raises(ValueError, match=message):
        export(ExportOptions(model_dir, str(tmp_path / "out"), **settings))
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused(model_dir, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text("")
    assert main(["--model_name_or_path", model_dir, "--output", str(tmp_path / "one.jsonl" / "e12")]) == 2
    assert f"error: `output` {tmp_path}/one.jsonl/e12 can't be written: File exists; " in capsys.readouterr().err


def test_no_model_in_the_folder(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert main(["--model_name_or_path", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert "could not be loaded" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_comparison_on_ones_own_data(adapter_dir, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in scored_rows("own")[:3]))
    found = export(ExportOptions(adapter_dir, str(tmp_path / "out"), dataset_name=str(data)))
    assert found.sequences == 12
    assert found.merged.largest < 0.02


def test_the_texts_are_long_enough_to_show_a_difference(tokenizer):
    rows = merge_check_rows(tokenizer)
    assert len(rows) == 6
    assert all(len(row["completion_ids"][0]) > 50 for row in rows)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path) if tokenizer.name_or_path else tokenizer
    template, bare.chat_template = bare.chat_template, None
    try:
        text = merge_check_rows(bare)
    finally:
        bare.chat_template = template
    assert bare.decode(text[0]["prompt_ids"]).startswith("Alice was beginning")
    assert bare.decode(text[0]["completion_ids"][0]).startswith("Once or twice")


def test_the_card_names_a_base_of_the_hub_and_no_place_on_this_machine(adapter_dir, model_dir, tmp_path):
    from nca_align.commands.export.model_card import model_card

    export(ExportOptions(adapter_dir, str(tmp_path / "mine")))
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ")
    assert "base_model" not in card
    # its folder has no run's record, and may come from anywhere
    assert " exported by nca-align" in card
    assert 'tags: ["nca-align"]' in card
    assert str(Path(model_dir).parent) not in card
    assert 'model="mine"' in card
    assert re.search(r"0\.00\d\d nats per sequence at most", card)
    assert 'base_model: "org/base"' in model_card("out", adapter_dir, "org/base", chat=True)


class TestPush:
    @pytest.mark.parametrize("private", [True, False])
    def test_the_folder_is_sent(self, private, adapter_dir, tmp_path, monkeypatch, capsys):
        import huggingface_hub

        calls = []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **kw: calls.append((name, kw)))
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name: SimpleNamespace(private=private))
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **kw: calls.append(kw))
        export(ExportOptions(adapter_dir, str(tmp_path / "out"), push="me/aligned"))
        assert calls == [
            ("me/aligned", {"private": True, "exist_ok": True}),
            {"repo_id": "me/aligned", "folder_path": tmp_path / "out"},
        ]
        said = "and me/aligned on the Hub, private" if private else "and me/aligned on the Hub, public as it was"
        assert said in capsys.readouterr().out

    def test_no_network_leaves_the_folder(self, adapter_dir, tmp_path, capsys):
        flags = ["--model_name_or_path", adapter_dir, "--output", str(tmp_path / "out"), "--push", "me/aligned"]
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert "`push` me/aligned: the Hub did not take it" in error
        assert f"`hf upload me/aligned {tmp_path / 'out'}` sends it later." in error
        assert (tmp_path / "out" / "model.safetensors").exists()


class TestNextSteps:
    """The end of `export`: commands that work as they are printed."""

    def test_the_commands_have_the_path_quoted_for_a_shell(self, monkeypatch):
        monkeypatch.setattr(next_steps_module, "find_spec", lambda name: None)
        text = next_steps(Path("runs/it's mine"), chat=True, trust_remote_code=True)
        install, serve, chat = (shlex.split(line, comments=True) for line in text.splitlines()[1:4])
        assert install == ["pip", "install", "transformers[serving]"]
        assert serve == ["transformers", "serve", "runs/it's mine", "--trust-remote-code"]
        assert chat == ["transformers", "chat", "runs/it's mine"]

    def test_nothing_is_installed_twice_and_a_base_model_completes_text(self, monkeypatch):
        monkeypatch.setattr(next_steps_module, "find_spec", lambda name: name)
        text = next_steps(Path("runs/base"), chat=False)
        assert "pip install" not in text
        serve, ask = (shlex.split(line) for line in text.splitlines()[1:3])
        assert serve == ["transformers", "serve", "runs/base"]
        assert ask[:2] == ["curl", "http://localhost:8000/v1/completions"]
        assert json.loads(ask[-1])["model"] == "runs/base"

    def test_they_are_commands_of_the_installed_transformers(self):
        """The names of the commands and of the one flag, as its own command line has them."""
        from inspect import signature

        from transformers.cli.chat import Chat
        from transformers.cli.serve import Serve

        assert {"force_model", "trust_remote_code", "port"} <= set(signature(Serve).parameters)
        assert signature(Serve).parameters["port"].default == next_steps_module.PORT
        assert list(signature(Chat).parameters)[:2] == ["model_id", "base_url"]

    @pytest.mark.parametrize("chat", [True, False])
    def test_export_ends_with_them(self, chat, model_dir, tmp_path, capsys):
        source = shutil.copytree(model_dir, tmp_path / "source")
        if not chat:
            (source / "chat_template.jinja").unlink()
        output = tmp_path / "whole"
        assert main(["--model_name_or_path", str(source), "--output", str(output)]) == 0
        text = capsys.readouterr().out
        assert text.index("is the model") < text.index(f"transformers serve {output}\n")
        assert (f"transformers chat {output}\n" in text) == chat
        assert ("/v1/completions" in text) != chat
