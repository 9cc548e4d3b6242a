"""Remote: against a real HTTP server on this machine that speaks each dialect, and fails in each way."""

import json
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tiny
import torch

from calibrated_rewards.models.http_client import Refused, parse_retry_after
from calibrated_rewards.models.labels import Difference, Label
from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.protocol import fingerprint
from calibrated_rewards.scorers.remote import Native, OpenRlhf, Remote
from calibrated_rewards.scorers.remote_vllm import Vllm, VllmScore, sort_rows, to_log_odds

CHAT = [{"role": "user", "content": "Hi"}]
QUICK = {"backoff": 0.001, "show_progress": False}


class Handler(BaseHTTPRequestHandler):
    """Answers a POST as the server's `answer` says, or fails as the next of its `failures` does."""

    def do_POST(self):
        """Reads the body, and keeps it."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body, time.monotonic()))
            failure = self.server.failures.pop(0) if self.server.failures else None
        (failure or succeed)(self, body)

    def reply(self, status, content, **headers):
        """A whole answer."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Nothing on the screen."""


class Quiet(ThreadingHTTPServer):
    """A server whose clients may hang up."""

    daemon_threads = True

    def handle_error(self, *_):
        """They do."""


def succeed(handler, body):
    handler.reply(200, handler.server.answer(body))


def status(code, content=b"busy", **headers):
    return lambda handler, body: handler.reply(code, content, **headers)


def reset(handler, _body):
    """Hangs up with a TCP reset, instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def slow(handler, body):
    time.sleep(0.5)
    succeed(handler, body)


@contextmanager
def serving(answer, *failures):
    """A server on a free port; it has .url and .seen."""
    server = Quiet(("127.0.0.1", 0), Handler)
    server.answer, server.failures, server.seen = answer, list(failures), []
    server.lock = threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def bodies(server):
    return [body for _, _, body, _ in server.seen]


def canonical(body):
    return json.dumps(body, sort_keys=True)


def native(body):
    """Scores that say which pair they are of: the completion is a number."""
    return {"raw": [float(c) for c in body["completions"]]}


def numbered(n):
    return ["p"] * n, [str(i) for i in range(n)]


def test_scores_come_in_the_order_of_the_pairs() -> None:
    """Whatever is answered first: a slow first batch, a number of pairs that is no multiple, several in flight."""
    with serving(native, slow) as server:
        scores = Remote(server.url, Native("rm"), batch_size=3, concurrency=4, **QUICK)(*numbered(32))

    assert scores.dtype == np.float32
    assert scores.tolist() == list(range(32))
    assert sorted(len(body["prompts"]) for body in bodies(server)) == [2] + [3] * 10
    assert {path for path, *_ in server.seen} == {"/score"}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_in_flight_as_asked_for(concurrency) -> None:
    """Never more, and as many where there is enough to do."""
    thinking, at_once = [], []

    def lingering(body):
        thinking.append(body)
        at_once.append(len(thinking))
        time.sleep(0.05)
        thinking.remove(body)
        return native(body)

    with serving(lingering) as server:
        Remote(server.url, Native("rm"), batch_size=1, concurrency=concurrency, **QUICK)(*numbered(9))

    assert max(at_once) == concurrency


@pytest.mark.parametrize(
    "failure", [status(503), status(500), status(429), status(408), reset], ids=["503", "500", "429", "408", "reset"]
)
def test_what_may_pass_is_tried_again(failure) -> None:
    """Twice the failure, then the scores; every pair once, in order."""
    with serving(native, failure, failure) as server:
        scores = Remote(server.url, Native("rm"), batch_size=2, retries=2, concurrency=1, **QUICK)(*numbered(4))

    assert scores.tolist() == [0, 1, 2, 3]
    assert len(server.seen) == 4


def test_an_answer_that_takes_too_long_is_asked_for_again() -> None:
    """The timeout is one of the things that may pass."""
    with serving(native, slow) as server:
        assert Remote(server.url, Native("rm"), timeout=0.1, **QUICK)(*numbered(2)).tolist() == [0, 1]

    assert len(server.seen) == 2


def test_retry_after_is_honoured() -> None:
    """A server that asks for a second is left alone for a second, however short the backoff."""
    with serving(native, status(503, Retry_After="1")) as server:
        Remote(server.url, Native("rm"), **QUICK)(*numbered(1))

    first, second = (at for *_, at in server.seen)
    assert 1.0 <= second - first < 5.0


def test_the_pause_doubles() -> None:
    """Between half and all of backoff * 2^k, for the k-th time."""
    with serving(native, *[status(503)] * 4) as server:
        Remote(server.url, Native("rm"), backoff=0.04, show_progress=False)(*numbered(1))

    pauses = np.diff([at for *_, at in server.seen])
    assert (pauses >= 0.5 * 0.04 * 2.0 ** np.arange(4)).all()
    assert pauses[3] > pauses[0]


def test_a_date_may_be_asked_for_too() -> None:
    """Retry-After as HTTP writes dates; the past, the far future and nonsense are bounded."""
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 10))

    assert 8 <= parse_retry_after(soon) <= 10
    assert [parse_retry_after(said) for said in ("Wed, 21 Oct 2015 07:28:00 GMT", "later", "-3", "86400")] == [
        0,
        0,
        0,
        60,
    ]


@pytest.mark.parametrize(("failure", "shown"), [(status(503, b"it is full"), "it is full"), (reset, "Error")])
def test_patience_ends(failure, shown) -> None:
    """After `retries` more tries it is an error that names the address, the number of tries and the last trouble."""
    with serving(native, *[failure] * 9) as server, pytest.raises(ConnectionError) as caught:
        Remote(server.url, Native("rm"), retries=2, **QUICK)(*numbered(1))

    assert len(server.seen) == 3
    assert f"{server.url}/score gave no answer in 3 tries" in str(caught.value)
    assert shown in str(caught.value)


def test_nobody_listens() -> None:
    """A port that is closed is a connection error, after the retries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="2 tries"):
        Remote(url, Native("rm"), retries=1, **QUICK)(*numbered(1))


