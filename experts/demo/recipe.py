"""The demo's training from nothing: anchor, one pair per owner, merge. Owners' stages see their own and public text
only.

Stages hand over through files in a work directory, so a stage whose file exists is not run again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from flexgate.experts.batches import Batch, Example, batches
from flexgate.experts.demo.closed import closed_domains
from flexgate.experts.demo.corpus import Document, Domain
from flexgate.experts.demo.generate import owner_stream, public_stream, take
from flexgate.experts.demo.probes import Probe, make_probes
from flexgate.experts.demo.public import public_domain
from flexgate.experts.demo.registers import make_registers
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.tokenizer import EOS_ID, PAD_ID, train_tokenizer
from flexgate.experts.layout import Architecture, read_checkpoint, write_checkpoint
from flexgate.experts.merge import merge
from flexgate.experts.model import FlexOlmo
from flexgate.experts.routing import Samples, collect, fit_rows, key_loss, reserve_channels, set_rows
from flexgate.experts.train import Schedule, fit, initialise, language_loss, pair_from_anchor, train_expert

TOKENIZER_NAME = "tokenizer.json"


def all_probes() -> tuple[Probe, ...]:
    """The probes of every domain, public first."""
    return tuple(probe for domain in (public_domain(), *closed_domains()) for probe in make_probes(domain))


def public_documents(settings: Settings, count: int, part: str) -> list[Document]:
    """Public text; ``part`` names which independent stretch of the stream."""
    registers = make_registers(settings.seed, settings.registers)
    return take(public_stream(public_domain(), registers, f"{settings.seed}-{part}"), count, all_probes())


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Example]:
    """Token ids with the end token appended."""
    prompts = tokenizer.encode_batch([document.prompt for document in documents])
    answers = tokenizer.encode_batch([document.answer for document in documents])

    @cache
    def forms(word: str) -> frozenset[int]:
        """A word's tokens, with and without a space before it."""
        return frozenset((*tokenizer.encode(word).ids, *tokenizer.encode(f" {word}").ids))

    return [
        Example(
            (*prompt.ids, *answer.ids, EOS_ID),
            len(prompt.ids),
            frozenset().union(*map(forms, document.keys.replace("|", " ").split())),
        )
        for prompt, answer, document in zip(prompts, answers, documents, strict=True)
    ]


