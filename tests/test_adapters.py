"""Every kind of adapter of PEFT starts at its reference, moves, is saved, loaded and merged, or is refused."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import build_model, build_tokenizer
from nca_align.commands.export.command import ExportOptions, export
from nca_align.commands.export.merge import logp_difference, merge_check_rows
from nca_align.errors import UnsupportedError, UserError
from nca_align.evaluation.callbacks import RankingCallback
from nca_align.models import plain_lora
from nca_align.models import policy as policies
from nca_align.models.loading import ModelSource
from nca_align.models.logprobs import completion_logps
from nca_align.models.policy import as_reference
from nca_align.training import adapters, saving
from test_startup_checks import log_ratios, said, trainer

# PEFT says much of what it is asked to do, and reads names that transformers renames
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LINEAR = ["q_proj", "v_proj", "down_proj"]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "adapters.md"


@dataclass
class Kind:
    """What a kind of adapter does here.

    Args:
        options: of its config; `refused` kinds need none.
        layout: what `layout: auto` comes to.
        reference: `base`, where the adapter off is what it starts from, or `start`, a copy of its own start.
        merges: what `nca-align export` says where it can't merge it into this model.
        resumes: whether a stopped run goes on.
        refused: why it isn't trained.
    """

    options: dict | None = None
    layout: str = "prefix_shared"
    reference: str = "base"
    merges: str = "yes"
    resumes: bool = True
    refused: str = ""

    @property
    def continues(self) -> bool:
        """PEFT loads no prompt for training."""
        return not self.virtual

    @property
    def virtual(self) -> bool:
        """Whether it puts virtual tokens in front of a row."""
        return self.merges == "adds tokens and changes no weight"


def linear(**options) -> Kind:
    return Kind({"target_modules": LINEAR, **options})


def vectors(**options) -> Kind:
    return Kind({"target_modules": ["q_proj", "o_proj"], **options})


def starts_elsewhere(**options) -> Kind:
    return Kind({"target_modules": LINEAR, **options}, reference="start")


def prompt(resumes: bool = True, **options) -> Kind:
    return Kind(options, "padded", "start", "adds tokens and changes no weight", resumes)


KINDS = {
    "ADALORA": linear(init_r=4, target_r=2, total_step=10),
    "ADAMSS": linear(r=8, num_subspaces=2),
    "ADAPTION_PROMPT": Kind({"adapter_len": 3, "adapter_layers": 2}, refused="it keeps the forward that the model had"),
    "BEFT": Kind({"target_modules": ["v_proj"]}, merges="Base layer has no bias"),
    "BOFT": linear(),
    "C3A": starts_elsewhere(block_size=8),
    "CARTRIDGE": prompt(num_virtual_tokens=3),
    "CPT": prompt(False, cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    "DEFT": linear(r=4),
    "DELORA": linear(r=4),
    "FOURIERFT": starts_elsewhere(n_frequency=50),
    "FROD": vectors(progressbar=False),
    "GLORA": linear(r=4),
    "GRALORA": linear(r=4),
    "HIRA": linear(r=4),
    "HRA": linear(r=4),
    "IA3": Kind({"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LILY": Kind({"target_modules": LINEAR, "r": 4}, refused="it mixes by a mean over all tokens of the batch"),
    "LN_TUNING": Kind({}),
    "LOHA": linear(r=4),
    "LOKR": linear(r=4),
    "LORA": linear(r=4),
    "MISS": linear(r=4),
    "MULTITASK_PROMPT_TUNING": Kind(
        {"num_virtual_tokens": 3, "num_tasks": 2}, refused="each of its forwards needs `task_ids`"
    ),
    "OFT": linear(oft_block_size=8),
    "OSF": linear(),
    "PEANUT": linear(r=4),
    "POLY": Kind({"target_modules": LINEAR}, refused="each of its forwards needs `task_ids`"),
    "PREFIX_TUNING": prompt(num_virtual_tokens=3),
    "PROMPT_TUNING": prompt(num_virtual_tokens=3),
    "PSOFT": linear(r=4),
    "PVERA": vectors(r=8),
    "P_TUNING": prompt(False, num_virtual_tokens=3),
    "RANDLORA": linear(r=4),
    "ROAD": linear(group_size=8),
    "SHADOW": Kind({}, "padded", merges="cannot be merged into the base model"),
    "SHIRA": linear(r=4),
    "SUPERTUNING": linear(sparsity=0.9),
    "TINYLORA": linear(),
    "TRAINABLE_TOKENS": Kind({"token_indices": list(range(4, 200))}),
    "UNILORA": starts_elsewhere(),
    "VBLORA": starts_elsewhere(r=2, num_vectors=8, vector_length=16),
    "VERA": vectors(r=8),
    "WAVEFT": linear(n_frequency=50),
    "XLORA": Kind({"adapters": {}}, refused="it mixes adapters into one that is not the base"),
}
TRAINED = [name for name in KINDS if not KINDS[name].refused]
REFUSED = [name for name in KINDS if KINDS[name].refused]
# One of each way in which they differ; the others take a minute
FIRST = {"IA3", "LN_TUNING", "LORA", "P_TUNING", "SHADOW", "VBLORA"}
TRAINED_FAST_AND_SLOW = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED
]  # fmt: skip


def config_of(name: str, **options):
    """A kind's config; the test of a kind that this PEFT doesn't have, or that needs another library, is skipped."""
    if name not in set(peft.PeftType):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    if name == "ADAMSS":
        pytest.importorskip("sklearn")
    of_kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    return of_kind(task_type="CAUSAL_LM", **{**(KINDS[name].options or {}), **options})


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": LINEAR, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("base"), build_tokenizer()
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fresh(base: str):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def run(folder: Path, model, **options):
    """A trainer of two steps that move every weight well."""
    torch.manual_seed(0)
    return trainer(folder, model, **{"max_steps": 2, "learning_rate": 1e-2, **options})


def logps(model) -> list[list[float]]:
    return completion_logps(model.eval(), merge_check_rows(build_tokenizer())[:3], 1)


def apart(model, expected: list[list[float]]) -> float:
    """The largest difference in nats a sequence."""
    return logp_difference(logps(model), expected).largest


def ref_logps(nca) -> torch.Tensor:
    batch = nca.data_collator([nca.train_dataset[i] for i in range(2)])
    return nca._reference_logps(batch)[batch["valid"]]


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: own.detach().clone() for name, own in model.named_parameters() if own.requires_grad}


def all_but_unused(name: str, model) -> set[str]:
    """What a step moves: ShadowPEFT's last layer updates a state that nobody reads."""
    last = model.config.num_hidden_layers - 1
    return {own for own in trainable(model) if name != "SHADOW" or f"layers.{last}.shadow_update" not in own}


