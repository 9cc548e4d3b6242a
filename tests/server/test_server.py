"""The reward server: each dialect as its client sends it, the token, the limits, and what fails."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from pydantic import BaseModel

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.prompts import id_key
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.lookup import Score
from calibrated_rewards.server.app import PATHS, create_app, describe_requests, serve, serve_replicas
from calibrated_rewards.server.dialects import DIALECTS, Dialect, Pair, collect_numbers, describe_answer
from calibrated_rewards.server.fields import Items, Text
from calibrated_rewards.server.limits import Limits
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.theory.transforms import Exponential

REFERENCES = {"2+2=": [1.0, 2.0, 3.0, 5.0], "2+2=4, ": [0.0, 7.0], "Hello": [-1.0, 0.0, 1.0]}
CHAT = [{"role": "user", "content": "Hi"}]
TOKEN = "a-token.of_12~"
PAIR = {"prompts": ["2+2="], "completions": ["4"]}


class Poisoned:
    """Numbers, but for a completion that no reward model can read."""

    def __init__(self):
        self.batches = []
        self.lock = threading.Lock()

    def __call__(self, prompts, completions):
        """Fails for a whole batch if one of it is poison."""
        with self.lock:
            self.batches.append(len(completions))
        if "poison" in completions:
            raise RuntimeError("CUDA error in /home/somebody/secret.py")
        return NumberScorer()(prompts, completions)


class Hanging:
    """Does not answer before it is let go."""

    def __init__(self):
        self.let_go = threading.Event()

    def __call__(self, prompts, completions):
        """Numbers, late."""
        self.let_go.wait(20)
        return NumberScorer()(prompts, completions)


def a_reward(scorer=None, **options):
    table = ReferenceTable.build([*REFERENCES.items(), (CHAT, [1.0, 2.0])])
    return CalibratedReward(scorer or NumberScorer(), table, **options)


@asynccontextmanager
async def client(app=None, **options):
    app = app or create_app(a_reward(), verify=False)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server", **options) as made:
        yield made


def ask(payload, path="/", app=None):
    """One request; bytes as they are, all else as JSON."""

    async def asked():
        async with client(app) as one:
            content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            return await one.post(path, content=content)

    return asyncio.run(asked())


def expected(pairs, **options):
    """What the reward gives in this process, by the list."""
    prompts, completions = map(list, zip(*pairs, strict=True))
    return a_reward(**options).score(prompts, completions)


def counted(app, name):
    """A number of /metrics."""

    async def page():
        async with client(app) as one:
            return (await one.get("/metrics")).text

    lines = [line.rpartition(" ") for line in asyncio.run(page()).splitlines()]
    return {head: float(value) for head, _, value in lines if head == f"calibrated_reward_{name}"}.popitem()[1]


@pytest.mark.parametrize("path", PATHS)
def test_native(path) -> None:
    """Every path takes the native dialect: four lists, the numbers of the reward in this process, messages too."""
    pairs = [("2+2=", "4"), ("Hello", "0"), (CHAT, [{"role": "assistant", "content": "1.5"}])]
    prompts, completions = map(list, zip(*pairs, strict=True))
    answer = ask({"prompts": prompts, "completions": completions}, path).json()
    scores = expected(pairs)
    assert answer == {
        "reward": scores.reward,
        "raw": scores.raw.tolist(),
        "u": scores.u.tolist(),
        "hit": [1, 1, 1],
    }


def test_openrlhf() -> None:
    """Its client reads rewards, scores and extra_logs; a query is the prompt and then the completion."""
    options = {"scorer": HashScorer(), "transform": Exponential(3.0)}
    payload = {"query": ["2+2=4", "Hello2"], "prompts": ["2+2=", "Hello"], "labels": ["", None]}
    answer = ask(payload, "/get_reward", create_app(a_reward(**options), verify=False)).json()
    scores = expected([("2+2=", "4"), ("Hello", "2")], **options)
    assert answer["rewards"] == scores.reward
    assert answer["scores"] == scores.u.tolist() == answer["extra_logs"]["u"]
    assert answer["extra_logs"]["raw"] == scores.raw.tolist()


def test_lightrft_and_slime_and_llama_factory() -> None:
    """Their clients read a list, a bare number, and scores of glued texts (split after the longest known prompt)."""
    u = expected([("2+2=", "4"), ("2+2=4, ", "5")]).u.tolist()
    assert ask({"queries": ["2+2=4"], "prompts": ["2+2="]}).json() == {"rewards": u[:1]}
    assert ask({"prompt": "2+2=", "response": "4", "label": {"answer": 4}}).json() == u[0]
    assert ask({"prompt": CHAT, "response": "1.5", "label": None}).json() == 0.5
    answer = ask({"model": "mine", "messages": ["2+2=4", "2+2=4, 5"]}, "/v1/score/evaluation").json()
    assert (answer["object"], answer["model"], answer["scores"]) == ("score.evaluation", "mine", u)


def test_nothing_asked_is_answered() -> None:
    """OpenRLHF sends empty lists to all servers but the first: 200, and the same fields as ever."""
    assert ask({"query": [], "prompts": [], "labels": []}).json() == {
        "rewards": [],
        "scores": [],
        "extra_logs": {"raw": [], "u": [], "hit": []},
    }
    assert ask({"queries": [], "prompts": []}).json() == {"rewards": []}
    assert ask({"model": "m", "messages": []}).json()["scores"] == []
    assert ask({"prompts": [], "completions": []}).json() == {"reward": [], "raw": [], "u": [], "hit": []}


@pytest.mark.parametrize("label", [7, "7", {"uid": 7, "answer": 3}])
def test_labels_are_ids_to_a_reward_that_has_an_id_column(label) -> None:
    """They find the row whatever the prompt looks like; to another reward a label is an answer that may be any text."""
    table = ReferenceTable.build([(id_key(7), [1.0, 2.0, 3.0, 5.0])])
    named, unnamed = (
        create_app(CalibratedReward(NumberScorer(), table, id_column=c), verify=False) for c in ("uid", None)
    )
    glued = {"query": ["<user>2+2=4"], "prompts": ["<user>2+2="], "labels": [label]}
    one = {"prompt": "<user>2+2=", "response": "4", "label": label}
    assert ask(glued, "/", named).json()["rewards"] == [0.75]
    assert ask(one, "/", named).json() == 0.75
    assert ask(glued, "/", unnamed).status_code == ask(one, "/", unnamed).status_code == 404


@pytest.mark.parametrize("field", ["query", "queries"])
def test_an_id_without_a_prompt_is_refused(field) -> None:
    """The text would be split after a known prompt, and the id not looked at; an answer is no id."""
    request = {field: ["2+2=4"], "labels": ["7"]}
    answer = ask(request, "/", create_app(a_reward(id_column="uid"), verify=False))
    assert (answer.status_code, answer.json()["error"].partition(",")[0]) == (422, "an id needs a prompt")
    assert ask(request, "/", create_app(a_reward(), verify=False)).json()["rewards"] == [0.75]
    assert ask({**request, "labels": [""]}, "/", create_app(a_reward(id_column="uid"), verify=False)).is_success


def test_labels_that_are_no_ids() -> None:
    """They leave the prompt to be looked up."""
    app = create_app(a_reward(id_column="uid"), verify=False)
    for label in ("", None, 0.5, True, [7], {"answer": 7}, {"uid": [7]}):
        assert ask({"prompt": "2+2=", "response": "4", "label": label}, "/", app).json() == 0.75, label


def test_ids_are_ids_to_any_reward() -> None:
    """The native dialect's field can mean nothing else."""
    table = ReferenceTable.build([(id_key(7), [1.0, 2.0, 3.0, 5.0])])
    app = create_app(CalibratedReward(NumberScorer(), table), verify=False)
    for own in (7, "7"):
        assert ask({"prompts": ["?"], "completions": ["4"], "ids": [own]}, "/", app).json()["reward"] == [0.75]


