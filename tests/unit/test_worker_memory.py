"""A worker's memory: budgets and what they come to, what tiers check, and that kernels read slots and nothing else."""

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from collegium.buffering.policies import ExpertId
from collegium.fabric.byte_size import ByteSize, MemoryBudget
from collegium.fabric.errors import FailedPrecondition
from collegium.model.architectures import Activation, CheckpointError, ExpertForm, Layout, Role
from collegium.model.experts import PackedExpert, expert_run, gated, run_experts
from collegium.model.manifest import Manifest, build_manifest
from collegium.model.weights import ExpertReader, ExpertWeights
from expert_svc.budget import ModelBytes, plan_memory
from expert_svc.buffer import ExpertBuffer
from expert_svc.memory import bytes_of, make_buffer
from expert_svc.slots import blank_slot
from expert_svc.tiers import Arena, Disk, Tier
from tests.oracle import Oracle

ROOT = Path(__file__).parents[2]
NONE = MemoryBudget()
LAYOUTS = {"mixtral": Layout.PER_EXPERT, "granitemoe": Layout.FUSED, "gpt_oss": Layout.FUSED_TRANSPOSED}
LAYOUTS |= {"dbrx": Layout.STACKED}


# --- budgets ---


@pytest.mark.parametrize(
    ("text", "of_1001"),
    [("", 0), ("25%", 251), (" 12.5 % ", 126), ("100%", 1001), ("4096", 4096), ("1.5KiB", 1536), ("1e3", 1000)],
)
def test_a_budget_is_a_size_or_a_share_that_is_rounded_up(text: str, of_1001: int) -> None:
    budget = MemoryBudget.parse(text)
    assert budget.bytes_of(1001) == of_1001
    assert bool(budget) == bool(of_1001)
    assert budget.is_share == ("%" in text)
    assert MemoryBudget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-5%", "-5", "a lot", "5 %%", "%", "nan%", "1 furlong"])
