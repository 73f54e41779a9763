"""The main job at its smallest: every stage in a second or two once compiled. For the tests.

  python launch/main.py --config=tests/stages/micro_config.py --workdir=runs/micro \
    --config.model.checkpoint=... --config.data.path=... --config.data.eval_path=...

Perception alone: one tool, and an image in every prompt. The sizes are chosen so that each jitted
function meets one shape, or few.
"""

from ml_collections import ConfigDict

from configs.axpo_tiny import get_config as axpo_tiny


def get_config() -> ConfigDict:
  c = axpo_tiny()
  c.model.checkpoint = ""
  c.data.source = "jsonl"
  c.data.miniworld.families.update(search=0.0, reasoning=0.0)
  c.mesh.update(data=1, fsdp=1, tensor=1)
  c.agent.update(tools=("image_zoom_in",), scopes=("read_image",), overlap_tools=True)
  c.agent.update(max_new_tokens=64, max_response_tokens=192, max_total_tokens=384, max_turns=2)
  c.rollout.embedded.update(rows=32, max_running=8, decode_block=8)
  c.batch.update(rows=6, length=576, image_rows=4, logprob_chunk=1024)
  c.sft.update(steps=4, examples=2, max_length=384)
  # A teacher without mistakes: every trajectory has two images.
  c.sft.teacher = ConfigDict(dict(
    p_tool_small=1.0, p_tool_large=1.0, p_wrong_mark=0.0, p_off_cell=0.0, p_malformed=0.0))
  c.sft.optimizer.learning_rate = 1e-4
  c.rl.update(steps=4, questions=4, num_rollouts=4)
  c.rl.resample.update(ratio=0.5, k=2)
  c.eval.update(questions=2, rollouts=2, max_turns=2, max_response_tokens=192, max_total_tokens=384,
                every=2)
  c.checkpoint.every = 2
  c.log.update(dump_every=1, tensorboard=False)
  return c
