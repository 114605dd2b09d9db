"""The picture of the two streams is drawn from the model's own mask."""

import pytest

from core.common.errors import UserError
from core.study.blocks import main


def test_the_picture_is_written(tmp_path, capsys):
    main([str(tmp_path / 'blocks.png')])
    assert (tmp_path / 'blocks.png').read_bytes().startswith(b'\x89PNG') and 'picture written' in capsys.readouterr().out


def test_a_picture_must_be_named():
    with pytest.raises(UserError, match='name one picture'):
        main([])
