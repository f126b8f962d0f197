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
Pictures: sheets of images before and after, the candidate tree of a rollout, curves. Each function returns a
`PIL.Image.Image` or a matplotlib figure, for a notebook or for `.save` / `.savefig`.
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerCallback

from .rollout import StepPairs


WIN, LOSE, NEXT, INK, PAPER, MUTED = "#1a9850", "#d73027", "#2166ac", "#222222", "#ffffff", "#777777"


def to_pil(image: torch.Tensor, size: int | None = None) -> Image.Image:
    """`(3, H, W)` in [0, 1] -> PIL image, small ones enlarged to `size` pixels without smoothing."""
    array = image.detach().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array)
    if size is None or picture.width == size:
        return picture
    resample = Image.Resampling.NEAREST if picture.width < size else Image.Resampling.LANCZOS
    return picture.resize((size, round(size * picture.height / picture.width)), resample)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _fit_lines(text: str, font, width: int, max_lines: int) -> list[str]:
    """Break text into at most `max_lines` lines of `width` pixels; an ellipsis marks what is cut."""
    lines, words = [""], text.split()
    for position, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < max_lines:
            lines.append(word)
        else:
            lines[-1] += "…"
            break
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            lines[-1] = lines[-1][:-2] + "…"
        if position == len(words) - 1:
            break
    return lines


