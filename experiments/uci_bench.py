"""One split of one data set: its networks, trained once for all methods, and what the validation rows say of them."""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.uci_data import RegressionSplit, folds_of
from experiments.uci_metrics import Forecast, metrics_of
from experiments.uci_settings import Settings, candidates_of, hidden_of, preset_of, training_of
from experiments.uci_training import Network, num_groups, train
from lowrank_bdl.models import create_model

EVALUATED_AT_ONCE = 10_000  # rows


class Bench:
    """What the methods of a split share.

    The training rows are parted into folds. Every candidate is trained once without each fold, on which it is then
    validated, and once on all training rows, which is what predicts the test rows. The test rows are looked at by
    `test` alone.

    Args:
        settings: Of the run.
        split: Its rows.
        number: Of the split.
        num_rows: Of the data set, test rows included: says which network.
        progress: Called after each epoch.

    Attributes:
        settings: As given.
        split: As given.
        net: The architecture.
        layout: Of its weights.
        candidates: What is chosen from.
    """

    def __init__(
        self,
        settings: Settings,
        split: RegressionSplit,
        number: int,
        num_rows: int,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings, self.split, self._progress = settings, split, progress
        self.seed = 1000 * settings.seed + number
        variance = "constant" if settings.noise_var and not settings.model_variance else "input"
        options: dict[str, Any] = dict(
            in_features=split.x_train.shape[1], hidden=hidden_of(settings, num_rows), variance=variance
        )
        with torch.random.fork_rng(devices=[]):
            self.net: nn.Module = create_model(settings.model, 1, **options)
        self.layout = lb.ParameterLayout.from_module(self.net)
        preset = preset_of(settings, num_rows)
        self.candidates, self._recipe = candidates_of(settings, preset), training_of(settings, preset)
        self.folds = folds_of(len(split.x_train), settings.folds, self.generator("folds"))
        self.whole = len(self.folds)  # the part that trains on every row
        self.chosen_levels: dict[Any, Any] = {}  # by the method that they were chosen with

    def generator(self, purpose: str) -> torch.Generator:
        """Return a source of randomness for one purpose, the same however often it is asked for."""
        own = sum(ord(letter) * 31**place for place, letter in enumerate(purpose[:8]))
        return torch.Generator().manual_seed(self.seed * 1_000_003 + own)

    # ---- rows ---------------------------------------------------------------------------------------------------

    def training_rows(self, part: int) -> tuple[Tensor, Tensor]:
        """Return the rows that a part trains on, (n, p) and (n, 1), float32: all but a fold, or all."""
        rows = self._rows(part)
        return self._x[rows], self._y[rows]

    def _rows(self, part: int) -> Tensor:
        return torch.cat([fold for number, fold in enumerate(self.folds) if number != part])

    def training_batches(self, part: int) -> list[tuple[Tensor, Tensor]]:
        """Return the same rows in batches for a pass without gradients."""
        return _batches(*self.training_rows(part))

    @cached_property
    def _x(self) -> Tensor:
        return self.split.x_train.float()

    @cached_property
    def _y(self) -> Tensor:
        return self.split.y_train.float()

    # ---- networks -----------------------------------------------------------------------------------------------

    @property
    def num_epochs(self) -> int:
        """How often training calls ``progress``."""
        return self._recipe.epochs * num_groups(self.net, len(self.folds) + 1, len(self.candidates))

    @cached_property
    def _networks(self) -> list[list[Network]]:
        row_sets = [self._rows(part) for part in range(len(self.folds) + 1)]
        return train(
            self.net, self._x, self._y, row_sets, self.candidates, self._recipe, self.seed, progress=self._progress
        )

    def network(self, part: int, kind: str) -> Network:
        """Return the network of a part, of the candidate that is best for ``"SGD"`` or ``"SWA"``."""
        return self._networks[self.chosen(kind)][part]

    def weights(self, network: Network, kind: str) -> Tensor:
        """Return the last iterate or the mean of the snapshots, (D,)."""
        if network.swag is None:
            raise lb.NonFiniteError("the network diverged; lower --lr_init")
        return network.last if kind == "SGD" else network.swag.mean

    @cached_property
    def search(self) -> list[dict[str, float]]:
        """Every candidate, with the mean validation log-likelihood of its last iterates and of its means."""

        def score(own: list[Network], kind: str) -> float:
            if any(network.swag is None for network in own):
                return -math.inf
            return self.validate(lambda part: self.weights(own[part], kind), 1)

        return [
            {**dataclasses.asdict(candidate), **{kind: score(own, kind) for kind in ("SGD", "SWA")}}
            for candidate, own in zip(self.candidates, self._networks, strict=True)
        ]

    def chosen(self, kind: str) -> int:
        """Return the number of the candidate with the highest validation log-likelihood.

        Raises:
            SettingsError: If all of them diverged.
        """
        scores = [entry[kind] for entry in self.search]
        if max(scores) == -math.inf:
            raise SettingsError("every candidate diverged on some fold; lower --lr_init or --clip")
        return scores.index(max(scores))

    def at_edge(self, kind: str) -> list[str]:
        """Return what the chosen candidate has the least or largest value of that was tried, of two or more.

        A better value may lie beyond. Rates of collection count among those of the chosen learning rate.
        """
        best, found = self.candidates[self.chosen(kind)], []
        for name in ("lr", "wd", "swag_lr"):
            like = [other for other in self.candidates if name != "swag_lr" or other.lr == best.lr]
            tried = sorted({getattr(other, name) for other in like})
            if len(tried) > 1 and getattr(best, name) in (tried[0], tried[-1]):
                found.append(name)
        return found

    # ---- predictions --------------------------------------------------------------------------------------------

    def forecast(self, weights: Any, x: Tensor, y: Tensor, num_samples: int) -> Forecast:
        """Return what a model average predicts."""
        return Forecast.of(
            lb.predict(
                self.net,
                weights,
                _batches(x.float(), y.float()),
                num_samples=num_samples,
                likelihood="gaussian",
                layout=self.layout,
                generator=self.generator("predict"),
                progress=False,
            )
        )

    def test(self, weights: Any) -> Forecast:
        """Return predictions of the test rows."""
        return self.forecast(weights, self.split.x_test, self.split.y_test, self.settings.num_samples)

    def validate(self, make: Callable[[int], Any], num_samples: int) -> float:
        """Return the mean log-likelihood of the validation rows [nat, normalised], each by the part without it.

        It is that of the Gaussian with the predictions' moments, as reported; −inf where nothing can be predicted.

        Args:
            make: Gives a part's weights, or what draws them.
            num_samples: Weight samples.
        """
        total = 0.0
        for part, fold in enumerate(self.folds):
            try:
                found = self.forecast(make(part), self._x[fold], self._y[fold], num_samples)
            except lb.NonFiniteError:
                return -math.inf
            total += metrics_of(found, 1.0)["normalized_gaussian_log_likelihood"] * len(fold)
        return total / len(self._x) if math.isfinite(total) else -math.inf


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(EVALUATED_AT_ONCE), y.split(EVALUATED_AT_ONCE), strict=True))
