"""The scores of steps are those of the model's own forward, at the marks behind the steps of a hand-made input."""

import json

import jaxtyping
import numpy as np
import pytest
import tiny
import torch
import transformers

from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.scorers.process import ProcessReward

MARK = "[SEP]"
MARK_ID = tiny.SPECIALS.index(MARK)


def labeller(labels=2, seed=0, **options):
    """A Llama with a token classification head whose labels differ."""
    torch.manual_seed(seed)
    config = tiny.config(num_labels=labels, initializer_range=0.2, **options)
    model = transformers.LlamaForTokenClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def writer(seed=0, **options):
    return tiny.causal(seed, initializer_range=0.2, **options)


def stepwise(n=12, seed=3):
    """Prompts, some of them several times, and completions of one to four steps."""
    rng = np.random.default_rng(seed)
    steps = [[text.strip() or "a" for text in tiny.texts(rng.integers(1, 5), i)] for i in range(n)]
    return [f"prompt {i // 3}" for i in range(n)], steps


def p_good(model, rows, mark, columns):
    """The softmax probability of the last of these columns at each mark of each row, alone and without padding."""
    found = []
    for row in rows:
        with torch.inference_mode():
            logits = model(torch.tensor([row])).logits[0][:, columns].double()
        found.append(logits.softmax(1)[torch.tensor(row) == mark, -1].numpy())
    return found


def assert_probabilities(odds, expected):
    for got, p in zip(odds, expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(1 / (1 + np.exp(-got.astype(float))), p, rtol=1e-4)


def test_a_head_is_read_at_the_mark_behind_each_step():
    """In any batches, with shared prefixes or not, as in the model's own forward; blank steps are none."""
    model, tokenizer = labeller(), tiny.tokenizer()
    prompts, steps = stepwise()
    rows = [tokenizer(p + "".join(s + MARK for s in x))["input_ids"] for p, x in zip(prompts, steps, strict=True)]
    expected = p_good(model, rows, MARK_ID, [0, 1])
    completions = ["\n\n".join(x) + "\n\n \n\n" for x in steps]
    for options in ({}, {"share_prefixes": False}, {"batch_tokens": 1}, {"batch_tokens": 150}):
        found = ProcessReward(model, tokenizer, MARK, **options).steps(prompts, completions)
        assert [len(x) for x in found] == [len(x) for x in steps]
        assert_probabilities(found, expected)


def test_a_causal_model_is_asked_for_its_answers():
    """The softmax of two answers, after a mark and a space as Math-Shepherd writes them."""
    model, tokenizer = writer(), tiny.tokenizer()
    plus, minus, mark = (tokenizer.convert_tokens_to_ids(x) for x in "+-#")
    prompts, steps = stepwise()
    rows = [tokenizer(p + "".join(f"{s} #\n" for s in x))["input_ids"] for p, x in zip(prompts, steps, strict=True)]
    expected = p_good(model, rows, mark, [minus, plus])
    scorer = ProcessReward(model, tokenizer, "#", ("+", "-"), separator="\n", layout="{step} {mark}\n")
    assert_probabilities(scorer.steps(prompts, ["\n".join(x) for x in steps]), expected)


@pytest.mark.parametrize(
    ("reduce", "by_hand"),
    [
        ("min", lambda p: torch.logit(p).min()),
        ("last", lambda p: torch.logit(p)[-1]),
        ("mean", lambda p: p.mean()),
        ("product", lambda p: torch.log(p.prod())),
    ],
)
def test_steps_reduce_to_one_score(reduce, by_hand):
    """By the formulas, and in the order of the reduced probabilities themselves."""
    model, tokenizer = labeller(), tiny.tokenizer()
    prompts, steps = stepwise()
    rows = [tokenizer(p + "".join(s + MARK for s in x))["input_ids"] for p, x in zip(prompts, steps, strict=True)]
    expected = [float(by_hand(torch.tensor(p))) for p in p_good(model, rows, MARK_ID, [0, 1])]
    scores = ProcessReward(model, tokenizer, MARK, reduce=reduce)(prompts, ["\n\n".join(x) for x in steps])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.std(expected))


