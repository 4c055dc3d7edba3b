"""Times and peak memory of the sides of a comparison, each run in a fresh process.

A side is a function named `module:function`.  Its process first imports everything that the side uses, then records its
memory (the baseline), then starts the clock.  What to import is not guessed: a first, unmeasured run of the side
records the modules that it imported.  That run also warms the file cache for both sides alike.

Memory is the resident set by the kernel's own high-water mark (`VmHWM`, reset after the imports); children are sampled
and added.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.25
# XGBoost's threads wait for each other by spinning, which can cost thirty times the work on cores that other processes
# use.
QUIET = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
_stages: dict[str, dict[str, float]] = {}
_high = [0.0]
# The result of a side or of a comparison: numbers by name.
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Side:
    """One side: `function` ("module:function") is called with `arguments` and `out`, a fresh folder; it returns
    figures.

    `python` runs it: that of another environment, or of this one.
    """

    name: str
    function: str
    arguments: Mapping[str, object] = dataclasses.field(default_factory=dict)
    python: str = sys.executable


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of one side.  Memory in MB (10⁶ bytes); `peak_mb` is above `baseline_mb`; `cpu_seconds` is of all threads
    and children."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    baseline_mb: float
    import_seconds: float
    late_imports: list[str]
    stages: dict[str, dict[str, float]]
    result: Figures


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Within a side: measures seconds and peak of a part of it, which are shown separately."""
    _high[0] = max(_high[0], high_water())
    _reset_high_water()
    cpu, start = _cpu_seconds(), time.perf_counter()
    try:
        yield
    finally:
        _stages[name] = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": _cpu_seconds() - cpu,
            "high_mb": high_water(),
        }


def run(side: Side, out: Path, modules: Sequence[str]) -> tuple[Measurement, list[str]]:
    """Runs a side in a process of its own; also returns the modules that it imported.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer, printed = (Path(folder) / name for name in ("request.json", "answer.json", "printed"))
        request.write_text(
            json.dumps(
                {
                    "function": side.function,
                    "modules": list(modules),
                    "arguments": {**side.arguments, "out": str(out)},
                }
            )
        )
        with printed.open("w") as sink:
            done = subprocess.run(
                [side.python, "-m", "benchmarks.measure", str(request), str(answer)],
                cwd=ROOT,
                env={**os.environ, **QUIET},
                stdout=sink,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode or not answer.exists():
            raise SystemExit(f"{side.name} failed with exit code {done.returncode}:\n{printed.read_text()[-4000:]}")
        content = json.loads(answer.read_text())
    return Measurement(**content["measurement"]), content["modules"]


def compare(
    sides: Sequence[Side],
    repeats: int,
    folder: Path,
    check: Callable[[dict[str, Path]], Figures] | None = None,
) -> tuple[dict[str, list[Measurement]], Figures]:
    """Runs every side `repeats` times, alternating, in reversed order each time; also returns what `check` found in the
    outputs of the warm-up."""
    modules, outputs = {}, {}
    for side in sides:
        outputs[side.name] = folder / f"{side.name}-warm-up"
        _, modules[side.name] = run(side, outputs[side.name], ())
        say(f"{side.name}: warm-up done")
    checked = dict(check(outputs)) if check is not None else {}
    measured: dict[str, list[Measurement]] = {side.name: [] for side in sides}
    for repetition in range(repeats):
        for side in sides if repetition % 2 == 0 else reversed(sides):
            one, _ = run(side, folder / f"{side.name}-{repetition}", modules[side.name])
            measured[side.name].append(one)
            say(
                f"{side.name} {repetition + 1}/{repeats}: {one.seconds:.2f} s, "
                f"peak {one.peak_mb:.0f} MB above {one.baseline_mb:.0f} MB"
            )
    return measured, checked


def ratios(measured: Mapping[str, Sequence[Measurement]], ours: str, theirs: str) -> dict[str, float]:
    """`wall_vs_<theirs>` and `peak_vs_<theirs>`: Millrace's value divided by theirs. Of wall times the fastest runs
    count, because other processes can only slow a run down; of peaks the medians."""

    def wall(name: str) -> float:
        return min(each.seconds for each in measured[name])

    def peak(name: str) -> float:
        return statistics.median(each.peak_mb for each in measured[name])

    return {f"wall_vs_{theirs}": wall(ours) / wall(theirs), f"peak_vs_{theirs}": peak(ours) / peak(theirs)}


def summary(measured: Mapping[str, Sequence[Measurement]]) -> str:
    """A table of the medians, stages included."""
    lines = [f"{'':<22}{'seconds':>9}{'min–max':>15}{'cpu s':>8}{'peak MB':>9}{'baseline MB':>13}{'imports s':>11}"]
    for name, runs in measured.items():
        interior = {
            field: statistics.median(getattr(each, field) for each in runs)
            for field in ("seconds", "cpu_seconds", "peak_mb", "baseline_mb", "import_seconds")
        }
        low, high = min(each.seconds for each in runs), max(each.seconds for each in runs)
        lines.append(
            f"{name:<22}{interior['seconds']:>9.2f}{f'{low:.2f}–{high:.2f}':>15}{interior['cpu_seconds']:>8.2f}{interior['peak_mb']:>9.0f}{interior['baseline_mb']:>13.0f}{interior['import_seconds']:>11.2f}"
        )
        for part in runs[0].stages:
            seconds, cpu, peak = (
                statistics.median(each.stages[part][field] for each in runs)
                for field in ("seconds", "cpu_seconds", "peak_mb")
            )
            lines.append(f"  {part:<20}{seconds:>9.2f}{'':>15}{cpu:>8.2f}{peak:>9.0f}")
    return "\n".join(lines)


def raw(measured: Mapping[str, Sequence[Measurement]]) -> dict[str, list[dict[str, object]]]:
    """Every run of every side, for `--json`."""
    return {name: [dataclasses.asdict(each) for each in runs] for name, runs in measured.items()}


def machine() -> dict[str, object]:
    """The machine on which this was measured."""
    with contextlib.suppress(OSError):
        return {
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "system": platform.platform(),
            "python": platform.python_version(),
        }
    return {"cpus": os.cpu_count()}


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write ratios and raw figures there")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each side (default 3)")
    parser.add_argument(
        "--keep", metavar="FOLDER", type=Path, help="work there and leave everything (default: a temporary folder)"
    )
    return parser


def write_json(path: Path, figures: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")


def say(text: str) -> None:
    print(text, flush=True)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def high_water() -> float:
    """Highest resident set since the last reset, in MB."""
    return _status("VmHWM")


def _status(field: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _reset_high_water() -> None:
    with contextlib.suppress(OSError):  # missing or not allowed: then the mark covers the time since the process began
        Path("/proc/self/clear_refs").write_text("5")


class _Children(threading.Thread):
    """The greatest total memory of this process's children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self.stopped = threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self.stopped.wait(SAMPLE_SECONDS):
            total = 0
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
            self.peak_mb = max(self.peak_mb, total / 1e6)


