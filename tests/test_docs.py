"""The documentation holds: its examples run, its commands parse, its links lead somewhere.

A fenced block is marked behind its language. `sh run` and `python run` run as they stand, one after the other, in a folder that
holds small checkpoints of the names in them; `toml manifest` is an excerpt of a manifest. Of all other `sh` blocks, and of
commands within the text, the real command parses every line.
"""

from __future__ import annotations

import ast
import glob
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kconvert.cli import main
from kconvert.serving.table import engines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ENGINE_FLAGS = {word for engine in engines().values() for words in engine.flags.values() for word in words}
FOLDERS = ("benchmarks", "convert", "docs", "examples", "findings", "manifests", "qat", "tests")
NEEDS = {"docs/QAT.md": "transformers", "docs/PROOF.md": "jinja2"}
SIZES = "--layers 2 --experts 4 --hidden 256 --moe-intermediate 512 --intermediate 512 --vocab 512 --heads 4 -q"
SHELF = f"""
sample Kimi-K2-Thinking {SIZES}
sample Kimi-K2-Thinking-again {SIZES}
sample Kimi-K2-Instruct --like kimi-k2-instruct {SIZES}
int4-to-fp8 Kimi-K2-Thinking Kimi-K2-Thinking-FP8 -q
int4-to-fp8 Kimi-K2-Thinking someone-elses-FP8 --layout compressed-tensors -q
repack-amx Kimi-K2-Thinking Kimi-K2-Thinking-AMXINT4 --method AMXINT4 --numa 1 -q
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: `kind` is its language, `mark` what stands behind that."""

    kind: str
    mark: str
    text: str

    @property
    def lines(self) -> list[list[str]]:
        """The words of each line of a shell block, without comments."""
        return [words for line in self.text.splitlines() if (words := shlex.split(line, comments=True))]


@dataclass(frozen=True)
class Page:
    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @property
    def blocks(self) -> list[Block]:
        return [Block(*found) for found in re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", self.text, re.M | re.S)]

    @property
    def prose(self) -> str:
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.M | re.S)

    @property
    def spans(self) -> list[str]:
        """What stands between backticks within the text."""
        return re.findall(r"`([^`\n]+)`", self.prose)


PAGES = [
    Page(path)
    for pattern in ("*.md", "docs/*.md", "findings/*.md", "manifests/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def run(line: str | list[str]) -> Any:
    words = shlex.split(line) if isinstance(line, str) else line
    result = CliRunner().invoke(main, words, prog_name="kconvert")
    assert result.exit_code == 0, f"kconvert {shlex.join(words)}: {result.output}"
    return result


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small checkpoint for each name that examples begin with, and some text."""
    root = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for line in SHELF.strip().splitlines():
            run(line)
    (root / "corpus").mkdir()
    (root / "corpus" / "a.txt").write_text("text")
    return root


@pytest.fixture
def desk(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shelf, which is the working directory."""
    desk = Path(shutil.copytree(shelf, tmp_path / "desk"))
    monkeypatch.chdir(desk)
    return desk


RUNNING = [page for page in PAGES if any(block.mark == "run" for block in page.blocks)]


@pytest.mark.parametrize("page", RUNNING, ids=str)
def test_the_examples_that_are_marked_run_in_their_order(page: Page, desk: Path) -> None:
    if str(page) in NEEDS:
        pytest.importorskip(NEEDS[str(page)])
    for block in page.blocks:
        if block.mark == "run" and block.kind == "python":
            exec(compile(block.text, str(page), "exec"), {"__name__": "example"})
        elif block.mark == "run":
            for command, *words in block.lines:
                assert command == "kconvert", f"{page}: {command} cannot run here; leave the mark out"
                run(words)


def parse(words: list[str]) -> None:
    """Let click read a command line, with its files and values, and run nothing."""
    name, *rest = words
    context = click.Context(main, info_name="kconvert")
    command = main.get_command(context, name)
    assert command is not None, f"there is no command {name}"
    while isinstance(command, click.Group):
        name, *rest = rest
        context = click.Context(command, info_name=name, parent=context)
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name}"
        command = found
    files = [sorted(glob.glob(word)) if "*" in word else [word] for word in rest]
    command.make_context(name, [word for found in files for word in found], parent=context)


@pytest.mark.parametrize("page", [page for page in PAGES if page.blocks], ids=str)
def test_the_command_lines_of_a_page_are_ones_that_the_command_takes(page: Page, desk: Path) -> None:
    for block in page.blocks:
        for words in block.lines if block.kind == "sh" else ():
            if words[0] == "kconvert":
                parse(words[1:])
            elif words[0] == "make":
                targets = [word for word in words[1:] if "=" not in word]
                assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets), words
            else:
                check_script(words)


