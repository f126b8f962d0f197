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
The losses of both trainers as pure functions: SPO's two (https://huggingface.co/papers/2406.04314), of log-probabilities and of
scores, and CLIP's contrastive loss.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def caption_contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    prompts: list[str],
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    CLIP's symmetric contrastive loss (https://huggingface.co/papers/2103.00020, section 2.3) per pair: each image must
    find its caption among those of the batch, and each caption its image. The same caption further down the batch does
    not count as a negative; a batch with one distinct caption has loss 0.

    Args:
        image_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
            Normalised image features.
        text_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
            Normalised text features.
        logit_scale (`torch.Tensor` of shape `()`):
            Factor of the cosines.
        prompts (`list[str]`):
            The captions, to tell which are equal.
        present (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Boolean. An absent pair, such as one with an unreadable image, is not a negative of any other, and its own loss
            is 0.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    # Mask what is not a negative: equal captions, and pairs that are absent.
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    ids = torch.tensor([numbers[prompt] for prompt in prompts], device=image_embeds.device)
    targets = torch.arange(len(ids), device=ids.device)
    masked = ids[:, None] == ids
    if present is not None:
        masked = masked | ~present[:, None] | ~present
    masked = masked & (targets[:, None] != targets)

    # The matching entries lie on the diagonal, in both directions.
    logits = (logit_scale * image_embeds @ text_embeds.T).masked_fill(masked, float("-inf"))  # (images, captions)
    image_losses = F.cross_entropy(logits, targets, reduction="none")
    text_losses = F.cross_entropy(logits.T, targets, reduction="none")
    return (image_losses + text_losses) / 2


class SPOLossOutput(NamedTuple):
    """
    Per-pair values of [`spo_loss`].

    Attributes:
        losses (`torch.Tensor` of shape `(batch_size,)`): not reduced.
        chosen_ratio (`torch.Tensor` of shape `(batch_size,)`): p_theta / p_ref of the chosen sample, clipped.
        rejected_ratio (`torch.Tensor` of shape `(batch_size,)`): the same of the rejected one.
    """

    losses: torch.Tensor
    chosen_ratio: torch.Tensor
    rejected_ratio: torch.Tensor


def spo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    beta: float = 10.0,
    epsilon: float = 0.1,
) -> SPOLossOutput:
    r"""
    Step-wise preference loss on pairs that were drawn from the same denoising step:

        L = -log sigmoid(beta * (log r_w - log r_l)),   r = clip(p_theta / p_ref, 1 - epsilon, 1 + epsilon)

    (paper, the objective of section 3.3 with the clipping of its released code). It is computed in log space, where
    log r = clamp(logp_theta - logp_ref, log(1 - epsilon), log(1 + epsilon)): the same value, and no overflow at any
    log-ratio. Before the first update both ratios are 1 and every loss is ln 2; with the paper's settings a loss stays
    within [0.126, 2.133]. As published, a clipped side gets no gradient in either direction.

    Args:
        chosen_logps, rejected_logps (`torch.Tensor` of shape `(batch_size,)`): log-probabilities of chosen and rejected
            under the policy, averaged over latent dimensions ([`gaussian_log_prob`]).
        ref_chosen_logps, ref_rejected_logps (`torch.Tensor` of shape `(batch_size,)`): under the frozen reference.
        beta (`float`, *optional*, defaults to `10.0`): strength of the preference, per mean log-probability.
        epsilon (`float`, *optional*, defaults to `0.1`): clipping range of the ratios, in (0, 1).

    Returns:
        [`SPOLossOutput`].
    """
    low = math.log1p(-epsilon)
    high = math.log1p(epsilon)
    chosen_logratio = torch.clamp(chosen_logps - ref_chosen_logps, low, high)
    rejected_logratio = torch.clamp(rejected_logps - ref_rejected_logps, low, high)
    losses = -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))
    return SPOLossOutput(losses, chosen_logratio.exp().detach(), rejected_logratio.exp().detach())


def step_preference_loss(
    scores_0: torch.Tensor,
    scores_1: torch.Tensor,
    label_0: torch.Tensor,
    label_1: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Pairwise loss of the step-aware reward model (paper section 3.2; PickScore,
    https://huggingface.co/papers/2305.01569, eq. 2): the Kullback-Leibler divergence from softmax(score_0, score_1) to the labels,

        L = sum_i label_i (log label_i - log softmax(scores)_i).

    For a label of 1 / 0 this is the cross entropy. For a tie (0.5 / 0.5) the constant makes the minimum 0, reached at
    equal scores.

    Args:
        scores_0, scores_1 (`torch.Tensor` of shape `(batch_size,)`): scores of the two images of a pair.
        label_0, label_1 (`torch.Tensor` of shape `(batch_size,)`): preferences in [0, 1] that sum to 1.
        weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): weight of each pair, such as
            1 / num_example_per_prompt.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, or with `weights` the scalar sum(weights * losses) / sum(weights).
    """
    log_probs = F.log_softmax(torch.stack([scores_0, scores_1]).float(), dim=0)
    labels = torch.stack([label_0, label_1]).to(log_probs)
    losses = (torch.xlogy(labels, labels) - labels * log_probs).sum(0)
    if weights is None:
        return losses
    weights = weights.to(losses)
    return (weights * losses).sum() / weights.sum()
