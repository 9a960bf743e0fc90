"""Every break of tests/mutations.py still has the code that it breaks."""

from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("file", sorted({mutation.file for mutation in MUTATIONS}))
def test_breaks_stand(file):
    text = Path(ROOT / file).read_text()
    stale = [m.name for m in MUTATIONS if m.file == file and (m.old not in text or m.old == m.new)]
    assert not stale, f"{file} no longer holds what these breaks replace: {stale}"


def test_names_are_their_own():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
