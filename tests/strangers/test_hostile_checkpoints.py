"""A checkpoint of any contents is served, or refused at once by one sentence that names file and field.

What `collegium manifest` and `collegium up` read before they start anything is tried with every field of config.json
and every entry of a header; what they let through, with the model library.
"""

import json
import os
import random
import re
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM

from collegium.model.architectures import ARCHITECTURES, UnsupportedModelError, architecture_of, read_config
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.checkpoint_survey import survey_checkpoint
from collegium.model.config_fields import check_config, model_fields
from collegium.model.config_rope import HEADS, LATENT, head_width
from collegium.model.manifest import ensure_manifest, load_manifest
from collegium.model.safetensors_files import HEADER_BYTES
from router_svc import library_model
from router_svc.lengths import served_positions
from router_svc.model_loader import load_router_model
from router_svc.paged_attention import ATTENTION_NAME, attend_packed
from tests.checkpoints import DECODERS
from tests.oracle import Oracle

REFUSALS = (CheckpointError, UnsupportedModelError)
GIB = 1 << 30


@pytest.fixture
def folder(oracle: Oracle, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(oracle.checkpoint("mixtral"), copy)
    return copy


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], object], *, pad: bytes = b"") -> None:
    """Change the header of the one file; the tensors' bytes stay."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + pad)


def edit_entry(**changes: object) -> Callable[[Path], None]:
    """Change one attention tensor's entry."""
    key = "model.layers.1.self_attn.k_proj.weight"
    return lambda folder: edit_header(folder, lambda header: header[key].update(changes))


def raw_header(text: bytes, claimed: int | None = None, size: int | None = None) -> Callable[[Path], None]:
    """Write a file of a header and nothing else; `size`: as long as that, without taking room on the disk."""

    def write(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text)
        if size is not None:
            os.truncate(path, size)

    return write


def index_of(weights: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    return write


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return replace


def many_tensors(folder: Path) -> None:
    entry = '"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}'
    raw_header(("{" + ",".join(entry % i for i in range(260_000)) + "}").encode())(folder)


def swap_offsets(folder: Path) -> None:
    def swap(header: dict[str, Any]) -> None:
        one, other = (header[f"model.layers.{i}.self_attn.k_proj.weight"] for i in (0, 1))
        one["data_offsets"] = other["data_offsets"]

    edit_header(folder, swap)


def longrope(**changes: object) -> Callable[[Path], None]:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}
    return lambda folder: edit_config(folder, rope_scaling=rope | changes)


