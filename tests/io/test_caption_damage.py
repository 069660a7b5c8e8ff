"""Captions that are broken in form, too long, too deep or of odd types."""

import contextlib
import time
import warnings

import pytest

from cosmos3_jax.io import captions


@pytest.mark.parametrize(
    "text",
    ["```json\n" + "\n" * 50_000 + "x", "<answer>" + "x " * 50_000, "```" * 30_000, "~" * 100_000],
)
def test_long_texts_of_a_broken_form_take_no_time(text):
    """A search that starts again at every letter would take minutes; these take milliseconds."""
    start = time.process_time()
    with contextlib.suppress(ValueError):
        captions.unwrap(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_what_is_nested_too_deeply_is_no_traceback(opening, closing, depth):
    text = opening * depth + "1" + closing * depth
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in (captions.unwrap, captions.check_caption):
            with contextlib.suppress(ValueError):
                function(text)


@pytest.mark.parametrize("said", [{"fps": 10**1000}, {"duration": "9:" * 3000 + "9"}])
def test_numbers_beyond_all_measure_contradict(said):
    made = {"fps": 24.0, "duration": "7s"}
    assert captions.contradictions(said, made, 7.9).keys() == said.keys()


@pytest.mark.parametrize("caption", [{"text_renders": [1]}, {"subjects": [[[]]]}, {1: 2}, [[]]])
def test_a_caption_of_other_types_is_told(caption):
    assert captions.check_caption(caption)


def test_a_byte_order_mark_is_refused():
    with pytest.raises(ValueError, match="starts with a byte order mark"):
        captions.unwrap('\ufeff{"a": 1}')
