"""Another device's table: read back exactly, refused when damaged, honest where it predicts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from space_cases import random_arch, random_context

from benchmarks.throughput.networks import sample
from nas.core.requirement import Setting
from nas.measure import predict
from nas.measure.device_table import (
    COLUMNS,
    FAILED,
    OK,
    DeviceRow,
    DeviceTable,
    fingerprint_columns,
    fingerprint_of,
    one_fingerprint,
    read_rows,
    write_rows,
)
from nas.measure.fingerprint import Fingerprint
from nas.measure.measurement import Throughput
from nas.measure.predict import Additive, Predictor, fit_predictor, held_out, terms_of
from space import Arch, Context, Family, InputError, get_family
from space.family import Table

FAMILY = get_family("tinyvit")
CTX = Context(img_size=64, num_classes=10)
SEED = FAMILY.seed("21M")
NETS = sample(FAMILY, SEED, CTX, 260, band=None, random_seed=5)
ARCHS: list[Arch] = [net.arch for net in NETS if net.arch is not None]
DEVICE = Fingerprint(
    device="cpu",
    device_name="Board, 4 cores",
    physical_cores=4,
    logical_cores=4,
    usable_cpus=4.0,
    nominal_mhz=1500.0,
    driver=None,
    cuda=None,
    cudnn=None,
    torch="none",
    timm="none",
    python="3.11.2",
    os="Linux 6.1",
    arch="aarch64",
    threads=4,
)


def paces(noise: float, seed: int = 0) -> list[float]:
    """Images/s of a device whose seconds are a sum of positive weights times the cost terms."""
    rng = np.random.default_rng(seed)
    terms = terms_of(FAMILY, ARCHS, CTX)
    shares = rng.dirichlet(np.ones(terms.shape[1]))
    seconds = (terms / np.maximum(terms.mean(axis=0), 1e-12) * shares).sum(axis=1) * 0.02
    noisy = seconds * np.exp(noise * rng.standard_normal(len(seconds)))
    found: list[float] = (1.0 / noisy).tolist()
    return found


BOARD = Setting("cpu", "onnxruntime", "float32", 8)


def row(arch: Arch, pace: float, seed_pace: float, setting: Setting = BOARD) -> DeviceRow:
    on = DEVICE.under(setting, "onnxruntime 1.20.1", CTX.img_size)
    measured = Throughput(
        images_per_s=pace,
        images_per_s_lo=0.98 * pace,
        images_per_s_hi=1.02 * pace,
        ratio=pace / seed_pace,
        ratio_lo=0.99 * pace / seed_pace,
        ratio_hi=1.01 * pace / seed_pace,
        coverage=0.97,
        blocks=12,
        passes=3,
        seconds=1.5,
        when="2026-01-01T00:00:00+00:00",
    )
    return DeviceRow(
        arch="21M" if arch == SEED else FAMILY.label(arch),
        family=FAMILY.name,
        key=FAMILY.key(arch, CTX),
        spec=json.dumps(FAMILY.to_dict(arch)),
        img_size=CTX.img_size,
        num_classes=CTX.num_classes,
        setting=setting,
        threads=4,
        state=OK,
        throughput=measured,
        reference=f"21M@{setting.text}",
        **fingerprint_columns(on),
    )


def timed(of: DeviceRow, **changes: Any) -> DeviceRow:
    """The row with other values in its throughput."""
    return replace(of, throughput=replace(of.measured, **changes))


def rows_of(noise: float = 0.03, count: int = 60, setting: Setting = BOARD) -> list[DeviceRow]:
    speed = paces(noise)
    at = [FAMILY.key(a, CTX) for a in ARCHS].index(FAMILY.key(SEED, CTX))
    chosen = [at, *(i for i in range(len(ARCHS)) if i != at)][:count]
    return [row(ARCHS[i], speed[i], speed[at], setting) for i in chosen]


@pytest.fixture(autouse=True)
def additive_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees take seconds to grow and are not what most of these tests are about."""
    monkeypatch.setattr(predict, "MODELS", {"additive": Additive})


