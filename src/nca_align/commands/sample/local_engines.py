"""Engines that complete prompts on this machine: `transformers` everywhere, `vllm` where it is installed.

Of a model's generation config they take where a completion ends, and nothing else: with a repetition penalty, top-k or
min-p on, it would be no sample of the model that is trained.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...batching.collator import batches_by_length
from ...batching.rendering import prompt_ids
from ...batching.token_ids import check_token
from ...errors import InvalidRowError, UnsupportedError, UserError, one_line
from ...models.loading import ModelSource, trained_quantization
from ...models.plain_lora import is_subtracted
from ...models.sampling import check_room, end_tokens, sample_answers, seed_for
from ...models.vocabulary import token_rows
from ...processes import show_own_cards
from ...store.files import read_json
from ...store.shards import Progress
from .options import Engine, EngineOptions, Sample, SampleOptions, cut_at_stop


def model_source(options: EngineOptions) -> ModelSource:
    """The model that completes prompts, with its adapter."""
    return ModelSource.of(
        str(options.model_name_or_path), adapter=options.adapter, revision=options.model_revision,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip


def prompt_reader(
    options: SampleOptions, tokenizer: Any, rows: int | None = None
) -> Callable[[dict], list[int] | InvalidRowError]:
    """A function of a row: token ids of its prompt, or why the model can't complete it.

    Args:
        rows: of the loaded model's embeddings; None for those that its configuration names.
    """
    source = model_source(options)
    config = source.load_config()
    if rows is None:  # a run may have added tokens to an adapter's base, as its folder says
        rows = config.get_text_config().vocab_size if source.adapter is None else sys.maxsize

    def read(row: dict) -> list[int] | InvalidRowError:
        try:
            ids = prompt_ids(tokenizer, row)
            check_token(max(ids), rows, tokenizer)
            check_room(config, len(ids), options.max_new_tokens)
        except InvalidRowError as error:  # the other rows go on
            return error
        return ids

    return read


def check_prompts(options: SampleOptions, rows: Iterable[dict]) -> None:
    """Refuse prompts that the model can't complete before anything is sampled.

    Raises:
        UserError: it names the first and says how many.
    """
    read = prompt_reader(options, model_source(options).load_tokenizer())
    failed = [(i, why) for i, why in enumerate(map(read, rows)) if isinstance(why, InvalidRowError)]
    if failed:
        row, why = failed[0]
        raise UserError(
            f"row {row}: {why}. Nothing has been sampled. Rows like this one: {len(failed)}; `--on_error drop` leaves "
            "them out."
        )


def transformers_engine(options: SampleOptions) -> Engine:
    """Batches by length, padded on the left, bf16 on a GPU; a batch is sampled from (seed, shard, batch). An adapter's
    base is quantised as its run's record says.
    """
    source = model_source(options)
    tokenizer = source.load_tokenizer()
    model = source.load_policy(options.dtype)
    read = prompt_reader(options, tokenizer, token_rows(model))
    ends = end_tokens(model, tokenizer)

    def sampled(ids: list[int], sampling: SampleOptions) -> Sample:
        ended = ids[-1] in ends
        text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        text, stopped = cut_at_stop(text, sampling.stop)
        return Sample(text, not ended and not stopped and len(ids) == sampling.max_new_tokens)

    def complete(sampling: SampleOptions, shard: int, rows: dict[int, dict], progress: Progress) -> dict[int, Any]:
        settings: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            settings = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.stop:
            settings |= {"stop_strings": sampling.stop, "tokenizer": tokenizer}
        found: dict[int, Any] = {number: read(row) for number, row in rows.items()}
        prompts = {number: ids for number, ids in found.items() if isinstance(ids, list)}
        numbers = list(prompts)
        for batch, places in enumerate(batches_by_length([*map(len, prompts.values())], options.batch_size)):
            picked = [numbers[i] for i in places]
            answers = sample_answers(
                model, [prompts[number] for number in picked], sampling.num_completions, sampling.max_new_tokens, ends,
                seed_for(sampling.seed, shard, batch), **settings,
            )  # fmt: skip
            for number, own in zip(picked, answers, strict=True):
                found[number] = [sampled(ids, sampling) for ids in own]
            progress(len(picked))
        return found

    return complete


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's `max_lora_rank` may be


def lora_rank(adapter: str) -> int:
    """The `max_lora_rank` of vLLM, 16 by default, that takes an adapter of this folder.

    Raises:
        UserError: the folder has no such adapter, or its rank is more than vLLM takes.
    """
    try:
        about = read_json(Path(adapter) / "adapter_config.json")
        rank = max(about["r"], *(about.get("rank_pattern") or {"": 0}).values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"`adapter` {adapter} has no adapter_config.json with the rank `r` ({one_line(error)}); vLLM needs the "
            "folder of a LoRA adapter"
        ) from error
    if rank > _VLLM_RANKS[-1]:
        raise UserError(
            f"`adapter` {adapter} has rank {rank}, but vLLM takes at most {_VLLM_RANKS[-1]}; merge it instead"
        )
    return next(size for size in _VLLM_RANKS if size >= rank)


def vllm_engine(options: SampleOptions) -> Engine:
    """vLLM, which batches by itself; each prompt is sampled from (seed, row).

    Raises:
        UserError: vLLM is not installed, doesn't take the adapter, or has too few cards.
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
    source = model_source(options)
    adapter = source.adapter
    quantised = adapter is not None and trained_quantization(adapter) is not None
    if quantised or (adapter is not None and is_subtracted(Path(adapter))):
        base = "a quantised base" if quantised else "a base that its initialisation changed"
        raise UnsupportedError(
            f"`engine` is 'vllm' with the adapter {adapter}, which was trained on {base}. Export it by `nca-align "
            "export` and name that folder by `model_name_or_path`, or use `engine` 'transformers'."
        )
    read = prompt_reader(options, source.load_tokenizer())
    own = {
        "model": source.path, "revision": options.model_revision, "dtype": options.dtype, "seed": options.seed,
        "trust_remote_code": options.trust_remote_code, "generation_config": "vllm",  # neutral, not the model's
    } | ({} if adapter is None else {"enable_lora": True, "max_lora_rank": lora_rank(adapter)})  # fmt: skip
    given = json.loads(options.engine_args)
    if twice := sorted(own.keys() & given.keys()):
        raise UserError(f"`engine_args` holds {twice[0]!r}, which is set from the other options; leave it out")
    show_own_cards(given.get("tensor_parallel_size", 1) * given.get("pipeline_parallel_size", 1))
    try:
        llm = LLM(**own, **given)
    except TypeError as error:
        raise UserError(
            f"`engine_args` is {options.engine_args}, but vLLM doesn't take it ({one_line(error)[:200]}); see the "
            "arguments of its `LLM`"
        ) from error
    lora = LoRARequest("adapter", 1, adapter) if adapter else None

    def complete(sampling: SampleOptions, shard: int, rows: dict[int, dict], progress: Progress) -> dict[int, Any]:
        found: dict[int, Any] = {number: read(row) for number, row in rows.items()}
        prompts = {number: {"prompt_token_ids": ids} for number, ids in found.items() if isinstance(ids, list)}
        params = [
            SamplingParams(
                n=sampling.num_completions, temperature=sampling.temperature, top_p=sampling.top_p, stop=sampling.stop,
                max_tokens=sampling.max_new_tokens, seed=seed_for(sampling.seed, number),
            )
            for number in prompts
        ]  # fmt: skip
        outputs = llm.generate([*prompts.values()], params, lora_request=lora, use_tqdm=False) if prompts else []
        for number, output in zip(prompts, outputs, strict=True):
            found[number] = [Sample(one.text, one.finish_reason == "length") for one in output.outputs]
        return found

    return complete
