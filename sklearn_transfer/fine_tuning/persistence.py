"""What of a fitted estimator is pickled, and how it comes back."""

from __future__ import annotations

import sklearn_transfer
from sklearn_transfer.fine_tuning.plans import recipe_of


class LearnedState:
    """Pickles what was learned, as numpy arrays, without the frozen weights.

    ``net_`` of an estimator that was unpickled is built when first asked for, and
    the backbone is then loaded and compared with the one that was fitted.
    """

    def __getstate__(self):
        """Parameters and what was learned."""
        state = dict(super().__getstate__())
        net = state.pop("net_", None)
        if net is not None:
            from sklearn_transfer.training.tune import as_arrays

            state["_learned"] = as_arrays(net.module_)
            state["_net_history"] = [dict(epoch) for epoch in net.history]
        state["_sklearn_transfer_version"] = sklearn_transfer.__version__
        return state

    def _snapshot(self) -> dict:
        """What a copy needs to predict as this estimator does now, for good."""
        from sklearn_transfer.training.tune import as_arrays

        learned = as_arrays(self.net_.module_)
        return {
            # On a CPU those arrays are the very memory that is trained on.
            "_learned": {name: array.copy() for name, array in learned.items()},
            "history_": list(self.history_),
            # They belong to the net that is being trained.
            "callbacks": None,
        }

    def __getattr__(self, name: str):
        # Only what is not found otherwise comes here. ``net_`` of an estimator that
        # was unpickled is built when first asked for; a property would be evaluated
        # by dir() and the HTML representation.
        if name == "net_" and "_learned" in vars(self):
            self.net_ = self._restored_net()
            del self._learned, self._net_history
            return self.net_
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def _restored_net(self):
        from skorch.history import History

        from sklearn_transfer.backbones.registry import fingerprint
        from sklearn_transfer.training.tune import from_arrays, seeded

        self._follow_parameters()
        featurizer = self._featurizer
        device, _ = featurizer._device_and_precision()
        with seeded(0, device):
            network = self._new_network()
        if self._shape["k"] < self._shape["n_stages"]:
            backbone = featurizer._load_backbone()
            found = fingerprint(backbone)
            featurizer._check_unchanged(backbone, found, featurizer._request)
        net = self._net_around(network, recipe_of(self), 0)
        from_arrays(network, self._learned)  # after: the net notes where it began
        net.forget()
        net.history_ = History(self._net_history)
        return net
