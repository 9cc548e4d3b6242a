"""CalibratedReward over HTTP: one endpoint that speaks the dialects of the frameworks' clients.

`calibrated-rewards serve reward/` starts it; docs/guides/serve.md has what each client sends and reads.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.reward.batching import Coalescer, Full
from calibrated_rewards.reward.lookup import Score
from calibrated_rewards.server.access import AccessControl, Shutdown, check_address, check_token
from calibrated_rewards.server.dialects import Pair, parse_request, request_schema, response_schemas
from calibrated_rewards.server.limits import Bodies, Limits, Refused, parse_json
from calibrated_rewards.server.listening import listen
from calibrated_rewards.server.metrics import Metrics

LOG = logging.getLogger("calibrated_rewards.server.app")
PATHS = ("/", "/get_reward", "/score", "/v1/score/evaluation", "/reward")


@dataclass(frozen=True)
class Waiting:
    """One completion, and the time at which its client gives up."""

    pair: Pair
    until: float


@dataclass(frozen=True, eq=False)
class RequestBatcher:
    """Batches the completions of concurrent requests into one scorer call, and returns each request its own scores."""

    reward: Any
    """A CalibratedReward."""
    limits: Limits
    metrics: Metrics
    coalescer: Coalescer = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        coalescer = Coalescer(self.score_batch, max_batch=limits.batch, max_wait=limits.wait, max_queue=limits.queue)
        object.__setattr__(self, "coalescer", coalescer)

    async def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score a request's completions; `Refused` if any has none: the log has the error, the answer its kind."""
        until = time.monotonic() + self.limits.answer_seconds
        late = Refused(504, f"the reward model did not answer within {self.limits.answer_seconds:g} seconds", 1)
        try:
            futures = self.coalescer.submit_all([Waiting(pair, until) for pair in pairs])
        except Full as error:
            raise Refused(503, str(error), 1) from None
        waiting = [asyncio.wrap_future(future) for future in futures]
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                # Not cut short by the first that fails: the others of the request are being worked on.
                results = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            raise late from None
        scores = [result for result in results if isinstance(result, Score)]
        self.metrics.count_scores(scores)
        if len(scores) == len(results):
            return scores
        errors = [result for result in results if isinstance(result, BaseException)]
        failure = next((error for error in errors if not isinstance(error, UnknownPromptError)), None)
        if failure is not None:
            self.metrics.failures.inc()
            LOG.error("the reward model failed on a completion", exc_info=failure)
            raise Refused(500, f"the reward model failed ({type(failure).__name__}); the server's log tells more")
        if not errors:
            raise late
        self.metrics.misses.inc(len(errors))
        message, path = str(errors[0]), self.reward.table.path
        raise Refused(404, message.replace(str(path), "of this server") if path else message)

    def score_batch(self, batch: Sequence[Waiting]) -> list[Score | None]:
        """Score completions of any requests, in the coalescer's thread; None where it is too late."""
        now = time.monotonic()
        results: list[Score | None] = [None] * len(batch)
        self.metrics.batch_size.observe(len(batch))
        in_time = [at for at, each in enumerate(batch) if each.until > now]
        split = [at for at in in_time if batch[at].pair.prompt is not None]
        glued = [at for at in in_time if batch[at].pair.prompt is None]
        if split:
            pairs = [batch[at].pair for at in split]
            columns = (
                [pair.prompt for pair in pairs],
                [pair.completion for pair in pairs],
                [pair.id for pair in pairs],
            )
            for at, score in zip(split, self.reward.score(*columns), strict=True):
                results[at] = score
        if glued:
            scores = self.reward.score_texts([batch[at].pair.completion for at in glued])
            for at, score in zip(glued, scores, strict=True):
                results[at] = score
        return results


