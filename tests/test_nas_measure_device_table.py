"""Another device's table: read back exactly, refused when damaged, and marked where it predicts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.throughput.networks import sample
from nas.core.requirement import Setting
from nas.measure import predict
from nas.measure.device_table import (
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
from nas.measure.predict import Predictor, fit_additive, fit_predictor, held_out, terms_of
from space import Arch, Context, InputError, get_family

FAMILY = get_family("tinyvit")
CTX = Context(img_size=64, num_classes=10)
SEED = FAMILY.seed("21M")
ARCHS: list[Arch] = [n.arch for n in sample(FAMILY, SEED, CTX, 260, band=None, random_seed=5) if n.arch is not None]
CORES: dict[str, Any] = {"physical_cores": 4, "logical_cores": 4, "usable_cpus": 4.0, "nominal_mhz": 1500.0}
SOFTWARE = {"torch": "none", "timm": "none", "python": "3.11.2", "os": "Linux 6.1", "arch": "aarch64"}
GPU = dict.fromkeys(("driver", "cuda", "cudnn"))
DEVICE = Fingerprint(device="cpu", device_name="Board, 4 cores", threads=4, **CORES, **SOFTWARE, **GPU)


BOARD = Setting("cpu", "onnxruntime", "float32", 8)


def speeds(noise: float, seed: int = 0) -> list[float]:
    """Images/s of a device whose seconds are a sum of positive weights times the cost terms."""
    rng = np.random.default_rng(seed)
    terms = terms_of(FAMILY, ARCHS, CTX)
    shares = rng.dirichlet(np.ones(terms.shape[1]))
    seconds = (terms / np.maximum(terms.mean(axis=0), 1e-12) * shares).sum(axis=1) * 0.02
    found: list[float] = (1.0 / (seconds * np.exp(noise * rng.standard_normal(len(seconds))))).tolist()
    return found


def row(arch: Arch, speed: float, seed_speed: float, setting: Setting = BOARD) -> DeviceRow:
    on = DEVICE.under(setting, "onnxruntime 1.20.1", CTX.img_size)
    ratio = speed / seed_speed
    measured = Throughput(
        **{"images_per_s": speed, "images_per_s_lo": 0.98 * speed, "images_per_s_hi": 1.02 * speed},
        **{"ratio": ratio, "ratio_lo": 0.99 * ratio, "ratio_hi": 1.01 * ratio},
        **{"coverage": 0.97, "blocks": 12, "passes": 3, "seconds": 1.5},
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
    """Rows of a device's networks, the seed's first."""
    speed = speeds(noise)
    at = [FAMILY.key(a, CTX) for a in ARCHS].index(FAMILY.key(SEED, CTX))
    chosen = [at, *(i for i in range(len(ARCHS)) if i != at)][:count]
    return [row(ARCHS[i], speed[i], speed[at], setting) for i in chosen]


def arch_of(of: DeviceRow) -> Arch:
    return FAMILY.arch(json.loads(of.spec))


@pytest.fixture(autouse=True)
def additive_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees take seconds to grow and are not what most of these tests are about."""
    monkeypatch.setattr(predict, "MODELS", {"additive": fit_additive})


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


def test_a_row_rebuilds_its_fingerprint_and_setting() -> None:
    found = row(SEED, 2.0, 2.0)
    on = fingerprint_of(found)
    assert on.id == found.fingerprint
    assert (on.device_name, on.batch, on.runtime) == (DEVICE.device_name, 8, "onnxruntime")
    assert found.setting == Setting("cpu", "onnxruntime", "float32", 8)


