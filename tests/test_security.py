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
Why this file exists: weights, datasets and prompts come from strangers, and what a run writes is uploaded. Here strangers
mean harm: files that want to run code, images that unpack to gigabytes, prompts that are paths or markup; and every byte
that a run leaves is searched for the secrets it was given.
"""

import ast
import importlib.metadata
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from trl_spo import SPOTrainer, StepAwareRewardModel, StepRewardTrainer, wrap_pipeline
from trl_spo.evaluation import metrics as scores
from trl_spo.export import merge_lora
from trl_spo.images import read_image
from trl_spo.kohya import export_kohya
from trl_spo.pipelines.autoencoder import load_scoring_vae
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.training.model_card import hub_id

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)


ROOT = Path(__file__).parents[1]


# --- files that want to run code -------------------------------------------------------------------------------------


class Malicious:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def poison(path: Path, marker: Path, form: str):
    content = {"weight": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of good models: a CLIP, a reward model, a pipeline, a LoRA and a full checkpoint of each trainer."""
    folder = tmp_path_factory.mktemp("models")
    tiny_clip(folder)
    StepAwareRewardModel.from_clip(folder / "clip").save_pretrained(folder / "reward")
    tiny_sd_pipeline(folder).save_pretrained(folder / "sd")
    trainer = spo_trainer(folder, "spo")
    trainer.train()
    trainer = reward_trainer(folder, "step_reward")
    trainer.train()
    return folder


