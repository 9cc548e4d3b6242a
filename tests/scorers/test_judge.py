"""A judge's score is a difference of logits of the model's own forward, on the question rendered by the tokenizer."""

import json

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from tokenizers import processors

from calibrated_rewards.models.labels import Difference
from calibrated_rewards.models.text import Text, TruncationWarning, fill_in, format_conversation
from calibrated_rewards.scorers.judge import ExpectedRating, Judge
from calibrated_rewards.scorers.loading import load_scorer

SHORT = "{prompt} >> {completion} ok?"
SMALL = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
MODELS = {
    "Llama": {},
    "Phi": {},  # its output layer has a bias
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": 16},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
    "HyperCLOVAX": {"logits_scaling": 8.0},  # it multiplies by what Granite divides by
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def writer(kind, seed=0):
    """A causal LM of some architecture whose logits spread."""
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **MODELS[kind]})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layer = model.get_output_embeddings()
    with torch.no_grad():
        layer.weight.normal_(std=1.0)
        if layer.bias is not None:
            layer.bias.normal_(std=1.0)
    return model


def asked(tokenizer, question):
    """The ids of a question as a user's message, with the opening of the answer."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def last_logits(model, rows):
    """The model's own next-token logits of each row, alone and without padding."""
    with torch.inference_mode():
        return np.stack([model(torch.tensor([row])).logits[0, -1].float().numpy() for row in rows])


def odds(model, tokenizer, rows, good="Y", bad="N"):
    logits = last_logits(model, rows)
    good, bad = (tokenizer.convert_tokens_to_ids(answer) for answer in (good, bad))
    return logits[:, good] - logits[:, bad]


def pairs():
    """Prompts, some of them several times, and completions."""
    return [p for p in tiny.texts(4, 1) for _ in range(3)], tiny.texts(12, 2)


def close(scores, expected, share=1e-4):
    return np.abs(scores - expected).max() < share * expected.std()


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_the_models_own_forward(kind):
    """Padding, batches, prefix sharing, and the scales, caps and biases of logits change nothing."""
    model, tokenizer = writer(kind), tiny.tokenizer()
    prompts, completions = pairs()
    rows = [asked(tokenizer, f"{p} >> {c} ok?") for p, c in zip(prompts, completions, strict=True)]
    expected = odds(model, tokenizer, rows)
    for options in ({}, {"share_prefixes": False}, {"batch_tokens": 1}, {"batch_tokens": 150}):
        scores = Judge(model, tokenizer, SHORT, "Y", "N", **options)(prompts, completions)
        assert scores.dtype == np.float32
        assert close(scores, expected)


def test_a_judge_without_template_reads_plain_text():
    """Then, and with chat=False, the question is text with the tokenizer's special tokens; " Y" may be an answer."""
    model = writer("Llama")
    prompts, completions = pairs()
    for tokenizer, text in ((tiny.tokenizer(template=None), Text()), (tiny.tokenizer(), Text(chat=False))):
        rows = [tokenizer(f"{p} >> {c} ok?")["input_ids"] for p, c in zip(prompts, completions, strict=True)]
        assert rows[0][0] == tiny.BOS
        scores = Judge(model, tokenizer, SHORT, "Y", "N", text=text)(prompts, completions)
        assert close(scores, odds(model, tokenizer, rows))


def test_a_tokenizer_that_adds_eos_does_not_end_the_question():
    """The answer follows the question, not the end of the text."""
    model, tokenizer = writer("Llama"), tiny.tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tiny.BOS), ("</s>", tiny.EOS)]
    )
    row = tokenizer("q >> a ok?")["input_ids"]
    assert row[-1] == tiny.EOS
    score = Judge(model, tokenizer, SHORT, "Y", "N")(["q"], ["a"])
    np.testing.assert_allclose(score, odds(model, tokenizer, [row[:-1]]), rtol=1e-4)


def test_the_question_names_the_answers_and_is_filled_once():
    """Braces in a prompt or a completion stay what they are."""
    model, tokenizer = writer("Llama"), tiny.tokenizer()
    judge = Judge(model, tokenizer, "{prompt}|{completion}|{good} or {bad}|{other}", "Y", "N")
    row = asked(tokenizer, "a {completion}|{prompt} {bad}|Y or N|{other}")
    np.testing.assert_allclose(judge(["a {completion}"], ["{prompt} {bad}"]), odds(model, tokenizer, [row]), rtol=1e-4)
    assert fill_in("{a}{b}", {"a": "{b}"}) == "{b}{b}"


