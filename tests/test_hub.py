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
Necessity: what a push uploads is decided in transformers, partly from file names our models do not have, and a mistake
shows only on a public page. A small server stands in for the Hub and keeps what real `huggingface_hub` clients send it.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch


SECRET = "hf_" + "s3cr3t" * 5
REPO = "someone/spo-tiny"
COMMIT = "0" * 40  # that downloads are of


class Hub(BaseHTTPRequestHandler):
    """The calls of a push (create a repository, ask how to send files, commit them) and of a download."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/whoami"):
            self.answer({"name": "someone", "type": "user"})
        elif "/resolve/" in path:
            self.answer_file(path, with_content=True)
        elif re.search(r"/tree/[^/]+$", path):
            oid = "0" * 40
            self.answer([{"type": "file", "path": k, "size": len(v), "oid": oid} for k, v in self.files().items()])
        elif "/tree/" in path:
            self.missing()
        else:
            siblings = [{"rfilename": name} for name in self.files()]
            self.answer({"id": REPO, "sha": COMMIT, "private": False, "siblings": siblings})

    def do_HEAD(self):
        self.answer_file(self.path.split("?")[0], with_content=False)

    def files(self) -> dict[str, bytes]:
        return {name: content for commit in self.server.commits for name, content in commit["files"].items()}

    def answer_file(self, path: str, with_content: bool):
        name = path.split("/resolve/")[1].split("/", 1)[1]
        content = self.files().get(name)
        if content is None:
            self.missing()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def missing(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.calls.append(self.path)
        server.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://127.0.0.1:{server.server_port}/{REPO}"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif "/commit/" in self.path:
            commit = {"files": {}}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    commit["summary"] = line["value"]["summary"]
                else:
                    assert line["key"] == "file" and line["value"]["encoding"] == "base64"
                    commit["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            server.commits.append(commit)
            url = f"http://127.0.0.1:{server.server_port}/{REPO}/commit/{len(server.commits):040d}"
            self.answer({"commitUrl": url, "commitOid": f"{len(server.commits):040d}", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})  # the check of the model card's header

    def answer(self, value: dict | list):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.commits, server.tokens = [], [], set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(what: str, folder: Path, server) -> dict[str, bytes]:
    """Runs this file as a program with the server for a Hub; returns the repository's files after all commits."""
    # Only this process may know the address: huggingface_hub reads it when it is imported.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", __name__, what, str(folder)]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert server.calls[0] == "/api/repos/create"
    assert server.tokens == {f"Bearer {SECRET}"}
    files = {}
    for commit in server.commits:
        files |= commit["files"]
    leaks = [name for name, content in files.items() if SECRET.encode() in content]
    assert not leaks, f"the token is in {leaks}"
    state = [
        name for name in files if any(part in name for part in ("optimizer", "scheduler.pt", "rng_state", "scaler"))
    ]
    assert not state and not any(name.startswith("checkpoint-") for name in files)
    return files


def unpack(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_pushed_lora_is_what_was_trained(hub, tmp_path):
    files = push("spo", tmp_path, hub)
    assert {"pytorch_lora_weights.safetensors", "README.md"} <= set(files)
    assert {name for name in files if name.endswith((".bin", ".pt", ".pth"))} <= {"training_args.bin"}
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "library_name: diffusers" in card and "2406.04314" in card
    assert f'load_lora_weights("{REPO}")' in card and str(tmp_path) not in card
    pictures = re.findall(r"images/[\w.]+png", card)
    assert len(set(pictures)) == 4 and set(pictures) <= set(files)  # two samples, first and last strip
    sampler = json.loads(files["sampler.json"])  # of the training, and what is found beside the LoRA on the Hub
    assert sampler["num_inference_steps"] == 3 and sampler == json.loads((tmp_path / "fetched.json").read_text())
    # Pushed at every save and at the end: the first commit already has the LoRA, of the step it was made at.
    assert len(hub.commits) >= 2 and "pytorch_lora_weights.safetensors" in hub.commits[0]["files"]

    from .testing_utils import tiny_sd_pipeline

    pipeline = tiny_sd_pipeline(tmp_path)
    pipeline.load_lora_weights(unpack(files, tmp_path / "download"))
    loaded = {k: v for k, v in pipeline.unet.state_dict().items() if "lora_" in k}
    trained = torch.load(tmp_path / "trained.pt")
    assert sorted(v.sum().item() for v in loaded.values()) == sorted(v.sum().item() for v in trained.values())


def test_a_pushed_reward_model_is_complete(hub, tmp_path):
    files = push("reward", tmp_path, hub)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
    card = files["README.md"].decode()
    assert "library_name: trl_spo" in card and f'from_pretrained("{REPO}")' in card and str(tmp_path) not in card
    assert {"image_mean", "image_std"} <= set(json.loads(files["config.json"]))

    from trl_spo import StepAwareRewardModel

    model = StepAwareRewardModel.from_pretrained(unpack(files, tmp_path / "download"))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = model.score(images, ["a red cat", "a dog"], torch.tensor([0, 500]))
    assert torch.equal(scores, torch.load(tmp_path / "scores.pt"))


def test_a_reward_model_pushes_itself_whole(hub, tmp_path):
    """
    Regression: transformers pushed an empty card over ours, and failed at the folders in `pipeline/`, where the text
    encoders are; and a reward that came from the Hub did not find these. What somebody wrote into the repository's card
    stays; what else is in a folder is not pushed.
    """
    files = push("latent", tmp_path, hub)
    first, second, third = hub.commits
    assert {"README.md", "config.json", "model.safetensors", "pipeline/text_encoder/config.json"} <= set(
        first["files"]
    )
    card = first["files"]["README.md"].decode()
    assert f'LatentRewardModel.from_pretrained("{REPO}")' in card and "rectified flow" in card and "judge" in card
    assert "README.md" not in second["files"] and set(second["files"]) | {"README.md"} == set(first["files"])
    assert third["files"]["README.md"] == b"mine" and "notes.txt" not in third["files"]
    assert third["summary"] == "by hand"

    from trl_spo import LatentRewardModel

    model = LatentRewardModel.from_pretrained(unpack(files, tmp_path / "download"))
    expected = torch.load(tmp_path / "scores.pt")
    shape = json.loads((tmp_path / "shape.json").read_text())
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.score(latents, ["a red cat", "a dog"], torch.tensor([0, 500])), expected)


