"""What is built installs and runs somewhere else: a pure wheel, and a source distribution with csrc/ inside."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from ebft.version import __version__

ROOT = Path(__file__).parent.parent


def run(*command, **settings):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with both, built in an environment that has neither torch nor a use for a compiler."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)  # the wheel is built from the sdist
    return folder


def test_what_is_inside(dist):
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name == f"ebft-{__version__}-py3-none-any.whl"  # no compiler has seen it, and none is needed
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert inside >= {
        "ebft/run.py",
        "ebft/pruning/wanda.py",
        "ebft/py.typed",
        "ebft/output/page.html",
        "ebft_kernels/nn.py",
        "ebft_kernels/py.typed",
        "ebft_kernels/csrc/cpu/masks.cpp",  # for the build at first use
    }
    assert not any(name.startswith(("tests", "benchmarks")) for name in inside)
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "ebft", "ebft_kernels", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert source >= {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "constraints.txt", "docs/method.md"} | tracked
    assert source >= {"CITATION.cff", "mkdocs.yml", "docs/assets/frontier-dark.svg", "examples/notebook.ipynb"}
    assert any(name.startswith("csrc/") for name in source)


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_runs(dist, kind, tmp_path):
    (artefact,) = dist.glob(kind)
    place = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", place, artefact)
    code = "import ebft, ebft_kernels; print(ebft.__file__, ebft_kernels.__file__, 'versions', "
    code += "ebft.__version__, ebft_kernels.__version__)"
    environment = {"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin"}
    said = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert said.count(str(place)) == 2
    assert said.split("versions")[1].split() == [__version__, __version__]
    assert "--sparsity" in run(sys.executable, "-m", "ebft.run", "--help", cwd=tmp_path, env=environment)


def test_twine_finds_no_fault(dist):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    assert said.count("PASSED") == 2


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["references"][0]["doi"] == "10.48550/arXiv.2402.12419"
