"""Networks that do unusual things: every matrix of them is the one that reverse-mode differentiation gives."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, mse_loss
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError
from tests.oracles import assert_close

N, CLASSES = 6, 3


class Two(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.head, self.between = nn.Linear(3, 4), nn.Linear(4, CLASSES), between

    def forward(self, x):
        return self.head(self.between(self.first(x).tanh()))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, outer):
        return -2 * outer


def hooked(hidden):
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: 3 * gradient)
    return hidden * 1


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.inner = kind(3, 4, **options)
        self.head = nn.Linear(4 * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, x):
        return self.head(self.inner(x)[0].mean(0))


class Packed(Recurrent):
    def forward(self, x):
        lengths = torch.full((len(x),), 2)
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(rnn.pad_packed_sequence(self.inner(packed)[0], batch_first=True)[0][:, -1])


class Attention(nn.Module):
    """In evaluation mode torch has a fused path for these, without derivatives."""

    def __init__(self, batch_first, mask=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=batch_first)
        self.inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=mask)
        self.head, self.axis, self.mask = nn.Linear(4, CLASSES), int(batch_first), mask

    def forward(self, x):
        mask = (torch.arange(x.shape[1]) > 3).expand(len(x), -1) if self.mask else None
        inner = self.inner(x, src_key_padding_mask=mask)
        return self.head(inner[:, 0] if self.mask else inner.mean(self.axis))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.many = nn.ParameterList([nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(4, CLASSES))})

    def forward(self, x):
        return (x @ self.many[0] + self.many[1]).tanh() @ self.named["last"]


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, CLASSES)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return self.layer(x[:, self.order] * self.mask).sin()


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return linear(x, 2 * self.weight, self.bias)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head((self.layer(x) @ self.layer.weight @ self.layer.weight.mT).tanh())


class Coupled(nn.Module):
    """Each example's output depends on the whole batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        hidden = self.layer(x)
        return self.head((hidden - hidden.mean(0) * 0.5).tanh())


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def forward(self, x):
        return checkpoint_sequential(self.body, 2, x, use_reentrant=False)


