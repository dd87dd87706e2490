"""How good the predictions are: metrics, figures, a report."""
