"""Training runs to start, to read and to edit, and checks of other trainers' settings.

`online` has a file for each run (`trl.py`, `grpo.py`, `ppo.py`), which reads from top to bottom; `offline` learns from
rollouts that exist already; `check_settings` says under which settings a framework maximises E[reward] - beta KL.
Runs call the others by name: `launch.py` loads policy, reward and prompts, `run_folder.py` keeps settings, log and
model, `loop.py` has LoRA, the reference and the parts of the plain loops, `callbacks.py` TRL's log, `held_out.py` the
check on held-out rollouts, `trackers.py` trackio, wandb and others, `progress.py` the time left.
"""
