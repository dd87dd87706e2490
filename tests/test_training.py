"""Training against a slow, obvious loop, and what it promises: exact repeats, order, bad ends."""

import copy
import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (F is its name everywhere)
from torch import nn

from benchmarks.gpu_checks import CHECKS
from cnn import training
from cnn.config import PRECISIONS, TrainConfig
from cnn.data import Split
from cnn.devices import resolve_device, resolve_precision
from cnn.losses import LOSSES
from cnn.networks import build_network
from cnn.optimizers import OPTIMIZERS, SCHEDULES
from cnn.training import CHECK_EVERY, check_batch_size, epoch_order, evaluate, train
from experiments.engine.job import train_job

# Of the data set that the tests train on.
TRAINING_IMAGES, VALIDATION_IMAGES = 130, 40

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def make_config(**changes):
    defaults = {"loss": "cross_entropy", "learning_rate": 0.01, "batch_size": 16, "epochs": 3}
    return TrainConfig(**{**defaults, **changes})


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedSplit(Split):
    """A split that keeps what it was asked for."""

    asked: list[torch.Tensor] = field(default_factory=list)

    def batch(self, indices):
        self.asked.append(indices)
        return super().batch(indices)


class ForbiddenSplit(Split):
    def __getattribute__(self, name):
        raise AssertionError(f"it was asked for its {name}")


def recorded(data):
    """Return the data set with a training split that keeps what it was asked for."""
    split = data.train
    training_split = RecordedSplit(
        all_images=split.all_images, all_labels=split.all_labels, rows=split.rows
    )
    return replace(data, train=training_split)


def curve(epochs):
    """Return all that an epoch measures, but for times."""
    times = ("worker/epoch_seconds", "worker/images_per_second")
    return [
        {name: value for name, value in epoch.metrics().items() if name not in times}
        for epoch in epochs
    ]


def weights(epoch):
    return [weight.detach().clone() for weight in epoch.model.parameters()]


def run(config, data):
    """Return the curve and the final weights."""
    epochs = list(train(config, data))
    return curve(epochs), weights(epochs[-1])


def same_weights(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# The configuration


def refusal(**changes):
    """Return the one line with which a configuration is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the callers look at the message
        make_config(**changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("learning_rate", v) for v in (0, -0.1, math.nan, math.inf, -math.inf, "0.1", None)],
        *[("batch_size", v) for v in (0, -1, 8.0, math.nan, math.inf, True, "8", None)],
        *[("epochs", v) for v in (0, -1, 1.5, math.nan, math.inf, True, "1", None)],
        *[("seed", v) for v in (-1, 2**32, 0.0, math.nan, math.inf, False, "0", None)],
        *[("momentum", v) for v in (-0.1, 1, 1.5, math.nan, math.inf, "0.9", None)],
        *[("weight_decay", v) for v in (-0.1, math.nan, math.inf, "0", None)],
        *[(name, True) for name in ("learning_rate", "weight_decay")],
        ("momentum", False),
    ],
)
def test_a_number_out_of_range_is_refused_with_field_value_and_range(name, value):
    allowed = {
        "learning_rate": "finite and > 0",
        "batch_size": "an integer ≥ 1",
        "epochs": "an integer ≥ 1",
        "seed": "an integer from 0 to 2**32 - 1",
        "momentum": "≥ 0 and < 1",
        "weight_decay": "finite and ≥ 0",
    }
    assert refusal(**{name: value}) == f"{name} must be {allowed[name]}, not {value!r}"


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("loss", LOSSES),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("precision", PRECISIONS),
    ],
)
@pytest.mark.parametrize("value", ["", "best", "SGD", ["mse"], "float16"])
def test_an_unknown_name_is_refused_with_field_value_and_choices(name, choices, value):
    message = refusal(**{name: value})
    assert message.startswith(f"unknown {name} {value!r}")
    assert ", ".join(choices) in message


@pytest.mark.parametrize("value", [None, 3])
def test_a_loss_that_is_no_name_is_refused(value):
    assert refusal(loss=value).startswith(f"unknown loss {value!r}")


@pytest.mark.parametrize("device", ["auto", "tpu", "cuda:x", "", None])
def test_a_device_that_cannot_be_is_refused(device):
    assert refusal(device=device) == f"device must be cpu, cuda or cuda:N, not {device!r}"


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1},
        {"learning_rate": 1e-300},
        {"batch_size": 1, "epochs": 1},
        {"seed": 2**32 - 1},
        {"momentum": 0},
        {"weight_decay": 0.5},
    ],
)
def test_values_at_the_edge_are_taken(changes):
    assert make_config(**changes).as_params().items() >= changes.items()


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().learning_rate = 1.0


def test_params_hold_every_field():
    config = make_config(loss="mse", learning_rate=0.25, batch_size=8, epochs=5)
    assert config.as_params() == {
        "loss": "mse",
        "learning_rate": 0.25,
        "batch_size": 8,
        "epochs": 5,
        "seed": 0,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 0.0,
        "schedule": "one_cycle",
        "precision": "float32",
        "device": "cpu",
        "warmup": 0.3,
        "network": "cnn",
        "label_smoothing": 0.0,
        "augment": "none",
    }


# Schedules


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_warm_up_rises_linearly_and_then_the_schedule_begins(schedule):
    rate, later = SCHEDULES[schedule], SCHEDULES[schedule]
    assert rate(0.05, 0.2) == pytest.approx(0.25)
    assert rate(0.2, 0.2) == 1
    assert rate(0.6, 0.2) == pytest.approx(later(0.5))
    assert rate(0.5, 0.0) == later(0.5)


def test_the_warm_up_of_one_cycle_is_where_its_peak_is():
    for warmup in (0.1, 0.3, 0.5):
        rates = [SCHEDULES["one_cycle"](k / 1000, warmup) for k in range(1000)]
        assert rates.index(max(rates)) == 1000 * warmup
    assert make_config(schedule="one_cycle").warmup == 0.3
    assert make_config(schedule="cosine").warmup == 0


def torch_schedule(name, steps):
    """Return PyTorch's own learning rate at each step, of a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "one_cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False
        )
    elif name == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    else:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@every_schedule
