"""The losses that a study compares, and the table `LOSSES` of all of them.

Each is `(outputs (N, K) float, labels (N,) int64) -> scalar`, for N images and K classes. Its value
is the mean over the batch. In the formulas, o is the outputs of one image, y its class, t its
one-hot target, and p = softmax(o). Values and gradients stay finite at saturated outputs in
float32: a probability that may reach 0 or 1 is computed from its logarithm.

Losses differ in scale, so learning rates do not carry over from one to another. The losses on
targets (`l1`, `mse`, `smooth_l1`, `bce`, `squared_hinge`) and `multi_margin` divide by K, as torch
does. The others do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (F is its name everywhere)
from torch import Tensor

from cnn.references import did_you_mean, is_reference, resolve

LABEL_SMOOTHING = 0.1
FOCAL_GAMMA = 2.0
POLY1_EPSILON = 2.0
GCE_Q = 0.7


def softmax(outputs: Tensor) -> Tensor:
    """Probabilities (N, K) of outputs that are logits: exp(o_k) / Σ_j exp(o_j)."""
    return outputs.softmax(dim=1)


def sigmoid_normalised(outputs: Tensor) -> Tensor:
    """Probabilities (N, K) of one-against-rest logits: σ(o_k) / Σ_j σ(o_j).

    Written as the softmax of log σ, which is the same and never 0 / 0.
    """
    return F.logsigmoid(outputs).softmax(dim=1)


def clipped_normalised(outputs: Tensor) -> Tensor:
    """Probabilities (N, K) of outputs that estimate them: max(o_k, 0) / Σ_j max(o_j, 0).

    Where no output of a row is above 0, the softmax of its outputs. That keeps the arg max, by
    which accuracy is measured.
    """
    # Not clipped at 1: that would tie the classes above 1. The division brings them below 1 anyway.
    clipped = outputs.clamp(min=0)
    total = clipped.sum(dim=1, keepdim=True)
    # `total == 0` keeps a NaN, `total > 0` would hide it.
    return torch.where(total == 0, softmax(outputs), clipped / total)


PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid_normalised": sigmoid_normalised,
    "clipped_normalised": clipped_normalised,
}


@dataclass(frozen=True)
class Loss:
    """A loss function, and what its outputs mean."""

    function: Callable[[Tensor, Tensor], Tensor]
    outputs_to_probabilities: str
    """The key in `PROBABILITIES` of what turns its outputs into class probabilities."""
    source: str
    """Paper, and where in it."""

    @property
    def name(self) -> str:
        """What users type: the function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __post_init__(self) -> None:
        if self.outputs_to_probabilities not in PROBABILITIES:
            raise ValueError(
                f"outputs_to_probabilities is {self.outputs_to_probabilities!r}; "
                f"choose from {', '.join(PROBABILITIES)}"
            )

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of outputs (N, K) for labels (N,).

        Raises ValueError for other shapes, which some losses would broadcast.
        """
        if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
            raise ValueError(
                f"outputs are of shape {tuple(outputs.shape)} and labels of shape "
                f"{tuple(labels.shape)}; they must be (N, K) and (N,)"
            )
        value = self.function(outputs, labels)
        if not isinstance(value, Tensor) or value.shape != ():
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"it returns {shape}, and must return a scalar tensor")
        return value


def l1(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean absolute error, Σ_k |o_k − t_k| / K.

    A median regression: all outputs 0 is optimal wherever no class has half of the probability.
    """
    return F.l1_loss(outputs, _one_hot(outputs, labels))


