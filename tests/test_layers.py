"""The law of imports: a file imports only from lower rows. See docs/architecture.md."""

from __future__ import annotations

import ast
import graphlib
import inspect
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src" / "hivi"

ROWS: tuple[tuple[str, ...], ...] = (
    ("_arviz.py", "_errors.py", "_tree.py"),
    ("_space.py", "_jaxprs.py", "_normal.py", "_compile.py"),
    ("_locality/", "_likelihoods/", "_bijections.py", "_pairs.py"),
    ("_factored.py", "_likelihood.py", "_dependence.py", "_margins.py", "_layout.py"),
    ("_target/",),
    ("_families/",),
    ("_bounds.py",),
    ("_estimators/",),
    ("_fit/",),
    ("_marginal.py", "plots.py"),
    ("_stationarity.py",),
    ("_trust.py",),
    ("_comparison.py",),
    ("diagnostics.py", "_curvature.py", "interop/"),
    ("compare.py", "topics/"),
    ("reproduce/",),
    ("cli/",),
)
ROW = {place: row for row, places in enumerate(ROWS) for place in places}

# Inside a folder, files import its base.py alone, and these:
PAIRS = {
    *(
        (("_locality/axes.py"), f"_locality/{part}.py")
        for part in ("rules", "indexing", "integers", "loops", "merging", "zeros")
    ),
    *(("_locality/reading.py", f"_locality/{part}.py") for part in ("axes", "zeros")),
    *(("_locality/zeros.py", f"_locality/{part}.py") for part in ("rules", "integers")),
    *(
        ("_families/hierarchical.py", f"_families/{part}.py")
        for part in ("auxiliary", "flow", "full_rank", "low_rank", "mean_field", "mixture")
    ),
    ("_families/copula.py", "_families/latent_copula.py"),
    ("_families/copula.py", "_families/reverse.py"),
    ("_families/latent_copula.py", "_families/reverse.py"),
    ("_likelihoods/negative_binomial.py", "_likelihoods/poisson.py"),
    ("_likelihoods/threshold.py", "_likelihoods/marginals.py"),
    ("_likelihoods/dispersed.py", "_likelihoods/marginals.py"),
    ("_families/amortised.py", "_families/mean_field.py"),
    ("_families/base.py", "_families/checks.py"),
    ("_families/standardised.py", "_families/flow.py"),
    ("_families/amortised.py", "_families/networks.py"),
    ("_families/structured.py", "_families/networks.py"),
    ("_families/structured.py", "_families/product.py"),
    ("_families/structured.py", "_families/rows.py"),
    ("_families/product.py", "_families/rows.py"),
    ("_families/recursive.py", "_families/auxiliary.py"),
    ("_estimators/auto.py", "_estimators/hierarchical_score.py"),
    ("_estimators/auto.py", "_estimators/cost.py"),
    ("_estimators/auto.py", "_estimators/differences.py"),
    ("_estimators/auto.py", "_estimators/enumeration.py"),
    ("_estimators/auto.py", "_estimators/exact.py"),
    ("_estimators/auto.py", "_estimators/expectation.py"),
    ("_estimators/auto.py", "_estimators/factor_expectation.py"),
    ("_estimators/exact.py", "_estimators/factor_expectation.py"),
    ("_estimators/factor_expectation.py", "_estimators/differences.py"),
    ("_estimators/evaluation.py", "_estimators/by_row.py"),
    ("_estimators/evaluation.py", "_estimators/surrogate.py"),
    ("_estimators/surrogate.py", "_estimators/by_row.py"),
    ("_estimators/surrogate.py", "_estimators/expectation.py"),
    ("_estimators/surrogate.py", "_estimators/hierarchical_score.py"),
    ("_families/codes.py", "_families/auxiliary.py"),
    ("_families/codes.py", "_families/hierarchical.py"),
    ("_estimators/auto.py", "_estimators/pathwise.py"),
    ("_estimators/auto.py", "_estimators/score.py"),
    ("_estimators/auto.py", "_estimators/sticking.py"),
    ("_estimators/auto.py", "_estimators/measured.py"),
    ("_estimators/measured.py", "_estimators/control_variates.py"),
    ("_estimators/second_order.py", "_estimators/hessian.py"),
    ("_estimators/measured.py", "_estimators/cost.py"),
    ("_estimators/measured.py", "_estimators/differences.py"),
    ("_estimators/measured.py", "_estimators/disarm.py"),
    ("_estimators/measured.py", "_estimators/enumeration.py"),
    ("_estimators/measured.py", "_estimators/factor_expectation.py"),
    ("_estimators/measured.py", "_estimators/score.py"),
    ("_estimators/measured.py", "_estimators/surrogate.py"),
    ("_estimators/differences.py", "_estimators/disarm.py"),
    ("_estimators/score.py", "_estimators/leave_one_out.py"),
    ("_target/log_joint.py", "_target/base.py"),
    ("_target/origin.py", "_target/densities.py"),
    ("_target/statements.py", "_target/densities.py"),
}
FREE = {"_fit/", "cli/", "reproduce/", "topics/"}  # any imports inside, as long as they make no circle

