"""Preference models: against transformers' own forward of one unpadded text at a time."""

import json

import numpy as np
import pytest
import tiny
import torch
from scipy.special import expit
from tokenizers import processors
from transformers import T5Config, T5ForConditionalGeneration

from calibrated_rewards.models.text import Text, TruncationWarning
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.pair_models import RLHFLOW, STEAM_SHP, WHICH, PairClassifier, PairJudge
from calibrated_rewards.scorers.pairwise import BothOrders, MeanWin, References, compare
from calibrated_rewards.scorers.protocol import fingerprint

TEMPLATE = "{prompt}[SEP]{first}[SEP]{second}!"
QUESTION = "Q {prompt} A: {first} B: {second} ?"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]


def judge(model=None, tokenizer=None, **options):
    """A small judge; its output weights spread the answers."""
    if model is None:
        model = tiny.causal()
        with torch.no_grad():
            model.lm_head.weight.normal_(std=0.3)
    settings = {"question": QUESTION, "show_progress": False, **options}
    return PairJudge(model, tokenizer or tiny.tokenizer(), **settings)


def comparisons(n=9):
    """Prompts of which some are the same, firsts too, and braces that are not places."""
    prompts = [["one {first}", "two", CHAT][i % 3] for i in range(n)]
    firsts = [["yes", "no {prompt}"][i % 2] for i in range(n)]
    return prompts, firsts, tiny.texts(n, 5)


def told(prompt):
    return prompt if isinstance(prompt, str) else "User: Hi\n\nAssistant: Yes?\n\nUser: Bye"


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_against_its_own_forward(labels) -> None:
    """sigmoid of the logit (of two, of their difference) for the whole text, tokenised here by hand."""
    model, tokenizer = tiny.classifier(num_labels=labels), tiny.tokenizer()
    prompts, firsts, seconds = comparisons()

    found = PairClassifier(SequenceClassifier(model, tokenizer, show_progress=False), TEMPLATE)(
        prompts, firsts, seconds
    )

    expected = []
    for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
        ids = tokenizer(told(prompt) + "[SEP]" + first + "[SEP]" + second + "!", return_tensors="pt")
        with torch.no_grad():
            logits = model(**ids).logits[0].double()
        expected.append(float(torch.sigmoid(logits[0]) if labels == 1 else logits.softmax(0)[1]))
    assert np.ptp(np.log(found)) > 0.3
    assert found == pytest.approx(expected, rel=1e-4)


def test_where_a_template_is_cut() -> None:
    """Before its last place, whichever that is: what comes first is the prompt, which comparisons share."""
    seen = []

    def scorer(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    PairClassifier(scorer, "1 {first} 2 {second} of {prompt}.")(["p"], ["a"], ["b"])
    PairClassifier(scorer, TEMPLATE)(["p"], ["{second}"], ["b"])

    assert seen == [("1 a 2 b of ", "p."), ("p[SEP]{second}[SEP]", "b!")]


@pytest.mark.parametrize("template", ["{prompt} {first}", "{prompt} {first} {second} {first}", ""])
def test_a_template_has_each_place_once(template) -> None:
    """In classifiers and in questions."""
    with pytest.raises(ValueError, match="once each"):
        PairClassifier(lambda p, c: [0.0], template)
    with pytest.raises(ValueError, match="once each"):
        judge(question=template)


def asked(tokenizer, question, *, opening=True):
    """The ids by transformers' own way."""
    message = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=opening, return_tensors="pt", return_dict=True, tokenize=True
    )["input_ids"]


