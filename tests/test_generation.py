"""Evaluation by generation: exact KL, wins, diversity, and that the evaluated model is left as it was."""

import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from conftest import build_model, build_tokenizer
from nca_align import GenerationEvaluator
from nca_align.errors import UserError
from nca_align.evaluation import evaluator as evaluator_module
from nca_align.evaluation.evaluator import distinct, over_common_prompts, win_rate
from nca_align.models.policy import as_reference
from nca_align.models.sampling import neutral_generation
from nca_align.rewards.scorers import open_scorers

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
PROMPTS = [{"prompt": [{"role": "user", "content": text}]} for text in ("Hello?", "What is the best way?", "And then")]


def length_of(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def evaluator(tokenizer, rows=PROMPTS, **more) -> GenerationEvaluator:
    options = {"num_completions": 3, "max_new_tokens": 6, "batch_size": 6} | more
    return GenerationEvaluator(rows, tokenizer, ["test_generation:length_of"], **options)


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(1)
    return get_peft_model(build_model(tokenizer), LORA).eval()


class TestFigures:
    def test_a_policy_that_is_its_reference_has_no_kl_and_wins_half(self, tokenizer, policy):
        figures = evaluator(tokenizer)(policy, policy)
        assert figures.kl == (0, 0)
        assert figures.win_rate.mean == 0.5
        assert (figures.prompts, figures.completions) == (3, 9)

    def test_fewer_answers_of_the_reference_leave_the_policys_figures_as_they_are(self, tokenizer, policy):
        whole, fewer = evaluator(tokenizer), evaluator(tokenizer, reference_completions=1)
        assert fewer(policy, policy).completions == 3
        first, second = whole(policy).log(), fewer(policy).log()
        assert {name for name in first if first[name] != second[name]} <= {
            f"generation/{name}{end}"
            for name in ("win_rate", "reference_reward", "reference_tokens", "gain", "gain_same_length")
            for end in ("", "_error")
        }

    def test_log_probabilities_are_those_of_a_forward_over_the_answers(self, tokenizer, policy, monkeypatch):
        told = evaluator(tokenizer)(policy)
        sampled = evaluator_module.sample_with_logps
        monkeypatch.setattr(evaluator_module, "sample_with_logps", lambda *given: (sampled(*given)[0], None))
        assert evaluator(tokenizer)(policy).kl == pytest.approx(told.kl, abs=1e-5)
        assert told.kl.mean > 0.05

    def test_an_adapter_is_measured_against_the_model_without_it(self, tokenizer, policy):
        figures = evaluator(tokenizer)(policy)
        given = evaluator(tokenizer)(policy, policy.get_base_model())  # the adapter's layers are in it: no reference
        bare = evaluator(tokenizer)(policy, lambda: as_reference(policy))
        assert figures == bare
        assert figures.kl.mean > 0.05
        assert given.kl.mean == pytest.approx(0, abs=1e-5)

    def test_against_itself_the_figures_are_of_the_answers_that_wins_are_over(self, tokenizer, policy):
        own = evaluator(tokenizer)
        with policy.disable_adapter():
            start = own(policy, policy)
        assert own(policy) == evaluator(tokenizer)(policy)  # which draws the reference's answers itself
        assert start.kl == start.win_rate._replace(mean=0)
        assert start.reward != own(policy).reward

    def test_the_references_answers_have_a_seed_of_their_own(self, tokenizer, policy):
        with policy.disable_adapter():
            figures = evaluator(tokenizer)(policy, nullcontext)
        assert figures.kl.mean == pytest.approx(0, abs=1e-5)
        assert figures.win_rate.error > 0  # one policy, but not the same answers: its ties are no half wins by itself

    def test_kl_is_that_of_the_enumerated_distributions(self):
        """Answers of at most two tokens of a vocabulary of seven: the KL is a sum over all of them."""
        tokenizer = _WordTokenizer()
        model = build_model(tokenizer, initializer_range=1.0)
        torch.manual_seed(3)
        strong = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
        policy = get_peft_model(model, strong).eval()
        rows = [{"prompt": "a b"}, {"prompt": "c"}]
        figures = GenerationEvaluator(
            rows, tokenizer, ["test_generation:nothing"], num_completions=400, max_new_tokens=2, batch_size=800
        )(policy)
        exact, deviation = zip(
            *(_exact_kl(policy, tokenizer([row["prompt"]])["input_ids"][0], 2) for row in rows), strict=True
        )
        error = math.hypot(*deviation) / 2 / math.sqrt(400)
        assert sum(exact) / 2 > 10 * error
        assert figures.kl.mean == pytest.approx(sum(exact) / 2, abs=4 * error)

    def test_the_models_own_generation_settings_change_nothing_and_are_kept(self, tokenizer, policy):
        plain = evaluator(tokenizer)(policy)
        own = policy.get_base_model().generation_config
        own.repetition_penalty, own.top_k, own.temperature = 5.0, 1, 0.1
        assert evaluator(tokenizer)(policy) == plain
        assert policy.get_base_model().generation_config is own
        with neutral_generation(policy, [3]):
            assert policy.get_base_model().generation_config.top_k == 0

    def test_batches_give_every_prompt_its_own_answers_and_nothing_else_moves(self, tokenizer, policy):
        policy.train()
        before = torch.get_rng_state()
        figures = evaluator(tokenizer, batch_size=3)(policy)
        assert torch.equal(torch.get_rng_state(), before)
        assert policy.training
        assert evaluator(tokenizer, batch_size=3)(policy) == figures  # the same seeds

    def test_weights_are_one_a_scorer(self, tokenizer):
        row = [{"prompt": "a b"}]
        with pytest.raises(ValueError, match="`scorer_weights` has 1 values for 2 scorers"):
            GenerationEvaluator(row, tokenizer, ["test_generation:nothing"] * 2, scorer_weights=[1.0])
        scorers = open_scorers(["test_generation:nothing"])
        with pytest.raises(
            ValueError, match="`scorer_weights` are given with `Scorers`, which have weights of their own"
        ):
            GenerationEvaluator(row, tokenizer, scorers, scorer_weights=[1.0])

    def test_scorers_get_the_rows_other_columns(self, tokenizer, policy):
        rows = [row | {"wanted": float(i), "completions": ["x"], "rewards": [9.0]} for i, row in enumerate(PROMPTS)]
        figures = GenerationEvaluator(rows, tokenizer, ["test_generation:wanted_of"], max_new_tokens=2)(policy)
        assert figures.reward.mean == 1.0
        assert figures.win_rate.mean == 0.5

    @pytest.mark.parametrize("kind", ["function", "reward model"])
    def test_scorers_read_prompts_of_token_ids_as_text(self, kind, tokenizer, policy, tmp_path):
        texts = ["Hello? ", "What is the best way? ", "And then "]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        read, found = [tokenizer.decode(own) for own in ids], []

        def scores(prompts, completions, **kwargs):
            assert {*prompts} <= {*read}
            return [float(len(prompt + completion)) for prompt, completion in zip(prompts, completions, strict=True)]

        if kind == "reward model":
            torch.manual_seed(2)
            config = build_model(tokenizer).config
            config.num_labels = 1
            LlamaForSequenceClassification(config).save_pretrained(tmp_path)
            tokenizer.save_pretrained(tmp_path)
        for prompts in (read, ids):
            rows = [{"prompt": own, "completion_mask": [[1]], "rewards": [1.0]} for own in prompts]
            given = scores if kind == "function" else str(tmp_path)
            found.append(GenerationEvaluator(rows, tokenizer, given, max_new_tokens=4)(policy))
        assert [tokenizer(text)["input_ids"] for text in read] == ids
        assert found[0] == found[1]

    def test_scorers_may_be_the_functions_themselves(self, tokenizer, policy):
        named = evaluator(tokenizer)(policy)
        for given in (length_of, [length_of], "test_generation:length_of"):
            own = GenerationEvaluator(PROMPTS, tokenizer, given, num_completions=3, max_new_tokens=6, batch_size=6)
            assert own(policy) == named
        both = [length_of, partial(length_of)]
        figures = GenerationEvaluator(PROMPTS, tokenizer, both, num_completions=3, max_new_tokens=6, batch_size=6)(
            policy
        )
        assert figures.reward.mean == pytest.approx(2 * named.reward.mean)

    @pytest.mark.parametrize(
        ("rows", "more", "message"),
        [
            ([], {}, "`dataset` is empty"),
            (PROMPTS, {"num_completions": 0}, "`num_completions` is 0; it must be at least 1"),
            (PROMPTS, {"scorers": []}, "`scorers` is empty"),
            (PROMPTS, {"scorers": ["nowhere:none"]}, "nowhere"),
        ],
    )
    def test_what_can_not_be_is_refused(self, rows, more, message, tokenizer):
        scorers = more.pop("scorers", ["test_generation:length_of"])
        with pytest.raises(ValueError, match=message):
            GenerationEvaluator(rows, tokenizer, scorers, **more)

    def test_a_prompt_that_is_too_long_is_refused(self, tokenizer, policy):
        room = policy.config.max_position_embeddings
        with pytest.raises(UserError, match=rf"`max_new_tokens` {room} is more than the model's {room}"):
            evaluator(tokenizer, max_new_tokens=room)(policy)

    def test_a_prompt_that_the_template_does_not_take_is_refused(self):
        with pytest.raises(UserError, match="a prompt to be answered can't be rendered: `prompt` can't be"):
            evaluator(build_tokenizer("{{ raise_exception('no') }}"))

    def test_an_answer_without_a_score_is_refused(self, tokenizer, policy):
        with pytest.raises(UserError, match=r"an answer could not be scored: .*ZeroDivisionError"):
            GenerationEvaluator(PROMPTS, tokenizer, ["test_generation:failing"], max_new_tokens=2)(policy)

    def test_a_model_without_an_adapter_needs_a_reference(self, tokenizer, model):
        with pytest.raises(ValueError, match="`reference` is missing, and the model has no adapter"):
            evaluator(tokenizer)(model)


def wanted_of(completions, wanted, **kwargs):
    return wanted


def failing(completions, **kwargs):
    return [1 / 0 for _ in completions]


def nothing(completions, **kwargs):
    return [0.0] * len(completions)


def test_win_rate_counts_ties_as_half():
    assert win_rate([1.0, 2.0], [1.0, 0.0]) == (0.5 + 1 + 1 + 1) / 4
    assert win_rate([0.0], [5.0, 5.0]) == 0


def test_wins_are_over_the_prompts_that_both_answered():
    own = {"a": [2.0], "b": [1.0, 3.0], "c": [0.0]}
    assert over_common_prompts(win_rate, own, {"a": [1.0], "b": [2.0]})[0].mean == (1 + 0.5) / 2
    assert math.isnan(over_common_prompts(win_rate, {"a": [1.0]}, {"b": [1.0]})[0].mean)


def test_distinct_is_one_without_repetition_and_falls_with_it():
    assert distinct(["a b c", "d e"], 2) == 1.0
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["a", ""], 2) == 0.0