FILES = sorted(p.relative_to(SRC).as_posix() for p in SRC.rglob("*.py"))
CODE = [f for f in FILES if Path(f).name != "__init__.py"]
FOLDERS = {f"{parent.as_posix()}/" for f in FILES for parent in Path(f).parents if parent != Path()}


def place(file: str) -> str:
    """The entry of the table that a file belongs to: `_fit/loop.py` -> `_fit/`."""
    return file if "/" not in file else file.split("/")[0] + "/"


def locate(dotted: str) -> str | None:
    """The file or folder of `hivi.a.b`, or None where that is a name inside a file."""
    path = dotted.removeprefix("hivi").strip(".").replace(".", "/")
    if path == "":
        return "__init__.py"
    return next((p for p in (f"{path}.py", f"{path}/") if p in FILES or p in FOLDERS), None)


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement, at any depth, except those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from statements(ast.Module([other], []))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from statements(child)


def imports(source: str, file: str) -> list[tuple[int, str]]:
    """(line, what), once, for each import from hivi; what is a file, a folder, or `?` and a name not found."""
    package = ["hivi", *Path(file).parts[:-1]]
    found = []
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        else:
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            names = [(origin, alias.name) for alias in node.names]
        for origin, name in names:
            if origin.split(".")[0] == "hivi":
                inner = locate(f"{origin}.{name}") if name else None
                found.append((node.lineno, inner or locate(origin) or f"?{origin}"))
    return list(dict.fromkeys(found))  # one line may name several things


def verdict(file: str, target: str) -> str | None:
    """Why `file` may not import `target`, or None where it may."""
    if target.startswith("?"):
        return f"{target[1:]} does not exist"
    if target == "__init__.py":
        return "src/hivi/__init__.py is above every row; import the file that defines the name"
    here, there = place(file), place(target)
    if there not in ROW:
        return None  # test_every_file_has_a_row says so
    if here != there:
        return None if ROW[there] < ROW[here] else f"row {ROW[here]} may not import from row {ROW[there]} ({there})"
    if target in FOLDERS:
        return f"{target} is this file's own folder; import the file"
    if here in FREE or target == f"{here}base.py" or (file, target) in PAIRS:
        return None
    return f"inside {here}, only base.py may be imported (or a pair listed in tests/test_layers.py)"


def test_every_file_has_a_row():
    unlisted = sorted({place(f) for f in FILES if f != "__init__.py"} - set(ROW))
    assert not unlisted, (
        f"no row for {', '.join(unlisted)}: give it one in ROWS of tests/test_layers.py and in docs/architecture.md"
    )


