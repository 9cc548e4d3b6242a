"""The report: one page of HTML about a calibration, its training and its evaluation, by `report(directory)`."""

from calibrated_rewards.evaluation.report.report import report as report
