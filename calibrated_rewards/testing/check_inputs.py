"""Checks of inputs and scores: finite distinct numbers, any character, no text, chats, one BOS, inputs too long."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import call
from calibrated_rewards.testing.probes import (
    BLANK,
    COMMON,
    NOISE,
    QUESTIONS,
    SEQUENCES,
    Pairs,
    as_message,
    as_prompt,
    list_characters,
    soup,
    three_messages,
)
from calibrated_rewards.testing.subject import PADS, TOO_LONG, UNREAD, Model, Outcome, Subject, in_units

# The largest share of different completions that may have different scores and still be called ties.
DISTINCT = 0.95
# This many different completions with the highest score, or the lowest, are no accident.
CLIPPED = 3
# Scores on a grid whose step is a larger part of their standard deviation were rounded.
COARSE, GRIDS = 1e-3, (10.0, 5.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.01, 0.005, 0.001)
# Tokenizers without a limit say 1e30.
NO_LIMIT = 2**30
# Where a long text is changed, as fractions of its words.
PLACES = {"first": 0, "last": 15 / 16, "amid the prompt": 7 / 32, "amid the completion": 23 / 32}
# Words of a text that every scorer reads whole.
SHORT_WORDS = 64
# Characters in a text that holds many, and texts in a call.
TOGETHER, ROWS = 40, 32


def check_finite(subject: Subject) -> Outcome:
    """One finite number for each pair; warnings that pairs were cut are shown."""
    scores, cut = subject.first
    detail = f"{len(scores)} scores, {scores.min():.3g} to {scores.max():.3g}, sd {scores.std():.3g}"
    if subject.few_bits:
        detail += f"; in {' and '.join(subject.few_bits)} equal is within {subject.near:g} sd rms"
    return Outcome("ok", "; ".join([detail, *cut]))


def check_distinct(subject: Subject) -> Outcome:
    """Different completions get different scores."""
    places = [*{str(completion): i for i, completion in enumerate(subject.pairs.completions)}.values()]
    scores, most = subject.mixed[places], len(places)
    count = len(np.unique(scores))
    detail = f"{count} different scores of {most} different completions"
    if count == 1 < most:
        rule = " A rule that none of these texts meets is asked about prompts and completions of yours"
        return Outcome(
            "FAIL",
            f"all {most} completions get the score {subject.mixed[0]:.6g} -> is the completion read, and is the score "
            f"not too large for float32?{rule * subject.discrete}",
        )
    if subject.discrete:
        return Outcome("ok", detail)
    for name, end in (("highest", scores.max()), ("lowest", scores.min())):
        ties = int((scores == end).sum())
        if ties >= CLIPPED and count > most / 2:
            detail = f"{ties} of {most} different completions have the {name} score, {end:.6g}"
            return Outcome("FAIL", f"{detail} -> scores are clipped, or saturate: hand out the number before that")
    few = find_rounding(subject.mixed)
    if not few and (step := find_step(subject.mixed)) > COARSE * subject.sd and subject.reads_letters:
        few = f"steps of {step:g}"
    if count >= DISTINCT * most and not few:
        return Outcome("ok", detail)
    detail += f", all of them numbers of {few}" if few else f"; {describe_tie(subject, places)}"
    cause = "is the completion not read, a score kept by its prompt, or rounded?"
    advice = "compute the head in float32;" if few or subject.few_bits else cause
    return Outcome("FAIL", f"{detail} -> {advice} where ties are meant, of grades or rules, say discrete=True")


def find_step(scores: Float32[np.ndarray, " n"]) -> float:
    """Find the step of a grid that all scores lie on: 1, 0.5, 0.1, ... 0.001; 0 if they lie on none.

    >>> find_step(np.array([0.5, 2.0], np.float32)), find_step(np.array([0.123456, 2.0], np.float32))
    (0.5, 0.0)
    """
    for step in GRIDS:
        if (np.abs(scores / step - np.round(scores / step)) <= 1e-6 * np.abs(scores / step) + 1e-9).all():
            return step
    return 0.0


def find_rounding(scores: Float32[np.ndarray, " n"]) -> str:
    """Name the 16-bit dtype that all scores were rounded to; whole numbers do not count.

    >>> find_rounding(np.array([0.1, 0.2], np.float16).astype(np.float32))
    'float16'
    """
    if (scores == np.round(scores)).all():
        return ""
    if not (scores.view(np.uint32) & 0xFFFF).any():
        return "bfloat16"
    with np.errstate(over="ignore"):
        return "float16" if (scores == scores.astype(np.float16)).all() else ""


def describe_tie(subject: Subject, places: list[int]) -> str:
    """Name two completions that have one score."""
    first: dict[float, int] = {}
    for i in places:
        other = first.setdefault(float(subject.mixed[i]), i)
        if other != i:
            one, two = (start_of(subject.pairs.completions[j], 40) for j in (other, i))
            return f"{one} and {two} both get {subject.mixed[i]:.6g}"
    return "none of the different completions tie"


def check_empty_list(subject: Subject) -> Outcome:
    """An empty list of pairs gives no scores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = call(subject.scorer, [], [])
    return Outcome("ok") if len(answer) == 0 else Outcome("FAIL", f"no pairs give {start_of(answer)}")


