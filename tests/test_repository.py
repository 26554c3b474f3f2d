"""What the repository's own files promise: the API page, the Makefile, the version."""

import re
import subprocess
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import optax_cautious

ROOT = Path(__file__).parents[1]


def test_the_api_page_documents_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.M)
    assert sorted(documented) == optax_cautious.__all__


def test_every_page_is_in_a_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^(?:.* <)?(\w+)>?$", index, re.M))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= listed


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", makefile, re.M)
    assert phony
    targets = phony[1].replace("\\\n", " ").split()
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^  make (\S+) +\S", shown, re.M) == targets


def test_the_workflows_run_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        used = re.findall(r"run: make ([a-z-]+)$", text, re.M)
        used += re.findall(r"target: ([a-z-]+)", text)
        assert used, path
        assert {*used} <= targets


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.replace("|", " ").split()) <= 900


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_resolve(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_an_incomplete_entry_of_the_compilation_cache_fails_no_test(tmp_path):
    def twice_one():
        return jax.jit(lambda x: 2 * x)(1.0)  # Compiled at each call.

    changed = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_enable_compilation_cache": True,
    }
    usual = {name: getattr(jax.config, name) for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        assert twice_one() == 2
        entries = [*tmp_path.glob("*-cache")]
        assert entries
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[:10])
        assert twice_one() == 2
    finally:
        for name, value in usual.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
