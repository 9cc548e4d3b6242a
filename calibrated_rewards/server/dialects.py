"""The dialects of the server: the request of each framework's client as a pydantic model, and the answer to it.

One endpoint takes all of them, and tells them apart by a field that no other dialect has. A new dialect is a class as
those below, with the members of the Protocols `Dialect` and `ParsedRequest`. The library's are in `DIALECTS`; a user's
are passed to `create_app`, `serve` or `serve_replicas`.

>>> parse_request({"query": ["2+2=4"], "prompts": ["2+2="], "labels": [""]}, Limits()).name
'openrlhf'
>>> parse_request({"query": ["2+2=4", 7]}, Limits())
Traceback (most recent call last):
calibrated_rewards.server.limits.Refused: query[1] is a text, got int 7
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from calibrated_rewards.prompts import start_of
from calibrated_rewards.reward import frameworks
from calibrated_rewards.reward.lookup import Score
from calibrated_rewards.server.fields import Chat, Chats, Ids, Text, Texts, refuse_malformed
from calibrated_rewards.server.limits import Limits, Refused

LABEL = "If the reward has an id_column: the prompt's id, or an object with that column."


@dataclass(frozen=True)
class Pair:
    """A completion to score and its prompt; the prompt is None if the completion is a text that begins with it.

    An id needs a prompt beside it.
    """

    prompt: Any
    completion: Any
    id: str | int | None = None


def describe_answer(*numbers: str, **others: Any) -> dict[str, Any]:
    """Describe an answer as a JSON schema: an object with these lists of numbers, and other members by their schemas.

    >>> describe_answer("scores")["properties"]
    {'scores': {'type': 'array', 'items': {'type': 'number'}}}
    """
    lists = {name: {"type": "array", "items": {"type": "number"}} for name in numbers}
    return {"type": "object", "properties": {**lists, **others}, "required": [*lists, *others]}


@runtime_checkable
class ParsedRequest(Protocol):
    """A request of some dialect: an instance of its class."""

    name: ClassVar[str]
    """The dialect's name."""

    def pairs(self, id_column: str | None) -> list[Pair]:
        """List the completions to score; labels are ids if the reward has an `id_column`, else answers to ignore."""

    def answer(self, scores: Sequence[Score]) -> Any:
        """Build the answer as JSON, from the scores of the pairs in their order."""


@runtime_checkable
class Dialect(Protocol):
    """The class of one client's requests: a pydantic model with the members of `ParsedRequest` and these.

    Fields of the types in `server.fields` are checked against the server's limits; a list of objects is `Items[Mine]`.
    A field of the request must not have the name of a member.
    """

    name: str
    """Its name in the metrics and in the OpenAPI page."""
    recognised_by: str
    """The field by which a request is known to be of this dialect: a request has that of one dialect alone."""
    same_length: tuple[str, ...]
    """Fields that must have as many items as `recognised_by`, unless they are None."""
    example: Mapping[str, Any]
    """A request for the OpenAPI page; in the library's dialects the prompt is 2+2=, which the tests send."""
    answer_schema: Mapping[str, Any]
    """The JSON schema of the answer."""

    def model_validate(self, obj: Any, *, strict: bool | None = None, context: Any | None = None) -> ParsedRequest:
        """Read a request: every pydantic model has this. The `context` is the server's `Limits`."""

    def model_json_schema(self) -> dict[str, Any]:
        """Describe the request: every pydantic model has this."""


