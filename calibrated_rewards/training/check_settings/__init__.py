"""Checks of other trainers' settings: under which a run maximises E[reward] - beta KL, and what to write.

`check.py` has `check_settings`, `trl.py` the settings to give TRL's trainers, `rules.py` the form of the tables, and
`frameworks.py` the tables of the other frameworks. `python -m calibrated_rewards.training.check_settings` prints them.
"""

from calibrated_rewards.training.check_settings.check import Report, check_settings
from calibrated_rewards.training.check_settings.trl import a2po_settings, grpo_settings, rloo_settings

__all__ = ["Report", "a2po_settings", "check_settings", "grpo_settings", "rloo_settings"]
