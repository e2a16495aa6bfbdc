"""What the kernels raise.

KernelError
├── KernelArgumentError     the caller passed something that the operation does not take (also a ValueError)
├── KernelConfigError       a committed tile configuration is missing or does not fit (also a ValueError)
└── KernelUnavailableError  this machine cannot run the kernels (also a RuntimeError)
"""


class KernelError(Exception):
    """Root of everything that `flexgate.kernels` raises on purpose."""


class KernelArgumentError(KernelError, ValueError):
    """An argument has the wrong dtype, shape, device or value."""


class KernelConfigError(KernelError, ValueError):
    """No tile configuration serves this shape, or the one found contradicts the kernel's contract."""


class KernelUnavailableError(KernelError, RuntimeError):
    """The device or the installation cannot run an operator."""
