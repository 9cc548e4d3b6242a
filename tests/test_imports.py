"""Which way imports run, and that `import calibrated_rewards` stays light."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import calibrated_rewards

PACKAGE = Path(calibrated_rewards.__file__).parent
ROOT = Path(__file__).parents[1]

# What each module imports, always from lines above its own; CONTRIBUTING.md shows the same list.
LAYERS = """
transforms        ->
procedures        ->
quadrature        ->
error_messages    ->
prompts           ->
bands             ->
estimates         ->
score_procedures  -> procedures
scaling           -> quadrature, transforms
theory            -> procedures, quadrature, score_procedures, transforms
optimal           -> procedures, quadrature, theory, transforms
choice            -> optimal, procedures, scaling, theory, transforms
finite_k          -> quadrature, transforms
finite_k_error    -> bands, finite_k, quadrature, transforms
fixed_references  -> finite_k, procedures, transforms
evaluation        -> estimates, procedures
table_format      ->
table_writer      -> table_format
table_mapped      -> table_format
table_search      ->
table_summary     -> table_search
table_torch       -> table_search
table_hub         -> table_format
table_build       -> prompts, table_mapped, table_search, table_writer
table             -> prompts, table_*
calibrations      -> table
table_laws        -> calibrations, finite_k, fixed_references, procedures, table, transforms
table_expectations -> calibrations, finite_k, procedures, scaling, table, table_laws, theory, transforms
reading           ->
reading.body      ->
reading.unread    -> error_messages
reading.draws     ->
reading.adapters  ->
reading.fingerprint -> reading.adapters, reading.body
reading.batches   ->
reading.messages  -> prompts
reading.text      -> prompts, reading.messages, error_messages
reading.labels    -> error_messages
reading.state     ->
reading.rounding  ->
reading.padding   -> reading.batches, reading.rounding
reading.decoder   -> prompts, reading.batches, reading.body, reading.padding, reading.rounding, reading.state, reading.unread
reading.own_forward -> error_messages, reading.batches, reading.body, reading.draws, reading.padding, reading.state, reading.unread
reading.next_token -> reading.batches, reading.body, reading.decoder, reading.state
reading.trial     -> reading.body, reading.own_forward
reading.label_names ->
reading.labels_of -> reading.labels, reading.label_names, error_messages
reading.head_precision -> reading.body, reading.own_forward
reading.completion_tokens -> prompts, reading.decoder, reading.text
reading.question  -> prompts, reading.text
scorers.serial    ->
scorers.plain     -> prompts
scorers.callable_fingerprint -> reading.fingerprint
scorers.protocol  -> prompts, scorers.serial, scorers.callable_fingerprint
scorers.function  -> prompts, scorers.protocol, scorers.serial
scorers.cost      -> prompts, scorers.protocol, scorers.serial
scorers.recipe    -> prompts, scorers.protocol, scorers.serial, scorers.cost
scorers.ensemble  -> prompts, scorers.protocol, scorers.serial
scorers.differences ->
scorers.checkpoint ->
scorers.inspection -> scorers.checkpoint, error_messages
scorers.pretrained -> reading.body, scorers.checkpoint, error_messages
scorers.pairwise  -> prompts, table, scorers.plain, scorers.protocol, scorers.serial
scorers.remote_address -> prompts
scorers.secret_names ->
scorers.remote_token -> scorers.remote_address
scorers.request_logs -> scorers.remote_address
scorers.remote_retry ->
scorers.remote_text -> prompts, reading.fingerprint, reading.text
scorers.remote_vllm -> prompts, reading.*, scorers.plain, scorers.remote_text, scorers.serial, scorers.secret_names, error_messages
scorers.remote_dialects -> prompts, reading.text, scorers.plain, scorers.remote_text
checks            ->
checks.probes     -> prompts
checks.process_state ->
checks.subject    -> prompts, scorers.protocol, checks.probes, checks.process_state
checks.same_score -> scorers.protocol, checks.probes, checks.subject
checks.positions  -> prompts, checks.probes, checks.subject
checks.characters -> prompts, checks.positions, checks.probes, checks.subject
checks.conversations -> checks.positions, checks.probes, checks.subject
checks.odd_inputs -> prompts, checks.probes, checks.subject
checks.side_effects -> prompts, scorers.protocol, checks.process_state, checks.subject
checks.whole_input -> checks.characters, checks.probes, checks.subject
checks.edge_inputs -> prompts, scorers.protocol, checks.positions, checks.probes, checks.subject
checks.conformance -> prompts, scorers.protocol, checks.*
commands          ->
commands.error_text -> error_messages
commands.numbers  ->
cli               -> commands.error_text
rewarding.importing ->
__main__          -> cli, rewarding.importing
adaptive          -> bands, transforms
amortised.curve   ->
amortised.features -> prompts, scorers.protocol
amortised.ridge   ->
amortised.sample  -> table
amortised.judgement  -> amortised.sample
amortised.network -> amortised.curve, amortised.sample
amortised.conditional -> amortised.*
amortised.prediction -> prompts, table, amortised.*, scorers.differences, scorers.protocol
amortised.fit     -> prompts, table, amortised.*, scorers.protocol
amortised         -> amortised.*
commands.transform -> choice, procedures, scaling, transforms
distil            -> prompts, table, reading.messages
health            ->
health.row_statistics -> table
health.sections   -> bands, table, health.row_statistics
health.suspicious_rows -> table, health.row_statistics
health.table      -> table, health.row_statistics, health.sections, health.suspicious_rows
reading.access    -> prompts, reading.*
reading.first_token -> reading.access, reading.body, reading.own_forward
scorers.sequence_classifier -> prompts, reading.*, scorers.protocol, scorers.recipe
scorers.cross_encoder -> prompts, reading.*, scorers.protocol, scorers.recipe
scorers.multi_attribute -> prompts, reading.*, scorers.protocol, scorers.recipe, error_messages
scorers.token_logit -> prompts, reading.*, scorers.protocol, scorers.recipe
scorers.value_head -> prompts, reading.*, scorers.checkpoint, scorers.protocol, scorers.recipe
scorers.shared_base -> prompts, reading.*, scorers.protocol, scorers.recipe, scorers.value_head
scorers.process   -> prompts, reading.*, scorers.protocol, scorers.recipe, error_messages
scorers.implicit  -> prompts, reading.*, scorers.protocol, scorers.recipe
scorers.judge     -> prompts, reading.*, scorers.protocol, scorers.recipe
scorers.rated_judge -> prompts, reading.*, scorers.protocol, scorers.judge, scorers.recipe
scorers.pair_models -> prompts, reading.*, scorers.protocol, scorers.recipe, scorers.serial
scorers.kinds     -> reading.*, scorers.*, error_messages
scorers.loading   -> reading.*, scorers.*, error_messages
scorers           -> scorers.protocol, scorers.loading
amortised.prompt_features -> prompts, reading.*, scorers.cost, scorers.cross_encoder, scorers.protocol, scorers.recipe
rollouts          ->
rollouts.claims   ->
rollouts.cluster  ->
rollouts.progress ->
rollouts.rows     -> prompts, error_messages
rollouts.sources  -> prompts, rollouts.rows, error_messages
samplers          ->
samplers.cache    ->
samplers.decoding ->
samplers.drawing  -> samplers.decoding
samplers.logprob  -> samplers.decoding
samplers.protocol -> prompts, scorers.protocol
rollouts.imported -> prompts, rollouts.rows, rollouts.sources, samplers.protocol
rollouts.shard    -> prompts, reading.messages, samplers.protocol
rollouts.shard_files -> prompts, reading.messages, rollouts.shard, samplers.protocol
health.rollouts   -> prompts, health.sections, rollouts.shard_files
commands.inspect  -> table, health.rollouts, health.table, commands.numbers
rollouts.directory -> rollouts.claims, rollouts.shard, rollouts.shard_files, scorers.differences
rollouts.planning -> prompts, rollouts.*, samplers.protocol, error_messages
rollouts.adoption -> prompts, rollouts.*
rollouts.tabulation -> prompts, table, rollouts.directory, rollouts.shard, rollouts.shard_files
rollouts.work     -> rollouts.shard, samplers.protocol, scorers.protocol, error_messages
on_the_spot       -> prompts, table, rollouts.shard, rollouts.work, samplers.protocol, scorers.protocol, scorers.differences
rollouts.rescoring -> prompts, rollouts.directory, rollouts.shard, scorers.differences, scorers.protocol
rollouts.identity -> rollouts.*, scorers.differences, scorers.protocol
rollouts.forecast -> prompts, rollouts.*
rollouts.run      -> adaptive, table, rollouts.*, error_messages
calibrate         -> adaptive, table, rollouts.*, samplers.protocol, scorers.protocol, error_messages
samplers.endings  -> samplers.decoding, samplers.protocol
samplers.openai_answer -> prompts, samplers.decoding, samplers.protocol
samplers.policy   -> prompts, reading.body, reading.fingerprint, reading.text, samplers.decoding, samplers.endings
samplers.continuous -> prompts, reading.body, reading.text, samplers.*
samplers.ray      ->
samplers.rows     -> reading.body, reading.unread, samplers.cache
samplers.agreement -> reading.body, reading.unread, samplers.drawing, samplers.rows
samplers.vllm_engine -> scorers.recipe
samplers.vllm     -> prompts, reading.*, samplers.*, scorers.*
samplers.writing  -> samplers.drawing, samplers.endings, samplers.rows
samplers.hf       -> prompts, reading.batches, reading.body, reading.text, samplers.*, reading.unread
samplers.loading  -> prompts, reading.text, samplers.*, scorers.*, error_messages
scorers.remote_crew ->
scorers.remote_post -> prompts, scorers.remote_address, scorers.remote_retry, scorers.remote_token, scorers.request_logs
scorers.remote    -> prompts, reading.batches, scorers.*
commands.server   -> reading.text, scorers.protocol, scorers.remote*, scorers.cost
commands.reward_model -> reading.*, scorers.loading, scorers.protocol, commands.server, commands.numbers, scorers.cost
commands.check_scorer -> prompts, scorers.plain, checks.*, commands.*
samplers.openai   -> prompts, reading.batches, reading.text, samplers.*, scorers.*
commands.policy   -> commands.reward_model, commands.server, reading.text, samplers.*, scorers.remote_address, commands.error_text, commands.numbers
commands.calibrate -> adaptive, calibrate, scaling, table, transforms, commands.*, rollouts.*, samplers.ray, prompts
checks.adapters   -> prompts, checks.conformance, scorers.protocol
testing           -> procedures, prompts, quadrature, transforms, checks.adapters, checks.conformance, samplers.protocol
commands.path     ->
commands.cp       -> commands.path
faithful.rules    ->
faithful.areal_settings -> faithful.rules
faithful.lightrft_settings -> faithful.rules
faithful.nemo_settings -> faithful.rules
faithful.openrlhf_settings -> faithful.rules
faithful.sampled  -> faithful.rules
faithful.skyrl_settings -> faithful.rules
faithful.slime_settings -> faithful.rules
faithful.swift_settings -> faithful.rules
faithful.verl_settings -> faithful.rules
recipes           -> commands.error_text
rewarding         ->
rewarding.coalescing ->
rewarding.locating -> prompts, table
rewarding.lookup  -> calibrations, finite_k, table, transforms
rewarding.device  -> rewarding.lookup
rewarding.naming  -> optimal, transforms, scorers.protocol, scorers.recipe
rewarding.originals -> prompts, table, reading.messages, rollouts.directory, rollouts.shard_files
rewarding.scores  ->
rewarding.handed_over -> prompts, rewarding.scores
rewarding.spelling -> transforms, rewarding.importing, scorers.remote_address, scorers.remote_token, scorers.secret_names
rewarding.directory -> table, rewarding.originals, rewarding.spelling
rewarding.valuing -> calibrations, finite_k, prompts, scaling, table, transforms, rewarding.locating, rewarding.lookup
rewarding.raw_scores -> prompts, rewarding.device, rewarding.valuing
rewarding.completion_form -> prompts, reading.messages, scorers.protocol
rewarding.verification -> prompts, table, rewarding.completion_form, scorers.differences, scorers.protocol
rewarding.watch   -> prompts, table, rewarding.scores
recipes.loop      -> prompts, reading.body, rollouts.sources, samplers.endings, samplers.policy, error_messages
serving           ->
serving.limits    ->
serving.body      -> serving.limits
serving.fields    -> prompts, serving.limits
serving.dialects  -> prompts, rewarding.handed_over, rewarding.scores, serving.fields, serving.limits
serving.metrics   -> rewarding.scores
serving.desk      -> table, rewarding.coalescing, rewarding.scores, serving.dialects, serving.limits, serving.metrics
serving.gate      -> serving.metrics, serving.limits
serving.connections -> serving.limits
serving.listening -> serving.gate, serving.limits, error_messages, serving.connections
serving.schema    ->
server            -> serving.*
serving.replicas  -> server, serving.gate, serving.limits, serving.listening
faithful.spelled  -> faithful.rules
faithful.trl_rules -> faithful.rules
rewarding.checked -> table
rewarding.endings -> prompts
rewarding.strangers -> prompts, table, reading.messages
reward            -> calibrations, finite_k, prompts, scaling, table, transforms, rewarding.*, scorers.protocol, scorers.serial
faithful.trl_settings -> reward, faithful.sampled, faithful.trl_rules
combined          -> calibrations, prompts, reward, transforms, rewarding.device, scorers.protocol, scorers.ensemble
commands.reward   -> reward, table, transforms, commands.reward_model, commands.transform, commands.numbers, scaling, table_expectations
configured        -> reward, rewarding.spelling
faithful.rewarded -> calibrations, finite_k, reward, scaling, faithful.rules
faithful.check    -> reward, faithful.*
faithful          -> faithful.check, faithful.trl_settings
commands.saved_reward -> reward, rewarding.spelling
commands.serve    -> server, serving.listening, commands.numbers, commands.saved_reward
arms              -> calibrations, choice, procedures, scaling, table, transforms
bootstrap         -> estimates
demo              ->
demo.assets       ->
demo.miniature    ->
demo.reward_models -> demo.assets, reading.body, reading.text, rollouts.shard_files
demo.scale        ->
demo.parts        -> demo.*
outcomes          -> estimates, rollouts.shard_files
divergence        -> outcomes, prompts, reading.batches, reading.body, reading.fingerprint, samplers.*, scorers.protocol
prospects         -> estimates, rollouts.shard_files
recipes.model     -> error_messages
recipes.raw       -> prompts, reward, table, rewarding.locating, rewarding.watch
recipes.opening   -> prompts, reward, commands.transform, reading.*, recipes.*, rollouts.sources, samplers.*, error_messages, commands.saved_reward, table_expectations
recipes.run_folder -> prompts, reward, recipes.*, rollouts.*, samplers.decoding
recipes.timing    -> reward, recipes.raw, scorers.protocol, scorers.serial
recipes.together  ->
recipes.command   -> reward, table, recipes.opening, recipes.run_folder, recipes.together, commands.error_text, commands.numbers, table_expectations, commands.transform
recipes.grpo_plain -> reward, recipes.*, rollouts.sources, samplers.policy, error_messages
recipes.ppo       -> reward, recipes.*, rollouts.sources, samplers.policy, error_messages
recipes.trl_run   -> reward, faithful.check, recipes.*, rollouts.sources, samplers.decoding, error_messages
recipes.train_grpo -> faithful.trl_settings, recipes.command, recipes.trl_run
recipes.train_rloo -> faithful.trl_settings, recipes.command, recipes.trl_run
reporting         ->
responses         -> outcomes, prompts, rollouts.directory, rollouts.shard_files, samplers.protocol, scorers.protocol
wording           -> estimates, optimal, transforms
evaluate          -> calibrate, divergence, estimates, evaluation, outcomes, procedures, prompts, responses, rollouts.sources, samplers.protocol, scorers.protocol, error_messages, wording
commands.evaluate -> evaluate, procedures, reward, commands.*, samplers.*, scorers.protocol
rollouts.judged   -> estimates, rollouts.shard_files
weighted_pools    -> estimates, procedures
reweighted        -> arms, bootstrap, calibrations, estimates, procedures, prospects, table, weighted_pools, wording
demo.pipeline     -> calibrate, choice, estimates, evaluate, outcomes, procedures, prospects, reward, reweighted, table, demo.*, recipes.*, rollouts.sources, samplers.*, scorers.loading
reporting.fresh   -> estimates, evaluate, table, wording, rollouts.shard_files
plots             -> estimates, finite_k, outcomes, procedures, prospects, scaling, table, theory, transforms, wording
commands.frontier -> arms, estimates, plots, procedures, prospects, reweighted, scaling, table, commands.transform, rollouts.judged, commands.numbers
reporting.markup  -> plots
reporting.page    -> reporting.markup
reporting.kept    ->
reporting.experiment -> outcomes, procedures, prospects, table, transforms, reporting.kept, rewarding.spelling
reporting.expected -> calibrations, procedures, scaling, table_expectations, table_laws, theory, reporting.experiment, rewarding.spelling
reporting.calibrated -> plots, transforms, wording, health.*, reporting.*
reporting.examples -> evaluate, procedures, wording, reporting.experiment, reporting.markup, rollouts.shard_files
reporting.made    -> reporting.experiment, reporting.markup
reporting.outcome -> estimates, outcomes, plots, theory, transforms, wording, reporting.expected, reporting.experiment, reporting.markup
reporting.promised -> plots, prospects, wording, reporting.experiment, reporting.markup
reporting.trained -> plots, wording, health.sections, reporting.experiment, reporting.markup
report            -> reporting.*, rollouts.shard_files
commands.report   -> report
demo.show         -> outcomes, procedures, prospects, report, table, demo.*, recipes.command, rollouts.*
commands.demo     -> demo.parts, demo.scale, demo.show, commands.numbers
"""  # noqa: E501 (what evaluates, and what shows everything, uses much)

# What a module may load when it is imported, next to the standard library. The rest waits inside a function.
LIGHT = {"numpy", "scipy.special", "jaxtyping"}
HEAVY_ON_PURPOSE = {
    "table_torch": {"torch"},
    "scorers.remote_post": {"httpx"},
    "scorers.request_logs": {"httpx"},
    "scorers.checkpoint": {"torch", "safetensors"},
    "amortised.prompt_features": {"torch"},
    "rollouts.shard_files": {"pyarrow"},
    "rollouts.directory": {"pyarrow"},
    "samplers.ray": {"ray"},
    "demo.miniature": {"torch", "transformers", "tokenizers"},
    "demo.reward_models": {"torch", "transformers", "tqdm"},
    "divergence": {"torch"},
    "plots": {"matplotlib"},
    "reporting.markup": {"matplotlib"},
    "recipes.model": {"torch"},
    "recipes.together": {"torch"},
    "recipes.train_grpo": {"trl"},
    "recipes.train_rloo": {"trl"},
    "recipes.trl_run": {"torch", "transformers", "datasets", "tqdm"},
    "responses": {"pyarrow", "tqdm"},
    # Their bar.
    "reweighted": {"tqdm"},
    "rollouts.adoption": {"tqdm"},
    "rollouts.planning": {"tqdm"},
    "rollouts.progress": {"tqdm"},
    "health.rollouts": {"tqdm"},
    # What serves.
    "server": {"fastapi", "starlette"},
    "serving.listening": {"uvicorn"},
    "serving.connections": {"uvicorn"},
    "serving.metrics": {"prometheus_client"},
    # What trains.
    "rewarding.device": {"torch"},
    "recipes.loop": {"torch"},
    "recipes.opening": {"torch"},
    "recipes.grpo_plain": {"torch", "tqdm"},
    "recipes.ppo": {"torch", "tqdm"},
}
# Files that run models load what runs them; whoever wants none of it does not import them.
MODELS = {"torch", "transformers", "tqdm"}
WITHOUT_MODELS = re.compile(
    r"scorers(\.(protocol|plain|recipe|function|cost|ensemble|pairwise|remote.*))?|reading\.(text|labels.*)"
    r"|samplers(\.(protocol|decoding|logprob|openai_answer|endings|policy|ray|vllm_engine))?"
)
# scipy.special costs 0.17 s of the 0.3 s, and scipy.optimize would cost 0.13 s more.
NEVER_LOADED = {"torch", "matplotlib", "transformers", "huggingface_hub", "tqdm", "scipy.optimize", "scipy.stats"}
SECONDS = 0.4


OURS = re.compile(r"calibrated_rewards\.").match
# Not the adapters, which an installed package has in a folder of its own: test_adapter_files.py has them.
HERE = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "adapters"]
FILES = [path.with_suffix("") for path in HERE]
MODULES = sorted({".".join(path.parts).removesuffix("__init__").rstrip(".") for path in FILES} - {""})


def listed(layers: str = LAYERS) -> dict[str, list[set[str]]]:
    """What each module of the list imports: a module, or one or more of those that match a pattern further up."""
    above: dict[str, list[set[str]]] = {}
    for line in layers.strip().splitlines():
        name, patterns = line.split("->")
        matches = {pattern: set(fnmatch.filter(above, pattern)) for pattern in patterns.replace(",", " ").split()}
        assert all(matches.values()), f"{line!r} names something that does not stand further up"
        above[name.strip()] = list(matches.values())
    return above


def imports(tree: ast.AST, *, within_functions: bool = True) -> Iterator[str]:
    """Every module that the code names in an import; without those that wait in a function or for a type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ["calibrated_rewards"] * bool(node.level) + [node.module] * bool(node.module)
            yield from (".".join([*parts, alias.name]) for alias in node.names)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        waits = isinstance(node, ast.FunctionDef) or typing_only
        if within_functions or not waits:
            yield from imports(node, within_functions=within_functions)


