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
Necessity: chunk sizes come from predicted memory. A prediction that is too low ends a run in an out-of-memory error, one
that is too high makes it slow, and neither fails any other test. Expected bytes are counted by hand where that is
possible, and otherwise come from what torch's profiler saw a real run allocate.
"""

import logging
from pathlib import Path

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks import flow_memory
from benchmarks.memory import main, measured_peak_bytes
from trl_spo import SPOTrainer, StepAwareRewardModel, wrap_pipeline
from trl_spo.training.memory import (
    FALLBACK_CHUNK,
    GIB,
    busy_chunk_sizes,
    denoiser_bytes,
    module_bytes,
    peak_activation_bytes,
    rollout_budget_gib,
    rollout_chunk_sizes,
    samples_within,
    scoring_bytes,
)

from .flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
)


FLOAT = 4  # bytes
FLOW_FAMILIES = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_klein_pipeline,
    "z_image": tiny_z_image_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path_factory.mktemp("sd")))
    pipeline.prepare_for_training()
    return pipeline


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tiny_clip(tmp_path_factory.mktemp("clip"))
    return StepAwareRewardModel.from_clip(folder).requires_grad_(False).eval()


# --- by hand ---------------------------------------------------------------------------------------------------------


def two_products(x, w, v):
    return (x @ w) @ v


def product_forgotten(x, w, v):
    y = x @ w
    y = y[:2].clone()
    return y @ v


def views(x, w, v):
    return x.t().reshape(-1).view(16, 8)[2:].unsqueeze(0).expand(5, -1, -1)


def in_place(x, w, v):
    y = x + 1
    y.mul_(2).add_(x)
    y[0] = 0
    return y


def in_place_on_input(x, w, v):
    x.add_(1)
    x.view(-1).zero_()
    return x


def two_at_a_time(x, w, v):
    for _ in range(5):
        x = x.exp()
    return x


def deleted(x, w, v):
    y = x.exp()
    z = y.sum(0)
    del y
    return x.exp() + z


def half(x, w, v):
    return x.half()


def channels_last(x, w, v):
    return x.view(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)


def several_outputs(x, w, v):
    return torch.split(x + 1, 4)  # views of one storage


@pytest.mark.parametrize(
    ("function", "floats"),
    [
        (two_products, 8 * 32 + 8 * 4),  # the first product is alive when the second is made
        (product_forgotten, 8 * 32 + 2 * 32),
        (views, 8 * 16),  # `t().reshape` copies, everything after it is a view of the copy
        (in_place, 8 * 16),
        (in_place_on_input, 0),
        (two_at_a_time, 2 * 8 * 16),
        (deleted, 8 * 16 + 16 + 8 * 16),  # the last sum beside the second exponential and z
        (half, 8 * 16 / 2),
        (channels_last, 8 * 16),
        (several_outputs, 8 * 16),
    ],
)
@pytest.mark.parametrize("kind", ["real", "fake"])
def test_bytes_counted_by_hand(function, floats, kind):
    shapes = (8, 16), (16, 32), (32, 4)
    mode = FakeTensorMode()
    with mode if kind == "fake" else torch.no_grad():
        args = [torch.ones(shape) for shape in shapes]
    assert peak_activation_bytes(function, *args) == floats * FLOAT
    if kind == "real":
        assert all(torch.equal(arg, torch.ones(shape)) for arg, shape in zip(args, shapes, strict=True))


def test_in_views_case_the_copy_is_alone():
    """The reshape of a transposed tensor is the only allocation of `views`, as torch's own pointers say."""
    x = torch.ones(8, 16)
    copied = x.t().reshape(-1)
    assert copied.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert views(x, None, None).untyped_storage().nbytes() == 8 * 16 * FLOAT


def test_training_keeps_what_the_backward_pass_needs():
    def chain(x):
        for _ in range(5):
            x = x.exp()  # autograd keeps every result
        return x

    x = torch.zeros(8, 16, requires_grad=True)
    with torch.no_grad():
        assert peak_activation_bytes(chain, x) == 2 * 8 * 16 * FLOAT
    assert peak_activation_bytes(chain, x) == 5 * 8 * 16 * FLOAT


def test_gradients_count_and_do_not_stay():
    weight = torch.nn.Parameter(torch.ones(16, 64))
    x = torch.ones(8, 16)

    def train():
        (x @ weight).sum().backward()

    # The product is gone when the gradient is made; left are the loss, its gradient, and the weight's.
    assert peak_activation_bytes(train) == (1 + 1 + 16 * 64) * FLOAT
    assert weight.grad is None
    weight.grad = torch.full_like(weight, 3.0)
    assert peak_activation_bytes(train) == (1 + 1 + 16 * 64) * FLOAT
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))