def _push_spo(folder: Path):
    from trl_spo import SPOTrainer
    from trl_spo.sampler_file import read_sampler

    from .testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline, tiny_spo_config

    trainer = SPOTrainer(
        tiny_spo_config(
            folder / "spo-tiny", push_to_hub=True, hub_model_id=REPO, hub_token=SECRET, hub_strategy="every_save",
            hub_always_push=True, max_steps=2, save_strategy="steps", save_steps=1, log_images_steps=1,
            num_eval_images=2, num_inference_steps=3,
        ),
        tiny_sd_pipeline(folder),
        brightness_reward,
        train_dataset=PROMPTS,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    torch.save({k: v for k, v in trainer.model.state_dict().items() if "lora_" in k}, folder / "trained.pt")
    os.environ["HF_TOKEN"] = SECRET
    (folder / "fetched.json").write_text(json.dumps(read_sampler(REPO)))


def _push_reward(folder: Path):
    from PIL import Image

    from trl_spo import StepAwareRewardModel, StepRewardTrainer

    from .testing_utils import PROMPTS, tiny_clip, tiny_sd_pipeline, tiny_step_reward_config

    colors = ["red", "green", "blue", "white"]
    pairs = [
        {"prompt": prompt, "chosen": Image.new("RGB", (16, 16), colors[i % 4]), "rejected": Image.new("RGB", (16, 16))}
        for i, prompt in enumerate(PROMPTS)
    ]
    model = StepAwareRewardModel.from_clip(tiny_clip(folder))
    trainer = StepRewardTrainer(
        tiny_step_reward_config(
            folder / "spo-tiny", push_to_hub=True, hub_model_id=REPO, hub_token=SECRET, save_strategy="steps",
            save_steps=1, per_device_train_batch_size=2,
        ),
        tiny_sd_pipeline(folder),
        model,
        train_dataset=pairs,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    model.eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.save(model.score(images, ["a red cat", "a dog"], torch.tensor([0, 500])), folder / "scores.pt")


def _push_latent(folder: Path):
    """Twice from the model, and once at saving, to a folder with a card and another file."""
    from trl_spo import LatentRewardModel

    from .flow_testing import tiny_sd3_pipeline

    model = LatentRewardModel.from_pipeline(tiny_sd3_pipeline(folder), projection_dim=12)
    shape = model.reader.pipeline.latent_shape()
    (folder / "shape.json").write_text(json.dumps(shape))
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model.score(latents, ["a red cat", "a dog"], torch.tensor([0, 500]))
    torch.save(scores, folder / "scores.pt")
    for _ in range(2):
        model.push_to_hub(REPO, token=SECRET, tags="judge")
    fetched = LatentRewardModel.from_pretrained(REPO, token=SECRET)
    assert fetched.reader.pipeline is None  # no text encoder before it is needed
    with torch.no_grad():
        assert torch.equal(fetched.score(latents, ["a red cat", "a dog"], torch.tensor([0, 500])), scores)
    (folder / "saved").mkdir()
    (folder / "saved" / "README.md").write_text("mine")
    (folder / "saved" / "notes.txt").write_text("not for others")
    model.save_pretrained(
        folder / "saved", push_to_hub=True, repo_id=REPO, token=SECRET, commit_message="by hand", private=True
    )


if __name__ == "__main__":
    {"spo": _push_spo, "reward": _push_reward, "latent": _push_latent}[sys.argv[1]](Path(sys.argv[2]))
