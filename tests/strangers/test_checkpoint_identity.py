"""Two checkpoints that differ in one thing are told apart by its name: at Join, at OpenLink, and by gateways."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from collegium.fabric.errors import CollegiumError, FailedPrecondition
from collegium.fabric.model_shape import shape_of
from collegium.model import identity
from collegium.model.architectures import ARCHITECTURES
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.identity import read_text_sources
from collegium.model.manifest import Manifest, build_manifest, check_folder, ensure_manifest, load_manifest
from collegium.v1 import balancer_pb2, expert_pb2
from expert_svc.service import ExpertService
from router_svc.loading import find_manifest
from router_svc.settings import Settings
from tests import fake_router
from tests.balancers import running_balancer
from tests.checkpoints import Variant
from tests.fake_router import FakeRouter
from tests.gateway_rig import rig, until
from tests.memory_store import MemoryStore
from tests.oracle import Oracle


def _json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))

    return edit


def _rope(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    path.write_text(json.dumps(config))


def _nudge(key: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[key].view(-1)[7] += 0.25
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["ab"] = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["merges"] = [["a", "b"]]
    path.write_text(json.dumps(tokenizer))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One change to a checkpoint, and the parts of its identity that it shows in."""

    edit: Callable[[Path], object]
    parts: tuple[str, ...]
    arch: str = "mixtral"

    @property
    def is_of_text(self) -> bool:
        """Whether a gateway must refuse it too."""
        return bool({identity.TOKENIZER, identity.TOKENIZER_CLASS, identity.TEMPLATE} & set(self.parts))


CONFIG, ARITHMETIC, ROUTER = (identity.CONFIG,), (identity.CONFIG, identity.ARITHMETIC), (identity.ROUTER,)
DIFFERENCES = {
    "rope_theta": Difference(edit=_rope, parts=CONFIG),
    "rms_norm_eps": Difference(edit=_json("config.json", rms_norm_eps=1e-3), parts=CONFIG),
    "a sliding window": Difference(edit=_json("config.json", sliding_window=16), parts=CONFIG),
    "eos in the config": Difference(edit=_json("config.json", eos_token_id=5), parts=CONFIG),
    "a field that nobody knows": Difference(edit=_json("config.json", attention_trick=True), parts=CONFIG),
    "activation": Difference(edit=_json("config.json", hidden_act="gelu"), parts=ARITHMETIC),
    "top-k": Difference(edit=_json("config.json", num_experts_per_tok=3), parts=ARITHMETIC),
    "clamp": Difference(edit=_json("config.json", swiglu_limit=2.5), parts=ARITHMETIC, arch="gpt_oss"),
    "alpha": Difference(edit=_json("config.json", swiglu_alpha=1.5), parts=ARITHMETIC, arch="gpt_oss"),
    "normed top-k": Difference(edit=_json("config.json", norm_topk_prob=False), parts=CONFIG, arch="qwen3_moe"),
    "an attention weight": Difference(edit=_nudge("model.layers.1.self_attn.k_proj.weight"), parts=ROUTER),
    "a gate's weight": Difference(edit=_nudge("model.layers.2.block_sparse_moe.gate.weight"), parts=ROUTER),
    "a norm's weight": Difference(edit=_nudge("model.norm.weight"), parts=ROUTER),
    "an embedding": Difference(edit=_nudge("model.embed_tokens.weight"), parts=ROUTER),
    "the head": Difference(edit=_nudge("lm_head.weight"), parts=ROUTER),
    "a shared expert": Difference(
        edit=_nudge("model.layers.1.mlp.shared_expert.up_proj.weight"), parts=ROUTER, arch="qwen2_moe"
    ),
    "an expert's weight": Difference(
        edit=_nudge("model.layers.1.block_sparse_moe.experts.3.w2.weight"), parts=(identity.EXPERTS,)
    ),
    "merges": Difference(edit=_merges, parts=(identity.TOKENIZER,)),
    "a special token": Difference(edit=_json("tokenizer_config.json", mask_token="<m>"), parts=(identity.TOKENIZER,)),
    "the tokenizer's class": Difference(
        edit=_json("config.json", tokenizer_class="LlamaTokenizer"), parts=(identity.CONFIG, identity.TOKENIZER_CLASS)
    ),
    "an added token": Difference(edit=_json("added_tokens.json", **{"<x>": 300}), parts=(identity.TOKENIZER,)),
    "the special tokens' map": Difference(
        edit=_json("special_tokens_map.json", pad_token="</s>"), parts=(identity.TOKENIZER,)
    ),
    "template": Difference(edit=_json("tokenizer_config.json", chat_template="{{ 1 }}"), parts=(identity.TEMPLATE,)),
    "template file": Difference(
        edit=lambda folder: (folder / "chat_template.jinja").write_text("{{ 2 }}"), parts=(identity.TEMPLATE,)
    ),
    "eos": Difference(edit=_json("generation_config.json", eos_token_id=9), parts=(identity.GENERATION,)),
    "no generation config": Difference(
        edit=lambda folder: (folder / "generation_config.json").unlink(), parts=(identity.GENERATION,)
    ),
}


