"""A fingerprint is identity, conditions are not; what disturbs is recorded."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.core.requirement import Setting
from nas.measure import interference as watch
from nas.measure.fingerprint import Fingerprint, take_fingerprint
from nas.measure.interference import Conditions, Watch, conditions
from space import InputError

UNDER = ("runtime", "runtime_version", "dtype", "batch", "img_size")
SETTING = Setting("cpu", "onnxruntime", "float32", 16)


def test_every_field_is_identity() -> None:
    """Another value in any one field, the setting's own included, is another fingerprint."""
    device = take_fingerprint("cpu", threads=2)
    here = device.under(SETTING, "onnxruntime 1.20", 224)
    assert take_fingerprint("cpu", threads=2) == device == dataclasses.replace(here, **dict.fromkeys(UNDER))
    assert device.torch == torch.__version__
    assert device.device_name in device.describe()
    ids = {here.id}
    for field in dataclasses.fields(here):
        value = getattr(here, field.name)
        other = value + 1 if isinstance(value, int | float) else f"other {value}"
        ids.add(dataclasses.replace(here, **{field.name: other}).id)
    assert len(ids) == 1 + len(dataclasses.fields(here))
    assert Fingerprint.from_dict(here.to_dict()) == here
    for bad in ({**here.to_dict(), "id": "0" * 12}, {"id": "x"}):
        with pytest.raises(InputError):
            Fingerprint.from_dict(bad)


def test_momentary_things_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither load nor present clock (a few MHz, as boots of one virtual machine differ by) is in the id."""
    here, real = take_fingerprint("cpu", threads=1), Path.read_text

    def faster(path: Path, *args: Any, **kwargs: Any) -> str:
        text = real(path, *args, **kwargs)
        if str(path) != "/proc/cpuinfo":
            return text
        return re.sub(r"(cpu MHz\s*: )([0-9.]+)", lambda found: f"{found[1]}{float(found[2]) + 0.003:.3f}", text)

    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.setattr(Path, "read_text", faster)
    assert take_fingerprint("cpu", threads=1).id == here.id
    assert conditions().load == 99.0


def test_conditions_are_of_the_moment() -> None:
    now = conditions()
    assert isinstance(now, Conditions)
    assert now.when.endswith("+00:00")
    assert now.load is None or now.load >= 0
    assert now.clock_mhz is None or now.clock_mhz > 100
    assert now.gpu_others is None


def test_an_absent_device_is_refused() -> None:
    names = ["tpu", "mps", ""] + ([] if torch.cuda.is_available() else ["cuda", "cuda:1"])
    for name in names:
        with pytest.raises(InputError, match="--device") as caught:
            take_fingerprint(name, threads=1)
        assert "\n" not in str(caught.value)


def scripted(monkeypatch: pytest.MonkeyPatch, *read: watch._Counters | None, moments: Any = None) -> Watch:
    """A watch whose reads give these counters of the kernel and these conditions, one after the other."""
    left, moments = list(read), list(moments or [Conditions(0.0, "now")] * 2)
    monkeypatch.setattr(watch, "_counters", lambda: left.pop(0))
    monkeypatch.setattr(watch, "conditions", lambda device: moments.pop(0))
    return Watch("cuda")


@pytest.mark.parametrize(
    ("ran", "waited", "throttled", "share"),
    [(1.0, 0.0, 0.0, 0.0), (3.0, 1.0, 0.0, 0.25), (9.0, 0.5, 0.5, 0.1), (0.0, 2.0, 0.0, 1.0), (1.0, 0.0, 3.0, 0.75)],
)
def test_waited_is_the_share_of_wanted_time(
    ran: float, waited: float, throttled: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for a core and a quota's stops count over the time that our threads wanted."""
    end = watch._Counters(5.0 + ran, 7.0 + waited, 1.0 + throttled, 0.0)
    found = scripted(monkeypatch, watch._Counters(5.0, 7.0, 1.0, 0.0), end).read()
    assert found.waited == pytest.approx(share, abs=1e-4)
    assert bool(found.text) == (share > watch.CONTENDED)


