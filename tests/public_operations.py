"""Every public operation once, on a device: for tests that walk them all (devices, autocast, ...).

    for operation in OPERATIONS.values():
        call = operation.make(torch.device("cpu"))   # inputs, the same on every device
        result = call()                              # what is tested

Inputs are drawn on the CPU by a fixed seed and then moved. ``syncs`` is how often the call may make the host wait for
an accelerator; None where nothing is promised.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from lowrank_bdl.training.langevin import SGHMC, SGLD
from lowrank_bdl.training.quantization import block_floating_point
from lowrank_bdl.training.trainer import Trainer

Call = Callable[[], Any]


@dataclass(frozen=True)
class Operation:
    """One public operation.

    Attributes:
        name: What it is called in messages.
        make: Takes a device, returns the call; all inputs are on that device.
        syncs: How often the host may wait for the device in one call; None if nothing is promised.
    """

    name: str
    make: Callable[[torch.device], Call]
    syncs: int | None


OPERATIONS: dict[str, Operation] = {}


def operation(syncs: int | None = None) -> Callable[[Callable[[torch.device], Call]], Callable[[torch.device], Call]]:
    """Register the function below under its name."""

    def register(make: Callable[[torch.device], Call]) -> Callable[[torch.device], Call]:
        assert make.__name__ not in OPERATIONS, make.__name__
        OPERATIONS[make.__name__] = Operation(make.__name__, make, syncs)
        return make

    return register


# ---- inputs --------------------------------------------------------------------------------------------------------

D = 83


def normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def network(device: torch.device, *, batch_norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3)]
    if batch_norm:
        layers.insert(1, nn.BatchNorm1d(10))
    model = nn.Sequential(*layers)
    for seed, weight in enumerate(model.parameters()):
        weight.data = 0.5 * normal(torch.device("cpu"), *weight.shape, seed=seed)
    return model.to(device)


def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    x, y = normal(device, 22, 4, seed=5), (torch.arange(22) % 3).to(device)
    return list(zip(x.split(8), y.split(8), strict=True))


def move_(model: nn.Module, seed: int) -> None:
    """Move the weights as an optimiser would."""
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.add_(0.1 * normal(weight.device, *weight.shape, seed=100 * seed + number))


def collector(device: torch.device, **options: Any) -> tuple[nn.Module, lb.SWAG]:
    model = network(device)
    swag = lb.SWAG(model, rank=4, **options)
    for seed in range(1, 7):
        move_(model, seed)
        swag.update_parameters(model)
    return model, swag


def posterior(device: torch.device) -> lb.GaussianPosterior:
    return collector(device)[1].posterior()


def factorised(device: torch.device) -> lb.GaussianPosterior:
    found = posterior(device)
    found.log_prob(found.mean)
    return found


def covariance(device: torch.device, rank: int = 4, dim: int = D) -> lb.LowRankPlusDiagLinearOperator:
    diag = normal(device, dim, seed=2).square() + 0.1
    return lb.LowRankPlusDiagLinearOperator(normal(device, rank, dim, seed=1).mT, diag)


def block_diagonal(device: torch.device) -> lb.BlockDiagonalLinearOperator:
    return lb.BlockDiagonalLinearOperator(covariance(device, dim=30), covariance(device, rank=2, dim=20))


def kronecker(device: torch.device) -> lb.KroneckerSpectralLinearOperator:
    left, right = (torch.linalg.qr(normal(torch.device("cpu"), 1, n, n, seed=n).double())[0] for n in (4, 5))
    eigenvalues = normal(torch.device("cpu"), 1, 4, 5, seed=9).double().square() + 0.1
    return lb.KroneckerSpectralLinearOperator(left, right, eigenvalues).to(device)


def log_joint(device: torch.device) -> lb.LogJoint:
    model, swag = collector(device)
    return lb.LogJoint(lb.pca_subspace(swag, 2), model, "categorical", batches(device))


cross_entropy = nn.functional.cross_entropy


# ---- collectors ----------------------------------------------------------------------------------------------------


@operation(syncs=1)
def swag_update(device: torch.device) -> Call:
    model, swag = collector(device)

    def call() -> Any:
        swag.update_parameters(model)
        return swag.storage, swag.shift, swag.offset, swag.sum_sq

    return call


@operation(syncs=1)
def swag_update_of_codes(device: torch.device) -> Call:
    model, swag = collector(device, deviation_dtype=torch.float16)

    def call() -> Any:
        swag.update_parameters(model)
        return swag.deviations

    return call


@operation(syncs=0)
def swag_moments(device: torch.device) -> Call:
    swag = collector(device)[1]
    return lambda: (swag.mean, swag.variance, swag.deviations)


@operation(syncs=2)
def swag_posterior(device: torch.device) -> Call:
    swag = collector(device)[1]
    return lambda: swag.posterior().to_state()[0]


@operation(syncs=2)
def swag_posterior_of_final_deviations(device: torch.device) -> Call:
    swag = collector(device, centering="final")[1]
    return lambda: swag.posterior(rank=3, copy=True).to_state()[0]


@operation(syncs=2)
def swag_blockwise(device: torch.device) -> Call:
    swag = collector(device)[1]
    return lambda: swag.posterior(blockwise=True).stddev


@operation(syncs=1)
def streaming_moments(device: torch.device) -> Call:
    moments, other = lb.StreamingMoments(D, device=device), lb.StreamingMoments(D, device=device)
    rows = normal(device, 3, D)
    for row in rows:
        other.update(row)

    def call() -> Any:
        moments.update(rows[0])
        moments.merge(other)
        return moments.mean, moments.variance()

    return call


@operation(syncs=1)
def deviation_buffer(device: torch.device) -> Call:
    buffer, row = lb.DeviationBuffer(3, D, device=device), normal(device, D)

    def call() -> Any:
        buffer.push(row)
        return buffer.rows(), buffer.storage

    return call


@operation(syncs=2)
def weight_snapshots(device: torch.device) -> Call:
    model = network(device)
    snapshots = lb.WeightSnapshots(model, 3)

    def call() -> Any:
        snapshots.update_parameters(model)
        return snapshots.posterior().sample(2)

    return call


@operation(syncs=None)
def frequent_directions(device: torch.device) -> Call:
    model = network(device)
    sketch = lb.FrequentDirections(model, 3)

    def call() -> Any:
        for seed in range(8):
            move_(model, seed)
            sketch.update_parameters(model)
        return sketch.mean, sketch.subspace(2).gram

    return call


@operation(syncs=1)
def gradient_covariance_update(device: torch.device) -> Call:
    noise = lb.GradientCovariance(network(device), cross_entropy, rank=3)
    first, second, _ = batches(device)
    noise.update(first)

    def call() -> Any:
        noise.update(second)
        return noise.mean

    return call


@operation(syncs=1)
def gradient_covariance_update_per_example(device: torch.device) -> Call:
    noise = lb.GradientCovariance(network(device), cross_entropy, rank=3, per_example=True)
    first, second, _ = batches(device)
    noise.update(first)

    def call() -> Any:
        noise.update(second)
        return noise.mean

    return call


@operation(syncs=None)
def gradient_covariance(device: torch.device) -> Call:
    noise = lb.GradientCovariance(network(device), cross_entropy, rank=2)
    for batch in batches(device):
        noise.update(batch)
    names = ("trace", "squared_gradient_norm", "noise_scale")
    return lambda: (
        [getattr(noise, name) for name in names],
        noise.covariance.diagonal(),
        noise.recent_covariance.diagonal(),
        noise.variance,
    )


# ---- structured matrices -------------------------------------------------------------------------------------------


def _entries(op: Any, x: Tensor) -> Any:
    return op[..., [0, 1], [2, 0]], op[..., torch.tensor([1, 0]), torch.tensor([1, 2])]


def _sample(op: Any, x: Tensor) -> Any:
    return op.sample(2, generator=generator(x.device)) if hasattr(op, "sample") else op.zero_mean_mvn_samples(2).shape


def _operator(name: str, make: Callable[[torch.device], Any], size: int, **waits: int | None) -> None:
    """Register the operations that every operator has; ``waits`` are their host synchronisations where they differ."""
    uses: dict[str, tuple[int | None, Callable[[Any, Tensor], Any]]] = {
        "matmul": (0, lambda op, x: op @ x),
        "diagonal": (0, lambda op, x: op.diagonal()),
        "dense": (0, lambda op, x: op.to_dense()),
        "solve": (3, lambda op, x: op.solve(x)),
        "inv_quad_logdet": (3, lambda op, x: op.inv_quad_logdet(x, logdet=True)),
        "sample": (0, _sample),
        "entries": (3, lambda op, x: (op[..., 1, 2], op[..., 1], op[..., 3:7, :2].to_dense())),
        "entries_by_lists": (None, _entries),
        "submatrix_by_cpu_indices": (None, lambda op, x: op[..., torch.tensor([1, 0, 3]), :].to_dense()),
        "scaled_and_shifted": (
            None,
            lambda op, x: ((op * 2.0) @ x, op.add_jitter(0.1) @ x, op.add_jitter(0.1).solve(x)),
        ),
        "moved": (0, lambda op, x: op.to(x.device, torch.float32).detach().clone() @ x),
    }
    for use, (syncs, run) in uses.items():

        def make_call(device: torch.device, run: Callable[[Any, Tensor], Any] = run) -> Call:
            op, x = make(device), normal(device, size, 2, seed=3)
            return lambda: run(op, x)

        make_call.__name__ = f"{name}_{use}"
        operation(waits.get(use, syncs))(make_call)


_operator("low_rank_plus_diag", covariance, D)
_operator("batch", lambda device: covariance(device).expand(2, D, D), D)
_operator(
    "inverse",
    lambda device: covariance(device).inverse(),
    D,
    matmul=3,
    diagonal=3,
    dense=3,
    moved=3,
    sample=4,
    entries=5,
)
_operator("block_diagonal", block_diagonal, 50, solve=6, inv_quad_logdet=6)
_operator("kronecker", kronecker, 20, moved=3)


@operation(syncs=None)
def principal_components(device: torch.device) -> Call:
    op = covariance(device)

    def call() -> Any:
        low_rank, whole = op.principal_components(2), op.principal_components(2, of="full")
        return low_rank[0], low_rank[1].abs(), whole[0]

    return call


@operation(syncs=None)
def derivatives_of_a_density(device: torch.device) -> Call:
    root, diag = normal(device, 4, D, seed=1).mT.contiguous(), normal(device, D, seed=2).square() + 0.1
    x = normal(device, 2, D, seed=3)

    def call() -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in (root, diag, x)]
        law = lb.MultivariateNormal(torch.zeros_like(diag), lb.LowRankPlusDiagLinearOperator(*leaves[:2]))
        value = law.log_prob(leaves[2]).sum() + law.entropy()
        return torch.autograd.grad(value, leaves)

    return call


@operation(syncs=2)
def multivariate_normal(device: torch.device) -> Call:
    law = lb.MultivariateNormal(normal(device, D), covariance(device))
    return lambda: (law.entropy(), law.stddev, law.variance)


@operation(syncs=None)
def kl_divergence(device: torch.device) -> Call:
    p, q = posterior(device), lb.GaussianPosterior(normal(device, D), covariance(device, rank=2))
    return lambda: lb.kl_divergence(p, q)


@operation(syncs=None)
def log_simplex_volume(device: torch.device) -> Call:
    vertices = normal(device, 3, D)
    return lambda: lb.log_simplex_volume(vertices)


@operation(syncs=None)
def lanczos(device: torch.device) -> Call:
    values, start = torch.linspace(-1, 3, D).to(device), normal(device, D)

    def call() -> Any:
        pairs = lb.lanczos(lambda v: values * v, (2, 1), which="BE", start=start)
        assert pairs.converged.all()
        return pairs.eigenvalues, pairs.eigenvectors.abs()

    return call


@operation(syncs=None)
def block_lanczos(device: torch.device) -> Call:
    op = covariance(device)
    return lambda: lb.lanczos(op, 2, block_size=2, generator=generator(device), verify=True).eigenvalues


@operation(syncs=None)
def stochastic_estimates(device: torch.device) -> Call:
    op = covariance(device)

    def product(v: Tensor) -> Tensor:
        return op @ v

    size: dict[str, Any] = {"size": D, "device": device, "dtype": torch.float32}

    def call() -> Any:
        estimates = [
            lb.trace(product, 12, generator=generator(device), **size),
            lb.diagonal(product, 12, generator=generator(device), **size),
            lb.logdet(product, 3, 8, generator=generator(device), **size),
        ]
        return [estimate.value for estimate in estimates]

    return call


@operation(syncs=None)
def spectral_density(device: torch.device) -> Call:
    op = covariance(device)
    return lambda: lb.spectral_density(op, 3, 8, generator=generator(device)).nodes


# ---- parameters ----------------------------------------------------------------------------------------------------


@operation(syncs=0)
def layout(device: torch.device) -> Call:
    model = network(device)
    layout = lb.ParameterLayout.from_module(model)

    def call() -> Any:
        theta = layout.flatten(model)
        layout.assign_(model, 2 * theta)
        return theta, layout.unflatten(theta), layout.flatten(model)

    return call


@operation(syncs=0)
def functional_model(device: torch.device) -> Call:
    model = network(device)
    theta, (x, _) = lb.ParameterLayout.from_module(model).flatten(model), batches(device)[0]
    return lambda: lb.FunctionalModel(model)(2 * theta, (x, None))


@operation(syncs=None)
def batch_norm(device: torch.device) -> Call:
    model, data = network(device, batch_norm=True), batches(device)
    theta = lb.ParameterLayout.from_module(model).flatten(model).detach()

    def call() -> Any:
        found = lb.recalibrate_batch_norm(model, torch.stack([theta, 2 * theta]), data)
        lb.recalibrate_batch_norm_(model, data)
        return found, dict(model.named_buffers())

    return call


# ---- posteriors ----------------------------------------------------------------------------------------------------


@operation(syncs=0)
def draws(device: torch.device) -> Call:
    found = posterior(device)
    return lambda: (found.sample(3, generator(device)), found.rsample(2, generator(device)))


@operation(syncs=None)
def first_log_prob(device: torch.device) -> Call:
    found = posterior(device)
    return lambda: found.log_prob(found.mean + 0.01)


@operation(syncs=1)
def log_prob(device: torch.device) -> Call:
    found = factorised(device)
    return lambda: found.log_prob(torch.stack([found.mean + 0.01, found.mean]))


@operation(syncs=1)
def entropy(device: torch.device) -> Call:
    found = factorised(device)
    return lambda: (found.entropy(), found.stddev)


@operation(syncs=None)
def marginal(device: torch.device) -> Call:
    found = posterior(device)
    return lambda: [found.marginal(include).stddev for include in ("0.*", "*.bias")]


@operation(syncs=None)
def block_posterior(device: torch.device) -> Call:
    blocks = collector(device)[1].posterior(blockwise=True)
    return lambda: (blocks.sample(2, generator(device)), blocks.log_prob(blocks.mean + 0.01), blocks.entropy())


@operation(syncs=None)
def mixture(device: torch.device) -> Call:
    mixture = lb.MixturePosterior([posterior(device), posterior(device)], weights=[0.25, 0.75])
    return lambda: (mixture.sample(3, generator(device)), mixture.log_prob(mixture.mean + 0.01), mixture.stddev)


@operation(syncs=None)
def empirical(device: torch.device) -> Call:
    members = lb.EmpiricalPosterior(normal(device, 3, D), lb.ParameterLayout.from_module(network(device)))
    return lambda: (members.sample(4, generator(device)), members.mean, members.stddev, members.marginal("0.*").mean)


@operation(syncs=None)
def noise_posteriors(device: torch.device) -> Call:
    mean = normal(device, D)
    return lambda: [
        make(mean, 0.1).sample(2, generator(device)) for make in (lb.homoscedastic_noise, lb.relative_noise)
    ]


def _laplace(make: Callable[..., Any]) -> Callable[[torch.device], Call]:
    def prepare(device: torch.device) -> Call:
        model, data = network(device), batches(device)

        def call() -> Any:
            laplace = make(model, labels="expected").fit(data, progress=False)
            found = laplace.posterior(prior_precision=1.0)
            return (
                laplace.log_marginal_likelihood(1.0),
                found.stddev,
                found.log_prob(found.mean + 0.1),
                found.sample(2, generator(device)),
            )

        return call

    return prepare


OPERATIONS["diagonal_laplace"] = Operation("diagonal_laplace", _laplace(lb.DiagonalLaplace), None)
OPERATIONS["kfac_laplace"] = Operation("kfac_laplace", _laplace(lb.KFACLaplace), None)


# ---- curvature -----------------------------------------------------------------------------------------------------


def _curvature(name: str, make: Callable[[nn.Module, Any], Any]) -> None:
    def prepare(device: torch.device) -> Call:
        op, v = make(network(device), batches(device)), normal(device, D, 2)
        return lambda: (op @ v[:, 0], op @ v, lb.lanczos(op, 1, start=v[:, 0]).eigenvalues)

    OPERATIONS[name] = Operation(name, prepare, None)


_curvature("hessian", lambda model, data: lb.HessianLinearOperator(model, cross_entropy, data))
_curvature("ggn", lambda model, data: lb.GGNLinearOperator(model, cross_entropy, data))
_curvature("fisher", lambda model, data: lb.FisherLinearOperator(model, "categorical", data))
_curvature(
    "empirical_fisher", lambda model, data: lb.FisherLinearOperator(model, "categorical", data, kind="empirical")
)


# ---- subspaces -----------------------------------------------------------------------------------------------------


@operation(syncs=None)
def subspaces(device: torch.device) -> Call:
    model, swag = collector(device)
    layout, origin = swag.layout, swag.mean

    def call() -> Any:
        made = [
            lb.pca_subspace(swag, 2),
            lb.covariance_subspace(swag),
            lb.random_subspace(layout, origin, 3, generator=generator(device)),
            lb.random_subspace(layout, origin, 3, structured=True, generator=generator(device)),
            lb.curve_subspace(normal(device, 3, D), layout),
            lb.principal_subspace(swag, 2, generator=generator(device)),
        ]
        z = [torch.ones(subspace.rank, device=device) for subspace in made]
        thetas = [subspace.to_theta(one) for subspace, one in zip(made, z, strict=True)]
        return [t.square().sum() for t in thetas], [s.project(t) for s, t in zip(made, thetas, strict=True)][2:5]

    return call


@operation(syncs=None)
def subspace_of_cpu_draws(device: torch.device) -> Call:
    subspace = lb.Subspace(None, normal(device, D), normal(device, 2, D, seed=1).mT)
    return lambda: subspace.to_theta(torch.ones(5, 2))


@operation(syncs=1)
def log_joint_value(device: torch.device) -> Call:
    target, z = log_joint(device), normal(device, 3, 2)
    return lambda: target(z)


@operation(syncs=1)
def log_joint_gradient(device: torch.device) -> Call:
    target, z = log_joint(device), normal(device, 2).requires_grad_()
    return lambda: torch.autograd.grad(target(z), z)


@operation(syncs=None)
def map_in_subspace(device: torch.device) -> Call:
    target = log_joint(device)
    return lambda: lb.map_estimate(target, num_steps=3, initial=torch.zeros(2, device=device)).draws


def _chain(name: str, run: Callable[..., Any], **options: Any) -> None:
    def prepare(device: torch.device) -> Call:
        target = log_joint(device)

        def call() -> Any:
            found = run(target, 3, generator=generator(target.subspace.device), **options)
            return found.draws, lb.SubspacePosterior(target.subspace, found).sample(2, generator(device))

        return call

    OPERATIONS[name] = Operation(name, prepare, None)


_chain("elliptical_slice", lb.elliptical_slice)
_chain("coordinate_slice", lb.coordinate_slice)
_chain("sgld", lb.sgld, lr=1e-3)
_chain("sghmc", lb.sghmc, lr=1e-3)
_chain("variational", lb.variational, num_steps=3)
_chain("low_rank_gaussian", lb.low_rank_gaussian)


# ---- surfaces ------------------------------------------------------------------------------------------------------


@operation(syncs=None)
def surfaces(device: torch.device) -> Call:
    model, data = network(device), batches(device)
    layout, points = lb.ParameterLayout.from_module(model), normal(device, 3, D)

    def call() -> Any:
        plane, curve = lb.Plane.through(*points, layout=layout), lb.BezierCurve(points, layout)
        complex_ = lb.SimplicialComplex(points, layout=layout)
        values = lb.evaluate_points(model, points, data, cross_entropy, progress=False)
        return (
            plane.project(points),
            curve.sample(2, generator(device)),
            complex_.sample(2, generator(device)),
            complex_.log_volume(),
            values.loss,
            values.accuracy,
            lb.swag_ellipse(plane, posterior(device)),
            lb.filter_normalized(points[0], points[1], layout),
        )

    return call


@operation(syncs=None)
def surface_training(device: torch.device) -> Call:
    model, (batch, *_) = network(device), batches(device)
    curve = lb.BezierCurve(normal(device, 3, D), lb.ParameterLayout.from_module(model))
    surface = lb.SurfaceModel(model, curve, generator(device))

    def call() -> Any:
        cross_entropy(surface(batch[0]), batch[1]).backward()
        return [p.grad for p in surface.parameters() if p.grad is not None]

    return call


@operation(syncs=None)
def widths(device: torch.device) -> Call:
    found, model, data = posterior(device), network(device), batches(device)
    distances = torch.linspace(-1, 1, 3)
    return lambda: lb.swag_width(model, found, data, cross_entropy, distances, rank=1, progress=False).values.loss


# ---- prediction and training ---------------------------------------------------------------------------------------


@operation(syncs=None)
def predict(device: torch.device) -> Call:
    found, model, data = posterior(device), network(device), batches(device)

    def call() -> Any:
        result = lb.predict(model, found, data, 3, generator=generator(device), progress=False, keep_samples=True)
        return result.mean, result.nll, result.accuracy, result.mutual_information, result.brier

    return call


@operation(syncs=None)
def predict_with_batch_norm(device: torch.device) -> Call:
    model, data = network(device, batch_norm=True), batches(device)
    theta = lb.ParameterLayout.from_module(model).flatten(model).detach()
    thetas = torch.stack([theta, 1.1 * theta])
    return lambda: lb.predict(model, thetas, data, bn_loader=data, progress=False).mean


@operation(syncs=None)
def metrics(device: torch.device) -> Call:
    probabilities, targets = torch.softmax(normal(device, 22, 3), -1), (torch.arange(22) % 3).to(device)

    def call() -> Any:
        dense = lb.DenseMetrics(3, class_axis=-1)
        dense.update(probabilities, targets)
        return (
            lb.metrics.nll(probabilities, targets),
            lb.metrics.brier(probabilities, targets),
            lb.metrics.ece(probabilities, targets),
            dense.nll,
            dense.mean_iou,
            dense.ece,
        )

    return call


@operation(syncs=None)
def temperature(device: torch.device) -> Call:
    probabilities, targets = torch.softmax(normal(device, 22, 3), -1), (torch.arange(22) % 3).to(device)
    return lambda: lb.TemperatureScaling().fit(probabilities, targets).temperature


@operation(syncs=None)
def trainer(device: torch.device) -> Call:
    model, data = network(device), batches(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swag = lb.SWAG(model, rank=2)

    def call() -> Any:
        runner = Trainer(copy.copy(model), optimizer, _loss, collections={})
        runner.fit(data, 2, progress=False)
        swag.update_parameters(model)
        return runner.history[-1]["loss"], swag.mean

    return call


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    output = model(x)
    return cross_entropy(output, y), output


@operation(syncs=None)
def noisy_optimisers(device: torch.device) -> Call:
    values = normal(device, 6, 8)

    def call() -> Any:
        theta = nn.Parameter(values.clone())
        chains = [
            SGLD([theta], lr=0.1, num_data=5, generator=generator(device)),
            SGHMC([theta], lr=0.1, num_data=5, generator=generator(device)),
        ]
        for chain in chains:
            chain.zero_grad()
            theta.square().sum().backward()
            chain.step()
        rounded = block_floating_point(values, 4, block_dim=0, rounding="stochastic", generator=generator(device))
        return theta.detach(), rounded

    return call


@operation(syncs=None)
def noisy_logits(device: torch.device) -> Call:
    likelihood, outputs = lb.NoisyLogitsLikelihood(5, generator(device)), normal(device, 7, 2, 3)
    return lambda: likelihood(outputs).probs


RUN_NETWORKS = {
    "batch_norm", "diagonal_laplace", "functional_model", "gradient_covariance_update", "kfac_laplace",
    "gradient_covariance_update_per_example", "log_joint_gradient", "log_joint_value", "map_in_subspace", "predict",
    "predict_with_batch_norm", "surface_training", "surfaces", "trainer", "widths", "coordinate_slice",
    "elliptical_slice", "sgld", "sghmc", "variational", "nuts", "normalizing_flow", "noisy_optimisers", "temperature",
    "weight_snapshots", "subspaces", "low_rank_gaussian",
}  # fmt: skip
"""Operations in which the caller's network runs, in the caller's precision."""
