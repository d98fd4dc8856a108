"""What can be wrong about `up`'s flags, found before anything is started.

Every check raises SettingsError that names the flag. What only a service can know, such as a model's own length, is
left to that service.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path

from collegium.buffering.policies import POLICIES
from collegium.fabric.byte_size import ByteSize, MemoryBudget
from collegium.fabric.channels import read_file, read_key
from collegium.fabric.errors import SettingsError
from collegium.fabric.settings import ServiceSettings, read
from collegium.model.checkpoint_files import has_file
from collegium.model.checkpoint_survey import survey_checkpoint

_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_KEY = b"PRIVATE KEY-----"


def check_model_dir(model_dir: Path) -> None:
    """Check that a folder is a checkpoint by its config.json and the headers of its files; reads no tensor."""
    if not os.path.isdir(model_dir):
        raise SettingsError(f"MODEL_DIR={model_dir} is not a folder; give the folder of a checkpoint")
    if not has_file(model_dir / "config.json"):
        raise SettingsError(f"MODEL_DIR={model_dir} holds no config.json; give the folder of a checkpoint")
    try:
        survey_checkpoint(model_dir)
    except ValueError as error:  # CheckpointError, UnsupportedModelError
        raise SettingsError(f"MODEL_DIR={model_dir} cannot be served: {error}") from None


def check_tls(cert: Path | None, key: Path | None, ca: Path | None) -> None:
    """Check that certificate and key are there together, can be read, and fit."""
    if cert is None or key is None:
        for flag, other, path in (("--tls-cert", "--tls-key", cert), ("--tls-key", "--tls-cert", key)):
            if path is not None:
                raise SettingsError(f"{flag}={path} is given without {other}; give both or neither")
        if ca is not None:
            raise SettingsError(f"--tls-ca={ca} is given without --tls-cert and --tls-key; give all, or none")
        return
    _check_pem(cert, "--tls-cert", _CERTIFICATE, "certificate")
    _check_pem(key, "--tls-key", _KEY, "private key")
    read_key(key, "--tls-key")
    if ca is not None:
        _check_pem(ca, "--tls-ca", _CERTIFICATE, "certificate")
    if any(path.read_bytes() != read_file(path, flag) for path, flag in ((cert, "--tls-cert"), (key, "--tls-key"))):
        return  # OpenSSL cannot read a file that begins with a byte order mark; the gateway reads it without
    try:
        # With a password at hand, OpenSSL never asks for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError) as error:
        why = getattr(error, "reason", None) or str(error)
        raise SettingsError(f"--tls-cert={cert} and --tls-key={key} cannot be used together: {why}") from None


def check_logs(level: str, form: str) -> None:
    """Check how services are to log."""
    read(ServiceSettings, [f"--log-level={level}", f"--log-format={form}"], {})


def check_kv_memory(text: str) -> None:
    """Check a size; empty is the router's default."""
    if not text:
        return
    try:
        size = ByteSize.parse(text)
    except ValueError as error:
        raise SettingsError(f"--kv-memory={text!r} cannot be used: {error}") from None
    if size < 1:
        raise SettingsError(f"--kv-memory={text!r} cannot be used: give at least 1 byte")


def check_expert_memory(expert_memory: str, host_memory: str, eviction: str, prefetch: str) -> MemoryBudget:
    """Check the workers' budgets and how they are used; gives the first one."""
    for flag, text in (("--expert-memory", expert_memory), ("--host-memory", host_memory)):
        try:
            MemoryBudget.parse(text)
        except ValueError as error:
            raise SettingsError(f"{flag}={text!r} cannot be used: {error}") from None
    for flag, word, words in (("--eviction", eviction, POLICIES), ("--prefetch", prefetch, ("auto", "on", "off"))):
        if word not in words:
            raise SettingsError(f"{flag}={word!r} cannot be used: give one of {', '.join(words)}")
    return MemoryBudget.parse(expert_memory)


def check_prompt(prompt: str, max_tokens: int) -> None:
    """Check the first completion's prompt, where there is to be one."""
    if max_tokens > 0 and not prompt:
        raise SettingsError("--prompt='' cannot be used: give some text, or --max-tokens 0 for no completion")


def check_cluster_name(name: str) -> None:
    """Check a name that becomes part of Redis's keys."""
    if re.fullmatch(r"[A-Za-z0-9_./-]{1,128}", name) is None:
        raise SettingsError(
            f"--cluster={name[:150]!r} cannot be used: give 1 to 128 letters, digits, and _ . / - of ASCII"
        )


def _check_pem(path: Path, flag: str, mark: bytes, what: str) -> None:
    if mark not in read_file(path, flag):
        raise SettingsError(f"{flag}={path} cannot be used: it holds no {what} in PEM")
