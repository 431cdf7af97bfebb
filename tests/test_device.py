"""Where NCAConfig computes and in which precision: what the machine has, where the options don't say."""

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer, device
from nca_align.errors import UserError, notify_once
from nca_align.evaluation.callbacks import GenerationCallback, RankingCallback
from nca_align.evaluation.evaluator import GenerationEvaluator
from nca_align.models.sampling import decoding_precision

NONE_FOUND = "This machine has no accelerator that PyTorch finds: training is on the CPU"


@pytest.fixture(autouse=True)
def told_anew():
    notify_once.cache_clear()


@pytest.fixture
def on(monkeypatch):
    """Makes the machine one with an accelerator or without, whose processor has bfloat16 or not."""

    def machine(accelerator: bool, bfloat16: bool) -> None:
        monkeypatch.setattr(device, "has_accelerator", lambda: accelerator)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16, "amx_bf16": False})
        monkeypatch.setattr(device, "is_torch_bf16_gpu_available", lambda: bfloat16)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
            monkeypatch.delenv(name, raising=False)

    return machine


def fields_of(**given) -> SimpleNamespace:
    unset = {"use_cpu": None, "bf16": None, "fp16": False, "tf32": None, "activation_offloading": False}
    return SimpleNamespace(**unset | {"gradient_checkpointing_kwargs": None} | given)


@pytest.mark.parametrize(
    ("accelerator", "bfloat16", "given", "use_cpu", "bf16", "says"),
    [
        (False, True, {}, True, False, f"{NONE_FOUND}, without mixed precision (`bf16: false`)."),
        (False, False, {}, True, False, f"{NONE_FOUND}, without mixed precision (`bf16: false`)."),
        (False, True, {"bf16": False}, True, False, f"{NONE_FOUND}, without mixed precision (`bf16: false`)."),
        (False, False, {"use_cpu": True, "bf16": True}, True, True, None),
        (False, True, {"bf16": True}, True, True, f"{NONE_FOUND}, in bfloat16 mixed precision (`bf16: true`)."),
        (True, True, {}, False, True, None),
        (True, False, {}, False, False, "This accelerator doesn't compute in bfloat16"),
        (True, False, {"bf16": True}, False, True, None),  # transformers looks at that
        (True, True, {"fp16": True}, False, None, None),
        (True, True, {"use_cpu": True}, True, False, "Training is on the CPU, without mixed precision"),
        (True, True, {"use_cpu": False, "bf16": False}, False, False, None),
    ],
)
def test_what_was_not_said_is_chosen_and_told(on, accelerator, bfloat16, given, use_cpu, bf16, says):
    on(accelerator, bfloat16)
    args = fields_of(**given)
    told = device.choose_device(args)
    assert (args.use_cpu, args.bf16) == (use_cpu, bf16)
    assert told is None if says is None else told.startswith(says)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_cpu": False}, "`use_cpu` is False, but PyTorch finds no accelerator"),
        ({"bf16": True}, "`bf16` is True, but PyTorch finds no accelerator .* add `use_cpu: true`"),
        ({"tf32": True}, "`tf32` is True, but this machine has no GPU that computes in TF32"),
        ({"activation_offloading": True}, "`activation_offloading` asks to keep activations on the CPU, but training"),
        ({"gradient_checkpointing_kwargs": {"offload": True}}, "`gradient_checkpointing_kwargs` asks to keep activa"),
        ({"activation_checkpointing_kwargs": {"offload": True}}, "asks to keep activations on the CPU, but training"),
        ({"fp16": True}, "`fp16` is True, but a CPU doesn't train in float16"),
        ({"fp16": True, "use_cpu": True}, "`fp16` is True, but a CPU doesn't train in float16"),
    ],
)
def test_what_was_said_is_never_changed_in_silence(on, given, message):
    on(accelerator=False, bfloat16=False)
    with pytest.raises(UserError, match=message):
        device.choose_device(fields_of(**given))


