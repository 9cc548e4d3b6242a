"""Checks of what a scorer gives and takes: finite distinct numbers, nothing at all, chats, one BOS, too long inputs."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import call
from calibrated_rewards.testing.check_reading import reads_letters
from calibrated_rewards.testing.probes import BLANK, QUESTIONS, Pairs, asked, message, soup, two_turns
from calibrated_rewards.testing.subject import PADS, UNREAD, Embedding, Outcome, Subject, in_units

# Of scores that differ, at most so many may look alike.
DISTINCT = 0.95
# So many different completions with the highest score, or the lowest, are no accident.
CLIPPED = 3
# Scores on a grid whose steps are a larger part of their standard deviation were rounded.
COARSE, GRIDS = 1e-3, (10.0, 5.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.01, 0.005, 0.001)
# Tokenizers without a limit say 1e30.
NO_LIMIT = 2**30
# Where a long text is changed, as parts of its words: from where, to where.
PLACES = {"first": 0, "last": 15 / 16, "amid the prompt": 7 / 32, "amid the completion": 23 / 32}
# A text that every scorer reads whole.
SHORT_WORDS = 64


def finite(subject: Subject) -> Outcome:
    """One finite number for each pair, and none of the pairs cut."""
    scores, cut = subject.first
    told = f"{len(scores)} scores, {scores.min():.3g} to {scores.max():.3g}, sd {scores.std():.3g}"
    told += f"; in {' and '.join(subject.few_bits)} equal is within {subject.near:g} sd rms" if subject.few_bits else ""
    return Outcome("ok", "; ".join([told, *cut]))


def distinct(subject: Subject) -> Outcome:
    """Different completions get different scores."""
    different = {str(completion): i for i, completion in enumerate(subject.pairs.completions)}
    found, most = len(np.unique(subject.mixed[[*different.values()]])), len(different)
    told = f"{found} different scores of {most} different completions"
    if found == 1 < most:
        told = f"all {most} completions get the score {subject.mixed[0]:.6g}"
        rule = (
            " A rule that none of these texts meets is asked about prompts and completions of yours" * subject.discrete
        )
        return Outcome("FAIL", f"{told} -> is the completion read, and is the score not too large for float32?{rule}")
    if subject.discrete:
        return Outcome("ok", told)
    if clipped := clipped_at(subject, [*different.values()]):
        return Outcome("FAIL", f"{clipped} -> scores are clipped, or saturate: hand out the number before that")
    few = rounded_to(subject.mixed)
    if not few and (step := steps_of(subject.mixed)) > COARSE * subject.sd and reads_letters(subject):
        few = f"steps of {step:g}"
    if found >= DISTINCT * most and not few:
        return Outcome("ok", told)
    told += f", all of them numbers of {few}" if few else f"; {tied(subject, [*different.values()])}"
    cause = "is the completion not read, a score kept by its prompt, or rounded?"
    advice = "compute the head in float32;" if few or subject.few_bits else cause
    return Outcome("FAIL", f"{told} -> {advice} where ties are meant, of grades or rules, say discrete=True")


def clipped_at(subject: Subject, places: list[int]) -> str:
    """The lowest or the highest score, if three or more different completions have it, and others have their own."""
    scores = subject.mixed[places]
    for name, end in (("highest", scores.max()), ("lowest", scores.min())):
        if (scores == end).sum() >= CLIPPED and len(np.unique(scores)) > len(scores) / 2:
            return (
                f"{int((scores == end).sum())} of {len(scores)} different completions have the {name} score, {end:.6g}"
            )
    return ""


def steps_of(scores: Float32[np.ndarray, " n"]) -> float:
    """The step of a grid that all scores lie on: 1, 0.5, 0.1, ... 0.001; 0 if they lie on none.

    >>> steps_of(np.array([0.5, 2.0], np.float32)), steps_of(np.array([0.123456, 2.0], np.float32))
    (0.5, 0.0)
    """
    for step in GRIDS:
        if (np.abs(scores / step - np.round(scores / step)) <= 1e-6 * np.abs(scores / step) + 1e-9).all():
            return step
    return 0.0


def tied(subject: Subject, places: list[int]) -> str:
    """Two completions that have one score."""
    first: dict[float, int] = {}
    for place in places:
        other = first.setdefault(float(subject.mixed[place]), place)
        if other != place:
            one, two = (start_of(subject.pairs.completions[i], 40) for i in (other, place))
            return f"{one} and {two} both get {subject.mixed[place]:.6g}"
    return "none of the different completions tie"


def rounded_to(scores: Float32[np.ndarray, " n"]) -> str:
    """The 16 bits that scores were rounded to: ties among many, also where few show none. Whole numbers are none.

    >>> rounded_to(np.array([0.1, 0.2], np.float16).astype(np.float32)), rounded_to(np.array([0.1, 2], np.float32))
    ('float16', '')
    """
    if (scores == np.round(scores)).all():
        return ""
    if not (scores.view(np.uint32) & 0xFFFF).any():
        return "bfloat16"
    with np.errstate(over="ignore"):
        return "float16" if (scores == scores.astype(np.float16)).all() else ""


def empty_list(subject: Subject) -> Outcome:
    """No pairs give no scores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = call(subject.scorer, [], [])
    return Outcome("ok") if len(answer) == 0 else Outcome("FAIL", f"no pairs give {start_of(answer)}")


