"""The architecture, as tests: what may import what, and habits that hide wrong results."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "lowrank_bdl"
LEVEL = {
    "errors": 0,
    "progress": 0,
    "linalg": 1,
    "parameters": 2,
    "models": 2,
    "curvature": 3,
    "posteriors": 3,
    "surfaces": 3,
    "subspaces": 4,
    "prediction": 5,
    "training": 6,
    "integrations": 7,
}
HEAVY = ("torchvision", "torchmetrics", "matplotlib", "sklearn", "pyro", "zuko", "scipy")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    return {module_name(file): file for file in sorted(LIBRARY.rglob("*.py"))}


def imported_modules(source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, module of this library) of every import, also those inside functions.

    ``from lowrank_bdl.linalg import moments`` imports the module ``lowrank_bdl.linalg.moments`` when there is one,
    else a name out of the package ``lowrank_bdl.linalg``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = []
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.append(full if full in known else str(node.module))
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "lowrank_bdl")


def layer(module: str) -> str:
    return module.split(".")[1]


def violations(sources: dict[str, str]) -> list[str]:
    """Every import that points up, and every use of the package root from inside it."""
    found = []
    for name, source in sources.items():
        if name == "lowrank_bdl":
            continue
        for line, used in imported_modules(source, set(sources)):
            if used == "lowrank_bdl":
                found.append(f"{name}:{line} imports the package root")
            elif LEVEL[layer(used)] > LEVEL[layer(name)]:
                found.append(f"{name}:{line} imports {used}, which lies above it")
    return found


class DropTypeOnlyImports(ast.NodeTransformer):
    """Remove ``if TYPE_CHECKING:`` blocks, which never run and so cannot make a cycle."""

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return ast.Pass()
        return self.generic_visit(node)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    running = {name: ast.unparse(DropTypeOnlyImports().visit(ast.parse(code))) for name, code in sources.items()}
    return {
        name: {used for _, used in imported_modules(source, set(sources)) if used != name}
        for name, source in running.items()
        if name != "lowrank_bdl"
    }


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: file.read_text(encoding="utf-8") for name, file in modules().items()}


def test_every_module_lies_in_a_known_layer(sources: dict[str, str]) -> None:
    unknown = [name for name in sources if name != "lowrank_bdl" and layer(name) not in LEVEL]
    assert not unknown


def test_imports_only_point_down(sources: dict[str, str]) -> None:
    assert not violations(sources)


def test_no_cycle_between_modules(sources: dict[str, str]) -> None:
    TopologicalSorter(import_graph(sources)).prepare()  # raises CycleError, which names the cycle


def test_a_planted_violation_is_found() -> None:
    upward = {
        "lowrank_bdl.linalg.a": "def f():\n    from lowrank_bdl.posteriors.swag import SWAG\n",
        "lowrank_bdl.posteriors.swag": "import lowrank_bdl.linalg.a\n",
    }
    assert violations(upward) == ["lowrank_bdl.linalg.a:2 imports lowrank_bdl.posteriors.swag, which lies above it"]
    with pytest.raises(CycleError, match="cycle"):
        TopologicalSorter(import_graph(upward)).prepare()
    with pytest.raises(AssertionError, match="line 1: relative import"):
        violations({"lowrank_bdl.linalg.a": "from . import b\n"})


def test_package_root_holds_imports_all_and_version_only() -> None:
    tree = ast.parse((LIBRARY / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")
        assert docstring or dunder or isinstance(node, ast.ImportFrom), f"line {node.lineno}: {ast.unparse(node)}"


def test_import_leaves_optional_packages_alone() -> None:
    """Only what gpytorch imports by itself when it finds it (scipy, pyro) may be there."""
    loaded = f"[name for name in {HEAVY} if name in sys.modules]"
    code = f"import sys, gpytorch; before = {loaded}; import lowrank_bdl; print((before, {loaded}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    before, after = ast.literal_eval(result.stdout)
    assert after == before and not set(after) & {"torchvision", "torchmetrics", "matplotlib", "sklearn"}


def attribute_calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names:
            yield node


def test_every_allclose_is_asserted() -> None:
    """A bare ``torch.allclose(a, b)`` as a statement checks nothing."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
        for statement in statements:
            bare = [] if not isinstance(statement, ast.Call) else [ast.unparse(statement.func).split(".")[-1]]
            lost = [name for name in bare if name in ("allclose", "equal", "isclose", "array_equal")]
            assert not lost, f"{file.relative_to(ROOT)}:{statement.lineno} drops the result of {lost[0]}"


def test_every_raises_names_the_message() -> None:
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for call in attribute_calls(ast.parse(file.read_text(encoding="utf-8")), "raises"):
            if ast.unparse(call.func) == "pytest.raises":
                keywords = {keyword.arg for keyword in call.keywords}
                function_form = len(call.args) > 1  # pytest.raises(Error, function).match(...)
                where = f"{file.relative_to(ROOT)}:{call.lineno}"
                assert "match" in keywords or function_form, f"{where} pytest.raises without match="


def test_library_never_touches_global_state(sources: dict[str, str]) -> None:
    """No global seed, default dtype or hard-wired device in the library."""
    forbidden = ("manual_seed_all", "seed_all", "set_default_dtype", "set_default_device", "cuda", "cpu")
    for name, source in sources.items():
        tree = ast.parse(source)
        for call in attribute_calls(tree, *forbidden):
            if isinstance(call.func, ast.Attribute):
                pytest.fail(f"{name}:{call.lineno} calls {ast.unparse(call.func)}")
        for call in attribute_calls(tree, "manual_seed", "seed"):
            assert ast.unparse(call.func) not in ("torch.manual_seed", "torch.seed", "random.seed", "np.random.seed"), (
                f"{name}:{call.lineno} sets the global seed"
            )
