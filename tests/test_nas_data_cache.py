"""The cache of decoded data: what identifies a set, what sets share, what is removed first."""

from __future__ import annotations

import os
import pickle  # what a loader worker is sent; never written to a file
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nas.data import Dataset, DataSpec, open_dataset, prepare, relabelled
from nas.data import cache as cache_module
from nas.data.cache import CAP_VARIABLE, cache_report, clean_cache, hold, make_room, parse_bytes
from nas.data.dataset import KeyTable, NameTable
from space.errors import InputError

SIDES = ("train", "holdout", "test")
ROOT = Path(__file__).resolve().parent.parent


def picture(path: Path, seed: int, side: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for at in range(40):
        picture(tmp_path / "images" / "ab"[at % 2] / f"{at:02d}.png", at)
    return tmp_path / "images"


def spec(tree: Path, **changes: object) -> DataSpec:
    return DataSpec(str(tree), img_size=16, **changes)  # type: ignore[arg-type]


def by_key(dataset: Dataset) -> dict[str, tuple[bytes, str]]:
    splits = [getattr(dataset, side) for side in SIDES]
    return {key: (s.pixels[row].tobytes(), s.names[row]) for s in splits for row, key in enumerate(s.keys)}


def count(dataset: Dataset) -> int:
    return sum(len(getattr(dataset, side)) for side in SIDES)


def test_files_that_come_go_or_move_change_no_other_image(tree: Path, tmp_path: Path) -> None:
    first = prepare(spec(tree), tmp_path / "c")
    before = by_key(first)
    (tree / "a" / "00.png").rename(tree / "a" / "zz.png")
    (tree / "a" / "02.png").unlink()
    picture(tree / "b" / "new.png", 99)
    picture(tree / "b" / "01.png", 100)  # replaced
    second = prepare(spec(tree), tmp_path / "c")
    after = by_key(second)
    assert second.fingerprint != first.fingerprint
    assert second.preparation == first.preparation
    shared = set(before) & set(after)
    assert len(shared) == 38
    assert {k: before[k][0] for k in shared} == {k: after[k][0] for k in shared}
    moved = next(key for key, (_, name) in before.items() if name == "a/00.png")
    assert after[moved][1] == "a/zz.png"
    assert {before[key][1] for key in set(before) - shared} == {"a/02.png", "b/01.png"}
    assert {after[key][1] for key in set(after) - shared} == {"b/new.png", "b/01.png"}
    assert prepare(DataSpec(str(tree), img_size=20), tmp_path / "c").preparation != first.preparation
    digits = prepare(DataSpec("digits", img_size=16, max_images=40), tmp_path / "c")
    assert digits.preparation != first.preparation


def test_decoding_as_one_goes_gives_the_cached_bits(tree: Path, tmp_path: Path) -> None:
    kept = prepare(spec(tree), tmp_path / "c")
    lazy = prepare(spec(tree, pixel_cache=False), tmp_path / "c")
    assert lazy.fingerprint == kept.fingerprint
    assert lazy.preparation == kept.preparation
    assert not (lazy.folder / "train.npy").exists()
    for side in SIDES:
        ours, theirs = getattr(lazy, side), getattr(kept, side)
        assert ours.keys == theirs.keys
        assert ours.pixels.shape == theirs.pixels.shape
        assert np.array_equal(np.asarray(ours.pixels), theirs.pixels)
    rng = np.random.default_rng(0)
    n, lazily, mapped = len(lazy.train), lazy.train.pixels, kept.train.pixels
    for _ in range(20):
        a, b = sorted(rng.integers(-n, n + 1, 2).tolist())
        for index in (
            slice(a, b),
            slice(b, a, -1),
            rng.integers(-n, n, 5),
            rng.random(n) < 0.2,
            np.array([], dtype=np.int64),
            [],
            int(rng.integers(-n, n)),
        ):
            assert np.array_equal(lazily[index], mapped[index]), index
            assert lazily[index].dtype == np.uint8
    for wrong in ([n], -n - 1, n, (0, 0), [[0]], [True], [0.5]):
        with pytest.raises(IndexError):
            lazily[wrong]
    sent = pickle.dumps(lazy.train.pixels)
    assert len(sent) < 1000 + 3 * len(str(tmp_path))
    assert np.array_equal(pickle.loads(sent)[:], kept.train.pixels)


def test_a_file_that_left_or_changed_is_noticed_when_it_is_read(tree: Path, tmp_path: Path) -> None:
    lazy = prepare(spec(tree, pixel_cache=False), tmp_path / "c")
    first, second, third = (tree / lazy.train.names[row] for row in range(3))
    picture(first, 1234)
    second.unlink()
    third.write_bytes(third.read_bytes()[:50])
    for row, said in (
        (0, "with another content"),
        (1, "FileNotFoundError"),
        (2, "instead|cannot|truncated|another|identify|Error"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            lazy.train.pixels[row]
        assert lazy.train.names[row] in str(caught.value)
        assert "\n" not in str(caught.value)
    lazy.train.pixels[3]


def test_what_is_kept_anyway_is_told_and_not_stored(tmp_path: Path) -> None:
    asked = DataSpec("digits", img_size=16, max_images=40, pixel_cache=False)
    told = prepare(asked, tmp_path)
    assert any("kept all the same" in note for note in told.notes)
    plain = prepare(DataSpec("digits", img_size=16, max_images=40), tmp_path)
    assert plain.folder == told.folder
    assert plain.notes == open_dataset(told.folder).notes == ()
    assert isinstance(told.train.pixels, np.memmap)


def loose(root: Path, count: int) -> Path:
    for at in range(count):
        picture(root / f"{at:02d}.png", at)
    return root


def test_images_without_class_folders_are_a_set_without_ground_truth(tmp_path: Path) -> None:
    one = prepare(spec(loose(tmp_path / "one", 30)), tmp_path / "c")
    loose(tmp_path / "two" / "train", 20)
    for at in range(6):
        picture(tmp_path / "two" / "val" / f"{at}.png", 100 + at)
    two = prepare(spec(tmp_path / "two"), tmp_path / "c")
    assert len(two.test) == 6
    for dataset in (one, two):
        assert not dataset.labelled
        assert any("without ground truth" in note for note in dataset.notes)
        for side in SIDES:
            split = getattr(dataset, side)
            assert len(split) > 0
            assert set(split.labels.tolist()) == {-1}
    with pytest.raises(InputError, match="2 images, want at least 3"):
        prepare(spec(loose(tmp_path / "few", 2)), tmp_path / "c")
    picture(tmp_path / "two" / "train" / "a" / "x.png", 1)
    with pytest.raises(InputError, match="one class only"):
        prepare(spec(tmp_path / "two"), tmp_path / "c")
    shutil.rmtree(tmp_path / "two" / "train" / "a")
    picture(tmp_path / "two" / "val" / "a" / "x.png", 1)
    with pytest.raises(InputError, match="class folders in val/ but none in train/"):
        prepare(spec(tmp_path / "two"), tmp_path / "c")
    shutil.rmtree(tmp_path / "two" / "val")
    inner = prepare(spec(tmp_path / "two"), tmp_path / "c")
    assert count(inner) == 20
    for at in range(4):
        picture(tmp_path / "same" / f"{at}.png", 0)
    with pytest.raises(InputError, match="1 images without copies"):
        prepare(spec(tmp_path / "same"), tmp_path / "c")


def test_train_may_be_the_name_of_a_class(tmp_path: Path) -> None:
    for at in range(18):
        picture(tmp_path / "images" / ("bus", "car", "train")[at % 3] / f"{at}.png", at)
    dataset = prepare(spec(tmp_path / "images"), tmp_path / "c")
    assert dataset.classes == ("bus", "car", "train")


def test_loose_images_beside_class_folders_are_left_out(tree: Path, tmp_path: Path) -> None:
    picture(tree / "loose.png", 77)
    dataset = prepare(spec(tree), tmp_path / "c")
    assert dataset.classes == ("a", "b")
    assert count(dataset) == 40
    assert any("1 loose image outside the class folders" in note for note in dataset.notes)
    for at in range(12):
        picture(tree / "train" / "ab"[at % 2] / f"{at}.png", at)
        picture(tree / "val" / "ab"[at % 2] / f"{at}.png", 50 + at)
    picture(tree / "train" / "x.png", 1)
    picture(tree / "val" / "x.png", 2)
    split = prepare(spec(tree), tmp_path / "c")
    assert count(split) == 24
    assert any("3 loose images outside the class folders" in note for note in split.notes)


def test_other_labels_share_the_pixels_and_are_found_again(tmp_path: Path) -> None:
    dataset = prepare(spec(loose(tmp_path / "one", 30)), tmp_path / "c")
    rng = np.random.default_rng(0)
    labels = {side: rng.integers(0, 7, len(getattr(dataset, side))) for side in SIDES}
    named = relabelled(dataset, tmp_path / "c", labels, tuple("abcdefg"), "teacher@1")
    assert named.labelled
    assert named.labelled_by == "teacher@1"
    assert named.preparation == dataset.preparation
    assert named.fingerprint != dataset.fingerprint
    for side in SIDES:
        assert np.array_equal(getattr(named, side).labels, labels[side])
        assert getattr(named, side).keys == getattr(dataset, side).keys
    for name in ("train.npy", "train.keys.npy", "train.names.npy"):
        assert os.path.samefile(named.folder / name, dataset.folder / name)
    stamp = (named.folder / "meta.json").stat().st_mtime_ns
    again = relabelled(dataset, tmp_path / "c", labels, tuple("abcdefg"), "teacher@1")
    assert (again.folder, (again.folder / "meta.json").stat().st_mtime_ns) == (named.folder, stamp)
    other = relabelled(dataset, tmp_path / "c", labels, tuple("abcdefg"), "teacher@2")
    assert other.folder != named.folder
    open_dataset(named.folder, verify=True)
    open_dataset(dataset.folder, verify=True)


def test_other_labels_follow_the_files_that_are_there_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spec(loose(tmp_path / "one", 20), pixel_cache=False)
    first = prepare(asked, tmp_path / "c")
    labels = {side: np.zeros(len(getattr(first, side)), dtype=np.int64) for side in SIDES}
    before = relabelled(first, tmp_path / "c", labels, ("x", "y"), "t")
    (tmp_path / "one" / first.train.names[0]).rename(tmp_path / "one" / "other.png")
    second = prepare(asked, tmp_path / "c")
    assert second.fingerprint == first.fingerprint
    after = relabelled(second, tmp_path / "c", labels, ("x", "y"), "t")
    assert after.fingerprint == before.fingerprint, "names are no part of it"
    kept = prepare(spec(tmp_path / "one"), tmp_path / "c")
    assert np.array_equal(after.train.pixels[:], kept.train.pixels)
    with_pixels = relabelled(kept, tmp_path / "c", labels, ("x", "y"), "t")
    assert isinstance(with_pixels.train.pixels, np.memmap), "what was kept stays kept"

    def no_links(path: object, to: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    copied = relabelled(kept, tmp_path / "new cache", labels, ("x", "y"), "t")
    assert not os.path.samefile(copied.folder / "train.npy", kept.folder / "train.npy")
    assert open_dataset(copied.folder, verify=True).fingerprint == with_pixels.fingerprint
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--cache-dir"):
        relabelled(kept, tmp_path / "file", labels, ("x", "y"), "t")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=20))
def test_tables_of_names_are_lists_of_strings(names: list[str]) -> None:
    names = [name.encode("utf-8", "replace").decode() for name in names]
    table = NameTable.of(names)
    assert list(table) == names
    assert table[::-1] == names[::-1]
    if names:
        assert table[-1] == names[-1]
    with pytest.raises(IndexError):
        table[len(names)]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20))
