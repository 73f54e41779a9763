"""Installs axpo_jax; requirements.txt is the one list of what it needs."""

import pathlib
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

_HERE = pathlib.Path(__file__).parent


def _requirements(file: str = "requirements.txt") -> list[str]:
  lines = (_HERE / file).read_text().splitlines()
  names = (line.partition("#")[0].strip() for line in lines)
  return [name for name in names if name and not name.startswith("-")]


# What single tools need; each says so when it is used without. docs/tools.md has the list.
_TOOLS = [
  "aiolimiter>=1.2",  # search: rate limit
  "bm25s>=0.3.16",  # search: local index
  "httpx2>=2.10",  # search: Tavily
  "ipython>=9.0",  # python
  "mcp>=2.3,<3",
  "scipy>=1.14",  # python
  "sympy>=1.13",  # python
  "tenacity>=9.0",  # search: retries
]

# The page of report; its figures are drawn by the script inside the package.
_REPORT = ["plotly>=6.0,<8"]

# Object stores: what epath reaches gs:// and s3:// by. docs/pods.md says what may lie there.
_GCS = ["gcsfs>=2026.10,<2027"]
_S3 = ["s3fs>=2026.9,<2027"]

# The documents as a site: mkdocs build --strict.
_DOCS = ["mkdocs>=1.6,<2"]

# jax's extras bring the plugin, and the compiler, of its own release.
_JAX = next(line.removeprefix("jax") for line in _requirements() if line.startswith("jax>"))
_X86 = "platform_system == 'Linux' and platform_machine == 'x86_64'"
# The compilers of launch/compile.py: for TPUs libtpu; for GPUs jax's plugin and ptxas, without NVIDIA's
# libraries (220 MB in the place of 3 GB).
_AOT = [f"jax[tpu]{_JAX}; {_X86}"]
_AOT_GPU = [f"jax[cuda12-local]{_JAX}; {_X86}", f"nvidia-cuda-nvcc-cu12>=12.6; {_X86}"]

# What a wheel has from outside the package; axpo_jax/repository.py finds it.
_SHIPPED = ("launch/*.py", "configs/**/*.py", "examples/*.py", "requirements-sidecar*.txt")


class _BuildWithRepository(build_py):
  """Copies the programs, the configs, the examples and the servers' requirements into the wheel."""

  def run(self):
    super().run()
    if self.editable_mode:
      return  # they lie beside the package
    for path in (path for pattern in _SHIPPED for path in _HERE.glob(pattern)):
      copy = pathlib.Path(self.build_lib, "axpo_jax", "_repository", path.relative_to(_HERE))
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, copy)


setup(
  name="axpo_jax",
  version="0.1.0",
  description="AXPO (arXiv 2605.28774) in JAX: train vision-language models that act",
  long_description=(_HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11,<3.14",
  classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
  packages=find_packages(include=["axpo_jax", "axpo_jax.*"]),
  package_data={"axpo_jax": ["assets/**/*", "report/assets/*", "py.typed"]},
  cmdclass={"build_py": _BuildWithRepository},
  entry_points={"console_scripts": [
    "axpo-train=axpo_jax.repository:train",
    "axpo-sweep=axpo_jax.repository:sweep",
    "axpo-sidecar=axpo_jax.repository:sidecar",
    "axpo-compile=axpo_jax.repository:compile_ahead",
    "axpo-report=axpo_jax.report.__main__:main",
    "axpo-diagnose=axpo_jax.diagnose.__main__:main",
    "axpo-inspect=axpo_jax.data.inspect:main",
  ]},
  install_requires=_requirements(),
  extras_require={
    "aot": _AOT,
    "aot-gpu": _AOT_GPU,
    "cuda": [f"jax[cuda12]{_JAX}"],
    # For the servers' environment, which is best one of its own: docs/sidecar.md.
    "sglang": _requirements("requirements-sidecar.txt"),
    "docs": _DOCS,
    "gcs": _GCS,
    "report": _REPORT,
    "s3": _S3,
    "tpu": [f"jax[tpu]{_JAX}"],
    "tools": _TOOLS,
    # torch is here to compare with: the port's second implementation. Never imported by the package.
    # playwright drives a Chromium that the system has; it need not install one.
    # Stores are tested against servers on loopback.
    "test": [*_AOT, *_DOCS, *_GCS, *_REPORT, *_S3, *_TOOLS,
             "atif>=1.8,<2", "datasets>=4", "gcp-storage-emulator>=2026.7",
             "hypothesis>=6.100", "moto[server]>=5.2", "playwright>=1.50", "pytest>=8",
             "pytest-xdist>=3.7", "ruff>=0.9", "setuptools>=70.1", "torch==2.13.0", "wandb>=0.20"],
  },
)
