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
Necessity: a card is read by people who do not have the code, and published by people who do not read it: its numbers,
its example and its header must be right, and nothing private may be in it.
"""

import json
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from trl_spo import (
    LatentRewardModel,
    SPOConfig,
    SPOTrainer,
    StepAwareRewardModel,
    StepAwareRewardModelConfig,
    StepRewardConfig,
    StepRewardTrainer,
    wrap_pipeline,
)
from trl_spo.pipelines.components import changes_of_the_base, commit_of_the_base, parts_from_elsewhere
from trl_spo.rewards.publishing import reward_model_card, step_aware_description
from trl_spo.scheduling_ddim import DDIMStepRule
from trl_spo.scheduling_flow import FlowStepRule
from trl_spo.step_distribution import SamplingCode
from trl_spo.training.model_card import hub_id, read_samples, spo_model_card, step_reward_model_card

from .flow_testing import tiny_sd3_pipeline
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    ddim_scheduler,
    device_settings,
    image_pairs,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)


SECRET = "hf_" + "s3cr3t" * 5
HISTORY = [
    {"step": 0, "eval_reward_mean": 1.0, "eval_reward_std": 0.5, "eval_runtime": 9.0},
    {"step": 5, "loss": 0.6},
    {"step": 10, "eval_reward_mean": 2.25, "eval_reward_std": 0.5, "eval_clip_mean": 0.3, "eval_runtime": 9.0},
]
SAMPLES = {
    "step": 10,
    "prompts": ['a "red": cat | # and more', "- 猫\n---\nlicense: mit"],
    "images": ["images/sample_0.png", "images/sample_1.png"],
    "strips": ["images/step_000000.png", "images/step_000010.png"],
}


def spo_args(tmp_path, **kwargs):
    return SPOConfig(
        str(tmp_path / "secret_folder"), hub_token=SECRET, report_to="none", **device_settings(), **kwargs
    )


def spo_card(args, **kwargs):
    given = {
        "name": "spo-tiny",
        "base_model": "someone/base",
        "step_rule": DDIMStepRule(ddim_scheduler()),
        "tags": ["trl", "spo"],
    }
    return spo_model_card(args, **{**given, **kwargs})


def test_the_header_of_an_spo_card_survives_any_prompt(tmp_path):
    args = spo_args(tmp_path, hub_model_id="someone/spo-tiny", dataset_name="someone/prompts")
    card = ModelCard(spo_card(args, samples=SAMPLES, log_history=HISTORY, reward_model="someone/reward"))
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert (data["base_model"], data["base_model_relation"]) == ("someone/base", "adapter")
    assert data["tags"] == ["trl", "spo", "lora"] and data["datasets"] == "someone/prompts"
    assert [entry["text"] for entry in data["widget"]] == SAMPLES["prompts"]
    assert data["widget"][0]["output"]["url"] == "images/sample_0.png" and "license" not in data
    assert "<Gallery />" in card.text
    assert "![Before training](images/step_000000.png)" in card.text
    assert "![After step 10](images/step_000010.png)" in card.text


def test_a_strip_is_named_by_its_own_step(tmp_path):
    """A resumed run without its old images has none from before the training, and says so by saying nothing of it."""
    strips = ["images/step_000004.png", "images/step_000010.png"]
    text = spo_card(spo_args(tmp_path), samples={**SAMPLES, "strips": strips})
    assert "After step 4:\n\n![After step 4](images/step_000004.png)" in text
    assert "![After step 10](images/step_000010.png)" in text and "Before training" not in text
    text = spo_card(spo_args(tmp_path), samples={**SAMPLES, "strips": ["images/step_000000.png"]})
    assert "Before training" in text and "After step" not in text


def test_the_numbers_are_those_of_the_run(tmp_path):
    args = spo_args(tmp_path, beta=7.0, guidance_scale=3.5, num_inference_steps=9)
    text = spo_card(args, log_history=HISTORY, global_step=10, num_pairs=123)
    assert "for 10 steps on 123 pairs" in text and "| `beta` | 7.0 |" in text
    assert "DDIM, eta 1, 9 steps, guidance 3.5" in text
    assert "| metric | step 0 | step 10 |" in text and "| `eval_reward_mean` | 1.0000 | 2.2500 |" in text
    assert "| `eval_clip_mean` | | 0.3000 |" in text and "runtime" not in text
    assert "## Evaluation" not in spo_card(args) and "Gallery" not in spo_card(args)
    assert "| metric | step 10 |" in spo_card(args, log_history=HISTORY[2:])


def test_the_scoring_vae_is_part_of_the_recipe(tmp_path):
    """It changes labels, so a recipe without it is another recipe; its path on a disk is nobody's business."""
    assert "scoring_vae" not in spo_card(spo_args(tmp_path))
    assert "| `scoring_vae` | someone/taesd |" in spo_card(spo_args(tmp_path, scoring_vae="someone/taesd"))
    folder = tmp_path / "private" / "vae"
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    vae.save_pretrained(folder)
    by_path = spo_args(tmp_path, scoring_vae=str(folder))
    for card in (
        spo_card(by_path),
        spo_card(by_path, scoring_vae=AutoencoderTiny.from_pretrained(folder)),
        spo_card(spo_args(tmp_path), scoring_vae=vae),
    ):
        assert "| `scoring_vae` | `AutoencoderTiny` |" in card and "private" not in card
    vae.register_to_config(_name_or_path="someone/taesd")  # as `from_pretrained` leaves it
    assert "| `scoring_vae` | someone/taesd |" in spo_card(spo_args(tmp_path), scoring_vae=vae)


