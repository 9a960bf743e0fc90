"""pytest-benchmark suites: `pytest benchmarks --benchmark-json=FILE`, then `python -m benchmarks.report`."""
