"""`calibrated-rewards demo`: the whole machine on a real language model."""

import argparse
import os
import warnings
from pathlib import Path

from calibrated_rewards.cli.errors import Whole

EPILOG = """examples:
  calibrated-rewards demo                  # minutes; fetches some 180 MB the first time
  calibrated-rewards demo --quick          # under a minute, nothing is fetched, models of random weights
  calibrated-rewards demo --out mine --seed 1

A language model of 135 million weights is the reference policy; a reward model and a judge are trained on disjoint
halves of human ratings. Rollouts are drawn and scored (calibration), what training would come to is said beforehand
(the frontier), two policies are trained, for the calibrated and transformed reward and for the raw one, and both are
evaluated by the judge on prompts that nobody has seen. Ctrl-C whenever you like: called again, it goes on where it was.
The same seed gives the same numbers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where all is kept: demo")
    parser.add_argument("--quick", action="store_true", help="in miniature: to see that everything works here")
    parser.add_argument("--seed", type=Whole(0), default=0, metavar="N", help="of everything that is drawn: 0")
    cache = "for what is fetched, and the reward models: ~/.cache/calibrated-rewards"
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/calibrated-rewards"), metavar="DIR", help=cache)


def run(options: argparse.Namespace) -> int:
    """Fetch, train, measure, tell."""
    # Read when torch is first imported: threads that wait busily are many times slower where a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from functools import partial
    from typing import Any

    import transformers

    from calibrated_rewards.cli.demo import parts
    from calibrated_rewards.cli.demo.parts import FULL, QUICK
    from calibrated_rewards.cli.demo.show import show

    # Its bars and reports are of many small loads; ours say how far the demo is.
    spoken: Any = transformers.logging
    spoken.set_verbosity_error()
    spoken.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it
    out: Path = options.out
    if options.quick:
        show(partial(parts.tiny, out / "miniature"), QUICK, out, options.seed)
    else:
        show(partial(parts.real, options.cache), FULL, out, options.seed)
    return 0
