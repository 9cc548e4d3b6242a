"""Published reward models by stand-ins with their code's habits: loaded, scored, saved in a reward, checked."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, GPTNeoXModel

from calibrated_rewards import CalibratedReward
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import FAILED, UNUSABLE, main
from calibrated_rewards.reward.saving import from_json, to_json
from calibrated_rewards.scorers.classifiers import MultiAttribute
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.pair_models import PairClassifier
from calibrated_rewards.testing.suites import NumberSampler

CHATS = [[{"role": "user", "content": text}] for text in tiny.texts(6, 0)]
COMPLETIONS = tiny.texts(6, 1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Custom code is copied to a folder of the test's, and forgotten afterwards."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def by_itself(folder: str, auto: Any = AutoModelForSequenceClassification, output: str = "score") -> np.ndarray:
    """What the published code gives for each chat alone, as its card asks it."""
    model, tokenizer = auto.from_pretrained(folder, trust_remote_code=True).eval(), tiny.tokenizer()
    scores = []
    for prompt, completion in zip(CHATS, COMPLETIONS, strict=True):
        chat = [*prompt, {"role": "assistant", "content": completion}]
        ids = torch.tensor(
            tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
        )
        with torch.inference_mode():
            scores.append(model(ids[None], torch.ones(1, len(ids), dtype=torch.long))[output].float().item())
    return np.array(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_armorm(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its gate looks for the assistant's header: invented ids have none, the first real rows do."""
    folder = published.armorm(tmp_path / "rm", dtype=dtype)
    expected = by_itself(folder)
    scorer = load_scorer(folder, output="score", trust_remote_code=True)
    np.testing.assert_allclose(
        scorer(CHATS, COMPLETIONS), expected, atol=(1e-4 if dtype == torch.float32 else 0.1) * expected.std()
    )
    np.testing.assert_allclose(
        scorer(CHATS[:1], COMPLETIONS[:1]), expected[:1], rtol=1e-4 if dtype == torch.float32 else 0.1
    )
    assert load_scorer(folder, output=1, trust_remote_code=True)(CHATS, COMPLETIONS) == pytest.approx(
        scorer(CHATS, COMPLETIONS)
    )
    # Called a classifier by its auto_map, it is read through its own forward.
    np.testing.assert_allclose(
        load_scorer(folder, trust_remote_code=True)(CHATS, COMPLETIONS), scorer(CHATS, COMPLETIONS), rtol=1e-2
    )


def test_an_input_that_published_code_refuses(tmp_path: Path) -> None:
    """Its own words, and what to do; in 16 bits, and for completions that are cut, as well."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = published.armorm(tmp_path / str(dtype), dtype=dtype)
        scorer = load_scorer(folder, output="score", trust_remote_code=True)
        with pytest.raises(
            ValueError, match=r"LlamaForRewardModelWithGating .*Token pattern not found.*lists of messages"
        ):
            scorer(["no chat"], ["yes"])
        assert scorer(CHATS, COMPLETIONS).shape == (6,)
    cut = load_scorer(folder, output="score", trust_remote_code=True, max_length=8)
    with (
        pytest.warns(UserWarning, match="8"),
        pytest.raises(ValueError, match="max_length that leaves these tokens in"),
    ):
        cut(CHATS[:1], ["a completion that is long"])
    chat = load_scorer(folder, output="score", trust_remote_code=True, chat=True)
    assert chat(["no chat"], ["yes"]) == scorer([[{"role": "user", "content": "no chat"}]], ["yes"])


def test_per_token_outputs_are_refused_on_real_rows(tmp_path: Path) -> None:
    """One row, or rows of one length, are enough to tell an attribute from a token."""
    folder = published.internlm2(tmp_path)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    torch.manual_seed(0)
    model.forward = lambda input_ids, attention_mask: {"all": input_ids.float(), "last": input_ids[:, -3:].float()}
    for rows in (["ab"], ["ab", "cd"]):
        with pytest.raises(ValueError, match="'all' has a number for each token"):
            MultiAttribute(model, tiny.tokenizer(), output="all").logits(rows, [""] * len(rows))
        assert MultiAttribute(model, tiny.tokenizer(), output="last").logits(rows, [""] * len(rows)).shape == (
            len(rows),
            3,
        )


def test_the_first_example_of_the_page(tmp_path: Path) -> None:
    """It runs as it stands, on a checkpoint as published."""
    page = (ROOT / "docs" / "guides" / "reward_models.md").read_text("utf-8")
    example = next(block for block in re.findall(r"```python3\n(.*?)```", page, re.DOTALL) if "load_scorer" in block)
    lines = [line for line in example.splitlines() if line.startswith(("from", "load_scorer"))][:2]
    assert 'output="score"' in lines[1]
    place = tmp_path / "path" / "or" / "id"
    published.armorm(place, dtype=torch.bfloat16)
    held: dict[str, Any] = {}
    exec("\n".join([lines[0], f"scorer = {lines[1]}"]).replace("path/or/id", str(place)), held)
    assert held["scorer"](CHATS, COMPLETIONS).shape == (6,)


def test_armorm_in_a_reward(tmp_path: Path) -> None:
    """Calibrated, saved, loaded again by those who trust its code, and verified on the table's probes."""
    scorer = load_scorer(published.armorm(tmp_path / "rm"), output="score", trust_remote_code=True)
    table: Any = calibrate(CHATS, NumberSampler(), scorer, k=8, out=tmp_path / "run")
    reward = CalibratedReward(scorer, table)
    reward.save_pretrained(tmp_path / "reward")
    again = CalibratedReward.from_pretrained(tmp_path / "reward", trust_remote_code=True)
    assert again.verify().differs == ()
    assert again(CHATS[:2], COMPLETIONS[:2]) == reward(CHATS[:2], COMPLETIONS[:2])


