"""The primitives as torch modules, for shared (supernet) and standalone use alike.

Every operation takes a node's value and its ReLU, so that the ReLU is computed once for all edges
that leave the node. Tensors are (B, C, H, W), channels-last in memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natlib.primitives import Primitive

EPSILON = 1e-5
MOMENTUM = 0.1


@cache
def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, where the C library is glibc.

    A training step frees and takes the same blocks again. By default large ones go back to the
    system at once, and each new one is cleared page by page: up to a third of a step's time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_max = -1, -4  # names of malloc.h
            mallopt(trim_threshold, -1)
            mallopt(mmap_max, 0)


class BatchNorm(nn.Module):
    """Batch norm in one of two forms.

    ``shared``: always the batch's own statistics and, by default, no affine parameters, as in the
    papers' supernet. Otherwise running statistics, by default affine. Where no gradient is recorded
    the result may take the input's place: nothing else may need what a batch norm gets.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    variance: Tensor | None

    def __init__(self, channels: int, shared: bool, affine: bool | None = None) -> None:
        super().__init__()
        affine = not shared if affine is None else affine
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(channels)) if affine else None
        self.bias = nn.Parameter(torch.empty(channels)) if affine else None
        self.register_buffer("mean", None if shared else torch.empty(channels))
        self.register_buffer("variance", None if shared else torch.empty(channels))

    def reset(self) -> None:
        """Set scale and variance to 1, shift and mean to 0."""
        with torch.no_grad():
            for value, tensor in (
                (1, self.weight), (0, self.bias), (0, self.mean), (1, self.variance)
            ):  # fmt: skip
                if tensor is not None:
                    tensor.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or self.mean is None
        if not (batch and _few_channels(x)):
            return F.batch_norm(
                x, self.mean, self.variance, self.weight, self.bias, batch, MOMENTUM, EPSILON
            )
        records = torch.is_grad_enabled()
        norm: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(
            _tiled_norm, inplace=not records
        )
        if records and (x.requires_grad or (self.weight is not None and self.weight.requires_grad)):
            norm = _TiledNorm.apply
        y, mean, variance = norm(x, self.weight, self.bias)
        if self.mean is not None and self.variance is not None:
            n = x.numel() // x.shape[1]
            with torch.no_grad():
                self.mean.lerp_(mean, MOMENTUM)
                self.variance.lerp_(variance * (n / (n - 1)), MOMENTUM)
        return y


def _few_channels(x: Tensor) -> bool:
    """Whether ``_TiledNorm`` beats the built-in, as measured on CPUs.

    The built-in is slow with few channels: on one thread with those that do not fill vector
    registers, on several (up to seven times) with all.
    """
    c = x.shape[1]
    if torch.get_num_threads() > 1:
        few = c <= 40 and x.numel() >= 20_000
    else:
        few = (c < 16 or (c < 32 and c % 8 > 0)) and x.numel() >= 200_000
    return few and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)


def _tiles(x: Tensor) -> int:
    """How many pixels ``_tiled_norm`` takes as one row."""
    pixels, tiles = x.numel() // x.shape[1], 1
    while tiles * x.shape[1] < 256 and pixels % (2 * tiles) == 0:
        tiles *= 2
    return tiles


