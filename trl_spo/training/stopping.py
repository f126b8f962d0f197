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
End a run when it is asked to: on Ctrl-C, or when a scheduler of jobs sends SIGTERM, the step that is under way is finished and
a checkpoint is written, from which the run goes on as if it had never stopped.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence

import torch
from transformers import TrainerCallback


# A launcher passes on the signal that the terminal has sent to every process already: that is one press of the keys.
SAME_PRESS = 1.0  # seconds
NOTICE = "\nStopping after this step, with a checkpoint. A second Ctrl-C ends at once, without one.\n"


class StopOnSignalCallback(TrainerCallback):
    r"""
    Ends training at the next step boundary after a signal, with a checkpoint.

    `trainer.train()` then returns, and `stopped_by` says why. A second Ctrl-C raises `KeyboardInterrupt` at once. With several
    processes all of them stop after the same step, whichever got the signal. The commands `trl-spo spo` and
    `trl-spo step-reward` have it; it works with any `transformers.Trainer`.

    Signals are handled while the trainer trains, in the main thread; elsewhere Python cannot handle them, and the callback does
    nothing.

    Args:
        signals (`Sequence[int]`, *optional*, defaults to `(signal.SIGINT, signal.SIGTERM)`):
            What to listen to.

    Attributes:
        stopped_by (`int` or `None`): the signal that has ended the last training.

    Example:

    ```python
    stop = StopOnSignalCallback()
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    if stop.stopped_by is None:
        trainer.save_model()
    ```
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)):
        self.signals = tuple(signals)
        self.stopped_by: int | None = None
        self._asked = 0  # the first signal of this training
        self._asked_at = 0.0
        self._says_so = False
        self._previous: dict[int, object] = {}  # handlers of the caller
        self._best: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped_by, self._asked = None, 0
        self._says_so = state.is_world_process_zero
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args, state, control, **kwargs):
        asked = self._asked_anywhere(args.device)
        if asked and not control.should_training_stop:  # it may have been the last step anyway
            self.stopped_by = asked
            control.should_training_stop = True
            control.should_save = True
            if args.save_strategy == "best":  # an evaluation would decide whether anything is saved
                control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_by is not None:
            # The epoch is not over: what belongs to its end comes in the run that goes on. Nor is the best checkpoint
            # loaded now, for which transformers would delete the one that was just written.
            control.should_log = control.should_evaluate = control.should_save = False
            self._best = state.best_model_checkpoint
            state.best_model_checkpoint = None

    def on_train_end(self, args, state, control, **kwargs):
        if self.stopped_by is not None:
            state.best_model_checkpoint = self._best
        self.release()

    def release(self) -> None:
        """Give the signals back to the caller; our trainers do it also when training ends with an error."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self._asked:
            self._asked, self._asked_at = number, now
            if self._says_so:
                os.write(2, NOTICE.encode())  # `print` is not allowed to be interrupted by itself
        elif number == signal.SIGINT and now - self._asked_at > SAME_PRESS:
            self.release()
            raise KeyboardInterrupt

    def _asked_anywhere(self, device: torch.device) -> int:
        """The signal that one of the processes got, the same number on all of them, or 0."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return self._asked
        asked = torch.tensor([self._asked], device=device)
        distributed.all_reduce(asked, op=distributed.ReduceOp.MAX)
        return int(asked)


def stop_signal(callbacks: Sequence[TrainerCallback]) -> int | None:
    """The signal that has ended the last training of the trainer with these callbacks, or `None`."""
    for callback in callbacks:
        if isinstance(callback, StopOnSignalCallback) and callback.stopped_by is not None:
            return callback.stopped_by
    return None