def test_armorm_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check-scorer asks it with messages; what fails is what its published code does: it counts to the first pad id."""
    folder = published.armorm(tmp_path)
    options = ["--trust-remote-code", "--option", "output=score", "--no-sign", "--long-words", "100"]
    assert main(["check-scorer", "--reward-model", folder, *options]) == FAILED
    said = capsys.readouterr().out
    assert "  FAIL  special tokens in the text: what stands behind <pad> is not read" in said
    assert said.count("FAIL") == 1, said


def test_pairrm(tmp_path: Path) -> None:
    """It asserts its three tokens: an error with its name without them, the model's own answer with them."""
    folder = published.pairrm(tmp_path)
    scorer = load_scorer(folder, output="logits", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"DebertaV2PairRM .*AssertionError: <source> id not in input_ids"):
        scorer(["a"], ["b"])
    template = "<|source|>{prompt}[SEP]<|candidate1|>{first}[SEP]<|candidate2|>{second}[SEP]"
    chances = PairClassifier(scorer, template)(["p", "q"], ["one", "two"], ["three", "four"])
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer: Any = scorer.scorer.tokenizer  # type: ignore[attr-defined]
    for chance, prompt, first, second in zip(chances, "pq", ("one", "two"), ("three", "four"), strict=True):
        row = tokenizer(template.format(prompt=prompt, first=first, second=second), return_tensors="pt")
        with torch.inference_mode():
            assert chance == pytest.approx(
                float(model(row["input_ids"], row["attention_mask"]).logits.sigmoid()), rel=1e-4
            )


def test_internlm2(tmp_path: Path) -> None:
    """The token at which it is read is appended, for chats, plain text and other templates, and only once."""
    folder = published.internlm2(tmp_path)
    model: Any = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = tiny.tokenizer()
    with torch.inference_mode():
        chats = [[*p, {"role": "assistant", "content": c}] for p, c in zip(CHATS, COMPLETIONS, strict=True)]
        expected = [model.get_score(tokenizer, chat) for chat in chats]
    for output in (0, "logits"):
        scorer = load_scorer(folder, output=output, trust_remote_code=True)
        np.testing.assert_allclose(scorer(CHATS, COMPLETIONS), expected, atol=1e-4)
    np.testing.assert_allclose(load_scorer(folder, kind="value-head")(CHATS, COMPLETIONS), expected, atol=1e-4)
    with_token = tiny.TEMPLATE + "[SEP]"
    written = load_scorer(folder, output=0, trust_remote_code=True, template=with_token)
    np.testing.assert_allclose(written(CHATS, COMPLETIONS), expected, atol=1e-4)
    ids = tokenizer("plain text")["input_ids"]
    row = torch.tensor([[*ids, model.reward_token_id]])
    with torch.inference_mode():
        plain = model(row, torch.ones_like(row)).logits.item()
    assert scorer(["plain "], ["text"])[0] == pytest.approx(plain, abs=1e-4)
    assert scorer.fingerprint()["text"]["reward_token_id"] == model.reward_token_id
    short = load_scorer(folder, output=0, trust_remote_code=True, max_length=6)
    row = torch.tensor([[tiny.BOS, *ids[-4:], model.reward_token_id]])
    with pytest.warns(UserWarning, match="longer than max_length"), torch.inference_mode():
        assert short(["plain "], ["text"])[0] == pytest.approx(model(row, torch.ones_like(row)).logits.item(), abs=1e-4)


HEAD = published.normal(1, 32)


