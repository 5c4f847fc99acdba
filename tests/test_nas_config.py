"""Settings: the dial sets all sizes, every bad value is one line, and JSON round-trips."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.contract.checks import make_config, with_steps
from nas.contract.flags import build_parser
from nas.core.config import (
    MOST_STEPS,
    ROUNDS,
    STEP_KEEPS,
    RunConfig,
    config_from_dict,
    effort_defaults,
    parse_count,
    parse_share,
    steps_of,
    with_effort,
)
from nas.core.settings import EFFORTS, settings_of
from nas.search.strategies import get_strategy, strategy_names
from nas.train.optim import INHERIT_LR, SCRATCH_LR, SCRATCH_PARAMS, peak_lr
from space import Context, get_family
from space.errors import InputError


def make(**changes: object) -> RunConfig:
    return RunConfig(**{"seed": "21M", "target_params": 5_000_000, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_is_a_legal_configuration_and_survives_json(effort: str) -> None:
    config = make(**with_effort(effort, {}))
    assert config.effort == effort
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert with_effort(effort, {"steps": 7})["steps"] == 7
    assert effort_defaults(effort).keys() == effort_defaults("high").keys()


def test_steps_are_as_many_as_the_way_is_long() -> None:
    known = {(21_000_000, 5_000_000): (2, 4, 6), (5_000_000, 3_600_000): (1, 1, 1)}
    for (params, target), wanted in known.items():
        assert tuple(steps_of(effort, params, target) for effort in EFFORTS) == wanted


@given(effort=st.sampled_from(list(EFFORTS)), params=st.integers(1_000, 10**9), share=st.floats(0.001, 0.999))
def test_a_step_keeps_about_the_efforts_share(effort: str, params: int, share: float) -> None:
    target = max(1, round(params * share))
    steps = steps_of(effort, params, target)
    assert 1 <= steps <= MOST_STEPS
    if 1 < steps < MOST_STEPS:
        cut, wanted = math.log(target / params) / steps, math.log(STEP_KEEPS[effort])
        assert abs(cut / wanted - 1) <= 0.5 / steps + 1e-9
    assert steps_of(effort, params, max(1, target // 2)) >= steps


BAD: dict[str, tuple[object, ...]] = {
    "target_params": (0,),
    "steps": (0, True, 2.0),
    "candidates_per_step": (-1,),
    "seed_epochs": (0,),
    "visits": (1,),
    "batch_size": (1,),
    "random_seed": (-1,),
    "img_size": (3,),
    "min_speedup": (-1.0, math.nan),
    "min_throughput": (math.inf,),
    "params_tolerance": (1.0,),
    "max_corrupt": (-0.1,),
    "train_per_step": (1000,),
    "beam": (1000,),
    "proxy_init": ("magic",),
    "bench_dtype": ("int8",),
    "device": ("tpu", "cuda:x", "cpu:", "cuda:", "cuda:\u00b2"),
    "racing": ("no", 0, 1),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_setting_is_refused_in_one_line_naming_its_flag(name: str, value: object) -> None:
    with pytest.raises(InputError) as refusal:
        make(**{name: value})
    flag = "--no-racing" if name == "racing" else "--" + name.replace("_", "-")
    assert re.fullmatch(rf"{flag}: got .*(want|at most) .*", str(refusal.value))


def test_refusals_of_more_than_one_setting() -> None:
    with pytest.raises(InputError, match="--labels with --teacher"):
        make(labels="store", teacher="resnet18")
    with pytest.raises(InputError, match="--effort"):
        with_effort("extreme", {})
    with pytest.raises(InputError, match="unknown"):
        config_from_dict({**make().to_dict(), "surprise": 1})
    with pytest.raises(InputError, match="missing"):
        config_from_dict({"seed": "21M"})
    for half in ({"seed": "21M"}, {"target_params": 5_000_000}):
        with pytest.raises(InputError, match=r"--(seed|target-params): got nothing"):
            make_config(half)


@settings(max_examples=200, derandomize=True)
@given(st.integers(1, 10**9))
def test_counts_parse_in_every_spelling(n: int) -> None:
    assert parse_count("--target-params", n) == n
    assert parse_count("--target-params", f"{n:_}") == n
    assert parse_count("--target-params", f"{n}K") == n * 1000
    assert parse_count("--target-params", f" {n}m ") == n * 1_000_000


@pytest.mark.parametrize("text", ["0", "abc", "", "-5M", "5MM", "nan", "inf", "M", "0.2", "5 M x"])
def test_bad_counts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--target-params"):
        parse_count("--target-params", text)


@settings(max_examples=100, derandomize=True)
@given(st.floats(0, 0.99))
def test_shares_parse_as_numbers_and_percentages(share: float) -> None:
    assert parse_share("--x", repr(share)) == share
    assert parse_share("--x", f"{share * 100!r}%") == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("text", ["1", "100%", "-1%", "x", "nan", "%"])
def test_bad_shares_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_share("--max-corrupt", text)


def test_every_setting_has_one_flag() -> None:
    flags = {action.dest: action for action in build_parser()._actions}
    for field in settings_of(RunConfig):
        assert flags[field.name].option_strings == [field.flag]
    undescribed = {f.name for f in dataclasses.fields(RunConfig)} - {f.name for f in settings_of(RunConfig)}
    assert undescribed == {"seed_arch"}


@given(params=st.integers(1, 10**9), factor=st.integers(2, 50))
def test_wide_nets_start_slower_and_small_ones_all_alike(params: int, factor: int) -> None:
    small, large = peak_lr("scratch", params), peak_lr("scratch", params * factor)
    assert large <= small <= SCRATCH_LR
    if params <= SCRATCH_PARAMS:
        assert small == SCRATCH_LR
    else:
        assert large == pytest.approx(small / math.sqrt(factor))
    assert peak_lr("inherit", params) == INHERIT_LR


@pytest.mark.parametrize("strategy", strategy_names())
@pytest.mark.parametrize("effort", EFFORTS)
def test_a_short_way_takes_fewer_steps_but_not_fewer_rounds(strategy: str, effort: str) -> None:
    family = get_family("tinyvit")
    dataset = cast(Any, SimpleNamespace(context=Context(64, 100)))
    given = {"seed": "5M", "target_params": 3_600_000, "strategy": strategy, "effort": effort}
    config = make_config(given)
    found = with_steps(config, given, family, family.seed("5M"), dataset).steps
    few = {"smoke": 1, "normal": 1, "high": 2}
    assert found == (few if get_strategy(strategy).stepwise else ROUNDS)[effort]
    given["steps"] = 7
    assert with_steps(make_config(given), given, family, family.seed("5M"), dataset).steps == 7