@pytest.mark.parametrize("field", ["query", "queries"])
def test_padding_around_a_glued_text(field) -> None:
    """What comes before the prompt is left out, what `endings` names is taken off the end."""
    reward = a_reward(HashScorer(), endings=("<pad>",))
    answer = ask({field: ["<pad><pad>2+2=4<pad>"], "prompts": ["2+2="]}, "/", create_app(reward, verify=False)).json()
    assert answer["rewards"] == reward.score(["2+2="], ["4"]).reward


@pytest.mark.parametrize(
    ("status", "payload"),
    [
        (400, b"{"),
        (400, b"\xff"),
        (400, b""),
        (400, b'{"prompts": [NaN], "completions": []}'),
        (400, b'{"prompts": [' + b"1" * 5000 + b'], "completions": []}'),
        (422, b"[" * 100_000),
        (422, b'{"a":' * 40 + b"1" + b"}" * 40),
        (422, []),
        (422, {}),
        (422, {"prompts": ["2+2="]}),
        (422, {"prompts": ["2+2="], "completions": []}),
        (422, {"prompts": "2+2=", "completions": "4"}),
        (422, {"prompts": [7], "completions": ["4"]}),
        (422, {"prompts": [[]], "completions": ["4"]}),
        (422, {"prompts": ["2+2="], "completions": [[{"role": "user", "content": {"a": 1}}]]}),
        (422, {"prompts": ["2+2="], "completions": [[{"role": "user", "tool_calls": 7}]]}),
        (422, {"prompts": ["2+2="], "completions": ["\ud800"]}),
        (422, {"prompts": ["2+2="], "completions": ["4"], "ids": 7}),
        (422, {"query": ["3+3=6"], "prompts": ["2+2="], "labels": [""]}),
        (422, {"query": ["2+2=4"], "queries": ["2+2=4"]}),
        (422, {"query": ["2+2=4"], "prompts": ["2+2="], "labels": []}),
        (422, {"prompt": "2+2=", "response": None}),
        (422, {"model": "m", "messages": CHAT}),
        (404, {"prompts": ["3+3="], "completions": ["6"]}),
        (404, {"model": "m", "messages": ["3+3=6"]}),
    ],
)
def test_malformed(status, payload) -> None:
    """What cannot be understood is refused with its status and a message."""
    answer = ask(payload)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]


