"""The CNN against the design's layers, and against a slow, obvious version in numpy."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cnn.losses import PROBABILITIES
from cnn.network_digest import network_digest
from cnn.networks import CNN, Classifier, Normalised, build_network


def random_images(num_images):
    """Return images (N, 32, 32, 3) uint8 in which no axis is like another."""
    generator = torch.Generator().manual_seed(num_images)
    return torch.randint(256, (num_images, 32, 32, 3), generator=generator, dtype=torch.uint8)


def layers(model):
    return [*model.features, *model.head]


def inputs_of(layer, model, images):
    """Return what a layer is given when the model sees these images."""
    given = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    model(images)
    handle.remove()
    return given[0]


def slow_outputs(model, images):
    """What the design says, on numpy arrays (N, C, H, W) in float64."""
    weights = [weight.detach().double().numpy() for weight in model.parameters()]
    x = np.transpose(images.numpy(), (0, 3, 1, 2)) / 127.5 - 1
    for weight, bias in zip(weights[0:6:2], weights[1:6:2], strict=True):
        x = slow_max_pool(slow_convolution(x, weight, bias))
    x = x.reshape(len(x), 1024)
    for weight, bias in zip(weights[6::2], weights[7::2], strict=True):
        x = x @ weight.T + bias
    return torch.from_numpy(x)


def slow_convolution(x, weight, bias):
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
    out = np.broadcast_to(bias[:, None, None], (len(x), len(bias), height, width)).copy()
    for i in range(5):
        for j in range(5):
            window = padded[:, :, i : i + height, j : j + width]
            out += np.einsum("nchw,kc->nkhw", window, weight[:, :, i, j])
    return out


def slow_max_pool(x):
    corners = [x[:, :, i::2, j::2] for i in range(2) for j in range(2)]
    return np.maximum.reduce(corners)


@pytest.fixture(scope="module")
def model():
    return build_network(10, seed=0)


# The network


def test_it_has_145578_parameters_for_ten_classes(model):
    assert sum(weight.numel() for weight in model.parameters()) == 145_578
    assert list(model.buffers()) == []


@pytest.mark.parametrize("num_classes", [2, 3, 100])
def test_the_last_width_follows_the_number_of_classes(num_classes):
    model = build_network(num_classes, seed=0)
    assert model(random_images(4)).shape == (4, num_classes)


def test_each_layer_is_that_of_the_design_and_has_its_shape(model):
    expected = [
        (nn.Conv2d, (4, 32, 32, 32)),
        (nn.MaxPool2d, (4, 32, 16, 16)),
        (nn.Conv2d, (4, 32, 16, 16)),
        (nn.MaxPool2d, (4, 32, 8, 8)),
        (nn.Conv2d, (4, 64, 8, 8)),
        (nn.MaxPool2d, (4, 64, 4, 4)),
        (nn.Flatten, (4, 1024)),
        (nn.Linear, (4, 64)),
        (nn.Linear, (4, 10)),
    ]
    x = inputs_of(model.features[0], model, random_images(4))
    assert x.shape == (4, 3, 32, 32)
    for layer, (kind, shape) in zip(layers(model), expected, strict=True):
        x = layer(x)
        assert type(layer) is kind
        assert x.shape == shape


def test_it_equals_a_slow_obvious_version(model):
    images = random_images(4)
    torch.testing.assert_close(
        model(images).double(), slow_outputs(model, images), rtol=0, atol=1e-6
    )


def test_it_equals_a_slow_obvious_version_to_the_last_digits_in_float64(model):
    images = random_images(4)
    outputs = copy.deepcopy(model).double()(images)
    torch.testing.assert_close(outputs, slow_outputs(model, images), rtol=0, atol=1e-14)


def test_there_is_no_activation_but_the_max_pools(model):
    """With average pools in their place, the middle of two images gives that of their outputs."""
    affine = copy.deepcopy(model).double()
    for i in (1, 3, 5):
        affine.features[i] = nn.AvgPool2d(2)
    one, other = random_images(8).div(2, rounding_mode="floor").mul(2).chunk(2)
    middle = (one / 2 + other / 2).to(torch.uint8)
    torch.testing.assert_close(affine(middle), (affine(one) + affine(other)) / 2)


def test_pixels_0_to_255_become_minus_1_to_1(model):
    levels = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 32, 32, 3)
    pixels = inputs_of(model.features[0], model, levels).permute(0, 2, 3, 1).flatten()
    torch.testing.assert_close(pixels[:256], torch.linspace(-1, 1, 256))


def test_images_and_weights_are_channels_last(model):
    weight = model.features[0].weight
    pixels = inputs_of(model.features[0], model, random_images(4))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_a_copy_in_bfloat16_gives_about_the_same_outputs(model):
    images = random_images(16)
    outputs = copy.deepcopy(model).bfloat16()(images)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), model(images), rtol=0, atol=0.01)


def test_images_are_left_as_they_are(model):
    images = random_images(4)
    model(images)
    assert torch.equal(images, random_images(4))


# Its initial weights


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    torch.manual_seed(1)
    one = build_network(10, seed=7).state_dict()
    torch.manual_seed(2)
    other = build_network(10, seed=7).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_seed_gives_other_weights():
    pairs = zip(
        build_network(10, seed=0).parameters(), build_network(10, seed=1).parameters(), strict=True
    )
    assert not any(torch.equal(one, other) for one, other in pairs)


def test_initial_weights_are_those_of_pytorch():
    torch.manual_seed(3)
    expected = CNN(10).state_dict()
    weights = build_network(10, seed=3).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_building_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    build_network(10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_leaves_the_generators_of_gpus_as_they_were(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    build_network(10, seed=0)
    assert seeded == []


# What it is, in a digest


class Small(nn.Module):
    """A network with all that a digest must see, each of which an argument changes."""

    def __init__(
        self,
        *,
        width=4,
        kernel=3,
        padding=1,
        dropout=0.5,
        momentum=0.1,
        divisor=127.5,
        mean=0.25,
        offset=0.0,
        forward=None,
        trained=True,
        tied=True,
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor([mean, 0.5, 0.75]))
        self.offset = torch.tensor(offset)  # a constant that no state_dict has
        self.divisor = divisor
        self.convolution = nn.Conv2d(3, width, kernel, padding=padding)
        self.norm = nn.BatchNorm2d(width, momentum=momentum)
        self.dropout = nn.Dropout(dropout)
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)
        if tied:
            self.other.weight = self.one.weight
        self.one.bias.requires_grad = trained
        self.last = forward or (lambda outputs: outputs)

    def forward(self, images):
        pixels = (images / self.divisor - self.mean + self.offset).permute(0, 3, 1, 2)
        features = self.dropout(self.norm(self.convolution(pixels))).mean((2, 3))
        return self.last(self.other(self.one(features)))


CHANGES = [
    {},
    {"width": 5},
    {"kernel": 5, "padding": 2},
    {"padding": 0},
    {"dropout": 0.25},  # it shows in training alone
    {"momentum": 0.2},
    {"divisor": 127.0},
    {"mean": 0.26},
    {"offset": 0.5},
    {"trained": False},
    {"tied": False},
    {"forward": torch.relu},
    {"forward": lambda outputs: outputs * 2},
    {"forward": lambda outputs: outputs * 2.0},
    {"forward": lambda outputs: outputs[:, torch.arange(3)]},
    {"forward": lambda outputs: outputs[:, [0, 1, 3]]},
    {"forward": lambda outputs: outputs[:, 1:3]},
    {"forward": lambda outputs: outputs[:, 1:]},
    {"forward": lambda outputs: outputs + torch.from_numpy(np.ones(4, np.float32))},
    {"forward": lambda outputs: outputs + torch.from_numpy(np.zeros(4, np.float32))},
    {"forward": lambda outputs: outputs.split(2, dim=1)[0]},
    {"forward": lambda outputs: outputs.split(2, dim=1)[1]},
]


def test_no_two_networks_have_the_same_digest():
    digests = [network_digest(Small(**change)) for change in CHANGES]
    same = [
        (one, other)
        for (one, digest), (other, other_digest) in itertools.combinations(
            zip(CHANGES, digests, strict=True), 2
        )
        if digest == other_digest
    ]
    assert same == []


def test_the_digest_changes_with_each_part_of_the_cnn():
    plain = network_digest(build_network(10, seed=0))
    changed = []
    for part, name, layer in [
        ("features", "0", nn.Conv2d(3, 32, 5, padding=2, bias=False)),
        ("features", "1", nn.AvgPool2d(2)),
        ("features", "3", nn.Sequential(nn.MaxPool2d(2), nn.ReLU())),
        ("head", "2", nn.Linear(64, 11)),
        ("head", "2", nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 10))),
    ]:
        model = build_network(10, seed=0)
        setattr(getattr(model, part), name, layer)
        changed.append(network_digest(model))
    assert len({plain, *changed}) == 6


@pytest.mark.parametrize("build", [lambda: build_network(10, seed=0), Small])
def test_the_digest_has_nothing_of_initial_weights_or_generators(build):
    digests = set()
    for seed in range(3):
        torch.manual_seed(seed)
        network = build()
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight))
        digests.add(network_digest(network))
        with torch.no_grad():
            digests.add(network_digest(network.eval()))
    assert len(digests) == 1


def test_the_digest_is_the_same_in_every_process_and_version():
    """Studies hold it: it may change with the network alone. Tried: PyTorch 2.11 and 2.15."""
    assert network_digest(build_network(10, seed=0)) == "5970eabd9b74487685926bee2220bc0a"


def test_the_digest_leaves_the_network_and_the_generator_as_they_were():
    network = Small().eval()
    state = copy.deepcopy(network.state_dict())
    before = torch.get_rng_state()
    network_digest(network)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_digest_is_of_images_of_the_shape_that_is_given():
    digests = {network_digest(Small(), image_shape=shape) for shape in [(32, 32, 3), (8, 16, 3)]}
    assert len(digests) == 2


# The form that is stored

every_probability = pytest.mark.parametrize("key", PROBABILITIES)


@every_probability
def test_a_classifier_gives_the_probabilities_of_the_outputs(model, key):
    images = random_images(16)
    with torch.inference_mode():
        probabilities = Classifier(model, PROBABILITIES[key])(images)
        assert torch.equal(probabilities, PROBABILITIES[key](model(images)))
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(16))


def test_a_classifier_gives_float32_of_a_network_in_bfloat16(model):
    network = copy.deepcopy(model).bfloat16()
    probabilities = Classifier(network, PROBABILITIES["softmax"])(random_images(4))
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


@every_probability
def test_an_exported_classifier_takes_any_number_of_images(model, key):
    classifier = Classifier(model, PROBABILITIES[key]).eval()
    exported = torch.export.export(
        classifier, (random_images(2),), dynamic_shapes={"images": {0: torch.export.Dim("N")}}
    ).module()
    for num_images in (1, 2, 7):
        images = random_images(num_images)
        torch.testing.assert_close(exported(images), classifier(images))


# The other networks


@pytest.mark.parametrize("name", ["cnn", "cnn_relu", "resnet", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("image_size", [32, 48])
def test_a_network_takes_images_of_any_size(name, image_size):
    network = build_network(7, seed=0, name=name, image_size=image_size).eval()
    images = torch.randint(256, (2, image_size, image_size, 3), dtype=torch.uint8)
    assert network(images).shape == (2, 7)


def test_the_cnn_with_relu_has_the_same_weights_and_no_negative_features():
    plain, relu = (build_network(10, seed=0, name=name) for name in ("cnn", "cnn_relu"))
    assert all(map(torch.equal, plain.parameters(), relu.parameters()))
    given = inputs_of(relu.head[-1], relu, random_images(3))
    assert given.min() == 0
    assert inputs_of(plain.head[-1], plain, random_images(3)).min() < 0


def test_the_resnet_is_that_of_the_paper():
    network = build_network(10, seed=0, name="resnet")
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 19
    assert sum(weight.numel() for weight in network.parameters()) == 272_474
    assert inputs_of(network.network.head, network, random_images(2)).shape == (2, 64)


def test_another_network_sees_normalised_pixels_channels_first():
    class Seeing(nn.Linear):
        def forward(self, pixels):
            self.seen = pixels
            return super().forward(pixels.flatten(1))

    network = Normalised(Seeing(3072, 2))
    images = random_images(2)
    network(images)
    expected = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(network.network.seen, expected)


def test_a_users_network_is_built_by_its_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))\n"
    )
    network = build_network(4, seed=0, name="net.py:make", image_size=16)
    assert network(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnte", "unknown network 'resnte' (did you mean 'resnet'?)"),
        ("", "unknown network ''"),
        ("torchvision:resnet19", "no image classifier 'resnet19': did you mean 'resnet18'?"),
        ("torchvision:fcn_resnet50", "no image classifier 'fcn_resnet50'"),
        ("no.such:factory", "there is no module 'no'"),
    ],
)
def test_a_network_that_there_is_not_is_refused(name, message):
    with pytest.raises(ValueError, match="network|module|torchvision") as info:
        build_network(10, seed=0, name=name)
    assert message in str(info.value)