def mse(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error, Σ_k (o_k − t_k)² / K, without a softmax (Hui & Belkin 2021)."""
    return F.mse_loss(outputs, _one_hot(outputs, labels))


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood, −ln p_y = −o_y + ln Σ_k exp(o_k)."""
    return F.cross_entropy(outputs, labels)


def smooth_l1(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared near the target and absolute beyond, Σ_k s(o_k − t_k) / K.

    s(d) = d² / 2 where |d| < 1, else |d| − 1/2 (Girshick 2015, Fast R-CNN, equation 3; Huber's loss
    with δ = 1). On one-hot targets most errors are below 1, where it is half of `mse`.
    """
    return F.smooth_l1_loss(outputs, _one_hot(outputs, labels))


def l1_softmax(outputs: Tensor, labels: Tensor) -> Tensor:
    """Expected misclassification, 1 − p_y, which is Σ_k |p_k − t_k| / 2.

    The chance of error if the class is drawn from p (Janocha & Czarnecki 2017, proposition 1).
    Ghosh, Kumar & Sastry (2017) use the sum itself.
    """
    # −expm1(ln p_y) is 1 − p_y without its cancellation as p_y nears 1.
    return -_log_probability(outputs, labels).expm1().mean()


def mse_softmax(outputs: Tensor, labels: Tensor) -> Tensor:
    """Brier score, Σ_k (p_k − t_k)² (Brier 1950): a sum over the classes, so between 0 and 2."""
    return (softmax(outputs) - _one_hot(outputs, labels)).square().sum(dim=1).mean()


def bce(outputs: Tensor, labels: Tensor) -> Tensor:
    """Each class against the rest, −Σ_k [t_k ln σ(o_k) + (1 − t_k) ln(1 − σ(o_k))] / K."""
    return F.binary_cross_entropy_with_logits(outputs, _one_hot(outputs, labels))


def label_smoothing(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with softened targets, −Σ_k [(1 − ε) t_k + ε / K] ln p_k, ε = 0.1.

    Szegedy et al. 2016 (Inception-v3), section 7, with their ε.
    """
    return F.cross_entropy(outputs, labels, label_smoothing=LABEL_SMOOTHING)


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with less weight on easy images, −(1 − p_y)^γ ln p_y, γ = 2.

    Lin et al. 2017, equation 4, with their best γ and without class weights α. Their detectors
    use a sigmoid per class. Here an image has exactly one class, so p is the softmax.
    """
    log_probability = _log_probability(outputs, labels)
    return ((-log_probability.expm1()) ** FOCAL_GAMMA * -log_probability).mean()


def squentropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy that pulls the wrong outputs to 0, −ln p_y + Σ_{k≠y} o_k² / (K − 1).

    Hui, Belkin & Wright 2023; it has no constant to choose.
    """
    wrong_outputs = outputs * (1 - _one_hot(outputs, labels))
    mean_square = wrong_outputs.square().sum(dim=1) / (outputs.shape[1] - 1)
    return F.cross_entropy(outputs, labels) + mean_square.mean()


def poly1(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with more of its first Taylor term, −ln p_y + ε (1 − p_y), ε = 2.

    Leng et al. 2022 (PolyLoss), the Poly-1 loss, with their ε for ImageNet.
    """
    log_probability = _log_probability(outputs, labels)
    return (-log_probability - POLY1_EPSILON * log_probability.expm1()).mean()


def gce(outputs: Tensor, labels: Tensor) -> Tensor:
    """Generalised cross-entropy, (1 − p_y^q) / q, q = 0.7.

    Between cross-entropy (q → 0) and `l1_softmax` (q = 1). Zhang & Sabuncu 2018, equation 6, with
    the q of their experiments; their truncated variant is another loss.
    """
    # By the logarithm: p^q itself has a gradient, q p^(q − 1), that is infinite at p = 0.
    return (-(GCE_Q * _log_probability(outputs, labels)).expm1() / GCE_Q).mean()


def multi_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """Hinge between the right and each wrong output, Σ_{k≠y} max(0, 1 − o_y + o_k) / K.

    Weston & Watkins 1999. The outputs are scores, so their softmax ranks but is not calibrated.
    """
    # Torch's own returns 0 for NaN outputs, and has no half precision on the CPU.
    margins = F.relu(1 - outputs.gather(1, labels.unsqueeze(1)) + outputs)
    return (margins * (1 - _one_hot(outputs, labels))).mean()


def squared_hinge(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared hinge of each class against the rest, Σ_k max(0, 1 − s_k o_k)² / K, s = 2t − 1.

    The L2-SVM of Tang 2013, who found it ahead of cross-entropy for CNNs on CIFAR-10. Janocha &
    Czarnecki 2017 call it hinge². As in `multi_margin`, the outputs are scores.
    """
    signs = 2 * _one_hot(outputs, labels) - 1
    return F.relu(1 - signs * outputs).square().mean()


def _one_hot(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.one_hot(labels, num_classes=outputs.shape[1]).to(outputs.dtype)  # (N, K)


def _log_probability(outputs: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(outputs, labels, reduction="none")  # (N,), ln p_y


# Loss, key in `PROBABILITIES`, source.
_TABLE = (
    Loss(l1, "clipped_normalised", "Janocha & Czarnecki 2017, table 1, L1"),
    Loss(mse, "clipped_normalised", "Hui & Belkin 2021, the square loss, not rescaled"),
    Loss(cross_entropy, "softmax", "Bridle 1990, softmax and its log-likelihood"),
    Loss(smooth_l1, "clipped_normalised", "Girshick 2015, equation 3"),
    Loss(l1_softmax, "softmax", "Janocha & Czarnecki 2017, proposition 1"),
    Loss(mse_softmax, "softmax", "Brier 1950, the score P"),
    Loss(bce, "sigmoid_normalised", "torch.nn.BCEWithLogitsLoss, one class against the rest"),
    Loss(label_smoothing, "softmax", "Szegedy et al. 2016, section 7"),
    Loss(focal, "softmax", "Lin et al. 2017, equation 4, over a softmax"),
    Loss(squentropy, "softmax", "Hui, Belkin & Wright 2023, the multi-class loss"),
    Loss(poly1, "softmax", "Leng et al. 2022, the Poly-1 loss"),
    Loss(gce, "softmax", "Zhang & Sabuncu 2018, equation 6"),
    Loss(multi_margin, "softmax", "Weston & Watkins 1999, the multi-class hinge"),
    Loss(squared_hinge, "softmax", "Tang 2013, the L2-SVM"),
)

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _TABLE}


def smoothed(loss: Callable[[Tensor, Tensor], Tensor], share: float) -> Callable[..., Tensor]:
    """Return a loss under label smoothing, (1 − ε) L(o, y) + ε Σ_k L(o, k) / K.

    That is its mean if a share ε of the labels were drawn from all classes. For cross-entropy it
    is the label smoothing of Szegedy et al. 2016, section 7. For losses that are linear or
    quadratic in the target, smoothed targets have the same gradient.
    """
    if not share:
        return loss

    def smooth(outputs: Tensor, labels: Tensor) -> Tensor:
        size, num_classes = outputs.shape
        each = torch.arange(num_classes, device=labels.device).repeat(size)  # (N K,)
        spread = loss(outputs.repeat_interleave(num_classes, 0), each)
        return (1 - share) * loss(outputs, labels) + share * spread

    return smooth


def get_loss(name: str) -> Loss:
    """Return a loss: one of `LOSSES`, or a user's own.

    Args:
        name: of a loss, or `package.module:loss` or `file.py:loss`. Such a loss is a function
            `(outputs (N, K), labels (N,)) -> scalar` whose outputs are logits, or a `Loss`.

    Raises:
        ValueError: there is no such loss.
    """
    if isinstance(name, str) and name in LOSSES:
        return LOSSES[name]
    if isinstance(name, str) and is_reference(name):
        found = resolve(name)
        return found if isinstance(found, Loss) else Loss(found, "softmax", name)
    hint = did_you_mean(str(name), LOSSES)
    raise ValueError(
        f"unknown loss {name!r}{hint}; choose from {', '.join(LOSSES)}, "
        "package.module:loss or file.py:loss"
    )
