"""ReferenceTable: ranks against brute force, and one content whatever way it came together."""

import gc
import inspect
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from calibrated_rewards.prompts import UnknownPromptError, id_key, prompt_key
from calibrated_rewards.table.build import build
from calibrated_rewards.table.reference_table import ReferenceTable, Row

HUGE = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).smallest_subnormal)
# Few values, so that ties are everywhere, and the corners of float32 among them.
scores = st.sampled_from([-HUGE, -1.0, -0.1, -TINY, -0.0, 0.0, TINY, 0.1, 0.5, 1.0, HUGE])
contents = st.dictionaries(st.text("abc", max_size=3), st.lists(scores, min_size=1, max_size=9), min_size=1, max_size=8)
uniform = st.integers(1, 9).flatmap(
    lambda k: st.dictionaries(
        st.text("abc", max_size=3), st.lists(scores, min_size=k, max_size=k), min_size=1, max_size=8
    )
)
CHAT = [{"role": "user", "content": "Hello"}]


def brute_ranks(row, score):
    """Below and equal, by comparing with every reference."""
    row, score = np.float32(row), np.float32(score)
    return int((row < score).sum()), int((row == score).sum())


def files(table, directory):
    """The bytes of a table on disk."""
    table.save(directory)
    return [(Path(directory) / name).read_bytes() for name in ("table.safetensors", "table.json")]


@given(contents | uniform, st.data())
def test_ranks_are_those_of_brute_force(content, data):
    """Below, equal and Eq. 12, on ties, subnormals, both zeros and the largest floats, K ragged or not, K = 1 too."""
    table = ReferenceTable.build(content.items())
    prompts = data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=12))
    asked = data.draw(st.lists(scores, min_size=len(prompts), max_size=len(prompts)))
    rows = table.rows(prompts)

    expected = [brute_ranks(content[prompt], score) for prompt, score in zip(prompts, asked, strict=True)]
    below, equal = table.ranks(rows, asked)
    assert list(zip(below.tolist(), equal.tolist(), strict=True)) == expected
    exact = [(b + Fraction(e, 2)) / len(content[prompt]) for prompt, (b, e) in zip(prompts, expected, strict=True)]
    assert table.cdf(rows, asked).tolist() == [float(value) for value in exact]
    assert table.counts(rows).tolist() == [len(content[prompt]) for prompt in prompts]
    for row, prompt in zip(rows.tolist(), prompts, strict=True):
        assert table.scores(row).tolist() == sorted(np.float32(content[prompt]).tolist())


@given(contents | uniform, st.data())
def test_icdf_is_the_galois_partner_of_the_cdf(content, data):
    """The share of references at or below a score reaches u exactly where the score reaches icdf(u)."""
    table = ReferenceTable.build(content.items())
    prompt, score = data.draw(st.sampled_from(sorted(content))), data.draw(scores)
    k = len(content[prompt])
    u = data.draw(st.floats(0, 1) | st.integers(0, k).map(lambda j: j / k))
    row = table.rows([prompt])
    below, equal = table.ranks(row, [score])
    quantile = table.icdf(row, [u])[0]

    reached = (below[0] + equal[0]) / k >= u
    assert reached == (np.float32(score) >= quantile) or u == 0
    assert table.icdf(row, [0.0])[0] == table.scores(int(row[0]))[0]
    assert table.icdf(row, [1.0])[0] == table.scores(int(row[0]))[-1]
    assert quantile in table.scores(int(row[0]))


def test_icdf_of_j_over_k_is_the_jth():
    """For every K up to 300, the quantile j / K is the j-th reference, however j / K and K u are rounded."""
    table = ReferenceTable.build([(str(k), np.arange(1, k + 1)) for k in range(1, 301)])
    for k in range(1, 301):
        row = np.repeat(table.rows([str(k)]), k)
        assert np.array_equal(table.icdf(row, np.arange(1, k + 1) / k), np.arange(1, k + 1, dtype=np.float32))


