"""A whole run: what it leaves, what it refuses, and that a killed one ends like an undisturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import Finished
from run_cases import settings, table

from nas.contract import contract
from nas.contract.__main__ import main
from nas.core.executor_config import ExecutorConfig
from nas.core.table import table_columns
from nas.measure.measurement_table import MeasurementRow, MeasurementTable, read_measurements
from nas.search.study import Trial
from space import Context, get_family
from space.errors import InputError

FAMILY = get_family("tinyvit")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_workers_are_asked_for_by_name_from_python_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--workers"):
        contract("21M", "5M", out=tmp_path / "run", workers=0)
    with pytest.raises(InputError, match="one of the two"):
        contract("21M", "5M", out=tmp_path / "run", workers=2, executor_config=ExecutorConfig())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_script_without_a_main_guard_runs_with_workers(finished: Finished, tmp_path: Path) -> None:
    asked = settings(finished, cache_dir=str(finished.cache), out=str(tmp_path / "run"), workers=2)
    script = tmp_path / "script.py"
    script.write_text(f"from nas.contract import contract\nprint(contract(**{asked!r}).status)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.stdout.split() == ["reached"], done.stderr


def test_a_run_leaves_every_file_it_promises(finished: Finished) -> None:
    names = {p.name for p in finished.folder.iterdir()}
    promised = {
        *("run.json", "study.db", "measurements.csv", "trials.csv", "steps.csv", "best.json"),
        *("best.safetensors", "pareto.png", "pareto.svg", "report.md", "result.json"),
    }
    assert promised <= names
    assert not [p for p in finished.folder.rglob("*") if ".tmp" in p.name or ".part" in p.name]


def test_the_winner_meets_the_budget_and_counts_are_timms(finished: Finished) -> None:
    best = read(finished.folder / "best.json")
    context = Context(best["img_size"], best["num_classes"])
    arch = FAMILY.arch(best["arch"])
    built = sum(p.numel() for p in FAMILY.build(arch, context).parameters())
    assert best["params"] == built == FAMILY.count_params(arch, context)
    assert 360_000 <= best["params"] <= 440_000
    assert best["macs"] == FAMILY.count_macs(arch, context)
    assert {"family", "throughput", "score", "classes", "timm"} <= set(best)
    assert best["classes"] == [str(d) for d in range(10)]


LOAD = """
import json, sys, numpy as np, timm, torch
from PIL import Image
from safetensors.torch import load_file
b = json.load(open(sys.argv[1] + "/best.json"))
model = timm.create_model(b["timm"]["model"], **b["timm"]["kwargs"])
model.load_state_dict(load_file(sys.argv[1] + "/best.safetensors"), strict=True)
model.eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
x = torch.stack([transform(Image.open(f).convert("RGB")) for f in sys.argv[3:]])
with torch.no_grad():
    np.save(sys.argv[2], model(x).numpy())
