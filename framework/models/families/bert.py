"""BERT (Devlin et al. 2018): an encoder, norms behind its blocks, a transform before the logits, a pooler for classes.

Left out: predicting whether one text follows another (the published head for it is not read), and untied heads.
"""

from framework.core.registry import register
from framework.models.config import Activation, Architecture, Bias, Norm, NormPlace, Position
from framework.models.families.family import Family
from framework.models.families.settings import GELU_NAMES, Always, Key, Only
from framework.models.families.tensors import Entry

_LAYER = "bert.encoder.layer.{}."
_TABLE = (
    Entry("bert.embeddings.word_embeddings", ("embedding",)),
    Entry("bert.embeddings.position_embeddings", ("position_embedding",)),
    Entry("bert.embeddings.token_type_embeddings", ("type_embedding",)),
    Entry("bert.embeddings.LayerNorm", ("embedding_norm",)),
    *(
        Entry(f"{_LAYER}attention.self.{theirs}", (f"layers.{{}}.attention.{ours}",))
        for ours, theirs in {"q": "query", "k": "key", "v": "value"}.items()
    ),
    Entry(_LAYER + "attention.output.dense", ("layers.{}.attention.o",)),
    Entry(_LAYER + "attention.output.LayerNorm", ("layers.{}.attention_norm",)),
    Entry(_LAYER + "intermediate.dense", ("layers.{}.mlp.up",)),
    Entry(_LAYER + "output.dense", ("layers.{}.mlp.down",)),
    Entry(_LAYER + "output.LayerNorm", ("layers.{}.mlp_norm",)),
)
_HEADS = (
    Entry("cls.predictions.transform.dense", ("head_transform.dense",)),
    Entry("cls.predictions.transform.LayerNorm", ("head_transform.norm",)),
    Entry("cls.predictions", ("head_bias",)),
    Entry("bert.pooler.dense", ("pooler",)),
    Entry("classifier", ("class_head",)),
)
_SETTINGS = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "hidden_size"),
    Key("num_layers", "num_hidden_layers"),
    Key("num_heads", "num_attention_heads"),
    Key("intermediate_size", "intermediate_size"),
    Key("max_positions", "max_position_embeddings", 512),
    Key("token_types", "type_vocab_size", 2),
    Key("norm_eps", "layer_norm_eps", 1e-12),
    Key("init_std", "initializer_range", 0.02),
    Key("activation", "hidden_act", Activation.GELU, GELU_NAMES),
    Only("tie_word_embeddings", True),
    Only("is_decoder", False),
    Only("position_embedding_type", "absolute"),
    Always(
        {
            "architecture": Architecture.ENCODER,
            "position": Position.LEARNED,
            "norm": Norm.LAYER,
            "norm_place": NormPlace.POST,
            "embedding_norm": True,
            "head_transform": True,
            "attention_bias": Bias.ALL,
            "mlp_bias": True,
            "tied": True,
        }
    ),
)

BERT = Family(
    "bert",
    "Bert",
    "bert.",
    _TABLE,
    _SETTINGS,
    causal="{}ForMaskedLM",
    heads=_HEADS,
    # of no use here: the head that told whether texts follow each other, the tied matrix and bias stored twice
    derived=("position_ids", ".seq_relationship.weight", ".seq_relationship.bias", ".predictions.decoder.weight",
             ".predictions.decoder.bias"),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    covers="BERT, base and large, cased and uncased, and what shares its layout (bert-base-chinese)",
)  # fmt: skip
register("family", BERT.model_type)(BERT)