@given(contents)
@settings(max_examples=30)
def test_mean_of_own_references_is_one_half(content):
    """Lemma 4 for K references: their own calibrated scores average 1/2, ties or not."""
    table = ReferenceTable.build(content.items())
    for prompt, row in content.items():
        assert np.isclose(table.cdf(np.repeat(table.rows([prompt]), len(row)), row).mean(), 0.5, rtol=0, atol=1e-15)


@given(contents, st.data())
@settings(max_examples=30)
def test_batches_are_their_parts(content, data):
    """One by one, all at once, over the border of a chunk, and as (P, G), the ranks are the same."""
    table = ReferenceTable.build(content.items())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = rng.integers(0, len(table), 2100)
    asked = rng.choice(np.float32([-1.0, -0.1, 0.0, 0.1, 0.3, 1.0]), (2100, 2))

    both = table.cdf(rows, asked)
    assert np.array_equal(both[:, 1], table.cdf(rows, asked[:, 1]))
    assert np.array_equal(both, table.cdf(np.repeat(rows, 2), asked.ravel()).reshape(-1, 2))
    for i in rng.integers(0, 2100, 5):
        assert table.cdf(rows[i : i + 1], asked[i : i + 1, 0])[0] == both[i, 0]
    assert np.array_equal(
        table.icdf(rows, np.abs(asked)), table.icdf(np.repeat(rows, 2), np.abs(asked).ravel()).reshape(-1, 2)
    )


@given(contents | uniform)
@settings(max_examples=30)
def test_blocks_hold_every_row_once(content):
    """Every position comes exactly once, with its own references."""
    table = ReferenceTable.build(content.items())
    rows = np.random.default_rng(0).integers(0, len(table), 20)
    seen = []
    for positions, matrix in table.blocks(rows):
        seen += positions.tolist()
        for position, row in zip(positions, matrix, strict=True):
            assert np.array_equal(row, table.scores(int(rows[position])))
    assert sorted(seen) == list(range(20))
    assert list(table.blocks(np.empty(0, dtype=np.int64))) == []


def test_large_blocks_are_bounded():
    """A chunk holds 2^18 scores at most, unless one row is longer than that."""
    table = ReferenceTable.build([("a", np.zeros(300_000)), ("b", np.zeros(300_000)), ("c", np.zeros(10))])
    shapes = sorted(matrix.shape for _, matrix in table.blocks(table.rows(["a", "b", "c"])))
    assert shapes == [(1, 10), (1, 300_000), (1, 300_000)]
    assert max(len(matrix) for _, matrix in table.blocks(np.full(30_000, table.rows(["c"])[0]))) == 26_214


