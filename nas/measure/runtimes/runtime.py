"""The interface of a runtime: what it is given, what it gives back. No torch at import."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nas.core.requirement import Setting
from nas.measure.fingerprint import version_of
from nas.measure.interleave import Timer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    Images = npt.NDArray[np.float32]


@dataclass
class RuntimeRequest:
    """What a runtime is to prepare: a network and the images `[batch, c, h, w]` to time it on.

    `model` is the runtime's own copy: in eval mode, float32, on the CPU, without gradients. `work` is a folder for its
    files. `calibration` are further batches of the same shape, for int8. `staged` is the file that `Runtime.stage`
    wrote, perhaps in another process; the model is None then.
    """

    model: nn.Module | None
    images: Tensor
    setting: Setting
    threads: int
    work: Path
    calibration: Sequence[Images] = ()
    staged: Path | None = None

    @property
    def net(self) -> nn.Module:
        """The model, where there must be one."""
        assert self.model is not None, "a request without a model is for what was staged"
        return self.model


@dataclass
class PreparedModel:
    """A network that is ready to be timed.

    `timer` runs passes over the request's images; `logits` gives `[batch, classes]` in float32 for other images of the
    same shape; `done` describes what was done to the network, as it is recorded.
    """

    timer: Timer
    logits: Callable[[Images], Images]
    done: str
    close: Callable[[], None] = field(default=lambda: None)


class Runtime(ABC):
    """One way to execute a network.

    `needs` are the packages that must be importable, `install` the line that installs them; `executes` those whose
    versions decide the speed. `tolerance` gives, by dtype, the largest difference of the logits from eager float32 that
    still counts as the same network, as a share of the largest logit; None where a runtime changes the network on
    purpose (int8), so that only its accuracy is comparable.
    """

    name: str
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    executes: ClassVar[tuple[str, ...]] = ("torch",)
    install: ClassVar[str] = "pip install torch"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    tolerance: ClassVar[Mapping[str, float] | None] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
    calibrates: ClassVar[bool] = False

    def stage(self, request: RuntimeRequest) -> Path | None:
        """Write the file that is deployed, in `request.work`; None where the model itself runs."""
        return None

    @abstractmethod
    def prepare(self, request: RuntimeRequest) -> PreparedModel:
        """Make the network ready. Whatever the runtime raises comes through as it is."""

    def version(self) -> str:
        """Return the versions of what executes, for the fingerprint."""
        return " ".join(f"{name} {version_of(name)}" for name in self.executes)

    def missing(self) -> list[str]:
        """Return the needed packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]
