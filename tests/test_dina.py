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
Necessity: the released DiNa-LRM is an adapter and a head whose names, gates and norms have to be met exactly. A part that is
left out gives scores that look like any others.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.flow_testing import tiny_flux_pipeline, tiny_qwen_image_pipeline, tiny_sd3_pipeline
from tests.testing_utils import (
    PROMPTS,
    assert_is_gradient,
    changed,
    image_pairs,
    state_of,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)
from trl_spo import LatentRewardModel, SPOTrainer, StepRewardTrainer, wrap_pipeline
from trl_spo.rewards.latent_heads import QueryAttentionHead


BLOCKS, WIDTH, HEADS = [1, 2], 32, 4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
T = torch.tensor([700, 20])


def deeper_sd3(folder):
    """SD3 with a block behind the ones that are read: the last has no text stream."""
    pipeline = tiny_sd3_pipeline(folder)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_config({**pipeline.transformer.config, "num_layers": 3})
    pipeline.register_modules(transformer=transformer.eval())
    return pipeline


def head_weights(width=WIDTH, num_blocks=2) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes of the published file; 87 for its three blocks."""
    shapes = {"query_tokens": (1, 4, width), "head.weight": (1, width), "head.bias": (1,), "norm_ff.weight": (width,)}

    def linear(name, out, inner):
        shapes.update({f"{name}.weight": (out, inner), f"{name}.bias": (out,)})

    for side in ("visual", "text"):
        for i in range(num_blocks):
            adapter = f"layer_adapters_{side}.{i}"
            shapes[f"{adapter}.layer_embed"] = (1, 1, width)
            linear(f"{adapter}.cond_mlp.0", 2 * width, width)
            linear(f"{adapter}.cond_mlp.2", 2 * width, 2 * width)
            linear(f"{adapter}.proj", width // 4, width)
        linear(f"agg_{side}", width, num_blocks * (width // 4))
    for name in ("to_q", "to_k_vis", "to_v_vis", "to_k_text", "to_v_text", "to_out.0", "gate_vis.0", "gate_text.0"):
        linear(f"attn1.{name}", width, width)
    for name in ("gate_vis.2", "gate_text.2"):
        linear(f"attn1.{name}", 1, width)
    for name in ("to_q", "to_k_vis", "to_v_vis", "to_out.0"):
        linear(f"attn2.{name}", width, width)
    for name in ("attn1.norm_q", "attn1.norm_v", "attn1.norm_t", "attn2.norm_q", "attn2.norm_v"):
        shapes[f"{name}.weight"] = (width,)
    linear("ff.0", 4 * width, width)
    linear("ff.2", width, 4 * width)
    generator = torch.Generator().manual_seed(5)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def published(folder, pipeline, **config):
    """A checkpoint as its authors write it: peft's own file of an adapter on the first blocks. Returns the adapted blocks."""
    torch.manual_seed(7)
    first = nn.Module()
    first.transformer_blocks = copy.deepcopy(pipeline.transformer.transformer_blocks[: max(BLOCKS)])
    adapted = get_peft_model(first, LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(folder / "checkpoint" / "backbone_lora")
    torch.save(head_weights(), folder / "checkpoint" / "rm_head.pt")
    head = {"use_proj_in": False, "width": -1, "out_dim": 1, "num_queries": 4, "num_attn_heads": HEADS, "dropout": 0.0}
    model = {
        "num_transformer_layers": 2, "use_lora": True, "use_text_features": True, "use_logistic": False,
        "visual_head_idx": BLOCKS, "text_head_idx": BLOCKS, "reward_head": head, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model": model}))
    return adapted


def by_hand(weights, image, text, time, heads=HEADS):
    """The head as its paper draws it, step by step, from the weights alone."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"])

    def read(side, layers):
        adapted = []
        for i, tokens in enumerate(layers):
            name = f"layer_adapters_{side}.{i}"
            gamma, beta = linear(f"{name}.cond_mlp.2", F.silu(linear(f"{name}.cond_mlp.0", time))).chunk(2, -1)
            tokens = tokens * (1 + gamma[:, None]) + beta[:, None] + weights[f"{name}.layer_embed"]
            adapted.append(linear(f"{name}.proj", tokens))
        return linear(f"agg_{side}", torch.cat(adapted, -1))

    def attend(q, k, v):
        out = []
        for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            share = (q_h @ k_h.transpose(1, 2) / q_h.shape[-1] ** 0.5).softmax(-1)
            out.append(share @ v_h)
        return torch.cat(out, -1)

    def gated(name, x):
        return torch.sigmoid(linear(f"attn1.gate_{name}.2", F.silu(linear(f"attn1.gate_{name}.0", x))))

    v_tokens, t_tokens = read("visual", image), read("text", text)
    queries = weights["query_tokens"].expand(len(time), -1, -1)
    q, v, t = (
        linear("attn1.to_q", norm("attn1.norm_q", queries)),
        norm("attn1.norm_v", v_tokens),
        norm("attn1.norm_t", t_tokens),
    )
    of_image = attend(q, linear("attn1.to_k_vis", v), linear("attn1.to_v_vis", v) * gated("vis", v))
    of_text = attend(q, linear("attn1.to_k_text", t), linear("attn1.to_v_text", t) * gated("text", t))
    queries = queries + linear("attn1.to_out.0", of_image + of_text)
    q, v = linear("attn2.to_q", norm("attn2.norm_q", queries)), norm("attn2.norm_v", v_tokens)
    queries = queries + linear("attn2.to_out.0", attend(q, linear("attn2.to_k_vis", v), linear("attn2.to_v_vis", v)))
    queries = queries + linear("ff.2", F.gelu(linear("ff.0", norm("norm_ff", queries))))
    return linear("head", queries).mean(1)[:, 0]


def latents_of(pipeline, count=2):
    shape = wrap_pipeline(pipeline).latent_shape()
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


class TestReleasedWeights:
    def test_names_are_those_of_the_published_head(self):
        weights = head_weights(WIDTH, 3)
        own = QueryAttentionHead(WIDTH, 3).state_dict()
        assert len(weights) == 87 and {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in weights.items()}

    @pytest.mark.parametrize("shared", [False, True])
    @torch.no_grad()
    def test_scores_equal_a_hand_computation(self, tmp_path, shared):
        """Adapted blocks run by hand from peft's own model, the head step by step; the score as published."""
        pipeline = deeper_sd3(tmp_path / "p")
        base = state_of(pipeline.transformer)
        adapted = published(tmp_path / "dina", pipeline)
        latents, transformer = latents_of(pipeline), pipeline.transformer
        tokens, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS[:2], None, None, do_classifier_free_guidance=False, max_sequence_length=256
        )
        time = transformer.time_text_embed(T.float(), pooled)
        hidden, text = transformer.pos_embed(latents), transformer.context_embedder(tokens)
        images, texts = [], []
        for block in adapted.base_model.model.transformer_blocks:
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=time)
            images.append(hidden)
            texts.append(text)
        expected = (by_hand(head_weights(), images, texts, time) + 10) / 10

        model = LatentRewardModel.from_dina_checkpoint(tmp_path / "dina", pipeline, shared=shared)
        torch.testing.assert_close(model.score(latents, PROMPTS[:2], T), expected, atol=1e-4, rtol=1e-4)
        assert expected.std() > 0.01
        model.save_pretrained(tmp_path / "saved")
        again = {"pipeline": deeper_sd3(tmp_path / "again")} if shared else {}
        loaded = LatentRewardModel.from_pretrained(tmp_path / "saved", **again)
        torch.testing.assert_close(loaded.score(latents, PROMPTS[:2], T), expected, atol=1e-4, rtol=1e-4)
        after = {n.replace(".base_layer.", "."): v for n, v in pipeline.transformer.state_dict().items()}
        assert all(torch.equal(value, after[name]) for name, value in base.items())

    @torch.no_grad()
    def test_half_precision_keeps_the_sum_of_base_and_adapter(self, tmp_path):
        """The adapter is added in float32 and the sum rounded once; scores are float32."""
        pipeline = deeper_sd3(tmp_path / "p")
        adapted = dict(published(tmp_path / "dina", pipeline).named_parameters())
        pipeline.transformer.to(torch.bfloat16)
        model = LatentRewardModel.from_dina_checkpoint(tmp_path / "dina", pipeline)
        assert model.dtype == torch.bfloat16
        assert model.score(latents_of(pipeline), PROMPTS[:2], T).dtype == torch.float32
        merged = model.backbone.network.state_dict()
        for layer in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj"):
            a, b = (adapted[f"base_model.model.{layer}.lora_{half}.default.weight"] for half in "AB")
            base = pipeline.transformer.get_submodule(layer).weight
            expected = (base.float() + 2 * b @ a).bfloat16()  # alpha / rank is 8 / 4
            assert torch.equal(merged[f"{layer}.weight"], expected) and not torch.equal(expected, base)

    def test_files_that_do_not_fit(self, tmp_path):
        pipeline, folder = deeper_sd3(tmp_path / "p"), tmp_path / "dina"
        load = LatentRewardModel.from_dina_checkpoint
        published(folder, pipeline, use_logistic=True)
        with pytest.raises(ValueError, match="has `model.use_logistic` = True, and only False can be loaded"):
            load(folder, pipeline)
        published(folder, pipeline)
        with pytest.raises(
            ValueError, match="adapter on Stable Diffusion 3.5 Medium, and the pipeline is a `FluxPipeline`"
        ):
            load(folder, tiny_flux_pipeline(tmp_path / "flux"))

        file = folder / "checkpoint" / "backbone_lora" / "adapter_model.safetensors"
        weights = load_file(file)
        lost = next(iter(weights))
        save_file({**{n: v for n, v in weights.items() if n != lost}, "other": weights[lost]}, file)
        with pytest.raises(ValueError, match=r"missing: transformer_blocks\.0.*; unexpected: other"):
            load(folder, pipeline)
        save_file(weights, file)
        head = head_weights()
        torch.save({**head, "agg_text.weight": torch.zeros(2, 2)}, folder / "checkpoint" / "rm_head.pt")
        with pytest.raises(ValueError, match=r"agg_text.weight \(2, 2\) for \(32, 16\)"):
            load(folder, pipeline)
        torch.save({"query_tokens": print}, folder / "checkpoint" / "rm_head.pt")
        with pytest.raises(ValueError, match="was refused"):
            load(folder, pipeline)
        (folder / "checkpoint" / "rm_head.pt").unlink()
        with pytest.raises(FileNotFoundError, match="rm_head.pt"):
            load(folder, pipeline)