def test_sizes() -> None:
    """413 for a body, a text, a list that is too long, and before anything is scored."""
    scorer = Poisoned()
    app = create_app(a_reward(scorer), limits=Limits(body=1000, text=100, pairs=3), verify=False)
    for payload in (b" " * 1001, {"prompts": ["2+2="] * 4, "completions": ["4"] * 4}, _asks("4".rjust(101))):
        assert ask(payload, "/", app).status_code == 413
    assert ask(_asks("4".rjust(100)), "/", app).status_code == 200
    assert scorer.batches == [1]


def test_a_chunked_body_is_cut_off_at_the_limit() -> None:
    """Without a Content-Length nothing is believed: what is read is counted, and no more is read than the limit."""
    sent = []

    async def chunks():
        for _ in range(1000):
            sent.append(1)
            yield b" " * 100

    async def asked():
        async with client(create_app(a_reward(), limits=Limits(body=1000), verify=False)) as one:
            return await one.post("/", content=chunks())

    assert asyncio.run(asked()).status_code == 413
    assert len(sent) <= 12


def test_many_bodies_at_once_are_refused() -> None:
    """The bytes of all bodies together have a limit, and are given back when a request is answered."""
    app = create_app(a_reward(), limits=Limits(held=1500), verify=False)
    ten = threading.Event()

    async def slow():
        yield b'{"prompts": [], "completions": []}' + b" " * 900
        while not ten.is_set():
            await asyncio.sleep(0.001)
        yield b" "

    async def asked():
        async with client(app) as one:
            first = asyncio.create_task(one.post("/", content=slow()))
            await asyncio.sleep(0.02)
            second = await one.post("/", content=b" " * 900)
            ten.set()
            return [
                (await first).status_code,
                second.status_code,
                (await one.post("/", content=json.dumps(PAIR).rjust(900))).status_code,
            ]

    assert asyncio.run(asked()) == [200, 503, 200]


def test_a_body_that_does_not_arrive() -> None:
    """408, not a connection for ever."""

    async def never():
        yield b"{"
        await asyncio.sleep(10)

    async def asked():
        async with client(create_app(a_reward(), limits=Limits(body_seconds=0.05), verify=False)) as one:
            return await one.post("/", content=never())

    assert asyncio.run(asked()).status_code == 408


