"""`python -m calibrated_rewards` is `calibrated-rewards`, which does not look for modules in the current folder."""

from calibrated_rewards.files import leave_current_folder

if __name__ == "__main__":
    leave_current_folder()
    from calibrated_rewards.cli.main import main

    raise SystemExit(main())
