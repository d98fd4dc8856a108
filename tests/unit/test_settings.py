"""Settings: flag beats environment beats default; what cannot be used stops the start and names itself."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from balancer_svc.settings import BalancerSettings
from collegium.fabric.errors import SettingsError
from collegium.fabric.redis_url import check_redis_url
from collegium.fabric.settings import ByteSize, ServiceSettings, parse, read, render_help, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(ServiceSettings):
    model: Path = setting("folder of the checkpoint")
    num_blocks: int = setting("blocks", default=8, at_least=1, at_most=64)
    ratio: float = setting("a ratio", default=0.5)
    memory: ByteSize = setting("memory", default=ByteSize(2**20))
    routers: tuple[str, ...] = setting("routers", default=())
    key: str | None = setting("a key", default=None, secret=True)
    is_fast: bool = setting("whether to hurry", default=False)
    url: str = setting("an URL", default="", env="EXAMPLE_URL")


def test_a_flag_beats_the_environment_and_the_environment_the_default() -> None:
    env = {"COLLEGIUM_NUM_BLOCKS": "9", "COLLEGIUM_RATIO": "0.25", "EXAMPLE_URL": "x"}
    example = read(Example, ["--num-blocks", "10", "--model=/m"], env)
    assert (example.num_blocks, example.ratio, example.url, example.memory) == (10, 0.25, "x", 2**20)


def test_every_type_is_read_from_both_forms_of_a_flag() -> None:
    argv = ["--model", "/m", "--memory=1.5GiB", "--routers", "a:1, b:2", "--key=k", "--is-fast", "--bind", "h:1"]
    example = read(Example, argv, {})
    assert example.model == Path("/m")
    assert example.memory == 3 * 2**29
    assert example.routers == ("a:1", "b:2")
    assert example.key == "k"
    assert example.is_fast
    assert example.bind == "h:1"
    assert not read(Example, ["--model=/m", "--no-is-fast"], {"COLLEGIUM_IS_FAST": "true"}).is_fast


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model=/m", "--num-block", "1"], "--num-block is not a setting; did you mean --num-blocks?"),
        (["--model=/m", "stray"], "stray is not a setting"),
        (["--bogus", "1"], "--bogus is not a setting; --help lists them all"),
        ([], "--model is missing; give it, or set COLLEGIUM_MODEL"),
        (["--model=/m", "--num-blocks=x"], "--num-blocks='x' cannot be used: give a whole number"),
        (["--model=/m", "--num-blocks=0"], "--num-blocks='0' cannot be used: give at least 1"),
        (["--model=/m", "--num-blocks=65"], "--num-blocks='65' cannot be used: give at most 64"),
        (["--model=/m", "--ratio=nan"], "--ratio='nan' cannot be used: give a finite number"),
        (["--model=/m", "--memory=2 parsecs"], "--memory='2 parsecs' cannot be used: give a number of bytes"),
        (["--model=/m", "--log-format=xml"], "--log-format='xml' cannot be used: give one of text, json"),
        (["--model=/m", "--is-fast=perhaps"], "--is-fast='perhaps' cannot be used: give true or false"),
        (["--model"], "--model needs a value: folder of the checkpoint"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_cannot_be_used_names_the_setting_the_value_and_the_remedy(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(Example, argv, {})
    assert message in str(caught.value)


def test_an_unreadable_variable_names_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"COLLEGIUM_NUM_BLOCKS='x'"):
        read(Example, ["--model=/m"], {"COLLEGIUM_NUM_BLOCKS": "x"})


def test_parse_exits_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Example, ["--nope"], prog="example", env={})
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("example: --nope is not a setting")


def test_help_shows_variables_bounds_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Example, ["--help"], prog="example", env={})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown == render_help(Example, prog="example")
    for part in ("--num-blocks N", "$COLLEGIUM_NUM_BLOCKS", "default 8", "$EXAMPLE_URL", "required", "default 1MiB"):
        assert part in shown


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("1e9", 10**9), ("512MiB", 2**29), ("2 GB", 2 * 10**9), ("1Ki", 1024)]
)
def test_sizes_are_read_in_every_usual_form(text: str, size: int) -> None:
    assert ByteSize.parse(text) == size


@pytest.mark.parametrize(
    "url",
    ["http://h:1", "redis://", "redis://h:99999", "redis://h:1/first", "unix://", "127.0.0.1:6379", "redis://h:0"],
)
def test_a_malformed_redis_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(SettingsError, match="REDIS_URL is malformed"):
        check_redis_url(url)


def test_a_redis_urls_password_is_never_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        check_redis_url("http://user:hunter2@h:1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://h", "rediss://u:p@h:6380/2", "unix:///run/redis.sock", "redis://[::1]:6379"])
def test_usual_redis_urls_are_accepted(url: str) -> None:
    check_redis_url(url)
    assert read(BalancerSettings, [], {"REDIS_URL": url}).redis_url == url


def test_the_page_of_settings_is_the_services_own() -> None:
    folder = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("settings_page", folder / "settings_page.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    if os.environ.get("COLLEGIUM_RENEW"):
        (folder / "settings.md").write_text(page.render())
    assert (folder / "settings.md").read_text() == page.render(), "run `make docs`"
