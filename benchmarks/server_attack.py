"""10,000 bodies of nonsense at the reward server, over real connections, with a good request beside each.

    python benchmarks/server_attack.py                 # three minutes or so
    python benchmarks/server_attack.py --bodies 500

What hypothesis makes of the strategies in tests/server/test_server_attack.py, what schemathesis makes of the server's
own schema (bodies that it allows, and bodies that it does not), and what is no HTTP. Counted are answers by status,
answers that took more than ten seconds, good requests that were not answered as they should be, and what the server's
memory has grown by. Then what is done before a request is authenticated, `attacks_on_connections.py`: headers without
an end, slow ones, tokens that are wrong, bodies that nobody wants, and two SIGTERMs while the reward model hangs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from attacks_on_connections import on_connections, on_shutdown
from environment import save
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
from test_server_attack import BODIES, GOOD, an_app

from calibrated_rewards.server.app import PATHS
from calibrated_rewards.testing.suites import HashScorer

SECONDS = 10.0


def served(port: int) -> None:
    """The server's process."""
    from calibrated_rewards.server.limits import Limits
    from calibrated_rewards.server.listening import listen

    listen(an_app(), "127.0.0.1", port, Limits())


class Attack:
    """Sends, and counts what comes back."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=SECONDS)
        self.statuses: Counter[int] = Counter()
        self.hung = self.lost = self.sent = 0
        self.good = HashScorer()(["2+2="], ["4"]).tolist()

    def send(self, **request: Any) -> None:
        """One request of any kind, and a good one."""
        self.sent += 1
        try:
            self.statuses[self.client.request(**request).status_code] += 1
        except httpx.TimeoutException:
            self.hung += 1
        try:
            answer = self.client.post("/", json=GOOD)
            self.lost += answer.status_code != 200 or answer.json()["raw"] != self.good
        except httpx.TransportError:
            self.lost += 1


def hypotheses(attack: Attack, bodies: int) -> None:
    """What the tests' strategies make."""

    @seed(0)
    @settings(
        max_examples=bodies,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(BODIES, st.sampled_from(PATHS))
    def post(body: bytes, path: str) -> None:
        attack.send(method="POST", url=path, content=body)

    post()


def schema(attack: Attack, bodies: int) -> None:
    """What schemathesis makes of the server's own schema, with and against it."""
    modes = schemathesis.GenerationMode
    operations = schemathesis.openapi.from_asgi("/openapi.json", an_app()).get_all_operations()
    makers = [
        made.ok().as_strategy(generation_mode=mode) for made in operations for mode in (modes.POSITIVE, modes.NEGATIVE)
    ]

    @seed(0)
    @settings(
        max_examples=bodies,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(makers))
    def call(case: Any) -> None:
        wanted = case.as_transport_kwargs(base_url=str(attack.client.base_url))
        body = wanted.get("json")
        content = wanted.get("data") if body is None else None
        extra = {"json": body} if body is not None else {"content": content or b""}
        if isinstance(content, dict):
            extra = {"data": content}
        attack.send(method=wanted["method"], url=wanted["url"], **extra)

    call()


def no_http(attack: Attack, port: int, count: int) -> Counter[str]:
    """Bytes that are no HTTP, or not all of it: what the server says, if it says anything."""
    rng = random.Random(0)
    whole = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n" + b"{" * 40
    said: Counter[str] = Counter()
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            said[connection.recv(12)[9:12].decode() or "closed"] += 1
        attack.lost += attack.client.post("/", json=GOOD).status_code != 200
    return said


def memory(process: Any) -> float:
    """MiB of a process."""
    line = next(each for each in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmRSS" in each)
    return int(line.split()[1]) / 1024


def main() -> None:
    """Attack, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--name", default="server_attack")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=served, args=(port,))
    server.start()
    began = time.time()
    try:
        attack = Attack(f"http://127.0.0.1:{port}")
        while time.time() < began + 60:
            try:
                attack.client.get("/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        for _ in range(200):
            attack.send(method="POST", url="/", content=b"{")
        before = memory(server)
        attack.statuses.clear()
        attack.sent = 0
        hypotheses(attack, args.bodies)
        of_hypothesis = attack.sent
        schema(attack, max(10, args.bodies // 10))
        broken = no_http(attack, port, max(10, args.bodies // 10))
        results = {
            "bodies_of_hypothesis": of_hypothesis,
            "requests_of_schemathesis": attack.sent - of_hypothesis,
            "answers_by_status": {str(status): n for status, n in sorted(attack.statuses.items())},
            "answers_to_broken_http": dict(sorted(broken.items())),
            "server_errors": sum(n for status, n in attack.statuses.items() if status >= 500),
            "hung": attack.hung,
            "good_requests_lost": attack.lost,
            "before_authentication": on_connections(),
            "memory_grew_mib": round(memory(server) - before, 1),
            "still_running": server.is_alive(),
            "two_sigterms_while_the_model_hangs": on_shutdown(),
        }
    finally:
        server.terminate()
        server.join(20)
    print(results)
    print(save(args.name, results))


if __name__ == "__main__":
    main()
