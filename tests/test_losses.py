"""The losses against a slow, obvious oracle: Python floats, one image at a time, no torch."""

import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cnn.losses import LOSSES, PROBABILITIES, Loss, get_loss, smoothed

Row = list[float]


def log_softmax(row: Row) -> Row:
    largest = max(row)
    log_sum = largest + math.log(sum(math.exp(o - largest) for o in row))
    return [o - log_sum for o in row]


def softmax(row: Row) -> Row:
    return [math.exp(logarithm) for logarithm in log_softmax(row)]


def log_sigmoid(o: float) -> float:
    return min(o, 0.0) - math.log1p(math.exp(-abs(o)))


def target(row: Row, label: int) -> Row:
    return [1.0 if k == label else 0.0 for k in range(len(row))]


def mean_over_classes(error: Callable[[float, float], float]) -> Callable[[Row, int], float]:
    def loss(row: Row, label: int) -> float:
        pairs = zip(row, target(row, label), strict=True)
        return sum(error(o, t) for o, t in pairs) / len(row)

    return loss


def l1_softmax(row: Row, label: int) -> float:
    pairs = zip(softmax(row), target(row, label), strict=True)
    return sum(abs(p - t) for p, t in pairs) / 2


def mse_softmax(row: Row, label: int) -> float:
    pairs = zip(softmax(row), target(row, label), strict=True)
    return sum((p - t) ** 2 for p, t in pairs)


def label_smoothing(row: Row, label: int) -> float:
    pairs = zip(log_softmax(row), target(row, label), strict=True)
    return -sum((0.9 * t + 0.1 / len(row)) * logarithm for logarithm, t in pairs)


def squentropy(row: Row, label: int) -> float:
    wrong = [o for k, o in enumerate(row) if k != label]
    return -log_softmax(row)[label] + sum(o**2 for o in wrong) / len(wrong)


def multi_margin(row: Row, label: int) -> float:
    wrong = [o for k, o in enumerate(row) if k != label]
    return sum(max(0.0, 1.0 - row[label] + o) for o in wrong) / len(row)


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) < 1 else abs(error) - 0.5


# Loss of one image, from its outputs and its label.
ORACLES: dict[str, Callable[[Row, int], float]] = {
    "l1": mean_over_classes(lambda o, t: abs(o - t)),
    "mse": mean_over_classes(lambda o, t: (o - t) ** 2),
    "cross_entropy": lambda row, label: -log_softmax(row)[label],
    "smooth_l1": mean_over_classes(lambda o, t: huber(o - t)),
    "l1_softmax": l1_softmax,
    "mse_softmax": mse_softmax,
    "bce": mean_over_classes(lambda o, t: -t * log_sigmoid(o) - (1 - t) * log_sigmoid(-o)),
    "label_smoothing": label_smoothing,
    "focal": lambda row, label: -((1 - softmax(row)[label]) ** 2) * log_softmax(row)[label],
    "squentropy": squentropy,
    "poly1": lambda row, label: -log_softmax(row)[label] + 2.0 * (1 - softmax(row)[label]),
    "gce": lambda row, label: (1 - softmax(row)[label] ** 0.7) / 0.7,
    "multi_margin": multi_margin,
    "squared_hinge": mean_over_classes(
        lambda o, t: max(0.0, 1 - o) ** 2 if t == 1 else max(0.0, 1 + o) ** 2
    ),
}


def oracle(name: str, outputs: Tensor, labels: Tensor) -> float:
    rows: list[Row] = outputs.tolist()
    pairs = zip(rows, labels.tolist(), strict=True)
    return sum(ORACLES[name](row, label) for row, label in pairs) / len(rows)


