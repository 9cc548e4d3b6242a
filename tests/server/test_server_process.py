"""The reward server as a process: SIGTERM under load, its log, and what speaks to it over a real connection.

`python tests/server/test_server_process.py FILE [TOKEN]` serves on a free port, and notes in FILE what it has scored.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from calibrated_rewards.cli.main import main
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.scorers.remote import Native, OpenRlhf, Remote
from calibrated_rewards.server.app import create_app, serve
from calibrated_rewards.server.dialects import DIALECTS
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import NumberScorer
from calibrated_rewards.theory.transforms import Exponential

TOKEN = "a-token-of-the-tests"


class Noting:
    """Takes its time, and notes what it was asked."""

    def __init__(self, file):
        self.file = file

    def __call__(self, prompts, completions):
        """Numbers; what is asked as "hang" has no answer."""
        time.sleep(3600 if "hang" in completions else 0.03)
        with open(self.file, "a") as notes:
            notes.write("".join(f"{completion}\n" for completion in completions))
        return NumberScorer()(prompts, completions)


def a_reward(scorer=None):
    table = ReferenceTable.build([("2+2=", np.arange(100.0))], meta={"probes": [_probe()]})
    return CalibratedReward(scorer or NumberScorer(), table)


def _probe():
    return {"prompt": "2+2=", "completion": "4", "score": 4.0}


@contextmanager
def served(*arguments, environment=None):
    """A server's process; it has .url and .told, what it has written so far."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    process.told = []
    reader = threading.Thread(target=lambda: process.told.extend(process.stderr))
    try:
        for line in process.stderr:
            process.told.append(line)
            if at := re.search(r"running on (http://[\d.:]+)", line):
                process.url = at[1]
                break
        else:
            raise AssertionError("".join(process.told))
        reader.start()
        yield process
    finally:
        process.kill()
        process.wait()
        if reader.ident:
            reader.join()
        process.stderr.close()


def asking(url, who, keeps, answered, failed):
    """A client that asks one after the other, until nobody is there."""
    with httpx.Client(timeout=30) as kept:
        for number in range(10_000):
            completion = f"client {who} asks {number}"
            post = kept.post if keeps else httpx.post
            try:
                answer = post(url, json={"prompts": ["2+2="], "completions": [completion]}, timeout=30)
            except httpx.ConnectError:
                return
            except httpx.TransportError:
                failed.append(completion)
                return
            answered.append((completion, answer.status_code))


def test_sigterm_loses_no_request_that_was_accepted(tmp_path) -> None:
    """Told to stop with 16 clients asking: all that was scored was answered, with 200, and the exit code is 0."""
    answered, failed = [], []
    file = tmp_path / "scored"
    with served(__file__, str(file)) as server:
        clients = [
            threading.Thread(target=asking, args=(server.url, who, who % 2 == 0, answered, failed)) for who in range(16)
        ]
        for client in clients:
            client.start()
        while len(answered) < 100:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(30)
        assert server.wait(20) == 0
    scored = Counter(file.read_text().splitlines())
    assert {status for _, status in answered} == {200}
    assert set(scored) == {completion for completion, _ in answered}
    assert not set(failed) & set(scored)
    assert len(answered) > 100


def test_serve_takes_dialects() -> None:
    """A server answers the dialects that `serve` is given, and no other."""
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from test_server_process import *; serve(a_reward(), port=0, verify=False, dialects=DIALECTS[1:])"
    )
    with served("-c", code) as server:
        native, queries = (httpx.post(server.url, json=each.example) for each in (DIALECTS[0], DIALECTS[2]))
    assert (native.status_code, queries.status_code) == (422, 200)
    assert "got none in" in native.json()["error"]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_that_hangs(second, tmp_path) -> None:
    """The first lets requests be answered, which a model that hangs never does; the second ends the process at once."""
    with served(__file__, str(tmp_path / "scored")) as server:
        address = _address(server.url)
        body = b'{"prompts": ["2+2="], "completions": ["hang"]}'
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(address) as hangs, socket.create_connection(address) as slow:
            hangs.sendall(head + body)
            slow.sendall(head[:20])
            time.sleep(0.3)
            server.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(2)
            server.send_signal(second)
            assert server.wait(2) == -second