Write = Callable[[Sequence[DeviceRow]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(rows: Sequence[DeviceRow]) -> Path:
        path = tmp_path / f"device-{len(list(tmp_path.iterdir()))}.csv"
        write_rows(path, rows)
        return path

    return put


def table(*paths: Path) -> DeviceTable:
    return DeviceTable(list(paths), FAMILY, CTX, SEED)


# Rows.

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
NUMBERS = st.floats(allow_nan=False)


def drawn_rows() -> st.SearchStrategy[DeviceRow]:
    """Any values in any column, of a row whose fingerprint and intervals are sound."""
    texts = ("arch", "family", "key", "reason", "reference")
    counts = ("params", "macs", "test_n", "latency_passes")
    numbers = ("latency_ms_p90", "parity", "load", "clock_mhz", "waited")
    outside = dict.fromkeys(texts, TEXTS)
    outside |= {n: st.none() | st.integers(0, 2**62) for n in counts}
    outside |= {n: st.none() | NUMBERS for n in ("top1", "eager_top1", "agreement")}
    inside = dict.fromkeys(("done", "disturbed", "when"), TEXTS)
    inside |= {n: st.none() | NUMBERS for n in numbers}
    inside |= {n: st.none() | st.integers(0, 2**62) for n in ("peak_mem_bytes", "agrees")}
    base = row(SEED, 12.5, 12.5)
    both = st.tuples(st.fixed_dictionaries(outside), st.fixed_dictionaries(inside))
    return both.map(lambda values: timed(replace(base, **values[0]), **values[1]))


@given(st.lists(drawn_rows(), max_size=3))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_rows_read_back_exactly(tmp_path_factory: Any, rows: list[DeviceRow]) -> None:
    path = tmp_path_factory.mktemp("rows") / "t.csv"
    write_rows(path, rows)
    assert read_rows(path, "--x") == rows


def test_a_row_rebuilds_its_fingerprint_and_setting() -> None:
    found = row(SEED, 2.0, 2.0)
    on = fingerprint_of(found)
    assert on.id == found.fingerprint
    assert (on.device_name, on.batch, on.runtime) == (DEVICE.device_name, 8, "onnxruntime")
    assert found.setting == Setting("cpu", "onnxruntime", "float32", 8)


def damaged(path: Path, **cells: str) -> Path:
    """Write other text into some cells of the first row."""
    import csv

    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    for name, text in cells.items():
        lines[1][lines[0].index(name)] = text
    made = path.with_name("damaged.csv")
    with made.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    return made


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"images_per_s": "fast"}, "images_per_s: got fast"),
        ({"images_per_s": ""}, "images_per_s"),
        ({"images_per_s": "nan"}, "images_per_s"),
        ({"images_per_s_lo": "1e9"}, "images_per_s"),
        ({"images_per_s_lo": "-1"}, "images_per_s"),
        ({"images_per_s_hi": "inf"}, "images_per_s"),
        ({"ratio_lo": ""}, "ratio"),
        ({"ratio_hi": "0.5"}, "ratio"),
        ({"latency_ms_p50_lo": "1.0"}, "latency_ms_p50"),
        ({"batch": "8.5"}, "batch: got 8.5"),
        ({"batch": ""}, "batch: got nothing"),
        ({"batch": "16"}, "fingerprint.id"),
        ({"batch": "0"}, "line 2"),
        ({"fingerprint": "0" * 12}, "fingerprint.id"),
        ({"threads": "2"}, "fingerprint.id"),
        ({"on_device_name": "another"}, "fingerprint.id"),
        ({"dtype": "int8"}, "line 2"),
        ({"img_size": "128"}, "fingerprint.id"),
        ({"spec": "{"}, "spec"),
        ({"state": "good"}, "state"),
        ({"state": ""}, "state"),
        ({"device": "tpu"}, "line 2"),
    ],
)
def test_damaged_cells_are_refused_naming_the_line(cells: dict[str, str], says: str, write: Write) -> None:
    path = damaged(write([row(SEED, 12.5, 12.5)]), **cells)
    with pytest.raises(InputError) as caught:
        read_rows(path, "--device-table")
    line = str(caught.value)
    assert "\n" not in line
    assert "line 2" in line
    assert says in line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "arch,images_per_s\n",
        "a" * 300_000,
        "\x00\x01",
        ",".join(COLUMNS[:-1]) + "\n",
        ",".join(COLUMNS) + "\n1,2,3\n",
        ",".join(COLUMNS) + "\n" + '"' + "x" * 300_000 + "\n",
    ],
)
def test_another_file_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_rows(path, "--device-table")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"\xff\xfe\xe9")
    for path in (tmp_path, tmp_path / "none.csv", tmp_path / "latin.csv"):
        with pytest.raises(InputError, match="--device-table") as caught:
            read_rows(path, "--device-table")
        assert "\n" not in str(caught.value)


