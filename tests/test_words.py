"""Words of any script, and what is measured by them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from florilegium.client.dialogue import Dialogue
from florilegium.client.rouge import rouge, rouge1
from florilegium.client.selection.lexicons import load_lexicons, matches
from florilegium.client.selection.scores import domain_specific_score, dominant_domain
from florilegium.client.synthesize import Request, SynthesisConfig, objection
from florilegium.client.words import bare, count, words
from florilegium.simulation.audit.canaries import plant
from florilegium.simulation.data.population import User

TEXTS = {
    "Russian": ("я думаю, что кошки любят рыбу", "кошки любят молоко, я думаю"),
    "Chinese": ("我有三只猫，它们喜欢鱼。", "三只猫喜欢牛奶。"),
    "Japanese": ("猫が三匹います。コーヒーも。", "猫は三匹いますか"),
    "Thai": ("ฉันมีแมวสามตัว", "แมวสามตัวกินปลา"),
    "Arabic": ("عندي ثلاث قطط تحب السمك", "قطط تحب الحليب"),
    "Hindi": ("मेरे पास तीन बिल्लियाँ हैं", "तीन बिल्लियाँ सोती हैं"),
    "Burmese": ("ငါ့မှာကြောင်သုံးကောင်ရှိတယ်", "ကြောင်သုံးကောင်"),
    "Korean": ("나는 고양이 세 마리가 있다", "고양이 세 마리"),
}


def test_words_are_letters_and_digits_with_their_marks() -> None:
    assert words("Don't stop: café №1, 你好!") == ["don", "t", "stop", "café", "1", "你", "好"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("ที่นี่") == ["ที่", "นี่"]  # with the marks on each character
    assert words("cafe\u0301") == words("café")
    assert words("东京2020 コーヒー") == ["东", "京", "2020", "コ", "ー", "ヒ", "ー"]


def test_a_text_is_as_long_as_it_has_words_or_characters() -> None:
    assert count("it's a well-known fact - really.") == len(["it's", "a", "well-known", "fact", "-", "really."]) == 6
    assert count("我有三只猫。") == 5
    assert count("ok 你好 world") == 4
    assert count("  ") == 0


@pytest.mark.parametrize("stemmed", [True, False])
def test_rouge_of_english_is_the_librarys(people: list[User], stemmed: bool) -> None:
    said = [d.response for u in people for d in u.stream if d.response.isascii()]
    assert len(said) > 50
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmed)
    for one, two in [*pairwise(said), ("running cats_and 3 dogs' ponies", "Run, cat and dog's pony 3.0")]:
        expected = theirs.score(one, two)
        assert rouge("rouge1", one, two, stemmed=stemmed) == expected["rouge1"].fmeasure
        assert rouge("rougeL", one, two, stemmed=stemmed) == expected["rougeL"].fmeasure


@pytest.mark.parametrize("language", TEXTS)
def test_a_text_is_like_itself_and_somewhat_like_a_similar_one(language: str) -> None:
    one, two = TEXTS[language]
    assert rouge1(one, one) == 1
    assert 0.3 < rouge1(one, two) < 0.95


@pytest.mark.parametrize("language", TEXTS)
def test_what_is_similar_in_any_script_passes_for_synthetic(language: str) -> None:
    one, two = TEXTS[language]
    request, config = Request("a", (one, "yes"), 0), SynthesisConfig()
    assert objection((two, "yes"), request, set(), config) == ""
    assert objection((one, "yes"), request, set(), config) == "copy"
    assert objection(("nothing alike", "yes"), request, set(), config) == "too far"


def test_a_lexicon_finds_words_where_there_are_no_spaces_and_with_marks(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('health = "医生 药 अस्पताल"\nschool = "学生 学校"', encoding="utf-8")
    lexicons = load_lexicons((str(own),))
    assert matches("我去看医生，他给我药。", lexicons) == {"health": ["医生", "药"]}
    assert matches("मैं अस्पताल में हूँ", lexicons) == {"health": ["अस्पताल"]}
    assert dominant_domain("学生去学校看医生", lexicons) == "school"
    assert domain_specific_score("看医生", lexicons) == pytest.approx(1 / 3 / 2)  # a word; 3 characters; 2 lexicons


def test_the_words_of_an_audit_are_of_any_script(people: list[User]) -> None:
    assert bare("Well, it is fine 2") == ["it", "is", "fine"]
    assert bare("हिन्दी में") == ["हिन्दी", "में"]
    assert bare("你好，我") == ["你", "好", "我"]
    prompts = [d.prompt for u in people for d in u.stream]
    said = [p for p in prompts if p.isascii()]
    assert Counter(w for p in said for w in bare(p)) == Counter(w for p in said for w in p.split() if w.isalpha())
    stream = [Dialogue(str(i), "मेरे पास तीन बिल्लियाँ हैं।", "हाँ") for i in range(4)]
    (planted,), canaries = plant([stream], 4, 0)
    assert len(planted) == len(canaries) == 4