def at_the_end(body: Any) -> np.ndarray:
    """The body's last state of each unpadded text, times the head."""
    rows = [tiny.tokenizer()(p + c, return_tensors="pt") for p, c in zip(COMPLETIONS, COMPLETIONS, strict=True)]
    with torch.inference_mode():
        return np.array([(body(**row).last_hidden_state[0, -1] @ HEAD[0]).item() for row in rows])


@pytest.mark.parametrize("stored", [True, False])
def test_beaver(tmp_path: Path, stored: bool) -> None:
    """Its normaliser, from the weights or the config: rewards are centred and scaled, costs scaled, if it says so."""
    raw = at_the_end(tiny.causal().model)
    config = {} if stored else {"mean": [0.5], "var": [4.0]}
    for i, (score_type, expected) in enumerate([("reward", (raw - 0.5) / 2), ("cost", raw / 2), ("critic", raw)]):
        folder = published.beaver(tmp_path / str(i), stored, do_normalize=True, score_type=score_type, **config)
        scores = load_scorer(folder, cost=False)(COMPLETIONS, COMPLETIONS)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    plain = published.beaver(tmp_path / "plain", stored, do_normalize=False, **config)
    np.testing.assert_allclose(load_scorer(plain)(COMPLETIONS, COMPLETIONS), raw, atol=1e-5)


def test_beavers_cost(tmp_path: Path) -> None:
    """A config that says cost is asked about; turned round, minus its own score."""
    folder = published.beaver(tmp_path, do_normalize=False, score_type="cost")
    with pytest.raises(ValueError, match=r"score_type 'cost'.*cost=True.*cost=False"):
        load_scorer(folder)
    expected = -at_the_end(tiny.causal().model)
    np.testing.assert_allclose(load_scorer(folder, cost=True)(COMPLETIONS, COMPLETIONS), expected, atol=1e-5)


def test_a_reward_that_was_saved_before_beavers_normaliser_was_read(tmp_path: Path) -> None:
    """It goes on without: its table holds what the head alone gave."""
    folder = published.beaver(tmp_path, do_normalize=True)
    saved = to_json(load_scorer(folder))
    old = {**saved, "recipe": {k: v for k, v in saved["recipe"].items() if k not in ("cost", "rules")}}
    raw = at_the_end(tiny.causal().model)
    np.testing.assert_allclose(from_json(json.loads(json.dumps(old)))(COMPLETIONS, COMPLETIONS), raw, atol=1e-5)


def test_oasst(tmp_path: Path) -> None:
    """A model type that extends one of transformers' is read with that one's body; what is not the same is refused."""
    folder = published.oasst(tmp_path / "last")
    weights = load_file(tmp_path / "last" / "model.safetensors")
    body = GPTNeoXModel(GPTNeoXModel.config_class(**published.tiny_sizes())).eval()
    body.load_state_dict({k.removeprefix("gpt_neox."): v for k, v in weights.items() if k.startswith("gpt_neox.")})
    np.testing.assert_allclose(load_scorer(folder)(COMPLETIONS, COMPLETIONS), at_the_end(body), atol=1e-4)
    with pytest.raises(ValueError, match="pooling='mean', and kind value-head reads the last token"):
        load_scorer(published.oasst(tmp_path / "mean", pooling="mean"))
    with pytest.raises(
        ValueError, match=r"GPTNeoXRewardModel of model type 'nobodys', which transformers .* does not know"
    ):
        load_scorer(published.oasst(tmp_path / "unknown", model_type="nobodys"))


def test_eurus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code that no longer loads: the kind that works without it is named, and works."""
    folder = published.eurus(tmp_path)
    with pytest.raises(
        ValueError, match=r"code that .* \(EurusRewardModel\) does not load.*the kind value-head.*regression_head"
    ):
        load_scorer(folder, kind="multi-attribute", trust_remote_code=True)
    options = ["--kind", "multi-attribute", "--trust-remote-code"]
    assert main(["check-scorer", "--reward-model", folder, *options]) == UNUSABLE
    assert "kind value-head" in capsys.readouterr().err
    body = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    np.testing.assert_allclose(
        load_scorer(folder, kind="value-head")(COMPLETIONS, COMPLETIONS), at_the_end(body), atol=1e-4
    )


def test_ziya(tmp_path: Path) -> None:
    """A classifier that returns a bare tensor: the kind that takes it is named, and works."""
    folder = published.ziya(tmp_path)
    for options in ({}, {"output": "logits"}, {"output": 0}):
        with pytest.raises(ValueError, match=r"returns the scores themselves.*kind=multi-attribute"):
            load_scorer(folder, trust_remote_code=True, **options)(["a"], ["b"])  # type: ignore[arg-type]
    scores = load_scorer(folder, trust_remote_code=True, kind="multi-attribute")(COMPLETIONS, COMPLETIONS)
    np.testing.assert_allclose(scores, at_the_end(tiny.causal().model), atol=1e-4)
