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

"""Predicted memory in a report: by phase, whether it fits, and what would make it fit."""

from collections.abc import Callable

from ..training.memory import GIB
from .forecast import Card, Forecast, Variant
from .remedies import find_remedies
from .report import NOTE, OK, PROBLEM, WARNING, Report


MEMORY = "memory, predicted"
NOTHING = "nothing that is known here: take smaller images, a smaller model or a larger card"


def report_memory(
    report: Report, forecast: Callable[[Variant, Card], Forecast], variant: Variant, card: Card, denoiser_name: str
) -> None:
    """
    Add the peak memory of a run by phase, whether it fits, and otherwise what would make it fit.

    Args:
        report ([`Report`]): gets the findings and the numbers.
        forecast (`Callable[[Variant, Card], Forecast]`): predicts the run with any settings.
        variant ([`Variant`]), card ([`Card`]): the run, and where it would be.
        denoiser_name (`str`): of the network whose weights may be quantised.
    """
    try:
        predicted = forecast(variant, card)
    except Exception as error:  # a network that cannot be followed without values
        reason = (str(error).splitlines() or [""])[0]
        report.add(MEMORY, WARNING, "peak", f"could not be predicted ({type(error).__name__}: {reason})")
        return
    _report_phases(report, predicted)
    text = f"{predicted.peak / GIB:.1f} GiB, in the phase {predicted.highest.name!r}. Of {card.name}, "
    text += f"{card.usable / GIB:.1f} of {card.total / GIB:.1f} GiB can be used"
    fits = predicted.fits(card)
    report.numbers["memory"] = _numbers(predicted, card)
    if fits:
        report.add(MEMORY, OK, "peak", f"{text}: fits.")
        return
    report.add(MEMORY, PROBLEM if predicted.peak > card.total else WARNING, "peak", f"{text}: does not fit.")

    # What would make it fit, predicted in the same way.
    remedies = find_remedies(lambda run: forecast(run, card), variant, card, denoiser_name)
    report.numbers["memory"]["remedies"] = [
        {"options": remedy.options, "peak_gib": remedy.peak_gib} for remedy in remedies
    ]
    for remedy in remedies:
        report.add(MEMORY, NOTE, "fits with", f"{remedy.options}  ({remedy.peak_gib:.1f} GiB; {remedy.costs})")
    if not remedies:
        report.add(MEMORY, NOTE, "fits with", NOTHING)


def _report_phases(report: Report, predicted: Forecast) -> None:
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in predicted.resident.items())
    report.add(MEMORY, NOTE, "weights", f"{predicted.weights / GIB:.2f} GiB: {parts}")
    for phase in predicted.phases:
        at = f" at {phase.size} {phase.unit}" if phase.size else ""
        text = f"{(predicted.weights + phase.bytes) / GIB:.2f} GiB, {phase.bytes / GIB:.2f} beside the weights{at}"
        report.add(MEMORY, NOTE, phase.name, text)
    for note in predicted.notes:
        report.add(MEMORY, NOTE, "not counted", note)


def _numbers(predicted: Forecast, card: Card) -> dict:
    return {
        "peak_gib": predicted.peak / GIB,
        "card_gib": card.total / GIB,
        "usable_gib": card.usable / GIB,
        "fits": predicted.fits(card),
        "weights_gib": {name: size / GIB for name, size in predicted.resident.items()},
        "phases_gib": {phase.name: phase.bytes / GIB for phase in predicted.phases},
    }
