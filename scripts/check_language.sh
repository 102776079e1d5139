#!/usr/bin/env bash
# Words of prose that this project replaces by the field's terms (CONTRIBUTING.md, "Rules"). Fails if one is found.
# Not searched: csrc/cpu/isa.cpp, where one of them is still an identifier.
set -euo pipefail
cd "$(dirname "$0")/.."
words='told|anew|so many|turns_around|rows_beside|misfit|serves'
if git grep -nwE "$words" -- csrc ':!csrc/cpu/isa.cpp' fastlstm docs README.md CONTRIBUTING.md CHANGELOG.md; then
  echo "language guard: replace the words above ($words)" >&2
  exit 1
fi
