"""The memory arithmetic: what autograd keeps and what a card holds, each beside the real thing."""

import copy
import re
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, TrainingArguments

import tiny_models
from conftest import build_model, build_tokenizer, slow_but
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.errors import InvalidRowError
from nca_align.models.logprobs import add_token_logps, forward_chunk
from nca_align.models.memory import count_kept, head_bytes
from nca_align.models.passes import kept_path, passes
from nca_align.models.policy import base_model
from nca_align.training.card_memory import Quantisation, Training, held, optimizer_bytes, quantised_weights
from nca_align.training.launch import Launch
from nca_align.training.memory_plan import MARGIN, Planner, Setup
from nca_align.training.plan_changes import Change, _with_shorter_rows, changes_that_fit

VOCABULARY = 384
TOKENIZER = build_tokenizer()
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def rows(k: int = 4, prompt: int = 60, completion: int = 40) -> list[dict]:
    completions = [[3 + i, *range(100, 99 + completion - i)] for i in range(k)]
    return [{"prompt_ids": list(range(10, 10 + prompt)), "completion_ids": completions}]


def setup(launch: Launch = Launch(), **own) -> Setup:  # noqa: B008 (frozen)
    given = {
        "batch_size": 1, "accumulation": 1, "tokens_per_forward": None, "max_length": None,
        "checkpointing": False, "optim": "adamw_torch", "use_peft": False, "quantisation": None, "precomputes": True,
    }  # fmt: skip
    return Setup(launch, **given | own)


def planner(config=None, **own) -> Planner:
    given = {"rows": rows(), "dtype": torch.float32, "adapter": LORA, "layout": "padded"}
    return Planner(config or build_model(TOKENIZER).config, **given | own)


# What autograd keeps


