"""Servers over real sockets that answer as told, and as others document (docs/guide/servers.md)."""

import json
import math
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any, NamedTuple

MODELS = (200, {}, {"data": [{"id": "the-model"}]})


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client may hang up; other errors are shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def http_server(answer: Callable[[str, Any], Any], certificate: str | None = None) -> Iterator[str]:
    """A server whose `answer(path, body)` gives (status, headers, object), or what to do with the handler instead.

    Args:
        answer: called in the thread of a request.
        certificate: a file of it and its key, for HTTPS.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            except (OSError, ValueError):  # of a client that was killed
                return
            replied = answer(self.path, body)
            if callable(replied):
                replied(self)
                return
            status, headers, content = replied
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with _Server(("127.0.0.1", 0), Handler) as running:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            running.socket = context.wrap_socket(running.socket, server_side=True)
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http{'s' if certificate else ''}://127.0.0.1:{running.server_port}"
        running.shutdown()


def chat_answer(body: dict, n: int = 1, text: str = "{seed} {i}") -> dict:
    """`n` answers that differ, cut at the limit."""
    texts = [text.format(seed=body["seed"], i=i) for i in range(n)]
    return {"choices": [{"message": {"content": t}, "finish_reason": "length"} for t in texts]}


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """No answer: the connection is closed."""
    handler.close_connection = True


def cut_body(handler: BaseHTTPRequestHandler) -> None:
    """Half of an answer, with the length of the whole."""
    whole = json.dumps({"choices": [{"message": {"content": "an answer"}, "finish_reason": "stop"}]}).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(whole)))
    handler.end_headers()
    handler.wfile.write(whole[: len(whole) // 2])


def message(content: Any = ..., finish: Any = "stop", **fields: Any) -> tuple[int, dict, Any]:
    """An answer of one choice; `...` for a message without the key `content`."""
    own = {"role": "assistant", **({} if content is ... else {"content": content}), **fields}
    return 200, {}, {"choices": [{"index": 0, "message": own, "finish_reason": finish}], "usage": {"total_tokens": 3}}


class Form(NamedTuple):
    """What one server answers to every request for one completion, and what comes of it.

    Args:
        peer: whose form it is.
        what: of the difference.
        reply: what the server answers, to each request or to the first, second … and the last again and again.
        expected: a `Sample`'s fields, the cause of a row's failure, or an error's text by which the run stops at once.
        requests: how many it takes.
        pauses: seconds that the server asked for between them.
    """

    peer: str
    what: str
    reply: Any
    expected: Any
    requests: int = 1
    pauses: tuple[float, ...] = ()


class Failed(str):
    """The cause of a row's failure."""


class Stops(str):
    """A pattern of the error that stops the run."""


TRIES = 4  # of the tests
OK = message("fine")
FINE = ("fine", False, None, False)


def _error(message: Any, code: Any = 400, **fields: Any) -> dict:
    return {"error": {"message": message, "code": code, **fields}}


def _located(*keys: str) -> list[dict]:
    return [
        {"type": "extra_forbidden", "loc": ["body", key], "msg": "Extra inputs are not permitted", "input": 0}
        for key in keys
    ]


_LENGTH_VLLM = (
    "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 4096 tokens and "
    "your request has 4000 input tokens (512 > 4096 - 4000). (parameter=max_tokens, value=512)"
)
_LENGTH_SGLANG = (
    "Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of 5000 "
    "tokens: 4500 tokens from the input messages and 500 tokens for the completion."
)
_LENGTH_OPENAI = "This model's maximum context length is 512 tokens. However, you requested 700 tokens."
_LENGTH_LLAMA = "request (9412 tokens) exceeds the available context size (8192 tokens), try increasing it"
_UNKNOWN_GEMINI = 'Invalid JSON payload received. Unknown name "{}": Cannot find field.'
_HTML = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
_SEED = r"refused the request \(HTTP \d\d\d.*, by `seed`: give --extra_body '\{\"seed\": null\}' to leave that out$"

