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
The program that `test_fsdp2.py` and `test_zero3.py` start in two processes: `run_fsdp2.py FOLDER SCENARIO [SCENARIO ...]`. What
rank r saw of a scenario is left in `FOLDER/SCENARIO_r.pt`. The tests call the same functions in one process, on the pairs of both.
"""

import functools
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from tests.run_distributed import (
    MORE_PROMPTS,
    RANK,
    RecordingTrainer,
    ReplayingTrainer,
    redness,
    shard_on_cpu,
    spo_config,
    spo_result,
    trained,
)
from tests.testing_utils import PROMPTS, tiny_sd_pipeline, tiny_sdxl_pipeline
from trl_spo import LatentRewardModel, SPOTrainer
from trl_spo.pair_queue import RowLayout
from trl_spo.pipelines.shards import is_sharded, whole


# Nine prompts in rounds of four: the last round has one, for rank 0 alone. Five prompts to evaluate: three and two. SGD, whose
# step is linear in the gradient, so that rounding stays rounding. The norm of all gradients is far above the limit.
COMPARED = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.005,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_branches": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "log_images_steps": 2,
    "num_eval_images": 3,
}


ONE_STEP = {
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 0.0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "log_images_steps": 0,
}


OF_BOTH = {"per_device_train_batch_size": 6, "per_device_rollout_batch_size": 4}  # one process instead of two


FAMILIES = {
    "sdxl": tiny_sdxl_pipeline,
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_klein_pipeline,
    "z_image": tiny_z_image_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
}


RESUMED = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "max_grad_norm": 1.0,
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "save_steps": 1,
    "eval_strategy": "no",
    "log_images_steps": 0,
}


def unet(folder: Path):
    """Stable Diffusion 1.5, two inner steps per branch, and a reward that judges images."""
    return tiny_sd_pipeline(folder / f"tokenizer_{RANK}"), redness, {"num_inner_steps": 2, "kl_coef": 0.5}


def whole_unet(folder: Path):
    """The same, all of its weights trained."""
    return tiny_sd_pipeline(folder / f"tokenizer_{RANK}"), redness, {"use_peft": False, "learning_rate": 0.01}


def transformer(folder: Path):
    """Stable Diffusion 3 and LPO: a latent reward judges noisy latents. Blocks are recomputed in the backward pass."""
    reward = LatentRewardModel.from_pipeline(tiny_sd3_pipeline(folder / f"reward_tokenizer_{RANK}", seed=1))
    return tiny_sd3_pipeline(folder / f"tokenizer_{RANK}"), reward, {"gradient_checkpointing": True}


class Traffic:
    """
    Counts what this process exchanges with the others while it is entered.

    Attributes:
        described (`list[tuple[int, int]]`): pairs of each of its rollouts, and bytes of what it told the others about them.
        rows (`list[tuple[int, int]]`): pairs that it sent to others, and their bytes.
        weights (`int`): bytes of all weights that were gathered, its own part included.
        calls (`int`): calls of the denoiser.
    """

    def __init__(self, denoiser: torch.nn.Module):
        self.denoiser, self.weights, self.calls = denoiser, 0, 0
        self.described, self.rows = [], []

    def __enter__(self) -> "Traffic":
        distributed = torch.distributed
        name = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
        self.originals = {n: getattr(distributed, n) for n in (name, "all_gather_object", "all_to_all_single")}

        def gather_object(received, sent, *args, **kwargs):
            if isinstance(sent[0], tuple) and isinstance(sent[0][1], RowLayout):
                self.described.append((len(sent[0][0]), len(pickle.dumps(sent))))
            return self.originals["all_gather_object"](received, sent, *args, **kwargs)

        def exchange(received, sent, *args, **kwargs):
            self.rows.append((len(sent), sent.nbytes))
            return self.originals["all_to_all_single"](received, sent, *args, **kwargs)

        def gather_weights(output_tensor, *args, **kwargs):
            self.weights += output_tensor.nbytes
            return self.originals[name](output_tensor, *args, **kwargs)

        setattr(distributed, name, gather_weights)
        distributed.all_gather_object = gather_object
        distributed.all_to_all_single = exchange
        self.hook = self.denoiser.register_forward_pre_hook(self.count)
        return self

    def count(self, *args):
        self.calls += 1

    def __exit__(self, *args):
        self.hook.remove()
        for name, function in self.originals.items():
            setattr(torch.distributed, name, function)


def build(folder: Path, recipe: Callable, trainer_class: type = RecordingTrainer, name: str = "out", **settings):
    pipeline, reward, own = recipe(folder)
    config = spo_config(folder, **{"output_dir": str(folder / name), **COMPARED, **own, **settings})
    return trainer_class(config, pipeline, reward, train_dataset=MORE_PROMPTS[:9], eval_dataset=PROMPTS[:5])


def finish(trainer) -> dict:
    """Train, publish and evaluate once more."""
    trainer.train()
    trainer.save_model()
    return {**spo_result(trainer), "evaluation": trainer.evaluate()}


def compared(folder: Path, recipe: Callable) -> dict:
    trainer = build(folder, recipe)
    denoiser = trainer.pipeline.denoiser
    with Traffic(denoiser) as training:
        result = finish(trainer)
    prompts = PROMPTS[:2]
    trainer.generate(prompts)  # their embeddings are known then
    with Traffic(denoiser) as sampling:
        trainer.generate(prompts)
    parameters = [(p.shape, p.element_size()) for p in denoiser.parameters()]
    result |= {
        "described": training.described,
        "rows": training.rows,
        "sampling": (sampling.calls, sampling.weights),
        "parameters": parameters,
    }
    units = [type(m).__name__ for m in trainer.pipeline.denoiser.modules() if is_sharded(m)]
    frozen = trainer.pipeline._frozen_copy
    return {**result, "units": units, "frozen_is_sharded": frozen is not None and is_sharded(frozen)}


def replay(folder: Path, recipe: Callable, recorded: list[dict]) -> dict:
    """`compared` in one process, without shards, on the rollouts of two."""
    trainer = build(folder, recipe, ReplayingTrainer, **OF_BOTH)
    trainer.recorded = recorded
    return finish(trainer)


def of_family(folder: Path, make: Callable):
    """A LoRA of any family, and a reward that judges images."""
    return make(folder / f"tokenizer_{RANK}"), redness, {"height": 32, "width": 32}


def families(folder: Path) -> dict:
    """A step of every other family."""
    found = {}
    for name, make in FAMILIES.items():
        trainer = build(folder / name, functools.partial(of_family, make=make), **ONE_STEP)
        trainer.train()
        found[name] = {**spo_result(trainer), "is_sharded": is_sharded(trainer.pipeline.denoiser)}
    return found


def family_alone(folder: Path, name: str, recorded: list[dict]) -> dict:
    """The same in one process."""
    recipe = functools.partial(of_family, make=FAMILIES[name])
    trainer = build(folder, recipe, ReplayingTrainer, **ONE_STEP, **OF_BOTH)
    trainer.recorded = recorded
    trainer.train()
    return spo_result(trainer)


def half_precision(folder: Path) -> dict:
    """One step of a bfloat16 denoiser under autocast."""
    pipeline, reward, settings = transformer(folder)
    settings = {**COMPARED, **settings, **ONE_STEP, "bf16": True}
    trainer = RecordingTrainer(spo_config(folder, **settings), pipeline.to(torch.bfloat16), reward, MORE_PROMPTS[:4])
    trainer.train()
    return spo_result(trainer)


def half_precision_alone(folder: Path, recorded: list[dict]) -> dict:
    """The same in one process."""
    pipeline, reward, settings = transformer(folder)
    config = spo_config(folder, **{**COMPARED, **settings, **ONE_STEP, **OF_BOTH, "bf16": True})
    trainer = ReplayingTrainer(config, pipeline.to(torch.bfloat16), reward, MORE_PROMPTS[:4])
    trainer.recorded = recorded
    trainer.train()
    return spo_result(trainer)


def resumed(
    folder: Path, recipe: Callable, written: str = "SHARDED_STATE_DICT", other: str = "FULL_STATE_DICT"
) -> dict:
    """Two steps, and the second once more, from a checkpoint, by a run that would write the state of the optimizer another way."""
    os.environ["FSDP_STATE_DICT_TYPE"] = written
    trainer = build(folder, recipe, **RESUMED)
    trainer.train()
    os.environ["FSDP_STATE_DICT_TYPE"] = other
    again = build(folder, recipe, name="again", **RESUMED)
    again.train(resume_from_checkpoint=folder / "out" / "checkpoint-1")
    return {"uninterrupted": state_of(trainer), "resumed": state_of(again)}


class Beginning(TrainerCallback):
    """Keeps the weights and the moments of the optimizer as they are before the first step."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights = [whole(p).clone() for p in model.parameters() if p.requires_grad]
        self.moments = [whole(entry["exp_avg"]).clone() for entry in optimizer.state_dict()["state"].values()]


