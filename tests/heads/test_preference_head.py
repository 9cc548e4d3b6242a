"""The preference head: its formula by an independent route, its precision, and its files."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hub import COMMIT, serving
from torch import Tensor

from calibrated_rewards.heads import HeadSettings, PreferenceHead
from calibrated_rewards.models import Text

SIZE, LAYERS = 32, [(-1,), (1,), (0, 1, -1)]
POOLERS = ["identity", "tanh", "swiglu"]


def head_of(seed: int = 0, **settings: Any) -> PreferenceHead:
    """A head whose weights are all drawn, the mix of layers as well."""
    torch.manual_seed(seed)
    head = PreferenceHead(HeadSettings(SIZE, **settings)).eval()
    with torch.no_grad():
        for weight in head.parameters():
            weight.normal_(std=0.5)
    return head


@pytest.fixture(scope="module")
def hidden_states() -> tuple[Tensor, ...]:
    """The hidden states of a tiny Llama for three rows of seven tokens."""
    ids = torch.randint(8, tiny.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tiny.causal()(input_ids=ids, output_hidden_states=True).hidden_states


ENDS = torch.tensor([6, 3, 2])


def by_hand(head: PreferenceHead, states: list[np.ndarray]) -> np.ndarray:
    """Scores by numpy in float64: the formula of the paper, a layer at a time."""
    weights = {name: weight.detach().double().numpy() for name, weight in head.named_parameters()}
    shares = np.exp(weights["mix"]) / np.exp(weights["mix"]).sum() if "mix" in weights else [1.0]
    hidden = sum(share * state for share, state in zip(shares, states, strict=True))
    if head.settings.pooler == "tanh":
        hidden = np.tanh(hidden @ weights["pooler_out.weight"].T)
    if head.settings.pooler == "swiglu":
        gate, value = np.split(hidden @ weights["pooler_in.weight"].T, 2, axis=-1)
        hidden = np.tanh((gate / (1 + np.exp(-gate)) * value) @ weights["pooler_out.weight"].T)
    return hidden @ weights["score.weight"].T


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_scores_are_the_formula(pooler: str, layers: tuple[int, ...], hidden_states: tuple[Tensor, ...]) -> None:
    """Each pooler and each choice of layers scores as the paper's formula in numpy does, at the positions given."""
    head = head_of(pooler=pooler, layers=layers, names=("help", "harmless"), pooler_size=20)
    states = [hidden_states[layer][range(3), ENDS].double().numpy() for layer in layers]

    scores = head(head.select(hidden_states, ENDS))

    assert scores.shape == (3, 2)
    np.testing.assert_allclose(scores.detach().numpy(), by_hand(head, states), rtol=1e-4, atol=1e-5)


def test_the_last_layer_alone_is_enough(hidden_states: tuple[Tensor, ...]) -> None:
    """A head of the last layer takes its states alone; a head of other layers refuses them."""
    head = head_of()
    assert torch.equal(head(head.select(hidden_states[-1], ENDS)), head(head.select(hidden_states, ENDS)))
    with pytest.raises(ValueError, match=r"layers \(1,\) needs the hidden states of all layers"):
        head_of(layers=(1,)).select(hidden_states[-1], ENDS)


@pytest.mark.parametrize("pooler", POOLERS)
def test_a_head_stays_in_float32(pooler: str, hidden_states: tuple[Tensor, ...]) -> None:
    """Around it a model may go to 16 bits, and autocast be on: weights and scores are what they were."""
    head = head_of(pooler=pooler, layers=(0, -1))
    states = head.select(hidden_states, ENDS).bfloat16()
    before, weights = head(states), {name: weight.clone() for name, weight in head.state_dict().items()}

    torch.nn.ModuleDict({"head": head}).bfloat16()
    head.half().to(device="cpu", dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        after = head(states)

    assert after.dtype == torch.float32
    assert torch.equal(before, after)
    assert all(torch.equal(weight, weights[name]) for name, weight in head.state_dict().items())
    assert head.double().score.weight.dtype == torch.float64


def test_16_bits_would_tie() -> None:
    """What float32 is for: scores that differ in it are equal in bfloat16."""
    head = head_of()
    states = 1 + 0.002 * torch.randn(64, SIZE, generator=torch.Generator().manual_seed(0))
    scores = head(states)[:, 0]
    assert len(scores.unique()) == 64
    assert len(scores.bfloat16().unique()) < 48


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_saved_and_loaded(tmp_path: Path, pooler: str, layers: tuple[int, ...]) -> None:
    """A head comes back from its two files with its settings and weights, bit for bit, ready to score."""
    text = Text(max_length=77, strip=("</s>",), template="{{ messages }}")
    head = head_of(pooler=pooler, layers=layers, names=("a", "b"), text=text, end_token="<|end|>", base="me/model")

    head.train().save_pretrained(tmp_path / "head")
    loaded = PreferenceHead.from_pretrained(tmp_path / "head")

    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == [
        "preference_head.json",
        "preference_head.safetensors",
    ]
    assert loaded.settings == head.settings
    assert not loaded.training
    assert {**loaded.state_dict()}.keys() == {**head.state_dict()}.keys()
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in head.state_dict().items())