def test_poison_fails_alone(caplog) -> None:
    """Of requests that share a batch only the one that cannot be scored fails, and its answer shows no path."""
    scorer = Poisoned()
    app = create_app(a_reward(scorer), limits=Limits(wait=0.05), verify=False)
    texts = [str(i) for i in range(20)]
    texts[13] = "poison"

    async def asked():
        async with client(app) as one:
            return await asyncio.gather(*[one.post("/", json=_asks(text)) for text in texts])

    with caplog.at_level(logging.CRITICAL):
        answers = asyncio.run(asked())
    assert [answer.status_code for answer in answers] == [200] * 13 + [500] + [200] * 6
    assert answers[13].json() == {"error": "the reward model failed (RuntimeError); the server's log tells more"}
    assert [answer.json()["raw"][0] for answer in answers if answer.status_code == 200] == [*range(13), *range(14, 20)]
    assert max(scorer.batches) >= 10
    assert counted(app, "failures_total") == 1


def test_a_model_that_hangs_costs_no_memory() -> None:
    """504 for those who waited, 503 with Retry-After for those who come when the queue is full, then all is well."""
    scorer = Hanging()
    limits = Limits(queue=4, batch=2, answer_seconds=0.3)
    app = create_app(a_reward(scorer), limits=limits, verify=False)

    async def asked():
        async with client(app) as one:
            first = asyncio.create_task(one.post("/", json=_asks("1")))
            await asyncio.sleep(0.1)
            others = await asyncio.gather(*[one.post("/", json=_asks("2")) for _ in range(9)])
            scorer.let_go.set()
            await first
            await asyncio.sleep(0.1)
            return [await first, *others], await one.post("/", json=_asks("4"))

    answers, late = asyncio.run(asked())
    assert sorted(answer.status_code for answer in answers) == [503] * 5 + [504] * 5
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert late.status_code == 200


def test_unknown_prompts_do_not_disturb_others() -> None:
    """404 for the one, with a message that shows its prompt and no path, and 200 for those of its batch."""
    app = create_app(a_reward(), limits=Limits(wait=0.05), verify=False)

    async def asked():
        async with client(app) as one:
            unknown = one.post("/", json={"prompts": ["3+3="], "completions": ["6"]})
            return await asyncio.gather(unknown, *[one.post("/", json=PAIR) for _ in range(5)])

    answers = asyncio.run(asked())
    assert [answer.status_code for answer in answers] == [404] + [200] * 5
    assert "'3+3='" in answers[0].json()["error"]
    assert counted(app, "misses_total") == 1


def test_no_path_of_the_table_is_shown(tmp_path) -> None:
    """The message of an unknown prompt names the table, but not where on the server it lies."""
    reward = CalibratedReward(NumberScorer(), calibrate(["2+2="], NumberSampler(), NumberScorer(), k=4, out=tmp_path))
    answer = ask({"prompts": ["3+3="], "completions": ["6"]}, "/", create_app(reward))
    assert answer.status_code == 404
    assert str(tmp_path) not in answer.text


def test_skipped_and_neutral_prompts() -> None:
    """null where a client can read it; a number, or 404, where it cannot."""
    unknown = {"prompts": ["3+3="], "completions": ["6"]}
    query = {"query": ["3+3=6"], "prompts": ["3+3="], "labels": [""]}
    skip, neutral = (create_app(a_reward(on_missing=how), verify=False) for how in ("skip", "neutral"))
    assert ask(unknown, "/", skip).json() == {"reward": [None], "raw": [6.0], "u": [0.5], "hit": [0]}
    assert ask(query, "/", skip).status_code == 404
    assert ask(query, "/", neutral).json()["rewards"] == [0.5]


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/openapi.json", "/docs", "/nothing", "/t/wrong/health"])
def test_without_the_token_there_is_nothing(path) -> None:
    """The same 401 whatever is asked for and however near the token is; with it, each of three ways works."""
    app = create_app(a_reward(), token=TOKEN, verify=False)
    wrong = [{}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}]

    async def asked():
        async with client(app) as one:
            answers = [await one.request(how, path, headers=each) for each in wrong for how in ("GET", "POST")]
            return [*answers, await one.get(path, params={"token": TOKEN[:-1]}), await one.get(f"/t/{TOKEN}x{path}")]

    answers = asyncio.run(asked())
    assert {(answer.status_code, answer.text) for answer in answers} == {
        (401, '{"error": "this server wants its token"}')
    }


