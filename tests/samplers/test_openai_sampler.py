"""OpenAISampler: against a real HTTP server on this machine that speaks OpenAI's API, and fails in each way.

benchmarks/vllm_sampler.py asks a real `vllm serve`.
"""

import json
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import tiny

from calibrated_rewards.models.http_client import Refused, RequestThreads
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers import openai
from calibrated_rewards.samplers.openai import FINISHES, OpenAISampler
from calibrated_rewards.samplers.protocol import Decoding, Particular, Rendering, Rollout, Sampler, sample
from calibrated_rewards.scorers.protocol import Fingerprinted

CHAT = [{"role": "user", "content": "Hi"}]
PLAIN = Decoding(max_tokens=8)
BENT = Decoding(max_tokens=8, temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, repetition_penalty=1.2, stop=("Z",))
QUICK: dict[str, Any] = {"backoff": 0.001, "show_progress": False}
SECRET = "sk-very-secret-0123"


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's `answer` says, or fails as the next of its `failures` does; GET lists `models`."""

    def do_GET(self):
        """The list of models, or what a server without one says."""
        self.reply(*self.server.listing)

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
    return lambda handler, _: handler.reply(code, content, **headers)


def reset(handler, _):
    """Hangs up with a TCP reset, instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def half(handler, _):
    """Promises more than it sends."""
    handler.reply(200, b'{"choi', Content_Length="100")
    handler.connection.close()


def slow(handler, body):
    time.sleep(0.3)
    succeed(handler, body)


@contextmanager
def serving(answer: Any, *failures: Any, listing: Any = (404, b"none")) -> Iterator[Any]:
    """A server on a free port; it has .url and .seen."""
    server: Any = Quiet(("127.0.0.1", 0), Handler)
    server.answer, server.failures, server.seen, server.listing = answer, list(failures), [], listing
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


def models(**said):
    """As /v1/models answers."""
    return 200, {"object": "list", "data": [{"id": "other", "owned_by": "vllm"}, {"id": "m", **said}]}


def text_for(asked, seed):
    """What the server writes: it depends on the prompt and the seed."""
    return f"{json.dumps(asked)} {seed}"


def completions(body):
    """As /v1/completions answers, in an order of its own."""
    choices = [
        {"index": i, "text": text_for(body["prompt"], body["seed"] + i), "finish_reason": "length", "logprobs": None}
        for i in range(body["n"])
    ]
    if "logprobs" in body:
        for choice in choices:
            choice["logprobs"] = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.25], "text_offset": [0, 1]}
    used = {"prompt_tokens": 3, "completion_tokens": 8 * body["n"], "total_tokens": 3 + 8 * body["n"]}
    return {"id": "c", "object": "text_completion", "model": body["model"], "choices": choices[::-1], "usage": used}


def chats(body):
    """As /v1/chat/completions answers."""
    choices = [
        {
            "index": i,
            "message": {
                "role": "assistant",
                "content": text_for(body["messages"], body["seed"] + i),
                "tool_calls": None,
            },
            "finish_reason": "stop",
        }
        for i in range(body["n"])
    ]
    if body.get("logprobs") is True:
        for choice in choices:
            choice["logprobs"] = {"content": [{"token": "a", "logprob": -2.0}, {"token": "b", "logprob": -1.0}]}
    return {"id": "c", "object": "chat.completion", "model": body["model"], "choices": choices}


def changed(**fields):
    """An answer to completions with other fields in its first choice."""

    def answer(body):
        given = completions(body)
        given["choices"][0] |= fields
        return given

    return answer


def said(**message):
    """An answer to a chat with this message."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return lambda body: {"choices": [choice | {"index": i} for i in range(body["n"])]}


def test_each_prompt_gets_its_rollouts():
    """Ragged seeds, a slow first request, several in flight: all come back to their prompts, in order."""
    with serving(completions, slow) as server:
        sampler = OpenAISampler(server.url, "m", PLAIN, concurrency=3, **QUICK)
        found = sample(sampler, ["a", "b", "c", "d"], [[5, 6], [], [2**40 + 7], [1, 1]])

    texts = [[text_for("a", 5), text_for("a", 6)], [], [text_for("c", 7)], [text_for("d", 1), text_for("d", 2)]]
    assert [[r.completion for r in rs] for rs in found] == texts
    assert {path for path, *_ in server.seen} == {"/v1/completions"}
    assert sorted(body["n"] for body in bodies(server)) == [1, 2, 2]
    assert found[2] == [Rollout(text_for("c", 7), 8, "length", None)]
    assert found[0][0].tokens is None  # the server counts those of a request


