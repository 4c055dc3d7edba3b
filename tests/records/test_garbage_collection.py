"""Workers do not search their imports for garbage, but still find what they make."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, time, weakref
import beam_pipelines.features_streaming
from transforms.streaming.journal_dofn import JournalDoFn
from transforms.records.garbage_collection import freeze_imports

def collected():
    begun = time.perf_counter()
    gc.collect()
    return time.perf_counter() - begun

class Cycle:
    def __init__(self):
        self.self = self

collected()
before = min(collected() for _ in range(3))
freeze_imports()
frozen = gc.get_freeze_count()
print("times", before / min(collected() for _ in range(3)))
gone = weakref.ref(Cycle())
gc.collect()
kept = [Cycle() for _ in range(100)]
freeze_imports()
print("found", gone() is None, "once", frozen == gc.get_freeze_count())
"""


def test_a_full_collection_leaves_imports_alone_and_finds_garbage() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    times, rest = done.stdout.splitlines()
    assert float(times.split()[1]) > 10
    assert rest == "found True once True"