def before_after_sheet(
    before: torch.Tensor,
    after: torch.Tensor,
    prompts: list[str],
    before_scores: dict[str, torch.Tensor] | None = None,
    after_scores: dict[str, torch.Tensor] | None = None,
    columns: int = 4,
    size: int = 128,
    title: str | None = None,
) -> Image.Image:
    """
    Pairs of images from the same prompt and seed, left before and right after training, with their scores.

    Args:
        before, after (`torch.Tensor` of shape `(N, 3, H, W)`): in [0, 1].
        prompts (`list[str]`): N prompts.
        before_scores, after_scores (`dict[str, torch.Tensor]`, *optional*): per metric, `(N,)` scores.
        columns (`int`, *optional*, defaults to `4`): pairs per row.
        size (`int`, *optional*, defaults to `128`): pixels of one image's side.
        title (`str`, *optional*): heading; state the sampler in it.

    Returns:
        `PIL.Image.Image`.
    """
    font, small, heading = _font(12), _font(11), _font(16)
    metrics = list(before_scores or {})
    height = round(size * before.shape[-2] / before.shape[-1])
    cell_width, cell_height = 2 * size + 24, 18 + height + 34 + 15 * len(metrics) + 14
    rows, top = -(-len(prompts) // columns), 40 if title else 10
    sheet = Image.new("RGB", (columns * cell_width + 12, top + rows * cell_height + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((12, 10), title, font=heading, fill=INK)
    for i, prompt in enumerate(prompts):
        x, y = 12 + (i % columns) * cell_width, top + (i // columns) * cell_height
        for j, (name, images, scores) in enumerate(
            (("before", before, before_scores), ("after", after, after_scores))
        ):
            left = x + j * (size + 4)
            draw.text((left, y), name, font=small, fill=MUTED)
            sheet.paste(to_pil(images[i], size), (left, y + 16))
            for line, metric in enumerate(metrics):
                text = f"{metric} {scores[metric][i].item():.2f}"
                change = round(scores[metric][i].item(), 2) - round(before_scores[metric][i].item(), 2)
                color = INK if change == 0 else WIN if change > 0 else LOSE
                draw.text((left, y + 18 + height + 34 + 15 * line), text, font=small, fill=color)
        for line, text in enumerate(_fit_lines(prompt, font, 2 * size, 2)):
            draw.text((x, y + 19 + height + 15 * line), text, font=font, fill=INK)
    return sheet


@torch.no_grad()
def candidate_tree(pipeline, pairs: StepPairs, prompt_row: int = 0, size: int = 96) -> Image.Image:
    """
    The branches of one prompt's rollout: a column per branching step, its K candidates as predicted clean images.

    The winner is framed green, the loser red (grey frames where the scores are too close to form a pair), and a blue
    bar marks the candidate that starts the next step. Scores are printed below.

    Args:
        pipeline ([`SPOPipeline`]): decodes the predictions.
        pairs ([`StepPairs`]): of `stepwise_rollout(..., return_trajectory=True)`.
        prompt_row (`int`, *optional*, defaults to `0`): which prompt of the rollout.
        size (`int`, *optional*, defaults to `96`): pixels of one image's side.

    Raises:
        ValueError: if the rollout kept no trajectory.
    """
    if not pairs.branches or pairs.branches[0].pred_original_samples is None:
        raise ValueError("The rollout kept no trajectory; call `stepwise_rollout(..., return_trajectory=True)`.")
    small, font = _font(11), _font(12)
    num_candidates = len(pairs.branches[0].scores)
    gap, cell = 14, size + 34
    width = 12 + len(pairs.branches) * (size + gap + 12)
    sheet = Image.new("RGB", (width, 58 + num_candidates * cell + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, branch in enumerate(pairs.branches):
        x = 12 + column * (size + gap + 12)
        images = pipeline.decode_latents(branch.pred_original_samples[:, prompt_row]) / 2 + 0.5
        order = branch.scores[:, prompt_row].argsort(descending=True)
        chosen, rejected, valid = (int(part[prompt_row]) for part in branch.selection)
        draw.text((x, 10), f"t = {branch.timestep}", font=font, fill=INK)
        draw.text((x, 28), "pair" if valid else "no pair", font=small, fill=INK if valid else MUTED)
        for row, k in enumerate(order.tolist()):
            y = 52 + row * cell
            frame = {chosen: WIN, rejected: LOSE}.get(k) if valid else MUTED if k in (chosen, rejected) else None
            if frame:
                draw.rectangle((x - 4, y - 4, x + size + 3, y + size + 3), outline=frame, width=4)
            sheet.paste(to_pil(images[k], size), (x, y))
            if k == int(branch.next_index[prompt_row]):
                draw.rectangle((x + size + 6, y, x + size + 11, y + size - 1), fill=NEXT)
            draw.text((x, y + size + 6), f"{branch.scores[k, prompt_row]:.2f}", font=small, fill=INK)
    legend = 58 + num_candidates * cell
    for x, color, text in ((12, WIN, "winner"), (112, LOSE, "loser"), (202, NEXT, "starts the next step")):
        draw.rectangle((x, legend + 2, x + 12, legend + 14), fill=color)
        draw.text((x + 18, legend), text, font=font, fill=INK)
    return sheet


def plot_curves(log_history: list[dict], keys: list[str], title: str | None = None, x: str = "step") -> Figure:
    """
    Curves of logged metrics, one panel each.

    Args:
        log_history (list of `dict`): `trainer.state.log_history`.
        keys (`list[str]`): metrics to draw; those that were never logged are left out.
        title (`str`, *optional*): heading.
        x (`str`, *optional*, defaults to `"step"`): key of the horizontal axis.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if none of the keys was logged.
    """
    series = {key: [(log[x], log[key]) for log in log_history if key in log and x in log] for key in keys}
    series = {key: points for key, points in series.items() if points}
    if not series:
        raise ValueError(f"None of {keys} is in the log history.")
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
    for index, (key, points) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.plot(*zip(*points, strict=True), color=NEXT, marker="." if len(points) < 40 else None)
        axes.set_title(key, fontsize=10)
        axes.set_xlabel(x, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def plot_accuracy_by_timestep(accuracy: dict[str, dict[int, float]], title: str | None = None) -> Figure:
    """
    Accuracy of reward models over the timestep at which they judge.

    Args:
        accuracy (`dict[str, dict[int, float]]`): per model, accuracy by timestep.
        title (`str`, *optional*): heading.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, values in accuracy.items():
        timesteps = sorted(values)
        axes.plot(timesteps, [values[t] for t in timesteps], marker="o", label=name)
    axes.axhline(0.5, color=MUTED, linestyle=":", label="chance")
    axes.set_xlabel("timestep (0: clean image)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0.4, 1.0)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    if title:
        axes.set_title(title, fontsize=11)
    return figure


class ImageLoggingCallback(TrainerCallback):
    """
    Samples the same prompts with the same seeds every `every` optimizer steps, saves a strip under
    `output_dir/images`, and hands it to the trackers of the run (TensorBoard, Weights & Biases).

    Args:
        trainer ([`SPOTrainer`]): whose pipeline is sampled with the settings of its config.
        prompts (`list[str]`): a few prompts.
        every (`int`): optimizer steps between two strips.
    """

    def __init__(self, trainer, prompts: list[str], every: int):
        self.trainer = trainer
        self.prompts = prompts
        self.every = every

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._log(args, state)

    def _log(self, args, state):
        if not state.is_world_process_zero:
            return
        images = self.trainer.generate(self.prompts)
        strip = Image.new("RGB", (132 * len(images) + 4, 136), PAPER)
        for i, image in enumerate(images):
            strip.paste(to_pil(image, 128).resize((128, 128)), (4 + 132 * i, 4))
        folder = Path(args.output_dir) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        strip.save(folder / f"step_{state.global_step:06d}.png")
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.add_images("samples", images, state.global_step)
        if "wandb" in args.report_to:
            import wandb

            if wandb.run is not None:
                samples = [wandb.Image(to_pil(i), caption=p) for i, p in zip(images, self.prompts, strict=True)]
                wandb.log({"samples": samples}, step=state.global_step)
