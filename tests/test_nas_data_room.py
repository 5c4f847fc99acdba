"""The cache's cap, what goes first, what stays, and what kills leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.data import DataSpec, open_dataset, prepare
from nas.data import cache as cache_module
from nas.data.cache import CAP_VARIABLE, cache_report, clean_cache, hold, make_room, parse_bytes
from space.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for at in range(40):
        path = tmp_path / "images" / "ab"[at % 2] / f"{at:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(at).integers(0, 256, (30, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def spec(tree: Path, **changes: object) -> DataSpec:
    return DataSpec(str(tree), img_size=16, **changes)  # type: ignore[arg-type]


def fake(cache: Path, name: str, size: int, used: float) -> Path:
    folder = cache / "data" / name
    folder.mkdir(parents=True)
    (folder / "meta.json").write_bytes(b"x" * size)
    marker = folder.with_name(f"{name}.use")
    marker.touch()
    os.utime(marker, (used, used))
    return folder


def test_what_a_living_process_uses_stays(tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    dataset = prepare(spec(tree), cache)
    other = tmp_path / "copy"
    shutil.copytree(cache, other)
    code = (
        "import sys; from nas.data import open_dataset\n"
        "held = open_dataset(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(other / "data" / dataset.folder.name)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        assert [row["in_use"] for row in cache_report(other)] == [True]
        assert clean_cache(other, 0) == 0
    finally:
        process.communicate("")
    assert [row["in_use"] for row in cache_report(other)] == [False]
    assert clean_cache(other, 0) > 0
    assert cache_report(other) == []
    assert clean_cache(cache, 0) == 0, "this process has it open"
    open_dataset(dataset.folder, verify=True)


def test_room_is_made_and_what_never_fits_is_refused_before_it_is_decoded(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    fake(cache, "old", 20_000, time.time() - 5000)
    fake(cache, "new", 20_000, time.time())
    monkeypatch.setenv(CAP_VARIABLE, "65K")
    need = 40 * 18 * 18 * 3  # 38,880 bytes of pixels
    prepare(spec(tree), cache)
    names = {str(row["name"]) for row in cache_report(cache)}
    assert "old" not in names
    assert "new" in names
    monkeypatch.setenv(CAP_VARIABLE, str(need - 1))
    with pytest.raises(
        InputError, match=r"--no-pixel-cache, or raise VISION_CONTRACTION_CACHE_CAP"
    ):
        prepare(spec(tree, random_seed=1), cache)
    prepare(spec(tree, random_seed=1, pixel_cache=False), cache)
    monkeypatch.delenv(CAP_VARIABLE)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="that can be freed on the cache's disk"):
        make_room(cache, need, 2 * need, "images")


def test_sizes_are_read_or_refused() -> None:
    assert [parse_bytes("x", text) for text in ("10", "1.5K", "2MB", "3g", "0")] == [
        10,
        1500,
        2_000_000,
        3_000_000_000,
        0,
    ]
    for text in ("", "x", "-1", "5X", "nanG", "1e40"):
        with pytest.raises(InputError, match="--keep"):
            parse_bytes("--keep", text)


def names_of(cache: Path) -> set[str]:
    return {str(row["name"]) for row in cache_report(cache)}


def test_room_is_made_as_a_list_of_ages_would_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least recently used first, no more than needed, nothing in use; nothing if it is no use."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(cache_module, "_SPARE", 0)
    refused = 0
    for turn in range(60):
        cache = tmp_path / str(turn)
        ages, sizes, busy = rng.permutation(5), rng.integers(100, 1000, 5), rng.random(5) < 0.3
        folders = [
            fake(cache, f"d{at}", int(sizes[at]), time.time() - 1000 * int(ages[at]))
            for at in range(5)
        ]
        for at in np.flatnonzero(busy):
            used = folders[at].with_name(f"d{at}.use").stat().st_mtime
            assert hold(folders[at])
            os.utime(folders[at].with_name(f"d{at}.use"), (used, used))
        total, need = int(sizes.sum()), int(rng.integers(1, 1500))
        cap, free = int(rng.integers(1500, 4000)), int(rng.integers(0, 2000))

        def usage(path: Path, cache: Path = cache, disk: int = total + free) -> object:
            there = sum(int(str(row["bytes"])) for row in cache_report(cache))
            return type("Usage", (), {"free": disk - there, "total": disk})

        monkeypatch.setenv(CAP_VARIABLE, str(cap))
        monkeypatch.setattr(cache_module.shutil, "disk_usage", usage)
        left, bytes_left = set(range(5)), total
        for at in np.argsort(-ages):
            if bytes_left + need <= cap and free + total - bytes_left >= 2 * need:
                break
            if not busy[at]:
                left.discard(int(at))
                bytes_left -= int(sizes[at])
        if bytes_left + need <= cap and free + total - bytes_left >= 2 * need:
            make_room(cache, need, 2 * need, "images")
        else:
            refused += 1
            left = set(range(5))
            with pytest.raises(InputError, match=r"at most .* GB.*--no-pixel-cache") as caught:
                make_room(cache, need, 2 * need, "images")
            assert "\n" not in str(caught.value)
        assert names_of(cache) == {f"d{at}" for at in left}
    assert 10 < refused < 50, "both ends are looked at"


def test_files_that_data_sets_share_count_once(tmp_path: Path) -> None:
    one, two = (fake(tmp_path, name, 10, time.time() - age) for name, age in (("a", 9), ("b", 5)))
    (one / "train.npy").write_bytes(b"x" * 1000)
    os.link(one / "train.npy", two / "train.npy")
    assert [row["bytes"] for row in cache_report(tmp_path)] == [1010, 1010]
    assert clean_cache(tmp_path, 1020) == 0
    assert clean_cache(tmp_path, 1019) == 10, "the other one still has the pixels"
    assert names_of(tmp_path) == {"b"}
    assert clean_cache(tmp_path, 0) == 1010


def test_looking_changes_nothing(tmp_path: Path) -> None:
    folder = fake(tmp_path, "old", 10, 1e9)
    folder.with_name("old.use").unlink()
    os.utime(folder, (1e9, 1e9))
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*")}
    assert cache_report(tmp_path) == cache_report(tmp_path)
    assert {path: path.stat().st_mtime for path in tmp_path.rglob("*")} == before
    with pytest.raises(InputError):
        open_dataset(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere.use").exists()


def test_what_is_removed_while_one_opens_it_is_built_anew(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(spec(tree), tmp_path / "c")
    claim, left = cache_module.claim, [first.folder]

    def too_late(folder: Path) -> None:
        if left:  # another process was faster by a hair
            shutil.rmtree(left.pop())
        claim(folder)

    monkeypatch.setattr(cache_module, "claim", too_late)
    again = prepare(spec(tree), tmp_path / "c")
    assert not left
    assert open_dataset(again.folder, verify=True).fingerprint == first.fingerprint


def test_halves_of_other_sets_go_unless_their_builder_lives(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("dead-1.part", "alive-2.part", "bare-3.part", "x-4.gone-96"):
        (data / name).mkdir(parents=True)
        (data / name / "meta.json").write_text("half")
    (data / "dead-1.lock").touch()
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(data / "alive-2.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert cache_report(tmp_path) == []
        make_room(tmp_path, 1, 2, "images")
        assert {p.name for p in data.iterdir() if p.is_dir()} == {"alive-2.part"}
    finally:
        process.communicate("")
    clean_cache(tmp_path, 10**9)
    assert not [p for p in data.iterdir() if p.is_dir()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_is_refused_in_one_line(tree: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from nas.data import DataSpec, prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "try: prepare(DataSpec(sys.argv[1], img_size=16), Path(sys.argv[2]))\n"
        "except ValueError as error: print(error)\n"
    )
    cache = tmp_path / "c"
    for limit in (100, 20_000, 30_000):  # of 38,880 bytes of pixels
        done = subprocess.run(
            [sys.executable, "-c", code, str(tree), str(cache), str(limit)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.count("\n") == 1, done.stdout
        assert done.stdout.startswith("--cache-dir")
        assert not [p for p in (cache / "data").iterdir() if p.is_dir()]
