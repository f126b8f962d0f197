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
import logging
import math
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from trl_spo import StepAwareRewardModel, StepRewardConfig, StepRewardTrainer, wrap_pipeline
from trl_spo.images import image_to_tensor, read_image
from trl_spo.noised_pairs import noised_pairs
from trl_spo.pipelines.encoding_cache import EncodingCache
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.preference_dataset import (
    check_images,
    find_preference_columns,
    load_preference_dataset,
    prepare_preference_dataset,
)
from trl_spo.preference_filters import GapRule, filter_consistent_pairs
from trl_spo.preference_labels import preference_labels, relabel_preferences, score_clean_images

from .testing_utils import PROMPTS, changed, state_of, tiny_clip, tiny_sd_pipeline, tiny_sdxl_pipeline


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


def jpeg(color, size=(24, 16)):
    buffer = io.BytesIO()
    picture(color, size).save(buffer, format="JPEG")
    return buffer.getvalue()


def pickapic_table(count, **columns):
    """The columns of Pick-a-Pic v1, with real JPEG bytes; `columns` replaces whole columns."""
    red = [i % 3 != 0 for i in range(count)]  # the first image is the red one, and wins
    table = {
        "are_different": [True] * count,
        "best_image_uid": [f"uid-{i}-{0 if first else 1}" for i, first in enumerate(red)],
        "caption": [PROMPTS[i % len(PROMPTS)] for i in range(count)],
        "created_at": [0] * count,
        "has_label": [True] * count,
        "image_0_uid": [f"uid-{i}-0" for i in range(count)],
        "image_0_url": [""] * count,
        "image_1_uid": [f"uid-{i}-1" for i in range(count)],
        "image_1_url": [""] * count,
        "jpg_0": [jpeg("red" if first else "blue") for first in red],
        "jpg_1": [jpeg("blue" if first else "red") for first in red],
        "label_0": [float(first) for first in red],
        "label_1": [float(not first) for first in red],
        "model_0": ["a model"] * count,
        "model_1": ["a model"] * count,
        "ranking_id": list(range(count)),
        "user_id": [1] * count,
        "num_example_per_prompt": [2] * count,
        "__index_level_0__": list(range(count)),
    }
    return pa.table({**table, **columns})


