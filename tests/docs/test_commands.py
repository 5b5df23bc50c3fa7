"""Every command in the documentation is one that its program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.support.command_lines import Refused, check
from tests.support.docs import LANGUAGES, REPOSITORY, blocks, commands, inline_commands, named_files, pages, split


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_is_taken(page: Path, tmp_path: Path) -> None:
    problems = []
    files = {name: tmp_path / Path(name).name for name in named_files(page)}
    for name, text in named_files(page).items():
        files[name].write_text(text, encoding="utf-8")
    found = [command for block in blocks(page) for command in commands(block)]
    for command in [*found, *inline_commands(page)]:
        try:
            check([str(files.get(word, word)) for word in command.words])
        except Refused as reason:
            problems.append(f"{command}\n    {reason}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_are_in_blocks_that_say_so(page: Path) -> None:
    """A fence without a name is text that nobody checks."""
    programs = ("python ", "ray job", "kubectl ", "make ", "serve run", "curl ", "$ ")
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: {block.language}"
        if block.language == "":
            assert not [line for line in block.text.splitlines() if line.startswith(programs)], f"{block}: name it sh"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_that_are_named_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:jobs|examples|tests|benchmarks|docs|k8s)/[a-z0-9_/.-]+\.[a-z]+)`", page.read_text("utf-8")
    )
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python jobs/train_decoder.py --recipe dmeo", "did you mean 'demo'"),
        ("python jobs/train_decoder.py --set loop.max_step=1", "did you mean 'max_steps'"),
        ("python jobs/train_decoder.py --set loop.max_steps=many", "loop.max_steps = 'many'"),
        ("python jobs/train_decoder.py --sett loop.max_steps=1", "unrecognized arguments"),
        ("python jobs/generate.py --set format=jpeg", "format = 'jpeg'"),
        ("python jobs/plan.py --stage decoder --gpu h101 --gpus 8", "gpu = 'h101'"),
        ("python jobs/figures.py BUNDLE --outt figures", "unrecognized arguments"),
        ("python jobs/serve.py --set bundel=x", "bundel"),
        ("python jobs/no_such_job.py", "there is no jobs/no_such_job.py"),
        ("python examples/add_a_source.py --set 'sources=[{kind: sqlite, uri: a.db}]'", "table: required"),
        ("ray job submit --runtime-env jobs/none.yaml -- python jobs/embed.py", "there is no jobs/none.yaml"),
        ("ray job submit -- python jobs/embed.py --set dat=x", "did you mean 'data'"),
        ("ray start --heat", "No such option"),
        ("serve run unclip.cluster.serve:build bundel=x", "bundel"),
        ("kubectl apply -k k8s/overlays/none", "there is no k8s/overlays/none"),
        ("kubectl apply -k k8s/jobs -l unclip/job=train-nothing", "no manifest is named train-nothing"),
        ("make demmo", "no target demmo"),
        ("curl http://127.0.0.1:8000/v1/images/generation -d '{}'", "nothing at /v1/images/generation"),
        ("curl http://127.0.0.1:8000/v1/images/generations -d '{prompt}'", "no JSON"),
        ("frobnicate", "nobody knows"),
    ],
)
def test_what_would_fail_is_found(command: str, reason: str) -> None:
    [words] = split(command)
    with pytest.raises(Refused, match=reason):
        check(words)
