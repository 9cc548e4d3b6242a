"""Hypothesis strategies for transforms, procedures and betas."""

import numpy as np
from hypothesis import strategies as st

from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.procedures import BestOf, RewindAndRepeat, SoftBestOf, Standard, WorstOf
from calibrated_rewards.theory.transforms import (
    Affine,
    Chain,
    Exponential,
    Identity,
    Log,
    NormalQuantile,
    Power,
    Tabulated,
)

moderate = st.floats(0.05, 20.0)
whole = st.integers(1, 12)


def _table(increments: list[float]) -> Tabulated:
    values = np.concatenate([[0.0], np.cumsum(increments)])
    return Tabulated(np.linspace(0.0, 1.0, len(values)), values)


tables = st.lists(st.floats(0.01, 5.0), min_size=1, max_size=6).map(_table)


def _onto_quantiles(table: Tabulated) -> Chain:
    """A table that ends at 1, by an Affine."""
    return Chain(table, Affine(1 / table.values[-1]))


bounded = st.one_of(
    st.just(Identity()),
    st.builds(Exponential, st.one_of(moderate, moderate.map(lambda t: -t))),
    st.builds(Power, st.floats(0.2, 5.0)),
    tables,
)
affine = st.builds(Affine, st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
transforms = st.one_of(
    bounded,
    st.just(Log()),
    st.just(NormalQuantile()),
    st.builds(Chain, st.one_of(bounded, st.just(Log())), affine),
    st.builds(Chain, st.builds(Power, st.floats(0.3, 3.0)), st.builds(Exponential, moderate)),
    st.builds(Chain, tables.map(_onto_quantiles), st.builds(Exponential, moderate)),
)
weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=8).filter(any)
mixtures = st.one_of(st.builds(BestOfUpTo, whole), weights.map(lambda each: BestOfUpTo(len(each), each)))
calibrated_procedures = st.one_of(st.just(Standard()), st.builds(BestOf, whole), st.builds(WorstOf, whole), mixtures)
procedures = st.one_of(
    calibrated_procedures,
    st.builds(SoftBestOf, st.integers(1, 5), st.floats(0.05, 5.0)),
    st.builds(RewindAndRepeat, st.floats(0.1, 0.95), whole),
)
betas = st.floats(-3.0, 3.0).map(lambda x: 10.0**x)
