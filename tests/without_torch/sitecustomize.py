"""Python reads this at its start where this folder is on PYTHONPATH: `import torch` then fails."""

import sys

sys.modules["torch"] = None
