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

"""Started by `test_evaluation.py` in two processes: evaluates, and writes what each rank saw to `rank_{r}.json`."""

import json
import os
import sys
from pathlib import Path

import torch

from tests.testing_utils import PROMPTS, tiny_sd_pipeline
from trl_spo.evaluation.evaluate import EvaluationProtocol, evaluate_pipeline


PROTOCOL = EvaluationProtocol("short", num_inference_steps=3, guidance_scale=2.0, seed=5)


def redness(images, prompts):
    return 100 * (images[:, 0] - images[:, 1]).mean(dim=(1, 2))


def no_cats(images, prompts):
    return torch.tensor([float("nan") if prompt == "a red cat" else 1.0 for prompt in prompts])


def main(folder: Path):
    rank = int(os.environ["RANK"])
    sampled = []

    def remembering(images, prompts):
        sampled.append(list(prompts))
        return redness(images, prompts)

    pipeline = tiny_sd_pipeline(folder / f"tokenizer_{rank}", seed=0)
    base = tiny_sd_pipeline(folder / f"tokenizer_{rank}", seed=1)
    result = evaluate_pipeline(
        pipeline, PROMPTS[:5], {"redness": remembering}, PROTOCOL, base, folder / f"written_{rank}", batch_size=8
    )
    one_prompt = evaluate_pipeline(pipeline, PROMPTS[:1], {"redness": redness}, PROTOCOL)  # rank 1 has no share of it
    try:
        evaluate_pipeline(pipeline, PROMPTS[:2], {"no cats": no_cats}, PROTOCOL)
        error = ""
    except (ValueError, RuntimeError) as problem:
        error = str(problem)
    seen = {
        "world_size": torch.distributed.get_world_size(),
        "sampled": sampled[0],
        "scores": result.scores["redness"].tolist(),
        "base_scores": result.base_scores["redness"].tolist(),
        "sheet": result.images.mean().item(),
        "one_prompt": one_prompt.scores["redness"].item(),
        "error": error,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
