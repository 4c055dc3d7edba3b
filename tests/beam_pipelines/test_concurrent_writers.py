"""Two processes load at once: of different dates both commit; of the same dates one does, and the other reports it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from schemas.errors import ConflictError
from tests.support.loads import Case, content, leftovers, prepared, same
from tests.support.processes import Process, Zygote
from tests.support.tables import figures_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=[False, True], ids=["no table before", "a table before"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Case:
    return prepared(tmp_path_factory.mktemp("writers"), zygote, second=request.param)


def held(case: Case, store: Path, run_id: str, step: int, *flags: str) -> Process:
    """A load that waits at a step after its plan was made."""
    process = case.zygote.start(
        "features",
        *case.arguments,
        "--store",
        str(store),
        "--run_id",
        run_id,
        *flags,
        watch=store,
        step=step,
        kind=signal.SIGSTOP,
    )
    assert process.stopped()
    return process


HALVES = (("--end", "2024-03-03"), ("--start", "2024-03-03"))


@pytest.mark.parametrize("step", [3, 12, 1_000_000], ids=["at its first files", "later", "as they come"])
def test_two_loads_of_different_dates_both_commit(case: Case, step: int) -> None:
    store = case.copy(f"different-{step}")
    if step < 1_000_000:
        both = [held(case, store, f"half-{i}", step, *flags) for i, flags in enumerate(HALVES)]
        for process in both:
            process.resume()
    else:
        both = [
            case.zygote.start(
                "features", *case.arguments, "--store", str(store), "--run_id", f"half-{i}", *flags, watch=store
            )
            for i, flags in enumerate(HALVES)
        ]
    for process in both:
        ended = process.wait()
        assert ended.code == 0, ended.err
    now, new = content(store, case.table), content(case.after, case.table)
    assert same(now[case.table], new[case.table])
    again = case.load(store, "again")
    figures = figures_of(store, "again")
    assert (again.code, figures.get("nothing_to_do")) == (0, "no date is missing or stale"), (
        "each told what it had read"
    )
    assert case.zygote.run("vacuum", "--store", str(store), "--older_than", "0s", "--force", watch=store).code == 0
    assert leftovers(store) == [], "a manifest for the version that the other one made first is left to vacuum"
    shutil.rmtree(store)


@pytest.mark.parametrize("step", [3, 12, 24])
def test_of_two_loads_of_the_same_dates_one_commits_and_the_other_reports_it(case: Case, step: int) -> None:
    store = case.copy(f"same-{step}")
    # A load takes fewer steps the fewer files it writes: both wait before the first of them commits.
    commit = next(i for i, each in enumerate(case.undisturbed.steps) if f"/{case.table}/_delta_log/" in each)
    both = [held(case, store, run_id, min(step, commit)) for run_id in ("left", "right")]
    for process in both:
        process.resume()
    ends = [process.wait() for process in both]
    assert sorted(ended.code for ended in ends) == [0, ConflictError.exit_code], [ended.err for ended in ends]
    (loser,) = (i for i, ended in enumerate(ends) if ended.code)
    printed = ends[loser].err
    winner, name = ("right", "left") if loser == 0 else ("left", "right")
    assert "Nobody else changes the dates of a run while it works on" in printed
    assert f"written by run {winner}" in printed
    assert "2024-03-0" in printed
    assert f"--run_id {name}" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    now, new = content(store, case.table), content(case.after, case.table)
    assert all(same(now[table], new[table]) for table in new)
    assert case.load(store, name).code == 0, "the command it named"
    now = content(store, case.table)
    assert all(same(now[table], new[table]) for table in new)
    shutil.rmtree(store)