def test_more_than_a_request_may_ask_for():
    """Several requests for one prompt, each with the seed of its first rollout; one each keeps every seed."""
    own = [[10, 20, 30, 40, 50]]
    with serving(completions) as server:
        pairs = OpenAISampler(server.url, "m", PLAIN, most_at_once=2, **QUICK)(["a"], own)
        single = OpenAISampler(server.url, "m", PLAIN, most_at_once=1, **QUICK)(["a"], own)

    assert [r.completion for r in pairs[0]] == [text_for("a", seed) for seed in (10, 11, 30, 31, 50)]
    assert [r.completion for r in single[0]] == [text_for("a", seed) for seed in own[0]]


@pytest.mark.parametrize(
    ("api", "answer", "logprob", "raw_and_bent"),
    [("completions", completions, -0.75, None), ("chat", chats, -3.0, None)],
)
def test_log_probabilities_and_tokens(api, answer, logprob, raw_and_bent):
    """Asked for, each rollout has its own count; the model's own log-probability is not that of a bent decoding."""
    with serving(answer) as server:
        for decoding, told, expected in [
            (PLAIN, "raw", logprob), (BENT, "raw", raw_and_bent), (BENT, "processed", logprob), (PLAIN, None, None)
        ]:  # fmt: skip
            sampler = OpenAISampler(server.url, "m", decoding, api, logprobs=told, **QUICK)
            for rollout in sampler(["a"], [[1, 2]])[0]:
                assert rollout[1::2] == (2 if told else None, expected)

    asked = [body.get("logprobs") for body in bodies(server)]
    assert asked == [0 if api == "completions" else True] * 3 + [None]


def test_tokens_are_those_of_a_trainer():
    """With a tokenizer here: rendered, special tokens once; without, text as it is."""
    tokenizer = tiny.tokenizer()
    with serving(completions) as server:
        sampler = OpenAISampler(server.url, "m", PLAIN, tokenizer=tokenizer, **QUICK)
        sampler(["ab", CHAT], [[1], [1]])
        OpenAISampler(server.url, "m", PLAIN, **QUICK)(["ab"], [[2]])

    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    sent = {json.dumps(body["prompt"]) for body in bodies(server)}
    assert sent == {json.dumps(each) for each in (tokenizer(text="ab")["input_ids"], chat, "ab")}
    assert sampler.rendered(CHAT) == "<s><|user|>Hi<|end|><|assistant|>"


def test_chats_are_sent_as_messages():
    """A text is a user's; None-valued keys that Arrow adds are gone; what else a request needs is `extra`."""
    prompts = [[{"role": "user", "content": "Hi", "name": None}], "Hi"]
    with serving(chats) as server:
        extra = {"max_completion_tokens": 8, "max_tokens": None}
        found = OpenAISampler(server.url, "m", BENT, "chat", extra=extra, **QUICK)(prompts, [[1, 2], [1]])

    texts = [text_for(CHAT, 1), text_for(CHAT, 2)]
    assert [[r[::2] for r in rs] for rs in found] == [[(text, "stop") for text in texts], [(texts[0], "stop")]]
    common = {"model": "m", "messages": CHAT, "seed": 1, "temperature": 0.7, "top_p": 0.9, "max_completion_tokens": 8}
    bent = {**common, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "stop": ["Z"]}
    assert sorted(bodies(server), key=lambda body: body["n"]) == [bent | {"n": 1}, bent | {"n": 2}]
    assert {path for path, *_ in server.seen} == {"/v1/chat/completions"}


