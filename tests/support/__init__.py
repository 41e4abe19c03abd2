"""What tests and benchmarks share: tiny models and rows, runs of real commands, hostile libraries."""