def check_blank_completions(subject: Subject) -> Outcome:
    """Completions without text have a score, the same alone and in a batch, or are refused."""
    refusals, blanks, mixed, alone = [], [], [], []
    for blank in BLANK:
        pair = Pairs([subject.pairs.prompts[0]], [blank])
        try:
            alone.append(subject.score(pair)[0])
        except ValueError as error:
            if not subject.refuses(pair):
                raise
            refusals.append(f"{blank!r} refused: {error}")
            continue
        blanks.append(blank)
        mixed.append(subject.score(pair + subject.pairs.at([0, 1]))[0])
    if blanks:
        pairs = Pairs([subject.pairs.prompts[0]] * len(blanks), blanks)
        outcome = subject.compare(pairs, np.array(mixed), np.array(alone), PADS)
        if outcome.status == "FAIL":
            return outcome
    return Outcome("ok", refusals[0] if refusals else "")


def check_conversation(subject: Subject) -> Outcome:
    """A chat of several messages has one score, whether its completion is a text or a message."""
    answers = [question.good for question in QUESTIONS[:2]]
    both = (answers, [*map(as_message, answers)])
    as_texts, as_messages = (Pairs([three_messages()] * 2, completions) for completions in both)
    try:
        expected, scores = subject.score(as_texts), subject.score(as_messages)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        if not subject.refuses(as_texts) and not subject.refuses(as_messages):
            raise
        message = f"{type(error).__name__}: {error}"
        if subject.tokenizer is None:
            return Outcome("-", f"not taken, {message}")
        if "template" in str(error):
            return Outcome("ok", f"refused: {error}")
        return Outcome(
            "FAIL", f"{message} -> an error for prompts that are messages should say what is missing, a chat template"
        )
    return subject.compare(as_texts, scores, expected, "a completion is not read alike as text and as a message")


def check_bos(subject: Subject) -> Outcome:
    """The model's input begins with at most one BOS, and the tokenizer has no ids that the model lacks."""
    tokenizer, model = subject.tokenizer, subject.model
    if model is None or tokenizer is None:
        return Outcome("-", "the scorer does not show both model and tokenizer")
    largest, size = max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    if largest >= size:
        return Outcome(
            "FAIL", f"the tokenizer has ids up to {largest}, the model {size} embeddings -> another model's tokenizer?"
        )
    with record_ids(model) as batches:
        subject.score_one_by_one(subject.pairs.at(range(min(4, len(subject.pairs)))))
        if tokenizer.chat_template:
            subject.refuses(Pairs([three_messages()], [QUESTIONS[1].good]))  # another check asks for its score
    rows = [row for ids in batches for row in ids.reshape(-1, ids.shape[-1]).tolist()]
    bos = tokenizer.bos_token_id
    doubled = next((row for row in rows if row[:2] == [bos, bos]), None)
    if doubled:
        detail = f"the model reads {doubled[:4]}, and {bos} is BOS"
        return Outcome("FAIL", f"{detail} -> the template writes one: tokenise with add_special_tokens=False")
    if not rows:
        return Outcome("-", "the model is given no ids")
    return Outcome("ok", "the tokenizer has no BOS" * (bos is None))


@contextmanager
def record_ids(model: Model | None) -> Iterator[list[Any]]:
    """Record the batches of token ids that go through the model's embeddings inside the block."""
    batches: list[Any] = []
    if model is None:
        yield batches
        return
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: batches.extend(inputs[:1]))
    try:
        yield batches
    finally:
        hook.remove()


def check_truncation(subject: Subject) -> Outcome:
    """An input that is longer than the scorer reads is refused or reported, never cut silently."""
    limit = subject.limit
    if limit is None:
        return find_silent_cut(subject)
    if limit >= NO_LIMIT:
        return Outcome("-", "the scorer has no limit")
    if limit > subject.long_words:
        return Outcome("-", f"the scorer reads {limit} tokens; longer was not tried (long_words={subject.long_words})")
    pairs = Pairs([as_prompt("Hi", subject.chat)], [soup(limit + 16)])
    try:
        _, cut = subject.score_and_listen(pairs)
    except ValueError as error:
        if not subject.refuses(pairs):
            raise
        return Outcome("ok", f"refused: {error}")
    if not cut:
        return Outcome("FAIL", f"more than max_length={limit} tokens raise no TruncationWarning -> warn, or raise")
    return Outcome("ok", f"reported: {cut[0]}")


def find_silent_cut(subject: Subject) -> Outcome:
    """Compare long inputs that differ in one place only; a place that counts in short ones has to count."""
    try:
        moved, cut = find_moving_places(subject, subject.long_words)
    except (ValueError, RuntimeError, LookupError) as error:
        return Outcome("ok", f"refused, {type(error).__name__}: {error}")
    if cut:
        return Outcome("ok", f"reported: {cut[0]}")
    if len(moved) < len(PLACES):
        unread = [name for name in find_moving_places(subject, SHORT_WORDS)[0] if name not in moved]
        if unread and subject.discrete:
            return Outcome("-", "grades and rules may tie: whether long texts are read whole does not show")
        if unread:
            return Outcome(
                "FAIL",
                f"texts of {subject.long_words} words that differ in one place alone ({', '.join(unread)}) have one "
                f"score, and those of {SHORT_WORDS} words do not -> the text is cut without a word: raise, or warn "
                "of it",
            )
    if not moved:
        return Outcome("-", "neither the first nor the last words of a text move its score, nor those between")
    return Outcome("ok", f"of texts of {subject.long_words} words these are read: {', '.join(moved)}")


