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
Trains and measures SPO, its ablations and its rivals in the shapes world, at equal compute, over training seeds.

```shell
python benchmarks/compare/run.py --output compare_output            # the whole study: hours, resumable
python benchmarks/compare/run.py --output compare_quick --quick     # four methods, one seed: a quarter of an hour
python benchmarks/compare/report.py --output compare_output         # tables and figures from what is there
```

Stages: preference pairs and scores of the base model; reward models, each kind once per seed; a sweep of settings for each
method, judged on validation captions; the runs; samples at other guidance scales, and what the rewards see in predictions;
the report. Each
piece of work is a process of its own with one thread, `--jobs` at a time, and leaves one JSON file; what has its file is
not done again, so a second call goes on where the first one stopped. Held-out captions are only ever measured.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path


if __name__ == "__main__":
    # Not this folder: its modules would hide others of the same name.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.compare.tasks import execute, read_json, write_json


ROOT = Path(__file__).resolve().parents[2]


# Settings are tried on a seed of their own, judged by the utility of their best checkpoint on validation captions; rivals
# try as many as SPO, Diffusion-DPO one more. The last ones of SPO, Diffusion-DPO and DDPO were added after the others had
# been seen: their best was at the edge. The first of SPO's are the demo's. (Settings that are not named are those of
# `methods.DEFAULTS`.)
SWEEPS = {
    "spo": [
        {"learning_rate": 5e-4, "kl_coef": 12.0},
        {"learning_rate": 1e-3, "kl_coef": 12.0},
        {"learning_rate": 2e-3, "kl_coef": 12.0},
        {"learning_rate": 1e-3, "kl_coef": 4.0},
        {"learning_rate": 1e-3, "kl_coef": 4.0, "branch_end_step": 6},
        {"learning_rate": 1e-3, "kl_coef": 1.5},
    ],
    "dpo": [
        {"beta": 1000.0, "learning_rate": 1e-3},
        {"beta": 1000.0, "learning_rate": 2e-3},
        {"beta": 1000.0, "learning_rate": 4e-3},
        {"beta": 5000.0, "learning_rate": 1e-3},
        {"beta": 5000.0, "learning_rate": 2e-3},
        {"beta": 300.0, "learning_rate": 4e-3},
        {"beta": 1000.0, "learning_rate": 8e-3},
    ],
    "sft": [
        {"learning_rate": 5e-4},
        {"learning_rate": 1e-3},
        {"learning_rate": 2e-3},
        {"learning_rate": 4e-3},
        {"learning_rate": 5e-4, "batch_size": 64},
        {"learning_rate": 1e-3, "batch_size": 64},
    ],
    "ddpo": [
        {"learning_rate": 1e-3, "samples_per_epoch": 64},
        {"learning_rate": 2e-3, "samples_per_epoch": 64},
        {"learning_rate": 3e-4, "samples_per_epoch": 64},
        {"learning_rate": 3e-4, "samples_per_epoch": 64, "samples_per_prompt": 8},
        {"learning_rate": 1e-3, "samples_per_epoch": 64, "samples_per_prompt": 8},
        {"learning_rate": 2e-3, "samples_per_epoch": 64, "samples_per_prompt": 8},
    ],
}


LEARNED_REWARDS = ("step", "plain", "clean", "all")  # of `methods.REWARDS`


@dataclasses.dataclass(frozen=True)
class Arm:
    """
    One method with its settings.

    Attributes:
        title (`str`): its name in tables.
        method (`str`): see `methods.train`.
        settings (`dict`): what differs from the method's defaults.
        reward (`str`, *optional*): one of `methods.REWARDS`, `"mixed"` (see `methods.with_clip`) or `"exact"`.
        tuned (`bool`): whether the method's other settings are those that its sweep chose, and not its defaults.
        stretch (`float`): budget in multiples of the others'. Methods that need less time per UNet evaluation go on, so
            that their curves also reach the others' CPU time; scores at the common budget are read on the way.
    """

    title: str
    method: str = "spo"
    settings: dict = dataclasses.field(default_factory=dict)
    reward: str | None = "step"
    tuned: bool = True
    stretch: float = 1.0


