"""Texts are translated sentence by sentence, and nothing between the sentences is lost."""

import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.client.passages import Passages
from collegium.client.results import FinishReason, Translated, Translation
from collegium.fabric.errors import CollegiumError, FailedPrecondition, InvalidArgument

TEXT = '  Dr. Smith left. He said: "No!"\n\nA second (see fig. 3). \tEnd\n'


def answer(index: int, text: str, finish: FinishReason = "stop", error: CollegiumError | None = None) -> Translated:
    one = Translation(text=text, token_ids=(index, 7), logprob=-1.0, finish_reason=finish, score=-0.5)
    return Translated(index=index, source=text, translations=() if error else (one,), source_tokens=3, error=error)


def through(texts: Sequence[str], language: str = "eng_Latn") -> list[Translated]:
    passages = Passages(language, 1)
    sentences = list(passages.cut_all(texts))
    found = [passages.join(answer(index, sentence)) for index, sentence in enumerate(sentences)]
    return [one for one in found if one is not None]


def test_a_text_is_cut_where_its_sentences_end_and_is_put_together_again() -> None:
    passages = Passages("eng_Latn", 1)
    sentences = passages.cut(TEXT)
    assert sentences == ["Dr. Smith left.", 'He said: "No!"', "A second (see fig. 3).", "End"]
    found = [passages.join(answer(index, f"<{each}>")) for index, each in enumerate(sentences)]
    assert found[:3] == [None, None, None]
    whole = found[3]
    assert whole is not None
    assert whole.text == '  <Dr. Smith left.> <He said: "No!">\n\n<A second (see fig. 3).> \t<End>\n'
    assert (whole.index, whole.source, whole.source_tokens) == (0, TEXT, 12)
    (one,) = whole.translations
    assert (one.token_ids, one.logprob, one.finish_reason) == ((0, 7, 1, 7, 2, 7, 3, 7), -4.0, "stop")
    assert one.score is None


@pytest.mark.parametrize("language", ["eng_Latn", "fra_Latn", "zho_Hans", "und_Zzzz", ""])
@given(
    texts=st.lists(st.text(alphabet=st.sampled_from("ab.!?。 \n\t\r\u2028\u3000Dr\"')é😀"), max_size=40), max_size=4)
)
def test_whatever_the_texts_are_they_come_back_whole_and_in_order(texts: list[str], language: str) -> None:
    found = through(texts, language)
    assert [one.text for one in found] == texts
    assert [one.index for one in found] == list(range(len(texts)))


def test_a_text_of_one_sentence_is_as_without() -> None:
    (one,) = through(["One sentence."])
    assert one.translations[0] == answer(0, "One sentence.").translations[0]


def test_a_sentence_that_fails_or_is_cut_marks_its_text_alone() -> None:
    passages = Passages("eng_Latn", 1)
    assert list(passages.cut_all(["One. Two.", "Three. Four."])) == ["One.", "Two.", "Three.", "Four."]
    error = InvalidArgument("too long", field="text", remedy="shorten it")
    given = [answer(0, "1"), answer(1, "2", error=error), answer(2, "3", "length"), answer(3, "4")]
    first, second = (one for one in map(passages.join, given) if one is not None)
    assert (first.error, first.translations) == (error, ())
    assert second.error is None and second.translations[0].finish_reason == "length"


@pytest.mark.parametrize("text", ["Plan B\u00a0.", "D\u202f. next", "D\u3000. x", "A\u2028."])
def test_a_text_at_which_sentencex_panics_goes_whole_and_the_others_are_cut(text: str) -> None:
    found = through([f"One. {text}", "Two. Three."])
    assert [one.text for one in found] == [f"One. {text}", "Two. Three."]
    passages = Passages("eng_Latn", 1)
    assert passages.cut(text) == [text.strip()] and passages.cut("Two. Three.") == ["Two.", "Three."]


def test_nothing_of_a_long_text_is_left_out() -> None:
    paragraph = 'This is a sentence, e.g. one. "Another one!" he said. And (see fig. 3) the last.\n\n\n'
    text = "".join(f"{number}. {paragraph}" for number in range(5000))  # sentencex leaves some of it out
    (one,) = through([text])
    assert one.text == text
    assert len(Passages("eng_Latn", 1).cut(text)) > 10_000


def test_runs_of_line_ends_are_cut_in_proportion_to_their_length() -> None:
    text = "One." + "\n" * 2_000_000 + "Two."  # by their square this would take minutes
    (one,) = through([text])
    assert one.text == text


def test_what_is_no_utf8_goes_whole_so_that_it_is_refused() -> None:
    assert Passages("eng_Latn", 1).cut("One. \udcff Two.") == ["One. \udcff Two."]


def test_several_translations_of_a_split_text_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="has one translation, not 3"):
        Passages("eng_Latn", 3)
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(FailedPrecondition, match="sentencex") as found:
        Passages("eng_Latn", 1)
    assert found.value.remedy == "run pip install '.[sentences]' in a checkout of the project"
