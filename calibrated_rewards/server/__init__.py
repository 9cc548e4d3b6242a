"""A calibrated reward over HTTP, in the dialects that the trainers' clients speak.

`serve` answers until it is stopped, `serve_replicas` on a Ray cluster, `create_app` is the ASGI application, and
`Limits` bounds what it accepts. `app` batches the completions of concurrent requests and counts them, `dialects` has
the request and answer of each client, `fields` the types of their fields. `limits` reads bodies, `access` checks the
token, `listening` holds connections.

A dialect of yours is written with `Dialect`, `Pair`, `describe_answer`, `collect_numbers` and the types of fields, and
passed as `dialects=(*DIALECTS, Mine)`.
"""

from calibrated_rewards.server.app import create_app as create_app, serve as serve, serve_replicas as serve_replicas
from calibrated_rewards.server.dialects import (
    DIALECTS as DIALECTS,
    Dialect as Dialect,
    Pair as Pair,
    collect_numbers as collect_numbers,
    describe_answer as describe_answer,
)
from calibrated_rewards.server.fields import (
    Chat as Chat,
    Chats as Chats,
    Ids as Ids,
    Items as Items,
    Text as Text,
    Texts as Texts,
)
from calibrated_rewards.server.limits import Limits as Limits
