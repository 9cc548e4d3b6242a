"""Calibration: prompts, a sampler and scorers to a ReferenceTable, at scale and resumable.

`calibrate.py` has the two calls: `calibrate` draws, scores and sorts, `import_rollouts` takes rollouts made elsewhere
(`importing.py`). A run is a directory of shards that any number of processes fill: `sources.py` reads prompts,
`run.py` puts them into shards and fills these, `work.py` draws and scores, `cluster.py` does so on Ray;
`run_directory.py` and `shards.py` are the files. `adaptive.py` decides K by prompt, `dry_run.py` forecasts the cost.

`inspect_table.py`, `inspect_rollouts.py` and `suspicious_rows.py` check the result. `on_demand.py` and `prediction/`
serve prompts that no table has.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibrated_rewards.calibration.adaptive import Adaptive as Adaptive
from calibrated_rewards.calibration.calibrate import calibrate as calibrate, import_rollouts as import_rollouts
from calibrated_rewards.calibration.on_demand import OnTheSpot as OnTheSpot
from calibrated_rewards.calibration.sources import Asked as Asked, prompts_from as prompts_from

if TYPE_CHECKING:
    from calibrated_rewards.calibration.cluster import RayCluster as RayCluster

# Imported at their first use: they bring heavy libraries.
LAZY = {"RayCluster": "cluster"}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
