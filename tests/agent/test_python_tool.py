"""The python tool: state, output, figures, time limits, death, and being rebuilt."""

import asyncio
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from axpo_jax.agent.parse import ToolCall
from axpo_jax.agent.tools.base import EpisodeState, PastCall, ToolBox
from axpo_jax.agent.tools.python import cells_to_replay
from axpo_jax.agent.tools.sandbox import isolation

PICTURE = PIL.Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))


class Notebook:
  """One episode's cells, as the loop would run them."""

  def __init__(self, tool, images=(), history=()):
    self.box = ToolBox([tool], ["execute"])
    self.state = EpisodeState("q", list(images), history=list(history))

  def __call__(self, code, **arguments):
    return asyncio.run(self.box.call("python", {"code": code, **arguments}, self.state))


@pytest.fixture
def notebook(python_tool):
  books = []

  def make(**changes):
    books.append(Notebook(python_tool, **changes))
    return books[-1]

  yield make
  for book in books:
    book.box.end_episode(book.state)


def test_variables_persist_within_an_episode_only(notebook):
  one, other = notebook(), notebook()
  assert one("x = 40").text == "(no output)"
  assert one("x + 2").text == "42"
  seen = other("x + 2")
  assert seen.error == "cell_error" and "NameError: name 'x' is not defined" in seen.text


def test_stdout_stderr_and_the_last_expression(notebook):
  seen = notebook()("import sys\nprint('out')\nprint('err', file=sys.stderr)\n'last'")
  assert seen.text == "out\n'last'\n[stderr]\nerr" and seen.error is None


def test_output_of_child_processes_comes_back(notebook):
  assert notebook()("import subprocess\nsubprocess.run(['echo', 'child'])\nNone").text == "child"


def test_an_exception_keeps_the_kernel(notebook):
  book = notebook()
  seen = book("x = 7\n1 / 0")
  assert seen.error == "cell_error"
  assert "line 2" in seen.text and "ZeroDivisionError: division by zero" in seen.text
  assert book("x").text == "7"


@pytest.mark.parametrize("code", ["raise SystemExit", "raise KeyboardInterrupt", "exit()",
                                  "input()", "def f(:", "import sys\nsys.stdout.close()"])
def test_cells_that_end_oddly_keep_the_kernel(notebook, code):
  book = notebook()
  book("x = 7")
  book(code)
  assert book("open('f', 'w').write(str(x))").error in (None, "cell_error")
  assert book("import os\nos.write(1, open('f', 'rb').read())\nNone").text == "7"


def test_images_of_the_episode_are_there_and_new_ones_join_them(notebook):
  book = notebook(images=[PICTURE])
  assert book("_pil_images[0].size, _images is _pil_images").text == "((6, 4), True)"
  book.state.images.append(PIL.Image.new("L", (3, 2), 9))
  assert book("[i.size for i in _images], _images[1].getpixel((0, 0))").text == (
      "([(6, 4), (3, 2)], (9, 9, 9))")
  assert book("import numpy as np\nnp.asarray(_images[0]).sum()").text == "np.uint64(2556)"  # 0..71


def test_figures_come_back_as_images_with_their_number(notebook):
  book = notebook(images=[PICTURE])
  seen = book("import matplotlib.pyplot as plt\nplt.figure(figsize=(3, 2), dpi=50)\n"
              "plt.plot([1, 2])\nplt.show()\nprint('after')")
  assert seen.text == "after\nImage 1: figure."
  assert [image.size for image in seen.images] == [(150, 100)]
  assert len(set(seen.images[0].get_flattened_data())) > 2  # there is a line on it
  seen = book("plt.plot([1]); plt.figure(); plt.plot([2])")  # without show, as in a notebook
  assert len(seen.images) == 2


def test_a_picture_as_last_expression_is_shown(notebook):
  seen = notebook(images=[PICTURE])("_images[0].rotate(180)")
  assert seen.images[0].tobytes() == PICTURE.rotate(180).tobytes()


def test_a_transparent_picture_is_shown_on_white(notebook):
  seen = notebook()("import PIL.Image; PIL.Image.new('RGBA', (3, 2), (0, 0, 0, 0))")
  assert seen.images[0].getpixel((0, 0)) == (255, 255, 255)


def test_many_and_large_figures_are_bounded(notebook):
  seen = notebook()("for i in range(20): display(_images[0] if _images else __import__('PIL.Image')"
                    ".Image.new('RGB', (5000, 100)))")
  assert len(seen.images) == 8 and "at most 8 are shown" in seen.text
  assert all(image.width * image.height <= 2_000_000 for image in seen.images)


def test_a_cell_that_takes_too_long_loses_the_kernel_and_says_what_it_printed(notebook):
  book = notebook()
  book("x = 1")
  seen = book("print('begun')\nwhile True: pass", timeout=1)
  assert seen.error == "timeout"
  assert "took longer than 1 seconds" in seen.text and "all variables are lost" in seen.text
  assert seen.text.endswith("It had printed:\nbegun")
  assert "NameError" in book("x").text  # a fresh kernel, and the policy was told
  assert book("1 + 1").text == "2"


