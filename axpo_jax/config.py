"""The configuration: every field, its unit and its default.

A config file starts from `base_config()` and changes only what its name says. Values the paper
(arXiv 2605.28774) gives are marked [paper]; the others are ours. The tree is locked, so a misspelt
override (`--config.rl.rolouts=16`) is an error and not a silent no-op.

Fields that a dataclass reads take their default and their meaning from it (`section`). The others are
written here. docs/configuration.md lists all of them.
"""

import pathlib

from ml_collections import ConfigDict

from axpo_jax.agent.limits import EpisodeLimits
from axpo_jax.agent.tools.kernels import KernelConfig
from axpo_jax.agent.tools.zoom import QWEN_LIMITS
from axpo_jax.config_section import section
from axpo_jax.data.readers import Columns, ReaderConfig
from axpo_jax.engine.protocol import SamplingParams
from axpo_jax.engine.settings import (
  EmbeddedConfig,
  FleetConfig,
  OpenAIConfig,
  PushConfig,
  SGLangConfig,
)
from axpo_jax.engine.sglang.server.spec import SidecarSpec
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.miniworld.perception import PerceptionConfig
from axpo_jax.miniworld.reasoning import ReasoningConfig
from axpo_jax.model.config import LoraConfig, ModelConfig
from axpo_jax.rl.credit import CreditConfig
from axpo_jax.rl.loss_config import LossConfig
from axpo_jax.rl.resample import DynamicConfig, ResampleConfig
from axpo_jax.rl.shaping import ShapingConfig
from axpo_jax.train.optimizer_config import OptimizerConfig

STAGES = ("teach", "sft", "screen", "rl", "eval")
# The paper's nine, by their names in eval.benchmarks.
BENCHMARKS = ("mathvision", "dynamath", "mathvr", "vstar", "visualprobe_bench", "hrbench_4k",
              "hrbench_8k", "hr_mmsearch", "mmsearch")
# Public training sets, by their names in data.adapters; benchmarks are read by name too.
PUBLIC_SETS = ("virl39k", "fvqa", "pyvision", "mmfinereason", "deepeyes", "visualprobe")
# Limits of one episode that every sampling stage has: see `_agent`.
LIMITS = ("max_turns", "max_new_tokens", "max_response_tokens", "max_total_tokens")
ASSETS = pathlib.Path(__file__).parent / "assets"


def base_config() -> ConfigDict:
  """The paper's values for an 8B policy; experiments in `configs/` derive from it."""
  c = ConfigDict()
  c.seed = 0  # of every random choice: sampling, order of questions, initialisation
  # The stages, in order: "teach" (a teacher samples the training questions), "sft", "screen" (the current
  # policy samples the training questions), "rl" (evaluates at its start and end), "eval" (evaluates only).
  c.stages = ("rl",)

  c.model = _model()
  c.lora = _lora()
  # Devices along each mesh axis; -1 on one axis takes the rest. If data and fsdp are both -1, fsdp takes the
  # rest, except for the shortest side of a TPU slice such as v5p:4x4x4, which data gets (docs/performance.md).
  c.mesh = ConfigDict(dict(data=-1, fsdp=-1, context=1, tensor=1))
  c.data = _data()
  c.images = _images()
  c.agent = _agent()
  c.rollout = _rollout()
  c.rl = _rl()
  c.optimizer = _optimizer(learning_rate=1e-6, schedule="constant", warmup=0.0)
  c.batch = _batch()
  c.teach = _teach()
  c.sft = _sft()
  c.screen = _screen()
  c.eval = _eval()
  # Limits of episodes: those of config.agent are for training. "teach" and "screen" use them unless they set
  # their own; config.eval has its own.
  for stage in ("teach", "screen"):
    for name in LIMITS:
      c[stage][name] = c.agent.get_oneway_ref(name)

  # Folder, or URL of an object store, where compiled programs are kept for later runs; "" = no cache. The
  # environment variable JAX_COMPILATION_CACHE_DIR, if set, is used instead.
  c.compilation_cache = "~/.cache/axpo_jax/compiled"
  # Steps between checkpoints, and how many to keep.
  c.checkpoint = ConfigDict(dict(every=10, keep=2))
  c.log = ConfigDict(dict(
    dump_every=10,       # steps between dumps of all rollouts as readable transcripts; 0 = never
    tensorboard=True,    # event files beside metrics.jsonl
    # Alarm when the mean |log-prob gap| between sampler and trainer exceeds this (nats).
    gap_alarm=0.05,
    stop_on_gap=False,   # stop the run on that alarm instead of only warning
    # Experiment trackers that get the metrics too, and tables of rollouts with pictures: "wandb", "trackio".
    trackers=(),
    project="axpo_jax",  # the run's project there
    profile_steps=(),    # steps of SFT and of RL that jax.profiler traces, such as (3,)
  ))
  return c.lock()