def test_the_token_in_three_places() -> None:
    """In a header, in the query, in the path; and a wrong one beside the right one does no harm."""
    app = create_app(a_reward(), token=TOKEN, verify=False)

    async def asked():
        async with client(app) as one:
            bearer = {"Authorization": f"bearer {TOKEN}"}
            yes = [
                await one.post("/score", json=PAIR, headers=bearer),
                await one.post(f"/score?x=1&token={TOKEN}", json=PAIR),
                await one.post(f"/t/{TOKEN}/score", json=PAIR),
                await one.post(f"/t/{TOKEN}/", json=PAIR),
                await one.post(f"/t/{TOKEN}", json=PAIR),
                await one.post("/score?token=wrong", json=PAIR, headers=bearer),
            ]
            return [answer.json()["u"] for answer in yes]

    assert asyncio.run(asked()) == [[0.75]] * 6


def test_refusals_at_the_start() -> None:
    """An address that others can reach needs a token; a token must be one; a wrong reward model is refused."""
    with pytest.raises(ValueError, match=r"0\.0\.0\.0: serve needs a token"):
        serve(a_reward(), "0.0.0.0", verify=False)
    with pytest.raises(ValueError, match=r"10\.0\.0\.1: serve needs a token"):
        serve_replicas(a_reward, 2, host="10.0.0.1")
    with pytest.raises(ValueError, match="replicas >= 1, got replicas=0"):
        serve_replicas(a_reward, 0)
    for token in ("", "short", "with space in it", "ünicode-token"):
        with pytest.raises(ValueError, match="a token has 8 or more"):
            create_app(a_reward(), token=token, verify=False)
    probe = {"prompt": "2+2=", "completion": "4", "score": 4.0}
    table = ReferenceTable.build(list(REFERENCES.items()), meta={"probes": [probe]})
    create_app(CalibratedReward(NumberScorer(), table))
    with pytest.raises(ValueError, match="not the one that the table was made with"):
        create_app(CalibratedReward(lambda prompts, _: np.zeros(len(prompts)), table))


def test_health_metrics_and_schema() -> None:
    """What is served; what was counted: requests by dialect and status, mean u, saturated; a schema with examples."""
    app = create_app(a_reward(), verify=False)
    for completion in ("4", "9", "-9"):
        ask({"prompt": "2+2=", "response": completion}, "/", app)
    ask(b"{", "/", app)

    async def pages():
        async with client(app) as one:
            return [(await one.get(path)) for path in ("/health", "/metrics", "/openapi.json", "/nothing", "/score")]

    health, metrics, schema, *missing = asyncio.run(pages())
    assert (health.status_code, health.json()["ready"], health.json()["table"]) == (
        200,
        True,
        {"prompts": 4, "references": 11},
    )
    assert 'calibrated_reward_requests_total{dialect="slime",status="200"} 3.0' in metrics.text
    assert 'calibrated_reward_requests_total{dialect="none",status="400"} 1.0' in metrics.text
    assert counted(app, "u_sum") / counted(app, "u_count") == pytest.approx((0.75 + 1.0 + 0.0) / 3)
    assert counted(app, "saturated_total") == 2
    assert counted(app, "queue") == 0
    assert [answer.status_code for answer in missing] == [404, 405]
    app.state.shutdown.begun = True
    assert asyncio.run(_get(app, "/health")).status_code == 503
    body = schema.json()["paths"]["/get_reward"]["post"]["requestBody"]["content"]["application/json"]
    for name, example in body["examples"].items():
        assert ask(example["value"]).status_code == 200, name


def _asks(text):
    return {"prompts": ["2+2="], "completions": [text]}


async def _get(app, path):
    async with client(app) as one:
        return await one.get(path)


