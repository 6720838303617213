"""What a family is: its names in transformers, the table of its tensors and the settings of its config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from framework.models.config import ModelConfig
from framework.models.families.settings import Setting, read_all, write_all
from framework.models.families.tensors import Entry, Place, Shape, pieces

HEADS = (Entry("lm_head", ("head",)), Entry("score", ("class_head",)))


@dataclass(frozen=True)
class Family:
    """One kind of model folder. `model_type` is config.json's word, and the word of `model.family`."""

    model_type: str
    name: str  # "Llama", of LlamaForCausalLM and LlamaForSequenceClassification
    prefix: str  # of every tensor but the heads'; some published files leave it out
    table: Sequence[Entry]
    settings: Sequence[Setting]
    causal: str = "{}ForCausalLM"
    heads: Sequence[Entry] = HEADS
    derived: tuple[str, ...] = ()  # ends of names of tensors that are computed here, or of no use
    renamed: Mapping[str, str] = field(default_factory=dict)  # ends of names in older files -> today's
    covers: str = ""  # the published models that it holds

    def pieces(self, shapes: Mapping[str, Shape], heads: int) -> dict[str, Place]:
        """Where each of our parameters lies in their tensors."""
        return pieces((*self.table, *self.heads), shapes, heads)

    @property
    def class_head(self) -> str:
        """Their module that gives classes."""
        return next(entry.theirs for entry in self.heads if entry.ours == ("class_head",))

    def canonical(self, name: str) -> str:
        """Their name as transformers writes it: the prefix is left out by some published files."""
        for old, new in self.renamed.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        is_head = any(name.startswith(f"{entry.theirs}.") for entry in self.heads)
        return name if is_head or name.startswith(self.prefix) else self.prefix + name

    def is_derived(self, name: str) -> bool:
        """Whether a checkpoint stores under `name` what is computed here (rotary frequencies, triangles of ones)."""
        return bool(self.derived) and name.endswith(self.derived)

    def config_from(self, theirs: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig, with transformers' defaults for absent keys; UsageError for what we lack."""
        return read_all(self.settings, theirs, self.model_type)

    def config_to(self, config: ModelConfig, classes: int = 0) -> dict[str, Any]:
        """ModelConfig -> config.json, of the causal model or, where `classes` > 0, of the classifier."""
        kind = "{}ForSequenceClassification" if classes else self.causal
        theirs: dict[str, Any] = {"architectures": [kind.format(self.name)], "model_type": self.model_type}
        # Said, for what is not said has their default: GLM's 151329, with which a smaller vocabulary would not be read.
        theirs["pad_token_id"] = None
        theirs |= write_all(self.settings, config, self.name)
        if classes:
            theirs |= {"id2label": {str(i): f"LABEL_{i}" for i in range(classes)}}
            theirs |= {"label2id": {f"LABEL_{i}": i for i in range(classes)}}
        return theirs
