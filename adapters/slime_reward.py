"""slime, and its fork miles: an asynchronous function, of one sample or of a group (`--group-rm`).

    --custom-rm-path calibrated_rewards.adapters.slime_reward.reward \
    --reward-key reward        # optional: then raw, u and hit are in the sample's reward too

with CALIBRATED_REWARD=/abs/reward in the `env_vars` of Ray's runtime_env. It runs in the rollout manager, which has no
GPU: score by a server.
Prompt's key: `sample.prompt`, messages, or the rendered template with `--apply-chat-template`; or the entry of
`sample.metadata` (`--metadata-key`) that the reward names as `id_column`.
Faithful to E[R] - beta KL: `--advantage-estimator ppo --kl-coef BETA --kl-loss-type k1`. GRPO ignores `--kl-coef`; near
is `--disable-grpo-std-normalization --use-kl-loss --kl-loss-coef BETA --kl-loss-type k2`.
"""

import asyncio
from typing import Any

from calibrated_rewards.reward import ascore, configured, details, identifier, loud, number


async def reward(args: Any, sample: Any, **_: Any) -> Any:
    """Give a number, or the dict that `--reward-key` picks one from; for a list of samples, a list of them."""
    samples = sample if isinstance(sample, list) else [sample]
    with loud("slime"):
        calibrated = await asyncio.to_thread(configured)
        ids = [identifier(each.metadata or {}, calibrated.id_column) for each in samples]
        scores = await ascore(calibrated, [each.prompt for each in samples], [each.response for each in samples], ids)
        key = args.reward_key
        rewards = [{**details(score), key: number(score)} if key else number(score) for score in scores]
    return rewards if isinstance(sample, list) else rewards[0]
