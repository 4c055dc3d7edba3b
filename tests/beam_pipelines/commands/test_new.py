"""`millrace new` writes a case that runs as it is."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from beam_pipelines import cli
from beam_pipelines.commands.new import main
from schemas.errors import DefinitionError


def test_the_commands_it_prints_take_the_new_case_through_all_three_pipelines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "my_case"]) == 0
    reported = capsys.readouterr().out
    commands = [shlex.split(line) for line in reported.splitlines() if re.match(r"  (python|millrace) ", line)]
    assert [command[1] for command in commands] == [
        "my_case/data.py",
        "plan",
        "features",
        "training",
        "inference",
        "tables",
    ]
    for program, *arguments in commands:
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        else:
            assert cli.main(arguments) == 0, arguments
    out = capsys.readouterr().out
    assert re.search(r"predictions/my_case .* 5,000 ", out)
    runs = {each["pipeline"]: each for each in (json.loads(path.read_text()) for path in Path("out").rglob("run.json"))}
    assert runs["training"]["champion"] == "1"
    assert runs["inference"]["rows_out"] == 5000


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "definition.py").write_text("# work of weeks\n")
    with pytest.raises(DefinitionError, match="new folder"):
        main(["mine", "--folder", str(tmp_path)])
    assert (tmp_path / "mine" / "definition.py").read_text() == "# work of weeks\n"


@pytest.mark.parametrize("name", ["My-Case", "../up", "1st", ""])
def test_names_that_cannot_name_a_table_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DefinitionError, match="name of a case"):
        main([name, "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_what_it_writes_passes_the_formatter(tmp_path: Path) -> None:
    main(["my_case", "--folder", str(tmp_path)])
    root = Path(__file__).parents[3]
    # Its commands name paths, which are as long as they are.
    for action in (["check", "--ignore", "E501"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *action, "--config", str(root / "pyproject.toml"), str(tmp_path)]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
