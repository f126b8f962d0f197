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
Rewards and metrics by name, as the command line and YAML files give them. A name is

| form | example | what it is |
|---|---|---|
| one of `METRICS` | `pickscore` | a published metric, with its published weights |
| `module:attribute` | `my_rewards:brightness` | a function, class or object of the user's own, see `rewards.user_code` |
| a folder or Hub id | `./step-reward` | a saved [`StepAwareRewardModel`] or [`LatentRewardModel`] |

The same names serve as rewards ([`load_reward`], with weights) and as metrics ([`load_metrics`]). [`check_rewards`] and
[`check_metrics`] find what is wrong before any weights are loaded.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..hub_files import is_missing_path
from ..model_cards import HUB_ID
from ..rewards.base import FunctionReward, Reward, load_reward_model, takes_timesteps, wrap_reward
from ..rewards.user_code import check_user_object, import_attribute, make_user_object
from ..rewards.weighted import WeightedReward, checked_weights
from ..suggestions import did_you_mean
from .metrics import METRICS, load_metric


class WeightedName(NamedTuple):
    """
    A reward on the command line, such as `pickscore=0.7`.

    Attributes:
        name (`str`): what it is, without the weight.
        weight (`float`): 1 if none was given.
        label (`str`): what logs call it: the name of a published metric, the attribute of a `module:attribute`, the last
            part of a path.
    """

    name: str
    weight: float
    label: str


def parse_reward(text: str) -> WeightedName:
    """
    Split `name=weight`; a name may itself hold `=`, as paths do.

    Raises:
        ValueError: for a weight that is no number.
    """
    name, equals, number = str(text).rpartition("=")
    if not equals or Path(text).exists():
        name, number = str(text), "1"
    try:
        weight = float(number)
    except ValueError:
        raise ValueError(f"The weight of a reward must be a number, as in {name + '=0.5'!r}, got {text!r}.") from None
    label = name.rpartition(":")[2] if ":" in name else Path(name).name or name
    return WeightedName(name, weight, name if name in METRICS else label)


