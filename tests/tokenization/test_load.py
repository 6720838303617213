"""Loading published folders: where the end token, the start token and the template come from, and clear refusals."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

from framework.core.errors import UsageError
from framework.core.records import Message
from framework.tokenization.load import load

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def folder(path: Path, config: dict[str, Any] | None = None, template: str | None = None, bos: bool = False) -> Path:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.enable_truncation(2)
    made.enable_padding(length=9)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


EOS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_limits_of_an_application_are_dropped(tmp_path: Path) -> None:
    loaded = load(folder(tmp_path, EOS))
    assert loaded.encode("a a a a") == [0, 0, 0, 0]
    assert loaded.encode_many(["a", "a a a"]) == [[0], [0, 0, 0]]
    assert loaded.vocab_size == 6


def test_the_end_token_of_a_config_of_a_generation_config_and_of_a_template(tmp_path: Path) -> None:
    assert load(folder(tmp_path, EOS)).end_id == 3
    assert load(folder(tmp_path, {"eos_token": {"content": "<s>", "special": True}})).end_id == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    assert load(folder(tmp_path, {})).end_id == 5
    assert load(folder(tmp_path, EOS)).end_id == 3
    assert load(folder(tmp_path, EOS, CHATML)).end_id == 5, "answers end with <|im_end|>, not with </s>"
    assert load(folder(tmp_path, EOS, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")).end_id == 3


def test_saving_keeps_the_end_token_that_was_found(tmp_path: Path) -> None:
    loaded = load(folder(tmp_path, {**EOS, "model_max_length": 77}, CHATML))
    loaded.save(str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert saved == {**EOS, "model_max_length": 77, "eos_token": "<|im_end|>"}
    assert load(tmp_path / "out").fingerprint == loaded.fingerprint


def test_a_start_token_only_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    assert load(folder(tmp_path, EOS)).bos_id is None
    assert load(folder(tmp_path, EOS, bos=True)).bos_id == 2
    assert load(folder(tmp_path, {**EOS, "add_bos_token": True})).bos_id == 2
    assert load(folder(tmp_path, {**EOS, "add_bos_token": False}, bos=True)).bos_id is None
    assert load(folder(tmp_path, {"eos_token": "</s>"}, bos=True)).bos_id is None


def test_the_template_of_a_file_wins_over_the_configs(tmp_path: Path) -> None:
    messages = [Message("user", "x")]
    config = {**EOS, "chat_template": "{{ bos_token }}config"}
    assert load(folder(tmp_path, config)).render(messages, True) == "<s>config"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert load(folder(tmp_path, {**EOS, "chat_template": named})).render(messages, True) == "d"
    assert load(folder(tmp_path, config, "file")).render(messages, True) == "file"


def test_the_fingerprint_sees_ids_and_template(tmp_path: Path) -> None:
    plain = load(folder(tmp_path, EOS)).fingerprint
    assert load(folder(tmp_path, EOS)).fingerprint == plain
    assert load(folder(tmp_path, {**EOS, "eos_token": "<s>"})).fingerprint != plain
    assert load(folder(tmp_path, EOS, "other")).fingerprint != plain


def test_it_travels_to_other_processes(tmp_path: Path) -> None:
    loaded = load(folder(tmp_path, EOS, CHATML))
    loaded.render([Message("user", "x")], True)
    again = pickle.loads(pickle.dumps(loaded))
    assert (again.fingerprint, again.encode("a </s>")) == (loaded.fingerprint, [0, 3])


def test_refusals_say_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such tokenizer folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has no tokenizer\.json; write one with transformers"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"names no eos_token"):
        load(folder(tmp_path, {}))
    with pytest.raises(UsageError, match=r"eos_token '<x>' is not in the vocabulary"):
        load(folder(tmp_path, {"eos_token": "<x>"}))
    with pytest.raises(UsageError, match=r"has no chat template; put a chat_template\.jinja"):
        load(folder(tmp_path, EOS)).render([Message("user", "x")], True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be read"):
        load(tmp_path)