def damaged(path: Path, **cells: str) -> Path:
    """Write other text into some cells of the first row."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    for name, text in cells.items():
        lines[1][lines[0].index(name)] = text
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    return path


@pytest.mark.parametrize(
    ("cells", "word"),
    [
        *(({"images_per_s": text}, "images_per_s: got") for text in ("fast", "")),
        *(({name: text}, "images_per_s") for name, text in (("images_per_s", "nan"), ("images_per_s_lo", "1e9"))),
        *(({name: text}, "images_per_s") for name, text in (("images_per_s_lo", "-1"), ("images_per_s_hi", "inf"))),
        *(({name: text}, "ratio") for name, text in (("ratio_lo", ""), ("ratio_hi", "0.5"))),
        ({"latency_ms_p50_lo": "1.0"}, "latency_ms_p50"),
        *(({"batch": text}, f"batch: got {word}") for text, word in (("8.5", "8.5"), ("", "nothing"))),
        *(({name: "16"}, "fingerprint.id") for name in ("batch", "threads", "img_size")),
        *(({name: "0" * 12}, "fingerprint.id") for name in ("fingerprint", "on_device_name")),
        *(({name: text}, "line 2") for name, text in (("batch", "0"), ("dtype", "int8"), ("device", "tpu"))),
        ({"spec": "{"}, "spec"),
        *(({"state": text}, "state") for text in ("good", "")),
    ],
)
def test_damaged_cells_are_refused_naming_the_line(cells: dict[str, str], word: str, write: Write) -> None:
    path = damaged(write([row(SEED, 12.5, 12.5)]), **cells)
    with pytest.raises(InputError, match="line 2") as caught:
        read_rows(path, "--device-table")
    assert "\n" not in str(caught.value)
    assert word in str(caught.value)


def test_failed_rows_need_no_numbers(write: Write) -> None:
    failed = replace(row(SEED, 2.0, 2.0), state=FAILED, reason="out of memory", throughput=None)
    path = write([row(SEED, 12.5, 12.5), failed])
    assert read_rows(path, "--x") == [row(SEED, 12.5, 12.5), failed]
    with pytest.raises(InputError, match="0 fingerprints"):
        one_fingerprint([failed], "t.csv")


# The table of a device.


def test_measured_networks_are_as_measured(write: Write) -> None:
    """Own numbers, the ratio to the seed from their own blocks, and no prediction."""
    rows = rows_of()
    found = table(write(rows))
    assert found.setting == rows[0].setting
    for one in rows:
        assert found.exact(arch_of(one))
        measured = found.measurement(arch_of(one))
        assert measured.interval("images_per_s") == one.measured.interval("images_per_s")
        wanted = (1.0, 1.0, 1.0) if one is rows[0] else one.measured.interval("speedup")
        assert measured.interval("speedup") == wanted
        assert (measured.coverage, measured.fingerprint) == (one.measured.coverage, found.fingerprint)
        assert "predicted" not in measured.done
    assert any("Board, 4 cores" in line for line in found.describe())


def test_the_last_row_of_a_network_counts(write: Write) -> None:
    rows = rows_of()
    found = table(write(rows), write([row(ARCHS[40], 77.0, rows[0].measured.images_per_s)]))
    assert found.measurement(ARCHS[40]).images_per_s == 77.0


def test_predictions_enclose_nets_that_were_not_measured(write: Write) -> None:
    """About 95 % of held-out networks lie inside; all are marked as predictions."""
    rows = rows_of(noise=0.03, count=260)
    found = table(write(rows[:110]))
    inside = ratios = 0
    for one in rows[110:]:
        assert not found.exact(arch_of(one))
        guess = found.measurement(arch_of(one))
        assert (guess.done, guess.coverage) == ("predicted (additive)", 0.95)
        inside += guess.images_per_s_lo <= one.measured.images_per_s <= guess.images_per_s_hi
        _, lo, hi = guess.interval("speedup")
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
    found, unseen, base = table(write(rows)), ARCHS[-1], rows[0].measured.images_per_s
    before = found.measurement(unseen), found.measurement(ARCHS[20])
    found.add_finalists([row(unseen, 123.0, base), row(ARCHS[20], 55.0, base)], "--final")
    assert (found.measurement(unseen), found.measurement(ARCHS[20])) == before
    assert (found.exact(unseen), found.exact(unseen, final=True)) == (False, True)
    assert [found.measurement(a, final=True).images_per_s for a in (unseen, ARCHS[20])] == [123.0, 55.0]
    with pytest.raises(InputError, match="fingerprint"):
        found.add_finalists([row(unseen, 1.0, 1.0, replace(BOARD, batch=4))], "--final")


Rows = list[DeviceRow]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rows: [replace(r, family="other") for r in rows], "other"),
        (
            lambda rows: [
                replace(r, img_size=96, **fingerprint_columns(replace(fingerprint_of(r), img_size=96))) for r in rows
            ],
            "96 px",
        ),
        (lambda rows: [replace(r, num_classes=1000) for r in rows], "1000 classes"),
        (lambda rows: [*rows, row(ARCHS[-1], 9.0, 9.0, replace(BOARD, batch=4))], "2 fingerprints"),
        (lambda rows: rows[1:], "without the seed"),
        (lambda rows: rows[:10], "10 measured networks"),
        (lambda rows: [replace(r, key="d1") for r in rows], "key d1"),
        (lambda rows: [replace(r, spec="", family="timm") for r in rows], "without a measured"),
        (lambda rows: [replace(r, state=FAILED) for r in rows], "without a measured"),
        (lambda rows: [], "without a measured"),
        (lambda rows: [*rows, replace(rows[3], spec='{"embed_dims":[1,2]}')], "arch: got no"),
    ],
)
def test_refused_tables(change: Callable[[Rows], Rows], word: str, write: Write) -> None:
    """Another family, resolution, class count, setting; no seed; too few; a wrong key; an arch that does not build."""
    with pytest.raises(InputError, match=word) as caught:
        table(write(change(rows_of())))
    assert "\n" not in str(caught.value)


def test_rows_beside_several_references_are_compared_by_images_per_s(write: Write) -> None:
    """A ratio to something else than the seed's own reference is none to the seed."""
    rows = rows_of()
    alone = replace(timed(rows[0], ratio=None, ratio_lo=None, ratio_hi=None), reference="")
    beside = timed(rows[5], ratio=40.0, ratio_lo=39.0, ratio_hi=41.0)
    beside = replace(beside, reference="5M@cpu:x:float32:b8")
    for several in ([alone, *rows[1:]], [*rows[:5], beside, *rows[6:]]):
        found = table(write(several))
        ratio, lo, _ = found.measurement(arch_of(rows[5])).interval("speedup")
        assert ratio == pytest.approx(rows[5].measured.images_per_s / rows[0].measured.images_per_s)
        assert lo < ratio
        assert found.predictor.error < 0.3, "the predictor learns one scale"


