"""The scripted teacher as an engine.

In: sample requests whose session names a question of the miniature world. Out: samples with the teacher's text
as token ids. So supervised trajectories come from the same episode loop as the policy's rollouts, tools and
observations included. It needs no JAX and no weights.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from axpo_jax.data.question import Question
from axpo_jax.engine.protocol import RequestError, Sample, SampleRequest
from axpo_jax.engine.weightless import WeightlessEngine
from axpo_jax.miniworld import script, teacher
from axpo_jax.miniworld.habits import TeacherConfig
from axpo_jax.model.chat import Chat


class TeacherEngine(WeightlessEngine):
  """An Engine that samples from a script.

  It reads the turn, the earlier calls and their results from a request's token ids, and keeps no state between
  requests. So a cut transcript can be continued like any other. Log-probabilities are 0: they mean nothing.

  Args:
    chat: encodes the teacher's text and decodes the requests.
    questions_by_session: the question of every session that will be asked for.
    config: the teacher's habits; by default `TeacherConfig()`.
  """

  def __init__(self, chat: Chat, questions_by_session: Mapping[str, Question],
               config: TeacherConfig | None = None):
    super().__init__()
    self._chat = chat
    self._questions = questions_by_session
    self._config = config or TeacherConfig()

  async def generate(self, request: SampleRequest) -> list[Sample]:
    """One turn per seed; a function of the request alone.

    Raises:
      RequestError: the session is unknown, or the ids do not end in an assistant turn.
      EngineClosed: after `close`.
    """
    self._check_open()
    if request.session not in self._questions:
      raise RequestError(f"session {request.session!r} names no question of the teacher's "
                         f"{len(self._questions)}; pass the question's session to generate")
    question = self._questions[request.session]
    try:
      steps, written = script.read_history(self._chat.decode(request.ids))
    except ValueError as error:
      raise RequestError(str(error)) from error
    samples = [self._sample(request, question, steps, written, seed) for seed in request.seeds]
    self._count(request, samples)
    return samples

  def _sample(self, request: SampleRequest, question: Question, steps: list[script.Step],
              written: str, seed: int) -> Sample:
    rng = random.Random(seed)
    if "<tool_call>" in written:  # a prefix cut inside its call: go on with the call
      text = teacher.call(question, steps, rng, self._config)
    else:
      text = teacher.turn(question, steps, rng, self._config)
    ids = [*self._chat.encode(text), self._chat.im_end_id]
    room = request.params.max_new_tokens
    return Sample(
      ids=tuple(ids[:room]), logprobs=(0.0,) * min(len(ids), room),
      finish_reason="stop" if len(ids) <= room else "length",
      prompt_tokens=request.prompt_tokens, cached_tokens=0, weight_version=self._version)