def test_autocast_keeps_one_cast_per_weight():
    weight = torch.nn.Parameter(torch.ones(64, 16))

    def twice(x):
        y = torch.nn.functional.linear(x, weight)
        del y
        return torch.nn.functional.linear(x, weight)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = peak_activation_bytes(twice, torch.ones(4, 16, dtype=torch.bfloat16))
        after = torch.nn.functional.linear(torch.ones(4, 16), weight)  # no fake cast is left in autocast's cache
    assert predicted == (64 * 16 + 4 * 64) * 2
    assert not isinstance(after, FakeTensor) and bool((after == 16).all())


def test_gradient_checkpointing_saves_activations():
    layers = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)) for _ in range(8)
    )

    def train(x, use):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if use else layer(x)
        x.square().sum().backward()

    x = torch.ones(512, 16)
    for use in (False, True):
        train(x, use)  # gradients are there
        predicted = peak_activation_bytes(train, x, use)
        assert predicted == pytest.approx(measured_peak_bytes(lambda use=use: train(x, use)), rel=0.05)
    assert peak_activation_bytes(train, x, True) < 0.4 * peak_activation_bytes(train, x, False)


def test_checks_of_values_are_taken_to_pass_and_decisions_are_refused():
    def checked(x):
        if not bool((x > 0).all()) or x.isnan().any():
            raise ValueError("bad values")
        return x.exp()

    def decides(x):
        return x.exp() if x.sum() > 0 else x

    assert peak_activation_bytes(checked, -torch.ones(8)) == 8 * FLOAT
    with pytest.raises(RuntimeError):
        peak_activation_bytes(decides, torch.ones(8))
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))  # and no mode is left active


def test_module_bytes_counts_shared_parameters_once():
    layer = torch.nn.Linear(4, 3)
    assert module_bytes(layer) == (12 + 3) * FLOAT
    assert module_bytes(layer, torch.nn.Sequential(layer), torch.nn.BatchNorm1d(3)) == (15 + 4 * 3) * FLOAT + 8


# --- batch sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "memory",
    [
        lambda n: 10 * n,
        lambda n: 95 + 10 * n,
        lambda n: max(300, 100 + 20 * n, 35 * n),
        lambda n: 7 * n if n > 1 else 3,  # a single sample may be cheaper, as copies become views
        lambda n: 100,
    ],
    ids=["proportional", "fixed part", "maximum of lines", "cheap single sample", "constant"],
)
def test_samples_within_is_the_largest_that_fits(memory, largest):
    for budget in range(1, 1500, 7):
        fitting = [n for n in range(1, largest + 1) if memory(n) <= budget]
        assert samples_within(memory, budget, largest) == max(fitting, default=1)


def test_samples_within_asks_little():
    def asked(budget):
        calls = []
        samples_within(lambda n: calls.append(n) or 10 * n, budget, 40)
        return calls

    assert asked(400) == [40]
    assert asked(205) == [40, 1]


def test_samples_within_needs_a_positive_end():
    with pytest.raises(ValueError, match="largest"):
        samples_within(lambda n: n, 10, 0)


# --- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["denoiser", "decoder", "reward"])
def test_memory_is_linear_in_the_batch(phase, pipeline, reward_model):
    embeds, shape = pipeline.encode_prompt(["a red cat"]), pipeline.latent_shape()

    def predicted(n):
        if phase == "denoiser":
            return denoiser_bytes(pipeline, embeds, shape, 5.0, n)
        return scoring_bytes(pipeline, reward_model if phase == "reward" else None, shape, n)

    values = [predicted(n) for n in (8, 16, 24, 32)]
    slopes = [b - a for a, b in zip(values, values[1:], strict=False)]
    assert min(slopes) > 0 and max(slopes) - min(slopes) <= 0.02 * max(slopes)


def test_guidance_doubles_the_denoiser(pipeline):
    embeds, shape = pipeline.encode_prompt(["a red cat"]), pipeline.latent_shape()
    alone, guided = (denoiser_bytes(pipeline, embeds, shape, w, 16) for w in (1.0, 5.0))
    assert guided == pytest.approx(2 * alone, rel=0.1)


