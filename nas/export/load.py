"""The one loader of networks: what a user's name stands for, and the arch, weights or teacher of it.

`find_network` recognises a name's form: the first of `FORMS` that fits. A form offers what it holds, of `arch`,
`weights`, `teacher` and `saved`, and refuses the rest with the list of forms that have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.class_names import names_beside, names_in
from nas.core.cli import resume_flags
from nas.core.config import RunConfig
from nas.core.io import read_json
from nas.export.named_network import NamedNetwork
from nas.export.saved_model import SavedModel, read_saved_model
from space import Context, get_family
from space.errors import InputError, refuse
from space.family import Arch, Family

if TYPE_CHECKING:
    from torch import nn

    from nas.export.state_dict import LoadedState
    from nas.export.teacher_net import NetSource
    from nas.export.weights import State

AUTO_MODEL = "resnet10t"
AUTO_KWARGS: Mapping[str, Any] = {"channels": (32, 64, 128, 256), "stem_width": 16}
"""The `auto` teacher: timm's smallest residual net at half width, 1.27M parameters at 100 classes.
Convolutions learn small image sets quickly, which is all that is asked of it."""

_PICKLED = (".pt", ".pth", ".bin", ".tar", ".ckpt")
_IN_FOLDER = (
    *("model.safetensors", "best.safetensors", "weights.safetensors"),
    *("model_best.pth.tar", "last.pth.tar", "pytorch_model.bin"),
)
_CONFIG = "timm's config.json of a model"
_OF_RUN = ("best.json", "run.json", "train.json")
_RECORD = ("family", "arch", "timm", "sha256")
"""What tells a model's JSON from names of classes beside weights."""


class AutoTeacher(NamedNetwork):
    """The small net that is trained where no teacher is named."""

    words = "auto"

    def fits(self) -> bool:
        return self.name == "auto"

    def teacher(self) -> NetSource:
        from nas.export.teacher_net import NetSource

        return NetSource(AUTO_MODEL, AUTO_KWARGS)


class InlineArch(NamedNetwork):
    """The factors of an arch as JSON, or an object with `arch` and `family`."""

    words = "an arch's factors as JSON"

    def fits(self) -> bool:
        return self.name.lstrip().startswith("{")

    def arch(self, family: str = RunConfig.family) -> tuple[Family, Arch]:
        try:
            value = json.loads(self.name)
        except (ValueError, RecursionError) as error:
            raise refuse(self.flag, self.name[:60], self.words, str(error)) from None
        found = get_family(str(value.get("family", family)))
        return found, found.arch(value.get("arch", value))


class SavedNetwork(NamedNetwork):
    """A model that a run or a training saved, or the JSON of an arch alone."""

    words = "the folder of a finished run or training, or a model's JSON in it"

    def fits(self) -> bool:
        return self.path.suffix.lower() == ".json" or any((self.path / name).is_file() for name in _OF_RUN)

    @property
    def origin(self) -> str:
        return str(self._json().resolve())

    @property
    def classes(self) -> tuple[str, ...] | None:
        path = self._json()
        value = read_json(path, "a model's JSON") if path.is_file() else None
        names = value.get("classes") if isinstance(value, dict) else None
        return tuple(map(str, names)) if isinstance(names, list) else None

    def _json(self) -> Path:
        if not self.path.is_dir() or (self.path / "best.json").is_file():
            return self.path / "best.json" if self.path.is_dir() else self.path
        remedy = "name a model of its models/ instead"
        if (self.path / "run.json").is_file():
            remedy = f"finish it (python -m nas.contract {resume_flags(self.name)}), or {remedy}"
        raise refuse(self.flag, f"{self.name}, with no best.json in it", "the folder of a finished run", remedy)

    def arch(self, family: str = RunConfig.family) -> tuple[Family, Arch]:
        path = self._json()
        value = read_json(path, "an arch") if path.is_file() else None
        own = value.get("family", family) if isinstance(value, dict) else family
        return self.seed(str(own), str(path))

    def weights(self) -> State:
        return self.read(self.saved().weights).state

    def teacher(self) -> NetSource:
        from nas.export.teacher_net import net_source

        saved = self.saved()
        state = self.read(saved.weights).state if saved.state is None else saved.state
        return net_source(*saved.timm_call, state, saved.context.num_classes, saved.preprocessing)

    def saved(self) -> SavedModel:
        return read_saved_model(self._json())


