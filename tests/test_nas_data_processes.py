"""Data sets in processes of their own: kills at any moment, and the memory of an open set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from nas.data import DataSpec, open_dataset, prepare, relabelled
from nas.data.cache import cache_report, clean_cache
cache, images = Path(sys.argv[2]), sys.argv[1]
spec, data = DataSpec(images, img_size=16), cache / "data"

def build():
    return prepare(spec, cache)

def relabel():
    made = prepare(spec, cache)
    labels = {s: np.zeros(len(getattr(made, s)), dtype=np.int64) for s in SIDES}
    return relabelled(made, cache, labels, ("x", "y"), "teacher")

def remove():
    clean_cache(cache, 0)

SIDES = ("train", "holdout", "test")

def child(act, at=None):
    pid = os.fork()
    if pid == 0:
        seen = [0]
        def hook(event, args):
            if args and str(args[0]).startswith(str(cache)) and event != "os.listdir":
                seen[0] += 1
                if seen[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        if at is not None:
            sys.addaudithook(hook)
        act()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

def check():
    for row in cache_report(cache):
        open_dataset(data / row["name"], verify=True)
        assert "." not in row["name"], row
    os._exit(0)

def whole():
    names = [p.name for p in data.iterdir() if p.is_dir()]
    assert not any("." in name for name in names), names
    return len(names)

for act, before, sets in ((build, None, 1), (relabel, build, 2), (remove, relabel, 0)):
    at, step, kills, ended = 1, int(sys.argv[3]), 0, False
    while not ended:
        child(remove)
        if before is not None:
            child(before)
        ended = child(act, at)
        kills += not ended
        child(check)
        if act is remove:
            child(remove)
        else:
            # What the kill left of this set goes when it is built again, that of others when
            # room is made or the cache is cleaned.
            child(act)
        assert whole() == sets, (act.__name__, at)
        at += step
    print(act.__name__, kills)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts on fork and on Linux's file events")
def test_kills_at_any_moment_leave_nothing_half(tmp_path: Path) -> None:
    for at in range(6):
        path = tmp_path / "images" / f"{at}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (at, 1, 2)).save(path)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "images"), str(tmp_path / "c"), "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kills = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert kills["build"] >= 5
    assert kills["relabel"] >= 7
    assert kills["remove"] >= 2


_MEMORY = """
import os, sys
from pathlib import Path
import numpy as np
from nas.data.split import content_key
from nas.data.cache import cached
from nas.data.sources import DataSource

def source(n):
    def fill(pool, tick):
        pixels = np.zeros((1, 1, 3), dtype=np.uint8)
        for at in range(n):
            pool.add(content_key(str(at).encode()), 0, "any", pixels, f"some/folder/{at:09d}.jpg")
    return DataSource(f"n{n}", (), 1, 1, True, {}, "none", n, fill)

for n in (1000, 60_000):
    folder = cached(source(n), 0, 0.0, Path(sys.argv[1]), lambda _: None).folder
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], str(folder)])
    os.wait()
"""
_OPENED = """
import sys
from nas.data import open_dataset
def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
before = private()
dataset = open_dataset(sys.argv[1])
dataset.train.keys[7], dataset.train.names[-1], dataset.train.labels[3], dataset.train.pixels[1]
print(private() - before, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_open_data_set_takes_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path), _OPENED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    small, large = (int(line) for line in done.stdout.split())
    # 59,000 images more: one byte of each would be 58 KiB; 16 of a key and 30 of a name 2,650 KiB.
    assert large - small < 600, (small, large)
