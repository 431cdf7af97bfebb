"""Reward models as others save them, generated: architecture, pad token, template, head, adapter; and what each gives.

What a model gives is found without any code of ours: one unpadded conversation at a time, by transformers and PEFT.
"""

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from conftest import build_tokenizer
from tiny_models import build

DECODERS = [
    "Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "GPT2", "GPTNeoX", "OPT", "Falcon", "Bloom", "Phi3", "Mixtral",
    "Jamba", "Qwen3Next",
]  # fmt: skip
ENCODERS = ["Bert", "Roberta", "DebertaV2", "ModernBert", "DistilBert", "Electra"]
READ_EOS = ["Bart", "UMT5"]  # the head reads the last EOS, and a batch must have as many in each text
DIFFER = ["XLNet", "MobileBert", "ConvBert"]  # what they make of a text depends on the padding beside it

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
# How a template begins and ends a conversation: with BOS or not, in EOS, in EOS and a newline, or in neither.
TEMPLATES = {
    "EOS at the end": CHAT,
    "BOS, and a newline at the end": "{{ bos_token }}" + CHAT + "\n",
    "argument": "{{ mode | default('quick') }}" + CHAT,
    "nothing at the end": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "two EOS at the end": CHAT + "{{ eos_token }}",
}
LINEAR = (torch.nn.Linear, Conv1D)
# A model with code of its own, by what its forward returns
OWN_FORWARD = {
    "mask": "return Output(logits=scores[torch.arange(len(scores)), attention_mask.sum(1) - 1])",
    "last": "return Output(logits=scores[:, -1])",
    "mean": "return Output(logits=scores.mean(1))",
    "token": "return Output(logits=scores)",
    "flat": "return Output(logits=scores[:, -1, 0])",
    "tuple": "return (scores[:, -1],)",
    "nothing": "return None",
    "tokens": "return Output(logits=scores[..., 0])",
    "two": "return Output(logits=scores[torch.arange(len(scores)), attention_mask.sum(1) - 1].repeat(1, 2))",
    "unsaid": "return Output(logits=scores[torch.arange(len(scores)), attention_mask.sum(1) - 1])",
    "raises": "raise KeyError('pixel_values')",
}
OWN_CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput as Output

class OwnConfig(LlamaConfig):
    model_type = "own_reward"

class OwnReward(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.value = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        scores = self.value(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)
        FORWARD
"""


@dataclass(frozen=True)
class SetUp:
    """One reward model, and how it is asked.

    Args:
        family: of `DECODERS` and the like, or of `OWN_FORWARD`.
        pad: the tokenizer's pad token: `none`, `own`, or `eos`.
        config_pad: the model's, `none`, `own`, `eos`, or `negative` as in the first Llama; an adapter's is its base's.
        padding_side: of the tokenizer.
        adds: special tokens that the tokenizer adds to text: none, BOS, or BOS and EOS.
        template: of `TEMPLATES`; None for rows of text.
        outputs: of the head; of several, `label` is asked for.
        label: how the output is named: `reward:`, `pipeline:` or not at all.
        adapter: `score`: on a base without a head; `whole`: on one that has it; None.
    """

    family: str
    pad: str = "own"
    config_pad: str = "own"
    padding_side: str = "right"
    adds: str = ""
    template: str | None = "EOS at the end"
    outputs: int = 1
    label: str = ""
    adapter: str | None = None
    dtype: str = "float32"
    batch_size: int = 4

    @property
    def refusal(self) -> str | None:
        """Words of the refusal that is right for it; None where it must be scored."""
        if (self.outputs > 1 or self.family == "two") and not self.label:
            return "outputs, but a reward model has one"
        return {
            "token": "a reward for each token or step",
            "tokens": "a reward for each token or step",
            "flat": "gives logits of shape",
            "tuple": "without `logits`",
            "nothing": "without `logits`",
            "raises": "can't score a text alone (KeyError: 'pixel_values')",
        }.get(self.family)

    @property
    def may_differ(self) -> bool:
        """Whether a batch of it is rightly refused."""
        return self.family in (*DIFFER, "last", "mean") and self.batch_size > 1


def tokenizer_of(set_up: SetUp):
    tokenizer = build_tokenizer(TEMPLATES.get(set_up.template or ""))
    if set_up.adds:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=set_up.adds, special_tokens=special)
    tokenizer.pad_token = {"none": None, "own": "<pad>", "eos": "<|im_end|>"}[set_up.pad]
    tokenizer.padding_side = set_up.padding_side
    tokenizer.model_max_length = 512
    return tokenizer


@functools.cache
def weights_of(family: str, outputs: int, folder: Path) -> Path:
    """A model in a folder, without its tokenizer, made once."""
    made = folder / f"{family}-{outputs}"
    if family in OWN_FORWARD:
        model = build("LlamaForSequenceClassification", num_labels=1)
        model.save_pretrained(made)
        weights = made / "model.safetensors"
        state = {key.replace("score.", "value."): tensor for key, tensor in load(weights).items()}
        save(state | {"value.bias": torch.ones(1)}, weights)
        (made / "own.py").write_text(OWN_CODE.replace("FORWARD", OWN_FORWARD[family]))
        config = json.loads((made / "config.json").read_text())
        if family == "unsaid":  # how many outputs there are, for which transformers takes 2
            config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
        auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnReward"}
        config |= {"model_type": "own_reward", "architectures": ["OwnReward"], "auto_map": auto}
        (made / "config.json").write_text(json.dumps(config))
        return made
    own = {"decoder_start_token_id": 0} if family in ("T5", "UMT5") else {}
    build(f"{family}ForSequenceClassification", num_labels=outputs, **own).save_pretrained(made)
    return made


def load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def save(state: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, file, metadata={"format": "pt"})


def with_config(made: Path, folder: Path, config_pad: str) -> None:
    """A copy of a model under another pad token."""
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = {"none": None, "own": 0, "eos": 3, "negative": -1}[config_pad]
    (folder / "config.json").write_text(json.dumps(config))


def build_set_up(set_up: SetUp, folder: Path, kept: Path) -> Path:
    """The reward model in `folder/model`; `kept` holds weights for others."""
    model, made = folder / "model", weights_of(set_up.family, set_up.outputs, kept)
    if set_up.adapter is None:
        with_config(made, model, set_up.config_pad)
    else:
        with_config(made, folder / "base", set_up.config_pad)
        shutil.copytree(adapter_of(set_up.family, set_up.outputs, kept), model)
        config = json.loads((model / "adapter_config.json").read_text())
        (model / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": str(folder / "base")})
        )
        if set_up.adapter == "score":  # as a language model is, of which RewardTrainer makes a reward model
            weights = folder / "base" / "model.safetensors"
            save({key: tensor for key, tensor in load(weights).items() if not is_head(key)}, weights)
            config = json.loads((folder / "base" / "config.json").read_text())
            config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
            config["architectures"] = [f"{set_up.family}ForCausalLM"]
            (folder / "base" / "config.json").write_text(json.dumps(config))
    tokenizer_of(set_up).save_pretrained(model)
    return model


def is_head(name: str) -> bool:
    return name.startswith(("score", "classifier", "classification_head"))


@functools.cache
def adapter_of(family: str, outputs: int, folder: Path) -> Path:
    """A LoRA in a folder, as PEFT saves it for a sequence classifier, of which every weight matters."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(weights_of(family, outputs, folder))
    torch.manual_seed(1)
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, LINEAR)}
    targets = sorted(names - {"score", "classifier", "out_proj", "dense", "router", "lm_head"})
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=targets, modules_to_save=["score"], init_lora_weights=False
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder / f"{family}-{outputs}-adapter")
    return folder / f"{family}-{outputs}-adapter"


