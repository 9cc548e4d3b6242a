"""The page of a report: every number is its source's, every text is escaped, nothing is said of what is not there."""

import argparse
import ast
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_experiment import NASTY, SAID, Shifted, make
from hypothesis import example, given, strategies as st

import calibrated_rewards
from calibrated_rewards.cli import report as command
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.policies import evaluate
from calibrated_rewards.evaluation.report import report
from calibrated_rewards.evaluation.report.calibration_section import check_fresh_completions, expectation_lines
from calibrated_rewards.evaluation.report.experiment import read_experiment
from calibrated_rewards.evaluation.report.page import (
    Bullets,
    Details,
    Heading,
    Paragraph,
    Quote,
    Section,
    Table,
    render_page,
)
from calibrated_rewards.evaluation.report.win_rate_sections import compute_table_curve, write_evaluation
from calibrated_rewards.evaluation.results import Evaluation
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.theory.scale import scaled

TITLES = {
    "table": "What was calibrated",
    "frontier.json": "What to expect without training",
    "calibrated": "What was trained",
    "held_out.json": "On held-out rollouts",
    "evaluation": "What came out",
}
VOID = {"meta", "use", "path"}
FOUR = "BestOf(n=4)"


class Page(HTMLParser):
    """Text, elements and attributes of a page; its elements close in the order in which they opened."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open, self.cells, self.within = [], [], [], [], [], {}
        self.feed(text)
        assert not self.open
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        """Note it."""
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        """One that closes itself."""
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]

    def handle_endtag(self, tag):
        """The last that was opened."""
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        """What the reader reads, and cells one by one."""
        if "style" not in self.open:
            self.texts.append(data)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A whole experiment."""
    return make(tmp_path_factory.mktemp("experiments") / "demo")


@pytest.fixture(scope="module")
def page(demo):
    """Its page."""
    return Page(report(demo).read_text())


def share(stated):
    """A win rate in the file's words, spelled here once more."""
    ends = f" [{100 * stated['low']:.1f}, {100 * stated['high']:.1f}]" * (stated["high"] - stated["low"] > 1e-9)
    return f"{100 * stated['value']:.1f} %{ends}"


def gain(stated):
    ends = f" [{100 * stated['low']:+.1f}, {100 * stated['high']:+.1f}]" * (stated["high"] - stated["low"] > 1e-9)
    return f"{100 * stated['value']:+.1f} points{ends}"


def test_the_page_has_every_part(page):
    """A heading for each, in the order in which things happened."""
    places = [page.text.index(title) for title in TITLES.values()]
    assert places == sorted(places)
    assert page.tags.count("h1") == 1


def test_no_page_shows_a_brace_expression(demo, page, tmp_path):
    """What a lost f would leave, such as {name(found)}: in no text, caption or label, of the whole and of each part."""
    (tmp_path / "run").mkdir()
    shutil.copy(next(demo.rglob("log.jsonl")), tmp_path / "run")
    parts = [demo / "table", demo / "evaluation", tmp_path / "run"]
    pages = [page, *(Page(report(part, tmp_path / f"{part.name}.html").read_text()) for part in parts)]
    for each in pages:
        shown = [each.text, *(value or "" for _, name, value in each.attributes if name != "style")]
        assert [text for text in shown if re.search(r"\{[^{}\s]*[A-Za-z_][^{}]*\}", text)] == []


def test_no_text_lost_its_f():
    """Beside an f-string in a literal that is none, braces around a name or a call are a forgotten f."""
    package = Path(calibrated_rewards.__file__).parent
    meant = {"{step} and {mark}", "{completion}, and mostly {prompt}", "{premise}", "{question}"}  # of users' layouts
    found = [
        f"{path.name}:{node.lineno}: {part.value}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
        for part in node.values
        if isinstance(part, ast.Constant) and re.search(r"\{[A-Za-z_][^{}]*\}", part.value)
        if not any(each in part.value for each in meant)
    ]
    assert found == []


def test_every_number_of_the_evaluation_is_there(demo, page):
    """Win rates, KL and differences as evaluation.json has them, read without the library."""
    said = json.loads((demo / "evaluation" / "evaluation.json").read_text())
    for policy in said["policies"]:
        assert f"{policy['kl']['value']:.3f} [{policy['kl']['low']:.3f}, {policy['kl']['high']:.3f}]" in page.text
        assert all(share(rate) in page.text for rates in policy["win_rates"].values() for rate in rates.values())
        assert all(f"{score['value']:.3f} [{score['low']:.3f}" in page.text for score in policy["scores"].values())
    assert len(said["differences"]) == 6
    for each in said["differences"]:
        clear = each["value"]["low"] > 0 or each["value"]["high"] < 0
        winner = each["a"] if each["value"]["value"] > 0 else each["b"]
        verdict = f"{winner} is ahead" if clear else "these data do not tell"
        assert f"{gain(each['value'])}{verdict}" in page.text.replace("] ", "]")


