"""Names on sheets: drawn in letters that there are, whatever script they are in."""

from collections.abc import Iterator

import PIL.ImageFont
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simclr_dali.shards import lettering


@pytest.fixture(params=[False, True])
def no_system_fonts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param:

        def none(*_: object, **__: object) -> None:
            raise OSError("no such font")

        built_in = PIL.ImageFont.load_default(11)
        monkeypatch.setattr(PIL.ImageFont, "truetype", none)
        monkeypatch.setattr(PIL.ImageFont, "load_default", lambda size: built_in)
    lettering.font.cache_clear()
    yield bool(request.param)
    lettering.font.cache_clear()


def test_what_the_font_lacks_is_written_otherwise(no_system_fonts: bool) -> None:
    assert lettering.lettered("golf ball\nn01440764") == "golf ball\nn01440764"
    found = lettering.lettered("säge")
    assert found == "sage" if no_system_fonts else found in ("säge", "sage")
    assert lettering.lettered("\U00012345") == "\\U00012345"


@given(st.text(max_size=20))
def test_every_name_can_be_drawn(name: str) -> None:
    text = lettering.lettered(name)
    missing = bytes(lettering.font().getmask("\U0010ffff"))
    assert all(one == "\n" or bytes(lettering.font().getmask(one)) != missing for one in text)
