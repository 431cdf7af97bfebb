"""Every kind of adapter of PEFT starts at its reference, moves, is saved, loaded and merged, or is refused."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from conftest import build_tokenizer
from nca_align.commands.export.command import ExportOptions, export
from nca_align.commands.export.merge import logp_difference, merge_check_rows
from nca_align.errors import UnsupportedError, UserError
from nca_align.models.loading import ModelSource
from nca_align.models.logprobs import completion_logps
from nca_align.models.policy import as_reference
from nca_align.training import adapters
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


def fresh(model_dir: str):
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


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
def test_a_new_adapter_trains_and_is_read_back(name, model_dir, tmp_path):
    kind = KINDS[name]
    nca = run(tmp_path, model_dir, peft_config=config_of(name))
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
        assert apart(fresh(model_dir), reference) < 1e-3
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
def test_a_trained_adapter_is_exported_resumed_and_trained_on(name, model_dir, tmp_path):
    kind, options = KINDS[name], {"save_strategy": "steps", "save_steps": 1}
    nca = run(tmp_path / "run", model_dir, peft_config=config_of(name), **options)
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
    _resume(name, model_dir, tmp_path / "run", trained, options)
    if not kind.continues:
        with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
            peft.PeftModel.from_pretrained(fresh(model_dir), tmp_path / "run", is_trainable=True)
        return
    policy = peft.PeftModel.from_pretrained(fresh(model_dir), tmp_path / "run", is_trainable=True)
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


def _resume(name: str, model_dir: str, folder: Path, trained: list[list[float]], options: dict) -> None:
    shutil.rmtree(folder / "checkpoint-2")
    nca = run(folder, model_dir, peft_config=config_of(name), **options)
    if KINDS[name].resumes:
        nca.train(resume_from_checkpoint=True)
        assert apart(nca.model, trained) < 1e-6
    else:
        with pytest.raises(UnsupportedError, match=f"can't be resumed: of this {name} adapter PEFT saves"):
            nca.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_that_does_not_fit_is_refused_before_anything_is_read(name):
    config = config_of(name)
    with pytest.raises(
        UnsupportedError, match=f"an adapter of the kind {name} can't be trained here: {KINDS[name].refused}"
    ):
        trainer(Path("unused"), "no/such/model", peft_config=config)


def test_lily_would_train_on_other_numbers(model_dir, tmp_path, monkeypatch):
    """Why it is refused: after a step its logits depend on later tokens, which no check before it can see."""
    monkeypatch.setattr(adapters, "_REFUSED", {})
    nca = run(tmp_path, model_dir, peft_config=config_of("LILY"), learning_rate=0.1)
    nca.train()
    nca._checks._model_checked = False
    with pytest.raises(UnsupportedError, match="with a token that comes after them"):
        nca._checks.check_model(nca.model, gradients=True)


def test_adalora_says_what_it_does_not_do(model_dir, tmp_path, caplog):
    run(tmp_path, model_dir, peft_config=config_of("ADALORA"))
    assert any("AdaLoRA keeps its ranks at `init_r` here" in line for line in said(caplog))


def test_the_start_of_virtual_tokens_is_not_trained(model_dir, tmp_path):
    """Two processes would wait for its gradients."""
    nca = run(tmp_path, model_dir, peft_config=config_of("P_TUNING"))
    assert not any("ref" in name.split(".") for name in trainable(nca.model))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("PREFIX_TUNING", {"encoder_hidden_size": 16, "prefix_projection": True}, "PEFT saves what its encoder makes"),
        ("LORA", {"monteclora_config": peft.MontecloraConfig()}, "adapter draws from numbers that no checkpoint holds"),
    ],
)
def test_what_no_checkpoint_holds_is_not_resumed(name, options, reason, model_dir, tmp_path):
    saving = {"peft_config": config_of(name, **options), "save_strategy": "steps", "save_steps": 1}
    run(tmp_path, model_dir, **saving).train()
    with pytest.raises(UnsupportedError, match=reason):
        run(tmp_path, model_dir, **saving).train(resume_from_checkpoint=True)


# Names


def test_an_adapter_of_another_name_and_several_are_refused(model_dir, tmp_path):
    named = peft.get_peft_model(fresh(model_dir), lora(), adapter_name="mine")
    with pytest.raises(UserError, match="`model` has the adapters mine, but NCATrainer trains one, called default"):
        trainer(tmp_path, named)
    several = peft.get_peft_model(fresh(model_dir), lora())
    several.add_adapter("other", lora())
    with pytest.raises(UserError, match="`model` has the adapters default, other, but"):
        trainer(tmp_path, several, ref_model=fresh(model_dir))
    again = run(tmp_path, peft.get_peft_model(fresh(model_dir), lora())).model
    with pytest.raises(UserError, match="`model` has the adapters default, ref, but"):
        trainer(tmp_path, again)
    again.delete_adapter("ref")
    assert log_ratios(trainer(tmp_path, again)).abs().max() == 0
