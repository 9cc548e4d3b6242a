"""Settings under which a trainer maximises E[reward] - beta KL, framework by framework."""

from calibrated_rewards.training.check_settings.check import Report, check_settings
from calibrated_rewards.training.check_settings.trl import grpo_settings, rloo_settings

__all__ = ["Report", "check_settings", "grpo_settings", "rloo_settings"]
