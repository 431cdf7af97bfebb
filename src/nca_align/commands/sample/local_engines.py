"""Engines that complete prompts on this machine: `transformers` everywhere, `vllm` where it is installed.

Of a model's generation config they take where a completion ends, and nothing else: with a repetition penalty, top-k or
min-p on, it would be no sample of the model that is trained.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError, UserError, one_line
from ...models.sampling import seed_for
from ...store.shards import Advance
from .engine import Engine, Sample, cut, place
from .rendered_prompts import context_length, model_source, prompts_that_fit

if TYPE_CHECKING:
    from .options import SampleOptions


def transformers_engine(options: "SampleOptions") -> Engine:
    """Batches by length, padded on the left, bf16 on a GPU; a batch is drawn from (seed, shard, batch). An adapter's
    base is quantised as its run's record says.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    from ...models.adapters import base_model, refuse_virtual_tokens
    from ...models.sampling import FiniteLogits

    source = model_source(options)
    tokenizer = source.load_tokenizer()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    room = context_length(options)
    model = source.load_policy(options.dtype)
    refuse_virtual_tokens(model)

    own = model.generation_config
    end = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    # On the model too: what is passed to `generate` is filled up from there.
    plain = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id, bos_token_id=own.bos_token_id)
    model.generation_config = base_model(model).generation_config = plain

    @torch.inference_mode()
    def complete(shard: int, first_row: int, rows: list[dict], advance: Advance) -> list[list[Sample]]:
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:
            # transformers has top-k at 50 where nothing is said
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        if options.stop:
            sampling |= {"stop_strings": options.stop, "tokenizer": tokenizer}
        ids, failed = prompts_that_fit(tokenizer, room, options.max_new_tokens, rows)
        fit = sorted(ids, key=lambda i: len(ids[i]))
        done: list[list[Sample]] = []
        for batch, start in enumerate(range(0, len(fit), options.batch_size)):
            picked = fit[start : start + options.batch_size]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in picked]}, return_tensors="pt").to(model.device)
            torch.manual_seed(seed_for(options.seed, shard, batch))
            out = model.generate(
                **inputs, max_new_tokens=options.max_new_tokens, num_return_sequences=options.num_completions,
                logits_processor=LogitsProcessorList([FiniteLogits()]), **sampling,
            )[:, inputs["input_ids"].shape[1] :].tolist()  # fmt: skip
            drawn = []
            for tokens in out:
                length = next((t for t, token in enumerate(tokens) if token in ends), None)
                text, stopped = cut(tokenizer.decode(tokens[:length], skip_special_tokens=True), options.stop)
                truncated = length is None and not stopped and len(tokens) == options.max_new_tokens
                drawn.append(Sample(text, truncated))
            k = options.num_completions
            done += [drawn[j * k : (j + 1) * k] for j in range(len(picked))]
            advance(len(picked))
        return place(fit, done, failed, first_row, len(rows))

    return complete


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's `max_lora_rank` may be


def lora_rank(adapter: str) -> int:
    """The `max_lora_rank` of vLLM, 16 by default, that takes an adapter of this folder.

    Raises:
        UserError: the folder has no such adapter, or its rank is more than vLLM takes.
    """
    try:
        about = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(about["r"], *(about.get("rank_pattern") or {"": 0}).values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"`adapter` {adapter} has no adapter_config.json with the rank `r` ({one_line(error)}); vLLM needs the "
            "folder of a LoRA adapter"
        ) from error
    if rank > _VLLM_RANKS[-1]:
        raise UserError(f"`adapter` {adapter} has rank {rank}, and vLLM takes {_VLLM_RANKS[-1]}; merge it instead")
    return next(size for size in _VLLM_RANKS if size >= rank)


def vllm_engine(options: "SampleOptions") -> Engine:
    """vLLM, which batches by itself; each prompt is drawn from (seed, row).

    Raises:
        UserError: vLLM is not installed, or doesn't take the adapter.
        NotImplementedError: the adapter was trained on a quantised base, and here would be on another one.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            "`engine` is 'vllm', which is not installed here: pip install 'nca-align[vllm]' on a CUDA machine, or use "
            "`engine` 'transformers'"
        ) from error
    from ...models.loading import trained_quantization

    source = model_source(options)
    adapter = source.adapter
    if adapter is not None and trained_quantization(adapter) is not None:
        raise UnsupportedError(
            f"`engine` is 'vllm' with the adapter {adapter}, which was trained on a quantised base: export it by "
            "`nca-align export` and name that folder by `model_name_or_path`, or use `engine` 'transformers'"
        )
    tokenizer, room = source.load_tokenizer(), context_length(options)
    llm = LLM(
        model=source.path, revision=options.model_revision, dtype=options.dtype, seed=options.seed,
        trust_remote_code=options.trust_remote_code, generation_config="vllm",  # neutral, not the model's
        **({} if adapter is None else {"enable_lora": True, "max_lora_rank": lora_rank(adapter)}),
    )  # fmt: skip
    lora = LoRARequest("adapter", 1, adapter) if adapter else None

    def complete(shard: int, first_row: int, rows: list[dict], advance: Advance) -> list[list[Sample]]:
        ids, failed = prompts_that_fit(tokenizer, room, options.max_new_tokens, rows)
        params = [
            SamplingParams(
                n=options.num_completions, temperature=options.temperature, top_p=options.top_p, stop=options.stop,
                max_tokens=options.max_new_tokens, seed=seed_for(options.seed, first_row + i),
            )
            for i in ids
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": tokens} for tokens in ids.values()]
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False) if ids else []
        done = [[Sample(one.text, one.finish_reason == "length") for one in output.outputs] for output in outputs]
        return place(list(ids), done, failed, first_row, len(rows))

    return complete
