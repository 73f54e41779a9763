"""The search family: its land, its corpus, and that it takes exactly two hops."""

import asyncio
import collections
import math
import pathlib
import re

import pytest

import axpo_jax
from axpo_jax.agent.tools.base import EpisodeState, ToolBox
from axpo_jax.agent.tools.corpus import Document, LocalSearch
from axpo_jax.agent.tools.search import SearchTool
from axpo_jax.miniworld import perception, search
from axpo_jax.model.chat import Chat

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
OFFICE = re.compile(r"The (\w+) of (\w+) is (\w+)\.")


def questions(n, seed=0, split="train"):
  return [search.make_question(seed, index, split) for index in range(n)]


def facts(seed=0):
  """(relation, of whom) -> what, read from the documents' sentences alone."""
  read = [OFFICE.fullmatch(document["text"]).groups() for document in search.documents(seed)]
  found = {(relation, of): what for relation, of, what in read}
  assert len(found) == len(read)  # no fact stands twice, so none contradicts another
  return found


def test_a_question_is_a_function_of_its_place():
  assert questions(20) == questions(20)
  assert questions(20) != questions(20, seed=1)
  with pytest.raises(ValueError, match="split 'test'"):
    search.make_question(0, 0, "test")


@pytest.mark.parametrize("split", perception.SPLITS)
def test_the_answer_follows_in_two_hops_and_only_so(split):
  known = facts()
  for question in questions(60, split=split):
    office, town = re.fullmatch(r"What is the colour of the (\w+) of (\w+)\?",
                                question.text).groups()
    person = known[office, town]
    assert question.answers == (known["colour", person],)
    assert question.meta["person"] == person
    # No document ties the town to a colour, nor the two facts together.
    assert ("colour", town) not in known
    for document in search.documents(0):
      words = re.findall(r"\w+", document["title"] + " " + document["text"])
      assert not (town in words and {"colour", *search.COLOURS} & set(words))


@pytest.fixture(scope="module")
def look_up():
  """The real tool over the corpus: a query and a number of results -> what the policy reads."""
  corpus = [Document(**document) for document in search.documents(0)]
  box = ToolBox([SearchTool(LocalSearch(corpus))], ["network"])

  def run(query, most):
    observation = asyncio.run(box.call(
        "tavily-search", {"query": query, "max_results": most}, EpisodeState("q", [])))
    assert observation.error is None
    return observation.text

  return run


@pytest.mark.parametrize("most", [1, 2, 5])
def test_each_search_shows_the_next_hop_first(look_up, most):
  for split in perception.SPLITS:
    for question in questions(40, split=split):
      meta, (colour,) = question.meta, question.answers
      first = look_up(f"{meta['office']} of {meta['town']}", most)
      assert search.office_fact(meta["office"], meta["town"], meta["person"]) in (
          first.split("\n\n[2]")[0])
      second = look_up(f"colour of {meta['person']}", most)
      assert search.colour_fact(meta["person"], colour) in second.split("\n\n[2]")[0]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_one_search_stops_short(look_up, most):
  """Whatever of the question is asked for, no result says the colour."""
  for question in questions(40, split="eval"):
    meta, (colour,) = question.meta, question.answers
    for query in (question.text, f"colour of {meta['town']}", meta["town"],
                  f"{meta['office']} of {meta['town']}", f"colour {meta['office']} {meta['town']}"):
      assert search.colour_fact(meta["person"], colour) not in look_up(query, most)


def test_no_split_knows_of_another():
  known, regions = facts(), search.land(0)
  for split, region in regions.items():
    names = {*region.towns, *region.colours}
    others = {name for other, r in regions.items() if other != split
              for name in (*r.towns, *r.colours)}
    assert not names & others
    inside = {what for (_, of), what in known.items() if of in region.towns}
    assert inside <= set(region.colours)


def test_a_guess_is_right_once_in_six_times():
  # Of all towns and offices of a split: no constant answer does much better.
  for split, region in search.land(0).items():
    colours = collections.Counter(region.colours.values())
    assert max(colours.values()) - min(colours.values()) <= 1
    asked = collections.Counter(region.colours[person] for person in region.holders.values())
    total = sum(asked.values())
    spread = math.sqrt(total * 5 / 36) * 2.5  # people hold several offices each
    assert all(abs(count - total / 6) < 4 * spread for count in asked.values()), split


def test_a_name_is_two_tokens_wherever_it_stands():
  """Its letter, with or without the space before it, and its digit: to be copied."""
  chat = Chat.from_pretrained(TINY)
  assert len(set(search.NAMES)) == len(search.NAMES) > 200
  for name in search.NAMES:
    for text in (f" of {name}.", f" of {name}?", f'"query": "king of {name}"}}', f"of {name}\n\n"):
      pieces = [chat.decode([i]) for i in chat.encode(text)]
      assert pieces[-4:-1][-2:] == [f" {name[0]}", name[1:]], text
    pieces = [chat.decode([i]) for i in chat.encode(f"\\boxed{{{name}}}")]
    assert pieces[-3:] == [name[0], name[1:], "}"]


def test_a_line_to_repeat_has_words_of_every_kind():
  words = []
  for index in range(80):
    question = search.make_question(0, index, mix=(("repeat", 1.0),))
    assert question.text == f"Repeat: {question.answers[0]}"
    words += question.answers[0].split()
  for kind in (search.NAMES, search.OFFICES, search.COLOURS, [str(n) for n in range(2000)]):
    assert sum(word in kind for word in words) > 15
    words = [word for word in words if word not in kind]
  assert not words


def test_a_look_up_is_answered_by_its_own_text():
  for index in range(80):
    question = search.make_question(0, index, mix=(("look_up", 1.0),))
    told, asked = question.text.rsplit("What is the ", 1)
    found = OFFICE.findall(told)
    facts = {(relation, name): what for relation, name, what in found}
    assert 1 <= len(facts) == len(found) <= 3
    relation, name = re.fullmatch(r"(\w+) of (\w+)\?", asked).groups()
    assert question.answers == (facts[relation, name],)
    assert len({name for _, name in facts}) <= 2