def spo_trainer(folder: Path, name: str, prompts=PROMPTS, **settings) -> SPOTrainer:
    defaults = {"per_device_rollout_batch_size": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    config = tiny_spo_config(folder / name, num_inference_steps=4, **{**defaults, **settings})
    return SPOTrainer(config, tiny_sd_pipeline(folder), brightness_reward, train_dataset=prompts)


def pairs() -> list[dict]:
    red, blue = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    return [{"caption": p, "jpg_0": red, "jpg_1": blue, "label_0": 1.0, "label_1": 0.0} for p in PROMPTS]


def reward_trainer(folder: Path, name: str, **settings) -> StepRewardTrainer:
    defaults = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    config = tiny_step_reward_config(folder / name, **{**defaults, **settings})
    torch.manual_seed(0)
    model = StepAwareRewardModel.from_clip(folder / "clip")
    return StepRewardTrainer(config, tiny_sd_pipeline(folder), model, train_dataset=pairs())


def load_lora(folder: Path):
    pipeline = wrap_pipeline(tiny_sd_pipeline(folder.parent))
    pipeline.prepare_for_training(None, True)
    pipeline.load_lora(folder)


# name -> (what is copied, the file that is replaced, the poisoned files in its place, how it is loaded)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DIFFUSION_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
LOADERS = {
    "reward model": ("reward", "model.safetensors", WEIGHTS, StepAwareRewardModel.from_pretrained),
    "fresh reward model": ("clip", "model.safetensors", WEIGHTS, StepAwareRewardModel.from_clip),
    "released reward model": (
        "clip",
        None,
        ("released.bin", "released.pt", "released.pth", "released.safetensors"),
        lambda f: StepAwareRewardModel.from_original_checkpoint(str(next(f.glob("released.*"))), clip=str(f)),
    ),
    "PickScore": (
        "clip",
        "model.safetensors",
        WEIGHTS,
        lambda f: scores.PickScore.from_pretrained(str(f), str(f), device="cpu"),
    ),
    "HPS": (
        "clip",
        None,
        ("hps.pt", "hps.safetensors"),
        lambda f: scores.HPSv2.from_pretrained(str(f), next(f.glob("hps.*")).name, str(f), device="cpu"),
    ),
    "aesthetic predictor": (
        "clip",
        None,
        ("aesthetic.pth", "aesthetic.safetensors"),
        lambda f: scores.AestheticScore.from_pretrained(
            str(f), next(f.glob("aesthetic.*")).name, str(f), device="cpu"
        ),
    ),
    "ImageReward": (
        "clip",
        None,
        ("ImageReward.pt", "ImageReward.safetensors"),
        lambda f: scores.ImageReward.from_pretrained(str(f), next(f.glob("ImageReward.*")).name, str(f), device="cpu"),
    ),
    "LoRA": ("spo", "pytorch_lora_weights.safetensors", ("pytorch_lora_weights.safetensors",), load_lora),
    "LoRA to export": (
        "spo",
        "pytorch_lora_weights.safetensors",
        ("pytorch_lora_weights.safetensors",),
        lambda f: export_kohya(f, f / "exported.safetensors"),
    ),
    "LoRA to merge": (
        "spo",
        "pytorch_lora_weights.safetensors",
        ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
        lambda f: merge_lora(str(f.parent / "sd"), f, f / "merged"),
    ),
    "UNet of a pipeline": (
        "sd",
        "unet/diffusion_pytorch_model.safetensors",
        tuple(f"unet/{name}" for name in DIFFUSION_WEIGHTS),
        lambda f: wrap_pipeline(str(f)),
    ),
    "text encoder of a pipeline": (
        "sd",
        "text_encoder/model.safetensors",
        tuple(f"text_encoder/{name}" for name in WEIGHTS),
        lambda f: wrap_pipeline(str(f)),
    ),
    "VAE to score with": (
        "sd/vae",
        "diffusion_pytorch_model.safetensors",
        DIFFUSION_WEIGHTS,
        lambda f: load_scoring_vae(f, wrap_pipeline(tiny_sd_pipeline(f.parent))),
    ),
}
REFUSED = re.compile(
    "refused|[Cc]ould not load|Unable to load|that can be read|cannot be read|no .*\\.safetensors|not a safetensors|broken"
)


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize("name", LOADERS)
def test_no_code_of_a_weight_file_runs(models, tmp_path, name, form):
    source, replaced, poisoned, load = LOADERS[name]
    shutil.copytree(models / "sd", tmp_path / "sd")
    for number, file in enumerate(poisoned):
        folder, marker = tmp_path / f"copy_{number}", tmp_path / "marker"
        source_folder = models / source / "checkpoint-1" if source == "spo" else models / source
        shutil.copytree(source_folder, folder)
        if replaced:
            (folder / replaced).unlink()
        poison(folder / file, marker, form)
        with pytest.raises((ValueError, OSError), match=REFUSED):
            load(folder)
        assert not marker.exists(), file


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize("trainer", ["spo", "step_reward"])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "weights"])
def test_no_code_of_a_checkpoint_runs(models, tmp_path, trainer, file, form):
    """The arguments of a run are pickled for people; nothing reads them, so that a poisoned file is only ignored."""
    checkpoint, marker = tmp_path / "checkpoint-1", tmp_path / "marker"
    shutil.copytree(models / trainer / "checkpoint-1", checkpoint)
    name = file
    if file == "training_args.bin" and trainer == "spo":
        pytest.skip("SPO writes none")
    if file == "weights":
        name = "pytorch_lora_weights.safetensors" if trainer == "spo" else "model.safetensors"
    assert (checkpoint / name).is_file()
    poison(checkpoint / name, marker, form)
    make = spo_trainer if trainer == "spo" else reward_trainer
    run = make(models, str(tmp_path / "again"))
    if file == "training_args.bin" and form == "zip":
        run.train(resume_from_checkpoint=checkpoint)
    else:
        with pytest.raises(ValueError, match=f"(?s){re.escape(name)}.*(refused|cut off|not written by)"):
            run.train(resume_from_checkpoint=checkpoint)
        assert run.state.global_step == 0
    assert not marker.exists()


@pytest.mark.parametrize("file", ["spo_pairs.safetensors", "spo_state.json"])
def test_no_code_of_waiting_pairs_runs(models, tmp_path, file):
    checkpoint, marker = tmp_path / "checkpoint-1", tmp_path / "marker"
    shutil.copytree(models / "spo" / "checkpoint-1", checkpoint)
    poison(checkpoint / file, marker, "pickle")
    with pytest.raises(ValueError, match=re.escape(file)):
        spo_trainer(models, str(tmp_path / "again")).train(resume_from_checkpoint=checkpoint)
    assert not marker.exists()


