"""Whatever lies in an image folder is read as Pillow reads its plain equivalent, or is broken."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin, features

from nas.core.data_config import GREY_BITS
from nas.data import Dataset, DataSpec, prepare
from nas.data.decode import (
    MOST_PIXELS,
    as_rgb,
    deep_grey,
    fitted,
    header_size,
    read_image,
    shown_name,
    store_size_of,
    why_broken,
)
from nas.export.hub import USAGE
from nas.export.onnx import RECIPE
from space.errors import InputError
from tests.test_nas_data_folders import tree

SIZE = 32
STORE = store_size_of(SIZE)
RNG = np.random.default_rng(3)
RGB = RNG.integers(0, 256, (41, 57, 3), dtype=np.uint8)


def ready(root: Path, tmp_path: Path, **changes: object) -> Dataset:
    spec = {"img_size": SIZE, "max_corrupt": 1.0, **changes}
    return prepare(DataSpec(str(root), **spec), tmp_path / "cache")  # type: ignore[arg-type]


def naive(rgb: Image.Image) -> np.ndarray:
    """Resize the shorter side and cut the middle, with Pillow alone."""
    wide, high = rgb.size
    scale = STORE / min(wide, high)
    other = int(scale * max(wide, high))
    size = (STORE, other) if wide <= high else (other, STORE)
    resized = rgb.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - STORE) // 2 for side in size)
    # Which of two middles is cut is told by tests/test_nas_data_folders.py; here either may be.
    return np.asarray(resized.crop((left, top, left + STORE, top + STORE)))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(depth: int, colour: int, rows: bytes, wide: int, high: int) -> bytes:
    """Write a PNG by hand: Pillow writes no 16-bit colour, and no image that is a bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", wide, high, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_rgb() -> bytes:
    lines = [b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in RGB]
    return png(16, 2, b"".join(lines), 57, 41)


def gif(frames: int) -> bytes:
    pictures = [Image.fromarray(np.roll(RGB, at * 7, 0)).quantize(64) for at in range(frames)]
    return saved(pictures[0], "GIF", save_all=True, append_images=pictures[1:])


