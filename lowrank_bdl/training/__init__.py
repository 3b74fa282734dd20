"""Training loops: learning-rate schedules, losses, collections of weights, checkpoints and exact resume."""
