"""Train the embedded image backbone on Tiny ImageNet and write its weights.

    python benchmarks/train_embedded.py DATA_FOLDER --out FOLDER

DATA_FOLDER holds train_0.npz .. train_3.npz and val.npz, each with ``data``
(WebP files end to end), ``offsets`` and ``labels``. An interrupted run goes on
from ``FOLDER/checkpoint.pt``. Progress is printed, one line an epoch; at the
end the float16 weights and ``training.json`` lie in FOLDER.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad

from sklearn_transfer.backbones.embedded.network import EmbeddedResNet

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# (pixels, epochs): small first, because early epochs learn coarse structure and
# cost a quarter as much; the last third sees the size that users' images get.
SIZES = ((32, 8), (48, 12), (64, 10))
BATCH = 256
PEAK_LR = 0.8
WARMUP_EPOCHS = 1.5
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
# A second, short cycle at the last size without label smoothing, which hurts what
# frozen features are used for (Kornblith et al. 2019, arXiv:1805.08974).
FINISH_EPOCHS = 4
FINISH_LR = 0.12


def read_split(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one file to pixels (n, 3, 64, 64) uint8 and labels (n,)."""
    with np.load(path, allow_pickle=False) as f:
        data, offsets, labels = f["data"], f["offsets"], f["labels"]

    def decode(i: int) -> np.ndarray:
        with Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(decode, range(len(labels)), chunksize=256)))
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels.astype(np.int64))


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    if pixels.shape[-1] == size:
        return pixels
    parts = [
        interpolate(p.float(), size, mode="bilinear", antialias=True).round()
        for p in pixels.split(2048)
    ]
    return torch.cat([p.clamp(0, 255).to(torch.uint8) for p in parts])


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(MEAN).view(3, 1, 1) * 255
    std = torch.tensor(STD).view(3, 1, 1) * 255
    x = (pixels.float() - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to an eighth (reflected edges), mirror every second."""
    n, _, size, _ = pixels.shape
    margin = size // 8
    padded = pad(pixels.float(), [margin] * 4, mode="reflect").to(torch.uint8)
    top, left = torch.randint(0, 2 * margin + 1, (2, n), generator=generator).tolist()
    out = torch.empty_like(pixels)
    for i, (y, x) in enumerate(zip(top, left, strict=True)):
        out[i] = padded[i, :, y : y + size, x : x + size]
    mirrored = torch.rand(n, generator=generator) < 0.5
    out[mirrored] = out[mirrored].flip(-1)
    return out


def learning_rate(epoch: float, n_epochs: int) -> float:
    """Linear warm-up to the peak, then linear to zero (one cycle, Smith 2018).

    ``epoch`` counts in fractions; from ``n_epochs`` on the second cycle runs,
    linear to zero.
    """
    if epoch > n_epochs:
        return FINISH_LR * (n_epochs + FINISH_EPOCHS - epoch) / FINISH_EPOCHS
    if epoch < WARMUP_EPOCHS:
        return PEAK_LR * epoch / WARMUP_EPOCHS
    return PEAK_LR * (n_epochs - epoch) / (n_epochs - WARMUP_EPOCHS)


def make_optimizer(net: nn.Module) -> torch.optim.SGD:
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


@torch.no_grad()
def top1(net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    net.eval()
    hits = 0
    for x, y in zip(pixels.split(500), labels.split(500), strict=True):
        hits += (net(normalise(x)).argmax(1) == y).sum().item()
    return hits / len(labels)


def train_epoch(net, optimizer, pixels, labels, epoch, n_epochs, generator) -> float:
    net.train()
    order = torch.randperm(len(labels), generator=generator)
    batches = order.split(BATCH)[: len(order) // BATCH]
    total = 0.0
    for i, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch + (i + 1) / len(batches), n_epochs)
        x = normalise(augment(pixels[rows], generator))
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        smoothing = LABEL_SMOOTHING if epoch < n_epochs else 0.0
        loss = cross_entropy(logits.float(), labels[rows], label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    parts = [read_split(p) for p in sorted(args.data.glob("train_*.npz"))]
    pixels = torch.cat([p for p, _ in parts])
    labels = torch.cat([y for _, y in parts])
    val_pixels, val_labels = read_split(args.data / "val.npz")
    print(f"{len(labels)} training images, {len(val_labels)} for validation")

    net = EmbeddedResNet().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(net)
    log: list[dict] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        log = state["log"]

    plan = [size for size, n in SIZES for _ in range(n)]
    n_epochs = len(plan)
    plan += [plan[-1]] * FINISH_EPOCHS
    resized, resized_to = pixels, 64
    for epoch in range(len(log), len(plan)):
        if plan[epoch] != resized_to:
            resized, resized_to = resize(pixels, plan[epoch]), plan[epoch]
        start = time.perf_counter()
        loss = train_epoch(net, optimizer, resized, labels, epoch, n_epochs, generator)
        seconds = time.perf_counter() - start
        accuracy = top1(net, resize(val_pixels, plan[epoch]), val_labels)
        row = {"epoch": epoch, "size": plan[epoch], "loss": loss, "top1": accuracy}
        log.append(row | {"seconds": seconds})
        print(json.dumps(log[-1]), flush=True)
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"generator": generator.get_state(), "log": log}, checkpoint)

    half = {
        k: v.to(torch.float16) if v.is_floating_point() else v
        for k, v in net.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    half = {k: v.contiguous() for k, v in half.items()}
    save_file(half, args.out / "tiny_imagenet_resnet.safetensors")
    # Judge what is shipped: the rounded weights, not the ones trained.
    net.load_state_dict({k: v.float() for k, v in half.items()}, strict=False)
    shipped = top1(net, val_pixels, val_labels)
    summary = {"top1": shipped, "seed": args.seed, "torch": torch.__version__}
    summary["log"] = log
    (args.out / "training.json").write_text(json.dumps(summary, indent=1))
    print(f"top-1 of the float16 weights: {shipped:.4f}")


if __name__ == "__main__":
    main()