def by_hand(model, ids, answers):
    """softmax(logit A, logit B), as the model's own forward has them behind these ids."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    return float(logits[answers].softmax(0)[0])


@pytest.mark.parametrize("opening", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_a_judge_against_its_own_forward(opening, share) -> None:
    """The chance of A among A and B behind the question, one at a time; also where prefixes are shared."""
    preference = judge(opening=opening, share_prefixes=share)
    prompts, firsts, seconds = comparisons()

    found = preference(prompts, firsts, seconds)

    tokenizer = preference.tokenizer
    answers = [tokenizer.convert_tokens_to_ids("A"), tokenizer.convert_tokens_to_ids("B")]
    expected = [
        by_hand(preference.model, asked(tokenizer, f"Q {told(p)} A: {a} B: {b} ?", opening=opening), answers)
        for p, a, b in zip(prompts, firsts, seconds, strict=True)
    ]
    assert np.ptp(found) > 0.01
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("text", [Text(chat=False), Text()], ids=["chat=False", "no template"])
def test_a_judge_of_plain_text(text) -> None:
    """Without a template, or where none is wanted, the question is text, with the tokenizer's special tokens."""
    tokenizer = tiny.tokenizer(template=tiny.TEMPLATE if text.chat is False else None)
    preference = judge(tokenizer=tokenizer, text=text)
    prompts, firsts, seconds = comparisons(4)

    answers = tokenizer.convert_tokens_to_ids(["A", "B"])
    for p, a, b in zip(prompts, firsts, seconds, strict=True):
        ids = torch.tensor([tokenizer(f"Q {told(p)} A: {a} B: {b} ?")["input_ids"]])
        assert ids[0, 0] == tiny.BOS
        assert preference([p], [a], [b]) == pytest.approx([by_hand(preference.model, ids, answers)], abs=1e-6)


def test_no_answer_behind_the_end() -> None:
    """A tokenizer that ends plain text with EOS is kept from ending the question."""
    ending = tiny.tokenizer(template=None)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)]
    )
    arguments = comparisons(3)

    assert ending("a")["input_ids"][-1] == tiny.EOS
    assert judge(tokenizer=ending)(*arguments) == pytest.approx(
        judge(tokenizer=tiny.tokenizer(template=None))(*arguments)
    )


def test_other_answers() -> None:
    """Any two single tokens; swapped, the chance is the other one's."""
    arguments = comparisons(3)

    assert judge(answers=("B", "A"))(*arguments) == pytest.approx(1 - judge()(*arguments))
    with pytest.raises(ValueError, match="one token"):
        judge(answers=("first", "second"))
    with pytest.raises(ValueError, match="two answers that differ"):
        judge(answers=("A", "A"))


