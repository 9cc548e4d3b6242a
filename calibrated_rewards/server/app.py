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
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from starlette.exceptions import HTTPException

from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.reward.batching import Coalescer, Full
from calibrated_rewards.reward.combined import CombinedReward
from calibrated_rewards.reward.lookup import Score
from calibrated_rewards.server.access import AccessControl, Shutdown, check_address, check_token
from calibrated_rewards.server.dialects import DIALECTS, Dialect, Pair, describe_answer, parse_request
from calibrated_rewards.server.limits import Bodies, Limits, Refused, parse_json
from calibrated_rewards.server.listening import listen

LOG = logging.getLogger("calibrated_rewards.server.app")
PATHS = ("/", "/get_reward", "/score", "/v1/score/evaluation", "/reward")
ERRORS = {
    400: "The body is no JSON.",
    401: "The token is missing or wrong.",
    404: "The table does not have a prompt.",
    408: "The body took too long to arrive.",
    413: "The body, a text or the number of completions is above the server's limit.",
    415: "The body is compressed.",
    422: "A field is missing or malformed.",
    500: "The reward model failed on a completion of this request.",
    503: "Too much is waiting, or the server is closing: ask again after Retry-After seconds.",
    504: "The reward model did not answer in time.",
}
SIZE, LATENCY = "Completions that the reward model is given at once", "Seconds from a request's headers to its answer"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counts of one server, in a registry of its own; all are there from the start, at 0."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "calibrated_reward", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by dialect and status", ("dialect", "status"), **common)
        self.pairs = Counter("pairs", "Completions scored", **common)
        self.misses = Counter("misses", "Completions whose prompt the table does not have", **common)
        self.saturated = Counter("saturated", "Completions below or above all references of their prompt", **common)
        self.failures = Counter("failures", "Requests that the reward model failed on", **common)
        self.queue = Gauge("queue", "Completions that wait for the reward model", **common)
        self.batch_size = Histogram("batch_size", SIZE, buckets=SIZES, **common)
        self.latency = Histogram("latency_seconds", LATENCY, buckets=SECONDS, **common)
        self.u = Summary("u", "Quantiles of known prompts: their mean is sum / count", **common)

    def count_request(self, dialect: str, status: int, seconds: float) -> None:
        """Count a request that was answered; its time too if it was of a dialect, and so for scores."""
        self.requests.labels(dialect, str(status)).inc()
        if dialect != "none":
            self.latency.observe(seconds)

    def count_scores(self, scores: Sequence[Score]) -> None:
        """Count completions, those of unknown prompts, and those beyond all references."""
        known = [score.u for score in scores if score.known]
        self.pairs.inc(len(scores))
        self.misses.inc(len(scores) - len(known))
        self.saturated.inc(sum(u <= 0.0 or u >= 1.0 for u in known))
        for u in known:
            self.u.observe(u)

    def page(self) -> bytes:
        """Write the page that Prometheus reads."""
        return generate_latest(self.registry)


@dataclass(frozen=True)
class Waiting:
    """One completion, and the time at which its client gives up."""

    pair: Pair
    until: float


@dataclass(frozen=True, eq=False)
class RequestBatcher:
    """Batches the completions of concurrent requests into one scorer call, and returns each request its own scores."""

    reward: Any
    """A CalibratedReward or a CombinedReward."""
    limits: Limits
    metrics: Metrics
    coalescer: Coalescer = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        coalescer = Coalescer(self.score_batch, max_batch=limits.batch, max_wait=limits.wait, max_queue=limits.queue)
        object.__setattr__(self, "coalescer", coalescer)

    async def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score a request's completions; `Refused` if any has none: the log has the error, the answer its kind."""
        if any(pair.prompt is None and pair.id is not None for pair in pairs):
            raise Refused(422, "an id needs a prompt, got an id for a text that has its prompt in it: send prompts too")
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
        message = str(errors[0])
        for path in filter(None, (table.path for table in tables_of(self.reward))):
            message = message.replace(path, "of this server")
        raise Refused(404, message)

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


def tables_of(reward: Any) -> list[Any]:
    """List the tables of a reward: its own, or those of the components of a combination."""
    return [each.table for each in reward.rewards.values()] if isinstance(reward, CombinedReward) else [reward.table]