def test_nothing_private_is_in_a_card(tmp_path):
    settings = {"hub_model_id": "someone/model", "run_name": "private run"}
    kwargs = {"base_model": str(tmp_path / "private" / "base"), "reward_model": "a function", "log_history": HISTORY}
    args = spo_args(tmp_path, model_init_kwargs={"token": SECRET}, dataset_name=str(tmp_path / "data"), **settings)
    reward_args = StepRewardConfig(
        str(tmp_path / "secret_folder"), hub_token=SECRET, report_to="none", **device_settings(),
        dataset_name=str(tmp_path / "data"), **settings,
    )  # fmt: skip
    pipeline = str(tmp_path / "private" / "base")
    cards = [spo_card(args, **kwargs), spo_card(args, use_lora=False, **kwargs)]
    described = step_aware_description(StepAwareRewardModelConfig())
    cards += [
        step_reward_model_card(
            reward_args, name="reward", base_model=pipeline, description=described, pipeline=pipeline
        ),
        reward_model_card(described, "reward", base_model=pipeline),
    ]
    for card in cards:
        for private in (SECRET, "secret_folder", str(tmp_path), "private"):
            assert private not in card
        assert "base_model" not in card


def test_the_example_of_an_spo_card_runs_and_samples_like_the_rollout(tmp_path):
    """The code of the card, executed: the only change is where the two models lie."""
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    pipeline.sd_pipeline.save_pretrained(tmp_path / "base")
    pipeline.add_lora()
    pipeline.save_lora(tmp_path / "lora")
    args = spo_args(tmp_path, num_inference_steps=2, branch_start_step=0, negative_prompt='a "dog"')
    text = spo_card(args, base_model=None, step_rule=pipeline.step_rule)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "path/to/the/base/model" in code and "eta=1" in code and "negative_prompt=" in code
    code = code.replace("path/to/the/base/model", str(tmp_path / "base"))
    code = code.replace("path/to/this/folder", str(tmp_path / "lora"))
    names = {}
    exec(code, names)
    assert isinstance(names["pipe"].scheduler, DDIMScheduler) and names["pipe"].unet.peft_config
    assert names["pipe"].scheduler.config.clip_sample == pipeline.scheduler.config.clip_sample
    assert isinstance(names["image"], Image.Image)

    pipeline.sd_pipeline.unet.unload_lora()
    pipeline.sd_pipeline.unet.save_pretrained(tmp_path / "full" / "unet")
    text = spo_card(args, base_model=None, use_lora=False)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace(
        "path/to/the/base/model", str(tmp_path / "base")
    )
    exec(code.replace("path/to/this/folder", str(tmp_path / "full")), names)
    assert isinstance(names["pipe"], DiffusionPipeline) and "lora" not in ModelCard(text).data.tags


