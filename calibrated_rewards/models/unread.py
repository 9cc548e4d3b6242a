"""Errors of a model's own forward, said in a sentence: which model, how long an input, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from calibrated_rewards.files import Message, setting


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
        name = type(getattr(model, "inner", model)).__name__
        raise UnreadError(
            Message(
                f"{name} does not read an input of {tokens} tokens: {type(error).__name__}: {error}. One that looks "
                "for the tokens of its chat template needs prompts that are lists of messages, or "
                f"{setting('chat', 'True', option='--option chat=true')} for prompts that are text, and a max_length "
                "that leaves these tokens in. A setting that its config lacks goes into config.json. What needs more "
                "than token ids is scored by a callable of yours that runs its forward"
            )
        ) from error