def test_latency_at_batch_1_comes_along(write: Write) -> None:
    rows = rows_of(setting=replace(BOARD, batch=1))
    known = timed(rows[4], latency_ms_p50=5.0, latency_ms_p50_lo=4.0, latency_ms_p50_hi=6.0)
    found = table(write([*rows[:4], known, *rows[5:]]))
    assert found.measurement(arch_of(known)).interval("latency_ms") == (5.0, 4.0, 6.0)
    guess = found.measurement(ARCHS[-1])
    wanted = [1e3 / v for v in (guess.images_per_s, guess.images_per_s_hi, guess.images_per_s_lo)]
    assert guess.interval("latency_ms") == pytest.approx(wanted)


# Prediction and what it is made of.


def predictor(noise: float, count: int = 120, seed: int = 0) -> Predictor:
    return fit_predictor(FAMILY, CTX, ARCHS[:count], speeds(noise, seed)[:count])


@pytest.mark.parametrize("seed", range(4))
def test_an_additive_device_is_recovered(seed: int) -> None:
    """Seconds that are a sum of parts rank held-out networks right: tau above 0.98."""
    from scipy.stats import kendalltau

    fitted = predictor(0.0, seed=seed)
    found = fitted.predict(ARCHS[120:])
    assert kendalltau(speeds(0.0, seed)[120:], [p.images_per_s for p in found]).statistic > 0.98
    assert all(p.lo <= p.images_per_s <= p.hi for p in found)
    assert fitted.median_error < 0.02


def test_held_out_errors_are_those_of_nets_not_seen() -> None:
    """Every network is predicted without itself, so a model that remembers gains nothing."""

    def memory(terms: Any, seconds: Any) -> predict.Model:
        seen = {tuple(t) for t in terms.tolist()}
        return lambda of: np.array([1.0 if tuple(t) in seen else -1.0 for t in of.tolist()])

    assert (held_out(memory, terms_of(FAMILY, ARCHS[:30], CTX), np.ones(30)) == -1.0).all()


def test_the_model_of_least_held_out_error_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(terms: Any, seconds: Any) -> predict.Model:
        return lambda of: np.full(len(of), np.median(seconds))

    monkeypatch.setattr(predict, "MODELS", {"constant": constant, "additive": fit_additive})
    found = predictor(0.02)
    assert found.name == "additive"
    assert found.scores["additive"] < found.scores["constant"]


def test_trees_are_tried_too_and_draw_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "MODELS", {"boosted": predict.fit_boosted})
    monkeypatch.setattr(predict, "FOLDS", 2)
    first, second = (predictor(0.02, 40) for _ in range(2))
    assert first.errors == second.errors
    assert first.median_error < 0.5
