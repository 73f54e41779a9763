"""An environment of your own: a guessing game against a user, who is scripted or an LLM.

    PYTHONPATH=examples axpo-train --config=configs/axpo_tiny.py --workdir=runs/own_environment \
      --config.agent.environment="own_environment:GuessingGame" --config.agent.reward="environment" \
      --config.agent.max_turns=4 \
      --config.stages="('rl',)" --config.rl.steps=2 --config.rl.questions=4 --config.eval.every=-1

Two steps, in a minute. Without the last line of the command it is the whole run, with SFT before and an evaluation
behind.

The user has a word in mind, the question's gold answer, and says whether it comes earlier or later in the
alphabet than the guess. With --config.agent.environment_args='{"url": "http://localhost:8000/v1", "model":
"..."}' an LLM behind an OpenAI-compatible endpoint puts that into words.
"""

import dataclasses

import aiohttp

from axpo_jax.agent.environment import COPY, Environment, Step
from axpo_jax.agent.rewards import extract_answer
from axpo_jax.data.question import normalise


class GuessingGame(Environment):
  """A guess is an answer in the usual form. The right one is worth 1, a wrong one `per_guess`.

  Args:
    per_guess: reward of a wrong guess.
    url, model: of the user; "" = scripted.
  """

  def __init__(self, per_guess: float = -0.1, url: str = "", model: str = ""):
    self.per_guess, self.url, self.model = per_guess, url, model
    self.waits = bool(url)  # an endpoint is asked beside the sampling
    # A scripted user answers the same again; an LLM may not, so its game is kept at every turn.
    self.resume = COPY if url else Environment.resume

  def opening(self, question):
    text = "I have a word in mind. Guess it; I say whether it comes earlier or later in the alphabet."
    return dataclasses.replace(question, text=f"{question.text}\n{text}")

  async def start(self, question, episode):
    return {"secret": normalise(question.answers[0]), "guesses": 0}

  async def step(self, state, turn):
    if turn.calls:  # a tool has answered them
      return Step()
    guess = extract_answer(turn.text, thinking=False)
    if guess is None:
      return Step("What is your guess? Write it as \\boxed{word}.", reward=self.per_guess)
    state["guesses"] += 1
    seen = {"guess": guess[:100], "guesses": state["guesses"]}
    if normalise(guess) == state["secret"]:
      return Step(reward=1.0, done=True, metadata=seen)
    hint = "later" if state["secret"] > normalise(guess) else "earlier"
    text = f"No. My word comes {hint} in the alphabet."
    return Step(await self._said(text) if self.url else text, reward=self.per_guess, metadata=seen)

  async def _said(self, text):
    """The text in the words of a model that plays the user."""
    messages = [{"role": "system", "content": "You play a user in a guessing game. Say this in your own words."},
                {"role": "user", "content": text}]
    async with aiohttp.ClientSession() as session, session.post(
        f"{self.url}/chat/completions", json={"model": self.model, "messages": messages}) as response:
      response.raise_for_status()
      return (await response.json())["choices"][0]["message"]["content"]
