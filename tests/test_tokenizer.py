"""The tokenizer against transformers' RobertaTokenizer (stored ids) and the random model's byte vocabulary."""
import json
import shutil

import numpy as np
import pytest
from conftest import GOLDEN, golden_config

import musicldm
import weights
from weights import InputError

TEXTS = json.loads((GOLDEN / "tokens.json").read_text())

LONG = TEXTS[-1][0]


@pytest.mark.parametrize("text, ids", TEXTS, ids=[repr(text[:20]) for text, _ in TEXTS])
@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_same_ids_as_the_reference(text, ids):
    result, mask = musicldm.tokenize(golden_config(), text)
    assert result.dtype == mask.dtype == np.int32
    assert result.tolist() == [ids] and mask.tolist() == [[1] * len(ids)]


def test_a_batch_is_padded_to_its_longest():
    ids, mask = musicldm.tokenize(golden_config(), ["techno", "", "a slow blues"])
    lengths = [musicldm.tokenize(golden_config(), text)[0].shape[1] for text in ("techno", "", "a slow blues")]
    assert ids.shape == (3, max(lengths)) and mask.sum(1).tolist() == lengths
    assert (ids[mask == 0] == 1).all()


def test_truncation_says_what_was_cut():
    text = "ambient pads " * 12 + "and one last violin</s>"
    with pytest.warns(UserWarning, match="longer than 46 tokens; cut: .* and one last violin</s>'"):
        ids, _ = musicldm.tokenize(golden_config(), text)
    assert ids.shape == (1, 48) and ids[0, -1] == 2


def test_a_vocabulary_that_changes_is_read_anew(tmp_path):
    folder = shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint")
    cfg, path = musicldm.load_config(musicldm.DEFAULT_CONFIG, folder), folder / "tokenizer" / "vocab.json"
    (before,), _ = musicldm.tokenize(cfg, "techno")
    vocab = json.loads(path.read_text(encoding="utf-8"))
    first, second = (next(token for token, number in vocab.items() if number == i) for i in before[1:3])
    path.write_text(json.dumps({**vocab, first: vocab[second], second: vocab[first]}), encoding="utf-8")
    (after,), _ = musicldm.tokenize(cfg, "techno")
    assert after.tolist() == [before[0], before[2], before[1], *before[3:]]
    path.unlink()
    with pytest.raises(InputError, match="vocab.json is missing"):
        musicldm.tokenize(cfg, "techno")


SETTINGS = json.loads((GOLDEN / "tokenizers" / "ids.json").read_text())


@pytest.fixture
def with_tokenizer(tmp_path):
    """A function that makes the golden checkpoint with another tokenizer folder, of a vocabulary of 470."""
    def make(name):
        folder = shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint")
        shutil.rmtree(folder / "tokenizer")
        shutil.copytree(GOLDEN / "tokenizers" / name, folder / "tokenizer")
        change(folder / "text_encoder/config.json", lambda config: config["text_config"].update(vocab_size=470))
        return folder
    return make


