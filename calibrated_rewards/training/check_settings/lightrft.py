"""LightRFT's settings, read at 49e62cb (2026-03-05): RLOO with a k1 penalty in the reward, as in OpenRLHF."""

from calibrated_rewards.training.check_settings.rules import Case, Framework, Is, Off, OneOf, Positive, Rule, Strength

_IN_REWARD: tuple[Case, ...] = (("init_kl_coef", Positive()), ("use_kl_loss", Off()))

LIGHTRFT = Framework(
    name="lightrft",
    version="49e62cb",
    rules=(
        Rule("init_kl_coef", Positive(), "--init_kl_coef BETA", "without a KL the optimum is an argmax"),
        Rule(
            "use_kl_loss",
            Off(),
            "the command without --use_kl_loss",
            "a KL in the loss has each token's own gradient, not the sequence's; in the reward it is exact",
            "warning",
        ),
        Rule(
            "kl_estimator",
            Is("k1"),
            "--kl_estimator k1",
            "in the reward, only log pi - log pi_ref has the gradient of the KL",
            only=_IN_REWARD,
        ),
        Rule("kl_target", Off(), "the command without --kl_target", "beta would change as training goes on"),
        Rule(
            "advantage_estimator",
            OneOf(("rloo", "gae", "reinforce", "reinforce_baseline")),
            "--advantage_estimator rloo",
            "rewards over the standard deviation of their group have another beta for each prompt",
        ),
        Rule(
            "reward_running_norm",
            Off(),
            "the command without --reward_running_norm",
            "rewards over a running standard deviation have a beta that changes as training goes on",
        ),
        Rule(
            "advantages_norm",
            Off(),
            "the command without --advantages_norm",
            "dividing by the batch's standard deviation changes the step size with each batch",
            "warning",
        ),
        Rule("advantage_clip", Off(), "--advantage_clip 0", "cuts what the transform made"),
        Rule(
            "loss_agg_mode",
            OneOf(("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")),
            "--loss_agg_mode token-mean",
            "weighs tokens by the length of their completion",
        ),
        Rule("use_gspo", Off(), "the command without --use_gspo", "a sequence's ratio, and its own scaling", "warning"),
        Rule(
            "overlong_buffer",
            Off(),
            "the command without --overlong_buffer",
            "a penalty on length is taken off after calibration",
        ),
        Rule(
            "dynamic_sampling",
            Off(),
            "the command without --dynamic_sampling",
            "leaves prompts out by their rewards",
            "warning",
        ),
        Rule("max_epochs", Is(1), "--max_epochs 1", "later passes are off-policy, and clipped", "warning"),
    ),
    defaults={
        "init_kl_coef": 0.01,
        "use_kl_loss": False,
        "kl_estimator": "k1",
        "kl_target": None,
        "advantage_estimator": "gae",
        "reward_running_norm": False,
        "reward_clip": 0.0,
        "advantages_norm": False,
        "advantage_clip": 0.0,
        "loss_agg_mode": "seq-mean-token-mean",
        "use_gspo": False,
        "overlong_buffer": False,
        "dynamic_sampling": False,
        "max_epochs": 1,
        "generate_max_len": 1024,
        "temperature": 1.0,
        "top_p": 1.0,
        "n_samples_per_prompt": 1,
    },
    strengths=(Strength("init_kl_coef", only=(("init_kl_coef", Positive()),)),),
    sampling={"max_tokens": "generate_max_len", "temperature": "temperature", "top_p": "top_p"},
    clips=("reward_clip",),
)
