"""The methods of a comparison: which training run each starts from, and how it is fitted."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments.common import SettingsError
from experiments.datasets import Datasets
from experiments.evaluation import Images, predict_splits
from experiments.train import POSTERIOR, SNAPSHOTS
from experiments.train_setup import bn_images
from experiments.uncertainty_members import RunName, TrainedRun, names_of
from experiments.uncertainty_settings import Settings
from experiments.uncertainty_tuning import choose

CONTROLS = ("HomoNoise", "NaiveNoise")  # in every table: noise that has learnt nothing


@dataclass(frozen=True)
class Fitted:
    """What predicts.

    Attributes:
        run: The run whose network it is.
        weights: A posterior, or given weights.
        epochs: Epochs of training behind it.
        layout: What a weight vector holds.
        levels: Its hyper-parameters.
        tried: For a level that was chosen: each level tried, with its validation NLL [nats].
        details: More that the fit has found, for the record.
        dropout: Whether dropout stays on.
        calibrated: Whether a temperature is fitted to its predictions for the validation images.
    """

    run: TrainedRun
    weights: Any
    epochs: int
    layout: lb.ParameterLayout
    levels: Mapping[str, float | str] = field(default_factory=dict)
    tried: Sequence[tuple[float, float]] = ()
    details: Mapping[str, float] = field(default_factory=dict)
    dropout: bool = False
    calibrated: bool = False

    def networks(self, num_samples: int) -> int:
        """How many networks a prediction averages over."""
        if isinstance(self.weights, Tensor):
            return num_samples if self.dropout else 1
        if isinstance(self.weights, lb.EmpiricalPosterior):
            return min(num_samples, self.weights.num_members)
        return num_samples


class Bench:
    """Everything that a method is fitted with: runs, images, and how a level is chosen.

    Args:
        settings: Of the comparison.
        data: The data set; without validation images no level can be chosen.
        seed: Of the comparison; all that is random in a fit is a function of it.
        find: Gives the runs of a kind: one, or all members of an ensemble; of a tempered kind one at each temperature.
    """

    def __init__(
        self,
        settings: Settings,
        data: Datasets,
        seed: int,
        find: Callable[[str, bool], list[TrainedRun]],
    ) -> None:
        self.settings, self.data, self.seed, self._find = settings, data, seed, find

    def run(self, kind: str) -> TrainedRun:
        return self._find(kind, False)[0]

    def tempered(self, kind: str) -> list[TrainedRun]:
        return self._find(kind, False)

    def runs(self, kind: str) -> list[TrainedRun]:
        return self._find(kind, True)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def bn_images(self, run: TrainedRun) -> Images:
        """Training images as the run saw them, --bn_size of them: what batch norm is recalibrated on."""
        size = run.settings.bn_size if self.settings.bn_size is None else self.settings.bn_size
        return bn_images(dataclasses.replace(run.settings, bn_size=size), self.data)

    def nll(self, run: TrainedRun, weights: Any, layout: lb.ParameterLayout, dropout: bool) -> float:
        """Validation NLL [nats] with the seeds of the draws fixed, so that levels are compared on the same noise."""
        assert self.data.validation is not None, "checked before"
        try:
            found = predict_splits(
                run.model,
                weights,
                {"validation": self.data.validation},
                self.bn_images(run),
                num_samples=self.settings.tune_samples,
                seed=self.seed,
                layout=layout,
                dropout=dropout,
                progress=False,
            )["validation"]
        except lb.NonFiniteError:
            return float("inf")
        assert found.log_likelihood is not None
        return -found.log_likelihood.double().mean().item()

    def chosen(
        self,
        run: TrainedRun,
        layout: lb.ParameterLayout,
        level: str,
        given: float | None,
        start: float,
        make: Callable[[float], Any],
        *,
        factor: float = 2.0,
        dropout: bool = False,
        **fitted: Any,
    ) -> Fitted:
        """Make a posterior at the given level, or at the one with the lowest validation NLL."""
        tried: Sequence[tuple[float, float]] = ()
        bound: dict[str, Any] = {}
        if given is None:
            try:
                choice = choose(lambda value: self.nll(run, make(value), layout, dropout), start, factor=factor)
            except ValueError as error:
                raise SettingsError(f"{level}: {error}") from None
            given, tried = choice.level, choice.tried
            bound = {"at_bound": True} if choice.at_bound else {}
        fitted.setdefault("epochs", run.epochs)
        levels = {level: given, **bound, **fitted.pop("levels", {})}
        return Fitted(run, make(given), layout=layout, levels=levels, tried=tried, dropout=dropout, **fitted)


def swag_of(run: TrainedRun) -> lb.SWAG:
    assert run.swag is not None, "checked before"
    return run.swag


def sgd(bench: Bench, **options: Any) -> Fitted:
    run = bench.run("sgd")
    return Fitted(run, run.last, run.epochs, run.layout, **options)


def swa(bench: Bench, **options: Any) -> Fitted:
    run = bench.run("swag")
    swag = swag_of(run)
    return Fitted(run, swag.mean, run.epochs, swag.layout, **options)


def swag(bench: Bench, kind: str = "swag", start: float = 0.5, dropout: bool = False, **options: Any) -> Fitted:
    run = bench.run(kind)
    collector = swag_of(run)

    def make(scale: float) -> Any:
        return collector.posterior(scale=scale, **options)

    return bench.chosen(run, collector.layout, "scale", bench.settings.scale, start, make, dropout=dropout)


def multi_swag(bench: Bench) -> Fitted:
    runs = bench.runs("swag")

    def make(scale: float) -> Any:
        return lb.MixturePosterior([swag_of(run).posterior(scale=scale) for run in runs])

    epochs = sum(run.epochs for run in runs)
    layout = swag_of(runs[0]).layout
    return bench.chosen(runs[0], layout, "scale", bench.settings.scale, 0.5, make, epochs=epochs)


def ensemble(runs: Sequence[TrainedRun], thetas: Sequence[Tensor], layout: lb.ParameterLayout) -> Fitted:
    weights = lb.EmpiricalPosterior(torch.stack(list(thetas)), layout)
    return Fitted(runs[0], weights, sum(run.epochs for run in runs), layout, {"members": len(runs)})


def multi_swa(bench: Bench) -> Fitted:
    runs = bench.runs("swag")
    return ensemble(runs, [swag_of(run).mean for run in runs], swag_of(runs[0]).layout)


def deep_ensemble(bench: Bench) -> Fitted:
    runs = bench.runs("sgd")
    return ensemble(runs, [run.last for run in runs], runs[0].layout)


def written(bench: Bench, kind: str, file: str, *levels: str) -> Fitted:
    """Take the posterior that the training run wrote; the named settings of the run are its hyper-parameters.

    Of runs at several temperatures the one with the lowest validation NLL is taken.
    """
    runs = bench.tempered(kind)
    posteriors = [run.posterior(file) for run in runs]
    tried: list[tuple[float, float]] = []
    if len(runs) > 1:
        for run, own in zip(runs, posteriors, strict=True):
            tried.append((run.settings.temperature, bench.nll(run, own, own.layout, False)))
    best = min(range(len(tried)), key=lambda i: tried[i][1], default=0)
    run, posterior = runs[best], posteriors[best]
    shown = {level: getattr(run.settings, level) for level in levels}
    return Fitted(run, posterior, run.epochs, posterior.layout, shown, tried)


def snapshots_of(kind: str, *needs: str, levels: tuple[str, ...] = ()) -> "Method":
    return Method(kind, lambda bench: written(bench, kind, SNAPSHOTS, *levels), ("snapshots", *needs), file=SNAPSHOTS)


def mean_field(bench: Bench) -> Fitted:
    return written(bench, "mfvi", POSTERIOR, "prior_std", "vi_init_std", "temperature")


def dropout(bench: Bench) -> Fitted:
    run = bench.run("drop")
    return Fitted(run, run.last, run.epochs, run.layout, dropout=True)


def laplace(bench: Bench, kind: "type[lb.KFACLaplace] | type[lb.DiagonalLaplace]") -> Fitted:
    run, data, settings = bench.run("sgd"), bench.data, bench.settings
    fitted = kind(run.model, labels=settings.labels)
    fitted.fit(data.train.batches(500), generator=bench.generator(), progress=False, weight_decay=run.settings.wd)

    def make(precision: float) -> Any:
        return fitted.posterior(prior_precision=precision)

    start = len(data.train) * run.settings.wd
    found = bench.chosen(
        run, fitted.layout, "prior_precision", settings.prior_precision, start, make, factor=4.0,
        levels={"labels": settings.labels},
    )  # fmt: skip
    evidence = fitted.log_marginal_likelihood(prior_precision=float(found.levels["prior_precision"]))
    return dataclasses.replace(found, details={"log_marginal_likelihood": float(evidence)})


def homo_noise(bench: Bench) -> Fitted:
    run, mean, layout = centre(bench)

    def make(std: float) -> Any:
        return lb.homoscedastic_noise(mean, std, layout)

    return bench.chosen(run, layout, "noise_std", bench.settings.noise_std, 0.01, make)


def naive_noise(bench: Bench) -> Fitted:
    run, mean, layout = centre(bench)

    def make(fraction: float) -> Any:
        return lb.relative_noise(mean, fraction, layout)

    return bench.chosen(run, layout, "noise_fraction", bench.settings.noise_fraction, 0.1, make)


def centre(bench: Bench) -> tuple[TrainedRun, Tensor, lb.ParameterLayout]:
    """What noise is put around: the SWA solution, or the last iterate of a run that has none."""
    run = bench.run("swag")
    return (run, run.last, run.layout) if run.swag is None else (run, run.swag.mean, run.swag.layout)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        kind: The training run it starts from.
        fit: Fits it.
        needs: What the run must have; checked where --run names finished runs.
        many: Whether it takes all members of the ensemble.
        level: The setting that is chosen on the validation images unless it is given; "validation": no setting is.
        file: What the run wrote that the method is.
    """

    kind: str
    fit: Callable[[Bench], Fitted]
    needs: tuple[str, ...] = ()
    many: bool = False
    level: str | None = None
    file: str | None = None


