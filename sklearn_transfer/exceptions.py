"""Errors and warnings of the package, each a subclass of what users catch anyway."""

from __future__ import annotations

import sys
import warnings

# Code between the user's line and ours.
_NOT_THE_USER = {"joblib", "sklearn", "sklearn_transfer", "skorch"}


class BackboneNotFoundError(OSError):
    """A backbone's files are not on this machine and could not be downloaded."""


class WeightsError(ValueError):
    """A weight file does not fit the network it was given for."""


class UnreadableRowsError(ValueError):
    """Some rows of X cannot be read.

    Attributes
    ----------
    rows : dict of int to str
        Position of each bad row in X, and the reason.
    """

    def __init__(self, message: str, rows: dict[int, str] | None = None):
        super().__init__(message)
        self.rows = dict(rows or {})

    def __reduce__(self):
        # The default would rebuild from args alone and lose ``rows`` on the way
        # back from a worker process.
        return type(self), (self.args[0], self.rows)


class BackboneChangedError(ValueError):
    """The backbone found now is not the one the estimator was fitted with."""


class DivergedError(FloatingPointError):
    """Training has left all bounds: its loss is not a number, or exploded."""


class UnreadableRowsWarning(UserWarning):
    """Unreadable rows became NaN rows, as ``on_error="nan"`` asked."""


class TruncatedTextWarning(UserWarning):
    """Some texts were longer than the backbone reads and were cut."""


class ImageSizeWarning(UserWarning):
    """The images are much larger than what the backbone looks at."""


class CacheWarning(UserWarning):
    """The cache could not be used; work goes on without it."""


class SharedGPUWarning(UserWarning):
    """Several processes train on one GPU."""


class MicroBatchWarning(UserWarning):
    """A batch did not fit in memory, and taking it in parts changes the result."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn with the user's own line as the place, past scikit-learn's wrappers."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_USER:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
