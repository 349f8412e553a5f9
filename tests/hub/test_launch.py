"""`kconvert launch` of a repository: the engine is told its id, and nothing of its weights is fetched."""

from __future__ import annotations

from click.testing import CliRunner

from kconvert.cli import main


def launch(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["launch", *arguments], prog_name="kconvert")
    return result.exit_code, result.stdout.strip(), result.stderr


def test_an_engine_is_told_the_id_of_the_repository(remote: str) -> None:
    code, line, error = launch(remote, "--engine", "vllm")
    assert code == 0, error
    assert line.startswith(
        f"vllm serve {remote} --trust-remote-code --enable-auto-tool-choice --tool-call-parser kimi_k2"
    )


def test_and_the_revision_that_was_asked_for(remote: str) -> None:
    code, line, error = launch(f"hf://{remote}@main", "--engine", "sglang")
    assert code == 0, error
    assert f"--model {remote} --revision main " in line


def test_ktransformers_wants_a_directory(remote: str) -> None:
    code, _, error = launch(remote, "--engine", "ktransformers")
    assert code == 2
    assert f"fetch {remote} with `hf download`" in error


def test_what_is_to_be_made_of_a_repository_is_made_of_that_revision(remote: str) -> None:
    code, _, error = launch(f"hf://{remote}@main", "--engine", "mlx")
    assert code == 2
    assert f"`kconvert convert {remote} DST --to mlx --revision main` makes what it runs" in error
