"""The house rules that a machine can check: imports point one way, importing costs nothing, one stem per primitive."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cwfast

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "cwfast"
# Lowest first; a module may import from its own level and from those before it.
LEVELS = [
    {"errors", "networks", "_checks", "_backends", "_parameters", "_scopes", "_shards", "_ranks", "_workers"}
    | {"reference", "testing", "checkpoint"},
    {"ops"},
    {"layers", "_picks", "_radix", "_streaming", "_mask_files", "_artefact_files", "_mask_view"},
    {"masks", "_selecting", "_sharded_masks", "_stand_ins", "_tracking", "scoring", "freezing", "optim", "distributed"}
    | {"data"},
    {"training", "_fleet"},
    {"defense", "mia"},
    {"integrations", "llm", "shadow"},
    {"report"},
    {"demo", "demo_llm", "examples", "study"},
    {"commands"},
    {"cli"},
]
STRANGERS = [("defense", "mia"), ("mia", "defense")]  # these two do not know each other


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def modules() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def imported(path: Path) -> set[str]:
    """The rooms of cwfast that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "cwfast" else str(node.module) for alias in node.names
            }
    return {room(name) for name in found if name.split(".")[0] == "cwfast"} - {"", "kernels", "_C"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert here in level, f"{here} is a new room: give it a level"
    for other in imported(path) - {here}:
        assert level[other] <= level[here], f"{here} may not import {other}"
        assert (here, other) not in STRANGERS


def test_the_check_sees_a_wrong_arrow(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "def f():\n    from cwfast.cli import main\n    from cwfast import demo\n    import cwfast.mia.metrics\n"
    )
    assert imported(wrong) == {"cli", "demo", "mia"}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import cwfast",
        "import cwfast; dir(cwfast); cwfast.__version__",
        "import contextlib, cwfast.cli\nwith contextlib.suppress(SystemExit): cwfast.cli.main(['--help'])",
        "import contextlib, cwfast.cli\nwith contextlib.suppress(SystemExit): cwfast.cli.main(['demo', '--help'])",
        "import contextlib, cwfast.cli\nwith contextlib.suppress(SystemExit): cwfast.cli.main(['audit', '--help'])",
        "import contextlib, cwfast.cli\nwith contextlib.suppress(SystemExit): cwfast.cli.main(['audit-llm', '--help'])",
        "import contextlib, cwfast.cli\nwith contextlib.suppress(SystemExit): cwfast.cli.main(['demo-llm', '--help'])",
        "import cwfast.llm; dir(cwfast.llm)",
    ],
)
def test_importing_and_help_load_no_heavy_library(code):
    heavy = "{'torch', 'triton', 'transformers', 'numpy', 'matplotlib'}"
    printed = python(f"{code}\nimport sys; print('LOADED', sorted({heavy} & set(sys.modules)))")
    assert printed.splitlines()[-1] == "LOADED []"


def test_every_public_name_resolves_and_is_in_the_stub():
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    typed = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(cwfast.__all__)
    for name in cwfast.__all__:
        assert getattr(cwfast, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cwfast.nonsense


def test_kernels_import_no_other_room():
    for path in sorted((ROOT / "kernels" / "cw").rglob("*.py")):
        assert imported(path) == set(), path


@pytest.mark.parametrize("stem", ["saliency", "select", "rewind", "logit_stats", "lm_token_stats"])
def test_a_primitive_has_the_same_name_in_every_room(stem):
    for place in (
        f"cwfast/ops/{stem}.py",
        f"csrc/{stem}.h",
        f"csrc/cpu/{stem}.cpp",
        f"tests/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
    ):
        assert (ROOT / place).is_file(), place
