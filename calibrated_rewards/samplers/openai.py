"""A policy behind HTTP: K completions from any server that speaks OpenAI's API, such as `vllm serve`."""

import os
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias

from tqdm import tqdm

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
from calibrated_rewards.samplers.protocol import (
    PATIENCE,
    Decoding,
    Finish,
    Rollout,
    Seeds,
    fingerprint_of_prompts,
    logprob_of_draw,
    tokenize_prompts,
)

TOKEN, OPENAI_TOKEN = POLICY_TOKEN, "OPENAI_API_KEY"
PATHS: dict[str, str] = {"completions": "/completions", "chat": "/chat/completions"}
# Reasons of servers that a completion ended; "eos" and its like are TGI's.
FINISHES: dict[str | None, Finish | None] = {
    None: None,
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "tool_calls", "function_call"), "stop"),
    "length": "length",
}
# All servers take a seed of so many bits.
SEEDS = 2**31
# Servers that take a setting which a request leaves out from the model's generation config, as /v1/models names them.
WITH_DEFAULTS = ("vllm", "sglang")
# The fields of a request that have a setting of their own: `extra` may leave them out, but not set them otherwise.
SETTINGS = {
    "model": "model",
    "prompt": "the prompts of a call",
    "messages": "the prompts of a call",
    "n": "most_at_once and the seeds of a call",
    "seed": "the seeds of a call",
    **{name: f"Decoding({name}=...)" for name in ("max_tokens", "temperature", "top_p", "stop", "stop_token_ids")},
}
Job: TypeAlias = tuple[int, Sequence[int]]
"""The number of a prompt, and the seeds of a request for it."""


