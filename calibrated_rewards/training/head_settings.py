"""The parts and the settings of a run of `train head`, and what is refused before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from calibrated_rewards.files import Message, setting
from calibrated_rewards.heads.losses import ConservativeDPO, HeadLoss, JointLoss
from calibrated_rewards.heads.preference_head import BACKBONES, POOLERS
from calibrated_rewards.heads.trainer import check_joint, check_window
from calibrated_rewards.training.launch import check_numbers, option


@dataclass(frozen=True)
class HeadLaunch:
    """The parts of a run and where it leaves its files, beside its settings."""

    policy: str
    pairs: Sequence[str]
    """Sources of preferences, each as task=source or without a task."""
    out: Path
    eval_pairs: Sequence[str] = ()
    """Sources of the pairs of evaluation, in place of a share of the others."""
    templates: Path | None = None
    """A JSON file of templates by task."""
    end_token: str | None = None
    """The end-of-turn token; None: what the template writes behind an answer, else EOS."""
    chat: bool | None = None
    """True makes a user's message of each prompt that is text."""
    dtype: str = "float32"
    trust_remote_code: bool = False
    report_to: Sequence[str] = ()


@dataclass(frozen=True)
class HeadTraining:
    """Settings of the run; each is an option of the command."""

    backbone: str = option("frozen", "what is trained under the head: nothing, an adapter, or all weights", *BACKBONES)
    pooler: str = option("identity", "f in the score w . f(h)", *POOLERS)
    layers: str = option("-1", "the layer that is read, -1 for the last; several as 8,16,-1, or all: a learned mix")
    heads: str = option("reward", "names of the scores, as helpful,harmless; a pair's column head names its own")
    loss: str = option("separable", "chosen up and rejected down each, or their difference", "separable", "contrastive")
    smoothing: float = option(0.1, "share of pairs taken to be labelled the wrong way round")
    penalty: float = option(0.0, "weight of the squared scores")
    centring: float = option(0.0, "weight of the squared sum of a pair's scores")
    dpo_weight: float = option(0.0, "weight of cDPO on the policy beside the head's loss; 1 in the paper")
    dpo_beta: float = option(0.1, "cDPO's beta")
    sft_weight: float = option(0.0, "weight of the chosen completions' negative log-likelihood")
    epochs: int = option(
        0, "how often each pair comes; 0: 3 times, and 30 over a frozen backbone, where it costs little"
    )
    steps: int = option(0, "updates; 0: as --epochs says")
    pairs_a_step: int = option(64, "pairs of a step, of all processes together")
    rows: int = option(8, "pairs that a process reads at once; memory, not the result")
    window: int = option(0, "pack texts into rows of so many tokens; 0 pads each; not over a frozen backbone")
    max_length: int = option(0, "most tokens of a text, whose beginning goes; 0: what the model reads")
    mix: str = option("size", "how often a task comes: by its pairs, or as often as any other", "size", "uniform")
    lr: float = option(1e-4, "highest learning rate of a trained backbone: 1e-4 for LoRA, 3e-6 to 1e-5 for all weights")
    head_lr: float = option(1e-3, "highest learning rate of the head")
    warmup: int = option(20, "steps in which the learning rates rise; they then fall to 0 along a cosine")
    head_decay: float = option(0.1, "weight decay of the head")
    prior_decay: float = option(0.1, "decay of a trained backbone's weights towards the initial ones")
    max_grad_norm: float = option(1.0, "longer gradients are cut to this length")
    dropout: float = option(0.0, "dropout within the head")
    lora_rank: int = option(16, "rank of the adapter of --backbone lora")
    bf16: bool = option(False, "compute a trained backbone in bfloat16, and keep what is trained in --dtype")
    checkpoint_activations: bool = option(False, "compute a trained backbone's activations twice: less memory, slower")
    held_out: float = option(0.05, "share of the prompts whose pairs are held out for evaluation; 0: none")
    eval_steps: int = option(100, "steps from one evaluation to the next")
    save_steps: int = option(100, "steps from checkpoint to checkpoint, from which the run can go on")
    seed: int = option(0, "of the pairs' order, the held-out prompts, the head and the adapter")

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "epochs", "warmup", "window", "max_length", "seed"), 0)
        check_numbers(self, **counts, pairs_a_step=1, eval_steps=1, lora_rank=1, head_decay=0, prior_decay=0)
        check_joint(self.backbone, self.joint_loss(), 0.0)
        check_window(self.backbone == "frozen", self.window)
        check_unused(self)
        if len({*self.names}) < len(self.names) or "" in self.names:
            raise ValueError(Message(f"scores have names, each its own, got {setting('heads', repr(self.heads))}"))
        self.layer_indices(1)
        if not 0 <= self.held_out < 1:
            raise ValueError(
                Message(f"a share is 0 or more and below 1, got {setting('held_out', str(self.held_out))}")
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each score that the head gives, in the order of `heads`."""
        return tuple(name.strip() for name in self.heads.split(","))

    def joint_loss(self) -> JointLoss:
        """Make the loss; ValueError for numbers that none has."""
        head = HeadLoss(self.loss, self.smoothing, self.penalty, self.centring)
        dpo = ConservativeDPO(self.dpo_beta, self.smoothing)
        return JointLoss(head, dpo, dpo_weight=self.dpo_weight, sft_weight=self.sft_weight)

    def layer_indices(self, layers: int) -> tuple[int, ...]:
        """Return the indices into the hidden states of a model of so many layers."""
        if self.layers == "all":
            return tuple(range(layers + 1))
        try:
            return tuple(int(each) for each in self.layers.split(","))
        except ValueError:
            number = setting("layers", self.layers)
            raise ValueError(Message(f"layers are whole numbers with commas between, or all, got {number}")) from None


def check_unused(settings: HeadTraining) -> None:
    """Refuse a setting that is not the default and that the run would not read, with what to say in its place."""
    lora = setting("backbone", "lora")
    train = f"leave it out, or train {lora} or {setting('backbone', 'full')}"
    frozen = {
        "lr": f"has no learning rate: say the head's, {setting('head_lr', str(settings.lr))}, or {train}",
        "prior_decay": f"stays at its initial weights: {train}",
        "bf16": f"is read once, in the precision of its weights: say {setting('dtype', 'bfloat16')}, or {train}",
        "checkpoint_activations": f"is read once, without activations to keep: {train}",
    }
    rules = {name: f"a frozen backbone {rule}" for name, rule in frozen.items() if settings.backbone == "frozen"}
    if settings.backbone != "lora":
        rules["lora_rank"] = f"{setting('backbone', settings.backbone)} has no adapter: leave it out, or train {lora}"
    if not settings.dpo_weight:
        rules["dpo_beta"] = f"beta is cDPO's, whose weight is 0: leave it out, or say {setting('dpo_weight', '1')}"
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in rules and value != each.default:
            rule, separator, advice = rules[each.name].partition(": ")
            flag = f"--{each.name.replace('_', '-')}" if value is True else ""
            got = setting(each.name, str(value), option=flag)
            raise ValueError(Message(f"{rule}, got {got}{separator}{advice}"))
