"""An engine over HTTP: any running server that speaks the OpenAI protocol, as vLLM's, llama.cpp's or transformers'."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from ...batching.rendering import protocol_messages
from ...data.cleaning import clean_prompt
from ...errors import InvalidRowError, UserError
from ...models.sampling import seed_for
from ...store.shards import Progress
from .answers import FailedRow, Refused
from .client import Client, NoAnswer
from .completions import read_models, read_samples
from .options import Engine, EngineOptions, Sample, SampleOptions

_GLANCE = 0.5  # seconds from one look at whether the run ends to the next
_UNANSWERED = 3  # rows without an answer, while no other has one, of which the server must be the reason
_REFUSED = 16  # rows refused without a key's name, while no other is answered, of which the request must be the reason
_OPTIONS = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
    "top_p": "top_p", "stop": "stop",
}  # fmt: skip


def resolve_model_name(options: EngineOptions) -> str:
    """The model to ask for: `model_name_or_path`, or where that is left out the one that the server says it has."""
    if options.model_name_or_path is not None:
        return options.model_name_or_path
    try:
        models = Client(options).ask("/models", None, read_models)
    except (Refused, FailedRow) as error:
        raise UserError(f"{error}; this came of asking for its models. Name one by `model_name_or_path`.") from error
    if len(models) != 1:
        raise UserError(
            f"the server at {options.base_url} offers {', '.join(models) or 'no model'}; say which by "
            "`model_name_or_path`"
        )
    return models[0]


def server_engine(options: SampleOptions, model: str) -> Engine:
    """`own_concurrency` rows at a time, of one shard or of several that are asked for in threads.

    Completion k of a row is sampled from (seed, row, k), whatever becomes of other rows, and when.

    The model's own sampling settings are taken back as far as the protocol has words for them: both penalties are 0.
    Servers differ: one that says that it takes no `n`, or gives fewer than the K asked for, is asked for the others one
    by one, each with a seed of its own. Where `extra_body` holds null for a key, that key is left out.
    """
    extra = json.loads(options.extra_body)
    client = Client(options)
    takes_n = True  # until the server says otherwise, which it says to every row alike
    unanswered, refused, counting = 0, 0, threading.Lock()

    def request(sampling: SampleOptions, row: dict, n: int, seed: int) -> list[Sample]:
        prompt = clean_prompt(row)
        chat = not isinstance(prompt.content, str)
        body = {
            "model": model, **({"messages": protocol_messages(prompt.content)} if chat else {"prompt": prompt.content}),
            "seed": seed, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "frequency_penalty": 0, "presence_penalty": 0,
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
        if k > 1 and takes_n:
            try:
                samples = request(sampling, row, k, seed_for(sampling.seed, number, 0))
            except Refused as error:
                if "n" not in error.keys or "n" in extra:
                    raise
                takes_n = "n" in client.accepted
            except (FailedRow, NoAnswer) as error:
                if "n" in client.accepted or "n" in extra:
                    raise
                raise _perhaps_of_n(error) from error
        while len(samples) < k:
            samples += request(sampling, row, 1, seed_for(sampling.seed, number, len(samples)))
        return samples

    def complete_row(sampling: SampleOptions, number: int, row: dict) -> list[Sample] | InvalidRowError:
        nonlocal unanswered, refused
        client.check()  # requests that haven't begun are none any more
        try:
            samples = samples_of(sampling, number, row)
        except InvalidRowError as error:  # the other rows go on
            with counting:
                refused += isinstance(error, FailedRow) and error.refused
                none = refused >= _REFUSED and not client.accepted
            if not none:
                return error
            raise client.end(Refused(f"{error}; it has refused {_REFUSED} rows and answered none")) from None
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


def _perhaps_of_n(error: FailedRow | NoAnswer) -> FailedRow | NoAnswer:
    """The failure of a request for several completions, with what to do where `n` is its reason."""
    text = f"{error}; if it takes no `n`, give --extra_body '{{\"n\": null}}'"
    if isinstance(error, FailedRow):
        return FailedRow(error.cause, text) if error.refused else error
    return error if error.of_server else NoAnswer(text, error.of_server, error.alone)


def _with_fix(error: Refused, extra: dict[str, Any], sampling: SampleOptions) -> Refused:
    """The refusal of a request, and where it names keys, what to change: a value, or that they are sent at all."""
    if not error.keys:
        return Refused(str(error))
    changed = {key for key in error.keys if error.value and (key in extra or key in _OPTIONS)}
    fixes = [
        f"change `{key}` in `extra_body`" if key in extra
        else f"change `{_OPTIONS[key]}`, which is {getattr(sampling, _OPTIONS[key])}"
        for key in sorted(changed)
    ]  # fmt: skip
    if left_out := sorted(error.keys - changed):
        without: dict[str, Any] = extra | dict.fromkeys(left_out)
        if "max_tokens" in left_out and "max_completion_tokens" not in extra:
            without["max_completion_tokens"] = sampling.max_new_tokens  # what OpenAI's newer models call it
        fixes.append(f"give --extra_body '{json.dumps(without)}' to leave that out")
    names = ", ".join(f"`{key}`" for key in sorted(error.keys))
    return Refused(f"{error}, by {names}: {', and '.join(fixes)}", error.keys, error.value)
