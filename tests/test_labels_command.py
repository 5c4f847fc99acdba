"""The label tool: one command makes a store, another finds whatever is wrong with it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from label_cases import contents
from PIL import Image

from nas.data import DataSpec, prepare
from nas.data.augment.spec import default_spec
from nas.data.augment.timm_engine import eval_batch
from nas.distill.label_store import build, verify
from nas.export.weights import save_weights
from nas.labels.__main__ import main
from nas.labels.api import merge
from nas.labels.build import find_contradicted
from nas.labels.reader import LabelReader
from nas.labels.store import dropped_keys, open_store
from space.errors import InputError
from tests._inline import InlineExecutor

ROOT = Path(__file__).resolve().parent.parent
SIZES: dict[str, Any] = {"img_size": 16, "max_images": 120, "teacher_epochs": 1, "epochs": 2, "threads": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def store(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "s"
    build("digits", out=out, cache_dir=cache, **SIZES)
    return out


def flags(**changes: Any) -> list[str]:
    values = {**SIZES, **changes}
    return [part for k, v in values.items() for part in ("--" + k.replace("_", "-"), str(v))]


def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs run here: a process of its own takes seconds to start."""
    for module in ("nas.distill.label_store", "nas.labels.api"):
        monkeypatch.setattr(f"{module}.LocalExecutor", lambda **_: InlineExecutor())