def change(path, function):
    content = json.loads(path.read_text(encoding="utf-8"))
    function(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_added_tokens_and_the_longest_prompt_are_the_reference_s_and_are_kept(with_tokenizer, name, tmp_path):
    """make_golden.py's tokenizers(): as RobertaTokenizer and RobertaTokenizerFast save it, as before 4.34, and as 5."""
    cfg = musicldm.load_config(weights=with_tokenizer(name))
    weights.save_params(cfg, weights.random_params(cfg, 0), tmp_path / "saved")
    saved = musicldm.load_config(weights=tmp_path / "saved")
    for text, ids in SETTINGS[name]:
        assert musicldm.tokenize(cfg, text)[0].tolist() == musicldm.tokenize(saved, text)[0].tolist() == [ids]
    for path in (tmp_path / "checkpoint/tokenizer").iterdir():
        assert (tmp_path / "saved/tokenizer" / path.name).read_bytes() == path.read_bytes()
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["tokenizer"][1] == ("RobertaTokenizerFast" if name == "new" else "RobertaTokenizer")


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_cut_text_is_quoted_with_its_added_tokens(with_tokenizer):
    with pytest.warns(UserWarning, match=r"longer than 18 tokens; cut: '.* synthwave\[808\]'"):
        musicldm.tokenize(musicldm.load_config(weights=with_tokenizer("slow")), LONG[:120] + " synthwave[808]")


@pytest.mark.parametrize("name, file, setting, message", [
    ("slow", "tokenizer_config", {"add_prefix_space": True}, "add_prefix_space is True; implemented: False"),
    ("slow", "tokenizer_config", {"padding_side": "left"}, "padding_side is 'left'; implemented: 'right'"),
    ("slow", "tokenizer_config", {"truncation_side": "left"}, "truncation_side is 'left'"),
    ("slow", "tokenizer_config", {"split_special_tokens": True}, "split_special_tokens is True"),
    ("slow", "tokenizer_config", {"bos_token": "[BOS]"}, r"bos_token is '\[BOS\]'; implemented: '<s>'"),
    ("slow", "tokenizer_config", {"model_max_length": 2}, "model_max_length is 2; valid: 3 or more"),
    ("slow", "tokenizer_config", {"additional_special_tokens": ["[303]"]}, r"added token '\[303\]' has no number"),
    ("slow", "tokenizer_config", {"added_tokens_decoder": {"469": {"content": "acid", "single_word": True}}},
     "different things of the added token"),
    ("slow", "tokenizer_config", {"added_tokens_decoder": {"470": {"content": "acid"}}}, "different things"),
    ("old", "added_tokens", {"acid": 470}, "below the vocab_size, 470"),
    ("old", "added_tokens", {"acid": "many"}, "below the vocab_size, 470"),
    ("old", "special_tokens_map", {"pad_token": {"content": "[PAD]"}}, r"pad_token is '\[PAD\]'"),
    ("fast", "tokenizer", {"added_tokens": [{"id": 468, "content": "acid"}]}, "different things of .*'acid'"),
    ("fast", "vocab", {"techno": 5}, "tokenizer.json holds another vocabulary than vocab.json and merges.txt"),
    ("new", "tokenizer", {"normalizer": {"type": "Lowercase"}}, "normalizer"),
    ("new", "tokenizer", {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer.type is 'Whitespace'"),
    ("new", "tokenizer", {"pre_tokenizer": None}, "pre_tokenizer"),
    ("new", "tokenizer", {"post_processor": {"type": "BertProcessing"}}, "post_processor.type is 'BertProcessing'"),
    ("new", "tokenizer", {"model": {"type": "WordPiece", "vocab": {}}}, "model.type is 'WordPiece'"),
    ("new", "tokenizer", {"model": {"type": "BPE", "ignore_merges": True}}, "model.ignore_merges is True|cannot read"),
    ("new", "tokenizer", {"model": None}, "cannot read .*tokenizer"),
    ("new", "tokenizer", {"added_tokens": [{"id": 467, "content": "acid", "single_word": True},
                                            {"id": 469, "content": "[808]"}]}, "'acid' .*is for single words alone"),
])
def test_settings_that_would_give_other_ids_are_refused(with_tokenizer, name, file, setting, message):
    folder = with_tokenizer(name)
    change(folder / "tokenizer" / f"{file}.json", lambda content: content.update(setting))
    with pytest.raises(InputError, match=message) as error:
        musicldm.load_config(weights=folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_byte_vocabulary_of_random_weights():
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, "random")
    ids, _ = musicldm.tokenize(cfg, "é <mask>")
    first = 5 + weights.byte_characters().index("Ã")
    assert ids.tolist() == [[0, first, 5 + weights.byte_characters().index("©"), 4, 2]]


def test_prompts_that_are_not_text():
    with pytest.raises(InputError, match="prompt is"):
        musicldm.tokenize(golden_config(), [1])
