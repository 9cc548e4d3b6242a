"""Two replicas of the reward server behind Ray Serve, on a cluster of this machine.

    pip install "ray[serve]"
    python benchmarks/server_replicas.py     # less than a minute

Each answer is held against what is right; both replicas must have answered, none without the token, and nonsense must
be refused as one server refuses it.
"""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ray
from environment import save
from ray import serve

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.server.app import serve_replicas
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import NumberScorer

TOKEN = "a-token-of-the-benchmark"
REQUESTS = 200
REFERENCES = [1.0, 2.0, 3.0, 5.0]


def load() -> CalibratedReward:
    """A reward whose name tells the process."""
    table = ReferenceTable.build([("2+2=", REFERENCES)])
    return CalibratedReward(NumberScorer(), table, name=f"process_{os.getpid()}")


def pair(number: int) -> dict[str, list[str]]:
    """The body of a request."""
    return {"prompts": ["2+2="], "completions": [str(number)]}


def asked(port: int) -> dict[str, Any]:
    """What they said to many clients at a time, with and without the token, and to nonsense."""
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=f"{url}/t/{TOKEN}", timeout=60) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: client.post("/score", json=pair(i)).json(), range(REQUESTS)))
        # A connection each: one that is kept may stay with a replica.
        names = set(pool.map(lambda _: httpx.get(f"{url}/t/{TOKEN}/health", timeout=60).json()["name"], range(50)))
        nonsense = client.post("/score", content=b"{").status_code
    u = [(sum(r < i for r in REFERENCES) + sum(r == i for r in REFERENCES) / 2) / 4 for i in range(REQUESTS)]
    return {
        "requests": REQUESTS,
        "right": sum(each["raw"] == [i] and each["reward"] == [u[i]] for i, each in enumerate(answers)),
        "replicas_that_answered": len(names),
        "without_token": httpx.post(f"{url}/score", json=pair(1)).status_code,
        "nonsense": nonsense,
    }


def main() -> None:
    """Start, ask, and save."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        began = time.perf_counter()
        serve_replicas(load, 2, port=port, token=TOKEN, verify=False)
        started = time.perf_counter() - began
        results = {"seconds_to_start": round(started, 1), **asked(port), "ray": ray.__version__}
    finally:
        serve.shutdown()
        ray.shutdown()
    print(results)
    print(save("server_replicas", results))


if __name__ == "__main__":
    main()