def test_time_that_the_host_steals_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stolen time is shared by all cores: half of all of it halves what we have."""
    clock = [100.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(watch.os, "cpu_count", lambda: 2)
    started = scripted(monkeypatch, watch._Counters(0.0, 0.0, 0.0, 3.0), watch._Counters(4.0, 0.0, 0.0, 7.0))
    clock[0] += 4.0
    assert started.read().waited == pytest.approx(0.5)


@pytest.mark.parametrize("read", [None, watch._Counters(1, 1, 0, 0)])
def test_a_kernel_without_counters_gives_none(read: watch._Counters | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scripted(monkeypatch, read, read).read() == watch.Disturbance(None, "")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (Conditions(0, "", 2000.0), Conditions(0, "", 2100.0), ""),
        (Conditions(0, "", 2000.0), Conditions(0, "", 1500.0), "clock"),
        (Conditions(0, "", None), Conditions(0, "", 1500.0), ""),
        (Conditions(0, "", 2000.0, 0), Conditions(0, "", 2000.0, 2), "2 other processes"),
        (Conditions(0, "", 2000.0, 1), Conditions(0, "", 1000.0, 0), "; 1 other process"),
    ],
)
def test_clocks_and_other_processes_are_described(
    before: Conditions, after: Conditions, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scripted(monkeypatch, None, None, moments=[before, after]).read()
    assert words in found.text
    assert bool(words) == bool(found.text)


def test_a_spinning_neighbour_on_our_core_is_seen() -> None:
    """Two processes on one core: each waits about half of the time."""
    if watch._counters() is None or not hasattr(os, "sched_setaffinity"):
        pytest.skip("the kernel has no counters")
    code = (
        "import os, subprocess, sys, time\n"
        "core = max(os.sched_getaffinity(0)); os.sched_setaffinity(0, {core})\n"
        "other = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "from nas.measure.interference import Watch\n"
        "try:\n"
        "    seen, until = Watch(), time.time() + 0.6\n"
        "    while time.time() < until: pass\n"
        "    print(seen.read().waited)\n"
        "finally:\n"
        "    other.kill()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert 0.2 < float(done.stdout) <= 1.0


SMI = """#!/bin/sh
echo "$@" >> "$SMI_LOG"
case "$1" in
  --query-gpu=driver_version) echo "550.54.15" ;;
  --query-gpu=clocks.max.sm) echo "1980" ;;
  --query-gpu=clocks.sm) echo "$SMI_CLOCK" ;;
  --query-gpu=clocks_event_reasons.active) [ "$SMI_DRIVER" = new ] && echo 0x1 ;;
  --query-gpu=clocks_throttle_reasons.active) [ "$SMI_DRIVER" != none ] && echo 0x1 ;;
  --query-gpu=clocks.sm,clocks_*_reasons.active) while :; do printf "$SMI_LOOKS"; sleep 0.02; done ;;
  --query-compute-apps=pid) printf "%s\\n" $SMI_PIDS ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A driver's tool that answers what the environment says; its calls are in a log."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(SMI)
    script.chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    answers = {"SMI_CLOCK": "1755", "SMI_PIDS": "", "SMI_DRIVER": "new", "SMI_LOOKS": "1755, 0x0\\n"}
    for name, value in {"PATH": path, "SMI_LOG": str(log), **answers}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cached = (watch.gpu_driver, watch.gpu_nominal_mhz, watch.gpu_has)
    for each in cached:
        each.cache_clear()
    yield log
    for each in cached:
        each.cache_clear()