def test_the_command_builds_tells_and_verifies(
    cache: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--cache-dir", str(cache), "--quiet", "--json"]
    out = str(tmp_path / "s")
    assert main(["build", "--data", "digits", "--out", out, *flags(), *common]) == 0
    made = json.loads(capsys.readouterr().out)
    assert contents(tmp_path / "s") == contents(store)
    size = sum(len(data) for data in contents(store).values())
    assert main(["info", out, "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == size
    assert told["records"] == made["images"] * made["epochs"] == 2 * 96
    assert told["id"] == made["id"]
    assert told["spec"]["codec"] == "packed"
    assert main(["verify", out, "--teacher", "20", *common]) == 0
    assert json.loads(capsys.readouterr().out) == {"problems": []}
    # A second run has nothing to do, and says so before it starts.
    inline(monkeypatch)
    assert main(["build", "--data", "digits", "--out", out, *flags(), "--cache-dir", str(cache)]) == 0
    assert "0 shards with 0 records (0.0 MB) are still to be built" in capsys.readouterr().out


def test_damage_ends_in_a_line_each_and_status_2(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline(monkeypatch)
    for name, data in contents(store).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert verify(tmp_path) == []
    (tmp_path / "epoch-0001" / "00000.bin").unlink()
    (tmp_path / "keys.bin").write_bytes((tmp_path / "keys.bin").read_bytes()[:-1] + b"\0")
    (tmp_path / "odd.bin").write_bytes(b"")
    assert main(["verify", str(tmp_path), "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"error: label store {tmp_path}: ") for line in lines)
    manifest = tmp_path / "manifest.json"
    for bad in (manifest.read_bytes()[:-9], manifest.read_bytes().replace(b"plain", b"plaim")[1:]):
        manifest.write_bytes(bad)
        assert main(["verify", str(tmp_path), "--quiet"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_make_the_same_bytes(cache: Path, store: Path, tmp_path: Path, processes: int) -> None:
    build("digits", out=tmp_path / "s", processes=processes, cache_dir=cache, **SIZES)
    assert contents(tmp_path / "s") == contents(store)


@pytest.mark.slow
def test_machines_build_parts_and_merge(cache: Path, store: Path, tmp_path: Path) -> None:
    for at in (1, 2):
        build("digits", out=tmp_path / f"{at}", part=f"{at}/2", cache_dir=cache, **SIZES)
    assert merge(tmp_path / "all", [tmp_path / "1"])["missing"] > 0
    assert merge(tmp_path / "all", [tmp_path / "1", tmp_path / "2"])["missing"] == 0
    assert contents(tmp_path / "all") == contents(store)


def test_a_subset_of_images_is_labelled_where_asked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline(monkeypatch)
    made = build("digits", out=tmp_path / "s", limit=40, cache_dir=cache, **SIZES)
    assert made["images"] == 40
    dataset = prepare(DataSpec("digits", 16, 120), cache)
    opened = open_store(tmp_path / "s", use=dataset)
    with pytest.raises(InputError, match="no label for 56 of 96 images"):
        LabelReader(dataset.train, opened, 8, 0)
    assert LabelReader(dataset.train, opened, 8, 0, missing="skip").images == 40


BAD: list[tuple[list[str], str]] = [
    (["build", "--data", "nowhere"], "--data: got nowhere"),
    (["build", "--teacher", "nobody"], "--teacher"),
    (["build", "--epochs", "0"], "--epochs: got 0"),
    (["build", "--topk", "10"], "top-K: got 10, want 1 to 9"),
    (["build", "--codec", "zip"], "--codec"),
    (["build", "--part", "3/2"], "--part: got 3/2"),
    (["build", "--part", "x"], "--part: got x"),
    (["build", "--clean", "5"], "--clean: got 5"),
    (["build", "--processes", "99999"], "--processes: got 99999"),
    (["build", "--threads", "99999"], "--threads: got 99999"),
    (["build", "--mixup", "-1"], "--mixup"),
    (["build", "--policy", "no-such"], "policy"),
    (["build", "--precision", "float16"], "--precision"),
    (["info", "nowhere"], "label store: got nowhere"),
    (["verify", "nowhere"], "label store: got nowhere"),
    (["merge", "all", "nowhere"], "label store: got nowhere"),
    (["sing"], "sing"),
    ([], "required"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line(
    cache: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISION_CONTRACTION_CACHE", str(cache))
    inline(monkeypatch)
    if "--teacher" not in arguments:  # whose training may take hours
        monkeypatch.setattr("nas.distill.label_store.teach", lambda *_, **__: pytest.fail("taught"))
    if arguments[:1] == ["build"]:
        given = [*zip(*[iter(flags(data="digits"))] * 2, strict=True)]
        arguments = [*arguments, *(part for pair in given if pair[0] not in arguments for part in pair), "--out", "s"]
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert said in lines[-1]
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_another_store_in_the_folder_is_left_alone(
    cache: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline(monkeypatch)
    before = contents(store)
    arguments = ["build", "--data", "digits", "--out", str(store), "--cache-dir", str(cache)]
    assert main([*arguments, "--quiet", *flags(), "--salt", "5"]) == 2
    assert "got salt 0, want salt 5" in capsys.readouterr().err
    assert contents(store) == before


def start(out: Path, cache: Path, epochs: int, *extra: str) -> subprocess.Popen[bytes]:
    places = ["--data", "digits", "--out", str(out), "--cache-dir", str(cache)]
    command = [sys.executable, "-m", "nas.labels", "build", *places, "--quiet", *flags(epochs=epochs), *extra]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=env, start_new_session=True)


def calmly(out: Path) -> dict[str, bytes]:
    """Read a store that others write to, again where something vanished meanwhile."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return contents(out)


def kill_and_resume(cache: Path, tmp_path: Path, kills: int, epochs: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "s"
    build("digits", out=whole, cache_dir=cache, **{**SIZES, "epochs": epochs})
    want = contents(whole)
    draw = random.Random(0)
    landed = 0
    for _ in range(kills):
        process = start(out, cache, epochs, "--processes", str(draw.choice([1, 1, 2])))
        # Some die while libraries load, most between and inside shards.
        deadline = time.monotonic() + 60
        if draw.random() < 0.8:
            stop = len(calmly(out)) + draw.randint(0, 3)
            while time.monotonic() < deadline and len(calmly(out)) < stop and process.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
        else:
            time.sleep(draw.random() * 3)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            landed += 1
        process.wait(timeout=60)
        for name, data in calmly(out).items():
            # Nothing half-written is ever taken for whole.
            if name in want and name.endswith(".bin"):
                assert data == want[name], name
        if len(calmly(out)) >= len(want):
            for path in sorted(out.glob("*/*.bin"))[:: draw.randint(2, 5)]:
                path.unlink()  # it was done too soon for more kills: make it less done
    assert landed >= kills // 2
    process = start(out, cache, epochs)
    assert process.wait(timeout=300) == 0
    assert contents(out) == want
    assert not [p for p in out.rglob("*") if p.name.startswith(".part")]


@pytest.mark.slow
def test_a_killed_build_resumes_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    kill_and_resume(cache, tmp_path, 2, 4)


@pytest.mark.slow
def test_thirty_kills_resume_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    kill_and_resume(cache, tmp_path, 30, 30)


def folder_of_digits(root: Path, *, classes: bool) -> Path:
    from sklearn.datasets import load_digits

    table = load_digits()
    for at in range(90):
        pixels = np.round(table.images[at] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)
        place = root / str(table.target[at]) if classes else root
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{at:03d}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "w.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_weights(path, timm.create_model("test_resnet", num_classes=7).state_dict())
    return f"test_resnet:{path}"


def test_images_without_classes_are_labelled_and_teach(
    cache: Path, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline(monkeypatch)
    data = folder_of_digits(tmp_path / "loose", classes=False)
    options: dict[str, Any] = {**SIZES, "max_images": None}
    made = build(str(data), teacher=teacher, out=tmp_path / "s", cache_dir=cache, **options)
    assert made["num_classes"] == 7
    dataset = prepare(DataSpec(str(data), 16), cache)
    assert not dataset.labelled
    opened = open_store(tmp_path / "s", use=dataset)
    batch = next(LabelReader(dataset.train, opened, 8, 0).epoch(0))
    assert batch.truth.unique().tolist() == [-1]
    assert int(batch.index.max()) < 7
    assert verify(tmp_path / "s", teacher=10, cache_dir=cache) == []
    with pytest.raises(InputError, match=r"--teacher: got auto for .* which has no labels"):
        build(str(data), out=tmp_path / "t", cache_dir=cache, **options)
    with pytest.raises(InputError, match="--clean: got images without labels"):
        build(str(data), teacher=teacher, out=tmp_path / "t", clean=0.1, cache_dir=cache, **options)


@pytest.mark.slow
def test_contradicted_labels_are_dropped_and_listed(cache: Path, tmp_path: Path) -> None:
    data = folder_of_digits(tmp_path / "digits", classes=True)
    options: dict[str, Any] = {**SIZES, "max_images": None}
    made = build(str(data), out=tmp_path / "s", clean=0.5, cache_dir=cache, **options)
    with open(tmp_path / "s" / "dropped.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    dataset = prepare(DataSpec(str(data), 16), cache)
    assert 0 < made["dropped"] == len(rows) < len(dataset.train)
    names = dict(zip(dataset.train.keys, dataset.train.names, strict=True))
    for row in rows:
        assert names[row["key"]] == row["name"]
        assert row["name"].split("/")[0] == row["label"] != row["teacher_label"]
        assert float(row["label_prob"]) < 0.5 * float(row["teacher_prob"])
    shares = [float(row["label_prob"]) / float(row["teacher_prob"]) for row in rows]
    assert np.allclose(shares, sorted(shares), atol=1e-4), "worst first"
    opened = open_store(tmp_path / "s", use=dataset)
    assert dropped_keys(opened) == {row["key"] for row in rows}
    assert made["images"] == len(dataset.train) - len(rows)
    replay = LabelReader(dataset.train, opened, 8, 0)
    assert replay.images == made["images"]
    assert "dropped" in replay.notes[0]
    assert verify(tmp_path / "s") == []


def test_exactly_the_contradicted_are_dropped(cache: Path) -> None:
    dataset = prepare(DataSpec("digits", 16, 120), cache)
    split = dataset.train
    said = torch.randn(len(split), 10, generator=torch.Generator().manual_seed(0)) * 3
    inputs = eval_batch(split.pixels[:], default_spec(dataset))
    row_of = {one.numpy().tobytes(): row for row, one in enumerate(inputs)}

    def logits(batch: torch.Tensor) -> torch.Tensor:
        return said[[row_of[one.numpy().tobytes()] for one in batch]]

    for ratio in (1e-4, 0.01, 0.5, 0.99):
        table, count = find_contradicted(dataset, logits, default_spec(dataset), ratio)
        q = said.double().softmax(1).numpy()
        own = q[np.arange(len(split)), split.labels]
        want = {split.keys[r] for r in np.flatnonzero(own < ratio * q.max(1))}
        assert {line.split(",")[0] for line in table.splitlines()[1:]} == want
        assert count == len(want)


def test_the_cache_is_listed_and_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from pathlib import Path; from nas.data import DataSpec, prepare\n"
        "prepare(DataSpec('digits', 16, 60), Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    common = ["--cache-dir", str(tmp_path), "--quiet", "--json"]
    assert main(["cache", *common]) == 0
    (row,) = json.loads(capsys.readouterr().out)["data"]
    assert row["name"].startswith("digits-")
    assert row["bytes"] > 60 * 16 * 16 * 3
    assert main(["cache", "--keep", "1G", *common]) == 0
    assert len(json.loads(capsys.readouterr().out)["data"]) == 1
    assert main(["cache", "--keep", "0", *common]) == 0
    assert json.loads(capsys.readouterr().out) == {"data": []}
    assert main(["cache", "--keep", "much", *common]) == 2
    assert "--keep: got much" in capsys.readouterr().err


def test_the_tool_needs_no_torch_to_tell(store: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from nas.labels.__main__ import main; sys.exit(main(['info', {str(store)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "shard_records" in done.stdout
