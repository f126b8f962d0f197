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
Necessity: a DDPO script that moves to SPO must keep its meaning: the same pixels for the reward, the same prompts, the
same settings, and no setting that vanishes unsaid. What needs TRL's own DDPO classes is in `test_ddpo_trainer.py`.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl_spo import (
    SPOConfig,
    SPOTrainer,
    ddpo_interop,
    prompts_from_ddpo,
    reward_from_ddpo,
    spo_config_from_ddpo,
    wrap_pipeline,
)
from trl_spo.pipelines.ddpo import DDPOStableDiffusionPipeline

from .testing_utils import PROMPTS, device_settings, tiny_sd_pipeline


@pytest.fixture
def warnings(monkeypatch):
    """Texts of the module's warnings."""
    texts = []
    monkeypatch.setattr(ddpo_interop.logger, "warning", texts.append)
    return texts


def call(reward, images=None, prompts=("a", "b")):
    images = torch.rand(len(prompts), 3, 4, 4) if images is None else images
    return reward(images, list(prompts), torch.full((len(prompts),), 501))


class TestReward:
    def test_hands_over_what_ddpo_does(self):
        """Images untouched, prompts and metadata as tuples of one length."""
        images, seen = torch.rand(2, 3, 4, 4), []

        def reward_function(*args):
            seen.append(args)
            return torch.tensor([1.0, 2.0]), {"unused": 0}

        scores = call(reward_from_ddpo(reward_function), images)
        assert scores.tolist() == [1.0, 2.0]
        assert seen[0][0] is images
        assert seen[0][1:] == (("a", "b"), ({}, {}))

    @pytest.mark.parametrize(
        "rewards",
        [[1, 2], np.array([1.0, 2.0]), torch.tensor([[1.0], [2.0]]).double(), torch.tensor([1.0, 2.0]).half()],
        ids=["list", "numpy", "column of float64", "float16"],
    )
    def test_every_kind_of_rewards_becomes_a_float_vector(self, rewards):
        scores = call(reward_from_ddpo(lambda *args: (rewards, {}), scale=10))
        assert scores.dtype == torch.float32
        assert scores.tolist() == [10.0, 20.0]

    def test_a_reward_with_gradient_is_detached(self):
        weight = torch.ones(2, requires_grad=True)
        assert not call(reward_from_ddpo(lambda *args: (weight * 2, {}))).requires_grad

    def test_uint8_conversion_inside_the_function_sees_the_full_range(self):
        """DDPO rewards multiply [0, 1] by 255 themselves; images in [-1, 1] would lose every dark pixel."""
        images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)

        def reward_function(images, prompts, metadata):
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
            return images.float().mean(dim=(1, 2, 3)), {}

        assert call(reward_from_ddpo(reward_function), images, PROMPTS[:3]).tolist() == [0.0, 128.0, 255.0]

    def test_metadata(self):
        def reward_function(images, prompts, metadata):
            return torch.tensor([float(m["target"]) for m in metadata]), {}

        by_prompt = {"a": {"target": 3}, "b": {"target": 4}}
        assert call(reward_from_ddpo(reward_function, by_prompt)).tolist() == [3.0, 4.0]
        assert call(reward_from_ddpo(reward_function, by_prompt.get)).tolist() == [3.0, 4.0]
        with pytest.raises(KeyError, match="no entry for the prompt 'c'"):
            call(reward_from_ddpo(reward_function, by_prompt), prompts=["c"])

    def test_wrong_functions_are_named(self):
        with pytest.raises(TypeError, match="must be a callable.*got `int`"):
            reward_from_ddpo(3)
        with pytest.raises(TypeError, match="pair.*returned a `Tensor`"):
            call(reward_from_ddpo(lambda *args: torch.zeros(2)))
        with pytest.raises(ValueError, match=r"one reward per image, 2; got shape \(1,\)"):
            call(reward_from_ddpo(lambda *args: ([0.0], {})))

    def test_trains(self, tmp_path, warnings):
        """A whole DDPO script without TRL's classes: reward, prompts and settings through their adapters."""
        ranges, ddpo_config = [], ddpo_settings(sample_num_steps=5, sample_batch_size=3, train_batch_size=4)

        def reward_function(images, prompts, metadata):
            ranges.append((images.min().item(), images.max().item(), images.dtype))
            assert all(m == {"words": len(p.split())} for p, m in zip(prompts, metadata, strict=True))
            return 100 * (images[:, 0] - images[:, 1]).mean(dim=(1, 2)).numpy(), {}

        def prompt_function():
            prompt = np.random.choice(PROMPTS)
            return prompt, {"words": len(prompt.split())}

        prompts, metadata = prompts_from_ddpo(prompt_function, 6, return_metadata=True)
        config = spo_config_from_ddpo(
            ddpo_config, str(tmp_path), max_steps=2, logging_steps=1, preference_threshold=0.0, **device_settings()
        )
        pipeline = tiny_sd_pipeline(tmp_path)
        trainer = SPOTrainer(config, pipeline, reward_from_ddpo(reward_function, metadata), train_dataset=prompts)
        trainer.train()
        assert trainer.state.global_step == 2
        low, high, dtypes = (set(values) for values in zip(*ranges, strict=True))
        assert min(low) >= 0 and 0.5 < max(high) <= 1 and dtypes == {torch.float32}
        assert trainer.state.log_history[-2]["kl"] > 0