@pytest.fixture(scope="module")
def wider():
    """Large enough that scratch memory of convolutions does not hide the activations."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    return unet, torch.randn(4, 4, 32, 32), torch.randn(4, 8, 16)


@pytest.mark.parametrize(
    ("training", "memory_format"),
    [(False, torch.channels_last), (True, torch.contiguous_format)],
    ids=["sampling, channels last", "training"],
)
def test_prediction_agrees_with_real_allocations(wider, training, memory_format):
    """Measured by torch's profiler: the peak of the running sum of all allocations and releases."""
    unet, latents, text = wider
    unet.to(memory_format=memory_format)

    def run():
        with torch.set_grad_enabled(training):
            output = unet(latents.to(memory_format=memory_format), 501, text).sample
            if training:
                output.square().mean().backward()

    run()  # the first run sets up kernels and makes the gradients
    weights = state_of(unet)
    predicted = peak_activation_bytes(run)
    assert not changed(weights, unet)
    assert predicted == pytest.approx(measured_peak_bytes(run), rel=0.15)


def test_rollout_phases_agree_with_real_allocations(pipeline, reward_model):
    shape, n = pipeline.latent_shape(), 16
    embeds = pipeline.encode_prompt(["a red cat"])
    features = reward_model.encode_prompts(["a red cat"]).repeat(n, 1)
    latents = torch.randn(n, *shape)

    @torch.no_grad()
    def predict():
        pipeline.predict(latents, 501, embeds.repeat(n), 5.0)

    @torch.no_grad()
    def score():
        images = pipeline.decode_latents(latents)
        reward_model.score(images, timesteps=torch.full((n,), 501), text_features=features)

    predict(), score()
    # The tiny UNet's activations are as small as the scratch memory of its convolutions.
    assert denoiser_bytes(pipeline, embeds, shape, 5.0, n) == pytest.approx(measured_peak_bytes(predict), rel=0.25)
    assert scoring_bytes(pipeline, reward_model, shape, n) == pytest.approx(measured_peak_bytes(score), rel=0.15)


@pytest.mark.parametrize("family", FLOW_FAMILIES)
def test_every_flow_family_is_estimated(family, reward_model, tmp_path, monkeypatch):
    """
    Regression: rows of Z-Image were cut by a mask, whose numbers nobody knows in an estimate, so every run of it got small
    chunks and a warning.
    """
    said = []
    monkeypatch.setattr("trl_spo.training.memory.logger.warning", said.append)
    pipeline = wrap_pipeline(FLOW_FAMILIES[family](tmp_path))
    shape, n = pipeline.latent_shape(32, 32), 8
    embeds, latents = pipeline.encode_prompt(["a red cat"]), torch.randn(8, *shape)
    timestep = pipeline.set_timesteps(4, shape)[1]

    @torch.no_grad()
    def predict():
        pipeline.predict(latents, timestep, embeds.repeat(n), 4.0)

    predict()
    assert denoiser_bytes(pipeline, embeds, shape, 4.0, n) == pytest.approx(measured_peak_bytes(predict), rel=0.25)
    largest = denoiser_bytes(pipeline, embeds, shape, 4.0, 24)
    sizes = rollout_chunk_sizes(pipeline, reward_model, embeds, shape, 4.0, largest / GIB, largest=40)
    assert 24 <= sizes[0] < 28 and 1 <= sizes[1] <= 40
    assert not said


def chunk_sizes(pipeline, reward_model, budget_bytes, largest=12, guidance_scale=5.0):
    embeds, shape = pipeline.encode_prompt(["a red cat"]), pipeline.latent_shape()
    return rollout_chunk_sizes(
        pipeline, reward_model, embeds, shape, guidance_scale, budget_bytes / GIB, largest=largest
    )


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_chunk_sizes_fit_and_grow_with_the_budget(family, pipeline, reward_model, tmp_path):
    if family == "sdxl":
        pipeline = wrap_pipeline(tiny_sdxl_pipeline(tmp_path))
    embeds, shape = pipeline.encode_prompt(["a red cat"]), pipeline.latent_shape()
    weights = state_of(pipeline.denoiser)
    most = max(denoiser_bytes(pipeline, embeds, shape, 5.0, 12), scoring_bytes(pipeline, reward_model, shape, 12))
    sizes = [chunk_sizes(pipeline, reward_model, most * part) for part in (0.001, 0.2, 0.5, 0.8, 1.0)]
    assert sizes[0] == (1, 1), "less than one sample cannot be run"
    assert sizes[-1] == (12, 12)
    for column in zip(*sizes, strict=True):
        assert list(column) == sorted(column)
    assert len(set(sizes)) >= 4
    denoiser, scoring = sizes[2]
    assert denoiser_bytes(pipeline, embeds, shape, 5.0, denoiser) <= most / 2
    assert scoring_bytes(pipeline, reward_model, shape, scoring) <= most / 2
    assert scoring_bytes(pipeline, reward_model, shape, scoring + 1) > most / 2
    assert not changed(weights, pipeline.denoiser)
    assert all(type(p) is torch.nn.Parameter and p.grad is None for p in pipeline.denoiser.parameters())