def test_conversations_are_written_out():
    """One user's message is its text; several, and tool calls, are told with their roles."""
    model, tokenizer = writer("Llama"), tiny.tokenizer()
    judge = Judge(model, tokenizer, SHORT, "Y", "N")
    one = [{"role": "user", "content": "Hi"}]
    more = [{"role": "system", "content": "Be kind"}, *one]
    answer = [{"role": "assistant", "content": "Yo"}]
    call = {"function": {"arguments": {"q": 1}, "name": "f"}}
    tools = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}, *answer]
    told = f"Assistant: {json.dumps([call])}\n\nTool: 3\n\nAssistant: Yo"
    questions = ["Hi >> Yo ok?", "System: Be kind\n\nUser: Hi >> Yo ok?", f"Hi >> {told} ok?"]
    scores = judge([one, more, one], [answer, "Yo", tools])
    assert close(scores, odds(model, tokenizer, [asked(tokenizer, question) for question in questions]))
    assert format_conversation([], "assistant") == ""
    assert format_conversation([{"role": "system", "content": "Hi"}], "user") == "System: Hi"
    with pytest.raises(TypeError, match="messages that are text"):
        format_conversation([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "user")


def test_what_the_user_takes_off_completions_is_taken_off():
    """Text(strip=...) holds for judges as well."""
    model, tokenizer = writer("Llama"), tiny.tokenizer()
    judge = Judge(model, tokenizer, SHORT, "Y", "N", text=Text(strip=("<|end|>",)))
    assert judge(["q"], ["a<|end|>"]) == judge(["q"], ["a"])
    assert judge(["q"], ["a<|end|>b"]) != judge(["q"], ["ab"])


def test_half_precision_is_read_in_float32():
    """The scores of a bfloat16 model are its hidden states times float32 weights: no two of them tie."""
    model, tokenizer = writer("Llama").bfloat16(), tiny.tokenizer()
    good, bad = (tokenizer.convert_tokens_to_ids(answer) for answer in "YN")
    completions = tiny.texts(40, 5)
    expected = []
    for completion in completions:
        row = torch.tensor([asked(tokenizer, f"q >> {completion} ok?")])
        with torch.inference_mode():
            hidden = model.model(row).last_hidden_state[0, -1].float()
            weights = model.lm_head.weight.float()
            expected.append(float(hidden @ (weights[good] - weights[bad])))
    scores = Judge(model, tokenizer, SHORT, "Y", "N", batch_tokens=1)(["q"] * 40, completions)
    assert close(scores, np.array(expected), 0.05)
    assert len(set(scores)) == len(set(completions))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_an_adapter_counts_also_on_the_output_layer():
    """A PEFT judge is read with its adapter, wherever that is, and is left as it was."""
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny.tokenizer()
    settings = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(writer("Llama"), settings).train()
    prompts, completions = pairs()
    scores = Judge(model, tokenizer, SHORT, "Y", "N")(prompts, completions)
    assert all(part.training for part in model.modules())
    rows = [asked(tokenizer, f"{p} >> {c} ok?") for p, c in zip(prompts, completions, strict=True)]
    assert close(scores, odds(model.eval(), tokenizer, rows))
    with model.disable_adapter():
        assert not close(scores, odds(model, tokenizer, rows))


def test_a_rating_is_expected_under_the_softmax():
    """The mean of the ratings, weighted by the softmax of their tokens' logits."""
    model, tokenizer = writer("Llama"), tiny.tokenizer()
    prompts, completions = pairs()
    rows = [asked(tokenizer, f"{p} >> {c} from 2 to 4?") for p, c in zip(prompts, completions, strict=True)]
    logits = torch.tensor(last_logits(model, rows)[:, [tokenizer.convert_tokens_to_ids(x) for x in "234"]])
    expected = (logits.softmax(1) @ torch.tensor([2.0, 3.0, 4.0])).numpy()
    judge = ExpectedRating(model, tokenizer, "{prompt} >> {completion} from {low} to {high}?", 2, 4)
    assert close(judge(prompts, completions), expected)
    assert judge([], []).shape == (0,)


def test_what_is_too_long_loses_the_prompts_beginning():
    """BOS and the last tokens remain, and a warning says so."""
    model, tokenizer = writer("Llama"), tiny.tokenizer()
    row = asked(tokenizer, f"{'abc' * 30} >> yes ok?")
    with pytest.warns(TruncationWarning, match="1 of 2 inputs"):
        scores = Judge(model, tokenizer, SHORT, "Y", "N", text=Text(max_length=30))(["abc" * 30, "a"], ["yes", "no"])
    np.testing.assert_allclose(scores[0], odds(model, tokenizer, [row[:1] + row[-29:]])[0], rtol=1e-4)


def test_errors_say_what_to_do():
    """Answers of several tokens, equal answers, questions about nothing, and models that are read otherwise."""
    model, tokenizer = writer("Llama"), tiny.tokenizer()
    with pytest.raises(ValueError, match=r"one token of the model's, got 'Yes', which is \['Y', 'e', 's'\]"):
        Judge(model, tokenizer, bad="N")
    with pytest.raises(ValueError, match=r"answer is one token .* got '10'"):
        ExpectedRating(model, tokenizer, high=10)
    with pytest.raises(ValueError, match="low < high, got low=3 and high=3"):
        ExpectedRating(model, tokenizer, low=3, high=3)
    with pytest.raises(ValueError, match="two answers, got good='Y' and bad='Y'"):
        Judge(model, tokenizer, good="Y", bad="Y")
    with pytest.raises(ValueError, match=r"a question holds \{completion\}.* got 'Good\?'"):
        Judge(model, tokenizer, "Good?", "Y", "N")
    with pytest.raises(ValueError, match="takes no EOS"):
        Judge(model, tokenizer, good="Y", bad="N", text=Text(append_eos=True))
    with pytest.raises(TypeError, match="LlamaForSequenceClassification lacks one"):
        Judge(tiny.classifier(), tokenizer, good="Y", bad="N")(["a"], ["b"])


class Cubed(transformers.LlamaForCausalLM):
    """A model whose logits are not those of its output layer."""

    def forward(self, *args, **options):
        """Cubes."""
        outputs = super().forward(*args, **options)
        outputs.logits = outputs.logits**3
        return outputs


def test_a_model_that_makes_its_logits_otherwise_is_refused():
    """Its own forward is asked once, and disagrees."""
    model = Cubed(tiny.config()).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    with pytest.raises(ValueError, match="body and head of Cubed have to give what its own forward gives"):
        Judge(model, tiny.tokenizer(), good="Y", bad="N")(["a"], ["b"])


def test_the_fingerprint_tells_what_the_score_depends_on():
    """It is JSON; another question, answer, or template is another scorer, another batch size is not."""
    model, tokenizer = writer("Llama"), tiny.tokenizer()
    judge = Judge(model, tokenizer, SHORT, "Y", "N")
    own = json.dumps(judge.fingerprint())
    assert own == json.dumps(Judge(model, tokenizer, SHORT, "Y", "N", batch_tokens=7).fingerprint())
    others = [
        Judge(model, tokenizer, SHORT + " ", "Y", "N"),
        Judge(model, tokenizer, SHORT, "y", "N"),
        Judge(model, tokenizer, SHORT, "Y", "N", text=Text(chat=False)),
        Judge(writer("Llama", 1), tokenizer, SHORT, "Y", "N"),
        ExpectedRating(model, tokenizer, SHORT),
    ]
    assert len({own, *(json.dumps(other.fingerprint()) for other in others)}) == 6
    assert judge([], []).shape == Difference(0, 1)(np.empty((0, 2), np.float32)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_trained_or_replaced_counts_at_once(dtype):
    """Weights that change after the first call are those of the next call; another layer in their place as well."""
    model, tokenizer = writer("Llama").to(dtype), tiny.tokenizer()
    judge = Judge(model, tokenizer, SHORT, "Y", "N")
    before = judge(*pairs())
    model.lm_head.weight.data *= -3
    after = judge(*pairs())
    np.testing.assert_allclose(after, -3 * before, rtol=0.02)
    np.testing.assert_array_equal(after, Judge(model, tokenizer, SHORT, "Y", "N")(*pairs()))
    model.set_output_embeddings(torch.nn.Linear(32, tiny.VOCABULARY, False).to(dtype))
    np.testing.assert_array_equal(judge(*pairs()), Judge(model, tokenizer, SHORT, "Y", "N")(*pairs()))


def test_eos_that_the_template_writes_stays():
    """Only a tokenizer's own EOS behind plain text is taken off; one at the end of a template was trained with."""
    model, tokenizer = writer("Llama"), tiny.tokenizer(template=tiny.TEMPLATE + "</s>")
    row = asked(tokenizer, "q >> a ok?")
    assert row[-1] == tiny.EOS
    score = Judge(model, tokenizer, SHORT, "Y", "N")(["q"], ["a"])
    np.testing.assert_allclose(score, odds(model, tokenizer, [row]), rtol=1e-4)


def test_nan_weights_are_named():
    """Before the first call and after it: the error says nan."""
    for first in (True, False):
        model = writer("Llama")
        judge = Judge(model, tiny.tokenizer(), SHORT, "Y", "N")
        if not first:
            judge(["a"], ["b"])
        model.model.norm.weight.data[:] = float("nan")
        with pytest.raises(ValueError, match="for nan among"):
            judge(["a"], ["b"])


@pytest.mark.parametrize("kind", [lambda *given: Judge(*given, good="Y", bad="N"), ExpectedRating])
def test_calls_take_keywords_and_lists_of_one_length(kind):
    """As trainers call rewards; a text in the place of a list is refused."""
    judge = kind(writer("Llama"), tiny.tokenizer())
    np.testing.assert_array_equal(judge(prompts=["a"], completions=["b"]), judge(["a"], ["b"]))
    with pytest.raises(TypeError, match="prompts are a list"):
        judge("a", ["b"])
    with pytest.raises(ValueError, match="got 1 prompts and 2 completions"):
        judge(["a"], ["b", "c"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_learned_prompt_is_refused():
    """It stands before the body, which is read without it."""
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="body and head of PeftModelForCausalLM have to give"):
        Judge(peft.get_peft_model(writer("Llama"), soft), tiny.tokenizer(), good="Y", bad="N")(["a"], ["b"])


def rewriter(kind="T5", dtype=torch.float32):
    """An encoder-decoder whose logits spread."""
    sizes = {"d_model": 32, "vocab_size": tiny.VOCABULARY, "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
    own = {
        "T5": {"d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "tie_word_embeddings": False},
        "Bart": {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 512, "init_std": 0.5},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **own, decoder_start_token_id=tiny.EOS)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.3)
    return model.to(dtype)


def first_scores(model, rows, answers):
    """What `generate` gives these answers in its first step, for each unpadded row."""
    tokenizer = tiny.tokenizer()
    told = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
    told |= {"return_dict_in_generate": True, "output_logits": True}
    steps = [model.generate(torch.tensor([row]), **told)["logits"][0][0].float() for row in rows]
    return np.array([[step[tokenizer.convert_tokens_to_ids(answer)].item() for answer in answers] for step in steps])


def ending():
    """A tokenizer that ends its texts with EOS, as T5's does."""
    tokenizer = tiny.tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tiny.EOS)]
    )
    return tokenizer


@pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers")
@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_encoder_decoder_answers_in_its_first_token(kind, tmp_path):
    """Behind the whole question, EOS and all, as `generate` does; loaded by its kind as well."""
    tokenizer, model = ending(), rewriter(kind)
    prompts, completions = tiny.texts(6, 0), tiny.texts(6, 1)
    rows = [tokenizer(f"{p} >> {c} ok?")["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    assert {row[-1] for row in rows} == {tiny.EOS}
    own = first_scores(model, rows, ("Y", "N"))

    judge = Judge(model, tokenizer, question=SHORT, good="Y", bad="N", batch_tokens=150)
    close(judge(prompts, completions), own[:, 0] - own[:, 1], 1e-3)
    folder = tiny.saved(model, tmp_path, tokenizer)
    loaded = load_scorer(folder, kind="judge", question=SHORT, good="Y", bad="N")
    close(loaded(prompts, completions), own[:, 0] - own[:, 1], 1e-3)
    assert loaded.fingerprint() == judge.fingerprint()
    ratings = torch.tensor(first_scores(model, rows, ("1", "2", "3"))).softmax(1).numpy() @ [1, 2, 3]
    close(ExpectedRating(model, tokenizer, question=SHORT, high=3)(prompts, completions), ratings, 1e-3)


def test_an_encoder_decoder_in_16_bits_does_not_tie():
    """Its head is read in float32, and is afterwards what it was."""
    model = rewriter(dtype=torch.bfloat16)
    judge = Judge(model, ending(), question=SHORT, good="Y", bad="N")
    assert len(np.unique(judge(tiny.texts(60, 2), tiny.texts(60, 3)))) == 60
    assert "forward" not in vars(model.lm_head)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration needs a decoder_start_token_id"):
        judge(["a"], ["b"])


@pytest.mark.parametrize("kind", ["implicit", "rated-judge", "process", "token-logit"])
def test_other_kinds_need_a_causal_model(kind, tmp_path):
    """They name the kinds that an encoder-decoder has, in place of transformers' list of classes."""
    folder = tiny.saved(rewriter(), tmp_path, ending())
    options = {"implicit": {"reference_free": True}, "process": {"answers": ("Y", "N")}}.get(kind, {})
    with pytest.raises(ValueError, match=rf"T5ForConditionalGeneration, an encoder-decoder.*the kinds judge.*'{kind}'"):
        load_scorer(folder, kind=kind, **options)