class HubFolder(NamedNetwork):
    """A folder in timm's hub layout, which `timm.models.save_for_hf` and `nas.export` write."""

    words = "a folder in timm's hub layout (config.json and model.safetensors)"

    def fits(self) -> bool:
        return (self.path / "config.json").is_file()

    @property
    def classes(self) -> tuple[str, ...] | None:
        config = self.config()
        names = names_in(config, str(self.path / "config.json"), self.flag)
        if names is not None and len(names) != config.get("num_classes", len(names)):
            raise refuse(self.flag, f"{len(names)} label_names in {self.path}", f"num_classes: {config['num_classes']}")
        return names_beside(self.path / "model.safetensors", self.flag) if names is None else names

    def config(self) -> dict[str, Any]:
        """Read `config.json`. Raises InputError."""
        config = read_json(self.path / "config.json", _CONFIG)
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            raise refuse(self.flag, self.path, "a config.json naming an architecture", "see timm's hub")
        return config

    @property
    def file(self) -> Path:
        """The file with the weights. Raises InputError."""
        return _file_in(self.path, self.flag)

    def weights(self) -> State:
        return self.read(self.file).state

    def arch(self, family: str = RunConfig.family) -> tuple[Family, Arch]:
        saved = self.saved()
        return saved.family, saved.arch

    def saved(self) -> SavedModel:
        from nas.export.arch_of_weights import arch_of_timm, checkpoint_context
        from nas.export.saved_model import foreign_model

        config = self.config()
        seen: dict[str, Any] = {**config, **_preprocessing_of(config)}
        given = config.get("model_args") or {}
        try:
            channels, size = int(seen["input_size"][0]), int(seen["input_size"][-1])
            expected = Context(size, int(seen["num_classes"]), channels)
        except (LookupError, TypeError, ValueError) as error:
            raise refuse(
                self.flag, f"{self.path} ({type(error).__name__}: {error})", _CONFIG, "see timm's hub"
            ) from None
        family, arch = arch_of_timm(config["architecture"].split(".")[0], given, size, name=self.flag)
        state = self.weights()
        context = checkpoint_context(family, arch, expected, state, name=self.flag)
        classes = self.classes or ()
        return foreign_model(self.file, state, family, arch, context, classes=classes, preprocessing=seen)

    def teacher(self) -> NetSource:
        from nas.export.teacher_net import check_fits, net_source

        path, config, state = self.path / "config.json", self.config(), self.weights()
        name = config["architecture"]
        try:
            preprocess = {**config, **_preprocessing_of(config)}
            classes = int(preprocess.get("num_classes", 0)) or 1
            given = config.get("model_args") or {}
            source = net_source(name, given, state, classes, preprocess)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            got = f"{path} ({type(error).__name__}: {error})"
            raise refuse(self.flag, got, _CONFIG, "see timm's hub") from None
        check_fits(source)
        return source


