"""The judge's answer is what greedy steps of the model's own forward write; its rating is read as people write them."""

import json

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers

from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.scorers.judge import RatedJudge

SHORT = "{prompt} >> {completion} {low}-{high}"
PLAIN = "{prompt}{completion}"


def gpt2(seed=0):
    """A model with absolute positions: padding on the left is wrong unless they are told."""
    torch.manual_seed(seed)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": tiny.VOCABULARY}
    ids = {"bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(initializer_range=0.3, **small, **ids)).eval()


def llama(seed=0):
    return tiny.causal(seed, initializer_range=0.3)


def greedy(model, row, steps):
    """What follows a row: the best token of the model's own forward, again and again, until EOS."""
    written = []
    for _ in range(steps):
        with torch.inference_mode():
            best = int(model(torch.tensor([row + written])).logits[0, -1].argmax())
        if best == tiny.EOS:
            break
        written.append(best)
    return written


def successor(follows):
    """A model that writes after each character the one that `follows` says, and then ends."""
    tokenizer = tiny.tokenizer(template=None)
    model = tiny.causal(hidden_size=tiny.VOCABULARY, num_attention_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(tiny.VOCABULARY))
        model.lm_head.weight.zero_()
        model.lm_head.weight[tiny.EOS] = 0.1
        for before, after in follows.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(after), tokenizer.convert_tokens_to_ids(before)] = 1.0
    return model, tokenizer


@pytest.mark.parametrize("make", [gpt2, llama])
def test_answers_are_those_of_greedy_steps_one_by_one(make):
    """Batches, and their padding, change no token."""
    model, tokenizer = make(), tiny.tokenizer(side="right")
    prompts, completions = tiny.texts(9, 1), tiny.texts(9, 2)
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        chat = [{"role": "user", "content": f"{prompt} >> {completion} 1-10"}]
        row = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        expected.append(tokenizer.decode(greedy(model, row, 8), skip_special_tokens=True))
    assert len(set(expected)) > 3
    for budget in (None, 1, 200):
        judge = RatedJudge(model, tokenizer, SHORT, max_new_tokens=8, batch_tokens=budget)
        assert judge.answers(prompts, completions) == expected


def test_the_rating_is_read_from_the_answer():
    """A model that writes 7 after "a", 12 after "b" and no number after "c": rated 7, out of range, unparsed."""
    model, tokenizer = successor({"a": "7", "b": "1", "1": "2", "c": "x"})
    judge = RatedJudge(model, tokenizer, PLAIN, max_new_tokens=3)
    assert judge.answers(["", "q", "q"], ["a", "b", "c"]) == ["7", "12", "x"]
    scores = judge(["p", "q", "long prompt "], ["a", "bca", "cca"])
    assert scores.dtype == np.float32
    assert scores.tolist() == [7, 7, 7]
    for nothing in "bc":
        with pytest.raises(ValueError, match=r"a rating from 1 to 10, got the answer '(12|x)'"):
            judge(["p"], [nothing])
    kind = RatedJudge(model, tokenizer, PLAIN, max_new_tokens=3, unparsed=0.5)
    assert kind(["p"] * 3, ["a", "b", "c"]).tolist() == [7, 0.5, 0.5]
    wide = RatedJudge(model, tokenizer, PLAIN, high=100, max_new_tokens=3)
    assert wide(["p"], ["b"]).tolist() == [12]
    own = RatedJudge(model, tokenizer, PLAIN, pattern=r"\d", max_new_tokens=3)
    assert own(["p"], ["b"]).tolist() == [2]
    assert judge([], []).shape == (0,)


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("7", 7),
        ("Rating: 7.", 7),
        ("**7.5**", 7.5),
        ("7/10", 7),
        ("I say 7 / 10.", 7),
        ("7 out of 10, for a GPT4 answer", 7),
        ("On a scale from 1-10 that is [[7]]", 7),
        ("First 3, on reflection 7", 7),
        ("7, which 100 people would say", 7),
        ("5-7", 7),
    ],
)
def test_ratings_as_people_write_them(answer, rating):
    """The last number within the range, of a fraction its numerator, and none within a word."""
    model, tokenizer = successor({"a": "7"})
    assert RatedJudge(model, tokenizer, PLAIN).parse_rating(answer) == rating


def test_negative_ratings():
    """A sign counts where the range goes below zero."""
    model, tokenizer = successor({"a": "7"})
    assert RatedJudge(model, tokenizer, PLAIN, low=-5, high=5).parse_rating("It is a -3") == -3


def test_how_the_checkpoint_samples_does_not_matter():
    """Greedy and without its penalties, whatever generation settings the model was saved with."""
    model, tokenizer = llama(), tiny.tokenizer()
    prompts, completions = tiny.texts(5, 1), tiny.texts(5, 2)
    judge = RatedJudge(model, tokenizer, SHORT, max_new_tokens=8)
    expected = judge.answers(prompts, completions)
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=40, repetition_penalty=3.0, max_length=300)
    assert judge.answers(prompts, completions) == expected
    model, tokenizer = successor({"a": "7", "7": "7"})
    model.generation_config.update(repetition_penalty=1000.0)
    assert RatedJudge(model, tokenizer, PLAIN, max_new_tokens=6).answers(["p"], ["a"]) == ["777777"]


def test_an_answer_ends_where_any_of_the_models_ends_is():
    """Several end tokens, as chat models have; what pads the batch behind them is not read."""
    model, tokenizer = successor({"a": "7", "7": "8", "8": "9", "b": "1"})
    model.generation_config.eos_token_id = [tiny.EOS, tokenizer.convert_tokens_to_ids("8")]
    tokenizer.pad_token = "5"
    judge = RatedJudge(model, tokenizer, PLAIN, max_new_tokens=6)
    assert judge.answers(["p", "pp"], ["a", "b"]) == ["7", "1"]