def _tiled_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the batch's own statistics; CPU, channels-last.

    The built-in walks along channels, and few of them fill no vector register. Here several pixels
    count as one row of so many times more channels, whose statistics are then pooled. Returns the
    result (``inplace``: in place of x), the mean, and the variance (biased).
    """
    b, c, h, w = x.shape
    tiles = _tiles(x)
    rows = x.permute(0, 2, 3, 1).reshape(-1, tiles * c)
    means, variances = torch.batch_norm_update_stats(rows, None, None, MOMENTUM)
    between, mean = torch.var_mean(means.view(tiles, c), 0, correction=0)
    variance = variances.view(tiles, c).mean(0).add_(between)
    scale = (variance + EPSILON).rsqrt_()
    if weight is not None:
        scale *= weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    shift, factor = torch.stack([shift, scale]).repeat(1, tiles)
    y = torch.addcmul(shift, rows, factor, out=rows if inplace else None)
    return y.view(b, h, w, c).permute(0, 3, 1, 2), mean, variance


class _TiledNorm(torch.autograd.Function):
    """``_tiled_norm`` with its gradients to x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance = _tiled_norm(x, weight, bias)
        ctx.save_for_backward(x, weight, mean, (variance + EPSILON).rsqrt_())
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, mean, scale = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        b, c, h, w = x.shape
        affine = weight is not None
        backward = torch.ops.aten.native_batch_norm_backward
        out: tuple[Tensor, Tensor | None, Tensor | None]
        if c % 8 == 0 and torch.get_num_threads() == 1:
            out = backward(
                grad, x, weight, None, None, mean, scale, True, EPSILON, [True, affine, affine]
            )
            return out
        # With g the gradient and s = 1 / sd: to the weight s sum(g (x - mean(x))), to the bias
        # sum(g), to x weight s (g - mean(g) - s^2 (x - mean(x)) mean(g (x - mean(x)))). The
        # built-in takes both sums in one pass.
        tiles, n = _tiles(x), x.numel() // c
        g = grad.permute(0, 2, 3, 1).reshape(-1, tiles * c)
        rows = x.permute(0, 2, 3, 1).reshape(-1, tiles * c)
        means, scales = torch.stack([mean, scale]).repeat(1, tiles)
        sums = backward(
            g, rows, None, None, None, means, scales, True, EPSILON, [False, True, True]
        )
        to_weight, g_sum = (s.view(tiles, c).sum(0) for s in sums[1:])
        factor = scale if weight is None else scale * weight
        slope = to_weight * (factor * scale / n)
        shift = slope * mean - factor * (g_sum / n)
        terms = torch.stack([shift, factor, -slope]).repeat(1, tiles)
        to_x = torch.addcmul(terms[0], g, terms[1]).addcmul_(rows, terms[2])
        to_x = to_x.view(b, h, w, c).permute(0, 3, 1, 2)
        return to_x, to_weight if affine else None, g_sum if affine else None


def _as_product(x: Tensor) -> bool:
    """Whether a matrix product beats a 1x1 convolution of x on this processor: as measured."""
    return x.numel() <= 100_000 or torch.backends.cpu.get_cpu_capability() == "AVX512"


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution 1x1 of stride 1: x (B, C, H, W), weight (D, C, 1, 1).

    In channels-last memory it is a matrix product, which the CPU library computes faster than a
    convolution: always where it has AVX-512 (1.2 to 4 times), else where images are small.
    """
    if traced() or x.device.type != "cpu" or not _as_product(x):
        return F.conv2d(x, weight)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


class Conv(nn.Module):
    """Convolution without bias, weights only: (out, in / groups, height, width).

    ``pad`` adds a border of half the kernel; depthwise ones have it always.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        groups: int = 1,
        pad: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, *kernel))
        self.stride = stride
        self.padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.groups = groups
        self.pointwise = kernel == (1, 1) and stride == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            return depthwise(x, self.weight, self.stride[0])
        if self.pointwise:
            return pointwise(x, self.weight)
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


