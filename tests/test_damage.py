"""Damaged files: refused in one line, never a traceback; a named checksum sees every bit."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm import create_model

from nas.contract.__main__ import main
from nas.contract.final import read_result
from nas.contract.proxy_check import named_archs
from nas.contract.replay import earlier_config, read_models
from nas.core.io import load_arrays, write_json
from nas.core.per_image import per_image
from nas.data import DataSpec, open_dataset, prepare
from nas.distill.student import Evaluation
from nas.export.load import find_network
from nas.export.teacher_net import SCHEMA, load_teacher, read_teacher
from nas.export.weights import load_weights, read_metadata, save_weights
from nas.inherit.importance import load_order
from nas.jobs.job import finished_before
from nas.labels.store import open_store
from nas.measure.measurement_table import read_measurements
from nas.train.checkpoint import Position, load_checkpoint_into, save_checkpoint
from nas.train.folder import TrainFolder
from space import get_family
from space.errors import InputError
from tests.conftest import Finished
from tests.label_cases import built, teacher_info

KINDS = ("flip", "zero", "noise", "cut", "behead", "drop", "insert", "swap")


def damaged(raw: bytes, kind: str, at: int, size: int, rng: random.Random) -> bytes:
    """Damage `size` bytes from `at` on."""
    end = min(len(raw), at + size)
    before, part, after = raw[:at], raw[at:end], raw[end:]
    if kind == "swap":
        a, b = sorted((at, rng.randrange(len(raw))))
        size = min(size, b - a, len(raw) - b)
        return raw[:a] + raw[b : b + size] + raw[a + size : b] + raw[a : a + size] + raw[b + size :]
    return {
        "flip": lambda: before + bytes([part[0] ^ (1 << rng.randrange(8))]) + part[1:] + after,
        "zero": lambda: before + bytes(len(part)) + after,
        "noise": lambda: before + rng.randbytes(len(part)) + after,
        "cut": lambda: before,
        "behead": lambda: after,
        "drop": lambda: before + after,
        "insert": lambda: before + rng.randbytes(size) + part + after,
    }[kind]()


@dataclass(frozen=True)
class Case:
    """A file and what its reader makes of it. `exact`: a JSON names the checksum of this file."""

    path: Path
    read: Callable[[], Any]
    exact: bool = False


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and bool(a == b)


def check(case: Case, kind: str, at: int, size: int, rng: random.Random) -> None:
    raw, good = case.path.read_bytes(), case.read()
    case.path.write_bytes(damaged(raw, kind, at % len(raw), size, rng))
    refusal = found = None
    try:
        found = case.read()
    except InputError as error:
        refusal = str(error)
    finally:
        case.path.write_bytes(raw)
    where = f"{case.path.name}: {kind} of {size} bytes at {at % len(raw)}"
    if refusal is not None:
        assert "\n" not in refusal, where
        assert len(refusal) > 20, where
    elif case.exact:
        assert same(good, found), where


# A finished run


def of_run(folder: Path) -> list[Case]:
    """Every file of a run that somebody reads back."""
    family = get_family("tinyvit")

    def model(path: Path) -> Any:
        saved = find_network(path, "MODEL").saved()
        return {"record": dict(saved.record), "arch": saved.arch, "net": load_weights(saved.weights)}

    cases = [
        Case(folder / "run.json", lambda: earlier_config(folder)),
        Case(folder / "result.json", lambda: read_result(folder / "result.json")),
        Case(folder / "measurements.csv", lambda: read_measurements(folder / "measurements.csv")),
        Case(folder / "best.json", partial(model, folder)),
        Case(folder / "best.json", lambda: family.seed(str(folder / "best.json"))),
        Case(folder / "best.safetensors", partial(model, folder), exact=True),
    ]
    for path in sorted((folder / "models").glob("*.json")):
        cases.append(Case(path, lambda: [m.__dict__ for m in read_models(folder, family)]))
        cases.append(Case(path.with_suffix(".safetensors"), partial(model, path), exact=True))
    for path in sorted((folder / "work").rglob("*.json")):
        if "order" in json.loads(path.read_text()):
            cases.append(Case(path, partial(load_order, path)))
            continue
        cases.append(Case(path, partial(resumed, path.parent)))
        for weights in path.parent.glob("*.safetensors"):
            cases.append(Case(weights, partial(resumed, path.parent), exact=True))
            if weights.stem in ("holdout", "test"):
                cases.append(Case(weights, partial(per_image, path.parent, weights.stem)))
    return cases


def resumed(folder: Path) -> Any:
    """Return what a resumed run takes over of a finished job, from a copy of its folder."""
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    try:
        found = finished_before(copy, "job")
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return None if found is None else vars(found)


@pytest.fixture(scope="module")
def run(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "run"
    shutil.copytree(finished.folder, folder)
    return folder


@pytest.fixture(scope="module")
def cases(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("others")
    return [*of_run(run), *of_training(folder / "train"), *of_cache(folder)]


def test_every_json_and_table_of_a_run_has_a_case(run: Path) -> None:
    """What is drawn for eyes only needs none."""
    for_eyes = {"report.md", "pareto.png", "pareto.svg", "worker.log", ".lock", "proxy_check.csv"}
    for_eyes |= {"trials.csv", "steps.csv", "models.csv", "attempts.csv"}
    elsewhere = {"study.db"}  # tests/test_nas_search_study.py
    known = {case.path for case in of_run(run)}
    for path in run.rglob("*"):
        if path.is_file() and path.name not in for_eyes | elsewhere and path.suffix != ".log":
            assert path in known, path


# A full training, and what the cache keeps


def checkpoint_case(path: Path) -> Case:
    """A model and its optimizer after two steps, saved; read back into fresh ones."""
    plan = {"recipe": "r", "random_seed": 3}

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), {"ema": torch.ones(4)}

    def load() -> Any:
        model, optimizer, more = fresh()
        with torch.random.fork_rng(devices=[]):
            position = load_checkpoint_into(path, model, optimizer, plan, more)
            state = torch.get_rng_state()
        moments = [dict(optimizer.state[p]) for p in model.parameters()]
        return [dict(model.state_dict()), moments, more, state, position.epoch, position.extra]

    model, optimizer, more = fresh()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    save_checkpoint(path, model, optimizer, Position(2, plan, {"rows": [{"epoch": 1, "loss": 0.25}]}), more)
    return Case(path, load)


def of_training(folder: Path) -> list[Case]:
    folder.mkdir()
    kept = TrainFolder(folder)
    write_json(folder / "train.json", {"config": {"epochs": 3, "lr": 0.125}, "machine": {"n": 1}})
    write_json(folder / "result.json", {"status": "finished", "test_top1": 0.75, "params": 7})
    write_json(folder / "proxy_check.json", {"archs": [{"depth": 1}, {"depth": 2}]})
    weights, holdout, truth = folder / "best.safetensors", folder / "holdout.safetensors", np.arange(5)
    save_weights(weights, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}, {"epoch": "2"})
    Evaluation(np.linspace(0, 1, 5, dtype=np.float32), truth[::-1].copy(), truth).save(holdout)
    return [
        checkpoint_case(folder / "checkpoint.safetensors"),
        Case(folder / "train.json", kept.read_settings),
        Case(folder / "result.json", kept.read_result),
        Case(weights, lambda: [load_weights(weights), read_metadata(weights)]),
        Case(weights, lambda: find_network(weights, "--init").weights()),
        Case(holdout, lambda: load_arrays(holdout)),
        Case(folder / "proxy_check.json", lambda: named_archs(folder, 2)),
    ]


def of_cache(folder: Path) -> list[Case]:
    """A label store of one shard and a holdout, a teacher."""
    dataset = prepare(DataSpec("digits", img_size=16, max_images=60), folder / "cache")
    dropped = "key,name\n" + f"{dataset.train.keys[0]},x\n"
    store, teacher = built(folder / "store", dataset, dropped, epochs=1).folder, folder / "teacher"

    def labels() -> Any:
        opened = open_store(store)
        rows = [part[np.arange(len(part))] for part in (opened.epoch(0), opened.holdout())]
        return [dict(opened.manifest), rows, (opened.keys, opened.holdout_keys)]

    digest = save_weights(teacher / "weights.safetensors", create_model("test_vit", num_classes=10).state_dict())
    half = dict.fromkeys(("mean", "std", "student_mean", "student_std"), (0.5,) * 3)
    info = asdict(teacher_info(model="test_vit", digest=digest, **half))
    write_json(teacher / "info.json", {"schema": SCHEMA, "info": info})

    def asked() -> Any:
        return load_teacher(read_teacher(teacher))(torch.ones(1, 3, 160, 160))

    files = [p for p in sorted(store.rglob("*")) if p.is_file() and p.name[0] != "."]
    assert {p.name for p in files} >= {"manifest.json", "keys.bin", "dropped.csv", "00000.bin"}
    return [
        *(Case(path, labels, exact=path.name != "manifest.json") for path in files),
        Case(teacher / "info.json", lambda: vars(read_teacher(teacher))),
        Case(teacher / "weights.safetensors", asked, exact=True),
    ]


@settings(max_examples=250, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.integers(0, 10**9),
    st.sampled_from([1, 2, 4, 16, 64, 512, 4096]),
    st.randoms(use_true_random=False),
)
def test_damage_is_refused_or_harmless(
    cases: list[Case], which: int, kind: str, at: int, size: int, rng: random.Random
) -> None:
    check(cases[which % len(cases)], kind, at, size, rng)


def test_every_file_is_hit_in_every_manner(cases: list[Case]) -> None:
    rng = random.Random(5)
    for case in cases:
        for kind in KINDS:
            length = case.path.stat().st_size
            check(case, kind, rng.randrange(length), rng.choice([1, 3, 40, 600]), rng)


@pytest.mark.slow
def test_every_bit_of_every_small_file(cases: list[Case]) -> None:
    rng, seen = random.Random(1), set()
    for case in cases:
        alike = (case.path.name, case.path.parent.parent.name)
        if case.path.stat().st_size >= 20_000 or alike in seen:
            continue
        seen.add(alike)
        for at in range(case.path.stat().st_size):
            check(case, "flip", at, 1, rng)
            if at % 7 == 0:
                check(case, rng.choice(["cut", "zero", "drop"]), at, 8, rng)


@pytest.mark.parametrize("name", ["run.json", "result.json", "best.json", "job", "milestone"])
def test_values_of_another_type_are_refused_or_ignored(name: str, cases: list[Case]) -> None:
    """Each value of a JSON, one after the other, as another type, or not there at all."""
    named = {"job": "result.json", "milestone": "models"}
    for case in cases:
        record = json.loads(case.path.read_bytes()) if case.path.suffix == ".json" else None
        inside = case.path.parent.name if name == "milestone" else case.path.name
        if not isinstance(record, dict) or inside != named.get(name, name):
            continue
        raw = case.path.read_bytes()
        for key in record:
            for other in (None, "x", 1.5, True, [], {}, ["x"], {"x": None}):
                case.path.write_text(json.dumps({**record, key: other}))
                with contextlib.suppress(InputError):
                    case.read()
        case.path.write_bytes(raw)


# Through the entry points


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, path
    path.write_text(text.replace(old, new, 1))


def flip(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:])


HURT: dict[str, Callable[[Path], None]] = {
    "measurements.csv": lambda run: edit(run / "measurements.csv", ",float32,", ",float32,x,"),
    "result.json": lambda run: edit(run / "result.json", '"exit_code": 0', '"exit_code": "0"'),
    "a job's result.json": lambda run: edit(job(run) / "result.json", '"values": {', '"value": {'),
    "a job's holdout.safetensors": lambda run: flip(job(run) / "holdout.safetensors"),
}


def job(run: Path) -> Path:
    return next(p.parent for p in sorted(run.glob("work/s1-*/result.json")))


@pytest.mark.parametrize("what", HURT)
def test_a_resumed_run_names_the_damaged_file_and_loses_nothing(
    what: str, finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    if what != "result.json":
        (folder / "result.json").unlink()
    HURT[what](folder)
    before = {p: p.read_bytes() for p in folder.rglob("*.json")}
    assert main(["--resume", str(folder), "--cache-dir", str(finished.cache), "--quiet"]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert what.split()[-1] in line
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == before


def test_the_cache_of_pixels_is_whole_or_refused(tmp_path: Path) -> None:
    folder = prepare(DataSpec("digits", img_size=16, max_images=60), tmp_path).folder
    for path in sorted(folder.glob("*")):
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        with pytest.raises(InputError):
            open_dataset(folder)
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        if path.name != "meta.json":
            with pytest.raises(InputError):
                open_dataset(folder, verify=True)
        path.write_bytes(raw)
    assert len(open_dataset(folder, verify=True).train)
