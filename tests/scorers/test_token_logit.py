"""The logit of a token behind the conversation: against what `generate` gives for one new token, as Nemotron's card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.models.checkpoints import Kind
from calibrated_rewards.models.loading import Placement
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.judge import TokenLogit
from calibrated_rewards.scorers.loading import FromCheckpoint, load_scorer
from calibrated_rewards.scorers.protocol import Loaded, fingerprint

CHATS = [[{"role": "user", "content": text}] for text in tiny.texts(5, 0)]
COMPLETIONS = tiny.texts(5, 1)
KIND: Kind = "token-logit"


def writer(dtype: torch.dtype = torch.float32) -> Any:
    """A small causal LM whose logits spread."""
    model = tiny.causal(initializer_range=0.2)
    return model.to(dtype)


def generated(model: Any, token: int) -> list[float]:
    """The score of a token in the one step that `generate` takes behind each conversation."""
    tokenizer, scores = tiny.tokenizer(), []
    for prompt, completion in zip(CHATS, COMPLETIONS, strict=True):
        chat = [*prompt, {"role": "assistant", "content": completion}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        told = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        scores.append(model.generate(**ids, **told)["scores"][0][0][token].float().item())
    return scores


@pytest.mark.parametrize("token", [0, 7])
def test_it_is_the_score_that_generate_gives(token: int) -> None:
    """For each conversation, in one call or alone, with prefixes shared or not."""
    scorer = TokenLogit(writer(), tiny.tokenizer(), token=token)
    expected = generated(writer(), token)
    np.testing.assert_allclose(scorer(CHATS, COMPLETIONS), expected, atol=1e-4)
    np.testing.assert_allclose(scorer(CHATS[:1] * 2, COMPLETIONS[:2])[0], expected[0], atol=1e-4)
    assert scorer([], []).shape == (0,)


def test_sixteen_bits_do_not_tie() -> None:
    """The layer over the vocabulary is read in float32."""
    prompts, completions = tiny.texts(60, 2), tiny.texts(60, 3)
    scores = TokenLogit(writer(torch.bfloat16), tiny.tokenizer())(prompts, completions)
    assert len(np.unique(scores)) == 60
    own = TokenLogit(writer(), tiny.tokenizer())(prompts, completions)
    assert np.corrcoef(scores, own)[0, 1] > 0.99


def test_it_loads(tmp_path: Path) -> None:
    """As a kind, with its token; an id that the model does not have is refused."""
    folder = tiny.saved(writer(), tmp_path, tiny.tokenizer())
    loaded = load_scorer(folder, kind=KIND, token=7)
    np.testing.assert_allclose(loaded(CHATS, COMPLETIONS), generated(writer(), 7), atol=1e-4)
    with pytest.raises(ValueError, match="kind=token-logit"):
        load_scorer(folder)
    for token in (-1, tiny.VOCABULARY):
        with pytest.raises(ValueError, match=rf"among the model's {tiny.VOCABULARY}, got token={token}"):
            TokenLogit(writer(), tiny.tokenizer(), token=token)


def test_its_token_is_saved(tmp_path: Path) -> None:
    """The number of a token is no secret, as the text of the same name is that opens the Hub."""
    folder = tiny.saved(writer(), tmp_path / "model", tiny.tokenizer())
    scorer, table = load_scorer(folder, kind=KIND, token=7), ReferenceTable.build([(chat, [0.0]) for chat in CHATS])
    CalibratedReward(scorer, table).save_pretrained(tmp_path / "reward")

    again = CalibratedReward.from_pretrained(tmp_path / "reward").scorer

    assert again.fingerprint()["token"] == 7
    np.testing.assert_array_equal(again(CHATS, COMPLETIONS), scorer(CHATS, COMPLETIONS))


@pytest.mark.parametrize("secret", ["hf_x", True, {"is": 7}])
def test_a_secret_of_the_same_name_is_not_saved(secret: Any, tmp_path: Path) -> None:
    """Options of `from_pretrained` are not written with what opens the Hub."""
    placement = Placement(model_options={"token": secret, "attn_implementation": "eager"})
    reward = CalibratedReward(Loaded(FromCheckpoint("x", placement=placement)), ReferenceTable.build([("p", [0.0])]))
    reward.save_pretrained(tmp_path)

    options = json.loads((tmp_path / "reward.json").read_text())["scorer"]["recipe"]["placement"]["model_options"]
    assert options == {"attn_implementation": "eager"}


def test_the_fingerprint() -> None:
    """Token, text and weights count."""
    scorers = [
        TokenLogit(writer(), tiny.tokenizer()),
        TokenLogit(writer(), tiny.tokenizer(), token=1),
        TokenLogit(writer(), tiny.tokenizer(), text=Text(append_eos=True)),
        TokenLogit(tiny.causal(1), tiny.tokenizer()),
    ]
    assert len({json.dumps(fingerprint(scorer)) for scorer in scorers}) == len(scorers)
