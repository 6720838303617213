"""A whole model folder for an extended vocabulary: embedding and untied head grown, every other weight bit for bit.

Left out: training the new rows; that is what comes next (`framework pretrain init_from=...`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from framework.core.errors import FrameworkError
from framework.core.places import local
from framework.core.records import ReadBox, Tokenizer, whole
from framework.models.hub import read_folder, save_weights
from framework.models.vocabulary import resized

_ROWS = ("embedding.weight", "head.weight", "head_bias.bias")  # one row a token
SubPieces = Mapping[int, Sequence[int]]


def grow(source: str, folder: Path, tokenizer: Tokenizer, sub_pieces: SubPieces) -> str:
    """Write the model of `source` into `folder` with rows for the new ids, and say so in a line.

    A folder without a model, and a model that cannot be grown (a family that is not ours, a classifier), are told in
    that line, and nothing is written: the tokenizer is extended all the same.
    """
    if not (local(source) / "config.json").is_file():
        return f"{source} holds a tokenizer alone: no model was resized"
    try:
        config, read, shapes = read_folder(source)
    except FrameworkError as error:
        return f"the model was not resized: {error}"
    if any(name.startswith(("class_head", "value_head")) for name in shapes):
        return "the model was not resized: it is a classifier, whose rows are not those of a vocabulary alone"
    if min(sub_pieces) > config.vocab_size:
        return f"the model was not resized: it has {config.vocab_size:,} rows for {min(sub_pieces):,} old tokens"
    size = max(config.vocab_size, *(index + 1 for index in sub_pieces))
    special = {"eos_token_id": tokenizer.end_id, "bos_token_id": tokenizer.bos_id}
    save_weights(replace(config, vocab_size=size), _grown(read, shapes, sub_pieces), folder, extra=special)
    return f"the model was resized from {config.vocab_size:,} to {size:,} rows: {folder}"


def _grown(read: ReadBox, shapes: Mapping[str, Sequence[int]], sub_pieces: SubPieces) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        weight = read(name, whole(shape))
        yield name, resized(weight, sub_pieces) if name in _ROWS else weight
