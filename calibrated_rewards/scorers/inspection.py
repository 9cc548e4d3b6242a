"""Which kind of reward model a checkpoint holds: by its config, its heads and its labels, never by its name."""

from typing import Literal, TypeAlias

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from calibrated_rewards.files import Message, setting
from calibrated_rewards.scorers.checkpoint import Checkpoint

Kind: TypeAlias = Literal[
    "sequence-classifier",
    "cross-encoder",
    "multi-attribute",
    "value-head",
    "process",
    "judge",
    "expected-rating",
    "rated-judge",
    "token-logit",
    "implicit",
]

KINDS_WITHOUT_HEAD = (
    f"a judge that answers in words is {setting('kind', 'judge')}, a policy trained with DPO "
    f"{setting('kind', 'implicit')} with {setting('reference')}, "
    f"a model whose score is the logit of its next token (Nemotron) {setting('kind', 'token-logit')}, "
    f"a process reward model {setting('kind', 'process')} with {setting('mark')}; "
    "of a reward adapter, name the adapter's folder"
)


def kind_of(checkpoint: Checkpoint, base: Checkpoint, trust_remote_code: bool = False) -> Kind:
    """The kind that a checkpoint can only be, or a ValueError that says what to choose; `base` for adapters."""
    what = architecture(base)
    task = checkpoint.adapter.get("task_type")
    if task == "TOKEN_CLS" or what.endswith("ForTokenClassification"):
        raise ValueError(
            Message(
                f"{checkpoint.name} ({what}) gives a score to each step of a completion: say "
                f"{setting('kind', 'process')}, and with {setting('mark')} the token that ends a step"
            )
        )
    if needs_code(base) and not trust_remote_code:
        heads = ", ".join(checkpoint.value_heads)
        without = (
            f"; or, without its code, read its head ({heads}) with {setting('kind', 'value-head')}" if heads else ""
        )
        raise ValueError(
            Message(
                f"{base.name} is a {what}, which transformers does not know and which brings its own code: read it, "
                f"then allow it with {setting('trust_remote_code', 'True')} (and say which of its outputs is the "
                f"score, {setting('output', 'score')}, unless it is called logits){without}"
            )
        )
    if task == "SEQ_CLS" or (what.endswith("ForSequenceClassification") and is_known(what)):
        return "cross-encoder" if is_encoder(base) and _labels(checkpoint, base) == 1 else "sequence-classifier"
    if needs_code(base):
        return "sequence-classifier" if classifies(base) else "multi-attribute"
    if checkpoint.value_heads:
        return "value-head"
    encoder = "of an embedding model train a classification head first; of a reward adapter, name the adapter's folder"
    raise ValueError(
        Message(
            f"{checkpoint.name} ({what}) has no head that gives a score, and would get a random one: "
            f"{encoder if is_encoder(base) else KINDS_WITHOUT_HEAD}"
        )
    )


def check_writes(checkpoint: Checkpoint, base: Checkpoint, kind: str) -> None:
    """Refuse a reward model as a language model: with tied embeddings it would load, and write at random."""
    what = architecture(base)
    classifies = what.endswith(("ForSequenceClassification", "ForTokenClassification"))
    scores = classifies or (not is_known(what) and bool(base.value_heads))
    if checkpoint.adapter.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") or (
        scores and not any("lm_head" in name for name in base.weights)
    ):
        raise ValueError(
            Message(
                f"the kind {kind} reads the words that a model writes, and {checkpoint.name} ({what}) was trained to "
                f"give scores: its weights for words are gone or no longer used. Leave out {setting('kind', kind)}"
            )
        )


def architecture(checkpoint: Checkpoint) -> str:
    """The class of model that was saved."""
    named = checkpoint.config.get("architectures") or [
        f"{checkpoint.config.get('model_type', 'model')} of no known class"
    ]
    return str(named[0])


def is_known(architecture: str) -> bool:
    """Whether it is one of transformers' own classes."""
    return getattr(transformers, architecture, None) is not None


def needs_code(checkpoint: Checkpoint) -> bool:
    """Whether its class is defined in a file of its own."""
    return bool(checkpoint.config.get("auto_map")) and not is_known(architecture(checkpoint))


def classifies(checkpoint: Checkpoint) -> bool:
    """Whether a custom model promises the outputs of a sequence classifier: logits."""
    return "AutoModelForSequenceClassification" in checkpoint.config.get("auto_map", {})


def is_encoder_decoder(checkpoint: Checkpoint) -> bool:
    """Whether an encoder reads and a decoder of its own writes: T5, BART."""
    known = checkpoint.config.get("model_type") in transformers.CONFIG_MAPPING
    return known and bool(parse_config(checkpoint).is_encoder_decoder)


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Whether it reads in both directions: a kind of model that is trained to fill in words, and no encoder-decoder."""
    if checkpoint.config.get("model_type") not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    config = parse_config(checkpoint)
    return not (config.is_encoder_decoder or getattr(config, "is_decoder", False))


def _labels(checkpoint: Checkpoint, base: Checkpoint) -> int:
    """How many labels there are: an adapter's own head says it, or the config."""
    return (checkpoint.labels if checkpoint.adapter else None) or int(parse_config(base).num_labels or 2)


def parse_config(checkpoint: Checkpoint) -> transformers.PretrainedConfig:
    """The config with what config.json leaves out because it is the default."""
    found: transformers.PretrainedConfig = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(
        checkpoint.config
    )
    return found