def empty_completion(subject: Subject) -> Outcome:
    """Completions without text have a score, alone the same as in a batch, or are refused."""
    told, taken, alone = [], [], []
    for blank in BLANK:
        pair = Pairs([subject.pairs.prompts[0]], [blank])
        try:
            found = subject.score(pair)
        except ValueError as error:
            if not subject.refuses(pair):
                raise
            told.append(f"{blank!r} refused: {error}")
            continue
        taken.append(subject.score(pair + subject.pairs.at([0, 1]))[0])
        alone.append((blank, found[0]))
    if taken:
        pairs = Pairs([subject.pairs.prompts[0]] * len(alone), [blank for blank, _ in alone])
        outcome = subject.same(pairs, np.array(taken), np.array([x for _, x in alone]), PADS)
        if outcome.status == "FAIL":
            return outcome
    return Outcome("ok", told[0] if told else "")


def conversation(subject: Subject) -> Outcome:
    """A chat of several messages, with a completion that is text, or the same as a message."""
    answers = [question.good for question in QUESTIONS[:2]]
    as_text, as_messages = (Pairs([two_turns()] * 2, given) for given in (answers, [*map(message, answers)]))
    try:
        found, again = subject.score(as_text), subject.score(as_messages)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        if not subject.refuses(as_text) and not subject.refuses(as_messages):
            raise
        told = f"{type(error).__name__}: {error}"
        if subject.tokenizer is None:
            return Outcome("-", f"not taken, {told}")
        if "template" in str(error):
            return Outcome("ok", f"refused: {error}")
        return Outcome(
            "FAIL", f"{told} -> an error for prompts that are messages should say what is missing, a chat template"
        )
    return subject.same(as_text, again, found, "a completion is not read alike as text and as a message")


def one_bos(subject: Subject) -> Outcome:
    """What the model reads begins with at most one BOS, and the tokenizer has no ids that the model has not."""
    tokenizer, model = subject.tokenizer, subject.model
    if model is None or tokenizer is None:
        return Outcome("-", "the scorer does not show both model and tokenizer")
    largest, size = max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    if largest >= size:
        return Outcome(
            "FAIL", f"the tokenizer has ids up to {largest}, the model {size} embeddings -> another model's tokenizer?"
        )
    with ids_read(model) as batches:
        subject.one_by_one(subject.pairs.at(range(min(4, len(subject.pairs)))))
        if tokenizer.chat_template:
            # Whether messages are taken at all is another check.
            subject.refuses(Pairs([two_turns()], [QUESTIONS[1].good]))
    rows = [row for ids in batches for row in ids.reshape(-1, ids.shape[-1]).tolist()]
    bos = tokenizer.bos_token_id
    doubled = [row for row in rows if row[:2] == [bos, bos]]
    if doubled:
        told = f"the model reads {doubled[0][:4]}, and {bos} is BOS"
        return Outcome("FAIL", f"{told} -> the template writes one: tokenise with add_special_tokens=False")
    return (
        Outcome("ok", "the tokenizer has no BOS" * (bos is None)) if rows else Outcome("-", "the model is given no ids")
    )


@contextmanager
def ids_read(model: Embedding | None) -> Iterator[list[Any]]:
    """The tensors of token ids that go through the model's embeddings meanwhile: batches of rows."""
    batches: list[Any] = []
    if model is None:
        yield batches
        return
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: batches.extend(inputs[:1]))
    try:
        yield batches
    finally:
        hook.remove()