@given(st.one_of(contents, uniform), st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_any_order_of_arrival_is_the_same_bytes(tmp_path_factory, content, random):
    """Rows, references and aliases in any order, through memory or disk, make the same two files."""
    folder = tmp_path_factory.mktemp("tables")
    items = [Row(prompt, row, [id_key(i), f"<{prompt}>"]) for i, (prompt, row) in enumerate(content.items())]
    first = files(ReferenceTable.build(items, meta={"a": 1}), folder / "a")
    random.shuffle(items)
    shuffled = [Row(p, random.sample(row, len(row)), aliases[::-1]) for p, row, aliases in items]
    second = files(ReferenceTable.build(shuffled, path=folder / "b", meta={"a": 1}), folder / "c")

    assert first == second == [(folder / "b" / name).read_bytes() for name in ("table.safetensors", "table.json")]


@given(contents, contents, st.booleans())
@settings(max_examples=15)
def test_merge_and_extend_are_building_from_the_union(tmp_path_factory, one, other, mapped):
    """Pooled rows, their aliases, and prefixes are those of a table of all rows at once."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [Row(p, row, [f"[{p}]"]) for p, row in one.items()]
    more = [Row(p, row, [f"[{p}]"]) for p, row in other.items()]
    expected = files(ReferenceTable.build([*rows, *more], duplicates="pool"), folder / "union")
    left = ReferenceTable.build(rows, path=folder / "left" if mapped else None)
    right = ReferenceTable.build(more)

    assert files(left.merge(right, duplicates="pool"), folder / "merged") == expected
    assert files(right.merge(left, duplicates="pool", path=folder / "on disk"), folder / "merged") == expected
    assert files(left.extend(more, allow_new=True), folder / "extended") == expected
    if mapped:
        assert files(left.extend(more, allow_new=True, path=folder / "left"), folder / "in place") == expected


def test_extend_finds_rows_by_alias_and_refuses_new_prompts():
    """More references go to the row that the prompt, its id or its rendered text leads to."""
    table = ReferenceTable.build([Row(CHAT, [1.0], [id_key(7), "<user>Hello"])])
    longer = table.extend([(id_key("7"), [3.0]), ("<user>Hello", [2.0]), (CHAT, [0.0])])

    assert longer.scores(0).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert longer.find([id_key(7), "<user>Hello"]).tolist() == [0, 0]
    assert table.scores(0).tolist() == [1.0]
    with pytest.raises(UnknownPromptError, match="row 1: the table has no prompt 'new'; allow_new=True would add it"):
        table.extend([(CHAT, [0.0]), ("new", [1.0])])


def test_aliases_that_say_nothing_new_are_not_stored(tmp_path):
    """The prompt itself as its alias, or one alias twice, is the table without."""
    plain = ReferenceTable.build([Row("a", [1.0], ["x"]), Row("b", [2.0])])
    wordy = ReferenceTable.build([Row("a", [1.0], ["a", "x", "x", prompt_key("a")]), Row("b", [2.0], ["b"])])
    assert files(plain, tmp_path / "plain") == files(wordy, tmp_path / "wordy")


def test_merge_refuses_what_does_not_belong_together():
    """Tables of different meta, and the same prompt twice, are refused unless the caller says what is meant."""
    one, other = ReferenceTable.build([("a", [1.0])], meta={"scorer": "x"}), ReferenceTable.build([("a", [2.0])])
    with pytest.raises(ValueError, match="merge needs tables of one meta"):
        one.merge(other)
    with pytest.raises(ValueError, match="rows 0 and 1 have the same prompt, key"):
        one.merge(other, meta={})
    assert one.merge(other, meta={"both": True}, duplicates="pool").meta == {"both": True}


def test_lookup_goes_by_id_then_key_then_alias():
    """An id that is known wins over the prompt; one that is not known, or None, leaves it to the prompt."""
    table = ReferenceTable.build(
        [Row("a", [1.0], [id_key("first")]), Row(CHAT, [2.0, 3.0], [id_key(2), "<u>Hello<a>"])]
    )
    a, chat = table.rows(["a", CHAT]).tolist()

    assert {a, chat} == {0, 1}
    assert table.rows(["a", "<u>Hello<a>", CHAT, "?"], ids=["2", None, "unknown", "first"]).tolist() == [
        chat,
        chat,
        chat,
        a,
    ]
    assert table.rows([[{"role": "user", "content": {"no key": {1}}}]], ids=[2]).tolist() == [chat]
    assert table.find(["b", "a", prompt_key("a"), [{"content": "Hello", "role": "user", "name": None}]]).tolist() == [
        -1,
        a,
        a,
        chat,
    ]
    assert table.find([]).tolist() == table.rows([]).tolist() == []


def test_unknown_prompts_are_named():
    """The error has the prompt's start, its key and the table, and reads as a sentence."""
    table = ReferenceTable.build([("a", [1.0])])
    with pytest.raises(UnknownPromptError) as caught:
        table.rows(["a", "What is the capital? " * 9, "c"])
    assert str(caught.value) == (
        "the table (in memory, 1 prompts) has no references for "
        "'What is the capital? What is the capital? What is the ca..., "
        f"key {prompt_key('What is the capital? ' * 9).hex()}; 2 of 3 are unknown"
    )
    assert isinstance(caught.value, KeyError)


def test_prefixes():
    """Prompt and response glued together: the longest known text, rendered aliases included, and where it stops."""
    table = ReferenceTable.build([("2+2=", [1.0]), ("2+2=\u00e9", [2.0]), Row(CHAT, [3.0], ["<user>Hello<model>"])])
    rows, splits = table.rows_by_prefix(["2+2=4", "2+2=\u00e9\u00e9", "<user>Hello<model>Hi!"])

    assert rows.tolist() == table.rows(["2+2=", "2+2=\u00e9", CHAT]).tolist()
    assert splits.tolist() == [4, 5, 18]
    assert [part.tolist() for part in table.rows_by_prefix([])] == [[], []]
    with pytest.raises(UnknownPromptError, match="no references for 'x2"):
        table.rows_by_prefix(["2+2=4", "x2+2=4"])
    with pytest.raises(TypeError, match="texts are a list of texts, got the one '2"):
        table.rows_by_prefix("2+2=4")


def test_keys_that_share_a_half_are_told_apart():
    """Keys equal in their first or last eight bytes are different keys."""
    keys = [a * 8 + b * 8 for a in (b"\0", b"a", b"\xff") for b in (b"\0", b"a", b"b", b"\xff")]
    table = ReferenceTable.build([(key, [float(i)]) for i, key in reversed(list(enumerate(keys)))])
    assert table.rows(keys).tolist() == list(range(12))  # bytes in ascending order
    assert [row.tolist() for _, row in table.items()] == [[float(i)] for i in range(12)]
    assert table.find([b"a" * 8 + b"c" * 8, b"b" * 16, b"\0" * 15 + b"\1"]).tolist() == [-1, -1, -1]
    assert [key for key, _ in table.items()] == keys


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "at least one prompt, got none"),
        ([("a", [1.0]), ("b", [])], ValueError, r"row 1, 'b': a row needs a list of K >= 1 numbers, got shape \(0,\)"),
        (
            [("a", [0.0, float("nan")])],
            ValueError,
            "row 0, 'a': scores must be finite in float32, got nan at position 1",
        ),
        ([("a", [float("-inf")])], ValueError, "row 0, 'a': scores must be finite in float32, got -inf at position 0"),
        ([("a", [1.0, 1e39])], ValueError, r"got 1e\+39 at position 1"),
        ([("a", [[1.0]])], ValueError, r"got shape \(1, 1\)"),
        ([("a", ["1.0"])], ValueError, "numbers, got shape"),
        ([("a", [None])], ValueError, "numbers, got shape"),
        ([("a", 1.0)], ValueError, r"got shape \(\)"),
        ([("a", [1.0]), ("b", [2.0]), ("a", [3.0])], ValueError, "rows 0 and 2 have the same prompt, key"),
        ([("a",)], TypeError, r"row 0 must be \(prompt, scores\)"),
        (["ab"], TypeError, r"row 0 must be \(prompt, scores\)"),
        ([({"role": "user"}, [1.0])], TypeError, "row 0"),
        ([(b"short", [1.0])], ValueError, "row 0, b'short': a key has 16 bytes, got 5"),
        ([("a", [1.0], "b")], TypeError, "aliases are a list"),
        ([("a", [1.0], ["x"]), ("b", [1.0], ["x"])], ValueError, "must lead to one prompt, got key .* rows 0 and 1"),
        ([("a", [1.0], ["b"]), ("b", [1.0])], ValueError, "must lead to one prompt, got key .* rows 0 and 1"),
    ],
)
def test_build_says_what_is_wrong_with_which_row(rows, error, message, tmp_path):
    """Every refusal has the position and the prompt, in memory and on disk, and leaves no file behind."""
    for path in (None, tmp_path):
        with pytest.raises(error, match=message):
            ReferenceTable.build(rows, path=path)
    assert list(tmp_path.iterdir()) == []