def kept_really(model, chunk, autocast) -> int:
    """Bytes of all that autograd keeps, over real tensors; of what the head makes, copies of its weight alone."""
    given = [value for value in chunk.values() if isinstance(value, torch.Tensor)]
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *given)}
    head = base_model(model).get_output_embeddings()
    alive, at_head, total = [], [], 0

    def keep(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in known and (
            not at_head or tensor.data_ptr() == at_head[0] or sorted(tensor.shape) == sorted(head.weight.shape)
        ):
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    handle = head.register_forward_pre_hook(lambda _, inputs: at_head.append(inputs[0].data_ptr()))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        forward_chunk(model, chunk)
    handle.remove()
    assert at_head
    return total


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_what_is_counted_is_what_autograd_keeps_of_real_tensors(layout, weights, dtype, mixed):
    model, dropped = build_model(TOKENIZER, num_hidden_layers=3).to(dtype), replace(LORA, lora_dropout=0.1)
    if weights == "lora":
        model = get_peft_model(model, dropped)
        model.enable_input_require_grads()
    model.train()
    add_token_logps(base_model(model))
    if layout == "prefix_shared":
        share_prefixes(base_model(model))
    (chunk,) = RewardCollator(0, layout).chunks(rows())
    plan = planner(
        base_model(model).config, dtype=dtype, mixed=torch.bfloat16 if mixed else None, layout=layout,
        adapter=replace(dropped), disable_dropout=False,
    )  # fmt: skip
    plan.config.num_hidden_layers = 3
    kept = plan.kept(setup(use_peft=weights == "lora"))
    assert kept.layers + kept.outside == kept_really(model, chunk, mixed)
    assert 0 < kept.inputs < kept.largest < kept.layers == pytest.approx(3 * kept.largest, rel=0.01)
    assert (kept.copies > 0) is (mixed and (weights == "lora" or dtype == torch.float32))


@pytest.mark.parametrize("family", slow_but(["Mixtral", "Gemma3", "Qwen3", "GptOss", "Qwen3_5", "Gemma4"], "Qwen3_5"))
def test_other_architectures_are_counted_by_their_own_code(family):
    """Layers that are alike count as often as they run: with all of them run, the sum is the same."""
    config = getattr(transformers, f"{family}{'Text' if family in ('Gemma3', 'Gemma4', 'Qwen3_5') else ''}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, pad_token_id=0, **OWN.get(family, {}),
    )  # fmt: skip
    plan = planner(config, layout="auto")
    kept = plan.kept(setup())
    model = plan.model(setup(), torch.float32)
    for number, layer in enumerate(model.modules()):
        layer.number = number  # no two are alike
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nca_align.models.memory._kind", lambda layer: layer.number)
        whole = count_kept(model, plan.longest_chunk(setup()), keys=kept_path(plan.chunks(setup())))
    assert (kept.layers, kept.inputs, kept.outside) == (whole.layers, whole.inputs, whole.outside)
    assert kept.layers > kept.largest > kept.inputs / 6 > 0


@pytest.mark.parametrize(
    "name",
    ["Lfm2ForCausalLM",
     *(pytest.param(f"{family}ForCausalLM", marks=pytest.mark.slow) for family in ("GraniteMoeHybrid", "Qwen3_5"))],
)  # fmt: skip
def test_a_hybrid_is_counted_by_its_pieces(name):
    """A prompt, then completions as rows: the plan's forwards are those of training, and keep what autograd does."""
    plan = planner(tiny_models.tiny_config(getattr(transformers, name).config_class), layout="auto", rows=rows(8))
    prompt, completions = (chunk["input_ids"] for chunk in plan.chunks(setup()))
    assert (prompt.shape, completions.shape) == ((1, 59), (8, 40))
    assert plan.layout == "prefix_shared"
    largest = plan.kept(setup())
    alone = planner(plan.config, layout="prefix_shared", rows=rows(8, prompt=1, completion=41)).kept(setup())
    assert largest.keys > 0
    assert largest.layers == pytest.approx(alone.layers, rel=0.1)  # of rows as long, without a past
    padded = planner(plan.config, layout="padded", rows=rows(8)).kept(setup())
    assert sum(largest.peak(False)) < 0.7 * sum(padded.peak(False))
    bounded = planner(plan.config, layout="auto", rows=rows(8)).kept(setup(tokens_per_forward=100))
    assert sum(bounded.peak(False)) < 0.5 * sum(largest.peak(False))


OWN = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    "Gemma3": {"sliding_window": 32},
    "Gemma4": {"sliding_window": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
               "global_head_dim": 8, "num_kv_shared_layers": 2,
               "layer_types": ["sliding_attention", "full_attention"] * 3},
    "Qwen3_5": {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                "linear_num_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prompts_fewer_tokens_at_a_time_and_shorter_rows_take_less(checkpointing):
    def peak(layout="padded", **own):
        return sum(planner(layout=layout, rows=rows(8)).kept(setup(**own)).peak(checkpointing))

    assert peak("prefix_shared") < peak()
    assert peak(tokens_per_forward=220) < peak() == peak(tokens_per_forward=800)
    assert peak(max_length=80) < peak()


@pytest.mark.parametrize("bound", [100, 24])
def test_keys_are_those_of_the_longest_path(bound):
    """Also where the largest piece, here a prompt at a bound of 100, reads none."""
    plan = planner(rows=rows(4, 100, 40), layout="prefix_shared")
    own = setup(tokens_per_forward=bound)
    assert (plan.longest_chunk(own)["segments"].past == 0) is (bound == 100)
    model = build_model(TOKENIZER)
    add_token_logps(model)
    share_prefixes(model)
    for one in passes(plan.chunks(own), scores_all=False, trains=True):
        with torch.no_grad():
            forward_chunk(model, one.chunk)
        kept = one.chunk["segments"].kept
    keys = plan.kept(own).keys
    assert keys == sum(map(kept.bytes, kept.places.values())) > 0
    assert replace(plan, offloads_activations=True).memory(own).parts["activations"] == keys  # which stay on the card


def test_checkpointing_keeps_inputs_and_one_layer():
    kept = planner().kept(setup())
    plain, checkpointed = kept.peak(False), kept.peak(True)
    assert plain == (kept.layers + kept.outside, kept.head)
    assert checkpointed[0] == kept.inputs + kept.outside + 1.5 * kept.largest
    assert sum(checkpointed) < sum(plain)


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_context_within_completions_has_no_logits(layout):
    """Nor its hidden states: a trajectory takes what its terms take, in a forward as long as of any other row."""
    (row,) = rows()
    masks = [[int(t % 4 == 3) for t in range(len(ids))] for ids in row["completion_ids"]]
    plan = planner(rows=[row | {"completion_mask": masks}], layout=layout)
    kept, whole = plan.kept(setup()), planner(layout=layout).kept(setup())
    assert kept.head == 8 * VOCABULARY * sum(map(sum, masks)) < whole.head / 3
    model = build_model(TOKENIZER).train()
    add_token_logps(model)
    if layout == "prefix_shared":
        share_prefixes(model)
    (chunk,) = RewardCollator(0, layout).chunks(plan.rows)
    assert kept.layers + kept.outside == kept_really(model, chunk, False) < whole.layers + whole.outside
    with pytest.raises(InvalidRowError, match=r"row 0: `completions\[0\]` has nothing to train on before `max_length`"):
        plan.kept(setup(max_length=62))
    assert [own.options for own in _with_shorter_rows(plan, Change(setup(max_length=125), plan.memory(setup())))] == []
    assert [own.options for own in _with_shorter_rows(plan, Change(setup(max_length=198), plan.memory(setup())))] != []


class _Copies(TorchDispatchMode):
    """Copies of `weights` in another type, without keeping them alive."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.found = {weight.data_ptr() for weight in weights}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            self.found.append((weakref.ref(result), result.numel() * result.element_size()))
        return result


def test_under_mixed_precision_copies_of_trained_weights_live_to_the_end_of_a_forward():
    """Which is why `Kept.copies` counts beside the head, also where layers are checkpointed."""
    model = build_model(TOKENIZER, num_hidden_layers=3).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    add_token_logps(model)
    (chunk,) = RewardCollator(0, "padded").chunks(rows())
    alive = []
    with torch.autocast("cpu", torch.bfloat16), _Copies(model.parameters()) as copies:
        forward_chunk(model, chunk)
        alive.append(sum(size for reference, size in copies.found if reference() is not None))
    plan = planner(model.config, mixed=torch.bfloat16)
    assert alive == [plan.kept(setup()).copies]


@pytest.mark.parametrize(("positions", "rows_kept"), [(10, 10), (5000, 4096)])
def test_the_head_is_whole_within_its_budget_and_else_in_tiles(positions, rows_kept):
    budget = 8 * VOCABULARY * 4500
    assert head_bytes(positions, VOCABULARY, budget) == 8 * VOCABULARY * rows_kept


# What a card holds


def bytes_of(tensors) -> int:
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_takes_what_bitsandbytes_takes(nested, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    build_model(TOKENIZER, **sizes).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    real = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    states = [p.quant_state for p in real.parameters() if hasattr(p, "quant_state")]
    assert len(states) == 2 * 7
    scales = [t for s in states for t in (s.absmax, *((s.state2.absmax,) if nested else ()))]
    plan = planner(real.config, dtype=torch.bfloat16)
    plan.config.quantization_config = None
    found = plan.held(setup(quantisation=Quantisation(4, nested), use_peft=True))
    assert found["weights"] == pytest.approx(bytes_of([*real.parameters(), *scales]), rel=0.02)
    assert len(quantised_weights(plan.model(setup(quantisation=Quantisation(4), use_peft=True), torch.bfloat16))) == 14


def test_experts_in_one_tensor_are_not_quantised():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, **OWN["Mixtral"],
    )  # fmt: skip
    plan = planner(config, adapter=replace(LORA, target_modules=["q_proj"]))
    model = plan.model(setup(use_peft=True, quantisation=Quantisation(4)), torch.bfloat16)
    names = {name for name, p in model.named_parameters() if id(p) in quantised_weights(model)}
    assert len(names) == 2 * 4
    assert all("self_attn" in name for name in names)


def test_an_adapter_is_pefts():
    real = get_peft_model(build_model(TOKENIZER), copy.deepcopy(LORA))
    trained = real.get_nb_trainable_parameters()[0]
    found = planner().held(setup(use_peft=True))
    assert (found["adapter"], found["gradients"], found["optimizer"]) == (4 * trained, 4 * trained, 8 * trained)


# by transformers' names; the ones that run on a CPU and without another package
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "optim",
    ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
     "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit"],
)  # fmt: skip
def test_an_optimizers_state_is_its_own(optim, dtype, tmp_path):
    args = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, bf16=False)
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    weights = [torch.nn.Parameter(torch.randn(128, 64, dtype=dtype)), torch.nn.Parameter(torch.randn(64, dtype=dtype))]
    optimizer = kind(weights, **options)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    # each tensor that grows with the weight: not step counts, nor a table of the 256 values of 8 bits
    real = sum(
        value.numel() * value.element_size()
        for weight in weights
        for name, value in optimizer.state[weight].items()
        if isinstance(value, torch.Tensor) and value.dim() and not name.startswith("qmap")
    )
    expected = sum(optimizer_bytes(optim, weight.shape, weight.element_size()) for weight in weights)
    assert expected == pytest.approx(real, rel=0.01)


def test_sharing_divides_what_is_shared():
    plan = planner(dtype=torch.float32, mixed=torch.bfloat16)
    one, ddp, fsdp, zero2, zero3 = (
        plan.held(setup(launch))
        for launch in (Launch(), Launch(4), Launch(4, "FSDP2"), Launch(4, "ZeRO-2"), Launch(4, "ZeRO-3"))
    )
    model = plan.model(setup(), torch.float32)
    count, layer = model.num_parameters(), sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert [one[part] for part in ("weights", "gradients", "optimizer")] == [4 * count, 4 * count, 8 * count]
    assert ddp == one | {"buckets": 4 * count}
    assert [fsdp[part] for part in ("weights", "gradients", "optimizer")] == [count, count, 2 * count]
    assert fsdp["gathered layers"] == 2 * (3 * layer + 2 * VOCABULARY * 32)  # two, the gradients of one, both ends
    assert [zero2[part] for part in ("weights", "gradients", "optimizer")] == [2 * count, count / 2, 3 * count]
    assert [zero3[part] for part in ("weights", "gradients", "optimizer")] == [count / 2, count / 2, 3 * count]


def test_offloaded_states_and_live_references():
    plan = planner()
    count = plan.model(setup(), torch.float32).num_parameters()
    assert plan.held(setup(Launch(4, "ZeRO-3", offloads_optimizer=True)))["optimizer"] == 0
    assert plan.held(setup(Launch(4, "FSDP2", True, True)))["weights"] == 0
    assert plan.held(setup(precomputes=False))["reference"] == 4 * count
    assert plan.held(setup(precomputes=False, use_peft=True))["reference"] == 0
    goes_on = planner(goes_on=True).held(setup(use_peft=True))
    assert goes_on["reference"] == goes_on["adapter"] > 0


def test_under_fsdp_gradients_stay_whole_between_backwards():
    """`test_gradients_stay_whole_under_fsdp2` shows that they do."""
    plan = planner(mixed=torch.bfloat16)
    count = plan.model(setup(), torch.float32).num_parameters()
    fsdp = Launch(4, "FSDP2")
    sharded = plan.held(setup(fsdp))["gradients"]
    for own in ({"accumulation": 2}, {"tokens_per_forward": 40}):
        assert plan.held(setup(fsdp, **own))["gradients"] == sharded + 2 * count
        assert plan.held(setup(fsdp, syncs_each_batch=True, **own))["gradients"] == sharded


WHOLE_GRADIENTS = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
bf16 = {name: torch.bfloat16 for name in ("param_dtype", "reduce_dtype", "output_dtype")}
for module in (*model, model):
    fully_shard(module, mp_policy=MixedPrecisionPolicy(**bf16))
for sync in (False, True):
    model.set_requires_gradient_sync(sync)
    model(torch.randn(8, 64)).sum().backward()
    states = [module._get_fsdp_state()._fsdp_param_group for module in model]
    whole = [p.unsharded_accumulated_grad if p.unsharded_accumulated_grad is not None else p._unsharded_param.grad
             for state in states for p in state.fsdp_params]
    if dist.get_rank() == 0:
        print(sync, sum(g.numel() * g.element_size() for g in whole if g is not None))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_gradients_stay_whole_under_fsdp2(tmp_path):
    (tmp_path / "run.py").write_text(WHOLE_GRADIENTS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "run.py"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", str(2 * 2 * 64 * 64), "True", "0"]


# The plan


def test_changes_fit_as_they_are_counted_and_change_one_thing_first():
    plan, start = planner(rows=rows(8, completion=200)), setup(batch_size=1)
    memory = plan.memory(start)
    found = changes_that_fit(plan, start, 0.9 * memory.needed)
    assert found
    for change in found:
        again = plan.memory(change.setup)
        assert again.needed <= 0.9 * memory.needed
        assert again.total == change.memory.total
    assert [list(change.options) for change in found[:2]] == [["checkpointing"], ["forward"]]
    assert found[0].setup == replace(start, checkpointing=True)


def test_several_changes_together_where_one_is_not_enough():
    plan, start = planner(rows=rows(8, completion=200)), setup(precomputes=False)
    least = replace(start, checkpointing=True, precomputes=True, tokens_per_forward=256)
    size = plan.memory(least).needed
    first = changes_that_fit(plan, start, size)[0]
    assert (first.setup, set(first.options)) == (least, {"checkpointing", "reference", "forward"})


@pytest.mark.parametrize("mixed", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "own",
    [{}, {"accumulation": 32}, {"accumulation": 6}, {"batch_size": 2, "tokens_per_forward": 40},
     {"use_peft": True, "quantisation": Quantisation(8)}],
)  # fmt: skip
def test_more_cards_fit_as_their_words_say(own, mixed):
    """A user who writes the words into the config, and nothing else, has the run that was counted."""
    plan, start = planner(rows=rows(2, 4, 4), mixed=mixed), setup(**own)
    written = replace(start, launch=Launch(4, "FSDP2"), quantisation=None, accumulation=max(1, start.accumulation // 4))
    size = plan.memory(replace(written, syncs_each_batch=True)).needed
    change = changes_that_fit(plan, start, size)[-1]
    text = change.options["cards"]
    cards, steps = int(text.split()[0]), int(re.search(r"`gradient_accumulation_steps: (\d+)`", text)[1])
    written = replace(
        start, launch=Launch(cards, "FSDP2"), accumulation=steps, syncs_each_batch="sync_each_batch: true" in text,
        quantisation=None if "without `load_in_8bit`" in text else start.quantisation,
    )  # fmt: skip
    assert plan.memory(written).total == change.memory.total <= size
    assert not written.training(mixed is not None).whole_gradients
    prompts, before = start.batch_size * steps * cards, start.batch_size * start.accumulation
    assert (f", {prompts} prompts a step instead of {before}" in text) is (prompts != before)


def test_both_limits_of_length_are_halved_together():
    plan = planner(rows=[*rows(4, 60, 200), *rows(4, 20, 10)])
    start = setup(max_length=256, max_prompt_length=128, checkpointing=True, tokens_per_forward=40)
    shorter = replace(start, max_length=128, max_prompt_length=64)
    found = changes_that_fit(plan, start, plan.memory(shorter).needed)
    (change,) = (change for change in found if "length" in change.options)
    assert change.setup == shorter
    assert change.options["length"] == "`max_length: 128` with `max_prompt_length: 64`, which cuts more"
    for data, own in ((rows(4, 60, 200), {}), (plan.rows, {"max_length": None}), (rows(4, 20, 10), {})):
        limited = replace(start, **own)  # every completion would be cut, there is no limit, nothing is shorter
        other = planner(rows=data)
        found = changes_that_fit(other, limited, 0.999 * other.memory(limited).needed)
        assert not any("length" in change.options for change in found)


def test_nothing_fits_nothing():
    assert changes_that_fit(planner(), setup(), 1) == []


def test_a_bound_is_a_bound():
    memory = planner().memory(setup())
    assert memory.needed == MARGIN * memory.total == MARGIN * sum(memory.parts.values())
    assert Training("adamw_torch", mixed=False).whole_gradients is False
    assert held(planner().model(setup(), torch.float32), Launch(), Training("sgd", mixed=False))["optimizer"] == 0