def test_an_address_that_is_taken_is_an_error():
    """Not uvicorn's exit of the whole process, whose status the command line promises for nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        table = ReferenceTable.build([("a", [1.0, 2.0])])
        with pytest.raises(OSError, match=f"nothing can listen on 127.0.0.1:{port}"):
            serve(CalibratedReward(NumberScorer(), table), port=port, verify=False)


class Question(BaseModel):
    """A part of the request below: a prompt and, within a second model, its answer."""

    class Answer(BaseModel):
        """The innermost object."""

        text: Text

    q: Text
    a: Answer


class Nested(BaseModel):
    """A user's dialect, whose request nests objects."""

    name: ClassVar[str] = "nested"
    recognised_by: ClassVar[str] = "inputs"
    same_length: ClassVar[tuple[str, ...]] = ("weights",)
    example: ClassVar[Mapping[str, Any]] = {"inputs": [{"q": "2+2=", "a": {"text": "4"}}], "weights": [2.0]}
    answer_schema: ClassVar[Mapping[str, Any]] = describe_answer("weighted")

    inputs: Items[Question]
    weights: list[float]
    extra: dict[str, Any] | None = None

    def pairs(self, _: str | None) -> list[Pair]:
        """Each question with its answer."""
        return [Pair(each.q, each.a.text) for each in self.inputs]

    def answer(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The rewards times their weights."""
        numbers = collect_numbers(scores)
        return {"weighted": [weight * number for weight, number in zip(self.weights, numbers, strict=True)]}


def test_a_dialect_is_one_class() -> None:
    """A user's dialect beside the others, over HTTP; the page describes it without pointers out of itself."""
    assert all(hasattr(Nested, name) for name in Dialect.__annotations__)
    app = create_app(a_reward(), verify=False, dialects=(*DIALECTS, Nested))
    assert ask(Nested.example, "/", app).json() == {"weighted": [1.5]}
    assert ask(PAIR, "/", app).json()["reward"] == [0.75]
    assert counted(app, 'requests_total{dialect="nested",status="200"}') == 1
    page = asyncio.run(_get(app, "/openapi.json")).json()
    post = page["paths"]["/get_reward"]["post"]
    request = post["requestBody"]["content"]["application/json"]
    assert request["examples"]["nested"]["value"] == Nested.example
    assert "$defs" not in json.dumps(page)
    assert "$ref" not in json.dumps(request)
    properties = request["schema"]["anyOf"][-1]["properties"]["inputs"]["items"]["properties"]
    assert properties["a"]["properties"]["text"]["type"] == "string"
    answers = post["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert answers[-1] == {"title": "nested", **Nested.answer_schema}


def test_a_list_of_objects_is_limited() -> None:
    """A dialect's own objects count as completions do."""
    app = create_app(a_reward(), verify=False, limits=Limits(pairs=2), dialects=(*DIALECTS, Nested))
    answer = ask({"inputs": Nested.example["inputs"] * 3, "weights": [1.0] * 3}, "/", app)
    assert (answer.status_code, answer.json()["error"]) == (413, "inputs has at most 2 items, got 3")


def test_a_request_is_of_one_dialect() -> None:
    """One that has the fields of two, or of none, is refused with those that it has."""
    names = "a request has one of completions or query or queries or response or messages, got"
    for request, got in (
        ({"query": [], "queries": []}, "query and queries in ['queries', 'query']"),
        ({"prompts": []}, "none in ['prompts']"),
    ):
        answer = ask(request)
        assert (answer.status_code, answer.json()["error"]) == (422, f"{names} {got}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [{"a": {"text": "4"}}]}, "inputs[0].q is missing from the request"),
        ({"inputs": [{"q": "2+2=", "a": {}}]}, "inputs[0].a.text is missing from the request"),
        ({"inputs": [{"q": "2+2=", "a": {"text": 4}}]}, "inputs[0].a.text is a text, got int 4"),
        ({"inputs": [{"q": "2+2=", "a": "4"}]}, "inputs[0].a is an object, got str '4'"),
        ({"inputs": [7]}, "inputs[0] is an object, got int 7"),
        ({"extra": 7}, "extra is an object, got int 7"),
        ({"weights": ["2"]}, "weights[0] is a number, got str '2'"),
        ({"weights": [1.0, 2.0]}, "weights has an item for each of inputs, got 2 for 1"),
        ({"weights": None}, "weights is a list, got nothing"),
    ],
)
def test_errors_name_the_whole_path(change, message) -> None:
    """An error about a nested object names each step to it, and its rule is one of objects, not of messages."""
    app = create_app(a_reward(), verify=False, dialects=(*DIALECTS, Nested))
    answer = ask({**Nested.example, **change}, "/", app)
    assert (answer.status_code, answer.json()["error"]) == (422, message)


class Tree(BaseModel):
    """A model that nests itself."""

    tree: list["Tree"]


def test_a_model_that_nests_itself_is_described() -> None:
    """Its description ends."""

    class Trees(Tree, Nested):
        recognised_by: ClassVar[str] = "tree"

    schema = describe_requests([Trees])["requestBody"]["content"]["application/json"]["schema"]["anyOf"][0]
    assert "$ref" not in json.dumps(schema)
    assert schema["properties"]["tree"]["type"] == "array"
