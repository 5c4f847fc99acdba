"""Trust: intervals cover as often as they say, ceilings are right, the best is rarely left out."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from conftest import SMALL_ARCH
from safetensors.numpy import save_file
from scipy import stats

from nas.contract.flags import Session
from nas.contract.proxy_check import check_band, check_proxy, choose_archs, named_archs
from nas.contract.run_folder import RunFolder
from nas.contract.state import Incumbent, Run, Task
from nas.core.config import RunConfig
from nas.core.io import write_json
from nas.core.progress import Console
from nas.core.stats import _dunnett, describe_tied, kendall, kendall_interval, noise_ceiling, regret, tied_with_best
from nas.distill.jobs import train
from nas.jobs.job import Job, Result, failed_before, keep_failure
from nas.search.constraints import band_at
from nas.search.study import Trial
from space import Context, get_family
from space.contractions import count_contractions
from space.errors import InputError
from space.sampling import sample_band

Floats = npt.NDArray[np.float64]
SIMULATED = 200
SLACK = 0.045
"""Three standard errors of a share of 0.95 over 200 simulated data sets."""


def world(rng: np.random.Generator, n: int, s: int, sd: float) -> tuple[Floats, Floats]:
    """True values [n] of unit spread, and truth [s, n]; each random seed shifts all alike."""
    true = rng.normal(size=n)
    return true, true + sd * rng.normal(size=(s, n)) + 5 * rng.normal(size=(s, 1))


def normal_tau(correlation: float) -> float:
    return 2 / math.pi * math.asin(correlation)


@pytest.mark.parametrize("n", [3, 7, 8, 20])
def test_archs_that_all_agree_are_no_proof_of_a_perfect_score(n: int) -> None:
    order = np.arange(float(n))
    up, down = (kendall_interval(scores, order[None], random_seed=0) for scores in (order, -order))
    assert (up.value, down.value) == pytest.approx((1, -1))
    if n < 8:
        assert up.lo is up.hi is down.lo is None
        assert up.text() == f"1.00 ({n} archs: too few to tell)"
    else:
        assert (up.lo, up.hi, down.lo) == pytest.approx((-(down.hi or 0), 1, -1))
        assert 0.7 < (up.lo or 0) < 0.99


@pytest.mark.parametrize(("n", "link", "sd"), [(12, 0.6, 0.7), (24, 0.9, 0.7), (24, 0.0, 0.3)])
def test_the_interval_of_tau_covers_the_tau_of_such_archs(n: int, link: float, sd: float) -> None:
    rng = np.random.default_rng(1)
    asked = normal_tau(link / math.sqrt(1 + sd**2 / 3))
    covered = 0
    for _ in range(SIMULATED):
        true, truth = world(rng, n, 3, sd)
        scores = link * true + math.sqrt(1 - link**2) * rng.normal(size=n)
        found = kendall_interval(scores, truth, resamples=400, random_seed=0)
        covered += found.lo <= asked <= found.hi
    assert covered / SIMULATED >= 0.95 - SLACK


def test_intervals_depend_on_the_random_seed_alone_and_on_ranks_alone() -> None:
    rng = np.random.default_rng(2)
    true, truth = world(rng, 15, 3, 0.5)
    scores = true + rng.normal(size=15)
    one = kendall_interval(scores, truth, random_seed=3)
    assert one == kendall_interval(scores, truth, random_seed=3)
    assert one == kendall_interval(np.exp(scores), truth, random_seed=3)
    assert one != kendall_interval(scores, truth, random_seed=4)
    infinite = scores.copy()
    infinite[np.argsort(scores)[:2]] = -np.inf
    assert math.isfinite(kendall_interval(infinite, truth, random_seed=3).hi)


@pytest.mark.parametrize(("s", "sd"), [(2, 0.5), (3, 1.0), (5, 0.2)])
def test_the_ceilings_are_those_of_the_world_that_was_simulated(s: int, sd: float) -> None:
    rng = np.random.default_rng(4)
    reached, found = [], []
    for _ in range(SIMULATED):
        true, truth = world(rng, 20, s, sd)
        found.append(noise_ceiling(truth, resamples=100))
        reached.append(kendall(true, truth.mean(axis=0)))
    # What a perfect proxy reached in fact, what is estimated of it, and the closed form agree.
    perfect, pairwise = normal_tau(1 / math.sqrt(1 + sd**2 / s)), normal_tau(1 / (1 + sd**2))
    assert np.mean(reached) == pytest.approx(perfect, abs=0.03)
    for asked, estimates in ((perfect, [f.perfect for f in found]), (pairwise, [f.pairwise for f in found])):
        assert all(e.lo <= e.value <= e.hi for e in estimates)
        assert np.mean([e.value for e in estimates]) == pytest.approx(asked, abs=0.03)
        assert np.mean([e.lo <= asked <= e.hi for e in estimates]) >= 0.95 - SLACK


def test_pure_noise_has_no_ceiling_and_no_noise_has_the_highest() -> None:
    rng = np.random.default_rng(6)
    noise = [noise_ceiling(rng.normal(size=(3, 20)), resamples=2).perfect.lo for _ in range(50)]
    assert np.mean(np.array(noise) == 0) > 0.9
    exact = noise_ceiling(np.tile(rng.normal(size=12), (3, 1)), resamples=50)
    assert exact.perfect.value == exact.perfect.lo == 1.0
    assert exact.pairwise.value == pytest.approx(1)


def plain_regret(scores: Floats, truth: Floats) -> float:
    """The difference of mean truths, too high by the winner's curse."""
    means = truth.mean(axis=0)
    return float(means[np.argmin(scores)] - means.min())