class CheckpointFile(SavedNetwork):
    """A file of weights, with a model's JSON beside it where this toolkit wrote it.

    Another program's is of the timm model that it names, or of the published arch that its tensors fit.
    """

    words = f"a checkpoint ending in .safetensors, {', '.join(_PICKLED)}"

    def fits(self) -> bool:
        return self.path.is_file()

    def _json(self) -> Path:
        return self.path.with_suffix(".json")

    def _has_record(self) -> bool:
        """Return whether a model's JSON stands beside the file, and not names of its classes alone."""
        if not self._json().is_file():
            return False
        value = read_json(self._json(), "a model's JSON")
        return isinstance(value, dict) and any(name in value for name in _RECORD)

    @property
    def origin(self) -> str:
        return super().origin if self._has_record() else str(self.path.resolve())

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self._checkpoint().classes or names_beside(self.path, self.flag)

    def weights(self) -> State:
        return self._checkpoint().state

    def arch(self, family: str = RunConfig.family) -> tuple[Family, Arch]:
        if self._has_record():
            return super().arch(family)
        found, arch, _ = self._recognised(self._checkpoint(), family)
        return found, arch

    def teacher(self) -> NetSource:
        import timm

        if self._has_record():
            return super().teacher()
        loaded = self._checkpoint()
        if not timm.is_model(loaded.model):
            try:
                return super().teacher()
            except InputError:
                raise refuse(self.flag, self.name, ModelAndFile.words, "say which timm model it is") from None
        from nas.export.teacher_net import count_classes, net_source

        given = loaded.model_args
        classes = count_classes(loaded.model, loaded.state, given)
        return net_source(loaded.model, given, loaded.state, classes, loaded.preprocessing())

    def saved(self) -> SavedModel:
        from nas.export.saved_model import foreign_model

        if self._has_record():
            return super().saved()
        loaded = self._checkpoint()
        family, arch, context = self._recognised(loaded, RunConfig.family)
        model, _ = family.timm_call(arch, context)
        seen = loaded.preprocessing(model)
        return foreign_model(
            self.path, loaded.state, family, arch, context, classes=self.classes or (), preprocessing=seen
        )

    def _checkpoint(self) -> LoadedState:
        if self.path.suffix.lower() not in (".safetensors", *_PICKLED):
            raise refuse(self.flag, self.name, self.words, "convert it with safetensors.torch.save_file")
        return self.read(self.path)

    def _recognised(self, loaded: LoadedState, family: str) -> tuple[Family, Arch, Context]:
        """Find the arch and context of another program's weights."""
        import timm

        from nas.export.arch_of_weights import arch_of_state, arch_of_timm, checkpoint_context

        channels, size, _ = loaded.preprocessing()["input_size"]
        context = Context(size, 1000, channels)
        if not timm.is_model(loaded.model):
            return arch_of_state(loaded.state, family, context, name=self.flag)
        found, arch = arch_of_timm(loaded.model, loaded.model_args, size, name=self.flag)
        return found, arch, checkpoint_context(found, arch, context, loaded.state, name=self.flag)


class WeightsFolder(CheckpointFile):
    """Any other folder, such as the output of timm's training script."""

    words = f"a folder with {', '.join(_IN_FOLDER)}"

    def fits(self) -> bool:
        if not self.path.is_dir():
            return False
        self._folder, self.path = self.path, next(filter(Path.is_file, map(self.path.joinpath, _IN_FOLDER)), self.path)
        return True

    def _checkpoint(self) -> LoadedState:
        return self.read(_file_in(self._folder, self.flag))


class ModelAndFile(NamedNetwork):
    """A timm model with the weights of a checkpoint."""

    words = "MODEL:FILE such as resnet18:weights.safetensors"

    def fits(self) -> bool:
        self.model, colon, file = self.name.partition(":")
        self.path = Path(file).expanduser()
        if not colon:
            return False
        import timm

        return timm.is_model(self.model)

    @property
    def classes(self) -> tuple[str, ...] | None:
        if not self.path.is_file():
            return None
        return self.read(self.path).classes or names_beside(self.path, self.flag)

    def weights(self) -> State:
        from nas.export.teacher_net import in_timms_names

        if not self.path.is_file():
            raise refuse(self.flag, self.name, "a checkpoint file after the colon", "check the path")
        loaded = self.read(self.path)
        state = in_timms_names(self.model, loaded.state)
        if state is not loaded.state:
            self.notes = (*loaded.notes, f"{self.path.name}: names of weights changed by timm's rule for {self.model}")
        return state

    def teacher(self) -> NetSource:
        import timm

        from nas.export.teacher_net import count_classes, net_source

        state = self.weights()
        classes = count_classes(self.model, state, {})
        found: Any = timm.get_pretrained_cfg(self.model, allow_unregistered=True)
        config = dict(found.to_dict()) if found is not None else {}
        return net_source(self.model, {}, state, classes, config, always_resize=False)


