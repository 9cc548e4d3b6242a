"""The fields of a request, checked: each error names the field, the rule, and what came.

What the frameworks' clients send, and what they read of the answer: five dialects, told apart by a field's name.

>>> dialect_of({"query": ["2+2=4"], "prompts": ["2+2="], "labels": [""]})
OpenRlhf(name='openrlhf', field='query')
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

from calibrated_rewards.prompts import canonical_chat, start_of
from calibrated_rewards.reward import frameworks as handed_over
from calibrated_rewards.reward.scores import Score
from calibrated_rewards.server.limits import Limits, Refused


def texts(payload: dict[str, Any], name: str, limits: Limits) -> list[str]:
    """A list of texts."""
    return [text(each, f"{name}[{at}]", limits) for at, each in enumerate(several(payload, name, limits))]


def chats(payload: dict[str, Any], name: str, limits: Limits) -> list[Any]:
    """A list whose items are texts or lists of messages."""
    return [chat(each, f"{name}[{at}]", limits) for at, each in enumerate(several(payload, name, limits))]


def several(payload: dict[str, Any], name: str, limits: Limits) -> list[Any]:
    """A list, not too long."""
    given = payload.get(name)
    if not isinstance(given, list):
        raise Refused(422, f"{name} is a list, got {_shown(given)}")
    if len(given) > limits.pairs:
        raise Refused(413, f"a request has at most {limits.pairs} completions, got {len(given)} {name}")
    return given


def text(given: Any, name: str, limits: Limits) -> str:
    """A text, not too long, of whole characters."""
    if not isinstance(given, str):
        raise Refused(422, f"{name} is a text, got {_shown(given)}")
    if len(given) > limits.text:
        raise Refused(413, f"{name} has at most {limits.text} characters, got {len(given)}")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise Refused(422, f"{name} has half a character (a lone surrogate) at {error.start}") from None
    return given


def chat(given: Any, name: str, limits: Limits) -> Any:
    """A text, or a list of messages."""
    if isinstance(given, str):
        return text(given, name, limits)
    if not isinstance(given, list) or not given:
        raise Refused(422, f"{name} is a text or a list of messages, got {_shown(given)}")
    for at, message in enumerate(given):
        check_message(message, f"{name}[{at}]")
    try:
        text(canonical_chat(given), name, limits)
    except (TypeError, ValueError) as error:
        raise Refused(422, f"{name}: {error}") from None
    return given


def check_message(message: Any, name: str) -> None:
    """Refuse what no chat template reads."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused(422, f"{name} is a message with a role and content, got {_shown(message)}")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(map(_part, parts)):
        raise Refused(422, f"{name}.content is a text or a list of parts with a type, got {_shown(content)}")
    calls = message.get("tool_calls")
    if not (calls is None or (isinstance(calls, list) and all(isinstance(call, dict) for call in calls))):
        raise Refused(422, f"{name}.tool_calls is a list of objects, got {_shown(calls)}")


def as_many(given: Sequence[Any], name: str, as_: str, count: int) -> None:
    """Refuse lists of different lengths."""
    if len(given) != count:
        raise Refused(422, f"{name} has an item for each of {as_}, got {len(given)} for {count}")


def each_of(payload: dict[str, Any], name: str, as_: str, count: int) -> list[Any]:
    """A list of anything, as long as another one; of nothing where it is not there."""
    if payload.get(name) is None:
        return [None] * count
    given = payload[name]
    if not isinstance(given, list):
        raise Refused(422, f"{name} is a list, got {_shown(given)}")
    as_many(given, name, as_, count)
    return given


def identifier(given: Any) -> str | int | None:
    """An id: a text or a whole number; None for all else.

    >>> [identifier(given) for given in ("p7", 7, "", None, 0.5, True, [7])]
    ['p7', 7, None, None, None, None, None]
    """
    if isinstance(given, str):
        try:
            given.encode()
        except UnicodeEncodeError:
            return None
        return given or None
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def _part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type"), str))


def _shown(given: Any) -> str:
    return "nothing" if given is None else f"{type(given).__name__} {start_of(given)}"


@dataclass(frozen=True)
class Ask:
    """One completion to be scored; or a text that prompt and completion are glued into, and then there is no prompt."""

    prompt: Any
    completion: Any
    id: str | int | None = None


@runtime_checkable
class Dialect(Protocol):
    """How one kind of client asks, and what it wants to hear."""

    @property
    def name(self) -> str:
        """What the metrics call it."""

    @property
    def field(self) -> str:
        """The field that only this dialect has."""

    def asks(self, payload: dict[str, Any], limits: Limits, id_column: str | None) -> list[Ask]:
        """The completions of a request to a reward with this `id_column`; `Refused` if it is malformed."""

    def answer(self, payload: dict[str, Any], scores: Sequence[Score]) -> Any:
        """What it reads, as JSON."""


@dataclass(frozen=True)
class Native:
    """This library's own: everything that is known of each pair."""

    name: str = "native"
    field: str = "completions"

    def asks(self, payload: dict[str, Any], limits: Limits, id_column: str | None) -> list[Ask]:
        """Pairs, and ids if there are any, which are ids whatever the reward's `id_column`."""
        completions = chats(payload, "completions", limits)
        prompts = chats(payload, "prompts", limits)
        as_many(prompts, "prompts", "completions", len(completions))
        ids = map(identifier, each_of(payload, "ids", "completions", len(completions)))
        return [Ask(*each) for each in zip(prompts, completions, ids, strict=True)]

    def answer(self, payload: dict[str, Any], scores: Sequence[Score]) -> dict[str, Any]:
        """Four lists; a reward is null where the prompt is unknown and the server skips those."""
        return {"reward": [score.reward for score in scores], **details(scores)}


