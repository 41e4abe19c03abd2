"""Making the router: discovery of targets by measured loss, features, training, calibration, evaluation, report."""
