"""An engine over HTTP: any running server that speaks the OpenAI protocol, as vLLM's, llama.cpp's or transformers'."""

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from ...data.cleaning import clean_prompt
from ...errors import InvalidRowError, UserError, one_line
from ...models.sampling import seed_for
from ...store.shards import Progress
from .options import Engine, EngineOptions, Sample, SampleOptions, cut_at_stop

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # busy or starting: worth another try
_OF_THIS_ROW = (400, 413, 422)  # a prompt that is too long, or filtered


class Refused(UserError):
    """The server understood the request and won't do it."""


class RefusedRow(Refused, InvalidRowError):
    """As `Refused`, perhaps for what this request says alone."""


def request_json(url: str, body: dict | None, timeout: float, retries: int) -> dict[str, Any]:
    """The JSON answer to a request, tried again with growing pauses while the server is busy or away.

    Args:
        url: the full address.
        body: sent as JSON by POST; None is a GET.
        timeout: seconds for one try.
        retries: tries after the first, 0.5, 1, 2 … seconds apart (at most 30), or as the server's Retry-After says.

    Raises:
        Refused: the server won't do it (HTTP 400, 404 …).
        UserError: no answer to any try.
    """
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(retries + 1):
        pause = min(30.0, 0.5 * 2**attempt)
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {' '.join(error.read().decode(errors='replace').split())[:300]}"
            if error.code not in _AGAIN:
                kind = RefusedRow if error.code in _OF_THIS_ROW else Refused
                raise kind(f"the server at {url} refused the request ({reason})") from error
            after = error.headers.get("Retry-After", "")
            pause = float(after) if after.isdigit() else pause
        except (OSError, HTTPException, ValueError) as error:  # no connection, a broken one, or no JSON
            reason = one_line(getattr(error, "reason", error))
        if attempt < retries:
            time.sleep(pause)
    raise UserError(
        f"the server at {url} does not answer ({reason}, {retries + 1} tries); what is done is kept, and the same "
        "command goes on once the server runs"
    )


def resolve_model_name(options: EngineOptions) -> str:
    """The model to ask for: `model_name_or_path`, or where that is left out the one that the server says it has."""
    if options.model_name_or_path is not None:
        return options.model_name_or_path
    url = f"{api_base_url(options)}/models"
    answer = request_json(url, None, 30, options.retries)
    try:
        models = [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the server at {url} answered something else than its models ({json.dumps(answer)[:200]}); name the model "
            "by `model_name_or_path`"
        ) from error
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
    with a seed of its own.
    """
    extra = json.loads(options.extra_body)
    takes_n = True

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
        url = f"{api_base_url(options)}/{'chat/completions' if chat else 'completions'}"
        answer = request_json(url, body | extra, options.timeout, options.retries)
        try:
            samples = []
            for choice in answer["choices"]:
                whole = _text(choice["message"]["content"] if chat else choice["text"])
                text, stopped = cut_at_stop(whole, sampling.stop)
                samples.append(Sample(text, choice.get("finish_reason") == "length" and not stopped))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the server at {url} answered something else than completions ({json.dumps(answer)[:200]}); is it an "
                "OpenAI-compatible server?"
            ) from error
        return samples[:n]

    def samples_of(sampling: SampleOptions, number: int, row: dict) -> list[Sample]:
        nonlocal takes_n
        k = sampling.num_completions
        samples: list[Sample] = []
        refused = False
        if k > 1 and takes_n:
            try:
                samples = request(sampling, row, k, seed_for(sampling.seed, number, 0))
            except Refused:  # perhaps of `n`; what else it may be, the next request says
                refused = True
        while len(samples) < k:
            one = request(sampling, row, 1, seed_for(sampling.seed, number, len(samples)))
            if not one:
                raise InvalidRowError(f"the server at {options.base_url} answered without any completion")
            samples += one
        if refused:
            takes_n = False
        return samples

    pool = ThreadPoolExecutor(options.own_concurrency)  # rows of all shards under way wait for it, in their order
    ended: list[BaseException] = []

    def complete_row(sampling: SampleOptions, number: int, row: dict) -> list[Sample] | InvalidRowError:
        if ended:  # requests that haven't begun are none any more
            raise ended[0]
        try:
            return samples_of(sampling, number, row)
        except InvalidRowError as error:  # the other rows go on
            return error

    def complete(sampling: SampleOptions, shard: int, rows: dict[int, dict], progress: Progress) -> dict[int, Any]:
        found = {}
        try:
            under_way = {number: pool.submit(complete_row, sampling, number, row) for number, row in rows.items()}
            progress(0)
            for number, future in under_way.items():
                found[number] = future.result()
                progress(1)
        except BaseException as error:
            ended.append(error)
            raise
        return found

    return complete


def _text(content: str | list[dict] | None) -> str:
    """The text of an answer, which may come in parts; half a surrogate pair, which no file can hold, is U+FFFD."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return (content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def api_base_url(options: EngineOptions) -> str:
    """The address that requests begin with."""
    root = str(options.base_url).rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"
