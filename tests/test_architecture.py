"""Who may use whom, kept by looking at every import statement of the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import kconvert
import kconvert_qat

PACKAGE = Path(kconvert.__file__).parent
ROOTS = (PACKAGE, Path(kconvert_qat.__file__).parent)

# The rooms from the ground up, and which rooms each may use besides itself: imports run down this table only. The parts of
# the top folder that are single modules stand among them; "" is its public face.
MAY: Mapping[str, str] = {
    "errors": "",
    "version": "",
    "interpreter": "",
    "native": "errors interpreter",
    "chat": "errors",
    "formats": "errors native",
    "checkpoint": "errors formats",
    "dialects": "errors formats checkpoint",
    "models": "errors formats checkpoint dialects",
    "hub": "errors version checkpoint",
    "stores": "errors interpreter checkpoint",
    "address": "errors checkpoint hub stores",
    "planning": "errors version formats checkpoint",
    "targets": "errors version formats checkpoint dialects models planning",
    "run": "errors version formats checkpoint hub stores planning",
    "weights": "errors formats checkpoint planning run",
    "cluster": "errors version checkpoint planning run",
    "proof": "errors version native formats checkpoint dialects models hub stores address planning cluster",
    "serving": "errors formats checkpoint dialects models hub stores address planning targets",
    "report": "errors version formats checkpoint dialects models hub stores address planning targets run proof serving",
    "": "errors version chat formats checkpoint models hub stores address planning targets run weights cluster proof report",
    "cli": "errors version chat formats checkpoint models hub stores address planning targets run proof serving report",
    "qat": "",
}
MOST_ENTRIES = 14  # in a folder, but for its __init__.py
MOST_LINES = 350  # of a file
MOST_FUNCTION_LINES = 50  # from its `def` on, but for its docstring
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
    "openai",
    "ray",
}
OS_FREE = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "fcntl", "glob", "safetensors"}


def name_of(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((root.name, *(part for part in parts if part != "__init__")))


FILES = {name_of(root, path): path for root in ROOTS for path in sorted(root.rglob("*.py"))}
MODULES = {module: ast.parse(path.read_text("utf-8")) for module, path in FILES.items()}


def typing_only(tree: ast.AST) -> set[int]:
    """Nodes below `if TYPE_CHECKING:`; they import nothing at run time."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {id(node) for block in blocks for statement in block.body for node in ast.walk(statement)}


def in_functions(tree: ast.AST) -> set[int]:
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return {id(node) for function in functions for node in ast.walk(function)}


def imports(tree: ast.AST, *, top_level: bool = False, typing: bool = True) -> Iterator[str]:
    """Dotted names that a module imports: `from a import b` is a.b where that is a module of ours, else a."""
    skip = (set() if typing else typing_only(tree)) | (in_functions(tree) if top_level else set())
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            assert node.module is not None
            whole = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from {dotted if dotted in MODULES else node.module for dotted in whole.values()}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> str:
    """The first name below the package; "" of the package itself."""
    return module.removeprefix("kconvert").lstrip(".").partition(".")[0]


def inside(room: str) -> list[str]:
    return [module for module in MODULES if within(module, f"kconvert.{room}")]


OURS = [module for module in MODULES if within(module, "kconvert")]
# What numba compiles, but for the packages themselves, which say what is in them.
KERNELS, LOOPS = (inside(room)[1:] for room in ("formats.kernels", "proof.parity.quick.loops"))
QAT = [module for module in MODULES if within(module, "kconvert_qat")]
OUTSIDE_CLI = sorted(MODULES.keys() - set(inside("cli")))


def offenders(
    modules: Iterable[str], forbidden: Iterable[str], *, top_level: bool = False, typing: bool = True
) -> set[str]:
    return {
        f"{module} imports {name}"
        for module in modules
        for name in imports(MODULES[module], top_level=top_level, typing=typing)
        if any(within(name, package) for package in forbidden)
    }