# The table


def test_every_kind_of_peft_is_in_the_table():
    """One that is new is looked at first; a PEFT that is older lacks some."""
    assert {kind.value for kind in peft.PeftType} <= KINDS.keys()
    assert len(KINDS.keys() & set(peft.PeftType)) > 40


def test_the_page_has_the_table():
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| `[A-Z0-9_]+` ", line)]
    yes = {True: "yes", False: "no"}
    expected = []
    for name, kind in KINDS.items():
        row = [kind.layout, {"base": "the base", "start": "its own start"}[kind.reference]]
        row += [yes[kind.continues], yes[kind.resumes], {"BEFT": "with a bias", "SHADOW": "no"}.get(name, "yes")]
        if kind.virtual:
            row[-1] = "no"
        expected.append(f"| `{name}` | {' | '.join(row)} |")
        if kind.refused:
            expected[-1] = f"| `{name}` | refused: {adapters._REFUSED[name]} | | | | |"
    assert lines == expected


# Each kind


@pytest.mark.parametrize("name", TRAINED_FAST_AND_SLOW)
def test_a_new_adapter_trains_and_is_read_back(name, base, tmp_path):
    kind = KINDS[name]
    nca = run(tmp_path, base, peft_config=config_of(name))
    assert nca.data_collator.layout == kind.layout
    assert list(nca.model.peft_config) == (["default"] if kind.reference == "base" else ["default", "ref"])
    assert log_ratios(nca).abs().max() < 1e-4
    before, started = trainable(nca.model), ref_logps(nca)
    nca.train()
    after = dict(nca.model.named_parameters())
    assert {own for own, value in before.items() if not torch.equal(after[own], value)} == all_but_unused(
        name, nca.model
    )
    assert log_ratios(nca).abs().max() > 1e-3
    assert (ref_logps(nca) - started).abs().max() < 1e-5  # it is still what training began with
    nca.save_model()
    trained = logps(nca.model)
    with as_reference(nca.model):
        reference = logps(nca.model)
    policy = ModelSource.of(str(tmp_path)).load_policy("float32")
    assert apart(policy, trained) < 1e-3
    with as_reference(policy):
        assert apart(policy, reference) < 1e-3
    if kind.reference == "base":
        assert apart(fresh(base), reference) < 1e-3
    # Before the first step a wrong layout may not show, for the adapter changes nothing there
    nca._checks._model_checked = False
    with torch.no_grad():
        for own in nca.model.parameters():
            if own.requires_grad:
                own.add_(0.05 * torch.randn_like(own))
    nca._checks.check_model(nca.model, gradients=True)
    assert nca.data_collator.layout == kind.layout


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_adapter_is_exported_resumed_and_trained_on(name, base, tmp_path):
    kind, options = KINDS[name], {"save_strategy": "steps", "save_steps": 1}
    nca = run(tmp_path / "run", base, peft_config=config_of(name), **options)
    nca.train()
    nca.save_model()
    trained = logps(nca.model)
    exporting = ExportOptions(str(tmp_path / "run"), str(tmp_path / "out"))
    if kind.merges == "yes":
        export(exporting)
        assert apart(fresh(str(tmp_path / "out")), trained) < 0.01
    else:
        with pytest.raises(UserError, match=kind.merges):
            export(exporting)
    _resume(name, base, tmp_path / "run", trained, options)
    if not kind.continues:
        with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
            peft.PeftModel.from_pretrained(fresh(base), tmp_path / "run", is_trainable=True)
        return
    policy = peft.PeftModel.from_pretrained(fresh(base), tmp_path / "run", is_trainable=True)
    nca = run(tmp_path / "on", policy)
    assert apart(nca.model, trained) < 1e-3  # the copy leaves it as it was
    assert log_ratios(nca).abs().max() == 0
    nca.train()
    assert log_ratios(nca).abs().max() > 1e-3
    nca.save_model()
    expected = logps(nca.model)
    policy = ModelSource.of(str(tmp_path / "on")).load_policy("float32")
    assert apart(policy, expected) < 1e-3
    with as_reference(policy):
        assert apart(policy, trained) < 1e-3


