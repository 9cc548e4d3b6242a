"""Policy gradients of rewards against autograd on each completion alone, and covariances in numpy."""

import enumerable
import numpy as np
import pytest
import tiny
import torch

from calibrated_rewards.training.offline import Group, GroupReader, compare_gradients

GROUPS, K, TEMPERATURE = 3, 7, 0.8


def reader() -> GroupReader:
    """A tiny model of which the last layer is trained."""
    torch.manual_seed(0)
    model = tiny.causal(vocab_size=1 + enumerable.LETTERS, eos_token_id=0, pad_token_id=0, bos_token_id=None).eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers.1" in name)
    return GroupReader(model, TEMPERATURE, rows=3)


def groups() -> list[Group]:
    """Prompts and completions of several lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, (GROUPS, K))
    return [Group(rng.integers(1, 8, 4).tolist(), [rng.integers(1, 8, n).tolist() for n in own]) for own in lengths]


def rewards() -> dict[str, list[np.ndarray]]:
    """A reward, one that rises with it, and one apart."""
    rng = np.random.default_rng(1)
    u, other = rng.random((GROUPS, K)), rng.random((GROUPS, K))
    return {"u": list(u), "exp": list(np.exp(4 * u)), "other": list(other), "less": list(3 - 2 * u)}


def gradient_of_each(read: GroupReader) -> np.ndarray:
    """The oracle: the gradient of each completion's log-probability, by the model's own forward and autograd."""
    trained = [weight for weight in read.model.parameters() if weight.requires_grad]
    rows = []
    for group in groups():
        for completion in group.completions:
            ids = torch.tensor([group.prompt + completion])
            logits = read.model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1] / TEMPERATURE
            total = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
            rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(total, trained)]).numpy())
    return np.array(rows, np.float64).reshape(GROUPS, K, -1)


def test_gradients_are_covariances_with_the_gradients_of_single_completions() -> None:
    """Cosines, and those of halves, are what numpy makes of each completion's own gradient."""
    read, given = reader(), rewards()
    found, single = compare_gradients(read, groups(), given), gradient_of_each(read)
    halves = []
    for half in (0, 1):
        own, reward = single[:, half::2], np.array([*given.values()])[:, :, half::2]
        centred = reward - reward.mean(axis=2, keepdims=True)
        covariances = np.einsum("agk,gkd->agd", centred, own - own.mean(axis=1, keepdims=True)) / (own.shape[1] - 1)
        halves.append(covariances.mean(axis=1))
    whole, across = halves[0] + halves[1], halves[0] @ halves[1].T
    lengths = np.linalg.norm(whole, axis=1)
    np.testing.assert_allclose(found.cosines, whole @ whole.T / np.outer(lengths, lengths), atol=1e-4)
    apart = [np.linalg.norm(each, axis=1) for each in halves]
    np.testing.assert_allclose(found.agreement, np.diag(across) / (apart[0] * apart[1]), atol=1e-4)
    signal = np.sqrt(np.where(np.diag(across) > 0, np.diag(across), np.nan))
    np.testing.assert_allclose(found.without_noise, (across + across.T) / 2 / np.outer(signal, signal), atol=1e-3)
    assert read.model.lm_head.weight.grad is None


def test_scale_and_sign_of_a_reward() -> None:
    """3 - 2 u has the opposite gradient of u, and correlations are those of the rewards within a prompt."""
    given = rewards()
    found = compare_gradients(reader(), groups(), given)
    assert found.cosines[0, 3] == pytest.approx(-1, abs=1e-5)
    wanted = np.mean([np.corrcoef(u, e)[0, 1] for u, e in zip(given["u"], given["exp"], strict=True)])
    assert found.correlations[0, 1] == pytest.approx(wanted)
    assert str(found).splitlines()[-1].startswith("less")


def test_what_cannot_be_compared_is_refused() -> None:
    """A reward of another length, and groups whose halves have no covariance."""
    with pytest.raises(ValueError, match="rewards\\['u'\\] needs a number for each completion"):
        compare_gradients(reader(), groups(), {"u": [np.ones(K)] * (GROUPS - 1)})
    small = [group.take(range(3)) for group in groups()]
    with pytest.raises(ValueError, match="groups of 4 completions or more"):
        compare_gradients(reader(), small, {"u": [np.ones(3)] * GROUPS})