def test_a_model_folder_brings_no_code_of_its_own(models, tmp_path):
    """Tokenizers and pipelines may name Python files in their folder; those are not run, and nobody is asked."""
    marker = tmp_path / "marker"
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Evil:\n    pass\n"
    clip = tmp_path / "clip"
    shutil.copytree(models / "clip", clip)
    settings = json.loads((clip / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (clip / "tokenizer_config.json").write_text(json.dumps(settings))
    (clip / "evil.py").write_text(code)
    try:
        model = StepAwareRewardModel.from_clip(clip)
        assert type(model.tokenizer).__module__.startswith("transformers.")
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "Evil" in str(error)
    assert not marker.exists()
    for changes in ({"_class_name": ["evil", "Evil"]}, {"unet": ["evil", "Evil"]}):
        pipeline = tmp_path / next(iter(changes))
        shutil.copytree(models / "sd", pipeline)
        index = json.loads((pipeline / "model_index.json").read_text())
        (pipeline / "model_index.json").write_text(json.dumps({**index, **changes}))
        for place in (pipeline, pipeline / "unet"):
            (place / "evil.py").write_text(code)
        with pytest.raises((ValueError, TypeError, OSError, ImportError)):
            wrap_pipeline(str(pipeline))
        assert not marker.exists()


def test_what_is_saved_needs_no_pickle(models, tmp_path):
    """Weights are safetensors. The rest that `torch.save` wrote is the Trainer's state, which is no part of a model."""
    for trainer in ("spo", "step_reward"):
        pickled = {
            path.name for path in (models / trainer).rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")
        }
        assert pickled <= {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    full = spo_trainer(models, str(tmp_path / "full"), use_peft=False, max_steps=1)
    full.train()
    full.save_model()
    assert list((tmp_path / "full" / "unet").glob("*.safetensors"))
    assert {path.name for path in (tmp_path / "full").glob("*.bin")} <= {"training_args.bin"}


# --- the source ------------------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "dill.load", "dill.loads", "joblib.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "np.load", "numpy.load", "tempfile.mktemp", "input",
}  # fmt: skip


def sources() -> list[Path]:
    return sorted(path for part in ("trl_spo", "examples", "benchmarks") for path in (ROOT / part).rglob("*.py"))


def dangers(code: str) -> list[str]:
    """Calls in Python source that run code, a shell, or a pickle."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN_CALLS:
            found.append(called)
        if called.endswith("torch.load") and arguments.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if arguments.get("shell", "False") != "False":
            found.append(f"{called} with a shell")
        if arguments.get("trust_remote_code", "False") != "False":
            found.append(f"{called} with trust_remote_code")
        if arguments.get("allow_pickle", "False") != "False":
            found.append(f"{called} with allow_pickle")
    return found


# What a process that trains has written a moment before, into a folder of its user alone, for the processes that it starts.
OF_THE_RUN_ITSELF = {"rollout_workers.py": ["torch.load without weights_only=True"]}


def test_the_source_runs_no_code_and_no_shell():
    files = sources()
    assert len(files) > 30
    found = {path.name: names for path in files if (names := dangers(path.read_text()))}
    ours = {
        name: names for path, names in found.items() if (name := path.removeprefix("training_")) in OF_THE_RUN_ITSELF
    }
    assert ours == OF_THE_RUN_ITSELF and len(found) == len(ours)
    assert not [path for path in files if "trust_remote_code=True" in path.read_text()]


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)", "os.system(x)", "subprocess.run(x, shell=True)", "subprocess.Popen(x, shell=wanted)", "pickle.load(f)",
        "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)", "A.from_pretrained(x, trust_remote_code=True)",
        "numpy.load(f)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    assert dangers(code)
    assert not dangers("torch.load(f, weights_only=True); subprocess.run(x, shell=False); yaml.safe_load(f)")


# --- images ----------------------------------------------------------------------------------------------------------


def png_bomb(width: int, height: int) -> bytes:
    """A valid PNG of zeros, written line by line: a few hundred kilobytes for gigabytes."""
    packer = zlib.compressobj(9)
    line = b"\0" * (1 + 3 * width)
    data = b"".join([packer.compress(line) for _ in range(height)] + [packer.flush()])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def peak(reset: bool = False) -> float:
    """Largest resident memory of this process, in MiB; with `reset` counted anew, from what it has now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class TestBombs:
    @pytest.fixture(scope="class")
    def bomb(self) -> bytes:
        content = png_bomb(20_000, 20_000)
        assert len(content) < 2 * 2**20
        return content

    @pytest.mark.parametrize("form", ["bytes", "record", "file", "opened"])
    def test_a_png_of_400_megapixels(self, bomb, form, tmp_path, monkeypatch):
        (tmp_path / "bomb.png").write_bytes(bomb)
        image = {
            "bytes": lambda: bomb,
            "record": lambda: {"bytes": bomb, "path": None},
            "file": lambda: {"bytes": None, "path": str(tmp_path / "bomb.png")},
        }.get(form)
        if form == "opened":  # by somebody who has lifted PIL's limit for himself
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
            opened = Image.open(io.BytesIO(bomb))
            monkeypatch.undo()
            image = lambda: opened  # noqa: E731
        before, start = peak(reset=True), time.monotonic()
        with pytest.raises(OSError, match="DecompressionBomb|pixels"):
            read_image(image())
        assert peak() - before < 64 and time.monotonic() - start < 5

    def test_the_measure(self):
        """Memory that is taken and given back shows."""
        before = peak(reset=True)
        torch.ones(2**25).sum()
        assert peak() - before > 100

    def test_in_a_row_it_is_a_bad_image(self, bomb):
        collate = StepPreferenceCollator(resolution=16, max_bad_image_fraction=1.0)
        rows = [{"prompt": "a", "chosen": bomb, "rejected": bomb}, {"prompt": "b", **{k: self.good() for k in KINDS}}]
        before = peak(reset=True)
        batch = collate(rows)
        assert batch["prompts"] == ["b"] and collate.num_bad == 1
        assert peak() - before < 64

    @staticmethod
    def good() -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(buffer, format="PNG")
        return buffer.getvalue()

    def test_of_a_gif_only_the_first_frame_is_decoded(self):
        frames = [Image.new("P", (500, 500), i % 250) for i in range(3000)]
        buffer = io.BytesIO()
        frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=1)
        del frames
        before, start = peak(reset=True), time.monotonic()
        assert read_image(buffer.getvalue()).size == (500, 500)
        assert peak() - before < 64 and time.monotonic() - start < 2

    def test_a_png_with_a_bomb_in_its_text(self):
        """A compressed comment of a gigabyte."""
        good = self.good()
        text = zlib.compress(b"\0" * 2**28, 9)
        content = b"comment\0\0" + text
        chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
        before = peak(reset=True)
        try:
            read_image(good[:33] + chunk + good[33:])  # after the header
        except OSError:
            pass
        assert peak() - before < 64

    @pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem", "/nowhere/at/all", "https://example.com/a.png"])
    def test_a_row_may_name_files_only(self, path):
        start = time.monotonic()
        with pytest.raises(OSError):
            read_image({"bytes": None, "path": path})
        assert time.monotonic() - start < 2

    def test_no_program_is_started_for_an_image(self, monkeypatch):
        """PIL gives PostScript to Ghostscript."""
        started = []
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or (_ for _ in ()).throw(OSError()))
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
        with pytest.raises(OSError):
            read_image(eps)
        assert not started