@dataclass(frozen=True)
class OpenRlhf:
    """OpenRLHF's `--reward.remote_url`: the quantile is its `scores`, by which it filters groups."""

    name: str = "openrlhf"
    field: str = "query"

    def asks(self, payload: dict[str, Any], limits: Limits, id_column: str | None) -> list[Ask]:
        """Texts that have their prompts in them; where there are no prompts, they start with the longest known one."""
        return glued(payload, "query", limits, id_column)

    def answer(self, payload: dict[str, Any], scores: Sequence[Score]) -> dict[str, Any]:
        """Rewards, scores, and lists for its log."""
        logs = details(scores)
        return {"rewards": numbers(scores), "scores": logs["u"], "extra_logs": logs}


@dataclass(frozen=True)
class LightRft:
    """LightRFT's `--remote_rm_url`, which sends no labels."""

    name: str = "lightrft"
    field: str = "queries"

    def asks(self, payload: dict[str, Any], limits: Limits, id_column: str | None) -> list[Ask]:
        """Texts that have their prompts in them, after padding."""
        return glued(payload, "queries", limits, id_column)

    def answer(self, payload: dict[str, Any], scores: Sequence[Score]) -> dict[str, Any]:
        """Rewards."""
        return {"rewards": numbers(scores)}


@dataclass(frozen=True)
class Slime:
    """slime's `--rm-type remote_rm`: one sample a request, one number an answer."""

    name: str = "slime"
    field: str = "response"

    def asks(self, payload: dict[str, Any], limits: Limits, id_column: str | None) -> list[Ask]:
        """One pair."""
        prompt = chat(payload.get("prompt"), "prompt", limits)
        response = text(payload.get("response"), "response", limits)
        return [Ask(prompt, response, identifier_of_dialects(payload.get("label"), id_column))]

    def answer(self, payload: dict[str, Any], scores: Sequence[Score]) -> float:
        """A bare number."""
        return numbers(scores)[0]


@dataclass(frozen=True)
class LlamaFactory:
    """LLaMA-Factory's `reward_model_type: api`: its messages are texts, prompt and response glued."""

    name: str = "llamafactory"
    field: str = "messages"

    def asks(self, payload: dict[str, Any], limits: Limits, id_column: str | None) -> list[Ask]:
        """Texts without a prompt."""
        return [Ask(None, each) for each in texts(payload, "messages", limits)]

    def answer(self, payload: dict[str, Any], scores: Sequence[Score]) -> dict[str, Any]:
        """Scores, in what its own server wraps them in."""
        model = payload.get("model")
        said = model if isinstance(model, str) else "model"
        return {
            "id": f"scoreval-{uuid4().hex}",
            "object": "score.evaluation",
            "model": said,
            "scores": numbers(scores),
        }


DIALECTS: tuple[Dialect, ...] = (Native(), OpenRlhf(), LightRft(), Slime(), LlamaFactory())


def dialect_of(payload: dict[str, Any]) -> Dialect:
    """The dialect of a request."""
    found = [dialect for dialect in DIALECTS if dialect.field in payload]
    if len(found) != 1:
        named = " or ".join(dialect.field for dialect in DIALECTS)
        raise Refused(422, f"a request has one of {named}, got the fields {start_of(sorted(payload), 200)}")
    return found[0]


def details(scores: Sequence[Score]) -> dict[str, list[float]]:
    """What is known of each pair, in the same fields always."""
    return {
        "raw": [score.raw for score in scores],
        "u": [score.u for score in scores],
        "hit": [int(score.known) for score in scores],
    }


def numbers(scores: Sequence[Score]) -> list[float]:
    """The rewards, for clients that cannot read null."""
    given = [score.reward for score in scores if score.reward is not None]
    if len(given) < len(scores):
        unknown = len(scores) - len(given)
        raise Refused(404, f"the table has no references for {unknown} of {len(scores)} prompts, and they are skipped")
    return given


def glued(payload: dict[str, Any], name: str, limits: Limits, id_column: str | None) -> list[Ask]:
    """Texts that have their prompts in them, and labels that may hold ids."""
    queries = texts(payload, name, limits)
    labels = each_of(payload, "labels", name, len(queries))
    if payload.get("prompts") is None:
        return [Ask(None, query) for query in queries]
    prompts = texts(payload, "prompts", limits)
    as_many(prompts, "prompts", name, len(queries))
    ids = [identifier_of_dialects(label, id_column) for label in labels]
    completions = [completion_of(*each, f"{name}[{at}]") for at, each in enumerate(zip(queries, prompts, strict=True))]
    return [Ask(*each) for each in zip(prompts, completions, ids, strict=True)]


def completion_of(query: str, prompt: str, name: str) -> str:
    """What follows the prompt, as the adapters read it."""
    try:
        return handed_over.completion_of(query, prompt)
    except ValueError as error:
        raise Refused(422, f"{name}: {error}") from None


def identifier_of_dialects(label: Any, id_column: str | None) -> str | int | None:
    """The id that a label holds, as the adapters read it; none where it is no text and no whole number.

    >>> [identifier(label, "uid") for label in ("p7", {"uid": 7, "answer": 3}, {"answer": 3}, 0.5)], identifier(7, None)
    (['p7', 7, None, None], None)
    """
    return identifier(handed_over.identifier(label, id_column))
