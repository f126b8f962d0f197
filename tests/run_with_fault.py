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
Started by `test_faults.py` as a program of its own: trains into `folder/out` for six steps with a checkpoint every two,
and meets a fault on the way. Prints the sum of the final weights.

    python tests/run_with_fault.py FOLDER {none,resume,limit:STEP,fill:STEP,nobody}
"""

import os
import resource
import sys
from pathlib import Path

from transformers import TrainerCallback

from tests.testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline, tiny_spo_config
from trl_spo import SPOTrainer


class Fault(TrainerCallback):
    """At a step: no file may grow beyond 4 KiB any more, or the rest of the disk is taken."""

    def __init__(self, kind: str, step: int, folder: Path):
        self.kind, self.step, self.folder = kind, step, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        if state.global_step == self.step and self.kind == "fill":
            with (self.folder / "filler").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"\0" * 2**16)
                except OSError:
                    file.truncate(file.tell() - 2**15)  # leave room for the beginning of a checkpoint


def main(folder: Path, fault: str):
    kind, _, step = fault.partition(":")
    pipeline = tiny_sd_pipeline(folder)
    if kind == "nobody":  # root may write everywhere
        os.setgid(65534)
        os.setuid(65534)
    config = tiny_spo_config(
        folder / "out", branch_start_step=2, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1
    )
    forwards = []
    pipeline.unet.register_forward_hook(lambda *args: forwards.append(1))
    callbacks = [Fault(kind, int(step), folder)] if step else []
    try:
        trainer = SPOTrainer(config, pipeline, brightness_reward, train_dataset=PROMPTS, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=kind == "resume")
    finally:
        print("FORWARDS", len(forwards))
    print("WEIGHTS", repr(sum(p.double().sum().item() for p in trainer.model.parameters())))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
