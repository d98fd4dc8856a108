"""Shared experts on workers: experts like the others, which every token has; answers stay those of transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.one_process import OneProcess, Request
from collegium.buffering.pinned import Pinned
from collegium.buffering.policies import make_policy
from collegium.model import identity, manifest_file
from collegium.model.architectures import UnsupportedModelError
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.manifest import build_manifest, ensure_manifest, load_manifest, write_manifest
from collegium.model.weights import read_expert
from router_svc.model_loader import load_router_model
from tests.checkpoints import DECODERS, Variant
from tests.oracle import Oracle

SHARING = ["deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe"]
MAX_TOKENS = 12


@pytest.mark.parametrize(("num_workers", "budget"), [(1, ""), (3, "40%")])
@pytest.mark.parametrize("arch", SHARING)
def test_tokens_and_logprobs_equal_transformers_with_shared_experts_on_workers(
    arch: str, num_workers: int, budget: str, oracle: Oracle
) -> None:
    has_other = arch != "ernie4_5_moe"  # that variant of it shares none
    checkpoint = oracle.checkpoint(arch, Variant.OTHER if num_workers > 1 and has_other else Variant.BASE)
    references = oracle.choose_prompts(checkpoint, 4, MAX_TOKENS)
    requests = [
        Request(prompt_ids=one.prompt_ids, max_tokens=MAX_TOKENS, num_logprobs=0, after_tokens=4 * idx)
        for idx, one in enumerate(references)
    ]
    memory = {"expert_memory": budget, "host_memory": "100%"} if budget else {}
    with OneProcess(checkpoint, num_workers=num_workers, kv_tokens=128, shares=True, **memory) as cluster:
        answers = cluster.run(requests)
        loads = cluster.calls.loads.decode + cluster.calls.loads.prefill
        totals, manifest, model = cluster.calls.totals, cluster.manifest, cluster.model
    for reference, (answer,) in zip(references, answers, strict=True):
        assert answer.token_ids == reference.token_ids
        assert [p.chosen for p in answer.logprobs] == pytest.approx(reference.logprobs, abs=1e-4)
    num_shared = manifest.num_shared
    assert num_shared >= 1 and model.num_experts == len(manifest.layers[0].experts)
    tokens = loads.sum(1, keepdims=True) // model.top_k
    assert (loads[:, -num_shared:] == tokens).all() and (loads[:, :-num_shared] <= tokens).all()
    assert not model.shared_experts()
    assert totals.native_exchanges and not totals.python_exchanges


@pytest.mark.parametrize("arch", SHARING)
def test_a_share_is_the_rows_and_columns_of_the_stored_tensors(arch: str, oracle: Oracle, tmp_path: Path) -> None:
    checkpoint = oracle.checkpoint(arch)
    write_manifest(tmp_path / "m.json", build_manifest(checkpoint, shares=True))
    manifest = load_manifest(tmp_path / "m.json")
    stored = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= {key: tensors.get_tensor(key) for key in list(tensors.keys()) if "shared" in key}
    width = manifest.d_ffn
    for layer, entry in enumerate(manifest.layers):
        of_layer = {
            k.split("_proj")[0].rpartition(".")[2]: v for k, v in stored.items() if f"s.{entry.decoder_layer}." in k
        }
        for at in range(manifest.num_shared):
            expert = len(entry.experts) - manifest.num_shared + at
            found = read_expert(manifest, layer, expert, torch.float32)
            span = slice(at * width, (at + 1) * width)
            assert torch.equal(found.gate_up, torch.cat((of_layer["gate"][span], of_layer["up"][span])).float())
            assert torch.equal(found.down, of_layer["down"][:, span].float())


def test_what_cannot_be_left_to_workers_is_refused_by_name(oracle: Oracle) -> None:
    for arch in sorted(set(DECODERS) - set(SHARING)):
        why = "weighs its shared experts" if arch == "qwen2_moe" else "has no shared experts"
        with pytest.raises(UnsupportedModelError, match=f"{arch} {why}"):
            build_manifest(oracle.checkpoint(arch), shares=True)
    with pytest.raises(UnsupportedModelError, match="ernie4_5_moe has no shared experts"):
        build_manifest(oracle.checkpoint("ernie4_5_moe", Variant.OTHER), shares=True)
    with pytest.raises(UnsupportedModelError, match="asked for; leave them on the router"):
        load_router_model(oracle.checkpoint("glm4_moe"), torch.float32, torch.device("cpu"), "transformers", 1)


def test_both_manifests_of_a_checkpoint_are_kept_and_one_is_not_the_other(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = oracle.checkpoint("deepseek_v2")
    plain, shared = ensure_manifest(checkpoint), ensure_manifest(checkpoint, shares=True)
    assert plain != shared
    assert (load_manifest(plain).num_shared, load_manifest(shared).num_shared >= 1) == (0, True)
    told = identity.tell_differences(load_manifest(plain).parts, load_manifest(shared).parts)
    assert "place of shared experts" in told
    assert ensure_manifest(checkpoint) == plain and ensure_manifest(checkpoint, shares=True) == shared
    assert ensure_manifest(checkpoint, out=plain, shares=True) == plain  # an older one of the other kind is replaced
    assert load_manifest(plain).num_shared >= 1


def test_pinned_experts_always_deserve_a_slot_and_never_make_room() -> None:
    policy = Pinned(make_policy("lifo"), [(0, 7)])
    policy.visit(0, [1, 2, 7], [1, 1, 3], 3)
    for expert in (1, 2, 7):
        policy.admit((0, expert))
    first = policy.victim(0, ())
    assert first in ((0, 1), (0, 2))
    assert policy.victim(0, {(0, 1), (0, 2)}) is None
    assert policy.is_worth((0, 7), (0, 1))
    policy.evict((0, 1))
    policy.evict((0, 2))
    assert policy.victim(None, ()) is None
    policy.evict((0, 7))  # its home has moved away
    policy.admit((0, 1))
    assert policy.victim(None, ()) == (0, 1)


def test_a_manifest_that_shares_more_than_there_is_is_refused(oracle: Oracle, tmp_path: Path) -> None:
    path = ensure_manifest(oracle.checkpoint("deepseek_v2"), out=tmp_path / "m.json", shares=True)
    raw = json.loads(path.read_text())
    raw.pop("seal")
    for wrong in (raw["top_k"], -1, True, 1.5):
        changed = raw | {"num_shared": wrong}
        path.write_text(json.dumps(changed | {"seal": manifest_file._seal_of(changed)}))
        with pytest.raises(CheckpointError, match="num_shared"):
            load_manifest(path)
