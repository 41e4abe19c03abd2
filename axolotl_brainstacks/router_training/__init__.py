"""Makes the router: targets discovered by measured loss, features, fit, calibration, evaluation, report."""