@pytest.mark.parametrize("sd", [0.1, 0.5])
@pytest.mark.parametrize("skill", [0.0, 0.9])
def test_regret_is_enclosed_between_cross_fitted_and_plain(sd: float, skill: float) -> None:
    rng = np.random.default_rng(7)
    covered, asked, fitted, plain, spread = 0, [], [], [], []
    for _ in range(SIMULATED):
        true, truth = world(rng, 12, 3, sd)
        scores = skill * true + math.sqrt(1 - skill**2) * rng.normal(size=12)
        found = regret(scores, truth)
        assert 0 <= found.lo <= found.value <= found.hi
        assert found.within_one_sd == (found.value <= found.seed_sd)
        asked.append(true[np.argmin(scores)] - true.min())
        covered += found.lo <= asked[-1] <= found.hi
        fitted.append(found.value)
        plain.append(plain_regret(scores, truth))
        spread.append(found.seed_sd**2)
    assert covered / SIMULATED >= 0.95 - SLACK
    assert math.sqrt(np.mean(spread)) == pytest.approx(sd, rel=0.05)
    noise = 4 * sd / math.sqrt(3 * SIMULATED)
    assert np.mean(fitted) - noise <= np.mean(asked) <= np.mean(plain) + noise


def test_the_curse_of_the_winner_is_in_the_plain_difference_only() -> None:
    """All archs are equally good: the plain regret is far from 0, the cross-fitted is not."""
    rng = np.random.default_rng(8)
    drawn = [(rng.normal(size=20), rng.normal(size=(3, 20))) for _ in range(SIMULATED)]
    plain, found = np.mean([plain_regret(*each) for each in drawn]), [regret(*each) for each in drawn]
    assert plain > 0.8
    assert np.mean([f.lo == 0.0 for f in found]) > 0.93
    assert np.mean([f.value for f in found]) < 0.5 * plain


def test_the_critical_value_is_the_t_quantile_for_one_rival_and_that_of_published_tables() -> None:
    for dof in (5, 20, 60):
        assert _dunnett(1, dof, 0) == pytest.approx(float(stats.t.ppf(0.975, dof)), rel=0.03)
    # Dunnett, Biometrics 20 (1964), two-sided 5 %: 3 rivals, 20 degrees of freedom; 9 rivals, 60.
    assert _dunnett(3, 20, 1) == pytest.approx(2.54, rel=0.02)
    assert _dunnett(9, 60, 2) == pytest.approx(2.73, rel=0.03)


def images_of(rng: np.random.Generator, true: Floats, s: int, images: int, seed_sd: float) -> dict[str, Floats]:
    """Losses [s, images] per arch: hard images are hard for all, random seeds differ."""
    hard = rng.exponential(size=images)
    return {
        f"a{i:02d}": value
        + hard
        + seed_sd * rng.normal(size=(s, 1))
        + 0.5 * rng.normal(size=images)
        + 0.3 * rng.normal(size=(s, images))
        for i, value in enumerate(true)
    }


@pytest.mark.parametrize(("s", "seed_sd"), [(1, 0.0), (3, 0.05), (3, 0.0)])
def test_the_best_arch_is_rarely_left_out_and_clear_losers_are(s: int, seed_sd: float) -> None:
    rng = np.random.default_rng(9)
    missed, sizes = 0, []
    for _ in range(SIMULATED):
        true = np.array([0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 2.0, 3.0])
        kept = tied_with_best(images_of(rng, true, s, 200, seed_sd))
        missed += "a00" not in kept
        assert "a07" not in kept
        sizes.append(len(kept))
    assert missed / SIMULATED <= 0.05 + SLACK
    assert 1 < np.mean(sizes) < 8


