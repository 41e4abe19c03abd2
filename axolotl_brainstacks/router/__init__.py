"""Which domains answer a prompt: features of the base model, a small network, thresholds."""