_EVALUATION = """
import json, sys
from pathlib import Path
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from conftest import build_model, build_tokenizer
from test_generation import LORA, PROMPTS, evaluator

state = PartialState(cpu=True)
assert state.num_processes == 2
torch.manual_seed(1)
policy = get_peft_model(build_model(build_tokenizer()), LORA).eval()
found = [evaluator(build_tokenizer(), rows)(policy) for rows in (PROMPTS, PROMPTS[:1])]  # shares: 2 and 1, 1 and 0
told = [figures.log() | {"completions": figures.completions} for figures in found]
Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(told))
state.destroy_process_group()
"""


@pytest.mark.slow
def test_each_of_two_processes_answers_a_share_and_both_have_the_figures_of_all(tokenizer, policy, tmp_path):
    (tmp_path / "evaluation.py").write_text(_EVALUATION)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(tmp_path / "evaluation.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    # a file each: what two processes print can come on one line
    found = [json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)]
    assert repr(found[0]) == repr(found[1])  # there are NaNs in them
    assert [figures["completions"] for figures in found[0]] == [9, 3]
    alone = evaluator(tokenizer, PROMPTS[:1])(policy)
    assert found[0][1]["generation/kl"] == pytest.approx(alone.kl.mean, abs=1e-5)


class _WordTokenizer:
    """Six letters and an end, one token each."""

    vocabulary = ("<end>", "a", "b", "c", "d", "e", "f")
    bos_token_id, eos_token_id, pad_token_id, chat_template = 1, 0, 0, None
    bos_token, eos_token = None, "<end>"

    def __len__(self):
        return len(self.vocabulary)

    def __call__(self, texts, **options):
        return {"input_ids": [[self.vocabulary.index(word) for word in text.split()] for text in texts]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(self.vocabulary[i] for i in ids if i)


@torch.no_grad()
def _exact_kl(policy, prompt: list[int], length: int) -> tuple[float, float]:
    """KL(policy ‖ bare model) over all answers of at most `length` tokens, and the deviation of one sample of it."""

    def logp(answer):
        logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        return float(logits.gather(1, torch.tensor(answer)[:, None]).sum())

    answers = [[*begun, 0] for t in range(length) for begun in itertools.product(range(1, 7), repeat=t)]
    answers += [list(ids) for ids in itertools.product(range(1, 7), repeat=length)]
    own = [logp(answer) for answer in answers]
    with policy.disable_adapter():
        ratios = [p - logp(answer) for p, answer in zip(own, answers, strict=True)]
    weights = [math.exp(p) for p in own]
    assert sum(weights) == pytest.approx(1)
    mean = sum(w * r for w, r in zip(weights, ratios, strict=True))
    return mean, math.sqrt(sum(w * (r - mean) ** 2 for w, r in zip(weights, ratios, strict=True)))