ARMS = {
    "spo": Arm("SPO, step-aware reward", stretch=2.0),
    "spo_plain": Arm("SPO, reward without step conditioning", reward="plain"),
    "spo_clean": Arm("SPO, clean-image reward", reward="clean"),
    "dpo": Arm("Diffusion-DPO", "dpo", reward=None, stretch=7.0),
    "ddpo": Arm("DDPO (TRL), clean-image reward", "ddpo", reward="clean", stretch=3.5),
    "sft": Arm("fine-tuning on chosen images", "sft", reward=None, stretch=2.5),
    "spo_mixed": Arm("SPO, step-aware reward + 0.5 CLIP", reward="mixed"),
    "spo_exact": Arm("SPO, exact scorer as reward", reward="exact"),
    "spo_demo": Arm("SPO, settings of the demo", settings=SWEEPS["spo"][0]),
    "spo_published": Arm(
        "SPO as published",
        settings={"branch_end_step": 10, "kl_coef": 0.0, "preference_threshold": 0.3},
    ),
    "spo_winner": Arm("SPO, going on from the winner", settings={"resample": "chosen"}),
    "spo_loser": Arm("SPO, going on from the loser", settings={"resample": "rejected"}),
    "spo_random_pair": Arm("SPO, two random candidates", settings={"pair": "random"}),
    "spo_k2": Arm("SPO, K = 2", settings={"num_candidates": 2}),
    "spo_k8": Arm("SPO, K = 8", settings={"num_candidates": 8, "per_device_rollout_batch_size": 16}),
    "spo_kl0": Arm("SPO, no KL term", settings={"kl_coef": 0.0}),
    "spo_0_10": Arm("SPO, all steps", settings={"branch_start_step": 0, "branch_end_step": 10}, reward="all"),
    "spo_2_10": Arm("SPO, steps 2 to 10", settings={"branch_end_step": 10}),
    "spo_2_10_even": Arm(
        "SPO, steps 2 to 10, even weights", settings={"branch_end_step": 10, "timestep_weighting": "even"}
    ),
    "spo_4_8": Arm("SPO, steps 4 to 8", settings={"branch_start_step": 4, "branch_end_step": 8}),
    # Chosen on the validation scores of the arms above, training seed 0.
    "spo_mended": Arm(
        "SPO, clean-image reward, going on from the loser", settings={"resample": "rejected"}, reward="clean"
    ),
}
QUICK_ARMS = ["spo", "spo_plain", "dpo", "sft"]
GUIDED_ARMS = ["spo", "dpo"]  # measured over guidance scales, like the base model
GUIDANCE_SCALES = [1.0, 1.5, 2.0, 3.0, 5.0]
SHOWN = 12  # held-out images of each model that are kept as a picture
REWARD_TIMESTEPS = [0, 1, 101, 301, 501, 601, 701, 801]

FULL = {
    "budget": 24_000,  # UNet evaluations
    "checkpoints": 6,
    "num_pairs": 2400,
    "reward_steps": 150,
    "validation_repeats": 4,
    "heldout_repeats": 5,
    "accuracy_pairs": 512,
    "guidance_repeats": 2,
}
QUICK = {
    "budget": 16_000,
    "checkpoints": 4,
    "num_pairs": 1200,
    "reward_steps": 80,
    "validation_repeats": 2,
    "heldout_repeats": 3,
    "accuracy_pairs": 128,
    "guidance_repeats": 1,
}


# -------------------------------------------------------------------------------------------------------------- plan


def make_plan(args: argparse.Namespace) -> dict:
    """Everything that the results depend on; kept beside them."""
    plan = dict(QUICK if args.quick else FULL)
    for name in plan:
        if getattr(args, name) is not None:
            plan[name] = getattr(args, name)
    return plan


def chosen_settings(output: Path, method: str) -> dict:
    """
    The settings of a method's sweep with the highest validation utility (of the best checkpoint, mean over seeds); those
    of `methods.DEFAULTS` without a sweep.
    """
    points = sweep_scores(output, method)
    if not points:
        return {}
    best = max(points, key=lambda index: sum(points[index]) / len(points[index]))
    return SWEEPS[method][best]


