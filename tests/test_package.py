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

"""
Necessity: all other tests run in a checkout, where every file is at hand. Who installs a wheel has only what the wheel
carries: a preset or a weight that is missing there fails for everybody but us. So a wheel is built, by way of the source
distribution, installed into an environment that cannot see the checkout, and used from another folder.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from examples.shapes import demo as shapes_demo
from examples.shapes import report
from trl_spo.scripts import cli, presets, spo, step_reward


ROOT = Path(__file__).parents[1]
PARTS = ("trl_spo", "examples", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]), file=sys.stderr)
"""
INSIDE = """
import importlib.util
import json

import trl_spo
from trl_spo.scripts import cli, demo, presets
module = demo.demo_module()
from trl_spo_shapes import base_scores, settings, world

pipeline = base_scores.load_pipeline()
flow = base_scores.load_flow_pipeline()
prompts, seeds = base_scores.evaluation_set("heldout", repeats=1)
scores = base_scores.evaluate(pipeline, prompts[:2], seeds[:2], num_inference_steps=2)
print(json.dumps({
    "files": [trl_spo.__file__, module.__file__, str(presets.presets_folder()), str(settings.CLIP), str(base_scores.PIPELINE)],
    "presets": sorted(presets.named_presets(("spo", "lpo", "step_reward", "latent_reward"))),
    "accelerate": sorted(cli.named_accelerate_configs()),
    "examples": importlib.util.find_spec("examples") is not None,
    "options": sorted(demo.make_parser()._option_string_actions),
    "aesthetics": scores["aesthetics"].tolist(),
    "flow": type(flow).__name__,
}))
"""


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A program that knows neither the checkout nor how pytest was started."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE", "COV_"))}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=kept | environment, capture_output=True, text=True
    )


