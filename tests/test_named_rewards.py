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
Necessity: a reward of one's own is the first thing a user wants to try, and the command line is where it is tried. A name that
is mistaken for another, a wrong name that is found after the models have loaded, or a published metric that scores other
pixels as a reward than as a metric costs hours or a result.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import BlipTextConfig, BlipVisionConfig

from trl_spo import StepAwareRewardModel, WeightedReward, load_metrics, load_reward
from trl_spo.evaluation.evaluate import PROTOCOLS, evaluate_pipeline
from trl_spo.evaluation.metrics import METRICS, PredictorMLP, load_metric
from trl_spo.evaluation.named import check_metrics, check_rewards, parse_rewards
from trl_spo.rewards.base import MetricReward
from trl_spo.scripts import evaluate, spo, step_reward
from trl_spo.scripts.arguments import RewardArguments

from .test_metrics import TEXT, VISION, bert_tokenizer, clip_state, tiny_image_reward, to_image_reward, to_open_clip
from .testing_utils import PROMPTS, tiny_clip, tiny_sd_pipeline


SHAPES = Path(__file__).parents[1] / "examples" / "shapes" / "weights"
CODE = """
import torch
import helper_of_user_rewards


def redness(images, prompts, timesteps):
    assert 0 <= images.min() and images.max() <= 1 and len(prompts) == len(timesteps)
    return helper_of_user_rewards.FACTOR * images[:, 0].mean(dim=(1, 2))


def metric(images, prompts):
    return redness(images, prompts, prompts)


class Judge:
    def __init__(self, factor=10):
        self.factor = factor

    def __call__(self, images, prompts, timesteps):
        return self.factor / 10 * redness(images, prompts, timesteps)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images, prompts, timesteps):
        return self.weight * redness(images, prompts, timesteps)


class Scorer:
    def score(self, images, prompts, timesteps):
        return redness(images, prompts, timesteps)


def factory(factor=10):
    return Judge(factor)


def needs(path):
    return Judge()


def makes_nothing():
    return 3


judge = Judge()
scorer = Scorer()
number = 3
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with the user's modules; what they put into the process is taken out again."""
    (tmp_path / "helper_of_user_rewards.py").write_text("FACTOR = 10\n")
    (tmp_path / "user_rewards.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    clip = tiny_clip(folder)
    StepAwareRewardModel.from_clip(clip, processor=clip).save_pretrained(folder / "reward")
    return folder / "reward"


def score(reward, images) -> torch.Tensor:
    """Of images in [0, 1], as a rollout asks."""
    text = reward.encode_prompts(PROMPTS[: len(images)])
    with torch.no_grad():
        return reward.score(images * 2 - 1, text, torch.full((len(images),), 501))


class TestNames:
    def test_weights_and_labels(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a=b").mkdir()
        parsed = parse_rewards(["pickscore=0.7", "my.module:Judge.aesthetic=-3", "out/step-reward", "a=b", "hps_v2.1"])
        assert [tuple(reward) for reward in parsed] == [
            ("pickscore", 0.7, "pickscore"),
            ("my.module:Judge.aesthetic", -3.0, "Judge.aesthetic"),
            ("out/step-reward", 1.0, "step-reward"),
            ("a=b", 1.0, "a=b"),
            ("hps_v2.1", 1.0, "hps_v2.1"),
        ]
        same = parse_rewards(["one:score", "two:score=2", "out/score"])
        assert [reward.label for reward in same] == ["one:score", "two:score", "out/score"]

    @pytest.mark.parametrize(
        "names, message",
        [
            (["pickscor"], "no reward 'pickscor'; did you mean pickscore\\? There are pickscore, hps_v2.1"),
            (["beauty"], "no reward 'beauty'. There are pickscore"),
            (["user_rewards:rednes"], "'user_rewards' has no 'rednes'; did you mean redness"),
            (["user_reward:redness"], "no module 'user_reward' in the working directory or installed; did you mean user_r"),
            (["user_reward.py:redness"], "no file 'user_reward.py'; did you mean user_rewards.py"),
            (["user_rewards:"], "must be a module, a colon and a name in it"),
            (["user_rewards:number"], "must be a function .* and is a `int`"),
            (["user_rewards:needs"], r"takes \(path\): it is neither .* options that were given, \{\}"),
            (["broken:f"], r"Importing 'broken' failed in '.*broken.py', line 3: ZeroDivisionError: division by zero"),
            (["unmet:f"], r"Importing 'unmet' failed in '.*unmet.py', line 1: ModuleNotFoundError: No module named 'not_there'"),
            (["typo:f"], r"Importing 'typo' failed in '.*typo.py', line 1: SyntaxError"),
            (["leaves:f"], r"Importing 'leaves' failed in '.*leaves.py', line 2: SystemExit: 3"),
            (["./reward"], "no folder './reward'"),
            (["models/rewrd"], "no folder 'models/rewrd'; did you mean reward"),
            (["models/reward"], "'models/reward' has no `config.json`"),
            (["pickscore=much"], "must be a number, as in 'pickscore=0.5', got 'pickscore=much'"),
            (["pickscore=0"], "weight of 'pickscore' must be a finite number other than 0"),
            (["pickscore=1", "pickscore=2"], "'pickscore' is named twice"),
            ([], "No reward is named"),
        ],
    )  # fmt: skip
    def test_a_wrong_name_is_one_sentence_before_anything_is_loaded(self, names, message, workplace):
        (workplace / "broken.py").write_text("\n\n1 / 0\n")
        (workplace / "unmet.py").write_text("import not_there\n")
        (workplace / "typo.py").write_text("def f(:\n")
        (workplace / "leaves.py").write_text("import sys\nsys.exit(3)\n")
        (workplace / "models" / "reward").mkdir(parents=True)
        arguments = ["--reward", *names] if names else []
        config = [
            "--dataset_name",
            "prompts.txt",
            "--output_dir",
            str(workplace / "out"),
            "--model_name_or_path",
            "no/model",
        ]
        with pytest.raises((ValueError, TypeError), match=message):
            check_rewards(names)
        if names:  # the program says it before it looks for prompts or a model
            with pytest.raises((ValueError, TypeError), match=message):
                spo.main(*spo.make_parser().parse_args_and_config([*arguments, *config, "--use_cpu", "true"]))

    def test_options_are_for_what_takes_them(self, workplace):
        for options, message in (
            ({"aesthetic": {}}, r"options for the reward 'aesthetic', which is not among \['user_rewards:redness'\]"),
            ({"user_rewards:redness": {"factor": 2}}, "is used as it is and takes no options"),
        ):
            with pytest.raises(ValueError, match=message):
                check_rewards(["user_rewards:redness"], options)
        with pytest.raises(TypeError, match=r"'user_rewards:Judge' takes .* options that were given, \{'facto': 2\}"):
            check_rewards(["user_rewards:Judge"], {"user_rewards:Judge": {"facto": 2}})
        with pytest.raises(ValueError, match="are for the rewards of `reward`, and there are none"):
            RewardArguments(reward_options='{"a": {}}').check()
        with pytest.raises(TypeError, match="'user_rewards:makes_nothing' made a `int`"):
            load_reward("user_rewards:makes_nothing")

    def test_a_metric_has_no_weight(self):
        with pytest.raises(ValueError, match="no metric 'pickscore=0.5'; did you mean pickscore"):
            check_metrics(["pickscore=0.5"])


class TestForms:
    @pytest.mark.parametrize(
        "name",
        "redness metric Judge Network judge scorer judge.__call__ factory".split(),
    )
    def test_functions_classes_factories_and_objects(self, name, workplace):
        """All of them are the same reward, and as a metric the same number again."""
        images = torch.rand(2, 3, 8, 8)
        expected = 10 * images[:, 0].mean(dim=(1, 2))
        reward = load_reward(f"user_rewards:{name}")
        torch.testing.assert_close(score(reward, images), expected)
        assert reward.name == f"user_rewards:{name}"
        assert isinstance(reward, MetricReward) == (name == "metric")

    def test_a_module_by_its_file(self, workplace):
        folder = workplace / "elsewhere"
        folder.mkdir()
        (folder / "more_rewards.py").write_text(
            "import neighbour\ndef f(images, prompts, timesteps):\n    return neighbour.g(images)\n"
        )
        (folder / "neighbour.py").write_text("def g(images):\n    return images.mean(dim=(1, 2, 3))\n")
        images = torch.rand(2, 3, 8, 8)
        reward = load_reward("elsewhere/more_rewards.py:f")
        torch.testing.assert_close(score(reward, images), images.mean(dim=(1, 2, 3)))
        (folder / "json.py").write_text("def f(images, prompts, timesteps):\n    return 0\n")
        with pytest.raises(ValueError, match="has the name of another module"):
            load_reward("elsewhere/json.py:f")

    def test_options_of_classes_and_factories(self, workplace):
        images = torch.rand(2, 3, 8, 8)
        for name in ("user_rewards:Judge", "user_rewards:factory"):
            reward = load_reward(name, {name: {"factor": 20}})
            torch.testing.assert_close(score(reward, images), 20 * images[:, 0].mean(dim=(1, 2)))

    def test_a_saved_reward_model(self, saved_model):
        images = torch.rand(2, 3, 16, 16)
        reward = load_reward(str(saved_model))
        model = StepAwareRewardModel.from_pretrained(saved_model)
        with torch.no_grad():
            expected = model.score(images * 2 - 1, PROMPTS[:2], 501)
        assert torch.equal(score(reward, images), expected)

    def test_one_reward_is_itself_and_its_weight_a_factor(self, workplace):
        images = torch.rand(2, 3, 8, 8)
        one, doubled = load_reward("user_rewards:redness"), load_reward("user_rewards:redness=2")
        assert not one.parts and list(doubled.parts) == ["redness"]
        assert torch.equal(score(doubled, images), 2 * score(one, images))


class TestPublishedMetrics:
    @pytest.fixture(scope="class")
    def options(self, tmp_path_factory):
        """The published files of all metrics, tiny."""
        folder = tmp_path_factory.mktemp("published")
        clip = str(tiny_clip(folder))
        torch.save({"state_dict": to_open_clip(clip_state(clip))}, folder / "HPS_v2.1_compressed.pt")
        torch.manual_seed(0)
        torch.save(PredictorMLP(12).state_dict(), folder / "aesthetic-model.pth")
        torch.save(to_image_reward(tiny_image_reward().state_dict()), folder / "ImageReward.pt")
        sizes = {"vision_config": BlipVisionConfig(**VISION), "text_config": BlipTextConfig(**TEXT)}
        bert = str(bert_tokenizer(folder / "bert"))
        return {
            "pickscore": {"model": clip, "processor": None},
            "clip_score": {"model": clip, "dtype": "float32"},
            "hps_v2.1": {"checkpoint": str(folder), "clip": clip},
            "aesthetic": {"predictor": str(folder), "clip": clip},
            "image_reward": {"checkpoint": str(folder), "tokenizer": bert, **sizes},
        }

    @pytest.mark.parametrize("name", ["pickscore", "hps_v2.1", "image_reward", "clip_score", "aesthetic"])
    def test_as_a_reward_it_scores_what_it_scores_as_a_metric(self, name, options):
        assert name in METRICS
        settings = {**options[name], "device": "cpu"}
        settings.pop("dtype", None)
        images = torch.rand(2, 3, 20, 24)
        reward = load_reward(name, {name: options[name]}).prepare("cpu")
        expected = load_metric(name, **settings)(images, PROMPTS[:2])
        torch.testing.assert_close(score(reward, images), expected, atol=1e-4, rtol=1e-4)
        assert reward.name == name and reward.sees == "images"

    def test_weights_dtype_and_device(self, options):
        chosen = {name: options[name] for name in ("pickscore", "aesthetic")}
        chosen["pickscore"] = {**chosen["pickscore"], "dtype": "bfloat16"}
        reward = load_reward(["pickscore=0.7", "aesthetic=0.3"], chosen)
        assert isinstance(reward, WeightedReward) and reward.weights == {"pickscore": 0.7, "aesthetic": 0.3}
        metric = reward.parts["pickscore"].function
        assert next(metric.model.parameters()).dtype == torch.bfloat16
        reward.prepare("meta")
        assert {metric.device.type, metric.logit_scale.device.type} == {"meta"}
        assert next(reward.parts["aesthetic"].function.predictor.parameters()).device.type == "meta"


# --- the command line ------------------------------------------------------------------------------------------------


def parsed(*arguments) -> RewardArguments:
    return spo.make_parser().parse_args_and_config([*arguments, "--output_dir", "out", "--use_cpu", "true"])[1]


class TestTheOption:
    def test_it_is_repeated_or_a_list(self):
        expected = ["pickscore=0.7", "m:f=0.3"]
        assert parsed("--reward", "pickscore=0.7", "--reward", "m:f=0.3").reward == expected
        assert parsed("--reward", *expected).reward == expected
        assert parsed("--reward=pickscore=0.7", "--reward=m:f=0.3").reward == expected
        assert parsed().reward is None

    @pytest.mark.parametrize(
        "yaml, expected",
        [
            ("reward: pickscore\n", ["pickscore"]),
            ("reward:\n  - pickscore=0.7\n  - m:f=0.3\n", ["pickscore=0.7", "m:f=0.3"]),
            ("reward:\n  pickscore: 0.7\n  m:f: 0.3\n", ["pickscore=0.7", "m:f=0.3"]),
        ],
    )
    def test_in_a_config(self, yaml, expected, tmp_path):
        (tmp_path / "c.yaml").write_text(yaml + "reward_options:\n  pickscore:\n    dtype: bfloat16\n")
        arguments = parsed("--config", str(tmp_path / "c.yaml"))
        assert arguments.reward == expected and arguments.reward_options == {"pickscore": {"dtype": "bfloat16"}}
        again = parsed("--config", str(tmp_path / "c.yaml"), "--reward", "aesthetic", "--reward", "hps_v2.1")
        assert again.reward == ["aesthetic", "hps_v2.1"]  # the command line goes before the config

    def test_the_reward_model_of_the_other_arguments_has_a_name(self, saved_model, workplace):
        """A preset names a reward model; `reward` goes before it, and may still use it."""
        other = ["--reward_model_name_or_path", str(saved_model)]
        assert isinstance(parsed(*other).load(), StepAwareRewardModel)
        assert parsed(*other, "--reward", "user_rewards:redness").load().name == "user_rewards:redness"
        both = parsed(*other, "--reward", "step_reward=0.5", "user_rewards:redness=0.5").load()
        assert both.weights == {"step_reward": 0.5, "redness": 0.5}
        assert isinstance(both.parts["step_reward"].model, StepAwareRewardModel)

    def test_without_it_a_folder_that_is_missing_is_said_first(self):
        with pytest.raises(FileNotFoundError, match="There is no reward model at './step-rewrd'"):
            parsed("--reward_model_name_or_path", "./step-rewrd").check()

    def test_only_spo_has_it(self):
        assert not any("--reward" in p.make_parser()._option_string_actions for p in (evaluate, step_reward))


def test_two_rewards_of_ones_own_in_the_shapes_world(workplace):
    """The whole way from the command line: both rewards are logged, and the adapter has moved."""
    (workplace / "prompts.txt").write_text("a red circle\na blue square\na green ring\n")
    arguments = ["--reward", "user_rewards:redness=0.7", "--reward", "user_rewards:Judge=0.3"]
    arguments += ["--reward_options", '{"user_rewards:Judge": {"factor": -500}}']
    arguments += ["--model_name_or_path", str(SHAPES / "pipeline"), "--dataset_name", "prompts.txt"]
    arguments += [
        "--num_inference_steps",
        "4",
        "--branch_start_step",
        "1",
        "--guidance_scale",
        "1",
        "--max_steps",
        "2",
    ]
    arguments += ["--report_to", "none", "--use_cpu", "true", "--logging_steps", "1", "--learning_rate", "0.01"]
    arguments += ["--per_device_train_batch_size", "4", "--output_dir", "out"]
    spo.main(*spo.make_parser().parse_args_and_config(arguments))
    state = json.loads((workplace / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "loss" in log]
    assert len(logs) == 2
    for log in logs:  # `Judge` is -50 times redness, so without a common scale it would decide
        assert log["step_reward/Judge/mean"] == pytest.approx(-50 * log["step_reward/redness/mean"], rel=1e-4)
        assert log["step_reward/Judge/std"] == pytest.approx(50 * log["step_reward/redness/std"], rel=1e-3)
        assert log["reward_mean"] == pytest.approx(
            0.7 * log["reward_mean/redness"] + 0.3 * log["reward_mean/Judge"], rel=1e-4
        )
        assert 0 < log["step_reward/std"] < 0.5 and log["pairs/valid_fraction"] > 0  # 0.7 - 0.3 of a deviation
    assert logs[1]["kl"] > 0
    assert "Reward: `0.7 x redness + 0.3 x Judge`" in (workplace / "out" / "README.md").read_text()


SHORT = dataclasses.replace(PROTOCOLS["spo-paper"], name="short", num_inference_steps=2, guidance_scale=1.0)


class TestMetrics:
    def test_one_s_own_published_and_saved_ones_together(self, workplace, saved_model):
        options = {"user_rewards:Judge": {"factor": 20}}
        names = ["user_rewards:metric", "user_rewards:redness", "user_rewards:Judge", str(saved_model)]
        metrics = load_metrics(names, options, "cpu")
        assert list(metrics) == names
        result = evaluate_pipeline(tiny_sd_pipeline(workplace), PROMPTS[:2], metrics, SHORT)
        redness = 10 * result.images[:, 0].mean(dim=(1, 2))
        torch.testing.assert_close(
            result.scores["user_rewards:metric"], redness, atol=0.02, rtol=0
        )  # images of 8 bits
        torch.testing.assert_close(result.scores["user_rewards:redness"], result.scores["user_rewards:metric"])
        torch.testing.assert_close(result.scores["user_rewards:Judge"], 2 * result.scores["user_rewards:metric"])
        assert result.metric_descriptions["user_rewards:redness"] == "user_rewards:redness"

    def test_the_command(self, workplace):
        (workplace / "prompts.txt").write_text("a red circle\na blue square\n")
        arguments = ["--model_name_or_path", str(SHAPES / "pipeline"), "--prompts", "prompts.txt", "--device", "cpu"]
        arguments += ["--num_inference_steps", "2", "--output_dir", "out"]
        parser = evaluate.make_parser()
        result = evaluate.main(*parser.parse_args_and_config([*arguments, "--metrics", "user_rewards:redness"]))
        assert 0 < result.scores["user_rewards:redness"].mean() < 10
        assert "user_rewards:redness" in (workplace / "out" / "metrics.md").read_text()
        arguments[1] = "no/model"  # what is wrong with a metric is said before a model is looked for
        with pytest.raises(ValueError, match="did you mean redness"):
            evaluate.main(*parser.parse_args_and_config([*arguments, "--metrics", "user_rewards:rednes"]))