def create_app(
    reward: Any,
    *,
    token: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    verify: bool = True,
    dialects: Sequence[Dialect] = DIALECTS,
) -> FastAPI:
    """Build the ASGI application of a reward; ValueError if the reward model is not the one of the table.

    `token` is asked of every request: `Authorization: Bearer`, `?token=`, or a path that starts with /t/TOKEN.
    `dialects` may be `(*DIALECTS, Mine)`, with a class as those of `server.dialects`; so for `serve` and
    `serve_replicas`.
    """
    check_token(token)
    if verify:
        reward.verify()
    metrics, shutdown = Metrics(), Shutdown()
    # A redirect from /score/ to /score would be to whatever host the request names.
    app = FastAPI(title="calibrated-rewards", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.shutdown = shutdown
    app.add_middleware(AccessControl, token=token, shutdown=shutdown, limits=limits, record=metrics.count_request)
    app.add_exception_handler(Refused, _answer_refusal)
    app.add_exception_handler(HTTPException, _answer_unknown_path)
    _add_scoring(app, RequestBatcher(reward, limits, metrics), dialects)
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
    dialects: Sequence[Dialect] = DIALECTS,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then answer what was accepted, and return.

    An address that others can reach wants a token, or `insecure=True`.
    """
    check_address(host, token, insecure)
    listen(create_app(reward, token=token, limits=limits, verify=verify, dialects=dialects), host, port, limits)


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
    dialects: Sequence[Dialect] = DIALECTS,
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
        return create_app(load(), token=token, limits=limits, verify=verify, dialects=dialects)

    deployment = serve.deployment(
        num_replicas=replicas,
        ray_actor_options=dict(resources or {}),
        # Its default, 5, would leave nothing to make a batch of.
        max_ongoing_requests=limits.queue,
        logging_config=quiet,
    )
    serve.run(deployment(serve.ingress(build)()).bind(), name="calibrated-rewards", route_prefix="/")


def _add_scoring(app: FastAPI, batcher: RequestBatcher, dialects: Sequence[Dialect]) -> None:
    limits, bodies = batcher.limits, Bodies(batcher.limits)

    # Of the body, FastAPI gets the schema alone: it would parse one before its limits are checked.
    async def score(request: Request) -> Response:
        """Rewards of completions, in the dialect of the request."""
        async with bodies.read(request.headers, request.receive) as body:
            parsed = parse_request(parse_json(body, limits), limits, dialects)
            request.scope["dialect"] = parsed.name
            scores = await batcher.score(parsed.pairs(batcher.reward.id_column))
            return _answer(200, parsed.answer(scores))

    batcher.metrics.queue.set_function(lambda: batcher.coalescer.waiting)
    for path in PATHS:
        app.post(
            path,
            operation_id=f"score_{path.strip('/').replace('/', '_')}".strip("_"),
            responses=describe_answers(dialects),
            openapi_extra=describe_requests(dialects),
            response_class=Response,
        )(score)


def describe_requests(dialects: Sequence[Dialect]) -> dict[str, Any]:
    """Describe the request for OpenAPI: any of the dialects, an example of each."""
    schemas = [dialect.model_json_schema() for dialect in dialects]
    schema = {"anyOf": [_inline_definitions(schema, schema.pop("$defs", {})) for schema in schemas]}
    examples = {dialect.name: {"value": dialect.example} for dialect in dialects}
    content = {"application/json": {"schema": schema, "examples": examples}}
    return {"requestBody": {"required": True, "content": content}}


def describe_answers(dialects: Sequence[Dialect]) -> dict[int | str, dict[str, Any]]:
    """Describe the answers for OpenAPI, by status."""
    answers = [{"title": dialect.name, **dialect.answer_schema} for dialect in dialects]
    error = {"title": "error", **describe_answer(error={"type": "string"})}
    schemas: dict[int | str, tuple[str, Any]] = {200: ("In the dialect of the request.", {"anyOf": answers})}
    schemas |= {status: (description, error) for status, description in ERRORS.items()}
    return {
        status: {"description": description, "content": {"application/json": {"schema": schema}}}
        for status, (description, schema) in schemas.items()
    }


def _inline_definitions(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Put the schemas of nested models where they are referred to: `#/$defs` would be the page's, not the dialect's."""
    if isinstance(schema, list):
        return [_inline_definitions(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    if name in definitions:
        # Without its own name: a model that nests itself is described once, and by its type further down.
        others = {key: value for key, value in definitions.items() if key != name}
        return _inline_definitions(definitions[name], others)
    if "$ref" in schema:
        return {"type": "object", "title": name}
    return {key: _inline_definitions(value, definitions) for key, value in schema.items()}


def _add_status(app: FastAPI, reward: Any, metrics: Metrics, shutdown: Shutdown, *, verified: bool) -> None:
    combined = isinstance(reward, CombinedReward)
    transform, scale = (reward.how, "unit") if combined else (reward.transform, reward.scale)
    settings = {"name": reward.__name__, "transform": repr(transform), "scale": str(scale)}
    tables = tables_of(reward)
    references = sum(int(each.describe()["references"]) for each in tables)
    table = {"prompts": min(map(len, tables)), "references": references}

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """State of the server: ready or closing, reward and table, table's probes verified or not."""
        ready = not shutdown.begun
        return _answer(200 if ready else 503, {"ready": ready, "verified": verified, "table": table, **settings})

    @app.get("/metrics", response_class=Response)
    async def page() -> Response:
        """Counts of requests and scores, in Prometheus' text format."""
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
