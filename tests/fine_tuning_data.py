"""Small networks and data that the tests of the fine-tuning estimators share."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

WORDS = "cat dog bird fish ant bee cow hen owl fox red green blue good bad dull".split()


@functools.cache
def text_model() -> str:
    """The folder of a small BERT that knows ``WORDS``, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-bert-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(save_text_model(folder))


def save_text_model(
    folder: Path, words=WORDS, *, seed=3, width=32, n_heads=4, longest=256
) -> Path:
    """Save such a BERT with weights drawn anew."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=longest, **names
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_attention_heads=n_heads,
        num_hidden_layers=2,
        intermediate_size=3 * width // 2,
        max_position_embeddings=longest,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def stripes(n: int, n_classes: int = 2, seed: int = 0):
    """Images (n, 24, 24, 3) of stripes whose direction tells the class, and y."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    angle = np.pi * y / n_classes
    height, width = np.mgrid[:24, :24]
    phase = rng.uniform(0, 6, n)[:, None, None]
    across = (
        np.cos(angle)[:, None, None] * height + np.sin(angle)[:, None, None] * width
    )
    grey = 128 + 90 * np.sin(across + phase) + rng.normal(0, 12, (n, 24, 24))
    pixels = np.clip(grey, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=3), y


def remarks(n: int, seed: int = 0):
    """Texts of seven words, a third of them telling, and labels "bad" and "good"."""
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(n) % 2, "good", "bad")
    telling = {"good": ["good", "red"], "bad": ["bad", "dull"]}
    texts = [
        " ".join([*rng.choice(WORDS[:10], 5), *rng.choice(telling[label], 2)])
        for label in y
    ]
    return texts, y