def test_sure_steps_do_not_tie():
    """Where probabilities round to 1, and their product to 0, the scores still tell completions apart."""
    model, tokenizer = labeller(), tiny.tokenizer()
    with torch.no_grad():
        model.score.weight.mul_(10)
        model.score.bias.copy_(torch.tensor([-300.0, 0.0]))
    prompts, steps = stepwise()
    for reduce in ("min", "last"):
        scores = ProcessReward(model, tokenizer, MARK, reduce=reduce)(prompts, ["\n\n".join(x) for x in steps])
        assert np.float32(1 / (1 + np.exp(-scores.min()))) == 1
        assert len(set(scores)) == len(scores)
    with torch.no_grad():
        model.score.bias.copy_(torch.tensor([300.0, 0.0]))
    product = ProcessReward(model, tokenizer, MARK, reduce="product")(prompts, ["\n\n".join(x) for x in steps])
    assert np.isfinite(product).all()
    assert len(set(product)) == len(product)


def test_heads_with_one_label_and_with_three():
    """One label is the log-odds; of three, the good one is against the others."""
    tokenizer = tiny.tokenizer()
    row = tokenizer(f"q{'one'}{MARK}two{MARK}")["input_ids"]
    at = [i for i, token in enumerate(row) if token == MARK_ID]
    one, three = labeller(1), labeller(3)
    with torch.inference_mode():
        expected = one(torch.tensor([row])).logits[0, at, 0].numpy()
        p = three(torch.tensor([row])).logits[0, at].softmax(1)[:, 2].numpy()
    np.testing.assert_allclose(ProcessReward(one, tokenizer, MARK).steps(["q"], ["one\n\ntwo"])[0], expected, rtol=1e-4)
    assert_probabilities(ProcessReward(three, tokenizer, MARK, label=2).steps(["q"], ["one\n\ntwo"]), [p])
    with pytest.raises(IndexError, match="it has 3, got label=3"):
        ProcessReward(three, tokenizer, MARK, label=3)(["q"], ["one"])


def test_names_say_which_label_is_good():
    """In whichever order they stand; names that do not say it are asked about."""
    tokenizer, unnamed = tiny.tokenizer(), ProcessReward(labeller(), tiny.tokenizer(), MARK)
    expected = unnamed(["q"], ["one"])
    for names, turn in ((("bad", "good"), 1), (("Correct", "Incorrect"), -1), (("1", "0"), -1)):
        scorer = ProcessReward(labeller(id2label=dict(enumerate(names))), tokenizer, MARK)
        np.testing.assert_allclose(scorer(["q"], ["one"]), turn * expected, rtol=1e-5)
    assert unnamed.fingerprint()["label"] == 1
    for model in (labeller(id2label={0: "cat", 1: "dog"}), labeller(3)):
        with pytest.raises(ValueError, match=r"do not say which.*label=1"):
            ProcessReward(model, tokenizer, MARK)(["q"], ["one"])


def test_chats_and_several_turns():
    """Steps of all the assistant's turns are marked, those of tools are not; marks in the prompt do not count."""
    model, tokenizer = labeller(), tiny.tokenizer()
    chat = [{"role": "user", "content": f"Hi{MARK}"}]
    turns = [("assistant", "a\n\nb"), ("user", "c\n\nd"), ("assistant", "e")]
    completion = [{"role": role, "content": content} for role, content in turns]
    text = (
        f"<s><|user|>Hi{MARK}<|end|><|assistant|>a{MARK}b{MARK}<|end|><|user|>c\n\nd<|end|><|assistant|>e{MARK}<|end|>"
    )
    row = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = [p_good(model, [row], MARK_ID, [0, 1])[0][1:]]
    assert_probabilities(ProcessReward(model, tokenizer, MARK).steps([chat], [completion]), expected)


def test_a_mark_that_is_a_newline_is_the_separator_itself():
    """As TRL trains them; a newline that the template writes behind the completion is no step."""
    turns = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n\n{% endfor %}"
    tokenizer = tiny.tokenizer(template=turns + "{% if add_generation_prompt %}assistant\n{% endif %}")
    model = labeller()
    scorer = ProcessReward(model, tokenizer, "\n", separator="\n", text=Text(strip=("<|end|>",)))
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    row = tokenizer("user\nq\n\nassistant\nx\nyy\n\n\n", add_special_tokens=False)["input_ids"]
    chat = [{"role": "user", "content": "q"}]
    expected = [p_good(model, [row], newline, [0, 1])[0][4:6]]
    assert_probabilities(scorer.steps([chat], ["x\nyy<|end|>"]), expected)


