"""Where requests wait: the completions of all of them are scored together, and each is answered on its own.

CalibratedReward over HTTP: one endpoint that speaks the dialects of the frameworks' clients, by their fields.

`calibrated-rewards serve reward/` starts it; docs/guides/serve.md tells what each client sends and reads.
"""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.reward.batching import Coalescer, Full
from calibrated_rewards.reward.scores import Score
from calibrated_rewards.server import bodies as schema
from calibrated_rewards.server.access import Door, Gate, check_token
from calibrated_rewards.server.bodies import Bodies, parsed
from calibrated_rewards.server.dialects import Ask, dialect_of
from calibrated_rewards.server.limits import Limits, Refused
from calibrated_rewards.server.listening import check_address, listen
from calibrated_rewards.server.metrics import Metrics

LOG = logging.getLogger("calibrated_rewards.server.app")


@dataclass(frozen=True)
class Waiting:
    """One completion, and when nobody waits for it any more."""

    ask: Ask
    until: float


@dataclass(frozen=True, eq=False)
class Desk:
    """Takes the completions of a request, and gives their scores."""

    reward: Any
    """A CalibratedReward."""
    limits: Limits
    metrics: Metrics
    coalescer: Coalescer = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        made = Coalescer(self.work, max_batch=limits.batch, max_wait=limits.wait, max_queue=limits.queue)
        object.__setattr__(self, "coalescer", made)

    async def scores(self, asks: Sequence[Ask]) -> list[Score]:
        """The scores of a request's completions; `Refused` if any has none."""
        until = time.monotonic() + self.limits.answer_seconds
        try:
            futures = self.coalescer.submit_all([Waiting(ask, until) for ask in asks])
        except Full as error:
            raise Refused(503, str(error), 1) from None
        waiting = [asyncio.wrap_future(future) for future in futures]
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                # Not cut short by the first that fails: the others of the request are being worked on.
                given = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            raise _late(self.limits) from None
        return self.checked(given)

    def work(self, batch: Sequence[Waiting]) -> list[Score | None]:
        """The scores of completions of any requests, in the coalescer's thread; None where it is too late."""
        now = time.monotonic()
        wanted = [at for at, each in enumerate(batch) if each.until > now]
        found: list[Score | None] = [None] * len(batch)
        pairs = [at for at in wanted if batch[at].ask.prompt is not None]
        texts = [at for at in wanted if batch[at].ask.prompt is None]
        self.metrics.batch_size.observe(len(batch))
        if pairs:
            asks = [batch[at].ask for at in pairs]
            ids = [ask.id for ask in asks]
            prompts, completions = [ask.prompt for ask in asks], [ask.completion for ask in asks]
            self._put(found, pairs, self.reward.score(prompts, completions, ids))
        if texts:
            self._put(found, texts, self.reward.score_texts([batch[at].ask.completion for at in texts]))
        return found

    def _put(self, found: list[Score | None], places: list[int], scores: Any) -> None:
        for at, score in zip(places, scores, strict=True):
            found[at] = score

    def checked(self, given: Sequence[Score | BaseException | None]) -> list[Score]:
        """The scores, if there is one for each; what failed is in the log, and no more than its kind in the answer."""
        scores = [each for each in given if isinstance(each, Score)]
        self.metrics.tell(scores)
        if len(scores) == len(given):
            return scores
        errors = [each for each in given if isinstance(each, BaseException)]
        for error in errors:
            if not isinstance(error, UnknownPromptError):
                self.metrics.failures.inc()
                LOG.error("the reward model failed on a completion", exc_info=error)
                raise Refused(500, f"the reward model failed ({type(error).__name__}); the server's log tells more")
        if errors:
            self.metrics.misses.inc(len(errors))
            raise Refused(404, self._without_path(str(errors[0])))
        raise _late(self.limits)

    def _without_path(self, said: str) -> str:
        path = self.reward.table.path
        return said.replace(str(path), "of this server") if path else said


def _late(limits: Limits) -> Refused:
    return Refused(504, f"the reward model did not answer within {limits.answer_seconds:g} seconds", 1)


__all__ = ["Limits", "create_app", "serve"]

PATHS = ("/", "/get_reward", "/score", "/v1/score/evaluation", "/reward")


def create_app(
    reward: Any,
    *,
    token: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    verify: bool = True,
) -> FastAPI:
    """The server of a reward as an ASGI application; ValueError if the reward model is not the one of the table.

    `token` is asked of every request: `Authorization: Bearer`, `?token=`, or a path that starts with /t/TOKEN.
    """
    check_token(token)
    if verify:
        reward.verify()
    metrics, door = Metrics(), Door()
    # A redirect from /score/ to /score would be to whatever host the request names.
    app = FastAPI(title="calibrated-rewards", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.door = door
    app.add_middleware(Gate, token=token, door=door, metrics=metrics, limits=limits)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _no_such_path)
    _add_scoring(app, Desk(reward, limits, metrics), Bodies(limits))
    _add_looking(app, reward, metrics, door, verified=verify)
    return app


def serve(
    reward: Any,
    host: str = "127.0.0.1",
    port: int = 8900,
    *,
    token: str | None = None,
    insecure: bool = False,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    verify: bool = True,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then answer what was accepted, and return.

    An address that others can reach wants a token, or `insecure=True`.
    """
    check_address(host, token, insecure)
    listen(create_app(reward, token=token, limits=limits, verify=verify), host, port, limits)


def _add_scoring(app: FastAPI, desk: Desk, bodies: Bodies) -> None:
    async def score(request: Request) -> Response:
        """Rewards of completions, in the dialect of the request."""
        async with bodies.read(request.headers, request.receive) as body:
            payload = parsed(body, desk.limits)
            dialect = dialect_of(payload)
            request.scope["dialect"] = dialect.name
            scores = await desk.scores(dialect.asks(payload, desk.limits, desk.reward.id_column))
            return _json(200, dialect.answer(payload, scores))

    desk.metrics.queue.set_function(lambda: desk.coalescer.waiting)
    for path in PATHS:
        name = f"score_{path.strip('/').replace('/', '_')}".strip("_")
        app.post(
            path,
            operation_id=name,
            responses=schema.responses(),
            openapi_extra=schema.request_body(),
            response_class=Response,
        )(score)


def _add_looking(app: FastAPI, reward: Any, metrics: Metrics, door: Door, *, verified: bool) -> None:
    said = {"name": reward.__name__, "transform": repr(reward.transform), "scale": str(reward.scale)}
    table = {"prompts": len(reward.table), "references": int(reward.table.describe()["references"])}

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """Whether it answers, what it serves, and whether the table's probes were scored as they should be."""
        ready = not door.closing
        return _json(200 if ready else 503, {"ready": ready, "verified": verified, "table": table, **said})

    @app.get("/metrics", response_class=Response)
    async def page() -> Response:
        """Prometheus' text format."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _refused(_: Request, error: Exception) -> Response:
    status, later = (error.status, error.retry_after) if isinstance(error, Refused) else (500, None)
    response = _json(status, {"error": str(error)})
    if later is not None:
        response.headers["Retry-After"] = str(later)
    return response


async def _no_such_path(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = f"POST to one of {', '.join(PATHS)}; GET /health, /metrics or /openapi.json"
    return _json(status, {"error": told})


def _json(status: int, content: Any) -> Response:
    # Letters beyond ASCII escaped: an error may show half a character, which UTF-8 has no bytes for.
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status, media_type="application/json")
