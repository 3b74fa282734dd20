from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lowrank_bdl.errors import LowRankBDLError, NonFiniteError, ShapeError
from lowrank_bdl.parameters.batch_norm import recalibrate_batch_norm, recalibrate_batch_norm_
from lowrank_bdl.parameters.layout import ParameterLayout
from lowrank_bdl.surfaces.evaluation import PointValues, evaluate_points

NUM_DATA, CLASSES = 23, 3


def perceptron():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def data(generator):
    x = torch.randn(NUM_DATA, 4, generator=generator)
    return x, torch.randint(CLASSES, (NUM_DATA,), generator=generator)


def batches_of(data, size=5):  # 23 = 4 * 5 + 3: the last is smaller
    return list(zip(*(part.split(size) for part in data), strict=True))


def points_around(model, generator, num=7, spread=0.5):
    theta = ParameterLayout.from_module(model).flatten(model)
    return theta + spread * torch.randn(num, len(theta), generator=generator)


def by_hand(model, thetas, data, bn_batches=None):
    """Loss and accuracy of copies of the network that own the weights, on all data in one batch, in float64."""
    losses, accuracies = [], []
    for theta in thetas:
        own = deepcopy(model)
        ParameterLayout.from_module(model).assign_(own, theta)
        if bn_batches is not None:
            recalibrate_batch_norm_(own, bn_batches)
        outputs = own.double().eval()(data[0].double())
        losses.append(cross_entropy(outputs, data[1]))
        accuracies.append((outputs.argmax(1) == data[1]).double().mean())
    return torch.stack(losses).detach(), torch.stack(accuracies)


class Line:
    """Weights origin + t direction; keeps how many it was asked for at once."""

    def __init__(self, origin, direction, layout):
        self.origin, self.direction, self.layout, self.asked = origin, direction, layout, []

    def to_theta(self, t):
        self.asked.append(len(t))
        return self.origin + t[:, None] * self.direction