KINDS = ("chosen", "rejected")


# --- prompts as paths and as markup ----------------------------------------------------------------------------------

NASTY = [
    "../../outside",
    "/tmp/absolute/../outside",
    "..\\..\\outside",
    "CON",
    "~/outside",
    "a/b/c",
    "x" * 5000,
    "a\0b",
    "line\nbreak\r\n---\nlicense: evil\n---",
    "<script>alert(1)</script> ![x](https://evil.example/x.png) [y](javascript:alert(1))",
    "| a | `b` | ```\n# heading",
    "\u202egnp.exe",
    "{0.__class__} %s %n $HOME $(id) `id`",
]


class Writes:
    """What is opened for writing, made or moved while it is active. PIL, JSON and models write through Python's `open`."""

    hooked = []

    def __init__(self):
        self.paths = []
        if not self.hooked:
            sys.addaudithook(lambda event, args: [w.see(event, args) for w in self.hooked])

    def see(self, event, args):
        if event == "open":
            path, mode, flags = args
            writing = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            if writing and isinstance(path, (str, bytes, os.PathLike)):
                self.paths.append(os.path.abspath(os.fsdecode(path)))
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            self.paths.append(os.path.abspath(os.fsdecode(args[0])))
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.paths += [os.path.abspath(os.fsdecode(path)) for path in args[:2]]

    def __enter__(self):
        self.hooked.append(self)
        return self

    def __exit__(self, *error):
        self.hooked.remove(self)

    def outside(self, folder: Path) -> set[str]:
        allowed = (str(folder.resolve()) + os.sep, "/dev/")
        return {path for path in self.paths if not path.startswith(allowed) and path != str(folder.resolve())}


