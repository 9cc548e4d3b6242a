"""A callable's fingerprint: other code or state is another one, and the same scorer has the same one in any process."""

import functools
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import tiny
import torch

from calibrated_rewards import Exponential, scaled, theory
from calibrated_rewards.models.callable_fingerprint import describe
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.scorers.protocol import fingerprint

SCORER = '''
import functools, re
THRESHOLD = 3
WORDS = {"good", "kind", "fine", "calm", "warm"}
calls = 0

def helper(text):
    return len(text) - THRESHOLD

def plain(prompts, completions):
    """Score by length."""
    return [float(helper(c)) for c in completions]

def words(prompts, completions, bonus=1.0, *, words=frozenset({"a", "b", "c", "d"})):
    return [bonus * sum(w in c for w in WORDS | words) + (c in {"x", "y", "z"}) for c in completions]

def closure(sign, cut):
    def score(prompts, completions):
        try:
            return [sign * float(len(c) > cut) for c in completions]
        except TypeError:
            return [0.0 for _ in completions]
    return score

class Base:
    weight = 2.0
    def value(self, text):
        return self.weight * len(text)

class Scorer(Base):
    def __init__(self, sign, table=None):
        self.sign, self.table = sign, table
    def __call__(self, prompts, completions):
        return [self.sign * self.value(c) for c in completions]
    def method(self, prompts, completions):
        return self(prompts, completions)

SCORERS = {
    "function": plain,
    "defaults": words,
    "closure": closure(1.0, {"b": 1, "a": 2}),
    "object": Scorer(1.0, {"x", "y", "z"}),
    "method": Scorer(1.0).method,
    "lambda": lambda p, c: [float(x in {"q", "r", "s"}) for x in c],
    "partial": functools.partial(words, bonus=2.0),
    "cached": functools.lru_cache(plain),
    "pattern": re.compile("a+").findall,
}
'''
CHANGES = {
    "code": ("len(text) - THRESHOLD", "len(text) + THRESHOLD", {"function", "cached"}),
    "global": ("THRESHOLD = 3", "THRESHOLD = 4", {"function", "cached"}),
    "set of a global": ('"warm"', '"cold"', {"defaults", "partial"}),
    "default": ("bonus=1.0", "bonus=-1.0", {"defaults", "partial"}),
    "default by keyword": ('frozenset({"a"', 'frozenset({"e"', {"defaults", "partial"}),
    "constant of a set": ('{"x", "y", "z"} for', '{"x", "y", "w"} for', set()),
    "closure": ("closure(1.0", "closure(-1.0", {"closure"}),
    "closure in a mapping": ('"a": 2', '"a": 3', {"closure"}),
    "handled error": ("except TypeError", "except ValueError", {"closure"}),
    "state": ('Scorer(1.0, {"x"', 'Scorer(-1.0, {"x"', {"object"}),
    "state of a method's object": ("Scorer(1.0).method", "Scorer(-1.0).method", {"method"}),
    "base class": ("return self.weight * len", "return self.weight + len", {"object", "method"}),
    "attribute of a class": ("weight = 2.0", "weight = -2.0", {"object", "method"}),
    "argument of a partial": ("bonus=2.0", "bonus=3.0", {"partial"}),
    "constant in a lambda": ('"q"', '"t"', {"lambda"}),
    "pattern": ('"a+"', '"b+"', {"pattern"}),
}
SAME = {
    "another line": ("THRESHOLD = 3", "\n\n\nTHRESHOLD = 3"),
    "a comment": ("    return len(text)", "    # by letters\n    return len(text)"),
    "a docstring": ('"""Score by length."""', '"""Longer is better."""'),
    "no docstring": ('    """Score by length."""\n', ""),
    "the order of a set": ('{"good", "kind", "fine", "calm", "warm"}', '{"warm", "calm", "fine", "kind", "good"}'),
    "a class's docstring": ("class Base:\n", 'class Base:\n    """Weighs."""\n'),
    "something else in the file": ("calls = 0", "calls = 7\nother = 1"),
}


