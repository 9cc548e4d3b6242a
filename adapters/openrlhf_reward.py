"""OpenRLHF: `reward_func` of a file.

    export CALIBRATED_REWARD=/abs/reward
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url "$(calibrated-rewards path openrlhf_reward)" ...

Each vLLM engine's actor loads the reward on its own, next to the policy: a reward model that needs a GPU belongs behind
`calibrated-rewards serve`, whose URL OpenRLHF takes in the file's place.
Prompt's key: the rendered template, as the policy reads it; or, for a reward with an `id_column`, the label
(`--data.label_key uid`), which may be a mapping that has the column. OpenRLHF leaves special tokens at the end of
completions: name them as `endings`.
Faithful to E[R] - beta KL: `--algo.advantage.estimator rloo --algo.kl.init_coef BETA --algo.kl.estimator k1
--reward.clip_range -1e6 1e6` (the default of 10 cuts off log and unscaled exponential transforms), no
`--algo.kl.use_loss`. `scores` is the quantile: `--algo.dynamic_filtering_range 0 1` filters by it.
"""

from typing import Any

from calibrated_rewards.reward import completion_of, configured, details, identifier, loud, number, score_one


def reward_func(queries: list[str], prompts: list[str], labels: list[Any], **_: Any) -> dict[str, Any]:
    """Reward texts that begin with their prompts; called from threads, with one at a time, which share batches."""
    with loud("OpenRLHF"):
        reward = configured()
        scores = [
            score_one(reward, prompt, completion_of(query, prompt), identifier(label, reward.id_column))
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        logs = [details(score) for score in scores]
        return {
            "rewards": [number(score) for score in scores],
            "scores": [score.u for score in scores],
            "extra_logs": {name: [log[name] for log in logs] for name in ("raw", "u", "hit")},
        }
