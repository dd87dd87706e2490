"""The CNN, its data, its losses and its training: PyTorch only, no MLflow, no Optuna."""
