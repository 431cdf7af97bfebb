"""Every recipe trains a tiny random model of its architecture, on rows in its data set's own schema.

What a run takes from here is the model, the rows, two steps and the CPU; all else is the file's.
"""

import json
import logging
import math
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from conftest import CORPUS, build_tokenizer
from nca_align.batching.attention import prefix_sharing_obstacle
from nca_align.batching.tokenization import tokenize_rows
from nca_align.commands.train.command import main
from nca_align.data import load_reward_dataset

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted([*CONFIGS.glob("*_mistral7b.yaml"), *CONFIGS.glob("recipes/*.yaml")])
WORDS = " ".join(CORPUS).split()
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
# A recipe's model → (family, what its configuration has beside TINY, its chat template in TRL)
MODELS = {
    "mistral7b": ("Mistral", {"sliding_window": 32}, None),
    "mixtral8x7b": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, None),
    "llama3.1-8b": ("Llama", {}, "llama3_1"),
    "llama3.2-3b": ("Llama", {"tie_word_embeddings": True}, "llama3_2"),
    "qwen3-8b": ("Qwen3", {"head_dim": 8}, "qwen3"),
    "gemma3-4b": ("Gemma3", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}, "gemma3"),
    "gemma4-e4b": (
        "Gemma4", GEMMA | {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8,
                           "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384}, "gemma4_v5",
    ),
    "qwen3.5-4b": (
        "Qwen3_5", {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
                    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                    "tie_word_embeddings": True},
        "qwen3_5_think",
    ),
    "gpt-oss-20b": (
        "GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
                   "layer_types": ["sliding_attention", "full_attention"]}, "gptoss",
    ),
}  # fmt: skip
# with towers for images or sound beside the language model, which text doesn't train
TOWERS = {
    "Gemma3": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 1, "image_token_index": 383,
    },
    "Gemma4": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        "audio_config": None, "image_token_id": 383,
    },
    "Qwen3_5": {
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                          "num_position_embeddings": 64},
        "image_token_id": 383, "video_token_id": 382, "vision_start_token_id": 381, "vision_end_token_id": 380,
    },
}  # fmt: skip
# Figures of the released models' own config.json, beside what their classes have by default
RELEASED = {
    "mistral7b": {},
    "mixtral8x7b": {},
    "llama3.1-8b": {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
                    "max_position_embeddings": 131072},
    "llama3.2-3b": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                    "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
                    "max_position_embeddings": 131072},
    "qwen3-8b": {"intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8,
                 "max_position_embeddings": 40960},
    "gemma3-4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024},
    "gemma4-e4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_key_value_heads": 2,
                   "num_kv_shared_layers": 18},
    "qwen3.5-4b": {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True,
                   "max_position_embeddings": 262144},
    "gpt-oss-20b": {"num_hidden_layers": 24, "num_local_experts": 32, "router_aux_loss_coef": 0.9},
}  # fmt: skip
# with these towers
RELEASED_TOWERS = {
    "gemma3-4b": {"vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                                    "num_attention_heads": 16, "image_size": 896, "patch_size": 14}},
    "gemma4-e4b": {"vision_config": {}, "audio_config": {}},
    "qwen3.5-4b": {"vision_config": {}},
}  # fmt: skip
# Of "4B" the embeddings are left out
EFFECTIVE = ("gemma4-e4b",)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def words(i: int, n: int) -> str:
    return " ".join([str(i), *(WORDS[(7 * i + j) % len(WORDS)] for j in range(n))])


def ultrainteract(i: int) -> list[dict]:
    turns = [{"from": ("user", "assistant")[j % 2], "value": words(i + j, 6)} for j in range(3)]  # multi-turn
    return [{"task": "Math_CoT", "dataset": "gsm8k", "trajectory": turns, "chosen": words(i, 9),
             "rejected": words(i + 5, 7), "id": f"{i}", "parent_id": "0"}]  # fmt: skip


def helpsteer2(i: int) -> list[dict]:
    grades = [(4, 2), (3, 3), (1, 0), (2,)][i % 4]  # the last prompt has a single answer
    return [{"prompt": words(i, 8), "response": words(i + k, 5 + 3 * k), "helpfulness": grade, "correctness": 3,
             "coherence": 4, "complexity": 1, "verbosity": 1} for k, grade in enumerate(grades)]  # fmt: skip


def ranked(i: int) -> list[dict]:
    user = {"role": "user", "content": words(i, 8)}
    answers = {f"A{k}": [user, {"role": "assistant", "content": words(i + k + 1, 6 + k)}] for k in range(4)}
    return [{"prompt": user["content"], **answers, **{f"score_A{k}": 8.5 - 1.5 * k for k in range(4)}}]


def ultrafeedback(i: int) -> list[dict]:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    completions = [{"model": f"m{k}", "response": words(i + k, 5 + k), "overall_score": 8.0 - 2 * k,
                    "fine-grained_score": 4.0 - k, "principle": "helpfulness", "custom_system_prompt": "",
                    "critique": "", "annotations": {a: {"Rating": str(5 - k), "Rationale": ""} for a in aspects}}
                   for k in range(4)]  # fmt: skip
    source = "truthful_qa" if i % 4 == 3 else "evol_instruct"
    return [{"source": source, "instruction": words(i, 8), "models": ["m0"], "completions": completions,
             "correct_answers": ["None"], "incorrect_answers": ["None"]}]  # fmt: skip


def binarized(i: int) -> list[dict]:
    user = {"role": "user", "content": words(i, 8)}
    sides = {
        name: [user, {"role": "assistant", "content": words(i + k, 6)}] for k, name in enumerate(("chosen", "rejected"))
    }
    return [{"prompt": user["content"], "prompt_id": str(i), **sides, "score_chosen": 8.0, "score_rejected": 7.5}]


def rollouts(i: int) -> list[dict]:
    count = (3, 1, 4, 2)[i % 4]  # a problem may have a single solution
    steps = [[f"Step {j + 1}: {words(i + j + k, 3)}" for j in range(2)] for k in range(count)]
    return [{"dataset": "MATH", "prompt": words(i, 8), "reference": str(i), "steps": steps,
             "completions": ["\n\n".join(own) for own in steps],
             "correctness": [(i + k) % 2 == 0 for k in range(count)]}]  # fmt: skip


def scored(i: int) -> list[dict]:
    """Messages of our own schema with up to four scored completions."""
    completions = [[{"role": "assistant", "content": words(i + k, 5 + k)}] for k in range((4, 2, 3)[i % 3])]
    prompt = [{"role": "user", "content": words(i, 8)}]
    return [{"prompt": prompt, "completions": completions, "rewards": [9.0 - 2 * k for k in range(len(completions))]}]


# data set: (rows of one prompt, its splits, K after reading)
DATA = {
    "Windy0822/ultrainteract_math_rollout": (rollouts, ["train"], 4),
    "openbmb/UltraInteract_pair": (ultrainteract, ["train"], 2),
    "nvidia/HelpSteer2": (helpsteer2, ["train", "validation"], 2),
    "ChenDRAG/ultrafeedback_reward": (ranked, ["train_prefs", "test_prefs"], 4),
    "openbmb/UltraFeedback": (ultrafeedback, ["train"], 4),
    "rows.jsonl": (scored, ["train"], 4),
    "HuggingFaceH4/ultrafeedback_binarized": (binarized, ["train_prefs", "test_prefs"], 2),
}


def model_of(path: Path) -> str:
    return re.search("|".join(map(re.escape, MODELS)), path.stem)[0]


def class_and_config(name: str, text: dict, towers: dict):
    """The class of a recipe's model, and its config."""
    family = MODELS[name][0]
    head = "ForConditionalGeneration" if family in TOWERS else "ForCausalLM"
    tied = {"tie_word_embeddings": True} if text.get("tie_word_embeddings") else {}  # which both levels have
    config = towers | tied | {"text_config": text} if family in TOWERS else text
    return getattr(transformers, family + head), getattr(transformers, f"{family}Config")(**config)


def tiny(name: str, vocabulary: int = 384):
    family, own, _ = MODELS[name]
    return class_and_config(name, TINY | own | {"vocab_size": vocabulary}, TOWERS.get(family, {}))


@cache
def released(name: str):
    """The released model itself, without memory for its weights."""
    model_class, config = class_and_config(name, RELEASED[name], RELEASED_TOWERS.get(name, {}))
    with torch.device("meta"):
        return model_class._from_config(config)


def save_model(name: str, folder: Path) -> None:
    template = MODELS[name][2]
    tokenizer = build_tokenizer(
        (files("trl") / "chat_templates" / f"{template}.jinja").read_text() if template else MISTRAL_TEMPLATE
    )
    model_class, config = tiny(name, len(tokenizer))
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_data(name: str, folder: Path) -> None:
    rows, splits, _ = DATA[name]
    prompts = 20 if len(splits) > 1 else 110  # of which a hundredth is held out
    folder.mkdir()
    for split in splits:
        lines = [json.dumps(row) for i in range(prompts) for row in rows(i)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_a_tiny_model_of_its_architecture(path, tmp_path, caplog):
    recipe = yaml.safe_load(path.read_text())
    save_model(model_of(path), tmp_path / "model")
    save_data(recipe["dataset_name"], tmp_path / "data")
    overrides = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data", "output_dir": tmp_path / "run",
        "max_steps": 2, "logging_steps": 1, "use_cpu": "true", "save_strategy": "no",
    }  # fmt: skip
    caplog.set_level(logging.INFO, "nca_align")
    argv = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    assert main(["--config", str(path), *argv]) == 0

    log = [
        line
        for line in json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        if "loss" in line
    ]
    assert len(log) == 2
    assert all(math.isfinite(value) for line in log for value in line.values())
    assert all(line["grad_norm"] > 0 for line in log)
    k = DATA[recipe["dataset_name"]][2]
    start = {"nca": 2 * math.log(2), "infonca": math.log(k), "outcome": math.log(2)}[recipe["loss_type"]]
    assert log[0]["loss"] == pytest.approx(start, abs=5e-3)  # all implicit rewards are 0
    ranked = {name for line in log for name in line if "rewards/rank_" in name}
    assert ranked == {f"rewards/rank_{rank + 1}" for rank in range(k)}
    layout = re.search(r"^layout: auto +# (\w+)", path.read_text(), re.M)[1]
    chosen = {"prefix_shared": "each shared token once", "padded": "has linear-attention layers"}[layout]
    assert re.search(rf"Layout: {layout}.*{chosen}", caplog.text)

    used = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    for key in set(recipe) - set(overrides):  # the file's own values reached the trainer
        if key == "accelerator_config":
            assert used.accelerator_config.gradient_accumulation_kwargs["sync_each_batch"] is True
        elif hasattr(used, key) and key not in ("loss_type", "optim", "lr_scheduler_type", "report_to"):
            value = getattr(used, key)
            assert getattr(value, "value", value) == recipe[key], key
    assert used.loss_type == [recipe["loss_type"]]
    assert (used.optim, used.lr_scheduler_type) == (recipe["optim"], recipe["lr_scheduler_type"])

    if MODELS[model_of(path)][0] in TOWERS:  # as its head says of them
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "run"))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert not any(part in name for name in changed for part in ("vision", "visual", "projector", "audio"))