def _model() -> ConfigDict:
  return section(
    ModelConfig, "dtype", "param_dtype", "attention", "attention_chunk",
    # Folder in Hugging Face layout (config.json, *.safetensors, tokenizer), or its name on the hub.
    checkpoint="",
    preset="",                # sizes for random initialisation; only if checkpoint is empty
    tokenizer="",             # tokenizer folder; empty = the checkpoint's
    remat="full",             # what the backward pass recomputes of a layer: none, dots or full
    export_dtype="bfloat16",  # of the folders that stages write
    freeze_vision=False,      # RL does not train the vision tower and its mergers
  )


def _lora() -> ConfigDict:
  return section(
    LoraConfig, "alpha", "targets",
    rank=0,                   # of adapters; SFT and RL then train only them (docs/lora.md); 0 = none
  )


def _data() -> ConfigDict:
  return ConfigDict(dict(
    # jsonl, parquet, datasets (a folder of save_to_disk), miniworld, or a public data set as
    # downloaded: a name in PUBLIC_SETS or BENCHMARKS.
    source="jsonl",
    path="",                  # file or folder of training questions, or a data set's name on the hub
    eval_source="",           # like source, for the held-out questions; "" = as source
    eval_path="",             # like path, for the held-out questions
    image_folder="",          # image paths are relative to it and must stay in it; "" = the file's folder
    image_anywhere=False,     # image paths may leave that folder; only for files that you trust
    image_cache="",           # folder for images that the file holds as bytes; "" = keep them in memory
    # Names of the columns in the files of `source`; see docs/data.md.
    columns=section(Columns),
    max_bad_share=ReaderConfig.max_bad_share,  # a larger share of unreadable records stops the run
    miniworld=section(
      PerceptionConfig, "marks", "large_share",
      seed=0,                 # of the world; config.seed does not change the questions
      train_size=100_000,     # questions of the training splits (SFT and RL have one each)
      # Mix of the question families, in all splits.
      families=ConfigDict(dict(perception=1.0, search=0.0, reasoning=0.0)),
      # Mix of each family's kinds of questions in the RL and evaluation splits; all kinds are in
      # miniworld.world.KINDS.
      kinds=ConfigDict(dict(read=1.0, two_hop=1.0, total=1.0)),
      # Share of the reasoning questions that can be answered without computing.
      easy_share=ReasoningConfig.easy_share,
    ),
  ))


def _images() -> ConfigDict:
  return ConfigDict(dict(
    # Least and most pixels of a question's image as the policy sees it.
    min_pixels=64 * 64, max_pixels=1280 * 28 * 28,
    # Least and most pixels of a zoomed crop (Qwen-Agent's limits); the most holds for all tools' images.
    zoom_min_pixels=QWEN_LIMITS.min_pixels, zoom_max_pixels=QWEN_LIMITS.max_pixels,
  ))


