"""Encoders: BERT's pieces beside transformers' own, what the published files hold, and what an encoder cannot do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.core.errors import UsageError
from framework.core.records import TokenBatch
from framework.generation.config import GenerationConfig
from framework.generation.native import NativeGenerator
from framework.models import hub
from framework.models.config import Activation, Architecture, ModelConfig
from framework.models.families.bert import BERT
from framework.models.init import head_shapes
from framework.models.scorer import Scorer
from framework.models.transformer import Transformer
from tests.models.drawn import tokens
from tests.models.exact import InFp64
from tests.models.test_families import drawn, gap

_SIZES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 42, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def their(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return drawn(getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**_SIZES, **settings))).double()


def rows(lengths: list[int], width: int = 11) -> TokenBatch:
    """Rows of one document each, padded on the right, the second half of each of type 1. The pad id, 0, stands in no
    text: its row learns nothing there."""
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    x, places = tokens(len(lengths), width).clamp(min=1) * mask, torch.arange(width) * mask
    types = (places > 5).long()
    return TokenBatch(x, x, mask, places, mask.long(), token_types=types)


def test_types_of_tokens_equal_theirs(tmp_path: Path) -> None:
    theirs, batch = their("MaskedLM"), rows([11, 7, 3])
    theirs.save_pretrained(tmp_path)
    ours = hub.load(tmp_path)
    a = ours.logits(ours(batch.tokens, document_ids=batch.document_ids, token_types=batch.token_types))
    b = theirs(batch.tokens, attention_mask=batch.document_ids, token_type_ids=batch.token_types).logits
    assert gap(a[batch.loss_mask], b[batch.loss_mask]) <= 1e-10
    plain = ours.logits(ours(batch.tokens, document_ids=batch.document_ids))
    assert gap(plain[batch.loss_mask], b[batch.loss_mask]) > 1e-2


def test_log_probs_of_hidden_tokens_equal_theirs(tmp_path: Path) -> None:
    """The Scorer's way, which keeps no logits: transform, tied matrix, bias."""
    theirs, batch = their("MaskedLM"), rows([11, 7, 3])
    theirs.save_pretrained(tmp_path)
    ours = Scorer(hub.load(tmp_path))(batch).log_probs
    logits = theirs(batch.tokens, attention_mask=batch.document_ids, token_type_ids=batch.token_types).logits
    expected = logits.log_softmax(-1).gather(2, batch.labels.unsqueeze(2)).squeeze(2)
    assert gap(ours[batch.loss_mask], expected[batch.loss_mask]) <= 1e-10


def scorer_of(folder: Path, classes: int) -> Scorer:
    """The classifier of a folder."""
    config, read, shapes = hub.read_folder(folder)
    with torch.device("meta"):
        scorer = Scorer(Transformer(config), num_classes=classes)
    parameters = {name.removeprefix("model."): name for name, _ in scorer.named_parameters()}
    assert parameters.keys() == shapes.keys()
    state = {parameters[name]: read(name, tuple((0, n) for n in shape)) for name, shape in shapes.items()}
    scorer.load_state_dict(state, assign=True)
    return scorer


def test_a_classifier_equals_theirs_logits_and_gradients(tmp_path: Path) -> None:
    """Pooler, class head and its bias, both ways through a folder."""
    with InFp64():
        theirs, batch = their("SequenceClassification", num_labels=3), rows([11, 7, 3])
        theirs.save_pretrained(tmp_path / "theirs")
        ours = scorer_of(tmp_path / "theirs", 3)
        a: Tensor = ours(batch).classes
        b = theirs(batch.tokens, attention_mask=batch.document_ids, token_type_ids=batch.token_types).logits
        assert gap(a, b) <= 1e-10
        weights = torch.randn(b.shape, generator=torch.Generator().manual_seed(3)).double()
        (a * weights).sum().backward()
        (b * weights).sum().backward()
    config = ours.model.config
    named = {name.removeprefix("model."): p for name, p in ours.named_parameters()}
    pieces = BERT.pieces({name: tuple(p.shape) for name, p in named.items()}, config.num_heads)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert {piece.theirs for piece in pieces.values()} == expected.keys()
    for name, parameter in named.items():
        assert gap(parameter.grad, expected[pieces[name].theirs], 1e-3) <= 1e-9, name  # type: ignore[arg-type]
    hub.save_weights(config, named.items(), tmp_path / "ours", classes=3)
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    back, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert back.config.num_labels == 3


def test_the_published_file_of_pretraining_is_read_with_its_pooler(tmp_path: Path) -> None:
    """Old names of norms, the tied matrix stored twice, a head for pairs of sentences."""
    theirs = their("PreTraining")
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in stored.items():
        end = next((end for end in old if name.endswith(end)), "")
        renamed[name.removesuffix(end) + old.get(end, "")] = tensor
    renamed["cls.predictions.decoder.weight"] = stored["bert.embeddings.word_embeddings.weight"].clone()
    renamed["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"].clone()
    assert "cls.seq_relationship.weight" in renamed
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, x = hub.load(tmp_path), tokens(2, 9)
    assert gap(ours.logits(ours(x)), theirs(x).prediction_logits) <= 1e-10
    _, read, shapes = hub.read_folder(tmp_path)
    assert {"pooler.weight", "pooler.bias"} <= shapes.keys()
    assert not any(name.startswith("class_head") for name in shapes)
    assert torch.equal(read("pooler.bias", ((0, 24),)), stored["bert.pooler.dense.bias"])


def test_the_shapes_of_a_head_are_the_scorer_s() -> None:
    for architecture in Architecture:
        config = ModelConfig(architecture, vocab_size=37, hidden_size=24, num_heads=3, num_layers=1)
        with torch.device("meta"):
            scorer = Scorer(Transformer(config), num_classes=5)
        heads = {n: tuple(p.shape) for n, p in scorer.named_parameters() if not n.startswith("model.")}
        assert heads == head_shapes(config, 5)


def test_an_encoder_writes_no_text() -> None:
    config = ModelConfig(Architecture.ENCODER, vocab_size=37, num_layers=1)
    with pytest.raises(UsageError, match="architecture=encoder, position=rotary writes no text"):
        NativeGenerator(config, GenerationConfig(), (0,))


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ({"window": 4}, r"model\.window goes with model\.architecture=causal alone, got encoder"),
        ({"head_transform": True}, r"model\.head_transform=true goes with .* an activation without a gate"),
    ],
)
def test_what_an_encoder_cannot_have_is_refused(axes: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        ModelConfig(Architecture.ENCODER, vocab_size=37, **axes)


def test_a_transform_before_the_logits_is_an_encoder_s() -> None:
    with pytest.raises(UsageError, match=r"goes with model\.architecture=encoder"):
        ModelConfig(vocab_size=37, head_transform=True, activation=Activation.GELU)
