"""Templates render as transformers renders them, errors included, and cannot reach out of the sandbox."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from framework.core.errors import DataError, UsageError
from framework.core.records import Message
from framework.tokenization.template import render

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
LOOPS = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m | tojson }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{{ undefined_name }}{% if tools is defined and tools %}tools{% endif %}"
)
CHAT = [Message("user", ' <b>é & "q"</b>\n'), Message("assistant", "好"), Message("user", "{{ 7 * 7 }}")]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", [CHATML, LLAMA2, LOOPS], ids=["chatml", "llama2", "loops"])
@pytest.mark.parametrize("prompt", [False, True])
def test_equal_to_transformers(template: str, prompt: bool) -> None:
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    texts, _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=prompt, **TOKENS)
    assert render(template, CHAT, prompt, TOKENS) == texts[0]


def test_by_hand() -> None:
    assert render(LLAMA2, CHAT[:2], False, TOKENS) == '<s>[INST] <b>é & "q"</b> [/INST] 好</s>'


def test_a_template_that_refuses_blames_the_data() -> None:
    with pytest.raises(DataError, match="the chat template refuses this conversation: roles must alternate"):
        render(LLAMA2, CHAT[1:], False, TOKENS)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 + 'a' }}"]
)
def test_broken_or_reaching_templates_are_refused(template: str) -> None:
    with pytest.raises(UsageError, match="chat template"):
        render(template, CHAT, False, TOKENS)


TOOLS = (
    "{% if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}{% endfor %}"
)
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"x": "長"}}}


def test_tools_and_calls_render_as_transformers_renders_them() -> None:
    call = {"name": "f", "arguments": {"x": 1, "y": ["é"]}}
    chat = [
        Message("tools", json.dumps([FUNCTION])),
        Message("user", "q"),
        Message("assistant", "", json.dumps([call])),
        Message("tool", "2"),
    ]
    theirs = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "2"},
    ]
    texts, _ = render_jinja_template([theirs], tools=[FUNCTION], chat_template=TOOLS, **TOKENS)
    assert render(TOOLS, chat, False, TOKENS) == texts[0]
    assert texts[0].count("<call>f") == 1


def test_tools_that_a_template_would_pass_over_are_refused() -> None:
    with pytest.raises(DataError, match="the chat template does not know tools; give one that does"):
        render(CHATML, [Message("tools", json.dumps([FUNCTION])), *CHAT], False, TOKENS)
    with pytest.raises(DataError, match="the chat template does not know tool_calls"):
        render(CHATML, [*CHAT, Message("assistant", "", '[{"name": "f", "arguments": {}}]')], False, TOKENS)