GREY = RGB[..., 0]
DEEP = GREY.astype(np.uint16) * 257
GREYS = Image.fromarray(GREY).convert("RGB")
COLOURS = Image.fromarray(RGB)
CMYK = COLOURS.convert("CMYK")
PALETTE = COLOURS.quantize(100)
TWELVE = np.minimum(GREY.astype(np.uint16) * 16 + GREY // 16, 4095)
TWELVE_GREYS = Image.fromarray(np.round(TWELVE / 4095 * 255).astype(np.uint8)).convert("RGB")
TURNED = Image.Exif()
TURNED[0x0112] = 6

KINDS: dict[str, tuple[Callable[[], bytes], Callable[[], Image.Image]]] = {
    "deep.png": (lambda: saved(Image.fromarray(DEEP), "PNG"), lambda: GREYS),
    "deep.tif": (lambda: saved(Image.fromarray(DEEP), "TIFF"), lambda: GREYS),
    "deep-big.tiff": (lambda: saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), lambda: GREYS),
    "deep.pgm": (lambda: saved(Image.fromarray(DEEP), "PPM"), lambda: GREYS),
    "deep-colour.png": (deep_rgb, lambda: COLOURS),
    "cmyk.tiff": (lambda: saved(CMYK, "TIFF"), lambda: CMYK.convert("RGB")),
    "cmyk.jpg": (lambda: saved(CMYK, "JPEG"), lambda: Image.open(io.BytesIO(saved(CMYK, "JPEG"))).convert("RGB")),
    "still.gif": (lambda: gif(1), lambda: Image.open(io.BytesIO(gif(1))).convert("RGB")),
    "animated.gif": (lambda: gif(4), lambda: Image.open(io.BytesIO(gif(1))).convert("RGB")),
    "animated.webp": (
        lambda: saved(COLOURS, "WEBP", save_all=True, lossless=True, append_images=[Image.fromarray(255 - RGB)]),
        lambda: COLOURS,
    ),
    "dot.png": (
        lambda: saved(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
        lambda: Image.new("RGB", (STORE, STORE), (9, 99, 199)),
    ),
    "liar.jpg": (lambda: saved(COLOURS, "PNG"), lambda: COLOURS),
    "liar.gif": (lambda: saved(COLOURS, "BMP"), lambda: COLOURS),
    "turned.png": (lambda: saved(COLOURS, "PNG", exif=TURNED), lambda: COLOURS.transpose(Image.Transpose.ROTATE_270)),
    "turned.tif": (lambda: saved(COLOURS, "TIFF", exif=TURNED), lambda: COLOURS.transpose(Image.Transpose.ROTATE_270)),
    "turned-grey.tif": (
        lambda: saved(Image.fromarray(GREY), "TIFF", exif=TURNED),
        lambda: GREYS.transpose(Image.Transpose.ROTATE_270),
    ),
    "turned-deep.tif": (
        lambda: saved(Image.fromarray(DEEP), "TIFF", exif=TURNED),
        lambda: GREYS.transpose(Image.Transpose.ROTATE_270),
    ),
    "turned.webp": (
        lambda: saved(COLOURS, "WEBP", lossless=True, exif=TURNED),
        lambda: COLOURS.transpose(Image.Transpose.ROTATE_270),
    ),
    "damaged-exif.png": (lambda: saved(COLOURS, "PNG", exif=b"Exif\0\0MM\0*\xff"), lambda: COLOURS),
    "twelve-in-sixteen.png": (lambda: saved(Image.fromarray(TWELVE), "PNG"), lambda: TWELVE_GREYS),
    "int32.tif": (lambda: saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), lambda: GREYS),
    "wide-int.tif": (lambda: saved(Image.fromarray(DEEP.astype(np.int32) * 0x100 + GREY), "TIFF"), lambda: GREYS),
    "frames.jfif": (lambda: saved(GREYS, "PNG"), lambda: GREYS),
    "lossless.jp2": (lambda: saved(COLOURS, "JPEG2000"), lambda: COLOURS),
    "old.tga": (lambda: saved(COLOURS, "TGA"), lambda: COLOURS),
    "small.qoi": (lambda: saved(COLOURS, "QOI"), lambda: COLOURS),
    "grey-alpha.png": (lambda: saved(Image.fromarray(GREY).convert("LA"), "PNG"), lambda: GREYS),
    "palette.png": (lambda: saved(PALETTE, "PNG", transparency=bytes(range(100))), lambda: PALETTE.convert("RGB")),
    "clear.png": (lambda: saved(Image.fromarray(np.dstack([RGB, GREY])), "PNG"), lambda: COLOURS),
    "bit.png": (
        lambda: saved(Image.fromarray(GREY > 99), "PNG"),
        lambda: Image.fromarray(np.where(GREY > 99, 255, 0).astype(np.uint8)).convert("RGB"),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_its_plain_equivalent(name: str, tmp_path: Path) -> None:
    if name.endswith(".webp") and not features.check("webp"):
        pytest.skip("this Pillow reads no WebP")
    made, equal = KINDS[name]
    path = tmp_path / name
    path.write_bytes(made())
    plain = equal()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the folder's reader leaves out Pillow's remarks
        key, pixels = read_image(path, SIZE, STORE, deep_grey(path) or GREY_BITS)
    assert np.array_equal(pixels, fitted(plain, SIZE, STORE))
    assert abs(pixels.mean() - naive(plain).mean()) < 3.0  # no clipping, no other picture
    assert len(key) == 32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"damaged-exif.png"}))  # Pillow alone stops there
def test_the_lines_that_we_print_read_every_kind_as_we_do(name: str, tmp_path: Path) -> None:
    """Of the ONNX recipe and the model card, those from a file to RGB; Pillow reads some files otherwise by path."""
    path = tmp_path / name
    path.write_bytes(KINDS[name][0]())
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        own = np.asarray(as_rgb(image, 16))
    for code, end in ((RECIPE, "image = image.resize"), (USAGE, "model =")):
        lines = "image = ImageOps" + code.replace("{white}", "65535").partition(end)[0].partition("image = ImageOps")[2]
        names: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps, "path": str(path), "white": 65535}
        exec(lines.replace('"photo.jpg"', "path"), names)
        assert np.array_equal(np.asarray(names["image"].convert("RGB")), own)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 0xFFFF), min_size=4, max_size=16),
    st.sampled_from(["PNG", "TIFF"]),
    st.sampled_from([8, 12, 16, 20]),
)
def test_more_bits_are_scaled_by_one_white_for_all(values: list[int], kind: str, bits: int) -> None:
    data = np.array(values, dtype=np.uint16).reshape(1, -1)
    image = Image.open(io.BytesIO(saved(Image.fromarray(data), kind)))
    found = np.asarray(as_rgb(image, bits))[0, :, 0]
    white = 2**bits - 1
    assert np.abs(found.astype(int) - np.minimum(data[0].astype(int), white) / white * 255).max() <= 0.5
    order = np.argsort(data[0], kind="stable")
    assert (np.diff(found[order].astype(int)) >= 0).all()


