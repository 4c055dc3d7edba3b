#!/usr/bin/env bash
# Sets up what is needed, once, and runs Millrace here.  ./run_local.sh --help
set -euo pipefail

usage() {
    cat <<'TEXT'
./run_local.sh [args]              features, training and inference on a year of real flights; figures in out/run.json
./run_local.sh test [pytest args]  all tests that need nothing but Python
./run_local.sh test live [...]     those, and the ones with Kafka and Prism (Java, Maven, Go)
./run_local.sh test all [...]      those where Java, Maven and Go are present, else the first with a word of what is missing
./run_local.sh test slow [...]     the ones that take minutes: processes killed at every step, full disks, two writers at once;
                                   where Kafka and Prism can run: thirty kills of each live job
./run_local.sh stream [args]       the live job
./run_local.sh setup               the environment only: .venv, from constraints.txt

Set-up runs once, and again when constraints.txt or setup.py change. MILLRACE_PYTHON names a Python 3.11 to use.
TEXT
}

say() { printf '%s\n' "$*" >&2; }
die() { say "run_local.sh: $1"; shift; for line in "$@"; do say "  $line"; done; exit 2; }

script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do  # called through a link
    link=$(readlink "$script")
    case $link in /*) script=$link ;; *) script=$(dirname "$script")/$link ;; esac
done
cd "$(dirname "$script")"
root=$(pwd -P)
venv=$root/.venv stamp=$root/.venv/.millrace unfinished=$root/.venv/.unfinished

if [ ! -d "${HOME:-}" ] || [ ! -w "$HOME" ]; then  # caches need a home
    export HOME="$root/out/home"
    mkdir -p "$HOME"
fi
unset PYTHONDONTWRITEBYTECODE PYTHONHOME
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}" MLFLOW_DISABLE_TELEMETRY=true GIT_PYTHON_REFRESH=quiet
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"

digest() {
    { cat constraints.txt setup.py; printf '%s\n' */__init__.py */*/__init__.py; } |  # an editable install maps the packages there were
        { if command -v sha256sum >/dev/null; then sha256sum; elif command -v shasum >/dev/null; then shasum -a 256; else cksum; fi; }
}

ready() { [ -x "$venv/bin/python" ] && [ ! -e "$unfinished" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; }

is_311() { "$1" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

find_python() {  # a name on PATH may be a shim that does not work, so each is run
    local candidate
    for candidate in "${MILLRACE_PYTHON:-}" python3.11 python3 python /usr/bin/python3.11 /usr/local/bin/python3.11 \
        /opt/homebrew/bin/python3.11 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python; do
        [ -n "$candidate" ] && is_311 "$candidate" || continue
        "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)'
        return
    done
    return 1
}

no_python() {
    die "Python 3.11 is needed and was not found." \
        "Debian 12:  apt-get install python3.11 python3.11-venv" "macOS:      brew install python@3.11" \
        "pyenv:      pyenv install 3.11 && pyenv shell 3.11" "or say where it is: MILLRACE_PYTHON=/path/to/python3.11 ./run_local.sh"
}

make_venv() {
    local python
    python=$(find_python) || python=
    if [ -n "$uv" ]; then  # without a Python 3.11 here uv may fetch one
        "$uv" venv --quiet --allow-existing --python "${python:-3.11}" "$venv" || { [ -n "$python" ] || no_python; exit 1; }
    else
        [ -n "$python" ] || no_python
        "$python" -c 'import ensurepip' 2>/dev/null || die "$python has no ensurepip, so no environment can be made." \
            "Debian 12:  apt-get install python3.11-venv" "or:         install uv, which needs none"
        "$python" -m venv "$venv"
    fi
}

can_compile() {
    "$venv/bin/python" - <<'PY'
import os, shutil, sysconfig
compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
headers = os.path.join(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
raise SystemExit(not (shutil.which(compiler) and os.path.exists(headers)))
PY
}

install() {
    local lock=$root/constraints.txt
    if ! can_compile; then
        # TFDV imports pyfarmhash, the lock's one package with C++ to compile, for parts that Millrace does not use.
        say "no C++ compiler or no Python headers: pyfarmhash is replaced by a stand-in (apt-get install g++ python3.11-dev for the real one)"
        lock=$venv/.lock.txt
        grep -v '^pyfarmhash==' constraints.txt >"$lock"
        cat >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/farmhash.py" <<'PY'
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"farmhash.{name} needs pyfarmhash: install a C++ compiler and Python's headers, delete .venv, run ./run_local.sh setup")
PY
    fi
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --compile-bytecode \
            --build-constraints constraints.txt -r "$lock"
        "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation -e "$root"
    else
        local pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps)
        grep -E '^(pip|setuptools|wheel)==' constraints.txt >"$venv/.tools.txt"
        "${pip[@]}" -r "$venv/.tools.txt"  # the pip that came with Python builds in ways since dropped
        PIP_CONSTRAINT=constraints.txt "${pip[@]}" -r "$lock"
        "${pip[@]}" --no-build-isolation -e "$root"
    fi
    "$venv/bin/python" -m compileall -q beam_pipelines transforms schemas examples >/dev/null || true
}

setup() {
    want=$root$'\n'$(digest)
    if ready; then return; fi
    exec 9<>constraints.txt  # one set-up at a time; the lock is this descriptor's
    local any=
    for any in "${MILLRACE_PYTHON:-}" "$venv/bin/python" python3.11 python3 python; do
        if [ -n "$any" ] && "$any" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null; then break; fi
    done
    if ready; then exec 9>&-; return; fi  # another run did it meanwhile
    local uv=
    if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then uv=uv; fi
    say "setting up .venv with ${uv:-pip} (once; 4 GB on disk)"
    if [ -e "$unfinished" ] || { [ -e "$venv" ] && ! is_311 "$venv/bin/python"; } ||
        { [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$root" ]; }; then
        say ".venv is half made, moved, or not of Python 3.11: made anew"
        rm -rf "$venv"
    fi
    mkdir -p "$venv"
    touch "$unfinished"
    if ! is_311 "$venv/bin/python"; then make_venv; fi
    install
    printf '%s\n' "$want" >"$stamp"
    rm "$unfinished"
    exec 9>&-
    say "set up in ${SECONDS} s"
}

activate() {
    setup
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}

tool() { "$@" >/dev/null 2>&1; }  # macOS has a java that only says it is missing

missing_for_live() {
    tool java -version || say "  Java 17:  apt-get install openjdk-17-jre-headless   (or brew install openjdk@17)"
    tool mvn -version || say "  Maven:    apt-get install maven                     (or brew install maven)"
    tool go version || say "  Go 1.24+: apt-get install golang, or go.dev/dl      (or brew install go)"
}

case ${1:-} in
-h | --help | help) usage ;;
setup)
    activate
    ;;
test)
    shift
    activate
    which=plain
    case ${1:-} in live | all | slow) which=$1; shift ;; esac
    lacking=
    [ $which = plain ] || lacking=$(missing_for_live 2>&1)
    case $which in
    live) [ -z "$lacking" ] || die "the live tests need Kafka and Prism; missing here:" "$lacking" ;;
    all | slow) [ -z "$lacking" ] || say "the live tests are left out, since they need Kafka and Prism; missing here:"$'\n'"$lacking" ;;
    esac
    failed=
    if [ $which != plain ] && [ -z "$lacking" ] && ! python -m deploy.streaming.toolchain; then  # minutes, once; outside any test's time limit
        failed=1 lacking="what Maven and Go get"
        [ $which != live ] || exit 1
        say "the live tests are left out, since Kafka and Prism could not be had (see above); this counts as a failure"
    fi
    spread=(-n logical --dist loadfile)  # a worker a core; tests of one file share what they prepare, so they stay together
    case $which${lacking:+-} in
    plain | live- | all-) code=0; python -m pytest "${spread[@]}" "$@" || code=$? ;;
    live | all)  # those with a broker measure time: one after the other, with the machine to themselves
        code=0 plain=0
        python -m pytest "${spread[@]}" "$@" || plain=$?
        python -m pytest -m "live and not slow" "$@" || code=$?
        # 5: the arguments choose no test of that part.
        if [ $plain = 5 ]; then plain=0; elif [ $code = 5 ]; then code=0; fi
        [ $plain = 0 ] || { say "tests without a broker failed as well: see above"; code=$plain; }
        ;;
    # The longest take an hour, where pyproject.toml ends a test that hangs after some minutes.
    slow) code=0; python -m pytest -m slow -o faulthandler_timeout=7500 "$@" || code=$? ;;
    slow-) code=0; python -m pytest -m "slow and not live" -o faulthandler_timeout=7500 "$@" || code=$? ;;
    esac
    [ -z "$failed" ] || exit 1
    exit $code
    ;;
stream)
    shift
    [ -f deploy/flights/live.py ] || die "the live job is not built yet: deploy/flights/live.py is missing"
    activate
    lacking=$(missing_for_live 2>&1)
    [ -z "$lacking" ] || say "no Kafka and Prism here; missing:" $'\n'"$lacking"
    exec python -m deploy.flights.live "$@"
    ;;
[!-]*)
    die "no command '$1'; there are test, stream, setup and help." "Flags of the main job begin with a dash: ./run_local.sh --help"
    ;;
*)
    [ -f deploy/flights/batch.py ] || die "the main job is not here: deploy/flights/batch.py is missing"
    activate
    exec python -m deploy.flights.batch "$@"
    ;;
esac
