"""Tokens that the model has no row for are told before any work; rows that a run added to its base come back."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.collator import RewardCollator
from nca_align.commands.evaluate.command import main as evaluate_main
from nca_align.commands.export.command import main as export_main
from nca_align.commands.sample.command import main as sample_main
from nca_align.errors import UserError
from nca_align.models.loading import ModelSource
from nca_align.models.logprobs import completion_logps
from nca_align.models.sampling import end_tokens, sample_answers
from nca_align.models.vocabulary import token_rows

SAID = "but the model has 384 rows of embeddings, for ids up to 383"
ADDED = ["<|new1|>", "<|new2|>"]  # ids 384 and 385
ROWS = Dataset.from_list(reward_rows(4))


def longer_tokenizer(template: bool = False, pad: bool = False):
    """The model's own tokenizer and two tokens more, of which the template writes one, or one pads."""
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 384
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    if template:
        tokenizer.chat_template = "<|new2|>" + tokenizer.chat_template
    if pad:
        tokenizer.pad_token = ADDED[0]
    return tokenizer


def train(tokenizer, tmp_path, data=ROWS, model=None, **options) -> NCATrainer:
    args = NCAConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, **options)
    model = build_model(build_tokenizer()) if model is None else model
    return NCATrainer(model, args=args, train_dataset=data, processing_class=tokenizer)


class TestTraining:
    def test_a_token_of_the_template(self, tmp_path):
        said = rf"row 0 of `train` has the token '<\|new2\|>' of id 385, {SAID}; take the tokenizer and chat template"
        for options in ({}, {"startup_checks": False}, {"precompute_ref_log_probs": True}):
            with pytest.raises(UserError, match=said):
                train(longer_tokenizer(template=True), tmp_path, **options)

    def test_a_token_in_one_row_far_on(self, tmp_path):
        rows = reward_rows(5)
        rows[3]["completions"][1] = [{"role": "assistant", "content": f"so {ADDED[0]} it is"}]
        with pytest.raises(UserError, match=r"row 3 of `train` has the token '<\|new1\|>' of id 384"):
            train(longer_tokenizer(), tmp_path, Dataset.from_list(rows))
        stream = Dataset.from_list(rows).to_iterable_dataset()
        with pytest.raises(UserError, match=r"row 3 of `train` has the token '<\|new1\|>' of id 384"):
            train(longer_tokenizer(), tmp_path, stream)

    def test_the_padding_alone(self, tmp_path):
        said = rf"the tokenizer's `pad_token` has the token '<\|new1\|>' of id 384, {SAID}; set the tokenizer's"
        for layout in ("padded", "prefix_shared"):  # what is saved could not be loaded
            with pytest.raises(UserError, match=said):
                train(longer_tokenizer(pad=True), tmp_path, layout=layout)
        mended = longer_tokenizer()
        mended.pad_token = mended.eos_token
        train(mended, tmp_path).train()

    def test_a_row_of_a_stream_further_on(self, tmp_path):
        """And data for `evaluate()`: where a batch is made, on the CPU."""
        tokens = {"prompt_ids": [5, 6], "completion_ids": [[7], [8, 400]], "rewards": [1.0, 0.0], "row_number": 100}
        tokens["length"] = 5  # as a trainer's own rows
        collator = RewardCollator(0, vocabulary=384)
        with pytest.raises(UserError, match=f"row 100 has the token of id 400, {SAID}"):
            collator([tokens])
        trainer = train(longer_tokenizer(), tmp_path)
        assert trainer.data_collator.vocabulary == 384
        with pytest.raises(UserError, match="row 100 has the token of id 400"):
            trainer.evaluate(Dataset.from_list([tokens]))

    def test_an_id_that_the_tokenizer_has_no_token_for(self, tmp_path):
        rows = [{"prompt_ids": [5, 6], "completion_ids": [[7], [8, 9999]], "rewards": [1.0, 0.0]}]
        with pytest.raises(UserError, match="row 0 of `train` has the token of id 9999, but the model has"):
            train(build_tokenizer(), tmp_path, Dataset.from_list(rows))

    def test_more_tokens_that_no_row_has_are_no_obstacle(self, tmp_path):
        for data in (ROWS, ROWS.to_iterable_dataset()):
            train(longer_tokenizer(), tmp_path, data).train()

    def test_a_resized_model_trains(self, tmp_path):
        model = build_model(build_tokenizer())
        model.resize_token_embeddings(386)
        train(longer_tokenizer(template=True, pad=True), tmp_path, model=model).train()


class TestUse:
    def test_models_own_functions(self, model):
        rows = [{"prompt_ids": [5, 400], "completion_ids": [[7], [8]]}]
        with pytest.raises(UserError, match=f"row 0 has the token of id 400, {SAID}"):
            completion_logps(model, rows, batch_size=2)
        with pytest.raises(UserError, match=f"`prompt` has the token of id 400, {SAID}"):
            sample_answers(model, [[5], [6, 400]], 1, 2, [3], seed=0)

    def test_the_end_of_an_answer(self, model):
        tokenizer = longer_tokenizer()
        tokenizer.eos_token = ADDED[1]
        model.generation_config.eos_token_id = None
        with pytest.raises(UserError, match=r"the end of an answer has the token '<\|new2\|>' of id 385"):
            end_tokens(model, tokenizer)
        model.generation_config.eos_token_id = [3, 385]  # one of several is never drawn
        assert end_tokens(model, tokenizer) == [3]

    @pytest.fixture
    def folder(self, tmp_path):
        """A model with a tokenizer that its template outgrew."""
        build_model(build_tokenizer()).save_pretrained(tmp_path / "model")
        longer_tokenizer(template=True).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    def test_sample(self, folder, tmp_path, capsys):
        ROWS.to_json(tmp_path / "rows.jsonl")
        arguments = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--model_name_or_path", folder, "--output",
                     str(tmp_path / "samples.jsonl"), "--max_new_tokens", "2"]  # fmt: skip
        assert sample_main(arguments) == 2
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert f"row 0: `prompt` has the token '<|new2|>' of id 385, {SAID}" in said
        assert "Nothing has been sampled. Rows like this one: 4;" in said

    def test_evaluate(self, folder, tmp_path, capsys):
        ROWS.to_json(tmp_path / "rows.jsonl")
        arguments = ["--implicit", "--dataset_name", str(tmp_path / "rows.jsonl"), "--model_name_or_path", folder,
                     "--reference", folder]  # fmt: skip
        assert evaluate_main(arguments) == 2
        assert f"has the token of id 385, {SAID}" in capsys.readouterr().err.strip().split("\n")[-1]


