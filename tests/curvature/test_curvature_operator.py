"""What all curvature operators share: products, state, checks, and being a linear operator among others."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from linear_operator.operators import DiagLinearOperator, IdentityLinearOperator
from torch import nn
from torch.nn.functional import cross_entropy, dropout, mse_loss, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset

from lowrank_bdl.curvature.fisher_operator import FisherLinearOperator
from lowrank_bdl.curvature.ggn import GGNLinearOperator
from lowrank_bdl.curvature.hessian import HessianLinearOperator
from lowrank_bdl.errors import LowRankBDLError, MemoryLimitError, NonFiniteError, ShapeError, StaleError
from lowrank_bdl.linalg.low_rank_plus_diag import LowRankPlusDiagLinearOperator
from lowrank_bdl.parameters.layout import ParameterLayout
from tests.curvature.cases import batches, build
from tests.curvature.dense import build_large, dense_ggn, dense_hessian
from tests.oracles import assert_close


def hessian_of(name="mlp", **options):
    net, x, y = build(name)
    return net, HessianLinearOperator(net, cross_entropy, batches(x, y), **options)


def block(operator, *shape):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape[:-1], operator.shape[0], shape[-1], dtype=torch.float64, generator=generator)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [HessianLinearOperator, GGNLinearOperator])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_of_a_block_change_nothing(make, chunk_size):
    net, x, y = build("residual")
    operator = make(net, cross_entropy, batches(x, y), chunk_size=chunk_size)
    vectors = block(operator, 7)
    one_by_one = torch.stack([operator @ column for column in vectors.mT], dim=1)
    assert_close(operator @ vectors, one_by_one)


def test_shapes_of_vectors():
    net, hessian = hessian_of()
    dense = hessian.to_dense()
    for shape in ((3,), (2, 3), (2, 2, 1), (0,)):
        vectors = block(hessian, *shape)
        assert_close(hessian @ vectors, dense @ vectors)
    vector = block(hessian, 1)[:, 0]
    assert_close(hessian @ vector, dense @ vector)
    assert_close(vector @ hessian, vector @ dense)
    with pytest.raises(ShapeError, match=r"vectors must have 28 rows; got shape \(3,\)"):
        hessian @ torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match="vectors must be torch.float64 on cpu as the weights are; got torch.float32"):
        hessian @ torch.ones(hessian.shape[0])


def test_modes_of_the_caller_do_not_matter():
    net, hessian = hessian_of("conv")
    vectors = block(hessian, 2)
    expected = hessian @ vectors
    with torch.no_grad():
        assert_close(hessian @ vectors, expected)
    with torch.inference_mode():
        assert_close(hessian @ vectors.clone(), expected)
        net2, again = hessian_of("conv")
        assert_close(again @ vectors.clone(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(hessian @ vectors, expected)


def test_products_are_differentiable_in_the_vectors_and_leave_no_graph_behind():
    net, hessian = hessian_of()
    vector = block(hessian, 1)[:, 0].requires_grad_()
    (hessian @ vector).square().sum().backward()
    dense = hessian.to_dense()
    assert_close(vector.grad, 2 * dense @ dense @ vector.detach())
    plain = hessian @ vector.detach()
    assert not plain.requires_grad and plain.grad_fn is None


def test_a_product_frees_its_graph_without_the_garbage_collector():
    seen = []
    net, x, y = build("mlp")

    def loss_fn(outputs, targets):
        seen.append(weakref.ref(outputs))
        return cross_entropy(outputs, targets)

    for make in (HessianLinearOperator, GGNLinearOperator):
        gc.disable()
        try:
            make(net, loss_fn, batches(x, y)).to_dense()
            assert seen and all(reference() is None for reference in seen)
        finally:
            gc.enable()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        query, key, value = self.inner(x).unsqueeze(1).chunk(3, -1)
        return self.head(scaled_dot_product_attention(query, key, value).mean((1, 2)))


@pytest.mark.parametrize("make, dense", [(HessianLinearOperator, dense_hessian), (GGNLinearOperator, dense_ggn)])
def test_fused_kernels_without_second_derivatives_are_replaced(make, dense):
    torch.manual_seed(0)
    net = Attention().double()
    data = [(torch.randn(5, 2, 3).double(), torch.randint(3, (5,)))]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = dense(net, data)
    operator = make(net, cross_entropy, data)
    assert_close(operator.to_dense(), expected, cond=10)
    assert not operator._fused and operator._backward.vectorize


def test_other_errors_of_the_network_pass_through():
    net, x, y = build("mlp")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        HessianLinearOperator(net, cross_entropy, (x[:, :2], y))


# ---- what must not change --------------------------------------------------------------------------------------------


def test_dropout_is_off_and_a_function_that_leaves_it_on_is_refused():
    net, x, y = build("mlp")
    with_dropout = nn.Sequential(net[0], net[1], nn.Dropout(0.5), net[2]).train()
    expected = dense_hessian(net, [(x, y)])
    assert_close(HessianLinearOperator(with_dropout, cross_entropy, (x, y)).to_dense(), expected, cond=10)

    def call_fn(model, batch):
        return model(dropout(batch[0]))

    for make in (HessianLinearOperator, GGNLinearOperator):
        with pytest.raises(LowRankBDLError, match="must see the same function.*differs by .*dropout that is on"):
            make(net, cross_entropy, (x, y), call_fn=call_fn)
    with pytest.raises(LowRankBDLError, match="must see the same function"):
        FisherLinearOperator(net, "categorical", (x, y), call_fn=call_fn)
    unchecked = HessianLinearOperator(net, cross_entropy, (x, y), call_fn=call_fn, check=False)
    assert unchecked.num_data is None and (unchecked @ block(unchecked, 1)).isfinite().all()


class Augmented(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn_like(self.x[index]), self.y[index]


def test_augmented_data_are_refused():
    net, x, y = build("mlp")
    with pytest.raises(LowRankBDLError, match="Data that are shuffled or augmented anew in every pass"):
        HessianLinearOperator(net, cross_entropy, DataLoader(Augmented(x, y), batch_size=3))


class Shrinking:
    """Leaves out one more batch every time."""

    def __init__(self, data):
        self.data = data
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data[self.passes - 1 :])


def test_data_that_change_in_number_or_run_out_are_refused():
    net, x, y = build("mlp")
    with pytest.raises(LowRankBDLError, match="must see the same data: expected 7 examples, got 4"):
        HessianLinearOperator(net, cross_entropy, Shrinking(batches(x, y)))
    hessian = HessianLinearOperator(net, cross_entropy, Shrinking([(x, y)]), check=False)
    vectors = block(hessian, 1)
    assert (hessian @ vectors).any()
    with pytest.raises(ShapeError, match="at least one example; got none"):
        hessian @ vectors
    with pytest.raises(ShapeError, match=r"A batch must be \(x, y\), or a mapping .* targets are needed; got Tensor"):
        HessianLinearOperator(net, cross_entropy, [x])


class DetachedProduct(torch.autograd.Function):
    """x * w with a backward pass that forgets how its own result depends on w."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight.detach(), (gradient * x).sum(0)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return DetachedProduct.apply(x, self.weight)


