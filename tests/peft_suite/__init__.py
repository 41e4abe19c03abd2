"""PEFT's own test suite, run on our tuner: `make test-peft`."""