def truncated(images, rows):
    return [image[: len(image) * 2 // 3] if i in rows else image for i, image in enumerate(images)]


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_datasets")


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


def transparent(mode: str) -> Image.Image:
    """Two pixels: red that is left over under full transparency, and opaque blue; in "LA" and the like black and white."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    if mode in ("LA", "La"):
        image = Image.new("LA", (2, 1), (0, 0))
        image.putpixel((1, 0), (255, 255))
    if mode == "P":  # a palette that has alpha
        paletted = Image.new("P", (2, 1))
        paletted.putpalette([255, 0, 0, 0, 0, 0, 255, 255], "RGBA")
        paletted.putpixel((1, 0), 1)
        return paletted
    return image if image.mode == mode else image.convert(mode)


def with_key(mode: str, values: tuple, key) -> bytes:
    """A PNG of two pixels in which one colour stands for transparency."""
    image = Image.new(mode, (2, 1), values[0])
    image.putpixel((1, 0), values[1])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=key)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


GREEN = (0, 128, 0)  # "green" of HTML


class TestTransparency:
    """Programs leave any colour under transparent pixels, and a reward model must not learn from what nobody sees."""

    @pytest.mark.parametrize("mode", ["RGBA", "RGBa", "P", "LA", "La"])
    def test_the_background_shows_through(self, mode):
        opaque = (255,) * 3 if mode in ("LA", "La") else (0, 0, 255)
        image = transparent(mode)
        assert pixels(read_image(image)) == [(255, 255, 255), opaque]
        assert pixels(read_image(image, "green")) == [GREEN, opaque]

    @pytest.mark.parametrize(
        ("content", "opaque"),
        [
            (with_key("RGB", ((9, 9, 9), (0, 0, 255)), (9, 9, 9)), (0, 0, 255)),
            (with_key("L", (7, 100), 7), (100, 100, 100)),
            (with_key("1", (0, 1), 0), (255, 255, 255)),
            (with_key("P", (0, 1), 0), None),
            (with_key("I;16", (300, 257 * 80), 300), (80, 80, 80)),
        ],
        ids=["RGB", "L", "1", "P", "I;16"],
    )
    def test_a_colour_that_stands_for_transparency(self, content, opaque):
        first, second = pixels(read_image(content, "green"))
        assert first == GREEN and (second == opaque if opaque is not None else second != GREEN)

    def test_half_transparent_pixels_are_mixed(self):
        """Blue at alpha 51 of 255, a fifth, on white: 0.2 x 0 + 0.8 x 255 = 204 of red and green, and 255 of blue."""
        image = Image.new("RGBA", (1, 1), (0, 0, 255, 51))
        assert read_image(image).getpixel((0, 0)) == (204, 204, 255)
        assert read_image(image, "black").getpixel((0, 0)) == (0, 0, 51)

    def test_nothing_bleeds_at_edges_when_an_image_is_made_smaller(self):
        """Red under transparent pixels beside white ones: laid on white first, the smaller image is white all over."""
        image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
        image.paste((255, 255, 255, 255), (5, 0, 16, 16))
        assert image_to_tensor(read_image(image), 7).eq(1).all()

    def test_every_reader_of_pairs_takes_the_background_of_the_config(self, tmp_path):
        """The training, the labels of a preference model, and filters see one picture: green where nothing is."""
        clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
        rows = [pickapic_row(jpg_0=clear, jpg_1=png("blue"))]
        green = torch.tensor(GREEN).view(3, 1, 1) / 127.5 - 1

        settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "resolution": 16}
        reward_model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path / "clip"))
        pipeline = tiny_sd_pipeline(tmp_path / "pipeline")
        for colour, expected in (({}, 1.0), ({"image_background": "green"}, green)):
            trainer = StepRewardTrainer(StepRewardConfig(**settings, **colour), pipeline, reward_model, rows)
            images = next(iter(trainer.get_train_dataloader()))["images_0"]
            assert images.sub(expected).abs().max() < 1e-6

        seen = []

        def look(images, prompts):
            seen.append(images[0] * 2 - 1)
            return torch.arange(len(images), 0, -1)

        relabel_preferences(rows, look, resolution=8, background="green")
        filter_consistent_pairs(rows, {"x": look}, {"x": GapRule(-9, 9)}, resolution=8, background="green")
        assert len(seen) == 2 and all(image.sub(green).abs().max() < 1e-6 for image in seen)

    def test_a_background_must_be_a_colour(self):
        for act in (
            lambda: read_image(picture("red"), "whitish"),
            lambda: StepPreferenceCollator(16, background="#fff0"),
            lambda: filter_consistent_pairs([pickapic_row()], {"x": "x"}, {"x": (0, 1)}, background=""),
        ):
            with pytest.raises(ValueError, match="An opaque colour is needed, such as 'white'"):
                act()


class TestDataset:
    @pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
    def test_unlabelled_rows_are_dropped(self, kind):
        rows = [pickapic_row(), pickapic_row(has_label=False), pickapic_row(label_0=0.0), pickapic_row(caption="kept")]
        dataset = rows if kind == "list" else datasets.Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if kind == "stream" else dataset
        assert [row["caption"] for row in prepare_preference_dataset(dataset)] == ["a red cat", "kept"]

    @pytest.mark.parametrize("format", ["torch", "numpy"])
    def test_a_formatted_dataset(self, format):
        """Numbers are tensors or numpy's then."""
        row = {**pickapic_row(num_example_per_prompt=4), "jpg_0": png("red"), "jpg_1": png("blue")}
        dataset = prepare_preference_dataset(datasets.Dataset.from_list([row]).with_format(format))
        assert StepPreferenceCollator(16)(list(dataset))["weights"].tolist() == [0.25]

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
        images = noised_pairs(pipeline, batch, t, 3.0, seeded(), negative_prompt="a blue dog")
        torch.testing.assert_close(torch.cat(images), expected, rtol=1e-4, atol=1e-4)

    def test_both_images_of_a_pair_see_the_same_noise_and_timestep(self, pipeline, monkeypatch):
        calls = []
        add_noise = pipeline.add_noise
        monkeypatch.setattr(pipeline, "add_noise", lambda *args: calls.append(args) or add_noise(*args))
        noised_pairs(pipeline, batch_of(3), torch.tensor([1, 501, 999]), 5.0, seeded())
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
        images_0, images_1 = noised_pairs(pipeline, batch, torch.tensor([300, 800]), 5.0, seeded())
        torch.testing.assert_close(images_0, images_1)

    def test_timestep_zero_is_the_clean_image(self, pipeline):
        batch = batch_of(2)
        images_0, images_1 = noised_pairs(pipeline, batch, torch.tensor([0, 400]), 5.0, seeded())
        assert torch.equal(images_0[0], batch["images_0"][0]) and torch.equal(images_1[0], batch["images_1"][0])
        assert not torch.allclose(images_0[1], batch["images_0"][1], atol=0.1)
        clean = noised_pairs(pipeline, batch, torch.tensor([0, 0]), 5.0, seeded())
        assert torch.equal(clean[0], batch["images_0"])

    def test_the_batch_is_left_alone_and_the_seed_decides(self, pipeline):
        batch = batch_of(2)
        before = {name: value.clone() for name, value in batch.items() if name != "prompts"}
        weights = state_of(pipeline.denoiser)
        t = torch.tensor([900, 900])
        first = noised_pairs(pipeline, batch, t, 5.0, seeded(1))
        again = noised_pairs(pipeline, batch, t, 5.0, seeded(1))
        other = noised_pairs(pipeline, batch, t, 5.0, seeded(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], other[0])
        assert all(torch.equal(batch[name], value) for name, value in before.items())
        assert not changed(weights, pipeline.denoiser)
        assert not first[0].requires_grad

    def test_small_chunks_give_the_same_images(self, pipeline):
        batch, t = batch_of(3), torch.tensor([700, 0, 200])
        whole = noised_pairs(pipeline, batch, t, 5.0, seeded())
        chunked = noised_pairs(pipeline, batch, t, 5.0, seeded(), prediction_batch_size=1)
        torch.testing.assert_close(whole[0], chunked[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole[1], chunked[1], rtol=1e-4, atol=1e-4)

    def test_sdxl(self, tmp_path):
        pipeline = wrap_pipeline(tiny_sdxl_pipeline(tmp_path))
        images_0, images_1 = noised_pairs(pipeline, batch_of(2), torch.tensor([5, 990]), 5.0, seeded())
        assert images_0.shape == images_1.shape == (2, 3, 16, 16)
        assert images_0.isfinite().all() and not torch.allclose(images_0, images_1)

    @pytest.mark.parametrize(
        ("timesteps", "message"),
        [(torch.tensor([1]), "2 integers"), (torch.tensor([1.0, 2.0]), "integers"), (torch.tensor([1, 1000]), "1000")],
    )
    def test_wrong_timesteps_are_named(self, pipeline, timesteps, message):
        with pytest.raises(ValueError, match=message):
            noised_pairs(pipeline, batch_of(2), timesteps)


class TestLoading:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_parquet_file_in_the_schema_of_pickapic(self, tmp_path, streaming):
        """Row 2 lacks its label, row 4's second image is cut off, row 5's first is missing: three batches of two."""
        table = pickapic_table(7, has_label=[i != 2 for i in range(7)])
        images_1 = truncated(table["jpg_1"].to_pylist(), {4})
        images_0 = [None if i == 5 else image for i, image in enumerate(table["jpg_0"].to_pylist())]
        table = pickapic_table(7, has_label=table["has_label"], jpg_0=images_0, jpg_1=images_1)
        pq.write_table(table, tmp_path / "pairs.parquet")
        dataset = load_preference_dataset(tmp_path / "pairs.parquet", streaming=streaming)
        assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
        rows = list(prepare_preference_dataset(dataset))
        assert [row["ranking_id"] for row in rows] == [0, 1, 3, 4, 5, 6]
        collator = StepPreferenceCollator(16, max_bad_image_fraction=0.02)  # of a hundred: two may be bad
        batches = [collator(rows[i : i + 2]) for i in (0, 2, 4)]
        assert (collator.num_seen, collator.num_bad) == (6, 2)
        assert [batch["label_0"].tolist() for batch in batches] == [[0, 1], [0], [0]]
        for batch in batches:
            preferred = torch.where(batch["label_0"].bool()[:, None, None, None], batch["images_0"], batch["images_1"])
            assert preferred[:, 0].min() > 0.9 and preferred[:, 2].max() < -0.9  # the red one
            assert batch["weights"].tolist() == [0.5] * len(batch["prompts"])

    def test_a_folder_as_the_hub_lays_it_out(self, tmp_path):
        for split, start in (("train", 0), ("validation", 10), ("validation_unique", 20)):
            for shard in range(2):
                table = pickapic_table(1, ranking_id=[start + shard])
                (tmp_path / "data").mkdir(exist_ok=True)
                pq.write_table(table, tmp_path / "data" / f"{split}-0000{shard}-of-00002-abc.parquet")
        assert load_preference_dataset(tmp_path)["ranking_id"][:] == [0, 1]
        assert load_preference_dataset(str(tmp_path), "validation")["ranking_id"][:] == [10, 11]
        stream = load_preference_dataset(tmp_path, "validation_unique", streaming=True)
        assert [row["ranking_id"] for row in stream] == [20, 21]
        for streaming in (False, True):
            with pytest.raises(ValueError, match="split.*test.*validation_unique"):
                load_preference_dataset(tmp_path, "test", streaming=streaming)

    def test_some_shards_of_a_dataset_whose_page_counts_all_rows(self, tmp_path):
        """Regression: `datasets` compares with the `README.md` of the Hub, and refuses who downloaded one shard of 645."""
        (tmp_path / "data").mkdir()
        pq.write_table(pickapic_table(2), tmp_path / "data" / "train-00000-of-00645.parquet")
        header = "dataset_info:\n  splits:\n  - name: train\n    num_examples: 583747\n  - name: test\n    num_examples: 5\n"
        (tmp_path / "README.md").write_text(f"---\n{header}---\n")
        assert len(load_preference_dataset(tmp_path)) == 2

    def test_other_folders(self, tmp_path):
        for part in ("a", "b"):
            (tmp_path / "parts" / part).mkdir(parents=True)
            pq.write_table(pickapic_table(1, caption=[part]), tmp_path / "parts" / part / "0.parquet")
        assert load_preference_dataset(tmp_path / "parts")["caption"][:] == ["a", "b"]
        datasets.DatasetDict({"train": datasets.Dataset(pickapic_table(3))}).save_to_disk(tmp_path / "saved")
        assert len(load_preference_dataset(tmp_path / "saved")) == 3
        with pytest.raises(ValueError, match=r"saved' has no split 'test'; it has \['train'\]"):
            load_preference_dataset(tmp_path / "saved", "test")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_parquet_file_is_known_by_its_ending_and_must_be_whole(self, tmp_path, streaming):
        """Regression: in capital letters it was no file, and a download that was cut off was an error of pyarrow."""
        pq.write_table(pickapic_table(2), tmp_path / "PAIRS.PARQUET")
        dataset = load_preference_dataset(tmp_path / "PAIRS.PARQUET", streaming=streaming)
        assert [row["caption"] for row in dataset] == pickapic_table(2)["caption"].to_pylist()
        content = (tmp_path / "PAIRS.PARQUET").read_bytes()
        (tmp_path / "half.parquet").write_bytes(content[: len(content) // 2])
        with pytest.raises(
            ValueError, match="half.parquet' is not a whole parquet file .* Download or write it again"
        ):
            load_preference_dataset(tmp_path / "half.parquet", streaming=streaming)

    def test_a_hub_id_reaches_load_dataset(self, monkeypatch):
        calls = []
        stream = datasets.Dataset.from_dict({"caption": ["a cat"]}).to_iterable_dataset()

        def load(*args, **kwargs):
            calls.append((args, kwargs))
            return stream

        monkeypatch.setattr("trl_spo.prompts.load_dataset", load)
        assert load_preference_dataset("yuvalkirstain/pickapic_v1", "test_unique", streaming=True) is stream
        assert calls == [(("yuvalkirstain/pickapic_v1",), {"split": "test_unique", "streaming": True})]

    @pytest.mark.parametrize(
        "name", ["nowhere.parquet", "nowhere.csv", "./nowhere", "/nowhere/pairs", "data/of/nowhere"]
    )
    def test_a_missing_path_is_not_sought_on_the_hub(self, name, monkeypatch):
        monkeypatch.setattr("trl_spo.prompts.load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_preference_dataset(name)


class TestFilters:
    @pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
    def test_only_different(self, kind):
        rows = [pickapic_row(are_different=i != 1, ranking_id=i) for i in range(3)]
        dataset = rows if kind == "list" else datasets.Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if kind == "stream" else dataset
        assert [row["ranking_id"] for row in prepare_preference_dataset(dataset)] == [0, 1, 2]
        assert [row["ranking_id"] for row in prepare_preference_dataset(dataset, only_different=True)] == [0, 2]

    @pytest.mark.parametrize("kind", ["list", "dataset"])
    def test_pairs_per_prompt_are_counted_after_the_other_filters(self, kind):
        """Prompts a a b a a b; the first a has no label. At most two of each: rows 1, 2, 3, 5."""
        rows = [pickapic_row(caption=c, ranking_id=i, has_label=i > 0) for i, c in enumerate("aabaab")]
        dataset = rows if kind == "list" else datasets.Dataset.from_list(rows)
        dataset = prepare_preference_dataset(dataset, max_pairs_per_prompt=2)
        assert [row["ranking_id"] for row in dataset] == [1, 2, 3, 5]
        assert [row["num_example_per_prompt"] for row in dataset] == [4] * 4

    def test_filters_that_cannot_work_say_so(self):
        stream = datasets.Dataset.from_list([pickapic_row()]).to_iterable_dataset()
        with pytest.raises(ValueError, match="cannot filter a stream"):
            prepare_preference_dataset(stream, max_pairs_per_prompt=1)
        with pytest.raises(ValueError, match="needs the column `are_different`"):
            prepare_preference_dataset([pickapic_row()], only_different=True)
        with pytest.raises(ValueError, match="passes the filter"):
            prepare_preference_dataset([pickapic_row(are_different=False)], only_different=True)


class TestCheckImages:
    def table(self, bad_0=(), bad_1=(), count=40):
        table = pickapic_table(count)
        return datasets.Dataset(
            pickapic_table(
                count,
                jpg_0=truncated(table["jpg_0"].to_pylist(), bad_0),
                jpg_1=truncated(table["jpg_1"].to_pylist(), bad_1),
            )
        )

    @pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
    def test_too_many_bad_images_are_told_in_one_sentence(self, kind):
        """Rows 3, 7 and 8 of 40 are cut off, row 7 twice: 3 rows, more than 5% of 40."""
        dataset = self.table({3, 7}, {7, 8})
        where = "from the beginning of the stream" if kind == "stream" else "spread over 40"
        dataset = {"list": list, "dataset": lambda d: d, "stream": datasets.Dataset.to_iterable_dataset}[kind](dataset)
        with pytest.raises(ValueError) as error:
            check_images(dataset, 100, 0.05)
        for part in (f"3 of the 40 rows checked ({where})", "2 in `jpg_0`, 2 in `jpg_1`", "first: row 3", "0.05"):
            assert part in str(error.value)

    def test_few_bad_images_are_reported_and_tolerated(self, caplog):
        with caplog.at_level(logging.WARNING):
            bad = check_images(self.table({3}), 100, 0.05)
        assert [(entry.index, entry.column) for entry in bad] == [(3, "jpg_0")] and "runcated" in bad[0].error
        assert "1 of the 40 rows" in caplog.text
        assert check_images(self.table(), 100, 0.0) == []

    def test_the_sample_is_spread_evenly(self):
        """5 of 40 rows are 0, 8, 16, 24, 32; of a stream the first five."""
        dataset = self.table({4, 16, 33})
        assert [entry.index for entry in check_images(dataset, 5, 1.0)] == [16]
        assert [entry.index for entry in check_images(dataset.to_iterable_dataset(), 5, 1.0)] == [4]

    @pytest.mark.parametrize(("limit", "readable"), [(1000, True), (399, False), (100, False)])
    def test_decompression_bombs_are_bad_images(self, limit, readable, monkeypatch):
        """A picture of 20 x 20 = 400 pixels: PIL itself refuses only beyond twice its limit, and warns before."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        rows = [pickapic_row(jpg_0=png("red", (20, 20)), jpg_1=png("red", (2, 2)))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            bad = check_images(rows, 10, 1.0)
            weights = StepPreferenceCollator(8)(rows)["weights"].tolist()
        assert weights == ([0.25] if readable else [0])
        assert [entry.column for entry in bad] == ([] if readable else ["jpg_0"])
        assert readable or "DecompressionBomb" in bad[0].error


def redness(images, prompts):
    """A preference model of the callable kind, worth 2 for pure red: (B, 3, H, W) in [0, 1] -> (B,)."""
    assert 0 <= images.min() and images.max() <= 1 and len(images) == len(prompts)
    return 2 * images[:, 0].mean((1, 2))


class TestRelabelling:
    def test_labels_by_hand(self):
        """
        tanh(gap / 2) for gaps 0.2, 0.201, -0.201, -3 and 0 is 0.0997, 0.1002, -0.1002, -0.905 and 0: with a band of
        0.1 a tie, a win, two losses and a tie; with a band of 0 only the last is one.
        """
        scores = torch.tensor([20.2, 20.201, 20.0, 17.0, 20.0]), torch.tensor([20.0, 20.0, 20.201, 20.0, 20.0])
        assert math.tanh(0.1) < 0.1 < math.tanh(0.1005)
        label_0, label_1 = preference_labels(*scores)
        assert label_0.tolist() == [0.5, 1, 0, 0, 0.5] and label_1.tolist() == [0.5, 0, 1, 1, 0.5]
        assert preference_labels(*scores, tie_band=0)[0].tolist() == [1, 1, 0, 0, 0.5]
        with pytest.raises(ValueError, match="tie_band"):
            preference_labels(*scores, tie_band=1.0)
        with pytest.raises(ValueError, match="not finite"):
            preference_labels(torch.tensor([float("nan")]), torch.zeros(1))

    @pytest.mark.parametrize("kind", ["list", "dataset"])
    def test_human_labels_are_replaced(self, kind):
        """
        Red 255 against 0 is a gap of 2, 255 against 239 one of 0.125, a tie; the labels say the opposite. The last
        row's image is cut off: it loses its label, and with it its place.
        """
        reds = [(255, 0), (0, 255), (255, 239), (255, 0)]
        rows = [
            pickapic_row(jpg_0=png((a, 0, 0)), jpg_1=png((b, 0, 0)), label_0=float(a < b), label_1=float(a >= b))
            for a, b in reds
        ]
        rows[3]["jpg_1"] = rows[3]["jpg_1"][:45]
        dataset = rows if kind == "list" else datasets.Dataset.from_list(rows)
        result = relabel_preferences(dataset, redness, batch_size=2, resolution=8)
        assert [row["label_0"] for row in result] == [1, 0, 0.5, 0]
        assert [row["label_1"] for row in result] == [0, 1, 0.5, 0]
        assert [row["has_label"] for row in result] == [True, True, True, False]
        assert [row["jpg_0"] for row in result] == [row["jpg_0"] for row in rows]
        assert [row["label_0"] for row in dataset] == [0, 1, 0, 0]  # the original is left alone
        assert len(prepare_preference_dataset(result)) == 3

    def test_a_fresh_reward_model_labels_as_its_clip(self, tmp_path):
        """At timestep 0, whatever the step conditioning has learnt to do at others."""
        model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(6, 3, 16, 16, generator=generator) * 2 - 1
        with torch.no_grad():
            expected = model.score(images, PROMPTS, 0)
        assert torch.equal(score_clean_images(model, images, PROMPTS), expected)
        pairs = [(png((40 * i, 0, 200)), png((0, 250 - 40 * i, 0)))[:: (-1) ** i] for i in range(6)]
        rows = [
            pickapic_row(
                caption=PROMPTS[i],
                jpg_0=pairs[i][0],
                jpg_1=pairs[i][1],
                label_0=0.5,
                label_1=0.5,
            )
            for i in range(6)
        ]
        batch = StepPreferenceCollator(16)(rows)
        with torch.no_grad():
            scores = [model.score(batch[name], PROMPTS, 0) for name in ("images_0", "images_1")]
        probabilities = torch.stack(scores).softmax(0)
        expected = [1.0 if p > q else 0.0 for p, q in probabilities.T.tolist()]
        assert set(expected) == {0.0, 1.0}
        relabelled = relabel_preferences(rows, model, tie_band=0.0, resolution=16)
        assert [row["label_0"] for row in relabelled] == expected

    def test_what_cannot_be_relabelled_says_so(self):
        with pytest.raises(ValueError, match="stream cannot be relabelled"):
            relabel_preferences(datasets.Dataset.from_list([pickapic_row()]).to_iterable_dataset(), redness)
        with pytest.raises(ValueError, match="cannot express a tie"):
            relabel_preferences([trl_row()], redness)
        with pytest.raises(ValueError, match=r"one score per image, shape \(2,\), got \(1,\)"):
            relabel_preferences([pickapic_row()], lambda images, prompts: torch.zeros(1))


def keyed(batch):
    size = len(batch["prompts"])
    return {**batch, "keys_0": [f"{i}-0" for i in range(size)], "keys_1": [f"{i}-1" for i in range(size)]}


class TestCache:
    def predict(self, pipeline, batch, cache, seed=0, **kwargs):
        timesteps = torch.tensor([501] * len(batch["prompts"]))
        return torch.cat(noised_pairs(pipeline, batch, timesteps, 5.0, seeded(seed), cache=cache, **kwargs))

    @pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sdxl_pipeline])
    def test_images_and_prompts_are_encoded_once_and_the_result_is_that_without_a_cache(self, tmp_path, make):
        pipeline, batch, cache = wrap_pipeline(make(tmp_path)), keyed(batch_of(3)), EncodingCache()
        plain = self.predict(pipeline, batch, None)
        first = self.predict(pipeline, batch, cache)
        assert (cache.num_images_encoded, cache.num_prompts_encoded) == (6, 3)
        again = self.predict(pipeline, batch, cache)
        assert (cache.num_images_encoded, cache.num_prompts_encoded) == (6, 3)
        assert torch.equal(first, again)  # bit for bit, and still two draws from the posterior:
        assert not torch.equal(first, self.predict(pipeline, batch, cache, seed=1))
        torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-4)

    def test_latents_are_those_of_the_pipeline(self, pipeline):
        """One image, where both encode a batch of one: equal bits, scaling and dtype included."""
        image = batch_of(1)["images_0"]
        cached = EncodingCache().encode_images(pipeline, image, ["a"], seeded(3))
        assert torch.equal(cached, pipeline.encode_images(image, seeded(3)))

    def test_an_image_of_several_pairs_is_encoded_once(self, pipeline):
        rows = [pickapic_row(), pickapic_row(jpg_1=png("green")), pickapic_row(jpg_0=png("blue"), jpg_1=png("red"))]
        batch, cache = StepPreferenceCollator(16, image_keys=True)(rows), EncodingCache()
        assert "keys_0" not in StepPreferenceCollator(16)(rows)
        self.predict(pipeline, batch, cache)
        assert cache.num_images_encoded == 3  # red, blue, green
        assert cache.num_prompts_encoded == 1

    def test_memory_is_bounded_and_the_bits_do_not_depend_on_it(self, pipeline):
        """A posterior of 2 x 4 x 8 x 8 float32 is 2,048 bytes: of 6 images two fit into 5,000."""
        batch = keyed(batch_of(3))
        small, large = EncodingCache(max_bytes=5000, max_prompts=1), EncodingCache()
        expected = [self.predict(pipeline, batch, large) for _ in range(2)]
        found = [self.predict(pipeline, batch, small) for _ in range(2)]
        assert small.num_bytes == 4096 and large.num_bytes == 6 * 2048
        assert small.num_images_encoded == 6 + 4
        assert small.num_prompts_encoded == 3 + 2  # of three prompts one stays
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    def test_chunks_take_their_own_images(self, pipeline):
        """Chunks of two pairs, the last one short: filling the cache and reading it must agree."""
        batch, cache = keyed(batch_of(5)), EncodingCache()
        first = self.predict(pipeline, batch, cache, prediction_batch_size=2)
        assert torch.equal(first, self.predict(pipeline, batch, cache, prediction_batch_size=2))
        plain = self.predict(pipeline, batch, None, prediction_batch_size=2)
        torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-4)
        assert cache.num_images_encoded == 10

    def test_embeddings_know_the_negative_prompt_and_the_size(self, pipeline):
        cache = EncodingCache()
        one = cache.encode_prompts(pipeline, ["a red cat"], "", height=16, width=16)
        other = cache.encode_prompts(pipeline, ["a red cat"], "a blue dog", height=16, width=16)
        assert torch.equal(one.prompt_embeds, other.prompt_embeds)
        assert not torch.equal(one.negative_prompt_embeds, other.negative_prompt_embeds)
        cache.encode_prompts(pipeline, ["a red cat"], "", height=32, width=16)
        assert cache.num_prompts_encoded == 3


def test_unlabelled_rows_can_stay_for_labels_to_come():
    rows = [pickapic_row(has_label=False, label_0=None, label_1=None), pickapic_row()]
    batch = StepPreferenceCollator(16, keep_unlabelled=True)(rows)
    assert batch["label_0"].tolist() == [0.5, 1] and batch["weights"].tolist() == [0.25, 0.25]
    assert len(prepare_preference_dataset(rows, drop_unlabelled=False)) == 2