def sweep_scores(output: Path, method: str) -> dict[int, list[float]]:
    """Best validation utility of each run of a sweep, by the index of its settings."""
    found = {}
    for index, settings in enumerate(SWEEPS[method]):
        for path in sorted((output / "sweep" / method / str(index)).glob("*.json")):
            result = read_json(path)
            if all(result["settings"].get(key) == value for key, value in settings.items()):
                found.setdefault(index, []).append(max(point["utility"] for point in result["points"]))
    return found


def stages(args: argparse.Namespace) -> list[list[str]]:
    """Names of the work, in stages that wait for one another. A name is the path of its result."""
    arms = args.only or (QUICK_ARMS if args.quick else list(ARMS))
    runs = [f"run/{arm}/{seed}" for seed in args.seeds for arm in arms]
    methods = [method for method in SWEEPS if any(ARMS[arm].method == method and ARMS[arm].tuned for arm in arms)]
    sweep = []
    if not (args.quick or args.no_sweep):
        sweep = [
            f"sweep/{method}/{index}/{seed}"
            for method in methods
            for seed in args.sweep_seeds
            for index in range(len(SWEEPS[method]))
        ]
    rewards = []
    for task in [*sweep, *runs]:
        for kind in rewards_of(task):
            rewards.append(f"reward/{kind}/{task.rsplit('/', 1)[1]}")
    guidance = []
    if not args.quick:
        guided = [task.split("/") for task in runs]
        guidance = ["guidance/base/0"]
        guidance += [
            f"guidance/{arm}/{seed}" for _, arm, seed in guided if arm in GUIDED_ARMS and int(seed) in args.seeds
        ]
    order = [] if args.quick else [f"order/{seed}" for seed in args.seeds]
    return [["base"], list(dict.fromkeys(rewards)), sweep, runs, [*guidance, *order]]


def arm_of(task: str) -> Arm:
    kind, name, *rest = task.split("/")
    if kind == "run":
        return ARMS[name]
    reward = {"spo": "step", "ddpo": "clean"}.get(name)
    return Arm(task, name, SWEEPS[name][int(rest[0])], reward=reward, tuned=False)


def rewards_of(task: str) -> list[str]:
    """Learned rewards that a run needs: its own, and the step-aware one, which judges those without."""
    own = arm_of(task).reward
    return [own if own in LEARNED_REWARDS else "step"]


def settings_of(output: Path, task: str) -> dict:
    from benchmarks.compare.methods import DEFAULTS

    arm = arm_of(task)
    tuned = chosen_settings(output, arm.method) if arm.tuned else {}
    return {**DEFAULTS[arm.method], **tuned, **arm.settings}


def check_settings(output: Path, tasks: list[str]):
    """Refuses to mix runs of different settings under one name, as after a change of a sweep."""
    for task in tasks:
        path = output / f"{task}.json"
        if task.startswith(("run", "sweep")) and path.is_file():
            found = read_json(path)["settings"]
            expected = settings_of(output, task)
            if found != expected:
                raise SystemExit(
                    f"{path} was run with {found} and the plan asks for {expected}: delete it to run it again."
                )


def interpreter_of(task: str, args: argparse.Namespace) -> str:
    """DDPO needs the environment with the last TRL that has it."""
    is_ddpo = task.startswith(("run", "sweep")) and arm_of(task).method == "ddpo"
    return str(args.ddpo_python if is_ddpo else sys.executable)


# ---------------------------------------------------------------------------------------------- work, in its process


