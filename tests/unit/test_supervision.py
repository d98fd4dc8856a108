"""The pure parts of a cluster on one machine: threads, restarts, commands, numbers."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.cli.child import ChildFailed, RestartPolicy
from collegium.cli.complaint import told
from collegium.cli.preflight import check_kv_memory, check_logs, check_model_dir, check_prompt, check_tls
from collegium.cli.show import Completion, address_table, completion_table, console
from collegium.cli.spec import ClusterSpec, members_of, service_env
from collegium.cli.threads import Allotment, allot, parse_threads
from collegium.cli.up import resolve_dtype
from collegium.fabric.errors import (
    CollegiumError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SettingsError,
    Unauthenticated,
    Unavailable,
)
from collegium.model.manifest import ensure_manifest, load_manifest
from tests.gateway_rig import DEMO, certificate

SPEC = ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), num_workers=2, num_routers=2, num_gateways=2)


@given(st.integers(1, 256), st.integers(1, 8), st.integers(1, 16))
def test_threads_never_exceed_the_cores_unless_there_are_more_processes(
    num_cores: int, num_routers: int, num_workers: int
) -> None:
    allotment = allot(num_cores, num_routers=num_routers, num_workers=num_workers)
    assert allotment.per_router >= 1 and allotment.per_worker >= 1
    for_routers, for_workers = allotment.per_router * num_routers, allotment.per_worker * num_workers
    if num_routers == 1:  # it takes turns with its workers
        assert for_routers == num_cores and for_workers <= max(num_cores, num_workers)
    else:
        assert for_routers + for_workers <= max(num_cores, num_routers + num_workers)


def test_one_router_and_its_workers_have_all_cores_in_turn_and_several_share_them() -> None:
    assert allot(16, num_routers=1, num_workers=2) == Allotment(per_router=16, per_worker=8)
    assert allot(16, num_routers=2, num_workers=2) == Allotment(per_router=3, per_worker=5)


def test_threads_are_read_in_every_form() -> None:
    shared = {"num_cores": 4, "num_routers": 1, "num_workers": 1}
    assert parse_threads("auto", **shared) == allot(4, num_routers=1, num_workers=1)
    assert parse_threads("8", **shared) == allot(8, num_routers=1, num_workers=1)
    assert parse_threads("worker=3,router=2", **shared) == Allotment(per_router=2, per_worker=3)


@pytest.mark.parametrize("text", ["0", "-1", "many", "router=2", "router=0,worker=1", "router=1,worker=1,gateway=1"])
def test_threads_in_no_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="auto"):
        parse_threads(text, num_cores=4, num_routers=1, num_workers=1)


def test_restarts_back_off_to_half_a_minute_and_never_end() -> None:
    policy = RestartPolicy()
    pauses = [policy.after_death(float(second)) for second in range(50)]
    assert pauses[0] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(pauses[:6]))
    assert set(pauses[6:]) == {30.0}
    assert (policy.num_deaths, policy.num_recent) == (50, 50)


def test_deaths_that_are_far_apart_are_always_forgiven() -> None:
    policy = RestartPolicy()
    assert [policy.after_death(60.0 * n) for n in range(20)] == [0.1] * 20


def test_members_find_each_other_and_keep_distinct_addresses() -> None:
    members = members_of(SPEC, "redis://h")
    by_name = {member.name: member for member in members}
    assert list(by_name) == ["balancer", *(f"{role}-{i}" for role in ("worker", "router", "gateway") for i in (0, 1))]
    assert len({member.address for member in members}) == len(members)
    balancer = by_name["balancer"].address
    for member in members[1:]:
        argv = member.command.argv
        assert argv[argv.index("--balancer") + 1] == balancer
        assert argv[argv.index("--bind") + 1] == member.address


def test_only_balancer_and_gateways_know_redis_and_never_by_a_flag() -> None:
    for member in members_of(SPEC, "redis://:secret@h"):
        assert not any("secret" in word for word in member.command.argv)
        assert ("REDIS_URL" in member.command.env) == (member.role in ("balancer", "gateway"))


def test_what_up_decides_is_not_taken_from_the_users_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLEGIUM_ADVERTISE", "elsewhere:1")
    monkeypatch.setenv("COLLEGIUM_LOG_LEVEL", "debug")
    env = service_env(3)
    assert "COLLEGIUM_ADVERTISE" not in env
    assert env["COLLEGIUM_LOG_LEVEL"] == "debug"
    assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"], env["COLLEGIUM_SUPERVISED"]) == ("3", "passive", "1")


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"num_workers": 0}, "--workers"), ({"num_gateways": -1}, "--gateways"), ({"grpc_port": 70000}, "--grpc-port")],
    ids=["workers", "gateways", "port"],
)
def test_an_impossible_cluster_names_the_flag(change: dict[str, int], flag: str) -> None:
    with pytest.raises(SettingsError, match=flag):
        ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), **change)


def test_auto_is_the_type_that_the_manifest_tells_every_service(tmp_path: Path) -> None:
    manifest = ensure_manifest(DEMO, out=tmp_path / "m.json")
    assert resolve_dtype("auto", manifest) == load_manifest(manifest).dtype
    assert resolve_dtype("float32", manifest) == "float32"


def test_the_rate_counts_tokens_after_the_first_one() -> None:
    assert Completion(num_tokens=11, first_token_s=1.0, total_s=3.0, finish_reason="length").tokens_per_s == 5.0
    assert Completion(num_tokens=1, first_token_s=1.0, total_s=1.0, finish_reason="stop").tokens_per_s == 0.0


def test_no_line_of_a_table_ends_in_blanks() -> None:
    out = io.StringIO()
    completion = Completion(num_tokens=11, first_token_s=1.0, total_s=3.0, finish_reason="length")
    console(out).print(completion_table(completion, {}, {"worker-0": {}}))
    console(out).print(address_table([("worker-0", "127.0.0.1:1", 1)], {"worker": 1}))
    lines = out.getvalue().splitlines()
    assert lines[0] == "11 tokens, first after 1000 ms, then 5.0 tokens/s"
    assert "The cluster" in lines
    assert not [line for line in lines if line != line.rstrip()]


def test_certificate_and_key_go_together_and_each_error_names_its_flag(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other_key = certificate(tmp_path / "other")[1]
    absent = tmp_path / "absent.pem"
    check_tls(None, None, None)
    check_tls(cert, key, None)
    check_tls(cert, key, cert)
    for files, message in {
        (cert, None, None): f"--tls-cert={cert} is given without --tls-key",
        (None, key, None): f"--tls-key={key} is given without --tls-cert",
        (None, None, cert): f"--tls-ca={cert} is given without --tls-cert",
        (absent, key, None): f"--tls-cert={absent} cannot be read: No such file",
        (cert, absent, None): f"--tls-key={absent} cannot be read: No such file",
        (cert, key, absent): f"--tls-ca={absent} cannot be read: No such file",
        (key, key, None): f"--tls-cert={key} cannot be used: it holds no certificate",
        (cert, cert, None): f"--tls-key={cert} cannot be used: it holds no private key",
        (cert, other_key, None): f"--tls-cert={cert} and --tls-key={other_key} cannot be used together",
    }.items():
        with pytest.raises(SettingsError, match=re.escape(message)):
            check_tls(*files)


def test_flags_of_services_are_checked_before_a_service_is_started(tmp_path: Path) -> None:
    check_logs("warning", "json")
    check_kv_memory("")
    check_kv_memory("1GiB")
    check_prompt("", 0)
    for check, args, message in (
        (check_logs, ("loud", "text"), "--log-level='loud' cannot be used: give one of debug"),
        (check_logs, ("info", "xml"), "--log-format='xml' cannot be used"),
        (check_kv_memory, ("much",), "--kv-memory='much' cannot be used: give a number of bytes"),
        (check_kv_memory, ("0",), "--kv-memory='0' cannot be used: give at least 1"),
        (check_prompt, ("", 4), "--prompt='' cannot be used"),
    ):
        with pytest.raises(SettingsError, match=re.escape(message)):
            check(*args)  # type: ignore[operator]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"config\.json cannot be read: .*; fetch the checkpoint again"):
        check_model_dir(tmp_path)


def test_what_was_relayed_can_be_told_without_its_lines() -> None:
    error = ChildFailed("x exited with status 2", last_lines=["a", "b"], has_relayed_lines=True, exit_status=2)
    assert error.summary == "x exited with status 2"
    assert error.message == "x exited with status 2; its last lines:\n  a\n  b"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            InvalidArgument("0 tokens are no answer", field="stopping.max_tokens", remedy="give at least 1"),
            "INVALID_ARGUMENT: --max-tokens: 0 tokens are no answer; give at least 1",
        ),
        (InvalidArgument("2 cannot be used", field="sampling.top_p"), "INVALID_ARGUMENT: --top-p: 2 cannot be used"),
        (InvalidArgument("65 is too many", field="num_choices"), "INVALID_ARGUMENT: --n: 65 is too many"),
        (InvalidArgument("0 choices are no answer", field="n"), "INVALID_ARGUMENT: --n: 0 choices are no answer"),
        (InvalidArgument("21 is too many", field="num_logprobs"), "INVALID_ARGUMENT: --logprobs: 21 is too many"),
        (
            InvalidArgument("the prompt is empty", field="text", remedy="send token_ids"),
            "INVALID_ARGUMENT: --prompt: the prompt is empty; send --prompt-ids",
        ),
        (
            InvalidArgument("an empty string", field="stopping.stop_strings[0]"),
            "INVALID_ARGUMENT: --stop: an empty string",
        ),
        (
            InvalidArgument("one is needed", field="prompt", remedy="give one of prompt, prompt_ids and messages"),
            "INVALID_ARGUMENT: --prompt: one is needed; give one of --prompt, --prompt-ids and --message",
        ),
        (
            Unauthenticated("there is no API key", field="authorization", remedy="send the metadata"),
            "UNAUTHENTICATED: there is no API key; give --api-key KEY, or set COLLEGIUM_API_KEY",
        ),
        (NotFound("model 'a' is unknown", field="model"), "NOT_FOUND: --model: model 'a' is unknown"),
        (FailedPrecondition("/x is a folder", field="--out"), "FAILED_PRECONDITION: --out: /x is a folder"),
        (
            Unavailable("Ssl handshake failed: CERTIFICATE_VERIFY_FAILED"),
            "UNAVAILABLE: Ssl handshake failed: CERTIFICATE_VERIFY_FAILED; "
            "the gateway's certificate is not trusted: give --tls-ca FILE",
        ),
        (
            Unavailable("Tls handshake failed: WRONG_VERSION_NUMBER"),
            "UNAVAILABLE: Tls handshake failed: WRONG_VERSION_NUMBER; "
            "the gateway may not speak TLS: leave --tls and --tls-ca out",
        ),
        (
            Unavailable("Socket closed"),
            "UNAVAILABLE: Socket closed; the gateway may speak TLS: give --tls, or --tls-ca FILE",
        ),
        (Unavailable("refused"), "UNAVAILABLE: refused; is a gateway at --target?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_flags_and_say_what_to_try(error: CollegiumError, line: str) -> None:
    assert told(error) == line