@dataclass(frozen=True)
class OpenAISampler:
    """Samples with a server: `OpenAISampler("http://host:8000", "my-model", Decoding(max_tokens=512), tokenizer=...)`.

    Each request has a seed; how a server uses it for several completions is the server's affair, and what it drew is
    kept. With a tokenizer the prompt is rendered and made into tokens here, as a trainer does; else a text is sent as
    it is (the server adds its special tokens), and messages need `api="chat"`.

    top_k, min_p, repetition_penalty and stop_token_ids are not in OpenAI's own API. They are sent where they are on,
    and always to vLLM and SGLang, which would otherwise take them from the model's generation config.

    Connection errors, timeouts, status 408, 429 and 5xx are tried again, after a time that doubles and is shaken, or
    longer if the server asks for it (Retry-After); anything else is an error at once. The token, or else that in
    CALIBRATED_REWARDS_POLICY_TOKEN for the server in CALIBRATED_REWARDS_POLICY_TOKEN_URL, or, for OpenAI's own hosts,
    OPENAI_API_KEY, is in no repr, error, log or fingerprint.
    """

    url: str
    """A host, http://host:8000; or a client's base_url, http://host:8000/v1; or the whole address."""
    model: str
    """The name that it is served under."""
    decoding: Decoding
    api: str = "completions"
    """"completions", or "chat" to have the server render messages."""
    tokenizer: Any = None
    text: Text = field(default_factory=Text)
    """The way from prompts to tokens, with a tokenizer."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of each request, such as chat_template_kwargs; None leaves a usual one out."""
    logprobs: str | None = None
    """Ask for log-probabilities, and so for the number of tokens: "processed" if the server returns those that it draws
    with (vllm serve --logprobs-mode processed_logprobs), "raw" if it returns the model's own."""
    most_at_once: int = 128
    """Most completions of one request; with 1 each has its own seed."""
    concurrency: int = 16
    """Requests in flight at once."""
    timeout: float = 600.0
    """Timeout in seconds for each step of a request: to connect, to send, to wait for an answer."""
    retries: int = 8
    """Times that a request is tried again."""
    backoff: float = 0.5
    """Seconds before the first of these; doubled each time."""
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
        for name, other in SETTINGS.items():
            if self.extra.get(name) is not None:
                raise ValueError(
                    f"extra is for fields that nothing else says, got {name}={start_of(self.extra[name])}: "
                    f"what says it is {other}"
                )
        if (self.api == "chat" or self.tokenizer is None) and self.text != Text(chat=self.text.chat):
            raise ValueError(
                f"the server makes the tokens, with its own template, got {self.text}: that needs a tokenizer= and "
                "api='completions'"
            )
        _ = self._place, self.address

    def __repr__(self) -> str:
        url, tokenizer = format_url(self.url), type(self.tokenizer).__name__
        end = "" if self.tokenizer is None else f", tokenizer={tokenizer}"
        return f"OpenAISampler({url!r}, {self.model!r}, {self.decoding!r}, api={self.api!r}{end})"

    def __hash__(self) -> int:
        return hash((self.url, self.model))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_served"}

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """Draw a rollout for each seed of each prompt."""
        most = self.most_at_once
        jobs = [(i, each[at : at + most]) for i, each in enumerate(seeds) for at in range(0, len(each), most)]
        drawn: dict[int, list[Rollout]] = {}
        if jobs:
            _ = self._served  # in this thread, once
            bar = tqdm(
                total=sum(map(len, seeds)),
                unit=" completions",
                desc="sampling",
                delay=PATIENCE,
                disable=None if self.show_progress else True,
            )
            with closing(self._request(prompts, jobs)) as results, bar:
                for number, rollouts in results:
                    drawn[number] = rollouts
                    bar.update(len(rollouts))
        by_prompt: list[list[Rollout]] = [[] for _ in seeds]
        for number, (i, _) in enumerate(jobs):
            by_prompt[i] += drawn[number]
        return by_prompt

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without text, refused by the template, or, where the limit is known, too long: ValueError."""
        limits = [self.text.max_length, self._served.get("max_model_len")]
        limit, most = min([n for n in limits if isinstance(n, int)], default=None), self.decoding.max_tokens
        for prompt in prompts:
            content = self._content(prompt)
            if not content:
                raise ValueError("a prompt needs text, got ''")
            if limit is not None and isinstance(content, list) and self.api != "chat" and len(content) + most > limit:
                raise ValueError(
                    f"{start_of(prompt)} has {len(content)} tokens, which with max_tokens={most} are more than the "
                    f"{limit} that the server reads: leave it out, or ask for fewer"
                )

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that the policy reads; empty where only the server knows."""
        if self.tokenizer is not None:
            text = Text(chat=True) if self.api == "chat" else self.text
            return text.opening(self.tokenizer, prompt)[0]
        return prompt if isinstance(prompt, str) and self.api == "completions" else ""

    def fingerprint(self) -> dict[str, Any]:
        """Describe what the rollouts depend on, as far as it is known here: the model by its name on the server."""
        served = {"kind": "openai", "model": self.model, "api": self.api, "extra": without_secrets(self.extra)}
        text = text_fingerprint(self.text, self.tokenizer)
        tokenizer = {name: text[name] for name in ("tokenizer",) if name in text}
        return {**served, "text": fingerprint_of_prompts(text) | tokenizer, "decoding": self.decoding.fingerprint()}

    @property
    def address(self) -> str:
        """The address that requests are posted to."""
        return self._under(PATHS[self.api])

    @property
    def _place(self) -> Address:
        try:
            return Address(self.url, self._token)
        except ValueError as error:
            raise ValueError(str(error).replace("Remote", "OpenAISampler", 1)) from None

    @property
    def _token(self) -> str | None:
        """The token argument, or the environment's for this server; no second one beside an url's user."""
        parts = split_url(self.url)
        if self.token is not None or parts.username is not None:
            return self.token
        is_openai = parts.scheme == "https" and f".{parts.hostname or ''}".endswith(".openai.com")
        return token_for(self.url, TOKEN) or (os.environ.get(OPENAI_TOKEN) if is_openai else None) or None

    def _under(self, path: str) -> str:
        """Join a path to the API's part of the url."""
        parts = split_url(self.url)
        base = parts.path.rstrip("/")
        whole = next((api for api in ("chat", "completions") if base.endswith(PATHS[api])), None)  # chat ends both ways
        if whole not in (None, self.api):
            raise ValueError(f"the url {redact_url(self.url)} is that of api={whole!r}, got api={self.api!r}")
        base = base.removesuffix(PATHS[self.api]) if whole else base
        return parts._replace(path=(base or "/v1") + path, fragment="").geturl()

    def _content(self, prompt: Prompt) -> Any:
        """Convert a prompt to what is sent of it: messages, tokens or text."""
        if self.api == "chat":
            return self.text.messages(prompt)
        if self.tokenizer is not None:
            return tokenize_prompts(self.text, self.tokenizer, [prompt])[0]
        if not isinstance(prompt, str) or self.text.chat:
            raise ValueError(f"messages need a tokenizer= to render them, or api='chat', got {start_of(prompt)}")
        return prompt

    def _payload(self, content: Any, seeds: Sequence[int]) -> dict[str, Any]:
        chat = self.api == "chat"
        logprobs = {} if self.logprobs is None else {"logprobs": True if chat else 0}
        every = str(self._served.get("owned_by", "")).lower() in WITH_DEFAULTS
        fields = {
            "model": self.model,
            "messages" if chat else "prompt": content,
            **format_decoding(self.decoding, every),
            **logprobs,
            "n": len(seeds),
            "seed": seeds[0] % SEEDS,
            **self.extra,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _request(self, prompts: Sequence[Prompt], jobs: list[Job]) -> Generator[tuple[int, Any], None, None]:
        """Yield the rollouts of each job, as they come."""
        contents = [self._content(prompt) for prompt in prompts]
        stop = threading.Event()
        post = self._post(stop)
        work = partial(self._request_one, post, prompts, contents)
        return RequestThreads(work, jobs, self.concurrency, stop, post.client.close).results()

    def _request_one(self, post: Post, prompts: Sequence[Prompt], contents: Sequence[Any], job: Job) -> list[Rollout]:
        prompt, payload = prompts[job[0]], self._payload(contents[job[0]], job[1])
        try:
            response = post(self.address, payload)
        except (Refused, ConnectionError) as error:
            raise type(error)(f"{error}; it was asked to complete {start_of(prompt)}") from None
        try:
            rollouts = parse_answer(response.json(), payload.get("n", 1), prompt, self.logprobs is not None)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            why = self._place.redacted(f"{error}" if isinstance(error, ValueError) else repr(error))
            raise ValueError(
                f"{redact_url(self.address)} gave no completions of {start_of(prompt)} that can be used, {why}: "
                f"{post.quote(response)}"
            ) from None
        processed = self.logprobs == "processed"
        return [each._replace(logprob=logprob_of_draw(each.logprob, self.decoding, processed)) for each in rollouts]

    def _post(self, stop: threading.Event) -> Post:
        connected = open_client(self._place, self.timeout, self.concurrency)
        return Post(self._place, connected, self.retries, self.backoff, stop)

    @cached_property
    def _served(self) -> Mapping[str, Any]:
        """The server's entry for the model, if it has a list of models: its owner, its max_model_len."""
        post = self._post(threading.Event())
        with post.client:
            try:
                listed = post(self._under("/models"), None, "GET").json()["data"]
                return next((dict(each) for each in listed if each.get("id") == self.model), {})
            except (Refused, ValueError, TypeError, LookupError, AttributeError):
                return {}  # it may have no such list


def format_decoding(decoding: Decoding, every: bool) -> dict[str, Any]:
    """Convert a decoding to fields of a request; those beyond OpenAI's API only where they are on, or with `every`.

    >>> format_decoding(Decoding(max_tokens=8, top_k=5), every=False)
    {'max_tokens': 8, 'temperature': 1.0, 'top_p': 1.0, 'top_k': 5}
    """
    fields: dict[str, tuple[Any, bool]] = {
        "max_tokens": (decoding.max_tokens, True),
        "temperature": (decoding.temperature, True),
        "top_p": (decoding.top_p, True),
        "top_k": (decoding.top_k or -1, decoding.top_k > 0 or every),  # 0 is no top_k that every server takes
        "min_p": (decoding.min_p, decoding.min_p > 0 or every),
        "repetition_penalty": (decoding.repetition_penalty, decoding.repetition_penalty != 1 or every),
        "stop": (list(decoding.stop), bool(decoding.stop)),
        "stop_token_ids": (list(decoding.stop_token_ids), bool(decoding.stop_token_ids)),
    }
    return {name: value for name, (value, on) in fields.items() if on}


def parse_answer(answer: Any, count: int, prompt: Prompt, logprobs: bool) -> list[Rollout]:
    """Read the rollouts in an answer, in the order of their indices."""
    choices = answer["choices"]
    if sorted(choice.get("index", 0) for choice in choices) != list(range(count)):
        raise ValueError(
            f"{len(choices)} choices, where n={count} were asked for: of a server that knows no n, ask for "
            "most_at_once=1"
        )
    used = (answer.get("usage") or {}).get("completion_tokens")
    tokens = used if count == 1 and isinstance(used, int) else None
    choices = sorted(choices, key=lambda choice: choice.get("index", 0))
    return [_parse_choice(choice, prompt, tokens, logprobs) for choice in choices]


def _parse_choice(choice: Mapping[str, Any], prompt: Prompt, tokens: int | None, logprobs: bool) -> Rollout:
    reason = choice.get("finish_reason")
    if reason not in FINISHES:
        raise ValueError(f"a completion of {start_of(prompt)} is not whole: it ended by {reason!r}")
    completion = _parse_message(choice["message"]) if "message" in choice else choice["text"]
    if not isinstance(completion, str | list):
        raise ValueError(f"a completion is a text, got {start_of(completion)}")
    if not logprobs:
        return Rollout(completion, tokens, FINISHES[reason])
    # Completions and chats have the tokens' log-probabilities in different forms.
    by_token = choice.get("logprobs") or {}
    values = by_token["token_logprobs"] if "token_logprobs" in by_token else [x["logprob"] for x in by_token["content"]]
    return Rollout(completion, len(values), FINISHES[reason], sum(map(float, values)))


def _parse_message(message: Mapping[str, Any]) -> Completion:
    """Read the assistant's text; a message, if it calls tools."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        raise ValueError(
            f"the server takes the reasoning out of completions, {start_of(reasoning)}: a trainer's completions have "
            "it; serve the model without a reasoning parser"
        )
    content = message.get("content") or message.get("refusal") or ""
    calls = message.get("tool_calls")
    return [{"role": "assistant", "content": content, "tool_calls": calls}] if calls else content