def embeddings_and_more(kind: str) -> dict:
    """LoRA on attention, and what is trained of the embeddings."""
    return {
        "lora": {"target_modules": ["q_proj"]},
        "kept": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "kept input": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [384, 385]},
        "on input": {"target_modules": ["q_proj", "embed_tokens"]},
        "on head": {"target_modules": ["q_proj", "lm_head"]},
    }[kind]


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestAddedTokens:
    """A base that a run gave more tokens, in memory alone: PEFT saves its embeddings with the adapter."""

    IDS = torch.tensor([[5, 384, 20, 385, 384, 30]])

    @pytest.fixture
    def base(self, tmp_path):
        def make(tied: bool):
            folder = tmp_path / "base"
            build_model(build_tokenizer(), tie_word_embeddings=tied).save_pretrained(folder)
            build_tokenizer().save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            model.resize_token_embeddings(386)
            return model

        return make

    @pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("kind", [
        "lora", "kept", "on head",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("kept input", "tokens", "on input")),
    ])  # fmt: skip
    def test_policy_reference_and_export_are_those_of_the_run(self, kind, tied, base, tmp_path, capsys):
        torch.manual_seed(0)
        policy = get_peft_model(base(tied), LoraConfig(task_type="CAUSAL_LM", **embeddings_and_more(kind)))
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        assert token_rows(policy) == 386
        adapter = tmp_path / "adapter"
        policy.save_pretrained(adapter)
        longer_tokenizer().save_pretrained(adapter)
        exported = ["--model_name_or_path", str(adapter), "--output", str(tmp_path / "exported")]
        if kind.startswith("on ") and not tied:  # PEFT saves the one alone
            other = "lm_head" if kind == "on input" else "embed_tokens"
            said = (
                f"was trained on 386 tokens, but the base has 384, and the adapter's folder holds no `{other}` for the"
            )
            with pytest.raises(UserError, match=said):
                ModelSource.of(str(adapter)).load_policy("float32")
            assert export_main(exported) == 2
            assert said in capsys.readouterr().err
            return
        with torch.no_grad():
            expected = policy.eval()(self.IDS).logits
            with policy.disable_adapter():
                reference = policy(self.IDS).logits
            found = ModelSource.of(str(adapter)).load_policy("float32")
            assert torch.equal(found(self.IDS).logits, expected)
            with found.disable_adapter():
                assert torch.equal(found(self.IDS).logits, reference)
            assert (expected - reference).abs().max() > 0.1
            assert export_main(exported) == 0
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
            assert merged.config.vocab_size == 386
            assert (merged(self.IDS).logits - expected).abs().max() < 1e-4
        sides = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
        assert (sides[0] is sides[1]) == (tied and kind in ("lora", "tokens"))  # untied where one of them changed

    def test_a_run_from_its_start_to_its_export(self, base, tmp_path):
        model = base(False)
        config = LoraConfig(task_type="CAUSAL_LM", **embeddings_and_more("kept"))
        args = NCAConfig(output_dir=str(tmp_path / "run"), max_steps=2, report_to="none", use_cpu=True, bf16=False,
                         learning_rate=1e-2)  # fmt: skip
        tokenizer = longer_tokenizer(template=True)
        trainer = NCATrainer(model, args=args, train_dataset=ROWS, processing_class=tokenizer, peft_config=config)
        trainer.train()
        trainer.save_model()
        assert export_main(["--model_name_or_path", str(tmp_path / "run"), "--output", str(tmp_path / "exported")]) == 0
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
        trainer.model.eval()
        with torch.no_grad():
            assert (merged(self.IDS).logits - trainer.model(self.IDS).logits).abs().max() < 1e-3

    def test_what_would_not_be_saved_is_refused_before_training(self, base, tmp_path, monkeypatch):
        tokenizer = longer_tokenizer(template=True)
        on_input = LoraConfig(task_type="CAUSAL_LM", **embeddings_and_more("on input"))
        said = r"`model` has 386 tokens, but .*base has 384. With this adapter PEFT saves no `lm_head` for the"
        with pytest.raises(UserError, match=said):
            train(tokenizer, tmp_path, model=get_peft_model(base(False), on_input))
        train(tokenizer, tmp_path, model=get_peft_model(base(True), on_input))

        # a model of the Hub without a network: transformers finds it in the cache, and PEFT doesn't look there
        model, config = base(False), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        snapshot = tmp_path / "hub" / "models--somebody--base" / "snapshots" / ("1" * 40)
        snapshot.parent.mkdir(parents=True)
        (tmp_path / "base").rename(snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        model.name_or_path = "somebody/base"
        with pytest.raises(UserError, match=r"but somebody/base has 384\. With this adapter PEFT saves no `em"):
            train(tokenizer, tmp_path, model=get_peft_model(model, config))