def test_build_options_are_checked():
    """What is neither a way to treat duplicates nor JSON is refused."""
    with pytest.raises(ValueError, match="duplicates is 'error' or 'pool', got 'first'"):
        build([("a", [1.0])], None, {}, "first")
    for meta in ({"a": float("nan")}, {"a": {1}}, {"a": b"x"}):
        with pytest.raises(TypeError, match="meta must be what JSON can say"):
            ReferenceTable.build([("a", [1.0])], meta=meta)


def test_scores_may_be_of_any_kind():
    """Lists, integers, half precision, other byte orders and torch tensors, also bfloat16, are the same row."""
    wanted = [-1.5, 0.0, 2.0]
    kinds = [[2, -1.5, -0.0], np.float16(wanted), np.array(wanted, ">f8"), torch.tensor(wanted), (2, 0, -1.5)]
    kinds += [torch.tensor(wanted, dtype=torch.bfloat16), torch.tensor(wanted, requires_grad=True)]
    table = ReferenceTable.build([(str(i), kind) for i, kind in enumerate(kinds)])
    for row in range(len(kinds)):
        assert table.scores(row).tolist() == wanted
        assert not np.signbit(table.scores(row)[1])


@pytest.mark.parametrize(
    ("rows", "asked", "error", "message"),
    [
        ([0, 1], [0.0, np.nan], ValueError, "scores must be finite in float32, got nan at position 1"),
        ([0, 1], [[0.0, 1.0], [np.inf, 0.0]], ValueError, "got inf at position 1, 0"),
        ([0], [1e300], ValueError, r"got 1e\+300 at position 0"),
        ([0, 2], [0.0, 0.0], IndexError, "rows must be within 0..1, got 2 at position 1"),
        ([-1], [0.0], IndexError, "rows must be within 0..1, got -1 at position 0"),
        ([0.0], [0.0], TypeError, "rows must be a list of whole numbers, got shape .* of float64"),
        ([True], [0.0], TypeError, "of bool"),
        (0, 0.0, TypeError, r"got shape \(\)"),
        ([0, 1], [0.0], ValueError, r"rows of shape \(P,\) go with \(P,\) or \(P, G\), got \(2,\) with \(1,\)"),
        ([0], ["x"], TypeError, "must be real numbers"),
        ([0], [1j], TypeError, "must be real numbers"),
    ],
)
def test_lookup_refuses(rows, asked, error, message):
    """Scores that are not finite, rows that are not there, shapes that do not fit."""
    table = ReferenceTable.build([("a", [1.0, 2.0]), ("b", [1.0])])
    with pytest.raises(error, match=message):
        table.cdf(rows, asked)


