"""From cleaned texts to token ids, and from token ids to padded batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Tokenized at a time: what is cut off is held until then, in 28 times a text's size.
MOST_CHARACTERS = 2**22


class TokenIds(NamedTuple):
    """A batch of tokenised texts, padded on the right.

    Both are (n, t) int64; ``attention_mask`` is 1 where there is a token.
    """

    input_ids: Tensor
    attention_mask: Tensor


class TextTokenizer:
    """A fast tokenizer with one fixed way to cut, and nothing left to set.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
    max_length : int
        Longest sequence in tokens, special tokens included.
    prompt : str
        Put before every text.
    lower : bool
        Whether texts are put in lower case first.

    Raises
    ------
    ValueError
        If ``max_length`` has no room for a token of text beside the special tokens
        and the prompt.
    """

    def __init__(self, tokenizer, max_length: int, prompt: str = "", lower=False):
        from tokenizers import Tokenizer

        # A copy: the folder's own truncation and padding are switched off in it.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        n_special = self._backend.num_special_tokens_to_add(False)
        if max_length <= n_special:
            raise ValueError(
                f"max_length={max_length} leaves no room for text beside this "
                f"tokenizer's {n_special} special tokens. Write max_length=128."
            )
        state = f"{self._backend.to_str()}{'lower' if lower else ''}"
        self.sha256 = hashlib.sha256(state.encode()).hexdigest()
        self._prompt, self._lower = prompt, lower
        self._check_room(max_length)
        self._backend.enable_truncation(max_length)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(i for i in candidates if i is not None)
        # GPT-2 has no special tokens around a text: of "" nothing would be left,
        # and the mean over no tokens is no vector.
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, self.pad_id)
        self._empty_id = next(i for i in candidates if i is not None)

    def _check_room(self, max_length: int) -> None:
        """Raise where the prompt leaves no token of text: all would be the same."""
        # A space at the end mostly becomes part of the text's first token.
        prompt = self._prompt.rstrip()
        taken = len(self._backend.encode(prompt.lower() if self._lower else prompt))
        if taken >= max_length:
            raise ValueError(
                f"The prompt {self._prompt!r} takes {taken} tokens, special tokens "
                f"included, of max_length={max_length}: no text would be read. Write "
                f"a shorter prompt, prompt='' for none, or a max_length well above "
                f"{taken}."
            )

    def __deepcopy__(self, memo) -> TextTokenizer:
        return self  # nothing in it changes

    def tokenize(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Token ids of each text, int32, and how many texts were cut."""
        _be_quiet_after_fork()
        texts = [self._prompt + text for text in texts]
        if self._lower:
            texts = [text.lower() for text in texts]
        ids: list[np.ndarray] = []
        n_cut = 0
        for some in _together(texts, MOST_CHARACTERS):
            for e in self._backend.encode_batch_fast(some):
                ids.append(np.array(e.ids or [self._empty_id], np.int32))
                n_cut += bool(e.overflowing)
        return ids, n_cut

    def prompt_length(self) -> int:
        """Tokens that the prompt takes at the front, a closing token not counted."""
        if not self._prompt:
            return 0
        text = self._prompt.lower() if self._lower else self._prompt
        ids = self._backend.encode(text).ids
        return len(ids) - (ids[-1] in self._special_ids)


def _together(texts: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """Consecutive texts that have about so many characters in all."""
    start = characters = 0
    for stop, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= most or stop == len(texts):
            yield texts[start:stop]
            start, characters = stop, 0


def collate(
    ids: Sequence[np.ndarray], pad_id: int, pad_to_multiple: int, longest: int
) -> TokenIds:
    """One padded batch; the padded width never passes ``longest``."""
    lengths = np.array([len(row) for row in ids])
    widest = int(lengths.max())
    width = -(-widest // pad_to_multiple) * pad_to_multiple
    width = max(widest, min(width, longest))
    mask = np.arange(width) < lengths[:, None]  # (n, t)
    padded = np.full(mask.shape, pad_id, np.int64)
    padded[mask] = np.concatenate(ids)
    return TokenIds(torch.from_numpy(padded), torch.from_numpy(mask.astype(np.int64)))


_quiet_after_fork = False


def _be_quiet_after_fork() -> None:
    """Let no forked child print tokenizers' warning about its threads.

    The library prints unless TOKENIZERS_PARALLELISM is set when the child
    starts; setting it for good would take the threads from the parent too.
    """
    global _quiet_after_fork
    if _quiet_after_fork or not hasattr(os, "register_at_fork"):
        return
    _quiet_after_fork = True
    name, ours = "TOKENIZERS_PARALLELISM", []

    def before():
        if name not in os.environ:
            os.environ[name] = "false"
            ours.append(name)

    def after_in_parent():
        if ours:
            os.environ.pop(ours.pop(), None)

    os.register_at_fork(before=before, after_in_parent=after_in_parent)