class Native(BaseModel):
    """This library's own dialect: the answer has the reward, raw score and quantile of each pair."""

    model_config = ConfigDict(title="native")
    name: ClassVar[str] = "native"
    recognised_by: ClassVar[str] = "completions"
    same_length: ClassVar[tuple[str, ...]] = ("prompts", "ids")
    example: ClassVar[Mapping[str, Any]] = {"prompts": ["2+2="], "completions": ["4"], "ids": [None]}
    answer_schema: ClassVar[Mapping[str, Any]] = describe_answer("raw", "u", "hit", reward={"type": "array"})

    prompts: Chats
    completions: Chats
    ids: Ids = None

    def pairs(self, id_column: str | None) -> list[Pair]:
        """List the pairs; `ids` count also for a reward without an `id_column`."""
        ids = [None] * len(self.prompts) if self.ids is None else map(as_id, self.ids)
        return [Pair(*each) for each in zip(self.prompts, self.completions, ids, strict=True)]

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give four lists; a reward is null for an unknown prompt, if the reward has on_missing="skip"."""
        return {"reward": [score.reward for score in scores], **collect_details(scores)}


class OpenRlhf(BaseModel):
    """OpenRLHF's `--reward.remote_url`; it filters groups by `scores`, which are the quantiles."""

    model_config = ConfigDict(title="OpenRLHF")
    name: ClassVar[str] = "openrlhf"
    recognised_by: ClassVar[str] = "query"
    same_length: ClassVar[tuple[str, ...]] = ("prompts", "labels")
    example: ClassVar[Mapping[str, Any]] = {"query": ["2+2=4"], "prompts": ["2+2="], "labels": [""]}
    answer_schema: ClassVar[Mapping[str, Any]] = describe_answer(
        "rewards", "scores", extra_logs=describe_answer("raw", "u", "hit")
    )

    query: Texts
    prompts: Texts | None = None
    labels: Annotated[list[Any] | None, Field(description=LABEL)] = None

    def pairs(self, id_column: str | None) -> list[Pair]:
        """Split each text after its prompt; without `prompts`, after the longest prompt that the table knows."""
        return split_queries("query", self.query, self.prompts, self.labels, id_column)

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give rewards, scores, and lists for its log."""
        logs = collect_details(scores)
        return {"rewards": collect_numbers(scores), "scores": logs["u"], "extra_logs": logs}


class LightRft(BaseModel):
    """LightRFT's `--remote_rm_url`; its client sends no labels, another one may."""

    model_config = ConfigDict(title="LightRFT")
    name: ClassVar[str] = "lightrft"
    recognised_by: ClassVar[str] = "queries"
    same_length: ClassVar[tuple[str, ...]] = ("prompts", "labels")
    example: ClassVar[Mapping[str, Any]] = {"queries": ["2+2=4"], "prompts": ["2+2="]}
    answer_schema: ClassVar[Mapping[str, Any]] = describe_answer("rewards")

    queries: Texts
    prompts: Texts | None = None
    labels: Annotated[list[Any] | None, Field(description=LABEL)] = None

    def pairs(self, id_column: str | None) -> list[Pair]:
        """Split each text after its prompt; padding before the prompt is dropped."""
        return split_queries("queries", self.queries, self.prompts, self.labels, id_column)

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give the rewards and nothing else."""
        return {"rewards": collect_numbers(scores)}


class Slime(BaseModel):
    """slime's `--rm-type remote_rm`: one sample a request, one number an answer."""

    model_config = ConfigDict(title="slime")
    name: ClassVar[str] = "slime"
    recognised_by: ClassVar[str] = "response"
    same_length: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[Mapping[str, Any]] = {"prompt": "2+2=", "response": "4", "label": ""}
    answer_schema: ClassVar[Mapping[str, Any]] = {"type": "number"}

    prompt: Chat
    response: Text
    label: Annotated[Any, Field(description=LABEL)] = None

    def pairs(self, id_column: str | None) -> list[Pair]:
        """Give the only pair of the request."""
        return [Pair(self.prompt, self.response, as_id(frameworks.identifier(self.label, id_column)))]

    def answer(self, scores: Sequence[Score]) -> float:
        """Give the reward as a bare number."""
        return collect_numbers(scores)[0]