def test_tables_of_keys_are_lists_of_hex(raw: list[bytes]) -> None:
    keys = [one.hex() for one in raw]
    table = KeyTable.of(keys)
    assert list(table) == keys
    assert table == keys
    assert list(table[::-1]) == keys[::-1]
    assert all(table[at] == keys[at] for at in range(len(keys)))
    assert (table == [*keys, "00" * 16]) is False


# What the cache may hold


def fake(cache: Path, name: str, size: int, used: float) -> Path:
    folder = cache / "data" / name
    folder.mkdir(parents=True)
    (folder / "meta.json").write_bytes(b"x" * size)
    marker = folder.with_name(f"{name}.use")
    marker.touch()
    os.utime(marker, (used, used))
    return folder


@contextmanager
def another_process(code: str, path: Path) -> Iterator[None]:
    """Keep a process alive that has run `code` on a path."""
    command = [sys.executable, "-c", f"import sys; {code}; print(flush=True); sys.stdin.read()", path]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        yield
    finally:
        process.communicate("")


def test_what_a_living_process_uses_stays(tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    dataset = prepare(spec(tree), cache)
    other = tmp_path / "copy"
    shutil.copytree(cache, other)
    opening = "from nas.data import open_dataset; held = open_dataset(sys.argv[1])"
    with another_process(opening, other / "data" / dataset.folder.name):
        assert [row["in_use"] for row in cache_report(other)] == [True]
        assert clean_cache(other, 0) == 0
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
    assert names_of(cache) & {"old", "new"} == {"new"}
    monkeypatch.setenv(CAP_VARIABLE, str(need - 1))
    with pytest.raises(InputError, match=r"--no-pixel-cache, or raise VISION_CONTRACTION_CACHE_CAP"):
        prepare(spec(tree, random_seed=1), cache)
    prepare(spec(tree, random_seed=1, pixel_cache=False), cache)
    monkeypatch.delenv(CAP_VARIABLE)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="that can be freed on the cache's disk"):
        make_room(cache, need, 2 * need, "images")


