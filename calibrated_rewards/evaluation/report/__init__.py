"""One page of HTML that says what was calibrated, whether it is good, what was trained, and what came out."""

from calibrated_rewards.evaluation.report.report import report as report
