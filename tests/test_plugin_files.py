"""A person's file as a module: found by path, told apart by place and text, and made again from its text alone."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from hybridflow import plugin_files
from hybridflow.config.load import load
from hybridflow.config.locate import import_name, name_of
from hybridflow.errors import ConfigError
from hybridflow.rewards.functions import load_function
from hybridflow.rewards.runner import RewardRunner
from hybridflow.rewards.settings import RewardSettings

TEXT = """from dataclasses import dataclass
from hybridflow.columns import ColumnSpec, register

register(ColumnSpec("mine_{0}", "row", "float32", "mine", "a column of my own"))

@dataclass(frozen=True)
class Thing:
    value: int = {0}

def score(prompt, response, answer, **row):
    return {0} + len(response)
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugin_files, "_LOADED", {})
    monkeypatch.setattr(plugin_files, "_INSTALLED", {})
    monkeypatch.chdir(tmp_path)


def write(path: str, number: int) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(TEXT.format(number))
    return path


def test_by_path_from_the_working_directory() -> None:
    thing = import_name(f"{write('plug/in.py', 1)}:Thing")
    assert thing().value == 1
    assert import_name("plug/in.py:Thing") is thing
    assert import_name(name_of(thing)) is thing
    assert pickle.loads(pickle.dumps(thing(5))) == thing(5)


def test_files_of_one_name_are_two_modules_and_a_changed_file_is_a_new_one() -> None:
    first, second = (import_name(f"{write(f'{folder}/in.py', n)}:Thing") for folder, n in (("a", 1), ("b", 2)))
    assert (first().value, second().value) == (1, 2)
    assert first.__module__ != second.__module__
    assert import_name(f"{write('a/in.py', 3)}:Thing")().value == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere.py:Thing", "there is no file 'nowhere.py'"),
        ("in.py:Thin", "in.py has no 'Thin'; did you mean 'Thing'"),
        ("raises.py:Thing", "its import raised ZeroDivisionError: division by zero"),
        ("opens.py:Thing", "its import raised FileNotFoundError"),
        ("Thing", "allowed: a dotted name, pkg.module.Name, or path/to/file.py:Name"),
    ],
)
def test_what_a_person_sees(name: str, text: str) -> None:
    write("in.py", 1)
    Path("raises.py").write_text("1 / 0\n")
    Path("opens.py").write_text("open('nothing.txt')\n")
    with pytest.raises(ConfigError, match=text):
        import_name(name)
    assert not [
        module for module in sys.modules if module.startswith(("hybridflow_plugin_raises", "hybridflow_plugin_o"))
    ]


def test_a_worker_of_ones_own_is_looked_for_with_the_configuration() -> None:
    """By path it is looked for, not imported: it may bring a whole engine."""
    given = ["algorithm=ppo", "runtime=local", "engine=torch", "rollout=hf", "placement=single"]
    with pytest.raises(ConfigError, match=r"workers\.critic: found 'nowhere\.py:Mine'; there is no such file \(from "):
        load([*given, "workers.critic=nowhere.py:Mine"])
    write("in.py", 4)
    assert load([*given, "workers.critic=in.py:Mine"]).worker("critic") == "in.py:Mine"


def test_another_process_makes_the_module_from_its_text(tmp_path: Path) -> None:
    """Where neither the file nor the folder exists; what the file registers is registered there too."""
    thing = import_name(f"{write('plug/in.py', 7)}:Thing")
    (tmp_path / "sent").write_bytes(pickle.dumps((plugin_files.loaded(), pickle.dumps(thing(8)))))
    (tmp_path / "plug/in.py").unlink()
    code = (
        "import pickle, sys; from hybridflow.plugin_files import install, load_file\n"
        "plugins, thing = pickle.load(open(sys.argv[1], 'rb')); install(plugins); install(plugins)\n"
        "import hybridflow.columns; print(pickle.loads(thing).value, hybridflow.columns.spec('mine_7').shape)\n"
        "print(load_file('plug/in.py').Thing().value)"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "sent")]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["8", "row", "7"], done.stderr


def test_a_reward_runs_where_its_file_is_not() -> None:
    load_function(f"{write('plug/in.py', 10)}:score")
    sent = plugin_files.loaded()
    Path("plug/in.py").unlink()
    plugin_files.install(sent)
    with RewardRunner(RewardSettings.model_validate({"function": "plug/in.py:score"})) as runner:
        assert runner.score(["1+1="], ["two"], ["2"]).values == [13.0]


def test_a_traceback_shows_lines_of_a_file_that_is_not_there() -> None:
    import traceback

    write("in.py", 1)
    Path("in.py").write_text("def fails():\n    raise LookupError('here')  # the line\n")
    fails = import_name("in.py:fails")
    Path("in.py").unlink()
    with pytest.raises(LookupError) as caught:
        fails()
    assert "# the line" in "".join(traceback.format_exception(caught.value))