def base_of(arch: str, oracle: Oracle) -> Path:
    return oracle.checkpoint(arch, Variant.TEXT if arch == "mixtral" else Variant.BASE)


@pytest.fixture(params=sorted(DIFFERENCES))
def pair(request: pytest.FixtureRequest, oracle: Oracle, tmp_path: Path) -> tuple[Difference, Path, Path]:
    """A difference, the folder without it and the folder with it."""
    difference = DIFFERENCES[request.param]
    base = base_of(difference.arch, oracle)
    changed = tmp_path / base.name
    shutil.copytree(base, changed)
    difference.edit(changed)
    return difference, base, changed


def assert_named(message: str, parts: tuple[str, ...]) -> None:
    told = message.partition(" differ")[0].removeprefix("it runs another model: its ").rpartition(": ")[2]
    told = told.removeprefix("compared with the attached routers, ")
    assert told.replace(" and ", ", ").split(", ") == [name for name in identity.PARTS if name in parts]


def worker_service(manifest: Manifest) -> ExpertService:
    nothing = cast(Any, None)  # a refusal comes before port and buffer are used
    return ExpertService(nothing, nothing, manifest, torch.float32, data_address="", counters=dict)


async def refusal_at_open_link(worker: Manifest, router: Manifest) -> str:
    request = expert_pb2.OpenLinkRequest(
        router_id="router-1", model_digest=router.digest, dtype="float32", model_parts=router.parts, max_rows=1
    )
    with pytest.raises(FailedPrecondition) as caught:
        await worker_service(worker).OpenLink(request, cast(grpc.aio.ServicerContext, None))
    assert caught.value.reason == "MODEL_DIFFERS"
    return caught.value.message


async def refusal_at_join(known: balancer_pb2.ModelShape, joining: balancer_pb2.ModelShape, role: int) -> str:
    async with running_balancer(MemoryStore()) as running:
        join = running.balancer.rpcs.Join
        worker = balancer_pb2.JoinRequest(role=balancer_pb2.ROLE_WORKER, address="h:1", model=known)
        await join(worker, cast(Any, None))
        again = balancer_pb2.JoinRequest(role=cast(Any, role), address="h:2", model=known)
        await join(again, cast(Any, None))
        other = balancer_pb2.JoinRequest(role=cast(Any, role), address="h:3", model=joining)
        with pytest.raises(CollegiumError) as caught:
            await join(other, cast(Any, None))
    assert caught.value.reason == "OTHER_MODEL"
    return caught.value.message


async def test_one_difference_is_refused_by_its_name_everywhere(pair: tuple[Difference, Path, Path]) -> None:
    difference, base, changed = pair
    ours, theirs = build_manifest(base), build_manifest(changed)
    assert identity.differences(ours.parts, theirs.parts) == [p for p in identity.PARTS if p in difference.parts]
    assert_named(await refusal_at_open_link(ours, theirs), difference.parts)
    for role in (balancer_pb2.ROLE_WORKER, balancer_pb2.ROLE_ROUTER):
        assert_named(
            await refusal_at_join(shape_of(ours, "float32"), shape_of(theirs, "float32"), role), difference.parts
        )
    if difference.parts == (identity.EXPERTS,):
        check_folder(ours, changed)  # a router reads no experts: its workers' checksums find out
    else:
        with pytest.raises(CheckpointError) as caught:  # a router whose manifest is of another folder
            check_folder(ours, changed)
        assert_named(str(caught.value), tuple(p for p in difference.parts if p != identity.ARITHMETIC))
    own = read_text_sources(changed)
    assert bool(identity.differences(read_text_sources(base), own)) == difference.is_of_text


async def test_a_served_dtype_that_differs_is_told_in_words(oracle: Oracle) -> None:
    manifest = build_manifest(base_of("mixtral", oracle))
    told = await refusal_at_join(
        shape_of(manifest, "float32"), shape_of(manifest, "bfloat16"), balancer_pb2.ROLE_WORKER
    )
    assert "dtype (bfloat16 and float32) differs" in told


def _describe(folder: Path) -> FakeRouter:
    manifest = build_manifest(folder)
    return FakeRouter(fake_router.model(digest=manifest.digest, parts=manifest.parts))


async def test_a_gateway_attaches_to_no_router_whose_tokenizer_or_template_differ(
    oracle: Oracle, tmp_path: Path
) -> None:
    base = base_of("mixtral", oracle)
    for name in ("merges", "template"):
        changed = tmp_path / name
        shutil.copytree(base, changed)
        DIFFERENCES[name].edit(changed)
        async with rig(_describe(changed), _describe(base), model_dir=base) as held:
            refused, attached = (held.gateway.pool._attachments[one] for one in held.router_addresses)
            await until(lambda: attached.is_attached and len(refused.last_words) > 0)  # noqa: B023
            assert not refused.is_attached
            assert_named(refused.last_words, DIFFERENCES[name].parts)