def resumed_by_others(folder: Path) -> dict:
    """The second step of `resumed_transformer`, by another number of processes."""
    beginning = Beginning()
    settings = {**RESUMED, "output_dir": str(folder / "out")}
    pipeline, reward, own = transformer(folder)
    config = spo_config(folder, **{**COMPARED, **own, **settings})
    trainer = SPOTrainer(config, pipeline, reward, train_dataset=MORE_PROMPTS[:9], callbacks=[beginning])
    trainer.train(resume_from_checkpoint=folder.parent / "resumed_transformer" / "out" / "checkpoint-1")
    steps = [float(whole(state["step"])) for state in trainer.optimizer.state_dict()["state"].values()]
    return {
        "beginning": beginning.weights,
        "moments": beginning.moments,
        "weights": trained(trainer),
        "steps": steps,
        "pairs": trainer.pair_loader.num_pairs_seen,
        "waiting": trainer.pair_loader.waiting,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }


def state_of(trainer) -> dict:
    moments = {}
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    else:
        for number, state in enumerate(trainer.optimizer.state_dict()["state"].values()):
            moments.update({f"{number}.{name}": whole(value) for name, value in state.items()})
    return {**spo_result(trainer), "moments": moments, "waiting": trainer.pair_loader.state_dict()}


def resumed_transformer(folder: Path) -> dict:
    found = resumed(folder, transformer)
    if "ACCELERATE_USE_FSDP" in os.environ:
        found["refusal"] = refusal_of_another_optimizer(folder)
    return found