def find_moving_places(subject: Subject, words: int) -> tuple[list[str], Sequence[str]]:
    """Find the places where another sixteenth of the words moves the score; stop at a warning of the length."""

    def score_halves(text: Sequence[str]) -> tuple[float, Sequence[str]]:
        prompt, completion = " ".join(text[: len(text) // 2]), " ".join(text[len(text) // 2 :])
        scores, cut = subject.score_and_listen(Pairs([as_prompt(prompt, subject.chat)], [completion]))
        return float(scores[0]), cut

    plain, other = soup(words).split(), soup(words, start=1).split()
    expected, cut = score_halves(plain)
    moved = []
    for name, fraction in PLACES.items():
        if cut:
            break
        start = int(fraction * words)
        end = words if name == "last" else start + max(1, words // 16)
        score, cut = score_halves([*plain[:start], *other[start:end], *plain[end:]])
        if in_units(abs(score - expected), subject.sd) > UNREAD:
            moved.append(name)
    return moved, cut


def check_sign(subject: Subject) -> Outcome:
    """Good answers score above bad ones, most of the time."""
    prompts = [as_prompt(question.prompt, subject.chat) for question in QUESTIONS]
    good = subject.score(Pairs(prompts, [question.good for question in QUESTIONS]))
    bad = subject.score(Pairs(prompts, [question.bad for question in QUESTIONS]))
    wrong, count = np.flatnonzero(good <= bad).tolist(), len(good)
    if len(wrong) < count / 2:
        return Outcome("ok", f"the good answer is above the bad one in {count - len(wrong)} of {count} pairs")
    return Outcome(
        "FAIL",
        f"the good answer is not above the bad one in {len(wrong)} of {count} pairs ({QUESTIONS[wrong[0]].prompt!r}) "
        "-> is this a cost model? Cost(scorer), or --cost. A random head? The wrong label? If it is meant so: "
        "sign=False",
    )


def check_characters(subject: Subject) -> Outcome:
    """Every text has a finite score, as prompt and as completion: emoji, alphabets, control characters, noise.

    Characters are scored many at a time first: a text that holds one with a nan score has a nan score itself.
    """
    characters = list_characters()
    crowds = ["".join(characters[i : i + TOGETHER]) for i in range(0, len(characters), TOGETHER)]
    alone = [*SEQUENCES, *(sign for sign in COMMON if sign != "️")]
    sentences = [f"Well {sign} yes" for sign in alone[::4]]
    trouble = find_trouble(subject, crowds, halve=True)
    trouble = trouble or find_trouble(subject, [*alone, *NOISE]) or find_trouble(subject, sentences)
    others = [sign for sign in characters if sign not in alone]
    for start in range(0, len(others), 8 * ROWS):
        if trouble or subject.spare.seconds <= 0:
            break
        with subject.spare.spend():
            trouble = find_trouble(subject, others[start : start + 8 * ROWS])
    if trouble:
        return Outcome(
            "FAIL", f"{trouble} -> one such text stops a run: find where it goes wrong, or give it a low score"
        )
    return Outcome("ok", f"{len(characters) + len(NOISE)} characters and texts")


def find_trouble(subject: Subject, texts: Sequence[str], *, halve: bool = False) -> str:
    """Describe the first text for which the scorer raises or gives no finite score; `halve` finds its part at fault."""
    for start in range(0, len(texts), ROWS):
        rows = texts[start : start + ROWS]
        if find_error(subject, rows) is None:
            continue
        for text in rows:
            part = find_part_at_fault(subject, text) if halve else text
            if (error := find_error(subject, [part])) is not None:
                points = " ".join(f"U+{ord(sign):04X}" for sign in part[:6])
                message = f"{type(error).__name__}: {error}"
                return f"{start_of(part, 30)} ({points}) as prompt and as completion raises {message}"
    return ""


def find_error(subject: Subject, texts: Sequence[str]) -> Exception | None:
    """Score texts as prompts and as completions, and return the error; too long ones may be refused."""
    try:
        subject.score(Pairs([as_prompt(text, True) if subject.chat else f"{text} " for text in texts], list(texts)))
    except Exception as error:  # noqa: BLE001 (whatever a scorer raises is the finding)
        return None if TOO_LONG.search(str(error)) else error
    return None


def find_part_at_fault(subject: Subject, text: str) -> str:
    """Halve a text as long as one of its halves is still at fault."""
    while len(text) > 1:
        half = len(text) // 2
        part = next((each for each in (text[:half], text[half:]) if find_error(subject, [each]) is not None), None)
        if part is None:
            break
        text = part
    return text