def test_the_text_settings_count() -> None:
    """Ends are stripped, long questions are cut and reported; an EOS before the answer is refused."""
    plain, stripping = judge(), judge(text=Text(strip=("<e>",)))

    assert stripping(["p"], ["a<e>"], ["b<e>"]) == pytest.approx(plain(["p"], ["a"], ["b"]))
    with pytest.warns(TruncationWarning, match="1 of 1 inputs .* max_length=8 "):
        judge(text=Text(max_length=8))(["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="takes no EOS"):
        judge(text=Text(append_eos=True))


def test_the_question_of_its_own() -> None:
    """What is asked where nothing is said holds all three."""
    assert judge(question=WHICH)(["p"], ["a"], ["b"]).shape == (1,)


def test_as_a_scorer() -> None:
    """Both orders, mean win against references: each half by hand, the whole through one call."""
    preference = judge()
    scorer = MeanWin(BothOrders(preference), References.of([("p", ["r", "s"])]))

    chances = {
        (a, b): float(compare(preference, ["p"], [a], [b])[0])
        for a, b in [("c", "r"), ("r", "c"), ("c", "s"), ("s", "c")]
    }
    expected = sum(chances["c", other] + 1 - chances[other, "c"] for other in "rs") / 4
    assert scorer(["p"], ["c"]) == pytest.approx([expected], abs=1e-6)
    assert preference([], [], []).shape == (0,)


def test_fingerprints() -> None:
    """All that the answers depend on shows, as JSON."""
    model = tiny.causal()
    scorers = [SequenceClassifier(tiny.classifier(seed), tiny.tokenizer()) for seed in (0, 1)]
    preferences = [
        judge(model), judge(tiny.causal(1)), judge(model, answers=("A", "C")), judge(model, question=WHICH),
        judge(model, opening=False), judge(model, text=Text(chat=False)), judge(model, text=Text(max_length=99)),
        *(PairClassifier(scorer, TEMPLATE) for scorer in scorers), PairClassifier(scorers[0], QUESTION),
    ]  # fmt: skip

    assert len({json.dumps(fingerprint(preference)) for preference in preferences}) == len(preferences)


def test_a_chance_near_one_is_not_one() -> None:
    """Float64 of float32 log-odds: what float32 probabilities would call equal is not."""
    near = PairClassifier(lambda p, c: [18.0 + len(text) for text in c], "{prompt}{first}{second}")

    one, two = near(["p", "p"], ["a", "a"], ["b", "bb"])
    assert one < two < 1
    assert one == pytest.approx(expit(19.0), abs=1e-15)


def test_a_judge_in_training_is_read_as_it_is() -> None:
    """A head that changes after the first call counts in the next; the scales and the checks are found once."""
    preference = judge()
    prompts, firsts, seconds = comparisons(6)
    before = preference(prompts=prompts, firsts=firsts, seconds=seconds)
    preference.model.lm_head.weight.data *= -1
    assert preference(prompts, firsts, seconds) == pytest.approx(1 - before, abs=1e-6)


def test_a_comparison_is_of_lists() -> None:
    """One of each, as many firsts as seconds."""
    with pytest.raises(TypeError, match="completions are a list"):
        judge()(["a"], ["b"], "c")
    with pytest.raises(ValueError, match="a prompt and two completions, got 1, 1 and 2"):
        judge()(["a"], ["b"], ["c", "d"])
    broken = judge()
    broken(["a"], ["b"], ["c"])
    broken.model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="for nan among"):
        broken(["a"], ["b"], ["c"])


# As Llama 3's: the template writes BOS itself, and takes off what is blank around a message.
TRIMMING = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"


def as_the_card_does(model, tokenizer, chat, first, second):
    """RLHFlow's own way: context by its template, BOS deleted from the text, no special tokens added."""
    context = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=RLHFLOW["context"])
    question = f"[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n"
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    ids = tokenizer(text.replace(tokenizer.bos_token, ""), add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert tiny.BOS not in ids
    return by_hand(model, ids, tokenizer.convert_tokens_to_ids(["A", "B"]))


def test_rlhflows_recipe() -> None:
    """Every comparison as its card makes it, for texts and for chats; other settings leave the fingerprint alone."""
    preference = judge(tokenizer=tiny.tokenizer(template=TRIMMING), **RLHFLOW)
    prompts, firsts, seconds = comparisons()
    found = preference(prompts, firsts, seconds)
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    several = zip(chats, firsts, seconds, strict=True)
    expected = [as_the_card_does(preference.model, preference.tokenizer, *each) for each in several]
    assert np.ptp(found) > 0.01
    assert found == pytest.approx(expected, abs=1e-6)
    plain = judge(preference.model, preference.tokenizer, question=RLHFLOW["question"], opening=False)
    assert not np.allclose(plain(prompts, firsts, seconds), expected, atol=1e-4)
    assert fingerprint(preference)["bos"] is False
    assert not {"bos", "context"} & {*fingerprint(plain)}


def test_bos_is_left_out_of_plain_text_too() -> None:
    """Where the tokenizer writes it and no template does."""
    tokenizer = tiny.tokenizer(template=None)
    preference = judge(tokenizer=tokenizer, bos=False)
    ids = torch.tensor([tokenizer("Q p A: a B: b ?", add_special_tokens=False)["input_ids"]])
    answers = tokenizer.convert_tokens_to_ids(["A", "B"])
    assert preference(["p"], ["a"], ["b"]) == pytest.approx([by_hand(preference.model, ids, answers)], abs=1e-6)


def test_an_encoder_decoder_compares() -> None:
    """SteamSHP's question to a T5: the answer is the decoder's first token, the question keeps its EOS."""
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": tiny.VOCABULARY}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    ).eval()
    tokenizer = tiny.tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tiny.EOS)]
    )
    prompts, firsts, seconds = ["one", "two"], ["yes", "no"], ["perhaps", "never"]
    found = judge(model, tokenizer, question=STEAM_SHP)(prompts, firsts, seconds)
    for chance, prompt, first, second in zip(found, prompts, firsts, seconds, strict=True):
        asked = STEAM_SHP.format(prompt=prompt, first=first, second=second)
        ids = tokenizer(asked, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tiny.EOS
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, 0].double()
        expected = float(logits[tokenizer.convert_tokens_to_ids(["A", "B"])].softmax(0)[0])
        assert chance == pytest.approx(expected, abs=1e-6)