def test_questions_leave_room_for_the_answer():
    """The longest question is what the model reads less what it writes; the prompt's beginning goes."""
    model, tokenizer = gpt2(), tiny.tokenizer(template=None)
    judge = RatedJudge(model, tokenizer, PLAIN, max_new_tokens=8)
    row = tokenizer("p" * 300 + "ab")["input_ids"]
    with pytest.warns(TruncationWarning, match="max_length=248 "):
        answers = judge.answers(["p" * 300], ["ab"])
    assert answers == [tokenizer.decode(greedy(model, row[:1] + row[-247:], 8), skip_special_tokens=True)]
    with pytest.raises(ValueError, match="leave room for a question, got 255 of the 256"):
        RatedJudge(model, tokenizer, PLAIN, max_new_tokens=255)(["p"], ["a"])


def test_errors_say_what_to_do():
    """A range without width, no tokens to write, a pattern with two groups."""
    model, tokenizer = successor({"a": "7"})
    with pytest.raises(ValueError, match="low < high, got low=2 and high=1"):
        RatedJudge(model, tokenizer, low=2, high=1)
    with pytest.raises(ValueError, match="max_new_tokens >= 1, got max_new_tokens=0"):
        RatedJudge(model, tokenizer, max_new_tokens=0)
    with pytest.raises(ValueError, match="one group or none, got 2 in"):
        RatedJudge(model, tokenizer, pattern=r"(\d)(\d)")
    with pytest.raises(ValueError, match=r"a question holds \{completion\}"):
        RatedJudge(model, tokenizer, "Good?")


def test_the_fingerprint_tells_what_the_score_depends_on():
    """It is JSON, and every setting that changes scores changes it."""
    model, tokenizer = llama(), tiny.tokenizer()
    judges = [
        RatedJudge(model, tokenizer, SHORT),
        RatedJudge(model, tokenizer, PLAIN),
        RatedJudge(model, tokenizer, SHORT, high=5),
        RatedJudge(model, tokenizer, SHORT, pattern=r"\d"),
        RatedJudge(model, tokenizer, SHORT, max_new_tokens=9),
        RatedJudge(model, tokenizer, SHORT, unparsed=1.0),
        RatedJudge(model, tokenizer, SHORT, text=Text(chat=False)),
        RatedJudge(llama(1), tokenizer, SHORT),
    ]
    assert len({json.dumps(judge.fingerprint()) for judge in judges}) == len(judges)
    assert RatedJudge(model, tokenizer, SHORT, batch_tokens=9).fingerprint() == judges[0].fingerprint()


def test_what_the_checkpoint_generates_with_is_left_out():
    """Its bans and its samples change no token, and they are its own again afterwards, also after an error."""
    model, tokenizer = llama(), tiny.tokenizer(template=None)
    judge = RatedJudge(model, tokenizer, PLAIN + " {low}", max_new_tokens=8)
    prompts, completions = tiny.texts(5, 1), tiny.texts(5, 2)
    expected = judge.answers(prompts, completions)
    told = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": tiny.PAD}
    own = transformers.GenerationConfig(
        no_repeat_ngram_size=1, suppress_tokens=list(range(60, 200)), min_new_tokens=6, num_beams=3, **told
    )
    model.generation_config = own
    assert judge.answers(prompts, completions) == expected
    assert model.generation_config is own
    model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="LlamaForCausalLM gives nan for its next token"):
        judge.answers(prompts, completions)
    assert model.generation_config is own


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_an_adapted_checkpoint_generates_with_is_left_out():
    """PEFT's wrapper hands its own settings on: these are ours too while the judge writes."""
    tokenizer = tiny.tokenizer(template=None)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), lora)
    judge = RatedJudge(model, tokenizer, PLAIN, max_new_tokens=8)
    expected = judge.answers(["a", "b"], ["c", "d"])
    model.get_base_model().generation_config.suppress_tokens = list(range(60, 200))
    assert judge.answers(["a", "b"], ["c", "d"]) == expected
    assert model.get_base_model().generation_config.suppress_tokens == list(range(60, 200))


def test_nan_is_not_an_unparsed_answer():
    """The score for answers without a rating is not for a broken model."""
    model = llama()
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="look for nan among its weights"):
        RatedJudge(model, tiny.tokenizer(), SHORT, unparsed=1.0)(["a"], ["b"])


def test_the_tokens_that_end_an_answer_are_in_the_fingerprint():
    """Another end, another answer. Calls take keywords, and lists alone."""
    judge = RatedJudge(llama(), tiny.tokenizer(), SHORT, unparsed=1.0, max_new_tokens=2)
    before = judge.fingerprint()
    judge.model.generation_config.eos_token_id = [tiny.EOS, 9]
    assert judge.fingerprint() != before
    np.testing.assert_array_equal(judge(prompts=["a"], completions=["b"]), judge(["a"], ["b"]))
    for call in (judge, judge.answers):
        with pytest.raises(TypeError, match="prompts are a list"):
            call("a", ["b"])


def test_half_a_batch_without_memory_halves_what_it_held(monkeypatch):
    """Not what the budget might have held: rows cost their question and their answer."""
    model, tokenizer = llama(), tiny.tokenizer(template=None)
    judge = RatedJudge(model, tokenizer, PLAIN, max_new_tokens=4, batch_tokens=100_000, unparsed=1.0)
    generate = model.generate

    def small(input_ids, **options):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", small)
    judge(["abcdef"] * 4, ["g"] * 4)
    assert judge._access.budget.tokens == 4 * (8 + 4) // 2
