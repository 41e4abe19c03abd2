"""Which domains answer a prompt: features, network, discovery of targets by measured loss, fit, gate."""