def _resume(name: str, base: str, folder: Path, trained: list[list[float]], options: dict) -> None:
    shutil.rmtree(folder / "checkpoint-2")
    nca = run(folder, base, peft_config=config_of(name), **options)
    if KINDS[name].resumes:
        nca.train(resume_from_checkpoint=True)
        assert apart(nca.model, trained) < 1e-6
    else:
        with pytest.raises(UnsupportedError, match=f"can't be gone on from: of this {name} adapter PEFT saves"):
            nca.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_that_does_not_fit_is_refused_before_anything_is_read(name):
    config = config_of(name)
    with pytest.raises(
        UnsupportedError, match=f"an adapter of the kind {name} can't be trained here: {KINDS[name].refused}"
    ):
        trainer(Path("unused"), "no/such/model", peft_config=config)


def test_lily_would_train_on_other_numbers(base, tmp_path, monkeypatch):
    """Why it is refused: after a step its logits depend on later tokens, which no check before it can see."""
    monkeypatch.setattr(adapters, "_REFUSED", {})
    nca = run(tmp_path, base, peft_config=config_of("LILY"), learning_rate=0.1)
    nca.train()
    nca._checks._model_checked = False
    with pytest.raises(UnsupportedError, match="with a token that comes after them"):
        nca._checks.check_model(nca.model, gradients=True)