def test_a_matrix_that_is_not_symmetric_is_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), Scale(), nn.Linear(4, 3)).double()
    data = (torch.randn(7, 3).double(), torch.randint(3, (7,)))
    with pytest.raises(LowRankBDLError, match="must be symmetric; for two vectors u'Hv is .*pass that is detached"):
        HessianLinearOperator(net, cross_entropy, data)
    dense = HessianLinearOperator(net, cross_entropy, data, check=False).to_dense()
    assert (dense - dense.mT).norm() > 0.01 * dense.norm()


def test_products_that_are_not_finite_are_refused():
    net, x, y = build("mlp")
    x[3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="must be finite; a product with it holds NaN or infinite entries"):
        HessianLinearOperator(net, cross_entropy, batches(x, y))


def test_the_check_has_room_for_single_and_half_precision():
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("conv", "residual", "mlp"):
            net, data = build_large(name, dtype=dtype)
            for make in (HessianLinearOperator, GGNLinearOperator):
                assert make(net, cross_entropy, data).num_data == 13


def test_weights_are_those_of_the_start_and_the_rest_must_stay():
    net, data = build_large("residual")
    hessian = HessianLinearOperator(net, cross_entropy, data, include=["conv1", "head"])
    vectors = block(hessian, 2)
    expected = hessian @ vectors
    with torch.no_grad():
        net.head.weight.add_(1.0)
    assert_close(hessian @ vectors, expected)
    with torch.no_grad():
        net.bn.weight.add_(1.0)
    with pytest.raises(StaleError, match="'bn.weight' has changed since. Make a new operator"):
        hessian @ vectors
    whole = HessianLinearOperator(net, cross_entropy, data)
    by_batch = HessianLinearOperator(net, cross_entropy, data, bn_mode="train")
    net(data[0][0])
    with pytest.raises(StaleError, match="'bn.num_batches_tracked' has changed since"):
        whole @ block(whole, 1)
    assert (by_batch @ block(by_batch, 1)).any(), "statistics of batch norm do not matter where it uses the batch"
    net.bn.running_mean = torch.zeros(4).double()
    with pytest.raises(StaleError, match="'bn.running_mean' has changed since"):
        whole.at(whole.theta)


