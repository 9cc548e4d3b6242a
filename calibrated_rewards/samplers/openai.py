"""What an OpenAI-compatible server is asked for K completions of a prompt, and how its answer is read.

A policy behind HTTP: any server that speaks OpenAI's API, such as `vllm serve`; requests in flight, retried."""

import os
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

from tqdm import tqdm

from calibrated_rewards.models.batches import PATIENCE
from calibrated_rewards.models.http_client import (
    Post,
    Refused,
    RequestThreads,
    check_numbers,
    open_client,
    text_fingerprint,
)
from calibrated_rewards.models.server_address import (
    POLICY_TOKEN,
    Address,
    format_url,
    redact_url,
    split_url,
    token_for,
    without_secrets,
)
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.samplers.logprob import of_the_draw
from calibrated_rewards.samplers.protocol import Decoding, Finish, Rollout, Seeds

# What servers call an end; "eos" and its like are TGI's.
FINISHES: dict[str | None, Finish | None] = {
    None: None,
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
}
# All servers take a seed of so many bits.
SEEDS = 2**31


def settings(decoding: Decoding, every: bool) -> dict[str, Any]:
    """A decoding in the API's words. What OpenAI's own API does not know is left out where it is off, unless `every`.

    >>> settings(Decoding(max_tokens=8, top_k=5), every=False)
    {'max_tokens': 8, 'temperature': 1.0, 'top_p': 1.0, 'top_k': 5}
    """
    others: dict[str, tuple[Any, bool]] = {
        "top_k": (decoding.top_k or -1, decoding.top_k > 0 or every),  # 0 is no top_k that every server takes
        "min_p": (decoding.min_p, decoding.min_p > 0 or every),
        "repetition_penalty": (decoding.repetition_penalty, decoding.repetition_penalty != 1 or every),
        "stop": (list(decoding.stop), bool(decoding.stop)),
        "stop_token_ids": (list(decoding.stop_token_ids), bool(decoding.stop_token_ids)),
    }
    said = {name: value for name, (value, on) in others.items() if on}
    usual = {"max_tokens": decoding.max_tokens, "temperature": decoding.temperature, "top_p": decoding.top_p}
    return {**usual, **said}


def asking(api: str, logprobs: bool) -> dict[str, Any]:
    """What asks for the log-probabilities of the tokens that were drawn, and no others."""
    if not logprobs:
        return {}
    return {"logprobs": True} if api == "chat" else {"logprobs": 0}


def rollouts(answer: Any, count: int, prompt: Prompt, logprobs: bool) -> list[Rollout]:
    """The rollouts in an answer, in the order of their indices."""
    choices = answer["choices"]
    if sorted(choice.get("index", 0) for choice in choices) != list(range(count)):
        raise ValueError(
            f"{len(choices)} choices, where n={count} were asked for: of a server that knows no n, ask for "
            "most_at_once=1"
        )
    used = (answer.get("usage") or {}).get("completion_tokens")
    alone = used if count == 1 and isinstance(used, int) else None
    return [_rollout(c, prompt, alone, logprobs) for c in sorted(choices, key=lambda choice: choice.get("index", 0))]


def _rollout(choice: Mapping[str, Any], prompt: Prompt, tokens: int | None, logprobs: bool) -> Rollout:
    reason = choice.get("finish_reason")
    if reason not in FINISHES:
        raise ValueError(f"a completion of {start_of(prompt)} is not whole: it ended by {reason!r}")
    completion = _said(choice["message"]) if "message" in choice else choice["text"]
    if not isinstance(completion, str | list):
        raise ValueError(f"a completion is a text, got {start_of(completion)}")
    drawn = _logprobs(choice) if logprobs else None
    if drawn is None:
        return Rollout(completion, tokens, FINISHES[reason])
    return Rollout(completion, len(drawn), FINISHES[reason], sum(drawn))