@pytest.mark.parametrize("vectorize", [False, True, "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_agrees_with_networks_that_own_the_weights(generator, data, vectorize, reduction):
    model = perceptron()
    thetas = points_around(model, generator)

    def loss_fn(outputs, targets):
        return cross_entropy(outputs, targets, reduction=reduction)

    found = evaluate_points(
        model, thetas, batches_of(data), loss_fn, reduction=reduction, vectorize=vectorize, progress=False
    )
    loss, accuracy = by_hand(model, thetas, data)
    torch.testing.assert_close(found.loss, loss, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.accuracy, accuracy)
    assert torch.equal(found.error, 1 - accuracy)
    torch.testing.assert_close(found.squared_norm, thetas.double().square().sum(1), rtol=1e-12, atol=0)
    expected = loss + 0.5 * 0.01 * thetas.double().square().sum(1)
    torch.testing.assert_close(found.regularized(0.01), expected, rtol=1e-6, atol=1e-7)


def test_batch_norm_statistics_are_those_of_each_point_and_serve_every_data_set(generator, data):
    model = normalised()
    thetas = points_around(model, generator)
    train = batches_of(data)
    test = (data[0][:9] + 0.1, data[1][:9])
    seen = []

    class Loader:
        def __iter__(self):
            seen.append(1)
            return iter(train)

    found = evaluate_points(
        model, thetas, {"train": train, "test": test}, cross_entropy, bn_loader=Loader(), progress=False
    )
    assert seen == [1]
    for name, one in (("train", data), ("test", test)):
        loss, accuracy = by_hand(model, thetas, one, train)
        torch.testing.assert_close(found[name].loss, loss, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[name].accuracy, accuracy)
    stale = evaluate_points(model, thetas, train, cross_entropy, progress=False)
    assert (stale.loss - found["train"].loss).abs().max() > 1e-3


def test_a_fraction_of_the_loader(generator, data):
    model = normalised()
    thetas = points_around(model, generator, num=2)
    train = batches_of(data)
    found = evaluate_points(
        model, thetas, data, cross_entropy, bn_loader=train, bn_fraction=0.4, points_per_pass=1, progress=False
    )
    torch.testing.assert_close(found.loss, by_hand(model, thetas, data, train[:2])[0], rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_is_also_after_an_error(generator, data):
    model = normalised()
    model[1].eval()
    before = deepcopy(model.state_dict())
    thetas = points_around(model, generator)

    def fails(outputs, targets):
        raise RuntimeError("no loss today")

    evaluate_points(model, thetas, data, cross_entropy, bn_loader=[data], progress=False)
    with pytest.raises(RuntimeError, match="no loss today"):
        evaluate_points(model, thetas, data, fails, bn_loader=[data], progress=False)
    assert [module.training for module in model] == [True, False, True, True] and model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_surface_makes_weights_a_few_at_a_time(generator, data):
    model = perceptron()
    layout = ParameterLayout.from_module(model)
    origin, direction = points_around(model, generator, num=2)
    line = Line(origin, direction, layout)
    t = torch.linspace(-1, 1, 11)
    found = evaluate_points(model, t, data, cross_entropy, surface=line, points_per_pass=4, progress=False)
    assert line.asked == [4, 4, 3]
    thetas = origin + t[:, None] * direction
    given = evaluate_points(model, thetas, data, cross_entropy, progress=False, vectorize=False)
    torch.testing.assert_close(found.loss, given.loss, rtol=1e-6, atol=1e-7)
    assert found.reshape(1, 11).loss.shape == (1, 11)


def test_weights_of_some_parameters(generator, data):
    model = perceptron()
    layout = ParameterLayout.from_module(model, include="2")
    thetas = layout.flatten(model) + torch.randn(3, layout.numel, generator=generator)
    found = evaluate_points(model, thetas, data, cross_entropy, layout=layout, progress=False)
    full = ParameterLayout.from_module(model)
    whole = full.flatten(model).repeat(3, 1)
    whole[:, full.slices["2.weight"].start :] = thetas
    torch.testing.assert_close(found.loss, by_hand(model, whole, data)[0], rtol=1e-6, atol=1e-7)


def test_goes_on_from_known_values(generator, data):
    model = normalised()
    thetas = points_around(model, generator, num=9)
    options = {"bn_loader": batches_of(data), "points_per_pass": 2, "progress": False}
    kept, evaluated = [], []

    def counting(outputs, targets):
        evaluated.append(1)
        return cross_entropy(outputs, targets)

    whole = evaluate_points(model, thetas, data, counting, **options)

    def interrupt(values):
        kept.append(deepcopy(values))
        if len(kept) == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        evaluate_points(model, thetas, data, counting, on_values=interrupt, **options)
    assert kept[-1].loss.isnan().tolist() == [False] * 4 + [True] * 5
    evaluated.clear()
    again = evaluate_points(model, thetas, data, counting, known=kept[-1], **options)
    assert len(evaluated) == 5
    for own, expected in ((again.loss, whole.loss), (again.accuracy, whole.accuracy)):
        assert torch.equal(own, expected)
    assert torch.equal(again.squared_norm, whole.squared_norm)
    evaluated.clear()
    evaluate_points(model, thetas, data, counting, known=again.reshape(3, 3), **options)
    assert not evaluated


def test_points_where_the_network_breaks_down_are_infinite(data):
    model = perceptron()
    layout = ParameterLayout.from_module(model)
    thetas = torch.stack([layout.flatten(model), torch.full((layout.numel,), 3e38), layout.flatten(model)])
    found = evaluate_points(model, thetas, data, cross_entropy, progress=False, vectorize=False)
    assert found.loss.isinf().tolist() == [False, True, False]
    assert found.accuracy[1] == 0  # outputs are infinite, or infinity minus infinity
    assert found.loss[0] == found.loss[2]
    torch.testing.assert_close(found.squared_norm[1].item(), layout.numel * 3e38**2, rtol=1e-6, atol=0)


def test_points_without_finite_statistics_are_infinite_and_leave_the_others_alone(generator, data):
    model = normalised()
    thetas = points_around(model, generator, num=4)
    thetas[2, : 4 * 6] = 3e38
    with pytest.raises(NonFiniteError, match="sample 2"):
        recalibrate_batch_norm(model, thetas, [data])
    found = evaluate_points(model, thetas, data, cross_entropy, bn_loader=[data], progress=False)
    assert found.loss[2] == torch.inf and found.accuracy[2] == 0
    rest = [0, 1, 3]
    alone = evaluate_points(model, thetas[rest], data, cross_entropy, bn_loader=[data], progress=False)
    assert torch.equal(found.loss[rest], alone.loss) and torch.equal(found.accuracy[rest], alone.accuracy)
    nowhere = evaluate_points(model, thetas[[2]], data, cross_entropy, bn_loader=[data], progress=False)
    assert nowhere.loss.tolist() == [torch.inf] and nowhere.accuracy.tolist() == [0.0]


def test_dense_targets_and_regression(generator):
    model = nn.Conv2d(1, CLASSES, 1)
    thetas = points_around(model, generator, num=2)
    x = torch.randn(4, 1, 3, 3, generator=generator)
    y = torch.randint(CLASSES, (4, 3, 3), generator=generator)
    found = evaluate_points(model, thetas, (x, y), cross_entropy, progress=False)
    assert torch.equal(found.accuracy, by_hand(model, thetas, (x, y))[1])
    real = evaluate_points(model, thetas, (x, x.expand(4, CLASSES, 3, 3)), mse_loss, accuracy=False, progress=False)
    assert real.accuracy is None and bool((real.loss > 0).all())
    with pytest.raises(ValueError, match="accuracy=True"):
        _ = real.error


def test_call_fn_and_double_precision(generator, data):
    model = perceptron().double()
    thetas = points_around(model, generator, num=2)
    named = [{"x": data[0].double()}, data[1]]
    found = evaluate_points(
        model, thetas, [tuple(named)], cross_entropy, call_fn=lambda net, batch: net(batch[0]["x"]), progress=False
    )
    torch.testing.assert_close(found.loss, by_hand(model, thetas, data)[0], rtol=1e-13, atol=0)


class Unbatchable(nn.Module):
    """A network that torch.vmap cannot take, as it looks at its numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.linear(x) * (1.0 if self.linear.weight.sum().item() > 0 else 2.0)


def test_insisting_on_vectorize_is_answered(generator, data):
    model = Unbatchable()
    thetas = points_around(model, generator)
    with pytest.raises(LowRankBDLError, match="vectorize=False"):
        evaluate_points(model, thetas, data, cross_entropy, vectorize=True, progress=False)


def test_bad_arguments(generator, data):
    model = perceptron()
    thetas = points_around(model, generator)

    def evaluate(points=thetas, data=data, loss_fn=cross_entropy, **options):
        return evaluate_points(model, points, data, loss_fn, progress=False, **options)

    with pytest.raises(ValueError, match="reduction must be one of mean, sum; got 'none'"):
        evaluate(reduction="none")
    with pytest.raises(ValueError, match="points_per_pass must be at least 1; got 0"):
        evaluate(points_per_pass=0)
    with pytest.raises(ValueError, match="vectorize must be True, False or 'auto'"):
        evaluate(vectorize="yes")
    with pytest.raises(ValueError, match="bn_loader is read again and again; got an iterator"):
        evaluate(bn_loader=iter([data]))
    with pytest.raises(ValueError, match="can be read only once"):
        evaluate(data=iter([data]))
    with pytest.raises(ShapeError, match="M >= 1 on the first axis"):
        evaluate(points=thetas[:0])
    with pytest.raises(ShapeError, match="points must be real"):
        evaluate(points=torch.arange(3))
    with pytest.raises(ShapeError, match=r"weights of shape \(7, 51\); got \(7, 50\)"):
        evaluate(points=thetas[:, 1:])
    with pytest.raises(ShapeError, match="at least one data set"):
        evaluate(data={})
    with pytest.raises(ShapeError, match="at least one batch"):
        evaluate(data=Nothing())
    with pytest.raises(ShapeError, match="loss_fn must return a scalar"):
        evaluate(loss_fn=lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"))
    with pytest.raises(ShapeError, match="Pass accuracy=False for regression"):
        evaluate(data=(data[0], data[0][:, :3]), loss_fn=mse_loss)
    bad = thetas.clone()
    bad[4, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="those of point 4 are not"):
        evaluate(points=bad)


class Nothing:
    def __iter__(self):
        return iter(())


def test_known_values_must_be_of_the_same_points(generator, data):
    model = perceptron()
    thetas = points_around(model, generator)
    with pytest.raises(ShapeError, match="of 7 points with accuracies; got 6 points and accuracies"):
        evaluate_points(model, thetas, data, cross_entropy, known=PointValues.unknown(6), progress=False)
    with pytest.raises(ShapeError, match="with accuracies; got 7 points and no accuracies"):
        known = PointValues.unknown(7, accuracy=False)
        evaluate_points(model, thetas, data, cross_entropy, known=known, progress=False)
    with pytest.raises(ShapeError, match=r"data sets \['a'\]; got \['b'\]"):
        evaluate_points(model, thetas, {"a": data}, cross_entropy, known={"b": PointValues.unknown(7)}, progress=False)
