"""Where requests wait: the completions of all of them are scored together, and each is answered on its own."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from calibrated_rewards.reward.batching import Coalescer, Full
from calibrated_rewards.reward.scores import Score
from calibrated_rewards.serving.dialects import Ask
from calibrated_rewards.serving.limits import Limits, Refused
from calibrated_rewards.serving.metrics import Metrics
from calibrated_rewards.table.reference_table import UnknownPromptError

LOG = logging.getLogger("calibrated_rewards.server")


@dataclass(frozen=True)
class Waiting:
    """One completion, and when nobody waits for it any more."""

    ask: Ask
    until: float


@dataclass(frozen=True, eq=False)
class Desk:
    """Takes the completions of a request, and gives their scores."""

    reward: Any
    """A CalibratedReward."""
    limits: Limits
    metrics: Metrics
    coalescer: Coalescer = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        made = Coalescer(self.work, max_batch=limits.batch, max_wait=limits.wait, max_queue=limits.queue)
        object.__setattr__(self, "coalescer", made)

    async def scores(self, asks: Sequence[Ask]) -> list[Score]:
        """The scores of a request's completions; `Refused` if any has none."""
        until = time.monotonic() + self.limits.answer_seconds
        try:
            futures = self.coalescer.submit_all([Waiting(ask, until) for ask in asks])
        except Full as error:
            raise Refused(503, str(error), 1) from None
        waiting = [asyncio.wrap_future(future) for future in futures]
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                # Not cut short by the first that fails: the others of the request are being worked on.
                given = await asyncio.gather(*waiting, return_exceptions=True)
        except TimeoutError:
            raise _late(self.limits) from None
        return self.checked(given)

    def work(self, batch: Sequence[Waiting]) -> list[Score | None]:
        """The scores of completions of any requests, in the coalescer's thread; None where it is too late."""
        now = time.monotonic()
        wanted = [at for at, each in enumerate(batch) if each.until > now]
        found: list[Score | None] = [None] * len(batch)
        pairs = [at for at in wanted if batch[at].ask.prompt is not None]
        texts = [at for at in wanted if batch[at].ask.prompt is None]
        self.metrics.batch_size.observe(len(batch))
        if pairs:
            asks = [batch[at].ask for at in pairs]
            ids = [ask.id for ask in asks]
            prompts, completions = [ask.prompt for ask in asks], [ask.completion for ask in asks]
            self._put(found, pairs, self.reward.score(prompts, completions, ids))
        if texts:
            self._put(found, texts, self.reward.score_texts([batch[at].ask.completion for at in texts]))
        return found

    def _put(self, found: list[Score | None], places: list[int], scores: Any) -> None:
        for at, score in zip(places, scores, strict=True):
            found[at] = score

    def checked(self, given: Sequence[Score | BaseException | None]) -> list[Score]:
        """The scores, if there is one for each; what failed is in the log, and no more than its kind in the answer."""
        scores = [each for each in given if isinstance(each, Score)]
        self.metrics.tell(scores)
        if len(scores) == len(given):
            return scores
        errors = [each for each in given if isinstance(each, BaseException)]
        for error in errors:
            if not isinstance(error, UnknownPromptError):
                self.metrics.failures.inc()
                LOG.error("the reward model failed on a completion", exc_info=error)
                raise Refused(500, f"the reward model failed ({type(error).__name__}); the server's log tells more")
        if errors:
            self.metrics.misses.inc(len(errors))
            raise Refused(404, self._without_path(str(errors[0])))
        raise _late(self.limits)

    def _without_path(self, said: str) -> str:
        path = self.reward.table.path
        return said.replace(str(path), "of this server") if path else said


def _late(limits: Limits) -> Refused:
    return Refused(504, f"the reward model did not answer within {limits.answer_seconds:g} seconds", 1)
