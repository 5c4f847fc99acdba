"""A network by the name that a user gave: what every form of a name offers (`nas.export.load` has the forms)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nas.core.config import RunConfig
from space import get_family
from space.errors import InputError, refuse
from space.family import Arch, Family

if TYPE_CHECKING:
    from torch import nn

    from nas.export.saved_model import SavedModel
    from nas.export.state_dict import LoadedState
    from nas.export.teacher_net import NetSource
    from nas.export.weights import State


class NamedNetwork(ABC):
    """A network by the name that a user gave to `flag`. Its methods raise InputError about the flag."""

    words: ClassVar[str]
    """How the form is described to users."""
    forms: ClassVar[tuple[type[NamedNetwork], ...]] = ()
    """Every form that a name may have; the first that fits is taken."""

    def __init__(self, name: str, flag: str) -> None:
        self.name, self.flag, self.path = name, flag, Path(name).expanduser()
        self.notes: tuple[str, ...] = ()
        """What was decided on reading the weights, for the user."""
        self._loaded: dict[Path, LoadedState] = {}
        self._model: nn.Module | None = None

    @abstractmethod
    def fits(self) -> bool:
        """Return whether the name has this form."""

    @property
    def origin(self) -> str:
        """The file that the arch is read from, or the name."""
        return self.name

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes of its head, in order; None where it carries none. Raises InputError."""
        return None

    def arch(self, family: str = RunConfig.family) -> tuple[Family, Arch]:
        """Return the arch, of `family` unless a file names its own."""
        raise self.without("arch")

    def weights(self) -> State:
        """Load the weights alone."""
        raise self.without("weights")

    def teacher(self) -> NetSource:
        """Load the net to make a teacher of."""
        raise self.without("teacher")

    def saved(self) -> SavedModel:
        """Read and check the model of a run or a training."""
        raise self.without("saved")

    def without(self, what: str) -> InputError:
        """Return the refusal of a form that has no such thing, with those that do."""
        forms = [form.words for form in self.forms if getattr(form, what) is not getattr(NamedNetwork, what)]
        return refuse(self.flag, self.name, "; or ".join(forms))

    def read(self, path: Path) -> LoadedState:
        """Read a file once; its tensors are mapped."""
        from nas.export.state_dict import load_state

        if path not in self._loaded:
            self._loaded[path] = load_state(path, self.flag)
            self.notes = self._loaded[path].notes
        return self._loaded[path]

    def seed(self, family: str, name: str) -> tuple[Family, Arch]:
        """Return the arch that a family knows by a name."""
        found = get_family(family)
        try:
            return found, found.seed(name)
        except InputError as error:
            raise InputError(str(error).replace("--seed", self.flag, 1)) from None
