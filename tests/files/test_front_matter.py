"""What anybody may write at the start of a README.md: a licence, or nothing."""

import itertools
import os

import pytest

from qalora_plugin.files.front_matter import read_front_matter
from qalora_plugin.formats.record import licence_of

BOMB = "a: &a [1,1]\n" + "".join(
    f"{new}: &{new} [*{old},*{old},*{old},*{old}]\n" for old, new in itertools.pairwise("abcdefghi")
)
NOTHING = {
    "none": "# a model\n",
    "not closed": "---\nlicense: mit\n",
    "not at the start": "\n---\nlicense: mit\n---\n",
    "no YAML": "---\nlicense: [a\n---\n",
    "an object of Python": "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
    "another type": "---\nlicense: {a: 1}\n---\n",
    "a list": "---\n- license\n---\n",
    "a date that is none": "---\nlicense: 2001-99-99\n---\n",
    "deep": "---\nlicense: " + "[" * 5000 + "\n---\n",
    "aliases of aliases": f"---\n{BOMB}license: *i\n---\n",
    "too long": "---\nx: " + "a" * 70_000 + "\nlicense: mit\n---\n",
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_is_no_card_has_no_licence(case, tmp_path):
    (tmp_path / "README.md").write_text(NOTHING[case])
    assert licence_of(str(tmp_path)) is None


@pytest.mark.parametrize("text", ["---\nlicense: mit\n---\n# a", "---\r\nlicense: mit\r\n---"])
def test_a_card(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_front_matter(tmp_path / "README.md") == {"license": "mit"}
    assert licence_of(str(tmp_path)) == "mit"


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb: c", "x" * 100, "<script>", ""])
def test_a_licence_is_a_name(name, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: {name!a}\n---\n".replace("'", '"'))
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"license": "apache-2.0"}')
    assert licence_of(str(tmp_path)) == "apache-2.0"


def test_pipes_and_files_elsewhere_are_not_read(tmp_path):
    (tmp_path / "secret").write_text("---\nlicense: private\n---\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "secret")
    assert licence_of(str(tmp_path / "model")) is None
    (tmp_path / "model" / "README.md").unlink()
    os.mkfifo(tmp_path / "model" / "README.md")
    assert licence_of(str(tmp_path / "model")) is None
