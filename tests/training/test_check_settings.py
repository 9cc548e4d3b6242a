"""Settings checks: faithful runs have nothing to change, and each unfaithful setting is found and told what to be."""

import dataclasses
from argparse import Namespace
from collections.abc import MutableMapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from trl import GRPOConfig, RLOOConfig

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.reward.calibrators import ZScore
from calibrated_rewards.testing.suites import NumberScorer
from calibrated_rewards.theory.transforms import Exponential, Log
from calibrated_rewards.training.check_settings import check_settings, grpo_settings, rloo_settings
from calibrated_rewards.training.check_settings.__main__ import BLOCK, format_tables
from calibrated_rewards.training.check_settings.check import FRAMEWORKS, find_span
from calibrated_rewards.training.check_settings.rules import (
    Framework,
    FrameworkSettings,
    Is,
    Rule,
    SameAs,
    Strength,
    find_broken_rules,
)

PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": [],
    "per_device_train_batch_size": 8,
}
# What docs/reference/settings.md says to write, setting by setting.
FAITHFUL = {
    "openrlhf": {
        "algo.advantage.estimator": "rloo",
        "algo.kl.init_coef": 0.05,
        "reward.clip_range": (-1e6, 1e6),
        "data.label_key": "id",
        "rollout.max_new_tokens": 64,
    },
    "verl": {
        "algorithm.adv_estimator": "rloo",
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl.kl_coef": 0.05,
        "data.max_response_length": 64,
    },
    "ms-swift": {
        "advantage_estimator": "rloo",
        "kl_in_reward": True,
        "scale_rewards": "none",
        "loss_type": "dr_grpo",
        "beta": 0.05,
        "temperature": 1.0,
        "max_completion_length": 64,
    },
    "skyrl": {
        "trainer.algorithm.advantage_estimator": "rloo",
        "trainer.algorithm.use_kl_in_reward": True,
        "trainer.algorithm.use_kl_loss": False,
        "trainer.algorithm.kl_estimator_type": "k1",
        "trainer.algorithm.kl_loss_coef": 0.05,
        "generator.sampling_params.max_generate_length": 64,
    },
    "slime": {
        "advantage_estimator": "ppo",
        "kl_coef": 0.05,
        "calculate_per_token_loss": True,
        "rollout_max_response_len": 64,
    },
    "areal": {
        "ref.path": "reference",
        "ref": SimpleNamespace(path="reference"),
        "actor.kl_ctl": 0.05,
        "actor.reward_clip": 1e6,
        "actor.ppo_n_minibatches": 1,
        "gconfig.max_new_tokens": 64,
    },
    "nemo-rl": {
        "grpo.normalize_rewards": False,
        "loss_fn.reference_policy_kl_penalty": 0.05,
        "loss_fn.reference_policy_kl_type": "k2",
        "policy.generation.max_new_tokens": 64,
    },
    "lightrft": {
        "advantage_estimator": "rloo",
        "init_kl_coef": 0.05,
        "loss_agg_mode": "token-mean",
        "generate_max_len": 64,
    },
}
DECODING = {"max_tokens": 64, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def made(transform=None, decoding=None, **options):
    """A reward over a table of 4 and of 100 references that says how they were drawn."""
    meta = {"sampler": {"decoding": {**DECODING, **(decoding or {})}}}
    rows = [("2+2=", [1.0, 2.0, 3.0, 5.0]), ("Hello", np.arange(100.0))]
    chosen = {} if transform is None else {"transform": transform}
    return CalibratedReward(NumberScorer(), ReferenceTable.build(rows, meta=meta), **chosen, **options)


def found(report):
    """What is wrong, by the name of the setting."""
    return {finding.setting.partition("=")[0] for finding in report.problems}


def nested(flat):
    """{"a.b": 1} as {"a": {"b": 1}}."""
    out = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = out
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return out


def namespaces(value):
    """Nested mappings as nested namespaces, which is what OpenRLHF makes of its arguments."""
    return SimpleNamespace(**{k: namespaces(v) for k, v in value.items()}) if isinstance(value, dict) else value


class Container(MutableMapping):
    """A mapping with attributes, as OmegaConf's are: a name that it does not have raises an error of its own."""

    def __init__(self, content):
        """Keep plain mappings as containers."""
        self.__dict__["_content"] = {k: Container(v) if isinstance(v, dict) else v for k, v in content.items()}

    def __getitem__(self, name):
        return self._content[name]

    def __getattr__(self, name):
        return self._content[name]

    def __setitem__(self, name, value):
        self._content[name] = value

    def __delitem__(self, name):
        del self._content[name]

    def __iter__(self):
        return iter(self._content)

    def __len__(self):
        return len(self._content)


@pytest.mark.parametrize("num_generations", [2, 8])
@pytest.mark.parametrize(("config", "chosen"), [(RLOOConfig, rloo_settings), (GRPOConfig, grpo_settings)])
def test_the_faithful_settings_of_trl_pass(config, chosen, num_generations, tmp_path):
    """TRL's own configs made of what we recommend have no problem, and the beta that was asked for."""
    settings = config(output_dir=str(tmp_path), max_completion_length=64, **PLAIN, **chosen(0.05, num_generations))
    report = check_settings(settings, made(Log()), beta=0.05)
    assert report.problems == ()
    assert report.beta == pytest.approx(0.05, rel=1e-12)
    report.raise_if_wrong()


def test_the_defaults_of_trl(tmp_path):
    """GRPO's defaults have no KL and divide by a standard deviation; RLOO's are right but for the length."""
    grpo = check_settings(GRPOConfig(output_dir=str(tmp_path), **PLAIN), made())
    assert found(grpo) == {"beta", "scale_rewards", "max_completion_length"}
    assert grpo.beta is None
    with pytest.raises(ValueError, match=r'(?s)trl-grpo would not .*beta=0\.0.*Write scale_rewards="none"'):
        grpo.raise_if_wrong()
    rloo = check_settings(RLOOConfig(output_dir=str(tmp_path), **PLAIN), made())
    assert found(rloo) == {"max_completion_length"}
    assert rloo.beta == 0.05


@pytest.mark.parametrize(
    ("config", "chosen", "wrong"),
    [
        (RLOOConfig, rloo_settings, {"beta": 0.0}),
        (RLOOConfig, rloo_settings, {"normalize_advantages": True}),
        (RLOOConfig, rloo_settings, {"reward_clip_range": (-1.0, 1.0)}),
        (RLOOConfig, rloo_settings, {"sync_ref_model": True}),
        (RLOOConfig, rloo_settings, {"num_iterations": 2}),
        (RLOOConfig, rloo_settings, {"steps_per_generation": 4}),
        (RLOOConfig, rloo_settings, {"mask_truncated_completions": True}),
        (RLOOConfig, rloo_settings, {"top_p": 0.9}),
        (RLOOConfig, rloo_settings, {"top_k": 50}),
        (RLOOConfig, rloo_settings, {"min_p": 0.1}),
        (RLOOConfig, rloo_settings, {"repetition_penalty": 1.1}),
        (RLOOConfig, rloo_settings, {"temperature": 0.7}),
        (RLOOConfig, rloo_settings, {"max_completion_length": 32}),
        (RLOOConfig, rloo_settings, {"generation_kwargs": {"temperature": 0.5}}),
        (RLOOConfig, rloo_settings, {"remove_unused_columns": True}),
        (GRPOConfig, grpo_settings, {"scale_rewards": "batch"}),
        (GRPOConfig, grpo_settings, {"multi_objective_aggregation": "normalize_then_sum"}),
        (GRPOConfig, grpo_settings, {"loss_type": "grpo"}),
        (GRPOConfig, grpo_settings, {"use_bias_correction_kl": False}),
        (GRPOConfig, grpo_settings, {"importance_sampling_level": "sequence"}),
        (GRPOConfig, grpo_settings, {"top_entropy_quantile": 0.2}),
        (GRPOConfig, grpo_settings, {"entropy_coef": 0.01}),
        (GRPOConfig, grpo_settings, {"delta": 1.5}),
        (GRPOConfig, grpo_settings, {"off_policy_mask_threshold": 0.5}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_each_wrong_setting_is_found_alone(config, chosen, wrong, tmp_path):
    """One change to a faithful config is one finding, which names it and says what to write."""
    settings = {"max_completion_length": 64, **chosen(0.05), **PLAIN, **wrong}
    report = check_settings(config(output_dir=str(tmp_path), **settings), made(Log(), id_column="id"))
    assert found(report) == {*wrong}
    assert all(finding.write or finding.setting.startswith("generation_kwargs") for finding in report.problems)


@pytest.mark.parametrize("name", FAITHFUL)
@pytest.mark.parametrize("shape", [dict, nested, lambda flat: namespaces(nested(flat)), lambda f: Container(nested(f))])
def test_the_faithful_settings_of_the_others_pass(name, shape):
    """The settings of the documents have no problem, in whatever shape they come."""
    flat = {key: value for key, value in FAITHFUL[name].items() if key != "ref.path"}
    report = check_settings(shape(flat), made(Log()), name, beta=0.05)
    assert report.problems == (), str(report)
    assert report.beta == pytest.approx(0.05)


@pytest.mark.parametrize("name", FAITHFUL)
def test_the_defaults_of_the_others_do_not(name):
    """No other framework's defaults are faithful, and what is wrong has the setting to write beside it."""
    report = check_settings({}, made(), name)
    assert report.problems
    assert all(finding.write for finding in report.problems)


@pytest.mark.parametrize("name", ["trl-async-grpo", "trl-online-dpo"])
def test_a_trainer_with_another_objective_is_named(name):
    """Nothing that can be set makes these faithful, and RLOO is what to write."""
    report = check_settings({"temperature": 1.0}, None, name)
    assert any(finding.write == "an RLOOConfig" for finding in report.problems)


def test_arguments_with_dots_in_their_names():
    """An argparse namespace whose names have dots is read as it is."""
    settings = Namespace(**{"algo.kl.init_coef": 0.2, "algo.advantage.estimator": "rloo"})
    assert check_settings(settings, None, "openrlhf").beta == 0.2


@given(beta=st.floats(1e-4, 10), group=st.integers(2, 64))
def test_grpos_beta_is_that_of_its_gradient(beta, group):
    """Among G rewards, those minus their mean are (G - 1) / G times those minus the mean of the others, in numpy."""
    rewards = np.random.default_rng(group).normal(size=group)
    others = (rewards.sum() - rewards) / (group - 1)
    shrink = np.polyfit(rewards - others, rewards - rewards.mean(), 1)[0]
    written = grpo_settings(beta, group)["beta"]
    assert written / shrink == pytest.approx(beta)
    report = check_settings({"beta": written, "num_generations": group}, framework="trl-grpo")
    assert report.beta == pytest.approx(beta)
    assert not any("includes" in finding.why for finding in report.problems)  # to be known, and not wrong


def test_the_beta_that_is_wanted():
    """A beta that the settings do not amount to is an error, with what to write for it."""
    report = check_settings({**grpo_settings(0.08, 4), "beta": 0.08}, framework="trl-grpo", beta=0.08)
    assert [finding.write for finding in report.problems] == ["beta=0.06"]
    assert check_settings({**grpo_settings(0.08, 4)}, framework="trl-grpo", beta=0.08).problems == ()


@pytest.mark.parametrize("transform", [None, Log(), Exponential(10.0), Exponential(-3.0)])
@pytest.mark.parametrize("scale", ["unit", "raw", "standard"])
def test_the_span_is_that_of_the_rewards(transform, scale):
    """The least and greatest reward are those of scores below and above all references."""
    reward = made(transform, scale=scale)
    given = reward.from_scores(["2+2=", "Hello"], np.array([[-1e9, 1e9], [-1e9, 1e9]]))
    assert find_span(reward) == (given.min(), given.max())


def test_clips_that_cut_and_clips_that_do_not():
    """A clip is an error where a reward can lie beyond it: log of 1/200 is -5.3, and raw e^{10u} reaches 22026."""
    settings = rloo_settings(0.05, max_completion_length=64)
    cut = check_settings({**settings, "reward_clip_range": (-5.0, 5.0)}, made(Log()), "trl-rloo")
    assert found(cut) == {"reward_clip_range"}
    assert check_settings({**settings, "reward_clip_range": (-5.5, 0.0)}, made(Log()), "trl-rloo").problems == ()
    faithful = FAITHFUL["openrlhf"]
    assert check_settings({**faithful, "reward.clip_range": (-10, 10)}, made(Log()), "openrlhf").problems == ()
    raw = made(Exponential(10.0), scale="raw")
    assert found(check_settings({**faithful, "reward.clip_range": (-10, 10)}, raw, "openrlhf")) == {
        "reward.clip_range",
        "scale",
    }
    unbounded = made(calibration=ZScore())
    assert found(check_settings({**settings, "reward_clip_range": (-5.0, 5.0)}, unbounded, "trl-rloo")) == {
        "reward_clip_range"
    }


def test_sampling_is_compared_with_the_calibrations():
    """Other settings than those of the references are errors, and the ways to say "off" are the same."""
    settings = rloo_settings(0.05, max_completion_length=64, top_k=-1, min_p=0.0)
    assert check_settings(settings, made(), "trl-rloo").problems == ()
    colder = check_settings(settings, made(decoding={"temperature": 0.7, "max_tokens": 128}), "trl-rloo")
    assert found(colder) == {"temperature", "max_completion_length"}
    assert {finding.write for finding in colder.problems} == {"temperature=0.7", "max_completion_length=128"}


def test_a_table_that_does_not_say_how_it_was_drawn():
    """That is a note: nothing is wrong, and nothing could be compared."""
    reward = CalibratedReward(NumberScorer(), ReferenceTable.build([("2+2=", [1.0])]))
    report = check_settings(rloo_settings(0.05), reward, "trl-rloo")
    assert report.problems == ()
    assert "does not say how" in str(report)


def test_only_errors_raise():
    """A warning and a note are told and raise nothing; one error raises, alone."""
    told = check_settings(rloo_settings(0.05, num_iterations=2, disable_dropout=False), framework="trl-rloo")
    assert [finding.severity for finding in told.findings] == ["warning", "note"]
    assert len(told.problems) == 1
    told.raise_if_wrong()
    with pytest.raises(ValueError, match=r"trl-rloo would not .*\nerror: sync_ref_model=True: "):
        check_settings(rloo_settings(0.05, sync_ref_model=True), framework="trl-rloo").raise_if_wrong()


def test_names_that_nobody_has():
    """An unknown framework, and settings of which the framework cannot be told, are errors that name the known ones."""
    with pytest.raises(ValueError, match=r"knows the frameworks trl-rloo, .* got framework='trl'"):
        check_settings({}, framework="trl")
    with pytest.raises(ValueError, match="needs framework= for dict, one of trl-rloo"):
        check_settings({})
    with pytest.raises(ValueError, match="beta=0"):
        rloo_settings(0.0)
    with pytest.raises(ValueError, match="num_generations=1"):
        grpo_settings(0.1, 1)


@pytest.mark.parametrize("given", ["--beta 0.1", ["--beta", "0.1"], ("--beta",), {"beta"}, b"", None])
def test_arguments_that_nobody_parsed(given):
    """Words have no settings by name: all would be taken to be at their defaults."""
    with pytest.raises(TypeError, match=f"got {type(given).__name__}: parse it first"):
        check_settings(given, framework="openrlhf")


@pytest.mark.parametrize("kind", [dict, lambda flat: Namespace(**flat), lambda flat: SimpleNamespace(**flat)])
def test_a_name_that_is_nearly_a_settings(kind):
    """It is a warning that names what was meant, and the value is not read; with the right name set, it is another."""
    wrong = {**rloo_settings(0.05), "temperatur": 0.7, "betaa": 0.1, "num_generations_eval": 2, "seed": 0}
    del wrong["temperature"], wrong["beta"]
    told = check_settings(kind(wrong), framework="trl-rloo").problems
    assert [(finding.setting, finding.severity, finding.write) for finding in told] == [
        ("temperatur=0.7", "warning", "temperature=0.7"),
        ("betaa=0.1", "warning", "beta=0.1"),
    ]
    assert "unknown setting 'temperatur' (temperature?)" in told[0].why
    assert check_settings(kind({**wrong, "temperature": 1.0, "beta": 0.05}), framework="trl-rloo").problems == ()


@pytest.mark.parametrize("shape", [dict, nested, lambda flat: namespaces(nested(flat)), lambda f: Container(nested(f))])
def test_a_slip_in_a_path(shape):
    """Each part of a dotted name is compared by itself: a long path does not make two names alike."""
    flat = {"algorithm.kl_ctrl.kl_coeff": 0.05, "actor_rollout_ref.rollout.k": 5, "algoritm.gamma": 0.9}
    told = check_settings(shape(flat), framework="verl").problems
    assert {finding.write for finding in told if "unknown" in finding.why} == {
        "algorithm.kl_ctrl.kl_coef=0.05",
        "algorithm.gamma=0.9",
    }


@pytest.mark.parametrize(("config", "name"), [(RLOOConfig, "trl-rloo"), (GRPOConfig, "trl-grpo")])
def test_no_setting_of_trls_own_is_taken_for_a_slip(config, name):
    """Of TRL's hundreds of settings none that no rule names is nearly one that a rule names."""
    own = {field.name: None for field in dataclasses.fields(config)}
    framework = next(each for each in FRAMEWORKS if each.name == name)
    others = {setting: None for setting in own if setting not in framework.defaults}
    assert len(others) > 50
    assert not any("unknown" in finding.why for finding in check_settings(others, framework=name).findings)


def test_the_rewards_beta_is_wanted():
    """A reward that was made for a beta is compared with it, unless another is asked for."""
    reward, settings = made(Log(), beta=0.1), rloo_settings(0.05, max_completion_length=64)
    (told,) = check_settings(settings, reward, "trl-rloo").problems
    assert (told.severity, told.write) == ("error", "beta=0.1")
    assert check_settings(settings, reward, "trl-rloo", beta=0.05).problems == ()
    assert check_settings(settings, made(Log()), "trl-rloo").problems == ()


@pytest.mark.parametrize(
    ("config", "chosen", "name"), [(RLOOConfig, rloo_settings, "trl-rloo"), (GRPOConfig, grpo_settings, "trl-grpo")]
)
def test_settings_of_a_reward(config, chosen, name, tmp_path):
    """With a reward TRL draws as calibration did, for the reward's beta, and the check has nothing to say."""
    reward = made(Log(), decoding={"max_tokens": 12, "temperature": 0.7}, beta=0.3)
    settings = chosen(reward=reward)
    assert (settings["max_completion_length"], settings["temperature"]) == (12, 0.7)
    report = check_settings(config(output_dir=str(tmp_path), **PLAIN, **settings), reward)
    assert report.problems == ()
    assert report.beta == pytest.approx(0.3)
    assert check_settings(chosen(0.2, reward=reward), framework=name).beta == pytest.approx(0.2)
    assert chosen(reward=reward, temperature=1.0)["temperature"] == 1.0
    untold = CalibratedReward(NumberScorer(), ReferenceTable.build([("2+2=", [1.0])]))
    assert chosen(0.3, reward=untold) == chosen(0.3)
    with pytest.raises(ValueError, match="got a reward without a beta"):
        chosen(reward=untold)
    with pytest.raises(ValueError, match="got neither"):
        chosen()


def test_what_was_drawn_reaches_every_setting():
    """Whatever bends the table's distribution is in the settings, and the check says that it should not."""
    bent = {"top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2}
    reward = made(Log(), decoding=bent)
    settings = rloo_settings(0.05, reward=reward)
    assert {name: settings[name] for name in bent} == bent
    assert found(check_settings(settings, reward, "trl-rloo")) == {*bent}


def test_errors_come_first():
    """Errors, then warnings, then notes; and lengths are compared as lengths."""
    settings = rloo_settings(0.05, num_iterations=2, disable_dropout=False, max_completion_length=512)
    reward = made(Log(), decoding={"max_tokens": 12})
    told = check_settings(settings, reward, "trl-rloo")
    assert [finding.severity for finding in told.findings] == ["error", "warning", "note"]
    with pytest.raises(ValueError, match=r"KL:\nerror: .*the calibration cut at 12 tokens, the trainer at 512\. Write"):
        told.raise_if_wrong()


def test_a_framework_is_told_by_its_class(tmp_path):
    """TRL's configs and classes made from them say what they are; a class of that name elsewhere does not."""

    @dataclasses.dataclass
    class Own(RLOOConfig):
        """A user's own."""

    assert check_settings(Own(output_dir=str(tmp_path), **PLAIN)).framework == "trl-rloo"
    impostor = dataclasses.make_dataclass("RLOOConfig", [("beta", float, 0.1)])
    with pytest.raises(ValueError, match="needs framework="):
        check_settings(impostor())


def test_a_framework_needs_the_default_of_what_it_names():
    """A rule, a case or a strength about a setting without a default is refused when the table is made."""
    with pytest.raises(ValueError, match=r"toy needs a default .* \['a', 'b', 'c'\]"):
        Framework("toy", "1", (Rule("a", Is(1), None, "x", only=(("b", Is(1)),)),), {}, (Strength("c"),))


def test_conditions_see_the_other_settings():
    """SameAs compares two settings, and does so with defaults."""
    toy = Framework("toy", "1", (Rule("a", SameAs("b"), "a=b", "x"),), {"a": None, "b": 4})
    assert [
        len(find_broken_rules(FrameworkSettings(each, toy))) for each in ({}, {"a": 4}, {"a": 5}, {"a": 5, "b": 5})
    ] == [0, 0, 1, 0]


def test_all_frameworks_have_their_own_name():
    """No two have one name."""
    assert len({framework.name for framework in FRAMEWORKS}) == len(FRAMEWORKS)


def test_the_page_of_settings_is_what_the_tables_generate():
    """docs/reference/settings.md has each framework's table as the rules have it: no table without a rule, or back."""
    page = (Path(__file__).parents[2] / "docs/reference/settings.md").read_text(encoding="utf-8")
    (block,) = BLOCK.finditer(page)
    assert block.group().split("-->\n", 1)[1].removesuffix(block[2]).strip() == format_tables().strip()
    assert format_tables().count("| error |") > 60
