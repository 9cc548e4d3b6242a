"""How far a calibration is: a bar for those who watch, a line now and then for a log."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

# Seconds between two lines in a log.
EVERY = 30.0


@dataclass
class Progress:
    """Counts prompts, completions and tokens; `with` closes it."""

    prompts: int
    """How many there are in all."""
    shown: bool = True
    done: int = 0
    completions: int = 0
    tokens: int = 0
    _bar: Any = None
    _began: float = 0.0
    _spoke: float = 0.0
    _before: int = 0

    def __enter__(self) -> "Progress":
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(total=self.prompts, initial=self.done, desc="calibrating", unit=" prompts", delay=1)
        self._before, self._began = self.done, time.monotonic()
        self._spoke = self._began
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and time.monotonic() - self._began > EVERY:
            self._speak()

    def add(self, prompts: int = 0, completions: int = 0, tokens: int = 0) -> None:
        """So much more is done."""
        self.done += prompts
        self.completions += completions
        self.tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self.rates(), refresh=False)
            self._bar.update(prompts)
        elif self.shown and time.monotonic() - self._spoke > EVERY:
            self._speak()

    def found(self, prompts: int) -> None:
        """These were done already, and say nothing of the pace."""
        self.done += prompts
        self._before += prompts
        if self._bar is not None:
            self._bar.initial += prompts
            self._bar.n += prompts
            self._bar.refresh()

    def again(self, prompts: int) -> None:
        """Another round: these prompts are not done after all."""
        self.done = self.prompts - prompts
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.refresh()

    def rates(self) -> str:
        """Completions and tokens a second, of this process."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        told = [f"{self.completions / seconds:.3g} completions/s"]
        return ", ".join(told + [f"{self.tokens / seconds:.3g} tokens/s"] * bool(self.tokens))

    def left(self) -> str:
        """The time that the rest takes, at the pace so far."""
        own = self.done - self._before
        if not own:
            return "unknown"
        return tqdm.format_interval((self.prompts - self.done) * (time.monotonic() - self._began) / own)

    def _speak(self) -> None:
        self._spoke = time.monotonic()
        share = f"{self.done} of {self.prompts} prompts ({self.done / max(self.prompts, 1):.0%})"
        sys.stderr.write(f"calibrating: {share}, {self.rates()}, {self.left()} left\n")
        sys.stderr.flush()
