"""Kill −9 at any moment, and run again: readers have the old or the new, never a part; nothing is lost, doubled or left
over.

Processes are really killed: at every step they take on the store's file system, at random times over their whole
length, and in the milliseconds in which delta-rs commits.  MILLRACE_SEED chooses other times.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
from collections.abc import Callable

import pytest

from tests.support.loads import Case, content, leftovers, prepared, same
from tests.support.processes import Zygote
from tests.support.tables import figures_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SEED = int(os.environ.get("MILLRACE_SEED", "1"))


@pytest.fixture(scope="module")
def first_load(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Case:
    return prepared(tmp_path_factory.mktemp("first"), zygote, second=False)


@pytest.fixture(scope="module")
def second_load(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Case:
    case = prepared(tmp_path_factory.mktemp("second"), zygote, second=True)
    old, new = content(case.before, case.table), content(case.after, case.table)
    assert not any(same(old[name], new[name]) for name in old), "the second load changes both tables"
    return case


def killed(case: Case, name: str, number: int, **when: object) -> str:
    """One kill and everything that must hold after it; what readers had then."""
    old, new = content(case.before, case.table), content(case.after, case.table)
    store = case.copy(name)
    ended = case.load(store, "victim", **when)
    assert ended.code in (0, -signal.SIGKILL), ended.err
    found = content(store, case.table)
    for table, frame in found.items():
        assert same(frame, old[table]) or same(frame, new[table]), (name, when, table)
    features = "new" if same(found[case.table], new[case.table]) else "old"
    dead_letters = "new" if same(found["dead_letters/features"], new["dead_letters/features"]) else "old"
    outcome = (
        "ended"
        if ended.code == 0
        else f"features {features}, dead letters {dead_letters}, {'files left' if leftovers(store) else 'clean'}"
    )

    run_id = "victim" if number % 2 else "another"
    again = case.load(store, run_id)
    assert again.code == 0, (name, when, again.err)
    figures = figures_of(store, run_id)
    expected = new[case.table]
    assert expected is not None
    assert (figures["run_id"], figures["table_rows"]) == (run_id, len(expected))
    for table, frame in content(store, case.table).items():
        assert same(frame, new[table]), (name, when, table)

    swept = case.zygote.run("vacuum", "--store", str(store), "--older_than", "0s", "--force", watch=store)
    assert swept.code == 0, swept.err
    assert leftovers(store) == [], (name, when)
    for table, frame in content(store, case.table).items():
        assert same(frame, new[table]), (name, when, table)
    shutil.rmtree(store)
    return outcome


def test_killed_before_every_step_of_a_first_load(first_load: Case) -> None:
    seen = collections.Counter(
        killed(first_load, f"step-{step}", step, step=step) for step in range(len(first_load.undisturbed.steps))
    )
    print(dict(seen))
    assert sum(seen.values()) - seen["ended"] >= 30
    assert {
        "features old, dead letters old, clean",
        "features old, dead letters old, files left",
        "features old, dead letters new, files left",
    } <= set(seen), seen
    assert any(outcome.startswith("features new, dead letters new") for outcome in seen), seen


def test_killed_before_steps_of_a_second_load(second_load: Case) -> None:
    steps = range(SEED % 2, len(second_load.undisturbed.steps), 2)
    seen = collections.Counter(killed(second_load, f"step-{step}", step, step=step) for step in steps)
    print(dict(seen))
    assert "features old, dead letters new, files left" in seen, seen
    assert any(outcome.startswith("features new, dead letters new") for outcome in seen), seen


@pytest.mark.parametrize("load", ["first_load", "second_load"])
def test_killed_at_random_times(load: str, request: pytest.FixtureRequest) -> None:
    case, chance = request.getfixturevalue(load), random.Random(SEED)
    seen: collections.Counter[str] = collections.Counter()
    length = case.undisturbed.seconds  # measured while others may have been at work: it is less where loads end in time
    for i in range(40):
        outcome = killed(case, f"time-{i}", i, delay=max(chance.random() * length, 1e-6))
        seen[outcome] += 1
        length *= 0.8 if outcome == "ended" else 1.02
        if sum(seen.values()) - seen["ended"] == 8:
            break
    print(dict(seen))
    assert sum(seen.values()) - seen["ended"] == 8, seen


def last(steps: tuple[str, ...], holds: Callable[[str], bool]) -> int:
    return max(i for i, step in enumerate(steps) if holds(step))


@pytest.mark.parametrize("load", ["first_load", "second_load"])
def test_killed_while_delta_rs_commits(load: str, request: pytest.FixtureRequest) -> None:
    """The commits' own writes are no steps of Python's: the clock starts at the last step before each."""
    case, chance = request.getfixturevalue(load), random.Random(SEED)
    steps = case.undisturbed.steps
    manifest = last(steps, lambda step: step.startswith("os.rename") and "_manifests" in step)
    dead_letters = last(steps, lambda step: step.startswith("os.rename") and "dead_letters" in step)
    seen = collections.Counter(
        killed(case, f"commit-{i}", i, step=dead_letters if i % 4 == 0 else manifest, delay=chance.uniform(1e-4, 12e-3))
        for i in range(16)
    )
    print(dict(seen))
    assert sum(seen.values()) - seen["ended"] >= 10, seen
    assert sum(count for outcome, count in seen.items() if "features old" in outcome) >= 2, seen
    assert sum(count for outcome, count in seen.items() if "features new" in outcome) >= 2, seen


def test_killed_vacuums_leave_what_is_needed_and_the_next_one_finishes(second_load: Case) -> None:
    case, steps = second_load, second_load.undisturbed.steps
    manifest = last(steps, lambda step: step.startswith("os.rename") and "_manifests" in step)
    store = case.copy("vacuumed")
    for i in range(3):
        assert case.load(store, f"victim-{i}", step=manifest).code == -signal.SIGKILL
    before, waste = content(store, case.table), leftovers(store)
    assert len(waste) > 10
    flags = ["vacuum", "--store", str(store), "--older_than", "0s", "--force"]
    for step in (0, 3, 5):
        assert case.zygote.run(*flags, watch=store, step=step).code == -signal.SIGKILL
        now = content(store, case.table)
        assert all(same(now[name], before[name]) for name in before)
    assert 0 < len(leftovers(store)) < len(waste)
    assert case.zygote.run(*flags, watch=store).code == 0
    assert leftovers(store) == []
    assert case.load(store, "last").code == 0
    now, new = content(store, case.table), content(case.after, case.table)
    assert all(same(now[name], new[name]) for name in new)


def test_vacuum_beside_a_run_removes_none_of_its_files(second_load: Case) -> None:
    """The run is held at steps over its whole length while vacuum, for which no run takes any time, goes over the
    store."""
    case, count = second_load, len(second_load.undisturbed.steps)
    new = content(case.after, case.table)
    for step in range(2, count, max(count // 8, 1)):
        store = case.copy(f"beside-{step}")
        process = case.zygote.start(
            "features",
            *case.arguments,
            "--store",
            str(store),
            "--run_id",
            "working",
            watch=store,
            step=step,
            kind=signal.SIGSTOP,
        )
        assert process.stopped()
        there = {path for path in store.rglob("*") if path.is_file()}
        swept = case.zygote.run("vacuum", "--store", str(store), "--older_than", "0s", "--force", watch=store)
        assert swept.code == 0, swept.err
        assert there == {path for path in store.rglob("*") if path.is_file()}, step
        process.resume()
        ended = process.wait()
        assert ended.code == 0, ended.err
        now = content(store, case.table)
        assert all(same(now[name], new[name]) for name in new), step
        shutil.rmtree(store)