def test_another_sampler_is_named_and_coded_by_its_own_rule(tmp_path):
    """Regression: the card of any scheduler but DDIM printed an eta that its code then left out."""

    class AncestralRule(DDIMStepRule):
        sampler_name = "Ancestral"

        def sampling_code(self, eta):
            return SamplingCode(["Noise"], [f"pipe.noise = Noise({eta})"], [f"noise_scale={eta}"])

    text = spo_card(spo_args(tmp_path, eta=0.7), step_rule=AncestralRule(ddim_scheduler()), use_lora=False)
    assert "Ancestral, eta 0.7, 20 steps, guidance 5" in text and "DDIM" not in text
    assert "from diffusers import DiffusionPipeline, Noise, UNet2DConditionModel" in text
    assert "pipe.noise = Noise(0.7)" in text and "guidance_scale=5, noise_scale=0.7)" in text


def test_the_card_of_a_reward_model(tmp_path):
    args = StepRewardConfig(
        str(tmp_path / "reward"), report_to="none", **device_settings(), dataset_name="someone/pairs",
        max_timestep=950, hub_model_id="someone/reward",
    )  # fmt: skip
    history = [
        {"step": 4, "eval_loss": 0.7, "eval_accuracy": 0.5, "eval_accuracy/t_0": 0.6, "eval_runtime": 3.0},
        {"step": 8, "eval_loss": 0.6, "eval_accuracy": 0.6, "eval_accuracy/t_0": 0.8, "eval_runtime": 3.0},
    ]
    card = ModelCard(
        step_reward_model_card(
            args,
            name="reward",
            base_model="someone/clip",
            description=step_aware_description(StepAwareRewardModelConfig()),
            pipeline="someone/sd",
            global_step=8,
            log_history=history,
        )
    )
    assert card.data.library_name == "trl_spo" and card.data.base_model == "someone/clip"
    assert card.data.datasets == "someone/pairs"
    assert "| `eval_accuracy/t_0` | 0.6000 | 0.8000 |" in card.text and "runtime" not in card.text
    assert "[someone/sd](https://huggingface.co/someone/sd)" in card.text
    assert 'from_pretrained("someone/reward")' in card.text and "| `max_timestep` | 950 |" in card.text
    assert "| `lr_scheduler_type` | constant_with_warmup |" in card.text
    compile(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], "card", "exec")