@pytest.mark.parametrize(("capability", "expected"), [(7, False), (8, True)])  # a T4 and an A100
def test_a_card_that_emulates_bfloat16_is_not_asked_for_it(capability, expected, monkeypatch):
    """transformers calls it available there, and it is slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *index: SimpleNamespace(major=capability))
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    assert device.computes_bfloat16(on_cpu=False) is expected
    assert device.computes_bfloat16(on_cpu=True) is bool(
        torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    )


def test_a_launchers_words_count(on, monkeypatch):
    on(accelerator=True, bfloat16=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # accelerate launch --cpu
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = fields_of()
    device.choose_device(args)
    assert (args.use_cpu, args.bf16) == (True, True)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_configuration_on_a_laptop(on, bfloat16, caplog):
    on(accelerator=False, bfloat16=bfloat16)
    config = NCAConfig("x")
    assert (config.use_cpu, config.bf16, config.device.type) == (True, False, "cpu")
    assert config.mixed_precision == "no"
    assert [line for line in caplog.messages if NONE_FOUND in line] == caplog.messages
    assert len(caplog.messages) == 1
    # what was chosen stays, on a machine of any kind, and in the identity by which a run is resumed
    on(accelerator=False, bfloat16=not bfloat16)
    for other in (
        copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config, beta=0.5),
        NCAConfig(**{name: value for name, value in config.to_dict().items() if not name.endswith("_token")}),
    ):  # fmt: skip
        assert other.to_dict() == config.to_dict() | {"beta": other.beta}
    assert len(caplog.messages) == 1


def test_a_dpo_configs_fields_stay(on):
    on(accelerator=False, bfloat16=True)
    args = DPOConfig("x", use_cpu=True, bf16=True)
    assert (NCAConfig.of(args, "m").use_cpu, NCAConfig.of(args, "m").bf16) == (True, True)
    assert NCAConfig.of(DPOConfig("x", bf16=False), "m").bf16 is False


def test_a_trainer_without_arguments_trains(on, tokenizer, tmp_path, monkeypatch):
    on(accelerator=False, bfloat16=False)
    monkeypatch.chdir(tmp_path)

    trainer = NCATrainer(
        build_model(tokenizer), train_dataset=Dataset.from_list(reward_rows(2)), processing_class=tokenizer
    )
    assert (trainer.args.use_cpu, trainer.accelerator.mixed_precision) == (True, "no")


def test_answers_on_a_cpu_are_drawn_without_autocast():
    class Accelerator:
        def __init__(self, kind):
            self.device = torch.device(kind)

        def autocast(self):
            return torch.autocast("cpu", torch.bfloat16)

    for kind, expected in (("cpu", False), ("cuda", True)):
        with decoding_precision(Accelerator(kind)):
            assert torch.is_autocast_enabled("cpu") is expected


def test_a_callbacks_answers_on_a_cpu_too(tokenizer, tmp_path):
    """Under bf16, a callback that draws answers runs without autocast, and one that only scores with it."""
    args = NCAConfig(str(tmp_path), use_cpu=True, bf16=True, report_to=[])
    rows = Dataset.from_list(reward_rows(2))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = NCATrainer(
        build_model(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora
    )
    evaluator = GenerationEvaluator(rows, tokenizer, [lambda prompts, texts: [0.0] * len(texts)])
    seen = []
    for callback in (
        GenerationCallback(trainer, {"": evaluator}),
        RankingCallback(trainer, {"": rows}, tokenizer, alpha=1.0, beta=0.1),
    ):
        callback.measure = lambda model: seen.append(torch.is_autocast_enabled("cpu")) or {}
        callback._run()
    assert seen == [False, True]


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path, caplog):
    """TRL refuses the copies that transformers would make of the model there."""
    args = NCAConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    args._n_gpu = 2
    tokenizer = build_tokenizer()
    rows = Dataset.from_list(reward_rows(4, 2))
    nca = NCATrainer(build_model(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    nca.train()
    assert nca.args.train_batch_size == nca.args.per_device_train_batch_size
    assert "This process sees several GPUs, but trains on one" in caplog.text
