"""A recorded model, used where there is nothing but what it says it needs.

`python -m benchmarks.fresh_venv` records a CNN (or takes `--model URI`), installs the model's own
`requirements.txt`, and nothing else, into a new virtual environment, and there has `mlflow.pyfunc`
label images, away from this repository. The probabilities are compared with those that
`tracking.predict` gives here. All is removed at the end; with PyTorch for CUDA it takes 6 GB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PREDICT = """
import sys
sys.modules.update(dict.fromkeys(["cnn", "experiments", "tracking"]))  # can't be imported
import mlflow, numpy

model, images, probabilities = sys.argv[1:]
numpy.save(probabilities, mlflow.pyfunc.load_model(model).predict(numpy.load(images)))
"""
"""Labels images without this project's code. To be run by `python -I`: it reads no PYTHONPATH."""


def main() -> None:
    """Install, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="URI", help="as tracking.predict takes it")
    parser.add_argument("--images", type=int, default=100, help="how many (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = fetch(options.model, scratch) if options.model else record(scratch)
        difference = compare(model, scratch, options.images)
    print(f"{options.images} images: the probabilities differ by at most {difference:g}")
    if difference > 1e-6:
        sys.exit(1)


def record(scratch: Path) -> Path:
    """Record a CNN that has learnt nothing."""
    import numpy as np

    from cnn.losses import softmax
    from cnn.networks import CNN, Classifier
    from tracking.models.recording import save_model

    network = Classifier(CNN(10), softmax).eval()
    example = np.zeros((2, 32, 32, 3), np.uint8)
    classes = {"classes": [str(digit) for digit in range(10)]}
    save_model(network, scratch / "model", input_example=example, metadata=classes)
    return scratch / "model"


def fetch(uri: str, scratch: Path) -> Path:
    """Fetch a model's folder."""
    from mlflow.artifacts import download_artifacts

    (scratch / "fetched").mkdir()
    return Path(download_artifacts(uri, dst_path=str(scratch / "fetched")))


def compare(model: Path, scratch: Path, count: int) -> float:
    """Return by how much the probabilities of some random images differ, at most."""
    import numpy as np

    from tracking.models.predictor import load_model

    predictor = load_model(str(model))
    shape = (count, *predictor.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.save(scratch / "images.npy", images)
    predict_elsewhere(model, scratch)
    found = np.load(scratch / "probabilities.npy")
    return float(np.abs(found - predictor.probabilities(images, batch_size=count)).max())


def predict_elsewhere(model: Path, scratch: Path) -> None:
    """Label `images.npy`, in a fresh environment, and write `probabilities.npy`."""
    requirements = model / "requirements.txt"
    print(f"installing: {' '.join(requirements.read_text().split())}", flush=True)
    venv.create(scratch / "fresh", with_pip=True)
    python = str(scratch / "fresh" / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "-r", str(requirements)]
    subprocess.run(command, check=True)
    files = [model, scratch / "images.npy", scratch / "probabilities.npy"]
    subprocess.run([python, "-I", "-c", PREDICT, *map(str, files)], cwd=scratch, check=True)


if __name__ == "__main__":
    main()
