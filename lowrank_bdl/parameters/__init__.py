"""Named parameters as one flat vector, the network as a function of it, and batch-norm recalibration."""
