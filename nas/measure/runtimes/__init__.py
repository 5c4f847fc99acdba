"""What executes a network: the registry of runtimes. No torch at import.

A runtime of another package joins through the entry-point group `vision_contraction.runtimes`: the entry names a
`Runtime` class.
"""

from __future__ import annotations

from importlib import metadata

from nas.core.requirement import Setting
from nas.measure.runtimes.runtime import PreparedModel, Runtime, RuntimeRequest
from space.errors import refuse

__all__ = ["PreparedModel", "Runtime", "RuntimeRequest", "check_setting", "find_runtime", "runtimes"]

ENTRY_POINTS = "vision_contraction.runtimes"


def runtimes() -> dict[str, Runtime]:
    """Return every runtime by its name, installed or not."""
    from nas.measure.runtimes import eager, from_onnx

    found: dict[str, Runtime] = {each.name: each for each in (*eager.RUNTIMES, *from_onnx.RUNTIMES)}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, entry.load()())
    return found


def find_runtime(name: str, flag: str = "--runtime") -> Runtime:
    """Return the runtime of a name; an unknown one is refused with the known ones."""
    known = runtimes()
    if name not in known:
        raise refuse(flag, name, f"one of {', '.join(known)}")
    return known[name]


def check_setting(setting: Setting, flag: str = "--runtime") -> Runtime:
    """Return a setting's runtime if it can serve it here; otherwise refuse with the remedy."""
    runtime = find_runtime(setting.runtime, flag)
    missing = runtime.missing()
    if missing:
        raise refuse(flag, setting.runtime, f"{', '.join(missing)} installed", runtime.install)
    kind = setting.device.partition(":")[0]
    if kind not in runtime.devices:
        raise refuse(flag, setting.text, f"a device of {', '.join(runtime.devices)}")
    if setting.dtype not in runtime.dtypes:
        raise refuse(flag, setting.text, f"a dtype of {', '.join(runtime.dtypes)}")
    return runtime