def test_a_refusal_is_final() -> None:
    """A 4xx is not tried again; the error has the status, the address and the start of a long body."""
    refusal = status(400, b"max_model_len is 4096" + b"." * 10_000)
    with serving(native, refusal) as server, pytest.raises(ValueError, match="refuses") as caught:
        Remote(server.url, Native("rm"), **QUICK)(*numbered(1))

    assert len(server.seen) == 1
    assert all(part in str(caught.value) for part in (server.url, "status 400", "max_model_len is 4096"))
    assert len(str(caught.value)) < 600


def test_after_an_error_the_rest_is_not_asked_for() -> None:
    """The first refusal ends the call: not one request for each of a hundred batches, no pause to the end."""
    with serving(native, status(400), *[status(503)] * 500) as server:
        started = time.monotonic()
        with pytest.raises(ValueError, match="refuses"):
            Remote(server.url, Native("rm"), batch_size=1, concurrency=2, backoff=30.0)(*numbered(100))

    assert time.monotonic() - started < 5
    assert len(server.seen) < 10


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ({"raw": [1.0]}, "a finite number for each of 2"),
        ({"raw": [1.0, 2.0, 3.0]}, "a finite number for each of 2"),
        ({"raw": [1.0, float("nan")]}, "a finite number for each of 2"),
        ({"raw": [1.0, None]}, "no scores to read"),
        ({"scores": [1.0, 2.0]}, "no scores to read, KeyError"),
        ([], "no scores to read"),
        (b"<html>", "no scores to read"),
    ],
)  # fmt: skip
def test_answers_without_scores(answer, rule) -> None:
    """Too few, too many, none, nan, or no JSON: an error that shows the answer's start, and no second try."""
    with serving(native, status(200, answer)) as server, pytest.raises(ValueError, match=rule) as caught:
        Remote(server.url, Native("rm"), **QUICK)(*numbered(2))

    assert len(server.seen) == 1
    assert server.url in str(caught.value)


