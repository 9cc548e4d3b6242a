"""How other servers of reward models are asked: OpenRLHF's, and this library's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from calibrated_rewards.models.http_client import check_plain, numbers, text_fingerprint
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.plain import plain


@dataclass(frozen=True)
class OpenRlhf:
    """OpenRLHF's /get_reward, and the servers made after it: texts, rendered here, and a list of rewards.

    Its own server takes EOS and padding off the end of a text and adds one EOS. Chats need the tokenizer of the reward
    model (or of the policy, if the server was made for its texts) for its template.
    """

    model: str
    """What is served there, for the fingerprint; it is not sent."""
    tokenizer: Any = None
    text: Text = field(default_factory=Text)
    path: str = "/get_reward"

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            check_plain(self.text)

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """The whole text, and that of the prompt."""
        return [self._texts(p, c) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Never."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """The request."""
        queries, prompts = map(list, zip(*items, strict=True))
        return {"query": queries, "prompts": prompts, "labels": [""] * len(items)}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """The rewards, each a number or a list of one."""
        return numbers(answer["rewards"])

    def doubt(self, answer: Any) -> str:
        """None."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, but for what the server is."""
        return {"dialect": "openrlhf", "model": self.model, "text": text_fingerprint(self.text, self.tokenizer)}

    def _texts(self, prompt: Prompt, completion: Completion) -> tuple[str, str]:
        if self.tokenizer is None and not isinstance(prompt, str):
            raise ValueError(
                f"OpenRlhf sends text, got messages: {start_of(prompt)}. Give a tokenizer, OpenRlhf(tokenizer=...), "
                "whose chat template renders them"
            )
        return self.text.render(self.tokenizer, prompt, completion)[0], self.text.opening(self.tokenizer, prompt)[0]


@dataclass(frozen=True)
class Native:
    """This library's own server: prompts and completions as they are, raw scores."""

    model: str
    """What is served there, for the fingerprint; it is not sent."""
    path: str = "/score"

    def inputs(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        """Texts, and messages as plain JSON."""
        return [(plain(p), plain(c)) for p, c in zip(prompts, completions, strict=True)]

    def alone(self, item: Any) -> bool:
        """Never."""
        return False

    def payload(self, items: list[Any]) -> dict[str, Any]:
        """The request."""
        prompts, completions = map(list, zip(*items, strict=True))
        return {"prompts": prompts, "completions": completions}

    def scores(self, answer: Any, count: int) -> Sequence[float]:
        """The raw scores."""
        return numbers(answer["raw"])

    def doubt(self, answer: Any) -> str:
        """None."""
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on, but for what the server is."""
        return {"dialect": "native", "model": self.model}
