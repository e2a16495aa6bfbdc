"""What the kernels raise.

KernelError
├── KernelArgumentError   the caller passed something that the operation does not take (also a ValueError)
└── KernelConfigError     a committed tile configuration is missing or does not fit (also a ValueError)
"""


class KernelError(Exception):
    """Root of everything that `flexgate.kernels` raises on purpose."""


class KernelArgumentError(KernelError, ValueError):
    """An argument has the wrong dtype, shape, device or value."""


class KernelConfigError(KernelError, ValueError):
    """No tile configuration serves this shape, or the one found contradicts the kernel's contract."""
