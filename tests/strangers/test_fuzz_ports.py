"""A fuzzer speaks to every method of every port of a running cluster, links and pages included.

Every call ends in time with a status that is not the server's own fault, nobody dies, nothing is logged as a fault, and
the canary's answers stay right. Cases are numbered: a failure names its seed and case, and
COLLEGIUM_FUZZ_SEED=SEED COLLEGIUM_FUZZ_CASE=NUMBER runs that one alone; COLLEGIUM_FUZZ_S says for how many seconds.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest

from collegium.model.manifest import load_manifest
from collegium.v1 import balancer_pb2, expert_pb2, inference_pb2, router_pb2
from tests.strangers.fuzz.ways import Ending, Way, ways_into
from tests.strangers.rigs.attack import FAULTS
from tests.strangers.rigs.calls import OPEN
from tests.strangers.rigs.target import Target

SHORT_S, LONG_S = 60.0, 600.0
NUM_CASES = 100_000  # of the short run, at most
BATCH = 20
BACK_S = 30.0
PAUSE_S = 0.1
SHOWN_BYTES = 1500


@pytest.mark.timeout(LONG_S * 4)
@pytest.mark.parametrize(
    ("limit_s", "num_cases"),
    [
        pytest.param(SHORT_S, NUM_CASES, id="short"),
        pytest.param(LONG_S, None, id="long", marks=pytest.mark.soak),
    ],
)
def test_nothing_that_is_said_to_any_port_is_answered_by_a_fault_or_harms_anybody(
    tmp_path: Path, limit_s: float, num_cases: int | None
) -> None:
    seed = int(os.environ.get("COLLEGIUM_FUZZ_SEED", "0" if num_cases else str(random.randrange(2**32))))
    limit_s = float(os.environ.get("COLLEGIUM_FUZZ_S", str(limit_s)))
    alone = os.environ.get("COLLEGIUM_FUZZ_CASE")
    with Target(tmp_path, canary_pause_s=PAUSE_S) as target:
        manifest = load_manifest(tmp_path / "manifest.json")
        with ways_into(target, manifest) as ways:
            check_that_no_method_is_missing(ways)
            fuzzer = Fuzzer(target, ways, seed, is_paced=num_cases is not None)
            if alone is None:
                fuzzer.run(limit_s, num_cases or 10**12)
            else:
                fuzzer.case(int(alone))
            fuzzer.look()
        kept = target.wait_until_back(fuzzer.before, BACK_S)
    assert not fuzzer.wrong, fuzzer.report()
    assert not kept, kept


def check_that_no_method_is_missing(ways: list[Way]) -> None:
    """Hold that every method of the project's own services is among the ways."""
    modules = (balancer_pb2, expert_pb2, inference_pb2, router_pb2)
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for verb in service.methods:
                path = f"/{service.full_name}/{verb.name}"
                assert any(way.name.endswith(path) for way in ways), path


class Fuzzer:
    """Runs cases and keeps what went wrong, one example of each kind."""

    def __init__(self, target: Target, ways: list[Way], seed: int, *, is_paced: bool) -> None:
        self._target, self._ways, self._seed, self._is_paced = target, ways, seed, is_paced
        self._recent: list[tuple[int, str, Ending]] = []
        self._since, self._began_s = 0, time.monotonic()
        self.before = target.footprints()
        self.wrong: dict[str, str] = {}
        self.num_cases = 0

    def run(self, limit_s: float, num_cases: int) -> None:
        """Run cases until the time or their number is over, or a process has ended."""
        until_s = time.monotonic() + limit_s
        for number in range(num_cases):
            # The first ones visit every way, however little time there is.
            began_s = time.monotonic()
            if number >= len(self._ways) and began_s > until_s:
                return
            self.case(number)
            if self._is_paced:  # it has company
                time.sleep(min(time.monotonic() - began_s, PAUSE_S))
            if number == len(self._ways):
                self.before = self._target.footprints()  # what is made once is there now
            if number % BATCH == BATCH - 1 and not self.look():
                return

    def case(self, number: int) -> None:
        """Run one case."""
        draw = random.Random(f"{self._seed}/{number}")
        way = self._ways[number] if number < len(self._ways) else draw.choice(self._ways)
        self.num_cases += 1
        began_s = time.monotonic()
        try:
            ending = way.run(draw)
        except Exception as error:
            ending = Ending(status="RAISED", detail=f"{type(error).__name__}: {error}"[:500])
        self._recent = [*self._recent[1 - BATCH :], (number, way.name, ending)]
        # A unary call that its own guard ended hangs.
        if ending.status in FAULTS | {"DEADLINE_EXCEEDED", "RAISED"}:
            took_s = time.monotonic() - began_s
            self._note(
                f"{way.name}: {ending.status}", f"after {took_s:.1f} s, {ending.detail[:300]}", [self._recent[-1]]
            )

    def look(self) -> bool:
        """Look at the processes, their logs and the canary; returns True while the cluster lives."""
        target, now_s = self._target, time.monotonic()
        for one in target.canary.visits(self._began_s, now_s):
            if one.error:
                self._note("the canary's answer", one.error, self._recent)
        for fault in target.tracebacks(self._since):
            what = re.sub(r"[0-9]+|0x[0-9a-f]+|'[^']*'", "*", fault.splitlines()[-1])
            self._note(f"logged: {what[:200]}", fault[:4000], self._recent)
        self._since, self._began_s = len(target.lines), now_s
        dead = target.dead()
        for one in dead:
            self._note(one.splitlines()[0], one, self._recent)
        return not dead

    def report(self) -> str:
        """Say what went wrong, with what each needs to be run again."""
        head = f"seed {self._seed}: {len(self.wrong)} kinds of fault in {self.num_cases} cases"
        return "\n\n".join([head, *(f"{kind}\n{text}" for kind, text in self.wrong.items())])

    def _note(self, kind: str, text: str, cases: list[tuple[int, str, Ending]]) -> None:
        if kind in self.wrong or len(self.wrong) >= 50:
            return
        shown = [
            f"case {number}: {name}: {ending.status}: {' | '.join(raw[:SHOWN_BYTES].hex() for raw in ending.sent)}"
            for number, name, ending in cases
        ]
        self.wrong[kind] = "\n".join([text, *shown])


assert OPEN not in FAULTS