def test_the_token_is_sent_and_not_shown() -> None:
    """As a bearer token; in no repr, no fingerprint."""
    with serving(native) as server:
        remote = Remote(server.url, Native("rm"), token="s3cret", **QUICK)
        remote(*numbered(1))

    assert server.seen[0][1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(remote) + json.dumps(fingerprint(remote))


def test_the_address() -> None:
    """A bare host gets the dialect's path, with or without a slash; any other address stands as it is."""
    for given, posted in {
        "http://rm:8000": "http://rm:8000/classify",
        "http://rm:8000/": "http://rm:8000/classify",
        "https://rm/v1/rm": "https://rm/v1/rm",
        "http://rm/?key=1": "http://rm/classify?key=1",
    }.items():
        assert Remote(given, Vllm("rm")).address == posted


@pytest.mark.parametrize(
    "options",
    [{"url": "rm:8000"}, {"url": "http://"}, {"batch_size": 0}, {"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}],
    ids=str,
)
def test_settings_that_make_no_sense(options) -> None:
    """Refused when they are made, not when they are used."""
    with pytest.raises(ValueError, match=next(iter(options))):
        Remote(**{"url": "http://rm", "dialect": Native("rm"), **options})


def test_it_travels_and_is_known_again() -> None:
    """It pickles, after use too; the same model elsewhere is the same scorer, another model is not."""
    with serving(native) as server:
        remote = Remote(server.url, Native("rm"), **QUICK)
        remote(*numbered(1))
        copy = pickle.loads(pickle.dumps(remote))
        assert copy == remote
        assert copy(*numbered(3)).tolist() == [0, 1, 2]

    assert fingerprint(remote) == fingerprint(Remote("http://elsewhere", Native("rm")))
    assert fingerprint(remote) != fingerprint(Remote(server.url, Native("other")))


@pytest.mark.parametrize("ending", ["error", "interrupt"])
def test_nobody_waits_for_what_is_in_flight(ending) -> None:
    """After a refusal, or Ctrl-C, the call ends at once, and so does Python, while another request hangs for 20 s."""
    code = """
import os, signal, sys, threading, time
from calibrated_rewards.scorers.remote import Remote
from calibrated_rewards.scorers.remote import Native
start = time.monotonic()
try:
    if sys.argv[2] == "interrupt":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    Remote(sys.argv[1], Native("rm"), batch_size=1, concurrency=2, show_progress=False)(["p", "q"], ["1", "2"])
except (ValueError, KeyboardInterrupt) as error:
    print(type(error).__name__, time.monotonic() - start < 5)
"""

    def hang(_handler, _body):
        over.wait(20)

    over, started = threading.Event(), time.monotonic()
    failures = [hang, status(400) if ending == "error" else hang]
    with serving(native, *failures) as server:
        command = [sys.executable, "-c", code, server.url, ending]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        over.set()

    assert done.stdout.split() == [{"error": "Refused", "interrupt": "KeyboardInterrupt"}[ending], "True"]
    assert done.stderr == ""
    assert time.monotonic() - started < 15


def test_a_redirect_shows_where_it_leads() -> None:
    """It is not followed with the token, but named, less its secrets."""
    moved = status(307, Location="http://other:pass1@elsewhere/score?key=hidden")
    with serving(native, moved) as server, pytest.raises(Refused, match="http://elsewhere/score,") as caught:
        Remote(server.url, Native("rm"), **QUICK)(*numbered(1))

    assert "hidden" not in str(caught.value)
    assert len(server.seen) == 1


def test_an_answer_that_cannot_be_decoded() -> None:
    """It says gzip and is none: an error that names the address, and no second try."""
    broken = status(200, b"no gzip", Content_Encoding="gzip")
    with serving(native, broken) as server, pytest.raises(ConnectionError, match="/score cannot be asked, DecodingEr"):
        Remote(server.url, Native("rm"), **QUICK)(*numbered(1))

    assert len(server.seen) == 1


def test_tls_to_a_server_without_is_not_tried_again() -> None:
    """It will not be otherwise in a minute; with a backoff of 60 s it would take long."""
    started = time.monotonic()
    with serving(native) as server, pytest.raises(ConnectionError, match="cannot be asked"):
        Remote(server.url.replace("http", "https"), Native("rm"), backoff=60.0)(*numbered(1))

    assert time.monotonic() - started < 15


@pytest.mark.parametrize("user", ["", "me:pass1234@"])
@pytest.mark.parametrize("code", [400, 503, 200])
def test_secrets_that_a_server_quotes_are_not_shown(code, user) -> None:
    """A server that tells all that it was sent: no error has the token, the password, the query."""

    def quoting(handler, _body):
        said = f"{handler.path} {handler.headers['Authorization']}" + " pass1234" * bool(user)
        handler.reply(code, said.encode())

    with serving(native, quoting) as server:
        url = server.url.replace("//", f"//{user}") + "/?key=query789"
        remote = Remote(url, Native("rm"), token=None if user else "s3cret", retries=0, **QUICK)
        with pytest.raises((ValueError, ConnectionError)) as caught:
            remote(*numbered(1))

    shown = str(caught.value) + repr(remote) + json.dumps(remote.fingerprint())
    assert "[secret]" in shown
    assert [secret for secret in ("s3cret", "query789", "bWU6cGFzczEyMzQ=", "pass1234") if secret in shown] == []


@pytest.mark.parametrize("token", ["", "a\n", "a b", "caf\u00e9", "\x00"])
def test_tokens_that_no_header_takes(token) -> None:
    """Refused when the scorer is made, and not shown."""
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Remote("http://rm", Native("rm"), token=token)

    assert not token or token not in str(caught.value)


def test_one_way_to_say_who_asks() -> None:
    """The user of the url would be sent in place of the token."""
    with pytest.raises(ValueError, match="got both"):
        Remote("http://me:password@rm", Native("rm"), token="abc")


@pytest.mark.parametrize("url", ["http://rm:port", "http://[::1", "http://:80"])
def test_urls_that_are_none(url) -> None:
    """Refused when the scorer is made."""
    with pytest.raises(ValueError, match="needs an url"):
        Remote(url, Native("rm"))


def test_settings_of_another_type() -> None:
    """What is no number, or no whole one, is refused by name, also where nobody checks types."""
    code = """
from calibrated_rewards.scorers.remote import Remote
from calibrated_rewards.scorers.remote import Native
for name, value in dict(timeout="5", backoff=None, retries=1.5, batch_size=True, concurrency="8").items():
    try: Remote("http://rm", Native("rm"), **{name: value})
    except ValueError as error: print(f"{name}={value!r}" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["True"] * 5


def test_lists_are_lists() -> None:
    """Called by name; texts in the place of lists, and lists of two lengths, are refused before anything is asked."""
    with serving(native) as server:
        remote = Remote(server.url, Native("rm"), **QUICK)
        assert remote(prompts=["p"], completions=["3"]).tolist() == [3.0]
        with pytest.raises(ValueError, match="got 1 prompts and 2"):
            remote(["p"], ["1", "2"])

    assert len(server.seen) == 1
    assert len({remote, Remote(server.url, Native("rm"), **QUICK)}) == 1


@pytest.mark.parametrize("raw", ["12", {"1": 0, "2": 0}, ["1", "2"], [True, False], [[1.0, 2.0], [3.0, 4.0]]], ids=str)
@pytest.mark.parametrize(("dialect", "name"), [(Native("rm"), "raw"), (OpenRlhf("rm"), "rewards")])
def test_only_numbers_are_scores(raw, dialect, name) -> None:
    """What could be read as numbers, letter by letter, is none."""
    with serving(lambda _: {name: raw}) as server, pytest.raises(ValueError, match="a list of numbers"):
        Remote(server.url, dialect, **QUICK)(*numbered(2))


@pytest.mark.parametrize("row", [["1", "2"], [True, False], [[[1.0]]], [], 1.0, None], ids=str)
def test_only_rows_of_numbers_are_labels(row) -> None:
    """In vLLM's answers too."""
    with pytest.raises(ValueError, match="rows of numbers"):
        Vllm("rm", labels=Label(0)).scores({"data": [{"index": 0, "probs": row}]}, 1)


def test_nothing_is_not_asked_for() -> None:
    """No pairs, no request."""
    with serving(native) as server:
        scores = Remote(server.url, Native("rm"), **QUICK)([], [])

    assert scores.shape == (0,)
    assert scores.dtype == np.float32
    assert server.seen == []


def test_native_sends_what_it_is_given() -> None:
    """Texts as they are, half an emoji too; messages as plain JSON, whatever they were."""
    prompts = ["p\ud83d", np.array(CHAT, dtype=object), ({"role": "user", "content": "Hi", "name": None},)]
    completions = ["a", [{"role": "assistant", "content": "Yes"}], "b"]
    with serving(lambda body: {"raw": [0.0] * len(body["prompts"])}) as server:
        Remote(server.url, Native("rm"), **QUICK)(prompts, completions)

    assert bodies(server) == [{"prompts": ["p\ud83d", CHAT, CHAT], "completions": completions}]


def vllm_server(model, *, activation=False, pooling=False, shuffle=False):
    """What vLLM does with token ids: the model's own forward, row by row; rows come back in any order."""

    def answer(body):
        rows = []
        for index, ids in enumerate(body["input"]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0]
            if activation or body.get("use_activation", True):
                logits = logits.sigmoid() if len(logits) == 1 else logits.softmax(-1)
            numbers = logits.tolist()
            named = {"data": numbers} if pooling else {"probs": numbers, "label": None, "num_classes": len(numbers)}
            rows.append({"index": index, **named})
        return {"model": body["model"], "data": rows[::-1] if shuffle else rows}

    return answer


def test_vllm_names_its_labels() -> None:
    """A server whose first label is the good one is not read backwards; what is said of them counts."""
    for name, probs in (("unsafe", [0.5, 2.0]), ("SAFE", [2.0, 0.5]), ("not helpful", [0.0, 1.0])):
        answer = {"data": [{"index": 0, "label": name, "probs": probs}]}
        with pytest.raises(ValueError, match=rf"calls label \d '{name}'.*labels=Difference\(good=0, bad=1\)"):
            Vllm("rm").scores(answer, 1)
        assert Vllm("rm", labels=Difference(good=0, bad=1)).scores(answer, 1) == [probs[0] - probs[1]]
    for name in ("LABEL_1", "safe", "something else", None):
        assert Vllm("rm").scores({"data": [{"index": 0, "label": name, "probs": [0.5, 2.0]}]}, 1) == [1.5]


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("how", ["classify", "pooling", "probabilities"])
def test_vllm_gives_the_score_of_the_same_checkpoint_here(how, labels) -> None:
    """Token ids are sent, so template, special tokens and truncation are the same; log-odds bring back the logits."""
    model, tokenizer = tiny.classifier(num_labels=labels), tiny.tokenizer()
    with torch.no_grad():
        model.score.weight *= 0.3  # probabilities that float32 tells from 0 and 1
    text = Text(max_length=48, append_eos=True)
    prompts = [*tiny.texts(6, 1), *[[{"role": "user", "content": t}] for t in tiny.texts(6, 2)]]
    completions = tiny.texts(12, 3)
    with pytest.warns(TruncationWarning):
        here = SequenceClassifier(model, tokenizer, text=text, show_progress=False)(prompts, completions)

    server = vllm_server(model, activation=how == "probabilities", pooling=how == "pooling", shuffle=True)
    dialect = Vllm(
        "rm",
        tokenizer,
        text,
        probabilities=how == "probabilities",
        path="/pooling" if how == "pooling" else "/classify",
    )
    with serving(server) as at, pytest.warns(TruncationWarning, match="of 12 inputs"):
        there = Remote(at.url, dialect, batch_size=5, **QUICK)(prompts, completions)

    assert here.std() > 0.1
    assert there == pytest.approx(here, rel=0, abs=1e-4 * float(here.std()))
    assert {path for path, *_ in at.seen} == {dialect.path}
    assert max(len(ids) for body in bodies(at) for ids in body["input"]) == 48


def test_vllm_without_a_tokenizer() -> None:
    """Texts are joined and sent together; a chat is a request of its own, the completion its last message."""

    def answer(body):
        said = [body["messages"][-1]["content"]] if "messages" in body else body["input"]
        return {"data": [{"index": i, "probs": [float(text[-1])]} for i, text in enumerate(said)]}

    prompts = ["one", CHAT, "two", CHAT]
    completions = [" 1<e>", "2<e>", " 3", [{"role": "assistant", "content": "4"}]]
    with serving(answer) as server:
        dialect = Vllm("rm", text=Text(strip=("<e>",)), options={"priority": 7})
        scores = Remote(server.url, dialect, **QUICK)(prompts, completions)

    assert scores.tolist() == [1, 2, 3, 4]
    common = {"model": "rm", "use_activation": False, "priority": 7}
    expected = [
        {**common, "input": ["one 1", "two 3"]},
        *({**common, "messages": [*CHAT, {"role": "assistant", "content": c}]} for c in "24"),
    ]
    assert sorted(bodies(server), key=canonical) == sorted(expected, key=canonical)


def test_vllm_steps() -> None:
    """An answer for each token or step: its labels first, then the last of them, the least, or the mean."""
    steps = [[0.0, 3.0], [0.0, -1.0], [1.0, 3.0]]
    for name, expected in {"last": 2.0, "min": -1.0, "mean": 4 / 3}.items():
        dialect = Vllm("prm", path="/pooling", steps=name)
        assert dialect.scores({"data": [{"index": 0, "data": steps}]}, 1) == pytest.approx([expected])


def test_vllm_labels() -> None:
    """Three labels have no order of their own; with one named, it is that one's logit."""
    answer = {"data": [{"index": 0, "probs": [1.0, 5.0, 3.0]}]}

    assert Vllm("rm", labels=Label(1)).scores(answer, 1) == [5.0]
    with pytest.raises(ValueError, match="the model has 3 labels"):
        Vllm("rm").scores(answer, 1)


def test_probabilities_are_noticed() -> None:
    """Several labels that always sum to one are no logits: the server did not understand."""
    model, tokenizer = tiny.classifier(num_labels=2), tiny.tokenizer()
    with serving(vllm_server(model, activation=True)) as server, pytest.raises(ValueError, match="probabilities=True"):
        Remote(server.url, Vllm("rm", tokenizer), **QUICK)(tiny.texts(8), tiny.texts(8))


@pytest.mark.parametrize("prompts", [["p"] * 8, [CHAT] * 8], ids=["text", "chats"])
def test_probabilities_are_noticed_in_small_requests(prompts) -> None:
    """One input a request, as chats are sent: it is the call that is judged, and one row of logits acquits it."""
    completions = [f"c{i}" for i in range(8)]
    logits = {"c0": [2.0, -1.0]}  # by what is asked, not by how often: a busy machine makes second tries

    def answer(body):
        return {"data": [{"index": 0, "probs": next((p for c, p in odd.items() if c in str(body)), [0.25, 0.75])}]}

    for odd in ({}, logits):
        with serving(answer) as server:
            remote = Remote(server.url, Vllm("rm"), batch_size=1, concurrency=1, **QUICK)
            if odd:
                assert len(remote(prompts, completions)) == 8
            else:
                with pytest.raises(ValueError, match="probabilities=True"):
                    remote(prompts, completions)


def test_log_odds() -> None:
    """The inverse of sigmoid, and of softmax up to a constant; certainty is far out and finite; logits are refused."""
    logits = np.array([[-3.0, 0.5, 2.0], [9.0, -9.0, 0.0]])
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    assert to_log_odds(1 / (1 + np.exp(-logits[:, :1]))) == pytest.approx(logits[:, :1])
    assert np.ptp(to_log_odds(softmax) - logits, axis=1) == pytest.approx(0, abs=1e-9)
    ends = to_log_odds(np.array([[0.0], [1.0]]))[:, 0]
    assert np.isfinite(ends).all()
    assert ends[0] < -80
    assert ends[1] > 16
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        to_log_odds(logits)


@pytest.mark.parametrize("indices", [[0], [0, 0], [0, 2], [0, 1, 1]])
def test_every_input_has_one_row(indices) -> None:
    """Missing, twice, or of an input that there is not."""
    with pytest.raises(ValueError, match="one row for each of 2"):
        sort_rows([{"index": i} for i in indices], 2)


def test_vllm_score() -> None:
    """Pairs of texts, a single message as its text; scores by index, or their log-odds."""

    def answer(body):
        pairs = zip(body["text_1"], body["text_2"], strict=True)
        return {"data": [{"index": i, "score": len(a) / (len(a) + len(b))} for i, (a, b) in enumerate(pairs)][::-1]}

    prompts, completions = ["abc", CHAT], ["x", "wxyz"]
    with serving(answer) as server:
        scores = Remote(server.url, VllmScore("ce"), **QUICK)(prompts, completions)
        odds = Remote(server.url, VllmScore("ce", probabilities=True), **QUICK)(prompts, completions)
        with pytest.raises(ValueError, match="compares two texts"):
            Remote(server.url, VllmScore("ce"), **QUICK)([CHAT * 2], ["x"])

    assert bodies(server)[0]["text_1"] == ["abc", "Hi"]
    assert scores == pytest.approx([3 / 4, 2 / 6])
    assert odds == pytest.approx(np.log([3, 2 / 4]))


@pytest.mark.parametrize("nested", [False, True])
def test_openrlhf(nested) -> None:
    """Whole texts and prompts, rendered here; rewards as numbers, or as lists of one."""

    def answer(body):
        rewards = [float(len(query)) for query in body["query"]]
        return {"rewards": [[r] for r in rewards] if nested else rewards}

    tokenizer, prompts, completions = tiny.tokenizer(), ["p", CHAT], [" c", "Yes"]
    with serving(answer) as server:
        scores = Remote(server.url, OpenRlhf("rm", tokenizer), **QUICK)(prompts, completions)

    whole = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "Yes"}], tokenize=False)
    opened = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert bodies(server) == [{"query": ["p c", whole], "prompts": ["p", opened], "labels": ["", ""]}]
    assert scores.tolist() == [3, len(whole)]
    assert server.seen[0][0] == "/get_reward"