class TestPrompts:
    def test_same_seed_same_prompts_and_nobody_elses_numbers_move(self):
        functions = {
            "random": lambda: (random.choice(PROMPTS), {}),
            "numpy": lambda: (np.random.choice(PROMPTS), {}),
            "torch": lambda: (PROMPTS[torch.randint(len(PROMPTS), ())], {}),
        }
        for name, function in functions.items():
            random.seed(7), np.random.seed(7), torch.manual_seed(7)
            expected = random.random(), np.random.rand(), torch.rand(()).item()
            random.seed(7), np.random.seed(7), torch.manual_seed(7)
            drawn = [prompts_from_ddpo(function, 20, seed=seed) for seed in (0, 0, 1)]
            assert drawn[0] == drawn[1] != drawn[2], name
            assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
            assert {type(prompt) for prompt in drawn[0]} == {str}
            assert len(drawn[0]) == 20 and len(set(drawn[0])) < 20

    def test_metadata_by_prompt(self):
        draws = iter([("a", {"n": 1}), ("b", {"n": 2}), ("a", {"n": 1})])
        prompts, metadata = prompts_from_ddpo(lambda: next(draws), 3, return_metadata=True)
        assert prompts == ["a", "b", "a"]
        assert metadata == {"a": {"n": 1}, "b": {"n": 2}}

    def test_ambiguous_metadata_is_refused_where_it_would_be_used(self):
        draws = [("a", 1), ("a", 2)]
        assert prompts_from_ddpo(iter(draws).__next__, 2) == ["a", "a"]
        with pytest.raises(ValueError, match="'a' was drawn with two different metadata, 1 and 2"):
            prompts_from_ddpo(iter(draws).__next__, 2, return_metadata=True)

    @pytest.mark.parametrize("drawn", ["a cat", ("a cat",), (3, {})])
    def test_wrong_functions_are_named(self, drawn):
        with pytest.raises(TypeError, match=r"returns `\(prompt, metadata\)`"):
            prompts_from_ddpo(lambda: drawn, 1)

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="`num_prompts` must be at least 1, got 0"):
            prompts_from_ddpo(lambda: ("a", {}), 0)


