"""The demo's training from nothing, with the toolkit's own parts: a public anchor, a signed expert package per owner,
and their merge.

Stages hand over through files in a work directory, so a stage whose result exists is not run again.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.demo.anchor import build_anchor
from flexgate.experts.demo.closed import closed_domains
from flexgate.experts.demo.owners import build_package
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.ship import ship
from flexgate.experts.demo.stages import ANCHOR, KEYS, MERGED, PACKAGES
from flexgate.experts.demo.texts import all_probes
from flexgate.experts.package.merge import combine
from flexgate.experts.package.signature import TrustedKeys
from flexgate.experts.package.verify import open_package


def train(settings: Settings, work: Path, output: Path) -> None:
    """Run the stages that have not run in ``work`` and ship their merge: the anchor first, then owners side by side."""
    work.mkdir(parents=True, exist_ok=True)
    build_anchor(settings, work)
    owners = [owner for owner in closed_domains() if not (work / PACKAGES / owner.id).is_dir()]
    with ProcessPoolExecutor(
        settings.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
        max_tasks_per_child=1,
    ) as pool:
        for job in [pool.submit(build_package, settings, work, owner) for owner in owners]:
            job.result()
    ship(merge(settings, work), output, all_probes())


def merge(settings: Settings, work: Path) -> Path:
    """The served model: the anchor and every owner's package, verified, in the owners' order."""
    target = work / MERGED
    if target.is_dir():
        return target
    base, trusted = base_identity(work / ANCHOR), TrustedKeys.from_directory(work / KEYS)
    with ExitStack() as stack:
        copies = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        packages = [
            stack.enter_context(
                open_package(work / PACKAGES / owner.id, base=base, trusted_keys=trusted, into=copies / owner.id)
            )
            for owner in closed_domains()
        ]
        combine(work / ANCHOR, packages, target, top_k=settings.top_k)
    return target