class CheckpointedWords(nn.Module):
    """Looks words up, with a sparse gradient, in a part that is computed again."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        numbers = (x * 3).long() % 7
        return self.head(checkpoint(lambda n: self.words(n).tanh().mean(1), numbers, use_reentrant=False))


def with_hook(place, backward=False):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    if backward:
        net[place].register_full_backward_hook(lambda module, inner, outer: (2 * inner[0],))
    else:
        net[place].register_forward_hook(lambda module, inputs, output: 2 * output.sin())
    return net


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES))
    net[2].weight = net[0].weight
    return net


def normed(how):
    return nn.Sequential(how(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, CLASSES)).eval()


def channels_last():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)).to(
        memory_format=torch.channels_last
    )


NETS = {
    "detached": (lambda: Two(lambda h: h.detach() + 0.5 * h), (N, 3)),
    "straight through": (lambda: Two(lambda h: h + (h.round() - h).detach()), (N, 3)),
    "reversed gradient": (lambda: Two(Reversal.apply), (N, 3)),
    "hook on a gradient": (lambda: Two(hooked), (N, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (5, N, 3)),
    "as many steps as examples": (lambda: Recurrent(nn.GRU), (N, N, 3)),
    "both directions": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (N, N, 3)),
    "packed": (lambda: Packed(nn.GRU, batch_first=True), (N, 2, 3)),
    "transformer, time first": (lambda: Attention(False), (N, N, 4)),
    "transformer": (lambda: Attention(True), (N, N, 4)),
    "transformer, padded": (lambda: Attention(True, mask=True), (N, 5, 4)),
    "lists": (Lists, (N, 3)),
    "buffers": (Buffers, (N, 3)),
    "subclass": (lambda: nn.Sequential(DoubledLinear(3, 4), nn.Tanh(), DoubledLinear(4, CLASSES)), (N, 3)),
    "weight used elsewhere": (Reused, (N, 3)),
    "coupled": (Coupled, (N, 3)),
    "checkpoints": (Sequence, (N, 3)),
    "sparse in a checkpoint": (CheckpointedWords, (N, 5)),
    "forward hook": (lambda: with_hook(0), (N, 3)),
    "forward hook at the end": (lambda: with_hook(2), (N, 3)),
    "backward hook": (lambda: with_hook(2, backward=True), (N, 3)),
    "tied": (tied, (N, 3)),
    "spectral norm": (lambda: normed(parametrizations.spectral_norm), (N, 3)),
    "orthogonal": (lambda: normed(parametrizations.orthogonal), (N, 3)),
    "channels last": (channels_last, (N, 2, 3, 3)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_matrix(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double().eval()
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    x, y = torch.randn(shape, dtype=torch.float64), torch.randint(CLASSES, (N,))
    layout = lb.ParameterLayout.from_module(net)
    theta = layout.flatten(net)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        leaves = {key: part.clone().requires_grad_() for key, part in layout.unflatten(theta).items()}
        outputs = torch.func.functional_call(plain, leaves, (x,))

        def rows(values, create_graph=False):
            each = [
                torch.autograd.grad(
                    value,
                    list(leaves.values()),
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for value in values
            ]
            return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])

        jacobian = rows(outputs.flatten()).view(N, CLASSES, -1)
        slope = rows([cross_entropy(outputs, y)], create_graph=True)[0]
        hessian = rows(slope)
    probs = outputs.detach().softmax(1)
    middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    ggn = (jacobian.mT @ middle @ jacobian).mean(0)

    vector = torch.randn_like(theta)
    for operator, expected in (
        (lb.GGNLinearOperator(net, cross_entropy, (x, y)), ggn),
        (lb.FisherLinearOperator(net, "categorical", (x, y)), ggn),
        (lb.HessianLinearOperator(net, cross_entropy, (x, y), check=False), hessian),
    ):
        assert_close(operator.to_dense(), expected.mT if expected is hessian else expected, cond=1e3)
        assert_close(operator @ vector, expected.mT @ vector, cond=1e3)
    diagonal = lb.DiagonalLaplace(net, labels="expected").fit([(x, y)], progress=False).fisher_diagonal
    assert_close(diagonal / N, ggn.diagonal(), cond=1e3)
    kronecker = lb.KFACLaplace(net, labels="expected").fit([(x, y)], progress=False)
    rest = kronecker.fisher.diagonal
    if rest:
        found = torch.cat([values.flatten() for values in rest.values()])
        assert_close(found / N, torch.cat([ggn.diagonal()[layout.slices[key]] for key in rest]), cond=1e3)
    assert set(kronecker.kinds.kronecker) | set(rest) == set(layout.names)
    covariance = lb.GradientCovariance(net, cross_entropy)
    covariance.update((x, y))
    assert_close(covariance.mean, slope.detach(), cond=1e3)


@pytest.mark.parametrize("form", [lambda o: (o,), lambda o: {"logits": o}, lambda o: [o, o]])
@pytest.mark.parametrize("loss_fn", [cross_entropy, mse_loss])
def test_outputs_that_the_loss_does_not_take(form, loss_fn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return form(self.layer(x))

    net, x = Net(), torch.randn(N, 3)
    y = torch.randint(3, (N,)) if loss_fn is cross_entropy else torch.randn(N, 3)
    message = r"loss_fn must take what the network returns; got (tuple|dict|list)\. Pass call_fn to pick the tensor"
    with pytest.raises(ShapeError, match=message):
        lb.HessianLinearOperator(net, loss_fn, (x, y))
    with pytest.raises(ShapeError, match=message):
        lb.GradientCovariance(net, loss_fn).update((x, y))
    with pytest.raises(ShapeError, match="output must be one floating-point tensor; got"):
        lb.GGNLinearOperator(net, loss_fn, (x, y))


def test_complex_parameters_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.weight).abs()

    data = (torch.randn(N, 3), torch.randint(3, (N,)))
    for make in (
        lambda: lb.HessianLinearOperator(Net(), cross_entropy, data),
        lambda: lb.KFACLaplace(Net(), labels="true"),
        lambda: lb.GradientCovariance(Net(), cross_entropy),
        lambda: lb.predict(Net(), torch.zeros(2, 9), [data], progress=False),
    ):
        with pytest.raises(ShapeError, match="Parameter 'weight' must have a real floating-point dtype"):
            make()