def ddpo_settings(**kwargs):
    """The attributes of a `DDPOConfig` of TRL 0.23.1, with other values than any default."""
    settings = {
        "exp_name": "experiment",
        "run_name": "name",
        "seed": 5,
        "log_with": None,
        "tracker_kwargs": {},
        "accelerator_kwargs": {},
        "project_kwargs": {},
        "tracker_project_name": "trl",
        "logdir": "logs",
        "num_epochs": 3,
        "save_freq": 1,
        "num_checkpoint_limit": 7,
        "mixed_precision": "no",
        "allow_tf32": True,
        "resume_from": "",
        "sample_num_steps": 25,
        "sample_eta": 0.5,
        "sample_guidance_scale": 3.0,
        "sample_batch_size": 6,
        "sample_num_batches_per_epoch": 2,
        "train_batch_size": 2,
        "train_use_8bit_adam": False,
        "train_learning_rate": 1e-3,
        "train_adam_beta1": 0.8,
        "train_adam_beta2": 0.9,
        "train_adam_weight_decay": 0.02,
        "train_adam_epsilon": 1e-7,
        "train_gradient_accumulation_steps": 2,
        "train_max_grad_norm": 0.5,
        "train_num_inner_epochs": 1,
        "train_cfg": False,
        "train_adv_clip_max": 5.0,
        "train_clip_range": 1e-4,
        "train_timestep_fraction": 1.0,
        "per_prompt_stat_tracking": False,
        "per_prompt_stat_tracking_buffer_size": 16,
        "per_prompt_stat_tracking_min_count": 16,
        "async_reward_computation": False,
        "max_workers": 2,
        "negative_prompts": "blurry, dark",
        "push_to_hub": False,
    }
    assert not kwargs.keys() - settings.keys()
    return SimpleNamespace(**{**settings, **kwargs})


WITHOUT_COUNTERPART = (
    "exp_name tracker_kwargs accelerator_kwargs tracker_project_name logdir num_epochs save_freq resume_from "
    "sample_num_batches_per_epoch train_num_inner_epochs train_adv_clip_max train_clip_range train_timestep_fraction "
    "per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count "
    "async_reward_computation max_workers"
).split()


