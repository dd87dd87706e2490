"""From what a user names to a file of predictions."""