def test_other_weights():
    net, hessian = hessian_of()
    hessian.to_dense(), hessian.diagonal()
    theta = hessian.theta + 0.1
    moved = hessian.at(theta)
    hessian.layout.assign_(net, theta)
    assert type(moved) is HessianLinearOperator
    assert_close(moved.to_dense(), dense_hessian(net, hessian._batches), cond=10)
    assert_close(hessian.at(moved.theta).at(hessian.theta).to_dense(), hessian.to_dense())
    with pytest.raises(ShapeError, match=r"theta must have shape \(28,\); got \(3,\)"):
        hessian.at(torch.ones(3))


def test_copies_and_files():
    net, hessian = hessian_of("residual")
    vectors = block(hessian, 2)
    expected = hessian @ vectors
    other = copy.deepcopy(hessian)
    with torch.no_grad():
        net.bn.running_mean.zero_()
    assert_close(other @ vectors, expected)
    assert_close(hessian_of("residual")[1].clone() @ vectors, expected)
    own = HessianLinearOperator(net, cross_entropy, hessian._batches)
    assert_close(pickle.loads(pickle.dumps(own)) @ vectors, own @ vectors)


# ---- a linear operator -----------------------------------------------------------------------------------------------


def test_sums_multiples_and_shifts():
    net, x, y = build("mlp")
    data = batches(x, y)
    hessian, ggn = (make(net, cross_entropy, data) for make in (HessianLinearOperator, GGNLinearOperator))
    h, g, size = hessian.to_dense(), ggn.to_dense(), hessian.shape[0]
    eye = torch.eye(size, dtype=torch.float64)
    diag = torch.arange(1.0, size + 1, dtype=torch.float64)
    low_rank = LowRankPlusDiagLinearOperator(block(hessian, 2), diag)
    vectors = block(hessian, 3)
    for operator, dense in (
        (hessian + 0.3 * IdentityLinearOperator(size, dtype=torch.float64), h + 0.3 * eye),
        (hessian.add_diagonal(torch.tensor(0.3, dtype=torch.float64)), h + 0.3 * eye),
        (hessian + DiagLinearOperator(diag), h + torch.diag(diag)),
        (2 * hessian - ggn / 4, 2 * h - g / 4),
        (-hessian, -h),
        (hessian + low_rank, h + low_rank.to_dense()),
        (hessian.mT, h),
        (hessian.detach(), h),
        (hessian.double(), h),
        (hessian.to("cpu").cpu(), h),
        (hessian.evaluate_kernel(), h),
        (3 * (hessian + hessian), 6 * h),
    ):
        assert_close(operator @ vectors, dense @ vectors, cond=10)
        assert_close(operator.to_dense(), dense, cond=10)
        assert_close(operator.diagonal(), dense.diagonal(), cond=10)
    assert hessian.dtype == torch.float64 and hessian.device == torch.device("cpu")
    assert not hessian.requires_grad and hessian.batch_shape == torch.Size([])


