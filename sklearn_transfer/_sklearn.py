"""What differs between scikit-learn's releases, in one place: its private imports,
and its callbacks, which 1.9 brought."""

from sklearn.base import _fit_context
from sklearn.utils._param_validation import (
    Interval,
    InvalidParameterError,
    StrOptions,
)
from sklearn.utils.validation import _check_sample_weight

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # before scikit-learn 1.9, which brought callbacks

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Gives an estimator a context in which nobody listens."""

        def _init_callback_context(self, **_):
            return _NobodyListens()

    class _NobodyListens:
        def call_on_fit_task_begin(self, **_) -> None:
            pass

        def subcontext(self, **_):
            return self

        def call_on_fit_task_end(self, **_) -> bool:
            return False


__all__ = [
    "CallbackSupportMixin",
    "Interval",
    "InvalidParameterError",
    "StrOptions",
    "_check_sample_weight",
    "_fit_context",
]
