# Copyright 2026 The trl_spo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Necessity: the layout is a promise (imports point one way, nothing heavy at import, no torchvision), and it erodes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_spo


PACKAGE = Path(trl_spo.__file__).parent
ORDER = (  # a module may import from the modules before it
    "notices suggestions training.trainer_options training.arguments step_distribution scheduling_ddim scheduling_flow images captions rollout_settings spo_config step_reward_config pair_selection losses "
    "training.numerics training.running_means training.gather prompt_suites prompts row_stream prompt_source streamed_pairs pair_files label_folder label_session hub_files model_cards "
    "pipelines.components pipelines.conditioning pipelines.reward_adapter pipelines.shards pipelines.adapters pipelines.autoencoder pipelines.denoiser pipelines.base pipelines.ddpo "
    "pipelines.stable_diffusion pipelines.stable_diffusion_xl pipelines.flow pipelines.stable_diffusion_3 "
    "pipelines.flux pipelines.flux2 pipelines.z_image pipelines.qwen_image pipelines.auto pipelines.encoding_cache "
    "rewards.inputs rewards.publishing rewards.step_aware_config rewards.step_conditioning rewards.step_aware_clip rewards.latent_features rewards.latent_config rewards.latent_heads rewards.latent_text rewards.latent_building rewards.lpo rewards.dina rewards.latent rewards.base rewards.user_code rewards.weighted rewards.scoring step_pairs branch_plan rollout noised_pairs sampler_file sampling "
    "preference_dataset preference_collator preference_labels preference_filters "
    "training.run_record training.stopping training.log_lines training.sharded_optimizer training.checkpointing training.ema training.base training.model_card training.memory training.chunk_sizes training.rollouts training.pair_metrics training.sharding training.waiting_pairs training.spo_checks training.compilation training.callbacks training.decline training.memory_plan training.pair_exchange training.rollout_workers pair_queue pair_loader "
    "step_reward_trainer spo_trainer ddpo_interop export kohya "
    "evaluation.statistics evaluation.metric_images evaluation.metric_weights evaluation.metrics evaluation.named evaluation.protocols evaluation.provenance evaluation.sheets evaluation.agreement evaluation.preference_preview evaluation.curves evaluation.result evaluation.evaluate "
    "checkup.published checkup.networks checkup.forecast checkup.report checkup.environment checkup.hub checkup.data checkup.output checkup.names checkup.rates checkup.work checkup.remedies checkup.circumstances checkup.memory_report checkup.spo checkup.step_reward checkup.sampling checkup.run"
).split()
# In `trl_spo/scripts`, above everything.
SCRIPTS = (
    "errors help presets parser arguments training spo step_reward sampler evaluate sample_plan sample_folder sample "
    "data label_pairs label_app label demo doctor cli"
).split()
CONTRACT = (
    "SPOConfig SPOTrainer StepRewardConfig StepRewardTrainer StepAwareRewardModel StepAwareRewardModelConfig "
    "SPOStableDiffusionPipeline SPOStableDiffusionXLPipeline wrap_pipeline stepwise_rollout StepPairs ddim_step_stats "
    "SPOStableDiffusion3Pipeline SPOFluxPipeline SPOFlux2KleinPipeline SPOZImagePipeline SPOQwenImagePipeline "
    "flow_step_stats LatentRewardModel LatentRewardModelConfig wrap_reward gaussian_log_prob select_pairs PairSelection spo_loss step_preference_loss"
).split()


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement in a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


def modules() -> list[str]:
    """Dotted names below the package, such as `rollout` and `pipelines.base`."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    return sorted(".".join(path.parts) for path in paths if path.parts[0] != "scripts")


def package_imports(module: str) -> list[str]:
    """What a module imports from the package, as dotted names, whatever the number of leading dots."""
    parents, found = module.split(".")[:-1], []
    for level, name in imports_of(PACKAGE / f"{module.replace('.', '/')}.py"):
        if level:
            found.append(".".join([*parents[: len(parents) + 1 - level], name]))
        elif name.startswith("trl_spo."):
            found.append(name.removeprefix("trl_spo."))
    return found


def test_every_module_has_its_place():
    assert set(modules()) <= set(ORDER)


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    upward = [name for name in package_imports(module) if ORDER.index(name) >= ORDER.index(module)]
    assert not upward, f"{module} imports {upward}, which come after it"


def test_scripts_are_above_the_package_and_in_order():
    found = {path.stem for path in (PACKAGE / "scripts").glob("*.py")} - {"__init__"}
    assert found == set(SCRIPTS)
    for module in SCRIPTS:
        imports = imports_of(PACKAGE / "scripts" / f"{module}.py")
        assert {name for level, name in imports if level == 2} <= set(ORDER)
        siblings = [name for level, name in imports if level == 1 and name]
        assert all(SCRIPTS.index(name) < SCRIPTS.index(module) for name in siblings), (module, siblings)
    for module in modules():
        assert not [name for name in package_imports(module) if "scripts" in name.split(".")]


def project_files() -> list[Path]:
    folders = ("trl_spo", "tests", "examples", "benchmarks", "reliability")
    return sorted(path for folder in folders for path in (PACKAGE.parent / folder).glob("**/*.py"))


@pytest.mark.parametrize("path", project_files(), ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_torchvision_and_no_example_inside_the_package(path):
    names = {name.split(".")[0] for level, name in imports_of(path) if level == 0}
    assert not names & {"torchvision", "torchaudio"}
    if path.is_relative_to(PACKAGE):
        assert not names & {"examples", "tests", "benchmarks"}


def test_contract_names_are_importable_and_functions_stay_functions():
    """Regression: a module named like a function replaces it in the package once it is imported."""
    for name in CONTRACT:
        assert callable(getattr(trl_spo, name)), name
    assert set(CONTRACT) <= set(trl_spo.__all__)


def test_importing_the_package_computes_nothing():
    """No library of weight comes with it, so `import trl_spo` takes milliseconds (benchmarks/scaling.py)."""
    code = "import sys, trl_spo; print([m for m in sys.modules if m in ('torch', 'diffusers', 'transformers', 'trl', 'peft')])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_training_needs_no_plots_and_no_evaluation():
    """Who trains loads no plotting library and none of the code that compares finished models."""
    code = "import sys, trl_spo.spo_trainer, trl_spo.step_reward_trainer; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = output.stdout.split()
    assert "trl_spo.spo_trainer" in loaded
    assert not [name for name in loaded if name.split(".")[0] == "matplotlib" or name.startswith("trl_spo.evaluation")]


def test_every_file_has_its_licence():
    header = (PACKAGE / "__init__.py").read_text(encoding="utf-8").split('"""')[0]
    python = [path for path in project_files() if path.stat().st_size]
    assert python and not [path for path in python if header not in path.read_text(encoding="utf-8")[:900]]


def test_unknown_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        trl_spo.no_such_name  # noqa: B018