def truncation(subject: Subject) -> Outcome:
    """An input that is longer than the scorer reads is refused or reported, and never silently cut."""
    limit = subject.limit
    if limit is None:
        return silently_cut(subject)
    if limit >= NO_LIMIT:
        return Outcome("-", "the scorer has no limit")
    if limit > subject.long_words:
        return Outcome("-", f"the scorer reads {limit} tokens; longer was not tried (long_words={subject.long_words})")
    pairs = Pairs([asked("Hi", subject.chat)], [soup(limit + 16)])
    try:
        _, cut = subject.heard(pairs)
    except ValueError as error:
        if not subject.refuses(pairs):
            raise
        return Outcome("ok", f"refused: {error}")
    if not cut:
        return Outcome("FAIL", f"more than max_length={limit} tokens raise no TruncationWarning -> warn, or raise")
    return Outcome("ok", f"reported: {cut[0]}")


def silently_cut(subject: Subject) -> Outcome:
    """Two long inputs that differ in one place alone; whether the scorer looks there is asked of short ones."""
    try:
        moved, cut = moved_by(subject, subject.long_words)
    except (ValueError, RuntimeError, LookupError) as error:
        return Outcome("ok", f"refused, {type(error).__name__}: {error}")
    if cut:
        return Outcome("ok", f"reported: {cut[0]}")
    read = [place for place in PLACES if place in moved]
    if len(read) < len(PLACES):
        looks = moved_by(subject, SHORT_WORDS)[0]
        unread = [place for place in PLACES if place in looks and place not in moved]
        if unread and subject.discrete:
            return Outcome("-", "grades and rules may tie: whether long texts are read whole does not show")
        if unread:
            told = f"texts of {subject.long_words} words that differ in one place alone ({', '.join(unread)}) have one "
            told += f"score, and those of {SHORT_WORDS} words do not"
            return Outcome("FAIL", f"{told} -> the text is cut without a word: raise, or warn of it")
    if not read:
        return Outcome("-", "neither the first nor the last words of a text move its score, nor those between")
    return Outcome("ok", f"of texts of {subject.long_words} words these are read: {', '.join(read)}")


def moved_by(subject: Subject, words: int) -> tuple[set[str], Sequence[str]]:
    """The places where another sixteenth of the words moves the score; and what was said of the length, if anything."""
    plain, other = soup(words).split(), soup(words, start=1).split()
    expected, cut = half_asked(subject, plain)
    moved: set[str] = set()
    for place, start in PLACES.items():
        if cut:
            break
        at = int(start * words)
        to = words if place == "last" else at + max(1, words // 16)
        found, cut = half_asked(subject, [*plain[:at], *other[at:to], *plain[to:]])
        moved |= {place} if in_units(abs(found - expected), subject.sd) > UNREAD else set()
    return moved, cut


def half_asked(subject: Subject, text: Sequence[str]) -> tuple[float, Sequence[str]]:
    """The score of words, of which the first half is the prompt; and what was said of their length."""
    prompt, completion = " ".join(text[: len(text) // 2]), " ".join(text[len(text) // 2 :])
    found, heard = subject.heard(Pairs([asked(prompt, subject.chat)], [completion]))
    return float(found[0]), heard


def sign(subject: Subject) -> Outcome:
    """Good answers score above bad ones, most of the time."""
    if not subject.sign:
        return Outcome("-", "not asked")
    prompts = [asked(question.prompt, subject.chat) for question in QUESTIONS]
    good = subject.score(Pairs(prompts, [question.good for question in QUESTIONS]))
    bad = subject.score(Pairs(prompts, [question.bad for question in QUESTIONS]))
    wrong, pairs = [i for i in range(len(good)) if good[i] <= bad[i]], len(good)
    if len(wrong) < pairs / 2:
        return Outcome("ok", f"the good answer is above the bad one in {pairs - len(wrong)} of {pairs} pairs")
    told = f"the good answer is not above the bad one in {len(wrong)} of {pairs} pairs ({QUESTIONS[wrong[0]].prompt!r})"
    return Outcome(
        "FAIL",
        f"{told} -> is this a cost model? Cost(scorer), or --cost. A random head? The wrong label? If it is meant so: "
        "sign=False",
    )
