"""`python -m benchmarks.throughput` measures what it was given, and says no in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks.throughput.__main__ import main
from benchmarks.throughput.networks import find_nets
from nas.measure.device_table import COLUMNS, FAILED, OK, DeviceRow, read_rows, write_rows
from nas.measure.runtimes import runtimes
from space import Context, get_family

FAMILY = get_family("tinyvit")
CTX, MADE = Context(img_size=32, num_classes=4), Context(img_size=48, num_classes=10)
FACTORS = {
    "embed_dims": [32, 32, 32, 32],
    "depths": [1, 1, 1, 1],
    "window_sizes": [7, 14, 7],
    "mbconv_expand_ratio": 2.0,
    "mlp_ratio": 2.0,
    "head_dim": 16,
}
SMALL = json.dumps(FACTORS)
LARGE = json.dumps({**FACTORS, "embed_dims": [32, 64, 64, 64]}, indent=1)
QUICK = [
    *("--img-size", "32", "--num-classes", "4", "--batch", "2", "--threads", "1", "--visits", "4"),
    *("--max-visits", "4", "--precision", "0", "--latency-passes", "10", "--no-memory"),
]


def run(*flags: str) -> int:
    return main([*flags, "--quiet"])


def refused(capsys: pytest.CaptureFixture[str], says: str) -> None:
    """Check that the last call printed one line, on standard error, that says this."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert says in said.err
    assert "Traceback" not in said.err


def check_row(row: DeviceRow, factors: str, reference: str) -> None:
    """Check that a row is of an arch, measured, in 4 visits beside a reference."""
    arch = FAMILY.arch(json.loads(factors))
    assert row.state == OK, row.reason
    assert (row.family, row.key) == ("tinyvit", FAMILY.key(arch, CTX))
    assert json.loads(row.spec) == FAMILY.to_dict(arch)
    assert (row.params, row.macs) == (FAMILY.count_params(arch, CTX), FAMILY.count_macs(arch, CTX))
    assert (row.reference, row.measured.visits) == (reference, 4)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DeviceRow]]:
    """Two archs in a runtime that is here and one that is not.

    `best.json` was made for 10 classes at 48 px; elsewhere its arch counts, without weights.
    """
    folder = tmp_path_factory.mktemp("bench")
    best = {"arch": FACTORS, "timm": {}, "img_size": 48, "num_classes": 10}
    (folder / "best.json").write_text(json.dumps(best))
    save_file(FAMILY.build(FAMILY.arch(FACTORS), MADE).state_dict(), folder / "best.safetensors")
    out = folder / "t.csv"
    flags = ["--arch", str(folder / "best.json"), LARGE, "--reference", SMALL, *QUICK]
    assert run(*flags, "--runtime", "eager", "tensorrt", "--out", str(out)) == 0
    return out, read_rows(out, "--out")


def test_one_row_a_network_and_setting(measured: tuple[Path, list[DeviceRow]]) -> None:
    """Names exactly as given, in the order given; counts are the family's; a figure beside it."""
    out, rows = measured
    assert out.read_text().splitlines()[0].split(",") == list(COLUMNS)
    names = [str(out.with_name("best.json")), LARGE]
    expected = [(name, runtime) for runtime in ("eager", "tensorrt") for name in names]
    assert [(r.arch, r.setting.runtime) for r in rows] == expected
    for row, factors in zip(rows[:2], (SMALL, LARGE), strict=True):
        check_row(row, factors, f"{SMALL}@cpu:eager:float32:b2")
        found = row.measured
        assert (row.threads, row.setting.batch, row.img_size, found.agrees) == (1, 2, 32, 1)
        assert (row.latency_passes or 0) >= 10
        assert 0 < (found.latency_ms_p50 or 0) <= (found.latency_ms_p90 or 0)
        assert found.peak_mem_bytes is None
    assert rows[0].fingerprint == rows[1].fingerprint
    ratio, lo, hi = rows[1].measured.interval("speedup")
    assert 0 < lo <= ratio <= hi
    assert out.with_suffix(".png").stat().st_size > 1000


def test_weights_are_those_of_the_context_they_were_trained_in(measured: tuple[Path, list[DeviceRow]]) -> None:
    best = measured[0].with_name("best.json")
    (net,) = find_nets([str(best)], FAMILY)
    assert net.spec(MADE).weights == best.with_suffix(".safetensors")
    assert net.spec(CTX).weights is None


