"""The demo's tokenizer and public anchor, from public text alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from flexgate.experts.demo.corpus import Document
from flexgate.experts.demo.public import public_domain
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.stages import ANCHOR, TOKENIZER, read_tokenizer, timed
from flexgate.experts.demo.texts import encode, public_documents
from flexgate.experts.demo.tokenizer import EOS_ID, PAD_ID, save_tokenizer, train_tokenizer
from flexgate.experts.demo.words import DICTIONARY
from flexgate.experts.package.provenance import PUBLIC
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.train_anchor import fit_anchor, write_anchor


def build_anchor(settings: Settings, work: Path) -> None:
    """Tokenizer and public anchor: next tokens, and the prompt's key words readable in the channels."""
    if (work / ANCHOR).is_dir():
        return
    with timed(work, ANCHOR), tempfile.TemporaryDirectory() as meeting:
        texts = public_documents(settings, settings.tokenizer_documents, "tokenizer")
        texts += [Document("", word) for word in DICTIONARY] * settings.dictionary_weight
        tokenizer = train_tokenizer(texts, settings.anchor.vocab_size)
        save_tokenizer(work / TOKENIZER, tokenizer, settings.anchor.length)
        spawn(_anchor_worker, (settings, work, meeting), nprocs=settings.workers)


def _anchor_worker(rank: int, settings: Settings, work: Path, meeting: str) -> None:
    """One of the processes that train the anchor on different batches; the first one saves it."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", f"file://{meeting}/store", rank=rank, world_size=settings.workers)
    tokenizer = read_tokenizer(work)
    model = FlexOlmo(settings.anchor.architecture())
    examples = encode(tokenizer, public_documents(settings, settings.anchor_documents, f"anchor-{rank}"))
    held = encode(tokenizer, public_documents(settings, settings.held_documents, "held"))
    run = fit_anchor(model, settings.anchor, Path(meeting) / str(rank), PAD_ID)
    run.run(examples, held, f"anchor {rank}")
    if rank == 0:
        entry = {**PUBLIC, "domain": public_domain().description}
        write_anchor(work / ANCHOR, model, settings.anchor.dtype, EOS_ID, PAD_ID, work / TOKENIZER, entry)
    distributed.destroy_process_group()
