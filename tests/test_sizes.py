"""Sizes by tier and aspect ratio, as people say them."""

import warnings

import pytest

from cosmos3_jax import recipes

# Width x height by tier, for 1,1 4,3 3,4 16,9 9,16: the trained sizes.
TABLE = {
    "256": "256x256 320x256 256x320 320x192 192x320",
    "480": "640x640 736x544 544x736 832x480 480x832",
    "704": "960x960 1088x832 832x1088 1280x704 704x1280",
    "720": "960x960 1104x832 832x1104 1280x720 720x1280",
    "768": "1024x1024 1184x880 880x1184 1360x768 768x1360",
    "1080": "1440x1440 1664x1248 1248x1664 1920x1072 1072x1920",
}
CELLS = [
    (tier, aspect, tuple(map(int, size.split("x"))))
    for tier, row in TABLE.items()
    for aspect, size in zip(("1,1", "4,3", "3,4", "16,9", "9,16"), row.split(), strict=True)
]


@pytest.mark.parametrize("tier, aspect, size", CELLS)
def test_the_table_of_sizes(tier, aspect, size):
    assert recipes.parse_size(tier, aspect, "16,9") == size
    assert recipes.nearest_aspect(*size) == aspect
    assert tier == "704" or recipes.nearest_tier(*size) == tier or size == (960, 960)
    assert all(pixels % 16 == 0 for pixels in size)


@pytest.mark.parametrize(
    "size, aspect, expected",
    [
        ("480p", "9:16", (480, 832)),
        ("480P", "9/16", (480, 832)),
        ("480", "9x16", (480, 832)),
        ("480p", " 9 : 16 ", (480, 832)),
        ("480p", None, (832, 480)),
        ("480p", "2:3", (512, 768)),
        ("832x480", None, (832, 480)),
        ("832 X 480", None, (832, 480)),
        ("832×480", None, (832, 480)),
    ],
)
def test_spellings(size, aspect, expected):
    assert recipes.parse_size(size, aspect, "16,9") == expected


@pytest.mark.parametrize(
    "size, aspect, says",
    [
        ("500p", None, "choose one of 256, 480"),
        ("big", None, "write a tier such as 480p"),
        ("832x", None, "WIDTHxHEIGHT"),
        ("-832x480", None, "WIDTHxHEIGHT"),
        ("480p", "21:9", "choose one of 1:1, 4:3"),
        ("720p", "2:3", "for size 480 only"),
        ("832x480", "16:9", "leave aspect='16:9' out"),
        ("0x0", None, "not within 1x1 to 16384x16384"),
        ("832x999999999", None, "not within"),
    ],
)
def test_refusals_name_the_right_spelling(size, aspect, says):
    with pytest.raises(ValueError, match=says):
        recipes.parse_size(size, aspect, "16,9")


@pytest.mark.parametrize(
    "width, height, aspect",
    [(1920, 1080, "16,9"), (1080, 1920, "9,16"), (1179, 2556, "9,16"), (1200, 1600, "3,4"),
     (3000, 2000, "4,3"), (1000, 1100, "1,1"), (100000, 1, "16,9")],
)  # fmt: skip
def test_the_nearest_of_the_five(width, height, aspect):
    assert recipes.nearest_aspect(width, height) == aspect


@pytest.mark.parametrize(
    "num_frames, height, width, fps, says",
    [
        (13, 480, 832, 24, "13 frames are not within 24 to 300"),
        (301, 480, 832, 24, "24 to 300"),
        (301, 192, 320, 24, None),
        (401, 192, 320, 24, "24 to 400"),
        (205, 720, 1280, 24, "24 to 200"),
        (189, 720, 1280, 8, "8 frames a second are not within 10 to 30"),
        (189, 720, 1280, 60, "60 frames a second"),
        (189, 1072, 1920, 24, "a size for images"),
        (189, 720, 1280, 24, None),
        (1, 1072, 1920, 24, None),
    ],
)
def test_one_warning_outside_of_what_is_recommended(num_frames, height, width, fps, says):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipes.check_recommended(num_frames, height, width, fps)
    assert len(caught) == (says is not None)
    assert says is None or says in str(caught[0].message)
