"""Checks that a pair has one score, whatever it is scored with: each compares two ways to the same numbers."""

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.scorers.protocol import call, score
from calibrated_rewards.testing.probes import (
    ODD,
    SPECIAL_TOKENS,
    Pairs,
    answers,
    asked,
    everyday,
    long_prompt,
    message,
    two_turns,
)
from calibrated_rewards.testing.subject import PADS, Embedding, Outcome, Subject, in_units

# Words of the long prompt whose completions may share it; the first that the scorer reads whole is taken.
LONG = (400, 60, 12)
# Numbers of pairs in a call: none fills the usual batches. Above `MOST` only where there is time to spare.
COUNTS, MOST = (2, 3, 7, 17, 33, 65, 130, 300, 1_030), 65
# What long prompts end in that begin alike.
ENDS = ("What is the capital of France?", "What is it not?", "Sing.", "Who was here, and when did he go?")
# Special tokens of a tokenizer that are tried; some have hundreds that are reserved.
SPECIALS = 12
# What may stand behind one of them: a good and a bad text each.
BEHIND = (
    (", good to see you! How can I help?", " asdf jkl; zzzz 00000"),
    (" and welcome. The answer is 42.", " you idiot, I hate it all."),
    (", of course I will help.", ", no."),
)


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
    """The same call again, twice; the very first call is one of them."""
    hint = "something is random: model.eval(), temperature 0"
    first = subject.same(
        subject.pairs, subject.mixed, subject.first[0], "the first call gives other scores than those behind it"
    )
    return (
        first
        if first.status == "FAIL"
        else subject.same(subject.pairs, subject.score(subject.pairs), subject.mixed, hint)
    )


def any_number(subject: Subject) -> Outcome:
    """Calls with so many pairs that a batch is not full, or that there are several."""
    counts = [count for count in COUNTS if count <= MOST or subject.spare.seconds > 0]
    hint = "scores depend on how many pairs a call has: look at the last batch, and at what is done per batch"
    for count in counts:
        at = random.Random(count).choices(range(len(subject.pairs)), k=count)
        with subject.spare.spent() if count > MOST else nullcontext():
            found = subject.score(subject.pairs.at(at))
        outcome = subject.same(subject.pairs.at(at), found, subject.mixed[at], hint)
        if outcome.status == "FAIL":
            return Outcome("FAIL", f"{count} pairs in a call: {outcome.detail}")
    return Outcome("ok", f"{', '.join(map(str, counts))} pairs")


def after_error(subject: Subject) -> Outcome:
    """The same call again, after one with something that is no text, which a scorer should refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for nonsense in (None, object()):
            with suppress(Exception):
                call(subject.scorer, [nonsense] * 2, [nonsense] * 2)
    hint = "a call that fails leaves something behind: put things back in a finally"
    return subject.same(subject.pairs, subject.score(subject.pairs), subject.mixed, hint)


def at_the_end(subject: Subject) -> Outcome:
    """The first call again, after all that other checks have asked."""
    hint = (
        "scores drift with what was scored before: a counter, a running mean, a cache that is too small or too coarse"
    )
    found = subject.same(subject.pairs, subject.score(subject.pairs), subject.mixed, hint)
    calls, pairs = len(subject.scored_pairs), sum(subject.scored_pairs)
    return found if found.status == "FAIL" else Outcome("ok", f"after {calls:,} calls with {pairs:,} pairs")


def left_alone(subject: Subject) -> Outcome:
    """A call changes neither the lists and messages that it is given, nor the scores that were given out before."""
    first, second = subject.pairs, subject.pairs.at(range(len(subject.pairs))[::-1])
    talks = Pairs([two_turns()] * 2, [message("42"), "42"])
    for pairs in [first, talks] if subject.reads_whole(talks) else [first]:
        given = deepcopy(pairs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = call(subject.scorer, given.prompts, given.completions)
        changed = [name for name in ("prompts", "completions") if getattr(given, name) != getattr(pairs, name)]
        if changed:
            return Outcome("FAIL", f"the {' and the '.join(changed)} given are changed by a call -> work on a copy")
        before = read(answer, pairs)
        subject.score(second)
        if not np.array_equal(before, read(answer, pairs)):
            told = "scores that were given out are changed by the next call: one array is used again and again"
            return Outcome("FAIL", f"{told} -> give a copy of it")
    return Outcome("ok")


def read(answer: Any, pairs: Pairs) -> Float32[np.ndarray, " n"]:
    """A scorer's answer as numbers, as they are at this moment."""
    return score(lambda prompts, completions: answer, pairs.prompts, pairs.completions).copy()


def after_others(subject: Subject) -> Outcome:
    """The same call again, after calls with other inputs."""
    half = len(subject.pairs) // 2
    subject.score(subject.pairs.at(range(half)))
    subject.score(Pairs([asked("Hi", subject.chat)] * 2, ["Hello!", "What do you want? " * 3]))
    hint = "a score depends on what was scored before: a running mean, a cache, a state that is kept"
    return subject.same(subject.pairs, subject.score(subject.pairs), subject.mixed, hint)


def long_again(subject: Subject) -> Outcome:
    """Long inputs before and after short ones: a forward may change its model, as BigBird's does."""
    before = subject.long_first
    if before is None:
        return Outcome("-", "no long input is read whole")
    pairs, scores = before
    subject.score(Pairs([asked("Hi", subject.chat)] * 2, ["Yes", "No."]))
    hint = "a short input changes the model, as BigBird's attention_type: put it back after each forward"
    return subject.same(pairs, subject.score(pairs), scores, hint)


def one_prompt(subject: Subject) -> Outcome:
    """Eight completions of a long prompt together, as they may share its prefix, against each alone."""
    group = readable_group(subject)
    hint = "completions of one prompt are not read alike together and alone: a shared prefix, or padding"
    return subject.same(group, subject.score(group), subject.one_by_one(group), hint)


def alike_prompts(subject: Subject) -> Outcome:
    """Long prompts that differ at their ends alone, together, as they may share a prefix, against each alone."""
    for words in LONG:
        starts = [long_prompt(words, False)] * 4
        prompts = [asked(f"{start} {end}", subject.chat) for start, end in zip(starts, ENDS, strict=True)]
        pairs = Pairs(prompts, answers(0)[:1] * len(ENDS))
        if subject.reads_whole(pairs):
            break
    hint = "prompts that begin alike are taken for one prompt: compare the whole of them"
    return subject.same(pairs, subject.score(pairs), subject.one_by_one(pairs), hint)


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
    if subject.discrete or found.status == "FAIL":
        return found
    if not read_on(subject, ""):
        return Outcome("-", "what stands behind them does not move the score without them either")
    unread = [token for token in known if not read_on(subject, token)]
    return Outcome("FAIL", f"what stands behind {unread[0]} is not read -> {hint}") if unread else found


def read_on(subject: Subject, token: str) -> bool:
    """Whether what stands behind a special token makes a difference, in any of some texts."""
    prompt = subject.pairs.prompts[0]
    for ends in BEHIND:
        one, other = subject.one_by_one(Pairs([prompt] * 2, [f"Hello{token}{end}" for end in ends])).tolist()
        # Of two equal texts the scores would be apart by rounding alone.
        if in_units(abs(one - other), subject.sd) > 0.1 * subject.near:
            return True
    return False


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
