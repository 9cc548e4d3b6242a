"""Progress: counts and rates that are right, a bar for a terminal, now and then a line for a log."""

import io

import pytest

from calibrated_rewards.calibration import run as progress
from calibrated_rewards.calibration.run import EVERY, Progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        """What it shows."""
        return self.now


class Terminal(io.StringIO):
    """What somebody watches."""

    def isatty(self):
        """They do."""
        return True


@pytest.fixture
def clock(monkeypatch):
    """In the place of the real one."""
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


def test_a_log_has_a_line_now_and_then(clock, capsys):
    """Prompts done, completions and tokens a second, and the time left at that pace; none before half a minute."""
    with Progress(100, done=20) as told:
        for _ in range(4):
            clock.now += EVERY / 2 + 1
            told.add(prompts=10, completions=160, tokens=1600)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "calibrating: 40 of 100 prompts (40%), 10 completions/s, 100 tokens/s, 01:36 left"
    assert second.startswith("calibrating: 60 of 100 prompts (60%), 10 completions/s")
    assert last == second


def test_what_is_over_soon_says_nothing(clock, capsys):
    """Nor does one that is not to be shown."""
    with Progress(2) as told:
        clock.now += 1
        told.add(prompts=2)
    with Progress(2, shown=False) as told:
        clock.now += 10 * EVERY
        told.add(prompts=2)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    """With the rates behind it; another round takes back what is not done after all."""
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(8) as told:
        told.add(prompts=8, completions=80, tokens=160)
        assert told._bar.n == 8
        assert "completions/s" in told._bar.postfix
        told.repeat(3)
        assert told._bar.n == told.done == 5


def test_a_pace_is_known_when_something_is_done(clock):
    """What was done before this process began says nothing of it."""
    with Progress(10, shown=False, done=5) as told:
        clock.now += 5
        assert told.time_left() == "unknown"
        told.add(prompts=1)
        assert told.time_left() == "00:20"


def test_what_others_did_says_nothing_of_the_pace(clock, monkeypatch):
    """Shards that are found done move the bar, not the time that is left."""
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(40) as told:
        clock.now += 10
        told.skip(20)
        told.add(prompts=10)
        assert (told.done, told._bar.n, told._bar.initial, told.time_left()) == (30, 30, 20, "00:10")
