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
Necessity: "beside TRL's DDPO" is a claim about TRL's own classes, so it is tested with them: the last release that has
them trains our pipeline, we train theirs, and where both compute a log-probability the numbers are the same.
"""

import dataclasses

import pytest
import torch
from accelerate import PartialState

from trl_spo import (
    SPOStableDiffusionPipeline,
    SPOStableDiffusionXLPipeline,
    SPOTrainer,
    ddpo_interop,
    prompts_from_ddpo,
    reward_from_ddpo,
    spo_config_from_ddpo,
)
from trl_spo.pipelines.ddpo import DDPOPipelineOutput, DDPOSchedulerOutput

from .test_ddpo_interop import WITHOUT_COUNTERPART, ddpo_settings
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    ddim_scheduler,
    device_settings,
    state_of,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
)


try:
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    from trl.models import modeling_sd_base
except ImportError:
    pytest.skip(
        "this TRL has no DDPO (the last one is 0.23.1); `make test-ddpo` runs these tests beside it",
        allow_module_level=True,
    )


def reward_function(images, prompts, metadata):
    """A reward as DDPO scripts write it, in units of the 256 grey levels."""
    images = (images * 255).round().clamp(0, 255).to(torch.uint8).float()
    return (images[:, 0] - images[:, 1]).mean(dim=(1, 2)), {}


def prompt_function():
    return PROMPTS[int(torch.randint(len(PROMPTS), ()))], {}


def ddpo_config(tmp_path, **settings):
    return DDPOConfig(
        **{
            "num_epochs": 1,
            "sample_num_steps": 4,
            "sample_batch_size": 2,
            "sample_num_batches_per_epoch": 2,
            "train_batch_size": 2,
            "train_learning_rate": 1e-3,
            "sample_guidance_scale": 3.0,
            "mixed_precision": "no",
            "project_kwargs": {"project_dir": str(tmp_path / "ddpo"), "automatic_checkpoint_naming": True},
            **settings,
        }
    )


def ddpo_trainer(tmp_path, pipeline, reward=reward_function, **settings):
    PartialState()  # TRL's trainer logs before it has an accelerator, and accelerate refuses that
    return DDPOTrainer(ddpo_config(tmp_path, **settings), reward, prompt_function, pipeline)


def spo_trainer(tmp_path, pipeline, reward=brightness_reward, output="spo", **settings):
    config = tiny_spo_config(tmp_path / output, **{"max_steps": 2, **settings})
    return SPOTrainer(config, pipeline, reward, train_dataset=PROMPTS)


def without_adapter(state):
    return {name.replace(".base_layer", ""): value for name, value in state.items() if "lora" not in name}


def adapter(module):
    return {name: value for name, value in state_of(module).items() if "lora" in name}


class TestOurPipelineInTheirTrainer:
    def test_is_what_they_ask_for(self, tmp_path):
        for pipeline in (
            SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path)),
            SPOStableDiffusionXLPipeline(tiny_sdxl_pipeline(tmp_path)),
        ):
            assert isinstance(pipeline, modeling_sd_base.DDPOStableDiffusionPipeline)
        assert DDPOPipelineOutput is modeling_sd_base.DDPOPipelineOutput
        assert DDPOSchedulerOutput is modeling_sd_base.DDPOSchedulerOutput

    def test_one_object_trains_with_ddpo_and_then_with_spo(self, tmp_path):
        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path))
        base = state_of(pipeline.unet)
        frozen = {name: state_of(module) for name, module in pipeline.frozen_modules().items()}

        trainer = ddpo_trainer(tmp_path, pipeline)
        untrained = adapter(pipeline.unet)
        trainer.train()
        after_ddpo = adapter(pipeline.unet)
        assert untrained.keys() == after_ddpo.keys()
        assert all(not torch.equal(untrained[name], after_ddpo[name]) for name in untrained if "lora_B" in name)

        spo = spo_trainer(tmp_path, pipeline)
        assert spo.pipeline is pipeline
        spo.train()
        after_spo = adapter(pipeline.unet)
        assert after_ddpo.keys() == after_spo.keys()
        assert all(not torch.equal(after_ddpo[name], after_spo[name]) for name in after_ddpo)

        after = without_adapter(state_of(pipeline.unet))
        assert base.keys() == after.keys() and all(torch.equal(base[name], after[name]) for name in base)
        for name, module in pipeline.frozen_modules().items():
            assert not changed(frozen[name], module), name

    def test_whole_network(self, tmp_path):
        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path), use_lora=False)
        trainer = ddpo_trainer(tmp_path, pipeline, train_learning_rate=1e-4)
        before = state_of(pipeline.unet)
        frozen = {name: state_of(module) for name, module in pipeline.frozen_modules().items()}
        trainer.train()
        assert len(changed(before, pipeline.unet)) > 0.9 * len(before)
        for name, module in pipeline.frozen_modules().items():
            assert not changed(frozen[name], module), name

    def test_their_checkpoints_hold_our_adapter(self, tmp_path):
        """Saved after the second epoch by accelerate's hooks, read back by a new trainer and by plain diffusers."""
        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path))
        ddpo_trainer(tmp_path, pipeline, num_epochs=2).train()
        folder = next((tmp_path / "ddpo" / "checkpoints").glob("checkpoint_*"))
        resumed = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path))
        trainer = ddpo_trainer(tmp_path, resumed, resume_from=str(folder))
        assert trainer.first_epoch == 1
        trained, loaded = adapter(pipeline.unet), adapter(resumed.unet)
        assert trained.keys() == loaded.keys() and all(torch.equal(trained[name], loaded[name]) for name in trained)
        tiny_sd_pipeline(tmp_path).load_lora_weights(folder)


