"""Check types and shapes at run time, but not in tests that solve for optima: it would take nine tenths of their time.

Shapes and types of the same functions are checked wherever other tests call them.
"""

import gc

import jaxtyping
import pytest
import typecheck

gc.disable()  # until all is imported and collected: nothing of it goes away, and looking for what does takes a sixth

jaxtyping.jaxtyped = typecheck.check  # before the import of the first module that it checks

SOLVE = ("tests/theory/test_optimum.py", "calibrated_rewards/theory/optimum.py", "calibrated_rewards/theory/named.py")
EXAMPLES = ("tests/test_readme.py::test_examples_run", "tests/evaluation/test_report.py::test_the_reward_is_promised")


def pytest_collection_finish() -> None:
    """Collect garbage again from here on, and leave out what is there for good."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def typed_calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count calls anew for each test, and leave out the type checks of one that solves for an optimum."""
    typecheck.count_anew()
    name = request.node.nodeid
    if any(f"{path}::" in name for path in SOLVE) or any(example in name for example in EXAMPLES):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
