"""Trains or evaluates a policy by a config file.

  python launch/main.py --config=configs/axpo_tiny.py --workdir=runs/axpo_tiny

Every field of the config can be overridden: `--config.seed=1 --config.rl.resample.k=8`. The same
command run again resumes: finished stages are skipped, an unfinished one continues from its newest
checkpoint. SIGTERM saves a checkpoint and stops (docs/pods.md). `--help` lists the flags,
`--print_config` the whole configuration.

On several hosts, start the same command on each of them, with a --workdir that all of them see. On a TPU
pod or under Slurm the processes find each other; elsewhere add --coordinator=<host of process 0>:<port>
--processes=<how many> --process_id=<0, 1, ...> (docs/pods.md).
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

# Config files derive from each other (`from configs.axpo_tiny import ...`).
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from axpo_jax.config_checks import validate
from axpo_jax.config_queries import apply_recipe
from axpo_jax.stages import machine
from launch import command

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, such as configs/axpo_tiny.py.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for checkpoints, metrics.jsonl, transcripts and figures.")
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the configuration and stop.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer(
  "processes", 0, "Processes of the run; 0: from the environment, 1: only this one.", lower_bound=0)
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this process, from 0.", lower_bound=-1)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected argument {argv[1]!r}: overrides are --config.<field>=<value>.")
  if _PRINT_CONFIG.value:
    apply_recipe(_CONFIG.value)
    print(_CONFIG.value)
    return
  if not _WORKDIR.value:
    raise app.UsageError("--workdir=<folder> is needed: checkpoints and metrics go there.")
  logging.set_verbosity(logging.WARNING)  # libraries log much of their own at INFO
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install torch
  validate(_CONFIG.value)
  machine.prepare(_CONFIG.value)
  # Imported late, so that --help and config errors do not wait for JAX.
  from axpo_jax.stages import distributed, experiment
  from axpo_jax.train import preemption
  distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
  preemption.install()
  try:
    experiment.run(_CONFIG.value, _WORKDIR.value)
  except preemption.Stopped:
    print("stopped by SIGTERM: the same command resumes from here", file=sys.stderr)
    sys.exit(preemption.EXIT_CODE)


def _with_huge_pages() -> None:
  """Restarts the process with huge pages for malloc, which reads this setting only at the start.

  On a CPU, XLA allocates and frees hundreds of megabytes a step; with small pages that took 40 % of the time of
  a tiny model's step.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
  _with_huge_pages()
  command.run(main)
