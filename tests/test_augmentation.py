"""Random changes of training images, against a slow, obvious version."""

import numpy as np
import pytest
import torch

from cnn.augmentation import Augmentation
from cnn.config import TrainConfig
from cnn.training import train


def images(count=40, size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def augmentation(name, count=40, size=16, seed=0):
    return Augmentation(name, size=count, image_size=size, seed=seed)


def slow_changes(image, padding):
    """Yield each image that mirroring, padding and cropping can make of an image (H, W, 3)."""
    size = len(image)
    for mirrored in (image, image[:, ::-1]):
        padded = np.pad(mirrored, ((padding, padding), (padding, padding), (0, 0)))
        for row in range(2 * padding + 1):
            for column in range(2 * padding + 1):
                yield padded[row : row + size, column : column + size]


@pytest.mark.parametrize(("name", "padding"), [("flip", 0), ("flip_crop", 2)])
def test_each_image_is_changed_as_the_slow_version_can(name, padding):
    before = images()
    after = augmentation(name)(before, 0).numpy()
    found = set()
    for old, new in zip(before.numpy(), after, strict=True):
        ways = [np.array_equal(new, each) for each in slow_changes(old, padding)]
        assert sum(ways) == 1
        found.add(ways.index(True))
    assert len(found) > (20 if padding else 1)


def test_half_of_the_images_are_mirrored():
    before = images(1000, 8)
    same = (augmentation("flip", 1000, 8)(before, 0) == before).flatten(1).all(1)
    assert 440 <= int(same.sum()) <= 560


def test_none_changes_nothing():
    before = images()
    assert augmentation("none")(before, 0) is before


def test_changes_do_not_depend_on_the_batch_size():
    before, change = images(), augmentation("flip_crop")
    parts = [change(before[i : i + 7], i) for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), change(before, 0))


def test_each_epoch_has_its_own_and_they_repeat(coloured_noise):
    config = TrainConfig(
        loss="mse", learning_rate=0.01, batch_size=16, epochs=3, augment="flip_crop"
    )
    losses = [epoch.train_loss for epoch in train(config, coloured_noise)]
    assert losses == [epoch.train_loss for epoch in train(config, coloured_noise)]
    plain = TrainConfig(loss="mse", learning_rate=0.01, batch_size=16, epochs=3)
    assert losses[0] != next(train(plain, coloured_noise)).train_loss


def test_training_goes_on_from_a_checkpoint_bit_for_bit(coloured_noise):
    config = TrainConfig(
        loss="cross_entropy",
        learning_rate=0.01,
        batch_size=16,
        epochs=3,
        augment="flip_crop",
        label_smoothing=0.1,
        warmup=0.5,
        network="resnet",
    )
    whole = [epoch.metrics()["val/loss"] for epoch in train(config, coloured_noise)]
    for epoch in train(config, coloured_noise):
        if epoch.number == 1:
            checkpoint = epoch.checkpoint()
            break
    rest = train(config, coloured_noise, resume_from=checkpoint)
    assert [epoch.metrics()["val/loss"] for epoch in rest] == whole[1:]
