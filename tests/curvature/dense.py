"""Dense float64 curvature matrices by differentiating the whole, forward over reverse, and networks to try them on."""

import copy

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev
from torch.nn.functional import cross_entropy

from lowrank_bdl.parameters.layout import ParameterLayout
from tests.curvature.cases import Residual, batches


class TiedAutoencoder(nn.Module):
    """Encodes and decodes by one weight."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(16, 18)
        self.middle = nn.Linear(18, 18)
        self.decode = nn.Linear(18, 18)
        self.decode.weight = self.middle.weight
        self.head = nn.Linear(18, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.decode(torch.tanh(self.middle(torch.tanh(self.encode(x)))))))


LARGE = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)), (12,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(6 * 2 * 2, 3),
        ),
        (2, 8, 8),
    ),
    "tied": (TiedAutoencoder, (16,)),
    "residual": (Residual, (2, 4, 4)),
}


def build_large(name, dtype=torch.float64, count=13, seed=0):
    """A network of 500 to 800 weights (``residual``: 243) and ragged batches."""
    make, shape = LARGE[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().to(dtype)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
        # drawn in float64: what half precision draws differs between versions of torch
        x, y = torch.randn(count, *shape, dtype=torch.float64).to(dtype), torch.randint(3, (count,))
    return net.train(), batches(x, y, (5, 5, count - 10))


def frozen(net, bn_mode="eval"):
    """A copy in evaluation mode; with ``train`` its batch norms use the batch and keep no statistics."""
    net = copy.deepcopy(net).double().eval()
    for module in net.modules():
        if bn_mode == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
    return net


def outputs_at(net, layout, x):
    return lambda theta: functional_call(net, layout.unflatten(theta), (x.clone(),))


def mean_over(data, matrix):
    total = sum(len(y) for _, y in data)
    return sum(len(y) * matrix(x.double(), y) for x, y in data) / total


def wide_layout(net, layout):
    """The layout in float64, its coordinates as they are."""
    layout = ParameterLayout.from_module(net) if layout is None else layout
    return ParameterLayout(layout.names, layout.shapes, (torch.float64,) * len(layout.names), layout.aliases)


def dense_hessian(net, data, loss_fn=cross_entropy, layout=None, bn_mode="eval"):
    net, layout = frozen(net, bn_mode), wide_layout(net, layout)

    def matrix(x, y):
        forward = outputs_at(net, layout, x)
        # not torch.func.hessian (2.15): for layer norm, and batch norm by the batch, its matrix is not even symmetric
        return jacfwd(grad(lambda theta: loss_fn(forward(theta), y)))(layout.flatten(net))

    return mean_over(data, matrix)


def dense_ggn(net, data, loss_fn=cross_entropy, layout=None, bn_mode="eval"):
    """J' M J of each batch with one Jacobian of all its outputs, M the Hessian of ``loss_fn`` in these."""
    net, layout = frozen(net, bn_mode), wide_layout(net, layout)

    def matrix(x, y):
        forward, theta = outputs_at(net, layout, x), layout.flatten(net)
        outputs = forward(theta)
        middle = hessian(lambda flat: loss_fn(flat.view(outputs.shape), y))(outputs.flatten())
        jacobian = jacrev(forward)(theta).flatten(0, -2)
        return jacobian.mT @ middle @ jacobian

    return mean_over(data, matrix)