METHODS: Mapping[str, Method] = {
    "SGD": Method("sgd", sgd, ("plain",)),
    "SWA": Method("swag", swa, ("plain", "swag")),
    "SWAG-Diag": Method("swag", lambda b: swag(b, start=1.0, rank=0), ("plain", "swag"), level="scale"),
    "SWAG": Method("swag", swag, ("plain", "deviations"), level="scale"),
    "SWAG-block": Method("swag", lambda b: swag(b, blockwise=True), ("plain", "deviations"), level="scale"),
    "MultiSWA": Method("swag", multi_swa, ("plain", "swag"), many=True),
    "MultiSWAG": Method("swag", multi_swag, ("plain", "deviations"), many=True, level="scale"),
    "DeepEnsemble": Method("sgd", deep_ensemble, ("plain",), many=True),
    "FGE": snapshots_of("fge", "plain", "cyclical"),
    "SGD-Iterates": snapshots_of("swag", "plain", "not cyclical"),
    "Dropout": Method("drop", dropout, ("plain", "dropout")),
    "SWAG-Dropout": Method(
        "swagdrop", lambda b: swag(b, "swagdrop", dropout=True), ("plain", "dropout", "deviations"), level="scale"
    ),
    "Temperature": Method("sgd", lambda b: sgd(b, calibrated=True), ("plain",), level="validation"),
    "SWA-Temperature": Method("swag", lambda b: swa(b, calibrated=True), ("plain", "swag"), level="validation"),
    "Laplace-KFAC": Method("sgd", lambda b: laplace(b, lb.KFACLaplace), ("plain",), level="prior_precision"),
    "Laplace-Diag": Method("sgd", lambda b: laplace(b, lb.DiagonalLaplace), ("plain",), level="prior_precision"),
    "SGLD": snapshots_of("sgld", "SGLD", levels=("temperature",)),
    "SGHMC": snapshots_of("sghmc", "SGHMC", levels=("temperature",)),
    "MFVI": Method("mfvi", mean_field, ("vi",), file=POSTERIOR),
    "HomoNoise": Method("swag", homo_noise, ("plain",), level="noise_std"),
    "NaiveNoise": Method("swag", naive_noise, ("plain",), level="noise_fraction"),
}