def test_a_schedule_is_that_of_pytorch_to_within_a_step(schedule):
    steps = 200
    expected = torch_schedule(schedule, steps)
    within_a_step = max(abs(b - a) for a, b in itertools.pairwise(expected))
    for step, rate in enumerate(expected):
        share = SCHEDULES[schedule]((step + 0.5) / steps)
        assert share == pytest.approx(rate, abs=within_a_step, rel=1e-12)


def test_one_cycle_starts_at_a_25th_and_ends_at_4_millionths():
    assert SCHEDULES["one_cycle"](0.0) == pytest.approx(1 / 25)
    assert SCHEDULES["one_cycle"](1.0) == pytest.approx(4e-6)


@every_schedule
def test_the_highest_of_a_schedule_is_the_learning_rate(schedule):
    shares = [SCHEDULES[schedule](i / 1000) for i in range(1001)]
    assert max(shares) == pytest.approx(1)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_learning_rate_of_a_short_training_is_never_zero(coloured_noise, schedule, steps):
    config = make_config(schedule=schedule, batch_size=TRAINING_IMAGES, epochs=steps)
    rates = [epoch.learning_rate for epoch in train(config, coloured_noise)]
    assert len(rates) == steps
    assert all(0.001 * config.learning_rate < rate <= config.learning_rate for rate in rates)


# Training, against a slow, obvious loop