@pytest.mark.parametrize(("top", "bits"), [(200, 8), (4000, 12), (60_000, 16)])
@pytest.mark.parametrize("pixel_cache", [True, False])
def test_a_dark_picture_stays_dark_beside_the_brightest_of_its_set(
    top: int, bits: int, pixel_cache: bool, tmp_path: Path
) -> None:
    def level(number: int) -> int:
        return top if number == 11 else 10 + number * (top - 20) // 40  # one is far brighter than the others

    for number in range(12):
        path = tmp_path / "d" / "ab"[number % 2] / f"{number}.{('png', 'tif')[number % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20), level(number), dtype=np.uint16)).save(path)
    spec = DataSpec(str(tmp_path / "d"), img_size=16, pixel_cache=pixel_cache, max_corrupt=0.0)
    wider = {8: 9, 12: 14, 16: 18}[bits]
    for asked, used in ((None, bits), (wider, wider)):
        found = prepare(replace(spec, grey_bits=asked), tmp_path / "cache")
        assert found.grey_bits == used
        assert any(f"white is {2**used - 1:,}" in note for note in found.notes)
        for split in (found.train, found.holdout, found.test):
            for name, pixels in zip(split.names, split.pixels[:], strict=True):
                want = min(255.0, level(int(Path(name).stem)) * 255 / (2**used - 1))
                assert abs(float(pixels[8, 8, 0]) - want) <= 0.5


def huge(wide: int, high: int) -> bytes:
    return png(1, 0, b"\0" * 10_000, wide, high)


def wordy() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 10), zip=True)
    return saved(COLOURS, "PNG", pnginfo=info)


