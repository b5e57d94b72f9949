"""Imports run one way, and importing the package has no side effects."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Which layer a module of spectriton/ is in; whatever is not named here is an application.
LAYER_OF = {
    "_check": "base",
    "_counts": "base",
    "_registry": "base",
    "frequencies": "base",
    "packed": "base",
    "reference": "reference",
    "_backend": "backend",
    "_native": "backend",
    "tuning": "backend",
    "_mixing": "backend",
    "_plans": "ops",
    "codec": "ops",
    "ops": "ops",
    "nn": "nn",
    "models": "models",
    "__init__": "package",
}

# What a layer may import besides itself.
MAY_IMPORT = {
    "kernels": set(),
    "base": set(),
    "reference": {"base"},
    "backend": {"base", "reference", "kernels"},
    "ops": {"base", "reference", "kernels", "backend"},
    "nn": {"base", "ops"},
    "models": {"base", "ops", "nn"},
    "application": {"base", "reference", "kernels", "backend", "ops", "nn", "models", "package"},
    "package": {"base", "ops", "nn", "models", "application"},
}

# Memory accounting is an application that must work with any network: it knows the ops and nothing above them.
MAY_IMPORT_BY_MODULE = {"memory": {"base", "ops"}}

# Only applications may need what the extras install, and only they and the kernels may import triton.
EXTRAS = {
    "PIL",
    "datasets",
    "matplotlib",
    "mpl_toolkits",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "torchvision",
    "typer",
}


def sources() -> list[Path]:
    return sorted([*(ROOT / "spectriton").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if ROOT / "kernels" in path.parents else ROOT
    parts = list(path.relative_to(base).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


MODULES = {module_name(path) for path in sources()}
MODULES |= {name.rpartition(".")[0] for name in MODULES if "." in name}


def layer(module: str) -> str:
    """The layer of a module of the project."""
    parts = module.split(".")
    if parts[0] in ("spectriton_kernels", "spectriton_native"):
        return "kernels"
    return LAYER_OF.get(parts[1] if len(parts) > 1 else "__init__", "application")


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, those in functions too, but none that only type checkers look at."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from nodes(other)
            continue
        yield child
        yield from nodes(child)


def imports(source: str, module: str, package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; ``from package import submodule`` gives the submodule."""
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if package else 0)]
                target = ".".join([*parts, *([target] if target else [])])
            for alias in node.names:
                name = f"{target}.{alias.name}"
                yield node.lineno, name if name in known else target


def violations(source: str, module: str, package: bool, known: set[str]) -> list[str]:
    found = []
    own = layer(module)
    last = module.split(".")[-1]
    allowed = MAY_IMPORT_BY_MODULE.get(last, MAY_IMPORT[own]) if own == "application" else MAY_IMPORT[own]
    for line, target in imports(source, module, package, known):
        top = target.split(".")[0]
        if top in ("spectriton", "spectriton_kernels", "spectriton_native"):
            other = layer(target)
            # Applications may use one another, but for those with a list of their own.
            same = other == own and not (own == "application" and last in MAY_IMPORT_BY_MODULE and target != module)
            if not same and other not in allowed:
                found.append(f"{module}:{line} ({own}) imports {target} ({other})")
        elif top in EXTRAS and own != "application":
            found.append(f"{module}:{line} ({own}) imports {target}, which only applications may")
        elif top == "triton" and own not in ("kernels", "application"):
            found.append(f"{module}:{line} ({own}) imports {target}, which belongs in kernels/")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    found = violations(path.read_text(), module_name(path), path.name == "__init__.py", MODULES)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("spectriton_kernels.pack", "import spectriton", True),
        ("spectriton_kernels.pack", "from spectriton._check import fail", True),
        ("spectriton_kernels.pack", "from . import _launch\nimport triton", False),
        ("spectriton.reference.pack", "from spectriton.ops import pack", True),
        ("spectriton.reference.pack", "def f():\n    from ..ops import pack", True),
        ("spectriton.reference.pack", "from ..frequencies import frequency_grid", False),
        ("spectriton.ops.pack", "import spectriton_kernels", False),
        ("spectriton.ops.pack", "import triton", True),
        ("spectriton.ops.pack", "from spectriton import memory", True),
        ("spectriton.ops.pack", "from spectriton import nn", True),
        ("spectriton.nn.blocks", "from spectriton import ops, packed", False),
        ("spectriton.nn.blocks", "from spectriton.reference import pack", True),
        ("spectriton.nn.blocks", "import spectriton_native", True),
        ("spectriton_native.rows", "from spectriton import reference", True),
        ("spectriton.nn.blocks", "from spectriton import models", True),
        ("spectriton.models.vgg", "from spectriton import nn as snn", False),
        ("spectriton.models.vgg", "from spectriton import train", True),
        ("spectriton.models.vgg", "import matplotlib.pyplot as plt", True),
        (
            "spectriton.models.vgg",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spectriton import train",
            False,
        ),
        ("spectriton.memory", "from spectriton import ops", False),
        ("spectriton.memory", "from spectriton import nn", True),
        ("spectriton.memory", "from spectriton import train", True),
        ("spectriton.compare", "from spectriton import memory, models\nimport matplotlib", False),
    ],
)
def test_the_test_itself(module, source, wrong):
    known = MODULES | {module, "spectriton.nn", "spectriton.models", "spectriton.ops", "spectriton.train"}
    assert bool(violations(source, module, False, known)) is wrong


IMPORT_SIDE_EFFECTS = """
import json, random, sys
import numpy as np
import torch

def flags():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "matmul precision": torch.get_float32_matmul_precision(),
        "matmul tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "rng": hash(bytes(torch.get_rng_state().tolist())),
        "python rng": hash(random.getstate()),
        "numpy rng": hash(np.random.get_state()[1].tobytes()),
    }

before = flags()
torch_modules = set(sys.modules)
started = []
STARTS = ("subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "os.exec", "ctypes.dlopen")
sys.addaudithook(lambda event, arguments: started.append(event) if event in STARTS else None)
import spectriton
from spectriton import PackedSpectrum, memory, models, nn, ops, tuning
new = {name.partition(".")[0] for name in set(sys.modules) - torch_modules}
print(json.dumps({
    "before": before, "after": flags(), "new": sorted(new), "cuda": torch.cuda.is_initialized(),
    "started": started,
    "dispatch": len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
}))
"""


def test_import_has_no_side_effects():
    paths = [str(ROOT), str(ROOT / "kernels")]
    program = f"import sys\nsys.path[:0] = {paths!r}\n" + IMPORT_SIDE_EFFECTS
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["after"] == seen["before"]
    assert seen["cuda"] is False
    assert seen["dispatch"] == 0
    assert not seen["started"], "importing spectriton runs a program or loads a library"
    assert not EXTRAS & set(seen["new"]), "importing spectriton imports what only its extras install"
    assert "spectriton_kernels" not in seen["new"], (
        "importing spectriton imports the kernels, and so fixes triton's mode"
    )
    assert "spectriton_native" not in seen["new"], "the C functions are for those who call them"