def test_a_token_is_in_no_log(tmp_path) -> None:
    """Right and wrong ones, in paths and queries, and what follows a scorer's failure: the process writes none."""
    wrong = "nearly-the-token"
    with served(__file__, str(tmp_path / "scored"), TOKEN) as server:
        for token, status in ((TOKEN, 200), (wrong, 401)):
            assert httpx.get(f"{server.url}/t/{token}/health").status_code == status
            assert httpx.get(f"{server.url}/health", params={"token": token}).status_code == status
        httpx.post(f"{server.url}/t/{TOKEN}/score", content=b"{")
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    told = "".join(server.told)
    assert "Shutting down" in told
    assert TOKEN not in told
    assert wrong not in told


@contextmanager
def here(app):
    """An application served by a thread of this process, by uvicorn as others might start it, with its access log."""
    config = uvicorn.Config(app, port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_our_own_clients() -> None:
    """`Remote` reads raw scores in the native dialect, and rewards in OpenRLHF's; the token goes along."""
    prompts, completions = ["2+2="] * 9, [str(i) for i in range(9)]
    with here(create_app(a_reward(), token=TOKEN)) as url:
        options = {"token": TOKEN, "show_progress": False}
        raw = Remote(url, Native("rm"), batch_size=4, **options)(prompts, completions)
        rewards = Remote(url, OpenRlhf("rm"), **options)(prompts, completions)
    np.testing.assert_array_equal(raw, np.arange(9))
    np.testing.assert_allclose(rewards, (np.arange(9) + 0.5) / 100, rtol=1e-6)


def test_others_access_logs_show_no_token(caplog) -> None:
    """Under a uvicorn that writes one: the path is what it is without the token, for wrong tokens as well."""
    with here(create_app(a_reward(), token=TOKEN)) as url, caplog.at_level(logging.INFO):
        httpx.get(f"{url}/t/{TOKEN}/health?x=1")
        httpx.get(f"{url}/t/not-{TOKEN}/health?token=x{TOKEN}")
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert len(lines) == 2
    assert '"GET /health?x=1 HTTP/1.1" 200' in lines[0]
    assert '"GET /health HTTP/1.1" 401' in lines[1]


@pytest.mark.parametrize(
    ("status", "request_text"),
    [
        (b"400", b"nonsense\r\n\r\n"),
        (b"400", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: minus\r\n\r\n"),
        (b"413", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"),
        (b"415", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\n{"),
        (b"400", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"),
    ],
)
def test_broken_http(status, request_text) -> None:
    """What is not HTTP, or promises too much, has its answer at once, without its body being waited for."""
    with here(create_app(a_reward())) as url, socket.create_connection(_address(url), timeout=5) as connection:
        connection.sendall(request_text)
        answer = connection.recv(100)
        assert answer.split(b" ")[1] == status


def test_the_command(tmp_path, capsys) -> None:
    """`calibrated-rewards serve` loads what save_pretrained wrote; a token of the environment; refusals: exit 2."""
    where = tmp_path / "reward"
    CalibratedReward(plain_scores, a_reward_of(plain_scores), Exponential(2.0)).save_pretrained(where)
    here = Path(__file__).parent
    environment = {"A_TOKEN": TOKEN, "PYTHONPATH": os.pathsep.join(map(str, [here, *here.parents[:2]]))}
    arguments = ["-m", "calibrated_rewards", "serve", str(where), "--port", "0", "--token-env", "A_TOKEN"]
    arguments.append("--trust-remote-code")
    with served(*arguments, environment=environment) as server:
        health = httpx.get(f"{server.url}/t/{TOKEN}/health").json()
        assert (health["ready"], health["verified"], health["transform"]) == (True, True, "Exponential(t=2.0)")
        assert httpx.get(f"{server.url}/health").status_code == 401
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(20) == 0
    for said, complaint in (
        ([], "then allow it with --trust-remote-code"),
        (["--host", "0.0.0.0"], "serve needs a token there"),
        (["--token-env", "NOT_SET"], "NOT_SET is not set"),
    ):
        assert main(["serve", str(where), *said]) == 2
        assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(where), "--max-batch", "0"])
    assert "argument --max-batch: needs a whole number >= 1, got '0'" in capsys.readouterr().err


def plain_scores(_prompts, completions):
    """The number that a completion is."""
    return [float(completion) for completion in completions]


def a_reward_of(_scorer):
    return ReferenceTable.build([("2+2=", np.arange(100.0))], meta={"probes": [_probe()]})


def _address(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


if __name__ == "__main__":
    serve(a_reward(Noting(sys.argv[1])), port=0, token=(sys.argv[2:] or [None])[0], verify=False)
