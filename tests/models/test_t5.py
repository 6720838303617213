"""T5 against transformers: logits, every gradient, padding, packing, decoding, folders both ways, buckets, refusals."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.t5 import modeling_t5

from framework.core.errors import UsageError
from framework.models import hub
from framework.models.config import Activation, Architecture, ModelConfig, NormPlace, Position
from framework.models.families.t5 import FAMILY
from framework.models.kv_cache import KVCache
from framework.models.positions import relative_buckets
from framework.models.presets import preset
from framework.models.transformer import Transformer
from tests.models.drawn import tokens
from tests.models.exact import InFp64
from tests.models.test_families import drawn, gap

_SIZES: dict[str, Any] = {
    "vocab_size": 37, "d_model": 24, "d_kv": 6, "d_ff": 42, "num_layers": 2, "num_heads": 3, "pad_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 13,
}  # fmt: skip
CASES = {
    "1.0": {},
    "1.1, a deeper decoder": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    "gated silu": {"feed_forward_proj": "gated-silu"},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@dataclass(frozen=True)
class Texts:
    """What is read, padded on the left and on the right, and what is written."""

    read: Tensor = field(default_factory=lambda: tokens(4, 19).clamp(min=1))
    written: Tensor = field(default_factory=lambda: tokens(4, 8, seed=5).clamp(min=1))

    @property
    def mask(self) -> Tensor:
        places = torch.arange(19)
        first, end = torch.tensor([[0], [7], [0], [2]]), torch.tensor([[19], [19], [11], [15]])
        return ((places >= first) & (places < end)).long()


def their(case: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return drawn(transformers.T5ForConditionalGeneration(transformers.T5Config(**_SIZES, **case)))


def hold(ours: Transformer, theirs: Any, tolerance: float) -> None:
    texts = Texts()
    a = ours.logits(ours(texts.written, encoder_tokens=texts.read, encoder_document_ids=texts.mask))
    b = theirs(texts.read, attention_mask=texts.mask, decoder_input_ids=texts.written).logits
    assert gap(a, b) <= tolerance
    assert b.std() > 0.1
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(3)).to(a.dtype)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    places = FAMILY.pieces({name: tuple(p.shape) for name, p in ours.named_parameters()}, 3)
    found = dict(hub.joined(gradients.items(), places.__getitem__))  # type: ignore[arg-type]
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    rms = float(torch.cat([g.flatten() for g in expected.values()]).pow(2).mean().sqrt())
    for name, gradient in expected.items():
        assert gap(found[name], gradient, rms) <= tolerance, name


@cases
def test_logits_and_every_gradient_in_fp32(case: dict[str, Any], tmp_path: Path) -> None:
    theirs = their(case)
    theirs.save_pretrained(tmp_path)
    hold(hub.load(tmp_path), theirs, 1e-5)


@cases
def test_logits_and_every_gradient_in_fp64(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the buckets are those of fp32 logarithms, whatever computes
    theirs_of = modeling_t5.T5Attention._relative_position_bucket
    table = {both: theirs_of(torch.arange(-40, 41), both, 8, 13) for both in (True, False)}
    monkeypatch.setattr(
        modeling_t5.T5Attention,
        "_relative_position_bucket",
        staticmethod(lambda x, bidirectional, num_buckets, max_distance: table[bidirectional][x + 40]),
    )
    with InFp64():
        theirs = their(case).double()
        theirs.save_pretrained(tmp_path)
        ours = hub.load(tmp_path)
        assert next(ours.parameters()).dtype == torch.float64
        hold(ours, theirs, 1e-10)


@cases
def test_a_folder_comes_back_equal_in_names_types_and_bits(case: dict[str, Any], tmp_path: Path) -> None:
    theirs = their(case).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    hub.save(hub.load(tmp_path / "theirs"), tmp_path / "ours")
    before: dict[str, Tensor] = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    loaded: Any = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    back, info = loaded
    assert not any(info.values()), info
    texts, first = Texts(), transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        a, b = (model.eval()(texts.read, decoder_input_ids=texts.written).logits for model in (back, first))
    assert torch.equal(a, b)


def test_a_head_apart_is_read_as_published(tmp_path: Path) -> None:
    """T5 1.1 as it lies on the hub: `tie_word_embeddings` false, a head of its own, no scale."""
    theirs = their({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(37, 24, generator=torch.Generator().manual_seed(1)))
    config = FAMILY.config_from({**_SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
    assert not config.tied
    assert not config.scaled_head
    named = dict(theirs.named_parameters())
    places = FAMILY.pieces(hub.parameter_shapes(config), 3)
    weights = [(name, named[place.theirs]) for name, place in places.items()]  # type: ignore[union-attr]
    hub.save_weights(config, weights, tmp_path)
    ours, texts = hub.load(tmp_path), Texts()
    a = ours.logits(ours(texts.written, encoder_tokens=texts.read))
    assert gap(a, theirs(texts.read, decoder_input_ids=texts.written).logits) <= 1e-5


def test_packed_pairs_equal_theirs_alone(tmp_path: Path) -> None:
    """Two texts to read and two to write in one row each: the second is written from the second alone."""
    theirs = their({})
    theirs.save_pretrained(tmp_path)
    ours, read, written = hub.load(tmp_path), tokens(1, 14), tokens(1, 10, seed=5)
    reading = torch.tensor([[1] * 8 + [2] * 5 + [0]])
    writing = torch.tensor([[1] * 3 + [2] * 5 + [0] * 2])
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0]])
    with torch.no_grad():
        states = ours(
            written, positions=places, document_ids=writing, encoder_tokens=read, encoder_document_ids=reading
        )
        first = theirs(read[:, :8], decoder_input_ids=written[:, :3]).logits
        second = theirs(read[:, 8:13], decoder_input_ids=written[:, 3:8]).logits
    assert gap(ours.logits(states)[:, :8], torch.cat((first, second), 1)) <= 1e-5
    assert torch.isfinite(states).all()


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_decoding_from_a_cache_equals_the_full_forward(
    case: dict[str, Any], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    """The encoder reads once, and from then on the cache keeps what cross attention needs. Three slots for eight rows
    of drawn lengths; a slot that falls free takes the next row, in front of what it held before."""
    their(case).save_pretrained(tmp_path)
    ours, draw = hub.load(tmp_path, dtype), torch.Generator().manual_seed(7)
    read, written = tokens(8, 19).clamp(min=1), tokens(8, 9, seed=5)
    reads, writes = (torch.randint(1, top + 1, (8,), generator=draw).tolist() for top in (19, 9))
    real = (torch.arange(19) < torch.tensor(reads).unsqueeze(1)).long()
    with torch.no_grad():
        whole = ours.logits(ours(written, encoder_tokens=read, encoder_document_ids=real))
        cache, waiting, holds = KVCache(ours.config, 3, 9, dtype, source_length=19), list(range(8)), dict[int, int]()
        found, at = torch.zeros_like(whole), [0] * 8
        while waiting or holds:
            free = [slot for slot in range(3) if slot not in holds][: len(waiting)]
            fresh = {slot: waiting.pop(0) for slot in free}
            olds, holds = holds, holds | fresh
            for group in (fresh, olds):
                rows = list(group.values())
                if not rows:
                    continue
                longest = max(reads[row] for row in rows)
                given = {"encoder_tokens": read[rows, :longest], "encoder_document_ids": real[rows, :longest]}
                places = torch.tensor([[at[row]] for row in rows])
                x = written[rows].gather(1, places)
                view = cache.view(torch.tensor(list(group)), int(places.max()) + 1)
                states = ours(x, positions=places, cache=view, **(given if group is fresh else {}))
                found[rows, places[:, 0]] = ours.logits(states[:, 0])
                for row in rows:
                    at[row] += 1
            holds = {slot: row for slot, row in holds.items() if at[row] < writes[row]}
    mask = torch.arange(9) < torch.tensor(writes).unsqueeze(1)
    assert len(set(writes)) > 3
    assert gap(found[mask], whole[mask]) <= tolerance


def test_a_cache_has_room_for_what_is_read_where_something_is(tmp_path: Path) -> None:
    their({}).save_pretrained(tmp_path)
    ours = hub.load(tmp_path)
    with pytest.raises(UsageError, match=r"source_length=0 does not go with model\.architecture=encoder_decoder"):
        KVCache(ours.config, 1, 8)
    with pytest.raises(UsageError, match=r"source_length=4 does not go with model\.architecture=causal"):
        KVCache(ModelConfig(), 1, 8, source_length=4)
    with pytest.raises(UsageError, match="an encoder read 5 places, the cache has room for 4"):
        ours(tokens(1, 1), encoder_tokens=tokens(1, 5), cache=KVCache(ours.config, 1, 8, source_length=4).view())


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 13), (64, 500)])
def test_buckets_are_those_of_transformers(both_ways: bool, buckets: int, farthest: int) -> None:
    distances = torch.arange(-5000, 5001)
    theirs = modeling_t5.T5Attention._relative_position_bucket(distances, both_ways, buckets, farthest)
    assert torch.equal(relative_buckets(distances, buckets, farthest, both_ways), theirs)


def test_buckets_by_hand() -> None:
    """Eight behind a query: four of one distance; d in 4 + floor(4 log(d / 4) / log(13 / 4)), at most 7."""
    behind = relative_buckets(-torch.arange(15), 8, 13, False)
    assert behind.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7, 7]
    assert relative_buckets(torch.tensor([1, 5]), 8, 13, False).tolist() == [0, 0]  # ahead: as at 0
    assert relative_buckets(torch.tensor([-1, 0, 1]), 8, 13, True).tolist() == [1, 0, 5]


@pytest.mark.parametrize(
    ("name", "count"), [("t5-small", 60_506_624), ("t5-base", 222_903_552), ("t5-v1_1-small", 76_961_152)]
)
def test_published_sizes(name: str, count: int) -> None:
    assert sum(torch.Size(shape).numel() for shape in hub.parameter_shapes(preset(name)).values()) == count


def test_a_model_that_reads_needs_something_to_read(tmp_path: Path) -> None:
    their({}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="needs encoder_tokens"):
        hub.load(tmp_path)(tokens(1, 3))
    with pytest.raises(UsageError, match="has no encoder"):
        Transformer(ModelConfig(vocab_size=37)).encode(tokens(1, 3))


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        ({"norm_place": NormPlace.POST}, r"model\.norm_place=post does not go with"),
        ({"position": Position.LEARNED}, r"model\.position=learned does not go with"),
        ({"relative_buckets": 6}, r"model\.relative_buckets=6 must be a multiple of 4"),
        ({"relative_distance": 16}, r"model\.relative_distance=16 must be more than half"),
        ({"window": 3}, r"model\.window goes with model\.architecture=causal"),
    ],
)
def test_what_does_not_go_together_is_refused(axes: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        ModelConfig(Architecture.ENCODER_DECODER, vocab_size=37, **axes)


def test_an_activation_that_is_not_theirs_is_refused_in_their_layout() -> None:
    config = preset("t5-small")
    assert FAMILY.config_from(FAMILY.config_to(config)).explicit() == config.explicit()
    with pytest.raises(UsageError, match=r"cannot hold model\.activation=gelu"):
        FAMILY.config_to(replace(config, activation=Activation.GELU))
