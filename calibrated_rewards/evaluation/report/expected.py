"""What the calibrated reward leads to on its own table, with ties and K: the numbers that recipes print."""

from collections.abc import Iterator

import numpy as np

from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.report.experiment import Experiment, main_procedure, procedure_of
from calibrated_rewards.evaluation.table_laws import TableRewards
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.reward.saving import from_json
from calibrated_rewards.theory.procedures import Procedure, Standard
from calibrated_rewards.theory.tilted_policy import Frontier
from calibrated_rewards.theory.transforms import scaled


def table_rewards(of: Experiment, procedure: Procedure) -> TableRewards | None:
    """The rewards of the table that policies are trained for; None where what is saved is not a reward of ranks."""
    settings, main = of.reward or {}, of.trained_for
    if main is None or "transform" not in settings:
        return None
    try:
        transform, calibration = from_json(settings["transform"]), from_json(settings.get("calibration"))
    except (KeyError, ValueError, TypeError):
        return None
    if transform != of.transform or not isinstance(calibration, EmpiricalCDF | None):
        return None
    return TableRewards(
        of.tables[main],
        scaled(of.transform, settings.get("scale", "unit")),
        procedure,
        settings.get("estimator", "empirical"),
        calibration.tolerance if calibration is not None else 0.0,
    )


def expectation_lines(of: Experiment) -> Iterator[str]:
    """A sentence for what the policy that fits the table's rewards gets, and one for theory where it says otherwise."""
    beta = (of.reward or {}).get("beta")
    rewards = table_rewards(of, _procedure(of))
    if rewards is None or not isinstance(beta, int | float):
        return
    try:
        expected = expect(
            rewards.table,
            rewards.transform,
            beta=beta,
            procedure=rewards.procedure,
            estimator=rewards.estimator,
            tolerance=rewards.tolerance,
            name="the reward",
        )
    except ValueError as error:
        yield f"{str(error)[:1].upper()}{str(error)[1:]}."
        return
    for line in expected.lines():
        yield f"{line[:1].upper()}{line[1:]}."


def table_curve(of: Experiment, procedure: Procedure, most: float) -> Frontier | None:
    """Win rate against KL of the policies that fit the table's rewards, as far as the table's KL reaches."""
    rewards = table_rewards(of, procedure)
    if rewards is None:
        return None
    most = min(most, 0.98 * float(rewards.most_kls.mean()))
    if most <= 0:
        return None
    high, low = (rewards.beta_for_kl(kl) for kl in (most / 50, most))
    betas = np.geomspace(high, low, 16)
    rates = np.array([[rewards.win_rate(beta) for beta in betas.tolist()]])
    return Frontier(of.transform, (procedure,), betas, np.array([rewards.kl(beta) for beta in betas.tolist()]), rates)


def _procedure(of: Experiment) -> Procedure:
    """The one that the experiment is about; one completion if it says none."""
    if of.evaluation is not None and of.evaluation.policies:
        rates = next(iter(of.evaluation.policies[0].win_rates.values()))
        return procedure_of(main_procedure([*rates])) or Standard()
    if of.frontier is not None and of.frontier.procedures:
        return procedure_of(main_procedure(of.frontier.procedures)) or Standard()
    return Standard()
