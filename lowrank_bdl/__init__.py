"""Bayesian deep learning on structured linear algebra: the covariance of the weights is low-rank plus diagonal."""

# curvature
from lowrank_bdl.curvature.adapters import from_curvlinops, to_scipy
from lowrank_bdl.curvature.fisher_operator import FisherLinearOperator
from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.curvature.gradient_covariance import GradientCovariance
from lowrank_bdl.curvature.hessian import HessianLinearOperator

# errors
from lowrank_bdl.errors import (
    CheckpointError,
    LowRankBDLError,
    MemoryLimitError,
    NonFiniteError,
    NotConvergedError,
    NotPSDError,
    ShapeError,
    StaleError,
)

# structured matrices
from lowrank_bdl.linalg.block_diagonal import BlockDiagonalLinearOperator
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.kronecker import KroneckerSpectralLinearOperator
from lowrank_bdl.linalg.lanczos import Eigenpairs, LanczosProgress, lanczos
from lowrank_bdl.linalg.log_determinant import logdet
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.moments import StreamingMoments
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from lowrank_bdl.linalg.probing import StochasticEstimate
from lowrank_bdl.linalg.ring_buffer import DeviationBuffer
from lowrank_bdl.linalg.simplex_volume import log_simplex_volume
from lowrank_bdl.linalg.spectral_density import SpectralDensity, spectral_density
from lowrank_bdl.linalg.stochastic_trace import diagonal, trace

# parameters
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm, recalibrate_batch_norm_
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.memory_estimates import MemoryEstimate, estimate_memory
from lowrank_bdl.parameters.noisy_logits import NoisyLogitsLikelihood

# posteriors
from lowrank_bdl.posteriors.blocks import BlockPosterior
from lowrank_bdl.posteriors.empirical import EmpiricalPosterior
from lowrank_bdl.posteriors.gaussian import GaussianPosterior, kl_divergence
from lowrank_bdl.posteriors.laplace import DiagonalLaplace
from lowrank_bdl.posteriors.laplace_kfac import KFACLaplace
from lowrank_bdl.posteriors.mixture import MixturePosterior
from lowrank_bdl.posteriors.noise import homoscedastic_noise, relative_noise
from lowrank_bdl.posteriors.snapshots import WeightSnapshots
from lowrank_bdl.posteriors.storage import StoredPosterior, load_posterior
from lowrank_bdl.posteriors.swag import SWAG

# prediction
from lowrank_bdl.prediction import metrics
from lowrank_bdl.prediction.dense_metrics import DenseMetrics
from lowrank_bdl.prediction.patch_uncertainty import PatchUncertainty
from lowrank_bdl.prediction.predict import predict, predict_batches
from lowrank_bdl.prediction.predictive import Predictive
from lowrank_bdl.prediction.temperature import TemperatureScaling

# subspaces
from lowrank_bdl.subspaces.coordinate_slice import coordinate_slice
from lowrank_bdl.subspaces.curve import curve_subspace
from lowrank_bdl.subspaces.diagnostics import effective_sample_size, split_rhat
from lowrank_bdl.subspaces.directions import eigen_subspace, random_subspace
from lowrank_bdl.subspaces.draws import Draws
from lowrank_bdl.subspaces.elliptical_slice import elliptical_slice
from lowrank_bdl.subspaces.frequent_directions import FrequentDirections
from lowrank_bdl.subspaces.langevin import sghmc, sgld
from lowrank_bdl.subspaces.log_joint import LogJoint
from lowrank_bdl.subspaces.map_estimate import low_rank_gaussian, map_estimate
from lowrank_bdl.subspaces.normalizing_flow import normalizing_flow
from lowrank_bdl.subspaces.nuts import nuts
from lowrank_bdl.subspaces.principal import covariance_subspace, pca_subspace, principal_subspace
from lowrank_bdl.subspaces.subspace import Subspace
from lowrank_bdl.subspaces.subspace_posterior import SubspacePosterior
from lowrank_bdl.subspaces.variational import variational

# surfaces
from lowrank_bdl.surfaces.curves import BezierCurve, PolygonalChain
from lowrank_bdl.surfaces.ellipse import projected_gaussian, swag_ellipse
from lowrank_bdl.surfaces.evaluation import PointValues, evaluate_points
from lowrank_bdl.surfaces.filter_normalization import filter_normalized
from lowrank_bdl.surfaces.plane import Plane, plane
from lowrank_bdl.surfaces.ray import Ray, ray
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex
from lowrank_bdl.surfaces.surface_ensemble import SurfaceEnsemble
from lowrank_bdl.surfaces.surface_model import SurfaceModel
from lowrank_bdl.surfaces.widths import WidthProfile, orthogonal_width, pca_width, swag_width, width_profile

# training
from lowrank_bdl.training import schedules

__version__ = "0.1.0"

__all__ = [
    "BezierCurve",
    "BlockDiagonalLinearOperator",
    "BlockPosterior",
    "CheckpointError",
    "DenseMetrics",
    "DeviationBuffer",
    "DiagonalLaplace",
    "Draws",
    "Eigenpairs",
    "EmpiricalPosterior",
    "FisherLinearOperator",
    "FrequentDirections",
    "FunctionalModel",
    "GGNLinearOperator",
    "GaussianPosterior",
    "GradientCovariance",
    "HessianLinearOperator",
    "InverseLowRankPlusDiagLinearOperator",
    "KFACLaplace",
    "KroneckerSpectralLinearOperator",
    "LanczosProgress",
    "LogJoint",
    "LowRankBDLError",
    "LowRankPlusDiagLinearOperator",
    "MemoryEstimate",
    "MemoryLimitError",
    "MixturePosterior",
    "MultivariateNormal",
    "NoisyLogitsLikelihood",
    "NonFiniteError",
    "NotConvergedError",
    "NotPSDError",
    "ParameterLayout",
    "PatchUncertainty",
    "Plane",
    "PointValues",
    "PolygonalChain",
    "Predictive",
    "Ray",
    "SWAG",
    "ShapeError",
    "SimplicialComplex",
    "SpectralDensity",
    "StaleError",
    "StochasticEstimate",
    "StoredPosterior",
    "StreamingMoments",
    "Subspace",
    "SubspacePosterior",
    "SurfaceEnsemble",
    "SurfaceModel",
    "TemperatureScaling",
    "WeightSnapshots",
    "WidthProfile",
    "__version__",
    "coordinate_slice",
    "covariance_subspace",
    "curve_subspace",
    "diagonal",
    "effective_sample_size",
    "eigen_subspace",
    "elliptical_slice",
    "estimate_memory",
    "evaluate_points",
    "filter_normalized",
    "from_curvlinops",
    "homoscedastic_noise",
    "kl_divergence",
    "lanczos",
    "load_posterior",
    "log_simplex_volume",
    "logdet",
    "low_rank_gaussian",
    "map_estimate",
    "metrics",
    "normalizing_flow",
    "nuts",
    "orthogonal_width",
    "pca_subspace",
    "pca_width",
    "plane",
    "predict",
    "predict_batches",
    "principal_subspace",
    "projected_gaussian",
    "random_subspace",
    "ray",
    "recalibrate_batch_norm",
    "recalibrate_batch_norm_",
    "relative_noise",
    "schedules",
    "sghmc",
    "sgld",
    "spectral_density",
    "split_rhat",
    "swag_ellipse",
    "swag_width",
    "to_scipy",
    "trace",
    "variational",
    "width_profile",
]