def test_adalora_says_what_it_does_not_do(base, tmp_path, caplog):
    run(tmp_path, base, peft_config=config_of("ADALORA"))
    assert any("AdaLoRA keeps its ranks at `init_r` here" in line for line in said(caplog))


def test_the_start_of_virtual_tokens_is_not_trained(base, tmp_path):
    """Two processes would wait for its gradients."""
    nca = run(tmp_path, base, peft_config=config_of("P_TUNING"))
    assert not any("ref" in name.split(".") for name in trainable(nca.model))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("PREFIX_TUNING", {"encoder_hidden_size": 16, "prefix_projection": True}, "PEFT saves what its encoder makes"),
        ("LORA", {"monteclora_config": peft.MontecloraConfig()}, "adapter draws from numbers that no checkpoint holds"),
    ],
)
def test_what_no_checkpoint_holds_is_not_resumed(name, options, reason, base, tmp_path):
    saving = {"peft_config": config_of(name, **options), "save_strategy": "steps", "save_steps": 1}
    run(tmp_path, base, **saving).train()
    with pytest.raises(UnsupportedError, match=reason):
        run(tmp_path, base, **saving).train(resume_from_checkpoint=True)


# Names


def test_an_adapter_of_another_name_and_several_are_refused(base, tmp_path):
    named = peft.get_peft_model(fresh(base), lora(), adapter_name="mine")
    with pytest.raises(UserError, match="`model` has the adapters mine, but NCATrainer trains one, which is"):
        trainer(tmp_path, named)
    several = peft.get_peft_model(fresh(base), lora())
    several.add_adapter("other", lora())
    with pytest.raises(UserError, match="`model` has the adapters default, other, but"):
        trainer(tmp_path, several, ref_model=fresh(base))
    again = run(tmp_path, peft.get_peft_model(fresh(base), lora())).model
    with pytest.raises(UserError, match="`model` has the adapters default, ref, but"):
        trainer(tmp_path, again)
    again.delete_adapter("ref")
    assert log_ratios(trainer(tmp_path, again)).abs().max() == 0


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
def test_a_base_without_biases_has_none_to_train(continued, base, tmp_path):
    config = lora(bias="all", lora_bias=True)
    policy, options = (peft.get_peft_model(fresh(base), config), {}) if continued else (base, {"peft_config": config})
    nca = run(tmp_path, policy, **options)
    before = ref_logps(nca)
    nca.train()
    assert torch.equal(ref_logps(nca), before)
    assert nca.model.peft_config["default"].bias == "all"


# LoRA that is on from its invocation


def test_a_lora_that_is_never_invoked_is_refused(base, tmp_path):
    tokenizer = build_tokenizer()
    invocation = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match=r"`alora_invocation_tokens` is \[5, 6\], but row 0 of `train_dataset`"):
        run(tmp_path, base, peft_config=lora(alora_invocation_tokens=[5, 6]))
    with pytest.raises(UserError, match=r"`alora_invocation_tokens` is \[\], but row 0"):
        run(tmp_path, base, peft_config=lora(alora_invocation_tokens=[]))
    tokenised = [
        {"prompt_ids": [7, 5, 6, 7 + i], "completion_ids": [[8], [9]], "rewards": [0.0, 1.0]} for i in range(3)
    ]
    tokenised[2]["prompt_ids"] = [5, 7, 6]
    stream = IterableDataset.from_generator(lambda: iter(tokenised))
    for rows in (tokenised, stream):
        with pytest.raises(UserError, match=r"is \[5, 6\], but row 2 of"):
            run(tmp_path, base, rows=rows, peft_config=lora(alora_invocation_tokens=[5, 6]))
    nca = run(tmp_path, base, peft_config=lora(alora_invocation_tokens=invocation))
    before = trainable(nca.model)
    nca.train()
    assert not all(torch.equal(value, dict(nca.model.named_parameters())[name]) for name, value in before.items())
    assert log_ratios(nca).abs().max() > 1e-3


