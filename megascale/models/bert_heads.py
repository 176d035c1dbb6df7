"""The two heads that BERT is pretrained with: masked tokens, and relation of two segments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.models.bert import BERTConfig
from megascale.models.head import Reduce
from megascale.models.mlp import gelu, gelu_tanh
from megascale.models.norm import build_norm


class TiedDecoder(nn.Module):
    """``hidden @ tokens.T + bias``: owns the bias and is given the token embedding's weight."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, tokens: Tensor, reduce: Reduce | None = None) -> Tensor:
        """``hidden`` (..., D), ``tokens`` (V, D) -> logits (..., V), or what ``reduce`` makes of
        them.
        """
        if reduce is not None:
            return reduce(hidden, tokens, self.bias, None)
        return F.linear(hidden, tokens, self.bias)


class MaskedLMHead(nn.Module):
    """``decoder(norm(act(dense(hidden))))``; the token embedding is given at each call."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = build_norm("layernorm", config.hidden_size, config.norm_eps, bias=True)
        self.decoder = TiedDecoder(config.vocab_size)
        self._activation = gelu_tanh if config.activation == "gelu_tanh" else gelu

    def forward(self, hidden: Tensor, tokens: Tensor, reduce: Reduce | None = None) -> Tensor:
        """``hidden`` (..., D), ``tokens`` (V, D), the embedding's weight -> logits (..., V), or
        what ``reduce`` makes of them.
        """
        transformed = self.norm(self._activation(self.dense(hidden)))
        return self.decoder(transformed, tokens, reduce)


class SentenceHead(nn.Module):
    """``classifier(tanh(dense(hidden of [CLS])))``: NSP or SOP, in either case two classes.

    Attributes:
        of_first_token: where the tokens of a sample are cut over ranks, only the rank that holds
            the first one computes something that counts.
    """

    of_first_token = True

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` (B, T, D) -> logits (B, 2)."""
        return self.classifier(torch.tanh(self.dense(hidden[:, 0])))