def _agent() -> ConfigDict:
  return section(
    EpisodeLimits, "max_turns", "max_response_tokens", "max_total_tokens", "max_images",
    system_prompt="full",     # "full", "short", or the text itself
    # Any of image_zoom_in, python, shell, tavily-search, image_search, and your own functions as "module:name"
    # (docs/tools.md). Tools that execute code or use the network are off by default.
    tools=("image_zoom_in",),
    mcp="",                   # JSON file with a list of MCP servers whose tools are offered too
    describe_tools=True,      # False leaves the descriptions out of the tools' schemas
    # Allowed scopes of tools: read_image, execute (python), network (search), or a scope of your own.
    # A call outside of them is refused with an observation.
    scopes=("read_image",),
    dry_run=False,            # record calls and run none
    audit=True,               # write one line per call to the run's audit.jsonl
    # Tools run while the engine samples other episodes. False: one by one, so that runs repeat bit for bit.
    overlap_tools=True,
    max_observation_tokens=4096,  # of a call's text; longer texts are cut in the middle
    # Environment of the episodes: "" is a question with tools; or your own, "module:name" (docs/extending.md).
    environment="",
    environment_args="{}",    # arguments of its class, as a JSON object
    # Reward of a rollout: a sum of exact, math_verify, judge, format, length, environment, and your own
    # functions, such as "exact + 0.2 * my_module:brevity" (docs/extending.md). A rollout whose sum is
    # above 0.5 counts as right: in success rates, Pass@k, AXPO's trigger and exports.
    reward="exact",
    reward_time_limit=60.0,   # seconds a function of yours may take
    # A rollout whose reward function fails is left out of training ("leave_out") or has reward 0 ("zero").
    reward_failure="leave_out",
    judge=_judge(),           # of the reward "judge"
    # Budget of the calls of one episode: their number, seconds, bytes of text, images; 0 = no limit.
    episode_limits=ConfigDict(dict(calls=0, seconds=0.0, bytes=0, images=0)),
    # The same, for the whole run.
    run_limits=ConfigDict(dict(calls=0, seconds=0.0, bytes=0, images=0)),
    python=_python_tool(),
    search=ConfigDict(dict(
      backend="tavily",       # tavily (key in TAVILY_API_KEY), local, recorded, or miniworld
      corpus="",              # for local: a folder of documents, or a .jsonl file
      record="",              # folder of recorded answers by query; read first; tavily adds to it
      excluded=("huggingface.co",),  # domains whose pages are left out [paper]
      per_minute=100.0,       # requests
      max_concurrent=16,      # requests at once
    )),
    image_search=ConfigDict(dict(cache="", max_results=5)),  # JSON file of results by question id
    max_new_tokens=EpisodeLimits.max_new_tokens_per_turn,  # per turn
    deadline=0.0,             # seconds an episode may take; 0 = no limit
  )


def _python_tool() -> ConfigDict:
  return section(  # an executor on another machine has its own limits of kernels
    KernelConfig,
    timeout=12,               # seconds of a cell, unless the call says otherwise [paper]
    max_timeout=60,           # the most it may ask for
    max_concurrent=0,         # cells at once; 0 = as many as there are cores
    # URL of an executor on another machine, such as http://sandbox-1:8400 (docs/tools.md); "" = this machine.
    url="",
  )


def _rollout() -> ConfigDict:
  return section(
    SamplingParams, "temperature", "top_p", "top_k", "presence_penalty",
    engine="embedded",        # in this process; or sglang: servers, see docs/sidecar.md
    # Most steps between rollouts and the training on them; 0 = every token is sampled by the weights that are
    # about to be trained. Above 0, runs do not repeat bit for bit, and the embedded engine needs a single device.
    staleness=0,
    embedded=section(
      EmbeddedConfig, "decode_block",
      # KV rows: running sequences and cached prefixes together. A row is a fixed block of memory:
      # 3.6 GB for 24,576 tokens of the 8B model in bfloat16.
      rows=32,
      length=0,               # tokens a row holds; 0 = the longest episode of the run's stages
      max_running=32,         # sequences decoded at once
      dtype="bfloat16",       # of the engine's parameters and KV cache
    ),
    # URLs of running SGLang servers. Empty: the run starts its own with the settings of `sidecar`. Their key
    # is read from the environment (AXPO_SIDECAR_API_KEY).
    urls=(),
    sglang=_sglang(),
    # SGLang servers that the run starts itself. They get GPUs of their own; the trainer uses the others of
    # this machine (stages.machine).
    sidecar=section(
      SidecarSpec, "device", "tensor_parallel", "mem_fraction", "max_total_tokens", "max_running", "env",
      servers=0,              # 0 = on half of this machine's GPUs; on a CPU, one
      gpus=(),                # ids of the servers' GPUs; () = the last ones
    ),
  )