@pytest.mark.parametrize("file", [f for f in CODE if place(f) in ROW])
def test_imports_come_from_lower_rows(file):
    wrong = [
        f"{file}:{line} imports {target.lstrip('?')}: {why}"
        for line, target in imports((SRC / file).read_text(encoding="utf-8"), file)
        if (why := verdict(file, target))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circular_imports():
    graph = {f: {t for _, t in imports((SRC / f).read_text(encoding="utf-8"), f) if t in CODE} for f in CODE}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the files
    assert set(order) == set(CODE)


@pytest.mark.parametrize("file", [f for f in FILES if f not in CODE])
def test_init_files_only_re_export(file):
    source = (SRC / file).read_text(encoding="utf-8")
    body = ast.parse(source).body
    is_docstring = [isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body]
    assert any(is_docstring[:1]), f"{file}: should start with a docstring"
    for node, docstring in zip(body, is_docstring, strict=True):
        dunder = isinstance(node, ast.Assign) and all(
            isinstance(t, ast.Name) and t.id.startswith("__") and t.id.endswith("__") for t in node.targets
        )
        allowed = docstring or dunder or isinstance(node, ast.Import | ast.ImportFrom)
        assert allowed, f"{file}:{node.lineno} does more than re-export"
    if file != "__init__.py":
        own = place(file)
        abroad = [f"{file}:{line} re-exports {t}" for line, t in imports(source, file) if place(t) != own]
        assert not abroad, "\n".join(abroad)


def test_files_are_short():
    lines = {f: len((SRC / f).read_text(encoding="utf-8").splitlines()) for f in CODE}
    long = {f: n for f, n in lines.items() if n > 400}
    assert not long, f"over 400 lines, split: {long}"
    assert statistics.median(lines.values()) < 180


def test_public_names_are_documented():
    import hivi

    public = {name: getattr(hivi, name) for name in getattr(hivi, "__all__", ())}
    bare = []
    for name, value in public.items():
        if inspect.ismodule(value) or callable(value):
            doc = getattr(value, "__doc__", None)
            # dataclasses and named tuples make one up: "Name(field, field)"
            if not doc or doc.startswith(f"{getattr(value, '__name__', name)}("):
                bare.append(name)
    assert not bare, f"no docstring: {', '.join(bare)}"


@pytest.mark.parametrize(
    ("file", "source", "targets"),
    [
        ("_factored.py", "import numpy\nfrom hivi import _errors", ["_errors.py"]),
        ("_fit/loop.py", "from . import step\nfrom .._errors import FitError", ["?hivi._fit", "_errors.py"]),
        ("_space.py", "import hivi._errors as e\nfrom hivi import fit", ["_errors.py", "__init__.py"]),
        ("_space.py", "def f():\n    from hivi._locality.base import ALL", ["_locality/base.py"]),
        ("_space.py", "if TYPE_CHECKING:\n    import hivi\nelse:\n    import hivi._errors", ["_errors.py"]),
        ("_space.py", "from hivi._no_such import thing", ["?hivi._no_such"]),
        ("_space.py", "from hivi import _locality", ["_locality/"]),
    ],
)
def test_the_reader_of_imports(file, source, targets, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FILES", ["__init__.py", "_errors.py", "_locality/base.py"])
    monkeypatch.setattr(f"{__name__}.FOLDERS", {"_locality/"})
    assert [target for _, target in imports(source, file)] == targets


@pytest.mark.parametrize(
    ("file", "target", "allowed"),
    [
        ("_factored.py", "_locality/base.py", True),
        ("_factored.py", "_target/base.py", False),  # upwards
        ("plots.py", "diagnostics.py", False),  # the same row
        ("_families/flow.py", "_families/base.py", True),
        ("_families/flow.py", "_families/mean_field.py", False),
        ("_families/flow.py", "_families/", False),  # its own folder
        ("_locality/axes.py", "_locality/rules.py", True),
        ("_locality/rules.py", "_locality/axes.py", False),
        ("_fit/loop.py", "_fit/step.py", True),
        ("cli/main.py", "__init__.py", False),
    ],
)
def test_the_law(file, target, allowed, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FOLDERS", {"_families/"})
    assert (verdict(file, target) is None) is allowed
