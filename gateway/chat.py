"""Render conversations with a checkpoint's own chat template.

Owns the sandbox that templates run in: jinja2's immutable one, with what transformers gives templates (tojson,
raise_exception, strftime_now, loop controls, generation blocks). Knows no tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from collegium.fabric.errors import FailedPrecondition, InvalidArgument


class _GenerationBlock(Extension):
    """{% generation %} marks what the assistant said, for training; rendering gives its contents."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Unfolded(CodeGenerator):
    """Leaves constant expressions to the rendering, which is bounded in time and memory; compiling is not."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class ChatTemplate:
    """One compiled template with the special tokens that it may name."""

    __slots__ = ("_names", "_template")

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # else what is constant is computed now, in the gateway: 9 ** 99999999 takes an hour
            extensions=[_GenerationBlock, loopcontrols],
        )
        environment.code_generator_class = _Unfolded
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise FailedPrecondition(
                f"the checkpoint's chat template cannot be compiled: {error}", remedy="fetch the checkpoint again"
            ) from error
        self._names: dict[str, object] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._names.update(special_tokens)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Give the text of a conversation of (role, content) up to where the assistant speaks.

        InvalidArgument where the template refuses it, such as for a role that it does not know.
        """
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidArgument(
                f"the model's chat template refuses this conversation: {error}",
                field="chat.messages",
                remedy="use the roles and the order that the model was trained on",
                reason="CHAT_TEMPLATE",
            ) from error


def _to_json(value: object, indent: int | None = None) -> str:
    # Not jinja2's own: that one escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
