"""The layers of the package: a module imports only from its own layer or from below, also inside functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmtuner"
LAYERS = [
    {"console", "env", "aliases", "files", "locks", "outputs"},
    {"hparams", "tokenizer"},
    {"data"},
    {"model", "weights"},
    {"eval"},
    {"train", "chat", "report"},
    {"__main__"},
]
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py"))
# The one way from training to checkpoints on disk: merging what was trained.
WEIGHTS_IMPORTERS = {"llmtuner/train/tuner.py": {"export_model", "_merged_bytes"}}


def imported_modules(tree):
    """Every llmtuner module that a syntax tree imports, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.startswith("llmtuner."):
                yield name, node.lineno


def room(module):
    return module.split(".")[1] if "." in module else ""


def imports_of(path):
    tree = ast.parse((ROOT / path).with_suffix(".py").read_text(encoding="utf-8"))
    return list(imported_modules(tree))


@pytest.mark.parametrize("path", [path for path in MODULES if len(path.parts) > 1 and path.name != "__init__"], ids=str)
def test_a_module_imports_only_from_its_layer_or_below(path):
    own = path.parts[1]
    assert own in LAYER_OF, f"{own} belongs to no layer"
    for name, line in imports_of(path):
        assert LAYER_OF[room(name)] <= LAYER_OF[own], f"{path}.py, line {line}: {own} imports {name} from above"


def test_training_imports_nothing_of_checkpoints_on_disk():
    found = {}
    for path in MODULES:
        if path.parts[1:2] in [("train",), ("model",)]:
            tree = ast.parse((ROOT / path).with_suffix(".py").read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    inside = [name for name, _ in imported_modules(node) if room(name) == "weights"]
                    if inside:
                        found.setdefault(f"{path}.py", set()).add(node.name)
            all_imports = [name for name, _ in imported_modules(tree) if room(name) == "weights"]
            assert not all_imports or f"{path}.py" in WEIGHTS_IMPORTERS, f"{path}.py imports {all_imports}"
    assert found == WEIGHTS_IMPORTERS


def test_nothing_below_the_steps_imports_them():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert {"constants", "pipeline"} <= scripts
    for path in MODULES:
        for node in ast.walk(ast.parse((ROOT / path).with_suffix(".py").read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert scripts.isdisjoint(name.split(".")[0] for name in names), f"{path}.py imports {names}"


def test_an_import_inside_a_function_counts():
    tree = ast.parse("def train():\n    from llmtuner.train import workflow\n")
    assert ("llmtuner.train.workflow", 2) in imported_modules(tree)


DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)


def effects_of(text):
    """What a module does when it is imported, beside defining names."""
    for node in ast.parse(text).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        if not (isinstance(node, DEFINITIONS) or is_docstring or is_guarded):
            yield ast.unparse(node)
        elif isinstance(node, ast.Assign) and not all(
            isinstance(target, ast.Name | ast.Tuple) for target in node.targets
        ):
            yield ast.unparse(node)  # os.environ["X"] = ..., library.function = ...


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_importing_a_module_changes_nothing(path):
    found = list(effects_of((ROOT / path).with_suffix(".py").read_text(encoding="utf-8")))
    if path.parts == ("llmtuner", "__init__"):
        assert len(found) == 1
        assert found[0].startswith("if sys.version_info < (3, 11):")  # an old Python gets a message
    else:
        assert found == []


@pytest.mark.parametrize(
    "text", ["logging.disable()", "os.environ['X'] = '1'", "torch.add = add", "if x:\n    y()", "for x in y:\n    z(x)"]
)
def test_an_effect_is_found(text):
    assert list(effects_of(f'"""Documentation."""\nimport os\n{text}\n')) == [text]
