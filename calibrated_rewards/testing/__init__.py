"""Checks for what users bring: transforms, procedures, scorers and adapters; and small fakes for tests.

`check_transform` and `check_procedure` are conformance suites, `check_scorer` examines a reward model, `check_adapter`
an adapter for a trainer. `HashScorer`, `NumberScorer` and `NumberSampler` are fakes without a model.
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
