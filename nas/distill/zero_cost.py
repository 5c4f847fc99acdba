"""Zero-cost proxies: scores of an untrained net from one batch, as their authors define them; higher is better.

Differences for vision transformers are named where they are. All work is done on a copy of the net.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from nas.distill.student import start_model
from nas.labels.reader import Batch
from nas.train.losses import DistillLoss, TeacherTargets
from space import Context
from space.errors import refuse
from space.family import Arch, Family

ZERO_COST = ("grad_norm", "snip", "synflow", "naswot")

Loss = Callable[[Tensor], Tensor]
"""From logits [B, C] to a loss, a scalar or one per image."""

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers whose weights count, as in the published code: no norms, no biases."""
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)


def grad_norm(model: nn.Module, inputs: Tensor, loss: Loss) -> float:
    """Return the sum over layers of the Euclidean norm of their weights' gradient.

    inputs [B, C, S, S]. Train mode (batch statistics), without dropout. Source: Abdelfattah et al., "Zero-Cost Proxies
    for Lightweight NAS", ICLR 2021.
    """
    layers = _with_gradients(model, inputs, loss)
    return float(sum(grad.double().norm() for _, grad in layers))


def snip(model: nn.Module, inputs: Tensor, loss: Loss) -> float:
    """Return the sum over weights of |weight * gradient|: what removing each would change.

    As `grad_norm`. Source: Lee et al., "SNIP", ICLR 2019, summed over a net as by Abdelfattah et al. (ICLR 2021).
    Unchanged when a layer before a batch norm is scaled.
    """
    layers = _with_gradients(model, inputs, loss)
    return float(sum((weight.double() * grad.double()).abs().sum() for weight, grad in layers))


def synflow(model: nn.Module, inputs: Tensor) -> float:
    """Return the sum over weights of weight * dR/dweight, R the summed output on absolute weights.

    Only the shape [*, C, S, S] of `inputs` counts: the input is one image of ones. Float64, in which nets of the 21M
    kind stay far from overflow. Source: Tanaka et al., "Pruning neural networks without any data", NeurIPS 2020,
    summed over a net as by Abdelfattah et al.

    The method needs a net that is linear on positive signals. The published code makes rectifier nets so by absolute
    parameters and by leaving batch norms out. Here layer norms are left out too, smooth rectifiers (GELU, SiLU, ...)
    are the identity, as ReLU is there, and attention gives each token the mean of the values, which is what softmax
    does where all tokens look alike; queries and keys thereby carry no flow. Without biases, each layer that all paths
    cross then contributes R exactly.
    """
    net = _copied(model).double()
    for parameter in net.parameters():
        parameter.data.abs_()
    for module in net.modules():
        if isinstance(module, (*NORMS, *ACTIVATIONS)):
            _pass_through(module)
    ones = torch.ones((1, *inputs.shape[1:]), dtype=torch.float64, device=inputs.device)
    with torch.enable_grad(), _EvenAttention():
        torch.autograd.backward(net(ones).sum())
    layers = _gradients(net)
    return float(sum((weight * grad).abs().sum() for weight, grad in layers))


def naswot(model: nn.Module, inputs: Tensor) -> float:
    """Return the log-determinant of how alike the images' activation codes are.

    inputs [B, C, S, S], B >= 2. An image's code has a bit for each unit of each activation module: whether its input
    is positive (for GELU and its like: the side of the bend). The kernel [B, B] counts equal bits. Batch statistics,
    as published. Where images share all bits the determinant is 0: eigenvalues below B * 2.2e-16 of the largest count
    as that, so that the score is very low but finite. Source: Mellor et al., "Neural Architecture Search without
    Training", ICML 2021. Raises InputError for a net without activation modules.
    """
    net, images = _copied(model), len(inputs)
    kernel = torch.zeros((images, images), dtype=torch.float64)

    def count(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        # Windows or tokens folded into the first dimension stay with their image.
        bits = (given[0].reshape(images, -1) > 0).to(torch.float32)
        # Units in slices: sums of bits stay exact in float32.
        for start in range(0, bits.shape[1], 1 << 22):
            part = bits[:, start : start + (1 << 22)]
            equal = part @ part.T + (1 - part) @ (1 - part).T
            kernel.add_(equal.to("cpu", torch.float64))

    found = [m for m in net.modules() if isinstance(m, ACTIVATIONS)]
    if not found:
        raise refuse("naswot", "a net without activation modules", "at least one, e.g. nn.GELU")
    for module in found:
        module.register_forward_pre_hook(count)
    with torch.no_grad():
        net(inputs)
    values = torch.linalg.eigvalsh(kernel)
    least = images * torch.finfo(torch.float64).eps * values[-1]
    return float(values.clamp_min(least).log().sum())


def zero_cost_scores(
    family: Family, arch: Arch, ctx: Context, batch: Batch, *, random_seed: int, device: str = "cpu"
) -> dict[str, float]:
    """Score an arch with the weights that `random_seed` gives it, by all of `ZERO_COST`.

    The loss is that of the proxy on the batch's stored labels. Raises InputError.
    """
    model, _ = start_model(family, arch, ctx, random_seed=random_seed)
    model.to(device)
    here = batch.to(device)
    targets = TeacherTargets(index=here.index, prob=here.prob, tail=here.tail)

    def loss(logits: Tensor) -> Tensor:
        return DistillLoss()(logits, here.truth, targets)

    return {
        "grad_norm": grad_norm(model, here.inputs, loss),
        "snip": snip(model, here.inputs, loss),
        "synflow": synflow(model, here.inputs),
        "naswot": naswot(model, here.inputs),
    }


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model, in train mode but for what draws random numbers, without gradients."""
    modes = {module: module.training for module in model.modules()}
    model.train()  # drops what eval mode may have cached: a graph cannot be copied
    try:
        net = copy.deepcopy(model)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for module in net.modules():
        if isinstance(module, (_DropoutNd, DropPath)):
            module.eval()
    for parameter in net.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return net


def _with_gradients(model: nn.Module, inputs: Tensor, loss: Loss) -> list[tuple[Tensor, Tensor]]:
    net = _copied(model)
    with torch.enable_grad():
        torch.autograd.backward(loss(net(inputs)).mean())
    return _gradients(net)


def _gradients(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weights and gradients of the layers that count; those that the output ignores have none."""
    layers = (m for m in net.modules() if isinstance(m, WEIGHTED))
    return [(m.weight.detach(), m.weight.grad) for m in layers if m.weight.grad is not None]


def _pass_through(module: nn.Module) -> None:
    module.forward = lambda x, *_, **__: x


class _EvenAttention(TorchFunctionMode):
    """Makes softmax give all the same weight, in fused attention too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            query, _, value = (args[i] if i < len(args) else kwargs[k] for i, k in enumerate(names))
            mean = value.mean(-2, keepdim=True)
            return mean.expand(*value.shape[:-2], query.shape[-2], value.shape[-1])
        if func in (torch.softmax, Tensor.softmax, F.softmax):
            given = args[0] if args else kwargs["input"]
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return torch.full_like(given, 1 / given.shape[dim])
        return func(*args, **kwargs)
