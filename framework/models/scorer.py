"""The one module that an engine wraps: body and heads. Logits are never kept, and nobody touches a head from outside.

A scorer has one purpose. Without a head of its own it scores labels; with `value_head` (a critic) or `num_classes` (a
reward model, a classifier) it has no use for the language head: its log_probs are zero and an untied head is dropped.
A pipeline stage that is not the last one gives hidden states.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cuda_ext.linear_log_probs.token_loss import TokenLoss
from framework.core.records import Metrics, Rows, Scores, TokenBatch, labels_of
from framework.models.config import Architecture, Position
from framework.models.heads import LogProbs, Pooler
from framework.models.layers import Linear
from framework.models.sequence import WholeRows
from framework.models.transformer import Transformer


class Scorer(nn.Module):
    """`scorer(rows) -> Scores` at prediction positions. `temperature` divides the logits (RL: the rollout's)."""

    def __init__(self, model: Transformer, value_head: bool = False, num_classes: int = 0, temperature: float = 1.0):
        super().__init__()
        size, strict = model.config.hidden_size, model.strict
        self.model = model
        self.sequence = WholeRows()
        self.ends = True  # it has the heads; False in a pipeline stage before the last
        self.log_probs = LogProbs(temperature, strict)
        self.value_head = Linear(size, 1, False, strict) if value_head else None
        self.encodes = model.config.architecture is Architecture.ENCODER
        self.reads_spans = model.config.position is Position.ROTARY_2D
        self.reads_prefixes = model.config.architecture is Architecture.PREFIX
        self.pooler = Pooler(size, size, True, strict) if num_classes and self.encodes else None
        self.class_head = Linear(size, num_classes, self.encodes, strict) if num_classes else None
        self.scores_labels = not (value_head or num_classes)
        if not self.scores_labels:
            model.drop_head()

    def forward(
        self,
        rows: Rows,
        token_loss: TokenLoss | None = None,
        with_entropy: bool = False,
        hidden: Tensor | None = None,
    ) -> Scores | tuple[Tensor, Metrics] | Tensor:
        """Scores of rows.inputs() (pairs: chosen rows, then rejected). log_probs and entropy[B,T] are zero where
        loss_mask is False: the vocabulary is only gone through where a label counts. With `token_loss`, its (loss,
        metrics) of the labels that count instead (`labels_of`); from a stage that does not end the model,
        hidden[B,t,D]. `hidden`: the stage's before."""
        inputs = self.sequence.cut(rows.inputs())
        alone = self.sequence.whole and one_document_a_row(rows) and not self.encodes
        source = inputs.source
        hidden = self.model(
            inputs.tokens if hidden is None else hidden,
            positions=inputs.positions,
            document_ids=None if alone else inputs.document_ids,
            prefix_lengths=inputs.prefix_lengths if self.reads_prefixes else None,
            span_positions=inputs.span_positions if self.reads_spans else None,
            token_types=inputs.token_types,
            encoder_tokens=None if source is None else source.tokens,
            encoder_document_ids=None if source is None else source.document_ids,
            real=inputs.document_ids > 0 if self.model.config.moe.balance else None,
        )
        if not self.ends:
            return hidden
        length = rows.inputs().tokens.shape[1]
        if token_loss is not None and self.sequence.whole:
            place = inputs.loss_mask.nonzero(as_tuple=True)
            return self._of_labels(hidden, inputs, place, with_entropy, token_loss, labels_of(rows))
        log_probs, entropy = (
            None if x is None else self.sequence.join(x, length)
            for x in self._label_scores(hidden, inputs, with_entropy)
        )
        assert log_probs is not None
        if token_loss is not None:  # other ranks hold other places; all of them take the loss of all labels
            place = rows.inputs().loss_mask.nonzero(as_tuple=True)
            return token_loss(log_probs[place], None if entropy is None else entropy[place], labels_of(rows))
        values = classes = None
        if self.value_head is not None:
            values = self.sequence.join(at_least_fp32(self.value_head(hidden)).squeeze(-1), length)
        if self.class_head is not None:
            last = self.sequence.last(hidden, inputs.document_ids)
            state = last if self.pooler is None else self.pooler(hidden[:, 0])
            classes = self.sequence.total(at_least_fp32(self.class_head(state)))
        return Scores(log_probs=log_probs, entropy=entropy, values=values, classes=classes)

    def _label_scores(self, hidden: Tensor, inputs: TokenBatch, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        mask = inputs.loss_mask
        zeros = torch.zeros(mask.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        if not self.scores_labels:
            return zeros, None
        place = mask.nonzero(as_tuple=True)
        log_probs, entropy = self._of_labels(hidden, inputs, place, with_entropy)
        spread = zeros.index_put(place, log_probs)
        return spread, None if entropy is None else zeros.index_put(place, entropy)

    def _of_labels(
        self, hidden: Tensor, inputs: TokenBatch, place: tuple[Tensor, ...], with_entropy: bool, *loss: Any
    ) -> Any:
        """What `log_probs` gives of the labels at `place`; `loss`: its token_loss and rows."""
        model = self.model
        return self.log_probs(
            model.before_head(hidden[place]),
            model.output_weight,
            model.output_bias,
            inputs.labels[place],
            model.config.vocab_size,
            with_entropy,
            *loss,
        )


def one_document_a_row(rows: Rows) -> bool:
    """Whether plain causal attention is enough: each row one document, padded on the right.

    Pairs and rollouts are so by construction; token rows may be packed. Nothing is looked at, which would stop a
    device's queue, and on a CPU the mask costs nothing (measured at T = 64 to 512, forward and backward).
    """
    return not isinstance(rows, TokenBatch)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logical_name(name: str) -> str:
    """A Scorer's parameter name as everyone outside knows it: "model.norm.weight" -> "norm.weight"."""
    return name.removeprefix("model.")
