"""Training checkpoints: model, optimizer, random state and position in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nas.core.io import write_atomic
from nas.export.weights import first_mismatch, load_into, load_weights, read_metadata, weights_bytes
from space.errors import InputError, refuse

_KEY = "nas.training"
_NAME = "training checkpoint"


@dataclass(frozen=True)
class Position:
    """Finished epochs, the settings that decide a training's bits (`plan`), the loop's own JSON."""

    epoch: int
    plan: Mapping[str, Any]
    extra: Mapping[str, Any]


def save_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    more: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write model, optimizer, random state, position and `more` atomically into one file."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    tensors |= {f"more.{k}": v for k, v in (more or {}).items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if _on_cuda(model):
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    text = json.dumps(vars(position), sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, weights_bytes(tensors, {_KEY: text}))


def load_checkpoint_into(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Mapping[str, Any],
    more: Mapping[str, torch.Tensor] | None = None,
) -> Position:
    """Restore model, optimizer, random state and `more` in place.

    Raises InputError for a damaged file and for that of a training with another `plan`.
    """
    text = read_metadata(path, name=_NAME).get(_KEY)
    if text is None:
        raise refuse(_NAME, path, "a file that this toolkit's training wrote", "remove it")
    tensors = load_weights(path, name=_NAME)
    try:
        record = json.loads(text)
        before = record["plan"]
        if before != json.loads(json.dumps(plan)):
            changed = ", ".join(sorted(k for k in plan if plan[k] != before.get(k)))
            raise refuse(_NAME, f"{path} of other settings ({changed})", "the same ones", "remove it")
        weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        mismatch = first_mismatch(model.state_dict(), weights)
        if mismatch:
            raise refuse(_NAME, f"{path}: {mismatch}", "one of this architecture", "remove it")
        load_into(model, weights, name=_NAME)
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            found = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if found:
                optimizer.state[parameter] = {k: _like(v, parameter) for k, v in found.items()}
        for name, tensor in (more or {}).items():
            tensor.copy_(tensors[f"more.{name}"])
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and _on_cuda(model):
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return Position(record["epoch"], before, record["extra"])
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        got = f"{path} ({type(error).__name__}: {error})"
        raise refuse(_NAME, got, "a whole one", "remove it") from None


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a value with the parameter's device and memory layout, as fused AdamW needs it."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _on_cuda(model: torch.nn.Module) -> bool:
    return any(p.is_cuda for p in model.parameters())
