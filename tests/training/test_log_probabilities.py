"""Log-probabilities of groups: values and gradients against the model's own forward, one row at a time."""

from pathlib import Path
from typing import Any

import enumerable
import numpy as np
import pytest
import tiny
import torch
from architectures import DECODERS, HYBRIDS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.policy import Policy, tokenize_completion
from calibrated_rewards.samplers.protocol import Decoding, Rollout
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.groups import PromptGroup, ReferenceFile, record_states
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.routes import Route
from calibrated_rewards.training.offline.trained_weights import select_weights

TEMPERATURE = 0.7
LENGTHS = (9, 1, 4, 12, 3, 7)
# Their windows would count a prompt's padding.
READ_APART = {"Mistral", "Gemma2"}


def writer(name: str) -> Any:
    """A causal model whose weights tell rows apart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**DECODERS, **HYBRIDS}[name].config()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.0 / weight.shape[-1] ** 0.5)
    return model


def with_adapter(model: Any) -> Any:
    """LoRA on all linear layers, whose two halves both have a gradient."""
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=model.config.model_type == "gpt2")
    with ignore_peft_warning():
        adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return adapted


def group(prompt: int = 30) -> Group:
    """A prompt, longer than the windows, and completions of several lengths."""
    rng = np.random.default_rng(0)
    return Group(rng.integers(8, 200, prompt).tolist(), [rng.integers(8, 200, n).tolist() for n in LENGTHS])


def loss_of(values: torch.Tensor) -> torch.Tensor:
    """A loss in which the slope of each value depends on all of them, and one slope is large."""
    return (values - values.mean()).square().mean() / 50 + 3 * values[2]


def gradients(model: Any) -> torch.Tensor:
    """All gradients, and none afterwards."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    flat = [torch.zeros_like(each).flatten() if each.grad is None else each.grad.flatten() for each in trained]
    model.zero_grad()
    return torch.cat(flat)


