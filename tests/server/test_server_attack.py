"""Nonsense of every kind at the reward server: 4xx, never 5xx, and the good requests beside it are answered."""

import asyncio
import json

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies as st
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.server.app import PATHS, create_app
from calibrated_rewards.server.dialects import DIALECTS
from calibrated_rewards.server.limits import Limits
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import HashScorer

GOOD = {"prompts": ["2+2="], "completions": ["4"]}
# All letters that JSON can say, halves of characters too.
ANY_TEXT = st.text(st.characters(), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
EXAMPLES = [dialect.example for dialect in DIALECTS]
WORDS = sorted({name for example in EXAMPLES for name in example} | {"role", "content", "tool_calls", "uid"})
NAMES = st.sampled_from(WORDS) | ANY_TEXT
ANY_JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)


@st.composite
def spoilt(draw):
    """A good request of some dialect, in which one thing or more is something else, or gone."""
    payload = json.loads(json.dumps(draw(st.sampled_from(sorted(EXAMPLES, key=str)))))
    for name in draw(st.lists(st.sampled_from(sorted(payload)), min_size=1, unique=True)):
        what = draw(st.sampled_from(["gone", "other", "item", "more"]))
        if what == "gone" or name not in payload:
            payload.pop(name, None)
        elif what == "item" and isinstance(payload[name], list):
            payload[name] = [draw(ANY_JSON)]
        elif what == "more" and isinstance(payload[name], list):
            payload[name] = payload[name] * draw(st.integers(2, 5))
        else:
            payload[name] = draw(ANY_JSON)
    return payload


@st.composite
def cut(draw):
    """The bytes of a good request with some of them gone, doubled, or others."""
    data = bytearray(json.dumps(draw(st.sampled_from(sorted(EXAMPLES, key=str)))).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        data[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(data)


def written(payload):
    """As JSON, with what JSON cannot say (nan) as Python writes it."""
    return json.dumps(payload).encode()


BODIES = st.binary(max_size=200) | ANY_JSON.map(written) | spoilt().map(written) | cut()


def an_app(token=None):
    """A server that knows the examples' prompt, with limits that bodies of a test can reach."""
    table = ReferenceTable.build([("2+2=", [-1.0, 0.0, 1.0])])
    limits = Limits(body=4096, text=100, pairs=4, depth=8, wait=0.001)
    return create_app(CalibratedReward(HashScorer(), table), token=token, limits=limits, verify=False)


def check(answer, body):
    """Refused with a message, or, where the body is good by chance, answered."""
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, body)
    assert answer.status_code == 200 or list(answer.json()) == ["error"], body


async def both(app, body, path="/"):
    """A body, and a good request in its company."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return await asyncio.gather(client.post(path, content=body), client.post(path, json=GOOD))


APP = an_app()


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(BODIES, st.sampled_from(PATHS))
def test_nonsense(body, path) -> None:
    """Any bytes, any JSON, good requests with something else in them: a refusal, and the good one beside it is well."""
    answer, good = asyncio.run(both(APP, body, path))
    check(answer, body)
    assert good.status_code == 200
    assert good.json()["raw"] == HashScorer()(["2+2="], ["4"]).tolist()


def cases(app):
    """Strategies for the schema's own operations: what it allows, as schemathesis draws it."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    return [operation.ok().as_strategy() for operation in schema.get_all_operations()]


SCHEMA_APP = an_app()


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.one_of(cases(SCHEMA_APP)))
def test_what_the_schema_allows(case) -> None:
    """No request that schemathesis makes of the schema is answered with 5xx, or with what the schema does not know."""
    answer = case.call()
    assert answer.status_code < 500, case.body
    case.validate_response(answer, checks=[status_code_conformance, response_schema_conformance])