class TestConfig:
    def test_shared_settings_arrive(self, tmp_path, warnings):
        config = spo_config_from_ddpo(ddpo_settings(), str(tmp_path))
        assert type(config) is SPOConfig
        expected = {
            "output_dir": str(tmp_path),
            "run_name": "name",
            "seed": 5,
            "report_to": [],
            "save_total_limit": 7,
            "fp16": False,
            "bf16": False,
            "num_inference_steps": 25,
            "branch_start_step": 5,
            "eta": 0.5,
            "guidance_scale": 3.0,
            "per_device_rollout_batch_size": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_epsilon": 1e-7,
            "weight_decay": 0.02,
            "max_grad_norm": 0.5,
            "train_cfg": False,
            "negative_prompt": "blurry, dark",
            "num_train_epochs": SPOConfig(output_dir=str(tmp_path)).num_train_epochs,
        }
        assert {name: getattr(config, name) for name in expected} == expected

    def test_one_warning_lists_exactly_what_has_no_counterpart(self, tmp_path, warnings):
        spo_config_from_ddpo(ddpo_settings(project_kwargs={"project_dir": "p", "total_limit": 2}), str(tmp_path))
        assert len(warnings) == 1
        listed = warnings[0].split("not used: ")[1].split(". (")[0].split(", ")
        assert listed == [*WITHOUT_COUNTERPART, "project_kwargs['project_dir']"]
        assert "one pass over the prompts" in warnings[0]

    def test_overrides_win(self, tmp_path, warnings):
        config = spo_config_from_ddpo(ddpo_settings(), str(tmp_path), eta=1.0, branch_start_step=2, seed=9)
        assert (config.eta, config.branch_start_step, config.seed) == (1.0, 2, 9)

    @pytest.mark.parametrize("precision", ["no", None, "bf16"])
    def test_precision(self, tmp_path, warnings, precision):
        config = spo_config_from_ddpo(ddpo_settings(mixed_precision=precision), str(tmp_path), **device_settings())
        assert (config.fp16, config.bf16) == (False, precision == "bf16")

    def test_half_precision_is_handed_on(self, tmp_path, warnings, monkeypatch):
        """A machine without a GPU may refuse float16 itself, so this looks at the arguments."""
        monkeypatch.setattr(ddpo_interop, "SPOConfig", SimpleNamespace)
        config = spo_config_from_ddpo(ddpo_settings(mixed_precision="fp16", log_with="wandb"), str(tmp_path))
        assert (config.fp16, config.bf16, config.report_to) == (True, False, "wandb")

    def test_trackers_optimizer_and_limits(self, tmp_path, warnings, monkeypatch):
        monkeypatch.setattr(ddpo_interop, "SPOConfig", SimpleNamespace)
        monkeypatch.setattr(ddpo_interop, "is_torch_tf32_available", lambda: True)
        settings = ddpo_settings(train_use_8bit_adam=True, project_kwargs={"total_limit": 2}, run_name="")
        config = spo_config_from_ddpo(settings, str(tmp_path))
        assert (config.optim, config.save_total_limit, config.tf32) == ("adamw_bnb_8bit", 2, True)
        assert not hasattr(config, "run_name")
        assert not hasattr(spo_config_from_ddpo(ddpo_settings(allow_tf32=False), ""), "tf32")

    @pytest.mark.parametrize(("negative", "expected"), [(None, ""), ("", ""), (["blurry"], "blurry")])
    def test_negative_prompt(self, tmp_path, warnings, negative, expected):
        config = spo_config_from_ddpo(ddpo_settings(negative_prompts=negative), str(tmp_path))
        assert config.negative_prompt == expected

    def test_part_of_a_config(self, tmp_path, warnings):
        config = spo_config_from_ddpo(SimpleNamespace(sample_num_steps=10), str(tmp_path))
        assert (config.num_inference_steps, config.branch_start_step) == (10, 2)
        assert config.eta == 1.0 and config.negative_prompt == ""
        assert not warnings

    def test_impossible_values_are_named(self, tmp_path, warnings):
        for settings, message in (
            ({"mixed_precision": "fp8"}, "`mixed_precision` must be.*got 'fp8'"),
            ({"negative_prompts": ["a", "b"]}, r"one text for all prompts, got \['a', 'b'\]"),
            ({"sample_eta": 0.0}, "`eta` must be"),
        ):
            with pytest.raises(ValueError, match=message):
                spo_config_from_ddpo(ddpo_settings(**settings), str(tmp_path))
        for given in (None, {"sample_num_steps": 5}, SPOConfig(output_dir=str(tmp_path))):
            with pytest.raises(TypeError, match="TRL's `DDPOConfig`"):
                spo_config_from_ddpo(given, str(tmp_path))


class TestInterface:
    def test_pipelines_are_instances_and_offer_every_member(self, tmp_path):
        """Both with TRL's definition and with ours, which has to have the same members."""
        members = (
            "__call__ scheduler_step unet vae tokenizer scheduler text_encoder autocast set_progress_bar_config "
            "save_pretrained get_trainable_layers save_checkpoint load_checkpoint"
        ).split()
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        assert isinstance(wrapped, DDPOStableDiffusionPipeline)
        for name in members:
            assert name in vars(DDPOStableDiffusionPipeline), name
            assert getattr(type(wrapped), name, None) is not vars(DDPOStableDiffusionPipeline)[name], name
            getattr(wrapped, name)

    def test_a_subclass_that_lacks_a_member_says_so(self):
        class Incomplete(DDPOStableDiffusionPipeline):
            pass

        for use in (lambda p: p.unet, lambda p: p(), lambda p: p.save_pretrained("x")):
            with pytest.raises(NotImplementedError):
                use(Incomplete())

    def test_ddpo_training_leaves_no_graph_on_frozen_networks(self, tmp_path):
        """Regression: TRL's trainer embeds prompts with gradients on and goes backward twice through what it kept."""
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        wrapped.get_trainable_layers()
        for module in wrapped.frozen_modules().values():
            assert not any(parameter.requires_grad for parameter in module.parameters())