def test_a_callable_reward_counts_the_decoder_alone(pipeline, reward_model):
    budget = 1.001 * scoring_bytes(pipeline, None, pipeline.latent_shape(), 5)
    assert chunk_sizes(pipeline, brightness_reward, budget)[1] == 5


def test_a_reward_that_scores_latents_does_not_pay_for_the_decoder(pipeline):
    class LatentReward(torch.nn.Module):
        scores = "latents"

        def forward(self, latents, prompts, timesteps):
            return latents.mean(dim=(1, 2, 3))

    class LatentRewardWithFeatures(LatentReward):
        def __init__(self):
            super().__init__()
            self.text = torch.nn.Embedding(4, 32)

        def encode_prompts(self, prompts):
            return self.text(torch.tensor([len(prompt) % 4 for prompt in prompts]))

        def score(self, latents, timesteps, text_features):
            return (latents.flatten(1).repeat(1, 1000).sum(1) + text_features.sum(1)).float()

    shape = pipeline.latent_shape()
    assert chunk_sizes(pipeline, LatentReward(), 1000)[1] == 12
    one = scoring_bytes(pipeline, LatentRewardWithFeatures(), shape, 1)
    assert 256 * 1000 * FLOAT <= one < 2.1 * 256 * 1000 * FLOAT
    assert chunk_sizes(pipeline, LatentRewardWithFeatures(), 3.5 * one)[1] == 3


def test_a_model_that_cannot_be_estimated_does_not_end_the_run(pipeline, caplog):
    class DecidesOnValues(torch.nn.Module):
        scores = "images"

        def encode_prompts(self, prompts):
            return torch.ones(len(prompts), 4)

        def score(self, images, timesteps, text_features):
            return images.mean(dim=(1, 2, 3)) * (2 if images.mean() > 0.5 else 1)

    logger = logging.getLogger("diffusers.trl_spo.training.memory")
    root = logging.getLogger("trl_spo.training.memory")
    for one in (logger, root):
        one.addHandler(caplog.handler)
    try:
        assert chunk_sizes(pipeline, DecidesOnValues(), GIB, largest=40) == (40, FALLBACK_CHUNK)
        assert chunk_sizes(pipeline, DecidesOnValues(), GIB, largest=3) == (3, 3)
    finally:
        for one in (logger, root):
            one.removeHandler(caplog.handler)
    assert "decoder and reward cannot be estimated" in caplog.text
    assert "vae_decode_batch_size" in caplog.text


def test_budget_must_be_positive(pipeline):
    with pytest.raises(ValueError, match="budget_gib"):
        chunk_sizes(pipeline, brightness_reward, 0)


