"""Checks for your own transforms, procedures, scorers and adapters; and scorers and a sampler without a model.

- suites.py: `check_transform`, `check_procedure`, `check_picklable`; `HashScorer`, `NumberScorer`, `NumberSampler`
- check_scorer.py: `check_scorer` and its table of checks, which lie in check_inputs.py, check_same_score.py,
  check_side_effects.py and check_reading.py, by what they check
- subject.py, probes.py: the scorer under examination, the test texts
- check_adapter.py: `check_adapter`, for the file between a trainer and a calibrated reward
"""

from calibrated_rewards.testing.check_adapter import AdapterVerdict as AdapterVerdict, check_adapter as check_adapter
from calibrated_rewards.testing.check_scorer import check_scorer as check_scorer
from calibrated_rewards.testing.suites import (
    HashScorer as HashScorer,
    NumberSampler as NumberSampler,
    NumberScorer as NumberScorer,
    Verdict as Verdict,
    check_picklable as check_picklable,
    check_procedure as check_procedure,
    check_transform as check_transform,
)
