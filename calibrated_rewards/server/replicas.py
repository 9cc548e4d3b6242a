"""Several copies of the reward server behind one address, on a Ray cluster: for those who outgrow one."""

from collections.abc import Callable, Mapping
from typing import Any

from calibrated_rewards.server.access import check_token
from calibrated_rewards.server.app import create_app
from calibrated_rewards.server.limits import Limits
from calibrated_rewards.server.listening import check_address

NAME = "calibrated-rewards"


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
    """Start them with Ray Serve, and return when all answer; `ray.serve.shutdown()` ends them.

    `load` is called in each replica, and gives its CalibratedReward; `resources` are those of one replica, such as
    {"num_gpus": 1}. Each replica has a queue of its own, and counts for itself: /metrics is that of whichever answers.
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
    serve.run(deployment(serve.ingress(build)()).bind(), name=NAME, route_prefix="/")
