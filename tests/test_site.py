"""The documents build as a site, and a link that leads nowhere stops the build."""

import pathlib
import shutil
import subprocess
import sys

REPO = pathlib.Path(__file__).parents[1]


def build(folder, config=REPO / "mkdocs.yml"):
  return subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", f"--config-file={config}",
                         f"--site-dir={folder}"], capture_output=True, text=True, cwd=REPO)


def test_site_builds_with_every_link_checked(tmp_path):
  done = build(tmp_path / "site")
  assert done.returncode == 0, done.stderr
  built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
  assert {path.stem for path in (REPO / "docs").glob("*.md")} <= built
  assert "Pass@1" in (tmp_path / "site" / "index.html").read_text()  # README


def test_a_dead_link_into_the_code_stops_the_build(tmp_path):
  for entry in ("README.md", "mkdocs.yml", "axpo_jax", "configs", "benchmarks", "examples", "experiments",
                "launch"):
    (tmp_path / entry).symlink_to(REPO / entry)
  shutil.copytree(REPO / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.gz"))
  with open(tmp_path / "docs" / "lora.md", "a") as page:
    page.write("\n[gone](../axpo_jax/gone.py)\n")
  done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
  assert done.returncode and "lora.md links to ../axpo_jax/gone.py" in done.stderr
