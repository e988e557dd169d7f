"""What the page collects from the events of requests, and that it cancels what is not awaited."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from medmax_jax.demo import answers
from medmax_jax.demo.answers import Note, ShownImage
from medmax_jax.generation.requests import GenerateError
from medmax_jax.generation.sampling_params import check_sample
from medmax_jax.serving import (
    Failed,
    Finished,
    GenerationRequest,
    ImageDone,
    QueueFullError,
    TextDelta,
    Ticket,
)

IMAGE, CODES = PIL.Image.new("RGB", (4, 4)), np.arange(4)


def asked(model):
    sample = answers.make_sample(temperature=0, max_tokens=5, seed=0)
    return GenerationRequest(model=model, prompt=np.arange(3), sample=sample, mode="text")


def finished(reason="stop"):
    return Finished(reason=reason, prompt_tokens=3, completion_tokens=2, logprobs=None)


@dataclasses.dataclass
class Scripted:
    """Accepts requests as the service does, and delivers these (request, event) at the last one."""

    events: list
    requests: int
    tickets: list = dataclasses.field(default_factory=list)
    cancelled: list = dataclasses.field(default_factory=list)

    def submit(self, request, deliver):
        if request.model == "full":
            raise QueueFullError("8 requests wait already", 1)
        index = len(self.tickets)
        self.tickets.append(
            Ticket(index, request, deliver, lambda t: self.cancelled.append(t.index))
        )
        if len(self.tickets) == self.requests:
            for number, event in self.events:
                self.tickets[number].deliver(event)
        return self.tickets[-1]


def test_answers_grow_in_the_order_of_events():
    events = [(1, TextDelta("a")), (0, TextDelta("A ")), (0, TextDelta("CT.")), (1, finished())]
    events += [(0, ImageDone(IMAGE, CODES)), (0, TextDelta("End")), (0, finished("length"))]
    *_, last = found = list(answers.answers(Scripted(events, 2), [asked("a"), asked("b")]))
    assert found[:3] == [((), ("a",)), (("A ",), ("a",)), (("A CT.",), ("a",))]
    text, image, end, note = last[0]
    assert (text, image.image, image.codes, end) == ("A CT.", IMAGE, CODES, "End")
    assert note == Note("(stopped at the limit of tokens)") and last[1] == ("a",)
    assert answers.text_of(last[0]) == "A CT.\nEnd\n(stopped at the limit of tokens)"


@pytest.mark.parametrize(
    ("events", "turn"),
    [
        ([finished()], (Note("(no text)"),)),
        ([TextDelta("A"), Failed("cancelled", "the client")], ("A", Note("(stopped)"))),
        ([TextDelta("A"), Failed("time", "no answer within 600 seconds")],
         ("A", Note("(incomplete: no answer within 600 seconds)"))),
    ],
)  # fmt: skip
def test_an_answer_without_text_or_end_has_a_note(events, turn):
    *_, (last,) = answers.answers(Scripted([(0, event) for event in events], 1), [asked("a")])
    assert last == turn


def test_a_reader_that_leaves_cancels_all_requests():
    service, running = Scripted([(0, TextDelta("A"))], 2), []
    reader = answers.answers(service, [asked("a"), asked("b")], running)
    next(reader)
    assert [ticket.index for ticket in running] == [0, 1]
    reader.close()
    assert service.cancelled == [0, 1] and not running
    service = Scripted([], 2)
    with pytest.raises(QueueFullError):
        next(answers.answers(service, [asked("a"), asked("full")]))
    assert service.cancelled == [0]


def test_a_prompt_has_codes_of_generated_images_and_no_notes():
    class Service:
        def prompt(self, turns):
            return turns

    turns = [(ShownImage(IMAGE), "A CT?"), (ShownImage(IMAGE, CODES), "b", Note("(stopped)"))]
    assert answers.prompt(Service(), turns) == [[IMAGE, "A CT?"], [CODES, "b"]]


def test_temperature_0_is_greedy_and_wrong_numbers_are_refused():
    sample = answers.make_sample(temperature=0, max_tokens=5, seed=7, guidance=2)
    assert sample.text_greedy and (sample.max_gen_len, sample.seed) == (5, 7)
    assert sample.guidance_scale_text == 2
    assert not answers.make_sample(temperature=0.5, max_tokens=5, seed=0).text_greedy
    with pytest.raises(GenerateError, match="seed"):
        check_sample(answers.make_sample(temperature=1, max_tokens=5, seed=-1))