FORMS = [
    # vLLM
    Form("vLLM", "a thought cut at the limit", message(None, "length", reasoning="Hm"),
         ("", True, "cut before any text", True)),
    Form("vLLM", "a thought apart", message("fine", reasoning="Hm"), ("fine", False, None, True)),
    Form("vLLM", "a prompt too long, by the name of a parameter",
         (400, {}, _error(_LENGTH_VLLM, type="BadRequestError", param="max_tokens")), Failed("too long")),
    Form("vLLM", "a parameter that it doesn't know, as text of a list",
         (400, {}, {"object": "error", "code": 400, "param": None, "type": "BadRequestError",
                    "message": str([one | {"loc": ("body", "seed")} for one in _located("seed")])}), Stops(_SEED)),
    Form("vLLM", "another model",
         (404, {}, _error("The model `m` does not exist.", 404, type="NotFoundError", param="model")),
         Stops("HTTP 404.*look at `base_url`, .* and at `model_name_or_path`")),
    Form("vLLM", "generation that broke off", [message("fi", "abort"), message("fi", "error"), OK], FINE, 3),
    # SGLang
    Form("SGLang", "an error without `error`, too long",
         (400, {}, {"object": "error", "message": _LENGTH_SGLANG, "type": "BadRequestError", "code": 400}),
         Failed("too long")),
    Form("SGLang", "any exception as 500",
         (500, {}, {"object": "error", "message": "Internal server error: x", "type": "InternalServerError",
                    "param": None, "code": 500}), Failed("no answer"), TRIES),
    Form("SGLang", "filtered", message("fi", "content_filter"), ("", False, "content filter", False)),
    # llama.cpp
    Form("llama.cpp", "still loading",
         [(503, {}, _error("Loading model", 503, type="unavailable_error"))] * 2 + [OK], FINE, 3),
    Form("llama.cpp", "too long",
         (400, {}, _error(_LENGTH_LLAMA, type="exceed_context_size_error", n_prompt_tokens=9412, n_ctx=8192)),
         Failed("too long")),
    Form("llama.cpp", "a thought alone", message("", "length", reasoning_content="Hm"),
         ("", True, "cut before any text", True)),
    Form("llama-cpp-python", "too long, by the name of the messages",
         (400, {}, _error(_LENGTH_OPENAI, "context_length_exceeded", param="messages")), Failed("too long")),
    Form("llama-cpp-python", "a validator's refusal as 500",
         (500, {}, _error("1 validation error: {'type': 'int_parsing', 'loc': ('body', 'seed'), 'msg': 'Input should "
                          "be a valid integer', 'input': 'x'}", None, type="internal_server_error")), Stops(_SEED)),
    # Ollama
    Form("Ollama", "no reason for the end", message("fine", None), FINE),
    Form("Ollama", "a thought alone", message("", "length", reasoning="Hm"), ("", True, "cut before any text", True)),
    Form("Ollama", "another model",
         (404, {}, _error('model "m" not found, try pulling it first', None, type="not_found_error", param=None)),
         Stops("HTTP 404.*not found, try pulling it first")),
    # mlx-lm
    Form("mlx-lm", "a message without `content`", message(..., "length", reasoning="Hm"),
         ("", True, "cut before any text", True)),
    Form("mlx-lm", "an error that is a text", [(503, {}, {"error": "Metal: out of memory"}), OK], FINE, 2),
    Form("mlx-lm", "the connection closed on a parameter", hang_up, Failed("no answer"), TRIES),
    # OpenAI
    Form("OpenAI", "a parameter that the model doesn't take",
         (400, {}, _error("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                          "'max_completion_tokens' instead.", "unsupported_parameter", param="max_tokens")),
         Stops(r"by `max_tokens`: give --extra_body '\{\"max_tokens\": null, \"max_completion_tokens\": 9\}'")),
    Form("OpenAI", "a limit of requests, with Retry-After in seconds",
         [(429, {"Retry-After": "20"}, _error("Rate limit reached", "rate_limit_exceeded", type="requests")), OK],
         FINE, 2, (20.0,)),
    Form("OpenAI", "a limit of requests, in milliseconds",
         [(429, {"retry-after-ms": "1500", "Retry-After": "2"}, _error("", "rate_limit")), OK], FINE, 2, (1.5,)),
    Form("OpenAI", "a prompt above the limit of a minute",
         (429, {}, _error("Request too large for m on tokens per min (TPM): Limit 30000, Requested 40000.",
                          "rate_limit_exceeded", type="tokens")), Failed("too long")),
    Form("OpenAI", "no credit",
         (429, {}, _error("You exceeded your current quota", "insufficient_quota", type="insufficient_quota")),
         Stops("has no credit or quota for this key")),
    Form("OpenAI", "a key that isn't known", (401, {}, _error("Incorrect API key provided", "invalid_api_key")),
         Stops("HTTP 401.*; set OPENAI_API_KEY to a key that it takes")),
    Form("OpenAI", "a refusal apart", message(None, "stop", refusal="I can't."), ("", False, "refusal", False)),
    Form("OpenAI", "a call of a tool", message(None, "tool_calls", tool_calls=[{"id": "1"}]),
         ("", False, "tool call", False)),
    Form("OpenAI", "too long", (400, {}, _error(_LENGTH_OPENAI, "context_length_exceeded", param="messages")),
         Failed("too long")),
    Form("Azure", "a filtered prompt",
         (400, {}, _error("The response was filtered due to the prompt triggering Azure OpenAI's content management "
                          "policy.", "content_filter", param="prompt")), Failed("content filter")),
    # Mistral
    Form("Mistral", "a parameter that it doesn't know",
         (422, {}, {"object": "error", "message": {"detail": _located("seed")}, "type": "invalid_request_error",
                    "param": None, "code": None}), Stops(_SEED)),
    Form("Mistral", "the same, as JSON in a text",
         (422, {}, {"object": "error", "message": json.dumps({"detail": _located("seed")}), "param": None,
                    "type": "internal_error_proxy", "code": "1000"}), Stops(_SEED)),
    Form("Mistral", "parts with a thought",
         message([{"type": "thinking", "thinking": [{"type": "text", "text": "H"}]}, {"type": "text", "text": "fine"}]),
         ("fine", False, None, True)),
    Form("Mistral", "cut at the model's own length", message("fi", "model_length"), ("fi", True, None, False)),
    # Gemini
    Form("Gemini", "parameters that it doesn't know, in a list",
         (400, {}, [_error("\n".join(map(_UNKNOWN_GEMINI.format, ("frequency_penalty", "seed"))),
                           status="INVALID_ARGUMENT")]),
         Stops(r"by `frequency_penalty`, `seed`: give --extra_body '\{\"frequency_penalty\": null, \"seed\": null\}'")),
    Form("Gemini", "a message without `content`", message(..., "length"), ("", True, "cut before any text", False)),
    Form("Gemini", "filtered, without a message",
         (200, {}, {"choices": [{"index": 0, "finish_reason": "content_filter: PROHIBITED_CONTENT"}]}),
         ("", False, "content filter", False)),
    Form("Gemini", "exhausted, with the delay in its details",
         [(429, {}, [_error("Resource exhausted", 429, status="RESOURCE_EXHAUSTED", details=[
             {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "33s"}])]), OK], FINE, 2, (33.0,)),
    Form("Gemini", "a day's quota", (429, {}, [_error("", 429, details=[{"retryDelay": "86400s"}])]),
         Stops("asks to wait 86400 seconds .*, longer than `timeout` 600")),
    # Zhipu
    Form("Zhipu", "filtered", message("fi", "sensitive"), ("", False, "content filter", False)),
    Form("Zhipu", "generation that broke off", [message("fi", "network_error"), OK], FINE, 2),
    Form("Zhipu", "cut at the model's own length", message("fi", "model_context_window_exceeded"),
         ("fi", True, None, False)),
    Form("Zhipu", "a thought in tags", message("<think>Hm</think>fine"), ("<think>Hm</think>fine", False, None, False)),
    Form("Zhipu", "a filtered prompt",
         (400, {}, {"contentFilter": [{"level": 1, "role": "user"}], **_error("不安全或敏感内容", "1301")}),
         Failed("content filter")),
    Form("Zhipu", "too many at a time", [(429, {}, _error("High concurrency usage of this API", "1302")), OK], FINE, 2),
    Form("Zhipu", "no credit", (429, {}, _error("Your account is in arrears, please recharge", "1113")),
         Stops("has no credit or quota for this key")),
    Form("Zhipu", "a parameter that it doesn't take",
         (400, {}, _error("Invalid seed parameter. Please check the documentation", "1214")), Stops(_SEED)),
    # transformers serve
    Form("transformers serve", "a parameter that it doesn't know",
         (422, {}, {"detail": "Unexpected fields in the request: {'seed'}"}), Stops(_SEED)),
    Form("transformers serve", "another model than its own",
         (400, {}, {"detail": "Server is pinned to 'x'; requested 'm'."}), Failed("refused by HTTP 400")),
    # DeepSeek
    Form("DeepSeek", "generation that broke off", [message("fi", "insufficient_system_resource"), OK], FINE, 2),
    Form("DeepSeek", "no credit", (402, {}, _error("Insufficient Balance", "invalid_request_error")),
         Stops("has no credit or quota for this key")),
    # gateways and proxies
    Form("gateways", "an error in an answer of status 200",
         [(200, {}, _error("Upstream error: ResourceExhausted", 502)), (200, {}, _error("", "503")), OK], FINE, 3),
    Form("gateways", "a refusal in an answer of status 200",
         (200, {}, _error("too long a prompt", 400)), Failed("too long")),
    Form("gateways", "no choices",
         [(200, {}, {"id": None, "choices": None}), (200, {}, {"choices": []}), OK], FINE, 3),
    Form("gateways", "another object", (200, {}, {"hello": 1}), Failed("no answer"), TRIES),
    Form("gateways", "a page", [(502, {}, _HTML), (200, {}, _HTML), OK], FINE, 3),
    Form("gateways", "a body cut, an empty one, a closed connection", [cut_body, (200, {}, b""), hang_up, OK], FINE, 4),
    Form("gateways", "blank lines before the answer", (200, {}, b"\n \n" + json.dumps(OK[2]).encode()), FINE),
    Form("gateways", "a moderated prompt", (403, {}, _error("Your input was flagged", 403)), Failed("content filter")),
    Form("gateways", "no right", (403, {}, _error("Project does not have access", "forbidden")),
         Stops("HTTP 403.*; set OPENAI_API_KEY to a key that may do this")),
    Form("gateways", "another address", (308, {"Location": "https://x/v1/chat/completions"}, b""),
         Stops("it is at https://x/v1/chat/completions: give that address as `base_url`")),
    Form("gateways", "an error of another kind", (400, {}, _error("Bad Request", None)), Failed("refused by HTTP 400")),
    Form("NVIDIA NIM", "parameters that it doesn't know, in lines",
         (422, {}, {"title": "Unprocessable Entity", "status": 422,
                    "detail": "body -> frequency_penalty\n  Extra inputs are not permitted (type=extra_forbidden)\n"
                              "body -> seed\n  Extra inputs are not permitted (type=extra_forbidden)"}),
         Stops("by `frequency_penalty`, `seed`: give --extra_body")),
]  # fmt: skip


class Faulty:
    """A server of `rows` prompts `Question i` with random delays and faults, for K completions each.

    Args:
        seed: of the delays and faults.
        faults: the share of the requests that get one.
        delay: seconds, at most, to an answer.
    """

    FAULTS = (
        (429, {"Retry-After": "0"}, b""), (503, {}, _error("Loading model", 503)), (500, {}, b"x"), (502, {}, _HTML),
        (200, {}, _HTML), (200, {}, _error("upstream", 502)), (200, {}, {"choices": None}), cut_body, hang_up,
        message("fi", "abort"),
    )  # fmt: skip

    def __init__(self, seed: int, faults: float = 0.04, delay: float = 0.02):
        self.random, self.faults, self.delay = Random(seed), faults, delay
        self.lock = threading.Lock()
        self.answered: Counter[int] = Counter()
        self.faulted, self.under_way, self.most = 0, 0, 0
        self.request_seconds, self.changed, self.began = 0.0, 0.0, math.inf

    @staticmethod
    def fate(row: int) -> str | None:
        """What becomes of a row whatever chance does: the cause of its failure, or of one of its completions."""
        fates = {97: "too long", 101: "content filter", 331: "no answer", 89: "cut before any text"}
        return next((cause for period, cause in fates.items() if row % period == 3), None)

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self.began = min(self.began, now)
        self.request_seconds += self.under_way * (now - self.changed)
        self.changed, self.under_way = now, self.under_way + change
        self.most = max(self.most, self.under_way)

    @property
    def mean_under_way(self) -> float:
        """Of requests, from the first one's beginning to the last one's end."""
        return self.request_seconds / (self.changed - self.began)

    def __call__(self, path: str, body: dict | None) -> Any:
        if body is None:  # of a client that was killed
            return hang_up
        row = int(body["messages"][0]["content"].split()[1])
        with self.lock:
            self._count(1)
            fault = self.random.choice(self.FAULTS) if self.random.random() < self.faults else None
            delay = self.random.random() * self.delay
            self.faulted += fault is not None
        time.sleep(delay)
        with self.lock:
            self._count(-1)
            fate = self.fate(row)
            if fault is None and fate in (None, "cut before any text"):
                self.answered[row] += 1
        if fault is not None:
            return fault
        if fate == "too long":
            return 400, {}, _error(_LENGTH_VLLM, param="max_tokens")
        if fate == "content filter":
            return 400, {}, _error("filtered", "content_filter")
        if fate == "no answer":
            return 500, {}, b"a bug on this prompt"
        choices = [
            {"message": {"content": f"{row} {body['seed']} {k}"}, "finish_reason": "stop"} for k in range(body["n"])
        ]
        if fate:
            choices[0] = {"message": {"reasoning": "Hm"}, "finish_reason": "length"}
        return 200, {}, {"choices": choices}


_JUNK = [
    None, True, 0, -1, 1e308, 10**30, "", "x", "\ud800", [], {}, [None], [[]], {"": None}, "200", "429", 503,
    "null", [{}] * 3, {"error": {}}, {"choices": None}, "stop", "seed", "context length", "retry",
]  # fmt: skip
_STATUSES = [200, 200, 200, 201, 204, 301, 307, 400, 401, 402, 403, 404, 408, 409, 413, 418, 422, 429, 451, 499, 500,
             501, 502, 503, 504, 520, 529, 599]  # fmt: skip


def mutated(node: Any, random: Random) -> Any:
    """`node` with another value in one or more places, of another type, missing or repeated."""
    if random.random() < 0.12:
        return random.choice(_JUNK)
    if isinstance(node, dict):
        made = {key: mutated(value, random) for key, value in node.items() if random.random() > 0.06}
        if random.random() < 0.05:
            made[random.choice(["error", "choices", "detail", "message", "code", "object"])] = random.choice(_JUNK)
        return made
    if isinstance(node, list):
        made = [mutated(item, random) for item in node if random.random() > 0.06]
        return made * random.choice([1, 1, 1, 1, 0, 2, 5])
    if isinstance(node, str) and random.random() < 0.2:
        return node[: random.randrange(len(node) + 1)] + random.choice(["", "\0", "\ud83d", "\u2028", "é" * 3])
    return node


def made_up(seed: int) -> tuple[int, dict[str, str], bytes]:
    """An answer near one of `FORMS`: fields, status, headers and bytes may be others."""
    random = Random(seed)
    form = random.choice(FORMS)
    reply = random.choice(form.reply) if isinstance(form.reply, list) else form.reply
    status, headers, content = OK if callable(reply) else reply
    if random.random() < 0.3:
        status = random.choice(_STATUSES)
    if random.random() < 0.3:
        said = ["0", "1.5", "-1", "1e999", "99999999999999", "soon", "Wed, 99 Foo", "Fri, 31 Dec 1999 23:59:59 GMT"]
        headers = headers | {"Retry-After": random.choice(said)}
    body = content if isinstance(content, bytes) else json.dumps(mutated(content, random)).encode()
    if random.random() < 0.1:
        body = body[: random.randrange(len(body) + 1)]
    if random.random() < 0.03:
        body = bytes(random.randrange(256) for _ in range(random.randrange(40)))
    if random.random() < 0.01:
        body = random.choice([b"[" * 100_000, b"9" * 5_000, b'"' + b"a" * 100_000 + b'"', b"\xff\xfe", b"NaN", b"{}"])
    return status, headers, body