def test_sizes_are_read_or_refused() -> None:
    sizes = {"10": 10, "1.5K": 1500, "2MB": 2_000_000, "3g": 3_000_000_000, "0": 0}
    assert {text: parse_bytes("x", text) for text in sizes} == sizes
    for text in ("", "x", "-1", "5X", "nanG", "1e40"):
        with pytest.raises(InputError, match="--keep"):
            parse_bytes("--keep", text)


def names_of(cache: Path) -> set[str]:
    return {str(row["name"]) for row in cache_report(cache)}


def test_room_is_made_as_a_list_of_ages_would_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least recently used first, no more than needed, nothing in use; nothing if it is no use."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(cache_module, "_SPARE", 0)
    refused = 0
    for turn in range(60):
        cache = tmp_path / str(turn)
        ages, sizes, busy = rng.permutation(5), rng.integers(100, 1000, 5), rng.random(5) < 0.3
        folders = [fake(cache, f"d{at}", int(sizes[at]), time.time() - 1000 * int(ages[at])) for at in range(5)]
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
            with pytest.raises(InputError, match=r"at most .* GB.*--no-pixel-cache"):
                make_room(cache, need, 2 * need, "images")
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
    locking = "from filelock import FileLock; held = FileLock(sys.argv[1]).acquire()"
    with another_process(locking, data / "alive-2.lock"):
        assert cache_report(tmp_path) == []
        make_room(tmp_path, 1, 2, "images")
        assert {p.name for p in data.iterdir() if p.is_dir()} == {"alive-2.part"}
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
        command = [sys.executable, "-c", code, str(tree), str(cache), str(limit)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.count("\n") == 1, done.stdout
        assert done.stdout.startswith("--cache-dir")
        assert not [p for p in (cache / "data").iterdir() if p.is_dir()]
