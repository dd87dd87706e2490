"""A network with batch normalisation, dropout and a layer that is used twice."""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Images (N, 3, H, W) → outputs (N, K)."""

    def __init__(self, num_classes: int, width: int = 24, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU())
        self.norm = nn.BatchNorm2d(width)
        self.shared = nn.Conv2d(width, width, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(16 * width, num_classes)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.norm(self.stem(pixels))
        features = self.shared(features).relu() + features
        features = self.shared(features).relu() + features
        return self.head(self.pool(features))


def small_net(num_classes: int) -> SmallNet:
    return SmallNet(num_classes)