def work(task: str, output: Path, plan: dict):
    """Does one piece of work and leaves its JSON."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    kind, *names = task.split("/")
    start = [time.process_time(), time.perf_counter()]
    kinds = {"base": work_base, "reward": work_reward, "sweep": work_run, "run": work_run}
    kinds |= {"guidance": work_guidance, "order": work_order}
    result = kinds[kind](task, output, plan)
    if "copy_of" not in result:
        result["total_seconds"] = [time.process_time() - start[0], time.perf_counter() - start[1]]
    write_json(output / f"{task}.json", {**result, "task": task, "plan": plan})


def work_base(task: str, output: Path, plan: dict) -> dict:
    """Preference pairs, their latents, and the scores of the base model."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.compare.evaluate import Evaluation
    from benchmarks.compare.methods import decided_pairs
    from examples.shapes.base_scores import load_pipeline
    from examples.shapes.preferences import make_preferences
    from trl_spo import wrap_pipeline
    from trl_spo.images import to_pil

    # Pairs with labels, for training and for the accuracy of reward models.
    pipeline = load_pipeline()
    preferences = make_preferences(pipeline, plan["num_pairs"], split="train", seed=0)
    fresh = make_preferences(pipeline, plan["accuracy_pairs"], split="heldout", seed=1)
    preferences.save_to_disk(str(output / "preferences"))
    fresh.save_to_disk(str(output / "heldout_pairs"))

    # Latents of the decided pairs, for the methods that train offline.
    pairs = decided_pairs(wrap_pipeline(pipeline), preferences)
    prompts = pairs.pop("prompts")
    save_file({name: value.contiguous() for name, value in pairs.items()}, output / "pairs.safetensors")
    write_json(output / "pairs.json", prompts)

    # The base model, with the same noise that every run will be measured with.
    scores = {}
    images = {}
    for split in ("validation", "heldout"):
        evaluation = Evaluation(split, plan[f"{split}_repeats"])
        values = evaluation(pipeline)
        images[split] = values.pop("images")
        scores[split] = as_lists(evaluation, values)
    save_file(images, output / "base.safetensors")
    to_pil(torch.cat(list(images["heldout"][:SHOWN]), 2)).save(output / "samples.png")
    return {"pairs": len(prompts), "ties": plan["num_pairs"] - len(prompts), "scores": scores}


def as_lists(evaluation, values: dict) -> dict:
    """Scores per caption and repeat, diversity per caption, five digits."""
    result = {}
    for name, value in values.items():
        rows = evaluation.by_caption(value) if len(value) == len(evaluation.prompts) else value.tolist()
        result[name] = [[round(v, 5) for v in row] if isinstance(row, list) else round(row, 5) for row in rows]
    return result


def work_reward(task: str, output: Path, plan: dict) -> dict:
    from datasets import load_from_disk

    from benchmarks.compare.evaluate import label_accuracy
    from benchmarks.compare.methods import train_reward_model
    from examples.shapes.base_scores import load_pipeline
    from trl_spo import wrap_pipeline

    _, kind, seed = task.split("/")
    pipeline = load_pipeline()
    folder = output / task
    preferences = load_from_disk(str(output / "preferences"))
    model, cost = train_reward_model(kind, pipeline, preferences, int(seed), plan["reward_steps"], folder)
    model.save_pretrained(folder)
    fresh = load_from_disk(str(output / "heldout_pairs"))
    accuracy = label_accuracy(wrap_pipeline(pipeline), model, fresh, REWARD_TIMESTEPS)
    return {"accuracy": accuracy, **cost}