def test_marks_in_a_completion_are_no_steps():
    """A special token is taken out, so that a policy cannot write its own marks; another is an error."""
    model, tokenizer = labeller(), tiny.tokenizer()
    scorer = ProcessReward(model, tokenizer, MARK)
    np.testing.assert_array_equal(scorer(["q"], [f"a{MARK}b\n\n{MARK}c"]), scorer(["q"], ["ab\n\nc"]))
    with pytest.raises(ValueError, match="a step does not hold the mark '#' itself, got 'a#b'"):
        ProcessReward(model, tokenizer, "#")(["q"], ["a#b"])


def test_truncation_moves_the_marks_with_the_text():
    """The steps that are left are read where they now stand."""
    model, tokenizer = labeller(), tiny.tokenizer()
    row = tokenizer(f"{'p' * 30}aa{MARK}bb{MARK}")["input_ids"]
    for limit, left in ((12, 2), (6, 2), (4, 1)):
        scorer = ProcessReward(model, tokenizer, MARK, text=Text(max_length=limit))
        expected = p_good(model, [row[:1] + row[-limit + 1 :]], MARK_ID, [0, 1])
        assert len(expected[0]) == left
        with pytest.warns(TruncationWarning, match="1 of 1"):
            assert_probabilities(scorer.steps(["p" * 30], ["aa\n\nbb"]), expected)


def test_an_encoder_is_read_if_its_forward_agrees():
    """BERT's body and head give its own forward; RoBERTa counts positions otherwise, and is refused."""
    tokenizer = tiny.tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.2}
    bert = transformers.BertForTokenClassification(transformers.BertConfig(**small)).eval()
    prompts, steps = stepwise(4)
    rows = [tokenizer(p + "".join(s + MARK for s in x))["input_ids"] for p, x in zip(prompts, steps, strict=True)]
    found = ProcessReward(bert, tokenizer, MARK).steps(prompts, ["\n\n".join(x) for x in steps])
    assert_probabilities(found, p_good(bert, rows, MARK_ID, [0, 1]))
    roberta = transformers.RobertaForTokenClassification(transformers.RobertaConfig(**small, pad_token_id=0)).eval()
    with pytest.raises(ValueError, match="body and head of RobertaForTokenClassification"):
        ProcessReward(roberta, tokenizer, MARK)(["q"], ["a"])


def test_errors_say_what_to_do(monkeypatch):
    """No steps, marks and answers of several tokens, merged marks, a causal LM without answers, settings."""
    model, tokenizer = labeller(), tiny.tokenizer()
    scorer = ProcessReward(model, tokenizer, MARK)
    for nothing in ("", " \n\n ", []):
        with pytest.raises(ValueError, match="at least one step that is not blank, got"):
            scorer(["q"], [nothing])
    with pytest.raises(ValueError, match=r"mark of a step is one token .* got '<extra_0>'"):
        ProcessReward(model, tokenizer)
    with pytest.raises(ValueError, match=r"an answer is one token .* got 'no'"):
        ProcessReward(writer(), tokenizer, MARK, ("+", "no"))
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has \['lm_head'\]; of a causal LM say the answers"):
        ProcessReward(writer(), tokenizer, MARK)(["q"], ["a"])
    with pytest.raises(ValueError, match=r"layout, got layout='\{step\}'"):
        ProcessReward(model, tokenizer, MARK, layout="{step}")
    with pytest.raises(ValueError, match="separator of steps, got separator=''"):
        ProcessReward(model, tokenizer, MARK, separator="")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    with pytest.raises(ValueError, match="min, product, last or mean, got reduce='max'"):
        ProcessReward(model, tokenizer, MARK, reduce="max")


def test_a_mark_that_merges_with_its_neighbours_is_an_error():
    """In the token list, where the merge is seen."""
    from tokenizers import models as tokenizer_models

    tokenizer = tiny.tokenizer()
    vocabulary = {**tokenizer.get_vocab(), "bc": tiny.VOCABULARY}
    tokenizer.backend_tokenizer.model = tokenizer_models.BPE(vocab=vocabulary, merges=[("b", "c")])
    scorer = ProcessReward(labeller(vocab_size=tiny.VOCABULARY + 1), tokenizer, "c")
    assert len(scorer.steps(["q"], ["a\n\na"])[0]) == 2
    with pytest.raises(ValueError, match="behind each of 2 steps, got 1 of them in"):
        scorer(["q"], ["a\n\nb"])