def code_of(card: str, *replaced: tuple[str, str]) -> dict:
    """What the example of a card leaves behind."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    for old, new in replaced:
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    return names


def test_a_reward_model_is_saved_with_a_card(tmp_path):
    """Without a trainer, too: what it is, what it was made from, its licence, and an example that runs."""
    clip = tiny_clip(tmp_path)
    model = StepAwareRewardModel.from_clip(clip)
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "trl_spo" and card.data.base_model is None and str(tmp_path) not in text
    assert "# saved" in text and "How it was trained is not known" in text and "a model that has no name" in text
    assert "adaLN in every block of the vision tower; integers from 0 (the finished image) to 999" in text
    names = code_of(text, ("path/to/this/folder", str(tmp_path / "saved")), ("a red cat", PROMPTS[0]))
    expected = model.score(names["images"], PROMPTS[:1] * 2, torch.tensor([0, 501]))
    torch.testing.assert_close(names["scores"], expected)

    # A card that somebody wrote stays; one that is made again knows the base model by its name on the Hub alone.
    (tmp_path / "saved" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"
    model.config.base_model = "someone/clip"
    model.save_pretrained(tmp_path / "named")
    again = StepAwareRewardModel.from_pretrained(tmp_path / "named")
    again.save_pretrained(tmp_path / "again")
    for folder in ("named", "again"):
        card = ModelCard((tmp_path / folder / "README.md").read_text())
        assert card.data.base_model == "someone/clip" and card.data.base_model_relation == "finetune"
        assert "[someone/clip](https://huggingface.co/someone/clip), whose licence holds" in card.text


LATENT_CARDS = {  # pipeline, arguments of from_pipeline and of save_pretrained, what the card says
    "unet": (
        tiny_sd_pipeline, {}, {},
        ("down and mid blocks (channels ", "the mid feature is guided with 7.5", "that of a diffusion UNet: integer timesteps",
         "read by text encoders of its own (CLIPTextModel)", "4 channels, scaling_factor ", "and tokenizers."),
    ),
    "transformer": (
        tiny_sd3_pipeline, {"blocks": [1, 2]}, {},
        ("blocks 1 to 2, read behind 1, 2 of a `SD3Transformer2DModel`", "rectified flow", "in `pipeline/`.",
         "read by the text encoders of a StableDiffusion3Pipeline", "4 channels, scaling_factor 1.5035, shift_factor 0.0609;"),
    ),
    "without text encoders": (
        tiny_sd3_pipeline, {"head": "query_attention", "blocks": [1]}, {"save_reader": False},
        ("query attention, 4 queries and 8 heads; score = (raw + 0) / 1", "configuration, not the text encoders."),
    ),
    "shared": (
        tiny_sd3_pipeline, {"shared": True}, {},
        ("the policy's own under a LoRA of rank ", "adapter and heads, and the adapter once more as a LoRA of diffusers"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LATENT_CARDS)
def test_a_latent_reward_is_saved_with_a_card(tmp_path, kind):
    """Its latent space, noise schedule, head and base, and an example that runs, with the pipeline where it needs one."""
    family, made, saved, facts = LATENT_CARDS[kind]
    pipe = family(tmp_path / "files")
    pipe.save_pretrained(tmp_path / "base")
    model = LatentRewardModel.from_pipeline(pipe, **made)
    model.save_pretrained(tmp_path / "saved", **saved)
    text = (tmp_path / "saved" / "README.md").read_text()
    for fact in facts:
        assert fact in text, fact
    assert str(tmp_path) not in text and ModelCard(text).data.base_model is None
    replaced = [("path/to/this/folder", str(tmp_path / "saved")), ("a red cat", PROMPTS[0])]
    if kind in ("without text encoders", "shared"):
        replaced.append(("path/to/the/base/model", str(tmp_path / "base")))
    names = code_of(text, *replaced)
    expected = model.score(names["latents"], PROMPTS[:1] * 2, torch.tensor([0, 501]))
    torch.testing.assert_close(names["scores"], expected)


def test_a_latent_reward_names_its_base(tmp_path):
    """By the name on the Hub, as far as the pipeline is what that name says; the trainer's card, which knows more, wins."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.register_to_config(_name_or_path="someone/base")
    model = LatentRewardModel.from_pipeline(pipe)
    model.save_pretrained(tmp_path / "plain")
    config = tiny_step_reward_config(tmp_path / "run", max_steps=1)
    trainer = StepRewardTrainer(config, pipe, model, train_dataset=image_pairs())
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    cards = {name: ModelCard((tmp_path / name / "README.md").read_text()) for name in ("plain", "trained")}
    for card in cards.values():
        assert card.data.base_model == "someone/base" and card.data.base_model_relation == "finetune"
        assert "[someone/base](https://huggingface.co/someone/base), whose licence holds" in card.text
        assert "## What it judges" in card.text
    assert "How it was trained is not known" in cards["plain"].text and "## Recipe" not in cards["plain"].text
    assert (
        "trained for 1 steps" in cards["trained"].text and "| `independent_noise` | False |" in cards["trained"].text
    )

    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]), "style")
    pipe.fuse_lora(components=["unet"])
    assert LatentRewardModel.from_pipeline(pipe).config.base_model is None


