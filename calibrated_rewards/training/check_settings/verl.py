"""verl's settings, read in 0.9.1: RLOO with the KL in the reward is exact; GRPO with it in the loss is close."""

from calibrated_rewards.training.check_settings.rules import Case, Framework, Is, Off, OneOf, Positive, Rule, Strength

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_IN_REWARD: tuple[Case, ...] = (("algorithm.use_kl_in_reward", Is(True)),)
_IN_LOSS: tuple[Case, ...] = ((f"{_ACTOR}.use_kl_loss", Is(True)),)
_GRPO: tuple[Case, ...] = (("algorithm.adv_estimator", Is("grpo")),)

VERL = Framework(
    name="verl",
    version="0.9.1",
    rules=(
        Rule(
            "algorithm.adv_estimator",
            OneOf(("rloo", "rloo_vectorized", "grpo", "grpo_vectorized")),
            "algorithm.adv_estimator=rloo",
            "advantages are divided by the batch's standard deviation",
            "warning",
        ),
        Rule(
            "algorithm.norm_adv_by_std_in_grpo",
            Off(),
            "algorithm.norm_adv_by_std_in_grpo=False",
            "rewards over the standard deviation of their group have another beta for each prompt",
            only=_GRPO,
        ),
        Rule(
            "algorithm.use_kl_in_reward",
            Is(True),
            "algorithm.use_kl_in_reward=True",
            "without a KL the optimum is an argmax",
            only=((f"{_ACTOR}.use_kl_loss", Off()),),
        ),
        Rule(
            "algorithm.use_kl_in_reward",
            Is(True),
            f"algorithm.use_kl_in_reward=True and {_ACTOR}.use_kl_loss=False",
            "a KL in the loss has each token's own gradient, not the sequence's; in the reward it is exact",
            "warning",
            only=_IN_LOSS,
        ),
        Rule(
            f"{_ACTOR}.use_kl_loss",
            Off(),
            f"{_ACTOR}.use_kl_loss=False",
            "it would be a second KL",
            only=_IN_REWARD,
        ),
        Rule(
            "algorithm.kl_ctrl.kl_coef",
            Positive(),
            "algorithm.kl_ctrl.kl_coef=BETA",
            "without a KL the optimum is an argmax",
            only=_IN_REWARD,
        ),
        Rule(
            "algorithm.kl_ctrl.type",
            Is("fixed"),
            "algorithm.kl_ctrl.type=fixed",
            "beta would change as training goes on",
            only=_IN_REWARD,
        ),
        Rule(
            "algorithm.kl_penalty",
            OneOf(("kl", "k1")),
            "algorithm.kl_penalty=kl",
            "in the reward, only log pi - log pi_ref has the gradient of the KL",
            only=_IN_REWARD,
        ),
        Rule("algorithm.gamma", Is(1), "algorithm.gamma=1.0", "discounts the reward"),
        Rule("algorithm.use_pf_ppo", Off(), "algorithm.use_pf_ppo=False", "draws completions again by their scores"),
        Rule(
            "algorithm.filter_groups.enable",
            Off(),
            "algorithm.filter_groups.enable=False",
            "leaves prompts out by their rewards",
            "warning",
        ),
        Rule(
            f"{_ACTOR}.loss_agg_mode",
            OneOf(("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")),
            f"{_ACTOR}.loss_agg_mode=seq-mean-token-sum",
            "weighs tokens by the length of their completion",
        ),
        Rule(f"{_ACTOR}.entropy_coeff", Off(), f"{_ACTOR}.entropy_coeff=0", "adds another objective"),
        Rule(f"{_ACTOR}.ppo_epochs", Is(1), f"{_ACTOR}.ppo_epochs=1", "later passes are off-policy", "warning"),
        Rule(
            "reward.reward_manager.name",
            OneOf(("naive", "CalibratedRewardManager")),
            "reward.reward_manager.name=naive",
            "other managers add penalties, or turn errors into a reward of 0, the worst quantile there is",
            "warning",
        ),
    ),
    defaults={
        "algorithm.adv_estimator": "gae",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        "algorithm.kl_ctrl.kl_coef": 0.001,
        "algorithm.kl_ctrl.type": "fixed",
        "algorithm.kl_penalty": "kl",
        "algorithm.gamma": 1.0,
        "algorithm.use_pf_ppo": False,
        "algorithm.filter_groups.enable": False,
        f"{_ACTOR}.use_kl_loss": False,
        f"{_ACTOR}.kl_loss_coef": 0.001,
        f"{_ACTOR}.loss_agg_mode": "token-mean",
        f"{_ACTOR}.entropy_coeff": 0,
        f"{_ACTOR}.ppo_epochs": 1,
        f"{_ROLLOUT}.n": 1,
        f"{_ROLLOUT}.temperature": 1.0,
        f"{_ROLLOUT}.top_p": 1,
        f"{_ROLLOUT}.top_k": -1,
        "data.max_response_length": 512,
        "reward.reward_manager.name": "naive",
    },
    strengths=(
        Strength("algorithm.kl_ctrl.kl_coef", only=_IN_REWARD),
        Strength(f"{_ACTOR}.kl_loss_coef", group=f"{_ROLLOUT}.n", only=(*_IN_LOSS, *_GRPO)),
        Strength(f"{_ACTOR}.kl_loss_coef", only=_IN_LOSS),
    ),
    sampling={
        "max_tokens": "data.max_response_length",
        "temperature": f"{_ROLLOUT}.temperature",
        "top_p": f"{_ROLLOUT}.top_p",
        "top_k": f"{_ROLLOUT}.top_k",
    },
)
