"""Every command that help, README, docs, settings files and messages print is one that `birbal` takes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import COMMANDS, main
from birbal_ray.cli.options import find_config
from birbal_ray.cli.recipe import explain_command
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
from birbal_ray.settings import load_config
from tests.conftest import REPOSITORY
from tests.fixtures.score_folder import made_up_rows, write_score_folder
from tests.unit.cli.test_options import SCHEMAS

MARKDOWN = sorted(
    {*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "cluster").glob("*.md")}
)
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
SOURCES = sorted((REPOSITORY / "birbal_ray").rglob("*.py"))
MADE_BY_A_RUN = ("runs/", "THIS_FILE")  # files of settings that are there once a step has run
MENTION = re.compile(r"\bbirbal ((?:[a-z]+(?:-[a-z]+)*)(?: [^`'\";,()\n]*)?)")


def all_commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from all_commands(command, (*path, name))


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `words` name, and what follows its name."""
    command: click.Command = main
    while (
        isinstance(command, click.Group) and words and (found := command.get_command(click.Context(command), words[0]))
    ):
        command, words = found, words[1:]
    assert command is not main, f"birbal has no command {words[:1]}"
    return command, words


def command_lines(text: str) -> list[str]:
    """Lines that begin with `birbal` or run a file of jobs/, as `birbal …`; continued lines are joined."""
    text = re.sub(r"\\\n\s*(?:#\s*)?", " ", text)
    lines = (line.strip().removeprefix("$ ") for line in text.splitlines())
    found = []
    for line in lines:
        if job := re.search(r"python (?:/app/)?jobs/(\w+)\.py\s+(.*)", line):
            found.append(f"birbal {job[1]} {job[2]}")
        elif re.match(r"birbal [a-z-]", line):
            found.append(line)
    return found


def shown() -> Iterator[tuple[str, str]]:
    """(where it is shown, the whole command line)."""
    for path, command in all_commands(main):
        for line in command_lines((command.help or "").replace("\b", "")):
            yield f"birbal {' '.join(path)} --help", line
    for line in command_lines((main.help or "").replace("\b", "")):
        yield "birbal --help", line
    for file in MARKDOWN:
        for block in re.findall(r"^```\w*\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            yield from ((str(file.relative_to(REPOSITORY)), line) for line in command_lines(block))
    for file in CONFIGS:
        comments = [line.removeprefix("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
        yield from ((str(file.relative_to(REPOSITORY)), line) for line in command_lines("\n".join(comments)))


def mentions(text: str) -> Iterator[list[str]]:
    """Words after `birbal` where a text mentions a command: not whole command lines, but names and flags count."""
    for found in MENTION.finditer(text):
        words = found[1].split()
        quoted = text[: found.start()].endswith("`")
        if words[0] in COMMANDS or quoted:
            yield words


SHOWN = sorted(set(shown()))


def test_there_is_advice_to_look_at():
    assert len(SHOWN) > 60
    assert {"README.md", "cluster/README.md", "configs/score/tiny.yaml", "birbal score --help"} <= {
        at for at, _ in SHOWN
    }


@pytest.mark.parametrize(("where", "line"), SHOWN, ids=[f"{where}: {line[:60]}" for where, line in SHOWN])
def test_a_command_that_is_shown_is_taken(where, line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line, comments=True)[1:]
    for stop in ("|", ">", "&&", "&"):
        words = words[: words.index(stop)] if stop in words else words
    command, rest = find_command(words)
    try:
        context = command.make_context(command.name, list(rest))
    except click.exceptions.Exit:  # --help, --list
        return
    for name, value in context.params.items():
        if name.endswith("_config") and value:  # of `birbal pipeline`, `birbal doctor --cluster`
            step = name.removesuffix("_config")
            load_config(SCHEMAS[step], find_config(step, value))
    config, schema = context.params.get("config_file"), SCHEMAS.get(command.name)
    if schema is None:
        return
    if config is not None and config.startswith(MADE_BY_A_RUN):
        config = None
    load_config(schema, None if config is None else find_config(command.name, config), context.params["assignments"])


@pytest.mark.parametrize("file", [*MARKDOWN, *CONFIGS, *SOURCES], ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_a_command_that_is_mentioned_exists_with_its_flags(file):
    text = file.read_text(encoding="utf-8")
    texts = [text]
    if file.suffix == ".py":  # its strings, a value in an f-string as a word
        nodes = list(ast.walk(ast.parse(text)))
        whole = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in whole for part in node.values}
        texts = ["".join(p.value if isinstance(p, ast.Constant) else "VALUE" for p in node.values) for node in whole]
        texts += [
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
        ]
    for words in (words for text in texts for words in mentions(text)):
        command, rest = find_command(words)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"--help"}
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0].rstrip(".:") in known, f"birbal {' '.join(words)}"


def test_the_demo_s_last_command_explains_a_row_of_its_own_mix(tmp_path):
    scores = write_score_folder(tmp_path / "my scores", made_up_rows(4, 60))
    settings = {"exact_match_budget": 20, "generation_budget": 20}
    mix(MixConfig(scores=str(scores), output=str(tmp_path / "a mix"), task_score=settings))
    line = explain_command(str(tmp_path / "a mix"))
    assert line.startswith("birbal mix explain ")
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert "in the mix" in result.stdout


def test_a_misspelt_command_gets_the_nearest_one():
    result = CliRunner().invoke(main, ["scroe"])
    assert result.exit_code == 2
    assert "No such command 'scroe'. Did you mean 'score'?" in result.stderr


def test_paths_of_the_repository_that_the_readme_names_exist():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r"configs/[\w./-]+\.yaml", text)
    for name in named:
        assert (REPOSITORY / name).exists(), name
    assert len(named) > 3
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        headings = [
            re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)
        ]
        assert anchor in headings, anchor


def test_a_decision_is_short_and_its_links_lead_somewhere():
    decisions = sorted((REPOSITORY / "docs" / "decisions").glob("*.md"))
    log = (REPOSITORY / "docs" / "log.md").read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.*)", log, re.MULTILINE)
    }
    for file in decisions:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 25, file.name
        assert text.startswith(f"# {file.name[:4]} "), file.name
        for name, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", text):
            assert (file.parent / name).exists(), f"{file.name}: {name}"
            assert not anchor or anchor in anchors, f"{file.name}: {anchor}"
    numbers = [file.name[:4] for file in decisions]
    assert len(numbers) == len(set(numbers))