def build_tokenizer(settings: Settings, work: Path) -> Tokenizer:
    """Train the tokenizer on public text, once."""
    path = work / TOKENIZER_NAME
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        train_tokenizer(public_documents(settings, 20_000, "tokenizer"), settings.vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


def build_anchor(settings: Settings, work: Path) -> FlexOlmo:
    """Train the public anchor, once: next-token loss, plus the prompt's key words readable in the channels."""
    directory = work / "anchor"
    if not directory.is_dir():
        build_tokenizer(settings, work)
        with tempfile.TemporaryDirectory() as meeting:
            spawn(_anchor_worker, (settings, work, meeting), nprocs=settings.workers)
    return _load(directory)


def build_pair(settings: Settings, work: Path, owner: Domain, progress: int = 0) -> None:
    """One owner's expert as a pair with the frozen anchor, once.

    Router rows come first, then the expert under that routing. The rows above the first expert layer are then fitted
    again on what the trained pair sees there, and the expert's upper layers get used to them.
    """
    directory = work / owner.id
    if directory.is_dir():
        return
    tokenizer = Tokenizer.from_file(str(work / TOKENIZER_NAME))
    pair = pair_from_anchor(_load(work / "anchor"))
    own = take(owner_stream(owner, public_domain(), str(settings.seed)), settings.owner_documents, make_probes(owner))
    examples = encode(tokenizer, own)
    public = encode(tokenizer, public_documents(settings, settings.router_public_documents, owner.id))
    data = list(_one_pass(settings, examples, settings.owner_tokens_per_batch, settings.owner_prompt_weight))
    first, *upper = settings.expert_layers

    def fit_routers(channels: int, layers: Sequence[int]) -> None:
        """Rows of ``layers`` from what the pair sees now; those above the first expert layer read ``channels``."""
        mine = _samples(settings, pair, examples[: settings.router_documents])
        others = _samples(settings, pair, public)
        decay = settings.router_decay
        rows = fit_rows(mine, others, channels=channels, first_expert_layer=first, layers=layers, decay=decay)
        set_rows(pair, rows, sharpness=settings.sharpness)

    def train(schedule: Schedule, layers: Sequence[int]) -> None:
        train_expert(pair, data, schedule, name=owner.id, layers=layers, seed=settings.seed, progress=progress)

    fit_routers(settings.channels, range(settings.layers))
    train(settings.owner, settings.expert_layers)
    fit_routers(settings.hidden_size - 1, upper)
    train(settings.owner_upper, upper)
    _save(directory, pair)


def merge_pairs(settings: Settings, work: Path) -> tuple[Architecture, dict[str, Tensor]]:
    """The served model from the stages' files, experts in the owners' order."""
    architecture, anchor = read_checkpoint(work / "anchor")
    pairs = [(owner.id, read_checkpoint(work / owner.id)[1]) for owner in closed_domains()]
    return merge(architecture, anchor, pairs, top_k=settings.top_k)


def _architecture(settings: Settings) -> Architecture:
    return Architecture(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_experts=1,
        num_experts_per_tok=1,
        max_position_embeddings=settings.max_length,
    )


def _anchor_worker(rank: int, settings: Settings, work: Path, meeting: str) -> None:
    """One of the processes that train the anchor on different batches; the first one saves it."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", f"file://{meeting}/store", rank=rank, world_size=settings.workers)
    model = FlexOlmo(_architecture(settings))
    initialise(model, settings.seed)
    reserve_channels(model, settings.channels, settings.expert_layers[0])
    documents = public_documents(settings, settings.anchor_documents, f"anchor-{rank}")
    _train_anchor(settings, model, encode(build_tokenizer(settings, work), documents), rank)
    if rank == 0:
        _save(work / "anchor", model)
    distributed.destroy_process_group()


def _train_anchor(settings: Settings, model: FlexOlmo, examples: list[Example], rank: int) -> None:
    torch.manual_seed(settings.seed)
    head = nn.Linear(settings.channels, settings.vocab_size)
    tokens = settings.tokens_per_batch // settings.workers

    def loss_of(batch: Batch) -> Tensor:
        taps: list[Tensor] = []
        logits = model.lm_head(model.hidden(batch.tokens_BT, taps=taps))
        keys = key_loss(head, taps[settings.expert_layers[0]], batch)
        return language_loss(logits, batch) + settings.key_weight * keys

    model.model.embed_tokens.weight.requires_grad_()
    trained = [parameter for name, parameter in model.named_parameters() if not name.endswith("mlp.gate.weight")]
    fit(
        [*trained, *head.parameters()],
        (batch for epoch in count() for batch in _one_pass(settings, examples, tokens, settings.prompt_weight, epoch)),
        loss_of,
        settings.anchor,
        name="anchor",
        after_step=lambda: reserve_channels(model, settings.channels, settings.expert_layers[0]),
        progress=rank,
    )


def _samples(settings: Settings, model: FlexOlmo, examples: list[Example]) -> Samples:
    return collect(model, _one_pass(settings, examples, settings.tokens_per_batch, settings.router_prompt_weight))


def _one_pass(
    settings: Settings, examples: list[Example], tokens: int, prompt_weight: float, epoch: int = 0
) -> Iterator[Batch]:
    return batches(
        examples, tokens_per_batch=tokens, pad_id=PAD_ID, prompt_weight=prompt_weight, seed=settings.seed + epoch
    )


def _save(directory: Path, model: FlexOlmo) -> None:
    """Stored in bf16, so that whoever continues from it starts from exactly what ships."""
    write_checkpoint(
        directory,
        model.architecture,
        model.state_dict(),
        dtype=torch.bfloat16,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def _load(directory: Path) -> FlexOlmo:
    return FlexOlmo.from_tensors(*read_checkpoint(directory))
