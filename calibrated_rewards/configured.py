"""The reward that the environment names, for trainers that are told a function's path and pass no objects.

`CALIBRATED_REWARD` is a directory that `save_pretrained` wrote, or a repository of the Hub. It is loaded when it is
first needed, once in a process, and its reward model is verified, unless `CALIBRATED_REWARD_VERIFY=0`. Functions,
checkpoints with code of their own and servers that it names need `CALIBRATED_REWARD_TRUST_REMOTE_CODE=1`.
"""

import logging
import os
import threading

from calibrated_rewards.reward import CalibratedReward
from calibrated_rewards.rewarding.spelling import NeedsTrust

PLACE, VERIFY, TRUST = "CALIBRATED_REWARD", "CALIBRATED_REWARD_VERIFY", "CALIBRATED_REWARD_TRUST_REMOTE_CODE"
logger = logging.getLogger("calibrated_rewards")

_loaded: dict[str, CalibratedReward] = {}
_loading = threading.Lock()


def configured() -> CalibratedReward:
    """The reward of this process."""
    place = os.environ.get(PLACE)
    if not place:
        raise ValueError(
            f"set the environment variable {PLACE} to a directory that CalibratedReward.save_pretrained wrote"
        )
    with _loading:
        if place not in _loaded:
            reward = _load(place)
            if reward.scorer is not None and os.environ.get(VERIFY, "1") != "0":
                logger.info("%s: %s", place, reward.verify())
            _loaded[place] = reward
        return _loaded[place]


def _load(place: str) -> CalibratedReward:
    try:
        return CalibratedReward.from_pretrained(place, trust_remote_code=os.environ.get(TRUST, "0") == "1")
    except NeedsTrust as error:
        raise ValueError(f"{error.what}: read it, then allow it with {TRUST}=1") from None
