"""Writing by rename: whole or not at all, and nothing is left beside it."""

import pytest

from kdsr_jax.files import replace_file


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_appears_whole_or_stays_as_it_was(tmp_path, shared):
    path = tmp_path / "a.txt"

    def torn(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, torn, shared)
    assert list(tmp_path.iterdir()) == []
    replace_file(path, lambda file: file.write(b"whole"), shared)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, torn, shared)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"whole"


@pytest.mark.parametrize("place", ["", "a\0b", "missing/a", "x" * 300])
def test_a_place_where_no_file_can_be_is_an_error(tmp_path, place):
    with pytest.raises((OSError, ValueError)):
        replace_file(place and tmp_path / place, lambda file: file.write(b"text"))
    assert list(tmp_path.iterdir()) == []