def test_quantiles_outside_of_the_unit_interval_are_refused():
    """So is nan."""
    table = ReferenceTable.build([("a", [1.0, 2.0])])
    for u in (-1e-9, 1.0000001, np.nan):
        with pytest.raises(ValueError, match=r"u must be within \[0, 1\], got .* at position 1"):
            table.icdf([0, 0], [0.5, u])


def test_one_prompt_where_a_list_belongs():
    """A string is not taken for the list of its characters, and ids are one a prompt."""
    table = ReferenceTable.build([("a", [1.0])])
    with pytest.raises(TypeError, match="prompts and ids are lists, got prompts='a'"):
        table.rows("a")
    with pytest.raises(ValueError, match="ids must be one for each prompt, got 2 for 1"):
        table.rows(["a"], ids=[1, 2])


def test_nothing_of_a_table_can_be_changed(tmp_path):
    """Its scores are read-only views, its meta a copy."""
    memory = ReferenceTable.build([("a", [1.0, 2.0])], meta={"x": [1]})
    for table in (memory, pickle.loads(pickle.dumps(memory)), ReferenceTable.build([("a", [1.0, 2.0])], path=tmp_path)):
        with pytest.raises(ValueError, match="read-only"):
            table.scores(0)[0] = 5.0
    memory.meta["x"].append(2)
    assert memory.meta == {"x": [1]}


