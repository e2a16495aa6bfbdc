"""One owner's part of the demo: its expert, trained as a pair with the frozen anchor, as a signed package. It sees its
own and public text only.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.demo.corpus import Domain
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.stages import ANCHOR, KEYS, PACKAGES, read_tokenizer, timed
from flexgate.experts.demo.texts import encode, owner_documents, public_documents
from flexgate.experts.demo.tokenizer import PAD_ID
from flexgate.experts.io.tensorfile import DTYPES
from flexgate.experts.package.manifest import Figure, Statement, Training
from flexgate.experts.package.signature import write_keys
from flexgate.experts.package.write import write_package
from flexgate.experts.training.batches import Example, batches
from flexgate.experts.training.loop import Outcome, Plan, Run
from flexgate.experts.training.model import FlexOlmo
from flexgate.experts.training.objective import pair_from_anchor, weighted_loss
from flexgate.experts.training.pair import expert_layers, trainable
from flexgate.experts.training.routing import Samples, collect, fit_rows, set_rows
from flexgate.experts.training.train_expert import load_anchor
from flexgate.policies.ids import ExpertId, OwnerId


def build_package(settings: Settings, work: Path, owner: Domain) -> None:
    """One owner's expert, trained as a pair with the frozen anchor, as a signed package.

    Router rows come first, then the expert under that routing. The rows above the first expert layer are then fitted
    again on what the trained pair sees there, and the expert's upper layers get used to them.
    """
    with timed(work, owner.id):
        tokenizer = read_tokenizer(work)
        pair = pair_from_anchor(load_anchor(work / ANCHOR))
        pair.requires_grad_(False)
        own = encode(tokenizer, owner_documents(settings, owner, settings.owner_documents, ""))
        held = encode(tokenizer, owner_documents(settings, owner, settings.held_documents, "-held"))
        public = encode(tokenizer, public_documents(settings, settings.router_public_documents, owner.id))
        upper = settings.expert_layers[1:]
        _fit_routers(settings, pair, own, public, every_layer=True)
        first = _train(pair, settings.owner, settings.expert_layers, own, held, owner.id)
        _fit_routers(settings, pair, own, public, every_layer=False)
        second = _train(pair, settings.owner_upper, upper, own, held, owner.id)
        base = base_identity(work / ANCHOR)
        statement = _statement(settings, owner, len(own), first, second)
        layers = expert_layers(pair, DTYPES[base.dtype])
        write_package(work / PACKAGES / owner.id, statement, base, layers, key=_key(settings, work, statement.owner))


def owner_id(owner: Domain) -> str:
    """The owner's name as an id."""
    return owner.owner.lower().replace(" ", "-")


def _train(
    pair: FlexOlmo, plan: Plan, layers: Sequence[int], own: list[Example], held: list[Example], name: str
) -> Outcome:
    """Train the owner's FFN in ``layers``; all else stays as it is."""
    pair.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            trainable(pair, layers, train_router=False),
            lambda batch: weighted_loss(pair, pair.hidden(batch.tokens_BT), batch),
            plan,
            Path(folder),
            name=name,
            pad_id=PAD_ID,
        )
        return run.run(own, held, name)


def _fit_routers(
    settings: Settings, pair: FlexOlmo, own: list[Example], public: list[Example], *, every_layer: bool
) -> None:
    """Rows from what the pair sees now: of every layer, reading channels above the first expert layer; or of the layers
    above it alone, reading everything.
    """
    first, *upper = settings.expert_layers
    channels = settings.anchor.channels
    rows = fit_rows(
        _samples(settings, pair, own[: settings.router_documents]),
        _samples(settings, pair, public),
        channels=channels.count if every_layer and channels else settings.anchor.hidden_size - 1,
        first_expert_layer=first,
        layers=range(settings.anchor.layers) if every_layer else upper,
        decay=settings.router_decay,
    )
    set_rows(pair, rows, sharpness=settings.sharpness)


def _samples(settings: Settings, model: FlexOlmo, examples: list[Example]) -> Samples:
    stream = batches(
        examples,
        tokens_per_batch=settings.router_tokens_per_batch,
        pad_id=PAD_ID,
        prompt_weight=settings.router_prompt_weight,
        seed=settings.seed,
    )
    return collect(model, stream)


def _statement(settings: Settings, owner: Domain, documents: int, first: Outcome, second: Outcome) -> Statement:
    training = Training(
        data=f"invented facts of the demo: {owner.description}",
        documents=documents,
        tokens=first.tokens + second.tokens,
        router="own",
        recipe={
            "steps": f"{first.steps} and {second.steps}",
            "seed": str(settings.seed),
            "layers": " ".join(map(str, settings.expert_layers)),
            "router_start": "discriminant",
        },
    )
    loss = Figure(
        name="held_out_loss", value=second.held_out_loss, unit="nats per token", on="answers of held-out own text"
    )
    return Statement(
        id=ExpertId(owner.id),
        owner=OwnerId(owner_id(owner)),
        owner_name=owner.owner,
        domain=owner.description,
        training=training,
        evaluation=(loss,),
    )


def _key(settings: Settings, work: Path, owner: str) -> Path:
    """The owner's private key. It follows from the seed, so that whoever trains the demo gets the same signatures."""
    path = work / KEYS / f"{owner}.key"
    if not path.is_file():
        secret = hashlib.sha256(f"flexgate demo {settings.seed} {owner}".encode()).digest()
        write_keys(owner, path.parent, Ed25519PrivateKey.from_private_bytes(secret))
    return path