class LlamaFactory(BaseModel):
    """LLaMA-Factory's `reward_model_type: api`; each of its `messages` is a text, a prompt followed by a response."""

    model_config = ConfigDict(title="LLaMA-Factory")
    name: ClassVar[str] = "llamafactory"
    recognised_by: ClassVar[str] = "messages"
    same_length: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[Mapping[str, Any]] = {"model": "model", "messages": ["2+2=4"]}
    answer_schema: ClassVar[Mapping[str, Any]] = describe_answer("scores")

    model: Annotated[Any, WithJsonSchema({"type": "string"})] = "model"
    messages: Texts

    def pairs(self, id_column: str | None) -> list[Pair]:
        """List the texts, to be split after the longest prompt that the table knows."""
        return [Pair(None, each) for each in self.messages]

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Give the scores with the other members that LLaMA-Factory's own server sends."""
        return {
            "id": f"scoreval-{uuid4().hex}",
            "object": "score.evaluation",
            "model": self.model if isinstance(self.model, str) else "model",
            "scores": collect_numbers(scores),
        }


DIALECTS: tuple[Dialect, ...] = (Native, OpenRlhf, LightRft, Slime, LlamaFactory)


def parse_request(payload: dict[str, Any], limits: Limits, dialects: Sequence[Dialect] = DIALECTS) -> ParsedRequest:
    """Read a request as the dialect whose field it has; `Refused` with field, rule and value if it is malformed."""
    recognised = [dialect for dialect in dialects if dialect.recognised_by in payload]
    if len(recognised) != 1:
        names = " or ".join(dialect.recognised_by for dialect in dialects)
        several = " and ".join(dialect.recognised_by for dialect in recognised) or "none"
        raise Refused(422, f"a request has one of {names}, got {several} in {start_of(sorted(payload), 200)}")
    try:
        # Strict: nothing is converted, so that the reward model reads what the client sent.
        request = recognised[0].model_validate(payload, strict=True, context=limits)
    except ValidationError as invalid:
        raise refuse_malformed(payload, invalid) from None
    field = recognised[0].recognised_by
    for name in recognised[0].same_length:
        items, others = getattr(request, field), getattr(request, name)
        if others is not None and len(others) != len(items):
            rule = f"{name} has an item for each of {field}"
            raise Refused(422, f"{rule}, got {len(others)} for {len(items)}")
    return request


def split_queries(
    name: str, queries: list[str], prompts: list[str] | None, labels: list[Any] | None, id_column: str | None
) -> list[Pair]:
    """Split texts after the prompts in them, as the adapters do, with ids from labels; all in one without prompts."""
    ids = [as_id(frameworks.identifier(label, id_column)) for label in labels or [None] * len(queries)]
    if prompts is None:
        return [Pair(None, query, identifier) for query, identifier in zip(queries, ids, strict=True)]
    pairs = []
    for at, (query, prompt, identifier) in enumerate(zip(queries, prompts, ids, strict=True)):
        try:
            completion = frameworks.completion_of(query, prompt)
        except ValueError as error:
            raise Refused(422, f"{name}[{at}]: {error}") from None
        pairs.append(Pair(prompt, completion, identifier))
    return pairs


def as_id(value: Any) -> str | int | None:
    """Take a text or a whole number for an id; None for all else.

    >>> [as_id(value) for value in ("p7", 7, "", None, 0.5, True, [7])]
    ['p7', 7, None, None, None, None, None]
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return None
        return value or None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def collect_details(scores: Sequence[Score]) -> dict[str, list[float]]:
    """List raw scores, quantiles and hits, under the same names always."""
    return {
        "raw": [score.raw for score in scores],
        "u": [score.u for score in scores],
        "hit": [int(score.known) for score in scores],
    }


def collect_numbers(scores: Sequence[Score]) -> list[float]:
    """List the rewards, for clients that cannot read null; `Refused` with 404 if one is None (on_missing="skip")."""
    rewards = [score.reward for score in scores if score.reward is not None]
    if len(rewards) < len(scores):
        unknown = len(scores) - len(rewards)
        raise Refused(404, f"the table has no references for {unknown} of {len(scores)} prompts, and they are skipped")
    return rewards