@pytest.mark.parametrize("value", ["", None, "/a/b", "./a", "name", "a/b/c", "../x", "~/x", "a/"])
def test_what_is_no_hub_id(value):
    assert hub_id(value) is None


def test_a_folder_that_exists_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("out/model") == "out/model"
    (tmp_path / "out" / "model").mkdir(parents=True)
    assert hub_id("out/model") is None


def test_samples_are_read_from_what_the_callback_left(tmp_path):
    assert read_samples(tmp_path) is None
    (tmp_path / "images").mkdir()
    record = {"step": 4, "prompts": ["猫"], "images": ["sample_0.png"]}
    (tmp_path / "images" / "samples.json").write_text(json.dumps(record), encoding="utf-8")
    assert read_samples(tmp_path) == {**record, "images": ["images/sample_0.png"], "strips": []}
    for step in (4, 0, 2, 6):  # the last one is of a longer run before
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"step_{step:06d}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "step_of_mine.png")
    samples = read_samples(tmp_path)
    assert samples["strips"] == ["images/step_000000.png", "images/step_000004.png"]
    assert "Samples after step 4" in spo_card(spo_args(tmp_path), samples=samples)


def test_strips_are_in_the_order_of_their_steps(tmp_path):
    """Beyond a million steps names grow longer, and their order by letters is another."""
    (tmp_path / "images").mkdir()
    record = {"step": 2_000_000, "prompts": [], "images": []}
    (tmp_path / "images" / "samples.json").write_text(json.dumps(record))
    for step in (999_999, 2_000_000):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"step_{step:06d}.png")
    assert read_samples(tmp_path)["strips"] == ["images/step_999999.png", "images/step_2000000.png"]


