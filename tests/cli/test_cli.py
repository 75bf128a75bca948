# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one-sentence errors, and what it imports."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fomoe import cli
from fomoe.cli import main
from fomoe.errors import SiteFailed, UserError
from fomoe.federation.config import Config

PACKAGE = Path(cli.__file__).parents[1]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text('[federation]\nstrategy = "fomoe"\nsites = 4\noverlap = 2\n')
    return file


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch):
    """Puts a function in place of the one a command runs: replace("fomoe.demo", run=function)."""

    def put(name: str, **functions: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("train", "export", "report", "demo", "bench", "build-info"):
        assert command in text


def test_train_gets_the_file_with_overrides_and_resume(config_file: Path, replace, capsys):
    calls: list[tuple[Config, Path | None]] = []

    def train(config: Config, *, resume: Path | None, site: int | None) -> dict[str, Any]:
        assert site is None
        calls.append((config, resume))
        return {"loss": 2.5, "token": "byte", "bigram_entropy": 2.75}

    replace("fomoe.federation.launch", train=train)
    arguments = ["train", "--config", str(config_file), "federation.rounds=3"]
    assert main(arguments) == 0
    assert main([*arguments, "run.folder=here", "--resume", "old"]) == 0
    assert [config.federation.rounds for config, _ in calls] == [3, 3]
    assert calls[1][0].run.folder == "here"
    assert [resume for _, resume in calls] == [None, Path("old")]
    assert "loss 2.500 nats per byte" in capsys.readouterr().out


def test_export_report_and_demo_pass_their_arguments_on(replace):
    calls: list[Any] = []
    replace("fomoe.federation.export", export=lambda *a: calls.append(a))
    replace("fomoe.federation.report", write_report=lambda *a: calls.append(a))
    replace("fomoe.demo", run=lambda **k: calls.append(k) or {"verdicts": []})
    assert main(["export", "run", "model.safetensors"]) == 0
    assert main(["export", "run", "model", "--format", "glm4-moe"]) == 0
    assert main(["report", "a", "b", "--output", "r.html"]) == 0
    assert main(["demo", "--folder", "x", "--seed", "5"]) == 0
    assert calls == [
        (Path("run"), Path("model.safetensors"), "fomoe"),
        (Path("run"), Path("model"), "glm4-moe"),
        ([Path("a"), Path("b")], Path("r.html")),
        {"folder": Path("x"), "seed": 5, "overrides": []},
    ]


def test_a_users_mistake_is_one_line_on_stderr_and_exit_code_2(
    config_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "--config", str(config_file), "federation.overlap=9"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: {config_file} with overrides: federation.overlap = 9 is larger than "
        "federation.sites = 4\n"
    )


def test_a_mistake_found_while_running_is_one_line_too(replace, capsys: pytest.CaptureFixture[str]):
    def run(**_: object) -> None:
        raise UserError("data.paths: nothing there")

    replace("fomoe.demo", run=run)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "error: data.paths: nothing there\n"


def test_a_site_that_fails_is_exit_code_1(replace, capsys: pytest.CaptureFixture[str]):
    def run(**_: object) -> None:
        raise SiteFailed("the process of site 1 died")

    replace("fomoe.demo", run=run)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "error: the process of site 1 died\n"


def test_a_wrong_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert main(["train"]) == 2
    assert "--config" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130(replace):
    def run(**_: object) -> None:
        raise KeyboardInterrupt

    replace("fomoe.demo", run=run)
    assert main(["demo"]) == 130


def test_an_error_of_the_program_keeps_its_traceback(replace):
    def run(**_: object) -> None:
        raise ZeroDivisionError

    replace("fomoe.demo", run=run)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_help_and_configuration_errors_import_no_heavy_package(config_file: Path):
    # fomoe itself imports torch, so an empty package of that name stands in for it here.
    program = f"""
import sys, types
package = types.ModuleType("fomoe")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["fomoe"] = package
from fomoe.cli import main
assert main(["--help"]) == 0
assert main(["train", "--config", {str(config_file)!r}, "model.dim=x"]) == 2
heavy = {{"torch", "matplotlib", "jinja2", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
