"""The tokenizer against transformers' RobertaTokenizer (stored ids) and the random model's byte vocabulary."""
import json
import shutil

import numpy as np
import pytest
from conftest import GOLDEN, golden_config

import musicldm
from weights import InputError

TEXTS = json.loads((GOLDEN / "tokens.json").read_text())


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
    text = "ambient pads " * 60 + "and one last violin</s>"
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


def test_byte_vocabulary_of_random_weights():
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, "random")
    ids, _ = musicldm.tokenize(cfg, "é <mask>")
    first = 5 + musicldm.byte_characters().index("Ã")
    assert ids.tolist() == [[0, first, 5 + musicldm.byte_characters().index("©"), 4, 2]]


def test_prompts_that_are_not_text():
    with pytest.raises(InputError, match="prompt is"):
        musicldm.tokenize(golden_config(), [1])