def test_a_base_with_fused_loras_has_no_name(tmp_path):
    """Regression: the card named the untouched model, and on that the published LoRA is another model."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.register_to_config(_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]), "style")
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    trainer = SPOTrainer(tiny_spo_config(tmp_path), pipe, brightness_reward, train_dataset=PROMPTS)
    card = trainer._model_card("name", tmp_path)
    assert "base_model" not in card and "stable-diffusion-v1-5" not in card
    plain = tiny_sd_pipeline(tmp_path)
    plain.register_to_config(_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5")
    trainer = SPOTrainer(tiny_spo_config(tmp_path), plain, brightness_reward, train_dataset=PROMPTS)
    assert "base_model: stable-diffusion-v1-5" in trainer._model_card("name", tmp_path)


COMMIT = "0123456789abcdef" + "0" * 24


def cached(folder, name: str, commit: str = COMMIT):
    """A pipeline in a cache of the Hub, as a download leaves it. Returns the arguments that load it from there."""
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    tiny_sd_pipeline(folder / "parts").save_pretrained(repository / "snapshots" / commit)
    return {"pretrained_model_name_or_path": name, "cache_dir": folder, "local_files_only": True}


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return cached(folder, "someone/base-v2"), cached(folder, "other/model")


def card_of(pipe, tmp_path) -> str:
    trainer = SPOTrainer(tiny_spo_config(tmp_path), pipe, brightness_reward, train_dataset=PROMPTS)
    return trainer._model_card("name", tmp_path)


def test_a_base_from_the_hub_is_named_with_its_commit(hub_cache, tmp_path):
    """A repository changes; and `revision` may name another branch of it."""
    pipe = DiffusionPipeline.from_pretrained(**hub_cache[0])
    assert (changes_of_the_base(pipe), parts_from_elsewhere(pipe), commit_of_the_base(pipe)) == ("", {}, COMMIT)
    card = card_of(pipe, tmp_path)
    assert "base_model: someone/base-v2" in card and f"/someone/base-v2) at commit `{COMMIT}`." in card
    assert commit_of_the_base(tiny_sd_pipeline(tmp_path)) is None


@pytest.mark.parametrize(
    ("part", "loader"),
    [("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel), ("tokenizer", CLIPTokenizer)],
)
def test_a_part_from_elsewhere_makes_another_base(hub_cache, tmp_path, part, loader):
    """Regression: `from_pretrained(base, unet=other)` trained the other UNet, and the card named the base."""
    base, other = hub_cache
    pipe = DiffusionPipeline.from_pretrained(**base, **{part: loader.from_pretrained(**other, subfolder=part)})
    assert changes_of_the_base(pipe) == f"parts come from elsewhere: {part} (other/model)"
    card = card_of(pipe, tmp_path)
    assert "base_model" not in card and "someone/base" not in card


def test_a_part_that_is_put_in_afterwards_is_found(hub_cache):
    """Also behind a wrapper, from a folder, or from another folder of the same disk; one of the base's own is not."""
    base, other = hub_cache
    pipe = DiffusionPipeline.from_pretrained(**base)
    pipe.unet = UNet2DConditionModel.from_pretrained(**base, subfolder="unet")
    assert changes_of_the_base(pipe) == ""
    pipe.unet = torch.compile(UNet2DConditionModel.from_pretrained(**other, subfolder="unet"), backend="eager")
    assert changes_of_the_base(pipe) == "parts come from elsewhere: unet (other/model)"
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(**other, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(**other, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(**other, subfolder="text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(**other, subfolder="tokenizer"),
    }
    assert set(parts_from_elsewhere(DiffusionPipeline.from_pretrained(**base, **parts))) == set(parts)


def test_a_folder_and_a_copy_that_was_given_a_name(tmp_path):
    """What lies in one folder is one model, by whatever name; a part from a second folder is not of it."""
    tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "one")
    tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "two" / "unet-parent")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "one")
    assert changes_of_the_base(pipe) == ""
    pipe.register_to_config(_name_or_path="someone/base")
    assert changes_of_the_base(pipe) == "" and "base_model: someone/base" in card_of(pipe, tmp_path)
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "two" / "unet-parent" / "unet")
    assert f"unet ({tmp_path / 'two' / 'unet-parent'})" in changes_of_the_base(pipe)
    assert str(tmp_path) not in card_of(pipe, tmp_path / "out")


def test_another_vae_is_part_of_the_recipe(hub_cache, tmp_path):
    """SDXL is mostly used with one that works in float16: a LoRA means the same beside it, its images do not."""
    base, other = hub_cache
    vae = AutoencoderKL.from_pretrained(**other, subfolder="vae")
    card = card_of(DiffusionPipeline.from_pretrained(**base, vae=vae), tmp_path)
    assert "base_model: someone/base-v2" in card and "| `vae` | other/model |" in card
    assert "| `vae` |" not in card_of(DiffusionPipeline.from_pretrained(**base), tmp_path)
    vae.register_to_config(_name_or_path=str(tmp_path))
    card = card_of(DiffusionPipeline.from_pretrained(**base, vae=vae), tmp_path)
    assert "| `vae` | another one than the base model's |" in card and str(tmp_path) not in card


