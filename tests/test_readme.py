"""What the README says exists: its lines, files, flags, settings; and requirements."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from longlive_jax.data import toy_render, toy_world

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

# Where the name on PyPI is not the name that is imported.
MODULES = {
  "absl-py": "absl", "orbax-checkpoint": "orbax", "pillow": "PIL",
  "tensorboardx": "tensorboardX",
}  # fmt: skip
# Required before this code imports them; requirements.txt says why.
BELOW_OTHERS = {"tensorstore"}


def blocks() -> list[list[str]]:
  """The fenced blocks of commands: their lines without comments and empty lines."""
  return [
    [line for line in block.splitlines() if line and not line.startswith("#")]
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
  ]


def commands() -> list[list[str]]:
  """Every command of every block, split into words."""
  return [
    shlex.split(command)
    for block in blocks()
    for line in block
    for command in line.split("&&")
  ]


def python_commands() -> list[list[str]]:
  """The commands that run this project's scripts and modules."""
  runs = [words[1:] for words in commands() if words[0] == ".venv/bin/python"]
  return [words for words in runs if words[:2] != ["-m", "pytest"]]


def module_file(name: str) -> Path:
  return ROOT / (name.replace(".", "/") + ".py")


def requirements(lines: list[str]) -> dict[str, str]:
  """Version ranges by lower-cased name on PyPI."""
  found = {}
  for line in lines:
    line = line.split("#")[0].split(";")[0].strip()
    if line:
      name, bounds = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", line).groups()
      found[name.lower()] = bounds
  return found


def required() -> dict[str, str]:
  return requirements((ROOT / "requirements.txt").read_text().splitlines())


def imported(*folders: str) -> set[str]:
  """Top-level names that the Python files of some folders import."""
  names = set()
  for folder in folders:
    for file in (ROOT / folder).rglob("*.py"):
      for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
          names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
          names.add(node.module.split(".")[0])
  return names


@pytest.mark.parametrize("heading", ["Quickstart", "Tests"])
def test_heading_is_followed_at_once_by_a_block_of_one_line(heading):
  found = re.search(rf"^## {heading}\n\n?```bash\n(.+)\n```$", README, re.M)
  assert found, f"'## {heading}' is not followed by a block of one line"
  assert found[1].startswith("python3 -m venv .venv && .venv/bin/pip install -e ")


def test_ci_runs_the_test_line():
  line = re.search(r"^## Tests\s+```bash\n(.+)$", README, re.M)[1]
  taken = re.search(r"^line=.*$", CI, re.M)[0] + '\necho "$line"'
  ran = subprocess.run(["bash", "-c", taken], cwd=ROOT, capture_output=True, text=True)
  assert ran.stdout == line + "\n"


def test_scripts_of_commands_exist():
  runs = python_commands()
  assert len(runs) > 10
  for words in runs:
    path = module_file(words[1]) if words[0] == "-m" else ROOT / words[0]
    assert path.is_file(), path


def test_flags_of_commands_exist():
  for words in python_commands():
    path = module_file(words[1]) if words[0] == "-m" else ROOT / words[0]
    source = path.read_text(encoding="utf-8")
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
    known |= set(re.findall(r'add_argument\(\s*"--(\w+)"', source))
    known.add("help")  # every script has it
    for word in words:
      if word.startswith("--") and not word.startswith("--config."):
        assert word[2:].split("=")[0] in known, f"{path.name} has no flag {word}"


def test_settings_of_commands_exist():
  for words in python_commands():
    named = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
    settings = [word for word in words if word.startswith("--config.")]
    if not named and not settings:
      continue
    path, _, argument = (named or ["configs/generate.py:toy"])[0].partition(":")
    spec = importlib.util.spec_from_file_location("readme_config", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    for setting in settings:
      name, value = setting.removeprefix("--config.").split("=")
      *groups, last = name.split(".")
      holder = config
      for group in groups:
        holder = holder[group]
      assert last in holder, f"{path} has no setting {name}"
      type(holder[last])(value)  # raises where the value cannot be read


def test_extras_of_install_lines_exist():
  for words in [*commands(), *map(shlex.split, re.findall(r"`([^`\n]+)`", README))]:
    if "install" in words:
      for extras in re.findall(r"\[(.*)\]", words[-1]):
        assert set(extras.split(",")) <= set(EXTRAS), words


def test_files_that_the_readme_names_exist():
  linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
  prefix = r"(?:longlive_jax|launch|configs|tools|tests|\.ci)"
  named = re.findall(rf"(?<![\w./]){prefix}/[\w./-]*\w", README)
  for path in {*linked, *named}:
    assert (ROOT / path).exists(), f"README.md names {path}"


def test_toy_words_are_those_of_the_world():
  words = {*toy_render.SHAPES, *toy_render.COLOURS, *toy_render.SIZES}
  words |= {word.strip() for word, *_ in toy_world.TEXTURE_WORDS.values()} - {""}
  words |= {word for word, *_ in toy_world.MOTION_WORDS.values()}
  words |= {word for word, *_ in toy_world.BACKGROUND_WORDS.values()}
  assert {word for word in words if f"`{word}`" not in README} == set()


def test_requirements_are_bounded_and_used():
  used = imported("longlive_jax", "launch", "tools")
  for name, bounds in required().items():
    assert ">=" in bounds and ",<" in bounds, f"{name}{bounds} needs a range"
    module = MODULES.get(name, name.replace("-", "_"))
    assert (module in used) != (name in BELOW_OTHERS), f"is {name} needed?"


def test_imports_are_required():
  modules = {MODULES.get(name, name.replace("-", "_")) for name in required()}
  own = {"longlive_jax", "launch", "configs", "tools", "parity_runners"}
  own |= {file.stem for file in (ROOT / "tools").glob("*.py")}
  known = modules | own | set(sys.stdlib_module_names)
  package = imported("longlive_jax", "launch", "configs") - known
  serving = set(requirements(EXTRAS["serve"]))
  optional = {"torch", "tensorboardX"} | serving
  assert package <= optional, "an import that requirements.txt lacks"
  assert imported("tools") - known <= {"torch", "matplotlib"} | serving
  found = requirements([line for lines in EXTRAS.values() for line in lines])
  extras = {MODULES.get(name, name) for name in found}
  tested = imported("tests") - known
  helpers = {"tests", *(file.stem for file in (ROOT / "tests").glob("*.py"))}
  assert tested <= {*extras, *helpers}, "an import that the test extra lacks"


def test_versions_known_to_break_are_excluded():
  assert required()["jax"].endswith("<0.12")
  assert required()["jax-triton"].endswith("<0.4")
  assert requirements(EXTRAS["cuda"])["jax"] == required()["jax"]