def slow_training(config, data, make_optimizer, schedule):
    """Train in contiguous NCHW with PyTorch's plain optimizers; return curve and weights."""
    model = build_network(len(data.classes), seed=config.seed)
    layers = [copy.deepcopy(layer) for layer in (*model.features, *model.head)]
    network = nn.Sequential(*layers).to(memory_format=torch.contiguous_format)
    optimizer = make_optimizer(network.parameters())
    steps = config.epochs * math.ceil(len(data.train) / config.batch_size)
    step = 0
    rows = []
    for epoch in range(1, config.epochs + 1):
        order = epoch_order(len(data.train), seed=config.seed, epoch=epoch)
        loss_sum, num_correct = 0.0, 0
        for start in range(0, len(data.train), config.batch_size):
            indices = order[start : start + config.batch_size]
            rate = config.learning_rate * schedule((step + 0.5) / steps)
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = rate
            labels = data.train.labels[indices]
            outputs = network(as_floats(data.train.images[indices]))
            loss = F.cross_entropy(outputs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(indices)
            num_correct += (outputs.argmax(1) == labels).sum().item()
        val_loss, val_accuracy = slow_evaluation(network, data.validation)
        rows.append(
            {
                "train/loss": loss_sum / len(data.train),
                "train/accuracy": num_correct / len(data.train),
                "val/loss": val_loss,
                "val/accuracy": val_accuracy,
                "train/learning_rate": rate,
            }
        )
    return rows, [weight.detach() for weight in network.parameters()]


def slow_evaluation(network, split):
    """Return mean cross-entropy and accuracy, one image after another."""
    loss_sum, num_correct = 0.0, 0
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        outputs = network(as_floats(image[None]))[0].tolist()
        loss_sum += math.log(sum(math.exp(output) for output in outputs)) - outputs[label]
        num_correct += outputs.index(max(outputs)) == label
    return loss_sum / len(split), num_correct / len(split)


def as_floats(images):
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def assert_equals_the_slow_loop(config, data, make_optimizer):
    rows, final = run(config, data)
    schedule = SCHEDULES[config.schedule]
    expected_rows, expected_final = slow_training(config, data, make_optimizer, schedule)
    # By rounding, an image may fall on the other side.
    one_image = {"train/accuracy": 1.01 / TRAINING_IMAGES, "val/accuracy": 1.01 / VALIDATION_IMAGES}
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == {
            name: pytest.approx(value, rel=1e-4, abs=one_image.get(name))
            for name, value in expected_row.items()
        }
    initial = build_network(len(data.classes), seed=config.seed).parameters()
    for start, end, expected_end in zip(initial, final, expected_final, strict=True):
        # By rounding, a max-pool may take the other of two pixels that are all but equal.
        assert (end - expected_end).norm() < 0.01 * (expected_end - start).norm()


def nesterov(**options):
    return lambda weights: torch.optim.SGD(weights, nesterov=True, **options)


@pytest.mark.parametrize(
    ("changes", "make_optimizer"),
    [
        ({}, nesterov(momentum=0.9)),
        ({"momentum": 0.5}, nesterov(momentum=0.5)),
        ({"momentum": 0.0}, torch.optim.SGD),
        ({"weight_decay": 0.1}, nesterov(momentum=0.9, weight_decay=0.1)),
        ({"optimizer": "adam"}, torch.optim.Adam),
        (
            {"optimizer": "adam", "weight_decay": 0.1},
            lambda weights: torch.optim.Adam(weights, weight_decay=0.1),
        ),
        (
            {"optimizer": "adamw"},
            lambda weights: torch.optim.AdamW(weights, weight_decay=0.0),
        ),
        (
            {"optimizer": "adamw", "weight_decay": 0.1},
            lambda weights: torch.optim.AdamW(weights, weight_decay=0.1),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_training_equals_a_slow_obvious_loop(coloured_noise, changes, make_optimizer):
    learning_rate = 1e-3 if "optimizer" in changes else 0.01
    config = make_config(learning_rate=learning_rate, epochs=1, **changes)
    assert_equals_the_slow_loop(config, coloured_noise, make_optimizer)


@every_schedule
def test_training_on_any_schedule_equals_a_slow_obvious_loop(coloured_noise, schedule):
    config = make_config(schedule=schedule, epochs=2, seed=3)
    assert_equals_the_slow_loop(config, coloured_noise, nesterov(momentum=0.9))


@pytest.mark.parametrize("batch_size", [1, 13, TRAINING_IMAGES])
def test_training_at_any_batch_size_equals_a_slow_obvious_loop(coloured_noise, batch_size):
    config = make_config(batch_size=batch_size, epochs=1, learning_rate=1e-3)
    assert_equals_the_slow_loop(config, coloured_noise, nesterov(momentum=0.9))


@every_precision
def test_validation_is_that_of_the_epochs_own_model_in_float32(
    coloured_noise, monkeypatch, precision
):
    monkeypatch.setattr(training, "EVALUATION_BATCH_SIZE", 16)  # 40 images: the last batch has 8
    for epoch in train(make_config(precision=precision), coloured_noise):
        network = nn.Sequential(*epoch.model.features, *epoch.model.head)
        expected = slow_evaluation(network, coloured_noise.validation)
        assert (epoch.val_loss, epoch.val_accuracy) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "learning_rate"),
    [("cross_entropy", 0.01), ("mse", 0.01), ("l1", 0.05), ("multi_margin", 0.02)],
)
def test_it_learns(coloured_noise, loss, learning_rate):
    config = make_config(loss=loss, learning_rate=learning_rate, epochs=5)
    first, *_, last = train(config, coloured_noise)
    assert last.train_loss < 0.7 * first.train_loss
    assert last.val_accuracy > 0.8
    assert last.train_accuracy > 0.8


# What an epoch is


def test_there_are_as_many_epochs_as_configured_numbered_from_1(coloured_noise):
    assert [e.number for e in train(make_config(epochs=3), coloured_noise)] == [1, 2, 3]


def test_each_image_is_taken_once_an_epoch(coloured_noise):
    data = recorded(coloured_noise)
    for epoch in train(make_config(batch_size=16), data):
        asked = data.train.asked[9 * (epoch.number - 1) :]
        assert [len(indices) for indices in asked] == [16] * 8 + [2]
        assert sorted(torch.cat(asked).tolist()) == list(range(TRAINING_IMAGES))


def test_images_come_in_the_order_of_the_epoch(coloured_noise):
    data = recorded(coloured_noise)
    for _ in train(make_config(seed=5, epochs=2), data):
        pass
    orders = [epoch_order(TRAINING_IMAGES, seed=5, epoch=epoch) for epoch in (1, 2)]
    assert torch.equal(torch.cat(data.train.asked), torch.cat(orders))


@pytest.mark.parametrize(("batch_size", "steps"), [(1, TRAINING_IMAGES), (TRAINING_IMAGES, 1)])
def test_a_batch_is_one_image_at_least_and_the_whole_split_at_most(
    coloured_noise, batch_size, steps
):
    data = recorded(coloured_noise)
    (epoch,) = train(make_config(batch_size=batch_size, epochs=1, learning_rate=1e-4), data)
    assert len(data.train.asked) == steps
    assert not epoch.diverged


def test_a_batch_larger_than_the_training_split_is_refused(coloured_noise):
    expected = "batch size 131 is larger than the training split of coloured noise: 130 images"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        next(train(make_config(batch_size=131), coloured_noise))
    with pytest.raises(ValueError, match=f"^{expected}$"):
        check_batch_size(131, coloured_noise)
    check_batch_size(130, coloured_noise)


def test_the_test_split_is_never_touched(coloured_noise):
    split = coloured_noise.test
    forbidden = ForbiddenSplit(
        all_images=split.all_images, all_labels=split.all_labels, rows=split.rows
    )
    for _ in train(make_config(epochs=1), replace(coloured_noise, test=forbidden)):
        pass


def test_metrics_have_the_names_under_which_they_are_logged(coloured_noise):
    epoch = next(train(make_config(), coloured_noise))
    assert epoch.metrics() == {
        "train/loss": epoch.train_loss,
        "train/accuracy": epoch.train_accuracy,
        "val/loss": epoch.val_loss,
        "val/accuracy": epoch.val_accuracy,
        "train/learning_rate": epoch.learning_rate,
        "worker/epoch_seconds": epoch.seconds,
        "worker/images_per_second": epoch.images_per_second,
    }
    assert all(type(value) is float for value in epoch.metrics().values())


def test_training_time_is_part_of_an_epochs_time(coloured_noise):
    epoch = next(train(make_config(), coloured_noise))
    assert 0 < TRAINING_IMAGES / epoch.images_per_second < epoch.seconds


def test_who_stops_asking_stops_the_training(coloured_noise):
    data = recorded(coloured_noise)
    epochs = train(make_config(epochs=3, batch_size=16), data)
    epoch = next(epochs)
    at_the_stop = weights(epoch)
    epochs.close()
    assert list(epochs) == []
    assert len(data.train.asked) == 9
    assert same_weights(weights(epoch), at_the_stop)


# Repeats


@every_precision
@every_optimizer
def test_the_same_seed_gives_the_same_curve_and_weights_bit_for_bit(
    coloured_noise, optimizer, precision
):
    config = make_config(optimizer=optimizer, precision=precision, learning_rate=1e-3, epochs=1)
    rows, final = run(config, coloured_noise)
    same_rows, same_final = run(config, coloured_noise)
    assert rows == same_rows
    assert same_weights(final, same_final)


def test_another_seed_gives_another_curve_and_other_weights(coloured_noise):
    rows, final = run(make_config(seed=0, epochs=1), coloured_noise)
    other_rows, other_final = run(make_config(seed=1, epochs=1), coloured_noise)
    assert rows != other_rows
    assert not same_weights(final, other_final)


def test_a_run_depends_on_no_global_generator(coloured_noise):
    torch.manual_seed(1)
    rows, _ = run(make_config(epochs=2), coloured_noise)
    torch.manual_seed(2)
    assert run(make_config(epochs=2), coloured_noise)[0] == rows


def test_a_run_leaves_the_global_generator_as_it_was(coloured_noise):
    before = torch.get_rng_state()
    run(make_config(epochs=1), coloured_noise)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_does_not_depend_on_others_before_or_beside_it(coloured_noise):
    config, other = make_config(epochs=2), make_config(loss="mse", seed=9, epochs=2)
    alone = curve(train(config, coloured_noise))
    beside = zip(train(other, coloured_noise), train(config, coloured_noise), strict=True)
    assert curve(epoch for _, epoch in beside) == alone


def test_an_order_is_a_permutation():
    order = epoch_order(1000, seed=0, epoch=1)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != list(range(1000))


def test_an_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    order = epoch_order(1000, seed=4, epoch=2)
    torch.manual_seed(2)
    epoch_order(1000, seed=4, epoch=1)
    assert torch.equal(epoch_order(1000, seed=4, epoch=2), order)


def test_orders_differ_between_seeds_and_epochs():
    orders = {
        tuple(epoch_order(1000, seed=seed, epoch=epoch).tolist())
        for seed in (0, 1, 2, 2**32 - 1)
        for epoch in (1, 2, 3)
    }
    assert len(orders) == 12


# Precision


def test_bfloat16_keeps_its_weights_in_float32(coloured_noise):
    epoch = next(train(make_config(precision="bfloat16"), coloured_noise))
    assert {weight.dtype for weight in epoch.model.parameters()} == {torch.float32}
    rounded = [weight.bfloat16().float() for weight in epoch.model.parameters()]
    assert not any(torch.equal(*pair) for pair in zip(rounded, weights(epoch), strict=True))


def test_bfloat16_computes_in_bfloat16(coloured_noise):
    rows, _ = run(make_config(precision="float32", epochs=1), coloured_noise)
    other_rows, _ = run(make_config(precision="bfloat16", epochs=1), coloured_noise)
    assert rows != other_rows


def test_bfloat16_follows_float32(coloured_noise):
    exact = curve(train(make_config(precision="float32", epochs=4), coloured_noise))
    rough = curve(train(make_config(precision="bfloat16", epochs=4), coloured_noise))
    for row, expected in zip(rough, exact, strict=True):
        assert row == pytest.approx(expected, abs=0.1)
    assert rough[-1]["val/accuracy"] > 0.9


def test_steps_too_small_for_bfloat16_weights_are_not_lost(coloured_noise):
    config = make_config(learning_rate=1e-6, epochs=2)
    start = torch.cat(
        [weight.detach().flatten() for weight in build_network(3, seed=0).parameters()]
    )
    moves = {}
    for precision in PRECISIONS:
        _, final = run(replace(config, precision=precision), coloured_noise)
        moves[precision] = torch.cat([weight.flatten() for weight in final]) - start
    exact, rough = moves["float32"], moves["bfloat16"]
    lost = start.bfloat16() + exact.bfloat16() == start.bfloat16()
    assert lost.float().mean() > 0.99
    assert F.cosine_similarity(rough, exact, dim=0) > 0.99
    assert rough.norm().item() == pytest.approx(exact.norm().item(), rel=0.02)


# Divergence


@every_precision
def test_divergence_ends_the_training_with_an_epoch_that_says_so(coloured_noise, precision):
    config = make_config(learning_rate=1e4, precision=precision)
    (epoch,) = train(config, coloured_noise)
    assert epoch.diverged
    assert not math.isfinite(epoch.train_loss)
    assert 0 <= epoch.train_accuracy <= 1
    assert 0 <= epoch.val_accuracy <= 1


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_says_that_it_diverged(coloured_noise, loss):
    (epoch,) = train(make_config(loss=loss, learning_rate=1e12, batch_size=32), coloured_noise)
    assert epoch.diverged
    assert not math.isfinite(epoch.train_loss)
    assert not math.isfinite(epoch.val_loss)


def test_an_epoch_that_diverges_is_not_trained_to_its_end(coloured_noise):
    data = recorded(coloured_noise)
    (epoch,) = train(make_config(learning_rate=1e4, batch_size=1), data)
    assert epoch.diverged
    assert len(data.train.asked) == CHECK_EVERY < TRAINING_IMAGES


def test_training_that_diverges_later_ends_then(coloured_noise, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "constant", lambda progress, _: 1 if progress < 0.5 else 1e9)
    epochs = train(make_config(schedule="constant", epochs=4), coloured_noise)
    assert [epoch.diverged for epoch in epochs] == [False, False, True]


def test_weights_that_are_not_finite_are_divergence_though_the_loss_was_finite(coloured_noise):
    config = make_config(learning_rate=1e300, batch_size=TRAINING_IMAGES, epochs=2)
    (epoch,) = train(config, coloured_noise)
    assert math.isfinite(epoch.train_loss)
    assert epoch.diverged


def test_a_loss_that_is_not_finite_is_divergence_though_the_weights_are(
    coloured_noise, monkeypatch
):
    def endless(outputs, labels):
        return F.cross_entropy(outputs, labels) + math.inf

    monkeypatch.setitem(LOSSES, "endless", replace(LOSSES["cross_entropy"], function=endless))
    (epoch,) = train(make_config(loss="endless"), coloured_noise)
    assert all(weight.isfinite().all() for weight in epoch.model.parameters())
    assert epoch.diverged


def test_a_validation_loss_that_is_not_finite_is_divergence(coloured_noise):
    config = make_config(learning_rate=1e15, batch_size=TRAINING_IMAGES, epochs=1)
    (epoch,) = train(config, coloured_noise)
    assert not math.isfinite(epoch.val_loss)
    assert epoch.diverged


def test_training_that_goes_well_has_not_diverged(coloured_noise):
    assert [e.diverged for e in train(make_config(), coloured_noise)] == [False] * 3


# Where to train, and how precisely


@pytest.mark.parametrize(
    ("name", "num_gpus", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_a_device_is_resolved(monkeypatch, name, num_gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert resolve_device(name) == expected


@pytest.mark.parametrize(
    ("name", "num_gpus", "there"),
    [
        ("cuda", 0, "cpu"),
        ("cuda:2", 2, "cpu, cuda:0, cuda:1"),
        ("tpu", 1, "cpu, cuda:0"),
        ("", 0, "cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch, name, num_gpus, there
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    expected = f"device {name!r} is not here: choose auto, or one of {there}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [
        (False, False, "float32"),
        (True, False, "bfloat16"),
        (False, True, "bfloat16"),
        (True, True, "bfloat16"),
    ],
)
def test_a_processor_with_bfloat16_instructions_trains_in_bfloat16(
    monkeypatch, amx, avx512, expected
):
    capabilities = {"amx_tile": amx, "avx512_bf16": avx512}
    assert torch.cpu.get_capabilities().keys() > capabilities.keys()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", "cpu") == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((10, 0), "bfloat16")],
)
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_from_ampere_on_trains_in_bfloat16(monkeypatch, device, capability, expected):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda asked: {device: capability}[asked]
    )
    assert resolve_precision("auto", device) == expected


@every_precision
def test_a_named_precision_is_taken_as_it_is(precision):
    assert resolve_precision(precision, "cpu") == precision


def test_an_unknown_precision_is_refused_with_the_choices():
    expected = "unknown precision 'float8': choose one of auto, float32, bfloat16"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        resolve_precision("float8", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check):
    check("cuda")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(
    coloured_noise, precision, optimizer, epoch
):
    config = make_config(epochs=3, precision=precision, optimizer=optimizer, learning_rate=0.01)
    checkpoints, expected = [], []
    for each in train(config, coloured_noise):
        checkpoints.append(copy.deepcopy(each.checkpoint()))
        expected.append((each.number, each.train_loss, each.val_loss, each.learning_rate))
    last = each.model.state_dict()
    rest = list(train(config, coloured_noise, resume_from=checkpoints[epoch - 1]))
    curve = [(e.number, e.train_loss, e.val_loss, e.learning_rate) for e in rest]
    assert curve == expected[epoch:]
    if rest:
        for name, value in rest[-1].model.state_dict().items():
            assert torch.equal(value, last[name]), name


def test_going_on_leaves_the_checkpoint_as_it_was(coloured_noise):
    config = make_config(epochs=2)
    checkpoint = copy.deepcopy(next(train(config, coloured_noise)).checkpoint())
    before = copy.deepcopy(checkpoint)
    (again,) = train(config, coloured_noise, resume_from=checkpoint)
    (once_more,) = train(config, coloured_noise, resume_from=checkpoint)
    assert again.train_loss == once_more.train_loss
    for name, value in before.model.items():
        assert torch.equal(checkpoint.model[name], value)


# Networks other than the CNN: what is recorded is of what is stored


class Regularised(nn.Module):
    """A network that trains in another way than it predicts, with a statistic of its own."""

    def __init__(self, num_classes):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(8 * 16, num_classes)
        self.register_buffer("mean_pixel", torch.zeros(3))
        self.register_buffer("third", torch.tensor(1 / 3))  # which bfloat16 rounds
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, images):
        pixels = images.permute(0, 3, 1, 2).to(self.head.weight.dtype) / 127.5 - 1
        if self.training:
            self.mean_pixel.lerp_(pixels.detach().mean((0, 2, 3)), 0.5)
        pixels = (pixels - self.mean_pixel[:, None, None]) * self.third
        features = self.dropout(self.norm(self.convolution(pixels)).relu())
        return self.head(F.max_pool2d(features, 8).flatten(1))


@pytest.fixture
def use(monkeypatch):
    """Have `train` build another network."""

    def use(network):
        def build(num_classes, *, seed, **_):
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(seed)
                return network(num_classes).to(memory_format=torch.channels_last)

        monkeypatch.setattr(training, "build_network", build)

    return use


def state(epoch):
    return copy.deepcopy(epoch.model.state_dict())


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_precision
def test_what_is_recorded_is_that_of_the_stored_model(coloured_noise, use, precision):
    use(Regularised)
    validation = coloured_noise.validation
    config = make_config(precision=precision, learning_rate=1e-3, epochs=1)
    last, end = train_job(0, config, coloured_noise, checkpoint=None, keep=lambda _: None)
    stored = Regularised(3).eval()
    stored.load_state_dict({name: torch.from_numpy(each) for name, each in end.weights.items()})
    with torch.no_grad():
        outputs = torch.cat([stored(image[None]) for image in validation.images])
    right = outputs.argmax(1) == validation.labels
    loss = F.cross_entropy(outputs, validation.labels).item()
    assert last.metrics["val/accuracy"] == pytest.approx(right.float().mean().item())
    assert last.metrics["val/loss"] == pytest.approx(loss, rel=1e-5)


@every_precision
def test_each_epochs_model_is_handed_out_as_it_predicts(coloured_noise, use, precision):
    use(Regularised)
    loss = LOSSES["cross_entropy"]
    for epoch in train(make_config(precision=precision), coloured_noise):
        assert not any(module.training for module in epoch.model.modules())
        stored = Regularised(3)
        stored.load_state_dict(epoch.checkpoint().model)
        again = evaluate(stored, coloured_noise.validation, loss)
        assert (again.loss, again.accuracy) == (epoch.val_loss, epoch.val_accuracy)


def test_evaluation_is_of_the_model_as_it_predicts_and_leaves_its_mode(coloured_noise):
    model = Regularised(3)
    model.norm.eval()
    before = [module.training for module in model.modules()]
    one, other = (
        evaluate(model, coloured_noise.validation, LOSSES["cross_entropy"]) for _ in range(2)
    )
    assert one == other
    assert [module.training for module in model.modules()] == before
    assert evaluate(model.eval(), coloured_noise.validation, LOSSES["cross_entropy"]) == one


def test_statistics_are_those_of_a_slow_obvious_loop(coloured_noise, use):
    use(Regularised)
    config = make_config(epochs=1)
    (epoch,) = train(config, coloured_noise)
    network = training.build_network(3, seed=config.seed).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    order = epoch_order(TRAINING_IMAGES, seed=config.seed, epoch=1)
    torch.manual_seed(training._epoch_seeds(config.seed, 1)[1])
    for step, indices in enumerate(order.split(config.batch_size)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * SCHEDULES["one_cycle"]((step + 0.5) / 9)
        optimizer.zero_grad()
        images, labels = coloured_noise.train.batch(indices)
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(epoch.model.state_dict()[name], expected, msg=name)


def test_bfloat16_keeps_its_statistics_in_float32(coloured_noise, use):
    use(Regularised)
    (exact,) = train(make_config(epochs=1), coloured_noise)
    (rough,) = train(make_config(epochs=1, precision="bfloat16"), coloured_noise)
    assert rough.model.norm.num_batches_tracked == 9
    for name in ("running_mean", "running_var"):
        one, other = getattr(exact.model.norm, name), getattr(rough.model.norm, name)
        assert other.dtype == torch.float32
        assert not torch.equal(other.bfloat16().float(), other)
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.002)


def test_bfloat16_brings_back_what_it_changed_and_rounds_nothing_else(coloured_noise, use):
    use(Regularised)
    (exact,) = train(make_config(epochs=1), coloured_noise)
    (rough,) = train(make_config(epochs=1, precision="bfloat16"), coloured_noise)
    assert exact.model.mean_pixel.abs().min() > 0.01
    torch.testing.assert_close(rough.model.mean_pixel, exact.model.mean_pixel, rtol=0.1, atol=0.02)
    assert torch.equal(rough.model.third, torch.tensor(1 / 3))
    assert {value.dtype for value in rough.model.state_dict().values()} == {
        torch.float32,
        torch.int64,
    }


@every_precision
def test_dropout_repeats_bit_for_bit_and_depends_on_nobody(coloured_noise, use, precision):
    use(Regularised)
    config, other = make_config(precision=precision), make_config(learning_rate=1e-3, seed=9)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    epochs = list(train(config, coloured_noise))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    beside = list(zip(train(other, coloured_noise), train(config, coloured_noise), strict=True))
    assert curve(epoch for _, epoch in beside) == curve(epochs)
    assert same_state(state(beside[-1][1]), state(epochs[-1]))


def test_dropout_drops_others_in_every_epoch_and_with_every_seed(coloured_noise, use):
    dropped = []

    class Noted(nn.Dropout):
        def forward(self, features):
            kept = super().forward(features)
            if self.training:
                dropped.append((kept == 0).flatten().tolist())
            return kept

    class Dropping(Regularised):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.norm, self.dropout = nn.Identity(), Noted()
            nn.init.constant_(self.convolution.bias, 100)  # no zeros but those of dropout

    use(Dropping)
    for seed in (0, 1):
        config = make_config(epochs=2, seed=seed, batch_size=TRAINING_IMAGES, learning_rate=1e-6)
        list(train(config, coloured_noise))
    assert len(dropped) == 4
    assert len({tuple(each) for each in dropped}) == 4


@every_precision
@pytest.mark.parametrize("epoch", [1, 2])
def test_any_network_goes_on_from_a_checkpoint_bit_for_bit(coloured_noise, use, precision, epoch):
    use(Regularised)
    config = make_config(precision=precision)
    checkpoints, rows = [], []
    for each in train(config, coloured_noise):
        checkpoints.append(copy.deepcopy(each.checkpoint()))
        rows += curve([each])
    torch.manual_seed(5)
    rest = list(train(config, coloured_noise, resume_from=checkpoints[epoch - 1]))
    assert curve(rest) == rows[epoch:]
    assert same_state(state(rest[-1]), checkpoints[-1].model)


def test_statistics_that_are_not_finite_are_divergence_but_a_mask_is_not(coloured_noise, use):
    class Overflowing(Regularised):
        def forward(self, images):
            outputs = super().forward(images)
            if self.training:
                self.norm.running_var = torch.full((8,), torch.inf)  # outputs stay finite
            return outputs

    use(Regularised)
    assert [epoch.diverged for epoch in train(make_config(), coloured_noise)] == [False] * 3
    use(Overflowing)
    (epoch,) = train(make_config(), coloured_noise)
    assert math.isfinite(epoch.val_loss)
    assert epoch.diverged


@every_precision
def test_weights_that_are_tied_or_frozen_or_a_part_of_others(coloured_noise, use, precision):
    class Odd(Regularised):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight
            self.convolution.weight.requires_grad = False
            self.head.weight = nn.Parameter(torch.randn(8 * 16, num_classes)[:, :].mul(0.1).T)
            self.scale = nn.Parameter(torch.ones(6)[::2])

        def forward(self, images):
            return self.scale * self.other(self.one(super().forward(images)))

    use(Odd)
    start = training.build_network(3, seed=0)
    config = make_config(precision=precision, weight_decay=0.1, epochs=1)
    (epoch,) = train(config, coloured_noise)
    assert torch.equal(epoch.model.convolution.weight, start.convolution.weight)
    assert not torch.equal(epoch.model.one.weight, start.one.weight)
    assert torch.equal(epoch.model.other.weight, epoch.model.one.weight)
    assert (epoch.model.scale != 1).all()
    places = [
        range(weight.data_ptr(), weight.data_ptr() + 4 * weight.numel())
        for weight in epoch.model.parameters()
        if weight.requires_grad
    ]
    places.sort(key=lambda place: place.start)
    assert all(one.stop == other.start for one, other in itertools.pairwise(places))
