#!/usr/bin/env bash
# package: tokenizers 0.23.3
# date: 2026-11-29
# expected: a BPE model without an unknown token leaves out a character that is not in its
#   vocabulary, and `offsets` still say where in the text each remaining token stands
# seen: the offsets of the tokens behind a dropped character are too small by its width: they point
#   at other characters, and the last characters of the text seem to belong to no token
# ours: dsalt names the characters that a tokenizer drops by encoding each of them alone, not by the
#   offsets (packages/dsalt/tests/test_extras.py, test_what_other_tokenizers_cannot_write_is_named)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, models

text = "abzaz"
encoded = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).encode(text)
places = [text[start:end] for start, end in encoded.offsets]
print("tokens ", encoded.tokens)
print("offsets", encoded.offsets)
print("the text at these offsets", places)
assert encoded.tokens == ["a", "b", "a"]
assert places == ["a", "b", "z"], "the third offset was expected to point at the z"
PYTHON