def refusal_of_another_optimizer(folder: Path) -> str:
    trainer = build(folder, transformer, name="other", **{**RESUMED, "optim": "sgd"})
    try:
        trainer.train(resume_from_checkpoint=folder / "out" / "checkpoint-1")
    except ValueError as error:
        return str(error)
    return ""


def resumed_whole_unet(folder: Path) -> dict:
    return resumed(folder, whole_unet, written="FULL_STATE_DICT", other="SHARDED_STATE_DICT")


def rolled_out_apart(folder: Path) -> dict:
    """Rollouts by the shards, and by a process of each rank that has the whole denoiser; two rounds without padding."""
    results = {}
    for name, devices in (("shards", None), ("apart", ["cpu", "cpu"])):
        pipeline, reward, own = unet(folder / name)
        settings = {**COMPARED, **own, "num_branches": None, "rollout_devices": devices, "rollout_ahead": True}
        config = spo_config(folder, **{**settings, "output_dir": str(folder / name), "eval_strategy": "no"})
        trainer = SPOTrainer(config, pipeline, reward, train_dataset=MORE_PROMPTS[:8])
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results[name] = {"weights": trained(trainer), "losses": losses}
    return results


def compared_unet(folder: Path) -> dict:
    return compared(folder, unet)


def compared_whole_unet(folder: Path) -> dict:
    return compared(folder, whole_unet)


def compared_transformer(folder: Path) -> dict:
    return compared(folder, transformer)


def main(folder: Path, scenarios: list[str]):
    for name in scenarios:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        torch.save(globals()[name](place), folder / f"{name}_{RANK}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    shard_on_cpu()
    main(Path(sys.argv[1]), sys.argv[2:])