def siblings(source: str, **options: bool) -> set[str]:
    """The modules of the package that a module's source imports; of a folder, its `__init__` or the file in it."""
    names = [name.removeprefix("calibrated_rewards.") for name in imports(ast.parse(source), **options) if OURS(name)]
    within = [[module for module in MODULES if f"{name}.".startswith(f"{module}.")] for name in names]
    return {max(modules, key=len) for modules in within if modules}


def strangers(source: str) -> set[str]:
    """What a module loads from elsewhere when it is imported."""
    names = set(imports(ast.parse(source), within_functions=False))
    outside = {name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, "calibrated_rewards"}}
    return {name for name in outside if not any(f"{name}.".startswith(f"{light}.") for light in LIGHT)}


def source_of(module: str) -> str:
    path = PACKAGE.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def test_every_module_has_its_layer() -> None:
    """The list and the folder name the same modules."""
    assert sorted(listed()) == MODULES


def test_a_list_with_a_cycle_is_refused() -> None:
    """Each name on the right stands further up; a cycle cannot be written, nor a name that allows nothing."""
    assert listed("a ->\nb -> a\nc -> *") == {"a": [], "b": [{"a"}], "c": [{"a", "b"}]}
    with pytest.raises(AssertionError, match="further up"):
        listed("a -> b\nb -> a")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    """A module imports what the list says: no more, and no less, or the list would be out of date."""
    imported, allowed = siblings(source_of(module)) - {module}, listed()[module]

    assert imported <= set().union(*allowed)
    assert [pattern for pattern in allowed if not pattern & imported] == []