class TestTheirPipelineInOurTrainer:
    def test_trains_as_the_diffusers_pipeline_does(self, tmp_path):
        """The same folder through TRL's wrapper and as a path: the same run, bit for bit."""
        tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "base")
        theirs = DefaultDDPOStableDiffusionPipeline(str(tmp_path / "base"))
        adapters = []
        for output, pipeline in (("theirs", theirs), ("path", str(tmp_path / "base"))):
            torch.manual_seed(0)
            trainer = spo_trainer(tmp_path, pipeline, output=output)
            trainer.train()
            trainer.save_model()
            adapters.append(adapter(trainer.pipeline.unet))
        assert trainer.state.log_history[-2]["kl"] > 0
        assert adapters[0].keys() == adapters[1].keys()
        assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
        tiny_sd_pipeline(tmp_path).load_lora_weights(tmp_path / "theirs")

    def test_goes_on_from_their_training(self, tmp_path):
        tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "base")
        theirs = DefaultDDPOStableDiffusionPipeline(str(tmp_path / "base"))
        ddpo_trainer(tmp_path, theirs).train()
        before = adapter(theirs.unet)
        spo_trainer(tmp_path, theirs).train()
        after = adapter(theirs.unet)
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[name], after[name]) for name in before)


class TestScriptInOurTrainer:
    def test_reward_gets_the_same_kind_of_input_from_both(self, tmp_path):
        """Type, dtype, layout and range of what TRL's trainer and ours hand to one reward function."""
        kinds = {"ddpo": set(), "spo": set()}

        def watched(name):
            def function(images, prompts, metadata):
                assert 0 <= images.min() and 0.5 < images.max() <= 1
                kinds[name].add((type(images), images.dtype, images.shape[1:], type(prompts), type(prompts[0])))
                kinds[name].add((type(metadata), type(metadata[0]), len(metadata) == len(prompts) == len(images)))
                return reward_function(images, prompts, metadata)

            return function

        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path))
        ddpo_trainer(tmp_path, pipeline, reward=watched("ddpo")).train()
        spo_trainer(tmp_path, pipeline, reward=reward_from_ddpo(watched("spo"))).train()
        assert kinds["ddpo"] == kinds["spo"]

    def test_whole_script(self, tmp_path):
        config = ddpo_config(tmp_path, sample_num_steps=5, train_batch_size=1)
        prompts = prompts_from_ddpo(prompt_function, 4)
        spo_config = spo_config_from_ddpo(
            config, str(tmp_path / "spo"), max_steps=2, logging_steps=1, **device_settings()
        )
        assert (spo_config.num_inference_steps, spo_config.learning_rate) == (5, 1e-3)
        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path))
        trainer = SPOTrainer(spo_config, pipeline, reward_from_ddpo(reward_function), train_dataset=prompts)
        trainer.train()
        assert trainer.state.log_history[-2]["kl"] > 0

    def test_every_field_of_their_config_is_accounted_for(self, tmp_path, monkeypatch):
        names = {field.name for field in dataclasses.fields(DDPOConfig)}
        assert names == vars(ddpo_settings()).keys()
        handled = set(ddpo_interop._SAME) | ddpo_interop._TRANSLATED
        assert names - handled == set(WITHOUT_COUNTERPART)
        texts = []
        monkeypatch.setattr(ddpo_interop.logger, "warning", texts.append)
        spo_config_from_ddpo(ddpo_config(tmp_path), str(tmp_path / "spo"))
        assert len(texts) == 1 and all(name in texts[0] for name in WITHOUT_COUNTERPART)


