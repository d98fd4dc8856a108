"""What a step chose is told once it is committed, once for each position, and kept only while somebody listens."""

import numpy as np

from collegium.model.sampling import SamplingParams
from router_svc.choices import Listeners, StepChoices
from router_svc.recorder import Recorder
from router_svc.sequence import Sequence, StopRules
from router_svc.step import Row, Step


def grown(number: int) -> Sequence:
    sequence = Sequence(
        owner=1,
        request_id=f"r{number}",
        choice_index=0,
        prompt_ids=list(range(10)),
        sampling=SamplingParams(),
        rules=StopRules(max_tokens=5),
    )
    sequence.number = number
    return sequence


def step_of(decodes: list[tuple[Sequence, int]], chunks: list[tuple[Sequence, int, int]]) -> Step:
    return Step(
        decodes=tuple(Row(sequence=s, begin=at, num_rows=1) for s, at in decodes),
        chunks=tuple(Row(sequence=s, begin=begin, num_rows=end - begin) for s, begin, end in chunks),
    )


def visit(recorder: Recorder, step: Step, *, layers: int = 2) -> None:
    """Compute a step: row r chooses experts 2r and 2r + 1, the second with the greater weight."""
    hearing = recorder.begin(step)
    assert hearing is not None
    ids = np.arange(2 * step.num_rows).reshape(-1, 2)
    weights = np.tile(np.array([0.25, 0.75], dtype=np.float32), (step.num_rows, 1))
    for layer in range(layers):
        hearing.of_rows(layer, ids, weights, np.array([layer], dtype=np.uint16))


def listening() -> tuple[Recorder, list[StepChoices]]:
    told: list[StepChoices] = []
    listeners = Listeners()
    listeners.add(told.append)
    return Recorder(listeners), told


def test_a_step_is_told_with_its_sequences_positions_and_ranked_choices() -> None:
    recorder, told = listening()
    step = step_of([(grown(1), 12)], [(grown(2), 3, 5)])
    visit(recorder, step)
    assert told == []
    recorder.commit(step, 9)
    (choices,) = told
    assert (choices.step, choices.sequences, choices.positions) == (9, [1, 2, 2], [12, 3, 4])
    assert choices.num_decode_rows == 1
    assert [layer.layer for layer in choices.layers] == [0, 1]
    assert choices.layers[1].ids.tolist() == [[1, 0], [3, 2], [5, 4]]
    assert choices.layers[1].weights[0].tolist() == [0.75, 0.25]
    assert choices.layers[1].missed.tolist() == [1]


def test_a_step_that_is_computed_again_is_told_once() -> None:
    recorder, told = listening()
    step = step_of([], [(grown(1), 0, 3)])
    visit(recorder, step, layers=1)  # then a worker is lost
    visit(recorder, step)
    recorder.commit(step, 1)
    assert [len(choices.layers) for choices in told] == [2]


def test_positions_that_a_preempted_sequence_computes_anew_are_not_told_again() -> None:
    recorder, told = listening()
    sequence, other = grown(1), grown(2)
    for step in (
        step_of([(other, 7)], [(sequence, 0, 4)]),
        step_of([], [(sequence, 0, 6)]),  # preempted in between
        step_of([], [(sequence, 2, 6)]),
    ):
        visit(recorder, step)
        recorder.commit(step, 1)
    assert [(c.sequences, c.positions, c.num_decode_rows) for c in told] == [
        ([2, 1, 1, 1, 1], [7, 0, 1, 2, 3], 1),
        ([1, 1], [4, 5], 0),
    ]
    assert told[1].layers[0].ids.tolist() == [[9, 8], [11, 10]]


def test_without_a_listener_nothing_is_asked_for_and_one_that_comes_late_hears_whole_steps_only() -> None:
    listeners, told = Listeners(), list[StepChoices]()
    recorder = Recorder(listeners)
    step = step_of([], [(grown(1), 0, 2)])
    assert recorder.begin(step) is None
    listeners.add(told.append)
    recorder.commit(step, 1)
    assert told == []
    visit(recorder, step)
    recorder.commit(step, 2)
    listeners.remove(told.append)
    assert recorder.begin(step) is None
    recorder.commit(step, 3)
    assert [choices.step for choices in told] == [2]


def test_sources_are_told_once_whole_before_the_rows_of_their_step() -> None:
    recorder, told = listening()
    first, second = grown(1), grown(2)
    first.source_ids, second.source_ids = [5, 6, 7], [8, 9]
    rows = tuple(Row(sequence=one, begin=0, num_rows=1, encodes=True) for one in (first, second))
    for step in (Step(decodes=(), chunks=rows[:1]), Step(decodes=(), chunks=rows)):  # the first is preempted in between
        hearing = recorder.begin(step)
        assert hearing is not None
        num_rows = step.num_source_rows
        ids = np.arange(2 * num_rows).reshape(-1, 2)
        weights = np.tile(np.array([0.25, 0.75], dtype=np.float32), (num_rows, 1))
        for layer in (0, 1):
            for part in (slice(0, 2), slice(2, None)):  # more rows than one call takes
                hearing.of_sources(layer, ids[part], weights[part], np.array([layer, part.start], dtype=np.uint16))
        hearing.of_rows(2, ids[: step.num_rows], weights[: step.num_rows], np.array([], dtype=np.uint16))
        recorder.commit(step, 1)
    sources = [one for one in told if one.is_of_sources]
    assert [(one.sequences, one.positions) for one in sources] == [([1, 1, 1], [0, 1, 2]), ([2, 2], [0, 1])]
    assert [layer.layer for layer in sources[1].layers] == [0, 1]
    assert sources[1].layers[0].ids.tolist() == [[7, 6], [9, 8]]
    assert sources[0].layers[1].missed.tolist() == [0, 1, 2]
    assert [one.is_of_sources for one in told] == [True, False, True, False]
    assert [one.sequences for one in told if not one.is_of_sources] == [[1], [2]]