def random_batch(
    num_images: int, num_classes: int, *, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * num_images + num_classes)
    outputs = torch.randn(num_images, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    return (scale * outputs).to(dtype), labels


def saturated_batch(size: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every label with every kind of row: all high, all low, one high, one low, all zero."""
    rows = [[size] * 3, [-size] * 3, [size, -size, -size], [-size, size, size], [0.0] * 3]
    outputs = torch.tensor([row for row in rows for _ in range(3)], dtype=dtype)
    return outputs, torch.arange(3).repeat(len(rows))


every_loss = pytest.mark.parametrize("name", LOSSES)
every_probability = pytest.mark.parametrize("key", PROBABILITIES)


def test_the_losses_are_these_in_this_order() -> None:
    assert list(LOSSES) == [
        "l1",
        "mse",
        "cross_entropy",
        "smooth_l1",
        "l1_softmax",
        "mse_softmax",
        "bce",
        "label_smoothing",
        "focal",
        "squentropy",
        "poly1",
        "gce",
        "multi_margin",
        "squared_hinge",
    ]


def test_every_loss_has_an_oracle() -> None:
    assert list(ORACLES) == list(LOSSES)


@every_loss
def test_an_entry_is_of_its_name_and_says_where_it_is_from(name: str) -> None:
    loss = LOSSES[name]
    assert loss.name == name
    assert loss.function.__name__ == name
    assert loss.function.__doc__
    assert loss.source


@every_loss
@pytest.mark.parametrize("num_images", [1, 7])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_loss_equals_its_oracle(name: str, num_images: int, num_classes: int) -> None:
    outputs, labels = random_batch(num_images, num_classes)
    loss = LOSSES[name](outputs, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(oracle(name, outputs, labels), rel=1e-12)


@every_loss
@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_loss_equals_its_oracle_at_saturated_outputs(
    name: str, size: float, dtype: torch.dtype
) -> None:
    for outputs, label in zip(*saturated_batch(size, dtype=dtype), strict=True):
        row, labels = outputs.unsqueeze(0), label.unsqueeze(0)
        loss = LOSSES[name](row, labels).item()
        assert loss == pytest.approx(oracle(name, row, labels), rel=1e-6, abs=1e-6)


@every_loss
def test_an_oracle_is_satisfied_by_no_other_loss(name: str) -> None:
    outputs, labels = random_batch(7, 10)
    expected = oracle(name, outputs, labels)
    for other in LOSSES.keys() - {name}:
        assert LOSSES[other](outputs, labels).item() != pytest.approx(expected, rel=1e-3)


def test_cross_entropy_of_the_worked_example() -> None:
    loss = LOSSES["cross_entropy"](torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([1]))
    assert round(loss.item(), 4) == 1.1019


@pytest.mark.parametrize("name", ["l1", "mse", "smooth_l1"])
def test_a_regression_is_zero_at_its_targets(name: str) -> None:
    assert LOSSES[name](torch.eye(3), torch.arange(3)).item() == 0


@every_loss
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    outputs, labels = random_batch(5, 4)
    assert torch.autograd.gradcheck(LOSSES[name], (outputs.requires_grad_(), labels))


@every_loss
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_loss_and_gradient_are_finite_at_saturated_outputs_in_float32(
    name: str, size: float
) -> None:
    outputs, labels = saturated_batch(size, dtype=torch.float32)
    loss = LOSSES[name](outputs.requires_grad_(), labels)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_takes_half_precision(name: str, dtype: torch.dtype) -> None:
    outputs, labels = random_batch(7, 10, dtype=dtype)
    loss = LOSSES[name](outputs.requires_grad_(), labels)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert loss.item() == pytest.approx(oracle(name, outputs, labels), rel=0.03)
    assert gradient.isfinite().all()


@every_loss
def test_a_loss_travels_to_another_process(name: str) -> None:
    assert pickle.loads(pickle.dumps(LOSSES[name])) == LOSSES[name]


@every_loss
@pytest.mark.parametrize("labels_shape", [(3, 1), (2,), (3, 3)])
def test_labels_of_another_shape_are_refused(name: str, labels_shape: tuple[int, ...]) -> None:
    labels = torch.zeros(labels_shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=re.escape(f"(3, 3) and labels of shape {labels_shape}")):
        LOSSES[name](torch.zeros(3, 3), labels)


def test_an_unknown_loss_is_refused_with_the_value_and_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown loss 'quantile'; choose from") as error:
        get_loss("quantile")
    assert all(name in str(error.value) for name in LOSSES)
    assert "\n" not in str(error.value)


def test_a_misspelt_loss_is_refused_with_the_one_meant() -> None:
    with pytest.raises(ValueError, match=r"'cross_entrophy' \(did you mean 'cross_entropy'\?\)"):
        get_loss("cross_entrophy")


@every_loss
def test_a_loss_is_found_by_its_name(name: str) -> None:
    assert get_loss(name) is LOSSES[name]


def test_a_loss_with_unknown_probabilities_is_refused() -> None:
    with pytest.raises(ValueError, match="'hardmax'; choose from softmax, sigmoid_normalised"):
        Loss(
            function=LOSSES["mse"].function,
            outputs_to_probabilities="hardmax",
            source="",
        )


@every_probability
@pytest.mark.parametrize("num_images", [1, 7])
@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("scale", [0.1, 2.0, 100.0, 1e4])
def test_probabilities_are_probabilities_and_keep_the_arg_max(
    key: str, num_images: int, num_classes: int, scale: float
) -> None:
    outputs, _ = random_batch(num_images, num_classes, scale=scale, dtype=torch.float32)
    check_probabilities(PROBABILITIES[key](outputs), outputs)


@every_probability
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_probabilities_are_probabilities_at_saturated_outputs(key: str, size: float) -> None:
    outputs, _ = saturated_batch(size, dtype=torch.float32)
    check_probabilities(PROBABILITIES[key](outputs), outputs)


def check_probabilities(probabilities: Tensor, outputs: Tensor) -> None:
    assert probabilities.shape == outputs.shape
    assert probabilities.dtype == outputs.dtype
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(outputs)))
    # The class of the largest output has the largest probability, alone or in a tie.
    at_arg_max = probabilities.gather(1, outputs.argmax(dim=1, keepdim=True))
    assert at_arg_max.squeeze(1).tolist() == probabilities.amax(dim=1).tolist()


@every_probability
def test_outputs_that_are_not_numbers_are_not_hidden(key: str) -> None:
    assert PROBABILITIES[key](torch.tensor([[1.0, math.nan, -1.0]])).isnan().any()


@every_probability
def test_equal_outputs_are_equally_likely(key: str) -> None:
    for output in (-1e4, -1.0, 0.0, 1.0, 1e4):
        probabilities = PROBABILITIES[key](torch.full((1, 4), output))
        assert probabilities.tolist() == [[0.25] * 4]


def test_softmax_is_that_of_the_oracle() -> None:
    outputs, _ = random_batch(7, 10)
    expected = [softmax(row) for row in outputs.tolist()]
    torch.testing.assert_close(
        PROBABILITIES["softmax"](outputs), torch.tensor(expected, dtype=torch.float64)
    )


def test_sigmoid_normalised_is_each_sigmoid_over_their_sum() -> None:
    outputs, _ = random_batch(7, 10)
    sigmoids = [[1 / (1 + math.exp(-o)) for o in row] for row in outputs.tolist()]
    expected = [[s / sum(row) for s in row] for row in sigmoids]
    torch.testing.assert_close(
        PROBABILITIES["sigmoid_normalised"](outputs), torch.tensor(expected, dtype=torch.float64)
    )


def test_clipped_normalised_tells_classes_apart_that_exceed_one() -> None:
    probabilities = PROBABILITIES["clipped_normalised"](torch.tensor([[3.0, 1.0, -2.0]]))
    assert probabilities.tolist() == [[0.75, 0.25, 0.0]]


def test_clipped_normalised_is_the_softmax_where_nothing_is_above_zero() -> None:
    outputs = torch.tensor([[-2.0, -1.0], [-0.0, -3.0], [0.0, 0.0]])
    probabilities = PROBABILITIES["clipped_normalised"](outputs)
    torch.testing.assert_close(probabilities, outputs.softmax(1))
    assert probabilities.argmax(1).tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", ["l1", "mse", "smooth_l1"])
def test_a_regression_that_is_exact_has_exact_probabilities(name: str) -> None:
    probabilities = PROBABILITIES[LOSSES[name].outputs_to_probabilities](torch.eye(5))
    assert probabilities.tolist() == torch.eye(5).tolist()


def test_one_against_the_rest_has_the_probabilities_of_sigmoids() -> None:
    assert LOSSES["bce"].outputs_to_probabilities == "sigmoid_normalised"


class Probabilities(nn.Module):
    """What a stored model ends in."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, outputs: Tensor) -> Tensor:
        return PROBABILITIES[self.key](outputs)


@every_probability
def test_probabilities_are_exported_with_a_free_batch_size(key: str) -> None:
    outputs, _ = random_batch(3, 10, dtype=torch.float32)
    exported = torch.export.export(
        Probabilities(key), (outputs,), dynamic_shapes={"outputs": {0: torch.export.Dim("batch")}}
    ).module()
    for num_images in (1, 2, 50):
        batch, _ = random_batch(num_images, 10, dtype=torch.float32)
        batch[0] = -1.0  # a row to clip whole
        torch.testing.assert_close(exported(batch), PROBABILITIES[key](batch))


@every_probability
def test_a_probability_function_travels_to_another_process(key: str) -> None:
    function = PROBABILITIES[key]
    assert pickle.loads(pickle.dumps(function)) is function


# Label smoothing of any loss


def test_smoothing_cross_entropy_is_that_of_torch():
    outputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    expected = nn.functional.cross_entropy(outputs, labels, label_smoothing=0.3)
    torch.testing.assert_close(smoothed(LOSSES["cross_entropy"], 0.3)(outputs, labels), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_smoothed_loss_is_the_mean_over_labels_that_are_drawn_anew(name):
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4) % 3
    loss = LOSSES[name]
    each = torch.stack([loss(outputs, torch.full((4,), k)) for k in range(3)]).mean()
    expected = 0.8 * loss(outputs, labels) + 0.2 * each
    torch.testing.assert_close(smoothed(loss, 0.2)(outputs, labels), expected)


def test_without_smoothing_it_is_the_loss_itself():
    assert smoothed(LOSSES["mse"], 0.0) is LOSSES["mse"]
