"""Who is read, stepped, paused and dropped, step by step, with a model that follows a script."""

import random

import pytest
from text_models import WORDS, Model

from services.inference.lanes import PROMOTE_AFTER_S, Priority
from services.inference.text_table import LiveText, TextTable
from tandem.errors import CheckpointCorrupt, DeadlineExceeded, QueueFull
from tandem.models.decoding import PREFILL_TOKENS, Text
from tandem.models.sampling import Sampling
from tandem.wire.limits import MAX_UNREAD_WORDS


def table_of(capacity: int = 4) -> tuple[TextTable, Model]:
    model = Model(capacity)
    return TextTable(model), model


def live(num_prompt: int = 0, max_words: int = 5, **changes: object) -> LiveText:
    text = Text(WORDS, Sampling(temperature=0.0))
    read = text.begin(tuple(3 for _ in range(num_prompt)))
    return LiveText(text, read[:-1], max_words, 0.0, **changes)  # type: ignore[arg-type]


def read_all(text: LiveText) -> list[str]:
    words = [drawn.word for drawn in text.told]
    text.taken, text.told = text.text.num_words, []
    return words


def test_a_text_is_written_to_its_end_and_its_first_word_is_news() -> None:
    table, _ = table_of()
    text = live(max_words=3)
    table.add(text)
    assert (table.num_waiting, table.has_work()) == (1, True)
    assert table.step(1.0) == [text]
    assert (table.num_running, table.num_waiting, text.waited_s) == (1, 0, 1.0)
    assert table.step(2.0) == []
    assert table.step(3.0) == [text]
    assert (text.ended_at, text.error, len(read_all(text))) == (3.0, None, 3)
    assert not table.has_work()
    assert table.everyone() == []


def test_others_join_between_steps_and_leave_as_they_end() -> None:
    table, model = table_of()
    first, second = live(max_words=4), live(max_words=2)
    table.add(first)
    table.step(1.0)
    table.add(second)
    assert table.step(2.0) == [second]
    assert table.step(3.0) == [second]
    assert (second.has_ended, first.has_ended, model.slots.num_texts) == (True, False, 1)
    assert table.step(4.0) == [first]


def test_a_long_prompt_is_read_in_pieces_and_holds_up_nobody() -> None:
    table, model = table_of()
    long, short = live(num_prompt=3 * PREFILL_TOKENS), live(num_prompt=4)
    table.add(long)
    table.add(short)
    assert table.step(1.0) == []
    assert model.pieces == [PREFILL_TOKENS]
    assert table.step(2.0) == [short], "its turn comes before the second piece of the long one"
    assert model.pieces == [PREFILL_TOKENS, 4, PREFILL_TOKENS]
    assert table.step(3.0) == [long]
    assert model.pieces == [PREFILL_TOKENS, 4, PREFILL_TOKENS, PREFILL_TOKENS]
    assert (len(short.told), len(long.told)) == (2, 1)


def test_more_than_there_are_slots_wait_and_the_urgent_come_first() -> None:
    table, model = table_of(capacity=2)
    texts = [live(max_words=2) for _ in range(4)]
    urgent = live(max_words=2, priority=Priority.HIGH)
    for text in (*texts, urgent):
        table.add(text)
    assert set(table.step(1.0)) == {urgent, texts[0]}
    assert (table.num_running, table.num_waiting) == (2, 3)
    table.step(2.0)
    assert set(table.step(3.0)) == {texts[1], texts[2]}
    assert model.slots.largest == 2


def test_a_text_that_is_ahead_of_its_reader_is_paused_and_its_row_goes_to_another() -> None:
    table, model = table_of(capacity=1)
    slow, other = live(max_words=MAX_UNREAD_WORDS + 3), live(max_words=2)
    table.add(slow)
    for now in range(MAX_UNREAD_WORDS):
        table.step(float(now))
    assert (slow.is_ahead, model.slots.num_texts, table.has_work()) == (True, 0, False)
    table.add(other)
    assert table.step(1000.0) == [other]
    assert len(read_all(slow)) == MAX_UNREAD_WORDS
    assert table.has_work()
    assert table.step(1001.0) == [other]
    for now in range(3):
        table.step(1002.0 + now)
    assert (slow.has_ended, len(read_all(slow))) == (True, 3)


@pytest.mark.parametrize("place", ["row", "paused", "reading", "waiting"])
@pytest.mark.parametrize("end", ["gone", "late"])
def test_whoever_leaves_is_dropped_at_the_next_step_wherever_it_is(place: str, end: str) -> None:
    table, model = table_of(capacity=1)
    text = live(num_prompt=2 * PREFILL_TOKENS if place == "reading" else 0, max_words=10_000, deadline=5000.0)
    if place == "waiting":
        table.add(live(max_words=10_000))
        table.step(0.0)
    table.add(text)
    for now in range(MAX_UNREAD_WORDS if place == "paused" else 1):
        table.step(float(now))
    text.gone = end == "gone"
    assert table.has_work() or end == "late"
    news = table.step(5000.0 if end == "late" else 1000.0)
    assert text.has_ended
    assert (text in news, isinstance(text.error, DeadlineExceeded)) == (end == "late", end == "late")
    assert text not in table.everyone()
    assert model.slots.num_texts == (place == "waiting")


def test_one_text_whose_answers_are_no_numbers_fails_alone() -> None:
    table, model = table_of()
    broken, well = live(num_prompt=1), live(max_words=3)
    model.slots.broken_at = 3
    table.add(broken)
    table.add(well)
    assert broken in table.step(1.0)
    assert isinstance(broken.error, CheckpointCorrupt)
    assert (model.slots.num_texts, well.error) == (1, None)


def test_random_company_changes_no_word() -> None:
    """Texts of all lengths come, go and pause at random; each has the words that it has alone."""
    chance = random.Random(1)

    def alone(num_prompt: int, max_words: int) -> list[str]:
        table, _ = table_of()
        text = live(num_prompt, max_words)
        table.add(text)
        words: list[str] = []
        while not text.has_ended:
            table.step(0.0)
            words += read_all(text)
        return words

    for _ in range(5):
        table, _ = table_of(capacity=chance.randrange(1, 6))
        sizes = [(chance.randrange(0, 600), chance.randrange(1, 2 * MAX_UNREAD_WORDS)) for _ in range(8)]
        texts = [live(*size) for size in sizes]
        words: dict[LiveText, list[str]] = {text: [] for text in texts}
        to_come = list(texts)
        while to_come or table.everyone():
            if to_come and chance.random() < 0.1:
                table.add(to_come.pop())
            table.step(0.0)
            for text in texts:
                if chance.random() < 0.01 or text.has_ended:
                    words[text] += read_all(text)
        assert [words[text] for text in texts] == [alone(*size) for size in sizes]


def test_more_that_wait_for_their_readers_than_there_is_memory_for_end() -> None:
    table, model = table_of(capacity=1)
    first, second = live(max_words=10_000), live(max_words=10_000)
    for text in (first, second):
        table.add(text)
        for now in range(MAX_UNREAD_WORDS):
            table.step(float(now))
    assert (first.has_ended, first.is_ahead) == (False, True)
    assert isinstance(second.error, QueueFull)
    assert model.slots.num_texts == 0


def test_waiting_makes_urgent() -> None:
    table, _ = table_of(capacity=1)
    low, normal = live(max_words=1, priority=Priority.LOW), live(max_words=1)
    # So long before that it counts as high.
    low.asked_at, normal.asked_at = -2 * PROMOTE_AFTER_S, 0.0
    table.add(normal)
    table.add(low)
    assert table.step(0.1) == [low]
