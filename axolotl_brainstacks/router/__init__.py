"""The router at run time: features of the base model, a small network, and thresholds decide which domains a prompt uses."""
