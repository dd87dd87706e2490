"""Optuna studies over loss, learning rate and batch size: what to try, in what order."""