class TestLogProbabilities:
    def steps(self, pipeline):
        """(timestep, x_t, prediction, x_{t-1}) of a made-up trajectory, for every step of a schedule of five."""
        generator = torch.Generator().manual_seed(0)
        for timestep in pipeline.set_timesteps(5):
            yield torch.full((3,), timestep), *torch.randn(3, 3, 4, 8, 8, generator=generator)

    @pytest.mark.parametrize("eta", [0.3, 1.0])
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_equal_on_every_step(self, tmp_path, prediction_type, eta):
        scheduler = ddim_scheduler(prediction_type=prediction_type)
        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path, scheduler=scheduler))
        for timesteps, latents, prediction, previous in self.steps(pipeline):
            ours = pipeline.scheduler_step(prediction, timesteps, latents, eta, prev_sample=previous)
            theirs = modeling_sd_base.scheduler_step(
                pipeline.scheduler, prediction, timesteps, latents, eta, prev_sample=previous
            )
            torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-6, atol=0)

    def test_equal_samples_from_equal_generators(self, tmp_path):
        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path))
        for timesteps, latents, prediction, _ in self.steps(pipeline):
            ours = pipeline.scheduler_step(prediction, timesteps, latents, generator=torch.Generator().manual_seed(1))
            theirs = modeling_sd_base.scheduler_step(
                pipeline.scheduler, prediction, timesteps, latents, 1.0, generator=torch.Generator().manual_seed(1)
            )
            torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-6)

    def test_differ_only_where_theirs_leaves_the_scheduler(self, tmp_path):
        """
        With `set_alpha_to_one=True` the last step ends in x_0 itself and is deterministic. TRL clamps the previous
        timestep before it asks whether there is one, and scores the step with a sigma that the scheduler does not have.
        """
        scheduler = ddim_scheduler(set_alpha_to_one=True)
        pipeline = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path, scheduler=scheduler))
        steps = list(self.steps(pipeline))
        for i, (timesteps, latents, prediction, previous) in enumerate(steps):
            theirs = modeling_sd_base.scheduler_step(
                pipeline.scheduler, prediction, timesteps, latents, 1.0, prev_sample=previous
            )
            if i < len(steps) - 1:
                ours = pipeline.scheduler_step(prediction, timesteps, latents, prev_sample=previous)
                torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-6, atol=0)
            else:
                assert theirs.log_probs.isfinite().all()
                with pytest.raises(ValueError, match="no density"):
                    pipeline.scheduler_step(prediction, timesteps, latents, prev_sample=previous)
                exact = pipeline.scheduler.step(prediction, int(timesteps[0]), latents, eta=1.0).prev_sample
                mean = pipeline.step_distribution(prediction, timesteps, latents, 1.0).prev_sample_mean
                torch.testing.assert_close(mean, exact)
