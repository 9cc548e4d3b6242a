"""The implicit reward is a difference of log-softmaxes of the models' own forwards, over the completion's tokens."""

import copy
import json
import threading

import jaxtyping
import numpy as np
import pytest
import tiny
import torch
from tokenizers import models as tokenizer_models

from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.models.vocabulary_head import LogProbability, logits_of
from calibrated_rewards.scorers.implicit import ImplicitReward


def writer(seed, **options):
    """A causal LM whose probabilities are far from even."""
    return tiny.causal(seed, initializer_range=0.2, **options)


def log_p(model, row, start):
    """The log-probability of each token of a row from `start` on, by the model's own forward on the whole row."""
    with torch.inference_mode():
        logits = model(torch.tensor([row])).logits[0].float()
    return np.array([float(torch.log_softmax(logits[i - 1].double(), 0)[row[i]]) for i in range(start, len(row))])


def pairs():
    """Prompts, some of them several times, and completions."""
    return [p for p in tiny.texts(4, 1) for _ in range(3)], tiny.texts(12, 2)


def plain(tokenizer, prompts, completions):
    """Rows of text, one token a byte, and where their completions start."""
    rows = [tokenizer(p + c)["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    return rows, [len(tokenizer(p)["input_ids"]) for p in prompts]


def close(scores, expected, share=1e-4):
    return np.abs(scores - expected).max() < share * np.std(expected)


def test_scores_are_those_of_the_models_own_forwards():
    """Sum or mean, with a reference or none, in any batches, with shared prefixes or not."""
    policy, reference, tokenizer = writer(0), writer(1), tiny.tokenizer()
    prompts, completions = pairs()
    rows, starts = plain(tokenizer, prompts, completions)
    own = [log_p(policy, row, start) for row, start in zip(rows, starts, strict=True)]
    other = [log_p(reference, row, start) for row, start in zip(rows, starts, strict=True)]
    for options in ({}, {"share_prefixes": False}, {"batch_tokens": 1}, {"batch_tokens": 150}):
        scorer = ImplicitReward(policy, tokenizer, reference, **options)
        scores = scorer(prompts, completions)
        assert scores.dtype == np.float32
        assert close(scores, [0.1 * (x - y).sum() for x, y in zip(own, other, strict=True)])
        for got, x, y in zip(scorer.log_ratios(prompts, completions), own, other, strict=True):
            np.testing.assert_allclose(got, x - y, atol=1e-4)
    mean = ImplicitReward(policy, tokenizer, reference, beta=2.0, reduce="mean")
    assert close(mean(prompts, completions), [2 * (x - y).mean() for x, y in zip(own, other, strict=True)])
    free = ImplicitReward(policy, tokenizer, reference_free=True, beta=1)
    assert close(free(prompts, completions), [x.sum() for x in own])


def test_a_chats_completion_starts_behind_its_opening():
    """The template's generation prompt belongs to the prompt, its end of turn to the completion."""
    policy, reference, tokenizer = writer(0), writer(1), tiny.tokenizer()
    chat = [{"role": "user", "content": "Hi"}]
    answers = ["one", [{"role": "assistant", "content": "two and more"}]]
    texts = ["<s><|user|>Hi<|end|><|assistant|>one<|end|>", "<s><|user|>Hi<|end|><|assistant|>two and more<|end|>"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    start = len("s") + len("u") + len("Hi") + len("e") + len("a")
    expected = [0.1 * (log_p(policy, row, start) - log_p(reference, row, start)).sum() for row in rows]
    assert [len(row) - start for row in rows] == [4, 13]
    assert close(ImplicitReward(policy, tokenizer, reference)([chat, chat], answers), expected)


def test_a_token_over_the_seam_is_the_completions():
    """Where prompt and completion merge, the start is found in tokens, and nothing is counted twice or left out."""
    tokenizer = tiny.tokenizer()
    vocabulary = {**tokenizer.get_vocab(), "ab": tiny.VOCABULARY}
    tokenizer.backend_tokenizer.model = tokenizer_models.BPE(vocab=vocabulary, merges=[("a", "b")])
    policy, reference = (writer(seed, vocab_size=tiny.VOCABULARY + 1) for seed in (0, 1))
    row = tokenizer("xabc")["input_ids"]
    assert len(row) == 4
    expected = 0.1 * (log_p(policy, row, 2) - log_p(reference, row, 2)).sum()
    np.testing.assert_allclose(ImplicitReward(policy, tokenizer, reference)(["xa"], ["bc"]), [expected], rtol=1e-4)


def test_truncation_does_not_move_the_start():
    """What is cut is the prompt's; of a completion that is itself too long, the tokens that are left count."""
    policy, reference, tokenizer = writer(0), writer(1), tiny.tokenizer()
    prompts, completions = ["p" * 20 + "q", "short", "pq"], ["answer", "yes", "z" * 3 + "a long answer"]
    scorer = ImplicitReward(policy, tokenizer, reference, text=Text(max_length=12))
    with pytest.warns(TruncationWarning, match="2 of 3 inputs"):
        scores = scorer(prompts, completions)
    whole, starts = plain(tokenizer, prompts, completions)
    rows = [whole[0][:1] + whole[0][-11:], whole[1], whole[2][:1] + whole[2][-11:]]
    expected = [
        0.1 * (log_p(policy, row, start) - log_p(reference, row, start)).sum()
        for row, start in zip(rows, (12 - len("answer"), starts[1], 1), strict=True)
    ]
    assert close(scores, expected)


def test_nothing_to_predict_scores_zero():
    """An empty completion, alone or among others; an empty prompt leaves all but the first token to predict."""
    policy, reference = writer(0), writer(1)
    for reduce in ("sum", "mean"):
        scorer = ImplicitReward(policy, tiny.tokenizer(bos=False), reference, reduce=reduce)
        scores = scorer(["a", "b", "", "c"], ["", "xy", "xyz", ""])
        assert scores[0] == scores[3] == 0
        assert scores[1] != 0
        row = tiny.tokenizer(bos=False)("xyz")["input_ids"]
        ratio = log_p(policy, row, 1) - log_p(reference, row, 1)
        np.testing.assert_allclose(scores[2], 0.1 * (ratio.sum() if reduce == "sum" else ratio.mean()), rtol=1e-4)
        assert scorer([], []).shape == (0,)
    # An appended EOS is a token of the completion, not of its prompt.
    ended = ImplicitReward(policy, tiny.tokenizer(), reference, text=Text(append_eos=True))
    row = [*tiny.tokenizer()("a")["input_ids"], tiny.EOS]
    expected = 0.1 * (log_p(policy, row, 2) - log_p(reference, row, 2)).sum()
    np.testing.assert_allclose(ended(["a"], [""]), [expected], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_reference_the_adapter_is_switched_off(dtype):
    """The PEFT model itself is both, also where the output layer is adapted, and is left as it was."""
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny.tokenizer()
    base = writer(0).to(dtype)
    settings = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    policy = get_peft_model(copy.deepcopy(base), settings, autocast_adapter_dtype=False)
    trained = {name: name.endswith("lora_A.default.weight") for name, _ in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(trained[name])
    prompts, completions = pairs()
    expected = ImplicitReward(policy, tokenizer, base)(prompts, completions)
    scores = ImplicitReward(policy, tokenizer)(prompts, completions)
    assert np.std(expected) > 0.01
    assert close(scores, expected, 1e-6)
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == trained
    assert close(ImplicitReward(policy, tokenizer, base)(prompts, completions), expected, 1e-6)


def test_large_vocabularies_are_read_in_pieces():
    """The head holds a bounded number of logits at a time, and the pieces give what the whole gives."""
    model = writer(0)
    hidden, following = torch.randn(50, 32), torch.randint(tiny.VOCABULARY, (50,))
    logits = logits_of(model, threading.RLock())
    seen = []
    hook = logits.layer.register_forward_hook(lambda _, __, output: seen.append(len(output)))
    pieces = LogProbability(logits, tiny.VOCABULARY, cells=7 * tiny.VOCABULARY + 5)(hidden, following)
    hook.remove()
    assert seen == [7] * 7 + [1]
    expected = torch.log_softmax(hidden @ model.lm_head.weight.T, 1)[torch.arange(50), following]
    torch.testing.assert_close(pieces[:, 0], expected.detach(), atol=1e-5, rtol=1e-5)


def test_the_smaller_of_both_models_limits_the_input():
    """A reference with fewer positions sets how many tokens are read."""
    policy, reference = writer(0), writer(1, max_position_embeddings=16)
    scorer = ImplicitReward(policy, tiny.tokenizer(), reference, text=Text(on_long="raise"))
    with pytest.raises(ValueError, match="max_length=16 "):
        scorer(["a" * 10], ["b" * 10])


def test_errors_say_what_to_do(monkeypatch):
    """A scale that is none, an unknown reduction, and a reference that is missing, or one too many."""
    policy, tokenizer = writer(0), tiny.tokenizer()
    with pytest.raises(ValueError, match=r"needs the model that LlamaForCausalLM was tuned from, got reference=None"):
        ImplicitReward(policy, tokenizer)
    with pytest.raises(ValueError, match="reference or reference_free=True, got both"):
        ImplicitReward(policy, tokenizer, policy, reference_free=True)
    with pytest.raises(ValueError, match="beta > 0, got beta=0"):
        ImplicitReward(policy, tokenizer, policy, beta=0.0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match="'sum' or 'mean', got reduce='max'"):
        ImplicitReward(policy, tokenizer, policy, reduce="max")


def test_the_fingerprint_tells_what_the_score_depends_on():
    """It is JSON, and another reference, beta or reduction is another scorer."""
    policy, tokenizer = writer(0), tiny.tokenizer()
    scorers = [
        ImplicitReward(policy, tokenizer, writer(1)),
        ImplicitReward(policy, tokenizer, writer(2)),
        ImplicitReward(policy, tokenizer, writer(1), beta=1.0),
        ImplicitReward(policy, tokenizer, writer(1), reduce="mean"),
        ImplicitReward(policy, tokenizer, reference_free=True),
        ImplicitReward(policy, tokenizer, writer(1), text=Text(max_length=100)),
    ]
    assert len({json.dumps(scorer.fingerprint()) for scorer in scorers}) == len(scorers)
    again = ImplicitReward(policy, tokenizer, writer(1), batch_tokens=9)
    assert again.fingerprint() == scorers[0].fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_in_training_is_followed(dtype):
    """After a step of an optimiser the reward is that of the policy now, its output layer included."""
    policy, reference, tokenizer = writer(0).to(dtype), writer(1).to(dtype), tiny.tokenizer()
    scorer = ImplicitReward(policy, tokenizer, reference)
    before = scorer(*pairs())
    optimiser = torch.optim.SGD(policy.lm_head.parameters(), lr=5.0)
    policy(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()
    optimiser.step()
    after = scorer(*pairs())
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(after, ImplicitReward(policy, tokenizer, reference)(*pairs()))


def test_calls_take_keywords_and_refuse_a_text_for_a_list():
    """As trainers call rewards; also the tokens' numbers are of lists."""
    scorer = ImplicitReward(writer(0), tiny.tokenizer(), reference_free=True)
    np.testing.assert_array_equal(scorer(prompts=["a"], completions=["b"]), scorer(["a"], ["b"]))
    for call in (scorer, scorer.log_ratios):
        with pytest.raises(TypeError, match="prompts are a list"):
            call("a", ["b"])
    scorer.model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="ImplicitReward gave nan for completion 'b' of prompt 'a'"):
        scorer(["a"], ["b"])