assert not [m for m in sys.modules if m.split(".")[0] in ("nas", "space", "benchmarks")]
"""


def test_the_winner_loads_in_plain_timm_and_predicts_the_same(finished: Finished, tmp_path: Path) -> None:
    import torch
    from PIL import Image

    from nas.data import open_dataset
    from nas.data.augment.spec import default_spec
    from nas.data.augment.timm_engine import eval_batch
    from nas.export.weights import load_into, load_weights

    folders = [p for p in (finished.cache / "data").iterdir() if (p / "meta.json").exists()]
    dataset = open_dataset(folders[0])
    files = []
    for i in range(5):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.asarray(dataset.test.pixels[i])).save(files[-1])
    command = [sys.executable, "-c", LOAD, str(finished.folder), str(tmp_path / "y.npy"), *files]
    subprocess.run(command, check=True, cwd=tmp_path)
    best = read(finished.folder / "best.json")
    model = FAMILY.build(FAMILY.arch(best["arch"]), Context(32, 10))
    load_into(model, load_weights(finished.folder / "best.safetensors"))
    model.eval()
    with torch.no_grad():
        ours = model(eval_batch(dataset.test.pixels[:5], default_spec(dataset))).numpy()
    np.testing.assert_allclose(ours, np.load(tmp_path / "y.npy"), atol=1e-5)


def test_every_candidate_is_one_row_and_one_trial_smaller_than_its_parent_and_in_its_band(finished: Finished) -> None:
    rows = table(finished.folder / "trials.csv")
    assert tuple(rows[0]) == table_columns(Trial)
    storage = f"sqlite:///{finished.folder}/study.db"
    trials = optuna.load_study(study_name="contraction", storage=storage).trials
    assert [t.user_attrs["row"]["key"] for t in trials] == [r["key"] for r in rows]
    assert all(t.state.is_finished() for t in trials)
    params = {r["key"]: int(r["params"]) for r in rows}
    for step in table(finished.folder / "steps.csv"):
        of = [r for r in rows if r["step"] == step["step"]]
        counted = sum(int(step[k]) for k in ("too_slow", "not_selected", "failed", "scored"))
        assert int(step["candidates"]) == len(of) == counted
        assert int(step["contractions"]) >= len(of)
        for r in of:
            assert int(r["params"]) < params[r["parent"]]
            assert int(step["band_lo"]) <= int(r["params"]) <= int(step["band_hi"])
    assert all(r["reason"] for r in rows)


def test_measurements_are_stored_with_their_role(finished: Finished) -> None:
    rows = read_measurements(finished.folder / "measurements.csv")
    roles = [r.role for r in rows]
    assert roles[0] == "seed"
    assert roles.count("final") == 2 * 4, "four visits of winner and published"
    gates = {r.arch_key for r in rows if r.role == "gate"}
    assert gates == {r["key"] for r in table(finished.folder / "trials.csv")[1:]}


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def run_process(arguments: list[str], **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nas.contract", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where the tests themselves run in the background, Ctrl-C may be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,  # type: ignore[call-overload]
    )


def assert_same_answer(run: Path, truth: Path) -> None:
    assert without_times(table(run / "trials.csv")) == without_times(table(truth / "trials.csv"))
    assert (run / "best.safetensors").read_bytes() == (truth / "best.safetensors").read_bytes()
    a, b = (read(folder / "best.json") for folder in (run, truth))
    assert (a["arch"], a["score"]) == (b["arch"], b["score"])


def begun(finished: Finished, folder: Path) -> list[str]:
    """The flags of the finished run again, from the same measurements, in another folder."""
    measurements = str(finished.folder / "measurements.csv")
    return [*finished.flags, "--measurements", measurements, "--out", str(folder), "--quiet"]


def resumed(finished: Finished, folder: Path) -> list[str]:
    return ["--resume", str(folder), "--cache-dir", str(finished.cache), "--quiet"]


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(folder: Path, files: str) -> None:
    until = time.monotonic() + 300
    while not list(folder.glob(files)) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(folder.glob(files)), files


def test_a_run_killed_inside_a_step_resumes_to_the_same_answer(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = run_process(begun(finished, folder))
    wait_for(folder, "work/s1-*")  # its first candidate is in training
    kill(process)
    assert not (folder / "result.json").exists()
    assert run_process(resumed(finished, folder)).wait(timeout=300) == 0
    assert_same_answer(folder, finished.folder)


@pytest.mark.slow
def test_a_run_killed_while_it_takes_measurements_over_takes_the_rest(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, append, taken = tmp_path / "run", MeasurementTable.append, list[MeasurementRow]()

    def dying(self: MeasurementTable, row: MeasurementRow) -> None:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(row)
        append(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(MeasurementTable, "append", dying)
        assert main(begun(finished, folder)) == 130
    assert read_measurements(folder / "measurements.csv") == tuple(taken)
    assert main(resumed(finished, folder)) == 0
    assert read_measurements(folder / "measurements.csv") == read_measurements(finished.folder / "measurements.csv")
    assert_same_answer(folder, finished.folder)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [0, 1, 2, 12])
def test_kills_at_random_instants_lose_nothing(finished: Finished, tmp_path: Path, kills: int) -> None:
    rng, folder = random.Random(kills), tmp_path / "run"
    # Without the trained seed of the cache, kills fall into its training too.
    shutil.rmtree(finished.cache / "seeds", ignore_errors=True)
    arguments = begun(finished, folder)
    for _ in range(kills):
        process = run_process(arguments)
        time.sleep(rng.uniform(1.0, 15.0))
        kill(process)
        if (folder / "run.json").exists():
            arguments = resumed(finished, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # killed before the run began
    assert run_process(arguments).wait(timeout=600) == 0
    assert_same_answer(folder, finished.folder)


def test_ctrl_c_leaves_a_resumable_run_and_prints_the_command(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = run_process([*begun(finished, folder)[:-1], "--final-epochs", "40"])
    wait_for(folder, "study.db")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"python -m nas.contract --resume {folder}" in printed
    assert "Traceback" not in printed
    assert (folder / "study.db").exists()


@pytest.mark.slow
def test_max_hours_stops_in_time_naming_it_and_resumes(finished: Finished, tmp_path: Path) -> None:
    folder, started = tmp_path / "run", time.monotonic()
    more = ["--final-epochs", "2", "--json", "--max-hours", str(7 / 3600)]
    process = run_process([*begun(finished, folder), *more])
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 3, printed
    assert time.monotonic() - started < 120  # "in time", on a busy machine too
    last = json.loads(printed.splitlines()[-1])
    assert last["status"] == "stopped"
    assert "--max-hours" in last["message"]
    assert "Traceback" not in printed
    assert contract(out=folder, resume=True, cache_dir=finished.cache).status == "reached"


def test_resume_of_a_finished_run_prints_its_result(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed between result and report gets its report."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = (folder / "best.safetensors").stat().st_mtime_ns
    assert main(["--status", str(folder)]) == 0
    assert "reached" in capsys.readouterr().out.lower()
    (folder / "report.md").unlink()
    assert main(["--resume", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "reached"
    assert (folder / "report.md").exists()
    assert main(["--out", str(folder), "--resume", "--quiet"]) == 0
    outcome = contract(out=folder, resume=True)  # the same from Python
    assert (outcome.status, outcome.exit_code) == ("reached", 0)
    assert (folder / "best.safetensors").stat().st_mtime_ns == before


def test_a_speedup_out_of_reach_ends_stuck_naming_the_constraint(finished: Finished, tmp_path: Path) -> None:
    """Bounds between the floor's pace and that of the band: possible for the space, not here.

    What the floor reaches is asked first, by an impossible bound: on a busy machine it is another number.
    """
    given = settings(finished, target_params="530K", max_draws=1, candidates_per_step=2)
    del given["steps"]
    with pytest.raises(InputError, match=r"^--min-speedup: got 1000.*x the seed") as refused:
        contract(**given, out=tmp_path / "no", min_speedup=1000.0)
    assert not (tmp_path / "no").exists()
    reach = re.search(r"want about ([\d.]+)", str(refused.value))
    assert reach is not None
    outcome = contract(**given, out=tmp_path / "run", min_speedup=0.95 * float(reach[1]))
    assert (outcome.status, outcome.exit_code) == ("stuck", 3)
    assert "throughput binds" in outcome.message
    assert "nearest" in outcome.message
    assert read(tmp_path / "run" / "run.json")["config"]["steps"] == 1  # 590K to 530K is a short way
    assert {r["stage"] for r in table(tmp_path / "run" / "trials.csv")[1:]} == {"throughput"}
    assert (tmp_path / "run" / "report.md").exists()


def loose_folder(root: Path) -> tuple[Path, str]:
    """Digits without classes, and a net that is trained enough to be asked (it is not)."""
    import timm
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits

    from nas.export.weights import save_weights

    table = load_digits()
    (root / "loose").mkdir()
    for at in range(160):
        grey = np.round(table.images[at] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(grey).resize((36, 36), Image.Resampling.BICUBIC)
        image.save(root / "loose" / f"{at}.png")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("test_resnet", num_classes=7)
        save_weights(root / "teacher.safetensors", net.state_dict())
    return root / "loose", f"test_resnet:{root / 'teacher.safetensors'}"


@pytest.mark.slow
def test_images_without_classes_are_contracted_by_the_teachers(finished: Finished, tmp_path: Path) -> None:
    data, teacher = loose_folder(tmp_path)
    flags = [*finished.flags, "--data", str(data), "--teacher", teacher, "--augment", "batched"]
    at = flags.index("--max-images")
    del flags[at : at + 2]
    assert main([*flags, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert read(tmp_path / "run" / "best.json")["classes"] == [str(number) for number in range(7)]
    assert read(tmp_path / "run" / "run.json")["dataset"]["labelled_by"].startswith("test_resnet")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "every top-1 here means agreement with it" in report


@pytest.mark.slow
def test_a_store_of_other_images_serves_where_skipping_is_allowed(finished: Finished, tmp_path: Path) -> None:
    stores = [p for p in (finished.cache / "labels").iterdir() if (p / "manifest.json").exists()]
    store = next(p for p in stores if read(p / "manifest.json")["spec"]["train_images"] == 160)
    flags = [*finished.flags, "--labels", str(store), "--missing-labels", "skip", "--quiet"]
    flags[flags.index("--max-images") + 1] = "220"
    out = tmp_path / "run"
    assert main([*flags, "--label-epochs", "1", "--label-overflow", "cycle", "--out", str(out)]) == 0
    rows = table(out / "trials.csv")
    assert any(row["stage"] == "kept" for row in rows)
    assert main([*flags, "--label-epochs", "1", "--out", str(tmp_path / "strict")]) == 2