def twice(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    index_of({"x": "a.safetensors", "y": "b.safetensors"})(folder)


# What is done to a checkpoint, and what the refusal names.
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a header of 3 GiB": (raw_header(b"{", 3 * GIB, 4 * GIB), rf"header of {3 * GIB} bytes; the maximum is"),
    "a header of all that fits": (raw_header(b"{", HEADER_BYTES + 1, GIB), "the maximum is"),
    "a header longer than the file": (raw_header(b"{}", 99), "its header does not fit"),
    "a header of 2^64 - 1": (raw_header(b"{}", 2**64 - 1), "its header does not fit"),
    "a header of nothing": (raw_header(b"", 0), "its header does not fit"),
    "a file of 5 bytes": (instead("model.safetensors", lambda p: p.write_bytes(b"12345")), "its header does not fit"),
    "260,000 tensors": (many_tensors, r"has 260000 tensors; the maximum"),
    "a header 100,000 deep": (raw_header(b'{"a":' + b"[" * 100_000), "nested more than"),
    "a header that is a list": (raw_header(b"[1,2]"), "it is no JSON object"),
    "a header that is no UTF-8": (raw_header(b'{"\xff":1}'), "not UTF-8"),
    "a tensor twice in a header": (
        raw_header(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{}}1234'),
        "two values",
    ),
    "a tensor that is a number": (lambda f: edit_header(f, lambda h: h.update(x=1)), "tensor x is of type None"),
    "metadata that is a list": (lambda f: edit_header(f, lambda h: h.update(__metadata__=[])), "__metadata__"),
    "an unknown type": (edit_entry(dtype="F33"), "is of type F33"),
    "a type that is a list": (edit_entry(dtype=[]), "is of type a list"),
    "a negative length": (edit_entry(shape=[-32, -64]), "has shape a list, which is none"),
    "a length of 2^62": (edit_entry(shape=[2**62, 64]), "has shape a list, which is none"),
    "a shape that is text": (edit_entry(shape="32x64"), "has shape 32x64"),
    "another shape than bytes": (edit_entry(shape=[32, 63]), "takes 8064 bytes, its data_offsets .* span 8192"),
    "another type than bytes": (edit_entry(dtype="F16"), "takes 4096 bytes"),
    "offsets that are text": (edit_entry(data_offsets=["0", "8192"]), "data_offsets"),
    "one offset": (edit_entry(data_offsets=[0]), "two numbers are needed"),
    "offsets backwards": (edit_entry(data_offsets=[8192, 0]), "span -8192"),
    "overlapping offsets": (swap_offsets, "overlaps|does not follow"),
    "offsets beyond the end": (edit_entry(data_offsets=[10**12, 10**12 + 8192]), "does not follow|ends inside"),
    "bytes after the end": (lambda f: edit_header(f, lambda h: None, pad=b"12"), "2 bytes after its last tensor"),
    "a tensor that no layer may lack": (
        lambda f: edit_header(f, lambda h: h.update({"x": h.pop("model.layers.1.self_attn.v_proj.weight")})),
        r"decoder layer 1 lacks its tensor self_attn\.v_proj\.weight",
    ),
    "no embedding": (
        lambda f: edit_header(f, lambda h: h.update({"x": h.pop("model.embed_tokens.weight")})),
        "lacks the tensor of the embedding",
    ),
    "two names of one expert's tensor": (
        lambda f: edit_header(
            f,
            lambda h: h.update(
                {"model.layers.0.mlp.experts.0.w1.weight": h.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight")}
            ),
        ),
        "both are the gate of expert 0",
    ),
    "a weight of 8 bits": (
        lambda f: edit_header(
            f, lambda h: h["model.layers.0.self_attn.q_proj.weight"].update(dtype="F8_E4M3", shape=[64, 256])
        ),
        "q_proj",
    ),
    "an index that climbs": (index_of({"a": "../a.safetensors"}), r"names \.\./a\.safetensors for tensor a"),
    "an index of an absolute name": (index_of({"a": "/etc/passwd.safetensors"}), "plain name"),
    "an index of another kind of file": (index_of({"a": "config.json"}), "plain name"),
    "an index of numbers": (index_of({"a": 1}), "plain name"),
    "an index of a list": (index_of([1]), "weight_map is a list"),
    "an index of nothing": (index_of({}), "weight_map is empty"),
    "an index of a file that is missing": (index_of({"a": "c.safetensors"}), "c.safetensors is missing"),
    "an index of a name with a NUL": (index_of({"a": "a\0.safetensors"}), "plain name"),
    "an index of two files with the same tensors": (twice, "is in a.safetensors too"),
    "a folder for the weights": (instead("model.safetensors", lambda p: p.mkdir()), "is a directory"),
    "a FIFO for the weights": (instead("model.safetensors", os.mkfifo), "is a FIFO"),
    "a device for the weights": (instead("model.safetensors", lambda p: p.symlink_to("/dev/zero")), "is a device"),
    "a FIFO for the config": (instead("config.json", os.mkfifo), "is a FIFO"),
    "a FIFO for the generation config": (instead("generation_config.json", os.mkfifo), "is a FIFO"),
    "weights without index": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        "holds neither model.safetensors nor",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapters are not served"),
    "10^9 layers": (lambda f: edit_config(f, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "4 layers of 3": (lambda f: edit_config(f, num_hidden_layers=4), "num_hidden_layers is 4; .* of 3 layers"),
    "0 layers": (lambda f: edit_config(f, num_hidden_layers=0), "num_hidden_layers is 0"),
    "0 heads": (lambda f: edit_config(f, num_attention_heads=0), "num_attention_heads is 0"),
    "3 heads for 2": (lambda f: edit_config(f, num_attention_heads=3), "num_attention_heads is 3"),
    "8 heads": (lambda f: edit_config(f, num_attention_heads=8), "self_attn.* has shape .*; by config.json"),
    "0 experts": (lambda f: edit_config(f, num_local_experts=0), "num_local_experts is 0"),
    "true experts": (lambda f: edit_config(f, num_local_experts=True), "num_local_experts is True"),
    "10^9 experts": (lambda f: edit_config(f, num_local_experts=10**9), "num_local_experts is 1000000000"),
    "other experts by another name": (lambda f: edit_config(f, num_experts=4), "num_experts is 4 and num_local_exp"),
    "top-k 0": (lambda f: edit_config(f, num_experts_per_tok=0), "num_experts_per_tok is 0"),
    "top-k above the experts": (lambda f: edit_config(f, num_experts_per_tok=9), "9 experts are chosen .* are 8"),
    "vocabulary 0": (lambda f: edit_config(f, vocab_size=0), "vocab_size is 0"),
    "another vocabulary": (lambda f: edit_config(f, vocab_size=321), r"embed_tokens.* by config.json it is \[321"),
    "another width": (lambda f: edit_config(f, hidden_size=32), "hidden_size is 32; the experts"),
    "a width of text": (lambda f: edit_config(f, hidden_size="64"), "hidden_size is the text '64'"),
    "eos of text": (lambda f: edit_config(f, eos_token_id="</s>"), "eos_token_id is the text '</s>'"),
    "eos of lists": (lambda f: edit_config(f, eos_token_id=[[1]]), "eos_token_id is a list"),
    "eos of text beside the config": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "generation_config.json: eos_token_id",
    ),
    "padding outside the vocabulary": (lambda f: edit_config(f, pad_token_id=320), "pad_token_id is 320"),
    "rope_theta NaN": (lambda f: edit_config(f, rope_theta=float("nan")), "rope_theta is nan"),
    "rope_theta infinite": (lambda f: edit_config(f, rope_parameters={"rope_theta": 1e999}), "rope_theta is inf"),
    "rope_theta negative": (lambda f: edit_config(f, rope_theta=-1.0), "rope_theta is -1.0"),
    "rope factor 0": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "yarn", "factor": 0}),
        r"rope_scaling\.factor is 0",
    ),
    "rope of an unknown type": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "spiral"}),
        "rope_type is the text 'spiral'",
    ),
    "rope that depends on the batch": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope_scaling.rope_type is the text 'dynamic'; it makes positions depend on the batch",
    ),
    "rope for each kind of layer": (
        lambda f: edit_config(f, rope_parameters={"full_attention": {"rope_type": "default"}}),
        r"rope_parameters\.full_attention is an object",
    ),
    "yarn of one wavelength": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}),
        "rope_theta is 1.0; with rope type yarn",
    ),
    "layers with configs of their own": (
        lambda f: edit_config(f, per_layer_config={"0": {"hidden_size": 8}}),
        "per_layer_config gives layers configs of their own",
    ),
    "norms without their epsilon": (lambda f: edit_config(f, rms_norm_eps=None), "rms_norm_eps is null"),
    "null for true or false": (lambda f: edit_config(f, tie_word_embeddings=None), "tie_word_embeddings is null"),
    "rope_theta null": (lambda f: edit_config(f, rope_parameters={"rope_theta": None}), "rope_theta is null"),
    "linear rope without its factor": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear"}),
        "rope_parameters lacks factor, which rope type linear needs",
    ),
    "llama3's rope with one frequency twice": (
        lambda f: edit_config(
            f,
            rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        ),
        "high_freq_factor is 4.0; it must be more than",
    ),
    "longrope without its factors": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 8}),
        "rope_scaling lacks long_factor",
    ),
    "longrope of another head": (longrope(long_factor=[1.0] * 7), "long_factor has 7 numbers; .* rotated by 8"),
    "longrope of text": (longrope(short_factor="1.0"), "short_factor is text; it must be a list"),
    "longrope of texts": (longrope(short_factor=["1.0"] * 8), r"short_factor\[0\] is the text '1.0'"),
    "longrope of zeros": (longrope(long_factor=[1.0] * 7 + [0.0]), r"long_factor\[7\] is 0.0"),
    "longrope of nothing": (longrope(long_factor=[]), "long_factor has 0 numbers"),
    "kinds of layers that are too few": (
        lambda f: edit_config(f, layer_types=["full_attention"] * 2),
        "layer_types names 2 layers; there are 3",
    ),
    "no kinds of layers": (lambda f: edit_config(f, layer_types=[]), "layer_types names 0 layers; there are 3"),
    "a kind of layer that is not served": (
        lambda f: edit_config(f, layer_types=["full_attention", "sliding_attention", "linear_attention"]),
        r"layer_types\[2\] is the text 'linear_attention'; it must be one of full_attention, sliding_attention",
    ),
    "a kind of layer that is a number": (lambda f: edit_config(f, layer_types=[5, 5, 5]), r"layer_types\[0\] is 5"),
    "a dense layer beyond the last": (lambda f: edit_config(f, mlp_only_layers=[0, 3]), r"mlp_only_layers\[1\] is 3"),
    "a dense layer that is text": (
        lambda f: edit_config(f, mlp_only_layers=["0"]),
        r"mlp_only_layers\[0\] is the text",
    ),
    "a dense layer below the first": (lambda f: edit_config(f, mlp_only_layers=[-1]), "from 0 to 2"),
    "rope that is text": (lambda f: edit_config(f, rope_scaling="yarn"), "rope_scaling is text, not an object"),
    "a name for each of 10^9 labels": (lambda f: edit_config(f, num_labels=10**9), "num_labels is 1000000000"),
    "a model type that is a list": (lambda f: edit_config(f, model_type=["mixtral"]), "model type a list is not supp"),
    "an activation that is a number": (lambda f: edit_config(f, hidden_act=5), "hidden_act is 5"),
    "a surrogate": (lambda f: edit_config(f, hidden_act="\ud800"), r"hidden_act '\\+ud800' is not supported"),
}


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Let this process take 2 GiB more address space at most."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * GIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_a_hostile_checkpoint_is_refused_at_once_by_what_is_wrong(kind: str, folder: Path, tmp_path: Path) -> None:
    spoil, why = HOSTILE[kind]
    spoil(folder)
    for refuse in (
        lambda: survey_checkpoint(folder),
        lambda: ensure_manifest(folder, out=tmp_path / "m.json"),
        lambda: load_router_model(folder, torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(REFUSALS, match=why) as caught:
            refuse()
        assert_sentence(str(caught.value), folder)
    assert not (tmp_path / "m.json").exists()


# What published configs have, or once had, that transformers 5.23 itself refuses.
ODD_BUT_PLAIN: dict[str, dict[str, object]] = {
    "a whole number for a fraction": {"rms_norm_eps": 0, "rope_theta": 10**6, "attention_dropout": 0},
    "types of weights": {"dtype": "auto", "torch_dtype": "torch.float32"},
    "a number for a type": {"dtype": 5},
    "code of transformers": {"_experts_implementation": "fast", "_attn_implementation": "user/repo"},
    "training": {"router_jitter_noise": None, "output_router_logits": None, "return_dict": False, "use_cache": None},
    "fields of other libraries": {"text_config": True, "attribute_map": 5, "id2label": [], "auto_map": 5},
    "kinds of layers by their older name": {"layer_types": ["attention"] * 3},
}


@pytest.mark.parametrize("kind", ODD_BUT_PLAIN)
def test_what_does_not_matter_or_means_one_thing_is_served(kind: str, folder: Path) -> None:
    edit_config(folder, **ODD_BUT_PLAIN[kind])
    assert load_router_model(folder, torch.float32, torch.device("cpu")).max_positions == 1024


def test_null_heads_for_keys_are_as_many_as_for_queries() -> None:
    fields = model_fields({"num_key_value_heads": None, "num_attention_heads": 4, "hidden_size": 64})
    assert (fields["num_key_value_heads"], fields["head_dim"]) == (4, 16)


@pytest.mark.parametrize("arch", DECODERS)
def test_heads_that_config_json_does_not_count_are_as_many_as_transformers_has(arch: str) -> None:
    config = CONFIG_MAPPING[arch]()
    if arch not in LATENT:
        assert HEADS.get(arch, 32) == config.num_attention_heads
        told = {"model_type": arch, "hidden_size": config.hidden_size}
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert head_width(told) == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"moe_layer_start_index": 3},
            "moe_layer_start_index is 3, moe_layer_end_index -1 and moe_layer_interval 1;",
        ),
        ({"moe_layer_end_index": 0, "moe_layer_start_index": 1}, "moe_layer_end_index 0"),
        ({"moe_layer_interval": 9}, "moe_layer_interval 9; no layer of"),
        ({"num_attention_heads": None, "hidden_size": 64}, "heads are 3 wide, as num_attention_heads is the arch"),
        ({"num_attention_heads": None, "hidden_size": 16}, "heads are 0 wide, as num_attention_heads is the arch"),
        ({"num_attention_heads": 64, "hidden_size": 320}, "heads are 5 wide; the width must be even"),
    ],
)
def test_what_leaves_no_layer_with_experts_or_heads_of_no_use_is_named(
    changes: dict[str, Any], message: str, oracle: Oracle
) -> None:
    config = read_config(oracle.checkpoint("ernie4_5_moe")) | {"moe_layer_end_index": -1, "moe_layer_interval": 1}
    config = {name: value for name, value in (config | changes).items() if value is not None and name != "head_dim"}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check_config(Path("config.json"), config)


