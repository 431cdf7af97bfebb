"""LoRA that trains the base itself, that starts out of its weights, or that is on only where it is invoked."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file

from conftest import build_model, build_tokenizer
from nca_align.commands.export.command import ExportOptions, export
from nca_align.errors import UnsupportedError, UserError
from nca_align.evaluation.callbacks import RankingCallback
from nca_align.models import plain_lora
from nca_align.models import policy as policies
from nca_align.models.loading import ModelSource
from nca_align.models.policy import as_reference
from nca_align.training import adapters, saving
from test_adapters import LINEAR, apart, fresh, logps, lora, ref_logps, run, trainable
from test_startup_checks import log_ratios

# PEFT says much of what it is asked to do, and reads names that transformers renames
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# Biases of the base


def with_biases():
    model = build_model(build_tokenizer(), attention_bias=True)
    with torch.no_grad():
        for name, own in model.named_parameters():
            if name.endswith(".bias"):
                own.normal_(0, 0.1)
    return model


def biased(bias: str, continued: bool) -> tuple:
    """A policy whose adapter trains biases of its base, and what else the trainer is given."""
    config = lora(bias=bias)
    return (peft.get_peft_model(with_biases(), config), {}) if continued else (with_biases(), {"peft_config": config})


@pytest.mark.parametrize(("bias", "continued"), [("all", False), ("lora_only", True)])
def test_biases_of_the_base_leave_no_live_reference(bias, continued, tmp_path, monkeypatch):
    policy, options = biased(bias, continued)
    with pytest.raises(UserError, match=f"the adapter has `bias` '{bias}', which trains biases of the base"):
        run(tmp_path, policy, **options)
    policy, options = biased(bias, continued)
    nca = run(tmp_path, policy, ref_model=with_biases(), **options)
    before = ref_logps(nca)
    nca.train()
    assert torch.equal(ref_logps(nca), before)
    with pytest.raises(UserError, match="switching the adapter off does not undo that"), as_reference(nca.model):
        pass
    for module in (adapters, policies):
        monkeypatch.setattr(module, "refuse_trained_biases", lambda model: None)
    policy, options = biased(bias, continued)
    nca = run(tmp_path, policy, **options)
    before = ref_logps(nca)
    nca.train()
    assert (ref_logps(nca) - before).abs().max() > 1e-3  # why it is refused


@pytest.mark.parametrize(("bias", "continued"), [("all", True), ("lora_only", False)])
def test_biases_of_the_base_train_beside_a_cached_reference(bias, continued, tmp_path):
    """Its values are from before the first step, when they were the base's; new data has none of them afterwards."""
    policy, options = biased(bias, continued)
    expected, saving = logps(with_biases()), {"save_strategy": "steps", "save_steps": 1}
    nca = run(tmp_path, policy, precompute_ref_log_probs=True, **options, **saving)
    assert apart(nca.model, expected) < 1e-4
    assert log_ratios(nca).abs().max() < 1e-4
    before, cached = trainable(nca.model), ref_logps(nca)
    nca.train()
    after = dict(nca.model.named_parameters())
    assert any(name.endswith("base_layer.bias") for name in before)
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(ref_logps(nca), cached)
    rows = [{"prompt": "one", "completions": ["two", "three"], "rewards": [0.0, 1.0]}]
    with pytest.raises(UserError, match="switching the adapter off does not undo that"):
        nca.evaluate(Dataset.from_list(rows))
    with pytest.raises(UserError, match="switching the adapter off does not undo that"):
        RankingCallback(nca, {"": rows}, build_tokenizer(), alpha=0.3, beta=0.1)
    nca.save_model()
    trained = logps(nca.model)
    assert apart(peft.PeftModel.from_pretrained(with_biases(), tmp_path), trained) < 1e-4
    shutil.rmtree(tmp_path / "checkpoint-2")
    policy, options = biased(bias, continued)
    again = run(tmp_path, policy, precompute_ref_log_probs=True, **options, **saving)
    again.train(resume_from_checkpoint=True)
    assert apart(again.model, trained) == 0


@pytest.mark.parametrize("continued", [False, True])
def test_a_base_without_biases_has_none_to_train(continued, model_dir, tmp_path):
    config = lora(bias="all", lora_bias=True)
    policy, options = (
        (peft.get_peft_model(fresh(model_dir), config), {}) if continued else (model_dir, {"peft_config": config})
    )
    nca = run(tmp_path, policy, **options)
    before = ref_logps(nca)
    nca.train()
    assert torch.equal(ref_logps(nca), before)
    assert nca.model.peft_config["default"].bias == "all"


# LoRA that is on from its invocation


