"""Checks that a pair has one score however it is scored: alone, in a batch, in any order, before and after others."""

import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from typing import Any

import numpy as np

from calibrated_rewards.scorers.protocol import call, score
from calibrated_rewards.testing.probes import (
    ODD,
    SPECIAL_TOKENS,
    Pairs,
    as_message,
    as_prompt,
    everyday,
    long_prompt,
    make_answers,
    three_messages,
)
from calibrated_rewards.testing.subject import PADS, Model, Outcome, Subject, in_units

# Words of the long prompt whose completions may share it; the first that the scorer reads whole is taken.
LONG = (400, 60, 12)
# Numbers of pairs in a call: none fills the usual batches. Above MOST only where there is time to spare.
COUNTS, MOST = (2, 3, 7, 17, 33, 65, 130, 300, 1_030), 65
# The ends of long prompts that begin alike.
ENDS = ("What is the capital of France?", "What is it not?", "Sing.", "Who was here, and when did he go?")
# The most special tokens of a tokenizer that are tried; some have hundreds of reserved ones.
SPECIALS = 12
# A good and a bad text to stand behind a special token.
BEHIND = (
    (", good to see you! How can I help?", " asdf jkl; zzzz 00000"),
    (" and welcome. The answer is 42.", " you idiot, I hate it all."),
    (", of course I will help.", ", no."),
)


def check_alone(subject: Subject) -> Outcome:
    """Each pair in a call of its own = all in one call."""
    return subject.compare(subject.pairs, subject.score_one_by_one(subject.pairs), subject.mixed, PADS)


