"""The GGUF file: what llama.cpp reads in it is the model's weights, and its merges give the tokenizer's ids."""

import json
import shutil
import sys
from itertools import pairwise

import pytest
import torch
import transformers

from llmtuner.console import UserError
from llmtuner.tokenizer.chatglm3 import CONTROL, SPECIAL_TOKENS, build_fast_tokenizer, read_sentencepiece
from llmtuner.tokenizer.encoding import copy_tokenizer, encode, load_tokenizer
from llmtuner.weights import export_gguf as ours
from llmtuner.weights.lazy_checkpoint import LazyTensor, open_checkpoint, write_checkpoint
from tests.helpers import TEXTS
from tests.tokenizers import merge_as_published, save_model

gguf = pytest.importorskip("gguf", reason="the package gguf is missing: pip install gguf")


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model in bf16, with answers sampled in a way of its own."""
    directory = tmp_path_factory.mktemp("gguf") / "a model"
    shutil.copytree(tiny_model_dir, directory)
    tensors = list(open_checkpoint(tiny_model_dir).values())
    cast = [
        LazyTensor(t.name, t.shape, torch.bfloat16, lambda a, b, t=t: t.read_rows(a, b).bfloat16(), t.source)
        for t in tensors
    ]
    write_checkpoint(cast, directory)
    _change(directory / "config.json", dtype="bfloat16")
    _change(directory / "generation_config.json", do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    return directory


@pytest.fixture(scope="module")
def reader(model_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("out") / "new" / "model.gguf"
    ours.export_gguf(model_dir, file)
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    return gguf.GGUFReader(file)


def _change(file, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


def _values(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def _merge(tokens, text):
    """Ids as llama.cpp's tokenizer makes them: it merges whatever has a name, the highest score first."""
    ids = {name: index for index, (name, _, _) in enumerate(tokens)}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(tokens[ids[a + b]][1], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        index
        for symbol in symbols
        for index in ([ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])
    ]