def assert_sentence(message: str, folder: Path) -> None:
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 600 + len(str(folder))


VALUES = (None, True, -1, 0, 3, 10**9, 10**30, 1.5, 1e300, float("nan"), "", "text", [], ["a"], {}, {"a": 1}, [[[]]])


def places(config: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Iterate over the fields of a config and of the objects in it."""
    for name, value in config.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


def changed(config: dict[str, Any], place: tuple[str, ...], value: object) -> str:
    copy = json.loads(json.dumps(config))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return json.dumps(copy)


def mostly_soak(names: Iterable[str], in_every_run: Collection[str]) -> list[Any]:
    """Leave all but a few to `make soak`."""
    return [name if name in in_every_run else pytest.param(name, marks=pytest.mark.soak) for name in sorted(names)]


IN_EVERY_RUN = ("mixtral", "deepseek_v3", "dbrx")  # of each way to write a config


def without_config(checkpoint: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Link a checkpoint's files into a new folder, but for config.json: its path there, and what it holds."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    return folder / "config.json", json.loads((checkpoint / "config.json").read_text())


@pytest.mark.parametrize("arch", mostly_soak(ARCHITECTURES, IN_EVERY_RUN))
def test_every_field_of_a_config_takes_every_value_or_is_refused(arch: str, oracle: Oracle, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    path, config = without_config(oracle.checkpoint(arch), folder)
    num_refused = num_served = 0
    for place in [*places(config), ("head_dim",), ("rope_scaling",), ("n_group",), ("ffn_config",)]:
        for value in VALUES if arch == "mixtral" else VALUES[1:12:2]:
            path.write_text(changed(config, place, value))
            try:
                survey_checkpoint(folder)
                num_served += 1
            except REFUSALS as error:
                num_refused += 1
                assert_sentence(str(error), folder)
    assert num_refused > num_served / 4 > 0


MISSING = object()
# Fields that a config may lack, each with every value; those in objects by dotted name.
BESIDE = (
    *(
        "layer_types",
        "mlp_only_layers",
        "head_dim",
        "rope_theta",
        "partial_rotary_factor",
        "rotary_dim",
        "rope_scaling",
    ),
    *("num_key_value_heads", "sliding_window", "rms_norm_eps", "hidden_act", "clip_qkv", "tie_word_embeddings"),
    *("dtype", "torch_dtype", "_attn_implementation", "_experts_implementation", "experts_implementation"),
    *("text_config", "per_layer_config", "auto_map", "id2label", "return_dict", "attribute_map", "config_class"),
    *("rope_parameters.rope_type", "rope_parameters.factor", "rope_parameters.partial_rotary_factor"),
)
ODD = (*VALUES, 1, 2, 0.5, -1.0, "auto", "int8", [0], [-1], *(["full_attention"] * n for n in (3, 4)), [{}])
ROPES: dict[str, dict[str, object]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": False},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0, "attention_factor": 1.5},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def mutated(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Iterate over configs in which one field is missing or has an odd value, and over odd rotary parameters."""

    def put(place: tuple[str, ...], value: object, of: dict[str, Any] = config) -> dict[str, Any]:
        inner = copy = json.loads(json.dumps(of))
        for name in place[:-1]:
            inner = inner.setdefault(name, {})
        inner[place[-1]] = value
        if value is MISSING:
            inner.pop(place[-1])
        return copy

    for place in [*places(config), *(tuple(name.split(".")) for name in BESIDE)]:
        for value in (MISSING, *ODD):
            yield put(place, value)
    extremes = {"original_max_position_embeddings": 48, "short_mscale": 1.0, "long_mscale": 1.0}
    for kind, fields in ROPES.items():
        rope = {"rope_type": kind, "rope_theta": 1e4} | fields | extremes
        for name in rope:
            for value in (MISSING, None, 0, 1, 4.0, "x", [], [1.0], ["a"] * 8, [1.0] * 8, [None] * 8, {}):
                yield put(("rope_scaling", name), value, config | {"rope_scaling": rope})


def build(folder: Path) -> None:
    """Build transformers' model of a config, whatever the weights, and compute a token with it."""
    config = library_model.config_of(read_config(folder))
    meta = torch.device("meta")  # no numbers
    with meta:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    library_model.number_layers(model)
    model.set_attn_implementation(ATTENTION_NAME)
    model.eval().requires_grad_(False)
    library_model.probe_cache(model, meta)
    assert served_positions(config) > 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("arch", "num_built"),
    [("qwen2_moe", 40), *(pytest.param(arch, 10**6, marks=pytest.mark.soak) for arch in DECODERS)],
)
def test_what_is_not_refused_before_anything_starts_is_built(
    arch: str, num_built: int, oracle: Oracle, tmp_path: Path
) -> None:
    AttentionInterface.register(ATTENTION_NAME, attend_packed)
    folder = tmp_path / "model"
    path, config = without_config(oracle.checkpoint(arch), folder)
    accepted: dict[str, dict[str, Any]] = {}  # by what counts of them
    num_refused = 0
    for one in mutated(config):
        try:
            check_config(path, one)
            architecture_of(one)
        except REFUSALS:
            num_refused += 1
        else:
            accepted.setdefault(json.dumps(model_fields(one), sort_keys=True), one)
    assert num_refused > len(accepted) > 40
    late: list[str] = []
    module = sys.modules[AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[arch]].__module__]
    with pytest.MonkeyPatch.context() as patched:  # as a router does, which looks through every module at each load
        for name in [name for name in vars(module) if re.match(library_model._EXPERTS_CLASS, name)]:
            patched.setattr(module, name, library_model.RemoteExperts)
        for one in random.Random(1).sample([*accepted.values()], min(num_built, len(accepted))):
            path.write_text(json.dumps(one))
            try:
                survey_checkpoint(folder)
            except REFUSALS:
                continue
            try:
                build(folder)
            except Exception as error:
                if "on meta tensors" in str(error):  # phimoe looks at positions: they are numbers
                    continue
                changes = {name: one.get(name) for name in {*one, *config} if one.get(name) != config.get(name)}
                late.append(f"{changes}: {type(error).__name__}: {str(error)[-200:]}")
    assert not late, "\n".join(late)


