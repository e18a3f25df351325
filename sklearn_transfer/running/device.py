"""Where and how a backbone runs: device, precision, fused copy, batch size."""

from __future__ import annotations

import copy
import multiprocessing
import platform
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sklearn_transfer._locks import ForkSafeLock
from sklearn_transfer.backbones.stages import StagedBackbone, Tokens
from sklearn_transfer.backbones.tokenize import TokenIds
from sklearn_transfer.exceptions import SharedGPUWarning, warn_user
from sklearn_transfer.running.boundary import Boundary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes that one module's input and output may take together. On a CPU a block
# beyond 32 MB is mapped anew by the allocator at every call, and the page faults
# cost more than a larger batch saves: mobilenet_v2 ran 1.9 times faster at 8
# images than at 64. A GPU wants to be filled.
ACTIVATION_BYTES = {"cpu": 40 * 2**20, "cuda": 4 * 2**30, "mps": 2 * 2**30}


def resolve_device(device: str) -> torch.device:
    """The device that ``device`` ("auto", "cpu", "cuda", "cuda:1", "mps") names.

    Raises
    ------
    ValueError
        If the device is not on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        mps = torch.backends.mps.is_available()
        return torch.device("mps" if mps else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ACTIVATION_BYTES:
        raise ValueError(
            f"device={device!r} is not a device that networks run on here. "
            "Write device='auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}, and torch sees {torch.cuda.device_count()} CUDA "
            "devices here. Write device='auto' to take what there is."
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps' is not available here. Write device='auto'.")
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "float32" or "bfloat16"; "auto" is bfloat16 where the hardware has it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = _cpu_multiplies_bf16()
    else:
        native = False
    return "bfloat16" if native else "float32"


def _cpu_multiplies_bf16() -> bool:
    if platform.machine().lower() in ("aarch64", "arm64"):
        # Apple's CPUs say yes and are slower in bf16 than in float32.
        return platform.system() == "Linux" and _mkldnn_has_bf16()
    # Not mkldnn's own answer: it says yes to any AVX-512, and emulates.
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


def _mkldnn_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_training_device(device: torch.device) -> None:
    """Refuse what cannot work on a GPU, and warn of what works badly.

    Raises
    ------
    RuntimeError
        In a process forked from one that has used CUDA.
    """
    if device.type != "cuda":
        return
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "This process was forked from one that had used the GPU, and cannot use "
            "it too. Start workers anew: joblib.parallel_config(backend='loky'), or "
            "multiprocessing.set_start_method('spawn'); or write device='cpu'."
        )
    if multiprocessing.parent_process() is not None and not _shared_gpu_told.is_set():
        _shared_gpu_told.set()
        warn_user(
            f"Several processes train on {device} and share its memory and its time. "
            "n_jobs=1 is usually as fast, and does not run out of memory.",
            SharedGPUWarning,
        )


@contextmanager
def exact_float32(precision: str, device: torch.device) -> Iterator[None]:
    """Under float32 on CUDA, products in float32 and not in TF32."""
    if device.type != "cuda" or precision != "float32":
        yield
        return
    # Not allow_tf32: reading it raises once the user has set fp32_precision.
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting


@contextmanager
def inference_mode(precision: str, device: torch.device) -> Iterator[None]:
    """No gradients, and float32 that is float32; for results that leave torch."""
    with torch.inference_mode(), exact_float32(precision, device):
        yield


@contextmanager
def no_grad(precision: str, device: torch.device) -> Iterator[None]:
    """The same for results to train from, which inference tensors are not."""
    with torch.no_grad(), exact_float32(precision, device):
        yield


@dataclass(frozen=True)
class Measured:
    """What one forward pass of one sample tells about a backbone.

    ``widths`` are the features after each wanted stage, ``activation_bytes``
    the largest input and output of one module together, ``pairs`` the
    (convolution, BatchNorm) names whose tensors follow each other.
    """

    widths: tuple[int, ...]
    activation_bytes: int
    pairs: tuple[tuple[str, str], ...]


_shared_gpu_told = threading.Event()
_measured: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_runners: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = ForkSafeLock()


def measure(backbone: StagedBackbone, pooling: str, stages: Sequence[int]) -> Measured:
    """Run one sample through the float32 backbone once and note what it shows."""
    key = (pooling, tuple(stages))
    with _lock.held():
        known = _measured.setdefault(backbone, {})
        if key not in known:
            known[key] = _measure(backbone, pooling, stages)
        return known[key]


def _measure(backbone, pooling, stages) -> Measured:
    made_by: dict[int, str] = {}  # id of a convolution's output -> its name
    outputs: list[Tensor] = []  # kept alive, so that no id is used twice
    pairs, peak = [], 0

    def look(name: str):
        def hook(module, inputs, output):
            nonlocal peak
            tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
            peak = max(peak, sum(t.numel() * 4 for t in tensors))
            if isinstance(module, nn.Conv2d):
                made_by[id(output)] = name
                outputs.append(output)
            elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made_by:
                conv = made_by[id(inputs[0])]
                # "stages.3": what is tapped at a boundary must not change.
                if conv.split(".")[:2] == name.split(".")[:2]:
                    pairs.append((conv, name))

        return hook

    # timm's BatchNorm2d has children of its own.
    leaves = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d) or not any(module.children())
    ]
    handles = [m.register_forward_hook(look(n)) for n, m in leaves]
    try:
        with torch.inference_mode():
            vectors = backbone.taps(backbone.example(), pooling, stages)
    finally:
        for handle in handles:
            handle.remove()
    return Measured(tuple(v.shape[1] for v in vectors), peak, tuple(pairs))


def fuse_conv_bn(backbone: StagedBackbone, pairs: Sequence[tuple[str, str]]) -> None:
    """Fold each BatchNorm into the convolution before it, in place.

    Pairs come from the tensors seen in a real forward pass rather than from
    torch.fx: tracing fails on networks with data-dependent Python, and module
    order does not tell what feeds what.
    """
    for conv_name, norm_name in pairs:
        conv, norm = (
            backbone.get_submodule(conv_name),
            backbone.get_submodule(norm_name),
        )
        _replace(backbone, conv_name, fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d is a BatchNorm2d that also drops and activates.
        rest = [
            m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if m
        ]
        _replace(backbone, norm_name, nn.Sequential(*rest) if rest else nn.Identity())


def _fused_copy(backbone: StagedBackbone, pairs) -> StagedBackbone:
    """A fused copy, or a plain one where fusing changes the result.

    A convolution whose output also goes elsewhere cannot be told apart by the
    tensors that a BatchNorm sees; comparing the outcome can.
    """
    net = copy.deepcopy(backbone)
    if not pairs:
        return net
    fuse_conv_bn(net, pairs)
    example, stages = backbone.example(), range(1, backbone.n_stages + 1)
    with torch.inference_mode():
        ours = net.taps(example, "auto", stages)
        plain = backbone.taps(example, "auto", stages)
    is_same = all(
        (a - b).abs().max() <= 1e-3 * b.abs().max().clamp(min=1e-6)
        for a, b in zip(ours, plain, strict=True)
    )
    return net if is_same else copy.deepcopy(backbone)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


class Runner:
    """A backbone ready to run: its own copy, fused, on its device, in its dtype.

    Parameters
    ----------
    backbone : StagedBackbone
        In float32 on the CPU; left as it is.
    device : torch.device
    precision : {"float32", "bfloat16"}
    """

    def __init__(self, backbone: StagedBackbone, device, precision: str):
        self.device, self.precision = device, precision
        self.dtype = DTYPES[precision]
        stages = range(1, backbone.n_stages + 1)
        self.measured = measure(backbone, "auto", stages)
        net = _fused_copy(backbone, self.measured.pairs)
        net = net.to(device=device, memory_format=torch.channels_last)
        self.net = net.to(self.dtype).requires_grad_(False)
        self._row_shapes: dict[int, tuple[int, ...]] = {}

    def taps(self, batch, pooling: str, stages: Sequence[int]) -> np.ndarray:
        """Pooled activations side by side, (n, sum of widths) float32."""
        with inference_mode(self.precision, self.device):
            x = self.net.prepare(batch, self.device, self.dtype)
            return torch.cat(self.net.taps(x, pooling, stages), 1).cpu().numpy()

    def until(self, batch, k: int) -> Tensor | Tokens | TokenIds:
        """Activations after the first ``k`` stages, on the device, to train from.

        ``batch`` is pixels (n, h, w, 3) uint8 or ``TokenIds``; for k = 0 it comes
        back as the first stage takes it, for k = N as the vectors.
        """
        with no_grad(self.precision, self.device):
            return self.net.until(self.net.prepare(batch, self.device, self.dtype), k)

    def between(self, h: Tensor | Tokens, start: int, stop: int) -> Tensor | Tokens:
        """Activations after stage ``stop``, from those after stage ``start``."""
        with no_grad(self.precision, self.device):
            return self.net.run(h, start, stop)

    def boundary(self, k: int) -> Boundary:
        """How activations after stage ``k`` are stored and taken up again."""
        return Boundary(self.net, k, self.device, self.dtype)

    def rows_of(self, h: Tensor | Tokens, k: int) -> list[np.ndarray]:
        """One array a row, as it is stored: maps (h, w, c), texts (length, d)."""
        return self.boundary(k).rows_of(h)

    def batch_of(self, rows: Sequence[np.ndarray], k: int) -> Tensor | Tokens:
        """What stage ``k`` + 1 takes, on the device, from rows of `rows_of`."""
        return self.boundary(k).batch_of(rows)

    def row_shape(self, k: int) -> tuple[int, ...]:
        """Shape of a stored row after stage ``k``; of a text, of a short example."""
        if k not in self._row_shapes:
            x = self.net.example()
            if isinstance(x, Tensor):
                x = x.to(self.device, self.dtype)  # prepared already
            else:
                x = self.net.prepare(x, self.device, self.dtype)
            h = self.between(x, 0, k)
            self._row_shapes[k] = tuple(self.boundary(k).stored_form(h).shape[1:])
        return self._row_shapes[k]

    def batch_size(self) -> int:
        """Samples a batch: a power of two from 4 to 256, by activation memory."""
        bytes_each = self.measured.activation_bytes * self.dtype.itemsize // 4
        fits = ACTIVATION_BYTES[self.device.type] // max(bytes_each, 1)
        return int(2 ** np.floor(np.log2(np.clip(fits, 4, 256))))

    def batch_tokens(self) -> int:
        """Padded tokens a batch of texts holds at most."""
        return 2048 if self.device.type == "cpu" else 65536


def runner_for(backbone: StagedBackbone, device, precision: str) -> Runner:
    """The runner of a backbone, built once a process."""
    key = (str(device), precision)
    with _lock.held():
        known = _runners.setdefault(backbone, {})
        if key not in known:
            known[key] = Runner(backbone, device, precision)
        return known[key]
