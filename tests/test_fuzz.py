"""Whatever a user's file or text holds: a value, or one line; never another error, never a hang."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

import pytest
from fuzz_parsers import PARSERS, Parser
from fuzzing import fault_of, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from space.errors import InputError

CALLED = {parser.name: parser for parser in PARSERS}
NAMES = list(CALLED)
LIMIT_S = 30.0  # of one reading, on a machine that others use
FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", NAMES)
def test_valid_files_are_read(name: str) -> None:
    """Otherwise the mutations of them would be refused at the door."""
    parser = CALLED[name]
    seeds = parser.seeds()
    assert seeds
    assert seeds == parser.seeds()
    for data in seeds:
        with tempfile.TemporaryDirectory() as folder:
            assert parser.read(data, Path(folder)) is not None


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(
    data=st.one_of(
        st.binary(max_size=400), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )
)
def test_any_bytes_are_a_value_or_one_line(name: str, data: bytes) -> None:
    assert fault_of(CALLED[name], data, LIMIT_S) is None


KEYS = (
    *("family", "arch", "archs", "config", "recipe", "schema", "files", "spec", "order"),
    *("info", "networks", "finalists", "path"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.one_of(st.text(max_size=4), st.sampled_from(KEYS)), inner, max_size=4)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("name", [n for n in NAMES if CALLED[n].seeds()[-1][:1] in b"{["])
@FUZZ
@given(value=JSON)
def test_any_json_is_a_value_or_one_line(name: str, value: object) -> None:
    assert fault_of(CALLED[name], json.dumps(value).encode(), LIMIT_S) is None


@pytest.mark.parametrize("name", NAMES)
@settings(FUZZ, max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_a_mutated_valid_file_is_a_value_or_one_line(name: str, rng: random.Random) -> None:
    parser = CALLED[name]
    seeds = parser.seeds()
    assert fault_of(parser, mutated(rng.choice(seeds), seeds, rng), LIMIT_S) is None


# What the fuzzer found once: parser, and how a valid file was changed

ONCE: list[tuple[str, object]] = [
    ("finalists", {"family": [], "finalists": []}),
    ("finalists", {"family": None, "finalists": []}),
    ("finalists", {"family": "tinyvit", "finalists": [None]}),
    ("result", {"status": "reached", "exit_code": 0, "message": "", "path": [[["a"]]]}),
    ("run", {"schema": 1, "config": {"seed": 1, "target_params": 5, "device": None}}),
    ("run", {"schema": 1, "config": [["seed", 1]]}),
    ("run", {"schema": 1, "config": None}),
    ("inline-arch", {"x" * 300: 1}),
    ("teacher", []),
    ("teacher", {"schema": 1, "info": {"x": 1}}),
]


@pytest.mark.parametrize(("name", "value"), ONCE)
def test_what_crashed_once_is_refused(name: str, value: object) -> None:
    assert fault_of(CALLED[name], json.dumps(value).encode(), LIMIT_S) is None


@pytest.mark.parametrize("size", ["1e999", "1e308", '"x"', "null", "[]"])
def test_a_size_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    parser = CALLED["hub"]
    (raw,) = parser.seeds()
    bad = raw.replace(b"[3, 32, 32]", f"[3, 32, {size}]".encode())
    assert bad != raw
    if size == "1e308":
        assert fault_of(parser, bad, LIMIT_S) is None
        return
    with pytest.raises(InputError, match=r"config\.json without sound preprocessing"):
        parser.read(bad, tmp_path)


def test_odd_manifests_are_refused(tmp_path: Path) -> None:
    whole = json.loads(CALLED["manifest"].seeds()[0])
    for name, values in {
        "epochs": (0, -1, "1", None, 1.5),
        "shard_records": (0, True, [], 2**40),
        "files": (None, 3, {"../x": ""}, {"keys.bin.": ""}),
        "libraries": (None, []),
        "spec": (None, [], {}),
        "id": (None, "x"),
        "schema": (None, 99),
    }.items():
        for value in values:
            with pytest.raises(InputError) as caught:
                CALLED["manifest"].read(json.dumps({**whole, name: value}).encode(), tmp_path)
            assert "\n" not in str(caught.value)
        missing = {k: v for k, v in whole.items() if k != name}
        with pytest.raises(InputError):
            CALLED["manifest"].read(json.dumps(missing).encode(), tmp_path)
    for name, value in (("scale", [0.5]), ("scale", []), ("ratio", [1.0]), ("ratio", 3)):
        spec = {**whole["spec"], "augment": {**whole["spec"]["augment"], name: value}}
        with pytest.raises(InputError, match=r"manifest\.json"):
            CALLED["manifest"].read(json.dumps({**whole, "spec": spec}).encode(), tmp_path)


@given(st.binary(max_size=60))
@settings(FUZZ, max_examples=200)
def test_any_pickle_is_refused_or_tensors(data: bytes) -> None:
    head = CALLED["pickle"].seeds()[1][:40]
    for each in (data, head + data, b"\x80\x02" + data + b"."):
        assert fault_of(CALLED["pickle"], each, LIMIT_S) is None


def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(InputError, match="objects in pickles can run code"):
        CALLED["pickle"].read(pickle.dumps({"a": Evil()}, protocol=2), tmp_path)
    assert not (tmp_path / "ran").exists()


# The fuzzer itself


def test_the_fuzzer_sees_a_hang_and_a_refusal_of_two_lines() -> None:
    def slow(data: bytes, folder: Path) -> object:
        time.sleep(0.02)
        return data

    def long_winded(data: bytes, folder: Path) -> object:
        raise InputError("one\ntwo")

    assert fault_of(Parser("slow", list, slow), b"", 0.01) == "longer than 0.01 s"
    assert fault_of(Parser("long", list, long_winded), b"", 9.0) == "a refusal that is not one line"
