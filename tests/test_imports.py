"""Imports point one way, and what needs no accelerator does not load one.

launch -> stages, report, plan -> rollouts, train, eval -> agent -> engine -> model, data, rl
"""

import ast
import pathlib
import subprocess
import sys

import axpo_jax

PACKAGE = pathlib.Path(axpo_jax.__file__).parent
REPO = PACKAGE.parent

# Room -> what its files may import of ours: rooms, or single modules.
ALLOWED = {
  # The public names, for type checkers: see `test_the_package_itself_loads_nothing`.
  "__init__": {"agent", "api", "config", "data", "diagnose", "errors", "rl", "rollouts", "stages.metrics"},
  "api": {"stages", "rollouts", "agent", "data", "rl", "config_queries", "errors", "repository"},
  "errors": set(),
  "repository": set(),
  # The dataclasses that sections are made from.
  "config": {"config_section", "agent", "data.readers", "engine.protocol", "engine.settings", "engine.sglang.server.spec", "errors",
             "miniworld", "model.config", "rl", "train.optimizer_config"},
  "paths": {"errors"},
  "hub": {"errors"},
  "processes": set(),
  "markdown": set(),
  "seeds": set(),
  "records": set(),
  "config_section": set(),
  "config_queries": {"config", "errors", "rl.recipes"},
  "config_checks": {"config", "config_queries", "hub", "eval.benchmarks", "errors", "paths", "rl.recipes", "stages.plugins", "stages.sections"},
  "config_reference": {"config", "config_queries"},
  "rl": {"rl"},
  "model": {"model"},
  "data": {"data", "model", "paths", "records", "rl.advantages"},
  "engine": {"engine", "model", "processes", "repository"},
  "agent": {"agent", "paths", "model.chat", "model.images", "model.pictures", "data.question", "engine.protocol", "engine.endpoint"},
  "miniworld": {"miniworld", "data", "model", "engine"},
  "eval": {"eval", "engine.endpoint", "agent", "data", "rl", "paths"},
  "rollouts": {"rollouts", "eval.scoring", "agent", "engine", "data", "model", "rl", "errors", "paths", "seeds"},
  "train": {"train", "rollouts.groups", "agent", "model", "rl", "errors", "paths", "processes"},
  "diagnose": {"diagnose", "markdown", "records", "rollouts", "agent", "rl"},
  "stages": {"stages", "markdown", "diagnose", "rollouts", "train", "eval", "miniworld", "agent", "engine", "model", "data", "rl",
             "config", "config_queries", "errors", "paths", "processes", "seeds"},
  "plan": {"plan", "markdown", "stages", "train", "engine", "model", "rl", "config_queries", "errors"},
  "report": {"report", "stages.metrics", "stages.summary", "diagnose", "rollouts", "eval", "agent", "data", "paths"},
}
# Modules that agents, tools and planning are made of: they load in a moment, on any machine.
WITHOUT_JAX = (
  "rollouts.dump", "agent.episode", "agent.judge", "agent.rewards", "agent.tools.audit", "agent.tools.corpus",
  "agent.tools.function", "agent.tools.image_search", "agent.tools.mcp_server",
  "agent.tools.python", "agent.tools.tavily", "agent.tools.zoom", "config_checks", "data.adapters",
  "config", "config_queries", "data.filters", "data.inspect", "miniworld.teacher", "data.question", "data.readers",
  "eval.benchmarks", "stages.forced", "eval.passk", "eval.scoring", "rollouts.shards", "stages.summary",
  "model.chat", "model.config", "model.images", "rl.advantages", "rl.algorithm", "rollouts.census", "rl.credit",
  "rl.recipes", "rl.resample", "engine.protocol", "engine.openai", "engine.sglang.server",
  "engine.sglang.server.environment", "engine.sglang.server.sizing", "miniworld.engine",
  "engine.weightless", "engine.settings", "rl.loss_config", "train.optimizer_config",
  "stages.machine", "seeds")
# Runs in the servers' environment, which has torch and SGLang and nothing of ours.
# What runs in SGLang's processes.
THEIRS = {PACKAGE / "engine" / "sglang" / "server" / name for name in ("serve.py", "axpo_delta.py")}


def imported(path: pathlib.Path) -> set[str]:
  """Full names of all modules that a file imports, in functions too."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      # `from axpo_jax.model import chat` may name a module: count both.
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def ours(path: pathlib.Path) -> set[str]:
  return {name.removeprefix("axpo_jax.") for name in imported(path) if name.startswith("axpo_jax.")}


def allowed(name: str, room: str) -> bool:
  return any(name == entry or name.startswith(f"{entry}.") for entry in ALLOWED[room])


def test_imports_point_one_way():
  wrong = [f"{path.relative_to(REPO)} imports {name}" for path in sorted(PACKAGE.rglob("*.py")) for name in ours(path)
           if path in THEIRS or not allowed(name, path.relative_to(PACKAGE).parts[0].removesuffix(".py"))]
  assert not wrong


def test_package_imports_neither_torch_nor_sglang():
  others = {"torch", "torchvision", "sglang"}
  wrong = {f"{path.relative_to(REPO)} imports {name}" for path in PACKAGE.rglob("*.py") if path not in THEIRS
           for name in imported(path) if name.split(".")[0] in others}
  assert not wrong


def test_launch_needs_train_only():
  assert ours(REPO / "launch" / "main.py") == {
    "config_queries.apply_recipe", "config_checks.validate", "stages.distributed", "stages.experiment", "stages.machine",
    "train.preemption"}


def test_every_room_has_a_rule():
  rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
  assert rooms == {name for name in ALLOWED if not (PACKAGE / f"{name}.py").exists()}


def test_wrong_import_would_be_noticed(tmp_path):
  file = tmp_path / "wrong.py"
  file.write_text("def f():\n  from axpo_jax.agent import rewards\n")
  assert ours(file) == {"agent.rewards"}
  assert not allowed("agent.rewards", "engine")
  assert not allowed("model.qwen3_vl", "agent")
  assert allowed("model.chat.Chat", "agent")


def test_the_package_itself_loads_nothing():
  """And the public names that read logs or plan AXPO load no JAX."""
  program = ("import sys, axpo_jax\n"
             "assert not [name for name in sys.modules if name.startswith('axpo_jax.')] and 'numpy' not in sys.modules\n"
             "axpo_jax.read_logs, axpo_jax.diagnose_logs, axpo_jax.plan_resamples, axpo_jax.assign_credit\n"
             "assert 'jax' not in sys.modules\n"
             "assert all(getattr(axpo_jax, name) is not None for name in axpo_jax.__all__)\n"
             "assert set(axpo_jax.__all__) <= set(dir(axpo_jax))")
  done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_light_modules_do_not_load_jax():
  """One process for all of them. (transformers loads torch where it is installed; that is its own.)"""
  lines = ["import sys"]
  for name in WITHOUT_JAX:
    lines += [f"import axpo_jax.{name}",
              f"assert 'jax' not in sys.modules, {name!r}"]
  done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=REPO, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr


def test_tools_load_without_their_packages():
  """setup.py's extra `tools` is needed by whoever uses a tool, not by whoever imports it."""
  lines = ["import sys",
           "for name in ('IPython', 'aiolimiter', 'bm25s', 'mcp', 'tenacity'): sys.modules[name] = None",
           *(f"import axpo_jax.{name}" for name in WITHOUT_JAX), "import axpo_jax.stages.toolbox"]
  done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=REPO, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr
