"""A table on disk: what other programs read, what is refused, and what a kill leaves."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from hashlib import blake2b

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from calibrated_rewards.prompts import id_key, prompt_key
from calibrated_rewards.table.reference_table import ReferenceTable, Row
from calibrated_rewards.table.storage import pending_summary, write_table

DATA, SUMMARY = "table.safetensors", "table.json"


def some_rows(seed=0, prompts=40):
    """Ragged rows with aliases."""
    rng = np.random.default_rng(seed)
    return [Row(f"prompt {i}", rng.normal(size=rng.integers(1, 30)), [id_key(i)]) for i in range(prompts)]


def digest(directory):
    """The digest that ties the two files of a table together."""
    return json.loads((directory / SUMMARY).read_text())["header_digest"]


@pytest.mark.parametrize("ragged", [True, False])
def test_safetensors_reads_it(tmp_path, ragged):
    """The library itself opens the file, and finds the documented tensors."""
    rows = some_rows() if ragged else [(str(i), [i, 0.5]) for i in range(5)]
    table = ReferenceTable.build(rows, path=tmp_path, meta={"scorer": "x"})
    with safetensors.safe_open(tmp_path / DATA, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["meta"]) == {"scorer": "x"}
    aliases = {"alias_high", "alias_low", "alias_rows", "offsets"} if ragged else set()
    assert set(tensors) == {"keys_high", "keys_low", "lengths", "checksums", "scores"} | aliases
    assert tensors["scores"].tolist() == [score for _, row in table.items() for score in row.tolist()]
    assert sorted(tensors["keys_high"].tolist()) == tensors["keys_high"].tolist()


def test_a_reader_by_the_letter_of_the_documentation(tmp_path):
    """docs/reference/table_format.md is enough: bytes, struct, json and a hash find a prompt's scores."""
    rows = some_rows()
    ReferenceTable.build(rows, path=tmp_path)
    data = (tmp_path / DATA).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert json.loads((tmp_path / SUMMARY).read_text())["header_digest"] == (
        blake2b(data[: 8 + length], digest_size=16).hexdigest()
    )

    def column(name, code):
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        return struct.unpack(f"<{(end - begin) // struct.calcsize(code)}{code}", data[begin:end])

    for name, wanted in json.loads(metadata["digests"]).items():
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        assert blake2b(data[begin:end], digest_size=16).hexdigest() == wanted
    keys = list(zip(column("keys_high", "Q"), column("keys_low", "Q"), strict=True))
    offsets, scores = column("offsets", "q"), column("scores", "f")
    step = int(metadata["rows_per_block"])
    for block, checksum in enumerate(column("checksums", "Q")):
        edges = offsets[block * step], offsets[min(block * step + step, len(keys))]
        packed = struct.pack(f"<{edges[1] - edges[0]}f", *scores[slice(*edges)])
        assert int.from_bytes(blake2b(packed, digest_size=8).digest(), "little") == checksum
    for row in rows:
        key = blake2b(b"text:" + row.prompt.encode(), digest_size=16).digest()
        place = keys.index((int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")))
        assert list(scores[offsets[place] : offsets[place + 1]]) == sorted(np.float32(row.scores).tolist())


def test_any_flipped_bit_is_found(tmp_path):
    """One bit anywhere in either file: the full check raises ValueError, never anything else, never nothing."""
    ReferenceTable.build(some_rows(), path=tmp_path / "good", meta={"name": "\u00e9", "n": [1, 2.5]})
    source = random.Random(0)
    for name in (DATA, SUMMARY):
        whole = (tmp_path / "good" / name).read_bytes()
        start = int.from_bytes(whole[:8], "little") + 8 if name == DATA else len(whole)
        places = [*range(8), *source.sample(range(8, start), 30)]
        places += source.sample(range(start, len(whole)), 120) if name == DATA else []
        for place in places:
            shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
            altered = bytearray(whole)
            altered[place] ^= 1 << source.randrange(8)
            (tmp_path / "bad" / name).write_bytes(altered)
            with pytest.raises(ValueError, match=re.escape(str(tmp_path / "bad"))):
                ReferenceTable.load(tmp_path / "bad", verify=True)


def corrupted(directory, rows, block):
    """A table with one bit of one block of scores flipped."""
    ReferenceTable.build(rows, path=directory)
    with open(directory / DATA, "r+b") as file:
        file.seek(-4 * len(rows[0][1]) * (len(rows) - 164 * block) + 1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_scores_are_checked_when_they_are_touched(tmp_path):
    """Opening does not notice an altered score; serving it is refused, while the other blocks serve theirs."""
    rows = [(i.to_bytes(16, "big"), np.arange(100.0)) for i in range(1000)]
    corrupted(tmp_path, rows, block=2)  # of 65536 // 400 = 163 rows: row 328, in rows 326 to 488
    table = ReferenceTable.load(tmp_path)

    assert table.cdf([0, 325, 489, 999], [0.0] * 4).tolist() == [0.005] * 4
    for touch in (
        lambda: table.cdf([0, 326], [0.0, 0.0]),
        lambda: table.scores(400),
        lambda: table.icdf([488], [0.5]),
        lambda: list(table.blocks(np.arange(1000))),
        lambda: list(table.items()),
        table.describe,
        lambda: table.save(tmp_path / "copy"),
    ):
        with pytest.raises(ValueError, match="the scores of rows 326 to 488 must be as they were written"):
            touch()
    assert not (tmp_path / "copy" / DATA).exists()
    with pytest.raises(ValueError, match="rows 326 to 488"):
        ReferenceTable.load(tmp_path, verify=True)
    trusting = ReferenceTable.load(tmp_path, verify=False)
    assert len(trusting.scores(328)) == 100


@pytest.mark.parametrize(
    ("column", "touch"),
    [
        ("keys_high", lambda table: table.rows(["prompt 1"])),
        ("keys_low", lambda table: table.rows(["prompt 1"])),
        ("alias_rows", lambda table: table.rows(["?"], ids=[1])),
        ("alias_low", lambda table: table.rows(["?"], ids=[1])),
        ("offsets", lambda table: table.counts([0])),
        ("lengths", lambda table: table.rows_by_prefix(["prompt 1"])),
        ("checksums", lambda table: table.scores(0)),
    ],
)
def test_columns_are_checked_when_they_are_touched(tmp_path, column, touch):
    """A key, an offset, an alias that was altered leads nowhere, instead of to a wrong row."""
    ReferenceTable.build(some_rows(), path=tmp_path)
    data = bytearray((tmp_path / DATA).read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[column]["data_offsets"][0]
    data[8 + length + begin + 3] ^= 1
    (tmp_path / DATA).write_bytes(data)
    table = ReferenceTable.load(tmp_path)
    with pytest.raises(ValueError, match=f"{column} must be as it was written"):
        touch(table)


@pytest.mark.parametrize("change", [-1, -5000, 1])
def test_truncated_and_longer_files_are_refused(tmp_path, change):
    """The size must be the one that the header says."""
    ReferenceTable.build([(str(i), np.arange(100)) for i in range(100)], path=tmp_path)
    size = (tmp_path / DATA).stat().st_size
    os.truncate(tmp_path / DATA, size + change)
    with pytest.raises(ValueError, match=rf"{DATA} must have {size} bytes, as its header says, got {size + change}"):
        ReferenceTable.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100])
def test_files_cut_within_the_header_are_refused(tmp_path, keep):
    """Down to nothing at all."""
    ReferenceTable.build(some_rows(), path=tmp_path)
    os.truncate(tmp_path / DATA, keep)
    with pytest.raises(ValueError, match=f"must be a safetensors file, got {keep} bytes"):
        ReferenceTable.load(tmp_path)


def disguise(directory, head, rest):
    """Put a header in front of data, and write the table.json that belongs to it."""
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    (directory / DATA).write_bytes(head + rest)
    (directory / SUMMARY).write_text(json.dumps({"header_digest": blake2b(head, digest_size=16).hexdigest()}))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b'"version":"1"',
            b'"version":"2"',
            "must be a 'calibrated-rewards table' of version 1, .* got .* of version 2,",
        ),
        (b'"format":"calibrated-rewards table"', b'"format":"other"', "got a 'other' of version 1"),
        (b"canonical prompt 1", b"canonical prompt 9", "keys 'blake2b-128 of canonical prompt 9'"),
        (b'"prompts":"40"', b'"prompts":"41"', "tensors .* where the counts say"),
        (b'"prompts":"40"', b'"prompts":"x"', "invalid literal"),
        (b'\\"alias_low\\": 40', b'\\"alias_low\\": \\"x\\"', "got TypeError"),
        (b'\\"keys_low\\": ', b'\\"keys\\": ', "tensors"),
        (b'"prompts":"40"', b'"prompts":"-1"', "got -1 prompts"),
        (b'"rows_per_block":"', b'"rows_per_block":"-', "rows per block"),
        (b'"dtype":"F32"', b'"dtype":"F16"', "tensors"),
        (b'"scores":{', b'"points":{', "tensors"),
        (b'"__metadata__"', b'"metadata"', "got KeyError"),
        (b'"meta":"{}"', b'"meta":"["', "must be a 'calibrated"),
        (b'"meta":"{}"', b'"meta":"3"', "must be a 'calibrated"),
        (b'"meta":"{}"', b'"nometa":"{}"', "got KeyError"),
        (b"{", b"[", "must be a 'calibrated"),
        (b'"version":"1"', b'"version":"1"  ', "must be as it was written, a copy of the header"),
    ],
)
def test_other_headers_are_refused(tmp_path, old, new, message):
    """A header that says something else is refused for what it says, even if its digest is right."""
    ReferenceTable.build(some_rows(), path=tmp_path)
    data = (tmp_path / DATA).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert old in data[8 : 8 + length]
    disguise(tmp_path, data[8 : 8 + length].rstrip().replace(old, new, 1), data[8 + length :])
    with pytest.raises(ValueError, match=message):
        ReferenceTable.load(tmp_path)


def test_foreign_files_are_refused(tmp_path):
    """Another safetensors file, no file at all, another's table.json, and one that somebody edited."""
    with pytest.raises(FileNotFoundError, match="there is no table at"):
        ReferenceTable.load(tmp_path / "nowhere")
    ReferenceTable.build(some_rows(), path=tmp_path)
    good = (tmp_path / SUMMARY).read_text()
    (tmp_path / SUMMARY).write_text(good.replace('"prompts": 40', '"prompts": 50'))
    with pytest.raises(ValueError, match=r"table\.json must be as it was written, a copy of the header; got an edited"):
        ReferenceTable.load(tmp_path)
    for text in ("", "[]", '"x"', "{}", "\xff"):
        (tmp_path / SUMMARY).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"table\.json must be JSON with a header_digest"):
            ReferenceTable.load(tmp_path)
    (tmp_path / SUMMARY).write_text(good)
    save_file({"scores": np.zeros(3, np.float32)}, tmp_path / DATA)
    with pytest.raises(ValueError, match=r"table\.json must carry the digest of the header of table\.safetensors"):
        ReferenceTable.load(tmp_path)
    (tmp_path / DATA).unlink()
    with pytest.raises(FileNotFoundError, match=DATA):
        ReferenceTable.load(tmp_path)