class TestPrompts:
    @pytest.fixture
    def place(self, tmp_path, monkeypatch):
        """The output folder is deep in `tmp_path`, which is also home and working directory; caches are elsewhere."""
        out = tmp_path / "deep" / "out"
        out.mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        return out

    def test_training_and_its_card(self, models, place):
        trainer = spo_trainer(
            models, str(place), prompts=NASTY, log_images_steps=1, num_eval_images=len(NASTY), max_steps=1
        )
        with Writes() as writes:
            trainer.train()
            trainer.save_model()
        assert len(writes.paths) > 10 and not writes.outside(place)
        names = {path.name for path in place.rglob("*")}
        assert {"README.md", "samples.json", "sample_0.png"} <= names
        assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
        self.check_card((place / "README.md").read_text(encoding="utf-8"))

    def check_card(self, card: str):
        """Prompts are in the header's widget alone, as YAML strings; no line of theirs is one of the card."""
        parsed = ModelCard(card)
        shown = [entry["text"] for entry in parsed.data.to_dict()["widget"]]
        assert [s.replace("\r\n", "\n") for s in shown] == [s.replace("\r\n", "\n") for s in NASTY]
        assert parsed.data.to_dict().get("license") is None
        for text in ("<script", "evil.example", "javascript:", "outside"):
            assert text not in parsed.text
        assert parsed.text.count("# heading") == 0

    def test_evaluation_and_samples(self, models, place):
        from trl_spo.evaluation.evaluate import EvaluationProtocol, evaluate_pipeline
        from trl_spo.scripts import sample

        nasty = [prompt for prompt in NASTY if "\0" not in prompt]
        with Writes() as writes:
            evaluate_pipeline(
                tiny_sd_pipeline(models, seed=1),
                nasty,
                {"../redness | `x`": lambda images, prompts: images.mean(dim=(1, 2, 3))},
                EvaluationProtocol("../name", num_inference_steps=2),
                base=tiny_sd_pipeline(models),
                output_dir=place / "evaluation",
            )
            arguments = ["--model_name_or_path", str(models / "sd"), "--output_dir", str(place / "samples")]
            arguments += ["--num_inference_steps", "2", "--prompt", *nasty]
            sample.main(*sample.make_parser().parse_args_and_config(arguments))
        written = writes.outside(place)
        assert not {path for path in written if not path.startswith(str(models))}  # its tokenizer files
        assert {"metrics.json", "metrics.md", "contact_sheet.png"} <= {
            p.name for p in (place / "evaluation").iterdir()
        }
        assert len(list((place / "samples").glob("0*.png"))) == len(nasty)

    def test_hub_ids_are_nothing_else(self):
        assert hub_id("user/model") == "user/model" and hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
        for value in (
            "user:password@host/model",
            "https://user:password@host/model",
            'x"](javascript:alert(1))/y',
            "a/b\nc",
            "../x",
            "~/x",
            "a/<b>",
            "a/b c",
            "",
        ):
            assert hub_id(value) is None, value


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_" + "T0kenOfTheEnvironment" * 2,
    "WANDB_API_KEY": "wandb" + "0123456789abcdef" * 2,
    "hub_token": "hf_" + "T0kenOfTheConfig" * 2,
    "init_token": "hf_" + "T0kenOfThePipeline" * 2,
    "password": "Pa55wordInTheUrl" * 2,
}