def test_chunk_sizes_under_autocast_count_casts(pipeline, reward_model):
    """Half precision activations take about half, and the weights are real and in float32 afterwards."""
    embeds, shape = pipeline.encode_prompt(["a red cat"]), pipeline.latent_shape()
    full = denoiser_bytes(pipeline, embeds, shape, 5.0, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser_bytes(pipeline, embeds, shape, 5.0, 16) < 0.8 * full
        with torch.no_grad():
            output = pipeline.predict(torch.zeros(1, *shape), 501, embeds, 5.0)
    assert not isinstance(output, FakeTensor) and bool(output.isfinite().all())


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_benchmark_predicts_what_it_measures(tmp_path):
    result = main("--preset tiny --dtype float32 --budget 1 --measure --json".split() + [str(tmp_path / "table.json")])
    assert result["fits"] and (tmp_path / "table.json").is_file()
    assert set(result["phases"]) >= {"rollout, UNet", "training step", "training step, checkpointing"}
    for name, phase in result["phases"].items():
        assert phase["predicted"] == pytest.approx(phase["measured"], rel=0.25), name


def test_benchmark_needs_no_memory_for_large_models():
    with pytest.raises(SystemExit):
        main(["--preset", "sd15", "--budget", "0"])
    result = main(["--preset", "sd15", "--budget", "3"])
    assert not result["fits"], "the weights alone take more"
    assert result["weights"]["UNet"] == pytest.approx(859.5e6 * 2, rel=0.001)  # parameters of Stable Diffusion 1.5


@pytest.fixture(scope="module")
def flow_table():
    """What the program of docs/flow_models.md says, of the models that the page sends to cards of 24 and 40 GB."""
    return flow_memory.main(["--models", "sd3.5-medium", "flux2-klein-4b", "flux.1-dev"])


class TestFlowModels:
    """The published shapes. Regression: the program ended in an error, as shapes without values were refused."""

    def test_the_table_of_the_page_is_what_the_program_says(self, flow_table):
        page = (Path(__file__).parent.parent / "docs" / "flow_models.md").read_text()
        lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
        header = next(cells for cells in lines if cells[0] == "GiB")
        rows = {cells[0]: cells[1:] for cells in lines if len(cells) == len(header)}
        names = {
            "encoders stay": "**peak**, encoders on the device",
            "encoders offloaded": "**peak**, `offload_text_encoders: true`",
            "nf4, encoders offloaded": "**peak**, the same with an nf4 base",
        }
        for model, values in flow_table.items():
            column = header.index(model) - 1
            for name, value in values.items():
                assert rows[names.get(name, name)][column] == f"{value:.1f}", (model, name)

    def test_they_fit_the_cards_that_the_page_names(self, flow_table):
        """Text encoders wait on the CPU. A tenth of 24 GiB is left for workspaces, 3 GiB of 40."""
        assert flow_table["sd3.5-medium"]["encoders offloaded"] < 0.9 * 24
        assert flow_table["flux2-klein-4b"]["encoders offloaded"] < 0.9 * 24
        assert flow_table["flux.1-dev"]["encoders offloaded"] < 40 - 3
        assert flow_table["flux.1-dev"]["nf4, encoders offloaded"] < 0.9 * 24


class TestFreeMemory:
    """On CUDA, chunk sizes come from the bytes that are free; here they are told."""

    def trainer(self, tmp_path, **settings):
        config = tiny_spo_config(tmp_path / "out", use_cpu=True, **settings)
        return SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)

    def test_little_memory_makes_small_chunks(self, tmp_path):
        """
        A share of what is left beside gradients and moments, three times what is trained, holds the chunks, and twice the
        chunks would not fit; ample memory gives as many samples as keep the device busy, and no more.
        """
        trainer = self.trainer(tmp_path)
        embeds, pipeline = trainer._encode(PROMPTS[:1]), trainer.pipeline
        shape = pipeline.latent_shape()
        coming = 3 * 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        needs = {n: denoiser_bytes(pipeline, embeds, shape, 3.0, n) for n in (4, 8)}
        free = coming + int(1.5 * needs[4] / 0.8)
        assert needs[4] < rollout_budget_gib(free, trainer.model) * GIB < needs[8]
        sizes = trainer._choose_chunk_sizes(embeds, free=free)
        assert sizes["rollout_micro_batch_size"] == 4
        images = sizes["vae_decode_batch_size"]
        budget = rollout_budget_gib(free, trainer.model) * GIB
        assert scoring_bytes(pipeline, trainer.reward, shape, images) <= budget
        assert scoring_bytes(pipeline, trainer.reward, shape, 2 * images) > budget
        ample = trainer._choose_chunk_sizes(embeds, free=2**45)
        busy = busy_chunk_sizes("cpu", 8 * 8, 16 * 16)
        assert busy == (2**15 // 64, 2**16 // 256) == tuple(ample.values())[:2]

    def test_no_memory_at_all_is_one_sample(self, tmp_path):
        trainer = self.trainer(tmp_path)
        sizes = trainer._choose_chunk_sizes(trainer._encode(PROMPTS[:1]), free=0)
        assert set(sizes.values()) == {1}

    def test_smaller_images_go_through_in_larger_chunks(self, tmp_path):
        """Half the side is a quarter of the pixels; more than the image has is none of it."""
        sizes = [
            self.trainer(tmp_path, scoring_image_size=size)._choose_chunk_sizes(None)["vae_decode_batch_size"]
            for size in (None, 8, 64)
        ]
        assert sizes == [256, 1024, 256]

    def test_sizes_by_device(self):
        """Stable Diffusion 1.5 and XL on a GPU."""
        assert busy_chunk_sizes("cuda", 64 * 64, 512 * 512) == (64, 32)
        assert busy_chunk_sizes("cuda", 128 * 128, 1024 * 1024) == (16, 8)
        assert busy_chunk_sizes("cuda", 2**20, 2**30) == (1, 1)
