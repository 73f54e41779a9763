"""Compiles a run for TPUs or GPUs on a machine without them, and reports whether it fits.

  pip install -e '.[aot]'      # for TPUs; '.[aot-gpu]' for GPUs
  python launch/compile.py --config=configs/axpo_8b.py --config.model.preset=8b --topology=v5p:4x4x4
  python launch/compile.py --config=configs/axpo_8b.py --config.model.preset=8b --topology=h100:8

It prints one table with a column for each jitted function of the run: those of the train step, and those of the
embedded engine if that samples. The rows are a chip's memory by kind and its limit, FLOPs, seconds at the chips'
peak, and seconds to compile. The last line says whether the run fits. Sizes come from --config.model.preset or
from a checkpoint's config.json; no parameters are made. The mesh is config.mesh over the chips, and the
micro-batch is config.batch without padding.
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import command

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, such as configs/axpo_8b.py.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "A slice of TPUs such as v5p:4x4x4 (Google's v5p-128), v5e:8x16, v6e:8x8; GPUs of one "
  "host, h100:8; or hosts x GPUs, h100:4x8; also a100, h200, b200.")
_LAYERS = flags.DEFINE_integer(
  "layers", 0, "Compile only this many text layers; 0: all.")
_IMAGES = flags.DEFINE_float(
  "image_share", 0.25, "Share of image tokens in a micro-batch.", lower_bound=0, upper_bound=1)
_LARGEST = flags.DEFINE_bool(
  "largest_image", False, "Every row of the vision tower holds an image of config.images.zoom_max_pixels.")
_FUNCTIONS = flags.DEFINE_list(
  "functions", ["score", "accumulate", "apply", "prefill", "decode"],
  "Which functions to compile; the last two are the embedded engine's.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected argument {argv[1]!r}: overrides are --config.<field>=<value>.")
  logging.set_verbosity(logging.WARNING)
  os.environ["JAX_PLATFORMS"] = "cpu"  # no device is used
  from axpo_jax.errors import ConfigError
  from axpo_jax.model.config import UnsupportedConfig
  from axpo_jax.plan.chips import TopologyError
  try:
    _report(_CONFIG.value)
  except (ConfigError, TopologyError, UnsupportedConfig, OSError) as error:
    sys.exit(f"error: {command.one_line(error)}")


def _report(config: ConfigDict) -> None:
  from axpo_jax.plan import slice_plan, slice_report
  plan = slice_plan.Plan.from_config(config, _TOPOLOGY.value, layers=_LAYERS.value,
                                     image_share=_IMAGES.value, largest=_LARGEST.value)
  print(f"{pathlib.Path(sys.argv[0]).name}: {plan.describe()}\n", flush=True)
  print(slice_report.text(plan.report(_FUNCTIONS.value)))


if __name__ == "__main__":
  command.run(main)
