"""Checks that a pair has one score, whatever it is scored with: each compares two ways to the same numbers."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from calibrated_rewards.checks.probes import ODD, SPECIAL_TOKENS, Pairs, answers, asked, everyday, long_prompt
from calibrated_rewards.checks.subject import PADS, Embedding, Outcome, Subject, in_units

# Words of the long prompt whose completions may share it; the first that the scorer reads whole is taken.
LONG = (400, 60, 12)
# Special tokens of a tokenizer that are tried; some have hundreds that are reserved.
SPECIALS = 12


def alone(subject: Subject) -> Outcome:
    """Each pair in a call of its own, against all in one."""
    return subject.same(subject.pairs, subject.one_by_one(subject.pairs), subject.mixed, PADS)


def neighbours(subject: Subject) -> Outcome:
    """Each of some pairs before the longest one, and behind the shortest."""
    order = np.argsort([len(str(pair)) for pair in zip(subject.pairs.prompts, subject.pairs.completions, strict=True)])
    by_length = order.tolist()
    some = by_length[1 : -1 : max(1, len(by_length) // 8)] or by_length
    before = [subject.score(subject.pairs.at([i, by_length[-1]]))[0] for i in some]
    behind = [subject.score(subject.pairs.at([by_length[0], i]))[1] for i in some]
    expected = np.tile(subject.mixed[some], 2)
    return subject.same(subject.pairs.at([*some, *some]), np.array([*before, *behind]), expected, PADS)


def permuted(subject: Subject) -> Outcome:
    """The same pairs in two other orders."""
    order = random.Random(0).sample(range(len(subject.pairs)), len(subject.pairs))
    found = [subject.score(subject.pairs.at(some)) for some in (order, order[::-1])]
    expected = [subject.mixed[some] for some in (order, order[::-1])]
    hint = "a score belongs to its place in the list: keep the order of the inputs"
    return subject.same(subject.pairs.at(order + order[::-1]), np.concatenate(found), np.concatenate(expected), hint)


def repeated(subject: Subject) -> Outcome:
    """Each pair twice in a call: one beside the other, and the whole list again."""
    beside = np.repeat(np.arange(len(subject.pairs)), 2).tolist()
    twice = [*range(len(subject.pairs))] * 2
    found = [subject.score(subject.pairs.at(some)) for some in (beside, twice)]
    expected = np.concatenate([subject.mixed[beside], subject.mixed[twice]])
    hint = "a pair that occurs twice in a call needs its score twice"
    return subject.same(subject.pairs.at(beside + twice), np.concatenate(found), expected, hint)


def called_twice(subject: Subject) -> Outcome:
    """The same call again."""
    hint = "something is random: model.eval(), temperature 0"
    return subject.same(subject.pairs, subject.score(subject.pairs), subject.mixed, hint)


def after_others(subject: Subject) -> Outcome:
    """The same call again, after calls with other inputs."""
    half = len(subject.pairs) // 2
    subject.score(subject.pairs.at(range(half)))
    subject.score(Pairs([asked("Hi", subject.chat)] * 2, ["Hello!", "What do you want? " * 3]))
    hint = "a score depends on what was scored before: a running mean, a cache, a state that is kept"
    return subject.same(subject.pairs, subject.score(subject.pairs), subject.mixed, hint)


def one_prompt(subject: Subject) -> Outcome:
    """Eight completions of a long prompt together, as they may share its prefix, against each alone."""
    group = readable_group(subject)
    hint = "completions of one prompt are not read alike together and alone: a shared prefix, or padding"
    return subject.same(group, subject.score(group), subject.one_by_one(group), hint)


def readable_group(subject: Subject) -> Pairs:
    """The completions of one prompt, as long a one as the scorer reads without leaving anything out."""
    groups = [Pairs([long_prompt(words, subject.chat)] * 8, answers(0)) for words in LONG]
    return next(filter(subject.reads_whole, groups[:-1]), groups[-1])


def special_tokens(subject: Subject) -> Outcome:
    """Completions in which special tokens stand as text, at the end and inside, together and alone."""
    known = (subject.tokenizer.all_special_tokens if subject.tokenizer is not None else SPECIAL_TOKENS)[:SPECIALS]
    completions = [text for token in known for text in (f"Hello{token}", f"Hel{token}lo, {token}{token}")]
    if not completions:
        return Outcome("-", "the tokenizer has none")
    hint = "where the text ends is told by a token's id, and the text holds that token: count tokens, or use the mask"
    found = together_and_alone(subject, completions, hint)
    unread = (
        [] if subject.discrete or found.status == "FAIL" else [token for token in known if not read_on(subject, token)]
    )
    return Outcome("FAIL", f"what stands behind {unread[0]} is not read -> {hint}") if unread else found


def read_on(subject: Subject, token: str) -> bool:
    """Whether what stands behind a special token makes a difference."""
    answers = [f"Hello{token}, good to see you! How can I help?", f"Hello{token} asdf jkl; zzzz 00000"]
    one, other = subject.one_by_one(Pairs([subject.pairs.prompts[0]] * 2, answers)).tolist()
    # Of two equal texts the scores would be apart by rounding alone.
    return in_units(abs(one - other), subject.sd) > 0.1 * subject.near


def odd_text(subject: Subject) -> Outcome:
    """Unicode, emoji, white space, single characters, together and alone."""
    return together_and_alone(subject, list(ODD), PADS)


def together_and_alone(subject: Subject, completions: list[str], hint: str) -> Outcome:
    """Completions in one call with a longer one, against each alone."""
    prompts = [subject.pairs.prompts[i % len(subject.pairs)] for i in range(len(completions))]
    pairs = Pairs(prompts, completions)
    found = subject.score(pairs + everyday(subject.chat).at([3]))[:-1]
    return subject.same(pairs, found, subject.one_by_one(pairs), hint)


def training_mode(subject: Subject) -> Outcome:
    """With the model in training mode, and after another seed."""
    if subject.model is None:
        return Outcome("-", "the scorer shows no model")
    with as_in_training(subject.model):
        found = subject.score(subject.pairs)
    hint = "dropout is on: call model.eval() before each scoring, a trainer may have turned it back"
    return subject.same(subject.pairs, found, subject.mixed, hint)


@contextmanager
def as_in_training(model: Embedding) -> Iterator[None]:
    """The model in training mode, and torch's generators at another seed; then all as before."""
    torch = sys.modules["torch"]
    parts = [(part, part.training) for part in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.train()
        try:
            yield
        finally:
            for part, was in parts:
                part.training = was