def test_failed_rows_need_no_numbers(write: Write) -> None:
    failed = replace(row(SEED, 2.0, 2.0), state=FAILED, reason="out of memory", throughput=None)
    assert read_rows(write([failed]), "--x") == [failed]
    with pytest.raises(InputError, match="0 fingerprints"):
        one_fingerprint([failed], "t.csv")


# The table of a device.


def test_measured_networks_are_told_as_measured(write: Write) -> None:
    """Own numbers, the ratio to the seed from their own blocks, and no guess."""
    rows = rows_of()
    found = table(write(rows))
    assert found.setting == rows[0].setting
    for one in rows:
        arch = FAMILY.arch(json.loads(one.spec))
        assert found.exact(arch)
        told = found.measurement(arch)
        assert told.interval("images_per_s") == one.measured.interval("images_per_s")
        if one is not rows[0]:
            assert told.interval("speedup") == one.measured.interval("speedup")
        assert told.coverage == one.measured.coverage
        assert told.fingerprint == found.fingerprint
        assert "predicted" not in told.done
    assert found.measurement(SEED).interval("speedup") == (1.0, 1.0, 1.0)
    assert any("Board, 4 cores" in line for line in found.describe())


def test_the_last_row_of_a_network_counts(write: Write) -> None:
    rows = rows_of()
    again = row(ARCHS[40], 77.0, rows[0].measured.images_per_s)
    found = table(write(rows), write([again]))
    assert found.measurement(ARCHS[40]).images_per_s == 77.0


def test_predictions_enclose_nets_that_were_not_measured(write: Write) -> None:
    """About 95 % of held-out networks lie inside; all say that they are guesses."""
    rows = rows_of(noise=0.03, count=260)
    found = table(write(rows[:110]))
    inside = ratios = 0
    for one in rows[110:]:
        arch = FAMILY.arch(json.loads(one.spec))
        assert not found.exact(arch)
        told = found.measurement(arch)
        assert told.done == "predicted (additive)"
        assert told.coverage == 0.95
        inside += told.images_per_s_lo <= one.measured.images_per_s <= told.images_per_s_hi
        _, lo, hi = told.interval("speedup")
        ratios += lo <= (one.measured.ratio or 0) <= hi
    assert 0.89 <= inside / 150 <= 1.0
    assert 0.89 <= ratios / 150 <= 1.0
    assert 1.0 < found.predictor.error / 0.03 < 4.0, "two sigma of the noise, and a little"


def test_intervals_are_as_wide_as_the_noise(write: Write) -> None:
    errors = [table(write(rows_of(noise, 120))).predictor.error for noise in (0.01, 0.04, 0.16)]
    assert errors == sorted(errors)
    assert errors[2] > 5 * errors[0]


def test_finalists_count_for_final_questions_only(write: Write) -> None:
    rows = rows_of()
    found = table(write(rows))
    unseen = ARCHS[-1]
    measured = row(unseen, 123.0, rows[0].measured.images_per_s)
    better = row(ARCHS[20], 55.0, rows[0].measured.images_per_s)
    before = found.measurement(unseen), found.measurement(ARCHS[20])
    found.add_finalists([measured, better], "--final")
    assert (found.measurement(unseen), found.measurement(ARCHS[20])) == before
    assert not found.exact(unseen)
    assert found.exact(unseen, final=True)
    assert found.measurement(unseen, final=True).images_per_s == 123.0
    assert found.measurement(ARCHS[20], final=True).images_per_s == 55.0
    other = row(unseen, 1.0, 1.0, Setting("cpu", "onnxruntime", "float32", 4))
    with pytest.raises(InputError, match="fingerprint"):
        found.add_finalists([other], "--final")