def test_files_of_something_else(tmp_path: Path) -> None:
    """A folder without a head, and settings of another format, are refused by name."""
    with pytest.raises(FileNotFoundError, match="holds no preference head"):
        PreferenceHead.from_pretrained(tmp_path)
    head_of().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preference_head.json").read_text())
    (tmp_path / "preference_head.json").write_text(json.dumps({**settings, "format": "preference-head-9"}))
    with pytest.raises(ValueError, match="needs format 'preference-head-1', got 'preference-head-9'"):
        PreferenceHead.from_pretrained(tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of a saved head's settings; None removes one."""
    settings = json.loads((folder / "preference_head.json").read_text()) | changes
    rest = {name: value for name, value in settings.items() if value is not None}
    (folder / "preference_head.json").write_text(json.dumps(rest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:90]), "preference_head.safetensors cannot be read, copy it"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "preference_head.safetensors cannot be read, copy it"),
        (lambda file: file.write_bytes(b""), "preference_head.safetensors cannot be read, copy it again"),
        (
            lambda file: file.with_suffix(".json").write_text('{"form'),
            "preference_head.json is not JSON, copy it again",
        ),
        (lambda file: file.with_suffix(".json").write_text("[]"), "preference_head.json holds a JSON object, got list"),
        (lambda file: edit(file.parent, layers=None), "preference_head.json has no layers: a newer release"),
        (lambda file: edit(file.parent, colour="red"), "preference_head.json has colour, which no head has"),
        (lambda file: edit(file.parent, names=["a", "b"]), r"other weights than its preference_head.json says: size"),
        (
            lambda file: edit(file.parent, pooler="tanh"),
            r"json says: Missing key\(s\) in state_dict: \"pooler_out.weight",
        ),
    ],
)
def test_files_that_are_damaged(damage: Any, message: str, tmp_path: Path) -> None:
    """A copy that was cut off, and files that do not belong together, are refused by the name of the file."""
    head_of().save_pretrained(tmp_path)
    damage(tmp_path / "preference_head.safetensors")
    with pytest.raises(ValueError, match=message):
        PreferenceHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooler": "mean"}, "pooler to be one of identity, tanh, swiglu, got pooler=mean"),
        ({"backbone": "half"}, "backbone to be one of frozen, lora, full"),
        ({"names": ("a", "a")}, "different names"),
        ({"names": ("a", "")}, "different names"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
    ],
)
def test_settings_that_no_head_has(settings: dict[str, Any], message: str) -> None:
    """Settings are checked where they are made."""
    with pytest.raises(ValueError, match=message):
        HeadSettings(SIZE, **settings)


def test_dropout_is_before_and_behind_the_pooler(hidden_states: tuple[Tensor, ...]) -> None:
    """In training, of the hidden state and of the pooler's output, as by hand with the same random numbers."""
    head, state = head_of(pooler="tanh", dropout=0.5), hidden_states[-1][:, 0]
    torch.manual_seed(3)
    scores = head.train()(state)
    torch.manual_seed(3)
    assert head.pooler_out is not None
    pooled = torch.tanh(head.pooler_out(torch.dropout(state, 0.5, True)))
    expected = head.score(torch.dropout(pooled, 0.5, True))
    torch.testing.assert_close(scores, expected)
    assert not torch.allclose(scores, head.eval()(state))


def test_states_of_another_size() -> None:
    """States that are not those of the head's layers side by side are refused with both numbers."""
    with pytest.raises(ValueError, match=r"layers \(0, -1\) of 32 numbers reads 64 features, got 32"):
        head_of(layers=(0, -1))(torch.zeros(2, SIZE))
    with pytest.raises(ValueError, match="a model with 2 hidden states needs layers from -2 to 1"):
        head_of(layers=(2,)).pick([torch.zeros(1, 1, SIZE)] * 2)


def test_pushed_and_loaded_from_the_hub(tmp_path: Path) -> None:
    """Through the real client: two files go up, and come back as the same head."""
    code = """
        import torch
        from calibrated_rewards.heads import HeadSettings, PreferenceHead
        head = PreferenceHead(HeadSettings(8, names=("a", "b")))
        print(head.push_to_hub("someone/head", private=True, token="secret"))
        again = PreferenceHead.from_pretrained("someone/head", token="secret")
        print(again.settings == head.settings, torch.equal(again.score.weight, head.score.weight))
    """
    with serving("someone/head", "", tmp_path / "home") as (hub, environment):
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["True", "True"]
    assert COMMIT in done.stdout
    assert hub.stored.keys() == {"README.md", "preference_head.json", "preference_head.safetensors"}