BROKEN: dict[str, Callable[[], bytes]] = {
    "huge-text.png": wordy,
    "empty.png": lambda: b"",
    "text.jpg": lambda: b"no image, but words\n" * 50,
    "cut.png": lambda: saved(COLOURS, "PNG")[:-900],
    "cut.jpg": lambda: saved(COLOURS, "JPEG")[:400],
    "head.webp": lambda: b"RIFF\x20\0\0\0WEBPVP8 ",
    "bomb.png": lambda: huge(30_000, 30_000),
    "just-too-large.png": lambda: huge(MOST_PIXELS // 1000 + 1, 1000),
    "monster.png": lambda: huge(2**31 - 1, 2**31 - 1),
    "sliver.png": lambda: saved(Image.new("RGB", (900, 3)), "PNG"),
    "float.tiff": lambda: saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "negative.tiff": lambda: saved(Image.fromarray(GREY.astype(np.int32) - 100), "TIFF"),
    # Pillow would have Ghostscript run it.
    "script.jpg": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_counted_as_broken_with_its_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "d", each=6)
    (root / "a" / name).write_bytes(BROKEN[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = ready(root, tmp_path)
        ready(root, tmp_path, img_size=None)
    assert dataset.broken == (f"a/{name}",)
    (note,) = [n for n in dataset.notes if "broken" in n]
    assert note.startswith(f"1 broken images left out, e.g. a/{name} (")
    assert len(note) > len(f"1 broken images left out, e.g. a/{name} ()")
    assert "\n" not in note
    if "bomb" in name or "large" in name:
        assert "pixels are too many" in note
    with pytest.raises(InputError, match=r"1 broken images of 19, e.g. a/.* \(.+\)"):
        ready(root, tmp_path, max_corrupt=0.0)
    assert capsys.readouterr().err == ""


def test_endings_that_name_other_things_too_are_judged_by_content(tmp_path: Path) -> None:
    """Point clouds, raw pixels and logs beside the images are no broken images."""
    root = tree(tmp_path / "d", each=6)
    for at, name in enumerate(("cloud.pcd", "raw.rgb", "notes.im", "grid.ras", "layers.psd", "mask.xpm")):
        (root / "a" / name).write_bytes(b"# .PCD v0.7 - no image")
        (root / "b" / name).write_bytes(saved(Image.fromarray(np.roll(RGB, at + 1, 0)), "PNG"))
    found = ready(root, tmp_path, max_corrupt=0.0)
    assert len(found.train) + len(found.holdout) + len(found.test) == 18 + 6
    assert any(all(ending in note for ending in (".pcd", ".rgb", ".im", ".ras")) for note in found.notes)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_a_picture_in_its_transparency_alone_is_broken_and_a_blank_one_is_not(mode: str, tmp_path: Path) -> None:
    shape = Image.fromarray(RGB[:, :, 0])
    for name, alpha in (("shape", shape), ("blank", Image.new("L", shape.size, 7))):
        picture = Image.new("LA", shape.size)
        picture.putalpha(alpha)
        if mode == "P":
            picture = picture.convert("RGBA").quantize(64, method=Image.Quantize.FASTOCTREE)
        picture.convert(mode).save(tmp_path / f"{name}.png")
    read_image(tmp_path / "blank.png", SIZE, STORE)
    with pytest.raises(ValueError, match="transparency alone"):
        read_image(tmp_path / "shape.png", SIZE, STORE)


def test_a_bomb_is_refused_by_its_header_alone(tmp_path: Path) -> None:
    """No pixel is decoded, whatever limit somebody gave Pillow."""
    path = tmp_path / "bomb.png"
    path.write_bytes(huge(30_000, 30_000))
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with pytest.raises(ValueError, match="30000x30000 pixels are too many"):
            read_image(path, SIZE, STORE)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_pipes_links_in_circles_and_devices_are_broken_and_waited_for_by_nobody(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", each=6)
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "circle.png").symlink_to("circle.png")
    (root / "b" / "gone.png").symlink_to("nowhere.png")
    (root / "b" / "zero.png").symlink_to("/dev/zero")
    (root / "c" / "up").symlink_to(root, target_is_directory=True)
    (root / "again").symlink_to(root, target_is_directory=True)
    dataset = ready(root, tmp_path, img_size=None)
    names = ("a/circle.png", "a/pipe.png", "b/gone.png", "b/zero.png")
    assert tuple(sorted(dataset.broken)) == names
    assert dataset.classes == ("a", "b", "c")
    assert header_size(root / "a" / "pipe.png") is None


ODD = ["=1+1.png", "zwei\nZeilen.png", "Ünïcödé 漢字.png", "-x.png", "tab\there.png", b"\xff.png"]


def test_odd_names_are_read_and_told_on_one_line(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", each=6)
    for name in ODD:
        path = os.path.join(os.fsencode(root / "a"), os.fsencode(name))
        with open(path, "wb") as file:
            file.write(saved(Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8)), "PNG"))
    kept = ready(root, tmp_path)
    assert kept.broken == ()
    sides = (kept.train, kept.holdout, kept.test)
    found = {name for side in sides for name in side.names}
    assert {os.fsdecode(name) for name in ODD} <= {name.removeprefix("a/") for name in found}
    for name in ODD:
        with open(os.path.join(os.fsencode(root / "a"), os.fsencode(name)), "wb"):
            pass
    broken = ready(root, tmp_path)
    assert len(broken.broken) == len(ODD)
    told = "".join(broken.notes)
    assert told.isprintable()
    told.encode("utf-8")


@given(st.text())
def test_a_shown_name_is_one_printable_line(name: str) -> None:
    assert shown_name(name).isprintable()
    shown_name(name).encode("utf-8")
    if name.isprintable():
        assert shown_name(name) == name


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "d")
    os.mkdir(os.path.join(os.fsencode(root), b"\xffclass"))
    with pytest.raises(InputError, match="want names in UTF-8; rename it"):
        ready(root, tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_a_damaged_image_is_read_or_broken_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    raw = bytearray(KINDS[name][0]())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "drop"]))
        if how == "flip":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del raw[max(1, at) :]
        else:
            del raw[at : at + data.draw(st.integers(1, 40))]
        if not raw:
            raw = bytearray(b"\0")
    path = tmp_path_factory.mktemp("i") / name
    path.write_bytes(bytes(raw))
    shape, why = None, "nothing"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape = read_image(path, SIZE, STORE)[1].shape
    except Exception as error:  # whatever it is, the folder's reader counts it
        why = why_broken(error)
    assert shape in (None, (STORE, STORE, 3))
    assert why
    assert "\n" not in why
