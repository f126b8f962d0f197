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
Writes and executes `spo_shapes.ipynb`. Run it from anywhere, with the package (`pip install -e ".[eval]"`), nbformat, nbclient
and ipykernel installed:

    python examples/notebooks/make_spo_shapes.py
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


HERE = Path(__file__).resolve().parent
CELLS = [
    (
        "markdown",
        """# SPO in the shapes world

A text-to-image model small enough for a CPU learns what people like about its pictures, step by step. The world is exact:
a program scores how clean and vivid an image is (*aesthetics*) and whether it shows its caption (*alignment*), so we can
see what SPO does without asking anybody. For the whole way, with a reward model learnt from preferences, run `trl-spo demo`.

Everything here runs in a few minutes on two CPU cores. The first cell installs the package where it is not there yet, as on
Colab: from the checkout around this notebook, or else from the package index.""",
    ),
    (
        "code",
        """import importlib.util
from pathlib import Path


if importlib.util.find_spec("trl_spo") is None or importlib.util.find_spec("trl_spo_shapes") is None:
    package = "../.." if Path("../../setup.cfg").is_file() else "trl-spo"
    %pip install --quiet "{package}[eval]\"""",
    ),
    (
        "code",
        """import tempfile

import torch
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.utils import logging
from trl_spo_shapes import world
from trl_spo_shapes.base_scores import load_pipeline
from trl_spo_shapes.report import CURVES, readable

from trl_spo import SPOConfig, SPOTrainer
from trl_spo.evaluation.curves import plot_curves
from trl_spo.evaluation.sheets import before_after_sheet, candidate_tree
from trl_spo.evaluation.statistics import paired_statistics, statistics_table
from trl_spo.kohya import export_kohya


logging.set_verbosity_error()
torch.manual_seed(0)
pipeline = load_pipeline()
prompts = list(world.captions("train"))
held_out = list(world.captions("heldout"))
print(len(prompts), "captions to train on, such as:", *prompts[:3], sep="\\n  ")""",
    ),
    (
        "markdown",
        """## The reward

SPO asks a reward which of several *predictions of the finished image* is better, in the middle of the denoising. Any
function of images, prompts and timesteps will do; a `StepAwareRewardModel` is one that was trained for it. Ours is the
exact utility, half aesthetics and half alignment, on a scale on which a difference of .1 means a preference of 73%.""",
    ),
    (
        "code",
        """def reward(images, prompts, timesteps):
    return 10 * world.utility(images, prompts)


metrics = {
    "aesthetics": lambda images, prompts: world.aesthetics_score(images),
    "alignment": world.alignment_score,
}""",
    ),
    (
        "markdown",
        """## The trainer

It takes the pipeline as diffusers loads it. The settings are those of the demo, for fewer steps.""",
    ),
    (
        "code",
        """config = SPOConfig(
    output_dir=tempfile.mkdtemp(),
    num_inference_steps=10,
    guidance_scale=1.0,
    branch_start_step=2,
    branch_end_step=8,
    num_candidates=4,
    per_device_rollout_batch_size=32,
    per_device_train_batch_size=64,
    per_device_eval_batch_size=103,
    max_steps=12,
    learning_rate=5e-4,
    kl_coef=12.0,
    preference_threshold=0.1,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=4,
    eval_on_start=True,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = SPOTrainer(
    config,
    pipeline,
    reward,
    train_dataset=prompts,
    eval_dataset=list(world.captions("validation")),
    metrics=metrics,
    peft_config=LoraConfig(
        r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    ),
)
trainer.remove_callback(PrinterCallback)""",
    ),
    (
        "markdown",
        """## One rollout

At each of the steps 2 to 7, four candidates are drawn from one latent. Each column shows what the model expects the image
to become from each candidate, best first, with its reward. Winner and loser become a training pair if they differ enough;
a random candidate, marked blue, starts the next step.""",
    ),
    (
        "code",
        """pairs = trainer.rollout(held_out[:8], seed=1, return_trajectory=True)
row = int(torch.bincount(pairs.prompt_index, minlength=8).argmax())  # the prompt with most pairs
candidate_tree(trainer.pipeline, pairs, row, title=readable(held_out[row]))""",
    ),
    (
        "markdown",
        """## Before

Images of held-out captions, with one fixed seed each.""",
    ),
    (
        "code",
        """images_before = trainer.generate(held_out)
before = trainer.score(images_before, held_out)
{name: round(values.mean().item(), 3) for name, values in before.items()}""",
    ),
    (
        "markdown",
        """## Training

The policy is pulled towards the winners and away from the losers, step by step. Before the first update the loss is
ln 2 = 0.693.""",
    ),
    (
        "code",
        """result = trainer.train()
trainer.save_model()
print(f"{result.metrics['train_runtime']:.0f} seconds, {trainer.pair_loader.num_pairs_seen} pairs")""",
    ),
    (
        "markdown",
        """Above, what the validation captions gain. Below, how the pairs are learnt: the share of new pairs that the model orders
rightly before it has trained on them (.5 is chance), how much more than the base model it prefers winners to losers, and the
mean reward of the candidates. Everything else that was logged is in `trainer.state.log_history`.""",
    ),
    ("code", """plot_curves(trainer.state.log_history, CURVES, title="SPO in the shapes world")"""),
    (
        "markdown",
        """## After

The same captions and seeds. What counts is the paired difference and its interval. Twelve steps are few, and one
run is one run: take the size of the effect from the demo, not from here.""",
    ),
    (
        "code",
        """from IPython.display import Markdown


images_after = trainer.generate(held_out)
after = trainer.score(images_after, held_out)
statistics = {name: paired_statistics(after[name], held_out, before[name]) for name in after}
Markdown(statistics_table(statistics))""",
    ),
    (
        "code",
        """shown = torch.linspace(0, len(held_out) - 1, 12).long().tolist()
before_after_sheet(
    images_before[shown],
    images_after[shown],
    [readable(held_out[i]) for i in shown],
    {name: values[shown] for name, values in before.items()},
    {name: values[shown] for name, values in after.items()},
    columns=3,
    title="Before and after SPO, same seeds (DDIM, 10 steps, eta 1, guidance 1)",
)""",
    ),
    (
        "markdown",
        """## Take it along

`save_model` wrote a LoRA that `pipe.load_lora_weights(folder)` reads without this package, with a model card beside it.
`export_kohya` writes it for ComfyUI and AUTOMATIC1111, and `merge_lora` makes a complete pipeline of it.""",
    ),
    (
        "code",
        """file = export_kohya(config.output_dir, f"{config.output_dir}/spo_shapes_kohya.safetensors")
print(file.name, file.stat().st_size // 1024, "KiB")""",
    ),
]


def build() -> nbformat.NotebookNode:
    new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    cells = [new[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(CELLS)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leaves the outputs that do not depend on the machine: no warnings, no paths, one format per picture."""
    private = (str(Path.home()), str(HERE.parents[1]), tempfile.gettempdir() + "/")
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.get("data", {}).pop("image/jpeg", None)
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if "image" not in k)]
            assert not any(path in text for path in private for text in texts), f"an output has a local path: {texts}"
    notebook.metadata.pop("language_info", None)


if __name__ == "__main__":
    notebook = build()
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    ).execute()
    clean(notebook)
    nbformat.write(notebook, HERE / "spo_shapes.ipynb")
    print(f"{(HERE / 'spo_shapes.ipynb').stat().st_size / 1024:.0f} KiB")