def test_the_drivers_tool_is_read(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for clock in ("1755", "900"):
        monkeypatch.setenv("SMI_CLOCK", clock)
        assert (watch.gpu_driver("cuda"), watch.gpu_nominal_mhz("cuda")) == ("550.54.15", 1980.0)
        assert watch.gpu_clock_mhz("cuda") == float(clock), "a condition is asked anew"
    assert smi.read_text().count("driver_version") == 1, "identity is asked once"
    # In a container the tool lists numbers of the host: one of them is this process.
    own = os.getpid()
    for pids, others in ((f"{own} 999999 888888", 2), (f"{own}", 0), ("999999 888888", 1), ("999999", 0), ("", 0)):
        monkeypatch.setenv("SMI_PIDS", pids)
        now = conditions("cuda")
        assert (now.clock_mhz, now.gpu_others) == (900.0, others), "this process is no other process"


@pytest.mark.parametrize("driver", ["new", "old", "none"])
@pytest.mark.parametrize(
    ("looks", "words", "clock"),
    [
        ("1755, 0x0000000000000000", "", 1755.0),
        ("1755, 0x2", "", 1755.0),  # a user's setting: recorded by its clock, no disturbance
        (
            "1400, 0x4\\n210, 0x1\\n1400, 0x5",
            "throttled by the power limit 100% of the time",
            1400.0,
        ),  # idle moments do not count
        ("1900, 0x0\\n1300, 0x60", "the clock went from 1900 to 1300 MHz; throttled by temperature ", 1600.0),
        ("[N/A], [N/A]", "", None),
    ],
)
def test_throttling_is_seen_while_the_gpu_works(
    looks: str, words: str, clock: float | None, driver: str, smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks are taken beside the measurement, under the name that the driver has; nothing is set, none goes on."""
    monkeypatch.setenv("SMI_LOOKS", looks + "\\n")
    monkeypatch.setenv("SMI_DRIVER", driver)
    monkeypatch.setattr(watch, "_counters", lambda: None)
    started = Watch("cuda")
    assert started._samples is not None
    process = started._samples._process
    time.sleep(0.15)
    found = started.read()
    if driver == "none":
        assert (process, found) == (None, watch.Disturbance(None, ""))
        return
    assert found.text.startswith(words)
    assert bool(found.text) == bool(words)
    assert found.clock_mhz == (clock if clock is None else pytest.approx(clock, abs=300.0))
    assert process is not None
    assert process.poll() is not None
    asked = smi.read_text()
    assert ("clocks_throttle_reasons" in asked) == (driver == "old")
    assert not {"-lgc", "-ac", "-pm", "-pl"} & set(asked.split())


@pytest.mark.parametrize(
    ("device", "visible", "asked"),
    [
        ("cuda", None, "-i 0"),
        ("cuda:3", None, "-i 3"),
        ("cuda", "2,5", "-i 2"),
        ("cuda:1", "2,5", "-i 5"),
        ("cuda", "GPU-8f6d1b2c", "-i GPU-8f6d1b2c"),
    ],
)
def test_the_tool_is_asked_for_the_device_that_torch_uses(
    device: str, visible: str | None, asked: str, smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts within CUDA_VISIBLE_DEVICES, the driver's tool over all devices."""
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    watch.gpu_clock_mhz(device)
    assert smi.read_text().strip().endswith(asked)


def test_answers_that_are_none_are_none(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMI_CLOCK", "[N/A]")
    assert watch.gpu_clock_mhz("cuda") is None
    (smi.parent / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert watch.gpu_driver("cuda") is None
    assert watch.other_gpu_processes("cuda") is None
    monkeypatch.setenv("PATH", str(smi.parent / "nothing"))
    assert watch.gpu_clock_mhz("cuda") is None
    assert watch.gpu_nominal_mhz("cuda") is None


def test_values_import_without_torch() -> None:
    """What the driver imports must not load torch."""
    code = (
        "import sys; import nas.measure.measurement_table, nas.measure.fingerprint, "
        "nas.measure.interference, nas.measure.device_table, nas.measure.bundle, nas.measure.jobs, "
        "nas.core.requirement, "
        "nas.report, nas.report.charts, nas.report.figure, benchmarks.pareto; "
        "from nas.measure.fingerprint import take_fingerprint; take_fingerprint('cpu', threads=1); "
        "from nas.measure.runtimes import runtimes; runtimes(); "
        "assert 'torch' not in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_version_is_the_same_with_and_without_torch_loaded() -> None:
    code = (
        "from nas.measure.fingerprint import take_fingerprint as f; a = f('cpu', threads=1).id; "
        "import torch; assert a == f('cpu', threads=1).id"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
