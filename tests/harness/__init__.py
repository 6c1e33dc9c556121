"""What tests and benchmarks share: tiny models, runs, caches and programs to be killed."""