def work_run(task: str, output: Path, plan: dict) -> dict:
    """One training run: curve on validation captions; for runs of arms also held-out scores."""
    import tempfile

    import torch
    from safetensors.torch import load_file

    from benchmarks.compare.evaluate import Evaluation
    from benchmarks.compare.methods import Recorder, exact_reward, load_pairs, restore_adapter, train, with_clip
    from examples.shapes.base_scores import load_pipeline
    from trl_spo import StepAwareRewardModel
    from trl_spo.images import to_pil

    # A run with the same settings as another one is copied, not repeated.
    arm = arm_of(task)
    seed = int(task.rsplit("/", 1)[1])
    settings = settings_of(output, task)
    twin = find_twin(output, task, settings)
    if twin is not None:
        shutil.copytree(output / twin, output / task, dirs_exist_ok=True)
        return {**read_json(output / f"{twin}.json"), "arm": task.split("/")[1], "copy_of": twin}

    # The reward that trains, and the learned one that judges every run.
    (learned,) = rewards_of(task)
    judge = StepAwareRewardModel.from_pretrained(output / "reward" / learned / str(seed)).eval()
    judge.requires_grad_(False)
    reward = with_clip(judge) if arm.reward == "mixed" else exact_reward if arm.reward == "exact" else judge
    validation = Evaluation("validation", plan["validation_repeats"])
    base = load_file(output / "base.safetensors")

    def summary(scores):
        return {name: values.double().mean().item() for name, values in scores.items() if name != "images"}

    # Train within the budget; the recorder measures at the marks, and its time does not count.
    pipeline = load_pipeline()
    stretch = arm.stretch if task.startswith("run") else 1
    marks = checkpoint_marks(plan["budget"], plan["checkpoints"], stretch)
    recorder = Recorder(pipeline.unet, marks, lambda: summary(validation(pipeline, judge)))
    pairs = load_pairs(output) if arm.method in ("dpo", "sft") else None
    base_point = {
        "evaluations": 0,
        "cpu_seconds": 0.0,
        "updates": 0,
        **summary(validation.score(base["validation"], judge)),
    }
    with tempfile.TemporaryDirectory() as folder:
        wrapped = train(arm.method, pipeline, recorder, seed, settings, reward, pairs, Path(folder))
    recorder.meter.close()
    result = {
        "arm": task.split("/")[1],
        "seed": seed,
        "settings": settings,
        "reward_kind": arm.reward,
        "judge": learned,
        "points": recorder.points,
        "base": base_point,
    }
    if task.startswith("sweep"):
        return result

    # Held-out scores of three checkpoints: at the budget, the best before it, and the last.
    final = next(i for i, point in enumerate(recorder.points) if point["mark"] >= plan["budget"])
    picks = {
        "final": final,
        "chosen": max(range(final + 1), key=lambda i: recorder.points[i]["utility"]),
        "long": len(recorder.points) - 1,
    }
    heldout = Evaluation("heldout", plan["heldout_repeats"])
    pipeline.unet.eval()
    result["heldout"] = {}
    measured = {}
    result["picks"] = {name: recorder.points[i]["mark"] for name, i in picks.items()}
    for name, i in picks.items():
        if name == "long" and i == final:
            continue
        restore_adapter(pipeline.unet, recorder.states[i])
        if i not in measured:
            values = heldout(pipeline, judge)
            strip = to_pil(torch.cat(list(values.pop("images")[:SHOWN]), 2))
            measured[i] = (as_lists(heldout, values), strip)
        result["heldout"][name], strip = measured[i]
        folder = output / task / name
        folder.mkdir(parents=True, exist_ok=True)
        wrapped.save_lora(folder)
        strip.save(folder / "samples.png")
    reward_on_base = heldout.score(base["heldout"], judge)["reward"]
    result["heldout"]["base_reward"] = as_lists(heldout, {"reward": reward_on_base})["reward"]
    return result


def checkpoint_marks(budget: int, checkpoints: int, stretch: float) -> list[int]:
    """UNet evaluations at which a run is looked at: evenly up to the budget, half as often beyond it."""
    count = round(checkpoints * stretch)
    steps = [*range(1, checkpoints + 1), *range(checkpoints + 2, count, 2), *([count] if count > checkpoints else [])]
    return [round(budget * step / checkpoints) for step in steps]


def find_twin(output: Path, task: str, settings: dict) -> str | None:
    """A run of another arm that would be this one again, as when a sweep chooses the demo's settings."""
    kind = task.split("/")[0]
    name = task.split("/")[1]
    seed = task.rsplit("/", 1)[1]
    for other, arm in ARMS.items():
        own = ARMS.get(name)
        path = output / "run" / other / f"{seed}.json"
        if kind != "run" or other == name or not path.is_file():
            continue
        same = (arm.method, arm.reward, arm.stretch) == (own.method, own.reward, own.stretch)
        if same and read_json(path)["settings"] == settings:
            return f"run/{other}/{seed}"
    return None


