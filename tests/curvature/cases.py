"""Networks with every kind of layer, and their Fisher matrices from one dense float64 Jacobian an example."""

import torch
from torch import nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.utils import parametrizations

from lowrank_bdl.parameters.layout import ParameterLayout


class Residual(nn.Module):
    """In-place activations and sums, as published residual networks have them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        out = self.relu(self.bn(self.conv1(x)))
        skip = out
        out = self.conv2(out)
        out += skip
        return self.head(self.relu(out).mean((2, 3)))


class Repeated(nn.Module):
    """Calls one layer three times: the gradient of an example is the sum over the calls."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.out(x)


class Positions(nn.Module):
    """Fully connected layers over positions, with a layer norm and a parameter of the network's own."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.embed = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(torch.tanh(self.norm(x))).mean(1)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Functional(nn.Module):
    """Uses the weight of one layer a second time, outside the layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) @ self.first.weight


class TimeFirst(nn.Module):
    """Has the positions on the first axis while its layer runs, as many of them as examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1)[:, 2]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def conv(*args, size=5, **options):
    layer = nn.Conv2d(*args, **options)
    with torch.no_grad():
        features = layer(torch.zeros(1, layer.in_channels, size, size)).flatten(1).shape[1]
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


NETS = {
    "linear": (lambda: nn.Linear(3, 3), (3,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), (3,)),
    "in place": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), (3,)),
    "conv": (lambda: conv(2, 3, 3), (2, 5, 5)),
    "conv stride": (lambda: conv(2, 3, 3, stride=(2, 1), padding=(1, 0)), (2, 5, 5)),
    "conv dilation": (lambda: conv(1, 2, 2, dilation=2, padding=1, bias=False), (1, 5, 5)),
    "conv groups": (lambda: conv(4, 4, 3, groups=2, padding=1, stride=2), (4, 5, 5)),
    "conv depthwise": (lambda: conv(3, 3, 2, groups=3, bias=False), (3, 5, 5)),
    "conv same": (lambda: conv(1, 2, (2, 3), padding="same", dilation=(1, 2)), (1, 5, 5)),
    "conv valid": (lambda: conv(1, 2, 3, padding="valid"), (1, 5, 5)),
    "conv circular": (lambda: conv(1, 2, 3, padding=(1, 2), padding_mode="circular"), (1, 5, 5)),
    "conv reflect": (lambda: conv(1, 2, 3, padding=1, padding_mode="reflect"), (1, 5, 5)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), (3,)),
    "residual": (Residual, (2, 4, 4)),
    "repeated": (Repeated, (3,)),
    "positions": (Positions, (2, 3)),
    "tied": (Tied, (3,)),
    "functional": (Functional, (3,)),
    "time first": (TimeFirst, (7, 3)),
    "recurrent": (Recurrent, (2, 3)),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3)), (3,)),
}


def build(name, dtype=torch.float64, count=7, seed=0):
    """A network in training mode with batch-norm statistics of its own, and ``count`` examples of three classes."""
    make, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().to(dtype)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        return net.train(), torch.randn(count, *shape, dtype=dtype), torch.randint(3, (count,))


def batches(x, y, sizes=(3, 1, 3)):
    """Ragged batches of everything."""
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def jacobians(net, x, layout=None):
    """The Jacobian of each example's output, from a batch of its own, shape ``(N, outputs, D)``, float64."""
    layout = ParameterLayout.from_module(net) if layout is None else layout
    weights = layout.unflatten(layout.flatten(net))
    modes = [(module, module.training) for module in net.modules()]
    net.eval()

    rows = []
    for example in x:
        parameters = {name: value.detach().requires_grad_() for name, value in weights.items()}
        outputs = functional_call(net, parameters, (example[None],)).flatten()
        each = [grad(value, list(parameters.values()), retain_graph=True) for value in outputs]
        rows.append(torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each]))
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows).double()


def outputs_of(net, x):
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(example[None]) for example in x]).double()
    for module, mode in modes:
        module.training = mode
    return found


def categorical_hessians(outputs):
    """diag(p) - p p' of each example."""
    probs = outputs.softmax(-1)
    return torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