def test_parts_of_the_matrix(monkeypatch):
    net, hessian = hessian_of()
    dense = hessian.to_dense()
    monkeypatch.setattr("lowrank_bdl.curvature.curvature_operator._NUMBERS_AT_ONCE", 5 * hessian.shape[0])
    some = torch.tensor([4, 0, 4, -1])
    assert_close(hessian.to_dense(), dense)
    assert_close(hessian.diagonal(), dense.diagonal())
    assert_close(hessian[2, 3], dense[2, 3])
    assert_close(hessian[some, some], dense[some, some])
    assert_close(hessian[3], dense[3])
    assert_close(hessian[2:5, 1:9:2].to_dense(), dense[2:5, 1:9:2])
    assert_close(hessian[some][:, :4].to_dense(), dense[some][:, :4])
    assert_close(hessian[:, 2:] @ block(hessian, 2)[2:], dense[:, 2:] @ block(hessian, 2)[2:])
    assert hessian[:, :] is hessian
    values, vectors = hessian.diagonalization()
    assert_close(vectors.to_dense() @ torch.diag(values) @ vectors.to_dense().mT, dense, cond=100)
    assert_close(hessian.eigh()[0], torch.linalg.eigvalsh(dense), cond=10)
    with pytest.raises(NotImplementedError, match="method 'symeig' or None; got 'lanczos'. Use lanczos"):
        hessian.diagonalization("lanczos")
    with pytest.raises(MemoryLimitError, match=r"dense \(28, 28\) matrix needs"):
        hessian.to_dense(limit_gib=1e-9)
    with pytest.raises(IndexError, match="index 28 is out of range"):
        hessian[28, 0]


def test_what_supposes_a_positive_definite_matrix_is_refused():
    net, hessian = hessian_of()
    vector = torch.ones(28, dtype=torch.float64)
    for call in (
        lambda: hessian.solve(vector),
        lambda: hessian.logdet(),
        lambda: hessian.inv_quad_logdet(vector, logdet=True),
        lambda: hessian.zero_mean_mvn_samples(2),
        lambda: hessian.root_decomposition(),
        lambda: hessian.root_inv_decomposition(),
        lambda: hessian.cholesky(),
    ):
        with pytest.raises(NotImplementedError, match="may be singular or indefinite"):
            call()
    shifted = GGNLinearOperator(net, cross_entropy, hessian._batches).add_diagonal(torch.tensor(0.5).double())
    assert_close(shifted.solve(vector), torch.linalg.solve(shifted.to_dense(), vector), cond=100)


def test_other_dtypes_devices_and_derivatives_are_refused():
    net, hessian = hessian_of()
    for call in (lambda: hessian.float(), lambda: hessian.to(torch.float16), lambda: hessian.to("meta")):
        with pytest.raises(TypeError, match="computes in torch.float64 on cpu as the model does; expected that, got"):
            call()
    assert hessian.requires_grad_(False) is hessian
    with pytest.raises(NotImplementedError, match="no derivative with respect to the weights"):
        hessian.requires_grad_(True)


def test_refuses_contradicting_options():
    net, x, y = build("mlp")
    layout = ParameterLayout.from_module(net)
    with pytest.raises(ValueError, match="expected no include or exclude beside it"):
        HessianLinearOperator(net, cross_entropy, (x, y), layout=layout, include="*")
    with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
        HessianLinearOperator(net, cross_entropy, (x, y), chunk_size=0)
    with pytest.raises(ShapeError, match="Model and layout differ first at parameter 'weight'"):
        HessianLinearOperator(net, mse_loss, (x, y), layout=ParameterLayout.from_module(nn.Linear(3, 3)))
