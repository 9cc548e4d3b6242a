"""What HTTP costs: 64 clients that ask for one completion at a time, against batches of 64 scored in this process.

    python benchmarks/server.py              # a Llama classifier of 4 layers, 256 wide, float32; a minute
    python benchmarks/server.py --device cuda --layers 16 --width 2048 --dtype bfloat16

The server runs in a process of its own with the same reward, torch on one thread; the clients run in a third, over real
connections, each with its next request as soon as it has its answer. Both sides take turns, and the median of the
rounds counts; while one works the others wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from environment import save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def reward_of(args: argparse.Namespace) -> Any:
    """A reward with a random model, and a table of the prompts that are asked."""
    import torch
    from scoring import model_of
    from tiny import tokenizer

    from calibrated_rewards import CalibratedReward, ReferenceTable
    from calibrated_rewards.scorers.classifiers import SequenceClassifier

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    table = ReferenceTable.build([(prompt, rng.normal(0.0, 20.0, 64)) for prompt in sorted(set(pairs(args)[0]))])
    return CalibratedReward(SequenceClassifier(model_of(args), tokenizer(), show_progress=False), table)


def pairs(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts and completions: each prompt its own, as many letters as it has tokens."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    both = [
        ["".join(rng.choice(letters, rng.integers(longest // 2, longest))) for _ in range(args.pairs)]
        for longest in (args.prompt, args.response)
    ]
    return both[0], both[1]


def served(args: argparse.Namespace, port: int) -> None:
    """The server's process."""
    from calibrated_rewards.server import Limits, serve

    serve(reward_of(args), port=port, limits=Limits(batch=args.batch), verify=False)


def clients(args: argparse.Namespace, port: int, told: Any) -> None:
    """The clients' process: a round whenever it is told to, and how long it took."""
    while told.recv():
        told.send(asyncio.run(one_round(args, port)))


async def one_round(args: argparse.Namespace, port: int) -> float:
    """Seconds for all pairs, one a request."""
    prompts, completions = pairs(args)
    bodies = [
        json.dumps({"prompt": prompt, "response": completion, "label": ""}).encode()
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    heads = [b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) for body in bodies]
    waiting = iter(zip(heads, bodies, strict=True))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for head, body in waiting:
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            size = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
            float(await reader.readexactly(int(size.split(b":")[1])))
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(args.clients)])
    return time.perf_counter() - began


def in_process(args: argparse.Namespace, reward: Any) -> float:
    """Seconds for all pairs, in batches."""
    prompts, completions = pairs(args)
    began = time.perf_counter()
    for at in range(0, args.pairs, args.batch):
        reward.score(prompts[at : at + args.batch], completions[at : at + args.batch])
    return time.perf_counter() - began


def wait_for(port: int) -> None:
    """Until somebody listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server did not start")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs a second of both sides."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours, theirs = context.Pipe()
    server = context.Process(target=served, args=(args, port))
    asking = context.Process(target=clients, args=(args, port, theirs))
    server.start()
    asking.start()
    try:
        reward = reward_of(args)
        wait_for(port)
        rounds = []
        for number in range(args.rounds + 1):  # the first is not counted
            here = in_process(args, reward)
            ours.send(True)
            there = ours.recv()
            rounds += [(here, there)] if number else []
            print(f"{args.pairs / here:8.0f} pairs/s here {args.pairs / there:8.0f} over HTTP {here / there:6.2f}")
        ours.send(False)
    finally:
        server.terminate()
        server.join(20)
        asking.terminate()
    here, there = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "pairs_per_second_in_process": round(args.pairs / here, 1),
        "pairs_per_second_over_http": round(args.pairs / there, 1),
        "ratio": round(statistics.median(h / t for h, t in rounds), 3),
        "ratios": [round(h / t, 3) for h, t in rounds],
    }


def main() -> None:
    """Measure, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "width": 256, "clients": 64, "batch": 64, "pairs": 512, "rounds": 5}
    for name, value in {**sizes, "prompt": 128, "response": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--name", default="server")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name != "name"}
    print(save(args.name, {"settings": settings, **measured(args)}))


if __name__ == "__main__":
    main()