def test_a_pickle_of_another_table_is_refused(tmp_path):
    """What was pickled is what is unpickled, or an error."""
    table = ReferenceTable.build(some_rows(), path=tmp_path)
    pickled = pickle.dumps(table)
    assert np.array_equal(pickle.loads(pickled).scores(3), table.scores(3))
    ReferenceTable.build(some_rows(seed=1), path=tmp_path)
    with pytest.raises(ValueError, match="must hold the table with digest"):
        pickle.loads(pickled)


def test_an_open_table_outlives_its_replacement(tmp_path):
    """A reader keeps the table that it opened when a writer puts another one in its place."""
    old = ReferenceTable.build([("a", [1.0, 2.0])], path=tmp_path)
    ReferenceTable.build([("a", [5.0])], path=tmp_path)
    assert old.scores(0).tolist() == [1.0, 2.0]
    assert ReferenceTable.load(tmp_path).scores(0).tolist() == [5.0]


def between_the_moves(directory, other):
    """What a writer leaves that is killed after its first move: new data, old table.json, and the new one pending."""
    shutil.copy(other / DATA, directory / DATA)
    shutil.copy(other / SUMMARY, directory / pending_summary(digest(other)))


def test_a_writer_that_died_between_its_moves(tmp_path):
    """Its table is read, its move is finished by the next writer, and its leavings go."""
    old, new = tmp_path / "old", tmp_path / "new"
    for path, score in ((old, 1.0), (new, 2.0)):
        ReferenceTable.build([("a", [score])], path=path)
    between_the_moves(old, new)
    (old / f".{DATA}.0123").write_bytes(b"half a table")
    assert ReferenceTable.load(old, verify=True).scores(0).tolist() == [2.0]
    (old / SUMMARY).unlink()  # and the same where there was no table before
    assert ReferenceTable.load(old, verify=True).scores(0).tolist() == [2.0]

    with pytest.raises(RuntimeError, match="no scores"):
        write_table(old, {"keys_high": np.zeros(1), "keys_low": np.zeros(1)}, 1, "{}", no_scores)
    assert sorted(path.name for path in old.iterdir()) == [SUMMARY, DATA]
    assert digest(old) == digest(new)
    os.remove(old / SUMMARY)
    with pytest.raises(ValueError, match="must carry the digest"):
        ReferenceTable.load(old)