def test_equal_archs_keep_the_level_with_random_seeds_that_differ() -> None:
    """Without the spread of random seeds the images alone would name a winner almost always."""
    rng, missed, single = np.random.default_rng(10), 0, 0
    for _ in range(SIMULATED):
        losses = images_of(rng, np.zeros(5), 3, 1000, 0.2)
        missed += "a00" not in tied_with_best(losses)
        single += "a00" not in tied_with_best({k: v.mean(axis=0) for k, v in losses.items()})
    assert missed / SIMULATED <= 0.05 + SLACK
    assert single / SIMULATED > 0.5


def test_the_best_are_described() -> None:
    losses = images_of(np.random.default_rng(12), np.array([0.0, 0.0, 5.0]), 3, 2000, 0.01)
    kept = tied_with_best(losses)
    assert set(kept) == {"a00", "a01"}
    assert kept == tied_with_best(dict(reversed(losses.items())))
    for named, text in (
        (kept, "the first 2 of 3 cannot be told apart by 3 random seeds x 2,000 images"),
        (("a00",), "the first of 3 is better than the others"),
        (tuple(losses), "the 3 cannot be told apart"),
        (("a00", "a02"), "2 of 3 cannot be told apart from the best"),
    ):
        assert describe_tied(named, losses).startswith(text)
    broken = {**losses, "a01": np.full((3, 2000), np.nan)}
    assert tied_with_best(broken) == ("a00",)
    assert tied_with_best({"a": losses["a00"], "b": losses["a00"]}) == ("a", "b")


@pytest.mark.parametrize(
    ("call", "want"),
    [
        (lambda: noise_ceiling(np.zeros((1, 5))), "at least 2"),
        (lambda: regret(np.zeros(5), np.zeros((1, 5))), "at least 2"),
        (lambda: kendall_interval(np.zeros(3), np.full((2, 3), np.nan), random_seed=0), "finite"),
        (lambda: kendall_interval(np.zeros(4), np.zeros((2, 3)), random_seed=0), "one per arch"),
        (lambda: tied_with_best({"a": np.zeros((2, 5)), "b": np.zeros((2, 6))}), "same random seeds and images"),
    ],
)
def test_meaningless_input_is_refused(call: Callable[[], object], want: str) -> None:
    with pytest.raises(InputError, match=want):
        call()


FAMILY, CTX = get_family("tinyvit"), Context(32, 10)
SEED = FAMILY.arch(SMALL_ARCH)
DATASET = cast(Any, SimpleNamespace(context=CTX))


def config_of(**more: Any) -> RunConfig:
    short = {"target_params": 400_000, "steps": 2, "proxy_epochs": 1}
    return RunConfig(seed="small", importance="prefix", **{**short, **more})


class Paper:
    """A run whose trainings are losses made up from the arch; some archs cannot be trained."""

    def __init__(self, folder: Path, config: RunConfig, failing: tuple[str, ...] = ()) -> None:
        self.family, self.seed_arch, self.context, self.config = FAMILY, SEED, CTX, config
        self.folder, self.failing = RunFolder(folder), failing
        self.printed = io.StringIO()
        self.console = Console(stream=self.printed)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.rows: list[tuple[Trial, dict[str, Any]]] = []
        self.study = cast(Any, self)
        folder.mkdir(exist_ok=True)

    @property
    def run(self) -> Run:
        return cast(Run, self)

    def key(self, arch: Any) -> str:
        return FAMILY.key(arch, CTX)

    def band(self, step: int) -> Any:
        return band_at(FAMILY.count_params(SEED, CTX), self.config, step)

    def training(self, arch: Any, name: str, **more: Any) -> Task:
        return Task(Job(train, {"arch": arch, **more}, name), self.folder.job_folder(name), 0.0)

    def train_all(self, tasks: Any, *, remember: bool) -> list[Result]:
        """Do each once: that it failed is kept, as `Run.do_all` does."""
        found = []
        for task in tasks:
            spec = dict(task.job.argument)
            result = failed_before(task.out) or self.train(spec.pop("arch"), task.job.key, out=task.out, **spec)
            if not result.ok:
                keep_failure(task.out, result)
            found.append(result)
        return found

    def train(self, arch: Any, name: str, *, out: Path, **more: Any) -> Result:
        self.asked.append((name, more))
        if name.startswith(self.failing):
            return Result(name, False, {}, "out of memory")
        out.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(FAMILY.count_params(arch, CTX))
        images = {"soft_loss": rng.exponential(size=50)}
        images |= {x: np.zeros(50, dtype=np.int64) for x in ("predicted", "truth")}
        save_file(images, out / "holdout.safetensors")
        return Result(name, True)


