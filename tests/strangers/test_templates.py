"""Chat templates of strangers: rendered as transformers renders them, and told at the start if they cannot be."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import grpc
import pytest
from transformers import AutoTokenizer

from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from collegium.v1 import inference_pb2 as pb
from gateway.chat import ChatTemplate
from gateway.tokenizer import Tokenizer
from tests.fake_router import FakeRouter
from tests.gateway_rig import error_of, gather, rig, text_request, token_ids, until
from tests.tokenizer_kinds import DEMO

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|endoftext|>",
    "mask_token": "[MASK]",
    "audio_token": "<audio>",
    "extra_special_tokens": {"image_token": "<image>"},
}
HELLO = [("user", "5 < 6 & é 🙂")]
CHAT = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "  Who?\n")]

# Each prints what a template can see of what it was given.
TEMPLATES = (
    "{% if tools is not none %}TOOLS{% endif %}{{ tools }}|{{ documents }}|{{ tools is defined }}",
    "{{ documents is none }}{{ documents is defined }}{% if documents %}D{% endif %}",
    "{{ add_generation_prompt }}{{ bos_token }}{{ eos_token }}{{ mask_token }}{{ audio_token }}{{ image_token }}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=False) }}{{ messages | tojson(ensure_ascii=True) }}",
    "{{ messages | tojson(separators=(',', ':')) }}{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
    "{{ {'b': 1, 'a': [true, none]} | tojson(false, 1, none, true) }}",
    "{% for m in messages %}{{ m.role }}:{{ m['content'] | trim }}{{ m.tool_calls is defined }}{{ m.n }}{% endfor %}",
    "{% for m in messages %}{% generation %}{% set a = 1 %}{{ m.content }}{% endgeneration %}{{ a }}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.keys() | list }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['x'], 2) }}{{ dict([('q', 1)]) }}",
    "  {% if true %}\n  x\n  {% endif %}\n\n  y{# c #}\n",
    "{{ strftime_now('%Z%%') }}{{ '{:>4}'.format(3) }}{{ [1, 2][-1:] }}{{ messages is iterable }}",
    "{%- macro turn(m) -%}<{{ m.role }}>{{ caller() if caller }}{%- endmacro -%}{{ turn(messages[0]) }}",
    "{{ xml_tools is undefined }}{{ unknown }}{{ custom_tools | default('none') }}",
)


def folder_of(path: Path, template: Any, config: dict[str, Any] = CONFIG) -> Path:
    (path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return path


def rendered(template: str, turns: list[tuple[str, str]]) -> str:
    names = {"bos_token": "<|endoftext|>", "mask_token": "[MASK]", "audio_token": "<audio>", "image_token": "<image>"}
    return ChatTemplate(template, names).render(turns)


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder_of(tmp_path, ""), local_files_only=True)
    ours = Tokenizer.load(tmp_path)
    assert ours is not None and ours.has_chat_template
    for template in TEMPLATES:
        for turns in (HELLO, CHAT):
            messages = [{"role": role, "content": content} for role, content in turns]
            wanted = theirs.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            assert rendered(template, turns) == wanted, template


def test_ids_of_a_conversation_are_those_of_transformers(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}<image>{{ m.role }}\n{{ m.content }}{{ mask_token }}{% endfor %}"
    theirs = AutoTokenizer.from_pretrained(folder_of(tmp_path, template), local_files_only=True)
    ours = Tokenizer.load(tmp_path)
    assert ours is not None
    messages = [{"role": role, "content": content} for role, content in CHAT]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == wanted


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({}, "config"),
        ({}, [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "config"}]),
        ({}, [{"name": "tool_use", "template": "tools"}]),
        ({}, {"default": "config", "rag": "rag"}),
        ({"chat_template.jinja": "file"}, "config"),
        ({"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"}, "config"),
        ({"additional_chat_templates/rag.jinja": "rag"}, "config"),
        ({"additional_chat_templates/default.jinja": "default"}, "config"),
    ],
)
def test_the_template_is_taken_from_where_transformers_takes_it(
    files: dict[str, str], config: Any, tmp_path: Path
) -> None:
    folder_of(tmp_path, config)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    try:
        wanted = theirs.get_chat_template()
    except ValueError:
        wanted = None
    ours = Tokenizer.load(tmp_path)
    assert ours is not None
    assert (ours._chat.render(HELLO) if ours._chat is not None else None) == wanted


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ eos_token }}{{ messages }}{{ tools }}{{ raise_exception is defined }}", []),
        ("{{ mask_token }}{{ foo.bar }}{% for x in rows %}{{ x }}{% endfor %}", ["foo", "mask_token", "rows"]),
        ("{% if thinking is defined and thinking %}a{% endif %}{{ thinking }}", []),
        ("{{ date | default('today') }}{% if not quiet %}{{ quiet }}{% endif %}", []),
        ("{% if effort == 'high' %}a{% endif %}{{ 'x' if loud else 'y' }}{% if a or b and c %}d{% endif %}", []),
        ("{% set x = 1 %}{{ x }}{% macro f(y) %}{{ y }}{{ z }}{% endmacro %}{{ f(2) }}", ["z"]),
        ("{% if tool is none %}{% endif %}{{ range(2) }}{{ namespace() }}{{ strftime_now('%Y') }}{{ dict() }}", []),
        ("{% set late = early %}{{ late }}", ["early"]),
    ],
)
def test_only_names_that_nothing_defines_or_asks_about_are_told(template: str, names: list[str]) -> None:
    assert ChatTemplate(template, {"eos_token": "</s>"}).undefined_names == names


BROKEN = {
    "nothing": "",
    "nothing but a comment": "{# a template #}\n",
    "wrong syntax": "{% for %}",
    "an open block": "{% if messages %}x",
    "an unknown filter": "{{ messages | nothing }}",
    "an unknown tag": "{% video %}x{% endvideo %}",
    "an unknown test": "{{ messages is delightful }}",
    "a macro that nothing defines": "{{ turn(messages[0]) }}",
    "an import": "{% import 'turns.jinja' as turns %}{{ turns.one(messages[0]) }}",
    "an import from": "{% from 'turns.jinja' import one %}{{ one(messages[0]) }}",
    "an include": "{% include 'head.jinja' %}x",
    "another template's extension": "{% extends 'base.jinja' %}{% block body %}x{% endblock %}",
    "an assignment to a constant": "{% set 1 = 2 %}x",
    "a filter's unknown option": "{{ messages | tojson(colour=1) }}",
    "a wrong sum": "{{ messages[0].content + 1 }}",
    "an undefined name's attribute": "{{ nothing.at.all }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a way out of the sandbox": "{{ messages.__class__.__mro__[1].__subclasses__()[0] }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_rendered_is_the_checkpoints_fault(name: str) -> None:
    with pytest.raises(FailedPrecondition, match="checkpoint's chat template"):
        ChatTemplate(BROKEN[name], {}).check()
    with pytest.raises(FailedPrecondition, match="checkpoint's chat template"):
        ChatTemplate(BROKEN[name], {}).render(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only with tools') }}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}x",
        "{{ messages[1].content + '!' }}",
        "{{ messages[2].content + '!' }}",
        "plain",
    ],
)
def test_a_template_that_wants_other_conversations_is_no_fault(template: str) -> None:
    ChatTemplate(template, {}).check()


def test_a_conversation_on_which_a_template_fails_is_told_as_the_templates() -> None:
    template = ChatTemplate("{% if messages[0].role == 'tool' %}{{ 1 + 'x' }}{% endif %}ok", {})
    template.check()
    with pytest.raises(InvalidArgument, match=r"chat template fails on this conversation: TypeError") as caught:
        template.render([("tool", "x")])
    assert caught.value.field == "chat.messages"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_leaves_texts_their_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, BROKEN[name]))
    assert tokenizer is not None and tokenizer.has_chat_template
    assert tokenizer.encode("hello")
    assert not tokenizer.undefined_names or name in {"a macro that nothing defines", "an undefined name's attribute"}
    with pytest.raises(FailedPrecondition, match="checkpoint's chat template") as caught:
        tokenizer.encode_chat(CHAT)
    assert (caught.value.reason, "send text" in str(caught.value.remedy)) == ("CHAT_TEMPLATE", True)


def test_a_template_file_that_is_no_text_leaves_texts_their_tokenizer(tmp_path: Path) -> None:
    (folder_of(tmp_path, "x") / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None and tokenizer.encode("hello")
    with pytest.raises(FailedPrecondition, match=r"chat template is broken: its file cannot be read: .*utf-8"):
        tokenizer.encode_chat(CHAT)


async def test_a_gateway_with_a_broken_template_serves_texts_and_refuses_conversations(tmp_path: Path) -> None:
    async with rig(FakeRouter(), model_dir=folder_of(tmp_path, BROKEN["wrong syntax"])) as served:
        error = await error_of(served.stub.Generate(chat_request("hello")))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHAT_TEMPLATE")
        assert token_ids(await gather(served.stub.Generate(text_request("hello", max_tokens=2))))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "1 s of processor time"),
        ("{{ 'x' * 10**11 }}", "MiB"),
        ("{{ messages | tojson(colour=1) }}", "unexpected keyword argument 'colour'"),
        ("{{ messages | nothing }}", "cannot be compiled: No filter named 'nothing'"),
    ],
)
async def test_a_gateway_tells_of_a_broken_template_at_its_start(
    template: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(FakeRouter(), model_dir=folder_of(tmp_path, template), text_limit_s=1.0):
        await until(lambda: bool(warnings_of(caplog)))
    ((event, fields),) = warnings_of(caplog)
    assert "checkpoint's chat template is broken" in event
    assert why in fields["fault"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    records = [record for record in caplog.records if record.levelname == "WARNING" and "template" in record.message]
    return [(record.message, record.__dict__["collegium_fields"]) for record in records]


async def test_a_gateway_tells_of_names_that_stay_empty_at_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path, "{{ sep_token }}{{ today }}{{ bos_token }}{% if tools %}{{ tools }}{% endif %}")
    async with rig(FakeRouter(), model_dir=tmp_path) as served:
        await gather(served.stub.Generate(chat_request("hello")))
    ((_, fields),) = warnings_of(caplog)
    assert fields["names"] == "sep_token, today"


async def test_a_gateway_says_nothing_of_a_template_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path, "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    async with rig(FakeRouter(), model_dir=tmp_path) as served:
        await gather(served.stub.Generate(chat_request("hello")))  # waits in line behind the check
    assert not warnings_of(caplog)


def chat_request(content: str) -> pb.GenerateRequest:
    message = pb.ChatMessage(role="user", content=content.encode())
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=[message]), stopping=pb.Stopping(max_tokens=1))


def test_any_mixture_of_expressions_renders_as_in_transformers(tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder_of(tmp_path, ""), local_files_only=True)
    random_ = random.Random(3)
    for _ in range(60):
        template = "".join(random_.sample(TEMPLATES, 3)) + random_.choice(("\n", " ", "{% set tools = 1 %}{{ tools }}"))
        messages = [{"role": role, "content": content} for role, content in CHAT]
        wanted = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert rendered(template, CHAT) == wanted, template