def loaded(source: str, name: str = "a_users_module") -> dict[str, dict]:
    """The fingerprints of the scorers of a module, as that module's own."""
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(source, f"/somewhere/{name}.py", "exec"), module.__dict__)
        return {each: fingerprint(scorer) for each, scorer in module.SCORERS.items()}
    finally:
        del sys.modules[name]


def changed(before: dict[str, dict], after: dict[str, dict]) -> set[str]:
    return {name for name in before if [*differences(before[name], after[name])]}


@pytest.mark.parametrize("what", CHANGES)
def test_what_scores_depend_on_is_in_it(what: str) -> None:
    """Each change of one word changes those scorers that use it, and no other."""
    old, new, those = CHANGES[what]
    assert old in SCORER or not those
    assert changed(loaded(SCORER), loaded(SCORER.replace(old, new))) == those


@pytest.mark.parametrize("what", SAME)
def test_what_scores_do_not_depend_on_is_not_in_it(what: str) -> None:
    """Lines, comments, docstrings, the order of sets, and what nobody reads."""
    old, new = SAME[what]
    assert old in SCORER
    assert changed(loaded(SCORER), loaded(SCORER.replace(old, new))) == set()


def test_another_module_is_the_same_scorer() -> None:
    """A script that became a module, or a file that was renamed: the same code has the same digest."""
    assert changed(loaded(SCORER), loaded(SCORER, "another_name")) == set()