def test_a_timeout_beyond_the_most_is_taken_as_the_most(python_tool):
  asked = []

  class Pool:
    async def take(self):
      class Kernel:
        images_sent = 0

        async def run(self, code, timeout, images):
          asked.append(timeout)
          raise OSError
      return Kernel()

  tool = type(python_tool)(max_timeout=60)
  tool._pool = Pool()
  for timeout in (10**9, -5, 7):
    Notebook(tool)("1", timeout=timeout)
  Notebook(tool)("1")
  assert asked == [60, 1, 7, 12]


@pytest.mark.parametrize("code, reason", [
    ("import os\nos._exit(3)", "exited with code 3"),
    ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
])
def test_a_kernel_that_dies_is_an_error_observation(notebook, code, reason):
  book = notebook()
  seen = book(f"print('before')\n{code}")
  assert seen.error == "kernel_died" and reason in seen.text and "before" in seen.text
  assert book("1 + 1").text == "2"


def test_random_numbers_begin_alike_in_every_kernel(notebook):
  code = "import random, numpy as np\nrandom.random(), np.random.rand()"
  assert notebook()(code).text == notebook()(code).text


# ---- a cut transcript ----

def past(code, error=None, images=0, name="python"):
  return PastCall(ToolCall(name, {"code": code}), error, images)


NAMES = frozenset({"python"})


def test_cells_to_replay():
  a, b, c = past("a"), past("b", "cell_error"), past("c")
  zoom = past("x", name="image_zoom_in")
  assert cells_to_replay([a, zoom, b, c], NAMES) == [a, b, c]
  assert cells_to_replay([a, past("d", "timeout"), b], NAMES) == [b]
  assert cells_to_replay([a, past("d", "kernel_died")], NAMES) == []
  skipped = [past("d", error) for error in ("refused", "bad_arguments", "limit", "dry_run")]
  assert cells_to_replay([a, *skipped, c], NAMES) == [a, c]


def test_a_continued_episode_finds_its_variables(notebook):
  history = [past("import random\nx = random.random(); n = [len(_images)]", images=1),
             past("n.append(len(_images))\n1 / 0", "cell_error", images=2)]
  book = notebook(images=[PICTURE] * 3, history=history)
  assert book("n.append(len(_images))\nn, x == random.Random(0).random()").text == (
      "([1, 2, 3], True)")


def test_a_lost_kernel_is_not_rebuilt_within_its_episode(notebook):
  book = notebook(history=[past("x = 1")])
  assert book("x").text == "1"
  assert book("import os\nos._exit(0)").error == "kernel_died"
  assert "NameError" in book("x").text


def test_cells_that_now_kill_the_kernel_are_an_error_observation(notebook):
  book = notebook(history=[past("import os\nos._exit(0)")])
  assert book("1").error == "not_rebuilt"
  assert book("1").text == "1"


CALL = ('t\n</think>\n\n<tool_call>\n{{"name": "python", "arguments": {{"code": "{}"}}}}\n'
        '</tool_call><|im_end|>')
ANSWER = "s\n</think>\n\n<answer>\n\\boxed{{{}}}\n</answer><|im_end|>"


def test_an_episode_continued_from_inside_its_second_call(world, scripted, python_tool):
  """The whole way: cells in a transcript, a cut as AXPO makes it, the kernel rebuilt from it."""
  tools = ToolBox([python_tool], ["execute"])
  turns = [CALL.format("x = 20"), CALL.format("x += 1; print(x)"), ANSWER.format(21)]
  engine = scripted([world.ids(turn) for turn in turns])
  whole = asyncio.run(world.resume(world.start(), engine, tools=tools))
  assert [call.error for call in whole.calls] == [None, None] and whole.answer == "21"
  t = whole.transcript
  assert t.outcomes == [((None, 1),), ((None, 1),)]
  end = t.turns[1].start + t.ids[t.turns[1].start:].index(world.chat.tool_call_id) + 1
  rest = '\n{"name": "python", "arguments": {"code": "print(x * 100)"}}\n</tool_call><|im_end|>'
  engine = scripted([world.ids(rest), world.ids(ANSWER.format(2000))])
  resumed = asyncio.run(world.resume(t.cut(end), engine, tools=tools))
  assert "<tool_response>\n2000\n</tool_response>" in world.chat.decode(resumed.transcript.ids)


@pytest.mark.skipif(os.geteuid() != 0, reason="kernels of an ordinary user run as that user")
def test_packages_that_only_root_can_read_are_named(tmp_path, python_isolation):
  if python_isolation != "namespaces":
    pytest.skip("this host forbids namespaces")
  folder = tmp_path / "site-packages"
  folder.mkdir(mode=0o700)
  script = ("import site; from axpo_jax.agent.tools.sandbox import isolation\n"
            f"packages = [*site.getsitepackages(), {str(folder)!r}]\n"
            "site.getsitepackages = lambda: packages\n"
            "isolation.enter_empty_world()\n"
            "isolation.check_kernel()")
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert "IsolationError" in done.stderr and f"cannot read {folder}" in done.stderr


def test_packages_of_a_pth_file_are_shown_and_a_checkout_is_not(tmp_path, monkeypatch):
  packages, checkout = tmp_path / "other" / "site-packages", tmp_path / "checkout"
  packages.mkdir(parents=True)
  checkout.mkdir()
  monkeypatch.setattr(sys, "path", [*sys.path, str(packages), str(checkout)])
  shown = isolation._needed_paths()
  assert packages in shown and checkout not in shown