def parse_rewards(texts: Iterable[str]) -> list[WeightedName]:
    """
    The rewards of a command line. Those whose labels are equal keep their whole names.

    Raises:
        ValueError: if there are none, one is named twice, or a weight is no number other than 0.
    """
    parsed = [parse_reward(text) for text in texts]
    names = [reward.name for reward in parsed]
    if not names:
        raise ValueError("No reward is named.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"The reward {twice[0]!r} is named twice; give it once, with one weight.")
    checked_weights(dict.fromkeys(names), {reward.name: reward.weight for reward in parsed})
    labels = [reward.label for reward in parsed]
    unique = []
    for reward in parsed:
        unique.append(reward if labels.count(reward.label) == 1 else reward._replace(label=reward.name))
    return unique


# --- check -----------------------------------------------------------------------------------------------------------


def check_rewards(texts: Iterable[str], options: Mapping[str, dict] | None = None, own: Iterable[str] = ()) -> None:
    """
    Check names of rewards before any weights are loaded. A module of the user's is imported for it.

    Args:
        texts (iterable of `str`): names, each with `=weight` or without.
        options (`Mapping[str, dict]`, *optional*): by name, see [`load_reward`].
        own (iterable of `str`, *optional*): further names that the caller knows.

    Raises:
        ValueError: for a name that is nothing, with the one that was probably meant; for weights or options that do not fit.
        TypeError: if a `module:attribute` cannot be a reward.
    """
    names = [reward.name for reward in parse_rewards(texts)]
    _check_names("reward", names, options or {}, own)


def check_metrics(names: Iterable[str], options: Mapping[str, dict] | None = None, own: Iterable[str] = ()) -> None:
    """Check names of metrics before any weights are loaded. Arguments and errors as in [`check_rewards`], without weights."""
    _check_names("metric", list(names), options or {}, own)


def _check_names(what: str, names: list[str], options: Mapping[str, dict], own: Iterable[str]) -> None:
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ValueError(f"There are options for the {what} {unknown[0]!r}, which is not among {names}.")
    for name in names:
        _check_name(what, name, options.get(name, {}), own)


def _check_name(what: str, name: str, options: dict, own: Iterable[str]) -> None:
    if name in METRICS:
        _check_options(what, name, options)
        return
    if name in own:
        return
    path = Path(name)
    if ":" in name and not path.exists():
        check_user_object(name, import_attribute(name), options)
        return
    if options:
        raise ValueError(f"The {what} {name!r} is a saved model and takes no options.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"The folder {name!r} has no `config.json`, so it holds no saved reward model.")
        return
    in_a_folder = "/" in name and path.parent.is_dir() and path.parent != Path(".")
    if is_missing_path(name) or in_a_folder:
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"There is no folder {name!r}{did_you_mean(path.name, siblings) or '.'}")
    if not HUB_ID.fullmatch(name):
        known = [*METRICS, *own]
        hint = did_you_mean(name, known) or "."
        raise ValueError(
            f"There is no {what} {name!r}{hint} There are {', '.join(known)}; one of your own is `module:attribute`, and a "
            "saved reward model its folder or Hub id."
        )


def _check_options(what: str, name: str, options: dict) -> None:
    """Arguments of a published metric are those of its `from_pretrained`."""
    if not isinstance(options, Mapping):
        raise ValueError(f"Options of the {what} {name!r} must be arguments by name, got {options!r}.")
    parameters = inspect.signature(METRICS[name][0].from_pretrained).parameters
    known = [option for option in parameters if option != "kwargs"] + ["device", "dtype", "batch_size"]
    for option in options:
        if option not in known:
            raise ValueError(
                f"The {what} {name!r} has no option {option!r}{did_you_mean(option, known) or '.'} It takes {', '.join(known)}."
            )


# --- load ------------------------------------------------------------------------------------------------------------


def load_reward(
    texts: str | Iterable[str],
    options: Mapping[str, dict] | None = None,
    own: Mapping[str, Callable[[], Any]] | None = None,
) -> Reward:
    """
    The reward that names on a command line mean.

    Args:
        texts (`str` or iterable of `str`): names, each with `=weight` or without. Several are combined by a
            [`WeightedReward`]; a single one is used as it is, and its weight multiplies its scores.
        options (`Mapping[str, dict]`, *optional*): by name, arguments of a metric's `from_pretrained`, or of the user's class
            or factory.
        own (`Mapping[str, Callable]`, *optional*): further names, and what loads each.

    Returns:
        [`Reward`]: on the CPU; [`~Reward.prepare`], which trainers call, moves it.

    Raises: see [`check_rewards`].

    Example:

    ```python
    >>> from trl_spo import SPOTrainer, load_reward

    >>> reward = load_reward(["pickscore=0.7", "my_rewards:brightness=0.3"])
    >>> trainer = SPOTrainer(config, pipeline, reward, train_dataset=prompts)
    ```
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    own = own or {}
    check_rewards(texts, options, own)
    rewards = {}
    weights = {}
    for name, weight, label in parse_rewards(texts):
        rewards[label] = wrap_reward(own[name]() if name in own else _load(name, (options or {}).get(name, {}), "cpu"))
        weights[label] = weight
        if isinstance(rewards[label], FunctionReward):
            rewards[label].name = name
    if len(rewards) == 1 and weight == 1:
        return rewards[label]
    return WeightedReward(rewards, weights)


def load_metrics(
    names: Iterable[str],
    options: Mapping[str, dict] | None = None,
    device: torch.device | str | None = None,
    own: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Callable]:
    """
    The metrics that names mean, as [`evaluate_pipeline`] takes them. A reward judges at timestep 0.

    Args:
        names (iterable of `str`): see the module.
        options (`Mapping[str, dict]`, *optional*), own (`Mapping[str, Callable]`, *optional*): as in [`load_reward`].
        device (`torch.device` or `str`, *optional*): where networks are.

    Returns:
        `dict[str, Callable]`: by name, in the order given.

    Raises: see [`check_metrics`].
    """
    names = list(names)
    own = own or {}
    check_metrics(names, options, own)
    metrics = {}
    for name in names:
        metric = own[name]() if name in own else _load(name, (options or {}).get(name, {}), device)
        if isinstance(metric, torch.nn.Module):
            metric = metric.eval().to(device)
        if callable(metric) and ":" in name and takes_timesteps(metric):
            metric = wrap_reward(metric)
            metric.description = name
        metrics[name] = metric
    return metrics


def _load(name: str, options: dict, device: torch.device | str | None) -> Any:
    """What a name that was checked means."""
    if name in METRICS:
        dtype = options.get("dtype")
        if isinstance(dtype, str):  # from JSON
            options = {**options, "dtype": getattr(torch, dtype)}
        return load_metric(name, **{"device": device, **options})
    if ":" in name and not Path(name).exists():
        return make_user_object(name, import_attribute(name), options)
    return load_reward_model(name)
