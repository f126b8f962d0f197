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
Necessity: text models of today give sequences as long as the prompt. Joined in a batch, a prompt must keep its meaning
whatever its neighbours are, in every operation that a rollout, a training batch and the cache apply.
"""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.pipelines.encoding_cache import EncodingCache


def embeds_of(*lengths: int, seed: int = 0, mask: bool = False) -> PromptEmbeds:
    """Rows of one length each, as an encoder gives them for one prompt at a time, joined."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for length in lengths:
        positive = torch.randn(1, length, 3, generator=generator)
        negative = torch.randn(1, 2, 3, generator=generator)
        ones = torch.ones(1, length, dtype=torch.long) if mask else None
        lengths = {"prompt_lengths": (length,), "negative_prompt_lengths": (2,)} if mask else {}
        parts.append(PromptEmbeds(positive, negative, positive.mean(1), prompt_mask=ones, **lengths))
    return PromptEmbeds.cat(parts)


def attend(embeds: PromptEmbeds) -> torch.Tensor:
    """What an attention layer makes of the text: its mask leaves padding out."""
    query = torch.ones(len(embeds), 1, 3)
    mask = None if embeds.prompt_mask is None else embeds.prompt_mask.bool()[:, None]
    keys = embeds.prompt_embeds
    return torch.nn.functional.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_a_prompt_does_not_depend_on_its_neighbours(lengths, mask):
    together = embeds_of(*lengths, mask=mask)
    assert together.prompt_embeds.shape == (len(lengths), max(lengths), 3)
    assert (together.prompt_mask is None) == (not mask and len(set(lengths)) == 1)
    assert together.negative_prompt_mask is None  # the negative prompt has one length
    text = attend(together)
    for row, length in enumerate(lengths):
        kept = together.prompt_embeds[row : row + 1, :length]
        torch.testing.assert_close(text[row : row + 1], attend(PromptEmbeds(kept)), atol=1e-6, rtol=1e-5)
        assert (together.prompt_embeds[row, length:] == 0).all()
        if together.prompt_mask is not None:
            assert together.prompt_mask[row].tolist() == [1] * length + [0] * (max(lengths) - length)


def test_joined_parts_of_several_rows():
    """Parts that were padded already keep their masks, parts without a mask get one."""
    short, long = embeds_of(1, 2, seed=1), embeds_of(4, seed=2)
    joined = PromptEmbeds.cat([short, long])
    assert joined.prompt_mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(joined.prompt_embeds[1, :2], short.prompt_embeds[1])
    assert torch.equal(joined.pooled_prompt_embeds, torch.cat([short.pooled_prompt_embeds, long.pooled_prompt_embeds]))


def test_rows_repeats_and_indices_take_the_mask_along():
    embeds = embeds_of(1, 3)
    assert embeds[1:].prompt_mask.tolist() == [[1, 1, 1]]
    assert embeds[torch.tensor([1, 0])].prompt_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert embeds.repeat(2).prompt_mask.tolist() == [[1, 0, 0], [1, 1, 1]] * 2
    assert embeds.repeat_interleave(2).prompt_mask.tolist() == [[1, 0, 0]] * 2 + [[1, 1, 1]] * 2


def test_lengths_go_with_their_rows():
    """They are numbers of the host: whatever is done to the rows, nobody has to count a mask on a device again."""
    embeds = embeds_of(1, 3, 2, mask=True)
    one = embeds_of(4, mask=True)
    cases = {
        "slice": embeds[1:],
        "index": embeds[torch.tensor([2, 0])],
        "mask": embeds[torch.tensor([True, False, True])],
        "repeat": embeds.repeat(2),
        "interleave": embeds.repeat_interleave(2),
        "cat": PromptEmbeds.cat([embeds, one, embeds[:1]]),
        "negative": embeds.with_negative_of(one),
        "moved": embeds.to("meta", torch.bfloat16),
    }
    expected = {
        "slice": (3, 2), "index": (2, 1), "mask": (1, 2), "repeat": (1, 3, 2) * 2, "interleave": (1, 1, 3, 3, 2, 2),
        "cat": (1, 3, 2, 4, 1), "negative": (1, 3, 2), "moved": (1, 3, 2),
    }  # fmt: skip
    assert {name: case.prompt_lengths for name, case in cases.items()} == expected
    for name, case in cases.items():
        assert case.negative_prompt_lengths == (2,) * len(case), name
        if name != "moved":  # whose mask has no numbers
            assert case.prompt_mask.sum(1).tolist() == list(case.prompt_lengths), name
    without = PromptEmbeds(one.prompt_embeds, one.negative_prompt_embeds, one.pooled_prompt_embeds)
    assert PromptEmbeds.cat([embeds, without]).prompt_lengths is None  # the mask still says it
    assert embeds.with_negative_of(without).negative_prompt_lengths is None


def test_without_the_negative_prompt():
    embeds = embeds_of(1, 3, mask=True)
    rest = embeds.without_negative()
    assert rest.prompt_lengths == (1, 3) and torch.equal(rest.prompt_embeds, embeds.prompt_embeds)
    assert rest.negative_prompt_embeds is rest.negative_prompt_lengths is rest.negative_pooled_prompt_embeds is None


def test_a_dtype_is_for_floating_point_fields():
    """A mask or an index in bfloat16 is no mask and no index."""
    embeds = embeds_of(1, 3, mask=True)
    for moved in (embeds.to(torch.bfloat16), embeds.to("cpu", torch.bfloat16), embeds.to(dtype=torch.bfloat16)):
        assert moved.prompt_embeds.dtype == moved.pooled_prompt_embeds.dtype == torch.bfloat16
        assert moved.prompt_mask.dtype == torch.long
    meta = embeds.to(torch.empty(0, dtype=torch.bfloat16, device="meta"))
    assert meta.prompt_embeds.dtype == torch.bfloat16
    assert (meta.prompt_mask.dtype, meta.prompt_mask.device.type) == (torch.long, "meta")


def test_parts_that_do_not_fit_are_refused():
    whole = embeds_of(2)
    with pytest.raises(ValueError, match="only be joined if all of them have `negative_prompt_embeds`"):
        PromptEmbeds.cat([whole, PromptEmbeds(whole.prompt_embeds, pooled_prompt_embeds=whole.pooled_prompt_embeds)])


def test_the_cache_joins_prompts_of_different_lengths():
    """It encodes every prompt alone, so the lengths of its parts differ."""

    class Encoder:
        device = torch.device("cpu")
        offload_text_encoders = False
        clip_skip = 0
        encoders_on_device = contextlib.nullcontext

        def encode_prompt(self, prompts, negative_prompt=""):
            return PromptEmbeds.cat([embeds_of(len(prompt), seed=len(prompt)) for prompt in prompts])

    encoder, cache = Encoder(), EncodingCache()
    for prompts in (["ab", "abcd"], ["abcd", "a", "ab"]):
        cached, fresh = cache.encode_prompts(encoder, prompts), encoder.encode_prompt(prompts)
        assert torch.equal(cached.prompt_embeds, fresh.prompt_embeds)
        assert torch.equal(cached.prompt_mask, fresh.prompt_mask)
    assert cache.num_prompts_encoded == 3
