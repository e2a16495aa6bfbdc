"""One command that checks and times the kernels on a GPU: `python -m flexgate.kernels.bench`."""
