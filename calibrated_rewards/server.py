"""CalibratedReward over HTTP: one endpoint that speaks the dialects of the frameworks' clients, by their fields.

`calibrated-rewards serve reward/` starts it; docs/guides/serve.md tells what each client sends and reads.
"""

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from calibrated_rewards.serving import schema
from calibrated_rewards.serving.body import Bodies, parsed
from calibrated_rewards.serving.desk import Desk
from calibrated_rewards.serving.dialects import dialect_of
from calibrated_rewards.serving.gate import Door, Gate, check_token
from calibrated_rewards.serving.limits import Limits, Refused
from calibrated_rewards.serving.listening import check_address, listen
from calibrated_rewards.serving.metrics import Metrics

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
