"""Open a calibrated reward that was saved, and say in options what its settings need."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from calibrated_rewards.reward.saving import NeedsTrust

if TYPE_CHECKING:
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward

HELP = "run the code and ask the servers that the saved reward names: functions, checkpoints with own code, URLs"


def add_argument(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """--trust-remote-code."""
    parser.add_argument("--trust-remote-code", action="store_true", help=HELP)


def open_reward(place: str | os.PathLike[str], *, trust: bool, **settings: Any) -> "CalibratedReward":
    """`CalibratedReward.from_pretrained`; what needs trust and has none is a ValueError that names the option."""
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward

    try:
        return CalibratedReward.from_pretrained(place, trust_remote_code=trust, **settings)
    except NeedsTrust as error:
        raise ValueError(f"{error.reason}: read it, then allow it with --trust-remote-code") from None
