"""What names of labels say of which is better."""

from calibrated_rewards.models.label_names import BAD, GOOD, find_number, find_side, find_values, is_unnamed


def test_no_word_says_both() -> None:
    """The lists of good and of bad words share none."""
    assert not GOOD & BAD


def test_each_word_has_its_side() -> None:
    """In any case, among other words, and the other way round behind a negation."""
    assert find_side("no") == find_side("No") == -1
    for word in (GOOD | BAD) - {"no"}:  # no answer, no harm
        said = 1 if word in GOOD else -1
        assert find_side(word) == find_side(word.upper()) == find_side(f"{word}_answer") == said, word
        assert find_side(f"not {word}") == find_side(f"NON-{word.upper()}") == -said, word


def test_what_is_no_side() -> None:
    """Words on both sides, words alone that need another, unknown ones, nothing."""
    for name in ("false positive", "high", "low", "cat", "not sure", "", "LABEL_0", "3 stars", "like spam"):
        assert find_side(name) is None
    assert find_side("Neutral") == find_side("none of these") == 0


def test_numbers() -> None:
    """One number, in digits or spelled, with a sign that stands alone."""
    names = ["2 stars", "grade-1", "\u22120.5", "five", "3rd", "1 or 2", "none"]
    assert [find_number(name) for name in names] == [2, 1, -0.5, 5, 3, None, None]
    assert is_unnamed(" LABEL_12 ")
    assert not is_unnamed("LABEL_1 star")


def test_words_and_numbers_that_disagree() -> None:
    """Where the words rise and fall along the numbers, nothing is said."""
    assert find_values(["0 good", "1 bad", "2 good"]) is None
    assert find_values(["1 bad", "2 fair", "3 good"]) == (1, 2, 3)
    assert find_values(["LABEL_0", "LABEL_1"]) is None
