"""The cache of decoded data: what identifies it, what it shares, what stays and what goes first."""

from __future__ import annotations

import os
import pickle  # what a loader worker is sent; never written to a file
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nas.data import Dataset, DataSpec, open_dataset, prepare
from nas.data import cache as cache_module
from nas.data.cache import CAP_VARIABLE, cache_report, clean_cache, make_room, parse_bytes
from nas.data.pixels import relabelled
from nas.data.tables import KeyTable, NameTable
from space.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("train", "holdout", "test")


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


def by_key(dataset: Dataset) -> dict[str, bytes]:
    return {
        key: getattr(dataset, side).pixels[row].tobytes()
        for side in SIDES
        for row, key in enumerate(getattr(dataset, side).keys)
    }


def names_by_key(dataset: Dataset) -> dict[str, str]:
    return {
        key: getattr(dataset, side).names[row]
        for side in SIDES
        for row, key in enumerate(getattr(dataset, side).keys)
    }


def test_files_that_come_go_or_move_change_no_other_image(tree: Path, tmp_path: Path) -> None:
    first = prepare(spec(tree), tmp_path / "c")
    before, names = by_key(first), names_by_key(first)
    (tree / "a" / "00.png").rename(tree / "a" / "zz.png")
    (tree / "a" / "02.png").unlink()
    picture(tree / "b" / "new.png", 99)
    picture(tree / "b" / "01.png", 100)  # replaced
    second = prepare(spec(tree), tmp_path / "c")
    after, renamed = by_key(second), names_by_key(second)
    assert second.fingerprint != first.fingerprint
    assert second.preparation == first.preparation
    shared = set(before) & set(after)
    assert len(shared) == 38
    assert {k: before[k] for k in shared} == {k: after[k] for k in shared}
    moved = next(key for key, name in names.items() if name == "a/00.png")
    assert renamed[moved] == "a/zz.png"
    gone = {names[key] for key in set(before) - shared}
    assert gone == {"a/02.png", "b/01.png"}
    assert {renamed[key] for key in set(after) - shared} == {"b/new.png", "b/01.png"}
    assert (
        prepare(DataSpec(str(tree), img_size=20), tmp_path / "c").preparation != first.preparation
    )
    digits = prepare(DataSpec("digits", img_size=16, proxy_images=40), tmp_path / "c")
    assert digits.preparation != first.preparation


def test_renaming_changes_no_fingerprint(tree: Path, tmp_path: Path) -> None:
    first = prepare(spec(tree), tmp_path / "c")
    (tree / "a" / "00.png").rename(tree / "a" / "00x.png")
    assert prepare(spec(tree), tmp_path / "c").fingerprint == first.fingerprint


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
        assert np.array_equal(ours.pixels[:], theirs.pixels)
        assert np.array_equal(ours.pixels[1::2], theirs.pixels[1::2])
        rows = np.array([2, 0, 1])
        assert np.array_equal(ours.pixels[rows], theirs.pixels[rows])
        assert np.array_equal(ours.pixels[1], theirs.pixels[1])
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
        assert dataset.classes == ()
        assert dataset.num_classes == 0
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


def test_loose_images_beside_class_folders_are_left_out(tree: Path, tmp_path: Path) -> None:
    picture(tree / "loose.png", 77)
    dataset = prepare(spec(tree), tmp_path / "c")
    assert dataset.classes == ("a", "b")
    assert sum(len(getattr(dataset, side)) for side in SIDES) == 40
    assert any("1 images outside the class folders" in note for note in dataset.notes)


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


def fake(cache: Path, name: str, size: int, used: float) -> Path:
    folder = cache / "data" / name
    folder.mkdir(parents=True)
    (folder / "meta.json").write_bytes(b"x" * size)
    marker = folder.with_name(f"{name}.use")
    marker.touch()
    os.utime(marker, (used, used))
    return folder


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for turn in range(20):
        cache = tmp_path / str(turn)
        ages = rng.permutation(6)
        sizes = rng.integers(100, 1000, 6)
        now = time.time()
        for at in range(6):
            fake(cache, f"d{at}", int(sizes[at]), now - 1000 * int(ages[at]))
        keep = int(rng.integers(0, sizes.sum() + 100))
        oldest_first = np.argsort(-ages)
        expected, total = set(range(6)), int(sizes.sum())
        for at in oldest_first:
            if total <= keep:
                break
            expected.discard(int(at))
            total -= int(sizes[at])
        assert clean_cache(cache, keep) == int(sizes.sum()) - total
        left = {int(str(row["name"])[1:]) for row in cache_report(cache)}
        assert left == expected
        assert not list((cache / "data").glob("*.gone-*"))


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
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
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
    with pytest.raises(InputError, match="that are free on the cache's disk"):
        make_room(cache, need, 2 * need, "images")


def test_sizes_are_read_or_refused() -> None:
    assert [parse_bytes("x", text) for text in ("10", "1.5K", "2MB", "3g", "0")] == [
        10, 1500, 2_000_000, 3_000_000_000, 0,
    ]  # fmt: skip
    for text in ("", "x", "-1", "5X", "nanG", "1e40"):
        with pytest.raises(InputError, match="--keep"):
            parse_bytes("--keep", text)


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