def test_refused_tables(write: Write) -> None:
    """Another family, resolution, class count, setting; no seed; too few; a wrong key."""
    rows, batch = rows_of(), Setting("cpu", "onnxruntime", "float32", 4)
    size = fingerprint_columns(replace(fingerprint_of(rows[0]), img_size=96))
    cases: list[tuple[list[DeviceRow], str]] = [
        ([replace(r, family="other") for r in rows], "other"),
        ([replace(r, img_size=96, **size) for r in rows], "96 px"),
        ([replace(r, num_classes=1000) for r in rows], "1000 classes"),
        ([*rows, row(ARCHS[-1], 9.0, 9.0, batch)], "2 fingerprints"),
        (rows[1:], "without the seed"),
        (rows[:10], "10 measured networks"),
        ([replace(r, key="d1") for r in rows], "key d1"),
        ([replace(r, spec="", family="timm") for r in rows], "without a measured"),
        ([replace(r, state=FAILED) for r in rows], "without a measured"),
        ([], "without a measured"),
    ]
    for bad, says in cases:
        with pytest.raises(InputError, match=says) as caught:
            table(write(bad))
        assert "\n" not in str(caught.value)


def test_an_arch_that_does_not_build_is_refused(write: Write) -> None:
    rows = rows_of()
    broken = replace(rows[3], spec='{"embed_dims":[1,2]}')
    with pytest.raises(InputError) as caught:
        table(write([*rows, broken]))
    assert "\n" not in str(caught.value)


def test_rows_beside_several_references_are_compared_by_their_pace(write: Write) -> None:
    """A ratio to something else than the seed's own reference says nothing about the seed."""
    rows = rows_of()
    pace = rows[0].measured.images_per_s
    alone = replace(timed(rows[0], ratio=None, ratio_lo=None, ratio_hi=None), reference="")
    beside = timed(rows[5], ratio=40.0, ratio_lo=39.0, ratio_hi=41.0)
    beside = replace(beside, reference="5M@cpu:x:float32:b8")
    for several in ([alone, *rows[1:]], [*rows[:5], beside, *rows[6:]]):
        found = table(write(several))
        told = found.measurement(FAMILY.arch(json.loads(rows[5].spec)))
        assert told.ratio == pytest.approx(rows[5].measured.images_per_s / pace)
        assert told.ratio_lo is not None
        assert told.ratio_lo < told.ratio
        assert found.predictor.error < 0.3, "the predictor learns one scale"


def test_latency_at_batch_1_comes_along(write: Write) -> None:
    one = Setting("cpu", "onnxruntime", "float32", 1)
    rows = rows_of(setting=one)
    known = timed(rows[4], latency_ms_p50=5.0, latency_ms_p50_lo=4.0, latency_ms_p50_hi=6.0)
    found = table(write([*rows[:4], known, *rows[5:]]))
    told = found.measurement(FAMILY.arch(json.loads(known.spec)))
    assert told.interval("latency_ms") == (5.0, 4.0, 6.0)
    guess = found.measurement(ARCHS[-1])
    assert guess.interval("latency_ms") == pytest.approx(
        (1e3 / guess.images_per_s, 1e3 / guess.images_per_s_hi, 1e3 / guess.images_per_s_lo)
    )


# Prediction and what it is made of.


def predictor(noise: float, **kwargs: Any) -> Predictor:
    return fit_predictor(FAMILY, CTX, ARCHS[:120], paces(noise, **kwargs)[:120])


