"""A tokenizer from a Hugging Face folder: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.

The `tokenizers` library does the work and transformers is not imported. Left out: tokenizers that exist only as Python
or SentencePiece files; the error says how to convert them.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from framework.core.errors import DataError, UsageError
from framework.core.places import local
from framework.core.records import Message
from framework.tokenization import template, vocabulary
from framework.tokenization.config import SENTINEL

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class HubTokenizer:
    """A `core.records.Tokenizer`. Special tokens in a text are recognised by `encode`; `decode` leaves them out, so
    that decoded ids read as the text a user would see."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None):
        """`config` is tokenizer_config.json; its `eos_token` must be in the vocabulary. `backend` is taken over."""
        backend.no_truncation()  # some published files carry the limits of one application
        backend.no_padding()
        self._backend = backend
        self._config = config
        self._template = chat_template
        self.end_id = self._id_of("eos_token")
        self.bos_id = self._id_of("bos_token") if _wants_bos(backend, config) else None
        self.mask_id = self._id_of("mask_token") if _content(config.get("mask_token")) else None

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's object; nobody may change it."""
        return self._backend

    def on(self, backend: tokenizers.Tokenizer) -> "HubTokenizer":
        """Another vocabulary under this tokenizer's names, end token and template."""
        return HubTokenizer(backend, self._config, self._template)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def start_id(self) -> int:
        """The pad token, as T5 begins; the end token where none is named."""
        return self._id_of("pad_token") if "pad_token" in self._named_tokens else self.end_id

    @functools.cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """<extra_id_0>, <extra_id_1>, ... as far as there are."""
        found: list[int] = []
        while (index := self._backend.token_to_id(SENTINEL.format(len(found)))) is not None:
            found.append(index)
        return tuple(found)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits over everything that decides ids or rendering."""
        parts = [self._backend.to_str(), self._template, self._named_tokens, self.end_id, self.bos_id]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """As `encode`, on all cores."""
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: b"" for a special token, and for an id without a token."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary spells it: "<|end|>", "Ġthe", "<0xE6>"; for showing, never for joining."""
        return str(self._backend.id_to_token(token_id) or f"<{token_id}>")

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """The conversation as the chat template writes it; with `generation_prompt`, up to where an answer begins."""
        if self._template is None:
            raise UsageError("the tokenizer has no chat template; put a chat_template.jinja beside its tokenizer.json")
        return template.render(self._template, messages, generation_prompt, self._named_tokens)

    def save(self, folder: str) -> None:
        """Write the folder that `load` and transformers.AutoTokenizer read."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(target / "tokenizer.json"))
        config = json.dumps(self._config, indent=2, ensure_ascii=False)
        (target / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
        if self._template is not None:
            (target / "chat_template.jinja").write_text(self._template, encoding="utf-8")

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        return vocabulary.all_token_bytes(self._backend, self.vocab_size)

    @functools.cached_property
    def _named_tokens(self) -> dict[str, str]:
        return {name: token for name in _NAMED_TOKENS if (token := _content(self._config.get(name)))}

    def _id_of(self, name: str) -> int:
        token = _content(self._config.get(name))
        if token is None:
            raise UsageError(f"tokenizer_config.json names no {name}; without it nothing can be ended or begun")
        found = self._backend.token_to_id(token)
        if found is None:
            raise UsageError(f"tokenizer_config.json: {name} '{token}' is not in the vocabulary of tokenizer.json")
        return int(found)


def read_backend(folder: str | Path) -> tokenizers.Tokenizer:
    """What tokenizer.json holds, for whoever needs neither an end token nor a template (BERT's folder names none)."""
    path = local(folder)
    if not path.is_dir():
        raise UsageError(f"no such tokenizer folder: {folder}")
    if not (path / "tokenizer.json").is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{path / 'tokenizer.json'} cannot be read: {error}") from None


def load(folder: str | Path) -> HubTokenizer:
    """The tokenizer of a Hugging Face folder, a model's or a tokenizer's own.

    An encoder's folder (BERT) names neither end nor begin: its [SEP] ends a text and its [CLS] stands in front of one.

    The end token is the one that the chat template writes behind an answer where that is another than `eos_token`
    (base models with a chat template, e.g. Qwen2.5): a model must learn to stop where its conversations do.
    """
    path = local(folder)
    backend = read_backend(folder)
    config = _read_json(path / "tokenizer_config.json")
    chat_template = _chat_template(path, config)
    end = _content(config.get("eos_token")) or _generation_end(path, backend) or _content(config.get("sep_token"))
    begin = {"bos_token": begin} if (begin := config.get("bos_token", config.get("cls_token"))) else {}
    config = {k: v for k, v in config.items() if k != "chat_template"} | {"eos_token": end, **begin}
    loaded = HubTokenizer(backend, config, chat_template)
    end = _answer_end(loaded)
    return loaded if end is None else HubTokenizer(backend, config | {"eos_token": end}, chat_template)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's: a string, or a list of named ones with a "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8: {error}") from None
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = {named["name"]: named["template"] for named in entry}.get("default")
    return entry


def _generation_end(folder: Path, backend: tokenizers.Tokenizer) -> str | None:
    ids = _read_json(folder / "generation_config.json").get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    return None if not isinstance(first, int) else backend.id_to_token(first)


def _answer_end(tokenizer: HubTokenizer) -> str | None:
    """The special token behind an answer, None where it is the end token already or the template cannot tell."""
    asked = [Message("user", "a")]
    try:
        before = tokenizer.render(asked, generation_prompt=True)
        after = tokenizer.render([*asked, Message("assistant", "b")], generation_prompt=False)
    except (DataError, UsageError):
        return None
    tail = tokenizer.encode(after[len(before) :])
    added = tokenizer._backend.get_added_tokens_decoder()
    special = [token for token in tail if token in added and added[token].special]
    return added[special[0]].content if special and tokenizer.end_id not in special else None


def _wants_bos(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> bool:
    """`add_bos_token` where it is said, else what tokenizer.json itself puts in front of a text (Llama 3)."""
    bos = _content(config.get("bos_token"))
    if bos is None or not config.get("add_bos_token", True):
        return False
    return "add_bos_token" in config or backend.encode("a").tokens[:1] == [bos]


def _content(token: Any) -> str | None:
    """A token is written as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