def test_every_module_is_in_a_room_of_the_table():
    assert {room_of(module) for module in OURS} <= MAY.keys()


def test_the_table_runs_downward():
    rooms = list(MAY)
    assert all(rooms.index(used) < rooms.index(room) for room, may in MAY.items() for used in may.split())


def test_the_table_is_the_one_that_people_read():
    page = (Path(__file__).parents[1] / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w./]+)` \| [^|]+ \| ?([\w, ]*) ?\|$", page, re.M)
    names = {name.removesuffix("/").removesuffix(".py").replace("__init__", ""): may for name, may in rows}
    assert {name: may.replace(",", "").strip() for name, may in names.items()} == MAY


@pytest.mark.parametrize("room", MAY)
def test_a_room_uses_only_what_the_table_says(room):
    may = {room, *MAY[room].split()}
    modules = inside(room) if room else ["kconvert"]
    face = room in ("cli", "")  # who shows everything to people may name the package itself
    assert not {
        f"{module} imports {name}"
        for module in modules
        for name in imports(MODULES[module])
        if within(name, "kconvert") and room_of(name) not in may and not (face and name == "kconvert")
    }


def test_no_circle_of_imports_not_even_of_late_ones():
    after: dict[str, set[str]] = {
        module: {name for name in imports(tree) if name in MODULES and name not in (module, "kconvert")}
        for module, tree in MODULES.items()
    }
    while ground := {module for module, names in after.items() if not names}:
        after = {module: names - ground for module, names in after.items() if module not in ground}
    assert not {module: sorted(names & after.keys()) for module, names in after.items()}


def test_a_folder_has_no_more_than_about_a_dozen_entries():
    folders = {path.parent for path in FILES.values()} - {PACKAGE}
    entries = {folder: [e.name for e in folder.iterdir() if not e.name.startswith("__")] for folder in folders}
    assert not {str(folder): len(names) for folder, names in entries.items() if len(names) > MOST_ENTRIES}


def test_the_top_folder_holds_the_rooms_and_nothing_else():
    entries = {path.name.partition(".")[0] for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert entries == MAY.keys() - {""} | {"manifests", "py"}  # data, and py.typed


def test_no_file_is_longer_than_it_can_be_read_at_once():
    lines = {module: path.read_text("utf-8").count("\n") for module, path in FILES.items()}
    assert not {module: count for module, count in lines.items() if count > MOST_LINES}


def test_every_function_fits_on_a_screen():
    long = {}
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                documented = ast.get_docstring(node) is not None
                doc = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
                count = (node.end_lineno or 0) - node.lineno + 1 - doc
                if count > MOST_FUNCTION_LINES:
                    long[f"{module}.{node.name}"] = count
    assert not long


def test_nothing_imports_the_command_line():
    assert not offenders(OUTSIDE_CLI, ["kconvert.cli"])


def test_formats_know_no_files():
    assert not offenders(inside("formats"), OS_FREE)
    calls = {
        (module, node.func.id)
        for module in inside("formats")
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "print"}
    }
    assert not calls


@pytest.mark.parametrize("room", ["models", "planning", "targets", "dialects"])
def test_planning_knows_neither_hub_nor_click_nor_numba(room):
    forbidden = ["huggingface_hub", "kconvert.hub", "click", "numba", "torch", "kconvert.formats.reference"]
    assert not offenders(inside(room), forbidden, typing=False)
    # Made-up weights are the one kind that a target makes itself.
    makers = {"kconvert.targets.synthetic"}
    assert not offenders(set(inside(room)) - makers, ["numpy", "kconvert.formats.kernels"], typing=False)


def test_containers_know_no_library_of_arrays():
    assert not offenders(["kconvert.checkpoint.safetensors"], HEAVY)


def test_only_the_room_of_the_hub_knows_the_hub():
    assert not offenders(MODULES.keys() - set(inside("hub")), ["huggingface_hub"])


def test_the_hub_is_imported_when_a_hub_id_is_met_and_not_before():
    light = {module for module in inside("hub") if not offenders([module], HEAVY, top_level=True, typing=False)}
    heavy = {module for module in inside("hub") if module not in light}
    spread = {module for module in light if offenders([module], heavy, top_level=True, typing=False)}
    others = MODULES.keys() - set(inside("hub"))
    assert not offenders(others, heavy | spread, top_level=True, typing=False)


def test_only_the_command_line_knows_click_and_tqdm():
    assert not offenders(OUTSIDE_CLI, ["click", "tqdm"])


def test_only_the_command_line_prints():
    def prints(node: ast.AST) -> bool:
        text = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        return text in {"print", "sys.exit", "exit", "sys.stdout.write", "sys.stderr.write", "warnings.warn"}

    moved = {"kconvert.qat"}  # warns of its new name
    assert {module for module in OUTSIDE_CLI for node in ast.walk(MODULES[module]) if prints(node)} == moved


def test_numba_is_known_to_the_kernels_only():
    # The others are for training's grids, and the proof's own.
    kernels = {*KERNELS, "kconvert_qat.grids.vectors", *LOOPS, *inside("native")}
    assert not offenders(MODULES.keys() - kernels, ["numba", "llvmlite"])


def test_numba_is_loaded_only_to_compile():
    others = set(OURS) - {*KERNELS, *LOOPS}
    assert not offenders(others, [*KERNELS, *LOOPS])
    assert not offenders(others - {"kconvert.native.compiling"}, ["numba", "llvmlite"], top_level=True, typing=False)
    assert not offenders(others - {"kconvert.native.compiling"}, ["numba"])


def test_proof_never_takes_the_way_of_the_kernels():
    assert not offenders(inside("proof"), ["kconvert.formats.kernels", "kconvert.run"])
    decodes = {
        module
        for module in inside("proof")
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Attribute) and node.attr in {"decode", "encode"} and "format" in ast.unparse(node.value)
    }
    assert not decodes


def test_only_the_plots_draw():
    may = ("kconvert.report.plots", "kconvert.report", *QAT)
    assert not offenders(MODULES.keys() - set(may), ["matplotlib"])


def test_only_the_logits_know_transformers():
    assert not offenders(MODULES.keys() - {"kconvert.proof.logits", *QAT}, ["transformers"])


def test_what_lies_on_a_disk_knows_nothing_of_what_moves_it():
    movers = {"arrivals", "departures", "mover", "engine", "job"}
    at_rest = {f"kconvert.run.{name}" for name in ("budget", "delivery", "disk", "fetches", "writer")}
    assert not offenders(at_rest | set(inside("run.state")), [f"kconvert.run.{name}" for name in movers])
    assert not offenders(["kconvert.run.engine"], [f"kconvert.run.{name}" for name in movers - {"engine"}])


@pytest.mark.parametrize(
    "module",
    [
        "kconvert",
        *inside("cli"),
        "kconvert.formats",
        "kconvert.formats.packed",
        *inside("planning"),
        "kconvert.checkpoint.buffers",
    ],
)
def test_heavy_modules_are_imported_when_needed_and_not_before(module):
    assert not offenders([module], HEAVY - {"click"}, top_level=True, typing=False)


def test_a_command_starts_without_what_reads_or_makes_models():
    code = "import sys, kconvert.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    late = ("kconvert.models", "kconvert.dialects", "kconvert.run", "importlib.resources")
    assert not [module for module in loaded if any(within(module, package) for package in late)]


def test_what_trains_is_known_to_qat_only():
    others = OURS if "kconvert.cli.qat" not in OURS else [module for module in OURS if module != "kconvert.cli.qat"]
    assert not offenders(others, ["accelerate", "peft", "kconvert_qat"])


def test_qat_never_runs_the_engine():
    assert not offenders(QAT, ["kconvert.run.engine"])


def test_the_standard_library_is_not_hidden_by_a_room():
    assert not {room for room in MAY if room} & sys.stdlib_module_names
