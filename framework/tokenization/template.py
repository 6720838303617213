"""Chat templates: Jinja as Hugging Face runs it, in a sandbox that cannot change what it is given.

The conventions are those of `transformers` 5 (`utils/chat_template_utils.py`), so a template renders the same text here
and there (tested). Left out: documents, and tracking which characters a `{% generation %}` block wrote; the
data room learns that from prefixes, which works for every template.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from framework.core.errors import DataError, UsageError
from framework.core.records import Message

# Each message is <|role|>content<|end|>, behind the token that every document starts with, so that a model finds in a
# conversation what pretraining taught it of a first position. `generation` tells other libraries what is trained.
DEFAULT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ROLES %}
        {{- raise_exception("no role '" + message['role'] + "'; the roles are " + ROLES | join(', ')) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


def default_template(special_tokens: Sequence[str]) -> str:
    """The template of a tokenizer trained here; its roles are those that have a special token `<|role|>`."""
    known = [role for role in ("system", "user", "assistant", "tool") if f"<|{role}|>" in special_tokens]
    return DEFAULT_TEMPLATE.replace("ROLES", repr(known))


def render(
    template: str, messages: Sequence[Message], generation_prompt: bool, special_tokens: Mapping[str, str]
) -> str:
    """The text of a conversation. `special_tokens` are the names a template may use: bos_token, eos_token, ...

    A template that refuses the conversation (roles that must alternate, say) is a DataError; one that is no Jinja, or
    that reaches for what the sandbox withholds, a UsageError.
    """
    tools, turns = _variables(template, messages)
    words = {"messages": turns, "tools": tools, "add_generation_prompt": generation_prompt, **special_tokens}
    try:
        return _compiled(template).render(words)
    except (_Refused, jinja2.UndefinedError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None
    except Exception as error:  # a template is a program, and raises what programs raise
        raise UsageError(f"the chat template cannot be rendered: {type(error).__name__}: {error}") from None


def _variables(template: str, messages: Sequence[Message]) -> tuple[list[Any] | None, list[dict[str, Any]]]:
    """(tools, messages) as templates know them. Tools that a template would pass over in silence are a DataError."""
    tools = [tool for message in messages if message.role == "tools" for tool in json.loads(message.content)]
    turns = [message for message in messages if message.role != "tools"]
    for name, needed in (("tools", tools), ("tool_calls", any(turn.tool_calls for turn in turns))):
        if needed and not re.search(rf"\b{name}\b", template):
            raise DataError(f"the chat template does not know {name}; give one that does, or samples without")
    return tools or None, [_turn(turn) for turn in turns]


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [{"type": "function", "function": call} for call in json.loads(message.tool_calls)]
    return turn


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` renders its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which is no part of a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
