"""What the frameworks' clients send, and what they read of the answer: five dialects, told apart by a field's name.

>>> dialect_of({"query": ["2+2=4"], "prompts": ["2+2="], "labels": [""]})
OpenRlhf(name='openrlhf', field='query')
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

from calibrated_rewards.prompts import start_of
from calibrated_rewards.reward.calibrated_reward import frameworks as handed_over
from calibrated_rewards.reward.scores import Score
from calibrated_rewards.serving import fields
from calibrated_rewards.serving.limits import Limits, Refused


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
        completions = fields.chats(payload, "completions", limits)
        prompts = fields.chats(payload, "prompts", limits)
        fields.as_many(prompts, "prompts", "completions", len(completions))
        ids = map(fields.identifier, fields.each_of(payload, "ids", "completions", len(completions)))
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
        prompt = fields.chat(payload.get("prompt"), "prompt", limits)
        response = fields.text(payload.get("response"), "response", limits)
        return [Ask(prompt, response, identifier(payload.get("label"), id_column))]

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
        return [Ask(None, each) for each in fields.texts(payload, "messages", limits)]

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
    queries = fields.texts(payload, name, limits)
    labels = fields.each_of(payload, "labels", name, len(queries))
    if payload.get("prompts") is None:
        return [Ask(None, query) for query in queries]
    prompts = fields.texts(payload, "prompts", limits)
    fields.as_many(prompts, "prompts", name, len(queries))
    ids = [identifier(label, id_column) for label in labels]
    completions = [completion_of(*each, f"{name}[{at}]") for at, each in enumerate(zip(queries, prompts, strict=True))]
    return [Ask(*each) for each in zip(prompts, completions, ids, strict=True)]


def completion_of(query: str, prompt: str, name: str) -> str:
    """What follows the prompt, as the adapters read it."""
    try:
        return handed_over.completion_of(query, prompt)
    except ValueError as error:
        raise Refused(422, f"{name}: {error}") from None


def identifier(label: Any, id_column: str | None) -> str | int | None:
    """The id that a label holds, as the adapters read it; none where it is no text and no whole number.

    >>> [identifier(label, "uid") for label in ("p7", {"uid": 7, "answer": 3}, {"answer": 3}, 0.5)], identifier(7, None)
    (['p7', 7, None, None], None)
    """
    return fields.identifier(handed_over.identifier(label, id_column))
