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
Score the images of a model, alone or against its base with the same prompts and seeds, under a stated protocol.

```bash
trl-spo evaluate --lora spo-sd15 --base --prompts validation.txt --metrics pickscore hps_v2.1 image_reward aesthetic
trl-spo evaluate --lora spo-sd15 --base --prompts validation.txt --metrics step_reward \
    --reward_model_name_or_path step-reward-sd15
```

Prints a Markdown table and writes `metrics.json`, `metrics.md` and `contact_sheet.png` to `--output_dir`. Without
`--protocol` it samples as `trl-spo sample` does: with the sampler that the LoRA was trained for. Numbers that are compared with
those of others need a named protocol.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .arguments import (
    STEP_REWARD,
    LoadedPipelineArguments,
    RewardModelArguments,
    SamplerArguments,
    json_option,
    leave_process_group,
)
from .errors import run
from .parser import ScriptParser
from .sampler import describe_model, make_protocol


@dataclass
class EvaluateArguments:
    r"""
    What to measure, against what, and how.

    Args:
        metrics (`list[str]`, *optional*, defaults to `["pickscore", "hps_v2.1", "image_reward", "aesthetic"]`):
            Names of `trl_spo.evaluation.metrics.METRICS`; one of your own as `module:attribute`; the folder or Hub id of a saved
            reward model; and `step_reward` for the reward model of the other arguments. Reward models judge finished images
            at timestep 0.
        metric_options (`dict`, *optional*):
            Per metric, arguments of its `from_pretrained`, such as folders instead of Hub ids. JSON on the command line.
        base (`bool`, *optional*, defaults to `False`):
            Compare with the same model without the LoRA.
        base_model_name_or_path (`str`, *optional*):
            Compare with this pipeline instead, as after full fine-tuning.
        num_sheet_images (`int`, *optional*, defaults to `16`):
            Images on the contact sheet, spread evenly over the prompts.
    """

    metrics: list[str] = field(
        default_factory=lambda: ["pickscore", "hps_v2.1", "image_reward", "aesthetic"],
        metadata={
            "help": "Metrics to compute: pickscore, hps_v2.1, hps_v2.0, image_reward, aesthetic, clip_score, and step_reward, "
            "the reward model."
        },
    )
    metric_options: dict | str | None = field(
        default=None, metadata={"help": "Per metric, arguments of its from_pretrained, as JSON."}
    )
    base: bool = field(default=False, metadata={"help": "Compare with the same model without the LoRA."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Compare with this pipeline instead."})
    num_sheet_images: int = field(default=16, metadata={"help": "Images on the contact sheet."})

    def __post_init__(self):
        if isinstance(self.metric_options, str):
            self.metric_options = json_option("metric_options", self.metric_options)
        unknown = set(self.metric_options or {}) - set(self.metrics)
        if unknown:
            raise ValueError(f"`metric_options` names {sorted(unknown)}, which `metrics` does not: {self.metrics}.")


def make_parser(prog: str | None = None) -> ScriptParser:
    """The parser whose results [`main`] takes."""
    return ScriptParser(
        (LoadedPipelineArguments, SamplerArguments, RewardModelArguments, EvaluateArguments), prog=prog
    )


def check_arguments(sampler_args: SamplerArguments, evaluate_args: EvaluateArguments) -> None:
    """
    Raises:
        SystemExit: if the arguments contradict each other.
    """
    if evaluate_args.base and sampler_args.lora is None:
        raise SystemExit(
            "--base compares with the model without the LoRA, and there is no --lora. To compare two pipelines, name "
            "the other one with --base_model_name_or_path."
        )
    if evaluate_args.base and evaluate_args.base_model_name_or_path is not None:
        raise SystemExit("--base and --base_model_name_or_path name two things to compare with; give one of them.")
    if not sampler_args.has_one_seed:
        raise SystemExit(
            f"An evaluation has one --seed of at least 0, that of its first image, and image i has seed + i; got "
            f"{sampler_args.seed}. Repeat a prompt for several images of it."
        )


def describe_subject(
    model_args: LoadedPipelineArguments,
    sampler_args: SamplerArguments,
    evaluate_args: EvaluateArguments,
    pipeline,
    prompts: list[str],
) -> dict[str, Any]:
    """What the report says was evaluated: the model, what it is compared with, and the prompts."""
    from ..evaluation.provenance import describe_lora, describe_prompts

    subject = {"model": describe_model(model_args, pipeline)}
    if sampler_args.lora is not None:
        file = sampler_args.locate_lora()
        subject["lora"] = describe_lora(sampler_args.lora, file, sampler_args.lora_scale)
    if evaluate_args.base_model_name_or_path is not None:
        subject["base"] = {"model": evaluate_args.base_model_name_or_path, "dtype": model_args.dtype}
    subject["prompts"] = describe_prompts(prompts, sampler_args.source_of_prompts())
    return subject


def load_metrics(arguments: EvaluateArguments, reward_args: RewardModelArguments, device) -> dict:
    """The metrics by name, in the order given."""
    from ..evaluation.named import load_metrics as load_named

    own = {STEP_REWARD: reward_args.load}
    return load_named(arguments.metrics, arguments.metric_options, device, own)


def main(
    model_args: LoadedPipelineArguments,
    sampler_args: SamplerArguments,
    reward_args: RewardModelArguments,
    evaluate_args: EvaluateArguments,
):
    """Samples, scores, compares, prints and writes; returns the [`EvaluationResult`]."""
    from ..evaluation.evaluate import NO_LORA, evaluate_pipeline
    from ..evaluation.named import check_metrics
    from ..evaluation.protocols import is_named, protocol_of_pipeline
    from ..evaluation.result import NOT_FOR_OTHERS
    from ..training.checkpointing import check_output_dir

    # Check everything that can be checked before a model is loaded, the cheapest first.
    check_arguments(sampler_args, evaluate_args)
    check_metrics(evaluate_args.metrics, evaluate_args.metric_options, own=[STEP_REWARD])
    check_output_dir(sampler_args.output_dir)
    prompts = sampler_args.read_prompts()
    sampler_args.locate_lora()
    protocol = make_protocol(sampler_args.protocol, sampler_args, model_args)

    # Load the model with its LoRA, and the metrics.
    pipeline = sampler_args.place(model_args.load_pipeline())  # with the LoRA: a broken one is found before any image
    protocol = protocol_of_pipeline(protocol, pipeline)
    device = sampler_args.target_device()
    metrics = load_metrics(evaluate_args, reward_args, device)
    subject = describe_subject(model_args, sampler_args, evaluate_args, pipeline, prompts)

    # Find out what to compare with: nothing, the same model without its LoRA, or another pipeline.
    base = NO_LORA if evaluate_args.base else None  # one model in memory is enough
    if evaluate_args.base_model_name_or_path is not None:
        # Its own repository: the revision and the VAE of the other do not concern it.
        other = dataclasses.replace(
            model_args, model_name_or_path=evaluate_args.base_model_name_or_path, revision=None, vae_name_or_path=None
        )
        base = other.load_pipeline().to(device)

    # Evaluate; the main process writes the files.
    result = evaluate_pipeline(
        pipeline,
        prompts,
        metrics,
        protocol=protocol,
        base=base,
        output_dir=sampler_args.output_dir,
        batch_size=sampler_args.batch_size,
        num_sheet_images=evaluate_args.num_sheet_images,
        progress="evaluation",
        subject=subject,
    )
    print(result.subject_in_words())
    print(f"\n{result.table()}\n")
    print(protocol.in_words() + ("" if is_named(protocol) else f" {NOT_FOR_OTHERS}"))
    print(f"Written to {sampler_args.output_dir}: metrics.md, metrics.json, contact_sheet.png.")
    leave_process_group()
    return result


if __name__ == "__main__":
    run(main, make_parser())