def test_the_fingerprint_tells_what_the_score_depends_on():
    """It is JSON, and every setting that changes scores changes it; an empty list has no scores."""
    model, tokenizer = labeller(), tiny.tokenizer()
    scorers = [
        ProcessReward(model, tokenizer, MARK),
        ProcessReward(model, tokenizer, "#"),
        ProcessReward(model, tokenizer, MARK, label=0),
        ProcessReward(model, tokenizer, MARK, reduce="last"),
        ProcessReward(model, tokenizer, MARK, separator="\n"),
        ProcessReward(model, tokenizer, MARK, layout="{step} {mark}"),
        ProcessReward(model, tokenizer, MARK, ("+", "-")),
        ProcessReward(labeller(seed=1), tokenizer, MARK),
    ]
    assert len({json.dumps(scorer.fingerprint()) for scorer in scorers}) == len(scorers)
    assert ProcessReward(model, tokenizer, MARK, batch_tokens=9).fingerprint() == scorers[0].fingerprint()
    assert scorers[0]([], []).shape == (0,)


@pytest.mark.parametrize("reduce", ["min", "product", "last", "mean"])
def test_a_completion_whose_marks_are_all_cut_away_is_refused(reduce):
    """A product of no steps would be the best score there is."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %} and a long end"
    text = Text(max_length=6, chat=True)
    scorer = ProcessReward(labeller(), tiny.tokenizer(template=template), MARK, reduce=reduce, text=text)
    with (
        pytest.warns(TruncationWarning),
        pytest.raises(ValueError, match="max_length=6 tokens of its input, got none of 2 in 'a"),
    ):
        scorer([[{"role": "user", "content": "q"}]], ["a\n\nb"])


def test_marks_where_the_cut_falls():
    """What is left after BOS is read where it stands, BOS itself never; a mark may be the first token there is."""
    model, tokenizer = labeller(), tiny.tokenizer()
    with pytest.warns(TruncationWarning):
        steps = ProcessReward(model, tokenizer, MARK, text=Text(max_length=4)).steps([""], ["a\n\nb\n\nc"])[0]
    # BOS [SEP] of a gone; b [SEP] c [SEP] is left of it, less what BOS takes.
    row = [tiny.BOS, MARK_ID, *tokenizer("c", add_special_tokens=False)["input_ids"], MARK_ID]
    assert_probabilities([steps], p_good(model, [row], MARK_ID, [0, 1]))
    without = tiny.tokenizer(bos=False)
    first = ProcessReward(model, without, MARK, layout="{mark}{step}").steps([""], ["a"])
    assert_probabilities(first, p_good(model, [[MARK_ID]], MARK_ID, [0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_training_is_read_as_it_is(dtype):
    """Changed weights, and another head in the old one's place, count in the next call; dropout never does."""
    model, tokenizer = labeller().to(dtype), tiny.tokenizer()
    scorer = ProcessReward(model, tokenizer, MARK)
    before = scorer(["p", "q"], ["a", "b"])
    model.score.weight.data *= -2
    model.score.bias.data *= -2
    np.testing.assert_allclose(scorer(["p", "q"], ["a", "b"]), -2 * before, rtol=0.02)
    model.score = torch.nn.Linear(32, 2).to(dtype)
    np.testing.assert_array_equal(
        scorer(["p", "q"], ["a", "b"]), ProcessReward(model, tokenizer, MARK)(["p", "q"], ["a", "b"])
    )


def test_calls_take_keywords_and_refuse_a_text_for_a_list():
    """As trainers call rewards; steps are of lists as well, and nan is named."""
    scorer = ProcessReward(labeller(), tiny.tokenizer(), MARK)
    np.testing.assert_array_equal(scorer(prompts=["p"], completions=["a"]), scorer(["p"], ["a"]))
    for call in (scorer, scorer.steps):
        with pytest.raises(TypeError, match="completions are a list"):
            call(["p"], "a")
    scorer.model.score.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="ProcessReward gave nan for completion 'a'"):
        scorer(["p"], ["a"])