def read(set_up: SetUp, tokenizer: Any, row: dict, completion: Any) -> list[int]:
    """The one unpadded conversation that the model is to be given."""
    if isinstance(row["prompt"], str) or set_up.label == "pipeline":
        text = completion if set_up.label == "pipeline" else row["prompt"] + completion
        text = text if isinstance(text, str) else text[0]["content"]
        bare = text.removeprefix("<s>") if "<s>" in set_up.adds else text
        bare = bare.removesuffix("<|im_end|>") if "<|im_end|>" in set_up.adds else bare
        ids = tokenizer(bare, add_special_tokens=False)["input_ids"]
        return [1] * ("<s>" in set_up.adds) + ids + [3] * ("<|im_end|>" in set_up.adds)
    arguments = {key: value for key, value in row.get("chat_template_kwargs", {}).items() if value is not None}
    return tokenizer.apply_chat_template(row["prompt"] + completion, return_dict=False, **arguments)


def alone(set_up: SetUp, folder: Path, rows: list[dict]) -> list[list[float] | None]:
    """What the model itself gives each row's completions; None of a row with one that it raises at."""
    trusted = set_up.family in OWN_FORWARD
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    own: dict[str, Any] = {"dtype": getattr(torch, set_up.dtype), "trust_remote_code": trusted}
    if set_up.adapter is None:
        model = AutoModelForSequenceClassification.from_pretrained(folder, **own)
    else:
        from peft import PeftModel

        config = AutoConfig.from_pretrained(folder.parent / "base", num_labels=set_up.outputs)
        if tokenizer.pad_token_id is not None:  # as RewardTrainer and every example of PEFT train it
            config.pad_token_id = tokenizer.pad_token_id
        base = AutoModelForSequenceClassification.from_pretrained(folder.parent / "base", config=config, **own)
        model = PeftModel.from_pretrained(base, folder)

    def score(row: dict, completion: Any) -> float:
        ids = torch.tensor([read(set_up, tokenizer, row, completion)])
        with torch.inference_mode():
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        if set_up.label == "pipeline":
            logits = logits.softmax(-1) if len(logits) > 1 else logits.sigmoid()
        return logits[-1].item()

    found: list[list[float] | None] = []
    for row in rows:
        try:
            found.append([score(row, completion) for completion in row["completions"]])
        except Exception:  # such as a text without the EOS that BART reads
            found.append(None)
    return found


def silence() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
