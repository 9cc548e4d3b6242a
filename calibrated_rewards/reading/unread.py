"""Errors of a model's own forward, said in a sentence: which model, how long an input, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UnreadError(ValueError, RuntimeError):
    """A model's forward failed on token ids alone; also a RuntimeError, as torch would have raised it."""


# What the forward of a model raises that needs something else, or more: a language, an image, a longer input.
RAISED = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def reading_errors(model: Any, tokens: int) -> Iterator[None]:
    """Raise what the model's forward raises as an UnreadError; running out of memory stays what it is."""
    try:
        yield
    except RAISED as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if should_reduce_batch_size(error):
            raise
        raise UnreadError(
            f"{type(model).__name__} cannot read an input of {tokens} token ids ({type(error).__name__}: {error}). If "
            "it lacks a setting of its config, give that in config.json or with model_options=; if it needs more than "
            "token ids, use a callable of yours that runs its forward"
        ) from error
