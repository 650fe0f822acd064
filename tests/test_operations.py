"""Every operation against an ordinary module that means the same, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from natlib import operations
from natlib.operations import (
    BatchNorm,
    Conv,
    DilatedDepthwise,
    FactorizedReduction,
    Pool,
    _Depthwise,
    average_pool,
    build,
    cat,
    max_pool,
    phases,
    pick,
    takes_relu,
)
from natlib.primitives import ALL_PRIMITIVES, PRIMITIVES, primitive
from tests.strategies import generator

C = 6
STRIDES = (1, 2)


def normal(*shape: int, seed: int = 0, last: bool = True) -> Tensor:
    """Draw a float64 tensor; ``last`` in channels-last memory."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return x.to(memory_format=torch.channels_last) if last else x


def fill(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of its own, those of batch norm included."""
    draw = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- what each primitive means, in ordinary modules --------------------------------------------


class Factorized(nn.Module):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(C, C // 2, 1, 2, bias=False)
        self.two = nn.Conv2d(C, C - C // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(C, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out: Tensor = self.bn(torch.cat([self.one(x), self.two(x[:, :, 1:, 1:])], 1))
        return out


def reference(name: str, stride: int, affine: bool) -> nn.Module:
    """Build a primitive as the papers define it, on a node's value (its ReLU is inside)."""

    def conv(kh: int, kw: int, s: tuple[int, int] = (1, 1), depth: bool = False, dilation: int = 1):
        pad = (dilation * (kh - 1) // 2, dilation * (kw - 1) // 2)
        groups = C if depth else 1
        return nn.Conv2d(C, C, (kh, kw), s, pad, dilation, groups, bias=False)

    def bn() -> nn.BatchNorm2d:
        return nn.BatchNorm2d(C, affine=affine)

    s, k = (stride, stride), primitive(name).size
    match primitive(name).kind:
        case "skip":
            return nn.Identity() if stride == 1 else Factorized(affine)
        case "max_pool" | "avg_pool" as kind:
            layers: list[nn.Module] = []
            if k == 2 and stride == 1:
                layers.append(nn.ReplicationPad2d((0, 1, 0, 1)))
            pad = 0 if k == 2 else k // 2
            layers.append(
                nn.MaxPool2d(k, stride, pad)
                if kind == "max_pool"
                else nn.AvgPool2d(k, stride, pad, count_include_pad=False)
            )
            return nn.Sequential(*layers, nn.BatchNorm2d(C, affine=False))
        case "sep_conv":
            first = [nn.ReLU(), conv(k, k, s, depth=True), conv(1, 1), bn()]
            return nn.Sequential(*first, nn.ReLU(), conv(k, k, depth=True), conv(1, 1), bn())
        case "dil_conv":
            return nn.Sequential(nn.ReLU(), conv(k, k, s, depth=True, dilation=2), conv(1, 1), bn())
    if name in ("conv_1x3_3x1", "conv_1x7_7x1"):
        return nn.Sequential(nn.ReLU(), conv(1, k, (1, stride)), conv(k, 1, (stride, 1)), bn())
    if name == "conv_7x1_1x7":
        return nn.Sequential(nn.ReLU(), conv(7, 1, (stride, 1)), conv(1, 7, (1, stride)), bn())
    return nn.Sequential(nn.ReLU(), conv(k, k, s), bn())


BUILT = [
    (name, stride)
    for name in ALL_PRIMITIVES
    for stride in STRIDES
    if name != "null" and (name, stride) != ("skip_connect", 1)
]


def pair(
    name: str, stride: int, shared: bool
) -> tuple[Callable[[Tensor], Tensor], nn.Module, nn.Module]:
    """Return our operation on a node's value, its module, and the reference, of equal weights."""
    ours = build(primitive(name), C, stride, shared)
    theirs = reference(name, stride, affine=not shared).double()
    assert ours is not None
    ours.double()
    for module in ours.modules():
        if isinstance(module, BatchNorm):
            module.reset()
    fill(theirs)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.copy_(b)
    before = F.relu if takes_relu(primitive(name)) else lambda x: x
    return lambda x: ours(before(x)), ours, theirs


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("side", [(8, 8), (6, 10), (2, 2)])
@pytest.mark.parametrize(("name", "stride"), BUILT)
def test_values_and_gradients_are_those_of_ordinary_modules(
    name: str, stride: int, side: tuple[int, int], shared: bool
) -> None:
    ours, module, theirs = pair(name, stride, shared)
    x = normal(3, C, *side).requires_grad_()
    y = x.detach().contiguous().clone().requires_grad_()
    a, b = ours(x), theirs(y)
    close(a, b)
    weight = normal(*a.shape, seed=1)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    close(x.grad, y.grad)
    for p, q in zip(module.parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad)
    with torch.no_grad():
        close(ours(x), b)


@pytest.mark.parametrize(("name", "stride"), BUILT)
def test_standalone_operations_keep_and_use_running_statistics(name: str, stride: int) -> None:
    ours, module, theirs = pair(name, stride, shared=False)
    for i in range(3):
        with torch.no_grad():
            close(ours(normal(4, C, 4, 4, seed=i)), theirs(normal(4, C, 4, 4, seed=i)))
    module.eval()
    theirs.eval()
    x = normal(2, C, 4, 4, seed=9)
    close(ours(x), theirs(x))
    close(ours(x[:1]), theirs(x)[:1])


@pytest.mark.parametrize(("name", "stride"), BUILT)
def test_shared_operations_always_use_the_batch(name: str, stride: int) -> None:
    ours, module, _ = pair(name, stride, shared=True)
    assert not list(module.buffers())
    x = normal(2, C, 4, 4)
    in_training = ours(x)
    module.eval()
    close(ours(x), in_training)
    assert (ours(x[:1]) - in_training[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", ALL_PRIMITIVES)
def test_weights_are_what_the_cost_formula_counts(name: str, stride: int, shared: bool) -> None:
    for channels in (2, 7, 10):
        p = primitive(name)
        module = build(p, channels, stride, shared)
        assert (module is None) == (p.kind == "null" or (p.kind == "skip" and stride == 1))
        shapes = [w.shape for w in module.parameters()] if module else []
        assert sum(s.numel() for s in shapes if len(s) == 4) == p.weights(channels, stride)
        norms = 0 if shared else p.batch_norms(stride)
        assert sum(s.numel() for s in shapes if len(s) == 1) == 2 * norms * channels


def test_a_relu_takes_the_place_of_its_input_only_without_gradients() -> None:
    x = torch.tensor([[-1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    out = operations.ReLU()(x * 1)
    out.sum().backward()
    assert out.tolist() == [[0, 2]] and x.grad.tolist() == [[0, 1]]  # type: ignore[union-attr]
    value = torch.tensor([[-1.0, 2.0]])
    with torch.no_grad():
        assert operations.ReLU()(value) is not None and value.tolist() == [[0, 2]]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [3, 5])
def test_a_separable_convolution_leaves_its_input_and_is_the_same_without_gradients(
    stride: int, size: int
) -> None:
    op = build(primitive(f"sep_conv_{size}x{size}"), 4, stride, shared=True)
    assert op is not None
    fill(op)
    x = normal(2, 4, 6, 6, seed=1).float()
    before = x.clone()
    trained = op(x)
    with torch.no_grad():
        assert torch.equal(op(x), trained)
    assert torch.equal(x, before)


# --- pooling -----------------------------------------------------------------------------------

sides = st.integers(1, 11)


@settings(max_examples=60)
@given(st.sampled_from([3, 5]), st.sampled_from(STRIDES), sides, sides, st.booleans())
def test_pooling_of_any_size(k: int, stride: int, h: int, w: int, last: bool) -> None:
    x = normal(2, 3, h, w, seed=h * 20 + w, last=last)
    average = F.avg_pool2d(x, k, stride, k // 2, count_include_pad=False)
    maximum = F.max_pool2d(x, k, stride, k // 2)
    close(average_pool(x, k, stride), average)
    with torch.no_grad():
        assert torch.equal(max_pool(x, k, stride), maximum)
    assert torch.equal(max_pool(x, k, stride), maximum)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    weight = normal(*average.shape, seed=1)
    (average_pool(a, k, stride) * weight).sum().backward()
    (F.avg_pool2d(b, k, stride, k // 2, count_include_pad=False) * weight).sum().backward()
    close(a.grad, b.grad)
    a.grad = b.grad = None
    (max_pool(a, k, stride) * weight).sum().backward()
    (F.max_pool2d(b, k, stride, k // 2) * weight).sum().backward()
    close(a.grad, b.grad)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("k", [3, 5])
def test_pooling_leaves_its_input_alone_and_takes_negative_and_equal_values(
    k: int, stride: int
) -> None:
    for x in (-1 - normal(2, 3, 6, 6).abs(), torch.full((2, 3, 6, 6), -2.0)):
        before = x.clone()
        with torch.no_grad():
            assert torch.equal(max_pool(x, k, stride), F.max_pool2d(x, k, stride, k // 2))
            close(
                average_pool(x, k, stride),
                F.avg_pool2d(x, k, stride, k // 2, count_include_pad=False),
            )
        assert torch.equal(x, before)


def test_average_of_a_constant_is_the_constant_up_to_the_border() -> None:
    for k in (3, 5):
        for stride in STRIDES:
            out = average_pool(torch.full((1, 2, 7, 5), 3.0, dtype=torch.float64), k, stride)
            close(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("k", [3, 5])
def test_average_pooling_seen_first_without_autograd_can_still_be_trained(k: int) -> None:
    x = torch.randn(1, 4, 13, 12 + k, generator=generator())  # sizes no other test uses
    with torch.inference_mode():
        average_pool(x, k, 1)
    x.requires_grad_()
    average_pool(x, k, 1).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.sum(), torch.tensor(float(x.numel())))


def test_average_pooling_does_not_mix_up_types() -> None:
    x = normal(1, 2, 5, 5)
    assert average_pool(x.float(), 3, 1).dtype == torch.float32
    assert average_pool(x, 3, 1).dtype == torch.float64
    close(average_pool(x, 3, 1), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


@pytest.mark.parametrize("name", ["max_pool_2x2", "avg_pool_2x2"])
def test_even_pools_keep_the_size_at_stride_1(name: str) -> None:
    pool = Pool(primitive(name), 1, 1, shared=False).double().eval()
    pool.bn.reset()
    x = torch.arange(9, dtype=torch.float64).view(1, 1, 3, 3)
    expected = {
        "max_pool_2x2": [[4, 5, 5], [7, 8, 8], [7, 8, 8]],
        "avg_pool_2x2": [[2, 3, 3.5], [5, 6, 6.5], [6.5, 7.5, 8]],
    }[name]
    out = pool(x) * (1 + 1e-5) ** 0.5
    close(out[0, 0], torch.tensor(expected, dtype=torch.float64))


# --- dilation, phases, reduction, concatenation --------------------------------------------------


@settings(max_examples=40)
@given(st.sampled_from([3, 5]), st.sampled_from([*STRIDES, 4]), sides, sides, st.booleans())
def test_dilated_convolution_of_any_size(k: int, stride: int, h: int, w: int, last: bool) -> None:
    conv = DilatedDepthwise(C, k, stride).double()
    fill(conv)
    weight = conv.weight.detach().clone().requires_grad_()
    a, b = (normal(2, C, h, w, last=last).requires_grad_() for _ in range(2))
    out = conv(a)
    expected = F.conv2d(b, weight, None, stride, k - 1, 2, C)
    close(out, expected)
    upstream = normal(*expected.shape, seed=1)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    close(a.grad, b.grad)
    close(conv.weight.grad, weight.grad)


@given(st.sampled_from([0, 1]), sides, sides)
def test_phase_is_a_slice(start: int, h: int, w: int) -> None:
    a, b = (normal(2, 3, h, w).requires_grad_() for _ in range(2))
    out, expected = phases(a, start)[0], b[:, :, start::2, start::2]
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    upstream = normal(*expected.shape, seed=1, last=False)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("widths", [(5,), (1, 1), (2, 3, 4), (4, 4, 4, 4, 4)])
def test_cat_is_concatenation(widths: tuple[int, ...]) -> None:
    parts = [normal(2, c, 3, 4, seed=c).requires_grad_() for c in widths]
    others = [p.detach().clone().requires_grad_() for p in parts]
    out, expected = cat(parts), torch.cat(others, 1)
    assert torch.equal(out, expected)
    upstream = normal(*expected.shape, seed=1)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for a, b in zip(parts, others, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_cat_takes_one_tensor_twice_and_parts_without_gradient() -> None:
    a = normal(1, 2, 2, 2).requires_grad_()
    b = normal(1, 3, 2, 2, seed=1)
    (cat([a, b, a]) * torch.arange(7.0).view(1, 7, 1, 1)).sum().backward()
    expected = torch.tensor([5.0, 7.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    close(a.grad, expected)


def test_own_gradients_pass_numerical_differentiation() -> None:
    x = normal(1, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: phases(t, 0)[0], (x,))
    assert torch.autograd.gradcheck(lambda t: phases(t, 0, 1), (x,))
    assert torch.autograd.gradcheck(lambda t: cat([t, 2 * t]), (x,))
    assert torch.autograd.gradcheck(lambda t: average_pool(t, 3, 2), (x,))


@pytest.mark.parametrize("outputs", [4, 5])
def test_factorized_reduction_may_use_some_of_its_input_channels(outputs: int) -> None:
    columns = torch.tensor([4, 1, 0])
    module = FactorizedReduction(C, outputs, shared=True).double()
    fill(module)
    x = normal(2, 3, 4, 4)
    whole = torch.zeros(2, C, 4, 4, dtype=torch.float64).index_copy(1, columns, x)
    close(module(x, columns), module(whole))
    assert pick(module.even.weight, None) is module.even.weight


def test_conv_pads_to_keep_the_size() -> None:
    for kernel in ((1, 1), (3, 3), (5, 5), (1, 7), (7, 1)):
        conv = Conv(2, 4, kernel).double()
        fill(conv)
        x = normal(1, 2, 6, 5)
        close(conv(x), F.conv2d(x, conv.weight, padding="same"))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("affine", [None, True, False])
def test_batch_norm_forms(shared: bool, affine: bool | None) -> None:
    bn = BatchNorm(3, shared, affine)
    bn.reset()
    has_affine = not shared if affine is None else affine
    assert [n for n, _ in bn.named_parameters()] == (["weight", "bias"] if has_affine else [])
    assert [n for n, _ in bn.named_buffers()] == ([] if shared else ["mean", "variance"])


@pytest.mark.parametrize("name", PRIMITIVES)
def test_who_takes_a_relu(name: str) -> None:
    assert takes_relu(primitive(name)) == ("pool" not in name and name != "null")


# --- forms for the fast paths of a CPU ----------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 4), (4, 3), (5, 6), (9, 8)])
@pytest.mark.parametrize("channels", [3, 8, 48])
def test_depthwise_gradients_are_those_of_the_plain_convolution(
    channels: int, height: int, width: int, k: int, stride: int
) -> None:
    x = normal(2, channels, height, width).requires_grad_()
    weight = normal(channels, 1, k, k, seed=1, last=False).requires_grad_()
    ours = _Depthwise.apply(x, weight, stride)
    theirs = F.conv2d(x, weight, None, stride, k // 2, 1, channels)
    assert torch.equal(ours, theirs)
    upstream = normal(*theirs.shape, seed=2)
    expected = torch.autograd.grad(theirs, (x, weight), upstream)
    for mine, plain in zip(torch.autograd.grad(ours, (x, weight), upstream), expected, strict=True):
        close(mine, plain)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 20, 6, 6), (5, 3, 7, 9), (4, 8, 4, 4), (1, 40, 2, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_batch_norm_of_few_channels_equals_the_builtin(
    threads: int,
    shape: tuple[int, ...],
    affine: bool,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = normal(*shape, last=True).mul(3).add(2).requires_grad_()
    layers, results = [BatchNorm(shape[1], shared, affine).double() for _ in range(2)], []
    for few, layer in zip((True, False), layers, strict=True):
        layer.reset()
        for i, weight in enumerate(layer.parameters()):
            weight.data = normal(shape[1], seed=i, last=False)
        monkeypatch.setattr(operations, "_few_channels", lambda x, few=few: few)
        y = layer(x)
        with torch.no_grad():
            close(layer(x.clone()), y)
        results.append(
            (y, *torch.autograd.grad(y, [x, *layer.parameters()], normal(*shape, seed=9)))
        )
    for mine, builtin in zip(*results, strict=True):
        close(mine, builtin)
    for mine, builtin in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        close(mine, builtin)


@pytest.mark.parametrize(
    ("threads", "tiled", "few"), [(1, {8, 12, 20, 28}, 8), (2, {8, 12, 16, 20, 24, 28, 32, 40}, 1)]
)
def test_which_batch_norms_are_tiled(
    threads: int, tiled: set[int], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for channels in (8, 12, 16, 20, 24, 28, 32, 40, 48):
        x = torch.zeros(128, channels, 16, 16).contiguous(memory_format=torch.channels_last)
        assert operations._few_channels(x) is (channels in tiled)
        assert not operations._few_channels(x.contiguous())
        assert not operations._few_channels(x[:few])


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 8, 1, 1), (3, 6, 7, 2)])
def test_a_pointwise_convolution_is_a_matrix_product(
    shape: tuple[int, ...], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for product in (True, False):
        monkeypatch.setattr(operations, "_as_product", lambda x, product=product: product)
        x = normal(*shape, last=last).requires_grad_()
        weight = normal(5, shape[1], 1, 1, seed=1).requires_grad_()
        y = operations.pointwise(x, weight)
        grads = torch.autograd.grad((y * normal(*y.shape, seed=2)).sum(), (x, weight))
        results.append((y, *grads))
        close(y, F.conv2d(x, weight))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_which_pointwise_convolutions_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = torch.empty(64, 8, 8, 8), torch.empty(64, 32, 32, 32)
    for capability, always in (("AVX512", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert operations._as_product(few)
        assert operations._as_product(many) is always