def test_every_process_says_the_same(tmp_path: Path) -> None:
    """Whatever the seed of its hashes, the place of the file, and the addresses of its objects."""
    (tmp_path / "scorers.py").write_text(SCORER)
    code = (
        "import json, scorers; from calibrated_rewards.scorers.protocol import fingerprint;"
        "print(json.dumps({name: fingerprint(each) for name, each in scorers.SCORERS.items()}, sort_keys=True))"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environments = [{**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    runs = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        for env in environments
    ]
    assert runs[0].stdout == runs[1].stdout
    assert not re.search(r"0x[0-9a-f]{6}", runs[0].stdout)


@dataclass
class Holder:
    """A scorer that holds something."""

    held: object

    def __call__(self, prompts, completions):
        """The same for all."""
        return [0.0 for _ in zip(prompts, completions, strict=True)]


def itself() -> list:
    """A list that holds itself."""
    found: list = [1]
    found.append(found)
    return found


def other_tokenizer():
    """A tokenizer with one more word."""
    found = tiny.tokenizer()
    found.add_tokens(["zebra"])
    return found


UNLIKE = {
    "arrays": (np.arange(3.0), np.arange(3.0) + 1e-9),
    "arrays of another type": (np.arange(3), np.arange(3.0)),
    "tensors": (torch.arange(3.0), torch.tensor([0.0, 1.0, 2.5])),
    "models": (tiny.classifier(), tiny.classifier(seed=1)),
    "tokenizers": (tiny.tokenizer(), other_tokenizer()),
    "true and one": ([True], [1]),
    "text and bytes": ("a", b"a"),
    "tuples and lists": ((1, 2), [1, 2]),
    "nested": ({"a": [{"b": {1, 2}}]}, {"a": [{"b": {1, 3}}]}),
    "functions": (lambda x: x + 1, lambda x: x + 2),
    "objects": (Holder(1), Holder(2)),
    "partials": (functools.partial(max, 1), functools.partial(max, 2)),
    "built-in methods": ({"a": 1}.get, {"a": 2}.get),
    "classes": (dict, list),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_states_of_all_kinds_are_told_apart(kind: str) -> None:
    """Two values of each kind differ; one that was copied does not."""
    one, other = UNLIKE[kind]
    assert fingerprint(Holder(one)) == fingerprint(Holder(one)) != fingerprint(Holder(other))
    assert "unread" not in fingerprint(Holder(one))


# Scorers in which one word is changed: each change is of something that the scores depend on.
CHANGED = {
    "a default that a base class has too": (
        "class B:\n def __call__(self, p, c, w=1.0): return c\n"
        "class S(B):\n def __call__(self, p, c, w=2.0): return c\nscorer = S()",
        ("w=2.0", "w=1.0"),
        ("w=2.0", "w=-2.0"),
    ),
    "a method under a library's decorator": (
        "import torch\nclass S:\n @torch.no_grad()\n def __call__(self, p, c): return 2.0\nscorer = S()",
        ("return 2.0", "return -2.0"),
    ),
    "an object's method under a library's decorator": (
        "import torch\nclass M:\n @torch.inference_mode()\n def f(self, x): return 2.0\nm = M()\n"
        "def scorer(p, c): return [m.f(x) for x in c]",
        ("return 2.0", "return -2.0"),
    ),
    "a static call": (
        "class S:\n @staticmethod\n def __call__(p, c): return 2.0\nscorer = S()",
        ("return 2.0", "return -2.0"),
    ),
    "an argument of a partial method": (
        "import functools\nclass S:\n def f(self, p, c, w): return w\n __call__ = functools.partialmethod(f, w=1.0)\n"
        "scorer = S()",
        ("w=1.0", "w=-1.0"),
        ("return w", "return -w"),
    ),
    "a property without a function of Python": (
        'import operator\nclass S:\n a, b = 1, 2\n w = property(operator.attrgetter("a"))\n'
        " def __call__(self, p, c): return self.w\nscorer = S()",
        ('attrgetter("a")', 'attrgetter("b")'),
    ),
    "a function that was made from a text": (
        'space = {}\nexec("def f(self, p, c): return 2.0", space)\nclass S:\n __call__ = space["f"]\nscorer = S()',
        ("return 2.0", "return -2.0"),
    ),
    "a module in a module": (
        "import sys, types\na = types.ModuleType('of_a_user_a')\na.b = types.ModuleType('of_a_user_b')\na.b.w = 1.0\n"
        "def scorer(p, c): return a.b.w",
        ("a.b.w = 1.0", "a.b.w = -1.0"),
    ),
    "a rate of a layer": (
        "import torch\ndef make():\n m = torch.nn.Sequential(torch.nn.Softplus(beta=1.0))\n"
        " return lambda p, c: m(p)\nscorer = make()",
        ("beta=1.0", "beta=2.0"),
    ),
    "a layer of the user's": (
        "import torch\nclass L(torch.nn.Module):\n def __init__(self, w):\n  super().__init__(); self.w = w\n"
        " def forward(self, x): return self.w * x\nm = torch.nn.Sequential(L(1.0))\ndef scorer(p, c): return m(p)",
        ("L(1.0)", "L(-1.0)"),
        ("self.w * x", "self.w + x"),
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_every_kind_of_code_and_setting_is_in_it(what: str) -> None:
    """Whatever way Python or a library has to hold a number or a function that scores depend on."""

    def of(source: str) -> dict:
        return loaded(f'{source}\nSCORERS = {{"scorer": scorer}}')

    source, *changes = CHANGED[what]
    assert not changed(of(source), of(source))
    for old, new in changes:
        assert source.count(old) == 1
        assert changed(of(source), of(source.replace(old, new))) == {"scorer"}


# What no score depends on, and is another one whenever it is made.
WORKERS = {
    "threads": "concurrent.futures.ThreadPoolExecutor(2)",
    "a thread": "threading.Thread()",
    "a temporary folder": "tempfile.TemporaryDirectory(); self.held.cleanup()",
    "a queue": "queue.Queue()",
    "the environment": "os.environ",
}


@pytest.mark.parametrize("what", WORKERS)
def test_threads_and_temporary_files_are_no_part_of_it(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer that is made again has others, and is the same."""
    source = (
        "import concurrent.futures, os, queue, tempfile, threading\nclass S:\n"
        f" def __init__(self): self.held = {WORKERS[what]}\n def __call__(self, p, c): return c\n"
        'SCORERS = {"scorer": S()}'
    )
    before = loaded(source)
    monkeypatch.setenv("ANOTHER_VARIABLE", "another value")
    assert changed(before, loaded(source)) == set()
    assert "unread" not in before["scorer"]


def test_a_value_that_holds_itself_is_read() -> None:
    """A list, an object and two functions that name each other have an end."""
    holder = Holder(None)
    holder.held = holder
    assert fingerprint(Holder(itself())) == fingerprint(Holder(itself()))
    assert fingerprint(holder)["kind"] == "callable"
    space: dict = {"__name__": "a_users_module"}
    exec("def f(p, c):\n return g(p, c)\ndef g(p, c):\n return f(p, c)", space)
    assert fingerprint(space["f"]) == fingerprint(space["f"])


def test_numbers_are_shown_and_all_else_is_a_digest() -> None:
    """An error can say from what to what; a secret is not written down."""
    said = (
        describe(Holder(2.5))["state"],
        describe(Holder("sk-secret"))["state"],
        describe(Holder(float("nan"))),
    )
    assert said[0] == {"held": 2.5}
    assert "secret" not in str(said[1])
    assert re.fullmatch("[0-9a-f]{16}", said[2]["state"]["held"])


def test_what_cannot_be_read_is_named() -> None:
    """A generator has no state that could be compared; a lock has none at all."""
    assert describe(Holder(x for x in "ab"))["unread"] == ["held (generator)"]
    assert "unread" not in describe(Holder([threading.Lock(), threading.RLock()]))


def test_a_scorer_within_says_for_itself() -> None:
    """What an object holds is asked for its own fingerprint; a Mock-like object is not asked anything."""

    class Told:
        def __init__(self, word):
            self.word = word

        def fingerprint(self):
            return {"kind": self.word[0]}

    class Anything:
        def __getattr__(self, name):
            raise KeyboardInterrupt(name)

    assert fingerprint(Holder(Told("ab"))) == fingerprint(Holder(Told("ac"))) != fingerprint(Holder(Told("b")))
    assert fingerprint(Holder(Anything))["kind"] == "callable"


def test_installed_code_is_known_by_its_name() -> None:
    """Another version of a library is no other scorer; a function of another name is."""
    assert fingerprint(Holder(np.mean)) == fingerprint(Holder(np.mean)) != fingerprint(Holder(np.median))
    copy = FunctionType(np.mean.__wrapped__.__code__, {}, "mean")
    assert fingerprint(Holder(copy)) != fingerprint(Holder(np.mean))


def with_the_package(_prompts: list[str], completions: list[str]) -> list[float]:
    """A scorer that calls classes and functions of the package, and one of its modules."""
    return [scaled(Exponential(2.0), "unit")(len(c) / theory.win_rate(LARGEST, 1.0)) for c in completions]


LARGEST = Exponential(3.0)


def test_the_package_may_move_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own objects go by their bare names, those of other packages by the module too."""
    before = describe(with_the_package)
    monkeypatch.setattr(Exponential, "__module__", "calibrated_rewards.elsewhere")
    monkeypatch.setattr(scaled, "__module__", "calibrated_rewards.theory.scales")
    assert describe(with_the_package) == before
    monkeypatch.setattr(theory, "__name__", "calibrated_rewards.theories")
    changed = describe(with_the_package)
    assert changed["layout"] == before["layout"]
    assert changed["code"] == before["code"]
    assert [name for name in before["state"] if changed["state"][name] != before["state"][name]] == ["global.theory"]
    monkeypatch.setattr(Exponential, "__module__", "numpy")
    assert describe(with_the_package)["state"]["global.LARGEST"] != before["state"]["global.LARGEST"]