def _serve(request: Path, answer: Path) -> None:
    """In the side's process: imports, records the baseline, works, and writes what was measured."""
    side = json.loads(request.read_text())
    module, function = side["function"].split(":")
    start = time.perf_counter()
    work = getattr(importlib.import_module(module), function)
    for name in side["modules"]:
        with contextlib.suppress(Exception):  # its package created it while it ran, not by an import
            importlib.import_module(name)
    import psutil  # noqa: F401  the sampler's, part of both baselines

    import_seconds = time.perf_counter() - start
    before = set(sys.modules)
    children = _Children()
    children.start()
    # The module that runs as __main__ is not the one that a side imports, and the latter keeps the stages.
    record = importlib.import_module("benchmarks.measure")
    baseline = _status("VmRSS")
    _reset_high_water()
    cpu, start = _cpu_seconds(), time.perf_counter()
    result = work(**side["arguments"])
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    peak = max(high_water(), record._high[0], *(each["high_mb"] for each in record._stages.values()), 0.0)
    children.stopped.set()
    children.join()
    stages = {name: {**each, "peak_mb": each["high_mb"] - baseline} for name, each in record._stages.items()}
    fresh = sorted(set(sys.modules) - before)
    measurement = Measurement(
        seconds,
        cpu,
        peak + children.peak_mb - baseline,
        baseline,
        import_seconds,
        sorted({name.split(".")[0] for name in fresh}),
        stages,
        result,
    )
    # A module without its package was loaded from its path (like TFDV's library); an import by name would load the
    # package too.
    modules = sorted(
        name
        for name in sys.modules
        if not name.startswith(("__", "benchmarks.measure", "millrace_definition"))
        and name.split(".")[0] in sys.modules
    )
    answer.write_text(json.dumps({"measurement": dataclasses.asdict(measurement), "modules": modules}))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
