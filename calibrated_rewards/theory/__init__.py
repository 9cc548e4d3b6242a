"""The paper on [0, 1]: transforms, procedures, the tilted policy and its optimum; numpy and scipy only.

A *transform* (`transforms`) maps a calibrated reward u to the reward that is trained on, `scale` brings it to a fixed
range or variance. A *procedure* (`procedures`) is the way the policy is served, such as best of N; `mixtures` has one
for an N that is not known. `tilted_policy` computes what training for a transform gives, `optimum` the best transform
for a procedure, `named` reads the names of both. `finite_k`, `fixed_references` and `bands` say what K references can
tell, `quadrature` integrates over u, `shared_results` keeps what took long.
"""

from calibrated_rewards.theory.bands import band as band, coverage as coverage, dkw as dkw
from calibrated_rewards.theory.finite_k import (
    Estimator as Estimator,
    bias as bias,
    references_needed as references_needed,
    rmse as rmse,
    values as values,
)
from calibrated_rewards.theory.fixed_references import win_rate_at_k as win_rate_at_k, win_rate_at_kl as win_rate_at_kl
from calibrated_rewards.theory.mixtures import BestOfUpTo as BestOfUpTo
from calibrated_rewards.theory.named import NamedTransform as NamedTransform, parse_transform as parse_transform
from calibrated_rewards.theory.optimum import (
    Choice as Choice,
    Optimal as Optimal,
    optimal_transform as optimal_transform,
    optimum as optimum,
    tune as tune,
)
from calibrated_rewards.theory.procedures import (
    BestOf as BestOf,
    Calibrated as Calibrated,
    CalibratedProcedure as CalibratedProcedure,
    Procedure as Procedure,
    RewindAndRepeat as RewindAndRepeat,
    SoftBestOf as SoftBestOf,
    Standard as Standard,
    WorstOf as WorstOf,
)
from calibrated_rewards.theory.quadrature import Law as Law, reference_law as reference_law
from calibrated_rewards.theory.scale import Scale as Scale, moments as moments, scaled as scaled, span as span
from calibrated_rewards.theory.tilted_policy import (
    Frontier as Frontier,
    beta_for_kl as beta_for_kl,
    bin_masses as bin_masses,
    frontier as frontier,
    kl as kl,
    kl_of as kl_of,
    kl_range as kl_range,
    mean_tries as mean_tries,
    policy_law as policy_law,
    win_rate as win_rate,
    win_rate_of as win_rate_of,
)
from calibrated_rewards.theory.transforms import (
    Affine as Affine,
    Chain as Chain,
    Exponential as Exponential,
    Identity as Identity,
    Log as Log,
    NormalQuantile as NormalQuantile,
    Power as Power,
    Tabulated as Tabulated,
    Transform as Transform,
)
