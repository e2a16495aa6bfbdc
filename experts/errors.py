"""Errors of the experts package.

ExpertsError
├── LayoutError            a checkpoint that does not follow the layout
│   └── OwnershipInvalid   an ownership file, or a table for one, that does not fit the checkpoint
├── TensorFileError        not a safetensors file that this project reads
├── PackageError           an expert package that may not be used
│   ├── PackageUnreadable  missing, a link, not a regular file, too large, an unexpected file
│   ├── ManifestInvalid    manifest.json is not what the format asks for
│   ├── SignatureInvalid   unsigned, signed by nobody trusted, or changed after signing
│   ├── BaseMismatch       trained against another base model; names the first difference
│   ├── WeightsInvalid     wrong tensors, NaN, or values out of bounds
│   ├── SizeInvalid        a rank or width that no expert of the model has
│   └── DigestMismatch     bytes other than the manifest names
├── KeyInvalid             a key file that is none
├── TextsInvalid           documents that nothing can be trained on
├── TrainingRefused        options that do not fit each other or the model
├── ProcessLost            another process of a training is gone
├── EvaluationRefused      nothing that can be evaluated, or nothing to draw with
├── OutputRefused          the output exists already, or could not be written
│   └── DiskFull           there is no room for it beside what must stay free
├── UsageInvalid           what a command was given cannot be meant
├── ServerRefused          a running server would not take or revoke an expert, in its words
└── MergeError             parts that do not make one model
"""

from __future__ import annotations


class ExpertsError(Exception):
    """Root of every error this package raises on purpose; the message says what, where and what would be right."""


class LayoutError(ExpertsError, ValueError):
    """A checkpoint does not follow the layout; the message names the tensor or file."""


class OwnershipInvalid(LayoutError):
    """An ownership file, or a table that one is to be made from, contradicts itself or the checkpoint."""


class TensorFileError(ExpertsError, ValueError):
    """A file is not safetensors, or holds what this project refuses to read."""


class PackageError(ExpertsError, ValueError):
    """An expert package may not be used."""


class PackageUnreadable(PackageError):
    """The files of a package are not the plain files that the format asks for."""


class ManifestInvalid(PackageError):
    """``manifest.json`` does not follow the format."""


class SignatureInvalid(PackageError):
    """Nobody that is trusted for this owner signed exactly this manifest."""


class BaseMismatch(PackageError):
    """The expert belongs to another base model."""


class WeightsInvalid(PackageError):
    """``expert.safetensors`` holds other tensors than it should, NaN, or values out of bounds."""


class SizeInvalid(PackageError):
    """A rank or a width that no expert of this architecture has, or both."""


class DigestMismatch(PackageError):
    """The bytes are not those that the manifest names."""


class KeyInvalid(ExpertsError, ValueError):
    """A key file is missing, or no Ed25519 key."""


class TextsInvalid(ExpertsError, ValueError):
    """Documents or a tokenizer that nothing can be trained with; the message names file and place."""


class TrainingRefused(ExpertsError, ValueError):
    """Options that do not fit each other, the model, or a run that was begun with others."""


class ProcessLost(ExpertsError):
    """Another process of a training that runs on several is gone, so that this one cannot go on."""


class EvaluationRefused(ExpertsError, ValueError):
    """Texts that belong to no expert, options that do not fit, or a missing library for pictures."""


class OutputRefused(ExpertsError):
    """The output exists already, or the disk refused it; nothing that looks whole was left behind."""


class DiskFull(OutputRefused):
    """The disk has no room for the output beside what must stay free; the message gives the numbers."""


class UsageInvalid(ExpertsError):
    """What the caller gave a command cannot be meant."""


class ServerRefused(ExpertsError):
    """A running server said no, or does not answer."""


class MergeError(ExpertsError, ValueError):
    """Parts do not make one model; the message names the tensor or package."""
