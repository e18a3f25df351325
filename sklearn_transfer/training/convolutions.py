"""Gradients of convolutions that oneDNN is slow at, another way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WIDEST = 7  # of a map that is small
FEWEST = 128  # inputs of a convolution whose taps are worth a product each


class ConvolutionGradients(TorchDispatchMode):
    """Around a backward pass in bfloat16 on a CPU: slow gradients another way.

    oneDNN has two slow kernels in bfloat16, and none in float32:

    - Weights' gradients over small maps, as in the last stage of most networks. Of 32
      maps of 512 channels under 3 x 3 kernels it takes 14.5 ms at 5 x 5, and a product
      a tap of the kernel 8.3; 25 and 17 at 7 x 7; 10.7 and 13.4 of 256 channels at
      10 x 10. One product of the unfolded input, a quarter of which is padding at
      5 x 5, takes 10.9 and 21. The fewer the inputs the narrower the products: of 64
      oneDNN is faster, and of the 1,024 taps of a ViT's first convolution 6 times.
    - Inputs' gradients of strided depthwise convolutions, as MobileNets have. Of 32
      maps of 144 channels it takes 85 ms at 40 x 40, and a convolution without stride,
      of the gradient with zeros in between, 10; 68 and 1 of 576 channels at 10 x 10.

    Taken at dispatch, so that it serves every network's modules as they are;
    replaced modules would show in names, hooks and exports.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.convolution_backward.default:
            return func(*args, **(kwargs or {}))
        call = _Call(*args)
        if call.is_plain and call.wants[1] and call.is_over_small_map:
            return _by_products(func, call)
        if call.is_plain and call.wants[0] and call.is_strided_depthwise:
            return _without_stride(func, call)
        return func(*args)


class _Call(NamedTuple):
    """Arguments of aten::convolution_backward; all wanted are input, weight, bias."""

    grad: Tensor  # (n, out, h', w')
    x: Tensor  # (n, in, h, w)
    weight: Tensor  # (out, in / groups, kh, kw)
    biases: list[int] | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int
    wants: list[bool]

    @property
    def is_plain(self) -> bool:
        """Whether it is of the kind that is slow, and no rarity."""
        return (
            self.grad.dtype == torch.bfloat16
            and self.grad.device.type == "cpu"
            and self.grad.dim() == 4
            and not self.transposed
            and set(self.dilation) == {1}
            and len(self.stride) == len(self.padding) == 2
        )

    @property
    def is_over_small_map(self) -> bool:
        n_in = self.weight.shape[1]
        return self.groups == 1 and n_in >= FEWEST and self.grad.shape[-1] <= WIDEST

    @property
    def is_strided_depthwise(self) -> bool:
        is_depthwise = self.groups == self.x.shape[1] == self.grad.shape[1]
        return is_depthwise and set(self.stride) != {1}


def _by_products(func, call: _Call):
    """The weight's gradient as products."""
    by_input, _, by_bias = call.wants
    only_input = call._replace(wants=[True, False, False])
    of_input = func(*only_input)[0] if by_input else None
    # Not the bias's from oneDNN: asked for it, it takes the weight's as well.
    of_bias = call.grad.sum((0, 2, 3)) if by_bias else None
    return of_input, _by_taps(*call[:3], call.stride, call.padding), of_bias


def _by_taps(grad: Tensor, x: Tensor, weight: Tensor, stride, padding) -> Tensor:
    """Gradient (out, in, kh, kw) by the weight of a convolution of x."""
    n_out, n_in, kh, kw = weight.shape
    # Lines of the map in front: without a stride, a tap further down is a view.
    of_outputs, of_inputs = grad.permute(2, 0, 3, 1), x.permute(2, 0, 3, 1)
    found = weight.new_empty(n_out, kh, kw, n_in)
    down = list(_pairs(kh, stride[0], padding[0], x.shape[2], grad.shape[2]))
    across = _pairs(kw, stride[1], padding[1], x.shape[3], grad.shape[3])
    for j, (out_w, in_w) in enumerate(across):
        outputs = of_outputs[:, :, out_w].contiguous()  # (h', n, m, out)
        inputs = of_inputs[:, :, in_w].contiguous()  # (h, n, m, in)
        for i, (out_h, in_h) in enumerate(down):
            theirs = outputs[out_h].reshape(-1, n_out)
            seen = inputs[in_h].reshape(-1, n_in)
            torch.mm(theirs.T, seen, out=found[:, i, j])
    return found.permute(0, 3, 1, 2)


def _pairs(size: int, stride: int, padding: int, n_in: int, n_out: int):
    """For each tap of a kernel, along one side: its outputs, and the inputs it saw.

    Those in the map alone: a product with padding is zero.
    """
    for tap in range(size):
        first = max(0, -((tap - padding) // stride))
        last = min(n_out - 1, (n_in - 1 + padding - tap) // stride)
        n = max(0, last - first + 1)
        start = first * stride + tap - padding
        yield slice(first, first + n), slice(start, start + n * stride, stride)


def _without_stride(func, call: _Call):
    """The input's gradient as of a convolution that makes every step."""
    _, by_weight, by_bias = call.wants
    others = None, None, None
    if by_weight or by_bias:
        others = func(*call._replace(wants=[False, by_weight, by_bias]))
    (n, channels, h, w), (kh, kw) = call.x.shape, call.weight.shape[2:]
    (top, left), (down, right) = call.padding, call.stride
    shape = n, h + 2 * top - kh + 1, w + 2 * left - kw + 1, channels
    spread = call.grad.new_zeros(shape).permute(0, 3, 1, 2)
    spread[:, :, ::down, ::right] = call.grad
    dense = call._replace(grad=spread, stride=[1, 1], wants=[True, False, False])
    return func(*dense)[0], others[1], others[2]