def work_guidance(task: str, output: Path, plan: dict) -> dict:
    """Scores on held-out captions over guidance scales, of the base model or of a run at the common budget."""
    from benchmarks.compare.evaluate import Evaluation
    from examples.shapes.base_scores import load_pipeline

    _, arm, seed = task.split("/")
    pipeline = load_pipeline()
    if arm != "base":
        pipeline.load_lora_weights(str(output / "run" / arm / seed / "final"))
    heldout = Evaluation("heldout", plan["guidance_repeats"])
    result = {}
    for scale in GUIDANCE_SCALES:
        values = heldout(pipeline, guidance_scale=scale)
        del values["images"]
        result[str(scale)] = as_lists(heldout, values)
    return {"arm": arm, "scales": result}


def work_order(task: str, output: Path, plan: dict) -> dict:
    """What the reward models of a seed, and the CLIP they were trained from, see in predictions."""
    from datasets import load_from_disk

    from benchmarks.compare.evaluate import prediction_order
    from examples.shapes.base_scores import load_pipeline
    from examples.shapes.settings import CLIP
    from trl_spo import StepAwareRewardModel, wrap_pipeline

    seed = task.split("/")[1]
    folders = {path.parent.name: path for path in sorted((output / "reward").glob(f"*/{seed}")) if path.is_dir()}
    models = {name: StepAwareRewardModel.from_pretrained(path).eval() for name, path in folders.items()}
    models["CLIP, untrained"] = StepAwareRewardModel.from_clip(CLIP, processor=CLIP).eval()
    fresh = load_from_disk(str(output / "heldout_pairs"))
    steps = [step for step in REWARD_TIMESTEPS if step in (0, 101, 301, 501, 701)]
    return {"order": prediction_order(wrap_pipeline(load_pipeline()), models, fresh, steps)}


# ------------------------------------------------------------------------------------------------------------ running


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, help="Folder of the results. Default: compare_output, or compare_quick."
    )
    parser.add_argument("--quick", action="store_true", help="Four methods, one seed, a small budget.")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", help=f"Of {', '.join(ARMS)}.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Training seeds. Default: 0 1 2; quick: 0.")
    parser.add_argument("--sweep_seeds", type=int, nargs="+", default=[100], help="Training seeds of the sweeps.")
    parser.add_argument("--no_sweep", action="store_true", help="Leave the sweeps out: settings of `DEFAULTS`.")
    parser.add_argument("--jobs", type=int, default=2, help="Processes at a time, with one thread each.")
    parser.add_argument("--ddpo_python", type=Path, default=ROOT / ".venv-ddpo" / "bin" / "python")
    parser.add_argument("--no_report", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    for name in FULL:
        parser.add_argument(f"--{name}", type=int, help=f"Default: {FULL[name]}; quick: {QUICK[name]}.")
    args = parser.parse_args(argv)
    args.output = args.output or Path("compare_quick" if args.quick else "compare_output")
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.work:
        work(args.work, args.output, read_json(args.output / "plan.json"))
        return 0
    plan = make_plan(args)
    path = args.output / "plan.json"
    if path.is_file() and read_json(path) != plan:
        raise SystemExit(f"{args.output} holds results of another plan, {read_json(path)}; name another folder.")
    everything = stages(args)
    needs_ddpo = any(interpreter_of(task, args) == str(args.ddpo_python) for stage in everything for task in stage)
    if needs_ddpo and shutil.which(args.ddpo_python) is None:
        raise SystemExit(
            f"DDPO needs an environment with TRL 0.23.1, and there is no {args.ddpo_python}: `make test-ddpo` makes it. "
            "Or name other arms with --only."
        )
    write_json(path, plan)
    failed: list[str] = []

    def command_of(task: str) -> list[str]:
        return [
            interpreter_of(task, args),
            str(Path(__file__).resolve()),
            "--output",
            str(args.output),
            "--work",
            task,
        ]

    for stage in everything:
        check_settings(args.output, stage)
        failed += execute(stage, args.output, command_of, args.jobs)
        if failed and stage == ["base"]:
            break
    if failed:
        print(f"\n{len(failed)} failed: {', '.join(failed)}; see {args.output / 'logs'}.", file=sys.stderr, flush=True)
    if not args.no_report and (args.output / "base.json").is_file():
        from benchmarks.compare.report import write_report

        print("\n" + write_report(args.output, args.output / "report"), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
