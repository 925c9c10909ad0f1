"""Wrong words, completion, errors as JSON."""

import json
import os
import subprocess

import pytest

from qalora_plugin.cli import COMMANDS, main
from qalora_plugin.files.progress import progress_bar


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("inspct m", "inspect instead of inspct"),
        ("merge a --uot b", "--out instead of --uot"),
        ("export m --format ggfu --out x", "gguf instead of ggfu"),
        ("quantize m --out x --grup-size=4", "--group-size instead of --grup-size=4"),
        ("plan m --optimizer adam", "adamw instead of adam"),
        ("verify m --adpter a", "--adapter instead of --adpter"),
        ("push m me/m --dryrun", "--dry-run instead of --dryrun"),
        ("quickstart --learning_rate 1", "--learning-rate instead of --learning_rate"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest(line, meant, capsys):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert f"Did you mean {meant}?" in printed
    command = f"qalora {line.split()[0]}" if line.split()[0] in COMMANDS else "qalora"
    assert printed.startswith(f"{command}: error: ")
    assert printed.endswith(f"\n`{command} --help` lists what it takes.\n")


def test_an_option_before_its_command_is_told_where_to_stand(capsys):
    with pytest.raises(SystemExit):
        main(["--json", "inspect", "m"])
    assert "options of a command stand after its name" in capsys.readouterr().err


def test_nothing_is_guessed_where_nothing_is_near(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "adapter", "--out", "x", "--zzzz"])
    assert "Did you mean" not in (printed := capsys.readouterr().err)
    assert "unrecognized arguments: --zzzz" in printed


def test_every_command_has_the_option_json(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--json" in capsys.readouterr().out, command


def test_an_error_is_json_too(tmp_path, capsys):
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "out"), "--json"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["error"] == "AdapterError" and found["message"] in printed.err


def test_a_directory_that_may_not_be_looked_into(tmp_path, capsys):
    model = tmp_path / "locked" / "model"
    model.mkdir(parents=True)
    command = ["inspect", str(model), "--json"]
    assert main(command) == 1 and "PermissionError" not in capsys.readouterr().out
    model.parent.chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may look into everything
        status = main(command)
    finally:
        os.seteuid(user)
        model.parent.chmod(0o755)
    assert status == 1
    assert f"{model}: Permission denied." in json.loads(capsys.readouterr().out)["message"]


def test_completion_for_bash(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert not end.value.code
    script = tmp_path / "complete.sh"
    script.write_text(capsys.readouterr().out)
    shell = f"source {script}; COMP_WORDS=(qalora export --form) COMP_CWORD=2 COMP_LINE=x"
    shell += '; _shtab_qalora; echo "${COMPREPLY[@]}"'
    found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["--format"], found.stderr


def test_progress_is_plain_lines_in_a_log(monkeypatch, capsys):
    clock = iter(range(0, 10000, 4))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    with progress_bar("merging", "tensor") as progress:
        for done in range(1, 11):
            progress(done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 10 and "\r" not in "".join(lines)
    assert lines[-1].startswith("merging: 10 of 10 tensors, ") and lines[-1].endswith(" left")
