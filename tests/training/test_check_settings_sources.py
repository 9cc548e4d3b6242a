"""Every setting that a rule names is one of its framework's, with the default that it has there."""

import dataclasses

import pytest
from trl import GRPOConfig, RLOOConfig

from calibrated_rewards.training.check_settings.check import FRAMEWORKS

# Names and defaults as the frameworks' own sources have them, taken out by a parser of those sources, not from ours.
SOURCES: dict[str, dict[str, object]] = {
    # 0.11.2, openrlhf/cli/train_ppo_ray.py: argparse
    "openrlhf": {
        "algo.kl.init_coef": 0.01,
        "algo.kl.use_loss": False,
        "algo.kl.estimator": "k1",
        "algo.kl.target": None,
        "algo.advantage.estimator": "gae",
        "algo.advantage.no_std_norm": False,
        "algo.advantage.gamma": 1,
        "algo.dynamic_filtering_enable": False,
        "actor.loss_agg_mode": "token-mean",
        "actor.entropy_coef": None,
        "reward.overlong_buffer_len": None,
        "reward.stop_properly_penalty_coef": None,
        "reward.clip_range": (-10, 10),
        "train.max_epochs": 1,
        "data.label_key": None,
        "rollout.max_new_tokens": None,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "rollout.n_samples_per_prompt": 1,
    },
    # 0.9.1, verl/trainer/config/_generated_ppo_trainer.yaml
    "verl": {
        "algorithm.adv_estimator": "gae",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.use_kl_in_reward": False,
        "algorithm.kl_ctrl.kl_coef": 0.001,
        "algorithm.kl_ctrl.type": "fixed",
        "algorithm.kl_penalty": "kl",
        "algorithm.gamma": 1.0,
        "algorithm.use_pf_ppo": False,
        "algorithm.filter_groups.enable": False,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "actor_rollout_ref.actor.entropy_coeff": 0,
        "actor_rollout_ref.actor.ppo_epochs": 1,
        "actor_rollout_ref.rollout.n": 1,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.rollout.top_p": 1,
        "actor_rollout_ref.rollout.top_k": -1,
        "data.max_response_length": 512,
        "reward.reward_manager.name": "naive",
    },
    # 4.6.0, swift/rlhf_trainers/args_mixin.py, swift/arguments/rlhf_args.py; gradient_accumulation_steps: transformers
    "ms-swift": {
        "advantage_estimator": "grpo",
        "kl_in_reward": None,
        "scale_rewards": None,
        "beta": None,
        "loss_type": None,
        "num_iterations": 1,
        "steps_per_generation": None,
        "sync_ref_model": False,
        "overlong_filter": False,
        "dynamic_sample": False,
        "top_entropy_quantile": 1.0,
        "delta": None,
        "reward_weights": None,
        "num_generations": 8,
        "max_completion_length": 512,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "gradient_accumulation_steps": None,
    },
    # a9564572e, skyrl/train/config/config.py
    "skyrl": {
        "trainer.algorithm.advantage_estimator": "grpo",
        "trainer.algorithm.grpo_norm_by_std": True,
        "trainer.algorithm.use_kl_in_reward": False,
        "trainer.algorithm.use_kl_loss": True,
        "trainer.algorithm.kl_estimator_type": "k3",
        "trainer.algorithm.kl_loss_coef": 0.001,
        "trainer.algorithm.kl_ctrl.type": "fixed",
        "trainer.algorithm.loss_reduction": "token_mean",
        "trainer.algorithm.advantage_batch_normalize": False,
        "trainer.algorithm.use_entropy_loss": False,
        "generator.zero_reward_on_non_stop": False,
        "generator.apply_overlong_filtering": False,
        "generator.n_samples_per_prompt": 5,
        "trainer.update_ref_every_epoch": False,
        "trainer.update_epochs_per_batch": 1,
        "generator.sampling_params.max_generate_length": 1024,
        "generator.sampling_params.temperature": 1.0,
        "generator.sampling_params.top_p": 1.0,
        "generator.sampling_params.top_k": -1,
        "generator.sampling_params.min_p": 0.0,
        "generator.sampling_params.repetition_penalty": 1.0,
    },
    # 624b824a8, slime/utils/arguments.py
    "slime": {
        "advantage_estimator": "grpo",
        "grpo_std_normalization": True,
        "use_kl_loss": False,
        "use_unbiased_kl": False,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "k1",
        "kl_coef": 0.0,
        "gamma": 1.0,
        "normalize_advantages": False,
        "calculate_per_token_loss": False,
        "entropy_coef": 0.0,
        "ref_update_interval": None,
        "custom_reward_post_process_path": None,
        "num_steps_per_rollout": None,
        "n_samples_per_prompt": 1,
        "rollout_max_response_len": None,
        "rollout_temperature": 1.0,
        "rollout_top_p": 1.0,
        "rollout_top_k": -1,
    },
    # cbff54d64, areal/api/cli_args.py
    "areal": {
        "ref": None,
        "actor.kl_ctl": 0.1,
        "actor.kl_estimator": "k1",
        "actor.reward_norm.std_level": "batch",
        "actor.reward_scaling": 1.0,
        "actor.reward_clip": 20.0,
        "actor.adv_norm.std_level": "batch",
        "actor.mask_no_eos_with_zero": False,
        "actor.overlong_reward_penalty": False,
        "actor.discount": 1.0,
        "actor.use_sapo_loss": False,
        "actor.ppo_n_minibatches": 4,
        "gconfig.greedy": False,
        "gconfig.max_new_tokens": 16384,
        "gconfig.temperature": 1.0,
        "gconfig.top_p": 1.0,
        "gconfig.top_k": 100000000,
    },
    # 7ea279abf, examples/configs/grpo_math_1B.yaml
    "nemo-rl": {
        "grpo.normalize_rewards": True,
        "grpo.use_leave_one_out_baseline": True,
        "grpo.num_generations_per_prompt": 16,
        "grpo.adv_estimator.name": "grpo",
        "grpo.reward_scaling.enabled": False,
        "grpo.reward_shaping.enabled": False,
        "grpo.overlong_filtering": False,
        "grpo.use_dynamic_sampling": False,
        "loss_fn.reference_policy_kl_penalty": 0.01,
        "loss_fn.reference_policy_kl_type": "k3",
        "loss_fn.use_kl_in_reward": False,
        "loss_fn.token_level_loss": True,
        "loss_fn.positive_example_nll_weight": 0.0,
        "policy.generation.max_new_tokens": "${policy.max_total_sequence_length}",
        "policy.generation.temperature": 1.0,
        "policy.generation.top_p": 1.0,
        "policy.generation.top_k": None,
    },
    # 49e62cb, examples/gsm8k_geo3k/train_colocate.py
    "lightrft": {
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
}
# What a framework fills in later: None means these.
LATER = {
    "ms-swift": {"beta": 0.04, "loss_type": "grpo"},  # RLHFArguments.__post_init__ and GRPOTrainer
    "areal": {"actor.reward_norm.std_level": None, "actor.adv_norm.std_level": None},  # reward_norm, adv_norm are None
    "nemo-rl": {"policy.generation.max_new_tokens": 512},  # ${policy.max_total_sequence_length}
}


def _trl(name):
    if name in ("trl-a2po", "trl-async-grpo", "trl-online-dpo"):
        from trl.experimental.a2po import A2POConfig
        from trl.experimental.async_grpo import AsyncGRPOConfig
        from trl.experimental.online_dpo import OnlineDPOConfig

        kind = {"a2po": A2POConfig, "async-grpo": AsyncGRPOConfig, "online-dpo": OnlineDPOConfig}[name[4:]]
    else:
        kind = RLOOConfig if name == "trl-rloo" else GRPOConfig
    plain = (field for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING)
    # A default that is made anew each time is of a setting that no rule names.
    return {field.name: field.default for field in plain}


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.name)
def test_every_setting_is_the_frameworks_own(framework):
    """Name and default of each setting are those of the framework's source, or of TRL's classes themselves."""
    source = SOURCES.get(framework.name) or _trl(framework.name)
    expected = {**source, **LATER.get(framework.name, {})}
    given = dict(framework.defaults)
    if framework.name == "trl-online-dpo":  # its default of beta is made anew each time
        assert "beta" not in given
    assert given == {name: expected.get(name, "no such setting") for name in given}


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.name)
def test_every_rule_says_why_and_what_to_write(framework):
    """Each rule gives a reason without a full stop, and a replacement that names the setting or the way out."""
    for rule in framework.rules:
        assert rule.why
        assert not rule.why.endswith(".")
        assert rule.write is None or not rule.write.endswith(".")
        assert rule.severity in ("error", "warning", "note")
