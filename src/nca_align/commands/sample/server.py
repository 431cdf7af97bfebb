"""An engine over HTTP: any running server that speaks the OpenAI protocol, as vLLM's, llama.cpp's or transformers'."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from ...data.cleaning import clean_prompt
from ...errors import InvalidRowError, UserError
from ...models.sampling import seed_for
from ...store.shards import Progress
from .answers import FailedRow, Refused, read_models, read_samples
from .client import Client, NoAnswer
from .options import Engine, EngineOptions, Sample, SampleOptions

_GLANCE = 0.5  # seconds from one look at whether the run ends to the next
_UNANSWERED = 3  # rows without an answer, while no other has one, of which the server must be the reason


def resolve_model_name(options: EngineOptions) -> str:
    """The model to ask for: `model_name_or_path`, or where that is left out the one that the server says it has."""
    if options.model_name_or_path is not None:
        return options.model_name_or_path
    try:
        models = Client(options).ask("/models", None, read_models)
    except (Refused, FailedRow) as error:
        raise UserError(f"{error}; it was asked for its models: name one by `model_name_or_path`") from error
    if len(models) != 1:
        raise UserError(
            f"the server at {options.base_url} offers {', '.join(models) or 'no model'}; say which by "
            "`model_name_or_path`"
        )
    return models[0]


def server_engine(options: SampleOptions, model: str) -> Engine:
    """`own_concurrency` rows at a time, of one shard or of several that are asked for in threads.

    Completion k of a row is sampled from (seed, row, k).

    The model's own sampling settings are taken back as far as the protocol has words for them: both penalties are 0.
    Servers differ: one that refuses `n`, or gives fewer than the K asked for, is asked for the others one by one, each
    with a seed of its own. Where `extra_body` holds null for a key, that key is left out.
    """
    extra = json.loads(options.extra_body)
    client = Client(options)
    takes_n: bool | None = None  # not known yet
    unanswered, counting = 0, threading.Lock()

    def request(sampling: SampleOptions, row: dict, n: int, seed: int) -> list[Sample]:
        prompt = clean_prompt(row)
        chat = not isinstance(prompt.content, str)
        body = {
            "model": model, "messages" if chat else "prompt": prompt.content, "seed": seed,
            "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "frequency_penalty": 0, "presence_penalty": 0,
        }  # fmt: skip
        given: dict[str, Any] = {"n": n if n > 1 else None, "stop": sampling.stop}
        if chat:
            given |= {"tools": prompt.tools, "chat_template_kwargs": prompt.arguments}
        body |= {key: value for key, value in given.items() if value}  # strict servers refuse keys that they don't know
        if prompt.continues:
            body |= {"add_generation_prompt": False, "continue_final_message": True}  # of vLLM's and llama.cpp's
        body = {key: value for key, value in (body | extra).items() if value is not None}
        read = partial(read_samples, chat=chat, stop=sampling.stop)
        try:
            return client.ask("/chat/completions" if chat else "/completions", body, read)[:n]
        except Refused as error:
            raise _with_fix(error, extra, sampling) from error

    def samples_of(sampling: SampleOptions, number: int, row: dict) -> list[Sample]:
        nonlocal takes_n
        k = sampling.num_completions
        samples: list[Sample] = []
        refused = False
        if k > 1 and takes_n is not False:
            try:
                samples = request(sampling, row, k, seed_for(sampling.seed, number, 0))
                takes_n = True
            except Refused as error:
                if "n" not in error.keys:
                    raise
                refused = True
            except (FailedRow, NoAnswer) as error:
                known = (
                    error.of_server if isinstance(error, NoAnswer) else error.cause in ("too long", "content filter")
                )
                if known or takes_n or "n" in extra:
                    raise
                refused = True  # perhaps of `n`; what else it may be, the next request says
        while len(samples) < k:
            samples += request(sampling, row, 1, seed_for(sampling.seed, number, len(samples)))
        if refused:
            takes_n = False
        return samples

    def complete_row(sampling: SampleOptions, number: int, row: dict) -> list[Sample] | InvalidRowError:
        nonlocal unanswered
        client.check()  # requests that haven't begun are none any more
        try:
            samples = samples_of(sampling, number, row)
        except InvalidRowError as error:  # the other rows go on
            return error
        except NoAnswer as error:
            with counting:
                unanswered += not error.alone
                away = not error.alone and (error.of_server or unanswered >= _UNANSWERED)
            if not away:
                return FailedRow("no answer", str(error))
            raise client.end(error) from None
        except UserError as error:
            raise client.end(error) from None
        with counting:
            unanswered = 0
        return samples

    pool = ThreadPoolExecutor(options.own_concurrency)  # rows of all shards under way wait for it, in their order

    def complete(sampling: SampleOptions, shard: int, rows: dict[int, dict], progress: Progress) -> dict[int, Any]:
        found = {}
        try:
            under_way = {number: pool.submit(complete_row, sampling, number, row) for number, row in rows.items()}
            progress(0)
            for number, future in under_way.items():
                while not wait([future], _GLANCE).done:
                    progress(0)  # which raises where the run ends
                found[number] = future.result()
                progress(1)
        except BaseException as error:
            raise client.end(error) from None
        return found

    return complete


def _with_fix(error: Refused, extra: dict[str, Any], sampling: SampleOptions) -> Refused:
    """The refusal of a request, and where it names keys, the option that leaves them out."""
    if not error.keys:
        return Refused(str(error))
    without: dict[str, Any] = extra | dict.fromkeys(sorted(error.keys))
    if "max_tokens" in error.keys and "max_completion_tokens" not in extra:
        without["max_completion_tokens"] = sampling.max_new_tokens  # what OpenAI's newer models call it
    names = ", ".join(f"`{key}`" for key in sorted(error.keys))
    text = f"{error}, by {names}: give --extra_body '{json.dumps(without)}' to leave that out"
    return Refused(text, keys=error.keys)
