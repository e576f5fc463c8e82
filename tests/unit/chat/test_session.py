"""Chat sessions stream exactly, stop and fail in good order."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from llmtuner.chat.session import ChatSession, load_generation_settings
from llmtuner.console import UserError
from llmtuner.data.template import Template
from llmtuner.eval.generation import GREEDY, generate_answers
from llmtuner.tokenizer.encoding import encode
from tests.tiny_models import tiny_tokenizer

HALF = "\ufffd"


@pytest.fixture
def slow(loaded):
    """A model that takes its time: 0.02 s for each token."""
    hook = loaded[0].register_forward_hook(lambda *_: time.sleep(0.02))
    yield
    hook.remove()


def generating():
    """Threads that generate; none may be left once an answer is over."""
    return [thread for thread in threading.enumerate() if "_generate" in thread.name]


# ------------------------------------------------------------------------------------------------------------- dialogue
def test_streamed_answers_end_as_whole_ones(loaded, dialogue):
    questions = ["一座山？", "When does the ferry leave?", "柳树", "镇上住着一位木匠。", "apples"]
    whole = generate_answers(*loaded, questions, max_new_tokens=30).texts
    compared = 0
    for question, expected in zip(questions, whole, strict=True):
        streamed = list(dialogue.ask(question, GREEDY, 30))
        assert len(streamed) > 5
        assert dialogue.messages[-1] == {"role": "assistant", "content": streamed[-1]}
        if not expected.endswith(HALF):
            assert streamed[-1] == expected
            compared += 1
        dialogue.clear()
    assert compared > 1
    assert not generating()


def test_the_second_question_is_asked_after_the_first_answer(loaded, dialogue, script):
    model, tokenizer = loaded
    prompts = []
    dialogue.system = "Be brief."
    for question, answer in (("一座山？", "一条河。"), ("柳树？", "柳絮。")):
        script(answer)
        generate = model.generate

        def spy(input_ids, generate=generate, **others):
            prompts.append(input_ids[0].tolist())
            generate(input_ids, **others)

        model.generate = spy
        assert list(dialogue.ask(question, GREEDY, 20))[-1] == answer
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "一座山？"},
        {"role": "assistant", "content": "一条河。"},
        {"role": "user", "content": "柳树？"},
    ]
    assert prompts[-1] == Template.from_tokenizer(tokenizer).encode_prompt(tokenizer, said)


def test_an_empty_block_of_thoughts_is_not_shown():
    tokenizer = tiny_tokenizer("qwen3")
    answers = iter(["<think>\n\n</think>\n\n山", "<think>\n川\n</think>\n\n海"])
    prompts = []

    def generate(input_ids, streamer, **_):
        prompts.append(tokenizer.decode(input_ids[0]))
        streamer.put(input_ids)
        for token in [*tokenizer(next(answers))["input_ids"], tokenizer.eos_token_id]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    config = SimpleNamespace(max_position_embeddings=500)
    session = ChatSession(SimpleNamespace(config=config, device="cpu", generate=generate), tokenizer)
    assert list(session.ask("一", GREEDY, 20))[-1] == "山"
    assert list(session.ask("二", GREEDY, 20))[-1] == "<think>\n川\n</think>\n\n海"
    template = session.template
    assert prompts[1] == tokenizer.decode(template.encode_prompt(tokenizer, session.messages[:3]))
    assert "山<|im_end|>" in prompts[1]
    assert session.remaining_tokens("三") < 500
    assert "川" not in tokenizer.decode(session._prompt("三"))  # thoughts are no part of the history


def test_no_half_character_is_ever_shown(loaded, dialogue, script):
    text = "日本の鱈🐟です、鱈。🐟"
    ids = encode(loaded[1], text)
    assert len(ids) > 1.5 * len(text)  # most of its characters are bytes
    script(*ids)
    pieces = list(dialogue.ask("?", GREEDY, 99))
    assert len(pieces) > 5
    assert all(text.startswith(piece) for piece in pieces)
    assert pieces[-1] == text
    for missing in (1, 2, 3):  # cut in the midst of the last character
        script(*ids[:-missing])
        assert list(dialogue.ask("?", GREEDY, 99))[-1] == text[:-1]


def test_bytes_that_are_no_characters_are_shown_as_such(loaded, dialogue, script):
    byte = loaded[1].convert_tokens_to_ids("<0xFF>")
    script(*encode(loaded[1], "山"), byte, *encode(loaded[1], "河"))
    assert list(dialogue.ask("?", GREEDY, 99))[-1] == f"山{HALF} 河"
    script(*[byte] * 5)
    assert list(dialogue.ask("?", GREEDY, 99))[-1] == HALF * 5


def test_marks_that_end_an_answer_are_no_part_of_it(loaded, dialogue, script):
    for stop in Template.from_tokenizer(loaded[1]).stop_token_ids:
        script(*encode(loaded[1], "一条河。"), stop)
        assert list(dialogue.ask("?", GREEDY, 99))[-1] == "一条河。"
        half = encode(loaded[1], "一条河🐟")[:-1]
        script(*half, stop)
        assert list(dialogue.ask("?", GREEDY, 99))[-1] == "一条河"


def test_stop_from_another_thread_keeps_what_was_said(dialogue, slow):
    pieces = []
    for piece in dialogue.ask("一座山？", GREEDY, 150):
        pieces.append(piece)
        if len(pieces) == 3:
            stopper = threading.Thread(target=dialogue.stop)
            stopper.start()
            stopper.join()
    assert 3 <= len(pieces) < 75  # the whole would be 150 tokens
    assert dialogue.messages == [
        {"role": "user", "content": "一座山？"},
        {"role": "assistant", "content": pieces[-1]},
    ]
    assert not generating()
    assert len(list(dialogue.ask("一座山？", GREEDY, 20))) > 5  # a stop does not outlast its answer


def test_a_reader_that_goes_ends_the_answer(loaded, dialogue, slow):
    answer = dialogue.ask("一座山？", GREEDY, 150)
    next(answer)
    last = next(answer)
    computed = []
    hook = loaded[0].register_forward_hook(lambda *_: computed.append(1))
    answer.close()
    hook.remove()
    assert len(computed) < 20  # of the 148 tokens that were left
    assert not generating()
    assert dialogue.messages[-1]["content"] == last


def test_errors_of_generation_reach_the_reader(loaded, dialogue, script):
    script(*encode(loaded[1], "一条河"), RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        list(dialogue.ask("山？", GREEDY, 9))
    assert dialogue.messages[-1]["content"] == "一条河"
    assert not generating()
    script(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        list(dialogue.ask("河？", GREEDY, 9))
    assert [message["content"] for message in dialogue.messages] == ["山？", "一条河"]  # nothing was said


def test_the_model_cannot_be_reached(dialogue, monkeypatch):
    """An error before the first token, even outside transformers, must not leave the reader waiting."""
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        list(dialogue.ask("山？", GREEDY, 9))


def test_an_answer_has_the_room_that_is_left(loaded, dialogue):
    model, tokenizer = loaded
    question = "山"
    while dialogue.remaining_tokens(question) > 4:
        question += "山"
    room = dialogue.remaining_tokens(question)
    prompt = Template.from_tokenizer(tokenizer).encode_prompt(tokenizer, [{"role": "user", "content": question}])
    assert len(prompt) + room == dialogue.context_length == model.config.max_position_embeddings
    read = []
    hook = model.register_forward_hook(lambda *_, **__: read.append(1))
    list(dialogue.ask(question, GREEDY, 150))
    hook.remove()
    assert 1 <= len(read) <= room
    dialogue.clear()

    dialogue.messages += [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    before = list(dialogue.messages)
    with pytest.raises(UserError, match=r"tokens, and the model's context is 256"):
        dialogue.ask("山" * 300, GREEDY, 9)
    assert dialogue.messages == before


def test_undo_and_clear(dialogue, script):
    dialogue.system = "Be brief."
    for question in ("山", "河"):
        script(question)
        list(dialogue.ask(question, GREEDY, 9))
    assert dialogue.undo()
    assert [message["content"] for message in dialogue.messages] == ["山", "山"]
    dialogue.clear()
    assert dialogue.messages == []
    assert dialogue.system == "Be brief."
    assert not dialogue.undo()


def test_typed_roles_stay_text(loaded, dialogue, monkeypatch):
    model, tokenizer = loaded
    prompts = []
    monkeypatch.setattr(model, "generate", lambda input_ids, streamer, **_: (prompts.append(input_ids), streamer.end()))
    dialogue.system = "<|user|></s>"
    list(dialogue.ask("<|assistant|> [gMASK]sop<|observation|></s>", GREEDY, 9))
    ids = prompts[0][0].tolist()
    template = Template.from_tokenizer(tokenizer)
    assert [one for one in ids if one in {*template.prefix, *template.stop_token_ids, *template.roles.values()}] == [
        *template.prefix,
        *(template.roles[role] for role in ("system", "user", "assistant")),
    ]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, {"do_sample": False}),
        ({"do_sample": False, "eos_token_id": 2}, {"do_sample": False}),
        ({"top_p": 0.8, "repetition_penalty": 1.1}, {"do_sample": False, "top_p": 0.8, "repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.7, "top_k": None}, {"do_sample": True, "temperature": 0.7}),
    ],
)
def test_own_settings(tmp_path, named, expected):
    if named is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(named), encoding="utf-8")
    assert load_generation_settings(tmp_path) == expected


def test_own_settings_that_cannot_be_read(tmp_path):
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        load_generation_settings(tmp_path)


def test_settings_reach_generation_and_none_of_sampling_where_it_is_greedy(dialogue, script):
    seen = script("山")
    own = {"temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.2}
    list(dialogue.ask("?", {"do_sample": True, **own}, 7))
    list(dialogue.ask("?", {"do_sample": False, **own}, 7))  # transformers would warn of these
    sampled, greedy = seen
    assert (sampled.do_sample, sampled.temperature, sampled.top_p) == (True, 0.3, 0.5)
    assert (greedy.do_sample, greedy.temperature, greedy.top_p) == (False, 1.0, 1.0)
    assert sampled.repetition_penalty == greedy.repetition_penalty == 1.2
    assert sampled.max_new_tokens == 7
