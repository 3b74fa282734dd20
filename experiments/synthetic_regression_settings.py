"""The flags of `experiments.synthetic_regression`."""

import math
from dataclasses import dataclass
from importlib.util import find_spec

from experiments.common import SettingsError, require_at_least, require_fraction, require_positive, setting
from experiments.uncertainty_settings import find_names, names

SUBSPACE_METHODS = ("SGD", "SWAG", "Random+ESS", "PCA+ESS", "Curve+ESS", "VI", "NUTS")
ALL_WEIGHTS_METHODS = ("Prior", "HMC", "Ensemble", "MFVI")
METHODS = SUBSPACE_METHODS + ALL_WEIGHTS_METHODS
NEED_PYRO = ("NUTS", "HMC")
CONSTRUCTIONS = ("random", "pca", "curve")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does."""

    dir: str = setting("runs/synthetic_regression", "folder to write to", free=True)
    data_path: str | None = setting(
        None, "data.npy, or a folder with it, or with folder synthetic_regression; without, a like set is drawn",
        kind=str, free=True,
    )  # fmt: skip
    methods: str = setting("all", f"of {', '.join(METHODS)}, separated by commas", free=True)
    threads: int = setting(1, "CPU threads", free=True)
    seed: int = setting(1, "of held-out rows, initial weights, batches and draws; of the set where one is drawn")
    rows: int = setting(400, "rows of a set that is drawn")
    test_fraction: float = setting(0.1, "share of the rows between the others that is held out")
    outside_fraction: float = setting(0.1, "share of the rows, those of largest |x|, that is held out")
    grid: int = setting(161, "points of the figures' x axis")
    x_max: float = setting(10.0, "the axis is from minus this to this")
    noise_variance: float = setting(0.05, "of the likelihood")

    hidden: str = setting("200,50,50,50", "units of the hidden layers, separated by commas")
    epochs: int = setting(3000, "of SGD")
    batch_size: int = setting(50, "rows in a batch")
    lr_init: float = setting(0.01, "learning rate of SGD, which stays")
    momentum: float = setting(0.95, "of SGD")
    wd: float = setting(0.0, "weight decay")
    swag_start: int = setting(2000, "epochs before the first snapshot")
    max_num_models: int = setting(10, "deviations kept")
    scale: float = setting(10.0, "SWAG: multiplies the covariance")
    curve_epochs: int = setting(600, "of training the Bezier curve's middle point")
    curve_lr: float = setting(1e-3, "its learning rate (Adam)")
    random_rank: int = setting(10, "random directions")
    random_length: float = setting(1.0, "length of each")

    num_samples: int = setting(1000, "draws of a method, over all chains")
    chains: int = setting(4, "chains of elliptical slice sampling")
    burn_in: int = setting(50, "steps of each that are thrown away")
    thin: int = setting(1, "steps of each for a draw; more where R-hat is large")
    random_temperature: float = setting(0.15, "Random+ESS: what the log-likelihood is divided by")
    random_prior_std: float = setting(1.0, "Random+ESS: of the prior of every coordinate")
    pca_temperature: float = setting(1.5, "the same in the principal subspace")
    pca_prior_std: float = setting(5.0, "the same in the principal subspace")
    curve_temperature: float = setting(0.75, "the same in the curve's")
    curve_prior_std: float = setting(1.0, "the same in the curve's")
    vi_subspace: str = setting("curve", "VI: which subspace, with its temperature and prior", choices=CONSTRUCTIONS)
    vi_steps: int = setting(2000, "VI: steps of Adam")
    vi_lr: float = setting(0.1, "VI: its first learning rate, in units of the prior")
    nuts_subspace: str = setting("curve", "NUTS: which subspace, with its prior", choices=CONSTRUCTIONS)
    nuts_temperature: float = setting(0.5, "NUTS: what the log-likelihood is divided by")
    nuts_samples: int = setting(200, "NUTS: draws")
    nuts_warmup: int = setting(100, "NUTS: steps that adapt step size and masses")

    small_hidden: str = setting("10,10,10", "second part: units of the hidden layers of its network")
    prior_std: float = setting(
        1.0, "second part: prior standard deviation of biases, and, over the root of a layer's inputs, of weights"
    )
    hmc_chains: int = setting(3, "HMC: chains, which start at draws from the prior")
    hmc_samples: int = setting(150, "HMC: draws of each")
    hmc_warmup: int = setting(200, "HMC: steps of each that adapt step size and masses")
    hmc_depth: int = setting(6, "HMC: at most 2 to this power gradients for a draw")
    members: int = setting(10, "Ensemble: networks")
    member_steps: int = setting(1000, "Ensemble: steps of Adam for each")
    mfvi_steps: int = setting(4000, "MFVI: steps of Adam")
    resume: bool = setting(False, "go on with the run in --dir, whose finished parts are kept", free=True)


def methods_of(settings: Settings) -> list[str]:
    """Return the methods asked for, in the order of the table."""
    return find_names("methods", settings.methods, METHODS, "method")


def units_of(flag: str, text: str) -> tuple[int, ...]:
    """Return the sizes of hidden layers; an empty text is a linear model.

    Raises:
        SettingsError: If one is not a positive number.
    """
    found = names(text)
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise SettingsError(f"--{flag} must be numbers of units such as 50,50; got {text!r}")
    return tuple(map(int, found))


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    at_least = dict(
        threads=1, seed=0, rows=30, grid=3, epochs=3, batch_size=1, swag_start=0, max_num_models=2, curve_epochs=1,
        random_rank=1, num_samples=8, chains=1, burn_in=0, thin=1, vi_steps=1, nuts_samples=4, nuts_warmup=1,
        hmc_chains=1, hmc_samples=4, hmc_warmup=1, hmc_depth=1, members=2, member_steps=1, mfvi_steps=1,
    )  # fmt: skip
    require_at_least(settings, at_least)
    positive = [name for name in vars(settings) if name.endswith(("_std", "temperature", "_lr"))]
    require_positive(settings, (*positive, "x_max", "noise_variance", "lr_init", "scale", "random_length"))
    for name in ("test_fraction", "outside_fraction"):
        if not 0 <= getattr(settings, name) <= 0.4:
            raise SettingsError(f"--{name} must be between 0 and 0.4; got {getattr(settings, name)}")
    require_fraction(settings, ("momentum",))
    if not 0 <= settings.wd < math.inf:
        raise SettingsError(f"--wd must be at least 0; got {settings.wd}")
    if settings.epochs - settings.swag_start < 3:
        raise SettingsError(
            f"--swag_start must leave 3 of the {settings.epochs} epochs or more; got {settings.swag_start}"
        )
    if settings.num_samples < 4 * settings.chains:
        raise SettingsError(f"--num_samples must be at least 4 a chain; got {settings.num_samples}")
    units_of("hidden", settings.hidden), units_of("small_hidden", settings.small_hidden)
    asked = [method for method in methods_of(settings) if method in NEED_PYRO]
    if asked and find_spec("pyro") is None:
        raise SettingsError(
            f"{' and '.join(asked)} need pyro: pip install lowrank-bdl[experiments], or leave them out of --methods"
        )
    return settings
