"""A file of completions: the same bytes however often the run was stopped, and nothing but what was asked for."""

import json
from dataclasses import dataclass, field

import pytest

from calibrated_rewards import BestOf
from calibrated_rewards.files import claim
from calibrated_rewards.samplers import Reranked, write_completions
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer

PROMPTS = [f"prompt {i}" for i in range(7)]
BEST = Reranked(NumberSampler(), NumberScorer(), BestOf(3))


@dataclass
class Mortal:
    """A sampler that is interrupted at one of its calls."""

    calls: int
    sampler: NumberSampler = field(default_factory=NumberSampler)

    def __call__(self, prompts, seeds):
        """What NumberSampler gives, until then."""
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.sampler(prompts, seeds)

    def fingerprint(self):
        """That of NumberSampler."""
        return self.sampler.fingerprint()


def rows(path):
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_hold_what_was_chosen(tmp_path):
    """The completion with its score; the prompt as it was; the candidates where they are asked for."""
    chat = [{"role": "user", "content": "Grüße \ud83d"}]
    written = write_completions(tmp_path / "a.jsonl", ["Hi", chat], BEST, ids=[7, "b"], samples=2, candidates=True)
    lines = rows(tmp_path / "a.jsonl")
    assert [(line["id"], line["number"]) for line in lines] == [(7, 0), (7, 1), ("b", 0), ("b", 1)]
    assert [line["prompt"] for line in lines][1:3] == ["Hi", chat]
    for line in lines:
        scores = [each["score"] for each in line["candidates"]]
        assert line["score"] == max(scores) == float(line["completion"])
        assert line["candidates"][line["chosen"]]["completion"] == line["completion"]
    assert (written.completions, written.before, written.draws) == (4, 0, 12)
    assert written.mean_score == pytest.approx(sum(line["score"] for line in lines) / 4)


def test_a_plain_sampler_has_no_scores(tmp_path):
    """Then there is nothing to choose by."""
    assert write_completions(tmp_path / "a.jsonl", PROMPTS, NumberSampler()).mean_score is None
    assert [*rows(tmp_path / "a.jsonl")[0]] == ["prompt", "number", "completion", "tokens", "finish"]


def test_wherever_it_is_stopped_the_bytes_are_the_same(tmp_path):
    """Interrupted at each call, and cut at every byte, as a kill may leave it."""
    whole = tmp_path / "whole.jsonl"
    options = {"samples": 2, "prompts_at_once": 2}
    write_completions(whole, PROMPTS, BEST, **options)
    expected = whole.read_bytes()
    for calls in range(4):
        path = tmp_path / f"{calls}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            write_completions(path, PROMPTS, Reranked(Mortal(calls), NumberScorer(), BestOf(3)), **options)
        assert expected.startswith(path.read_bytes())
        assert write_completions(path, PROMPTS, BEST, **options).before == 4 * calls
        assert path.read_bytes() == expected
    for end in range(0, len(expected), 7):
        whole.write_bytes(expected[:end])
        write_completions(whole, PROMPTS, BEST, **options)
        assert whole.read_bytes() == expected
    assert write_completions(whole, PROMPTS, Mortal_reranked(), **options).before == 14


def Mortal_reranked():
    """A sampler that must not be called."""
    return Reranked(Mortal(0), NumberScorer(), BestOf(3))


def test_more_prompts_go_on(tmp_path):
    """Behind those that were there; as in one run."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_completions(a, PROMPTS[:3], BEST, prompts_at_once=2)
    write_completions(a, PROMPTS, BEST, prompts_at_once=2)
    write_completions(b, PROMPTS, BEST, prompts_at_once=2)
    assert a.read_bytes() == b.read_bytes()


def test_fewer_prompts_lose_nothing(tmp_path):
    """A call with some of the prompts, as by --limit, is refused: completions of the others would go."""
    path = tmp_path / "a.jsonl"
    write_completions(path, PROMPTS, BEST)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="of more prompts than the 3 of this call"):
        write_completions(path, PROMPTS[:3], BEST)
    assert path.read_bytes() == before


def test_a_call_that_failed_at_once_holds_nobody_up(tmp_path):
    """Without a completion in the file, one with other settings begins it."""
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_completions(path, PROMPTS, Mortal_reranked(), seed=1)
    with claim(tmp_path / "a.jsonl.run.json"), pytest.raises(ValueError, match="another process"):
        write_completions(path, PROMPTS, BEST)
    assert write_completions(path, PROMPTS, BEST).before == 0
    write_completions(tmp_path / "b.jsonl", PROMPTS, BEST)
    assert path.read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl.run.json").read_bytes() == (tmp_path / "b.jsonl.run.json").read_bytes()


def test_a_repeated_prompt_gets_further_completions(tmp_path):
    """Those that it would have with more samples."""
    write_completions(tmp_path / "a.jsonl", ["x", "y", "x"], BEST, samples=2)
    write_completions(tmp_path / "b.jsonl", ["x"], BEST, samples=4)
    a, b = rows(tmp_path / "a.jsonl"), rows(tmp_path / "b.jsonl")
    assert [line for line in a if line["prompt"] == "x"] == b


def test_another_run_is_refused(tmp_path):
    """Other prompts, seeds, models; a file of something else; another process."""
    path = tmp_path / "a.jsonl"
    write_completions(path, PROMPTS, BEST)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="seed 0, got 1"):
        write_completions(path, PROMPTS, BEST, seed=1)
    with pytest.raises(ValueError, match=r"procedure 'BestOf\(n=3\)', got 'BestOf\(n=4\)'"):
        write_completions(path, PROMPTS, Reranked(NumberSampler(), NumberScorer(), BestOf(4)))
    with pytest.raises(ValueError, match=r"line 1 is of the prompt 'prompt 0'.*'prompt 6'"):
        write_completions(path, PROMPTS[::-1], BEST)
    with claim(tmp_path / "a.jsonl.run.json"), pytest.raises(ValueError, match="another process"):
        write_completions(path, PROMPTS, BEST)
    assert path.read_bytes() == before
    (tmp_path / "b.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"no b\.jsonl\.run\.json"):
        write_completions(tmp_path / "b.jsonl", PROMPTS, BEST)
    for options, told in [({"samples": 0}, "samples=0"), ({"ids": [1]}, "7 prompts and 1 ids")]:
        with pytest.raises(ValueError, match=told):
            write_completions(tmp_path / "c.jsonl", PROMPTS, BEST, **options)
    with pytest.raises(ValueError, match="got none"):
        write_completions(tmp_path / "c.jsonl", [], BEST)
