"""Scorers: anything that gives a prompt's completion a number. A plain function is one.

`protocol` defines them and calls them. `loading` has `load_scorer`, which looks at a checkpoint and picks the kind of
reward model: `classifiers`, `value_head`, `preference_head`, `process`, `implicit`, or `judge` for language models that
are asked.
`remote` and `remote_vllm` ask servers, `ensemble` combines scorers, `graded` reads levels in several dimensions off one
classifier, `pairwise` and `pair_models` make scorers of models that compare two completions. `differences` compares two
scorers' fingerprints.

>>> from calibrated_rewards.scorers import score
>>> score(lambda prompts, completions: [len(c) for c in completions], ["Hi", "Hi"], ["Hello!", "Go away"])
array([6., 7.], dtype=float32)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibrated_rewards.scorers.protocol import Scorer as Scorer, fingerprint as fingerprint, score as score

if TYPE_CHECKING:
    from calibrated_rewards.scorers.classifiers import (
        CrossEncoder as CrossEncoder,
        MultiAttribute as MultiAttribute,
        SequenceClassifier as SequenceClassifier,
    )
    from calibrated_rewards.scorers.ensemble import (
        Cost as Cost,
        Ensemble as Ensemble,
        Function as Function,
        LowerBound as LowerBound,
        Mean as Mean,
        Min as Min,
    )
    from calibrated_rewards.scorers.graded import (
        FLAMES as FLAMES,
        FLAMES_TEXT as FLAMES_TEXT,
        Dimension as Dimension,
        Graded as Graded,
        find_dimensions as find_dimensions,
    )
    from calibrated_rewards.scorers.implicit import ImplicitReward as ImplicitReward
    from calibrated_rewards.scorers.judge import (
        ExpectedRating as ExpectedRating,
        Judge as Judge,
        RatedJudge as RatedJudge,
        TokenLogit as TokenLogit,
    )
    from calibrated_rewards.scorers.loading import load_scorer as load_scorer
    from calibrated_rewards.scorers.pair_models import PairJudge as PairJudge
    from calibrated_rewards.scorers.pairwise import MeanWin as MeanWin
    from calibrated_rewards.scorers.preference_head import PreferenceHeadScorer as PreferenceHeadScorer
    from calibrated_rewards.scorers.process import ProcessReward as ProcessReward
    from calibrated_rewards.scorers.remote import Remote as Remote
    from calibrated_rewards.scorers.value_head import SharedBase as SharedBase, ValueHead as ValueHead

# Loaded when they are asked for: they bring heavy libraries.
_COMBINED = ("Cost", "Ensemble", "Function", "LowerBound", "Mean", "Min")
LAZY = {
    "load_scorer": "loading",
    "Remote": "remote",
    "PreferenceHeadScorer": "preference_head",
    **dict.fromkeys(_COMBINED, "ensemble"),
    **dict.fromkeys(("CrossEncoder", "MultiAttribute", "SequenceClassifier"), "classifiers"),
    **dict.fromkeys(("ExpectedRating", "Judge", "RatedJudge", "TokenLogit"), "judge"),
    **dict.fromkeys(("SharedBase", "ValueHead"), "value_head"),
    "ImplicitReward": "implicit",
    "MeanWin": "pairwise",
    "PairJudge": "pair_models",
    "ProcessReward": "process",
    **dict.fromkeys(("FLAMES", "FLAMES_TEXT", "Dimension", "Graded", "find_dimensions"), "graded"),
}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
    except ModuleNotFoundError as missing:
        raise ImportError(f"{name} needs {missing.name}: pip install 'calibrated-rewards[hf]'") from missing
