"""Requirements read what they write, and what nobody could meet or measure is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.core.requirement import (
    COUNTED,
    DTYPES,
    LATENCIES,
    METRICS,
    Requirement,
    Setting,
    parse_requirement,
    parse_setting,
)
from space.errors import InputError

LAW = settings(derandomize=True, deadline=None)


def is_name(text: str) -> bool:
    return text not in DTYPES and not re.fullmatch(r"b[0-9]+", text)


DEVICES = st.one_of(st.sampled_from(["cpu", "cuda"]), st.integers(0, 99).map("cuda:{}".format))
RUNTIMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,20}", fullmatch=True).filter(is_name)
SETTINGS = st.builds(Setting, DEVICES, RUNTIMES, st.sampled_from(DTYPES), st.integers(1, 10**6))
BOUNDS = st.one_of(st.floats(1e-9, 1e18), st.integers(1, 10**12).map(float), st.sampled_from([1.9, 0.1, 2.0 / 3]))
MEASURED = [metric for metric in METRICS if metric not in COUNTED]
REQUIREMENTS = st.one_of(
    st.builds(Requirement, st.sampled_from(MEASURED), BOUNDS, SETTINGS),
    st.builds(Requirement, st.sampled_from(COUNTED), BOUNDS, st.none()),
)


@given(SETTINGS, st.permutations([0, 1, 2]), st.sets(st.integers(0, 2)))
@LAW
def test_parts_come_in_any_order_and_absent_ones_take_the_defaults(
    setting: Setting, order: list[int], named: set[int]
) -> None:
    parts = [setting.runtime, setting.dtype, f"b{setting.batch}"]
    text = ":".join([setting.device, *(parts[i] for i in order if i in named)])
    wanted = dataclasses.replace(
        setting,
        runtime=setting.runtime if 0 in named else "eager",
        dtype=setting.dtype if 1 in named else "bfloat16",
        batch=setting.batch if 2 in named else 7,
    )
    assert parse_setting("--x", text, dtype="bfloat16", batch=7) == wanted


@given(REQUIREMENTS, st.lists(st.sampled_from([" ", "  ", ""]), min_size=4, max_size=4))
@LAW
def test_a_requirement_reads_back_whatever_the_spaces(required: Requirement, blank: list[str]) -> None:
    text = required.text
    for sign in ("<=", ">=", "@"):
        text = text.replace(sign, blank[0] + sign + blank[1])
    found = parse_requirement(blank[2] + text + blank[3], dtype="float32", batch=16)
    assert found == required


def test_defaults_are_the_command_lines_but_a_latency_is_that_of_batch_1() -> None:
    for metric in MEASURED:
        text = f"{metric}{METRICS[metric]}5@cuda"
        found = parse_requirement(text, dtype="float16", batch=32)
        batch = 1 if metric in LATENCIES else 32
        assert found == Requirement(metric, 5.0, Setting("cuda", "eager", "float16", batch))
    named = parse_requirement("latency_ms<=5@cpu:b4", dtype="float32", batch=16)
    assert named.setting == Setting("cpu", "eager", "float32", 4)


@pytest.mark.parametrize(
    ("text", "bound"), [("params<=5M", 5e6), ("params<=750k", 75e4), ("macs<=1.3G", 1.3e9), ("macs<=12", 12.0)]
)
def test_counts_take_suffixes(text: str, bound: float) -> None:
    found = parse_requirement(text, dtype="float32", batch=16)
    assert (found.bound, found.setting) == (pytest.approx(bound), None)


MALFORMED = [
    *("", "a" * 1000, "speedup", "speedup>=1.9", "sped>=1.9@cpu"),
    *("speedup<=1.9@cpu", "speedup>1.9@cpu", "speedup==1.9@cpu", "latency_ms>=5@cpu", "peak_mem_mb>=10@cpu"),
    *(f"speedup>={value}@cpu" for value in ("", "fast", "0", "-1", "nan", "inf", "1k")),
    *(f"speedup>=1.9@{device}" for device in ("", "tpu", "cuda:-1", "cuda:\u00b2", "cpu eager")),
    *(f"speedup>=1.9@cpu:{part}" for part in ("", "b0", "b1:b2", "eager:compile", "float32:float16", "0", "EAGER")),
    *("params<=5M@cpu", "params>=5M", "params<=5T", "macs<=M", "speedup>=1.9\nlatency_ms<=5@cpu"),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_requirements_are_refused_in_one_line(text: str) -> None:
    """The line names the flag (or the part of it), what was got and what is wanted."""
    with pytest.raises(InputError) as caught:
        parse_requirement(text, dtype="float32", batch=16)
    line = str(caught.value)
    assert "\n" not in line
    assert re.match(r"(--require|--batch|--dtype|device): got .+, want .+", line), line


@given(st.text(alphabet="speduplatncym_>=<1.9@:cpub0 \n", max_size=40))
@LAW
def test_whatever_is_typed_is_read_or_refused(text: str) -> None:
    """Whatever is raised is one line; whatever is read reads back."""
    refusal = ""
    try:
        found = parse_requirement(text, dtype="float32", batch=16)
    except InputError as error:
        refusal = str(error)
    else:
        assert parse_requirement(found.text, dtype="float32", batch=16) == found
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("device", bad) for bad in ("cpu:0", "", "cuda:", "cuda:x", "cuda:\u00b2")),
        ("dtype", "int8"),
        *(("batch", bad) for bad in (0, True, 1.0, -3)),
    ],
)
def test_settings_that_nothing_can_be_measured_under_are_refused(name: str, bad: object) -> None:
    with pytest.raises(InputError) as caught:
        Setting(**{name: bad})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