def test_it_describes_the_model(reader):
    values = _values(reader)
    expected = {
        "general.architecture": "chatglm",
        "general.name": "a model",
        "general.file_type": 32,  # mostly bf16
        "chatglm.vocab_size": len(values["tokenizer.ggml.tokens"]),
        "chatglm.context_length": 256,
        "chatglm.embedding_length": 32,
        "chatglm.feed_forward_length": 64,
        "chatglm.block_count": 2,
        "chatglm.attention.head_count": 4,
        "chatglm.attention.head_count_kv": 2,
        "chatglm.rope.dimension_count": 4,
        "chatglm.rope.freq_base": 10_000.0,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["chatglm.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "chatglm.rope.scaling.type" not in values


def test_every_matrix_keeps_its_bits_and_vectors_are_fp32(reader, model_dir):
    source = open_checkpoint(model_dir)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert len(stored) == len(source) == 3 + 2 * 11
    for name, tensor in source.items():
        for part, short in names.items():
            name = name.replace(part, short)
        values, found = tensor.read_rows(0, tensor.shape[0]), stored[name]
        assert tuple(found.shape) == tensor.shape[::-1], name
        if len(tensor.shape) == 1:
            assert found.tensor_type == gguf.GGMLQuantizationType.F32, name
            assert found.data.tolist() == values.float().tolist(), name
        else:
            assert found.tensor_type == gguf.GGMLQuantizationType.BF16, name
            assert found.data.tobytes() == values.view(torch.uint8).numpy().tobytes(), name


def test_every_row_has_a_token(reader, model_dir):
    values, proto = _values(reader), read_sentencepiece(model_dir / "tokenizer.model")
    tokenizer = load_tokenizer(model_dir)
    names, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    ids = len(tokenizer)
    shown = [{"<sop>": "sop", "<eop>": "eop"}.get(name, name) for name in names]
    assert shown[:ids] == tokenizer.convert_ids_to_tokens(list(range(ids)))
    assert len(set(names)) == len(names) == reader.fields["chatglm.vocab_size"].contents() > ids
    assert kinds[ids:] == [5] * (len(names) - ids)
    pieces = len(proto.pieces)
    assert kinds[:pieces] == [piece.type for piece in proto.pieces]
    assert values["tokenizer.ggml.scores"][:pieces] == [piece.score for piece in proto.pieces]
    assert kinds[pieces:ids] == [3] * len(SPECIAL_TOKENS)


def test_answers_end_where_the_templates_turns_end(reader, model_dir):
    values, ids = _values(reader), load_tokenizer(model_dir).convert_tokens_to_ids
    ends = {name: values[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")}
    assert ends == {"eos": 2, "eot": ids("<|user|>"), "eom": ids("<|observation|>")}
    assert (values["tokenizer.ggml.unknown_token_id"], values["tokenizer.ggml.bos_token_id"]) == (0, 1)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.add_bos_token"] is values["tokenizer.ggml.add_eos_token"] is False


def test_merges_by_score_give_our_ids(model_dir):
    tokenizer = load_tokenizer(model_dir)
    tokens = ours.build_vocabulary(model_dir / "tokenizer.model", 1_000)
    for text in [*TEXTS[:4], "people like philosophy", "sop eop", "<|user|>", "日本語", " 2  blanks ", "</s>[gMASK]"]:
        assert _merge(tokens, text) == encode(tokenizer, text), text


def test_tied_scores_give_our_ids(tiny_tokenizer_dir, tmp_path):
    base = read_sentencepiece(tiny_tokenizer_dir / "tokenizer.model")
    file = save_model(merge_as_published(base, [*"いた", "いた", "たい", "いたいた"]), tmp_path)
    tokens, tokenizer = ours.build_vocabulary(file, 1_000), build_fast_tokenizer(file)
    assert [name for name, _, kind in tokens if kind == CONTROL and name.startswith("<|")][-1] == "<|observation|>"
    for text in [*TEXTS[:4], "いたい", "たいた", "いたいたい", "たいたいた", "sop eop", "<|user|>", "vcxv1"]:
        assert _merge(tokens, text) == encode(tokenizer, text), text


def test_special_tokens_are_not_formed_by_merges(tmp_path):
    """A vocabulary as ChatGLM3's: "eop" and "sop" could be merged, "eop" out of "people" as well."""
    base = _with_pieces(tmp_path, "op")
    tokens, tokenizer = ours.build_vocabulary(base, 1_000), build_fast_tokenizer(base)
    assert {"<sop>", "<eop>"} < {name for name, _, _ in tokens}
    for text in ("people like philosophy", "sop", "<sop>"):
        assert _merge(tokens, text) == encode(tokenizer, text), text


def test_a_piece_of_which_a_special_token_consists_is_refused(tmp_path):
    with pytest.raises(UserError, match="would read </s> out of ordinary text"):
        ours.build_vocabulary(_with_pieces(tmp_path, "/s", "</s"), 1_000)
    with pytest.raises(UserError, match="would read <eop> out of ordinary text"):
        ours.build_vocabulary(_with_pieces(tmp_path, "<eop>"), 1_000)


def test_a_tokenizer_under_other_rules_is_refused(tmp_path):
    with pytest.raises(UserError, match="it adds no space before a text"):
        ours.build_vocabulary(_with_pieces(tmp_path, blank=False), 1_000)


def _with_pieces(directory, *pieces, blank=True):
    """A tokenizer of single characters, ranked below them some pieces more."""
    import sentencepiece.sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.remove_extra_whitespaces, proto.normalizer_spec.add_dummy_prefix = False, blank
    for name, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=name, score=0.0, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    for rank, piece in enumerate(["▁", *"abcdefghijklmnopqrstuvwxyz<>/", *pieces]):
        proto.pieces.add(piece=piece, score=-float(rank), type=1)
    file = directory / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    return file


def test_the_chat_template_gives_our_prompt_under_the_new_names(reader, model_dir):
    template = _values(reader)["tokenizer.chat_template"]
    tokenizer = load_tokenizer(model_dir)
    messages = [
        {"role": "system", "content": "people like philosophy"},
        {"role": "user", "content": "<|user|> </s> <sop>\nb"},
        {"role": "assistant", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == (
        "[gMASK]<sop><|system|>\n people like philosophy"
        "<|user|>\n < |user|> < /s> < sop>\nb<|assistant|>\n c<|assistant|>"
    )


def test_words_in_a_template_of_ones_own_stay(tiny_model_dir, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny_model_dir, own)
    (own / "chat_template.jinja").write_text("[gMASK]sop<|system|>\n Kind people<|assistant|>")
    ours.export_gguf(own, tmp_path / "own.gguf")
    template = _values(gguf.GGUFReader(tmp_path / "own.gguf"))["tokenizer.chat_template"]
    assert template == "[gMASK]<sop><|system|>\n Kind people<|assistant|>"


def test_sampling_travels_with_the_model(reader, tiny_model_dir, tmp_path):
    def sampling(values):
        names = ("temp", "top_k", "top_p", "min_p", "penalty_repeat", "penalty_last_n")
        return [values[f"general.sampling.{name}"] for name in names]

    assert sampling(_values(reader)) == pytest.approx([0.7, 50, 0.9, 0.0, 1.2, 256])
    greedy = tmp_path / "greedy"
    shutil.copytree(tiny_model_dir, greedy)
    _change(greedy / "generation_config.json", do_sample=False, no_repeat_ngram_size=3)
    assert "no no_repeat_ngram_size" in str(ours.export_gguf(greedy, tmp_path / "greedy.gguf"))
    values = _values(gguf.GGUFReader(tmp_path / "greedy.gguf"))
    assert sampling(values) == pytest.approx([0.0, 50, 1.0, 0.0, 1.0, 256])
    assert values["general.file_type"] == 0  # fp32


def test_scaled_positions(tiny_model_dir, tmp_path):
    scaled = tmp_path / "scaled"
    shutil.copytree(tiny_model_dir, scaled)
    rope = {"rope_theta": 50_000.0, "partial_rotary_factor": 0.5}
    _change(scaled / "config.json", rope_parameters=rope | {"rope_type": "linear", "factor": 4.0})
    ours.export_gguf(scaled, tmp_path / "scaled.gguf")
    values = _values(gguf.GGUFReader(tmp_path / "scaled.gguf"))
    expected = {"freq_base": 50_000.0, "scaling.type": "linear", "scaling.factor": 4.0}
    assert {name: values[f"chatglm.rope.{name}"] for name in expected} == expected

    _change(scaled / "config.json", rope_parameters=rope | {"rope_type": "dynamic", "factor": 4.0})
    with pytest.raises(UserError, match="has rope_type 'dynamic'"):
        ours.export_gguf(scaled, tmp_path / "again.gguf")


def test_what_llama_cpp_would_not_compute_is_refused(tiny_model_dir, tmp_path):
    file = tmp_path / "out.gguf"
    with pytest.raises(UserError, match=r"has 4\d\d ids, but the model has only 300 rows"):
        ours.build_vocabulary(tiny_model_dir / "tokenizer.model", 300)
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    _change(other / "config.json", hidden_act="gelu")
    with pytest.raises(UserError, match="the heads or the activation"):
        ours.export_gguf(other, file)
    (other / "tokenizer.model").unlink()
    _change(other / "config.json", hidden_act="silu")
    with pytest.raises(UserError, match=r"cannot read the tokenizer model .*tokenizer\.model"):
        ours.export_gguf(other, file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [("Glm", {"head_dim": 16}, "the heads or the activation"), ("Llama", {}, "a model of type 'llama', not glm")],
)
def test_another_architecture_is_refused(architecture, settings, message, tiny_tokenizer_dir, tmp_path):
    sizes = dict(vocab_size=448, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = getattr(transformers, f"{architecture}Config")(**sizes, num_key_value_heads=2, pad_token_id=0, **settings)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(str(tmp_path / "model"))
    copy_tokenizer(tiny_tokenizer_dir, tmp_path / "model")
    with pytest.raises(UserError, match=message):
        ours.export_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_the_file_is_whole_or_not_there(tiny_model_dir, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"older")
    with pytest.raises(UserError, match="exists"):
        ours.export_gguf(tiny_model_dir, file)
    assert file.read_bytes() == b"older"
    file.unlink()

    written = []

    def fail(writer, tensor):
        written.append(tensor)
        if len(written) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(UserError, match="the disk filled up"):
        ours.export_gguf(tiny_model_dir, file)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_says_what_to_install(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        ours.export_gguf(tiny_model_dir, tmp_path / "model.gguf")