class TestTheHeadOnAFreshModel:
    def test_it_is_trained_and_judges(self, tmp_path):
        """Preferences move head and backbone; then it picks pairs of a rollout, and does not move."""
        pipeline = deeper_sd3(tmp_path / "p")
        torch.manual_seed(0)
        model = LatentRewardModel.from_pipeline(pipeline, head="query_attention", blocks=BLOCKS, num_heads=HEADS)
        before = state_of(model)
        config = tiny_step_reward_config(tmp_path / "reward", max_steps=2, gradient_checkpointing=True)
        StepRewardTrainer(config, pipeline, model, train_dataset=image_pairs()).train()
        moved = changed(before, model)
        assert "head.query_tokens" in moved and any(name.startswith("backbone") for name in moved)
        before = state_of(model)
        config = tiny_spo_config(
            tmp_path, branch_start_step=0, preference_threshold=0.0, memory_budget=1.0, max_steps=2
        )
        trainer = SPOTrainer(config, pipeline, model, train_dataset=PROMPTS)
        trainer.train()
        first = next(log for log in trainer.state.log_history if "loss" in log)
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert not changed(before, model)
        config = tiny_step_reward_config(tmp_path / "captions", caption_loss_coef=0.5)
        with pytest.raises(ValueError, match="`caption_loss_coef` compares embeddings .* Leave it at 0"):
            StepRewardTrainer(config, pipeline, model, train_dataset=image_pairs())

    @torch.no_grad()
    def test_padding_is_not_read(self, tmp_path):
        """Qwen-Image pads short prompts to the length of their neighbours; the head must not look there."""
        pipeline = wrap_pipeline(tiny_qwen_image_pipeline(tmp_path))
        torch.manual_seed(0)
        model = LatentRewardModel.from_pipeline(pipeline, head="query_attention", blocks=[1], num_heads=HEADS)
        model.head.load_state_dict(head_weights(model.backbone.widths[0], 1))
        latents = latents_of(pipeline)
        together = model.score(latents, [PROMPTS[0], " ".join(PROMPTS)], T)
        alone = model.score(latents[:1], PROMPTS[:1], T[:1])
        torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)

    def test_it_is_differentiable_in_the_latents(self, tmp_path):
        pipeline = deeper_sd3(tmp_path)
        model = LatentRewardModel.from_pipeline(pipeline, head="query_attention", blocks=BLOCKS, num_heads=HEADS)
        assert_is_gradient(lambda latents: model.score(latents, PROMPTS[:2], T).sum(), latents_of(pipeline))

    def test_bad_settings(self, tmp_path):
        pipeline = deeper_sd3(tmp_path)
        make = LatentRewardModel.from_pipeline
        with pytest.raises(ValueError, match="`head` must be one of .* got 'mlp'"):
            make(pipeline, head="mlp")
        with pytest.raises(ValueError, match="none behind the last block; leave it out of `blocks`"):
            make(pipeline, head="query_attention", blocks=[1, 3], num_heads=HEADS)
        with pytest.raises(ValueError, match="must be a multiple of `num_heads=5` and of 4"):
            make(pipeline, head="query_attention", blocks=[1], num_heads=5)
        with pytest.raises(ValueError, match="reads tokens of a transformer, and a UNet has none"):
            make(tiny_sd_pipeline(tmp_path / "sd"), head="query_attention")