def _sglang() -> ConfigDict:
  return section(
    SGLangConfig, "verify", "request_s", "attempts", "drain_s", "load_s", "image_folder",
    length=0,                 # most tokens of a sequence; 0 = the longest episode of the run's stages.
                              # The servers' context must be larger
    push_folder="",           # folder that trainer and servers both see (tmpfs, NFS); "" = in the workdir
    push_dtype=PushConfig.dtype,  # of the pushed weights; float32 for servers that run in float32
    push_shard_bytes=PushConfig.shard_bytes,  # size of a pushed file
    push_delta=PushConfig.delta,  # after the first push write changed values alone; needs servers of launch/sidecar.py
    push_writers=PushConfig.writers,  # files written at once: so many shards are in host memory
    fleet=section(FleetConfig),
  )


def _rl() -> ConfigDict:
  return ConfigDict(dict(
    # axpo, grpo (the same without resampling), or another name in rl.recipes.RECIPES (docs/algorithm.md). A
    # recipe sets fields of this section.
    recipe="axpo",
    steps=300,                # rollout phases, each followed by its updates
    questions=128,            # B, questions a step
    num_rollouts=8,           # N, rollouts a question [paper]
    updates=1,                # optimizer updates a step
    max_lost_steps=3,         # the run stops after so many steps in a row in which every rollout failed
    # Denominator of the ratio if updates = 1: "current" takes it from the update's own pass (the ratio is 1;
    # half the cost), "trainer" from a forward pass before it. More updates always take the latter.
    old_logprobs="current",
    # Keep the reference policy of the KL in the hosts' memory while it does not score. So the devices hold one
    # copy of the parameters less when gradients are computed.
    reference_offload=False,
    # Which rollouts are resampled, from where, and how many continuations a step may cost.
    resample=section(ResampleConfig),
    # How rewards become advantages.
    credit=section(CreditConfig),
    # Clipping, KL and normalisation (docs/algorithm.md).
    loss=section(LossConfig),
    # Training questions that are left out, by their pass rates in earlier samples (docs/chain.md).
    filter=ConfigDict(dict(
      policy="",              # folder of shards of the policy; "" = this run's stage "screen", if any
      teacher="",             # folder of shards of the teacher; "" = this run's "teach", if any
      solved=1.0,             # left out if the policy is right in at least this share [paper: 4 of 4]
      hopeless=0.0,           # left out if the teacher is right in at most this share [paper: 0 of 4]
    )),
    # Reward shaping of other recipes; off in AXPO.
    shaping=section(ShapingConfig),
    # Sampling more questions until enough of them are informative (DAPO); off in AXPO.
    dynamic=section(DynamicConfig),
  ))


def _optimizer(learning_rate: float, schedule: str, warmup: float) -> ConfigDict:
  return section(
    OptimizerConfig, "name", "weight_decay", "b1", "b2", "eps", "clip_norm", "mu_dtype",
    learning_rate=learning_rate,  # its peak
    schedule=schedule,        # constant or cosine (to zero)
    warmup=warmup,            # share of all steps
  )


def _batch() -> ConfigDict:
  return ConfigDict(dict(
    rows=8,                   # most rows of a micro-batch
    length=24_576,            # tokens of a row, a multiple of 64; several trajectories share a row
    # Compute once per row what trajectories have in common (prompt, images, frozen prefix). False gives the
    # same result at a higher cost.
    share_prefixes=True,
    image_rows=8,             # least rows of packed patches; larger sizes are this times a power of two
    logprob_chunk=2048,       # tokens per device whose logits are in memory at once
  ))


