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
Why this file exists: the reward model learns only what this path shows it. A tie counted as a preference, an unlabelled
row counted as a tie, noise that differs within a pair or a broken picture that ends an eight-hour run are all silent in
the loss curve. The tests work out labels, weights, crops and the noised pair by hand.
"""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from trl_spo import wrap_pipeline
from trl_spo.step_preference_data import (
    StepPreferenceCollator,
    find_preference_columns,
    image_to_tensor,
    noised_pair_images,
    prepare_preference_dataset,
)

from .testing_utils import PROMPTS, changed, state_of, tiny_sd_pipeline, tiny_sdxl_pipeline


def picture(color, size=(16, 16)):
    return Image.new("RGB", size, color)


def png(color, size=(16, 16)):
    buffer = io.BytesIO()
    picture(color, size).save(buffer, format="PNG")
    return buffer.getvalue()


def pickapic_row(**changes):
    row = {
        "caption": "a red cat",
        "jpg_0": png("red"),
        "jpg_1": png("blue"),
        "label_0": 1.0,
        "label_1": 0.0,
        "has_label": True,
        "num_example_per_prompt": 4,
        "ranking_id": 7,
    }
    return {**row, **changes}


def trl_row(**changes):
    return {"prompt": "a dog", "chosen": picture("red"), "rejected": picture("blue"), **changes}


RED = torch.tensor([1.0, -1.0, -1.0])
BLUE = torch.tensor([-1.0, -1.0, 1.0])


class TestCollator:
    def test_pickapic(self):
        rows = [
            pickapic_row(),
            pickapic_row(label_0=0.0, label_1=1.0, num_example_per_prompt=1),
            pickapic_row(label_0=0.5, label_1=0.5, num_example_per_prompt=2),
        ]
        batch = StepPreferenceCollator(16)(rows)
        assert batch["prompts"] == ["a red cat"] * 3
        assert batch["label_0"].tolist() == [1, 0, 0.5] and batch["label_1"].tolist() == [0, 1, 0.5]
        assert batch["weights"].tolist() == [0.25, 1, 0.5]
        assert batch["images_0"].shape == (3, 3, 16, 16)
        assert torch.equal(batch["images_0"][1, :, 5, 5], RED)
        assert torch.equal(batch["images_1"][1, :, 5, 5], BLUE)

    @pytest.mark.parametrize("kind", ["pil", "bytes", "dict"])
    def test_trl_format_prefers_the_chosen(self, kind):
        convert = {"pil": picture, "bytes": png, "dict": lambda color: {"bytes": png(color), "path": None}}[kind]
        batch = StepPreferenceCollator(16)([trl_row(chosen=convert("red"), rejected=convert("blue"))])
        assert batch["prompts"] == ["a dog"]
        assert (batch["label_0"].item(), batch["label_1"].item(), batch["weights"].item()) == (1, 0, 1)
        assert torch.equal(batch["images_0"][0, :, 3, 3], RED)

    def test_grey_and_transparent_images_become_rgb(self):
        rows = [trl_row(chosen=Image.new("L", (16, 16), 255), rejected=Image.new("RGBA", (16, 16), (0, 0, 255, 255)))]
        batch = StepPreferenceCollator(16)(rows)
        assert batch["images_0"].eq(1).all()
        assert torch.equal(batch["images_1"][0, :, 0, 0], BLUE)

    def test_broken_images_are_skipped_and_counted(self):
        collator = StepPreferenceCollator(16, max_bad_image_fraction=0.05)
        half = png("red", (64, 64))[:90]
        batch = collator([pickapic_row(jpg_1=b"no image"), pickapic_row(caption="kept"), pickapic_row(jpg_0=half)])
        assert batch["prompts"] == ["kept"]
        assert (collator.num_bad, collator.num_seen) == (2, 3)

    def test_too_many_broken_images_stop_the_run(self):
        """With a limit of 2% the first hundred pairs may hold two bad ones, not three."""
        collator = StepPreferenceCollator(16, max_bad_image_fraction=0.02)
        for _ in range(2):
            collator([pickapic_row(jpg_0=b""), pickapic_row()])
        with pytest.raises(ValueError, match="3 of 5 pairs have an unreadable image"):
            collator([pickapic_row(jpg_0=b"")])

    def test_a_batch_without_a_good_pair_weighs_nothing(self):
        batch = StepPreferenceCollator(16)([pickapic_row(jpg_0=b"")])
        assert batch["weights"].tolist() == [0]
        assert batch["images_0"].shape == (1, 3, 16, 16)

    def test_unlabelled_rows_are_no_ties(self):
        collator = StepPreferenceCollator(16)
        batch = collator(
            [pickapic_row(has_label=False), pickapic_row(label_0=0.0, has_label=None), pickapic_row(caption="kept")]
        )
        assert batch["prompts"] == ["kept"] and collator.num_unlabelled == 2

    def test_resize_and_crop(self):
        """A 40 x 20 picture, left half red: at 10 px it becomes 20 x 10, and columns 5 to 14 stay; red ends at 10."""
        image = picture("blue", (40, 20))
        image.paste((255, 0, 0), (0, 0, 20, 20))
        tensor = image_to_tensor(image, 10)
        assert tensor.shape == (3, 10, 10)
        assert tensor[:, 4, 2].tolist() == RED.tolist() and tensor[:, 4, 7].tolist() == BLUE.tolist()
        ramp = Image.fromarray(np.array([[[0] * 3, [51] * 3, [255] * 3]], dtype=np.uint8).repeat(3, axis=0))
        torch.testing.assert_close(image_to_tensor(ramp, 3)[0, 0], torch.tensor([-1.0, -0.6, 1.0]))


class TestDataset:
    @pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
    def test_unlabelled_rows_are_dropped(self, kind):
        rows = [pickapic_row(), pickapic_row(has_label=False), pickapic_row(label_0=0.0), pickapic_row(caption="kept")]
        dataset = rows if kind == "list" else datasets.Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if kind == "stream" else dataset
        assert [row["caption"] for row in prepare_preference_dataset(dataset)] == ["a red cat", "kept"]

    def test_images_stay_undecoded_so_that_a_broken_one_can_be_skipped(self):
        rows = [trl_row(), trl_row(prompt="broken")]
        dataset = datasets.Dataset.from_list(
            [
                {"prompt": r["prompt"], "chosen": {"bytes": png("red")}, "rejected": {"bytes": png("blue")}}
                for r in rows
            ]
        )
        dataset = dataset.map(lambda row, i: {"chosen": {"bytes": b"?" if i else png("red")}}, with_indices=True)
        features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
        dataset = prepare_preference_dataset(dataset.cast(datasets.Features(features)))
        assert StepPreferenceCollator(16)(list(dataset))["prompts"] == ["a dog"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "empty"),
            ([{"prompt": "a", "chosen": picture("red")}], "needs the columns"),
            ([{"chosen": picture("red"), "rejected": picture("red")}], "no prompt column"),
            ([trl_row(chosen="text answer")], "Column `chosen` does not hold images"),
            ([trl_row(prompt=[{"role": "user"}])], "Column `prompt` must hold strings"),
            ([pickapic_row(has_label=False)], "No row"),
            ([pickapic_row(), pickapic_row(label_0=1.0, label_1=1.0)], "row 1 has 1.0 and 1.0"),
            ([pickapic_row(label_0=2.0, label_1=-1.0)], "sum to 1"),
            ([pickapic_row(label_0=float("nan"))], "sum to 1"),
        ],
    )
    def test_unusable_data_is_told_in_one_sentence(self, rows, message):
        with pytest.raises(ValueError, match=message):
            prepare_preference_dataset(rows)

    def test_prompt_column(self):
        assert find_preference_columns(["chosen", "rejected", "text"], "text").prompt == "text"
        assert (
            find_preference_columns(["jpg_0", "jpg_1", "label_0", "label_1", "caption", "prompt"]).prompt == "caption"
        )
        with pytest.raises(ValueError, match="dataset_prompt_column"):
            find_preference_columns(["chosen", "rejected", "prompt"], "text")


def batch_of(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompts": PROMPTS[:size],
        "images_0": torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1,
        "images_1": torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1,
    }


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path_factory.mktemp("sd")))


class TestNoisedPairs:
    def test_against_the_pipeline_by_hand(self, pipeline):
        """
        Steps 1 to 4 for one pair, written with the raw diffusers components: x_t = sqrt(a) x_0 + sqrt(1 - a) e, guided
        prediction with w = 3, x0 = (x_t - sqrt(1 - a) e_hat) / sqrt(a).
        """
        batch, sd, t = batch_of(1), pipeline.sd_pipeline, torch.tensor([601])
        generator = seeded()
        both = torch.cat([batch["images_0"], batch["images_1"]])
        with torch.no_grad():
            posterior = sd.vae.encode(both).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(2, 4, 8, 8, generator=generator)
            latents = latents * sd.vae.config.scaling_factor
            noise = torch.randn(1, 4, 8, 8, generator=generator)
            a = sd.scheduler.alphas_cumprod[601]
            noised = a.sqrt() * latents + (1 - a).sqrt() * noise
            cond, uncond = sd.encode_prompt(batch["prompts"], "cpu", 1, True, negative_prompt=["a blue dog"])
            outputs = [sd.unet(noised, 601, text.expand(2, -1, -1)).sample for text in (uncond, cond)]
            predicted = (noised - (1 - a).sqrt() * (outputs[0] + 3 * (outputs[1] - outputs[0]))) / a.sqrt()
            expected = sd.vae.decode(predicted / sd.vae.config.scaling_factor).sample
        images = noised_pair_images(pipeline, batch, t, 3.0, seeded(), negative_prompt="a blue dog")
        torch.testing.assert_close(torch.cat(images), expected, rtol=1e-4, atol=1e-4)

    def test_both_images_of_a_pair_see_the_same_noise_and_timestep(self, pipeline, monkeypatch):
        calls = []
        add_noise = pipeline.add_noise
        monkeypatch.setattr(pipeline, "add_noise", lambda *args: calls.append(args) or add_noise(*args))
        noised_pair_images(pipeline, batch_of(3), torch.tensor([1, 501, 999]), 5.0, seeded())
        ((_, noise, timesteps),) = calls
        assert torch.equal(noise[0::2], noise[1::2])
        assert timesteps.tolist() == [1, 1, 501, 501, 999, 999]
        assert not torch.equal(noise[0], noise[2])

    def test_equal_images_stay_equal_without_vae_sampling(self, pipeline, monkeypatch):
        batch = batch_of(2)
        batch["images_1"] = batch["images_0"].clone()
        encode = pipeline.vae.encode
        monkeypatch.setattr(
            pipeline, "encode_images", lambda images, generator=None: encode(images).latent_dist.mode()
        )
        images_0, images_1 = noised_pair_images(pipeline, batch, torch.tensor([300, 800]), 5.0, seeded())
        torch.testing.assert_close(images_0, images_1)

    def test_timestep_zero_is_the_clean_image(self, pipeline):
        batch = batch_of(2)
        images_0, images_1 = noised_pair_images(pipeline, batch, torch.tensor([0, 400]), 5.0, seeded())
        assert torch.equal(images_0[0], batch["images_0"][0]) and torch.equal(images_1[0], batch["images_1"][0])
        assert not torch.allclose(images_0[1], batch["images_0"][1], atol=0.1)
        clean = noised_pair_images(pipeline, batch, torch.tensor([0, 0]), 5.0, seeded())
        assert torch.equal(clean[0], batch["images_0"])

    def test_the_batch_is_left_alone_and_the_seed_decides(self, pipeline):
        batch = batch_of(2)
        before = {name: value.clone() for name, value in batch.items() if name != "prompts"}
        weights = state_of(pipeline.denoiser)
        t = torch.tensor([900, 900])
        first = noised_pair_images(pipeline, batch, t, 5.0, seeded(1))
        again = noised_pair_images(pipeline, batch, t, 5.0, seeded(1))
        other = noised_pair_images(pipeline, batch, t, 5.0, seeded(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], other[0])
        assert all(torch.equal(batch[name], value) for name, value in before.items())
        assert not changed(weights, pipeline.denoiser)
        assert not first[0].requires_grad

    def test_small_chunks_give_the_same_images(self, pipeline):
        batch, t = batch_of(3), torch.tensor([700, 0, 200])
        whole = noised_pair_images(pipeline, batch, t, 5.0, seeded())
        chunked = noised_pair_images(pipeline, batch, t, 5.0, seeded(), prediction_batch_size=1)
        torch.testing.assert_close(whole[0], chunked[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole[1], chunked[1], rtol=1e-4, atol=1e-4)

    def test_sdxl(self, tmp_path):
        pipeline = wrap_pipeline(tiny_sdxl_pipeline(tmp_path))
        images_0, images_1 = noised_pair_images(pipeline, batch_of(2), torch.tensor([5, 990]), 5.0, seeded())
        assert images_0.shape == images_1.shape == (2, 3, 16, 16)
        assert images_0.isfinite().all() and not torch.allclose(images_0, images_1)

    @pytest.mark.parametrize(
        ("timesteps", "message"),
        [(torch.tensor([1]), "2 integers"), (torch.tensor([1.0, 2.0]), "integers"), (torch.tensor([1, 1000]), "1000")],
    )
    def test_wrong_timesteps_are_named(self, pipeline, timesteps, message):
        with pytest.raises(ValueError, match=message):
            noised_pair_images(pipeline, batch_of(2), timesteps)
