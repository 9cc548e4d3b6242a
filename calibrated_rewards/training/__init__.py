"""Training runs to start, to read and to edit, online and offline, and checks of other trainers' settings.

`online` holds a file a run (RLOO, GRPO, PPO); `offline` learns from rollouts that are there; `check_settings` says
what in a framework's settings changes the optimum.
"""