def checked(command: list, folder: Path) -> str:
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that is built from the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=shutil.ignore_patterns("__pycache__", "notebooks"))
        else:
            shutil.copy(path, source)
    checked([sys.executable, "-c", BUILD, "build_sdist", folder], source)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    checked([sys.executable, "-c", BUILD, "build_wheel", folder], unpacked)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """
    The `bin` folder of an environment that has this wheel, and every other package of the present one. A folder that a
    `.pth` file names is searched, but its own `.pth` files are not read: an editable install in it stays invisible.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    purelib = Path(checked([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home).strip())
    others = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (purelib / "others.pth").write_text("\n".join(others) + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    install += ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check", wheel]
    checked(install, home)
    return binaries


def test_an_installed_wheel_has_presets_demo_and_weights(installed, tmp_path):
    text = checked([installed / "python", "-c", INSIDE], tmp_path)
    found = json.loads(text.strip().splitlines()[-1])
    home = installed.parent.resolve()
    for file in found["files"]:
        assert Path(file).exists() and Path(file).resolve().is_relative_to(home)
    assert found["presets"] == sorted(path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml"))
    assert found["accelerate"] == sorted(cli.named_accelerate_configs())
    assert not found["examples"], "the environment sees the checkout"
    assert {"--model", "--reward", "--output_dir", "--debug"} <= set(found["options"])
    assert all(0 < value < 1 for value in found["aesthetics"])
    assert found["flow"] == "SPOStableDiffusion3Pipeline"


def test_the_installed_command_finds_a_preset_by_name(installed, tmp_path):
    command = [installed / "trl-spo", "spo", "--config", "sd15", "--use_cpu", "true", "--fp16", "false"]
    command += ["--dataset_name", "prompts.txt"]
    done = run(command, tmp_path)
    assert done.returncode == 2
    assert "prompts.txt" in done.stderr and "no config" not in done.stderr, done.stderr
    assert not (tmp_path / "demo_output").exists()


def test_the_wheel_has_each_file_once_and_nothing_else(wheel):
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"trl_spo", "trl_spo_shapes", names[-1].split("/")[0]}
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    for folder, prefix in (("examples/shapes", "trl_spo_shapes"), ("examples/configs", "trl_spo/configs")):
        own = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        own = sorted(f"{prefix}/{path.as_posix()}" for path in own if "__pycache__" not in path.parts)
        assert own == sorted(name for name in names if name.startswith(f"{prefix}/")), folder
    assert wheel.stat().st_size < 12 * 2**20


# --- presets by name -------------------------------------------------------------------------------------------------


def config_of(script, words: list[str]) -> str:
    """The file that the parser of a script reads for `--config`."""
    words = list(words)
    script.make_parser()._check_config(words)
    return Path(words[words.index("--config") + 1]).name


@pytest.mark.parametrize(
    ("script", "name", "file"),
    [
        (spo, "sd15", "spo_sd15.yaml"),
        (spo, "spo_sd15", "spo_sd15.yaml"),
        (spo, "lpo_sdxl", "lpo_sdxl.yaml"),
        (spo, "flux2_klein", "spo_flux2_klein.yaml"),
        (step_reward, "sd15", "step_reward_sd15.yaml"),
        (step_reward, "sd3", "latent_reward_sd3.yaml"),
        (step_reward, "latent_reward_sd15", "latent_reward_sd15.yaml"),
    ],
)
def test_a_preset_is_found_by_its_name_or_its_end(script, name, file):
    assert config_of(script, ["--config", name]) == file


def test_every_preset_belongs_to_one_command():
    every = {path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml")}
    of_spo = presets.named_presets(spo.make_parser().presets)
    of_step_reward = presets.named_presets(step_reward.make_parser().presets)
    assert set(of_spo) | set(of_step_reward) == every and not set(of_spo) & set(of_step_reward)


def test_a_file_goes_before_a_preset(tmp_path, monkeypatch):
    (tmp_path / "sd15").write_text("output_dir: mine\n")
    monkeypatch.chdir(tmp_path)
    assert config_of(spo, ["--config", "sd15"]) == "sd15"


@pytest.mark.parametrize(
    ("script", "name", "expected", "unexpected"),
    [
        (spo, "sd16", ["'sd16'", "sdxl, ", "lpo_sd15", "did you mean sd15?"], "step_reward"),
        (step_reward, "step_reward_sd51", ["did you mean step_reward_sd15?", "latent_reward_sd3"], "lpo"),
    ],
)
def test_a_wrong_name_lists_the_presets(script, name, expected, unexpected, capsys):
    with pytest.raises(SystemExit) as stop:
        script.make_parser().parse_args_and_config(["--config", name])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected) and unexpected not in message


def test_a_missing_file_is_not_taken_for_a_preset(capsys):
    for name in ("spo_sd15.yaml", "configs/sd15"):
        with pytest.raises(SystemExit):
            spo.make_parser().parse_args_and_config(["--config", name])
        assert f"there is no config '{name}'. " in capsys.readouterr().err


# --- the demo --------------------------------------------------------------------------------------------------------


def test_the_command_line_has_the_options_of_the_demo(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    shown = capsys.readouterr().out
    for option in shapes_demo.make_parser()._option_string_actions:
        assert option in shown


def test_the_demo_refuses_too_few_steps_for_a_checkpoint(capsys):
    with pytest.raises(SystemExit, match="at least 7"):
        cli.main(["demo", "--spo_steps", "3"])
    assert "--spo_steps must be at least 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "folder"),
    [([], "demo_output"), (["--model", "flow", "--reward", "latent"], "demo_output_flow_latent")],
)
def test_the_demo_writes_to_the_working_directory(options, folder):
    args = shapes_demo.complete(shapes_demo.make_parser().parse_args(options))
    assert args.output_dir == Path(folder)


def statistics(low: float, high: float) -> dict[str, float]:
    return {"difference": (low + high) / 2, "difference_low": low, "difference_high": high}


def test_the_sentence_about_the_table_follows_the_intervals():
    text = report.interpret(
        {"aesthetics": statistics(0.01, 0.03), "alignment": statistics(-0.03, 0.01), "reward": statistics(-0.4, -0.2)}
    )
    assert "aesthetics (+0.020) rose; reward (-0.300) fell; alignment (-0.010) did not change clearly (0 lies" in text
    text = report.interpret({name: statistics(0.1, 0.2) for name in report.METRICS})
    assert "aesthetics (+0.150), alignment (+0.150) and reward (+0.150) rose. " in text


def test_six_pairs_reach_from_best_to_worst():
    changes = torch.tensor([0.0, 5.0, -2.0, 1.0, 3.0, -1.0, 4.0, 2.0, 6.0, -3.0, 7.0])  # -3 .. 7
    shown = report.spread(changes, 6)
    assert changes[shown].tolist() == [7.0, 5.0, 3.0, 1.0, -1.0, -3.0]


def test_the_reward_accuracy_has_its_intervals():
    """Wilson's interval at one half of 256 pairs reaches .0608 to each side."""
    figure = report.draw_accuracy("pixel", {1: 0.5, 501: 0.5}, {1: 0.75, 501: 0.6})
    (bars, _) = figure.axes[0].containers
    segments = bars[2][0].get_segments()
    assert segments[0][1][1] - 0.5 == pytest.approx(0.0608, abs=1e-4)
    assert 0.5 - segments[0][0][1] == pytest.approx(0.0608, abs=1e-4)


def test_the_next_commands_exist(tmp_path):
    for model in ("unet", "flow"):
        lines = report.next_commands(model, tmp_path).replace("\\\n", " ").splitlines()[1:]
        for line in lines:
            words = line.split()
            assert words[1] in cli.COMMANDS
            if words[1] == "sample":
                options = cli.importlib.import_module("trl_spo.scripts.sample").make_parser()._option_string_actions
                assert {word for word in words if word.startswith("--")} <= set(options)