def test_freeu_makes_another_base(tmp_path):
    """It scales features of the UNet while it trains, and is in no file."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.register_to_config(_name_or_path="someone/base")
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert "base_model" not in card_of(pipe, tmp_path)
    pipe.disable_freeu()
    assert "base_model: someone/base" in card_of(pipe, tmp_path)


def test_a_replaced_scheduler_is_in_the_code(tmp_path):
    """Regression: the card's code took the schedule of the base, whatever the one of the training was."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "base")
    changed = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "beta_end": 0.02, "steps_offset": 0}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changed)
    own = wrap_pipeline(pipe).step_rule.scheduler
    code = re.search(r"```python\n(.*?)```", spo_card(spo_args(tmp_path), step_rule=DDIMStepRule(own)), re.DOTALL)[1]
    names = {"pipe": DiffusionPipeline.from_pretrained(tmp_path / "base"), "DDIMScheduler": DDIMScheduler}
    assert names["pipe"].scheduler.config.prediction_type == "epsilon"
    exec(re.search(r"pipe.scheduler = .*?\n\)", code, re.DOTALL)[0], names)
    made = names["pipe"].scheduler
    for scheduler in (made, own):
        scheduler.set_timesteps(7)
    assert torch.equal(made.timesteps, own.timesteps) and torch.equal(made.alphas_cumprod, own.alphas_cumprod)
    assert made.config.prediction_type == "v_prediction" and made.final_alpha_cumprod == own.final_alpha_cumprod


def test_a_replaced_schedule_of_a_flow_model_is_in_the_code():
    """The shift decides all noise levels: at 5 the middle of 4 steps is 5 x 0.5 / (1 + 4 x 0.5), about 0.83; at 1 it is 0.5."""
    base = FlowMatchEulerDiscreteScheduler(shift=1.0)
    rule = FlowStepRule(FlowMatchEulerDiscreteScheduler(shift=5.0))
    code = rule.sampling_code(1.0)
    names = {"pipe": SimpleNamespace(scheduler=base), **{name: getattr(diffusers, name) for name in code.imports}}
    for line in code.setup:
        exec(line, names)
    assert names["pipe"].scheduler.config.shift == 5.0
    names["pipe"].scheduler.set_timesteps(4)
    rule.scheduler.set_timesteps(4)
    assert torch.equal(names["pipe"].scheduler.sigmas, rule.scheduler.sigmas)


def test_the_card_of_a_reward_names_no_model_that_it_does_not_judge(hub_cache, tmp_path):
    base, other = hub_cache
    settings = {"report_to": "none", **device_settings(), "resolution": 16}
    rows = [{"prompt": "a cat", "chosen": Image.new("RGB", (16, 16)), "rejected": Image.new("RGB", (16, 16), "red")}]
    reward_model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path / "clip"))
    for parts, named in (
        ({}, True),
        ({"unet": UNet2DConditionModel.from_pretrained(**other, subfolder="unet")}, False),
    ):
        pipe = DiffusionPipeline.from_pretrained(**base, **parts)
        trainer = StepRewardTrainer(StepRewardConfig(str(tmp_path), **settings), pipe, reward_model, rows)
        assert ("someone/base-v2" in trainer._model_card("name", tmp_path)) == named
    pipe = DiffusionPipeline.from_pretrained(**base)  # what is judged is the model with its adapter
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "style")
    trainer = StepRewardTrainer(StepRewardConfig(str(tmp_path), **settings), pipe, reward_model, rows)
    assert "someone/base-v2" not in trainer._model_card("name", tmp_path)


def test_a_shared_latent_reward_names_the_pipeline_it_judges(hub_cache, tmp_path):
    """Its own adapter on the denoiser is off when latents are made: the base is what its name says."""
    pipe = DiffusionPipeline.from_pretrained(**hub_cache[0])
    model = LatentRewardModel.from_pipeline(pipe, shared=True, peft_config=LoraConfig(r=2, target_modules=["to_q"]))
    config = tiny_step_reward_config(tmp_path, max_steps=1)
    card = StepRewardTrainer(config, pipe, model, train_dataset=image_pairs())._model_card("name", tmp_path)
    assert "It scores noisy latents of [someone/base-v2](" in card and "base_model: someone/base-v2" in card


def test_adapters_of_a_text_encoder_are_refused(tmp_path):
    """They would be part of the model that is trained, and of nothing that is published."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"The text_encoder of the pipeline already has adapters \(default\)"):
        SPOTrainer(tiny_spo_config(tmp_path), pipe, brightness_reward, train_dataset=PROMPTS)
