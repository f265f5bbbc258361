"""The list of mutations follows the code; running them takes minutes, see tests/mutations."""

import pytest

from tests.mutations.run import MUTATIONS, REPOSITORY


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_line_is_there_once_and_would_change(mutation):
    text = (REPOSITORY / "megatron_vespo" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert (REPOSITORY / mutation.tests[0]).is_file()
