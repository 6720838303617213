"""Where model and parallelism meet: which style each part of a Scorer gets, and which parts a pipeline stage holds.

The one page that knows both the names of the model's modules and the styles of `parallel/`. A layout that a model does
not fit is refused here by name, before anything is built.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import gcd

import torch
from torch import nn

from framework.core.config import require
from framework.engine.config import EngineConfig
from framework.engine.flops import layer_weights, multiplied_weights
from framework.engine.holdings import Stage
from framework.engine.precision import COMPUTE
from framework.models.config import Architecture, Base, LoraConfig, ModelConfig, Position
from framework.models.layers import Linear
from framework.models.moe import Balance
from framework.models.positions import Alibi
from framework.models.scorer import Scorer
from framework.models.transformer import HEAD_PARTS
from framework.parallel import tensor
from framework.parallel.apply import Plan, apply
from framework.parallel.config import ContextForm, ParallelConfig
from framework.parallel.context import Cut, ExchangeCore, WholeIds
from framework.parallel.heads import check_heads
from framework.parallel.mesh import Mesh
from framework.parallel.pipeline import partition
from framework.parallel.ring import RingCore
from framework.parallel.sequence import CutRows


def check(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world_size: int,
    lora: LoraConfig | None = None,
) -> None:
    """Refuse a layout that the model, an adapter's dropout or strict mode does not fit."""
    sizes = parallel.sizes(world_size)
    for key, size in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
        require(
            size % sizes["tensor"] == 0,
            f"model.{key}={size} is not divisible by parallel.tensor={sizes['tensor']}; "
            f"choose {_divisors(gcd(model.num_heads, model.kv_heads))}",
        )
    if sizes["context"] > 1 and parallel.context_form is ContextForm.EXCHANGE:
        check_heads(model.num_heads // sizes["tensor"], model.kv_heads // sizes["tensor"], sizes["context"])
    sees = f"architecture={model.architecture.value}"
    looks_ahead = model.architecture is not Architecture.CAUSAL
    biased = model.position in (Position.ALIBI, Position.RELATIVE, Position.ROTARY_2D)
    unknown = {
        f"position={model.position.value}": biased,
        "window": model.window > 0,
        sees: looks_ahead,
        "score_cap": model.score_cap > 0,
    }
    for axis, is_set in unknown.items():
        require(
            sizes["context"] == 1 or not is_set,
            f"model.{axis} does not go with parallel.context={sizes['context']}: which knows causal attention within "
            "documents alone; choose parallel=tp, fsdp or pp",
        )
    require(
        sizes["context"] == 1 or not model.scales_by_length,
        f"model.rope_scaling.kind=dynamic does not go with parallel.context={sizes['context']}, whose ranks hold parts "
        "of documents and not how long they are; choose parallel=tp, fsdp or pp",
    )
    _check_experts(model, parallel, engine, sizes["context"])
    stages = sizes["pipeline"] * parallel.stages_per_rank
    for axis, is_set in ((sees, model.encoder is not None), ("position=relative", model.position is Position.RELATIVE)):
        require(
            sizes["pipeline"] == 1 or not is_set,
            f"model.{axis} does not go with parallel.pipeline={sizes['pipeline']}, whose stages would all need its "
            "encoder or its table of positions; choose parallel=fsdp, tp or fsdp_tp",
        )
    require(
        sizes["pipeline"] == 1 or stages <= model.num_layers,
        f"model.num_layers={model.num_layers} cannot be cut into {stages} pipeline stages (parallel.pipeline="
        f"{sizes['pipeline']}, parallel.schedule={parallel.schedule.value}); choose at most "
        f"parallel.pipeline={model.num_layers // parallel.stages_per_rank}",
    )
    if lora is not None and lora.rank:
        _check_adapter(lora, parallel, engine, world_size)
    require(
        not (engine.strict and parallel.cuts_the_model and world_size > 1),
        f"engine.strict=true needs whole rows and matrices, parallel={parallel.name} cuts them; choose parallel=fsdp "
        "or ddp, or rollout.strict=false",
    )


def _check_adapter(lora: LoraConfig, parallel: ParallelConfig, engine: EngineConfig, world_size: int) -> None:
    cut, rank = parallel.cuts_the_model and world_size > 1, lora.rank
    require(
        not engine.strict or rank % 8 == 0,
        f"strict mode needs lora.rank={rank} to be a multiple of 8; choose {-(-rank // 8) * 8}",
    )
    require(
        not (lora.dropout and cut),
        f"lora.dropout={lora.dropout} needs whole rows and matrices, parallel={parallel.name} cuts them; choose "
        "parallel=fsdp, ddp or zero2, or lora.dropout=0",
    )
    require(
        lora.base is Base.FULL or not (cut or parallel.zero or engine.strict),
        f"lora.base={lora.base} needs whole matrices on every rank and engine.strict=false, got parallel="
        f"{parallel.name}; choose parallel=single, ddp or fsdp, which shares out the rest of the model",
    )


def _check_experts(model: ModelConfig, parallel: ParallelConfig, engine: EngineConfig, context: int) -> None:
    moe = model.moe
    require(
        moe.experts == 0 or moe.balance == 0 or context == 1,
        f"model.moe.balance={moe.balance} does not go with parallel.context={context}: the balance of a row needs all "
        "of its places; choose parallel=tp, fsdp or pp, or model.moe.balance=0",
    )
    require(
        moe.experts == 0 or not engine.compile,
        f"engine.compile=true does not go with model.moe.experts={moe.experts}: how many tokens an expert has changes "
        "with every step, and the graphs with it; choose engine.compile=false",
    )


def stages_of(model: ModelConfig, parallel: ParallelConfig, mesh: Mesh) -> list[tuple[int, range]]:
    """(stage, its layers) of each stage that this rank holds. Stages cost what their weights multiply."""
    size = mesh.size("pipeline")
    if size == 1:
        return [(0, range(model.num_layers))]
    stages, head = size * parallel.stages_per_rank, multiplied_weights(model)[1]
    spans = partition([layer_weights(model, layer) for layer in range(model.num_layers)], (0.0, head), stages)
    mine = range(mesh.place("pipeline"), stages, size)
    return [(stage, spans[stage]) for stage in mine]


def lay_out(
    scorer: Scorer, number: int, layers: range, parallel: ParallelConfig, mesh: Mesh, config: EngineConfig
) -> Stage:
    """Make a whole `scorer` the stage that holds `layers`, in place; it stays on the meta device.

    A tied embedding that ends a pipeline as well as it begins it stands at both ends, a head there, and their gradients
    are added up.
    """
    model, aliases = scorer.model, {}
    scorer.ends = layers.stop == model.config.num_layers
    if twice := model.config.tied and scorer.scores_labels and mesh.size("pipeline") > 1:
        aliases = {"model.head.weight": "embedding.weight"} if scorer.ends else {}
        like = model.output_weight
        with torch.device("meta"):
            model.head = Linear(like.shape[1], like.shape[0], bias=False).to(like.dtype)
        model.head.requires_grad_(like.requires_grad)
    parts = apply(
        scorer,
        plan(scorer, layers, parallel, mesh),
        mesh,
        compile=config.compile,
        compute=COMPUTE[config.precision],
        again=parallel.recompute,
    )
    if twice:
        for name in {"model.embedding.weight", "model.head.weight"} & parts.keys():
            first = name.endswith("embedding.weight")
            parts[name] = replace(parts[name], speaks=parts[name].speaks and first, summed_over="pipeline")
    return Stage(number, scorer, parts, aliases)


def plan(scorer: Scorer, layers: range, parallel: ParallelConfig, mesh: Mesh) -> Plan:
    """The plan of the stage that holds `layers` of a whole `scorer`, which must not have been cut yet."""
    config = scorer.model.config
    first, last = layers.start == 0, layers.stop == config.num_layers
    return Plan(
        blocks=[*_encoder_layers(config), *(f"model.layers.{i}" for i in layers)],
        styles=_styles(scorer, layers, first, last) if mesh.size("tensor") > 1 else {},
        exchanged=_exchanged(scorer, layers, last, parallel, mesh),
        dropped=_dropped(scorer, layers, first, last),
    )


def _encoder_layers(config: ModelConfig) -> list[str]:
    """Of an encoder beside a decoder."""
    return [f"model.encoder.layers.{i}" for i in range(config.encoder.num_layers)] if config.encoder else []


def _dropped(scorer: Scorer, layers: range, first: bool, last: bool) -> list[str]:
    """What other stages hold. Absent parts stay absent."""
    names = [f"model.layers.{i}" for i in range(scorer.model.config.num_layers) if i not in layers]
    names += [] if first else [f"model.{name}" for name in _BEGIN]
    ends = ["model.norm", *(f"model.{part}" for part in HEAD_PARTS), "value_head", "pooler", "class_head"]
    return names + ([] if last else ends)


def _styles(scorer: Scorer, layers: range, first: bool, last: bool) -> dict[str, tensor.Style]:
    styles: dict[str, tensor.Style] = {}
    for number in layers:
        named = _LAYER | (_MIXTURE if scorer.model.config.moe.at(number) else {})
        styles |= {f"model.layers.{number}.{name}": style for name, style in named.items()}
    if first:
        styles |= {f"model.{name}": style for name, style in _BEGIN.items()}
        styles |= {
            f"{layer}.{name}": style for layer in _encoder_layers(scorer.model.config) for name, style in _LAYER.items()
        }
        styles |= {"model.encoder.relative": tensor.columns_of_table, "model.encoder.norm": tensor.places}
        styles |= {"model.encoder": tensor.ends_whole}
    if last:
        whole = tensor.ends_whole if scorer.scores_labels else tensor.ends_whole_for_all
        styles |= {"model.norm": tensor.places, "model.head": tensor.columns, "model.head_bias": tensor.columns}
        styles |= {"model": whole, **{f"model.head_transform.{part}": tensor.places for part in ("dense", "norm")}}
    return {path: style for path, style in styles.items() if _find(scorer, path) is not None}


_BEGIN: dict[str, tensor.Style] = {
    "embedding": tensor.vocabulary,
    "position_embedding": tensor.own_places,
    "type_embedding": tensor.own_places,
    "embedding_norm": tensor.places,
    "relative": tensor.columns_of_table,
}
_LAYER: dict[str, tensor.Style] = {
    "attention_norm": tensor.places,
    "attention": tensor.all_places,
    "attention.q": tensor.columns,
    "attention.k": tensor.columns,
    "attention.v": tensor.columns,
    "attention.o": tensor.rows,
    "attention.q_norm": tensor.places,
    "attention.k_norm": tensor.places,
    "attention_out_norm": tensor.places,
    "cross_norm": tensor.places,
    "cross": tensor.all_places,
    **{f"cross.{x}": tensor.columns for x in "qkv"},
    "cross.o": tensor.rows,
    "cross.q_norm": tensor.places,
    "cross.k_norm": tensor.places,
    "mlp_out_norm": tensor.places,
    "mlp_norm": tensor.places,
    "mlp": tensor.all_places,
    "mlp.gate": tensor.columns,
    "mlp.up": tensor.columns,
    "mlp.down": tensor.rows,
}


_MIXTURE: dict[str, tensor.Style] = {  # all of it makes one summand
    "mlp": tensor.all_places_to_own,
    "mlp.router": tensor.places,
    "mlp.experts.gate": tensor.stacked_columns,
    "mlp.experts.up": tensor.stacked_columns,
    "mlp.experts.down": tensor.stacked_rows,
    "mlp.shared_gate": tensor.places,
    "mlp.shared.gate": tensor.columns,
    "mlp.shared.up": tensor.columns,
    "mlp.shared.down": tensor.summand_rows,
}


def _exchanged(
    scorer: Scorer, layers: range, last: bool, parallel: ParallelConfig, mesh: Mesh
) -> dict[str, Callable[[], nn.Module]]:
    """Parameterless parts that work over ranks."""
    tensors, contexts = mesh.ranks("tensor"), mesh.ranks("context")
    parts: dict[str, Callable[[], nn.Module]] = {}
    if tensors.size > 1 and last and scorer.scores_labels:
        vocab = scorer.model.config.vocab_size
        parts["log_probs"] = partial(tensor.VocabularyLogProbs, scorer.log_probs.temperature, vocab, tensors)
    if tensors.size > 1 and scorer.model.alibi is not None:
        heads = scorer.model.config.num_heads
        parts["model.alibi"] = partial(Alibi, heads, *tensor.span(heads, tensors))
    if tensors.rank > 0:  # all of them route alike, and their gradients add up
        mixtures = [i for i in layers if scorer.model.config.moe.at(i)]
        parts |= {f"model.layers.{i}.mlp.balance": partial(Balance, 0.0) for i in mixtures}
    if tensors.size * contexts.size == 1:
        return parts
    cutter = Cut(contexts)
    parts["sequence"] = partial(CutRows, tensors.size * 2 * contexts.size, cutter)
    if contexts.size > 1:
        core = RingCore if parallel.context_form is ContextForm.RING else ExchangeCore
        parts["model.mask"] = partial(WholeIds, cutter)
        parts |= {f"model.layers.{i}.attention.core": partial(core, cutter) for i in layers}
    return parts


def _find(scorer: Scorer, path: str) -> nn.Module | None:
    """The module at `path`, None where the model has none there."""
    part: nn.Module | None = scorer
    for leaf in path.split("."):
        part = None if part is None else part._modules.get(leaf)
    return part


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
