"""A plain Optuna and MLflow script, as most people write it: what `benchmarks.sweep` measures.

    python -m benchmarks.plain DATASET DATA_DIR EPOCHS TRIALS.json

runs the trials of a file (a list of their parameters) one after the other: a DataLoader with two
processes, `ToTensor` and `Normalize`, MLflow's fluent calls, `log_model` as it comes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlflow
import optuna
import torch
from torch.utils.data import DataLoader

from benchmarks.usual import NORMALISED, Images, network
from cnn.data import load
from cnn.losses import get_loss


def main() -> None:
    """Run the study."""
    name, data_dir, epochs, trials = sys.argv[1:]
    data = load(name, data_dir=Path(data_dir), seed=0)
    training = Images(data.train, NORMALISED)
    validation = DataLoader(Images(data.validation, NORMALISED), batch_size=256)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment("plain")

    def objective(trial: optuna.Trial) -> float:
        loss_function = get_loss(trial.suggest_categorical("loss", ["mse", "cross_entropy"]))
        learning_rate = trial.suggest_float("learning_rate", 1e-3, 1.0, log=True)
        batch_size = trial.suggest_categorical("batch_size", [64, 256])
        loader = DataLoader(training, batch_size=batch_size, shuffle=True, num_workers=2)
        model = network(len(data.classes))
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        with mlflow.start_run(run_name=f"trial {trial.number}"):
            mlflow.log_params(trial.params)
            for epoch in range(int(epochs)):
                mlflow.log_metric(
                    "train_loss", train(model, loader, loss_function, optimizer), epoch
                )
                accuracy = evaluate(model, validation)
                mlflow.log_metric("val_accuracy", accuracy, epoch)
            example = next(iter(validation))[0][:2].numpy()
            mlflow.pytorch.log_model(model, name="model", input_example=example)
        return accuracy

    study = optuna.create_study(
        study_name="plain", storage="sqlite:///optuna.db", direction="maximize"
    )
    parameters = json.loads(Path(trials).read_text())
    for each in parameters:
        study.enqueue_trial(each)
    study.optimize(objective, n_trials=len(parameters))
    print("best:", study.best_trial.params)


def train(model: Any, loader: Any, loss_function: Any, optimizer: Any) -> float:
    """Train for an epoch, and return the mean loss of its batches."""
    model.train()
    running_loss = 0.0
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = loss_function(model(inputs), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    return running_loss / len(loader)


@torch.no_grad()
def evaluate(model: Any, loader: Any) -> float:
    """Return the accuracy."""
    model.eval()
    correct = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in loader)
    return correct / len(loader.dataset)


if __name__ == "__main__":
    main()