# The released models


def kinds(config) -> dict:
    """What decides by which code a model's layers run."""
    text = config.get_text_config()
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or [])
    return {
        "layers": set(getattr(text, "layer_types", None) or []), "tied": bool(text.tie_word_embeddings),
        "window": windows or getattr(text, "sliding_window", None) is not None,
        "experts": bool(getattr(text, "num_local_experts", 0)),
        "towers": {name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None},
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_tiny_model_is_of_the_released_ones_kind(name):
    (small_class, small), model = tiny(name), released(name)
    assert type(model) is small_class
    found, expected = kinds(small), kinds(model.config)
    found["towers"] |= {"audio_config"} & expected["towers"]  # which text runs no more of than it does of the other
    assert found == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_figures_and_options_are_those_of_the_released_model(path):
    """Sizes in names and comments, the memory that follows from them, lengths, attention, layout and coefficients."""
    text, recipe, name = path.read_text(), yaml.safe_load(path.read_text()), model_of(path)
    model = released(name)
    config, weights = model.config.get_text_config(), model.num_parameters()
    read_by_each_layer = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens_per_layer" in n)
    by_name = weights - (read_by_each_layer + model.get_input_embeddings().weight.numel() if name in EFFECTIVE else 0)
    if size := re.search(r"-E?([\d.]+)[bB]\b", recipe["model_name_or_path"]):  # not of 8x7B
        assert float(size[1]) == pytest.approx(by_name / 1e9, rel=0.15)  # names are round: 7B is 7.24, 4B is 4.66
    for size in re.findall(r"([\d.]+)B weights", text):
        assert size == f"{weights / 1e9:.1f}"
    for size in re.findall(r"([\d.]+)B are\s+# embeddings that each layer reads", text):
        assert size == f"{read_by_each_layer / 1e9:.1f}"
    for size in re.findall(r"(\d+) GB in fp32", text):  # weights, gradients, and AdamW's two moments
        assert size == f"{16 * weights / 1e9:.0f}"
    if cards := re.search(r"^# (Eight|Sixteen) GPUs of (\d+) GB", text, re.M):
        assert 16 * weights / {"Eight": 8, "Sixteen": 16}[cards[1]] < 0.8e9 * int(cards[2])
    assert recipe["max_length"] <= config.max_position_embeddings
    assert recipe["attn_implementation"] == "eager" or model._supports_sdpa
    if coefficient := re.search(r"the model's own ([\d.]+)", text):
        assert float(coefficient[1]) == config.router_aux_loss_coef
    assert "router_aux_loss_coef" not in recipe or hasattr(config, "router_aux_loss_coef")
    if "Three of four layers are linear attention" in text:
        assert config.layer_types.count("linear_attention") == 0.75 * config.num_hidden_layers
    layout = re.search(r"^layout: auto +# (\w+)", text, re.M)[1]
    assert (layout == "prefix_shared") == (prefix_sharing_obstacle(model) is None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_a_recipes_head_values_and_name(path):
    text, recipe = path.read_text(), yaml.safe_load(path.read_text())
    loss, model, data = path.stem.split("_")
    assert (recipe["loss_type"], model in MODELS, recipe["output_dir"]) == (loss, True, f"runs/{path.stem}")
    assert data in recipe["dataset_name"].lower()
    for launch in ("fsdp2", "zero3"):
        line = re.search(rf"--config_file configs/accelerate/{launch}.yaml .*", text)[0]
        assert line.endswith(f"scripts/train.py --config configs/recipes/{path.name}")
    cards = int(re.search(r"× 1 prompt × (\d+) GPUs = 32 prompts a step", text)[1])
    assert cards * recipe["gradient_accumulation_steps"] == 32
    if loss == "outcome":  # arXiv 2412.01981
        assert (recipe["beta"], recipe["learning_rate"], recipe["completion_mean"]) == (0.05, 5e-7, True)
        assert "alpha" not in recipe
    elif data == "ultrainteract":  # the paper's
        assert (recipe["beta"], recipe["learning_rate"]) == (0.1, 5e-7)
    else:  # arXiv 2502.01237
        assert 1e-4 <= recipe["beta"] <= 1e-3
        assert 3e-7 <= recipe["learning_rate"] <= 1e-6
    assert recipe["dtype"] == "float32"
    assert "use_peft" not in recipe
    uncommented = {line.split(":")[0] for line in text.splitlines() if line[:1].isalpha() and "#" not in line}
    # what transformers documents, and what stands under another key's comment
    assert uncommented <= {
        "dataset_train_split", "dataset_test_split", "loss_type", "lr_scheduler_type", "num_train_epochs", "optim",
        "seed", "gradient_checkpointing", "gradient_checkpointing_kwargs", "output_dir", "logging_steps",
        "eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit",
        "chat_template_kwargs",
    }  # fmt: skip


# The table of configs/README.md

STATUSES = {"run", "exercised on a tiny model", "not yet run"}


def test_the_table_has_every_file_with_an_honest_status():
    rows = re.findall(
        r"^\| \[`([^`]+\.yaml)`\]\(([^)]+)\) \|.*\| ([^|]+) \|$", (CONFIGS / "README.md").read_text(), re.M
    )
    assert all(name == link for name, link, _ in rows)
    status = {CONFIGS / name: said for name, _, said in rows}
    assert len(status) == len(rows)
    assert set(status) == set(CONFIGS.rglob("*.yaml"))
    assert set(status.values()) <= STATUSES
    assert {path for path, said in status.items() if said == "exercised on a tiny model"} == set(RECIPES)


# Qwen3's template, which thinks


def qwen3(prompt: list[dict], answer: str, **row) -> tuple[str, list[str], int]:
    """Text of the prompt and of the completions that training sees, and the prompt's tokens that were left out."""
    tokenizer = build_tokenizer((files("trl") / "chat_templates" / "qwen3.jinja").read_text())
    batch = {"prompt": [prompt], "rewards": [[1.0, 0.0]]} | {name: [value] for name, value in row.items()}
    batch["completions"] = [[[{"role": "assistant", "content": text}] for text in (answer, "No idea.")]]
    rows = tokenize_rows(batch, [0], tokenizer, None, None, "length")
    texts = [tokenizer.decode(ids) for ids in (rows["prompt_ids"][0], *rows["completion_ids"][0])]
    return texts[0], texts[1:], rows["boundary_tokens"][0]


EMPTY = "<think>\n\n</think>\n\n"
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def test_without_thinking_the_empty_thought_is_the_prompts():
    prompt, completions, left_out = qwen3(TURNS, "6.", chat_template_kwargs={"enable_thinking": False})
    assert prompt.endswith("<|im_start|>assistant\n" + EMPTY)
    assert completions == ["6.<|im_end|>\n", "No idea.<|im_end|>\n"]
    assert left_out == 0


def test_with_thinking_it_counts_for_every_completion():
    prompt, completions, left_out = qwen3(TURNS, "6.")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert completions == [EMPTY + "6.<|im_end|>\n", EMPTY + "No idea.<|im_end|>\n"]
    assert left_out == 0


@pytest.mark.parametrize("row", [{}, {"chat_template_kwargs": {"enable_thinking": False}}], ids=["thinking", "not"])
def test_earlier_thoughts_are_taken_out_of_prompt_and_conversation_alike(row):
    prompt, _, left_out = qwen3(TURNS, "6.", **row)
    assert "Easy." not in prompt
    assert "<|im_start|>assistant\n4.<|im_end|>" in prompt
    assert left_out == 0


def test_a_thought_of_the_completion_is_trained_on_and_contradicts_enable_thinking_false():
    thought = "<think>\nThree twice.\n</think>\n\n6."
    _, completions, left_out = qwen3(TURNS, thought)
    assert (completions[0], left_out) == (thought + "<|im_end|>\n", 0)
    prompt, completions, left_out = qwen3(TURNS, thought, chat_template_kwargs={"enable_thinking": False})
    assert left_out > 0  # of the empty thought, which this conversation doesn't have; the trainer says so
    assert (prompt + completions[0]).endswith(thought + "<|im_end|>\n")


def test_template_arguments_for_a_whole_data_set(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Hello {i}"}], "rewards": [1.0, 0.0],
             "completions": [[{"role": "assistant", "content": text}] for text in "ab"]} for i in range(4)]  # fmt: skip
    rows[1]["chat_template_kwargs"] = {"enable_thinking": True}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    off, on = {"enable_thinking": False, "date_string": "today"}, {"enable_thinking": True, "date_string": "today"}
    for streaming in (False, True):
        data = load_reward_dataset(
            str(path), split="train", validation_fraction=0, streaming=streaming, chat_template_kwargs=json.dumps(off)
        )
        assert [row["chat_template_kwargs"] for row in data] == [off, on, off, off]
        assert [row["prompt"] for row in data] == [row["prompt"] for row in rows]
    assert isinstance(load_reward_dataset(str(path), split="train"), Dataset)
    for wrong in ("{", "[1]", ["x"]):
        with pytest.raises(ValueError, match=r"`chat_template_kwargs` is .*; it must be a JSON object such as"):
            load_reward_dataset(str(path), chat_template_kwargs=wrong)