def test_what_needs_a_tokenizer_says_so() -> None:
    """A chat as text, and settings that count or add tokens."""
    with pytest.raises(ValueError, match="tokenizer="):
        OpenRlhf("rm").inputs([CHAT], ["c"])
    for dialect in (Vllm, OpenRlhf):
        with pytest.raises(ValueError, match="give tokenizer="):
            dialect("rm", text=Text(max_length=8))


def test_fingerprints_tell_dialects_apart() -> None:
    """Every setting that can change a score shows; all of them are JSON."""
    dialects = [
        Vllm("rm"), Vllm("rm", path="/pooling"), Vllm("rm", tiny.tokenizer()), Vllm("rm", tiny.tokenizer(bos=False)),
        Vllm("rm", tiny.tokenizer(), Text(append_eos=True)), Vllm("rm", labels=Label(0)), Vllm("rm", steps="min"),
        Vllm("rm", probabilities=True), Vllm("rm", options={"task": "classify"}), VllmScore("rm"),
        VllmScore("rm", probabilities=True), OpenRlhf("rm"), OpenRlhf("rm", tiny.tokenizer()), Native("rm"),
    ]  # fmt: skip
    said = Counter(json.dumps(fingerprint(Remote("http://rm", dialect))) for dialect in dialects)

    assert set(said.values()) == {1}


def test_without_httpx() -> None:
    """The error says what to install."""
    code = "import sys; sys.modules['httpx'] = None; import calibrated_rewards.scorers.remote"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert "pip install 'calibrated-rewards[http]'" in found.stderr