def check_script(words: list[str]) -> None:
    """Files of the project that a command line names exist, and a benchmark has the options given."""
    for word in words:
        if word.startswith(FOLDERS) and "/" in word:
            assert (ROOT / word).exists(), word
        if re.match(r"benchmarks/\w+\.py$", word):
            sources = [ROOT / word, *(ROOT / "benchmarks" / shared for shared in ("common.py", "peers.py"))]
            known = "".join(source.read_text("utf-8") for source in sources)
            missing = [option for option in words if option.startswith("--") and f'"{option}"' not in known]
            assert not missing, f"{word} has no {missing}"


def options_of(command: click.Command) -> Iterator[click.Parameter]:
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from options_of(inner)
    yield from command.params


def check_options(words: list[str], command: click.Command) -> None:
    """Each option is one of the command's, or of one of a group's, and takes the value behind it, unless that is a WORD."""
    known = list(options_of(command))
    for at, word in enumerate(words):
        if not word.startswith("-") or word in ENGINE_FLAGS:
            continue
        meant = [option for option in known if word in (*option.opts, *option.secondary_opts)]
        assert meant, f"there is no option {word}"
        choices = [option.type.choices for option in meant if isinstance(option.type, click.Choice)]
        value = words[at + 1] if at + 1 < len(words) else None
        if choices and value is not None and not re.fullmatch("[A-Z]+", value):
            assert any(value in some for some in choices), f"{word} does not take {value}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_options_and_files_within_the_text_exist(page: Page) -> None:
    for span in page.spans:
        words = shlex.split(span) if span.count("'") % 2 == 0 else span.split()
        if words[0] == "kconvert" and len(words) > 1 and words[1].islower():
            command = main.commands.get(words[1])
            assert command is not None, f"{page}: there is no command {words[1]}"
            check_options(words[2:], command)
        elif words[0] in main.commands and len(words) > 1:
            check_options(words[1:], main.commands[words[0]])
        elif words[0].startswith("--"):
            check_options(words, main)
        elif words[0].split("/")[0] in FOLDERS and "/" in words[0]:
            check_script(words)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_relative_link_leads_to_a_file_and_a_heading_that_are_there() -> None:
    missing = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.prose):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = (page.path.parent / name).resolve() if name else page.path
            if not path.exists():
                missing.add(path.relative_to(ROOT).as_posix())
            elif anchor:
                headings = re.findall(r"^#+ (.+)$", Page(path).prose, re.M)
                assert anchor in map(slug, headings), f"{page}: {target}"
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_that_does_not_run_here_compiles_and_imports_what_there_is(page: Page) -> None:
    for block in page.blocks:
        if block.kind == "python" and block.mark != "run":
            pytest.importorskip("transformers")
            imports = [node for node in ast.parse(block.text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            exec(compile(ast.Module(imports, []), str(page), "exec"), {})


def test_the_manifest_in_the_text_is_an_excerpt_of_one_that_there_is() -> None:
    (block,) = [block for block in Page(ROOT / "docs" / "MODELS.md").blocks if block.mark == "manifest"]
    excerpt = tomllib.loads(block.text)
    whole = tomllib.loads((ROOT / "manifests" / f"{excerpt['name']}.toml").read_text("utf-8"))
    for key, value in excerpt.items():
        if isinstance(value, dict):
            assert (
                value.items() <= whole[key].items() if key != "indices" else value == {k: whole[key][k] for k in value}
            )
        else:
            assert all(entry in whole[key] for entry in value) if key == "weights" else value == whole[key]


def test_readme_is_short_and_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) < 120
    assert [name for name in main.commands if f"`kconvert {name}" not in readme] == []


def test_every_manifest_and_every_target_has_its_line() -> None:
    models, formats = ((ROOT / "docs" / name).read_text("utf-8") for name in ("MODELS.md", "FORMATS.md"))
    names = [tomllib.loads(path.read_text("utf-8"))["name"] for path in (ROOT / "manifests").glob("*.toml")]
    assert [name for name in names if f"`{name}`" not in models] == []
    (to,) = [option for option in main.commands["convert"].params if option.name == "to"]
    assert isinstance(to.type, click.Choice)
    assert [target for target in to.type.choices if f"`--to {target}`" not in formats] == []