def one_by_one(model: Any, rows: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: each row alone through the model's own forward, and the gradient of the loss by autograd."""
    values = []
    for own in rows.completions:
        logits = model(input_ids=torch.tensor([rows.prompt + own])).logits[0, len(rows.prompt) - 1 : -1]
        values.append((logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(own)[:, None]).sum())
    stacked = torch.stack(values)
    loss_of(stacked).backward()
    return stacked.detach(), gradients(model)


def assert_equal(model: Any, reader: GroupReader, rows: Group) -> None:
    """Values with and without gradients, and the gradients."""
    expected, slopes = one_by_one(model, rows)

    ((loss, values),) = reader.accumulate_gradients([rows], [loss_of])

    own = gradients(model)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(reader(rows), expected, rtol=1e-5)
    assert loss == pytest.approx(float(loss_of(expected)), rel=1e-4)
    assert (own - slopes).norm() < 1e-5 * slopes.norm()


@pytest.mark.parametrize("rows", [32, 4])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma", "Gemma2", "GPT2", "Mistral"])
def test_a_shared_prompt_changes_neither_values_nor_gradients(name: str, rows: int) -> None:
    """All weights, the head and the tied embeddings among them; all completions at once, and some at a time."""
    model = writer(name)
    reader = GroupReader(model, TEMPERATURE, rows)

    assert_equal(model, reader, group())

    assert reader.route.shared


def several(*prompts: int) -> list[Group]:
    """Groups with prompts of some lengths, and other completions each."""
    rng = np.random.default_rng(1)
    return [
        Group(rng.integers(8, 200, n).tolist(), [rng.integers(8, 200, k).tolist() for k in LENGTHS]) for n in prompts
    ]


@pytest.mark.parametrize("prompts", [(5, 12, 3, 12), (7, 7)])
@pytest.mark.parametrize(
    "name", ["Llama", "Qwen2", "GPT2", "Bloom", "OPT", "FalconAlibi", "Falcon", "Mistral", "Gemma2"]
)
def test_groups_that_are_read_together_have_the_same_gradients(name: str, prompts: tuple[int, ...]) -> None:
    """Prompts are padded, and completions are read behind each; or a model that would not bear it is found out."""
    model, groups = writer(name), several(*prompts)
    reader = GroupReader(model, TEMPERATURE)
    expected, slopes = zip(*(one_by_one(model, each) for each in groups), strict=True)

    results = reader.accumulate_gradients(groups, [loss_of] * len(groups))

    own, sum_of_slopes = gradients(model), torch.stack(slopes).sum(0)
    assert (own - sum_of_slopes).norm() < 1e-5 * sum_of_slopes.norm()
    for (loss, values), read, each in zip(results, reader.read(groups), expected, strict=True):
        np.testing.assert_allclose(values, each, rtol=1e-5)
        np.testing.assert_allclose(read, each, rtol=1e-5)
        assert loss == pytest.approx(float(loss_of(each)), rel=1e-4)
    together = len([*reader.batch(groups)]) == 1
    assert together == (name not in READ_APART), "a model is read in another way than it was"


@pytest.mark.parametrize("rows", [32, 4])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2", "GPT2"])
def test_adapters_have_the_same_gradients(name: str, rows: int) -> None:
    """LoRA below a head that is not trained, whose logits are not held."""
    model = with_adapter(writer(name))
    reader = GroupReader(model, TEMPERATURE, rows)

    assert_equal(model, reader, group())

    assert reader.route.shared


def test_the_last_layers_have_the_same_gradients() -> None:
    """Lower layers are frozen: of their keys and values no gradient is asked for."""
    model = select_weights(writer("Llama"), 1, 0, 0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}

    assert_equal(model, GroupReader(model, TEMPERATURE, 4), group())

    assert trained == {
        name for name, _ in model.named_parameters() if ".layers.1." in name or name == "model.norm.weight"
    }


@pytest.mark.parametrize(
    ("name", "norm"),
    [("OPT", "model.decoder.final_layer_norm"), ("GPT2", "transformer.ln_f"), ("Gemma2", "model.norm")],
)
def test_the_norm_behind_the_layers_is_trained_and_a_tied_head_is_not(name: str, norm: str) -> None:
    """Wherever a model declares it; the head has the weights of the embeddings, which are below the trained layers."""
    model = select_weights(writer(name), 1, 0, 0)

    outside = {name for name, weight in model.named_parameters() if weight.requires_grad and ".1." not in name}
    assert {each.rpartition(".")[0] for each in outside} == {norm}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("trained", ["head", "adapter"])
def test_the_head_may_be_read_in_chunks(trained: str) -> None:
    """A few logits at a time, which are computed again or not held at all."""
    model = writer("Llama") if trained == "head" else with_adapter(writer("Llama"))

    assert_equal(model, GroupReader(model, TEMPERATURE, cells=3 * tiny.VOCABULARY), group())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradient_checkpointing_changes_nothing(mode: str) -> None:
    """In training mode it takes the cache away: prompts are then read with each completion."""
    model = writer("Llama")
    model.activation_checkpointing_enable()
    model.train(mode == "train")
    reader = GroupReader(model, TEMPERATURE)

    assert_equal(model, reader, group())

    assert reader.route.shared == (mode == "eval")


def test_recurrent_models_are_read_in_whole_rows() -> None:
    """A state is not keys and values: no completion starts from it."""
    model = writer("Jamba")
    reader = GroupReader(model, TEMPERATURE)

    assert_equal(model, reader, group())

    assert not reader.route.shared


def test_models_without_a_cache_are_read_in_whole_rows() -> None:
    """The enumerable model takes no keys and values."""
    model = enumerable.Tabular(3)
    rows = Group(list(enumerable.tokens("bc")), [[1, 2, 0], [0], [3, 3, 3]])
    reader = GroupReader(model, TEMPERATURE)

    assert_equal(model, reader, rows)

    assert (reader.route.shared, reader.route.padded) == (False, True)


def test_a_gradient_that_the_cache_loses_is_found() -> None:
    """A model that detaches its keys and values has the right values, and no gradient through its prompt."""
    model = writer("Llama")

    def cut(_: Any, __: Any, answer: Any) -> Any:
        for layer in answer.past_key_values.layers if answer.past_key_values is not None else ():
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return answer

    model.model.register_forward_hook(cut)
    reader = GroupReader(model, TEMPERATURE)

    assert_equal(model, reader, group())

    assert not reader.route.shared


def test_longer_prompts_are_compared_again() -> None:
    """A model that goes wrong behind long prompts alone: a hook spoils those of more than 20 tokens."""
    model = writer("Llama")

    def spoil(_: Any, inputs: Any, options: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 20:
            options = {**options, "position_ids": options["position_ids"] + 5}
        return inputs, options

    model.model.register_forward_pre_hook(spoil, with_kwargs=True)
    reader = GroupReader(model, TEMPERATURE)

    reader(group(8))
    assert reader.route.shared

    assert_equal(model, reader, group())
    assert not reader.route.shared


def test_a_completion_without_tokens_is_certain() -> None:
    """Its log-probability is 0, and the others are as without it."""
    model, rows = tiny.causal(), group()

    values = GroupReader(model)(Group(rows.prompt, [[], *rows.completions]))

    np.testing.assert_allclose(values, [0.0, *GroupReader(model)(rows).tolist()], rtol=1e-5)


def letters_policy(tokens: int) -> Policy:
    """A Llama with a token a letter, so that a text has the tokens that were drawn."""
    made = tiny.causal(vocab_size=1 + enumerable.LETTERS, eos_token_id=0, pad_token_id=0, bos_token_id=None)
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return Policy(made, enumerable.tokenizer(), Decoding(tokens, TEMPERATURE), Text())


def test_the_tokens_of_rollouts_are_those_that_were_drawn() -> None:
    """The sampler's own sums of log-probabilities, of completions that ended and of those that were cut."""
    policy = letters_policy(6)
    drawn = HfSampler(policy.model, policy.tokenizer, policy.decoding, show_progress=False)(["abc"], [list(range(40))])[
        0
    ]

    pairs = [tokenize_completion(policy, rollout) for rollout in drawn]

    assert {rollout.finish for rollout in drawn} == {"stop", "length"}
    assert all(as_drawn for _, as_drawn in pairs)
    assert [len(ids) for ids, _ in pairs] == [rollout.tokens for rollout in drawn]
    values = GroupReader(policy.model, TEMPERATURE)(Group(policy.ids(["abc"])[0], [ids for ids, _ in pairs]))
    np.testing.assert_allclose(values, [rollout.logprob for rollout in drawn], rtol=1e-5)


def test_other_tokens_than_were_drawn_are_told() -> None:
    """A count that the text does not make; messages are refused."""
    policy = letters_policy(6)

    assert tokenize_completion(policy, Rollout("ab", 5, "stop")) == ([1, 2, 0], False)
    assert tokenize_completion(policy, Rollout("ab", None, None)) == ([1, 2, 0], True)
    assert tokenize_completion(policy, Rollout("ab", 2, "length")) == ([1, 2], True)
    with pytest.raises(TypeError, match="completions that are text"):
        tokenize_completion(policy, Rollout([{"role": "assistant", "content": "ab"}]))


@pytest.mark.parametrize("rows", [32, 4])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2", "Mistral"])
def test_states_below_the_trained_layers_stand_for_tokens(name: str, rows: int) -> None:
    """A group with the states that enter the last layer has the values and gradients of the whole model."""
    model = select_weights(writer(name), 1, 0, 0)
    reader = GroupReader(model, TEMPERATURE, rows)

    ((values, states),) = reader.record([group()])

    kept = group()._replace(states=states)
    np.testing.assert_array_equal(values, reader(group()))
    assert reader.can_skip(kept)
    assert [len(each) for each in states.completions] == [n - 1 for n in LENGTHS]
    assert_equal(model, reader, kept)
    np.testing.assert_allclose(reader(kept.take([3, 0])), values[[3, 0]], rtol=1e-5)


def test_states_that_a_body_would_change_are_not_used() -> None:
    """GPT-2 adds positions to what it takes for embeddings: it is noticed."""
    reader = GroupReader(select_weights(writer("GPT2"), 1, 0, 0), TEMPERATURE)

    ((_, states),) = reader.record([group()])

    assert not reader.can_skip(group()._replace(states=states))


@pytest.mark.parametrize(("long", "kept"), [(4, True), (30, False)])
def test_states_are_compared_at_the_longest_group(
    long: int, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 whose first 20 positions add nothing: states are kept unless a later group is longer than that."""
    model = select_weights(writer("GPT2"), 1, 0, 0)
    with torch.no_grad():
        model.transformer.wpe.weight[:20] = 0
    rewards = np.zeros(len(LENGTHS))
    groups = [
        PromptGroup(bytes([i]) * 16, str(i), group(size), rewards, rewards, 1.0, 0.0, None)
        for i, size in enumerate((4, long, 3))
    ]
    reader = GroupReader(model, TEMPERATURE)

    recorded, logprobs = record_states(reader, groups, ReferenceFile(tmp_path / "reference", ""))

    assert [each.tokens.states is not None for each in recorded] == [kept] * 3
    assert ("no states are kept" in capsys.readouterr().err) is not kept
    for each in recorded:
        np.testing.assert_allclose(reader(each.tokens), logprobs[each.key], rtol=1e-5)


ALIKE = [
    [20, 21, 22, 23],
    [20, 21, 22, 24],
    [20, 21, 30, 23],
    [20, 21, 22, 23],
    [],
    [20],
    [40, 41, 42, 43, 44, 45],
    [20, 50, 22, 23, 60, 61],
    [40, 41, 42, 43, 44, 46],
    [50],
]


def alike(*prompts: int) -> list[Group]:
    """Groups whose completions begin alike, some of which are equal, empty, or one token."""
    rng = np.random.default_rng(2)
    return [
        Group(rng.integers(8, 200, n).tolist(), [[token + 7 * i for token in row] for row in ALIKE])
        for i, n in enumerate(prompts)
    ]


def assert_all_equal(model: Any, reader: GroupReader, groups: list[Group]) -> None:
    """Values with and without gradients, and gradients, of groups that are read at once."""
    expected, slopes = zip(*(one_by_one(model, each) for each in groups), strict=True)

    results = reader.accumulate_gradients(groups, [loss_of] * len(groups))

    own, total = gradients(model), torch.stack(slopes).sum(0)
    assert (own - total).norm() < 1e-5 * total.norm()
    for (_, values), read, each in zip(results, reader.read(groups), expected, strict=True):
        np.testing.assert_allclose(values, each, rtol=1e-5)
        np.testing.assert_allclose(read, each, rtol=1e-5)


def reads_trees(reader: GroupReader, groups: list[Group]) -> bool:
    """Whether all groups are read as trees."""
    return all(batch.trees for batch in reader.batch(groups))


# Their caches forget what is outside a window, their positions are made of the mask, or none are taken.
WITHOUT_TREES = {"Mistral", "Gemma2", "Gemma3", "GptOss", "Mixtral", "FalconAlibi", "Bloom", "Jamba"}


@pytest.mark.parametrize(("prompts", "rows"), [((5, 12, 3), 32), ((30,), 4)])
@pytest.mark.parametrize(
    "name",
    ["Llama", "Qwen2", "Qwen3Moe", "Gemma", "GPT2", "GPTNeoX", "OPT", "Phi3", "Falcon", *sorted(WITHOUT_TREES)],
)
def test_completions_that_begin_alike_are_read_as_a_tree(name: str, prompts: tuple[int, ...], rows: int) -> None:
    """All weights' gradients, of ragged prompts and of some completions at a time; or another way is found."""
    model, groups = writer(name), alike(*prompts)
    reader = GroupReader(model, TEMPERATURE, rows)

    assert_all_equal(model, reader, groups)

    assert reads_trees(reader, groups) == (name not in WITHOUT_TREES)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_trees_are_masked_for_each_kind_of_attention(implementation: str) -> None:
    """One adds the mask to its scores, the other takes truth values."""
    model, groups = writer("Llama"), alike(5, 12)
    model.set_attn_implementation(implementation)
    reader = GroupReader(model, TEMPERATURE)

    assert_all_equal(model, reader, groups)

    assert reads_trees(reader, groups)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("cells", [2**26, 3 * tiny.VOCABULARY])
def test_trees_have_the_gradients_of_adapters(name: str, cells: int) -> None:
    """The head is not trained: a state's logits are computed once for all tokens that follow it."""
    model, groups = with_adapter(writer(name)), alike(5, 12)
    reader = GroupReader(model, TEMPERATURE, cells=cells)

    assert_all_equal(model, reader, groups)

    assert reads_trees(reader, groups)


@pytest.mark.parametrize("rows", [32, 4])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma"])
def test_trees_start_from_states(name: str, rows: int) -> None:
    """States are those of completions, whichever way they are recorded; some completions may be left out."""
    model, groups = select_weights(writer(name), 1, 0, 0), alike(30, 7)
    reader, other = (
        GroupReader(model, TEMPERATURE, rows),
        GroupReader(model, TEMPERATURE, rows, route=Route(trees=False)),
    )

    recorded, plain = [*reader.record(groups)], [*other.record(groups)]

    assert reads_trees(reader, groups)
    for (values, states), (expected, rows_alone) in zip(recorded, plain, strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        for one, two in zip(states.completions, rows_alone.completions, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    kept = [each._replace(states=states) for each, (_, states) in zip(groups, recorded, strict=True)]
    assert_all_equal(model, reader, kept)
    assert reads_trees(reader, kept)
    few = [each.take([7, 0, 4, 1, 3]) for each in kept]
    for read, (values, _) in zip(reader.read(few), recorded, strict=True):
        np.testing.assert_allclose(read, values[[7, 0, 4, 1, 3]], rtol=1e-5)


def test_trees_are_read_once_completions_branch_after_a_token() -> None:
    """Equal completions would not show a mask that hides too little."""
    model, (whole,) = writer("Llama"), alike(9)
    same = Group(whole.prompt, [whole.completions[0]] * 6)
    reader = GroupReader(model, TEMPERATURE)

    assert not reads_trees(reader, [same])
    assert reads_trees(reader, [whole])
    assert reads_trees(reader, [same])


def test_a_model_that_takes_a_tree_for_a_row_is_found() -> None:
    """A hook leaves out the mask of nodes: each then sees those of other completions before it."""
    model, groups = writer("Llama"), alike(9)

    def widen(_: Any, inputs: Any, options: Any) -> Any:
        mask = options.get("attention_mask")
        if mask is not None and mask.ndim == 4 and mask.shape[2] < mask.shape[3]:
            nodes = mask.shape[2]
            mask = torch.cat([mask[..., :-nodes], torch.ones_like(mask[..., -nodes:]).tril()], -1)
            options = {**options, "attention_mask": mask}
        return inputs, options

    model.model.register_forward_pre_hook(widen, with_kwargs=True)
    reader = GroupReader(model, TEMPERATURE)

    assert_all_equal(model, reader, groups)

    assert not reader.route.trees


def test_longer_trees_are_compared_again() -> None:
    """A model that goes wrong for trees behind long prompts alone."""
    model, (short, long) = writer("Llama"), alike(8, 60)

    def spoil(_: Any, inputs: Any, options: Any) -> Any:
        mask = options.get("attention_mask")
        if mask is not None and mask.ndim == 4 and mask.shape[3] > 50:
            options = {**options, "position_ids": options["position_ids"] * 2}
        return inputs, options

    model.model.register_forward_pre_hook(spoil, with_kwargs=True)
    reader = GroupReader(model, TEMPERATURE)

    assert reads_trees(reader, [short])
    assert_all_equal(model, reader, [long])
    assert not reader.route.trees
