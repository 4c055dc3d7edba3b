"""Java class paths and Prism, fetched once through the Maven and Go of this machine, then reused.

Prism and Beam's expansion service listen on all interfaces and run any code that is sent to them.  So Prism is built
from its source with one address changed, and the expansion service is started by Millrace's class `LoopbackExpansion`.

    python -m deploy.streaming.toolchain      # get all of it now

They are stored in `$MILLRACE_CACHE`, or else in `millrace` below `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from schemas.errors import MillraceError

log = logging.getLogger("millrace.setup")
POM = Path(__file__).with_name("pom.xml")
PROFILES = ("broker", "expansion")
PRISM = "v2.77.0"
BEAM_MODULE = "github.com/apache/beam/sdks/v2"
# The address on which Prism listens: file in the module, its text, and the replacement.
LISTENS = "go/pkg/beam/runners/prism/internal/jobservices/server.go"
EVERYWHERE, ON_LOOPBACK = (
    'net.Listen("tcp", fmt.Sprintf(":%d", port))',
    'net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))',
)
LOOPBACK_EXPANSION = Path(__file__).with_name("LoopbackExpansion.java")
# A program, a command that shows that it works (macOS has a java that only reports that it is missing), and how to
# install it.
NEEDED = {
    "java": ("-version", "Java 17: apt-get install openjdk-17-jre-headless (or brew install openjdk@17)"),
    "mvn": ("-version", "Maven: apt-get install maven (or brew install maven)"),
    "go": ("version", "Go 1.24 or later: apt-get install golang, or go.dev/dl (or brew install go)"),
}


class MissingTool(MillraceError):
    """A program that the live jobs need is not installed."""

    exit_code = 8


def missing() -> list[str]:
    """How to install the missing programs; empty if none is missing."""
    return [how for program, (probe, how) in NEEDED.items() if not _works(program, probe)]


def classpath(profile: str) -> str:
    """The class path of a profile of the pom.

    Raises:
        MissingTool: it is not in the cache, and Maven is missing or failed.
    """
    kept = cache() / f"{profile}-{hashlib.sha256(POM.read_bytes()).hexdigest()[:16]}.classpath"
    if _complete(kept):
        return kept.read_text()
    with _lock(profile):
        if not _complete(kept):  # another process has done it meanwhile
            _require("java", "mvn")
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                fresh = Path(folder) / "classpath"
                goal = ["dependency:build-classpath", f"-Dmdep.outputFile={fresh}"]
                _get(f"the {profile}'s class path", "Maven", ["mvn", "-B", "-f", str(POM), "-P", profile, *goal])
                fresh.replace(kept)
    return kept.read_text()


def prism() -> Path:
    """The Prism program, which listens only on loopback.

    Raises:
        MissingTool: it is not in the cache, and Go is missing or failed.
    """
    kept = cache() / f"prism-{PRISM}-loopback"
    if not kept.exists():
        with _lock("prism"):
            if not kept.exists():
                _require("go")
                with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                    source, built = Path(folder) / "source", Path(folder) / "prism"
                    _copy_prism(source)
                    command = ["go", "build", "-C", str(source), "-o", str(built), "./go/cmd/prism"]
                    _get(
                        "Prism",
                        "Go",
                        command,
                        {
                            **os.environ,
                            "CGO_ENABLED": "0",
                            "GOFLAGS": f"{os.environ.get('GOFLAGS', '')} -mod=mod".strip(),
                        },
                    )
                    built.replace(kept)
    return kept


def _copy_prism(source: Path) -> None:
    """Copies the source of Prism to the folder `source`, with the address that it listens on changed.

    Raises:
        MissingTool: Go cannot download it, or the address is not in its source.
    """
    module = json.loads(
        _get("Prism's source", "Go", ["go", "mod", "download", "-json", f"{BEAM_MODULE}@{PRISM}"], os.environ)
    )
    shutil.copytree(Path(module["Dir"]) / "go", source / "go", copy_function=shutil.copyfile)
    for folder, _, _ in os.walk(source):
        os.chmod(folder, 0o755)  # the module cache is read-only
    for name in ("go.mod", "go.sum"):
        shutil.copyfile(Path(module["Dir"]) / name, source / name)
    listens = source / LISTENS
    text = listens.read_text()
    if text.count(EVERYWHERE) != 1:
        raise MissingTool(
            f"Prism {PRISM} listens where it did", f"another {LISTENS}", "Correct deploy/streaming/toolchain.py"
        )
    listens.write_text(text.replace(EVERYWHERE, ON_LOOPBACK))


def loopback_expansion() -> Path | None:
    """The folder of the class that starts the expansion service on loopback; None without a Java compiler."""
    digest = hashlib.sha256(LOOPBACK_EXPANSION.read_bytes() + POM.read_bytes()).hexdigest()[:16]
    kept = cache() / f"loopback-expansion-{digest}"
    if not kept.exists() and _works("javac", "-version"):
        path = classpath("expansion")
        with _lock("loopback-expansion"):
            if not kept.exists():
                with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                    classes = Path(folder) / "classes"
                    command = ["javac", "-cp", path, "-d", str(classes), str(LOOPBACK_EXPANSION)]
                    _get("the loopback expansion service", "javac", command)
                    classes.replace(kept)
    return kept if kept.exists() else None


def java(
    profile: str, main: str, *arguments: str, options: Sequence[str] = (), classes: Sequence[Path] = ()
) -> list[str]:
    """The command that runs a Java class from the profile's class path or from the folders `classes`."""
    _require("java")
    return ["java", *options, "-cp", os.pathsep.join([*map(str, classes), classpath(profile)]), main, *arguments]


def cache() -> Path:
    """The folder of the cache; it is created if it is missing."""
    named = os.environ.get("MILLRACE_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _complete(kept: Path) -> bool:
    return kept.exists() and all(os.path.exists(jar) for jar in kept.read_text().split(os.pathsep))


def _works(program: str, probe: str) -> bool:
    return shutil.which(program) is not None and subprocess.run([program, probe], capture_output=True).returncode == 0


def _require(*programs: str) -> None:
    lacking = [NEEDED[program][1] for program in programs if shutil.which(program) is None]
    if lacking:
        raise MissingTool("The live jobs have Java, Maven and Go", "none on PATH", "; ".join(lacking))


def _get(what: str, through: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Runs a command that downloads something; returns its output."""
    log.info("getting %s through %s, once", what, through)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    if done.returncode:
        output = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        wrong = "".join(f"\n  {line}" for line in ([line for line in output if "ERROR" in line] or output)[:6])
        raise MissingTool(f"{through} gets {what}", wrong, f"Run it to see: {shlex.join(command)}")
    log.info("got %s in %.0f s", what, time.perf_counter() - began)
    return done.stdout


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Admits one process at a time; the kernel releases the lock when the process ends."""
    with open(cache() / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Downloads what is not in the cache yet, and reports it; prints nothing if nothing is missing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for profile in PROFILES:
            classpath(profile)
        prism()
        loopback_expansion()
    except MissingTool as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
