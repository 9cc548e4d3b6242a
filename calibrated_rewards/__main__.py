"""`python -m calibrated_rewards` is `calibrated-rewards`."""

from calibrated_rewards.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