def test_every_number_of_the_held_out_comparison_is_there(demo, page):
    """Win rates and paired differences by the judge, as held_out.json has them; the claim stands in the summary too."""
    said = json.loads((demo / "held_out.json").read_text())
    for check in said["checks"].values():
        assert all(share(rate) in page.text for rate in check["win_rates"]["judge"].values())
    (difference,) = said["differences"]
    assert all(gain(each) in page.text for each in difference["comparison"]["win_rates"]["judge"].values())
    claim = "Under worst of 4, calibrated wins more than raw: " + gain(
        difference["comparison"]["win_rates"]["judge"]["WorstOf(n=4)"]
    )
    assert page.text.count(claim) == 2


def test_every_number_of_the_frontier_is_there(demo, page):
    """Win rates of each reward at each KL by each judge, and how far it is from the first."""
    said = json.loads((demo / "frontier.json").read_text())
    assert len(said["points"]) == 6
    for point in said["points"]:
        for judge, rates in point["win_rates"].items():
            assert all(share(rate) in page.text for rate in rates.values())
            assert gain(point["gains"][judge][FOUR]) in page.text


def test_the_table_is_told_by_its_own_numbers(demo, page):
    """K, prompts, the share of the variance between prompts and what K references tell, from the scores themselves."""
    table = ReferenceTable.load(demo / "table" / "reward")
    scores = np.array([row for _, row in table.items()], np.float64)
    P, K = scores.shape
    within = scores.var(axis=1, ddof=1).mean()
    across = scores.mean(axis=1).var(ddof=1) - within / K
    assert f"For each of {P} prompts, {K} completions" in page.text
    assert f"{100 * across / (across + within):.1f} % of the variance" in page.text
    assert f"off by {1 / np.sqrt(6 * K):.3f} (rms)" in page.text
    assert f"{len(table.meta['probes'])} pairs are kept" in page.text


def test_training_is_told_by_its_log(demo, page):
    """Steps, first and last values and time, without the line that was broken off."""
    rows = [json.loads(line) for line in (demo / "calibrated" / "log.jsonl").read_text().splitlines()[:-1]]
    u = [row["u"] for row in rows]
    for number in (np.mean(u[:3]), np.mean(u[-3:]), np.mean([row["kl"] for row in rows[-3:]])):
        assert f"{number:.4g}" in page.text
    assert "calibrated (calibrated, optimum for best of 4; 30 steps)" in page.text
    assert "25 %" in page.text


def test_the_last_check_on_held_out_rollouts_is_shown(demo, page, tmp_path):
    """Its numbers and its figure, of each run that has one; without checks the page says nothing of them."""
    rows = [json.loads(line) for line in (demo / "raw" / "log.jsonl").read_text().splitlines()[:-1]]
    last = [row for row in rows if "held_out/kl" in row][-1]
    cells = [f"{last[f'held_out/{name}']:.4g}" for name in ("kl", "correlation", "ess")]
    rate, error = (100 * last[f"held_out/best_of_4/{name}"] for name in ("win_rate", "standard_error"))
    for cell in (*cells, f"{rate:.1f} % ± {error:.1f}"):
        assert cell in page.text
    assert "Checked on held-out rollouts" in page.text
    assert "The policy's share of each tenth of u over the reference's" in page.text
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows if "held_out/kl" not in row))
    assert "held-out" not in report(tmp_path).read_text()
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "held_out/kl": "much"}))
    with pytest.raises(ValueError, match="held_out/kl='much' in line 1"):
        report(tmp_path)


def test_fresh_completions_are_ranked_among_their_prompts_references(demo, page):
    """The mean quantile, against one count a completion."""
    table = ReferenceTable.load(demo / "table" / "reward")
    found = check_fresh_completions(table, demo / "evaluation", "reward")
    rows = [
        row for p in (demo / "evaluation/reference/rollouts").glob("*.parquet") for row in pq.read_table(p).to_pylist()
    ]
    u = []
    for row in rows:
        own = table.scores(int(table.rows([row["key"]])[0]))
        u.append(((own < row["score:reward"]).sum() + (own == row["score:reward"]).sum() / 2) / len(own))
    assert found.rollouts == len(rows)
    assert found.mean.value == pytest.approx(np.mean(u))
    assert found.square.value == pytest.approx(np.mean((np.array(u) - 0.5) ** 2))
    assert f"mean u of {found.mean.value:.3f}" in page.text


