"""What computes: devices, kernels, and the plan that fits a model to a card."""