def test_meta_is_kept():
    """As JSON gives it back, lone surrogates and all, in the order in which it was given."""
    meta = {"z": 1, "a": {"b": [1.5, None, True, "\ud800\u00e9"]}}
    table = ReferenceTable.build([("a", [1.0])], meta=meta)
    assert table.meta == meta
    assert list(table.meta) == ["z", "a"]


def test_pickles(tmp_path):
    """A mapped table pickles as its path, a few hundred bytes; one in memory by value."""
    rows = [(str(i), np.arange(i + 1)) for i in range(200)]
    memory, mapped = ReferenceTable.build(rows), ReferenceTable.build(rows, path=tmp_path)
    assert len(pickle.dumps(mapped)) < 1000 < len(pickle.dumps(memory))
    for table in (memory, mapped):
        again = pickle.loads(pickle.dumps(table))
        assert again.path == table.path
        assert np.array_equal(again.cdf(np.arange(200), np.arange(200)), memory.cdf(np.arange(200), np.arange(200)))


def test_threads_share_a_table(tmp_path):
    """Many threads that touch a fresh table for the first time get what one of them gets."""
    rng = np.random.default_rng(0)
    rows = [(str(i), rng.normal(size=rng.integers(1, 200))) for i in range(2000)]
    memory = ReferenceTable.build(rows)
    memory.save(tmp_path)
    mapped = ReferenceTable.load(tmp_path)
    asked = [(rng.integers(0, 2000, 500), rng.normal(size=500)) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda query: mapped.cdf(*query), asked))
    assert all(np.array_equal(values, memory.cdf(*query)) for values, query in zip(got, asked, strict=True))


@given(contents | uniform)
@settings(max_examples=40)
def test_describe_by_brute_force(content):
    """The ten numbers, each from its definition."""
    content = {prompt: [s for s in row if abs(s) < 2] or [0.1] for prompt, row in content.items()}
    got = ReferenceTable.build(content.items()).describe()
    rows = [np.sort(np.float32(row)).astype(float) + 0.0 for row in content.values()]
    pooled, sizes = np.concatenate(rows), [len(row) for row in rows]
    expected = {
        "prompts": len(rows),
        "references": len(pooled),
        "references_min": min(sizes),
        "references_median": np.median(sizes),
        "references_max": max(sizes),
        "tied_share": sum((row == s).sum() > 1 for row in rows for s in row) / len(pooled),
        "prompts_without_resolution": sum(len(set(row)) == 1 for row in rows),
        "within_prompt_sd": np.mean([row.std(ddof=1) for row in rows if len(row) > 1] or [0.0]),
        "between_prompts_sd": np.std([row.mean() for row in rows], ddof=1) if len(rows) > 1 else 0.0,
        "kolmogorov_distance": np.mean(
            [max(abs((row <= x).mean() - (pooled <= x).mean()) for x in pooled) for row in rows]
        ),
    }
    assert list(got) == list(expected)
    assert np.allclose(list(got.values()), list(expected.values()), rtol=1e-6, atol=1e-7)


def test_describe_of_a_large_table_samples_fairly():
    """Above a million references the last number is of a sample, and the noise of K references is 0.87 / sqrt(K)."""
    rng = np.random.default_rng(0)
    table = ReferenceTable.build((str(i), row) for i, row in enumerate(rng.normal(size=(12_000, 100))))
    # E sup |Brownian bridge| = sqrt(pi/2) log 2 = .8687, standard deviation .26; over 4096 prompts and sqrt(K) = 10.
    error = 5 * 0.26 / 10 / np.sqrt(4096) + 0.005  # and the discreteness of K = 100
    assert abs(table.describe()["kolmogorov_distance"] - 0.08687) < error


