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
CTX = Context(img_size=32, num_classes=4)
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
    *("--img-size", "32", "--num-classes", "4", "--batch", "2", "--threads", "1", "--blocks", "6"),
    *("--max-blocks", "6", "--precision", "0", "--latency-passes", "10", "--no-memory"),
]


def run(*flags: str) -> int:
    return main([*flags, "--quiet"])


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Read the last line, which with `--quiet` is the only one."""
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    found: dict[str, object] = json.loads(said[0])
    return found


def refused(capsys: pytest.CaptureFixture[str], says: str) -> None:
    """Check that the last call printed one line, on standard error, that says this."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert says in said.err
    assert "Traceback" not in said.err


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DeviceRow]]:
    """Two archs in a runtime that is here and one that is not."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "small.json").write_text(json.dumps({"arch": FACTORS}))
    out = folder / "t.csv"
    flags = ["--arch", str(folder / "small.json"), LARGE, "--reference", SMALL, *QUICK]
    assert run(*flags, "--runtime", "eager", "tensorrt", "--out", str(out)) == 0
    return out, read_rows(out, "--out")


def test_one_row_a_network_and_setting(measured: tuple[Path, list[DeviceRow]]) -> None:
    """Names exactly as given, in the order given; counts are the family's; a figure beside it."""
    out, rows = measured
    with out.open(newline="") as file:
        assert file.readline().strip().split(",") == list(COLUMNS)
    names = [str(out.with_name("small.json")), LARGE]
    assert [(r.arch, r.setting.runtime) for r in rows] == [
        (name, runtime) for runtime in ("eager", "tensorrt") for name in names
    ]
    for row, factors in zip(rows[:2], (SMALL, LARGE), strict=True):
        arch = FAMILY.arch(json.loads(factors))
        assert row.state == OK, row.reason
        assert (row.family, row.key) == ("tinyvit", FAMILY.key(arch, CTX))
        assert json.loads(row.spec) == FAMILY.to_dict(arch)
        assert row.params == FAMILY.count_params(arch, CTX)
        assert row.macs == FAMILY.count_macs(arch, CTX)
        assert row.reference == f"{SMALL}@cpu:eager:float32:b2"
        found = row.measured
        assert (row.threads, found.blocks, row.setting.batch, row.img_size) == (1, 6, 2, 32)
        assert row.latency_passes is not None
        assert row.latency_passes >= 10
        assert found.latency_ms_p50 is not None
        assert found.latency_ms_p90 is not None
        assert found.latency_ms_p50 <= found.latency_ms_p90
        assert found.agrees == 1
        assert found.ratio is not None
        assert found.peak_mem_bytes is None
    assert rows[0].fingerprint == rows[1].fingerprint
    # Which one is faster is for the machine to say, not for a test.
    ratio, lo, hi = rows[1].measured.interval("speedup")
    assert 0 < lo <= ratio <= hi
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_runtime_that_is_missing_is_a_row_with_its_remedy(measured: tuple[Path, list[DeviceRow]]) -> None:
    if not runtimes()["tensorrt"].missing():
        pytest.skip("TensorRT is installed")
    for row in measured[1][2:]:
        assert row.state == FAILED
        assert row.throughput is None
        assert "pip install tensorrt" in row.reason


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
    assert run(*flags, "--out", str(out), "--resume", "--figure", str(tmp_path / "f.svg")) == 0
    said = summary(capsys)
    assert said["rows"] == 2
    assert said["failed"] == 0
    assert said["out"] == str(out)
    assert said["figure"] == str(tmp_path / "f.svg")
    rows = read_rows(out, "--out")
    assert rows[0] == kept
    assert (rows[1].family, rows[1].key, rows[1].spec) == ("timm", rows[1].arch, "")
    assert rows[1].params is not None
    assert rows[1].macs is not None
    peak = rows[1].measured.peak_mem_bytes
    assert peak is not None
    assert 4 * rows[1].params <= peak < 2e9
    assert said["fingerprints"] == sorted({r.fingerprint for r in rows})


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
    (["--blocks", "5"], "--blocks"),
    (["--blocks", "8", "--max-blocks", "7"], "--max-blocks"),
    (["--precision", "1"], "--precision"),
    (["--precision", "nan"], "--precision"),
    (["--latency-passes", "-1"], "--latency-passes"),
    (["--space", "tinyvit"], "--sample"),
    (["--sample", "3"], "--space"),
    (["--space", "resnet", "--sample", "3"], "resnet"),
    (["--space", "tinyvit", "--sample", "0"], "--sample"),
    (["--space", "tinyvit", "--sample", "3", "--band", "much"], "--band"),
    (["--reference", "none.json"], "none.json"),
]


@pytest.mark.parametrize(("flags", "says"), BAD, ids=[" ".join(flags)[:40] for flags, _ in BAD])
def test_bad_input_is_one_line_and_status_2(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything starts; nothing on standard output."""
    known = {} if "--arch" in flags or "--space" in flags else {"--arch": SMALL}
    given = [word for pair in known.items() for word in pair]
    assert run(*given, *flags) == 2
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


def test_a_network_that_only_timm_can_know_is_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("--arch", "nosuchnet", "--reference", "none", *QUICK) == 2
    refused(capsys, "nosuchnet")


def test_a_found_arch_is_measured_where_its_weights_do_not_fit(tmp_path: Path) -> None:
    """`best.json` was made for 10 classes at 48 px; elsewhere its arch counts, without weights."""
    made = Context(img_size=48, num_classes=10)
    model = FAMILY.build(FAMILY.arch(FACTORS), made)
    save_file(model.state_dict(), tmp_path / "best.safetensors")
    best = {"arch": FACTORS, "timm": {}, "img_size": 48, "num_classes": 10}
    (tmp_path / "best.json").write_text(json.dumps(best))
    (net,) = find_nets([str(tmp_path / "best.json")], FAMILY)
    assert net.spec(made).weights == tmp_path / "best.safetensors"
    assert net.spec(CTX).weights is None
    out = tmp_path / "t.csv"
    flags = ["--arch", str(tmp_path / "best.json"), "--reference", "none", *QUICK]
    assert run(*flags, "--out", str(out)) == 0
    assert [r.state for r in read_rows(out, "--out")] == [OK]


def test_what_a_runtime_does_not_serve_is_a_row(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    flags = ["--arch", SMALL, "--reference", "none", "--dtype", "float32", "float16", *QUICK]
    assert run(*flags, "--runtime", "onnxruntime", "--out", str(out)) == 0
    rows = {r.setting.dtype: r for r in read_rows(out, "--out")}
    assert rows["float32"].state == OK
    assert rows["float16"].state == FAILED
    assert "want a dtype of float32" in rows["float16"].reason
