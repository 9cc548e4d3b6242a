"""`python -m calibrated_rewards` is `calibrated-rewards`, which does not look for modules in the current folder."""

import os
import sys

if __name__ == "__main__":
    # `python -m` put it in front: a torch.py that lies there would be imported by the command.
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
    from calibrated_rewards.cli import main

    raise SystemExit(main())