def test_repr_says_what_it_is(tmp_path):
    """Prompts, references and where they are."""
    assert repr(ReferenceTable.build([("a", [1.0, 2.0])])) == "ReferenceTable(1 prompts, 2 references, in memory)"
    assert (
        repr(ReferenceTable.build([("a", [1.0])], path=tmp_path))
        == f"ReferenceTable(1 prompts, 1 references, {tmp_path})"
    )


def test_building_on_disk_keeps_memory_bounded(tmp_path):
    """48 MB of scores stream through without ever being in memory together."""
    code = f"""
        import resource, numpy as np
        from calibrated_rewards.table.reference_table import ReferenceTable
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ReferenceTable.build([("warm", np.zeros(400))] , path={str(tmp_path / "warm")!r})
        before = peak()
        rows = ((i.to_bytes(16, "big"), np.arange(i, i + 400)) for i in range(30_000, 0, -1))
        table = ReferenceTable.build(rows, path={str(tmp_path / "table")!r})
        table.merge(ReferenceTable.build([("x", [1.0])]), path={str(tmp_path / "merged")!r})
        for key, scores in table.items():
            pass
        print(peak() - before)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    assert float(out.stdout) < 24
    assert (tmp_path / "merged" / "table.safetensors").stat().st_size > 48e6


def test_mapped_tables_close_their_files(tmp_path):
    """Opening many tables leaves no file descriptor behind."""
    ReferenceTable.build([("a", [1.0])], path=tmp_path)
    descriptors = Path("/proc/self/fd")
    gc.collect()
    before = len(list(descriptors.iterdir()))
    for _ in range(50):
        ReferenceTable.load(tmp_path).scores(0)
    gc.collect()
    assert len(list(descriptors.iterdir())) <= before


class Labelled(list):
    """A sequence that answers by label, as a shuffled pandas Series does."""

    def __getitem__(self, label):
        return list.__getitem__(self, len(self) - 1 - label)


def test_rows_go_by_position_not_by_label():
    """The third prompt has the third row, whatever the container's own indexing says."""
    table = ReferenceTable.build([(p, [1.0]) for p in "abc"])

    assert table.rows(Labelled("abc")).tolist() == table.rows(["a", "b", "c"]).tolist()
    with pytest.raises(TypeError, match="prompts and ids are lists"):
        inspect.unwrap(ReferenceTable.find)(table, {0: "a"})


def test_what_is_handed_out_cannot_be_written_to():
    """Neither items() nor scores() of a table in memory."""
    table = ReferenceTable.build([("a", [1.0, 2.0]), ("b", [3.0])])

    given = [scores for _, scores in table.items()]
    with pytest.raises(ValueError, match="read-only"):
        given[0][:] = -1
    with pytest.raises(ValueError, match="WRITEABLE"):
        table.scores(0).flags.writeable = True


def test_extend_keeps_texts_for_prefix_search():
    """A prompt known by its key alone becomes findable by prefix once its text is seen."""
    table = ReferenceTable.build([("2+2", [0.0]), (prompt_key("2+2=4"), [5.0])]).extend([("2+2=4", [6.0])])

    rows, splits = table.rows_by_prefix(["2+2=4!"])
    assert splits.tolist() == [5]
    assert table.counts(rows).tolist() == [2]


def test_a_meta_too_large_for_the_header_leaves_the_old_table(tmp_path):
    """Refused before anything is moved."""
    ReferenceTable.build([("a", [1.0])], path=tmp_path / "t")
    with pytest.raises(ValueError, match="needs meta of less than"):
        ReferenceTable.build([("a", [2.0])], path=tmp_path / "t", meta={"x": "a" * 100_000_001})

    assert ReferenceTable.load(tmp_path / "t").scores(0).tolist() == [1.0]


def test_masked_scores_are_refused():
    """A mask would be lost."""
    with pytest.raises((TypeError, ValueError), match="masked"):
        ReferenceTable.build([("a", np.ma.array([1.0, 99.0], mask=[0, 1]))])