def create_app(
    reward: Any,
    *,
    token: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    verify: bool = True,
) -> FastAPI:
    """Build the ASGI application of a reward; ValueError if the reward model is not the one of the table.

    `token` is asked of every request: `Authorization: Bearer`, `?token=`, or a path that starts with /t/TOKEN.
    """
    check_token(token)
    if verify:
        reward.verify()
    metrics, shutdown = Metrics(), Shutdown()
    # A redirect from /score/ to /score would be to whatever host the request names.
    app = FastAPI(title="calibrated-rewards", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.shutdown = shutdown
    app.add_middleware(AccessControl, token=token, shutdown=shutdown, metrics=metrics, limits=limits)
    app.add_exception_handler(Refused, _answer_refusal)
    app.add_exception_handler(HTTPException, _answer_unknown_path)
    _add_scoring(app, RequestBatcher(reward, limits, metrics), Bodies(limits))
    _add_status(app, reward, metrics, shutdown, verified=verify)
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


def serve_replicas(
    load: Callable[[], Any],
    replicas: int,
    *,
    host: str = "127.0.0.1",
    port: int = 8900,
    token: str | None = None,
    insecure: bool = False,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    verify: bool = True,
    resources: Mapping[str, Any] | None = None,
) -> None:
    """Start several servers behind one address with Ray Serve, and return when all answer.

    `load` is called in each replica, and gives its CalibratedReward; `resources` are those of one replica, such as
    {"num_gpus": 1}. Each replica has a queue of its own, and counts for itself: /metrics is that of whichever answers.
    `ray.serve.shutdown()` ends them.
    """
    if replicas < 1:
        raise ValueError(f"serve_replicas needs replicas >= 1, got replicas={replicas}")
    check_address(host, token, insecure)
    check_token(token)
    from ray import serve
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(enable_access_log=False)  # it would show tokens that stand in paths
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)

    def build() -> Any:  # Ray Serve takes a function, and no other callable
        return create_app(load(), token=token, limits=limits, verify=verify)

    deployment = serve.deployment(
        num_replicas=replicas,
        ray_actor_options=dict(resources or {}),
        # Its default, 5, would leave nothing to make a batch of.
        max_ongoing_requests=limits.queue,
        logging_config=quiet,
    )
    serve.run(deployment(serve.ingress(build)()).bind(), name="calibrated-rewards", route_prefix="/")


def _add_scoring(app: FastAPI, batcher: RequestBatcher, bodies: Bodies) -> None:
    limits = batcher.limits

    # Of the body, FastAPI gets the schema alone: it would parse one before its limits are checked.
    async def score(request: Request) -> Response:
        """Rewards of completions, in the dialect of the request."""
        async with bodies.read(request.headers, request.receive) as body:
            dialect = parse_request(parse_json(body, limits), limits)
            request.scope["dialect"] = dialect.name
            scores = await batcher.score(dialect.pairs(batcher.reward.id_column))
            return _answer(200, dialect.answer(scores))

    batcher.metrics.queue.set_function(lambda: batcher.coalescer.waiting)
    for path in PATHS:
        app.post(
            path,
            operation_id=f"score_{path.strip('/').replace('/', '_')}".strip("_"),
            responses=response_schemas(),
            openapi_extra=request_schema(),
            response_class=Response,
        )(score)


def _add_status(app: FastAPI, reward: Any, metrics: Metrics, shutdown: Shutdown, *, verified: bool) -> None:
    settings = {"name": reward.__name__, "transform": repr(reward.transform), "scale": str(reward.scale)}
    table = {"prompts": len(reward.table), "references": int(reward.table.describe()["references"])}

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """Whether it is ready, what it serves, and whether the table's probes were scored as they should be."""
        ready = not shutdown.begun
        return _answer(200 if ready else 503, {"ready": ready, "verified": verified, "table": table, **settings})

    @app.get("/metrics", response_class=Response)
    async def page() -> Response:
        """Prometheus' text format."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer_refusal(_: Request, error: Exception) -> Response:
    status, later = (error.status, error.retry_after) if isinstance(error, Refused) else (500, None)
    response = _answer(status, {"error": str(error)})
    if later is not None:
        response.headers["Retry-After"] = str(later)
    return response


async def _answer_unknown_path(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _answer(status, {"error": f"POST to one of {', '.join(PATHS)}; GET /health, /metrics or /openapi.json"})


def _answer(status: int, content: Any) -> Response:
    # Letters beyond ASCII escaped: an error may show half a character, which UTF-8 has no bytes for.
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status, media_type="application/json")
