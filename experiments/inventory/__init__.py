"""What is stored, and how much of it: studies, runs, models, checkpoints, decoded images."""