def test_a_runtime_that_is_missing_is_a_row_with_its_remedy(measured: tuple[Path, list[DeviceRow]]) -> None:
    if not runtimes()["tensorrt"].missing():
        pytest.skip("TensorRT is installed")
    for row in measured[1][2:]:
        assert (row.state, row.throughput) == (FAILED, None)
        assert "pip install tensorrt" in row.reason


def test_what_a_runtime_does_not_serve_is_a_row(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    flags = ["--arch", SMALL, "--reference", "none", "--runtime", "onnxruntime", "--dtype", "float16", *QUICK]
    assert run(*flags, "--out", str(out)) == 0
    (row,) = read_rows(out, "--out")
    assert row.state == FAILED
    assert "want a dtype of float32" in row.reason


def test_resuming_takes_rows_over_and_ends_with_one_line(
    measured: tuple[Path, list[DeviceRow]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is not measured again; what is missing is, and weighed: its weights count."""
    before = measured[1]
    kept = replace(before[1], arch=SMALL, throughput=replace(before[1].measured, when="a sentinel"))
    out = tmp_path / "t.csv"
    write_rows(out, [kept])
    flags = ["--arch", SMALL, "mobilenetv3_small_050", "--reference", SMALL, *QUICK[:-1]]
    capsys.readouterr()
    figure = str(tmp_path / "f.svg")
    assert run(*flags, "--out", str(out), "--resume", "--figure", figure) == 0
    (line,) = capsys.readouterr().out.splitlines()
    rows = read_rows(out, "--out")
    fingerprints = sorted({r.fingerprint for r in rows})
    expected = {"rows": 2, "failed": 0, "fingerprints": fingerprints, "out": str(out), "figure": figure}
    assert json.loads(line) == expected
    assert rows[0] == kept
    assert (rows[1].family, rows[1].key, rows[1].spec) == ("timm", rows[1].arch, "")
    assert rows[1].params is not None
    assert rows[1].macs is not None
    assert 4 * rows[1].params <= (rows[1].measured.peak_mem_bytes or 0) < 2e9


BAD: list[tuple[Sequence[str], str]] = [
    (["--runtime", "tensorflow"], "--runtime"),
    (["--reference-runtime", "tensorflow"], "--reference-runtime"),
    (["--arch", '{"embed_dims": [1]}'], ""),
    (["--arch", json.dumps({**FACTORS, "head_dim": 24})], "head_dim"),
    (["--arch", "{"], "--arch"),
    (["--arch", "[]"], "--arch"),
    (["--arch", "none.json"], "none.json"),
    (["--arch", "3M"], "--arch"),
    (["--arch", SMALL, SMALL], "--arch"),
    (["--batch", "0"], "--batch"),
    (["--batch", "two"], "--batch"),
    (["--batch", "auto", "2"], "--batch"),
    (["--dtype", "int8"], "--dtype"),
    (["--device", "tpu"], "device"),
    (["--img-size", "0"], "--img-size"),
    (["--num-classes", "0"], "--num-classes"),
    (["--threads", "0"], "--threads"),
    (["--visits", "3"], "--visits"),
    (["--visits", "8", "--max-visits", "7"], "--max-visits"),
    (["--precision", "1"], "--precision"),
    (["--precision", "nan"], "--precision"),
    (["--latency-passes", "-1"], "--latency-passes"),
    (["--space", "tinyvit"], "--sample"),
    (["--sample", "3"], "--space"),
    (["--space", "resnet", "--sample", "3"], "resnet"),
    (["--space", "tinyvit", "--sample", "0"], "--sample"),
    (["--space", "tinyvit", "--sample", "3", "--band", "much"], "--band"),
    (["--reference", "none.json"], "none.json"),
    (["--arch", "nosuchnet", "--reference", "none", *QUICK], "nosuchnet"),
]


@pytest.mark.parametrize(("flags", "says"), BAD, ids=[" ".join(flags)[:40] for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything starts; nothing on standard output."""
    known = [] if "--arch" in flags or "--space" in flags else ["--arch", SMALL]
    assert run(*known, *flags) == 2
    refused(capsys, says)


def test_bad_files_are_refused_before_anything_is_measured(
    measured: tuple[Path, list[DeviceRow]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = measured
    before = out.read_bytes()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for flags, says in (
        (["--out", str(out)], "--resume"),
        (["--out", str(tmp_path)], "--out"),
        (["--out", str(tmp_path / "none" / "t.csv")], "--out"),
        (["--out", str(tmp_path / "other.csv"), "--resume"], "--out"),
    ):
        capsys.readouterr()
        assert run("--arch", SMALL, *QUICK, *flags) == 2
        refused(capsys, says)
    assert out.read_bytes() == before
