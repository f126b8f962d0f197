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
How far labels can be trusted: whether annotators agree with each other and with themselves, and whether they like a side.

A vote is 1 if the first image of a pair was preferred, 0 if the second one was, and 0.5 for a tie.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Agreement(NamedTuple):
    """
    How often two series of votes are equal.

    Attributes:
        n (`int`): pairs that both judged.
        share (`float`): of equal votes, in [0, 1]; NaN without any.
        kappa (`float`): Cohen's kappa: 1 is perfect, 0 what chance would give. NaN if chance alone gives perfect agreement,
            such as when all votes are the same.
    """

    n: int
    share: float
    kappa: float


class Preference(NamedTuple):
    """
    How often one of two was preferred.

    Attributes:
        n (`int`): votes for either; ties are left out.
        share (`float`): of the one, in [0, 1]; NaN without any.
        half_width (`float`): of the interval around one half in which 95% of the shares fall if it does not matter.
    """

    n: int
    share: float
    half_width: float


def cohens_kappa(first: Sequence[float], second: Sequence[float]) -> Agreement:
    r"""
    Agreement beyond chance (Cohen, 1960): (p - p_e) / (1 - p_e), where p is the share of equal votes and p_e the share that
    two annotators would have who vote as often for each answer, but independently.

    Args:
        first, second (`Sequence[float]` of the same length): votes on the same pairs.

    Example:

    ```python
    >>> cohens_kappa([1, 1, 0, 0], [1, 1, 0, 1])
    Agreement(n=4, share=0.75, kappa=0.5)
    ```
    """
    n = len(first)
    if n == 0:
        return Agreement(0, math.nan, math.nan)
    share = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts = Counter(first), Counter(second)
    by_chance = sum(counts[0][vote] * counts[1][vote] for vote in counts[0]) / n**2
    kappa = math.nan if by_chance == 1 else (share - by_chance) / (1 - by_chance)
    return Agreement(n, share, kappa)


def _votes_of(rows: Iterable[Sequence[dict]]) -> dict[str, dict[int, dict[int, float]]]:
    """annotator -> showing (0 or 1) -> row -> vote."""
    votes: dict[str, dict[int, dict[int, float]]] = {}
    for index, row in enumerate(rows):
        for vote in row:
            shown = votes.setdefault(vote["annotator"], {0: {}, 1: {}})
            shown[vote["showing"]][index] = vote["label_0"]
    return votes


def _agreement(first: dict[int, float], second: dict[int, float]) -> Agreement:
    common = sorted(first.keys() & second.keys())
    return cohens_kappa([first[index] for index in common], [second[index] for index in common])


def self_agreement(rows: Sequence[Sequence[dict]]) -> dict[str, Agreement]:
    """
    Per annotator, the first vote on a pair against the vote when it came again with swapped sides.

    Args:
        rows (`list[list[dict]]`): the `votes` of every pair, as [`label_rows`] gives them.
    """
    return {name: _agreement(shown[0], shown[1]) for name, shown in sorted(_votes_of(rows).items())}


def agreement_between(rows: Sequence[Sequence[dict]]) -> dict[tuple[str, str], Agreement]:
    """Per two annotators, their first votes on the pairs that both judged; `rows` as in [`self_agreement`]."""
    votes = sorted(_votes_of(rows).items())
    found = {}
    for position, (name, shown) in enumerate(votes):
        for other, other_shown in votes[position + 1 :]:
            found[name, other] = _agreement(shown[0], other_shown[0])
    return found


def side_bias(rows: Iterable[Sequence[dict]]) -> Preference:
    """How often the left side was preferred, of all votes; `rows` as in [`self_agreement`]."""
    return _preference(float(vote["label_0"]) == 1 - vote["left"] for vote in _decided(rows))


def second_preferred(rows: Iterable[Sequence[dict]]) -> Preference:
    """
    How often the second image of a pair was preferred, of all votes; `rows` as in [`self_agreement`]. In a blind test, in which
    all second images come from one model and all first ones from another, this is its win rate.
    """
    return _preference(vote["label_0"] == 0 for vote in _decided(rows))


def _decided(rows: Iterable[Sequence[dict]]) -> list[dict]:
    return [vote for row in rows for vote in row if vote["label_0"] in (0, 1)]


def _preference(wins: Iterable[bool]) -> Preference:
    wins = list(wins)
    n = len(wins)
    if n == 0:
        return Preference(0, math.nan, math.nan)
    return Preference(n, sum(wins) / n, 1.96 * math.sqrt(0.25 / n))
