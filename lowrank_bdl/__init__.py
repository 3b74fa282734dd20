"""Bayesian deep learning on structured linear algebra: the covariance of the weights is low-rank plus diagonal."""

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
from lowrank_bdl.linalg.inverse import InverseLowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.lanczos import Eigenpairs, lanczos
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.linalg.moments import StreamingMoments
from lowrank_bdl.linalg.multivariate_normal import MultivariateNormal
from lowrank_bdl.linalg.ring_buffer import DeviationBuffer

# parameters
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm, recalibrate_batch_norm_
from lowrank_bdl.parameters.functional import FunctionalModel
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.parameters.memory_estimates import MemoryEstimate, estimate_memory

# posteriors
from lowrank_bdl.posteriors.gaussian import GaussianPosterior, kl_divergence
from lowrank_bdl.posteriors.swag import SWAG

# prediction
from lowrank_bdl.prediction import metrics
from lowrank_bdl.prediction.predict import predict
from lowrank_bdl.prediction.predictive import Predictive

# training
from lowrank_bdl.training import schedules

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DeviationBuffer",
    "Eigenpairs",
    "FunctionalModel",
    "GaussianPosterior",
    "InverseLowRankPlusDiagLinearOperator",
    "LowRankBDLError",
    "LowRankPlusDiagLinearOperator",
    "MemoryEstimate",
    "MemoryLimitError",
    "MultivariateNormal",
    "NonFiniteError",
    "NotConvergedError",
    "NotPSDError",
    "ParameterLayout",
    "Predictive",
    "SWAG",
    "ShapeError",
    "StaleError",
    "StreamingMoments",
    "__version__",
    "estimate_memory",
    "kl_divergence",
    "lanczos",
    "metrics",
    "predict",
    "recalibrate_batch_norm",
    "recalibrate_batch_norm_",
    "schedules",
]