@pytest.mark.parametrize("seed", range(4))
def test_an_additive_device_is_recovered(seed: int) -> None:
    """Seconds that are a sum of parts rank held-out networks right: tau above 0.98."""
    from scipy.stats import kendalltau

    truth = paces(0.0, seed=seed)
    found = predictor(0.0, seed=seed).predict(ARCHS[120:])
    tau = kendalltau(truth[120:], [p.images_per_s for p in found]).statistic
    assert tau > 0.98
    assert all(p.lo <= p.images_per_s <= p.hi for p in found)
    assert predictor(0.0, seed=seed).median_error < 0.02


def test_held_out_errors_are_those_of_nets_not_seen() -> None:
    """A model that remembers is not let off: every network is predicted without itself."""

    class Memory:
        def fit(self, terms: Any, seconds: Any) -> None:
            self.seen = {tuple(t): s for t, s in zip(terms.tolist(), seconds, strict=True)}

        def predict(self, terms: Any) -> Any:
            return np.array([self.seen.get(tuple(t), -1.0) for t in terms.tolist()])

    terms = terms_of(FAMILY, ARCHS[:30], CTX)
    assert (held_out(Memory, terms, np.ones(30)) == -1.0).all()


def test_the_model_of_least_held_out_error_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def fit(self, terms: Any, seconds: Any) -> None:
            self.middle = float(np.median(seconds))

        def predict(self, terms: Any) -> Any:
            return np.full(len(terms), self.middle)

    monkeypatch.setattr(predict, "MODELS", {"constant": Constant, "additive": Additive})
    found = predictor(0.02)
    assert found.name == "additive"
    assert found.scores["additive"] < found.scores["constant"]


def test_trees_are_tried_too_and_draw_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "MODELS", {"boosted": predict.Boosted})
    monkeypatch.setattr(predict, "FOLDS", 2)
    speeds = paces(0.02)[:40]
    first, second = (fit_predictor(FAMILY, CTX, ARCHS[:40], speeds) for _ in range(2))
    assert first.errors == second.errors
    assert first.median_error < 0.5


def test_cost_terms_add_up_to_the_macs() -> None:
    """Of any arch in any context: none is negative, and the products sum to `count_macs`."""
    rng = random.Random(0)
    kinds = ("linear", "attend", "depthwise", "stem macs", "head macs", "merge")
    for _ in range(300):
        arch, ctx = random_arch(rng), random_context(rng)
        terms = FAMILY.cost_terms_many(FAMILY.table([arch]), ctx)
        assert all((np.asarray(v) >= 0).all() for v in terms.values())
        products = sum(int(v[0]) for name, v in terms.items() if name.endswith(kinds))
        assert products == FAMILY.count_macs(arch, ctx)
        assert int(terms["once"][0]) == 1


def test_cost_terms_have_the_shape_of_counts() -> None:
    """Flat tables and open grids alike; a term is the same for an arch alone or among others."""
    flat = FAMILY.table(ARCHS[:7])
    terms = FAMILY.cost_terms_many(flat, CTX)
    assert {v.shape for v in terms.values()} == {FAMILY.count_macs_many(flat, CTX).shape}
    for i, arch in enumerate(ARCHS[:7]):
        alone = FAMILY.cost_terms_many(FAMILY.table([arch]), CTX)
        assert {n: v[0] for n, v in alone.items()} == {n: v[i] for n, v in terms.items()}
    vectors = ("embed_dims", "depths", "window_sizes")
    grid: Table = {}
    for axis, (name, column) in enumerate(FAMILY.table(ARCHS[:3]).items()):
        shape = [1] * 6
        shape[axis] = 3
        grid[name] = column.reshape(*shape, *column.shape[1:])
        assert (name in vectors) == (column.ndim == 2)
    open_terms = FAMILY.cost_terms_many(grid, CTX)
    wanted = FAMILY.count_macs_many(grid, CTX).shape
    assert {v.shape for v in open_terms.values()} == {wanted} == {(3,) * 6}


def test_a_family_without_parts_gives_counts() -> None:
    flat = FAMILY.table(ARCHS[:5])
    terms = Family.cost_terms_many(FAMILY, flat, CTX)
    assert (terms["macs"] == FAMILY.count_macs_many(flat, CTX)).all()
    assert {v.shape for v in terms.values()} == {(5,)}