def test_what_is_off_is_said_only_to_servers_with_defaults():
    """OpenAI refuses what it does not know; vLLM would take the model's generation config's in its place."""
    usual = {"model": "m", "prompt": "a", "max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "n": 1, "seed": 1}
    off = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    silent = [(404, b"none"), (501, b"none"), (200, b"<html>"), (200, {"data": [None]}), (200, [])]
    others = [models(owned_by="openai"), models()]
    for listing, expected in [
        *((each, usual) for each in [*silent, *others]),
        *((models(owned_by=owner), usual | off) for owner in ("vllm", "sglang")),
    ]:
        with serving(completions, listing=listing) as server:
            OpenAISampler(server.url, "m", PLAIN, **QUICK)(["a"], [[1]])
        assert bodies(server) == [expected]


def test_a_call_of_a_tool_is_a_message():
    """Its content may be nothing."""
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    with serving(said(content=None, tool_calls=calls)) as server:
        [[rollout]] = OpenAISampler(server.url, "m", PLAIN, "chat", **QUICK)([CHAT], [[1]])

    assert rollout.completion == [{"role": "assistant", "content": "", "tool_calls": calls}]


def test_an_empty_completion_is_one():
    """A policy may end at once."""
    with serving(changed(text="", finish_reason="stop")) as server:
        [[rollout]] = OpenAISampler(server.url, "m", PLAIN, **QUICK)(["a"], [[1]])

    assert rollout[:3] == ("", 8, "stop")


def test_what_servers_call_an_end():
    """Each of the names is one of ours."""
    for reason, finish in FINISHES.items():
        with serving(changed(finish_reason=reason)) as server:
            assert OpenAISampler(server.url, "m", PLAIN, **QUICK)(["a"], [[1]])[0][0].finish == finish


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (changed(finish_reason="content_filter"), "of 'a prompt' is not whole: it ended by 'content_filter'"),
        (changed(finish_reason="abort"), "'abort'"),
        (changed(text=None), "a completion is a text, got None"),
        (changed(index=5), "2 choices, where n=2"),
        (lambda body: {"choices": completions(body)["choices"][:1]}, "1 choices, where n=2 .* most_at_once=1"),
        (lambda _: {"choices": []}, "0 choices"),
        (lambda _: {"error": {"message": "overloaded"}}, "KeyError.*overloaded"),
        (lambda _: [], "TypeError"),
        (lambda _: b"<html>", "<html>"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_used(answer, message):
    """Filtered, aborted, no text, other counts, no answer at all: an error that names the prompt and what was said."""
    with serving(answer) as server, pytest.raises(ValueError, match=message) as caught:
        OpenAISampler(server.url, "m", PLAIN, **QUICK)(["a prompt"], [[1, 2]])

    assert "gave no completions of 'a prompt'" in str(caught.value)


def test_reasoning_that_is_split_off_is_refused():
    """A trainer's completions have it."""
    for name in ("reasoning", "reasoning_content"):
        with serving(said(content="4", **{name: "2+2"})) as server, pytest.raises(ValueError, match="reasoning parser"):
            OpenAISampler(server.url, "m", PLAIN, "chat", **QUICK)([CHAT], [[1]])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_in_flight_as_asked_for(concurrency):
    """Never more, and as many where there is enough to do."""
    thinking, at_once = [], []

    def lingering(body):
        thinking.append(body)
        at_once.append(len(thinking))
        time.sleep(0.05)
        thinking.remove(body)
        return completions(body)

    with serving(lingering) as server:
        OpenAISampler(server.url, "m", PLAIN, concurrency=concurrency, **QUICK)(list("abcdefghi"), [[1]] * 9)

    assert max(at_once) == concurrency


def test_log_probabilities_that_do_not_come():
    """A server that ignores the wish is told of, not counted as no tokens."""
    with serving(changed(logprobs=None)) as server, pytest.raises(ValueError, match="KeyError"):
        OpenAISampler(server.url, "m", PLAIN, logprobs="raw", **QUICK)(["a"], [[1]])


@pytest.mark.parametrize(
    "failure", [status(503), status(429), status(408), reset, half], ids=["503", "429", "408", "reset", "half"]
)
def test_what_may_pass_is_tried_again(failure):
    """Twice the failure, then the completions; no request is lost or made twice."""
    with serving(completions, failure, failure) as server:
        sampler = OpenAISampler(server.url, "m", PLAIN, retries=2, concurrency=1, most_at_once=1, **QUICK)
        found = sampler(["a", "b"], [[1, 2], [3]])

    assert [r.completion for rs in found for r in rs] == [text_for("a", 1), text_for("a", 2), text_for("b", 3)]
    assert len(server.seen) == 5


def test_retry_after_is_honoured():
    """A rate limit that asks for a second gets a second, however short the backoff."""
    with serving(completions, status(429, Retry_After="1")) as server:
        OpenAISampler(server.url, "m", PLAIN, **QUICK)(["a"], [[1]])

    first, second = (at for *_, at in server.seen)
    assert 1.0 <= second - first < 5.0


def test_a_prompt_that_fails_is_named():
    """After the last try, or at once if it is refused."""
    for failures, kind, message in [
        ([status(500, b"out of memory")] * 3, ConnectionError, r"3 tries, status 500, 'out of memory'; .* 'a prompt'"),
        ([status(400, b"context length is 16")], Refused, r"status 400, 'context length is 16'; .* 'a prompt'"),
    ]:
        with serving(completions, *failures) as server, pytest.raises(kind, match=message):
            OpenAISampler(server.url, "m", PLAIN, retries=2, **QUICK)(["a prompt"], [[1]])
        assert len(server.seen) == len(failures)


def test_nobody_is_there():
    """Told before any prompt is sent, by check too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        sampler = OpenAISampler(f"http://127.0.0.1:{free.getsockname()[1]}", "m", PLAIN, retries=1, **QUICK)
        for ask in (lambda: sampler.check(["a"]), lambda: sampler(["a"], [[1]])):
            with pytest.raises(ConnectionError, match="2 tries, ConnectError"):
                ask()


@pytest.mark.parametrize(
    ("url", "api", "address"),
    [
        ("http://h:8000", "completions", "http://h:8000/v1/completions"),
        ("http://h:8000/", "chat", "http://h:8000/v1/chat/completions"),
        ("https://h/v1", "chat", "https://h/v1/chat/completions"),
        ("https://h/proxy/v1/", "completions", "https://h/proxy/v1/completions"),
        ("https://h/v1/completions", "completions", "https://h/v1/completions"),
        ("https://h/d/chat/completions?v=1", "chat", "https://h/d/chat/completions?v=1"),
    ],
)
def test_addresses(url, api, address):
    """A host, a base_url, or the whole address."""
    assert OpenAISampler(url, "m", PLAIN, api).address == address


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "h:8000"}, "OpenAISampler needs an url"),
        ({"url": "http://h/v1/chat/completions"}, "is that of api='chat', got api='completions'"),
        ({"url": "http://h/v1/completions", "api": "chat"}, "is that of api='completions'"),
        ({"api": "responses"}, "api='responses'"),
        ({"logprobs": "all"}, "logprobs='all'"),
        ({"most_at_once": 0}, "most_at_once >= 1"),
        ({"concurrency": True}, "concurrency >= 1"),
        ({"retries": -1}, "retries >= 0"),
        ({"timeout": 0}, "timeout > 0"),
        ({"token": "two words"}, "OpenAISampler needs a token"),
        ({"extra": {"n": 2}}, "got n=2: what says it is most_at_once"),
        ({"extra": {"seed": 0}}, "got seed=0: what says it is the seeds of a call"),
        ({"extra": {"prompt": "x"}}, "what says it is the prompts of a call"),
        ({"extra": {"messages": CHAT}}, "what says it is the prompts of a call"),
        ({"extra": {"top_k": -1, "max_tokens": 9}}, r"got max_tokens=9: what says it is Decoding\(max_tokens=...\)"),
        ({"text": Text(template="{{ messages }}")}, "needs a tokenizer="),
        ({"api": "chat", "tokenizer": "any", "text": Text(special_tokens=True)}, "api='completions'"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    """Told when it is made."""
    with pytest.raises(ValueError, match=message):
        OpenAISampler(**{"url": "http://h", "model": "m", "decoding": PLAIN, **changes})


def test_prompts_are_checked_before_sampling():
    """Messages without a way to send them, nothing, and, where the server tells its limit, what is too long for it."""
    with serving(completions, listing=models(owned_by="vllm", max_model_len=16)) as server:
        counting = OpenAISampler(server.url, "m", PLAIN, tokenizer=tiny.tokenizer(), **QUICK)
        counting.check(["1234567", CHAT])  # 8 tokens, and 8 to be drawn
        with pytest.raises(ValueError, match="'12345678' has 9 tokens, which with max_tokens=8 are more than the 16"):
            counting.check(["12345678"])
        for prompt, message in [(CHAT, "api='chat'"), ("", "needs text")]:
            with pytest.raises(ValueError, match=message):
                OpenAISampler(server.url, "m", PLAIN, **QUICK).check([prompt])
        assert server.seen == []


def test_the_token_is_sent_and_told_to_nobody(monkeypatch):
    """By argument or environment; not in repr, error or fingerprint, also where the server quotes it."""
    monkeypatch.delenv(openai.OPENAI_TOKEN, raising=False)
    for token, variable in [(SECRET, "another"), (None, SECRET)]:
        monkeypatch.setenv(openai.TOKEN, variable)
        with serving(completions, status(401, f"no such key: {SECRET}".encode())) as server:
            monkeypatch.setenv(f"{openai.TOKEN}_URL", server.url)
            sampler = OpenAISampler(server.url, "m", PLAIN, token=token, **QUICK)
            with pytest.raises(Refused, match=r"no such key: \[secret\]") as caught:
                sampler(["a"], [[1]])
        assert server.seen[0][1]["Authorization"] == f"Bearer {SECRET}"
        for told in (str(caught.value), repr(sampler), json.dumps(sampler.fingerprint())):
            assert SECRET not in told
    with serving(changed(finish_reason=SECRET)) as server, pytest.raises(ValueError, match=r"\[secret\]") as caught:
        OpenAISampler(server.url, "m", PLAIN, token=SECRET, **QUICK)(["a"], [[1]])
    assert SECRET not in str(caught.value)
    secret = OpenAISampler("http://me:password@h/v1?key=abcdef", "m", PLAIN)
    for told in (repr(secret), json.dumps(secret.fingerprint())):
        assert "password" not in told
        assert "abcdef" not in told


def test_openais_key_goes_to_openai_alone(monkeypatch):
    """Whoever runs another server has no business with it."""
    monkeypatch.delenv(openai.TOKEN, raising=False)
    monkeypatch.setenv(openai.OPENAI_TOKEN, SECRET)
    hosts = [
        "https://api.openai.com/v1",
        "https://eu.api.openai.com/v1",
        "https://openai.com",
        "https://notopenai.com",
        "http://h:8000",
    ]

    sent = [
        OpenAISampler(url, "m", PLAIN)._token for url in [*hosts, "http://api.openai.com", "https://a:b@api.openai.com"]
    ]
    assert sent == [SECRET, SECRET, SECRET, None, None, None, None]


def test_what_it_is():
    """A sampler that checks, renders and says what it is, pickles and compares; each setting of the policy shows."""
    sampler = OpenAISampler("http://h:8000", "m", PLAIN)
    for seam in (Sampler, Particular, Rendering, Fingerprinted):
        assert isinstance(sampler, seam)
    assert pickle.loads(pickle.dumps(sampler)) == sampler
    assert hash(replace(sampler)) == hash(sampler)
    assert repr(sampler).startswith("OpenAISampler('http://h:8000', 'm', Decoding(max_tokens=8")
    assert sampler.fingerprint() == replace(sampler, url="http://another", concurrency=2, token=SECRET).fingerprint()
    assert [sampler.rendered("Hi"), replace(sampler, api="chat").rendered(CHAT)] == ["Hi", ""]
    assert (
        replace(sampler, api="chat", tokenizer=tiny.tokenizer()).rendered("Hi") == "<s><|user|>Hi<|end|><|assistant|>"
    )
    others = [
        replace(sampler, model="other"), replace(sampler, api="chat"), replace(sampler, decoding=BENT),
        replace(sampler, tokenizer=tiny.tokenizer()), replace(sampler, tokenizer=tiny.tokenizer(bos=False)),
        replace(sampler, extra={"add_special_tokens": False}),
        replace(sampler, tokenizer=tiny.tokenizer(), text=Text(template="{{ messages }}")),
    ]  # fmt: skip
    told = [json.dumps(each.fingerprint(), sort_keys=True) for each in (sampler, *others)]
    assert len(set(told)) == len(told)


def test_an_error_stops_the_others():
    """The first trouble is raised at once; who works gives up, and what they share is closed after the last of them."""
    stop, closed, said = threading.Event(), threading.Event(), []

    def work(job):
        said.append("begun")
        if job == 0:
            raise KeyError("trouble")
        stop.wait(10)
        time.sleep(0.05)
        said.append("ended")

    def close():
        said.append("closed")
        closed.set()

    start = time.monotonic()
    with pytest.raises(KeyError, match="trouble"):
        list(RequestThreads(work, range(100), 2, stop, close).results())
    assert closed.wait(5)
    time.sleep(0.1)
    assert said[-1] == "closed"
    assert said.count("begun") == said.count("ended") + 1 <= 3
    assert time.monotonic() - start < 5


def test_the_bar_shows_completions(monkeypatch):
    """It counts rollouts, and is off where it is not wanted."""
    made = []
    monkeypatch.setattr(openai, "tqdm", lambda **options: made.append(options) or Bar())
    with serving(completions) as server:
        for shown in (True, False):
            OpenAISampler(server.url, "m", PLAIN, backoff=0.001, show_progress=shown)(["a", "b"], [[1, 2], [3]])

    assert [(bar["total"], bar["disable"]) for bar in made] == [(3, None), (3, True)]
    assert Bar.counted == 6


class Bar:
    """Counts."""

    counted = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, count):
        """So many more."""
        Bar.counted += count


def test_no_engine_is_imported_for_it():
    """Asking a server takes neither torch nor vLLM."""
    code = "import sys, calibrated_rewards.samplers.openai; sys.exit(not {'torch', 'vllm'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