@pytest.mark.parametrize("module", MODULES)
def test_heavy_imports_wait(module: str) -> None:
    """No module loads more than numpy, scipy.special and jaxtyping before a function needs it."""
    found = strangers(source_of(module))
    runs_models = module.startswith(("reading.", "samplers.", "scorers.")) and not WITHOUT_MODELS.fullmatch(module)
    allowed = HEAVY_ON_PURPOSE.get(module, set()) | (MODELS if runs_models else set())

    assert {name for name in found if name.split(".")[0] not in allowed} == set()


def test_the_reader_of_imports_reads_all_of_them() -> None:
    """Each way to write an import is seen, also inside a function; only those at the top count as loaded."""
    source = "\n".join(
        [
            "import scipy.special, scipy.stats",
            "from scipy import optimize",
            "from calibrated_rewards import table",
            "from calibrated_rewards.theory.tilted_policy import kl",
            "from . import choice",
            "from .optimal import Optimal",
            "try:",
            "    import tqdm",
            "except ImportError: pass",
            "class A:",
            "    def f(self):",
            "        import torch, calibrated_rewards.theory.bands",
            "from calibrated_rewards import scorers",
            "from calibrated_rewards.models.text import Text",
        ]
    )

    assert siblings(source) == {"table", "theory", "choice", "optimal", "bands", "scorers", "reading.text"}
    assert strangers(source) == {"scipy.stats", "scipy.optimize", "tqdm"}