def test_fresh_completions_of_another_policy_are_not_as_they_should_be(demo):
    """Completions that score higher than the references do say so."""
    table = ReferenceTable.load(demo / "table" / "reward")
    lower = ReferenceTable.build([(key, scores - 1.0) for key, scores in table.items()])
    found = check_fresh_completions(lower, demo / "evaluation", "reward")
    assert not found.uniform
    assert "not as it should be" in str(found)


def test_examples_are_the_best_of_the_first_four(demo, page):
    """For the first prompts the completion with the highest score, found again in the files."""
    for name in ("calibrated", "raw", "reference"):
        rows = pq.read_table(next((demo / "evaluation" / name / "rollouts").glob("*.parquet"))).to_pylist()
        for key in list(dict.fromkeys(row["key"] for row in rows))[:3]:
            own = [row for row in rows if row["key"] == key and row["number"] < 4]
            best = max(own, key=lambda row: row["score:reward"])
            assert f"{name} (judge {best['score:judge']:.3f}, reward {best['score:reward']:.3f})" in page.text or (
                f"{name} (reward {best['score:reward']:.3f}, judge {best['score:judge']:.3f})" in page.text
            )
            assert best["completion"] in page.text


def test_texts_are_escaped_and_the_page_runs_and_loads_nothing(demo, page):
    """Markup of prompts, completions and names is text; no script, no handler, no address but that of SVG's names."""
    assert SAID in page.text
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(page.tags)
    assert not [each for each in page.attributes if each[1].startswith("on") or each[1] in ("src", "action")]
    targets = [value for _, name, value in page.attributes if name in ("href", "xlink:href")]
    assert targets
    assert all(target.startswith("#") for target in targets)
    text = (demo / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_a_prompt_is_shown_as_it_is(demo, tmp_path):
    """The prompt that tries to be a script is read back letter by letter, whichever prompts come first."""
    for file in (demo / "evaluation").glob("*/rollouts/*.parquet"):
        to = tmp_path / file.relative_to(demo)
        to.parent.mkdir(parents=True)
        table = pq.read_table(file)
        rows = [i for i, prompt in enumerate(table.column("prompt").to_pylist()) if prompt == NASTY]
        pq.write_table(table.take(rows), to)
    shutil.copy(demo / "evaluation" / "evaluation.json", tmp_path / "evaluation")
    page = Page(report(tmp_path, title="<i>mine</i>").read_text())
    assert NASTY in page.text
    assert page.text.startswith("<i>mine</i>")
    assert "script" not in page.tags


def test_figures_are_drawn_once_and_refer_to_themselves(page):
    """Each has paths and a caption for those who cannot see it; no two share a name, and every reference is kept."""
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value[1:] for _, name, value in page.attributes if name == "xlink:href"]
    used += [found for *_, value in page.attributes for found in re.findall(r"url\(#(.*?)\)", value or "")]
    assert used
    assert set(used) <= set(ids)
    assert page.tags.count("svg") == page.tags.count("figcaption") == 12
    assert page.tags.count("path") > 100
    assert len([1 for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label") and value]) == 12


@pytest.mark.parametrize("part", TITLES)
def test_a_part_alone_is_a_page_without_the_others(demo, tmp_path, part):
    """Nothing is said of what is not there."""
    source = demo / part
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / part)
    page = Page(report(tmp_path).read_text())
    assert [title for title in TITLES.values() if title in page.text] == [TITLES[part]]
    assert "evaluat" in page.text or part != "evaluation"
    if part != "evaluation":
        assert "Fresh completions" not in page.text


def test_an_evaluation_with_one_scorer_is_no_calibration(tmp_path):
    """The tables that its runs keep in their own folders are none that anybody trains on."""
    policies, scorers = {"mine": Shifted(0.5)}, {"reward": NumberScorer()}
    evaluate(policies, NumberSampler(), ["a", "b"], scorers, tmp_path, m=4, show_progress=False)
    page = Page(report(tmp_path).read_text())
    assert [title for title in TITLES.values() if title in page.text] == [TITLES["evaluation"]]


def test_a_bare_table_is_enough(tmp_path):
    """A table of scores without rollouts or fingerprints, one prompt and one reference included."""
    ReferenceTable.build([("Hi", [1.0])]).save(tmp_path / "bare")
    page = Page(report(tmp_path / "bare", tmp_path / "page.html").read_text())
    assert "For 1 prompt, 1 completion of the reference policy was scored by reward" in page.text
    assert "Probes" not in page.text


@pytest.mark.parametrize("sampler", ["my policy", ["my policy"], {"kind": "my policy", "decoding": "greedy"}])
def test_metadata_in_words_is_shown_as_it_is(sampler, tmp_path):
    """The metadata of a table that a user built may be no mappings."""
    meta = {"sampler": sampler, "scorer": "my reward model", "form": "texts"}
    ReferenceTable.build([("Hi", [1.0, 2.0])], meta=meta).save(tmp_path / "bare")
    text = Page(report(tmp_path / "bare", tmp_path / "page.html").read_text()).text
    assert "my policy" in text
    assert "my reward model" in text


def test_two_reports_are_the_same_bytes(demo, tmp_path):
    """Nothing in it depends on when it was made."""
    assert report(demo / "table", tmp_path / "a").read_bytes() == report(demo / "table", tmp_path / "b").read_bytes()


def test_nothing_to_report_is_an_error(tmp_path):
    """A directory without any of it says what it needs, one that is none that it is none."""
    with pytest.raises(ValueError, match=r"needs a table, a frontier\.json"):
        report(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is none"):
        report(tmp_path / "nowhere")


def test_the_command_says_where_the_page_is(demo, tmp_path, capsys):
    """With its title, where it was told to."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "deep" / "page.html"
    assert command.run(parser.parse_args([str(demo / "calibrated"), "--out", str(out), "--title", "Mine"])) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Page(out.read_text()).text.startswith("Mine")


def test_other_tokens_than_drawn_are_told(demo, page):
    """How many completions have a KL along other tokens, of the policies that have any."""
    assert "other tokens" not in page.text
    told = Evaluation.load(demo / "evaluation" / "evaluation.json")
    some = replace(told, policies=(replace(told.policies[0], not_as_drawn=1234), told.policies[1]))
    section = write_evaluation(replace(read_experiment(demo / "calibrated"), evaluation=some))
    said = "calibrated: 1,234 of 192 completions make other tokens than were drawn"
    assert said in Page(render_page("t", [section])).text


PLAIN = Page(render_page("", []))


@given(st.text())
@example("<script>alert(1)</script> & '\"^{<b>}")
def test_any_text_is_text(text):
    """What goes in comes out of a parser, in every block, and no element or attribute comes with it."""
    table = Table([text], [[text, text]])
    blocks = (Heading(text), Paragraph(text), Bullets([text]), table, Quote(text), Details(text, table))
    page = Page(render_page(text, [Section(text, blocks, (text,))]))
    assert set(page.tags) - {"sup"} <= {
        *PLAIN.tags,
        *["h2", "h3", "p", "ul", "li", "div", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"],
    }
    assert {name for _, name, _ in page.attributes} <= {
        "charset",
        "name",
        "content",
        "lang",
        "class",
        "tabindex",
        "role",
        "scope",
    }
    assert page.tags.count("h1") == page.tags.count("h2") == page.tags.count("h3") == page.tags.count("p") == 1
    assert page.texts.count(text) >= 4 or not text.strip()


def test_the_reward_is_promised_what_its_table_gives(demo, tmp_path):
    """KL and win rate of the policy that fits the table's rewards, and theory's; of equal references, why not."""
    of = read_experiment(demo)
    found = expect(of.tables["reward"], scaled(of.transform, "unit"), beta=0.4, procedure=BestOf(4))
    own, theirs = expectation_lines(of)

    assert f"at beta=0.4 the policy that fits its rewards has KL {found.kl:.3g} nats" in own
    assert f"win rate {found.win_rate:.3f}, best of 4" in own
    assert f"KL {found.theory_kl:.3g} at this beta" in theirs
    curve = compute_table_curve(of, BestOf(4), 0.5)
    assert curve.kl[[0, -1]] == pytest.approx([0.01, 0.5])
    equal = ReferenceTable.build([("p", [1.0] * 4)])
    (why,) = expectation_lines(replace(of, tables={"reward": equal}))
    assert "has nothing to tell on this table" in why
    assert compute_table_curve(replace(of, tables={"reward": equal}), BestOf(4), 0.5) is None
    assert not [*expectation_lines(replace(of, reward=None))]
    shutil.copytree(demo, tmp_path / "copy")
    assert own in Page(report(tmp_path / "copy").read_text()).text