def test_a_lora_that_is_never_invoked_is_refused(model_dir, tmp_path):
    tokenizer = build_tokenizer()
    invocation = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match=r"`alora_invocation_tokens` is \[5, 6\], but the prompt of row 0 of `train"):
        run(tmp_path, model_dir, peft_config=lora(alora_invocation_tokens=[5, 6]))
    with pytest.raises(UserError, match=r"`alora_invocation_tokens` is \[\], but the prompt of row 0"):
        run(tmp_path, model_dir, peft_config=lora(alora_invocation_tokens=[]))
    tokenised = [
        {"prompt_ids": [7, 5, 6, 7 + i], "completion_ids": [[8], [9]], "rewards": [0.0, 1.0]} for i in range(3)
    ]
    tokenised[2]["prompt_ids"] = [5, 7, 6]
    stream = IterableDataset.from_generator(lambda: iter(tokenised))
    for rows in (tokenised, stream):
        with pytest.raises(UserError, match=r"is \[5, 6\], but the prompt of row 2 of"):
            run(tmp_path, model_dir, rows=rows, peft_config=lora(alora_invocation_tokens=[5, 6]))
    nca = run(tmp_path, model_dir, peft_config=lora(alora_invocation_tokens=invocation))
    before = trainable(nca.model)
    nca.train()
    assert not all(torch.equal(value, dict(nca.model.named_parameters())[name]) for name, value in before.items())
    assert log_ratios(nca).abs().max() > 1e-3


# Options of LoRA that change the base


def test_layers_are_not_repeated_a_second_time_for_the_copy(model_dir, tmp_path):
    policy = peft.get_peft_model(fresh(model_dir), lora(layer_replication=[(0, 2), (1, 2)], init_lora_weights=False))
    before = logps(policy)
    nca = run(tmp_path, policy)
    assert apart(nca.model, before) == 0
    assert log_ratios(nca).abs().max() == 0
    assert nca.model.peft_config["default"].layer_replication is not None


def with_gradients(model, config) -> None:
    """What `preprocess_loraga` does, on one batch."""
    ids = torch.arange(4, 68)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, module in model.named_modules():
        if name.split(".")[-1] in LINEAR:
            module._peft_loraga_grad = module.weight.grad.detach().clone()
    model.zero_grad()


def with_eigenvectors(model, config) -> None:
    """What `preprocess_corda` does, of inputs that are not correlated."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in LINEAR:
            u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            module.eigens = SimpleNamespace(U_WC=u[:, :4], S_WC=s[:4], V_WC=v[:4].T)


SUBTRACTED: dict[str, tuple[dict, Callable]] = {
    "pissa": ({"init_lora_weights": "pissa", "use_dora": True}, lambda *_: None),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, lambda *_: None),
    "olora": (
        {
            "init_lora_weights": "olora", "use_rslora": True, "lora_alpha": 5, "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"q_proj": 12}, "modules_to_save": ["lm_head"],
            "target_modules": [*LINEAR, "embed_tokens"],
        },
        lambda *_: None,
    ),
    "corda": ({"init_lora_weights": "corda", "corda_config": peft.tuners.lora.config.CordaConfig()}, with_eigenvectors),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}, with_gradients),
}  # fmt: skip


def subtracted(name: str, folder: Path, model_dir: str, **options):
    settings, prepare = SUBTRACTED[name]
    torch.manual_seed(0)
    model, config = fresh(model_dir), lora(**copy.deepcopy(settings))
    prepare(model, config)
    return run(folder, model, peft_config=config, save_strategy="steps", save_steps=1, **options)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("pissa", "lora_ga") else pytest.mark.slow) for name in SUBTRACTED]
)
def test_lora_that_edits_the_base_is_saved_for_the_base_as_it_is(name, model_dir, tmp_path):
    """By PEFT alone, from the run's folder; by us from a checkpoint, too, which holds it as it is trained."""
    nca = subtracted(name, tmp_path, model_dir)
    assert "ref" in nca.model.peft_config
    assert log_ratios(nca).abs().max() == 0
    assert not torch.equal(nca.model.get_base_model().model.layers[0].self_attn.q_proj.weight,
                           fresh(model_dir).model.layers[0].self_attn.q_proj.weight)  # fmt: skip
    nca.train()
    nca.save_model()
    trained, plain = logps(nca.model), fresh(model_dir)
    assert apart(plain, trained) > 0.3
    with as_reference(nca.model):
        assert apart(plain, logps(nca.model)) < 2e-3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    assert not (tmp_path / "ref").exists()
    policy = peft.PeftModel.from_pretrained(fresh(model_dir), tmp_path)
    assert apart(policy, trained) < 2e-3
    with policy.disable_adapter():
        assert apart(policy, logps(plain)) == 0
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["init_lora_weights"] != True  # noqa: E712
    policy = ModelSource.of(str(checkpoint)).load_policy("float32")
    assert apart(policy, trained) < 2e-3
    with as_reference(policy):
        assert apart(policy, logps(plain)) == 0
    assert (checkpoint / "ref").exists()  # reading leaves it as it is


