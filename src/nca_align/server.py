"""An engine over HTTP: any running server that speaks the OpenAI protocol, as vLLM's, llama.cpp's or transformers'."""

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from .engines import Advance, Engine, Sample, as_object, cut, seed_of
from .errors import UserError, one_line
from .prompts import clean_messages

if TYPE_CHECKING:
    from .sampling import SampleOptions

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # busy or starting: worth another try


class Refused(UserError):
    """The server understood the request and won't do it."""


def ask(url: str, body: dict | None, timeout: float, retries: int) -> dict[str, Any]:
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
                raise Refused(f"the server at {url} refused the request ({reason})") from error
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


def server_model(options: "SampleOptions") -> str:
    """The model to ask for: `model_name_or_path`, or the one that the server says it has."""
    if options.model_name_or_path is not None:
        return options.model_name_or_path
    models = [model["id"] for model in ask(f"{_root(options)}/models", None, 30, options.retries).get("data", [])]
    if len(models) != 1:
        raise UserError(
            f"the server at {options.base_url} offers {', '.join(models) or 'no model'}; say which by "
            "`model_name_or_path`"
        )
    return models[0]


def server_engine(options: "SampleOptions", model: str) -> Engine:
    """At most `concurrency` requests at a time; completion k of a row is drawn from (seed, row, k).

    Servers differ: one that refuses `n`, or gives fewer than the K asked for, is asked for the others one by one, each
    with a seed of its own.
    """
    extra = json.loads(options.extra_body)
    takes_n = [True]

    def request(row: dict, n: int, seed: int) -> list[Sample]:
        body = {
            "model": model, "n": n, "seed": seed, "max_tokens": options.max_new_tokens,
            "temperature": options.temperature, "top_p": options.top_p,
        }  # fmt: skip
        if options.stop:
            body["stop"] = options.stop
        if n == 1:
            del body["n"]
        chat = not isinstance(row["prompt"], str)
        if chat:
            body["messages"] = clean_messages(row["prompt"])
            body |= {key: as_object(row[key]) for key in ("tools", "chat_template_kwargs") if row.get(key)}
        else:
            body["prompt"] = row["prompt"]
        url = f"{_root(options)}/{'chat/completions' if chat else 'completions'}"
        answer = ask(url, body | extra, options.timeout, options.retries)
        try:
            samples = []
            for choice in answer["choices"]:
                text, stopped = cut((choice["message"]["content"] if chat else choice["text"]) or "", options.stop)
                samples.append(Sample(text, choice.get("finish_reason") == "length" and not stopped))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the server at {url} answered something else than completions ({json.dumps(answer)[:200]}); is it an "
                "OpenAI-compatible server?"
            ) from error
        return samples[:n]

    def row_samples(number: int, row: dict) -> list[Sample]:
        k = options.num_completions
        samples: list[Sample] = []
        if k > 1 and takes_n[0]:
            try:
                samples = request(row, k, seed_of(options.seed, number, 0))
            except Refused:  # perhaps of `n`; what else it may be, the next request says
                takes_n[0] = False
        while len(samples) < k:
            one = request(row, 1, seed_of(options.seed, number, len(samples)))
            if not one:
                raise UserError(f"row {number}: the server at {options.base_url} answered without any completion")
            samples += one
        return samples

    def complete(shard: int, first_row: int, rows: list[dict], advance: Advance) -> list[list[Sample]]:
        with ThreadPoolExecutor(options.concurrency) as pool:
            futures = [pool.submit(row_samples, first_row + i, row) for i, row in enumerate(rows)]
            try:
                samples = []
                for future in futures:
                    samples.append(future.result())
                    advance(1)
                return samples
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return complete


def _root(options: "SampleOptions") -> str:
    root = options.base_url.rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"