# Options of LoRA that change the base


def test_layers_are_not_repeated_a_second_time_for_the_copy(base, tmp_path):
    policy = peft.get_peft_model(fresh(base), lora(layer_replication=[(0, 2), (1, 2)], init_lora_weights=False))
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


def subtracted(name: str, folder: Path, base: str, **options):
    settings, prepare = SUBTRACTED[name]
    torch.manual_seed(0)
    model, config = fresh(base), lora(**copy.deepcopy(settings))
    prepare(model, config)
    return run(folder, model, peft_config=config, save_strategy="steps", save_steps=1, **options)


@pytest.mark.parametrize("name", SUBTRACTED)
def test_lora_that_edits_the_base_is_saved_for_the_base_as_it_is(name, base, tmp_path):
    """By PEFT alone, from the run's folder; by us from a checkpoint, too, which holds it as it is trained."""
    nca = subtracted(name, tmp_path, base)
    assert "ref" in nca.model.peft_config
    assert log_ratios(nca).abs().max() == 0
    assert not torch.equal(nca.model.get_base_model().model.layers[0].self_attn.q_proj.weight,
                           fresh(base).model.layers[0].self_attn.q_proj.weight)  # fmt: skip
    nca.train()
    nca.save_model()
    trained, plain = logps(nca.model), fresh(base)
    assert apart(plain, trained) > 0.3
    with as_reference(nca.model):
        assert apart(plain, logps(nca.model)) < 2e-3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    assert not (tmp_path / "ref").exists()
    policy = peft.PeftModel.from_pretrained(fresh(base), tmp_path)
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


def test_loftq_is_refused_before_it_changes_the_base(base, tmp_path):
    config = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    with pytest.raises(UnsupportedError, match="`init_lora_weights` is 'loftq', which quantises the base's weights"):
        run(tmp_path, base, peft_config=config)
    policy = peft.get_peft_model(fresh(base), lora())
    policy.peft_config["default"].init_lora_weights = "loftq"  # as PEFT leaves it, which starts it on a GPU alone
    with pytest.raises(UnsupportedError, match="`init_lora_weights` is 'loftq'"):
        run(tmp_path, policy)


def test_what_peft_saves_by_itself_is_another_policy(base, tmp_path, monkeypatch):
    """Why the adapter is converted."""
    monkeypatch.setattr(saving, "make_plain", lambda folder: None)
    nca = subtracted("lora_ga", tmp_path, base)
    nca.train()
    nca.save_model()
    assert apart(peft.PeftModel.from_pretrained(fresh(base), tmp_path), logps(nca.model)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa_niter_4", "lora_ga"])
def test_a_run_that_edits_the_base_is_resumed_exported_and_trained_on(name, base, tmp_path):
    nca = subtracted(name, tmp_path / "run", base)
    nca.train()
    nca.save_model()
    trained = logps(nca.model)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = subtracted(name, tmp_path / "run", base)
    again.train(resume_from_checkpoint=True)
    assert apart(again.model, trained) == 0
    again.save_model()  # over what was converted before
    for source in ("run", "run/checkpoint-2"):
        output = tmp_path / f"{Path(source).name}-out"
        export(ExportOptions(str(tmp_path / source), str(output)))
        assert apart(fresh(str(output)), trained) < 0.01
    policy = peft.PeftModel.from_pretrained(fresh(base), tmp_path / "run", is_trainable=True)
    nca = run(tmp_path / "on", policy)
    assert apart(nca.model, trained) < 2e-3
    assert log_ratios(nca).abs().max() == 0


def test_a_start_that_is_another_one_is_no_run_to_resume(base, tmp_path):
    """LoRA-GA of other gradients: the checkpoint's adapter would lie on another base."""
    subtracted("lora_ga", tmp_path, base).train()
    model, config = fresh(base), lora(**SUBTRACTED["lora_ga"][0])
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
