"""The peers that train: skorch with its Freezer, Hugging Face's Trainer, a plain loop.

Written as their documentation shows it; where that leaves a choice, the one that is
faster for the peer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.pipeline import Pipeline
from skorch import NeuralNetClassifier
from skorch.callbacks import Freezer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.transforms import v2

from benchmarks._common import Score, minilm_folder, weight_file
from sklearn_transfer.backbones.spec import resolve_freeze_depth
from sklearn_transfer.backbones.weights import seeded

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MAX_TOKENS = 256
FREEZER = "callbacks__freezer__patterns"

# Our stage names, and the peer's parameters in each as Freezer's patterns.
RESNET18 = {
    "stem": ("conv1.*", "bn1.*"),
    **{name: (f"{name}.*",) for name in ("layer1", "layer2", "layer3", "layer4")},
}
MOBILENET_V2 = {f"features.{i}": (f"features.{i}.*",) for i in range(19)}
MINILM = {
    "embeddings": ("body.embeddings.*",),
    **{f"layer.{i}": (f"body.encoder.layer.{i}.*",) for i in range(6)},
}


def frozen_patterns(stages: Mapping[str, Sequence[str]], depth: int | str) -> list[str]:
    """Freezer's patterns for the parameters that ``freeze_depth=depth`` freezes."""
    k = resolve_freeze_depth(depth, list(stages))
    return [pattern for name in list(stages)[:k] for pattern in stages[name]]


# --- networks ----------------------------------------------------------------


def resnet18(n_classes: int) -> nn.Module:
    """torchvision's, with the untrained weights that "@random" stands for."""
    with seeded():
        net = models.resnet18(weights=None)
    net.fc = nn.Linear(512, n_classes)
    return net


def mobilenet_v2(data: Path, n_classes: int) -> nn.Module:
    """torchvision's, with the ImageNet weights that lie with the data."""
    from safetensors.torch import load_file

    net = models.mobilenet_v2(weights=None)
    net.load_state_dict(load_file(weight_file(data, "mobilenet_v2_imagenet")))
    net.classifier[1] = nn.Linear(1280, n_classes)
    return net


class MeanPooled(nn.Module):
    """all-MiniLM-L6-v2 in float32, the mean over unmasked tokens, and a Linear."""

    def __init__(self, n_classes: int):
        from transformers import AutoModel

        super().__init__()
        with _quiet_loading():
            self.body = AutoModel.from_pretrained(
                minilm_folder(), dtype=torch.float32, add_pooling_layer=False
            )
        self.head = nn.Linear(self.body.config.hidden_size, n_classes)

    def forward(self, input_ids, attention_mask):
        found = self.body(input_ids=input_ids, attention_mask=attention_mask)
        mask = attention_mask.unsqueeze(2).float()  # (n, t, 1)
        return self.head((found.last_hidden_state * mask).sum(1) / mask.sum(1))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No report of a left-out pooler or a new head: that is what is wanted."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- rows --------------------------------------------------------------------


class Pictures(Dataset):
    """Files decoded with Pillow and torchvision's transforms when asked for."""

    def __init__(self, X, y=None, size: int = 160):
        self.X, self.y = X, y
        # Resized while it is a PIL image, and not at all where the short side fits:
        # faster than torchvision's resize of tensors.
        self.transform = v2.Compose(
            [
                v2.Resize(size, antialias=True),
                v2.CenterCrop(size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, i):
        with Image.open(self.X[i]) as image:
            pixels = self.transform(image.convert("RGB"))
        # skorch asks for a target when it predicts, too.
        return pixels, 0 if self.y is None else int(self.y[i])


class Tokenized(TransformerMixin, BaseEstimator):
    """Texts to token ids and mask, padded to the longest of what is passed.

    skorch's own HuggingfacePretrainedTokenizer pads every text to 256 tokens, which
    would make the peer several times slower.
    """

    def fit(self, X, y=None):
        from transformers import AutoTokenizer

        self.tokenizer_ = AutoTokenizer.from_pretrained(minilm_folder())
        return self

    def transform(self, X) -> dict[str, torch.Tensor]:
        found = self.tokenizer_(
            list(X),
            padding="longest",
            truncation=True,
            max_length=MAX_TOKENS,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return dict(found)


# --- skorch ------------------------------------------------------------------


def skorch_images(
    network: Callable[[], nn.Module], size: int, **settings
) -> NeuralNetClassifier:
    """A classifier of arrays of paths; a grid over ``FREEZER`` freezes layers."""
    return _skorch(network, dataset=Pictures, dataset__size=size, **settings)


def skorch_texts(n_classes: int, **settings) -> Pipeline:
    """A classifier of texts, tokenized inside each fold."""
    net = _skorch(partial(MeanPooled, n_classes), **settings)
    return Pipeline([("tokens", Tokenized()), ("net", net)])


def _skorch(network, *, lr: float, max_epochs: int, batch_size: int, **settings):
    return NeuralNetClassifier(
        network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=lr,
        max_epochs=max_epochs,
        batch_size=batch_size,
        iterator_train__shuffle=True,
        # By default skorch holds out a fifth of the rows; ours learns from all.
        train_split=None,
        callbacks=[("freezer", Freezer([]))],
        verbose=0,
        **settings,
    )


# --- one epoch ---------------------------------------------------------------


def loop_epoch(
    network: Callable[[], nn.Module], paths, labels, *, size: int, workers: int
) -> Score:
    """One epoch as the tutorials of torchvision write it, batches of 32.

    Gives the accuracy on other files, when asked.
    """
    net = network().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    loss_of = nn.CrossEntropyLoss()
    rows = Pictures(paths, labels, size)
    for pixels, target in DataLoader(rows, 32, shuffle=True, num_workers=workers):
        optimizer.zero_grad()
        loss_of(net(pixels), target).backward()
        optimizer.step()

    @torch.no_grad()
    def score(paths, labels) -> float:
        net.eval()
        batches = DataLoader(Pictures(paths, labels, size), 64)
        found = [net(pixels).argmax(1) == target for pixels, target in batches]
        return torch.cat(found).float().mean().item()

    return score


def trainer_epoch(texts: Sequence[str], labels, *, batch_size: int) -> Score:
    """One epoch of Hugging Face's Trainer with its defaults, in float32 on the CPU.

    Gives the accuracy on other texts, when asked.
    """
    import transformers
    from transformers import PrinterCallback, Trainer, TrainingArguments

    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with _quiet_loading():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(set(labels)), dtype=torch.float32
        )

    def rows_of(texts, labels) -> list[dict]:
        tokens = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)
        return [
            {"input_ids": ids, "attention_mask": mask, "label": int(label)}
            for ids, mask, label in zip(
                tokens["input_ids"], tokens["attention_mask"], labels, strict=True
            )
        ]

    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            # What would cost the peer time or write files.
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows_of(texts, labels),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def score(texts, labels) -> float:
        found = trainer.predict(rows_of(texts, labels))
        return float((found.predictions.argmax(1) == found.label_ids).mean())

    return score
