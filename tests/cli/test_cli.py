import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import kconvert as package
from kconvert.cli import main
from kconvert.cli.options import Size

COMMANDS = sorted(main.commands)
HEAVY = ["torch", "numba", "llvmlite", "numpy", "huggingface_hub", "compressed_tensors", "transformers", "tqdm"]


@pytest.fixture(scope="session")
def run():
    """The same as `kconvert`, within this process: quicker where the process does not matter."""

    def run(*arguments):
        result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="kconvert")
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run


def one_sentence(result, code=2):
    """The command failed with one line on stderr and nothing on stdout; returns the line."""
    assert (result.returncode, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert "Traceback" not in line
    return line


def test_the_commands_of_the_readme_are_there():
    assert {"inspect", "int4-to-bf16", "convert", "verify", "sample"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_describes_it_and_shows_an_example(kconvert, command):
    result = kconvert(command, "--help")
    assert result.returncode == 0
    assert re.search(rf"^  Example: kconvert {command} \S", result.stdout, re.M)
    options = [line for line in result.stdout.splitlines() if line.startswith("  -")]
    assert "--help" in options[-1]


def loaded(arguments):
    """Which of the HEAVY modules a command has imported when it ends."""
    code = (
        "import sys\nfrom kconvert.cli import main\n"
        f"try: main({arguments!r}, prog_name='kconvert')\n"
        f"finally: print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return set(result.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["sample", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    assert loaded(arguments) == set()


def test_a_conversion_on_this_disk_loads_neither_torch_nor_the_hub_nor_what_compiles(int4, tmp_path):
    assert loaded(["int4-to-bf16", str(int4), str(tmp_path / "out"), "-q"]) <= {"numpy", "llvmlite"}


def test_codes_that_stay_what_they_are_wait_for_no_compiled_kernel(int4, tmp_path):
    assert loaded(["convert", str(int4), str(tmp_path / "out"), "--to", "mlx", "-q"]) <= {"numpy"}


def test_the_version_is_the_packages(kconvert):
    assert kconvert("--version").stdout.strip().endswith(package.__version__)


def test_every_option_says_what_it_does():
    silent = [
        (name, option.name)
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert not silent


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["--no-such-option"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["int4-to-bf16", "a"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "int3"],
        ["int4-to-bf16", "a", "b", "--threads", "0"],
        ["int4-to-bf16", "a", "b", "--threads", "many"],
        ["int4-to-bf16", "a", "b", "--shard-size", "5 apples"],
        ["int4-to-bf16", "a", "b", "--memory", "-1"],
        ["verify", "a", "b", "--sample", "1.5"],
        ["sample", "a", "--layers", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two_and_says_how_to_get_help(run, arguments):
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert "--help" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5000", 5000),
        ("5GB", 5 * 10**9),
        ("1.5 MB", 1_500_000),
        ("256MiB", 256 << 20),
        ("2k", 2000),
        ("1T", 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_written_as_people_write_them(text, nbytes):
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize(
    "arguments",
    [["int4-to-bf16", "{}", "dst"], ["convert", "{}", "dst", "--to", "bf16"], ["verify", "{}", "."], ["inspect", "{}"]],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_source_is_one_sentence(run, tmp_path, monkeypatch, bf16, arguments):
    monkeypatch.chdir(bf16 if arguments[0] == "verify" else tmp_path)
    line = one_sentence(run(*(argument.format(tmp_path / "missing") for argument in arguments)))
    assert line.startswith(f"error: {tmp_path / 'missing'} is not a directory")
    assert not (tmp_path / "dst").exists()


def test_damaged_input_is_one_sentence_and_nothing_is_written(kconvert, int4_copy, raw, tmp_path):
    checkpoint = raw.load(int4_copy)
    name = "model.layers.1.mlp.experts.2.gate_proj"
    checkpoint.pop(f"{name}.weight_scale")
    line = one_sentence(kconvert("int4-to-bf16", checkpoint.save(), tmp_path / "dst"))
    assert line.startswith("error: ")
    assert name in line
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("like", "arguments", "fault"),
    [
        ("gpt", [], "there is no manifest 'gpt'"),
        ("generic", [], "describes no checkpoint"),
        ("", [], "there is no manifest ''"),
    ],
)
def test_a_sample_that_cannot_be_made_is_one_sentence(run, tmp_path, like, arguments, fault):
    assert fault in one_sentence(run("sample", tmp_path / "dst", "--like", like, "--layers", 2, *arguments))
    assert not (tmp_path / "dst").exists()


def test_a_check_that_finds_a_difference_exits_with_one(run, int4, bf16_copy):
    (bf16_copy / "tiktoken.model").write_text("other")
    line = one_sentence(run("verify", int4, bf16_copy), code=1)
    assert line.startswith("failed: ")
    assert "tiktoken.model" in line


SMALL = """
    --layers 2 --experts 2 --hidden 64 --intermediate 64 --moe-intermediate 32
    --vocab 64 --heads 2 --q-rank 32 --kv-rank 32
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def small(kconvert, tmp_path_factory):
    """A still smaller checkpoint, made by the command."""
    root = tmp_path_factory.mktemp("small") / "src"
    result = kconvert("sample", root, *SMALL)
    assert result.returncode == 0, result.stderr
    return root


def test_the_main_job_ends_with_a_summary_and_no_progress_bar_without_a_terminal(kconvert, small, tmp_path):
    result = kconvert("int4-to-bf16", small, tmp_path / "dst")
    assert (result.returncode, result.stderr) == (0, "")
    line, served = result.stdout.splitlines()
    assert re.match(r"wrote .* in 1 shard to \S+ in \S+ s \(.* GB/s\), peak memory ", line)
    assert served.startswith("engines: ")


def test_a_rerun_of_a_finished_job_says_that_it_was_finished(run, small, tmp_path):
    command = ["int4-to-bf16", small, tmp_path / "dst"]
    first = json.loads(run(*command, "--json").stdout)
    assert first["written_bytes"] == first["bytes"]
    line, _ = run(*command).stdout.splitlines()
    assert re.fullmatch(r"\S+ was finished already, \S+ kB in 1 shard; no shard was written again", line)
    again = json.loads(run(*command, "--json").stdout)
    assert (again["bytes"], again["written_bytes"], again["bytes_per_second"]) == (first["bytes"], 0, 0)


def test_a_run_that_goes_on_says_how_much_was_missing(run, small, tmp_path):
    command = ["int4-to-bf16", small, tmp_path / "dst", "--shard-size", "50kB"]
    run(*command, "-q")
    lost = min((tmp_path / "dst").glob("model-*.safetensors"))
    size = lost.stat().st_size
    lost.unlink()
    assert re.match(r"wrote the \S+ kB that were missing of \S+ kB in \d+ shards to ", run(*command).stdout)
    lost.unlink()
    outcome = json.loads(run(*command, "--json").stdout)
    assert size <= outcome["written_bytes"] < outcome["bytes"]


def test_a_rerun_does_not_say_again_that_every_value_was_reproduced(run, small, tmp_path):
    run("int4-to-bf16", small, tmp_path / "bf16", "-q")
    command = ["bf16-to-int4", tmp_path / "bf16", tmp_path / "int4"]
    assert "every value was reproduced exactly" in run(*command).stdout
    assert "every value" not in run(*command).stdout


def test_what_a_conversion_loses_is_in_its_closing_summary(run, small, tmp_path):
    lines = run("int4-to-fp8", small, tmp_path / "fp8").stdout.splitlines()
    assert lines[1] == "lossy: int4 group 32 -> fp8 block 128x128, 6 weights"


@pytest.mark.parametrize(
    ("kinds", "told", "say", "are"),
    [
        (((0, "k"), (0, "v"), (1, "k"), (1, "v")), "4 tensors (2 k_scale, 2 v_scale)", "say", "are"),
        (((1, "k"),), "1 tensor (1 k_scale)", "says", "is"),
    ],
)
def test_cache_scales_that_are_left_behind_are_counted(run, small, tmp_path, raw, kinds, told, say, are):
    checkpoint = raw.load(small)
    for layer, kind in kinds:
        checkpoint.put(f"model.layers.{layer}.self_attn.{kind}_scale", raw.Tensor("F32", [1], bytes(4)))
    source = checkpoint.save(tmp_path / "src")
    finding = f"finding: {told} {say} nothing of a weight and {are} left behind by a conversion\n"
    assert finding in run("inspect", source).stdout
    assert f"\ndropped: {told}\n" in run("int4-to-bf16", source, tmp_path / "dst", "--dry-run").stdout
    assert f"\ndropped: {told}\n" in run("int4-to-bf16", source, tmp_path / "dst").stdout
    facts = json.loads(run("int4-to-bf16", source, tmp_path / "dst", "--json").stdout)
    assert len(facts["dropped"]) == len(kinds)


def test_what_is_within_limits_only_is_not_called_equal(run, small, tmp_path):
    run("int4-to-bf16", small, tmp_path / "bf16", "-q")
    exact = run("verify", small, tmp_path / "bf16").stdout
    close = run("verify", small, tmp_path / "bf16", "--close").stdout
    assert re.match(r"verified: \d+ weights equal .*, bit for bit; ", exact)
    assert re.match(r"verified: \d+ weights are near .*, within limits; ", close)


def test_one_of_a_thing_is_spoken_of_in_the_singular(run, small, tmp_path):
    name = "model.layers.1.mlp.experts.0.down_proj"
    selection = ["--include", name]
    run("int4-to-bf16", small, tmp_path / "one", *selection, "-q")
    assert "verified: 1 weight equals " in run("verify", small, tmp_path / "one", *selection).stdout


def test_quiet_is_silent(run, small, tmp_path):
    for arguments in (
        ["int4-to-bf16", small, tmp_path / "dst", "-q"],
        ["verify", small, tmp_path / "dst", "-q"],
        ["sample", tmp_path / "sample", "--quiet", *SMALL],
    ):
        result = run(*arguments)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_verbose_prints_the_plan_first(run, small, tmp_path):
    lines = run("int4-to-bf16", small, tmp_path / "dst", "-v").stdout.splitlines()
    assert lines[0].startswith("source: ")
    assert lines[-2].startswith("wrote ")


def test_what_is_printed_as_json_is_json(run, small, tmp_path):
    inspected = json.loads(run("inspect", small, "--json").stdout)
    assert inspected["manifest"] == "kimi-k2-thinking"
    assert sum(row["parameters"] for row in inspected["roles"]) == inspected["parameters"]
    assert sum(row["bytes"] for row in inspected["roles"]) == inspected["bytes"]
    planned = json.loads(run("int4-to-bf16", small, tmp_path / "dst", "--dry-run", "--json").stdout)
    done = json.loads(run("int4-to-bf16", small, tmp_path / "dst", "--json").stdout)
    assert planned["output_bytes"] == done["bytes"]
    assert planned["free_disk_bytes"] > 0
    assert planned["peak_memory_bytes"] > 0
    verified = json.loads(run("verify", small, tmp_path / "dst", "--json").stdout)
    assert verified["weights"] > 0
    assert verified["skipped"] == 0


@pytest.mark.parametrize("command", ["int4-to-bf16", "sample"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(run, small, tmp_path, command):
    source = [small] if command == "int4-to-bf16" else []
    options = SMALL if command == "sample" else []
    result = run(command, *source, tmp_path / "dst", "--dry-run", *options)
    assert result.returncode == 0
    assert re.search(r"^output: .* in 1 shard and \d+ side files$", result.stdout, re.M)
    assert re.search(r"^memory: about ", result.stdout, re.M)
    assert re.search(r"^disk: .* free", result.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


def test_a_shortcut_refuses_a_source_that_it_is_not_for_and_names_the_general_way(run, bf16, tmp_path):
    line = one_sentence(run("int4-to-bf16", bf16, tmp_path / "dst"))
    assert "holds no quantised weights" in line


def test_the_general_command_does_the_same_as_its_shortcut(run, small, tmp_path, tree):
    assert run("convert", small, tmp_path / "a", "--to", "bf16").returncode == 0
    assert run("int4-to-bf16", small, tmp_path / "b").returncode == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_selected_weights_only_are_written(run, small, tmp_path, raw):
    result = run(
        "int4-to-bf16", small, tmp_path / "dst", "--include", "*.experts.*", "--exclude", "*.experts.1.*", "-q"
    )
    assert result.returncode == 0, result.stderr
    assert sorted(raw.load(tmp_path / "dst")) == [
        f"model.layers.1.mlp.experts.0.{name}_proj.weight" for name in ("down", "gate", "up")
    ]


def test_a_real_checkpoint_is_cut_by_the_command(run, small, tmp_path):
    result = run("sample", tmp_path / "cut", "--from", small, "--experts", 1, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["n_routed_experts"] == 1


def test_a_size_that_cannot_be_cut_is_one_sentence(run, small, tmp_path):
    assert "--hidden cannot be cut" in one_sentence(run("sample", tmp_path / "cut", "--from", small, "--hidden", 32))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_printed(kconvert, shell):
    result = kconvert(env={"_KCONVERT_COMPLETE": f"{shell}_source"})
    assert result.returncode == 0
    assert "_KCONVERT_COMPLETE" in result.stdout


def test_shell_completion_knows_commands_and_options(kconvert):
    def complete(words, index):
        environment = {"_KCONVERT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return kconvert(env=environment).stdout

    assert "plain,int4-to-bf16" in complete("kconvert int4", 1)
    assert "plain,--shard-size" in complete("kconvert int4-to-bf16 --sh", 2)


def test_a_reader_that_goes_away_is_no_error(small):
    command = Path(sys.executable).with_name("kconvert")
    process = subprocess.Popen([command, "inspect", small, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def in_terminal(command):
    """What a command prints in a terminal, and its exit code."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, stdout=child, stderr=child, stdin=child, close_fds=True)
    os.close(child)
    output, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([parent], [], [], 1)[0]:
                try:
                    chunk = os.read(parent, 65536)
                except OSError:
                    break
                if not chunk:
                    break
                output += chunk
    finally:
        os.close(parent)
    return output.decode(), process.wait(60)


@pytest.mark.parametrize("option", [(), ("-q",)], ids=["loud", "quiet"])
def test_a_terminal_gets_a_progress_bar_unless_quiet(small, tmp_path, option):
    command = Path(sys.executable).with_name("kconvert")
    output, code = in_terminal([command, "int4-to-bf16", small, tmp_path / "dst", *option])
    assert code == 0
    if option:
        assert output == ""
    else:
        assert re.search(r"B/s\]", output)
        assert "wrote " in output