async def test_a_gateway_attaches_to_no_second_router_of_another_model(oracle: Oracle, tmp_path: Path) -> None:
    base = base_of("mixtral", oracle)
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    _rope(changed)
    first, second = _describe(base), _describe(changed)
    async with rig(first, model_dir=base) as held:
        address = await second.start()
        held.gateway.pool.set_addresses([*held.router_addresses, address])
        attachment = held.gateway.pool._attachments[address]
        await until(lambda: len(attachment.last_words) > 0)
        assert_named(attachment.last_words, CONFIG)
        await second.stop()


async def test_a_gateway_without_text_files_serves_ids_of_any_router(oracle: Oracle) -> None:
    async with rig(_describe(base_of("mixtral", oracle)), model_dir=oracle.checkpoint("mixtral")) as held:
        assert held.gateway.pool.can_serve


def test_equal_contents_elsewhere_and_later_are_the_same_checkpoint(oracle: Oracle, tmp_path: Path) -> None:
    for arch in ("mixtral", "gpt_oss"):
        base = base_of(arch, oracle)
        ours = build_manifest(base)
        elsewhere = tmp_path / arch / "another name"
        shutil.copytree(base, elsewhere)
        for file in elsewhere.iterdir():
            os.utime(file, (1, 1))
        config = json.loads((elsewhere / "config.json").read_text())
        config |= {"_name_or_path": "else/where", "transformers_version": "4.0", "torch_dtype": "bfloat16"}
        (elsewhere / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
        assert build_manifest(elsewhere).digest == ours.digest
        check_folder(ours, elsewhere)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_shards_and_both_layouts_of_the_same_weights_have_one_identity(arch: str, oracle: Oracle) -> None:
    single, sharded, fused = (
        build_manifest(oracle.checkpoint(arch, variant)) for variant in (Variant.BASE, Variant.SHARDED, Variant.FUSED)
    )
    assert single.parts == sharded.parts == fused.parts


def test_a_manifest_made_again_follows_what_it_was_made_from(oracle: Oracle, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "m.json"
    shutil.copytree(base_of("mixtral", oracle), folder)
    seen = [load_manifest(ensure_manifest(folder, out=out))]
    inode = out.stat().st_ino
    ensure_manifest(folder, out=out)
    assert out.stat().st_ino == inode  # nothing changed: kept
    for name in ("activation", "top-k", "eos", "merges", "template"):
        stats = {path: path.stat() for path in folder.iterdir()}
        DIFFERENCES[name].edit(folder)
        for path, stat in stats.items():  # contents count, whatever a file's time says
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        seen.append(load_manifest(ensure_manifest(folder, out=out)))
    assert seen[-1].form.activation == "gelu"
    assert seen[-1].top_k == 3
    assert len({manifest.digest for manifest in seen}) == len(seen)


def test_an_edited_manifest_is_refused_whatever_was_edited(oracle: Oracle, tmp_path: Path) -> None:
    path = ensure_manifest(base_of("mixtral", oracle), out=tmp_path / "m.json")
    raw = json.loads(path.read_text())
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m.update(top_k=3),
        lambda m: m["form"].update(activation="gelu"),
        lambda m: m["form"].update(clamp=1.0),
        lambda m: m.update(dtype="bfloat16"),
        lambda m: m["sources"].update(tokenizer="0"),
        lambda m: m["layers"][0]["experts"][1].update(checksum="0"),
        lambda m: m["layers"][0]["experts"].reverse(),
        lambda m: m["layers"][0]["experts"][0]["tensors"][0].update(file="../model.safetensors"),
        lambda m: m.pop("seal"),
        lambda m: m.update(seal=None),
        lambda m: m.update(version=1),
        lambda m: m.update(more=1),
    ]
    for edit in edits:
        changed = json.loads(json.dumps(raw))
        edit(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=r"m\.json .*run `collegium manifest`"):
            load_manifest(path)
    path.write_text(json.dumps(raw))
    load_manifest(path)


def test_a_router_whose_manifest_is_of_another_folder_does_not_start(oracle: Oracle, tmp_path: Path) -> None:
    base = base_of("mixtral", oracle)
    changed = tmp_path / base.name
    shutil.copytree(base, changed)
    _rope(changed)
    manifest = ensure_manifest(base, out=tmp_path / "m.json")
    assert find_manifest(Settings(model=base, manifest=manifest)).digest
    with pytest.raises(FailedPrecondition, match=r"config\.json differs"):
        find_manifest(Settings(model=changed, manifest=manifest))
