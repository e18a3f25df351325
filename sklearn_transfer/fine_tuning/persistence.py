"""What of a fitted estimator is kept: in pickles, and where a fit goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import sklearn_transfer
from sklearn_transfer.fine_tuning.plans import recipe_of, shape_of


class LearnedState:
    """Pickles what was learned, as numpy arrays, without the frozen weights.

    ``net_`` of an estimator that was unpickled is built when first asked for, and
    the backbone is then loaded and compared with the one that was fitted.
    """

    history_: list[dict]

    def __getstate__(self):
        """Parameters and what was learned."""
        state = dict(cast(dict, super().__getstate__()))
        net = state.pop("net_", None)
        if net is not None:
            state |= _learned_by(net)
        state["_sklearn_transfer_version"] = sklearn_transfer.__version__
        return state

    def _set_aside(self) -> None:
        """Keep what was learned; ``net_`` is built anew where it is to run now."""
        vars(self).update(_learned_by(vars(self).pop("net_")))

    @property
    def _is_tuned(self) -> bool:
        """Whether there is a network, or what one was."""
        return not {"net_", "_learned"}.isdisjoint(vars(self))

    def __sklearn_is_fitted__(self) -> bool:
        return self._is_tuned

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A fit that fails leaves what was fitted before as it was."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            # scikit-learn tears its callbacks down after us.
            theirs = {n: value for n, value in vars(self).items() if "callback" in n}
            vars(self).clear()
            vars(self).update(before | theirs)
            raise

    def _tuned_so_far(self) -> tuple[dict, str]:
        """Shape and backbone of the network that a fit goes on from."""
        self._follow_parameters()
        self.history_ = list(self.history_)  # the old one stays, should this fail
        _ = self.net_  # built, where it was unpickled, while the old featurizer is here
        return self._shape, self._featurizer._request.fingerprint

    def _check_goes_on(self, shape: dict, fingerprint: str) -> None:
        """Refuse to put what was learned into another network."""
        now = shape_of(self)
        names = ("head", "lora_rank", "pooling", "normalize", "n_features")
        changed = [name for name in names if now[name] != shape[name]]
        if self._featurizer._request.fingerprint != fingerprint:
            changed.insert(0, "backbone")
        if changed:
            raise ValueError(
                f"{' and '.join(changed)} changed since this {type(self).__name__} was "
                "fitted, and the network would be another one. Restore it, or begin "
                "anew: fit with warm_start=False."
            )

    def _follow_parameters(self) -> None:
        """Where to run may be set anew after fit.

        A pickle that names a GPU or a folder goes on where there is none; the
        fingerprint guards what was learned.
        """
        for name in ("backbone", "device", "precision", "cache", "verbose"):
            setattr(self._featurizer, name, getattr(self, name))
        if "net_" in vars(self):
            device, self.net_.precision = self._featurizer._device_and_precision()
            if self.net_.device != str(device):
                self._set_aside()

    def _snapshot(self) -> dict:
        """What a copy, which holds weights of its own, must not share with us."""
        return {
            "history_": list(self.history_),
            # They belong to the net that is being trained.
            "callbacks": None,
        }

    def __getattr__(self, name: str):
        # Only what is not found otherwise comes here. ``net_`` of an estimator that
        # was unpickled is built when first asked for; a property would be evaluated
        # by dir() and the HTML representation.
        if name == "net_" and "_learned" in vars(self):
            try:
                self.net_ = self._restored_net()
            except AttributeError as error:
                # Not as it is: hasattr() would take it for an unfitted estimator.
                raise RuntimeError("The network could not be built anew.") from error
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


def _learned_by(net) -> dict:
    """What is kept of a net, by attribute."""
    from sklearn_transfer.training.tune import as_arrays

    return {
        "_learned": as_arrays(net.module_),
        "_net_history": [dict(epoch) for epoch in net.history],
    }
