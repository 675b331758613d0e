"""Images in the messages of a chat: an answer is of those that were sent, and of no others."""

from collections.abc import Iterator
from typing import Any

import httpx
import jax
import openai
import pytest
from PIL import Image as Pillow

from lechat_jax.generate import vision
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import bind
from lechat_jax.serve.engine import Engine, GenerationRequest
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.generate.test_generator import compilations
from tests.serve.conftest import Live, chat, live
from tests.serve.test_engine import Listener
from tests.support.images import TOWER, data_url, noise, png

LONG = "Here is what I have seen on my way home to the mountains"  # some chunks of 8 tokens
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module", name="server")
def seeing_server(seeing_model: LoadedModel) -> Iterator[Live]:
    with Engine(seeing_model, 2, max_queue=8, prefix_bytes=2**20) as engine, live(engine) as server:
        yield server


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an item for each time that an image is seen."""
    seen: list[int] = []
    right = vision.image_features

    def counted(*arguments: Any) -> Any:
        seen.append(1)
        return right(*arguments)

    monkeypatch.setattr(vision, "image_features", counted)
    return seen


def shown(image: Pillow.Image) -> Any:
    return url(data_url(png(image)))


def url(address: str) -> Any:
    return {"type": "image_url", "image_url": {"url": address}}


def text(text: str) -> Any:
    return {"type": "text", "text": text}


def user(*parts: Any) -> Any:
    return {"role": "user", "content": [*parts]}


def greedy(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    return chat(client, messages=messages, temperature=0, **fields)


def said(answer: Any) -> str:
    return answer.choices[0].message.content


def cached(answer: Any) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def test_an_answer_is_that_of_the_generator(
    seeing_model: LoadedModel, client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    images = [noise(40, 24, seed=1), noise(16, 32, seed=2)]
    conversation = Conversation(tokenizer, vision=TOWER)
    read = conversation.read_images(images)
    ids = conversation.ask("What is it?", read)
    generator = Generator(bind(seeing_model.config, seeing_model.weights), tokenizer, context=256)
    same = generator.generate(ids, 12, Sampling(temperature=0), images=read)
    answer = greedy(client, user(*map(shown, images), text("What is it?")))
    assert said(answer) == same.text
    assert answer.usage.prompt_tokens == len(ids)
    stream = greedy(client, user(*map(shown, images), text("What is it?")), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == same.text


def test_the_first_small_image_compiles_nothing(
    seeing_model: LoadedModel, tokenizer: Tokenizer
) -> None:
    """Nor do the chunks of its prompt that have text alone."""
    conversation = Conversation(tokenizer, vision=TOWER)
    images = conversation.read_images([noise(40, 24)])
    ids = conversation.ask(LONG, images)
    jax.clear_caches()  # of what other tests have compiled
    with Engine(seeing_model, 1) as engine, compilations() as compiled:
        listener = Listener()
        engine.enqueue([GenerationRequest(ids, 2, images=images)], [listener])
        listener.answer()
        assert compiled == []


def test_images_of_one_size_are_not_mixed_up(
    client: openai.OpenAI, tokenizer: Tokenizer, towers: list[int]
) -> None:
    """What is before them is read once; they are read once each."""
    one, other, third = (shown(noise(40, 24, seed)) for seed in (11, 12, 13))
    asked = [user(text(LONG), image, text(LONG)) for image in (one, other, third, one)]
    answers = [greedy(client, message) for message in asked]
    texts = [said(answer) for answer in answers]
    assert len({*texts}) == 3
    assert texts[3] == texts[0]
    before = 2 + len(tokenizer.encode(LONG))  # with BOS and [INST]
    n_ids = answers[0].usage.prompt_tokens
    assert [cached(answer) for answer in answers] == [0, 0, before // 8 * 8, (n_ids - 1) // 8 * 8]
    assert len(towers) == 3


def test_a_chat_goes_on_without_looking_at_its_images_again(
    client: openai.OpenAI, towers: list[int]
) -> None:
    question = user(shown(noise(40, 24, seed=21)), text(LONG))
    first = greedy(client, question)
    answer = {"role": "assistant", "content": said(first)}
    second = greedy(client, question, answer, user(text("And now?")))
    assert cached(second) == (first.usage.prompt_tokens - 1) // 8 * 8
    assert len(towers) == 1
    third = greedy(client, question, answer, user(shown(noise(8, 8, seed=22))))
    assert cached(third) >= cached(second)
    assert len(towers) == 2


def test_choices_have_one_look(client: openai.OpenAI, towers: list[int]) -> None:
    asked = user(shown(noise(24, 40, seed=31)), text("What is it?"))
    two = chat(client, messages=[asked], n=2)
    assert len(towers) == 1
    one = chat(client, messages=[asked])
    texts = [choice.message.content for choice in two.choices]
    assert texts[0] == said(one)
    assert texts[1] != texts[0]
    assert two.usage.prompt_tokens == one.usage.prompt_tokens


def test_an_image_is_not_measured_in_characters(client: openai.OpenAI) -> None:
    image = shown(noise(400, 300))
    assert len(image["image_url"]["url"]) > 300_000
    assert greedy(client, user(image)).usage.completion_tokens == 12


def test_an_address_may_be_a_string_as_in_mistrals_api(http: httpx.Client) -> None:
    address = data_url(png(noise(8, 8)))
    messages = [user({"type": "image_url", "image_url": address})]
    asked = {"messages": messages, "max_tokens": 2}
    assert http.post(CHAT, json=asked).status_code == 200


def test_it_says_whether_it_sees(client: openai.OpenAI, engine: Engine) -> None:
    (model,) = client.models.list()
    assert model.model_dump()["capabilities"] == {"completion_chat": True, "vision": True}
    with live(engine) as blind:
        (model,) = httpx.get(f"{blind.url}/v1/models").json()["data"]
    assert model["capabilities"] == {"completion_chat": True, "vision": False}


def refusal(http: httpx.Client, *parts: Any) -> tuple[str, str | None]:
    """The message and the code of the error for a message of these parts."""
    answer = http.post(CHAT, json={"messages": [user(*parts)], "max_tokens": 2})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    return error["message"], error["code"]


PNG = png(noise(40, 24))
TOO_MANY = [shown(noise(48, 48))] * 7  # of 42 tokens each


@pytest.mark.parametrize(
    ("parts", "message", "code"),
    [
        (
            [url("https://example.com/a.png")],
            "an image must be sent as a data URL (data:image/png;base64,…), not as "
            "'https://example.com/a.png', which is not fetched",
            None,
        ),
        (
            [url("0")],
            "an image must be sent as a data URL (data:image/png;base64,…), not as '0', which is "
            "not fetched",
            None,
        ),
        (
            [url("data:image/png;base64,iVBORw0KG")],
            "the data URL of an image is no base64: Invalid base64-encoded string: number of data "
            "characters (9) cannot be 1 more than a multiple of 4",
            None,
        ),
        (
            [url(data_url(PNG[:-300]))],
            "the data URL is no image that can be read: image file is truncated",
            None,
        ),
        (
            [url(data_url(b"<svg/>", "image/svg+xml"))],
            "the data URL is no image that can be read: cannot identify image file",
            None,
        ),
        (
            [url("data:image/png,abc")],
            "an image's data URL must be base64: data:image/png;base64,…",
            None,
        ),
        *(
            ([part], 'an image_url must be {"url": "data:image/png;base64,…"}', None)
            for part in ({"type": "image_url"}, {"type": "image_url", "image_url": {"url": 5}})
        ),
        (
            TOO_MANY,
            "the images have more than the 256 tokens that the context holds; send fewer or "
            "smaller ones",
            "context_length_exceeded",
        ),
        (
            TOO_MANY[:6],
            "the prompt has 261 tokens and the answer may have 2, and the context holds 256 in "
            "all; ask for less, or start the server with a longer --context",
            "context_length_exceeded",
        ),
    ],
)
def test_what_cannot_be_seen_is_refused(
    http: httpx.Client, parts: Any, message: str, code: str | None
) -> None:
    assert refusal(http, *parts, text("What is it?")) == (message, code)


def test_a_model_without_a_tower_is_sent_no_images(engine: Engine) -> None:
    said = "the model has no vision tower, so it cannot be sent images"
    with live(engine) as blind, httpx.Client(base_url=blind.url, timeout=60) as http:
        assert refusal(http, shown(noise(8, 8))) == (said, None)
