import open_clip
import pytest

from neuclip.data.truncation import count_truncated


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=8)


@pytest.mark.parametrize(
    ("words", "truncated"),
    [(0, 0), (5, 0), (6, 0), (7, 1), (100, 1)],  # the start and the end of a text are tokens, too
)
def test_texts_longer_than_the_context(tokenizer, words, truncated):
    text = " ".join(["cat"] * words)
    assert count_truncated(tokenizer, [text]) == truncated
    assert count_truncated(tokenizer, ["a cat", text, text], tokenizer(["a cat", text, text])) == (
        2 * truncated
    )


def test_a_tokenizer_of_unknown_context(tokenizer):
    assert count_truncated(lambda texts: tokenizer(texts), ["cat " * 100]) == 0
    assert count_truncated(tokenizer, []) == 0
