"""Every named network: published parameter counts, shapes, initial weights, use with the rest of the library."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError
from lowrank_bdl.models import MODELS, create_model

# Parameters for 10 and 100 outputs, as the released code has them.
PUBLISHED = {
    "VGG16": (15_245_130, 15_291_300),
    "VGG16BN": (15_253_578, 15_299_748),
    "VGG16NoDrop": (15_245_130, 15_291_300),
    "VGG16BNNoDrop": (15_253_578, 15_299_748),
    "VGG16Half": (3_814_314, 3_837_444),
    "VGG16Quarter": (955_098, 966_708),
    "VGG19": (20_554_826, 20_600_996),
    "VGG19BN": (20_565_834, 20_612_004),
    "PreResNet8": (77_850, 83_700),
    "PreResNet20": (272_282, 278_132),
    "PreResNet56": (590_426, 613_556),
    "PreResNet83": (868_634, 891_764),
    "PreResNet110": (1_146_842, 1_169_972),
    "PreResNet164": (1_703_258, 1_726_388),
    "WideResNet28x10": (36_489_290, 36_546_980),
}
PUBLISHED_10 = {  # published for 10 outputs alone, with the images they were made for
    "PreResNet20NoSkip": (269_818, {}),
    "PreResNet20ImageNette": (22_170, dict(image_size=160)),
    "PreResNet20NoSkipImageNette": (21_946, dict(image_size=160)),
    "LeNet5": (431_080, dict(in_channels=1, image_size=28)),
    "LeNet5Drop": (431_080, dict(in_channels=1, image_size=28)),
    "ConvFC": (2_422_634, {}),
}
PUBLISHED_SEGMENTATION = {"FCDenseNet57": 1_376_795, "FCDenseNet67": 3_463_243, "FCDenseNet103": 9_322_091}
REGRESSION = {  # data set: name, options, published count
    "elevators": ("RegNet", dict(in_features=18), 1_545_659),
    "protein": ("RegNet", dict(in_features=9), 1_536_659),
    "pol": ("RegNet", dict(in_features=26), 1_553_659),
    "skillcraft": ("RegNet", dict(in_features=19, hidden=(1000, 500, 50, 2)), 545_659),
    "boston": ("RegNet", dict(in_features=13, hidden=(50,)), 803),
    "energy": ("RegNet", dict(in_features=8, hidden=(50,)), 553),
    "yacht": ("RegNet", dict(in_features=6, hidden=(50,)), 453),
    "boston, mean alone": ("MLP", dict(in_features=13, hidden=(50,)), 751),
    "one-dimensional toy": ("ToyRegNet", {}, 15_801),
    "one-dimensional HMC": ("MLP", dict(in_features=2, hidden=(10, 10, 10)), 261),
}
DROPOUT = [name for name in MODELS if name.endswith("Drop") and "NoDrop" not in name and name not in PUBLISHED_10]


def count(name: str, num_classes: int, **options: Any) -> int:
    with torch.device("meta"):  # nothing is allocated
        return sum(parameter.numel() for parameter in create_model(name, num_classes, **options).parameters())


def seeded(name: str, seed: int = 0, num_classes: int = 3, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(name, num_classes, **options)


def published_inputs(name: str) -> dict[str, int]:
    """The channels and image size that the network was published for."""
    return {**dict(in_channels=3, image_size=32), **PUBLISHED_10.get(name, (0, {}))[1]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert (count(name, 10), count(name, 100)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_10)
def test_parameter_counts_for_ten_classes(name: str) -> None:
    expected, sizes = PUBLISHED_10[name]
    assert count(name, 10, **sizes) == expected


@pytest.mark.parametrize("name", PUBLISHED_SEGMENTATION)
def test_parameter_counts_of_segmentation_nets_for_camvid(name: str) -> None:
    assert count(name, 11) == PUBLISHED_SEGMENTATION[name]


@pytest.mark.parametrize("data", REGRESSION)
def test_parameter_counts_of_regression_nets(data: str) -> None:
    name, options, expected = REGRESSION[data]
    assert count(name, 1, **options) == expected


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_nets_have_the_parameters_of_the_same_net_without(name: str) -> None:
    """The released PreResNet164Drop has 2,537,882 weights: 245 layers under the name of 164."""
    assert (count(name, 10), count(name, 100)) == PUBLISHED[name.removesuffix("Drop")]


def test_no_network_escapes_the_tables() -> None:
    counted = {*PUBLISHED, *PUBLISHED_10, *PUBLISHED_SEGMENTATION, *DROPOUT, *(row[0] for row in REGRESSION.values())}
    assert counted == set(MODELS)
    assert all(name == spec.name for name, spec in MODELS.items())


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.task == "classification"])
def test_output_shape_of_classifiers(name: str) -> None:
    sizes = published_inputs(name)
    with torch.device("meta"):  # shapes alone: no arithmetic
        images = torch.empty(2, sizes["in_channels"], sizes["image_size"], sizes["image_size"])
        assert create_model(name, 7, **sizes)(images).shape == (2, 7)


@pytest.mark.parametrize("name", PUBLISHED_SEGMENTATION)
def test_output_shape_of_segmentation_nets(name: str) -> None:
    with torch.device("meta"):
        assert create_model(name, 11)(torch.empty(2, 3, 360, 480)).shape == (2, 11, 360, 480)


@pytest.mark.parametrize("name", ["VGG16", "VGG16BN", "PreResNet8", "PreResNet56", "WideResNet28x10", "LeNet5"])
@pytest.mark.parametrize(("channels", "size"), [(1, 33), (3, 47), (4, 64)])
def test_other_channels_and_sizes(name: str, channels: int, size: int) -> None:
    with torch.device("meta"):
        network = create_model(name, 2, in_channels=channels, image_size=size)
        assert network(torch.empty(2, channels, size, size)).shape == (2, 2)


@pytest.mark.parametrize("name", ["VGG16Quarter", "PreResNet8", "LeNet5", "RegNet", "FCDenseNet57"])
def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    options = dict(in_features=4) if name == "RegNet" else {}
    before = torch.get_rng_state()
    first, again, other = (seeded(name, seed, **options).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.recipes])
def test_recipes_are_complete_and_normalise_every_channel(name: str) -> None:
    spec = MODELS[name]
    assert spec.normalization is not None
    assert len(spec.normalization.mean) == len(spec.normalization.std) == published_inputs(name)["in_channels"]
    for recipe in spec.recipes.values():
        assert 0 < recipe.swa_start < recipe.epochs and 0 < recipe.swa_lr < recipe.lr_init


def test_a_recipe_of_the_published_table() -> None:
    recipe = MODELS["VGG16"].recipes["CIFAR100"]
    assert (recipe.epochs, recipe.lr_init, recipe.wd, recipe.swa_start, recipe.swa_lr) == (300, 0.05, 5e-4, 161, 0.01)
    assert MODELS["PreResNet164"].recipes["CIFAR10"].swa_lr == 0.01
    assert MODELS["PreResNet164"].recipes["CIFAR100"].swa_lr == 0.05
    assert MODELS["LeNet5"].recipes["MNIST"].prior_var == 0.1


def test_a_name_s_options_can_be_overridden() -> None:
    assert count("VGG16", 10, width=32) == PUBLISHED["VGG16Half"][0]


def test_layout_and_swag_take_the_network(generator: torch.Generator) -> None:
    network = seeded("PreResNet20", num_classes=10)
    layout = lb.ParameterLayout.from_module(network)
    assert layout.numel == PUBLISHED["PreResNet20"][0]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    swag = lb.SWAG(network, rank=3)
    images, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
        swag.update_parameters(network)
    draw = swag.posterior().sample(1, generator=generator)[0]
    assert draw.shape == (layout.numel,)
    own = layout.flatten(network).clone()
    network.eval()
    with torch.no_grad():
        by_functional_call = functional_call(network, layout.unflatten(draw), (images,))
        layout.assign_(network, draw)
        assert torch.equal(network(images), by_functional_call)
        layout.assign_(network, own)
        assert not torch.equal(network(images), by_functional_call)


@pytest.mark.parametrize("name", ["PreResNet8", "PreResNet56", "WideResNet28x10"])
@pytest.mark.parametrize("batched", ["branch", "shortcut"])
def test_vmap_over_some_of_the_weights(name: str, batched: str, generator: torch.Generator) -> None:
    """An addition in place would fail where the shortcut is batched and the branch is not."""
    options = dict(depth=10, widen_factor=1) if name.startswith("Wide") else dict(planes=(2, 4, 4))
    network = seeded(name, **options).double().eval()
    shortcut = [key for key, _ in network.named_parameters() if "downsample" in key or "shortcut" in key]
    branch = [key for key, _ in network.named_parameters() if "layer2.0.conv2" in key]
    keys = shortcut if batched == "shortcut" else branch
    assert keys
    state = dict(network.named_parameters())
    stacked = {
        key: torch.randn(3, *state[key].shape, generator=generator, dtype=torch.float64).mul(0.1) for key in keys
    }
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)

    def evaluate(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(network, weights, (images,))

    outputs = vmap(evaluate)(stacked)
    each = torch.stack([evaluate({key: value[i] for key, value in stacked.items()}) for i in range(3)])
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(outputs, each, rtol=1e-11, atol=1e-11)


def test_unknown_name_lists_the_known_ones_closest_first() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'vgg-16bn'; known are VGG16BN, .*LeNet5"):
        create_model("vgg-16bn", 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_classes=0), "num_classes must be at least 1; got 0"),
        (dict(num_classes=-3), "num_classes must be at least 1; got -3"),
        (dict(num_classes=2.5), "num_classes must be an integer; got 2.5"),
        (dict(num_classes=2, in_channels=0), "in_channels must be at least 1; got 0"),
        (dict(num_classes=2, image_size=0), "image_size must be at least 1; got 0"),
    ],
)
@pytest.mark.parametrize("name", ["VGG16", "PreResNet20", "MLP", "FCDenseNet57"])
def test_sizes_that_are_no_sizes(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        create_model(name, **arguments)


@pytest.mark.parametrize(
    ("name", "least"),
    [("VGG16", 32), ("VGG19BN", 32), ("PreResNet20", 8), ("WideResNet28x10", 8), ("LeNet5", 16), ("ConvFC", 15),
     ("FCDenseNet103", 32)],
)  # fmt: skip
def test_images_that_are_too_small_are_refused_and_the_least_size_runs(name: str, least: int) -> None:
    with torch.device("meta"):
        with pytest.raises(ShapeError, match=rf"takes images of {least} x {least} pixels or more; got image_size="):
            create_model(name, 2, image_size=least - 1)
        network = create_model(name, 2, image_size=least)
        assert network(torch.empty(2, 3, least, least)).shape[:2] == (2, 2)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="widht"):
        create_model("VGG16", 10, widht=3)
    with pytest.raises(TypeError, match="in_features"):
        create_model("RegNet", 1)
