from pathlib import Path

import pytest

from star_dist.errors import UserError
from star_dist.files import read_text_lines


def test_lines_of_a_text_as_any_editor_saves_it(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_bytes("\ufeffred heart\r\n\r\n a boat\u2028at sea \n".encode())
    assert read_text_lines(text) == ["red heart", "a boat\u2028at sea"]
    text.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"prompts\.txt: byte 3 is no UTF-8; save it as UTF-8"):
        read_text_lines(text)
