"""What predicts the next token: one model under a gate, and the ways to combine experts that a merge competes with.

* **Model soup**: one dense model, each FFN the weighted mean of the experts' (Wortsman et al., 2022).
* **BTM**: the experts' next-token distributions, weighted by how well each predicted the text so far
  (Branch-Train-Merge, Li et al., 2022): ``p(x | past) = sum_d p(d | past) p_d(x | past)`` with a uniform prior, over
  all or the ``top`` likeliest.
* **Domain classifier**: one expert answers, chosen by multinomial logistic regression on the counts of the tokens seen.

Shapes: B sequences, T positions, V vocabulary, E experts, D members or domains, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgate.experts.checkpoint.layout import EXPERT_KEYS, ROUTER_KEY, shared_keys
from flexgate.experts.training.batches import Example
from flexgate.experts.training.model import FlexOlmo

Predict = Callable[[Tensor], Tensor]
"""Tokens ``[B, T]``, right-padded, to the log-probabilities ``[B, T, V]`` of what comes next; causal."""


def gated(model: FlexOlmo, allowed: Sequence[bool]) -> Predict:
    """``model`` with the experts in ``allowed`` only."""
    allowed_E = torch.tensor(list(allowed))

    @torch.no_grad()
    def predict(tokens_BT: Tensor) -> Tensor:
        return model(tokens_BT, allowed_E.expand(len(tokens_BT), -1)).log_softmax(-1)

    return predict


def soup(model: FlexOlmo, weights: Sequence[float]) -> FlexOlmo:
    """A dense model whose FFNs are the mean of ``model``'s experts, weighted by ``weights`` (made to sum to one)."""
    source, architecture = model.state_dict(), replace(model.architecture, num_experts=1, num_experts_per_tok=1)
    shares = [weight / sum(weights) for weight in weights]
    mixed = {key: source[key] for key in shared_keys(architecture)}
    for layer in range(architecture.num_hidden_layers):
        mixed[ROUTER_KEY.format(layer=layer)] = source[ROUTER_KEY.format(layer=layer)][:1]
        for key in EXPERT_KEYS:
            parts = [source[key.format(layer=layer, expert=expert)] * share for expert, share in enumerate(shares)]
            mixed[key.format(layer=layer, expert=0)] = torch.stack(parts).sum(0)
    return FlexOlmo.from_tensors(architecture, mixed)


def ensemble(members: Sequence[Predict], *, top: int | None = None, confidence: float = 1.0) -> Predict:
    """BTM: the mixture of ``members``' distributions by their posterior, over the ``top`` likeliest (None: all).

    ``confidence`` is the power to which the likelihoods of the text so far are raised.
    """

    @torch.no_grad()
    def predict(tokens_BT: Tensor) -> Tensor:
        said_DBTV = torch.stack([member(tokens_BT) for member in members])
        posterior_DBT = log_posterior(said_DBTV, tokens_BT, top, confidence)
        return (posterior_DBT[..., None] + said_DBTV).logsumexp(0)

    return predict


def log_posterior(said_DBTV: Tensor, tokens_BT: Tensor, top: int | None, confidence: float = 1.0) -> Tensor:
    """``log p(d | tokens up to t)`` for the prediction made at ``t``; minus infinity beyond the ``top`` likeliest."""
    next_DBT1 = tokens_BT[None, :, 1:, None].expand(len(said_DBTV), -1, -1, -1)
    evidence_DBT = F.pad(said_DBTV[:, :, :-1].gather(-1, next_DBT1).squeeze(-1).cumsum(-1), (1, 0))
    if top is not None and top < len(evidence_DBT):
        kept = torch.zeros_like(evidence_DBT, dtype=torch.bool).scatter(0, evidence_DBT.topk(top, dim=0).indices, True)
        evidence_DBT = evidence_DBT.masked_fill(~kept, float("-inf"))
    return (confidence * evidence_DBT).log_softmax(0)


@dataclass(frozen=True)
class Classifier:
    """Which domain a text is of, from the counts of its tokens."""

    weight_VD: Tensor
    bias_D: Tensor

    def domain(self, tokens_BT: Tensor) -> Tensor:
        """The likeliest domain ``[B, T]`` after each position."""
        return (self.weight_VD[tokens_BT].cumsum(1) + self.bias_D).argmax(-1)


def fit_classifier(domains: Sequence[Sequence[Example]], vocab_size: int, *, decay: float) -> Classifier:
    """Fit on the prompts of labelled examples (on whole texts where there is no prompt)."""
    counts_NV = torch.stack(
        [
            torch.bincount(torch.tensor(example.ids[: example.start] or example.ids), minlength=vocab_size)
            for domain in domains
            for example in domain
        ]
    ).float()
    labels_N = torch.repeat_interleave(torch.arange(len(domains)), torch.tensor([len(domain) for domain in domains]))
    weight_VD = torch.zeros(vocab_size, len(domains), requires_grad=True)
    bias_D = torch.zeros(len(domains), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_VD, bias_D], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(counts_NV @ weight_VD + bias_D, labels_N) + decay * weight_VD.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return Classifier(weight_VD.detach(), bias_D.detach())


def routed(members: Sequence[Predict], classifier: Classifier) -> Predict:
    """The member that ``classifier`` chooses for the text so far, alone."""

    @torch.no_grad()
    def predict(tokens_BT: Tensor) -> Tensor:
        said_DBTV = torch.stack([member(tokens_BT) for member in members])
        chosen_1BTV = classifier.domain(tokens_BT)[None, ..., None].expand(1, -1, -1, said_DBTV.shape[-1])
        return said_DBTV.gather(0, chosen_1BTV).squeeze(0)

    return predict
