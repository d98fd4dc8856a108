"""Render conversations with a checkpoint's own chat template.

Owns the sandbox that templates run in, and the names that they find there: those that transformers'
apply_chat_template gives, with the same values. Knows no tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from collegium.fabric.errors import FailedPrecondition, InvalidArgument

# A template may want a system message, refuse one, or look at an earlier answer: one of these suits each.
_PROBES = (
    (("user", "Hello"),),
    (("system", "Be brief."), ("user", "Hello")),
    (("user", "Hello"), ("assistant", "Hello."), ("user", "Who are you?")),
)
# What a template is given for each conversation, beside special tokens.
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_GUARDS = frozenset({"defined", "undefined", "none", "true", "false", "string", "mapping", "sequence", "iterable"})


class _GenerationBlock(Extension):
    """{% generation %} marks what the assistant said, for training; rendering gives its contents."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block as in transformers: what is set inside stays inside.
        return nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller: Macro) -> str:
        return caller()


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _Dict:
    """`dict` for templates: makes dictionaries and has no other attribute."""

    def __call__(self, *args: object, **fields: object) -> dict[object, object]:
        return dict(*args, **fields)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def fromkeys(self, *args: object) -> dict[object, object]:
        return dict.fromkeys(*args)  # pyright: ignore[reportCallIssue, reportArgumentType]


class _Namespace(Namespace):
    """`namespace` for templates: refuses names with an underscore in front."""

    def __init__(*args: object, **fields: object) -> None:
        for name in dict(*args[1:], **fields):  # pyright: ignore[reportCallIssue, reportArgumentType]
            _check_name(name)
        Namespace.__init__(*args, **fields)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class _Unfolded(CodeGenerator):
    """Leaves constant expressions to the rendering, which is bounded in time and memory; compiling is not."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class _Tracking(_Unfolded, meta.TrackingCodeGenerator):
    """As jinja2.meta.find_undeclared_variables, computing no constant."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.optimizer = None


class ChatTemplate:
    """One template with the special tokens that it may name.

    A template that cannot be compiled fails when it is rendered or checked, as one that fails on every conversation.
    """

    __slots__ = ("_fault", "_names", "_template", "undefined_names")

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, fault: str = "") -> None:
        """`fault`: why there is no source, if its file cannot be read."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # else what is constant is computed now, in the gateway: 9 ** 99999999 takes an hour
            extensions=[_GenerationBlock, loopcontrols],
        )
        environment.code_generator_class = _Unfolded
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._names = dict(special_tokens)
        self._template: jinja2.Template | None = None
        self._fault = fault
        self.undefined_names: Sequence[str] = ()
        if fault:
            return
        try:
            self._template = environment.from_string(source)
            known = {*environment.globals, *special_tokens, *_GIVEN}
            self.undefined_names = sorted(_unguarded(environment.parse(source)) - known)
        except Exception as error:  # jinja2's own, and what Python's compiler makes of odd or deep sources
            self._template = None
            self._fault = f"it cannot be compiled: {_described(error)}"

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the text of a conversation of (role, content) up to where the assistant speaks.

        InvalidArgument if the template refuses it, for example for a role that it does not know, or fails on it;
        FailedPrecondition if it would fail on any conversation.
        """
        try:
            text = self._render(messages)
        except FailedPrecondition:
            raise
        except _Refused as error:
            raise InvalidArgument(
                f"the model's chat template refuses this conversation: {error}",
                field="chat.messages",
                remedy="use the roles and the order that the model was trained on",
                reason="CHAT_TEMPLATE",
            ) from error
        except MemoryError:  # for the owner of the process
            raise
        except Exception as error:  # a template is a program: it may raise anything
            self.check()
            raise InvalidArgument(
                f"the model's chat template fails on this conversation: {_described(error)}",
                field="chat.messages",
                remedy="use the roles and the order that the model was trained on, or send text",
                reason="CHAT_TEMPLATE",
            ) from error
        if not text:
            self.check()
        return text

    def check(self) -> None:
        """Render short conversations until one has a text or is refused; FailedPrecondition if none is."""
        failure: Exception | None = None
        for messages in _PROBES:
            try:
                if self._render(messages):
                    return
            except _Refused:
                return
            except (FailedPrecondition, MemoryError):
                raise
            except Exception as error:
                failure = failure or error
        if failure is None:
            raise _unusable("it renders every conversation to an empty text")
        raise _unusable(f"it cannot be rendered: {_described(failure)}") from failure

    def _render(self, messages: Sequence[tuple[str, str]]) -> str:
        if self._template is None:
            raise _unusable(self._fault)
        turns = [{"role": role, "content": content} for role, content in messages]
        given: dict[str, object] = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True}
        return self._template.render(self._names | given)


def _unguarded(tree: nodes.Template) -> set[str]:
    """Return names from outside that a template uses without ever asking whether they are there."""
    guarded = {name.name for guard in _guards(tree) for name in guard.find_all(nodes.Name)}
    tracking = _Tracking(tree.environment)
    tracking.visit(tree)
    return tracking.undeclared_identifiers - guarded - {n.name for n in _bare_guards(tree)}


def _guards(tree: nodes.Template) -> Iterator[nodes.Node]:
    for test in tree.find_all(nodes.Test):
        if test.name in _GUARDS:
            yield test
    for call in tree.find_all(nodes.Filter):
        if call.name in {"default", "d"}:
            yield call


def _bare_guards(tree: nodes.Template) -> Iterator[nodes.Name]:
    """Yield names that are only asked about: `{% if name %}`, `not name`, `name and ...`, `name == ...`."""
    waiting: list[nodes.Node | None] = []
    for branch in tree.find_all((nodes.If, nodes.CondExpr)):
        waiting.append(branch.test)
    for comparison in tree.find_all(nodes.Compare):
        waiting += [comparison.expr, *(operand.expr for operand in comparison.ops)]
    for operation in tree.find_all((nodes.And, nodes.Or, nodes.Not)):
        waiting += [operation.left, operation.right] if isinstance(operation, nodes.BinExpr) else [operation.node]
    yield from (node for node in waiting if isinstance(node, nodes.Name))


def _unusable(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the checkpoint's chat template is broken: {why}",
        remedy="send text, and repair chat_template in the checkpoint",
        reason="CHAT_TEMPLATE",
    )


def _described(error: BaseException) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.message} (line {error.lineno})"
    text = str(error)
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore in front, such as {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own: that one escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