@pytest.fixture
def untrained_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(run: Run, archs: Any) -> dict[str, list[float]]:
        return {"parameters": [-float(FAMILY.count_params(a, CTX)) for a in archs]}

    monkeypatch.setattr("nas.contract.proxy_check.training_free_scores", counts)


START = Incumbent(SEED, FAMILY.key(SEED, CTX), Path("seed.safetensors"), 1.0, 1.0, 0.0)


def drawn(number: int, folder: Path | None = None) -> list[Any]:
    """Draw archs of the last band; name them in a folder of a run."""
    band = band_at(FAMILY.count_params(SEED, CTX), config_of(), 2)
    archs = sample_band(FAMILY, SEED, CTX, band, number, random_seed=1)
    if folder is not None:
        folder.mkdir()
        write_json(folder / "proxy_check.json", {"archs": [FAMILY.to_dict(a) for a in archs]})
    return archs


def test_a_report_is_of_archs_that_the_run_could_train(tmp_path: Path) -> None:
    paper = Paper(tmp_path / "run", config_of())
    archs = drawn(4)
    of = [(FAMILY.key(a, CTX), FAMILY.count_params(a, CTX), FAMILY.to_dict(a)) for a in archs]
    stages = [("proxy", "failed"), ("proxy", "complete"), ("kept", "complete"), ("race", "pruned")]
    table = {
        key: (Trial(2, key, "", "", "", 1, "", params, params, 1, stage=stage, state=state), arch)
        for (key, params, arch), (stage, state) in zip(of, stages, strict=True)
    }
    paper.study = cast(Any, SimpleNamespace(rows=[r for r, _ in table.values()], arch=lambda step, key: table[key][1]))
    found = [paper.key(arch) for arch in choose_archs(paper.run, 3)]
    assert found == [of[2][0], of[1][0], of[3][0]], "kept, scored, stopped in the race"
    (tmp_path / "run" / "proxy_check.json").unlink()
    held = count_contractions(FAMILY, SEED, CTX, paper.band(2))
    assert of[0][0] not in [paper.key(arch) for arch in choose_archs(paper.run, held - 1)]
    (tmp_path / "run" / "proxy_check.json").unlink()
    assert paper.key(choose_archs(paper.run, held)[-1]) == of[0][0], "where there are no others"


@pytest.mark.usefixtures("untrained_scores")
def test_an_arch_that_cannot_be_trained_is_left_out_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    gone = FAMILY.key(drawn(5, folder)[1], CTX)
    paper = Paper(folder, config_of(), failing=(f"truth1-{gone}",))
    report = check_proxy(paper.run, START, 5)
    assert report["n"] == 4
    assert "over 4 archs" in report["message"]
    assert "1 more could not be trained" in report["message"]
    assert "out of memory" in report["left_out"][0]
    assert paper.printed.getvalue().count("left out") == 1
    assert not [name for name, _ in paper.asked if name in (f"truth2-{gone}", f"check-{gone}")]
    again = Paper(folder, config_of())  # it would not fail a second time
    assert check_proxy(again.run, START, 5) | {"message": ""} == report | {"message": ""}
    assert not [name for name, _ in again.asked if name.endswith(gone) and "truth0" not in name]


@pytest.mark.usefixtures("untrained_scores")
def test_fewer_than_three_archs_make_no_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    failing = tuple(f"truth0-{FAMILY.key(a, CTX)}" for a in drawn(4, folder)[:2])
    with pytest.raises(InputError, match=r"--check-proxy: got 2 of 4 archs .* at least 3; .*memory"):
        check_proxy(Paper(folder, config_of(), failing).run, START, 4)


def test_more_archs_than_the_band_holds_are_refused_with_their_number(tmp_path: Path) -> None:
    config = config_of(params_tolerance=0.002)
    held = count_contractions(FAMILY, SEED, CTX, band_at(FAMILY.count_params(SEED, CTX), config, 2))
    assert 3 <= held < 1000
    check_band(held, config, FAMILY, SEED, DATASET)
    check_band(None, config, FAMILY, SEED, DATASET)
    with pytest.raises(InputError, match=f"--check-proxy: got {held + 1}, want at most {held}"):
        check_band(held + 1, config, FAMILY, SEED, DATASET)
    assert named_archs(tmp_path, 4) is None
    write_json(tmp_path / "proxy_check.json", {"archs": [1, 2, 3]})
    with pytest.raises(InputError, match="--check-proxy: got 4, want the 3 archs named"):
        named_archs(tmp_path, 4)
    for wrong in (2, 1001, True, "8"):
        with pytest.raises(InputError, match="--check-proxy"):
            Session(check_proxy=wrong)  # type: ignore[arg-type]