def test_a_budget_that_cannot_be_is_refused_with_the_forms_that_can(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as (25%|512MiB)|at least 1 byte"):
        MemoryBudget.parse(text)


SIZES = st.integers(1, 10**7)
MODELS = st.builds(
    ModelBytes,
    num_experts=st.integers(2, 500),
    num_layers=st.integers(1, 20),
    top_k=st.integers(1, 8),
    expert_bytes=st.integers(1, 10**5),
    staging_bytes=st.integers(0, 2 * 10**5),
    is_on_device=st.booleans(),
)
BUDGETS = st.one_of(
    st.builds(lambda size: MemoryBudget(size=size), SIZES),
    st.builds(lambda percent: MemoryBudget(share=percent / 100), st.integers(1, 100)),
)


@given(model=MODELS, expert_memory=BUDGETS, host_memory=st.one_of(st.just(NONE), BUDGETS), num_sets=st.integers(1, 3))
def test_a_plan_stays_within_its_budgets_or_names_the_least_that_works(
    model: ModelBytes, expert_memory: MemoryBudget, host_memory: MemoryBudget, num_sets: int
) -> None:
    budgets = {"--expert-memory": expert_memory, "--host-memory": host_memory}

    def plan(changed: dict[str, MemoryBudget]):  # type: ignore[no-untyped-def]
        both = budgets | changed
        return plan_memory(model, both["--expert-memory"], both["--host-memory"], num_staging_sets=num_sets)

    for _ in range(2):  # either budget may be too small, or both
        try:
            made = plan({})
            break
        except FailedPrecondition as error:
            assert error.field is not None
            least = ByteSize.parse(str(re.search(r"give at least (\S+)", str(error))[1]))  # type: ignore[index]
            with pytest.raises(FailedPrecondition):
                plan({error.field: MemoryBudget(size=least - 1)})
            budgets[error.field] = MemoryBudget(size=least)
    else:
        made = plan({})
    total, staging = model.num_experts * model.expert_bytes, num_sets * model.staging_bytes
    slots = made.num_slots * model.expert_bytes
    places = made.num_places * model.expert_bytes
    beside = 0 if host_memory or model.is_on_device else staging
    assert 2 <= made.num_slots <= model.num_experts
    assert bool(made.num_places) == bool(host_memory)
    assert slots + beside <= budgets["--expert-memory"].bytes_of(total)
    host = budgets["--host-memory"]
    if host:
        assert places + (0 if host.is_share else staging) <= host.bytes_of(total)
    if made.num_slots < model.num_experts:  # and nothing is left lying
        assert slots + beside > budgets["--expert-memory"].bytes_of(total) - model.expert_bytes
    assert made.is_below_token_cycle(model.expert_bytes) == (made.num_slots < model.num_layers * model.top_k)


def test_without_a_budget_there_is_no_limit_and_no_warning() -> None:
    model = ModelBytes(num_experts=8, num_layers=2, top_k=2, expert_bytes=100, staging_bytes=10)
    made = plan_memory(model, NONE, NONE, num_staging_sets=2)
    assert (made.num_slots, made.num_places, made.token_cycle_bytes) == (None, 0, 400)
    assert not made.is_below_token_cycle(100)
    assert made.least_bytes == 220


def test_the_buffer_is_refused_below_two_slots_and_warned_of_below_the_token_cycle(
    oracle: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = build_manifest(oracle.checkpoint("mixtral"))
    model = bytes_of(manifest, torch.float32)
    caplog.set_level("WARNING", "collegium")

    def make(size: int) -> ExpertBuffer:
        budget = MemoryBudget(size=size)
        return make_buffer(manifest, torch.float32, expert_memory=budget, host_memory=NONE, num_load_threads=1)

    least = plan_memory(model, NONE, NONE, num_staging_sets=2).least_bytes
    with pytest.raises(FailedPrecondition, match=str(ByteSize(least))) as raised:
        make(least - 1)
    assert (raised.value.field, raised.value.reason) == ("--expert-memory", "MEMORY_TOO_SMALL")
    cycle = 3 * 2 * model.expert_bytes  # layers times top-k
    for size, num_slots, is_warned in ((least, 2, True), (least + cycle, 8, False)):
        caplog.clear()
        buffer = make(size)
        assert buffer.budget_bytes == num_slots * model.expert_bytes
        assert ("less than one token's experts" in caplog.text) == is_warned
        assert buffer.warm((layer, e) for layer in range(3) for e in range(8)) == buffer.max_resident < num_slots
        buffer.close()


# --- reading ---


def as_before(manifest: Manifest, files: dict[str, dict[str, Tensor]], layer: int, expert: int) -> ExpertWeights:
    """One expert out of whole tensors, as the architecture's own code would slice them."""
    parts: dict[Role, Tensor] = {}
    for ref in manifest.layers[layer].experts[expert].tensors:
        whole = files[ref.file][ref.key]
        match manifest.layout:
            case Layout.PER_EXPERT:
                parts[ref.role] = whole
            case Layout.STACKED:
                parts[ref.role] = whole.view(-1, manifest.d_ffn, manifest.d_model)[expert]
            case _:
                parts[ref.role] = whole[expert]
    match manifest.layout:
        case Layout.PER_EXPERT:
            return ExpertWeights(gate_up=torch.cat([parts[Role.GATE], parts[Role.UP]]), down=parts[Role.DOWN])
        case Layout.FUSED:
            return ExpertWeights(gate_up=parts[Role.GATE_UP], down=parts[Role.DOWN])
        case Layout.STACKED:
            return ExpertWeights(gate_up=torch.cat([parts[Role.GATE], parts[Role.UP]]), down=parts[Role.DOWN].t())
        case Layout.FUSED_TRANSPOSED:
            both, bias = parts[Role.GATE_UP].t(), parts[Role.GATE_UP_BIAS]
            return ExpertWeights(
                gate_up=torch.cat([both[::2], both[1::2]]),
                down=parts[Role.DOWN].t(),
                gate_up_bias=torch.cat([bias[::2], bias[1::2]]),
                down_bias=parts[Role.DOWN_BIAS],
            )


def parts_of(weights: ExpertWeights) -> list[Tensor]:
    """The tensors that there are."""
    parts = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", LAYOUTS)
def test_a_reader_gives_every_layout_in_one_form_and_uses_its_memory_again(
    arch: str, dtype: torch.dtype, oracle: Oracle
) -> None:
    manifest = build_manifest(oracle.checkpoint(arch))
    assert manifest.layout == LAYOUTS[arch]
    files = {name: load_file(Path(manifest.model_dir) / name) for name in manifest.files}
    reader = ExpertReader(manifest, dtype)
    addresses: set[tuple[int, ...]] = set()
    for layer, expert in ((0, 0), (1, 3), (2, 7), (0, 0)):
        found, expected = reader.read(layer, expert), as_before(manifest, files, layer, expert)
        assert len(parts_of(found)) == len(parts_of(expected)) == (4 if arch == "gpt_oss" else 2)
        for one, other in zip(parts_of(found), parts_of(expected), strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other.to(dtype))
        addresses.add(tuple(part.data_ptr() for part in parts_of(found)))
    assert len(addresses) == 1
    is_as_stored = dtype == torch.float32 and manifest.layout in (Layout.PER_EXPERT, Layout.FUSED)
    stored_bytes = 4 * manifest.num_params
    assert reader.num_bytes == stored_bytes + (0 if is_as_stored else dtype.itemsize * manifest.num_params)


# --- slots ---


def outputs(expert: PackedExpert, dtype: torch.dtype, d_model: int, form: ExpertForm) -> list[Tensor]:
    """What an expert makes of fixed rows."""
    rows = torch.randn(3, d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    return [run_experts(rows, [expert], [3], np.arange(3), np.ones(3, np.float32), form)]


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all are the same bits."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", LAYOUTS)
def test_an_expert_that_was_copied_through_memory_computes_the_same(
    arch: str, dtype: torch.dtype, oracle: Oracle
) -> None:
    manifest = build_manifest(oracle.checkpoint(arch))
    weights = ExpertReader(manifest, dtype).read(1, 2)
    packed, sizes = PackedExpert(weights), (manifest.d_model, manifest.form)
    expected = outputs(packed, dtype, *sizes)
    rows = torch.randn(3, manifest.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden = gated(F.linear(rows, weights.gate_up, weights.gate_up_bias), manifest.form)
    assert torch.allclose(expected[0], F.linear(hidden, weights.down, weights.down_bias), rtol=2e-2, atol=2e-2)
    for part in parts_of(weights):
        part.zero_()  # the reader's memory: packed weights are a copy
    assert are_equal(outputs(packed, dtype, *sizes), expected)
    slot, other = blank_slot(manifest, dtype), blank_slot(manifest, dtype)
    assert slot.num_bytes == packed.num_bytes >= dtype.itemsize * manifest.num_params
    assert not are_equal(outputs(slot, dtype, *sizes), expected)
    memory = ctypes.create_string_buffer(packed.num_bytes)
    packed.copy_to(ctypes.addressof(memory))
    slot.copy_from(ctypes.addressof(memory))
    other.take(slot)
    slot.take(blank_slot(manifest, dtype))
    assert are_equal(outputs(other, dtype, *sizes), expected)
    assert not are_equal(outputs(slot, dtype, *sizes), expected)


def test_kernels_read_slots_and_nothing_behind_them(oracle: Oracle) -> None:
    manifest = build_manifest(oracle.checkpoint("mixtral"))
    all_experts = [(layer, expert) for layer in range(3) for expert in range(8)]
    expert_bytes = bytes_of(manifest, torch.float32).expert_bytes
    arena = Arena(Disk(manifest, torch.float32, num_sets=1), num_places=24, expert_bytes=expert_bytes)
    budget, everything = MemoryBudget(size=12 * expert_bytes), MemoryBudget(share=1.0)
    buffer = make_buffer(manifest, torch.float32, expert_memory=budget, host_memory=everything, source=arena)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    pair_rows, weights = np.arange(4), np.ones(4, np.float32)

    def compute(expert_id: ExpertId) -> tuple[Tensor, PackedExpert | None, bool]:
        """What an expert makes of x, the slot that it was in, and whether it had to be loaded."""
        visit = buffer.begin(expert_id[0], [expert_id[1]], [4], 4)
        run, slot = expert_run(x, [4], pair_rows, manifest.form), None
        while not visit.is_over:
            if groups := buffer.landed(visit):
                slot = visit.slots[0]
                assert slot is not None
                run.compute(groups, [slot])
                buffer.release(visit, groups)
            else:
                buffer.help()
        buffer.finish(visit)
        return run.result(pair_rows, weights), slot, bool(visit.missed)

    for expert_id in all_experts:
        arena.fill(expert_id, blank_slot(manifest, torch.float32))
    buffer.warm(all_experts)
    hit, missed = all_experts[0], next(one for one in all_experts if not buffer.is_resident(one))
    before, _, has_missed = compute(hit)
    assert not has_missed
    ctypes.memset(arena._memory.data_ptr(), 0, arena._memory.nbytes)
    same, slot, has_missed = compute(hit)
    assert not has_missed
    assert torch.equal(same, before)
    zeros, _, has_missed = compute(missed)  # copied from the arena, as it is now, without another look at the disk
    assert has_missed
    assert not zeros.any()
    assert slot is not None
    slot.take(blank_slot(manifest, torch.float32))
    assert not compute(hit)[0].any()
    buffer.close()


RSS = """
import ctypes, os, re, sys
import torch
from collegium.fabric.byte_size import MemoryBudget
from collegium.model.architectures import Activation, ExpertForm, Layout, Role
from collegium.model.manifest import ExpertEntry, LayerEntry, Manifest, TensorRef
from expert_svc.memory import bytes_of, make_buffer
from expert_svc.tiers import Tier

NUM_EXPERTS, D_MODEL, D_FFN = 24, 1024, 1024
ref = lambda role, *shape: TensorRef(file="", key="", role=role, offset=0, shape=shape, dtype="F32")
tensors = (ref(Role.GATE, D_FFN, D_MODEL), ref(Role.UP, D_FFN, D_MODEL), ref(Role.DOWN, D_MODEL, D_FFN))
experts = (ExpertEntry(tensors=tensors, checksum=""),) * NUM_EXPERTS
manifest = Manifest(model_dir="", model_type="", layout=Layout.PER_EXPERT, form=ExpertForm(activation=Activation.SILU),
                    d_model=D_MODEL, d_ffn=D_FFN, top_k=2, dtype="float32",
                    layers=(LayerEntry(decoder_layer=0, experts=experts),), files={}, sources={}, stored_dtypes={})

class Source:
    def fill(self, expert_id, slot):
        slot.copy_from(memory)
        return Tier.HOST

model = bytes_of(manifest, torch.float32)
block = ctypes.create_string_buffer(model.expert_bytes)
memory = ctypes.addressof(block)
for num_slots in map(int, sys.argv[1:]):
    if os.fork():
        os.wait()
        continue
    size = MemoryBudget(size=num_slots * model.expert_bytes + 2 * model.staging_bytes)
    buffer = make_buffer(manifest, torch.float32, expert_memory=size, host_memory=MemoryBudget(), source=Source())
    assert buffer.budget_bytes == num_slots * model.expert_bytes
    for expert in range(NUM_EXPERTS):
        visit = buffer.begin(0, [expert], [1], 1)
        while not visit.is_over:
            buffer.landed(visit) or buffer.help()
        buffer.finish(visit)
    assert buffer.totals.evictions
    with open("/proc/self/smaps_rollup") as file:
        print(buffer.budget_bytes, 1024 * int(re.search("Anonymous: +([0-9]+) kB", file.read())[1]), flush=True)
    os._exit(0)
"""


def test_anonymous_memory_grows_by_what_the_budget_does() -> None:
    command = [sys.executable, "-c", RSS, "4", "14"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    small, before, large, after = map(int, done.stdout.split())
    assert large - small > 100e6
    assert abs((after - before) / (large - small) - 1) < 0.05


# --- the arena ---


class Behind:
    """A source that is counted, and that can be watched."""

    def __init__(self, inner: Disk):
        self._inner = inner
        self.fills: list[ExpertId] = []
        self.during: Callable[[], object] = lambda: None

    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        self.fills.append(expert_id)
        self.during()
        return self._inner.fill(expert_id, slot)


class WatchedSlot:
    """A slot that calls while it is being copied to or from."""

    def __init__(self, slot: PackedExpert, during: Callable[[], object]):
        self._slot, self._during, self.num_bytes = slot, during, slot.num_bytes

    def copy_from(self, address: int) -> None:
        self._during()
        self._slot.copy_from(address)

    def copy_to(self, address: int) -> None:
        self._during()
        self._slot.copy_to(address)

    def load(self, weights: ExpertWeights) -> None:
        self._slot.load(weights)


class ArenaRig:
    """An arena of so many places in front of a checkpoint that a test may damage."""

    def __init__(self, checkpoint: Path, num_places: int):
        self.manifest = build_manifest(checkpoint)
        self.behind = Behind(Disk(self.manifest, torch.float32, num_sets=2))
        self.slot = blank_slot(self.manifest, torch.float32)
        self.arena = Arena(self.behind, num_places=num_places, expert_bytes=self.slot.num_bytes)

    def fill(self, expert_id: ExpertId, slot: object = None) -> Tier:
        return self.arena.fill(expert_id, slot or self.slot)  # type: ignore[arg-type]

    def holds(self, expert_id: ExpertId) -> bool:
        """Whether the rig's slot holds that expert."""
        expected = PackedExpert(ExpertReader(self.manifest, torch.float32).read(*expert_id))
        sizes = (self.manifest.d_model, self.manifest.form)
        return are_equal(outputs(self.slot, torch.float32, *sizes), outputs(expected, torch.float32, *sizes))

    def damage(self, expert_id: ExpertId) -> None:
        ref = self.manifest.layers[expert_id[0]].experts[expert_id[1]].tensors[0]
        with (Path(self.manifest.model_dir) / ref.file).open("r+b") as file:
            file.seek(ref.offset + 8)
            file.write(b"\x55" * 16)


@pytest.fixture
def checkpoint(oracle: Oracle, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(oracle.checkpoint("mixtral"), copy)
    return copy


def test_the_arena_keeps_what_was_used_last(oracle: Oracle) -> None:
    rig = ArenaRig(oracle.checkpoint("mixtral"), 2)
    tiers = [rig.fill(expert_id) for expert_id in [(0, 1), (1, 2), (0, 1), (2, 3), (0, 1)]]
    assert tiers == [Tier.DISK, Tier.DISK, Tier.HOST, Tier.DISK, Tier.HOST]
    assert rig.holds((0, 1))
    assert [rig.arena.keeps(one) for one in [(0, 1), (1, 2), (2, 3)]] == [True, False, True]
    assert rig.fill((1, 2)) == Tier.DISK
    assert rig.arena.num_kept == 2
    assert rig.holds((1, 2))
    assert rig.fill((0, 1)) == Tier.HOST
    assert rig.holds((0, 1))


def test_a_place_in_the_arena_is_not_given_away_while_it_is_read(oracle: Oracle) -> None:
    rig = ArenaRig(oracle.checkpoint("mixtral"), 1)
    rig.fill((0, 1))
    other = blank_slot(rig.manifest, torch.float32)
    rig.fill((0, 1), WatchedSlot(rig.slot, lambda: rig.fill((1, 2), other)))
    assert rig.behind.fills == [(0, 1), (1, 2)]
    assert rig.holds((0, 1))
    assert rig.arena.keeps((0, 1))
    rig.fill((1, 2))  # and after that it is
    assert rig.arena.keeps((1, 2))
    assert not rig.arena.keeps((0, 1))


def test_an_expert_that_two_threads_bring_to_the_arena_takes_one_place(oracle: Oracle) -> None:
    rig = ArenaRig(oracle.checkpoint("mixtral"), 2)
    other = blank_slot(rig.manifest, torch.float32)
    rig.fill((0, 1), WatchedSlot(rig.slot, lambda: rig.fill((0, 1), other)))
    assert rig.behind.fills == [(0, 1), (0, 1)]
    assert rig.arena.num_kept == 1
    rig.fill((0, 2))
    assert rig.arena.num_kept == 2
    assert rig.fill((0, 1)) == rig.fill((0, 2)) == Tier.HOST


def test_a_checksum_is_verified_from_the_disk_and_not_on_a_copy(checkpoint: Path) -> None:
    rig = ArenaRig(checkpoint, 2)
    rig.fill((0, 1))
    rig.damage((0, 1))
    rig.damage((2, 5))
    rig.slot.take(blank_slot(rig.manifest, torch.float32))
    assert rig.fill((0, 1)) == Tier.HOST
    assert outputs(rig.slot, torch.float32, 64, rig.manifest.form)[0].any()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="expert 5 of MoE layer 2 does not match its checksum"):
            rig.fill((2, 5))
    assert (rig.arena.num_kept, rig.arena.keeps((2, 5))) == (1, False)
    assert rig.behind.fills == [(0, 1), (2, 5), (2, 5)]
    for _ in range(3):  # neither failure cost a staging set
        rig.fill((1, 1))


# --- running experts in parts ---

FORMS = [ExpertForm(activation=a, clamp=7.0, alpha=1.7) for a in Activation]


@given(
    seed=st.integers(0, 2**16),
    d_ffn=st.sampled_from([32, 96]),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    form=st.sampled_from(FORMS),
    data=st.data(),
)
def test_the_order_and_grouping_in_which_experts_run_change_no_bit(
    seed: int, d_ffn: int, counts: list[int], dtype: torch.dtype, form: ExpertForm, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    experts = [PackedExpert(ExpertWeights(gate_up=random(2 * d_ffn, 16), down=random(16, d_ffn))) for _ in counts]
    num_rows = max(counts)
    x, random_rows = random(num_rows, 16), np.random.default_rng(seed)
    pair_rows = np.concatenate([random_rows.permutation(num_rows)[:count] for count in counts]).astype(np.int64)
    weights = random_rows.random(len(pair_rows), dtype=np.float32)
    expected = run_experts(x, experts, counts, pair_rows, weights, form)
    order = data.draw(st.permutations(range(len(counts))))
    run, at = expert_run(x, counts, pair_rows, form), 0
    while at < len(order):
        size = data.draw(st.integers(1, len(order) - at))
        groups = order[at : at + size]
        run.compute(groups, [experts[group] for group in groups])
        at += size
    assert torch.equal(run.result(pair_rows, weights), expected)
