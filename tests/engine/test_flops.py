"""FLOPs against torch's own counter, against a count by brute force, and against numbers worked by hand."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from framework.core.records import TokenBatch
from framework.engine.config import EngineConfig
from framework.engine.flops import Work, forward_flops, multiplied_weights, training_work, utilisation
from framework.models.config import Activation, ModelConfig
from framework.models.init import parameter_shapes
from framework.models.transformer import Transformer
from tests.engine.cases import TIED, UNTIED, WIDTH, build, language_loss, packed, rollout

GELU = ModelConfig(vocab_size=40, hidden_size=32, num_layers=3, num_heads=4, tied=False, activation=Activation.GELU)


@pytest.mark.parametrize("config", [TIED, UNTIED, GELU], ids=["tied", "untied", "gelu"])
def test_multiplied_weights_are_the_matrices_of_the_model(config: ModelConfig) -> None:
    shapes = parameter_shapes(config)
    matrices = {n: s[0] * s[1] for n, s in shapes.items() if n.startswith("layers") and len(s) == 2}
    assert multiplied_weights(config) == (sum(matrices.values()), config.vocab_size * config.hidden_size)


@pytest.mark.parametrize("config", [TIED, GELU], ids=["grouped heads", "gelu"])
def test_torch_counts_the_same_where_every_key_is_seen(config: ModelConfig) -> None:
    """In strict mode attention is plain products over all T keys, which torch can count one by one; so here every label
    counts, and the (T+1)/2 keys that a causal query sees on average are taken back to T."""
    ones = torch.ones(2, WIDTH, dtype=torch.long)
    rows = TokenBatch(ones, ones, ones > 0, torch.arange(WIDTH).repeat(2, 1), ones)
    engine = build(model=config, config=EngineConfig(strict=True))
    with FlopCounterMode(display=False) as counter:
        engine.forward_backward(rows, language_loss)
    unseen = 2 * WIDTH * (WIDTH - 1) // 2
    attention = 12 * config.num_layers * config.num_heads * config.head_size
    assert counter.get_total_flops() == training_work(config, rows).exact + attention * unseen


@pytest.mark.parametrize("config", [TIED, GELU], ids=["grouped heads", "gelu"])
def test_a_way_forward_is_what_torch_counts_where_every_key_is_seen(config: ModelConfig) -> None:
    model = Transformer(config, strict=True)
    tokens = torch.ones(1, WIDTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    assert counter.get_total_flops() == WIDTH * forward_flops(config, keys=WIDTH)
    assert forward_flops(config) == 2 * sum(multiplied_weights(config))


def test_a_window_lets_fewer_keys_through() -> None:
    """By hand: 3 layers, 4 heads of 8; the last two see 5 keys of 9: 4 x 32 x (9 + 5 + 5) more than the weights."""
    config = replace(GELU, window=5, window_from=1)
    assert forward_flops(config, 9) - forward_flops(config) == 4 * 32 * 19
    assert forward_flops(config, 4) - forward_flops(config) == 4 * 32 * 12


def test_packed_rows_by_brute_force() -> None:
    rows = packed(3)
    ids = rows.document_ids
    keys = sum(int(ids[b, k] == ids[b, q] > 0) for b in range(3) for q in range(WIDTH) for k in range(q + 1))
    layers, head = multiplied_weights(TIED)
    work = training_work(TIED, rows)
    assert work.tokens == 39
    assert work.parameters == 6 * (layers + head) * 39
    expected = 6 * (layers * 39 + head * int(rows.loss_mask.sum())) + 12 * 2 * 3 * 8 * keys
    assert work.exact == expected


def test_a_critic_has_no_output_head() -> None:
    rows = rollout(2)
    layers, _ = multiplied_weights(TIED)
    assert training_work(TIED, rows, scores_labels=False).parameters == 6 * layers * int(rows.token_mask.sum())


def test_work_adds_up_and_utilisation_is_a_share() -> None:
    assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)
    assert utilisation(flops=5e12, seconds=2.0, peak_flops=1e13) == 0.25
