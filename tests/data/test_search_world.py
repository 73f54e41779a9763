"""The search family: its land, its corpus, and that it takes exactly two hops."""

import collections
import json
import math
import pathlib
import re

import pytest

import axpo_jax
from axpo_jax.data.miniworld import perception, search
from axpo_jax.model.chat import Chat

TINY = pathlib.Path(axpo_jax.__file__).parent / "assets" / "tiny_tokenizer"
OFFICE = re.compile(r"The (\w+) of (\w+) is (\w+)\.")


def questions(n, seed=0, split="train"):
  return [search.make_question(seed, index, split) for index in range(n)]


def facts(seed=0):
  """(relation, of whom) -> what, read from the documents' sentences alone."""
  read = [OFFICE.fullmatch(document["content"]).groups() for document in search.documents(seed)]
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
      words = re.findall(r"\w+", document["title"] + " " + document["content"])
      assert not (town in words and {"colour", *search.COLOURS} & set(words))


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
  """Its initial, with or without the space before it, and its ending: to be copied."""
  chat = Chat.from_pretrained(TINY)

  def pieces(text):
    return [chat.decode([i]) for i in chat.encode(text)]

  assert len(set(search.NAMES)) == len(search.NAMES) > 300
  for name in search.NAMES:
    initial, ending = name[0], name[1:]
    assert pieces(f"of {name}.")[-3:] == [f" {initial}", ending, "."]
    assert pieces(f"king of {name}?")[-3:] == [f" {initial}", ending, "?"]
    assert pieces(f'"query": "king of {name}"}}')[-3:] == [f" {initial}", ending, '"}']


def test_the_corpus_is_written_as_json_lines(tmp_path):
  search.write_corpus(tmp_path / "corpus.jsonl", 3)
  lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == search.documents(3)
  assert search.documents(3) != search.documents(4)