def _said(message: Mapping[str, Any]) -> Completion:
    """What the assistant says; with calls of tools, as a message."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        raise ValueError(
            f"the server takes the reasoning out of completions, {start_of(thought)}: a trainer's completions have it; "
            "serve the model without a reasoning parser"
        )
    said = message.get("content") or message.get("refusal") or ""
    calls = message.get("tool_calls")
    return [{"role": "assistant", "content": said, "tool_calls": calls}] if calls else said


def _logprobs(choice: Mapping[str, Any]) -> Sequence[float]:
    """That of each token, as completions or as chats have them."""
    given = choice.get("logprobs") or {}
    numbers = given["token_logprobs"] if "token_logprobs" in given else [each["logprob"] for each in given["content"]]
    return [float(number) for number in numbers]


TOKEN, OPENAI_TOKEN = POLICY_TOKEN, "OPENAI_API_KEY"
Job: TypeAlias = tuple[int, Sequence[int]]
"""The number of a prompt, and the seeds of a request for it."""
PATHS: dict[str, str] = {"completions": "/completions", "chat": "/chat/completions"}
# What of a `Text` becomes a prompt's tokens.
READ = ("chat", "template", "template_options", "special_tokens", "today")
# Servers that take what a request does not say from the model's generation config, as /v1/models names them.
WITH_DEFAULTS = ("vllm", "sglang")
# What says these fields of a request, which `extra` may leave out but not say otherwise.
SETTINGS = {
    "model": "model",
    "prompt": "the prompts of a call",
    "messages": "the prompts of a call",
    "n": "most_at_once and the seeds of a call",
    "seed": "the seeds of a call",
    **{name: f"Decoding({name}=...)" for name in ("max_tokens", "temperature", "top_p", "stop", "stop_token_ids")},
}


@dataclass(frozen=True)
class OpenAISampler:
    """Samples with a server: `OpenAISampler("http://host:8000", "my-model", Decoding(max_tokens=512), tokenizer=...)`.

    Completions of a request have the request's seed and their number in it; what a server makes of them is its own, and
    what it drew is kept. With a tokenizer the prompt is rendered and made into tokens here, as a trainer does; else
    a text goes as it is (the server adds its special tokens), and messages need `api="chat"`.

    top_k, min_p, repetition_penalty and stop_token_ids are not of OpenAI's own API. They are sent where they are on,
    and to vLLM and SGLang always: these would otherwise take them from the model's generation config.

    Connection errors, timeouts, status 408, 429 and 5xx are tried again, after a time that doubles and is shaken, or
    longer if the server asks for it (Retry-After); anything else is an error at once. The token, or else that in
    CALIBRATED_REWARDS_POLICY_TOKEN for the server in CALIBRATED_REWARDS_POLICY_TOKEN_URL, or, for OpenAI's own hosts,
    OPENAI_API_KEY, is in no repr, error, log or fingerprint.
    """

    url: str
    """A host, http://host:8000; or what clients call base_url, http://host:8000/v1; or the whole address."""
    model: str
    """The name that it is served under."""
    decoding: Decoding
    api: str = "completions"
    """"completions", or "chat" to have the server render messages."""
    tokenizer: Any = None
    text: Text = field(default_factory=Text)
    """How prompts become tokens, where there is a tokenizer."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of each request, such as chat_template_kwargs; None leaves one out that is usually there."""
    logprobs: str | None = None
    """Ask for log-probabilities, and so for the number of tokens: "processed" if the server tells those that it draws
    with (vllm serve --logprobs-mode processed_logprobs), "raw" if it tells the model's own."""
    most_at_once: int = 128
    """Most completions of one request; 1 gives each its own seed."""
    concurrency: int = 16
    """Requests in flight at once."""
    timeout: float = 600.0
    """Seconds for each step of a request: to connect, to send, to wait for an answer."""
    retries: int = 8
    """How often a request is tried again."""
    backoff: float = 0.5
    """Seconds before the first of these; then twice as many each time."""
    token: str | None = field(default=None, repr=False)
    show_progress: bool = True

    def __post_init__(self) -> None:
        whole = {
            "most_at_once": (self.most_at_once, 1),
            "concurrency": (self.concurrency, 1),
            "retries": (self.retries, 0),
        }
        check_numbers("OpenAISampler", whole, self.timeout, self.backoff)
        if self.api not in PATHS or self.logprobs not in (None, "raw", "processed"):
            raise ValueError(
                "OpenAISampler needs api='completions' or 'chat' and logprobs=None, 'raw' or 'processed', "
                f"got api={self.api!r}, logprobs={self.logprobs!r}"
            )
        for name, says in SETTINGS.items():
            if self.extra.get(name) is not None:
                raise ValueError(
                    f"extra is for fields that nothing else says, got {name}={start_of(self.extra[name])}: "
                    f"what says it is {says}"
                )
        if (self.api == "chat" or self.tokenizer is None) and self.text != Text(chat=self.text.chat):
            raise ValueError(
                f"the server makes the tokens, with its own template, got {self.text}: that needs a tokenizer= and "
                "api='completions'"
            )
        _ = self._place, self.address

    def __repr__(self) -> str:
        read = "" if self.tokenizer is None else f", tokenizer={type(self.tokenizer).__name__}"
        return f"OpenAISampler({format_url(self.url)!r}, {self.model!r}, {self.decoding!r}, api={self.api!r}{read})"

    def __hash__(self) -> int:
        return hash((self.url, self.model))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_served"}

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """A rollout for each seed of each prompt."""
        most = self.most_at_once
        jobs = [(i, own[at : at + most]) for i, own in enumerate(seeds) for at in range(0, len(own), most)]
        found: dict[int, list[Rollout]] = {}
        if jobs:
            _ = self._served  # in this thread, once
            with closing(self._results(prompts, jobs)) as results, self._bar(seeds) as bar:
                for number, drawn in results:
                    found[number] = drawn
                    bar.update(len(drawn))
        given: list[list[Rollout]] = [[] for _ in seeds]
        for number, (i, _) in enumerate(jobs):
            given[i] += found[number]
        return given

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError for a prompt without text, or refused by the template, or, where it is known, too long."""
        known = [self.text.max_length, self._served.get("max_model_len")]
        limit, most = min([n for n in known if isinstance(n, int)], default=None), self.decoding.max_tokens
        for prompt in prompts:
            asked = self._asked(prompt)
            if not asked:
                raise ValueError("a prompt needs text, got ''")
            if limit is not None and isinstance(asked, list) and self.api != "chat" and len(asked) + most > limit:
                raise ValueError(
                    f"{start_of(prompt)} has {len(asked)} tokens, which with max_tokens={most} are more than the "
                    f"{limit} that the server reads: leave it out, or ask for fewer"
                )

    def rendered(self, prompt: Prompt) -> str:
        """What the policy reads; nothing, where only the server knows."""
        if self.tokenizer is not None:
            text = Text(chat=True) if self.api == "chat" else self.text
            return text.opening(self.tokenizer, prompt)[0]
        return prompt if isinstance(prompt, str) and self.api == "completions" else ""

    def fingerprint(self) -> dict[str, Any]:
        """What the rollouts depend on, as far as this side knows: the model by the name that it is served under."""
        said = {"kind": "openai", "model": self.model, "api": self.api, "extra": without_secrets(self.extra)}
        words = text_fingerprint(self.text, self.tokenizer)
        text = {name: value for name, value in words.items() if name in (*READ, "tokenizer")}
        return {**said, "text": text, "decoding": self.decoding.fingerprint()}

    @property
    def address(self) -> str:
        """Where requests are posted."""
        return self._under(PATHS[self.api])

    @property
    def _place(self) -> Address:
        try:
            return Address(self.url, self._token)
        except ValueError as error:
            raise ValueError(str(error).replace("Remote", "OpenAISampler", 1)) from None

    @property
    def _token(self) -> str | None:
        """As given; of the environment only what belongs to this server, and no second one beside an url's user."""
        parts = split_url(self.url)
        if self.token is not None or parts.username is not None:
            return self.token
        host = f".{parts.hostname or ''}"
        theirs = os.environ.get(OPENAI_TOKEN) if parts.scheme == "https" and host.endswith(".openai.com") else None
        return token_for(self.url, TOKEN) or theirs or None

    def _under(self, path: str) -> str:
        """An address beside those of the API that the url names."""
        parts = split_url(self.url)
        base = parts.path.rstrip("/")
        whole = next((api for api in ("chat", "completions") if base.endswith(PATHS[api])), None)  # chat ends both ways
        if whole not in (None, self.api):
            raise ValueError(f"the url {redact_url(self.url)} is that of api={whole!r}, got api={self.api!r}")
        base = base.removesuffix(PATHS[self.api]) if whole else base
        return parts._replace(path=(base or "/v1") + path, fragment="").geturl()

    def _asked(self, prompt: Prompt) -> Any:
        """What is sent of a prompt: messages, tokens or text."""
        if self.api == "chat":
            return self.text.messages(prompt)
        if self.tokenizer is not None:
            # What ends an input of a scorer would end the answer before it begins.
            text = replace(self.text, append_eos=False)
            return text.tokens(self.tokenizer, [text.opening(self.tokenizer, prompt)])[0]
        if not isinstance(prompt, str) or self.text.chat:
            raise ValueError(f"messages need a tokenizer= to render them, or api='chat', got {start_of(prompt)}")
        return prompt

    def _payload(self, asked: Any, seeds: Sequence[int]) -> dict[str, Any]:
        every = str(self._served.get("owned_by", "")).lower() in WITH_DEFAULTS
        what = {"messages": asked} if self.api == "chat" else {"prompt": asked}
        drawing = {**settings(self.decoding, every), **asking(self.api, self.logprobs is not None)}
        said = {"model": self.model, **what, **drawing, "n": len(seeds), "seed": seeds[0] % SEEDS, **self.extra}
        return {name: value for name, value in said.items() if value is not None}

    def _results(self, prompts: Sequence[Prompt], jobs: list[Job]) -> Generator[tuple[int, Any], None, None]:
        """The rollouts of each job, as they come."""
        asked = [self._asked(prompt) for prompt in prompts]
        stop = threading.Event()
        post = self._post(stop)
        work = partial(self._drawn, post, prompts, asked)
        return RequestThreads(work, jobs, self.concurrency, stop, post.client.close).results()

    def _drawn(self, post: Post, prompts: Sequence[Prompt], asked: Sequence[Any], job: Job) -> list[Rollout]:
        """The rollouts of one request."""
        i, seeds = job
        return self._rollouts(post, prompts[i], self._payload(asked[i], seeds))

    def _rollouts(self, post: Post, prompt: Prompt, payload: dict[str, Any]) -> list[Rollout]:
        try:
            response = post(self.address, payload)
        except (Refused, ConnectionError) as error:
            raise type(error)(f"{error}; it was asked to complete {start_of(prompt)}") from None
        try:
            drawn = rollouts(response.json(), payload.get("n", 1), prompt, self.logprobs is not None)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            why = self._place.redacted(f"{error}" if isinstance(error, ValueError) else repr(error))
            raise ValueError(
                f"{redact_url(self.address)} gave no completions of {start_of(prompt)} that can be used, {why}: "
                f"{post.quote(response)}"
            ) from None
        return [r._replace(logprob=of_the_draw(r.logprob, self.decoding, self.logprobs == "processed")) for r in drawn]

    def _post(self, stop: threading.Event) -> Post:
        connected = open_client(self._place, self.timeout, self.concurrency)
        return Post(self._place, connected, self.retries, self.backoff, stop)

    @cached_property
    def _served(self) -> Mapping[str, Any]:
        """What the server says of the model, if it says something: its owner, its max_model_len."""
        post = self._post(threading.Event())
        with post.client:
            try:
                listed = post(self._under("/models"), None, "GET").json()["data"]
                return next((dict(each) for each in listed if each.get("id") == self.model), {})
            except (Refused, ValueError, TypeError, LookupError, AttributeError):
                return {}  # it may have no such list

    def _bar(self, seeds: Seeds) -> "tqdm[Any]":
        off = None if self.show_progress else True
        return tqdm(total=sum(map(len, seeds)), unit=" completions", desc="sampling", delay=PATIENCE, disable=off)