def check_neighbours(subject: Subject) -> Outcome:
    """A pair before the longest one and behind the shortest = the pair among all."""
    order = np.argsort([len(str(pair)) for pair in zip(subject.pairs.prompts, subject.pairs.completions, strict=True)])
    by_length = order.tolist()
    some = by_length[1 : -1 : max(1, len(by_length) // 8)] or by_length
    before = [subject.score(subject.pairs.at([i, by_length[-1]]))[0] for i in some]
    behind = [subject.score(subject.pairs.at([by_length[0], i]))[1] for i in some]
    expected = np.tile(subject.mixed[some], 2)
    return subject.compare(subject.pairs.at([*some, *some]), np.array([*before, *behind]), expected, PADS)


def compare_selections(subject: Subject, selections: Sequence[list[int]], hint: str) -> Outcome:
    """Score some selections of the pairs, a call each, and compare them with the scores of all pairs in one call."""
    scores = [subject.score(subject.pairs.at(places)) for places in selections]
    places = [i for selection in selections for i in selection]
    return subject.compare(subject.pairs.at(places), np.concatenate(scores), subject.mixed[places], hint)


def check_permuted(subject: Subject) -> Outcome:
    """Pairs in two other orders have the same scores."""
    order = random.Random(0).sample(range(len(subject.pairs)), len(subject.pairs))
    hint = "a score belongs to its place in the list: keep the order of the inputs"
    return compare_selections(subject, (order, order[::-1]), hint)


def check_repeated(subject: Subject) -> Outcome:
    """Each pair twice in a call: one beside the other, and the whole list again."""
    places = [*range(len(subject.pairs))]
    hint = "a pair that occurs twice in a call needs its score twice"
    return compare_selections(subject, (sorted([*places, *places]), [*places, *places]), hint)


def check_called_twice(subject: Subject) -> Outcome:
    """Three calls with the same pairs; the very first call is one of them."""
    hint = "the first call gives other scores than those behind it"
    first = subject.compare(subject.pairs, subject.mixed, subject.first[0], hint)
    hint = "something is random: model.eval(), temperature 0"
    return first if first.status == "FAIL" else subject.compare_again(hint)


def check_counts(subject: Subject) -> Outcome:
    """Calls whose number of pairs leaves a batch part full, or needs several batches."""
    counts = [count for count in COUNTS if count <= MOST or subject.spare.seconds > 0]
    hint = "scores depend on how many pairs a call has: look at the last batch, and at what is done per batch"
    for count in counts:
        places = random.Random(count).choices(range(len(subject.pairs)), k=count)
        with subject.spare.spend() if count > MOST else nullcontext():
            outcome = compare_selections(subject, [places], hint)
        if outcome.status == "FAIL":
            return Outcome("FAIL", f"{count} pairs in a call: {outcome.detail}")
    return Outcome("ok", f"{', '.join(map(str, counts))} pairs")


def check_after_error(subject: Subject) -> Outcome:
    """A call after one with inputs that are no texts, which a scorer should refuse, gives the same scores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for nonsense in (None, object()):
            with suppress(Exception):
                call(subject.scorer, [nonsense] * 2, [nonsense] * 2)
    return subject.compare_again("a call that fails leaves something behind: put things back in a finally")


def check_at_the_end(subject: Subject) -> Outcome:
    """The first call again, after all other checks."""
    hint = (
        "scores drift with what was scored before: a counter, a running mean, a cache that is too small or too coarse"
    )
    outcome = subject.compare_again(hint)
    calls, pairs = len(subject.scored_pairs), sum(subject.scored_pairs)
    return outcome if outcome.status == "FAIL" else Outcome("ok", f"after {calls:,} calls with {pairs:,} pairs")


def check_left_alone(subject: Subject) -> Outcome:
    """A call changes neither the lists and messages that it is given, nor scores that were returned before."""
    talks = Pairs([three_messages()] * 2, [as_message("42"), "42"])
    for pairs in [subject.pairs, talks] if subject.reads_whole(talks) else [subject.pairs]:
        copy = deepcopy(pairs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = call(subject.scorer, copy.prompts, copy.completions)
        changes = [name for name in ("prompts", "completions") if getattr(copy, name) != getattr(pairs, name)]
        if changes:
            return Outcome("FAIL", f"the {' and the '.join(changes)} given are changed by a call -> work on a copy")
        before = copy_scores(answer, pairs)
        subject.score(subject.pairs.at(range(len(subject.pairs))[::-1]))
        if not np.array_equal(before, copy_scores(answer, pairs)):
            detail = "scores that were given out are changed by the next call: one array is used again and again"
            return Outcome("FAIL", f"{detail} -> give a copy of it")
    return Outcome("ok")


def copy_scores(answer: Any, pairs: Pairs) -> np.ndarray:
    """Read a scorer's answer as numbers, as they are at this moment."""
    return score(lambda prompts, completions: answer, pairs.prompts, pairs.completions).copy()


def check_after_others(subject: Subject) -> Outcome:
    """A call after others, with other inputs, gives the same scores."""
    subject.score(subject.pairs.at(range(len(subject.pairs) // 2)))
    subject.score(Pairs([as_prompt("Hi", subject.chat)] * 2, ["Hello!", "What do you want? " * 3]))
    return subject.compare_again(
        "a score depends on what was scored before: a running mean, a cache, a state that is kept"
    )


def check_long_again(subject: Subject) -> Outcome:
    """Long inputs before and after short ones: a forward pass may change its model, as BigBird's does."""
    if subject.long_first is None:
        return Outcome("-", "no long input is read whole")
    pairs, scores = subject.long_first
    subject.score(Pairs([as_prompt("Hi", subject.chat)] * 2, ["Yes", "No."]))
    hint = "a short input changes the model, as BigBird's attention_type: put it back after each forward"
    return subject.compare(pairs, subject.score(pairs), scores, hint)


def check_one_prompt(subject: Subject) -> Outcome:
    """Eight completions of a long prompt together, as they may share its prefix = each alone."""
    groups = [Pairs([long_prompt(words, subject.chat)] * 8, make_answers(0)) for words in LONG]
    group = next(filter(subject.reads_whole, groups[:-1]), groups[-1])
    hint = "completions of one prompt are not read alike together and alone: a shared prefix, or padding"
    return subject.compare(group, subject.score(group), subject.score_one_by_one(group), hint)


def check_alike_prompts(subject: Subject) -> Outcome:
    """Long prompts that differ only at their ends, together, as they may share a prefix = each alone."""
    for words in LONG:
        prompts = [as_prompt(f"{long_prompt(words, False)} {end}", subject.chat) for end in ENDS]
        pairs = Pairs(prompts, make_answers(0)[:1] * len(ENDS))
        if subject.reads_whole(pairs):
            break
    hint = "prompts that begin alike are taken for one prompt: compare the whole of them"
    return subject.compare(pairs, subject.score(pairs), subject.score_one_by_one(pairs), hint)


def check_special_tokens(subject: Subject) -> Outcome:
    """Completions that contain special tokens as text, together = alone; the text behind a token is read."""
    tokens = (subject.tokenizer.all_special_tokens if subject.tokenizer is not None else SPECIAL_TOKENS)[:SPECIALS]
    completions = [text for token in tokens for text in (f"Hello{token}", f"Hel{token}lo, {token}{token}")]
    if not completions:
        return Outcome("-", "the tokenizer has none")
    hint = "where the text ends is told by a token's id, and the text holds that token: count tokens, or use the mask"
    outcome = compare_with_alone(subject, completions, hint)
    if subject.discrete or outcome.status == "FAIL":
        return outcome
    if not reads_on(subject, ""):
        return Outcome("-", "what stands behind them does not move the score without them either")
    unread = next((token for token in tokens if not reads_on(subject, token)), None)
    return Outcome("FAIL", f"what stands behind {unread} is not read -> {hint}") if unread is not None else outcome


def reads_on(subject: Subject, token: str) -> bool:
    """Return True if the text behind a special token changes the score, for any of three pairs of texts."""
    prompt = subject.pairs.prompts[0]
    for ends in BEHIND:
        one, other = subject.score_one_by_one(Pairs([prompt] * 2, [f"Hello{token}{end}" for end in ends])).tolist()
        # Scores of two equal texts would differ by rounding only.
        if in_units(abs(one - other), subject.sd) > 0.1 * subject.near:
            return True
    return False


def check_odd_texts(subject: Subject) -> Outcome:
    """Unicode, emoji, white space and single characters, together = alone."""
    return compare_with_alone(subject, list(ODD), PADS)


def compare_with_alone(subject: Subject, completions: list[str], hint: str) -> Outcome:
    """Compare completions in one call with a longer one, and each alone."""
    prompts = [subject.pairs.prompts[i % len(subject.pairs)] for i in range(len(completions))]
    pairs = Pairs(prompts, completions)
    scores = subject.score(pairs + everyday(subject.chat).at([3]))[:-1]
    return subject.compare(pairs, scores, subject.score_one_by_one(pairs), hint)


def check_training_mode(subject: Subject) -> Outcome:
    """A model in training mode, and another seed, give the same scores."""
    if subject.model is None:
        return Outcome("-", "the scorer shows no model")
    with in_training_mode(subject.model):
        scores = subject.score(subject.pairs)
    hint = "dropout is on: call model.eval() before each scoring, a trainer may have turned it back"
    return subject.compare(subject.pairs, scores, subject.mixed, hint)


@contextmanager
def in_training_mode(model: Model) -> Iterator[None]:
    """Put the model into training mode and torch's generators to another seed; then restore all."""
    torch = sys.modules["torch"]
    modes = [(part, part.training) for part in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.train()
        try:
            yield
        finally:
            for part, was_training in modes:
                part.training = was_training
