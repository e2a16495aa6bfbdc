"""Running and inspecting the kernels on a machine without a GPU; imported by tests and benchmarks only."""