def _teach() -> ConfigDict:
  return section(
    OpenAIConfig, "max_concurrent", "attempts", "timeout_s", "omit", "extensions",
    engine="policy",          # config.model, by config.rollout; "openai": an endpoint; or "scripted"
    questions=0,              # only the first so many training questions; 0 = all
    rollouts=4,               # trajectories a question [paper]
    shard=32,                 # questions of a shard, the unit that a killed run repeats
    # For "openai": a chat endpoint that takes images. Its key is read from AXPO_TEACHER_API_KEY.
    url="",                   # such as http://localhost:8000/v1
    model="",                 # its name there
  )


def _screen() -> ConfigDict:
  return ConfigDict(dict(
    questions=0,              # only the first so many training questions, also in RL; 0 = all
    rollouts=4,               # a question [paper]
    shard=32,                 # questions of a shard
  ))


def _sft() -> ConfigDict:
  return ConfigDict(dict(
    # Trajectories of a rollout dump ("jsonl"), of sampled "shards", of "conversations" (OpenAI chat, ATIF,
    # ShareGPT: docs/data.md), or of the scripted "teacher", made on demand.
    source="jsonl",
    # The dump, the folder of shards ("" = of this run's "teach"), or the file or folder of conversations.
    path="",
    steps=1500,               # optimizer steps; 3 epochs [paper] of 64,274 trajectories
    examples=128,             # trajectories a step
    max_length=20_480,        # longer trajectories are dropped whole [paper]
    freeze_vision=True,       # SFT does not train the vision tower and its mergers
    # Coefficient of a mixture of experts' load-balancing loss; transformers' default is 0.001 where it is on.
    balance_coef=0.0,
    # Mix of each family's kinds of questions that the teacher answers (miniworld).
    kinds=ConfigDict(dict(read=1.0, two_hop=1.0, total=1.0)),
    # The scripted teacher's habits.
    teacher=section(
      TeacherConfig, "p_tool_small", "p_tool_large", "p_search", "p_stop_short", "p_python_hard",
      "p_python_easy"),
    keep_wrong=False,         # [paper] keep only trajectories with the right answer
    optimizer=_optimizer(learning_rate=1e-5, schedule="cosine", warmup=0.1),
  ))


def _judge() -> ConfigDict:
  return ConfigDict(dict(
    # An LLM behind an OpenAI-compatible endpoint. Its key is read from AXPO_JUDGE_API_KEY.
    url="",                   # such as http://localhost:8000/v1
    model="",                 # its name there
    max_concurrent=16,        # requests at once
    attempts=3,               # most attempts for a verdict if the endpoint is busy or fails
    timeout_s=60.0,           # seconds of one attempt
    omit=(),                  # fields left out of requests, for endpoints that refuse them: ("temperature",)
    max_requests=0,           # of one process; 0 = no limit. Answers beyond it get no verdict
  ))


def _eval() -> ConfigDict:
  return ConfigDict(dict(
    # Benchmarks of the stage "eval": names in BENCHMARKS, or your own as "module:name" (docs/extending.md), each
    # in a folder of its name in `folder`. None: the held-out questions, on which RL evaluates too.
    benchmarks=(),
    folder="",                # that holds the benchmarks
    # Judges answers of benchmarks that no rule can decide; without a url they stay undecided.
    judge=_judge(),
    shard=32,                 # questions of a shard, the unit that a killed run repeats
    questions=512,            # held-out questions
    rollouts=4,               # [paper]
    max_turns=5,              # [paper]
    max_new_tokens=32_768,    # per turn; as the response's, so that no turn is cut earlier
    max_response_tokens=32_768,  # [paper]
    max_total_tokens=49_152,  # fits the longest prompt with its images, and the response
    temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5,  # [paper]
    every=0,                  # RL steps between evaluations; 0 = only at start and end; -1 = none
    # The stage "eval" also repeats its rollouts with a call forced after their thinking.
    forced=False,
    extra_tools=(),           # offered in addition to agent.tools; training does not offer them
  ))