def everything_in(path: Path) -> bytes:
    """The bytes of a file, and those of the members of an archive, unpacked."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(name) for name in archive.namelist())
    return content


def test_no_secret_is_written_or_printed(models, tmp_path):
    """A run with tokens in the environment and in its settings, whose every byte is looked at."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment |= {name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY")}
    environment |= {"TRANSFORMERS_VERBOSITY": "debug", "TENSORBOARD_LOGGING_DIR": str(tmp_path / "out" / "runs")}
    command = [sys.executable, "-m", "tests.test_security", str(models), str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    files = {str(path.relative_to(tmp_path)): everything_in(path) for path in tmp_path.rglob("*") if path.is_file()}
    names = {Path(name).name.split(".tfevents")[0] for name in files}
    assert {"README.md", "training_args.bin", "optimizer.pt", "events.out", "trainer_state.json"} <= names
    files |= {"stdout": result.stdout, "stderr": result.stderr}
    assert b"learning_rate" in files["stdout"] or b"learning_rate" in b"".join(files.values())
    leaks = [
        (secret, name) for name, content in files.items() for secret, v in SECRETS.items() if v.encode() in content
    ]
    assert not leaks


def _run_with_secrets(models: Path, folder: Path):
    settings = {
        "hub_token": SECRETS["hub_token"],
        "hub_model_id": "someone/model",
        "model_init_kwargs": {"token": SECRETS["init_token"], "use_safetensors": True},
        "dataset_name": f"https://someone:{SECRETS['password']}@example.com/prompts",
        "report_to": "tensorboard",
        "log_images_steps": 1,
    }
    trainer = spo_trainer(models, str(folder / "out"), **settings)
    print(trainer.args)
    print(repr(trainer.args))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    reward = reward_trainer(
        models,
        str(folder / "out" / "reward"),
        hub_token=SECRETS["hub_token"],
        report_to="tensorboard",
        logging_steps=1,
    )
    print(reward.args)
    reward.train()
    reward.save_model()


# --- dependencies ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="only .venv is made from constraints.txt")
def test_every_installed_distribution_is_pinned():
    """The environment of the tests is the one that `constraints.txt` describes: nobody's new release gets in by itself."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line:
            name, operator, version = line.partition("==")
            assert operator, f"not an exact version: {line}"
            pins[normalised(name)] = version
    installed = {
        normalised(d.metadata["Name"]): d.version.partition("+")[0]
        for d in importlib.metadata.distributions(path=[str(Path(torch.__file__).parents[1])])
    }
    own = {"trl-spo", "pip", "setuptools", "wheel"}  # this project, and what a new environment begins with
    unpinned = {f"{name}=={version}" for name, version in installed.items() if name not in own and name not in pins}
    differing = {f"{n}: {v} for {pins[n]}" for n, v in installed.items() if n in pins and pins[n] != v}
    assert not unpinned and not differing


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    _run_with_secrets(Path(sys.argv[1]), Path(sys.argv[2]))