def test_a_load_that_failed_leaves_the_model_library_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise TypeError("no model")

    with monkeypatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(CheckpointError, match=r"cannot be loaded as its config.json says: TypeError: no model"):
            load_router_model(folder, torch.float32, torch.device("cpu"), "transformers")
    load_router_model(folder, torch.float32, torch.device("cpu"), "transformers")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
PAIRS = st.lists(st.integers(0, 9000), min_size=2, max_size=2)


@pytest.mark.parametrize("num_examples", [60, pytest.param(3000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_any_entry_of_a_header_is_read_or_refused(num_examples: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    original, size = data[8 : 8 + length], len(data) - 8 - length
    keys = sorted(json.loads(original))
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=num_examples)
    @given(
        key=st.sampled_from(keys),
        kind=st.sampled_from(["entry", "dtype", "shape", "data_offsets", "name", "gone", "copy"]),
        value=ANYTHING | PAIRS,
        name=st.text(max_size=40) | st.sampled_from(keys),
    )
    def spoil(key: str, kind: str, value: object, name: str) -> None:
        header = json.loads(original)
        match kind:
            case "entry":
                header[key] = value
            case "name":
                header[name] = header.pop(key)
            case "gone":
                del header[key]
            case "copy":
                header[name] = header[key]
            case field:
                header[key][field] = value
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + size)  # what the tensors hold does not matter
        try:
            survey_checkpoint(folder)
            outcomes["read"] += 1
        except REFUSALS as error:
            assert_sentence(str(error), folder)
            outcomes["refused"] += 1

    spoil()
    assert outcomes["refused"] > num_examples / 3


def test_any_manifest_is_read_or_refused(oracle: Oracle, tmp_path: Path) -> None:
    from collegium.model import manifest_file

    path = ensure_manifest(oracle.checkpoint("mixtral"), out=tmp_path / "m.json")
    raw = json.loads(path.read_text())
    del raw["seal"]
    raw["layers"] = [raw["layers"][0] | {"experts": raw["layers"][0]["experts"][:1]}]
    deep = raw["layers"][0]["experts"][0]["tensors"][0]
    spots = [(raw, name) for name in raw] + [(deep, name) for name in deep] + [(raw["form"], n) for n in raw["form"]]
    spots += [(raw["layers"][0], "experts"), (raw["files"], "model.safetensors")]
    num_refused = 0
    for holder, name in spots:
        kept = holder[name]
        for value in (*VALUES, "../x", "/etc/passwd", ["float32"], [-1, 2], [0]):
            holder[name] = value
            path.write_text(json.dumps({"seal": manifest_file._seal_of(raw), **raw}))  # by one who knows the seal
            try:
                load_manifest(path)
            except CheckpointError as error:
                num_refused += 1
                assert "m.json" in str(error)
                assert len(str(error)) < 700
        holder[name] = kept
    assert num_refused > 300
