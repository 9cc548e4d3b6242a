"""Numbers and folders on the command line, refused in its own words before anything is loaded.

>>> Whole(1)("16"), Real(0.0, 1.0)("0.5")
(16, 0.5)
"""

import argparse
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path


@dataclass(frozen=True)
class Whole:
    """A whole number that is not too small; argparse calls it."""

    least: int
    most: int | None = None

    def __call__(self, text: str) -> int:
        """Read one."""
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < self.least or (self.most is not None and number > self.most):
            upto = "" if self.most is None else f", {self.most} at most"
            raise argparse.ArgumentTypeError(f"needs a whole number >= {self.least}{upto}, got {text!r}")
        return number


@dataclass(frozen=True)
class Real:
    """A finite number from one to another, or above the first alone."""

    least: float
    most: float = inf
    above: bool = False
    """Whether the least itself is refused."""

    def __call__(self, text: str) -> float:
        """Read one."""
        try:
            number = float(text)
        except ValueError:
            number = inf
        if not isfinite(number) or not self.least <= number <= self.most or (self.above and number == self.least):
            upto = "" if self.most == inf else f" and <= {self.most:g}"
            sign = ">" if self.above else ">="
            raise argparse.ArgumentTypeError(f"needs a number {sign} {self.least:g}{upto}, got {text!r}")
        return number


def folder(text: str) -> Path:
    """A folder that is written; "", what an unset variable of a shell comes to, would be the current one.

    >>> folder("table/").name
    'table'
    """
    if not text:
        raise argparse.ArgumentTypeError("needs a folder, got ''; the current one is .")
    return Path(text)