def no_scores(first, last):
    """A source of scores that fails."""
    raise RuntimeError(f"no scores for rows {first} to {last}")


def test_a_failed_write_leaves_the_old_table(tmp_path):
    """And nothing else."""
    ReferenceTable.build([("a", [1.0])], path=tmp_path)
    with pytest.raises(ValueError, match="row 1"):
        ReferenceTable.build([("a", [2.0]), ("b", [np.nan])], path=tmp_path)
    with pytest.raises(RuntimeError, match="no scores for rows 0 to 1"):
        write_table(tmp_path, {"keys_high": np.zeros(1), "keys_low": np.zeros(1)}, 1, "{}", no_scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SUMMARY, DATA]
    assert ReferenceTable.load(tmp_path, verify=True).scores(0).tolist() == [1.0]


def test_a_living_writer_is_left_alone(tmp_path):
    """A second writer that starts and ends while the first one writes removes nothing of it; the last one wins."""
    began, may_end = threading.Event(), threading.Event()

    def slowly(_first, _last):
        began.set()
        assert may_end.wait(10)
        return np.float32([3.0])

    keys = {"keys_high": np.zeros(1, np.uint64), "keys_low": np.zeros(1, np.uint64)}
    slow = threading.Thread(target=write_table, args=(tmp_path, keys, 1, "{}", slowly))
    slow.start()
    assert began.wait(10)
    ReferenceTable.build([(bytes(16), [1.0])], path=tmp_path)
    assert ReferenceTable.load(tmp_path, verify=True).scores(0).tolist() == [1.0]
    may_end.set()
    slow.join()
    assert ReferenceTable.load(tmp_path, verify=True).scores(0).tolist() == [3.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [SUMMARY, DATA]


def test_others_may_read_what_was_written(tmp_path):
    """The files have the permissions that the umask leaves, not those of a private temporary file."""
    mask = os.umask(0o022)
    try:
        ReferenceTable.build([("a", [1.0])], path=tmp_path)
    finally:
        os.umask(mask)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in (DATA, SUMMARY)] == [0o644, 0o644]


def test_killed_writers_leave_a_whole_table(tmp_path):
    """Writers killed at random moments, a reader all the while: every load is one of the tables, whole."""
    writer = f"""
        import numpy as np
        from calibrated_rewards.table.reference_table import ReferenceTable
        print("ready", flush=True)
        i = 0
        while True:
            i += 1
            ReferenceTable.build([(str(p), np.full(i % 5 + 1, i)) for p in range(50)], path={str(tmp_path)!r})
    """
    ReferenceTable.build([(str(p), [0.0]) for p in range(50)], path=tmp_path)
    source, loads, seen = random.Random(0), 0, set()
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(writer)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            end, own = time.monotonic() + source.uniform(0.1, 0.4), set()
            while time.monotonic() < end or (len(own) < 6 and process.poll() is None):  # a busy machine takes longer
                table = ReferenceTable.load(tmp_path, verify=True)
                values = {float(score) for _, row in table.items() for score in row}
                assert len(values) == 1
                assert len(table) == 50
                loads, own = loads + 1, own | values
            seen |= own
            process.send_signal(signal.SIGKILL)
        ReferenceTable.load(tmp_path, verify=True)
    assert loads > 20
    assert len(seen) > 5
    ReferenceTable.build([("a", [1.0])], path=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SUMMARY, DATA]


def test_prompt_keys_in_a_table_are_those_of_prompts(tmp_path):
    """The keys on disk are the big-endian halves of `prompt_key`."""
    ReferenceTable.build([("a", [1.0])], path=tmp_path)
    with safetensors.safe_open(tmp_path / DATA, "np") as file:
        high, low = file.get_tensor("keys_high")[0], file.get_tensor("keys_low")[0]
    assert f"{high:016x}{low:016x}" == prompt_key("a").hex()
