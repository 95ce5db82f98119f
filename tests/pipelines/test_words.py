"""Words are found by the tokenizer's offsets, in every family's way of reading a prompt."""

import pytest

from gen_accel.pipelines.words import find_word, text_spans, word_tokens
from helpers.tiny import tiny_flux, tiny_hunyuan, tiny_wan

PROMPT = "a Red circle and a red square with a shadow"


def test_find_word_takes_whole_words_and_phrases():
    assert [PROMPT[a:b] for a, b in find_word(PROMPT, "red")] == ["Red", "red"]
    assert [PROMPT[a:b] for a, b in find_word(PROMPT, "red  SQUARE")] == ["red square"]


@pytest.mark.parametrize("word", ["are", "shadows", "", " "])
def test_find_word_refuses_what_is_not_there(word):
    with pytest.raises(ValueError, match="query word"):
        find_word(PROMPT, word)


@pytest.mark.parametrize("make", [tiny_hunyuan, tiny_wan, tiny_flux])
def test_sub_tokens_of_a_word(make):
    pipe, call = make()
    options = {k: call[k] for k in ("prompt_template",) if k in call}
    spans = text_spans(pipe, PROMPT, max_sequence_length=64, **options)
    tokens = word_tokens(spans, find_word(PROMPT, "shadow"))
    characters = "".join(PROMPT[slice(*spans[i])] for i in tokens)
    assert characters.strip().endswith("shadow")  # the tiny tokenizers know letters only
    assert len(tokens) >= 6


def test_template_of_hunyuan_video_is_cut_off():
    pipe, _ = tiny_hunyuan()
    template = {"template": "say {} now", "crop_start": 4}
    plain = text_spans(pipe, PROMPT, prompt_template={"template": "{}", "crop_start": 0})
    spans = text_spans(pipe, PROMPT, prompt_template=template)
    word = find_word(PROMPT, "square")
    embeds = pipe.encode_prompt([PROMPT], prompt_template=template)[2]
    assert int(embeds.sum()) == len(spans)
    ids = pipe.tokenizer(template["template"].format(PROMPT))["input_ids"][4:]
    letters = [pipe.tokenizer.decode(ids[i]) for i in word_tokens(spans, word)]
    assert "".join(letters) == "square"
    assert spans[-1] is None  # "now" is the template's
    assert len(word_tokens(plain, word)) == len(word_tokens(spans, word))


def test_a_prompt_that_does_not_fit_is_refused():
    pipe, call = tiny_hunyuan()
    with pytest.raises(ValueError, match="max_sequence_length=8"):
        text_spans(pipe, PROMPT, max_sequence_length=8, prompt_template=call["prompt_template"])


def test_a_prompt_that_wan_would_rewrite_is_refused():
    pipe, _ = tiny_wan()
    with pytest.raises(ValueError, match="Wan reads"):
        text_spans(pipe, "a  red   circle")