class ModelName(NamedNetwork):
    """A published name of a family, or a model that timm knows; any other text, too."""

    words = "a published name such as 5M, or a timm model"

    def fits(self) -> bool:
        return True

    @property
    def classes(self) -> tuple[str, ...] | None:
        """WordNet's ids, as timm counts ImageNet's classes, where its weights have as many."""
        if self._model is None:
            return None
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(self._model)
        info: Any = None if subset is None else ImageNetInfo(subset)
        return None if info is None else tuple(info.label_names())

    def arch(self, family: str = RunConfig.family) -> tuple[Family, Arch]:
        return self.seed(family, self.name)

    def weights(self) -> State:
        return dict(self._load().state_dict())

    def teacher(self) -> NetSource:
        from nas.export.teacher_net import net_source

        model = self._load()
        config: Mapping[str, Any] = dict(getattr(model, "pretrained_cfg", {}) or {})
        classes = int(getattr(model, "num_classes", 0)) or 1
        return net_source(self.name, {}, dict(model.state_dict()), classes, config)

    def _load(self) -> nn.Module:
        """Load a timm model with its pretrained weights, once."""
        import timm

        if self._model is not None:
            return self._model

        tag = self.name
        if self.path.suffix in (".safetensors", *_PICKLED) or len(self.path.parts) > 1:
            raise refuse(self.flag, tag, "an existing file or a timm model", "check the path")
        if not timm.is_model(tag.split(".")[0]):
            close = timm.list_models(f"*{tag.split('_')[0].split('.')[0]}*")[:4]
            hint = f"for example {', '.join(close)}" if close else "see timm.list_models()"
            raise refuse(self.flag, tag, "a file, or a model that timm knows", hint)
        try:
            model: nn.Module = timm.create_model(tag, pretrained=True)
        except Exception as error:  # hubs raise their own kinds; every one means "not to be had"
            got = f"{tag} ({type(error).__name__}: {str(error)[:80]})"
            want = "a timm model whose pretrained weights can be fetched"
            remedy = "check the tag and the network, or name a downloaded file"
            raise refuse(self.flag, got, want, remedy) from error
        self._model = model
        return model


FORMS: tuple[type[NamedNetwork], ...] = (
    *(AutoTeacher, InlineArch, SavedNetwork, HubFolder),
    *(WeightsFolder, CheckpointFile, ModelAndFile, ModelName),
)
NamedNetwork.forms = FORMS


def find_network(name: str | Path, flag: str) -> NamedNetwork:
    """Recognise what a user names under `flag`; nothing is loaded yet."""
    try:
        return next(named for named in (form(str(name), flag) for form in FORMS) if named.fits())
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, no such user after "~"
        raise refuse(flag, f"{name} ({error})", "the name of a network") from None


def _preprocessing_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json with the preprocessing; empty where there is none."""
    found = config.get("pretrained_cfg") or {}
    return found if isinstance(found, dict) else {}


def _file_in(folder: Path, flag: str) -> Path:
    """Find the weights in a folder. Raises InputError."""
    file = next((folder / name for name in _IN_FOLDER if (folder / name).is_file()), None)
    if file is None:
        raise refuse(flag, folder, f"{WeightsFolder.words}; or {SavedNetwork.words}", "name the file itself")
    return file