def test_loftq_is_refused_before_it_changes_the_base(model_dir, tmp_path):
    config = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    with pytest.raises(UnsupportedError, match="`init_lora_weights` is 'loftq', which quantises the base's weights"):
        run(tmp_path, model_dir, peft_config=config)
    policy = peft.get_peft_model(fresh(model_dir), lora())
    policy.peft_config["default"].init_lora_weights = "loftq"  # as PEFT leaves it, which starts it on a GPU alone
    with pytest.raises(UnsupportedError, match="`init_lora_weights` is 'loftq'"):
        run(tmp_path, policy)


def test_what_peft_saves_by_itself_is_another_policy(model_dir, tmp_path, monkeypatch):
    """Why the adapter is converted."""
    monkeypatch.setattr(saving, "make_plain", lambda folder: None)
    nca = subtracted("lora_ga", tmp_path, model_dir)
    nca.train()
    nca.save_model()
    assert apart(peft.PeftModel.from_pretrained(fresh(model_dir), tmp_path), logps(nca.model)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa_niter_4", "lora_ga"])
def test_a_run_that_edits_the_base_is_resumed_exported_and_trained_on(name, model_dir, tmp_path):
    nca = subtracted(name, tmp_path / "run", model_dir)
    nca.train()
    nca.save_model()
    trained = logps(nca.model)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = subtracted(name, tmp_path / "run", model_dir)
    again.train(resume_from_checkpoint=True)
    assert apart(again.model, trained) == 0
    again.save_model()  # over what was converted before
    for source in ("run", "run/checkpoint-2"):
        output = tmp_path / f"{Path(source).name}-out"
        export(ExportOptions(str(tmp_path / source), str(output)))
        assert apart(fresh(str(output)), trained) < 0.01
    policy = peft.PeftModel.from_pretrained(fresh(model_dir), tmp_path / "run", is_trainable=True)
    nca = run(tmp_path / "on", policy)
    assert apart(nca.model, trained) < 2e-3
    assert log_ratios(nca).abs().max() == 0


def test_a_start_that_is_another_one_is_no_run_to_resume(model_dir, tmp_path):
    """LoRA-GA of other gradients: the checkpoint's adapter would lie on another base."""
    subtracted("lora_ga", tmp_path, model_dir).train()
    model, config = fresh(model_dir), lora(**SUBTRACTED["lora_ga"][0])
    ids = torch.arange(100, 164)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for module_name, module in model.named_modules():
        if module_name.split(".")[-1] in LINEAR:
            module._peft_loraga_grad = module.weight.grad.detach().clone()
    nca = run(tmp_path, model, peft_config=config, save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match=r"belongs to another run.*adapter\.ref"):
        nca.train(resume_from_checkpoint=True)


def test_an_adapter_that_edits_nothing_is_saved_as_it_is(tmp_path):
    (tmp_path / "ref").mkdir()
    for folder in (tmp_path, tmp_path / "ref"):
        (folder / "adapter_config.json").write_text('{"init_lora_weights": true}')
        (folder / "adapter_model.safetensors").write_text("weights")
    plain_lora.make_plain(tmp_path)
    assert (tmp_path / "ref" / "adapter_model.safetensors").read_text() == "weights"
    with plain_lora.as_plain(str(tmp_path), quantized=False) as folder:
        assert folder == str(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"init_lora_weights": "olora"}')
    with plain_lora.as_plain(str(tmp_path), quantized=True) as folder:
        assert folder == str(tmp_path)


def test_a_conversion_that_was_cut_off_is_finished_and_what_has_no_start_stays(tmp_path):
    """A kill may leave converted weights beside the old config; a bias of the base is in no copy of the start."""
    (tmp_path / "ref").mkdir()
    trained = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(4, 2), "q.bias": torch.ones(4)}
    save_file(trained, tmp_path / "adapter_model.safetensors")
    save_file({name: trained[name] for name in list(trained)[:2]}, tmp_path / "ref" / "adapter_model.safetensors")
    config = {"init_lora_weights": "pissa", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    start = shutil.copytree(tmp_path / "ref", tmp_path / "start")
    for _ in range(2):
        plain_lora.make_plain(tmp_path)
        found = load_file(tmp_path / "adapter_model.safetensors")
        assert found["q.lora_A.weight"].shape == (4, 3)
        assert found["q.lora_B.weight"].tolist() == [[1, 1, -1, -1]] * 4
        assert torch.equal(found["q.bias"], trained["q.bias"])
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))  # as before the cut
        shutil.copytree(start, tmp_path / "ref")
