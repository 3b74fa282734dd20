"""The flags of `experiments.plane`: those of the authors' scripts by the same names, and what is new."""

import math
from dataclasses import dataclass

from experiments.common import SettingsError, require_positive, setting
from experiments.hessian_points import LAST
from experiments.surface_settings import SurfaceSettings, check_shared
from experiments.uncertainty_settings import names, of_training

SPANS = ("pca", "principal", "hessian", "random", "filter")
SOURCES = ("run", "curve", "ckpt", "toy")


@dataclass(frozen=True)
class Settings(SurfaceSettings):
    """Everything that decides which plane is looked at, and how finely."""

    curve: str | None = setting(None, "a curve of experiments.curve (curve-NAME.safetensors)", kind=str)
    ckpt: str | None = setting(
        None, "three runs or files of weights, separated by commas: origin, above the x axis, on it", kind=str
    )
    toy: str | None = setting(None, "a problem to look at, in less than a minute", kind=str, choices=("two_spirals",))
    source: str = setting(LAST, "which weights of a finished run (--ckpt): last, or SWA, EMA, ...")
    model: str | None = setting(None, "network (--curve, --ckpt; default: that of the run)", kind=str)
    dataset: str = of_training("dataset")
    use_test: bool = of_training("use_test")

    span: str = setting("pca", "directions of the plane of --run", choices=SPANS)
    PC1: int = setting(0, "number of the direction along x")
    PC2: int = setting(1, "number of the direction along y")
    operator: str = setting("hessian", "curvature of --span hessian", choices=("ggn", "hessian"))
    max_products: int = setting(300, "most curvature-vector products for it")
    sigmas: float = setting(3.0, "of SWAG's ellipse, in standard deviations")

    grid_points: int = setting(41, "points along each axis")
    margin_left: float = setting(0.2, "space beside what is drawn, as a share of its width")
    margin_right: float = setting(0.2, "likewise")
    margin_bottom: float = setting(0.2, "likewise, of its height")
    margin_top: float = setting(0.2, "likewise")
    dist: float | None = setting(
        None, "in place of margins: reach in both directions (published: 30) [parameter]", kind=float
    )
    curve_points: int = setting(61, "points of the curve that is drawn")


def check(settings: Settings) -> Settings:
    """Refuse what cannot run.

    Raises:
        SettingsError: Names the flag, its bounds and its value.
    """
    check_shared(settings, PC1=0, PC2=0, max_products=1, grid_points=2, curve_points=2)
    given = [name for name in SOURCES if getattr(settings, name) is not None]
    if len(given) != 1:
        raise SettingsError(f"exactly one of --{', --'.join(SOURCES)} is needed; got {len(given)}")
    if settings.ckpt is not None and len(set(names(settings.ckpt))) != 3:
        raise SettingsError(f"--ckpt must name three different sets of weights; got {settings.ckpt!r}")
    if settings.PC1 == settings.PC2:
        raise SettingsError(f"--PC1 and --PC2 must differ; both are {settings.PC1}")
    require_positive(settings, ("sigmas", "dist"))
    for side in ("left", "right", "bottom", "top"):
        value = getattr(settings, f"margin_{side}")
        if not 0 <= value < math.inf:
            raise SettingsError(f"--margin_{side} must not be negative; got {value}")
    return settings
