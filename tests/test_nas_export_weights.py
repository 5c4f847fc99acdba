"""Laws of weights on disk: byte-stable, identified by content, and picky about what they load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from nas.export import weights
from nas.export.load import find_network
from nas.export.weights import (
    State,
    first_mismatch,
    load_into,
    load_weights,
    read_metadata,
    save_weights,
    weights_digest,
)
from space.errors import InputError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def load_checkpoint(name: str | Path) -> State:
    return find_network(name, "--seed-weights").weights()


def random_state(seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    state = {}
    for i in range(rng.integers(1, 8)):
        shape = tuple(int(n) for n in rng.integers(0, 5, size=rng.integers(0, 4)))
        values = torch.tensor(rng.normal(size=shape) * 50).to(DTYPES[rng.integers(len(DTYPES))])
        state[f"layer{i}.{'weight' if i % 2 else 'bias'}"] = values
    return state


def model(out: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, out))


def shuffled(state, seed):
    order = np.random.default_rng(seed).permutation(sorted(state))
    return {str(k): state[str(k)].clone() for k in order}


@pytest.mark.parametrize("seed", range(30))
def test_round_trip_is_exact_and_bytes_depend_on_content_alone(tmp_path, seed):
    state = random_state(seed)
    notes = {f"k{i}": str(i) for i in range(5)}
    one, two = tmp_path / "one.safetensors", tmp_path / "sub" / "two.safetensors"
    digest = save_weights(one, state, notes)
    backwards = dict(reversed(notes.items()))
    assert save_weights(two, shuffled(state, seed), backwards) == digest == weights_digest(state)
    assert one.read_bytes() == two.read_bytes()
    again = load_weights(one)
    assert first_mismatch(state, again) == ""
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    assert weights_digest(again) == digest
    assert notes.items() <= read_metadata(one).items()
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [one.name]


def test_the_header_is_sorted_whatever_the_hash_order(tmp_path):
    """safetensors itself leaves metadata in hash order, which differs between processes."""
    path = tmp_path / "w.safetensors"
    save_weights(path, {"b": torch.ones(2), "a": torch.zeros(3)}, {str(9 - i): "x" for i in range(9)})
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header) == ["__metadata__", "a", "b"]
    assert list(header["__metadata__"]) == ["format", *(str(i + 1) for i in range(9))]
    assert len(raw) % 4 == 0


@pytest.mark.parametrize("seed", range(10))
def test_digest_sees_names_shapes_types_and_values(seed):
    state = {**random_state(seed), "x": torch.arange(6.0).reshape(2, 3)}
    digests = {weights_digest(state)}
    digests.add(weights_digest({**state, "x": state["x"].reshape(3, 2)}))
    digests.add(weights_digest({**state, "x": state["x"].double()}))
    digests.add(weights_digest({**state, "y": state["x"]}))
    digests.add(weights_digest({**{k: v for k, v in state.items() if k != "x"}, "z": state["x"]}))
    changed = state["x"].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    digests.add(weights_digest({**state, "x": changed}))
    assert len(digests) == 6


def test_layout_in_memory_is_no_content():
    net = model()
    before = weights_digest(net.state_dict())
    assert weights_digest(net.to(memory_format=torch.channels_last).state_dict()) == before


def test_another_shape_is_refused_and_nothing_changes():
    net = model(3)
    before = weights_digest(net.state_dict())
    for state in (
        model(4).state_dict(),
        {k: v for k, v in net.state_dict().items() if k != "0.weight"},
        {**net.state_dict(), "extra": torch.zeros(1)},
    ):
        with pytest.raises(InputError) as caught:
            load_into(net, state, name="--seed-weights")
        assert str(caught.value).startswith("--seed-weights: got ")
        assert "\n" not in str(caught.value)
    assert weights_digest(net.state_dict()) == before


def test_new_weights_reach_a_net_with_cached_attention_biases():
    """timm's TinyViT keeps attention biases of eval mode; a load must not leave them stale."""
    from timm.models.tiny_vit import TinyVit

    kwargs = {
        "embed_dims": (32, 32, 64, 64),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "window_sizes": (2, 2, 2, 2),
        "num_classes": 3,
    }
    net = TinyVit(**kwargs).eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        net(inputs)
        state = {k: v + 1 if "attention_biases" in k else v for k, v in net.state_dict().items()}
        state = {k: torch.randn_like(v) if "attention_biases" in k else v for k, v in state.items()}
        load_into(net, state)
        fresh = TinyVit(**kwargs)
        fresh.load_state_dict(state)
        assert not net.training
        assert torch.equal(net(inputs), fresh.eval()(inputs))


@pytest.mark.parametrize("cut", [0, 4, 9, 60, -1])
def test_damaged_and_missing_files_are_refused(tmp_path, cut):
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match=r"w\.safetensors"):
        load_weights(path)
    save_weights(path, model().state_dict())
    raw = path.read_bytes()
    path.write_bytes(raw[:cut])
    for load in (load_weights, load_checkpoint):
        with pytest.raises(InputError):
            load(path)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_checkpoints_of_many_kinds_load(tmp_path, wrapper, prefix, suffix):
    state = model().state_dict()
    named = {prefix + k: v for k, v in state.items()}
    path = tmp_path / f"c{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(named, str(path))
    elif wrapper == "ema":
        worse = {k: torch.zeros_like(v) for k, v in named.items()}
        torch.save({"epoch": 3, "state_dict": worse, "state_dict_ema": named}, path)
    else:
        torch.save({"epoch": 3, wrapper: named} if wrapper else named, path)
    assert weights_digest(load_checkpoint(path)) == weights_digest(state)


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickled_code_never_runs(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save({"model": Harmful()}, path)
    with pytest.raises(InputError, match="tensors only"):
        load_checkpoint(path)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(2)])
def test_other_contents_are_refused(tmp_path, content):
    path = tmp_path / "bad.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match="state dict"):
        load_checkpoint(path)


def test_garbage_wrong_suffix_and_unknown_names_are_refused(tmp_path):
    (tmp_path / "g.pth").write_bytes(b"no checkpoint at all")
    (tmp_path / "w.onnx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for where in ("g.pth", "w.onnx", "empty", "missing.pth", "sub/missing"):
        with pytest.raises(InputError) as caught:
            load_checkpoint(tmp_path / where)
        assert "--seed-weights" in str(caught.value)
    with pytest.raises(InputError, match="a model that timm knows"):
        load_checkpoint("tiny_vat_21m")


def test_timm_tags_load_or_are_refused_with_a_remedy(monkeypatch):
    import timm

    net = model()
    calls = []

    def create(name, pretrained, **kwargs):
        calls.append((name, pretrained))
        if "offline" in name:
            raise OSError("no route to\nthe hub")
        return net

    monkeypatch.setattr(timm, "create_model", create)
    state = load_checkpoint("tiny_vit_21m_224.dist_in22k_ft_in1k")
    assert calls == [("tiny_vit_21m_224.dist_in22k_ft_in1k", True)]
    assert weights_digest(state) == weights_digest(net.state_dict())
    with pytest.raises(InputError, match="name a downloaded file"):
        load_checkpoint("tiny_vit_21m_224.offline")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        save_weights(path, {"a": torch.ones(3)})
    assert path.read_bytes() == before