def depthwise(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Depthwise convolution with "same" padding: x (B, C, H, W), weight (C, 1, k, k), k odd."""
    c, k = x.shape[1], weight.shape[2]
    plain = x.device.type != "cpu" or (stride > 1 and k == 3)
    if plain or not torch.is_grad_enabled() or not weight.requires_grad:
        return F.conv2d(x, weight, None, stride, k // 2, 1, c)
    apply: Callable[..., Tensor] = _Depthwise.apply
    return apply(x, weight, stride)


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution whose gradients keep to the CPU library's fast paths.

    Gradients of weights are slow there (up to 60 times) for kernels over three wide or higher than
    the image. So kernels are cut to what the image can reach, images filled up with zeros to the
    kernel's height, and a 5 x 5 gradient is taken as two that are three wide.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        c, k = x.shape[1], weight.shape[2]
        to_x = None
        if ctx.needs_input_grad[0]:
            if ctx.stride == 1 and c <= 32:
                to_x = F.conv2d(grad, weight.flip(2, 3), None, 1, k // 2, 1, c)
            else:
                to_x = _convolution_backward(grad, x, weight, ctx.stride, (k // 2, k // 2), 0)
        return to_x, depthwise_weight_gradient(grad, x, k, ctx.stride), None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], which: int
) -> Tensor:
    """Gradient of a depthwise convolution to x (``which`` 0) or weight (1)."""
    mask = [which == 0, which == 1, False]
    out: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], x.shape[1], mask
    )
    return out[which]


def depthwise_weight_gradient(grad: Tensor, x: Tensor, k: int, stride: int) -> Tensor:
    """Gradient (C, 1, k, k) of ``depthwise`` to its weight, from that to its output and from x."""
    c, h, w = x.shape[1:]
    high, wide = min(k, 2 * h - 1), min(k, 2 * w - 1)
    if h < high or w < wide:
        # Zeros below and to the right add nothing, if there are none too few for the kernel.
        h, w = max(h, high), max(w, wide)
        x = F.pad(x, (0, w - x.shape[3], 0, h - x.shape[2]))
        rows, columns = (h - 1) // stride + 1, (w - 1) // stride + 1
        grad = F.pad(grad, (0, columns - grad.shape[3], 0, rows - grad.shape[2]))

    def part(x: Tensor, wide: int, pad: int) -> Tensor:
        like = x.new_empty(c, 1, high, wide)
        return _convolution_backward(grad, x, like, stride, (high // 2, pad), 1)

    if wide == 5 and stride == 1:
        left, right = part(F.pad(x, (2, 0)), 3, 0), part(F.pad(x, (0, 2)), 3, 0)
        out = torch.cat([left, right[..., 1:]], 3)
    else:
        out = part(x, wide, wide // 2)
    spare = (k - wide) // 2, (k - high) // 2
    return F.pad(out, (spare[0], spare[0], spare[1], spare[1])) if any(spare) else out


def traced() -> bool:
    """Whether an exporter or compiler reads the operations: it gets plain ones, without detours."""
    return torch.compiler.is_compiling()


class DilatedDepthwise(nn.Module):
    """Depthwise convolution of dilation 2, computed as plain ones on phase images.

    At stride 1 the four images of even and odd rows and columns are convolved on their own, at
    stride 2 only the even one is needed: equal results, and several times faster on a CPU than
    dilated kernels.
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, kernel))
        self.stride = stride
        self.pad = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if traced() or self.stride > 2:
            return F.conv2d(x, self.weight, None, self.stride, 2 * self.pad, 2, c)
        if self.stride == 2:
            return depthwise(phases(x, 0)[0], self.weight)
        if h % 2 or w % 2:
            return F.conv2d(x, self.weight, None, 1, 2 * self.pad, 2, c)
        # (b, h/2, 2, w/2, 2, c) -> (b, 2, 2, h/2, w/2, c): phases become batch entries.
        nhwc = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c)
        images = nhwc.permute(0, 2, 4, 1, 3, 5).reshape(4 * b, h // 2, w // 2, c)
        y = depthwise(images.permute(0, 3, 1, 2), self.weight)
        nhwc = y.permute(0, 2, 3, 1).reshape(b, 2, 2, h // 2, w // 2, c)
        return nhwc.permute(0, 3, 1, 4, 2, 5).reshape(b, h, w, c).permute(0, 3, 1, 2)


class _Phases(torch.autograd.Function):
    """``x[:, :, k::2, k::2]`` for each start k, dense, with one gradient filled for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *starts: int) -> tuple[Tensor, ...]:
        ctx.like, ctx.starts = x.shape, starts
        return tuple(
            x[:, :, k::2, k::2].contiguous(memory_format=torch.channels_last) for k in starts
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        b, c, h, w = ctx.like
        out = grads[0].new_zeros((b, h, w, c)).permute(0, 3, 1, 2)
        for k, grad in zip(ctx.starts, grads, strict=True):
            out[:, :, k::2, k::2] = grad
        return (out, *(None for _ in grads))


def phases(x: Tensor, *starts: int) -> tuple[Tensor, ...]:
    """Every second pixel of each axis, from each start (0 or 1) on, dense in channels-last."""
    if traced():
        return tuple(x[:, :, k::2, k::2] for k in starts)
    apply: Callable[..., tuple[Tensor, ...]] = _Phases.apply
    return apply(x, *starts)


class ConvBN(nn.Module):
    """Convolutions in sequence, then batch norm, on a value whose ReLU was taken already."""

    def __init__(self, channels: int, shared: bool, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.bn = BatchNorm(channels, shared)

    def forward(self, relu: Tensor) -> Tensor:
        for layer in self.layers:
            relu = layer(relu)
        out: Tensor = self.bn(relu)
        return out


class ReLU(nn.Module):
    """ReLU of a value that nothing else needs: in its place, where no gradient is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=not (torch.is_grad_enabled() or traced()))


class FactorizedReduction(nn.Module):
    """Halve the resolution by two 1x1 convolutions of stride 2, one shifted by a pixel.

    ``columns`` restricts the input channels (see ``network.CellNetwork``).
    """

    def __init__(self, inputs: int, outputs: int, shared: bool) -> None:
        super().__init__()
        self.even = Conv(inputs, outputs // 2)
        self.odd = Conv(inputs, outputs - outputs // 2)
        self.bn = BatchNorm(outputs, shared)

    def forward(self, relu: Tensor, columns: Tensor | None = None) -> Tensor:
        even, odd = phases(relu, 0, 1)
        halves = [
            pointwise(even, pick(self.even.weight, columns)),
            pointwise(odd, pick(self.odd.weight, columns)),
        ]
        out: Tensor = self.bn(cat(halves))
        return out


def pick(weight: Tensor, columns: Tensor | None) -> Tensor:
    """Return the weight, or only the given input channels of it."""
    return weight if columns is None else weight.index_select(1, columns)


class Pooling(nn.Module):
    """Max or average pooling, square; with ``pad`` the border adds places but no values.

    Even kernels have no centre: at stride 1 one repeated row and column keep the size, at other
    strides nothing is added.
    """

    def __init__(self, kernel: int, stride: int, maximum: bool, pad: bool = True) -> None:
        super().__init__()
        self.kernel, self.stride, self.maximum, self.pad = kernel, stride, maximum, pad

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel
        if k % 2 and self.pad:
            pool = max_pool if self.maximum else average_pool
            return pool(x, k, self.stride)
        if k % 2 == 0 and self.stride == 1:
            x = F.pad(x, (0, 1, 0, 1), mode="replicate")
        plain = F.max_pool2d if self.maximum else F.avg_pool2d
        return plain(x, k, self.stride)


class Pool(nn.Module):
    """Max or average pooling (border not counted), then batch norm without affine."""

    def __init__(self, p: Primitive, channels: int, stride: int, shared: bool) -> None:
        super().__init__()
        self.pooling = Pooling(p.size, stride, p.kind == "max_pool")
        self.bn = BatchNorm(channels, shared, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.pooling(x))
        return out


def build(p: Primitive, channels: int, stride: int, shared: bool) -> nn.Module | None:
    """Build a primitive with ``channels`` inputs and outputs; None where there is nothing to build.

    ``stride`` 1 or 2; ``shared`` as in ``BatchNorm``. None stands for null (no value at all) and
    for skip_connect at stride 1 (the value itself).
    """
    c, k = channels, p.kernel
    if p.kind == "null" or (p.kind == "skip" and stride == 1):
        return None
    if p.kind == "skip":
        return FactorizedReduction(c, c, shared)
    if p.kind in ("max_pool", "avg_pool"):
        return Pool(p, c, stride, shared)
    if p.kind == "dil_conv":
        return ConvBN(c, shared, DilatedDepthwise(c, k[0], stride), Conv(c, c))
    if p.kind == "sep_conv":
        first = ConvBN(c, shared, Conv(c, c, k, (stride, stride), groups=c), Conv(c, c))
        second = ConvBN(c, shared, Conv(c, c, k, groups=c), Conv(c, c))
        return nn.Sequential(first, ReLU(), second)
    if p.factorized:
        # One axis is strided in each of the two, as in NAONet.
        one, two = ((1, stride), (stride, 1)) if k[0] == 1 else ((stride, 1), (1, stride))
        return ConvBN(c, shared, Conv(c, c, k, one), Conv(c, c, k[::-1], two))
    return ConvBN(c, shared, Conv(c, c, k, (stride, stride)))


def takes_relu(p: Primitive) -> bool:
    """Say whether the primitive works on the ReLU of its input (convolutions and reductions)."""
    return p.kind not in ("max_pool", "avg_pool", "null")


def average_pool(x: Tensor, k: int, stride: int) -> Tensor:
    """Average over the pixels that lie inside the image, as a depthwise convolution.

    Equal to ``avg_pool2d(x, k, stride, k // 2, count_include_pad=False)``; several times faster on
    a CPU in channels-last memory.
    """
    c, pad = x.shape[1], k // 2
    if traced():
        return F.avg_pool2d(x, k, stride, pad, count_include_pad=False)
    weight, share = _average_weights(c, k, x.shape[2], x.shape[3], stride, x.dtype, x.device)
    return F.conv2d(x, weight, None, stride, pad, 1, c).mul_(share)


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # kept for training too, wherever they are first needed
def _average_weights(
    c: int, k: int, h: int, w: int, stride: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weights of a depthwise sum, and one over the number of pixels that each place sums."""
    one = torch.ones(1, 1, k, k, dtype=dtype, device=device)
    count = F.conv2d(one.new_ones(1, 1, h, w), one, None, stride, k // 2)
    weight = one.expand(c, 1, k, k).contiguous(memory_format=torch.channels_last)
    return weight, 1 / count


def max_pool(x: Tensor, k: int, stride: int) -> Tensor:
    """Maximum over k x k pixels around each place, equal to ``max_pool2d(x, k, stride, k // 2)``.

    Without gradients on a CPU it is taken along one axis at a time, which is several times faster
    than the built-in in channels-last memory.
    """
    if x.device.type != "cpu" or traced() or (torch.is_grad_enabled() and x.requires_grad):
        return F.max_pool2d(x, k, stride, k // 2)
    nhwc = x.permute(0, 2, 3, 1)
    for axis in (1, 2):
        nhwc = _running_max(nhwc, k // 2, axis, stride)
    return nhwc.permute(0, 3, 1, 2)


def _running_max(x: Tensor, reach: int, axis: int, stride: int) -> Tensor:
    """Maximum over ``reach`` neighbours on either side along an axis, cut off at the border.

    At every ``stride``-th place only.
    """
    size = x.shape[axis]
    if size == 1:
        return x.clone()
    places = (size - 1) // stride + 1

    def at(shift: int, first: int, count: int) -> Tensor:
        start = first * stride + shift
        return x[(slice(None),) * axis + (slice(start, start + count * stride, stride),)]

    own = at(0, 0, places)
    out = torch.empty_like(own, memory_format=torch.contiguous_format)
    inner = min(places, (size - 2) // stride + 1)
    torch.maximum(own.narrow(axis, 0, inner), at(1, 0, inner), out=out.narrow(axis, 0, inner))
    if inner < places:
        out.narrow(axis, inner, 1).copy_(own.narrow(axis, inner, 1))
    for shift in (-1, *(s for r in range(2, reach + 1) for s in (r, -r))):
        first = max(0, -(shift // stride))
        count = min(places, (size - 1 - shift) // stride + 1) - first
        if count > 0:
            part = out.narrow(axis, first, count)
            torch.maximum(part, at(shift, first, count), out=part)
    return out


class DenseCat(torch.autograd.Function):
    """Concatenation along channels whose backward hands out dense channels-last gradients.

    The ordinary backward returns strided slices, which push batch norm's backward onto a slow
    path on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [p.shape[1] for p in parts]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        pieces = torch.split(grads[0], ctx.sizes, 1)
        return tuple(p.contiguous(memory_format=torch.channels_last) for p in pieces)


def cat(parts: list[Tensor]) -> Tensor:
    """Concatenate along channels; see ``DenseCat``."""
    if len(parts) == 1:
        return parts[0]
    if traced():
        return torch.cat(parts, 1)
    apply: Callable[..., Tensor] = DenseCat.apply
    return apply(*parts)
