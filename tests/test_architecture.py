"""The import rules of the design, kept by looking at every import statement of the package."""

import ast
from pathlib import Path

import pytest

import kconvert
import kconvert_qat

ROOTS = [Path(package.__file__).parent for package in (kconvert, kconvert_qat)]
FILES = [(root, path) for root in ROOTS for path in sorted(root.rglob("*.py"))]
# Own packages that each room may name, besides itself; what is missing here may name any but cli.
FORMATS_MAY = {"kconvert.formats", "kconvert.checkpoint.header", "kconvert.dialects.base"}
OS_FREE = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "fcntl", "glob", "safetensors"}
HEAVY = {
    "numpy",
    "numba",
    "torch",
    "click",
    "tqdm",
    "huggingface_hub",
    "compressed_tensors",
    "transformers",
    "matplotlib",
    "safetensors",
}


def module_name(root, path):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((root.name, *(part for part in parts if part != "__init__")))


MODULES = {module_name(root, path): ast.parse(path.read_text("utf-8")) for root, path in FILES}


def type_checking_only(tree):
    """Nodes below `if TYPE_CHECKING:`; they import nothing at run time."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {id(node) for block in blocks for statement in block.body for node in ast.walk(statement)}


def imports(tree, *, top_level=False, typing=False):
    """Dotted names that a module imports: `from a import b` counts as a and as a.b."""
    skip = set() if typing else type_checking_only(tree)
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in skip or (top_level and id(node) in inner):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(f"{package}.")


CLI = sorted(module for module in MODULES if within(module, "kconvert.cli"))
QAT = sorted(module for module in MODULES if within(module, "kconvert_qat"))
OUTSIDE_CLI = sorted(MODULES.keys() - set(CLI))


def offenders(modules, forbidden, **options):
    return {
        (module, name)
        for module in modules
        for name in imports(MODULES[module], **options)
        if any(within(name, package) for package in forbidden)
    }


def test_the_rooms_of_the_design_are_there():
    rooms = "cli engine finalize journal manifest plan verify writer formats.dense formats.packed formats.kernels"
    rooms += " checkpoint.header checkpoint.source dialects.registry dialects.fp8 checkpoint.hub parity.oracle transfer.staging"
    assert {f"kconvert.{room}" for room in rooms.split()} <= MODULES.keys()


def test_nothing_imports_the_command_line():
    assert not offenders(OUTSIDE_CLI, ["kconvert.cli"], typing=True)


def test_formats_know_no_files():
    formats = [module for module in MODULES if within(module, "kconvert.formats")]
    assert not offenders(formats, OS_FREE)
    own = offenders(formats, ["kconvert"])
    assert {name for _, name in own if not any(within(name, allowed) for allowed in FORMATS_MAY)} <= {
        "kconvert",
        "kconvert.checkpoint",
        "kconvert.formats",
    }


def test_formats_open_nothing():
    calls = {
        (module, node.func.id)
        for module, tree in MODULES.items()
        if within(module, "kconvert.formats")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "print"}
    }
    assert not calls


PLANNING = [
    "kconvert.plan",
    "kconvert.manifest",
    "kconvert.model",
    "kconvert.recipe",
    "kconvert.amx",
    "kconvert.repack",
]


@pytest.mark.parametrize("module", PLANNING)
def test_planning_knows_neither_hub_nor_click_nor_numba(module):
    forbidden = ["huggingface_hub", "kconvert.checkpoint.hub", "click", "numba", "numpy", "torch", "kconvert.engine"]
    assert not offenders([module], forbidden)
    assert not offenders([module], ["kconvert.formats.kernels", "kconvert.formats.reference"])


def test_headers_know_no_torch():
    assert not offenders(["kconvert.checkpoint.header"], HEAVY, typing=True)


def test_only_the_hub_package_knows_the_hub():
    others = [module for module in MODULES if not within(module, "kconvert.checkpoint.hub")]
    assert not offenders(others, ["huggingface_hub"], typing=True)


def test_the_hub_package_is_imported_when_a_hub_id_is_met_and_not_before():
    others = [module for module in MODULES if not within(module, "kconvert.checkpoint.hub")]
    assert not offenders(others, ["kconvert.checkpoint.hub"], top_level=True)


def test_only_the_command_line_knows_click_and_tqdm():
    assert not offenders(OUTSIDE_CLI, ["click", "tqdm"], typing=True)


def test_only_the_command_line_prints():
    def prints(node):
        text = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        return text in {"print", "sys.exit", "exit", "sys.stdout.write", "sys.stderr.write", "warnings.warn"}

    moved = {"kconvert.qat"}  # warns of its new name
    assert {module for module in OUTSIDE_CLI for node in ast.walk(MODULES[module]) if prints(node)} == moved


def test_numba_is_known_to_the_kernels_only():
    others = [module for module in MODULES if not within(module, "kconvert.formats.kernels")]
    assert not offenders(others, ["numba", "llvmlite"], typing=True)


def test_verification_never_takes_the_way_of_the_kernels():
    rooms = ("verify", "inventory", "diff", "parity", "report")
    modules = [module for module in MODULES if any(within(module, f"kconvert.{room}") for room in rooms)]
    assert not offenders(modules, ["kconvert.formats.kernels", "kconvert.engine", "numba"])
    decodes = {
        module
        for module in modules
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Attribute) and node.attr in {"decode", "encode"} and "format" in ast.unparse(node.value)
    }
    assert not decodes


def test_only_the_plots_draw():
    may = ("kconvert.report.plots", "kconvert.report", *QAT)
    assert not offenders(MODULES.keys() - set(may), ["matplotlib"], typing=True)


def test_only_the_logits_know_transformers():
    assert not offenders(MODULES.keys() - {"kconvert.parity.logits", *QAT}, ["transformers"], typing=True)


@pytest.mark.parametrize(
    "module", ["kconvert", *CLI, "kconvert.formats", "kconvert.formats.packed", "kconvert.plan", "kconvert.buffers"]
)
def test_heavy_modules_are_imported_when_needed_and_not_before(module):
    assert not offenders([module], HEAVY - {"click"}, top_level=True)


def test_what_trains_is_known_to_qat_only():
    others = [module for module in MODULES if not within(module, "kconvert_qat") and module != "kconvert.cli.qat"]
    assert not offenders(others, ["accelerate", "peft", "kconvert_qat"], typing=True)


def test_qat_never_knows_the_engine():
    assert not offenders(QAT, ["kconvert.engine"], typing=True)
