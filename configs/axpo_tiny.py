"""The main job in miniature: SFT, AXPO and evaluation on a plain CPU, in minutes.

  python launch/main.py --config=configs/axpo_tiny.py --workdir=runs/axpo_tiny

Expect seven to ten minutes on two cores: 100 SFT steps, then 20 AXPO steps of 16 questions x 8
rollouts, over three families of questions: perception (zoom), search (two hops) and reasoning
(python). After SFT the policy uses tools in a part of its rollouts only, and in many of the groups that
try them every tool-using rollout is wrong: the Thinking-Acting Gap.

A policy of about one million parameters that has learnt to see, to copy and to call (the groundwork
that ships with the package; `experiments/miniworld` says how it is made) learns the agent's habits from a
scripted teacher, and then by AXPO when to act and how. The run ends with a table, start against end,
a row per family, and curves.png.
"""

from ml_collections import ConfigDict

from axpo_jax.config import ASSETS, base_config


def get_config() -> ConfigDict:
  c = base_config()
  c.stages = ("sft", "rl")
  c.model.checkpoint = str(ASSETS / "practised")
  c.model.dtype = "float32"  # a CPU has no fast bfloat16
  c.model.remat = "none"     # memory is no concern here
  c.model.attention_chunk = 128  # what a CPU's cache holds the scores of
  c.data.source = "miniworld"
  c.data.miniworld.families.update(perception=1.0, search=1.0, reasoning=1.0)

  # A canvas of 5 x 5 cells is shown at 16 pixels a cell: 25 tokens. A zoomed cell is 9 tokens, and
  # what is written in it lies in the middle one.
  c.images.min_pixels, c.images.max_pixels = 16 * 16, 25 * 16 * 16
  c.images.zoom_min_pixels, c.images.zoom_max_pixels = 32 * 32, 48 * 48
  c.agent.tools = ("image_zoom_in", "python", "tavily-search")
  c.agent.scopes = ("read_image", "execute", "network")
  c.agent.search.backend = "miniworld"  # an index in this process
  c.agent.overlap_tools = False         # so that a run repeats to the last bit
  c.agent.system_prompt = "short"
  c.agent.describe_tools = False  # a third of the prompt, and this policy cannot read prose
  c.agent.max_new_tokens = 64
  c.agent.max_response_tokens = 256
  c.agent.max_total_tokens = 512
  c.agent.max_images = 4
  c.rollout.embedded.update(rows=256, max_running=128, decode_block=16, dtype="float32")
  # With --config.rollout.engine=sglang: a real server, on the CPU.
  c.rollout.sglang.push_dtype = "float32"
  c.rollout.sidecar.update(device="cpu", max_total_tokens=32_768, max_running=32)
  c.batch.update(rows=8, length=512, image_rows=16, logprob_chunk=4096)

  c.sft.update(source="teacher", steps=100, examples=32, max_length=512, freeze_vision=False)
  c.sft.teacher.update(
    p_tool_small=0.25, p_tool_large=0.05, p_search=0.10, p_python_hard=0.22, p_python_easy=0.07)
  c.sft.optimizer.update(name="muon", learning_rate=3e-3, warmup=0.05, b2=0.98)
  c.rl.update(steps=20, questions=16)
  c.optimizer.update(learning_rate=1e-4, weight_decay=0.0)

  # The policy itself is measured: no temperature or nucleus between it and the figures. A presence
  # penalty would forbid a box two equal coordinates.
  c.eval.update(questions=128, max_turns=3, max_new_tokens=64, max_response_tokens=256,
                max_total_tokens=512, temperature=1.0, top_p=1.0, top_k=0, presence_penalty=0.0)
  return c