def test_contributing_shows_the_same_layers() -> None:
    """The list that people read is the one that is tested."""
    assert LAYERS.strip() in (ROOT / "CONTRIBUTING.md").read_text()


def fresh_python(code: str, folder: Path, **environment: str) -> str:
    """The output of a new interpreter that stands outside of the repository."""
    command, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True, text=True).stdout


LOADED = f"import sys; print(*sorted({NEVER_LOADED!r} & set(sys.modules)))"


def test_the_import_is_light(tmp_path: Path) -> None:
    """Importing the package loads no torch, no matplotlib, no network library and no solver."""
    assert fresh_python(f"import calibrated_rewards; {LOADED}", tmp_path).split() == []


@pytest.mark.parametrize("heavy", ["torch", "scipy.optimize"])
def test_a_heavy_import_would_be_noticed(heavy: str, tmp_path: Path) -> None:
    """The check above can fail: what is imported first is found."""
    assert heavy in fresh_python(f"import {heavy}, calibrated_rewards; {LOADED}", tmp_path).split()


def test_the_import_is_quick(tmp_path: Path) -> None:
    """Within 0.4 s of processor time: the best of five, with bytecode in place, for a busy machine must not decide."""
    code = "import time; start = time.thread_time(); import calibrated_rewards; print(time.thread_time() - start)"
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    assert min(float(fresh_python(code, tmp_path, **bytecode)) for _ in range(6)) < SECONDS
