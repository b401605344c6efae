"""The wheel and the sdist: what is in them, and that they suffice where this repository is not."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from hatchling.build import build_sdist, build_wheel

import stackwise
from stackwise.config import StackWiseConfig
from stackwise.errors import ConfigError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as file:
        yield file


def test_the_wheel_holds_the_package_the_configs_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "src"
    package = {
        str(file.relative_to(source))
        for file in (source / "stackwise").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    } | {f"stackwise/{name}" for name in SHIPPED}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package and {"stackwise/py.typed", "stackwise/configs/models/llama_7b.yaml"} <= names
    for name in SHIPPED:
        assert wheel.read(f"stackwise/{name}") == (ROOT / name).read_bytes()


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"stackwise-{stackwise.__version__}.dist-info/"
    assert wheel.read(f"{info}licenses/LICENSE").startswith(b"MIT License\n")
    about = message_from_string(wheel.read(f"{info}METADATA").decode())
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("stackwise", stackwise.__version__, "MIT")
    assert about["Requires-Python"] == ">=3.11" and about.get_payload().startswith("# StackWise")
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{info}entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"stackwise": "stackwise.__main__:run"}


def test_the_version_is_one_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## \[(\d[^]]*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == (stackwise.__version__, citation["date-released"])
    assert citation["version"] == stackwise.__version__ and citation["license"] == "MIT"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_read_by_its_name_where_there_is_no_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert StackWiseConfig.from_yaml(name) == StackWiseConfig.from_yaml(ROOT / name)


def test_a_file_of_ones_own_comes_before_a_shipped_one_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/one_billion.yaml").write_text("training: {seed: 17}")
    assert StackWiseConfig.from_yaml("configs/one_billion.yaml").training.seed == 17
    with pytest.raises(
        ConfigError, match=r"^configs/one_bilion\.yaml: no such config file; did you mean configs/one_bi"
    ):
        StackWiseConfig.from_yaml("configs/one_bilion.yaml")
    with pytest.raises(ConfigError, match=r"^configs/\.\./py\.typed: no such config file$"):
        StackWiseConfig.from_yaml("configs/../py.typed")


SMALL = ["model.d_model=16", "model.n_heads=2", "training.seq_len=11", "training.device=cpu"]


@pytest.mark.slow
def test_a_wheel_from_the_sdist_trains_where_nothing_else_of_the_repository_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "tests"} <= {p.name for p in unpacked.iterdir()}
    monkeypatch.chdir(unpacked)
    built = tmp_path / build_wheel(str(tmp_path))
    clean = tmp_path / "clean"
    venv.create(clean, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(clean), "platbase": str(clean)}))
    # The dependencies are those of this environment; a .pth file found through another one is not read, so that this
    # repository, where it is installed in place, is not among them.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "STACKWISE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path),
    }  # fmt: skip
    away = tmp_path / "away"
    away.mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=away, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(str(clean / "bin/python"), "-m", "pip", "install", "--no-deps", "--no-index", str(built))
    command = str(clean / "bin/stackwise")
    where = run(str(clean / "bin/python"), "-c", "import stackwise; print(stackwise.__file__)")
    assert Path(where.strip()).is_relative_to(site), "the wheel's package, and no other, is imported"
    assert run(command, "--version") == f"stackwise {stackwise.__version__}\n"
    assert "append-frozen" in run(command, "recipes")
    (away / "book.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 60)
    run(command, "init", "own.yaml", "--preset", "characters")
    run(command, "train", "own.yaml", "data.path=book.txt", "--out", "own", *SMALL, "training.max_steps=9")
    run(command, "train", "configs/shakespeare_char.yaml", "data.path=book.txt", "--out", "shipped", *SMALL,
        "training.max_steps=9")  # fmt: skip
    scores = json.loads(run(command, "eval", "shipped", "--json"))
    assert 0 < scores["bits_per_byte"] < 8
    exported = json.loads(run(command, "export", "shipped", "folder", "--json"))
    assert exported["parameters"] > 0 and (away / "folder/model.safetensors").is_file()