def runs_needed(settings: Settings, methods: Sequence[str], seeds: Sequence[int]) -> list[RunName]:
    """Name the training runs that the methods start from."""
    needed: dict[RunName, None] = {}
    for seed in seeds:
        for name in methods:
            method = METHODS[name]
            needed |= dict.fromkeys(names_of(settings, method.kind, seed, method.many))
    return list(needed)


def lacks(name: str, runs: Sequence[TrainedRun]) -> str | None:
    """Say what finished runs lack for a method; None if they have everything."""
    method = METHODS[name]
    if method.many and len(runs) < 2:
        return "at least two runs"
    for run in runs if method.many else runs[:1]:
        plain = run.settings.optimizer not in ("SGLD", "SGHMC") and not run.settings.vi
        cyclical = run.settings.schedule == "cyclical" and not run.settings.no_schedule
        has = {
            "plain": plain,
            "swag": run.swag is not None,
            "deviations": run.swag is not None and run.swag.rank > 0,
            "snapshots": (run.path / SNAPSHOTS).exists(),
            "cyclical": cyclical,
            "not cyclical": not cyclical,
            "dropout": any(isinstance(module, nn.modules.dropout._DropoutNd) for module in run.model.modules()),
            "SGLD": run.settings.optimizer == "SGLD",
            "SGHMC": run.settings.optimizer == "SGHMC",
            "vi": bool(run.settings.vi),
        }
        what = {
            "plain": "the iterates of an optimizer, not samples", "swag": "collected weights (--swa)",
            "deviations": "deviations (--swa --cov_mat)", "snapshots": f"{SNAPSHOTS} (--swa --snapshots)",
            "cyclical": "a cyclical schedule", "not cyclical": "a schedule without cycles",
            "dropout": "a network with dropout", "vi": "a run with --vi",
            "SGLD": "a run with --optimizer SGLD", "SGHMC": "a run with --optimizer SGHMC",
        }  # fmt: skip
        for need in method.needs:
            if not has[need]:
                return what[need]
    return None
