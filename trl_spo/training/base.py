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
The base class of both trainers: a `transformers.Trainer` with our checkpoints, set up in the same stages.

    _check      cheap, nothing is loaded: settings, data, output folder
    _load       pipeline and reward model, and whether they fit each other
    _prepare    freeze, add the adapter, move, cast
    Trainer.__init__
    _add_callbacks
"""

import copy
from pathlib import Path

from transformers import Trainer
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .arguments import StepTrainingArguments
from .checkpointing import CheckpointingMixin, check_output_dir, write_text
from .ema import AveragedWeightsMixin


class StepTrainer(AveragedWeightsMixin, CheckpointingMixin, Trainer):
    """
    A `Trainer` whose checkpoints are complete or do not exist at all, which evaluates and saves averaged weights if it has
    them, and whose model card is its own. A subclass keeps its metrics between two logs in `_metrics` ([`RunningMeans`]).
    """

    _nonfinite_metric: str  # name of the metric that counts pairs that are not finite
    _paper = {
        "title": "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference "
        "Optimization",
        "id": "2406.04314",
    }

    @staticmethod
    def own_config(config: StepTrainingArguments, config_class: type) -> StepTrainingArguments:
        """
        A copy of the caller's config with what both trainers need: one process per device, and no search for parameters
        without gradients, as every parameter that is trained is used.

        Raises:
            TypeError: if it is not a `config_class`.
        """
        if not isinstance(config, config_class):
            article = "an" if config_class.__name__.startswith("SPO") else "a"
            raise TypeError(f"`config` must be {article} `{config_class.__name__}`, got `{type(config).__name__}`.")
        config = copy.copy(config)
        config.accelerator_config = copy.copy(config.accelerator_config)
        config._n_gpu = min(config.n_gpu, 1)  # `nn.DataParallel` can split neither pairs nor prompts
        if config.ddp_find_unused_parameters is None:
            config.ddp_find_unused_parameters = False
        return config

    @staticmethod
    def check_output(config: StepTrainingArguments) -> None:
        """
        Whether the output folder can be written, on the process that writes, and the trackers are installed.

        Raises:
            ValueError: for a tracker that does not exist or is not installed.
            OSError: for a folder that cannot be written.
        """
        if config.should_save:
            check_output_dir(config.output_dir)
        installed = get_available_reporting_integrations()
        for name in config.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                raise ValueError(f"`report_to` names {name!r}, which is not a tracker; there are {known}.")
            if name not in installed:
                raise ValueError(
                    f"`report_to` names {name!r}, which is not installed: install it, or set `report_to='none'`."
                )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        unset_hf_deepspeed_config()  # as in the config: accelerate has said it anew

    def create_model_card(self, *args, **kwargs) -> None:
        """Write `README.md` to the output directory; arguments of the parent method are accepted and not used."""
        if self.is_world_process_zero():
            self._write_model_card(Path(self.args.output_dir))

    def _write_model_card(self, folder: Path, output_dir: Path | None = None) -> None:
        """The card of the model in `output_dir`, into `folder`: what will be moved there, or `output_dir` itself."""
        output_dir = output_dir or folder
        name = (self.args.hub_model_id or output_dir.name).split("/")[-1]
        write_text(folder / "README.md", self._model_card(name, output_dir))

    def _model_card(self, name: str, output_dir: Path) -> str:
        """The text of the card of the model `name` in `output_dir`."""
        raise NotImplementedError

    def record_step(self, num_nonfinite: int, skipped: bool) -> None:
        """Called before each optimizer step with what [`NonFiniteGuard`] saw of it."""
        skipped = skipped and self.args.process_index == 0  # all processes skip together
        self._metrics.add(self._nonfinite_metric, num_nonfinite, reduce="sum")
        self._metrics.add("skipped_steps", int(skipped), reduce="sum")
