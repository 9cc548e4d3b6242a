"""Direct Preference Heads: a small reward head on a language model's own hidden states (arXiv 2405.20053).

`preference_head.py` has the head itself: pooler, layers, names, files. `headed_model.py` puts it on a model, frozen,
with an adapter or trained whole, `base_weights.py` recognises that model again, and `turn_end.py` makes every input
end in the token at which it reads.
`data.py` reads preference data and orders tasks,
`losses.py` has what a head is trained with, and decay towards the initial weights.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.heads.data import (
        Pair as Pair,
        PairReader as PairReader,
        TaskTemplate as TaskTemplate,
        order_pairs as order_pairs,
        parse_pairs as parse_pairs,
    )
    from calibrated_rewards.heads.headed_model import HeadedModel as HeadedModel, SelectedLayers as SelectedLayers
    from calibrated_rewards.heads.losses import (
        ConservativeDPO as ConservativeDPO,
        HeadLoss as HeadLoss,
        JointLoss as JointLoss,
        PriorDecay as PriorDecay,
    )
    from calibrated_rewards.heads.pair_batches import (
        EncodedPair as EncodedPair,
        PairCollator as PairCollator,
        encode_pairs as encode_pairs,
    )
    from calibrated_rewards.heads.preference_head import (
        HeadSettings as HeadSettings,
        PreferenceHead as PreferenceHead,
    )
    from calibrated_rewards.heads.trainer import (
        PreferenceHeadTrainer as PreferenceHeadTrainer,
        add_references as add_references,
        cache_states as cache_states,
        measure_pairs as measure_pairs,
    )
    from calibrated_rewards.heads.turn_end import TurnEnd as TurnEnd, find_turn_end as find_turn_end

# Imported when they are asked for: they bring torch.
LAZY = {"HeadSettings": "preference_head", "PreferenceHead": "preference_head"}
LAZY |= {"HeadedModel": "headed_model", "SelectedLayers": "headed_model"}
LAZY |= dict.fromkeys(("ConservativeDPO", "HeadLoss", "JointLoss", "PriorDecay"), "losses")
LAZY |= dict.fromkeys(("Pair", "PairReader", "TaskTemplate", "order_pairs", "parse_pairs"), "data")
LAZY |= dict.fromkeys(("EncodedPair", "PairCollator", "encode_pairs"), "pair_batches")
LAZY |= dict.fromkeys(("PreferenceHeadTrainer", "add_references", "cache_states", "measure_pairs"), "trainer")
LAZY |= {"TurnEnd": "turn_end", "find_turn_end": "turn_end"}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
